"""One frame from start to verdict, in userspace: parse - flow - service - admit - rewrite.

The same stages in the same order, with the same words, as xdp/bpf/lb.c and the picture in docs/architecture.md. What
XDP punts comes here; with the engines that have no XDP program to forward, everything does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conntrack import compiled as flows
from dataplane import hops_compiled, wire
from dataplane.hops_compiled import Hops
from lb import compiled as services
from xdp.bundle import Bundle
from xdp.jit import compiled, inlined
from xdp.schema import Direction, Event, HopState, Protocol, Reason
from xdp.tables import Tables

_TCP = int(Protocol.TCP)
_ORIGINAL = int(Direction.ORIGINAL)
_SYN, _RST, _DATA = int(Event.SYN), int(Event.RST), int(Event.DATA)
_FORWARD, _UNRESOLVED = int(HopState.FORWARD), int(HopState.UNRESOLVED)
_ENDPOINTS_TRIED = 8  # when replies would clash: with two thirds of a client's ports taken, 4 % of new flows fail

NOWHERE = 0  # the egress of a frame that is not forwarded
AWAITED = 0xFFFFFFFF  # the egress of a frame whose next hop may be known soon: to be tried again


@dataclass(frozen=True, eq=False)
class Node(Bundle):
    """All that the stages read and write: the shared tables, the way to every address, and Maglev's seed.

    `packet` is one PACKET record of scratch space: every packet loop has its own Node.
    """

    tables: Tables
    hops: Hops
    seed: np.uint64
    packet: npt.NDArray[np.void]


@inlined
def _way_to(tables, row, ttl, length):
    """Return (FORWARDED, egress ifindex) of a frame to next hop `row`; else why not, and NOWHERE or AWAITED."""
    hop = tables.next_hops[row]
    if ttl <= 1:
        return Reason.TTL_EXPIRED, np.uint32(NOWHERE)
    if hop.state == _UNRESOLVED:
        return Reason.NO_NEXT_HOP, np.uint32(AWAITED)
    if hop.state != _FORWARD:
        return Reason.NOT_FORWARDABLE, np.uint32(NOWHERE)
    if length > np.int64(hop.mtu) + wire.ETHERNET_BYTES:
        return Reason.TOO_BIG, np.uint32(NOWHERE)
    return Reason.FORWARDED, hop.ifindex


@inlined
def _forward(node, frames, start, length, slot, event, now):
    """Rewrite: send a packet along its flow. Return (reason, egress ifindex)."""
    tables, packet = node.tables, node.packet[0]
    flow = tables.flows[slot]
    row = np.int64(flow.next_hop)
    reason, egress = _way_to(tables, row, packet.ttl, length)
    if reason == Reason.FORWARDED:
        flows.touch(tables, slot, event, length, now)
        wire.rewrite(frames, start, packet.l4, flow, tables.next_hops, row)
    return reason, egress


@inlined
def _admit(node, frames, start, length, service, event, now):
    """Admit: choose an endpoint for a new connection, insert both directions, send. Return (reason, egress ifindex)."""
    tables, packet = node.tables, node.packet[0]
    addrs, ports, protocol = packet.addrs, packet.ports, packet.protocol
    nowhere = np.uint32(NOWHERE)

    if packet.ttl <= 1:
        return Reason.TTL_EXPIRED, nowhere
    state = tables.machine[0].first_state[event]
    if state == 0:
        return Reason.STRAY_RST if event == _RST else Reason.BAD_FLAGS, nowhere
    hop_back = hops_compiled.lookup(node.hops, np.uint32(addrs))
    if hop_back < 0:
        return Reason.NO_NEXT_HOP, np.uint32(AWAITED if hop_back == hops_compiled.PENDING else NOWHERE)
    for attempt in range(_ENDPOINTS_TRIED):
        row = services.select(tables, service, addrs, ports, protocol, node.seed, attempt)
        if row == services.MISS:
            return Reason.NO_ENDPOINT, nowhere
        endpoint = tables.endpoints[row]
        reason, egress = _way_to(tables, np.int64(endpoint.next_hop), packet.ttl, length)
        if reason != Reason.FORWARDED:
            return reason, egress
        new_addrs = np.uint64(endpoint.addr) << np.uint64(32) | addrs & np.uint64(0xFFFFFFFF)
        new_ports = np.uint32(endpoint.port) << np.uint32(16) | ports & np.uint32(0xFFFF)
        slot = flows.insert(
            tables, addrs, ports, new_addrs, new_ports, protocol, state, endpoint.next_hop, np.uint32(hop_back), now
        )
        if slot == flows.FULL:
            flows.drop_early(tables, addrs, ports, new_addrs, new_ports, protocol, now)
            return Reason.TABLE_FULL, nowhere
        if slot != flows.TAKEN:
            reason, egress = _forward(node, frames, start, length, slot, event, now)
            return Reason.ADMITTED if reason == Reason.FORWARDED else reason, egress
        # The endpoint talks to this client and port already, through another frontend: the reply could not be told
        # apart. (Or another writer is about to publish this very connection.)
        slot = flows.find(tables, addrs, ports, protocol)
        if slot != flows.MISS:
            return _forward(node, frames, start, length, slot, event, now)
    return Reason.REPLY_CLASH, nowhere


@inlined
def _translate_error(node, frames, start, length, now):
    """Send an ICMP error along the flow whose packet it quotes. Return (reason, egress ifindex)."""
    tables, packet = node.tables, node.packet[0]
    slot = flows.find(tables, packet.addrs, packet.ports, packet.protocol)
    if slot == flows.MISS or flows.is_expired(tables, slot, now):
        return Reason.ICMP_UNUSABLE, np.uint32(NOWHERE)
    flow = tables.flows[slot]
    row = np.int64(flow.next_hop)
    reason, egress = _way_to(tables, row, packet.ttl, length)
    if reason == Reason.FORWARDED:
        wire.translate_error(frames, start, packet.l4, flow, tables.next_hops, row)
    return reason, egress


@compiled
def handle(node, frames, start, length, now):
    """Take a frame, `frames[start : start + length]`, to its verdict; return (reason, egress).

    `egress` is an ifindex, NOWHERE or AWAITED.

    FORWARDED and ADMITTED: the frame was rewritten where it lies and is to be transmitted. Any other reason: it is as
    it was, and what is to happen is the reason's verdict. With AWAITED (the reason is NO_NEXT_HOP) nothing was stored,
    and the frame may be tried again when control.next_hop_epoch has grown.
    """
    tables, packet = node.tables, node.packet[0]

    found = wire.parse(frames, start, length, packet)
    destination = np.uint32(packet.addrs >> np.uint64(32))
    if found == Reason.VIP_FRAGMENT:
        is_vip = services.find_frontend(tables, destination, np.uint16(0), np.uint8(0)) != services.MISS
        return Reason.FRAGMENT if is_vip else Reason.OTHER_FRAGMENT, np.uint32(NOWHERE)
    if found == Reason.ICMP_ERROR:
        return _translate_error(node, frames, start, length, now)
    if found != Reason.FORWARDED:
        return found, np.uint32(NOWHERE)

    event = _DATA
    if packet.protocol == _TCP:
        event = np.int64(tables.machine[0].event_of_flags[packet.tcp_flags])
    slot = flows.find(tables, packet.addrs, packet.ports, packet.protocol)
    if slot != flows.MISS:
        flow = tables.flows[slot]
        reopened = event == _SYN and flow.direction == _ORIGINAL and tables.machine[0].reopens[flow.state & 15]
        if not reopened and not flows.is_expired(tables, slot, now):
            return _forward(node, frames, start, length, slot, event, now)

    service = services.find_frontend(tables, destination, np.uint16(packet.ports >> np.uint32(16)), packet.protocol)
    if service == services.MISS:
        return Reason.NOT_OURS, np.uint32(NOWHERE)
    if slot != flows.MISS:
        flows.withdraw(tables, slot)
    return _admit(node, frames, start, length, service, event, now)
