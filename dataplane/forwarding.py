"""Rewrite: frames that go along a flow."""

from __future__ import annotations

import numpy as np

from conntrack import compiled as flows
from dataplane import fragments, wire, wire6
from dataplane.context import AWAITED, KERNEL, NOWHERE
from lb import compiled as services
from xdp.jit import inlined
from xdp.schema import Direction, HopState, Protocol, Reason

_IPV6 = int(Protocol.IPV6)
_REPLY = int(Direction.REPLY)
_FORWARD, _UNRESOLVED, _KERNEL = int(HopState.FORWARD), int(HopState.UNRESOLVED), int(HopState.KERNEL)


@inlined
def way_to(tables, row, ttl, longest):
    """Return (FORWARDED, egress) of a frame to next hop `row`; else why not, and NOWHERE or AWAITED."""
    hop = tables.next_hops[row]
    if ttl <= 1:
        return Reason.TTL_EXPIRED, np.uint32(NOWHERE)
    if hop.state == _UNRESOLVED:
        return Reason.NO_NEXT_HOP, np.uint32(AWAITED)
    if hop.state == _KERNEL:
        return Reason.FORWARDED, np.uint32(KERNEL)
    if hop.state != _FORWARD:
        return Reason.NOT_FORWARDABLE, np.uint32(NOWHERE)
    if longest > np.int64(hop.mtu) + wire.ETHERNET_BYTES:
        return Reason.TOO_BIG, np.uint32(NOWHERE)
    return Reason.FORWARDED, hop.ifindex


@inlined
def reaches_itself(flow):
    """Tell whether an endpoint reaches itself by way of the kernel: its packets' addresses change places (find.c)."""
    return flow.new_src_addr == flow.dst_addr and flow.new_dst_addr == flow.src_addr


@inlined
def is_left_to_egress(flow):
    """Tell whether packets that the kernel routes are translated as they leave (egress.c), and not before.

    Not those to an address of the node: the kernel would keep them.
    """
    return flow.direction == _REPLY and flow.new_dst_addr == flow.dst_addr


@inlined
def _comes_from_here(tables, flow):
    """Tell whether a packet would come from an address of the node, which its kernel takes from nobody.

    That of a masqueraded request, or of a reply whose VIP is the node's own.
    """
    if flow.direction == _REPLY:
        return not services.is_vip(tables, flow.new_src_addr, flow.protocol)
    return flow.new_src_addr != flow.src_addr and not reaches_itself(flow)


@inlined
def forward(node, frames, start, length, longest, slot, event, now):
    """Send a packet along its flow. Return (reason, egress ifindex)."""
    tables, packet = node.tables, node.packet[0]
    flow = tables.flows[slot]
    row = np.int64(flow.next_hop)
    reason, egress = way_to(tables, row, packet.ttl, longest)
    packet.next_hop = row
    if egress == KERNEL:
        if is_left_to_egress(flow):
            return Reason.TO_KERNEL, egress
        if _comes_from_here(tables, flow):
            return Reason.NOT_FORWARDABLE, np.uint32(NOWHERE)
        reason, row = Reason.TO_KERNEL, np.int64(wire.TO_KERNEL)
    if reason == Reason.FORWARDED or reason == Reason.TO_KERNEL:
        if packet.fragment:
            fragments.begin(node, packet.ports, np.uint8(0), now)
        flows.touch(tables, slot, event, length, now)
        if packet.protocol & _IPV6:
            wire6.rewrite(frames, start, packet.l4, flow, tables, row)
        else:
            wire.rewrite(frames, start, packet.l4, flow, tables.next_hops, row)
    return reason, egress
