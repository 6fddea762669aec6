"""Networks of other code, as a user may bring them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from rdd_pipeline.networks import adapters


class Plain(nn.Module):
    """Logits at stride 4, and by `gives` what else; `blind`: cannot do without values."""

    def __init__(self, num_classes: int, gives: str = "", blind: bool = False) -> None:
        super().__init__()
        self.gives, self.blind = gives.split(), blind
        self.early = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.late = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6))
        self.classifier = nn.Conv2d(6, num_classes, 1)
        self.second = nn.Conv2d(4, num_classes, 1)

    def forward(self, images: Tensor) -> object:
        if self.blind and float(images.sum()) > 1e9:
            raise AssertionError
        early = self.early(images)
        late = self.late(early)
        found = {
            "logits": self.classifier(late),
            "aux_logits": self.second(early),
            "feature": late,
            "stages": [images, early, late],
        }
        if not self.gives:
            return found["logits"]
        kept = {name: found[name] for name in ("logits", *self.gives) if name != "object"}
        return SimpleNamespace(**kept) if "object" in self.gives else kept


def plain(num_classes: int, **arguments: object) -> nn.Module:
    return Plain(num_classes, **arguments)


def no_module(num_classes: int) -> str:
    return f"{num_classes} classes"


def failing(num_classes: int) -> nn.Module:
    raise OSError("the disk is gone\nand more")


def leaving(num_classes: int) -> nn.Module:
    raise SystemExit(3)


def unfinished(num_classes: int, kind: str) -> nn.Module:
    if kind == "lazy":
        return nn.LazyConv2d(num_classes, 1)
    if kind == "meta":
        return nn.Conv2d(3, num_classes, 1, device="meta")
    module = Plain(num_classes)
    module.preprocessing = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 0.0, 1.0)}
    return module


def of_16_bits(num_classes: int) -> nn.Module:
    return Plain(num_classes).half()


class _Wrong(nn.Module):
    def __init__(self, found: object) -> None:
        super().__init__()
        self.found = found

    def forward(self, images: Tensor) -> object:
        return self.found


def wrong(num_classes: int, *, kind: str) -> nn.Module:
    maps = torch.zeros(1, num_classes, 2, 2)
    return _Wrong(
        {
            "none": {"out": maps},
            "labels": maps.argmax(1),
            "whole": maps.long(),
            "one stage": {"logits": maps, "stages": [maps]},
        }[kind]
    )


SEGFORMER = {
    "model_type": "segformer",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
UPERNET = {
    "model_type": "upernet",
    "backbone_config": {
        "model_type": "convnext",
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "out_features": _STAGES,
    },
    "hidden_size": 16,
    "auxiliary_in_channels": 16,
    "auxiliary_channels": 8,
}
MASK2FORMER = {
    "model_type": "mask2former",
    "backbone_config": {
        "model_type": "swin",
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
        "window_size": 4,
        "out_features": _STAGES,
    },
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "dim_feedforward": 16,
    "num_queries": 5,
}
"""Configurations of transformers, as small as they can be."""


class _SecondHead(nn.Module):
    def __init__(self, teacher: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.teacher = teacher
        self.second = nn.LazyConv2d(num_classes, 1)
        self(torch.zeros(1, 3, 32, 32))

    def forward(self, images: Tensor) -> dict[str, object]:
        found = self.teacher(images)
        return {**found, "aux_logits": self.second(found["stages"][0])}


def with_second_head(num_classes: int, *, of: str, **arguments: object) -> nn.Module:
    """What somebody writes whose teacher has one, around an adapter."""
    teacher = getattr(adapters, of)(num_classes, **arguments)
    return _SecondHead(teacher.eval(), num_classes)
