"""Pascal VOC 2012 and SBD by torchvision, turned into the folders that the layout `voc` reads."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from PIL import Image

from rdd_pipeline.data.progress import tracked
from rdd_pipeline.errors import DataProblem, RunInterrupted

logger = logging.getLogger(__name__)

_ASIDE = "download"
"""Folder of archives and what was taken out of them, below the data set's; removed at the end."""
_VOC_FOLDERS = ("JPEGImages", "SegmentationClass", "ImageSets")
_AUGMENTED = "SegmentationClassAug"


def download_voc(root: Path) -> None:
    """Make `root` hold VOC 2012 with SBD's masks; an interrupted download goes on.

    Torchvision downloads, with a progress bar, and verifies the archives' checksums. Nothing is
    done when a folder of VOC is there that this function did not make.

    Raises:
        DataProblem: Something cannot be downloaded or written.
    """
    aside = root / _ASIDE
    if not aside.exists() and any((root / name).exists() for name in (*_VOC_FOLDERS, _AUGMENTED)):
        return
    try:
        aside.mkdir(parents=True, exist_ok=True)
        if not (root / "ImageSets").exists():
            _fetch_voc(root, aside)
        if not (root / _AUGMENTED).exists():
            _write_augmented(root, aside / "sbd")
        shutil.rmtree(aside)
    except RunInterrupted:
        raise
    except Exception as error:  # The archives' servers, formats and the disk fail in many ways.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataProblem(
            f"Pascal VOC 2012 and SBD cannot be downloaded into {root} ({reason}). Check the "
            "network and the disk and run the command again, it goes on where it stopped. By hand: "
            "put VOCdevkit/VOC2012 of the VOC 2012 trainval archive there, with SBD's masks as "
            f"{_AUGMENTED}, and set data.download=false."
        ) from error


def _fetch_voc(root: Path, aside: Path) -> None:
    from torchvision.datasets import VOCSegmentation

    logger.info("Downloading Pascal VOC 2012 (2 GB).")
    VOCSegmentation(str(aside), year="2012", image_set="val", download=True)
    for name in _VOC_FOLDERS:  # ImageSets last: it tells that all are there.
        shutil.rmtree(root / name, ignore_errors=True)
        os.replace(aside / "VOCdevkit" / "VOC2012" / name, root / name)


def _write_augmented(root: Path, sbd: Path) -> None:
    """VOC's own masks where it has them for training, SBD's for all other images but VOC's val.

    The two lists that come with the archive are used: the one without VOC's val is on a server that
    is gone.
    """
    from torchvision.datasets import SBDataset

    if not (sbd / "val.txt").exists():
        for name in ("cls", "img", "inst", "benchmark_RELEASE"):
            shutil.rmtree(sbd / name, ignore_errors=True)
        logger.info("Downloading SBD (1.4 GB).")
        SBDataset(str(sbd), image_set="train", mode="segmentation", download=True)
    part = root / f"{_AUGMENTED}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    lists = root / "ImageSets" / "Segmentation"
    own, val = (set((lists / f"{name}.txt").read_text().split()) for name in ("train", "val"))
    for name in own:
        shutil.copyfile(root / "SegmentationClass" / f"{name}.png", part / f"{name}.png")
    for image_set in ("train", "val"):
        masks = SBDataset(str(sbd), image_set=image_set, mode="segmentation")
        for number in tracked(range(len(masks)), f"masks of SBD ({image_set})", len(masks)):
            name = Path(masks.masks[number]).stem
            if name not in own and name not in val:
                mask: Image.Image = masks[number][1]
                mask.save(part / f"{name}.png")
    os.replace(part, root / _AUGMENTED)
