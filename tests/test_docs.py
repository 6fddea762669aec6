"""The documentation site builds, strictly, and opens from disk."""

import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from rdd_pipeline.config import Parameters
from rdd_pipeline.distillation.methods import METHODS
from rdd_pipeline.pipeline_registry import register_pipelines
from tests.kedro_project import bootstrap

pytest.importorskip("mkdocs", reason="extra docs")
pytest.importorskip("mkdocstrings", reason="extra docs")
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.shows


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr  # any warning fails: `strict`
    return folder


def test_nothing_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        loaded = re.findall(
            r"<(?:script|link|img)[^>]*(?:src|href)=\"?([^\" >]+)", page.read_text()
        )
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], page


def names_of(model, prefix=""):
    for name, field in model.model_fields.items():
        types = typing.get_args(field.annotation) or (field.annotation,)
        inner = [kind for kind in types if hasattr(kind, "model_fields")]
        for kind in inner:
            yield from names_of(kind, f"{prefix}{name}.")
        if inner != [field.annotation]:
            yield prefix + name


def test_every_parameter_method_and_pipeline_is_there(site):
    shown = (site / "reference/parameters.html").read_text()
    assert not [name for name in names_of(Parameters) if f"<code>{name}</code>" not in shown]
    shown = (site / "reference/methods.html").read_text()
    assert not [name for name in METHODS if f"<code>{name}</code>" not in shown]
    shown = (site / "reference/pipelines.html").read_text()
    bootstrap()
    pipelines = register_pipelines()
    assert not [name for name in pipelines if name != "__default__" and f">{name}<" not in shown]
    assert "rdd_pipeline.load" in (site / "reference/python.html").read_text()
