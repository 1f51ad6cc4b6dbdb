"""The packet path over tables in plain memory, with a network given as data and a clock that stands still: no root."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from conntrack.table import FlowTable
from dataplane import netdev, stations
from dataplane.context import AWAITED, NOWHERE, masquerading, new_node
from dataplane.netdev import TABLE_LOCAL, Changes, Neighbour, NeighbourKey, NeighbourState, Route, RouteKind
from dataplane.nexthops import NextHops
from dataplane.node import Node
from dataplane.pipeline import handle
from dataplane.settings import OPTIONS, Settings
from dataplane.shortages import Shortages
from dataplane.vlans import words_of
from lb.manifests import Reader
from lb.table import ServiceTable
from perf.world import NetworkPlan
from tests.node import CONNECTIONS, NODE_NAME, ZONE, ScenarioNode, Sent, bytes_of_mac
from tests.services import Service, write_manifests
from xdp.addresses import address_of, host_bits, number_of, with_port
from xdp.byteorder import swap16, swap32
from xdp.clock import ManualClock
from xdp.names import Names
from xdp.schema import Limit, Ping, Reason, Verdict, verdict_of
from xdp.tables import Capacity, Tables


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
        return [netdev.Interface(end.name, number, bytes_of_mac(end), 1500, is_up=True) for number, end in ends.items()]

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
            Neighbour(number, number_of(address.ip), bytes_of_mac(end), NeighbourState.PERMANENT)
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

    def unfinished(self) -> tuple[()]:
        return ()

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
        self._node = node = Node(settings, self.seconds)
        node.netdev = _PaperNetwork(self.networks)  # type: ignore[assignment]
        node.shared = SimpleNamespace(tables=tables)  # type: ignore[assignment]
        node.clock = self.clock  # type: ignore[assignment]
        node.flows = FlowTable(tables, self.clock)
        node.flows.create()
        node.next_hops = NextHops(tables, node.netdev, names)
        node.services = ServiceTable(tables, node.seed.number, node.next_hops.row_for)
        node.engine = _NoEngine()  # type: ignore[assignment]
        node.shortages = Shortages(settings, tables)
        node.put_together()
        self._tables = tables
        sources = masquerading(settings.cluster_cidr, settings.snat_ports, settings.snat_addresses, Names(tables))
        self._path = new_node(tables, node.next_hops.hops, sources)
        tables.control[0]["ping"] = Ping[settings.ping.upper()]
        tables.control[0]["vlans"] = words_of(settings.vlans)
        tables.control[0]["stations"] = stations.words_of(node.next_hops.stations())
        self._frames = np.zeros(4096, np.uint8)
        self._held: list[_Held] = []
        self._is_awaited = False

    def apply(self, *services: Service) -> None:
        write_manifests(self._file, services)
        node = self._node
        live = node.manifests.load()
        node.strays.end_succeeded(node.in_force.snapshot.ports, live.snapshot().ports)
        node.in_force.apply(live)
        node.clear_up(node.services.take_parted())  # what its sweep would do
        node.strays.end()

    def reload(self, *objects: Mapping[str, Any]) -> bool:
        """Have the manifests be these, as a daemon whose files have changed, one an object; tell if all were read."""
        folder = self._file.parent / "objects"
        if not folder.exists():
            folder.mkdir()
            self._node.manifests._manifests = Reader([str(folder)])
        wanted = {folder / f"{each['kind']}-{each['metadata']['name']}.json": json.dumps(each) for each in objects}
        changed = {path for path in folder.glob("*.json") if path not in wanted}
        for path in changed:
            path.unlink()
        for path, text in wanted.items():
            if not path.exists() or path.read_text() != text:
                path.with_suffix(".aside").write_text(text)
                path.with_suffix(".aside").rename(path)
                changed.add(path)
        node, in_force = self._node, self._node.in_force
        plan = node.manifests.plan({*map(str, changed)}, in_force)
        if plan is not None:
            in_force.apply_plan(plan)
        else:
            in_force.apply(node.manifests.load())
        node.clear_up(node.services.take_parted())
        node.strays.end(in_force.take_unswept())
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
        return next(host for host, end in network.hosts.items() if bytes_of_mac(end) == frame[:6])

    def answer(self, command: str, **options: Any) -> Any:
        async def answered() -> Any:  # views that look at every flow are awaitables
            data = self._node.answer(command, options)
            return await data if isinstance(data, Awaitable) else data

        return asyncio.run(answered())

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.advance(seconds)

    def seconds(self) -> float:
        """Return the time."""
        return self.clock.now() / self.clock.hertz

    def end_overdue(self) -> None:
        """End the drains whose deadline has passed, and what is to end with them."""
        self._node.deadlines.end_overdue()
        self._node.strays.end()

    def look_for_shortages(self) -> None:
        """Have it find out what there was no room for."""
        self._node.look_for_shortages()

    def sweep(self) -> None:
        """End what has expired."""
        self._node.flows.sweep()

    def check_accounts(self) -> None:
        assert sum(self.status()["reasons"].values()) == self.sent
