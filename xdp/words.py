"""Values as u64 words, which is how compiled code is given them: arrays as their address, shape and strides.

A row of an array, and what has a `kind` and an `address` of its own (xdp/bundle.py), is the word of its address.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable
from typing import Any

import numpy as np

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_INT64_MAX = 0x7FFF_FFFF_FFFF_FFFF
_WHOLE, _BROKEN = (int, np.integer, np.bool_), (float, np.floating)  # bool is an int
_NUMBERS = (*_WHOLE, *_BROKEN)
_DOUBLE, _WORD = struct.Struct("=d"), struct.Struct("=Q")


def kind_of(value: Any) -> Hashable:
    """Return what compiled code is made for: two values of a kind are of the same type to it. TypeError: there is none.

    Its `repr` says all of it, and is the same in every process.
    """
    if isinstance(value, np.ndarray):
        flags = value.flags
        layout = "C" if flags.c_contiguous else "F" if flags.f_contiguous else "A"
        return value.dtype, value.ndim, layout, flags.writeable, flags.aligned
    if isinstance(value, np.void):
        return value.dtype
    if isinstance(value, int) and not isinstance(value, bool):
        return "int" if value <= _INT64_MAX else "unsigned"
    if isinstance(value, _NUMBERS):
        return type(value).__name__
    if hasattr(value, "kind"):
        return value.kind  # type: ignore[no-any-return]
    raise TypeError(f"{value!r} is nothing that compiled code can be given")


def words_of(value: Any) -> tuple[int, ...]:
    """Return the words of a value; as many for all values of a kind."""
    if isinstance(value, np.ndarray):
        return (value.ctypes.data, *value.shape, *[stride & _MASK for stride in value.strides])
    if isinstance(value, _WHOLE):
        return (int(value) & _MASK,)  # a descriptor may be -1
    if isinstance(value, _BROKEN):
        return _WORD.unpack(_DOUBLE.pack(value))
    if isinstance(value, np.void):
        return (np.frombuffer(value, np.uint8).ctypes.data,)
    return (value.address,)
