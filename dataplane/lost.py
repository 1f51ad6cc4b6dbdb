"""Frames that are lost after XDP's verdict: which interfaces take none, and what `status` says of it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Collection, Mapping

from dataplane.netdev import Interface, NetDev
from xdp.errors import Error
from xdp.redirects import Lost, RedirectErrors

_NO_REDIRECTS = (errno.EOPNOTSUPP, errno.ENXIO)
_RECENT_S = 60.0
_OVERLOAD_S = 5.0  # a burst that a ring has no room for is shorter

log = logging.getLogger(__name__)


class Losses:
    """Watches what the kernel tells of redirects that failed. It may tell nothing: then `uncounted` says why."""

    def __init__(self) -> None:
        self.refusing: dict[int, str] = {}  # interfaces that take no redirected frames: {number: name}
        self.uncounted = ""
        self._errors: RedirectErrors | None = None
        self._seen: dict[Lost, int] = {}
        self._lost_at: dict[Lost, float] = {}  # when frames were lost last
        self._losing_since: dict[Lost, float] = {}  # since when some were at every look

    def open(self, source: Callable[[], RedirectErrors] = RedirectErrors) -> None:
        """Begin to count. `close` ends it."""
        try:
            self._errors = source()
        except Error as error:
            self.uncounted = str(error)

    def close(self) -> None:
        """Count no more."""
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def counts(self, ours: Collection[int]) -> dict[Lost, int]:
        """Return {(from, to, errno): frames} of redirects from interfaces of ours that failed.

        Those to no interface are punts: the sockets count them (PUNT_LOST).
        """
        counts = self._errors.counts() if self._errors else {}
        return {lost: frames for lost, frames in counts.items() if lost.from_ifindex in ours and lost.to_ifindex}

    def look(self, given: Mapping[str, Interface], netdev: NetDev, now: float) -> None:
        """See which of these interfaces take no redirected frames.

        Asked before, the kernel tells of most; of others, frames that were lost do.
        """
        failures = self._errors.counts() if self._errors else {}
        fresh = [lost for lost, frames in failures.items() if frames > self._seen.get(lost, 0)]
        self._seen = failures
        self._lost_at |= dict.fromkeys(fresh, now)
        self._losing_since = {lost: self._losing_since.get(lost, now) for lost in fresh}
        losing = {lost.to_ifindex for lost in fresh if lost.errno in _NO_REDIRECTS}
        refusing = {}
        for name, link in given.items():
            takes = netdev.takes_redirects(link.ifindex)
            if takes is False or link.ifindex in losing or (takes is None and link.ifindex in self.refusing):
                refusing[link.ifindex] = name
        for ifindex in refusing.keys() - self.refusing.keys():
            log.warning("%s: takes no redirected frames; the kernel routes what leaves there", refusing[ifindex])
        for ifindex in self.refusing.keys() - refusing.keys():
            log.info("%s: takes redirected frames again", self.refusing[ifindex])
            self._lost_at = {lost: at for lost, at in self._lost_at.items() if lost.to_ifindex != ifindex}
        self.refusing = refusing

    def complaints(self, ours: Collection[int], name_of: Callable[[int], str], now: float) -> list[str]:
        """Return what is to be said of frames that were lost lately; `name_of` an interface is told by its number."""
        found = []
        for lost, frames in self.counts(ours).items():
            name = name_of(lost.to_ifindex)
            if not lost.errno:  # the driver took only some: its ring was full, or they were too long for the far end
                if now - self._losing_since.get(lost, now) >= _OVERLOAD_S:
                    found.append(
                        f"{name}: frames are being lost on their way out, {frames} so far; "
                        "there are more than it takes, or a veth's far end has a smaller MTU"
                    )
            elif now - self._lost_at.get(lost, -_RECENT_S) < _RECENT_S and lost.to_ifindex not in self.refusing:
                found.append(
                    f"{name}: {frames} frames were lost on their way out (errno {lost.errno}); "
                    "a veth's far end needs an XDP program or GRO"
                )
        return found
