"""What the node itself says to a packet: that it is refused, or too long; and the answer to an echo request.

An answer takes the packet's place in its frame and goes back where that came from, MAC addresses exchanged: nothing
needs to be known of the way. What is refused is dropped all the same, for its reason, and its answer is a packet that
we originate; an echo request is turned round, as a question by ARP is. RFC 9293 section 3.10.7.1, RFC 792, RFC 1122
section 3.2.2, RFC 1191, RFC 6864 (whole packets have no identification).
"""

from __future__ import annotations

import numpy as np

from conntrack import compiled as flows
from conntrack.states import ACK, FIN, RST, SYN
from dataplane import fragments, vlans, wire
from dataplane.limits import ECHOES, REFUSALS, may_answer
from dataplane.wire import ECHO_REPLY, ETHERNET_BYTES, ICMP_BYTES, IPV4_BYTES, IPV6_BYTES, OFFSET, TCP_BYTES, be16
from xdp.byteorder import swapped32
from xdp.jit import compiled, inlined
from xdp.schema import Direction, Limit, Protocol, Reason
from xdp.unaligned import load16, load32, load64, store16, store32

# Room that a frame must have for an answer: of IPv6, one that quotes a packet from its header to its ports.
LONGEST_GROWN = vlans.MOST_BYTES + ETHERNET_BYTES + 2 * IPV6_BYTES + ICMP_BYTES + int(Limit.EXTENSION_BYTES) + 8

_NOWHERE = 0
_REPLY = int(Direction.REPLY)
_ICMP, _TCP, _UDP, _SCTP = int(Protocol.ICMP), int(Protocol.TCP), int(Protocol.UDP), 132
_UNREACHABLE, _PROTOCOL, _PORT, _TOO_LONG = 3, 2, 3, 4
_TTL = 64
_DO_NOT_FRAGMENT = 0x40  # in the first byte of flags and offset
_NETWORK_CONTROL = 0xC0  # the precedence of errors: RFC 1812 section 4.3.2.5


@inlined
def _has_a_sender(frames, start, packet):
    """Tell whether a packet was sent by one host: nothing else is ever answered (RFC 1122)."""
    network = swapped32(np.uint32(packet.addrs)) >> np.uint32(24)
    is_from_many = frames[start + 6] & 1
    is_of_its_destination = np.uint32(packet.addrs) == np.uint32(packet.addrs >> np.uint64(32))
    return network != 0 and network != 127 and network < 224 and not is_from_many and not is_of_its_destination


@inlined
def _client_of(packet):
    """Return who is to be answered, for limits."""
    return packet.addrs & np.uint64(0xFFFFFFFF)


@inlined
def store_be16(frames, offset, value):
    """Store two bytes, the highest first."""
    frames[offset] = np.uint8(value >> 8)
    frames[offset + 1] = np.uint8(value & 0xFF)


@inlined
def store_be32(frames, offset, value):
    """Store four bytes, the highest first."""
    store_be16(frames, offset, value >> 16 & 0xFFFF)
    store_be16(frames, offset + 2, value & 0xFFFF)


@inlined
def _be32(frames, offset):
    return be16(frames, offset) << 16 | be16(frames, offset + 2)


@inlined
def sum_of(frames, first, stop):
    """Return the sum of the 16-bit words of a range, as they lie in memory."""
    total = np.int64(0)
    for offset in range(first, stop - 1, 2):
        total += np.int64(load16(frames, offset))
    if (stop - first) & 1:
        total += np.int64(frames[stop - 1])
    return total


@inlined
def store_checksum(frames, offset, total):
    """Store the checksum of what sums up to `total`."""
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    store16(frames, offset, np.uint16(~total & 0xFFFF))


@inlined
def turn_macs(frames, start):
    """Change a frame into one that goes back to where it came from."""
    for i in range(6):
        frames[start + i], frames[start + 6 + i] = frames[start + 6 + i], frames[start + i]


@inlined
def _write_ip(frames, ip, length, tos, protocol, source, destination):
    """Write the header of a packet of `length` bytes; addresses as they lie in memory."""
    frames[ip] = 0x45
    frames[ip + 1] = tos
    store_be16(frames, ip + 2, length)
    store16(frames, ip + 4, np.uint16(0))
    frames[ip + 6] = _DO_NOT_FRAGMENT
    frames[ip + 7] = 0
    frames[ip + 8] = _TTL
    frames[ip + 9] = protocol
    store16(frames, ip + 10, np.uint16(0))
    store32(frames, ip + 12, source)
    store32(frames, ip + 16, destination)
    store_checksum(frames, ip + 10, sum_of(frames, ip, ip + IPV4_BYTES))


@inlined
def replace_byte(frames, offset, value, check_offset):
    """Store the first byte of a 16-bit word and update the checksum that covers it. A wrong one stays wrong."""
    old = load16(frames, offset)
    frames[offset] = value
    store16(frames, check_offset, wire.grown(load16(frames, check_offset), old, load16(frames, offset)))


@inlined
def write_reset(frames, at, tcp, length, packet):
    """Write at offset `at` the RST, without a checksum, that answers the segment of `length` bytes at `tcp`."""
    flags = np.int64(packet.tcp_flags)
    sequence, acknowledged, answer = _be32(frames, tcp + 8), np.int64(0), RST
    if not flags & ACK:
        data = max(np.int64(0), length - (np.int64(frames[tcp + 12]) >> 4) * 4)
        acknowledged = _be32(frames, tcp + 4) + data + (1 if flags & SYN else 0) + (1 if flags & FIN else 0)
        sequence, answer = np.int64(0), RST | ACK
    ports = packet.ports
    store32(frames, at, ports >> np.uint32(16) | ports << np.uint32(16))
    store_be32(frames, at + 4, sequence)
    store_be32(frames, at + 8, acknowledged)
    frames[at + 12] = TCP_BYTES // 4 << 4
    frames[at + 13] = answer
    for offset in range(14, TCP_BYTES):  # no window, no checksum yet, nothing urgent
        frames[at + offset] = 0


@compiled
def _reset(frames, start, packet):
    """Change a TCP segment, no RST, into the RST that a closed port answers it with."""
    ip, tcp = start + ETHERNET_BYTES, start + np.int64(packet.l4)
    client, vip = np.uint32(packet.addrs), np.uint32(packet.addrs >> np.uint64(32))
    write_reset(frames, ip + IPV4_BYTES, tcp, be16(frames, ip + 2) - (tcp - ip), packet)
    tcp = ip + IPV4_BYTES
    _write_ip(frames, ip, IPV4_BYTES + TCP_BYTES, 0, _TCP, vip, client)
    pseudo = sum_of(frames, ip + 12, tcp) + (_TCP << 8) + (TCP_BYTES << 8)  # two bytes each, as they lie in memory
    store_checksum(frames, tcp + 16, pseudo + sum_of(frames, tcp, tcp + TCP_BYTES))
    turn_macs(frames, start)
    packet.length = ETHERNET_BYTES + IPV4_BYTES + TCP_BYTES


@compiled
def _unreachable(frames, start, packet, code, mtu, source):
    """Change a packet into the ICMP error that says that it does not arrive. It quotes the header and eight bytes.

    `source` (as it lies in memory) is who says so, `mtu` how long it may be, or 0.
    """
    ip = start + ETHERNET_BYTES
    icmp = ip + IPV4_BYTES
    quote = icmp + ICMP_BYTES
    quoted = min((np.int64(frames[ip]) & 15) * 4 + 8, be16(frames, ip + 2))
    destination = load32(frames, ip + 12)
    for offset in range(quoted - 1, -1, -1):
        frames[quote + offset] = frames[ip + offset]
    frames[icmp] = _UNREACHABLE
    frames[icmp + 1] = code
    store32(frames, icmp + 2, np.uint32(0))
    store_be16(frames, icmp + 6, mtu)
    store_checksum(frames, icmp + 2, sum_of(frames, icmp, quote + quoted))
    _write_ip(frames, ip, IPV4_BYTES + ICMP_BYTES + quoted, _NETWORK_CONTROL, _ICMP, source, destination)
    turn_macs(frames, start)
    packet.length = ETHERNET_BYTES + IPV4_BYTES + ICMP_BYTES + quoted


@inlined
def _complainant(node, reason):
    """Return who says that a packet does not arrive: whom it was sent to or, where that is a client, the node."""
    tables, packet = node.tables, node.packet[0]
    destination = np.uint32(packet.addrs >> np.uint64(32))
    if reason == Reason.TOO_BIG:
        slot = flows.find(tables, packet.addrs, packet.ports, packet.protocol)
        if slot != flows.MISS and tables.flows[slot].direction == _REPLY:
            there = tables.flows[np.int64(tables.flows[slot].peer)].next_hop
            return tables.next_hops[np.int64(there)].source or destination
    return destination


@inlined
def is_refusal(reason):
    """Tell whether the sender of a packet that is dropped for a reason is to be told, whatever its length."""
    if reason == Reason.NO_ENDPOINT or reason == Reason.NOT_SERVED:
        return True
    return reason == Reason.MID_STREAM_RESET or reason == Reason.ENDPOINT_REMOVED


@compiled
def refuse(node, frames, start, reason, now):
    """Tell the sender of a packet that it is dropped, if it is to be told: the frame becomes the answer.

    `node.packet` is as `parse` has filled it, and has the answer's length then. Return (reason, egress): the reason to
    count, and the interface that the answer leaves by, or NOWHERE.
    """
    packet = node.packet[0]
    nowhere = np.uint32(_NOWHERE)
    if packet.fragment:
        fragments.refuse(node, reason, now)
    ip = start + ETHERNET_BYTES
    is_long = reason == Reason.TOO_BIG
    if is_long:
        if not frames[ip + 6] & _DO_NOT_FRAGMENT:
            return reason, nowhere
    elif not is_refusal(reason):
        return reason, nowhere
    protocol = frames[ip + 9]
    is_error = protocol == _ICMP and not (is_long and wire.is_echo(frames, start + np.int64(packet.l4)))
    if is_error or not _has_a_sender(frames, start, packet) or load16(frames, ip + 6) & OFFSET:
        return reason, nowhere
    if protocol == _TCP and packet.tcp_flags & RST and not is_long:
        return reason, nowhere
    if not may_answer(node, REFUSALS, _client_of(packet), 0, now):
        return np.int64(Reason.ANSWER_LIMITED), nowhere
    source = _complainant(node, reason)
    if is_long:
        mtu = np.int64(node.tables.next_hops[np.int64(packet.next_hop)].mtu) - vlans.more_bytes(packet)
        _unreachable(frames, start, packet, _TOO_LONG, mtu, source)
    elif protocol == _TCP:
        _reset(frames, start, packet)
    else:
        code = _PORT if protocol == _UDP or protocol == _SCTP else _PROTOCOL
        _unreachable(frames, start, packet, code, np.int64(0), source)
    return reason, node.link[0].ifindex


@compiled
def answer_echo(node, frames, start, now):
    """Turn an echo request to a VIP into its answer. Return (reason, egress ifindex)."""
    packet = node.packet[0]
    nowhere = np.uint32(_NOWHERE)
    ip, icmp = start + ETHERNET_BYTES, start + np.int64(packet.l4)
    if not _has_a_sender(frames, start, packet):
        return Reason.NOT_SERVED, nowhere
    if not may_answer(node, ECHOES, _client_of(packet), 0, now):
        return Reason.ANSWER_LIMITED, nowhere
    addrs = load64(frames, ip + 12)
    store32(frames, ip + 12, np.uint32(addrs >> np.uint64(32)))
    store32(frames, ip + 16, np.uint32(addrs))
    replace_byte(frames, ip + 8, _TTL, ip + 10)
    replace_byte(frames, icmp, ECHO_REPLY, icmp + 2)
    turn_macs(frames, start)
    return Reason.ECHO_ANSWERED, node.link[0].ifindex
