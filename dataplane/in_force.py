"""The Services in force: what manifests and operators say becomes rows, and what else follows from a change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from conntrack.table import FlowTable
from dataplane import administered
from dataplane.crew import Crew
from dataplane.nexthops import NextHops
from dataplane.settings import Settings
from dataplane.unswept import Unswept
from dataplane.whereabouts import Whereabouts
from lb.incarnations import Incarnations
from lb.live import Live, Plan
from lb.model import AdminState, NotHonoured, Place, Said, ServicePort, Snapshot
from lb.rows import Here, has_endpoint, hidden_node_ports, known_as, local_addresses, rows_of, vips_at
from lb.table import Change, ServiceTable
from xdp.addresses import IPAddress, number_of
from xdp.errors import Error
from xdp.names import Names

log = logging.getLogger(__name__)


class InForce:
    """What a node does for which Services, and all that has to know when that changes.

    An error from `apply`, `apply_plan`, `administer` or `reprogram` means that what ran before goes on.
    `when_programmed` is called when rows have been written, `note` told of what could not be remembered.
    """

    def __init__(
        self,
        settings: Settings,
        flows: FlowTable,
        names: Names,
        next_hops: NextHops,
        services: ServiceTable,
        engine: Crew[Any],
        *,
        leads_clients: bool,
        when_programmed: Callable[[], None],
        note: Callable[[str, object], None],
    ) -> None:
        self._settings = settings
        self._flows = flows
        self._names = names
        self._next_hops = next_hops
        self._services = services
        self._engine = engine
        self._leads_clients = leads_clients
        self._when_programmed = when_programmed
        self._note = note
        self.live = Live()
        self.here = Here(administered=administered.kept(settings.administered_path))  # what was programmed with it
        self.incarnations = Incarnations()
        self.whereabouts = Whereabouts(settings.whereabouts_path)
        self.unswept: Unswept | None = None  # None: connections of all Services
        self.vips: frozenset[int] = frozenset()  # to be announced
        self.without_endpoint: dict[object, ServicePort] = {}  # that have none for new clients, by their identity
        self._hidden: set[NotHonoured] = set()  # node ports, by VIPs of the node's own

    @property
    def snapshot(self) -> Snapshot:
        """What runs, resolved."""
        return self.live.snapshot()

    def node_port_addresses(self) -> tuple[IPAddress, ...]:
        """Return the addresses that have node ports now."""
        return self._next_hops.node_port_addresses(self._settings.nodeport_addresses)

    def apply(self, live: Live) -> Change:
        """Make the node do what all manifests say; return what that has changed in the tables."""
        before, snapshot = self.snapshot, live.snapshot()
        change = self._program(snapshot, self.here.administered)
        known = set(before.not_honoured)
        self.live = live
        self._note_who_is_where(before.ports, snapshot.ports)
        self._forget_gone(self.here.administered)
        self._next_hops.retain(live.endpoint_addresses())
        self._has_applied(change, [note for note in dict.fromkeys(snapshot.not_honoured) if note not in known])
        return change

    def apply_plan(self, plan: Plan) -> Change:
        """Make the node do what a few manifests have changed; return what that has changed in the tables."""
        self._engine.expect_more(plan.rows)
        self._next_hops.add_local(local_addresses(plan.rows))
        before = [known_as(frontend, self._names) for frontend in plan.without]  # while these have names
        change = self._services.update(plan.rows, plan.without)
        if self.unswept is not None:
            self.unswept.add(plan.resolved, before)
        left = self.live.commit(plan)
        self._next_hops.leave(left)
        self._note_who_is_where(plan.before, plan.after)
        for port in plan.before:
            self.without_endpoint.pop(port.identity, None)
        self._note_without_endpoint(plan.after)
        self._follow_vips([*plan.before, *plan.after])
        self._forget_gone(self._may_have_gone(plan), left)
        if self._engine.needs_rows:
            self._engine.expect(rows_of(self.snapshot, self.here), self._next_hops.own_addresses())
        seen, come = (set(hidden_node_ports(ports, self.here)) for ports in (plan.before, plan.after))
        self._tell_hidden(self._hidden - seen | come)
        self._has_applied(change, plan.not_honoured)
        return change

    def administer(self, news: Mapping[Place, Said]) -> None:
        """Do what an operator says of endpoints now. Error: nothing has changed, or a restart will forget it."""
        said = {**self.here.administered, **news}
        said = {place: each for place, each in said.items() if each.state is not AdminState.READY}
        self._has_programmed(self._program(self.snapshot, said))
        try:
            administered.keep(self._settings.administered_path, said)
        except Error as error:
            raise Error(f"it is so, but a restart will forget it: {error}") from None

    def reprogram(self) -> None:
        """Bring the rows up to date when not the Services but the node's addresses have changed."""
        self._has_programmed(self._program(self.snapshot, self.here.administered))

    def take_unswept(self) -> Unswept | None:
        """Return what has changed since the last call, None for everything: for `Strays.end` after a grace period."""
        unswept, self.unswept = self.unswept, Unswept()
        return unswept

    def _program(self, snapshot: Snapshot, said: Mapping[Place, Said]) -> Change:
        """Make the tables say all of a snapshot, at the addresses that the node has now."""
        settings, own = self._settings, self._next_hops.own_addresses()
        families = tuple(sorted({network.version for network in settings.cluster_cidr}))
        timeouts = {port.options.timeouts_s for port in snapshot.ports} - {()}
        sets = self._flows.timeout_sets(timeouts, self.here.timeout_sets.values())
        addresses = self.node_port_addresses()
        here = Here(
            addresses,
            settings.masquerades,
            families,
            said,
            sets,
            leads_clients=self._leads_clients,
            vips=vips_at(frozenset(addresses), snapshot.ports),
        )
        rows = rows_of(snapshot, here)
        self._next_hops.add_local(local_addresses(rows))
        with self._engine.expecting(rows, own):
            change = self._services.apply(rows, own)
        self.here, self.unswept = here, None
        self.without_endpoint = {}
        self._note_without_endpoint(snapshot.ports)
        self._tell_hidden(set(hidden_node_ports(snapshot.ports, here)))
        if settings.announces:
            self.vips = self._services.vips()
        return change

    def _note_without_endpoint(self, ports: Iterable[ServicePort]) -> None:
        self.without_endpoint |= {port.identity: port for port in ports if not has_endpoint(port, self.here)}

    def _has_applied(self, change: Change, not_honoured: Iterable[NotHonoured]) -> None:
        for note in not_honoured:
            log.warning("%s", note)
        self._has_programmed(change)

    def _has_programmed(self, change: Change) -> None:
        self._when_programmed()
        log.debug("applied %s", change)

    def _tell_hidden(self, now: set[NotHonoured]) -> None:
        """Say which node ports give way to a VIP, if they have not until now."""
        for note in sorted(now - self._hidden):
            log.warning("%s", note)
        self._hidden = now

    def _follow_vips(self, changed: Iterable[ServicePort]) -> None:
        """Bring the VIPs to be announced up to date where these Service ports were changed."""
        if not self._settings.announces:
            return
        touched = {number_of(each.address) for port in changed for each in port.frontends if each.address is not None}
        there = {address for address in touched if self._services.is_vip(address)}
        if there != touched & self.vips:
            self.vips = self.vips - touched | there

    def _note_who_is_where(self, before: Iterable[ServicePort], after: Iterable[ServicePort]) -> None:
        changed = self.incarnations.remember(before, after)
        try:
            self.whereabouts.add(changed, lambda: self.incarnations.everybody(self.snapshot.ports))
        except Error as error:
            self._note("Pods that may change while no daemon is there", error)

    def _may_have_gone(self, plan: Plan) -> Collection[Place]:
        """Return which endpoints an operator has had a word of are in no Service any more that a plan is about."""
        states = self.here.administered
        if not states:
            return ()
        before, after = (
            {(each.address, each.port) for port in ports for each in port.endpoints}
            for ports in (plan.before, plan.after)
        )
        return before & states.keys() - after

    def _forget_gone(self, suspects: Collection[Place], left: Collection[IPAddress] = ()) -> None:
        """Forget what was said of those of these endpoints that no manifest has any more, at `left` for certain."""
        gone = {place for place in suspects if place[0] in left}
        if others := set(suspects) - gone:
            gone |= others.difference(self.live.places())
        if gone:
            said = {place: each for place, each in self.here.administered.items() if place not in gone}
            self.here = replace(self.here, administered=said)
            try:
                administered.keep(self._settings.administered_path, said)
            except Error as error:
                self._note("endpoints that are drained", error)
