"""Next hops and flows kept in step: flows follow their routes, and rows that no flow has any more are freed.

Rows are shared by routes (dataplane/hoprows.py), and a route may leave the others. Then flows towards its clients are
given the row that it leads to now: one store in a record, which XDP and workers read with every packet.

A row is freed after two looks at all flows. What the first look finds unused is parted with: nobody finds it any more.
After a grace period (docs/adr/0004) who had just found it has put it into a flow, or let go of it; so what the second
look does not find either is in no flow, and after another grace period in nobody's hands.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

import numpy as np

from conntrack.table import FlowTable
from dataplane.following import follow
from dataplane.hoprows import Row
from dataplane.nexthops import NextHops
from dataplane.ticks import next_tick, tick
from xdp.tables import Tables

_LOOK_S, _LOOK_SOON_S = 60.0, 5.0  # between two looks for unused rows; if some were refused since
_SHARE = 0.01  # of a CPU, at most: a look at a million connections takes about a tenth of a second
_LONGEST_S = 300.0
_AT_ONCE = 512  # rows: some 10 ms


def _some(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Yield as many at a time as may keep the event loop from other work."""
    for start in range(0, len(rows), _AT_ONCE):
        yield rows[start : start + _AT_ONCE]


class Reclaim:
    """Runs beside the event loop, which alone changes rows: only looks at flows are in threads."""

    def __init__(self, next_hops: NextHops, flows: FlowTable, tables: Tables) -> None:
        self._next_hops, self._flows, self._tables = next_hops, flows, tables
        self._refused = next_hops.rows_refused

    async def run(self) -> None:
        """Follow routes, and free rows, until cancelled."""
        next_look_s = time.monotonic() + _LOOK_SOON_S
        while True:
            cpu_s = 0.0
            if self._next_hops.routes_changed.is_set():
                self._next_hops.routes_changed.clear()
                try:
                    cpu_s += await asyncio.to_thread(self._follow)
                except BaseException:
                    self._next_hops.routes_changed.set()  # for who begins again
                    raise
            if time.monotonic() >= next_look_s:
                is_short = self._next_hops.rows_refused > self._refused
                self._refused = self._next_hops.rows_refused
                cpu_s += await self.free()
                wait_s = max(_LOOK_SOON_S if is_short else _LOOK_S, cpu_s / _SHARE)
                next_look_s = time.monotonic() + min(wait_s, _LONGEST_S)
            await asyncio.sleep(cpu_s / (10 * _SHARE))
            await tick(self._next_hops.routes_changed, next_tick(_LOOK_SOON_S))

    async def free(self) -> float:
        """Free the rows that nothing uses; return the seconds of CPU that it took, but for what it waited."""
        began = time.thread_time()
        used, cpu_s = await asyncio.to_thread(self._look)
        unused = self._next_hops.unused(used)
        for rows in _some(unused):
            self._next_hops.rows.part(rows)
            await asyncio.sleep(0)
        if unused:
            await asyncio.to_thread(self._flows.wait_for_grace)
            used, more_s = await asyncio.to_thread(self._look)
            await asyncio.to_thread(self._flows.wait_for_grace)
            cpu_s += more_s
            for rows in _some(self._next_hops.rows.parted()):
                self._next_hops.settle(rows, used)
                await asyncio.sleep(0)
        return cpu_s + time.thread_time() - began

    def _look(self) -> tuple[np.ndarray[tuple[int], np.dtype[np.uint8]], float]:
        began = time.thread_time()
        return self._flows.next_hops_in_use(), time.thread_time() - began

    def _follow(self) -> float:
        """Lead flows after their routes, once nobody begins one by the routes of before."""
        self._flows.wait_for_grace()
        began = time.thread_time()
        is_shared = self._next_hops.rows.shared()
        self._flows.undisturbed(lambda: int(follow(self._tables, self._next_hops.hops, is_shared)))
        return time.thread_time() - began
