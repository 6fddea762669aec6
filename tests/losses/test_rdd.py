"""RDD's task losses: equal to the published numbers, and right where the published code is not."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.class_counts import _all_at_once, _class_by_class
from rdd_pipeline.losses.cross_entropy import cross_entropy_loss
from rdd_pipeline.losses.rdd import selected_pixels, teacher_confidence, tfe_loss, tse_loss
from tests.losses.case import Case
from tests.losses.reference import (
    CITYSCAPES_WEIGHTS,
    Reference,
    assert_equal,
    upsampled,
)

MODES = ("xor", "or", "and", "ohem")


def assert_zero_with_graph(loss, leaves):
    assert loss.shape == ()
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, leaves):
        assert (grad == 0).all()


# --- teacher_confidence ---------------------------------------------------------------------------


def test_confidence_equals_the_reference(reference):
    weight = teacher_confidence(
        reference["teacher_logits"],
        reference["teacher_aux"],
        size=tuple(reference.labels.shape[-2:]),
    )
    assert_equal(weight, reference["tfe/weight"].reshape(reference.labels.shape))


def test_confidence_equals_a_loop_over_distributions():
    case = Case()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=case.teacher_aux.movedim(1, -1)),
        torch.distributions.Categorical(logits=case.teacher.movedim(1, -1)),
    )
    expected = upsampled(torch.exp(-kl)[:, None], case.labels)[:, 0]
    assert_close(teacher_confidence(case.teacher, case.teacher_aux, size=(17, 21)), expected)


def test_confidence_of_agreeing_heads_is_exactly_one():
    teacher = Case(images=1).teacher.bfloat16()
    weight = teacher_confidence(teacher, teacher, size=(9, 9))
    assert weight.shape == (1, 9, 9)  # a batch of one keeps its axis
    assert weight.dtype == torch.float32
    assert_close(weight, torch.ones(1, 9, 9))
    assert weight.max() <= 1


def test_confidence_has_no_gradient():
    student = Case().student
    assert not teacher_confidence(student, student, size=(4, 4)).requires_grad


def test_confidence_needs_heads_of_one_shape():
    with pytest.raises(UserError, match="must have one shape"):
        teacher_confidence(Case().teacher, Case().teacher[:, :3], size=(4, 4))


# --- ohem_mask and selected_pixels ----------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_chosen_pixels_follow_the_truth_table(mode):
    case = Case()
    masks = selected_pixels(case.student, case.teacher, case.labels, mode=mode, min_kept=100)
    table = {
        "xor": lambda s, t: s != t,
        "or": lambda s, t: s or t,
        "and": lambda s, t: s and t,
        "ohem": lambda s, t: s,
    }
    expected = [
        table[mode](s, t)
        for s, t in zip(
            masks.hard_student.flatten().tolist(),
            masks.hard_teacher.flatten().tolist(),
            strict=True,
        )
    ]
    assert masks.selected.flatten().tolist() == expected
    assert not masks.selected[case.labels == 255].any()


# --- tfe_loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_aux", [True, False])
def test_tfe_equals_the_reference(reference, with_aux):
    student, aux = reference.leaf("student_logits"), reference.leaf("student_aux")
    loss = tfe_loss(
        student,
        reference.labels,
        teacher_logits=reference["teacher_logits"],
        teacher_aux_logits=reference["teacher_aux"],
        student_aux_logits=aux if with_aux else None,
        ignore_index=-1,
    ).loss
    loss.backward()
    prefix = "tfe" if with_aux else "tfe_noaux"
    assert_equal(loss, reference[f"{prefix}/loss"])
    assert_equal(student.grad, reference[f"{prefix}/grad_student_logits"])
    if with_aux:
        assert_equal(aux.grad, reference["tfe/grad_student_aux"])


def test_tfe_valid_reduction_does_not_scale_with_padding():
    case = Case()
    paper, valid = case.tfe(), case.tfe(reduction="valid")
    assert_close(valid, paper * case.labels.numel() / (case.labels != 255).sum())


def test_tfe_with_an_agreeing_teacher_is_cross_entropy():
    case = Case()
    case.teacher_aux = case.teacher
    assert_close(case.tfe(reduction="valid"), case.cross_entropy())


def test_tfe_knows_its_reductions():
    with pytest.raises(UserError, match=r"Unknown reduction 'mean'.*paper, valid"):
        Case().tfe(reduction="mean")


# --- tse_loss --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weighted"),
    # The class weights of the reference are those of Cityscapes' 19 classes.
    [("losses_c19", False), ("losses_c19", True), ("losses_c5", False)],
)
@pytest.mark.parametrize("amount", ["few", "many"])
@pytest.mark.parametrize("mode", MODES)
def test_tse_equals_the_reference(mode, amount, name, weighted):
    reference = Reference(name)
    prefix = (
        f"tse/{mode.upper()}/min_kept_{amount}/{'class_weighted' if weighted else 'unweighted'}"
    )
    student, aux = reference.leaf("student_logits"), reference.leaf("student_aux")
    loss = tse_loss(
        student,
        reference.labels,
        teacher_logits=reference["teacher_logits"],
        student_aux_logits=aux,
        teacher_aux_logits=reference["teacher_aux"],
        mode=mode,
        min_kept=int(reference[f"{prefix}/min_kept"]),
        class_weights=CITYSCAPES_WEIGHTS if weighted else None,
        ignore_index=-1,
    ).loss
    loss.backward()
    assert_equal(loss, reference[f"{prefix}/loss"])
    assert_equal(student.grad, reference[f"{prefix}/grad_student_logits"])
    assert_equal(aux.grad, reference[f"{prefix}/grad_student_aux"])


def test_tse_is_the_mean_cross_entropy_of_the_chosen_pixels():
    case = Case()
    weights = torch.rand(4) + 0.5
    loss = tse_loss(
        case.student,
        case.labels,
        teacher_logits=case.teacher,
        min_kept=0.3,
        class_weights=weights,
    ).loss
    chosen = selected_pixels(case.student, case.teacher, case.labels, min_kept=0.3).selected
    expected = F.cross_entropy(
        upsampled(case.student, case.labels),
        case.labels.masked_fill(~chosen, 255),
        weight=weights,
        ignore_index=255,
    )
    assert_close(loss, expected)


def test_tse_with_everything_hard_is_cross_entropy():
    case = Case()
    assert_close(case.tse(mode="or", threshold=1.0), case.cross_entropy())


@pytest.mark.parametrize("mode", ["xor", "and"])
def test_tse_is_zero_when_no_pixel_is_chosen(mode):
    case = Case()
    if mode == "xor":  # the same networks: they agree everywhere
        case.teacher, case.teacher_aux = case.student.detach(), case.student_aux.detach()
        options = {}
    else:
        options = {"threshold": 0.0, "min_kept": 0}
    loss = case.tse(mode=mode, **options)
    assert_zero_with_graph(loss, case.leaves)


def test_tse_survives_class_weights_of_zero():
    case = Case()
    assert_zero_with_graph(case.tse(class_weights=torch.zeros(4)), case.leaves)


def test_min_kept_may_be_a_fraction_of_the_batch():
    case = Case()
    count = round(0.2 * case.labels.numel())
    assert_close(case.tse(min_kept=0.2, threshold=0.0), case.tse(min_kept=count, threshold=0.0))


def test_ohem_needs_nothing_of_the_teachers_auxiliary_head():
    case = Case()
    assert_close(case.tse(mode="ohem", teacher_aux_logits=None), case.tse(mode="ohem"))


def test_tse_names_a_missing_auxiliary_head_of_the_teacher():
    with pytest.raises(UserError, match="student has auxiliary logits, the teacher none"):
        Case().tse(teacher_aux_logits=None)


@pytest.mark.parametrize("mode", ["XOR", "nand", ""])
def test_unknown_mode_names_the_choices(mode):
    with pytest.raises(UserError, match="Choose one of xor, or, and, ohem"):
        Case().tse(mode=mode)


def test_class_weights_must_be_one_for_each_class():
    with pytest.raises(UserError, match=r"shape \(19,\), expected one for each of the 4"):
        Case().tse(class_weights=CITYSCAPES_WEIGHTS)


def test_networks_of_different_label_sets_are_named():
    case = Case()
    case.teacher = case.teacher[:, :3]
    with pytest.raises(UserError, match="student has 4 classes, the teacher 3"):
        case.tse()
    with pytest.raises(UserError, match="student has 4 classes, the teacher 3"):
        case.tfe()


# --- cross_entropy_loss ----------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_torch(weighted):
    case = Case()
    weights = torch.rand(4) + 0.5 if weighted else None
    ours = case.cross_entropy(class_weights=weights)
    main, aux = (
        F.cross_entropy(upsampled(z, case.labels), case.labels, weight=weights, ignore_index=255)
        for z in case.leaves
    )
    assert_close(ours, main + 0.4 * aux)
    for found, expected in zip(
        torch.autograd.grad(ours, case.leaves),
        torch.autograd.grad(main + 0.4 * aux, case.leaves),
        strict=True,
    ):
        assert_close(found, expected, rtol=2e-5, atol=1e-7)


# --- what all task losses promise -----------------------------------------------------------------

LOSSES = ("cross_entropy", "tfe", "tse")


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_in_float64(loss):
    # mode or: the chosen set of xor may flip within gradcheck's step
    case = Case(dtype=torch.float64, images=1, small=(3, 2), size=(5, 6))
    options = {"mode": "or", "threshold": 1.0} if loss == "tse" else {}

    def function(student, aux):
        case.student, case.student_aux = student, aux
        return getattr(case, loss)(**options)

    assert torch.autograd.gradcheck(function, case.leaves)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_valid_pixel_gives_zero_loss_and_zero_gradient(loss):
    case = Case()
    ignored = torch.full_like(case.labels, 255)
    assert_zero_with_graph(getattr(case, loss)(ignored), case.leaves)


@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_pixels_may_hold_nan_at_full_size(loss):
    clean, dirty = Case(small=(7, 8), size=(7, 8)), Case(small=(7, 8), size=(7, 8))
    # The teacher's weight map is upsampled by itself; its NaN must not reach the sum either.
    ignored = (clean.labels == 255).unsqueeze(1)
    for name in ("student", "student_aux", "teacher", "teacher_aux"):
        leaf = getattr(dirty, name).detach().masked_fill(ignored, float("nan"))
        setattr(dirty, name, leaf.requires_grad_(name.startswith("student")))
    losses = [getattr(case, loss)() for case in (clean, dirty)]
    assert_close(losses[1], losses[0])
    for found, expected in zip(
        torch.autograd.grad(losses[1], dirty.leaves),
        torch.autograd.grad(losses[0], clean.leaves),
        strict=True,
    ):
        assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_computed_in_float32(loss, dtype):
    half, full = Case(dtype=dtype), Case(dtype=dtype)
    for name in ("student", "student_aux", "teacher", "teacher_aux"):
        setattr(full, name, getattr(full, name).detach().float())
    value = getattr(half, loss)()
    assert value.dtype == torch.float32
    assert_close(value, getattr(full, loss)())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(getattr(half, loss)(), value)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_logits_of_thousands_do_not_overflow(loss):
    case = Case()
    for name in ("student", "student_aux", "teacher", "teacher_aux"):
        setattr(case, name, (getattr(case, name).detach() * 8000).half().requires_grad_())
    value = getattr(case, loss)()
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, case.leaves))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("classes", "size"), [(2, (33, 9)), (25, (8, 40))])
def test_any_batch_classes_and_crop(loss, images, classes, size):
    case = Case(images=images, classes=classes, size=size)
    value = getattr(case, loss)(**{"mode": "or"} if loss == "tse" else {})
    assert value.isfinite()
    assert value > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_of_one_byte_or_with_minus_one_as_ignored(loss):
    case = Case()
    expected = getattr(case, loss)()
    assert torch.equal(getattr(case, loss)(case.labels.byte()), expected)
    minus_one = case.labels.masked_fill(case.labels == 255, -1)
    assert torch.equal(getattr(case, loss)(minus_one, ignore_index=-1), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_reaches_the_teacher(loss):
    case = Case()
    case.teacher.requires_grad_()
    case.teacher_aux.requires_grad_()
    getattr(case, loss)().backward()
    assert case.teacher.grad is None
    assert case.teacher_aux.grad is None


# --- statistics -----------------------------------------------------------------------------------


def test_tse_statistics_count_what_the_masks_hold():
    case = Case()
    loss, statistics, *_ = tse_loss(
        case.student,
        case.labels,
        teacher_logits=case.teacher,
        student_aux_logits=case.student_aux,
        teacher_aux_logits=case.teacher_aux,
        min_kept=0.3,
    )
    assert torch.equal(loss, case.tse(min_kept=0.3))
    valid = (case.labels != 255).sum()
    for prefix, student, teacher in (
        ("", case.student, case.teacher),
        ("aux_", case.student_aux, case.teacher_aux),
    ):
        masks = selected_pixels(student, teacher, case.labels, min_kept=0.3)
        curves = ("hard_student", "hard_teacher", "chosen")
        for name, mask in zip(curves, masks, strict=True):
            assert_close(statistics[prefix + name], mask.sum() / valid)
        for name, logits in (("student_ce", student), ("teacher_ce", teacher)):
            ce = F.cross_entropy(upsampled(logits, case.labels), case.labels, ignore_index=255)
            assert_close(statistics[prefix + name], ce.detach())
        assert statistics[f"{prefix}chosen_none"] == 0
    assert all(value.shape == () and not value.requires_grad for value in statistics.values())


def test_an_empty_choice_is_counted():
    case = Case()
    terms = tse_loss(case.student, case.labels, teacher_logits=case.student.detach())
    assert terms.statistics["chosen_none"] == 1
    assert terms.statistics["chosen"] == 0


def test_tfe_and_cross_entropy_statistics():
    case = Case()
    terms = tfe_loss(
        case.student,
        case.labels,
        teacher_logits=case.teacher,
        teacher_aux_logits=case.teacher_aux,
        student_aux_logits=case.student_aux,
    )
    weight = teacher_confidence(case.teacher, case.teacher_aux, size=(17, 21))
    assert_close(terms.statistics["teacher_confidence"], weight[case.labels != 255].mean())
    plain = cross_entropy_loss(case.student, case.labels, student_aux_logits=case.student_aux)
    for name in ("student_ce", "student_aux_ce"):
        assert_close(terms.statistics[name], plain.statistics[name])
    total = plain.statistics["student_ce"] + 0.4 * plain.statistics["student_aux_ce"]
    assert_close(total, plain.loss.detach())


# --- class weights of TFE, class floor, pixels of a class -----------------------------------------

WEIGHTS = torch.tensor([0.5, 2.0, 1.5, 0.25])


def _weighted_tfe(case, reduction):
    """Pixel by pixel: sum of w c CE over sum of c."""
    w = teacher_confidence(case.teacher, case.teacher_aux, size=case.labels.shape[-2:])
    z, a = (
        upsampled(x.detach(), case.labels).log_softmax(1) for x in (case.student, case.student_aux)
    )
    above, below, valid = 0.0, 0.0, 0
    for n in range(len(case.labels)):
        for y in range(case.labels.shape[1]):
            for x in range(case.labels.shape[2]):
                label = int(case.labels[n, y, x])
                if label == 255:
                    continue
                valid += 1
                c = float(WEIGHTS[label])
                ce = -float(z[n, label, y, x]) - 0.4 * float(a[n, label, y, x])
                above += float(w[n, y, x]) * c * ce
                below += c
    if reduction == "paper":
        below *= case.labels.numel() / valid
    return above / below


@pytest.mark.parametrize("reduction", ["paper", "valid"])
def test_tfe_with_class_weights_is_a_weighted_mean(reduction):
    case = Case()
    assert len(WEIGHTS) == case.student.shape[1]
    loss, statistics, *_ = tfe_loss(
        case.student,
        case.labels,
        teacher_logits=case.teacher,
        teacher_aux_logits=case.teacher_aux,
        student_aux_logits=case.student_aux,
        class_weights=WEIGHTS,
        reduction=reduction,
    )
    assert float(loss.detach()) == pytest.approx(_weighted_tfe(case, reduction), rel=1e-5)
    plain = tfe_loss(
        case.student,
        case.labels,
        teacher_logits=case.teacher,
        teacher_aux_logits=case.teacher_aux,
        student_aux_logits=case.student_aux,
        class_weights=torch.ones(4),
        reduction=reduction,
    )
    assert_close(plain.loss, case.tfe(reduction=reduction))
    assert_close(statistics["teacher_confidence"], plain.statistics["teacher_confidence"])


def test_tfe_survives_class_weights_of_zero():
    case = Case()
    loss = case.tfe(class_weights=torch.zeros(4))
    loss.backward()
    assert loss == 0
    assert case.student.grad.count_nonzero() == 0


@pytest.mark.parametrize("mode", ["xor", "or", "and", "ohem"])
@pytest.mark.parametrize("floor", [0.2, 0.7, 1.0])
def test_the_class_floor_adds_what_is_least_hard_for_the_teacher(mode, floor):
    case = Case()
    settings = {"mode": mode, "min_kept": 0.3}
    masks = selected_pixels(case.student, case.teacher, case.labels, **settings)
    p = upsampled(case.teacher, case.labels).softmax(1)
    p = p.gather(1, torch.where(case.labels == 255, 0, case.labels).unsqueeze(1)).squeeze(1)
    expected = masks.selected.clone()
    for label in range(4):
        here = case.labels == label
        missing = math.ceil(floor * int(here.sum()) - 1e-9) - int((here & masks.selected).sum())
        rest = [
            (float(p[i]), i)
            for i in map(tuple, (here & masks.hard_student & ~masks.selected).nonzero().tolist())
        ]
        if mode == "ohem":
            assert not rest
        for _, index in sorted(rest, reverse=True)[: max(0, missing)]:
            expected[index] = True
    ce = F.cross_entropy(
        upsampled(case.student, case.labels), case.labels, ignore_index=255, reduction="none"
    )
    terms = tse_loss(
        case.student,
        case.labels,
        teacher_logits=case.teacher,
        class_floor=floor,
        by_class=True,
        **settings,
    )
    assert_close(terms.loss, ce[expected].mean())
    for label in range(4):
        here = case.labels == label
        found = [int(count[label]) for count in terms.pixels_of_class[:5]]
        teacher = masks.hard_teacher if mode != "ohem" else torch.zeros_like(expected)
        both = masks.hard_student & teacher
        all_masks = (case.labels != 255, masks.hard_student, teacher, expected, both)
        assert found == [int((mask & here).sum()) for mask in all_masks]
    if mode == "xor" and floor < 1:
        assert int(expected.sum()) > int(masks.selected.sum())


def test_pixels_of_a_class_are_counted_when_asked_for():
    case = Case()
    terms = tse_loss(case.student, case.labels, teacher_logits=case.teacher)
    assert terms.pixels_of_class is None


def test_tfe_counts_pixels_of_a_class_by_weight():
    case = Case()
    heads = {"teacher_logits": case.teacher, "teacher_aux_logits": case.teacher_aux}
    assert tfe_loss(case.student, case.labels, **heads).pixels_of_class is None
    found = tfe_loss(case.student, case.labels, by_class=True, **heads).pixels_of_class
    size = tuple(case.labels.shape[-2:])
    weight = teacher_confidence(case.teacher, case.teacher_aux, size=size)
    kinds = set()
    for label in range(4):
        weights = weight[case.labels == label]
        low, below = int((weights < 0.5).sum()), int((weights < 0.9).sum())
        kinds |= {low > 0, below > low}
        expected = [0] * 5 + [len(weights), low, below - low]
        assert [int(count[label]) for count in found] == expected
    assert kinds == {True}


@pytest.mark.parametrize("count", [_all_at_once, _class_by_class])
def test_pixels_are_counted_the_same_way_on_every_device(count):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 6, (2, 9, 7), generator=generator, dtype=torch.uint8)
    valid = (labels != 5) & (labels != 2)
    masks = [torch.rand(labels.shape, generator=generator) < share for share in (0.0, 0.3, 1.0)]
    for some in (masks, []):
        found = count(some, labels, valid, 5)
        assert found.shape == (1 + len(some), 5)
        for number in range(5):
            here = (labels == number) & valid
            expected = [int(here.sum()), *(int((mask & here).sum()) for mask in some)]
            assert found[:, number].tolist() == expected


def test_the_class_floor_is_a_share():
    case = Case()
    with pytest.raises(UserError, match=r"class_floor is 1\.5; it is a share"):
        case.tse(class_floor=1.5)


def test_the_class_floor_survives_a_batch_without_valid_pixel():
    case = Case()
    case.labels[:] = 255
    loss = case.tse(class_floor=0.5)
    loss.backward()
    assert loss == 0
    assert case.student.grad.count_nonzero() == 0
