"""What an addition touches: each is made in a copy of the package, trained and counted.

CONTRIBUTING.md says the same in words. A place is a file, or a new folder, of the package.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.changes import changed_places

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "rdd_pipeline"
METHOD_PIPELINE = (
    "method_pipeline" if (PACKAGE / "pipelines" / "method_pipeline.py").exists() else "_wiring"
)


class Copy:
    """The package in another folder, to be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "rdd_pipeline"
        shutil.copytree(PACKAGE, self.package)

    def add(self, file: str, text: str) -> None:
        path = self.package / file
        assert not path.exists()
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def insert(self, file: str, after: str, text: str) -> None:
        """Put text behind the one place where `after` stands."""
        path = self.package / file
        before, found, rest = path.read_text().partition(after)
        assert found
        assert after not in rest
        path.write_text(before + found + text + rest)

    def replace(self, file: str, old: str, new: str) -> None:
        text = (self.package / file).read_text()
        assert text.count(old) == 1
        (self.package / file).write_text(text.replace(old, new))

    def touched(self) -> list[str]:
        """Places that are not those of the package: changed files, new files, new folders."""
        return changed_places(PACKAGE, self.package)

    def train(
        self,
        method: str,
        student: str = "fcn_test_resnet",
        pipeline: str = "distill_baselines",
        **rdd: Any,
    ) -> dict[str, Any]:
        """Two steps, see `two_steps`."""
        done = warm.run(
            ["-m", "tests.two_steps", method, student, pipeline, json.dumps(rdd)],
            env=os.environ | {"PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}"},
            cwd=self.folder,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


@pytest.fixture
def copy(tmp_path) -> Copy:
    return Copy(tmp_path)


def test_a_loss_is_one_file_and_one_entry(copy):
    copy.add(
        "losses/mine.py",
        '''"""A loss that somebody adds."""

from torch import Tensor

from rdd_pipeline.losses.maps import mean_square, paired_maps


def mine_loss(student_logits: Tensor, teacher_logits: Tensor, *, power: float = 1.0) -> Tensor:
    """Mean squared difference of the logits."""
    student, teacher = paired_maps(student_logits, teacher_logits, "logits")
    return mean_square(student - teacher) ** power
''',
    )
    copy.insert(
        "distillation/methods.py",
        "METHODS: dict[str, Method] = {\n",
        '    "mine": Method("Mine", (KD, LossSpec("mine", '
        'compare("logits", loss_files.mine.mine_loss), 2.0))),\n',
    )
    assert copy.touched() == ["distillation/methods.py", "losses/mine.py"]
    found = copy.train("tse_mine")
    assert found["losses"] == ["kd", "mine", "task"]
    # It is a method alone and beside RDD, with weights and metrics in the catalog.
    assert {"mine", "tse_mine"} <= set(found["methods"])
    outputs = {name for _, given in found["nodes"].values() for name in given}
    assert {"student_mine", "metrics_mine"} <= outputs


def test_a_backbone_touches_nothing_and_a_head_is_one_entry(copy):
    assert copy.touched() == []
    copy.insert(
        "networks/heads.py",
        "HEADS: dict[str, HeadSpec] = {\n",
        '    "wide": HeadSpec(lambda c, w, *_: (nn.Conv2d(c, 3 * w, 1), 3 * w), False),\n',
    )
    assert copy.touched() == ["networks/heads.py"]
    assert copy.train("kd", "wide_lcnet_035")["losses"] == ["kd", "task"]


def test_a_stage_after_tse_is_at_most_four_places(copy):
    """RDD ends with a stretch of plain cross-entropy, with a job and a pipeline of its own."""
    copy.replace(
        "config.py",
        "    annealed: bool = Field(",
        '    polish: Count = Field(0, description="Iterations of plain CE.")\n'
        "    annealed: bool = Field(",
    )
    copy.replace(
        "distillation/stages.py",
        '    Stage("tse", _tse),\n',
        '    Stage("tse", _tse, end=lambda rdd, iterations: iterations - rdd.polish + 1),\n'
        '    Stage("polish", _cross_entropy),\n',
    )
    copy.replace(
        "distillation/methods.py",
        '    "tse": Method("RDD", (KD,), RDD, trains="tse"),\n',
        '    "tse": Method("RDD, TSE stage", (KD,), RDD, trains="tse"),\n'
        '    "polish": Method("RDD", (KD,), RDD, trains="polish"),\n',
    )
    copy.add(
        "pipelines/distill_polish/__init__.py",
        '''"""RDD with its last stage."""

from rdd_pipeline.pipelines import distill_tse
from rdd_pipeline.pipelines.METHOD_PIPELINE import method_pipeline


def create_pipeline(**kwargs):
    """Everything."""
    return distill_tse.create_pipeline() + method_pipeline("polish")
'''.replace("METHOD_PIPELINE", METHOD_PIPELINE),
    )
    assert copy.touched() == [
        "config.py",
        "distillation/methods.py",
        "distillation/stages.py",
        "pipelines/distill_polish",
    ]
    found = copy.train("polish", pipeline="distill_polish", polish=2, tfe_length=4)
    assert found["spans"] == {"tfe": [1, 3], "tse": [4, 8], "polish": [9, 10]}
    assert found["statistics"] == ["student_aux_ce", "student_ce"]  # no pixel was selected
    assert found["on the way"] == ["tfe", "tse"]
    takes, gives = next(
        node for name, node in found["nodes"].items() if name.endswith("train_polish")
    )
    assert "state_tse" in takes
    assert "student_polish" in gives
    assert found["pipelines"] == {"tfe": "distill_polish", "polish": "distill_polish"}
