"""TensorBoard beside MLflow: the curves and scores of every training, as event files."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from rdd_pipeline import tracking
from rdd_pipeline.config import TrainerParams
from rdd_pipeline.hooks.facts import curve_name, score_names
from rdd_pipeline.interruptions import interruption
from rdd_pipeline.tracking import CurveSink, EventFile
from rdd_pipeline.tracking.records import clean_name, first_line

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 30.0
"""Between two writes, where validations are rarer."""
FILE_NAME = "events.out.tfevents.0000000000.rdd_pipeline"
"""Always the same, so that it is found again; TensorBoard looks for the third word."""


class TensorBoard:
    """Event files ``METHOD/FINGERPRINT``, with several seeds ``METHOD/seed_N/FINGERPRINT``.

    So a training with other settings is another run in TensorBoard, and one that goes on is the
    same. After the first fault, of which one warning tells, nothing more is written.

    Args:
        folder: What ``tensorboard --logdir`` is given.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, EventFile] = {}
        self._flushed = -math.inf
        self._broken = False
        self._lock = threading.Lock()

    def sink(self, namespace: str | None) -> CurveSink:
        """Where the curves go that a node of this namespace logs, or logs for another one."""

        def tell(
            step: int,
            values: Mapping[str, float],
            training: str,
            seed: str | None,
            method: str | None,
        ) -> None:
            named = {curve_name(key): value for key, value in values.items()}
            place = (method or str(namespace), seed, training)
            due = time.monotonic() - self._flushed > FLUSH_SECONDS
            self._try(partial(self._add, place, step, named))
            if due or "val.miou" in values:
                self.flush()

        return tell

    def scored(self, method: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the scores of a method's networks, by seed, at the iteration of their weights."""
        from rdd_pipeline.training.store import is_fingerprint

        for seed, found in metrics.items():
            about = found["about"]
            if is_fingerprint(about["fingerprint"]):  # else it was not trained here
                place = (method, seed if len(metrics) > 1 else None, about["fingerprint"])
                step = int(about["iteration"] or 0)
                # Another way to evaluate gives the same weights other scores.
                self._try(partial(self._add, place, step, score_names(found), revised=True))

    def flush(self) -> None:
        """Write what was noted."""
        self._try(self._flush)

    def _add(
        self,
        place: tuple[str, str | None, str],
        step: int,
        values: Mapping[str, float],
        *,
        revised: bool = False,
    ) -> None:
        method, seed, training = place
        own = [] if seed is None else [f"seed_{seed}"]
        path = self._folder.joinpath(method, *own, training, FILE_NAME)
        if path not in self._files:
            self._files[path] = EventFile(path)
        named = {clean_name(key): value for key, value in values.items()}
        self._files[path].add(step, named, revised=revised)

    def _flush(self) -> None:
        for file in self._files.values():
            file.flush()
        self._flushed = time.monotonic()

    def _try(self, work: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            with self._lock:
                work()
        except Exception as error:
            if interruption(error):
                raise
            self._broken = True
            logger.warning(
                "TensorBoard's files in %s cannot be written (%s). The run goes on without them.",
                os.path.relpath(self._folder),
                first_line(error),
            )


class TensorBoardHook:
    """Writes a `TensorBoard` where `trainer.tensorboard` is set; it needs no MLflow."""

    def __init__(self) -> None:
        self._catalog: CatalogProtocol[Any, Any] | None = None
        self._board: TensorBoard | None = None

    @hook_impl
    def after_catalog_created(self, catalog: CatalogProtocol[Any, Any]) -> None:
        """Remember the catalog, which knows the folder."""
        self._catalog, self._board = catalog, None

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """Begin, if the parameters say so; of processes of torchrun the first one does."""
        self._board = None
        catalog = self._catalog
        if catalog is None or "params:trainer" not in pipeline.inputs():
            return
        trainer = catalog.load("params:trainer")
        if (
            isinstance(trainer, TrainerParams)
            and trainer.tensorboard
            and os.environ.get("RANK", "0") == "0"
        ):
            self._board = TensorBoard(catalog.load("reporting_folder") / "tensorboard")

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """Take what the node logs."""
        if self._board is not None:
            tracking.set_curve_sink(self._board.sink(node.namespace))

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any, node: Node) -> None:
        """Add scores: of what has ``metadata: {mlflow: {metrics: by_seed}}``."""
        if self._board is not None and self._catalog is not None:
            metadata = getattr(self._catalog.get(dataset_name), "metadata", None) or {}
            if (metadata.get("mlflow") or {}).get("metrics") == "by_seed":
                self._board.scored(str(node.namespace), data)
                self._board.flush()

    @hook_impl
    def after_node_run(self) -> None:
        """Write the rest."""
        self._node_ended()

    @hook_impl
    def on_node_error(self) -> None:
        """Write what there is."""
        self._node_ended()

    def _node_ended(self) -> None:
        tracking.set_curve_sink(None)
        if self._board is not None:
            self._board.flush()
