"""Names of what is imported when it is used."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys

import pytest

from rdd_pipeline.lazy import Lazy, keep_imported


@pytest.fixture
def package(tmp_path, monkeypatch) -> str:
    """A package with a module that says when it is imported."""
    folder = tmp_path / "lazily"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "sums.py").write_text(
        "def add(a: int, b: int = 1) -> int:\n"
        "    return a + b\n\n\n"
        "def make_adder(a):\n"
        "    def adder(b: int) -> int:\n"
        "        return a + b\n\n"
        "    adder.__name__ = f'add_{a}'\n"
        "    return adder\n\n\n"
        "class Sums:\n"
        "    pass\n"
    )
    (folder / "broken.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "lazily"
    for name in [name for name in sys.modules if name.split(".")[0] == "lazily"]:
        del sys.modules[name]


def test_nothing_is_imported_before_the_call(package):
    add = Lazy(package).sums.add
    assert add.__name__ == "add"
    assert "lazily" not in sys.modules
    assert add(2, b=3) == 5
    assert "lazily.sums" in sys.modules


def test_it_has_signature_and_source_of_what_it_names(package):
    add = Lazy("lazily.sums.add")
    assert list(inspect.signature(add).parameters) == ["a", "b"]
    assert inspect.getsource(add.__wrapped__).startswith("def add(")
    assert "lazily.sums" in sys.modules
    # Kedro asks for this one when a node is made.
    assert "args" in inspect.signature(add, follow_wrapped=False).parameters


def test_what_a_factory_makes_has_a_name_before_it_is_made(package):
    adder = Lazy("lazily.sums").make_adder.made_with(5, name="add_5")
    assert adder.__name__ == "add_5"
    assert "lazily" not in sys.modules
    assert adder(2) == 7
    assert adder.__wrapped__ is adder.__wrapped__, "made once"
    assert adder.__wrapped__.__name__ == adder.__name__


def test_a_class_can_be_called_and_two_names_of_one_thing_are_equal(package):
    assert type(Lazy("lazily.sums.Sums")()).__name__ == "Sums"
    assert Lazy("lazily.sums.Sums") == Lazy("lazily").sums.Sums
    assert len({Lazy("lazily.sums.Sums"), Lazy("lazily").sums.Sums}) == 1


def test_what_is_not_there_or_cannot_be_imported_is_named(package):
    with pytest.raises(ModuleNotFoundError, match=r"lazily\.sums\.multiply"):
        Lazy("lazily.sums.multiply")()
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        Lazy("lazily.broken.anything")()


def test_it_has_no_special_methods_of_its_own_making(package):
    assert not hasattr(Lazy("lazily"), "__fspath__")
    assert "lazily" not in sys.modules


@pytest.mark.parametrize("used", [True, False])
def test_the_garbage_collector_rests_during_an_import_alone(tmp_path, monkeypatch, used):
    """And is left as it was, also where the import fails."""
    (tmp_path / f"resting_{used}.py").write_text("import gc\nRESTS = not gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        if not used:
            gc.disable()
        assert Lazy(f"resting_{used}.RESTS").__wrapped__ is True
        with pytest.raises(ImportError):
            Lazy("no_such_module.f").__wrapped__  # noqa: B018
        assert gc.isenabled() is used
    finally:
        gc.enable()


def test_what_was_imported_is_spared_once(monkeypatch):
    times = []
    monkeypatch.setattr(gc, "freeze", lambda: times.append(1))
    keep_imported.cache_clear()
    for _ in range(3):
        keep_imported()
    assert times == [1]


def test_libraries_that_count_what_is_left_find_nothing():
    pytest.importorskip("triton")
    program = "import triton\nfrom rdd_pipeline.lazy import keep_imported\nkeep_imported()\n"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "leaked" not in done.stdout + done.stderr
