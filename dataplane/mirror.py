"""The kernel's view of the network as plain data, and where a packet for a destination goes by it. No I/O.

The same choice as the kernel's for packets without TOS and without policy rules: the longest prefix; of equal ones the
table local before main, then the lowest metric. Addresses are numbers of both families (xdp/addresses.py), and a
route leads to its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from dataplane.netdev import TABLE_LOCAL, Interface, Neighbour, NeighbourKey, NeighbourState, Route, RouteKind, Way
from xdp.addresses import IPAddress, IPNetwork, address_of, host_bits, is_ipv6, masked
from xdp.schema import HopState

_USABLE = (
    NeighbourState.REACHABLE
    | NeighbourState.STALE
    | NeighbourState.DELAY
    | NeighbourState.PROBE
    | NeighbourState.NOARP
    | NeighbourState.PERMANENT
)


def is_usable(neighbour: Neighbour | None) -> bool:
    """Return whether frames can be sent to the neighbour: the kernel believes its MAC address."""
    return neighbour is not None and bool(neighbour.state & _USABLE) and len(neighbour.mac) == 6


def is_fixed(neighbour: Neighbour | None) -> bool:
    """Return whether an administrator has set the entry: it needs no probes, and must not be touched."""
    return neighbour is not None and bool(neighbour.state & (NeighbourState.PERMANENT | NeighbourState.NOARP))


def left_with_the_kernel(neighbours: Iterable[Neighbour], ifindexes: Collection[int]) -> list[NeighbourKey]:
    """Return which entries on these interfaces we have asked for; the kernel does not age them until they are let go.

    The mark stays when an administrator then fixes an entry: such are not ours any more.
    """
    return [
        neighbour.key
        for neighbour in neighbours
        if neighbour.is_ours and neighbour.ifindex in ifindexes and not is_fixed(neighbour)
    ]


class Hop(NamedTuple):
    """Where packets for a destination go next. All but the first three matter with HOP_FORWARD only."""

    state: HopState
    ifindex: int = 0
    via: int = 0  # the neighbour's address: a gateway or the destination itself; 0: none
    mac: bytes = b""
    source_mac: bytes = b""
    mtu: int = 0
    source: int = 0  # the node's own address on the way there; 0: none

    @property
    def neighbour(self) -> NeighbourKey | None:
        """Return the neighbour entry that this depends on."""
        return (self.ifindex, self.via) if self.via else None


NOWHERE = Hop(HopState.UNRESOLVED)


class Mirror:
    """Interfaces, routes and neighbours as last read, and those of our interfaces."""

    def __init__(self, our_names: Collection[str]) -> None:
        self._our_names = tuple(our_names)
        self.given: dict[str, Interface] = {}  # those of our names, as they are called now
        self._ours: frozenset[int] = frozenset()
        self._by_length: dict[int, _ByLength] = {32: {}, 128: {}}  # by the bits of an address of the family
        self.interfaces: dict[int, Interface] = {}
        self.neighbours: dict[NeighbourKey, Neighbour] = {}

    def set_interfaces(self, interfaces: Iterable[Interface]) -> None:
        """Replace all interfaces.

        A given name means the interface that is called so. One that is renamed is still meant, by its number, until
        another takes the name.
        """
        self.interfaces = {interface.ifindex: interface for interface in interfaces}
        by_name = {interface.name: interface for interface in self.interfaces.values()}
        given = {}
        for name in self._our_names:
            link = by_name.get(name)
            if link is None and name in self.given:
                link = self.interfaces.get(self.given[name].ifindex)
                if link is not None and link.name in self._our_names:  # it is that one now
                    link = None
            if link is not None:
                given[name] = link
        self.given = given
        self._ours = frozenset(link.ifindex for link in given.values())

    def set_routes(self, routes: Iterable[Route]) -> None:
        """Replace all routes; of several for one prefix the kernel's choice is kept."""
        by_length: dict[int, _ByLength] = {32: {}, 128: {}}
        for route in routes:
            of_length = by_length[host_bits(route.network)].setdefault(route.prefix_len, {})
            other = of_length.get(route.network)
            if other is None or _precedence(route) < _precedence(other):
                of_length[route.network] = route
        self._by_length = {bits: dict(sorted(lengths.items(), reverse=True)) for bits, lengths in by_length.items()}

    def set_neighbours(self, neighbours: Iterable[Neighbour]) -> None:
        """Replace all neighbours."""
        self.neighbours = {neighbour.key: neighbour for neighbour in neighbours}

    def routes(self) -> Iterator[Route]:
        """Yield the routes that count: IPv4's before IPv6's, longest prefix first, by network within a length."""
        for lengths in self._by_length.values():
            for of_length in lengths.values():
                for network in sorted(of_length):
                    yield of_length[network]

    def own_addresses(self) -> frozenset[IPAddress]:
        """Return the addresses of this node, on whatever interface, without those of the loopback network.

        IPv6's link-local ones are not among them.
        """
        return frozenset(address for address, _ in self._own() if not address.is_loopback)

    def is_own(self, address: int) -> bool:
        """Return whether an address is the node's own."""
        bits = host_bits(address)
        route = self._by_length[bits].get(bits, {}).get(address)
        return route is not None and route.kind is RouteKind.LOCAL

    def node_port_addresses(self, networks: Collection[IPNetwork] = ()) -> tuple[IPAddress, ...]:
        """Return which of them node ports are served at: those in `networks` or, without any, of our interfaces.

        Those of IPv4 first, ascending.
        """
        found = [
            address
            for address, ifindex in self._own()
            if not address.is_loopback
            and (any(address in network for network in networks) if networks else self.is_ours(ifindex))
        ]
        return tuple(sorted(found, key=lambda address: (address.version, int(address))))

    def _own(self) -> Iterator[tuple[IPAddress, int]]:
        for bits in self._by_length:
            for number, ifindex in self._own_of(bits):
                yield address_of(number), ifindex

    def _own_of(self, bits: int) -> Iterator[tuple[int, int]]:
        """Yield (address, interface) of the node's own addresses of the family that has so many bits."""
        for route in self._by_length[bits].get(bits, {}).values():
            if route.kind is RouteKind.LOCAL:
                yield route.network, route.ifindex

    def match(self, address: int, longest: int = 128) -> Route | None:
        """Return the route of an address among those of at most `longest` bits."""
        for prefix_len, of_length in self._by_length[host_bits(address)].items():
            if prefix_len <= longest:
                route = of_length.get(masked(address, prefix_len))
                if route is not None:
                    return route
        return None

    def _source(self, route: Route, way: Way, destination: int) -> int:
        """Return the node's address for what goes by a way: the route's choice, that of the link to the gateway, any.

        Any of the same interface: the lowest or, of IPv6, the one with the most leading bits in common with the
        destination (RFC 6724, rule 8), the lowest of several; 0 if there is none.
        """
        if route.preferred_source:
            return route.preferred_source
        bits = host_bits(destination)
        link = self.match(way.gateway) if way.gateway and host_bits(way.gateway) == bits else None
        if link is not None and link.preferred_source and link.ifindex == way.ifindex:
            return link.preferred_source
        candidates = (address for address, ifindex in self._own_of(bits) if ifindex == way.ifindex)
        if not is_ipv6(destination):
            return min(candidates, default=0)
        return min(candidates, key=lambda own: ((own ^ destination).bit_length(), own), default=0)

    def is_ours(self, ifindex: int) -> bool:
        """Return whether we may transmit on an interface."""
        return ifindex in self._ours

    def is_on_link(self, route: Route | None) -> bool:
        """Return whether each destination of the route is a neighbour of its own, on one of our interfaces."""
        return (
            route is not None and route.kind is RouteKind.UNICAST and not route.gateway and self.is_ours(route.ifindex)
        )

    def hop(self, network: int, prefix_len: int) -> Hop:
        """Return the next hop of a host (all bits) or of what a route of that prefix covers.

        A prefix is resolved by its own route, or, when that was withdrawn, by the one that now covers it. If that one
        is on the link, a whole network has no single next hop and is unresolved.
        """
        route = self.match(network, prefix_len)
        if route is None:
            return NOWHERE
        if route.kind is RouteKind.LOCAL:
            return Hop(HopState.FOREIGN, route.ifindex)
        if route.kind is not RouteKind.UNICAST:
            return NOWHERE
        ways = [self._hop_by(route, way, network, prefix_len) for way in route.ways]
        return min(ways, key=self._hopelessness)

    def _hop_by(self, route: Route, way: Way, network: int, prefix_len: int) -> Hop:
        """Return the next hop by one of the ways of a route: its gateway or, of a host on the link, the host itself."""
        ifindex, via = way.ifindex, way.gateway or (network if prefix_len == host_bits(network) else 0)
        interface = self.interfaces.get(ifindex)
        if interface is None or not interface.is_up:
            return NOWHERE
        mtu = min(interface.mtu, route.mtu) if route.mtu else interface.mtu
        if not self.is_ours(ifindex) or not interface.mac:
            return Hop(HopState.FOREIGN, ifindex, mtu=mtu)
        neighbour = self.neighbours.get((ifindex, via)) if via else None
        if neighbour is None or not is_usable(neighbour):
            return Hop(HopState.UNRESOLVED, ifindex, via, mtu=mtu)
        return Hop(HopState.FORWARD, ifindex, via, neighbour.mac, interface.mac, mtu, self._source(route, way, network))

    def _hopelessness(self, hop: Hop) -> int:
        """Return what decides between the ways of a route: the lowest wins, the first of several.

        One that may still be resolved is better than one whose neighbour has been found silent, so that a failure
        makes the next way be tried; when that fails, too, the kernel has forgotten about the first.
        """
        if hop.state is HopState.FORWARD:
            return 0
        if hop.state is HopState.FOREIGN:
            return 2
        known = self.neighbours.get(hop.neighbour) if hop.neighbour else None
        if hop.ifindex and not (known is not None and known.state & NeighbourState.FAILED):
            return 1
        return 3 if hop.ifindex else 4


_ByLength = dict[int, dict[int, Route]]  # by prefix length, longest first, and by network


def _precedence(route: Route) -> tuple[bool, int]:
    """Return what decides between routes of one prefix: the lower one wins."""
    return route.table != TABLE_LOCAL, route.metric
