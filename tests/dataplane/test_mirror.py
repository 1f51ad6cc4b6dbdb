"""Where a packet goes by the kernel's view of the network: plain data in, a hop out."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest

from dataplane.mirror import NOWHERE, Hop, Mirror, is_fixed, is_usable
from dataplane.netdev import TABLE_LOCAL, Interface, Neighbour, NeighbourState, Route, RouteKind, Way
from xdp.addresses import number_of
from xdp.schema import HopState

OURS = Interface("eth0", 2, b"\2\0\0\0\0\2", 1500, is_up=True)
THEIRS = Interface("eth1", 3, b"\2\0\0\0\0\3", 9000, is_up=True)
DOWN = Interface("eth2", 4, b"\2\0\0\0\0\4", 1500, is_up=False)
TUNNEL = Interface("tun0", 5, b"", 1420, is_up=True)
MAC = b"\2\0\0\0\0\x63"


def number(text: str) -> int:
    return number_of(ip_address(text))


HOST, GATEWAY = number("10.0.0.9"), number("10.0.0.1")


def route(prefix: str, ifindex: int = OURS.ifindex, **fields: object) -> Route:
    network = ip_network(prefix)
    return Route(number_of(network.network_address), network.prefixlen, ifindex=ifindex, **fields)  # type: ignore[arg-type]


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


def test_of_several_next_hops_one_is_taken_that_can_be_used():
    """The first that is resolved; else one that may be, before one that has been found silent."""
    other, third = number("10.0.0.2"), number("10.0.0.3")
    several = route("0.0.0.0/0", gateway=GATEWAY, others=(Way(2, other), Way(DOWN.ifindex, third), Way(3, third)))
    silent = NeighbourState.FAILED

    def via(*neighbours: Neighbour) -> int:
        return mirror(several, neighbours=neighbours).hop(HOST, 32).via

    assert via() == GATEWAY
    assert via(neighbour(GATEWAY), neighbour(other)) == GATEWAY
    assert via(neighbour(other)) == other
    assert via(neighbour(GATEWAY, silent, b"")) == other
    assert via(neighbour(other, silent, b"")) == GATEWAY
    all_silent = mirror(several, neighbours=(neighbour(GATEWAY, silent, b""), neighbour(other, silent, b"")))
    assert all_silent.hop(HOST, 32) == Hop(HopState.FOREIGN, 3, mtu=9000)


def test_both_families_have_routes_of_their_own():
    link6, default6 = route("2001:db8::/64"), route("::/0", gateway=number("fe80::1"))
    seen = mirror(DEFAULT, default6, LINK, link6)
    assert list(seen.routes()) == [LINK, DEFAULT, link6, default6]
    for address, chosen in {
        "10.0.0.9": LINK,
        "8.8.8.8": DEFAULT,
        "2001:db8::9": link6,
        "2001:db8:1::": default6,
        "::a00:9": default6,
    }.items():
        assert seen.match(number(address)) == chosen
    assert mirror(LINK, DEFAULT).match(number("::a00:9")) is None
    assert mirror(default6).match(HOST) is None


@pytest.mark.parametrize("destination", ["10.9.0.9", "2001:db8:9::9"])
def test_a_gateway_may_be_one_of_ipv6_and_of_the_link(destination: str):
    """RFC 8950: also of an IPv4 route."""
    gateway = number("fe80::1")
    network = "10.9.0.0/16" if "." in destination else "2001:db8:9::/48"
    seen = mirror(route(network, gateway=gateway), neighbours=(neighbour(gateway),))
    bits = 32 if "." in destination else 128
    assert seen.hop(number(destination), bits) == Hop(HopState.FORWARD, 2, gateway, MAC, OURS.mac, 1500)


def test_a_prefix_of_32_bits_is_a_host_of_ipv4_and_a_network_of_ipv6():
    seen = mirror(route("2001:db8::/32"), route("10.0.0.9/32"))
    assert seen.hop(HOST, 32).via == HOST
    assert seen.hop(number("2001:db8::"), 32) == Hop(HopState.UNRESOLVED, 2, mtu=1500)


@pytest.mark.parametrize(
    ("destination", "source"),
    [
        pytest.param("10.0.0.9", "10.0.0.4", id="the lowest of IPv4"),
        pytest.param("2001:db8:0:1::9", "2001:db8:0:1::2", id="of the same network"),
        pytest.param("2600::1", "2001:db8::2", id="global for global"),
        pytest.param("fd00:1::1", "fd00::2", id="unique local for unique local"),
    ],
)
def test_the_nodes_own_address_is_the_one_nearest_to_the_destination(destination: str, source: str):
    owned = ["10.0.0.5", "10.0.0.4", "2001:db8::2", "2001:db8:0:1::2", "fd00::2", "fd00::3"]
    own = [route(f"{text}/{ip_address(text).max_prefixlen}", kind=RouteKind.LOCAL, table=TABLE_LOCAL) for text in owned]
    elsewhere = route("2600::2/128", THEIRS.ifindex, kind=RouteKind.LOCAL, table=TABLE_LOCAL)
    via = number("fe80::1")
    ways = [route("::/0", gateway=via), route("10.0.0.0/8", gateway=via)]
    seen = mirror(*own, elsewhere, *ways, neighbours=(neighbour(via),))
    assert seen.hop(number(destination), ip_address(destination).max_prefixlen).source == number(source)


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        pytest.param({2: "lan0"}, {"eth0": 2}, id="renamed"),
        pytest.param({2: "lan0", 6: "eth0"}, {"eth0": 6}, id="the name has another owner"),
        pytest.param({2: "eth1"}, {"eth1": 2}, id="renamed to another given name"),
        pytest.param({6: "eth0"}, {"eth0": 6}, id="made again"),
        pytest.param({}, {}, id="gone"),
    ],
)
def test_a_given_name_means_the_interface_that_has_it_or_had_it_last(names: dict[int, str], meant: dict[str, int]):
    seen = Mirror(["eth0", "eth1"])
    seen.set_interfaces([OURS])
    seen.set_interfaces([replace(OURS, ifindex=ifindex, name=name) for ifindex, name in names.items()])
    assert {name: link.ifindex for name, link in seen.given.items()} == meant
    assert {ifindex for ifindex in (*names, 2) if seen.is_ours(ifindex)} == set(meant.values())


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


def test_T6_node_ports_are_served_at_the_addresses_of_our_interfaces_or_in_the_networks_given():
    def own(text: str, ifindex: int) -> Route:
        return route(f"{text}/32", ifindex, kind=RouteKind.LOCAL, table=TABLE_LOCAL)

    seen = mirror(
        LINK, own("10.0.0.2", 2), own("10.0.0.3", 2), own("10.1.0.2", 3), own("127.0.0.1", 1), route("10.0.0.9/32")
    )
    ours, theirs = (IPv4Address("10.0.0.2"), IPv4Address("10.0.0.3")), IPv4Address("10.1.0.2")
    assert seen.own_addresses() == {*ours, theirs}
    assert seen.node_port_addresses() == ours
    assert seen.node_port_addresses([IPv4Network("10.1.0.0/16"), IPv4Network("127.0.0.0/8")]) == (theirs,)


def test_T6_addresses_of_both_families_are_the_nodes_own():
    def own(text: str, ifindex: int) -> Route:
        bits = ip_address(text).max_prefixlen
        return route(f"{text}/{bits}", ifindex, kind=RouteKind.LOCAL, table=TABLE_LOCAL)

    seen = mirror(
        own("2001:db8::2", 2), own("10.0.0.2", 2), own("2001:db8::1", 2), own("2001:db8:1::1", 3), own("::1", 1)
    )
    four, one, two = IPv4Address("10.0.0.2"), IPv6Address("2001:db8::1"), IPv6Address("2001:db8::2")
    theirs = IPv6Address("2001:db8:1::1")
    assert seen.own_addresses() == {four, one, two, theirs}
    assert seen.node_port_addresses() == (four, one, two)
    assert seen.node_port_addresses([IPv6Network("2001:db8:1::/48")]) == (theirs,)
    assert (seen.is_own(number("2001:db8::1")), seen.is_own(number("2001:db8::3"))) == (True, False)
