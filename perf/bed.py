"""Testbeds: a world client -- node -- server in which frames are sent and counted, and a subject forwards them.

All subjects have the same: the generator sends from the client's wire and the sink counts at the server's; for replies
it is the other way round. A subject is started in the node and does the rest.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, Self

from perf.traffic import PINS, SERVICE_PORT, Generator, Kit, Load, Sink, Stream, Task
from perf.world import Host, World
from xdp.addresses import IPAddress
from xdp.schema import Protocol

# By family: networks that are routed to the client's host, of 2^19 clients and more; the first of them, and of VIPs.
CLIENTS = {4: "10.200.0.0/13", 6: "fd77:200::/64"}
FIRST_CLIENT = {4: ip_address("10.200.0.0"), 6: ip_address("fd77:200::1")}
FIRST_VIP = {4: ip_address("10.96.0.10"), 6: ip_address("fd96::a")}
ENDPOINTS = 4
_FEWEST_WARM = 4096  # packets that warm a bed up, however few its flows


@dataclass(frozen=True)
class Service:
    """A Service: its VIP, the addresses of its endpoints, its protocol (udp, tcp) and port; endpoints have one port."""

    vip: IPAddress
    endpoints: tuple[IPAddress, ...]
    protocol: str = "udp"
    port: int = SERVICE_PORT


class Cpus:
    """Who runs where: the generator, and with it the kernel's receive path, on the last CPU; userspace elsewhere."""

    def __init__(self) -> None:
        everyone = sorted(os.sched_getaffinity(0))
        self.generator = {everyone[-1]}
        self.others = set(everyone[:-1]) or self.generator

    @staticmethod
    @contextlib.contextmanager
    def pinned(cpus: set[int]) -> Iterator[None]:
        """Keep the calling thread, and what it starts meanwhile, on `cpus`."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def describe(self) -> str:
        """Return it in words, for the conditions of a row."""
        generator, others = (",".join(map(str, sorted(cpus))) for cpus in (self.generator, self.others))
        return f"generator and kernel receive path on CPU {generator}, userspace on CPU {others}"


@dataclass(frozen=True, order=True)
class Shape:
    """What a testbed's node serves: so many Services of so many endpoints, and their protocol (udp, tcp) and family.

    With `vlan`, all frames have its tag.
    """

    services: int = 1
    endpoints: int = ENDPOINTS
    protocol: str = "udp"
    family: int = 4
    vlan: int = 0


ONE_SERVICE = Shape()


class Lane(NamedTuple):
    """One way through the node: who sends, who counts, and the node's interface that receives."""

    generator: Generator
    sink: Sink
    entrance: str


class Testbed:
    """A world with generators and sinks, as a context manager. Traffic goes to the last Service, or to all in turn."""

    __test__ = False  # pytest takes the name for a test

    def __init__(self, prefix: str, cpus: Cpus, kit: Kit, shape: Shape | None = None) -> None:
        self.prefix = prefix
        self.cpus = cpus
        self.shape = shape or Shape()
        is_ipv6 = self.shape.family == 6
        self.world = World(prefix, ["client", "server"], static_neighbours=True, ipv6=is_ipv6)
        self.pins = PINS / prefix
        self.load = Load()
        self.subject: object = None  # what runs in the node
        self.daemon: subprocess.Popen[Any] | None = None  # of a subject that has one
        self._kit = kit
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            world = stack.enter_context(self.world)
            self.state = Path(tempfile.mkdtemp(prefix=f"{self.prefix}-"))
            world.owns_folder(self.state)
            world.owns_folder(self.pins)
            self.pins.mkdir()
            self.inside = world.node.interface_to("client")
            self.outside = world.node.interface_to("server")
            client, server = world["client"], world["server"]
            family, vlan = self.shape.family, self.shape.vlan
            first = self._address(server)
            here = [self._endpoint(server, first + n) for n in range(self.shape.endpoints)]
            self.original_last = here[-1]
            self.spare = self._endpoint(server, first + self.shape.endpoints)  # no Service has it at first
            world.node.run(["ip", "route", "add", CLIENTS[family], "via", str(self._address(client))])
            protocol = self.shape.protocol
            self.services = [
                Service(FIRST_VIP[family] + n, tuple(here), protocol, SERVICE_PORT) for n in range(self.shape.services)
            ]
            number = Protocol[protocol.upper()]
            vip = self.services[-1].vip
            ends = client.mac, self.inside.mac, FIRST_CLIENT[family], vip
            stream = Stream("eth0", *ends, SERVICE_PORT, number, vlan=vlan)
            self.out = Lane(
                stack.enter_context(Generator(self._kit, client, stream)),
                stack.enter_context(Sink(self._kit, server, "eth0", number, family=family, vlan=vlan)),
                self.inside.name,
            )
            stream = replace(
                stream, src_mac=server.mac, dst_mac=self.outside.mac, server=first, server_port=8080, is_reply=True
            )
            self.back = Lane(
                stack.enter_context(Generator(self._kit, server, stream)),
                stack.enter_context(Sink(self._kit, client, "eth0", number, "back", family, vlan)),
                self.outside.name,
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _address(self, host: Host) -> IPAddress:
        end = host.interfaces[0]
        return ip_address(end.ip6 if self.shape.family == 6 else end.ip)

    def _endpoint(self, server: Host, address: IPAddress) -> IPAddress:
        if address != self._address(server):
            behind = ["/24"] if address.version == 4 else ["/64", "nodad"]
            server.run(["ip", "address", "add", f"{address}{behind[0]}", "dev", "eth0", *behind[1:]])
            at = ["lladdr", server.mac, "dev", self.outside.name, "nud", "permanent"]
            self.world.node.run(["ip", "neighbour", "add", str(address), *at])
        return address

    def prepare(self, load: Load, lane: Lane | None = None) -> None:
        """Choose what is sent next. Known flows are all seen and answered twice, so that they are established.

        Without replies the kernel's connection tracking, and its rules, would take UDP for new again and again.
        """
        self.load = load
        if load.new_every != 1:
            self.out.generator.choose(replace(load, new_every=0))
            with self.out.sink.doing(Task.REFLECT):
                for _ in range(2):
                    frames = max(load.flows, _FEWEST_WARM)
                    self.out.generator.send_in_step(self.out.sink, frames=frames)
        (lane or self.out).generator.choose(load)

    def received(self, lane: Lane) -> int:
        """Return the node's own count of packets that came in on this way."""
        return self.world.node.packets(lane.entrance)
