"""No password and no query of an address is in anything that a session writes or prints."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from kedro_mlflow.config.kedro_mlflow_config import KedroMlflowConfig

from rdd_pipeline.commands import kedro_command, session_text
from rdd_pipeline.tracking import Sender, addresses
from rdd_pipeline.tracking.__main__ import main as tracking_command
from tests.hooks.project import Project

# Each holds `s3cr3t` somewhere where nobody may see it, and `ho5t` where everybody may.
ADDRESSES = [
    "http://alice:s3cr3t@ho5t:5000",
    "http://alice:s3cr3t@t-pw-s3cr3t@ho5t:5000",
    "http://alice:pw/s3cr3t@ho5t:5000/path",
    "http://alice:pw:s3cr3t@ho5t:5000",
    "http://alice:pw?s3cr3t@ho5t:5000",
    "http://alice:pw#s3cr3t@ho5t:5000",
    "http://alice:pw%20s3cr3t%40@ho5t:5000",
    "http://alice:p'w \"s3cr3t@ho5t:5000",
    "http://s3cr3t@ho5t:5000",
    "http://:s3cr3t@ho5t:5000",
    "http://ho5t:5000/path?token=s3cr3t",
    "http://ho5t:5000?a=b&key=s3cr3t#s3cr3t",
    "http://alice:s3cr3t@[::1]:5000/ho5t",
    "postgresql+psycopg2://alice:s3cr3t/@ho5t:5432/mlflow?password=s3cr3t",
    "databricks://token:s3cr3t@ho5t",
]


def _written(project: Project) -> str:
    files = [path for path in project.path.rglob("*") if path.is_file()]
    return "\n".join(f"{path} {path.read_bytes().decode(errors='replace')}" for path in files)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_secrets", set())


@pytest.mark.parametrize("address", ADDRESSES)
def test_the_address_of_mlflow_is_shown_without_its_secrets(
    project: Project,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def away(*arguments: Any, **named: Any) -> None:
        # As libraries do it: the whole of it, and pieces that they have cut.
        logging.getLogger("urllib3").warning("Retrying %r", address)
        pieces = address.partition("://")[2].split("@")
        raise ConnectionError(f"{address!r} is away: {pieces}, {address.rsplit('@', 1)}")

    project.configure("mlflow", 'tracking: {run: {name: "${runtime_params:run_name}"}}')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setattr(KedroMlflowConfig, "setup", away)
    monkeypatch.setattr(Sender, "_connected", away)
    logging.getLogger().addHandler(caplog.handler)
    try:
        parameters = {"kd": {"train": {"fault": f"no fault at {address}"}}, "run_name": address}
        project.run("kd", params=parameters)
        with pytest.raises(SystemExit):
            tracking_command([str(project.path / "data/07_model_output/untracked")])
        command = kedro_command() + session_text()
    finally:
        logging.getLogger().removeHandler(caplog.handler)
        caplog.handler.filters.clear()
    shown = caplog.text + "".join(capfd.readouterr()) + command
    assert "cannot be used" in shown
    assert "ho5t" in shown
    assert "s3cr3t" not in shown
    written = _written(project)
    assert '"train.fault"' in written
    assert "s3cr3t" not in written


def test_other_logins_are_hidden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "me:pr0xy-s3cr3t@proxy:3128")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "l0gin-s3cr3t")
    addresses.remember_secrets_of_environment()
    addresses.remember_secrets_in({"artifact_location": "ftp://me:ftp-s3cr3t@host", "a": [1, None]})
    text = "ProxyError pr0xy-s3cr3t, l0gin-s3cr3t, ftp-s3cr3t"
    assert addresses.without_secrets(text) == "ProxyError ***, ***, ***"


def test_an_error_of_the_user_is_shown_without_secrets(
    project: Project, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    address = "https://me:s3cr3t@host/images?sig=s3cr3t"
    with pytest.raises(Exception, match="camvid2") as caught:
        project.run("kd", env="camvid2", params={"kd": {"train": {"fault": address}}})
    error = type(caught.value)(f"data.path is {address}: there is no such folder.")
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == (
        "Error: data.path is https://host/images?sig=*** there is no such folder.\n"
    )
