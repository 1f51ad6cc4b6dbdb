"""A whole node behind one interface: the same scenario, whatever moves the packets.

    client (10.77.1.2) ---- eth0 +------+ eth2 ---- other (10.77.3.2)
                                 | node |
                                 +--+---+ eth1 ---- web-1, web-2, web-3, near (10.77.2.2 to .5)

Over IPv6 (family 6) hosts have fd77:0:1::2 and so on, beside these.

`node.send(frame, "client")` puts a frame on the wire at a host and returns what came of it: the frames that left the
node, each with the host that it is addressed to, those that were given to the kernel, and the reasons counted.

`MemoryNode` is the real packet path over tables in plain memory, on a network given as data and a clock that stands
still: no root. `DaemonNode` is `turnout run` in a world of namespaces. There the hosts are silent: they see every
frame and answer none, so that nothing is on the wires but what a test sends. The node's kernel does not forward, so
that a frame it was given goes no further.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import struct
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from conntrack.table import FlowTable
from dataplane import netdev, stations
from dataplane.context import AWAITED, NOWHERE, masquerading, new_node
from dataplane.control import ask
from dataplane.netdev import TABLE_LOCAL, Changes, Neighbour, NeighbourKey, NeighbourState, Route, RouteKind
from dataplane.nexthops import NextHops
from dataplane.node import Node
from dataplane.pipeline import handle
from dataplane.settings import OPTIONS, Settings
from dataplane.shortages import Shortages
from dataplane.vlans import words_of
from lb import maglev
from lb.manifests import Reader
from lb.table import ServiceTable
from perf.world import Host, Interface, NetworkPlan, World, plan, wait_until
from tests.packets import OTHER_MAC, Address, address
from xdp import files, maps
from xdp.addresses import address_of, host_bits, number_of, with_port
from xdp.byteorder import swap16, swap32
from xdp.clock import ManualClock
from xdp.errors import Error
from xdp.files import SharedFile
from xdp.maps import SharedMaps
from xdp.names import Names
from xdp.schema import Limit, Ping, Reason, Verdict, verdict_of
from xdp.tables import Capacity, Tables

ROOT = Path(__file__).parents[1]
TURNOUT = [sys.executable, "-m", "dataplane.cli"]
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
START_S = 180.0  # the first start of a version compiles the packet path
_PATIENCE_S = 5.0  # a held frame is dropped after one second
_FIRST_PORT = 20_000
_FIRST_PUNT = 96  # reasons from here on are punts


@dataclass(frozen=True)
class Service:
    """A Service port, written as text: `Service("web", "10.96.0.1:80", ("10.77.2.2:8080",))`."""

    name: str
    frontend: str
    endpoints: tuple[str, ...] = ()
    protocol: str = "TCP"
    annotations: Mapping[str, str] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)  # more fields of the Service's spec
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # more fields of an endpoint, by its text
    ingress: tuple[str, ...] = ()  # addresses of a load balancer

    def with_endpoints(self, *endpoints: str) -> Service:
        """Return the same Service with other endpoints."""
        return replace(self, endpoints=endpoints)

    @property
    def at(self) -> Address:
        """The frontend as numbers."""
        return address(self.frontend)

    @property
    def key(self) -> str:
        """The port's name in answers."""
        return f"shop/{self.name}:main"

    def living(self) -> Iterator[str]:
        """Yield the endpoints that serve."""
        for endpoint in self.endpoints:
            conditions = self.about.get(endpoint, {}).get("conditions", {})
            if conditions.get("ready", True) or (conditions.get("terminating") and conditions.get("serving", True)):
                yield endpoint

    def objects(self) -> list[dict[str, Any]]:
        """Return the Kubernetes objects: the Service, and a slice for every port number of its endpoints."""
        vip, port = split(self.frontend)
        slices: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for endpoint in self.endpoints:
            host, number = split(endpoint)
            slices.setdefault((number, "IPv6" if ":" in host else "IPv4"), []).append(
                {"addresses": [host], **self.about.get(endpoint, {})}
            )
        metadata = {"namespace": "shop", "name": self.name, "annotations": dict(self.annotations)}
        ports = [{"name": "main", "port": int(port), "protocol": self.protocol}]
        spec = {"clusterIP": vip, "ports": ports, **self.spec}
        status = {"loadBalancer": {"ingress": [{"ip": ip} for ip in self.ingress]}}
        return [
            {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": status},
            *(
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "namespace": "shop",
                        "name": f"{self.name}-{number}-{address_type.lower()}",
                        "labels": {"kubernetes.io/service-name": self.name},
                    },
                    "addressType": address_type,
                    "ports": [{"name": "main", "port": number, "protocol": self.protocol}],
                    "endpoints": endpoints,
                }
                for (number, address_type), endpoints in slices.items()
            ),
        ]

    def shown(self) -> tuple[str, str, str, frozenset[str]]:
        """Return what `get services` is to say: name, protocol, frontend, endpoints."""
        return self.name, self.protocol, self.frontend, frozenset(self.endpoints)


def split(place: str) -> tuple[str, int]:
    """Return (address, port) of `10.0.0.1:80` or `[2001:db8::1]:80`."""
    host, _, port = place.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def vip(number: int, port: int, family: int) -> str:
    """Return a port of a Service's address, as manifests and clients write it."""
    return f"10.96.0.{number}:{port}" if family == 4 else f"[fd96::{number:x}]:{port}"


def write_manifests(path: Path, services: Iterable[Service]) -> None:
    """Replace the manifest file at once, as careful editors and controllers do."""
    items = [one for service in services for one in service.objects()]
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    beside.replace(path)


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
        return _mac(self.end_of(host)) + _mac(self.network_of(host).node_interface)

    def on_the_wire(self, frame: bytes, host: str) -> bytes:
        """Return a frame as a host sends it: with its MAC address, and with the node's.

        That to a group stays, or to one of another kind than the plan has (packets.OTHER_MAC).
        """
        if frame[0] & 1 or frame[:3] == OTHER_MAC[:3]:
            return frame[:6] + _mac(self.end_of(host)) + frame[12:]
        return _mac(self.network_of(host).node_interface) + _mac(self.end_of(host)) + frame[12:]

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


def text_of(place: Address) -> str:
    """Return an address and port as `10.0.0.1:80` or `[2001:db8::1]:80`."""
    return with_port(*place)


def _mac(end: Interface) -> bytes:
    return bytes.fromhex(end.mac.replace(":", ""))


# In memory.


class _PaperNetwork:
    """What dataplane.netdev would tell about the node's network, from its plan. All neighbours are known for ever."""

    def __init__(self, networks: list[NetworkPlan]) -> None:
        self._networks = dict(enumerate(networks, 1))
        self._ends = [
            (number, end)
            for number, network in self._networks.items()
            for end in (network.node_interface.address, network.node_interface.address6)
        ]

    def fileno(self) -> int:
        return -1

    def interfaces(self) -> list[netdev.Interface]:
        ends = {number: network.node_interface for number, network in self._networks.items()}
        return [netdev.Interface(end.name, number, _mac(end), 1500, is_up=True) for number, end in ends.items()]

    def statistics(self, ifindex: int) -> netdev.Statistics:  # noqa: ARG002
        return netdev.Statistics(0, 0, 0, 0, 0, 0)  # nothing has gone over paper

    def routes(self) -> list[Route]:
        own = [
            Route(number_of(end.ip), host_bits(number_of(end.ip)), RouteKind.LOCAL, number, table=TABLE_LOCAL,
                  preferred_source=number_of(end.ip))
            for number, end in self._ends
        ]  # fmt: skip
        return own + [
            Route(number_of(end.network.network_address), end.network.prefixlen, ifindex=number,
                  preferred_source=number_of(end.ip))
            for number, end in self._ends
        ]  # fmt: skip

    def neighbours(self) -> list[Neighbour]:
        return [
            Neighbour(number, number_of(address.ip), _mac(end), NeighbourState.PERMANENT)
            for number, network in self._networks.items()
            for end in network.hosts.values()
            for address in (end.address, end.address6)
        ]

    def changes(self) -> Changes:
        return Changes()

    def resolve(self, keys: Iterable[NeighbourKey], *, keep: bool) -> dict[NeighbourKey, int]:  # noqa: ARG002
        return {}

    def let_go(self, keys: Iterable[NeighbourKey]) -> None:
        pass


class _NoEngine:
    """What a node asks its engine, when the test itself moves the frames."""

    name = "memory"
    offloads = False
    is_alive = True
    needs_rows = False
    why_no_egress = ""
    queues: tuple[()] = ()

    def __init__(self) -> None:
        self.attachments: dict[str, Any] = {}

    def stalled(self) -> list[str]:
        return []

    def complaints(self) -> list[str]:
        return []

    def lost(self) -> int:
        return 0

    def expecting(self, rows: object, own: object) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Be told what the tables are about to say, which only engine `raw` listens to."""
        return contextlib.nullcontext()

    def expect_more(self, rows: object) -> None:
        """Be told what they are about to say as well."""


class _Held(NamedTuple):
    """A frame that waits."""

    frame: bytes
    host: str
    since: int


class MemoryNode(ScenarioNode):
    """The packet path over plain memory: a frame in, a frame out, at a time of the test's choice."""

    engine = "memory"

    def __init__(self, folder: Path, flags: Mapping[str, str] | None = None, family: int = 4) -> None:
        super().__init__(family)
        more: dict[str, Any] = {}
        for name, value in (flags or {}).items():
            option = OPTIONS[name]
            read = tuple(map(option.read, value.split()))
            more[option.field] = read if option.is_list else read[0]
        self._file = folder / "services.json"
        self.clock = ManualClock()
        rows = {"frontends": 256, "services": 256, "maglev_slots": 1 << 17, "endpoints": 1024, "next_hops": 256}
        tables = Tables.in_memory(Capacity(connections=CONNECTIONS, **rows))
        names = tuple(network.node_interface.name for network in self.networks)
        settings = Settings(
            "memory", (str(self._file),), names, capacity=CONNECTIONS, node_name=NODE_NAME, zone=ZONE,
            run_folder=folder, **more,
        )  # fmt: skip
        self._node = node = Node(settings)
        node.netdev = _PaperNetwork(self.networks)  # type: ignore[assignment]
        node.shared = SimpleNamespace(tables=tables)  # type: ignore[assignment]
        node.clock = self.clock  # type: ignore[assignment]
        node.flows = FlowTable(tables, self.clock)
        node.flows.create()
        node.next_hops = NextHops(tables, node.netdev, names)
        node.services = ServiceTable(tables, maglev.DEFAULT_SEED, node.next_hops.row_for)
        node.engine = _NoEngine()  # type: ignore[assignment]
        node.shortages = Shortages(settings, tables)
        self._tables = tables
        sources = masquerading(settings.cluster_cidr, settings.snat_ports, settings.snat_addresses, Names(tables))
        self._path = new_node(tables, node.next_hops.hops, maglev.DEFAULT_SEED, sources)
        tables.control[0]["ping"] = Ping[settings.ping.upper()]
        tables.control[0]["vlans"] = words_of(settings.vlans)
        tables.control[0]["stations"] = stations.words_of(node.next_hops.stations())
        self._frames = np.zeros(4096, np.uint8)
        self._held: list[_Held] = []
        self._is_awaited = False

    def apply(self, *services: Service) -> None:
        write_manifests(self._file, services)
        node = self._node
        live = node._load()
        node.end_succeeded(node.snapshot.ports, live.snapshot().ports)
        node._apply(live)
        node.clear_up(node.services.take_parted())  # what its sweep would do
        node.end_strays()

    def reload(self, *objects: Mapping[str, Any]) -> bool:
        """Have the manifests be these, as a daemon whose files have changed, one an object; tell if all were read."""
        folder = self._file.parent / "objects"
        if not folder.exists():
            folder.mkdir()
            self._node._manifests = Reader([str(folder)])
        wanted = {folder / f"{each['kind']}-{each['metadata']['name']}.json": json.dumps(each) for each in objects}
        changed = {path for path in folder.glob("*.json") if path not in wanted}
        for path in changed:
            path.unlink()
        for path, text in wanted.items():
            if not path.exists() or path.read_text() != text:
                path.with_suffix(".aside").write_text(text)
                path.with_suffix(".aside").rename(path)
                changed.add(path)
        plan = self._node._plan({*map(str, changed)})
        if plan is not None:
            self._node._apply_plan(plan)
        else:
            self._node._apply(self._node._load())
        self._node.clear_up(self._node.services.take_parted())
        self._node.end_strays(self._node.take_unswept())
        return plan is None

    def programmed(self) -> dict[str, set[str]]:
        """Return {frontend: the addresses of its endpoints} of IPv4, as packets find them."""
        found = {}
        tables = self._tables
        for frontend in tables.frontends[(tables.frontends["used"] == 1) & (tables.frontends["port"] != 0)]:
            row = tables.services[frontend["service"]]
            slots = tables.maglev[row["first_slot"] : row["first_slot"] + row["slots"]]
            hosts = tables.endpoints[np.unique(slots)]["addr"]
            place = with_port(swap32(frontend["addr"]), swap16(frontend["port"]))
            found[place] = {str(address_of(swap32(host))) for host in hosts}
        return found

    def send_all(self, frames: Sequence[bytes], host: str = "client", ends: int | None = None) -> Sent:  # noqa: ARG002
        self.sent += len(frames)
        all_of_them = Sent([], [], Counter())
        for frame in frames:
            self._held.append(_Held(frame, host, self.clock.now()))
            for sent in self._turn():
                all_of_them.left.extend(sent.left)
                all_of_them.passed.extend(sent.passed)
                all_of_them.reasons.update(sent.reasons)
        return all_of_them

    def _turn(self) -> Iterator[Sent]:
        """Do what a packet loop does: try what is new, what waits for a fragment, and drop what has waited too long."""
        began = -1
        while began != int(self._path.fragments.begun[0]):
            began = int(self._path.fragments.begun[0])
            waiting, self._held = self._held, []
            for held in waiting:
                sent = self._handled(held.frame, held.host)
                is_old = self.clock.now() - held.since > Limit.FRAGMENT_S * self.clock.hertz
                if sent.reasons.keys() == {Reason.FRAGMENT_ALONE} and self._is_awaited and not is_old:
                    self._held.append(held)
                else:
                    self._tables.worker_counters[0]["packets"][sent.reason] += 1
                    yield sent

    def _handled(self, frame: bytes, host: str) -> Sent:
        given = self.on_the_wire(frame, host)
        self._frames[: len(given)] = np.frombuffer(given, np.uint8)
        self._path.link[0]["ifindex"] = self.networks.index(self.network_of(host)) + 1
        code, egress = handle(self._path, self._frames, 0, len(given), np.uint32(self.clock.now()))
        reason, self._is_awaited = Reason(int(code)), egress == AWAITED
        became = self._frames[: self._path.packet[0]["length"]].tobytes()
        if egress not in (NOWHERE, AWAITED):
            self._tables.worker_counters[0]["originated"] += verdict_of(reason) is Verdict.DROP
            return Sent([(self._addressee(int(egress), became), became)], [], Counter([reason]))
        assert verdict_of(reason) is not Verdict.FORWARD
        assert became == given, "only what leaves may be changed"
        return Sent([], [given] if verdict_of(reason) is Verdict.PASS else [], Counter([reason]))

    def _addressee(self, ifindex: int, frame: bytes) -> str:
        network = self.networks[ifindex - 1]
        return next(host for host, end in network.hosts.items() if _mac(end) == frame[:6])

    def answer(self, command: str, **options: Any) -> Any:
        async def answered() -> Any:  # views that look at every flow are awaitables
            data = self._node.answer(command, options)
            return await data if isinstance(data, Awaitable) else data

        return asyncio.run(answered())

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.advance(seconds)

    def look_for_shortages(self) -> None:
        """Have it find out what there was no room for."""
        self._node.look_for_shortages()

    def sweep(self) -> None:
        """End what has expired."""
        self._node.flows.sweep()

    def check_accounts(self) -> None:
        assert sum(self.status()["reasons"].values()) == self.sent


# On the wire.

_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_AUXDATA = 263, 8  # linux/if_packet.h
_AUXDATA = struct.Struct("=IIIHHHH")  # status, length, captured, MAC offset, network offset, VLAN tag, VLAN type
_VLAN_VALID = 1 << 4

# A kernel with IPv6 tells of itself, unasked.
_SILENCE = "table ip6 silence {\nchain output {\ntype filter hook output priority 0; policy drop;\n}\n}\n"
_TO_US = (socket.PACKET_HOST, socket.PACKET_BROADCAST, socket.PACKET_MULTICAST)
_TO_ANYBODY = (*_TO_US, socket.PACKET_OTHERHOST)


class Wire:
    """An interface as a packet socket sees it: sends frames, and collects what arrives."""

    def __init__(self, host: Host, interface: str, kinds: tuple[int, ...] = _TO_US) -> None:
        self._kinds = kinds
        with host.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        self._socket.setblocking(False)
        self._socket.bind((interface, _ETH_P_ALL))

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def received(self) -> list[bytes]:
        """Return the frames that have arrived since the last call and were addressed to this interface, or to all."""
        frames = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, ancillary, _, (_, _, kind, *_) = self._socket.recvmsg(1 << 16, 256)
                if kind in self._kinds:
                    frames.append(_with_tag(data, ancillary))
        return frames

    def close(self) -> None:
        self._socket.close()


def _with_tag(data: bytes, ancillary: list[tuple[int, int, bytes]]) -> bytes:
    """Return a frame with the VLAN tag that the kernel took out for the socket's sake."""
    for level, kind, value in ancillary:
        if (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA):
            status, _, _, _, _, tag, tag_type = _AUXDATA.unpack_from(value)
            if status & _VLAN_VALID:
                return data[:12] + struct.pack("!HH", tag_type, tag) + data[12:]
    return data


_ENGINE_FLAGS = {
    "xdp": ["--engine", "xdp", "--xdp-mode", "native"],
    "xdp-auto": ["--engine", "xdp"],
    "xdp-generic": ["--engine", "xdp", "--xdp-mode", "generic"],
    "afxdp": ["--engine", "afxdp"],
    "raw": ["--engine", "raw"],
}


class Daemon:
    """`turnout run` in the node of a world. A context manager: leaving it ends the daemon and removes what it made."""

    def __init__(
        self,
        world: World,
        engine: str,
        *,
        capacity: int = CONNECTIONS,
        on_exit: str | None = None,
        host: Host | None = None,
        flags: Mapping[str, str] | None = None,
    ) -> None:
        self.world = world
        self.host = host or world.node
        self.engine = engine
        self.folder = Path(tempfile.mkdtemp(prefix=f"{world.prefix}-"))
        world.owns_folder(self.folder)
        self.file = self.folder / "services.json"
        self.log = self.folder / "log"
        names = tuple(interface.name for interface in self.host.interfaces)
        self.settings = Settings(
            f"{world.prefix}-{engine}-{self.host.name}", (str(self.file),), names, capacity=capacity
        )
        self._flags = [*_ENGINE_FLAGS[engine], *(["--on-exit", on_exit] if on_exit else [])]
        self.start_with: list[str] = []  # flags beside those, which win
        for name, value in (flags or {}).items():
            self._flags += [f"--{name}", *value.split()]
        self.process: subprocess.Popen[Any] | None = None

    def __enter__(self) -> Self:
        write_manifests(self.file, ())
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.world.end(self.process)
        self.turnout("detach", check=False)
        self.settings.lock_path.unlink(missing_ok=True)

    def turnout(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line for this node."""
        command = [*TURNOUT, *arguments, "--name", self.settings.name]
        return self._in_folder(command, check)

    def _in_folder(self, command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.host.inside(command), capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
        )
        assert not check or done.returncode == 0, (command, done.returncode, done.stderr)
        return done

    def rename(self, old: str, new: str) -> None:
        """Serve an interface that is called otherwise now, from the next start on."""
        names = tuple(new if name == old else name for name in self.settings.interfaces)
        self.settings = replace(self.settings, interfaces=names)

    def start(self) -> None:
        """Start it; return when it serves."""
        interfaces = [word for name in self.settings.interfaces for word in ("-i", name)]
        command = [*TURNOUT, "run", "--name", self.settings.name, "-f", str(self.file), *interfaces, *self._flags]
        command += ["--capacity", str(self.settings.capacity), "--node-name", NODE_NAME, "--zone", ZONE]
        command += self.start_with
        with self.log.open("a") as stream:
            self.process = self.host.popen(command, stdout=stream, stderr=stream, cwd=ROOT)
        self.wait_for(lambda: self.process.poll() is not None or self.is_answering(), START_S)  # type: ignore[union-attr]
        assert self.process.poll() is None, self.said()

    def tables(self) -> SharedMaps | SharedFile:
        """Return the shared tables, to be looked at: also when the daemon does not answer."""
        if self.engine == "raw":
            return files.open_tables(self.settings.table_folder, read_only=True)
        return maps.open_tables(self.settings.pins, read_only=True)

    def is_answering(self) -> bool:
        """Whether the control socket answers: the daemon serves."""
        try:
            ask(self.settings, "interfaces", timeout_s=5)
        except Error:
            return False
        return True

    def said(self) -> str:
        """Return what it wrote on stderr."""
        return self.log.read_text()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for its end; return its exit code."""
        assert self.process is not None
        return self.process.wait(timeout_s)

    def ask(self, command: str, **options: Any) -> Any:
        """Return what the control socket answers."""
        return ask(self.settings, command, options, timeout_s=30)

    def apply(self, *services: Service) -> None:
        """Change the manifest file; return when the daemon has applied it, as the watch over files has told it."""
        before = self.ask("status")["revision"]["desired"]
        write_manifests(self.file, services)
        self.wait_for_services(*services)  # which costs less to ask for than the status
        self.wait_for(lambda: self.ask("status")["revision"]["programmed"] > before)

    def wait_for_services(self, *services: Service) -> None:
        """Return when these are the Services, and flows to what they no longer have are gone, of TCP reset."""
        wanted = {service.shown() for service in services}
        self.wait_for(lambda: self._services() == wanted)
        living = {(service.key, endpoint) for service in services for endpoint in service.living()}
        living |= {("", f"{endpoint.rpartition(':')[0]}:0") for _, endpoint in living}  # echoes
        impatient = {
            service.key for service in services if service.annotations.get("turnout.dev/endpoint-removed") == "reset"
        }
        self.wait_for(lambda: self._ends_of_what_goes_on(impatient) <= living)

    def _ends_of_what_goes_on(self, impatient: set[str]) -> set[tuple[str, str]]:
        """Return Service (of an echo: any) and endpoint of flows, but of TCP only where the Service has them reset."""
        return {
            (flow["service"] if flow["protocol"] in ("TCP", "UDP") else "", flow["endpoint"])
            for flow in self.ask("flows")
            if flow["protocol"] != "TCP" or (flow["service"] in impatient and flow["state"] != "reset")
        }

    def _services(self) -> set[tuple[str, str, str, frozenset[str]]]:
        return {
            (
                shown["name"],
                shown["protocol"],
                shown["frontends"][0],
                frozenset(endpoint["address"] for endpoint in shown["endpoints"]),
            )
            for shown in self.ask("services")
        }

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 15.0) -> None:
        """Wait until something is true; if it does not become so, fail with what the daemon said."""
        assert wait_until(condition, timeout_s), f"not within {timeout_s} s; the daemon said:\n{self.said()}"


_Counts: TypeAlias = npt.NDArray[np.int64]  # by reason


class DaemonNode(ScenarioNode):
    """A daemon between silent hosts."""

    _PATH = "xdp"  # who sees every packet

    def __init__(self, world: World, daemon: Daemon, family: int = 4) -> None:
        super().__init__(family)
        self.engine = daemon.engine
        self.daemon = daemon
        for host in HOSTS:  # a host without address answers nothing
            world[host].run(["ip", "address", "flush", "dev", "eth0"])
            world[host].sysctl("net/ipv6/conf/eth0/disable_ipv6", 1)
        world.node.sysctl("net/ipv4/ip_forward", 0)
        if family == 6:
            world.node.sysctl("net/ipv6/conf/all/forwarding", 0)
            world.node.run(["nft", "-f", "-"], text_in=_SILENCE)
        self._hosts = {host: Wire(world[host], "eth0") for host in HOSTS}
        self._shared = daemon.tables()
        self._inside = self._listen_inside(world)
        self._applied: tuple[Service, ...] | None = None
        self._not_ours = self._packets()[self._PATH]["received"]

    def _listen_inside(self, world: World) -> list[Wire]:
        """Return the places where the kernel's frames come by."""
        return [Wire(world.node, interface.name, _TO_ANYBODY) for interface in world.node.interfaces]

    def close(self) -> None:
        self._shared.close()
        for one in (*self._hosts.values(), *self._inside):
            one.close()

    def apply(self, *services: Service) -> None:
        if services != self._applied:
            self.daemon.apply(*services)
            self._applied = services

    def answer(self, command: str, **options: Any) -> Any:
        return self.daemon.ask(command, **options)

    def _packets(self) -> dict[str, dict[str, int]]:
        return self.status()["packets"]  # type: ignore[no-any-return]

    def send_all(self, frames: Sequence[bytes], host: str = "client", ends: int | None = None) -> Sent:
        strays = self._collect()  # before the first frame, what a kernel says when its interfaces come up
        assert not (self.sent and any(strays)), f"frames that nobody has sent: {strays}"
        before, originated = self._counts(), self._originated()
        for frame in frames:
            self._hosts[host].send(self.on_the_wire(frame, host))
        self.sent += len(frames)
        after = self._settled(before, len(frames) if ends is None else ends)
        grown = sum(after) - sum(before)
        ends = Counter(
            {
                Reason(number): int(grown[number])
                for number in np.flatnonzero(grown).tolist()
                if verdict_of(number) is not Verdict.PUNT
            }
        )
        left, passed = self._collect_all(
            sum(count for reason, count in ends.items() if verdict_of(reason) is Verdict.FORWARD)
            + self._originated()
            - originated,
            sum(count for reason, count in ends.items() if verdict_of(reason) is Verdict.PASS),
        )
        return Sent(left, passed, ends)

    def _counts(self) -> tuple[_Counts, _Counts]:
        """Return how often XDP, and how often userspace, has counted each reason: from the tables, which is quick."""
        tables = self._shared.tables
        xdp, user = (
            rows["packets"].sum(axis=0).astype(np.int64) for rows in (tables.xdp_counters, tables.worker_counters)
        )
        return xdp, user

    def _originated(self) -> int:
        """Return how many packets userspace has sent of its own; counted before the packets that were the reason."""
        return int(self._shared.tables.worker_counters["originated"].sum())

    def _is_settled(self, xdp: _Counts, user: _Counts, before: tuple[_Counts, _Counts], count: int) -> bool:
        """Whether so many frames more than before have met their ends."""
        in_xdp = (xdp - before[0])[:_FIRST_PUNT].sum()
        return bool(in_xdp + (user - before[1]).sum() >= count)  # those lost are counted there, too

    def _settled(self, before: tuple[_Counts, _Counts], count: int) -> tuple[_Counts, _Counts]:
        """Return the counts when so many more frames have met their ends."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            xdp, user = self._counts()
            if self._is_settled(xdp, user, before, count):
                return xdp, user
            assert time.monotonic() < deadline, (self.status(), self.daemon.said())

    def _collect(self) -> tuple[list[tuple[str, bytes]], list[bytes]]:
        left = [(host, frame) for host, wire_end in self._hosts.items() for frame in wire_end.received()]
        return left, [frame for inside in self._inside for frame in inside.received()]

    def _collect_all(self, left: int, passed: int) -> tuple[list[tuple[str, bytes]], list[bytes]]:
        """Return what has left and what was passed, when there are so many of them."""
        found: tuple[list[tuple[str, bytes]], list[bytes]] = ([], [])

        def is_complete() -> bool:
            for all_of_them, more in zip(found, self._collect(), strict=True):
                all_of_them.extend(more)  # type: ignore[arg-type]
            return len(found[0]) >= left and len(found[1]) >= passed

        wait_until(is_complete, _PATIENCE_S, 0.0005)
        return found

    def check_accounts(self) -> None:
        packets = self._packets()
        xdp, user = packets["xdp"], packets["userspace"]
        assert xdp["received"] == self.sent + self._not_ours
        assert xdp["received"] == xdp["forwarded"] + xdp["passed"] + xdp["dropped"] + xdp["punted"]
        assert user["received"] == user["forwarded"] + user["dropped"]
        assert user["received"] == xdp["punted"] - user["punt_lost"]
        assert xdp["redirect_failed"] == 0


class RawNode(DaemonNode):
    """A daemon of engine `raw`: every frame is seen by userspace, and most by the kernel, too."""

    _PATH = "userspace"

    def _listen_inside(self, world: World) -> list[Wire]:
        """A packet socket is a tap before the filter: what gets past the filter is sent to a wire of its own."""
        world.node.run(["ip", "link", "add", "probe", "type", "veth", "peer", "name", "probed"])
        for end in ("probe", "probed"):
            world.node.run(["ip", "link", "set", end, "up"])
        names = ", ".join(f'"{interface.name}"' for interface in world.node.interfaces)
        rules = f"type filter hook ingress devices = {{ {names} }} priority 1\ndup to probe"
        world.node.run(["nft", "-f", "-"], text_in=f"table netdev probe {{\nchain ingress {{\n{rules}\n}}\n}}\n")
        return [Wire(world.node, "probed", _TO_ANYBODY)]

    def _is_settled(
        self,
        xdp: _Counts,  # noqa: ARG002
        user: _Counts,
        before: tuple[_Counts, _Counts],
        count: int,
    ) -> bool:
        return bool(user.sum() >= before[1].sum() + count)

    def check_accounts(self) -> None:
        user = self._packets()["userspace"]
        assert user["received"] == self.sent + self._not_ours
        assert user["received"] == user["forwarded"] + user["passed"] + user["dropped"]
        assert user["punt_lost"] == 0


@contextlib.contextmanager
def whole_node(
    engine: str, folder: Path, prefix: str, flags: Mapping[str, str] | None = None, family: int = 4
) -> Iterator[ScenarioNode]:
    """Make a node with an engine; it is gone afterwards. `prefix` names the world's namespaces.

    `flags` are more flags of `run`, by their names with _ for -; several values of one stand with blanks between.
    """
    flags = {name.replace("_", "-"): value for name, value in (flags or {}).items()}
    if engine == "memory":
        yield MemoryNode(folder, flags, family)
        return
    with (
        World(prefix, HOSTS, static_neighbours=True, ipv6=family == 6) as world,
        Daemon(world, engine, flags=flags) as daemon,
    ):
        daemon.start()
        node = (RawNode if engine == "raw" else DaemonNode)(world, daemon, family)
        try:
            yield node
        finally:
            node.close()
