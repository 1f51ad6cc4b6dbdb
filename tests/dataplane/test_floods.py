"""Every table full, one after the other: a flood ends in a reason that says so, and who is known goes on as before."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dataplane import hops_compiled
from dataplane.context import AWAITED
from tests import packets
from tests.dataplane.test_pipeline import FREE, NodeUnderTest, only
from tests.packets import CLIENT, CLIENT6, DNS_VIP, ENDPOINT, OTHER_CLIENT, OTHER_ENDPOINT, VIP6, Address
from tests.reference import Service
from tests.small_node import OUTER_VIP, ROUTES, SERVICES, STICKY_VIP, flows_of
from xdp import naming
from xdp.schema import Masquerade, Protocol, Reason, Tag

MANY = 1500  # connections, which have room


@pytest.fixture
def node() -> NodeUnderTest:
    return NodeUnderTest(SERVICES, capacity=MANY)


def lead_everybody_to_the_client(node: NodeUnderTest) -> None:
    """Have every address be reached by way of the client, of either family."""
    nothing = np.zeros(1, np.uint64)
    starts, starts6 = (np.eye(1, n + 1, n, np.uint32)[0] for n in (hops_compiled.LENGTHS, hops_compiled.LENGTHS6))
    rows, rows6 = (np.array([ROUTES[client]], np.uint32) for client in ((CLIENT[0], 32), (CLIENT6[0], 128)))
    hops_compiled.publish_routes(node.hops, starts, nothing.astype(np.uint32), rows)
    hops_compiled.publish_routes6(node.hops, starts6, nothing, nothing, rows6)


def flood(node: NodeUnderTest, first: bytes, count: int) -> Counter[Reason]:
    """Send a frame from so many addresses that nobody has; return what became of them."""
    random, is_ipv6 = np.random.default_rng(84), first[12:14] == b"\x86\xdd"
    at, network, size = (22, b"\x2a", 15) if is_ipv6 else (26, b"\x64", 3)
    hosts = (network + random.bytes(size) for _ in range(count))
    frames = (packets.resummed(first[:at] + host + first[at + len(host) :]) for host in hosts)
    return Counter(node.send(frame).reason for frame in frames)


def test_F080_who_cannot_be_answered_is_refused_and_nothing_is_remembered(node: NodeUnderTest):
    names = naming.count(node.tables)
    for frame in (packets.syn(), packets.syn(CLIENT6, VIP6), packets.udp()):
        assert flood(node, frame, 300) == Counter({Reason.NO_NEXT_HOP: 300})
    assert not node.tables.tags.any()
    assert naming.count(node.tables) == names


def test_F080_one_syn_again_and_again_is_one_connection(node: NodeUnderTest):
    reasons = Counter(node.send(packets.syn()).reason for _ in range(300))
    assert reasons == Counter({Reason.ADMITTED: 1, Reason.FORWARDED: 299})
    assert len(flows_of(node.tables)) == 2


def test_F084_without_room_for_names_known_clients_are_served_and_others_are_when_there_is(node: NodeUnderTest):
    lead_everybody_to_the_client(node)
    assert node.send(packets.syn(CLIENT6, VIP6)).reason == Reason.ADMITTED
    reasons = flood(node, packets.syn(packets.STRANGER6, VIP6), 800)
    assert reasons.keys() == {Reason.ADMITTED, Reason.NAMES_FULL}
    assert reasons[Reason.ADMITTED] > len(node.tables.names) / 2
    records = np.count_nonzero(node.tables.tags.view(np.uint16) >= Tag.FIRST)
    assert records == 2 * (1 + reasons[Reason.ADMITTED])
    assert node.send(packets.data(CLIENT6, VIP6)).reason == Reason.FORWARDED
    assert node.send(packets.syn((CLIENT6[0], 9), VIP6)).reason == Reason.ADMITTED
    node.clock.advance(121)
    for _ in range(3):  # flows end; their names die, and are free
        node.flows.sweep()
    assert flood(node, packets.syn(packets.STRANGER6, VIP6), 100) == Counter({Reason.ADMITTED: 100})


def test_F084_where_more_clients_come_than_are_remembered_connections_stay_where_they_are():
    service = Service((ENDPOINT, OTHER_ENDPOINT), affinity_s=3600, identity=7)
    node = NodeUnderTest({(*STICKY_VIP, Protocol.TCP): service}, capacity=MANY)
    lead_everybody_to_the_client(node)
    endpoint = node.connect(CLIENT, STICKY_VIP)
    assert flood(node, packets.syn(packets.STRANGER, STICKY_VIP), 400) == Counter({Reason.ADMITTED: 400})
    assert np.count_nonzero(node.tables.affinity_words.reshape(-1, 2)[:, 0]) == len(node.tables.affinity)
    assert packets.addresses_of(node.send(packets.data(CLIENT, STICKY_VIP)).frame)[1] == endpoint[0]
    assert node.send(packets.syn((CLIENT[0], 9), STICKY_VIP)).reason == Reason.ADMITTED


def test_F084_without_a_port_to_leave_from_masqueraded_connections_go_on():
    node = NodeUnderTest(only(ENDPOINT, vip=OUTER_VIP, masquerade=Masquerade.EVERYBODY), capacity=MANY)
    lead_everybody_to_the_client(node)
    assert node.send(packets.syn(OTHER_CLIENT, OUTER_VIP)).reason == Reason.ADMITTED
    reasons = flood(node, packets.syn(packets.STRANGER, OUTER_VIP), 100)
    assert reasons == Counter({Reason.ADMITTED: len(FREE) - 1, Reason.NO_SNAT_PORT: 101 - len(FREE)})
    assert len(flows_of(node.tables)) == 2 * len(FREE)
    assert node.send(packets.data(OTHER_CLIENT, OUTER_VIP)).reason == Reason.FORWARDED


def fragment(cut: tuple[int, int], number: int, client: Address = CLIENT) -> bytes:
    """Return a piece of the datagram of this number."""
    return numbered(packets.fragment_of(packets.udp(client, DNS_VIP, bytes(64)), *cut), number)


def numbered(frame: bytes, number: int) -> bytes:
    return packets.resummed(frame[:18] + number.to_bytes(2) + frame[20:])


def test_F032_F084_first_fragments_without_end_forget_the_oldest_datagrams_and_nothing_else(node: NodeUnderTest):
    node.connect()
    datagrams = node.fragments.datagrams
    first, rest = fragment((0, 32), 0), fragment((32, 72), 0)

    def sent(number: int) -> Reason:
        node.clock.advance(0.01)
        return node.send(numbered(first, number)).reason

    reasons = Counter(map(sent, range(2 * len(datagrams))))
    assert reasons == Counter({Reason.ADMITTED: 1, Reason.FORWARDED: 2 * len(datagrams) - 1})
    assert np.count_nonzero(datagrams["which"]) > 0.9 * len(datagrams)
    assert len(flows_of(node.tables)) == 4
    assert node.send(fragment((0, 32), 60_000, OTHER_CLIENT)).reason == Reason.ADMITTED
    assert node.send(fragment((32, 72), 60_000, OTHER_CLIENT)).reason == Reason.FORWARDED
    # The oldest of a datagram's few places goes: here and there an early one is left.
    early = range(len(datagrams) // 4)
    ends = Counter(node.send(numbered(rest, n))[::2] for n in early)
    assert ends[Reason.FRAGMENT_ALONE, AWAITED] > 0.9 * len(early)
    assert node.send(packets.data()).reason == Reason.FORWARDED


def test_F032_fragments_that_are_nobodys_take_no_place(node: NodeUnderTest):
    rest = fragment((32, 72), 0)
    ends = {node.send(numbered(rest, number))[::2] for number in range(500)}
    assert ends == {(Reason.FRAGMENT_ALONE, AWAITED)}
    assert not node.fragments.datagrams["which"].any()
    assert not node.tables.tags.any()


def test_F085_errors_without_end_change_nothing_about_the_connection_that_they_are_about(node: NodeUnderTest):
    endpoint = node.connect()
    before = flows_of(node.tables)
    error = packets.icmp_error(packets.data(packets.VIP, CLIENT))
    assert {node.send(error).reason for _ in range(500)} == {Reason.FORWARDED}
    assert flows_of(node.tables) == before
    assert packets.addresses_of(node.send(packets.data()).frame)[1] == endpoint[0]
