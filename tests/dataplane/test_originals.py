"""What becomes of a copy: as the pipeline says, or sent on where the filter has dropped its original."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from conntrack.table import FlowTable
from dataplane import packetrings
from dataplane.context import AWAITED
from dataplane.originals import Kind, Place, judge, new_originals, publish
from dataplane.packetrings import VNET_BYTES, VNET_NEEDS_CSUM
from tests import packets
from tests.packets import (
    CLIENT,
    CLIENT6,
    ENDPOINT,
    ENDPOINT6,
    OTHER_CLIENT,
    OTHER_CLIENT6,
    OTHER_ENDPOINT,
    STRANGER,
    STRANGER6,
    VIP,
    VIP6,
    rewritten,
    tagged,
    untagged,
)
from tests.reference import Outcome
from tests.small_node import (
    DNS_ENDPOINT6,
    DNS_ENDPOINTS,
    FOREIGN_ENDPOINT,
    HOPS,
    LOST_ENDPOINT,
    NARROW_ENDPOINT,
    NARROW_ENDPOINT6,
    OCCUPIED,
    OUTER_VIP,
    OUTER_VIP6,
    OWN,
    OWN6,
    SERVICES,
    SMALL,
    SNAT_PORTS,
    Pipeline,
    name_of,
    service_ports,
    service_table,
)
from xdp.addresses import is_ipv6
from xdp.clock import ManualClock
from xdp.schema import Protocol, Reason
from xdp.tables import Tables

GONE = packets.address("10.96.0.99:80")  # a frontend that is none any more
GONE6 = packets.address("[fd00:96::99]:80")
PLAIN = bytes(VNET_BYTES)
START = 64


class Copies:
    """The packet path of engine `raw` over tables in memory: copies in, verdicts out."""

    def __init__(self) -> None:
        clock = ManualClock()
        tables = Tables.in_memory(SMALL)
        FlowTable(tables, clock).create()
        self.node = Pipeline(tables).node
        service_table(tables).apply(service_ports(SERVICES))
        self.now = np.uint32(clock.now())
        self.originals = new_originals(64)
        endpoints = [(*place, Protocol.TCP) for place in (ENDPOINT, OTHER_ENDPOINT, LOST_ENDPOINT)]
        endpoints += [(*place, Protocol.UDP) for place in DNS_ENDPOINTS]
        endpoints += [self.known((*place, Protocol.TCP)) for place in (ENDPOINT6, NARROW_ENDPOINT6)]
        endpoints += [self.known((*DNS_ENDPOINT6, Protocol.UDP))]
        self.places = {
            Kind.ENDPOINT: endpoints,
            Kind.RETIRED: [(*GONE, Protocol.TCP), self.known((*GONE6, Protocol.TCP))],
            Kind.OWN: [(OWN, 0, 0), self.known((OWN6, 0, 0))],
        }
        publish(self.originals, self.places)
        self.vnet = PLAIN

    def known(self, place: Place) -> Place:
        """Return a place of IPv6 as packets know it."""
        address, port, protocol = place
        return name_of(self.node.tables, address), port, protocol | Protocol.IPV6

    def send(self, frame: bytes, vnet: bytes = PLAIN) -> Outcome:
        """Return what becomes of a frame behind a VNET header; `self.vnet` is what that has become."""
        memory = np.zeros(1 << 17, np.uint8)
        memory[START - VNET_BYTES : START + len(frame)] = list(vnet + frame)
        reason, egress = judge(self.node, self.originals, memory, START, len(frame), self.now)
        self.vnet = memory[START - VNET_BYTES : START].tobytes()
        return Outcome(Reason(int(reason)), memory[START : START + len(frame)].tobytes(), int(egress))

    def connect(self) -> packets.Address:
        """Begin a connection; return its endpoint."""
        found = Ether(self.send(packets.syn()).frame)[IP].dst
        return packets.address(f"{found}:8080")


@pytest.fixture
def copies() -> Copies:
    return Copies()


def unfinished(frame: bytes) -> tuple[bytes, bytes]:
    """Return (frame, VNET header) as a local stack gives it to a device: only the pseudo header is summed."""
    packet = Ether(frame)
    layer, offset = (packet[TCP], 16) if TCP in packet else (packet[UDP], 6)
    if IPv6 in packet:
        ends, protocol, length = bytes(packet[IPv6])[8:40], packet[IPv6].nh, packet[IPv6].plen
        start = 54
    else:
        ip = packet[IP]
        ends, protocol, length = bytes(ip)[12:20], ip.proto, ip.len - 4 * ip.ihl
        start = 14 + 4 * ip.ihl
    total = sum(struct.unpack(f"!{len(ends) // 2}H", ends)) + protocol + length
    total = (total & 0xFFFF) + (total >> 16)
    layer.chksum = (total & 0xFFFF) + (total >> 16)
    return bytes(packet), struct.pack("=BBHHHH", VNET_NEEDS_CSUM, 0, 0, 0, start, offset)


def routed(frame: bytes, macs: bytes) -> bytes:
    """Return a frame as a router sends it on."""
    packet = Ether(frame)
    if IPv6 in packet:
        packet[IPv6].hlim -= 1
    else:
        packet[IP].ttl -= 1
        del packet[IP].chksum
    return macs + bytes(packet)[12:]


# Offloads.


@pytest.mark.faults(66)
@pytest.mark.parametrize("make", [packets.syn, packets.udp], ids=["tcp", "udp"])
def test_a_checksum_that_a_device_is_to_finish_covers_the_new_addresses(copies, make):
    given, vnet = unfinished(make())
    sent = copies.send(given, vnet)
    assert sent.reason is Reason.ADMITTED
    layer = Ether(sent.frame)
    endpoint = packets.address(f"{layer[IP].dst}:{layer.dport}")
    whole = rewritten(make(), CLIENT, endpoint, HOPS[endpoint[0]].macs)
    assert (sent.frame, copies.vnet) == (unfinished(whole)[0], vnet)


@pytest.mark.parametrize(
    "frame", [packets.syn(CLIENT6, VIP6), packets.udp(CLIENT6, packets.DNS_VIP6, b"odd")], ids=["tcp", "udp"]
)
def test_N9_such_a_checksum_of_ipv6_too(copies, frame):
    given, vnet = unfinished(frame)
    sent = copies.send(given, vnet)
    assert sent.reason is Reason.ADMITTED
    layer = Ether(sent.frame)
    endpoint = packets.address(f"[{layer[IPv6].dst}]:{layer[IPv6].payload.dport}")
    whole = rewritten(frame, CLIENT6, endpoint, HOPS[endpoint[0]].macs)
    assert (sent.frame, copies.vnet) == (unfinished(whole)[0], vnet)


def test_a_checksum_that_was_verified_is_not_said_to_be_so_any_more(copies):
    data_valid = struct.pack("=BBHHHH", 2, 0, 0, 0, 0, 0)
    endpoint = Ether(copies.send(packets.syn(), data_valid).frame)[IP].dst
    assert endpoint in {packets.host(ENDPOINT[0]), packets.host(OTHER_ENDPOINT[0])}
    assert copies.vnet == PLAIN


def behind_tags(vnet: bytes, vlans: tuple[int, ...]) -> bytes:
    """Return a VNET header as it is of a frame with a tag for each of these VLANs."""
    flags, kind, header, size, start, offset = struct.unpack("=BBHHHH", vnet)
    more = 4 * len(vlans)
    return struct.pack("=BBHHHH", flags, kind, header + more, size, start + more, offset)


@pytest.mark.parametrize("vlans", [(5,), (5, 7)], ids=str)
@pytest.mark.parametrize("make", [packets.syn, packets.udp], ids=["tcp", "udp"])
def test_N6_such_a_checksum_behind_vlan_tags(copies, make, vlans):
    given, vnet = unfinished(make())
    vnet = behind_tags(vnet, vlans)
    sent = copies.send(tagged(given, *vlans), vnet)
    assert sent.reason is Reason.ADMITTED
    layer = Ether(untagged(sent.frame))
    endpoint = packets.address(f"{layer[IP].dst}:{layer.dport}")
    whole = rewritten(make(), CLIENT, endpoint, HOPS[endpoint[0]].macs)
    assert (sent.frame, copies.vnet) == (tagged(unfinished(whole)[0], *vlans), vnet)


@pytest.mark.parametrize(("vlans", "fits"), [((5,), 1460), ((5, 7), 1456)], ids=str)
def test_N6_a_tagged_frame_larger_than_the_mtu_is_sent_if_its_segments_fit(copies, vlans, fits):
    copies.connect()
    frame = tagged(unfinished(packets.data(payload=b"x" * 60_000))[0], *vlans)
    for kind in (packetrings.GSO_TCPV4, packetrings.GSO_TCPV4 | 0x80):
        for segment, reason in ((fits, Reason.FORWARDED), (fits + 1, Reason.TOO_BIG)):
            vnet = behind_tags(gso(segment, kind), vlans)
            assert (copies.send(frame, vnet).reason, copies.vnet) == (reason, vnet)


@pytest.mark.parametrize("vlans", [(5,), (5, 7)], ids=str)
@pytest.mark.parametrize(
    ("frame", "to"),
    [(packets.syn_ack(ENDPOINT, CLIENT), CLIENT), (packets.syn_ack(ENDPOINT6, CLIENT6), CLIENT6)],
    ids=["4", "6"],
)
def test_N6_a_tagged_frame_that_an_endpoint_sends_past_its_services_is_sent_on(copies, vlans, frame, to):
    hop, vnet = HOPS[to[0]], behind_tags(unfinished(frame)[1], vlans)
    sent = copies.send(tagged(frame, *vlans), vnet)
    assert sent == (Reason.SENT_ON, tagged(routed(frame, hop.macs), *vlans), hop.ifindex)
    assert copies.vnet == vnet


@pytest.mark.parametrize("vlans", [(6,), (4095,), (5, 4095), (5, 5, 5)], ids=str)
def test_N6_of_other_vlans_the_kernel_has_the_original(copies, vlans):
    for frame in (packets.syn(), packets.syn_ack(ENDPOINT, CLIENT)):
        assert copies.send(tagged(frame, *vlans)) == (Reason.OTHER_VLAN, tagged(frame, *vlans), 0)


def gso(segment: int, kind: int = packetrings.GSO_TCPV4) -> bytes:
    return struct.pack("=BBHHHH", VNET_NEEDS_CSUM, kind, 54, segment, 34, 16)


@pytest.mark.faults(94)
def test_a_frame_larger_than_the_mtu_is_sent_if_its_segments_fit(copies):
    endpoint = copies.connect()
    frame, _ = unfinished(packets.data(payload=b"x" * 60_000))
    assert copies.send(frame).reason is Reason.TOO_BIG
    sent = copies.send(frame, gso(1460))
    assert (sent.reason, len(sent.frame), Ether(sent.frame)[IP].dst) == (
        Reason.FORWARDED,
        len(frame),
        packets.host(endpoint[0]),
    )
    assert copies.vnet == gso(1460)
    assert copies.send(frame, gso(1461)).reason is Reason.TOO_BIG


@pytest.mark.parametrize("header", [b"", bytes(packets.end_options(16))], ids=["plain", "options"])
def test_N9_an_ipv6_frame_larger_than_the_mtu_is_sent_if_its_segments_fit(copies, header):
    copies.send(packets.syn(CLIENT6, VIP6))
    frame = packets.data(CLIENT6, VIP6, b"x" * 60_000)
    frame = packets.behind(packets.end_options(16), frame) if header else frame
    start = 54 + len(header)
    fits = 1440 - len(header)
    for flags in (VNET_NEEDS_CSUM, 0) if not header else (VNET_NEEDS_CSUM,):
        for segment, reason in ((fits, Reason.FORWARDED), (fits + 1, Reason.TOO_BIG)):
            vnet = struct.pack("=BBHHHH", flags, packetrings.GSO_TCPV6, start + 20, segment, start * flags, 16 * flags)
            assert copies.send(frame, vnet).reason is reason


def test_datagrams_that_are_to_be_cut_fit_if_their_pieces_do(copies):
    frame, _ = unfinished(packets.udp(payload=b"x" * 30_000))
    assert copies.send(frame, gso(1473, packetrings.GSO_UDP_L4)).reason is Reason.TOO_BIG
    assert copies.send(frame, gso(1472, packetrings.GSO_UDP_L4)).reason is Reason.ADMITTED


# What is to the node itself.


def served(copies: Copies, *frontends: packets.Address) -> None:
    """Serve frontends at the node's own address that are in no table: their Services have just gone."""
    places = [(*place, protocol) for place in frontends for protocol in (Protocol.TCP, Protocol.UDP)]
    places = [copies.known(place) if is_ipv6(place[0]) else place for place in places]
    publish(copies.originals, copies.places | {Kind.OWN_FRONTEND: places})


NODE_PORT, NODE_PORT6 = (OWN, 30_080), (OWN6, 30_080)


def test_what_an_endpoint_sends_to_no_masqueraded_connection_is_not_served(copies):
    for port in (SNAT_PORTS.first, SNAT_PORTS.last - 1, 600, 1023):
        for frame in (
            packets.syn_ack(ENDPOINT, (OWN, port)),
            packets.udp(DNS_ENDPOINTS[0], (OWN, port)),
            packets.first_fragment(DNS_ENDPOINTS[0], (OWN, port)),
            packets.first_fragment(DNS_ENDPOINT6, (OWN6, port)),
        ):
            assert copies.send(frame) == (Reason.NOT_SERVED, frame, 0)


def test_what_is_no_answer_of_an_endpoint_to_such_a_port_is_the_kernels(copies):
    first, last = SNAT_PORTS
    for frame in (
        packets.syn_ack(ENDPOINT, (OWN, first - 1)),
        packets.syn_ack(ENDPOINT, (OWN, last + 1)),
        packets.syn_ack(ENDPOINT, (OWN, 599)),
        packets.syn_ack(ENDPOINT, (OWN, 1024)),
        packets.syn_ack((ENDPOINT[0], 22), (OWN, first)),
        packets.udp(ENDPOINT, (OWN, first)),
        packets.syn_ack(CLIENT, (OWN, first)),
    ):
        assert copies.send(frame) == (Reason.NOT_OURS, frame, 0)
    for frame in (
        packets.first_fragment(DNS_ENDPOINTS[0], (OWN, last + 1)),
        packets.later_fragment(DNS_ENDPOINTS[0], (OWN, first)),
        packets.first_fragment(DNS_ENDPOINT6, (OWN6, last + 1)),
        packets.later_fragment(DNS_ENDPOINT6, (OWN6, first)),
    ):
        assert copies.send(frame) == (Reason.OTHER_FRAGMENT, frame, 0)


def test_C12_what_is_to_a_port_that_a_socket_of_the_node_has_is_the_kernels(copies):
    for port in OCCUPIED:
        for frame in (packets.syn_ack(ENDPOINT, (OWN, port)), packets.udp(DNS_ENDPOINT6, (OWN6, port))):
            assert copies.send(frame) == (Reason.NOT_OURS, frame, 0)
        frame = packets.icmp_error(packets.syn((OWN, port), ENDPOINT))
        assert copies.send(frame) == (Reason.OTHER_ICMP, frame, 0)


def test_answers_of_masqueraded_connections_are_translated(copies):
    layer = Ether(copies.send(packets.syn(CLIENT, OUTER_VIP)).frame)
    assert (layer[IP].src, layer[IP].dst) == (packets.host(OWN), packets.host(ENDPOINT[0]))
    answer = packets.syn_ack(ENDPOINT, (OWN, layer.sport))
    back = rewritten(answer, OUTER_VIP, CLIENT, HOPS[CLIENT[0]].macs)
    assert copies.send(answer) == (Reason.FORWARDED, back, HOPS[CLIENT[0]].ifindex)


def test_a_node_port_that_has_just_gone(copies):
    served(copies, NODE_PORT, NODE_PORT6)
    for frame in (packets.syn(CLIENT, NODE_PORT), packets.udp(CLIENT, NODE_PORT)):
        assert copies.send(frame) == (Reason.VANISHED, frame, 0)
    for frame in (packets.first_fragment(CLIENT, NODE_PORT), packets.first_fragment(CLIENT6, NODE_PORT6)):
        assert copies.send(frame) == (Reason.NOT_SERVED, frame, 0)
    for frame in (
        packets.later_fragment(CLIENT, NODE_PORT),
        packets.first_fragment(CLIENT, (OWN, 30_081)),
        packets.later_fragment(CLIENT6, NODE_PORT6),
        packets.first_fragment(CLIENT6, (OWN6, 30_081)),
    ):
        assert copies.send(frame) == (Reason.OTHER_FRAGMENT, frame, 0)


def test_errors_to_the_node_itself(copies):
    served(copies, NODE_PORT)
    port = SNAT_PORTS.first
    for about in (
        packets.syn_ack(NODE_PORT, CLIENT),
        packets.udp(NODE_PORT, CLIENT),
        packets.syn_ack(GONE, CLIENT),
        packets.syn((OWN, port), ENDPOINT),
        packets.udp((OWN, port), DNS_ENDPOINTS[1]),
    ):
        assert copies.send(packets.icmp_error(about)).reason is Reason.ICMP_UNUSABLE
    for about in (
        packets.syn_ack((OWN, 22), CLIENT),
        packets.syn((OWN, SNAT_PORTS.last + 1), ENDPOINT),
        packets.syn((OWN, port), (ENDPOINT[0], 22)),
        packets.syn((OWN, port), CLIENT),
    ):
        frame = packets.icmp_error(about)
        assert copies.send(frame) == (Reason.OTHER_ICMP, frame, 0)


def test_N9_what_is_to_the_node_itself_by_ipv6(copies):
    node_port, port = (OWN6, 30_080), SNAT_PORTS.first
    places = [copies.known((*node_port, protocol)) for protocol in (Protocol.TCP, Protocol.UDP)]
    publish(copies.originals, copies.places | {Kind.OWN_FRONTEND: places})
    for frame in (packets.syn(CLIENT6, node_port), packets.udp(CLIENT6, node_port), packets.data(CLIENT6, GONE6)):
        assert copies.send(frame) == (Reason.VANISHED, frame, 0)
    for frame in (packets.syn_ack(ENDPOINT6, (OWN6, port)), packets.udp(DNS_ENDPOINT6, (OWN6, port))):
        assert copies.send(frame) == (Reason.NOT_SERVED, frame, 0)
    for frame in (
        packets.syn(CLIENT6, (OWN6, 22)),
        packets.syn(CLIENT6, GONE6),
        packets.syn_ack((ENDPOINT6[0], 22), (OWN6, port)),
        packets.syn_ack(ENDPOINT6, (OWN6, port - 1)),
        packets.syn_ack(CLIENT6, (OWN6, port)),
    ):
        assert copies.send(frame) == (Reason.NOT_OURS, frame, 0)
    for about in (
        packets.syn_ack(node_port, CLIENT6),
        packets.syn_ack(GONE6, CLIENT6),
        packets.syn((OWN6, port), ENDPOINT6),
    ):
        assert copies.send(packets.icmp_error(about)).reason is Reason.ICMP_UNUSABLE
    for about in (packets.syn_ack((OWN6, 22), CLIENT6), packets.syn((OWN6, port), CLIENT6)):
        frame = packets.icmp_error(about)
        assert copies.send(frame) == (Reason.OTHER_ICMP, frame, 0)
    frame = packets.icmp_error(packets.of_protocol(47, VIP6, CLIENT6))
    assert copies.send(frame) == (Reason.NOT_SERVED, frame, 0)


def test_N9_answers_of_masqueraded_ipv6_connections_are_translated(copies):
    layer = Ether(copies.send(packets.syn(CLIENT6, OUTER_VIP6)).frame)
    assert (layer[IPv6].src, layer[IPv6].dst) == (packets.host(OWN6), packets.host(ENDPOINT6[0]))
    answer = packets.syn_ack(ENDPOINT6, (OWN6, layer[TCP].sport))
    back = rewritten(answer, OUTER_VIP6, CLIENT6, HOPS[CLIENT6[0]].macs)
    assert copies.send(answer) == (Reason.FORWARDED, back, HOPS[CLIENT6[0]].ifindex)


# What the pipeline leaves to the kernel.


def test_N9_an_ipv6_endpoint_that_talks_past_its_services_is_sent_on(copies):
    """Also to somebody who has no name yet, and what is not an endpoint's is the kernel's."""
    for frame, client in (
        (packets.syn_ack(ENDPOINT6, CLIENT6), CLIENT6),
        (packets.udp(DNS_ENDPOINT6, OTHER_CLIENT6), OTHER_CLIENT6),
        (packets.icmp_error(packets.syn(CLIENT6, ENDPOINT6)), CLIENT6),
    ):
        assert copies.send(frame) == (Reason.SENT_ON, routed(frame, HOPS[client[0]].macs), HOPS[client[0]].ifindex)
    for frame in (
        packets.syn_ack((ENDPOINT6[0], 8081), CLIENT6),
        packets.udp(ENDPOINT6, CLIENT6),
        packets.syn(CLIENT6, ENDPOINT6),
        packets.syn_ack(ENDPOINT6, STRANGER6),
        packets.syn_ack(ENDPOINT6, CLIENT6, ttl=1),
    ):
        assert copies.send(frame) == (Reason.NOT_OURS, frame, 0)
    assert copies.send(packets.data(ENDPOINT6, NARROW_ENDPOINT6, b"x" * 100)).reason is Reason.TOO_BIG


def test_an_endpoint_that_talks_past_its_services_is_sent_on(copies):
    for frame in (packets.syn_ack(ENDPOINT, CLIENT), packets.udp(DNS_ENDPOINTS[0], OTHER_CLIENT)):
        sent = copies.send(frame, unfinished(frame)[1])
        to = packets.address(f"{Ether(frame)[IP].dst}:1")
        assert sent == (Reason.SENT_ON, routed(frame, HOPS[to[0]].macs), HOPS[to[0]].ifindex)
        assert copies.vnet == unfinished(frame)[1]


@pytest.mark.parametrize(("endpoint", "client"), [(ENDPOINT, CLIENT), (ENDPOINT6, CLIENT6)], ids=["ipv4", "ipv6"])
def test_N3_an_endpoint_s_reply_to_who_has_not_asked_a_vip_is_sent_on(copies, endpoint, client):
    reply = packets.echo_reply(endpoint, client)
    assert copies.send(reply) == (Reason.OTHER_ICMP, reply, 0)
    address, _, protocol = copies.known((*endpoint, 0)) if endpoint == ENDPOINT6 else (endpoint[0], 0, 0)
    publish(copies.originals, {**copies.places, Kind.ANSWERING: [(address, 0, protocol)]})
    hop = HOPS[client[0]]
    assert copies.send(reply) == (Reason.SENT_ON, routed(reply, hop.macs), hop.ifindex)
    for frame in (packets.echo_request(client, endpoint), packets.icmp_error(packets.echo_reply(client, endpoint))):
        assert copies.send(frame) == (Reason.OTHER_ICMP, frame, 0)


def test_what_is_no_endpoints_is_the_kernels(copies):
    other_port, other_protocol = (ENDPOINT[0], 8081), (ENDPOINT[0], 8080)
    for frame in (packets.syn(other_port, CLIENT), packets.udp(other_protocol, CLIENT), packets.syn(CLIENT, ENDPOINT)):
        assert copies.send(frame) == (Reason.NOT_OURS, frame, 0)


def test_what_goes_elsewhere_is_the_kernels_from_an_endpoint_too(copies):
    for to in (FOREIGN_ENDPOINT, STRANGER):
        frame = packets.syn_ack(ENDPOINT, to)
        assert copies.send(frame) == (Reason.NOT_OURS, frame, 0)
    frame = packets.syn_ack(ENDPOINT, CLIENT, ttl=1)
    assert copies.send(frame) == (Reason.NOT_OURS, frame, 0)


def test_an_endpoints_frame_waits_for_its_neighbour(copies):
    frame = packets.syn_ack(ENDPOINT, LOST_ENDPOINT)
    assert copies.send(frame) == (Reason.NO_NEXT_HOP, frame, AWAITED)


def test_an_endpoints_frame_that_does_not_fit_is_dropped(copies):
    frame = packets.data(ENDPOINT, NARROW_ENDPOINT, b"x" * 100)
    assert copies.send(frame).reason is Reason.TOO_BIG


def test_a_frontend_that_is_none_any_more_keeps_its_connections_and_gets_no_new_ones(copies):
    assert copies.send(packets.syn(CLIENT, GONE)).reason is Reason.NOT_OURS
    for frame in (packets.data(CLIENT, GONE), packets.fin(CLIENT, GONE), packets.tcp_with("SA", CLIENT, GONE)):
        assert copies.send(frame).reason is Reason.VANISHED
    assert copies.send(packets.data(CLIENT, (GONE[0], 81))).reason is Reason.NOT_OURS


def test_errors_about_no_flow(copies):
    to_client = packets.icmp_error(packets.syn(CLIENT, STRANGER))
    assert copies.send(to_client) == (Reason.OTHER_ICMP, to_client, 0)
    past = packets.icmp_error(packets.syn(CLIENT, ENDPOINT))  # sent by the client past its Service
    assert copies.send(past) == (Reason.SENT_ON, routed(past, HOPS[CLIENT[0]].macs), HOPS[CLIENT[0]].ifindex)
    to_vip = packets.icmp_error(packets.syn_ack(OUTER_VIP, CLIENT))
    assert copies.send(to_vip).reason is Reason.ICMP_UNUSABLE
    guessed = copies.send(packets.icmp_error(packets.syn_ack(VIP, CLIENT)))
    assert (guessed.reason, guessed.ifindex) == (Reason.FORWARDED, HOPS[ENDPOINT[0]].ifindex)


def test_what_other_frames_are_stays_as_the_pipeline_says(copies):
    for frame, reason in (
        (packets.arp(), Reason.NOT_IPV4),
        (packets.icmp_other(), Reason.NOT_SERVED),
        (packets.echo_request(STRANGER), Reason.OTHER_ICMP),
        (packets.fragment_of(packets.syn(), 0, 16), Reason.FRAGMENT_BROKEN),
        (packets.first_fragment(destination=STRANGER), Reason.OTHER_FRAGMENT),
        (packets.syn(ttl=1), Reason.TTL_EXPIRED),
        (packets.rst(), Reason.STRAY_RST),
        (packets.syn()[:30], Reason.TOO_SHORT),
        (b"\x02" * 13, Reason.TOO_SHORT),
    ):
        assert copies.send(frame) == (reason, frame, 0)


def test_places_are_replaced_at_once(copies):
    frame = packets.syn_ack(ENDPOINT, CLIENT)
    assert copies.send(frame).reason is Reason.SENT_ON
    publish(copies.originals, {Kind.ENDPOINT: [(*OTHER_ENDPOINT, Protocol.TCP)]})
    assert copies.send(frame).reason is Reason.NOT_OURS
    publish(copies.originals, {Kind.ENDPOINT: [(*ENDPOINT, Protocol.TCP)]})
    assert copies.send(frame).reason is Reason.SENT_ON
    assert copies.send(packets.data(CLIENT, GONE)).reason is Reason.NOT_OURS


def test_as_many_places_as_there_is_room_for_are_found():
    room = 500
    originals = new_originals(room)
    places = [(0x0A000000 + n, 1 + n, Protocol.TCP) for n in range(room)]
    publish(originals, {Kind.ENDPOINT: places})
    copies = Copies()
    copies.originals = originals
    for address, port, _ in places[::50]:
        assert copies.send(packets.syn_ack((address, port), CLIENT)).reason is Reason.SENT_ON
