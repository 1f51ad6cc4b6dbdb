"""The kernel's view of the network as plain data, and where a packet for a destination goes by it. No I/O.

The same choice as the kernel's for packets without TOS and without policy rules: the longest prefix; of equal ones the
table local before main, then the lowest metric.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from dataplane.netdev import TABLE_LOCAL, Interface, Neighbour, NeighbourKey, NeighbourState, Route, RouteKind
from xdp.schema import HopState

_USABLE = (
    NeighbourState.REACHABLE
    | NeighbourState.STALE
    | NeighbourState.DELAY
    | NeighbourState.PROBE
    | NeighbourState.NOARP
    | NeighbourState.PERMANENT
)
HOST_BITS = 32


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


def mask(prefix_len: int) -> int:
    """Return the netmask of a prefix length as a number."""
    return (0xFFFFFFFF << (HOST_BITS - prefix_len)) & 0xFFFFFFFF


class Hop(NamedTuple):
    """Where packets for a destination go next. `mac`, `source_mac` and `mtu` matter with HOP_FORWARD only."""

    state: HopState
    ifindex: int = 0
    via: int = 0  # the neighbour's address: a gateway or the destination itself; 0: none
    mac: bytes = b""
    source_mac: bytes = b""
    mtu: int = 0

    @property
    def neighbour(self) -> NeighbourKey | None:
        """Return the neighbour entry that this depends on."""
        return (self.ifindex, self.via) if self.via else None


NOWHERE = Hop(HopState.UNRESOLVED)


class Mirror:
    """Interfaces, routes and neighbours as last read, and those of our interfaces."""

    def __init__(self, our_names: Collection[str]) -> None:
        self._our_names = frozenset(our_names)
        self._by_length: dict[int, dict[int, Route]] = {}  # longest prefix first
        self.interfaces: dict[int, Interface] = {}
        self.neighbours: dict[NeighbourKey, Neighbour] = {}

    def set_interfaces(self, interfaces: Iterable[Interface]) -> None:
        """Replace all interfaces."""
        self.interfaces = {interface.ifindex: interface for interface in interfaces}

    def set_routes(self, routes: Iterable[Route]) -> None:
        """Replace all routes; of several for one prefix the kernel's choice is kept."""
        by_length: dict[int, dict[int, Route]] = {}
        for route in routes:
            of_length = by_length.setdefault(route.prefix_len, {})
            other = of_length.get(route.network)
            if other is None or _precedence(route) < _precedence(other):
                of_length[route.network] = route
        self._by_length = dict(sorted(by_length.items(), reverse=True))

    def set_neighbours(self, neighbours: Iterable[Neighbour]) -> None:
        """Replace all neighbours."""
        self.neighbours = {neighbour.key: neighbour for neighbour in neighbours}

    def routes(self) -> Iterator[Route]:
        """Yield the routes that count, longest prefix first, by network within a length."""
        for of_length in self._by_length.values():
            for network in sorted(of_length):
                yield of_length[network]

    def match(self, address: int, longest: int = HOST_BITS) -> Route | None:
        """Return the route of an address among those of at most `longest` bits."""
        for prefix_len, of_length in self._by_length.items():
            if prefix_len <= longest:
                route = of_length.get(address & mask(prefix_len))
                if route is not None:
                    return route
        return None

    def is_ours(self, ifindex: int) -> bool:
        """Return whether we may transmit on an interface."""
        interface = self.interfaces.get(ifindex)
        return interface is not None and interface.name in self._our_names

    def is_on_link(self, route: Route | None) -> bool:
        """Return whether each destination of the route is a neighbour of its own, on one of our interfaces."""
        return (
            route is not None and route.kind is RouteKind.UNICAST and not route.gateway and self.is_ours(route.ifindex)
        )

    def hop(self, network: int, prefix_len: int) -> Hop:
        """Return the next hop of a host (32 bits) or of what a route of that prefix covers.

        A prefix is resolved by its own route, or, when that was withdrawn, by the one that now covers it. If that one
        is on the link, a whole network has no single next hop and is unresolved.
        """
        route = self.match(network, prefix_len)
        if route is None:
            return NOWHERE
        if route.kind is RouteKind.LOCAL:
            return Hop(HopState.FOREIGN, route.ifindex)
        interface = self.interfaces.get(route.ifindex)
        if route.kind is not RouteKind.UNICAST or interface is None or not interface.is_up:
            return NOWHERE
        mtu = min(interface.mtu, route.mtu) if route.mtu else interface.mtu
        if not self.is_ours(route.ifindex) or not interface.mac:
            return Hop(HopState.FOREIGN, route.ifindex, mtu=mtu)
        via = route.gateway or (network if prefix_len == HOST_BITS else 0)
        neighbour = self.neighbours.get((route.ifindex, via)) if via else None
        if neighbour is None or not is_usable(neighbour):
            return Hop(HopState.UNRESOLVED, route.ifindex, via, mtu=mtu)
        return Hop(HopState.FORWARD, route.ifindex, via, neighbour.mac, interface.mac, mtu)


def _precedence(route: Route) -> tuple[bool, int]:
    """Return what decides between routes of one prefix: the lower one wins."""
    return route.table != TABLE_LOCAL, route.metric
