"""Memory of this process that pieces of the kernel's can be laid over, and words with a cache line of their own."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
import numpy.typing as npt

CACHE_LINE_WORDS = 8
_MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]


class Window:
    """Memory of this process, over which a piece of the kernel's can be laid and taken off again.

    Arrays over it stay valid all the time: after `clear` they see zeros. So a forgotten array neither crashes nor
    keeps a closed socket alive, as its mapping would.
    """

    def __init__(self, length: int) -> None:
        self._memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = np.frombuffer(self._memory, np.uint8)

    def lay(self, fd: int, offset: int) -> None:
        """Show what `fd` maps at `offset`."""
        self._map(mmap.MAP_SHARED | mmap.MAP_POPULATE, fd, offset)

    def clear(self) -> None:
        """Take it off again."""
        self._map(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)

    def _map(self, flags: int, fd: int, offset: int) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = self.bytes.ctypes.data
        if _libc.mmap(address, len(self.bytes), protection, flags | _MAP_FIXED, fd, offset) != address:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def array(self, offset: int, dtype: npt.DTypeLike, count: int) -> npt.NDArray[np.generic]:
        """Return `count` items from a byte offset on."""
        return self.bytes[offset : offset + np.dtype(dtype).itemsize * count].view(dtype)


def line(dtype: npt.DTypeLike = np.uint64) -> npt.NDArray[np.generic]:
    """Return one zero word that shares its cache line with nothing else."""
    words = np.zeros(3 * CACHE_LINE_WORDS, np.uint64)
    skip = -(words.ctypes.data // words.itemsize) % CACHE_LINE_WORDS
    return words[skip : skip + 1].view(dtype)
