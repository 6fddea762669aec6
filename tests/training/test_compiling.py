"""`trainer.compile`: the same training but for rounding."""

import os
import stat

import pytest
import torch
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.training.compiling import compiled
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.training import Training

from .conftest import CPU


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Where compiled networks are kept."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.compiler.reset()
    yield tmp_path / "rdd_pipeline" / "compiled"
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # all but the kernels
        pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_a_compiled_training_is_the_same_but_for_rounding(
    blocks, teacher, make_job, cache, monkeypatch, backend
):
    training = Training(make_job("tse", recipe={"ema": {}}), blocks.images, teacher)
    plain = train(training, CPU)
    made, compile_ = [], torch.compile

    def counted(network, dynamic):
        made.append(network)
        return compile_(network, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", counted)
    result = train(training, CPU.model_copy(update={"compile": True}))
    assert [network.training for network in made] == [True, False]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert any(cache.iterdir()) or backend != "inductor"
    for ours, theirs in zip(result.history, plain.history, strict=True):
        numbers = {k: v for k, v in theirs.items() if isinstance(v, float)}
        assert {k: ours[k] for k in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-3)
    for name, tensor in plain.state.student.items():
        assert_close(result.state.student[name], tensor, rtol=1e-2, atol=1e-3, msg=name)
    for name, tensor in plain.state.ema.items():
        assert_close(result.state.ema[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def test_what_torch_cannot_compile_is_one_line(monkeypatch, cache):
    def broken(images):
        raise torch._dynamo.exc.InternalTorchDynamoError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: broken)
    with pytest.raises(UserError, match=r"\(no C\+\+ compiler\)\. Set trainer.compile=false"):
        compiled(torch.nn.Identity())(torch.zeros(1))
