"""A whole node behind one interface: the same scenario, whatever moves the packets.

    client (10.77.1.2) ---- eth0 +------+ eth2 ---- other (10.77.3.2)
                                 | node |
                                 +--+---+ eth1 ---- web-1, web-2, web-3, near (10.77.2.2 to .5)

Over IPv6 (family 6) hosts have fd77:0:1::2 and so on, beside these.

`node.send(frame, "client")` puts a frame on the wire at a host and returns what came of it: the frames that left the
node, each with the host that it is addressed to, those that were given to the kernel, and the reasons counted.

tests/memory_node.py is one without root, tests/daemon_node.py a daemon between silent hosts.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from perf.world import Interface, NetworkPlan, plan
from tests.packets import OTHER_MAC, Address
from tests.services import Service, split, text_of, vip
from xdp.addresses import number_of
from xdp.schema import Reason

HOSTS = {
    "client": "clients",
    "web-1": "servers",
    "web-2": "servers",
    "web-3": "servers",
    "near": "servers",
    "other": "others",
}
CONNECTIONS = 20_000
NODE_NAME, ZONE = "node-1", "zone-a"  # who the node is to manifests
_FIRST_PORT = 20_000


class Sent(NamedTuple):
    """What came of frames that were sent."""

    left: list[tuple[str, bytes]]  # (host that it is addressed to, frame)
    passed: list[bytes]  # to the kernel
    reasons: Counter[Reason]  # without those of punts, which are not the end of a packet

    @property
    def only(self) -> tuple[str, bytes]:
        """The one frame that left, and to whom; nothing else happened."""
        assert (len(self.left), self.passed) == (1, []), self
        return self.left[0]

    @property
    def reason(self) -> Reason:
        """The one reason that was counted."""
        assert self.reasons.total() == 1, self
        return next(iter(self.reasons))


class ScenarioNode(ABC):
    """What scenarios may ask of a node. Frames are bytes; addresses are those of tests/packets.py."""

    engine: str

    def __init__(self, family: int = 4) -> None:
        self.family = family  # that packets and Services are of
        self.networks = plan(HOSTS)
        self.sent = 0  # frames that hosts have put on the wires
        self._ports = itertools.count(_FIRST_PORT)

    # The places.

    def network_of(self, host: str) -> NetworkPlan:
        """Return the network that a host is on."""
        return next(network for network in self.networks if host in network.hosts)

    def end_of(self, host: str) -> Interface:
        """Return a host's interface."""
        return self.network_of(host).hosts[host]

    def vip(self, number: int, port: int) -> str:
        """Return a port of a Service's address, as manifests write it."""
        return vip(number, port, self.family)

    def of_family(self, service: Service) -> Service:
        """Return a Service of an IPv4 address at the same number of the node's family."""
        host, port = split(service.frontend)
        return replace(service, frontend=self.vip(int(host.rpartition(".")[2]), port))

    def of_end(self, end: Interface) -> int:
        """Return an interface's address."""
        return number_of(end.address.ip if self.family == 4 else end.address6.ip)

    def at(self, host: str, port: int) -> Address:
        """Return a place on a host."""
        return self.of_end(self.end_of(host)), port

    def endpoint(self, host: str, port: int = 8080) -> str:
        """Return a place on a host, as manifests write it."""
        return text_of(self.at(host, port))

    def client(self, host: str = "client") -> Address:
        """Return a place on a host that no connection has begun from yet."""
        return self.at(host, next(self._ports))

    def host_of(self, place: Address) -> str:
        """Return the host that has an address."""
        return next(host for host in HOSTS if self.of_end(self.end_of(host)) == place[0])

    def own(self, host: str, port: int = 0) -> Address:
        """Return the node's own address, with a port, on the network of a host."""
        return self.of_end(self.network_of(host).node_interface), port

    def macs(self, host: str) -> bytes:
        """Return how a frame from the node to a host begins: destination and source address."""
        return bytes_of_mac(self.end_of(host)) + bytes_of_mac(self.network_of(host).node_interface)

    def on_the_wire(self, frame: bytes, host: str) -> bytes:
        """Return a frame as a host sends it: with its MAC address, and with the node's.

        That to a group stays, or to one of another kind than the plan has (packets.OTHER_MAC).
        """
        if frame[0] & 1 or frame[:3] == OTHER_MAC[:3]:
            return frame[:6] + bytes_of_mac(self.end_of(host)) + frame[12:]
        return bytes_of_mac(self.network_of(host).node_interface) + bytes_of_mac(self.end_of(host)) + frame[12:]

    # What every engine does.

    @abstractmethod
    def apply(self, *services: Service) -> None:
        """Make these the Services, and no others; return when they are."""

    def send(self, frame: bytes, host: str = "client") -> Sent:
        """Send a frame from a host to the node; return what came of it, when it has come."""
        return self.send_all([frame], host)

    @abstractmethod
    def send_all(self, frames: Sequence[bytes], host: str = "client", ends: int | None = None) -> Sent:
        """Send frames one after the other; return what came of them when all have met their ends, or `ends` of them.

        The others wait in the node, and end later.
        """

    @abstractmethod
    def answer(self, command: str, **options: Any) -> Any:
        """Return what the control socket answers."""

    def flows(self, **filters: Any) -> list[dict[str, Any]]:
        """Return the connections."""
        return self.answer("flows", **filters)  # type: ignore[no-any-return]

    def flow(self, client: Address) -> dict[str, Any]:
        """Return the one connection of a client's address and port."""
        (found,) = self.flows(client=text_of(client))
        return found

    def status(self) -> dict[str, Any]:
        """Return the status."""
        return self.answer("status")  # type: ignore[no-any-return]

    @abstractmethod
    def check_accounts(self) -> None:
        """Assert that every frame sent so far has been counted once by everybody who saw it (docs/architecture.md)."""


def bytes_of_mac(end: Interface) -> bytes:
    """Return the MAC address of an interface."""
    return bytes.fromhex(end.mac.replace(":", ""))
