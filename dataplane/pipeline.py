"""One frame from start to verdict, in userspace: parse - flow - service - admit - rewrite.

The same stages in the same order, with the same words, as xdp/bpf/lb.c and the picture in docs/architecture.md. What
XDP punts comes here; with the engines that have no XDP program to forward, everything does.
"""

from __future__ import annotations

import numpy as np

from conntrack import compiled as flows
from dataplane import answers, answers6, fragments, vlans, wire, wire6
from dataplane.admit import admit
from dataplane.choosing import is_martian
from dataplane.context import AWAITED, KERNEL, NOWHERE
from dataplane.forwarding import forward, is_left_to_egress, way_to
from dataplane.icmp_errors import translate_error
from dataplane.rings import lock, unlock
from lb import compiled as services
from xdp import naming
from xdp.atomic import prefetch
from xdp.byteorder import swapped32
from xdp.jit import compiled, inlined
from xdp.schema import FIRST_DROP, Direction, Event, Limit, Ping, Protocol, Reason, State
from xdp.unaligned import load32, load64

_TCP, _ICMP, _ICMPV6 = int(Protocol.TCP), int(Protocol.ICMP), int(Protocol.ICMPV6)
_IPV6 = int(Protocol.IPV6)
_ORIGINAL = int(Direction.ORIGINAL)
_SYN, _DATA, _ECHO = int(Event.SYN), int(Event.DATA), int(Event.ECHO)
_ANSWER, _FORWARD = int(Ping.ANSWER), int(Ping.FORWARD)
_RESET, _STATE_BITS = int(State.RESET), int(Limit.STATE_BITS)
_ARP_ANSWERS = int(Limit.ARP_ANSWERS)
_PLAIN_IPV4 = 0x450008  # 0x0800 on the wire, then a header without options
_WITH_PORTS = wire.ETHERNET_BYTES + wire.IPV4_BYTES + 4


@inlined
def _may_answer_arp(tables, link, now):
    """Tell whether another question for a VIP may be answered in this second, and count that it is."""
    if np.uint32(np.uint32(now) - link.since) >= tables.control[0].hertz:  # unsigned: it began at any time
        link.since = now
        link.answers = 0
    if link.answers == _ARP_ANSWERS:
        return False
    link.answers += np.uint32(1)
    return True


@inlined
def _answer_neighbour(node, frames, start, length, now):
    """Answer a question for an IPv6 VIP where it lies. Return (reason, egress ifindex)."""
    tables, link = node.tables, node.link[0]
    nowhere = np.uint32(NOWHERE)
    if not wire6.is_solicitation(frames, start, length):
        return Reason.OTHER_ICMP, nowhere
    first, second = wire6.target_of(frames, start)
    if not services.is_vip(tables, swapped32(naming.find(tables, first, second)), _IPV6):
        return Reason.OTHER_ICMP, nowhere
    if not _may_answer_arp(tables, link, now):
        return Reason.ARP_LIMITED, nowhere
    if not answers6.answer_solicitation(node, frames, start):
        return Reason.OTHER_ICMP, nowhere
    return Reason.ARP_ANSWERED, link.ifindex


@inlined
def _answer_arp(node, frames, start, length, now):
    """Answer a question for a VIP where it lies. Return (reason, egress ifindex)."""
    tables, link = node.tables, node.link[0]
    asked = wire.parse_arp(frames, start, length)
    if asked == 0:
        return Reason.NOT_IPV4, np.uint32(NOWHERE)
    if not services.is_vip(tables, asked, 0):
        return Reason.NOT_IPV4, np.uint32(NOWHERE)
    if not _may_answer_arp(tables, link, now):
        return Reason.ARP_LIMITED, np.uint32(NOWHERE)
    wire.answer_arp(frames, start, link.mac)
    return Reason.ARP_ANSWERED, link.ifindex


@inlined
def _answer_other(node, frames, start, found, family, now):
    """What is neither TCP nor summed UDP in one piece, nor of a flow: ours if it is to a VIP. As `_handle_rest`."""
    tables, packet = node.tables, node.packet[0]
    nowhere = np.uint32(NOWHERE)
    if not services.is_vip(tables, np.uint32(packet.addrs >> np.uint64(32)), family):
        if found == Reason.VIP_ECHO:
            return Reason.OTHER_ICMP, nowhere
        if found == Reason.UNSUMMED:
            return Reason.OTHER_FRAGMENT if packet.fragment else Reason.NOT_OURS, nowhere
        return found, nowhere
    if packet.ttl <= 1:
        return Reason.TTL_EXPIRED, nowhere
    if found == Reason.TOO_SHORT or (not family and not wire.has_sound_checksum(frames, start, packet)):
        return Reason.MALFORMED, nowhere
    if packet.source_routed:
        return Reason.SOURCE_ROUTED, nowhere
    if found == Reason.UNSUMMED:
        return found, nowhere
    if found == Reason.VIP_ECHO and tables.control[0].ping == _ANSWER:
        if family:
            return answers6.answer_echo(node, frames, start, now)
        return answers.answer_echo(node, frames, start, now)
    if found == Reason.VIP_ECHO and tables.control[0].ping == _FORWARD:
        return Reason.FORWARDED, nowhere
    return Reason.NOT_SERVED, nowhere


@inlined
def _begin_ipv6(node, frames, start, length, longest, now):
    """Parse an IPv6 packet. Return (reason, egress); FORWARDED and NOWHERE: to go on with names for addresses."""
    tables, packet = node.tables, node.packet[0]
    found = wire6.parse(frames, start, length, packet)
    if found == Reason.OTHER_ICMP and wire6.is_discovery(frames, start, packet):
        if not tables.control[0].answers_arp:
            return found, np.uint32(NOWHERE)
        return _answer_neighbour(node, frames, start, length, now)
    if found == Reason.NOT_IPV4 or packet.protocol == 0:
        return found, np.uint32(NOWHERE)
    if wire.is_for_many(frames, start):
        return Reason.FOR_MANY, np.uint32(NOWHERE)
    wire6.name_ends(tables, frames, start, packet, found == Reason.ICMP_ERROR)
    if found == Reason.FORWARDED:
        return found, np.uint32(NOWHERE)
    if found == Reason.ICMP_ERROR:
        return translate_error(node, frames, start, longest, now)
    is_unsummed = found == Reason.UNSUMMED and not packet.fragment
    if (found == Reason.ECHO_REPLY or is_unsummed) and _is_of_flow(node, now):
        return found if is_unsummed else Reason.FORWARDED, np.uint32(NOWHERE)
    if found == Reason.ECHO_REPLY:
        found = np.int64(Reason.OTHER_ICMP)
    if packet.fragment:
        key = tables.control[0].hash_key[0]
        packet.ends = wire6.pair_of(frames, start, packet, key)  # a client may have no name yet
    if found == Reason.VIP_FRAGMENT:
        return _follow(node, frames, start, length, longest, now)
    if found == Reason.FLOW_FRAGMENT:
        return fragments.lead(node, now), np.uint32(NOWHERE)
    return _answer_other(node, frames, start, found, _IPV6, now)


@inlined
def _is_of_flow(node, now):
    """Tell whether a packet is of a flow that is not over."""
    packet = node.packet[0]
    slot = flows.find(node.tables, packet.addrs, packet.ports, packet.protocol)
    return slot != flows.MISS and not flows.is_expired(node.tables, slot, now)


@inlined
def _handle_rest(node, frames, start, length, longest, found, now):
    """Neither TCP nor UDP in one piece. Return (reason, egress); FORWARDED and NOWHERE: to go on as if it were."""
    nowhere = np.uint32(NOWHERE)
    if found == Reason.ICMP_ERROR:
        return translate_error(node, frames, start, longest, now)
    if found == Reason.NOT_IPV4 and node.tables.control[0].answers_arp:
        return _answer_arp(node, frames, start, length, now)
    if found == Reason.NOT_IPV4 or (found == Reason.TOO_SHORT and node.packet[0].addrs == 0):
        return found, nowhere
    if found == Reason.VIP_FRAGMENT:
        return _follow(node, frames, start, length, longest, now)
    if found == Reason.FLOW_FRAGMENT:
        return fragments.lead(node, now), nowhere
    if found == Reason.ECHO_REPLY:
        if _is_of_flow(node, now):
            return Reason.FORWARDED, nowhere
        found = np.int64(Reason.OTHER_ICMP)
    return _answer_other(node, frames, start, found, 0, now)


@compiled
def _follow(node, frames, start, length, longest, now):
    """Send a fragment where the first of its datagram was sent. Return (reason, egress): AWAITED, if none was yet."""
    tables, packet = node.tables, node.packet[0]
    nowhere = np.uint32(NOWHERE)
    lock(node.fragments.lock)
    datagram = fragments.find(node, packet, now)
    if datagram == fragments.MISS:
        unlock(node.fragments.lock)
        return _await_first(node, frames, start)
    reason, egress = fragments.check(node, datagram), nowhere
    if reason == Reason.FORWARDED:
        reason = Reason.FRAGMENT_ALONE
        ports = node.fragments.datagrams[datagram].ports
        slot = flows.find(tables, packet.addrs, ports, packet.protocol)
        if slot != flows.MISS and not flows.is_expired(tables, slot, now):
            flow = tables.flows[slot]
            row = np.int64(flow.next_hop)
            reason, egress = way_to(tables, row, packet.ttl, longest)
            if egress == KERNEL:
                reason, row = Reason.TO_KERNEL, np.int64(wire.TO_KERNEL)
            is_left_alone = egress == KERNEL and is_left_to_egress(flow)
            if not is_left_alone and (reason == Reason.FORWARDED or reason == Reason.TO_KERNEL):
                flows.touch(tables, slot, _DATA, length, now)
                if packet.protocol & _IPV6:
                    wire6.rewrite_addresses(frames, start, flow, tables, row)
                else:
                    wire.rewrite_addresses(frames, start, flow, tables.next_hops, row)
                fragments.note(node, datagram)
    unlock(node.fragments.lock)
    return reason, egress


@inlined
def _await_first(node, frames, start):
    """Return (reason, egress) of a fragment of whose datagram nothing is known."""
    packet = node.packet[0]
    nowhere = np.uint32(NOWHERE)
    family = _IPV6 if fragments.is_ipv6(packet) else 0
    if not services.is_vip(node.tables, np.uint32(packet.addrs >> np.uint64(32)), family):
        return Reason.OTHER_FRAGMENT, nowhere
    if packet.ttl <= 1:
        return Reason.TTL_EXPIRED, nowhere
    if not family and not wire.has_sound_checksum(frames, start, packet):
        return Reason.MALFORMED, nowhere
    if packet.source_routed:
        return Reason.SOURCE_ROUTED, nowhere
    if not fragments.has_transport(packet):
        return Reason.NOT_SERVED, nowhere
    shape = fragments.shape(packet)
    if shape != Reason.FORWARDED:
        return shape, nowhere
    return Reason.FRAGMENT_ALONE, np.uint32(AWAITED)


@inlined
def _refuse(node, frames, start, length, reason, now):
    """Tell the sender of a frame that it is dropped, if it is to be told: `answers.refuse`, of either family."""
    if wire6.is_ipv6(frames, start, length):
        return answers6.refuse(node, frames, start, reason, now)
    return answers.refuse(node, frames, start, reason, now)


@inlined
def refuse(node, frames, start, length, reason, now):
    """The same of a frame that has its VLAN tags, and is `node.packet[0]`."""
    packet = node.packet[0]
    whole = packet.length
    vlans.take_off(node, frames, start, length)
    skipped = np.int64(packet.vlan_bytes)
    packet.length = whole - np.uint32(skipped)
    reason, egress = _refuse(node, frames, start + skipped, length - skipped, reason, now)
    vlans.put_back(node, frames, start)
    return reason, egress


@compiled
def handle(node, frames, start, length, now):
    """Take a frame, `frames[start : start + length]`, to its verdict, and answer it if that is ours to do.

    Return (reason, egress), where `egress` is an ifindex, NOWHERE, KERNEL or AWAITED.

    With an ifindex the frame is to be transmitted: it was rewritten where it lies, and is `node.packet[0].length` bytes
    long; an answer may be longer than what it answers, and the frame must have room for answers.LONGEST_GROWN bytes.
    With KERNEL the kernel is to have it, rewritten, too; but for a reply, which is translated as it leaves.
    A verdict of DROP means that the packet is dropped, and that what is to be transmitted is our answer to it.
    Otherwise it is as it was, and what is to happen is the reason's verdict. With AWAITED (NO_NEXT_HOP, FRAGMENT_ALONE)
    nothing was begun, and the frame may be tried again when `holding.has_news` says so. VLAN tags stay where they are.
    """
    if wire.is_for_another(frames, start, length, node.tables.control[0].stations):
        node.packet[0].length = length
        return np.int64(Reason.OTHER_STATION), np.uint32(NOWHERE)
    tagged = vlans.take_off(node, frames, start, length)
    if tagged != Reason.FORWARDED:
        return tagged, np.uint32(NOWHERE)
    skipped = np.int64(node.packet[0].vlan_bytes)
    inner, rest = start + skipped, length - skipped
    reason, egress = judge(node, frames, inner, rest, now)
    reason = np.int64(reason)
    if reason >= FIRST_DROP and egress == NOWHERE:
        reason, egress = _refuse(node, frames, inner, rest, reason, now)
    vlans.put_back(node, frames, start)
    return np.int64(reason), egress


@compiled
def look_ahead(tables, frames, burst, count):
    """Ask for the memory that the first `count` frames of a burst (of FRAME rows) will want: their misses overlap.

    Of the tables, for plain IPv4 only: ports, if that is what they are, follow the header.
    """
    for place in range(count):
        prefetch(frames, np.int64(burst[place].addr))
    for place in range(count):
        start = np.int64(burst[place].addr)
        is_whole = burst[place].len >= _WITH_PORTS
        if is_whole and load32(frames, start + 12) & np.uint32(0xFFFFFF) == _PLAIN_IPV4:
            protocol = frames[start + 23]
            flows.look_ahead(tables, load64(frames, start + 26), load32(frames, start + 34), protocol)


@inlined
def _event_of(tables, packet):
    """Return what a packet tells the state machine."""
    if packet.protocol & ~np.uint8(_IPV6) == _TCP:
        return np.int64(tables.machine[0].event_of_flags[packet.tcp_flags])
    is_echo = packet.protocol == _ICMP or packet.protocol == _ICMPV6 | _IPV6
    return np.int64(_ECHO if is_echo else _DATA)


@inlined
def _look_at_checksum(node, frames, start, event):
    """Count a first packet of a connection, and whether its checksum is unfinished: dataplane/checksums.py tells."""
    link = node.link[0]
    if event == _ECHO or node.packet[0].fragment:
        return
    link.begun += np.uint64(1)
    if wire.has_bare_checksum(frames, start, node.packet[0]):
        link.unfinished += np.uint64(1)


@inlined
def _parse(node, frames, start, length, longest, now):
    """Parse a frame, and deal with all that has no flows. Return (reason, egress); FORWARDED and NOWHERE: to go on."""
    packet = node.packet[0]
    found = wire.parse(frames, start, length, packet)
    is_ip = found != Reason.NOT_IPV4 and (found != Reason.TOO_SHORT or packet.addrs != 0)
    if is_ip and wire.is_for_many(frames, start):
        return np.int64(Reason.FOR_MANY), np.uint32(NOWHERE)
    if found == Reason.FORWARDED:
        return found, np.uint32(NOWHERE)
    if found == Reason.NOT_IPV4 and wire6.is_ipv6(frames, start, length):
        return _begin_ipv6(node, frames, start, length, longest, now)
    return _handle_rest(node, frames, start, length, longest, found, now)


@compiled
def judge(node, frames, start, length, now, segment=0):
    """Take a frame without VLAN tags to its verdict, all stages in their order, and refuse nobody.

    Return (reason, egress) as `handle`. Of tags that were taken off, `node.packet[0]` knows.

    `segment` is given for a frame that a device will cut into frames of that length: they have to fit the MTU.
    """
    tables, packet = node.tables, node.packet[0]
    longest = (segment or length) + vlans.more_bytes(packet)

    found, egress = _parse(node, frames, start, length, longest, now)
    if found != Reason.FORWARDED or egress != NOWHERE:
        return found, egress

    event = _event_of(tables, packet)
    slot = flows.find(tables, packet.addrs, packet.ports, packet.protocol)
    if slot != flows.MISS:
        flow = tables.flows[slot]
        reopened = event == _SYN and flow.direction == _ORIGINAL and tables.machine[0].reopens[flow.state & _STATE_BITS]
        if not reopened and not flows.is_expired(tables, slot, now):
            if packet.source_routed and packet.ttl > 1:
                return Reason.SOURCE_ROUTED, np.uint32(NOWHERE)
            return forward(node, frames, start, length, longest, slot, event, now)
        if flow.state & _STATE_BITS == _RESET and not reopened:  # over for every packet: those of others are not asked
            return Reason.ENDPOINT_REMOVED, np.uint32(NOWHERE)

    destination = np.uint32(packet.addrs >> np.uint64(32))
    protocol = packet.protocol & np.uint8(_IPV6) if event == _ECHO else packet.protocol  # an echo request: of its VIP
    service = services.find_frontend(tables, destination, np.uint16(packet.ports >> np.uint32(16)), protocol)
    if (service == services.MISS or packet.fragment) and not services.is_vip(tables, destination, packet.protocol):
        return Reason.OTHER_FRAGMENT if packet.fragment else Reason.NOT_OURS, np.uint32(NOWHERE)
    if packet.ttl <= 1:
        return Reason.TTL_EXPIRED, np.uint32(NOWHERE)
    if is_martian(packet, frames, start):
        return Reason.MARTIAN_SOURCE, np.uint32(NOWHERE)
    if not packet.fragment and event != _ECHO and not wire.has_sound_lengths(frames, start, packet):
        return Reason.MALFORMED, np.uint32(NOWHERE)
    if not packet.protocol & _IPV6 and not wire.has_sound_checksum(frames, start, packet):
        return Reason.MALFORMED, np.uint32(NOWHERE)
    if packet.source_routed:
        return Reason.SOURCE_ROUTED, np.uint32(NOWHERE)
    if service == services.MISS:
        return Reason.NOT_SERVED, np.uint32(NOWHERE)
    if slot != flows.MISS:
        flows.withdraw(tables, slot)
    _look_at_checksum(node, frames, start, event)
    return admit(node, frames, start, length, longest, service, event, now)
