"""What MLflow loads of a logged network: images in, masks out.

MLflow's ``loader_module``: the model's folder names it, and holds a copy of this package.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from numpy.typing import NDArray

from rdd_pipeline.errors import UserError
from rdd_pipeline.inference.model import Model, load

COLUMN = "image"
"""Name of the one column of a table of encoded images."""

EXPECTED = (
    "images as an array (N, H, W, 3) of 0..255, or encoded ones (PNG, JPEG, ...): bytes or their "
    f"base64, in a list or in the column {COLUMN!r}"
)


class ServedNetwork:
    """A network behind MLflow's ``predict``."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def predict(
        self, model_input: Any, params: Mapping[str, Any] | None = None
    ) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """Class of every pixel: positions in the network's label names.

        Args:
            model_input: An array (N, H, W, 3), or encoded images, each as bytes or base64, in a
                list, a one-dimensional array, or the column ``image`` of a table or mapping.
            params: None are known.

        Returns:
            (N, H, W) uint8 for an array, a list of (H_i, W_i) for encoded images.

        Raises:
            MlflowException: These are no images; a server answers with status 400.
        """
        try:
            images = _images(model_input)
            if isinstance(images, np.ndarray):
                return np.asarray(self._model(images))
            return list(self._model([*images]))
        except UserError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error


def _load_pyfunc(data_path: str) -> ServedNetwork:
    """Called by MLflow with the path of the safetensors file in the model's folder."""
    return ServedNetwork(load(data_path))


def _images(given: Any) -> NDArray[Any] | list[bytes]:
    if isinstance(given, pd.DataFrame | Mapping):
        names = list(given)
        if names != [COLUMN]:
            raise UserError(f"The input has the columns {names}, expected {EXPECTED}.")
        column = given[COLUMN]
        given = column if isinstance(column, str | bytes | np.ndarray) else list(column)
    if isinstance(given, np.ndarray) and given.ndim == 4:
        if given.dtype == np.dtype(object) or given.shape[3] != 3 or 0 in given.shape:
            raise UserError(
                f"The input is an array of shape {given.shape} and type {given.dtype}, expected "
                f"{EXPECTED}."
            )
        return given
    if isinstance(given, np.ndarray) and given.ndim <= 1:
        given = given.reshape(-1).tolist()
    if isinstance(given, str | bytes):
        given = [given]
    if not isinstance(given, list) or not given:
        what = "empty" if isinstance(given, list) else "no list"
        if isinstance(given, np.ndarray):
            what = f"an array of shape {given.shape}"
        raise UserError(f"The input is {what}, expected {EXPECTED}.")
    return list(_decoded(given))


def _decoded(images: Iterable[Any]) -> Iterable[bytes]:
    for number, image in enumerate(images, start=1):
        if isinstance(image, str):
            try:
                image = base64.b64decode(image, validate=True)
            except (binascii.Error, ValueError) as error:
                raise UserError(f"Image {number} is no base64 ({error}).") from error
        if not isinstance(image, bytes):
            raise UserError(f"Image {number} is {type(image).__name__}, expected {EXPECTED}.")
        yield image
