"""Two nodes on wires of the same plan: on one the kernel's NAT serves, on the other turnout does."""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator

from perf.world import World, wait_until
from tests.daemon_node import DaemonNode
from tests.node import HOSTS, ScenarioNode
from tests.packets import udp
from tests.wires import Wire

Left = list[tuple[str, bytes]]  # (host, frame)
_PATIENCE_S = 5.0
_SYSCTLS = {
    "net/ipv4/ip_forward": 1,
    "net/ipv4/icmp_ratelimit": 0,
    "net/ipv4/conf/all/send_redirects": 0,
    "net/ipv4/conf/all/rp_filter": 0,
}


class Side(ABC):
    """A node of which only the wires are seen."""

    def __init__(self, world: World, plan: ScenarioNode, wires: dict[str, Wire]) -> None:
        self._plan = plan
        self._wires = wires
        self._numbers = itertools.count()
        for name, value in _SYSCTLS.items():
            world.node.sysctl(name, value)
        # As on most nodes, something is there for every address: what is not kept here is seen to leave.
        world.node.run(["ip", "route", "add", "default", "via", plan.endpoint("other").partition(":")[0]])
        for interface in world.node.interfaces:
            for name in ("send_redirects", "rp_filter"):
                world.node.sysctl(f"net/ipv4/conf/{interface.name}/{name}", 0)

    @abstractmethod
    def send(self, frame: bytes, host: str) -> Left:
        """Send a frame from a host; return all that hosts got because of it, in order of their names."""

    def _put(self, frame: bytes, host: str) -> None:
        self._wires[host].send(self._plan.on_the_wire(frame, host))

    def _until_marked(self, host: str) -> Left:
        """Return what hosts have got before a datagram that is sent now and that every node routes: all there will be.

        The kernel takes the frames of one interface in order, and answers before it takes the next one.
        """
        to = "client" if host == "other" else "other"
        payload = f"mark {next(self._numbers)}".encode()
        mark = udp(self._plan.at(host, 9), self._plan.at(to, 9), payload)
        self._put(mark, host)
        found: Left = []

        def is_marked() -> bool:
            for name, wire in self._wires.items():  # a node tells of its groups (IGMP) when it likes
                found.extend((name, frame) for frame in wire.received() if not frame[0] & 1)
            return any(payload in frame for _, frame in found)

        assert wait_until(is_marked, _PATIENCE_S, 0.0005), "the node does not route"
        return sorted((name, frame) for name, frame in found if payload not in frame)


class TurnoutSide(Side):
    """What XDP or userspace forwards, and what the kernel makes of what was passed to it."""

    def __init__(self, node: DaemonNode) -> None:
        super().__init__(node.daemon.world, node, node._hosts)
        self._node = node

    def send(self, frame: bytes, host: str) -> Left:
        left = self._node.send(frame, host).left + self._until_marked(host)
        self._node._collect()  # what was passed to the kernel, and the mark
        return sorted(left)


class KernelSide(Side):
    """Rules of nftables, conntrack and the kernel's routing."""

    def send(self, frame: bytes, host: str) -> Left:
        self._put(frame, host)
        return self._until_marked(host)


@contextlib.contextmanager
def kernel_side(prefix: str, plan: ScenarioNode, rules: str) -> Iterator[KernelSide]:
    """Make a node with these rules; it is gone afterwards."""
    with World(prefix, HOSTS, static_neighbours=True) as world:
        for host in HOSTS:
            world[host].run(["ip", "address", "flush", "dev", "eth0"])
        world.node.run(["nft", "-f", "-"], text_in=rules)
        wires = {host: Wire(world[host], "eth0") for host in HOSTS}
        try:
            yield KernelSide(world, plan, wires)
        finally:
            for wire in wires.values():
                wire.close()
