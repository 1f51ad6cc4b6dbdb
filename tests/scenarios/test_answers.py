"""What the node says itself: refusals, answers to echo requests, and how long a packet may be. Compared whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dataplane.limits import CLIENT_ANSWERS
from tests import packets
from tests.node import ScenarioNode, Sent
from tests.packets import ack, echo_request, icmp_error, rewritten, syn, tcp_packet, udp
from tests.services import Service, text_of
from xdp.schema import Reason

pytestmark = pytest.mark.families(4, why="tests/xdp/test_twins.py has what is said to packets of IPv6")

WEB = Service("web", "10.96.0.1:80")
DNS = Service("dns", "10.96.0.10:53", protocol="UDP")
VIP = WEB.at[0]
ROUTER = packets.address("10.99.0.1:0")
STRANGER = packets.address("192.0.2.1:1234")


def refused(node: ScenarioNode, frame: bytes, reason: Reason, host: str = "client") -> tuple[bytes, int]:
    """Send a frame that is to be dropped with an answer; return that, and how many packets were originated."""
    before = node.status()["packets"]["userspace"]["originated"]
    sent = node.send(frame, host)
    to, answer = sent.only
    assert (to, sent.reason) == (host, reason)
    return answer, node.status()["packets"]["userspace"]["originated"] - before


def dropped(sent: Sent, reason: Reason) -> None:
    """Assert that a frame was dropped in silence."""
    assert (sent.left, sent.passed, sent.reason) == ([], [], reason)


@pytest.mark.parametrize(
    ("flags", "payload", "fields"),
    [
        pytest.param("S", b"", {}, id="syn"),
        pytest.param("S", b"fast open", {"options": packets.options(40)}, id="syn-with-data-and-options"),
        pytest.param("A", b"", {}, id="ack"),
        pytest.param("PA", b"GET / ", {}, id="data"),
        pytest.param("FA", b"odd", {}, id="fin"),
    ],
)
def test_T7_without_endpoints_a_segment_is_reset(node, flags, payload, fields):
    node.apply(WEB)
    frame = bytes(tcp_packet(node.client(), WEB.at, flags, payload, **fields))
    expected = packets.reset_to(node.on_the_wire(frame, "client"))
    assert refused(node, frame, Reason.NO_ENDPOINT) == (expected, 1)


def test_T7_without_endpoints_a_datagram_is_unreachable(node):
    node.apply(DNS)
    for fields in ({}, {"options": packets.options(40)}, {"flags": "DF", "tos": 8}):
        for payload in (b"", b"odd", b"x" * 1400):
            frame = udp(node.client(), DNS.at, payload, **fields)
            expected = packets.unreachable_to(node.on_the_wire(frame, "client"), 3)
            assert refused(node, frame, Reason.NO_ENDPOINT) == (expected, 1)


def test_T7_who_is_refused_is_told_on_the_way_that_it_came(node):
    node.apply(WEB)
    for host in ("other", "near"):
        frame = syn(STRANGER, WEB.at)  # there is no route to it
        expected = packets.reset_to(node.on_the_wire(frame, host))
        assert refused(node, frame, Reason.NO_ENDPOINT, host) == (expected, 1)
    assert node.flows(client=text_of(STRANGER)) == []


def test_T7_a_reset_is_never_answered(node):
    node.apply(WEB)
    dropped(node.send(packets.rst(node.client(), WEB.at)), Reason.STRAY_RST)
    dropped(node.send(packets.rst(node.client(), (VIP, 81))), Reason.NOT_SERVED)


MARTIANS = ["0.0.0.9", "127.0.0.1", "224.0.0.1", "239.255.255.255", "255.255.255.255"]


@pytest.mark.parametrize("source", MARTIANS)
def test_T7_nobody_in_particular_is_never_answered(node, source):
    node.apply(WEB)
    for port in (80, 81):
        dropped(node.send(syn(packets.address(f"{source}:80"), (VIP, port))), Reason.MARTIAN_SOURCE)


def test_T7_a_vip_that_asks_itself_is_never_answered(node):
    node.apply(WEB)
    dropped(node.send(syn(WEB.at, WEB.at)), Reason.NO_ENDPOINT)


@pytest.mark.parametrize("admit", ["userspace", "xdp"])
@pytest.mark.parametrize("source", MARTIANS)
def test_C13_no_connection_begins_at_an_address_that_no_host_has(node, source, admit):
    """As with the kernel, whose word for such sources is martian."""
    options = {"turnout.dev/admit": admit}
    web = replace(WEB.with_endpoints(node.endpoint("web-1")), annotations=options)
    dns = replace(DNS.with_endpoints(node.endpoint("web-1")), annotations=options)
    node.apply(web, dns)
    martian = packets.address(f"{source}:4000")
    for frame in (syn(martian, web.at), ack(martian, web.at), udp(martian, dns.at)):
        dropped(node.send(frame), Reason.MARTIAN_SOURCE)
    assert node.flows(client=text_of(martian)) == []
    assert node.send(syn(node.client(), web.at)).reason is Reason.ADMITTED


@pytest.mark.faults(72)
def test_T7_an_endpoint_that_comes_is_connected_to_at_once(node):
    node.apply(WEB)
    client = node.client()
    assert node.send(syn(client, WEB.at)).reason is Reason.NO_ENDPOINT
    node.apply(WEB.with_endpoints(node.endpoint("web-1")))
    expected = rewritten(syn(client, WEB.at), client, node.at("web-1", 8080), node.macs("web-1"))
    assert node.send(syn(client, WEB.at)).only == ("web-1", expected)


@pytest.mark.faults(85)
@pytest.mark.engines("memory", why="only its clock can be moved")
@pytest.mark.parametrize("is_echo", [False, True], ids=["T7", "T10"])
def test_T7_T10_a_client_is_answered_so_often_in_a_second(node, is_echo):
    node.apply(WEB)
    frame = echo_request((VIP, 0), node.client()) if is_echo else syn(node.client(), WEB.at)
    node.advance(2)
    for seconds in (0, 1, 5):
        node.advance(seconds)
        answered = 0
        while (sent := node.send(frame)).left:
            answered += 1
        assert answered == CLIENT_ANSWERS
        dropped(sent, Reason.ANSWER_LIMITED)
    node.advance(2)


def test_T9_an_unknown_port_of_a_vip_is_refused(node):
    node.apply(WEB.with_endpoints(node.endpoint("web-1")))
    client = node.client()
    for frame in (syn(client, (VIP, 81)), ack(client, (VIP, 81))):
        expected = packets.reset_to(node.on_the_wire(frame, "client"))
        assert refused(node, frame, Reason.NOT_SERVED) == (expected, 1)
    frame = udp(client, WEB.at)
    expected = packets.unreachable_to(node.on_the_wire(frame, "client"), 3)
    assert refused(node, frame, Reason.NOT_SERVED) == (expected, 1)
    assert node.flows(client=text_of(client)) == []


@pytest.mark.faults(23, 79)
def test_T9_an_unknown_protocol_of_a_vip_is_refused(node):
    node.apply(WEB.with_endpoints(node.endpoint("web-1")))
    for frame, code in ((packets.sctp_init(node.client(), WEB.at), 3), (packets.gre(node.client(), WEB.at), 2)):
        expected = packets.unreachable_to(node.on_the_wire(frame, "client"), code)
        assert refused(node, frame, Reason.NOT_SERVED) == (expected, 1)
    dropped(node.send(packets.icmp_other((VIP, 0))), Reason.NOT_SERVED)


@pytest.mark.engines(
    "xdp", "xdp-generic", "afxdp", why="userspace gets errors that XDP has found to be about a frontend"
)
def test_T9_an_error_about_nothing_that_came_from_a_vip_goes_nowhere(node):
    node.apply(WEB.with_endpoints(node.endpoint("web-1")))
    nobodys = (VIP, 81)
    dropped(node.send(icmp_error(packets.syn_ack(nobodys, node.client()), "too-big", ROUTER)), Reason.NOT_SERVED)


def test_T9_what_is_to_the_node_itself_is_the_kernel_s(node):
    web = Service("web", "10.96.0.1:80", spec={"type": "NodePort", "ports": [
        {"name": "main", "port": 80, "nodePort": 30080}]})  # fmt: skip
    node.apply(web)
    client, own = node.client(), node.own("client")[0]
    assert refused(node, syn(client, (own, 30080)), Reason.NO_ENDPOINT)[1] == 1  # its frontend is ours
    for frame, reason in (
        (packets.rst(client, (own, 22)), Reason.NOT_OURS),
        (packets.gre(client, (own, 0)), Reason.NOT_TCP_UDP),
        (packets.icmp_other((own, 0)), Reason.OTHER_ICMP),
    ):
        sent = node.send(frame)
        assert (sent.passed, sent.reason) == ([node.on_the_wire(frame, "client")], reason)


@pytest.mark.parametrize("group", [b"\xff" * 6, b"\x01\x00\x5e\x00\x00\x05"], ids=["broadcast", "multicast"])
def test_F006_what_comes_by_a_group_s_mac_address_is_not_forwarded(node, group):
    """Of several nodes that hear it, each would forward it."""
    service = WEB.with_endpoints(node.endpoint("web-1"))
    node.apply(service)
    client = node.client()
    reason = Reason.NOT_IPV4 if node.engine == "raw" else Reason.FOR_MANY  # there the kernel says whom it is to
    for _ in range(2):  # no flow, then one
        for frame in (syn(client, service.at), packets.data(client, service.at), echo_request((VIP, 0), client)):
            sent = node.send(group + frame[6:])
            assert (sent.left, sent.reason) == ([], reason)
            assert sent.passed == [node.on_the_wire(group + frame[6:], "client")]
        assert node.send(syn(client, service.at)).only[0] == "web-1"


@pytest.mark.engines("memory", "xdp", "xdp-generic", "afxdp", why="the filter of raw lets go of a VIP a moment later")
def test_T9_T10_a_vip_that_is_gone_is_not_answered_for(node):
    node.apply(WEB)
    assert node.send(echo_request((VIP, 0), node.client())).left
    node.apply(DNS)
    for frame, reason in (
        (echo_request((VIP, 0), node.client()), Reason.OTHER_ICMP),
        (syn(node.client(), WEB.at), Reason.NOT_OURS),
    ):
        sent = node.send(frame)
        assert (sent.left, sent.passed, sent.reason) == ([], [node.on_the_wire(frame, "client")], reason)


@pytest.mark.faults(73)
@pytest.mark.parametrize(
    ("payload", "fields"),
    [
        pytest.param(b"", {}, id="empty"),
        pytest.param(b"odd", {"ttl": 2, "tos": 0xB9, "id": 7}, id="odd"),
        pytest.param(bytes(range(256)) * 5 + bytes(192), {"flags": "DF"}, id="full"),
        pytest.param(b"ping" * 14, {"options": packets.options(40)}, id="options"),
    ],
)
def test_T10_an_echo_request_to_a_vip_is_answered(node, payload, fields):
    node.apply(WEB)
    frame = node.on_the_wire(echo_request((VIP, 0), node.client(), payload, **fields), "client")
    sent = node.send(frame)
    assert (sent.only, sent.reason) == (("client", packets.echo_reply_to(frame)), Reason.ECHO_ANSWERED)


def test_T10_every_checksum_of_an_echo_is_exact(node):
    node.apply(WEB)
    for word in range(0xF7F0, 0xF810):  # around where adding 0x0800 carries
        frame = node.on_the_wire(echo_request((VIP, 0), node.client(), word.to_bytes(2, "big")), "client")
        assert node.send(frame).only == ("client", packets.echo_reply_to(frame))


def test_T10_at_the_end_of_its_life_an_echo_request_is_the_kernel_s(node):
    node.apply(WEB)
    frame = echo_request((VIP, 0), node.client(), ttl=1)
    sent = node.send(frame)
    assert (sent.passed, sent.reason) == ([node.on_the_wire(frame, "client")], Reason.TTL_EXPIRED)


@pytest.mark.flags(ping="drop")
def test_T10_echo_requests_are_dropped_if_so_set(node):
    node.apply(WEB)
    dropped(node.send(echo_request((VIP, 0), node.client())), Reason.NOT_SERVED)
    assert node.send(syn(node.client(), WEB.at)).left  # all else is answered


@pytest.mark.engines("memory", why="a wire of the same MTU carries no such frame")
def test_T13_who_sends_too_long_a_packet_is_told_how_long_it_may_be(node):
    node.apply(DNS.with_endpoints(node.endpoint("web-1", 5353)))
    client, endpoint = node.client(), node.at("web-1", 5353)
    for _ in range(2):  # no flow, then one
        frame = udp(client, DNS.at, b"x" * 1473, flags="DF")
        expected = packets.unreachable_to(node.on_the_wire(frame, "client"), 4, mtu=1500)
        assert refused(node, frame, Reason.TOO_BIG) == (expected, 1)
        node.send(udp(client, DNS.at))
    frame = udp(endpoint, client, b"x" * 1473, flags="DF")
    expected = packets.unreachable_to(node.on_the_wire(frame, "web-1"), 4, node.own("web-1"), mtu=1500)
    assert refused(node, frame, Reason.TOO_BIG, "web-1") == (expected, 1)
    dropped(node.send(udp(client, DNS.at, b"x" * 1473)), Reason.TOO_BIG)  # which may be cut


@pytest.mark.faults(14)
@pytest.mark.parametrize("kind", ["LSRR", "SSRR"])
def test_N5_a_source_route_is_dropped(node, kind):
    node.apply(WEB.with_endpoints(node.endpoint("web-1")))
    client, endpoint = node.client(), node.at("web-1", 8080)
    routed = {"options": packets.source_route(kind)}
    dropped(node.send(syn(client, WEB.at, **routed)), Reason.SOURCE_ROUTED)
    node.send(syn(client, WEB.at))
    dropped(node.send(ack(client, WEB.at, **routed)), Reason.SOURCE_ROUTED)
    dropped(node.send(packets.syn_ack(endpoint, client, **routed), "web-1"), Reason.SOURCE_ROUTED)
    dropped(node.send(echo_request((VIP, 0), client, **routed)), Reason.SOURCE_ROUTED)
    frame = syn(client, STRANGER, **routed)
    assert node.send(frame).passed == [node.on_the_wire(frame, "client")]
