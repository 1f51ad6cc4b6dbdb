"""Which ports the node's own sockets have, as the kernel tells."""

from __future__ import annotations

import contextlib
import errno
import socket
import subprocess
from collections.abc import Iterator

import pytest

from dataplane.settings import PortRange
from dataplane.sock_diag import FAMILIES
from dataplane.sockets import Sockets
from perf import echo
from perf.world import wait_until
from xdp.errors import MissingFeatureError

pytestmark = pytest.mark.root

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
FIRST, LAST = 30_000, 30_009
RANGES = PortRange(600, 1023), PortRange(FIRST, LAST)


@pytest.fixture(autouse=True)
def _own_network() -> Iterator[None]:
    with echo.own_network():
        echo.veth_pair("a0", "a1")
        for words in ("link set lo up", "address add 10.0.0.1/24 dev a0", "address add fd00::1/64 dev a0 nodad"):
            subprocess.run(["ip", *words.split()], check=True)
        yield


@contextlib.contextmanager
def bound(*places: tuple[int, str, int]) -> Iterator[list[socket.socket]]:
    """Open sockets of a kind at places; those of TCP listen."""
    with contextlib.ExitStack() as stack:
        sockets = []
        for kind, host, port in places:
            sock = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind))
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            if kind == TCP:
                sock.listen()
            sockets.append(sock)
        yield sockets


def ports(*ranges: PortRange) -> frozenset[int]:
    with Sockets(ranges or RANGES) as sockets:
        return sockets.ports()


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "fd00::1"])
@pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
def test_C12_sockets_that_wait_for_somebody_are_found(kind: int, host: str):
    with bound((kind, host, FIRST + 5)):
        assert ports() == {FIRST + 5}
    assert ports() == frozenset()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1"])
@pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
def test_C12_those_that_nobody_elsewhere_can_reach_are_left_out(kind: int, host: str):
    with bound((kind, host, FIRST)):
        assert ports() == frozenset()


def test_C12_only_ports_in_the_ranges_are_told():
    asked = (599, 600, 1023, 1024, FIRST - 1, FIRST, LAST, LAST + 1)
    with bound(*((TCP, "0.0.0.0", port) for port in asked)):
        assert ports() == {600, 1023, FIRST, LAST}
        assert ports(PortRange(FIRST, FIRST)) == {FIRST}
        assert ports(PortRange(1, 599), PortRange(1024, 1024), PortRange(LAST, 65_535)) == {599, 1024, LAST, LAST + 1}


@pytest.mark.parametrize("host", ["10.0.0.1", "fd00::1"])
def test_C12_connections_of_the_node_are_found(host: str):
    """Also one that is being opened, to somebody who does not answer."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    nobody = "fd00::2" if ":" in host else "10.0.0.2"
    with bound((TCP, host, 20_000)), socket.socket(family) as connected, socket.socket(family) as opening:
        connected.bind(("", FIRST))
        # The kernel makes the route to an IPv6 address of its own a moment after the address.
        assert wait_until(lambda: connected.connect_ex((host, 20_000)) in (0, errno.EISCONN), 5)
        opening.bind(("", FIRST + 1))
        opening.setblocking(False)
        assert opening.connect_ex((nobody, 80)) == errno.EINPROGRESS
        assert ports() == {FIRST, FIRST + 1}


def test_C12_many_are_told_in_several_pieces():
    with bound(*((kind, "0.0.0.0", port) for kind in (TCP, UDP) for port in range(20_000, 20_400))):
        assert ports(PortRange(20_000, 20_399)) == set(range(20_000, 20_400))


def test_C12_a_kernel_that_does_not_tell_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FAMILIES, socket.AF_APPLETALK, 4)
    with Sockets(RANGES) as sockets, pytest.raises(MissingFeatureError, match="the kernel does not tell of sockets"):
        sockets.ports()
