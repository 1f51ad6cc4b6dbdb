"""The sockets of this node that were led to endpoints (xdp/bpf/connect.c), as the flow table is of connections.

No packet of theirs is translated, so nothing can be turned when an endpoint goes: the sockets are ended, and their
programs connect anew. The kernel is asked for them in the network namespace of the daemon; those elsewhere stay as
they are.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterable
from ipaddress import IPv6Address
from typing import NamedTuple

import numpy as np

from dataplane.sock_diag import CONNECTED, FAMILIES, SockDiag
from xdp import kernel, schema
from xdp.byteorder import swap16
from xdp.errors import Error
from xdp.names import Names
from xdp.schema import Protocol

Place = tuple[int, int]  # address or name, and port: host numbers

_NOBODY: Place = (-1, 0)  # a place that no Service knows any more
_KINDS = {Protocol.TCP: socket.IPPROTO_TCP, Protocol.UDP: socket.IPPROTO_UDP}


log = logging.getLogger(__name__)

# All of a key but the socket's cookie, which comes first: alike for all sockets that were led from here to there.
_BEHIND_COOKIE = slice(schema.LED["cookie"].itemsize, None)


class Way(NamedTuple):
    """From what sockets have asked for to where they were led, and the keys of these sockets in the table."""

    protocol: int  # with the family, as flows have it
    endpoint: Place
    frontend: Place
    keys: list[bytes]


class LedSockets:
    """The table of such sockets, behind `fd`.

    `why` says what keeps them from being ended, and is empty if nothing does. That is no error of who asks for it:
    flows are ended, and Services change, all the same.
    """

    def __init__(self, fd: int, names: Names) -> None:
        self.why = ""
        self._fd = fd
        self._names = names
        self._lock = threading.Lock()
        self._late: list[bytes] = []  # to be ended, and not seen connected: they may just have been about to be

    def keep_only(self, protocol: int, pairs: Iterable[tuple[Place, Place]]) -> int:
        """End the sockets of a protocol but those of these (frontend, endpoint); return how many. Host numbers."""
        return self._end_strays(self._ways(protocol), pairs)

    def reset_others(self, protocol: int, frontends: Iterable[Place], pairs: Iterable[tuple[Place, Place]]) -> int:
        """End the sockets of these frontends but those of these pairs; return how many."""
        wanted = set(frontends)
        return self._end_strays([way for way in self._ways(protocol) if way.frontend in wanted], pairs)

    def end_at(self, protocol: int, endpoints: Iterable[Place]) -> int:
        """End a protocol's sockets to these endpoints; return how many."""
        places = set(endpoints)
        return self._end([way for way in self._ways(protocol) if way.endpoint in places])

    def look_again(self) -> None:
        """End those that were to be ended and were not found connected, if they are now; then forget them."""
        with self._lock:
            late, self._late = self._late, []
            if late:
                self._destroy(late)

    def _end_strays(self, candidates: list[Way], pairs: Iterable[tuple[Place, Place]]) -> int:
        if not candidates:
            return 0  # there may be very many pairs
        theirs = {(way.frontend, way.endpoint) for way in candidates}
        living = theirs.intersection(pairs)
        return self._end([way for way in candidates if (way.frontend, way.endpoint) not in living])

    def _ways(self, protocol: int) -> list[Way]:
        """Return those of a protocol of flows, with the family; of others than TCP and UDP there are none."""
        if protocol & ~Protocol.IPV6 not in _KINDS:
            return []
        sockets: dict[tuple[bytes, bytes], list[bytes]] = {}
        for key, value in kernel.map_items(self._fd).items():
            sockets.setdefault((key[_BEHIND_COOKIE], value), []).append(key)
        ways = (self._way(keys, value) for (_, value), keys in sockets.items())
        return [way for way in ways if way.protocol == protocol]

    def _way(self, keys: list[bytes], value: bytes) -> Way:
        led, asked = np.frombuffer(keys[0], schema.LED)[0], np.frombuffer(value, schema.VIP)[0]
        address, port = _far_end(led)
        family = 0 if address.ipv4_mapped else Protocol.IPV6
        endpoint, frontend = self._place(address, port), self._place(*_far_end(asked))
        return Way(int(led["protocol"]) | family, endpoint, frontend, keys)

    def _place(self, address: IPv6Address, port: int) -> Place:
        """Return an address as Services' places are given: of IPv6 by its name, which it may have lost."""
        number = int(address.ipv4_mapped) if address.ipv4_mapped else self._names.find(address)
        return (number, port) if number else _NOBODY

    def _end(self, ways: list[Way]) -> int:
        """End sockets that are connected where they were led to; return how many."""
        keys = [key for way in ways for key in way.keys]
        if not keys:
            return 0
        with self._lock:
            found = self._destroy(keys)
            self._late += [key for key in keys if key not in found]
            for key in keys:
                kernel.map_delete(self._fd, key)
        return len(found)

    def _destroy(self, keys: list[bytes]) -> set[bytes]:
        """End the sockets of these keys that are connected where they were led to; return the keys."""
        found: set[bytes] = set()
        try:
            with SockDiag() as diag:
                _destroy(diag, keys, found)
            self.why = ""
        except (Error, OSError) as error:
            self.why = f"sockets whose endpoint has gone are not ended: {error}"
            log.warning("%s", self.why)
        return found


def _destroy(diag: SockDiag, keys: list[bytes], found: set[bytes]) -> None:
    """Do so, and add the keys of those that were there to `found`."""
    rows = np.frombuffer(b"".join(keys), schema.LED)
    wanted: dict[int, list[tuple[bytes, np.void]]] = {}
    for key, row in zip(keys, rows, strict=True):
        wanted.setdefault(int(row["cookie"]), []).append((key, row))
    for kind in {_KINDS[Protocol(protocol)] for protocol in rows["protocol"]}:
        for family in FAMILIES:
            for sock in diag.sockets(family, kind, CONNECTED):
                for key, row in wanted.get(sock.cookie, ()):  # of few of all sockets
                    if sock.far_end == _far_end(row) and diag.destroy(sock, kind):
                        found.add(key)


def _far_end(row: np.void) -> tuple[IPv6Address, int]:
    """Return the address and port of a row of LED or VIP; an IPv4 address is mapped into IPv6."""
    return IPv6Address(row["addr"].tobytes()), swap16(int(row["port"]))
