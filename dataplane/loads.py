"""How many connections endpoints have, for Services that ask for the one with the least."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import numpy.typing as npt

from conntrack.table import FlowTable
from lb.table import ServiceTable

_COUNT_S, _COUNT_ANYWAY_S = 1.0, 8.0
_SHARE = 0.01  # of a CPU, at most; what was compiled the first time counts, too


class Loads:
    """Keeps the loads that admission goes by: it adds to them, and nobody takes anything off.

    What begins while they are counted is counted, and may be counted twice until the next time.
    """

    def __init__(self, services: ServiceTable, flows: FlowTable) -> None:
        self._services = services
        self._flows = flows
        self.changed = asyncio.Event()  # which Services ask for them

    async def run(self) -> None:
        """Count now and then, as long as any Service asks for it."""
        while True:
            self.changed.clear()
            rows, endpoints = self._services.loaded()
            if not rows:
                await self.changed.wait()
                continue
            counts, cpu_s = await asyncio.to_thread(self._count_open, endpoints)
            self._services.correct_loads(rows, endpoints, counts)
            await asyncio.sleep(min(max(_COUNT_S, cpu_s / _SHARE), _COUNT_ANYWAY_S))

    def _count_open(self, endpoints: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.uint32], float]:
        """Return how many connections to these endpoints are open, and the seconds of CPU that it took to count."""
        began = time.thread_time()
        return self._flows.count_open(endpoints), time.thread_time() - began
