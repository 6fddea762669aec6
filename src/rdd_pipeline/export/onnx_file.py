"""The network as an ONNX file, and ONNX Runtime to run it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from rdd_pipeline.errors import UserError
from rdd_pipeline.export.module import Output
from rdd_pipeline.files import write_atomically

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
"""Of ONNX; ONNX Runtime knows it from 1.17 on (February 2024). 18 is the least: antialiasing."""

INPUT = "image"
_FREE = {0: "batch", 2: "height", 3: "width"}


def require_onnx() -> None:
    """Raise a `UserError` where the packages for ONNX are missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"The package {error.name} is missing, which exports need. Install it: pip install "
            "onnx onnxruntime onnxscript (the extra `export`), or export pt2 alone: "
            "--params=export.formats=[pt2]."
        ) from error


def to_onnx(program: ExportedProgram, output: Output, metadata: Mapping[str, str]) -> ModelProto:
    """The program as an ONNX model: input ``image``, one output named as its kind.

    Args:
        program: Of `trace`.
        output: What the program returns.
        metadata: Goes into the file's metadata, text by key.
    """
    import onnx

    with _quiet():
        exported: Any = torch.onnx.export(
            program,
            dynamo=True,
            external_data=False,
            input_names=[INPUT],
            output_names=[output],
            opset_version=OPSET,
            verbose=False,
        )
    model: ModelProto = exported.model_proto
    # Shapes of intermediate results name free sizes as torch did.
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        last = len(value.type.tensor_type.shape.dim) - 1
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                # A mask has no axis of classes.
                dim.dim_param = _FREE[axis if last == 3 or axis == 0 else axis + 1]
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return model


def write_onnx(model: ModelProto, path: Path) -> None:
    """Write the file, whole or not at all."""
    write_atomically(path, model.SerializeToString())


class OnnxProgram:
    """An ONNX file in ONNX Runtime on the CPU.

    Args:
        model: Path or bytes.
        threads: To compute with; None: all.
    """

    def __init__(self, model: Path | bytes, *, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        content = model if isinstance(model, bytes) else str(model)
        self.session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, images_N3HW: Tensor) -> list[Tensor]:
        """All outputs."""
        found = self.session.run(None, {INPUT: images_N3HW.cpu().numpy()})
        return [torch.from_numpy(array) for array in found]


class ComparedOnnx:
    """An ONNX model that also hands out what its mask was decided by, to be compared."""

    def __init__(self, model: ModelProto, *, threads: int | None = None) -> None:
        self._program = OnnxProgram(with_outputs(model, decided_by(model)), threads=threads)

    def __call__(self, images_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Class of every pixel (N, H, W) and what it was decided by (N, C, H, W)."""
        first, *more = self._program(images_N3HW)
        return (first, more[0]) if more else (first.argmax(dim=1), first)


def decided_by(model: ModelProto) -> list[str]:
    """The tensor that the mask is the argmax of; none where scores are the output."""
    best = [node for node in model.graph.node if node.op_type == "ArgMax"]
    return [best[-1].input[0]] if model.graph.output[0].name == "mask" else []


def with_outputs(model: ModelProto, names: list[str]) -> bytes:
    """The model with further tensors, all of floats, as outputs."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name in names:
        copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    data: bytes = copy.SerializeToString()
    return data


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks, none of which is about the network."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
