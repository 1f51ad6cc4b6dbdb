"""Frames with one fault each, or one oddity: XDP, compiled code and plain Python agree on what the table here says.

What is not forwarded leaves nothing behind: no flow, no name, no affinity, no datagram. What is forwarded is compared
whole with the reference model, so that whatever nobody looks at arrives as it was sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, TypeAlias

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from conntrack import states
from tests import packets
from tests.named_packets import NAMED
from tests.packets import (
    CLIENT,
    CLIENT6,
    DNS_VIP,
    DNS_VIP6,
    ETHERNET_BYTES,
    OTHER_CLIENT,
    STRANGER,
    STRANGER6,
    VIP,
    VIP6,
    Address,
    behind,
    end_options,
    of_protocol,
    routing,
    syn,
    tcp_packet,
    udp,
)
from tests.reference import Key
from tests.small_node import STATIONS
from tests.xdp.test_twins import Twins, made_twins
from xdp.schema import Direction, Event, Limit, Protocol, Reason, State, Verdict, verdict_of

pytestmark = [pytest.mark.root, pytest.mark.bpf]

Rows: TypeAlias = dict[str, tuple[bytes, Reason]]

_IP = ETHERNET_BYTES
_TCP4, _TCP6 = _IP + 20, _IP + 40  # where the transport header begins
_SYN, _SYN6 = syn(), syn(CLIENT6, VIP6)
_UDP, _UDP6 = udp(), udp(CLIENT6, DNS_VIP6)
_TO_A_STRANGER = syn(destination=STRANGER)


@pytest.fixture(scope="module")
def shared_twins() -> Iterator[Twins]:
    with made_twins(offloads=True) as made:
        made.send(NAMED["syn"])  # what has to be compiled may take longer than a SYN is remembered
        yield made


@pytest.fixture
def twins(shared_twins: Twins) -> Twins:
    shared_twins.clear()
    return shared_twins


def patched(frame: bytes, at: int, *values: int) -> bytes:
    """Return a frame with other bytes from an offset on."""
    return frame[:at] + bytes(values) + frame[at + len(values) :]


def lengthened(frame: bytes, more: bytes) -> bytes:
    """Return a frame with more behind its payload, and a length that says so."""
    at = 18 if frame[12:14] == b"\x86\xdd" else 16
    return patched(frame, at, *(int.from_bytes(frame[at : at + 2]) + len(more)).to_bytes(2)) + more


def with_tcp_options(frame: bytes, options: bytes, payload: bytes = b"") -> bytes:
    """Return a SYN with TCP options as they are given, padded with zeros, and perhaps a payload."""
    options += bytes(-len(options) % 4)
    at = (_TCP6 if frame[12:14] == b"\x86\xdd" else _TCP4) + 12
    return lengthened(patched(frame, at, 5 + len(options) // 4 << 4), options + payload)


def of_ipv4(protocol: int, destination: Address = VIP, body: bytes = bytes(24), **fields: Any) -> bytes:
    """Return an IPv4 frame of any protocol."""
    ip = IP(src=packets.host(CLIENT[0]), dst=packets.host(destination[0]), proto=protocol, **fields)
    return NAMED["syn"][:ETHERNET_BYTES] + bytes(ip / Raw(body))


def nested(depth: int, destination: Address) -> bytes:
    """Return IPv4 in IPv4, so many times, around a SYN."""
    body = _SYN[_IP:]
    for _ in range(depth - 1):
        body = bytes(IP(src="10.0.0.1", dst="10.0.0.2", proto=4) / Raw(body))
    return of_ipv4(4, destination, body)


def chain(*kinds: int, frame: bytes = _SYN6, length: int = 0) -> bytes:
    """Return an IPv6 frame behind headers of these kinds, which all look like options of 8 (`length` + 1) bytes."""
    whole = frame[_IP + 40 :]
    last = frame[_IP + 6]
    for kind, follows in zip(reversed(kinds), [last, *reversed(kinds)], strict=False):
        del kind
        whole = bytes((follows, length, 1, 4 + 8 * length, *bytes(4 + 8 * length))) + whole
    made = patched(frame[: _IP + 40], _IP + 6, kinds[0] if kinds else last)
    return patched(made, _IP + 4, *len(whole).to_bytes(2)) + whole


def _links() -> Rows:
    macs = {"source-is-destination": _SYN[:6] * 2, "source-zero": _SYN[:6] + bytes(6)}
    types = {
        "length-of-802.3": 0x0026,
        "null": 0,
        "of-ones": 0xFFFF,
        "rarp": 0x8035,
        "mpls": 0x8847,
        "mpls-multicast": 0x8848,
        "pppoe-discovery": 0x8863,
        "pppoe": 0x8864,
        "lldp": 0x88CC,
        "loopback": 0x9000,
        "ipv4-swapped": 0x0008,
    }
    snap = bytes(patched(_SYN, 12, 0, 48)[:14]) + bytes((0xAA, 0xAA, 3, 0, 0, 0, 8, 0)) + _SYN[_IP:]
    groups = {"broadcast": b"\xff" * 6, "multicast": b"\x01\0\x5e\0\0\x01", "group-bit-alone": b"\x01" + bytes(5)}
    inside = {
        "syn": _SYN,
        "udp": _UDP,
        "syn-6": _SYN6,
        "udp-6": _UDP6,
        "echo": NAMED["echo"],
        "echo-6": NAMED["ipv6-echo"],
    }
    inside |= {"vlan": packets.tagged(_SYN, 5), "fragment": NAMED["first-fragment"], "sctp": NAMED["sctp"]}
    first, second = STATIONS[:2]
    others = {"another": packets.OTHER_MAC, "zero": bytes(6)}
    others |= {f"another-in-bit-{bit}": patched(first, bit // 8, first[bit // 8] ^ 1 << bit % 8) for bit in (1, 47)}
    others["of-two-halves"] = first[:3] + second[3:]
    not_ip = {"arp": NAMED["arp"], "vlan-of-nobody": packets.tagged(_SYN, 6), "vlans": packets.tagged(_SYN6, 5, 5, 5)}
    not_ip |= {"cut": _SYN[:40], "length-of-802.3": _SYN[:12] + bytes(46)}
    return {
        **{f"mac-{name}": (both + _SYN[12:], Reason.ADMITTED) for name, both in macs.items()},
        **{
            f"mac-{name}-{what}": (mac + frame[6:], Reason.FOR_MANY)
            for name, mac in groups.items()
            for what, frame in inside.items()
        },
        **{
            f"mac-{name}-{what}": (mac + frame[6:], Reason.OTHER_STATION)
            for name, mac in others.items()
            for what, frame in {**inside, **not_ip}.items()
        },
        **{f"mac-of-ours-{number}": (mac + _SYN[6:], Reason.ADMITTED) for number, mac in enumerate(STATIONS)},
        **{f"type-{name}": (patched(_SYN, 12, *kind.to_bytes(2)), Reason.NOT_IPV4) for name, kind in types.items()},
        "type-llc-snap": (snap, Reason.NOT_IPV4),
        "type-of-ipv6-around-ipv4": (patched(_SYN, 12, 0x86, 0xDD), Reason.NOT_IPV4),
        "type-of-ipv4-around-ipv6": (patched(_SYN6, 12, 8, 0), Reason.NOT_IPV4),
        "runt-padded-with-garbage": (_SYN + b"\xa5" * 6, Reason.ADMITTED),
        "runt-of-udp-padded-with-garbage": (udp(payload=b"") + b"\xa5" * 18, Reason.ADMITTED),
        "padded-with-a-page-of-garbage": (_SYN + b"\xa5" * 2000, Reason.TOO_BIG),
        "ipv6-padded-with-garbage": (_SYN6 + b"\xa5" * 6, Reason.ADMITTED),
    }


def _summed() -> dict[str, bytes]:
    """Return what would begin a connection, be held, answered or refused."""
    return {
        "syn": _SYN,
        "ack": packets.ack(),
        "udp": _UDP,
        "options": syn(options=packets.options(12)),
        "port-of-nobody": syn(destination=(VIP[0], 81)),
        "first-fragment": NAMED["first-fragment"],
        "later-fragment": NAMED["later-fragment"],
        "echo": NAMED["echo"],
        "echo-reply": packets.echo_reply(CLIENT, VIP),
        "error": NAMED["error-about-a-reply"],
        "timestamp-request": packets.icmp_other(),
        "sctp": packets.sctp_init(),
        "gre": packets.gre(),
    }


def _ipv4() -> Rows:
    long = packets.data(payload=bytes(30))
    short, cut, all_there = Reason.TOO_SHORT, Reason.MALFORMED, Reason.ADMITTED
    stranger = _TO_A_STRANGER
    options = {
        "nothing": b"\1" * 4,
        "end": b"\0\xff\xff\xff",
        "record-route": bytes((7, 7, 4, 0, 0, 0, 0, 0)),
        "timestamp": bytes((68, 8, 5, 0, 0, 0, 0, 0)),
        "security": bytes((130, 11, *bytes(9))),
        "unknown": bytes((0x5F, 4, 1, 2)),
        "length-0": bytes((7, 0, 0, 0)),
        "length-1": bytes((7, 1, 0, 0)),
        "length-of-255": bytes((7, 255, 0, 0)),
        "no-length-at-the-end": b"\1\1\1\7",
        "source-route-behind-the-end": bytes((0, 131, 3, 4)),
        "source-route-behind-one-of-length-0": bytes((7, 0, 131, 3)),
        "source-route-that-is-beyond": b"\1\1\1\x83",
    }
    bad_sources = ("0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.255", "224.0.0.1", "239.255.255.255")
    protocols = {**dict.fromkeys((0, 4, 41, 47, 50, 51, 58, 128, 132, 134, 136, 145, 255))}
    return {
        **{f"version-{number}": (patched(_SYN, _IP, number << 4 | 5), Reason.NOT_IPV4) for number in (0, 5, 6, 15)},
        **{f"header-of-{words}-words": (patched(_SYN, _IP, 0x40 | words), cut) for words in range(5)},
        **{f"header-of-{words}-words-to-a-stranger": (patched(stranger, _IP, 0x40 | words), short) for words in (0, 4)},
        "header-of-15-words-beyond-the-packet": (patched(_SYN, _IP, 0x4F), cut),
        "header-of-15-words-beyond-the-packet-to-a-stranger": (patched(stranger, _IP, 0x4F), short),
        "header-of-15-words-over-the-segment": (patched(long, _IP, 0x4F), cut),
        "header-of-6-words-over-the-segment": (patched(_SYN, _IP, 0x46), cut),
        **{f"option-{name}": (syn(options=[code]), all_there) for name, code in options.items()},
        "option-source-route-last": (syn(options=[b"\1" * 37, bytes((131, 3, 4))]), Reason.SOURCE_ROUTED),
        "option-source-route-without-a-length": (syn(options=[b"\1\1\x89\0"]), Reason.SOURCE_ROUTED),
        **{
            f"total-of-{total}": (patched(_SYN, 16, *total.to_bytes(2)), cut) for total in (0, 1, 19, 41, 0x100, 0xFFFF)
        },
        **{
            f"total-of-{total}-to-a-stranger": (patched(stranger, 16, *total.to_bytes(2)), short)
            for total in (0, 19, 41, 0xFFFF)
        },
        "total-of-0-to-a-group": (b"\1" + patched(_SYN, 16, 0, 0)[1:], Reason.FOR_MANY),
        "total-of-0-and-ttl-1": (patched(syn(ttl=1), 16, 0, 0), Reason.TTL_EXPIRED),
        "total-beyond-a-frame-of-a-header": (_SYN[:_TCP4], cut),
        **{f"total-of-{total}": (patched(_SYN, 16, 0, total), cut) for total in (20, 21, 39)},
        **{f"total-of-{total}-udp": (patched(_UDP, 16, *total.to_bytes(2)), cut) for total in (19, 0xFFFF)},
        **{f"total-of-{total}-udp": (patched(_UDP, 16, 0, total), cut) for total in (20, 27)},
        "total-of-39-to-a-stranger": (patched(syn(destination=STRANGER), 16, 0, 39), short),
        "total-of-28-udp": (patched(patched(_UDP, 16, 0, 28), _TCP4 + 4, 0, 8), all_there),
        "total-of-40-behind-a-payload": (patched(long, 16, 0, 40), all_there),
        **{
            f"header-checksum-wrong-{name}": (patched(frame, 24, frame[24] ^ 0x55), cut)
            for name, frame in _summed().items()
        },
        "header-checksum-wrong-in-its-last-option": (patched(syn(options=packets.options(40)), 73, 9), cut),
        "header-checksum-wrong-to-a-stranger": (patched(_TO_A_STRANGER, 24, 0), Reason.NOT_OURS),
        "header-checksum-wrong-and-ttl-1": (patched(syn(ttl=1), 24, 0), Reason.TTL_EXPIRED),
        "header-checksum-0": (patched(_SYN, 24, 0, 0), cut),
        "header-checksum-ffff": (patched(_SYN, 24, 0xFF, 0xFF), cut),
        "header-checksum-0-that-is-right": (packets.with_header_checksum(0), all_there),
        "header-checksum-ffff-that-is-as-right": (packets.with_header_checksum(0xFFFF), all_there),
        "header-checksum-1-in-its-place": (packets.with_header_checksum(1), cut),
        **{f"ttl-{ttl}": (syn(ttl=ttl), Reason.TTL_EXPIRED) for ttl in (0, 1)},
        **{f"ttl-{ttl}": (syn(ttl=ttl), all_there) for ttl in (2, 255)},
        "reserved-flag": (patched(_SYN, 20, 0x80), all_there),
        "not-to-be-cut-with-number-0": (patched(syn(id=0), 20, 0x40), all_there),
        **{f"source-{ip}": (syn((packets.address(f"{ip}:9")[0], 9)), Reason.MARTIAN_SOURCE) for ip in bad_sources},
        "source-255.255.255.255": (syn((0xFFFFFFFF, 9)), Reason.MARTIAN_SOURCE),
        "source-class-e": (syn(packets.address("240.0.0.1:9")), Reason.NO_NEXT_HOP),
        "source-nobody-knows": (syn(packets.address("192.0.2.77:9")), Reason.NO_NEXT_HOP),
        **{
            f"destination-{ip}": (syn(destination=packets.address(f"{ip}:80")), Reason.NOT_OURS)
            for ip in ("10.1.0.255", "10.1.0.0", "255.255.255.255", "224.0.0.251", "0.0.0.0", "127.0.0.1")
        },
        **{f"protocol-{number}": (of_ipv4(number), Reason.NOT_SERVED) for number in protocols},
        **{f"protocol-{number}-to-a-stranger": (of_ipv4(number, STRANGER), Reason.NOT_TCP_UDP) for number in protocols},
        **{f"protocol-{number}-without-a-body": (of_ipv4(number, body=b""), Reason.NOT_SERVED) for number in protocols},
        **{f"protocol-{number}-without-a-body": (of_ipv4(number, body=b""), cut) for number in (1, 6, 17)},
        "protocol-4-nested": (nested(16, VIP), Reason.NOT_SERVED),
        "protocol-4-nested-to-a-stranger": (nested(16, STRANGER), Reason.NOT_TCP_UDP),
    }


def _fragments() -> Rows:
    more, beyond = 0x2000, 0x1FFF
    whole = udp(payload=bytes(64))

    def piece(frame: bytes, fields: int) -> bytes:
        return patched(frame, 20, *fields.to_bytes(2))

    return {
        "fragment-not-to-be-cut": (piece(whole, 0x4000 | more), Reason.ADMITTED),
        "fragment-with-the-reserved-flag": (piece(whole, 0x8000 | more), Reason.ADMITTED),
        "fragment-of-nothing": (of_ipv4(17, DNS_VIP, b"", flags="MF"), Reason.FRAGMENT_BROKEN),
        "fragment-of-nothing-at-the-end": (of_ipv4(17, DNS_VIP, b"", frag=3), Reason.FRAGMENT_BROKEN),
        "fragment-without-flags": (of_ipv4(6, VIP, _SYN[_TCP4:][:8], flags="MF"), Reason.FRAGMENT_BROKEN),
        "fragment-over-the-flags": (of_ipv4(6, VIP, bytes(16), frag=1), Reason.FRAGMENT_BROKEN),
        "fragment-of-seven-bytes": (of_ipv4(17, DNS_VIP, bytes(7), flags="MF", frag=9), Reason.FRAGMENT_BROKEN),
        "fragment-beyond-all-datagrams": (piece(whole, beyond), Reason.FRAGMENT_BROKEN),
        "fragment-beyond-all-datagrams-with-more": (piece(whole, more | beyond), Reason.FRAGMENT_BROKEN),
        "fragment-with-a-total-of-20": (patched(piece(whole, more), 16, 0, 20), Reason.FRAGMENT_BROKEN),
        "fragment-with-a-total-beyond-the-frame": (patched(piece(whole, more), 16, 9, 0), Reason.MALFORMED),
        "fragment-of-an-error": (piece(NAMED["error-about-a-reply"], more), Reason.NOT_SERVED),
        "fragment-of-an-error-of-four-bytes": (of_ipv4(1, VIP, bytes(4), flags="MF"), Reason.NOT_SERVED),
        **{
            f"fragment-of-protocol-{number}": (of_ipv4(number, VIP, bytes(64), flags="MF"), Reason.NOT_SERVED)
            for number in (0, 4, 47, 50, 58, 134, 145, 255)
        },
        "fragment-without-flags-to-a-stranger": (
            of_ipv4(6, STRANGER, bytes(8), flags="MF"),
            Reason.OTHER_FRAGMENT,
        ),
    }


def _ipv6() -> Rows:
    short, cut, all_there, nobodys = Reason.TOO_SHORT, Reason.MALFORMED, Reason.ADMITTED, Reason.NOT_SERVED
    jumbo = bytes((6, 0, 0xC2, 4, 0, 1, 0, 0)) + _SYN6[_TCP6:]
    fragment = bytes((6, 0, 0, 0, 0, 0, 0, 7))
    bad_sources = ("::", "::1", "ff02::1", "ff0e::1", "::ffff:10.1.0.10")
    return {
        **{f"ipv6-version-{number}": (patched(_SYN6, _IP, number << 4), Reason.NOT_IPV4) for number in (0, 4, 5, 7)},
        **{f"ipv6-payload-of-{length}": (patched(_SYN6, 18, *length.to_bytes(2)), cut) for length in (21, 0xFFFF)},
        "ipv6-payload-of-21-to-a-stranger": (patched(syn(CLIENT6, STRANGER6), 18, 0, 21), short),
        "ipv6-payload-of-21-to-a-group": (b"\1" + patched(_SYN6, 18, 0, 21)[1:], Reason.FOR_MANY),
        "ipv6-payload-beyond-a-frame-of-a-header": (_SYN6[:_TCP6], cut),
        **{f"ipv6-payload-of-{length}": (patched(_SYN6, 18, 0, length), cut) for length in (0, 1, 19)},
        "ipv6-payload-of-14-udp": (patched(_UDP6, 18, 0, 14), cut),
        **{f"ipv6-payload-of-{length}-udp": (patched(_UDP6, 18, 0, length), cut) for length in (0, 7)},
        "ipv6-payload-of-19-to-a-stranger": (patched(syn(CLIENT6, STRANGER6), 18, 0, 19), short),
        "ipv6-payload-of-8-udp": (patched(patched(_UDP6, 18, 0, 8), _TCP6 + 4, 0, 8), all_there),
        "ipv6-jumbogram": (patched(of_protocol(0, body=jumbo), 18, 0, 0), cut),
        "ipv6-jumbogram-with-a-length": (of_protocol(0, body=jumbo), all_there),
        **{f"ipv6-hop-limit-{ttl}": (syn(CLIENT6, VIP6, ttl=ttl), Reason.TTL_EXPIRED) for ttl in (0, 1)},
        "ipv6-hop-limit-255": (syn(CLIENT6, VIP6, ttl=255), all_there),
        **{f"ipv6-source-{ip}": (syn(packets.address(f"[{ip}]:9"), VIP6), Reason.MARTIAN_SOURCE) for ip in bad_sources},
        "ipv6-source-link-local": (syn(packets.address("[fe80::1]:9"), VIP6), Reason.NO_NEXT_HOP),
        "ipv6-source-nobody-knows": (syn(packets.address("[2001:db8:77::1]:9"), VIP6), Reason.NO_NEXT_HOP),
        **{
            f"ipv6-destination-{ip}": (syn(CLIENT6, packets.address(f"[{ip}]:80")), Reason.NOT_OURS)
            for ip in ("::", "::1", "ff02::1", "::ffff:10.96.0.1")
        },
        **{f"ipv6-protocol-{number}": (of_protocol(number), nobodys) for number in (1, 2, 47, 135, 139, 140, 253, 254)},
        **{
            f"ipv6-protocol-{number}-to-a-stranger": (of_protocol(number, destination=STRANGER6), Reason.NOT_TCP_UDP)
            for number in (1, 2, 47, 51, 135, 253)
        },
        **{f"ipv6-{count}-options": (chain(*[60] * count), nobodys) for count in (5, 8, 50)},
        **{
            f"ipv6-{count}-options-to-a-stranger": (
                chain(*[60] * count, frame=syn(CLIENT6, STRANGER6)),
                Reason.NOT_TCP_UDP,
            )
            for count in (5, 50)
        },
        "ipv6-four-options": (chain(60, 60, 60, 60), all_there),
        "ipv6-hop-by-hop-twice": (chain(0, 0), nobodys),
        "ipv6-hop-by-hop-last": (chain(60, 0), nobodys),
        "ipv6-wrong-order": (behind(end_options(), behind(routing(), behind(end_options(), _SYN6))), all_there),
        "ipv6-authentication-behind-options": (chain(60, 51), nobodys),
        "ipv6-authentication-before-options": (chain(51, 60), nobodys),
        "ipv6-encrypted-behind-options": (chain(60, 50), nobodys),
        "ipv6-mobility-behind-options": (chain(60, 135), nobodys),
        "ipv6-nothing-behind-options": (chain(60, 59), nobodys),
        "ipv6-experiment-behind-options": (chain(60, 253), nobodys),
        "ipv6-options-beyond-the-packet": (patched(chain(60), _TCP6 + 1, 255), nobodys),
        "ipv6-options-just-beyond-the-packet": (patched(chain(60), _TCP6 + 1, 4), cut),
        "ipv6-options-over-the-segment": (patched(chain(60), _TCP6 + 1, 1), cut),
        "ipv6-options-over-all": (patched(of_protocol(60, body=bytes(24)), _TCP6, 6, 2), cut),
        "ipv6-options-to-nowhere": (of_protocol(60, body=bytes(7)), cut),
        "ipv6-options-of-length-0-and-1": (
            chain(60)[: _TCP6 + 2] + bytes((5, 0, 6, 1, 1, 1)) + _SYN6[_TCP6:],
            all_there,
        ),
        "ipv6-routing-beyond-the-packet": (patched(behind(routing(), _SYN6), _TCP6 + 1, 9), cut),
        **{f"ipv6-routing-of-type-{kind}": (behind(routing(0, kind), _SYN6), all_there) for kind in (2, 3, 4, 253)},
        "ipv6-fragments-within-fragments": (
            of_protocol(44, body=(bytes((44,)) + fragment[1:]) + fragment + _SYN6[_TCP6:]),
            all_there,
        ),
        "ipv6-fragment-of-nothing": (
            of_protocol(44, destination=DNS_VIP6, body=bytes((17, 0, 0, 1, 0, 0, 0, 7))),
            Reason.FRAGMENT_BROKEN,
        ),
        "ipv6-fragment-of-seven-bytes": (
            of_protocol(44, destination=DNS_VIP6, body=bytes((17, 0, 0, 0x49, 0, 0, 0, 7)) + bytes(7)),
            Reason.FRAGMENT_BROKEN,
        ),
        "ipv6-fragment-header-cut": (of_protocol(44, body=fragment[:7]), cut),
        "ipv6-fragment-of-options-without-a-transport": (
            of_protocol(44, body=bytes((60, 0, 0, 1, 0, 0, 0, 7)) + bytes(16)),
            nobodys,
        ),
    }


def _tcp() -> Rows:
    there, cut = Reason.ADMITTED, Reason.MALFORMED
    options = {
        "length-0": bytes((2, 0, 0, 0)),
        "length-1": bytes((2, 1, 0, 0)),
        "beyond": bytes((8, 40, 0, 0)),
        "no-length-at-the-end": b"\1\1\1\2",
        "40-bytes": bytes((254, 40, *range(38))),
        "mss-0": bytes((2, 4, 0, 0)),
        "mss-twice": bytes((2, 4, 5, 0xB4, 2, 4, 2, 0)),
        "window-scale-15": bytes((3, 3, 15)),
        "md5": bytes((19, 18, *range(16))),
        "authentication": bytes((29, 16, *range(14))),
        "sack-of-nothing": bytes((5, 2)),
    }
    ports = {"port-0": (0, 80), "port-65535": (65535, 80), "port-of-the-vip": (80, 80)}
    return {
        **{f"tcp-offset-{words}": (patched(_SYN, _TCP4 + 12, words << 4), cut) for words in (0, 1, 4, 6, 15)},
        **{f"ipv6-tcp-offset-{words}": (patched(_SYN6, _TCP6 + 12, words << 4), cut) for words in (0, 4, 15)},
        **{f"tcp-option-{name}": (with_tcp_options(_SYN, code), there) for name, code in options.items()},
        **{f"ipv6-tcp-option-{name}": (with_tcp_options(_SYN6, code), there) for name, code in options.items()},
        "tcp-fast-open": (with_tcp_options(_SYN, bytes((34, 10, *range(8))), b"GET / HTTP/1.1"), there),
        "tcp-reserved-bits": (patched(_SYN, _TCP4 + 12, 0x5F), there),
        "tcp-ecn": (bytes(tcp_packet(CLIENT, VIP, "SEC")), there),
        "tcp-window-0": (patched(_SYN, _TCP4 + 14, 0, 0), there),
        "tcp-urgent-without-the-flag": (patched(_SYN, _TCP4 + 18, 0xFF, 0xFF), there),
        **{f"tcp-source-{name}": (syn((CLIENT[0], source)), there) for name, (source, _) in ports.items()},
        **{f"ipv6-tcp-source-{name}": (syn((CLIENT6[0], source), VIP6), there) for name, (source, _) in ports.items()},
        **{f"tcp-to-port-{port}": (syn(destination=(VIP[0], port)), Reason.NOT_SERVED) for port in (0, 65535)},
        **{f"ipv6-tcp-to-port-{port}": (syn(CLIENT6, (VIP6[0], port)), Reason.NOT_SERVED) for port in (0, 65535)},
        "tcp-land": (syn(VIP, VIP), Reason.NO_NEXT_HOP),
        "ipv6-tcp-land": (syn(VIP6, VIP6), Reason.NO_NEXT_HOP),
        "tcp-from-another-vip": (syn(DNS_VIP, VIP), Reason.NO_NEXT_HOP),
        "tcp-checksum-0": (patched(_SYN, _TCP4 + 16, 0, 0), there),
        "tcp-checksum-ffff": (patched(_SYN, _TCP4 + 16, 0xFF, 0xFF), there),
    }


def _udp() -> Rows:
    there, cut = Reason.ADMITTED, Reason.MALFORMED
    lengths = {**dict.fromkeys((8, 12, 13), there), **dict.fromkeys((0, 1, 7, 14, 0xFFFF), cut)}
    return {
        **{f"udp-length-{size}": (patched(_UDP, _TCP4 + 4, *size.to_bytes(2)), what) for size, what in lengths.items()},
        **{
            f"ipv6-udp-length-{size}": (patched(_UDP6, _TCP6 + 4, *size.to_bytes(2)), what)
            for size, what in lengths.items()
        },
        **{f"udp-from-port-{port}": (udp((CLIENT[0], port)), there) for port in (0, 53, 65535)},
        **{f"udp-to-port-{port}": (udp(destination=(DNS_VIP[0], port)), Reason.NOT_SERVED) for port in (0, 54, 65535)},
        "udp-land": (udp(DNS_VIP, DNS_VIP), Reason.NO_NEXT_HOP),
        "ipv6-udp-land": (udp(DNS_VIP6, DNS_VIP6), Reason.NO_NEXT_HOP),
        "ipv6-udp-checksum-0": (patched(_UDP6, _TCP6 + 6, 0, 0), Reason.UNSUMMED),
    }


# With one fault each: what is patched has the right header checksum, unless it is about that.
FRAMES: Rows = {
    name: (frame if name.startswith("header-checksum-") else packets.resummed(frame), reason)
    for name, (frame, reason) in {**_links(), **_ipv4(), **_fragments(), **_ipv6(), **_tcp(), **_udp()}.items()
}
# The fault that a frame is about (docs/faults.md), by what its name begins with.
FAULTS: dict[int, tuple[str, ...]] = {
    2: ("runt-", "ipv6-padded-"),
    3: ("padded-with-a-page",),
    6: ("mac-broadcast-", "mac-multicast-", "mac-another-", "mac-of-two-halves-", "mac-zero-", "mac-of-ours-"),
    7: ("type-",),
    10: ("mac-source-",),
    11: ("version-",),
    12: tuple(f"header-of-{words}-words" for words in range(5)),
    13: ("header-of-15-words-",),
    14: ("option-",),
    15: ("total-of-0", "total-of-19", "total-of-39", "total-of-65535", "total-of-27-udp", "total-beyond-"),
    16: ("total-of-28-udp", "total-of-40-behind"),
    17: ("header-checksum-",),
    18: ("ttl-",),
    19: ("reserved-flag", "fragment-with-the-reserved-flag"),
    20: ("fragment-not-to-be-cut",),
    21: ("source-", "tcp-land", "tcp-from-another-vip", "udp-land"),
    22: ("destination-",),
    23: ("protocol-",),
    25: ("not-to-be-cut-with-number-0",),
    31: ("fragment-without-flags", "fragment-over-the-flags"),
    33: ("fragment-beyond-all-datagrams",),
    34: ("fragment-of-seven-bytes",),
    35: ("fragment-of-nothing", "ipv6-fragment-of-nothing", "fragment-with-a-total-of-20"),
    37: ("fragment-of-an-error",),
    41: ("ipv6-payload-of-", "ipv6-jumbogram"),
    42: tuple(f"ipv6-{kind}" for kind in ("protocol-", "8-", "50-", "four-", "hop-by-hop-", "wrong-order",
                                          "authentication-", "encrypted-", "mobility-", "nothing-", "experiment-",
                                          "routing-of-type-", "5-")),
    43: ("ipv6-options-beyond", "ipv6-options-just", "ipv6-options-over", "ipv6-options-to", "ipv6-routing-beyond"),
    44: ("ipv6-fragments-within-fragments", "ipv6-fragment-of-options-without-a-transport"),
    45: ("ipv6-hop-limit-",),
    46: ("ipv6-source-",),
    48: ("ipv6-udp-checksum-0",),
    51: ("tcp-offset-", "ipv6-tcp-offset-"),
    53: ("tcp-source-", "ipv6-tcp-source-", "tcp-to-port-", "ipv6-tcp-to-port-"),
    54: ("tcp-fast-open", "tcp-option-md5", "tcp-option-authentication"),
    55: ("tcp-option-", "ipv6-tcp-option-"),
    64: ("tcp-window-0", "tcp-urgent-"),
    66: ("tcp-checksum-",),
    67: ("tcp-ecn", "tcp-reserved-bits"),
    68: ("udp-length-", "ipv6-udp-length-"),
    70: ("udp-from-port-", "udp-to-port-"),
}  # fmt: skip


@pytest.mark.faults(2, 3, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 25, 31, 33, 34, 35, 37)
@pytest.mark.faults(41, 42, 43, 44, 45, 46, 48)
@pytest.mark.faults(51, 53, 54, 55, 64, 66, 67, 68, 70)
@pytest.mark.parametrize("name", FRAMES)
def test_one_fault_or_oddity_in_a_frame(name: str, twins: Twins):
    frame, reason = FRAMES[name]
    nothing = twins.remembered()
    sent = twins.send(frame)
    assert sent.reason == reason
    if verdict_of(reason) == Verdict.FORWARD:
        assert twins.send(frame).reason in (Reason.FORWARDED, Reason.FRAGMENT_AGAIN)
    else:
        assert twins.remembered() == nothing
        assert sent.frame == frame or verdict_of(reason) == Verdict.DROP  # who is refused may be told
    twins.leave(frame)
    twins.clear()
    twins.is_stalled = True
    if verdict_of(twins.send(frame).reason) != Verdict.FORWARD:
        assert twins.remembered()[0] == nothing[0]  # the other one does not stall


def test_every_fault_that_is_said_to_be_in_a_frame_is():
    marks = test_one_fault_or_oddity_in_a_frame.pytestmark  # type: ignore[attr-defined]
    assert {number for mark in marks if mark.name == "faults" for number in mark.args} == FAULTS.keys()
    for beginnings in FAULTS.values():
        for beginning in beginnings:
            assert any(name.startswith(beginning) for name in FRAMES), beginning


# Of a connection that is known, one goes its way as it came, and its next hop is the judge.
_KNOWN_AND_DAMAGED = [f"header-checksum-{what}" for what in (
    "wrong-syn", "wrong-ack", "wrong-udp", "wrong-options", "wrong-first-fragment",
    "wrong-error", "wrong-in-its-last-option", "0", "ffff", "1-in-its-place")]  # fmt: skip


def test_no_fault_in_a_frame_disturbs_connections_that_are_known(twins: Twins):
    for first in ("syn", "udp", "ipv6-syn", "ipv6-udp"):
        assert twins.send(NAMED[first]).reason == Reason.ADMITTED
    for name, (frame, reason) in FRAMES.items():
        before = twins.remembered()
        sent = twins.send(frame, compare=False)
        goes_its_way = name.startswith((*FAULTS[51], *FAULTS[68])) or name in _KNOWN_AND_DAMAGED
        if goes_its_way:
            assert sent.reason == Reason.FORWARDED, name
        elif verdict_of(reason) != Verdict.FORWARD:
            assert (sent.reason, twins.remembered()) == (reason, before), name
    twins.compare_records()
    for known in ("ack", "udp", "ipv6-ack", "ipv6-udp"):
        assert twins.send(NAMED[known]).reason == Reason.FORWARDED


@pytest.mark.faults(6)
@pytest.mark.parametrize("count", [1, 2, int(Limit.STATIONS)])
def test_as_many_stations_as_there_is_room_for_are_ours_and_no_others(count: int, twins: Twins):
    there = [bytes((2, 0, 0x5E, 2, number, 9)) for number in range(count)]
    twins.hear(there)
    for mac in there:
        assert twins.send(mac + _SYN[6:]).reason in (Reason.ADMITTED, Reason.FORWARDED)
    for mac in (bytes((2, 0, 0x5E, 2, count, 9)), bytes(6), _SYN[:6]):
        assert twins.send(mac + _SYN[6:]).reason == Reason.OTHER_STATION


@pytest.mark.faults(6)
def test_where_no_stations_are_told_all_are_ours(twins: Twins):
    twins.hear(())
    for mac in (packets.OTHER_MAC, bytes(6), _SYN[:6]):
        assert twins.send(mac + _SYN[6:]).reason in (Reason.ADMITTED, Reason.FORWARDED)
    assert twins.send(b"\1" + _SYN[1:]).reason == Reason.FOR_MANY


_TCP_STATES = [state for state in states.TIMEOUT_S if State.FREE < state < State.UDP_UNREPLIED or state == State.RESET]


@pytest.mark.faults(52)
@pytest.mark.parametrize("way", states.BOTH, ids=["of-the-client", "of-the-endpoint"])
@pytest.mark.parametrize("state", _TCP_STATES, ids=lambda state: state.name.lower())
def test_C4_C13_any_flags_in_any_state(state: State, way: Direction, twins: Twins):
    """Those that no stack sends change nothing, and go their connection's way; one that was reset refuses all."""
    assert twins.send(_SYN).reason == Reason.ADMITTED
    key = Key(CLIENT, VIP, Protocol.TCP)
    reply = twins.reference.flows[key][0].translated.turned()
    ends = (CLIENT, VIP) if way == Direction.ORIGINAL else reply[:2]
    frame, records = bytes(tcp_packet(*ends, "")), twins.remembered()
    for flags in range(64):
        twins.put(key, state)
        begins_anew = way == Direction.ORIGINAL and state in states.REOPENS and states.event_of(flags) == Event.SYN
        sent = twins.send(patched(frame, _TCP4 + 13, flags))
        became = twins.reference.flows[key][0].state
        if begins_anew:
            assert (sent.reason, became) == (Reason.ADMITTED, State.SYN_SENT)
        elif state == State.RESET:
            assert (sent.reason, became) == (Reason.ENDPOINT_REMOVED, state)
        else:
            assert sent.reason == Reason.FORWARDED
            assert became == state or states.event_of(flags) != Event.INVALID
        assert twins.remembered() == records


@pytest.mark.faults(24)
@pytest.mark.parametrize("family", [4, 6])
def test_N8_every_value_of_tos_is_kept(family: int, twins: Twins):
    for tos in range(256):
        ends = (CLIENT, VIP) if family == 4 else (CLIENT6, VIP6)
        sent = Ether(twins.send(packets.data(*ends, tos=tos), compare=False).frame)
        assert (sent[IP].tos if family == 4 else sent[IPv6].tc) == tos
    twins.compare_records()


def test_F047_another_flow_label_is_the_same_connection(twins: Twins):
    first = twins.send(syn(CLIENT6, VIP6, fl=0x12345))
    assert first.reason == Reason.ADMITTED
    endpoint = packets.addresses_of(first.frame)[1]
    for label in (0, 0x54321, 0xFFFFF):
        sent = twins.send(packets.data(CLIENT6, VIP6, fl=label))
        assert (sent.reason, packets.addresses_of(sent.frame)[1]) == (Reason.FORWARDED, endpoint)
        assert Ether(sent.frame)[IPv6].fl == label


def _errors_about_a_known_packet(twins: Twins, family: int) -> tuple[bytes, int]:
    """Establish a connection; return an ICMP error about an answer to the client, and where its type is."""
    first, vip, client = (_SYN, VIP, CLIENT) if family == 4 else (_SYN6, VIP6, CLIENT6)
    assert twins.send(first).reason == Reason.ADMITTED
    return packets.icmp_error(packets.data(vip, client, bytes(32))), _TCP4 if family == 4 else _TCP6


@pytest.mark.faults(74, 77)
@pytest.mark.parametrize("family", [4, 6])
def test_N1_an_icmp_message_of_any_type_and_code_is_an_error_an_echo_or_nobodys(family: int, twins: Twins):
    error, at = _errors_about_a_known_packet(twins, family)
    errors, echo = ((3, 4, 11, 12), 8) if family == 4 else ((1, 2, 3, 4), 128)
    neighbours = () if family == 4 else range(133, 138)  # neighbour discovery is the kernel's
    records = twins.remembered()
    for kind, code in itertools.chain(((kind, kind % 7) for kind in range(256)), itertools.product(errors, range(16))):
        other = Reason.OTHER_ICMP if kind in neighbours else Reason.NOT_SERVED
        expected = Reason.FORWARDED if kind in errors else other
        sent = twins.send(patched(error, at, kind, code), compare=False)
        assert sent.reason == (Reason.ECHO_ANSWERED if kind == echo else expected), (kind, code)
        if kind in errors:
            assert sent.frame[at : at + 2] == bytes((kind, code))
    assert twins.remembered() == records
    twins.compare_records()


@pytest.mark.parametrize("family", [4, 6])
def test_N1_an_error_that_quotes_too_little_is_nobodys(family: int, twins: Twins):
    first, vip, client = (_SYN, VIP, CLIENT) if family == 4 else (_SYN6, VIP6, CLIENT6)
    assert twins.send(first).reason == Reason.ADMITTED
    least = 28 if family == 4 else 48  # an IP header, and eight bytes (RFC 792)
    for quoted in range(least + 13):
        error = packets.icmp_error(packets.data(vip, client), quoted=quoted)
        for frame in (error, error + bytes(60)):  # padding is no part of it
            expected = Reason.FORWARDED if quoted >= least else Reason.MALFORMED
            assert twins.send(frame).reason == expected, quoted


@pytest.mark.faults(49, 75)
def test_N2_whatever_path_mtu_an_error_tells_reaches_the_endpoint(twins: Twins):
    for family, mtus in ((4, (0, 1, 67, 68, 1500, 0xFFFF)), (6, (0, 1, 1279, 1280, 0xFFFFFFFF))):
        error, at = _errors_about_a_known_packet(twins, family)
        kind = (3, 4) if family == 4 else (2, 0)
        for mtu in mtus:
            sent = twins.send(patched(patched(error, at, *kind), at + 4, *mtu.to_bytes(4)))
            assert (sent.reason, sent.frame[at + 4 : at + 8]) == (Reason.FORWARDED, mtu.to_bytes(4))


_ICMP4: dict[str, tuple[bytes, Reason]] = {
    "about-an-echo-request": (packets.icmp_error(packets.echo_request(CLIENT, VIP)), Reason.NOT_SERVED),
    "about-another-protocol": (packets.icmp_error(packets.gre(VIP, CLIENT)), Reason.NOT_SERVED),
    "about-a-stranger-s-packet": (packets.icmp_error(packets.data((VIP[0], 81), OTHER_CLIENT)), Reason.NOT_SERVED),
    "about-options": (packets.icmp_error(packets.data(VIP, CLIENT, options=packets.options(40))), Reason.FORWARDED),
    "about-options-that-are-cut": (
        packets.icmp_error(packets.data(VIP, CLIENT, options=packets.options(40)), quoted=48), Reason.MALFORMED),
    "about-a-header-of-4-words": (patched(packets.icmp_error(packets.data(VIP, CLIENT)), 42, 0x44), Reason.NOT_SERVED),
    "about-version-6": (patched(packets.icmp_error(packets.data(VIP, CLIENT)), 42, 0x65), Reason.NOT_SERVED),
    "about-a-first-fragment": (packets.icmp_error(patched(packets.data(VIP, CLIENT), 20, 0x20)), Reason.FORWARDED),
    "about-a-stale-checksum": (packets.icmp_error(packets.with_wrong_checksum(packets.data(VIP, CLIENT))),
                               Reason.FORWARDED),
    "within-an-error": (packets.icmp_error(packets.icmp_error(packets.data(VIP, CLIENT), source=VIP)),
                        Reason.NOT_SERVED),
    "with-extensions": (lengthened(packets.icmp_error(packets.data(VIP, CLIENT, bytes(88))),
                                   bytes((0x20, 0, 0, 0, 0, 8, 1, 1, 0, 0, 0x10, 1))), Reason.FORWARDED),
    "of-seven-bytes": (of_ipv4(1, VIP, bytes((3, 1, 0, 0, 0, 0, 0))), Reason.MALFORMED),
    "redirect": (patched(packets.icmp_error(packets.data(VIP, CLIENT)), _TCP4, 5, 1), Reason.NOT_SERVED),
    "timestamp-request": (packets.icmp_other(), Reason.NOT_SERVED),
    "address-mask-request": (of_ipv4(1, VIP, bytes((17, 0, *bytes(10)))), Reason.NOT_SERVED),
    "router-advertisement": (of_ipv4(1, VIP, bytes((9, 0, *bytes(14)))), Reason.NOT_SERVED),
}  # fmt: skip


@pytest.mark.faults(74, 76, 77)
@pytest.mark.parametrize("name", _ICMP4)
def test_N1_errors_are_about_what_they_quote_or_nobodys(name: str, twins: Twins):
    frame, reason = _ICMP4[name]
    assert twins.send(_SYN).reason == Reason.ADMITTED
    records = twins.remembered()
    assert twins.send(frame).reason == reason
    assert twins.remembered() == records
