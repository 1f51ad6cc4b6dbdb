"""The routes as XDP looks them up: a longest-prefix match map, kept like what is told."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from xdp import kernel
from xdp.addresses import is_ipv6, to_wire
from xdp.schema import PREFIX, Limit, Protocol

# {(network as a number of xdp/addresses.py, prefix length): row of next_hops, or a RouteTarget}
Targets = Mapping[tuple[int, int], int]


class RouteMap:
    """The map behind a descriptor. A successor finds what its predecessor wrote, and changes what differs."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._targets: dict[bytes, int] = {}
        for key in kernel.map_keys(fd, PREFIX.itemsize):
            value = kernel.map_lookup(fd, key, 4)
            self._targets[key] = -1 if value is None else struct.unpack("=I", value)[0]

    def replace(self, targets: Targets) -> None:
        """Have these routes and no others: new ones first, so that what is covered twice never falls to a shorter one.

        KernelError: the map is full; what found no room is not there.
        """
        wanted = {_key(network, length): row for (network, length), row in targets.items()}
        for key, row in wanted.items():
            if self._targets.get(key) != row:
                kernel.map_update(self._fd, key, struct.pack("=I", row))
        for key in self._targets.keys() - wanted.keys():
            kernel.map_delete(self._fd, key)
        self._targets = wanted


def _key(network: int, length: int) -> bytes:
    """Return a prefix as struct prefix has it."""
    family = Protocol.IPV6 if is_ipv6(network) else 0
    return struct.pack("=II16s", Limit.PREFIX_FAMILY_BITS + length, family, to_wire(network))
