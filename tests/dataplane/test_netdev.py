"""Netlink: what the kernel tells is read as it is, on interfaces of our own."""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.netdev import (
    TABLE_LOCAL,
    Changes,
    Neighbour,
    NeighbourState,
    NetDev,
    Route,
    RouteKind,
    Way,
    parse_neighbour,
    parse_route,
    xdp_features,
)
from perf import echo
from xdp.addresses import number_of
from xdp.errors import UsageError
from xdp.netlink import IFINFOMSG, attribute

_serial = count()
_SETLINK = 19

FAMILIES = [pytest.param(socket.AF_INET, id="IPv4"), pytest.param(socket.AF_INET6, id="IPv6")]
HOST = {socket.AF_INET: "10.95.0.2", socket.AF_INET6: "2001:db8:95::2"}  # on v0's link, not there


def ip(text: str) -> int:
    return number_of(ipaddress.ip_address(text))


# Parsing, without root.


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.binary(max_size=64))
def test_any_attributes_make_a_neighbour(family: int, data: bytes) -> None:
    header = struct.pack("=B3xiHBB", family, 7, NeighbourState.STALE, 0, 0)
    neighbour = parse_neighbour(memoryview(header + data))
    assert neighbour is not None
    assert neighbour.ifindex == 7


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.binary(max_size=64))
def test_any_attributes_make_a_route_or_none(family: int, data: bytes) -> None:
    route = parse_route(memoryview(struct.pack("=BBBBBBBBI", family, 24, 0, 0, 254, 3, 0, 1, 0) + data))
    assert route is None or route.prefix_len == 24


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


@pytest.mark.parametrize(
    ("prefix", "is_read"),
    [
        ("2001:db8::/32", True),
        ("::/0", True),
        ("fc00::/7", True),
        ("fe80::/64", False),
        ("fe80::1/128", False),
        ("febf::/16", False),
        ("fec0::/10", True),
        ("ff00::/8", False),
        ("ff02::1/128", False),
    ],
)
def test_what_every_link_has_is_no_route(prefix: str, *, is_read: bool) -> None:
    network = ipaddress.IPv6Network(prefix)
    header = struct.pack("=BBBBBBBBI", socket.AF_INET6, network.prefixlen, 0, 0, 254, 3, 0, 1, 0)
    route = parse_route(memoryview(header + _attribute(1, network.network_address.packed)))
    expected = Route(number_of(network.network_address), network.prefixlen)
    assert route == (expected if is_read else None)


def test_a_group_is_no_neighbour() -> None:
    header = struct.pack("=B3xiHBB", socket.AF_INET6, 7, NeighbourState.NOARP, 0, 0)
    group, host = (_attribute(1, ipaddress.IPv6Address(text).packed) for text in ("ff02::1:ff00:1", "fe80::1"))
    assert parse_neighbour(memoryview(header + group)) is None
    assert parse_neighbour(memoryview(header + host)) == Neighbour(7, ip("fe80::1"), b"", NeighbourState.NOARP)


# On the kernel.


class Lab:
    """A namespace with a veth pair in it, v0 (10.95.0.1/24, 2001:db8:95::1/64) and v1; commands run inside."""

    def __init__(self) -> None:
        self.name = f"tn-{os.getpid()}-netdev-{next(_serial)}"

    def ip(self, command: str) -> None:
        subprocess.run(["ip", "-n", self.name, *command.split()], check=True, capture_output=True)


def _setns(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        subprocess.run(["ip", "netns", "add", made.name], check=True)
        made.ip("link set lo up")
        made.ip("link add v0 mtu 1400 address 02:00:00:00:95:01 numrxqueues 3 type veth peer name v1")
        made.ip("addr add 10.95.0.1/24 dev v0")
        made.ip("addr add 2001:db8:95::1/64 dev v0 nodad")
        made.ip("link set v0 up")
        made.ip("link set v1 up")
        inside = os.open(f"/run/netns/{made.name}", os.O_RDONLY)
        _setns(inside)
        os.close(inside)
        yield made
    finally:
        _setns(home)
        os.close(home)
        subprocess.run(["ip", "netns", "del", made.name], check=False, capture_output=True)


@pytest.fixture
def netdev(lab: Lab) -> Iterator[NetDev]:
    with NetDev([socket.AF_INET, socket.AF_INET6]) as made:
        yield made


def _next(netdev: NetDev, is_it: Callable[[Changes], object]) -> Changes:
    deadline = time.monotonic() + 3
    while True:
        assert select.select([netdev], [], [], max(0, deadline - time.monotonic()))[0], "no such event"
        changes = netdev.changes()
        if is_it(changes):
            return changes


def _settle(lab: Lab, netdev: NetDev) -> None:
    """Read what has happened so far: an event of our own comes after all of it."""
    lab.ip("neigh add 10.95.0.250 lladdr 02:00:00:00:00:42 dev v0 nud stale")
    lab.ip("neigh del 10.95.0.250 dev v0")
    marks = {ip("10.95.0.250")}
    _next(netdev, lambda changes: any(is_gone and entry.address in marks for entry, is_gone in changes.neighbours))


@pytest.mark.root
def test_an_interface_is_described(netdev: NetDev) -> None:
    v0, v1 = netdev.interface("v0"), netdev.interface("v1")
    assert (v0.mac.hex(":"), v0.mtu, v0.is_up, v0.kind) == ("02:00:00:00:95:01", 1400, True, "veth")
    assert (v0.rx_queues, v0.lower_ifindex, v1.lower_ifindex) == (3, 0, 0)
    assert netdev.interface("lo").mac == b""


@pytest.mark.root
def test_queues_are_those_in_use_not_those_there_is_room_for(lab: Lab, netdev: NetDev) -> None:
    lab.ip("link add v2 type veth peer name v3")  # without a number there is room for one per CPU
    v2 = netdev.interface("v2")
    assert (v2.rx_queues, v2.tx_queues) == (1, 1)


@pytest.mark.root
def test_an_unknown_interface_is_a_usage_error_that_names_the_others(netdev: NetDev) -> None:
    with pytest.raises(UsageError, match=r"^interface eht0: does not exist; the interfaces here are lo, v1, v0$"):
        netdev.interface("eht0")


@pytest.mark.root
def test_an_interface_without_its_peer_up_is_down(lab: Lab, netdev: NetDev) -> None:
    lab.ip("link set v1 down")
    assert not netdev.interface("v0").is_up


@pytest.mark.root
def test_packets_are_counted(netdev: NetDev) -> None:
    v0 = netdev.interface("v0")
    before = netdev.statistics(v0.ifindex).tx_packets
    netdev.resolve([(v0.ifindex, ip("10.95.0.2"))], keep=False)  # an ARP request
    deadline = time.monotonic() + 3
    while netdev.statistics(v0.ifindex).tx_packets == before:
        assert time.monotonic() < deadline
    with pytest.raises(UsageError, match="index 999: does not exist"):
        netdev.statistics(999)


@pytest.mark.root
def test_routes_are_read_with_all_that_matters(lab: Lab, netdev: NetDev) -> None:
    lab.ip("route add 192.0.2.0/24 via 10.95.0.9 metric 7 mtu 1300 src 10.95.0.1")
    lab.ip("route add blackhole 198.51.100.0/24")
    lab.ip("route add 203.0.113.0/24 nexthop via 10.95.0.7 nexthop via 10.95.0.8")
    lab.ip("route add default via 10.95.0.3 table 77")
    v0 = netdev.interface("v0").ifindex
    routes = {(route.network, route.prefix_len): route for route in netdev.routes()}
    assert routes[ip("192.0.2.0"), 24] == Route(
        ip("192.0.2.0"), 24, ifindex=v0, gateway=ip("10.95.0.9"), metric=7, preferred_source=ip("10.95.0.1"), mtu=1300
    )
    assert routes[ip("198.51.100.0"), 24].kind is RouteKind.BLACKHOLE
    assert routes[ip("203.0.113.0"), 24].gateway == ip("10.95.0.7")
    assert routes[ip("10.95.0.0"), 24].gateway == 0
    own = routes[ip("10.95.0.1"), 32]
    assert (own.kind, own.table) == (RouteKind.LOCAL, TABLE_LOCAL)
    assert (0, 0) not in routes


@pytest.mark.root
def test_routes_of_ipv6_are_read_with_all_that_matters(lab: Lab, netdev: NetDev) -> None:
    lab.ip("-6 route add 2001:db8:7::/48 via 2001:db8:95::9 metric 7 mtu 1300 src 2001:db8:95::1")
    lab.ip("-6 route add blackhole 2001:db8:8::/48")
    lab.ip("-6 route add 2001:db8:9::/48 nexthop via fe80::7 dev v0 nexthop via 2001:db8:95::8")
    lab.ip("-6 route add default via fe80::1 dev v0 proto ra")
    lab.ip("-6 route add 2001:db8:10::/48 from 2001:db8:95::/64 via fe80::2 dev v0")
    lab.ip("-6 route add 2001:db8:11::/48 via fe80::3 dev v0 table 77")
    v0 = netdev.interface("v0").ifindex
    routes = {(route.network, route.prefix_len): route for route in netdev.routes()}
    assert routes[ip("2001:db8:7::"), 48] == Route(
        ip("2001:db8:7::"), 48, ifindex=v0, gateway=ip("2001:db8:95::9"), metric=7,
        preferred_source=ip("2001:db8:95::1"), mtu=1300,
    )  # fmt: skip
    assert routes[ip("2001:db8:8::"), 48].kind is RouteKind.BLACKHOLE
    assert set(routes[ip("2001:db8:9::"), 48].ways) == {Way(v0, ip("fe80::7")), Way(v0, ip("2001:db8:95::8"))}
    assert (routes[ip("::"), 0].gateway, routes[ip("2001:db8:95::"), 64].gateway) == (ip("fe80::1"), 0)
    own = routes[ip("2001:db8:95::1"), 128]
    assert (own.kind, own.table, own.ifindex) == (RouteKind.LOCAL, TABLE_LOCAL, v0)
    assert not {(ip("2001:db8:10::"), 48), (ip("2001:db8:11::"), 48), (ip("fe80::"), 64)} & routes.keys()


@pytest.mark.root
def test_a_route_of_ipv4_may_lead_through_a_gateway_of_ipv6(lab: Lab, netdev: NetDev) -> None:
    lab.ip("route add 192.0.2.0/24 via inet6 fe80::9 dev v0")
    lab.ip("route add 203.0.113.0/24 nexthop via 10.95.0.7 nexthop via inet6 fe80::8 dev v0")
    v0 = netdev.interface("v0").ifindex
    routes = {(route.network, route.prefix_len): route for route in netdev.routes()}
    assert routes[ip("192.0.2.0"), 24] == Route(ip("192.0.2.0"), 24, ifindex=v0, gateway=ip("fe80::9"))
    assert routes[ip("203.0.113.0"), 24].ways == (Way(v0, ip("10.95.0.7")), Way(v0, ip("fe80::8")))


@pytest.mark.root
def test_only_the_families_that_are_wanted_are_read(lab: Lab) -> None:
    with NetDev() as netdev:
        assert {route.network < 1 << 32 for route in netdev.routes()} == {True}
        lab.ip("-6 route add 2001:db8:7::/48 via fe80::9 dev v0")
        lab.ip("neigh add 10.95.0.2 lladdr 02:00:00:00:00:42 dev v0 nud stale")  # comes after it
        assert not _next(netdev, lambda changes: changes.neighbours).links_or_routes


@pytest.mark.root
def test_ten_thousand_routes_are_read_at_once(lab: Lab, netdev: NetDev) -> None:
    batch = "\n".join(
        f"route add 172.{16 + n // 4096}.{n // 16 % 256}.{n % 16 * 16}/28 via 10.95.0.9" for n in range(10_000)
    )
    subprocess.run(["ip", "-n", lab.name, "-batch", "-"], input=batch, text=True, check=True)
    assert len([route for route in netdev.routes() if route.prefix_len == 28]) == 10_000
    while not (changes := netdev.changes()):
        pass
    assert changes.links_or_routes


@pytest.mark.root
@pytest.mark.parametrize(
    ("route", "address"),
    [
        pytest.param("192.0.2.0/24 via 10.95.0.9", "10.96.0.1/24", id="IPv4"),
        pytest.param("2001:db8:7::/48 via fe80::9 dev v0", "2001:db8:96::1/64 nodad", id="IPv6"),
    ],
)
def test_changes_of_links_and_routes_are_told(lab: Lab, netdev: NetDev, route: str, address: str) -> None:
    _settle(lab, netdev)
    lab.ip(f"route add {route}")
    _next(netdev, lambda changes: changes.links_or_routes)
    lab.ip("link set v0 mtu 1380")
    _next(netdev, lambda changes: changes.links_or_routes)
    _settle(lab, netdev)
    lab.ip(f"addr add {address} dev v0")
    _next(netdev, lambda changes: changes.links_or_routes)


@pytest.mark.root
@pytest.mark.parametrize("family", FAMILIES)
def test_a_neighbour_comes_and_goes(lab: Lab, netdev: NetDev, family: int) -> None:
    address = HOST[family]
    lab.ip(f"neigh add {address} lladdr 02:00:00:00:00:42 dev v0 nud stale")
    changes = _next(netdev, lambda changes: changes.neighbours)
    ((neighbour, is_gone),) = changes.neighbours
    assert (neighbour.address, neighbour.mac.hex(":")) == (ip(address), "02:00:00:00:00:42")
    assert (neighbour.state, is_gone) == (NeighbourState.STALE, False)
    assert neighbour in netdev.neighbours()
    lab.ip(f"neigh del {address} dev v0")
    _next(netdev, lambda changes: any(is_gone for _, is_gone in changes.neighbours))


@pytest.mark.root
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [True, False])
def test_a_neighbour_that_we_ask_for_is_marked_as_ours(netdev: NetDev, family: int, *, keep: bool) -> None:
    key = netdev.interface("v0").ifindex, ip(HOST[family])
    assert netdev.resolve([key], keep=keep) == {}
    (neighbour,) = (entry for entry in netdev.neighbours() if entry.key == key)
    assert (neighbour.is_ours, neighbour.is_managed) == (True, keep)
    netdev.let_go([key])
    assert all(entry.key != key for entry in netdev.neighbours())


@pytest.mark.root
def test_more_neighbours_than_the_kernel_would_collect_can_be_asked_for(netdev: NetDev) -> None:
    """gc_thresh3 is 1024 by default: entries of ours do not count."""
    v0 = netdev.interface("v0").ifindex
    keys = [(v0, ip("10.95.0.0") + host * 256 + 2) for host in range(3000)]
    assert netdev.resolve(keys, keep=False) == {}
    assert len(netdev.neighbours()) >= 3000
    netdev.let_go(keys)


@pytest.mark.root
def test_a_neighbour_on_no_interface_is_refused_by_errno(netdev: NetDev) -> None:
    key, good = (999, ip("10.95.0.2")), (netdev.interface("v0").ifindex, ip("10.95.0.2"))
    assert netdev.resolve([key, good], keep=True) == {key: errno.ENODEV}
    netdev.let_go([key])  # nothing to give back: no error


@pytest.mark.faults(107)
@pytest.mark.root
def test_lost_events_are_reported_and_the_next_ones_arrive(lab: Lab, netdev: NetDev) -> None:
    v0 = netdev.interface("v0").ifindex
    mac = struct.pack("=HH6s2x", 10, 2, b"\x02\0\0\0\0\1")
    netdev._events.setsockopt(1, 8, 2048)
    for host in range(200):
        body = struct.pack("=B3xiHBB", 2, v0, NeighbourState.STALE, 0, 0)
        address = struct.pack("=HH", 8, 1) + struct.pack("!I", ip("10.95.0.20") + host)
        assert list(netdev._requests.change([(28, 0x400, body + address + mac)])) == [0]
    assert netdev.changes().is_overrun
    while netdev.changes():
        pass
    lab.ip("link set v0 mtu 1280")
    assert _next(netdev, lambda changes: changes.links_or_routes)


@pytest.mark.root
def test_a_veth_takes_redirects_when_its_peer_has_gro(lab: Lab, netdev: NetDev) -> None:
    v0 = netdev.interface("v0").ifindex
    if xdp_features(v0) is None:
        pytest.skip("the kernel has no netdev family (Linux 6.3)")
    assert netdev.takes_redirects(v0) is False
    subprocess.run(["ip", "netns", "exec", lab.name, "ethtool", "-K", "v1", "gro", "on"], check=True)
    assert netdev.takes_redirects(v0) is True


@pytest.mark.root
def test_what_frames_come_through_before_is_told_the_lowest_first() -> None:
    with echo.own_network(), NetDev() as netdev:
        echo.veth_pair("a0", "a1")
        for line in (
            "link add bridge0 type bridge",
            "link add virtual0 link bridge0 type macvlan",
            "link add virtual1 link virtual0 type macvlan",
            "link set a0 master bridge0",
            "link set a1 master bridge0",
        ):
            subprocess.run(["ip", *line.split()], check=True)
        links = {link.ifindex: link for link in netdev.interfaces()}
        beneath = {link.name: [links[number].name for number in link.beneath] for link in links.values()}
        ports = [name for name in beneath if name in ("a0", "a1")]
        assert beneath == {
            "lo": [],
            "a0": [],
            "a1": [],
            "bridge0": ports,
            "virtual0": [*ports, "bridge0"],
            "virtual1": [*ports, "bridge0"],  # the kernel puts it on what virtual0 is on
        }


@pytest.mark.root
@pytest.mark.parametrize("limit", [pytest.param(58, id="IFLA_GRO_MAX_SIZE"), pytest.param(64, id="_GRO_IPV4_MAX_SIZE")])
def test_how_long_gro_lets_packets_grow_is_told(limit: int) -> None:
    with echo.own_network(), NetDev() as netdev:
        echo.veth_pair("a0", "a1")
        assert netdev.interface("a0").gro_bytes == 65536
        asked = IFINFOMSG.pack(0, 0, netdev.interface("a0").ifindex, 0, 0) + attribute(
            limit, struct.pack("=I", 100_000)
        )
        assert list(netdev._requests.change([(_SETLINK, 0, asked)])) == [0]
        assert netdev.interface("a0").gro_bytes == 100_000
        assert netdev.interface("a1").gro_bytes == 65536
