"""What the log says of manifests that have been applied: the first change at once, those that follow soon in one line.

While changes keep coming, as in a large cluster, the lines become rarer: a second apart, then two, up to a minute.
"""

from __future__ import annotations

import asyncio
import logging

from dataplane.output import counted

_SHORTEST_REST_S = 1.0
_LONGEST_REST_S = 60.0

log = logging.getLogger(__name__)


class News:
    """Tells how many Services and endpoints there are, and how many more than it has told last."""

    def __init__(self, services: int, endpoints: int) -> None:
        self._told = self._now = services, endpoints
        self._changes = 0  # that are not told yet
        self._rest_s = _SHORTEST_REST_S
        self._is_resting = False

    def applied(self, services: int, endpoints: int) -> None:
        """Tell of a change, now or soon."""
        self._now = services, endpoints
        self._changes += 1
        if not self._is_resting:
            self._tell()

    def _tell(self) -> None:
        (services, endpoints), (services_before, endpoints_before) = self._now, self._told
        log.info(
            "manifests applied%s: %s%s, %s%s",
            f" {self._changes} times" if self._changes > 1 else "",
            counted(services, "Service"),
            _difference(services - services_before),
            counted(endpoints, "endpoint"),
            _difference(endpoints - endpoints_before),
        )
        self._told, self._changes = self._now, 0
        self._is_resting = True
        asyncio.get_running_loop().call_later(self._rest_s, self._rested)

    def _rested(self) -> None:
        self._is_resting = False
        if self._changes:
            self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)
            self._tell()
        else:
            self._rest_s = _SHORTEST_REST_S


def _difference(more: int) -> str:
    return f" ({abs(more)} {'more' if more > 0 else 'fewer'})" if more else ""
