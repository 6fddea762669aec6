"""Layers for a batch in parts, in one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rdd_pipeline.collectives import ALONE
from rdd_pipeline.training.synchronized import MicroBatches, convert_sync_layers

CPU = torch.device("cpu")


@pytest.mark.parametrize("layer", [nn.Dropout, nn.Dropout2d])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_in_parts_drops_what_it_drops_in_one(layer, layout):
    maps = torch.randn(4, 6, 5, 3).to(memory_format=layout)
    plain = nn.Sequential(layer(0.3))
    torch.manual_seed(5)
    expected = plain(maps)
    parts = MicroBatches(ALONE, 2)
    convert_sync_layers(plain, parts, CPU)
    pieces = []
    for parts.current, piece in enumerate(maps.chunk(2)):
        torch.manual_seed(5)
        pieces.append(plain(piece))
    assert_close(torch.cat(pieces), expected)
    assert_close(torch.cat(pieces) == 0, expected == 0)


def test_nothing_is_dropped_in_evaluation():
    network = nn.Sequential(nn.Dropout(0.5)).eval()
    convert_sync_layers(network, MicroBatches(ALONE, 2), CPU)
    maps = torch.randn(2, 3)
    assert_close(network(maps), maps, rtol=0, atol=0)


def test_one_process_keeps_its_batch_norm():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.1)))
    convert_sync_layers(network, MicroBatches(ALONE, 2), CPU)
    assert type(network[1][0]) is nn.BatchNorm2d
    assert type(network[1][1]) is not nn.Dropout
