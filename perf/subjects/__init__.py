"""What is measured: devices that lead the generator's packets through a testbed's node. A file for each kind."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from perf.bed import Service, Testbed


class Subject(Protocol):
    """Something that forwards. `translates`: to an endpoint's address and port. `leads_back`: replies as well."""

    name: str
    translates: bool
    leads_back: bool

    def running(self, bed: Testbed) -> AbstractContextManager[None]:
        """Start it in the bed's node; it forwards until the context is left. MissingFeatureError: it cannot be had."""


@runtime_checkable
class Programmable(Subject, Protocol):
    """A subject whose Services can be changed."""

    def change(self, bed: Testbed, number: int, service: Service) -> None:
        """Make Service `number` of the bed what `service` says, as its own control plane would. May return early."""
