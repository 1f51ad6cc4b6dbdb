"""Answering for VIPs by ARP: clients on the link that have no route, and a second node that takes over."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
from scapy.layers.l2 import ARP, Ether

from perf import clients
from perf.world import Host, World
from tests.node import Daemon, Service, Wire, write_manifests
from tests.scenarios.site import WEB_PORT

pytestmark = [pytest.mark.root]

HOSTS = {"client": "clients", "second": "clients", "web-1": "servers", "web-2": "servers"}
VIP = "10.77.1.100"
FREE = "10.77.1.101"
STRANGER = "02:00:00:00:00:99"


@pytest.fixture
def wire(world: World) -> Iterator[Wire]:
    """What the client sees on its wire, and may send."""
    made = Wire(world["client"], "eth0")
    yield made
    made.close()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Two nodes between the same two networks: `node`, and `second`."""
    with World(f"ta{os.getpid() % 100_000}", HOSTS) as world:
        second, switch = world["second"], world.switch("servers")
        lines = f"link add eth1 type veth peer name second netns {switch.namespace}\n"
        second.run(["ip", "-batch", "-"], text_in=lines + "address add 10.77.2.200/24 dev eth1\nlink set eth1 up\n")
        switch.run(["ip", "link", "set", "second", "master", "br0", "up"])
        switch.run(["ethtool", "-K", "second", "tx", "off", "gro", "on"])
        ports = [line.split(":")[1].split("@")[0].strip() for line in links(world.switch("clients"))]
        for port in ports:
            if port.startswith("port"):
                world.switch("clients").run(["ethtool", "-K", port, "gro", "on"])
        second.sysctl("net/ipv4/ip_forward", 1)
        for name in ("web-1", "web-2"):
            clients.serve_http(world[name], name, f"0.0.0.0:{WEB_PORT}")
        world["client"].run(["ip", "route", "delete", "default"])
        yield world


def links(host: Host) -> list[str]:
    return host.run(["ip", "-o", "link"]).stdout.splitlines()


def web(world: World) -> Service:
    return Service("web", f"{VIP}:80", tuple(f"{world[name].ip}:{WEB_PORT}" for name in ("web-1", "web-2")))


@pytest.fixture(params=[pytest.param("xdp", marks=pytest.mark.bpf), "raw"])
def daemon(request: pytest.FixtureRequest, world: World) -> Iterator[Daemon]:
    with Daemon(world, request.param) as daemon:
        daemon.start_with = ["--announce", "arp"]
        write_manifests(daemon.file, [web(world)])
        yield daemon


def mac_of_vip(world: World) -> str:
    """Return which MAC address the client has for the VIP."""
    words = world["client"].run(["ip", "neigh", "show", VIP]).stdout.split()
    return words[words.index("lladdr") + 1] if "lladdr" in words else ""


def answered(world: World) -> int:
    result = clients.load_http(world["client"], f"{VIP}:80", connections=10, timeout=5)
    return result.answered


def forget(world: World) -> None:
    world["client"].run(["ip", "neigh", "flush", "all"])


def test_A_a_client_without_a_route_reaches_a_service_on_its_link(world, daemon):
    forget(world)
    assert answered(world) == 0
    forget(world)
    daemon.start()
    assert answered(world) == 10
    assert mac_of_vip(world) == world.node.mac
    reasons = daemon.ask("status")["reasons"]
    assert reasons["ARP_ANSWERED"] >= 1
    if daemon.engine == "xdp":  # with raw, nothing is punted
        assert reasons["VIP_ARP"] == reasons["ARP_ANSWERED"]
    assert daemon.ask("status")["state"] == "ok"


def test_A_without_being_asked_to_nothing_is_answered_or_announced(world, daemon, wire):
    daemon.start_with = []
    daemon.start()
    forget(world)
    assert answered(world) == 0
    assert not [frame for frame in wire.received() if Ether(frame).haslayer(ARP) and Ether(frame)[ARP].psrc == VIP]


def announced(wire: Wire) -> list[str]:
    """Return the addresses that have been announced since the last call."""
    packets = [Ether(frame) for frame in wire.received()]
    return [packet[ARP].psrc for packet in packets if ARP in packet and packet[ARP].psrc == packet[ARP].pdst]


def test_A_vips_are_announced_at_start_and_when_they_are_new(world, daemon, wire):
    daemon.start()
    daemon.wait_for(lambda: VIP in announced(wire))
    daemon.apply(web(world), Service("more", f"{FREE}:80", web(world).endpoints))
    seen: list[str] = []

    def is_announced_twice() -> bool:
        seen.extend(announced(wire))
        return seen.count(FREE) == 2

    daemon.wait_for(is_announced_twice)
    assert daemon.ask("status")["packets"]["userspace"]["originated"] >= 4


def test_A_an_answer_is_the_whole_frame_turned_round(world, daemon, wire):
    daemon.start()
    client = world["client"]
    request = Ether(dst="ff:ff:ff:ff:ff:ff", src=client.mac) / ARP(op=1, hwsrc=client.mac, psrc=client.ip, pdst=VIP)
    mac = world.node.mac
    answer = Ether(dst=client.mac, src=mac) / ARP(op=2, hwsrc=mac, psrc=VIP, hwdst=client.mac, pdst=client.ip)
    wire.received()
    wire.send(bytes(request))
    daemon.wait_for(lambda: bytes(answer) in wire.received())
    for packet in (
        Ether(dst="ff:ff:ff:ff:ff:ff", src=client.mac) / ARP(op=1, hwsrc=client.mac, psrc=client.ip, pdst=FREE),
        Ether(dst="ff:ff:ff:ff:ff:ff", src=client.mac) / ARP(op=2, hwsrc=client.mac, psrc=client.ip, pdst=VIP),
    ):
        before = daemon.ask("status")["reasons"]
        wire.send(bytes(packet))
        daemon.wait_for(
            lambda before=before: daemon.ask("status")["reasons"].get("NOT_IPV4", 0) > before.get("NOT_IPV4", 0)
        )
        assert daemon.ask("status")["reasons"]["ARP_ANSWERED"] == before["ARP_ANSWERED"]


@pytest.mark.parametrize("claim", ["an announcement", "a question", "an answer"])
def test_F008_somebody_else_with_a_vip_is_told(world, daemon, wire, claim):
    daemon.start()
    target, operation = {"an announcement": (VIP, 1), "a question": (world.node.ip, 1), "an answer": (VIP, 2)}[claim]
    packet = ARP(op=operation, hwsrc=STRANGER, psrc=VIP, pdst=target)
    wire.send(bytes(Ether(dst="ff:ff:ff:ff:ff:ff", src=STRANGER) / packet))
    daemon.wait_for(lambda: daemon.ask("status")["state"] == "degraded")
    status = daemon.ask("status")
    assert f"{VIP}: {STRANGER} on eth0 says" in "\n".join(status["why"])
    if daemon.engine == "xdp":  # it is XDP that counts them
        assert status["reasons"]["VIP_CLAIMED"] == 1
    assert f"{VIP} is announced by {STRANGER}" in daemon.said()


def test_F008_a_storm_is_answered_up_to_a_limit(world, daemon, wire):
    daemon.start()
    client = world["client"]
    question = bytes(
        Ether(dst="ff:ff:ff:ff:ff:ff", src=client.mac) / ARP(op=1, hwsrc=client.mac, psrc=client.ip, pdst=VIP)
    )

    def is_limited() -> bool:
        for _ in range(1500):
            wire.send(question)
        return daemon.ask("status")["reasons"].get("ARP_LIMITED", 0) > 0

    daemon.wait_for(is_limited)


def test_A_a_second_node_takes_over(world, daemon):
    """It is started with the same manifests; the client's ARP table follows its announcement."""
    daemon.start()
    assert answered(world) == 10
    assert mac_of_vip(world) == world.node.mac
    with Daemon(world, daemon.engine, host=world["second"]) as second:
        second.settings = replace(second.settings, interfaces=("eth0", "eth1"))
        second.start_with = ["--announce", "arp"]
        write_manifests(second.file, [web(world)])
        daemon.signal(signal.SIGSTOP)
        try:
            second.start()
            second.wait_for(lambda: mac_of_vip(world) == world["second"].mac)
            for name in ("web-1", "web-2"):
                world[name].run(["ip", "route", "replace", "default", "via", "10.77.2.200"])
            assert answered(world) == 10
        finally:
            daemon.signal(signal.SIGCONT)
            for name in ("web-1", "web-2"):
                world[name].run(["ip", "route", "replace", "default", "via", world.node.interface_to("servers").ip])
        daemon.wait_for(lambda: f"{VIP}: {world['second'].mac}" in "\n".join(daemon.ask("status")["why"]))
