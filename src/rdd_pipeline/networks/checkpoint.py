"""A trained network in one safetensors file: tensors, architecture, labels, preprocessing."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal, Self

import safetensors.torch
import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor

from rdd_pipeline.config import NetworkParams, Params, Side, TeacherParams
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import json_digest, require_regular_file, write_atomically
from rdd_pipeline.networks.cirkd_names import convert_cirkd_names
from rdd_pipeline.networks.files import (
    check_finite,
    mismatch,
    note_unchecked,
    read_state_dict,
    read_tensor_table,
    some,
)
from rdd_pipeline.networks.foreign import (
    ForeignNetwork,
    ModuleSpec,
    class_order,
    code_of,
    is_permitted,
    load_tensors,
    make_network,
    permit,
)
from rdd_pipeline.networks.network import Network, SegmentationNetwork, network_from_params
from rdd_pipeline.networks.preprocessing import Preprocessing

# safetensors keeps metadata in an unordered map: one key keeps the bytes the same every time.
METADATA_KEY = "rdd_pipeline"
_DIGEST = "digest"
_HEADER_DIGEST = "header_digest"
_OF_THE_DATA = ("colors", "mask_values", "image_size")
"""Fields of the header that say what images and masks were like, and compute nothing."""

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors, by name."""
Byte = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Byte, Byte, Byte]


class NetworkHeader(Params):
    """All of a network but its weights."""

    added: ClassVar[tuple[str, ...]] = ("colors", "mask_values", "image_size", "module")

    format: Literal[1] = Field(1, description="Version of this header.")
    network: NetworkParams
    label_names: tuple[str, ...] = Field(min_length=1, description="One name for each class.")
    preprocessing: Preprocessing
    provenance: dict[str, str] = Field(
        default_factory=dict, description="Where the weights come from; free text by free keys."
    )
    colors: tuple[Color, ...] | None = Field(
        None, description="RGB of each class in pictures; None: a file of an earlier version."
    )
    mask_values: tuple[Byte, ...] | tuple[Color, ...] | None = Field(
        None,
        description="What the data set's masks hold for each class: a value, or a color. None: a "
        "file of an earlier version.",
    )
    image_size: tuple[Side, Side] | None = Field(
        None,
        description="(height, width) images were resized to, so that the network knows them so; "
        "None: they were not, or it is a file of an earlier version.",
    )
    module: ModuleSpec | None = Field(
        None,
        description="What makes the network, where it is of other code: followed only if the user "
        "has named it (`networks.foreign.permit`).",
    )

    @model_validator(mode="after")
    def _one_for_each_class(self) -> Self:
        for name in ("colors", "mask_values"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_classes:
                raise ValueError(f"{len(values)} {name} for {self.num_classes} classes.")
        return self

    @property
    def num_classes(self) -> int:
        """Channels of the logits."""
        return len(self.label_names)

    def architecture(self) -> str:
        """What decides the network's outputs beside the weights, as JSON.

        Left out: the provenance, what images and masks of the data set are like, and where the
        backbone's weights came from before training.
        """
        content = self.model_dump(mode="json", exclude={"provenance", *_OF_THE_DATA})
        for field in ("pretrained", "preprocessing"):
            content["network"].pop(field, None)
        return json.dumps(content, sort_keys=True)


@dataclass(frozen=True, eq=False)
class NetworkCheckpoint:
    """Weights (CPU tensors) and header of a network."""

    tensors: dict[str, Tensor]
    header: NetworkHeader

    @classmethod
    def from_network(
        cls,
        network: SegmentationNetwork,
        *,
        params: NetworkParams,
        label_names: tuple[str, ...],
        preprocessing: Preprocessing | None = None,
        provenance: dict[str, str] | None = None,
    ) -> NetworkCheckpoint:
        """Copy a network's weights to the CPU.

        Args:
            network: it is left as it is.
            params: what it was built from.
            label_names: names of its classes in order.
            preprocessing: None: `Preprocessing.for_network(params)`.
            provenance: free text by free keys.

        Raises:
            UserError: not one label name for each class.
        """
        if len(label_names) != network.num_classes:
            raise UserError(
                f"The network has {network.num_classes} classes, the label set "
                f"{len(label_names)} names. Build the network for the label set."
            )
        header = NetworkHeader(
            network=params,
            label_names=label_names,
            preprocessing=preprocessing or Preprocessing.for_network(params),
            provenance=provenance or {},
        )
        return cls(_copied(network), header)

    @classmethod
    def from_foreign(cls, network: ForeignNetwork, header: NetworkHeader) -> NetworkCheckpoint:
        """Copy the weights of a network of other code to the CPU, in its own names."""
        return cls(_copied(network.module), header)

    def build(self) -> Network:
        """The network with these weights, on the CPU and in evaluation mode.

        Backbone weights are never read or downloaded again.

        Raises:
            UserError: the tensors are not those of the header's architecture, or it is a network of
                other code which the user has not named.
        """
        if self.header.module is not None:
            foreign = make_network(self.header.module, self.header.num_classes)
            load_tensors(foreign, self.tensors, "The checkpoint")
            return foreign
        # Without storage first: what a damaged header asks for may not fit the memory.
        _check_shapes(self.header, _shapes(self.tensors), "The checkpoint")
        # The random start is overwritten: do not let it move the caller's random state.
        with torch.random.fork_rng(devices=[]):
            network = network_from_params(
                self.header.network, num_classes=self.header.num_classes, pretrained=False
            )
        network.load_state_dict(self.tensors)
        return network.eval()

    def to_bytes(self) -> bytes:
        """The safetensors file; equal content gives equal bytes."""
        tensors = {key: value.contiguous() for key, value in self.tensors.items()}
        header = self.header.model_dump(mode="json")
        digests = {_DIGEST: self.digest(), _HEADER_DIGEST: json_digest(header)}
        metadata = {METADATA_KEY: json.dumps({**header, **digests}, sort_keys=True)}
        data: bytes = safetensors.torch.save(tensors, metadata=metadata)
        return data

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "the checkpoint") -> NetworkCheckpoint:
        """Read what `to_bytes` wrote.

        Args:
            data: the file's content.
            source: the file's name for messages.

        Raises:
            UserError: not a network of this project, damaged (a changed bit is noticed), or with
                NaN or infinite weights.
        """
        header, digest, _ = _parse_header(io.BytesIO(data), source)
        try:
            tensors = safetensors.torch.load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise UserError(_damaged(source, str(error))) from error
        checkpoint = cls(tensors, header)
        if digest is None:
            note_unchecked(source)
        elif digest != checkpoint.digest():
            raise UserError(_changed(source, "weights"))
        check_finite(tensors, source)
        return checkpoint

    def digest(self) -> str:
        """SHA-256 over names, shapes, types and bytes of the tensors and the architecture.

        Two checkpoints with one digest compute the same outputs. Provenance is left out.
        """
        state = hashlib.sha256(self.header.architecture().encode())
        for key in sorted(self.tensors):
            tensor = self.tensors[key].contiguous()
            state.update(f"\n{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()


def save_checkpoint(checkpoint: NetworkCheckpoint, path: Path) -> None:
    """Write the file whole or not at all.

    Raises:
        UserError: the disk is full.
    """
    write_atomically(path, checkpoint.to_bytes())


def load_checkpoint(path: Path) -> NetworkCheckpoint:
    """Read a checkpoint of this project.

    Raises:
        UserError: no such file, no network of this project, damaged, or tensors of another
            network (found before they are read); names the file.
    """
    path = require_regular_file(path, "Network checkpoint")
    with path.open("rb") as stream:
        header, _, table = _parse_header(stream, str(path))
    if header.module is None:
        shapes = {name: tuple(entry["shape"]) for name, entry in table.items()}
        _check_shapes(header, shapes, str(path))
    return NetworkCheckpoint.from_bytes(path.read_bytes(), source=str(path))


def import_state_dict(
    tensors: dict[str, Tensor],
    *,
    params: NetworkParams,
    label_names: tuple[str, ...],
    preprocessing: Preprocessing | None = None,
    source: str = "The state dict",
    provenance: dict[str, str] | None = None,
) -> NetworkCheckpoint:
    """Make a checkpoint of bare tensors in this project's names.

    Args:
        tensors: of `SegmentationNetwork.state_dict()`, of any float type.
        params: the architecture they belong to.
        label_names: names of the classes in order.
        preprocessing: None: `Preprocessing.for_network(params)`.
        source: names the origin in messages.
        provenance: free text by free keys.

    Raises:
        UserError: another number of classes, or tensors that do not fit the architecture.
    """
    _check_classes(tensors, label_names)
    expected = _expected(params, len(label_names))
    fault = _fault(expected, _shapes(tensors))
    if fault is not None:
        raise UserError(
            f"{source} does not fit the network {params.name}: {fault}. Set the teacher's network "
            "to the one that was trained, its width and auxiliary head included."
        )
    converted = {key: tensors[key].to(value.dtype).contiguous() for key, value in expected.items()}
    check_finite(converted, source)
    return NetworkCheckpoint(
        converted,
        NetworkHeader(
            network=params,
            label_names=label_names,
            preprocessing=preprocessing or Preprocessing.for_network(params),
            provenance=provenance or {},
        ),
    )


def import_teacher(params: TeacherParams, label_names: tuple[str, ...]) -> NetworkCheckpoint:
    """The checkpoint of a teacher that was trained elsewhere.

    A file of this project brings its own architecture and preprocessing, which win over
    `params.network`. A bare state dict (safetensors or .pth) takes them from `params.network`; a
    published one is fed as its authors did unless `params.network.preprocessing` says otherwise. An
    `image_scale` other than 1 holds for all of them.

    Args:
        params: `weights` or `module` must be given.
        label_names: of the label set the teacher has to know, in order.

    Raises:
        UserError: no such file, unreadable, other classes than the label set's, or weights that
            do not fit the network.
    """
    found = _imported(params, label_names)
    if (scale := params.network.image_scale) == 1.0:
        return found
    header = found.header
    scaled = {
        "network": header.network.model_copy(update={"image_scale": scale}),
        "preprocessing": header.preprocessing.model_copy(update={"scale": scale}),
    }
    return replace(found, header=header.model_copy(update=scaled))


def _imported(params: TeacherParams, label_names: tuple[str, ...]) -> NetworkCheckpoint:
    if params.module is not None:
        return _import_module(params, params.module, label_names)
    if params.weights is None:
        raise UserError("The teacher has no `weights` to import. Set them, or train the teacher.")
    path = require_regular_file(params.weights, "Weights file")
    provenance = {"source": path.name, "format": params.format}
    if params.format == "native" and _is_checkpoint(path):
        checkpoint = load_checkpoint(path)
        _check_labels(checkpoint.header.label_names, label_names, path)
        return checkpoint
    tensors = read_state_dict(path)
    preprocessing = None
    if params.format == "cirkd_names":
        tensors = convert_cirkd_names(tensors, params.network.name)
        if params.network.preprocessing == "auto":
            preprocessing = Preprocessing.caffe_bgr()
    return import_state_dict(
        tensors,
        params=params.network,
        label_names=label_names,
        preprocessing=preprocessing,
        source=f"Weights file {path}",
        provenance=provenance,
    )


def permitted_module(checkpoint: NetworkCheckpoint | None) -> str | None:
    """The reference to the code of a network, if it has one and the user has named it."""
    module = None if checkpoint is None else checkpoint.header.module
    return module.reference if module is not None and is_permitted(module) else None


def _import_module(
    params: TeacherParams, reference: str, label_names: tuple[str, ...]
) -> NetworkCheckpoint:
    """The checkpoint of a teacher that other code makes, which the user has named."""
    permit(reference, params.arguments)
    channels, order = class_order(params.classes, label_names)
    spec = ModuleSpec(
        reference=reference,
        arguments=params.arguments,
        channels=channels,
        order=order,
        code=code_of(reference),
    )
    network = make_network(spec, len(label_names))
    provenance = {"module": reference}
    if params.weights is not None:
        path = require_regular_file(params.weights, "Weights file")
        load_tensors(network, read_state_dict(path), f"Weights file {path}")
        provenance["source"] = path.name
    own = getattr(network.module, "preprocessing", None)
    preprocessing = Preprocessing.for_network(params.network)
    if params.mean is not None and params.std is not None:
        preprocessing = Preprocessing(mean=params.mean, std=params.std)
    elif params.network.preprocessing == "auto":
        preprocessing = Preprocessing.imagenet()
        if isinstance(own, Mapping):
            try:
                preprocessing = Preprocessing.model_validate(own)
            except ValidationError as error:
                fault = error.errors()[0]
                raise UserError(
                    f"The attribute `preprocessing` of what {reference} makes is wrong in "
                    f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}. Correct it, or say "
                    "teacher.mean and teacher.std."
                ) from error
    return NetworkCheckpoint.from_foreign(
        network,
        NetworkHeader(
            network=NetworkParams(name=reference, preprocessing=params.network.preprocessing),
            label_names=label_names,
            preprocessing=preprocessing,
            provenance=provenance,
            module=spec,
        ),
    )


def _copied(module: torch.nn.Module) -> dict[str, Tensor]:
    """Its state dict on the CPU, each tensor with storage of its own."""
    return {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in module.state_dict().items()
    }


def _is_checkpoint(path: Path) -> bool:
    # A bare state dict may be a safetensors file too: only ours has the header.
    try:
        with path.open("rb") as stream:
            return METADATA_KEY in _metadata(read_tensor_table(stream))
    except (OSError, ValueError):
        return False


def _metadata(table: dict[str, Any]) -> dict[str, str]:
    metadata = table.pop("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}


def _parse_header(
    stream: BinaryIO, source: str
) -> tuple[NetworkHeader, str | None, dict[str, Any]]:
    """The header, the digest that the weights must have, and the table of the tensors."""
    try:
        table = read_tensor_table(stream)
    except ValueError as error:
        raise UserError(_damaged(source, str(error))) from error
    metadata = _metadata(table)
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{source} is a safetensors file without this project's header: the network it belongs "
            "to is unknown. Give it as the teacher's `weights` together with the network."
        )
    try:
        content = json.loads(metadata[METADATA_KEY])
        digest, header_digest = content.pop(_DIGEST, None), content.pop(_HEADER_DIGEST, None)
        header = NetworkHeader.model_validate_json(json.dumps(content))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise UserError(
            f"The header of {source} does not fit this version of rdd_pipeline: {some(faults)}."
        ) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(_damaged(source, "its header is no JSON object")) from error
    if header_digest not in (None, json_digest(content)):
        raise UserError(_changed(source, "header"))
    return header, digest, table


def _changed(source: str, part: str) -> str:
    return (
        f"{source} was changed since it was written: its digest does not fit its {part}. Copy it "
        "again; or delete it and its version, so that the version before is used; or repeat the "
        "command that trained it."
    )


def _damaged(source: str, reason: str) -> str:
    return (
        f"{source} is not a readable network checkpoint ({reason[:160]}). Expected a safetensors "
        "file written by this project; copy it again or train again."
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


@lru_cache(maxsize=32)
def _expected(params: NetworkParams, num_classes: int) -> Mapping[str, Tensor]:
    """The tensors of a network, without storage; finding them takes longer than a small network."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = network_from_params(params, num_classes=num_classes, pretrained=False)
    return network.state_dict()


def _check_shapes(header: NetworkHeader, shapes: Shapes, source: str) -> None:
    """Compare tensors with the header's network without taking memory for either."""
    fault = _fault(_expected(header.network, header.num_classes), shapes)
    if fault is not None:
        raise UserError(
            f"{source} does not hold the weights of {header.network.name} with "
            f"{header.num_classes} classes: {fault}. Was it changed, or written by another version "
            "of timm?"
        )


def _fault(expected: Mapping[str, Tensor], shapes: Shapes) -> str | None:
    return mismatch(
        [key for key in expected if key not in shapes],
        [key for key in shapes if key not in expected],
        [
            f"{key} {shapes[key]} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in shapes and shapes[key] != tuple(value.shape)
        ],
    )


def _check_classes(tensors: dict[str, Tensor], label_names: tuple[str, ...]) -> None:
    bias = tensors.get("classifier.bias")
    if bias is not None and bias.ndim == 1 and len(bias) != len(label_names):
        raise UserError(
            f"Teacher has {len(bias)} classes, the label set {len(label_names)}. Choose weights "
            "trained on this label set, or the data set the teacher knows."
        )


def _check_labels(found: tuple[str, ...], expected: tuple[str, ...], path: Path) -> None:
    if len(found) != len(expected):
        raise UserError(
            f"Teacher has {len(found)} classes, the label set {len(expected)}. Choose weights "
            f"trained on this label set instead of {path}, or the data set the teacher knows."
        )
    for index, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        if theirs != ours:
            raise UserError(
                f"Class {index} is {theirs!r} for the teacher in {path} and {ours!r} in the label "
                "set. Choose weights trained on this label set, or the data set the teacher knows."
            )
