"""Use of the machine beside the curves, where `trainer.system_metrics` asks for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rdd_pipeline import tracking
from rdd_pipeline.config import TrainerParams
from rdd_pipeline.hooks import system
from rdd_pipeline.hooks.facts import curve_name
from rdd_pipeline.hooks.system import SystemMetricsHook

TRAINS: Any = SimpleNamespace(namespace="kd", tags={"training"})
EVALUATES: Any = SimpleNamespace(namespace="kd", tags=set())
MONITORS = "mlflow.system_metrics.metrics"
Told = list[tuple[int, dict[str, float]]]


@pytest.fixture
def told() -> Iterator[Told]:
    """What the experiment's hook would send."""
    found: Told = []
    tracking.set_metric_sink(lambda step, values, *_: found.append((step, dict(values))))
    yield found
    tracking.set_metric_sink(None)


@pytest.fixture
def psutil(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine whose CPUs were used for 0 % since nobody asked, then for 40, 60, 80 ... %."""
    module: Any = ModuleType("psutil")
    uses = iter([0.0, *range(40, 1000, 20)])
    module.cpu_percent = lambda: next(uses)
    module.virtual_memory = lambda: SimpleNamespace(used=2e6, total=8e6)
    monkeypatch.setitem(sys.modules, "psutil", module)
    monkeypatch.delitem(sys.modules, f"{MONITORS}.cpu_monitor", raising=False)
    yield module
    sys.modules.pop(f"{MONITORS}.cpu_monitor", None)


def _hook(*, on: bool = True) -> SystemMetricsHook:
    """Of a session, before its first node."""
    catalog: Any = SimpleNamespace(load={"params:trainer": TrainerParams(system_metrics=on)}.get)
    pipeline: Any = SimpleNamespace(inputs=lambda: {"params:trainer"})
    hook = SystemMetricsHook()
    hook.after_catalog_created(catalog)
    hook.before_pipeline_run(pipeline)
    return hook


def test_nothing_is_measured_unless_asked_for_and_but_while_something_is_trained(psutil, told):
    for hook, node in ((_hook(on=False), TRAINS), (_hook(), EVALUATES)):
        hook.before_node_run(node)
        hook.after_node_run()
    assert told == []


def test_each_training_has_a_point_at_its_end_and_the_mean_since_the_last_one(psutil, told):
    hook = _hook()
    for end in (hook.after_node_run, hook.on_node_error):
        hook.before_node_run(TRAINS)
        end()
    memory = {"system_memory_usage_megabytes": 2.0, "system_memory_usage_percentage": 25.0}
    rest = {f"system/{name}": value for name, value in memory.items()}
    assert told == [
        (1, {"system/cpu_utilization_percentage": 40.0, **rest}),
        (2, {"system/cpu_utilization_percentage": 80.0, **rest}),  # 60 began it
    ]
    assert all(curve_name(name) == name for _, values in told for name in values)


def test_points_come_while_it_trains(psutil, told, monkeypatch):
    monkeypatch.setattr(system.Sampler.__init__, "__defaults__", (0.01,))
    hook = _hook()
    hook.before_node_run(TRAINS)
    sampler = hook._sampler
    assert sampler is not None
    for _ in range(1000):
        if len(told) >= 2:
            break
        sampler._over.wait(0.01)
    hook.after_node_run()
    assert [step for step, _ in told] == list(range(1, len(told) + 1))
    assert len(told) >= 3


def test_what_is_not_installed_is_said_once_and_nothing_fails(told, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.delitem(sys.modules, f"{MONITORS}.cpu_monitor", raising=False)
    hook = _hook()
    hook.before_node_run(TRAINS)
    hook.after_node_run()
    assert told == []
    (line,) = caplog.messages
    assert "needs psutil, the run goes on: pip install 'rdd-pipeline[system]'" in line


def test_a_machine_that_cannot_be_measured_is_a_warning(psutil, told, caplog):
    hook = _hook()
    psutil.virtual_memory = lambda: 1 / 0
    hook.before_node_run(TRAINS)
    hook.after_node_run()
    assert told == []
    assert (
        "System metrics cannot be measured (ZeroDivisionError: division by zero). The run goes on."
        in caplog.text
    )
