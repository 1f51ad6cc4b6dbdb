"""Connections to endpoints that have gone: what would go on by itself is ended after a change."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from conntrack.table import FlowTable
from dataplane.in_force import InForce
from dataplane.led import LedSockets
from dataplane.output import counted
from dataplane.unswept import Unswept
from lb.incarnations import Seat
from lb.model import AdminState, Place, ServicePort
from lb.rows import answering, echo_protocol, impatient, known_as, living
from xdp.names import Names
from xdp.schema import Protocol

log = logging.getLogger(__name__)


class Strays:
    """Ends connections of `flows`, and of the sockets that were `led`, as the Services in force want it.

    Not in the event loop: it takes passes over all connections.
    """

    def __init__(
        self, in_force: InForce, flows: FlowTable, led: LedSockets | None, names: Names, *, has_echoes: bool
    ) -> None:
        self._in_force = in_force
        self._flows = flows
        self._holders: list[FlowTable | LedSockets] = [flows] if led is None else [flows, led]
        self._names = names
        self._has_echoes = has_echoes  # echo requests to VIPs are forwarded
        self.ended_out = 0  # connections, because their endpoint is in maintenance

    def end_succeeded(self, before: Iterable[ServicePort], after: Iterable[ServicePort]) -> None:
        """End the connections to endpoints whose place is another Pod's, before that one is given any (C9)."""
        succeeded = self._in_force.incarnations.succeeded(before, after)
        ended = self._end_at([*succeeded, *(((address, 0), "ICMP") for (address, _), _ in succeeded)])
        if ended:
            log.info("%s ended: another Pod has the place of their endpoint", counted(ended, "connection"))

    def end(self, unswept: Unswept | None = None) -> None:
        """End UDP flows whose Service has their endpoint no more, and echoes: by themselves they never would (C8).

        TCP goes on, but for Services that would rather have it reset.

        After a grace period: a packet that chose such an endpoint before the change has inserted its flow by then.
        Of few Services that have changed, in the end only these are looked at.
        """
        in_force, names = self._in_force, self._names
        here, later = in_force.here, in_force.unswept
        if unswept is None or later is None:
            unswept, snapshot = None, in_force.snapshot
        else:  # a frontend that one has lost may be another's by now
            snapshot = in_force.live.snapshot_of(unswept.services | later.services)
        for holder in self._holders:
            for protocol in (Protocol.UDP, Protocol.UDP | Protocol.IPV6):
                pairs = living(snapshot, here, protocol, names)
                if unswept is None:
                    holder.keep_only(protocol, pairs)
                else:
                    holder.reset_others(protocol, unswept.frontends_of(protocol), pairs)
            for protocol in (Protocol.TCP, Protocol.TCP | Protocol.IPV6):
                lost = impatient(snapshot, here, protocol, names)
                if lost:
                    holder.reset_others(protocol, lost, living(snapshot, here, protocol, names))
        if self._has_echoes:
            for family in (4, 6):
                self._flows.keep_only(echo_protocol(family), answering(in_force.snapshot, here, family, names))
        self._end_out(place for place, said in here.administered.items() if said.state is AdminState.MAINT)

    def _end_out(self, places: Iterable[Place]) -> None:
        """End the connections to endpoints in maintenance."""
        ended = self._end_at((place, protocol) for place in places for protocol in ("TCP", "UDP"))
        self.ended_out += ended
        if ended:
            log.info("%s ended: their endpoint is in maintenance", counted(ended, "connection"))

    def _end_at(self, seats: Iterable[Seat]) -> int:
        """End the connections to endpoints; return how many. Of protocol ICMP, echoes of either family."""
        ends: dict[int, list[tuple[int, int]]] = {}
        for (address, port), protocol in seats:
            number, _, of_family = known_as((address, port, Protocol[protocol]), self._names)
            if protocol == "ICMP":
                of_family = echo_protocol(address.version)
            ends.setdefault(of_family, []).append((number, port))
        return sum(holder.end_at(protocol, places) for protocol, places in ends.items() for holder in self._holders)
