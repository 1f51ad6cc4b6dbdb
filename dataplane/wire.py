"""The only userspace code that sees bytes: parse, rewrite, and the translation of ICMP errors.

`parse` and `rewrite` are the compiled twins of xdp/bpf/parse.h and rewrite.h: the same guards in the same order. A
frame is `frames[start : start + length]` of one u8 array; addresses, ports and checksums are numbers as they lie in
memory.
"""

from __future__ import annotations

import numpy as np

from xdp.jit import compiled, inlined
from xdp.schema import Limit, Protocol, Reason
from xdp.unaligned import load16, load32, load64, store16, store32

ETHERNET_BYTES = 14
IPV4_BYTES = 20
IPV6_BYTES = 40
TCP_BYTES = 20
UDP_BYTES = 8
ICMP_BYTES = 8
ARP_BYTES = 28

# What `parse` finds, beside the twin of struct packet. `l4` is the offset of the transport header from the frame's
# start, `length` the frame's own, `next_hop` the row that it was to leave by. Of a fragment, `fragment` is the offset
# and whether more follow, as IPv4 has them on the wire, `ends` stands for both addresses, `datagram` for protocol and
# identification, and `size` is how many bytes of the datagram it has; else they are 0. Of IPv6 (wire6.py), `quoted` is
# the offset of the transport header that an error quotes, and `unknown_at` where a protocol is named that nobody here
# knows, from the header's start; else 0. The VLAN tags, as they lie in the frame, and their bytes are
# dataplane.vlans'.
PACKET = np.dtype(
    [
        ("addrs", "u8"),
        ("ends", "u8"),
        ("datagram", "u8"),
        ("ports", "u4"),
        ("l4", "u4"),
        ("size", "u4"),
        ("quoted", "u4"),
        ("length", "u4"),
        ("next_hop", "u4"),
        ("outer_tag", "u4"),
        ("inner_tag", "u4"),
        ("fragment", "u2"),
        ("protocol", "u1"),
        ("ttl", "u1"),
        ("tcp_flags", "u1"),
        ("source_routed", "u1"),
        ("unknown_at", "u1"),
        ("vlan_bytes", "u1"),
    ],
    align=True,
)

_STATIONS, _STATION_BITS = int(Limit.STATIONS), (1 << 48) - 1  # the six bytes that a frame begins with
_TYPE_IPV4 = 0x0008  # 0x0800 on the wire
TYPE_ARP = 0x0608
_ARP_REQUEST = 0x0100_0406_0008_0100  # Ethernet, IPv4, lengths 6 and 4, request: the first eight bytes
_ARP_REPLY = 0x0200
_MORE_OR_OFFSET = 0xFF3F  # 0x3fff on the wire
OFFSET = 0xFF1F  # 0x1fff on the wire
TCP_FLAGS = 0x3F
TO_KERNEL = 0  # the row that is no next hop
_TCP, _UDP, _ICMP = int(Protocol.TCP), int(Protocol.UDP), int(Protocol.ICMP)
_IPV6 = int(Protocol.IPV6)
ECHO_REPLY, _UNREACHABLE, _QUENCH, _ECHO, _TIME_EXCEEDED, _PARAMETER = 0, 3, 4, 8, 11, 12
_OPTION_END, _OPTION_NONE, _OPTION_LSRR, _OPTION_SSRR = 0, 1, 131, 137
_IP_CHECK, _SRC, _DST = 10, 12, 16  # offsets in an IPv4 header
_TTL = 8
TCP_CHECK, UDP_CHECK, ICMP_CHECK = 16, 6, 2
ECHO_ID = 4  # offset of the identifier


@inlined
def be16(frames, offset):
    """Return two bytes as a number, the first one highest."""
    return np.int64(frames[offset]) << 8 | np.int64(frames[offset + 1])


@inlined
def _fold(total):
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


@inlined
def checksum_add(check, delta):
    """Return the checksum after the covered words grew by `delta` (RFC 1624 equation 3). A wrong one stays wrong."""
    return np.uint16(~_fold((np.int64(~np.uint16(check)) & 0xFFFF) + np.int64(delta)))


@compiled
def _has_source_route(frames, start, stop):
    """Tell whether the options of a header that ends at offset `stop` say which way the packet is to take (RFC 791)."""
    at = ETHERNET_BYTES + IPV4_BYTES
    while at + 1 < stop:  # a source route is three bytes at least
        option = frames[start + at]
        if option == _OPTION_LSRR or option == _OPTION_SSRR:
            return True
        size = np.int64(1) if option == _OPTION_NONE else np.int64(frames[start + at + 1])
        if option == _OPTION_END or (option != _OPTION_NONE and size < 2):
            return False
        at += size
    return False


@inlined
def is_for_many(frames, start):
    """Tell whether a frame is addressed to a group of hosts, all of them maybe."""
    return frames[start] & 1 != 0


@inlined
def is_station(frames, start, stations):
    """Tell whether a frame is addressed to one of `stations` (u64 as it lies in a frame), which may be all zero."""
    station, is_one = load64(frames, start) & np.uint64(_STATION_BITS), False
    for n in range(_STATIONS):
        is_one |= station == stations[n]
    return is_one


@inlined
def is_for_another(frames, start, length, stations):
    """Tell whether a frame is addressed to another machine: by the MAC address of one host, and none of ours."""
    if length < ETHERNET_BYTES or is_station(frames, start, stations):
        return False
    return stations[0] != 0 and not is_for_many(frames, start)


@inlined
def is_echo(frames, offset):
    """Tell whether an ICMP message is an echo request, or its reply."""
    return frames[offset] == _ECHO or frames[offset] == ECHO_REPLY


@inlined
def ports_of_echo(frames, offset, is_reply):
    """Return the ports that the identifier of an echo request, or its reply, stands for: who is asked has port 0."""
    number = np.uint32(load16(frames, offset + ECHO_ID))
    return number << np.uint32(16) if is_reply else number


@inlined
def _parse_icmp(frames, start, stop, packet):
    """Take the five-tuple of an ICMP error's quote, turned round; or the identifier of an echo request or its reply.

    At offset `stop` the packet ends.
    """
    icmp = np.int64(packet.l4)
    ip = icmp + ICMP_BYTES
    if ip > stop:
        return Reason.TOO_SHORT
    kind = frames[start + icmp]
    if is_echo(frames, start + icmp):
        packet.ports = ports_of_echo(frames, start + icmp, kind == ECHO_REPLY)
        return Reason.VIP_ECHO if kind == _ECHO else Reason.ECHO_REPLY
    if kind != _UNREACHABLE and kind != _TIME_EXCEEDED and kind != _PARAMETER and kind != _QUENCH:
        return Reason.OTHER_ICMP
    if ip + IPV4_BYTES > stop:
        return Reason.TOO_SHORT
    first = np.int64(frames[start + ip])
    header = (first & 15) * 4
    if first >> 4 != 4 or header < IPV4_BYTES:
        return Reason.OTHER_ICMP
    protocol = frames[start + ip + 9]
    if protocol != _TCP and protocol != _UDP and protocol != _ICMP:
        return Reason.OTHER_ICMP
    if load16(frames, start + ip + 6) & OFFSET:
        return Reason.OTHER_ICMP
    l4 = start + ip + header
    if ip + header + 8 > stop:
        return Reason.TOO_SHORT
    if protocol == _ICMP and not is_echo(frames, l4):
        return Reason.OTHER_ICMP
    addrs = load64(frames, start + ip + _SRC)
    ports = load32(frames, l4)
    packet.addrs = addrs >> np.uint64(32) | addrs << np.uint64(32)
    packet.ports = ports >> np.uint32(16) | ports << np.uint32(16)
    if protocol == _ICMP:
        packet.ports = ports_of_echo(frames, l4, frames[l4] == _ECHO)
    packet.protocol = protocol
    return Reason.ICMP_ERROR


@compiled
def _parse_fragment(frames, start, fragment, length, packet):
    """Take the ports of a fragment that has them, the first of TCP or UDP: FLOW_FRAGMENT; VIP_FRAGMENT without them.

    `length` bytes follow the IPv4 header.
    """
    l4 = start + np.int64(packet.l4)
    packet.fragment = fragment
    packet.ends = packet.addrs
    packet.size = length
    packet.datagram = np.uint64(packet.protocol) << np.uint64(16) | np.uint64(
        load16(frames, start + ETHERNET_BYTES + 4)
    )
    if fragment & OFFSET:
        return Reason.VIP_FRAGMENT
    if packet.protocol == _TCP and length >= TCP_BYTES:
        packet.tcp_flags = frames[l4 + 13] & TCP_FLAGS
    elif packet.protocol != _UDP or length < UDP_BYTES:
        return Reason.VIP_FRAGMENT
    packet.ports = load32(frames, l4)
    return Reason.FLOW_FRAGMENT


@inlined
def parse(frames, start, length, packet):
    """Fill `packet` (a PACKET record); return FORWARDED if the frame is TCP or UDP, else the reason it ends for.

    Of a fragment but a first one, of another protocol, or where lengths cannot be, the addresses only; of an echo
    request or its reply, the ports that its identifier stands for; of an ICMP error, what it quotes, turned round.
    Every length is checked before the bytes behind it are read.
    """
    packet.addrs = 0
    packet.ports = 0
    packet.l4 = 0
    packet.protocol = 0
    packet.ttl = 0
    packet.tcp_flags = 0
    packet.ends = 0
    packet.datagram = 0
    packet.size = 0
    packet.quoted = 0
    packet.fragment = 0
    packet.length = length
    packet.source_routed = 0
    packet.unknown_at = 0
    ip = ETHERNET_BYTES
    if ip + IPV4_BYTES > length:
        if ip <= length and load16(frames, start + 12) != _TYPE_IPV4:
            return Reason.NOT_IPV4
        return Reason.TOO_SHORT
    if load16(frames, start + 12) != _TYPE_IPV4:
        return Reason.NOT_IPV4
    first = np.int64(frames[start + ip])
    if first >> 4 != 4:
        return Reason.NOT_IPV4
    protocol = frames[start + ip + 9]  # these have their places, whatever is said of lengths
    packet.addrs = load64(frames, start + ip + _SRC)
    packet.protocol = protocol
    packet.ttl = frames[start + ip + _TTL]
    header = (first & 15) * 4
    total = be16(frames, start + ip + 2)
    if header < IPV4_BYTES or total < header:
        return Reason.TOO_SHORT
    if ip + total > length:
        return Reason.TOO_SHORT
    packet.l4 = ip + header
    if header > IPV4_BYTES:
        packet.source_routed = _has_source_route(frames, start, ip + header)
    fragment = load16(frames, start + ip + 6) & _MORE_OR_OFFSET
    if fragment:
        return _parse_fragment(frames, start, fragment, total - header, packet)
    l4 = ip + header
    if protocol == _TCP:
        if total < header + TCP_BYTES or l4 + TCP_BYTES > length:
            return Reason.TOO_SHORT
        packet.tcp_flags = frames[start + l4 + 13] & TCP_FLAGS
    elif protocol == _UDP:
        if total < header + UDP_BYTES or l4 + UDP_BYTES > length:
            return Reason.TOO_SHORT
    elif protocol == _ICMP:
        return _parse_icmp(frames, start, ip + total, packet)
    else:
        return Reason.NOT_TCP_UDP
    packet.ports = load32(frames, start + l4)
    return Reason.FORWARDED


@inlined
def has_sound_lengths(frames, start, packet):
    """Tell whether the TCP or UDP header of a packet of either family says lengths that can be (RFC 9293, RFC 768)."""
    ip, l4 = start + ETHERNET_BYTES, np.int64(packet.l4)
    is_ipv6 = packet.protocol & np.uint8(_IPV6)
    total = IPV6_BYTES + be16(frames, ip + 4) if is_ipv6 else be16(frames, ip + 2)
    room = ETHERNET_BYTES + total - l4
    if packet.protocol & ~np.uint8(_IPV6) == _UDP:
        length = be16(frames, start + l4 + 4)
        return length >= UDP_BYTES and length <= room
    length = np.int64(frames[start + l4 + 12] >> 4) * 4
    return length >= TCP_BYTES and length <= room


@inlined
def has_sound_checksum(frames, start, packet):
    """Tell whether the checksum of an IPv4 header is right: with it all words sum up to 0xffff (RFC 1071)."""
    total = np.int64(0)
    for offset in range(ETHERNET_BYTES, np.int64(packet.l4), 2):
        total += np.int64(load16(frames, start + offset))
    return _fold(total) == 0xFFFF


@compiled
def has_bare_checksum(frames, start, packet):
    """Tell whether the checksum of a TCP or UDP packet is its pseudo header's alone: a device was to finish it.

    So a kernel leaves it for the device that sends. Of finished ones, one in 65536 is the same by chance.
    """
    ip, l4 = start + ETHERNET_BYTES, np.int64(packet.l4)
    is_ipv6 = packet.protocol & np.uint8(_IPV6)
    protocol = packet.protocol & ~np.uint8(_IPV6)
    end = ip + IPV6_BYTES if is_ipv6 else ip + _DST + 4
    begin = end - 32 if is_ipv6 else ip + _SRC
    length = (IPV6_BYTES + be16(frames, ip + 4) if is_ipv6 else be16(frames, ip + 2)) + ETHERNET_BYTES - l4
    total = np.int64(protocol) + length
    for offset in range(begin, end, 2):
        total += be16(frames, offset)
    return _fold(total) == be16(frames, start + l4 + (TCP_CHECK if protocol == _TCP else UDP_CHECK))


@inlined
def write_macs(frames, start, next_hops, row):
    """Change the Ethernet addresses of a frame to those of a next hop."""
    words = next_hops[row]
    for i in range(6):
        frames[start + i] = words.dst_mac[i]
        frames[start + 6 + i] = words.src_mac[i]


@compiled
def rewrite_addresses(frames, start, flow, next_hops, row):
    """Change a later fragment, which has neither ports nor a checksum of them, as its flow record says.

    With row TO_KERNEL it stays as it is for the kernel to route: MAC addresses, and TTL, which the flow's delta counts.
    """
    ip = start + ETHERNET_BYTES
    delta = np.int64(flow.ip_delta)
    if row == TO_KERNEL:
        delta = _fold(delta + 1)
    else:
        write_macs(frames, start, next_hops, row)
        frames[ip + _TTL] -= np.uint8(1)
    store32(frames, ip + _SRC, flow.new_src_addr)
    store32(frames, ip + _DST, flow.new_dst_addr)
    store16(frames, ip + _IP_CHECK, checksum_add(load16(frames, ip + _IP_CHECK), delta))


@inlined
def rewrite(frames, start, l4, flow, next_hops, row):
    """Change a frame that `parse` accepted into what its flow record says, on its way to the next hop `row`.

    Or to the kernel (TO_KERNEL): see `rewrite_addresses`.
    """
    ports = start + np.int64(l4)
    rewrite_addresses(frames, start, flow, next_hops, row)
    if flow.protocol == _ICMP:
        rewrite_echo(frames, ports, flow)
        return
    store16(frames, ports, flow.new_src_port)
    store16(frames, ports + 2, flow.new_dst_port)
    if flow.protocol == _UDP:
        check = load16(frames, ports + UDP_CHECK)
        if check:  # none stays none, and a sum of zero is sent as 0xffff (RFC 768)
            check = checksum_add(check, flow.l4_delta)
            store16(frames, ports + UDP_CHECK, check or np.uint16(0xFFFF))
    else:
        store16(frames, ports + TCP_CHECK, checksum_add(load16(frames, ports + TCP_CHECK), flow.l4_delta))


@compiled
def rewrite_echo(frames, icmp, flow):
    """Change the identifier of an echo request, or its reply, at offset `icmp`, and the checksum, of either family."""
    store16(frames, icmp + ECHO_ID, flow.new_src_port | flow.new_dst_port)  # one of them is 0
    store16(frames, icmp + ICMP_CHECK, checksum_add(load16(frames, icmp + ICMP_CHECK), flow.l4_delta))


@compiled
def send_on(frames, start, next_hops, row):
    """Change a frame that is not translated as a router does, on its way to the next hop `row`."""
    ip = start + ETHERNET_BYTES
    write_macs(frames, start, next_hops, row)
    store16(frames, ip + _IP_CHECK, checksum_add(load16(frames, ip + _IP_CHECK), 0xFFFE))
    frames[ip + _TTL] -= np.uint8(1)


@compiled
def refresh_partial(frames, start, l4, check):
    """Store in the checksum field at `check` what a device expects to find when it is to finish it.

    That is the sum of the pseudo header alone (addresses, protocol, length), not complemented; `l4` is the offset of
    the transport header.
    """
    ip = start + ETHERNET_BYTES
    total = be16(frames, ip + 2) - (np.int64(l4) - ETHERNET_BYTES) + np.int64(frames[ip + 9])
    for offset in range(_SRC, _SRC + 8, 2):
        total += be16(frames, ip + offset)
    total = _fold(total)
    frames[check] = np.uint8(total >> 8)
    frames[check + 1] = np.uint8(total & 0xFF)


@inlined
def grown(check, old, new):
    """Return a checksum after one covered 16-bit word became another (RFC 1624 equation 3)."""
    return checksum_add(check, _fold((np.int64(~np.uint16(old)) & 0xFFFF) + np.int64(np.uint16(new))))


@inlined
def _replace16(frames, offset, value, check_offset):
    """Store a 16-bit word and update the checksum that covers it."""
    old = load16(frames, offset)
    store16(frames, check_offset, grown(load16(frames, check_offset), old, value))
    store16(frames, offset, value)


@inlined
def _turn_echo_back(frames, icmp, flow, check):
    """Turn the identifier back of an echo request, or its reply, that an error quotes; the checksum at `check` follows.

    In the error's own the identifier and its checksum cancel out, unless that was wrong: it is to stay so.
    """
    before = load16(frames, icmp + ICMP_CHECK)
    number, after = load16(frames, icmp + ECHO_ID), flow.new_src_port | flow.new_dst_port
    store16(frames, icmp + ICMP_CHECK, grown(before, number, after))
    store16(frames, check, grown(load16(frames, check), before, load16(frames, icmp + ICMP_CHECK)))
    _replace16(frames, icmp + ECHO_ID, after, check)


@inlined
def _turn_ports_back(frames, quoted_l4, stop, flow, old_src, old_dst, check):
    """Turn ports back that an error quotes, and a checksum if it is there; the checksum at `check` follows."""
    old_ports = load32(frames, quoted_l4)
    l4_check = quoted_l4 + (UDP_CHECK if flow.protocol == _UDP else TCP_CHECK)
    if l4_check + 2 <= stop:
        before = load16(frames, l4_check)
        if before or flow.protocol == _TCP:
            after = before
            for shift in range(0, 32, 16):
                s = np.uint32(shift)
                after = grown(after, np.uint16(old_src >> s), np.uint16(np.uint32(flow.new_dst_addr) >> s))
                after = grown(after, np.uint16(old_dst >> s), np.uint16(np.uint32(flow.new_src_addr) >> s))
            after = grown(after, np.uint16(old_ports), flow.new_dst_port)
            after = grown(after, np.uint16(old_ports >> np.uint32(16)), flow.new_src_port)
            if flow.protocol == _UDP and after == 0:
                after = np.uint16(0xFFFF)
            store16(frames, l4_check, after)
            store16(frames, check, grown(load16(frames, check), before, after))
    _replace16(frames, quoted_l4, flow.new_dst_port, check)
    _replace16(frames, quoted_l4 + 2, flow.new_src_port, check)


@inlined
def is_to_sender(frames, start, packet):
    """Tell whether an ICMP error is addressed to whom it says has sent the packet that it quotes."""
    return load32(frames, start + ETHERNET_BYTES + _DST) == np.uint32(packet.addrs >> np.uint64(32))


@compiled
def translate_error(frames, start, l4, flow, next_hops, row):
    """Change an ICMP error about a packet that we translated into one about the packet as it was before.

    `flow` is the record of the direction in which the error travels: its destination changes as that of the flow's own
    packets does, its source only where theirs does too (as Linux does it). The quote is turned back: addresses, ports,
    its IPv4 checksum, and the L4 checksum as far as it was quoted. RFC 5508 section 4.2, RFC 792. Row 0: as `rewrite`.
    """
    ip = start + ETHERNET_BYTES
    icmp = start + np.int64(l4)
    quote = icmp + ICMP_BYTES
    quoted_l4 = quote + (np.int64(frames[quote]) & 15) * 4
    check = icmp + ICMP_CHECK
    stop = ip + be16(frames, ip + 2)  # what follows is padding

    # An address and its checksum cancel out in the ICMP checksum, but a wrong one must stay wrong.
    old_src, old_dst = load32(frames, quote + _SRC), load32(frames, quote + _DST)
    for offset, old, new in ((_SRC, old_src, flow.new_dst_addr), (_DST, old_dst, flow.new_src_addr)):
        if old != new:
            for half in range(2):
                shift = np.uint32(16 * half)
                was, word = np.uint16(old >> shift), np.uint16(np.uint32(new) >> shift)
                header = load16(frames, quote + _IP_CHECK)
                became = grown(header, was, word)
                store16(frames, quote + _IP_CHECK, became)
                store16(frames, quote + offset + 2 * half, word)
                store16(frames, check, grown(grown(load16(frames, check), was, word), header, became))

    # The quoted ports, and the quoted checksum if it is there. It covers the addresses too: the reply's own delta.
    if flow.protocol == _ICMP:
        _turn_echo_back(frames, quoted_l4, flow, check)
    else:
        _turn_ports_back(frames, quoted_l4, stop, flow, old_src, old_dst, check)

    # The outer header: destination always, source where the flow's packets change theirs; TTL as for every packet.
    outer = load16(frames, ip + _IP_CHECK)
    old_src, old_dst = load32(frames, ip + _SRC), load32(frames, ip + _DST)
    new_src = flow.new_src_addr if flow.new_src_addr != flow.src_addr else old_src
    for old, new in ((old_src, new_src), (old_dst, flow.new_dst_addr)):
        for half in range(2):
            shift = np.uint32(16 * half)
            outer = grown(outer, np.uint16(old >> shift), np.uint16(np.uint32(new) >> shift))
    store32(frames, ip + _SRC, new_src)
    store32(frames, ip + _DST, flow.new_dst_addr)
    if row == TO_KERNEL:
        store16(frames, ip + _IP_CHECK, outer)
    else:
        store16(frames, ip + _IP_CHECK, checksum_add(outer, 0xFFFE))
        frames[ip + _TTL] -= np.uint8(1)
        write_macs(frames, start, next_hops, row)


@compiled
def parse_arp(frames, start, length):
    """Return the address that an ARP request for IPv4 asks for, as on the wire; 0 if it is none. Its twin is in C."""
    if length < ETHERNET_BYTES + ARP_BYTES or load16(frames, start + 12) != TYPE_ARP:
        return np.uint32(0)
    arp = start + ETHERNET_BYTES
    if load64(frames, arp) != _ARP_REQUEST:
        return np.uint32(0)
    return load32(frames, arp + 24)


@compiled
def answer_arp(frames, start, mac):
    """Turn an ARP request round where it lies: what it asks for is at `mac` (six bytes, the first one lowest)."""
    arp = start + ETHERNET_BYTES
    asked = load32(frames, arp + 24)
    store_mac(frames, start, load32(frames, arp + 8), load16(frames, arp + 12))
    store_mac(frames, start + 6, np.uint32(mac), np.uint16(mac >> np.uint64(32)))
    store16(frames, arp + 6, _ARP_REPLY)
    for offset in range(0, 10, 2):  # the sender, MAC and address, becomes the target
        store16(frames, arp + 18 + offset, load16(frames, arp + 8 + offset))
    store_mac(frames, arp + 8, np.uint32(mac), np.uint16(mac >> np.uint64(32)))
    store32(frames, arp + 14, asked)


@inlined
def store_mac(frames, offset, first, last):
    """Store a MAC address: its first four bytes and its last two, as they lie in memory."""
    store32(frames, offset, first)
    store16(frames, offset + 4, last)
