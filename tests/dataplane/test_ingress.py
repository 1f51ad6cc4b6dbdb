"""The ingress filter: what the sets hold, what is left of it, and, packet by packet, what is left to the kernel.

What becomes of the copies is test_originals.py, and of both together tests/scenarios.
"""

from __future__ import annotations

import json
import socket
import subprocess
from dataclasses import astuple

import pytest

from dataplane import ingress
from dataplane.ingress import Filter, Places
from dataplane.settings import PortRange
from perf import echo
from tests import packets
from tests.packets import CLIENT, CLIENT6, DNS_VIP, ENDPOINT, ENDPOINT6, OTHER_ENDPOINT, OTHER_ENDPOINT6, VIP, VIP6
from xdp.errors import AttachError
from xdp.schema import Protocol

pytestmark = pytest.mark.root

WEB, DNS = (*VIP, Protocol.TCP), (*DNS_VIP, Protocol.UDP)
SERVER, OTHER = (*ENDPOINT, Protocol.TCP), (*OTHER_ENDPOINT, Protocol.UDP)
BEFORE = Places(frozenset({WEB, DNS}), frozenset(), frozenset({SERVER}))
AFTER = Places(frozenset({DNS}), frozenset({WEB}), frozenset({SERVER, OTHER}))

OWN, OTHER_OWN = packets.address("10.2.0.1:0")[0], packets.address("10.1.0.1:0")[0]
NODE_PORT, PAST_PORT = (OWN, 30_080), (OWN, 30_090)
LOW, HIGH = 40_000, 40_999
SPARED, PRIVILEGED_SPARED = 40_007, 777
SERVED = Places(
    frozenset({WEB, DNS, (*NODE_PORT, Protocol.TCP), (*NODE_PORT, Protocol.UDP)}),
    frozenset({(*PAST_PORT, Protocol.TCP)}),
    frozenset({SERVER, OTHER}),
    frozenset({OWN, OTHER_OWN}),
    frozenset({OTHER_ENDPOINT[0]}),
)
STATION = packets.VIRTUAL_MAC  # of a device on top of the interface
OWN6 = packets.address("[2001:db8:2::1]:0")[0]
NODE_PORT6, PAST_PORT6 = (OWN6, 30_080), (OWN6, 30_090)
SERVED6 = Places(
    frozenset({(*VIP6, Protocol.TCP), (*NODE_PORT6, Protocol.TCP), (*NODE_PORT6, Protocol.UDP)}),
    frozenset({(*PAST_PORT6, Protocol.TCP)}),
    frozenset({(*ENDPOINT6, Protocol.TCP), (*OTHER_ENDPOINT6, Protocol.UDP)}),
    frozenset({OWN6}),
    frozenset({OTHER_ENDPOINT6[0]}),
)
BOTH = Places(*(one | other for one, other in zip(astuple(SERVED), astuple(SERVED6), strict=True)))


@pytest.fixture
def record(tmp_path):
    with echo.own_network():
        echo.veth_pair("a0", "a1")
        yield tmp_path / "node.filter"


def sets():
    """Return how many elements the sets have, by name, those that have any."""
    listed = json.loads(subprocess.run(["nft", "-j", "list", "ruleset"], check=True, capture_output=True).stdout)
    found = [item["set"] for item in listed["nftables"] if "set" in item]
    return {one["name"]: len(one["elem"]) for one in found if "elem" in one}


def tables():
    return subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout.splitlines()


def test_a_change_is_what_differs(record):
    filter_ = Filter("node", record)
    filter_.start(BEFORE, ["a0", "a1"])
    assert sets() == {"vips": 2, "frontends": 2, "endpoints": 1, "quoted_to": 1}
    filter_.update(AFTER)
    assert sets() == {
        "vips": 1, "frontends": 1, "retired": 1, "endpoints": 2, "quoted_from": 1, "quoted_to": 2
    }  # fmt: skip
    filter_.update(SERVED)
    assert sets() == {
        "vips": 3, "frontends": 4, "retired": 1, "endpoints": 2, "own": 2, "answering": 1,
        "quoted_from": 3, "quoted_to": 2
    }  # fmt: skip
    filter_.update(SERVED6)
    assert sets() == {
        "vips6": 2, "frontends6": 3, "retired6": 1, "endpoints6": 2, "own6": 1, "answering6": 1,
        "quoted_from6": 3, "quoted_to6": 2
    }  # fmt: skip
    filter_.update(Places())
    assert sets() == {}


def test_a_start_takes_the_place_of_what_was_left(record):
    Filter("node", record).start(BEFORE, ["a0"])
    Filter("node", record).start(Places(), ["a0", "a1"])
    assert tables() == ["table netdev turnout_node"]
    assert sets() == {}


def test_what_a_record_tells_of_is_removed_once(record):
    Filter("a-b_c", record).start(BEFORE, ["a0", "a1"])
    assert tables() == ["table netdev turnout_a-b_c"]
    assert ingress.remove(record) == ["a0", "a1"]
    assert tables() == []
    assert not record.exists()
    assert ingress.remove(record) is None


def test_other_tables_are_left_alone(record):
    subprocess.run(["nft", "add", "table", "netdev", "mine"], check=True)
    filter_ = Filter("node", record)
    filter_.start(BEFORE, ["a0"])
    filter_.remove()
    assert tables() == ["table netdev mine"]


@pytest.mark.parametrize(
    ("what", "kinds"),
    [
        (lambda filter_: filter_.put_back(), {"vips", "frontends", "endpoints", "quoted_to"}),
        (lambda filter_: filter_.spare(frozenset({61_000})), {"vips", "frontends", "endpoints", "quoted_to"}),
        (
            lambda filter_: filter_.update(AFTER),
            {"vips", "frontends", "retired", "endpoints", "quoted_from", "quoted_to"},
        ),
    ],
    ids=["looked-for", "ports-spared", "changed"],
)
def test_a_filter_that_was_taken_away_is_put_back_with_the_next_change(record, caplog, what, kinds):
    filter_ = Filter("node", record)
    filter_.start(BEFORE, ["a0"])
    filter_.put_back()
    assert not caplog.messages
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    what(filter_)
    assert caplog.messages == ["somebody has removed the ingress filter: it is put back"]
    assert sets().keys() - {"spared", "spared_quoted", "spared_quoted6"} == kinds
    filter_.update(AFTER)
    assert sets()["retired"] == 1


def test_a_change_that_nft_refuses_changes_nothing(record):
    filter_ = Filter("node", record)
    filter_.start(BEFORE, ["a0"])
    subprocess.run(["nft", "flush", "set", "netdev", "turnout_node", "vips"], check=True)
    before = sets()
    with pytest.raises(AttachError, match="nftables refuses the ingress filter"):
        filter_.update(Places())  # one of its elements is not there
    assert sets() == before
    filter_.start(AFTER, ["a0"])
    filter_.update(BEFORE)
    assert sets() == {"vips": 2, "frontends": 2, "endpoints": 1, "quoted_to": 1}


def test_without_interfaces_there_is_no_filter_whatever_changes(record):
    filter_ = Filter("node", record)
    filter_.start(BEFORE, ["a0"])
    filter_.start(BEFORE, [])
    filter_.update(AFTER)
    filter_.spare(frozenset({61_000}))
    filter_.put_back()
    assert tables() == []
    filter_.start(AFTER, ["a0"])
    assert sets()["spared"] == 1


def test_ten_thousand_places_are_one_transaction(record):
    many = frozenset({(CLIENT[0] + n, 80, int(Protocol.TCP)) for n in range(10_000)})
    filter_ = Filter("node", record)
    filter_.start(Places(many, frozenset(), many), ["a0"])
    assert sets() == dict.fromkeys(("vips", "frontends", "endpoints", "quoted_to"), 10_000)


def test_a_single_port_to_masquerade_from(record):
    Filter("node", record, PortRange(LOW, LOW)).start(SERVED, ["a0"])
    assert sets()["own"] == 2


def test_C12_ports_that_are_spared_stay_so_when_the_filter_is_put_back(record):
    filter_ = Filter("node", record)
    filter_.spare(frozenset({61_000}))
    filter_.start(Places(), ["a0"])
    spared = ("spared", "spared_quoted", "spared_quoted6")
    assert sets() == dict.fromkeys(spared, 1)
    filter_.spare(frozenset({600, 61_001, 61_002}))
    assert sets() == dict.fromkeys(spared, 3)
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    filter_.start(Places(), ["a0"])
    assert sets() == dict.fromkeys(spared, 3)
    filter_.spare(frozenset())
    assert sets() == {}


def test_what_this_kernel_needs_is_here():
    ingress.need_nft()


def test_without_interfaces_there_is_no_table(record):
    filter_ = Filter("node", record)
    filter_.start(BEFORE, ["a0"])
    filter_.start(BEFORE, [])
    assert tables() == []
    assert not record.exists()


# Packet by packet.


class Gate:
    """The filter on an interface of a node that has two addresses, with a count of what gets past it."""

    def __init__(self, record):
        for name, address in (("a0", "10.2.0.1/24"), ("a0", "10.1.0.1/24"), ("b0", "10.9.0.1/24")):
            subprocess.run(["ip", "address", "add", address, "dev", name], check=True)
        sixes = (("a0", "2001:db8:2::1/64"), ("a0", "2001:db8:1::1/64"), ("b0", "2001:db8:9::1/64"))
        for name, address in sixes:
            subprocess.run(["ip", "address", "add", address, "dev", name, "nodad"], check=True)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("a0", 0))
            self._mac = sock.getsockname()[4]
        filter_ = Filter("node", record, PortRange(LOW, HIGH))
        filter_.start(BOTH, ["a0"])
        filter_.spare(frozenset({SPARED, PRIVILEGED_SPARED}))
        filter_.hear(frozenset({STATION}))
        hook, those = 'type filter hook ingress device "a0"', "meta pkttype { host, other } ether type { ip, ip6 }"
        chains = "".join(
            f"chain {name} {{ {hook} priority {at}; {those} counter; }}\n" for name, at in (("came", -1), ("past", 1))
        )
        subprocess.run(["nft", "-f", "-"], input=f"table netdev gate {{ {chains} }}", check=True, text=True)
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._socket.bind(("a1", 0))

    def close(self):
        self._socket.close()

    def _counts(self):
        """Return how many frames of either family have come to us, and how many of them got past the filter."""
        text = subprocess.run(["nft", "-j", "list", "table", "netdev", "gate"], check=True, capture_output=True).stdout
        found = {"came": 0, "past": 0}
        for item in json.loads(text)["nftables"]:
            for expression in item.get("rule", {}).get("expr", ()):
                found[item["rule"]["chain"]] += expression.get("counter", {}).get("packets", 0)
        return found["came"], found["past"]

    def __call__(self, frame, mac=b""):
        """Tell whether the kernel gets a frame."""
        before = self._counts()
        self._socket.send((mac or self._mac) + frame[6:])
        for _ in range(100):
            after = self._counts()
            if after[0] > before[0]:
                return after[1] > before[1]
        raise AssertionError("the frame has not come")


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    with echo.own_network():
        echo.veth_pair("a0", "a1")
        echo.veth_pair("b0", "b1")
        made = Gate(tmp_path_factory.mktemp("gate") / "node.filter")
        yield made
        made.close()


@pytest.mark.faults(6)
@pytest.mark.parametrize("frame", [packets.syn(), packets.syn(CLIENT6, VIP6)], ids=["4", "6"])
def test_what_is_to_another_machine_is_left_alone_and_what_is_to_a_device_on_top_is_not(gate, frame):
    assert gate(frame, packets.OTHER_MAC)
    assert not gate(frame, STATION)
    assert not gate(frame)


def test_a_filter_hears_what_it_is_told_of_when_it_is_put_back(record):
    filter_ = Filter("node", record)
    filter_.hear(frozenset({STATION}))
    filter_.start(Places(), ["a0"])
    assert sets() == {"stations": 1}
    filter_.hear(frozenset({STATION, packets.OTHER_MAC}))
    assert sets() == {"stations": 2}
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    filter_.hear(frozenset({packets.OTHER_MAC}))
    assert sets() == {"stations": 1}
    filter_.hear(frozenset())
    assert sets() == {}


def about(frame, kind="too-big"):
    return packets.icmp_error(frame, kind)


DATAGRAM = packets.udp(CLIENT, NODE_PORT, bytes(3000))
ANSWER = packets.udp(OTHER_ENDPOINT, (OWN, LOW), bytes(3000))
DATAGRAM6 = packets.udp(CLIENT6, NODE_PORT6, bytes(3000))
ANSWER6 = packets.udp(OTHER_ENDPOINT6, (OWN6, LOW), bytes(3000))
ELSEWHERE, ELSEWHERE6 = packets.address("10.9.0.10:40000"), packets.address("[2001:db8:9::10]:40000")


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(packets.syn(), id="vip"),
        pytest.param(packets.gre(CLIENT, VIP), id="vip-gre"),
        pytest.param(about(packets.syn_ack(VIP, CLIENT)), id="vip-error"),
        pytest.param(packets.syn(CLIENT, NODE_PORT), id="node-port-tcp"),
        pytest.param(packets.udp(CLIENT, NODE_PORT), id="node-port-udp"),
        pytest.param(packets.udp(CLIENT, NODE_PORT, options=packets.options(8)), id="node-port-options"),
        pytest.param(packets.fragment_of(DATAGRAM, 0, 1480), id="node-port-first-fragment"),
        pytest.param(packets.data(CLIENT, PAST_PORT), id="past-node-port"),
        pytest.param(about(packets.syn_ack(NODE_PORT, CLIENT)), id="node-port-error"),
        pytest.param(about(packets.udp(NODE_PORT, CLIENT), "port-unreachable"), id="node-port-error-udp"),
        pytest.param(about(packets.data(PAST_PORT, CLIENT)), id="past-node-port-error"),
        pytest.param(packets.syn_ack(ENDPOINT, (OWN, LOW)), id="answer"),
        pytest.param(packets.syn_ack(ENDPOINT, (OTHER_OWN, HIGH)), id="answer-other-address"),
        pytest.param(packets.udp(OTHER_ENDPOINT, (OWN, HIGH)), id="answer-udp"),
        pytest.param(packets.syn_ack(ENDPOINT, (OWN, 600)), id="answer-privileged"),
        pytest.param(packets.udp(OTHER_ENDPOINT, (OWN, 1023)), id="answer-privileged-udp"),
        pytest.param(about(packets.syn((OWN, 600), ENDPOINT)), id="privileged-error"),
        pytest.param(packets.syn_ack(ENDPOINT, (CLIENT[0], SPARED)), id="endpoint-to-client-at-spared-port"),
        pytest.param(packets.fragment_of(ANSWER, 0, 1480), id="answer-first-fragment"),
        pytest.param(about(packets.syn((OWN, LOW), ENDPOINT)), id="masqueraded-error"),
        pytest.param(about(packets.udp((OWN, HIGH), OTHER_ENDPOINT), "time-exceeded"), id="masqueraded-error-udp"),
        pytest.param(packets.syn_ack(ENDPOINT, CLIENT), id="endpoint-to-client"),
        pytest.param(about(packets.syn(CLIENT, ENDPOINT)), id="endpoint-error"),
        pytest.param(packets.syn(CLIENT6, VIP6), id="vip-6"),
        pytest.param(packets.of_protocol(47, CLIENT6, VIP6), id="vip-gre-6"),
        pytest.param(packets.fragment6(packets.syn(CLIENT6, VIP6)), id="vip-fragment-6"),
        pytest.param(about(packets.syn_ack(VIP6, CLIENT6)), id="vip-error-6"),
        pytest.param(packets.syn(CLIENT6, NODE_PORT6), id="node-port-tcp-6"),
        pytest.param(packets.udp(CLIENT6, NODE_PORT6), id="node-port-udp-6"),
        pytest.param(packets.behind(packets.end_options(24), packets.udp(CLIENT6, NODE_PORT6)), id="node-port-ext-6"),
        pytest.param(packets.fragment_of(DATAGRAM6, 0, 1448), id="node-port-first-fragment-6"),
        pytest.param(
            packets.fragment6(packets.udp(CLIENT6, NODE_PORT6), has_more=False), id="node-port-only-fragment-6"
        ),
        pytest.param(packets.data(CLIENT6, PAST_PORT6), id="past-node-port-6"),
        pytest.param(about(packets.syn_ack(NODE_PORT6, CLIENT6)), id="node-port-error-6"),
        pytest.param(about(packets.data(PAST_PORT6, CLIENT6)), id="past-node-port-error-6"),
        pytest.param(packets.syn_ack(ENDPOINT6, (OWN6, LOW)), id="answer-6"),
        pytest.param(packets.udp(OTHER_ENDPOINT6, (OWN6, HIGH)), id="answer-udp-6"),
        pytest.param(packets.syn_ack(ENDPOINT6, (OWN6, 1023)), id="answer-privileged-6"),
        pytest.param(about(packets.syn((OWN6, 600), ENDPOINT6)), id="privileged-error-6"),
        pytest.param(packets.fragment_of(ANSWER6, 0, 1448), id="answer-first-fragment-6"),
        pytest.param(about(packets.syn((OWN6, LOW), ENDPOINT6)), id="masqueraded-error-6"),
        pytest.param(about(packets.udp((OWN6, HIGH), OTHER_ENDPOINT6), "time-exceeded"), id="masqueraded-error-udp-6"),
        pytest.param(packets.syn_ack(ENDPOINT6, CLIENT6), id="endpoint-to-client-6"),
        pytest.param(
            packets.fragment6(packets.syn_ack(ENDPOINT6, CLIENT6), has_more=False), id="endpoint-only-fragment-6"
        ),
        pytest.param(packets.behind(packets.hop_options(), packets.syn_ack(ENDPOINT6, CLIENT6)), id="endpoint-ext-6"),
        pytest.param(about(packets.syn(CLIENT6, ENDPOINT6)), id="endpoint-error-6"),
        pytest.param(packets.echo_reply(OTHER_ENDPOINT, CLIENT), id="echo-reply"),
        pytest.param(packets.echo_reply(OTHER_ENDPOINT6, CLIENT6), id="echo-reply-6"),
    ],
)
def test_what_is_ours_is_dropped(gate, frame):
    assert not gate(frame)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(packets.syn(CLIENT, (OWN, 22)), id="ssh"),
        pytest.param(packets.syn(CLIENT, (OTHER_OWN, NODE_PORT[1])), id="node-port-at-another-address"),
        pytest.param(packets.udp(CLIENT, (OWN, LOW)), id="range-from-no-endpoint"),
        pytest.param(packets.syn(CLIENT, NODE_PORT, ttl=1), id="ttl"),
        pytest.param(packets.syn(CLIENT, PAST_PORT), id="past-node-port-syn"),
        pytest.param(packets.udp(CLIENT, PAST_PORT), id="past-node-port-udp"),
        pytest.param(packets.fragment_of(DATAGRAM, 1480, 2960), id="node-port-later-fragment"),
        pytest.param(packets.first_fragment(CLIENT, PAST_PORT), id="first-fragment"),
        pytest.param(packets.echo_request((OWN, 0)), id="ping"),
        pytest.param(packets.gre(CLIENT, (OWN, 0)), id="gre"),
        pytest.param(about(packets.syn_ack((OWN, 22), CLIENT)), id="ssh-error"),
        pytest.param(about(packets.data((OTHER_OWN, NODE_PORT[1]), CLIENT)), id="error-another-address"),
        pytest.param(packets.syn_ack(ENDPOINT, (OWN, LOW - 1)), id="below-the-range"),
        pytest.param(packets.syn_ack(ENDPOINT, (OWN, HIGH + 1)), id="above-the-range"),
        pytest.param(packets.syn_ack(ENDPOINT, (OWN, 599)), id="below-the-privileged-range"),
        pytest.param(packets.syn_ack(ENDPOINT, (OWN, 1024)), id="above-the-privileged-range"),
        pytest.param(packets.syn_ack(ENDPOINT, (OWN, SPARED)), id="spared"),
        pytest.param(packets.udp(OTHER_ENDPOINT, (OWN, PRIVILEGED_SPARED)), id="spared-privileged-udp"),
        pytest.param(about(packets.syn((OWN, SPARED), ENDPOINT)), id="spared-error"),
        pytest.param(packets.syn_ack((ENDPOINT[0], 22), (OWN, LOW)), id="another-port-of-the-endpoint"),
        pytest.param(packets.udp(ENDPOINT, (OWN, LOW)), id="another-protocol-of-the-endpoint"),
        pytest.param(packets.fragment_of(ANSWER, 1480, 2960), id="answer-later-fragment"),
        pytest.param(about(packets.syn((OWN, LOW - 1), ENDPOINT)), id="error-below-the-range"),
        pytest.param(about(packets.syn((OWN, HIGH + 1), ENDPOINT)), id="error-above-the-range"),
        pytest.param(about(packets.syn((OWN, LOW), CLIENT)), id="error-to-no-endpoint"),
        pytest.param(packets.syn_ack(ENDPOINT, ELSEWHERE), id="endpoint-to-elsewhere"),
        pytest.param(packets.fragment_of(packets.udp(OTHER_ENDPOINT, CLIENT, bytes(99)), 0, 8), id="answer-fragment"),
        pytest.param(packets.syn(CLIENT, ENDPOINT), id="to-an-endpoint"),
        pytest.param(packets.syn(CLIENT6, (OWN6, 22)), id="ssh-6"),
        pytest.param(packets.syn(CLIENT6, VIP6, ttl=1), id="ttl-6"),
        pytest.param(packets.syn(CLIENT6, PAST_PORT6), id="past-node-port-syn-6"),
        pytest.param(packets.fragment_of(DATAGRAM6, 1448, 2896), id="node-port-later-fragment-6"),
        pytest.param(packets.first_fragment(CLIENT6, PAST_PORT6), id="first-fragment-6"),
        pytest.param(packets.fragment_of(ANSWER6, 1448, 2896), id="answer-later-fragment-6"),
        pytest.param(packets.echo6((OWN6, 0)), id="ping-6"),
        pytest.param(about(packets.syn_ack((OWN6, 22), CLIENT6)), id="ssh-error-6"),
        pytest.param(packets.syn_ack(ENDPOINT6, (OWN6, LOW - 1)), id="below-the-range-6"),
        pytest.param(packets.syn_ack(ENDPOINT6, (OWN6, SPARED)), id="spared-6"),
        pytest.param(about(packets.syn((OWN6, PRIVILEGED_SPARED), ENDPOINT6)), id="spared-error-6"),
        pytest.param(packets.syn_ack((ENDPOINT6[0], 22), (OWN6, LOW)), id="another-port-of-the-endpoint-6"),
        pytest.param(packets.udp(ENDPOINT6, (OWN6, LOW)), id="another-protocol-of-the-endpoint-6"),
        pytest.param(about(packets.syn((OWN6, HIGH + 1), ENDPOINT6)), id="error-above-the-range-6"),
        pytest.param(about(packets.syn((OWN6, LOW), CLIENT6)), id="error-to-no-endpoint-6"),
        pytest.param(packets.syn_ack(ENDPOINT6, ELSEWHERE6), id="endpoint-to-elsewhere-6"),
        pytest.param(packets.fragment6(packets.udp(OTHER_ENDPOINT6, CLIENT6)), id="answer-fragment-6"),
        pytest.param(packets.syn(CLIENT6, ENDPOINT6), id="to-an-endpoint-6"),
        pytest.param(packets.echo_reply(OTHER_ENDPOINT, (OWN, LOW)), id="echo-reply-to-us"),
        pytest.param(packets.echo_reply(ENDPOINT, CLIENT), id="echo-reply-of-who-is-not-asked"),
        pytest.param(packets.echo_request(CLIENT, OTHER_ENDPOINT), id="echo-request-of-who-is-asked"),
        pytest.param(packets.echo_reply(OTHER_ENDPOINT, ELSEWHERE), id="echo-reply-to-elsewhere"),
        pytest.param(packets.echo_reply(OTHER_ENDPOINT6, (OWN6, LOW)), id="echo-reply-to-us-6"),
        pytest.param(packets.echo_reply(ENDPOINT6, CLIENT6), id="echo-reply-of-who-is-not-asked-6"),
        pytest.param(packets.echo_request(CLIENT6, OTHER_ENDPOINT6), id="echo-request-of-who-is-asked-6"),
    ],
)
def test_what_is_not_ours_is_the_kernels(gate, frame):
    assert gate(frame)
