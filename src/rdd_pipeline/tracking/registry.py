"""Trained networks in MLflow's model registry."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdd_pipeline.files import file_digest
from rdd_pipeline.tracking.records import Network, Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

BEST = "best"
"""Alias of the version with the best mIoU on val."""
DIGEST, SCORE, SCORED_ON = "digest", "val_miou", "scored_on"
"""Tags of a version: of its file, by which a network is registered once; the others see
`records.Network`."""


def register(client: MlflowClient, run_id: str, record: Record) -> None:
    """Log a network as a model of its run, register it, and move the alias if it is the best.

    A network that is registered already, by an earlier run or a request whose answer was lost, is
    not registered again; the run is linked to it.

    Args:
        client: Connected.
        run_id: MLflow's id of the run that has the network's metrics.
        record: Of kind `model`.

    Raises:
        FileNotFoundError: The network's file was removed.
        Exception: MLflow cannot be reached, or refuses.
    """
    network, name = Network.read(str(record.value)), record.key
    path = Path(network.path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} was removed before MLflow could be told of it")
    digest = file_digest(path)
    versions = client.search_model_versions(f"name = '{name}'")
    version = next((v for v in versions if v.tags.get(DIGEST) == digest), None)
    if version is None:
        _make_sure_of(client, name)
        tags = {**network.facts, DIGEST: digest, SCORED_ON: network.scored_on}
        if network.score is not None:
            tags[SCORE] = repr(network.score)
        model = _logged(client, run_id, network, path, record.timestamp)
        version = client.create_model_version(
            name, model.artifact_location, run_id=run_id, tags=tags, model_id=model.model_id
        )
    _link(client, run_id, version.model_id)
    if network.score is not None and _is_best(client, name, network):
        client.set_registered_model_alias(name, BEST, str(version.version))


def _logged(client: MlflowClient, run_id: str, network: Network, path: Path, time: int) -> Any:
    from mlflow.entities import Metric

    from rdd_pipeline.serving.folder import write_model

    facts = network.facts
    run = client.get_run(run_id)
    # A command may end while this, in a thread, still writes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Path(folder, "model")
        write_model(place, path, facts)
        model = client.create_logged_model(
            run.info.experiment_id,
            name="student" if facts.get("method") != "teacher" else "teacher",
            source_run_id=run_id,
            params=dict(facts),
        )
        client.log_model_artifacts(model.model_id, str(place))
    client.finalize_logged_model(model.model_id, "READY")
    points = [
        Metric(key, float(value), time, 0, model_id=model.model_id)
        for key, value in network.metrics.items()
    ]
    client.log_batch(run_id, metrics=points)
    return model


def _link(client: MlflowClient, run_id: str, model_id: str | None) -> None:
    """Let the page of the run name the model, once, also where another run has logged it."""
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(run_id).outputs
    linked = {model.model_id for model in outputs.model_outputs} if outputs else set()
    if model_id is not None and model_id not in linked:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def _make_sure_of(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise


def _is_best(client: MlflowClient, name: str, network: Network) -> bool:
    """Whether no version that was scored on the same images is better."""
    try:
        best = client.get_model_version_by_alias(name, BEST)
    except Exception as error:
        if getattr(error, "error_code", None) not in (
            "RESOURCE_DOES_NOT_EXIST",
            "INVALID_PARAMETER_VALUE",
        ):
            raise
        return True
    if best.tags.get(SCORED_ON) != network.scored_on:
        return True  # other images: the newer run decides
    return (network.score or 0.0) > float(best.tags.get(SCORE, "-inf"))
