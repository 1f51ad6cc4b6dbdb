"""Datagrams in fragments through a node: all of one go to one endpoint, whatever their order. Compared whole."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether

from tests import packets
from tests.node import ScenarioNode, Sent
from tests.packets import Address, fragment_of, host, rewritten, syn, tcp_packet, udp
from tests.services import Service
from xdp.schema import Reason

DNS = Service("dns", "10.96.0.10:53", protocol="UDP")
WEB = Service("web", "10.96.0.1:80")
PAYLOAD = bytes(range(256)) * 12
CUTS = ((0, 1000), (1000, 2000), (2000, len(PAYLOAD) + 8))
THIRTY_SECONDS = 30
numbers = itertools.count(1000)


def pieces(frame: bytes, *cuts: tuple[int, int], number: int | None = None) -> list[bytes]:
    """Return a frame in fragments, with a number that no other datagram has had."""
    number = next(numbers) if number is None else number
    return [fragment_of(frame, *cut, number=number) for cut in cuts or CUTS]


def serve(node: ScenarioNode, *hosts: str) -> Service:
    service = node.of_family(DNS).with_endpoints(*(node.endpoint(name, 5353) for name in hosts))
    node.apply(service)
    return service


def sent_on(node: ScenarioNode, frame: bytes, whole: bytes, source: Address, destination: Address) -> tuple[str, bytes]:
    """Return what is to leave in place of a fragment of the packet `whole`, which as a whole would get these places."""
    name = node.host_of(destination)
    packet, translated = (
        ether.payload for ether in map(Ether, (frame, rewritten(whole, source, destination, bytes(12))))
    )
    payload = bytes(translated.payload)
    if IPv6 in packet:
        header = packet[IPv6ExtHdrFragment]
        piece, first = bytes(header.payload), header.offset * 8
        packet.src, packet.dst, packet.hlim = host(source[0]), host(destination[0]), packet.hlim - 1
        return name, node.macs(name) + frame[12:14] + bytes(packet)[:48] + payload[first : first + len(piece)]
    piece = bytes(packet.payload)
    packet.src, packet.dst, packet.ttl = host(source[0]), host(destination[0]), packet.ttl - 1
    packet.remove_payload()
    del packet.chksum
    first = packet.frag * 8
    return name, node.macs(name) + frame[12:14] + bytes(packet)[:20] + payload[first : first + len(piece)]


def dropped(sent: Sent, reason: Reason) -> None:
    assert (sent.left, sent.passed, sent.reasons) == ([], [], Counter([reason])), sent


@pytest.mark.faults(26, 27, 28)
@pytest.mark.parametrize(
    "order",
    [
        pytest.param((0, 1, 2), id="in-order"),
        pytest.param((2, 1, 0), id="reversed"),
        pytest.param((1, 0, 2), id="mixed"),
        pytest.param((2, 0, 1), id="last-first"),
    ],
)
def test_N4_all_fragments_of_a_datagram_go_to_one_endpoint(node, order):
    service = serve(node, "web-1", "web-2", "web-3")
    for _ in range(6):
        client = node.client()
        whole = udp(client, service.at, PAYLOAD)
        in_order = pieces(whole)
        frames = [in_order[place] for place in order]
        sent = node.send_all(frames)
        endpoint = node.at(sent.left[0][0], 5353)
        assert sorted(sent.left) == sorted(sent_on(node, frame, whole, client, endpoint) for frame in frames)
        assert sent.reasons == Counter({Reason.ADMITTED: 1, Reason.FORWARDED: 2})
        assert node.flow(client)["packets"] == {"original": 3, "reply": 0}


def test_N4_datagrams_of_a_known_flow_and_their_answers(node):
    service, client = serve(node, "web-1"), node.client()
    endpoint = node.at("web-1", 5353)
    node.send(udp(client, service.at))
    for number in (100, 101):
        whole = udp(client, service.at, PAYLOAD)
        frames = pieces(whole, number=number)[::-1]
        assert sorted(node.send_all(frames).left) == sorted(sent_on(node, f, whole, client, endpoint) for f in frames)
        whole = udp(endpoint, client, PAYLOAD)
        for frame in pieces(whole, number=number):  # an answer's first fragment has to come first
            sent = node.send(frame, "web-1")
            passed = [node.on_the_wire(frame, "web-1")] if node.engine == "raw" else []  # its filter sees no ports
            assert sent == Sent([sent_on(node, frame, whole, service.at, client)], passed, Counter([Reason.FORWARDED]))


def test_N4_segments_in_fragments(node):
    service = node.of_family(WEB).with_endpoints(node.endpoint("web-1"))
    node.apply(service)
    client, endpoint = node.client(), node.at("web-1", 8080)
    node.send(syn(client, service.at))
    whole = bytes(tcp_packet(client, service.at, "PA", bytes(2000)))
    frames = pieces(whole, (1448, 2020), (0, 1448))
    sent = node.send_all(frames)
    assert sorted(sent.left) == sorted(sent_on(node, frame, whole, client, endpoint) for frame in frames)


@pytest.mark.faults(36)
def test_N4_two_clients_with_the_same_identification_are_told_apart(node):
    service = serve(node, "web-1", "web-2", "web-3")
    one, other = node.client("client"), node.client("near")
    for client, name in ((one, "client"), (other, "near")):
        whole = udp(client, service.at, PAYLOAD)
        first = pieces(whole, number=9)[0]
        to, data = node.send(first, name).only
        assert (to, data) == sent_on(node, first, whole, client, node.at(to, 5353))
    for client, name in ((one, "client"), (other, "near")):
        whole = udp(client, service.at, PAYLOAD)
        for frame in pieces(whole, number=9)[1:]:
            to, data = node.send(frame, name).only
            assert (to, data) == sent_on(node, frame, whole, client, node.at(to, 5353))


@pytest.mark.faults(25, 29)
def test_N4_a_fragment_that_comes_again_is_dropped(node):
    service, client = serve(node, "web-1"), node.client()
    first, second, last = pieces(udp(client, service.at, PAYLOAD))
    assert node.send(first).reason is Reason.ADMITTED
    dropped(node.send(first), Reason.FRAGMENT_AGAIN)
    assert node.send(second).left
    dropped(node.send(second), Reason.FRAGMENT_AGAIN)
    dropped(node.send(first), Reason.FRAGMENT_AGAIN)
    assert node.send(last).left
    assert node.send(first).left  # the datagram was complete: this is the next one of its number


@pytest.mark.faults(30, 44)
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param((992, 2000), id="into-the-one-before"),
        pytest.param((1000, 2008), id="into-the-one-behind"),
        pytest.param((2800, 4000), id="beyond-the-end"),
        pytest.param((0, 1400), id="over-all"),
    ],
)
def test_N4_an_overlap_ends_the_datagram(node, cut):
    service, client = serve(node, "web-1"), node.client()
    whole = udp(client, service.at, PAYLOAD)
    number = next(numbers)
    first, second, last = pieces(whole, number=number)
    assert len(node.send_all([first, last]).left) == 2
    longer = udp(client, service.at, PAYLOAD + bytes(2000))
    dropped(node.send(fragment_of(longer, *cut, number=number)), Reason.FRAGMENT_OVERLAP)
    dropped(node.send(second), Reason.FRAGMENT_OVERLAP)


@pytest.mark.faults(30, 31, 33, 34)
def test_N4_fragments_that_hide_what_they_are_go_nowhere(node):
    web, dns = node.of_family(WEB), node.of_family(DNS)
    node.apply(web.with_endpoints(node.endpoint("web-1")), dns.with_endpoints(node.endpoint("web-1", 5353)))
    client = node.client()
    segment, datagram = bytes(tcp_packet(client, web.at, "S", bytes(100))), udp(client, dns.at, bytes(100))
    assert node.send(fragment_of(segment, 0, 24, number=400)).reason is Reason.ADMITTED
    for frame in (
        fragment_of(segment, 0, 16, number=401),  # flags in another fragment
        fragment_of(segment, 8, 24, number=400),  # or written over by one (RFC 1858)
        fragment_of(datagram, 16, 27, number=402),  # not a multiple of eight, and more to come
        beyond(datagram),
    ):
        dropped(node.send(frame), Reason.FRAGMENT_BROKEN)


def beyond(frame: bytes) -> bytes:
    """Return a fragment that would make its datagram longer than a datagram can be."""
    packet = Ether(fragment_of(frame, 16, 108, number=404))
    if IPv6 in packet:
        packet[IPv6ExtHdrFragment].offset, packet[IPv6ExtHdrFragment].m = 8189, 0
        return bytes(packet)
    packet[IP].frag, packet[IP].flags = 8189, 0
    del packet[IP].chksum
    return bytes(packet)


def test_N4_N5_fragments_with_options_or_at_the_end_of_their_life(node):
    service, client = serve(node, "web-1"), node.client()
    for cut, number in (((0, 1400), 410), ((1400, 2000), 411)):
        if node.family == 6:
            routed = packets.behind(packets.routing(1), fragment_of(udp(client, service.at, PAYLOAD), *cut, number))
        else:
            whole = udp(client, service.at, PAYLOAD, options=packets.source_route("LSRR"))
            routed = fragment_of(whole, *cut, number)
        dropped(node.send(routed), Reason.SOURCE_ROUTED)
    for frame in pieces(udp(client, service.at, PAYLOAD, ttl=1)):
        sent = node.send(frame)
        assert (sent.passed, sent.reason) == ([node.on_the_wire(frame, "client")], Reason.TTL_EXPIRED)


def test_N4_of_a_datagram_that_is_refused_nothing_waits(node):
    service = serve(node)
    first, second, last = pieces(udp(node.client(), service.at, PAYLOAD))
    frame = node.on_the_wire(first, "client")
    assert node.send(first).only == ("client", packets.unreachable_to(frame, 3))
    for rest in (second, last):
        dropped(node.send(rest), Reason.FRAGMENT_ALONE)


@pytest.mark.faults(40)
@pytest.mark.families(6, why="IPv4 allows it")
def test_N4_N7_of_a_datagram_without_a_checksum_nothing_waits(node):
    service = serve(node, "web-1")
    first, second, last = pieces(packets.unsummed(udp(node.client(), service.at, PAYLOAD)))
    dropped(node.send(first), Reason.UNSUMMED)
    for rest in (second, last):
        dropped(node.send(rest), Reason.FRAGMENT_ALONE)


@pytest.mark.faults(37)
def test_N4_fragments_of_another_protocol_are_not_served(node):
    service = serve(node, "web-1")
    frame = packets.echo_request((service.at[0], 0), node.client(), bytes(2900))
    for piece in pieces(frame, (0, 1448), (1448, 2896), (2896, 2908)):
        dropped(node.send(piece), Reason.NOT_SERVED)


@pytest.mark.faults(38)
@pytest.mark.engines("memory", why="only its clock can be moved")
def test_N4_fragments_wait_for_thirty_seconds(node):
    service, client = serve(node, "web-1"), node.client()
    whole = udp(client, service.at, PAYLOAD)
    first, second, last = pieces(whole)
    assert node.send(last) == Sent([], [], Counter())
    node.advance(THIRTY_SECONDS - 1)
    assert len(node.send_all([first]).left) == 2
    node.advance(THIRTY_SECONDS + 1)
    assert node.send(second) == Sent([], [], Counter())  # its datagram is forgotten
    node.advance(THIRTY_SECONDS + 1)
    sent = node.send(udp(client, service.at))
    assert sent.reasons == Counter({Reason.ADMITTED: 1, Reason.FRAGMENT_ALONE: 1})


@pytest.mark.faults(38)
@pytest.mark.engines("xdp", "afxdp", "raw", why="what waits, waits in a packet loop")
def test_N4_only_so_many_fragments_wait(node):
    service, client = serve(node, "web-1"), node.client()
    whole = udp(client, service.at, bytes(8 * 80))
    early = [fragment_of(whole, 8 * place, 8 * place + 8, number=700) for place in range(1, 71)]
    node.send_all(early[:64], ends=0)
    assert node.send_all(early[64:]).reasons == Counter({Reason.FRAGMENT_ALONE: 6})
    sent = node.send_all([fragment_of(whole, 0, 8, number=700)], ends=65)
    assert sent.reasons == Counter({Reason.ADMITTED: 1, Reason.FORWARDED: 64})
    assert len(sent.left) == 65


def test_F034_F036_datagrams_and_segments_of_one_client_with_the_same_number_are_told_apart(node):
    """The last piece of either is of a byte or two, and they come in turns."""
    web = node.of_family(WEB).with_endpoints(node.endpoint("web-1"))
    dns = node.of_family(DNS).with_endpoints(node.endpoint("web-2", 5353))
    node.apply(web, dns)
    client = node.client()
    node.send(syn(client, web.at))
    segment = bytes(tcp_packet(client, web.at, "PA", bytes(1021)))  # of 1041 bytes with its header
    datagram = udp(client, dns.at, bytes(1034))  # of 1042
    sent = []
    for cut in ((0, 1040), (1040, 1042)):
        for whole, endpoint in ((segment, node.at("web-1", 8080)), (datagram, node.at("web-2", 5353))):
            frame = fragment_of(whole, *cut, number=36)
            assert node.send(frame).left == [sent_on(node, frame, whole, client, endpoint)]
            sent.append(frame)
    assert len(set(sent)) == 4


def test_F039_no_piece_of_a_datagram_goes_to_another_endpoint_when_its_own_is_removed(node):
    service, client = serve(node, "web-1"), node.client()
    whole = udp(client, service.at, PAYLOAD)
    first, second, last = pieces(whole)
    assert node.send(first).left == [sent_on(node, first, whole, client, node.at("web-1", 5353))]
    serve(node, "web-2")
    for rest in (second, last):
        dropped(node.send(rest), Reason.FRAGMENT_ALONE)
    assert node.send_all(pieces(whole)).left[0][0] == "web-2"
