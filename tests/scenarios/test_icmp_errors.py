"""ICMP errors at a node that does not know the connection: another one does, with the same Services and seed."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf.world import wait_until
from tests import packets
from tests.memory_node import MemoryNode
from tests.node import ScenarioNode
from tests.packets import Address, data, icmp_error, syn, udp
from tests.scenarios.site import EACH_PATH, SERVERS, Site, who_answers
from tests.services import Service, split, text_of
from tests.wires import Wire
from xdp.schema import Reason

WEB = Service("web", "10.96.0.1:80")
DNS = Service("dns", "10.96.0.10:53", protocol="UDP")
PORT = 8080
_ipv4 = pytest.mark.families(4, why="IPv6 has no such thing")
ERRORS = [pytest.param(kind, marks=() if kind in packets.ICMPV6_ERRORS else _ipv4) for kind in packets.ICMP_ERRORS]
NARROW = 1300  # what the error "too-big" says
pytestmark = pytest.mark.faults(75)


@pytest.fixture
def other(node: ScenarioNode, tmp_path: Path) -> ScenarioNode:
    """Another node between the same hosts."""
    return MemoryNode(tmp_path, family=node.family)


def serve(service: Service, *nodes: ScenarioNode) -> Service:
    """Make a Service the only one of several nodes."""
    for each in nodes:
        made = each.of_family(service).with_endpoints(*(each.endpoint(host, PORT) for host in SERVERS))
        each.apply(made)
    return made


def first_of(service: Service, client: Address) -> bytes:
    return (udp if service.protocol == "UDP" else syn)(client, service.at)


def answer_of(service: Service, endpoint: Address, client: Address, **fields: int) -> bytes:
    return (udp if service.protocol == "UDP" else data)(endpoint, client, **fields)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("service", [WEB, DNS], ids=["TCP", "UDP"])
def test_N1_N2_an_error_that_comes_to_another_node_reaches_the_endpoint(node, other, service, kind):
    service, told = serve(service, node, other), set()
    for _ in range(10):
        client = node.client()
        host, _ = other.send(first_of(service, client)).only
        endpoint = other.at(host, PORT)
        _, seen = other.send(answer_of(service, endpoint, client), host).only
        sent = node.send(icmp_error(seen, kind), "other")
        expected = icmp_error(answer_of(service, endpoint, client, ttl=63), kind, ttl=59)
        assert sent.only == (host, node.macs(host) + expected[12:])
        assert sent.passed == [], "the kernel has not got it, too"
        assert text_of(client) not in {flow["client"] for flow in node.flows(client=packets.host(client[0]))}
        told.add(host)
    assert len(told) > 1


@pytest.mark.parametrize("option", ["pass", "reset"])
def test_C11_an_error_about_what_would_not_be_adopted_is_dropped(node, other, option):
    service = Service("web", WEB.frontend, annotations={"turnout.dev/mid-stream": option})
    service, client = serve(service, node, other), node.client()
    sent = node.send(icmp_error(data(service.at, client), "too-big"), "other")
    assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.ICMP_UNUSABLE)


@pytest.mark.parametrize("scheduler", ["random", "round-robin", "least-connections"])
def test_L_an_error_about_an_endpoint_that_no_other_node_can_know_is_dropped(node, other, scheduler):
    service = Service("web", WEB.frontend, annotations={"turnout.dev/scheduler": scheduler})
    service, client = serve(service, node, other), node.client()
    sent = node.send(icmp_error(data(service.at, client), "too-big"), "other")
    assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.ICMP_UNUSABLE)


@pytest.mark.flags(masquerade="all")
def test_T2_an_error_about_a_masqueraded_connection_of_another_node_is_dropped(node):
    service, client = serve(WEB, node), node.client()
    sent = node.send(icmp_error(data(service.at, client), "too-big"), "other")
    assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.ICMP_UNUSABLE)


# Real kernels.


@pytest.fixture
def ignorant(site: Site) -> Iterator[Site]:
    """A site whose node may be made to forget all: to be another node."""
    site.serve()
    yield site
    for host in SERVERS:
        site.world[host].run(["ip", f"-{site.family}", "route", "flush", "cache"])
    site.check_accounts()


def become_another(site: Site) -> None:
    """Have a node take the place of the other one, which knows nothing of its connections."""
    site.daemon.signal(signal.SIGTERM)
    site.daemon.wait()
    site.daemon.turnout("detach")
    site.serve()
    assert site.daemon.ask("flows") == []


def mtu_to_client(site: Site, host: str) -> int:
    """Return how long packets may be that a host sends to the client."""
    words = site.world[host].run(["ip", "route", "get", site.ip("client")]).stdout.split()
    return int(words[words.index("mtu") + 1]) if "mtu" in words else 1500


def is_tcp(frame: bytes) -> bool:
    return frame[20 if frame[12:14] == b"\x86\xdd" else 23] == socket.IPPROTO_TCP


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.parametrize("site", EACH_PATH, indirect=True, scope="session")
def test_N2_an_error_at_another_node_lowers_the_path_mtu_of_the_endpoint_s_kernel(ignorant):
    site = ignorant
    with site.client.entered():
        sock = socket.create_connection(split(site.web.frontend))
    with sock, contextlib.closing(Wire(site.client, "eth0")) as wire:
        host = who_answers(sock)
        wire.received()
        sock.sendall(b"G")  # the endpoint says that it has come, and with which number it will go on
        heard: list[bytes] = []
        assert wait_until(lambda: heard.extend(filter(is_tcp, wire.received())) or heard, 5)
        assert mtu_to_client(site, host) == 1500
        become_another(site)
        macs = bytes.fromhex((site.world.node.interfaces[0].mac + site.client.interfaces[0].mac).replace(":", ""))
        wire.send(macs + icmp_error(heard[0], "too-big")[12:])
        assert wait_until(lambda: mtu_to_client(site, host) == NARROW, 5), site.daemon.ask("status")["reasons"]
        assert site.daemon.ask("flows") == []
        assert [mtu_to_client(site, each) for each in SERVERS].count(1500) == 2
        sock.sendall(b"ET /100000 HTTP/1.1\r\n\r\n")  # the connection goes on, adopted
        assert sock.recv(1)
