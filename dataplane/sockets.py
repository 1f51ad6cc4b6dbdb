"""Which ports the node's own sockets have, so that masqueraded connections do not leave from them.

The kernel is asked by sock_diag(7), in the network namespace in which the object was made: for TCP sockets that listen
or have a connection, and for UDP sockets. It leaves out what is in none of the ranges of ports, so that an answer is
short, however many connections there are. What is bound to a loopback address meets no masqueraded connection.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Self

from dataplane import sock_diag
from dataplane.settings import PortRange
from dataplane.sock_diag import FAMILIES, SockDiag

_JMP, _S_GE, _S_LE = 1, 2, 3  # include/uapi/linux/inet_diag.h
_STATES = {
    socket.IPPROTO_TCP: sock_diag.CONNECTED | sock_diag.bits(sock_diag.LISTEN),
    socket.IPPROTO_UDP: sock_diag.ANY_STATE,
}
_OPERATION = struct.Struct("=BBH")  # code, how far to go on if it is so, and if not


class Sockets:
    """The sockets at ports in `ranges`, ascending. A context manager."""

    def __init__(self, ranges: Sequence[PortRange]) -> None:
        self._program = _in_ranges(ranges)
        self._diag = SockDiag()

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close it."""
        self._diag.close()

    def ports(self) -> frozenset[int]:
        """Return the ports in the ranges that sockets of the node have. MissingFeatureError: the kernel cannot tell."""
        return frozenset(port for family in FAMILIES for protocol in _STATES for port in self._ports(family, protocol))

    def _ports(self, family: int, protocol: int) -> set[int]:
        found = self._diag.sockets(family, protocol, _STATES[protocol], self._program)
        here = {(port, address) for address, port, *_ in (each.ends for each in found)}
        return {port for port, address in here if not ip_address(address).is_loopback}


def _in_ranges(ranges: Sequence[PortRange]) -> bytes:
    """Return the program that the kernel runs for every socket: it is in one of the ranges if that ends at its end.

    A comparison takes two operations, of which the second holds the port. Where it fails, it may go on only to where
    it would come if all were true: so a range ends with a jump to the end, and what fails goes behind that.
    """
    length = 20 * len(ranges)
    program = b""
    for first, last in ranges:
        end = length - len(program)
        is_last = end == 20
        past = end + 4 if is_last else 20  # beyond the end: it is in none
        program += _OPERATION.pack(_S_GE, 8, past) + _OPERATION.pack(0, 0, first)
        program += _OPERATION.pack(_S_LE, 8, past - 8) + _OPERATION.pack(0, 0, last)
        program += _OPERATION.pack(_JMP, 4, end - 16)
    return program
