"""Netlink: requests to the kernel, and what it answers. Nothing here knows what an answer means."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Self

from xdp.errors import MissingFeatureError

# include/uapi/linux: netlink.h, rtnetlink.h
CREATE, REPLACE = 0x400, 0x100
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_DUMP_INTERRUPTED = 0x10
_ERROR, _DONE = 2, 3
GETLINK = 18

HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
_ATTRIBUTE = struct.Struct("=HH")  # length with this header, type
IFINFOMSG = struct.Struct("=BxHiII")  # of a link: family, type, ifindex, flags, change

BUFFER_BYTES = 1 << 16
_BATCH = 64  # requests in one send: their acknowledgements fit any receive buffer
_DUMP_ATTEMPTS = 5


def attributes(data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (type, payload) of each netlink attribute in `data`; a malformed one ends it."""
    view = memoryview(data)
    offset = 0
    while offset + 4 <= len(view):
        length, kind = _ATTRIBUTE.unpack_from(view, offset)
        if length < 4 or offset + length > len(view):
            return
        yield kind & 0x3FFF, view[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def attribute(kind: int, value: bytes) -> bytes:
    """Return a netlink attribute."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def messages(datagram: bytes) -> Iterator[tuple[int, int, int, memoryview]]:
    """Yield (type, flags, sequence, payload) of each netlink message in a datagram."""
    view = memoryview(datagram)
    offset = 0
    while offset + HEADER.size <= len(view):
        length, kind, flags, sequence, _port = HEADER.unpack_from(view, offset)
        if length < HEADER.size or offset + length > len(view):
            return
        yield kind, flags, sequence, view[offset + HEADER.size : offset + length]
        offset += (length + 3) & ~3


class NetlinkSocket:
    """A netlink socket for requests and their answers. A context manager: leaving it closes `raw`."""

    def __init__(self, protocol: int) -> None:
        try:
            self.raw = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        except OSError as error:
            message = f"netlink: protocol {protocol} is not available ({errno.errorcode.get(error.errno or 0)})"
            raise MissingFeatureError(message) from error
        self.raw.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket."""
        self.raw.close()

    def message(self, kind: int, flags: int, body: bytes) -> bytes:
        """Return a request with the next sequence number."""
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        return HEADER.pack(HEADER.size + len(body), kind, flags | _REQUEST, self._sequence, 0) + body

    def dump(self, kind: int, body: bytes) -> list[tuple[int, bytes]]:
        """Return (type, payload) of everything that the kernel lists; again when it changed in between."""
        for _ in range(_DUMP_ATTEMPTS):
            answer, was_interrupted = self._ask(kind, _DUMP, body)
            if not was_interrupted:
                break
        return answer  # the last one: what it may have missed comes as an event

    def get(self, kind: int, body: bytes) -> list[tuple[int, bytes]]:
        """Return (type, payload) of the answers to a request for one thing; OSError as the kernel says."""
        return self._ask(kind, _ACK, body)[0]

    def _ask(self, kind: int, flags: int, body: bytes) -> tuple[list[tuple[int, bytes]], bool]:
        self.raw.send(self.message(kind, flags, body))
        answer: list[tuple[int, bytes]] = []
        was_interrupted = False
        while True:
            for kind_of_answer, its_flags, sequence, payload in messages(self.raw.recv(BUFFER_BYTES)):
                if sequence != self._sequence:
                    continue
                was_interrupted |= bool(its_flags & _DUMP_INTERRUPTED)
                if kind_of_answer in (_DONE, _ERROR):  # a list that ends early says why at its end
                    code = -struct.unpack_from("=i", payload)[0] if len(payload) >= 4 else 0
                    if code > 0:
                        raise OSError(code, os.strerror(code))
                    return answer, was_interrupted
                answer.append((kind_of_answer, bytes(payload)))

    def change(self, requests: Iterable[tuple[int, int, bytes]]) -> Iterator[int]:
        """Send (type, flags, payload) requests many at a time; yield an errno, or 0, for each in order."""
        pending = list(requests)
        for start in range(0, len(pending), _BATCH):
            batch = pending[start : start + _BATCH]
            first = self._sequence + 1
            self.raw.send(b"".join(self.message(kind, flags | _ACK, body) for kind, flags, body in batch))
            results: dict[int, int] = {}
            while len(results) < len(batch):
                for kind, _flags, sequence, payload in messages(self.raw.recv(BUFFER_BYTES)):
                    if kind == _ERROR and sequence >= first:
                        results[sequence] = -struct.unpack_from("=i", payload)[0]
            for sequence in range(first, first + len(batch)):
                yield results[sequence]
