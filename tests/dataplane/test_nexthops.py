"""Rows of next_hops: found by compiled code, kept right by the control plane."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane import hops_compiled as compiled_hops
from dataplane.asking import SEEK_S, SOUGHT
from dataplane.hops_compiled import (
    MISS,
    NO_ROUTE,
    ON_LINK,
    PENDING,
    lookup,
    lookup6,
    new_hops,
    publish_routes,
    publish_routes6,
    take_requests,
)
from dataplane.netdev import Changes, Interface, Neighbour, NeighbourKey, NeighbourState, NetDev, Route, RouteKind
from dataplane.nexthops import NOBODY, NextHops
from xdp import schema
from xdp.addresses import IPV6, masked, number_of
from xdp.byteorder import swap32
from xdp.errors import TableFullError
from xdp.names import Names
from xdp.schema import HopState, Limit, RowUse
from xdp.tables import Capacity, Tables

S = NeighbourState
ETH0 = Interface("eth0", 2, bytes.fromhex("020000000002"), 1500, is_up=True)
ETH1 = Interface("eth1", 3, bytes.fromhex("020000000003"), 9000, is_up=True)
FOREIGN = Interface("other", 4, bytes.fromhex("020000000004"), 1500, is_up=True)
M1, M2 = bytes.fromhex("0200000a0001"), bytes.fromhex("0200000a0002")


def ip(text: str) -> int:
    return number_of(ipaddress.ip_address(text))


def wire(text: str) -> int:
    """Return an address as compiled code finds it in a frame."""
    return int.from_bytes(socket.inet_aton(text), "little")


def route(prefix: str, ifindex: int, via: str = "0.0.0.0", **more: object) -> Route:
    network = ipaddress.ip_network(prefix)
    return Route(number_of(network.network_address), network.prefixlen, ifindex=ifindex, gateway=ip(via), **more)  # type: ignore[arg-type]


def neighbour(address: str, mac: bytes = M1, state: S = S.REACHABLE, ifindex: int = 2, **more: bool) -> Neighbour:
    return Neighbour(ifindex, ip(address), mac, state, **more)


class World:
    """A kernel given as data: what it would tell, and what it was asked."""

    def __init__(self, routes: Iterable[Route], neighbours: Iterable[Neighbour] = ()) -> None:
        self.now = 1000.0
        self.links = [ETH0, ETH1, FOREIGN]
        self.route_list = list(routes)
        self.entries = {entry.key: entry for entry in neighbours}
        self.pending = Changes()
        self.asked: list[tuple[NeighbourKey, bool]] = []
        self.returned: set[NeighbourKey] = set()
        self.tables = Tables.in_memory(
            Capacity(connections=100, frontends=8, services=8, maglev_slots=8, next_hops=64, names=256)
        )

    def node(self, **more: bool) -> NextHops:
        return NextHops(self.tables, self, ["eth0", "eth1"], clock=lambda: self.now, **more)

    def tell(self, *entries: Neighbour, gone: bool = False) -> None:
        self.pending.neighbours += [(entry, gone) for entry in entries]

    def state(self, row: int) -> HopState:
        return HopState(int(self.tables.next_hops[row]["state"]))

    def mac(self, row: int) -> bytes:
        return bytes(self.tables.next_hops[row]["dst_mac"])

    def fileno(self) -> int:
        return -1

    def interfaces(self) -> list[Interface]:
        return self.links

    def routes(self) -> list[Route]:
        return self.route_list

    def neighbours(self) -> list[Neighbour]:
        return list(self.entries.values())

    def changes(self) -> Changes:
        changes, self.pending = self.pending, Changes()
        return changes

    def resolve(self, keys: Iterable[NeighbourKey], *, keep: bool) -> dict[NeighbourKey, int]:
        self.asked += [(key, keep) for key in keys]
        return {}

    def let_go(self, keys: Iterable[NeighbourKey]) -> None:
        self.returned |= set(keys)


LAN = route("10.0.0.0/16", 2)
DEFAULT = route("0.0.0.0/0", 3, "10.1.0.1")
GATEWAY = neighbour("10.1.0.1", M2, ifindex=3)


def look_up6(node: NextHops, tables: Tables, text: str) -> int:
    """Return what compiled code finds for a client of IPv6, which has a name by then."""
    address = ipaddress.IPv6Address(text)
    return int(lookup6(node.hops, np.uint32(swap32(Names(tables).intern(address))), *_halves(number_of(address))))


LAN6 = route("2001:db8::/64", 2)
DEFAULT6 = route("::/0", 3)._replace(gateway=ip("fe80::1"))
ROUTER6 = Neighbour(3, ip("fe80::1"), M2, NeighbourState.REACHABLE)
OWN6 = route("2001:db8::1/128", 2, kind=RouteKind.LOCAL, table=255)


# Endpoints.


def test_endpoints_of_ipv6_have_rows_by_their_names() -> None:
    world = World([LAN, LAN6, DEFAULT6, OWN6], [neighbour("2001:db8::7"), ROUTER6])
    node, names = world.node(), Names(world.tables)
    near, far = node.row_for(ipaddress.IPv6Address("2001:db8::7")), node.row_for(ip("2600::1"))
    assert (world.mac(near), world.mac(far)) == (M1, M2)
    record = world.tables.next_hops[near]
    assert (record["prefix_len"], record["state"], record["ifindex"]) == (128, HopState.FORWARD, 2)
    assert names.address_of(swap32(record["destination"])) == ipaddress.IPv6Address("2001:db8::7")
    assert names.address_of(swap32(record["source"])) == ipaddress.IPv6Address("2001:db8::1")
    assert [row["destination"] for row in node.describe()] == ["::/0", "2001:db8::7", "2600::1"]
    assert ((3, ip("fe80::1")), True) in world.asked


def test_clients_of_ipv6_are_found_by_their_addresses_and_names() -> None:
    world = World([LAN, LAN6, DEFAULT6, OWN6], [neighbour("2001:db8::7"), ROUTER6])
    node = world.node()
    assert world.mac(look_up6(node, world.tables, "2001:db8::7")) == M1
    shared = look_up6(node, world.tables, "2600::1")
    assert (world.mac(shared), look_up6(node, world.tables, "2600::2")) == (M2, shared)
    assert look_up6(node, world.tables, "2001:db8::1") == MISS
    assert look_up6(node, world.tables, "2001:db8::8") == PENDING
    node.turn()
    assert ((2, ip("2001:db8::8")), False) in world.asked
    world.tell(neighbour("2001:db8::8", M2))
    node.turn()
    row = look_up6(node, world.tables, "2001:db8::8")
    assert (world.mac(row), world.state(row)) == (M2, HopState.FORWARD)


def test_an_address_of_ipv6_that_reads_like_one_of_ipv4_is_another() -> None:
    world = World([LAN, route("::/64", 3)], [neighbour("10.0.0.7"), neighbour("::a00:7", M2, ifindex=3)])
    node = world.node()
    rows = node.row_for(ip("10.0.0.7")), node.row_for(ip("::a00:7"))
    assert [world.mac(row) for row in rows] == [M1, M2]


def test_a_successor_takes_over_rows_of_ipv6_and_pins_their_names() -> None:
    world = World([LAN6, DEFAULT6, OWN6], [neighbour("2001:db8::7"), ROUTER6])
    node = world.node()
    row, shared = node.row_for(ip("2001:db8::7")), look_up6(node, world.tables, "2600::1")
    world.tables.names["pins"] = 0  # as FlowTable.take_over does
    after = world.node()
    assert (after.row_for(ip("2001:db8::7")), look_up6(after, world.tables, "2600::1")) == (row, shared)
    assert {
        str(Names(world.tables).address_of(number)) for number in np.flatnonzero(world.tables.names["pins"]).tolist()
    } == {"2001:db8::7", "::", "2001:db8::1"}


def test_rows_that_xdp_learns_are_adopted_when_they_are_whole() -> None:
    world = World([LAN])
    node, tables = world.node(), world.tables
    first = len(tables.next_hops) - len(tables.next_hops) // Limit.LEARNED_SHARE
    row = tables.next_hops[first]
    row["used"] = RowUse.TAKEN  # XDP has taken a row ...
    row["destination"], row["prefix_len"] = wire("10.0.0.77"), 32
    tables.control[0]["learned"] += 1  # ... and another one before
    node.turn()
    assert "10.0.0.77" not in {row["destination"] for row in node.describe()}
    row["used"] = RowUse.OF_HOST  # ... and has filled it
    tables.control[0]["learned"] += 1
    node.turn()
    assert {row["row"] for row in node.describe() if row["destination"] == "10.0.0.77"} == {first}


def test_without_room_for_names_an_endpoint_of_ipv6_has_no_row() -> None:
    world = World([LAN, LAN6, OWN6], [neighbour("2001:db8::7")])
    node, names = world.node(), Names(world.tables)
    with contextlib.suppress(TableFullError):
        for number in range(len(world.tables.names)):
            names.pin(ipaddress.IPv6Address(number))
    refused = [node.row_for(ip(f"2001:db8::{host:x}")) for host in range(0x10, 0x28)]
    assert refused.count(NOBODY) == node.rows_refused > 0
    assert node.row_for(ip("10.0.0.7")) != NOBODY


def test_an_endpoint_on_the_link_is_forwarded_to_its_own_mac() -> None:
    world = World([LAN], [neighbour("10.0.0.7")])
    record = world.tables.next_hops[world.node().row_for(ip("10.0.0.7"))]
    assert bytes(record["dst_mac"]) == M1
    assert bytes(record["src_mac"]) == ETH0.mac
    assert (record["ifindex"], record["mtu"], record["state"]) == (2, 1500, HopState.FORWARD)


def test_an_endpoint_behind_a_gateway_is_forwarded_to_the_gateway() -> None:
    world = World([LAN, DEFAULT], [GATEWAY])
    row = world.node().row_for(ip("8.8.8.8"))
    assert (world.mac(row), world.tables.next_hops[row]["mtu"]) == (M2, 9000)


def test_a_route_of_ipv4_is_followed_through_a_gateway_of_ipv6() -> None:
    gateway = Neighbour(3, ip("fe80::1"), M2, S.REACHABLE)
    world = World([LAN, route("0.0.0.0/0", 3)._replace(gateway=gateway.address)], [gateway])
    node = world.node()
    row = node.row_for(ip("8.8.8.8"))
    assert (world.mac(row), world.state(row)) == (M2, HopState.FORWARD)
    assert ((3, gateway.address), True) in world.asked
    assert {"destination": "8.8.8.8", "via": "fe80::1"}.items() <= node.describe()[-1].items()
    world.tell(gateway._replace(mac=M1))
    node.turn()
    assert world.mac(row) == M1


def test_an_unknown_neighbour_is_asked_for_and_kept() -> None:
    world = World([LAN])
    row = world.node().row_for(ip("10.0.0.7"))
    assert world.state(row) is HopState.UNRESOLVED
    assert world.asked == [((2, ip("10.0.0.7")), True)]


def test_an_endpoint_has_one_row_however_often_it_is_asked_for() -> None:
    node = World([LAN]).node()
    assert (
        node.row_for(ip("10.0.0.7")) == node.row_for(ipaddress.IPv4Address("10.0.0.7")) != node.row_for(ip("10.0.0.8"))
    )


@pytest.mark.parametrize("state", [S.REACHABLE, S.STALE, S.DELAY, S.PROBE, S.PERMANENT, S.NOARP])
def test_neighbours_that_the_kernel_believes_in_are_used(state: S) -> None:
    world = World([LAN], [neighbour("10.0.0.7", state=state)])
    assert world.state(world.node().row_for(ip("10.0.0.7"))) is HopState.FORWARD


@pytest.mark.faults(108)
@pytest.mark.parametrize("state", [S.NONE, S.INCOMPLETE, S.FAILED])
def test_neighbours_that_do_not_answer_are_not_used(state: S) -> None:
    world = World([LAN], [neighbour("10.0.0.7", b"", state)])
    assert world.state(world.node().row_for(ip("10.0.0.7"))) is HopState.UNRESOLVED


@pytest.mark.faults(108)
def test_a_permanent_neighbour_is_left_alone() -> None:
    world = World([LAN], [neighbour("10.0.0.7", state=S.PERMANENT)])
    world.node().row_for(ip("10.0.0.7"))
    assert world.asked == []


@pytest.mark.faults(109)
@pytest.mark.parametrize(
    ("routes", "state"),
    [
        pytest.param([route("10.0.0.0/16", 4)], HopState.FOREIGN, id="an interface that is not ours"),
        pytest.param([route("10.0.0.7/32", 1, kind=RouteKind.LOCAL)], HopState.FOREIGN, id="this node"),
        pytest.param([route("10.0.0.0/16", 0, kind=RouteKind.BLACKHOLE)], HopState.UNRESOLVED, id="blackhole"),
        pytest.param([], HopState.UNRESOLVED, id="no route"),
        pytest.param([route("10.0.0.0/16", 9)], HopState.UNRESOLVED, id="an interface that is gone"),
    ],
)
def test_where_we_cannot_forward(routes: list[Route], state: HopState) -> None:
    world = World(routes)
    row = world.node().row_for(ip("10.0.0.7"))
    assert (world.state(row), world.asked) == (state, [])


def test_of_two_routes_for_a_prefix_the_lower_metric_counts() -> None:
    world = World(
        [route("0.0.0.0/0", 2, "10.0.0.1", metric=200), route("0.0.0.0/0", 3, "10.1.0.1", metric=100), LAN], [GATEWAY]
    )
    assert world.mac(world.node().row_for(ip("8.8.8.8"))) == M2


def test_a_full_table_is_counted_and_leads_nowhere() -> None:
    world = World([LAN])
    node = world.node()
    rows = [node.row_for(ip("10.0.1.0") + host) for host in range(64)]
    assert (rows[-1], node.rows_refused) == (NOBODY, 1 + 64 // Limit.LEARNED_SHARE)  # row 0, and those for XDP
    room = 64 - 64 // Limit.LEARNED_SHARE
    assert sorted(rows)[-room + 1 :] == list(range(1, room))
    assert world.state(NOBODY) is HopState.UNRESOLVED


def test_clients_leave_rows_for_endpoints() -> None:
    world = World([LAN], [neighbour(f"10.0.0.{host}") for host in range(100)])
    node = world.node()
    assert len(node.describe()) in range(20, 30), "of those that nobody has asked for"
    for host in range(100):
        lookup(node.hops, wire(f"10.0.0.{host}"))
        node.turn()
    assert node.rows_refused > 0
    assert node.row_for(ip("10.0.200.1")) != NOBODY


# What changes.


@pytest.mark.faults(10, 108)
def test_a_new_mac_address_is_followed_in_place_and_raises_the_epoch() -> None:
    world = World([LAN], [neighbour("10.0.0.7")])
    node = world.node()
    row, epoch = node.row_for(ip("10.0.0.7")), int(world.tables.control["next_hop_epoch"][0])
    world.tell(neighbour("10.0.0.7", M2))
    node.turn()
    assert (world.mac(row), world.state(row)) == (M2, HopState.FORWARD)
    assert world.tables.control["next_hop_epoch"][0] == epoch + 1


def test_an_event_that_changes_nothing_leaves_the_epoch() -> None:
    world = World([LAN], [neighbour("10.0.0.7")])
    node = world.node()
    node.row_for(ip("10.0.0.7"))
    epoch = int(world.tables.control["next_hop_epoch"][0])
    world.tell(neighbour("10.0.0.7", state=S.STALE))
    node.turn()
    assert world.tables.control["next_hop_epoch"][0] == epoch


@pytest.mark.faults(108)
def test_a_neighbour_that_fails_is_not_used_until_it_answers() -> None:
    world = World([LAN], [neighbour("10.0.0.7")])
    node = world.node()
    row = node.row_for(ip("10.0.0.7"))
    world.tell(neighbour("10.0.0.7", b"", S.FAILED))
    node.turn()
    assert world.state(row) is HopState.UNRESOLVED
    world.tell(neighbour("10.0.0.7", M2))
    node.turn()
    assert (world.state(row), world.mac(row)) == (HopState.FORWARD, M2)


def test_a_neighbour_that_the_kernel_forgot_is_used_and_asked_for_again() -> None:
    world = World([LAN], [neighbour("10.0.0.7")])
    node = world.node()
    row = node.row_for(ip("10.0.0.7"))
    world.asked.clear()
    world.tell(neighbour("10.0.0.7", state=S.STALE), gone=True)
    world.tell(neighbour("10.0.0.7", b"", S.INCOMPLETE))
    node.turn()
    assert world.state(row) is HopState.FORWARD
    assert world.asked == [((2, ip("10.0.0.7")), True)]


def test_another_gateway_is_followed_by_the_same_row() -> None:
    world = World([LAN, DEFAULT], [GATEWAY, neighbour("10.0.0.1")])
    node = world.node()
    row = lookup(node.hops, wire("8.8.8.8"))
    world.route_list[1] = route("0.0.0.0/0", 2, "10.0.0.1")
    world.pending.links_or_routes = True
    node.turn()
    assert lookup(node.hops, wire("8.8.8.8")) == row
    assert (world.mac(row), world.tables.next_hops[row]["ifindex"]) == (M1, 2)
    assert (3, ip("10.1.0.1")) in world.returned


def test_a_withdrawn_route_leaves_its_row_to_the_one_that_covers_it() -> None:
    world = World([LAN, DEFAULT, route("9.0.0.0/8", 2, "10.0.0.1")], [GATEWAY, neighbour("10.0.0.1")])
    node = world.node()
    row = lookup(node.hops, wire("9.1.1.1"))
    assert world.mac(row) == M1
    del world.route_list[2]
    world.pending.links_or_routes = True
    node.turn()
    assert world.mac(row) == M2
    assert lookup(node.hops, wire("9.1.1.1")) == lookup(node.hops, wire("8.8.8.8")) != row


def test_a_more_specific_route_does_not_divert_the_row_of_the_wider_one() -> None:
    world = World([LAN, DEFAULT], [GATEWAY, neighbour("10.0.0.1")])
    node = world.node()
    row = lookup(node.hops, wire("8.8.8.8"))
    world.route_list.append(route("0.0.0.0/8", 2, "10.0.0.1"))
    world.pending.links_or_routes = True
    node.turn()
    assert world.mac(row) == M2


def test_an_interface_that_goes_down_and_up_is_followed() -> None:
    world = World([LAN], [neighbour("10.0.0.7")])
    node = world.node()
    row = node.row_for(ip("10.0.0.7"))
    world.links = [Interface("eth0", 2, ETH0.mac, 1500, is_up=False)]
    world.pending.links_or_routes = True
    node.turn()
    assert world.state(row) is HopState.UNRESOLVED
    world.links, world.now = [ETH0], world.now + 10
    world.pending.links_or_routes = True
    node.turn()
    assert world.state(row) is HopState.FORWARD


def test_a_client_that_was_learnt_is_asked_for_when_it_is_lost() -> None:
    """Its flows hold the row, and nothing but admission asks."""
    world = World([LAN], [neighbour("10.0.0.7"), neighbour("10.0.0.8")])
    node = world.node()
    world.tell(neighbour("10.0.0.8", b"", S.FAILED))
    node.turn()
    assert world.asked == [((2, ip("10.0.0.8")), False)]
    world.links = [Interface("eth0", 2, ETH0.mac, 1500, is_up=False)]
    world.pending.links_or_routes = True
    world.tell(neighbour("10.0.0.7"), gone=True)
    node.turn()
    assert world.asked[1:] == []  # there is nobody to ask
    world.links, world.now = [ETH0], world.now + 10
    world.pending.links_or_routes = True
    node.turn()
    assert ((2, ip("10.0.0.7")), False) in world.asked


def test_so_is_a_learnt_client_behind_a_driver_that_takes_no_redirected_frames() -> None:
    world = World([LAN], [neighbour("10.0.0.7")])
    node = world.node(serves_through_kernel=True)
    node.set_refusing([ETH0.ifindex])
    assert world.state(lookup(node.hops, wire("10.0.0.7"))) is HopState.KERNEL
    world.tell(neighbour("10.0.0.7", b"", S.FAILED))
    node.turn()
    assert world.asked == [((2, ip("10.0.0.7")), False)]


@pytest.mark.faults(107)
def test_lost_events_are_made_up_for_by_reading_everything_again() -> None:
    world = World([LAN], [neighbour("10.0.0.7"), neighbour("10.0.0.8")])
    node = world.node()
    row, other = node.row_for(ip("10.0.0.7")), node.row_for(ip("10.0.0.8"))
    world.entries = {(2, ip("10.0.0.7")): neighbour("10.0.0.7", M2)}
    world.pending.is_overrun = True
    node.turn()
    assert world.mac(row) == M2
    assert ((2, ip("10.0.0.8")), True) in world.asked  # gone: the row stays in use meanwhile
    assert world.state(other) is HopState.FORWARD


def test_F107_what_could_not_be_read_is_read_with_the_next_turn() -> None:
    world = World([LAN], [neighbour("10.0.0.7")])
    node = world.node()
    row, routes = node.row_for(ip("10.0.0.7")), world.routes

    def refuse() -> list[Route]:
        raise OSError(errno.EMSGSIZE, "Message too long")

    world.entries = {(2, ip("10.0.0.7")): neighbour("10.0.0.7", M2)}
    world.pending.is_overrun = True
    world.routes = refuse  # type: ignore[assignment]
    with pytest.raises(OSError, match="Message too long"):
        node.turn()
    world.pending = Changes()
    world.routes = routes  # type: ignore[assignment]
    node.turn()
    assert world.mac(row) == M2


def test_an_endpoint_that_is_dropped_is_no_longer_kept_but_its_row_stays() -> None:
    world = World([LAN], [neighbour("10.0.0.7"), neighbour("10.0.0.8")])
    node = world.node()
    rows = node.row_for(ip("10.0.0.7")), node.row_for(ip("10.0.0.8"))
    node.retain([ip("10.0.0.8")])
    assert world.returned == {(2, ip("10.0.0.7"))}
    assert world.state(rows[0]) is HopState.FORWARD
    assert node.row_for(ip("10.0.0.9")) not in rows


def test_a_successor_takes_over_rows_and_gives_back_what_nobody_wants() -> None:
    world = World([LAN, DEFAULT], [GATEWAY, neighbour("10.0.0.7")])
    before = world.node()
    row, way_out = before.row_for(ip("10.0.0.7")), lookup(before.hops, wire("8.8.8.8"))
    managed = neighbour("10.0.0.66", is_managed=True, is_ours=True)
    world.entries |= {managed.key: managed}
    world.entries[(2, ip("10.0.0.7"))] = neighbour("10.0.0.7", M2)
    after = world.node()
    assert world.mac(row) == M2
    assert after.row_for(ip("10.0.0.7")) == row
    assert lookup(after.hops, wire("8.8.8.8")) == way_out
    after.retain([ip("10.0.0.7")])
    assert world.returned == {managed.key}


def test_rows_that_a_successor_takes_over_never_look_unresolved() -> None:
    world = World([LAN, DEFAULT], [GATEWAY, neighbour("10.0.0.7")])
    world.node().row_for(ip("10.0.0.7"))
    before = world.tables.control[0]["next_hop_epoch"].copy()
    world.node().row_for(ip("10.0.0.7"))
    assert world.tables.control[0]["next_hop_epoch"] == before  # not written: nothing has changed


def test_a_successor_that_wants_the_same_endpoints_keeps_them() -> None:
    world = World([LAN, DEFAULT], [GATEWAY])
    before = world.node()
    endpoints = [ip("10.0.0.7"), ip("10.0.0.8")]
    for address in endpoints:
        before.row_for(address)
    managed = [neighbour("10.0.0.7", is_managed=True, is_ours=True), neighbour("10.0.0.8", b"", S.NONE)]
    world.entries |= {entry.key: entry for entry in managed}
    world.asked.clear()
    after = world.node()
    after.retain(endpoints)  # without asking for their rows: those are in the tables that it has taken over
    assert world.returned == set()
    assert ((2, ip("10.0.0.8")), True) in world.asked
    assert ((2, ip("10.0.0.7")), False) not in world.asked  # that would end its being kept
    after.retain([])
    assert world.returned == {(2, address) for address in endpoints}


@pytest.mark.parametrize(
    "forgotten",
    [
        pytest.param([], id="not listed"),
        pytest.param([neighbour("10.0.0.7", b"", S.INCOMPLETE), neighbour("10.1.0.1", b"", S.NONE, 3)], id="asked for"),
    ],
)
def test_what_the_kernel_forgets_before_a_restart_is_used_and_asked_for(forgotten: list[Neighbour]) -> None:
    world = World([LAN, DEFAULT], [GATEWAY, neighbour("10.0.0.7")])
    before = world.node()
    row, way_out = before.row_for(ip("10.0.0.7")), lookup(before.hops, wire("8.8.8.8"))
    records = world.tables.next_hops.copy()
    epoch = world.tables.control[0]["next_hop_epoch"].copy()
    world.entries = {entry.key: entry for entry in forgotten}
    world.asked.clear()
    after = world.node()
    after.retain([ip("10.0.0.7")])
    assert world.tables.control[0]["next_hop_epoch"] == epoch
    assert np.array_equal(world.tables.next_hops, records)
    assert {((2, ip("10.0.0.7")), True), ((3, ip("10.1.0.1")), True)} <= set(world.asked)
    world.tell(neighbour("10.0.0.7", b"", S.FAILED))
    after.turn()
    assert (world.state(row), world.state(way_out)) == (HopState.UNRESOLVED, HopState.FORWARD)


def test_what_failed_before_a_restart_is_not_believed() -> None:
    world = World([LAN], [neighbour("10.0.0.7")])
    row = world.node().row_for(ip("10.0.0.7"))
    world.entries = {(2, ip("10.0.0.7")): neighbour("10.0.0.7", b"", S.FAILED)}
    world.node()
    assert world.state(row) is HopState.UNRESOLVED


def test_a_node_that_leaves_gives_back_what_it_asked_for_on_its_interfaces() -> None:
    world = World([LAN])
    node = world.node()
    entries = [
        neighbour("10.0.0.7", is_managed=True, is_ours=True),
        neighbour("10.0.0.8", is_ours=True),  # a client
        neighbour("10.0.0.9"),  # the kernel's own
        neighbour("10.0.0.10", state=S.PERMANENT, is_ours=True),  # fixed by an administrator since
        neighbour("10.9.0.7", ifindex=FOREIGN.ifindex, is_ours=True),  # another node's
    ]
    world.entries = {entry.key: entry for entry in entries}
    node.let_go_all()
    assert world.returned == {(2, ip("10.0.0.7")), (2, ip("10.0.0.8"))}


def test_describe_tells_where_each_row_leads() -> None:
    world = World([LAN, DEFAULT, route("172.16.0.0/12", 4)], [GATEWAY])
    node = world.node()
    node.row_for(ip("10.0.0.7"))
    assert sorted(node.describe(), key=lambda row: str(row.pop("row"))) == [
        {
            "destination": "172.16.0.0/12",
            "via": None,
            "interface": "other",
            "mac": None,
            "state": "foreign",
            "mtu": 1500,
        },
        {
            "destination": "0.0.0.0/0",
            "via": "10.1.0.1",
            "interface": "eth1",
            "mac": M2.hex(":"),
            "state": "forward",
            "mtu": 9000,
        },
        {
            "destination": "10.0.0.7",
            "via": None,
            "interface": "eth0",
            "mac": None,
            "state": "unresolved",
            "mtu": 1500,
        },
    ]


# Clients.


def test_all_clients_behind_a_gateway_share_a_row() -> None:
    world = World([LAN, DEFAULT], [GATEWAY])
    node = world.node()
    assert lookup(node.hops, wire("8.8.8.8")) == lookup(node.hops, wire("9.9.9.9")) > 0


def test_a_client_that_the_kernel_knows_has_a_row_without_asking() -> None:
    world = World([LAN], [neighbour("10.0.0.7")])
    node = world.node()
    assert world.mac(lookup(node.hops, wire("10.0.0.7"))) == M1
    world.tell(neighbour("10.0.0.8", M2))
    node.turn()
    assert world.mac(lookup(node.hops, wire("10.0.0.8"))) == M2
    assert world.asked == []


def test_an_unknown_client_is_pending_then_resolved() -> None:
    world = World([LAN])
    node = world.node()
    assert lookup(node.hops, wire("10.0.0.7")) == PENDING
    assert lookup(node.hops, wire("10.0.0.7")) == PENDING
    node.turn()
    assert world.asked == [((2, ip("10.0.0.7")), False)]
    world.tell(neighbour("10.0.0.7"))
    node.turn()
    row = lookup(node.hops, wire("10.0.0.7"))
    assert world.state(row) is HopState.FORWARD
    assert int(node.hops.lost_requests[0]) == 0


def test_what_serves_requests_is_compiled_before_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], compiled_hops.take_requests
    monkeypatch.setattr(compiled_hops, "take_requests", lambda *given: calls.append(given) or real(*given))
    World([LAN]).node()
    assert len(calls) == 1, "compiling takes longer than a packet waits"


def test_packets_for_an_unresolved_client_ask_once_a_second() -> None:
    world = World([LAN])
    node = world.node()
    for _ in range(10):
        lookup(node.hops, wire("10.0.0.7"))
        node.turn()
    assert len(world.asked) == 1
    world.now += 1.0
    lookup(node.hops, wire("10.0.0.7"))
    node.turn()
    assert len(world.asked) == 2


def test_a_client_is_rechecked_each_minute_and_a_silent_one_ever_less_often() -> None:
    world = World([LAN], [neighbour("10.0.0.7")])
    node = world.node()
    world.tell(neighbour("10.0.0.7", b"", S.FAILED))
    lookup(node.hops, wire("10.0.0.7"))
    times = []
    for _ in range(700):
        node.turn()
        times += [world.now - 1000.0] * len(world.asked)
        world.asked.clear()
        world.now += 0.5
    waits = np.diff(times)
    assert waits[0] == pytest.approx(5.0, abs=1.0)
    assert all(later >= 1.8 * sooner for sooner, later in pairwise(waits))
    world.tell(neighbour("10.0.0.7"))
    world.now += 400
    node.turn()
    node.turn()
    world.asked.clear()
    for _ in range(130):
        node.turn()
        world.now += 1.0
    assert len(world.asked) == 2


def test_no_route_and_no_forwarding_are_misses() -> None:
    node = World([route("10.0.0.7/32", 1, kind=RouteKind.LOCAL), LAN]).node()
    assert lookup(node.hops, wire("10.0.0.7")) == MISS
    assert lookup(node.hops, wire("8.8.8.8")) == MISS


# The index that compiled code reads.


def _publish(hops: compiled_hops.Hops, table: dict[tuple[int, int], int]) -> None:
    entries = sorted((32 - length, network, target) for (network, length), target in table.items())
    counts = np.bincount([step for step, _, _ in entries], minlength=33) if entries else np.zeros(33, int)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.uint32)
    publish_routes(
        hops,
        starts,
        np.array([network for _, network, _ in entries], np.uint32),
        np.array([target for _, _, target in entries], np.uint32),
    )


def hop_tables(rows: int) -> Tables:
    return Tables.in_memory(Capacity(connections=1, frontends=4, services=2, maglev_slots=16, next_hops=rows))


_HOPS = new_hops(hop_tables(64), 20_000)
_PREFIXES = st.builds(
    lambda address, length: (masked(address, length), length), st.integers(0, 2**32 - 1), st.integers(0, 32)
)


_PREFIXES6 = st.builds(
    lambda address, length: (masked(IPV6 | address, length), length), st.integers(0, 2**128 - 1), st.integers(0, 128)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_PREFIXES6, max_size=40), st.lists(st.integers(0, 2**128 - 1), max_size=20))
def test_the_longest_prefix_of_ipv6_wins(prefixes: list[tuple[int, int]], addresses: list[int]) -> None:
    table = {prefix: row for row, prefix in enumerate(prefixes, 1)}
    entries = sorted((128 - length, network, row) for (network, length), row in table.items())
    starts = np.zeros(compiled_hops.LENGTHS6 + 1, np.uint32)
    for step, _, _ in entries:
        starts[step + 1] += 1
    networks = np.array([_halves(network) for _, network, _ in entries], np.uint64).reshape(-1, 2)
    targets = np.array([row for _, _, row in entries], np.uint32)
    highs, lows = (np.ascontiguousarray(networks[:, half]) for half in (0, 1))
    publish_routes6(_HOPS, np.cumsum(starts, dtype=np.uint32), highs, lows, targets)
    edges = [network + offset for network, length in prefixes for offset in (0, 2 ** (128 - length) - 1)]
    for address in [IPV6 | address for address in addresses] + edges:
        lengths = [length for length in range(129) if (masked(address, length), length) in table]
        expected = table[masked(address, lengths[-1]), lengths[-1]] if lengths else NO_ROUTE
        assert compiled_hops.route_target6(_HOPS, *_halves(address)) == expected


def _halves(address: int) -> tuple[np.uint64, np.uint64]:
    return np.uint64(address >> 64 & 2**64 - 1), np.uint64(address & 2**64 - 1)


@settings(max_examples=300, deadline=None)
@given(st.lists(_PREFIXES, max_size=40), st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_the_longest_prefix_wins(prefixes: list[tuple[int, int]], addresses: list[int]) -> None:
    table = {prefix: row for row, prefix in enumerate(prefixes, 1)}
    _publish(_HOPS, table)
    edges = [network + offset for network, length in prefixes for offset in (0, 2 ** (32 - length) - 1)]
    for address in addresses + edges:
        lengths = [length for length in range(33) if (masked(address, length), length) in table]
        expected = table[masked(address, lengths[-1]), lengths[-1]] if lengths else NO_ROUTE
        assert compiled_hops.route_target(_HOPS, address) == expected


def test_readers_of_changing_routes_see_one_version_or_the_next() -> None:
    """In version v every target is v: a search must never return NO_ROUTE or go beyond what was published."""
    hops = new_hops(hop_tables(64), 20_000)
    networks = np.arange(10_000, dtype=np.uint32) << 16
    starts = np.zeros(34, np.uint32)
    starts[32 - 16 + 1 :] = len(networks)
    publish_routes(hops, starts, networks, np.full(len(networks), 1, np.uint32))
    is_over = threading.Event()
    wrong: list[int] = []

    def read() -> None:
        last = 1
        for step in count():
            if is_over.is_set():
                return
            target = int(compiled_hops.route_target(hops, (step * 7919 % 10_000) << 16))
            if not last <= target < 300:
                wrong.append(target)
            last = target

    reader = threading.Thread(target=read)
    reader.start()
    for version in range(2, 300):
        length = 10_000 - version % 2 * 3_000  # networks move within the arrays, too
        kept = np.unique(np.concatenate((networks[:length], networks)))
        publish_routes(hops, starts, kept, np.full(len(kept), version, np.uint32))
    is_over.set()
    reader.join()
    assert wrong == []


def test_requests_of_several_threads_all_arrive_once() -> None:
    hops = new_hops(hop_tables(64), 16)
    out = np.zeros(compiled_hops.REQUESTS, np.uint32)
    compiled_hops.request(hops, 1, 0)
    take_requests(hops, 0, out)
    addresses = np.arange(1, 1001)

    def ask() -> None:
        for address in addresses:
            compiled_hops.request(hops, address, 0)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = out[: take_requests(hops, 0, out)[0]]
    assert sorted(set(taken)) == list(addresses)
    assert len(taken) < 1000 * 1.2  # two threads may ask for one address at the same time
    assert take_requests(hops, 0, out)[0] == 0


@pytest.mark.faults(84, 108)
def test_a_full_board_loses_requests_and_counts_them() -> None:
    hops = new_hops(hop_tables(64), 16)
    for address in range(1, 3 * compiled_hops.REQUESTS):
        compiled_hops.request(hops, address, 0)
    out = np.zeros(compiled_hops.REQUESTS, np.uint32)
    assert take_requests(hops, 0, out)[0] + int(hops.lost_requests[0]) == 3 * compiled_hops.REQUESTS - 1


def test_a_reader_of_the_board_in_small_steps_comes_to_every_place() -> None:
    hops = new_hops(hop_tables(64), 16)
    out = np.zeros(8, np.uint32)
    seen: set[int] = set()
    place = 0
    for _ in range(40):
        for address in range(1, 101):
            compiled_hops.request(hops, address, 0)
        taken, place = take_requests(hops, place, out)
        seen |= set(out[:taken].tolist())
    assert len(seen) == 100


@pytest.mark.faults(84)
def test_clients_that_do_not_answer_do_not_keep_new_ones_out() -> None:
    world = World([LAN])
    world.tables = Tables.in_memory(
        Capacity(connections=100, frontends=8, services=8, maglev_slots=8, next_hops=16_384)
    )
    node = world.node()
    first = ip("10.0.0.0")
    for start in range(1, 12_001, 3000):
        for host in range(start, start + 3000):
            lookup(node.hops, socket.htonl(first + host))
        for _ in range(40):
            for host in range(1, start, 7):
                lookup(node.hops, socket.htonl(first + host))
            node.turn()
    asked = {address - first for (_, address), _ in world.asked}
    assert len({*range(1, 12_001)} - asked) < 1000  # those that met a crowd at their place: they ask again


def test_made_up_addresses_on_the_link_take_no_rows_and_the_earliest_are_forgotten() -> None:
    world = World([LAN, LAN6])
    node = world.node()
    first, others = ip("10.0.0.10"), SOUGHT + 100
    for host in range(others):
        compiled_hops.request(node.hops, first + host, 0)
        node.turn()
    assert (node.describe(), node.rows_refused) == ([], 0)
    assert len(world.asked) == others
    assert world.returned == {(2, first + host) for host in range(others - SOUGHT)}
    world.tell(neighbour("10.0.0.200"))  # one of them was real
    node.turn()
    row = lookup(node.hops, wire("10.0.0.200"))
    assert (world.mac(row), world.state(row)) == (M1, HopState.FORWARD)
    world.now += SEEK_S
    node.turn()
    assert world.returned == {(2, first + host) for host in range(others)} - {(2, ip("10.0.0.200"))}


def test_a_made_up_address_of_ipv6_takes_no_row_and_pins_no_name() -> None:
    world = World([LAN6])
    node = world.node()
    assert look_up6(node, world.tables, "2001:db8::bad") == PENDING
    node.turn()
    assert ((2, ip("2001:db8::bad")), False) in world.asked
    assert node.describe() == []
    assert not world.tables.names["pins"].any()


def test_a_client_that_answered_is_looked_at_once_a_minute() -> None:
    world = World([LAN])
    node = world.node()
    lookup(node.hops, wire("10.0.0.7"))
    node.turn()
    world.tell(neighbour("10.0.0.7"))
    node.turn()
    world.asked.clear()
    for _ in range(150):
        world.now += 1.0
        node.turn()
    assert world.asked == [((2, ip("10.0.0.7")), False)] * 2
    assert world.returned == set()


def test_a_start_gives_back_what_a_predecessor_sought_in_vain() -> None:
    lost, ours = neighbour("10.0.0.66", b"", S.FAILED, is_ours=True), neighbour("10.0.0.67", is_ours=True)
    others = neighbour("10.0.0.68", b"", S.FAILED)
    world = World([LAN], [lost, ours, others])
    world.node()
    assert world.returned == {lost.key}


def test_sixty_five_thousand_hosts_keep_their_rows() -> None:
    hops = new_hops(hop_tables(65_536), 16)
    first = ip("10.0.0.0")
    for host in range(1, 65_536):
        compiled_hops.set_host_row(hops, first + host, host)
    assert all(compiled_hops.host_row(hops, first + host) == host for host in range(1, 65_536))
    assert compiled_hops.host_row(hops, first) == MISS


def test_the_words_of_a_row_are_what_the_writer_takes_them_for() -> None:
    fields = {name: offset for name, (_, offset, *_) in schema.NEXT_HOP.fields.items()}  # type: ignore[union-attr]
    assert schema.NEXT_HOP.itemsize == 32
    assert fields["dst_mac"] == 0  # all of it in the first word
    assert (fields["src_mac"], fields["ifindex"]) == (6, 12)  # the second word is our side
    assert fields["state"] // 8 == 2


def test_on_link_and_no_route_are_no_rows() -> None:
    assert min(ON_LINK, NO_ROUTE) > 2**31


# The real thing.

_serial = count()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _until(node: NextHops, is_true: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, node.describe()
        node.turn()
        time.sleep(0.002)


class Lab:
    """A namespace `node`, into which the caller has moved, and one with its neighbours: n0 -- f0, n1 -- f1."""

    def __init__(self) -> None:
        stem = f"tn-{os.getpid()}-{next(_serial)}"
        self.node, self.far = f"{stem}-node", f"{stem}-far"

    def ip(self, command: str) -> str:
        return _run("ip", "-n", self.node, *command.split())

    def far_ip(self, command: str) -> str:
        return _run("ip", "-n", self.far, *command.split())

    def build(self) -> None:
        for name in (self.node, self.far):
            _run("ip", "netns", "add", name)
            # Two wires end in one namespace: each may only answer for its own addresses.
            _run("ip", "netns", "exec", name, "sysctl", "-q", "net.ipv4.conf.all.arp_ignore=1")
        for index in (0, 1):
            self.ip(f"link add n{index} address 02:00:00:00:0{index}:01 type veth peer name f{index} netns {self.far}")
            self.far_ip(f"link set f{index} address 02:00:00:00:0{index}:02")
            self.ip(f"addr add 10.9{index}.0.1/24 dev n{index}")
            self.far_ip(f"addr add 10.9{index}.0.2/24 dev f{index}")
            self.ip(f"addr add 2001:db8:9{index}::1/64 dev n{index} nodad")
            self.far_ip(f"addr add 2001:db8:9{index}::2/64 dev f{index} nodad")
            self.far_ip(f"addr add fe80::2/64 dev f{index} nodad")
            self.ip(f"link set n{index} up")
            self.far_ip(f"link set f{index} up")

    def remove(self) -> None:
        for name in (self.node, self.far):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        made.build()
        with Path(f"/run/netns/{made.node}").open() as inside:
            _setns(inside.fileno())
        yield made
    finally:
        _setns(home)
        os.close(home)
        made.remove()


def _setns(descriptor: int) -> None:
    import ctypes

    assert ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) == 0


@pytest.fixture
def real(lab: Lab) -> Iterator[tuple[Lab, NextHops, Tables]]:
    tables = Tables.in_memory(Capacity(connections=100, frontends=8, services=8, maglev_slots=8, next_hops=64))
    with NetDev([socket.AF_INET, socket.AF_INET6]) as netdev:
        yield lab, NextHops(tables, netdev, ["n0", "n1"]), tables


def _leads_to(tables: Tables, row: int, mac: str) -> bool:
    record = tables.next_hops[row]
    return record["state"] == HopState.FORWARD and bytes(record["dst_mac"]).hex(":") == mac


@pytest.mark.root
@pytest.mark.parametrize("address", ["10.90.0.2", "2001:db8:90::2"])
def test_an_endpoint_is_resolved_by_our_request_and_kept_by_the_kernel(
    real: tuple[Lab, NextHops, Tables], address: str
) -> None:
    lab, node, tables = real
    row = node.row_for(ip(address))
    _until(node, lambda: _leads_to(tables, row, "02:00:00:00:00:02"))
    assert "managed" in lab.ip(f"neigh show {address}")
    node.retain([])
    assert "managed" not in lab.ip(f"neigh show {address}")
    assert _leads_to(tables, row, "02:00:00:00:00:02")


@pytest.mark.root
@pytest.mark.parametrize("address", ["10.90.0.2", "2001:db8:90::2"])
def test_a_client_is_resolved_by_a_request_of_compiled_code(real: tuple[Lab, NextHops, Tables], address: str) -> None:
    _, node, tables = real

    def found() -> int:
        return look_up6(node, tables, address) if ":" in address else int(lookup(node.hops, wire(address)))

    assert found() == PENDING
    _until(node, lambda: (row := found()) > 0 and tables.next_hops[row]["state"] == HopState.FORWARD)
    assert _leads_to(tables, found(), "02:00:00:00:00:02")


@pytest.mark.root
@pytest.mark.parametrize("prefix", ["10.90.0.", "2001:db8:90::1"])
def test_the_kernel_keeps_nothing_of_made_up_addresses(real: tuple[Lab, NextHops, Tables], prefix: str) -> None:
    lab, node, tables = real
    for host in range(10, 30):
        text = f"{prefix}{host}"
        assert (look_up6(node, tables, text) if ":" in text else lookup(node.hops, wire(text))) == PENDING
    node.turn()
    assert lab.ip("neigh show dev n0").count(prefix) == 20
    assert not any(prefix in str(hop["destination"]) for hop in node.describe())
    node._clock = lambda: time.monotonic() + SEEK_S
    _until(node, lambda: prefix not in lab.ip("neigh show dev n0"))


@pytest.mark.root
def test_thousands_of_routes_share_the_rows_of_their_gateways(real: tuple[Lab, NextHops, Tables]) -> None:
    lab, node, tables = real
    batch = [f"route add 100.{n // 256}.{n % 256}.0/24 via 10.9{n % 2}.0.2" for n in range(4000)]
    subprocess.run(["ip", "-n", lab.node, "-batch", "-"], input="\n".join(batch), text=True, check=True)

    def way(n: int) -> int:
        return int(lookup(node.hops, wire(f"100.{n // 256}.{n % 256}.7")))

    _until(node, lambda: way(3998) > 0 and way(3999) > 0)
    assert len({way(n) for n in range(4000)}) == 2
    _until(node, lambda: _leads_to(tables, way(1), "02:00:00:00:01:02"))
    assert node.row_for(ip("10.90.0.2")) != NOBODY
    assert node.rows_refused == 0
    lab.ip("route replace 100.0.0.0/24 via 10.91.0.2")
    _until(node, lambda: way(0) == way(1) != way(2))


@pytest.mark.root
def test_a_router_of_ipv6_is_followed(real: tuple[Lab, NextHops, Tables]) -> None:
    lab, node, tables = real
    lab.ip("-6 route add default via fe80::2 dev n0")
    _until(node, lambda: look_up6(node, tables, "2600::5") > 0)
    row, endpoint = look_up6(node, tables, "2600::5"), node.row_for(ip("2600::9"))
    _until(node, lambda: all(_leads_to(tables, each, "02:00:00:00:00:02") for each in (row, endpoint)))
    source = Names(tables).address_of(swap32(tables.next_hops[endpoint]["source"]))
    assert source == ipaddress.IPv6Address("2001:db8:90::1")
    lab.ip("-6 route replace default via fe80::2 dev n1")
    _until(node, lambda: all(_leads_to(tables, each, "02:00:00:00:01:02") for each in (row, endpoint)))
    assert look_up6(node, tables, "2600::5") == row


@pytest.mark.root
def test_the_loop_serves_requests_and_events_until_it_is_cancelled(real: tuple[Lab, NextHops, Tables]) -> None:
    _, node, tables = real

    async def follow() -> None:
        following = asyncio.create_task(node.run())
        async with asyncio.timeout(5):
            # What is awaited happens in the kernel: there is nobody to set an event.
            while (row := lookup(node.hops, wire("10.91.0.2"))) < 0 or not _leads_to(tables, row, "02:00:00:00:01:02"):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following

    asyncio.run(follow())


@pytest.mark.root
def test_a_client_that_arps_for_us_is_known(real: tuple[Lab, NextHops, Tables]) -> None:
    lab, node, tables = real
    _run("ip", "netns", "exec", lab.far, "bash", "-c", "echo > /dev/udp/10.90.0.1/9")
    _until(node, lambda: compiled_hops.host_row(node.hops, ip("10.90.0.2")) != MISS)
    assert _leads_to(tables, lookup(node.hops, wire("10.90.0.2")), "02:00:00:00:00:02")


@pytest.mark.root
def test_a_neighbour_with_another_mac_address_is_followed(real: tuple[Lab, NextHops, Tables]) -> None:
    lab, node, tables = real
    row = node.row_for(ip("10.90.0.2"))
    _until(node, lambda: _leads_to(tables, row, "02:00:00:00:00:02"))
    _run("ip", "netns", "exec", lab.far, "sysctl", "-q", "net.ipv4.conf.f0.arp_notify=1")
    lab.far_ip("link set f0 address 02:00:00:00:00:99")  # announced by a gratuitous ARP
    _until(node, lambda: _leads_to(tables, row, "02:00:00:00:00:99"))


@pytest.mark.root
def test_another_gateway_is_followed(real: tuple[Lab, NextHops, Tables]) -> None:
    lab, node, tables = real
    lab.ip("route add 203.0.113.0/24 via 10.90.0.2")
    _until(node, lambda: lookup(node.hops, wire("203.0.113.5")) > 0)
    row = lookup(node.hops, wire("203.0.113.5"))
    endpoint = node.row_for(ip("203.0.113.9"))
    _until(node, lambda: all(_leads_to(tables, each, "02:00:00:00:00:02") for each in (row, endpoint)))
    lab.ip("route replace 203.0.113.0/24 via 10.91.0.2")
    _until(node, lambda: all(_leads_to(tables, each, "02:00:00:00:01:02") for each in (row, endpoint)))
    assert lookup(node.hops, wire("203.0.113.5")) == row
    assert "managed" not in lab.ip("neigh show 10.90.0.2")


@pytest.mark.root
def test_a_gateway_of_ipv6_is_resolved_and_kept_for_a_route_of_ipv4(real: tuple[Lab, NextHops, Tables]) -> None:
    """RFC 8950; the same link-local address may be on both links."""
    lab, node, tables = real
    lab.ip("route add 203.0.113.0/24 via inet6 fe80::2 dev n0")
    _until(node, lambda: lookup(node.hops, wire("203.0.113.5")) > 0)
    row = lookup(node.hops, wire("203.0.113.5"))
    _until(node, lambda: _leads_to(tables, row, "02:00:00:00:00:02"))
    assert "managed" in lab.ip("neigh show fe80::2 dev n0")
    lab.ip("route replace 203.0.113.0/24 via inet6 fe80::2 dev n1")
    _until(node, lambda: _leads_to(tables, row, "02:00:00:00:01:02"))
    assert "managed" not in lab.ip("neigh show fe80::2 dev n0")
    node.let_go_all()
    assert "managed" not in lab.ip("-6 neigh show")


@pytest.mark.root
def test_an_interface_goes_down_and_up(real: tuple[Lab, NextHops, Tables]) -> None:
    lab, node, tables = real
    row = node.row_for(ip("10.90.0.2"))
    _until(node, lambda: _leads_to(tables, row, "02:00:00:00:00:02"))
    lab.ip("link set n0 down")
    _until(node, lambda: tables.next_hops[row]["state"] == HopState.UNRESOLVED)
    lab.ip("link set n0 up")
    _until(node, lambda: _leads_to(tables, row, "02:00:00:00:00:02"))


@pytest.mark.root
def test_a_carrier_lost_at_the_far_end_is_noticed(real: tuple[Lab, NextHops, Tables]) -> None:
    lab, node, tables = real
    row = node.row_for(ip("10.91.0.2"))
    _until(node, lambda: _leads_to(tables, row, "02:00:00:00:01:02"))
    lab.far_ip("link set f1 down")
    _until(node, lambda: tables.next_hops[row]["state"] == HopState.UNRESOLVED)
    lab.far_ip("link set f1 up")
    _until(node, lambda: _leads_to(tables, row, "02:00:00:00:01:02"))


@pytest.mark.root
def test_an_interface_that_is_deleted_takes_its_rows_along(real: tuple[Lab, NextHops, Tables]) -> None:
    lab, node, tables = real
    row = node.row_for(ip("10.90.0.2"))
    _until(node, lambda: _leads_to(tables, row, "02:00:00:00:00:02"))
    lab.ip("link del n0")
    _until(node, lambda: tables.next_hops[row]["state"] == HopState.UNRESOLVED)


@pytest.mark.root
def test_an_entry_that_an_administrator_deletes_is_found_again(real: tuple[Lab, NextHops, Tables]) -> None:
    lab, node, tables = real
    row = node.row_for(ip("10.90.0.2"))
    _until(node, lambda: _leads_to(tables, row, "02:00:00:00:00:02"))
    lab.ip("neigh flush dev n0")
    _until(node, lambda: "managed" in lab.ip("neigh show 10.90.0.2") and _leads_to(tables, row, "02:00:00:00:00:02"))


@pytest.mark.root
def test_a_node_that_leaves_has_nothing_kept_by_the_kernel(real: tuple[Lab, NextHops, Tables]) -> None:
    lab, node, tables = real
    row = node.row_for(ip("10.90.0.2"))
    node.row_for(ip("10.90.0.66"))  # nobody answers
    lookup(node.hops, wire("10.91.0.2"))
    _until(node, lambda: _leads_to(tables, row, "02:00:00:00:00:02") and "extern_learn" in lab.ip("neigh show dev n1"))
    node.let_go_all()
    left = lab.ip("neigh show")
    assert "managed" not in left
    assert "extern_learn" not in left
    assert "10.90.0.66" not in left


@pytest.mark.root
def test_a_restart_leaves_an_endpoint_kept_and_finds_one_that_was_forgotten(real: tuple[Lab, NextHops, Tables]) -> None:
    lab, before, tables = real
    rows = before.row_for(ip("10.90.0.2")), before.row_for(ip("10.91.0.2"))
    _until(before, lambda: all(tables.next_hops[row]["state"] == HopState.FORWARD for row in rows))
    lab.ip("neigh del 10.91.0.2 dev n1")
    with NetDev() as netdev:
        after = NextHops(tables, netdev, ["n0", "n1"])
        assert all(tables.next_hops[row]["state"] == HopState.FORWARD for row in rows)
        after.retain([ip("10.90.0.2"), ip("10.91.0.2")])
        _until(after, lambda: lab.ip("neigh show").count("managed") == 2)
        _until(after, lambda: "REACHABLE" in lab.ip("neigh show 10.91.0.2"))
        assert all(tables.next_hops[row]["state"] == HopState.FORWARD for row in rows)


@pytest.mark.faults(110)
def test_T6_another_address_of_the_node_is_told_and_other_changes_are_not() -> None:
    own = route("10.0.0.2/32", 2, kind=RouteKind.LOCAL)
    world = World([LAN, own])
    node = world.node()
    told: list[frozenset[ipaddress.IPv4Address]] = []
    node.when_addresses_change = lambda: told.append(node.own_addresses())
    more = route("10.0.0.3/32", 2, kind=RouteKind.LOCAL)
    for routes in ([LAN, own, DEFAULT], [LAN, own, more], [LAN, own, more], [LAN, more]):
        world.route_list = routes
        world.pending = Changes(links_or_routes=True)
        world.now += 60
        node.turn()
    first, second = ipaddress.IPv4Address("10.0.0.2"), ipaddress.IPv4Address("10.0.0.3")
    assert told == [{first, second}, {second}]
    assert node.node_port_addresses(()) == (second,)
