"""Names of what is imported only when it is used.

A command that lists pipelines needs to know what there is, not to run it: torch, timm, matplotlib
and MLflow take seconds to import. Tables and wiring therefore name functions of heavy modules with
`Lazy`; modules that compute import at their top, as everywhere.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from typing import Any


@contextmanager
def importing() -> Iterator[None]:
    """The garbage collector rests while large libraries are imported.

    What they make stays, and it would be looked through again and again: a quarter of the time
    that torch and MLflow take.
    """
    rests = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if rests:
            gc.enable()


@cache
def keep_imported() -> None:
    """Spare the garbage collector, once in a process, what has been imported until now."""
    gc.freeze()
    atexit.register(_let_go)


def _let_go() -> None:
    # Triton prints what of its own is left at the end; elsewhere that is two seconds less.
    if "triton" in sys.modules:
        gc.unfreeze()


@dataclass(frozen=True)
class Lazy:
    """A module, function or class by its full name; calling it imports it.

    Attributes of a `Lazy` are `Lazy`, so a package is named once: ``losses = Lazy("mine.losses")``,
    then ``losses.kd.kd_loss``. Whoever asks for signature or source is given that of what it names.
    """

    path: str
    arguments: tuple[Any, ...] = ()
    made: str = ""

    def made_with(self, *arguments: Any, name: str) -> Lazy:
        """Name the function that this one makes of the arguments; `name` is its ``__name__``."""
        return Lazy(self.path, arguments, name)

    @property
    def __name__(self) -> str:
        return self.made or self.path.rpartition(".")[2]

    @cached_property
    def __wrapped__(self) -> Any:
        """What is named. ``inspect`` and Kedro-Viz look here, too.

        Raises:
            ImportError: There is no such module, or a library it needs is missing.
        """
        place, *names = self.path.split(".")
        with importing():
            found: Any = import_module(place)
            for name in names:
                place = f"{place}.{name}"
                if not hasattr(found, name):
                    import_module(place)
                found = getattr(found, name)
        return found(*self.arguments) if self.made else found

    def __getattr__(self, name: str) -> Lazy:
        # Python looks for special methods and for what only functions have.
        if name.startswith("__") or self.made:
            raise AttributeError(name)
        return Lazy(f"{self.path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Import what is named, and call it."""
        return self.__wrapped__(*args, **kwargs)
