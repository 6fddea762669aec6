"""Networks of other code, as teachers: a function that a reference names makes an `nn.Module`.

Running it is running code. So a reference is followed only if the user has named it, in the
parameters or on the command line (`permit`); one that stands in a file of weights is not enough.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rdd_pipeline.config import REFERENCE, Params
from rdd_pipeline.errors import UserError
from rdd_pipeline.files import file_digest, require_regular_file
from rdd_pipeline.networks.files import check_finite, mismatch, some
from rdd_pipeline.networks.network import Network, NetworkOutput
from rdd_pipeline.networks.resizing import bilinear

_permitted: dict[str, list[Mapping[str, Any] | None]] = {}
"""References that the user has named, with the arguments each time; None: whatever they are."""


class ModuleSpec(Params):
    """How a network of other code is made again; part of the header of its weights."""

    reference: str = Field(pattern=REFERENCE)
    arguments: dict[str, JsonValue] = Field({}, description="What else it is called with.")
    channels: int = Field(gt=0, le=65_536, description="What it is called with as num_classes.")
    order: tuple[int, ...] | None = Field(
        None, description="Its channel for each class; None: they are the classes."
    )
    code: str | None = Field(None, description="SHA-256 of the file, of a reference to one.")


class ForeignNetwork(Network):
    """A module of other code, with the outputs of a network of this project.

    Logits may have any stride. What the module does not give has 0 channels (feature, stages) or is
    None (aux_logits). Its state dict is that of the module.

    Args:
        module: Gives logits (N, channels, h, w), or a mapping or object with `logits` and,
            where it has them, `aux_logits` (the same classes), `feature` (N, D, h, w) and `stages`
            (a sequence of (N, C, h, w), of which the last two are used).
        spec: How it was made.
        num_classes: Of the label set.
    """

    def __init__(self, module: nn.Module, spec: ModuleSpec, num_classes: int) -> None:
        super().__init__()
        self.module = module
        self.auxiliary = None
        self.num_classes = num_classes
        self._name = spec.reference
        self._largest = max(spec.order or (0,))
        self._order: Tensor | None
        order = None if spec.order is None else torch.tensor(spec.order)
        self.register_buffer("_order", order, persistent=False)

    def forward(self, images_NCHW: Tensor) -> NetworkOutput:
        """Run on normalized images (N, 3, H, W).

        Raises:
            UserError: The module gives something else than was promised.
        """
        found = self.module(images_NCHW)
        given = _Given(found, self._name, len(images_NCHW))
        logits = given.map("logits")
        if logits is None:
            raise UserError(
                f"{self._name} returned {type(found).__name__}; expected logits (N, classes, h, w),"
                " or a mapping or object with `logits`."
            )
        logits = self._classes(logits)
        aux_logits = given.map("aux_logits")
        if aux_logits is not None:
            aux_logits = self._classes(aux_logits)
            if aux_logits.shape[-2:] != logits.shape[-2:]:
                aux_logits = bilinear(aux_logits, logits.shape[-2:])
        nothing = logits.new_empty((logits.shape[0], 0, *logits.shape[-2:]))
        feature = given.map("feature")
        stages = given.stages() or (nothing, nothing)
        return NetworkOutput(logits, aux_logits, nothing if feature is None else feature, stages)

    def _classes(self, logits: Tensor) -> Tensor:
        channels = logits.shape[1]
        if self._order is None:
            if channels != self.num_classes:
                raise UserError(
                    f"{self._name} gives logits of {channels} classes, the label set has "
                    f"{self.num_classes}. Say by teacher.classes which of them are which, or "
                    "choose weights trained on this label set."
                )
            return logits
        if channels <= self._largest:
            raise UserError(
                f"teacher.classes leads to channel {self._largest}, but {self._name} gives logits "
                f"of {channels} classes, 0 to {channels - 1}."
            )
        return logits.index_select(1, self._order)


class _Given:
    """What a module returned."""

    def __init__(self, found: object, name: str, images: int) -> None:
        self._found, self._name, self._images = found, name, images

    def _value(self, key: str) -> object:
        if isinstance(self._found, Tensor):
            return self._found if key == "logits" else None
        if isinstance(self._found, Mapping):
            return self._found.get(key)
        return getattr(self._found, key, None)

    def map(self, key: str) -> Tensor | None:
        """The maps (N, C, h, w) of that name, None where there are none."""
        return self._checked(key, self._value(key))

    def stages(self) -> tuple[Tensor, Tensor] | None:
        """The last two, None where there are none."""
        stages = self._value("stages")
        if stages is None:
            return None
        if not isinstance(stages, Sequence) or len(stages) < 2:
            raise UserError(
                f"{self._name} gives `stages` as {type(stages).__name__}; expected a list of two "
                "or more maps (N, C, h, w), the last stage of the backbone last."
            )
        early, late = (self._checked("stages", stage) for stage in stages[-2:])
        assert early is not None
        assert late is not None
        return early, late

    def _checked(self, key: str, value: object) -> Tensor | None:
        if value is None and key != "stages":
            return None
        if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
            shown = (
                f"{value.dtype} of the shape {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise UserError(
                f"{self._name} gives `{key}` as {shown}; expected floating-point maps "
                "(N, channels, h, w)."
            )
        if len(value) != self._images or 0 in value.shape:
            raise UserError(
                f"{self._name} gives `{key}` of the shape {tuple(value.shape)} for {self._images} "
                "images; expected maps (N, channels, h, w), as many as images."
            )
        return value


def permit(reference: str, arguments: Mapping[str, Any] | None = None) -> None:
    """Let this process run what a reference names.

    For what the user has said, in the parameters or on the command line; never for what was read
    from a file of weights or sent by another machine.

    Args:
        reference: ``package:function`` or ``path/to/file.py:function``.
        arguments: What it may be called with; None: whatever a file says.
    """
    _permitted.setdefault(reference, []).append(arguments)


def is_permitted(spec: ModuleSpec) -> bool:
    """Whether the user has named this, with these arguments."""
    named = _permitted.get(spec.reference, [])
    return None in named or spec.arguments in named


def make_network(spec: ModuleSpec, num_classes: int) -> ForeignNetwork:
    """Call what the reference names.

    Random weights are the same every time; the caller's random state stays as it is.

    Raises:
        UserError: The user has not named it (`permit`), its file was changed, or it fails.
    """
    _check_permitted(spec)
    function, code = _find(spec.reference)
    if spec.code is not None and code != spec.code:
        raise UserError(
            f"The file of {spec.reference} was changed since these weights were taken from it. "
            "Run the pipeline from its start: it takes the teacher anew."
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module = function(**{"num_classes": spec.channels, **spec.arguments})
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever other code raises
        raise UserError(
            f"{spec.reference} failed with {type(error).__name__}: {_line(error)}. It is called "
            f"with num_classes={spec.channels}"
            + "".join(f", {name}={value!r}" for name, value in spec.arguments.items())
            + "."
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(
            f"{spec.reference} returned {type(module).__name__}; expected an nn.Module."
        )
    empty = [
        name
        for name, value in module.state_dict(keep_vars=True).items()
        if is_lazy(value) or value.is_meta
    ]
    if empty:
        raise UserError(
            f"{spec.reference} returned a module without values in {some(empty)}. Let it make them "
            "on the CPU; lazy modules have to be called once."
        )
    # Weights of 16 bits, too, are computed with as `trainer.precision` says.
    return ForeignNetwork(module.float(), spec, num_classes).eval()


def code_of(reference: str) -> str | None:
    """Digest of the file that a reference leads to; None of an installed package."""
    path = _file(reference)
    return None if path is None else file_digest(path)


def load_tensors(network: ForeignNetwork, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load the tensors of a state dict, of any float type, in the module's names.

    Names with one more prefix, or one less, than the module's are understood.

    Raises:
        UserError: They are not the module's, or hold NaN or infinite values.
    """
    expected = network.module.state_dict()
    given = _with_prefix(dict(tensors), expected)
    fault = mismatch(
        [key for key in expected if key not in given],
        [key for key in given if key not in expected],
        [
            f"{key} {tuple(given[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in given and given[key].shape != value.shape
        ],
    )
    if fault is not None:
        raise UserError(f"{source} does not fit the network that teacher.module makes: {fault}.")
    check_finite(given, source)
    network.module.load_state_dict(given)


def class_order(
    classes: Sequence[int] | Sequence[str] | None, label_names: Sequence[str]
) -> tuple[int, tuple[int, ...] | None]:
    """Channels of a module, and the channel of each class of the label set, of `teacher.classes`.

    Raises:
        UserError: Classes that are missing, named twice, or too many or few numbers.
    """
    if classes is None:
        return len(label_names), None
    doubled = sorted({str(item) for item in classes if list(classes).count(item) > 1})
    if doubled:
        raise UserError(f"teacher.classes names {some(doubled)} more than once.")
    names = [item for item in classes if isinstance(item, str)]
    if names:
        missing = [name for name in label_names if name not in names]
        if missing:
            raise UserError(
                f"teacher.classes lacks {some(missing)} of the label set. It has to name the "
                "teacher's channels in order, by the label set's names where they are its classes."
            )
        return len(names), tuple(names.index(name) for name in label_names)
    order = tuple(int(item) for item in classes)
    if len(order) != len(label_names):
        raise UserError(
            f"teacher.classes has {len(order)} numbers, the label set {len(label_names)} classes. "
            "Give the teacher's channel of each class, in the order of the label set."
        )
    return max(len(order), max(order) + 1), order


def _check_permitted(spec: ModuleSpec) -> None:
    if is_permitted(spec):
        return
    if spec.reference not in _permitted:
        raise UserError(
            f"These weights belong to a network that the code {spec.reference} makes. A file is "
            f"not believed such a thing: if you trust that code, name it yourself, by "
            f"teacher.module={spec.reference} and teacher.arguments, or --teacher-module "
            f"{spec.reference} of `python -m rdd_pipeline.launching`."
        )
    raise UserError(
        f"These weights belong to a network that {spec.reference} makes with the arguments "
        f"{spec.arguments}; teacher.arguments are {_permitted[spec.reference][-1]}. Set them to "
        "that, or run the pipeline from its start: it takes the teacher anew."
    )


def _find(reference: str) -> tuple[Any, str | None]:
    """The function, and the digest of its file if the reference leads to one."""
    place, _, name = reference.rpartition(":")
    path = _file(reference)
    code = None if path is None else file_digest(path)
    try:
        module = importlib.import_module(place) if path is None else _run_file(path, str(code))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever other code raises
        raise UserError(
            f"teacher.module is {reference}, but {place} cannot be imported "
            f"({type(error).__name__}: {_line(error)})."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"teacher.module is {reference}, but {place} has no function {name!r}.")
    return function, code


def _file(reference: str) -> Path | None:
    """The file of a reference; a relative path starts at the project, or at the working folder."""
    place = reference.rpartition(":")[0]
    if not place.endswith(".py"):
        return None
    here = Path.cwd()
    project = next((f for f in (here, *here.parents) if (f / "pyproject.toml").is_file()), here)
    return require_regular_file(project / os.path.expanduser(place), "The file of teacher.module")


def _run_file(path: Path, code: str) -> object:
    name = f"teacher_module_{code[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _with_prefix(given: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not given or not expected or set(given) & set(expected):
        return given
    inner, outer = (
        {name.partition(".")[0] for name in names} for names in (set(given), set(expected))
    )
    longer = {f"{min(outer)}.{name}": value for name, value in given.items()}
    if len(outer) == 1 and set(longer) & set(expected):
        return longer
    if len(inner) == 1:
        return {name.partition(".")[2]: value for name, value in given.items()}
    return given


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
