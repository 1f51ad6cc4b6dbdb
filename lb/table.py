"""From the wanted Service ports to rows of the shared tables: only what differs is written.

Packets read these tables while they change, so:

* a row of `services` with its Maglev slots is immutable while a frontend holds its number. A changed Service port gets
  a new row, written aside; then its number is stored in each frontend. A packet sees the old row or the new one;
* everything that can fail (room for rows, slots, endpoints, frontends) happens before the first visible store;
* what is no longer held is reused only after `release`, which the caller makes after a grace period.

Nothing but the tables themselves is remembered from one daemon to the next: `adopt` reads back what they hold, so an
unchanged configuration writes nothing at a restart.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address
from typing import NamedTuple

import numpy as np

from lb import compiled, maglev
from lb.rows import Address, FrontendKey, ServiceRow
from xdp.byteorder import swap16, swap32
from xdp.errors import TableFullError
from xdp.schema import Limit
from xdp.tables import Tables

_VIP = (0, 0)


class _Content(NamedTuple):
    """What a row of `services` says, as far as it can be read back: equal content needs no new row."""

    endpoints: frozenset[Address]
    when_stalled: int


class Change(NamedTuple):
    """What `apply` did. `gone` are endpoints that no Service port has any more."""

    rows_written: int
    frontends_added: int
    frontends_removed: int
    gone: frozenset[Address]


class Parted(NamedTuple):
    """Rows of `services` (with their slots) and of `endpoints` that a packet may still be looking at."""

    rows: list[int]
    endpoints: list[int]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.rows or self.endpoints)


class _Free:
    """Free ranges of a table, merged when they touch; the lowest that fits is taken."""

    def __init__(self, what: str, size: int) -> None:
        self._what = what
        self._size = size
        self._ranges = [(0, size)] if size else []

    def take(self, count: int) -> int:
        for index, (start, stop) in enumerate(self._ranges):
            if stop - start >= count:
                if stop - start == count:
                    del self._ranges[index]
                else:
                    self._ranges[index] = (start + count, stop)
                return start
        raise TableFullError(
            f"no room for {count} more {self._what}: this version has room for {self._size:,} (old and new ones while "
            "they change); use fewer"
        )

    def take_at(self, start: int, count: int) -> None:
        index = bisect.bisect_right(self._ranges, (start, 1 << 62)) - 1
        low, high = self._ranges[index]
        pieces = [(low, start), (start + count, high)]
        self._ranges[index : index + 1] = [piece for piece in pieces if piece[0] < piece[1]]

    def give(self, start: int, count: int) -> None:
        stop = start + count
        index = bisect.bisect_left(self._ranges, (start, stop))
        if index < len(self._ranges) and self._ranges[index][0] == stop:
            stop = self._ranges.pop(index)[1]
        if index and self._ranges[index - 1][1] == start:
            index -= 1
            start = self._ranges.pop(index)[0]
        self._ranges.insert(index, (start, stop))


class ServiceTable:
    """The rows of frontends, services, Maglev slots and endpoints, with one writer.

    `hop_of` gives the next hop's row for an endpoint's address. `seed` is Maglev's, equal on nodes that share a VIP.
    """

    def __init__(self, tables: Tables, seed: int, hop_of: Callable[[IPv4Address], int]) -> None:
        self._tables = tables
        self._seed = np.uint64(seed)
        self._hop_of = hop_of
        self._slots = tables.maglev
        self._place: dict[FrontendKey, int] = {}
        self._row_of: dict[FrontendKey, int] = {}
        self._content: dict[int, _Content] = {}
        self._endpoint_row: dict[Address, int] = {}
        self._endpoint_users: dict[Address, int] = {}
        self._free_rows = _Free("Service ports", len(tables.services))
        self._free_slots = _Free("Maglev slots", len(tables.maglev))
        self._free_endpoints = _Free("endpoints", len(tables.endpoints))
        self._free_rows.take(1)  # row 0 is what VIP entries hold: no endpoints
        self._parted = Parted([], [])

    def adopt(self) -> None:
        """Read back what the tables hold, after a daemon before this one."""
        frontends = self._tables.frontends
        for place in np.flatnonzero(frontends["used"]):
            row = frontends[place]
            frontend = (IPv4Address(swap32(row["addr"])), swap16(row["port"]), int(row["protocol"]))
            self._place[frontend] = int(place)
            if frontend[1:] != _VIP:
                self._row_of[frontend] = int(row["service"])
        for row in sorted(set(self._row_of.values())):
            self._adopt_row(row)

    def _adopt_row(self, number: int) -> None:
        service = self._tables.services[number]
        first, count = int(service["first_slot"]), int(service["slots"])
        rows = [int(row) for row in np.unique(self._slots[first : first + count])]
        addresses = []
        for row in rows:
            endpoint = self._tables.endpoints[row]
            address = (IPv4Address(swap32(endpoint["addr"])), swap16(endpoint["port"]))
            addresses.append(address)
            if address not in self._endpoint_row:
                self._free_endpoints.take_at(row, 1)
                self._endpoint_row[address] = row
            self._endpoint_users[address] = self._endpoint_users.get(address, 0) + 1
        self._free_rows.take_at(number, 1)
        if count:
            self._free_slots.take_at(first, count)
        self._content[number] = _Content(frozenset(addresses), int(service["when_stalled"]))

    def apply(self, services: Iterable[ServiceRow]) -> Change:
        """Make the tables say `services` and nothing else. TableFullError: nothing has changed."""
        wanted: dict[FrontendKey, tuple[_Content, ServiceRow]] = {}
        for service in services:
            content = _Content(frozenset(service.endpoints), int(service.when_stalled))
            for frontend in service.frontends:
                wanted[frontend] = (content, service)
        staged = _Staged({}, [], [], [])
        try:
            rows = self._stage(wanted, staged)
        except TableFullError:
            self._unstage(staged)
            raise
        return self._publish(rows, staged)

    def _stage(self, wanted: dict[FrontendKey, tuple[_Content, ServiceRow]], staged: _Staged) -> dict[FrontendKey, int]:
        """Find or write aside the row of every wanted frontend, and a place for every new one."""
        rows: dict[FrontendKey, int] = {}
        row_of_service: dict[int, int] = {}  # by identity: the frontends of one share a row
        for frontend, (content, service) in wanted.items():
            row = self._row_of.get(frontend, -1)
            if self._content.get(row) != content:
                row = row_of_service.get(id(service), -1)
                if row < 0:
                    row = self._write_row(content, staged)
            row_of_service.setdefault(id(service), row)
            rows[frontend] = row
        taken: set[int] = set()
        vips = {(address, *_VIP): 0 for address, _, _ in wanted}
        for frontend, row in (vips | rows).items():
            if frontend not in self._place:
                place = self._free_place(frontend, taken)
                taken.add(place)
                staged.places.append((frontend, place, row))
        return vips | rows

    def _write_row(self, content: _Content, staged: _Staged) -> int:
        row = self._free_rows.take(1)
        staged.rows.append((row, 0, 0))
        endpoints = sorted(content.endpoints)
        numbers = np.array([self._endpoint(address, staged) for address in endpoints], np.uint32)
        count = maglev.table_size(len(endpoints))
        first = self._free_slots.take(count) if count else 0
        staged.rows[-1] = (row, first, count)
        if count:
            slots = self._slots[first : first + count]
            maglev.fill(slots, maglev.names_of(endpoints), numbers, self._seed, maglev.scratch_for(len(endpoints)))
        service = self._tables.services[row]
        service["first_slot"], service["slots"], service["when_stalled"] = first, count, content.when_stalled
        staged.contents[row] = content
        return row

    def _endpoint(self, address: Address, staged: _Staged) -> int:
        """Return the row of an endpoint, written if it is new; one more user holds it."""
        row = self._endpoint_row.get(address)
        if row is None:
            row = self._free_endpoints.take(1)
            record = self._tables.endpoints[row]
            record["addr"], record["port"] = swap32(int(address[0])), swap16(address[1])
            record["next_hop"] = self._hop_of(address[0])
            self._endpoint_row[address] = row
        self._endpoint_users[address] = self._endpoint_users.get(address, 0) + 1
        staged.endpoints.append(address)
        return row

    def _free_place(self, frontend: FrontendKey, taken: set[int]) -> int:
        """Return a free place for a frontend, in the emptier of its two groups."""
        address, port, protocol = frontend
        keys = self._tables.frontend_keys
        groups = compiled.frontend_places(
            self._tables.control[0]["hash_key"], len(keys), np.uint32(swap32(int(address))), np.uint16(swap16(port)),
            np.uint8(protocol),
        )  # fmt: skip
        free = [
            [place for place in range(first, first + Limit.FRONTEND_WAYS) if not keys[place] and place not in taken]
            for first in groups
        ]
        best = max(free, key=len)
        if not best:
            room = len(keys) // 2  # half full at most, or a place is not certain
            raise TableFullError(
                f"no room for frontend {address}:{port}: this version has room for {room:,}; use fewer"
            )
        return best[0]

    def _unstage(self, staged: _Staged) -> None:
        for row, first, count in staged.rows:
            self._free_rows.give(row, 1)
            if count:
                self._free_slots.give(first, count)
        for address in staged.endpoints:
            self._endpoint_users[address] -= 1
        for address in set(staged.endpoints):
            if not self._endpoint_users[address]:
                del self._endpoint_users[address]
                self._free_endpoints.give(self._endpoint_row.pop(address), 1)

    def _publish(self, rows: dict[FrontendKey, int], staged: _Staged) -> Change:
        """Let packets see it: new frontends, changed ones, and no longer those that are gone."""
        frontends, keys = self._tables.frontends, self._tables.frontend_keys
        self._content.update(staged.contents)
        held_before = set(self._row_of.values())
        for frontend, place, row in staged.places:
            frontends[place]["service"] = row
            address, port, protocol = frontend
            keys[place] = int(compiled.frontend_key(swap32(int(address)), swap16(port), protocol))  # the key comes last
            self._place[frontend] = place
        for frontend, row in rows.items():
            if frontend[1:] != _VIP and self._row_of.get(frontend) != row:
                frontends[self._place[frontend]]["service"] = row
                self._row_of[frontend] = row
        removed = [frontend for frontend in self._place if frontend not in rows]
        for frontend in removed:
            keys[self._place.pop(frontend)] = 0
            self._row_of.pop(frontend, None)
        gone = self._part(held_before - set(self._row_of.values()))
        added = sum(frontend[1:] != _VIP for frontend, _, _ in staged.places)
        return Change(len(staged.rows), added, sum(frontend[1:] != _VIP for frontend in removed), gone)

    def _part(self, numbers: set[int]) -> frozenset[Address]:
        """Part with rows that no frontend holds any more; return the endpoints that went with them."""
        gone = set()
        for number in numbers:
            for address in self._content.pop(number).endpoints:
                self._endpoint_users[address] -= 1
                if not self._endpoint_users[address]:
                    del self._endpoint_users[address]
                    self._parted.endpoints.append(self._endpoint_row.pop(address))
                    gone.add(address)
            self._parted.rows.append(number)
        return frozenset(gone)

    def take_parted(self) -> Parted:
        """Return what `apply` has parted with since the last call: to be given to `release` after a grace period."""
        parted, self._parted = self._parted, Parted([], [])
        return parted

    def release(self, parted: Parted) -> None:
        """Make reusable what was parted with. The caller has seen a grace period since it took it."""
        for number in parted.rows:
            service = self._tables.services[number]
            if service["slots"]:
                self._free_slots.give(int(service["first_slot"]), int(service["slots"]))
            self._free_rows.give(number, 1)
        for row in parted.endpoints:
            self._free_endpoints.give(row, 1)


class _Staged(NamedTuple):
    """What an `apply` has taken before anything is visible."""

    contents: dict[int, _Content]
    rows: list[tuple[int, int, int]]  # row, first slot, slots
    endpoints: list[Address]
    places: list[tuple[FrontendKey, int, int]]  # frontend, place, row
