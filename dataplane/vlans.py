"""VLAN tags: taken off a frame at the door of the pipeline, and put back on whatever leaves by it.

Up to two of them stand between the MAC addresses and the type. They are remembered in the packet's record, and the MAC
addresses move to where they are: from there on it is an untagged frame, to be parsed, rewritten or answered like all
others. At the end its addresses move back, and the tags stand where they stood.

`parse` is the compiled twin of parse_vlan_tags() in xdp/bpf/parse.h: the same guards in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from dataplane.settings import joined_vlans
from xdp.byteorder import swapped16
from xdp.jit import compiled, inlined
from xdp.schema import Limit, Reason
from xdp.unaligned import load16, load32, load64, store16, store32, store64

VLAN_TAG_BYTES = int(Limit.VLAN_TAG_BYTES)
MOST_BYTES = 2 * VLAN_TAG_BYTES

_TYPE = 12  # its offset, which is that of the first tag
_TYPE_VLAN, _TYPE_SERVICE = 0x0081, 0xA888  # 0x8100 and 0x88a8 on the wire
_ID = 0x0FFF
_RESERVED = int(Limit.RESERVED_VLAN)
_WORDS = int(Limit.VLAN_WORDS)


def words_of(ranges: Iterable[tuple[int, int]]) -> npt.NDArray[np.uint64]:
    """Return the VLANs that are served as a bit for each, as packet paths look them up."""
    bits = sum((1 << last + 1) - (1 << first) for first, last in joined_vlans(ranges))
    return np.frombuffer(bits.to_bytes(8 * _WORDS, "little"), np.uint64)


@inlined
def is_tag(frames, offset):
    """Tell whether a VLAN tag stands at an offset, where an untagged frame has its type."""
    kind = load16(frames, offset)
    return kind == _TYPE_VLAN or kind == _TYPE_SERVICE


@inlined
def _vlan_at(frames, offset):
    return np.int64(swapped16(load16(frames, offset + 2))) & _ID


@compiled
def parse(frames, start, length, served):
    """Return (FORWARDED, bytes of VLAN tags) of a tagged frame whose VLAN is in `served`; else (why it is passed, 0).

    The outer tag tells the VLAN or, where that is a priority tag, the inner one. Without a tag: NOT_IPV4.
    """
    tag, stop = start + _TYPE, start + length
    inner, count = np.int64(0), np.int64(1)
    if tag + 2 > stop or not is_tag(frames, tag):
        return Reason.NOT_IPV4, np.int64(0)
    if tag + 6 > stop:
        return Reason.TOO_SHORT, np.int64(0)
    vlan = _vlan_at(frames, tag)
    if is_tag(frames, tag + 4):
        if tag + 10 > stop:
            return Reason.TOO_SHORT, np.int64(0)
        if is_tag(frames, tag + 8):
            return Reason.OTHER_VLAN, np.int64(0)
        inner = _vlan_at(frames, tag + 4)
        vlan, count = vlan or inner, np.int64(2)
    if inner == _RESERVED or not served[vlan >> 6] >> np.uint64(vlan & 63) & np.uint64(1):
        return Reason.OTHER_VLAN, np.int64(0)
    return Reason.FORWARDED, count * VLAN_TAG_BYTES


@inlined
def take_off(node, frames, start, length):
    """Take the tags off a frame, so that an untagged one begins `node.packet[0].vlan_bytes` later; return FORWARDED.

    Else the frame is to be passed for the reason that is returned, and is as it was.
    """
    packet = node.packet[0]
    packet.vlan_bytes = 0
    packet.length = length
    if length < _TYPE + 2 or not is_tag(frames, start + _TYPE):
        return np.int64(Reason.FORWARDED)
    reason, count = parse(frames, start, length, node.tables.control[0].vlans)
    if count:
        packet.vlan_bytes = count
        packet.outer_tag = load32(frames, start + _TYPE)
        if count > VLAN_TAG_BYTES:
            packet.inner_tag = load32(frames, start + _TYPE + VLAN_TAG_BYTES)
        _move_macs(frames, start, start + count)
    return np.int64(reason)


@inlined
def put_back(node, frames, start):
    """Put the tags back on what `take_off` has made an untagged frame of, or what that has become."""
    packet = node.packet[0]
    count = np.int64(packet.vlan_bytes)
    if count:
        _move_macs(frames, start + count, start)
        store32(frames, start + _TYPE, packet.outer_tag)
        if count > VLAN_TAG_BYTES:
            store32(frames, start + _TYPE + VLAN_TAG_BYTES, packet.inner_tag)
        packet.length += np.uint32(count)


@inlined
def more_bytes(packet):
    """Return how many bytes of tags count against the MTU: all but those of one, for which every link has room."""
    return max(np.int64(packet.vlan_bytes) - VLAN_TAG_BYTES, np.int64(0))


@inlined
def insert(frames, start, kind, control):
    """Insert a tag, of which a driver has told us aside; the frame begins VLAN_TAG_BYTES before `start` then.

    `kind` (0x8100, say) and `control` are numbers.
    """
    front = start - VLAN_TAG_BYTES
    _move_macs(frames, start, front)
    store16(frames, front + _TYPE, swapped16(kind))
    store16(frames, front + _TYPE + 2, swapped16(control))


@inlined
def _move_macs(frames, source, to):
    first, second = load64(frames, source), load32(frames, source + 8)
    store64(frames, to, first)
    store32(frames, to + 8, second)
