"""Frames with VLAN tags through a node: served as untagged ones are, and the tags stay as they came. Compared whole."""

from __future__ import annotations

from collections import Counter

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from tests import packets
from tests.node import ScenarioNode, Sent
from tests.packets import Address, data, fin, syn, syn_ack, tagged, udp, untagged
from tests.scenarios.test_traffic import answered, delivered, dns, web
from xdp.schema import Reason

pytestmark = pytest.mark.flags(vlan="100 200-210")

TAGS = [
    pytest.param((100,), (), id="802.1Q"),
    pytest.param((0,), (), id="priority"),
    pytest.param((205,), (0x88A8,), id="802.1ad"),
    pytest.param((200, 7), (), id="QinQ"),
    pytest.param((0, 100), (0x8100, 0x8100), id="priority-and-802.1Q"),
]
with_tags = pytest.mark.parametrize(("vlans", "kinds"), TAGS)


class Trunk:
    """A node as it is reached through VLANs: frames come and go with the same tags."""

    def __init__(self, node: ScenarioNode, vlans: tuple[int, ...], kinds: tuple[int, ...] = ()) -> None:
        self._node, self._vlans, self._kinds = node, vlans, kinds

    def tagged(self, frame: bytes) -> bytes:
        return tagged(frame, *self._vlans, kinds=self._kinds)

    def send(self, frame: bytes, host: str = "client") -> Sent:
        """Send a frame with the tags; return what came of it, without them. What the kernel is to have, it has whole.

        With `raw`, the filter does not look behind a second tag: the kernel gets those, and makes nothing of them.
        """
        given = self.tagged(frame)
        sent = self._node.send(given, host)
        assert all(out == self.tagged(untagged(out)) for _, out in sent.left), sent
        passed = list(sent.passed)
        if self._node.engine == "raw" and len(self._vlans) == 2:
            passed.remove(self._node.on_the_wire(given, host))
        return sent._replace(left=[(to, untagged(out)) for to, out in sent.left], passed=passed)


@pytest.mark.faults(4)
@with_tags
def test_N6_a_connection_keeps_its_tags(node, vlans, kinds):
    trunk, service, client, endpoint = (
        Trunk(node, vlans, kinds),
        web(node, "web-1"),
        node.client(),
        node.at("web-1", 8080),
    )
    first = syn(client, service.at)
    assert trunk.send(first) == Sent([delivered(node, first, client, endpoint)], [], Counter([Reason.ADMITTED]))
    answer = syn_ack(endpoint, client)
    sent = trunk.send(answer, "web-1")
    assert sent == Sent([answered(node, answer, service, client)], [], Counter([Reason.FORWARDED]))
    for frame in (data(client, service.at), data(client, service.at, b"odd"), fin(client, service.at)):
        assert trunk.send(frame) == Sent([delivered(node, frame, client, endpoint)], [], Counter([Reason.FORWARDED]))
        answer = data(endpoint, client, b"answer")
        assert trunk.send(answer, "web-1").only == answered(node, answer, service, client)
    assert node.flow(client)["packets"] == {"original": 4, "reply": 4}


@with_tags
def test_N6_datagrams_and_their_answers_keep_their_tags(node, vlans, kinds):
    trunk, client, endpoint = Trunk(node, vlans, kinds), node.client(), node.at("web-2", 5353)
    service = dns(node, "web-2")
    for _ in range(2):
        ask, answer = udp(client, service.at), udp(endpoint, client, b"answer")
        assert trunk.send(ask).only == delivered(node, ask, client, endpoint)
        assert trunk.send(answer, "web-2").only == answered(node, answer, service, client)


def test_N6_bytes_of_tags_are_not_counted(node):
    service, endpoint, counted = web(node, "web-1"), node.at("web-1", 8080), []
    for vlans in ((), (100,), (200, 7)):
        client = node.client()
        for frame in (syn(client, service.at), data(client, service.at)):
            assert Trunk(node, vlans).send(frame).only == delivered(node, frame, client, endpoint)
        counted.append(node.flow(client)["bytes"])
    assert counted[0] == counted[1] == counted[2]


rooms = pytest.mark.parametrize(("vlans", "room"), [((), 0), ((100,), 0), ((200, 7), 4)], ids=["none", "one", "two"])


def longest(node: ScenarioNode, client: Address, vip: Address, room: int) -> bytes:
    """Return a segment as long as a link takes, of the MTU of which so much is not for it, and may not be cut."""
    frame = data(client, vip, bytes(1500 - (40 if node.family == 4 else 60) - room))
    return packets.uncut(frame) if node.family == 4 else frame


@rooms
def test_N6_a_link_has_room_for_one_tag_beside_its_mtu(node, vlans, room):
    trunk, service = Trunk(node, vlans, (0x8100,) * len(vlans)), web(node, "web-1")
    client, endpoint = node.client(), node.at("web-1", 8080)
    for _ in range(2):  # admitted, and of a known flow
        frame = longest(node, client, service.at, room)
        assert trunk.send(frame).only == delivered(node, frame, client, endpoint)


@pytest.mark.engines("memory", why="no host sends what does not fit its own link; test_twins.py has this of XDP")
@rooms
def test_N6_who_sends_longer_packets_is_told_how_long_they_may_be(node, vlans, room):
    trunk, service, client = Trunk(node, vlans), web(node, "web-1"), node.client()
    trunk.send(syn(client, service.at))
    frame = longest(node, client, service.at, room - 1)
    sent = trunk.send(frame)
    assert (sent.passed, sent.reason) == ([], Reason.TOO_BIG)
    ((host, answer),) = sent.left
    assert host == "client"
    if node.family == 4:
        assert answer == packets.unreachable_to(node.on_the_wire(frame, "client"), 4, mtu=1500 - room)
    else:
        told = Ether(answer).payload.payload
        assert (told.type, told.mtu) == (2, 1500 - room)


@with_tags
def test_N6_who_is_refused_is_told_in_its_vlan(node, vlans, kinds):
    trunk, service, client = Trunk(node, vlans, kinds), web(node), node.client()
    frame = syn(client, service.at)
    sent = trunk.send(frame)
    assert (sent.passed, sent.reason) == ([], Reason.NO_ENDPOINT)
    ((host, answer),) = sent.left
    assert (host, answer[:12]) == (
        "client",
        node.on_the_wire(frame, "client")[6:12] + node.on_the_wire(frame, "client")[:6],
    )
    if node.family == 4:
        assert answer == packets.reset_to(node.on_the_wire(frame, "client"))
    stray = udp(client, service.at)
    sent = trunk.send(stray)
    assert (sent.passed, sent.reason, len(sent.left)) == ([], Reason.NOT_SERVED, 1)
    if node.family == 4:
        assert sent.left[0] == ("client", packets.unreachable_to(node.on_the_wire(stray, "client")))


@with_tags
def test_N6_an_echo_request_is_answered_in_its_vlan(node, vlans, kinds):
    trunk, service, client = Trunk(node, vlans, kinds), web(node, "web-1"), node.client()
    if node.family == 4:
        frame = packets.echo_request((service.at[0], 0), client)
        expected = packets.echo_reply_to(node.on_the_wire(frame, "client"))
        assert trunk.send(frame) == Sent([("client", expected)], [], Counter([Reason.ECHO_ANSWERED]))
        return
    sent = trunk.send(packets.echo6((service.at[0], 0), client))
    assert (sent.only[0], sent.reason) == ("client", Reason.ECHO_ANSWERED)
    assert Ether(sent.only[1])[IPv6].payload.type == 129


@with_tags
def test_N6_fragments_keep_their_tags(node, vlans, kinds):
    trunk, client, endpoint = Trunk(node, vlans, kinds), node.client(), node.at("web-1", 5353)
    service = dns(node, "web-1")
    whole = udp(client, service.at, bytes(range(256)) * 8)
    pieces = [packets.fragment_of(whole, *cut, number=client[1]) for cut in ((0, 1000), (1000, 2056))]
    for piece in pieces:
        sent = trunk.send(piece)
        assert (sent.only[0], sent.only[1][:12]) == ("web-1", node.macs("web-1"))
        ip = Ether(sent.only[1]).payload
        assert (ip.dst, ip.ttl if IP in ip else ip.hlim) == (packets.host(endpoint[0]), 63)


@pytest.mark.faults(4)
@pytest.mark.parametrize(
    ("vlans", "kinds"),
    [
        pytest.param((101,), (), id="another"),
        pytest.param((101,), (0x88A8,), id="another-of-a-provider"),
        pytest.param((4095,), (), id="4095"),
        pytest.param((100, 4095), (), id="4095-inside"),
        pytest.param((7, 100), (), id="QinQ-of-another"),
        pytest.param((0, 101), (0x8100, 0x8100), id="priority-and-another"),
        pytest.param((100, 100, 100), (), id="three"),
        pytest.param((100,), (0x9100,), id="of-an-old-kind"),
    ],
)
def test_N6_what_is_of_other_vlans_is_passed_byte_for_byte(node, vlans, kinds):
    service, client = web(node, "web-1"), node.client()
    frame = tagged(syn(client, service.at), *vlans, kinds=kinds)
    sent = node.send(frame)
    reason = Reason.NOT_IPV4 if kinds == (0x9100,) else Reason.OTHER_VLAN
    assert sent == Sent([], [node.on_the_wire(frame, "client")], Counter([reason]))


@pytest.mark.parametrize("vlans", [(100,), (200, 7)], ids=["802.1Q", "QinQ"])
def test_N6_a_tag_before_too_little_is_passed_byte_for_byte(node, vlans):
    service, client = web(node, "web-1"), node.client()
    whole = tagged(syn(client, service.at), *vlans)
    for length in (14 + 4 * len(vlans) + 19, 14 + 4 * len(vlans) + 2):
        sent = node.send(whole[:length])
        assert sent == Sent([], [node.on_the_wire(whole[:length], "client")], Counter([Reason.TOO_SHORT]))


@pytest.mark.faults(4)
@pytest.mark.engines("memory", why="the kernel drops it before a test can see it; of XDP test_fuzz cuts every frame")
@pytest.mark.parametrize("vlans", [(100,), (200, 7)], ids=["802.1Q", "QinQ"])
def test_N6_half_a_tag_is_the_kernel_s(node, vlans):
    """Which drops it before anybody sees it."""
    service, client = web(node, "web-1"), node.client()
    for length in (14, 16, 17):
        frame = tagged(syn(client, service.at), *vlans)[: length + 4 * (len(vlans) - 1)]
        assert node.send(frame).reasons == Counter([Reason.TOO_SHORT])
