"""Use of the machine while something is trained, as MLflow's system metrics."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import copy_context
from importlib import import_module
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from rdd_pipeline import tracking
from rdd_pipeline.config import TrainerParams
from rdd_pipeline.tracking.records import first_line

logger = logging.getLogger(__name__)

SECONDS = 10.0
"""Between two points, as MLflow has it; a training that takes less has one."""
_MONITORS = "mlflow.system_metrics.metrics"
INSTALL = "pip install 'rdd-pipeline[system]'"


class Sampler:
    """Measures CPU, memory and GPUs of the machine now and then, in a thread.

    Args:
        tell: Is given the values by MLflow's names, such as ``system/cpu_utilization_percentage``.
        seconds: Between two points.

    Raises:
        ImportError: psutil is not installed.
    """

    def __init__(
        self, tell: Callable[[Mapping[str, float]], None], seconds: float = SECONDS
    ) -> None:
        self._monitors = _monitors()
        self._tell, self._seconds = tell, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(
            # Where the numbers go is a matter of the context that is now.
            target=copy_context().run,
            args=(self._work,),
            name="system metrics",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """Tell the last point."""
        self._over.set()
        self._thread.join(self._seconds)  # a GPU that hangs does not keep the run

    def _work(self) -> None:
        try:
            self._collect()  # of the CPU the first value is 0: it is the use since the last one
            for monitor in self._monitors:
                monitor.clear_metrics()
            over = False
            while not over:
                over = self._over.wait(self._seconds)
                self._collect()
                self._tell(
                    {
                        f"system/{name}": float(value)
                        for monitor in self._monitors
                        for name, value in monitor.aggregate_metrics().items()
                    }
                )
                for monitor in self._monitors:
                    monitor.clear_metrics()
        except Exception as error:
            logger.warning(
                "System metrics cannot be measured (%s). The run goes on.", first_line(error)
            )

    def _collect(self) -> None:
        for monitor in self._monitors:
            monitor.collect_metrics()


def _monitors() -> list[Any]:
    """MLflow's, which are not typed."""
    monitors = [import_module(f"{_MONITORS}.cpu_monitor").CPUMonitor()]
    with contextlib.suppress(Exception):  # no such GPU, driver or package
        monitors.append(import_module(f"{_MONITORS}.gpu_monitor").GPUMonitor())
    return monitors


class SystemMetricsHook:
    """Logs what `Sampler` measures beside the curves of each training (`trainer.system_metrics`).

    The numbers go the way of all others, so an MLflow that is away gets them later.
    """

    def __init__(self) -> None:
        self._catalog: CatalogProtocol[Any, Any] | None = None
        self._wanted = False
        self._sampler: Sampler | None = None
        self._points: Counter[str | None] = Counter()

    @hook_impl
    def after_catalog_created(self, catalog: CatalogProtocol[Any, Any]) -> None:
        """Remember the catalog, which has the parameters."""
        self._catalog = catalog

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """See whether the parameters ask for it, and say now what is not installed."""
        self._wanted, self._points = False, Counter()
        if self._catalog is None or "params:trainer" not in pipeline.inputs():
            return
        trainer = self._catalog.load("params:trainer")
        wanted = isinstance(trainer, TrainerParams) and trainer.system_metrics
        if not wanted or os.environ.get("RANK", "0") != "0":
            return
        try:
            monitors = _monitors()
        except ImportError:
            logger.warning("trainer.system_metrics needs psutil, the run goes on: %s", INSTALL)
            return
        self._wanted = True
        if len(monitors) == 1 and _has_gpu():
            logger.warning("GPUs are not in the system metrics, that needs: %s", INSTALL)

    @hook_impl(trylast=True)  # the experiment's hook has said where numbers go
    def before_node_run(self, node: Node) -> None:
        """Begin with a node that trains."""
        if self._wanted and {"training", "trials"} & node.tags:
            self._sampler = Sampler(lambda values: self._tell(node.namespace, values))

    @hook_impl(tryfirst=True)
    def after_node_run(self) -> None:
        """Tell the last point while numbers go somewhere."""
        self._node_ended()

    @hook_impl(tryfirst=True)
    def on_node_error(self) -> None:
        """Tell the last point while numbers go somewhere."""
        self._node_ended()

    def _tell(self, namespace: str | None, values: Mapping[str, float]) -> None:
        self._points[namespace] += 1
        tracking.log_metrics(self._points[namespace], values)

    def _node_ended(self) -> None:
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.stop()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
