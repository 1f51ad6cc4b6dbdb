"""Passes over all connections, for the control plane: list them, count them, end those that have lost their endpoint.

A pass lists the slots of original directions first (`used_slots`), then looks at each record. One that has been
withdrawn meanwhile is still what it was: slots are freed by the sweep, which waits for a pass to end, and by XDP a
second after it has retired them; so what is looked at is read from the record then, not from the list.
"""

from __future__ import annotations

import numpy as np

from conntrack.compiled import ask_ahead, tag_at, with_state, withdraw
from xdp.atomic import load_acquire
from xdp.jit import compiled, inlined
from xdp.schema import Direction, Limit, Protocol, State, Tag

_FIRST = np.uint64(Tag.FIRST)
_ORIGINAL = np.uint8(Direction.ORIGINAL)
_RESET, _STATE_BITS = np.uint8(State.RESET), np.uint8(Limit.STATE_BITS)
_IPV6, _TCP = int(Protocol.IPV6), int(Protocol.TCP)
_OVER = 2  # the class of states.EARLY_DROP that is closing, or to be reset
_LANE = np.uint64(0xFFFF)


@compiled
def count_used(tags):
    """Return how many slots hold a published record."""
    used = 0
    for word in range(len(tags)):
        seen = load_acquire(tags, word)
        if seen:
            for lane in range(4):
                used += (seen >> np.uint64(lane << 4) & _LANE) >= _FIRST
    return used


@compiled
def used_slots(tags, flows, way, out):
    """Fill `out` (i64) with the slots of published records of direction `way`; return how many there are."""
    count = 0
    for word in range(len(tags)):
        ask_ahead(tags, flows, word)
        if not load_acquire(tags, word):
            continue
        for slot in range(word << 2, word + 1 << 2):
            if tag_at(tags, slot) >= _FIRST and flows[slot].direction == way and count < len(out):
                out[count] = slot
                count += 1
    return count


@compiled
def mark_next_hops(tags, flows, used):
    """Note in `used` (u8, by row of next_hops) which rows flows of either direction have."""
    for word in range(len(tags)):
        ask_ahead(tags, flows, word)
        if not load_acquire(tags, word):
            continue
        for slot in range(word << 2, word + 1 << 2):
            if tag_at(tags, slot) >= _FIRST and flows[slot].next_hop < len(used):
                used[flows[slot].next_hop] = 1


@inlined
def place_key(addr, port):
    """Return an address and a port, as on the wire, as one u64."""
    return np.uint64(addr) | np.uint64(port) << np.uint64(32)


@inlined
def _place_of_pair(firsts, seconds, first, second):
    """Return where (first, second) is among pairs that ascend by both, or would be."""
    low, high = 0, len(firsts)
    while low < high:
        middle = (low + high) >> 1
        if firsts[middle] < first or (firsts[middle] == first and seconds[middle] < second):
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def _has_pair(firsts, seconds, first, second):
    """Tell whether (first, second) is among pairs that ascend by both."""
    place = _place_of_pair(firsts, seconds, first, second)
    return place < len(firsts) and firsts[place] == first and seconds[place] == second


@inlined
def _frontend_of(record):
    return place_key(record.dst_addr, record.dst_port)


@inlined
def _endpoint_of(record):
    return place_key(record.new_dst_addr, record.new_dst_port)


@inlined
def _has(places, place):
    return _has_pair(places, places, place, place)


@inlined
def _reset(flows, record):
    """Have a connection reset: both its directions are over for packets, and whoever sends next is told."""
    record.state = with_state(record.state, _RESET)
    flows[record.peer].state = record.state


@compiled
def withdraw_strays(tables, slots, protocol, frontends, endpoints):
    """Withdraw the connections of a protocol but those from frontends[i] to endpoints[i] for any i; return how many.

    Both are u64 arrays of `place_key`s, and ascend as pairs. `slots`, here and below, are those of originals.
    """
    count = 0
    for slot in slots:
        record = tables.flows[slot]
        if record.protocol != protocol or _has_pair(frontends, endpoints, _frontend_of(record), _endpoint_of(record)):
            continue
        count += withdraw(tables, slot)
    return count


@compiled
def reset_strays(tables, slots, protocol, wanted, frontends, endpoints):
    """Have those of a protocol's connections to one of `wanted` reset, if it is TCP, that `withdraw_strays` would end.

    Others are withdrawn. Return how many were not already. `wanted` is a u64 array of `place_key`s of frontends, and
    ascends.
    """
    count = 0
    for slot in slots:
        record = tables.flows[slot]
        if record.protocol != protocol or record.state & _STATE_BITS == _RESET:
            continue
        frontend = _frontend_of(record)
        if not _has(wanted, frontend) or _has_pair(frontends, endpoints, frontend, _endpoint_of(record)):
            continue
        if protocol & ~_IPV6 == _TCP:
            _reset(tables.flows, record)
            count += 1
        else:
            count += withdraw(tables, slot)
    return count


@compiled
def end_at(tables, slots, protocol, endpoints):
    """Have a protocol's connections to these endpoints reset, if it is TCP, or withdraw them; return how many.

    `endpoints` is a u64 array of `place_key`s, and ascends.
    """
    count = 0
    for slot in slots:
        record = tables.flows[slot]
        if record.protocol != protocol or record.state & _STATE_BITS == _RESET:
            continue
        if not _has(endpoints, _endpoint_of(record)):
            continue
        if protocol & ~_IPV6 == _TCP:
            _reset(tables.flows, record)
            count += 1
        else:
            count += withdraw(tables, slot)
    return count


@compiled
def count_open(tables, slots, endpoints, counts):
    """Add to `counts` (u32) how many connections to each of `endpoints` are neither closing nor to be reset.

    `endpoints` is a u64 array of `place_key`s, and ascends.
    """
    rules = tables.machine[0]
    for slot in slots:
        record = tables.flows[slot]
        if rules.early_drop[record.state & _STATE_BITS] == _OVER:
            continue
        wanted = _endpoint_of(record)
        place = _place_of_pair(endpoints, endpoints, wanted, wanted)
        if place < len(endpoints) and endpoints[place] == wanted:
            counts[place] += np.uint32(1)
