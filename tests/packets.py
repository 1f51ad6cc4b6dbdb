"""Named packets, made by scapy: frames as `bytes`, whole and with right checksums unless the name says otherwise."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_LSRR, IPOption_Router_Alert, IPOption_SSRR
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Packet, Raw
from scapy.utils import checksum as scapy_checksum

from xdp.schema import Protocol

Address = tuple[int, int]  # address and port, host numbers; IPv6 addresses have bit 128 set, too
IPV6 = 1 << 128

ETHERNET_BYTES = 14
CLIENT_MAC, NODE_MAC = "02:00:00:00:00:0c", "02:00:00:00:00:01"
OTHER_MAC, VIRTUAL_MAC = bytes.fromhex("02005e000109"), bytes.fromhex("02005e000105")  # no network plan has such


def address(text: str) -> Address:
    """Return `10.0.0.1:80` or `[2001:db8::1]:80` as numbers."""
    host, _, port = text.rpartition(":")
    if host.startswith("["):
        return int(IPv6Address(host[1:-1])) | IPV6, int(port)
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
CLIENT6 = address("[2001:db8:1::10]:40000")
OTHER_CLIENT6 = address("[2001:db8:1::11]:40001")
VIP6 = address("[fd00:96::1]:80")
DNS_VIP6 = address("[fd00:96::10]:53")
ENDPOINT6 = address("[2001:db8:2::20]:8080")
OTHER_ENDPOINT6 = address("[2001:db8:2::21]:8080")
ROUTER6 = address("[2001:db8:3::1]:0")
STRANGER6 = address("[2001:db8:ffff::1]:1234")


def host(number: int) -> str:
    """Return an address as scapy wants it."""
    return str(IPv6Address(number ^ IPV6) if number & IPV6 else IPv4Address(number))


def _ip(source: Address, destination: Address, fields: dict[str, Any]) -> Packet:
    """Return the header of a packet; `fields` are called as in IPv4."""
    if not source[0] & IPV6:
        return IP(src=host(source[0]), dst=host(destination[0]), **{"ttl": 64, "id": 7, **fields})
    names = {"ttl": "hlim", "tos": "tc"}
    fields = {names.get(name, name): value for name, value in fields.items()}
    return IPv6(src=host(source[0]), dst=host(destination[0]), **{"hlim": 64, **fields})


def _ether() -> Packet:
    return Ether(dst=NODE_MAC, src=CLIENT_MAC)


def tcp_packet(source: Address, destination: Address, flags: str, payload: bytes = b"", **fields: Any) -> Packet:
    """Return a TCP packet from `source` to `destination`; `fields` are of the IP header, called as in IPv4."""
    ip = _ip(source, destination, fields)
    tcp = TCP(sport=source[1], dport=destination[1], flags=flags, seq=1000, ack=2000 if "A" in flags else 0)
    return _ether() / ip / tcp / Raw(payload) if payload else _ether() / ip / tcp


def udp_packet(source: Address, destination: Address, payload: bytes = b"hello", **fields: Any) -> Packet:
    """Return a UDP packet from `source` to `destination`; `fields` likewise."""
    ip = _ip(source, destination, fields)
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
    return unsummed(bytes(udp_packet(source, destination)))


def unsummed(frame: bytes) -> bytes:
    """Return a UDP frame without options whose sender left the checksum out."""
    at = ETHERNET_BYTES + (40 if frame[12:14] == b"\x86\xdd" else 20) + 6
    return frame[:at] + bytes(2) + frame[at + 2 :]


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
    if frame[12:14] == b"\x86\xdd":
        at = ETHERNET_BYTES + 40 + (16 if frame[ETHERNET_BYTES + 6] == 6 else 6)
    return frame[:at] + bytes([frame[at] ^ 0x55, frame[at + 1] ^ 0xAA]) + frame[at + 2 :]


def resummed(frame: bytes) -> bytes:
    """Return an IPv4 frame with the right checksum in its header; any other, or one whose header is cut, as it is."""
    ip = ETHERNET_BYTES + vlan_bytes_of(frame)
    header = frame[ip : ip + (frame[ip] & 15) * 4] if ip < len(frame) else b""
    if frame[ip - 2 : ip] != b"\x08\0" or len(header) < 20 or len(header) < (header[0] & 15) * 4:
        return frame
    check = scapy_checksum(header[:10] + bytes(2) + header[12:])
    return frame[: ip + 10] + check.to_bytes(2) + frame[ip + 12 :]


def with_header_checksum(check: int, **fields: Any) -> bytes:
    """Return a SYN whose header sums up to a checksum of 0, by choice of its identification, and has this one."""
    have = int.from_bytes(syn(id=0, **fields)[24:26])
    frame = syn(id=have, **fields)
    return frame[:24] + check.to_bytes(2) + frame[26:]


def uncut(frame: bytes) -> bytes:
    """Return a frame whose packet is not to be fragmented."""
    packet = Ether(frame)
    packet[IP].flags |= 2
    del packet[IP].chksum
    return bytes(packet)


def fragment_of(frame: bytes, first: int, behind: int, number: int = 7) -> bytes:
    """Return a fragment of a frame's packet: these bytes of what follows its header."""
    if IPv6 in Ether(frame):
        whole = Ether(frame)[IPv6]
        payload = bytes(whole.payload)
        ip = IPv6(src=whole.src, dst=whole.dst, hlim=whole.hlim, tc=whole.tc, fl=whole.fl)
        header = IPv6ExtHdrFragment(nh=whole.nh, offset=first // 8, m=int(behind < len(payload)), id=number)
        return frame[:ETHERNET_BYTES] + bytes(ip / header / Raw(payload[first:behind]))
    packet = Ether(frame)[IP]
    payload = bytes(packet.payload)
    ip = IP(src=packet.src, dst=packet.dst, ttl=packet.ttl, tos=packet.tos, options=packet.options, proto=packet.proto)
    ip.id, ip.frag, ip.flags = number, first // 8, "MF" if behind < len(payload) else 0
    return frame[:ETHERNET_BYTES] + bytes(ip / Raw(payload[first:behind]))


def first_fragment(source: Address = CLIENT, destination: Address = DNS_VIP) -> bytes:
    if destination[0] & IPV6:
        return fragment6(udp(source, destination, bytes(64)))
    return bytes(udp_packet(source, destination, bytes(64), flags="MF"))


def later_fragment(source: Address = CLIENT, destination: Address = DNS_VIP) -> bytes:
    if destination[0] & IPV6:
        return fragment6(of_protocol(Protocol.UDP, source, destination, bytes(32)), 9, has_more=False)
    ip = IP(src=host(source[0]), dst=host(destination[0]), frag=9, proto=17)
    return bytes(_ether() / ip / Raw(bytes(32)))


def echo6(destination: Address = VIP6, source: Address = CLIENT6, **fields: Any) -> bytes:
    ip = IPv6(src=host(source[0]), dst=host(destination[0]), **fields)
    return bytes(_ether() / ip / ICMPv6EchoRequest(id=77, seq=5, data=b"ping"))


def behind(header: Packet, frame: bytes) -> bytes:
    """Return an IPv6 frame with an extension header, directly behind the IPv6 header."""
    whole = Ether(frame)[IPv6]
    header.nh, kind = whole.nh, header.overload_fields[IPv6]["nh"]
    ip = whole.copy()
    ip.remove_payload()
    ip.nh, ip.plen = kind, whole.plen + len(header)
    return frame[:ETHERNET_BYTES] + bytes(ip) + bytes(header) + frame[ETHERNET_BYTES + 40 :]


def hop_options(size: int = 8) -> Packet:
    """Return a header of options for every hop that is so long; those are padding."""
    return IPv6ExtHdrHopByHop(autopad=0, options=[PadN(optdata=bytes(size - 4))])


def end_options(size: int = 8) -> Packet:
    """Return a header of options for the destination."""
    return IPv6ExtHdrDestOpt(autopad=0, options=[PadN(optdata=bytes(size - 4))])


def routing(hops_left: int = 0, kind: int = 4) -> Packet:
    """Return a routing header with one address."""
    return IPv6ExtHdrRouting(type=kind, segleft=hops_left, addresses=[host(ROUTER6[0])])


def fragment6(frame: bytes, offset: int = 0, has_more: bool = True) -> bytes:
    """Return an IPv6 frame that says that its packet is a fragment; `offset` in blocks. 0 and no more: all of it."""
    return behind(IPv6ExtHdrFragment(offset=offset, m=int(has_more), id=7), frame)


def of_protocol(number: int, source: Address = CLIENT6, destination: Address = VIP6, body: bytes = bytes(24)) -> bytes:
    """Return an IPv6 frame of any protocol."""
    return bytes(_ether() / IPv6(src=host(source[0]), dst=host(destination[0]), nh=number, hlim=64) / Raw(body))


def arp() -> bytes:
    return bytes(_ether() / ARP(psrc=host(CLIENT[0]), pdst=host(VIP[0])) / Raw(bytes(18)))


def ipv6() -> bytes:
    return bytes(_ether() / IPv6(src="2001:db8::1", dst="2001:db8::2") / TCP(dport=80))


def tagged(frame: bytes, *vlans: int, kinds: Sequence[int] = ()) -> bytes:
    """Return a frame with a VLAN tag for each of `vlans`, the outer one first: of QinQ, if there are two."""
    kinds = kinds or ((0x88A8, 0x8100) if len(vlans) == 2 else (0x8100,) * len(vlans))
    tags = (struct.pack("!HH", kind, 0xA000 | number) for kind, number in zip(kinds, vlans, strict=True))
    return frame[:12] + b"".join(tags) + frame[12:]


def vlan_bytes_of(frame: bytes) -> int:
    """Return how many bytes of VLAN tags a frame has."""
    at = 12
    while frame[at : at + 2] in (b"\x81\0", b"\x88\xa8"):
        at += 4
    return at - 12


def untagged(frame: bytes) -> bytes:
    """Return a frame without its VLAN tags."""
    return frame[:12] + frame[12 + vlan_bytes_of(frame) :]


def vlan() -> bytes:
    return bytes(_ether() / Dot1Q(vlan=7) / IP(src=host(CLIENT[0]), dst=host(VIP[0])) / TCP(dport=80))


def sctp() -> bytes:
    return bytes(_ether() / IP(src=host(CLIENT[0]), dst=host(VIP[0]), proto=132) / Raw(bytes(20)))


def echo_request(
    destination: Address = VIP, source: Address = CLIENT, payload: bytes = b"ping" * 8, **fields: Any
) -> bytes:
    """Return an echo request. Its identifier is the port of its source."""
    ip, number = _ip(source, destination, fields), source[1]
    if destination[0] & IPV6:
        return bytes(_ether() / ip / ICMPv6EchoRequest(id=number, seq=5, data=payload))
    return bytes(_ether() / ip / ICMP(type=8, id=number, seq=5) / Raw(payload))


def echo_reply(source: Address, destination: Address, payload: bytes = b"ping" * 8, **fields: Any) -> bytes:
    """Return the reply to a request that `destination` has sent."""
    ip, number = _ip(source, destination, fields), destination[1]
    if destination[0] & IPV6:
        return bytes(_ether() / ip / ICMPv6EchoReply(id=number, seq=5, data=payload))
    return bytes(_ether() / ip / ICMP(type=0, id=number, seq=5) / Raw(payload))


def icmp_other(destination: Address = VIP) -> bytes:
    """Return a timestamp request."""
    return bytes(_ether() / IP(src=host(CLIENT[0]), dst=host(destination[0])) / ICMP(type=13))


def sctp_init(source: Address = CLIENT, destination: Address = VIP, **fields: Any) -> bytes:
    """Return the beginning of an SCTP association."""
    ip = IP(src=host(source[0]), dst=host(destination[0]), **fields)
    return bytes(_ether() / ip / SCTP(sport=source[1], dport=destination[1]) / SCTPChunkInit())


def gre(source: Address = CLIENT, destination: Address = VIP, **fields: Any) -> bytes:
    """Return a packet of a protocol without ports."""
    return bytes(_ether() / IP(src=host(source[0]), dst=host(destination[0]), proto=47, **fields) / Raw(bytes(24)))


def source_route(kind: str) -> list[Any]:
    """Return IPv4 options with a loose ("LSRR") or strict ("SSRR") source route, behind another option."""
    routed = {"LSRR": IPOption_LSRR, "SSRR": IPOption_SSRR}[kind](routers=["192.0.2.9"])
    return [IPOption_Router_Alert(), b"\1", routed]


ICMP_ERRORS = {
    "host-unreachable": {"type": 3, "code": 1},
    "port-unreachable": {"type": 3, "code": 3},
    "too-big": {"type": 3, "code": 4, "nexthopmtu": 1300},
    "source-quench": {"type": 4, "code": 0},
    "time-exceeded": {"type": 11, "code": 0},
    "parameter-problem": {"type": 12, "code": 0, "ptr": 8},
}


def answer_to(frame: bytes) -> Packet:
    """Return what an answer to a frame begins with: back to where it came from, as a packet of its destination's."""
    asked = Ether(frame)
    ether, ip = Ether(dst=asked.src, src=asked.dst), asked.payload
    if IPv6 in asked:
        return ether / IPv6(src=ip.dst, dst=ip.src, hlim=64)
    return ether / IP(src=ip.dst, dst=ip.src, ttl=64, id=0, flags="DF")


def reset_to(frame: bytes) -> bytes:
    """Return the RST by which a closed port answers a TCP segment (RFC 9293 section 3.10.7.1)."""
    asked, ip = Ether(frame)[TCP], Ether(frame).payload
    ports = {"sport": asked.dport, "dport": asked.sport, "window": 0}
    if asked.flags.A:
        return bytes(answer_to(frame) / TCP(**ports, flags="R", seq=asked.ack, ack=0))
    behind_header = ip.plen if IPv6 in ip else ip.len - ip.ihl * 4
    length = behind_header - asked.dataofs * 4 + int(asked.flags.S) + int(asked.flags.F)
    return bytes(answer_to(frame) / TCP(**ports, flags="RA", seq=0, ack=(asked.seq + length) % (1 << 32)))


def unreachable_to(frame: bytes, code: int = 3, source: Address | None = None, mtu: int = 0) -> bytes:
    """Return the ICMP error about a frame; code 3: no such port, 4: too long.

    It quotes the IPv4 header and eight bytes; of IPv6 what has room in the frame, and no less than the ports.
    """
    packet = answer_to(frame)
    ip, asked = packet.payload, Ether(frame).payload
    if source is not None:
        ip.src = host(source[0])
    if IPv6 in packet:
        error = ICMPv6PacketTooBig(mtu=mtu) if code == 4 else ICMPv6DestUnreach(code=4)
        quoted = min(40 + asked.plen, max(48, len(frame) - ETHERNET_BYTES - 48), 1280 - 48)
        return bytes(packet / error / Raw(frame[ETHERNET_BYTES:][:quoted]))
    ip.tos = 0xC0
    quote = frame[ETHERNET_BYTES:][: asked.ihl * 4 + 8]
    return bytes(packet / ICMP(type=3, code=code, nexthopmtu=mtu) / Raw(quote))


def echo_reply_to(frame: bytes) -> bytes:
    """Return the answer to an echo request: all else in it stays as it is."""
    packet = Ether(frame)
    packet.dst, packet.src = packet.src, packet.dst
    packet[IP].src, packet[IP].dst, packet[IP].ttl = packet[IP].dst, packet[IP].src, 64
    packet[ICMP].type = 0
    del packet[IP].chksum
    del packet[ICMP].chksum
    return bytes(packet)


def icmp_error(
    about: bytes,
    kind: str = "port-unreachable",
    source: Address | None = None,
    quoted: int | None = None,
    **fields: Any,
) -> bytes:
    """Return an ICMP error to the sender of the frame `about`, quoting its packet, or `quoted` bytes of that.

    It is from ROUTER or ROUTER6, unless somebody else is said to be its source.
    """
    ip = about[ETHERNET_BYTES:]
    quote = ip[:quoted]
    if about[12:14] == b"\x86\xdd":
        source, to = source or ROUTER6, (IPV6 | int.from_bytes(ip[8:24]), 0)
        return bytes(_ether() / _ip(source, to, {"ttl": 60, **fields}) / ICMPV6_ERRORS[kind] / Raw(quote))
    source, to = source or ROUTER, (int.from_bytes(ip[12:16]), 0)
    return bytes(_ether() / _ip(source, to, {"ttl": 60, "id": 9, **fields}) / ICMP(**ICMP_ERRORS[kind]) / Raw(quote))


ICMPV6_ERRORS = {
    "host-unreachable": ICMPv6DestUnreach(code=3),
    "port-unreachable": ICMPv6DestUnreach(code=4),
    "too-big": ICMPv6PacketTooBig(mtu=1300),
    "time-exceeded": ICMPv6TimeExceeded(),
    "parameter-problem": ICMPv6ParamProblem(ptr=6),
}


def options(length: int) -> list[Any]:
    """Return IPv4 options that take `length` bytes: router alert first, then padding."""
    return [IPOption_Router_Alert(), *([b"\1"] * (length - 4))]


def rewritten(frame: bytes, source: Address, destination: Address, macs: bytes) -> bytes:
    """Return what a TCP or UDP frame is to become: scapy computes every checksum anew. Both must have been right.

    Of an echo request the identifier becomes the port of its source, of a reply that of its destination. `macs` are the
    destination's and the source's addresses. A UDP checksum that was left out stays so.
    """
    packet = Ether(frame)
    ip, layer = packet.payload, packet.payload.payload
    ip.src, ip.dst = host(source[0]), host(destination[0])
    if IP in packet:
        ip.ttl -= 1
        del ip.chksum
    else:
        ip.hlim -= 1
    if layer.name.startswith("ICMP"):
        is_request = layer.type in (8, 128)
        layer.id = source[1] if is_request else destination[1]
        delattr(layer, "chksum" if IP in packet else "cksum")
        return macs + bytes(packet)[12:]
    layer.sport, layer.dport = source[1], destination[1]
    is_unsummed = UDP in packet and layer.chksum == 0
    del layer.chksum
    if is_unsummed:
        layer.chksum = 0
    return macs + bytes(packet)[12:]


def addresses_of(frame: bytes) -> tuple[int, int]:
    """Return source and destination of a packet."""
    ip = Ether(frame).payload
    bit = IPV6 if IPv6 in ip else 0
    return int(ip_address(ip.src)) | bit, int(ip_address(ip.dst)) | bit


def identifier_of(frame: bytes) -> int:
    """Return the identifier of an echo request, or of a reply."""
    return Ether(frame).payload.payload.id  # type: ignore[no-any-return]


def ports_of(frame: bytes) -> tuple[int, int]:
    """Return the ports of a TCP or UDP frame."""
    packet = Ether(frame)
    layer = packet[TCP] if TCP in packet else packet[UDP]
    return layer.sport, layer.dport
