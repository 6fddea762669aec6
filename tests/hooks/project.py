"""A small Kedro project made by the test, with the experiment hook."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedro.framework.hooks.manager import _create_hook_manager, _register_hooks
from kedro.io import DataCatalog
from kedro.pipeline import Node, Pipeline
from mlflow import MlflowClient
from mlflow.entities import Run
from pydantic import BaseModel

from rdd_pipeline import tracking
from rdd_pipeline.errors import UserError
from rdd_pipeline.hooks import ExperimentHook
from tests.mlflow_store import new_store


class Train(BaseModel, frozen=True, extra="forbid"):
    epochs: int = 2
    fault: str = ""
    size: tuple[int, int] = (1, 2)


def make_facts() -> dict[str, str]:
    return {"data_digest": "abc"}


def train(train: Train, seed: int, facts: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Log a curve, then do what `fault` says."""
    for step in range(1, train.epochs + 1):
        tracking.log_metrics(step, {"loss": 1.0 / step})
    if train.fault == "user":
        raise UserError("The label 77 is wrong.")
    if train.fault == "crash":
        raise RuntimeError("boom")
    if train.fault.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, train.fault))
        time.sleep(20)
    return {"test": {"miou": 0.5, "iou": {"road": 0.25, "sky": None}}}, f"seed {seed}"


def create_pipeline(methods: tuple[str, ...]) -> Any:

    base = Pipeline(
        [
            Node(
                train,
                name="train_node",
                inputs=["params:train", "params:seed", "facts"],
                outputs=["metrics", "summary"],
            )
        ]
    )
    whole = Pipeline([Node(make_facts, name="facts_node", inputs=None, outputs="facts")])
    for method in methods:
        whole += Pipeline(
            base,
            namespace=method,
            inputs={"facts": "facts"},
            outputs={"metrics": f"metrics_{method}", "summary": f"summary_{method}"},
            parameters={"params:seed"},
        )
    return whole


CATALOG = """
facts:
  type: json.JSONDataset
  filepath: data/facts.json
  versioned: true
  metadata: {mlflow: {tags: true}}
"metrics_{method}":
  type: json.JSONDataset
  filepath: data/metrics/{method}.json
  versioned: true
  metadata: {mlflow: {metrics: true}}
"summary_{method}":
  type: text.TextDataset
  filepath: data/{method}.txt
  versioned: true
  metadata: {mlflow: {artifact_path: texts}}
"""


class Project:
    """A Kedro project on disk whose pipelines and settings live in this module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = f"sqlite:///{path}/mlflow.db"

    def make(self) -> None:
        for folder in ("conf/base", "conf/local", "conf/camvid"):
            (self.path / folder).mkdir(parents=True)
        self.configure("catalog", CATALOG)
        self.configure("globals", "dataset: scenes")
        self.configure(
            "parameters",
            "seed: 3\nkd: {train: {epochs: 2}}\ncwd: {train: {epochs: 3}}\n"
            "dist: {train: {epochs: 2}}",
        )
        self.configure(
            "mlflow",
            'server: {mlflow_tracking_uri: "sqlite:///mlflow.db"}\n'
            'tracking: {experiment: {name: "rdd_${globals:dataset}"}, run: {nested: false}}',
        )
        new_store(self.path / "mlflow.db")

    def configure(self, name: str, content: str) -> None:
        (self.path / "conf" / "base" / f"{name}.yml").write_text(content)

    def run(
        self,
        *methods: str,
        env: str | None = None,
        params: dict[str, Any] | None = None,
        runner: Any = None,
        after_start: Callable[[], None] | None = None,
    ) -> None:
        """What `KedroSession.run` does, without a registry of pipelines and without settings."""
        from kedro.config import OmegaConfigLoader
        from kedro.framework.context import KedroContext
        from kedro.framework.session.session import generate_timestamp
        from kedro.runner import SequentialRunner

        manager = _create_hook_manager()
        _register_hooks(manager, (ExperimentHook(),))
        loader = OmegaConfigLoader(
            conf_source=str(self.path / "conf"),
            base_env="base",
            default_run_env="local",
            env=env,
            runtime_params=params,
        )
        context = KedroContext(
            package_name="small",
            project_path=self.path,
            config_loader=loader,
            env=env,
            hook_manager=manager,
            runtime_params=params,
        )
        manager.hook.after_context_created(context=context)
        version = generate_timestamp()
        catalog = context._get_catalog(catalog_class=DataCatalog, save_version=version)
        pipeline = create_pipeline(methods)
        for name in pipeline.inputs():
            if name.endswith(".train"):
                value = catalog.load(name)
                catalog[name] = Train(**value)
        facts = {"run_id": version, "env": env, "pipeline_names": ["small"]}
        arguments = {"run_params": facts, "pipeline": pipeline, "catalog": catalog}
        manager.hook.before_pipeline_run(**arguments)
        if after_start is not None:
            after_start()
        try:
            result = (runner or SequentialRunner()).run(pipeline, catalog, manager, run_id=version)
        except Exception as error:
            manager.hook.on_pipeline_error(error=error, **arguments)
            raise
        manager.hook.after_pipeline_run(run_result=result, **arguments)

    def runs(self) -> dict[str, Run]:
        """The newest run by name."""
        client = MlflowClient(tracking_uri=self.uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
        return {str(run.info.run_name): run for run in found}

    def curve(self, run: Run, key: str = "loss") -> list[float]:
        client = MlflowClient(tracking_uri=self.uri)
        return [point.value for point in client.get_metric_history(run.info.run_id, key)]
