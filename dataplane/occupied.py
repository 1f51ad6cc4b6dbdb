"""Ports that sockets of the node have: new masqueraded connections are kept from them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from conntrack.table import FlowTable
from dataplane.context import Masquerading, occupy
from dataplane.crew import Crew
from dataplane.sockets import Sockets
from dataplane.ticks import next_tick, tick

_LOOK_S, _SHARE = 1.0, 0.001  # of a CPU, at most: a millisecond where tables of sockets are small


class Occupied:
    """The ports, as of the last look."""

    def __init__(self, sockets: Sockets, masquerading: Masquerading, engine: Crew[Any], flows: FlowTable) -> None:
        self._sockets = sockets
        self._masquerading = masquerading
        self._engine = engine
        self._flows = flows
        self.ports: frozenset[int] = frozenset()

    def look(self) -> float:
        """Find out which ports sockets have; return the seconds of CPU that it took."""
        began = time.thread_time()
        now = self._sockets.ports()
        took_s = time.thread_time() - began
        if now != self.ports:
            occupy(self._masquerading, now | self.ports)
            self._engine.spare(now, self._flows)
            occupy(self._masquerading, now)
            self.ports = now
        return took_s

    async def run(self) -> None:
        """Look again and again, in a thread."""
        cpu_s = 0.0
        while True:
            await tick(asyncio.Event(), next_tick(max(_LOOK_S, cpu_s / _SHARE)))
            cpu_s = await asyncio.to_thread(self.look)
