"""From wanted Service ports to rows: written where they differ, whole or not at all, and found again by a successor."""

from __future__ import annotations

import errno
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import numpy as np
import pytest

from lb import compiled, maglev
from lb.rows import ServiceRow
from lb.table import ServiceTable
from tests.packets import DNS_VIP, VIP, Address, address
from xdp.addresses import IPAddress, number_of
from xdp.byteorder import swap16, swap32
from xdp.errors import TableFullError
from xdp.names import Names
from xdp.schema import Masquerade, MidStream, Needs, Protocol, Scheduler, WhenStalled
from xdp.tables import Capacity, Tables

CAPACITY = Capacity(
    connections=10, frontends=64, services=16, maglev_slots=16 * 307, endpoints=16, next_hops=4, ranges=8, names=64
)
SEED = 7
A, B, C, D = (address(f"10.2.0.{host}:8080") for host in (1, 2, 3, 4))
NODE_PORT = address("192.0.2.1:30080")
TCP, UDP = Protocol.TCP, Protocol.UDP


def port_of(
    *endpoints: Address,
    frontends: tuple[Address, ...] = (VIP,),
    protocol: Protocol = TCP,
    when_stalled: WhenStalled = WhenStalled.DROP,
    **more: Any,
) -> ServiceRow:
    return ServiceRow(
        tuple((IPv4Address(host), port, int(protocol)) for host, port in frontends),
        tuple((IPv4Address(host), port) for host, port in endpoints),
        when_stalled,
        **more,
    )


WEB = port_of(A, B)
DNS = port_of(C, frontends=(DNS_VIP,), protocol=UDP)


class Rows:
    """Tables, their writer, and what packets find in them."""

    def __init__(self, capacity: Capacity = CAPACITY, tables: Tables | None = None, seed: int = SEED) -> None:
        self.tables = tables or Tables.in_memory(capacity)
        self.tables.control[0]["hash_key"] = [11, 13]
        self.writer = ServiceTable(self.tables, seed, lambda host: int(host) & 3)

    def snapshot(self) -> list[bytes]:
        """Return every byte that packets may look at."""
        tables = self.tables
        return [bytes(table) for table in (tables.frontends, tables.services, tables.maglev, tables.endpoints)]

    def row(self, frontend: Address, protocol: Protocol = TCP) -> int:
        host = swap32(frontend[0])
        port = swap16(frontend[1])
        return int(compiled.find_frontend(self.tables, np.uint32(host), np.uint16(port), np.uint8(protocol)))

    def is_vip(self, frontend: Address) -> bool:
        host = swap32(frontend[0])
        found = compiled.find_frontend(self.tables, np.uint32(host), np.uint16(0), np.uint8(0))
        return bool(found != compiled.MISS)

    def endpoints(self, frontend: Address, protocol: Protocol = TCP) -> set[Address]:
        """Return what new connections to a frontend may be given, asked as packets ask."""
        row = self.row(frontend, protocol)
        assert row != compiled.MISS
        found = set()
        for attempt in range(int(self.tables.services[row]["slots"])):
            number = compiled.select(
                self.tables, row, np.uint64(1), np.uint32(2), np.uint8(protocol), np.uint64(SEED), attempt
            )
            record = self.tables.endpoints[number]
            host = swap32(record["addr"])
            found.add((host, swap16(record["port"])))
            assert record["next_hop"] == host & 3
        return found


def parted_endpoints(rows: Rows) -> set[Address]:
    """Return the endpoints that nobody has any more since the last call."""
    records = rows.tables.endpoints[rows.writer.take_parted().endpoints]
    return {(swap32(record["addr"]), swap16(record["port"])) for record in records}


@pytest.fixture
def rows() -> Rows:
    return Rows()


def test_a_frontend_leads_to_its_endpoints(rows: Rows):
    change = rows.writer.apply([WEB, DNS])
    assert (change.rows_written, change.frontends_added, change.frontends_removed) == (2, 2, 0)
    assert rows.endpoints(VIP) == {A, B}
    assert rows.endpoints(DNS_VIP, UDP) == {C}
    assert rows.is_vip(VIP)
    assert rows.is_vip(DNS_VIP)


def test_only_the_very_frontend_is_one(rows: Rows):
    rows.writer.apply([WEB])
    assert rows.row(VIP, UDP) == compiled.MISS
    assert rows.row((VIP[0], VIP[1] + 1)) == compiled.MISS
    assert rows.row((VIP[0] + 1, VIP[1])) == compiled.MISS
    assert rows.is_vip(VIP)
    assert not rows.is_vip(DNS_VIP)


def test_frontends_of_a_service_port_share_its_row(rows: Rows):
    rows.writer.apply([port_of(A, B, frontends=(VIP, NODE_PORT))])
    assert rows.row(VIP) == rows.row(NODE_PORT) != 0


def test_a_service_port_without_endpoints_is_a_frontend_all_the_same(rows: Rows):
    rows.writer.apply([port_of()])
    assert rows.endpoints(VIP) == set()
    assert rows.row(VIP) != compiled.MISS


def test_applying_the_same_again_writes_nothing(rows: Rows):
    rows.writer.apply([WEB, DNS])
    before = rows.snapshot()
    change = rows.writer.apply([DNS, replace_order(WEB)])
    assert change == (0, 0, 0)
    assert rows.snapshot() == before


def test_an_update_leaves_alone_what_it_does_not_name(rows: Rows):
    rows.writer.apply([WEB, DNS])
    dns = rows.row(DNS_VIP, UDP)
    change = rows.writer.update([port_of(A, D)], without=WEB.frontends)
    assert (change.rows_written, change.frontends_added, change.frontends_removed) == (1, 0, 0)
    assert rows.endpoints(VIP) == {A, D}
    assert rows.row(DNS_VIP, UDP) == dns
    change = rows.writer.update([port_of(A, frontends=(NODE_PORT,))], without=WEB.frontends)
    assert (change.frontends_added, change.frontends_removed) == (1, 1)
    assert rows.row(VIP) == compiled.MISS
    assert not rows.is_vip(VIP)
    assert rows.endpoints(NODE_PORT) == {A}


def replace_order(port: ServiceRow) -> ServiceRow:
    return port._replace(endpoints=port.endpoints[::-1])


def test_a_change_writes_a_row_aside_and_leaves_the_others(rows: Rows):
    rows.writer.apply([WEB, DNS])
    old, dns = rows.row(VIP), rows.row(DNS_VIP, UDP)
    old_bytes = bytes(rows.tables.services[old])
    first, slots = (int(rows.tables.services[old][field]) for field in ("first_slot", "slots"))
    old_slots = rows.tables.maglev[first : first + slots].copy()
    change = rows.writer.apply([port_of(A, B, D), DNS])
    assert (change.rows_written, change.frontends_added) == (1, 0)
    assert rows.row(VIP) != old
    assert rows.row(DNS_VIP, UDP) == dns
    assert bytes(rows.tables.services[old]) == old_bytes, "a packet may still be reading it"
    assert (rows.tables.maglev[first : first + slots] == old_slots).all()
    assert rows.endpoints(VIP) == {A, B, D}


def test_another_answer_to_a_stall_is_a_change(rows: Rows):
    rows.writer.apply([WEB])
    rows.writer.apply([WEB._replace(when_stalled=WhenStalled.PASS)])
    assert rows.tables.services[rows.row(VIP)]["when_stalled"] == WhenStalled.PASS


def test_what_is_gone_is_no_frontend_any_more(rows: Rows):
    rows.writer.apply([WEB, DNS])
    change = rows.writer.apply([DNS])
    assert change.frontends_removed == 1
    assert parted_endpoints(rows) == {A, B}
    assert rows.row(VIP) == compiled.MISS
    assert not rows.is_vip(VIP)
    assert rows.endpoints(DNS_VIP, UDP) == {C}


def test_a_vip_stays_one_as_long_as_it_has_a_frontend(rows: Rows):
    rows.writer.apply([WEB, port_of(C, frontends=((VIP[0], 443),))])
    rows.writer.apply([WEB])
    assert rows.is_vip(VIP)
    rows.writer.apply([])
    assert not rows.is_vip(VIP)


def test_T6_the_node_s_own_address_has_frontends_and_is_no_vip(rows: Rows):
    ports = [port_of(A, frontends=(VIP, NODE_PORT))]
    own = IPv4Address(NODE_PORT[0])
    for addresses, is_vip in (((own,), False), ((), True), ((own,), False)):
        rows.writer.apply(ports, addresses)
        assert (rows.is_vip(VIP), rows.is_vip(NODE_PORT)) == (True, is_vip)
        assert rows.endpoints(NODE_PORT) == {A}


def test_an_endpoint_stays_while_any_service_port_has_it(rows: Rows):
    rows.writer.apply([WEB, port_of(B, C, frontends=(DNS_VIP,))])
    rows.writer.apply([port_of(B, C, frontends=(DNS_VIP,))])
    assert parted_endpoints(rows) == {A}
    assert rows.endpoints(DNS_VIP) == {B, C}


@pytest.mark.faults(103)
def test_rows_are_reused_after_a_release_only(rows: Rows):
    rows.writer.apply([WEB])
    used = {rows.row(VIP)}
    rows.writer.apply([port_of(A, C)])
    used.add(rows.row(VIP))
    assert len(used) == 2
    rows.writer.apply([WEB])
    assert rows.row(VIP) not in used
    used.add(rows.row(VIP))
    rows.writer.release(rows.writer.take_parted())
    rows.writer.apply([port_of(A, D)])
    assert rows.row(VIP) in used


def test_changes_without_end_need_no_more_room(rows: Rows):
    for turn in range(100):
        rows.writer.apply([port_of(A, (B, C, D)[turn % 3]), DNS])
        rows.writer.release(rows.writer.take_parted())
        assert rows.endpoints(VIP) == {A, (B, C, D)[turn % 3]}


def test_S7_ranges_are_found_by_those_who_are_in_them(rows: Rows):
    closed = port_of(A, ranges=((1, 2), (4, 4), (9, 0xFFFFFFFF)))
    rows.writer.apply([port_of(B, frontends=(DNS_VIP,), ranges=((7, 7),)), closed])
    row = rows.tables.services[rows.row(VIP)]
    assert row["needs"] == Needs.RANGES

    def admitted(address: int) -> bool:
        first, count = row["first_range"], row["ranges"]
        return bool(compiled.is_in_ranges(rows.tables.ranges, first, count, np.uint32(address)))

    assert [address for address in (0, 1, 2, 3, 4, 5, 7, 8, 9, 0xFFFFFFFF) if admitted(address)] == [
        1, 2, 4, 9, 0xFFFFFFFF,
    ]  # fmt: skip


def test_S7_no_filter_and_a_filter_that_nobody_passes_are_two_things(rows: Rows):
    rows.writer.apply([port_of(A, ranges=())])
    row = rows.tables.services[rows.row(VIP)]
    assert (row["needs"], row["ranges"]) == (Needs.RANGES, 0)
    rows.writer.apply([port_of(A)])
    assert rows.tables.services[rows.row(VIP)]["needs"] == 0


def test_S7_ranges_are_reused_after_a_release_only(rows: Rows):
    for turn in range(100):
        rows.writer.apply([port_of(A, ranges=((turn, turn + 1), (turn + 3, turn + 9)))])
        rows.writer.release(rows.writer.take_parted())


def test_T4_the_row_for_clients_inside_goes_with_the_one_that_leads_to_it(rows: Rows):
    free = []
    for turn in range(40):
        inside = ServiceRow((), tuple((IPv4Address(host), port) for host, port in (A, B, (C, D)[turn % 2])))
        rows.writer.apply([port_of(A, inside=inside)])
        row = rows.tables.services[rows.row(VIP)]
        assert row["needs"] == Needs.SHORT_CUT
        assert rows.tables.services[row["inside"]]["slots"] > row["slots"] > 0
        rows.writer.release(rows.writer.take_parted())
        free.append(rows.row(VIP))
    assert len(set(free)) < CAPACITY.services
    rows.writer.apply([])
    assert parted_endpoints(rows) == {A, B, D}


def test_T4_a_row_inside_that_no_packet_asks_for_leaves_admission_to_xdp(rows: Rows):
    inside = ServiceRow((), tuple((IPv4Address(host), port) for host, port in (A, B)))
    for_sockets = port_of(A, inside=inside, tells_packets=False)
    rows.writer.apply([for_sockets])
    row = rows.tables.services[rows.row(VIP)]
    assert (row["needs"], rows.tables.services[row["inside"]]["slots"] > 0) == (0, True)
    successor = Rows(tables=rows.tables)
    successor.writer.adopt()
    assert successor.writer.apply([for_sockets]).rows_written == 0
    successor.writer.apply([for_sockets._replace(tells_packets=True)])
    assert rows.tables.services[rows.row(VIP)]["needs"] == Needs.SHORT_CUT


def test_T3_an_endpoint_says_whether_it_is_on_this_node(rows: Rows):
    local = frozenset(WEB.endpoints[:1])
    rows.writer.apply([WEB._replace(local=local, masquerade=Masquerade.REMOTE)])
    row = rows.tables.services[rows.row(VIP)]
    assert (row["needs"], row["masquerade"]) == (Needs.SNAT, Masquerade.REMOTE)
    told = {swap32(record["addr"]): bool(record["is_local"]) for record in rows.tables.endpoints if record["addr"]}
    assert told == {A[0]: True, B[0]: False}


def test_L_weights_are_shares_and_another_weight_is_a_change(rows: Rows):
    def weighted(*weights: int) -> ServiceRow:
        given = tuple(zip(port_of(A, B).endpoints, weights, strict=True))
        return port_of(A, B, weights=given)

    rows.writer.apply([weighted(9, 1)])
    service = rows.tables.services[rows.row(VIP)]
    assert service["needs"] == 0, "it is Maglev all the same"
    first = int(service["first_slot"])
    slots = rows.tables.maglev[first : first + int(service["slots"])]
    heavy = np.mean(rows.tables.endpoints[slots]["addr"] == swap32(A[0]))
    assert abs(heavy - 0.9) < 0.01
    assert rows.writer.apply([weighted(9, 1)]).rows_written == 0
    assert rows.writer.apply([weighted(8, 2)]).rows_written == 1
    assert rows.writer.apply([port_of(A, B)]).rows_written == 1


def test_C5_timeouts_are_in_the_row_and_are_read_back(rows: Rows):
    rows.writer.apply([port_of(A, timeouts=48)])
    assert rows.tables.services[rows.row(VIP)]["timeouts"] == 48
    successor = Rows(tables=rows.tables)
    successor.writer.adopt()
    assert successor.writer.apply([port_of(A, timeouts=48)]).rows_written == 0
    assert successor.writer.apply([port_of(A)]).rows_written == 1


def test_L_an_endpoint_too_light_for_a_slot_is_one_all_the_same(rows: Rows):
    given = tuple(zip(port_of(A, B).endpoints, (65535, 1), strict=True))
    rows.writer.apply([port_of(A, B, weights=given)])
    successor = Rows(tables=rows.tables)
    successor.writer.adopt()
    assert successor.writer.apply([port_of(A, B, weights=given)]).rows_written == 0
    successor.writer.apply([])
    assert parted_endpoints(successor) == {A, B}


def scheduled(rows: Rows, count: int) -> list[int]:
    """Return the addresses of the endpoints that so many connections are given, all of one five-tuple."""
    row = rows.row(VIP)
    arguments = (np.uint64(1), np.uint32(2), np.uint8(TCP), 0)
    chosen = [compiled.schedule(rows.tables, row, *arguments, np.uint32(number)) for number in range(count)]
    return [swap32(rows.tables.endpoints[number]["addr"]) for number in chosen]


def test_L_round_robin_gives_one_after_the_other_and_goes_on_after_a_restart(rows: Rows):
    ports = [port_of(A, B, C, scheduler=Scheduler.ROUND_ROBIN)]
    rows.writer.apply(ports)
    assert rows.tables.services[rows.row(VIP)]["needs"] == Needs.SCHEDULER
    first = scheduled(rows, 3)
    assert set(first) == {A[0], B[0], C[0]}
    assert scheduled(rows, 7) == [*first, *first, first[0]]
    successor = Rows(tables=rows.tables)
    successor.writer.adopt()
    assert successor.writer.apply(ports).rows_written == 0
    assert scheduled(successor, 2) == first[1:]


def test_L_round_robin_with_weights_gives_each_its_share(rows: Rows):
    given = tuple(zip(port_of(A, B).endpoints, (3, 1), strict=True))
    rows.writer.apply([port_of(A, B, weights=given, scheduler=Scheduler.ROUND_ROBIN)])
    slots = int(rows.tables.services[rows.row(VIP)]["slots"])
    assert abs(scheduled(rows, slots).count(A[0]) / slots - 0.75) < 0.01


def test_L_random_gives_each_its_share_and_one_client_all_of_them(rows: Rows):
    given = tuple(zip(port_of(A, B).endpoints, (3, 1), strict=True))
    rows.writer.apply([port_of(A, B, weights=given, scheduler=Scheduler.RANDOM)])
    assert abs(scheduled(rows, 4000).count(A[0]) / 4000 - 0.75) < 0.03


def test_L_maglev_gives_one_client_always_the_same(rows: Rows):
    rows.writer.apply([port_of(A, B, C)])
    assert len(set(scheduled(rows, 50))) == 1


FULL = {
    "source ranges": (
        replace(CAPACITY, ranges=3),
        [port_of(A, ranges=((1, 1),)), port_of(A, frontends=((VIP[0], 443),), ranges=((1, 1), (3, 3), (5, 5)))],
    ),
    "Service ports": (replace(CAPACITY, services=3), [port_of(A, frontends=((VIP[0], n),)) for n in range(1, 4)]),
    "Maglev slots": (replace(CAPACITY, maglev_slots=320), [WEB, port_of(A, B, C, frontends=((VIP[0], 443),))]),
    "endpoints": (replace(CAPACITY, endpoints=2), [WEB, port_of(C, D, frontends=((VIP[0], 443),))]),
    "frontend": (replace(CAPACITY, frontends=4), [port_of(frontends=((VIP[0], n),)) for n in range(1, 16)]),
}


@pytest.mark.parametrize("what", FULL)
def test_what_finds_no_room_changes_nothing(what: str):
    capacity, ports = FULL[what]
    rows = Rows(capacity)
    rows.writer.apply(ports[:1])
    visible = [bytes(rows.tables.frontends), rows.row((VIP[0], int(ports[0].frontends[0][1])))]
    for _ in range(3):
        with pytest.raises(TableFullError, match=f"{what}.*this version has room for.*use fewer"):
            rows.writer.apply(ports)
        first = (VIP[0], int(ports[0].frontends[0][1]))
        assert [bytes(rows.tables.frontends), rows.row(first)] == visible
        assert rows.endpoints(first) == {(int(host), port) for host, port in ports[0].endpoints}
    rows.writer.apply(ports[:1])  # and room is left as before
    rows.writer.release(rows.writer.take_parted())


def test_what_finds_no_slots_gives_back_none_for_its_members():
    """They lie behind its slots: those that begin the table are another row's."""
    rows = Rows(replace(CAPACITY, endpoints=512, maglev_slots=1000))
    rows.writer.apply([WEB])
    many = port_of(*((C[0] + host, 8080) for host in range(400)), frontends=((VIP[0], 443),), affinity_s=600)
    with pytest.raises(TableFullError, match="Maglev slots"):
        rows.writer.apply([WEB, many])
    rows.writer.apply([WEB, DNS])
    assert rows.endpoints(VIP) == {A, B}
    assert rows.endpoints(DNS_VIP, UDP) == {C}


def test_an_error_of_the_network_changes_nothing_and_the_next_try_is_as_the_first():
    def hop_of(host: IPAddress) -> int:
        if is_unreachable:
            raise OSError(errno.ENOBUFS, "No buffer space available")
        return int(host) & 3

    is_unreachable = False
    rows, never = Rows(), Rows()
    for each in (rows, never):
        each.writer = ServiceTable(each.tables, SEED, hop_of)
        each.writer.apply([DNS])
    is_unreachable = True
    with pytest.raises(OSError, match="No buffer space"):
        rows.writer.apply([DNS, WEB, WEB6])
    assert rows.row(VIP) == compiled.MISS
    assert pinned(rows) == {}
    is_unreachable = False
    for each in (rows, never):
        each.writer.apply([DNS, WEB, WEB6])
    assert rows.snapshot() == never.snapshot()
    assert rows.endpoints(VIP) == {A, B}
    assert pinned(rows) == pinned(never)


def test_a_successor_with_the_same_configuration_writes_nothing(rows: Rows):
    elsewhere = port_of(frontends=((VIP[0], 81),), is_elsewhere=True)
    inside = ServiceRow((), WEB.endpoints, local=frozenset(WEB.endpoints[:1]))
    closed = port_of(A, frontends=((VIP[0], 82),), local=inside.local, ranges=((1, 2), (4, 9)))
    short_cut = port_of(A, frontends=((VIP[0], 83),), local=inside.local, inside=inside)
    masqueraded = port_of(B, frontends=((VIP[0], 84),), masquerade=Masquerade.REMOTE)
    sticky = port_of(B, C, frontends=((VIP[0], 85),), affinity_s=600, identity=5)
    turns = port_of(B, C, frontends=((VIP[0], 86),), scheduler=Scheduler.ROUND_ROBIN)
    resetting = port_of(B, C, frontends=((VIP[0], 87),), mid_stream=MidStream.RESET)
    web = WEB._replace(local=inside.local)
    ports = [
        web,
        DNS,
        port_of(B, C, frontends=(NODE_PORT, (VIP[0], 443))),
        elsewhere,
        closed,
        short_cut,
        masqueraded,
        sticky,
        turns,
        resetting,
    ]
    rows.writer.apply(ports)
    before = rows.snapshot()
    successor = Rows(tables=rows.tables)
    successor.writer.adopt()
    change = successor.writer.apply(ports)
    assert (change.rows_written, change.frontends_added, change.frontends_removed) == (0, 0, 0)
    assert rows.snapshot() == before


def test_a_successor_changes_only_what_differs_and_takes_no_row_in_use(rows: Rows):
    rows.writer.apply([WEB, DNS])
    dns = rows.row(DNS_VIP, UDP)
    successor = Rows(tables=rows.tables)
    successor.writer.adopt()
    change = successor.writer.apply([port_of(A, D), DNS])
    assert change.rows_written == 1
    assert parted_endpoints(successor) == {B}
    assert successor.row(DNS_VIP, UDP) == dns
    assert successor.endpoints(VIP) == {A, D}
    assert successor.endpoints(DNS_VIP, UDP) == {C}
    successor.writer.apply([])
    assert successor.row(VIP) == compiled.MISS


def test_a_vip_that_a_killed_daemon_has_left_without_frontends_is_none(rows: Rows):
    rows.writer.apply([WEB, DNS])
    frontends = rows.tables.frontends
    (place,) = np.flatnonzero((frontends["addr"] == swap32(VIP[0])) & (frontends["port"] == swap16(VIP[1])))
    rows.tables.frontend_keys[place] = 0
    assert rows.is_vip(VIP)
    successor = Rows(tables=rows.tables)
    successor.writer.adopt()
    assert not successor.is_vip(VIP)
    assert successor.is_vip(DNS_VIP)
    successor.writer.apply([WEB, DNS])
    assert successor.is_vip(VIP)


def vip_row(rows: Rows, frontend: Address) -> int:
    found = compiled.find_frontend(rows.tables, np.uint32(swap32(frontend[0])), np.uint16(0), np.uint8(0))
    return int(found)


def test_N3_a_vip_has_the_row_of_its_lowest_port(rows: Rows):
    low, high = (VIP[0], 22), (VIP[0], 443)
    of_low, of_high = port_of(C, frontends=(low,)), port_of(D, frontends=(high,))
    rows.writer.apply([WEB, of_high])
    assert vip_row(rows, VIP) == rows.row(VIP) != rows.row(high)
    rows.writer.update([of_low])
    assert vip_row(rows, VIP) == rows.row(low)
    rows.writer.update([port_of(A, frontends=(low,))])  # a new row, in place of the one before
    assert vip_row(rows, VIP) == rows.row(low)
    successor = Rows(tables=rows.tables)
    successor.writer.adopt()
    assert vip_row(successor, VIP) == successor.row(low)
    successor.writer.update([], without=[(IPv4Address(low[0]), low[1], int(TCP))])
    assert vip_row(successor, VIP) == successor.row(VIP)
    successor.writer.apply([of_high], [IPv4Address(VIP[0])])  # the node's own address now: the kernel answers
    assert vip_row(successor, VIP) == compiled.MISS


def test_nodes_with_one_seed_choose_alike():
    """Whatever came before, and in whatever order endpoints are given."""
    first, second = Rows(), Rows()
    first.writer.apply([port_of(A, B, C)])
    second.writer.apply([port_of(D)])
    second.writer.apply([port_of(C, A, B)])
    chosen = []
    for rows in (first, second):
        numbers = [
            compiled.select(
                rows.tables, rows.row(VIP), np.uint64(n * 7919), np.uint32(n), np.uint8(TCP), np.uint64(SEED), 0
            )
            for n in range(1000)
        ]
        chosen.append([int(rows.tables.endpoints[number]["addr"]) for number in numbers])
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 3


# Another seed.

_WEIGHTS = tuple(zip(port_of(A, B).endpoints, (3, 1), strict=True))
_INSIDE = ServiceRow((), port_of(B, C, D).endpoints)
OF_ALL_KINDS = [
    port_of(A, B, C),
    port_of(A, B, frontends=((VIP[0], 81),), weights=_WEIGHTS),
    port_of(A, B, C, frontends=((VIP[0], 82),), affinity_s=600, identity=5),
    port_of(A, B, C, frontends=((VIP[0], 83),), inside=_INSIDE),
    port_of(frontends=((VIP[0], 84),)),
    port_of(C, D, frontends=((VIP[0], 85),), scheduler=Scheduler.ROUND_ROBIN),
]


def slots_of(rows: Rows) -> list[list[Address]]:
    """Return the endpoints that the slots of every row name, and of its row for those inside."""
    found = []
    for port in range(80, 86):
        row = rows.tables.services[rows.row((VIP[0], port))]
        for service in (row, rows.tables.services[row["inside"]]):
            first, count = int(service["first_slot"]), int(service["slots"])
            records = rows.tables.endpoints[rows.tables.maglev[first : first + count]]
            found.append([(swap32(record["addr"]), swap16(record["port"])) for record in records])
    return found


@pytest.mark.faults(83)
def test_a_successor_with_another_seed_has_the_slots_that_it_would_have_made(rows: Rows):
    rows.writer.apply(OF_ALL_KINDS)
    before = slots_of(rows)
    successor = Rows(tables=rows.tables, seed=SEED + 1)
    successor.writer.adopt()
    assert rows.tables.control[0]["maglev_seed"] == SEED, "until all are as it has them"
    assert successor.writer.apply(OF_ALL_KINDS) == (0, 0, 0), "rows stay where they are, as there may be no room"
    assert not successor.writer.take_parted()
    anew = Rows(seed=SEED + 1)
    anew.writer.apply(OF_ALL_KINDS)
    assert slots_of(successor) == slots_of(anew) != before
    assert rows.tables.control[0]["maglev_seed"] == SEED + 1
    assert scheduled(successor, 1)
    third = Rows(tables=rows.tables, seed=SEED + 1)
    third.writer.adopt()
    was = third.snapshot()
    third.writer.apply(OF_ALL_KINDS)
    assert third.snapshot() == was


def test_a_start_with_another_seed_that_is_cut_short_is_made_good_by_any_next_one(rows: Rows, monkeypatch):
    rows.writer.apply(OF_ALL_KINDS)
    before = slots_of(rows)
    successor = Rows(tables=rows.tables, seed=SEED + 1)
    successor.writer.adopt()
    fill = maglev.fill
    filled = iter(range(3))

    def killed(*arguments: object) -> None:
        next(filled)
        fill(*arguments)

    monkeypatch.setattr(maglev, "fill", killed)
    with pytest.raises(StopIteration):
        successor.writer.apply(OF_ALL_KINDS)
    monkeypatch.undo()
    assert rows.tables.control[0]["maglev_seed"] == 0
    assert slots_of(rows) != before
    third = Rows(tables=rows.tables)  # with the seed of before
    third.writer.adopt()
    third.writer.apply(OF_ALL_KINDS)
    assert slots_of(third) == before
    assert rows.tables.control[0]["maglev_seed"] == SEED


def test_what_finds_no_room_leaves_the_seed_of_before(rows: Rows):
    rows.writer.apply(OF_ALL_KINDS)
    before = rows.snapshot()[:3]
    successor = Rows(tables=rows.tables, seed=SEED + 1)
    successor.writer.adopt()
    many = [port_of(A, B, C, frontends=((VIP[0], number),)) for number in range(100, 200)]
    with pytest.raises(TableFullError):
        successor.writer.apply([*OF_ALL_KINDS, *many])
    assert rows.tables.control[0]["maglev_seed"] == SEED
    assert [rows.row((VIP[0], port)) for port in range(80, 86)] == [
        successor.row((VIP[0], port)) for port in range(80, 86)
    ]
    successor.writer.apply(OF_ALL_KINDS)
    assert rows.tables.control[0]["maglev_seed"] == SEED + 1
    assert rows.snapshot()[0] == before[0]


def test_slots_are_written_over_where_they_are_and_nowhere_else():
    slots = np.full(10, 7, np.uint32)
    compiled.overwrite(slots, 3, np.array([1, 2, 3], np.uint32))
    assert slots.tolist() == [7, 7, 7, 1, 2, 3, 7, 7, 7, 7]


# IPv6: the number of a name stands where an address stands.

VIP6, POD6, OTHER6 = (IPv6Address(text) for text in ("2001:db8:96::10", "2001:db8::1", "2001:db8::2"))
WEB6 = ServiceRow(((VIP6, 80, int(TCP)),), ((POD6, 8080), (OTHER6, 8080)), WhenStalled.DROP)


def row6(rows: Rows, port: int = 80, protocol: int = TCP, vip: IPv6Address = VIP6) -> int:
    name = np.uint32(swap32(Names(rows.tables).find(vip)))
    found = compiled.find_frontend(rows.tables, name, np.uint16(swap16(port)), np.uint8(protocol | Protocol.IPV6))
    return int(found)


def endpoints6(rows: Rows) -> set[tuple[IPv6Address, int]]:
    service = rows.tables.services[row6(rows)]
    first = int(service["first_slot"])
    records = rows.tables.endpoints[np.unique(rows.tables.maglev[first : first + int(service["slots"])])]
    names = Names(rows.tables)
    return {(names.address_of(swap32(record["addr"])), swap16(record["port"])) for record in records}


def pinned(rows: Rows) -> dict[IPv6Address, int]:
    """Return how often each address is pinned."""
    pins = rows.tables.names["pins"]
    names = Names(rows.tables)
    return {names.address_of(number): int(pins[number]) for number in np.flatnonzero(pins).tolist()}


def test_a_frontend_of_ipv6_leads_to_its_endpoints(rows: Rows):
    rows.writer.apply([WEB, WEB6])
    assert endpoints6(rows) == {(POD6, 8080), (OTHER6, 8080)}
    assert rows.endpoints(VIP) == {A, B}
    assert row6(rows, port=0, protocol=0) == row6(rows)  # the VIP's, for echo requests
    assert row6(rows, port=81) == row6(rows, protocol=UDP) == compiled.MISS
    assert pinned(rows) == {VIP6: 2, POD6: 1, OTHER6: 1}


def test_no_family_is_taken_for_the_other(rows: Rows):
    """A name's number is found with the family only."""
    rows.writer.apply([WEB6])
    number = Names(rows.tables).find(VIP6)
    plain = compiled.find_frontend(rows.tables, np.uint32(swap32(number)), np.uint16(swap16(80)), np.uint8(TCP))
    assert plain == compiled.MISS


def test_every_node_chooses_alike_whatever_number_a_name_has(rows: Rows):
    def chosen(seen: Rows) -> list[int]:
        service = seen.tables.services[row6(seen)]
        first, names = int(service["first_slot"]), Names(seen.tables)
        slots = seen.tables.maglev[first : first + int(service["slots"])].tolist()
        hosts = {slot: int(names.address_of(swap32(seen.tables.endpoints[slot]["addr"]))) for slot in set(slots)}
        return [hosts[slot] for slot in slots]

    rows.writer.apply([WEB6])
    other = Rows()
    other.writer.apply([ServiceRow(((OTHER6, 1, int(TCP)),), ((POD6, 1),))])
    other.writer.apply([WEB6._replace(endpoints=WEB6.endpoints[::-1])])
    assert chosen(rows) == chosen(other)


def test_names_are_pinned_as_long_as_rows_and_frontends_need_them(rows: Rows):
    rows.writer.apply([WEB6, WEB6._replace(frontends=((VIP6, 81, int(TCP)),))])
    assert pinned(rows) == {VIP6: 3, POD6: 1, OTHER6: 1}
    rows.writer.apply([WEB6._replace(endpoints=((POD6, 8080),))])
    assert pinned(rows) == {VIP6: 2, POD6: 1, OTHER6: 1}  # a packet may still be looking at the endpoint
    rows.writer.release(rows.writer.take_parted())
    assert pinned(rows) == {VIP6: 2, POD6: 1}
    rows.writer.apply([])
    rows.writer.release(rows.writer.take_parted())
    assert pinned(rows) == {}


def test_a_change_that_finds_no_room_pins_nothing(rows: Rows):
    rows.writer.apply([WEB6])
    before, held = rows.snapshot(), pinned(rows)
    many = [
        ServiceRow(((IPv6Address(int(VIP6) + port), port, int(TCP)),), ((IPv6Address(port), port),))
        for port in range(1, 20)
    ]
    with pytest.raises(TableFullError):
        rows.writer.apply([WEB6, *many])
    assert (rows.snapshot()[0], pinned(rows)) == (before[0], held)
    rows.writer.apply([WEB6, *many[:4]])
    assert endpoints6(rows) == {(POD6, 8080), (OTHER6, 8080)}


def test_S7_source_ranges_of_ipv6_are_in_a_table_of_their_own(rows: Rows):
    one, two = (number_of(IPv6Address("2001:db8::")), number_of(IPv6Address("2001:db8:ffff::"))), (A[0], A[0])
    rows.writer.apply([WEB6._replace(ranges=(one,)), port_of(A, ranges=(two,))])
    service = rows.tables.services[row6(rows)]
    assert (service["first_range"], service["ranges"], service["needs"]) == (0, 1, Needs.RANGES)

    def is_in(text: str) -> bool:
        high, low = divmod(int(IPv6Address(text)), 1 << 64)
        found = compiled.is_in_ranges6(
            rows.tables.ranges6, service["first_range"], service["ranges"], np.uint64(high), np.uint64(low)
        )
        return bool(found)

    assert [is_in(t) for t in ("2001:db8::", "2001:db8:1::1", "2001:db8:ffff::", "2001:db8:ffff::1", "::1")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    rows.writer.apply([])
    rows.writer.release(rows.writer.take_parted())
    rows.writer.apply([WEB6._replace(ranges=(one,) * 8)])  # all room is there again


def test_a_successor_finds_what_is_of_ipv6_and_writes_nothing(rows: Rows):
    ranges = ((number_of(POD6), number_of(OTHER6)),)
    wanted = [WEB, WEB6, WEB6._replace(frontends=((VIP6, 81, int(TCP)),), ranges=ranges)]
    rows.writer.apply(wanted)
    before, held = rows.snapshot(), pinned(rows)
    rows.tables.names["pins"] = 0  # as FlowTable.take_over does
    successor = Rows(tables=rows.tables)
    successor.writer.adopt()
    assert successor.writer.apply(wanted) == (0, 0, 0)
    assert (successor.snapshot(), pinned(successor)) == (before, held)
    successor.writer.apply([])
    successor.writer.release(successor.writer.take_parted())
    assert pinned(successor) == {}
