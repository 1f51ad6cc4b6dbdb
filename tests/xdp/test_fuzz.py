"""Random packets, whole and broken, through XDP, compiled code and plain Python: `make fuzz`, and a little of it here.

A seeded generator and not hypothesis: it is a hundred times faster, and a batch is short enough to be read when it
fails. A batch begins with no connection and is known by a number, which a failure tells: `make fuzz BATCHES=17:18`
runs the batch 17 again, and nothing else. What is compared is told in tests/xdp/test_twins.py.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

import numpy as np
import pytest

from tests.named_packets import NAMED
from tests.packets import (
    CLIENT,
    DNS_VIP,
    DNS_VIP6,
    ETHERNET_BYTES,
    STRANGER,
    STRANGER6,
    VIP,
    resummed,
    tagged,
    untagged,
)
from tests.reference import Key, adjusted, is_ipv6, octets_of
from tests.small_node import (
    CLIENTS,
    CLIENTS6,
    DEAF_CLIENT6,
    DEAF_VIP6,
    HAIRPIN,
    LOST_CLIENT,
    MARTIANS,
    MARTIANS6,
    MASQUERADED_VIPS,
    MID_STREAM_VIPS,
    POD_DNS_VIP6,
    POD_VIP6,
    PRIVILEGED,
    SCHEDULED_VIPS,
    SNAT_PORTS,
    STATIONS,
    STICKY_VIPS,
    TCP_VIPS,
    TCP_VIPS6,
    VLANS,
    flows_of,
)
from tests.xdp.test_twins import AGES_S, Twins, made_twins
from xdp.schema import Ping, Protocol, Reason, Verdict, verdict_of

pytestmark = [pytest.mark.root, pytest.mark.bpf]

_FRAMES = 120  # in a batch: no more connections than the tables hold
_FIRST, _END = map(int, os.environ.get("BATCHES", "0:260").split(":"))
_CLIENTS = (*CLIENTS * 5, *[HAIRPIN, (CLIENT[0], SNAT_PORTS[1] + 1)] * 5, *PRIVILEGED, LOST_CLIENT, *MARTIANS)
_VIPS = (*TCP_VIPS, *MASQUERADED_VIPS, *STICKY_VIPS, *SCHEDULED_VIPS, *MID_STREAM_VIPS, VIP, VIP, DNS_VIP, STRANGER)
_CLIENTS6 = (*CLIENTS6 * 5, DEAF_CLIENT6, *MARTIANS6)
_VIPS6 = (*TCP_VIPS6, DNS_VIP6, POD_VIP6, POD_DNS_VIP6, DEAF_VIP6, STRANGER6)
_MACS = NAMED["syn"][:12]
_LONGEST = 3000  # what a page holds beside what XDP needs
_TCP_FLAGS = (0x02, 0x02, 0x12, 0x10, 0x18, 0x11, 0x04, 0x14)  # SYN, SYN ACK, ACK, PSH ACK, FIN ACK, RST, RST ACK
_PAYLOADS = (0, 0, 1, 7, 46, 61, 100, 1447, 1500)


class Step(NamedTuple):
    """What happens to the nodes: a frame; or time, or a worker that stalls or turns."""

    frame: bytes | None = None
    seconds: float = 0


def steps_of(number: int, twins: Twins) -> Iterator[Step]:
    """Yield the steps of a batch. Those of known connections depend on what the nodes know by then."""
    random = Random(number)
    for _ in range(_FRAMES):
        chance = random.random()
        if chance < 0.02:
            yield Step(seconds=random.choice(AGES_S))
        elif chance < 0.03:
            yield Step()
        else:
            kinds = {_fresh: 4, _fresh6: 2, _echo: 1, _known: 8, _error: 2, _named: 1, _noise: 1}
            frame = random.choices(list(kinds), list(kinds.values()))[0](random, twins)
            if random.random() < 0.3:
                spoilt = _spoilt6 if is_ipv6(frame) else _spoilt
                frame = random.choice((_flipped, _cut, _padded, spoilt))(random, frame)
            if random.random() < 0.9:
                frame = resummed(frame)
            if random.random() < 0.2:
                frame = _tagged(random, frame)
            if random.random() < 0.02 and frame:
                frame = bytes((frame[0] | 1,)) + frame[1:]  # to a group
            if random.random() < 0.05 and len(frame) > 6:
                frame = _addressed(random, frame)
            yield Step(frame[:_LONGEST])


def _tagged(random: Random, frame: bytes) -> bytes:
    """Return a frame with VLAN tags, mostly of VLANs that are served, now and then cut where they are."""
    count = random.choice((1, 1, 1, 2, 2, 3))
    numbers = [random.choice((0, *VLANS, *VLANS, 1, 4095, random.randrange(4096))) for _ in range(count)]
    kinds = [random.choice((0x8100, 0x8100, 0x88A8, 0x88A8, 0x9100)) for _ in range(count)]
    made = tagged(frame, *numbers, kinds=kinds)
    return made[: random.randrange(14, 40)] if random.random() < 0.05 else made


def _addressed(random: Random, frame: bytes) -> bytes:
    """Return a frame to another of our MAC addresses, to one like it, or to anybody."""
    mac = bytearray(random.choice((*STATIONS, *STATIONS, random.randbytes(6), bytes(6))))
    if random.random() < 0.3:
        mac[random.randrange(6)] ^= 1 << random.randrange(8)
    return bytes(mac) + frame[6:]


def _checksum(random: Random) -> int:
    """Return any checksum, often one at the edges of its arithmetic. Who looks at one is IPv4, at its header's."""
    return random.choice((0, 0, 0xFFFF, 1, 0xFFFE, random.getrandbits(16), random.getrandbits(16)))


def _ip(random: Random, key: Key, body: bytes) -> bytes:
    return _ipv6(random, key, body) if key.is_ipv6 else _ipv4(random, key, body)


def _ipv6(random: Random, key: Key, body: bytes) -> bytes:
    version_class_flow = 6 << 28 | random.getrandbits(28)
    hop_limit = random.choice((64, 64, 64, 64, 64, 64, 64, 64, 255, 2, 1, 0))
    kind, body = _extended(random, key.transport, body) if random.random() < 0.2 else (key.transport, body)
    header = struct.pack("!12sHIHBB", _MACS, 0x86DD, version_class_flow, len(body), kind, hop_limit)
    return header + octets_of(key.source[0]) + octets_of(key.destination[0]) + body


def _extended(random: Random, kind: int, body: bytes) -> tuple[int, bytes]:
    """Return what an IPv6 header is to name next, and a body behind extension headers."""
    for number in range(random.choice((1, 1, 1, 2, 3, 4, 5))):
        own = random.choice((0, 43, 44, 44, 60, 60)) if number == 0 else random.choice((43, 44, 60, 60, 60))
        if own == 44:  # a fragment's: of few datagrams, so that pieces meet
            which = random.choice((0, 0, 1, 1, 1, 8, 9, 16, 17, 24, 65, 6, 0xFFF8, random.getrandbits(16)))
            header = struct.pack("!BBHI", kind, random.choice((0, 0, 3)), which, random.randrange(3))
        else:
            length = random.choice((0, 0, 0, 1, 2, 4, 14))
            routing = bytes((random.choice((0, 2, 4)), random.choice((0, 0, 0, 1))))
            header = bytes((kind, length)) + routing + random.randbytes(4 + 8 * length)
        kind, body = own, header + body
    return kind, body


def _ipv4(random: Random, key: Key, body: bytes) -> bytes:
    options = bytes(random.choice((1, 1, 1, 7, 0x94)) for _ in range(random.choice((0, 0, 0, 0, 4, 12, 40))))
    return struct.pack(
        "!12sHBBHHHBBHII",
        _MACS,
        0x0800,
        0x40 | 5 + len(options) // 4,
        random.getrandbits(8),
        20 + len(options) + len(body),
        random.getrandbits(16),
        random.choice((0, 0x4000, 0x4000, 0x8000)),
        random.choice((64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 255, 2, 1, 0)),
        key.protocol,
        _checksum(random),
        key.source[0],
        key.destination[0],
    ) + options + body  # fmt: skip


def _transport(random: Random, key: Key) -> bytes:
    ports = struct.pack("!HH", key.source[1], key.destination[1])
    payload = random.randbytes(random.choice(_PAYLOADS))
    if key.is_echo:
        kind = (128 if key.is_ipv6 else 8) if key.source[1] else (129 if key.is_ipv6 else 0)
        number = key.source[1] or key.destination[1]
        return struct.pack("!BBHHH", kind, 0, _checksum(random), number, random.getrandbits(16)) + payload
    if key.transport == Protocol.UDP:
        return ports + struct.pack("!HH", 8 + len(payload), _checksum(random)) + payload
    flags = random.choice(_TCP_FLAGS) if random.random() < 0.9 else random.getrandbits(8)
    numbers = random.getrandbits(32), random.getrandbits(32)
    return ports + struct.pack("!IIBBHHH", *numbers, 5 << 4, flags, 512, _checksum(random), 0) + payload


def _new(random: Random) -> Key:
    vip = random.choice(_VIPS)
    protocol = Protocol.UDP if vip == DNS_VIP or random.random() < 0.05 else Protocol.TCP
    return Key(random.choice(_CLIENTS), vip, protocol)


def _new6(random: Random) -> Key:
    vip = random.choice(_VIPS6)
    protocol = Protocol.UDP if vip in (DNS_VIP6, POD_DNS_VIP6) or random.random() < 0.05 else Protocol.TCP
    return Key(random.choice(_CLIENTS6), vip, protocol | Protocol.IPV6)


def _any_new(random: Random) -> Key:
    return random.choice((_new, _new6))(random)


def _fresh(random: Random, _: Twins) -> bytes:
    key = _new(random)
    return _ipv4(random, key, _transport(random, key))


def _fresh6(random: Random, _: Twins) -> bytes:
    key = _new6(random)
    return _ipv6(random, key, _transport(random, key))


def _echo(random: Random, _: Twins) -> bytes:
    """Return an echo request, or a reply that nobody has asked for."""
    clients, vips, protocol = (
        (_CLIENTS, _VIPS, Protocol.ICMP)
        if random.random() < 0.7
        else (_CLIENTS6, _VIPS6, Protocol.ICMPV6 | Protocol.IPV6)
    )
    source = random.choice(clients)[0], random.choice((1, 1, 700, 40_001, 0xFFFF, 0))
    key = Key(source, (random.choice(vips)[0], 0), protocol)
    return _ip(random, key, _transport(random, key if random.random() < 0.9 else key.turned()))


def _any_known(random: Random, twins: Twins) -> Key:
    known = list(twins.reference.flows)
    return random.choice(known) if known else Key(CLIENT, VIP, Protocol.TCP)


def _known(random: Random, twins: Twins) -> bytes:
    key = _any_known(random, twins)
    body = _transport(random, key)
    if key in twins.reference.flows and random.random() < 0.2:
        connection, way = twins.reference.flows[key]
        check = adjusted(random.choice((0, 0xFFFF, 1)), _covered(connection.after(way)), _covered(key))
        at = 2 if key.is_echo else 6 if key.transport == Protocol.UDP else 16
        body = body[:at] + struct.pack("!H", check) + body[at + 2 :]  # will be one at the edges of its arithmetic
    return _ip(random, key, body)


def _covered(key: Key) -> bytes:
    """Return what of a five-tuple a transport checksum covers and a translation may change."""
    addresses = octets_of(key.source[0]) + octets_of(key.destination[0])
    if key.is_echo and not key.is_ipv6:
        addresses = b""
    return addresses + struct.pack("!HH", key.source[1], key.destination[1])


def _error(random: Random, twins: Twins) -> bytes:
    """Return an ICMP error about a packet of a connection, known or not, that we have sent, or about anything else."""
    key = (_any_known(random, twins) if random.random() < 0.6 else _any_new(random)).turned()
    if key.is_ipv6:
        return _error6(random, key)
    quote = _ipv4(random, key, _transport(random, key))[ETHERNET_BYTES:]
    length = random.choice((20, 27, 28, 32, 48, 576, len(quote)))
    kind = random.choice((3, 3, 4, 11, 12, 5, 8, 0, random.getrandbits(8)))
    icmp = struct.pack("!BBHI", kind, random.randrange(16), _checksum(random), random.getrandbits(32))
    # From anybody, to whom the packet came from.
    way = Key(random.choice((STRANGER, key.destination)), key.source, Protocol.ICMP)
    return _ipv4(random, way, icmp + quote[:length])


def _error6(random: Random, key: Key) -> bytes:
    """Return the same of ICMPv6."""
    quote = _ipv6(random, key, _transport(random, key))[ETHERNET_BYTES:]
    kind = random.choice((1, 2, 3, 4, 128, 135, random.getrandbits(8)))
    icmp = struct.pack("!BBHI", kind, random.randrange(8), _checksum(random), random.getrandbits(32))
    way = Key(random.choice((STRANGER6, key.destination)), key.source, Protocol.ICMPV6 | Protocol.IPV6)
    return _ipv6(random, way, icmp + quote[: random.choice((40, 47, 48, 60, len(quote)))])


def _named(random: Random, _: Twins) -> bytes:
    return random.choice(list(NAMED.values()))


def _noise(random: Random, _: Twins) -> bytes:
    ethertype = random.choice((b"\x08\0", b"\x08\0", b"\x08\x06", b"\x86\xdd", random.randbytes(2)))
    return _MACS + ethertype + random.choice((b"\x45", b"\x46", b"")) + random.randbytes(random.randrange(120))


def _flipped(random: Random, frame: bytes) -> bytes:
    new = bytearray(frame)
    for _ in range(random.randrange(1, 5)):
        new[random.randrange(12, min(len(new), 90))] ^= 1 << random.randrange(8)
    return bytes(new)


def _cut(random: Random, frame: bytes) -> bytes:
    return frame[: random.randrange(min(len(frame), 120))]


def _padded(random: Random, frame: bytes) -> bytes:
    return frame + random.randbytes(random.randrange(1, 60))


def _spoilt(random: Random, frame: bytes) -> bytes:
    """Return a frame with an unlikely value in one of the fields that say how to read the rest."""
    new = bytearray(frame)
    at, values = random.choice(
        (
            (14, (0x05, 0x40, 0x44, 0x46, 0x4F, 0x55, 0x65)),  # version, header length
            (16, (0x00, 0x05, 0xFF)),
            (17, (0, 19, 20, 24, 27, 28, 39, 40, 60, 255)),  # total length
            (20, (0x20, 0x40, 0x60, 0x80, 0x1F)),
            (21, (0, 1, 0xFF)),  # fragments
            (22, (0, 1, 2, 255)),
            (23, (0, 1, 4, 6, 17, 41, 47, 50, 58, 132, 255)),  # protocol
            (42, (0x05, 0x46, 0x4F, 0x65)),  # version and header length of a quote
            (46, (0x00, 0x50, 0xF0)),  # TCP's data offset
            (47, tuple(range(64))),
        )
    )
    if at < len(new):
        new[at] = random.choice(values)
    return bytes(new)


def _spoilt6(random: Random, frame: bytes) -> bytes:
    """The same of IPv6."""
    new = bytearray(frame)
    at, values = random.choice(
        (
            (14, (0x40, 0x45, 0x50, 0x61, 0x6F, 0x70)),  # version
            (18, (0x00, 0x05, 0xFF)),
            (19, (0, 7, 8, 9, 19, 20, 21, 255)),  # payload length
            (20, (0, 1, 4, 6, 17, 41, 43, 44, 50, 51, 58, 59, 60, 132, 255)),  # next header
            (21, (0, 1, 2, 255)),
            (66, (0x00, 0x50, 0xF0)),  # TCP's data offset
            (67, tuple(range(64))),
        )
    )
    if at < len(new):
        new[at] = random.choice(values)
    return bytes(new)


def check_batch(number: int, twins: Twins) -> Counter[Reason]:
    """Take a batch through the nodes; return how often XDP gave which reason.

    The records are compared now and then, and at the end; so are the accounts.
    """
    twins.clear()
    twins.let_ping(Ping.FORWARD if number % 2 else Ping.ANSWER)
    before, sent, ends = twins.counts(), 0, Counter[Reason]()
    for index, step in enumerate(steps_of(number, twins)):
        if step.seconds:
            twins.age(step.seconds)
        elif step.frame is None:
            twins.is_stalled = not twins.is_stalled
        elif len(step.frame) < ETHERNET_BYTES:
            twins.send_alone(step.frame)  # no driver hands such a thing to XDP
        else:
            try:
                ends[twins.send(step.frame, compare=not index % 20).reason] += 1
            except AssertionError as error:
                cure = f"make fuzz BATCHES={number}:{number + 1}"
                raise AssertionError(f"{cure}\nframe {index}: {step.frame.hex()}\n{error}") from error
            sent += 1
    twins.compare_records()
    counted = twins.counts() - before
    found = Counter({Reason(int(reason)): int(counted[reason]) for reason in np.flatnonzero(counted)})
    punted = sum(count for reason, count in found.items() if verdict_of(reason) is Verdict.PUNT)
    assert found.total() == ends.total() == sent
    of_xdp = Counter({reason: count for reason, count in found.items() if verdict_of(reason) is not Verdict.PUNT})
    of_userspace = ends - of_xdp
    assert of_xdp + of_userspace == ends
    assert of_userspace.total() == punted  # what was punted met its end once
    assert all(verdict_of(reason) is not Verdict.PUNT for reason in ends)
    return found


@pytest.fixture(scope="module")
def twins() -> Iterator[Twins]:
    with made_twins(offloads=True) as made:
        yield made


def test_random_packets_become_the_same_everywhere(twins: Twins, capsys: pytest.CaptureFixture[str]):
    """Thirty thousand of them, or as many batches as BATCHES says."""
    began, seen = time.monotonic(), Counter[Reason]()
    for number in range(_FIRST, _END):
        seen += check_batch(number, twins)
    if "BATCHES" in os.environ:
        lines = [f"{seen.total()} packets in {_END - _FIRST} batches, {time.monotonic() - began:.0f} s; reasons:"]
        lines += [f"{count:9} {reason.name}" for reason, count in seen.most_common()]
        with capsys.disabled():
            sys.stdout.write("\n" + "\n".join(lines) + "\n")
    if _END - _FIRST >= 100:
        assert {Reason.FORWARDED, Reason.NEW_FLOW, Reason.ICMP_ERROR, Reason.VIP_FRAGMENT, Reason.REOPENED} <= set(seen)
        assert {Reason.ECHO_REPLY, Reason.OTHER_STATION} <= set(seen)


_WHOLE_WITHOUT_PADDING = (
    "syn-padded",
    "ipv6-syn-padded",
    "ipv6-destination-options-padded",
    "ipv6-fragment-padded",
    *(f"vlan-{tags}-syn-padded" for tags in ("5", "5-7", "5-4095")),
)  # cut by a little, it is a SYN
_STATES: dict[str, Callable[[Twins], object]] = {
    "unknown": lambda _: None,
    "known": lambda twins: [twins.send(NAMED[name]) for name in ("syn", "udp")],
}


@pytest.mark.faults(1)
@pytest.mark.parametrize("state", _STATES)
def test_a_frame_cut_anywhere_becomes_the_same_everywhere_and_nothing_is_remembered_of_half_a_header(
    twins: Twins, state: str
):
    twins.clear()
    _STATES[state](twins)
    known = len(flows_of(twins.tables))
    for name, frame in NAMED.items():
        if name in _WHOLE_WITHOUT_PADDING:
            continue
        for length in range(min(len(frame), 100)):
            if length < ETHERNET_BYTES:
                twins.send_alone(frame[:length])
                continue
            reason = twins.send(frame[:length], compare=False).reason
            inner = untagged(frame)
            end = ETHERNET_BYTES + int.from_bytes(inner[16:18])  # padding follows
            if is_ipv6(inner):
                end = ETHERNET_BYTES + 40 + int.from_bytes(inner[18:20])
            assert length >= end + len(frame) - len(inner) or verdict_of(reason) is not Verdict.FORWARD, name
    twins.compare_records()
    assert len(flows_of(twins.tables)) == known
