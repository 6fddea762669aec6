"""Kedro's side of the experiment tracking.

kedro-mlflow's configuration (mlflow.yml) is kept and its logging replaced: one run per Kedro run
with a child per namespace, parameters flattened, datasets with `metadata.mlflow` mirrored,
interrupted runs marked. Runs are addressed by id, because MLflow's active run belongs to a thread.
The plugin's own hook must be off: ``DISABLE_HOOKS_FOR_PLUGINS = ("kedro_mlflow",)``.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol
from kedro.io.core import AbstractVersionedDataset
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from pydantic import ValidationError

from rdd_pipeline import tracking
from rdd_pipeline.commands import remember_session
from rdd_pipeline.config import Params
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import remove_leftovers
from rdd_pipeline.hooks.configuration import (
    anchor_paths,
    check_data,
    check_images,
    check_machine,
    check_pipelines,
    check_upstream,
    mlflow_config,
    permit_teacher,
    section,
    session_of,
    tell_methods,
)
from rdd_pipeline.hooks.environments import check_environment
from rdd_pipeline.hooks.facts import (
    command,
    data_of,
    flat_params,
    git_state,
    numeric_leaves,
    settings_of,
)
from rdd_pipeline.hooks.messages import show_user_errors_as_one_line
from rdd_pipeline.hooks.parameters import check_parameters
from rdd_pipeline.hooks.plugins import only_shows_runs
from rdd_pipeline.hooks.run import OpenRun
from rdd_pipeline.hooks.scores import Scoreboard, numbers_of_table
from rdd_pipeline.hooks.sweep import check_sweep
from rdd_pipeline.interruptions import Signals, interruption
from rdd_pipeline.lazy import Lazy, importing, keep_imported
from rdd_pipeline.tracking import (
    Experiment,
    Network,
    Sender,
    TrackingWriter,
    calm_mlflow,
    send_left,
)
from rdd_pipeline.tracking.addresses import (
    hide_secrets_in_logs,
    remember_secrets,
    remember_secrets_in,
    remember_secrets_of_environment,
    without_secrets,
)
from rdd_pipeline.tracking.database import explain, make_database
from rdd_pipeline.tracking.delivery import UNTRACKED
from rdd_pipeline.tracking.records import first_line

if TYPE_CHECKING:
    from kedro_mlflow.config.kedro_mlflow_config import KedroMlflowConfig

# Every `kedro` command makes the hook; those that run nothing do without MLflow.
mlflow = Lazy("mlflow")
MlflowHook = Lazy("kedro_mlflow.framework.hooks.MlflowHook")

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
"""How long MLflow may take to be set up; each of its requests has a limit, too (`calm_mlflow`)."""

RUN_END_SECONDS = 20.0
"""How long the end of a run waits for what is being sent."""


class ExperimentHook:
    """Records Kedro runs in MLflow.

    Nothing that goes wrong with MLflow reaches the run: calls either go through a background
    thread or are guarded, and the user reads one warning. What the user got wrong is found here,
    too, before there is a run to record.

    Args:
        parameters: A field for every parameter that there is; None: names are not checked.
    """

    def __init__(self, parameters: type[Params] | None = None) -> None:
        self._parameters = parameters
        self._project = Path()
        self._env: str | None = None
        self._globals: dict[str, Any] = {}
        self._config: KedroMlflowConfig | None = None
        self._client: Any = None
        self._catalog: CatalogProtocol[Any, Any] | None = None
        self._run: OpenRun | None = None
        self._failed_node: Node | None = None
        self._warned: set[str] = set()
        self._begin()
        self._signals = Signals()
        self._process = os.getpid()

    def _begin(self) -> None:
        """Forget the session before: a process may have several."""
        self._run = self._failed_node = None
        self._warned = set()
        self._read: set[str] = set()
        self._scores = Scoreboard()
        self._known: Any = None

    # ---- start

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Check the names of environment and pipelines and the parameters, and set MLflow up.

        Raises:
            UserError: There is no such environment or pipeline, parameters do not exist or do not
                fit, or mlflow.yml is not valid.
        """
        show_user_errors_as_one_line()
        remember_secrets_of_environment()
        remember_secrets_in(context._runtime_params or {})
        hide_secrets_in_logs()
        check_environment(context)
        check_pipelines(context)
        self._env = context.env or getattr(context.config_loader, "default_run_env", None)
        remember_session(session_of(context), self._env)
        if self._parameters is not None and not only_shows_runs():
            check_parameters(context, self._parameters)
        permit_teacher(context)
        self._project = Path(context.project_path)
        self._globals = dict(section(context, "globals"))
        self._config = self._client = None
        if os.environ.get("RANK", "0") != "0":
            return  # torchrun starts one Kedro per process: the first one tells MLflow
        calm_mlflow()
        given = os.environ.get("MLFLOW_TRACKING_URI")
        uri = given
        try:
            uri = anchor_paths(context)
            remember_secrets(uri)
            self._config = mlflow_config(context)
            remember_secrets_in(self._config.model_dump())
            make_database(uri)
            plugin = MlflowHook()
            setup = partial(plugin.after_context_created, context)
            # An active run is one of this thread.
            with importing():  # MLflow's store of a database
                setup() if mlflow.active_run() is not None else _within(START_SECONDS, setup)
            self._config = plugin.mlflow_config
            self._client = plugin.mlflow_config.server._mlflow_client
        except ValidationError as error:
            raise UserError(f"mlflow.yml is not valid. {without_secrets(str(error))}") from error
        except Exception as error:
            problem = (
                f"MLflow at {without_secrets(str(uri))} cannot be used "
                f"({explain(error, str(uri))})."
            )
            if only_shows_runs():
                raise UserError(problem) from error
            logger.warning(
                "%s %s",
                problem,
                "This run is not tracked; everything else is saved as usual."
                if self._config is None
                else "The run goes on; its curves are kept and sent when MLflow is back.",
            )
        finally:
            # mlflow exports the address; the next session would take it for the user's wish.
            if given is None:
                os.environ.pop("MLFLOW_TRACKING_URI", None)
            else:
                os.environ["MLFLOW_TRACKING_URI"] = given

    @hook_impl
    def after_catalog_created(self, catalog: CatalogProtocol[Any, Any]) -> None:
        """Remember the catalog: it knows which datasets are mirrored."""
        # Not kedro-mlflow's own: it makes every dataset and so imports every library.
        self._catalog = catalog

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline) -> None:
        """Open the MLflow run, and stop for signals in an orderly way.

        Raises:
            UserError: A part of a pipeline was asked for, and what it reads is not there; or the
                device is not there.
        """
        check_data(pipeline, self._catalog)
        check_images(pipeline, self._catalog)
        tell_methods(pipeline, self._catalog, str(run_params.get("runner")))
        check_upstream(pipeline, self._catalog)
        check_machine(pipeline, self._catalog)
        check_sweep(pipeline, self._catalog)
        keep_imported()
        self._process = os.getpid()
        self._begin()
        made = [path for path in (self._project / "data").glob("*") if path.name != "01_raw"]
        remove_leftovers(*made, self._project / UNTRACKED)
        self._signals.install()
        with self._signals.hold():
            self._open(run_params, pipeline)
        self._signals.check()

    def _open(self, run_params: Mapping[str, Any], pipeline: Pipeline) -> None:
        if self._config is None:
            return
        atexit.register(self._at_exit)
        with self._guard("start the run"):
            config = self._config.tracking
            names = sorted(run_params.get("pipeline_names") or ["__default__"])
            if set(names) <= set(config.disable_tracking.pipelines):
                return
            name = without_secrets(config.run.name or "+".join(names))
            version = run_params.get("run_id") or time.strftime("%Y-%m-%dT%H.%M.%S")
            uri = str(self._config.server.mlflow_tracking_uri)
            writer = TrackingWriter(
                Sender(uri, self._client),
                self._project
                / UNTRACKED
                / f"{version}-{re.sub(r'[^-.+A-Za-z0-9_]', '_', name)}.jsonl",
                warned=self._client is None,
            )
            location = config.experiment.create_experiment_kwargs.artifact_location
            self._run = OpenRun(
                writer,
                Experiment(config.experiment.name, location),
                name,
                namespaces=Counter(filter(None, map(_method, pipeline.nodes))),
                tags=self._run_tags(run_params),
                own_tags={"kedro_command": command(run_params, names)},
                nested=any("trials" in node.tags for node in pipeline.nodes),
                given=config.run.id or os.environ.get("MLFLOW_RUN_ID"),
            )
            if self._client is not None:
                left = (self._project / UNTRACKED, uri, self._client)
                threading.Thread(target=send_left, args=left, daemon=True).start()

    # ---- nodes

    @hook_impl
    def before_node_run(self, node: Node, inputs: dict[str, Any]) -> None:
        """Log the node's parameters and send what it logs to its run."""
        self._signals.check()
        with self._guard("log parameters") as run:
            if run is not None:
                run.params(_namespace(node), node.name, _params_of(node, inputs))
                for job in list(inputs.get(f"plan_{node.namespace}", {}).values())[:1]:
                    run.params(node.namespace, node.name, settings_of(job))
                tracking.set_metric_sink(run.sink(_namespace(node)))
                tracking.set_file_sink(run.file_sink(_namespace(node)))
                tracking.set_param_sink(run.param_sink())
                tracking.set_failure_sink(run.failed)

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        """Count the node; its last points are on their way."""
        _set_no_sinks()
        with self._guard("count a node") as run:
            if run is not None:
                run.node_done(_method(node))

    @hook_impl
    def on_node_error(self, node: Node) -> None:
        """Remember which node it was; its last points are sent when the run is closed."""
        self._failed_node = node
        _set_no_sinks()

    @hook_impl
    def after_dataset_loaded(self, dataset_name: str, data: Any, node: Node) -> None:
        """Note which version of a dataset a run has used."""
        with self._guard(f"note the version of {dataset_name}") as run:
            dataset = self._dataset(dataset_name)
            if run is None or dataset is None:
                return
            if isinstance(dataset, AbstractVersionedDataset) and dataset._version:
                version = dataset.resolve_load_version()
                run.writer.tags(run.of(_namespace(node)), {f"input.{dataset_name}": version})
            if _options(dataset).get("tags") and isinstance(data, Mapping):
                run.tags_of_all(data)
            if _options(dataset).get("data") and dataset_name not in self._read:
                self._read.add(dataset_name)
                run.used(data_of(data, str(self._globals.get("dataset"))))

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any, node: Node) -> None:
        """Mirror a saved dataset as its `metadata.mlflow` says.

        `metrics: true` logs the numbers of a nested dict, `metrics: by_seed` the scores of a
        network for each seed, beside it `models: DATASET` registers these networks, which lie in
        that one, and `known: DATASET` has all scores, with which they are compared; `metrics:
        comparison` logs the headline of such a table. `networks: METHOD`: networks whose scores
        may be known. `artifact_path: FOLDER` uploads the file or folder, to the run of `method:
        METHOD` if that is given. `tags: true` tags all runs with the items of a flat dict. What
        has `data: true` is logged when it is loaded: as the data set that runs read.
        """
        with self._guard(f"log {dataset_name}") as run:
            dataset = self._dataset(dataset_name)
            options = _options(dataset)
            if run is None or not options:
                return
            if options.get("metrics") == "by_seed":
                self._scores.scored(run, str(_method(node)), data)
                self._known = self._dataset(str(options.get("known")))
                if options.get("models"):
                    self._log_models(run, node, self._dataset(str(options["models"])), data)
            elif options.get("metrics") == "comparison":
                run.writer.metrics(run.of(_method(node)), numbers_of_table(data))
            elif options.get("metrics"):
                run.writer.metrics(run.of(_method(node)), numeric_leaves(data))
            if options.get("networks"):
                self._scores.trained(str(options["networks"]), data)
            path = _saved_path(dataset) if "artifact_path" in options else None
            if path is not None:
                versioned = isinstance(dataset, AbstractVersionedDataset) and dataset._version
                method = str(options.get("method", _method(node)))
                run.writer.artifact(
                    run.of(method if run.has(method) else _method(node)),
                    path,
                    str(options["artifact_path"]),
                    as_it_is=not versioned,
                )
            if options.get("tags") and isinstance(data, Mapping):
                run.tags_of_all(data)

    # ---- end

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Close the runs as finished.

        Raises:
            RunInterrupted: A signal came meanwhile, or came before and was swallowed.
        """
        self._close("KILLED" if self._signals.received else "FINISHED")
        self._signals.check()

    @hook_impl
    def on_pipeline_error(self, error: Exception) -> None:
        """Close the runs as failed or, when the user stopped them, as killed."""
        stopped = interruption(error)
        killed = stopped is not None or self._signals.received
        self._close("KILLED" if killed else "FAILED", stopped or error)

    def _close(self, status: str, error: Exception | None = None) -> None:
        with self._signals.hold():
            self._close_run(status, error)
            atexit.unregister(self._at_exit)
        self._signals.restore()

    def _close_run(self, status: str, error: Exception | None) -> None:
        _set_no_sinks()
        with self._guard("close the run") as run:
            self._run = None
            if run is None:
                return
            if self._known is not None:
                with self._guard("compare the scores"):
                    self._scores.write(run, self._known.load)
            node = self._failed_node
            problem = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
            if node is not None:
                problem["failed_node"] = node.name
            run.close(
                status,
                problem=problem,
                failed=_method(node) if node is not None else None,
                timeout=RUN_END_SECONDS,
            )

    def _at_exit(self) -> None:
        """The process ends without a word from Kedro, through SystemExit for example."""
        self._close("KILLED")

    # ---- parts

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[OpenRun | None]:
        """Give the open run, or None, and let nothing that goes wrong with it stop the training."""
        try:
            # A forked worker has a copy of this hook, but not the thread that writes.
            yield self._run if os.getpid() == self._process else None
        except Exception as error:
            if interruption(error):
                raise
            if what not in self._warned:
                self._warned.add(what)
                logger.warning(
                    "Tracking could not %s (%s). The run goes on.", what, first_line(error)
                )

    def _log_models(
        self, run: OpenRun, node: Node, networks: Any, scored: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Have the networks of finished students registered under the data set's name."""
        from rdd_pipeline.distillation.methods import find_method

        if not find_method(str(node.namespace)).finishes:
            return  # weights on the way to the next stage
        folder = _saved_path(networks)
        name = str(self._globals.get("dataset"))
        for seed, metrics in scored.items():
            path = None if folder is None else folder / f"{seed}{networks.suffix}"
            if path is None or not path.is_file():
                continue
            about, splits = metrics["about"], metrics["splits"]
            facts = {key: str(about.get(key, "")) for key in ("method", "seed", "network")}
            network = Network(
                str(path),
                score=splits.get("val", {}).get("miou"),
                scored_on=str(about.get("data_digest", "")),
                metrics=numeric_leaves({f"miou_{n}": s["miou"] for n, s in splits.items()}),
                facts=facts,
            )
            run.model(node.namespace, seed if len(scored) > 1 else None, name, network)

    def _run_tags(self, run_params: Mapping[str, Any]) -> dict[str, str]:
        commit, dirty = git_state(self._project)
        tags = {
            "dataset": self._globals.get("dataset"),
            "env": self._env,
            "version": run_params.get("run_id"),
            "git_commit": commit,
            "git_dirty": dirty,
            "mlflow.source.git.commit": commit,
            "mlflow.source.name": self._project.name,
            "mlflow.source.type": "LOCAL",
            "mlflow.user": _user(),
        }
        return {key: str(value) for key, value in tags.items() if value is not None}

    def _dataset(self, name: str) -> Any:
        return self._catalog.get(name) if self._catalog is not None else None


def _set_no_sinks() -> None:
    tracking.set_metric_sink(None)
    tracking.set_file_sink(None)
    tracking.set_param_sink(None)
    tracking.set_failure_sink(None)


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Do some work in a thread, and leave it alone when it takes too long.

    Raises:
        TimeoutError: It does.
        Exception: What the work raises.
    """
    problems: list[Exception] = []

    def call() -> None:
        try:
            work()
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    if problems:
        raise problems[0]


def _method(node: Node) -> str | None:
    """Namespace with a run of its own; what all methods share belongs to the run itself."""
    return None if "shared" in node.tags else node.namespace


def _namespace(node: Node) -> str | None:
    """Of the run that a node logs in: what is only checked so far has none of its own yet."""
    return None if "checks" in node.tags else _method(node)


def _params_of(node: Node, inputs: Mapping[str, Any]) -> dict[str, str]:
    """A node's parameters, flat and without its namespace: the same keys for every method."""
    found: dict[str, str] = {}
    for name, value in inputs.items():
        if name.startswith("params:"):
            key = name.removeprefix("params:")
            if node.namespace:
                key = key.removeprefix(f"{node.namespace}.")
            found.update(flat_params(key, value))
        elif name == "parameters":
            found.update(flat_params("", value))
    return found


def _options(dataset: Any) -> Mapping[str, Any]:
    options = (getattr(dataset, "metadata", None) or {}).get("mlflow")
    return options if isinstance(options, Mapping) else {}


def _saved_path(dataset: Any) -> Path | None:
    """The file this session has saved; None when it is not on a local disk."""
    path = getattr(dataset, "_filepath", None)
    if path is None or getattr(dataset, "_protocol", "file") != "file":
        return None
    if isinstance(dataset, AbstractVersionedDataset) and dataset._version:
        # Not the load path: --load-versions may have pinned that to another version.
        path = dataset._get_versioned_path(str(dataset.resolve_save_version()))
    return Path(path)


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # no name for this user id, as in some containers
        return None
