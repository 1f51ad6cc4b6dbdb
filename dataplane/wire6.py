"""IPv6 packets as bytes: the compiled twin of xdp/bpf/ipv6.h, as dataplane/wire.py is that of IPv4's."""

from __future__ import annotations

import numpy as np

from dataplane.wire import (
    ECHO_ID,
    ETHERNET_BYTES,
    ICMP_BYTES,
    ICMP_CHECK,
    IPV6_BYTES,
    TCP_BYTES,
    TCP_CHECK,
    TCP_FLAGS,
    TO_KERNEL,
    UDP_BYTES,
    UDP_CHECK,
    be16,
    checksum_add,
    ports_of_echo,
    rewrite_echo,
    write_macs,
)
from xdp import naming
from xdp.byteorder import swapped16, swapped32
from xdp.jit import compiled, inlined
from xdp.schema import Extension, Limit, Protocol, Reason
from xdp.unaligned import load16, load32, load64, store16, store64

TYPE_IPV6 = 0xDD86  # 0x86dd on the wire
SRC, DST = 8, 24  # offsets in an IPv6 header
TARGET, SOLICITATION_BYTES = 8, 24  # where a question names a neighbour, and how long it is without options
_NEXT, _HOPS = 6, 7
_ICMPV6 = int(Protocol.ICMPV6)
_ECHO, ECHO_REPLY, _SOLICITATION = 128, 129, 135
_FIRST_OF_NEIGHBOURS, _LAST_OF_NEIGHBOURS = 133, 137
_FIRST_ERROR, _LAST_ERROR = 1, 4  # of those that RFC 4443 knows
_TCP, _UDP, _IPV6 = int(Protocol.TCP), int(Protocol.UDP), int(Protocol.IPV6)
_HOP_BY_HOP, _ROUTING, _DESTINATION = int(Extension.HOP_BY_HOP), int(Extension.ROUTING), int(Extension.DESTINATION)
_FRAGMENT, _NOTHING = int(Extension.FRAGMENT), 59  # "no next header"
_MORE_OR_OFFSET, _OFFSET = 0xF9FF, 0xF8FF  # 0xfff9 and 0xfff8 on the wire
_EXTENSIONS, _EXTENSION_BYTES = int(Limit.EXTENSIONS), int(Limit.EXTENSION_BYTES)
_LOOPBACK, _MAPPED = np.uint64(1 << 56), np.uint64(0xFFFF0000)  # lower halves, or the first four bytes of them


@inlined
def is_ipv6(frames, start, length):
    """Tell whether a frame says that it is IPv6."""
    return length >= ETHERNET_BYTES and load16(frames, start + 12) == TYPE_IPV6


@compiled
def _walk(frames, start, at, kind, named_at, stop):
    """Walk over extension headers, if there are any, in a packet that ends at offset `stop`.

    The first is of a kind that is named at `named_at`, and lies at `at`. Return (FORWARDED, what follows, where it is,
    where it is named, whether the sender says which way, fragment), or why they are not walked to the end. A routing
    header with hops to come says so, or one of type 0, which nobody follows any more (RFC 5095). Behind the header of a
    fragment (`fragment`: offset and whether more follow, as it lies there) there is nothing to walk over, unless it is
    the only one of its datagram (RFC 6946).
    """
    most, is_routed, fragment = at + _EXTENSION_BYTES, False, np.uint16(0)
    if kind != _HOP_BY_HOP and kind != _ROUTING and kind != _FRAGMENT and kind != _DESTINATION:
        return Reason.FORWARDED, kind, at, named_at, is_routed, fragment
    for _ in range(_EXTENSIONS):
        if at + 8 > stop:
            return Reason.TOO_SHORT, kind, at, named_at, is_routed, fragment
        if kind == _ROUTING and (frames[start + at + 2] == 0 or frames[start + at + 3] != 0):
            is_routed = True
        if kind == _FRAGMENT:
            fragment = load16(frames, start + at + 2) & np.uint16(_MORE_OR_OFFSET)
        length = np.int64(8) if kind == _FRAGMENT else (1 + np.int64(frames[start + at + 1])) * 8
        named_at, kind = at, np.int64(frames[start + at])
        at += length
        if fragment:
            break
        if at > most:
            return Reason.NOT_TCP_UDP, np.int64(_NOTHING), at, named_at, is_routed, fragment
        if kind != _ROUTING and kind != _FRAGMENT and kind != _DESTINATION:  # options for every hop come first
            break
    if at > stop:
        return Reason.TOO_SHORT, kind, at, named_at, is_routed, fragment
    return Reason.FORWARDED, kind, at, named_at, is_routed, fragment


@inlined
def _parse_icmp(frames, start, stop, packet):
    """Take the ports of an ICMPv6 error's quote, turned round; or the identifier of an echo request or its reply."""
    icmp = np.int64(packet.l4)
    quote = icmp + ICMP_BYTES
    if quote > stop:
        return Reason.TOO_SHORT
    message = frames[start + icmp]
    if message == _ECHO or message == ECHO_REPLY:
        packet.protocol = _IPV6 | _ICMPV6
        packet.ports = ports_of_echo(frames, start + icmp, message == ECHO_REPLY)
        return Reason.VIP_ECHO if message == _ECHO else Reason.ECHO_REPLY
    if message < _FIRST_ERROR or message > _LAST_ERROR:
        return Reason.OTHER_ICMP
    if quote + IPV6_BYTES > stop:
        return Reason.TOO_SHORT
    if frames[start + quote] >> 4 != 6:
        return Reason.OTHER_ICMP
    kind = np.int64(frames[start + quote + _NEXT])
    refusal, protocol, at, _, _, fragment = _walk(frames, start, quote + IPV6_BYTES, kind, quote + _NEXT, stop)
    if refusal != Reason.FORWARDED:
        return refusal if refusal == Reason.TOO_SHORT else Reason.OTHER_ICMP
    if (protocol != _TCP and protocol != _UDP and protocol != _ICMPV6) or fragment & np.uint16(_OFFSET):
        return Reason.OTHER_ICMP
    if at + 8 > stop:
        return Reason.TOO_SHORT
    message = frames[start + at]
    if protocol == _ICMPV6 and message != _ECHO and message != ECHO_REPLY:
        return Reason.OTHER_ICMP
    ports = load32(frames, start + at)
    packet.quoted = at
    packet.protocol = protocol | _IPV6
    packet.ports = ports >> np.uint32(16) | ports << np.uint32(16)
    if protocol == _ICMPV6:
        packet.ports = ports_of_echo(frames, start + at, message == _ECHO)
    return Reason.ICMP_ERROR


@inlined
def _parse_ports(frames, start, stop, protocol, whole, broken, packet):
    """Take the ports of TCP or UDP at `packet.l4`, in a packet that ends at offset `stop`.

    Return `whole`, UNSUMMED, or `broken` if the header does not fit, or it is neither.
    """
    l4 = np.int64(packet.l4)
    if protocol == _TCP:
        if l4 + TCP_BYTES > stop:
            return broken
        packet.tcp_flags = frames[start + l4 + 13] & TCP_FLAGS
    else:
        if protocol != _UDP or l4 + UDP_BYTES > stop:
            return broken
        if load16(frames, start + l4 + UDP_CHECK) == 0:
            whole = Reason.UNSUMMED
    packet.ports = load32(frames, start + l4)
    return whole


@inlined
def _parse_fragment(frames, start, stop, protocol, fragment, packet):
    """Take what a fragment says of its datagram, and ports: FLOW_FRAGMENT; VIP_FRAGMENT if it has none."""
    l4 = np.int64(packet.l4)
    field = swapped16(fragment)
    packet.fragment = swapped16(field >> 3 | (field & 1) << 13)
    packet.protocol = _IPV6 | protocol
    packet.datagram = np.uint64(packet.protocol) << np.uint64(32) | np.uint64(load32(frames, start + l4 - 4))
    packet.size = stop - l4
    if field >> 3:
        return Reason.VIP_FRAGMENT
    return _parse_ports(frames, start, stop, protocol, Reason.FLOW_FRAGMENT, Reason.VIP_FRAGMENT, packet)


@compiled
def parse(frames, start, length, packet):
    """Fill `packet`, in which `wire.parse` has set everything to zero; return FORWARDED if it is TCP or UDP, or what.

    Of an ICMP error, what it quotes, turned round. Addresses are left to `name_ends`. Every length is checked before
    the bytes behind it are read.
    """
    ip = ETHERNET_BYTES
    if ip + IPV6_BYTES > length:
        return Reason.TOO_SHORT
    if frames[start + ip] >> 4 != 6:
        return Reason.NOT_IPV4
    packet.protocol = _IPV6
    packet.ttl = frames[start + ip + _HOPS]
    stop = ip + IPV6_BYTES + be16(frames, start + ip + 4)
    if stop > length:
        return Reason.TOO_SHORT
    kind, named_at = np.int64(frames[start + ip + _NEXT]), np.int64(ip + _NEXT)
    refusal, protocol, at, named_at, is_routed, fragment = _walk(
        frames, start, np.int64(ip + IPV6_BYTES), kind, named_at, stop
    )
    packet.source_routed = is_routed
    if refusal != Reason.FORWARDED:
        return refusal
    packet.l4 = at
    if fragment:
        return _parse_fragment(frames, start, stop, protocol, fragment, packet)
    if protocol == _ICMPV6:
        return _parse_icmp(frames, start, stop, packet)
    if protocol != _TCP and protocol != _UDP:
        if protocol != _NOTHING and protocol != _ROUTING and protocol != _FRAGMENT and protocol != _DESTINATION:
            packet.unknown_at = named_at - ETHERNET_BYTES  # those were too many
        return Reason.NOT_TCP_UDP
    packet.protocol = _IPV6 | protocol
    return _parse_ports(frames, start, stop, protocol, Reason.FORWARDED, Reason.TOO_SHORT, packet)


@inlined
def is_discovery(frames, start, packet):
    """Tell whether an ICMPv6 message is between neighbours: the kernel's, whoever it is to (RFC 4861)."""
    kind = frames[start + np.int64(packet.l4)]
    return kind >= _FIRST_OF_NEIGHBOURS and kind <= _LAST_OF_NEIGHBOURS


@inlined
def is_solicitation(frames, start, length):
    """Tell whether a frame asks for the neighbour at `target_of`, and no router has sent it on (RFC 4861)."""
    ip = start + ETHERNET_BYTES
    icmp = ip + IPV6_BYTES
    if not is_ipv6(frames, start, length) or length < ETHERNET_BYTES + IPV6_BYTES + SOLICITATION_BYTES:
        return False
    if frames[ip + _NEXT] != _ICMPV6 or frames[ip + _HOPS] != 255 or be16(frames, ip + 4) < SOLICITATION_BYTES:
        return False
    return frames[icmp] == _SOLICITATION and frames[icmp + 1] == 0


@inlined
def target_of(frames, start):
    """Return whom a frame asks for, as `source_of` does."""
    target = start + ETHERNET_BYTES + IPV6_BYTES + TARGET
    return load64(frames, target), load64(frames, target + 8)


@inlined
def source_of(frames, start):
    """Return a packet's source as it lies in the header: two u64."""
    ip = start + ETHERNET_BYTES + SRC
    return load64(frames, ip), load64(frames, ip + 8)


@inlined
def is_martian(address):
    """Tell whether an address, as from `source_of`, is no host's: none, loopback, IPv4-mapped, multicast (RFC 4291)."""
    high, low = address
    if high != 0:
        return high & np.uint64(0xFF) == 0xFF
    return low == 0 or low == _LOOPBACK or low & np.uint64(0xFFFFFFFF) == _MAPPED


@inlined
def destination_of(frames, start):
    """Return a packet's destination, likewise."""
    ip = start + ETHERNET_BYTES + DST
    return load64(frames, ip), load64(frames, ip + 8)


@inlined
def _quote_of(packet, start):
    """Return where a frame would begin whose packet were the one that an ICMP error quotes."""
    return start + np.int64(packet.l4) + ICMP_BYTES - ETHERNET_BYTES


@inlined
def client_of(frames, start, packet):
    """Return whom a packet comes from or, of an ICMP error, whom what it quotes was sent to, as `source_of` does."""
    return destination_of(frames, _quote_of(packet, start)) if packet.quoted else source_of(frames, start)


@inlined
def _vip_of(frames, start, packet):
    """Return the other end."""
    return source_of(frames, _quote_of(packet, start)) if packet.quoted else destination_of(frames, start)


@inlined
def client_digest(frames, start, packet, seed):
    """Return what stands for a packet's client where all nodes are to choose alike: names differ from node to node."""
    first, second = client_of(frames, start, packet)
    return naming.hash_address(first, second, seed, ~seed)


@inlined
def pair_of(frames, start, packet, seed):
    """Return the same for both ends."""
    first, second = _vip_of(frames, start, packet)
    vip = naming.hash_address(first, second, seed, ~seed)
    return client_digest(frames, start, packet, seed) ^ (vip >> np.uint64(32) | vip << np.uint64(32))


@inlined
def is_to_sender(frames, start, packet):
    """Tell whether an ICMP error is addressed to whom it says has sent the packet that it quotes."""
    first, second = _vip_of(frames, start, packet)
    to_first, to_second = destination_of(frames, start)
    return first == to_first and second == to_second


@compiled
def name_ends(tables, frames, start, packet, is_error):
    """Change `packet`: its addresses are the names of its source and destination, 0 for what has none.

    Of an ICMP error, those of its quote turned round.
    """
    ip = _quote_of(packet, start) if is_error else start
    first, second = source_of(frames, ip)
    source = swapped32(naming.find(tables, first, second))
    first, second = destination_of(frames, ip)
    destination = swapped32(naming.find(tables, first, second))
    if is_error:
        source, destination = destination, source
    packet.addrs = np.uint64(destination) << np.uint64(32) | np.uint64(source)


@inlined
def _store_address(frames, offset, tables, word):
    name = tables.names[np.int64(swapped32(np.uint32(word)))]
    store64(frames, offset, name.addr[0])
    store64(frames, offset + 8, name.addr[1])


@compiled
def send_on(frames, start, next_hops, row):
    """Change a frame as a router does, on its way to the next hop `row`."""
    write_macs(frames, start, next_hops, row)
    frames[start + ETHERNET_BYTES + _HOPS] -= np.uint8(1)


@inlined
def _route(frames, start, tables, row):
    """The same, but for what goes to the kernel (TO_KERNEL): that stays as it is."""
    if row != TO_KERNEL:
        send_on(frames, start, tables.next_hops, row)


@compiled
def rewrite_addresses(frames, start, flow, tables, row):
    """Change a later fragment, which has neither ports nor a checksum of them, as its flow record says."""
    ip = start + ETHERNET_BYTES
    _route(frames, start, tables, row)
    _store_address(frames, ip + SRC, tables, flow.new_src_addr)
    _store_address(frames, ip + DST, tables, flow.new_dst_addr)


@compiled
def rewrite(frames, start, l4, flow, tables, row):
    """Change a frame that `parse` accepted into what its flow record says, on its way to the next hop `row`."""
    l4 = start + np.int64(l4)
    rewrite_addresses(frames, start, flow, tables, row)
    if flow.protocol == _ICMPV6 | _IPV6:
        rewrite_echo(frames, l4, flow)
        return
    store16(frames, l4, flow.new_src_port)
    store16(frames, l4 + 2, flow.new_dst_port)
    if flow.protocol == _UDP | _IPV6:
        check = checksum_add(load16(frames, l4 + UDP_CHECK), flow.l4_delta)
        store16(frames, l4 + UDP_CHECK, check or np.uint16(0xFFFF))  # never none (RFC 8200 section 8.1)
    else:
        store16(frames, l4 + TCP_CHECK, checksum_add(load16(frames, l4 + TCP_CHECK), flow.l4_delta))


@compiled
def refresh_partial(frames, start, l4, protocol, check):
    """Store in the checksum field at `check` the sum of the pseudo header, as `wire.refresh_partial` does."""
    ip = start + ETHERNET_BYTES
    total = np.int64(protocol) + be16(frames, ip + 4) - (np.int64(l4) - ETHERNET_BYTES - IPV6_BYTES)
    for offset in range(SRC, IPV6_BYTES, 2):
        total += be16(frames, ip + offset)
    total = _folded(total)
    frames[check] = np.uint8(total >> 8)
    frames[check + 1] = np.uint8(total & 0xFF)


@inlined
def _exchange(frames, offset, tables, word):
    """Store the address that a name stands for; return what the sum of 16-bit words grows by."""
    old = naming.sum_of(load64(frames, offset)) + naming.sum_of(load64(frames, offset + 8))
    _store_address(frames, offset, tables, word)
    return np.int64(2 * 0xFFFF) - np.int64(old) + np.int64(tables.names[np.int64(swapped32(np.uint32(word)))].sum)


@inlined
def _exchange16(frames, offset, value):
    """Store a 16-bit word; return what the sum grows by."""
    old = np.int64(load16(frames, offset))
    store16(frames, offset, value)
    return np.int64(0xFFFF) - old + np.int64(value)


@inlined
def _folded(total):
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@compiled
def translate_error(frames, start, packet, flow, tables, row):
    """Change an ICMPv6 error about a packet that we translated into one about the packet as it was before.

    `flow` is the record of the direction in which the error travels, as for `wire.translate_error`. ICMPv6's checksum
    covers the addresses of the packet, too (RFC 4443 section 2.3).
    """
    ip = start + ETHERNET_BYTES
    icmp = start + np.int64(packet.l4)
    quote = icmp + ICMP_BYTES
    ports = start + np.int64(packet.quoted)
    stop = ip + IPV6_BYTES + be16(frames, ip + 4)  # what follows is padding
    is_udp, is_echo = flow.protocol == _UDP | _IPV6, flow.protocol == _ICMPV6 | _IPV6
    check = ports + (ICMP_CHECK if is_echo else UDP_CHECK if is_udp else TCP_CHECK)

    grown = _exchange(frames, quote + SRC, tables, flow.new_dst_addr)
    if flow.new_src_addr != flow.src_addr:  # else it stays, and may have no name
        grown += _exchange(frames, quote + DST, tables, flow.new_src_addr)
    if is_echo:
        grown += _exchange16(frames, ports + ECHO_ID, flow.new_src_port | flow.new_dst_port)
    else:
        grown += _exchange16(frames, ports, flow.new_dst_port)
        grown += _exchange16(frames, ports + 2, flow.new_src_port)
    if check + 2 <= stop:
        after = checksum_add(load16(frames, check), _folded(grown))
        grown += _exchange16(frames, check, np.uint16(0xFFFF) if is_udp and after == 0 else after)
    if flow.new_src_addr != flow.src_addr:
        grown += _exchange(frames, ip + SRC, tables, flow.new_src_addr)
    grown += _exchange(frames, ip + DST, tables, flow.new_dst_addr)
    store16(frames, icmp + 2, checksum_add(load16(frames, icmp + 2), _folded(grown)))
    _route(frames, start, tables, row)
