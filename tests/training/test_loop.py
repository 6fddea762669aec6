from __future__ import annotations

import errno
import logging
import math
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from _pytest.mark.structures import ParameterSet
from torch import Tensor, nn
from torch.testing import assert_close

from rdd_pipeline.config import (
    AugmentParams,
    EvaluationParams,
    NetworkParams,
    OptimizerParams,
    TrainerParams,
)
from rdd_pipeline.data.delivery import LoaderFailedError
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.index import of_split
from rdd_pipeline.data.loading import Loader
from rdd_pipeline.errors import NonFiniteLossError, UserError
from rdd_pipeline.evaluation.confusion import Scores
from rdd_pipeline.evaluation.predict import evaluate
from rdd_pipeline.evaluation.scoring import score_splits
from rdd_pipeline.losses.base import FunctionalLoss
from rdd_pipeline.networks import NetworkCheckpoint, Preprocessing, network_from_params
from rdd_pipeline.training import build, loop
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.step import TrainingStep
from rdd_pipeline.training.stopping import TrainingInterruptedError
from rdd_pipeline.training.store import RunStore
from rdd_pipeline.training.training import Training
from tests.equal import equal, same_training

from .conftest import CPU, LABELS, STUDENT, TEACHER

EVERY = CPU.model_copy(update={"log_every": 1})


class Stop(Exception):  # noqa: N818
    """What a test stops a training with: nothing in the loop knows it."""


@pytest.fixture
def run(blocks, teacher):
    """Function that trains a job on the blocks."""

    def call(
        job, *, trainer=CPU, teacher=teacher, store=None, initial_state=None, samples=None, **more
    ):
        images = blocks.images if samples is None else replace(blocks.images, samples=samples)
        training = Training(job, images, teacher, initial_state)
        if store is not None:
            training = training.stored_in(store)
        return train(training, trainer, **more)

    return call


def _stop_at(number: int):
    """An `on_log` that raises at the `number`-th iteration it sees."""
    seen = set()

    def on_log(iteration, values):
        seen.add(iteration)
        if len(seen) == number:
            raise Stop

    return on_log


# ---- one run, in whatever pieces

SGD = OptimizerParams(lr=0.05)
ADAMW = OptimizerParams(name="adamw", lr=0.01, warmup=3)


@pytest.mark.parametrize(
    ("optimizer", "channels_last", "precision"),
    [
        pytest.param(optimizer, *rest, id="-".join(map(str, (optimizer.name, *rest))), marks=marks)
        for optimizer, *rest, marks in (
            (SGD, True, "float32", []),
            (ADAMW, False, "float32", []),
            (ADAMW, True, "bfloat16", []),
            (SGD, False, "float32", pytest.mark.slow),
            (SGD, True, "bfloat16", pytest.mark.slow),
            (ADAMW, True, "float32", pytest.mark.slow),
        )
    ],
)
def test_a_run_stopped_after_every_iteration_ends_like_one_never_stopped(
    run, make_job, tmp_path, optimizer, channels_last, precision
):
    job = make_job(recipe={"optimizer": optimizer, "clip_norm": 0.5}, precision=precision)
    trainer = EVERY.model_copy(update={"channels_last": channels_last})
    whole = run(job, trainer=trainer)
    assert whole.trained == 8

    for _ in range(7):
        with pytest.raises(Stop):
            run(job, trainer=trainer, store=tmp_path, on_log=_stop_at(2))
    pieces = run(job, trainer=trainer, store=tmp_path)
    assert pieces.trained == 1
    assert same_training(pieces, whole)
    assert pieces.state.digest() == whole.state.digest()


@pytest.mark.parametrize("method", ["baseline", "kd", "tfe", "tse"])
def test_every_method_goes_on_where_it_stopped(run, make_job, tmp_path, method):
    """All the others, which train and remember more: tests/training/test_methods.py."""
    job = make_job(method, recipe={"iterations": 4}, rdd={"tfe_length": 3})
    whole = run(job)
    for number in (2, 2):
        with pytest.raises(Stop):
            run(job, trainer=EVERY, store=tmp_path, on_log=_stop_at(number))
    pieces = run(job, store=tmp_path)
    assert pieces.trained == 2
    assert same_training(pieces, whole)


@pytest.mark.parametrize(
    ("warmup", "annealed"), [(5, False), (0, False), (1, False), (8, False), (3, True), (0, True)]
)
def test_tfe_and_then_tse_ends_like_one_run(run, reference, make_job, tmp_path, warmup, annealed):
    rdd = {"tfe_length": warmup, "annealed": annealed}
    whole = reference(make_job(rdd=rdd))
    tfe = run(make_job("tfe", stage="tfe", rdd=rdd), store=tmp_path)
    assert tfe.state.iteration == tfe.trained == max(warmup - 1, 0)
    tse = run(make_job(stage="tse", rdd=rdd), initial_state=tfe.state, store=tmp_path)
    assert tse.trained == 8 - tfe.trained
    assert same_training(tse, whole)
    # The work on disk, loaded again, is a start as good as the state in memory.
    again = run(make_job("tfe", stage="tfe", rdd=rdd), store=tmp_path)
    assert again.trained == 0
    assert (
        run(make_job(stage="tse", rdd=rdd), initial_state=again.state, store=tmp_path).trained == 0
    )


def test_a_stage_is_resumed_too(run, reference, make_job, tmp_path):
    tfe = run(make_job(stage="tfe"))
    whole = reference(make_job())
    with pytest.raises(Stop):
        run(
            make_job(stage="tse"),
            initial_state=tfe.state,
            store=tmp_path,
            trainer=EVERY,
            on_log=_stop_at(3),
        )
    tse = run(make_job(stage="tse"), initial_state=tfe.state, store=tmp_path)
    assert tse.trained == 2
    assert same_training(tse, whole)


def test_with_the_newest_state_damaged_the_run_goes_on_from_the_one_before(
    run, reference, make_job, tmp_path
):
    job = make_job()
    with pytest.raises(Stop):
        run(job, store=tmp_path, trainer=EVERY, on_log=_stop_at(6))
    newest = max(tmp_path.rglob("state-*"))
    newest.write_bytes(newest.read_bytes()[:-100])
    result = run(job, store=tmp_path)
    assert result.trained == 8 - (int(newest.stem.removeprefix("state-")) - 1)
    assert same_training(result, reference(job))


def test_what_is_done_is_loaded_and_not_trained(run, make_job, tmp_path, monkeypatch):
    first = run(make_job(), store=tmp_path)
    monkeypatch.setattr(build, "TrainingStep", None)  # building anything would fail
    second = run(make_job(), store=tmp_path)
    assert second.trained == 0
    assert same_training(second, first)
    assert second.history == first.history
    assert second.fingerprint == first.fingerprint


def test_killed_between_the_last_state_and_the_mark_nothing_is_trained(run, make_job, tmp_path):
    first = run(make_job(), store=tmp_path)
    (mark,) = tmp_path.rglob("done.json")
    mark.unlink()
    second = run(make_job(), store=tmp_path)
    assert second.trained == 0
    assert mark.exists()
    assert same_training(second, first)


def test_other_seeds_are_other_work(run, make_job, tmp_path):
    one, two = (run(make_job(seed=seed), store=tmp_path) for seed in (0, 1))
    assert one.fingerprint != two.fingerprint
    assert two.trained == 8
    assert not same_training(one, two)


def test_nothing_is_written_without_a_work_folder(run, make_job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(make_job())
    assert list(tmp_path.iterdir()) == []


def test_the_callers_random_state_does_not_matter(run, make_job):
    torch.manual_seed(1)
    one = run(make_job("baseline", recipe={"iterations": 2}))
    torch.manual_seed(2)
    assert same_training(one, run(make_job("baseline", recipe={"iterations": 2})))


# ---- what is computed


def test_equals_a_hand_written_training_loop(run, make_job, blocks):
    """SGD, poly schedule, both heads, class weights; no gradient is carried over."""
    network = STUDENT.model_copy(update={"dropout": 0.0})
    optimizer = OptimizerParams(lr=0.05, momentum=0.9, weight_decay=1e-3)
    recipe = {"iterations": 4, "optimizer": optimizer, "class_weights": True, "keep": "last"}
    job = make_job("baseline", network=network, recipe=recipe)
    result = run(job, trainer=EVERY)

    torch.manual_seed(job.seed)
    net = network_from_params(network, num_classes=3).train()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    poly = torch.optim.lr_scheduler.PolynomialLR(sgd, total_iters=4, power=0.9)
    weight = torch.tensor(LABELS.class_weights)
    losses = []
    for batch in _batches(blocks, job):
        out = net(Preprocessing.imagenet().normalize(batch.images))
        loss = sum(
            share
            * F.cross_entropy(
                F.interpolate(logits, (32, 32), mode="bilinear", align_corners=True),
                batch.labels.long(),
                weight,
                ignore_index=255,
            )
            for share, logits in ((1.0, out.logits), (0.4, out.aux_logits))
        )
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        poly.step()
        losses.append(loss.item())

    assert_close([r["loss"] for r in result.history if "loss" in r], losses, rtol=1e-4, atol=1e-5)
    assert_close(result.network.tensors, dict(net.state_dict()), rtol=1e-3, atol=1e-4)


def _batches(blocks, job, **ranks):
    return blocks.images.split("train").training_batches(
        job.recipe.augment,
        seed=job.seed,
        batch_size=job.recipe.batch_size,
        iterations=range(1, job.last_iteration + 1),
        pad_color=Preprocessing.imagenet().mean_rgb(),
        loader=Loader(**ranks),
    )


def _moved(run, make_job, **recipe) -> tuple[Tensor, Tensor]:
    """All parameters before and after the first iteration."""
    job = make_job(
        "baseline",
        recipe={"iterations": 1, "keep": "last", "validate_every": 100, **recipe},
    )
    after = run(job).network.tensors
    torch.manual_seed(job.seed)
    before = network_from_params(job.network, num_classes=3)
    names = [name for name, _ in before.named_parameters()]
    return (
        nn.utils.parameters_to_vector(before.parameters()).detach(),
        torch.cat([after[name].flatten() for name in names]),
    )


@pytest.mark.parametrize("norm", [0.01, 0.1])
def test_a_clipped_step_of_sgd_has_the_length_of_rate_times_norm(run, make_job, norm):
    optimizer = OptimizerParams(lr=0.5, momentum=0.0, weight_decay=0.0)
    before, after = _moved(run, make_job, optimizer=optimizer, clip_norm=norm)
    assert_close((after - before).norm().item(), 0.5 * norm, rtol=1e-3, atol=1e-6)


def test_the_gradient_norm_is_in_the_history_when_it_is_clipped(run, make_job):
    history = run(make_job(recipe={"clip_norm": 0.01})).history
    assert all(row["gradient_norm"] > 0.01 for row in history if "loss" in row)


def test_the_first_step_of_adamw_has_the_length_of_the_rate(run, make_job):
    optimizer = OptimizerParams(name="adamw", lr=0.01, weight_decay=0.0)
    before, after = _moved(run, make_job, optimizer=optimizer)
    steps = (after - before).abs()
    # m / (sqrt(v) + 1e-8) is 1 where the gradient is well above 1e-8.
    assert steps.max() <= 0.0100001
    assert steps.median() == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_runs_and_losses_stay_float32(run, reference, make_job):
    result = run(make_job(precision="bfloat16"))
    assert all(t.dtype != torch.bfloat16 for t in result.network.tensors.values())
    assert not same_training(result, reference(make_job()))


def test_the_teacher_is_not_changed_and_not_in_the_state(run, make_job, teacher):
    before = teacher.digest()
    state = run(make_job()).state
    assert teacher.digest() == before
    assert set(state.student) == set(network_from_params(STUDENT, num_classes=3).state_dict())
    assert state.objective == {}


# ---- history and cost


def test_history_rows_hold_the_schedule_the_stage_and_all_losses(run, make_job):
    history = run(make_job(), trainer=EVERY).history
    rows = [row for row in history if "loss" in row]
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    assert [row["lr"] for row in rows] == pytest.approx(
        [0.05 * (1 - (i - 1) / 8) ** 0.9 for i in range(1, 9)]
    )
    assert [row["tfe_share"] for row in rows] == [1.0] * 4 + [0.0] * 4
    for row in rows:
        assert row["loss"] == pytest.approx(row["task"] + row["kd"], rel=1e-5)
    assert all("teacher_confidence" in row for row in rows[:4])
    assert all("chosen" in row for row in rows[4:])
    validated = [row for row in history if "val.miou" in row]
    assert [row["iteration"] for row in validated] == [4, 8]
    assert all(
        0 <= row["val.miou"] <= 1 and 0 <= row["val.pixel_accuracy"] <= 1 for row in validated
    )


def test_a_row_is_the_mean_since_the_row_before(run, make_job):
    job = make_job("kd", recipe={"iterations": 7})
    single = [r for r in run(job, trainer=EVERY).history if "loss" in r]
    third = CPU.model_copy(update={"log_every": 3})
    rows = [r for r in run(job, trainer=third).history if "loss" in r]
    assert [row["iteration"] for row in rows] == [3, 6, 7]
    for row, group in zip(rows, (single[0:3], single[3:6], single[6:7]), strict=True):
        for name in ("loss", "task", "kd", "student_ce"):
            assert row[name] == pytest.approx(math.fsum(r[name] for r in group) / len(group))


def test_observers_see_the_rows_and_a_speed(run, make_job):
    seen = []
    result = run(make_job(), on_log=lambda iteration, values: seen.append((iteration, values)))
    assert [iteration for iteration, _ in seen] == [row["iteration"] for row in result.history]
    for (_, values), row in zip(seen, result.history, strict=True):
        speed = dict(values).pop("images_per_second", None)
        assert ("loss" in row) == (speed is not None and speed > 0)
        # What is counted class by class stays in the history.
        of_class = {k for k in row if k.rpartition(".")[2] in LABELS.names}
        assert 0 <= values.get("waiting_for_images", 0) <= 1
        about_time = {"images_per_second", "waiting_for_images"}
        assert {k: v for k, v in values.items() if k not in about_time} == {
            k: v for k, v in row.items() if k != "iteration" and k not in of_class
        }


def test_the_cost_counts_all_images_and_seconds_also_of_a_resumed_run(run, make_job, tmp_path):
    with pytest.raises(Stop):  # between two rows of the history
        run(
            make_job(),
            store=tmp_path,
            trainer=CPU.model_copy(update={"log_every": 3}),
            on_log=_stop_at(3),  # iterations 3, 4 (validation) and 6
        )
    kept = RunStore(tmp_path, next(tmp_path.iterdir()).name).latest()
    assert kept.iteration == 5
    assert kept.cost.images == 10
    result = run(make_job(), store=tmp_path)
    cost = result.state.cost
    assert cost.images == 16
    assert cost.seconds > kept.cost.seconds > 0


# ---- validation


@pytest.fixture
def falling_scores(monkeypatch):
    """Validation says: perfect, then everything wrong."""
    matrices = [torch.eye(3, dtype=torch.int64), torch.ones(3, 3, dtype=torch.int64).triu(1)]
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: matrices.pop(0))


def test_the_weights_of_the_best_validation_are_handed_on(
    run, make_job, tmp_path, monkeypatch, falling_scores
):
    states = {}
    save = RunStore.save
    monkeypatch.setattr(
        RunStore,
        "save",
        lambda self, state: (states.update({state.iteration: state}), save(self, state)),
    )
    result = run(make_job(), store=tmp_path)
    assert equal(result.network.tensors, states[4].student)
    assert not equal(result.network.tensors, result.state.student)
    assert result.network.header.provenance["iteration"] == "4"
    assert result.state.best.miou == 1.0


@pytest.mark.usefixtures("falling_scores")
def test_the_last_weights_are_handed_on_when_asked_for(run, make_job):
    result = run(make_job(recipe={"keep": "last"}))
    assert equal(result.network.tensors, result.state.student)
    assert result.network.header.provenance["iteration"] == "8"


@pytest.fixture
def scores(monkeypatch):
    """Lets a test say what the validations give: "right", "wrong" or "none" labeled."""
    matrices = {
        "right": torch.eye(3, dtype=torch.int64),
        "wrong": torch.ones(3, 3, dtype=torch.int64).triu(1),
        "none": torch.zeros(3, 3, dtype=torch.int64),
    }

    def set_them(*kinds: str) -> None:
        given = [matrices[kind] for kind in kinds]
        monkeypatch.setattr(loop, "evaluate", lambda *_, **__: given.pop(0))

    return set_them


@pytest.mark.parametrize(
    ("kinds", "iteration"),
    [
        (("none", "right", "wrong", "none"), "4"),
        (("none", "wrong", "none", "right"), "8"),
        (("wrong", "none", "none", "none"), "2"),
    ],
)
def test_a_validation_without_labels_is_never_the_best(run, make_job, scores, kinds, iteration):
    scores(*kinds)
    result = run(make_job(recipe={"validate_every": 2}))
    assert result.network.header.provenance["iteration"] == iteration


def test_the_last_weights_are_kept_with_a_warning_where_no_validation_has_labels(
    run, make_job, scores, caplog
):
    scores(*["none"] * 4)
    result = run(make_job(recipe={"validate_every": 2}))
    assert equal(result.network.tensors, result.state.student)
    assert result.network.header.provenance["iteration"] == "8"
    assert caplog.text.count("every validation score is NaN") == 1


def test_finished_work_of_before_with_a_nan_for_the_best_hands_on_the_last_weights(
    run, make_job, blocks
):
    job = make_job()
    state = run(job).state
    old = replace(state, best=replace(state.best, miou=math.nan))
    network = Training(job, blocks.images).network(old)
    assert equal(network.tensors, state.student)
    assert network.header.provenance["iteration"] == "8"


def test_the_first_stage_hands_its_last_weights_on(run, make_job):
    result = run(make_job(stage="tfe", rdd={"tfe_length": 7}))
    assert result.state.best.iteration == 4
    assert result.network.header.provenance["iteration"] == "6"
    assert equal(result.network.tensors, result.state.student)


def test_the_validation_score_is_that_of_the_weights_handed_on(reference, make_job, blocks):
    result = reference(make_job())
    matrix = evaluate(
        result.network.build(),
        result.network.header.preprocessing,
        blocks.images.split("val").evaluation_batches(2),
        num_classes=3,
    )
    assert Scores.from_matrix(matrix).miou == result.state.best.miou
    assert max(row.get("val.miou", 0) for row in result.history) == result.state.best.miou


def test_validation_scores_as_the_evaluation_does(run, make_job, blocks, monkeypatch):
    sizes = []
    batches = Images.evaluation_batches

    def spy(*args, **kwargs):
        for batch in batches(*args, **kwargs):
            sizes.append(len(batch.images))
            yield batch

    seen = []
    monkeypatch.setattr(Images, "evaluation_batches", spy)
    monkeypatch.setattr(
        loop,
        "evaluate",
        lambda *args, **kwargs: (seen.append(kwargs), evaluate(*args, **kwargs))[1],
    )
    params = EvaluationParams(
        splits=("val",), batch_size=1, scales=(0.5, 1.5), flip=True, average="logits", window=20
    )
    result = run(make_job("baseline", evaluation=params))
    assert set(sizes) == {1}
    scores = score_splits(result.network, blocks.images, params, device=torch.device("cpu"))
    assert scores["val"]["miou"] == pytest.approx(result.state.best.miou, abs=1e-12)
    expected = {"scales": (0.5, 1.5), "flip": True, "average": "logits", "window": (20, 20)}
    assert all(kwargs.items() >= expected.items() for kwargs in seen)


def test_validation_does_not_change_the_training(run, make_job):
    one, two = (
        run(make_job(recipe={"validate_every": every, "keep": "last"})) for every in (1, 100)
    )
    assert equal(one.network.tensors, two.network.tensors)


def test_without_a_validation_split_the_last_weights_are_used(run, make_job, blocks):
    result = run(make_job(), samples=of_split(blocks.samples, "train"))
    assert result.state.best is None
    assert equal(result.network.tensors, result.state.student)
    assert not any("val.miou" in row for row in result.history)


def test_the_network_that_is_handed_on_can_be_used_elsewhere(reference, make_job, blocks):
    result = reference(make_job())
    again = NetworkCheckpoint.from_bytes(result.network.to_bytes())
    assert again.header.label_names == LABELS.names
    assert again.header.provenance["method"] == "tse"
    assert again.header.provenance["seed"] == "0"
    assert again.header.provenance["fingerprint"] == result.fingerprint
    assert again.build()(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3, 2, 2)


# ---- when something goes wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_anything_is_changed(
    run, reference, make_job, tmp_path, monkeypatch, value
):
    job = make_job(recipe={"clip_norm": 1.0})
    whole = reference(job)
    optimizers = []
    make, kd = build.build_optimizer, FunctionalLoss.forward
    calls = []

    def spoiled(*inputs):
        calls.append(1)
        return kd(*inputs) * (value if len(calls) == 6 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(
            build,
            "build_optimizer",
            lambda *a, **k: optimizers.append(make(*a, **k)) or optimizers[-1],
        )
        patch.setattr(FunctionalLoss, "forward", spoiled)
        with pytest.raises(
            NonFiniteLossError,
            match=rf"tse: non-finite at iteration 6: .*kd = {value}.* The step was not taken. "
            "The last checkpoint is whole. Lower recipe.optimizer.lr",
        ) as info:
            run(job, store=tmp_path)
    assert "task" not in str(info.value)
    state = RunStore(tmp_path, whole.fingerprint).latest()
    assert state.iteration == 5
    # In memory: parameters and momentum are those of iteration 5.
    (optimizer,) = optimizers
    parameters = optimizer.param_groups[0]["params"]
    names = [name for name, _ in network_from_params(STUDENT, num_classes=3).named_parameters()]
    for number, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        assert torch.equal(parameter, state.student[name])
        momentum = state.optimizer["state"][number]["momentum_buffer"]
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum)
    # With the cause removed, it ends as if nothing had happened.
    assert same_training(run(job, store=tmp_path), whole)


class _SpoilsGradients(torch.autograd.Function):
    """A loss that is finite, with gradients that are not."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_that_are_not_finite_stop_before_the_step(
    run, reference, make_job, tmp_path, monkeypatch, clip_norm, parts
):
    whole = reference(make_job())
    job = make_job(recipe={"clip_norm": clip_norm, "gradient_accumulation_steps": parts})
    kd, calls = FunctionalLoss.forward, []

    def spoiled(*inputs):
        calls.append(1)
        return _SpoilsGradients.apply(kd(*inputs)) if len(calls) == 6 else kd(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(FunctionalLoss, "forward", spoiled)
        with pytest.raises(
            NonFiniteLossError,
            match=r"tse: non-finite at iteration 6: (norm of the gradients|gradient_norm) = (nan|"
            "inf). The step was not taken. The last checkpoint is whole.",
        ):
            run(job, store=tmp_path)
    assert RunStore(tmp_path, job_fingerprint(tmp_path)).latest().iteration == 5
    result = run(job, store=tmp_path)
    assert result.trained == 3
    assert same_training(result, whole) == (clip_norm is None and parts == 1)


def job_fingerprint(folder):
    """Name of the only work folder."""
    (work,) = folder.iterdir()
    return work.name


def _spoiled_steps() -> list[ParameterSet]:
    """Every one, of which a third does without `slow`: each value with each other once."""
    moments, whats = {"validated": 4, "between": 6, "last": 8}, ("weight", "statistic", "momentum")
    return [
        pytest.param(
            iteration,
            what,
            saved,
            id=f"{saved}-{what}-{moment}",
            marks=[] if (row + column) % 3 == saved else pytest.mark.slow,
        )
        for row, (moment, iteration) in enumerate(moments.items())
        for column, what in enumerate(whats)
        for saved in (True, False)
    ]


@pytest.mark.parametrize(("iteration", "what", "saved"), _spoiled_steps())
def test_a_step_that_spoils_what_it_leaves_behind_is_caught_and_nothing_of_it_kept(
    run, reference, make_job, tmp_path, monkeypatch, iteration, what, saved
):
    job = make_job("baseline")
    whole = reference(job)
    make = build.build_optimizer

    def spoiling(*args, **options):
        optimizer, steps = make(*args, **options), []
        step = optimizer.step

        def spoil():
            step()
            steps.append(1)
            if len(steps) == iteration:
                with torch.no_grad():
                    tensor = spoiled[what](optimizer)
                    tensor[(-1,) * tensor.dim()] = math.inf

        optimizer.step = spoil
        return optimizer

    components = []
    spoiled = {
        "weight": lambda optimizer: optimizer.param_groups[0]["params"][3],
        "momentum": lambda optimizer: next(iter(optimizer.state.values()))["momentum_buffer"],
        "statistic": lambda optimizer: next(
            buffer for buffer in components[0].step.buffers() if buffer.is_floating_point()
        ),
    }
    scored = []
    real, evaluated = loop.build, loop.evaluate
    trainer = CPU if saved else CPU.model_copy(update={"checkpoint_every": 1e6})
    with monkeypatch.context() as patch:
        patch.setattr(build, "build_optimizer", spoiling)
        patch.setattr(
            loop, "build", lambda *a, **k: components.append(real(*a, **k)) or components[0]
        )
        patch.setattr(loop, "evaluate", lambda *a, **k: scored.append(1) or evaluated(*a, **k))
        with pytest.raises(
            NonFiniteLossError,
            match=rf"baseline: non-finite at iteration {iteration}: norm of the weights, their "
            "statistics and the optimizer's = inf. Nothing of the step was kept. ",
        ) as info:
            run(job, store=tmp_path, trainer=trainer)
    assert len(scored) == (iteration - 1) // 4
    state = RunStore(tmp_path, whole.fingerprint).latest()
    kept = iteration - 1 if saved else 4 * ((iteration - 1) // 4)
    assert (0 if state is None else state.iteration) == kept
    assert ("The last checkpoint is whole." in str(info.value)) == (kept > 0)
    assert not list(tmp_path.rglob("done.json"))
    assert same_training(run(job, store=tmp_path), whole)


@pytest.mark.parametrize("iterations", [1, 8])
def test_nothing_is_saved_when_the_first_step_spoils_the_weights(
    run, make_job, tmp_path, iterations
):
    """Weights of 1e35 are numbers still; their squares are none."""
    optimizer = OptimizerParams(lr=1e38, momentum=0.0)
    job = make_job("baseline", recipe={"optimizer": optimizer, "iterations": iterations})
    with pytest.raises(NonFiniteLossError, match="baseline: non-finite at iteration 1: norm of th"):
        run(job, store=tmp_path, trainer=CPU.model_copy(update={"checkpoint_every": 1e6}))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["job.json"]


@pytest.mark.parametrize("stopped", [True, False], ids=["signal", "dead"])
def test_loader_processes_that_deliver_no_more_cost_no_step(
    run, reference, make_job, tmp_path, monkeypatch, stopped
):
    """A signal while they are waited for, or they died: what was done so far is stored."""
    whole, real = reference(make_job()), loop.Trainer.batches

    def fails(self, first, last, stop):
        yield from (batch for batch in real(self, first, 3, stop))
        if not stopped:
            raise LoaderFailedError("A loader process died (SIGKILL).")
        os.kill(os.getpid(), signal.SIGTERM)

    expected = (
        (TrainingInterruptedError, "tse was asked to stop after iteration 3 of 8. Its state is sav")
        if stopped
        else (UserError, r"^tse: A loader process died \(SIGKILL\). The same command goes on from ")
    )
    rare = CPU.model_copy(update={"checkpoint_every": 1e6})
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "batches", fails)
        with pytest.raises(expected[0], match=expected[1]):
            run(make_job(), store=tmp_path, trainer=rare)
    assert RunStore(tmp_path, whole.fingerprint).latest().iteration == 3
    assert same_training(run(make_job(), store=tmp_path), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_next_call_goes_on(
    run, reference, make_job, tmp_path, number
):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def on_log(iteration, values):
        if iteration == 3:
            os.kill(os.getpid(), number)

    rare = EVERY.model_copy(update={"checkpoint_every": 1e6})
    with pytest.raises(
        TrainingInterruptedError,
        match=r"tse was asked to stop after iteration 3 of 8. Its state is saved; the same command",
    ):
        run(make_job(), store=tmp_path, trainer=rare, on_log=on_log)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    result = run(make_job(), store=tmp_path, trainer=rare)
    assert result.trained == 5
    assert same_training(result, reference(make_job()))


def test_a_signal_during_the_last_iteration_is_not_lost(run, reference, make_job, tmp_path):
    def on_log(iteration, values):
        if iteration == 8 and "loss" in values:  # not at the validation again
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterruptedError, match="after iteration 8 of 8"):
        run(make_job(), store=tmp_path, trainer=EVERY, on_log=on_log)
    result = run(make_job(), store=tmp_path)
    assert result.trained == 0
    assert same_training(result, reference(make_job()))


def test_a_second_signal_acts_as_it_did_before(run, make_job, tmp_path):
    def second(number, frame):
        raise Stop

    before = signal.signal(signal.SIGTERM, second)
    try:

        def on_log(iteration, values):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Stop):
            run(make_job(), store=tmp_path, trainer=EVERY, on_log=on_log)
        assert signal.getsignal(signal.SIGTERM) is second
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_a_work_folder_a_signal_does_not_claim_that_the_state_is_saved(run, make_job):
    with pytest.raises(TrainingInterruptedError) as info:
        run(make_job(), on_log=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert "is saved" not in str(info.value)


# ---- pieces that do not fit


def test_a_teacher_of_other_classes_is_refused(run, make_job):
    two = NetworkCheckpoint.from_network(
        network_from_params(TEACHER, num_classes=2), params=TEACHER, label_names=("a", "b")
    )
    with pytest.raises(UserError, match=r"Teacher has 2 classes, the label set 'blocks' 3. Choose"):
        run(make_job("kd"), teacher=two)


def test_a_missing_teacher_is_reported(run, make_job):
    with pytest.raises(UserError, match="Method 'kd' distills and needs a teacher; none was given"):
        run(make_job("kd"), teacher=None)
    run(make_job("baseline", recipe={"iterations": 1}), teacher=None)


@pytest.mark.parametrize(
    ("name", "auxiliary"), [(TEACHER.name, False), ("deeplabv3_mobilenetv2", None)]
)
@pytest.mark.parametrize(
    "job",
    [
        {"stage": "tfe"},
        {"stage": "whole"},
        {"stage": "whole", "rdd": {"tfe_length": 0, "annealed": True}},
    ],
)
def test_tfe_without_the_teachers_auxiliary_head_is_refused(run, make_job, job, name, auxiliary):
    params = NetworkParams(name=name, width=8, output_stride=16, auxiliary=auxiliary)
    blind = NetworkCheckpoint.from_network(
        network_from_params(params, num_classes=3), params=params, label_names=LABELS.names
    )
    with pytest.raises(UserError, match=r"teacher's two heads, but the teacher has no auxiliary"):
        run(make_job(**job), teacher=blind)


def test_tse_compares_the_auxiliary_head_with_the_main_one_of_a_teacher_without(run, make_job):
    params = TEACHER.model_copy(update={"auxiliary": False})
    blind = NetworkCheckpoint.from_network(
        network_from_params(params, num_classes=3), params=params, label_names=LABELS.names
    )
    short = {"iterations": 1}
    one_head = run(make_job(rdd={"tfe_length": 0}, recipe=short), teacher=blind)
    assert {"hard_teacher", "aux_hard_teacher"} <= set(one_head.history[0])  # the main one twice
    run(make_job(rdd={"tfe_length": 0, "mode": "ohem"}, recipe=short), teacher=blind)
    bare = STUDENT.model_copy(update={"auxiliary": False})
    run(make_job(network=bare, rdd={"tfe_length": 0}, recipe=short), teacher=blind)


def test_tse_without_the_state_of_tfe_is_refused(run, make_job):
    with pytest.raises(UserError, match="Stage `tse` goes on from the state of stage `tfe`; none"):
        run(make_job(stage="tse"))


def test_a_state_of_another_iteration_is_refused(run, make_job):
    initial_state = run(make_job(stage="tfe", rdd={"tfe_length": 3})).state
    with pytest.raises(
        UserError,
        match=r"starts after iteration 4, but the state .* stands at 2. Run distill_tfe",
    ):
        run(make_job(stage="tse"), initial_state=initial_state)


def test_an_index_without_training_images_is_refused(run, make_job, blocks):
    val = of_split(blocks.samples, "val")
    with pytest.raises(UserError, match="no image in split `train`"):
        run(make_job(), samples=val)


def test_a_batch_of_one_that_batch_norm_cannot_train_on_is_refused(run, make_job, tmp_path):
    job = make_job("teacher", network=TEACHER, recipe={"batch_size": 1})
    with pytest.raises(UserError, match="batch_size of at least 2"):
        run(job, store=tmp_path)
    assert not list(tmp_path.rglob("state-*"))


def test_a_device_that_is_not_there_is_refused(run, make_job):
    with pytest.raises(UserError, match=r"trainer.device is 'tpux'; expected auto, cpu, cuda"):
        run(make_job(), trainer=TrainerParams(device="tpux"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"sees 0 CUDA devices. Set trainer.device=auto or cpu"):
            run(make_job(), trainer=TrainerParams(device="cuda"))


def test_a_file_that_changed_size_since_the_index_was_made_is_reported(
    run, make_job, blocks, tmp_path
):
    missing = tuple(
        sample._replace(image="gone.png") if sample.split == "train" else sample
        for sample in blocks.samples
    )
    with pytest.raises(UserError, match=r"gone.png cannot be read"):
        run(make_job(), samples=missing, store=tmp_path)
    assert not list(tmp_path.rglob("state-*"))


# ---- loader processes


@pytest.mark.slow
def test_loader_processes_do_not_change_the_weights(run, make_job):
    one, two = (run(make_job(), trainer=CPU.model_copy(update={"workers": n})) for n in (0, 2))
    assert same_training(one, two)


def test_progress_is_logged_where_there_is_no_terminal(run, make_job, caplog):
    caplog.set_level(logging.INFO, "rdd_pipeline.training")
    run(make_job())
    assert "tse 8/8  loss " in caplog.text
    assert "done" in caplog.text


@pytest.mark.usefixtures("falling_scores")
def test_the_last_line_of_progress_shows_the_last_validation_and_the_best(run, make_job, caplog):
    caplog.set_level(logging.INFO, "rdd_pipeline.training")
    run(make_job())
    (line,) = [record.getMessage() for record in caplog.records if "8/8" in record.getMessage()]
    assert line.endswith("  mIoU 0.0, best 100.0  done")


def test_crops_larger_than_the_images_are_padded(run, make_job):
    augment = AugmentParams(crop=(64, 64), scale_min=0.5, scale_max=0.5)
    result = run(make_job(recipe={"augment": augment, "iterations": 2}, rdd={"tfe_length": 2}))
    assert all(math.isfinite(row["loss"]) for row in result.history if "loss" in row)


def test_out_of_memory_names_what_to_lower_and_keeps_the_checkpoint(
    run, make_job, tmp_path, monkeypatch
):
    forward = TrainingStep.forward

    def greedy(self, images, labels, iteration):
        if iteration == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(self, images, labels, iteration)

    monkeypatch.setattr(TrainingStep, "forward", greedy)
    with pytest.raises(
        UserError,
        match=r"tse: memory of cpu ran out in iteration 3 with recipe.batch_size=2, recipe.augment."
        r"crop=\[32, 32\] and precision float32. Lower .* The last checkpoint is whole.$",
    ):
        run(make_job(), store=tmp_path)
    monkeypatch.setattr(TrainingStep, "forward", forward)
    assert run(make_job(), store=tmp_path).trained == 6


def test_a_full_disk_ends_the_training_with_the_last_checkpoint(
    run, reference, make_job, tmp_path, monkeypatch
):
    save = RunStore.save

    def full(self, state):
        if state.iteration == 3:
            monkeypatch.setattr(os, "fsync", _no_space)
        return save(self, state)

    def _no_space(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    sync = os.fsync
    monkeypatch.setattr(RunStore, "save", full)
    with pytest.raises(
        UserError, match=r"state-000000003.ckpt .* No space left on device. Free some space and"
    ):
        run(make_job(), store=tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(RunStore, "save", save)
    assert same_training(run(make_job(), store=tmp_path), reference(make_job()))


def test_a_flag_from_outside_stops_as_a_signal_does(run, make_job, tmp_path):
    flag = threading.Event()

    def on_log(iteration, values):
        if iteration == 3:
            flag.set()

    with pytest.raises(TrainingInterruptedError, match=r"after iteration 3 of 8. Its state is sav"):
        run(make_job(), store=tmp_path, trainer=EVERY, on_log=on_log, stop=flag)


def test_the_share_of_waiting_for_images_is_told_and_shown(run, make_job, monkeypatch, caplog):
    """A loader that takes nearly all of the time."""
    make, told = Images.training_batches, []

    def slow(*args, **options):
        for batch in make(*args, **options):
            time.sleep(1.0)
            yield batch

    monkeypatch.setattr(Images, "training_batches", slow)
    with caplog.at_level(logging.INFO):
        result = run(
            make_job("baseline", recipe={"iterations": 2, "validate_every": 2}),
            trainer=EVERY,
            on_log=lambda iteration, values: told.append(values.get("waiting_for_images")),
        )
    shares = [share for share in told if share is not None]
    assert len(shares) == 2
    assert all(0.2 < share < 1 for share in shares)
    assert "% waiting)" in caplog.text
    assert "waiting_for_images" not in result.history[0]


def test_scores_that_are_not_finite_are_no_scores(blocks, teacher):
    """Of weights that somebody gives; the best class of NaN would be a class."""
    spoiled = {name: t * math.nan if t.dim() == 4 else t for name, t in teacher.tensors.items()}
    with pytest.raises(UserError, match="scores that are not finite on split train: its weights"):
        score_splits(
            replace(teacher, tensors=spoiled),
            blocks.images,
            EvaluationParams(splits=("train",)),
            device=torch.device("cpu"),
        )
