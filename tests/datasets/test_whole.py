"""Tables, figures and texts: whole, with a digest that is checked."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from kedro.io import DatasetError, Version

from rdd_pipeline import drawing
from rdd_pipeline.datasets import (
    WholeCSVDataset,
    WholeFigureDataset,
    WholeJSONDataset,
    WholeTextDataset,
)
from rdd_pipeline.drawing import Drawing
from rdd_pipeline.errors import UserError

FIRST, SECOND = "2026-01-01T00.00.00.000Z", "2026-01-02T00.00.00.000Z"


def _figure():
    return plt.figure()


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        (WholeJSONDataset, "plan.json", lambda: {"width": 128}),
        (WholeCSVDataset, "kd.csv", lambda: pd.DataFrame({"loss": [1.0]})),
        (WholeTextDataset, "summary.md", lambda: "| mIoU |"),
        (WholeFigureDataset, "kd.png", _figure),
    ],
)
def test_a_version_is_its_file_and_a_digest_that_others_can_check(tmp_path, kind, name, content):
    path = tmp_path / "made" / name
    kind(filepath=str(path), version=Version(None, FIRST)).save(content())
    folder = path / FIRST
    assert sorted(p.name for p in folder.iterdir()) == [name, f"{name}.b2"]
    assert sorted(p.name for p in path.parent.rglob("*")) == sorted(
        [name, "latest", FIRST, name, f"{name}.b2"]
    )
    assert (path / "latest" / name).samefile(folder / name)
    check = ["b2sum", "-l", "128", "--quiet", "-c", f"{name}.b2"]
    assert subprocess.run(check, cwd=folder, check=False).returncode == 0


def _plans(tmp_path: Path, load: str | None = None) -> WholeJSONDataset:
    return WholeJSONDataset(filepath=f"{tmp_path}/plan.json", version=Version(load, SECOND))


def test_a_version_that_was_changed_is_refused_and_the_next_one_is_not(tmp_path):
    _plans(tmp_path).save({"width": 128})
    path = tmp_path / "plan.json" / SECOND / "plan.json"
    path.write_text(path.read_text().replace("8", "9"))
    with pytest.raises(DatasetError) as caught:
        _plans(tmp_path).load()
    assert isinstance(caught.value.__cause__, UserError)
    assert "its digest does not fit. Delete the folder" in str(caught.value.__cause__)
    later = "2026-01-03T00.00.00.000Z"
    WholeJSONDataset(filepath=f"{tmp_path}/plan.json", version=Version(None, later)).save({})
    assert _plans(tmp_path, later).load() == {}


def test_a_version_of_before_there_were_digests_loads(tmp_path):
    _plans(tmp_path).save({"width": 128})
    (tmp_path / "plan.json" / SECOND / "plan.json.b2").unlink()
    assert _plans(tmp_path).load() == {"width": 128}


def test_when_saving_fails_nothing_is_left_and_the_next_time_it_works(tmp_path):
    entry = _plans(tmp_path)
    with pytest.raises(DatasetError):
        entry.save({"width": object()})
    assert list(tmp_path.rglob("*")) == []
    entry.save({"width": 1})
    assert entry.load() == {"width": 1}


def test_an_entry_without_versions_is_replaced(tmp_path):
    entry = WholeTextDataset(filepath=f"{tmp_path}/report.html")
    entry.save("one")
    entry.save("two")
    assert entry.load() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# ---- what Kedro-Viz shows


def test_a_page_is_shown_without_its_rules_and_a_summary_as_a_table(tmp_path):
    page = WholeTextDataset(filepath=f"{tmp_path}/report.html")
    page.save(
        "<html><head><style>body {}</style></head><body class='a'>\n<p>so</p>\n\n<style>p {}"
        "</style></body></html>"
    )
    assert page.preview().strip() == "<p>so</p>"
    summary = WholeTextDataset(filepath=f"{tmp_path}/summary.md")
    summary.save("| network | test |\n|---|---|\n| R<DD | 40.1 |\n\nOne seed.\n")
    assert summary.preview() == (
        "<table><tr><td>network</td><td>test</td></tr><tr><td>R&lt;DD</td><td>40.1</td></tr>"
        "</table><p>One seed.</p>"
    )
    # Kedro-Viz decides by the annotation how to show it.
    assert inspect.signature(page.preview).return_annotation == "HTMLPreview"


def test_kedro_viz_finds_no_markdown_in_a_page(tmp_path):
    page = WholeTextDataset(filepath=f"{tmp_path}/report.html")
    page.save('<body><g id="a_1"><use href="#a_1"/></g>fcn_test_resnet **\n</body>')
    shown = page.preview()
    for mark in (r"\*\*", "__", r"\*", "_"):  # its own rules
        assert not re.search(rf"{mark}[^\n\r\u2028\u2029]*?{mark}", shown), mark
    assert '<g id="a-1"><use href="#a-1"/></g>' in shown
    assert re.sub(r"<[^>]*>", "", shown).strip() == "fcn_test_resnet **"


# ---- versions that say the same, and the newest under a path that stays


def _text(tmp_path: Path, version: str, load: str | None = None) -> WholeTextDataset:
    return WholeTextDataset(filepath=f"{tmp_path}/t.md", version=Version(load, version))


def test_what_is_as_it_was_is_no_new_version_and_the_session_says_which_one_holds_it(tmp_path):
    _text(tmp_path, FIRST).save("same")
    again = _text(tmp_path, SECOND)
    again.save("same")
    assert [p.name for p in sorted((tmp_path / "t.md").iterdir())] == [FIRST, "latest"]
    assert again.resolve_save_version() == again.resolve_load_version() == FIRST
    again.save("other")
    assert again.resolve_save_version() == again.resolve_load_version() == SECOND
    assert again.load() == "other"


def test_a_version_that_was_changed_is_not_taken_for_the_same(tmp_path):
    _text(tmp_path, FIRST).save("same")
    (tmp_path / "t.md" / FIRST / "t.md.b2").write_text("0" * 32)
    _text(tmp_path, SECOND).save("same")
    assert _text(tmp_path, "later").load() == "same"


def test_latest_leads_to_the_newest_and_is_no_version_itself(tmp_path):
    _text(tmp_path, SECOND).save("new")
    _text(tmp_path, FIRST).save("old")  # begun before, ended after
    link = tmp_path / "t.md" / "latest"
    assert not Path(os.readlink(link)).is_absolute()
    assert (link / "t.md").read_text() == "new"
    later = _text(tmp_path, "later")
    assert later.list_versions(full_path=False) == [SECOND, FIRST]
    assert later.load() == "new"
    assert _text(tmp_path, "later", load=FIRST).load() == "old"
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}_moved"))
    assert (moved / "t.md" / "latest" / "t.md").read_text() == "new"


@pytest.mark.parametrize("instead", ["no links", "a folder"])
def test_where_latest_cannot_be_everything_else_is_as_usual(tmp_path, instead, monkeypatch, caplog):
    def refuse(*paths: object) -> None:
        raise OSError("no links here")

    if instead == "no links":
        monkeypatch.setattr("os.symlink", refuse)
    else:
        (tmp_path / "t.md" / "latest").mkdir(parents=True)
    _text(tmp_path, FIRST).save("one")
    _text(tmp_path, SECOND).save("two")
    assert _text(tmp_path, "later").load() == "two"
    assert not list((tmp_path / "t.md").glob(".*"))
    assert ("is no link and not the newest version" in caplog.text) is (instead == "a folder")


# ---- figures that are not drawn again


class Drawn:
    """A line, and how often it was drawn."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self):
        self.times += 1
        figure = plt.figure(figsize=(1, 1))
        figure.add_subplot().plot([1, 2, self.times])
        return figure


@pytest.fixture
def line() -> Drawn:
    return Drawn()


def _save_curve(
    folder: Path, version: str, line: Drawn, shows: object = "line", **settings
) -> Path:
    path = folder / "curve.png"
    dataset = WholeFigureDataset(
        filepath=str(path), version=Version(None, version), save_args=settings
    )
    dataset.save(Drawing(line, shows))
    return path / version / "curve.png"


def test_the_same_figure_is_no_new_version_and_not_drawn_again(tmp_path, line):
    first = _save_curve(tmp_path, FIRST, line)
    _save_curve(tmp_path, SECOND, line)
    assert line.times == 1
    assert sorted(p.name for p in first.parents[1].iterdir()) == [FIRST, "latest"]
    assert sorted(p.name for p in first.parent.iterdir()) == ["curve.png", "curve.png.b2"]
    assert plt.imread(first).ndim == 3


@pytest.mark.parametrize(
    "change", ["data", "settings", "code", "damage", "no digest", "no picture"]
)
def test_a_figure_is_drawn_again_when_anything_about_it_has_changed(
    tmp_path, line, change, monkeypatch
):
    first = _save_curve(tmp_path, FIRST, line, shows=[1.0, float("nan")], dpi=50)
    shows, dpi = [1.0, float("nan")], 50
    if change == "data":
        shows = [1.0, 2.0]
    elif change == "settings":
        dpi = 60
    elif change == "code":
        monkeypatch.setattr(drawing, "code_digest", lambda: "another")
    elif change == "damage":
        content = bytearray(first.read_bytes())
        content[-20] ^= 1
        first.write_bytes(content)
    elif change == "no digest":
        first.with_name("curve.png.b2").unlink()
    else:
        first.unlink()
    second = _save_curve(tmp_path, SECOND, line, shows=shows, dpi=dpi)
    assert line.times == 2
    assert plt.imread(second).ndim == 3


def test_a_drawing_without_versions_is_drawn_once_in_another_format_each_time(tmp_path, line):
    for form in ("png", "png", "svg", "svg"):
        path = str(tmp_path / f"curve.{form}")
        WholeFigureDataset(filepath=path, save_args={"format": form}).save(Drawing(line, "line"))
    assert line.times == 3
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    picture = tmp_path / "curve.png"
    picture.write_bytes(picture.read_bytes()[:-30])
    again = WholeFigureDataset(filepath=str(picture), save_args={"format": "png"})
    again.save(Drawing(line, "line"))
    assert line.times == 4
