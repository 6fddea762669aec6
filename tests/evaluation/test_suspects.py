from __future__ import annotations

import pytest
import torch

from rdd_pipeline.evaluation.predict import Band
from rdd_pipeline.evaluation.suspects import Opinion, find_suspects, opinion


def _sure(classes: torch.Tensor, label: torch.Tensor, margin: float) -> Opinion:
    return Opinion(classes, torch.where((classes != label) & (label != 255), margin, 0.0))


def test_margins_come_from_whole_bands_of_logits_or_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 5, generator=generator)
    label = torch.randint(0, 4, (6, 5), generator=generator).to(torch.uint8)
    label[0] = 255
    probabilities = logits.softmax(0)
    for scores, are_logits in ((logits, True), (probabilities, False)):
        bands = [Band(part, are_logits) for part in scores.split(4, dim=1)]
        found = opinion(bands, label, 255)
        for row in range(6):
            for column in range(5):
                own = probabilities[:, row, column]
                expected = 0.0 if row == 0 else own.max() - own[int(label[row, column])]
                assert found.classes[row, column] == own.argmax()
                assert found.margin[row, column] == pytest.approx(float(expected), abs=1e-6)


def test_regions_are_connected_and_of_one_label_and_one_suggestion() -> None:
    label = torch.zeros(8, 9, dtype=torch.uint8)
    label[:, 6:] = 1
    seen = label.long().clone()
    seen[1:3, 1:4] = 2  # six pixels
    seen[3, 4] = 2  # touches them at a corner
    seen[6, 0] = 2  # apart
    seen[1:3, 7] = 2  # of another label
    found = find_suspects(label, _sure(seen, label, 0.9), _sure(seen, label, 0.6))
    described = [(s.label, s.suggested, s.top, s.left, int(s.mask.sum())) for s in found]
    assert described == [(0, 2, 1, 1, 7), (1, 2, 1, 7, 2), (0, 2, 6, 0, 1)]
    assert [s.score for s in found] == pytest.approx([7 * 0.6, 2 * 0.6, 0.6])
    assert found[0].mask.shape == (3, 4)


def test_what_one_network_confirms_or_sees_otherwise_or_is_ignored_is_no_suspect() -> None:
    label = torch.zeros(4, 4, dtype=torch.uint8)
    label[3] = 255
    ours, theirs = torch.zeros(4, 4, dtype=torch.long), torch.zeros(4, 4, dtype=torch.long)
    ours[0] = 1  # the other network agrees with the label
    ours[1], theirs[1] = 1, 2  # both contradict, with other classes
    ours[3], theirs[3] = 1, 1  # not labeled
    assert find_suspects(label, _sure(ours, label, 0.9), _sure(theirs, label, 0.9)) == []
