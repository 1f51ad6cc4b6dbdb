"""What is done now and then, done together: an idle daemon wakes up once for all that is due.

Waking up costs most of a millisecond, whatever is then done. So periods begin at multiples of themselves on the event
loop's clock: two of one second end at the same moment, and one of four ends with a fourth of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


def next_tick(period_s: float) -> float:
    """Return when the period that runs now ends, by the event loop's clock."""
    now = asyncio.get_running_loop().time()
    return (now // period_s + 1) * period_s


async def every(period_s: float, job: Callable[[], None]) -> None:
    """Do `job` at the end of every period, for ever."""
    while True:
        await tick(asyncio.Event(), next_tick(period_s))
        job()


async def tick(event: asyncio.Event, until_s: float) -> None:
    """Sleep until `event` is set, or until `until_s` by the event loop's clock."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(until_s):
            await event.wait()
