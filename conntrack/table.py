"""The flow table as the control plane sees it: made or taken over, swept, counted, listed."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conntrack import compiled, states
from xdp.byteorder import swap16, swap32
from xdp.clock import Clock
from xdp.schema import Direction, Limit, State
from xdp.tables import Tables

_MOST_CLAIMED = 4096  # claims that a dead daemon can leave: one or two per worker


@dataclass(frozen=True)
class Connection:
    """One connection as it was at one moment. Addresses and ports are host numbers; times in seconds."""

    protocol: int
    client: tuple[int, int]
    frontend: tuple[int, int]
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
        self._position = 0
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

    def take_over(self) -> int:
        """Take the tables of a daemon that is gone; return how many slots it claimed and never published (given up).

        What XDP is filling at this moment is published when `wait_for_readers` returns, and stays.
        """
        self.prepare()
        before, after = np.zeros(_MOST_CLAIMED, np.int64), np.zeros(_MOST_CLAIMED, np.int64)
        before_count = compiled.claimed_slots(self._tables.tags, before)
        if not before_count:
            return 0
        self._wait_for_readers()
        after_count = compiled.claimed_slots(self._tables.tags, after)
        left = np.intersect1d(before[:before_count], after[:after_count])
        compiled.abandon(self._tables.tags, left, len(left))
        return len(left)

    def used(self) -> int:
        """Return how many connections there are: two published records each."""
        return int(compiled.count_used(self._tables.tags)) // 2

    def sweep(self, slots: int | None = None) -> int:
        """End what has expired among the next `slots` (default: all), and free what was withdrawn; return how many.

        Blocks for a grace period if there is anything to free.
        """
        total = len(self._tables.flows)
        start = self._position
        stop = min(total, start + (slots or total))
        self._position = stop % total
        now = self._clock.now()
        self._keep_start_in_sight(now)
        _, noted = compiled.sweep(self._tables, start, stop, np.uint32(now), self._withdrawn)
        if noted:
            self.wait_for_grace()
            with self._looking:
                compiled.release(self._tables.tags, self._withdrawn, noted)
        return int(noted)

    def _keep_start_in_sight(self, now: int) -> None:
        """Move `aged_from` along once it lies behind every deadline: differences of jiffies are signed 32-bit numbers.

        Left where it was it would lie ahead of `now` after 2^31 jiffies (25 to 248 days), and nothing would expire.
        """
        words = self._tables.control[0]
        most = int(self._tables.machine[0]["timeout"].max()) + 1
        if (now - int(words["aged_from"])) & 0xFFFFFFFF > most:
            words["aged_from"] = (now - most) & 0xFFFFFFFF

    def wait_for_grace(self) -> None:
        """Return when nobody can be looking at a record or a row any more that was taken away before the call."""
        workers = self._tables.workers
        turns = workers["turn"].copy()
        self._wait_for_readers()
        # An idle worker turns every IDLE_WAKE_MS; one whose heartbeat is gone holds nothing.
        while np.any((workers["turn"] == turns) & (workers["heartbeat"] != 0)):
            time.sleep(Limit.IDLE_WAKE_MS / 4000)

    def end_towards(self, endpoints: Collection[tuple[int, int, int]]) -> int:
        """End the connections to `endpoints`, given as (address, port, protocol) in host numbers; return how many.

        One pass over the table, however many endpoints there are.
        """
        if not endpoints:
            return 0
        keys = [swap32(addr) | swap16(port) << 32 | protocol << 48 for addr, port, protocol in endpoints]
        with self._looking:
            return int(compiled.withdraw_towards(self._tables, np.sort(np.array(keys, np.uint64))))

    def records(self) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
        """Return copies of the records of both directions of every connection, as they were at about one moment."""
        tables = self._tables
        with self._looking:
            slots = np.zeros(len(tables.flows), np.int64)
            count = compiled.used_slots(tables.tags, tables.flows, Direction.ORIGINAL, slots)
            originals = tables.flows[slots[:count]]
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
        timeout = int(self._tables.machine[0]["timeout"][original["state"] & 15])
        hertz = self._clock.hertz
        return Connection(
            protocol=int(original["protocol"]),
            client=(swap32(original["src_addr"]), swap16(original["src_port"])),
            frontend=(swap32(original["dst_addr"]), swap16(original["dst_port"])),
            endpoint=(swap32(original["new_dst_addr"]), swap16(original["new_dst_port"])),
            state=State(int(original["state"])),
            packets=(int(original["packets"]), int(reply["packets"])),
            bytes=(int(original["bytes"]), int(reply["bytes"])),
            idle_s=idle / hertz,
            expires_s=max(0, timeout - aged) / hertz,
        )


def _elapsed(now: int, then: int) -> int:
    """Return the jiffies from `then` to `now`, lower 32 bits each; 0 if `then` is a little ahead."""
    difference = (now - then) & 0xFFFFFFFF
    return 0 if difference >> 31 else difference
