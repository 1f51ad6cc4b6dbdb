"""What the node itself says to an IPv6 packet: dataplane/answers.py's sister, with the same rules and limits.

RFC 4443 (sections 2.4, 3 and 4), RFC 9293 section 3.10.7.1.
"""

from __future__ import annotations

import numpy as np

from conntrack import compiled as flows
from conntrack.states import RST
from dataplane import fragments, vlans
from dataplane.answers import (
    is_refusal,
    replace_byte,
    store_be16,
    store_be32,
    store_checksum,
    sum_of,
    turn_macs,
    write_reset,
)
from dataplane.limits import ECHOES, REFUSALS, may_answer
from dataplane.wire import ETHERNET_BYTES, ICMP_BYTES, IPV6_BYTES, TCP_BYTES, be16, store_mac
from dataplane.wire6 import (
    DST,
    ECHO_REPLY,
    SOLICITATION_BYTES,
    SRC,
    TARGET,
    destination_of,
    is_martian,
    source_of,
    target_of,
)
from xdp.byteorder import swapped16, swapped32
from xdp.jit import compiled, inlined
from xdp.schema import Direction, Protocol, Reason
from xdp.unaligned import store16, store64

_NOWHERE = 0
_REPLY = int(Direction.REPLY)
_TCP, _UDP, _ICMPV6 = int(Protocol.TCP), int(Protocol.UDP), int(Protocol.ICMPV6)
_IPV6 = int(Protocol.IPV6)
_UNREACHABLE, _PORT, _TOO_LONG, _PARAMETER, _PROTOCOL = 1, 4, 2, 4, 1
_HOP_LIMIT, _OF_NEIGHBOURS = 64, 255
_ADVERTISEMENT, _SOLICITED, _OVERRIDE = 136, 0x40, 0x20
_LINK_OPTION = 0x0102  # the target's address on the link, eight bytes long
_ALL_NODES = np.uint64(0x02FF), np.uint64(1 << 56)  # ff02::1
_ALL_NODES_MAC = np.uint32(0x3333), np.uint16(0x0100)
_MOST_QUOTED = 1280 - IPV6_BYTES - ICMP_BYTES  # RFC 4443 section 2.4 (c)


@inlined
def _has_a_sender(frames, start):
    """Tell whether a packet was sent by one host: nothing else is ever answered."""
    first, second = source_of(frames, start)
    to_first, to_second = destination_of(frames, start)
    is_from_many = frames[start + 6] & 1
    return not is_from_many and not is_martian(source_of(frames, start)) and (first != to_first or second != to_second)


@inlined
def _network_of(frames, start):
    """Return the /64 of who is to be answered, for limits."""
    return source_of(frames, start)[0]


@inlined
def _write_ip(frames, ip, length, protocol, source, destination):
    """Write the header of a packet with `length` bytes behind it; addresses are pairs as from `source_of`."""
    store_be32(frames, ip, 6 << 28)
    store_be16(frames, ip + 4, length)
    frames[ip + 6] = protocol
    frames[ip + 7] = _HOP_LIMIT
    store64(frames, ip + SRC, source[0])
    store64(frames, ip + SRC + 8, source[1])
    store64(frames, ip + DST, destination[0])
    store64(frames, ip + DST + 8, destination[1])


@inlined
def _finish(frames, start, length, protocol, check, packet):
    """Store the checksum of a packet with `length` bytes behind its header, and so how long its frame is."""
    ip = start + ETHERNET_BYTES
    pseudo = sum_of(frames, ip + SRC, ip + IPV6_BYTES) + np.int64(swapped16(length)) + (protocol << 8)
    store16(frames, check, np.uint16(0))
    store_checksum(frames, check, pseudo + sum_of(frames, ip + IPV6_BYTES, ip + IPV6_BYTES + length))
    packet.length = ETHERNET_BYTES + IPV6_BYTES + length


@compiled
def _reset(frames, start, packet):
    """Change a TCP segment, no RST, into the RST that a closed port answers it with."""
    ip = start + ETHERNET_BYTES
    tcp, asked = ip + IPV6_BYTES, start + np.int64(packet.l4)
    client, vip = source_of(frames, start), destination_of(frames, start)
    write_reset(frames, tcp, asked, tcp + be16(frames, ip + 4) - asked, packet)
    _write_ip(frames, ip, TCP_BYTES, _TCP, vip, client)
    _finish(frames, start, TCP_BYTES, _TCP, tcp + 16, packet)
    turn_macs(frames, start)


@compiled
def _error(frames, start, packet, kind, code, rest, source):
    """Change a packet into the ICMPv6 error that says that it does not arrive; it quotes as much as has room there.

    At least to the ports, by which the sender knows its socket, or to what is not understood. `rest` is what its kind
    says more: how long a packet may be, or where that is.
    """
    ip = start + ETHERNET_BYTES
    icmp = ip + IPV6_BYTES
    quote = icmp + ICMP_BYTES
    least = max(np.int64(packet.l4) - ETHERNET_BYTES + 8, np.int64(packet.unknown_at) + 1)
    room = max(least, np.int64(packet.length) - (quote - start))
    quoted = min(IPV6_BYTES + be16(frames, ip + 4), room, _MOST_QUOTED)
    destination = source_of(frames, start)
    for offset in range(quoted - 1, -1, -1):
        frames[quote + offset] = frames[ip + offset]
    frames[icmp] = kind
    frames[icmp + 1] = code
    store_be32(frames, icmp + 4, rest)
    _write_ip(frames, ip, ICMP_BYTES + quoted, _ICMPV6, source, destination)
    _finish(frames, start, ICMP_BYTES + quoted, _ICMPV6, icmp + 2, packet)
    turn_macs(frames, start)


@inlined
def _complainant(node, frames, start, reason):
    """Return who says that a packet does not arrive: whom it was sent to or, where that is a client, the node."""
    tables, packet = node.tables, node.packet[0]
    if reason == Reason.TOO_BIG:
        slot = flows.find(tables, packet.addrs, packet.ports, packet.protocol)
        if slot != flows.MISS and tables.flows[slot].direction == _REPLY:
            there = tables.flows[np.int64(tables.flows[slot].peer)].next_hop
            own = tables.next_hops[np.int64(there)].source
            if own:
                addr = tables.names[np.int64(swapped32(own))].addr
                return addr[0], addr[1]
    return destination_of(frames, start)


@compiled
def refuse(node, frames, start, reason, now):
    """Tell the sender of a packet that it is dropped, if it is to be told, as `answers.refuse` does."""
    packet = node.packet[0]
    nowhere = np.uint32(_NOWHERE)
    if packet.fragment:
        fragments.refuse(node, reason, now)
        if not fragments.is_first(packet):
            return reason, nowhere
    is_long = reason == Reason.TOO_BIG
    if not is_long and not is_refusal(reason):
        return reason, nowhere
    if packet.quoted:  # it is an error
        return reason, nowhere
    protocol = packet.protocol & ~np.uint8(_IPV6)
    is_answered = protocol == _TCP or protocol == _UDP or packet.unknown_at or (is_long and protocol == _ICMPV6)
    if not is_answered or not _has_a_sender(frames, start):
        return reason, nowhere
    if protocol == _TCP and packet.tcp_flags & RST and not is_long:
        return reason, nowhere
    if not may_answer(node, REFUSALS, _network_of(frames, start), _IPV6, now):
        return np.int64(Reason.ANSWER_LIMITED), nowhere
    source = _complainant(node, frames, start, reason)
    if is_long:
        mtu = np.int64(node.tables.next_hops[np.int64(packet.next_hop)].mtu) - vlans.more_bytes(packet)
        _error(frames, start, packet, _TOO_LONG, 0, mtu, source)
    elif protocol == _TCP:
        _reset(frames, start, packet)
    elif packet.unknown_at:
        _error(frames, start, packet, _PARAMETER, _PROTOCOL, np.int64(packet.unknown_at), source)
    else:
        _error(frames, start, packet, _UNREACHABLE, _PORT, 0, source)
    return reason, node.link[0].ifindex


@compiled
def answer_echo(node, frames, start, now):
    """Turn an echo request to a VIP into its answer. Return (reason, egress ifindex)."""
    packet, nowhere = node.packet[0], np.uint32(_NOWHERE)
    ip, icmp = start + ETHERNET_BYTES, start + ETHERNET_BYTES + IPV6_BYTES
    if not _has_a_sender(frames, start):
        return Reason.NOT_SERVED, nowhere
    if not may_answer(node, ECHOES, _network_of(frames, start), _IPV6, now):
        return Reason.ANSWER_LIMITED, nowhere
    source, destination = source_of(frames, start), destination_of(frames, start)
    store64(frames, ip + SRC, destination[0])
    store64(frames, ip + SRC + 8, destination[1])
    store64(frames, ip + DST, source[0])
    store64(frames, ip + DST + 8, source[1])
    frames[ip + 7] = _HOP_LIMIT
    asked = start + np.int64(packet.l4)
    if asked > icmp:  # extension headers were for the way here
        length = icmp + be16(frames, ip + 4) - asked
        for offset in range(length):
            frames[icmp + offset] = frames[asked + offset]
        frames[ip + 6] = _ICMPV6
        store_be16(frames, ip + 4, length)
        packet.length = ETHERNET_BYTES + IPV6_BYTES + length
    replace_byte(frames, icmp, ECHO_REPLY, icmp + 2)
    turn_macs(frames, start)
    return Reason.ECHO_ANSWERED, node.link[0].ifindex


@compiled
def answer_solicitation(node, frames, start):
    """Turn a question for a VIP into its answer where it lies, no longer than it is; return whether there is one.

    Who has no address yet, and asks whether it may have the VIP, is answered before all nodes (RFC 4861 section 7.2.4).
    The link's address is in the answer where the question had room for it: one for a group has.
    """
    packet, mac = node.packet[0], node.link[0].mac
    ip = start + ETHERNET_BYTES
    icmp = ip + IPV6_BYTES
    client, vip = source_of(frames, start), target_of(frames, start)
    is_nobody = client[0] == 0 and client[1] == 0
    if is_martian(client) and not is_nobody:
        return False
    length = SOLICITATION_BYTES + (8 if be16(frames, ip + 4) >= SOLICITATION_BYTES + 8 else 0)
    turn_macs(frames, start)
    store_mac(frames, start + 6, np.uint32(mac), np.uint16(mac >> np.uint64(32)))
    if is_nobody:
        client = _ALL_NODES
        store_mac(frames, start, _ALL_NODES_MAC[0], _ALL_NODES_MAC[1])
    _write_ip(frames, ip, length, _ICMPV6, vip, client)
    frames[ip + 7] = _OF_NEIGHBOURS
    frames[icmp] = _ADVERTISEMENT
    store_be32(frames, icmp + 4, (_OVERRIDE if is_nobody else _SOLICITED | _OVERRIDE) << 24)
    option = icmp + TARGET + 16
    if length > SOLICITATION_BYTES:
        store16(frames, option, np.uint16(_LINK_OPTION))
        store_mac(frames, option + 2, np.uint32(mac), np.uint16(mac >> np.uint64(32)))
    _finish(frames, start, length, _ICMPV6, icmp + 2, packet)
    return True
