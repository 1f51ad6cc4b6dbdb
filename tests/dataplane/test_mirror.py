"""Where a packet goes by the kernel's view of the network: plain data in, a hop out."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest

from dataplane.mirror import NOWHERE, Hop, Mirror, is_fixed, is_usable
from dataplane.netdev import TABLE_LOCAL, Interface, Neighbour, NeighbourState, Route, RouteKind
from xdp.schema import HopState

OURS = Interface("eth0", 2, b"\2\0\0\0\0\2", 1500, is_up=True)
THEIRS = Interface("eth1", 3, b"\2\0\0\0\0\3", 9000, is_up=True)
DOWN = Interface("eth2", 4, b"\2\0\0\0\0\4", 1500, is_up=False)
TUNNEL = Interface("tun0", 5, b"", 1420, is_up=True)
MAC = b"\2\0\0\0\0\x63"


def number(text: str) -> int:
    return int(IPv4Address(text))


HOST, GATEWAY = number("10.0.0.9"), number("10.0.0.1")


def route(prefix: str, ifindex: int = OURS.ifindex, **fields: object) -> Route:
    network = IPv4Network(prefix)
    return Route(int(network.network_address), network.prefixlen, ifindex=ifindex, **fields)  # type: ignore[arg-type]


def mirror(*routes: Route, neighbours: tuple[Neighbour, ...] = ()) -> Mirror:
    made = Mirror(["eth0", "eth2", "tun0"])
    made.set_interfaces([OURS, THEIRS, DOWN, TUNNEL])
    made.set_routes(routes)
    made.set_neighbours(neighbours)
    return made


def neighbour(address: int, state: NeighbourState = NeighbourState.REACHABLE, mac: bytes = MAC) -> Neighbour:
    return Neighbour(OURS.ifindex, address, mac, state)


LINK, DEFAULT = route("10.0.0.0/24"), route("0.0.0.0/0", gateway=GATEWAY)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("routes", "chosen"),
    [
        pytest.param([DEFAULT, LINK, route("10.0.0.9/32", 3)], 2, id="the longest prefix"),
        pytest.param([route("10.0.0.0/24", metric=100), route("10.0.0.0/24", 3, metric=50)], 1, id="the lowest metric"),
        pytest.param(
            [route("10.0.0.0/24"), route("10.0.0.0/24", 3, table=TABLE_LOCAL, metric=9)], 1, id="the table local"
        ),
    ],
)
def test_of_several_routes_the_kernels_choice_is_taken(routes: list[Route], chosen: int, order: int):
    assert mirror(*routes[::order]).match(HOST) == routes[chosen]


def test_a_match_may_be_limited_to_short_prefixes():
    seen = mirror(DEFAULT, LINK)
    assert [seen.match(HOST, longest) for longest in (32, 24, 23, 0)] == [LINK, LINK, DEFAULT, DEFAULT]
    assert mirror(LINK).match(HOST, 23) is None


def test_routes_come_longest_first_and_in_order():
    one, two = route("10.0.1.0/24"), route("10.0.0.9/32")
    assert list(mirror(DEFAULT, one, LINK, two).routes()) == [two, LINK, one, DEFAULT]


@pytest.mark.parametrize(
    ("routes", "hop"),
    [
        pytest.param([], NOWHERE, id="no route"),
        pytest.param([route("10.0.0.0/24", kind=RouteKind.BLACKHOLE)], NOWHERE, id="a black hole"),
        pytest.param([route("10.0.0.0/24", DOWN.ifindex)], NOWHERE, id="an interface that is down"),
        pytest.param([route("10.0.0.0/24", 99)], NOWHERE, id="an interface that is not there"),
        pytest.param([route("10.0.0.0/24", THEIRS.ifindex)], Hop(HopState.FOREIGN, 3, mtu=9000), id="not ours"),
        pytest.param([route("10.0.0.0/24", TUNNEL.ifindex)], Hop(HopState.FOREIGN, 5, mtu=1420), id="no Ethernet"),
        pytest.param([route("10.0.0.9/32", kind=RouteKind.LOCAL)], Hop(HopState.FOREIGN, 2), id="this host itself"),
        pytest.param([LINK], Hop(HopState.UNRESOLVED, 2, HOST, mtu=1500), id="a neighbour that is not known"),
        pytest.param([DEFAULT], Hop(HopState.FORWARD, 2, GATEWAY, MAC, OURS.mac, 1500), id="a gateway"),
        pytest.param(
            [route("0.0.0.0/0", gateway=GATEWAY, mtu=1400)],
            Hop(HopState.FORWARD, 2, GATEWAY, MAC, OURS.mac, 1400),
            id="a route with an MTU of its own",
        ),
    ],
)
def test_a_host_is_reached_as_its_route_says(routes: list[Route], hop: Hop):
    assert mirror(*routes, neighbours=(neighbour(GATEWAY),)).hop(HOST, 32) == hop


def test_a_network_on_the_link_has_no_single_next_hop():
    hop = mirror(LINK).hop(LINK.network, 24)
    assert (hop.state, hop.neighbour) == (HopState.UNRESOLVED, None)


def test_a_hop_depends_on_its_neighbour():
    assert mirror(DEFAULT).hop(HOST, 32).neighbour == (OURS.ifindex, GATEWAY)
    assert NOWHERE.neighbour is None


def test_on_link_are_routes_without_a_gateway_by_interfaces_of_ours():
    seen = mirror()
    assert seen.is_on_link(LINK)
    for other in (None, DEFAULT, route("10.0.0.0/24", THEIRS.ifindex), route("10.0.0.0/24", kind=RouteKind.PROHIBIT)):
        assert not seen.is_on_link(other)


@pytest.mark.parametrize("state", list(NeighbourState))
def test_a_neighbour_is_usable_while_the_kernel_believes_its_address(state: NeighbourState):
    believed = state not in (NeighbourState.INCOMPLETE, NeighbourState.FAILED)
    assert is_usable(neighbour(HOST, state)) is believed
    assert not is_usable(neighbour(HOST, state, b""))
    assert is_fixed(neighbour(HOST, state)) is (state in (NeighbourState.PERMANENT, NeighbourState.NOARP))
    assert not is_usable(None)
    assert not is_fixed(None)
