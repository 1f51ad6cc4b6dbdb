"""Flows follow their routes, compiled: who goes by a row of routes is given the one that his route leads to now."""

from __future__ import annotations

import numpy as np

from conntrack.compiled import tag_at
from dataplane.hops_compiled import MISS, NO_ROUTE, ON_LINK, host_row, route_target, route_target6
from xdp.atomic import load_acquire
from xdp.byteorder import swapped32, swapped64
from xdp.jit import compiled
from xdp.schema import Protocol, Tag

_FIRST = np.uint64(Tag.FIRST)
_IPV6 = int(Protocol.IPV6)


@compiled
def _target_of(tables, hops, record):
    """Return the row that the packets of a record are to leave by, or MISS if it stays as it is."""
    address = swapped32(record.new_dst_addr)
    if record.protocol & _IPV6:
        halves = tables.names[address].addr
        target = np.int64(route_target6(hops, swapped64(halves[0]), swapped64(halves[1])))
    else:
        target = np.int64(route_target(hops, address))
    if target == NO_ROUTE:
        return MISS
    return host_row(hops, address) if target == ON_LINK else target


@compiled
def follow(tables, hops, is_shared):
    """Change the next hops of flows that go by rows of routes (`is_shared`: u8 by row) to the rows for them now.

    Return how many have changed.
    """
    tags, flows, count = tables.tags, tables.flows, 0
    for slot in range(len(flows)):
        if not slot & 3 and not load_acquire(tags, slot >> 2):
            continue
        if tag_at(tags, slot) < _FIRST:
            continue
        record = flows[slot]
        row = np.int64(record.next_hop)
        if row >= len(is_shared) or not is_shared[row]:
            continue
        target = _target_of(tables, hops, record)
        if target != MISS and target != row:
            record.next_hop = np.uint32(target)
            count += 1
    return count
