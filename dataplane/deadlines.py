"""Drains that have a deadline: at it they become maintenance, whoever holds on to a connection."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from dataplane.administered import next_deadline_s, overdue
from dataplane.in_force import InForce
from dataplane.ticks import tick
from lb.model import AdminState, Said
from xdp.addresses import with_port

log = logging.getLogger(__name__)


class Deadlines:
    """Holds operators to the deadlines that they have given, by the clock that these are kept in."""

    def __init__(self, in_force: InForce, clock_s: Callable[[], float]) -> None:
        self._in_force = in_force
        self._clock_s = clock_s
        self.changed = asyncio.Event()  # what operators have said

    async def run(self) -> None:
        """End the drains whose deadline passes, for ever."""
        while True:
            self.changed.clear()
            self.end_overdue()
            left_s = self.left_s(self.next_s())
            wait_s = math.inf if left_s is None else left_s
            await tick(self.changed, asyncio.get_running_loop().time() + wait_s)

    def end_overdue(self) -> None:
        """Say that endpoints whose drain is over are in maintenance: what they have left ends as it does there."""
        over = overdue(self._in_force.here.administered, self._clock_s())
        if over:
            log.warning("%s: the deadline of the drain has passed", ", ".join(with_port(*place) for place in over))
            self._in_force.administer(dict.fromkeys(over, Said(AdminState.MAINT)))

    def next_s(self) -> float | None:
        """Return when the next drain is over, None if none has a deadline."""
        return next_deadline_s(self._in_force.here.administered)

    def left_s(self, deadline_s: float | None) -> float | None:
        """Return the seconds until a deadline, if there is one."""
        return None if deadline_s is None else max(0.0, deadline_s - self._clock_s())
