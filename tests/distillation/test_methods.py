from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from rdd_pipeline.config import MethodsParams, RddParams
from rdd_pipeline.distillation.methods import (
    ABLATIONS,
    BASELINES,
    LOSSES,
    METHODS,
    RDD_PLUS,
    LossSpec,
    check_changes,
    find_method,
    method_title,
)
from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.base import DistillationLoss, LossContext
from rdd_pipeline.losses.kd import kd_loss
from rdd_pipeline.networks import NetworkOutput

EVERY = METHODS | RDD_PLUS | ABLATIONS


def _maps(width: int, size: tuple[int, int] = (8, 8)) -> NetworkOutput:
    def maps(channels: int):
        return torch.zeros(1, channels, *size, device="meta")

    return NetworkOutput(maps(5), maps(5), maps(width), (maps(width), maps(2 * width)))


def _drawn(seed: int) -> NetworkOutput:
    logits = torch.randn(1, 5, 8, 8, generator=torch.Generator().manual_seed(seed))
    return _maps(16)._replace(logits=logits)


CONTEXT = LossContext(_maps(16), _maps(32))


def _with(name: str, **options) -> LossSpec:
    return replace(LOSSES[name], options=options)


def test_the_methods_that_others_call_are_there():
    names = "baseline kd fitnet at skd ifvd cwd dsd cirkd dist mgd af_dcd cirkdv2 bpkd"
    assert list(METHODS) == [*names.split(), "dkd", "kd_standardized", "tfe", "tse"]
    assert set(BASELINES) == set(METHODS) - {"tfe", "tse"}
    assert {"tse_cwd", "tse_cirkd", "tse_at", "tse_dsd"} <= set(RDD_PLUS)


@pytest.mark.parametrize("name", EVERY)
def test_every_loss_of_a_method_is_there_once_and_can_be_built(name):
    method = EVERY[name]
    modules = [spec.name for spec in method.losses]
    losses = [loss for spec in method.losses for loss in spec.weights]
    assert len(set(modules)) == len(modules)  # an objective keeps them by that name
    assert len(set(losses)) == len(losses)  # and their losses by theirs
    for spec in method.losses:
        assert all(weight >= 0 for weight in spec.weights.values())
        assert set(spec.by_name(spec.scale)) <= {*spec.weights, spec.name}
        with torch.device("meta"):
            assert isinstance(spec.module(CONTEXT), DistillationLoss)


# The weights of the CIRKD code base on Cityscapes; DIST's and MGD's are those of their papers.
PUBLISHED = {
    "kd": {"kd": 1},
    "fitnet": {"kd": 1, "fitnet": 10},
    "at": {"kd": 1, "at": 10_000},
    "skd": {"kd": 1, "skd_pairwise": 10, "skd_generator": 0.001, "skd_discriminator": 0.1},
    "ifvd": {"kd": 1, "ifvd": 20},
    "cwd": {"kd": 1, "cwd_logits": 3, "cwd_feature": 50},
    "dsd": {"psd": 1000, "csd": 10},
    "cirkd": {"kd": 1, "cirkd_minibatch": 1, "cirkd_pixel": 0.1, "cirkd_region": 0.1},
    "dist": {"dist": 1},
    "mgd": {"mgd": 2e-5},
    "af_dcd": {"kd": 1, "af_dcd_feature": 2e-6, "af_dcd_contrast": 0.005},
    "bpkd": {"bpkd_edge": 50, "bpkd_body": 20},
    "tse": {"kd": 1},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_the_published_ones(name):
    assert METHODS[name].weights == PUBLISHED[name]


def test_only_the_student_alone_and_the_teacher_need_no_teacher():
    assert {name for name in EVERY if not EVERY[name].needs_teacher} == {"baseline"}
    assert not find_method("teacher").needs_teacher
    assert find_method("teacher").task == "plain"
    assert find_method("teacher").losses == ()


def test_every_method_has_a_title_of_its_own():
    titles = [method.title for method in EVERY.values()]
    assert len(set(titles)) == len(titles)


def test_rdd_beside_a_method_replaces_the_task_loss_only():
    for name, method in RDD_PLUS.items():
        alone = METHODS[name.removeprefix("tse_")]
        assert (method.task, method.losses) == ("rdd", alone.losses)


def test_the_two_stages_of_rdd_are_the_same_method():
    tfe, tse = METHODS["tfe"], METHODS["tse"]
    assert (tfe.task, tfe.losses) == (tse.task, tse.losses)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_its_one_setting_and_leaves_the_others_as_the_run_has_them(name):
    run = RddParams(tfe_length=0.15, mode="or", threshold=0.31, min_kept=0.17, annealed=False)
    (setting,) = ABLATIONS[name].rdd.items()
    if getattr(run, setting[0]) == setting[1]:  # a run that is not the ablation to begin with
        run = run.model_copy(update={"mode": "and", "threshold": 0.77})
    changed = ABLATIONS[name].settings(run)
    assert changed != run
    assert changed == run.model_copy(update=dict([setting]))


def test_other_weights_replace_those_of_the_table_and_leave_it_as_it_is():
    changed = find_method("cwd", MethodsParams(weights={"cwd": {"cwd_logits": 0.25}}))
    assert changed.weights == {"kd": 1, "cwd_logits": 0.25, "cwd_feature": 50}
    assert METHODS["cwd"].weights == PUBLISHED["cwd"]


def test_one_weight_of_kd_for_all_methods_that_have_it():
    changes = MethodsParams(kd=5.0, weights={"cwd": {"kd": 2.0}})
    for name, method in EVERY.items():
        expected = {**method.weights}
        if "kd" in expected:
            expected["kd"] = 2.0 if name == "cwd" else 5.0
        assert find_method(name, changes).weights == expected, name


def test_a_weight_of_zero_is_a_weight():
    changes = MethodsParams(weights={"kd": {"kd": 0.0}})
    assert find_method("kd", changes).weights == {"kd": 0.0}


def test_the_preset_puts_the_published_settings_on_and_options_have_the_last_word():
    published = MethodsParams(preset="reference_code")
    cwd = {spec.name: spec.options for spec in find_method("cwd", published).losses}
    assert cwd["cwd_feature"] == {"divisor": "student", "adapter": "unless_equal"}
    cirkd = {spec.name: spec.options for spec in find_method("cirkd", published).losses}
    assert cirkd["cirkd_memory"] == {"preset": "cirkd_published"}
    both = MethodsParams(
        preset="reference_code",
        options={"cwd": {"cwd_feature": {"divisor": "teacher", "temperature": 2.0}}},
    )
    options = {spec.name: spec.options for spec in find_method("cwd", both).losses}
    assert options["cwd_feature"] == {
        "divisor": "teacher",
        "temperature": 2.0,
        "adapter": "unless_equal",
    }
    paper = find_method("cwd", MethodsParams())
    assert all(not spec.options for spec in paper.losses)


def test_an_unknown_method_is_refused_and_the_choices_are_named():
    with pytest.raises(UserError, match=r"no method 'kdd'. The methods are: .*baseline.*kd.*tse"):
        find_method("kdd")


def test_a_weight_for_a_loss_the_method_does_not_have_is_refused():
    def find(name, weights):
        return find_method(name, MethodsParams(weights={name: weights}))

    with pytest.raises(
        UserError, match=r"params:methods gives 'kd' weights for at, cwd, but its losses are kd\."
    ):
        find("kd", {"cwd": 1.0, "at": 2.0, "kd": 1.0})
    with pytest.raises(UserError, match=r"but its losses are \(none\)"):
        find("baseline", {"kd": 1.0})


def test_changes_of_methods_that_do_not_exist_are_refused():
    check_changes(MethodsParams(weights={"tse_cwd": {"cwd_logits": 1.0}}))
    with pytest.raises(UserError, match="no method 'kdd'"):
        check_changes(MethodsParams(weights={"kdd": {}}))
    with pytest.raises(UserError, match="first part of RDD: say it of 'tse'"):
        check_changes(MethodsParams(options={"tfe": {"kd": {"temperature": 2.0}}}))


def test_a_loss_is_built_with_its_options():
    given, taken = _drawn(1), _drawn(2)
    loss = _with("kd", temperature=4.0).module(CONTEXT)
    expected = kd_loss(given.logits, taken.logits, temperature=4.0)
    assert_close(loss(given, taken, torch.zeros(1, 8, 8)), expected)
    wide = METHODS["cwd"].losses[2].module(CONTEXT)
    narrow = _with("cwd_feature", divisor="student").module(CONTEXT)
    assert (wide.channels, narrow.channels) == (32, 16)


def test_an_unknown_loss_or_option_is_refused():
    with pytest.raises(UserError, match=r"gives 'kd' options for kdd, but its losses are kd\."):
        find_method("kd", MethodsParams(options={"kd": {"kdd": {"temperature": 4.0}}}))
    with pytest.raises(UserError, match=r"does not suit the loss 'kd' .*temprature"):
        _with("kd", temprature=4.0).module(CONTEXT)
    with pytest.raises(UserError, match="divisor of cwd_feature is 'both'"):
        _with("cwd_feature", divisor="both").module(CONTEXT)


def test_maps_that_are_too_small_are_refused_before_training():
    tiny = LossContext(_maps(16, (3, 3)), _maps(32, (3, 3)))
    with pytest.raises(UserError, match="at least 4 x 4 positions, the teacher's last stage has 3"):
        _with("af_dcd").module(tiny)
    with pytest.raises(UserError, match=r"logits of at least 8 x 8 positions, got 3 x 3"):
        _with("skd_holistic").module(tiny)


# --- as published ---------------------------------------------------------------------------------

ADVERSARIAL = {"skd_generator": 0.001, "skd_discriminator": 0.1}
# Read in the training scripts behind the published tables; the others are as in PUBLISHED.
SCRIPTS = {
    **PUBLISHED,
    "ifvd": {**PUBLISHED["ifvd"], **ADVERSARIAL},
    "cwd": {**PUBLISHED["cwd"], **ADVERSARIAL},
    "mgd": {"mgd": 2e-5, "cwd_logits": 3},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_published_preset_has_the_losses_of_the_published_scripts(name):
    published = MethodsParams(preset="reference_code")
    assert find_method(name, published).weights == SCRIPTS[name]
    plus = f"tse_{name}"
    if plus in RDD_PLUS:
        assert find_method(plus, published).weights == SCRIPTS[name]
        assert find_method(plus).weights == PUBLISHED[name]


def test_weights_may_be_given_to_losses_that_only_the_preset_has():
    weights = {"mgd": {"cwd_logits": 1.5}}
    changed = find_method("mgd", MethodsParams(preset="reference_code", weights=weights))
    assert changed.weights == {"mgd": 2e-5, "cwd_logits": 1.5}
    with pytest.raises(UserError, match="gives 'mgd' weights for cwd_logits"):
        find_method("mgd", MethodsParams(weights=weights))


def test_published_losses_have_no_adapter_between_equal_widths():
    equal, wider = LossContext(_maps(16), _maps(16)), CONTEXT
    for name, layer in (("cwd", "adapter"), ("mgd", "generator.align")):
        specs = {
            preset: next(
                spec
                for spec in find_method(name, MethodsParams(preset=preset)).losses
                if spec.name in ("cwd_feature", "mgd")
            )
            for preset in ("paper", "reference_code")
        }
        for preset, context, adapted in (
            ("paper", equal, True),
            ("reference_code", equal, False),
            ("reference_code", wider, True),
        ):
            built = specs[preset].module(context)
            assert (f"{layer}.weight" in dict(built.named_parameters())) == adapted
    with pytest.raises(UserError, match="adapter is 'never'; expected one of always, unless_equal"):
        _with("mgd", adapter="never").module(equal)


def test_the_published_attention_of_cirkdv2_has_no_bias():
    for preset, biased in (("paper", True), ("reference_code", False)):
        (_, spec) = find_method("cirkdv2", MethodsParams(preset=preset)).losses
        with torch.device("meta"):
            built = spec.module(CONTEXT)
        assert ("refine.query.bias" in dict(built.named_parameters())) == biased


def test_tfe_is_weighted_by_class_but_in_the_published_preset():
    assert find_method("tse").weighted_tfe
    assert find_method("tse_cwd", MethodsParams()).weighted_tfe
    assert not find_method("tfe", MethodsParams(preset="reference_code")).weighted_tfe


# --- weights that depend on the number of positions -----------------------------------------------

SCALED = {"at", "psd", "csd", "mgd", "af_dcd_feature", "channel_mse"}


def _scales(name, size):
    context = LossContext(_maps(16), _maps(32, size))
    found = {}
    for spec in METHODS[name].losses:
        found |= spec.scales(context)
    return found


def test_on_maps_of_the_published_size_the_published_weights_hold():
    scales = {}
    for name in METHODS:
        scales |= _scales(name, (64, 128))
    assert scales == dict.fromkeys(SCALED, 1.0)


def test_smaller_maps_scale_to_what_the_loss_weighs_there():
    # 8 x 12 positions: what the weights of docs/experiments.md for crops of 64 x 96 are.
    assert _scales("at", (8, 12))["at"] * 10_000 == pytest.approx(117, rel=0.01)
    dsd = _scales("dsd", (8, 12))
    assert dsd["psd"] * 1000 == pytest.approx(11.7, rel=0.01)
    assert dsd["csd"] * 10 == pytest.approx(0.00137, rel=0.01)
    assert _scales("mgd", (8, 12))["mgd"] * 2e-5 == pytest.approx(0.00171, rel=0.01)
    assert _scales("af_dcd", (8, 12))["af_dcd_feature"] * 2e-6 == pytest.approx(0.000171, rel=0.01)
    assert _scales("cirkdv2", (8, 12))["channel_mse"] * 100 == pytest.approx(1.17, rel=0.01)


@pytest.mark.parametrize("name", ["at", "dsd", "mgd", "cirkdv2"])
def test_a_scaled_loss_weighs_about_the_same_on_maps_of_any_size(name):
    """Of the same smooth images, seen at two resolutions."""

    def weighted(size):
        generator = torch.Generator().manual_seed(0)

        def maps(channels):
            coarse = torch.randn(1, channels, 6, 6, generator=generator)
            return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")

        def output(width):
            return NetworkOutput(maps(5), maps(5), maps(width), (maps(width), maps(2 * width)))

        student, teacher = output(16), output(16)
        context = LossContext(student, teacher)
        total = {}
        for spec in METHODS[name].losses:
            torch.manual_seed(0)
            options = {"mask_ratio": 0.0} if spec.name == "mgd" else {}
            module = replace(spec, options=options).module(context)
            labels = torch.zeros(1, *size, dtype=torch.long)
            losses = spec.by_name(module(student, teacher, labels))
            for loss, scale in spec.scales(context).items():
                total[loss] = scale * float(losses[loss].detach())
        return total

    small, large = weighted((16, 24)), weighted((32, 48))
    assert small.keys() == large.keys() != set()
    for loss in small:
        assert small[loss] == pytest.approx(large[loss], rel=0.5), loss


@pytest.mark.parametrize(
    ("name", "mode", "title"),
    [
        ("tse", "xor", "RDD"),
        ("tse", "or", "RDD variant OR"),
        ("tse", "and", "RDD variant AND"),
        ("tse", "ohem", "OHEM + KD"),
        ("tse_cwd", "xor", "RDD + CWD"),
        ("tse_cwd", "or", "RDD variant OR + CWD"),
        ("tse_cwd", "ohem", "OHEM + CWD"),
        ("rdd_threshold_50", "or", "RDD variant OR, threshold 0.5"),
        ("rdd_xor", "or", "RDD, hard XOR"),
        ("rdd_ohem", "xor", "RDD, OHEM (student only)"),
        ("tfe", "or", "RDD, TFE stage"),
        ("cwd", "or", "CWD"),
        ("baseline", "ohem", "student alone"),
        ("teacher", "or", "teacher"),
    ],
)
def test_only_the_mode_xor_is_called_rdd(name, mode, title):
    assert method_title(name, RddParams(mode=mode)) == title
