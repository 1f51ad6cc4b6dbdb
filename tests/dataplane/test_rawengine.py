"""What engine `raw` holds: the names of the IPv6 addresses that its packet loops ask for. The rest: tests/scenarios."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv6Address

import numpy as np
import pytest

from conntrack import compiled
from conntrack.table import FlowTable
from dataplane.ingress import Filter
from dataplane.netdev import Interface
from dataplane.rawengine import Line, RawEngine
from dataplane.settings import Settings
from lb.rows import ServiceRow
from tests.small_node import SMALL
from xdp import naming
from xdp.byteorder import swap16
from xdp.clock import ManualClock
from xdp.errors import TableFullError
from xdp.names import Names
from xdp.schema import Protocol
from xdp.tables import Tables

OWN, VIP, ENDPOINT = IPv6Address("2001:db8::1"), IPv6Address("fd96::1"), IPv6Address("2001:db8:2::20")
ROW = ServiceRow(frontends=((VIP, 80, Protocol.TCP), (OWN, 30080, Protocol.TCP)), endpoints=((ENDPOINT, 8080),))


def test_N9_names_of_what_is_held_live_and_are_let_go_with_it():
    tables, clock = Tables.in_memory(SMALL), ManualClock()
    flows = FlowTable(tables, clock)
    flows.create()
    engine = RawEngine(Settings("test", (), ()), tables, SMALL, clock, "")

    def alive() -> set[IPv6Address]:
        """Return which addresses have a name after passes of the sweep in which no flow uses any."""
        for _ in range(3):
            naming.end_pass(tables, np.zeros(len(tables.names), np.uint8))
            naming.release(tables)
        return {address for address in (OWN, VIP, ENDPOINT) if Names(tables).find(address)}

    engine.expect([ROW], [OWN, IPv4Address("10.1.0.1")])
    assert alive() == {OWN, ENDPOINT}  # of a VIP it is the table of Services that holds the name
    engine.expect([ROW._replace(endpoints=())], [OWN])
    assert alive() == {OWN, ENDPOINT}  # there may be connections
    engine.tidy(flows)
    assert alive() == {OWN}
    engine.expect([], [])
    engine.tidy(flows)
    assert alive() == set()


def test_N9_without_room_for_a_name_nothing_is_held_and_another_try_holds_all():
    tables, clock = Tables.in_memory(SMALL), ManualClock()
    FlowTable(tables, clock).create()
    engine, names = RawEngine(Settings("test", (), ()), tables, SMALL, clock, ""), Names(tables)

    def sweep() -> None:
        for _ in range(3):
            naming.end_pass(tables, np.zeros(len(tables.names), np.uint8))
            naming.release(tables)

    numbers = [names.pin(OWN)]
    for other in range(1, 10 * len(tables.names)):
        with contextlib.suppress(TableFullError):
            numbers.append(names.pin(IPv6Address(other)))
    with pytest.raises(TableFullError):  # there is none for the endpoint
        engine.expect([ROW], [OWN])
    for number in numbers:
        names.release(number)
    sweep()
    assert names.count() == 0
    engine.expect([ROW], [OWN])
    sweep()
    assert names.find(OWN)
    assert names.find(ENDPOINT)


def test_P6_what_the_tables_had_no_room_for_leaves_what_is_held_as_it_was():
    tables, clock = Tables.in_memory(SMALL), ManualClock()
    flows = FlowTable(tables, clock)
    flows.create()
    engine, names = RawEngine(Settings("test", (), ()), tables, SMALL, clock, ""), Names(tables)
    other = ROW._replace(endpoints=((IPv6Address("2001:db8:2::77"), 8080),))
    with engine.expecting([ROW], [OWN]):
        pass
    with pytest.raises(TableFullError), engine.expecting([other], []):
        raise TableFullError("no room")
    engine.tidy(flows)
    for _ in range(3):
        naming.end_pass(tables, np.zeros(len(tables.names), np.uint8))
        naming.release(tables)
    assert [bool(names.find(address)) for address in (OWN, ENDPOINT, other.endpoints[0][0])] == [True, True, False]


def test_C12_a_port_is_spared_while_connections_leave_from_it_but_not_for_an_identifier(monkeypatch):
    tables, clock = Tables.in_memory(SMALL), ManualClock()
    flows = FlowTable(tables, clock)
    flows.create()
    spared: list[frozenset[int]] = []
    monkeypatch.setattr(Filter, "spare", lambda _, ports: spared.append(ports))
    engine = RawEngine(Settings("test", (), ()), tables, SMALL, clock, "")
    client, vip, endpoint, own = 1, 2, 3, 4
    for protocol, port in ((Protocol.TCP, 61_000), (Protocol.UDP, 61_001), (Protocol.ICMP, 61_002)):
        ports = np.uint32(swap16(80) << 16 | swap16(port)), np.uint32(swap16(8080) << 16 | swap16(port))
        before, after = np.uint64(vip << 32 | client), np.uint64(endpoint << 32 | own)
        words = np.uint8(protocol), np.uint8(1), np.uint32(1), np.uint32(1), np.uint32(clock.now())
        assert compiled.insert(tables, before, ports[0], after, ports[1], *words) >= 0
    engine.spare(frozenset({61_000, 61_001, 61_002, 61_003}), flows)
    assert spared == [{61_002, 61_003}]


def test_gro_that_makes_longer_packets_than_a_packet_socket_hands_over_is_told_of():
    engine = RawEngine(Settings("n", (), ("eth0", "eth1")), Tables.in_memory(SMALL), SMALL, ManualClock(), "")
    for number, gro_bytes in ((0, 65_536), (1, 65_537)):
        link = Interface(f"eth{number}", number + 2, bytes(5) + b"\2", 1500, is_up=True, gro_bytes=gro_bytes)
        engine._lines[link.name] = Line(link.name, link)
    (told,) = engine.complaints()
    assert told.startswith("eth1: GRO merges packets up to 65537 bytes, and those above 65536 are lost; ")
    assert told.endswith("`ip link set dev eth1 gro_max_size 65536 gro_ipv4_max_size 65536`")
