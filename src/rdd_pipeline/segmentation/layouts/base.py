"""What every layout is made of, and finding the pairs of images and masks in folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.segmentation.labels import LabelSet

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MASK_SUFFIXES = (".png",)


class Pair(NamedTuple):
    """An image and its mask; the paths are relative to the data set's folder, with `/`."""

    split: str
    name: str
    image: str
    mask: str


class Listing(NamedTuple):
    """What a folder holds, and what is wrong with it."""

    pairs: tuple[Pair, ...]
    problems: tuple[str, ...]


class Layout(NamedTuple):
    """One way to organize a data set's folders."""

    labels: LabelSet
    list_pairs: Callable[[Path], Listing]
    expected: str
    """What the folder should look like and where it comes from, for error messages."""


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


def raise_problems(root: Path, problems: Iterable[str], *, shown: int = 20) -> None:
    """Raise one DataProblem that lists the first `shown` problems; do nothing without any."""
    problems = list(problems)
    if not problems:
        return
    count = len(problems)
    lines = [f"{count} problem{'s' * (count > 1)} with the labeled images in {root}:"]
    lines += [f"  - {problem}" for problem in problems[:shown]]
    if count > shown:
        lines.append(f"  ... and {count - shown} more.")
    raise DataProblem("\n".join(lines))


def missing_folders(root: Path, folders: Iterable[str], expected: str) -> list[str]:
    """A problem that names the folders that are not there; none if all are."""
    missing = [folder for folder in folders if not (root / folder).is_dir()]
    if not missing:
        return []
    return [
        f"folder{'s' * (len(missing) > 1)} {' and '.join(missing)} missing. Expected: {expected} "
        "Check `data.path` and `data.layout`."
    ]


def find_files(
    root: Path,
    folder: str,
    suffixes: tuple[str, ...],
    problems: list[str],
    *,
    ending: str = "",
    recursive: bool = False,
) -> dict[str, str]:
    """Name -> path relative to `root` of a folder's files.

    The name is the path below the folder without its suffix and without `ending`, which a file
    name has to end with. Hidden files and other suffixes do not count; two files of one name are a
    problem.
    """
    found: dict[str, str] = {}
    base = root / folder
    for path in sorted(base.rglob("*") if recursive else base.glob("*")):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes or not path.is_file():
            continue
        if not path.stem.endswith(ending):
            continue
        name = path.relative_to(base).with_suffix("").as_posix().removesuffix(ending)
        relative = path.relative_to(root).as_posix()
        if name in found:
            problems.append(f"{relative} and {found[name]} have the same name. Remove one.")
        found.setdefault(name, relative)
    return found


def match_pairs(
    split: str,
    images: Mapping[str, str],
    masks: Mapping[str, str],
    problems: list[str],
    *,
    where: str,
) -> list[Pair]:
    """Pairs of equal names; a name on one side only is a problem, and so is an empty split."""
    if not images and not masks:
        problems.append(f"split '{split}' is empty: no images in {where}.")
    for name in sorted(images.keys() - masks.keys()):
        problems.append(f"{images[name]} has no mask. Add it or remove the image.")
    for name in sorted(masks.keys() - images.keys()):
        problems.append(f"{masks[name]} has no image. Add it or remove the mask.")
    return [
        Pair(split, name, images[name], masks[name])
        for name in sorted(images.keys() & masks.keys())
    ]


def list_split_folders(root: Path, splits: Mapping[str, tuple[str, str]], expected: str) -> Listing:
    """Pairs of equal file names where each split has one folder of images and one of masks.

    Args:
        root: The data set's folder.
        splits: Split -> folder of the images, folder of the masks.
        expected: What the folders should look like, for messages.
    """
    pairs: list[Pair] = []
    problems: list[str] = []
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
