"""Answering for VIPs by ARP and NDP: clients on the link without a route, and a second node that takes over."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.utils6 import in6_getnsma, in6_getnsmac

from perf import clients
from perf.world import Host, World
from tests.daemon import Daemon
from tests.scenarios.site import WEB_PORT
from tests.services import Service, write_manifests
from tests.wires import Wire

pytestmark = [pytest.mark.root]

HOSTS = {"client": "clients", "second": "clients", "web-1": "servers", "web-2": "servers"}
STRANGER = "02:00:00:00:00:99"
ALL_NODES = "33:33:00:00:00:01"


class Link:
    """The clients' link as one family knows it: where the VIP is, an address that is none, and who is on it."""

    def __init__(self, world: World, family: int) -> None:
        self.family = family
        self.vip, self.free = (f"10.77.1.{n}" if family == 4 else f"fd77:0:1::1{n - 100:02}" for n in (100, 101))
        ends = [host.interface_to("clients") for host in (world["client"], world.node)]
        self.client, self.node = (end.ip if family == 4 else end.ip6 for end in ends)
        self.client_mac, self.mac = (end.mac for end in ends)
        self.second = "10.77.2.200" if family == 4 else "fd77:0:2::200"  # where the servers reach the second node

    def frontend(self, address: str) -> str:
        """Return a port of an address, as clients write it."""
        return f"{address}:80" if self.family == 4 else f"[{address}]:80"

    def ask(self, address: str, source: str | None = None) -> bytes:
        """Return the client's question who has an address, to everybody whom it may concern."""
        if self.family == 4:
            question = ARP(op=1, hwsrc=self.client_mac, psrc=source or self.client, pdst=address)
            return bytes(Ether(dst="ff:ff:ff:ff:ff:ff", src=self.client_mac) / question)
        group = in6_getnsma(socket.inet_pton(socket.AF_INET6, address))
        header = IPv6(src=source or self.client, dst=socket.inet_ntop(socket.AF_INET6, group), hlim=255)
        ether = Ether(dst=in6_getnsmac(group), src=self.client_mac)
        return bytes(ether / header / ICMPv6ND_NS(tgt=address) / ICMPv6NDOptSrcLLAddr(lladdr=self.client_mac))

    def answer(self, address: str) -> bytes:
        """Return what the node answers."""
        ether = Ether(dst=self.client_mac, src=self.mac)
        if self.family == 4:
            return bytes(ether / ARP(op=2, hwsrc=self.mac, psrc=address, hwdst=self.client_mac, pdst=self.client))
        said = ICMPv6ND_NA(R=0, S=1, O=1, tgt=address) / ICMPv6NDOptDstLLAddr(lladdr=self.mac)
        return bytes(ether / IPv6(src=address, dst=self.client, hlim=255) / said)

    def claim(self, mac: str, target: str | None = None, operation: int = 1) -> bytes:
        """Return a frame by which somebody says that he has the VIP."""
        if self.family == 4:
            packet = ARP(op=operation, hwsrc=mac, psrc=self.vip, pdst=target or self.vip)
            return bytes(Ether(dst="ff:ff:ff:ff:ff:ff", src=mac) / packet)
        said = ICMPv6ND_NA(R=0, S=0, O=1, tgt=self.vip) / ICMPv6NDOptDstLLAddr(lladdr=mac)
        return bytes(Ether(dst=ALL_NODES, src=mac) / IPv6(src=self.vip, dst="ff02::1", hlim=255) / said)

    def claims(self, frames: list[bytes]) -> list[str]:
        """Return the addresses that frames announce."""
        packets = [Ether(frame) for frame in frames]
        if self.family == 4:
            return [packet[ARP].psrc for packet in packets if ARP in packet and packet[ARP].psrc == packet[ARP].pdst]
        return [packet[ICMPv6ND_NA].tgt for packet in packets if ICMPv6ND_NA in packet and packet.dst == ALL_NODES]


only_ipv6 = pytest.mark.parametrize("link", [6], indirect=True, ids=["ipv6"])


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def link(request: pytest.FixtureRequest, world: World) -> Link:
    return Link(world, request.param)


@pytest.fixture
def wire(world: World) -> Iterator[Wire]:
    """What the client sees on its wire, and may send."""
    made = Wire(world["client"], "eth0")
    yield made
    made.close()


@contextlib.contextmanager
def two_nodes() -> Iterator[World]:
    """Make two nodes between the same two networks: `node`, and `second`."""
    with World(f"ta{os.getpid() % 100_000}", HOSTS, ipv6=True) as world:
        second, switch = world["second"], world.switch("servers")
        lines = f"link add eth1 type veth peer name second netns {switch.namespace}\n"
        lines += "address add 10.77.2.200/24 dev eth1\naddress add fd77:0:2::200/64 dev eth1 nodad\nlink set eth1 up\n"
        second.run(["ip", "-batch", "-"], text_in=lines)
        switch.run(["ip", "link", "set", "second", "master", "br0", "up"])
        switch.run(["ethtool", "-K", "second", "tx", "off", "gro", "on"])
        ports = [line.split(":")[1].split("@")[0].strip() for line in links(world.switch("clients"))]
        for port in ports:
            if port.startswith("port"):
                world.switch("clients").run(["ethtool", "-K", port, "gro", "on"])
        second.sysctl("net/ipv4/ip_forward", 1)
        second.sysctl("net/ipv6/conf/all/forwarding", 1)
        for name in ("web-1", "web-2"):
            clients.serve_http(world[name], name, f"0.0.0.0:{WEB_PORT}")
            clients.serve_http(world[name], name, f"[::]:{WEB_PORT}")
        for family in ("-4", "-6"):
            world["client"].run(["ip", family, "route", "delete", "default"])
        yield world


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with two_nodes() as made:
        yield made


def links(host: Host) -> list[str]:
    return host.run(["ip", "-o", "link"]).stdout.splitlines()


def web(world: World, link: Link, name: str = "web", address: str = "") -> Service:
    ends = [world[name].interfaces[0] for name in ("web-1", "web-2")]
    endpoints = [f"{end.ip}:{WEB_PORT}" if link.family == 4 else f"[{end.ip6}]:{WEB_PORT}" for end in ends]
    return Service(name, link.frontend(address or link.vip), tuple(endpoints))


@pytest.fixture(params=[pytest.param("xdp", marks=pytest.mark.bpf), "raw"])
def daemon(request: pytest.FixtureRequest, world: World, link: Link) -> Iterator[Daemon]:
    with Daemon(world, request.param) as daemon:
        daemon.start_with = ["--announce", "arp"]
        write_manifests(daemon.file, [web(world, link)])
        yield daemon


def mac_of_vip(world: World, link: Link) -> str:
    """Return which MAC address the client has for the VIP."""
    words = world["client"].run(["ip", "neigh", "show", link.vip]).stdout.split()
    return words[words.index("lladdr") + 1] if "lladdr" in words else ""


def answered(world: World, link: Link) -> int:
    result = clients.load_http(world["client"], link.frontend(link.vip), connections=10, timeout=5)
    return result.answered


def forget(world: World) -> None:
    world["client"].run(["ip", "neigh", "flush", "all"])


def test_A_a_client_without_a_route_reaches_a_service_on_its_link(world, link, daemon):
    forget(world)
    assert answered(world, link) == 0
    forget(world)
    daemon.start()
    assert answered(world, link) == 10
    assert mac_of_vip(world, link) == world.node.mac
    reasons = daemon.ask("status")["reasons"]
    assert reasons["ARP_ANSWERED"] >= 1
    if daemon.engine == "xdp":  # with raw, nothing is punted
        assert reasons["VIP_ARP"] == reasons["ARP_ANSWERED"]
    assert daemon.ask("status")["state"] == "ok"


def test_A_without_being_asked_to_nothing_is_answered_or_announced(world, link, daemon, wire):
    daemon.start_with = []
    daemon.start()
    forget(world)
    assert answered(world, link) == 0
    assert link.vip not in link.claims(wire.received())


def test_A_vips_are_announced_at_start_and_when_they_are_new(world, link, daemon, wire):
    daemon.start()
    daemon.wait_for(lambda: link.vip in link.claims(wire.received()))
    daemon.apply(web(world, link), web(world, link, "more", link.free))
    seen: list[str] = []

    def is_announced_twice() -> bool:
        seen.extend(link.claims(wire.received()))
        return seen.count(link.free) == 2

    daemon.wait_for(is_announced_twice)
    assert daemon.ask("status")["packets"]["userspace"]["originated"] >= 4


@only_ipv6
def test_A_the_node_is_a_member_of_the_groups_that_ipv6_vips_are_asked_for_in(world, link, daemon):
    """Without it a network card, or a switch that listens to memberships, would let no question through."""

    def groups() -> str:
        return world.node.run(["ip", "maddress", "show", "dev", "eth0"]).stdout

    group = "ff02::1:ff00:100"
    assert group not in groups()
    daemon.start()
    assert group in groups()
    daemon.apply(web(world, link, "more", link.free))
    daemon.wait_for(lambda: group not in groups() and "ff02::1:ff00:101" in groups())
    daemon.signal(signal.SIGTERM)
    daemon.wait()
    assert "ff02::1:ff00:101" not in groups()


@only_ipv6
def test_A_the_interface_lets_the_group_through_where_there_is_no_room_for_memberships(world, link, daemon):
    def lets_through(last: str) -> bool:
        shown = world.node.run(["ip", "maddress", "show", "dev", "eth0"]).stdout
        return f"33:33:ff:00:01:{last}" in shown and "ff02::1:ff00:10" not in shown

    world.node.sysctl("net/core/optmem_max", 0)
    try:
        daemon.start()
        assert lets_through("00")
        daemon.apply(web(world, link, "more", link.free))
        daemon.wait_for(lambda: lets_through("01") and not lets_through("00"))
    finally:
        world.node.sysctl("net/core/optmem_max", 131072)


@pytest.mark.parametrize(
    ("link", "claim"),
    [(4, "an announcement"), (4, "a question"), (4, "an answer"), (6, "an announcement")],
    indirect=["link"],
)
def test_F008_somebody_else_with_a_vip_is_told(world, link, daemon, wire, claim):
    daemon.start()
    target, operation = {"an announcement": (link.vip, 1), "a question": (link.node, 1), "an answer": (link.vip, 2)}[
        claim
    ]
    wire.send(link.claim(STRANGER, target, operation))
    daemon.wait_for(lambda: daemon.ask("status")["state"] == "degraded")
    status = daemon.ask("status")
    assert f"{link.vip}: {STRANGER} on eth0 says" in "\n".join(status["why"])
    if daemon.engine == "xdp":  # it is XDP that counts them
        assert status["reasons"]["VIP_CLAIMED"] == 1
    assert f"{link.vip} is announced by {STRANGER}" in daemon.said()


@pytest.mark.faults(110)
def test_A_a_second_node_takes_over(world, link, daemon):
    """It is started with the same manifests; what the client knows of its neighbours follows its announcement."""
    daemon.start()
    assert answered(world, link) == 10
    assert mac_of_vip(world, link) == world.node.mac
    gateways = {"second": link.second, "node": world.node.interface_to("servers").ip}
    if link.family == 6:
        gateways["node"] = world.node.interface_to("servers").ip6

    def lead_back_by(node: str) -> None:
        for name in ("web-1", "web-2"):
            world[name].run(["ip", f"-{link.family}", "route", "replace", "default", "via", gateways[node]])

    with Daemon(world, daemon.engine, host=world["second"]) as second:
        second.settings = replace(second.settings, interfaces=("eth0", "eth1"))
        second.start_with = ["--announce", "arp"]
        write_manifests(second.file, [web(world, link)])
        daemon.signal(signal.SIGSTOP)
        try:
            second.start()
            second.wait_for(lambda: mac_of_vip(world, link) == world["second"].mac)
            lead_back_by("second")
            assert answered(world, link) == 10
        finally:
            daemon.signal(signal.SIGCONT)
            lead_back_by("node")
        daemon.wait_for(lambda: f"{link.vip}: {world['second'].mac}" in "\n".join(daemon.ask("status")["why"]))
