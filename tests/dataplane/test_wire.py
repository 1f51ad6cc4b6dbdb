"""Bytes to five-tuples and back: compiled code and C do the very same, and scapy agrees."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether

from conntrack import compiled as flows
from dataplane import wire, wire6
from tests import packets
from tests.named_packets import NAMED
from tests.native import Native, at_the_edge
from tests.packets import CLIENT, DNS_VIP, ENDPOINT, VIP
from tests.reference import is_ipv6
from xdp import schema
from xdp.schema import Protocol, Reason
from xdp.tables import Capacity, Tables

HOP_MACS = bytes.fromhex("02000000ee02 02000000ee01")
_PACKET = np.zeros(1, wire.PACKET)


@pytest.fixture(scope="module")
def native() -> Native:
    return Native()


@pytest.fixture(scope="module")
def next_hops() -> npt.NDArray[np.void]:
    hops = np.zeros(2, schema.NEXT_HOP)
    hops[1]["dst_mac"], hops[1]["src_mac"] = list(HOP_MACS[:6]), list(HOP_MACS[6:])
    return hops


def parsed(frame: npt.NDArray[np.uint8], length: int) -> tuple[int, tuple[int, ...]]:
    reason = wire.parse(frame, 0, length, _PACKET[0])
    if reason == Reason.NOT_IPV4 and is_ipv6(frame[:length].tobytes()):
        reason = wire6.parse(frame, 0, length, _PACKET[0])
    found = _PACKET[0]
    fields = ("addrs", "ports", "protocol", "l4", "ttl", "tcp_flags", "datagram", "quoted")
    return int(reason), tuple(int(found[field]) for field in fields)


def numbers(address: packets.Address) -> tuple[int, int]:
    """Return address and port as they lie in memory."""
    return int.from_bytes(address[0].to_bytes(4, "big"), "little"), int.from_bytes(
        address[1].to_bytes(2, "big"), "little"
    )


def key(source: packets.Address, destination: packets.Address) -> tuple[np.uint64, np.uint32]:
    (src, sport), (dst, dport) = numbers(source), numbers(destination)
    return np.uint64(dst << 32 | src), np.uint32(dport << 16 | sport)


def record_of(
    before: tuple[packets.Address, packets.Address], after: tuple[packets.Address, packets.Address], protocol: Protocol
) -> npt.NDArray[np.void]:
    """Return the flow record that changes packets from `before` to `after` (source, destination)."""
    tables = Tables.in_memory(
        Capacity(connections=10, frontends=4, maglev_slots=16, services=2, endpoints=2, next_hops=2)
    )
    slot = flows.insert(
        tables, *key(*before), *key(*after), np.uint8(protocol), np.uint8(1), np.uint32(1), np.uint32(1), np.uint32(0)
    )
    assert slot >= 0
    return tables.flows[slot : slot + 1]


HEADERS = 400  # bytes, and more than headers and what they quote take: behind them one length is like another


@pytest.mark.faults(1)
@pytest.mark.parametrize("name", NAMED)
def test_parsing_any_prefix_of_a_frame_is_the_same_in_c_and_in_compiled_code(name: str, native: Native):
    frame = NAMED[name]
    for length in {*range(min(len(frame), HEADERS) + 1), *range(HEADERS, len(frame), 97), len(frame) - 1, len(frame)}:
        memory = at_the_edge(length)
        memory[:] = np.frombuffer(frame, np.uint8, length)
        assert parsed(memory, length) == native.parse(memory, length), f"{length} bytes"


@settings(max_examples=500, deadline=None)
@given(
    name=st.sampled_from(sorted(NAMED)),
    changes=st.lists(st.tuples(st.integers(12, 75), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 8),
)
def test_parsing_damaged_frames_is_the_same(name: str, changes: list[tuple[int, int]], cut: int, native: Native):
    frame = bytearray(NAMED[name])
    for place, value in changes:
        if place < len(frame):
            frame[place] = value
    length = len(frame) - cut
    memory = at_the_edge(length)
    memory[:] = np.frombuffer(bytes(frame), np.uint8, length)
    assert parsed(memory, length) == native.parse(memory, length)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("syn", Reason.FORWARDED),
        ("udp", Reason.FORWARDED),
        ("syn-with-all-options", Reason.FORWARDED),
        ("syn-padded", Reason.FORWARDED),
        ("arp", Reason.NOT_IPV4),
        ("ipv6-syn", Reason.FORWARDED),
        ("ipv6-udp", Reason.FORWARDED),
        ("ipv6-udp-unsummed", Reason.UNSUMMED),
        ("ipv6-echo", Reason.VIP_ECHO),
        ("ipv6-hop-by-hop", Reason.FORWARDED),
        ("ipv6-destination-options-udp", Reason.FORWARDED),
        ("ipv6-destination-options-udp-unsummed", Reason.UNSUMMED),
        ("ipv6-source-routed", Reason.FORWARDED),
        ("ipv6-four-extensions", Reason.FORWARDED),
        ("ipv6-five-extensions", Reason.NOT_TCP_UDP),
        ("ipv6-hop-by-hop-behind-another", Reason.NOT_TCP_UDP),
        ("ipv6-extensions-of-128-bytes", Reason.FORWARDED),
        ("ipv6-extensions-of-136-bytes", Reason.NOT_TCP_UDP),
        ("ipv6-extension-beyond-its-packet", Reason.TOO_SHORT),
        ("ipv6-extension-before-half-a-header", Reason.TOO_SHORT),
        ("ipv6-protocol-134", Reason.NOT_TCP_UDP),
        ("ipv6-fragment", Reason.FLOW_FRAGMENT),
        ("ipv6-fragment-behind-an-extension", Reason.FLOW_FRAGMENT),
        ("ipv6-fragment-with-half-a-header", Reason.VIP_FRAGMENT),
        ("ipv6-fragment-with-options-behind", Reason.VIP_FRAGMENT),
        ("ipv6-fragment-later", Reason.VIP_FRAGMENT),
        ("ipv6-fragment-unsummed", Reason.UNSUMMED),
        ("ipv6-fragment-alone", Reason.FORWARDED),
        ("ipv6-fragment-alone-with-options-behind", Reason.FORWARDED),
        ("ipv6-fragment-of-a-fragment", Reason.FLOW_FRAGMENT),
        ("ipv6-error-about-an-extension", Reason.ICMP_ERROR),
        ("ipv6-error-behind-an-extension", Reason.ICMP_ERROR),
        ("ipv6-error-about-a-first-fragment", Reason.ICMP_ERROR),
        ("ipv6-error-about-a-later-fragment", Reason.OTHER_ICMP),
        ("ipv6-error-about-extensions-with-seven-bytes", Reason.TOO_SHORT),
        ("ipv6-error-about-too-many-extensions", Reason.OTHER_ICMP),
        ("ipv6-echo-behind-an-extension", Reason.VIP_ECHO),
        ("ipv6-error-port-unreachable", Reason.ICMP_ERROR),
        ("ipv6-error-with-eight-bytes", Reason.ICMP_ERROR),
        ("ipv6-error-with-seven-bytes-padded", Reason.TOO_SHORT),
        ("ipv6-error-about-an-error", Reason.OTHER_ICMP),
        ("vlan", Reason.NOT_IPV4),
        ("sctp", Reason.NOT_TCP_UDP),
        ("echo", Reason.VIP_ECHO),
        ("echo-without-data", Reason.VIP_ECHO),
        ("timestamp", Reason.OTHER_ICMP),
        ("first-fragment", Reason.FLOW_FRAGMENT),
        ("later-fragment", Reason.VIP_FRAGMENT),
        ("error-about-a-reply", Reason.ICMP_ERROR),
        ("error-with-eight-bytes", Reason.ICMP_ERROR),
        ("error-with-seven-bytes", Reason.TOO_SHORT),
        ("error-with-eight-bytes-padded", Reason.ICMP_ERROR),
        ("error-with-seven-bytes-padded", Reason.TOO_SHORT),
        ("error-with-half-a-header-padded", Reason.TOO_SHORT),
        ("error-about-a-fragment", Reason.OTHER_ICMP),
        ("error-about-an-error", Reason.OTHER_ICMP),
        ("error-about-an-echo-request", Reason.ICMP_ERROR),
        ("error-about-an-echo-of-eight-bytes", Reason.ICMP_ERROR),
        ("error-about-an-echo-of-seven-bytes", Reason.TOO_SHORT),
        ("echo-reply", Reason.ECHO_REPLY),
        ("ipv6-echo-reply", Reason.ECHO_REPLY),
        ("ipv6-error-about-an-echo-reply", Reason.ICMP_ERROR),
        ("ipv6-error-about-an-echo-of-seven-bytes", Reason.TOO_SHORT),
    ],
)
def test_what_a_frame_is(name: str, reason: Reason):
    frame = np.frombuffer(NAMED[name], np.uint8).copy()
    assert Reason(parsed(frame, len(frame))[0]) is reason


def test_the_five_tuple_lies_as_in_memory():
    frame = np.frombuffer(NAMED["syn"], np.uint8).copy()
    addrs, ports = key(CLIENT, VIP)
    assert parsed(frame, len(frame)) == (Reason.FORWARDED, (addrs, ports, Protocol.TCP, 34, 64, 0x02, 0, 0))


def test_an_icmp_error_has_the_five_tuple_of_the_direction_in_which_it_travels():
    frame = np.frombuffer(NAMED["error-about-a-reply"], np.uint8).copy()
    _, (addrs, ports, protocol, *_) = parsed(frame, len(frame))
    assert (addrs, ports) == key(CLIENT, VIP)
    assert protocol == Protocol.TCP


# A source route's last address is the one that a checksum covers: such frames are not rewritten.
_WITH_RIGHT_SUMS = [
    name
    for name in NAMED
    if name.startswith(("syn", "ack", "data", "fin", "rst", "udp")) and "source-routed" not in name
]


def rewritten_both_ways(
    frame: bytes, record: npt.NDArray[np.void], next_hops: npt.NDArray[np.void], native: Native
) -> bytes:
    """Return the frame as its record says, having checked that C and compiled code agree."""
    ours, theirs = np.frombuffer(frame, np.uint8).copy(), bytearray(frame)
    l4 = parsed(ours, len(ours))[1][3]
    wire.rewrite(ours, 0, np.uint32(l4), record[0], next_hops, 1)
    assert native.rewrite(theirs, l4, record.tobytes(), next_hops[1:2].tobytes()) == 0
    assert ours.tobytes() == bytes(theirs)
    return bytes(theirs)


@pytest.mark.parametrize("name", [name for name in _WITH_RIGHT_SUMS if "wrong" not in name and "padded" not in name])
def test_a_rewritten_frame_is_what_scapy_computes_from_scratch(
    name: str, native: Native, next_hops: npt.NDArray[np.void]
):
    frame = NAMED[name]
    protocol = Protocol(frame[23])
    before = tuple_of(frame)
    record = record_of(before, (before[0], ENDPOINT), protocol)
    expected = packets.rewritten(frame, before[0], ENDPOINT, HOP_MACS)
    assert rewritten_both_ways(frame, record, next_hops, native) == expected


def tuple_of(frame: bytes) -> tuple[packets.Address, packets.Address]:
    ip = Ether(frame)[IP]
    layer = ip[TCP] if TCP in ip else ip[UDP]
    return (packets.address(f"{ip.src}:{layer.sport}"), packets.address(f"{ip.dst}:{layer.dport}"))


_addresses = st.tuples(st.integers(1, 0xFFFFFFFE), st.integers(0, 0xFFFF))


@settings(max_examples=150, deadline=None)
@given(
    before=st.tuples(_addresses, _addresses),
    after=st.tuples(_addresses, _addresses),
    is_tcp=st.booleans(),
    payload=st.binary(max_size=40),
    ttl=st.integers(2, 255),
)
def test_rewriting_is_exact_for_any_addresses(
    before: tuple[packets.Address, packets.Address],
    after: tuple[packets.Address, packets.Address],
    is_tcp: bool,
    payload: bytes,
    ttl: int,
    native: Native,
    next_hops: npt.NDArray[np.void],
):
    assume(before != after[::-1])  # then both directions would have one five-tuple
    if is_tcp:
        frame = bytes(packets.tcp_packet(*before, "PA", payload, ttl=ttl))
    else:
        frame = bytes(packets.udp_packet(*before, payload, ttl=ttl))
    record = record_of(before, after, Protocol.TCP if is_tcp else Protocol.UDP)
    assert rewritten_both_ways(frame, record, next_hops, native) == packets.rewritten(frame, *after, HOP_MACS)


@pytest.mark.parametrize("check", [0x0001, 0x8000, 0xFFFE, 0xFFFF])
@pytest.mark.parametrize("port", range(1, 65536, 4099))
def test_a_udp_checksum_never_becomes_none(check: int, port: int, native: Native, next_hops: npt.NDArray[np.void]):
    frame = packets.udp_with_checksum(check)
    endpoint = (ENDPOINT[0], port)
    record = record_of((CLIENT, DNS_VIP), (CLIENT, endpoint), Protocol.UDP)
    after = rewritten_both_ways(frame, record, next_hops, native)
    assert after == packets.rewritten(frame, CLIENT, endpoint, HOP_MACS)
    assert after[40:42] != b"\0\0"


def test_a_udp_checksum_of_zero_is_sent_as_ffff(native: Native, next_hops: npt.NDArray[np.void]):
    # A source port for which the new sum is ffff, and so the checksum zero.
    frame = packets.udp()
    record = record_of((CLIENT, DNS_VIP), (CLIENT, ENDPOINT), Protocol.UDP)
    after = Ether(rewritten_both_ways(frame, record, next_hops, native))
    shift = (after[UDP].sport + after[UDP].chksum - 1) % 0xFFFF + 1
    client = (CLIENT[0], shift)
    frame = packets.udp(source=client)
    record = record_of((client, DNS_VIP), (client, ENDPOINT), Protocol.UDP)
    assert rewritten_both_ways(frame, record, next_hops, native)[40:42] == b"\xff\xff"


@pytest.mark.parametrize("make", [packets.syn, packets.udp])
def test_a_wrong_checksum_stays_wrong(make, native: Native, next_hops: npt.NDArray[np.void]):
    frame = make()
    before = tuple_of(frame)
    record = record_of(before, (CLIENT, ENDPOINT), Protocol(frame[23]))
    right = rewritten_both_ways(frame, record, next_hops, native)
    wrong = rewritten_both_ways(packets.with_wrong_checksum(frame), record, next_hops, native)
    assert wrong != right


def test_c_refuses_to_rewrite_a_frame_that_is_shorter_than_it_said(native: Native, next_hops: npt.NDArray[np.void]):
    frame = packets.syn()
    record = record_of((CLIENT, VIP), (CLIENT, ENDPOINT), Protocol.TCP)
    assert native.rewrite(bytearray(frame[:53]), 34, record.tobytes(), next_hops[1:2].tobytes()) == -1
    assert native.rewrite(bytearray(frame[:33]), 34, record.tobytes(), next_hops[1:2].tobytes()) == -1


def translated(error: bytes, record: npt.NDArray[np.void], next_hops: npt.NDArray[np.void]) -> bytes:
    frame = np.frombuffer(error, np.uint8).copy()
    l4 = np.uint32(parsed(frame, len(frame))[1][3])
    wire.translate_error(frame, 0, l4, record[0], next_hops, 1)
    return frame.tobytes()


QUOTES = [
    *(pytest.param({}, length, id=f"tcp-{length or 'whole'}") for length in (None, 28, 36)),
    pytest.param({"options": packets.options(12)}, None, id="options"),
    pytest.param({"options": packets.options(40)}, 68, id="all-options-eight-bytes"),
]


@pytest.mark.parametrize(("fields", "quoted"), QUOTES)
@pytest.mark.parametrize("kind", packets.ICMP_ERRORS)
def test_an_error_about_a_reply_reaches_the_endpoint_as_about_what_it_sent(
    fields: dict[str, object], quoted: int | None, kind: str, next_hops: npt.NDArray[np.void]
):
    """N1, N2: a router between us and the client complains to the VIP about a reply that we translated."""
    record = record_of((CLIENT, VIP), (CLIENT, ENDPOINT), Protocol.TCP)
    sent = packets.syn_ack(ENDPOINT, CLIENT, ttl=61, **fields)
    as_quoted = packets.rewritten(sent, VIP, CLIENT, b"\0" * 12)
    error = packets.icmp_error(as_quoted, kind, quoted=quoted)
    got = Ether(translated(error, record, next_hops))
    about = packets.rewritten(as_quoted, ENDPOINT, CLIENT, b"\0" * 12)
    about = about[:22] + as_quoted[22:23] + about[23:]  # the quote keeps its TTL, and its header checksum with it
    expected = Ether(packets.icmp_error(fix_ip(about), kind, source=packets.ROUTER, quoted=quoted, ttl=59))
    assert got[IP].dst == packets.host(ENDPOINT[0])
    assert bytes(got[IP]) == bytes(expected[IP])
    assert bytes(got)[:12] == HOP_MACS


def test_the_padding_of_a_frame_is_no_part_of_a_quote(next_hops: npt.NDArray[np.void]):
    record = record_of((CLIENT, VIP), (CLIENT, ENDPOINT), Protocol.TCP)
    error = packets.icmp_error(packets.syn_ack(VIP, CLIENT), quoted=28)
    padding = bytes(range(1, 17))
    assert translated(error + padding, record, next_hops) == translated(error, record, next_hops) + padding


def fix_ip(frame: bytes) -> bytes:
    """Return a frame with the IPv4 checksum that it should have."""
    packet = Ether(frame)
    del packet[IP].chksum
    return bytes(packet)


def test_an_error_about_an_unsummed_datagram_leaves_its_checksum_out(next_hops: npt.NDArray[np.void]):
    record = record_of((CLIENT, DNS_VIP), (CLIENT, ENDPOINT), Protocol.UDP)
    error = packets.icmp_error(packets.udp_unsummed(DNS_VIP, CLIENT))
    got = Ether(translated(error, record, next_hops))
    assert bytes(got[ICMP].payload)[26:28] == b"\0\0"
    check = got[ICMP].chksum
    del got[ICMP].chksum
    assert Ether(bytes(got))[ICMP].chksum == check
