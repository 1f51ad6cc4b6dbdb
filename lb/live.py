"""The Services of a node, kept resolved while single objects change: what a change costs is the change, not the rest.

Objects are known by namespace and name, as an apiserver's watch tells of them. A change is planned first, which alters
nothing, then programmed, then committed: a plan that finds no room in the tables is dropped.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lb.garbage import no_collections
from lb.model import (
    SOMEWHERE,
    EndpointSlice,
    HealthCheck,
    NodeView,
    NotHonoured,
    Place,
    Service,
    ServicePort,
    Snapshot,
)
from lb.not_yet import NOT_YET
from lb.resolve import health_checks_of, resolve_service
from lb.rows import NOTHING_HERE, FrontendKey, Here, ServiceRow, frontends_of, rows_of_port
from xdp.addresses import IPAddress, IPNetwork, number_of

Name = tuple[str, str]  # namespace and name


@dataclass(frozen=True)
class Changes:
    """Objects that are new or other than before; None for those that are gone."""

    services: Mapping[Name, Service | None]
    slices: Mapping[Name, EndpointSlice | None]


class _Resolved(NamedTuple):
    ports: tuple[ServicePort, ...]
    not_honoured: tuple[NotHonoured, ...]
    health_checks: tuple[HealthCheck, ...]


_NOTHING = _Resolved((), (), ())


class Plan(NamedTuple):
    """What `Changes` come to here. The last two are for `commit`."""

    rows: list[ServiceRow]  # of Service ports that are new or other than before
    without: list[FrontendKey]  # what these, and those that are gone, had for frontends
    not_honoured: list[NotHonoured]  # what was not before
    before: list[ServicePort]  # those that it touches, as they were ...
    after: list[ServicePort]  # ... and will be
    here: Here
    resolved: dict[Name, _Resolved]
    changes: Changes


class Live:
    """The Services of `node`, resolved (lb/resolve.py has the rules)."""

    def __init__(
        self,
        node: NodeView = SOMEWHERE,
        allow_external_ips: Sequence[IPNetwork] = (),
        not_yet: Mapping[str, str] = NOT_YET,
    ) -> None:
        self._not_yet = not_yet
        self._node = node
        self._allow_external_ips = allow_external_ips
        self._services: dict[Name, Service] = {}
        self._slices: dict[Name, EndpointSlice] = {}
        self._joined: dict[Name, dict[Name, EndpointSlice]] = defaultdict(dict)  # by Service
        self._resolved: dict[Name, _Resolved] = {}
        self._users: Counter[IPAddress] = Counter()  # of endpoints' addresses
        self._candidates: Counter[int] = Counter()  # Service ports that have an endpoint to choose, by its place
        self._served = 0
        self._checks: dict[Name, tuple[HealthCheck, ...]] = {}  # of Services that have any

    @classmethod
    def of(
        cls,
        services: Iterable[Service],
        slices: Iterable[EndpointSlice],
        node: NodeView = SOMEWHERE,
        allow_external_ips: Sequence[IPNetwork] = (),
        not_yet: Mapping[str, str] = NOT_YET,
    ) -> Live:
        """Return these Services, resolved: the same as `resolve`, ready for changes."""
        live = cls(node, allow_external_ips, not_yet)
        with no_collections():
            for part in slices:
                live._add_slice((part.namespace, part.name), part)
            for service in services:
                name = service.namespace, service.name
                live._services[name] = service
                live._resolved[name] = live._resolve(service, live._joined.get(name, {}).values())
            live._users.update(use for each in live._resolved.values() for use in _uses(each))
            live._candidates.update(place for each in live._resolved.values() for place in _chosen_from(each))
        live._checks = {name: each.health_checks for name, each in live._resolved.items() if each.health_checks}
        live._served = sum(bool(each.ports) for each in live._resolved.values())
        return live

    @property
    def services(self) -> int:
        """How many Services have something to be served."""
        return self._served

    @property
    def endpoints(self) -> int:
        """How many endpoints there are to choose from, for whatever Services and wherever they are."""
        return len(self._candidates)

    def snapshot(self) -> Snapshot:
        """Return everything that the node is to do."""
        resolved = list(self._resolved.values())  # at once: another thread may be committing
        return Snapshot(
            tuple([port for each in resolved for port in each.ports]),
            tuple([note for each in resolved for note in each.not_honoured]),
            tuple([check for each in resolved for check in each.health_checks]),
        )

    def health_checks(self) -> list[HealthCheck]:
        """Return the health checks of all Services."""
        return [check for checks in self._checks.values() for check in checks]

    def snapshot_of(self, services: Iterable[Name]) -> Snapshot:
        """Return the Service ports of these Services that there are, and no more."""
        resolved = [self._resolved.get(name, _NOTHING) for name in services]
        return Snapshot(tuple([port for each in resolved for port in each.ports]), ())

    def plan(self, changes: Changes, here: Here = NOTHING_HERE) -> Plan:
        """Return what `changes` come to where the rows are those of `here`; nothing has changed yet."""
        plan = Plan([], [], [], [], [], here, {}, changes)
        for name in self._touched(changes):
            service = changes.services[name] if name in changes.services else self._services.get(name)
            now = self._resolve(service, self._joined_with(name, changes)) if service is not None else _NOTHING
            before = self._resolved.get(name, _NOTHING)
            plan.resolved[name] = now
            plan.before.extend(before.ports)
            plan.after.extend(now.ports)
            if now.ports != before.ports:
                plan.rows.extend(row for port in now.ports for row in rows_of_port(port, here))
                plan.without.extend(frontend for port in before.ports for _, frontend in frontends_of(port, here))
            if now.not_honoured != before.not_honoured:
                plan.not_honoured.extend(note for note in now.not_honoured if note not in before.not_honoured)
        return plan

    def commit(self, plan: Plan) -> set[IPAddress]:
        """Make a plan what is so; return the addresses that are no endpoint's any more."""
        users = self._users
        left = set()
        for name, now in plan.resolved.items():
            before = self._resolved.get(name, _NOTHING)
            users.update(_uses(now))
            for use in _uses(before):
                users[use] -= 1
                if not users[use]:
                    del users[use]
                    left.add(use)
            self._count(before, now)
            self._checks.pop(name, None)
            if now.health_checks:
                self._checks[name] = now.health_checks
            if plan.changes.services.get(name, self._services.get(name)) is None:
                self._resolved.pop(name, None)
            else:
                self._resolved[name] = now
        for name, service in plan.changes.services.items():
            if service is None:
                self._services.pop(name, None)
            else:
                self._services[name] = service
        for name, part in plan.changes.slices.items():
            self._add_slice(name, part)
        return left

    def places(self) -> Iterator[Place]:
        """Yield where every endpoint is, some more than once."""
        for resolved in list(self._resolved.values()):  # at once: another thread may be committing
            for port in resolved.ports:
                for endpoint in port.endpoints:
                    yield endpoint.address, endpoint.port

    def endpoint_addresses(self) -> Iterator[IPAddress]:
        """Yield the address of every endpoint, some more than once."""
        return (address for address, _ in self.places())

    def _count(self, before: _Resolved, now: _Resolved) -> None:
        """Keep `services` and `endpoints` right when a Service changes."""
        self._served += bool(now.ports) - bool(before.ports)
        self._candidates.update(_chosen_from(now))
        for place in _chosen_from(before):
            self._candidates[place] -= 1
            if not self._candidates[place]:
                del self._candidates[place]

    def _touched(self, changes: Changes) -> Iterable[Name]:
        """Return the Services that `changes` are about, in order and each once."""
        touched = dict.fromkeys(changes.services)
        for name, part in changes.slices.items():
            for each in (self._slices.get(name), part):
                if each is not None and each.is_used:
                    touched[each.namespace, each.service_name or ""] = None
        return [name for name in touched if name in self._services or name in changes.services]

    def _joined_with(self, name: Name, changes: Changes) -> Iterable[EndpointSlice]:
        """Return the slices of a Service as they will be."""
        joined = dict(self._joined.get(name, {}))
        for of_slice, part in changes.slices.items():
            if part is not None and part.is_used and (part.namespace, part.service_name) == name:
                joined[of_slice] = part
            else:
                joined.pop(of_slice, None)
        return joined.values()

    def _add_slice(self, name: Name, part: EndpointSlice | None) -> None:
        """Put a slice in the place of the one of that name, None for no other."""
        before = self._slices.pop(name, None)
        service = (part.namespace, part.service_name or "") if part is not None and part.is_used else None
        if before is not None and before.is_used:
            before_of = before.namespace, before.service_name or ""
            if before_of != service:
                del self._joined[before_of][name]
                if not self._joined[before_of]:
                    del self._joined[before_of]
        if part is not None:
            self._slices[name] = part
            if service is not None:
                self._joined[service][name] = part

    def _resolve(self, service: Service, slices: Iterable[EndpointSlice]) -> _Resolved:
        ports, refused = resolve_service(service, tuple(slices), self._node, self._allow_external_ips, self._not_yet)
        checks = health_checks_of(service, ports, self._node)
        return _Resolved(tuple(ports), tuple(refused), checks) if ports or refused or checks else _NOTHING


def _uses(resolved: _Resolved) -> Iterator[IPAddress]:
    for port in resolved.ports:
        for endpoint in port.endpoints:
            yield endpoint.address


def _chosen_from(resolved: _Resolved) -> Iterator[int]:
    """Yield the places of candidates as numbers: of what is counted by the hundred thousand they take least."""
    for port in resolved.ports:
        for endpoint in port.cluster:
            yield number_of(endpoint.address) << 16 | endpoint.port
