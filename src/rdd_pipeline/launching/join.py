"""Take part in the trainings of another machine.

``RDD_TOKEN=... python -m rdd_pipeline.launching.join HOST:PORT``, where HOST:PORT is what the
command on the first machine was given as `trainer.rendezvous`, and RDD_TOKEN its token, which may
also be in a file (``--token-file``). Everything else comes from there: parameters,
index, teacher, and the state to go on from. Only the images have to be here, at the same path or at
the one that ``--data`` names. It takes part in one training after the other and ends with the
command of the first machine.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

# Otherwise each lost connection prints a page of C++ frames. Read when torch is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch.distributed as dist
from pydantic import ValidationError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from rdd_pipeline.errors import INTERRUPTED, UserError
from rdd_pipeline.interruptions import run_command, tell
from rdd_pipeline.launching.channel import TOKEN_VARIABLE, find_token
from rdd_pipeline.launching.exchange import Exchange
from rdd_pipeline.launching.launch import own_folder, run_workers
from rdd_pipeline.launching.worker import Task
from rdd_pipeline.training.device import resolve_devices

logger = logging.getLogger(__name__)


class _Here(NamedTuple):
    """What is this machine's own, as the arguments of `join`."""

    data: Path | None
    address: str | None
    teacher_module: str | None


def join(
    endpoint: str,
    *,
    token_file: Path | None = None,
    data: Path | None = None,
    address: str | None = None,
    timeout: float = 600.0,
    teacher_module: str | None = None,
) -> None:
    """Take part in all trainings of the first machine's command.

    Args:
        endpoint: HOST:PORT of the first machine.
        token_file: File with its token; None: it is in the environment variable `RDD_TOKEN`.
        data: Folder of the images here; None: the same path as there.
        address: Name or address of this machine in the network of the others; None: the one by
            which it reaches the first.
        timeout: Seconds to wait for the first machine, at the start or when it is lost.
        teacher_module: Code that makes the teacher and may be run here; the first machine cannot
            ask for it by itself.

    Raises:
        UserError: It cannot be reached, has another token or version, or the images are not here.
        SignalException: A signal asked this process to stop.
    """
    here = _Here(data, address, teacher_module)
    token = find_token(token_file)
    if token is None:
        raise UserError(
            f"No token was given. The command on the first machine shows one: set {TOKEN_VARIABLE} "
            "to it, or give its trainer.token_file by --token-file."
        )
    while True:
        try:
            exchange = Exchange.connect(endpoint, token, timeout)
        except OSError as error:
            raise UserError(
                f"There is no training at {endpoint} after {timeout:g} seconds ({error}). Start "
                f"it there with --params=trainer.nodes=N,trainer.rendezvous={endpoint}, or look "
                "whether this machine reaches that address."
            ) from error
        try:
            _take_part_in_all(exchange, here)
        except dist.DistError:
            logger.warning(
                "The first machine is gone. Waiting %g seconds for it to come back.", timeout
            )
            continue
        return


def _take_part_in_all(exchange: Exchange, here: _Here) -> None:
    exchange.register()
    logger.info("Joined %s.", exchange.endpoint)
    seen = 0
    while (training := exchange.poll(seen)) is not None:
        if training > seen:
            seen = training
            _take_part(exchange, training, here)
        time.sleep(0.3)
    exchange.deregister()


def _take_part(exchange: Exchange, training: int, here: _Here) -> None:
    with own_folder(Path(tempfile.gettempdir()), "rdd-join-") as folder:
        if not exchange.fetch(training, folder):
            return
        task = _local(folder, exchange.endpoint, here)
        title = task.job.title
        resolve_devices(task.trainer, task.job.recipe.batch_size)  # they may not be here
        task.write(folder)
        logger.info("%s: taking part with %d process(es).", title, task.processes)
        try:
            run_workers(exchange, training, folder, task)
        except (ChildFailedError, RendezvousError) as error:
            logger.warning("%s: %s", title, str(error).strip().splitlines()[0])
        for failure in exchange.failures(training)[-1:]:
            logger.warning("%s: %s", title, failure.message)
        logger.info("%s: done here.", title)


def _local(folder: Path, endpoint: str, here: _Here) -> Task:
    """The task as it is on this machine."""
    try:
        task = Task.model_validate_json((folder / "task.json").read_text())
    except (OSError, ValidationError) as error:
        raise UserError(f"{endpoint} sent no task that can be read: {error}") from error
    if task.teacher_module not in (None, here.teacher_module):
        raise UserError(
            f"The teacher is made by the code {task.teacher_module}, which {endpoint} cannot have "
            "run here by itself. If that code is here and you trust it: --teacher-module "
            f"{task.teacher_module}"
        )
    root = (here.data.expanduser().resolve() if here.data else task.images.root).absolute()
    if not root.is_dir():
        raise UserError(
            f"The images are in {task.images.root} on the first machine, but {root} is no folder "
            "here. Give the place of the same images by --data."
        )
    trainer = task.trainer.model_copy(update={"rendezvous": endpoint, "address": here.address})
    places = {"images": replace(task.images, root=root), "work": None, "cwd": Path.cwd()}
    return task.model_copy(update={"trainer": trainer, **places})


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rdd_pipeline.launching.join",
        description="Take part in the trainings of another machine.",
    )
    parser.add_argument("endpoint", metavar="HOST:PORT", help="trainer.rendezvous there")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help=f"the token; else {TOKEN_VARIABLE} is"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the images here")
    parser.add_argument(
        "--address", help="name or address of this machine in the network of the others"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="(default: %(default)g)"
    )
    parser.add_argument(
        "--teacher-module", metavar="REFERENCE", help="code of the teacher that may be run here"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        join(**vars(arguments))
    except (UserError, OSError) as error:  # TMPDIR may be none
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SignalException as error:  # while processes of its own run
        tell(f"Stopped: {error}. The same command joins again.")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
