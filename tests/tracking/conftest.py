"""A fake MLflow with a writer, and a real one with a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rdd_pipeline.tracking import TrackingWriter, addresses
from tests.mlflow_store import new_store
from tests.tracking.fakes import FakeClient, new_writer


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def writer(client: FakeClient, tmp_path: Path) -> Iterator[TrackingWriter]:
    writer = new_writer(client, tmp_path)
    yield writer
    client.open.set()
    writer.close(1.0)


@pytest.fixture
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_secrets", set())


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def run(database: str) -> tuple[MlflowClient, str]:
    client = MlflowClient(tracking_uri=database)
    return client, client.create_run("0").info.run_id
