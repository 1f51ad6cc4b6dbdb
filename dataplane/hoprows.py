"""The rows of next_hops as records: whose they are, which are free, and the names of IPv6 that they pin.

A row is one host's (an endpoint's, a client's), or it is shared by all routes that lead the same way. A shared row goes
by a *prefix* that stands for the others: when that is led elsewhere while others are not, one of these takes its place.
So a way that changes for all of its routes changes under the same number, and flows follow at once; those of single
routes that leave it are led after them (dataplane/reclaim.py).

A row is given back in steps, as its number may be in flows and in the hands of who has just found it: it is *parted*
with (nobody finds it any more, but it is kept right), and after a grace period, when no flow has it, freed.

The last rows, one in LEARNED_SHARE, are for XDP to take; they are given back like the others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataplane import hops_compiled as compiled_hops
from dataplane.hops_compiled import Hops
from dataplane.mirror import NOWHERE, Hop
from dataplane.netdev import Way
from xdp import schema
from xdp.addresses import address_of, host_bits, is_ipv6, number_of
from xdp.byteorder import swap32
from xdp.errors import TableFullError
from xdp.names import Names
from xdp.schema import HopState, Limit, RowUse
from xdp.tables import Tables

Prefix = tuple[int, int]  # (network as in xdp/addresses.py, prefix length)
Course = tuple[int, tuple[Way, ...], int, int]  # what routes that share a row agree in: bits, ways, MTU, source

NOBODY = 0  # the row that leads nowhere
_HOSTS_SHARE = 0.75  # of the rows may go to clients, so that a scan of the subnet leaves room for endpoints
_ROUTES_SHARE = 16  # one in so many may go to routes: to as many different ways
ADOPTED = Hop(HopState.UNRESOLVED, ifindex=-1)  # what a predecessor wrote: equal to no result of ours

_log = logging.getLogger(__name__)


def prefix_of_host(address: int) -> Prefix:
    """Return the prefix of a single address."""
    return address, host_bits(address)


@dataclass(slots=True, eq=False)
class Row:
    """A row that is handed out."""

    number: int
    prefix: Prefix
    destination: int  # what stands for the network in tables
    is_shared: bool = False  # a row of routes
    course: Course | None = None  # of the routes that lead here now
    is_led: bool = False  # a route leads to this host alone, by an interface that is not ours
    is_endpoint: bool = False
    is_client: bool = False  # compiled code has asked for it
    is_parted: bool = False  # nobody finds it any more
    hop: Hop = NOWHERE

    @property
    def is_kept(self) -> bool:
        """Return whether the kernel is to keep the neighbour resolved for ever."""
        return self.is_endpoint or self.is_led or self.course is not None


class Rows:
    """All rows. `adopt` takes over those of a predecessor, with their numbers."""

    def __init__(self, tables: Tables, hops: Hops) -> None:
        self.all: dict[int, Row] = {}  # by number
        self.hosts: dict[int, Row] = {}  # by address: the one that is found
        self.routes: dict[Prefix, Row] = {}  # shared ones, by what stands for the others
        self.refused = 0  # hosts and routes that found no room
        self._tables, self._table = tables, tables.next_hops
        self._hops = hops
        self._names = Names(tables)
        self._sources: dict[int, int] = {}  # names of the node's own addresses, pinned for good
        self._scratch = np.zeros(1, schema.NEXT_HOP)
        rows = len(self._table)
        self._learned_from = rows - rows // Limit.LEARNED_SHARE
        self._kept_from_clients = int(rows * (1 - _HOSTS_SHARE)) - rows // Limit.LEARNED_SHARE
        self._learned_place = -1  # control.learned when rows that XDP has taken were last looked for
        self._free: list[int] = []
        self._by_course: dict[Course, Row] = {}
        self._led: list[Row] = []

    def adopt(self) -> None:
        """Take over what is in the table. A daemon's pins are void when it is gone, XDP's among them."""
        self._learned_place = int(self._tables.control[0]["learned"])
        compiled_hops.mend_hosts(self._hops, self._table["used"])
        compiled_hops.remove_host(self._hops, self._tables.control["next_hop_epoch"], 0)  # nobody's: compiled now
        for number in self._numbers_used(0):
            self._take_over(number, self._pin(self._network_in(number)))
        free = np.ones(self._learned_from, bool)
        free[NOBODY] = False
        free[[number for number in self.all if number < self._learned_from]] = False
        self._free = np.flatnonzero(free)[::-1].tolist()

    def learned(self, *, anyway: bool = False) -> list[Row]:
        """Return the rows that XDP has taken for clients since the last call; each has pinned its name."""
        place = int(self._tables.control[0]["learned"])
        if place == self._learned_place and not anyway:
            return []
        self._learned_place = place
        fresh = [number for number in self._numbers_used(self._learned_from) if number not in self.all]
        return [self._take_over(number, swap32(int(self._table[number]["destination"]))) for number in fresh]

    def _numbers_used(self, first: int) -> list[int]:
        used = self._table["used"][first:]
        return (first + np.flatnonzero((used == RowUse.OF_HOST) | (used == RowUse.OF_ROUTES))).tolist()

    def _take_over(self, number: int, destination: int) -> Row:
        record = self._table[number]
        prefix = (self._network_in(number), int(record["prefix_len"]))
        is_shared = record["used"] == RowUse.OF_ROUTES or prefix != prefix_of_host(prefix[0])
        row = self.all[number] = Row(number, prefix, destination, is_shared, is_client=True, hop=ADOPTED)
        if is_shared:
            record["used"] = RowUse.OF_ROUTES  # also those of a version that had a row for each route
            self.routes.setdefault(prefix, row)
            return row
        if compiled_hops.host_row(self._hops, destination) == compiled_hops.MISS:
            compiled_hops.set_host_row(self._hops, destination, number)
        if compiled_hops.host_row(self._hops, destination) == number:  # else another one has the address, too
            self.hosts[prefix[0]] = row
        return row

    # Handing out.

    def of_host(self, address: int) -> Row | None:
        """Return the row of a host, handed out if it has none; None, counted, when the table is full."""
        row = self.hosts.get(address)
        if row is None:
            row = self._new(prefix_of_host(address))
            if row is not None:
                self.hosts[address] = row
                compiled_hops.set_host_row(self._hops, row.destination, row.number)
        elif row.is_parted:
            self._rejoin(row)
        return row

    def of_client(self, address: int) -> Row | None:
        """Return the row of a host on the link; None, counted, when the clients' share of the table is taken."""
        if address not in self.hosts and len(self._free) <= self._kept_from_clients:
            self._refuse(prefix_of_host(address))
            return None
        return self.of_host(address)

    def of_course(self, course: Course) -> Row | None:
        """Return the row that routes of this course share."""
        return self._by_course.get(course)

    def shared(self) -> npt.NDArray[np.uint8]:
        """Return by row whether it is one of routes."""
        is_shared = np.zeros(len(self._table), np.uint8)
        is_shared[self._table["used"] == RowUse.OF_ROUTES] = 1
        return is_shared

    def lead_to_hosts(self, addresses: Iterable[int]) -> None:
        """Let these be the hosts that routes lead to one by one, without a gateway: each keeps a row of its own."""
        for row in self._led:
            row.is_led = False
        self._led = [led for address in addresses if (led := self.of_host(address)) is not None]
        for row in self._led:
            row.is_led = True

    def lead(self, courses: Mapping[Prefix, Course]) -> None:
        """Let these be the courses of all routes that want a row: each has one, while there is room for them."""
        standing: dict[Course, Prefix] = {}
        for prefix, course in courses.items():
            standing.setdefault(course, prefix)
        before, self._by_course = self._by_course, {}
        for course, row in before.items():
            row.course = None
            if course in standing:
                self._share(row, course)
                if courses.get(row.prefix) != course:
                    self._stand_for(row, standing[course])
        for prefix, row in self.routes.items():  # all that led one way leads another now
            now = courses.get(prefix)
            if row.course is None and now is not None and now not in self._by_course:
                self._share(row, now)
        for course, prefix in standing.items():
            if course not in self._by_course:
                fresh = self._new_of_routes(prefix)
                if fresh is not None:
                    self._share(fresh, course)

    def _share(self, row: Row, course: Course) -> None:
        row.course, row.is_parted = course, False
        self._by_course[course] = row

    def _stand_for(self, row: Row, prefix: Prefix) -> None:
        """Have a shared row go by another prefix; by the old one, if there is no room for the new one's name."""
        try:
            destination = self._pin(prefix[0])
        except TableFullError:
            return
        if self.routes.get(row.prefix) is row:
            del self.routes[row.prefix]
        self._unpin(row)
        row.prefix, row.destination = prefix, destination
        self.routes[prefix] = row
        self.write(row)

    def _new_of_routes(self, prefix: Prefix) -> Row | None:
        if len(self.routes) >= len(self._table) // _ROUTES_SHARE:
            self._refuse(prefix)
            return None
        row = self._new(prefix, is_shared=True)
        if row is not None:
            self.routes[prefix] = row
        return row

    def _new(self, prefix: Prefix, *, is_shared: bool = False) -> Row | None:
        try:
            destination = self._pin(prefix[0]) if self._free else -1
        except TableFullError:
            destination = -1
        if destination < 0:
            self._refuse(prefix)
            return None
        row = Row(self._free.pop(), prefix, destination, is_shared)
        self.all[row.number] = row
        self.write(row)
        return row

    def _refuse(self, prefix: Prefix) -> None:
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
            _log.error(
                "next hops: no row for %s: %d of %d are taken (refused %d times); unused ones are freed",
                address_of(prefix[0]), len(self.all), len(self._table), self.refused,
            )  # fmt: skip

    # Giving back.

    @property
    def is_short(self) -> bool:
        """Return whether more than half of what clients may have, or of what XDP may take, is taken."""
        for_clients = self._learned_from - self._kept_from_clients
        learned = int(np.count_nonzero(self._table["used"][self._learned_from :]))
        return len(self._free) - self._kept_from_clients < for_clients // 2 or learned > len(self._table) // (
            2 * Limit.LEARNED_SHARE
        )

    def part(self, rows: Iterable[Row]) -> None:
        """Let nobody find these any more."""
        for row in rows:
            row.is_parted = True
            if self.hosts.get(row.prefix[0]) is row:
                compiled_hops.remove_host(self._hops, self._tables.control["next_hop_epoch"], row.destination)

    def parted(self) -> list[Row]:
        """Return what was parted with and has come to nobody's mind since."""
        compiled_hops.mend_hosts(self._hops, self._table["used"])
        return [row for row in self.all.values() if row.is_parted]

    def settle(self, rows: Iterable[Row], used: npt.NDArray[np.uint8]) -> list[Row]:
        """Free those of `parted` rows that are not used, and let the others have theirs back; return the freed.

        `used`: by row, whether a flow or an endpoint had it a grace period after it was parted with, and a grace
        period ago.
        """
        is_found = np.zeros(len(self._table), bool)
        is_found[(self._hops.hosts & np.uint64(0xFFFFFFFF)).astype(np.int64)] = True
        freed = []
        for row in rows:
            if not row.is_parted:
                continue
            if used[row.number] or row.is_kept or is_found[row.number]:
                self._rejoin(row)
            else:
                self._release(row)
                freed.append(row)
        return freed

    def _rejoin(self, row: Row) -> None:
        row.is_parted = False
        if self.hosts.get(row.prefix[0]) is row:
            compiled_hops.set_host_row(self._hops, row.destination, row.number)
            compiled_hops.advance(self._tables.control["next_hop_epoch"])

    def _release(self, row: Row) -> None:
        del self.all[row.number]
        if self.hosts.get(row.prefix[0]) is row:
            del self.hosts[row.prefix[0]]
        if self.routes.get(row.prefix) is row:
            del self.routes[row.prefix]
        self._scratch[0] = 0
        self._store(row.number)
        self._unpin(row)
        if row.number < self._learned_from:
            self._free.append(row.number)

    # What they say.

    def write(self, row: Row) -> None:
        """Bring a row's record in the shared table up to date."""
        new, old = self._scratch[0], self._table[row.number]
        new["used"], new["prefix_len"] = RowUse.OF_ROUTES if row.is_shared else RowUse.OF_HOST, row.prefix[1]
        new["destination"], new["source"] = swap32(row.destination), swap32(self._source(row.hop.source))
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
        self._store(row.number)

    def _store(self, number: int) -> None:
        words: npt.NDArray[np.uint64] = self._scratch.view(np.uint64)
        compiled_hops.write_row(self._hops.rows, self._tables.control["next_hop_epoch"], number, words)

    # Addresses in tables.

    def address(self, number: int) -> int:
        """Return the address that a number in tables stands for."""
        return number_of(self._names.address_of(number)) if 0 < number < Limit.MAX_NAMES else number

    def _network_in(self, number: int) -> int:
        return self.address(swap32(int(self._table[number]["destination"])))

    def _pin(self, address: int) -> int:
        """Return what stands for an address in tables, in host order; TableFullError if no name can be had for it."""
        return self._names.pin(address_of(address)) if is_ipv6(address) else address  # type: ignore[arg-type]

    def _unpin(self, row: Row) -> None:
        if is_ipv6(row.prefix[0]):
            self._names.release(row.destination)

    def _source(self, address: int) -> int:
        """Return what stands for an address of the node's: 0 also where there is no room for its name."""
        if not is_ipv6(address):
            return address
        if address not in self._sources:
            try:
                self._sources[address] = self._pin(address)
            except TableFullError:
                return 0
        return self._sources[address]


def unused(rows: Iterable[Row], used: npt.NDArray[np.uint8], *, is_short: bool) -> list[Row]:
    """Return the rows to part with: of those that nothing uses what leads nowhere, or all of them if they are short."""
    return [
        row
        for row in rows
        if not (used[row.number] or row.is_kept) and (is_short or row.is_shared or row.hop.state is HopState.UNRESOLVED)
    ]
