"""Every method trains, stops and goes on: CNN and transformer as student, float32 and bfloat16."""

from __future__ import annotations

import shutil

import pytest
import torch
from _pytest.mark.structures import ParameterSet

from rdd_pipeline.config import AugmentParams, MethodsParams, NetworkParams
from rdd_pipeline.distillation.methods import ABLATIONS, LOSSES, METHODS, RDD_PLUS, RDD_STAGES
from rdd_pipeline.distillation.objective import check_losses
from rdd_pipeline.networks import build_network
from rdd_pipeline.networks.probe import output_shapes
from rdd_pipeline.training import build
from rdd_pipeline.training.build import loss_context
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.schedule import ADVERSARY_LR
from rdd_pipeline.training.store import RunStore
from rdd_pipeline.training.training import Training
from tests.equal import equal

from .conftest import CPU, LABELS, STUDENT, TEACHER

CNN = STUDENT  # stride 16, as the teacher
TRANSFORMER = NetworkParams(name="fcn_test_vit", width=12)  # other stride and width
SMALL_MEMORY = {"pixel_slots": 40, "region_slots": 20, "pixel_contrast": 30, "region_contrast": 9}
OPTIONS = MethodsParams(
    options={
        **{
            f"{prefix}{name}": {module: dict(options)}
            for prefix in ("", "tse_")
            for name, module, options in (
                ("cirkd", "cirkd_memory", SMALL_MEMORY),
                ("cirkdv2", "cirkdv2", {**SMALL_MEMORY, "channel_slots": 30}),
                ("af_dcd", "af_dcd", {"patch": 2}),
            )
        }
    }
)
RECIPE = {"iterations": 4, "validate_every": 2, "augment": {"crop": (128, 128)}}
NAMES = [name for name in METHODS if name != "tfe"]
# With layers, an adversary, queues or drawn masks of their own; and RDD.
STATEFUL = ("fitnet", "skd", "cirkd", "mgd", "tse")


def _job(make_job, method: str, network: NetworkParams, iterations: int = 4, **fields):
    recipe = {**RECIPE, "iterations": iterations}
    return make_job(
        method, network=network, recipe=recipe, rdd={"tfe_length": 2}, methods=OPTIONS, **fields
    )


def _every_training() -> list[ParameterSet]:
    """Each method in bfloat16 with a CNN, some in float32 with a transformer; `slow`: the rest."""
    networks = {"cnn": CNN, "transformer": TRANSFORMER}
    fast = {(name, "cnn", "bfloat16") for name in (*NAMES, "tse_cwd", "tse_cirkd")}
    fast |= {(name, "transformer", "float32") for name in STATEFUL}
    return [
        pytest.param(
            method,
            network,
            precision,
            id=f"{method}-{kind}-{precision}",
            marks=[] if (method, kind, precision) in fast else pytest.mark.slow,
        )
        for method in [*NAMES, *RDD_PLUS]
        for kind, network in networks.items()
        for precision in ("float32", "bfloat16")
    ]


@pytest.mark.parametrize(("method", "network", "precision"), _every_training())
def test_a_stopped_training_goes_on_to_the_same_weights(
    method, network, precision, make_job, blocks, teacher, tmp_path, monkeypatch
):
    """One run, and one from its state in the middle; all losses are logged, all modules learn."""
    job = _job(make_job, method, network, precision=precision)
    fingerprint = Training(job, blocks.images, teacher).fingerprint
    store, copy = (RunStore(tmp_path / name, fingerprint) for name in ("work", "copy"))
    every = CPU.model_copy(update={"log_every": 1})
    before = {}

    class Remembered(build.Objective):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            before.update({name: t.clone() for name, t in self.state_dict().items()})

    def keep_the_state_of_2(iteration, values):
        if iteration == 3:
            shutil.copytree(store.path, copy.path)

    with monkeypatch.context() as patch:
        patch.setattr(build, "Objective", Remembered)
        whole = train(
            Training(job, blocks.images, teacher, None, store), every, on_log=keep_the_state_of_2
        )
    assert copy.latest().iteration == 2
    resumed = train(Training(job, blocks.images, teacher, None, copy), every)

    assert resumed.trained == 2
    for key in ("student", "objective", "optimizer", "adversary_optimizer"):
        assert equal(getattr(whole.state, key), getattr(resumed.state, key)), key
    assert equal(whole.network.tensors, resumed.network.tensors)

    logged = next(row for row in whole.history if "loss" in row)
    assert set(job.definition.weights) <= set(logged)
    for name, tensor in whole.state.objective.items():
        # Attention of SKD's discriminator starts behind a gate of 0, queues move by themselves.
        learns = name.endswith(("weight", "original")) and "query" not in name and "key" not in name
        if learns and "discriminator" not in name:
            assert not torch.equal(tensor, before[name]), name


def test_the_discriminator_has_its_own_optimizer_and_the_student_none_of_its_gradient(
    make_job, blocks, teacher
):
    job = _job(make_job, "skd", CNN)
    result = train(Training(job, blocks.images, teacher), CPU)
    adversary = result.state.adversary_optimizer
    assert adversary["param_groups"][0]["lr"] == ADVERSARY_LR
    assert adversary["param_groups"][0]["betas"] == (0.9, 0.99)
    total = len(result.state.optimizer["state"])
    plain = train(Training(_job(make_job, "kd", CNN), blocks.images, teacher), CPU)
    assert total == len(plain.state.optimizer["state"])
    assert plain.state.adversary_optimizer is None


def test_queues_are_part_of_the_state(make_job, blocks, teacher):
    result = train(Training(_job(make_job, "cirkd", CNN), blocks.images, teacher), CPU)
    names = [name for name in result.state.objective if "queue" in name or "pointer" in name]
    assert len(names) == 4
    pointers = result.state.objective["terms.cirkd_memory.memory.region_pointer"]
    assert pointers.tolist() != [0] * LABELS.num_classes


def test_all_methods_start_from_the_same_student(make_job, blocks, teacher):
    """Lr next to nothing: the student stays what it was at the start, whatever the method."""
    recipe = {**RECIPE, "iterations": 1, "optimizer": {"name": "sgd", "lr": 1e-30}}

    def start(method):
        job = make_job(method, recipe=recipe, methods=OPTIONS, rdd={"tfe_length": 0})
        state = train(Training(job, blocks.images, teacher), CPU).state.student
        return {name: t for name, t in state.items() if name.endswith("weight")}

    first = start("baseline")
    for method in ("kd", "cirkd", "skd", "tse_cwd"):
        assert equal(first, start(method)), method


def test_the_seed_of_ablations_and_of_rdd_plus_decides_like_any_other(make_job):
    assert make_job("rdd_warmup_30").warmup == round(0.3 * 8)
    assert make_job("rdd_or").rdd_settings.mode == "or"
    assert make_job("tse_cwd").rdd_settings == make_job("tse").rdd_settings


def test_an_ablation_that_changes_nothing_shares_its_work(make_job, blocks, teacher):
    """`rdd_xor` is `tse` when the run's mode is xor: it is not trained twice."""

    def fingerprint(method, **fields):
        return Training(make_job(method, **fields), blocks.images, teacher).fingerprint

    assert fingerprint("rdd_xor") == fingerprint("tse")
    assert fingerprint("rdd_or") != fingerprint("tse")
    assert fingerprint("rdd_warmup_10") == fingerprint("tse", rdd={"tfe_length": 0.1})


@pytest.fixture(scope="module")
def shapes():
    """What a CNN and a transformer give for the crop of the next test."""
    names = ("pspnet_test_resnet", "fcn_test_vit")
    networks = [build_network(name, num_classes=3, width=16) for name in names]
    return [output_shapes(network, (160, 160)) for network in networks]


@pytest.mark.parametrize("method", [*NAMES, *RDD_PLUS, *ABLATIONS])
def test_every_method_suits_networks_of_any_kind(method, make_job, shapes):
    """CNN and transformer as teacher and student, checked without computing."""
    augment = AugmentParams(crop=(160, 160))
    job = make_job(method, recipe={"augment": augment}, methods=OPTIONS)
    for teacher in shapes:
        for student in shapes:
            check_losses(job.definition, loss_context(job, LABELS, student, teacher))


def test_a_loss_is_the_same_in_all_methods():
    for method in METHODS.values():
        assert all(spec == LOSSES[spec.name] for spec in method.losses)
    assert set(RDD_STAGES) <= set(METHODS)
    assert TEACHER.name
