"""The sockets of this node that were led to endpoints (xdp/bpf/connect.c), as the flow table is of connections.

No packet of theirs is translated, so nothing can be turned when an endpoint goes: the sockets are ended, and their
programs connect anew. The kernel is asked for them in the network namespace of the daemon; those elsewhere stay as
they are.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable
from ipaddress import IPv6Address
from typing import NamedTuple, Self

import numpy as np

from dataplane import sock_diag
from dataplane.sock_diag import FAMILIES, SockDiag
from xdp import kernel, schema
from xdp.byteorder import swap16
from xdp.names import Names
from xdp.schema import Protocol

Place = tuple[int, int]  # address or name, and port: host numbers

_NOBODY: Place = (-1, 0)  # a place that no Service knows any more
_KINDS = {Protocol.TCP: socket.IPPROTO_TCP, Protocol.UDP: socket.IPPROTO_UDP}
_CONNECTED = sock_diag.bits(
    sock_diag.ESTABLISHED,
    sock_diag.SYN_SENT,
    sock_diag.FIN_WAIT1,
    sock_diag.FIN_WAIT2,
    sock_diag.CLOSE_WAIT,
    sock_diag.LAST_ACK,
    sock_diag.CLOSING,
)  # of a UDP socket that is connected: established


class Led(NamedTuple):
    """A socket, where it was led to, and what it had asked for."""

    key: bytes  # in the table
    protocol: int  # with the family, as flows have it
    cookie: int
    far_end: tuple[IPv6Address, int]  # IPv4 addresses are mapped
    endpoint: Place
    frontend: Place


class LedSockets:
    """The table of such sockets, behind `fd`. A context manager."""

    def __init__(self, fd: int, names: Names) -> None:
        self._fd = fd
        self._names = names
        self._diag = SockDiag()
        self._lock = threading.Lock()
        self._late: list[Led] = []  # to be ended, and not seen connected: they may just have been about to be

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._diag.close()

    def keep_only(self, protocol: int, pairs: Iterable[tuple[Place, Place]]) -> int:
        """End the sockets of a protocol but those of these (frontend, endpoint); return how many. Host numbers."""
        return self._end_strays(self._sockets(protocol), pairs)

    def reset_others(self, protocol: int, frontends: Iterable[Place], pairs: Iterable[tuple[Place, Place]]) -> int:
        """End the sockets of these frontends but those of these pairs; return how many."""
        wanted = set(frontends)
        return self._end_strays([each for each in self._sockets(protocol) if each.frontend in wanted], pairs)

    def end_at(self, protocol: int, endpoints: Iterable[Place]) -> int:
        """End a protocol's sockets to these endpoints; return how many."""
        places = set(endpoints)
        return self._end([each for each in self._sockets(protocol) if each.endpoint in places])

    def look_again(self) -> None:
        """End those that were to be ended and were not found connected, if they are now; then forget them."""
        with self._lock:
            late, self._late = self._late, []
            if late:
                self._destroy(late)

    def _end_strays(self, candidates: list[Led], pairs: Iterable[tuple[Place, Place]]) -> int:
        if not candidates:
            return 0  # there may be very many pairs
        theirs = {(each.frontend, each.endpoint) for each in candidates}
        living = theirs.intersection(pairs)
        return self._end([each for each in candidates if (each.frontend, each.endpoint) not in living])

    def _sockets(self, protocol: int) -> list[Led]:
        """Return those of a protocol of flows, with the family; of others than TCP and UDP there are none."""
        if protocol & ~Protocol.IPV6 not in _KINDS:
            return []
        items = kernel.map_items(self._fd)
        keys, values = np.frombuffer(b"".join(items), schema.LED), np.frombuffer(b"".join(items.values()), schema.VIP)
        of_protocol = keys["protocol"] == protocol & ~Protocol.IPV6
        found = [self._led(*pair) for pair in zip(keys[of_protocol], values[of_protocol], strict=True)]
        return [each for each in found if each.protocol == protocol]

    def _led(self, key: np.void, value: np.void) -> Led:
        address, port = IPv6Address(key["addr"].tobytes()), swap16(int(key["port"]))
        family = 0 if address.ipv4_mapped else Protocol.IPV6
        asked = self._place(IPv6Address(value["addr"].tobytes()), swap16(int(value["port"])))
        endpoint = self._place(address, port)
        return Led(key.tobytes(), int(key["protocol"]) | family, int(key["cookie"]), (address, port), endpoint, asked)

    def _place(self, address: IPv6Address, port: int) -> Place:
        """Return an address as Services' places are given: of IPv6 by its name, which it may have lost."""
        number = int(address.ipv4_mapped) if address.ipv4_mapped else self._names.find(address)
        return (number, port) if number else _NOBODY

    def _end(self, ended: list[Led]) -> int:
        """End sockets that are connected where they were led to; return how many."""
        if not ended:
            return 0
        with self._lock:
            found = self._destroy(ended)
            self._late += [each for each in ended if each not in found]
            for each in ended:
                kernel.map_delete(self._fd, each.key)
        return len(found)

    def _destroy(self, ended: list[Led]) -> list[Led]:
        by_cookie = {(each.cookie, each.far_end): each for each in ended}
        found = []
        for kind in {_KINDS[Protocol(each.protocol & ~Protocol.IPV6)] for each in ended}:
            for family in FAMILIES:
                for sock in self._diag.sockets(family, kind, _CONNECTED):
                    led = by_cookie.get((sock.cookie, sock.far_end))
                    if led is not None and self._diag.destroy(sock, kind):
                        found.append(led)
        return found
