"""What is valid in manifests and yet serves nobody: objects, and ports of them, that do not find each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lb.fields import Path, did_you_mean, shown
from lb.model import EndpointSlice, Service, slices_by_service


class Note(NamedTuple):
    """Something to be told of an object."""

    object: str  # as in "Service shop/web"
    path: Path
    message: str


def notes(services: Iterable[Service], slices: Iterable[EndpointSlice]) -> Iterator[Note]:
    """Yield what serves nobody. Slices that are somebody else's, or of a headless Service, are left alone."""
    services, slices = tuple(services), tuple(slices)
    known = {(service.namespace, service.name): service for service in services}
    for part in slices:
        if part.is_headless or part.proxy_name is not None:
            continue
        name = f"EndpointSlice {part.namespace}/{part.name}"
        service = known.get((part.namespace, part.service_name or ""))
        if part.service_name is None:
            yield Note(name, (), "belongs to no Service; give it the label kubernetes.io/service-name")
        elif service is None:
            yield Note(name, (), f"belongs to Service {part.namespace}/{part.service_name}, which is not here")
        elif service.is_proxied and part.is_used:
            for path, message in _ports_of_nobody(part, service):
                yield Note(name, path, message)
    joined = slices_by_service(slices)
    for service in services:
        if not service.is_proxied:
            continue
        name = f"Service {service.namespace}/{service.name}"
        its = joined.get((service.namespace, service.name))
        if its is None:
            yield Note(
                name,
                (),
                "has no EndpointSlice; "
                f"one needs the label kubernetes.io/service-name: {service.name} and the same namespace",
            )
            continue
        for path, message in _ports_without_endpoints(service, its):
            yield Note(name, path, message)


def _ports_of_nobody(part: EndpointSlice, service: Service) -> Iterator[tuple[Path, str]]:
    """Yield the ports of a slice that are none of its Service: name and protocol are what joins them (S4, E2)."""
    protocols = {port.name: port.protocol for port in service.ports}
    of = f"of Service {service.namespace}/{service.name}"
    named = [name for name in protocols if name]
    for index, (name, number, protocol) in enumerate(part.ports):
        if number is None:
            continue
        if name is None:
            wanted = "the name of a port" if named else 'the name ""'
            yield ("ports", index), f"a port without a name is ignored; give it {wanted}, as a port {of} has"
        elif name not in protocols:
            cure = did_you_mean(name, named) if named else '; that has no name: write ""'
            yield ("ports", index, "name"), f"{shown(name)} is no port {of}{cure}"
        elif protocol != protocols[name]:
            yield ("ports", index), f"{protocol} is not the protocol of port {shown(name)} {of}, {protocols[name]} is"


def _ports_without_endpoints(service: Service, slices: Sequence[EndpointSlice]) -> Iterator[tuple[Path, str]]:
    """Yield the ports of a Service that none of its slices has; those without endpoints need not have any."""
    populated = [part for part in slices if part.endpoints]
    served = {(name, protocol) for part in populated for name, number, protocol in part.ports if number}
    for index, port in enumerate(service.ports):
        if populated and (port.name, port.protocol) not in served:
            yield (
                ("spec", "ports", index),
                f"no EndpointSlice has a port {shown(port.name)} with protocol {port.protocol}: nobody serves it",
            )
