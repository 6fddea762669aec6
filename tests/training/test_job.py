from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from rdd_pipeline.config import AugmentParams, EvaluationParams, MethodsParams, OptimizerParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.labels import make_lookup
from rdd_pipeline.errors import UserError
from rdd_pipeline.training import job as job_module
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.training import Training

from .conftest import LABELS, STUDENT


def _fingerprint(
    job: TrainingJob, *, index_digest="i", labels=LABELS, image_size=None, root="", **digests
) -> str:
    images = Images(Path(root), (), labels, image_size)
    vars(images)["index_digest"] = index_digest  # in the place of the digest of samples
    return job.fingerprint(images, **{"teacher_digest": "t", "start_digest": None, **digests})


def test_a_job_survives_json_with_its_fingerprint(make_job):
    job = make_job(
        rdd={"tfe_length": 0.5, "min_kept": 100},
        methods=MethodsParams(weights={"tse": {"kd": 2.0}}),
    )
    again = TrainingJob.model_validate_json(job.model_dump_json())
    assert again == job
    assert _fingerprint(again) == _fingerprint(job)


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, 0.1, 5])
def test_counts_stay_counts_and_fractions_fractions_in_json(make_job, value):
    job = make_job(rdd={"tfe_length": value, "min_kept": value})
    again = TrainingJob.model_validate_json(job.model_dump_json())
    assert (type(again.rdd.tfe_length), again.rdd.tfe_length) == (type(value), value)
    assert (type(again.rdd.min_kept), again.rdd.min_kept) == (type(value), value)


DECIDING = {
    "seed": {"seed": 1},
    "network": {"network": STUDENT.model_copy(update={"width": 12})},
    "dropout": {"network": STUDENT.model_copy(update={"dropout": 0.2})},
    "preprocessing": {"network": STUDENT.model_copy(update={"preprocessing": "half"})},
    "precision": {"precision": "bfloat16"},
    "stage": {"stage": "tfe"},
    "method": {"method": "kd"},
    "weight of a term": {"methods": MethodsParams(weights={"tse": {"kd": 0.5}})},
    "option of a term": {"methods": MethodsParams(options={"tse": {"kd": {"temperature": 2.0}}})},
    "iterations": {"recipe": {"iterations": 9}},
    "batch size": {"recipe": {"batch_size": 3}},
    "optimizer": {"recipe": {"optimizer": OptimizerParams(name="adamw", lr=0.05)}},
    "learning rate": {"recipe": {"optimizer": OptimizerParams(lr=0.06)}},
    "crop": {"recipe": {"augment": AugmentParams(crop=(32, 40), scale_min=0.8, scale_max=1.2)}},
    "aux weight": {"recipe": {"aux_weight": 0.5}},
    "use of class weights": {"recipe": {"class_weights": True}},
    "clipping": {"recipe": {"clip_norm": 1.0}},
    "validation": {"recipe": {"validate_every": 3}},
    "kept weights": {"recipe": {"keep": "last"}},
    "scales of validation": {"evaluation": EvaluationParams(scales=(0.5, 1.0))},
    "mirrored validation": {"evaluation": EvaluationParams(flip=True)},
    "average of validation": {"evaluation": EvaluationParams(average="logits")},
    "window of validation": {"evaluation": EvaluationParams(window=64)},
    "overlap of validation": {"evaluation": EvaluationParams(window=64, overlap=0.5)},
    "warm-up": {"rdd": {"tfe_length": 4}},
    "mode": {"rdd": {"mode": "or"}},
    "threshold": {"rdd": {"threshold": 0.6}},
    "min_kept": {"rdd": {"min_kept": 0.2}},
    "min_kept as a count": {"rdd": {"min_kept": 1}},
    "min_kept as a fraction": {"rdd": {"min_kept": 1.0}},
    "reduction": {"rdd": {"reduction": "valid"}},
    "annealing": {"rdd": {"annealed": True}},
}


OF_IMAGES = {
    "labels": {"labels": LABELS.model_copy(update={"names": ("ground", "block", "air")})},
    "ignored values": {
        "labels": LABELS.model_copy(
            update={"lookup": make_lookup({0: 0, 1: 1, 2: 2}, ignored=(3, 255))}
        )
    },
    "class weights": {"labels": LABELS.model_copy(update={"class_weights": (1.0, 1.0, 1.0)})},
    "image size": {"image_size": (24, 32)},
}


def test_the_fingerprint_changes_with_everything_that_decides_the_result(make_job):
    prints = {name: _fingerprint(make_job(**change)) for name, change in DECIDING.items()}
    prints |= {name: _fingerprint(make_job(), **change) for name, change in OF_IMAGES.items()}
    prints["unchanged"] = _fingerprint(make_job())
    prints["data"] = _fingerprint(make_job(), index_digest="other")
    prints["teacher"] = _fingerprint(make_job(), teacher_digest="other")
    prints["start"] = _fingerprint(make_job(), start_digest="other")
    by_print: dict[str, list[str]] = {}
    for name, fingerprint in prints.items():
        by_print.setdefault(fingerprint, []).append(name)
    assert [names for names in by_print.values() if len(names) > 1] == []


def test_colors_of_figures_and_the_name_of_a_label_set_train_nothing_anew(make_job):
    painted = LABELS.model_copy(update={"name": "other", "colors": LABELS.colors[::-1]})
    assert _fingerprint(make_job(), labels=painted) == _fingerprint(make_job())


def test_evaluation_counts_where_it_picks_the_weights(make_job):
    size = EvaluationParams(batch_size=1, splits=("val",), figure_images=0, overlap=0.5)
    assert _fingerprint(make_job(evaluation=size)) == _fingerprint(make_job())
    flipped = {"evaluation": EvaluationParams(flip=True), "recipe": {"keep": "last"}}
    assert _fingerprint(make_job(**flipped)) == _fingerprint(make_job(recipe={"keep": "last"}))
    assert "evaluation" not in make_job().model_dump()


def test_the_fingerprint_changes_with_the_format_of_training(make_job, monkeypatch):
    before = _fingerprint(make_job())
    monkeypatch.setattr(job_module, "TRAINING_FORMAT", job_module.TRAINING_FORMAT + 1)
    assert _fingerprint(make_job()) != before


def test_the_fingerprint_does_not_depend_on_where_the_data_lie(make_job):
    assert _fingerprint(make_job(), root="elsewhere") == _fingerprint(make_job())


def test_runs_that_differ_in_tse_settings_share_the_tfe_stage(make_job):
    base = _fingerprint(make_job(stage="tfe"))
    for change in (
        {"mode": "and"},
        {"threshold": 0.5},
        {"min_kept": 7},
        {"annealed": True},
        {"tfe_length": 0.625},  # the same five iterations
    ):
        assert _fingerprint(make_job(stage="tfe", rdd=change)) == base
    for change in ({"reduction": "valid"}, {"tfe_length": 6}):
        assert _fingerprint(make_job(stage="tfe", rdd=change)) != base


def test_the_methods_tfe_and_tse_share_the_tfe_stage(make_job):
    assert _fingerprint(make_job("tfe", stage="tfe")) == _fingerprint(make_job("tse", stage="tfe"))


def test_rdd_settings_do_not_touch_other_methods(make_job):
    for method in ("baseline", "kd", "teacher"):
        changed = make_job(method, rdd={"tfe_length": 2, "mode": "or", "annealed": True})
        assert _fingerprint(changed) == _fingerprint(make_job(method))


def test_a_backbone_file_counts_by_its_content(make_job, tmp_path):
    files = [tmp_path / name for name in ("a", "b", "c")]
    for path, content in zip(files, ("same", "same", "other"), strict=True):
        path.write_text(content)
    a, b, c = (
        _fingerprint(make_job(network=STUDENT.model_copy(update={"pretrained": path})))
        for path in files
    )
    assert a == b
    assert a != c


# ---- stages


@pytest.mark.parametrize(
    ("warmup", "iterations", "tfe", "tse"),
    [
        (5, 8, range(1, 5), range(5, 9)),  # TFE while iteration < warmup
        (0.5, 8, range(1, 4), range(4, 9)),
        (0, 8, range(1, 1), range(1, 9)),
        (1, 8, range(1, 1), range(1, 9)),
        (8, 8, range(1, 8), range(8, 9)),
        (4000, 40_000, range(1, 4000), range(4000, 40_001)),
    ],
)
def test_the_stages_divide_the_run_at_the_warm_up(make_job, warmup, iterations, tfe, tse):
    for stage, expected in (("tfe", tfe), ("tse", tse), ("whole", range(1, iterations + 1))):
        job = make_job(stage=stage, recipe={"iterations": iterations}, rdd={"tfe_length": warmup})
        assert range(job.first_iteration, job.last_iteration + 1) == expected


@pytest.mark.parametrize("method", ["baseline", "kd", "teacher"])
def test_other_methods_have_no_stages(make_job, method):
    with pytest.raises(ValidationError, match=f"Method '{method}' has no stages"):
        make_job(method, stage="tse")


def test_an_unknown_stage_is_refused(make_job):
    with pytest.raises(ValidationError, match="'whole', 'tfe' or 'tse'"):
        make_job(stage="middle")


def test_a_warm_up_longer_than_the_run_is_refused(make_job):
    with pytest.raises(
        ValidationError, match=r"rdd.tfe_length is 9 iterations, the run has 8. Lower"
    ):
        make_job(rdd={"tfe_length": 9})
    make_job("kd", rdd={"tfe_length": 9})  # which has none


def test_class_weights_that_do_not_exist_are_refused(make_job, blocks, teacher):
    without = LABELS.model_copy(update={"class_weights": None})
    job = make_job(recipe={"class_weights": True})
    Training(job, blocks.images, teacher).check()
    with pytest.raises(
        UserError, match=r"^recipe.class_weights is on, but label set 'blocks' has no class weights"
    ):
        Training(job, replace(blocks.images, labels=without), teacher).check()


def test_an_unknown_method_and_a_weight_for_no_term_are_refused(make_job):
    with pytest.raises(ValidationError, match=r"There is no method 'kdd'. The methods are: .*kd"):
        make_job("kdd")
    with pytest.raises(ValidationError, match=r"gives 'kd' weights for cwd, but its losses are kd"):
        make_job("kd", methods=MethodsParams(weights={"kd": {"cwd": 1.0}}))


def test_what_is_said_of_tse_reaches_its_tfe_stage(make_job):
    """Both are parts of one training; before, the TFE stage kept the weights of the table."""
    changes = MethodsParams(weights={"tse": {"kd": 0.5}})
    tfe, tse = (make_job(name, methods=changes).definition for name in ("tfe", "tse"))
    assert tfe.losses == tse.losses
    assert tfe.weights == {"kd": 0.5}


def test_changes_of_other_methods_do_not_touch_a_job(make_job):
    changes = MethodsParams(
        preset="reference_code", weights={"cwd": {"kd": 0.5}}, options={"cwd": {"kd": {}}}
    )
    assert _fingerprint(make_job("kd", methods=changes)) == _fingerprint(make_job("kd"))
    assert _fingerprint(make_job("cwd", methods=changes)) != _fingerprint(make_job("cwd"))
