"""Nodes of every method: what cannot be trained is refused before any training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdd_pipeline.config import (
    EvaluationParams,
    MethodsParams,
    NetworkParams,
    RddParams,
    TeacherParams,
)
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.labels import make_lookup
from rdd_pipeline.data.layouts.camvid import CAMVID
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.boundaries import boundary_counts, boundary_iou
from rdd_pipeline.evaluation.confusion import Scores, confusion_matrix
from rdd_pipeline.evaluation.predict import predict_labels
from rdd_pipeline.networks import NetworkCheckpoint, network_from_params
from rdd_pipeline.pipelines import method_nodes
from rdd_pipeline.pipelines.data_ingestion.nodes import (
    pack_images,
)
from rdd_pipeline.pipelines.method_nodes import (
    TrainingRecord,
    check_networks,
    make_evaluate_node,
    make_plan_node,
    make_train_node,
    measure_networks,
    protocol_digest,
    score_network,
)
from rdd_pipeline.training.loop import train
from rdd_pipeline.training.state import TrainState
from tests.pipelines.examples import (
    CPU,
    FOLDER,
    NO_AUXILIARY,
    RECIPE,
    STUDENT,
    TEACHER,
    change,
    checkpoint,
    plan,
)

# ---- check and plan


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Both nodes of the check, with a folder in which they find what they built before."""
    folder = tmp_path_factory.mktemp("work")

    def measure_and_check(images, work_folder=folder, **changes):
        given = {
            "given_teacher": {},
            "teacher": TeacherParams(network=TEACHER),
            "student": STUDENT,
            "teacher_recipe": RECIPE,
            "recipe": RECIPE,
            "rdd": RddParams(tfe_length=1, min_kept=0.1),
            "methods": MethodsParams(),
        } | changes
        settings = {name: given.pop(name) for name in ("rdd", "methods")}
        recipes = {name: given[name] for name in ("teacher_recipe", "recipe")}
        measured = measure_networks(images=images, work_folder=work_folder, **given)
        return check_networks(images, measured, **recipes, **settings)

    return measure_and_check


def test_the_plan_counts_both_networks(check, ingested):
    plan = json.loads(json.dumps(check(ingested)))  # as the catalog keeps it
    for role, params in (("teacher", TEACHER), ("student", STUDENT)):
        network = network_from_params(params, num_classes=11)
        assert NetworkParams.model_validate(plan[role]["network"]) == params
        assert plan[role]["given"] is False
        assert plan[role]["trained_parameters"] == sum(p.numel() for p in network.parameters())
        network.auxiliary = None
        assert plan[role]["parameters"] == sum(p.numel() for p in network.parameters())
        assert plan[role]["stride"] == 16
        assert plan[role]["macs"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": change(STUDENT, name="resnet18")}, "Unknown network 'resnet18'. Choose"),
        ({"student": change(STUDENT, name="fcn_resnet1")}, "resnet1"),
        ({"student": change(STUDENT, pretrained=Path("/gone.pth"))}, "gone.pth"),
        ({"recipe": change(RECIPE, class_weights=True)}, "recipe.class_weights is on, but label"),
        ({"teacher_recipe": change(RECIPE, class_weights=True)}, "teacher_recipe.class_weights"),
        ({"teacher_recipe": change(RECIPE, batch_size=1)}, "batch_size of at least 2"),
        (
            {"student": TEACHER, "recipe": change(RECIPE, batch_size=1)},
            "batch_size of at least 2",
        ),
        ({"rdd": RddParams(tfe_length=3)}, "rdd.tfe_length is 3 iterations, the run has 2"),
        (
            {"teacher": NO_AUXILIARY, "rdd": RddParams(tfe_length=2)},
            "TFE compares the teacher's two",
        ),
        ({"teacher": NO_AUXILIARY, "rdd": RddParams(annealed=True)}, "TFE compares the teacher"),
        ({"methods": MethodsParams(weights={"kdd": {}})}, "no method 'kdd'"),
        ({"methods": MethodsParams(weights={"kd": {"cwd": 1.0}})}, "but its losses are kd"),
        ({"methods": MethodsParams(options={"cwd": {"at": {}}})}, "but its losses are kd, cwd_log"),
        ({"methods": MethodsParams(weights={"tfe": {"kd": 1.0}})}, "say it of 'tse'"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_trained(check, ingested, changes, message):
    for _ in range(2):  # no fault is remembered as none
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            check(ingested, **changes)


def test_networks_are_built_again_only_where_something_about_them_has_changed(
    ingested, check, tmp_path, monkeypatch
):
    built = []

    def build(params, **options):
        built.append(params.name)
        return network_from_params(params, **options)

    monkeypatch.setattr(method_nodes, "network_from_params", build)
    both = [TEACHER.name, STUDENT.name]
    cropped = RECIPE.model_copy(
        update={"augment": RECIPE.augment.model_copy(update={"crop": (64, 64)})}
    )
    given = {"given_teacher": {"imported": checkpoint()}}
    first = check(ingested, tmp_path)
    for change_of, expected in (
        ({}, []),
        ({"rdd": RddParams(tfe_length=2, min_kept=0.1)}, []),
        ({"recipe": cropped}, both),
        ({"recipe": change(RECIPE, batch_size=3)}, both[1:]),
        ({"teacher_recipe": change(RECIPE, batch_size=3)}, both[:1]),
        ({"student": change(STUDENT, dropout=0.2)}, both[1:]),
        ({"images": replace(ingested, image_size=(96, 128))}, both),
        ({}, []),
    ):
        built.clear()
        images = {"images": ingested} | change_of
        found = check(work_folder=tmp_path, **images)
        assert built == expected, change_of
        assert change_of or found == first
    monkeypatch.setattr("rdd_pipeline.training.known.code_digest", lambda: "of another version")
    assert check(ingested, tmp_path) == first
    assert built == both
    taken = check(ingested, tmp_path, **given)
    monkeypatch.setattr(NetworkCheckpoint, "build", None)
    assert check(ingested, tmp_path, **given) == taken


def test_a_teacher_without_auxiliary_head_will_do_where_none_is_compared(check, ingested):
    student = change(STUDENT, auxiliary=False)
    check(ingested, teacher=NO_AUXILIARY, student=student, rdd=RddParams(tfe_length=0))


def test_the_plan_is_a_job_for_every_seed_once_it_is_known_to_fit(ingested):
    methods = MethodsParams(weights={"cwd": {"cwd_logits": 2.0}})
    jobs = plan("cwd", ingested, methods=methods, seed=3, seeds=2)
    assert {seed: (job.method, job.stage, job.seed) for seed, job in jobs.items()} == {
        "3": ("cwd", "whole", 3),
        "4": ("cwd", "whole", 4),
    }
    assert jobs["3"].definition.weights == {"kd": 1.0, "cwd_logits": 2.0, "cwd_feature": 50.0}
    assert jobs["3"].network == STUDENT
    assert plan("teacher", ingested)["0"].network == TEACHER
    assert plan("tfe", ingested)["0"].stage == "tfe"
    assert plan("rdd_or", ingested)["0"].rdd_settings.mode == "or"


@pytest.mark.parametrize("given", [False, True])
def test_a_method_is_checked_against_the_teacher_that_it_will_have(check, ingested, given):
    """A given one brings its own architecture."""
    blind = checkpoint(NO_AUXILIARY.network)
    teacher = {"given_teacher": {"imported": blind}} if given else {"teacher": NO_AUXILIARY}
    without = change(STUDENT, auxiliary=False)
    fits = {**teacher, "student": without, "rdd": RddParams(tfe_length=0)}
    networks = check(ingested, **fits)
    rest = (RECIPE, RddParams(tfe_length=0), MethodsParams(), EvaluationParams(), 0)
    assert make_plan_node("tse_cwd")(ingested, networks, *rest)
    networks["student"] = check(ingested, **{**fits, "student": STUDENT})["student"]
    assert make_plan_node("tse_cwd")(ingested, networks, *rest)  # compared with the main head
    tfe = (RECIPE, RddParams(tfe_length=2), *rest[2:])
    with pytest.raises(UserError, match="TFE compares the teacher's two heads"):
        make_plan_node("tse_cwd")(ingested, networks, *tfe)
    sure = RddParams(tfe_length=2, confidence="entropy")
    assert make_plan_node("tse_cwd")(ingested, networks, RECIPE, sure, *rest[2:])
    assert bool(make_plan_node("teacher")(ingested, networks, *rest)) is not given


def test_a_method_whose_losses_do_not_suit_the_networks_is_refused(ingested):
    # The crop of this recipe is too small for a discriminator.
    with pytest.raises(UserError, match=r"'skd' cannot be trained\. .*at least 8 x 8 positions"):
        plan("skd", ingested)


# ---- train


def test_a_training_node_trains_what_is_planned(images, ingested, tmp_path, monkeypatch):
    trainings = []

    def spy(training, trainer, on_log):
        trainings.append(training)
        return train(training, trainer, on_log=on_log)

    monkeypatch.setattr(method_nodes, "train", spy)
    node = make_train_node("baseline")
    assert node.__name__ == "train_baseline"
    packed = pack_images(ingested, images.parent / "cache", FOLDER)[0]
    weights, history, training = node(
        packed, plan("baseline", packed, seed=5), CPU, tmp_path / "work"
    )
    (spied,) = trainings
    job = spied.job
    assert list(training) == list(weights) == ["5"]
    assert training["5"].notes == []
    assert (job.method, job.seed, job.precision) == ("baseline", 5, "float32")
    assert spied.images.root == images
    assert spied.images.packs == images.parent / "cache"
    assert weights["5"].header.provenance["seed"] == "5"
    assert list(history["iteration"])[-1] == 2
    assert training["5"].cost["images_per_second"] > 0


def test_several_seeds_are_trained_scored_and_handed_on_side_by_side(ingested, teacher, tmp_path):
    """Each of them ends as it does in a run of its own; TSE goes on from its own TFE stage."""

    def run(work: str, **seeds: int):
        settings = {"rdd": RddParams(tfe_length=2, min_kept=0.1, mode="or"), **seeds}
        where = ingested, CPU, tmp_path / work, {"0": teacher}
        images, trainer, folder, teachers = where
        tfe, tse = (plan(method, ingested, **settings) for method in ("tfe", "tse"))
        *_, states = make_train_node("tfe")(images, tfe, trainer, folder, teachers)
        trained = make_train_node("tse")(images, tse, trainer, folder, teachers, states)
        return tse, states, trained

    jobs, states, (weights, history, record) = run("work", seed=4, seeds=2)
    assert {seed: state.iteration for seed, state in states.items()} == {"4": 1, "5": 1}
    assert {s: w.header.provenance["seed"] for s, w in weights.items()} == {"4": "4", "5": "5"}
    assert set(history["seed"]) == {4, 5}

    # The same seed in a folder of its own, nothing to look up.
    *_, (alone, _, _) = run("other", seed=5)
    assert alone["5"].digest() == weights["5"].digest() != weights["4"].digest()

    metrics, _ = make_evaluate_node("tse")(
        ingested,
        weights,
        {**record, "4": TrainingRecord(record["4"].cost, ["a note"])},
        jobs,
        EvaluationParams(),
        CPU,
        tmp_path / "work",
    )
    assert record["4"].notes == []
    about = {seed: result["about"] for seed, result in metrics.items()}
    assert {seed: one["seed"] for seed, one in about.items()} == {"4": "4", "5": "5"}
    assert [one["notes"] for one in about.values()] == [["a note"], []]
    assert {one["title"] for one in about.values()} == {"RDD variant OR"}
    assert about["4"]["protocol_digest"] == about["5"]["protocol_digest"]
    for result in metrics.values():
        assert set(result) == {"about", "cost", "splits"}
        assert result["cost"]["images_per_second"] > 0


def test_more_seeds_than_the_tfe_stage_was_run_with_are_refused(ingested, teacher, tmp_path):
    tse = plan("tse", ingested, rdd=RddParams(tfe_length=2, min_kept=0.1), seed=4)
    with pytest.raises(UserError, match="goes on from the state of stage `tfe`; none was given"):
        make_train_node("tse")(
            ingested, tse, CPU, tmp_path, {"0": teacher}, initial_states={"0": TrainState()}
        )


# ---- evaluate


def _scoring(folder: Path) -> dict[str, object]:
    """How `score_network` scores on `val`, besides network and images."""
    return {
        "evaluation": EvaluationParams(splits=("val",)),
        "trainer": CPU,
        "about": {},
        "work_folder": folder / "work",
    }


def test_scores_of_a_split_are_those_of_its_images_one_by_one(images, ingested, teacher, tmp_path):
    scores = score_network(teacher, ingested, **_scoring(tmp_path))["splits"]["val"]
    network, preprocessing = teacher.build(), teacher.header.preprocessing
    total, edges = 0, 0
    for sample, (name, miou) in zip(ingested.split("val").samples, scores["images"], strict=True):
        image, label = ingested.read(sample)
        (prediction,) = predict_labels(network, preprocessing, image[None], sizes=[label.shape])
        matrix = confusion_matrix(prediction, label, 11)
        total, edges = total + matrix, edges + boundary_counts(prediction, label, 11, 255)
        assert name == sample.name
        assert miou == pytest.approx(Scores.from_matrix(matrix).miou, abs=1e-6)
    assert scores["confusion"] == total.tolist()
    found = boundary_iou(edges).tolist()
    assert [v for v in scores["boundary_iou"].values() if v is not None] == [
        value for value in found if value == value
    ]
    assert sum(pixels for pixels, _, _ in scores["calibration"]) == int(total.sum())
    gaps = (n * abs(ours - right) for n, ours, right in scores["calibration"] if n)
    assert scores["calibration_error"] == pytest.approx(sum(gaps) / int(total.sum()))


def test_scores_are_computed_once_and_looked_up_then(
    images, ingested, teacher, tmp_path, monkeypatch
):
    arguments = _scoring(tmp_path)
    first = score_network(teacher, ingested, **arguments)
    monkeypatch.setattr(method_nodes, "score_splits", None)
    assert score_network(teacher, ingested, **arguments) == first
    others = [
        {"evaluation": EvaluationParams(splits=("val",), flip=True)},
        {"evaluation": EvaluationParams(splits=("val", "test"))},
    ]
    for other in others:
        with pytest.raises(TypeError):  # would be computed
            score_network(teacher, ingested, **{**arguments, **other})
    with pytest.raises(TypeError):
        score_network(teacher, replace(ingested, image_size=(16, 24)), **arguments)


def _confusion(network: NetworkCheckpoint, root: Path, samples, lookup: np.ndarray) -> np.ndarray:
    """Pixels by (label, prediction), counted by numpy."""
    counts = np.zeros((11, 11), int)
    model = network.build().eval()
    for sample in samples:
        image = torch.from_numpy(np.array(Image.open(root / sample.image))).permute(2, 0, 1)[None]
        labels = lookup[np.array(Image.open(root / sample.mask))]
        with torch.no_grad():
            logits = model(network.header.preprocessing.normalize(image)).logits
        logits = torch.nn.functional.interpolate(
            logits, size=labels.shape, mode="bilinear", align_corners=True
        )
        np.add.at(counts, (labels[labels < 11], logits[0].argmax(0).numpy()[labels < 11]), 1)
    return counts


def _lookup(train_ids: dict[int, int], ignored: tuple[int, ...] = (11,)) -> tuple[int, ...]:
    return make_lookup({**{raw: raw for raw in range(11)}, **train_ids}, ignored=ignored)


@pytest.mark.parametrize(
    "change",
    [
        {"lookup": _lookup({0: 3, 3: 0})},
        {"lookup": make_lookup({raw: raw for raw in range(10)}, ignored=(10, 11))},
        {"lookup": make_lookup({raw: min(raw, 10) for raw in range(12)})},
    ],
    ids=["values swapped", "class ignored", "ignored is a class"],
)
def test_masks_that_mean_something_else_are_scored_anew(
    images, ingested, teacher, tmp_path, change
):
    arguments = _scoring(tmp_path)
    before = score_network(teacher, ingested, **arguments)
    labels = CAMVID.model_copy(update=change)
    after = score_network(teacher, replace(ingested, labels=labels), **arguments)
    expected = _confusion(teacher, images, ingested.split("val").samples, np.array(labels.lookup))
    assert np.array_equal(after["splits"]["val"]["confusion"], expected)
    assert not np.array_equal(before["splits"]["val"]["confusion"], expected)
    assert after["about"]["data_digest"] != before["about"]["data_digest"]


def test_scores_are_looked_up_when_only_figures_change(
    images, ingested, teacher, tmp_path, monkeypatch
):
    arguments = _scoring(tmp_path)
    first = score_network(teacher, ingested, **arguments)
    monkeypatch.setattr(method_nodes, "score_splits", None)
    painted = CAMVID.model_copy(update={"colors": CAMVID.colors[::-1], "name": "other"})
    assert score_network(teacher, replace(ingested, labels=painted), **arguments) == first


def test_splits_that_are_not_there_are_left_out_and_one_must_be_there(
    images, ingested, teacher, tmp_path
):
    arguments = {
        "trainer": CPU,
        "about": {},
        "work_folder": tmp_path,
    }
    metrics = score_network(
        teacher, ingested, evaluation=EvaluationParams(splits=("val", "later")), **arguments
    )
    assert set(metrics["splits"]) == {"val"}
    with pytest.raises(UserError, match="None of the splits later has images"):
        score_network(
            teacher, ingested, evaluation=EvaluationParams(splits=("later",)), **arguments
        )


def test_students_are_comparable_when_all_but_the_method_is_equal(ingested):
    def relabeled(**changes) -> dict[str, Images]:
        return {"images": replace(ingested, labels=CAMVID.model_copy(update=changes))}

    def digest(images: Images = ingested, precision: str = "float32", **given) -> str:
        (job,) = plan("baseline", images, **given).values()
        return protocol_digest(change(job, precision=precision), images)

    weighted = relabeled(class_weights=(1.0,) * 11)
    key = digest()
    for irrelevant in (
        {"evaluation": EvaluationParams(batch_size=1, figure_images=0)},
        relabeled(name="other", colors=CAMVID.colors[::-1]),
        weighted,  # the recipe does not use them
        {"methods": MethodsParams(weights={"cwd": {"cwd_logits": 2.0}})},
        {"seed": 7},
        {"rdd": RddParams(mode="or")},
    ):
        assert digest(**irrelevant) == key
    for changed in (
        {"images": replace(ingested, samples=ingested.samples[1:])},
        relabeled(lookup=_lookup({}, ignored=(11, 12))),
        relabeled(names=CAMVID.names[::-1]),
        {"images": replace(ingested, image_size=(16, 16))},
        {"student": TEACHER},
        {"recipe": change(RECIPE, iterations=3)},
        {"methods": MethodsParams(kd=5.0)},
        {"methods": MethodsParams(preset="reference_code")},
        {"evaluation": EvaluationParams(flip=True)},
        {"evaluation": EvaluationParams(scales=(0.5, 1.0))},
        {"precision": "bfloat16"},
    ):
        assert digest(**changed) != key, changed
    with_weights = {"recipe": change(RECIPE, class_weights=True)}
    others = relabeled(class_weights=(2.0,) * 11)
    assert digest(**with_weights, **weighted) not in (digest(**with_weights, **others), key)
