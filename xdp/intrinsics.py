"""Instructions and calls that numba does not know: how they are declared, and the words that they are made of.

Importing numba takes a quarter of a second of CPU and 50 MB, and a process that finds all its machine code in the cache
needs none of it. What is declared here is nothing but a name until numba asks for its type.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


class _Later:
    """A module that is imported when something in it is wanted."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


ir: Any = _Later("llvmlite.ir")
types: Any = _Later("numba.types")
cgutils: Any = _Later("numba.core.cgutils")


class _Intrinsic:
    """A function of compiled code whose instructions `define` makes."""

    def __init__(self, define: Callable[..., Any]) -> None:
        self._define = define
        functools.update_wrapper(self, define)

    def __call__(self, *_: Any) -> Any:
        """Refuse: there is no code but in its compiled callers."""
        raise NotImplementedError(f"{self._define.__qualname__} is for compiled code")

    @cached_property
    def _made(self) -> Any:
        from numba.extending import intrinsic

        return intrinsic(self._define)

    @cached_property
    def _numba_type_(self) -> Any:
        """Return what compiled code takes this for."""
        from numba.core.registry import cpu_target

        context, made = cpu_target.typing_context, self._made
        context.refresh()  # numba puts what is new on a list
        return context.resolve_value_type(made)


def intrinsic(define: _F) -> _F:
    """Take `define` for what makes the instructions of a function of compiled code: see numba.extending.intrinsic."""
    return _Intrinsic(define)  # type: ignore[return-value]


class External:
    """A function of the C library, called by its symbol; `signature` as numba writes types: `int32(uintp, uint64)`."""

    def __init__(self, symbol: str, signature: str) -> None:
        self._symbol = symbol
        self._signature = signature

    @cached_property
    def _numba_type_(self) -> Any:
        """Return what compiled code takes this for."""
        from numba.core.sigutils import normalize_signature
        from numba.core.typing.templates import signature

        arguments, result = normalize_signature(self._signature)
        return types.ExternalFunction(self._symbol, signature(result, *arguments))
