"""Who is behind an endpoint: where another Pod is now, nobody knows the connections of the one before (C9).

EndpointSlices tell Pods apart by the uid of their targetRef; without one nobody is told apart.
"""

from __future__ import annotations

from collections.abc import Iterable

from lb.model import Place, ServicePort

_REMEMBERED = 65_536  # places that have changed hands, or have gone


class Incarnations:
    """Remembers who was behind the endpoints that have gone, or have become another's."""

    def __init__(self) -> None:
        self._last: dict[Place, str] = {}  # ascending by the time of the change

    def succeeded(self, before: Iterable[ServicePort], after: Iterable[ServicePort]) -> list[Place]:
        """Return where somebody else is from now on, as Service ports change: what was there has no successor."""
        was, now = _who_is_where(before), _who_is_where(after)
        others = [place for place, who in now.items() if self._last.get(place, was.get(place, who)) != who]
        for place in others:
            self._remember(place, now[place])
        for place, who in was.items():
            if place not in now:
                self._remember(place, self._last.get(place, who))
        return others

    def _remember(self, place: Place, who: str) -> None:
        self._last.pop(place, None)
        self._last[place] = who
        if len(self._last) > _REMEMBERED:
            del self._last[next(iter(self._last))]


def _who_is_where(ports: Iterable[ServicePort]) -> dict[Place, str]:
    return {(each.address, each.port): each.who for port in ports for each in port.endpoints if each.who}
