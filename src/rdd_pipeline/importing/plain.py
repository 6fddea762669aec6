"""Folders of images and masks in whatever layout: told apart by content, paired by name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath

from rdd_pipeline.errors import DataProblem
from rdd_pipeline.importing.export import Export, split_of, words
from rdd_pipeline.importing.folder import Folder, stem
from rdd_pipeline.importing.masks import looks_like_a_mask
from rdd_pipeline.importing.names import find_names
from rdd_pipeline.importing.pairs import Pair, export_of

_LOSSY = (".jpg", ".jpeg")
SAMPLED = 5
"""Files of a group that are looked at."""
_OF_MASKS = {
    "mask", "masks", "label", "labels", "annotation", "annotations", "annot", "annots", "ann",
    "anns", "anno", "annos", "gt", "groundtruth", "ground", "truth", "seg", "segs", "segmentation",
    "segmentations", "segmentationclass", "labelids", "trainids", "labeltrainids", "target",
    "targets", "lbl", "labelled", "semantic", "index", "indexed", "png", "pngs",
}  # fmt: skip
_OF_IMAGES = {
    "image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "rgb", "jpg",
    "jpeg", "jpegimages", "original", "originals", "raw", "input", "inputs", "pic", "pics",
}  # fmt: skip
_NO_CLASSES = {
    "instance", "instances", "instanceids", "segmentationobject", "vis", "viz", "visualization",
    "visualisation", "overlay", "overlays", "depth", "edge", "edges", "boundary", "preview",
    "blend", "colormask", "color", "colors", "colour", "colours", "panoptic",
}  # fmt: skip
"""Words of pictures that look like masks and are none, or that other masks are better than."""

Key = tuple[str, ...]


def recognises(folder: Folder) -> bool:
    """Any pictures."""
    return bool(folder.pictures)


def read(folder: Folder) -> Export:
    """Find the masks among the pictures and the image of each.

    Raises:
        DataProblem: There are no images, no masks, or they do not fit together.
    """
    if folder.named("labels.yaml", "labels.yml"):
        raise DataProblem(
            "import_data.source has a labels.yaml, so it needs no import: kedro run --env=folders "
            "--params=data.path=FOLDER."
        )
    images, masks = _sides(folder)
    remarks: list[str] = []
    masks = _best_masks(masks, remarks)
    matched = _match(images, masks)
    if not matched:
        raise DataProblem(
            f"Of {len(images)} images and {len(masks)} masks no names fit together ({images[0]}, "
            f"{masks[0]}): give both the same name, apart from a common beginning or end."
        )
    left = len(images) - len(matched), len(masks) - len(matched)
    for count, kind, all_of, used in (
        (left[0], "images have no mask", images, set(matched)),
        (left[1], "masks have no image", masks, set(matched.values())),
    ):
        if count:
            example = next(file for file in all_of if file not in used)
            remarks.append(f"{count} {kind} ({example}).")
    pairs = [
        Pair(stem(image), image, _reader(folder, mask), split_of(_parent(image)) or
             split_of(_parent(mask)), mask)
        for image, mask in sorted(matched.items())
    ]  # fmt: skip
    return export_of("images and masks", pairs, find_names(folder), remarks)


def _reader(folder: Folder, file: str) -> Callable[[], bytes]:
    return lambda: folder.bytes(file)


def _parent(file: str) -> str:
    return PurePosixPath(file).parent.as_posix()


# ---- which files are masks


def _sides(folder: Folder) -> tuple[list[str], list[str]]:
    groups: dict[tuple[str, str, frozenset[str]], list[str]] = defaultdict(list)
    for file in folder.pictures:
        path = PurePosixPath(file)
        said = frozenset({*words(path.stem)} & (_OF_MASKS | _NO_CLASSES | _OF_IMAGES))
        groups[_parent(file), path.suffix.lower(), said].append(file)
    are_masks: dict[tuple[str, str, frozenset[str]], bool] = {}
    for (place, suffix, said), files in list(groups.items()):
        group = (place, suffix, said)
        verdict = _are_masks(folder, files)
        if verdict is not None:
            are_masks[group] = verdict
            continue
        # No word of the names tells them apart: look at each.
        for file in groups.pop(group):
            one = (file, suffix, said)
            groups[one] = [file]
            are_masks[one] = bool(looks_like_a_mask(folder.bytes(file)))
    if len({*are_masks.values()}) == 1:  # drawn images look like masks: go by names
        by_name = {group: _says_mask(group) for group in groups}
        if len({*by_name.values()}) == 2 and all(are_masks.values()):
            are_masks = by_name
    images = [f for group, files in groups.items() if not are_masks[group] for f in files]
    masks = [f for group, files in groups.items() if are_masks[group] for f in files]
    if not masks or not images:
        kind = "images only, no masks of few colors" if images else "masks only, no images"
        example = (images or masks)[0]
        lossy = [
            f for g, files in groups.items() if _says_mask(g) and g[1] in _LOSSY for f in files
        ]
        if lossy and not masks:
            raise DataProblem(
                f"{lossy[0]} looks like a mask, but is a JPEG file, whose compression changes "
                "class numbers and colors: export masks as PNG."
            )
        raise DataProblem(f"import_data.source holds {kind} ({example}).")
    return sorted(images), sorted(masks)


def _are_masks(folder: Folder, files: Sequence[str]) -> bool | None:
    """What the first, the last and some between them are; None: some are and some are not."""
    step = max(1, len(files) // SAMPLED)
    chosen = dict.fromkeys([*files[::step][:SAMPLED], *files[1:2], files[-1]])
    seen = {looks_like_a_mask(folder.bytes(file)) for file in chosen} - {None}
    return None if len(seen) > 1 else seen == {True}


def _says_mask(group: tuple[str, str, frozenset[str]]) -> bool:
    place, _, said = group
    there = {*words(place)} | said
    joined = any(word.endswith(("annot", "mask", "masks", "label", "labels")) for word in there)
    return bool(there & (_OF_MASKS - {"png"})) or joined


def _best_masks(masks: Sequence[str], remarks: list[str]) -> list[str]:
    """Without previews, instances and the like, if other masks are left."""
    good = [m for m in masks if not _said(m) & _NO_CLASSES]
    if good and len(good) < len(masks):
        example = next(m for m in masks if m not in set(good))
        remarks.append(f"{len(masks) - len(good)} other masks are left out ({example}).")
    return good or list(masks)


def _said(file: str) -> set[str]:
    """Words of a path, those of its folders joined as well: `SegmentationObject`."""
    return {*words(file), *(part.lower() for part in PurePosixPath(file).parent.parts)}


# ---- which mask belongs to which image


def _match(images: Sequence[str], masks: Sequence[str]) -> dict[str, str]:
    """Image -> mask, by the way of naming that fits most of them.

    Raises:
        DataProblem: An image has several masks.
    """
    ways = [_by_exact_path, _by_path, _by_words, _by_differences]
    best: dict[str, str] = {}
    several: list[tuple[str, list[str]]] = []
    for way in ways:
        keys_i, keys_m = way(images, masks)
        of_key: dict[Key, list[str]] = defaultdict(list)
        for image, key in zip(images, keys_i, strict=True):
            of_key[key].append(image)
        found: dict[str, list[str]] = defaultdict(list)
        for mask, key in zip(masks, keys_m, strict=True):
            if key and len(of_key.get(key, ())) == 1:
                found[of_key[key][0]].append(mask)
        single = {image: ms[0] for image, ms in found.items() if len(ms) == 1}
        if len(single) > len(best):
            best = single
        several += [(image, ms) for image, ms in found.items() if len(ms) > 1][:1]
    if not best and several:
        image, ms = several[0]
        raise DataProblem(
            f"{image} has {len(ms)} masks ({ms[0]}, {ms[1]}): leave one mask of all classes for "
            "each image."
        )
    return best


Keys = tuple[list[Key], list[Key]]


def _by_exact_path(images: Sequence[str], masks: Sequence[str]) -> Keys:
    """The same name, upper and lower case told apart, in folders that say what is in them."""

    def key(file: str) -> Key:
        path = PurePosixPath(file)
        return (*_of_folders(path), path.stem)

    return [key(file) for file in images], [key(file) for file in masks]


def _by_path(images: Sequence[str], masks: Sequence[str]) -> Keys:
    """The same name, and the same folders apart from those that say what is in them."""

    def key(file: str) -> Key:
        path = PurePosixPath(file)
        return (*_of_folders(path), path.stem.lower())

    return [key(file) for file in images], [key(file) for file in masks]


def _by_words(images: Sequence[str], masks: Sequence[str]) -> Keys:
    """The same words in folders and name, apart from those that say image or mask."""
    said = _OF_MASKS | _OF_IMAGES | _NO_CLASSES

    def key(file: str) -> Key:
        path = PurePosixPath(file)
        return (*_of_folders(path), *(_number(w) for w in words(path.stem) if w not in said))

    return [key(file) for file in images], [key(file) for file in masks]


def _by_differences(images: Sequence[str], masks: Sequence[str]) -> Keys:
    """Without the words that all masks have and not all images, and the other way round."""
    of_images, of_masks = ([words(stem(file)) for file in files] for files in (images, masks))
    common_i, common_m = _common(of_images), _common(of_masks)
    some_i, some_m = _all(of_images) - common_i, _all(of_masks) - common_m
    drop_i, drop_m = common_i - some_m, common_m - some_i
    return (
        [tuple(_number(w) for w in found if w not in drop_i) for found in of_images],
        [tuple(_number(w) for w in found if w not in drop_m) for found in of_masks],
    )


def _of_folders(path: PurePosixPath) -> list[str]:
    """Words of the folders; a split as part of a word (`trainannot`) counts as the split."""
    said = _OF_MASKS | _OF_IMAGES | _NO_CLASSES
    found = []
    for part in path.parent.parts:
        for word in words(part) if part.lower() not in said else ():
            if word not in said:
                found.append(split_of(word) or word)
    return found


def _number(word: str) -> str:
    return word.lstrip("0") or "0" if word.isdecimal() else word


def _common(of_files: Sequence[Sequence[str]]) -> set[str]:
    counts = Counter(word for found in of_files for word in {*found})
    return {word for word, count in counts.items() if count == len(of_files)}


def _all(of_files: Iterable[Sequence[str]]) -> set[str]:
    return {word for found in of_files for word in found}
