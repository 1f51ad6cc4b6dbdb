"""Names of IPv6 addresses as the control plane uses them: numbers that stand where an IPv4 address stands.

A number is a host number here; a __be32 field holds it as it would an address (xdp/byteorder.py: swap32).
"""

from __future__ import annotations

from ipaddress import IPv6Address

import numpy as np

from xdp import naming
from xdp.errors import TableFullError
from xdp.tables import Tables


def words_of(address: IPv6Address) -> tuple[int, int]:
    """Return an address as compiled code takes it: two u64 as they lie in a header."""
    packed = address.packed
    return int.from_bytes(packed[:8], "little"), int.from_bytes(packed[8:], "little")


class Names:
    """The names in `tables`. It keeps nothing itself: there may be several of these."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def find(self, address: IPv6Address) -> int:
        """Return the number of an address, 0 if it has none."""
        return int(naming.find(self._tables, *_as_u64(address)))

    def intern(self, address: IPv6Address) -> int:
        """Return the number of an address, given one if it has none; it stays while flows use it, and a moment.

        TableFullError: there is no room for another name.
        """
        return self._checked(address, int(naming.intern(self._tables, *_as_u64(address))))

    def pin(self, address: IPv6Address) -> int:
        """Return the number of an address as `intern` does; it stays until `release` was called as often."""
        return self._checked(address, int(naming.pin(self._tables, *_as_u64(address))))

    def release(self, number: int) -> None:
        """Take back one `pin`."""
        naming.unpin(self._tables, number)

    def address_of(self, number: int) -> IPv6Address:
        """Return the address that a number stands for."""
        first, second = self._tables.names[number]["addr"]
        return IPv6Address(int(first).to_bytes(8, "little") + int(second).to_bytes(8, "little"))

    def count(self) -> int:
        """Return how many addresses have a name."""
        return int(naming.count(self._tables))

    @staticmethod
    def _checked(address: IPv6Address, number: int) -> int:
        if number == naming.NOBODY:
            raise TableFullError(f"{address}: there is no room for the name of another IPv6 address")
        return number


def _as_u64(address: IPv6Address) -> tuple[np.uint64, np.uint64]:
    first, second = words_of(address)
    return np.uint64(first), np.uint64(second)
