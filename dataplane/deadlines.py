"""Drains that have a deadline: at it they become maintenance, whoever holds on to a connection."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from dataplane.administered import next_deadline_s, overdue
from dataplane.in_force import InForce
from dataplane.strays import Strays
from dataplane.ticks import tick
from lb.model import AdminState, Said
from xdp.addresses import with_port

log = logging.getLogger(__name__)


class Deadlines:
    """Holds operators to the deadlines that they have given, by the clock that these are kept in."""

    def __init__(self, in_force: InForce, strays: Strays, clock_s: Callable[[], float]) -> None:
        self._in_force = in_force
        self._strays = strays
        self._clock_s = clock_s
        self.changed = asyncio.Event()  # what operators have said
        self.ended = 0  # connections

    async def run(self) -> None:
        """End the drains whose deadline passes, for ever."""
        while True:
            self.changed.clear()
            await self.end_overdue()
            left_s = self.left_s(self.next_s())
            wait_s = math.inf if left_s is None else left_s
            await tick(self.changed, asyncio.get_running_loop().time() + wait_s)

    async def end_overdue(self) -> None:
        """End what is left of the drains whose deadline has passed: their endpoints are in maintenance from now on."""
        over = overdue(self._in_force.here.administered, self._clock_s())
        if not over:
            return
        ended = await asyncio.to_thread(self._strays.end_out, over)
        self.ended += ended
        where = ", ".join(with_port(*place) for place in over)
        log.warning("%s: the deadline of the drain has passed, %d connections ended", where, ended)
        now = self._in_force.here.administered  # something else may have been said meanwhile
        self._in_force.administer({place: Said(AdminState.MAINT) for place in over if now.get(place) == over[place]})

    def next_s(self) -> float | None:
        """Return when the next drain is over, None if none has a deadline."""
        return next_deadline_s(self._in_force.here.administered)

    def left_s(self, deadline_s: float | None) -> float | None:
        """Return the seconds until a deadline, if there is one."""
        return None if deadline_s is None else max(0.0, deadline_s - self._clock_s())
