"""What every layout is made of, and finding the pairs of images and masks in folders."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.segmentation.labels import LabelSet

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MASK_SUFFIXES = (".png",)
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
"""Suffixes that are worth a word when a file has another one than it should."""


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


class Layout(NamedTuple):
    """One way to organize a data set's folders."""

    labels: LabelSet
    list_pairs: Callable[[Path], Listing]
    expected: str
    """What the folder should look like and where it comes from, for error messages."""
    download: Callable[[Path], None] | None = None
    """Makes the folder hold the data set; None: a program cannot get it."""


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


def list_pairs(root: Path, layout: Layout) -> Listing:
    """All pairs below `root` in a fixed order, and the problems found on the way.

    Raises:
        DataProblem: `root` is not a folder.
    """
    check_root(root, layout.expected)
    return layout.list_pairs(root)


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


class Files(dict[str, str]):
    """Name -> path relative to the data set's folder."""

    def __init__(self) -> None:
        super().__init__()
        self.other: dict[str, str] = {}
        """Likewise, the pictures whose suffix is not one of those wanted."""

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
) -> Files:
    """Name -> path relative to `root` of a folder's files.

    The name is the path below the folder without its suffix and without `ending`, which a file
    name has to end with; letters with accents count as equal however they are encoded. Hidden files
    and other suffixes do not count; two files of one name are a problem.
    """
    found = Files()
    base = root / folder
    for path in _files_below(base, recursive=recursive, root=root, problems=problems):
        suffix = path.suffix.lower()
        if suffix not in _PICTURES or not path.stem.endswith(ending):
            continue
        name = path.relative_to(base).with_suffix("").as_posix().removesuffix(ending)
        # macOS stores an accent as a character of its own, lists and other systems mostly do not.
        name = unicodedata.normalize("NFC", name)
        relative = path.relative_to(root).as_posix()
        if suffix not in suffixes:
            found.other[name] = relative
            continue
        if path.is_dir():
            continue
        if name in found:
            text = f"{relative} and {found[name]} have the same name. Remove one."
            problems.append(Problem(found[name], text))
        found.setdefault(name, relative)
    return found


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
    # Data sets are often made of links to folders of another disk; a link may lead back up, too.
    for place, folders, names in os.walk(base, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [
            name
            for name in folders
            if recursive
            and not name.startswith(".")
            and os.path.realpath(os.path.join(place, name)) not in seen
        ]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def match_pairs(
    split: str,
    images: Mapping[str, str],
    masks: Mapping[str, str],
    problems: list[Problem],
    *,
    where: str,
) -> list[Pair]:
    """Pairs of equal names; a name on one side only is a problem, and so is an empty split."""
    if not images and not masks:
        text = f"split '{split}' is empty: no images in {where}."
        problems.append(Problem(where, text, blocks=True))
    for name in sorted(images.keys() - masks.keys()):
        text = f"{images[name]} has no mask. Add it or remove the image."
        other = masks.other.get(name) if isinstance(masks, Files) else None
        if other is not None:
            text = (
                f"{images[name]} has no mask: {other} is not a PNG file, as masks have to be (JPEG "
                "changes class numbers). Save the mask as PNG, from its original."
            )
        problems.append(Problem(images[name], text))
    for name in sorted(masks.keys() - images.keys()):
        text = f"{masks[name]} has no image. Add it or remove the mask."
        other = images.other.get(name) if isinstance(images, Files) else None
        if other is not None:
            text = (
                f"{masks[name]} has no image: {other} is not a PNG or JPEG file, as images have "
                "to be. Convert it."
            )
        problems.append(Problem(masks[name], text))
    return [
        Pair(split, name, images[name], masks[name])
        for name in sorted(images.keys() & masks.keys())
    ]


def read_names(root: Path, path: str, images: Files, problems: list[Problem]) -> list[str]:
    """One name a line; the lines of some lists are `/JPEGImages/NAME.jpg /MASKS/NAME.png`."""
    try:
        lines = (root / path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        text = f"{path} cannot be read ({reason}). Copy or download it again."
        problems.append(Problem(path, text, blocks=True))
        return []
    names = []
    for line in filter(None, (unicodedata.normalize("NFC", line.strip()) for line in lines)):
        bare = os.path.splitext(line)[0]
        if line in images:  # first of all, as a name may hold spaces and dots
            names.append(line)
        elif bare in images:
            names.append(bare)
        else:
            first = line.split()[0]
            names.append(Path(first).stem if first != line or first.startswith("/") else line)
    return names


def list_split_folders(root: Path, splits: Mapping[str, tuple[str, str]], expected: str) -> Listing:
    """Pairs of equal file names where each split has one folder of images and one of masks.

    Args:
        root: The data set's folder.
        splits: Split -> folder of the images, folder of the masks.
        expected: What the folders should look like, for messages.
    """
    pairs: list[Pair] = []
    problems: list[Problem] = []
    for split, folders in splits.items():
        missing = missing_folders(root, folders, expected)
        if missing:
            problems += missing
            continue
        images = find_files(root, folders[0], IMAGE_SUFFIXES, problems)
        masks = find_files(root, folders[1], MASK_SUFFIXES, problems)
        pairs += match_pairs(split, images, masks, problems, where=folders[0])
    return Listing(tuple(pairs), tuple(problems))


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
