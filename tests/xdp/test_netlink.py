"""Netlink messages: whatever comes is read, and what a list has missed is asked for again."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdp.netlink import NetlinkSocket, attributes, messages


@given(st.binary(max_size=200))
def test_any_bytes_are_attributes_or_none(data: bytes) -> None:
    for _, value in attributes(memoryview(data)):
        assert len(value) <= len(data)


@pytest.mark.faults(107)
@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_none(data: bytes) -> None:
    for _, _, _, payload in messages(data):
        assert len(payload) <= len(data)


class Kernel:
    """What a netlink socket says to one request after the other: each a list of (type, flags, payload)."""

    def __init__(self, *answers: list[tuple[int, int, bytes]]) -> None:
        self._answers = list(answers)
        self.asked = 0

    def send(self, request: bytes) -> None:
        self.asked += 1
        self._sequence = struct.unpack_from("=I", request, 8)[0]

    def recv(self, _: int) -> bytes:
        header = struct.Struct("=IHHII")
        return b"".join(
            header.pack(header.size + len(payload), kind, flags, self._sequence, 0) + payload + bytes(-len(payload) % 4)
            for kind, flags, payload in self._answers.pop(0)
        )


NEW_ROUTE, DONE, INTERRUPTED = 24, 3, 0x10


def requests_to(kernel: Kernel) -> NetlinkSocket:
    made = NetlinkSocket(0)
    made.raw.close()
    made.raw = kernel  # type: ignore[assignment]
    return made


def test_F107_what_changed_while_it_was_listed_is_listed_again():
    kernel = Kernel(
        [(NEW_ROUTE, 0, b"old!"), (NEW_ROUTE, INTERRUPTED, b"half"), (DONE, INTERRUPTED, bytes(4))],
        [(NEW_ROUTE, 0, b"new!"), (DONE, 0, bytes(4))],
    )
    assert requests_to(kernel).dump(26, b"") == [(NEW_ROUTE, b"new!")]
    assert kernel.asked == 2


@pytest.mark.parametrize("kind", [DONE, 2], ids=["at-its-end", "instead"])
def test_F107_a_list_that_ends_in_an_error_is_none(kind: int):
    kernel = Kernel([(NEW_ROUTE, 0, b"half"), (kind, 0, struct.pack("=i", -errno.EMSGSIZE))])
    with pytest.raises(OSError, match="Message too long"):
        requests_to(kernel).dump(26, b"")
