"""The rows of next_hops: handed out, resolved through netlink, and kept right while the network changes.

A row leads to a *prefix*: one host (all bits), or all that a route with a gateway covers. It is resolved by the route
of that prefix, and flows hold its number: when a MAC address, a gateway or an interface changes, the row is written
anew and every flow follows. Compiled code finds a client's row by `lookup(hops, address)`, which is in
dataplane/hops_compiled.py.

Endpoints and gateways are kept resolved; clients on the link have a row as soon as the kernel knows them, or as soon as
compiled code asks. How the kernel is asked for them is dataplane/asking.py.

A neighbour entry that the kernel merely forgot (garbage collection) stays in use while it is asked for again; one
that FAILED does not.

A row is never taken back: flows may hold it. When all are taken, new destinations get row 0, which stays unresolved.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dataplane import hops_compiled as compiled_hops
from dataplane.asking import Asker, Asking, Need
from dataplane.hops_compiled import Hops, new_hops
from dataplane.mirror import NOWHERE, Hop, Mirror, is_usable
from dataplane.netdev import Changes, Interface, Neighbour, NeighbourKey, NeighbourState, Route, RouteKind
from dataplane.ticks import next_tick, tick
from xdp import schema
from xdp.addresses import IPAddress, IPNetwork, address_of, halves, host_bits, is_ipv6, number_of
from xdp.byteorder import swap32
from xdp.errors import TableFullError
from xdp.names import Names
from xdp.routes import Targets
from xdp.schema import HopState, Limit
from xdp.tables import Tables

Prefix = tuple[int, int]  # (network as in xdp/addresses.py, prefix length)

NOBODY = 0  # the row that leads nowhere
ROUTES = int(Limit.MAX_ROUTES)  # that `lookup` can tell apart
TICK_S = 1.0  # how often what is due is looked for; the kernel's events and compiled code's requests are served at once
_REQUESTS = 512  # of compiled code served in one turn: about 30 ms
_LOAD_SHARE = 5  # reading all routes again takes at most one part of so many of the time
_HOSTS_SHARE = 0.75  # of the rows may go to clients, so that a scan of the subnet leaves room for endpoints


_ADOPTED = Hop(HopState.UNRESOLVED, ifindex=-1)  # what a predecessor wrote: equal to no result of ours

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


@dataclass(slots=True)
class _Row:
    number: int
    prefix: Prefix
    is_endpoint: bool = False
    is_route: bool = False  # a route of ours leads through a gateway to this prefix
    is_client: bool = False  # compiled code has asked for it
    hop: Hop = NOWHERE

    @property
    def is_kept(self) -> bool:
        """Return whether the kernel is to keep the neighbour resolved for ever."""
        return self.is_endpoint or self.is_route


def _host(address: int | IPAddress) -> Prefix:
    """Return the prefix of a single address."""
    number = number_of(address)
    return number, host_bits(number)


def _starts(routes: Iterable[Route], lengths: int) -> npt.NDArray[np.uint32]:
    """Return where each prefix length begins among routes of one family (hops_compiled.Hops)."""
    starts = np.zeros(lengths + 1, np.uint32)
    for route in routes:
        starts[lengths - route.prefix_len] += 1
    return np.cumsum(starts, dtype=np.uint32)


def _is_host(prefix: Prefix) -> bool:
    return prefix[1] == host_bits(prefix[0])


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
        self.rows_refused = 0  # destinations that found the table full
        self.routes_refused = 0  # routes that do not fit into the index now
        self._table = tables.next_hops
        self._names = Names(tables)
        self._numbers: dict[int, int] = {}  # of the IPv6 addresses in rows: pinned for good, as rows are
        self._control = tables.control[0]
        self._learned = 0  # rows that XDP has taken and we know of
        self._publish = publish
        self._epochs = tables.control["next_hop_epoch"]
        self._netdev = netdev
        self._clock = clock
        self._mirror = Mirror(interfaces)
        self._serves_through_kernel = serves_through_kernel
        self._local: set[int] = set()  # addresses of endpoints on this node
        self._refusing: frozenset[int] = frozenset()  # interfaces whose drivers take no redirected frames
        self._rows: dict[Prefix, _Row] = {}
        self._dependents: dict[NeighbourKey, set[Prefix]] = {}
        self._asking = Asking(netdev, self._mirror, self._need_of)
        self._requests = np.zeros(_REQUESTS, np.uint32)
        self._next_place = 0  # of the board of requests
        self._scratch = np.zeros(1, schema.NEXT_HOP)
        self._is_stale = False  # interfaces or routes have changed since they were read
        self._has_missed = False  # changes of neighbours
        self._next_load_s = 0.0
        self.when_links_change: Callable[[], None] = lambda: None
        self.when_addresses_change: Callable[[], None] = lambda: None
        self._load_put_off = asyncio.Event()
        self._take_requests()  # there are none: compiled now, as the first client is not to wait for that
        self._adopt()
        # First of all: packets use a predecessor's rows, which must not look unresolved even for a moment.
        self._mirror.set_neighbours(netdev.neighbours())
        self._read()
        self._recall()
        self._resolve_all()
        self._load_neighbours()
        self._asking.leave_adopted()  # until `retain` tells who is wanted
        self._asking.flush(self._clock())

    # What others ask for.

    def row_for(self, address: int | IPAddress) -> int:
        """Return the row of the way to an endpoint, resolved now or later; NOBODY, counted, when the table is full."""
        row = self._row(_host(address))
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
            row = self._rows.get(_host(address))
            if row is not None:
                self._resolve(row)

    def set_refusing(self, ifindexes: Collection[int]) -> None:
        """Let the kernel route what would leave by these interfaces, and no others: redirects there are lost."""
        refusing = frozenset(ifindexes)
        if self._serves_through_kernel and refusing != self._refusing:
            changed, self._refusing = refusing ^ self._refusing, refusing
            for row in self._rows.values():
                if row.hop.ifindex in changed:
                    self._resolve(row)

    def interfaces_of_local(self) -> dict[str, int]:
        """Return {interface that is not ours: endpoints on this node behind it, which the kernel routes to}."""
        return dict(Counter(name for _, name in self._locals()))

    def families_of_local(self) -> set[int]:
        """Return the families of such endpoints."""
        return {6 if is_ipv6(address) else 4 for address, _ in self._locals()}

    def _locals(self) -> Iterator[tuple[int, str]]:
        for row in self._rows.values():
            link = self._mirror.interfaces.get(row.hop.ifindex)
            if row.is_endpoint and row.hop.state is HopState.KERNEL and link and not self._mirror.is_ours(link.ifindex):
                yield row.prefix[0], link.name

    def _as_we_go(self, prefix: Prefix, hop: Hop) -> Hop:
        """Return a hop as the network has it, changed where the kernel is to route."""
        if not self._serves_through_kernel:
            return hop
        is_here = _is_host(prefix) and (prefix[0] in self._local or self._mirror.is_own(prefix[0]))
        if hop.state is HopState.FOREIGN and is_here:
            return hop._replace(state=HopState.KERNEL)
        if hop.state is HopState.FORWARD and hop.ifindex in self._refusing:
            return hop._replace(state=HopState.KERNEL, source=0)
        return hop

    def retain(self, addresses: Iterable[int | IPAddress]) -> None:
        """Keep these endpoints resolved and no others; rows of others stay as they are for the flows that hold them.

        A successor need not ask for the rows of endpoints that it has taken over: they become endpoints here.
        """
        wanted = {_host(address) for address in addresses}
        for prefix in wanted & self._rows.keys():
            self._make_endpoint(self._rows[prefix])
        for prefix, row in self._rows.items():
            if row.is_endpoint and prefix not in wanted:
                self._make_client(row)
        self._asking.let_go_of_the_rest()
        self._asking.flush(self._clock())

    def leave(self, addresses: Iterable[int | IPAddress]) -> None:
        """Keep these endpoints resolved no longer: what `retain` does, of those that are wanted no more."""
        for address in addresses:
            row = self._rows.get(_host(address))
            if row is not None and row.is_endpoint:
                self._make_client(row)
        self._asking.flush(self._clock())

    def _make_client(self, row: _Row) -> None:
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

    def own_addresses(self) -> frozenset[IPAddress]:
        """Return the addresses of this node; `when_addresses_change` is called when there are others."""
        return self._mirror.own_addresses()

    def node_port_addresses(self, networks: Collection[IPNetwork]) -> tuple[IPAddress, ...]:
        """Return the addresses that node ports are served at (Mirror.node_port_addresses)."""
        return self._mirror.node_port_addresses(networks)

    # Addresses in tables.

    def _number(self, address: int) -> int:
        """Return what stands for an address in tables, in host order; TableFullError if no name can be had for it."""
        if not is_ipv6(address):
            return address
        number = self._numbers.get(address)
        if number is None:
            number = self._numbers[address] = self._names.pin(address_of(address))  # type: ignore[arg-type]
        return number

    def _address(self, number: int) -> int:
        """Return the address that a number in tables stands for."""
        return number_of(self._names.address_of(number)) if 0 < number < Limit.MAX_NAMES else number

    def describe(self) -> list[dict[str, object]]:
        """Return every row as `turnout get nexthops` shows it."""
        return [self._described(row) for row in sorted(self._rows.values(), key=lambda row: row.number)]

    def _described(self, row: _Row) -> dict[str, object]:
        network, prefix_len = row.prefix
        hop = row.hop
        interface = self._mirror.interfaces.get(hop.ifindex)
        return {
            "row": row.number,
            "destination": str(address_of(network)) + ("" if _is_host(row.prefix) else f"/{prefix_len}"),
            "via": str(address_of(hop.via)) if hop.via and hop.via != network else None,
            "interface": interface.name if interface else None,
            "mac": hop.mac.hex(":") if hop.mac else None,
            "state": hop.state.name.lower(),
            "mtu": hop.mtu or None,
        }

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
        if self._learned < min(self._control["learned"], len(self._table) // Limit.LEARNED_SHARE):
            self._adopt_learned()
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
        for row in list(self._rows.values()):
            self._resolve(row)

    def _index_routes(self) -> None:
        """Publish the routes for `lookup`, with a row for each that leads through a gateway or a foreign interface."""
        led = {row.prefix for row in self._rows.values() if row.is_route}
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
            led.difference_update((route.network, route.prefix_len) for route in routes)
        targets = np.array([self._target(route) for route in fours], np.uint32)
        networks = np.array([route.network for route in fours], np.uint32)
        compiled_hops.publish_routes(self.hops, _starts(fours, compiled_hops.LENGTHS), networks, targets)
        targets6 = np.array([self._target(route) for route in sixes], np.uint32)
        highs6, lows6 = np.array([halves(route.network) for route in sixes], np.uint64).reshape(-1, 2).T.copy()
        compiled_hops.publish_routes6(self.hops, _starts(sixes, compiled_hops.LENGTHS6), highs6, lows6, targets6)
        for prefix in led:  # withdrawn: flows still hold the row, and go by the route that covers it now
            self._rows[prefix].is_route = False
        both = [*zip(fours, targets.tolist(), strict=True), *zip(sixes, targets6.tolist(), strict=True)]
        self._publish({(route.network, route.prefix_len): target for route, target in both})

    def _target(self, route: Route) -> int:
        if route.kind is not RouteKind.UNICAST:
            return compiled_hops.NO_ROUTE
        if self._mirror.is_on_link(route):
            return compiled_hops.ON_LINK
        row = self._row((route.network, route.prefix_len))
        if row is None:
            return compiled_hops.NO_ROUTE
        row.is_route = True
        return row.number

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
            for prefix in tuple(dependents or ()):
                self._resolve(self._rows[prefix])

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
        """Give a neighbour that the kernel has learnt a row, if it is where our route to it leads."""
        ifindex, address = key
        route = self._mirror.match(address)
        if self._mirror.is_on_link(route) and route is not None and route.ifindex == ifindex:
            row = self._client_row(address)
            if row is not None:
                self._resolve(row)

    # Rows.

    def _adopt(self) -> None:
        """Take over the rows that a predecessor handed out."""
        self._learned = len(self._learned_rows())  # before all others: what XDP learns from here on is adopted later
        used = np.flatnonzero(self._table["used"])
        for number in used.tolist():
            record = self._table[number]
            prefix = (self._address(swap32(record["destination"])), int(record["prefix_len"]))
            self._rows[prefix] = _Row(number, prefix, is_client=True, hop=_ADOPTED)
            if record["state"] == HopState.KERNEL:  # most probably: of others, that makes no difference
                self._local.add(prefix[0])
            destination = self._number(prefix[0])
            if _is_host(prefix):
                compiled_hops.set_host_row(self.hops, destination, number)
        free = np.ones(len(self._table), bool)
        free[used] = False
        free[NOBODY] = False
        free[len(free) - len(free) // Limit.LEARNED_SHARE :] = False  # for XDP to take
        self._free: list[int] = np.flatnonzero(free)[::-1].tolist()
        self._rows_for_others = int(len(self._table) * (1 - _HOSTS_SHARE)) - len(free) // Limit.LEARNED_SHARE

    def _adopt_learned(self) -> None:
        """Look after rows that XDP has taken for clients while no worker answered."""
        numbers = self._learned_rows()
        self._learned = len(numbers)
        for number in numbers:
            record = self._table[number]
            prefix = _host(self._address(swap32(record["destination"])))
            if prefix not in self._rows:
                self._rows[prefix] = _Row(number, prefix, is_client=True, hop=_ADOPTED)
                self._believe(self._rows[prefix])
                self._resolve(self._rows[prefix])

    def _learned_rows(self) -> list[int]:
        """Return the rows that XDP has taken, and filled."""
        first = len(self._table) - len(self._table) // Limit.LEARNED_SHARE
        return (first + np.flatnonzero(self._table["used"][first:])).tolist()

    def _recall(self) -> None:
        """Believe a predecessor's rows about neighbours that the kernel has forgotten since, until it has asked."""
        for row in self._rows.values():
            self._believe(row)

    def _believe(self, row: _Row) -> None:
        record = self._table[row.number]
        key = self._mirror.hop(*row.prefix).neighbour
        if record["state"] != HopState.FORWARD or key is None or record["ifindex"] != key[0]:
            return
        known = self._mirror.neighbours.get(key)
        if known is None or known.state in (NeighbourState.NONE, NeighbourState.INCOMPLETE):
            self._mirror.neighbours[key] = Neighbour(*key, bytes(record["dst_mac"]), NeighbourState.STALE)

    def _make_endpoint(self, row: _Row) -> None:
        """Have the neighbour of `row` kept resolved from now on."""
        if not row.is_endpoint:
            row.is_endpoint = True
            self._resolve(row)

    def _row(self, prefix: Prefix) -> _Row | None:
        """Return the row of a prefix, handed out if it has none; None, counted, when the table is full."""
        row = self._rows.get(prefix)
        if row is not None:
            return row
        try:
            destination = self._number(prefix[0])
        except TableFullError:
            destination = -1
        if not self._free or destination < 0:
            self._refuse(prefix)
            return None
        row = _Row(self._free.pop(), prefix)
        self._rows[prefix] = row
        self._write(row)
        if _is_host(prefix):
            compiled_hops.set_host_row(self.hops, destination, row.number)
        return row

    def _client_row(self, address: int) -> _Row | None:
        """Return the row of a host on the link; None, counted, when the clients' share of the table is taken."""
        prefix = _host(address)
        if prefix not in self._rows and len(self._free) <= self._rows_for_others:
            self._refuse(prefix)
            return None
        return self._row(prefix)

    def _refuse(self, prefix: Prefix) -> None:
        self.rows_refused += 1
        if self.rows_refused & (self.rows_refused - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
            _log.error(
                "next hops: no row for %s: %d of %d are taken (refused %d times); this version has no more",
                address_of(prefix[0]), len(self._rows), len(self._table), self.rows_refused,
            )  # fmt: skip

    def _resolve(self, row: _Row) -> None:
        """Change a row to where its prefix leads now, and ask for the neighbour that it needs."""
        old, hop = row.hop, self._as_we_go(row.prefix, self._mirror.hop(*row.prefix))
        row.hop = hop
        if old.state in (HopState.FORWARD, HopState.KERNEL) and hop.state is HopState.UNRESOLVED:
            row.is_client = True  # if it was only learnt: flows hold it, and their packets do not ask
        if old.neighbour != hop.neighbour:
            if old.neighbour:
                self._leave(row, old.neighbour)
            if hop.neighbour:
                self._dependents.setdefault(hop.neighbour, set()).add(row.prefix)
        if hop.neighbour and (row.is_kept or row.is_client):
            if old.neighbour != hop.neighbour:
                self._asking.ask(hop.neighbour)
            else:
                self._asking.ask_unless_asked(hop.neighbour, keep=row.is_kept)
        if old != hop:
            self._write(row)

    def _write(self, row: _Row) -> None:
        """Bring a row's record in the shared table up to date."""
        new, old = self._scratch[0], self._table[row.number]
        network, prefix_len = row.prefix
        new["used"], new["prefix_len"] = 1, prefix_len
        new["destination"], new["source"] = swap32(self._number(network)), swap32(self._source_number(row.hop))
        new["state"] = row.hop.state
        if row.hop.state is HopState.FORWARD:
            new["dst_mac"] = np.frombuffer(row.hop.mac, np.uint8)
            new["src_mac"] = np.frombuffer(row.hop.source_mac, np.uint8)
        else:  # a reader that is just using the old addresses must not see half of others
            new["dst_mac"], new["src_mac"] = old["dst_mac"], old["src_mac"]
        if row.hop.state is HopState.UNRESOLVED:
            new["ifindex"], new["mtu"] = old["ifindex"], old["mtu"]
        else:
            new["ifindex"], new["mtu"] = row.hop.ifindex, row.hop.mtu
        words: npt.NDArray[np.uint64] = self._scratch.view(np.uint64)
        compiled_hops.write_row(self.hops.rows, self._epochs, row.number, words)

    def _source_number(self, hop: Hop) -> int:
        """Return what stands for the node's address on a way: 0 also where there is no room for its name."""
        try:
            return self._number(hop.source)
        except TableFullError:
            return 0

    def _leave(self, row: _Row, key: NeighbourKey) -> None:
        """Note that a row does not need a neighbour any more."""
        self._dependents[key].discard(row.prefix)
        if not self._dependents[key]:
            del self._dependents[key]
        self._asking.settle(key)

    def _need_of(self, key: NeighbourKey) -> Need:
        dependents = self._dependents.get(key)
        if not dependents:
            return Need.NOTHING
        if any(self._rows[prefix].is_kept for prefix in dependents):
            return Need.KEPT
        return Need.CLIENT if any(self._rows[prefix].is_client for prefix in dependents) else Need.ROW

    def _take_requests(self) -> list[int]:
        """Take what compiled code has asked for, addresses or names' numbers, from the board; at most _REQUESTS."""
        count, self._next_place = compiled_hops.take_requests(self.hops, self._next_place, self._requests)
        return self._requests[:count].tolist()  # type: ignore[no-any-return]

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
            address = self._address(number)
            route = self._mirror.match(address)
            if route is None or route.kind is not RouteKind.UNICAST:
                continue
            if self._mirror.is_on_link(route):
                row = self._client_row(address)
            else:
                row = self._rows.get((route.network, route.prefix_len))
            if row is None:
                continue
            row.is_client = True
            self._resolve(row)
            key = row.hop.neighbour
            if key and row.hop.state is HopState.UNRESOLVED:
                self._asking.ask_for_packets(key, now)
