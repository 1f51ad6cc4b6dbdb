"""What a node does all the time, side by side: a job that fails is told of, and begun again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

_BEGIN_AGAIN_S = 1.0

log = logging.getLogger(__name__)

Job = Callable[[], Awaitable[None]]


class Jobs:
    """The jobs of a node by name, and what went wrong with them last."""

    def __init__(self) -> None:
        self.troubles: dict[str, tuple[float, str]] = {}  # by job: when it last failed, and how

    def note(self, name: str, trouble: object) -> None:
        """Log trouble in a job, and remember it for `status`."""
        text = f"{type(trouble).__name__}: {trouble}" if isinstance(trouble, BaseException) else str(trouble)
        log.error("%s: %s", name, text, exc_info=trouble if log.isEnabledFor(logging.DEBUG) else None)  # type: ignore[arg-type]
        self.troubles[name] = (time.monotonic(), text)

    def start(self, group: asyncio.TaskGroup, jobs: Mapping[str, Job]) -> list[asyncio.Task[None]]:
        """Begin jobs; return their tasks, which end when they are cancelled."""
        return [group.create_task(self._keep_up(name, job)) for name, job in jobs.items()]

    async def _keep_up(self, name: str, job: Job) -> None:
        """Run a job; if it fails, say so and begin it again: what it does not look after must not end the rest."""
        while True:
            try:
                await job()
            except Exception as error:  # noqa: BLE001 - whatever it is, known flows and the other jobs go on
                self.note(name, error)
            await asyncio.sleep(_BEGIN_AGAIN_S)
