"""The network as a `torch.export` program with free batch, height and width, and as a ``.pt2``."""

from __future__ import annotations

import io
import json
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from rdd_pipeline.errors import UserError
from rdd_pipeline.export.module import ExportedNetwork
from rdd_pipeline.export.padding import exportable_padding
from rdd_pipeline.files import write_atomically

# No multiple of anything and no square: what a trace decides by looking at the size (is it a
# multiple of a patch?) is decided for the general case.
_TRACED = (2, 3, 97, 131)


def trace(module: ExportedNetwork) -> ExportedProgram:
    """The module as a graph in which batch, height and width are free.

    Raises:
        UserError: torch cannot follow the network with free sizes.
    """
    free = torch.export.Dim.DYNAMIC
    example = torch.zeros(_TRACED, dtype=module.input_type)
    try:
        with exportable_padding(), torch.no_grad():
            program = torch.export.export(
                module, (example,), dynamic_shapes=({0: free, 2: free, 3: free},), strict=False
            )
        _without_ceil(program)
    except Exception as error:  # torch has dozens of kinds for it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"torch cannot export {module.name} with free height and width ({reason}). Choose "
            "another student, such as a convolutional network or a vit_*."
        ) from error
    return program


def write_program(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the program as a ``.pt2`` archive, whole or not at all.

    Graph and metadata are JSON in it, weights raw bytes. torch's example inputs, the only pickle
    of such an archive, are left out. Note that `torch.export.load` unpickles what *others* put
    there: this project loads no foreign ``.pt2``.

    Raises:
        UserError: The disk is full, for example.
    """
    program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(dict(metadata))})
    write_atomically(path, buffer.getvalue())


class Program:
    """A ``.pt2`` that this process has written, to be compared with the network it came from."""

    def __init__(self, path: Path, module: ExportedNetwork) -> None:
        graph: Any = torch.export.load(path).module()
        if module.output == "mask":
            _return_scores_too(graph)
        self._graph, self._masks = graph, module.output == "mask"

    @torch.no_grad()
    def __call__(self, images_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Class of every pixel (N, H, W) and what it was decided by (N, C, H, W)."""
        if self._masks:
            mask, scores = self._graph(images_N3HW)
            return mask, scores
        scores = self._graph(images_N3HW)
        return scores.argmax(dim=1), scores


def _return_scores_too(graph_module: Any) -> None:
    graph = graph_module.graph
    best = [n for n in graph.nodes if n.target is torch.ops.aten.argmax.default][-1]
    (end,) = (node for node in graph.nodes if node.op == "output")
    (mask,) = end.args[0]
    end.args = ((mask, best.args[0]),)
    # How the flat results are handed back: as they are.
    graph.set_codegen(torch.fx.graph.CodeGen())
    graph_module.recompile()


def _without_ceil(program: ExportedProgram) -> None:
    """``ceil(a / b)`` of sizes as ``(a + b - 1) // b``: torch cannot write the former to a file.

    Not as ``-(-a // b)``: ONNX divides integers towards zero.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is not math.ceil or node.args[0].target is not operator.truediv:
            continue
        a, b = node.args[0].args
        with graph.inserting_before(node):
            raised = _node(graph, operator.add, a, _less_one(graph, b))
            whole = _node(graph, operator.floordiv, raised, b)
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _less_one(graph: Any, value: Any) -> Any:
    return value - 1 if isinstance(value, int) else _node(graph, operator.sub, value, 1)


def _node(graph: Any, function: Any, *args: Any) -> Any:
    node = graph.call_function(function, args)
    node.meta["val"] = function(*(getattr(a, "meta", {"val": a})["val"] for a in args))
    return node
