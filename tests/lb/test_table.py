"""From wanted Service ports to rows: written where they differ, whole or not at all, and found again by a successor."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

import numpy as np
import pytest

from lb import compiled
from lb.rows import ServiceRow
from lb.table import ServiceTable
from tests.packets import DNS_VIP, VIP, Address, address
from xdp.byteorder import swap16, swap32
from xdp.errors import TableFullError
from xdp.schema import Protocol, WhenStalled
from xdp.tables import Capacity, Tables

CAPACITY = Capacity(connections=10, frontends=64, services=16, maglev_slots=16 * 307, endpoints=16, next_hops=4)
SEED = 7
A, B, C, D = (address(f"10.2.0.{host}:8080") for host in (1, 2, 3, 4))
NODE_PORT = address("192.0.2.1:30080")
TCP, UDP = Protocol.TCP, Protocol.UDP


def port_of(
    *endpoints: Address,
    frontends: tuple[Address, ...] = (VIP,),
    protocol: Protocol = TCP,
    when_stalled: WhenStalled = WhenStalled.DROP,
) -> ServiceRow:
    return ServiceRow(
        tuple((IPv4Address(host), port, int(protocol)) for host, port in frontends),
        tuple((IPv4Address(host), port) for host, port in endpoints),
        when_stalled,
    )


WEB = port_of(A, B)
DNS = port_of(C, frontends=(DNS_VIP,), protocol=UDP)


class Rows:
    """Tables, their writer, and what packets find in them."""

    def __init__(self, capacity: Capacity = CAPACITY, tables: Tables | None = None) -> None:
        self.tables = tables or Tables.in_memory(capacity)
        self.tables.control[0]["hash_key"] = [11, 13]
        self.writer = ServiceTable(self.tables, SEED, lambda host: int(host) & 3)

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
    assert (change.rows_written, change.frontends_added, change.frontends_removed, change.gone) == (
        0,
        0,
        0,
        frozenset(),
    )
    assert rows.snapshot() == before


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
    assert change.gone == {(IPv4Address(A[0]), A[1]), (IPv4Address(B[0]), B[1])}
    assert rows.row(VIP) == compiled.MISS
    assert not rows.is_vip(VIP)
    assert rows.endpoints(DNS_VIP, UDP) == {C}


def test_a_vip_stays_one_as_long_as_it_has_a_frontend(rows: Rows):
    rows.writer.apply([WEB, port_of(C, frontends=((VIP[0], 443),))])
    rows.writer.apply([WEB])
    assert rows.is_vip(VIP)
    rows.writer.apply([])
    assert not rows.is_vip(VIP)


def test_an_endpoint_stays_while_any_service_port_has_it(rows: Rows):
    rows.writer.apply([WEB, port_of(B, C, frontends=(DNS_VIP,))])
    change = rows.writer.apply([port_of(B, C, frontends=(DNS_VIP,))])
    assert change.gone == {(IPv4Address(A[0]), A[1])}
    assert rows.endpoints(DNS_VIP) == {B, C}


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


FULL = {
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


def test_a_successor_with_the_same_configuration_writes_nothing(rows: Rows):
    ports = [WEB, DNS, port_of(B, C, frontends=(NODE_PORT, (VIP[0], 443)))]
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
    assert change.gone == {(IPv4Address(B[0]), B[1])}
    assert successor.row(DNS_VIP, UDP) == dns
    assert successor.endpoints(VIP) == {A, D}
    assert successor.endpoints(DNS_VIP, UDP) == {C}
    successor.writer.apply([])
    assert successor.row(VIP) == compiled.MISS


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
