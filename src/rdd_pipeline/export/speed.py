"""What a network costs to run: latency and throughput, eager, compiled, as ONNX and in 8 bits."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdd_pipeline.config import BenchmarkParams, Size
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.cost import measure_cost
from rdd_pipeline.export.latency import measure_latency
from rdd_pipeline.export.module import ExportedNetwork
from rdd_pipeline.export.onnx_file import OnnxProgram, require_onnx, to_onnx, write_onnx
from rdd_pipeline.export.program import trace
from rdd_pipeline.export.quantize import prepare, quantize
from rdd_pipeline.networks.checkpoint import NetworkCheckpoint

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def measure_speed(
    checkpoint: NetworkCheckpoint, size: Size, params: BenchmarkParams
) -> Iterator[Row]:
    """Time a network from RGB bytes to mask, in every way that `params.runtimes` names.

    What does not work here (a compiler is missing, a network does not export) is left out, and one
    line says so.

    Args:
        checkpoint: The network; its weights do not matter.
        size: (height, width) of the images.
        params: Ways, runs, limits.

    Yields:
        ``runtime``, ``device``, ``threads`` (None on a GPU); ``latency`` of one image in ms, with
        its quartiles ``lower`` and ``upper`` and the number of ``runs``; ``throughput`` in images/s
        at ``batch_size``; ``megabytes`` of the weights or of the file; ``parameters`` and ``macs``.
    """
    module = ExportedNetwork(checkpoint)
    cost = measure_cost(module.network, size)
    facts = {"parameters": cost["parameters"], "macs": cost["macs"]}
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    batch = image.expand(params.batch_size, -1, -1, -1).contiguous()
    weights = sum(t.numel() * t.element_size() for t in module.state_dict().values()) / 1e6
    threads = sorted({1, os.cpu_count() or 1})
    with tempfile.TemporaryDirectory() as folder:
        for runtime in params.runtimes:
            try:
                if runtime in ("onnx", "int8"):
                    path = _file(module, runtime, Path(folder, f"{runtime}.onnx"), image)
                    for count in threads:
                        run = OnnxProgram(path, threads=count)
                        row = _timed(run, image, batch, params)
                        place = {"device": "cpu", "threads": count}
                        megabytes = path.stat().st_size / 1e6
                        yield {"runtime": runtime, **place, **row, "megabytes": megabytes, **facts}
                    continue
                for device, used in [*(("cpu", n) for n in threads), *_gpus()]:
                    row = _in_torch(module, runtime, device, used, image, batch, params)
                    place = {"device": device, "threads": used}
                    yield {"runtime": runtime, **place, **row, "megabytes": weights, **facts}
            except Exception as error:  # compilers and exporters raise of all kinds
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
                logger.warning("%s is not timed as %s: %s", module.name, runtime, reason)


def _file(module: ExportedNetwork, runtime: str, path: Path, image: Tensor) -> Path:
    require_onnx()
    model = to_onnx(trace(module), "mask", {})
    write_onnx(model if runtime == "onnx" else quantize(prepare(model), [image]), path)
    return path


def _in_torch(
    module: ExportedNetwork,
    runtime: str,
    device: str,
    threads: int | None,
    image: Tensor,
    batch: Tensor,
    params: BenchmarkParams,
) -> Row:
    with _threads(threads):
        try:
            run: Any = module.to(device)
            if runtime == "compiled":
                run = torch.compile(run, dynamic=False)
            return _timed(run, image.to(device), batch.to(device), params)
        finally:
            module.to("cpu")


def _timed(
    run: Callable[[Tensor], object], image: Tensor, batch: Tensor, params: BenchmarkParams
) -> Row:
    wait = torch.cuda.synchronize if image.device.type == "cuda" else None
    limits = {"warm_up": params.warm_up, "seconds": params.seconds, "synchronize": wait}
    with torch.inference_mode():
        one = measure_latency(lambda: run(image), runs=params.runs, **limits)  # type: ignore[arg-type]
        many = measure_latency(lambda: run(batch), runs=max(params.runs // 4, 3), **limits)  # type: ignore[arg-type]
    return {
        "latency": one.median,
        "lower": one.lower,
        "upper": one.upper,
        "runs": one.runs,
        "throughput": 1000 * len(batch) / many.median,
        "batch_size": len(batch),
    }


def _gpus() -> list[tuple[str, int | None]]:
    return [("cuda", None)] if torch.cuda.is_available() else []


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require_any(rows: list[Row]) -> None:
    """Raise where nothing could be timed."""
    if not rows:
        raise UserError(
            "Nothing could be timed: the warnings above say why. Set benchmark.runtimes to what "
            "works here, such as [eager]."
        )
