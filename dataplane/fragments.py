"""Datagrams in fragments: what the first fragment was, the others follow.

Only the first fragment has ports. When it is forwarded, they are noted here by (source, destination, identification,
protocol) as the fragments arrive, in either direction and family; a later fragment looks its flow up with them.
Datagrams are neither put together nor kept: each fragment goes on by itself. What comes before its first fragment waits
in the packet loop (dataplane/holding.py), and is tried again when `begun` has grown.

Which pieces of a datagram have come is noted, too: a piece that comes again is dropped, and with an overlap the whole
datagram is given up (RFC 5722 does so for IPv6, Linux for both). A datagram that is complete is forgotten at once.

The table is one for all packet loops, because fragments may arrive at different ones, behind one lock: fragments are
rare. It never grows: a new datagram takes the oldest of its bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataplane.rings import lock, unlock
from dataplane.wire import ETHERNET_BYTES, TCP_BYTES, UDP_BYTES
from xdp.atomic import store_release
from xdp.bundle import Bundle
from xdp.byteorder import swapped16
from xdp.hash import first_place, hash_tuple
from xdp.jit import compiled, inlined
from xdp.schema import Limit, Protocol, Reason

MISS = -1

_WAYS = 8
_DATAGRAMS = 1024
_MOST_PIECES = 128  # 65,535 bytes in pieces of 512
_LIFE_S = int(Limit.FRAGMENT_S)
_LEAD_S = 1  # a first fragment that comes again so much later begins another datagram: its number was used again
_TCP, _UDP, _IPV6 = int(Protocol.TCP), int(Protocol.UDP), int(Protocol.IPV6)
_IPV6_HEADERS = 40 + 8  # IPv6's own, and a fragment's
_MORE = 0x2000
_OFFSET = 0x1FFF
_MOST_BYTES = 65535

# A datagram of which pieces are still to come. `blocks` (of eight bytes) have come, of `total`, 0: not known yet.
DATAGRAM = np.dtype(
    [
        ("ends", "u8"),
        ("which", "u8"),  # protocol and identification; 0: a free place
        ("ports", "u4"),
        ("since", "u4"),
        ("pieces", "u2"),
        ("blocks", "u2"),
        ("total", "u2"),
        ("is_over", "u1"),  # OVERLAP, REFUSED: the rest is dropped
        ("pad", "u1"),
    ],
    align=True,
)


OVERLAP, REFUSED = 1, 2


@dataclass(frozen=True, eq=False)
class Fragments(Bundle):
    """The table: DATAGRAM rows, the pieces of each (first block, and block behind), a lock, and how many have begun."""

    datagrams: npt.NDArray[np.void]
    pieces: npt.NDArray[np.uint16]
    lock: npt.NDArray[np.uint64]
    begun: npt.NDArray[np.uint64]


def new_fragments() -> Fragments:
    """Return an empty table."""
    return Fragments(
        datagrams=np.zeros(_DATAGRAMS, DATAGRAM),
        pieces=np.zeros((_DATAGRAMS, 2 * _MOST_PIECES), np.uint16),
        lock=np.zeros(1, np.uint64),
        begun=np.zeros(1, np.uint64),
    )


@inlined
def is_ipv6(packet):
    """Tell whether a fragment is of IPv6: only there the protocol lies so high, whose number IPv4 might have, too."""
    return packet.datagram >> np.uint64(32) != 0


@inlined
def has_transport(packet):
    """Tell whether a fragment is of a protocol with ports."""
    protocol = packet.protocol & ~np.uint8(_IPV6) if is_ipv6(packet) else packet.protocol
    return protocol == _TCP or protocol == _UDP


@inlined
def is_first(packet):
    """Tell whether a fragment is its datagram's first."""
    return swapped16(packet.fragment) & _OFFSET == 0


@inlined
def _age(datagram, now):
    return np.int64(np.uint32(np.uint32(now) - datagram.since))


@inlined
def _bucket(node, packet):
    """Return the first place of a packet's bucket."""
    key = node.tables.control[0].hash_key
    protocol = np.uint8(packet.datagram >> np.uint64(32))
    hashed = hash_tuple(packet.ends, np.uint32(packet.datagram), protocol, key[0], key[1])
    return first_place(hashed, _DATAGRAMS // _WAYS) * _WAYS


@inlined
def find(node, packet, now):
    """Return the row of a fragment's datagram, or MISS. The caller holds the lock."""
    table = node.fragments.datagrams
    first = _bucket(node, packet)
    life = _LIFE_S * np.int64(node.tables.control[0].hertz)
    for row in range(first, first + _WAYS):
        datagram = table[row]
        if datagram.which == packet.datagram and datagram.ends == packet.ends and _age(datagram, now) <= life:
            return np.int64(row)
    return np.int64(MISS)


@inlined
def _piece(packet):
    """Return (first block, block behind, whether it is the last piece) of a fragment; no blocks: its shape is wrong."""
    fields = np.int64(swapped16(packet.fragment))
    is_last = not fields & _MORE
    offset, length = fields & _OFFSET, np.int64(packet.size)
    is_tcp = packet.protocol & ~np.uint8(_IPV6) == _TCP
    least, header = np.int64(1), np.int64(packet.l4) - ETHERNET_BYTES
    if packet.protocol & _IPV6:
        header -= _IPV6_HEADERS  # which do not count
    if offset == 0:  # RFC 1858: a header in pieces hides what it is
        least = np.int64(TCP_BYTES) if is_tcp else np.int64(UDP_BYTES)
    elif offset == 1 and is_tcp:
        least = np.int64(_MOST_BYTES + 1)
    is_whole = is_last or length & 7 == 0
    if length < least or not is_whole or header + offset * 8 + length > _MOST_BYTES:
        return offset, offset, is_last
    return offset, offset + (length + 7) // 8, is_last


@inlined
def _fits(node, row, first, behind, is_last):
    """Return FORWARDED if a piece fits to those that have come, else why it is to be dropped."""
    datagram, pieces = node.fragments.datagrams[row], node.fragments.pieces[row]
    if datagram.is_over:
        return Reason.FRAGMENT_OVERLAP if datagram.is_over == OVERLAP else Reason.FRAGMENT_ALONE
    overlaps = np.int64(datagram.total) != 0 and (behind > np.int64(datagram.total) or is_last)
    for piece in range(datagram.pieces):
        low, high = np.int64(pieces[2 * piece]), np.int64(pieces[2 * piece + 1])
        if low <= first and behind <= high:
            return Reason.FRAGMENT_AGAIN
        overlaps |= first < high and low < behind
        overlaps |= is_last and high > behind
    if overlaps:
        datagram.is_over = OVERLAP
        return Reason.FRAGMENT_OVERLAP
    return Reason.FRAGMENT_BROKEN if datagram.pieces == _MOST_PIECES else Reason.FORWARDED


@inlined
def _note(node, row, first, behind, is_last):
    """Note that a piece has come; forget the datagram if it was the last one that was missing."""
    datagram, pieces = node.fragments.datagrams[row], node.fragments.pieces[row]
    piece = np.int64(datagram.pieces)
    pieces[2 * piece] = np.uint16(first)
    pieces[2 * piece + 1] = np.uint16(behind)
    datagram.pieces = piece + 1
    datagram.blocks = np.int64(datagram.blocks) + behind - first
    if is_last:
        datagram.total = behind
    if datagram.blocks == datagram.total:
        datagram.which = 0


@compiled
def lead(node, now):
    """Return FORWARDED if a first fragment may begin its datagram, else why it is to be dropped."""
    packet, fragments = node.packet[0], node.fragments
    first, behind, is_last = _piece(packet)
    lock(fragments.lock)
    row = find(node, packet, now)
    reason = Reason.FORWARDED
    if row != MISS:
        datagram = fragments.datagrams[row]
        if _age(datagram, now) > _LEAD_S * np.int64(node.tables.control[0].hertz):
            datagram.which = 0
        else:
            reason = _fits(node, row, first, behind, is_last)
    if reason == Reason.FORWARDED and first == behind:
        reason = Reason.FRAGMENT_BROKEN
    unlock(fragments.lock)
    return reason


@compiled
def begin(node, ports, is_over, now):
    """Note a first fragment, so that the others of its datagram follow it; with `is_over` they are dropped."""
    packet, fragments = node.packet[0], node.fragments
    first, behind, is_last = _piece(packet)
    lock(fragments.lock)
    row = find(node, packet, now)
    if row == MISS:
        oldest, place = np.int64(-1), _bucket(node, packet)
        for way in range(place, place + _WAYS):
            age = _age(fragments.datagrams[way], now) if fragments.datagrams[way].which else np.int64(1 << 32)
            if age > oldest:
                row, oldest = np.int64(way), age
    datagram = fragments.datagrams[row]
    datagram.ends = packet.ends
    datagram.which = packet.datagram
    datagram.ports = ports
    datagram.since = now
    datagram.pieces = 0
    datagram.blocks = 0
    datagram.total = 0
    datagram.is_over = is_over
    _note(node, row, first, behind, is_last)
    store_release(fragments.begun, 0, fragments.begun[0] + np.uint64(1))
    unlock(fragments.lock)


@compiled
def refuse(node, reason, now):
    """Note that a first fragment is dropped, so that the others of its datagram need not wait for it."""
    packet = node.packet[0]
    is_its_own = reason == Reason.FRAGMENT_ALONE or Reason.FRAGMENT_OVERLAP <= reason <= Reason.FRAGMENT_BROKEN
    is_known = reason != Reason.MALFORMED  # whose it is, if its header can be believed
    if is_first(packet) and has_transport(packet) and is_known and not is_its_own:
        begin(node, np.uint32(0), np.uint8(REFUSED), now)


@inlined
def shape(packet):
    """Return FORWARDED if a later fragment is one of a datagram that may be, else FRAGMENT_BROKEN."""
    first, behind, _ = _piece(packet)
    return Reason.FRAGMENT_BROKEN if first == behind or first == 0 else Reason.FORWARDED


@inlined
def check(node, row):
    """Return FORWARDED if a later fragment fits to what has come of its datagram; the caller holds the lock."""
    first, behind, is_last = _piece(node.packet[0])
    if first == behind or first == 0:
        return Reason.FRAGMENT_BROKEN
    return _fits(node, row, first, behind, is_last)


@inlined
def note(node, row):
    """Note that a later fragment was forwarded; the caller holds the lock."""
    first, behind, is_last = _piece(node.packet[0])
    _note(node, row, first, behind, is_last)
