"""Checkpoints of the CIRKD and RDD code bases in our names.

Their networks are ours layer by layer; only the names differ. Names are mapped by rule, not by
order, so that a file that sorts its tensors (safetensors does) converts as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rdd_pipeline.errors import UserError
from rdd_pipeline.networks.files import as_state_dict, mismatch
from rdd_pipeline.networks.network import PAPER_NETWORKS, build_network

# Published pattern -> ours. The ResNets' stem is conv1 bn1 conv2 bn2 conv3 bn3, timm's the
# sequence conv1 (0, 1, 3, 4, 6) followed by bn1.
_RESNET = (
    (r"pretrained\.conv1\.", r"backbone.features.conv1.0."),
    (r"pretrained\.bn1\.", r"backbone.features.conv1.1."),
    (r"pretrained\.conv2\.", r"backbone.features.conv1.3."),
    (r"pretrained\.bn2\.", r"backbone.features.conv1.4."),
    (r"pretrained\.conv3\.", r"backbone.features.conv1.6."),
    (r"pretrained\.bn3\.", r"backbone.features.bn1."),
    (r"pretrained\.layer(\d)\.", r"backbone.features.layer\1."),
)
_HEADS = (
    (r"head\.aspp\.b0\.", r"neck.context.convs.0."),
    (r"head\.aspp\.b([123])\.block\.", r"neck.context.convs.\1."),
    (r"head\.aspp\.b4\.gap\.", r"neck.context.convs.4."),
    (r"head\.aspp\.project\.", r"neck.context.project."),
    (r"head\.block\.0\.", r"neck.conv."),
    (r"head\.block\.1\.", r"neck.norm."),
    (r"head\.block\.4\.", r"classifier."),
    (r"head\.classifier\.", r"classifier."),
    (r"auxlayer\.block\.(\d)\.", r"auxiliary.\1."),
)
# MobileNetV2 numbers its 17 blocks through; timm groups them in stages of these lengths.
_MOBILENET_STAGES = (1, 2, 3, 4, 3, 3, 1)
_FIRST_BLOCK = {"0": "conv_dw", "1": "bn1", "3": "conv_pw", "4": "bn2"}
_OTHER_BLOCKS = {
    "0": "conv_pw",
    "1": "bn1",
    "3": "conv_dw",
    "4": "bn2",
    "6": "conv_pwl",
    "7": "bn3",
}
_CLASSIFIERS = ("head.block.4.bias", "head.classifier.bias")


def convert_cirkd_names(state_dict: Mapping[str, object], name: str) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint of those code bases for `build_network(name, ...)`.

    Args:
        state_dict: the file's content: tensors by name, or nested under `state_dict`, `model`
            and the like, with or without `module.` before each name.
        name: one of `PAPER_NETWORKS`.

    Returns:
        Tensors for `SegmentationNetwork.load_state_dict`; the number of classes is the file's.
        The classifier of the backbone (`pretrained.fc`) is left out, batch-norm counters that
        the file lacks are zero.

    Raises:
        UserError: unknown `name`, or a list of what is missing, unexpected or misshaped.
    """
    if name not in PAPER_NETWORKS:
        raise UserError(
            f"No published network is called {name!r}. Choose one of {', '.join(PAPER_NETWORKS)}."
        )
    given = as_state_dict(state_dict, source="The published checkpoint")
    bias = next((given[key] for key in _CLASSIFIERS if key in given), None)
    with torch.device("meta"):
        network = build_network(name, num_classes=19 if bias is None else len(bias))
    expected = network.state_dict()
    converted: dict[str, Tensor] = {}
    unexpected, misshaped = [], []
    for key, tensor in given.items():
        if key.startswith("pretrained.fc."):
            continue
        ours = _rename(key)
        if ours not in expected:
            unexpected.append(key)
        elif tensor.shape != expected[ours].shape:
            wanted = tuple(expected[ours].shape)
            misshaped.append(f"{key} {tuple(tensor.shape)} instead of {wanted}")
        else:
            converted[ours] = tensor
    failed = {_rename(entry.split(" ")[0]) for entry in misshaped}
    missing = []
    for key, tensor in expected.items():
        if key in converted or key in failed:
            continue
        if key.endswith("num_batches_tracked"):
            converted[key] = torch.zeros((), dtype=tensor.dtype)
        else:
            missing.append(key)
    fault = mismatch(missing, unexpected, misshaped)
    if fault is not None:
        raise UserError(
            f"The checkpoint is not one of the published {name}: {fault}. Choose the network it "
            f"was trained as ({', '.join(PAPER_NETWORKS)})."
        )
    return {key: converted[key] for key in expected}


def _rename(key: str) -> str:
    for pattern, ours in (*_RESNET, *_HEADS):
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", ours, key)
    if found := re.match(r"head\.psp\.conv([1-4])\.(.+)", key):
        return f"neck.context.convs.{int(found[1]) - 1}.{found[2]}"
    if found := re.match(r"pretrained\.net\.features\.0\.([01])\.(.+)", key):
        return f"backbone.features.{('conv_stem', 'bn1')[int(found[1])]}.{found[2]}"
    if found := re.match(r"pretrained\.net\.features\.(\d+)\.conv\.(\d)\.(.+)", key):
        number = int(found[1])
        layers = _FIRST_BLOCK if number == 1 else _OTHER_BLOCKS
        stage, block = 0, number - 1
        while stage < len(_MOBILENET_STAGES) and block >= _MOBILENET_STAGES[stage]:
            block -= _MOBILENET_STAGES[stage]
            stage += 1
        layer = layers.get(found[2], "?")
        return f"backbone.features.blocks.{stage}.{block}.{layer}.{found[3]}"
    return f"?{key}"
