"""ICMP errors go to whoever has sent the packet that they quote, translated as that was.

That is what its flow says. Where nodes share a VIP, ECMP brings errors about a connection to any of them, as they come
from routers on the way. One of no flow goes to the endpoint that this node would give the connection to if its next
packet came here: to the one that it has, where every node chooses alike. Nothing is remembered (docs/adr/0043).
"""

from __future__ import annotations

import numpy as np

from conntrack import compiled as flows
from dataplane import wire, wire6
from dataplane.choosing import begins_with, choose, chooser, is_martian, is_masqueraded, row_for
from dataplane.context import KERNEL, NOWHERE
from dataplane.forwarding import is_left_to_egress, way_to
from lb import compiled as services
from xdp.jit import compiled, inlined
from xdp.schema import Event, Limit, Protocol, Reason, Scheduler, State

_TCP, _IPV6 = int(Protocol.TCP), int(Protocol.IPV6)
_ACK, _DATA = int(Event.ACK), int(Event.DATA)
_MAGLEV = int(Scheduler.MAGLEV)
_RESET, _STATE_BITS = int(State.RESET), int(Limit.STATE_BITS)


@compiled
def translate_error(node, frames, start, longest, now):
    """Send an ICMP error along the flow whose packet it quotes, or would be. Return (reason, egress ifindex)."""
    tables, packet = node.tables, node.packet[0]
    slot = flows.find(tables, packet.addrs, packet.ports, packet.protocol)
    if slot != flows.MISS:
        if not flows.is_expired(tables, slot, now):
            return _send(node, frames, start, tables.flows[slot], longest)
        if tables.flows[slot].state & _STATE_BITS == _RESET:  # who sends next is reset, and not adopted
            return Reason.ICMP_UNUSABLE, np.uint32(NOWHERE)
    if not _imagine(node, frames, start, now):
        return Reason.ICMP_UNUSABLE, np.uint32(NOWHERE)
    return _send(node, frames, start, node.imagined[0], longest)


@inlined
def _is_to_sender(frames, start, packet):
    if packet.protocol & _IPV6:
        return wire6.is_to_sender(frames, start, packet)
    return wire.is_to_sender(frames, start, packet)


@inlined
def _imagine(node, frames, start, now):
    """Fill `node.imagined` with the flow that what an ICMP error quotes, turned round, would be of.

    Tell whether it would be adopted: by a Service port that chooses alike on every node, and from its own address.
    """
    tables, packet = node.tables, node.packet[0]
    client, vip = np.uint32(packet.addrs), np.uint32(packet.addrs >> np.uint64(32))
    row = services.find_frontend(tables, vip, np.uint16(packet.ports >> np.uint32(16)), packet.protocol)
    if row == services.MISS or not services.is_vip(tables, vip, packet.protocol):
        return False
    if not _is_to_sender(frames, start, packet) or is_martian(packet, frames, start):
        return False
    row = row_for(node, row, frames, start)
    if row == services.MISS:
        return False
    service = tables.services[row]
    event = _ACK if packet.protocol & ~np.uint8(_IPV6) == _TCP else _DATA
    if begins_with(service, tables.machine[0].first_state[event], event) != Reason.ADMITTED:
        return False
    if service.scheduler != _MAGLEV:
        return False
    whose, which = chooser(node, service, frames, start)
    endpoint = tables.endpoints[choose(node, row, whose, which, 0, now)]
    if is_masqueraded(node, service, endpoint, frames, start):  # from a port that another node knows
        return False
    flow = node.imagined[0]
    flow.src_addr = client
    flow.dst_addr = vip
    flow.protocol = packet.protocol
    flow.new_src_addr = client
    flow.new_dst_addr = endpoint.addr
    flow.new_src_port = np.uint16(packet.ports)
    flow.new_dst_port = endpoint.port
    flow.next_hop = endpoint.next_hop
    return True


@compiled
def _send(node, frames, start, flow, longest):
    """Send an ICMP error along a flow. Return (reason, egress ifindex)."""
    tables, packet = node.tables, node.packet[0]
    if packet.source_routed and packet.ttl > 1:
        return Reason.SOURCE_ROUTED, np.uint32(NOWHERE)
    row = np.int64(flow.next_hop)
    reason, egress = way_to(tables, row, packet.ttl, longest)
    if egress == KERNEL:
        reason, row = Reason.TO_KERNEL, np.int64(wire.TO_KERNEL)
        if is_left_to_egress(flow):
            return reason, egress
    if reason == Reason.FORWARDED or reason == Reason.TO_KERNEL:
        if packet.protocol & _IPV6:
            wire6.translate_error(frames, start, packet, flow, tables, row)
        else:
            wire.translate_error(frames, start, packet.l4, flow, tables.next_hops, row)
    return reason, egress
