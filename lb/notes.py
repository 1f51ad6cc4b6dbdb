"""What is valid in manifests and yet serves nobody: a slice that belongs to no Service, a Service without a slice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lb.model import EndpointSlice, Service, slices_by_service


def notes(services: Iterable[Service], slices: Iterable[EndpointSlice]) -> Iterator[str]:
    """Yield a line for each such object. Slices that are somebody else's, or of a headless Service, are left alone."""
    services, slices = tuple(services), tuple(slices)
    known = {(service.namespace, service.name) for service in services}
    for part in slices:
        if part.is_headless or part.proxy_name is not None:
            continue
        name = f"EndpointSlice {part.namespace}/{part.name}"
        if part.service_name is None:
            yield f"{name}: belongs to no Service; give it the label kubernetes.io/service-name"
        elif (part.namespace, part.service_name) not in known:
            yield f"{name}: belongs to Service {part.namespace}/{part.service_name}, which is not here"
    joined = slices_by_service(slices)
    for service in services:
        if service.is_proxied and (service.namespace, service.name) not in joined:
            yield (
                f"Service {service.namespace}/{service.name}: has no EndpointSlice; "
                f"one needs the label kubernetes.io/service-name: {service.name} and the same namespace"
            )
