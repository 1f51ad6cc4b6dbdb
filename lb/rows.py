"""From what a node is to do to the rows that the packet path reads: addresses and numbers, no names."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import TYPE_CHECKING, NamedTuple

from lb.garbage import no_collections
from lb.model import (
    AdminState,
    Endpoint,
    EndpointState,
    FrontendKind,
    NotHonoured,
    Place,
    Said,
    Service,
    ServicePort,
    Snapshot,
)
from xdp.addresses import IPAddress, IPNetwork, number_of, with_port
from xdp.schema import Masquerade, MidStream, Protocol, Scheduler, WhenStalled

if TYPE_CHECKING:
    from xdp.names import Names  # brings compiled code with it, which reading manifests needs not

Address = tuple[IPAddress, int]
FrontendKey = tuple[IPAddress, int, int]  # address, port, protocol; port and protocol 0: the address is a VIP


Ranges = tuple[tuple[int, int], ...]  # first and last address, both included; ascending, disjoint


class ServiceRow(NamedTuple):
    """What the packet path needs to know of frontends that are to be treated alike."""

    frontends: tuple[FrontendKey, ...]
    endpoints: tuple[Address, ...]  # the candidates for new connections, each once
    when_stalled: WhenStalled = WhenStalled.ADMIT
    admits_here: bool = False  # XDP admits even while userspace is there
    is_elsewhere: bool = False  # there are endpoints, but none where the policy wants them (T8)
    ranges: Ranges | None = None  # the only clients that may come (S7); None: everybody
    local: frozenset[Address] = frozenset()  # which endpoints are on this node
    masquerade: Masquerade = Masquerade.NOBODY
    affinity_s: int = 0  # so long a client keeps its endpoint (S11); 0: it does not
    identity: int = 0  # of the Service port, 32 bits, where affinity needs it
    weights: tuple[tuple[Address, int], ...] = ()  # of endpoints, ascending, none zero; empty: they are equal
    scheduler: Scheduler = Scheduler.MAGLEV
    mid_stream: MidStream = MidStream.ADOPT  # what becomes of TCP segments of unknown connections (C11)
    timeouts: int = 0  # which set of them connections have (C5), as the flow table numbers them; 0: the default
    inside: ServiceRow | None = None  # without frontends: for clients inside the cluster (T4); None: all are alike
    tells_packets: bool = (
        True  # of packets it can be told who is inside; else `inside` is for sockets of the node alone
    )


@dataclass(frozen=True, slots=True)
class Here:
    """What the node itself adds to its Services."""

    node_port_addresses: tuple[IPAddress, ...] = ()
    masquerade: str = "none"  # or external, or all: settings.MASQUERADES
    knows_inside: tuple[int, ...] = ()  # families of which it is known which clients are inside the cluster
    administered: Mapping[Place, Said] = field(default_factory=dict)  # who is not ready for all, by an operator
    timeout_sets: Mapping[tuple[tuple[str, int], ...], int] = field(default_factory=dict)  # by what Services ask for
    leads_clients: bool = False  # those on the node itself, who are inside the cluster, to endpoints as they connect
    vips: Mapping[FrontendKey, str] = field(default_factory=dict)  # at node_port_addresses, and whose (`vips_at`)

    def state_of(self, endpoint: Endpoint) -> AdminState:
        """Return what the operator wants of an endpoint."""
        return self.said_of((endpoint.address, endpoint.port)).state

    def said_of(self, place: Place) -> Said:
        """Return the operator's word of the endpoint at a place."""
        return self.administered.get(place, _NOTHING_SAID)

    def has_timeouts(self, services: Iterable[Service]) -> bool:
        """Tell whether there is a set of timeouts for each of these Services."""
        return {service.options.timeouts_s for service in services} <= {(), *self.timeout_sets}

    def timeouts_of(self, port: ServicePort) -> int:
        """Return the number of a Service port's set of timeouts."""
        timeouts_s = port.options.timeouts_s
        return self.timeout_sets[timeouts_s] if timeouts_s else 0


NOTHING_HERE = Here()
_NOTHING_SAID = Said(AdminState.READY)
_SCHEDULERS = {
    "maglev": Scheduler.MAGLEV,
    "random": Scheduler.RANDOM,
    "round-robin": Scheduler.ROUND_ROBIN,
    "least-connections": Scheduler.LEAST_CONNECTIONS,
}


def vips_at(addresses: Collection[IPAddress], ports: Iterable[ServicePort]) -> dict[FrontendKey, str]:
    """Return the VIPs among addresses of the node, each with the key of the Service port that has it.

    A node port of the same number gives way there (S13), as kube-proxy looks at VIPs first: manifests alone do not tell
    that the two meet.
    """
    return {
        (address, number, int(Protocol[port.protocol])): port.key
        for port in (ports if addresses else ())
        for _, address, number in port.frontends
        if address in addresses and address is not None
    }


def hidden_node_ports(ports: Iterable[ServicePort], here: Here) -> Iterator[NotHonoured]:
    """Yield the node ports that give way to a VIP of another Service port."""
    for port in ports if here.vips else ():
        for kind, _, number in port.frontends:
            for own in here.node_port_addresses if kind is FrontendKind.NODE_PORT else ():
                owner = here.vips.get((own, number, int(Protocol[port.protocol])), port.key)
                if own.version == port.family and owner != port.key:
                    spot = f"{with_port(own, number)}/{port.protocol}"
                    why = f"node port {spot} is a VIP of Service port {owner}; left out at that address"
                    yield NotHonoured(f"Service {port.namespace}/{port.name}", "spec.ports", why)


def rows_of(snapshot: Snapshot, here: Here = NOTHING_HERE) -> list[ServiceRow]:
    """Return the rows of `snapshot`: one for the frontends of a Service port that are to be treated alike."""
    with no_collections():
        return [row for port in snapshot.ports for row in rows_of_port(port, here)]


def frontends_of(port: ServicePort, here: Here) -> Iterator[tuple[FrontendKind, FrontendKey]]:
    """Yield where clients dial a Service port: each with its kind, a node port at every address that serves them."""
    protocol = int(Protocol[port.protocol])
    for kind, address, number in port.frontends:
        if kind is FrontendKind.NODE_PORT:
            for own in here.node_port_addresses:
                frontend = own, number, protocol
                if own.version == port.family and not (here.vips and frontend in here.vips):
                    yield kind, frontend
        elif address is not None:
            yield kind, (address, number, protocol)


def has_endpoint(port: ServicePort, here: Here) -> bool:
    """Whether new connections to a Service port have an endpoint to go to, on whichever node."""
    return any(each.weight and here.state_of(each) is AdminState.READY for each in port.cluster)


def local_addresses(rows: Iterable[ServiceRow]) -> set[IPAddress]:
    """Return the addresses of all endpoints on this node."""
    found: set[IPAddress] = set()
    for row in rows:
        found.update(address for address, _ in row.local)
        if row.inside is not None:
            found.update(address for address, _ in row.inside.local)
    return found


def known_as(key: FrontendKey, names: Names) -> tuple[int, int, int]:
    """Return a frontend as packets know it, in host order: of IPv6 the number of its address's name, and the family."""
    address, port, protocol = key
    if address.version == 4:
        return int(address), port, protocol
    return names.find(address), port, protocol | Protocol.IPV6


def living(
    snapshot: Snapshot, here: Here, protocol: int, names: Names
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield (frontend, endpoint) of all connections of a protocol that have somebody to go on with, as numbers.

    The protocol is that of flows, with the family. An endpoint lives while it serves, whoever is chosen for new
    connections.
    """
    family = 6 if protocol & Protocol.IPV6 else 4
    for port in snapshot.ports:
        if port.family != family or Protocol[port.protocol] != protocol & ~Protocol.IPV6:
            continue
        places = [known_as((each.address, each.port, 0), names)[:2] for each in _alive(port, here)]
        for _, frontend in frontends_of(port, here):
            address, number, _ = known_as(frontend, names)
            for place in places:
                yield (address, number), place


def _alive(port: ServicePort, here: Here) -> list[Endpoint]:
    return [
        each
        for each in port.endpoints
        if each.state in (EndpointState.READY, EndpointState.SERVING) and here.state_of(each) != AdminState.MAINT
    ]


def echo_protocol(family: int) -> int:
    """Return the protocol of flows of echo requests."""
    return Protocol.ICMP if family == 4 else Protocol.ICMPV6 | Protocol.IPV6


def answering(
    snapshot: Snapshot, here: Here, family: int, names: Names
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield as `living` does (VIP, endpoint), both with port 0, of all echoes that have somebody to go on with.

    Those are endpoints of the VIP's lowest port (lb/table.py).
    """
    leading: dict[IPAddress, tuple[int, int, ServicePort]] = {}
    for port in snapshot.ports:
        for _, (vip, number, protocol) in frontends_of(port, here) if port.family == family else ():
            leads = leading.get(vip)
            if leads is None or (number, protocol) < leads[:2]:
                leading[vip] = number, protocol, port
    for vip, (_, _, port) in leading.items():
        for endpoint in {known_as((each.address, 0, 0), names)[0] for each in _alive(port, here)}:
            yield (known_as((vip, 0, 0), names)[0], 0), (endpoint, 0)


def impatient(snapshot: Snapshot, here: Here, protocol: int, names: Names) -> list[tuple[int, int]]:
    """Return the frontends, as numbers, of which connections are reset when their endpoint has gone (C8).

    The protocol is TCP, with the family.
    """
    family = 6 if protocol & Protocol.IPV6 else 4
    return [
        known_as(frontend, names)[:2]
        for port in snapshot.ports
        if port.protocol == "TCP" and port.family == family and port.options.endpoint_removed == "reset"
        for _, frontend in frontends_of(port, here)
    ]


def rows_of_port(port: ServicePort, here: Here = NOTHING_HERE) -> Iterator[ServiceRow]:
    """Yield the rows of one Service port: `rows_of` in small."""
    frontends: dict[ServiceRow, list[FrontendKey]] = {}
    for kind, frontend in frontends_of(port, here):
        frontends.setdefault(_row(port, kind, here), []).append(frontend)
    for row, its_frontends in frontends.items():
        yield row._replace(frontends=tuple(its_frontends))


def _row(port: ServicePort, kind: FrontendKind, here: Here) -> ServiceRow:
    """Return what is to become of connections to frontends of this kind."""
    row = _row_to(port, port.candidates(kind), here)._replace(timeouts=here.timeouts_of(port))
    if kind is FrontendKind.CLUSTER_IP:
        return row._replace(masquerade=_masquerade_inside(here, port.family))
    if kind is FrontendKind.LOAD_BALANCER:
        row = row._replace(ranges=ranges_of(port.source_ranges))
        if row.ranges is not None and row.mid_stream == MidStream.PASS:
            row = row._replace(mid_stream=MidStream.RESET)  # XDP, which passes, does not look at ranges
    if port.external_traffic_policy != "Local":
        return row._replace(masquerade=Masquerade.NOBODY if here.masquerade == "none" else Masquerade.REMOTE)
    tells_packets = port.family in here.knows_inside
    if (tells_packets or here.leads_clients) and port.cluster != port.local:
        inside = _row_to(port, port.cluster, here)._replace(timeouts=row.timeouts)
        return row._replace(inside=inside, tells_packets=tells_packets)
    return row


def _masquerade_inside(here: Here, family: int) -> Masquerade:
    """Return who is masqueraded on the way from a cluster IP (T2)."""
    if here.masquerade == "all":
        return Masquerade.EVERYBODY
    return Masquerade.OUTSIDE if here.masquerade == "external" and family in here.knows_inside else Masquerade.NOBODY


def _row_to(port: ServicePort, endpoints: tuple[Endpoint, ...], here: Here) -> ServiceRow:
    # Without weight no new connections, nor while an operator wants none.
    weighty = [each for each in endpoints if each.weight and here.state_of(each) is AdminState.READY]
    candidates = _places(weighty)
    are_equal = len({endpoint.weight for endpoint in weighty}) <= 1
    return ServiceRow(
        frontends=(),
        endpoints=candidates,
        weights=() if are_equal else tuple(sorted(zip(candidates, [each.weight for each in weighty], strict=True))),
        when_stalled=WhenStalled[port.options.when_stalled.upper()],
        admits_here=port.options.admit == "xdp",
        is_elsewhere=not endpoints and bool(port.cluster),
        local=frozenset(_places(endpoint for endpoint in weighty if endpoint.is_local)),
        affinity_s=port.affinity_s,
        scheduler=_SCHEDULERS[port.options.scheduler],
        mid_stream=MidStream[port.options.mid_stream.upper()],
        identity=zlib.crc32(repr(port.identity).encode()) if port.affinity_s else 0,
    )


def ranges_of(networks: Iterable[IPNetwork] | None) -> Ranges | None:
    """Return the first and last addresses of networks, IPv4's before IPv6's, in the form that packet paths search."""
    if networks is None:
        return None
    given = list(networks)
    fours = collapse_addresses([network for network in given if isinstance(network, IPv4Network)])
    sixes = collapse_addresses([network for network in given if isinstance(network, IPv6Network)])
    mine: list[IPNetwork] = [*fours, *sixes]
    return tuple((number_of(network[0]), number_of(network[-1])) for network in mine)


def _places(endpoints: Iterable[Endpoint]) -> tuple[Address, ...]:
    return tuple([(each.address, each.port) for each in endpoints])
