"""Who is behind an endpoint: where another Pod is now, nobody knows the connections of the one before (C9).

EndpointSlices tell Pods apart by the uid of their targetRef; without one nobody is told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lb.model import Place, ServicePort

Seat = tuple[Place, str]  # with the protocol: Pods that share the address of their host may share a port's number, too

_REMEMBERED = 65_536  # seats that have changed hands, or have gone


class Incarnations:
    """Remembers who was behind the endpoints that have gone, or have become another's."""

    def __init__(self) -> None:
        self._last: dict[Seat, str] = {}  # ascending by the time of the change
        self._before: Mapping[Seat, str] = {}  # who was seen where before this began, until the first change

    def know(self, last: Mapping[Seat, str]) -> None:
        """Take over who was seen where before this began: as if they were there until the first change."""
        self._before = last

    def everybody(self, ports: Iterable[ServicePort]) -> dict[Seat, str]:
        """Return who is where, `ports` being all Service ports, and who was where nobody is."""
        return {**self._last, **_who_is_where(ports)}

    def succeeded(self, before: Iterable[ServicePort], after: Iterable[ServicePort]) -> list[Seat]:
        """Return where somebody else is when Service ports have changed: what was there has no successor."""
        was, now = {**self._before, **_who_is_where(before)}, _who_is_where(after)
        return [seat for seat, who in now.items() if self._last.get(seat, was.get(seat, who)) != who]

    def remember(self, before: Iterable[ServicePort], after: Iterable[ServicePort]) -> dict[Seat, str]:
        """Note that Service ports have changed; return where somebody is now who was not there before."""
        was, now = {**self._before, **_who_is_where(before)}, _who_is_where(after)
        self._before = {}
        for seat in {**was, **now}:
            last = self._last.get(seat, was.get(seat, ""))
            who = now.get(seat, last)
            if seat not in now or (last and who != last):
                self._note(seat, who)
        return {seat: who for seat, who in now.items() if was.get(seat) != who}

    def _note(self, seat: Seat, who: str) -> None:
        self._last.pop(seat, None)
        self._last[seat] = who
        if len(self._last) > _REMEMBERED:
            del self._last[next(iter(self._last))]


def _who_is_where(ports: Iterable[ServicePort]) -> dict[Seat, str]:
    return {
        ((each.address, each.port), port.protocol): each.who for port in ports for each in port.endpoints if each.who
    }
