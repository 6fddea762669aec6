"""What every layout is made of, and finding the pairs of images and masks in folders."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, NoReturn

from rdd_pipeline.config import DataParams
from rdd_pipeline.data.labels import Color, LabelSet
from rdd_pipeline.errors import DataProblem, UserError, printable
from rdd_pipeline.files import require_regular_file

_LONGEST_LINE = 8192
"""Characters; as long as two paths can be."""
_LARGEST_LIST = 100_000_000
"""Bytes; a line for each of a million images."""

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".webp")
IMAGE_SUFFIXES = (*MASK_SUFFIXES, ".jpg", ".jpeg")
_MASK_KINDS = "PNG, TIFF, BMP or WebP"
_IMAGE_KINDS = f"{_MASK_KINDS.replace(' or', ',')} or JPEG"
_PICTURES = (
    *IMAGE_SUFFIXES, ".gif", ".heic", ".heif", ".avif", ".jfif", ".jp2", ".jxl", ".pgm", ".ppm",
    ".pbm", ".tga", ".exr", ".npy", ".npz", ".mat", ".dcm",
)  # fmt: skip
"""Suffixes that lists may name files with."""
_BESIDE = (
    ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml",
    ".ini", ".cfg", ".log", ".html", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".py", ".m", ".sh",
    ".ipynb", ".db", ".lnk", ".zip", ".tar", ".7z", ".rar", ".md5", ".sha256", ".part", ".tmp",
    ".crdownload", ".tfw", ".pgw", ".jgw", ".bpw", ".wld", ".ovr", ".prj", ".cpg", ".geojson",
)  # fmt: skip
"""Suffixes of what lies beside pictures and is none, so two such files are no pair."""
_TEXTS = ("readme", "license", "licence", "notice", "makefile")
"""Likewise, names without a suffix."""
_LITTER = (
    "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found",
)  # fmt: skip
"""Folders that operating systems and storage devices leave between the images."""
_ALIASES = {"train": ("training",), "val": ("valid", "validation"), "test": ("testing",)}


class Pair(NamedTuple):
    """An image and its mask; the paths are relative to the data set's folder, with `/`."""

    split: str
    name: str
    image: str
    mask: str


class Problem(NamedTuple):
    """One thing that is wrong with a data set."""

    file: str
    """What it is about: the path of an image, mask, list or folder as in `Pair`."""
    text: str
    """What was found, what was expected and what to do; names the file."""
    blocks: bool = False
    """It is not about single images, so leaving some out does not help."""


class Listing(NamedTuple):
    """What a folder holds, and what is wrong with it."""

    pairs: tuple[Pair, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...] = ()
    """What is allowed and may still be a mistake: one line each, with a count and first names."""
    absent: Mapping[str, Problem] = MappingProxyType({})
    """Splits that are needed and not there, with their problems; some can be made of `train`."""


class Layout(NamedTuple):
    """One way to organize a data set's folders."""

    labels: LabelSet
    list_pairs: Callable[[Path], Listing]
    expected: str
    """What the folder should look like and where it comes from, for error messages."""
    prepare: Callable[[Path, DataParams], Path] | None = None
    """Makes the data set be there and returns its folder; None: it is used as it is, and a program
    cannot get it."""
    default_ignored: tuple[int, ...] = ()
    """Mask values that are ignored though the table of labels does not say so."""
    palette: Mapping[int, Color] | None = None
    """Colors that mask values should have where masks have a palette; None: nothing is known."""


def refuse_download(name: str, root: Path, expected: str) -> NoReturn:
    """Say that a program cannot get the data set of a layout.

    Raises:
        UserError: In any case; the message says what is expected.
    """
    raise UserError(
        f"data.download is on, but the data set of the layout '{name}' cannot be downloaded by a "
        f"program. Put it in {root} and set data.download=false. Expected: {expected}"
    )


def check_root(root: Path, expected: str) -> None:
    """Make sure that `root` is a folder.

    Raises:
        DataProblem: It is not; the message says what was expected and where to point.
    """
    if not root.is_dir():
        found = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataProblem(
            f"The folder with the images, {root}, {found}. Expected: {expected} "
            "Put the data there or set `data.path` to the folder that holds it."
        )
    if (fault := _fault_of_name(str(root))) is not None:
        shown, reason = fault
        raise DataProblem(f"The name of the folder with the images, {shown}, {reason}")


def list_pairs(root: Path, layout: Layout, *, made: Collection[str] = ()) -> Listing:
    """All pairs below `root` in a fixed order, and the problems that were found.

    Args:
        root: The data set's folder.
        layout: How it is organized.
        made: Splits that are made of training images later on, so that they may be missing.

    Raises:
        DataProblem: `root` is not a folder.
    """
    check_root(root, layout.expected)
    listing = layout.list_pairs(root)
    lacking = [problem for split, problem in listing.absent.items() if split not in made]
    return listing._replace(problems=(*listing.problems, *lacking))


def raise_problems(
    root: Path, problems: Iterable[Problem], *, shown: int = 20, advice: str = ""
) -> None:
    """Raise one DataProblem that lists the first `shown` problems; do nothing without any.

    Args:
        root: The data set's folder.
        problems: All of them.
        shown: How many the message has room for.
        advice: Last line of the message.
    """
    problems = list(problems)
    if not problems:
        return
    count = len(problems)
    lines = [f"{count} problem{'s' * (count > 1)} with the labeled images in {root}:"]
    lines += [f"  - {problem.text}" for problem in problems[:shown]]
    if count > shown:
        lines.append(f"  ... and {count - shown} more.")
    raise DataProblem("\n".join([*lines, *([advice] if advice else [])]))


def some_of(names: Iterable[str], *, shown: int = 3) -> str:
    """`a, b, c and 4 more`: the first names and how many others there are, for one line."""
    names = list(names)
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def missing_folders(root: Path, folders: Iterable[str], expected: str) -> list[Problem]:
    """A problem that names the folders that are not there; none if all are."""
    missing = [folder for folder in folders if not (root / folder).is_dir()]
    if not missing:
        return []
    text = (
        f"folder{'s' * (len(missing) > 1)} {' and '.join(missing)} missing. Expected: {expected} "
        "Check `data.path` and `data.layout`."
    )
    return [Problem(missing[0], text, blocks=True)]


def absent_split(split: str, found: str) -> Problem:
    """The problem that a split is missing which can be made of training images.

    Args:
        split: Its name.
        found: What was found and expected; a sentence.
    """
    if split == "val":
        found += " Where there is none: data.val_fraction=0.2 makes it of the training images."
    return Problem(split, found, blocks=True)


def passed_over(name: str) -> bool:
    """Whether a file or folder of this name is hidden or litter of an operating system."""
    return name.startswith(".") or name in _LITTER


def name_splits(found: Collection[str]) -> dict[str, str]:
    """Split -> the folder or list that holds it, `train` and `val` first, whether found or not.

    Args:
        found: Names of the folders or lists; `training`, `valid`, `validation` and `testing` mean
            what one thinks, unless the usual name is there, too.
    """
    others = {name for name in found if not passed_over(name)}
    names = {"train": "train", "val": "val"}
    for split, aliases in _ALIASES.items():
        there = [name for name in aliases if name in others]
        if split in others or len(there) == 1:
            names[split] = split if split in others else there[0]
    extra = {*others.difference(names.values()), *names} - {"train", "val"}
    return {split: names.get(split, split) for split in ("train", "val", *sorted(extra))}


class Files(dict[str, str]):
    """Name -> path relative to the data set's folder."""

    def __init__(self) -> None:
        super().__init__()
        self.other: dict[str, str] = {}
        """Likewise, the files whose suffix is not one of those wanted and may be a picture's."""

    def only(self, names: Iterable[str]) -> Files:
        """Those of the given names."""
        chosen = Files()
        for name in names:
            if name in self:
                chosen[name] = self[name]
            if name in self.other:
                chosen.other[name] = self.other[name]
        return chosen


def find_files(
    root: Path,
    folder: str,
    suffixes: tuple[str, ...],
    problems: list[Problem],
    *,
    ending: str = "",
    recursive: bool = False,
    leave_out: Callable[[Path], bool] = lambda path: False,
) -> Files:
    """Name -> path relative to `root` of a folder's files.

    The name is the path below the folder without its suffix and without `ending`, which a file
    name has to end with; letters with accents count as equal however they are encoded. Hidden
    files, other suffixes and what `leave_out` is true for do not count; two files of one name are a
    problem.
    """
    found = Files()
    base = root / folder
    for path in _files_below(base, recursive=recursive, root=root, problems=problems):
        suffix = path.suffix.lower()
        if suffix in _BESIDE or not path.stem.endswith(ending) or leave_out(path):
            continue
        if path.name.lower() in _TEXTS or is_misnamed(path, root, problems):
            continue
        name = path.relative_to(base).with_suffix("").as_posix().removesuffix(ending)
        # macOS stores an accent as a character of its own, lists and other systems mostly do not.
        name = unicodedata.normalize("NFC", name)
        relative = path.relative_to(root).as_posix()
        if suffix not in suffixes:
            found.other.setdefault(name, relative)
            continue
        if name in found:
            text = f"{relative} and {found[name]} have the same name. Remove one."
            problems.append(Problem(found[name], text))
        found.setdefault(name, relative)
    return found


def is_misnamed(path: Path, root: Path, problems: list[Problem]) -> bool:
    """Whether a name cannot be written into tables, reports and terminals: a problem then.

    Zip files made on Windows leave such names behind.
    """
    fault = _fault_of_name(path.relative_to(root).as_posix())
    if fault is None:
        return False
    shown, reason = fault
    problems.append(Problem(shown, f"the name of {shown} {reason}"))
    return True


def _fault_of_name(name: str) -> tuple[str, str] | None:
    """A name as it can be shown, and what is wrong with it; None: nothing."""
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode(errors="backslashreplace")
        return printable(shown), "is not UTF-8 text, as names have to be. Rename it."
    shown = printable(name)
    return None if shown == name else (shown, "holds control characters. Rename it.")


def _files_below(base: Path, *, recursive: bool, root: Path, problems: list[Problem]) -> list[Path]:
    """Everything in a folder that is not hidden, sorted; a folder that cannot be read is a problem.

    `Path.rglob` passes over such folders in silence.
    """
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        place = Path(error.filename or base).relative_to(root).as_posix()
        text = (
            f"the folder {place} cannot be read ({error.strerror or error}). Correct its "
            "permissions."
        )
        problems.append(Problem(place, text, blocks=True))

    seen: set[str] = set()
    # What holds this folder is no part of it: a link to `/` would lead through the whole disk.
    above = set(map(str, Path(os.path.realpath(base)).parents))
    # Data sets are often made of links to folders of another disk; a link may lead back up, too.
    for place, folders, names in os.walk(base, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [
            name
            for name in folders
            if recursive
            and not passed_over(name)
            and os.path.realpath(os.path.join(place, name)) not in seen | above
            and not is_misnamed(Path(place, name), root, problems)
        ]
        found += [Path(place, name) for name in names if not passed_over(name)]
    return sorted(found)


def match_pairs(
    split: str,
    images: Mapping[str, str],
    masks: Mapping[str, str],
    problems: list[Problem],
    *,
    where: str,
) -> list[Pair]:
    """Pairs of equal names; a name on one side only is a problem, and so is an empty split.

    So is a pair of files that are not read, which their suffixes say.
    """
    unread_images = images.other if isinstance(images, Files) else {}
    unread_masks = masks.other if isinstance(masks, Files) else {}
    if not images and not masks:
        text = f"split '{split}' is empty: no images in {where}{_unread(unread_images)}."
        if unread_masks and not unread_images:
            text = f"{text[:-1]}, and no masks{_unread(unread_masks)}."
        problems.append(Problem(where, text, blocks=True))
    for name in sorted(images.keys() - masks.keys()):
        text = f"{images[name]} has no mask. Add it or remove the image."
        if name in unread_masks:
            text = (
                f"{images[name]} has no mask: {unread_masks[name]} is not a {_MASK_KINDS} file, as "
                "masks have to be (JPEG changes class numbers). Save the mask as PNG, from its "
                "original."
            )
        problems.append(Problem(images[name], text))
    for name in sorted(masks.keys() - images.keys()):
        text = f"{masks[name]} has no image. Add it or remove the mask."
        if name in unread_images:
            text = (
                f"{masks[name]} has no image: {unread_images[name]} is not a {_IMAGE_KINDS} file, "
                "as images have to be. Convert it."
            )
        problems.append(Problem(masks[name], text))
    read = images.keys() | masks.keys()
    for name in sorted((unread_images.keys() & unread_masks.keys()) - read):
        text = (
            f"{unread_images[name]} and its mask {unread_masks[name]} are not read: images have to "
            f"be {_IMAGE_KINDS} files, masks {_MASK_KINDS} files. Convert both."
        )
        problems.append(Problem(unread_images[name], text))
    return [
        Pair(split, name, images[name], masks[name])
        for name in sorted(images.keys() & masks.keys())
    ]


def _unread(files: Mapping[str, str]) -> str:
    """`, only 4 .heic and 2 .gif files, which are not read`."""
    if not files:
        return ""
    suffixes = Counter(Path(file).suffix.lower() or "suffixless" for file in files.values())
    kinds = [f"{count} {suffix}" for suffix, count in suffixes.most_common()]
    listed = " and ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))
    return f", only {listed} file{'s' * (len(files) != 1)}, which are not read"


class Listed(NamedTuple):
    """One line of a list."""

    line: str
    name: str
    """Of the image and its mask; that of neither if there are no such files."""
    mask: str | None = None
    """Path of the mask, if the line names one beside the image."""


_SUFFIX = "|".join(re.escape(suffix) for suffix in _PICTURES)
# Names may hold blanks: two columns are told from one by the suffix before the blank.
_TWO_FILES = re.compile(rf"(.+?(?:{_SUFFIX}))[\s,;]+(\S.*(?:{_SUFFIX}))", re.IGNORECASE)
_FLAG = re.compile(r"(.*\S)\s+(?:-1|0|1)")


def read_names(
    root: Path,
    path: str,
    images: Files,
    masks: Files,
    problems: list[Problem],
    *,
    folders: tuple[str, str],
    two_columns: bool = True,
) -> list[Listed]:
    """The lines of a list of images.

    A line is a name, with or without suffix and folder, or an image and a mask
    (`images/NAME.jpg masks/OTHER.png`), their paths beginning at `root` or at their own folder; or,
    where all lines have it, a name and one of VOC's flags -1, 0, 1. Nothing else is cut off: a
    name of which there is no file is never taken for another one.

    Args:
        root: The data set's folder.
        path: The list, relative to `root`.
        images: Those that are there.
        masks: Likewise.
        problems: A line of which a file is missing, or a list that cannot be read, is added.
        folders: Where images and masks are, relative to `root`.
        two_columns: False: a mask beside the image is passed over.

    Returns:
        Each line once, in order; those that are a problem are left out.
    """
    image_names = _Names(root, images, folders[0])
    mask_names = _Names(root, masks, folders[1])
    listed = []
    for line in _without_flags(_read_lines(root, path, problems), image_names):
        name = image_names.find(line) or mask_names.find(line)
        columns = _TWO_FILES.fullmatch(line)
        if name is not None or columns is None:
            listed.append(Listed(line, _bare(line) if name is None else name))
            continue
        name, mask = image_names.find(columns[1]), mask_names.find(columns[2])
        missing = [
            f"no {kind} {column}"
            for kind, found, column in (("image", name, columns[1]), ("mask", mask, columns[2]))
            if found is None
        ]
        if not two_columns:
            listed.append(Listed(line, _bare(columns[1]) if name is None else name))
        elif name is None or mask is None:
            text = (
                f"{path} names {line}, but there is {' and '.join(missing)}. Add what is missing "
                "or take the line off the list."
            )
            problems.append(Problem(line, text))
        else:
            listed.append(Listed(line, name, masks[mask]))
    return listed


def _read_lines(root: Path, path: str, problems: list[Problem]) -> list[str]:
    """Each line that is not empty once; a file that cannot be read is a problem."""
    try:
        listing = require_regular_file(root / path, "The list", largest=_LARGEST_LIST)
        text = listing.read_text(encoding="utf-8-sig")
    except UserError as error:
        problems.append(Problem(path, str(error), blocks=True))
        return []
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        text = f"{path} cannot be read ({reason}). Copy or download it again."
        problems.append(Problem(path, text, blocks=True))
        return []
    longest = max(map(len, text.splitlines()), default=0)
    if longest > _LONGEST_LINE:
        text = (
            f"{path} has a line of {longest} characters, expected names, a line each, of at most "
            f"{_LONGEST_LINE}. Check that it is a list."
        )
        problems.append(Problem(path, text, blocks=True))
        return []
    lines = (unicodedata.normalize("NFC", line.strip()) for line in text.splitlines())
    return [line for line in dict.fromkeys(lines) if line]


class _Names:
    """Finds files by what a list calls them."""

    def __init__(self, root: Path, files: Files, folder: str) -> None:
        self.root, self.files, self.folder = root, files, Path(folder)
        self.by_path: dict[str, str] = {}
        for name, file in files.items():
            known = unicodedata.normalize("NFC", file)
            self.by_path[known] = self.by_path[_bare(known)] = name

    def find(self, text: str) -> str | None:
        """Name of the file; None: there is none."""
        path = Path(text)
        if path.is_absolute() and path.is_relative_to(self.root):
            text = path.relative_to(self.root).as_posix()
        text = text.removeprefix("./").lstrip("/")
        for name in (text, _bare(text)):
            if name in self.files:
                return name
        for place in (text, (self.folder / text).as_posix()):
            if place in self.by_path:
                return self.by_path[place]
        return None


def _bare(name: str) -> str:
    """The name without the suffix of a picture."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in _PICTURES else name


def _without_flags(lines: Sequence[str], images: _Names) -> list[str]:
    """VOC's lists of one class say behind each name whether the image holds it."""
    flagged = [_FLAG.fullmatch(line) for line in lines]
    names = [match[1] for match in flagged if match is not None]
    # `photo 1` is a name as well: only where all lines look so and no such image is there.
    whole = len(names) == len(lines) == len(set(names))
    return names if whole and not any(map(images.find, lines)) else list(lines)


def listed_pairs(
    split: str,
    listed: Sequence[Listed],
    images: Files,
    masks: Files,
    problems: list[Problem],
    *,
    where: str,
    neither: Callable[[str], Problem],
) -> list[Pair]:
    """Pairs of the lines of a list; a name without image or mask is a problem.

    Args:
        split: The split that the list is of.
        listed: From `read_names`.
        images: Those that are there.
        masks: Likewise.
        problems: What is wrong is added.
        where: What the messages call the list.
        neither: The problem of a name that has neither image nor mask.
    """
    names = [entry.name for entry in listed if entry.mask is None]
    there = images.keys() | masks.keys() | (images.other.keys() & masks.other.keys())
    problems += [neither(name) for name in names if name not in there]
    pairs = [
        Pair(split, entry.name, images[entry.name], entry.mask)
        for entry in listed
        if entry.mask is not None
    ]
    if names or not pairs:
        pairs += match_pairs(split, images.only(names), masks.only(names), problems, where=where)
    return sorted(dict.fromkeys(pairs), key=lambda pair: pair.name)


def list_split_folders(root: Path, splits: Mapping[str, tuple[str, str]], expected: str) -> Listing:
    """Pairs of equal file names where each split has one folder of images and one of masks.

    Args:
        root: The data set's folder.
        splits: Split -> folder of the images, folder of the masks.
        expected: What the folders should look like, for messages.
    """
    pairs: list[Pair] = []
    problems: list[Problem] = []
    absent: dict[str, Problem] = {}
    for split, folders in splits.items():
        missing = missing_folders(root, folders, expected)
        if missing and split == "val" and not any((root / folder).exists() for folder in folders):
            absent[split] = absent_split(split, missing[0].text)
            continue
        if missing:
            problems += missing
            continue
        images = find_files(root, folders[0], IMAGE_SUFFIXES, problems)
        masks = find_files(root, folders[1], MASK_SUFFIXES, problems)
        pairs += match_pairs(split, images, masks, problems, where=folders[0])
    return Listing(tuple(pairs), tuple(problems), absent=absent)


def distinct_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colors for class numbers 0, 1, ...: bits of the number spread over red, green and blue.

    This is Pascal VOC's color map, which gives any number of classes distinct colors.
    """
    colors = []
    for number in range(count):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
        colors.append((channels[0], channels[1], channels[2]))
    return tuple(colors)
