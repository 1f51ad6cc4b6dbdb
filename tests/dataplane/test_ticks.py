"""Periods that end together."""

from __future__ import annotations

import asyncio
import itertools

from dataplane.ticks import every, next_tick, tick


def test_periods_end_at_multiples_of_themselves():
    async def ends() -> tuple[float, list[float]]:
        now = asyncio.get_running_loop().time()
        return now, [next_tick(period) for period in (0.25, 1.0, 4.0)]

    now, found = asyncio.run(ends())
    for period, end in zip((0.25, 1.0, 4.0), found, strict=True):
        assert end % period == 0
        assert now < end <= now + period


def test_an_event_ends_a_wait():
    async def wait() -> float:
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        loop.call_soon(event.set)
        await tick(event, loop.time() + 60)
        return loop.time()

    assert asyncio.run(asyncio.wait_for(wait(), 5))


def test_a_job_is_done_every_period():
    async def count() -> list[float]:
        loop, ends = asyncio.get_running_loop(), []
        done = asyncio.Event()

        def job() -> None:
            ends.append(loop.time())
            if len(ends) == 3:
                done.set()

        task = asyncio.create_task(every(0.01, job))
        await asyncio.wait_for(done.wait(), 5)
        task.cancel()
        return ends

    ends = asyncio.run(count())
    assert all(later > sooner for sooner, later in itertools.pairwise(ends))
