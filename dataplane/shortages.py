"""What new connections found no room for, in words: what `status` is to tell as long as it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dataplane.settings import PRIVILEGED_SNAT_PORTS, Settings
from xdp.schema import Reason
from xdp.tables import Tables


def _ports(settings: Settings) -> str:
    return (
        f"found no free port among {settings.snat_ports}, or {PRIVILEGED_SNAT_PORTS} for privileged ones; see "
        "--snat-ports and --snat-addresses"
    )


def _connections(settings: Settings) -> str:
    return (
        f"found no room in the table; is it a flood? Otherwise they want a --capacity larger than {settings.capacity:,}"
    )


def _names(settings: Settings) -> str:  # noqa: ARG001
    return "over IPv6 found no room for the name of their client; is it a flood? See `get reasons`"


_WHAT: dict[Reason, tuple[str, Callable[[Settings], str]]] = {
    Reason.NO_SNAT_PORT: ("masquerading", _ports),
    Reason.TABLE_FULL: ("connections", _connections),
    Reason.NAMES_FULL: ("names", _names),
}


_WAYS = "rows; does a host on the link answer for many addresses? See `get nexthops`"


class Shortages:
    """Counts what was refused for want of room, from now on.

    `ways_refused`: the destinations so far that found no row of next hops (dataplane/nexthops.py).
    """

    def __init__(self, settings: Settings, tables: Tables, ways_refused: Callable[[], int] = lambda: 0) -> None:
        self._ways_refused = ways_refused
        self._ways_seen = ways_refused()
        self._settings = settings
        self._tables = tables
        self._rows = len(tables.next_hops)
        self._seen = {reason: self._count(reason) for reason in _WHAT}

    def _count(self, reason: Reason) -> int:
        counters = self._tables.worker_counters, self._tables.xdp_counters
        return sum(int(each["packets"][:, reason].sum()) for each in counters)

    def news(self) -> Iterator[tuple[str, str]]:
        """Yield (what, words) for what there was no room for since the last call."""
        for reason, (what, words) in _WHAT.items():
            now = self._count(reason)
            more, self._seen[reason] = now - self._seen[reason], now
            if more > 0:
                yield what, f"{more} new connections {words(self._settings)}"
        ways, self._ways_seen = self._ways_refused() - self._ways_seen, self._ways_refused()
        if ways:
            yield "next hops", f"{ways} times a host or a route found no room among {self._rows:,} {_WAYS}"
