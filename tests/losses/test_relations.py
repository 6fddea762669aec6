"""Losses on relations: equal to the published numbers, and what the queues hold."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses import memory_bank
from rdd_pipeline.losses.cirkd import CIRKDMemory, cirkd_minibatch_loss
from rdd_pipeline.losses.cirkdv2 import ChannelRelations, SelfAttentionBlock, pooled_positions
from rdd_pipeline.losses.layers import ProjectionHead
from rdd_pipeline.losses.skd import skd_pairwise_loss
from tests.losses.reference import NAMES, Reference, assert_equal, features
from tests.losses.test_similarity import plain_similarity_kl


@pytest.fixture(params=NAMES)
def reference(request):
    return Reference(request.param)


@pytest.fixture
def in_order(monkeypatch):
    """Every random choice takes the first ones, as in the reference."""
    monkeypatch.setattr(memory_bank, "random_slots", lambda _, count, device: torch.arange(count))
    monkeypatch.setattr(
        memory_bank,
        "random_order",
        lambda shape, device: torch.arange(float(shape[-1])).expand(shape),
    )


STUDENT, TEACHER = (2, 3, 4, 5), (2, 4, 4, 5)
LABELS = torch.randint(0, 3, (2, 8, 10), generator=torch.Generator().manual_seed(0))
LABELS[0, :4] = 255


def memory(**options):
    settings = {"pixel_slots": 40, "region_slots": 6, "pixel_contrast": 20, "region_contrast": 8}
    torch.manual_seed(0)
    return CIRKDMemory(3, 4, 3, **(settings | options))


# --- the published numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "name"),
    [(skd_pairwise_loss, "skd_pairwise"), (cirkd_minibatch_loss, "cirkd_minibatch/T0.1")],
)
def test_equals_the_reference(reference, loss, name):
    student = reference.leaf("student_feature")
    value = loss(student, reference["teacher_feature"])
    value.backward()
    assert_equal(value, reference[f"{name}/loss"])
    assert_equal(student.grad, reference[f"{name}/grad"])


def test_cirkd_memory_equals_the_reference(reference, in_order):
    prefix = "cirkd_memory"
    student, teacher = reference.leaf("student_feature"), reference["teacher_feature"]
    classes, slots, width = reference[f"{prefix}/pixel_queue_before"].shape
    module = CIRKDMemory(
        student.shape[1],
        width,
        classes,
        pixel_slots=slots,
        region_slots=reference[f"{prefix}/region_queue_before"].shape[1],
        pixel_contrast=6 * classes,  # 7 and 5 slots of each class
        region_contrast=4 * classes,
        preset="cirkd_published",
        ignore_index=-1,
    ).eval()
    state = module.state_dict()
    for name in ("pixel_queue", "region_queue"):
        state[name] = reference[f"{prefix}/{name}_before"]
    for index in (0, 3):
        state[f"projection.{index}.weight"] = reference[f"{prefix}/project_conv{1 + index // 3}"]
    module.load_state_dict(state)

    terms = module(student, teacher, reference.labels)
    (0.1 * terms.pixel + 0.1 * terms.region).backward()
    assert_equal(terms.pixel, reference[f"{prefix}/pixel_loss"])
    assert_equal(terms.region, reference[f"{prefix}/region_loss"])
    assert_equal(student.grad, reference[f"{prefix}/grad_of_0.1pixel+0.1region"])
    for queue in ("pixel", "region"):
        found = getattr(module, f"{queue}_queue")
        assert_close(found, reference[f"{prefix}/{queue}_queue_after"], rtol=1e-5, atol=1e-6)
        pointer = getattr(module, f"{queue}_pointer")
        assert torch.equal(pointer, reference[f"{prefix}/{queue}_ptr_after"].long())


# --- independent oracles --------------------------------------------------------------------------


def test_minibatch_is_the_mean_over_ordered_pairs_of_images():
    student, teacher = (
        F.normalize(features(seed, shape), dim=1).flatten(2).transpose(1, 2)
        for seed, shape in ((0, STUDENT), (1, TEACHER))
    )
    pairs = [
        plain_similarity_kl(student[i], student[j : j + 1], teacher[i], teacher[j : j + 1], 0.1)
        for i in range(2)
        for j in range(2)
    ]
    loss = cirkd_minibatch_loss(features(0, STUDENT), features(1, TEACHER))
    assert_close(loss, torch.stack(pairs).sum() / 20 / 4, rtol=1e-5, atol=1e-6)


# --- what the functions promise -------------------------------------------------------------------

FUNCTIONS = [skd_pairwise_loss, cirkd_minibatch_loss]


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_gradcheck_in_float64(loss):
    student = features(0, (2, 3, 3, 3), torch.float64).requires_grad_()
    teacher = features(1, (2, 4, 3, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda f: loss(f, teacher), student)


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_equal_features_have_no_loss_and_widths_may_differ(loss):
    feature = features(0, STUDENT)
    padded = F.pad(feature, (0, 0, 0, 0, 0, 1))  # one more channel, of zeros
    assert_close(loss(feature, padded), torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_half_precision_is_computed_in_float32_also_under_autocast(loss):
    student, teacher = features(0, STUDENT).half().requires_grad_(), features(1, TEACHER).half()
    outside = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(student, teacher)
    inside.backward()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_a_student_of_another_stride_is_resized(loss):
    small = features(0, (2, 3, 2, 2))
    grown = F.interpolate(small, (4, 5), mode="bilinear", align_corners=True)
    assert_close(loss(small, features(1, TEACHER)), loss(grown, features(1, TEACHER)))


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_an_empty_batch_gives_zero_and_other_batches_are_named(loss):
    assert loss(features(0, STUDENT)[:0], features(1, TEACHER)[:0]) == 0
    with pytest.raises(UserError, match="hold 1 images"):
        loss(features(0, STUDENT)[:1], features(1, TEACHER))


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_a_feature_of_zeros_has_a_finite_gradient(loss):
    student = torch.zeros(STUDENT).requires_grad_()
    loss(student, features(1, TEACHER)).backward()
    assert student.grad.isfinite().all()


# --- CIRKD's memory -------------------------------------------------------------------------------


def small_labels():
    return F.interpolate(LABELS[:, None].float(), (4, 5))[:, 0].long()


def test_queues_hold_pixels_of_their_class_and_region_means():
    module, teacher = memory(), features(1, TEACHER)
    module(features(0, STUDENT), teacher, LABELS)
    unit, labels = F.normalize(teacher, dim=1), small_labels()
    for c in range(3):
        of_class = unit.movedim(1, -1)[labels == c]
        written = int(module.pixel_pointer[c])
        assert written == sum(min(16, int((labels[n] == c).sum())) for n in range(2))
        for vector in module.pixel_queue[c, :written]:
            assert (of_class - vector).abs().amax(1).min() < 1e-6
        means = [
            F.normalize(unit[n][:, labels[n] == c].mean(1), dim=0)
            for n in range(2)
            if (labels[n] == c).any()
        ]
        assert module.region_pointer[c] == len(means)
        assert_close(module.region_queue[c, : len(means)], torch.stack(means))


def test_no_pixel_is_enqueued_twice_in_a_step():
    module = memory()
    module(features(0, STUDENT), features(1, TEACHER), LABELS)
    for c in range(3):
        written = module.pixel_queue[c, : module.pixel_pointer[c]]
        assert len(written.unique(dim=0)) == len(written)


def test_slots_that_are_not_written_stay_and_pointers_go_round():
    module = memory(pixel_slots=5, pixels_per_image=2)
    before = module.pixel_queue.clone()
    steps = 4
    for step in range(steps):
        module(features(0, STUDENT), features(step, TEACHER), torch.zeros_like(LABELS))
    assert module.pixel_pointer.tolist() == [steps * 2 * 2 % 5, 0, 0]
    assert module.region_pointer.tolist() == [steps * 2 % 6, 0, 0]
    assert torch.equal(module.pixel_queue[1:], before[1:])
    assert not (module.pixel_queue[0] == before[0]).all(1).any()
    assert_close(module.pixel_queue.norm(dim=2), torch.ones(3, 5))


def test_memory_equals_plain_torch(in_order):
    module = memory()
    student, teacher = features(0, STUDENT), features(1, TEACHER)
    terms = module(student, teacher, LABELS)
    with torch.no_grad():
        projected = module.eval().projection(student)  # after one step in training mode
        module.train()
        projected = module.projection(student)
    valid = small_labels() != 255
    s, t = (F.normalize(f, dim=1).movedim(1, -1)[valid] for f in (projected, teacher))
    for term, queue, draws in (
        (terms.pixel, module.pixel_queue, 20 // 3 + 1),
        (terms.region, module.region_queue, 8 // 3 + 1),
    ):
        keys = queue[:, :draws].reshape(1, -1, 4)
        expected = plain_similarity_kl(s, keys, t, keys, 0.1) / valid.sum()
        assert_close(term.detach(), expected, rtol=1e-5, atol=1e-5)


def test_memory_without_valid_position_is_zero_and_enqueues_nothing():
    module, student = memory(), features(0, STUDENT).requires_grad_()
    before = {name: value.clone() for name, value in module.named_buffers()}
    terms = module(student, features(1, TEACHER), torch.full_like(LABELS, 255))
    loss = terms.pixel + terms.region
    assert loss == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()
    for name in ("pixel_queue", "region_queue", "pixel_pointer", "region_pointer"):
        assert torch.equal(getattr(module, name), before[name])


def test_memory_is_in_the_state_dict():
    module, other = memory(), memory()
    module(features(0, STUDENT), features(1, TEACHER), LABELS)
    other.load_state_dict(module.state_dict())
    torch.manual_seed(5)
    expected = module(features(0, STUDENT), features(1, TEACHER), LABELS)
    torch.manual_seed(5)
    assert_close(other(features(0, STUDENT), features(1, TEACHER), LABELS), expected)


def test_memory_gradcheck_in_float64(in_order):
    module = memory().double().eval()
    student = features(0, (2, 3, 3, 3), torch.float64).requires_grad_()
    teacher = features(1, (2, 4, 3, 3), torch.float64)
    # A copy for each call: the queues move on.
    assert torch.autograd.gradcheck(
        lambda feature: sum(copy.deepcopy(module)(feature, teacher, LABELS)), student
    )


def test_memory_under_autocast_stays_finite_and_float32():
    module, student = memory(), features(0, STUDENT).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = module(student.bfloat16(), features(1, TEACHER).bfloat16(), LABELS)
    assert terms.pixel.dtype == terms.region.dtype == torch.float32
    sum(terms).backward()
    assert student.grad.isfinite().all()
    assert module.pixel_queue.dtype == torch.float32


def test_memory_names_what_does_not_fit():
    with pytest.raises(UserError, match="Choose one of class_pixels, cirkd_published"):
        memory(preset="published")
    with pytest.raises(UserError, match="2 images does not fit into queues of 1 slots"):
        memory(region_slots=1)(features(0, STUDENT), features(1, TEACHER), LABELS)


# --- CIRKDv2 --------------------------------------------------------------------------------------


def channels(**options):
    torch.manual_seed(0)
    positions = pooled_positions(4, 5)
    return ChannelRelations(3, 4, positions, **({"slots": 12, "enqueued": 5} | options))


def test_pooled_positions_round_up():
    assert pooled_positions(64, 128) == 16 * 32
    assert pooled_positions(45, 65) == 12 * 17
    for height, width in ((4, 5), (9, 8), (1, 3)):
        pooled = F.avg_pool2d(torch.zeros(1, height, width), 4, ceil_mode=True)
        assert pooled.numel() == pooled_positions(height, width)


def test_channel_terms_equal_plain_torch(in_order):
    module = channels(contrast=7)
    terms = module(features(0, STUDENT), features(1, TEACHER))
    student, teacher = (
        F.avg_pool2d(features(seed, shape), 4, ceil_mode=True)
        for seed, shape in ((0, STUDENT), (1, TEACHER))
    )
    s, t = (
        F.normalize(f.flatten(2), dim=2) for f in (module.projection(student).detach(), teacher)
    )
    pairs = [
        plain_similarity_kl(s[i], s[j : j + 1], t[i], t[j : j + 1], 0.1) / 4
        for i in range(2)
        for j in range(2)
    ]
    assert_close(terms.minibatch.detach(), torch.stack(pairs).mean(), rtol=1e-5, atol=1e-5)
    assert_close(module.queue[:5], t.flatten(0, 1)[:5])
    assert module.pointer.item() == 5
    keys = module.queue[None, :7]
    memory_term = plain_similarity_kl(s.flatten(0, 1), keys, t.flatten(0, 1), keys, 0.1) / 8
    assert_close(terms.memory.detach(), memory_term, rtol=1e-5, atol=1e-5)
    assert_close(terms.mse.detach(), F.mse_loss(s, t))


def test_channel_queue_goes_round():
    module = channels()
    for _ in range(3):
        module(features(0, STUDENT), features(1, TEACHER))
    assert module.pointer.item() == 3
    assert_close(module.queue.norm(dim=1), torch.ones(12))


def test_channel_gradcheck_in_float64(in_order):
    module = channels().double().eval()
    student = features(0, STUDENT, torch.float64).requires_grad_()
    teacher = features(1, TEACHER, torch.float64)
    assert torch.autograd.gradcheck(
        lambda feature: sum(copy.deepcopy(module)(feature, teacher)), student
    )


def test_channels_under_autocast_stay_float32():
    module, student = channels(), features(0, STUDENT).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = module(student.bfloat16(), features(1, TEACHER).bfloat16())
    assert {term.dtype for term in terms} == {torch.float32}
    sum(terms).backward()
    assert student.grad.isfinite().all()


def test_channels_name_another_crop():
    with pytest.raises(UserError, match=r"made for 2 positions, but this feature has 2 x 2"):
        channels()(features(0, (2, 3, 8, 8)), features(1, (2, 4, 8, 8)))


def test_attention_block_equals_plain_attention():
    torch.manual_seed(0)
    block, feature = SelfAttentionBlock(6).eval(), features(0, (2, 6, 3, 4))
    q, k, v = (layer(feature).flatten(2) for layer in (block.query, block.key, block.value))
    weights = (q.transpose(1, 2) @ k / 3**0.5).softmax(2)
    attended = (weights @ v.transpose(1, 2)).transpose(1, 2).reshape(2, 3, 3, 4)
    expected = block.join(torch.cat([feature, block.expand(attended)], 1))
    assert_close(block(feature), expected)
    assert block(feature).shape == feature.shape


def test_projection_head_has_the_published_layers():
    shapes = [tuple(p.shape) for p in ProjectionHead(3, 4).parameters()]
    assert shapes == [(4, 3, 1, 1), (4,), (4,), (4, 4, 1, 1)]
