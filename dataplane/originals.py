"""What the ingress filter drops, as compiled code sees it: so that a copy whose original is gone is looked after.

A packet socket gets copies; the kernel keeps the originals, but for those that dataplane.ingress.py drops because they
are ours. A copy that the pipeline leaves alone is released if the kernel has its original. If it has not, because
an endpoint talks to somebody past its Services, we send the frame on, as the kernel would have; and if it was to the
node itself, the sender is told, as the kernel would have told it.

One writer, any number of readers: places lie in two buffers, the writer fills the idle one and then names it live. A
reader that was stopped in between for so long that its buffer is being filled anew may judge one frame wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from conntrack.states import ACK, SYN
from dataplane import fragments, hops_compiled, packetrings, pipeline, vlans, wire, wire6
from dataplane.context import AWAITED, NOWHERE
from dataplane.forwarding import way_to
from dataplane.snat_ports import is_masqueraded
from lb import compiled as services
from xdp import naming
from xdp.atomic import load_acquire, store_release
from xdp.bundle import Bundle
from xdp.byteorder import swap16, swap32, swapped16, swapped32, swapped64
from xdp.hash import GOLDEN
from xdp.jit import compiled, inlined
from xdp.schema import FIRST_DROP, FIRST_PASS, Protocol, Reason
from xdp.unaligned import load16, load32

Place = tuple[int, int, int]  # (address, port, protocol) in host numbers, as packets know them (lb.rows.known_as)

_TCP, _ICMP, _ICMPV6, _IPV6 = int(Protocol.TCP), int(Protocol.ICMP), int(Protocol.ICMPV6), int(Protocol.IPV6)
_SYN_ACK = SYN | ACK
_DST = wire.ETHERNET_BYTES + 16


class Kind(IntEnum):
    """Which originals a place stands for."""

    ENDPOINT = 1  # as source
    RETIRED = 2  # as destination: a frontend that is none any more, while connections to it last
    OWN_FRONTEND = 3  # as destination: a frontend at an address of the node
    OWN = 4  # an address of the node, without port and protocol (but for IPv6's bit)
    ANSWERING = 5  # as source of answers to echo requests: an address, likewise


@dataclass(frozen=True, eq=False)
class Originals(Bundle):
    """The places, each a word: address, port, protocol, kind from the lowest byte up. `live`: the buffer to read."""

    live: npt.NDArray[np.uint64]
    places: npt.NDArray[np.uint64]  # [buffer, place]: a power of two of places, 0: empty
    taken: npt.NDArray[np.uint32]  # [buffer, i]: which are not empty ...
    counts: npt.NDArray[np.int64]  # [buffer]: ... and how many


def new_originals(room: int) -> Originals:
    """Return an empty table with room for so many places."""
    places = np.zeros((2, 1 << (2 * room - 1).bit_length()), np.uint64)
    return Originals(np.zeros(1, np.uint64), places, np.zeros((2, room), np.uint32), np.zeros(2, np.int64))


def _word(place: Place, kind: Kind) -> int:
    address, port, protocol = place
    return swap32(address) | swap16(port) << 32 | protocol << 48 | kind << 56


def publish(originals: Originals, places: Mapping[Kind, Iterable[Place]]) -> None:
    """Make these the places; the last ones, for which there is no room, are left out."""
    words = [_word(place, kind) for kind, those in places.items() for place in those]
    _publish(originals, np.array(words[: originals.taken.shape[1]], np.uint64))


@compiled
def _publish(originals, words):
    buffer = np.int64(load_acquire(originals.live, 0) ^ np.uint64(1))
    places = originals.places[buffer]
    taken = originals.taken[buffer]
    for i in range(originals.counts[buffer]):
        places[taken[i]] = np.uint64(0)
    for i in range(len(words)):
        place = _find(places, words[i])
        places[place] = words[i]
        taken[i] = np.uint32(place)
    originals.counts[buffer] = len(words)
    store_release(originals.live, 0, np.uint64(buffer))


@inlined
def _find(places, word):
    """Return where a word is, or the empty place where it would be: at most half of them are taken."""
    last = len(places) - 1
    place = np.int64((word * np.uint64(GOLDEN)) >> np.uint64(32)) & last
    while places[place] != 0 and places[place] != word:
        place = (place + 1) & last
    return place


@inlined
def _has(originals, address, port, protocol, kind):
    places = originals.places[np.int64(load_acquire(originals.live, 0))]
    word = np.uint64(address) | np.uint64(port) << np.uint64(32)
    word |= np.uint64(protocol) << np.uint64(48) | np.uint64(kind) << np.uint64(56)
    return places[_find(places, word)] == word


@inlined
def _vnet_of(node, start):
    """Return where the VNET header of a frame is, whose VLAN tags have been taken off."""
    return start - np.int64(node.packet[0].vlan_bytes) - packetrings.VNET_BYTES


@inlined
def _segment(node, frames, start, length):
    """Return how long the frames are that a device makes of this one, 0 if it is one."""
    vnet = _vnet_of(node, start)
    kind = frames[vnet + packetrings.VNET_GSO_TYPE] & np.uint8(0x7F)  # the highest bit is about ECN
    if kind == 0 or length < wire.ETHERNET_BYTES + wire.IPV4_BYTES:
        return np.int64(0)
    if frames[vnet] & np.uint8(packetrings.VNET_NEEDS_CSUM):
        l4 = np.int64(load16(frames, vnet + packetrings.VNET_CSUM_START)) - np.int64(node.packet[0].vlan_bytes)
    elif wire6.is_ipv6(frames, start, length):
        l4 = np.int64(wire.ETHERNET_BYTES + wire.IPV6_BYTES)
    else:
        l4 = wire.ETHERNET_BYTES + (np.int64(frames[start + wire.ETHERNET_BYTES]) & 15) * 4
    header = np.int64(wire.UDP_BYTES)
    if kind == packetrings.GSO_TCPV4 or kind == packetrings.GSO_TCPV6:
        if l4 + wire.TCP_BYTES > length:
            return np.int64(0)
        header = (np.int64(frames[start + l4 + 12]) >> 4) * 4
    return min(length, l4 + header + np.int64(load16(frames, vnet + packetrings.VNET_GSO_SIZE)))


@inlined
def _finish(node, frames, start, length):
    """Make VNET header and checksum of a rewritten frame right for the device that is to finish it."""
    vnet = _vnet_of(node, start)
    flags = frames[vnet] & np.uint8(packetrings.VNET_NEEDS_CSUM)
    frames[vnet] = flags
    if flags:
        l4 = np.int64(load16(frames, vnet + packetrings.VNET_CSUM_START)) - np.int64(node.packet[0].vlan_bytes)
        check = l4 + np.int64(load16(frames, vnet + packetrings.VNET_CSUM_OFFSET))
        if l4 == np.int64(node.packet[0].l4) and check + 2 <= length:
            if wire6.is_ipv6(frames, start, length):
                protocol = node.packet[0].protocol & ~np.uint8(_IPV6)
                wire6.refresh_partial(frames, start, l4, protocol, start + check)
            else:
                wire.refresh_partial(frames, start, l4, start + check)


@compiled
def judge(node, originals, frames, start, length, now):
    """Take a copy, `frames[start : start + length]` behind its VNET header, to its verdict; return (reason, egress).

    As `pipeline.judge`; but what that leaves to the kernel, and the kernel has not got, is sent on or dropped. Its VLAN
    tags stay where they are.
    """
    tagged = vlans.take_off(node, frames, start, length)
    if tagged != Reason.FORWARDED:
        return tagged, np.uint32(NOWHERE)
    skipped = np.int64(node.packet[0].vlan_bytes)
    reason, egress = _judge(node, originals, frames, start + skipped, length - skipped, now)
    vlans.put_back(node, frames, start)
    return np.int64(reason), egress


@inlined
def _judge(node, originals, frames, start, length, now):
    segment = _segment(node, frames, start, length)
    reason, egress = pipeline.judge(node, frames, start, length, now, segment)
    reason = np.int64(reason)
    if reason < FIRST_PASS:
        _finish(node, frames, start, length)
        return reason, egress
    if reason >= FIRST_DROP and reason != Reason.ICMP_UNUSABLE:
        return reason, egress
    if reason == Reason.NOT_IPV4 or reason == Reason.TTL_EXPIRED:
        return reason, egress  # neither of which the filter looks at
    return _without_flow(node, originals, frames, start, length, segment, reason)


@inlined
def _is_answer(node, originals, destination, family):
    """Tell whether what an endpoint has sent is to where masqueraded connections leave from.

    Of an ICMP error, what it quotes was sent from there to an endpoint.
    """
    packet = node.packet[0]
    if not is_masqueraded(node.masquerading, np.uint64(swapped16(packet.ports >> np.uint32(16)))):
        return False
    if not _has(originals, destination, np.uint16(0), family, Kind.OWN):
        return False
    return _has(originals, np.uint32(packet.addrs), np.uint16(packet.ports), packet.protocol, Kind.ENDPOINT)


@inlined
def _error_to_us(node, originals, destination, family, is_to_vip):
    """Return what becomes of an ICMP error about a packet of no flow, whose five-tuple was turned round."""
    packet = node.packet[0]
    quoted, port = np.uint32(packet.addrs >> np.uint64(32)), np.uint16(packet.ports >> np.uint32(16))
    is_ours = is_to_vip or _is_answer(node, originals, destination, family)
    is_ours |= _has(originals, quoted, port, packet.protocol, Kind.OWN_FRONTEND)
    is_ours |= _has(originals, quoted, port, packet.protocol, Kind.RETIRED)
    return np.int64(Reason.ICMP_UNUSABLE if is_ours else Reason.OTHER_ICMP)


@inlined
def _to_us(node, originals, destination, family, reason):
    """Return why a frame is dropped that was to us and whose original the filter has dropped; else why it is passed."""
    packet = node.packet[0]
    protocol, port = packet.protocol, np.uint16(packet.ports >> np.uint32(16))
    if reason == Reason.ICMP_UNUSABLE:
        is_to_vip = services.is_vip(node.tables, destination, family)
        return _error_to_us(node, originals, destination, family, is_to_vip)
    is_fragment = reason == Reason.OTHER_FRAGMENT
    if reason != Reason.NOT_OURS and not (is_fragment and fragments.is_first(packet)):
        return reason
    if _is_answer(node, originals, destination, family):
        return np.int64(Reason.NOT_SERVED)
    if _has(originals, destination, port, protocol, Kind.OWN_FRONTEND):
        return np.int64(Reason.NOT_SERVED if is_fragment else Reason.VANISHED)
    is_first = protocol & ~np.uint8(_IPV6) == _TCP and packet.tcp_flags & np.uint8(_SYN_ACK) == SYN
    if not is_fragment and not is_first and _has(originals, destination, port, protocol, Kind.RETIRED):
        return np.int64(Reason.VANISHED)
    return reason


@inlined
def _way_on(node, frames, start, family):
    """Return the row of the way to where a frame is addressed, or as hops_compiled.lookup."""
    if not family:
        return hops_compiled.lookup(node.hops, load32(frames, start + _DST))
    first, second = wire6.destination_of(frames, start)
    name = naming.intern_client(node.tables, first, second)  # by which the way is asked for
    if name == naming.NOBODY:
        return np.int64(hops_compiled.MISS)
    return hops_compiled.lookup6(node.hops, swapped32(name), swapped64(first), swapped64(second))


@inlined
def _is_echo_reply(packet, frames, start):
    """Tell whether an ICMP message that is no error answers an echo request."""
    kind = frames[start + np.int64(packet.l4)]
    if packet.protocol == _ICMP:
        return kind == wire.ECHO_REPLY
    return packet.protocol == _ICMPV6 | _IPV6 and kind == wire6.ECHO_REPLY


@inlined
def _without_flow(node, originals, frames, start, length, segment, reason):
    """Return (reason, egress) of an IP frame of no flow of ours: the kernel's, ours to send on, or nobody's."""
    packet = node.packet[0]
    nowhere = np.uint32(NOWHERE)
    family = np.uint8(_IPV6 if wire6.is_ipv6(frames, start, length) else 0)
    if length < wire.ETHERNET_BYTES + (wire.IPV6_BYTES if family else wire.IPV4_BYTES):
        return reason, nowhere
    if family:
        first, second = wire6.destination_of(frames, start)
        destination = swapped32(naming.find(node.tables, first, second))
    else:
        destination = load32(frames, start + _DST)
    is_answer = reason == Reason.OTHER_ICMP and _is_echo_reply(packet, frames, start)
    may_be_sent_on = reason == Reason.NOT_OURS or reason == Reason.ICMP_UNUSABLE or is_answer
    reason = _to_us(node, originals, destination, family, reason)
    if reason >= FIRST_DROP or not may_be_sent_on:
        return reason, nowhere
    source, source_port, protocol = np.uint32(packet.addrs), np.uint16(packet.ports), packet.protocol
    if is_answer:
        source_port, protocol = np.uint16(0), family
    if not _has(originals, source, source_port, protocol, Kind.ANSWERING if is_answer else Kind.ENDPOINT):
        return reason, nowhere
    row = _way_on(node, frames, start, family)
    if row == hops_compiled.PENDING:
        return np.int64(Reason.NO_NEXT_HOP), np.uint32(AWAITED)
    if row < 0:
        return reason, nowhere  # a route by none of our interfaces: the filter has left it to the kernel
    found, egress = way_to(node.tables, row, packet.ttl, (segment or length) + vlans.more_bytes(packet))
    if found == Reason.NOT_FORWARDABLE or found == Reason.TTL_EXPIRED:
        return reason, nowhere
    if found == Reason.FORWARDED:
        if family:
            wire6.send_on(frames, start, node.tables.next_hops, row)
        else:
            wire.send_on(frames, start, node.tables.next_hops, row)
        frames[_vnet_of(node, start)] &= np.uint8(packetrings.VNET_NEEDS_CSUM)
        return np.int64(Reason.SENT_ON), egress
    return np.int64(found), egress
