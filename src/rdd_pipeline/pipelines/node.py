"""Kedro's node, for functions of modules that are not imported yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kedro.pipeline import Node as KedroNode

from rdd_pipeline.lazy import Lazy


class Node(KedroNode):
    """A node whose function may be `Lazy`: imported when it is run or looked at.

    Kedro takes parameter types from `func`, Kedro-Viz and notebooks the source: they get the
    function itself. Whether it takes the inputs is seen then, not when the pipeline is made; a
    test asks all of them.
    """

    @property
    def func(self) -> Callable[..., Any]:
        """The function of the node."""
        function: Callable[..., Any] = self._func
        return function.__wrapped__ if isinstance(function, Lazy) else function

    @func.setter
    def func(self, function: Callable[..., Any]) -> None:
        KedroNode.func.fset(self, function)  # type: ignore[attr-defined]

    def _copy(self, **changes: Any) -> Node:
        copied = super()._copy(**changes)
        copied.__class__ = Node  # Kedro's own copies are of its class
        assert isinstance(copied, Node)
        return copied
