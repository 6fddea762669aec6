"""The script that measures the code: what it counts, and what holds of this checkout."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from benchmarks.structure import LONG, MANY, main, measure, report, table

from rdd_pipeline import config
from rdd_pipeline.config import Params
from tests.kedro_project import ROOT


@pytest.fixture
def checkout(tmp_path):
    files = {
        "config.py": """
            class Params(Base):
                known: ClassVar[int] = 1
                a: int = 1
                b: float
                more: OtherParams
            total: int = 3
            class _Hidden: ...
            """,
        "losses/kd.py": f"""
            def kd(student, teacher, *, temperature):
                {"x = 1; " * 3}
            class Loss:
                def forward(self, a, b): ...
                @staticmethod
                def of(a): ...
                @classmethod
                def make(cls, *rest, **named): ...
            """,
        "training/step.py": "def step(a, b, c, d, e, f, g, h, i):\n" + "    pass\n" * LONG,
        "training/other.py": "x = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / "src" / "rdd_pipeline" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"))
    return tmp_path


def test_lines_functions_parameters_and_fields_are_counted(checkout):
    code = measure(checkout)
    assert code.lines == {
        **{"config.py": 7, "losses/kd.py": 8},
        **{"training/step.py": LONG + 1, "training/other.py": 1},
    }
    functions = {f.name: (f.lines, f.parameters) for f in code.functions}
    assert functions == {
        **{"kd": (2, 3), "forward": (1, 2), "of": (1, 1), "make": (1, 2)},
        **{"step": (LONG + 1, MANY + 1)},
    }
    assert (code.classes, code.fields) == (2, 2)
    values = dict(table(code))
    assert values["of them the heart"] == f"{8 + LONG + 1} ({(8 + LONG + 1) / (16 + LONG + 1):.0%})"
    assert values["the rest"] == "8"


def test_what_is_too_long_or_takes_too_much_is_listed_by_package(checkout):
    lines = report(measure(checkout)).splitlines()
    at = lines.index(f"training: 1 over {LONG} lines, 1 over {MANY} parameters")
    assert lines[at + 1] == f"  training/step.py:1 step: {LONG + 1} lines, {MANY + 1} parameters"
    assert not any(line.startswith("losses") for line in lines)


def test_another_checkout_is_measured_without_any_library(checkout, capsys):
    main(["--root", str(checkout)])
    here = capsys.readouterr().out
    script = [sys.executable, "-S", "-I", str(ROOT / "benchmarks/structure.py")]
    there = subprocess.run([*script, "--root", checkout], capture_output=True, text=True)
    assert there.stdout == here
    with pytest.raises(SystemExit, match="no Python file"):
        main(["--root", str(checkout / "src")])


def test_fields_of_the_script_are_the_parameters():
    models = [m for m in vars(config).values() if isinstance(m, type) and issubclass(m, Params)]
    fields = [field.annotation for model in models for field in model.model_fields.values()]
    assert measure(ROOT).fields == sum(field not in models for field in fields)
