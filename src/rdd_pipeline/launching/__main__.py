"""Run one training job without Kedro: ``python -m rdd_pipeline.launching JOB.json``.

Needs torch, torchvision, timm, pydantic, safetensors and rich only. JOB.json holds

* ``job``: a `TrainingJob`,
* ``root``, ``labels``, ``image_size``, ``packs``: of the images, see `Images`; the paths may be
  relative to the file's folder, the last two may be left out,
* ``trainer``: `TrainerParams`, may be left out,
* ``index``: path of an index CSV as `data_ingestion` writes it, or null: the folder is read anew
  by the layout named in ``layout``,
* ``teacher``: path of a teacher checkpoint (safetensors of this project) or null,
* ``output``: folder for checkpoints and results; running the same job again goes on or loads.

With ``"stage": "whole"`` an RDD job runs both stages. Writes ``network.safetensors``,
``history.json`` and ``result.json`` (scores of the splits, images/s, peak memory).

torchrun may start it, on one machine or several; then the first process scores and writes.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from rdd_pipeline.config import EvaluationParams, Params, Size, TrainerParams
from rdd_pipeline.data.coverage import with_coverage
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import Sample, build_index, from_rows
from rdd_pipeline.data.labels import LabelSet
from rdd_pipeline.data.layouts import get_layout, raise_problems
from rdd_pipeline.errors import INTERRUPTED, NonFiniteLossError, UserError, WorkerFailedError
from rdd_pipeline.evaluation.scoring import score_splits
from rdd_pipeline.files import not_a_file, require_regular_file, write_atomically
from rdd_pipeline.interruptions import run_command, tell
from rdd_pipeline.launching.launch import train
from rdd_pipeline.networks import load_checkpoint, permit, save_checkpoint
from rdd_pipeline.training.device import resolve_device
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.preparation import prepare_job
from rdd_pipeline.training.stopping import TrainingInterruptedError
from rdd_pipeline.training.training import Training

logger = logging.getLogger(__name__)


class JobFile(Params):
    """Content of JOB.json."""

    job: TrainingJob
    root: Path
    labels: LabelSet
    image_size: Size | None = None
    packs: Path | None = None
    trainer: TrainerParams = TrainerParams()
    evaluation: EvaluationParams = EvaluationParams()
    index: Path | None = None
    layout: str | None = None
    teacher: Path | None = None
    output: Path


def run_job_file(path: Path) -> dict[str, Any]:
    """Train what the file asks for and return what ``result.json`` holds.

    Among processes of torchrun those with another RANK than 0 return nothing.

    Raises:
        UserError: The file, or something it names, is missing or wrong.
    """
    found = not_a_file(path)
    if found is not None and path.exists():
        raise UserError(f"The job file {path} {found}. Give the path of a JSON file.")
    try:
        spec = JobFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"The job file {path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ")
            for fault in error.errors(include_url=False)
        )
        raise UserError(f"The job file {path} is wrong: {'; '.join(faults)}.") from error
    base = path.resolve().parent
    packs = base / spec.packs.expanduser() if spec.packs else None
    root = base / spec.root.expanduser()
    images = Images(root, _samples(spec, base, root), spec.labels, spec.image_size, packs)
    job = prepare_job(spec.job, spec.trainer)
    output = base / spec.output
    there = next(place for place in (output, *output.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"The results cannot be written to {output}: {there} is no folder, or not writable. "
            "Give another one as `output`."
        )
    teacher = load_checkpoint(base / spec.teacher) if spec.teacher else None
    training = Training(job, images, teacher).stored_in(output / "work")
    result = train(training, spec.trainer)
    if not _is_first():
        return {}
    scores = score_splits(
        result.network,
        images,
        spec.evaluation,
        device=resolve_device(spec.trainer.device),
    )
    summary = {
        "method": job.method,
        "seed": job.seed,
        "fingerprint": result.fingerprint,
        "iterations": result.state.iteration,
        "cost": vars(result.state.cost),
        "scores": scores,
    }
    save_checkpoint(result.network, output / "network.safetensors")
    write_atomically(output / "history.json", json.dumps(result.history, indent=1).encode())
    write_atomically(output / "result.json", json.dumps(summary, indent=1).encode())
    return summary


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _samples(spec: JobFile, base: Path, root: Path) -> tuple[Sample, ...]:
    if spec.index is not None:
        path = base / spec.index
        if path.exists():
            require_regular_file(path, "The index")
        try:
            with path.open(newline="") as file:
                return from_rows(csv.DictReader(file))
        except OSError as error:
            raise UserError(f"The index {path} cannot be read ({error.strerror}).") from error
    if spec.layout is None:
        raise UserError("The job file names neither `index` nor `layout`; give one of them.")
    layout = get_layout(spec.layout, root)
    index = with_coverage(build_index(root, layout), layout)
    raise_problems(root, index.problems)
    for warning in index.warnings:
        logger.warning(warning)
    return index.samples


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rdd_pipeline.launching", description="Run one training job without Kedro."
    )
    parser.add_argument("job", type=Path, metavar="JOB.json")
    parser.add_argument(
        "--teacher-module",
        metavar="REFERENCE",
        help="package:function or FILE.py:function that makes the teacher and may be run",
    )
    arguments = parser.parse_args()
    if arguments.teacher_module:
        permit(arguments.teacher_module)
    level = logging.INFO if _is_first() else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        summary = run_job_file(arguments.job)
    except (UserError, NonFiniteLossError, WorkerFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        get_error_handler().record_exception(error)  # for torchrun's own report
        return 2
    except TrainingInterruptedError as error:
        tell(str(error))
        return INTERRUPTED
    for split, scores in summary.get("scores", {}).items():
        print(f"{split}: mIoU {100 * scores['miou']:.2f} %")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
