"""The experiment hook inside of real Kedro sessions, with a small project made by the test."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kedro.framework.hooks.manager import _create_hook_manager, _register_hooks
from kedro.io import DataCatalog, DatasetError
from kedro.pipeline import Node, Pipeline
from kedro.validation import ParameterValidationError
from kedro_datasets.json import JSONDataset
from kedro_mlflow.config.kedro_mlflow_config import KedroMlflowConfig
from mlflow import MlflowClient
from mlflow.entities import Run
from pydantic import BaseModel

from rdd_pipeline import tracking
from rdd_pipeline.commands import kedro_command
from rdd_pipeline.config import RecipeParams
from rdd_pipeline.errors import RunInterrupted, UserError, WorkerFailedError
from rdd_pipeline.hooks import ExperimentHook
from rdd_pipeline.hooks.configuration import check_environment, check_upstream
from rdd_pipeline.hooks.facts import (
    command,
    flat_params,
    git_state,
    is_alive,
    numeric_leaves,
    process_tags,
)
from rdd_pipeline.hooks.interruptions import Signals
from rdd_pipeline.hooks.messages import show_user_errors_as_one_line, user_message
from rdd_pipeline.hooks.run import OpenRun, close_dead_runs
from rdd_pipeline.tracking import Experiment, Sender, TrackingWriter
from rdd_pipeline.tracking.__main__ import main as tracking_command
from rdd_pipeline.tracking.records import Record
from tests.mlflow_store import new_store


class Train(BaseModel, frozen=True, extra="forbid"):
    epochs: int = 2
    fault: str = ""
    size: tuple[int, int] = (1, 2)


def make_facts() -> dict[str, str]:
    return {"data_digest": "abc"}


def train(train: Train, seed: int, facts: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Emit a curve, then do what `fault` says."""
    for step in range(1, train.epochs + 1):
        tracking.emit(step, {"loss": 1.0 / step})
    if train.fault == "user":
        raise UserError("The label 77 is wrong.")
    if train.fault == "crash":
        raise RuntimeError("boom")
    if train.fault.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, train.fault))
        time.sleep(20)
    return {"test": {"miou": 0.5, "iou": {"road": 0.25, "sky": None}}}, f"seed {seed}"


def create_pipeline(methods: tuple[str, ...]) -> Any:
    from kedro.pipeline import Node, Pipeline

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
        for folder in ("conf/base", "conf/local", "conf/camvid"):
            (path / folder).mkdir(parents=True)
        self.configure("catalog", CATALOG)
        self.configure("globals", "dataset: scenes")
        self.configure("parameters", "seed: 3\nkd: {train: {epochs: 2}}\ncwd: {train: {epochs: 3}}")
        self.configure(
            "mlflow",
            'server: {mlflow_tracking_uri: "sqlite:///mlflow.db"}\n'
            'tracking: {experiment: {name: "rdd_${globals:dataset}"}, run: {nested: false}}',
        )
        self.uri = new_store(path / "mlflow.db")

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
        from kedro.io import DataCatalog
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


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    # Wherever the command is started, the database is the project's.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    hook = sys.excepthook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    path = tmp_path / "project"
    path.mkdir()
    yield Project(path)
    sys.excepthook = hook
    assert handlers == {number: signal.getsignal(number) for number in handlers}
    assert tracking._LISTENER.get() is None
    assert not list(elsewhere.iterdir())


# ---- whole sessions


def test_every_namespace_has_a_child_run_with_equal_keys(project: Project) -> None:
    project.run("kd", "cwd")
    runs = project.runs()
    assert set(runs) == {"small", "kd", "cwd"}
    for method, epochs in (("kd", 2), ("cwd", 3)):
        run = runs[method]
        assert run.info.status == "FINISHED"
        assert run.data.tags["method"] == method
        assert run.data.tags["mlflow.parentRunId"] == runs["small"].info.run_id
        assert run.data.params == {
            "train.epochs": str(epochs),
            "train.fault": "",
            "train.size": "(1, 2)",
            "seed": "3",
        }
        assert project.curve(run) == [1.0 / step for step in range(1, epochs + 1)]
        assert run.data.metrics["test.miou"] == 0.5
        assert run.data.metrics["test.iou.road"] == 0.25
    assert set(runs["kd"].data.metrics) == set(runs["cwd"].data.metrics)
    assert runs["small"].data.params == {}


def test_one_namespace_needs_no_child(project: Project) -> None:
    project.run("kd")
    runs = project.runs()
    assert set(runs) == {"small"}
    assert runs["small"].data.tags["method"] == "kd"
    assert project.curve(runs["small"]) == [1.0, 0.5]


def test_runs_say_where_they_come_from(project: Project) -> None:
    project.run("kd", "cwd", env="camvid")
    runs = project.runs()
    (version,) = [path.name for path in (project.path / "data" / "facts.json").iterdir()]
    for run in runs.values():
        tags = run.data.tags
        assert tags["dataset"] == "scenes"
        assert tags["env"] == "camvid"
        assert tags["version"] == version
        assert tags["data_digest"] == "abc"
    assert runs["kd"].data.tags["input.facts"] == version
    assert runs["small"].data.tags["kedro_command"] == ("kedro run --pipelines=small --env=camvid")


def test_nodes_learn_what_the_session_was_started_with(project: Project) -> None:
    project.run("kd", env="camvid", params={"seed": 4, "kd": {"train": {"epochs": 1}}})
    assert kedro_command("small") == (
        "kedro run --pipeline=small --env=camvid --params=seed=4,kd.train.epochs=1"
    )
    project.run("kd")
    assert kedro_command("small") == "kedro run --pipeline=small"


def test_files_are_mirrored_beside_the_database_of_the_project(project: Project) -> None:
    project.run("kd")
    (run,) = project.runs().values()
    client = MlflowClient(tracking_uri=project.uri)
    assert [a.path for a in client.list_artifacts(run.info.run_id, "texts")] == ["texts/kd.txt"]
    assert str(run.info.artifact_uri).startswith((project.path / "mlartifacts").as_uri())


def test_threads_do_not_mix_their_runs(project: Project) -> None:
    from kedro.runner import ThreadRunner

    project.run("kd", "cwd", runner=ThreadRunner())
    runs = project.runs()
    assert project.curve(runs["kd"]) == [1.0, 0.5]
    assert project.curve(runs["cwd"]) == [1.0, 0.5, 1.0 / 3]
    assert runs["kd"].data.params["train.epochs"] == "2"


def test_two_sessions_in_one_process_are_two_runs(project: Project) -> None:
    project.run("kd")
    project.run("kd")
    client = MlflowClient(tracking_uri=project.uri)
    experiment = client.get_experiment_by_name("rdd_scenes")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    assert all(project.curve(run) == [1.0, 0.5] for run in runs)
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.parametrize(("fault", "kind"), [("user", UserError), ("crash", RuntimeError)])
def test_a_failed_node_fails_its_run_and_keeps_the_others(
    project: Project, fault: str, kind: type[Exception]
) -> None:
    params = {"kd": {"train": {"epochs": 1, "fault": fault}}}
    with pytest.raises(kind):
        project.run("cwd", "kd", params=params)
    runs = project.runs()
    assert runs["cwd"].info.status == "FINISHED"
    assert runs["kd"].info.status == runs["small"].info.status == "FAILED"
    for name in ("kd", "small"):
        assert runs[name].data.tags["error"].startswith(kind.__name__)
        assert runs[name].data.tags["failed_node"] == "kd.train_node"
    assert project.curve(runs["kd"]) == [1.0]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_is_marked_killed(project: Project, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(RunInterrupted, match=f"stopped by {name}"):
        project.run("kd", params={"kd": {"train": {"epochs": 1, "fault": name}}})
    assert time.monotonic() - start < 15
    (run,) = project.runs().values()
    assert run.info.status == "KILLED"
    assert project.curve(run) == [1.0]


def _wait_for_the_run(project: Project) -> None:
    deadline = time.monotonic() + 20
    while not project.runs() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_database_that_goes_away_does_not_stop_the_training(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    def go_away() -> None:
        _wait_for_the_run(project)
        (project.path / "mlflow.db").unlink()

    with caplog.at_level(logging.WARNING):
        project.run("kd", after_start=go_away)
    assert len(list((project.path / "data" / "metrics").rglob("kd.json"))) == 2
    (file,) = (project.path / "data/07_model_output/untracked").iterdir()
    assert '"loss"' in file.read_text()
    assert "was deleted or replaced" in caplog.text
    assert f"python -m rdd_pipeline.tracking {os.path.relpath(file)}" in caplog.text


def test_a_child_that_cannot_be_made_is_made_when_its_records_are_sent(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("away")

    def go_away() -> None:
        _wait_for_the_run(project)
        patch.setattr(MlflowClient, "create_run", refuse)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        project.run("kd", "cwd", after_start=go_away)
    assert set(project.runs()) == {"small"}
    assert tracking_command([str(project.path / "data/07_model_output/untracked")]) == 0
    runs = project.runs()
    assert set(runs) == {"small", "kd", "cwd"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["cwd"].data.tags["mlflow.parentRunId"] == runs["small"].info.run_id
    assert project.curve(runs["kd"]) == [1.0, 0.5]
    assert runs["cwd"].data.params["train.epochs"] == "3"


def test_without_a_server_the_run_goes_on_and_can_be_sent_elsewhere(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="rdd_pipeline"):
        project.run("kd")
    assert time.monotonic() - start < 20
    assert (project.path / "data" / "metrics" / "kd.json").exists()
    first, last = [
        record.getMessage() for record in caplog.records if record.name.startswith("rdd_pipeline")
    ]
    assert f"MLflow at http://127.0.0.1:{port} cannot be used" in first
    (file,) = (project.path / "data/07_model_output/untracked").iterdir()
    assert file.name.endswith("-small.jsonl")
    assert f"Send them later: python -m rdd_pipeline.tracking {os.path.relpath(file)}" in last
    assert "secret" not in caplog.text + file.read_text()
    assert project.runs() == {}
    assert tracking_command([str(file), "--tracking-uri", project.uri]) == 0
    (run,) = project.runs().values()
    assert run.data.tags["method"] == "kd"
    assert run.data.tags["data_digest"] == "abc"
    assert project.curve(run) == [1.0, 0.5]
    assert run.info.status == "FINISHED"


def test_a_server_that_starts_late_gets_the_run_all_the_same(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: Any) -> None:
        raise ConnectionError("not yet")

    monkeypatch.setattr(KedroMlflowConfig, "setup", away)
    project.run("kd", "cwd")
    runs = project.runs()
    assert set(runs) == {"small", "kd", "cwd"}
    client = MlflowClient(tracking_uri=project.uri)
    assert client.get_experiment_by_name("rdd_scenes") is not None
    location = str(runs["kd"].info.artifact_uri)
    assert location.startswith((project.path / "mlartifacts").as_uri())


def test_a_wrong_mlflow_yml_is_an_error_at_the_start(project: Project) -> None:
    project.configure("mlflow", "server: {tracking_url: x}")
    with pytest.raises(UserError, match=r"mlflow.yml is not valid"):
        project.run("kd")


def test_a_wrong_environment_is_refused_with_those_that_exist(project: Project) -> None:
    with pytest.raises(UserError, match=r"no environment 'camvit'.*are: camvid, local\."):
        project.run("kd", env="camvit")


def test_the_default_environment_need_not_exist(project: Project) -> None:
    (project.path / "conf" / "local").rmdir()
    check_environment(_context(project, "local"))
    check_environment(_context(project, None))


def _context(project: Project, env: str | None) -> Any:
    loader = SimpleNamespace(
        conf_source=str(project.path / "conf"), base_env="base", default_run_env="local"
    )
    return SimpleNamespace(env=env, config_loader=loader)


def test_only_the_first_of_several_processes_tells_mlflow(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    project.run("kd")
    assert project.runs() == {}


def test_a_given_run_is_used_and_left_open(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri=project.uri)
    run_id = client.create_run("0", run_name="outer").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    project.run("kd")
    run = project.runs()["outer"]
    assert run.info.status == "RUNNING"
    assert project.curve(run) == [1.0, 0.5]
    assert run.data.tags["method"] == "kd"


def test_a_dead_process_does_not_leave_its_run_running(tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=new_store(tmp_path / "mlflow.db"))
    own = process_tags(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    runs = {
        name: client.create_run("0", run_name=name, tags={**own, **tags}).info.run_id
        for name, tags in {
            "alive": {},
            "dead": {"process_id": str(child.pid), "process_start": "1"},
            "reused number": {"process_start": "1"},
            "other project": {"process_project": "elsewhere", "process_id": str(child.pid)},
            "other host": {"process_host": "elsewhere", "process_id": str(child.pid)},
        }.items()
    }
    close_dead_runs(client, "0", tmp_path)
    status = {name: client.get_run(run_id).info.status for name, run_id in runs.items()}
    killed = {name for name, value in status.items() if value == "KILLED"}
    assert killed >= {"dead"}
    assert killed <= {"dead", "reused number"}


# ---- parts


class Remembering(Sender):
    """Talks to nobody and remembers the records."""

    def __init__(self) -> None:
        super().__init__("http://server")
        self.records: list[Record] = []

    def send(self, batch: Sequence[Record]) -> list[Record]:
        self.records.extend(batch)
        return []

    def names(self) -> dict[str, str]:
        return {record.run_id: record.key for record in self.records if record.kind == "run"}


def _open_run(tmp_path: Path, *namespaces: str) -> tuple[Remembering, OpenRun]:
    sender = Remembering()
    run = OpenRun(
        TrackingWriter(sender, tmp_path / "x.jsonl"),
        Experiment("0"),
        "whole",
        namespaces=Counter(namespaces),
        tags={},
        own_tags={},
    )
    return sender, run


def test_a_child_run_starts_with_its_first_node(tmp_path: Path) -> None:
    sender, run = _open_run(tmp_path, "kd", "cwd")
    assert run.of("kd") == run.of("kd") != run.id == run.of(None)
    run.close("FINISHED", timeout=5.0)
    assert sender.names() == {run.id: "whole", run.of("kd"): "kd"}


@pytest.mark.parametrize("namespaces", [("kd",), ("kd", "cwd")])
def test_each_of_several_seeds_has_a_run_with_equal_keys(tmp_path: Path, namespaces) -> None:
    sender, run = _open_run(tmp_path, *namespaces)
    run.params("kd", "train", {"recipe.iterations": "6", "seed": "0"})
    listener = run.listener("kd")
    for seed in ("0", "1"):
        listener(1, {"loss": 2.0}, seed)
        run.metrics("kd", {"val.miou": 0.5}, seed)
    run.close("FINISHED", timeout=5.0)
    for seed in ("0", "1"):
        own = [r for r in sender.records if r.run_id == run.of("kd", seed) and r.kind != "run"]
        assert {(r.kind, r.key): r.value for r in own} == {
            ("param", "recipe.iterations"): "6",
            ("param", "seed"): seed,
            ("metric", "loss"): 2.0,
            ("metric", "val.miou"): 0.5,
            ("status", "status"): "FINISHED",
        }
    assert sender.names()[run.of("kd", "1")] == "kd seed 1"


def test_threads_that_start_together_make_one_child(tmp_path: Path) -> None:
    sender, run = _open_run(tmp_path, "kd", "cwd")
    threads = [threading.Thread(target=run.of, args=("kd",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.close("FINISHED", timeout=5.0)
    assert sorted(sender.names().values()) == ["kd", "whole"]


def test_params_are_flat_and_typed_models_are_opened() -> None:
    params = flat_params("recipe", RecipeParams(iterations=5))
    assert params["recipe.iterations"] == "5"
    assert params["recipe.optimizer.lr"] == "0.02"
    assert params["recipe.augment.crop"] == "(512, 1024)"
    assert params["recipe.clip_norm"] == "None"
    assert flat_params("", {"a": {"b": [1, 2]}}) == {"a.b": "[1, 2]"}


def test_only_numbers_become_metrics() -> None:
    data = {"test": {"miou": 0.5, "n": 3, "none": None, "name": "x", "ok": True, "m": [[1]]}}
    assert numeric_leaves(data) == {"test.miou": 0.5, "test.n": 3.0}
    assert numeric_leaves("no dict") == {}
    assert numeric_leaves({}) == {}


def test_the_command_can_be_typed_again() -> None:
    words = command(
        {
            "env": "camvid",
            "namespaces": ["kd"],
            "to_outputs": ["metrics_kd"],
            "node_names": ["a", "b"],
            "load_versions": {"student_tfe": "2026"},
            "runtime_params": {"recipe": {"iterations": 5}, "name": "two words"},
            "only_missing_outputs": True,
        },
        ["distill_tse"],
    )
    assert words == (
        "kedro run --pipelines=distill_tse --env=camvid --namespaces=kd --nodes=a,b "
        "--to-outputs=metrics_kd --load-versions=student_tfe:2026 "
        "'--params=recipe.iterations=5,name=two words' --only-missing-outputs"
    )
    assert command({}, ["__default__"]) == "kedro run"


def test_git_state_is_optional(tmp_path: Path) -> None:
    assert git_state(tmp_path / "nowhere") == (None, None)


def test_a_process_is_known_by_number_and_start() -> None:
    own = process_tags(Path())
    assert is_alive(os.getpid(), own["process_start"])
    if own["process_start"]:
        assert not is_alive(os.getpid(), "1")


def test_a_swallowed_stop_signal_stops_the_next_node() -> None:
    signals = Signals()
    signals.install()
    try:
        signals.check()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Exception:
            pass  # what some library does
        with pytest.raises(RunInterrupted, match="SIGTERM"):
            signals.check()
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_errors_of_the_user_are_their_message() -> None:
    assert user_message(UserError("Do this.")) == "Do this."
    wrapped = DatasetError("Failed while loading data from dataset X")
    wrapped.__cause__ = UserError("File X is damaged.")
    assert user_message(wrapped) == "File X is damaged."
    text = "Parameter 'x': bad\n    For further information visit https://errors.pydantic.dev/2"
    assert user_message(ParameterValidationError(text)) == "Parameter 'x': bad"
    assert user_message(WorkerFailedError("ValueError: bad")) == "ValueError: bad"
    assert user_message(RuntimeError("a bug")) is None
    assert user_message(DatasetError("no cause")) is None


def test_only_errors_of_the_user_lose_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: seen.append(error))
    show_user_errors_as_one_line()
    once = sys.excepthook
    show_user_errors_as_one_line()
    assert sys.excepthook is once
    bug = RuntimeError("a bug")
    sys.excepthook(UserError, UserError("Do this."), None)
    sys.excepthook(RuntimeError, bug, None)
    assert capsys.readouterr().err == "Error: Do this.\n"
    assert seen == [bug]
    with pytest.raises(SystemExit) as info:
        sys.excepthook(RunInterrupted, RunInterrupted("Stopped."), None)
    assert info.value.code == 143
    assert capsys.readouterr().err == "Error: Stopped.\n"


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDD_TRACEBACK", "1")
    before = sys.excepthook
    show_user_errors_as_one_line()
    assert sys.excepthook is before


def test_a_part_of_a_pipeline_that_lacks_what_it_reads_is_refused(tmp_path):
    made = JSONDataset(filepath=str(tmp_path / "made.json"))
    made.save({})
    catalog = DataCatalog(
        {
            "made": made,
            "teacher_weights": JSONDataset(filepath=str(tmp_path / "teacher.json")),
            "metrics_cwd": JSONDataset(filepath=str(tmp_path / "metrics.json")),
        }
    )
    part = Pipeline(
        [Node(lambda *x: x, ["made", "teacher_weights", "params:x"], "metrics_cwd", name="n")]
    )
    with pytest.raises(
        UserError,
        match=r"reads teacher_weights, which nothing .*--to-outputs=metrics_cwd: it makes",
    ):
        check_upstream(part, catalog)
    catalog["teacher_weights"].save({})
    check_upstream(part, catalog)
    check_upstream(part, None)
    # What its own nodes make, and what is not a file of the project, is none of its business.
    check_upstream(Pipeline([Node(lambda x: x, "params:x", "metrics_cwd", name="n")]), catalog)
    check_upstream(Pipeline([Node(lambda x: x, "elsewhere", "y", name="n")]), catalog)
