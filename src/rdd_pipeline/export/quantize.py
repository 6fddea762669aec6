"""ONNX with 8-bit weights and activations, calibrated on images, and which layers stay float."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rdd_pipeline.export.onnx_file import INPUT, OnnxProgram, with_outputs

if TYPE_CHECKING:
    from onnx import ModelProto

# Layers with weights, and what stands between them. Resizing, normalizing, softmax and argmax stay
# float: there is nothing to gain, and a mask of 8-bit scores has ties.
QUANTIZED = ["Conv", "Gemm", "MatMul", "Add", "Concat", "Relu", "Clip", "MaxPool"]
WEIGHTED = ("Conv", "Gemm", "MatMul")


def prepare(model: ModelProto) -> ModelProto:
    """The model with shapes inferred and batch norm folded into convolutions, same outputs."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.onnx"), Path(folder, "b.onnx")
        source.write_bytes(model.SerializeToString())
        # Its symbolic shape inference does not know free sizes of all operators.
        quant_pre_process(source, target, skip_symbolic_shape=True)
        return onnx.load(target)


def quantize(
    prepared: ModelProto, images: Sequence[Tensor], *, keep_float: Sequence[str] = ()
) -> ModelProto:
    """The model in 8 bits: QDQ, weights by channel, activations by their range on the images.

    Args:
        prepared: Of `prepare`.
        images: (1, 3, H, W) as the model takes them.
        keep_float: Names of nodes that are left as they are.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "int8.onnx")
        copy = onnx.ModelProto()
        copy.CopyFrom(prepared)
        quantize_static(
            copy,
            target,
            _Images(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTIZED,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(keep_float),
            calibrate_method=CalibrationMethod.MinMax,
            # Attention and PSP's pooling multiply two activations.
            extra_options={"MatMulConstBOnly": True},
        )
        model = onnx.load(target)
    onnx.helper.set_model_props(model, {p.key: p.value for p in prepared.metadata_props})
    return model


def by_damage(prepared: ModelProto, quantized: ModelProto, image: Tensor) -> list[str]:
    """Layers with weights by how much error each of them adds, the worst first.

    The error of a tensor is the norm of its difference to the float model's, relative to that one's
    norm; what a layer adds is the error of its output less that of its input.

    Args:
        prepared: The float model.
        quantized: Made of it.
        image: (1, 3, H, W) as the models take it.
    """
    weights = {tensor.name for tensor in prepared.graph.initializer}
    layers = [
        node
        for node in prepared.graph.node
        if node.op_type in WEIGHTED and node.input[1] in weights
    ]
    known = {name for node in quantized.graph.node for name in node.output}
    tensors = sorted({name for n in layers for name in (n.input[0], n.output[0])} & known)
    results = [
        OnnxProgram(with_outputs(model, tensors))(image)[-len(tensors) :]
        for model in (prepared, quantized)
    ]
    error = {
        name: float((a - b).norm() / a.norm().clamp_min(1e-12))
        for name, a, b in zip(tensors, *results, strict=True)
        if a.is_floating_point()
    }
    damage = {n.name: error.get(n.output[0], 0.0) - error.get(n.input[0], 0.0) for n in layers}
    return sorted(damage, key=lambda name: -damage[name])


class _Images:
    """Calibration images one by one, as onnxruntime asks for them."""

    def __init__(self, images: Sequence[Tensor]) -> None:
        self._left: Iterator[Tensor] = iter(images)
        self._count = len(images)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        image = next(self._left, None)
        return None if image is None else {INPUT: np.ascontiguousarray(image.numpy())}

    def __len__(self) -> int:
        return self._count
