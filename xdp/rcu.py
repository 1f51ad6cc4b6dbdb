"""Grace periods of the kernel's RCU: after one, no XDP run that was in flight still is."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

from xdp import kernel
from xdp.syscalls import MEMBARRIER, failure, ffi, libc

_QUERY, _GLOBAL = 0, 1  # enum membarrier_cmd


def wait_for_grace() -> None:
    """Return when every CPU has been through a quiescent state: no XDP run that was in flight still is. About 14 ms.

    A kernel with nohz_full CPUs, or built without membarrier(2), has no MEMBARRIER_CMD_GLOBAL. It waits just as long
    before an update of a map inside a map returns, for the sake of whoever reads the old one: so this updates one.
    """
    _grace_period()()


@functools.cache
def _grace_period() -> Callable[[], None]:
    """Return what waits for a grace period of RCU on this kernel."""
    offered = _membarrier(_QUERY)
    if offered > 0 and offered & _GLOBAL:
        return _membarrier_grace
    return map_of_maps_grace()


def _membarrier(command: int) -> int:
    return int(libc.syscall(MEMBARRIER, ffi.cast("int", command), ffi.cast("unsigned int", 0)))


def _membarrier_grace() -> None:
    if _membarrier(_GLOBAL) < 0:
        raise failure("membarrier", ffi.errno)


def map_of_maps_grace() -> Callable[[], None]:
    """Return a function that waits for a grace period of RCU by replacing the one map inside a map of its own."""
    key, inner = struct.pack("=I", 0), kernel.map_create("inner", 4, 4, 1)
    outer = kernel.map_create("grace", 4, 4, 1, map_type=kernel.ARRAY_OF_MAPS, inner_fd=inner)
    return functools.partial(kernel.map_update, outer, key, struct.pack("=I", inner))
