"""From Services and EndpointSlices to what one node is to do: pure, and Kubernetes' rules one by one.

The ids in comments (S7, E5) are those of docs/behaviours.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lb.documents import dotted
from lb.garbage import no_collections
from lb.model import (
    SOMEWHERE,
    Endpoint,
    EndpointSlice,
    EndpointState,
    Frontend,
    FrontendKind,
    HealthCheck,
    NodeView,
    NotHonoured,
    PortSpec,
    Service,
    ServicePort,
    Snapshot,
    slices_by_service,
    vips,
)
from lb.not_yet import NOT_YET, LeftOut
from xdp.addresses import IPAddress, IPNetwork

_FAMILIES = ((4, "IPv4"), (6, "IPv6"))


def resolve(
    services: Iterable[Service],
    slices: Iterable[EndpointSlice],
    node: NodeView = SOMEWHERE,
    allow_external_ips: Sequence[IPNetwork] = (),
    not_yet: Mapping[str, str] = NOT_YET,
) -> Snapshot:
    """Return what `node` is to do for these Services.

    `allow_external_ips` are the networks that externalIPs may be in (S5). `not_yet` names the features that are left
    out of the result; each that a Service asks for is listed in the snapshot's `not_honoured`.
    """
    ports: list[ServicePort] = []
    not_honoured: list[NotHonoured] = []
    checks: list[HealthCheck] = []
    with no_collections():
        joined = slices_by_service(slices)
        for service in services:
            mine = joined.get((service.namespace, service.name), ())
            resolved, refused = resolve_service(service, mine, node, allow_external_ips, not_yet)
            ports += resolved
            not_honoured += refused
            checks += health_checks_of(service, resolved, node)
    return Snapshot(tuple(ports), tuple(not_honoured), tuple(checks))


def health_checks_of(service: Service, ports: Iterable[ServicePort], node: NodeView) -> tuple[HealthCheck, ...]:
    """Return where a Service with these ports is to be asked about its endpoints here, if anywhere.

    By family, as kube-proxy has it: an endpoint of IPv6 is of no use to a load balancer that comes over IPv4. Only of a
    Service of one family who asks over the other means that one.
    """
    if not (service.health_check_node_port and service.is_proxied and node.name):
        return ()
    ready = {endpoint.address for port in ports for endpoint in port.local if endpoint.state is EndpointState.READY}
    count = {family: sum(address.version == family for address in ready) for family, _ in _FAMILIES}
    its = [family for family in count if _has_family(service, family)]
    return tuple(
        HealthCheck(
            service.namespace,
            service.name,
            service.health_check_node_port,
            count[family if family in its else its[0]],
            family,
        )
        for family in count
    )


def resolve_service(
    service: Service,
    slices: Sequence[EndpointSlice],
    node: NodeView = SOMEWHERE,
    allow_external_ips: Sequence[IPNetwork] = (),
    not_yet: Mapping[str, str] = NOT_YET,
) -> tuple[list[ServicePort], list[NotHonoured]]:
    """Return the ports of one Service from the slices joined to it, and what is not honoured: `resolve` in small."""
    if not service.is_proxied:
        return [], []
    left_out = LeftOut(service, not_yet, node)
    addresses = _allowed_vips(service, allow_external_ips, left_out)
    left_out.look_at_fields(slices)
    ports: list[ServicePort] = []
    for family, address_type in _FAMILIES:
        vips_of_family = [pair for pair in addresses if pair[1].version == family]
        has_node_ports = _has_family(service, family)
        if not vips_of_family and not has_node_ports:
            continue
        slices_of_family = [part for part in slices if part.address_type == address_type]
        for port in service.ports:
            if port.protocol == "SCTP" and "sctp" in not_yet:
                continue
            frontends = [Frontend(kind, address, port.port) for kind, address in vips_of_family]
            if port.node_port and has_node_ports:
                frontends.append(Frontend(FrontendKind.NODE_PORT, None, port.node_port))
            if frontends:
                ports.append(_service_port(service, port, family, frontends, slices_of_family, node))
    return ports, left_out.found


def _service_port(
    service: Service,
    port: PortSpec,
    family: int,
    frontends: Sequence[Frontend],
    slices: Sequence[EndpointSlice],
    node: NodeView,
) -> ServicePort:
    endpoints = _endpoints(service, port, slices, node)
    return ServicePort(
        service.namespace,
        service.name,
        port.name,
        port.port,
        port.protocol,
        family,
        tuple(frontends),
        endpoints,
        cluster_candidates(endpoints, node),
        _usable([endpoint for endpoint in endpoints if endpoint.is_local]),
        service.external_traffic_policy if node.name else "Cluster",
        service.internal_traffic_policy if node.name else "Cluster",
        service.affinity_s,
        ranges_of_family(service.source_ranges, family),
        service.options,
    )


_RANK = {
    EndpointState.READY: 3,
    EndpointState.UNREADY: 2,
    EndpointState.SERVING: 1,
    EndpointState.TERMINATING: 0,
}


def _endpoints(
    service: Service, port: PortSpec, slices: Sequence[EndpointSlice], node: NodeView
) -> tuple[Endpoint, ...]:
    """Return the endpoints of one port, each address and port once (E4)."""
    found: dict[tuple[int, int], Endpoint] = {}
    weights = dict(service.options.weights)
    for part in slices:
        for name, number, protocol in part.ports:
            if name != port.name or protocol != port.protocol or not number:
                continue
            for address, state, node_name, zone, zone_hints, node_hints, who in part.endpoints:
                is_local = node_name is not None and node_name == node.name
                weight = weights.get(address, 1) if weights else 1
                key = int(address), number
                other = found.get(key)
                # A pod that is replaced may be in two slices for a while: it is as alive as the livelier says.
                if other is None or _RANK[state] > _RANK[other.state]:
                    found[key] = Endpoint(address, number, state, is_local, zone, zone_hints, node_hints, weight, who)
    return tuple(found.values())


def _usable(endpoints: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the ready endpoints or, without any, those that still serve while they terminate (E5, E7)."""
    ready = tuple([endpoint for endpoint in endpoints if endpoint.state is EndpointState.READY])
    return ready or tuple([endpoint for endpoint in endpoints if endpoint.state is EndpointState.SERVING])


def cluster_candidates(endpoints: Sequence[Endpoint], node: NodeView) -> tuple[Endpoint, ...]:
    """Return the usable endpoints; if every ready one has a hint, those of this node or else of this zone (E6)."""
    usable = _usable(endpoints)
    if not usable or usable[0].state is not EndpointState.READY:
        return usable
    if all(endpoint.node_hints for endpoint in usable):
        of_node = tuple(endpoint for endpoint in usable if node.name in endpoint.node_hints)
        if of_node:
            return of_node
    if all(endpoint.zone_hints for endpoint in usable):
        return tuple(endpoint for endpoint in usable if node.zone in endpoint.zone_hints) or usable
    return usable


def ranges_of_family(ranges: Sequence[IPNetwork], family: int) -> tuple[IPNetwork, ...] | None:
    """Return the source ranges that filter clients of a family, or None for no filter (S7)."""
    mine = tuple(network for network in ranges if network.version == family)
    return mine if mine and all(network.prefixlen for network in mine) else None


def _has_family(service: Service, family: int) -> bool:
    """Return whether node ports answer in `family`: the cluster IPs say so, or there are none."""
    return not service.cluster_ips or any(address.version == family for address in service.cluster_ips)


def _allowed_vips(
    service: Service, allow_external_ips: Sequence[IPNetwork], left_out: LeftOut
) -> list[tuple[FrontendKind, IPAddress]]:
    """Return the VIPs to program; the others are noted in `left_out`."""
    allowed: list[tuple[FrontendKind, IPAddress]] = []
    for kind, address, path in vips(service):
        if kind is FrontendKind.EXTERNAL_IP and not any(address in network for network in allow_external_ips):
            left_out.add(dotted(path), f"{address} is in no network of --allow-external-ips; left out")
            continue
        allowed.append((kind, address))
    return allowed
