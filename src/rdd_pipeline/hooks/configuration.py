"""Checks and corrections of the configuration before MLflow is set up."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, TypeVar

from kedro.config import MissingConfigException
from kedro.framework.context import KedroContext
from kedro.framework.project import pipelines
from kedro.io import CatalogProtocol, MemoryDataset
from kedro.io.core import AbstractVersionedDataset
from kedro.pipeline import Pipeline
from kedro.utils import find_kedro_project

from rdd_pipeline.commands import Session
from rdd_pipeline.config import (
    DataParams,
    MethodsParams,
    NetworkParams,
    RecipeParams,
    TeacherParams,
    TrainerParams,
)
from rdd_pipeline.distillation.methods import check_changes
from rdd_pipeline.errors import UserError
from rdd_pipeline.lazy import Lazy
from rdd_pipeline.tracking.addresses import without_secrets
from rdd_pipeline.tracking.records import database_path

if TYPE_CHECKING:
    from kedro_mlflow.config.kedro_mlflow_config import KedroMlflowConfig
else:  # it imports MLflow
    KedroMlflowConfig = Lazy("kedro_mlflow.config.kedro_mlflow_config.KedroMlflowConfig")

_Kind = TypeVar("_Kind")


def section(context: KedroContext, name: str) -> Mapping[str, Any]:
    """A section of the configuration, interpolated; empty when there is no file for it."""
    try:
        content: Mapping[str, Any] = context.config_loader[name]
    except (MissingConfigException, KeyError):
        return {}
    return content


def session_of(context: KedroContext) -> Session:
    """What the session was started with, for the commands that it shows."""
    source = Path(str(context.config_loader.conf_source)).absolute()
    own = Path(context.project_path, "conf").absolute()
    return Session(
        env=context.env,
        params=_shown(context._runtime_params or {}),
        conf_source=None if source == own else str(source),
    )


def _shown(value: Any) -> Any:
    """Parameters as they may stand in reports and in commands to paste."""
    if isinstance(value, Mapping):
        return {name: _shown(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value


def permit_teacher(context: KedroContext) -> None:
    """Let `teacher.module`, which the user has named, be run: weights files cannot name one."""
    teacher = section(context, "parameters").get("teacher")
    if isinstance(teacher, Mapping) and teacher.get("module"):
        from rdd_pipeline.networks.foreign import permit  # torch, which others do without

        permit(str(teacher["module"]), dict(teacher.get("arguments") or {}))


def anchor_paths(context: KedroContext) -> str:
    """Make the sqlite file and the artifact folder of mlflow.yml relative to the project.

    mlflow takes them relative to wherever the command was started. A server keeps artifacts
    itself, so a local artifact folder is used beside a local database only. The environment
    variable MLFLOW_TRACKING_URI wins over the file.

    Returns:
        The tracking URI.
    """
    loader: Any = context.config_loader
    loader.config_patterns.setdefault("mlflow", ["mlflow*", "mlflow*/**", "**/mlflow*"])
    config = json.loads(json.dumps(dict(section(context, "mlflow")), default=str))
    server = config["server"] = config.get("server") or {}
    uri = (
        os.environ.get("MLFLOW_TRACKING_URI")
        or server.get("mlflow_tracking_uri")
        or "sqlite:///mlflow.db"
    )
    database = database_path(uri)
    if database is not None:
        path = Path(context.project_path, database)
        path.parent.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{path.as_posix()}"
    server["mlflow_tracking_uri"] = uri
    tracking_section = config["tracking"] = config.get("tracking") or {}
    experiment = tracking_section["experiment"] = tracking_section.get("experiment") or {}
    creation = experiment["create_experiment_kwargs"] = (
        experiment.get("create_experiment_kwargs") or {}
    )
    place = creation.get("artifact_location")
    if place is None or "://" not in place:
        folder = Path(context.project_path, place or "mlartifacts").absolute()
        creation["artifact_location"] = None if database is None else folder.as_uri()
    loader["mlflow"] = config
    return uri


def mlflow_config(context: KedroContext) -> KedroMlflowConfig:
    """mlflow.yml, checked, without a request to MLflow.

    Raises:
        pydantic.ValidationError: It is not valid.
    """
    content = section(context, "mlflow")
    config = KedroMlflowConfig.model_validate(dict(content))
    if "name" not in config.tracking.experiment.model_fields_set:
        # kedro-mlflow's own default
        name = context._package_name or Path(context.project_path).name
        config.tracking.experiment.name = name
    return config


def check_pipelines(context: KedroContext) -> None:
    """Refuse pipelines that do not exist, before those that do are imported.

    Raises:
        UserError: There is no package of that name below ``pipelines/``.
    """
    asked = getattr(pipelines, "_requested_pipelines", None) or []
    package = context._package_name
    # Asked for below a package that is not there, find_spec raises.
    found = find_spec(f"{package}.pipelines") if asked and find_spec(str(package)) else None
    if found is None:
        return
    known = sorted(
        {name for _, name, package in iter_modules(found.submodule_search_locations) if package}
    )
    for name in asked:
        if name not in (*known, "__default__"):
            meant = get_close_matches(name, known, 1)
            question = f"; did you mean {meant[0]}? " if meant else ". "
            raise UserError(
                f"There is no pipeline {name!r}{question}The pipelines are: {', '.join(known)}."
            )


def check_upstream(pipeline: Pipeline, catalog: CatalogProtocol[Any, Any] | None) -> None:
    """Refuse a part of a pipeline (``--namespaces``, ``--from-nodes``) that lacks what it reads.

    Raises:
        UserError: Files that other nodes would have made are not there.
    """
    if catalog is None:
        return
    missing = sorted(
        name
        for name in pipeline.inputs()
        if not name.startswith("params:")
        and name != "parameters"
        and name in catalog
        and isinstance(dataset := catalog.get(name), AbstractVersionedDataset | MemoryDataset)
        and not dataset.exists()
    )
    if missing:
        wanted = sorted(name for name in pipeline.outputs() if name.startswith("metrics_"))
        complete = f" --to-outputs={','.join(wanted)}" if wanted else ""
        raise UserError(
            f"This part of the pipeline reads {', '.join(missing)}, which nothing has made yet for "
            "this --env. Run the pipeline without --namespaces, --from-nodes or --nodes"
            + (f", for instance with{complete}: it makes" if complete else "; it makes")
            + " what is needed and trains nothing twice."
        )


def check_images(pipeline: Pipeline, catalog: CatalogProtocol[Any, Any] | None) -> None:
    """Tell the entries with images which this session is about, and look whether they are there.

    `ingested_images` may go without them.

    Raises:
        UserError: The pipeline begins after ingestion, and these images have not been ingested.
    """
    for name in {"images", "ingested_images"} & pipeline.datasets():
        if catalog is None or name not in catalog:
            continue
        images: Any = catalog.get(name)
        images.expect(DataParams.model_validate(catalog.load("params:data")))
        if name == "images" and name in pipeline.inputs():
            images.find()


def check_data(pipeline: Pipeline, catalog: CatalogProtocol[Any, Any] | None) -> None:
    """Refuse a layout that there is not, and a folder of images that there is not, before a run.

    Raises:
        UserError: `data` names such a thing, where the images are to be ingested.
        DataProblem: The folder or the table of labels in it is missing.
    """
    if catalog is None or not {"inspection", "raw_images"} <= pipeline.datasets():
        return
    from rdd_pipeline.data.layouts import check_source

    data = DataParams.model_validate(catalog.load("params:data"))
    if data.path is None:
        root = catalog.load("raw_images")
    else:  # as `pipelines.paths.images_root` takes it
        root = (find_kedro_project(Path.cwd()) or Path.cwd()) / data.path.expanduser()
    check_source(root, data)


def tell_methods(
    pipeline: Pipeline, catalog: CatalogProtocol[Any, Any] | None, runner: str
) -> None:
    """Put the methods that this run trains into the entry `run_methods`, for `share_teacher`.

    Args:
        pipeline: The nodes that will run.
        catalog: Gets the entry.
        runner: Class or description of Kedro's runner.

    Raises:
        UserError: Students shall share a teacher, which one node trains, and nodes run at once.
    """
    if catalog is None or "run_methods" not in pipeline.inputs():
        return
    trainer = catalog.load("params:trainer")
    for kind in ("ThreadRunner", "ParallelRunner"):
        if trainer.share_teacher and kind in runner:
            raise UserError(
                f"trainer.share_teacher is {trainer.share_teacher}, but {kind} runs nodes at once: "
                "each of them would train all students. Leave --runner out, or share_teacher."
            )
    catalog.save("run_methods", [n.namespace for n in pipeline.nodes if "training" in n.tags])


def check_machine(pipeline: Pipeline, catalog: CatalogProtocol[Any, Any] | None) -> None:
    """Refuse what this machine does not have, and networks that there are not, where some compute.

    Raises:
        UserError: There is no such device, network or method, or too little shared memory for the
            loader processes.
    """
    used = pipeline.inputs()
    if catalog is None or "params:trainer" not in used:
        return
    # It imports torch, which a command that computes nothing can do without.
    from rdd_pipeline.training.preparation import check_names, check_trainer

    names = ("trainer", "recipe", "teacher_recipe", "teacher", "student", "methods")
    params = [catalog.load(f"params:{name}") for name in names if f"params:{name}" in used]

    def of_kind(kind: type[_Kind]) -> list[_Kind]:
        return [value for value in params if isinstance(value, kind)]

    for trainer in of_kind(TrainerParams):
        check_trainer(trainer, of_kind(RecipeParams))
    # What a weights file says of its network is looked at with the file.
    teachers = [
        teacher.network
        for teacher in of_kind(TeacherParams)
        if teacher.weights is None and teacher.module is None
    ]
    work = catalog.load("work_folder") if "work_folder" in catalog else None
    check_names([*teachers, *of_kind(NetworkParams)], work)
    for methods in of_kind(MethodsParams):
        check_changes(methods)
