"""What the kernel tells of sockets, and how it ends one: sock_diag(7), in the network namespace of who asks."""

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, Self

from xdp.errors import MissingFeatureError
from xdp.netlink import NetlinkSocket, attribute

# include/uapi/linux: sock_diag.h, inet_diag.h; include/net/tcp_states.h
_SOCK_DIAG = 4  # a protocol of netlink
_BY_FAMILY, _DESTROY = 20, 21
_BYTECODE = 1
ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 1, 2, 4, 5, 8, 9, 10, 11
ANY_STATE = 0xFFFFFFFF
FAMILIES: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}  # bytes of an address

_REQUEST = struct.Struct("=BBBxI")  # family, protocol, extensions, states; what identifies a socket stands behind
_ANY = bytes(48)
_ANSWER = struct.Struct("=B3x48s")  # family; what identifies the socket
_IDENTITY = struct.Struct(">HH16s16s4x8s")  # ports of this and the far end, their addresses, interface, cookie


def bits(*states: int) -> int:
    """Return states as the kernel is asked for them."""
    return sum(1 << state for state in states)


# With a far end; of UDP sockets, ESTABLISHED.
CONNECTED = bits(ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING)


class Found(NamedTuple):
    """A socket of the kernel. Addresses are those of this end and of the far one."""

    family: int
    identity: bytes  # as the kernel wants it back

    @property
    def ends(self) -> tuple[bytes, int, bytes, int]:
        """Address and port of this end, and of the far end."""
        port, far_port, address, far_address, _ = _IDENTITY.unpack(self.identity)
        size = FAMILIES[self.family]
        return address[:size], port, far_address[:size], far_port

    @property
    def far_end(self) -> tuple[IPv6Address, int]:
        """Where it is connected to; an IPv4 address is mapped into IPv6."""
        *_, address, port = self.ends
        if len(address) == FAMILIES[socket.AF_INET]:
            return mapped(IPv4Address(address)), port
        return IPv6Address(address), port

    @property
    def cookie(self) -> int:
        """The kernel's number of the socket: two words, the lower one first."""
        low, high = struct.unpack("=II", _IDENTITY.unpack(self.identity)[-1])
        return int(low | high << 32)


def mapped(address: IPv4Address) -> IPv6Address:
    """Return an IPv4 address as one of IPv6 (RFC 4291 section 2.5.5.2)."""
    return IPv6Address(0xFFFF << 32 | int(address))


class SockDiag:
    """Questions about sockets. A context manager."""

    def __init__(self) -> None:
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

    def sockets(self, family: int, protocol: int, states: int, program: bytes = b"") -> list[Found]:
        """Return the sockets of a family and protocol in `states` (bits), but those that `program` leaves out.

        That runs in the kernel, for every socket (inet_diag.h). MissingFeatureError: the kernel cannot tell.
        """
        request = _REQUEST.pack(family, protocol, 0, states) + _ANY
        if program:
            request += attribute(_BYTECODE, program)
        try:
            answers = self._netlink.dump(_BY_FAMILY, request)
        except OSError as error:
            if error.errno == errno.ENOENT and family == socket.AF_INET6:  # a kernel without it
                return []
            message = f"the kernel does not tell of sockets ({error.strerror}); CONFIG_INET_DIAG, CONFIG_INET_UDP_DIAG"
            raise MissingFeatureError(message) from error
        return [Found(*_ANSWER.unpack_from(body)) for _, body in answers]

    def destroy(self, found: Found, protocol: int) -> bool:
        """End a socket: whoever has it is told ECONNABORTED, TCP's far end by a RST. Return whether it was there.

        MissingFeatureError: the kernel cannot do that.
        """
        request = _REQUEST.pack(found.family, protocol, 0, ANY_STATE) + found.identity
        try:
            self._netlink.get(_DESTROY, request)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            message = f"the kernel does not end sockets ({error.strerror}); CONFIG_INET_DIAG_DESTROY"
            raise MissingFeatureError(message) from error
        return True
