"""From network byte order as it lies in memory to host numbers, and back: each is its own way back.

A field that C declares __be16 or __be32 is read as a number with its bytes turned round. `swap16` and `swap32` are for
Python, `swapped16` and `swapped32` for compiled code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from xdp.jit import inlined

Word = int | npt.NDArray[Any] | np.integer[Any]


def swap16(value: Word) -> int:
    """Return a port of the tables as a host number, or a host number as the tables have it."""
    return int.from_bytes(int(value).to_bytes(2, "little"), "big")


def swap32(value: Word) -> int:
    """Return an address of the tables as a host number, or a host number as the tables have it."""
    return int.from_bytes(int(value).to_bytes(4, "little"), "big")


@inlined
def swapped16(value: Any) -> Any:
    """Return the u16 with the bytes of `value` turned round."""
    return np.uint16((value & 0xFF) << 8 | value >> 8 & 0xFF)


@inlined
def swapped32(value: Any) -> Any:
    """Return the u32 with the bytes of `value` turned round."""
    return np.uint32((value & 0xFF) << 24 | (value & 0xFF00) << 8 | value >> 8 & 0xFF00 | value >> 24 & 0xFF)


@inlined
def swapped64(value: Any) -> Any:
    """Return the u64 with the bytes of `value` turned round."""
    low, high = swapped32(value & np.uint64(0xFFFFFFFF)), swapped32(value >> np.uint64(32))
    return np.uint64(low) << np.uint64(32) | np.uint64(high)
