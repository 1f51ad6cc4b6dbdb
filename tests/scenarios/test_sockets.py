"""Masqueraded connections beside sockets of the node itself. Ids are those of docs/behaviours.md."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from perf.world import Host, World
from tests.daemon import Daemon
from tests.scenarios.site import DNS_PORT, EACH_PATH, HOSTS, WEB_PORT, Site
from tests.services import Service, split
from xdp.byteorder import swap16

FIRST, LAST = 30_000, 30_003
PRIVILEGED = 777

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.parametrize("site", EACH_PATH, indirect=True, scope="module"),
]


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Real clients and servers around a daemon that masquerades everybody, from four ports."""
    engine, is_ipv6 = request.param.removesuffix("-6"), request.param.endswith("-6")
    flags = {"masquerade": "all", "snat-ports": f"{FIRST}-{LAST}"}
    with (
        World(f"tp{os.getpid() % 100_000}", HOSTS, ipv6=is_ipv6) as world,
        Daemon(world, engine, flags=flags) as daemon,
    ):
        made = Site(world, daemon, 6 if is_ipv6 else 4)
        made.web, made.dns = (_at_one(service) for service in (made.web, made.dns))
        daemon.start()
        daemon.apply(made.web, made.dns)
        yield made


def _at_one(service: Service) -> Service:
    quick = {"turnout.dev/timeouts": "closing=1s,time-wait=1s"}
    return replace(service.with_endpoints(service.endpoints[0]), annotations=quick)


def place(site: Site, port: int) -> tuple[str, int]:
    """Return a port of the one endpoint."""
    return split(site.places(port, "web-1")[0])


@contextlib.contextmanager
def opened(site: Site, host: Host, port: int, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    """Open a socket of a host, at a port."""
    with host.entered():
        sock = socket.socket(site.socket_family, kind)
    with sock:
        sock.settimeout(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", port))
        yield sock


def asked(sock: socket.socket) -> bytes:
    """Send an HTTP request by a connection; return how the answer begins."""
    sock.sendall(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")
    return sock.recv(1 << 16)[:15]


def left_from(site: Site, client: int) -> int:
    """Open a connection from a port of the client, and end it; return the port that it left the node from."""
    with opened(site, site.client, client) as sock:
        sock.connect(split(site.web.frontend))
        assert asked(sock) == b"HTTP/1.1 200 OK"
        (port,) = ports_of_flows(site, client)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a RST: its own port is free at once
    return port


def wait_for_ports(site: Site) -> None:
    """Return when connections and sockets that have ended are forgotten, and no port is taken."""
    site.daemon.wait_for(lambda: not site.daemon.ask("flows"))
    wait_for_left_out(site, 0)


def wait_for_left_out(site: Site, count: int) -> None:
    """Return when so many ports are left out, because sockets of the node have them: it looks every second."""
    site.daemon.wait_for(lambda: site.daemon.ask("status")["snat_ports_left_out"] == count)


def ports_of_flows(site: Site, client: int) -> list[int]:
    """Return the ports that TCP connections from a port of the client leave the node from."""
    with site.tables() as shared:
        records = shared.tables.flows[shared.tables.flows["published"] == 1]
        is_it = (records["src_port"] == swap16(client)) & (records["direction"] == 0) & (records["protocol"] & 127 == 6)
        return [swap16(int(port)) for port in records["new_src_port"][is_it]]


def test_C12_connections_leave_from_no_port_that_a_socket_of_the_node_has(site):
    """One listens, one is a client of the endpoint's, one waits for datagrams: a single port is left."""
    node = site.world.node
    with (
        opened(site, node, FIRST) as listening,
        opened(site, node, FIRST + 1) as connected,
        opened(site, node, FIRST + 2, socket.SOCK_DGRAM) as waiting,
    ):
        listening.listen()
        connected.connect(place(site, WEB_PORT))  # with raw, its first SYN may go unanswered
        wait_for_left_out(site, 3)
        assert asked(connected) == b"HTTP/1.1 200 OK"
        assert left_from(site, FIRST + 1) == LAST
        assert asked(connected) == b"HTTP/1.1 200 OK"
        waiting.sendto(b"1", place(site, DNS_PORT))
        assert waiting.recv(99) == b"web-1 1"


def test_C12_a_port_is_used_again_when_the_socket_has_gone(site):
    with opened(site, site.world.node, FIRST) as listening:
        listening.listen()
        wait_for_left_out(site, 1)
        assert left_from(site, FIRST) != FIRST
    wait_for_ports(site)
    assert left_from(site, FIRST) == FIRST


def test_C12_a_socket_at_the_port_of_a_connection_does_not_disturb_it(site):
    wait_for_ports(site)
    with opened(site, site.client, LAST) as client, opened(site, site.world.node, LAST) as listening:
        client.connect(split(site.web.frontend))
        assert ports_of_flows(site, LAST) == [LAST]
        listening.listen()
        wait_for_left_out(site, 1)
        assert asked(client) == b"HTTP/1.1 200 OK"


def test_C12_a_privileged_port_becomes_another_one_that_no_socket_of_the_node_has(site):
    assert left_from(site, PRIVILEGED) == PRIVILEGED
    assert 600 <= left_from(site, 111) <= 1023
    wait_for_ports(site)
    with opened(site, site.world.node, PRIVILEGED) as connected:
        connected.connect(place(site, WEB_PORT))
        wait_for_left_out(site, 1)
        port = left_from(site, PRIVILEGED)
        assert port != PRIVILEGED
        assert 600 <= port <= 1023
        assert asked(connected) == b"HTTP/1.1 200 OK"
