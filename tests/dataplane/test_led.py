"""Sockets that were led to endpoints are ended by the rules that flows are ended by."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

import numpy as np
import pytest

from dataplane.led import LedSockets
from dataplane.sock_diag import mapped
from perf import echo
from xdp import kernel, schema
from xdp.byteorder import swap16
from xdp.names import words_of
from xdp.netlink import NetlinkSocket
from xdp.schema import Protocol

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SO_COOKIE = 57
VIP, OTHER_VIP = ("10.96.0.1", 80), ("10.96.0.2", 80)
VIP6 = ("fd96::1", 80)
NAMES = {IPv6Address("::1"): 7, IPv6Address("fd96::1"): 8}


class _Names:
    """The names that IPv6 addresses have."""

    def find(self, address: IPv6Address) -> int:
        return NAMES.get(address, 0)


class Table(NamedTuple):
    fd: int
    led: LedSockets

    def note(self, sock: socket.socket, endpoint: tuple[str, int], vip: tuple[str, int]) -> None:
        """Note what connect.c would: that a socket was led to an endpoint."""
        key, value = np.zeros(1, schema.LED), np.zeros(1, schema.VIP)
        key["cookie"] = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")
        key["protocol"] = Protocol.TCP if sock.type == socket.SOCK_STREAM else Protocol.UDP
        for row, (host, port) in ((key, endpoint), (value, vip)):
            row["addr"], row["port"] = words_of(_as_ipv6(host)), swap16(port)
        kernel.map_update(self.fd, key.tobytes(), value.tobytes())

    def noted(self) -> int:
        return len(kernel.map_items(self.fd))


def _as_ipv6(host: str) -> IPv6Address:
    address = ip_address(host)
    return mapped(address) if isinstance(address, IPv4Address) else address


def number(place: tuple[str, int]) -> tuple[int, int]:
    """Return a place as Services know it."""
    address = ip_address(place[0])
    return (int(address) if isinstance(address, IPv4Address) else NAMES[address]), place[1]


@pytest.fixture
def table() -> Iterator[Table]:
    fd = kernel.map_create("led", schema.LED.itemsize, schema.VIP.itemsize, 128, map_type=kernel.LRU_HASH)
    with echo.own_network():
        echo._ip("link", "set", "lo", "up")
        yield Table(fd, LedSockets(fd, _Names()))  # type: ignore[arg-type]
    os.close(fd)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


def server(stack: contextlib.ExitStack, kind: int, host: str = "127.0.0.1") -> tuple[str, int]:
    """Have somebody at a place of its own."""
    sock = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind))
    sock.bind((host, 0))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock.getsockname()[:2]


def client(stack: contextlib.ExitStack, kind: int, endpoint: tuple[str, int] | None) -> socket.socket:
    family = socket.AF_INET6 if endpoint is not None and ":" in endpoint[0] else socket.AF_INET
    sock = stack.enter_context(socket.socket(family, kind))
    if endpoint is not None:
        sock.connect(endpoint)
    return sock


def is_ended(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_C8_what_nobody_lives_for_is_ended(table: Table, stack: contextlib.ExitStack, host: str):
    vip = VIP6 if ":" in host else VIP
    of_family = Protocol.IPV6 if ":" in host else 0
    alive, gone = (server(stack, socket.SOCK_DGRAM, host) for _ in range(2))
    kept, ended = (client(stack, socket.SOCK_DGRAM, each) for each in (alive, gone))
    stranger = client(stack, socket.SOCK_DGRAM, gone)  # connected there by itself
    table.note(kept, alive, vip)
    table.note(ended, gone, vip)
    pairs = [(number(vip), number(alive))]
    assert table.led.keep_only(Protocol.TCP | of_family, pairs) == 0
    assert table.led.keep_only(Protocol.UDP | (of_family ^ Protocol.IPV6), []) == 0
    assert table.led.keep_only(Protocol.ICMP, []) == 0
    assert table.noted() == 2
    assert table.led.keep_only(Protocol.UDP | of_family, pairs) == 1
    assert [is_ended(sock) for sock in (kept, ended, stranger)] == [False, True, False]
    assert table.noted() == 1
    assert table.led.keep_only(Protocol.UDP | of_family, pairs) == 0


def test_C8_an_endpoint_lives_for_its_own_services(table: Table, stack: contextlib.ExitStack):
    place = server(stack, socket.SOCK_DGRAM)
    first, second = (client(stack, socket.SOCK_DGRAM, place) for _ in range(2))
    table.note(first, place, VIP)
    table.note(second, place, OTHER_VIP)
    assert table.led.keep_only(Protocol.UDP, [(number(OTHER_VIP), number(place))]) == 1
    assert [is_ended(sock) for sock in (first, second)] == [True, False]


def test_C8_connections_are_reset_where_the_frontend_says_so(table: Table, stack: contextlib.ExitStack):
    alive, gone = (server(stack, socket.SOCK_STREAM) for _ in range(2))
    socks = [client(stack, socket.SOCK_STREAM, place) for place in (alive, gone, gone)]
    for sock, place, vip in zip(socks, (alive, gone, gone), (VIP, VIP, OTHER_VIP), strict=True):
        table.note(sock, place, vip)
    pairs = [(number(VIP), number(alive)), (number(OTHER_VIP), number(alive))]
    assert table.led.reset_others(Protocol.TCP, [number(VIP)], pairs) == 1
    assert [is_ended(sock) for sock in socks] == [False, True, False]


def test_C9_all_connections_to_a_place_are_ended(table: Table, stack: contextlib.ExitStack):
    place, other = (server(stack, socket.SOCK_STREAM) for _ in range(2))
    socks = [client(stack, socket.SOCK_STREAM, each) for each in (place, place, other)]
    for sock, each, vip in zip(socks, (place, place, other), (VIP, OTHER_VIP, VIP), strict=True):
        table.note(sock, each, vip)
    assert table.led.end_at(Protocol.UDP, [number(place)]) == 0
    assert table.led.end_at(Protocol.TCP, [number(place)]) == 2
    assert [is_ended(sock) for sock in socks] == [True, True, False]


def test_an_address_without_a_name_is_nobody_s_place(table: Table, stack: contextlib.ExitStack):
    """Names go with their last use: what has none lives for nobody, and is at no place that is asked for."""
    nameless, port = "fd00::99", server(stack, socket.SOCK_STREAM, "::1")[1]
    sock = client(stack, socket.SOCK_STREAM, ("::1", port))
    table.note(sock, (nameless, port), VIP6)
    assert table.led.end_at(Protocol.TCP | Protocol.IPV6, [(0, port)]) == 0
    assert table.noted() == 1
    assert table.led.reset_others(Protocol.TCP | Protocol.IPV6, [number(VIP6)], [(number(VIP6), (0, port))]) == 0
    assert table.noted() == 0


def test_a_note_alone_ends_nobody(table: Table, stack: contextlib.ExitStack):
    """The socket was led there once, and is somewhere else by now."""
    once, now = (server(stack, socket.SOCK_DGRAM) for _ in range(2))
    sock = client(stack, socket.SOCK_DGRAM, now)
    table.note(sock, once, VIP)
    assert table.led.keep_only(Protocol.UDP, []) == 0
    assert not is_ended(sock)
    table.led.look_again()
    assert not is_ended(sock)


def test_who_was_about_to_connect_is_looked_for_once_more(table: Table, stack: contextlib.ExitStack):
    place = server(stack, socket.SOCK_STREAM)
    late, later = (client(stack, socket.SOCK_STREAM, None) for _ in range(2))
    for sock in (late, later):
        table.note(sock, place, VIP)
    assert table.led.end_at(Protocol.TCP, [number(place)]) == 0
    late.connect(place)
    table.led.look_again()
    assert is_ended(late)
    later.connect(place)
    table.led.look_again()
    assert not is_ended(later)


def test_a_kernel_that_ends_no_sockets_is_told_of_and_keeps_nobody_from_going_on(
    table: Table, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    place = server(stack, socket.SOCK_DGRAM)
    first, second = (client(stack, socket.SOCK_DGRAM, place) for _ in range(2))
    table.note(first, place, VIP)
    with monkeypatch.context() as without:
        without.setattr(NetlinkSocket, "get", refuse)
        assert table.led.keep_only(Protocol.UDP, []) == 0
    assert "not ended: the kernel does not end sockets (not supported); CONFIG_INET_DIAG_DESTROY" in table.led.why
    table.note(second, place, VIP)
    assert table.led.keep_only(Protocol.UDP, []) == 1
    assert (is_ended(second), table.led.why) == (True, "")
