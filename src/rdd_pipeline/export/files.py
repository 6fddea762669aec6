"""Files of one network in several formats, each with the verdict of its check beside it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

import rdd_pipeline
from rdd_pipeline.config import ExportParams, Size
from rdd_pipeline.errors import UserError
from rdd_pipeline.export.check import Labeled, Runner, compare, milliseconds, other_sizes
from rdd_pipeline.export.module import ExportedNetwork
from rdd_pipeline.export.onnx_file import (
    ComparedOnnx,
    OnnxProgram,
    require_onnx,
    to_onnx,
    write_onnx,
)
from rdd_pipeline.export.program import Program, trace, write_program
from rdd_pipeline.export.quantize import by_damage, prepare, quantize
from rdd_pipeline.files import file_digest, to_checked_json, write_atomically
from rdd_pipeline.networks.checkpoint import NetworkCheckpoint, NetworkHeader

if TYPE_CHECKING:
    from onnx import ModelProto

logger = logging.getLogger(__name__)

Verdict = dict[str, Any]

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "int8": ".int8.onnx"}


class Exporter:
    """Writes and checks the files of one network.

    Args:
        checkpoint: The network.
        params: Formats, what is inside, tolerances.
        samples: Images that files are checked on.
        ignore_index: Of their labels.
        calibration: Training images (3, H, W) uint8 for int8.
        threads: That ONNX Runtime computes with; None: all.
    """

    def __init__(
        self,
        checkpoint: NetworkCheckpoint,
        params: ExportParams,
        *,
        samples: Sequence[Labeled],
        ignore_index: int,
        calibration: Sequence[Tensor] = (),
        threads: int | None = None,
    ) -> None:
        if {"onnx", "int8"} & set(params.formats):
            require_onnx()
        self._params = params
        self._samples, self._ignore_index = samples, ignore_index
        self._calibration, self._threads = calibration, threads
        self._metadata = metadata(checkpoint, params)
        self._module = ExportedNetwork(
            checkpoint, preprocessing=params.preprocessing, output=params.output
        )
        first = self._module.prepared(samples[0].image[None])
        self._first = first
        self._torch_milliseconds = milliseconds(self._module, first)

    def write(self, folder: Path, name: str) -> dict[str, Verdict]:
        """Write the files ``NAME.onnx``, ``NAME.pt2``, ``NAME.int8.onnx``, as far as asked for.

        Each has its verdict beside it in ``FILE.json``.

        Returns:
            The verdicts by format; ``passed`` says whether the file may be used.
        """
        program = trace(self._module)
        model: Any = None
        verdicts: dict[str, Verdict] = {}
        if {"onnx", "int8"} & set(self._params.formats):
            model = to_onnx(program, self._params.output, self._metadata)
        for kind in self._params.formats:
            path = folder / f"{name}{SUFFIXES[kind]}"
            if kind == "pt2":
                verdict = self._pt2(program, path)
            else:
                verdict = (self._onnx if kind == "onnx" else self._int8)(model, path)
            verdict = {**self._facts(kind, path), **verdict}
            write_atomically(path.with_name(f"{path.name}.json"), to_checked_json(verdict))
            logger.info("%s: %s", path.name, sentence(verdict))
            verdicts[kind] = verdict
        return verdicts

    # ---- formats

    def _pt2(self, program: ExportedProgram, path: Path) -> Verdict:
        write_program(program, path, self._metadata)
        run = Program(path, self._module)
        return self._judged(self._compared(run), milliseconds(run, self._first))

    def _onnx(self, model: ModelProto, path: Path) -> Verdict:
        write_onnx(model, path)
        run = ComparedOnnx(model, threads=self._threads)
        return self._judged(self._compared(run), self._milliseconds(path))

    def _int8(self, model: ModelProto, path: Path) -> Verdict:
        prepared = prepare(model)
        images = [self._module.prepared(image[None]) for image in self._calibration]
        quantized, kept = self._quantized(prepared, images)
        write_onnx(quantized, path)
        found = self._compared(ComparedOnnx(quantized, threads=self._threads))
        lost = points_lost(found)
        return {
            **found,
            "milliseconds": self._milliseconds(path),
            "points_lost": lost,
            "float_layers": kept,
            "tolerance": self._params.int8_tolerance,
            "passed": not lost > self._params.int8_tolerance,
        }

    def _quantized(
        self, prepared: ModelProto, images: Sequence[Tensor]
    ) -> tuple[ModelProto, list[str]]:
        """The quantized model that is good enough with the fewest layers in float, and those."""
        kept: list[str] = []
        model = quantize(prepared, images)
        ranking: list[str] | None = None
        while points_lost(self._compared(ComparedOnnx(model, threads=self._threads), ())) > (
            self._params.int8_tolerance
        ):
            ranking = by_damage(prepared, model, images[0]) if ranking is None else ranking
            if len(kept) == len(ranking):
                break
            kept = ranking[: max(2 * len(kept), 1)]
            logger.info("int8 loses too much: %d of %d layers float.", len(kept), len(ranking))
            model = quantize(prepared, images, keep_float=kept)
        return model, kept

    # ---- parts

    def _compared(self, run: Runner, sizes: Sequence[Size] | None = None) -> dict[str, Any]:
        height, width = self._samples[0].image.shape[-2:]
        return compare(
            self._module,
            run,
            self._samples,
            sizes=other_sizes((height, width)) if sizes is None else sizes,
            ignore_index=self._ignore_index,
        )

    def _milliseconds(self, path: Path) -> float:
        return milliseconds(OnnxProgram(path, threads=self._threads), self._first)

    def _judged(self, found: dict[str, Any], time: float) -> Verdict:
        return {
            **found,
            "milliseconds": time,
            "tolerance": self._params.tolerance,
            "passed": found["equal_pixels"] >= self._params.tolerance,
        }

    def _facts(self, kind: str, path: Path) -> Verdict:
        return {
            "format": kind,
            "file": path.name,
            "megabytes": path.stat().st_size / 1e6,
            "sha256": file_digest(path),
            "network": self._module.name,
            "network_digest": self._metadata["digest"],
            "output": self._params.output,
            "preprocessing_inside": self._params.preprocessing,
            "torch_milliseconds": self._torch_milliseconds,
            "threads": self._threads or torch.get_num_threads(),
        }


def metadata(checkpoint: NetworkCheckpoint, params: ExportParams) -> dict[str, str]:
    """What a file says of itself: text by key, JSON where it is more than a word."""
    header: NetworkHeader = checkpoint.header
    how = header.preprocessing.model_dump(mode="json")
    return {
        "producer": f"rdd_pipeline {rdd_pipeline.__version__}",
        "network": header.network.name,
        "label_names": json.dumps(header.label_names),
        "colors": json.dumps(header.colors),
        "preprocessing": json.dumps({**how, "inside": params.preprocessing}),
        "output": params.output,
        "digest": checkpoint.digest(),
        "provenance": json.dumps(header.provenance),
    }


def points_lost(found: Mapping[str, Any]) -> float:
    """Points of mIoU, in %; 0 where no pixel has a label."""
    lost = 100 * (found["miou_before"] - found["miou_after"])
    return 0.0 if math.isnan(lost) else lost


def sentence(verdict: Mapping[str, Any]) -> str:
    """A verdict in one line."""
    kept = verdict.get("float_layers")
    return (
        f"{'as it should be' if verdict['passed'] else 'DEVIATES'}; "
        f"{100 * verdict['equal_pixels']:.4f} % of the pixels as in torch, largest difference "
        f"{verdict['largest_difference']:.2g}, mIoU {100 * verdict['miou_before']:.2f} -> "
        f"{100 * verdict['miou_after']:.2f} %, {verdict['megabytes']:.1f} MB, "
        f"{verdict['milliseconds']:.1f} ms an image (torch {verdict['torch_milliseconds']:.1f})"
        + (f"; {len(kept)} layers stay float: {', '.join(kept[:8])}" if kept else "")
    )


def require_all_passed(verdicts: Mapping[str, Verdict]) -> None:
    """Raise where a file deviates.

    Raises:
        UserError: Beyond its tolerance.
    """
    faults = [
        f"{v['file']} loses {v['points_lost']:.2f} points of mIoU, allowed are {v['tolerance']:g} "
        "(export.int8_tolerance)"
        if v["format"] == "int8"
        else f"{v['file']} finds torch's class for {100 * v['equal_pixels']:.4f} % of the pixels, "
        f"expected {100 * v['tolerance']:g} % (export.tolerance)"
        for v in verdicts.values()
        if not v["passed"]
    ]
    if faults:
        raise UserError(
            f"{'; '.join(faults)}. Do not use {'it' if len(faults) == 1 else 'them'}: "
            "FILE.json beside each has what was measured."
        )
