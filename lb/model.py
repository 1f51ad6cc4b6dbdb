"""What Kubernetes' Service and EndpointSlice say, and what follows from them for one node.

`Service` and `EndpointSlice` hold what was written, with defaults filled in; they come from files (lb/manifests.py) or
from an apiserver. `resolve` is the pure function from them to a `Snapshot`: every Service port with the frontends to
program and the endpoints to choose from. The ids in comments (S7, E5) are those of docs/behaviours.md.

Addresses are `ipaddress` objects everywhere. Protocols, types and policies are Kubernetes' own words. What exists a
hundred thousand times is a named tuple, which costs a third of a frozen dataclass.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

from lb.garbage import no_collections

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

# What the dataplane does not act on yet: feature -> what happens instead. Whoever teaches it one removes the line.
NOT_YET: Mapping[str, str] = {
    "ipv6": "IPv6 is not forwarded yet; left out",
    "sctp": "SCTP is not forwarded yet; this port is left out",
    "node-port": "node ports are not served yet; left out",
    "external-policy-local": "not honoured yet: clients from outside reach endpoints on every node",
    "internal-policy-local": "not honoured yet: clients reach endpoints on every node",
    "affinity": "not honoured yet: each connection of a client may reach another endpoint",
    "source-ranges": "not honoured yet; the load balancer's addresses are left out, so that nobody else gets in",
    "health-check": "not served yet",
    "weights": "not honoured yet: every endpoint has the same share",
    "hints": "topology hints are not honoured yet: endpoints of every zone are chosen from",
    "forwarding": "not honoured yet: nat is used",
    "scheduler": "not honoured yet: maglev is used",
    "admit": "not honoured yet: userspace admits new connections",
    "timeouts": "not honoured yet: the defaults are used",
    "mid-stream": "not honoured yet: connections are adopted in mid-stream",
    "endpoint-removed": "not honoured yet: connections to a removed endpoint go on",
}

DEFAULT_AFFINITY_S = 10800
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_]{1,63}")
_LONGEST_KEY = 100
_FAMILIES = ((4, "IPv4"), (6, "IPv6"))


class FrontendKind(StrEnum):
    """Why a Service answers at an address."""

    CLUSTER_IP = "ClusterIP"
    EXTERNAL_IP = "ExternalIP"
    LOAD_BALANCER = "LoadBalancer"
    NODE_PORT = "NodePort"


class EndpointState(StrEnum):
    """What an endpoint may be given. Only READY and, when nothing is ready, SERVING take new connections."""

    READY = "ready"
    SERVING = "serving"  # terminating, but it still answers
    TERMINATING = "terminating"
    UNREADY = "unready"


# What was written.


class PortSpec(NamedTuple):
    """An entry of a Service's spec.ports. `node_port` is 0 for none; targetPort is not read (S4)."""

    name: str
    port: int
    protocol: str = "TCP"
    node_port: int = 0


class Ingress(NamedTuple):
    """An entry of status.loadBalancer.ingress that is captured: mode VIP, or none given (S6)."""

    address: IPAddress
    place: int  # counts from 0


@dataclass(frozen=True, slots=True)
class Options:
    """The annotations turnout.dev/... of a Service."""

    forwarding: str = "nat"
    scheduler: str = "maglev"
    admit: str = "userspace"
    when_stalled: str = "drop"
    mid_stream: str = "adopt"
    endpoint_removed: str = "keep"
    weights: tuple[tuple[IPAddress, int], ...] = ()
    timeouts_s: tuple[tuple[str, int], ...] = ()


DEFAULT_OPTIONS = Options()


@dataclass(frozen=True, slots=True)
class Service:
    """A Service as written, with Kubernetes' defaults. No cluster IPs: headless, or none was assigned."""

    namespace: str
    name: str
    type: str = "ClusterIP"
    cluster_ips: tuple[IPAddress, ...] = ()
    is_headless: bool = False  # clusterIP says None
    ports: tuple[PortSpec, ...] = ()
    external_ips: tuple[IPAddress, ...] = ()
    ingress: tuple[Ingress, ...] = ()
    source_ranges: tuple[IPNetwork, ...] = ()
    external_traffic_policy: str = "Cluster"
    internal_traffic_policy: str = "Cluster"
    health_check_node_port: int = 0
    affinity_s: int = 0  # 0: sessionAffinity None
    proxy_name: str | None = None  # label service-proxy-name: somebody else's, ignored (S1)
    options: Options = DEFAULT_OPTIONS
    uid: str = ""
    created: str = ""

    @property
    def is_proxied(self) -> bool:
        """Whether this Service is ours to answer for."""
        return self.type != "ExternalName" and not self.is_headless and self.proxy_name is None


class SlicePort(NamedTuple):
    """An entry of an EndpointSlice's ports. Without a name (not even an empty one) or a port it is ignored (E2)."""

    name: str | None
    port: int | None
    protocol: str = "TCP"


class SliceEndpoint(NamedTuple):
    """An entry of an EndpointSlice's endpoints, its first address."""

    address: IPAddress
    state: EndpointState
    node_name: str | None = None
    zone: str | None = None
    zone_hints: tuple[str, ...] = ()
    node_hints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """An EndpointSlice as written. `service_name` is None without the label that joins it to a Service (E1)."""

    namespace: str
    name: str
    service_name: str | None
    address_type: str
    ports: tuple[SlicePort, ...] = ()
    endpoints: tuple[SliceEndpoint, ...] = ()
    is_headless: bool = False
    proxy_name: str | None = None

    @property
    def is_used(self) -> bool:
        """Whether this slice can belong to a Service of ours."""
        return (
            self.service_name is not None
            and not self.is_headless
            and self.proxy_name is None
            and self.address_type != "FQDN"
        )


# What follows.


class NodeView(NamedTuple):
    """Who looks: the node's name (as in an endpoint's nodeName) and its zone; empty when unknown."""

    name: str = ""
    zone: str = ""


SOMEWHERE = NodeView()


class Frontend(NamedTuple):
    """Where clients dial. `address` is None for a node port: any address of the node."""

    kind: FrontendKind
    address: IPAddress | None
    port: int


class Endpoint(NamedTuple):
    """Where connections go to."""

    address: IPAddress
    port: int
    state: EndpointState
    is_local: bool
    zone: str | None
    zone_hints: tuple[str, ...]
    node_hints: tuple[str, ...]
    weight: int


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a Service in one address family, as the dataplane programs it. Equal when nothing changed."""

    namespace: str
    name: str
    port_name: str
    port: int
    protocol: str
    family: int  # 4 or 6
    frontends: tuple[Frontend, ...]
    endpoints: tuple[Endpoint, ...]  # all that the slices name, usable or not
    cluster: tuple[Endpoint, ...]  # candidates wherever they are (E5, E6)
    local: tuple[Endpoint, ...]  # candidates on this node (E7)
    external_traffic_policy: str
    internal_traffic_policy: str
    affinity_s: int
    source_ranges: tuple[IPNetwork, ...] | None  # None: no filter; (): nobody (S7)
    options: Options

    @property
    def key(self) -> str:
        """Return "namespace/name:port", the port by its name if it has one."""
        return f"{self.namespace}/{self.name}:{self.port_name or self.port}"

    @property
    def identity(self) -> tuple[str, str, str, int, str, int]:
        """Return what is this port's alone among all of a snapshot."""
        return self.namespace, self.name, self.port_name, self.port, self.protocol, self.family

    def candidates(self, kind: FrontendKind) -> tuple[Endpoint, ...]:
        """Return the endpoints that a new connection to a frontend of this kind may go to."""
        is_internal = kind is FrontendKind.CLUSTER_IP
        policy = self.internal_traffic_policy if is_internal else self.external_traffic_policy
        return self.local if policy == "Local" else self.cluster


class NotHonoured(NamedTuple):
    """Something that was asked for and is not done."""

    object: str
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.object}: {self.field}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that one node is to do, in the order of the Services."""

    ports: tuple[ServicePort, ...]
    not_honoured: tuple[NotHonoured, ...]


class Claim(NamedTuple):
    """An address, port and protocol that a Service wants for itself, and the field that says so."""

    address: IPAddress | None  # None: every address of the node
    port: int
    protocol: str
    path: tuple[str | int, ...]


def vips(service: Service) -> Iterator[tuple[FrontendKind, IPAddress, tuple[str | int, ...]]]:
    """Yield the addresses that a Service answers at, allowed or not, each once, with the field that it comes from."""
    if not (service.external_ips or service.ingress):
        yield from _written_vips(service)  # one of each family: nothing comes twice
        return
    seen: set[IPAddress] = set()
    for kind, address, path in _written_vips(service):
        if address not in seen:
            seen.add(address)
            yield kind, address, path


def _written_vips(service: Service) -> Iterator[tuple[FrontendKind, IPAddress, tuple[str | int, ...]]]:
    for index, address in enumerate(service.cluster_ips):
        yield FrontendKind.CLUSTER_IP, address, ("spec", "clusterIPs", index) if index else ("spec", "clusterIP")
    for index, address in enumerate(service.external_ips):
        yield FrontendKind.EXTERNAL_IP, address, ("spec", "externalIPs", index)
    for address, place in service.ingress:
        yield FrontendKind.LOAD_BALANCER, address, ("status", "loadBalancer", "ingress", place, "ip")


def claims(service: Service) -> Iterator[Claim]:
    """Yield what no other Service may want as well (S13): each VIP with each port, and the node ports."""
    if not service.is_proxied:
        return
    for _, address, path in vips(service):
        for port in service.ports:
            yield Claim(address, port.port, port.protocol, path)
    for index, port in enumerate(service.ports):
        if port.node_port:
            yield Claim(None, port.node_port, port.protocol, ("spec", "ports", index, "nodePort"))
    if service.health_check_node_port:
        yield Claim(None, service.health_check_node_port, "TCP", ("spec", "healthCheckNodePort"))


def slices_by_service(slices: Iterable[EndpointSlice]) -> dict[tuple[str, str], list[EndpointSlice]]:
    """Return the slices that are joined to each Service, by (namespace, name)."""
    joined: dict[tuple[str, str], list[EndpointSlice]] = defaultdict(list)
    for endpoint_slice in slices:
        if endpoint_slice.is_used:
            joined[endpoint_slice.namespace, endpoint_slice.service_name or ""].append(endpoint_slice)
    return joined


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
    joined = slices_by_service(slices)
    ports: list[ServicePort] = []
    not_honoured: list[NotHonoured] = []
    with no_collections():
        for service in services:
            mine = joined.get((service.namespace, service.name), ())
            resolved, refused = resolve_service(service, mine, node, allow_external_ips, not_yet)
            ports += resolved
            not_honoured += refused
    return Snapshot(tuple(ports), tuple(not_honoured))


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
    left_out = _LeftOut(service, not_yet)
    addresses = _allowed_vips(service, allow_external_ips, left_out)
    left_out.look_at_fields(slices)
    ports: list[ServicePort] = []
    for family, address_type in _FAMILIES:
        if family == 6 and "ipv6" in not_yet:
            continue
        vips_of_family = [pair for pair in addresses if pair[1].version == family]
        has_node_ports = "node-port" not in not_yet and _has_family(service, family)
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
                ports.append(_service_port(service, port, family, frontends, slices_of_family, node, not_yet))
    return ports, left_out.found


def _service_port(
    service: Service,
    port: PortSpec,
    family: int,
    frontends: Sequence[Frontend],
    slices: Sequence[EndpointSlice],
    node: NodeView,
    not_yet: Mapping[str, str],
) -> ServicePort:
    endpoints = _endpoints(service, port, slices, node, not_yet)
    hints = "hints" not in not_yet
    return ServicePort(
        service.namespace,
        service.name,
        port.name,
        port.port,
        port.protocol,
        family,
        tuple(frontends),
        endpoints,
        cluster_candidates(endpoints, node) if hints else _usable(endpoints),
        _usable([endpoint for endpoint in endpoints if endpoint.is_local]),
        "Cluster" if "external-policy-local" in not_yet else service.external_traffic_policy,
        "Cluster" if "internal-policy-local" in not_yet else service.internal_traffic_policy,
        0 if "affinity" in not_yet else service.affinity_s,
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
    service: Service, port: PortSpec, slices: Sequence[EndpointSlice], node: NodeView, not_yet: Mapping[str, str]
) -> tuple[Endpoint, ...]:
    """Return the endpoints of one port, each address and port once (E4)."""
    found: dict[tuple[int, int], Endpoint] = {}
    weights = dict(service.options.weights) if "weights" not in not_yet else None
    for part in slices:
        for name, number, protocol in part.ports:
            if name != port.name or protocol != port.protocol or not number:
                continue
            for address, state, node_name, zone, zone_hints, node_hints in part.endpoints:
                is_local = node_name is not None and node_name == node.name
                weight = weights.get(address, 1) if weights else 1
                key = int(address), number
                other = found.get(key)
                # A pod that is replaced may be in two slices for a while: it is as alive as the livelier says.
                if other is None or _RANK[state] > _RANK[other.state]:
                    found[key] = Endpoint(address, number, state, is_local, zone, zone_hints, node_hints, weight)
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
    service: Service, allow_external_ips: Sequence[IPNetwork], left_out: _LeftOut
) -> list[tuple[FrontendKind, IPAddress]]:
    """Return the VIPs to program; the others are noted in `left_out`."""
    allowed: list[tuple[FrontendKind, IPAddress]] = []
    for kind, address, path in vips(service):
        if address.version == 6 and "ipv6" in left_out.not_yet:
            left_out.notes("ipv6", dotted(path))
            continue
        if kind is FrontendKind.EXTERNAL_IP and not any(address in network for network in allow_external_ips):
            left_out.add(dotted(path), f"{address} is in no network of --allow-external-ips; left out")
            continue
        if (
            kind is FrontendKind.LOAD_BALANCER
            and ranges_of_family(service.source_ranges, address.version) is not None
            and "source-ranges" in left_out.not_yet
        ):
            continue  # fails closed; `look_at_fields` names it
        allowed.append((kind, address))
    return allowed


class _LeftOut:
    """Collects what one Service asks for in vain."""

    def __init__(self, service: Service, not_yet: Mapping[str, str]) -> None:
        self.service = service
        self.not_yet = not_yet
        self.found: list[NotHonoured] = []

    def add(self, field: str, reason: str) -> None:
        """Note `field`."""
        self.found.append(NotHonoured(f"Service {self.service.namespace}/{self.service.name}", field, reason))

    def notes(self, feature: str, field: str) -> bool:
        """Note `field` if the feature behind it is not there yet, and return whether it was noted."""
        if feature not in self.not_yet:
            return False
        self.add(field, self.not_yet[feature])
        return True

    def look_at_fields(self, slices: Sequence[EndpointSlice]) -> None:
        """Note every other field of the Service, and of its slices, that wants what is not there yet."""
        service = self.service
        if not (service.cluster_ips or service.external_ips or service.ingress):
            self.add("spec.clusterIP", "no address to answer at; set one (in a cluster the apiserver does that)")
        for index, port in enumerate(service.ports):
            if port.protocol == "SCTP":
                self.notes("sctp", f"spec.ports[{index}].protocol")
            if port.node_port:
                self.notes("node-port", f"spec.ports[{index}].nodePort")
        if service.external_traffic_policy == "Local":
            self.notes("external-policy-local", "spec.externalTrafficPolicy")
        if service.internal_traffic_policy == "Local":
            self.notes("internal-policy-local", "spec.internalTrafficPolicy")
        if service.affinity_s:
            self.notes("affinity", "spec.sessionAffinity")
        if service.source_ranges and service.ingress:
            self.notes("source-ranges", "spec.loadBalancerSourceRanges")
        if service.health_check_node_port:
            self.notes("health-check", "spec.healthCheckNodePort")
        if any(endpoint.zone_hints or endpoint.node_hints for part in slices for endpoint in part.endpoints):
            self.notes("hints", "endpoints[].hints")
        if service.options is not DEFAULT_OPTIONS:
            self.look_at_options(service.options)

    def look_at_options(self, options: Options) -> None:
        """Note every annotation that wants what is not there yet."""
        for attribute, feature in _OPTION_FEATURES.items():
            if getattr(options, attribute) != getattr(DEFAULT_OPTIONS, attribute):
                name = attribute.removesuffix("_s").replace("_", "-")
                self.notes(feature, f"metadata.annotations[turnout.dev/{name}]")


# Annotations that need a feature. `when_stalled` is missing because it is honoured.
_OPTION_FEATURES = {
    "forwarding": "forwarding",
    "scheduler": "scheduler",
    "admit": "admit",
    "mid_stream": "mid-stream",
    "endpoint_removed": "endpoint-removed",
    "weights": "weights",
    "timeouts_s": "timeouts",
}


def dotted(path: Iterable[str | int]) -> str:
    """Return a path as people write it: spec.ports[0].port, metadata.annotations[turnout.dev/weights].

    Keys come from files: what a terminal would act on is escaped, what is endless is cut.
    """
    text = ""
    for step in path:
        if isinstance(step, str) and _PLAIN_KEY.fullmatch(step):
            text += f".{step}" if text else step
        else:
            key = str(step)[:_LONGEST_KEY]
            text += f"[{key if key.isprintable() else ascii(key)[1:-1]}]"
    return text
