"""Sockets as the kernel tells of them, and their ends."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest

from dataplane import sock_diag
from dataplane.sock_diag import Found, SockDiag, mapped
from perf import echo
from xdp.errors import MissingFeatureError
from xdp.netlink import NetlinkSocket

pytestmark = pytest.mark.root

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
SO_COOKIE = 57
CONNECTED = sock_diag.bits(sock_diag.ESTABLISHED)


@pytest.fixture(autouse=True)
def _own_network() -> Iterator[None]:
    with echo.own_network():
        echo._ip("link", "set", "lo", "up")
        yield


@pytest.fixture
def diag() -> Iterator[SockDiag]:
    with SockDiag() as made:
        yield made


@contextlib.contextmanager
def connected(kind: int, host: str, family: int = 0) -> Iterator[tuple[socket.socket, int]]:
    """Connect a socket to one that is bound; yield it, and the port of the other."""
    server_family = socket.AF_INET6 if ":" in host and "." not in host else socket.AF_INET
    with socket.socket(server_family, kind) as server, socket.socket(family or server_family, kind) as client:
        server.bind((host.removeprefix("::ffff:"), 0))
        if kind == socket.SOCK_STREAM:
            server.listen()
        port = server.getsockname()[1]
        client.connect((host, port))
        yield client, port


def found(diag: SockDiag, family: int, protocol: int, port: int) -> list[Found]:
    return [sock for sock in diag.sockets(family, protocol, CONNECTED) if sock.far_end[1] == port]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])
def test_a_socket_is_told_by_its_ends_and_its_cookie(diag: SockDiag, protocol: int, host: str):
    kind = socket.SOCK_STREAM if protocol == TCP else socket.SOCK_DGRAM
    with connected(kind, host) as (client, port):
        (sock,) = found(diag, client.family, protocol, port)
        assert sock.far_end == (mapped(IPv4Address(host)) if "." in host else IPv6Address(host), port)
        packed = socket.inet_pton(client.family, host)
        assert sock.ends == (packed, client.getsockname()[1], packed, port)
        assert sock.cookie == int.from_bytes(client.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")


@pytest.mark.parametrize(
    ("host", "family"),
    [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6), ("::ffff:127.0.0.1", socket.AF_INET6)],
)
@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])
def test_a_socket_that_is_ended_tells_its_program_and_is_not_found_again(
    diag: SockDiag, protocol: int, host: str, family: int
):
    kind = socket.SOCK_STREAM if protocol == TCP else socket.SOCK_DGRAM
    with connected(kind, host, family) as (client, port):
        (sock,) = found(diag, family, protocol, port)
        assert sock.far_end == (IPv6Address(host) if ":" in host else mapped(IPv4Address(host)), port)
        assert diag.destroy(sock, protocol)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED
        assert found(diag, family, protocol, port) == []
        assert not diag.destroy(sock, protocol)


def test_who_has_the_place_of_a_socket_by_now_is_not_ended_for_it(diag: SockDiag):
    with connected(socket.SOCK_DGRAM, "127.0.0.1") as (client, port):
        (sock,) = found(diag, socket.AF_INET, UDP, port)
        another = Found(sock.family, sock.identity[:-8] + bytes(7) + b"\1")
        assert not diag.destroy(another, UDP)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert found(diag, socket.AF_INET, UDP, port) == [sock]


def test_a_kernel_that_cannot_end_sockets_is_named(diag: SockDiag, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(NetlinkSocket, "get", refuse)
    with pytest.raises(MissingFeatureError, match="CONFIG_INET_DIAG_DESTROY"):
        diag.destroy(Found(socket.AF_INET, bytes(48)), TCP)
