"""The next hops of a node: resolved through netlink, and kept right while the network changes.

A row (dataplane/hoprows.py) leads to one host, or is shared by routes that lead the same way. Flows hold its number:
when a MAC address, a gateway or an interface changes, the row is written anew and every flow follows. Compiled code
finds a client's row by `lookup(hops, address)`, which is in dataplane/hops_compiled.py.

Endpoints and gateways are kept resolved; a client on the link has a row as soon as the kernel knows it. Whom compiled
code asks for has none until the kernel has found him. How the kernel is asked is dataplane/asking.py.

A neighbour entry that the kernel merely forgot (garbage collection) stays in use while it is asked for again; one
that FAILED does not.

When all rows are taken, new destinations get row 0, which stays unresolved. Those that nothing uses are given back
(dataplane/reclaim.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dataplane import hops_compiled as compiled_hops
from dataplane.asking import Asker, Asking, Need
from dataplane.hoprows import NOBODY, Course, Prefix, Row, Rows, prefix_of_host, unused
from dataplane.hops_compiled import Hops, new_hops
from dataplane.mirror import Hop, Mirror, is_usable, left_with_the_kernel
from dataplane.netdev import Changes, Interface, Neighbour, NeighbourKey, NeighbourState, Route, RouteKind
from dataplane.stations import stations_of
from dataplane.ticks import next_tick, tick
from xdp.addresses import IPAddress, IPNetwork, address_of, halves, host_bits, is_ipv6, number_of
from xdp.routes import Targets
from xdp.schema import HopState, Limit
from xdp.tables import Tables

ROUTES = int(Limit.MAX_ROUTES)  # that `lookup` can tell apart
TICK_S = 1.0  # how often what is due is looked for; the kernel's events and compiled code's requests are served at once
_REQUESTS = 512  # of compiled code served in one turn: about 30 ms
_LOAD_SHARE = 5  # reading all routes again takes at most one part of so many of the time

_log = logging.getLogger(__name__)


class Kernel(Asker, Protocol):
    """What is needed of dataplane.netdev.NetDev, which has the details."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when something has changed."""

    def interfaces(self) -> list[Interface]:
        """Return every interface."""

    def routes(self) -> list[Route]:
        """Return the routes that count."""

    def changes(self) -> Changes:
        """Return what has happened since the last call."""


def _course(route: Route) -> Course:
    return host_bits(route.network), route.ways, route.mtu, route.preferred_source


def _starts(routes: Iterable[Route], lengths: int) -> npt.NDArray[np.uint32]:
    """Return where each prefix length begins among routes of one family (hops_compiled.Hops)."""
    starts = np.zeros(lengths + 1, np.uint32)
    for route in routes:
        starts[lengths - route.prefix_len] += 1
    return np.cumsum(starts, dtype=np.uint32)


class NextHops:
    """The next hops of a node: one thread calls everything here, compiled code reads `hops` from any.

    `tables.next_hops` may hold rows of a predecessor: flows use them, so they are taken over with their numbers.
    """

    def __init__(
        self,
        tables: Tables,
        netdev: Kernel,
        interfaces: Collection[str],
        *,
        publish: Callable[[Targets], None] = lambda _: None,
        serves_through_kernel: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read everything from the kernel and resolve what is in the table.

        `interfaces`: the names that are ours. `publish` is told all routes whenever they change (xdp/routes.py).
        `serves_through_kernel`: whether packets for endpoints on this node may be left to the kernel to route.
        """
        self.hops: Hops = new_hops(tables, ROUTES)
        self.rows = Rows(tables, self.hops)
        self.routes_refused = 0  # routes that do not fit into the index now
        self._table = tables.next_hops
        self._publish = publish
        self._netdev = netdev
        self._clock = clock
        self._mirror = Mirror(interfaces)
        self._serves_through_kernel = serves_through_kernel
        self._local: set[int] = set()  # addresses of endpoints on this node
        self._refusing: frozenset[int] = frozenset()  # interfaces whose drivers take no redirected frames
        self._dependents: dict[NeighbourKey, set[Row]] = {}
        self._targets: Targets = {}  # of all routes, as published last
        self._asking = Asking(netdev, self._mirror, self._need_of)
        self._requests = np.zeros(_REQUESTS, np.uint32)
        self._next_place = 0  # of the board of requests
        self._is_stale = False  # interfaces or routes have changed since they were read
        self._has_missed = False  # changes of neighbours
        self._next_load_s = 0.0
        self.when_links_change: Callable[[], None] = lambda: None
        self.when_addresses_change: Callable[[], None] = lambda: None
        self.routes_changed = asyncio.Event()  # flows may hold rows of routes that lead elsewhere now
        self._load_put_off = asyncio.Event()
        self._take_requests()  # there are none: compiled now, as the first client is not to wait for that
        self._adopt()
        # First of all: packets use a predecessor's rows, which must not look unresolved even for a moment.
        self._mirror.set_neighbours(netdev.neighbours())
        self._read()
        self._recall()
        self._resolve_all()
        self._load_neighbours()
        left = left_with_the_kernel(self._mirror.neighbours.values(), [link.ifindex for link in self.given().values()])
        self._asking.give_back(key for key in left if key not in self._dependents and not self._is_usable(key))
        self._asking.leave_adopted()  # until `retain` tells who is wanted
        self._asking.flush(self._clock())

    @property
    def rows_refused(self) -> int:
        """Return how often a host or a route found no room for its row."""
        return self.rows.refused

    # What others ask for.

    def row_for(self, address: int | IPAddress) -> int:
        """Return the row of the way to an endpoint, resolved now or later; NOBODY, counted, when the table is full."""
        row = self.rows.of_host(number_of(address))
        if row is None:
            return NOBODY
        self._make_endpoint(row)
        self._asking.flush(self._clock())
        return row.number

    def add_local(self, addresses: Iterable[int | IPAddress]) -> None:
        """Let these endpoints be on this node: where they are behind interfaces that are not ours, the kernel routes.

        An address that moves to another node is reached through an interface of ours, so none is ever taken back.
        """
        fresh = {number_of(address) for address in addresses} - self._local
        self._local |= fresh
        for address in fresh:
            row = self.rows.hosts.get(address)
            if row is not None:
                self._resolve(row)

    def set_refusing(self, ifindexes: Collection[int]) -> None:
        """Let the kernel route what would leave by these interfaces, and no others: redirects there are lost."""
        refusing = frozenset(ifindexes)
        if self._serves_through_kernel and refusing != self._refusing:
            changed, self._refusing = refusing ^ self._refusing, refusing
            for row in self.rows.all.values():
                if row.hop.ifindex in changed:
                    self._resolve(row)

    def interfaces_of_local(self) -> dict[str, int]:
        """Return {interface that is not ours: endpoints on this node behind it, which the kernel routes to}."""
        return dict(Counter(name for _, name in self._locals()))

    def families_of_local(self) -> set[int]:
        """Return the families of such endpoints."""
        return {6 if is_ipv6(address) else 4 for address, _ in self._locals()}

    def _locals(self) -> Iterator[tuple[int, str]]:
        for row in self.rows.all.values():
            link = self._mirror.interfaces.get(row.hop.ifindex)
            if row.is_endpoint and row.hop.state is HopState.KERNEL and link and not self._mirror.is_ours(link.ifindex):
                yield row.prefix[0], link.name

    def _hop_of(self, row: Row) -> Hop:
        """Return where a row leads: as the network has it, but for where the kernel is to route."""
        hop = self._mirror.hop(*row.prefix)
        if not self._serves_through_kernel:
            return hop
        is_here = not row.is_shared and (row.prefix[0] in self._local or self._mirror.is_own(row.prefix[0]))
        if hop.state is HopState.FOREIGN and is_here:
            return hop._replace(state=HopState.KERNEL)
        if hop.state is HopState.FORWARD and hop.ifindex in self._refusing:
            return hop._replace(state=HopState.KERNEL, source=0)
        return hop

    def retain(self, addresses: Iterable[int | IPAddress]) -> None:
        """Keep these endpoints resolved and no others; rows of others stay as they are for the flows that hold them.

        A successor need not ask for the rows of endpoints that it has taken over: they become endpoints here.
        """
        wanted = {number_of(address) for address in addresses}
        for address in wanted & self.rows.hosts.keys():
            self._make_endpoint(self.rows.hosts[address])
        for row in self.rows.all.values():
            if row.is_endpoint and row.prefix[0] not in wanted:
                self._make_client(row)
        self._asking.let_go_of_the_rest()
        self._asking.flush(self._clock())

    def leave(self, addresses: Iterable[int | IPAddress]) -> None:
        """Keep these endpoints resolved no longer: what `retain` does, of those that are wanted no more."""
        for address in addresses:
            row = self.rows.hosts.get(number_of(address))
            if row is not None and row.is_endpoint:
                self._make_client(row)
        self._asking.flush(self._clock())

    def _make_client(self, row: Row) -> None:
        """Have the neighbour of an endpoint looked after without haste: its flows are not cut."""
        row.is_endpoint = False
        row.is_client = True
        if row.hop.neighbour:
            self._asking.settle(row.hop.neighbour)

    def let_go_all(self) -> None:
        """Give all that was asked for back to the kernel's own ageing, for a node that leaves its interfaces."""
        self._asking.let_go_all()

    def given(self) -> dict[str, Interface]:
        """Return our interfaces that are there, by the names that were given, as last read (Mirror.set_interfaces).

        `when_links_change` is called when they are others.
        """
        return self._mirror.given

    def stations(self) -> tuple[bytes, ...]:
        """Return the MAC addresses that frames of our interfaces are ours by, as last read (stations.stations_of)."""
        return stations_of(self._mirror.given.values(), self._mirror.interfaces.values())

    def own_addresses(self) -> frozenset[IPAddress]:
        """Return the addresses of this node; `when_addresses_change` is called when there are others."""
        return self._mirror.own_addresses()

    def node_port_addresses(self, networks: Collection[IPNetwork]) -> tuple[IPAddress, ...]:
        """Return the addresses that node ports are served at (Mirror.node_port_addresses)."""
        return self._mirror.node_port_addresses(networks)

    def describe(self, numbers: Collection[int] | None = None) -> list[dict[str, object]]:
        """Return these rows, or all, as `turnout get nexthops` shows them."""
        rows = self.rows.all.values()
        wanted = rows if numbers is None else [row for row in rows if row.number in numbers]
        return [self._described(row) for row in sorted(wanted, key=lambda row: row.number)]

    def out_of_reach(self) -> npt.NDArray[np.int64]:
        """Return the numbers of the rows by which nothing gets anywhere now."""
        rows = self._table
        is_out = (rows["state"] == HopState.FOREIGN) | (rows["state"] == HopState.UNRESOLVED)
        return np.flatnonzero(is_out & (rows["used"] == 1))

    def _described(self, row: Row) -> dict[str, object]:
        network, prefix_len = row.prefix
        hop = row.hop
        interface = self._mirror.interfaces.get(hop.ifindex)
        return {
            "row": row.number,
            "destination": str(address_of(network)) + (f"/{prefix_len}" if row.is_shared else ""),
            "via": str(address_of(hop.via)) if hop.via and hop.via != network else None,
            "interface": interface.name if interface else None,
            "mac": hop.mac.hex(":") if hop.mac else None,
            "state": hop.state.name.lower(),
            "mtu": hop.mtu or None,
        }

    # Giving rows back.

    def unused(self, used: npt.NDArray[np.uint8]) -> list[Row]:
        """Return rows to be parted with (`Rows.part`). `used`: by row, whether a flow or an endpoint has it."""
        self._look_after(self.rows.learned(anyway=True))
        return unused(self.rows.all.values(), used, is_short=self.rows.is_short)

    def settle(self, rows: Iterable[Row], used: npt.NDArray[np.uint8]) -> None:
        """Free rows that were parted with and are not used, and let go of their neighbours (`Rows.settle`)."""
        for row in self.rows.settle(rows, used):
            if row.hop.neighbour:
                self._leave(row, row.hop.neighbour)
        self._asking.flush(self._clock())

    # Following the kernel.

    async def run(self) -> None:
        """Follow the kernel and serve requests until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._netdev.fileno(), self._follow)
        loop.add_reader(self.hops.doorbell, self.turn)
        try:
            while True:
                self.turn()
                self._load_put_off.clear()
                until_load_s = self._next_load_s - self._clock() if self._is_stale else TICK_S
                await tick(self._load_put_off, min(loop.time() + until_load_s, next_tick(TICK_S)))
        finally:
            loop.remove_reader(self.hops.doorbell)
            loop.remove_reader(self._netdev.fileno())

    def _follow(self) -> None:
        self.turn()
        if self._is_stale:
            self._load_put_off.set()

    def turn(self) -> None:
        """Do what is to be done now: events, requests of compiled code, neighbours that need another look."""
        now = self._clock()
        changes = self._netdev.changes()
        self._is_stale |= changes.links_or_routes or changes.is_overrun
        has_missed, self._has_missed = self._has_missed or changes.is_overrun, True  # if this turn comes to no end
        # The kernel does not tell which routes an interface took with it, nor which one a new route replaced: a change
        # means reading all of them, and how long that took decides when it may happen again.
        if self._is_stale and now >= self._next_load_s:
            self._load(now)
        if has_missed:
            self._load_neighbours()
        elif changes.neighbours:
            self._apply(changes.neighbours)
        self._has_missed = False
        self._look_after(self.rows.learned())
        self._serve_requests(now)
        self._asking.look_again(now)
        self._asking.flush(now)

    def _load(self, now: float) -> None:
        """Read interfaces and routes, index the routes, and resolve every row anew."""
        started, links, addresses = self._clock(), self._mirror.given, self._addresses()
        self._read()
        self._resolve_all()
        self._next_load_s = now + (_LOAD_SHARE - 1) * (self._clock() - started)
        if self._mirror.given != links:
            self.when_links_change()
        if self._addresses() != addresses:
            self.when_addresses_change()

    def _addresses(self) -> tuple[Collection[IPAddress], Collection[IPAddress]]:
        """Return the node's addresses, and those of our interfaces: an interface may become ours with what it has."""
        return self._mirror.own_addresses(), self._mirror.node_port_addresses()

    def _read(self) -> None:
        self._mirror.set_interfaces(self._netdev.interfaces())
        self._mirror.set_routes(self._netdev.routes())
        self._is_stale = False  # now that both could be read

    def _resolve_all(self) -> None:
        self._index_routes()
        for row in list(self.rows.all.values()):
            self._resolve(row)

    def _index_routes(self) -> None:
        """Publish the routes for `lookup`, with a row for each that leads through a gateway or a foreign interface."""
        self.routes_refused = 0
        fours: list[Route] = []
        sixes: list[Route] = []
        for route in self._mirror.routes():
            (sixes if is_ipv6(route.network) else fours).append(route)
        for routes in (fours, sixes):
            refused = max(0, len(routes) - ROUTES)
            self.routes_refused += refused
            if refused:
                _log.error("%d routes: only the %d longest prefixes are used", len(routes), ROUTES)
                del routes[ROUTES:]
        courses = {(each.network, each.prefix_len): _course(each) for each in fours + sixes if self._is_led(each)}
        self.rows.lead(courses)
        self.rows.lead_to_hosts(each.network for each in fours + sixes if self._is_to_host(each))
        targets = np.array([self._target(route, courses) for route in fours], np.uint32)
        networks = np.array([route.network for route in fours], np.uint32)
        compiled_hops.publish_routes(self.hops, _starts(fours, compiled_hops.LENGTHS), networks, targets)
        targets6 = np.array([self._target(route, courses) for route in sixes], np.uint32)
        highs6, lows6 = np.array([halves(route.network) for route in sixes], np.uint64).reshape(-1, 2).T.copy()
        compiled_hops.publish_routes6(self.hops, _starts(sixes, compiled_hops.LENGTHS6), highs6, lows6, targets6)
        both = [*zip(fours, targets.tolist(), strict=True), *zip(sixes, targets6.tolist(), strict=True)]
        targets_before, self._targets = self._targets, {(each.network, each.prefix_len): row for each, row in both}
        self._publish(self._targets)
        if self._targets != targets_before:
            self.routes_changed.set()

    def _is_led(self, route: Route) -> bool:
        """Return whether a route leads through a gateway or by a foreign interface."""
        is_on_its_way = route.kind is RouteKind.UNICAST and not self._mirror.is_on_link(route)
        return is_on_its_way and not self._is_to_host(route)

    def _is_to_host(self, route: Route) -> bool:
        """Return whether a route leads to one host by a foreign interface: a pod's, where it is on this node."""
        return (
            route.kind is RouteKind.UNICAST
            and route.prefix_len == host_bits(route.network)
            and not self._mirror.is_on_link(route)
            and not any(way.gateway for way in route.ways)
        )

    def _row_of(self, route: Route) -> Row | None:
        """Return the row of what a route that is not on the link leads to."""
        if self._is_to_host(route):
            return self.rows.hosts.get(route.network)
        return self.rows.of_course(_course(route)) if self._is_led(route) else None

    def _target(self, route: Route, courses: Mapping[Prefix, Course]) -> int:
        if self._mirror.is_on_link(route):
            return compiled_hops.ON_LINK
        course = courses.get((route.network, route.prefix_len))
        row = self._row_of(route) if course is None else self.rows.of_course(course)
        return compiled_hops.NO_ROUTE if row is None else row.number

    def _load_neighbours(self) -> None:
        """Read all neighbours and apply what differs; entries of ours that nobody wanted yet are remembered."""
        fresh = {neighbour.key: neighbour for neighbour in self._netdev.neighbours()}
        gone = [(old, True) for key, old in self._mirror.neighbours.items() if key not in fresh]
        self._apply(gone + [(neighbour, False) for neighbour in fresh.values()])

    def _apply(self, events: Iterable[tuple[Neighbour, bool]]) -> None:
        changed: set[NeighbourKey] = set()
        for neighbour, is_gone in events:
            key = neighbour.key
            if not self._mirror.is_ours(neighbour.ifindex) and key not in self._mirror.neighbours:
                continue
            changed.add(key)
            self._store(neighbour, is_gone=is_gone)
        for key in changed:
            known = self._mirror.neighbours.get(key)
            if known is not None and known.is_ours and known.is_managed:
                self._asking.adopt(key, self._clock())
            dependents = self._dependents.get(key)
            if dependents is None and is_usable(known):
                self._learn(key)
            for row in tuple(dependents or ()):
                self._resolve(row)

    def _is_usable(self, key: NeighbourKey) -> bool:
        return is_usable(self._mirror.neighbours.get(key))

    def _store(self, neighbour: Neighbour, *, is_gone: bool) -> None:
        """Put an event into the mirror."""
        key = neighbour.key
        old = self._mirror.neighbours.get(key)
        if is_gone:
            interface = self._mirror.interfaces.get(neighbour.ifindex)
            was_forgotten = is_usable(old) and not neighbour.state & NeighbourState.FAILED
            if old is not None and was_forgotten and key in self._dependents and interface and interface.is_up:
                self._mirror.neighbours[key] = old._replace(state=NeighbourState.STALE, is_managed=False)
                self._asking.ask(key)
            else:
                self._mirror.neighbours.pop(key, None)
                self._asking.forget(key)
        elif is_usable(old) and neighbour.state in (NeighbourState.NONE, NeighbourState.INCOMPLETE):
            pass  # a forgotten one that is being asked for: what we know holds until the verdict
        else:
            self._mirror.neighbours[key] = neighbour

    def _learn(self, key: NeighbourKey) -> None:
        """Give a neighbour that the kernel has learnt a row, if it is where our route to it leads.

        Where rows are short, only one that packets wait for.
        """
        ifindex, address = key
        if self.rows.is_short and not self._asking.is_sought(key):
            return
        route = self._mirror.match(address)
        if self._mirror.is_on_link(route) and route is not None and route.ifindex == ifindex:
            row = self.rows.of_client(address)
            if row is not None:
                row.is_client |= self._asking.has_found(key)
                self._resolve(row)

    # Rows.

    def _adopt(self) -> None:
        """Take over the rows that a predecessor handed out."""
        self.rows.adopt()
        for row in self.rows.all.values():
            if (
                self._table[row.number]["state"] == HopState.KERNEL
            ):  # most probably: of others, that makes no difference
                self._local.add(row.prefix[0])

    def _look_after(self, learned: Iterable[Row]) -> None:
        """Look after rows that XDP has taken for clients while no worker answered."""
        for row in learned:
            self._believe(row)
            self._resolve(row)

    def _recall(self) -> None:
        """Believe a predecessor's rows about neighbours that the kernel has forgotten since, until it has asked."""
        for row in self.rows.all.values():
            self._believe(row)

    def _believe(self, row: Row) -> None:
        record = self._table[row.number]
        key = self._mirror.hop(*row.prefix).neighbour
        if record["state"] != HopState.FORWARD or key is None or record["ifindex"] != key[0]:
            return
        known = self._mirror.neighbours.get(key)
        if known is None or known.state in (NeighbourState.NONE, NeighbourState.INCOMPLETE):
            self._mirror.neighbours[key] = Neighbour(*key, bytes(record["dst_mac"]), NeighbourState.STALE)

    def _make_endpoint(self, row: Row) -> None:
        """Have the neighbour of `row` kept resolved from now on."""
        if not row.is_endpoint:
            row.is_endpoint = True
            self._resolve(row)

    def _resolve(self, row: Row) -> None:
        """Change a row to where its prefix leads now, and ask for the neighbour that it needs."""
        old, hop = row.hop, self._hop_of(row)
        row.hop = hop
        if old.state in (HopState.FORWARD, HopState.KERNEL) and hop.state is HopState.UNRESOLVED:
            row.is_client = True  # if it was only learnt: flows hold it, and their packets do not ask
        if old.neighbour != hop.neighbour:
            if old.neighbour:
                self._leave(row, old.neighbour)
            if hop.neighbour:
                self._dependents.setdefault(hop.neighbour, set()).add(row)
        if hop.neighbour and (row.is_kept or row.is_client):
            if old.neighbour != hop.neighbour:
                self._asking.ask(hop.neighbour)
            else:
                self._asking.ask_unless_asked(hop.neighbour, keep=row.is_kept)
        if old != hop:
            self.rows.write(row)

    def _leave(self, row: Row, key: NeighbourKey) -> None:
        """Note that a row does not need a neighbour any more."""
        self._dependents[key].discard(row)
        if not self._dependents[key]:
            del self._dependents[key]
        self._asking.settle(key)

    def _need_of(self, key: NeighbourKey) -> Need:
        dependents = self._dependents.get(key)
        if not dependents:
            return Need.NOTHING
        if any(row.is_kept for row in dependents):
            return Need.KEPT
        return Need.CLIENT if any(row.is_client for row in dependents) else Need.ROW

    def _take_requests(self) -> list[int]:
        """Take what compiled code has asked for, addresses or names' numbers, from the board; at most _REQUESTS."""
        count, self._next_place = compiled_hops.take_requests(self.hops, self._next_place, self._requests)
        return self._requests[:count].tolist()  # type: ignore[no-any-return]

    def _seek(self, address: int, now: float) -> None:
        """Find a host on the link that has no row. It gets one when its MAC address is known, and not before.

        Else whoever makes up addresses would take all rows.
        """
        hop = self._mirror.hop(*prefix_of_host(address))
        if hop.state is HopState.UNRESOLVED and hop.neighbour:
            self._asking.seek(hop.neighbour, now)
        elif hop.state is HopState.FORWARD:
            row = self.rows.of_client(address)
            if row is not None:
                row.is_client = True
                self._resolve(row)

    def _serve_requests(self, now: float) -> None:
        """Resolve what compiled code has asked for, if the bell has rung."""
        try:
            os.eventfd_read(self.hops.doorbell)
        except BlockingIOError:
            return
        numbers = self._take_requests()
        if len(numbers) == _REQUESTS:
            os.eventfd_write(self.hops.doorbell, 1)  # there may be more: after what else the node has to do
        for number in numbers:
            address = self.rows.address(number)
            route = self._mirror.match(address)
            if route is None or route.kind is not RouteKind.UNICAST:
                continue
            is_on_link = self._mirror.is_on_link(route)
            if is_on_link and address not in self.rows.hosts:
                self._seek(address, now)
                continue
            row = self.rows.of_host(address) if is_on_link else self._row_of(route)
            if row is None:
                continue
            row.is_client = True
            self._resolve(row)
            key = row.hop.neighbour
            if key and row.hop.state is HopState.UNRESOLVED:
                self._asking.ask_for_packets(key, now)
