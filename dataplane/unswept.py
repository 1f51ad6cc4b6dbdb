"""What changes of a few Services leave to be looked after: connections that may have lost their endpoint by them."""

from __future__ import annotations

from collections.abc import Iterable

from lb.live import Name

Known = tuple[int, int, int]  # a frontend as packets know it: lb.rows.known_as


class Unswept:
    """The Services that plans were about since connections were looked at, and the frontends that these had before."""

    def __init__(self) -> None:
        self.services: set[Name] = set()
        self._frontends: set[Known] = set()

    def add(self, services: Iterable[Name], frontends: Iterable[Known]) -> None:
        """Note what a plan has changed."""
        self.services.update(services)
        self._frontends.update(frontends)

    def frontends_of(self, protocol: int) -> list[tuple[int, int]]:
        """Return those frontends of a protocol, which has the family, that connections may be left of."""
        return [(address, port) for address, port, its in self._frontends if its == protocol]
