"""A trained network for use: ``model = rdd_pipeline.load(FILE)``, ``mask = model(image)``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rdd_pipeline.data.layouts.base import distinct_colors
from rdd_pipeline.data.reading import FULL_BITS, resize_image
from rdd_pipeline.errors import UserError
from rdd_pipeline.evaluation.predict import OVERLAP, Average, score_bands
from rdd_pipeline.inference.files import find_network
from rdd_pipeline.inference.inputs import ImageLike, Images, as_rgb, is_batch
from rdd_pipeline.networks import NetworkCheckpoint, load_checkpoint
from rdd_pipeline.training.device import resolve_device, resolve_precision

Window = int | tuple[int, int] | Literal["auto"] | None
"""Side of a square window, (rows, columns), `auto` (see `window_for`) or None: whole images."""
WHOLE_UP_TO = 2**22
"""Pixels of an image that `auto` gives to the network as a whole: 2048 x 2048."""
AUTO_WINDOW = (1024, 1024)
"""The window of larger ones."""

Mask = NDArray[np.uint8]


class Prediction(NamedTuple):
    """What a network says of one image of H x W pixels."""

    mask: Mask
    """(H, W) uint8: position of the class in `Model.label_names`."""
    confidence: NDArray[np.float32]
    """(H, W): probability of that class."""
    probabilities: NDArray[np.float32] | None
    """(C, H, W), where they were asked for."""


class Strip(NamedTuple):
    """The same of some whole rows of an image, on the device."""

    image: int
    """Its position in the batch."""
    mask: Tensor
    """(rows, W) uint8."""
    confidence: Tensor
    """(rows, W) float32."""
    probabilities: Tensor
    """(C, rows, W) float32."""


def load(
    path: str | os.PathLike[str],
    *,
    seed: int | str | None = None,
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "float32",
) -> Model:
    """Load a trained network: ``mask = rdd_pipeline.load("student.safetensors")("photo.jpg")``.

    Nothing in the file is run.

    Args:
        path: A checkpoint of this project, or a folder of the catalog such as
            ``data/06_models/scenes/student_tse``, of which the newest version is read.
        seed: Which of several seeds a folder holds; None: the first one.
        device: auto (a GPU where there is one), cpu, cuda, cuda:N or mps.
        precision: float32, as networks are evaluated; bfloat16, or auto, which takes it where the
            device has it in hardware.

    Raises:
        UserError: There is no network of this project, it is damaged, or no such device.
    """
    return Model(load_checkpoint(find_network(path, seed)), device=device, precision=precision)


class Model:
    """A network with everything that is needed to use it.

    Attributes:
        network: The module, in eval mode and on the device; returns a tuple with `logits`.
        header: All of the checkpoint but its weights.
        preprocessing: What the network is fed.
        label_names: Names of the classes, by the values of a mask.
        colors: RGB of each class.
        provenance: Where the weights come from.
        digest: Of what decides its outputs.
        device: Where it computes.
        precision: Autocast type; None: float32.
        image_size: (height, width) images are resized to for the network, as in training; masks
            have the images' own size. None: they are not. It may be changed.
        bits: Bits of the values of 16-bit gray files, as `data.bits`. It may be changed.
    """

    def __init__(
        self,
        checkpoint: NetworkCheckpoint,
        *,
        device: str = "auto",
        precision: Literal["auto", "float32", "bfloat16"] = "float32",
    ) -> None:
        """See `load`.

        Raises:
            UserError: No such device or precision, or the weights are not those of the header's
                network.
        """
        if precision not in ("auto", "float32", "bfloat16"):
            raise UserError(f"precision is {precision!r}, expected auto, float32 or bfloat16.")
        self.device = resolve_device(device)
        chosen = resolve_precision(precision, self.device)
        self.precision = torch.bfloat16 if chosen == "bfloat16" else None
        self.digest = checkpoint.digest()
        self.network = checkpoint.build().to(self.device)
        self.header = checkpoint.header
        self.preprocessing = self.header.preprocessing
        self.label_names = self.header.label_names
        self.provenance = self.header.provenance
        self.image_size = self.header.image_size
        self.bits = FULL_BITS
        self.colors = self.header.colors or distinct_colors(len(self.label_names) + 1)[1:]
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self.colors)] = self.colors
        self._palette = palette

    def __repr__(self) -> str:
        name, classes = self.header.network.name, len(self.label_names)
        return f"Model({name}, {classes} classes, {self.device})"

    @overload
    def __call__(self, images: list[ImageLike] | tuple[ImageLike, ...]) -> list[Mask]: ...
    @overload
    def __call__(self, images: ImageLike) -> Mask: ...
    def __call__(self, images: Images) -> Mask | list[Mask]:
        """Class of every pixel: positions in `label_names`.

        Args:
            images: A path, a file's content, a Pillow image, an array (H, W, 3) or (H, W), a tensor
                (3, H, W); several of them in a list, an array (N, H, W, 3) or a tensor
                (N, 3, H, W). Large ones are predicted by a sliding window, see `window_for`.

        Returns:
            uint8 (H, W), a list of them for a list, (N, H, W) for an array or tensor of several.

        Raises:
            DataProblem: A file cannot be read or decoded.
            UserError: Something is no image.
        """
        if not is_batch(images):
            return _joined(self.strips(self._rgb(images)[None]))  # type: ignore[arg-type]
        masks = [_joined(self.strips(self._rgb(image)[None])) for image in _each(images)]
        if isinstance(images, list | tuple):
            return masks
        if not masks:
            raise UserError(f"A batch of shape {tuple(images.shape)} holds no image.")  # type: ignore[union-attr]
        return np.stack(masks)

    def predict(
        self,
        image: ImageLike,
        *,
        probabilities: bool = False,
        window: Window = "auto",
        overlap: float = OVERLAP,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        average: Average = "softmax",
    ) -> Prediction:
        """Mask and confidence of one image, and the probabilities of all classes.

        Args:
            image: As for a call.
            probabilities: Also return those of every class, 4 bytes each.
            window: Large images are predicted in windows of this size, blended where they overlap.
            overlap: Share of a window that the next one covers too, at least.
            scales: Each one is a pass, with the image resized by this factor.
            flip: Also pass the mirrored image.
            average: What several passes average: class probabilities or logits.

        Raises:
            DataProblem: A file cannot be read or decoded.
            UserError: It is no image, or an argument is out of range.
        """
        masks, confidences, scores = [], [], []
        for strip in self.strips(
            self._rgb(image)[None],
            window=window,
            overlap=overlap,
            scales=scales,
            flip=flip,
            average=average,
        ):
            masks.append(strip.mask.cpu())
            confidences.append(strip.confidence.cpu())
            if probabilities:
                scores.append(strip.probabilities.cpu())
        return Prediction(
            torch.cat(masks).numpy(),
            torch.cat(confidences).numpy(),
            torch.cat(scores, dim=1).numpy() if probabilities else None,
        )

    @torch.inference_mode()
    def strips(
        self,
        images: Tensor,
        *,
        window: Window = "auto",
        overlap: float = OVERLAP,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        average: Average = "softmax",
    ) -> Iterator[Strip]:
        """Predictions from top to bottom of one image after the other, in bounded memory.

        Args:
            images: (N, 3, H, W) uint8, RGB.
            window: As for `predict`.
            overlap: As for `predict`.
            scales: As for `predict`.
            flip: As for `predict`.
            average: As for `predict`.

        Raises:
            UserError: An argument is out of range.
        """
        if not 0 <= overlap < 1:
            raise UserError(f"overlap is {overlap}, expected 0 up to below 1.")
        if not scales or not all(0 < scale < math.inf for scale in scales):
            raise UserError(
                f"scales are {tuple(scales)}, expected factors above 0, such as (1.0,)."
            )
        size = (images.shape[-2], images.shape[-1])
        if self.image_size is not None:
            images = torch.stack([resize_image(image, self.image_size) for image in images])
        each = score_bands(
            self.network,
            self.preprocessing,
            images.to(self.device, non_blocking=True),
            sizes=[size] * len(images),
            scales=scales,
            flip=flip,
            average=average,
            precision=self.precision,
            window=window_for((images.shape[-2], images.shape[-1]), window),
            overlap=overlap,
        )
        for number, bands in enumerate(each):
            for band in bands:
                probabilities = band.probabilities()
                yield Strip(
                    number,
                    band.scores.argmax(dim=0).to(torch.uint8),
                    probabilities.amax(dim=0),
                    probabilities,
                )

    def colored(self, mask: Mask) -> Image.Image:
        """The mask (H, W) in the colors of its classes; values that are no class are black."""
        return Image.fromarray(self._palette[_checked(mask)])

    def overlay(self, image: ImageLike, mask: Mask, *, opacity: float = 0.5) -> Image.Image:
        """The image below its colored mask (H, W).

        Raises:
            DataProblem: A file cannot be read or decoded.
            UserError: It is no image, or of another size than the mask.
        """
        pixels = self._rgb(image).permute(1, 2, 0).numpy()
        if pixels.shape[:2] != _checked(mask).shape:
            raise UserError(
                f"The mask has {mask.shape[0]} x {mask.shape[1]} pixels, the image "
                f"{pixels.shape[0]} x {pixels.shape[1]}. Give the image it was predicted for."
            )
        return Image.blend(Image.fromarray(pixels), self.colored(mask), opacity)

    def _rgb(self, image: ImageLike) -> Tensor:
        return as_rgb(image, bits=self.bits)


def window_for(size: tuple[int, int], window: Window) -> tuple[int, int] | None:
    """(rows, columns) of the window for an image of this size; None: it is predicted as a whole.

    `auto`: whole up to `WHOLE_UP_TO` pixels, `AUTO_WINDOW` beyond.

    Raises:
        UserError: The window has no pixels, or is no window.
    """
    if window == "auto":
        return AUTO_WINDOW if size[0] * size[1] > WHOLE_UP_TO else None
    if window is None:
        return None
    sides = (window, window) if isinstance(window, int) else window
    if not isinstance(sides, tuple | list) or [type(side) for side in sides] != [int, int]:
        raise UserError(
            f"window is {window!r}, expected 'auto', None, a side in pixels or (rows, columns)."
        )
    rows, columns = sides
    if rows < 1 or columns < 1:
        raise UserError(f"window is {rows} x {columns} pixels, expected at least 1 x 1.")
    return rows, columns


def _joined(strips: Iterator[Strip]) -> Mask:
    mask: Mask = torch.cat([strip.mask.cpu() for strip in strips]).numpy()
    return mask


def _each(images: Images) -> Iterator[ImageLike]:
    yield from images  # type: ignore[misc]


def _checked(mask: Mask) -> Mask:
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise UserError(
            f"The mask is {mask.dtype} of shape {mask.shape}, expected uint8 of shape (H, W)."
        )
    return mask
