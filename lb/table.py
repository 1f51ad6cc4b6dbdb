"""From the wanted Service ports to rows of the shared tables: only what differs is written.

Packets read these tables while they change, so:

* a row of `services` with its Maglev slots is immutable while a frontend holds its number. A changed Service port gets
  a new row, written aside; then its number is stored in each frontend. A packet sees the old row or the new one;
* everything that can fail (room for rows, slots, endpoints, frontends) happens before the first visible store;
* what is no longer held is reused only after `release`, which the caller makes after a grace period.

Nothing but the tables themselves is remembered from one daemon to the next: `adopt` reads back what they hold, so an
unchanged configuration writes nothing at a restart. With another seed, slots are written over where they are: there is
no room for a second table of every row. A packet that reads them meanwhile gets another endpoint of its Service port.
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lb import affinity, compiled, maglev
from lb.garbage import no_collections
from lb.rows import Address, FrontendKey, Ranges, ServiceRow
from xdp.addresses import IPV6, IPAddress, address_of, halves, is_ipv6, number_of, with_port
from xdp.errors import TableFullError
from xdp.names import Names
from xdp.schema import Needs, Protocol, Scheduler
from xdp.tables import Tables

_LONGEST_AFFINITY_S = 86_400  # that Kubernetes takes

# Inside, places are numbers, as objects are slow to hash and to compare: a frontend is address, port and protocol (32,
# 16, 8 bits), its VIP the same without port and protocol, an endpoint is address and port. Addresses are those of
# xdp/addresses.py: of IPv6 they are longer.
_PORT_AND_PROTOCOL = 0xFFFFFF


def _packed_frontend(frontend: FrontendKey) -> int:
    address, port, protocol = frontend
    return number_of(address) << 24 | port << 8 | protocol


def _packed_endpoint(endpoint: Address) -> int:
    address, port = endpoint
    return number_of(address) << 16 | port


def _keys(frontends: list[int]) -> npt.NDArray[np.uint64]:
    """Return the keys of the table of frontends (lb.compiled.frontend_key) for frontends as packets know them."""
    packed = np.array(frontends, np.uint64)
    address = (packed >> np.uint64(24)).astype(np.uint32).byteswap()
    port = (packed >> np.uint64(8)).astype(np.uint16).byteswap()
    protocol = packed & np.uint64(0xFF)
    return compiled.USED | protocol << np.uint64(48) | port.astype(np.uint64) << np.uint64(32) | address


def _whole(high: int, low: int) -> int:
    return IPV6 | int(high) << 64 | int(low)


class _Content(NamedTuple):
    """What a row of `services` says, as far as it can be read back: equal content needs no new row."""

    endpoints: tuple[int, ...]  # ascending, each once
    local: tuple[int, ...]  # those of them on this node; ascending, each once
    when_stalled: int
    admits_here: bool
    is_elsewhere: bool
    ranges: Ranges | None
    masquerade: int
    affinity_s: int
    identity: int
    weights: int
    scheduler: int
    mid_stream: int
    timeouts: int
    inside: _Content | None
    tells_packets: bool

    @property
    def needs(self) -> int:
        """What userspace must look at when it admits a connection."""
        return (
            (Needs.RANGES if self.ranges is not None else 0)
            | (Needs.SNAT if self.masquerade else 0)
            | (Needs.AFFINITY if self.affinity_s else 0)
            | (Needs.SCHEDULER if self.scheduler else 0)
            | (Needs.SHORT_CUT if self.inside is not None and self.tells_packets else 0)
        )

    @property
    def members(self) -> int:
        """How many endpoints are listed behind the slots: a light one may have no slot, so that only this has all."""
        return len(self.endpoints) if self.affinity_s or self.weights or self.scheduler else 0


def _content_of(service: ServiceRow) -> _Content:
    return _Content(
        tuple(sorted({*map(_packed_endpoint, service.endpoints)})),
        tuple(sorted({*map(_packed_endpoint, service.local)})),
        int(service.when_stalled),
        service.admits_here,
        service.is_elsewhere,
        service.ranges,
        int(service.masquerade),
        service.affinity_s,
        service.identity,
        _standing_for(service.weights),
        int(service.scheduler),
        int(service.mid_stream),
        service.timeouts,
        _content_of(service.inside) if service.inside is not None else None,
        service.tells_packets,
    )


def _standing_for(weights: tuple[tuple[Address, int], ...]) -> int:
    """Return a number of 32 bits by which weights can be told from others; 0: they are equal."""
    text = ",".join(f"{address}:{port}={weight}" for (address, port), weight in weights)
    return zlib.crc32(text.encode()) | 1 if weights else 0


def _weights_of(content: _Content, service: ServiceRow) -> list[int]:
    """Return the weights of a row's endpoints in their order; empty: they are equal."""
    by_endpoint = {_packed_endpoint(endpoint): weight for endpoint, weight in service.weights}
    return [by_endpoint.get(endpoint, 1) for endpoint in content.endpoints] if by_endpoint else []


class Change(NamedTuple):
    """What `apply` did."""

    rows_written: int
    frontends_added: int
    frontends_removed: int


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

    def __init__(self, tables: Tables, seed: int, hop_of: Callable[[IPAddress], int]) -> None:
        self._tables = tables
        self._seed = np.uint64(seed)
        self._stale: set[int] = set()  # rows of `services` whose slots are as another seed has them
        self._hop_of = hop_of
        self._slots = tables.maglev
        self._place: dict[int, int] = {}  # of frontends, and of VIPs
        self._is_taken = np.zeros(len(tables.frontends), np.uint8)  # places
        self._row_of: dict[int, int] = {}  # of frontends
        self._row_users: dict[int, int] = {}  # frontends that hold a row
        self._frontends_at: dict[int, set[int]] = {}  # VIPs
        self._content: dict[int, _Content] = {}
        self._least: set[int] = set()  # rows of services with least connections
        self._endpoint_row: dict[int, int] = {}
        self._endpoint_users: dict[int, int] = {}  # rows of `services` that have an endpoint
        self._free_rows = _Free("Service ports", len(tables.services))
        self._free_slots = _Free("Maglev slots", len(tables.maglev))
        self._free_endpoints = _Free("endpoints", len(tables.endpoints))
        self._free_ranges = _Free("source ranges", len(tables.ranges))
        self._free_ranges6 = _Free("source ranges", len(tables.ranges6))
        self._with_ranges6: set[int] = set()  # rows of `services` whose source ranges are of IPv6
        self._names = Names(tables)  # each place and each endpoint's row has pinned the name of its address
        self._endpoint_names: dict[int, int] = {}  # by row
        self._own: frozenset[int] = frozenset()  # addresses of the node, as VIPs would be written
        self._free_rows.take(1)  # row 0 is what VIPs hold until they have another: no endpoints
        self._parted = Parted([], [])

    def adopt(self) -> None:
        """Read back what the tables hold, after a daemon before this one."""
        places = np.flatnonzero(self._tables.frontends["used"])
        self._is_taken[places] = 1
        found = self._tables.frontends[places]
        for place, address, port, protocol, row in zip(
            places.tolist(),
            found["addr"].byteswap().tolist(),
            found["port"].byteswap().tolist(),
            found["protocol"].tolist(),
            found["service"].tolist(),
            strict=True,
        ):
            host = self._adopted(address) if protocol & Protocol.IPV6 else address
            frontend = host << 24 | port << 8 | protocol & ~Protocol.IPV6
            self._place[frontend] = place
            if frontend & _PORT_AND_PROTOCOL:
                self._hold(frontend, row)
        rows_of_ipv6 = {row for frontend, row in self._row_of.items() if is_ipv6(frontend >> 24)}
        for row in sorted(self._row_users):
            self._adopt_row(row, of_ipv6=row in rows_of_ipv6)
        for vip in [vip for vip in self._place if not vip & _PORT_AND_PROTOCOL and vip not in self._frontends_at]:
            self._withdraw(vip)  # of a daemon that was killed when it had no frontends any more
        self._let_lead(self._frontends_at)
        if self._tables.control[0]["maglev_seed"] != self._seed:
            self._stale = set(self._content)
        affinity.abandon(self._tables)

    def _adopted(self, number: int) -> int:
        """Return the address that a name's number stands for, in something that goes on using it."""
        address = self._names.address_of(number)
        self._names.pin(address)
        return number_of(address)

    def _adopt_row(self, number: int, *, of_ipv6: bool) -> _Content:
        service = self._tables.services[number]
        first, count = int(service["first_slot"]), int(service["slots"]) + int(service["members"])
        rows = np.unique(self._slots[first : first + count])
        records = self._tables.endpoints[rows]
        endpoints, local = [], []
        for row, address, port, is_local in zip(
            rows.tolist(),
            records["addr"].byteswap().tolist(),
            records["port"].byteswap().tolist(),
            records["is_local"].tolist(),
            strict=True,
        ):
            host = number_of(self._names.address_of(address)) if of_ipv6 else address
            endpoint = host << 16 | port
            endpoints.append(endpoint)
            if is_local:
                local.append(endpoint)
            if endpoint not in self._endpoint_row:
                self._free_endpoints.take_at(row, 1)
                self._endpoint_row[endpoint] = row
                if of_ipv6:
                    self._adopted(address)
                    self._endpoint_names[row] = address
            self._endpoint_users[endpoint] = self._endpoint_users.get(endpoint, 0) + 1
        self._free_rows.take_at(number, 1)
        if count:
            self._free_slots.take_at(first, count)
        content = _Content(
            tuple(sorted(endpoints)),
            tuple(sorted(local)),
            int(service["when_stalled"]),
            bool(service["admits_here"]),
            bool(service["is_elsewhere"]),
            self._adopt_ranges(number, service, of_ipv6=of_ipv6),
            int(service["masquerade"]),
            int(service["affinity_s"]),
            int(service["identity"]),
            int(service["weights"]),
            int(service["scheduler"]),
            int(service["mid_stream"]),
            int(service["timeouts"]),
            self._adopt_row(int(service["inside"]), of_ipv6=of_ipv6) if service["inside"] else None,
            not service["inside"] or bool(service["needs"] & Needs.SHORT_CUT),
        )
        self._keep(number, content)
        return content

    def _keep(self, number: int, content: _Content) -> None:
        """Remember what a row says."""
        self._content[number] = content
        if content.scheduler == Scheduler.LEAST_CONNECTIONS:
            self._least.add(number)

    def _adopt_ranges(self, number: int, service: np.void, *, of_ipv6: bool) -> Ranges | None:
        if not service["needs"] & Needs.RANGES:
            return None
        first, count = int(service["first_range"]), int(service["ranges"])
        if count:
            (self._free_ranges6 if of_ipv6 else self._free_ranges).take_at(first, count)
        if of_ipv6:
            self._with_ranges6.add(number)
            rows = self._tables.ranges6[first : first + count].tolist()
            return tuple((_whole(*first_and_last[0]), _whole(*first_and_last[1])) for first_and_last in rows)
        return tuple((int(row["first"]), int(row["last"])) for row in self._tables.ranges[first : first + count])

    def apply(self, services: Iterable[ServiceRow], own: Collection[IPAddress] = ()) -> Change:
        """Make the tables say `services` and nothing else. An error, as TableFullError: nothing has changed.

        `own` are the node's addresses, from now on. They are no VIPs, whatever frontends they have: all else there is
        the kernel's.
        """
        with no_collections():
            wanted = _wanted(services)
            removed = [frontend for frontend in self._row_of if frontend not in wanted]
            return self._change(wanted, removed, frozenset(number_of(address) << 24 for address in own))

    def update(self, services: Iterable[ServiceRow], without: Iterable[FrontendKey] = ()) -> Change:
        """Make the tables say `services` where their frontends are concerned, and leave all others as they are.

        The frontends `without` go, those of `services` excepted. An error, as TableFullError: nothing has changed.
        """
        wanted = _wanted(services)
        removed = {*map(_packed_frontend, without)} - wanted.keys()
        return self._change(wanted, [frontend for frontend in removed if frontend in self._row_of], self._own)

    def _change(self, wanted: _Wanted, removed: list[int], own: frozenset[int]) -> Change:
        staged = _Staged()
        try:
            rows = self._stage(wanted, own, staged)
        except BaseException:  # no room, or the network was asked for a way in vain
            self._unstage(staged)
            raise
        change = self._publish(rows, removed, staged)
        self._let_seed_choose(staged.stale)
        for vip in own - self._own:
            if vip in self._place:  # it was not the node's own until now
                self._withdraw(vip)
        self._own = own
        return change

    def _stage(self, wanted: _Wanted, own: frozenset[int], staged: _Staged) -> dict[int, int]:
        """Write aside the rows that are needed, and find a place for every new frontend. Return what has to change."""
        rows: dict[int, int] = {}
        row_of_service: dict[int, int] = {}  # by identity: the frontends of one share a row
        for frontend, (content, service) in wanted.items():
            row = known = self._row_of.get(frontend, -1)
            if self._content.get(row) != content:
                row = row_of_service.get(id(service), -1)
                if row < 0:
                    row = self._take_row(content, service, staged)
            elif row in self._stale:
                staged.stale[row] = service
            row_of_service.setdefault(id(service), row)
            if row != known:
                rows[frontend] = row
        self._write_endpoints(staged)
        self._write_rows(staged)
        self._take_places(wanted, own, staged)
        return rows

    def _take_row(self, content: _Content, service: ServiceRow, staged: _Staged) -> int:
        """Take a row with all that it needs; what is to be written is noted in `staged`."""
        new = _NewRow(self._free_rows.take(1), content)
        staged.rows.append(new)
        users = self._endpoint_users
        for endpoint in content.endpoints:
            users[endpoint] = users.get(endpoint, 0) + 1
            staged.endpoints.append(endpoint)
            if endpoint not in self._endpoint_row:
                self._endpoint_row[endpoint] = self._free_endpoints.take(1)
                staged.new_endpoints.append(endpoint)
        staged.local.update(content.local)
        new.weights = _weights_of(content, service)
        slots = maglev.table_size(len(content.endpoints))
        if slots:
            new.first_slot, new.slots = self._free_slots.take(slots + content.members), slots
        if content.ranges:
            free = self._free_ranges
            if is_ipv6(content.ranges[0][0]):
                self._with_ranges6.add(new.number)
                free = self._free_ranges6
            new.first_range, new.ranges = free.take(len(content.ranges)), len(content.ranges)
        if content.inside is not None and service.inside is not None:
            new.inside = self._take_row(content.inside, service.inside, staged)
        return new.number

    def _write_endpoints(self, staged: _Staged) -> None:
        table = self._tables.endpoints
        if staged.new_endpoints:
            hosts = [endpoint >> 16 for endpoint in staged.new_endpoints]
            hop_of = {host: self._hop_of(address_of(host)) for host in dict.fromkeys(hosts)}
            rows = [self._endpoint_row[endpoint] for endpoint in staged.new_endpoints]
            numbers = [self._pinned(host, staged) for host in hosts]
            self._endpoint_names |= {r: n for r, n, host in zip(rows, numbers, hosts, strict=True) if is_ipv6(host)}
            table["addr"][rows] = np.array(numbers, np.uint32).byteswap()
            table["port"][rows] = np.array([each & 0xFFFF for each in staged.new_endpoints], np.uint16).byteswap()
            table["next_hop"][rows] = [hop_of[host] for host in hosts]
            table["load"][rows] = 0
        # A pod stays where it is: all Service ports agree. Only --node-name makes others local.
        rows = [self._endpoint_row[endpoint] for endpoint in staged.endpoints]
        table["is_local"][rows] = [endpoint in staged.local for endpoint in staged.endpoints]

    def _write_rows(self, staged: _Staged) -> None:
        if not staged.rows:
            return
        contents = [new.content for new in staged.rows]
        rows = np.zeros(len(staged.rows), self._tables.services.dtype)
        for name in ("first_slot", "slots", "first_range", "ranges", "inside"):
            rows[name] = [getattr(new, name) for new in staged.rows]
        for name in _WRITTEN_AS_THEY_ARE:
            rows[name] = [getattr(content, name) for content in contents]
        self._tables.services[[new.number for new in staged.rows]] = rows
        ends = np.cumsum([len(content.endpoints) for content in contents])
        names = maglev.names_of_packed(staged.endpoints)
        numbers = np.array([self._endpoint_row[endpoint] for endpoint in staged.endpoints], np.uint32)
        weights = np.ones(len(numbers), np.uint32)
        for new, end in zip(staged.rows, ends.tolist(), strict=True):
            of_row = slice(end - len(new.content.endpoints), end)
            if new.weights:
                weights[of_row] = new.weights
            if new.content.members:
                behind = new.first_slot + new.slots
                self._slots[behind : behind + new.content.members] = np.sort(numbers[of_row])
            if new.number in self._with_ranges6:
                rows6 = [(halves(first), halves(last)) for first, last in new.content.ranges or ()]
                self._tables.ranges6[new.first_range : new.first_range + new.ranges] = rows6
            elif new.content.ranges:
                self._tables.ranges[new.first_range : new.first_range + new.ranges] = list(new.content.ranges)
        slots = np.stack([rows["first_slot"], rows["slots"]], axis=1).astype(np.int64)
        scratch = maglev.scratch_for(max(len(content.endpoints) for content in contents))
        maglev.fill_all(self._slots, slots, names, numbers, weights, ends, self._seed, scratch)

    def _let_seed_choose(self, stale: dict[int, ServiceRow]) -> None:
        """Have packets choose by this seed, over slots as it has them: those of these rows are written over.

        Until all are, there is no seed (0): what a start that is cut short leaves undone, the next one does.
        """
        words = self._tables.control[0]
        if words["maglev_seed"] == self._seed:
            return
        words["maglev_seed"] = 0
        for row, service in stale.items():
            self._fill_anew(row, service)
        self._stale.clear()
        words["maglev_seed"] = self._seed

    def _fill_anew(self, number: int, service: ServiceRow) -> None:
        content, row = self._content[number], self._tables.services[number]
        if content.endpoints:
            fresh = np.empty(int(row["slots"]), np.uint32)
            numbers = np.array([self._endpoint_row[endpoint] for endpoint in content.endpoints], np.uint32)
            weights = np.array(_weights_of(content, service) or [1] * len(numbers), np.uint32)
            names = maglev.names_of_packed(content.endpoints)
            maglev.fill(fresh, names, numbers, weights, self._seed, maglev.scratch_for(len(numbers)))
            compiled.overwrite(self._slots, int(row["first_slot"]), fresh)
        if service.inside is not None:
            self._fill_anew(int(row["inside"]), service.inside)

    def _take_places(self, wanted: _Wanted, own: frozenset[int], staged: _Staged) -> None:
        """Find a place for every frontend that has none, and for its VIP."""
        staged.frontends = [frontend for frontend in wanted if frontend not in self._place]
        vips = dict.fromkeys([frontend & ~_PORT_AND_PROTOCOL for frontend in wanted])
        staged.frontends += [vip for vip in vips if vip not in self._place and vip not in own]
        if not staged.frontends:
            return
        staged.keys = _keys([self._packed_by_name(frontend, staged) for frontend in staged.frontends])
        places = np.zeros(len(staged.keys), np.int64)
        found = compiled.reserve_places(self._tables.control[0]["hash_key"], self._is_taken, staged.keys, places)
        staged.places = places[:found]
        if found < len(places):
            where = with_port(staged.frontends[found] >> 24, staged.frontends[found] >> 8 & 0xFFFF)
            room = len(self._is_taken) // 2  # half full at most, or a place is not certain
            raise TableFullError(f"no room for frontend {where}: this version has room for {room:,}; use fewer")

    def _packed_by_name(self, frontend: int, staged: _Staged) -> int:
        """Return a frontend as packets know it: IPv6's by the number of its address's name, and with its family."""
        if not is_ipv6(frontend >> 24):
            return frontend
        protocol = frontend & 0xFF | Protocol.IPV6
        return self._pinned(frontend >> 24, staged) << 24 | frontend & 0xFFFF00 | protocol

    def _pinned(self, address: int, staged: _Staged) -> int:
        """Return what stands for an address in tables: of IPv6 the number of its name, pinned once more."""
        if not is_ipv6(address):
            return address
        number = self._names.pin(IPv6Address(address ^ IPV6))
        staged.pinned.append(number)
        return number

    def _unstage(self, staged: _Staged) -> None:
        for number in staged.pinned:
            self._names.release(number)
        for new in staged.rows:
            slots = new.slots and new.slots + new.content.members  # none of either, if there was no room for them
            self._give_row(new.number, new.first_slot, slots, new.first_range, new.ranges)
        self._is_taken[staged.places] = 0
        for endpoint in staged.endpoints:
            self._leave_endpoint(endpoint, staged.unused)
        for row in staged.unused.endpoints:
            self._endpoint_names.pop(row, None)
            self._free_endpoints.give(row, 1)

    def _publish(self, rows: dict[int, int], removed: list[int], staged: _Staged) -> Change:
        """Let packets see it: new frontends, changed ones, and no longer those that are gone."""
        frontends, keys = self._tables.frontends, self._tables.frontend_keys
        for new in staged.rows:
            self._keep(new.number, new.content)
        numbers = np.array([rows.get(frontend, 0) for frontend in staged.frontends], np.uint32)
        compiled.publish(frontends, keys, staged.keys, staged.places, numbers)
        self._place.update(zip(staged.frontends, staged.places.tolist(), strict=True))
        added, left = 0, []
        for frontend, row in rows.items():
            known = self._row_of.get(frontend)
            if known is None:
                added += 1
            else:
                frontends[self._place[frontend]]["service"] = row
                left.append(known)
            self._hold(frontend, row)
        for frontend in removed:
            left.append(self._row_of.pop(frontend))
            self._withdraw(frontend)
            vip = frontend & ~_PORT_AND_PROTOCOL
            self._frontends_at[vip].remove(frontend)
            if not self._frontends_at[vip]:
                del self._frontends_at[vip]
                if vip in self._place:
                    self._withdraw(vip)
        self._let_lead({frontend & ~_PORT_AND_PROTOCOL for frontend in (*rows, *staged.frontends, *removed)})
        self._part(left)
        return Change(len(staged.rows), added, len(removed))

    def _let_lead(self, vips: Iterable[int]) -> None:
        """Let echo requests to VIPs go where connections to their lowest ports go."""
        for vip in vips:
            if vip in self._place:
                row = self._row_of[min(self._frontends_at[vip])]
                self._tables.frontends[self._place[vip]]["service"] = row

    def _hold(self, frontend: int, row: int) -> None:
        """Note that a frontend holds a row, be it new or changed."""
        self._frontends_at.setdefault(frontend & ~_PORT_AND_PROTOCOL, set()).add(frontend)
        self._row_of[frontend] = row
        self._row_users[row] = self._row_users.get(row, 0) + 1

    def _withdraw(self, frontend: int) -> None:
        """Take a frontend or a VIP away."""
        if is_ipv6(frontend >> 24):
            self._names.release(self._names.find(IPv6Address(frontend >> 24 ^ IPV6)))
        place = self._place.pop(frontend)
        self._tables.frontend_keys[place] = 0
        self._is_taken[place] = 0

    def _part(self, rows: list[int]) -> None:
        """Part with rows that no frontend holds any more; `rows` were left by one each."""
        for row in rows:
            self._row_users[row] -= 1
            if not self._row_users[row]:
                del self._row_users[row]
                self._part_with(row)

    def _part_with(self, row: int) -> None:
        """Part with a row, its endpoints, and the row for clients inside the cluster."""
        self._parted.rows.append(row)
        self._least.discard(row)
        for endpoint in self._content.pop(row).endpoints:
            self._leave_endpoint(endpoint, self._parted)
        inside = int(self._tables.services[row]["inside"])
        if inside:
            self._part_with(inside)

    def _leave_endpoint(self, endpoint: int, parted: Parted) -> None:
        """Note that one row less has an endpoint; if it was the last, add the endpoint's own row to `parted`."""
        self._endpoint_users[endpoint] -= 1
        if self._endpoint_users[endpoint]:
            return
        del self._endpoint_users[endpoint]
        if endpoint in self._endpoint_row:
            parted.endpoints.append(self._endpoint_row.pop(endpoint))

    def take_parted(self) -> Parted:
        """Return what `apply` has parted with since the last call: to be given to `release` after a grace period."""
        parted, self._parted = self._parted, Parted([], [])
        return parted

    def put_back(self, parted: Parted) -> None:
        """Part with what was taken once more: it was not released."""
        self._parted = Parted(parted.rows + self._parted.rows, parted.endpoints + self._parted.endpoints)

    def vips(self) -> frozenset[int]:
        """Return all addresses that are VIPs, as numbers: those of frontends, and not the node's own."""
        return frozenset([vip >> 24 for vip in self._frontends_at if vip in self._place])

    def is_vip(self, address: int) -> bool:
        """Tell whether an address, as a number, is a VIP."""
        return address << 24 in self._place

    def next_hops(self) -> npt.NDArray[np.uint32]:
        """Return the rows of the next hops that endpoints have, ascending and each once."""
        rows = np.fromiter(self._endpoint_row.values(), np.int64, len(self._endpoint_row))
        found: npt.NDArray[np.uint32] = np.unique(self._tables.endpoints["next_hop"][rows])
        return found

    def loaded(self) -> tuple[list[int], npt.NDArray[np.void]]:
        """Return the rows of the endpoints that least connections chooses among, ascending, and what they say now."""
        content = self._content
        rows = sorted({self._endpoint_row[endpoint] for row in self._least for endpoint in content[row].endpoints})
        return rows, self._tables.endpoints[rows]

    def correct_loads(
        self, rows: Collection[int], before: npt.NDArray[np.void], counts: npt.NDArray[np.uint32]
    ) -> None:
        """Make loads what was counted, and what has begun since `before`: what `loaded` gave when counting began.

        A row that has become another endpoint's meanwhile has its load from then on.
        """
        numbers = np.array(list(rows), np.int64)
        now = self._tables.endpoints[numbers]
        same = (now["addr"] == before["addr"]) & (now["port"] == before["port"])
        compiled.add_loads(self._tables.loads, numbers[same], (counts - before["load"])[same])

    def forget(self, now: int, endpoints: Collection[int] = ()) -> int:
        """Forget which clients had the endpoints in these rows, and what no affinity lasts for; return how many went.

        `now` in jiffies. Before rows of endpoints are released, and now and then.
        """
        oldest = _LONGEST_AFFINITY_S * int(self._tables.control[0]["hertz"])
        gone = np.sort(np.array(list(endpoints), np.int64))
        return int(affinity.forget(self._tables, np.uint32(now), np.int64(oldest), gone))

    def release(self, parted: Parted) -> None:
        """Make reusable what was parted with. The caller has seen a grace period since it took it."""
        for number in parted.rows:
            service = self._tables.services[number]
            slots = int(service["slots"]) + int(service["members"])
            self._give_row(
                number, int(service["first_slot"]), slots, int(service["first_range"]), int(service["ranges"])
            )
        for row in parted.endpoints:
            if row in self._endpoint_names:
                self._names.release(self._endpoint_names.pop(row))
            self._free_endpoints.give(row, 1)

    def _give_row(self, number: int, first_slot: int, slots: int, first_range: int, ranges: int) -> None:
        """Make a row of `services` reusable, with its slots (and the members behind them) and source ranges."""
        self._free_rows.give(number, 1)
        if slots:
            self._free_slots.give(first_slot, slots)
        if ranges:
            (self._free_ranges6 if number in self._with_ranges6 else self._free_ranges).give(first_range, ranges)
        self._with_ranges6.discard(number)


# The fields of a row of `services` that are those of its content.
_WRITTEN_AS_THEY_ARE = (
    "when_stalled", "admits_here", "is_elsewhere", "needs", "masquerade", "affinity_s", "identity", "members",
    "weights", "scheduler", "mid_stream", "timeouts",
)  # fmt: skip

_Wanted = dict[int, tuple[_Content, ServiceRow]]  # by frontend


def _wanted(services: Iterable[ServiceRow]) -> _Wanted:
    wanted: _Wanted = {}
    for service in services:
        content = _content_of(service)
        for frontend in service.frontends:
            wanted[_packed_frontend(frontend)] = (content, service)
    return wanted


@dataclass(slots=True)
class _NewRow:
    """A row of `services` that a change has taken, and what it has taken for it."""

    number: int
    content: _Content
    weights: list[int] = field(default_factory=list)  # of its endpoints; empty: they are equal
    first_slot: int = 0  # the slots, and behind them the members
    slots: int = 0
    first_range: int = 0
    ranges: int = 0
    inside: int = 0


@dataclass(slots=True)
class _Staged:
    """What a change has taken before anything is visible."""

    rows: list[_NewRow] = field(default_factory=list)
    endpoints: list[int] = field(default_factory=list)  # of all rows, one after the other
    new_endpoints: list[int] = field(default_factory=list)
    stale: dict[int, ServiceRow] = field(default_factory=dict)  # rows that stay, with slots as another seed has them
    local: set[int] = field(default_factory=set)  # endpoints on this node
    frontends: list[int] = field(default_factory=list)  # new ones, then new VIPs
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    places: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    pinned: list[int] = field(default_factory=list)  # numbers of names
    unused: Parted = field(default_factory=lambda: Parted([], []))
