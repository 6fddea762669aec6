"""CIRKD: equal to the published numbers, and what the memory bank holds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rdd_pipeline.errors import UserError
from rdd_pipeline.losses.cirkd import CIRKDMemory, cirkd_minibatch_loss
from rdd_pipeline.losses.layers import ProjectionHead
from tests.losses.reference import assert_equal, features
from tests.losses.test_similarity import plain_similarity_kl

STUDENT, TEACHER = (2, 3, 4, 5), (2, 4, 4, 5)


LABELS = torch.randint(0, 3, (2, 8, 10), generator=torch.Generator().manual_seed(0))
LABELS[0, :4] = 255


def memory(**options):
    settings = {"pixel_slots": 40, "region_slots": 6, "pixel_contrast": 20, "region_contrast": 8}
    torch.manual_seed(0)
    return CIRKDMemory(3, 4, 3, **(settings | options))


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


def test_projection_head_has_the_published_layers():
    shapes = [tuple(p.shape) for p in ProjectionHead(3, 4).parameters()]
    assert shapes == [(4, 3, 1, 1), (4,), (4,), (4, 4, 1, 1)]
