"""Kedro hook: every run is an MLflow run, and a failing MLflow never costs a training.

`ExperimentHook` keeps kedro-mlflow's configuration (mlflow.yml) and replaces its logging: one child
run per namespace when a run has several, parameters flattened, datasets with `metadata.mlflow`
mirrored, interrupted runs marked. Runs are addressed by id, because MLflow's active run belongs to
a thread. The plugin's own hook must be off: ``DISABLE_HOOKS_FOR_PLUGINS = ("kedro_mlflow",)``.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol, DatasetError
from kedro.io.core import AbstractVersionedDataset
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from kedro.validation import ParameterValidationError
from kedro_mlflow.framework.hooks.mlflow_hook import MlflowHook
from pydantic import BaseModel, ValidationError

from rdd_pipeline import tracking
from rdd_pipeline.errors import UserError

logger = logging.getLogger(__name__)

UNTRACKED = Path("data/07_model_output/untracked")
"""Where records end up that MLflow did not take, relative to the project."""

NODE_END_SECONDS = 2.0
RUN_END_SECONDS = 20.0


class RunInterrupted(RuntimeError):  # noqa: N818 - no fault, the user wanted it
    """The run was stopped by Ctrl-C or by SIGTERM; an Exception, so that Kedro's hooks see it."""


class ExperimentHook(MlflowHook):  # type: ignore[misc]
    """Records Kedro runs in MLflow; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        """Start of a session: nothing of an earlier one in this process is left."""
        self._project = Path()
        self._globals: dict[str, Any] = {}
        self._client: Any = None
        self._writer: tracking.TrackingWriter | None = None
        self._catalog: CatalogProtocol[Any, Any] | None = None
        self.run_id: str | None = None
        self._owned = True
        self._nested = False
        self._children: dict[str, str] = {}
        self._open_nodes: Counter[str] = Counter()
        self._tags: dict[str, str] = {}
        self._logged: dict[str, dict[str, str]] = {}
        self._failed_node: Node | None = None
        self._lock = threading.RLock()
        self._signals = _Signals()
        self._process = os.getpid()

    # ---- start

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Check the environment's name and set MLflow up."""
        show_user_errors_as_one_line()
        self._forget()
        self._project = Path(context.project_path)
        _check_environment(context)
        if int(os.environ.get("RANK", "0")) > 0:
            return  # torchrun starts one Kedro per process: the first one tells MLflow
        # mlflow's own defaults keep a run waiting for four minutes when the server is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        try:
            self._globals = dict(_section(context, "globals"))
            _anchor_paths(context)
            super().after_context_created(context)
            self._client = self.mlflow_config.server._mlflow_client
        except ValidationError as error:
            raise UserError(f"mlflow.yml is not valid. {error}") from error
        except Exception as error:
            logger.warning(
                "MLflow cannot be set up (%s: %s). This run is not tracked; everything else is "
                "saved as usual.",
                type(error).__name__,
                str(error).strip().partition("\n")[0][:300],
            )

    @hook_impl
    def after_catalog_created(self, catalog: CatalogProtocol[Any, Any]) -> None:
        """Remember the catalog: it knows which datasets are mirrored."""
        # Not kedro-mlflow's own: it makes every dataset and so imports every library.
        self._catalog = catalog

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline) -> None:
        """Open the MLflow run, and stop for signals in an orderly way."""
        self._signals.install()
        if self._client is None:
            return
        with self._guard("start the run"):
            names = sorted(run_params.get("pipeline_names") or ["__default__"])
            config = self.mlflow_config.tracking
            if set(names) <= set(config.disable_tracking.pipelines):
                return
            self._open_nodes = Counter(node.namespace for node in pipeline.nodes if node.namespace)
            self._nested = len(self._open_nodes) > 1
            self._tags = self._run_tags(run_params)
            own = {} if len(self._open_nodes) != 1 else {"method": next(iter(self._open_nodes))}
            given = config.run.id or os.environ.get("MLFLOW_RUN_ID")
            self._owned = given is None
            self.run_id = given or self._create_run(
                config.run.name or "+".join(names),
                {**own, "kedro_command": _command(run_params, names)},
            )
            self._writer = tracking.TrackingWriter(self._client, self._project / UNTRACKED)
            atexit.register(self._at_exit)
            logger.info("MLflow run %s of %s", self.run_id, config.experiment.name)
            threading.Thread(target=self._close_dead_runs, daemon=True).start()

    # ---- nodes

    @hook_impl
    def before_node_run(self, node: Node, inputs: dict[str, Any]) -> None:
        """Log the node's parameters and send what it emits to its run."""
        self._signals.check()
        with self._guard("log parameters"):
            run_id = self._run_of(node)
            if run_id is None or self._writer is None:
                return
            self._log_params(run_id, node, inputs)
            tracking.listen(tracking.MlflowSink(run_id, self._writer))

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        """Send the node's last points."""
        self._end_node(node, failed=False)

    @hook_impl
    def on_node_error(self, node: Node) -> None:
        """Send the node's last points and remember which node it was."""
        self._failed_node = node
        self._end_node(node, failed=True)

    @hook_impl
    def after_dataset_loaded(self, dataset_name: str, data: Any, node: Node) -> None:
        """Note which version of a dataset a run has used."""
        with self._guard("log an input"):
            dataset = self._dataset(dataset_name)
            if isinstance(dataset, AbstractVersionedDataset) and dataset._version:
                run_id = self._run_of(node)
                if run_id is not None and self._writer is not None:
                    version = dataset.resolve_load_version()
                    self._writer.tags(run_id, {f"input.{dataset_name}": version})
            self._mirror_tags(dataset, data)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any, node: Node) -> None:
        """Mirror a saved dataset as its `metadata.mlflow` says."""
        with self._guard(f"log the dataset {dataset_name}"):
            dataset = self._dataset(dataset_name)
            options = _mlflow_options(dataset)
            run_id = self._run_of(node) if options else None
            if run_id is None or self._writer is None:
                return
            if options.get("metrics"):
                self._writer.metrics(run_id, numeric_leaves(data))
            if "artifact_path" in options:
                path = _saved_path(dataset)
                if path is not None:
                    self._writer.artifact(run_id, path, str(options["artifact_path"]))
            self._mirror_tags(dataset, data)

    # ---- end

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Close the runs as finished."""
        self._close("FINISHED")

    @hook_impl
    def on_pipeline_error(self, error: Exception) -> None:
        """Close the runs as failed or, when the user stopped them, as killed."""
        self._close("KILLED" if isinstance(error, RunInterrupted) else "FAILED", error)

    # ---- how

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """Let nothing that goes wrong with tracking stop a run."""
        if os.getpid() != self._process:
            yield  # a forked worker: there is no writer here, calls fall through
            return
        try:
            yield
        except RunInterrupted:
            raise
        except Exception as error:
            logger.warning(
                "Tracking could not %s (%s: %s). The run goes on.",
                what,
                type(error).__name__,
                str(error).strip().partition("\n")[0][:300],
            )

    def _create_run(self, name: str, tags: Mapping[str, str]) -> str:
        run = self._client.create_run(
            self.mlflow_config.tracking.experiment._experiment.experiment_id,
            run_name=name,
            tags={**self._tags, **tags},
        )
        return str(run.info.run_id)

    def _run_of(self, node: Node | None) -> str | None:
        """Id of the run that a node belongs to; None when nothing is tracked."""
        namespace = node.namespace if node is not None else None
        if self.run_id is None or not self._nested or namespace is None:
            return self.run_id
        with self._lock:
            if namespace not in self._children:
                self._children[namespace] = self._create_run(
                    namespace, {"method": namespace, "mlflow.parentRunId": self.run_id}
                )
            return self._children[namespace]

    def _run_tags(self, run_params: Mapping[str, Any]) -> dict[str, str]:
        commit, dirty = _git_state(self._project)
        tags = {
            "dataset": self._globals.get("dataset"),
            "env": run_params.get("env"),
            "version": run_params.get("run_id"),
            "git_commit": commit,
            "git_dirty": dirty,
            "mlflow.source.git.commit": commit,
            "mlflow.source.name": self._project.name,
            **_process_tags(self._project, os.getpid()),
        }
        return {key: str(value) for key, value in tags.items() if value is not None}

    def _log_params(self, run_id: str, node: Node, inputs: Mapping[str, Any]) -> None:
        """The same keys for every method: the namespace is left out."""
        found: dict[str, str] = {}
        for name, value in inputs.items():
            if name.startswith("params:"):
                key = name.removeprefix("params:")
                if node.namespace:
                    key = key.removeprefix(f"{node.namespace}.")
                found.update(flat_params(key, value))
            elif name == "parameters":
                found.update(flat_params("", value))
        with self._lock:
            known = self._logged.setdefault(run_id, {})
            # A run takes one value per key: a second one is told apart by its node.
            new = {
                key if known.get(key, value) == value else f"{node.name}.{key}": value
                for key, value in found.items()
            }
            fresh = {key: value for key, value in new.items() if key not in known}
            known.update(fresh)
        if fresh and self._writer is not None:
            self._writer.params(run_id, fresh)

    def _end_node(self, node: Node, *, failed: bool) -> None:
        with self._guard("send the last points"):
            tracking.listen(None)
            if self._writer is None:
                return
            namespace = node.namespace
            if self._nested and namespace is not None and not failed:
                with self._lock:
                    self._open_nodes[namespace] -= 1
            self._writer.flush(NODE_END_SECONDS)

    def _mirror_tags(self, dataset: Any, data: Any) -> None:
        """Items of a flat dict flagged `metadata.mlflow.tags` become tags of all runs."""
        if not _mlflow_options(dataset).get("tags") or not isinstance(data, Mapping):
            return
        tags = {str(key): str(value) for key, value in data.items()}
        self._tags.update(tags)
        for run_id in (self.run_id, *self._children.values()):
            if run_id is not None and self._writer is not None:
                self._writer.tags(run_id, tags)

    def _dataset(self, name: str) -> Any:
        return self._catalog.get(name) if self._catalog is not None else None

    def _close(self, status: str, error: Exception | None = None) -> None:
        self._signals.restore()
        tracking.listen(None)
        writer, self._writer = self._writer, None
        if writer is None or self.run_id is None or os.getpid() != self._process:
            return
        atexit.unregister(self._at_exit)
        with self._guard("close the run"):
            failed = self._failed_node.namespace if self._failed_node is not None else None
            problem = {"error": f"{type(error).__name__}: {error}"} if error is not None else {}
            if error is not None and self._failed_node is not None:
                problem["failed_node"] = self._failed_node.name
            for namespace, run_id in self._children.items():
                complete = status == "FINISHED" or self._open_nodes[namespace] <= 0
                if namespace == failed:
                    writer.tags(run_id, problem)
                    writer.status(run_id, status)
                else:
                    writer.status(run_id, "FINISHED" if complete else "KILLED")
            writer.tags(self.run_id, problem)
            if self._owned:
                writer.status(self.run_id, status)
            writer.close(RUN_END_SECONDS)

    def _at_exit(self) -> None:
        """The process ends without a word from Kedro, through SystemExit for example."""
        self._close("KILLED")

    def _close_dead_runs(self) -> None:
        """Mark runs of this project as killed whose process no longer exists."""
        try:
            own = _process_tags(self._project, os.getpid())
            running = self._client.search_runs(
                [self.mlflow_config.tracking.experiment._experiment.experiment_id],
                f"attributes.status = 'RUNNING' and tags.process_host = '{own['process_host']}'",
            )
            for run in running:
                tags = run.data.tags
                if tags.get("process_project") != own["process_project"]:
                    continue
                if not _is_alive(int(tags["process_id"]), tags.get("process_start")):
                    self._client.set_tag(run.info.run_id, "error", "the process died")
                    self._client.set_terminated(run.info.run_id, "KILLED")
        except Exception as error:
            logger.debug("Dead runs were not closed: %s", error)


# ---- parameters and metrics


def flat_params(key: str, value: Any) -> dict[str, str]:
    """Parameters as MLflow takes them: ``recipe.optimizer.lr`` -> ``0.02``.

    Args:
        key: Prefix of the names; may be empty.
        value: A pydantic model, a mapping or a single value.
    """
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if not isinstance(value, Mapping):
        return {key: str(value)}
    found: dict[str, str] = {}
    for name, item in value.items():
        found.update(flat_params(f"{key}.{name}" if key else str(name), item))
    return found


def numeric_leaves(data: Any, prefix: str = "") -> dict[str, float]:
    """Numbers of a nested dict by dotted name; lists, texts, None and flags are left out."""
    found: dict[str, float] = {}
    if isinstance(data, Mapping):
        for name, item in data.items():
            found.update(numeric_leaves(item, f"{prefix}.{name}" if prefix else str(name)))
    elif isinstance(data, int | float) and not isinstance(data, bool):
        found[prefix] = float(data)
    return found


# ---- datasets


def _mlflow_options(dataset: Any) -> Mapping[str, Any]:
    options = (getattr(dataset, "metadata", None) or {}).get("mlflow")
    return options if isinstance(options, Mapping) else {}


def _saved_path(dataset: Any) -> Path | None:
    """The file this session has saved; None when it is not on a local disk."""
    if getattr(dataset, "_protocol", "file") != "file":
        return None
    path = getattr(dataset, "_filepath", None)
    if path is None:
        return None
    if isinstance(dataset, AbstractVersionedDataset) and dataset._version:
        # Not the load path: --load-versions may have pinned that to another version.
        path = dataset._get_versioned_path(str(dataset.resolve_save_version()))
    return Path(path)


# ---- configuration


def _section(context: KedroContext, name: str) -> Mapping[str, Any]:
    from kedro.config import MissingConfigException

    try:
        section: Mapping[str, Any] = context.config_loader[name]
    except (MissingConfigException, KeyError):
        return {}
    return section


def _check_environment(context: KedroContext) -> None:
    """Refuse a configuration environment that does not exist, and list those that do.

    Raises:
        UserError: There is no such folder.
    """
    source = Path(str(context.config_loader.conf_source))
    if not context.env or not source.is_dir() or (source / context.env).is_dir():
        return
    loader = context.config_loader
    if context.env == getattr(loader, "default_run_env", None):
        return
    hidden = {getattr(loader, "base_env", None)}
    found = sorted(
        path.name
        for path in source.iterdir()
        if path.is_dir() and not path.name.startswith((".", "_")) and path.name not in hidden
    )
    raise UserError(
        f"There is no environment {context.env!r} (of --env or KEDRO_ENV). The environments in "
        f"{source.name}/ are: {', '.join(found) or '(none)'}."
    )


def _anchor_paths(context: KedroContext) -> None:
    """Make the sqlite file and the artifact folder of mlflow.yml relative to the project.

    mlflow takes them relative to wherever the command was started. A server keeps artifacts
    itself, so a local artifact folder is used beside a local database only.
    """
    loader: Any = context.config_loader
    loader.config_patterns.setdefault("mlflow", ["mlflow*", "mlflow*/**", "**/mlflow*"])
    config = json.loads(json.dumps(dict(_section(context, "mlflow")), default=str))
    server = config["server"] = config.get("server") or {}
    uri = server.get("mlflow_tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        uri = "sqlite:///mlflow.db"
    local = uri.startswith("sqlite:///")
    if local:
        path = Path(uri.removeprefix("sqlite:///"))
        if not path.is_absolute():
            path = Path(context.project_path) / path
        path.parent.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{path.as_posix()}"
    server["mlflow_tracking_uri"] = uri
    tracking_section = config["tracking"] = config.get("tracking") or {}
    experiment = tracking_section["experiment"] = tracking_section.get("experiment") or {}
    creation = experiment["create_experiment_kwargs"] = (
        experiment.get("create_experiment_kwargs") or {}
    )
    place = creation.get("artifact_location")
    if local and place is None:
        creation["artifact_location"] = "mlartifacts"
    elif not local and place is not None and "://" not in place:
        creation["artifact_location"] = None
    loader["mlflow"] = config


# ---- facts about this run


def _command(run_params: Mapping[str, Any], names: list[str]) -> str:
    """The `kedro run` command that repeats the run."""
    words = ["kedro", "run"]
    if names != ["__default__"]:
        words.append(f"--pipelines={','.join(names)}")
    if run_params.get("env"):
        words.append(f"--env={run_params['env']}")
    for option in (
        "namespaces",
        "tags",
        "node_names",
        "from_nodes",
        "to_nodes",
        "from_inputs",
        "to_outputs",
    ):
        if run_params.get(option):
            word = option.removesuffix("_names").replace("_", "-")
            word = "nodes" if option == "node_names" else word
            words.append(f"--{word}={','.join(run_params[option])}")
    versions = run_params.get("load_versions") or {}
    if versions:
        words.append(f"--load-versions={','.join(f'{k}:{v}' for k, v in versions.items())}")
    params = flat_params("", run_params.get("runtime_params") or {})
    if params:
        words.append(f"--params={','.join(f'{k}={v}' for k, v in params.items())}")
    if run_params.get("only_missing_outputs"):
        words.append("--only-missing-outputs")
    return shlex.join(words)


def _git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Commit of the working tree and whether tracked files differ from it; None without git."""

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folder, check=True, timeout=5, capture_output=True, text=True
        ).stdout.strip()

    try:
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _process_tags(project: Path, process: int) -> dict[str, str]:
    return {
        "process_host": socket.gethostname(),
        "process_project": project.as_posix(),
        "process_id": str(process),
        "process_start": _start_of(process) or "",
    }


def _start_of(process: int) -> str | None:
    """When a process was started, in ticks since boot; None where /proc does not tell."""
    try:
        # The name in parentheses may hold blanks; what follows it is field 3 on.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_alive(process: int, start: str | None) -> bool:
    """Whether the process still exists and its number was not given to another one."""
    if start and Path("/proc/self/stat").exists():
        return _start_of(process) == start
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# ---- signals


class _Signals:
    """Turns Ctrl-C and SIGTERM into `RunInterrupted` while a pipeline runs.

    Python's own KeyboardInterrupt passes Kedro's error hooks by, and SIGTERM ends the process: the
    MLflow run would stay RUNNING for ever. Training code may put its own handlers in front and
    raise the signal again when its checkpoint is on disk.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._received: str | None = None

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._stop)

    def restore(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def check(self) -> None:
        """Stop now if some library has swallowed the exception."""
        if self._received is not None:
            raise RunInterrupted(self._message())

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        raise RunInterrupted(self._message())

    def _message(self) -> str:
        return (
            f"The run was stopped by {self._received}. Repeat the command to go on from the last "
            "checkpoint."
        )


# ---- error messages


def show_user_errors_as_one_line() -> None:
    """Print errors that a user can cause as their message, everything else as before.

    Kedro's logging installs rich tracebacks as `sys.excepthook`; a page of them hides the one
    sentence that matters. The exception itself is not touched: callers of a session still catch
    it. ``RDD_TRACEBACK=1`` shows the traceback.
    """
    if os.environ.get("RDD_TRACEBACK") or isinstance(sys.excepthook, _ShortErrors):
        return
    sys.excepthook = _ShortErrors(sys.excepthook)


class _ShortErrors:
    def __init__(self, otherwise: Callable[..., Any]) -> None:
        self._otherwise = otherwise

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        message = user_message(error)
        if message is None:
            self._otherwise(kind, error, trace)
        else:
            print(f"Error: {message}", file=sys.stderr)


def user_message(error: BaseException) -> str | None:
    """What to tell the user instead of a traceback; None when the traceback is needed."""
    if isinstance(error, UserError | RunInterrupted):
        return str(error)
    if isinstance(error, ParameterValidationError):
        return str(error)
    if isinstance(error, DatasetError) and isinstance(error.__cause__, UserError):
        return str(error.__cause__)  # Kedro wraps what a dataset's load or save raises
    return None
