"""Jobs go on side by side, whatever becomes of one of them."""

from __future__ import annotations

import asyncio

from dataplane import jobs
from dataplane.jobs import Jobs


def test_a_job_that_fails_is_told_of_and_begun_again_while_others_go_on(monkeypatch):
    monkeypatch.setattr(jobs, "_BEGIN_AGAIN_S", 0.0)
    made = Jobs()
    begun: list[str] = []

    async def run() -> None:
        again = asyncio.Event()

        async def failing() -> None:
            begun.append("failing")
            if begun.count("failing") == 1:
                raise OSError("no such luck")
            again.set()
            await asyncio.Event().wait()

        async def lasting() -> None:
            begun.append("lasting")
            await asyncio.Event().wait()

        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            tasks = made.start(group, {"failing": failing, "lasting": lasting})
            await again.wait()
            for task in tasks:
                task.cancel()

    asyncio.run(run())
    assert sorted(begun) == ["failing", "failing", "lasting"]
    assert {name: text for name, (_, text) in made.troubles.items()} == {"failing": "OSError: no such luck"}
