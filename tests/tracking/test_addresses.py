"""Passwords and tokens of addresses reach no log and no file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rdd_pipeline.tracking import Experiment, Sender, TrackingWriter
from rdd_pipeline.tracking.addresses import (
    HideSecrets,
    hide_secrets_in_logs,
    remember_secrets,
    without_secrets,
)
from rdd_pipeline.tracking.delivery import send_file
from tests.tracking.fakes import FakeClient


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:secret@host/x", "https://host/x"),
        ("http://alice:s3cr@t-pw@127.0.0.1:9", "http://127.0.0.1:9"),
        ("http://alice:p/w@x@host:5000/a", "http://host:5000/a"),
        ("http://alice:p?w#x y'z@host", "http://host"),
        ("https://t0ken@host", "https://host"),
        ("https://host:5000/path", "https://host:5000/path"),
        ("https://host/page?q=me@x.org", "https://host/page?q=***"),
        ("http://u:p@[::1]:5000", "http://[::1]:5000"),
        ("http://[::1]:5000/x", "http://[::1]:5000/x"),
        ("postgresql+psycopg2://u:a@b:c@db:5432/ml", "postgresql+psycopg2://db:5432/ml"),
        ("postgresql://db/ml?user=u&password=p&sslmode=require",
         "postgresql://db/ml?user=***&password=***&sslmode=require"),
        ("mssql+pyodbc://u:p@dsn/?odbc_connect=UID%3Du", "mssql+pyodbc://dsn/?odbc_connect=***"),
        ("sqlite:////some/fol@der/ml.db", "sqlite:////some/fol@der/ml.db"),
        ("sqlite:///ml.db", "sqlite:///ml.db"),
        ("file:///home/me@x/mlruns", "file:///home/me@x/mlruns"),
        ("databricks://profile", "databricks://profile"),
        ("databricks://token:dapi12@adb.net", "databricks://adb.net"),
        ("databricks", "databricks"),
        ("/some/folder", "/some/folder"),
    ],
)  # fmt: skip
def test_addresses_are_shown_without_secrets(address: str, shown: str) -> None:
    assert without_secrets(address) == shown
    if " " not in address:
        assert without_secrets(f"'{address}' is away") == f"'{shown}' is away"
        assert without_secrets(shown) == shown


@pytest.mark.usefixtures("no_secrets")
def test_secrets_are_hidden_without_their_address_too(caplog: pytest.LogCaptureFixture) -> None:
    remember_secrets("http://alice:s3cr@t-pw%21@host?token=abc123")
    pieces = "Host 't-pw%21@host', auth ('alice', 's3cr@t-pw!'), token abc123"
    for secret in ("t-pw", "s3cr", "abc123"):
        assert secret not in without_secrets(pieces)
    logging.getLogger().addHandler(caplog.handler)
    caplog.handler.addFilter(HideSecrets())
    try:
        hide_secrets_in_logs()
        logging.getLogger("any.library").warning("cannot reach %s", "http://u:other@host/x")
    finally:
        caplog.handler.filters.clear()
    assert "cannot reach http://host/x" in caplog.text
    assert "other" not in caplog.text


@pytest.mark.usefixtures("no_secrets")
def test_unsent_records_hold_no_secret_and_are_sent_with_the_login_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "http://alice:s3cr@t-pw@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    file = tmp_path / "unsent.jsonl"
    away = FakeClient()
    away.problem = ConnectionError(f"{address}/api: t-pw@127.0.0.1 is away")
    writer = TrackingWriter(Sender(address, away), file, every=0.01)  # type: ignore[arg-type]
    run = writer.start("run", Experiment("x"), {"error": f"refused by {address}"})
    writer.params(run, {"uri": address})
    assert writer.close(1.0)
    text = file.read_text()
    assert "t-pw" not in text
    assert "alice" not in text
    used: list[str] = []
    monkeypatch.setattr(
        Sender, "send", lambda self, batch: used.append(self.tracking_uri) or [True] * len(batch)
    )
    assert send_file(file) == 0
    assert set(used) == {address}
