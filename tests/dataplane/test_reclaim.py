"""Rows of next hops that nothing uses are freed, and flows follow routes that leave a row which they shared."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from conntrack import compiled
from conntrack.table import FlowTable
from dataplane import hops_compiled
from dataplane.hops_compiled import MISS, host_row, lookup
from dataplane.nexthops import NOBODY, NextHops
from dataplane.reclaim import Reclaim
from tests.dataplane.test_nexthops import (
    DEFAULT,
    GATEWAY,
    LAN,
    LAN6,
    M1,
    M2,
    S,
    World,
    ip,
    look_up6,
    neighbour,
    route,
    wire,
)
from xdp.atomic import load_acquire, store_release
from xdp.byteorder import swap32
from xdp.clock import JiffyClock
from xdp.hash import GOLDEN
from xdp.jit import compiled as compile_it
from xdp.names import Names
from xdp.schema import HopState, Limit, Protocol, RouteTarget, RowUse, State
from xdp.tables import Capacity, Tables

NOW = np.uint32(0)


class Site:
    """A world whose next hops have a flow table beside them."""

    def __init__(self, world: World, next_hops: int = 64) -> None:
        self.world = world
        world.tables = Tables.in_memory(
            Capacity(connections=200, frontends=8, services=8, maglev_slots=8, next_hops=next_hops, names=256)
        )
        self.tables = world.tables
        self.flows = FlowTable(self.tables, JiffyClock())
        self.flows.create()
        self.node: NextHops = world.node()
        self.reclaim = Reclaim(self.node, self.flows, self.tables)

    def free(self) -> None:
        asyncio.run(self.reclaim.free())

    def rows(self) -> dict[str, int]:
        return {str(row["destination"]): int(str(row["row"])) for row in self.node.describe()}

    def connect(self, client: str, row: int, port: int = 4000) -> int:
        """Begin a connection whose replies go by a row; return the slot of its original."""
        is_ipv6 = ":" in client
        texts = (client, "fd00::80", "2600::9") if is_ipv6 else (client, "10.96.0.1", "10.0.9.9")
        number, vip, endpoint = map(self._in_tables, texts)
        protocol = Protocol.TCP | Protocol.IPV6 if is_ipv6 else Protocol.TCP
        before, after = vip << 32 | number, endpoint << 32 | number
        ports = np.uint32(80 << 16 | port)
        return int(
            compiled.insert(
                self.tables, np.uint64(before), ports, np.uint64(after), ports, np.uint8(protocol),
                np.uint8(State.ESTABLISHED), np.uint32(NOBODY), np.uint32(row), NOW,
            )
        )  # fmt: skip

    def _in_tables(self, text: str) -> int:
        address = ipaddress.ip_address(text)
        return swap32(Names(self.tables).intern(address)) if isinstance(address, ipaddress.IPv6Address) else wire(text)

    def way_back(self, slot: int) -> int:
        return int(self.tables.flows[int(self.tables.flows[slot]["peer"])]["next_hop"])


def fail(world: World, *addresses: str) -> None:
    world.tell(*(neighbour(address, b"", S.FAILED) for address in addresses))


# Freeing.


def test_a_client_that_is_gone_leaves_its_row_and_one_with_a_flow_keeps_it() -> None:
    site = Site(World([LAN], [neighbour("10.0.0.7"), neighbour("10.0.0.8"), neighbour("10.0.0.9")]))
    rows = site.rows()
    site.connect("10.0.0.8", rows["10.0.0.8"])
    fail(site.world, "10.0.0.7", "10.0.0.8")
    site.node.turn()
    site.free()
    assert site.rows() == {name: rows[name] for name in ("10.0.0.8", "10.0.0.9")}
    assert host_row(site.node.hops, ip("10.0.0.7")) == MISS
    assert host_row(site.node.hops, ip("10.0.0.8")) == rows["10.0.0.8"]
    assert site.tables.next_hops[rows["10.0.0.7"]].tobytes() == bytes(32)
    assert (2, ip("10.0.0.7")) in site.world.returned
    assert site.node.row_for(ip("10.0.0.200")) == rows["10.0.0.7"]


def test_endpoints_and_gateways_keep_their_rows_and_what_lb_still_names_does() -> None:
    site = Site(World([LAN, DEFAULT], [GATEWAY]))
    endpoint, removed = site.node.row_for(ip("10.0.0.7")), site.node.row_for(ip("10.0.0.8"))
    site.tables.endpoints[3]["next_hop"] = removed
    site.node.leave([ip("10.0.0.8")])
    site.free()
    assert {endpoint, removed} <= set(site.rows().values())
    site.tables.endpoints[3]["next_hop"] = NOBODY
    site.free()
    assert sorted(site.rows()) == ["0.0.0.0/0", "10.0.0.7"]


def test_where_rows_are_short_idle_clients_leave_theirs_and_get_one_when_they_come_back() -> None:
    site = Site(World([LAN], [neighbour(f"10.0.0.{host}") for host in range(1, 100)]))
    for host in range(1, 100):
        lookup(site.node.hops, wire(f"10.0.0.{host}"))
        site.node.turn()
    assert site.node.rows_refused > 0
    busy = lookup(site.node.hops, wire("10.0.0.3"))
    slot = site.connect("10.0.0.3", busy)
    site.free()
    assert site.rows() == {"10.0.0.3": busy}
    assert lookup(site.node.hops, wire("10.0.0.4")) < 0
    site.node.turn()
    row = lookup(site.node.hops, wire("10.0.0.4"))
    assert (site.world.state(row), site.world.mac(row)) == (HopState.FORWARD, M1)
    assert site.way_back(slot) == busy != row


def test_a_flood_of_neighbours_that_all_answer_is_over_when_its_flows_are() -> None:
    site = Site(World([LAN]), next_hops=256)
    for host in range(1, 1000):
        address = socket_address(host)
        lookup(site.node.hops, wire(address))
        site.node.turn()
        site.world.tell(neighbour(address))
        site.node.turn()
        if host % 50 == 0:
            site.free()
    assert lookup(site.node.hops, wire(socket_address(999))) > 0
    assert len(site.rows()) < 256


def socket_address(host: int) -> str:
    return f"10.0.{1 + host // 250}.{1 + host % 250}"


def test_who_is_found_while_rows_are_parted_with_has_his_row_back() -> None:
    site = Site(World([LAN], [neighbour("10.0.0.7"), neighbour("10.0.0.8")]))
    rows = site.rows()
    fail(site.world, "10.0.0.7", "10.0.0.8")
    site.node.turn()
    site.node.rows.part(site.node.unused(np.zeros(64, np.uint8)))
    assert host_row(site.node.hops, ip("10.0.0.7")) == MISS
    epoch = int(site.tables.control[0]["next_hop_epoch"])
    assert site.node.row_for(ip("10.0.0.7")) == rows["10.0.0.7"]
    assert int(site.tables.control[0]["next_hop_epoch"]) > epoch, "who waits tries again"
    used = np.zeros(64, np.uint8)
    used[rows["10.0.0.8"]] = 1  # a flow began just before
    site.node.settle(site.node.rows.parted(), used)
    assert site.rows() == rows
    assert host_row(site.node.hops, ip("10.0.0.8")) == rows["10.0.0.8"]


def test_a_name_of_ipv6_goes_with_its_row() -> None:
    site = Site(World([LAN6], [neighbour("2001:db8::7"), neighbour("2001:db8::8")]))
    assert look_up6(site.node, site.tables, "2001:db8::7") > 0
    assert site.tables.names["pins"].sum() == 2
    fail(site.world, "2001:db8::7")
    site.node.turn()
    site.free()
    assert site.tables.names["pins"].sum() == 1
    assert look_up6(site.node, site.tables, "2001:db8::7") < 0
    assert look_up6(site.node, site.tables, "2001:db8::8") > 0


def learn(site: Site, address: str, place: int) -> int:
    """Do what XDP does when it takes a row; return its number."""
    number = len(site.tables.next_hops) - len(site.tables.next_hops) // Limit.LEARNED_SHARE + place
    record = site.tables.next_hops[number]
    record["destination"], record["prefix_len"], record["state"] = wire(address), 32, HopState.FORWARD
    record["used"] = RowUse.OF_HOST
    hops_compiled.set_host_row(site.node.hops, ip(address), number)
    site.tables.control[0]["learned"] += 1
    return number


def test_rows_that_xdp_has_taken_are_free_for_it_again() -> None:
    site = Site(World([LAN]))
    rows = [learn(site, f"10.0.0.{100 + place}", place) for place in range(4)]
    site.connect("10.0.0.101", rows[1])
    site.node.turn()
    site.free()
    used = site.tables.next_hops["used"][rows].tolist()
    assert used == [RowUse.FREE, RowUse.OF_HOST, RowUse.FREE, RowUse.FREE]
    assert site.rows() == {"10.0.0.101": rows[1]}
    assert site.node.row_for(ip("10.0.0.200")) not in rows, "they stay XDP's"


def test_a_second_row_that_xdp_took_for_an_address_is_freed_too() -> None:
    site = Site(World([LAN], [neighbour("10.0.0.100")]))
    row = site.rows()["10.0.0.100"]
    second = learn(site, "10.0.0.100", 0)
    hops_compiled.set_host_row(site.node.hops, ip("10.0.0.100"), row)
    site.node.turn()
    fail(site.world, "10.0.0.100")
    site.node.turn()
    site.connect("10.0.0.100", row)
    site.free()
    assert site.rows() == {"10.0.0.100": row}
    assert site.tables.next_hops[second]["used"] == RowUse.FREE


def test_a_successor_frees_what_its_predecessor_left() -> None:
    site = Site(World([LAN], [neighbour(f"10.0.0.{host}") for host in range(1, 9)]))
    fail(site.world, *(f"10.0.0.{host}" for host in range(1, 9)))
    site.node.turn()
    site.world.entries.clear()
    site.node = site.world.node()
    fail(site.world, *(f"10.0.0.{host}" for host in range(1, 9)))
    site.node.turn()
    site.reclaim = Reclaim(site.node, site.flows, site.tables)
    site.free()
    assert site.rows() == {}
    assert not site.tables.hosts.any()


def test_a_start_in_the_middle_of_freeing_finds_all_hosts() -> None:
    site = Site(World([LAN], [neighbour("10.0.0.7"), neighbour("10.0.0.8")]))
    rows = site.rows()
    fail(site.world, "10.0.0.7")
    site.node.turn()
    site.node.rows.part(site.node.unused(np.zeros(64, np.uint8)))
    after = site.world.node()
    assert [lookup(after.hops, wire(f"10.0.0.{host}")) for host in (7, 8)] == list(rows.values())


def test_it_runs_beside_the_event_loop_and_follows_routes_as_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails the first time, too: it is begun again, as the jobs of a node are."""
    site = Site(World([LAN, *many_routes(10, "10.0.0.1")], [neighbour("10.0.0.1"), neighbour("10.0.0.2", M2)]))
    flow = site.connect("100.0.5.7", lookup(site.node.hops, wire("100.0.5.7")))

    def fails_once() -> None:
        monkeypatch.undo()
        raise OSError("once")

    async def run() -> None:
        monkeypatch.setattr(site.flows, "wait_for_grace", fails_once)
        routes = many_routes(10, "10.0.0.1")
        routes[5] = route("100.0.5.0/24", 2, "10.0.0.2")
        set_routes(site.world, site.node, [LAN, *routes])
        with pytest.raises(OSError, match="once"):
            await site.reclaim.run()
        running = asyncio.create_task(site.reclaim.run())
        async with asyncio.timeout(20):
            while site.world.mac(site.way_back(flow)) != M2:  # noqa: ASYNC110 - a thread stores it
                await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(run())


# The table of hosts.


def test_hosts_come_and_go_and_all_others_are_found() -> None:
    """Whatever lies beside them: a table as full as it can be, against a dictionary."""
    tables = Tables.in_memory(Capacity(connections=1, frontends=4, services=2, maglev_slots=16, next_hops=256))
    hops, draw = hops_compiled.new_hops(tables, 16), np.random.default_rng(7)
    there: dict[int, int] = {}
    for _ in range(20_000):
        address = int(draw.integers(0x0A000000, 0x0A000300))
        if address in there:
            del there[address]
            hops_compiled.remove_host(hops, tables.control["next_hop_epoch"], address)
        elif len(there) < 256:
            there[address] = int(draw.integers(1, 256))
            hops_compiled.set_host_row(hops, address, there[address])
    assert np.count_nonzero(tables.hosts) == len(there) > 100
    found = {address: host_row(hops, address) for address in range(0x0A000000, 0x0A000300)}
    assert {address: row for address, row in found.items() if row != MISS} == there


def test_hosts_that_cannot_be_found_and_those_without_a_row_are_mended() -> None:
    tables = Tables.in_memory(Capacity(connections=1, frontends=4, services=2, maglev_slots=16, next_hops=256))
    hops, used = hops_compiled.new_hops(tables, 16), np.ones(256, np.uint8)
    draw = np.random.default_rng(7).choice(1 << 24, 249, replace=False)
    rows = {0x0A000000 + host: 1 + number for number, host in enumerate(draw.tolist())}
    for address, row in rows.items():
        hops_compiled.set_host_row(hops, address, row)
    used[5] = 0
    for place in range(512):  # empty one that others were pushed over, as by a writer that came meanwhile
        word, tables.hosts[place] = int(tables.hosts[place]), 0
        if sum(host_row(hops, address) == MISS for address in rows) > 3:
            break
        tables.hosts[place] = word
    gone = word >> 32
    hops_compiled.mend_hosts(hops, used)
    missing = {address for address in rows if host_row(hops, address) == MISS}
    assert missing == {gone} | {address for address, row in rows.items() if row == 5}
    assert all(host_row(hops, address) == row for address, row in rows.items() if address not in missing)


def alike(count: int, tables: Tables) -> np.ndarray:
    """Return an array of `count` addresses for each of many places of `hosts` that they are at home in."""
    addresses = np.arange(0x0A000000, 0x0A000000 + 16 * len(tables.hosts), dtype=np.uint64)
    homes = (addresses * np.uint64(GOLDEN) >> np.uint64(32)) & np.uint64(len(tables.hosts) - 1)
    in_order = np.argsort(homes, kind="stable")
    _, firsts, each = np.unique(homes[in_order], return_index=True, return_counts=True)
    return np.array([addresses[in_order[first : first + count]] for first in firsts[each >= count]])


@compile_it
def _move_about(hops: Any, epochs: Any, addresses: Any, rounds: Any) -> None:
    """Have the second of three addresses lie behind the first, then before the third, again and again."""
    first, second, third = addresses[0], addresses[1], addresses[2]
    for _ in range(rounds):
        hops_compiled.set_host_row(hops, first, np.uint32(1))
        hops_compiled.set_host_row(hops, second, np.uint32(2))
        hops_compiled.remove_host(hops, epochs, first)
        hops_compiled.set_host_row(hops, third, np.uint32(3))
        hops_compiled.remove_host(hops, epochs, second)
        hops_compiled.remove_host(hops, epochs, third)


@compile_it
def _rows_found(hops: Any, address: Any, rounds: Any, rows: Any) -> None:
    """Count in `rows` which rows an address is said to have; none is 0."""
    for _ in range(rounds):
        rows[max(host_row(hops, address), 0)] += np.int64(1)


def test_while_hosts_move_nobody_is_sent_to_another_one() -> None:
    tables = Tables.in_memory(Capacity(connections=1, frontends=4, services=2, maglev_slots=16, next_hops=256))
    hops, rows, rounds = hops_compiled.new_hops(tables, 16), np.zeros(4, np.int64), np.int64(3_000_000)
    addresses = alike(3, tables)[0]
    _rows_found(hops, addresses[1], np.int64(0), rows)  # compiled before anybody moves
    with ThreadPoolExecutor() as pool:
        moving = pool.submit(_move_about, hops, tables.control["next_hop_epoch"], addresses, rounds)
        while not moving.done():
            _rows_found(hops, addresses[1], np.int64(1_000_000), rows)
        moving.result()
    assert rows[2] > 0
    assert rows[[1, 3]].tolist() == [0, 0]


@compile_it
def _add_in_step(hops: Any, addresses: Any, own: Any, other: Any) -> None:
    """Add the hosts of one column, each at the moment in which another one adds its own."""
    for number in range(len(addresses)):
        store_release(own, 0, np.uint64(number))
        while load_acquire(other, 0) < np.uint64(number):
            pass
        hops_compiled.set_host_row(hops, addresses[number], np.uint32(1))
    store_release(own, 0, np.uint64(len(addresses)))


def test_of_two_that_add_hosts_at_the_same_place_at_once_neither_is_lost() -> None:
    tables = Tables.in_memory(Capacity(connections=1, frontends=4, services=2, maglev_slots=16, next_hops=65_536))
    hops, addresses = hops_compiled.new_hops(tables, 16), alike(2, tables)[::8].copy()
    steps = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    with ThreadPoolExecutor() as pool:
        adding = [
            pool.submit(_add_in_step, hops, addresses[:, each].copy(), steps[each], steps[1 - each]) for each in (0, 1)
        ]
    assert [each.result() for each in adding] == [None, None]
    assert not [address for address in addresses.ravel().tolist() if host_row(hops, address) == MISS]


# Routes.


def many_routes(count: int, via: str, ifindex: int = 2, first: str = "100.0.0.0") -> list:
    return [route(f"{ipaddress.IPv4Address(ip(first) + (number << 8))}/24", ifindex, via) for number in range(count)]


def set_routes(world: World, node: NextHops, routes: Iterable) -> None:
    world.route_list = list(routes)
    world.pending.links_or_routes = True
    world.now += 1000
    node.turn()


def test_sixty_thousand_routes_share_the_rows_of_their_gateways_and_leave_room_for_endpoints() -> None:
    gateways = [neighbour("10.0.0.1"), neighbour("10.0.0.2", M2)]
    routes = [*many_routes(35_000, "10.0.0.1"), *many_routes(35_000, "10.0.0.2", first="140.0.0.0")]
    site = Site(World([LAN, *routes], gateways), next_hops=65_536)
    assert len([name for name in site.rows() if "/" in name]) == 2
    assert site.node.rows_refused == 0
    assert site.world.mac(lookup(site.node.hops, wire("100.1.2.3"))) == M1
    assert site.world.mac(lookup(site.node.hops, wire("140.1.2.3"))) == M2
    assert site.world.mac(site.node.row_for(ip("10.0.0.2"))) == M2


def test_routes_that_come_and_go_leave_no_rows_behind() -> None:
    site = Site(World([LAN]))
    for turn in range(100):
        set_routes(site.world, site.node, [LAN, route(f"100.{turn}.0.0/16", 2, f"10.0.0.{1 + turn}")])
        site.free()
    assert len(site.rows()) == 1
    assert site.node.rows_refused == 0


def test_routes_to_more_ways_than_their_share_leave_room_for_endpoints() -> None:
    site = Site(World([LAN, *(route(f"100.{way}.0.0/16", 2, f"10.0.0.{way}") for way in range(1, 60))]))
    assert site.node.rows_refused == 59 - 64 // 16
    assert site.node.row_for(ip("10.0.0.7")) != NOBODY


def test_routes_that_differ_in_mtu_or_source_share_no_row() -> None:
    routes = [route("100.1.0.0/16", 2, "10.0.0.1"), route("100.2.0.0/16", 2, "10.0.0.1", mtu=1400)]
    site = Site(World([LAN, *routes], [neighbour("10.0.0.1")]))
    rows = [lookup(site.node.hops, wire(client)) for client in ("100.1.0.1", "100.2.0.1")]
    assert site.tables.next_hops["mtu"][rows].tolist() == [1500, 1400]


def follow(site: Site) -> None:
    assert site.node.routes_changed.is_set()
    site.node.routes_changed.clear()
    site.reclaim._follow()


def test_when_all_routes_of_a_gateway_lead_elsewhere_flows_are_there_at_once() -> None:
    site = Site(World([LAN, *many_routes(10, "10.0.0.1")], [neighbour("10.0.0.1"), neighbour("10.0.0.2", M2)]))
    row = lookup(site.node.hops, wire("100.0.3.7"))
    set_routes(site.world, site.node, [LAN, *many_routes(10, "10.0.0.2")])
    assert (site.world.mac(row), lookup(site.node.hops, wire("100.0.3.7"))) == (M2, row)


@pytest.mark.parametrize("moved", ["100.0.0", "100.0.5"])
def test_flows_follow_a_route_that_leaves_the_others(moved: str) -> None:
    """Also the one by which the row is known."""
    site = Site(World([LAN, *many_routes(10, "10.0.0.1")], [neighbour("10.0.0.1"), neighbour("10.0.0.2", M2)]))
    row = lookup(site.node.hops, wire(f"{moved}.7"))
    flow, other = site.connect(f"{moved}.7", row), site.connect("100.0.9.7", row)
    kept = [each for each in many_routes(10, "10.0.0.1") if each.network != ip(f"{moved}.0")]
    set_routes(site.world, site.node, [LAN, *kept, route(f"{moved}.0/24", 2, "10.0.0.2")])
    assert (site.world.mac(row), lookup(site.node.hops, wire("100.0.9.7"))) == (M1, row)
    follow(site)
    assert site.world.mac(site.way_back(flow)) == M2
    assert site.way_back(other) == row


def test_flows_follow_a_withdrawn_route_to_the_one_that_covers_it_and_its_row_is_freed() -> None:
    site = Site(World([LAN, DEFAULT, *many_routes(2, "10.0.0.1")], [GATEWAY, neighbour("10.0.0.1")]))
    row = lookup(site.node.hops, wire("100.0.1.7"))
    flow = site.connect("100.0.1.7", row)
    set_routes(site.world, site.node, [LAN, DEFAULT])
    assert site.world.mac(row) == M2, "it goes by the route that covers it until flows have followed"
    site.free()
    assert row in site.rows().values()
    follow(site)
    assert site.way_back(flow) == lookup(site.node.hops, wire("8.8.8.8")) != row
    site.free()
    assert row not in site.rows().values()


def test_rows_that_have_come_to_one_router_are_freed_together_and_it_is_followed_still() -> None:
    routers = [GATEWAY, neighbour("10.0.0.1"), neighbour("10.0.0.2")]
    site = Site(World([LAN, DEFAULT, *many_routes(1, "10.0.0.1"), route("101.0.0.0/24", 2, "10.0.0.2")], routers))
    set_routes(site.world, site.node, [LAN, DEFAULT])
    site.free()
    assert "0.0.0.0/0" in site.rows()
    assert not {"100.0.0.0/24", "101.0.0.0/24"} & site.rows().keys()
    site.world.tell(neighbour("10.1.0.1", M1, ifindex=3))
    site.node.turn()
    assert site.world.mac(lookup(site.node.hops, wire("100.0.0.7"))) == M1
    assert GATEWAY.key not in site.world.returned, "it is needed by the default route"


def test_flows_of_ipv6_follow_their_routes() -> None:
    routers = [neighbour("2001:db8::1"), neighbour("2001:db8::2", M2)]

    def via(prefix: str, gateway: str) -> object:
        return route(prefix, 2)._replace(gateway=ip(gateway))

    both = [via("2600::/16", "2001:db8::1"), via("2601::/16", "2001:db8::1")]
    site = Site(World([LAN6, *both], routers))
    row = look_up6(site.node, site.tables, "2601::7")
    assert row == look_up6(site.node, site.tables, "2600::7")
    flow = site.connect("2601::7", row)
    set_routes(site.world, site.node, [LAN6, both[0], via("2601::/16", "2001:db8::2")])
    follow(site)
    assert site.world.mac(site.way_back(flow)) == M2


def test_a_successor_shares_the_row_that_its_predecessor_shared() -> None:
    site = Site(World([LAN, *many_routes(10, "10.0.0.1")], [neighbour("10.0.0.1")]))
    row = lookup(site.node.hops, wire("100.0.3.7"))
    after = site.world.node()
    assert lookup(after.hops, wire("100.0.3.7")) == lookup(after.hops, wire("100.0.9.7")) == row


def test_a_route_to_one_host_and_an_endpoint_there_have_rows_of_their_own() -> None:
    routes = [route("100.0.0.7/32", 2, "10.0.0.1"), route("100.0.0.8/32", 2, "10.0.0.1")]
    site = Site(World([LAN, *routes], [neighbour("10.0.0.1"), neighbour("10.0.0.2", M2)]))
    shared, endpoint = lookup(site.node.hops, wire("100.0.0.7")), site.node.row_for(ip("100.0.0.7"))
    assert shared != endpoint
    set_routes(site.world, site.node, [LAN, route("100.0.0.7/32", 2, "10.0.0.2"), routes[1]])
    assert (site.world.mac(endpoint), site.world.mac(shared)) == (M2, M1)
    after = site.world.node()
    assert (lookup(after.hops, wire("100.0.0.8")), after.row_for(ip("100.0.0.7"))) == (shared, endpoint)


def test_hosts_of_this_node_that_routes_lead_to_one_by_one_have_rows_of_their_own() -> None:
    """One of them is an endpoint, which the kernel routes to; of the other we know nothing."""
    world = World([LAN, route("10.244.0.7/32", 4), route("10.244.0.8/32", 4)])
    site = Site(world)
    node = site.world.node(serves_through_kernel=True)
    node.add_local([ip("10.244.0.7")])
    rows = [lookup(node.hops, wire(f"10.244.0.{host}")) for host in (7, 8)]
    assert [world.state(row) for row in rows] == [HopState.KERNEL, HopState.FOREIGN]
    assert node.row_for(ip("10.244.0.7")) == rows[0]
    reclaim = Reclaim(node, site.flows, site.tables)
    asyncio.run(reclaim.free())
    assert sorted(map(int, (row["row"] for row in node.describe()))) == sorted(rows)


def test_no_target_is_taken_for_a_row() -> None:
    assert int(RouteTarget.ON_LINK) > 65_536
