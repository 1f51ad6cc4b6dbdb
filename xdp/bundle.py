"""Many arrays as one argument of compiled code.

numba passes a tuple of arrays by value: twenty arrays are some hundred and fifty words at every call, and every
function that hands them on is compiled with all of them. A `Bundle` is one pointer, to a table of addresses and shapes;
what a function does not touch costs it nothing. In compiled code its fields read as in Python:
`tables.flows[slot].state`.

Fields may be arrays (of one or two dimensions), other bundles, or u64 numbers. They are fixed once made, borrowed by
compiled code, and live as long as the bundle.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from xdp.intrinsics import intrinsic, types
from xdp.words import kind_of, words_of

WORDS = 8  # per field, of which it uses those that it has: up to five


@dataclass(frozen=True, eq=False)
class BundleKind:
    """What the bundles of a class are whose fields are of the same kinds; there is one object for all of them."""

    name: str
    members: tuple[tuple[str, Hashable], ...]


_kinds: dict[tuple[str, tuple[tuple[str, Hashable], ...]], BundleKind] = {}


class Bundle:
    """Base of a frozen dataclass whose instances are one argument for compiled code."""

    address: int

    def __post_init__(self) -> None:
        """Write down where the fields are."""
        names = self._names()
        words = np.zeros((len(names), WORDS), np.uint64)
        for row, name in zip(words, names, strict=True):
            of_field = words_of(getattr(self, name))
            row[: len(of_field)] = of_field
        object.__setattr__(self, "_words", words)
        object.__setattr__(self, "address", words.ctypes.data)

    def _names(self) -> list[str]:
        return [field.name for field in fields(self)]  # type: ignore[arg-type]

    @cached_property
    def kind(self) -> BundleKind:
        """What it is to compiled code."""
        what = type(self).__name__, tuple((name, kind_of(getattr(self, name))) for name in self._names())
        return _kinds.setdefault(what, BundleKind(*what))

    @cached_property
    def _numba_type_(self) -> Any:
        from xdp.bundling import type_of

        return type_of(type(self).__name__, {name: getattr(self, name) for name in self._names()})


@intrinsic
def bundle_at(typing_context, like, address):
    """Return the bundle at `address` (u64), one of the same class and types as `like`: for arrays of bundles."""

    def generate(context, builder, signature, args):
        from xdp.bundling import bundle_from

        return bundle_from(builder, context.cast(builder, args[1], signature.args[1], types.uint64))

    return like(like, address), generate
