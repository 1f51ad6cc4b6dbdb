"""Whether objects that change still fit together with all others, without looking at all others.

It knows what the whole check (lb/manifests.py) looks for, and says only yes or no: whoever gets a no has the whole
check find out what is wrong, in the order of the files and with the lines.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator

from lb.model import EndpointSlice, Service, claims, vips


class Catalog:
    """What is taken: names, claims (S13), cluster IPs and endpoints' addresses (E8); as often as it is."""

    def __init__(self, services: Iterable[Service] = (), slices: Iterable[EndpointSlice] = ()) -> None:
        self._taken: Counter[Hashable] = Counter()
        self._own_vips: dict[tuple[str, str], set[object]] = {}  # of Services with more than cluster IPs
        self._slices_of: dict[tuple[str, str], dict[str, EndpointSlice]] = defaultdict(dict)
        for service in services:
            self._add_service(service)
        for part in slices:
            self._add_slice(part)

    def replace(
        self,
        old: tuple[Collection[Service], Collection[EndpointSlice]],
        new: tuple[Collection[Service], Collection[EndpointSlice]],
    ) -> bool:
        """Put objects in the place of old ones; return whether they fit. If not, this catalog is of no more use."""
        for service in old[0]:
            self._taken.subtract(_of_service(service))
            self._own_vips.pop((service.namespace, service.name), None)
        for part in old[1]:
            self._taken.subtract(_of_slice(part))
            self._slices_of[part.namespace, part.service_name or ""].pop(part.name, None)
        for service in new[0]:
            self._add_service(service)
        for part in new[1]:
            self._add_slice(part)
        fits = all(self._fits_service(service) for service in new[0]) and all(map(self._fits_slice, new[1]))
        for gone in [*map(_of_service, old[0]), *map(_of_slice, old[1])]:
            for each in gone:
                if not self._taken[each]:
                    del self._taken[each]
        return fits

    def _add_service(self, service: Service) -> None:
        self._taken.update(_of_service(service))
        if service.is_proxied and (service.external_ips or service.ingress):
            self._own_vips[service.namespace, service.name] = {address for _, address, _ in vips(service)}

    def _add_slice(self, part: EndpointSlice) -> None:
        self._taken.update(_of_slice(part))
        self._slices_of[part.namespace, part.service_name or ""][part.name] = part

    def _fits_service(self, service: Service) -> bool:
        name = service.namespace, service.name
        own = self._own_vips.get(name, ())
        return (
            all(self._taken[each] == 1 for each in _alone(service))
            and not any(self._taken["endpoint", address] for address in _cluster_ips(service))
            and not any(_has_endpoint(part, own) for part in self._slices_of.get(name, {}).values())
        )

    def _fits_slice(self, part: EndpointSlice) -> bool:
        own = self._own_vips.get((part.namespace, part.service_name or ""), ())
        return (
            self._taken["EndpointSlice", part.namespace, part.name] == 1
            and not _has_endpoint(part, own)
            and not (part.is_used and any(self._taken["cluster IP", each.address] for each in part.endpoints))
        )


def _has_endpoint(part: EndpointSlice, addresses: Collection[object]) -> bool:
    return bool(addresses) and part.is_used and any(endpoint.address in addresses for endpoint in part.endpoints)


def _cluster_ips(service: Service) -> Iterable[object]:
    return service.cluster_ips if service.is_proxied else ()


def _alone(service: Service) -> Iterator[Hashable]:
    """Yield what nothing else may have as well, not even of the same Service: what it wants twice comes twice."""
    yield "Service", service.namespace, service.name
    for address, port, protocol, _ in claims(service):
        yield address, port, protocol


def _of_service(service: Service) -> Iterator[Hashable]:
    yield from _alone(service)
    for address in _cluster_ips(service):
        yield "cluster IP", address


def _of_slice(part: EndpointSlice) -> Iterator[Hashable]:
    yield "EndpointSlice", part.namespace, part.name
    if part.is_used:
        for endpoint in part.endpoints:
            yield "endpoint", endpoint.address
