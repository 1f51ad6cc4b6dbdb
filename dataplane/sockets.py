"""Which ports the node's own sockets have, so that masqueraded connections do not leave from them.

The kernel is asked by sock_diag(7), in the network namespace in which the object was made: for TCP sockets that listen
or have a connection, and for UDP sockets. It leaves out what is in none of the ranges of ports, so that an answer is
short, however many connections there are. What is bound to a loopback address meets no masqueraded connection.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Self

from dataplane.netdev import NetlinkSocket, attribute
from dataplane.settings import PortRange
from xdp.errors import MissingFeatureError

# include/uapi/linux: sock_diag.h, inet_diag.h; include/net/tcp_states.h
_SOCK_DIAG = 4  # a protocol of netlink
_BY_FAMILY = 20
_BYTECODE = 1
_JMP, _S_GE, _S_LE = 1, 2, 3
_ESTABLISHED, _SYN_SENT, _FIN_WAIT1, _FIN_WAIT2, _CLOSE_WAIT, _LAST_ACK, _LISTEN, _CLOSING = 1, 2, 4, 5, 8, 9, 10, 11
_STATES = {
    socket.IPPROTO_TCP: sum(
        1 << state
        for state in (_ESTABLISHED, _SYN_SENT, _FIN_WAIT1, _FIN_WAIT2, _CLOSE_WAIT, _LAST_ACK, _LISTEN, _CLOSING)
    ),
    socket.IPPROTO_UDP: 0xFFFFFFFF,
}
_FAMILIES: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}  # bytes of an address

_REQUEST = struct.Struct("=BBBxI48x")  # family, protocol, extensions, states; of which addresses: any
_ANSWER = struct.Struct(">4xHxx16s")  # port and address of this end
_OPERATION = struct.Struct("=BBH")  # code, how far to go on if it is so, and if not


class Sockets:
    """The sockets at ports in `ranges`, ascending. A context manager."""

    def __init__(self, ranges: Sequence[PortRange]) -> None:
        self._filter = attribute(_BYTECODE, _in_ranges(ranges))
        self._netlink = NetlinkSocket(_SOCK_DIAG)

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close it."""
        self._netlink.raw.close()

    def ports(self) -> frozenset[int]:
        """Return the ports in the ranges that sockets of the node have. MissingFeatureError: the kernel cannot tell."""
        return frozenset(port for family in _FAMILIES for protocol in _STATES for port in self._ports(family, protocol))

    def _ports(self, family: int, protocol: int) -> set[int]:
        try:
            answers = self._netlink.dump(
                _BY_FAMILY, _REQUEST.pack(family, protocol, 0, _STATES[protocol]) + self._filter
            )
        except OSError as error:
            if error.errno == errno.ENOENT and family == socket.AF_INET6:  # a kernel without it
                return set()
            message = f"the kernel does not tell of sockets ({error.strerror}); CONFIG_INET_DIAG, CONFIG_INET_UDP_DIAG"
            raise MissingFeatureError(message) from error
        found = (_ANSWER.unpack_from(body) for _, body in answers)
        return {port for port, address in set(found) if not ip_address(address[: _FAMILIES[family]]).is_loopback}


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
