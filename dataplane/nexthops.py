"""The rows of next_hops: handed out, resolved through netlink, and kept right while the network changes.

A row leads to a *prefix*: one host (32 bits), or all that a route with a gateway covers. It is resolved by the route of
that prefix, and flows hold its number: when a MAC address, a gateway or an interface changes, the row is written anew
and every flow follows. Compiled code finds a client's row by `lookup(hops, address)` in dataplane/hops_compiled.py.

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
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dataplane import hops_compiled as compiled_hops
from dataplane.asking import Asker, Asking, Need
from dataplane.hops_compiled import Hops, new_hops
from dataplane.mirror import HOST_BITS, NOWHERE, Hop, Mirror, is_usable
from dataplane.netdev import Changes, Interface, Neighbour, NeighbourKey, NeighbourState, Route, RouteKind
from xdp import schema
from xdp.byteorder import swap32
from xdp.schema import HopState
from xdp.tables import Tables

Prefix = tuple[int, int]  # (network in host order, prefix length)

NOBODY = 0  # the row that leads nowhere
ROUTES = 131_072  # that `lookup` can tell apart
TICK_S = 0.25  # how often what is due is looked for; requests of compiled code ring a bell
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


def _address(number: int) -> str:
    return str(IPv4Address(number))


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read everything from the kernel and resolve what is in the table. `interfaces`: the names that are ours."""
        self.hops: Hops = new_hops(tables.next_hops, ROUTES)
        self.rows_refused = 0  # destinations that found the table full
        self.routes_refused = 0  # routes that do not fit into the index now
        self._table = tables.next_hops
        self._epochs = tables.control["next_hop_epoch"]
        self._netdev = netdev
        self._clock = clock
        self._mirror = Mirror(interfaces)
        self._rows: dict[Prefix, _Row] = {}
        self._dependents: dict[NeighbourKey, set[Prefix]] = {}
        self._asking = Asking(netdev, self._mirror, self._need_of)
        self._requests = np.zeros(_REQUESTS, np.uint32)
        self._next_place = 0  # of the board of requests
        self._scratch = np.zeros(1, schema.NEXT_HOP)
        self._is_stale = False  # interfaces or routes have changed since they were read
        self._next_load_s = 0.0
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

    def row_for(self, address: int | IPv4Address) -> int:
        """Return the row of the way to an endpoint, resolved now or later; NOBODY, counted, when the table is full."""
        row = self._row((int(address), HOST_BITS))
        if row is None:
            return NOBODY
        self._make_endpoint(row)
        self._asking.flush(self._clock())
        return row.number

    def retain(self, addresses: Iterable[int | IPv4Address]) -> None:
        """Keep these endpoints resolved and no others; rows of others stay as they are for the flows that hold them.

        A successor need not ask for the rows of endpoints that it has taken over: they become endpoints here.
        """
        wanted = {(int(address), HOST_BITS) for address in addresses}
        for prefix in wanted & self._rows.keys():
            self._make_endpoint(self._rows[prefix])
        for prefix, row in self._rows.items():
            if row.is_endpoint and prefix not in wanted:
                row.is_endpoint = False
                row.is_client = True  # its flows are not cut: it is still looked after, but without haste
                if row.hop.neighbour:
                    self._asking.settle(row.hop.neighbour)
        self._asking.let_go_of_the_rest()
        self._asking.flush(self._clock())

    def let_go_all(self) -> None:
        """Give all that was asked for back to the kernel's own ageing, for a node that leaves its interfaces."""
        self._asking.let_go_all()

    def describe(self) -> list[dict[str, object]]:
        """Return every row as `turnout get nexthops` shows it."""
        return [self._described(row) for row in sorted(self._rows.values(), key=lambda row: row.number)]

    def _described(self, row: _Row) -> dict[str, object]:
        network, prefix_len = row.prefix
        hop = row.hop
        interface = self._mirror.interfaces.get(hop.ifindex)
        return {
            "row": row.number,
            "destination": _address(network) + ("" if prefix_len == HOST_BITS else f"/{prefix_len}"),
            "via": _address(hop.via) if hop.via and hop.via != network else None,
            "interface": interface.name if interface else None,
            "mac": hop.mac.hex(":") if hop.mac else None,
            "state": hop.state.name.lower(),
            "mtu": hop.mtu or None,
        }

    # Following the kernel.

    async def run(self) -> None:
        """Follow the kernel and serve requests until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._netdev.fileno(), self.turn)
        loop.add_reader(self.hops.doorbell, self._answer_the_door)
        try:
            while True:
                self.turn()
                await asyncio.sleep(TICK_S)
        finally:
            loop.remove_reader(self.hops.doorbell)
            loop.remove_reader(self._netdev.fileno())

    def _answer_the_door(self) -> None:
        os.eventfd_read(self.hops.doorbell)
        self.turn()

    def turn(self) -> None:
        """Do what is to be done now: events, requests of compiled code, neighbours that need another look."""
        now = self._clock()
        changes = self._netdev.changes()
        self._is_stale |= changes.links_or_routes or changes.is_overrun
        # The kernel does not tell which routes an interface took with it, nor which one a new route replaced: a change
        # means reading all of them, and how long that took decides when it may happen again.
        if self._is_stale and now >= self._next_load_s:
            self._load(now)
        if changes.is_overrun:
            self._load_neighbours()
        elif changes.neighbours:
            self._apply(changes.neighbours)
        self._serve_requests(now)
        self._asking.look_again(now)
        self._asking.flush(now)

    def _load(self, now: float) -> None:
        """Read interfaces and routes, index the routes, and resolve every row anew."""
        started = self._clock()
        self._read()
        self._resolve_all()
        self._next_load_s = now + (_LOAD_SHARE - 1) * (self._clock() - started)

    def _read(self) -> None:
        self._is_stale = False
        self._mirror.set_interfaces(self._netdev.interfaces())
        self._mirror.set_routes(self._netdev.routes())

    def _resolve_all(self) -> None:
        self._index_routes()
        for row in list(self._rows.values()):
            self._resolve(row)

    def _index_routes(self) -> None:
        """Publish the routes for `lookup`, with a row for each that leads through a gateway or a foreign interface."""
        routes = list(self._mirror.routes())
        self.routes_refused = max(0, len(routes) - ROUTES)
        if self.routes_refused:
            _log.error("%d routes: only the %d longest prefixes are used", len(routes), ROUTES)
            del routes[ROUTES:]
        led = {row.prefix for row in self._rows.values() if row.is_route}
        starts = np.zeros(compiled_hops.LENGTHS + 1, np.uint32)
        networks = np.zeros(len(routes), np.uint32)
        targets = np.zeros(len(routes), np.uint32)
        for entry, route in enumerate(routes):
            starts[HOST_BITS - route.prefix_len + 1] += 1
            networks[entry] = route.network
            targets[entry] = self._target(route)
            led.discard((route.network, route.prefix_len))
        for prefix in led:  # withdrawn: flows still hold the row, and go by the route that covers it now
            self._rows[prefix].is_route = False
        compiled_hops.publish_routes(self.hops, np.cumsum(starts, dtype=np.uint32), networks, targets)

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
        used = np.flatnonzero(self._table["used"])
        for number in used.tolist():
            record = self._table[number]
            prefix = (swap32(record["destination"]), int(record["prefix_len"]))
            self._rows[prefix] = _Row(number, prefix, is_client=True, hop=_ADOPTED)
            if prefix[1] == HOST_BITS:
                compiled_hops.set_host_row(self.hops, prefix[0], number)
        free = np.ones(len(self._table), bool)
        free[used] = False
        free[NOBODY] = False
        self._free: list[int] = np.flatnonzero(free)[::-1].tolist()
        self._rows_for_others = int(len(self._table) * (1 - _HOSTS_SHARE))

    def _recall(self) -> None:
        """Believe a predecessor's rows about neighbours that the kernel has forgotten since, until it has asked."""
        for row in self._rows.values():
            record = self._table[row.number]
            key = self._mirror.hop(*row.prefix).neighbour
            if record["state"] != HopState.FORWARD or key is None or record["ifindex"] != key[0]:
                continue
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
        if not self._free:
            self._refuse(prefix)
            return None
        row = _Row(self._free.pop(), prefix)
        self._rows[prefix] = row
        self._write(row)
        if prefix[1] == HOST_BITS:
            compiled_hops.set_host_row(self.hops, prefix[0], row.number)
        return row

    def _client_row(self, address: int) -> _Row | None:
        """Return the row of a host on the link; None, counted, when the clients' share of the table is taken."""
        prefix = (address, HOST_BITS)
        if prefix not in self._rows and len(self._free) <= self._rows_for_others:
            self._refuse(prefix)
            return None
        return self._row(prefix)

    def _refuse(self, prefix: Prefix) -> None:
        self.rows_refused += 1
        if self.rows_refused & (self.rows_refused - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
            _log.error(
                "next hops: no row for %s: %d of %d are taken (refused %d times); this version has no more",
                _address(prefix[0]), len(self._rows), len(self._table), self.rows_refused,
            )  # fmt: skip

    def _resolve(self, row: _Row) -> None:
        """Change a row to where its prefix leads now, and ask for the neighbour that it needs."""
        old, hop = row.hop, self._mirror.hop(*row.prefix)
        row.hop = hop
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
        new["destination"] = swap32(network)
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

    def _serve_requests(self, now: float) -> None:
        """Resolve what compiled code has asked for."""
        count, self._next_place = compiled_hops.take_requests(self.hops, self._next_place, self._requests)
        for address in self._requests[:count].tolist():
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
