"""A control socket with answers from a test, in an event loop of a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from dataplane.control import Answer, Server
from dataplane.settings import Settings


@contextlib.contextmanager
def answering(settings: Settings, answer: Answer) -> Iterator[None]:
    """Answer on the node's control socket while the context lasts. What fails at start is raised here."""
    is_ready, failures = threading.Event(), []
    ends: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        ends.append((asyncio.get_running_loop(), asyncio.Event()))
        async with Server(settings, answer):
            is_ready.set()
            await ends[0][1].wait()

    def body() -> None:
        try:
            asyncio.run(serve())
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the test
            failures.append(error)
        is_ready.set()

    thread = threading.Thread(target=body)
    thread.start()
    is_ready.wait()
    try:
        if not failures:
            yield
    finally:
        if not failures:
            loop, end = ends[0]
            loop.call_soon_threadsafe(end.set)
        thread.join()
    if failures:
        raise failures[0]
