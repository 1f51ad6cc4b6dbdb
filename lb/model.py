"""What Kubernetes' Service and EndpointSlice say, and what one node makes of them, as plain data.

`Service` and `EndpointSlice` hold what was written, with defaults filled in; they come from files (lb/manifests.py) or
from an apiserver. A `Snapshot` is what follows from them for one node (lb/resolve.py): every Service port with the
frontends to program and the endpoints to choose from. The ids in comments (S7, E5) are those of docs/behaviours.md.

Addresses are `ipaddress` objects everywhere. Protocols, types and policies are Kubernetes' own words. What exists a
hundred thousand times is a named tuple, which costs a third of a frozen dataclass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from xdp.addresses import IPAddress, IPNetwork

DEFAULT_AFFINITY_S = 10800


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


class AdminState(StrEnum):
    """What an operator wants of an endpoint, whatever its EndpointSlice says."""

    READY = "ready"
    DRAIN = "drain"  # no new connections
    MAINT = "maint"  # nor those that it has


class Said(NamedTuple):
    """An operator's word of an endpoint."""

    state: AdminState
    deadline_s: float | None = None  # of a drain, by a clock that never jumps: from then on it is maintenance


Place = tuple[IPAddress, int]  # of an endpoint: address and port


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
    when_stalled: str = "admit"
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
    who: str = ""  # the uid of its targetRef, if it has one


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
    who: str = ""  # told apart from another Pod at this place by it, if it is told (C9)


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


class HealthCheck(NamedTuple):
    """A port of the node at which load balancers ask how many endpoints of a Service are here, and ready (S10).

    One for each family, at the node's addresses of it: a Pod with addresses of both is one endpoint to who asks.
    """

    namespace: str
    name: str
    port: int
    local_endpoints: int
    family: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that one node is to do, in the order of the Services."""

    ports: tuple[ServicePort, ...]
    not_honoured: tuple[NotHonoured, ...]
    health_checks: tuple[HealthCheck, ...] = ()


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
    found: dict[IPAddress, tuple[FrontendKind, tuple[str | int, ...]]] = {}
    for kind, address, path in _written_vips(service):
        if address not in found or _outdoes(kind, found[address][0], service):
            found[address] = kind, path
    for address, (kind, path) in found.items():
        yield kind, address, path


def _outdoes(kind: FrontendKind, other: FrontendKind, service: Service) -> bool:
    """Return whether an address that is written as `other` is served as `kind`, which comes behind it.

    An address of a load balancer is not lost because it is an external one, too, which may not be allowed; and source
    ranges hold at it, whatever else it is (S7; kube-proxy's nftables filter by address and port before they translate).
    """
    if kind is not FrontendKind.LOAD_BALANCER:
        return False
    return other is FrontendKind.EXTERNAL_IP or (other is FrontendKind.CLUSTER_IP and bool(service.source_ranges))


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
