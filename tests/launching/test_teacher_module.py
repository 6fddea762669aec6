"""Another machine cannot have code run here by naming it as the teacher's."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rdd_pipeline.errors import UserError
from rdd_pipeline.launching.join import _Here, _local
from rdd_pipeline.launching.worker import Task
from tests.training.conftest import CPU

REFERENCE = "os:system"


@pytest.mark.parametrize("allowed", [None, "tests.networks.modules:plain"])
def test_code_that_the_first_machine_names_is_not_run_unasked(tmp_path, make_job, blocks, allowed):
    task = Task(
        job=make_job("kd"), trainer=CPU, images=blocks.images, work=None, fingerprint="0" * 16,
        cwd=Path.cwd(), log_level=logging.INFO, teacher_module=REFERENCE,
    )  # fmt: skip
    task.write(tmp_path)
    with pytest.raises(UserError, match=r"code os:system, which first:1 cannot .* --teacher-mod"):
        _local(tmp_path, "first:1", _Here(None, None, allowed))
    assert _local(tmp_path, "first:1", _Here(None, None, REFERENCE)).teacher_module == REFERENCE
