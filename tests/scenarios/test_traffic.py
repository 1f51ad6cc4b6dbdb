"""Traffic through a node, packet by packet: who gets what, compared whole. Ids are those of docs/behaviours.md."""

from __future__ import annotations

import struct
import time

import pytest
from scapy.layers.inet import UDP
from scapy.layers.l2 import Ether

from tests import packets
from tests.node import ScenarioNode
from tests.packets import (
    Address,
    ack,
    data,
    icmp_error,
    ports_of,
    rewritten,
    syn,
    syn_ack,
    udp,
    udp_unsummed,
    udp_with_checksum,
    with_wrong_checksum,
)
from tests.services import Service, text_of
from xdp.schema import Reason

WEB = Service("web", "10.96.0.1:80")
DNS = Service("dns", "10.96.0.10:53", protocol="UDP")
STRANGER = packets.STRANGER
STRANGERS = {4: STRANGER, 6: packets.STRANGER6}
_ipv4 = pytest.mark.families(4, why="IPv6 has no such thing")
ERRORS = [pytest.param(kind, marks=() if kind in packets.ICMPV6_ERRORS else _ipv4) for kind in packets.ICMP_ERRORS]


def web(node: ScenarioNode, *hosts: str) -> Service:
    """Make a TCP Service with endpoints on these hosts the only one."""
    service = node.of_family(WEB).with_endpoints(*(node.endpoint(host) for host in hosts))
    node.apply(service)
    return service


def dns(node: ScenarioNode, *hosts: str) -> Service:
    """Make a UDP Service with endpoints on these hosts the only one."""
    service = node.of_family(DNS).with_endpoints(*(node.endpoint(host, 5353) for host in hosts))
    node.apply(service)
    return service


def delivered(node: ScenarioNode, frame: bytes, client: Address, endpoint: Address) -> tuple[str, bytes]:
    """Return what is to leave for an endpoint when a client's `frame` to the Service arrives."""
    host = node.host_of(endpoint)
    return host, rewritten(frame, client, endpoint, node.macs(host))


def answered(node: ScenarioNode, frame: bytes, service: Service, client: Address) -> tuple[str, bytes]:
    """Return what is to leave for a client when an endpoint's `frame` to it arrives."""
    host = node.host_of(client)
    return host, rewritten(frame, service.at, client, node.macs(host))


@pytest.mark.faults(106)
def test_T1_a_connection_goes_to_the_endpoint_and_its_answers_come_from_the_vip(node):
    service, client = web(node, "web-1"), node.client()
    endpoint = node.at("web-1", 8080)
    sent = node.send(syn(client, service.at))
    assert sent.only == delivered(node, syn(client, service.at), client, endpoint)
    assert sent.reason is Reason.ADMITTED
    for frame in (syn_ack(endpoint, client), data(endpoint, client, b"x" * 1400)):
        sent = node.send(frame, "web-1")
        assert sent.only == answered(node, frame, service, client)
        assert sent.reason is Reason.FORWARDED
    for frame in (ack(client, service.at), data(client, service.at, bytes(range(256)) * 5)):
        assert node.send(frame).only == delivered(node, frame, client, endpoint)


def test_T1_a_datagram_goes_to_the_endpoint_and_its_answer_comes_from_the_vip(node):
    service, client = dns(node, "web-2"), node.client()
    endpoint = node.at("web-2", 5353)
    for payload in (b"", b"odd", b"x" * 1452):
        frame = udp(client, service.at, payload)
        assert node.send(frame).only == delivered(node, frame, client, endpoint)
        frame = udp(endpoint, client, payload)
        assert node.send(frame, "web-2").only == answered(node, frame, service, client)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"ttl": 2}, id="ttl-2"),
        pytest.param({"ttl": 255}, id="ttl-255"),
        pytest.param({"tos": 0xB9}, id="N8-dscp-and-ecn"),
        pytest.param({"fl": 0x12345}, id="N8-flow-label", marks=pytest.mark.families(6, why="IPv4 has none")),
        pytest.param({"flags": "DF"}, id="df", marks=_ipv4),
        pytest.param({"flags": "evil"}, id="reserved-flag", marks=_ipv4),
        pytest.param({"id": 0}, id="id-0", marks=_ipv4),
        pytest.param({"options": packets.options(4)}, id="N5-options", marks=_ipv4),
        pytest.param({"options": packets.options(40)}, id="N5-most-options", marks=_ipv4),
    ],
)
def test_T1_nothing_else_in_the_header_changes(node, fields):
    service, client = dns(node, "web-1"), node.client()
    endpoint = node.at("web-1", 5353)
    for frame in (udp(client, service.at, **fields), udp(client, service.at, b"again", **fields)):
        assert node.send(frame).only == delivered(node, frame, client, endpoint)


def test_T1_every_new_connection_is_given_to_one_of_the_endpoints(node):
    service = web(node, "web-1", "web-2", "web-3")
    hosts = [node.send(syn(node.client(), service.at)).only[0] for _ in range(40)]
    assert set(hosts) == {"web-1", "web-2", "web-3"}


def test_T1_each_endpoint_has_its_own_port(node):
    service = node.of_family(WEB).with_endpoints(node.endpoint("web-1", 8080), node.endpoint("web-2", 9090))
    node.apply(service)
    ports = {"web-1": 8080, "web-2": 9090}
    seen = set()
    for _ in range(20):
        client = node.client()
        host, frame = node.send(syn(client, service.at)).only
        assert (host, frame) == delivered(node, syn(client, service.at), client, node.at(host, ports[host]))
        seen.add(host)
    assert seen == set(ports)


@pytest.mark.families(4, why="tests/xdp/test_twins.py has those of IPv6")
@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        pytest.param(packets.arp(), Reason.NOT_IPV4, id="arp"),
        pytest.param(packets.ipv6(), Reason.NOT_OURS, id="ipv6"),
        pytest.param(packets.vlan(), Reason.OTHER_VLAN, id="vlan"),
        pytest.param(packets.sctp_init(packets.CLIENT, STRANGER), Reason.NOT_TCP_UDP, id="sctp"),
        pytest.param(packets.echo_request(STRANGER), Reason.OTHER_ICMP, id="echo-request"),
        pytest.param(udp(packets.CLIENT, STRANGER), Reason.NOT_OURS, id="udp"),
        pytest.param(syn(packets.CLIENT, STRANGER), Reason.NOT_OURS, id="tcp"),
        pytest.param(syn(STRANGER, packets.CLIENT, ttl=1), Reason.NOT_OURS, id="tcp-ttl-1"),
        pytest.param(packets.first_fragment(destination=STRANGER), Reason.OTHER_FRAGMENT, id="first-fragment"),
        pytest.param(packets.later_fragment(destination=STRANGER), Reason.OTHER_FRAGMENT, id="later-fragment"),
    ],
)
def test_T11_what_is_not_ours_is_passed_byte_for_byte(node, frame, reason):
    web(node, "web-1")
    sent = node.send(frame)
    assert (sent.left, sent.passed, sent.reason) == ([], [node.on_the_wire(frame, "client")], reason)


@pytest.mark.engines("xdp", "xdp-generic", "afxdp", "raw", why="memory is given what XDP has found to be ours")
def test_T11_an_error_about_no_flow_of_ours_is_passed_byte_for_byte(node):
    web(node, "web-1")
    error = icmp_error(syn(STRANGERS[node.family], node.client()))
    sent = node.send(error)
    assert (sent.passed, sent.reason) == ([node.on_the_wire(error, "client")], Reason.OTHER_ICMP)


@pytest.mark.faults(18, 45)
def test_T12_a_packet_at_the_end_of_its_life_is_for_the_kernel_to_answer(node):
    service, client = web(node, "web-1"), node.client()
    frame = syn(client, service.at, ttl=1)
    sent = node.send(frame)
    assert (sent.left, sent.passed) == ([], [node.on_the_wire(frame, "client")])
    assert sent.reason is Reason.TTL_EXPIRED
    node.send(syn(client, service.at))
    sent = node.send(ack(client, service.at, ttl=1))
    assert (sent.left, sent.reason) == ([], Reason.TTL_EXPIRED)


def test_T15_an_answer_that_arrives_on_another_interface_is_translated(node):
    service, client = web(node, "web-1"), node.client()
    endpoint = node.at("web-1", 8080)
    node.send(syn(client, service.at))
    frame = syn_ack(endpoint, client)
    assert node.send(frame, "other").only == answered(node, frame, service, client)
    assert node.send(frame, "client").only == answered(node, frame, service, client)  # back where it came from


def test_a_client_and_an_endpoint_behind_the_same_interface(node):
    service, client = web(node, "web-1"), node.client("near")
    endpoint = node.at("web-1", 8080)
    frame = syn(client, service.at)
    assert node.send(frame, "near").only == delivered(node, frame, client, endpoint)
    frame = syn_ack(endpoint, client)
    assert node.send(frame, "web-1").only == answered(node, frame, service, client)


def test_clients_behind_several_interfaces(node):
    service = web(node, "web-1", "web-2")
    for host in ("client", "other", "near"):
        client = node.client(host)
        to, frame = node.send(syn(client, service.at), host).only
        endpoint = node.at(to, 8080)
        assert (to, frame) == delivered(node, syn(client, service.at), client, endpoint)
        frame = syn_ack(endpoint, client)
        assert node.send(frame, to).only == answered(node, frame, service, client)


def test_two_vips_with_one_endpoint_answer_each_for_itself(node):
    one = node.of_family(WEB).with_endpoints(node.endpoint("web-1"))
    two = Service("shop", node.vip(2, 443), one.endpoints)
    node.apply(one, two)
    endpoint = node.at("web-1", 8080)
    for service in (one, two):
        client = node.client()
        node.send(syn(client, service.at))
        frame = syn_ack(endpoint, client)
        assert node.send(frame, "web-1").only == answered(node, frame, service, client)


def test_two_vips_with_one_endpoint_never_mix_the_answers_of_one_client_port(node):
    one = node.of_family(WEB).with_endpoints(node.endpoint("web-1"))
    two = Service("shop", node.vip(2, 443), one.endpoints)
    node.apply(one, two)
    client, endpoint = node.client(), node.at("web-1", 8080)
    node.send(syn(client, one.at))
    sent = node.send(syn(client, two.at))  # from its port, the reply could not be told apart
    other = client[0], ports_of(sent.only[1])[0]
    assert (sent.reason, sent.only) == (Reason.ADMITTED, delivered(node, syn(client, two.at), other, endpoint))
    assert 61000 <= other[1] <= 65535
    for service, known_as in ((one, client), (two, other)):
        frame = syn_ack(endpoint, known_as)
        assert node.send(frame, "web-1").only == answered(node, frame, service, client)
        segment = data(client, service.at, b"x" * 100)
        assert node.send(segment).only == delivered(node, segment, known_as, endpoint)


def test_a_connection_in_its_middle_is_known_by_its_port_and_no_other(node):
    one = node.of_family(WEB).with_endpoints(node.endpoint("web-1"))
    two = Service("shop", node.vip(2, 443), one.endpoints)
    node.apply(one, two)
    client = node.client()
    node.send(syn(client, one.at))
    sent = node.send(data(client, two.at, b"x"))
    assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.REPLY_CLASH)


def test_a_client_port_that_is_taken_at_one_endpoint_is_given_another(node):
    one = node.of_family(WEB).with_endpoints(node.endpoint("web-1"))
    hosts = ("web-1", "web-2", "web-3", "near")  # with two, one client of 256 would find web-1 only
    two = Service("shop", node.vip(2, 443), tuple(map(node.endpoint, hosts)))
    node.apply(one, two)
    for _ in range(8):  # Maglev would choose the first for about a quarter of them
        client = node.client()
        node.send(syn(client, one.at))
        frame = syn(client, two.at)
        sent = node.send(frame)
        host, _ = sent.only
        assert host != "web-1"
        assert sent.only == delivered(node, frame, client, node.at(host, 8080))


def test_a_client_without_a_route_is_refused_at_once(node):
    service = web(node, "web-1")
    before = time.monotonic()
    for port in range(1, 101):  # more than may wait for a neighbour at a time
        sent = node.send(syn((STRANGERS[node.family][0], port), service.at))
        assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.NO_NEXT_HOP)
    assert time.monotonic() - before < 50, "held frames would have taken a second each"


@pytest.mark.faults(72)
def test_an_endpoint_that_comes_serves_at_once(node):
    service, client = dns(node), node.client()
    assert node.send(udp(client, service.at)).reason is Reason.NO_ENDPOINT
    service = dns(node, "web-1")
    frame = udp(client, service.at)
    assert node.send(frame).only == delivered(node, frame, client, node.at("web-1", 5353))


# ICMP errors.


def web_or_dns(node: ScenarioNode, protocol: str) -> Service:
    return web(node, "web-1") if protocol == "TCP" else dns(node, "web-1")


def with_header(node: ScenarioNode, quoted: int | None) -> int | None:
    """Return how many bytes of a packet are so many of what follows its header."""
    return quoted and quoted + (20 if node.family == 4 else 40)


@pytest.mark.parametrize("quoted", [None, 8], ids=["whole-quote", "eight-bytes"])
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_N1_an_error_about_what_the_client_sent_reaches_the_client(node, protocol, kind, quoted):
    service, quoted = web_or_dns(node, protocol), with_header(node, quoted)
    packet, client = (syn if protocol == "TCP" else udp), node.client()
    _, seen = node.send(packet(client, service.at)).only
    error = icmp_error(seen, kind, quoted=quoted)
    about = packet(client, service.at, ttl=63)  # as it left the client, a hop later
    expected = icmp_error(about, kind, service.at, quoted, ttl=59)
    assert node.send(error, "web-2").only == ("client", node.macs("client") + expected[12:])


@pytest.mark.parametrize("quoted", [None, 8], ids=["whole-quote", "eight-bytes"])
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_N1_N2_an_error_about_an_answer_reaches_the_endpoint(node, protocol, kind, quoted):
    service, quoted = web_or_dns(node, protocol), with_header(node, quoted)
    client = node.client()
    first, answer = (syn, syn_ack) if protocol == "TCP" else (udp, udp)
    node.send(first(client, service.at))
    endpoint = node.at("web-1", 8080 if protocol == "TCP" else 5353)
    _, seen = node.send(answer(endpoint, client), "web-1").only
    error = icmp_error(seen, kind, quoted=quoted)  # from a router beside the client, to the VIP
    expected = icmp_error(answer(endpoint, client, ttl=63), kind, None, quoted, ttl=59)
    assert node.send(error, "other").only == ("web-1", node.macs("web-1") + expected[12:])


def test_N1_an_error_changes_nothing_about_its_connection(node):
    service, client = web(node, "web-1"), node.client()
    _, seen = node.send(syn(client, service.at)).only
    before = node.flow(client)
    node.send(icmp_error(seen), "web-1")
    after = node.flow(client)
    assert (after["state"], after["packets"]) == (before["state"], before["packets"])


# Checksums.


@pytest.mark.faults(69)
@pytest.mark.families(4, why="over IPv6 there has to be one")
def test_N7_a_checksum_that_was_left_out_stays_out(node):
    service, client = dns(node, "web-1"), node.client()
    frame = udp_unsummed(client, service.at)
    sent = node.send(frame).only
    assert sent == delivered(node, frame, client, node.at("web-1", 5353))
    assert Ether(sent[1])[UDP].chksum == 0


@pytest.mark.faults(69)
def test_N7_a_checksum_that_comes_to_zero_is_sent_as_ones(node):
    service, client = dns(node, "web-1"), node.client()
    endpoint = node.at("web-1", 5353)
    payload = bytes(Ether(udp_with_checksum(0xFFFF, client, endpoint))[UDP].payload)
    frame = udp(client, service.at, payload)
    sent = node.send(frame).only
    assert sent == delivered(node, frame, client, endpoint)
    assert Ether(sent[1])[UDP].chksum == 0xFFFF


@pytest.mark.faults(66)
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_N7_a_wrong_checksum_stays_wrong_by_as_much(node, protocol):
    service, client = web_or_dns(node, protocol), node.client()
    right = (syn if protocol == "TCP" else udp)(client, service.at)
    wrong = with_wrong_checksum(right)
    host, good = node.send(right).only
    other_host, bad = node.send(wrong).only
    at = 14 + (20 if node.family == 4 else 40) + (16 if protocol == "TCP" else 6)
    assert (other_host, bad[:at], bad[at + 2 :]) == (host, good[:at], good[at + 2 :])

    def check(frame: bytes) -> int:
        return struct.unpack_from("!H", frame, at)[0]

    assert (check(bad) - check(good)) % 0xFFFF == (check(wrong) - check(right)) % 0xFFFF != 0


@pytest.mark.faults(2, 16)
def test_a_frame_that_is_padded_is_forwarded_with_its_padding(node):
    service = node.of_family(WEB).with_endpoints(node.endpoint("other"))  # no switch on the way: some take padding off
    node.apply(service)
    client, padding = node.client(), bytes(range(6))
    for frame in (syn(client, service.at), ack(client, service.at)):
        host, expected = delivered(node, frame, client, node.at("other", 8080))
        assert node.send(frame + padding).only == (host, expected + padding)


def test_the_table_says_who_talks_to_whom(node):
    service, client = web(node, "web-1"), node.client()
    endpoint = node.at("web-1", 8080)
    first, answer = syn(client, service.at), syn_ack(endpoint, client)
    node.send(first)
    node.send(answer, "web-1")
    flow = node.flow(client)
    told = {key: flow[key] for key in ("protocol", "client", "frontend", "endpoint", "service", "state")}
    assert told == {
        "protocol": "TCP",
        "client": text_of(client),
        "frontend": service.frontend,
        "endpoint": node.endpoint("web-1"),
        "service": "shop/web:main",
        "state": "syn_received",
    }
    assert flow["packets"] == {"original": 1, "reply": 1}
    assert flow["bytes"] == {"original": len(first), "reply": len(answer)}
    assert flow["offloaded"] is node.engine.startswith("xdp")


@pytest.mark.faults(3)
@pytest.mark.families(4, why="whoever sends such a packet of IPv6 is told: tests/xdp/test_twins.py")
@pytest.mark.engines("memory", why="a wire of the same MTU carries no such frame")
def test_T13_a_frame_longer_than_the_next_hop_takes_is_dropped_and_counted(node):
    service, client = dns(node, "web-1"), node.client()
    whole = udp(client, service.at, b"x" * 1472)
    assert node.send(whole).only == delivered(node, whole, client, node.at("web-1", 5353))
    sent = node.send(udp(client, service.at, b"x" * 1473))
    assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.TOO_BIG)
