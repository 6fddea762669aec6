"""What building a network has told, remembered: a run in which nothing is to do builds none.

An answer lies in the work folder under the architecture (`RunStore`), named by all else that
decides it: the versions of this package, torch and timm among it (`drawing.code_digest`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rdd_pipeline.config import NetworkParams
from rdd_pipeline.drawing import code_digest
from rdd_pipeline.files import file_digest, json_digest
from rdd_pipeline.training.store import RunStore


def is_known(network: NetworkParams, work_folder: Path) -> bool:
    """Whether this code has built such a network before, whatever its weights."""
    return _store(network, work_folder).recall(f"built-{code_digest()}") is not None


def told_by(
    network: NetworkParams,
    work_folder: Path,
    decides: Any,
    measure: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """What `measure` tells of a network that it builds; looked up where that is known.

    Where timm is to download the weights it is asked in any case: they may be gone.

    Args:
        network: What is built.
        work_folder: The folder with all work.
        decides: Plain values that decide the answer beside the network, its weights and the code.
        measure: Builds it; what it tells is JSON.

    Raises:
        UserError: As `measure`; that is not remembered.
    """
    path = network.pretrained
    if path is True or (isinstance(path, Path) and not path.is_file()):
        return measure()
    store = _store(network, work_folder)
    weights = file_digest(path) if isinstance(path, Path) else ""
    key = f"network-{json_digest([decides, weights, code_digest()])}"
    told = store.recall(key)
    if told is None or not is_known(network, work_folder):
        told = measure()
        store.describe({"network": network.model_dump(mode="json", exclude={"pretrained"})})
        store.remember(key, told)
        store.remember(f"built-{code_digest()}", {})
    return told


def _store(network: NetworkParams, work_folder: Path) -> RunStore:
    facts = network.model_dump(mode="json", exclude={"pretrained"})
    return RunStore(work_folder, json_digest({"network": facts}))
