"""The flow table as the control plane sees it: made or taken over, swept, counted, listed."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conntrack import compiled, grace, passes, states
from xdp import naming
from xdp.byteorder import swap16, swap32
from xdp.clock import Clock
from xdp.errors import TableFullError
from xdp.schema import Direction, Limit, Protocol, State
from xdp.tables import Tables

Place = tuple[int, int]  # address and port
Timeouts = tuple[tuple[str, int], ...]  # names of states.NAMED, and seconds

_PASS_S, _LONGEST_PASS_S = 8.0, 60.0  # the shortest timeout is 10 s
_SHARE = 0.01  # of a CPU, for the sweep
_TURN_S = 0.001  # how long a turn lasts at most, unless something else has the CPU
_MOST_CLAIMED = 4096  # claims that a dead daemon can leave: one or two per worker


@dataclass(frozen=True)
class Connection:
    """One connection as it was at one moment. Addresses and ports are host numbers; times in seconds."""

    protocol: int
    client: tuple[int, int]
    frontend: tuple[int, int]
    source: tuple[int, int]  # as the endpoint sees it: the client, unless it is masqueraded
    endpoint: tuple[int, int]
    state: State
    packets: tuple[int, int]  # original, reply
    bytes: tuple[int, int]
    idle_s: float
    expires_s: float


class FlowTable:
    """The flow records, with the clock that they are timed by.

    `wait_for_readers` returns when every XDP run that was in flight has ended (membarrier; nothing in plain memory).
    """

    def __init__(self, tables: Tables, clock: Clock, wait_for_readers: Callable[[], None] = lambda: None) -> None:
        self._tables = tables
        self._clock = clock
        self._wait_for_readers = wait_for_readers
        self._withdrawn = np.zeros(len(tables.flows), np.int64)
        self._position = 0  # of the pass over all slots that is under way
        self._named = np.zeros(len(tables.names), np.uint8)  # by it
        self._has_dying = naming.count(tables) > 0  # a predecessor may have left such names
        # Threads of the control plane have no turns: while one looks at records, no slot is emptied for reuse.
        self._looking = threading.Lock()

    def create(self) -> None:
        """Prepare new tables: draw the secret of the hash."""
        self._tables.control[0]["hash_key"] = [secrets.randbits(64), secrets.randbits(64)]
        self.prepare()

    def prepare(self) -> None:
        """Write what every start writes: the state machine and the scale of time."""
        words = self._tables.control[0]
        words["hertz"] = self._clock.hertz
        words["stall_jiffies"] = -(-Limit.STALL_MS * self._clock.hertz // 1000)
        words["aged_from"] = self._clock.now()  # flows do not age for the time in which nobody looked
        states.write_machine(self._tables.machine, self._clock.hertz)

    @property
    def _timeouts(self) -> npt.NDArray[np.uint32]:
        return self._tables.machine[0]["timeout"].reshape(Limit.TIMEOUT_SETS, -1)  # type: ignore[no-any-return]

    def timeout_sets(self, wanted: Iterable[Timeouts], kept: Collection[int] = ()) -> dict[Timeouts, int]:
        """Return {timeouts: what connections that have them begin their state with}, known to packets from now on.

        Sets that nobody wants any more stay as they are while there is room, for connections that go on. Those of
        numbers in `kept` stay in any case. TableFullError: there is no room for so many different ones.
        """
        rows = self._timeouts
        jiffies = {each: states.timeouts_in_jiffies(each, self._clock.hertz) for each in wanted}
        number_of = {row.tobytes(): number for number, row in enumerate(rows) if row.any()}
        new = {row.tobytes(): row for row in jiffies.values() if row.tobytes() not in number_of}
        taken = {number_of.get(row.tobytes()) for row in jiffies.values()} | {number >> 4 for number in kept}
        free = sorted({*range(1, len(rows))} - taken, key=lambda number: bool(rows[number].any()))
        if len(free) < len(new):
            raise TableFullError(
                f"no room for {len(new)} more different turnout.dev/timeouts: there may be {len(rows) - 1}, old "
                "and new ones while they change; use fewer"
            )
        for (content, row), number in zip(new.items(), free, strict=False):
            rows[number] = row
            number_of[content] = number
        return {each: number_of[row.tobytes()] << 4 for each, row in jiffies.items()}

    def take_over(self) -> int:
        """Take the tables of a daemon that is gone; return how many slots it claimed and never published (given up).

        What XDP is filling at this moment is published when `wait_for_readers` returns, and stays.
        """
        self.prepare()
        slots, names = self._unfinished()
        if len(slots) or len(names):
            self._wait_for_readers()
            still, still_names = self._unfinished()
            slots, names = np.intersect1d(slots, still), np.intersect1d(names, still_names)
        naming.take_over(self._tables, names)
        compiled.abandon(self._tables.tags, slots, len(slots))
        return len(slots)

    def _unfinished(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the slots, and the rows of names, that somebody is filling just now."""
        slots, names = np.zeros(_MOST_CLAIMED, np.int64), np.zeros(_MOST_CLAIMED, np.int64)
        found = compiled.claimed_slots(self._tables.tags, slots), naming.unfinished(self._tables, names)
        return slots[: found[0]], names[: found[1]]

    def _originals(self) -> npt.NDArray[np.int64]:
        """Return the slots of all original directions."""
        tags, flows = self._tables.tags, self._tables.flows
        slots = np.zeros(int(passes.count_used(tags)), np.int64)
        return slots[: passes.used_slots(tags, flows, Direction.ORIGINAL, slots)]

    def used(self) -> int:
        """Return how many connections there are: two published records each."""
        return int(passes.count_used(self._tables.tags)) // 2

    def sweep(self, slots: int | None = None) -> int:
        """End what has expired among the next `slots` or some more (default: all), and free what was withdrawn.

        Return how many were freed. Blocks for a grace period if there is anything to free.
        """
        start = self._position
        if start == 0:
            self._begin_pass()
        stop = min(self.slots, start + _whole_buckets(slots or self.slots))
        now = self._clock.now()
        self._keep_start_in_sight(now)
        noted = compiled.sweep(self._tables, start, stop, np.uint32(now), self._withdrawn, self._named)
        self._position = stop % self.slots
        if self._position == 0:
            self._end_names()
        if noted:
            self.wait_for_grace()
            with self._looking:
                compiled.release(self._tables.tags, self._withdrawn, noted)
        return int(noted)

    @property
    def slots(self) -> int:
        """Return how many slots there are: what the sweep looks at until it begins again."""
        return len(self._tables.flows)

    def _begin_pass(self) -> None:
        self._named[:] = 0
        if self._has_dying:
            self.wait_for_grace()  # who held such a name has put it into a record, or let go of it

    def _end_names(self) -> None:
        """Let go of names that no record used in the pass that ends."""
        if not naming.count(self._tables):
            return
        dying, withdrawn = naming.end_pass(self._tables, self._named)
        self._has_dying = bool(dying)
        if withdrawn:
            self.wait_for_grace()
            naming.release(self._tables)

    def _keep_start_in_sight(self, now: int) -> None:
        """Move `aged_from` along once it lies behind every deadline: differences of jiffies are signed 32-bit numbers.

        Left where it was it would lie ahead of `now` after 2^31 jiffies (25 to 248 days), and nothing would expire.
        """
        words = self._tables.control[0]
        most = int(self._tables.machine[0]["timeout"].view(np.int32).max()) + 1
        if (now - int(words["aged_from"])) & 0xFFFFFFFF > most:
            words["aged_from"] = (now - most) & 0xFFFFFFFF

    def wait_for_grace(self) -> None:
        """Return when nobody can be looking at a record or a row any more that was taken away before the call."""
        turns = np.zeros(Limit.MAX_WORKERS, np.uint64)
        grace.readers(self._tables, turns)
        self._wait_for_readers()
        while not grace.have_turned(self._tables, turns):
            time.sleep(_TURN_S)

    def keep_only(self, protocol: int, pairs: Iterable[tuple[Place, Place]]) -> int:
        """End the connections of a protocol but those of these (frontend, endpoint); return how many. Host numbers.

        One pass over the table, however many pairs there are.
        """
        with self._looking:
            slots = self._originals()
            return int(passes.withdraw_strays(self._tables, slots, np.uint8(protocol), *_ascending(pairs)))

    def reset_others(self, protocol: int, frontends: Iterable[Place], pairs: Iterable[tuple[Place, Place]]) -> int:
        """End the connections of these frontends but those of these pairs, TCP by having it reset; return how many.

        As `keep_only`, for the price of these frontends and pairs.
        """
        wanted = np.array(sorted(map(_key_of, frontends)), np.uint64)
        if not len(wanted):
            return 0
        kept = _ascending(pairs)

        def end() -> int:
            return int(passes.reset_strays(self._tables, self._originals(), np.uint8(protocol), wanted, *kept))

        if protocol & ~Protocol.IPV6 == Protocol.TCP:
            return self._twice(end)
        with self._looking:
            return end()

    def end_at(self, protocol: int, endpoints: Iterable[Place]) -> int:
        """End a protocol's connections to these endpoints, TCP by having it reset; return how many. Host numbers."""
        places = np.array(sorted(map(_key_of, endpoints)), np.uint64)
        if not len(places):
            return 0
        return self._twice(lambda: passes.end_at(self._tables, self._originals(), np.uint8(protocol), places))

    def _twice(self, end: Callable[[], int]) -> int:
        """End connections, and again after a grace period: a packet on its way may have stored its state over ours."""
        with self._looking:
            count = int(end())
        self.wait_for_grace()
        with self._looking:
            return max(count, int(end()))

    def count_open(self, endpoints: npt.NDArray[np.void]) -> npt.NDArray[np.uint32]:
        """Return how many connections to each of these rows of endpoints are open: neither closing nor to be reset."""
        keys = endpoints["addr"].astype(np.uint64) | endpoints["port"].astype(np.uint64) << np.uint64(32)
        order = np.argsort(keys)
        counts = np.zeros(len(keys), np.uint32)
        with self._looking:
            passes.count_open(self._tables, self._originals(), keys[order], counts)
        found = np.empty_like(counts)
        found[order] = counts
        return found

    def next_hops_in_use(self) -> npt.NDArray[np.uint8]:
        """Return by row of next_hops whether a flow or an endpoint has it."""
        used = np.zeros(len(self._tables.next_hops), np.uint8)
        used[self._tables.endpoints["next_hop"]] = 1
        with self._looking:
            passes.mark_next_hops(self._tables.tags, self._tables.flows, used)
        return used

    def undisturbed(self, change: Callable[[], int]) -> int:
        """Return what `change` returns, which looks at records: no slot is emptied for reuse meanwhile."""
        with self._looking:
            return change()

    def records(self) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
        """Return copies of the records of both directions of every connection, as they were at about one moment."""
        tables = self._tables
        with self._looking:
            originals = tables.flows[self._originals()]
            return originals, tables.flows[originals["peer"]]

    def connections(
        self, originals: npt.NDArray[np.void] | None = None, replies: npt.NDArray[np.void] | None = None
    ) -> Iterator[Connection]:
        """Yield the connections of these `records`, of all without them."""
        if originals is None or replies is None:
            originals, replies = self.records()
        now = self._clock.now()
        for original, reply in zip(originals, replies, strict=True):
            yield self._connection(original, reply, now)

    def _connection(self, original: npt.NDArray[np.void], reply: npt.NDArray[np.void], now: int) -> Connection:
        idle = min(_elapsed(now, int(original["last_seen"])), _elapsed(now, int(reply["last_seen"])))
        aged = min(idle, _elapsed(now, int(self._tables.control[0]["aged_from"])))
        state, hertz = State(int(original["state"]) & Limit.STATE_BITS), self._clock.hertz
        kept_in = State.ESTABLISHED if state is State.RESET else state
        timeout = int(self._timeouts[int(original["state"]) >> 4, kept_in])
        return Connection(
            protocol=int(original["protocol"]),
            client=(swap32(original["src_addr"]), swap16(original["src_port"])),
            frontend=(swap32(original["dst_addr"]), swap16(original["dst_port"])),
            source=(swap32(original["new_src_addr"]), swap16(original["new_src_port"])),
            endpoint=(swap32(original["new_dst_addr"]), swap16(original["new_dst_port"])),
            state=state,
            packets=(int(original["packets"]), int(reply["packets"])),
            bytes=(int(original["bytes"]), int(reply["bytes"])),
            idle_s=idle / hertz,
            expires_s=max(0, timeout - aged) / hertz,
        )


def _whole_buckets(slots: int) -> int:
    return -(-slots // Limit.BUCKET_TAGS) * Limit.BUCKET_TAGS


def seconds_of_a_slice(cpu_s: float, slices: int) -> float:
    """Return after how long the sweep is to go on, where each of so many slices takes so many seconds of CPU.

    What is past its deadline is no connection any more, freed or not: large tables may wait. It is a multiple of half a
    second: a daemon that has nothing else to do wakes up for other things then.
    """
    pass_s = min(max(_PASS_S, cpu_s * slices / _SHARE), _LONGEST_PASS_S)
    return max(0.5, round(2 * pass_s / slices) / 2)


def _ascending(pairs: Iterable[tuple[Place, Place]]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return pairs of places as compiled code searches them."""
    keys = sorted((_key_of(frontend), _key_of(endpoint)) for frontend, endpoint in pairs)
    frontends, endpoints = np.array(keys, np.uint64).reshape(-1, 2).T.copy()
    return frontends, endpoints


def _key_of(place: Place) -> int:
    return swap32(place[0]) | swap16(place[1]) << 32


def _elapsed(now: int, then: int) -> int:
    """Return the jiffies from `then` to `now`, lower 32 bits each; 0 if `then` is a little ahead."""
    difference = (now - then) & 0xFFFFFFFF
    return 0 if difference >> 31 else difference
