"""Questions for VIPs by ARP and NDP, to one node after the other: what it says to each, frame by frame."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Ether

from perf.world import World
from tests.daemon import Daemon
from tests.packets import tagged
from tests.scenarios.test_announce import ALL_NODES, Link, two_nodes, web
from tests.services import write_manifests
from tests.wires import Wire

pytestmark = [pytest.mark.root]

SUBJECTS = [
    pytest.param((engine, family), marks=marks, id=engine if family == 4 else f"{engine}-6")
    for engine, marks in (("xdp", (pytest.mark.bpf,)), ("raw", ()))
    for family in (4, 6)
]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module", params=SUBJECTS)
def asked(request: pytest.FixtureRequest, world: World) -> Iterator[tuple[Link, Daemon]]:
    """A node that answers, in a VLAN, too, and its clients' link."""
    engine, family = request.param
    link = Link(world, family)
    with Daemon(world, engine) as daemon:
        daemon.start_with = ["--announce", "arp", "--vlan", "100"]
        write_manifests(daemon.file, [web(world, link)])
        daemon.start()
        yield link, daemon


@pytest.fixture
def link(asked: tuple[Link, Daemon]) -> Link:
    return asked[0]


@pytest.fixture
def daemon(asked: tuple[Link, Daemon]) -> Daemon:
    return asked[1]


@pytest.fixture
def wire(world: World) -> Iterator[Wire]:
    """What the client sees on its wire, and may send."""
    made = Wire(world["client"], "eth0")
    yield made
    made.close()


def test_A_an_answer_is_the_whole_frame_turned_round(link, daemon, wire):
    wire.received()
    wire.send(link.ask(link.vip))
    daemon.wait_for(lambda: link.answer(link.vip) in wire.received())


def not_for_us(link: Link) -> list[tuple[bytes, dict[str, str]]]:
    """Return frames that are not answered, each with what it is counted as, by engine."""
    if link.family == 4:
        reply = ARP(op=2, hwsrc=link.client_mac, psrc=link.client, pdst=link.vip)
        frames = link.ask(link.free), bytes(Ether(dst="ff:ff:ff:ff:ff:ff", src=link.client_mac) / reply)
        return [(frame, {"xdp": "NOT_IPV4", "raw": "NOT_IPV4"}) for frame in frames]
    mac, sent_on = bytes.fromhex(link.mac.replace(":", "")), bytearray(link.ask(link.vip))
    sent_on[21] = 254  # by a router
    return [
        # Not to its group: a switch knows that nobody is in that one.
        (mac + link.ask(link.free)[6:], {"xdp": "OTHER_ICMP", "raw": "OTHER_ICMP"}),
        (bytes(sent_on), {"xdp": "OTHER_ICMP", "raw": "NOT_IPV4"}),
        (link.ask(link.vip, source="ff02::1"), {"xdp": "VANISHED", "raw": "OTHER_ICMP"}),
    ]


@pytest.mark.faults(9)
@pytest.mark.parametrize("vlans", [(0,), (100,), (100, 7)], ids=["priority", "802.1Q", "QinQ"])
def test_A_N6_a_question_in_a_vlan_is_answered_in_it(link, daemon, wire, vlans):
    wire.received()
    wire.send(tagged(link.ask(link.vip), *vlans))
    daemon.wait_for(lambda: tagged(link.answer(link.vip), *vlans) in wire.received())
    before = daemon.ask("reasons")
    for frame, ends in not_for_us(link):
        reason = ends[daemon.engine]
        count = daemon.ask("reasons").get(reason, 0)
        wire.send(frame)
        daemon.wait_for(lambda reason=reason, count=count: daemon.ask("reasons").get(reason, 0) > count)
    assert daemon.ask("reasons")["ARP_ANSWERED"] == before["ARP_ANSWERED"]


@pytest.mark.faults(9)
@pytest.mark.parametrize(
    "asked", [subject for subject in SUBJECTS if subject.id.endswith("-6")], indirect=True, scope="module"
)
def test_A_who_wants_to_take_an_ipv6_vip_for_itself_hears_that_it_is_taken(link, daemon, wire):
    """As duplicate address detection asks: without an address, and without saying where it is."""
    wire.received()
    question = Ether(link.ask(link.vip, source="::"))
    question[ICMPv6ND_NS].remove_payload()
    del question[ICMPv6ND_NS].cksum, question[IPv6].plen
    wire.send(bytes(question))
    said = ICMPv6ND_NA(R=0, S=0, O=1, tgt=link.vip)
    answer = bytes(Ether(dst=ALL_NODES, src=link.mac) / IPv6(src=link.vip, dst="ff02::1", hlim=255) / said)
    daemon.wait_for(lambda: answer in wire.received())


def test_F008_a_storm_is_answered_up_to_a_limit(link, daemon, wire):
    question = link.ask(link.vip)

    def is_limited() -> bool:
        for _ in range(1500):
            wire.send(question)
        return daemon.ask("status")["reasons"].get("ARP_LIMITED", 0) > 0

    daemon.wait_for(is_limited)
