"""Named packets, made by scapy: frames as `bytes`, whole and with right checksums unless the name says otherwise."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

Address = tuple[int, int]  # IPv4 address and port, host numbers

ETHERNET_BYTES = 14
CLIENT_MAC, NODE_MAC = "02:00:00:00:00:0c", "02:00:00:00:00:01"


def address(text: str) -> Address:
    """Return `10.0.0.1:80` as numbers."""
    host, _, port = text.partition(":")
    return int(IPv4Address(host)), int(port)


CLIENT = address("10.1.0.10:40000")
OTHER_CLIENT = address("10.1.0.11:40001")
VIP = address("10.96.0.1:80")
OTHER_VIP = address("10.96.0.2:80")
DNS_VIP = address("10.96.0.10:53")
ENDPOINT = address("10.2.0.20:8080")
OTHER_ENDPOINT = address("10.2.0.21:8080")
STRANGER = address("192.0.2.1:1234")
ROUTER = address("10.3.0.1:0")


def host(number: int) -> str:
    """Return an address as scapy wants it."""
    return str(IPv4Address(number))


def _ether() -> Packet:
    return Ether(dst=NODE_MAC, src=CLIENT_MAC)


def tcp_packet(source: Address, destination: Address, flags: str, payload: bytes = b"", **fields: Any) -> Packet:
    """Return a TCP packet from `source` to `destination`; `fields` are of the IPv4 header."""
    fields = {"ttl": 64, "id": 7, **fields}
    ip = IP(src=host(source[0]), dst=host(destination[0]), **fields)
    tcp = TCP(sport=source[1], dport=destination[1], flags=flags, seq=1000, ack=2000 if "A" in flags else 0)
    return _ether() / ip / tcp / Raw(payload) if payload else _ether() / ip / tcp


def udp_packet(source: Address, destination: Address, payload: bytes = b"hello", **fields: Any) -> Packet:
    """Return a UDP packet from `source` to `destination`; `fields` are of the IPv4 header."""
    fields = {"ttl": 64, "id": 7, **fields}
    ip = IP(src=host(source[0]), dst=host(destination[0]), **fields)
    return _ether() / ip / UDP(sport=source[1], dport=destination[1]) / Raw(payload)


def tcp_frame(source: Address, destination: Address, flags: str) -> bytes:
    return bytes(tcp_packet(source, destination, flags))


def udp_frame(source: Address, destination: Address, _: str = "") -> bytes:
    return bytes(udp_packet(source, destination))


def syn(source: Address = CLIENT, destination: Address = VIP, **fields: Any) -> bytes:
    return bytes(tcp_packet(source, destination, "S", **fields))


def syn_ack(source: Address = ENDPOINT, destination: Address = CLIENT, **fields: Any) -> bytes:
    return bytes(tcp_packet(source, destination, "SA", **fields))


def ack(source: Address = CLIENT, destination: Address = VIP, **fields: Any) -> bytes:
    return bytes(tcp_packet(source, destination, "A", **fields))


def data(source: Address = CLIENT, destination: Address = VIP, payload: bytes = b"GET / ", **fields: Any) -> bytes:
    return bytes(tcp_packet(source, destination, "PA", payload, **fields))


def fin(source: Address = CLIENT, destination: Address = VIP, **fields: Any) -> bytes:
    return bytes(tcp_packet(source, destination, "FA", **fields))


def rst(source: Address = CLIENT, destination: Address = VIP, **fields: Any) -> bytes:
    return bytes(tcp_packet(source, destination, "R", **fields))


def tcp_with(flags: str, source: Address = CLIENT, destination: Address = VIP) -> bytes:
    return bytes(tcp_packet(source, destination, flags))


def udp(source: Address = CLIENT, destination: Address = DNS_VIP, payload: bytes = b"hello", **fields: Any) -> bytes:
    return bytes(udp_packet(source, destination, payload, **fields))


def udp_unsummed(source: Address = CLIENT, destination: Address = DNS_VIP) -> bytes:
    """Return a UDP packet whose sender left the checksum out."""
    packet = udp_packet(source, destination)
    packet[UDP].chksum = 0
    return bytes(packet)


def udp_with_checksum(check: int, source: Address = CLIENT, destination: Address = DNS_VIP) -> bytes:
    """Return a UDP packet whose right checksum is `check`, by choice of its payload."""
    packet = udp_packet(source, destination, b"\0\0")
    have = struct.unpack("!H", bytes(packet)[-4:-2])[0]
    # The checksum is ~sum: a payload word p turns sum s into s + p, and ~(s + p) shall be `check`.
    word = ((~check & 0xFFFF) - (~have & 0xFFFF)) % 0xFFFF
    packet[Raw].load = struct.pack("!H", word)
    made = bytes(packet)
    return made[:-4] + struct.pack("!H", check) + made[-2:]


def with_wrong_checksum(frame: bytes) -> bytes:
    """Return a TCP or UDP frame whose transport checksum is off by some bits, options not counted."""
    at = ETHERNET_BYTES + (frame[ETHERNET_BYTES] & 15) * 4 + (16 if frame[ETHERNET_BYTES + 9] == 6 else 6)
    return frame[:at] + bytes([frame[at] ^ 0x55, frame[at + 1] ^ 0xAA]) + frame[at + 2 :]


def first_fragment(source: Address = CLIENT, destination: Address = DNS_VIP) -> bytes:
    return bytes(udp_packet(source, destination, bytes(64), flags="MF"))


def later_fragment(source: Address = CLIENT, destination: Address = DNS_VIP) -> bytes:
    ip = IP(src=host(source[0]), dst=host(destination[0]), frag=9, proto=17)
    return bytes(_ether() / ip / Raw(bytes(32)))


def arp() -> bytes:
    return bytes(_ether() / ARP(psrc=host(CLIENT[0]), pdst=host(VIP[0])) / Raw(bytes(18)))


def ipv6() -> bytes:
    return bytes(_ether() / IPv6(src="2001:db8::1", dst="2001:db8::2") / TCP(dport=80))


def vlan() -> bytes:
    return bytes(_ether() / Dot1Q(vlan=5) / IP(src=host(CLIENT[0]), dst=host(VIP[0])) / TCP(dport=80))


def sctp() -> bytes:
    return bytes(_ether() / IP(src=host(CLIENT[0]), dst=host(VIP[0]), proto=132) / Raw(bytes(20)))


def echo_request(destination: Address = VIP) -> bytes:
    return bytes(_ether() / IP(src=host(CLIENT[0]), dst=host(destination[0])) / ICMP(type=8) / Raw(b"ping" * 8))


ICMP_ERRORS = {
    "host-unreachable": {"type": 3, "code": 1},
    "port-unreachable": {"type": 3, "code": 3},
    "too-big": {"type": 3, "code": 4, "nexthopmtu": 1300},
    "source-quench": {"type": 4, "code": 0},
    "time-exceeded": {"type": 11, "code": 0},
    "parameter-problem": {"type": 12, "code": 0, "ptr": 8},
}


def icmp_error(
    about: bytes, kind: str = "port-unreachable", source: Address = ROUTER, quoted: int | None = None, **fields: Any
) -> bytes:
    """Return an ICMP error to the sender of the frame `about`, quoting its IPv4 packet, or `quoted` bytes of that."""
    quote = about[ETHERNET_BYTES:][:quoted]
    to = int.from_bytes(quote[12:16], "big")
    ip = IP(src=host(source[0]), dst=host(to), **{"ttl": 60, "id": 9, **fields})
    return bytes(_ether() / ip / ICMP(**ICMP_ERRORS[kind]) / Raw(quote))


def options(length: int) -> list[Any]:
    """Return IPv4 options that take `length` bytes: router alert first, then padding."""
    return [IPOption_Router_Alert(), *([b"\1"] * (length - 4))]


def rewritten(frame: bytes, source: Address, destination: Address, macs: bytes) -> bytes:
    """Return what a TCP or UDP frame is to become: scapy computes every checksum anew. Both must have been right.

    `macs` are the destination's and the source's addresses. A UDP checksum that was left out stays so.
    """
    packet = Ether(frame)
    ip, layer = packet[IP], packet[TCP] if TCP in packet else packet[UDP]
    ip.src, ip.dst, ip.ttl = host(source[0]), host(destination[0]), ip.ttl - 1
    layer.sport, layer.dport = source[1], destination[1]
    is_unsummed = UDP in packet and layer.chksum == 0
    del ip.chksum
    del layer.chksum
    if is_unsummed:
        layer.chksum = 0
    return macs + bytes(packet)[12:]


def _named() -> dict[str, bytes]:
    tcp_options = {"options": options(12)}
    return {
        "syn": syn(),
        "syn-ack": syn_ack(),
        "ack": ack(),
        "data": data(),
        "data-odd": data(payload=b"odd"),
        "data-full": data(payload=bytes(range(256)) * 5 + bytes(180)),
        "fin": fin(),
        "rst": rst(),
        "null": tcp_with(""),
        "xmas": tcp_with("FPU"),
        "syn-fin": tcp_with("SF"),
        "syn-rst": tcp_with("SR"),
        "syn-with-options": syn(**tcp_options),
        "syn-with-all-options": syn(options=options(40)),
        "syn-ttl-1": syn(ttl=1),
        "syn-ttl-255": syn(ttl=255),
        "syn-wrong-checksum": with_wrong_checksum(syn()),
        "syn-padded": syn() + bytes(6),
        "syn-to-a-stranger": syn(destination=STRANGER),
        "udp": udp(),
        "udp-odd": udp(payload=b"odd"),
        "udp-empty": udp(payload=b""),
        "udp-unsummed": udp_unsummed(),
        "udp-checksum-ffff": udp_with_checksum(0xFFFF),
        "udp-checksum-0001": udp_with_checksum(0x0001),
        "udp-checksum-fffe": udp_with_checksum(0xFFFE),
        "udp-wrong-checksum": with_wrong_checksum(udp()),
        "udp-with-options": udp(**tcp_options),
        "udp-ecn": udp(tos=0x2E << 2 | 3),
        "first-fragment": first_fragment(),
        "later-fragment": later_fragment(),
        "fragment-to-a-stranger": later_fragment(destination=STRANGER),
        "arp": arp(),
        "ipv6": ipv6(),
        "vlan": vlan(),
        "sctp": sctp(),
        "echo": echo_request(),
        # As a router on the way to the client complains: about a packet that came from the VIP.
        "error-about-a-reply": icmp_error(syn_ack(VIP), "host-unreachable"),
        "error-about-udp": icmp_error(udp(DNS_VIP, CLIENT)),
        "error-about-unsummed-udp": icmp_error(udp_unsummed(DNS_VIP, CLIENT)),
        "error-with-eight-bytes": icmp_error(syn_ack(VIP), quoted=28),
        "error-with-seven-bytes": icmp_error(syn_ack(VIP), quoted=27),
        "error-with-eight-bytes-padded": icmp_error(syn_ack(VIP), quoted=28) + bytes(range(1, 17)),
        "error-with-seven-bytes-padded": icmp_error(syn_ack(VIP), quoted=27) + bytes(8),
        "error-with-half-a-header-padded": icmp_error(syn_ack(VIP), quoted=16) + bytes(24),
        "error-about-options": icmp_error(syn_ack(VIP, **tcp_options)),
        "error-about-a-fragment": icmp_error(later_fragment(DNS_VIP, CLIENT)),
        "error-about-a-first-fragment": icmp_error(first_fragment(DNS_VIP, CLIENT)),
        "error-about-an-error": icmp_error(echo_request()),
        "error-ttl-1": icmp_error(syn_ack(VIP), ttl=1),
        **{f"error-{kind}": icmp_error(data(VIP, CLIENT), kind) for kind in ICMP_ERRORS},
    }


NAMED = _named()
