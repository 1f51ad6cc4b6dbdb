"""One frame at a time through the userspace pipeline, over tables in plain memory: whole frames compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6

from conntrack import passes
from conntrack.table import FlowTable
from dataplane import hops_compiled
from dataplane.context import AWAITED, NOWHERE, Masquerading, occupy
from dataplane.fragments import Fragments
from dataplane.settings import PortRange
from tests import packets
from tests.named_packets import NAMED
from tests.packets import (
    CLIENT,
    CLIENT6,
    DNS_VIP,
    ENDPOINT,
    ENDPOINT6,
    OTHER_CLIENT,
    OTHER_ENDPOINT,
    OTHER_VIP,
    VIP,
    VIP6,
    Address,
)
from tests.reference import Key, Outcome, Service
from tests.small_node import (
    CLOSED_VIP,
    ELSEWHERE_VIP,
    EXTERNAL_VIP,
    FOREIGN_VIP,
    HAIRPIN,
    HOPS,
    LINK,
    LOST_CLIENT,
    LOST_VIP,
    NARROW_ENDPOINT,
    NARROW_VIP,
    OCCUPIED,
    OUTER_VIP,
    OWN,
    PASSING_VIP,
    RANDOM_VIP,
    RESETTING_VIP,
    SERVICES,
    SMALL,
    SNAT_PORTS,
    Pipeline,
    flows_of,
    reference_of,
    service_ports,
    service_table,
)
from xdp.addresses import IPAddress, address_of
from xdp.byteorder import swap16, swap32
from xdp.clock import ManualClock
from xdp.schema import Direction, Masquerade, Protocol, Reason, Scheduler, State, Tag, Verdict, verdict_of
from xdp.tables import Tables

TCP, UDP = Protocol.TCP, Protocol.UDP
FREE = [port for port in range(SNAT_PORTS.first, SNAT_PORTS.last + 1) if port not in OCCUPIED]  # to leave from
ON_LINK_24 = 32 - 24  # the step of the search at which prefixes of 24 bits come


class NodeUnderTest:
    """A pipeline over tables in memory, with Services that can change and a clock that stands."""

    def __init__(
        self,
        services: dict[tuple[int, int, int], Service] = SERVICES,
        capacity: int = SMALL.connections,
        ports: PortRange = SNAT_PORTS,
        sources: Iterable[IPAddress] = (),
    ) -> None:
        self.clock = ManualClock()
        self.tables = Tables.in_memory(replace(SMALL, connections=capacity))
        self.flows = FlowTable(self.tables, self.clock)
        self.flows.create()
        self._pipeline = Pipeline(self.tables, ports, sources)
        self.services = service_table(self.tables)
        self.apply(services)

    def apply(self, services: dict[tuple[int, int, int], Service]) -> None:
        """Change the Services."""
        self.services.apply(service_ports(services))

    @property
    def masquerading(self) -> Masquerading:
        """Who is masqueraded, and from where."""
        return self._pipeline.node.masquerading

    @property
    def fragments(self) -> Fragments:
        """Datagrams in fragments."""
        return self._pipeline.node.fragments

    @property
    def hops(self) -> hops_compiled.Hops:
        """The ways to every address."""
        return self._pipeline.node.hops

    def send(self, frame: bytes) -> Outcome:
        """Return what becomes of a frame."""
        return self._pipeline.send(frame, self.clock.now())

    def connect(self, client: Address = CLIENT, vip: Address = VIP) -> Address:
        """Establish a TCP connection; return its endpoint."""
        assert self.send(packets.syn(client, vip)).reason == Reason.ADMITTED
        endpoint = self.endpoint(client, vip)
        assert self.send(packets.syn_ack(endpoint, client)).reason == Reason.FORWARDED
        assert self.send(packets.ack(client, vip)).reason == Reason.FORWARDED
        assert self.state(client, vip) is State.ESTABLISHED
        return endpoint

    def endpoint(self, client: Address = CLIENT, vip: Address = VIP, protocol: Protocol = TCP) -> Address:
        """Return the endpoint of a connection."""
        return flows_of(self.tables)[Key(client, vip, protocol)].after.destination

    def state(self, client: Address = CLIENT, vip: Address = VIP, protocol: Protocol = TCP) -> State:
        """Return the state of a connection."""
        return flows_of(self.tables)[Key(client, vip, protocol)].state


@pytest.fixture
def node() -> NodeUnderTest:
    return NodeUnderTest()


def only(
    *endpoints: Address, vip: Address = VIP, protocol: Protocol = TCP, **more: Any
) -> dict[tuple[int, int, int], Service]:
    """Return a configuration with one Service."""
    return {(*vip, protocol): Service(endpoints, **more)}


def macs_to(address: Address) -> bytes:
    return HOPS[address[0]].macs


def test_t1_a_request_goes_to_an_endpoint_and_its_reply_comes_from_the_vip():
    node = NodeUnderTest(only(ENDPOINT))
    there = node.send(packets.syn())
    assert there == (Reason.ADMITTED, packets.rewritten(packets.syn(), CLIENT, ENDPOINT, macs_to(ENDPOINT)), 3)
    reply = packets.syn_ack(ENDPOINT, CLIENT)
    back = node.send(reply)
    assert back == (Reason.FORWARDED, packets.rewritten(reply, VIP, CLIENT, macs_to(CLIENT)), 2)


def test_t1_udp():
    node = NodeUnderTest(only(ENDPOINT, vip=DNS_VIP, protocol=UDP))
    assert node.send(packets.udp()).frame == packets.rewritten(packets.udp(), CLIENT, ENDPOINT, macs_to(ENDPOINT))
    reply = packets.udp(ENDPOINT, CLIENT)
    assert node.send(reply).frame == packets.rewritten(reply, DNS_VIP, CLIENT, macs_to(CLIENT))


@pytest.mark.parametrize(
    "name", [name for name in NAMED if name.startswith(("data", "syn-with-op", "syn-with-all", "syn-ttl-255"))]
)
def test_payload_and_options_stay_as_they_are(name: str):
    node = NodeUnderTest(only(ENDPOINT))
    assert node.send(NAMED[name]).frame == packets.rewritten(NAMED[name], CLIENT, ENDPOINT, macs_to(ENDPOINT))


@pytest.mark.parametrize("name", [name for name in NAMED if name.startswith("udp") and "wrong" not in name])
def test_n7_n8_datagrams(name: str):
    node = NodeUnderTest(only(ENDPOINT, vip=DNS_VIP, protocol=UDP))
    assert node.send(NAMED[name]).frame == packets.rewritten(NAMED[name], CLIENT, ENDPOINT, macs_to(ENDPOINT))


@pytest.mark.parametrize(
    "name",
    [
        "arp",
        "ipv6",
        "vlan",
        "gre-to-a-stranger",
        "echo-to-a-stranger",
        "syn-to-a-stranger",
        "fragment-to-a-stranger",
        "syn-ack",
        "error-about-an-error",
    ],
)
def test_t11_what_is_not_ours_stays_as_it_is(name: str, node: NodeUnderTest):
    reason, frame, ifindex = node.send(NAMED[name])
    assert verdict_of(reason) is Verdict.PASS
    assert (frame, ifindex) == (NAMED[name], 0)
    assert not node.tables.tags.any()


def test_t12_a_ttl_that_ends_here_is_the_kernel_s_to_answer(node: NodeUnderTest):
    endpoint = node.connect()
    for frame in (packets.syn(OTHER_CLIENT, ttl=1), packets.ack(ttl=1), packets.ack(endpoint, CLIENT, ttl=1)):
        assert node.send(frame) == (Reason.TTL_EXPIRED, frame, 0)
    assert len(flows_of(node.tables)) == 2


def test_c1_the_first_packet_decides_whatever_happens_to_the_service(node: NodeUnderTest):
    endpoint = node.connect()
    before = node.send(packets.data())
    for services in (only(OTHER_ENDPOINT if endpoint == ENDPOINT else ENDPOINT), only(), {}):
        node.apply(services)
        assert node.send(packets.data()) == before
        reply = packets.data(endpoint, CLIENT)
        assert node.send(reply).frame == packets.rewritten(reply, VIP, CLIENT, macs_to(CLIENT))


def test_c1_new_connections_follow_the_service(node: NodeUnderTest):
    node.connect()
    node.apply(only(OTHER_ENDPOINT))
    assert node.connect(OTHER_CLIENT) == OTHER_ENDPOINT
    node.apply(only())
    assert node.send(packets.syn((CLIENT[0], 7))).reason == Reason.NO_ENDPOINT
    node.apply({})
    assert node.send(packets.syn((CLIENT[0], 7))).reason == Reason.NOT_OURS


def test_c2_a_connection_closes_and_a_syn_begins_another_one(node: NodeUnderTest):
    endpoint = node.connect()
    node.send(packets.fin())
    assert node.state() is State.FIN_ORIGINAL
    node.send(packets.fin(endpoint, CLIENT))
    assert node.state() is State.TIME_WAIT
    other = OTHER_ENDPOINT if endpoint == ENDPOINT else ENDPOINT
    node.apply(only(other))
    assert node.send(packets.ack()).reason == Reason.FORWARDED, "the last ACK still follows the old one"
    assert node.send(packets.syn()).reason == Reason.ADMITTED
    assert (node.endpoint(), node.state()) == (other, State.SYN_SENT)
    assert len(flows_of(node.tables)) == 2


def test_c2_a_syn_on_an_open_connection_follows_it(node: NodeUnderTest):
    endpoint = node.connect()
    node.apply(only(OTHER_ENDPOINT if endpoint == ENDPOINT else ENDPOINT))
    assert node.send(packets.syn()).reason == Reason.FORWARDED
    assert (node.endpoint(), node.state()) == (endpoint, State.ESTABLISHED)


@pytest.mark.faults(57)
def test_c2_a_syn_of_the_endpoint_begins_nothing(node: NodeUnderTest):
    endpoint = node.connect()
    node.send(packets.rst())
    assert node.send(packets.syn(endpoint, CLIENT)).reason == Reason.FORWARDED


@pytest.mark.faults(59)
def test_c3_a_blind_rst_does_no_harm(node: NodeUnderTest):
    endpoint = node.connect()
    assert node.send(packets.rst()).reason == Reason.FORWARDED
    assert node.state() is State.CLOSING
    node.clock.advance(9)
    assert node.send(packets.data(endpoint, CLIENT)).reason == Reason.FORWARDED
    node.clock.advance(59)
    assert node.send(packets.ack()).reason == Reason.FORWARDED
    assert node.state() is State.ESTABLISHED
    node.clock.advance(7999)
    assert node.send(packets.data()).reason == Reason.FORWARDED


def test_c5_an_expired_connection_is_none(node: NodeUnderTest):
    endpoint = node.connect()
    node.clock.advance(8001)
    other = OTHER_ENDPOINT if endpoint == ENDPOINT else ENDPOINT
    node.apply(only(other))
    reply = packets.data(endpoint, CLIENT)
    assert node.send(reply) == (Reason.NOT_OURS, reply, 0)
    assert node.send(packets.data()).reason == Reason.ADMITTED
    assert node.endpoint() == other


def test_c8_on_a_connection_to_be_reset_whoever_sends_is_reset_until_the_client_begins_anew(node: NodeUnderTest):
    endpoint = node.connect()
    assert node.flows.reset_others(Protocol.TCP, [VIP], []) == 1
    for frame in (packets.data(), packets.data(endpoint, CLIENT), packets.syn(endpoint, CLIENT), packets.fin()):
        assert node.send(frame) == (Reason.ENDPOINT_REMOVED, packets.reset_to(frame), LINK)
        assert node.state() is State.RESET
    for frame in (packets.rst(), packets.rst(endpoint, CLIENT)):
        assert node.send(frame) == (Reason.ENDPOINT_REMOVED, frame, NOWHERE)
    assert node.send(packets.syn()).reason == Reason.ADMITTED
    assert node.state() is State.SYN_SENT


@pytest.mark.faults(58, 130)
def test_c11_a_packet_in_mid_stream_is_adopted_where_maglev_says():
    first, second = NodeUnderTest(), NodeUnderTest()
    for port in range(50):
        client = (CLIENT[0], 1000 + port)
        endpoint = first.connect(client)
        assert second.send(packets.data(client)).reason == Reason.ADMITTED
        assert (second.endpoint(client), second.state(client)) == (endpoint, State.ADOPTED)


def test_c11_an_adopted_connection_is_established_by_a_reply(node: NodeUnderTest):
    node.send(packets.data())
    node.send(packets.ack(node.endpoint(), CLIENT))
    assert node.state() is State.ESTABLISHED


@pytest.mark.parametrize(
    ("vip", "reason"),
    [
        (PASSING_VIP, Reason.MID_STREAM_PASSED),
        (RESETTING_VIP, Reason.MID_STREAM_RESET),
        (EXTERNAL_VIP, Reason.MID_STREAM_RESET),
    ],
    ids=["pass", "reset", "masqueraded"],
)
def test_c11_where_it_is_not_adopted_it_creates_none(vip: Address, reason: Reason, node: NodeUnderTest):
    services = SERVICES | {(*EXTERNAL_VIP, TCP): Service((ENDPOINT,), masquerade=Masquerade.REMOTE)}
    node.apply(services)
    for frame in (packets.data(CLIENT, vip), packets.fin(CLIENT, vip), packets.syn_ack(CLIENT, vip)):
        assert node.send(frame).reason == reason
    assert not node.tables.tags.any()
    assert node.send(packets.syn(CLIENT, vip)).reason == Reason.ADMITTED


@pytest.mark.parametrize("name", ["null", "xmas", "syn-fin", "syn-rst"])
def test_c13_flags_that_no_stack_sends_create_no_state(name: str, node: NodeUnderTest):
    assert node.send(NAMED[name]) == (Reason.BAD_FLAGS, NAMED[name], 0)
    assert not node.tables.tags.any()


@pytest.mark.parametrize("name", ["null", "xmas", "syn-fin"])
def test_c4_on_a_connection_they_are_forwarded(name: str, node: NodeUnderTest):
    node.connect()
    assert node.send(NAMED[name]).reason == Reason.FORWARDED
    assert node.state() is State.ESTABLISHED


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("0.255.255.255", Reason.MARTIAN_SOURCE),
        ("1.0.0.0", Reason.NO_NEXT_HOP),
        ("126.255.255.255", Reason.NO_NEXT_HOP),
        ("127.0.0.1", Reason.MARTIAN_SOURCE),
        ("128.0.0.0", Reason.NO_NEXT_HOP),
        ("223.255.255.255", Reason.NO_NEXT_HOP),
        ("224.0.0.0", Reason.MARTIAN_SOURCE),
        ("239.255.255.255", Reason.MARTIAN_SOURCE),
        ("240.0.0.0", Reason.NO_NEXT_HOP),  # reserved, and as the kernel forwarded
        ("255.255.255.254", Reason.NO_NEXT_HOP),
        ("255.255.255.255", Reason.MARTIAN_SOURCE),
    ],
)
def test_c13_a_source_that_is_no_host_begins_nothing(source: str, reason: Reason, node: NodeUnderTest):
    frame = packets.syn(packets.address(f"{source}:4000"))
    assert node.send(frame)[:2] == (reason, frame)
    assert not node.tables.tags.any()


def test_a_rst_without_a_connection_creates_none(node: NodeUnderTest):
    assert node.send(packets.rst()) == (Reason.STRAY_RST, packets.rst(), 0)
    assert not node.tables.tags.any()


@pytest.mark.parametrize(
    ("vip", "reason", "egress"),
    [
        (ELSEWHERE_VIP, Reason.NO_LOCAL_ENDPOINT, NOWHERE),
        (CLOSED_VIP, Reason.SOURCE_REFUSED, NOWHERE),
        (LOST_VIP, Reason.NO_NEXT_HOP, AWAITED),
        (FOREIGN_VIP, Reason.NOT_FORWARDABLE, NOWHERE),
    ],
)
def test_what_cannot_be_reached_leaves_no_state(vip: Address, reason: Reason, egress: int, node: NodeUnderTest):
    frame = packets.syn(destination=vip)
    assert node.send(frame) == (reason, frame, egress)
    assert not node.tables.tags.any()


def masqueraded(frame: bytes, source: Address, endpoint: Address) -> bytes:
    return packets.rewritten(frame, source, endpoint, macs_to(endpoint))


def test_t3_external_clients_come_from_the_node_s_address_and_are_answered_from_the_vip(node: NodeUnderTest):
    node.apply(only(ENDPOINT, vip=EXTERNAL_VIP, masquerade=Masquerade.REMOTE))
    sent = node.send(packets.syn(OTHER_CLIENT, EXTERNAL_VIP))
    source = OWN, OTHER_CLIENT[1]  # its own port is one of those that it may leave from
    assert sent == (Reason.ADMITTED, masqueraded(packets.syn(OTHER_CLIENT, EXTERNAL_VIP), source, ENDPOINT), 3)
    reply = packets.syn_ack(ENDPOINT, source)
    back = packets.rewritten(reply, EXTERNAL_VIP, OTHER_CLIENT, macs_to(OTHER_CLIENT))
    assert node.send(reply) == (Reason.FORWARDED, back, 2)


def test_t5_an_endpoint_reaches_itself(node: NodeUnderTest):
    node.apply(only(ENDPOINT))
    sent = node.send(packets.syn(HAIRPIN, VIP))
    source = OWN, HAIRPIN[1]
    assert sent == (Reason.ADMITTED, masqueraded(packets.syn(HAIRPIN, VIP), source, ENDPOINT), 3)
    reply = packets.syn_ack(ENDPOINT, source)
    assert node.send(reply) == (Reason.FORWARDED, packets.rewritten(reply, VIP, HAIRPIN, macs_to(ENDPOINT)), 3)


def test_c12_a_port_that_is_taken_or_not_ours_becomes_another_until_there_is_none(node: NodeUnderTest):
    node.apply(only(ENDPOINT, vip=OUTER_VIP, masquerade=Masquerade.EVERYBODY))
    for number in range(len(FREE)):
        client = CLIENT[0] + number % 2, 40_001 if number < 2 else 1099
        assert node.send(packets.syn(client, OUTER_VIP)).reason == Reason.ADMITTED
    ports = sorted(flow.after.source[1] for key, flow in flows_of(node.tables).items() if key.destination == OUTER_VIP)
    assert ports == FREE
    frame = packets.syn((CLIENT[0], 1098), OUTER_VIP)
    assert node.send(frame) == (Reason.NO_SNAT_PORT, frame, NOWHERE)
    node.clock.advance(61)
    node.flows.sweep()
    assert node.send(frame).reason == Reason.ADMITTED


def test_c12_a_port_serves_once_for_each_endpoint(node: NodeUnderTest):
    everybody = Service((ENDPOINT, OTHER_ENDPOINT), masquerade=Masquerade.EVERYBODY)
    node.apply({(*OUTER_VIP, TCP): everybody, (*DNS_VIP, UDP): Service((ENDPOINT,), masquerade=Masquerade.EVERYBODY)})
    seen = [node.send(packets.syn((CLIENT[0], port), OUTER_VIP)).reason for port in range(1100, 1140)]
    assert seen.count(Reason.ADMITTED) == 6
    assert node.send(packets.udp((CLIENT[0], 1100))).reason == Reason.ADMITTED


def test_c12_nine_tenths_of_the_ports_are_taken_before_one_of_a_hundred_finds_none():
    ports = PortRange(20_000, 20_999)
    node = NodeUnderTest(only(ENDPOINT, vip=OUTER_VIP, masquerade=Masquerade.EVERYBODY), capacity=3000, ports=ports)
    reasons = [
        node.send(packets.syn((CLIENT[0] + number % 2, 2000 + number), OUTER_VIP)).reason for number in range(900)
    ]
    assert reasons.count(Reason.NO_SNAT_PORT) <= 9
    used = {flow.after.source[1] for flow in flows_of(node.tables).values() if flow.direction == Direction.ORIGINAL}
    assert len(used) == reasons.count(Reason.ADMITTED)
    assert ports.first <= min(used) <= max(used) <= ports.last


@pytest.mark.parametrize("port", [0, 1, 511, 512, 599, 600, 700, 1023])
def test_c12_a_privileged_port_becomes_a_privileged_one_and_is_kept_if_it_is_free(node: NodeUnderTest, port: int):
    node.apply(only(ENDPOINT, vip=OUTER_VIP, masquerade=Masquerade.EVERYBODY))
    model = reference_of(node.tables, node.clock.hertz, only(ENDPOINT, vip=OUTER_VIP, masquerade=Masquerade.EVERYBODY))
    for client in ((CLIENT[0], port), (CLIENT[0] + 1, port)):
        frame = packets.syn(client, OUTER_VIP)
        assert node.send(frame) == model.userspace(frame, node.clock.now())
    first, second = (
        flows_of(node.tables)[Key((CLIENT[0] + n, port), OUTER_VIP, TCP)].after.source[1] for n in range(2)
    )
    assert (first == port) == (port in (600, 1023))
    for used in (first, second):
        assert 600 <= used <= 1023
    assert first != second


def test_c12_no_connection_leaves_from_a_port_that_a_socket_of_the_node_has():
    """Its own port is kept again once the socket has gone; meanwhile tries go on to others."""
    node = NodeUnderTest(only(ENDPOINT, vip=OUTER_VIP, masquerade=Masquerade.EVERYBODY))
    given = node.masquerading

    def left_from(*ports: int) -> int:
        """Return where the first that finds a port leaves from: in one of thirty cases, tries miss what is free."""
        for client in ((CLIENT[0], port) for port in ports):
            if node.send(packets.syn(client, OUTER_VIP)).reason == Reason.ADMITTED:
                return int(flows_of(node.tables)[Key(client, OUTER_VIP, TCP)].after.source[1])
        raise AssertionError("no port was found")

    occupy(given, [40_001, 40_003, 40_004])
    assert left_from(40_001, *range(2000, 2020)) == 40_002
    assert node.send(packets.syn((CLIENT[0], 2100), OUTER_VIP)).reason == Reason.NO_SNAT_PORT
    occupy(given, [40_001, 40_003])
    assert left_from(*range(2200, 2220)) == 40_004
    occupy(given, [])
    assert left_from(40_003) == 40_003
    occupy(given, [0, 63, 64, 40_000, 65_535])
    assert left_from(*range(2300, 2320)) == 40_001


def test_c12_no_connection_leaves_from_where_a_service_is():
    """Node ports are at the address that connections come from, which may be a VIP, too."""
    everybody = only(ENDPOINT, vip=OUTER_VIP, masquerade=Masquerade.EVERYBODY)
    services = everybody | only(OTHER_ENDPOINT, vip=(OWN, 40_001)) | only(ENDPOINT, vip=(OWN, 40_002), protocol=UDP)
    node = NodeUnderTest(services)
    model = reference_of(node.tables, node.clock.hertz, services)
    for number in range(4):
        frame = packets.syn((CLIENT[0] + number, 40_001), OUTER_VIP)
        assert node.send(frame) == model.userspace(frame, node.clock.now())
    ports = sorted(flow.after.source[1] for key, flow in flows_of(node.tables).items() if key.destination == OUTER_VIP)
    assert ports == [40_002, 40_003]  # the Service at the first of them is one of UDP


def test_c12_every_address_to_come_from_has_all_the_ports():
    given = (CLIENT[0] + 100, CLIENT[0] + 101)
    services = only(ENDPOINT, vip=OUTER_VIP, masquerade=Masquerade.EVERYBODY)
    node = NodeUnderTest(services, sources=map(address_of, given))
    model = reference_of(node.tables, node.clock.hertz, services, given)
    now = node.clock.now()
    for port in range(1100, 1140):
        frame = packets.syn((CLIENT[0], port), OUTER_VIP)
        assert node.send(frame) == model.userspace(frame, now)
    sources = {flow.after.source for flow in flows_of(node.tables).values() if flow.direction == Direction.ORIGINAL}
    assert sources == {(host, port) for host in given for port in FREE}


def test_c12_addresses_of_either_family_are_for_that_family():
    own, own6 = ip_address("10.1.0.99"), ip_address("2001:db8:1::99")
    everybody = Service((ENDPOINT,), masquerade=Masquerade.EVERYBODY)
    everybody6 = Service((ENDPOINT6,), masquerade=Masquerade.EVERYBODY)
    node = NodeUnderTest({(*OUTER_VIP, TCP): everybody, (*VIP6, TCP | Protocol.IPV6): everybody6}, sources=[own, own6])
    assert IP(node.send(packets.syn(CLIENT, OUTER_VIP)).frame[14:]).src == str(own)
    assert IPv6(node.send(packets.syn(CLIENT6, VIP6)).frame[14:]).src == str(own6)


def test_n1_an_error_about_a_masqueraded_packet_reaches_its_client(node: NodeUnderTest):
    node.apply(only(ENDPOINT, vip=OUTER_VIP, masquerade=Masquerade.EVERYBODY))
    left = node.send(packets.syn(OTHER_CLIENT, OUTER_VIP)).frame
    error = packets.icmp_error(left)  # from a router beyond
    sent = node.send(error)
    assert (sent.reason, sent.ifindex) == (Reason.FORWARDED, 2)
    inner = IP(sent.frame[14 + 20 + 8 :])
    assert (inner.src, inner.sport) == (packets.host(OTHER_CLIENT[0]), OTHER_CLIENT[1])
    assert (inner.dst, inner.dport) == (packets.host(OUTER_VIP[0]), OUTER_VIP[1])
    assert IP(sent.frame[14:]).dst == packets.host(OTHER_CLIENT[0])


def test_a_client_without_a_route_is_not_waited_for(node: NodeUnderTest):
    frame = packets.syn(packets.STRANGER)
    assert node.send(frame) == (Reason.NO_NEXT_HOP, frame, NOWHERE)
    assert not node.tables.tags.any()


def test_a_client_on_the_link_whose_address_was_asked_for_is_waited_for(node: NodeUnderTest):
    starts = np.array([0] * (ON_LINK_24 + 1) + [1] * (hops_compiled.LENGTHS - ON_LINK_24), np.uint32)
    network, target = np.array([packets.STRANGER[0] & ~0xFF], np.uint32), np.array([hops_compiled.ON_LINK], np.uint32)
    hops_compiled.publish_routes(node.hops, starts, network, target)
    frame = packets.syn(packets.STRANGER)
    assert node.send(frame) == (Reason.NO_NEXT_HOP, frame, AWAITED)
    assert not node.tables.tags.any()


def test_a_client_is_waited_for_that_no_answer_could_reach_yet(node: NodeUnderTest):
    frame = packets.syn(LOST_CLIENT)
    assert node.send(frame) == (Reason.NO_NEXT_HOP, frame, AWAITED)
    assert not node.tables.tags.any()


def test_a_frame_larger_than_the_mtu_of_its_next_hop_is_dropped(node: NodeUnderTest):
    fits, too_big = (packets.data(destination=NARROW_VIP, payload=bytes(size)) for size in (60, 61))
    assert node.send(too_big) == (Reason.TOO_BIG, too_big, 0)
    assert node.send(fits).reason == Reason.ADMITTED
    assert node.send(too_big) == (Reason.TOO_BIG, too_big, 0)


@pytest.mark.parametrize("kind", packets.ICMP_ERRORS)
def test_n1_n2_an_error_on_the_way_to_the_client_reaches_the_endpoint(kind: str):
    node = NodeUnderTest(only(ENDPOINT))
    node.connect()
    sent = packets.data(ENDPOINT, CLIENT)
    seen = node.send(sent).frame
    error = node.send(packets.icmp_error(seen, kind))
    expected = packets.icmp_error(sent, kind, ttl=59)
    assert error.reason == Reason.FORWARDED
    assert error.frame[:12] == macs_to(ENDPOINT)
    # The quote is as the endpoint sent it, but for the TTL that we counted down: and its header checksum.
    quote = slice(42, 42 + 20)
    assert error.frame[12:42][:24] == expected[12:42][:24]
    assert error.frame[quote][12:] == expected[quote][12:]
    assert error.frame[62:] == expected[62:]
    assert_right_sums(error.frame)
    assert node.state() is State.ESTABLISHED


@pytest.mark.parametrize("kind", packets.ICMP_ERRORS)
def test_n1_an_error_on_the_way_to_the_endpoint_reaches_the_client_as_about_the_vip(kind: str):
    node = NodeUnderTest(only(ENDPOINT))
    node.connect()
    seen = node.send(packets.data()).frame
    outcome = node.send(packets.icmp_error(seen, kind))
    assert (outcome.reason, outcome.ifindex) == (Reason.FORWARDED, 2)
    quoted = outcome.frame[42:]
    assert quoted[12:20] == packets.data()[26:34], "from the client to the VIP"
    assert quoted[20:] == packets.data()[34:], "ports and checksum as it sent them"
    from_vip = VIP[0].to_bytes(4, "big") + CLIENT[0].to_bytes(4, "big")
    assert outcome.frame[26:34] == from_vip, "where a connection's source changes, its errors' does, too"
    assert_right_sums(outcome.frame)


def assert_right_sums(frame: bytes) -> None:
    """Check the three checksums of an ICMP error."""

    def total(data: bytes) -> int:
        value = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big") for at in range(0, len(data), 2))
        while value >> 16:
            value = (value & 0xFFFF) + (value >> 16)
        return value

    assert total(frame[14:34]) == total(frame[34:]) == total(frame[42:62]) == 0xFFFF


def test_an_error_about_nothing_that_we_know_is_dropped(node: NodeUnderTest):
    error = packets.icmp_error(packets.data(packets.STRANGER, CLIENT))
    assert node.send(error) == (Reason.ICMP_UNUSABLE, error, 0)


def test_c5_an_error_about_an_expired_connection_of_which_nobody_knows_the_endpoint_is_dropped(node: NodeUnderTest):
    node.connect(vip=RANDOM_VIP)
    error = packets.icmp_error(packets.data(RANDOM_VIP, CLIENT))
    assert node.send(error).reason == Reason.FORWARDED
    node.clock.advance(8001)
    assert node.send(error) == (Reason.ICMP_UNUSABLE, error, 0)


def test_two_vips_in_front_of_one_endpoint_do_not_mix_one_client_port_up():
    """The reply could not be told apart: the second connection gets another endpoint, if there is one."""
    both = {(*vip, TCP): Service((ENDPOINT, OTHER_ENDPOINT)) for vip in (VIP, OTHER_VIP)}
    node = NodeUnderTest(both)
    first = node.connect(CLIENT, VIP)
    second = node.connect(CLIENT, OTHER_VIP)
    assert {first, second} == {ENDPOINT, OTHER_ENDPOINT}
    for endpoint, vip in ((first, VIP), (second, OTHER_VIP)):
        reply = packets.data(endpoint, CLIENT)
        assert node.send(reply).frame == packets.rewritten(reply, vip, CLIENT, macs_to(CLIENT))


def test_a_client_port_comes_to_a_single_endpoint_through_as_many_vips_as_there_are_ports_to_come_from():
    vips = [(VIP[0] + number, VIP[1]) for number in range(len(FREE) + 2)]
    node = NodeUnderTest({(*vip, TCP): Service((ENDPOINT,)) for vip in vips})
    for vip in vips[:-1]:
        assert node.send(packets.syn(CLIENT, vip)).reason == Reason.ADMITTED
    sources = [flows_of(node.tables)[Key(CLIENT, vip, TCP)].after.source for vip in vips[:-1]]
    assert (sources[0], set(sources[1:])) == (CLIENT, {(CLIENT[0], port) for port in FREE})
    frame = packets.syn(CLIENT, vips[-1])
    assert node.send(frame) == (Reason.REPLY_CLASH, frame, 0)
    assert node.connect(OTHER_CLIENT, vips[-1]) == ENDPOINT


def test_c7_a_full_table_drops_and_makes_room_among_the_unreplied():
    node = NodeUnderTest(only(ENDPOINT))
    admitted = [client for client in clients() if node.send(packets.syn(client)).reason == Reason.ADMITTED]
    refused = packets.syn((CLIENT[0], 9))
    reasons = {node.send(packets.syn((CLIENT[0], port))).reason for port in range(1, 200)}
    assert Reason.TABLE_FULL in reasons
    assert np.count_nonzero(node.tables.tags.view(np.uint16) == Tag.WITHDRAWN) > 0
    node.flows.sweep()
    assert node.send(refused).reason in (Reason.ADMITTED, Reason.FORWARDED)
    assert len(admitted) > 0.84 / 0.8 * SMALL.connections * 0.9


def clients() -> list[Address]:
    return [(CLIENT[0], 10_000 + port) for port in range(SMALL.connections * 2)]


@pytest.mark.parametrize("name", NAMED)
def test_the_reference_model_agrees(name: str, node: NodeUnderTest):
    model = reference_of(node.tables, node.clock.hertz)
    for frame in (NAMED["syn"], NAMED["udp"], NAMED[name], NAMED["fin"], NAMED[name]):
        assert node.send(frame) == model.userspace(frame, node.clock.now())


def test_scratch_space_and_the_bytes_around_a_frame_are_left_alone(node: NodeUnderTest):
    pipeline = Pipeline(node.tables)
    pipeline._memory[:] = 0xA5
    pipeline.send(packets.syn(), node.clock.now())
    assert (pipeline._memory[:100] == 0xA5).all()
    assert (pipeline._memory[100 + len(packets.syn()) :] == 0xA5).all()
    assert passes.count_used(node.tables.tags) == 2


# Least connections.

LEAST = Scheduler.LEAST_CONNECTIONS


def loads(node: NodeUnderTest) -> dict[Address, int]:
    """Return the load of each endpoint that least connections chooses among."""
    _, endpoints = node.services.loaded()
    return {(swap32(row["addr"]), swap16(row["port"])): int(row["load"]) for row in endpoints}


def recount(node: NodeUnderTest) -> None:
    """Do what the control plane does every second."""
    rows, endpoints = node.services.loaded()
    node.services.correct_loads(rows, endpoints, node.flows.count_open(endpoints))


def ports_of_a_client(first: int, count: int) -> list[Address]:
    return [(CLIENT[0], port) for port in range(first, first + count)]


def test_L_least_connections_keeps_endpoints_even():
    node = NodeUnderTest(only(ENDPOINT, OTHER_ENDPOINT, NARROW_ENDPOINT, scheduler=LEAST))
    for client in ports_of_a_client(1000, 60):
        node.connect(client)
    assert sum(loads(node).values()) == 60
    assert max(loads(node).values()) - min(loads(node).values()) <= 8
    before = loads(node)
    recount(node)
    assert loads(node) == before, "all are open"


def test_L_least_connections_gives_a_new_endpoint_most_of_what_begins():
    node = NodeUnderTest(only(ENDPOINT, scheduler=LEAST), capacity=1000)
    for client in ports_of_a_client(1000, 200):
        assert node.connect(client) == ENDPOINT
    node.apply(only(ENDPOINT, OTHER_ENDPOINT, scheduler=LEAST))
    given = [node.connect(client) for client in ports_of_a_client(2000, 200)]
    assert given.count(OTHER_ENDPOINT) > 120, "three of four: unless both dice fall on the other one"


def test_L_connections_that_close_count_no_more():
    node = NodeUnderTest(only(ENDPOINT, OTHER_ENDPOINT, scheduler=LEAST))
    given = {client: node.connect(client) for client in ports_of_a_client(1000, 40)}
    for client, endpoint in given.items():
        if endpoint == ENDPOINT:
            node.send(packets.fin(client, VIP))
            node.send(packets.fin(endpoint, client))
    recount(node)
    assert loads(node) == {ENDPOINT: 0, OTHER_ENDPOINT: list(given.values()).count(OTHER_ENDPOINT)}
    assert [node.connect(client) for client in ports_of_a_client(2000, 16)].count(ENDPOINT) > 3


def test_L_connections_through_another_service_count_too():
    both = only(ENDPOINT, OTHER_ENDPOINT, scheduler=LEAST)
    node = NodeUnderTest({**both, **only(ENDPOINT, vip=OTHER_VIP)})
    for client in ports_of_a_client(1000, 20):
        node.connect(client, OTHER_VIP)
    assert set(loads(node).values()) == {0}
    recount(node)
    assert loads(node) == {ENDPOINT: 20, OTHER_ENDPOINT: 0}


def test_L_what_begins_while_connections_are_counted_counts():
    node = NodeUnderTest(only(ENDPOINT, scheduler=LEAST))
    for client in ports_of_a_client(1000, 3):
        node.connect(client)
    rows, endpoints = node.services.loaded()
    counts = node.flows.count_open(endpoints)
    for client in ports_of_a_client(2000, 2):
        node.connect(client)
    node.services.correct_loads(rows, endpoints, counts)
    assert loads(node) == {ENDPOINT: 5}


def test_L_a_row_that_another_endpoint_has_by_now_keeps_its_load():
    node = NodeUnderTest(only(ENDPOINT, scheduler=LEAST))
    for client in ports_of_a_client(1000, 3):
        node.connect(client)
    rows, endpoints = node.services.loaded()
    node.apply(only(OTHER_ENDPOINT, scheduler=LEAST))
    parted = node.services.take_parted()
    node.services.release(parted)
    node.apply(only(OTHER_ENDPOINT, NARROW_ENDPOINT, scheduler=LEAST))
    assert rows[0] in node.services.loaded()[0], "it was given to another one"
    node.services.correct_loads(rows, endpoints, np.zeros(1, np.uint32))
    assert set(loads(node).values()) == {0}
