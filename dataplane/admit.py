"""Admit: choose an endpoint for a new connection, and insert it. What xdp/bpf/admit.c does where it may."""

from __future__ import annotations

import numpy as np

from conntrack import compiled as flows
from dataplane import hops_compiled, wire6
from dataplane.choosing import begins_with, choose, chooser, is_masqueraded, row_for
from dataplane.context import AWAITED, NOWHERE
from dataplane.forwarding import forward, way_to
from dataplane.snat_ports import is_occupied, range_for
from lb import affinity
from lb import compiled as services
from xdp import naming
from xdp.byteorder import swapped16, swapped32, swapped64
from xdp.hash import hash_tuple
from xdp.jit import inlined
from xdp.schema import HopState, Needs, Protocol, Reason, State

_IPV6, _ICMP, _ICMPV6 = int(Protocol.IPV6), int(Protocol.ICMP), int(Protocol.ICMPV6)
_UNRESOLVED, _KERNEL = int(HopState.UNRESOLVED), int(HopState.KERNEL)
_AFFINITY = int(Needs.AFFINITY)
_LOW = np.uint64(0xFFFFFFFF)
_DESTINATION = np.uint64(0xFFFFFFFF00000000)  # of both addresses
_ADOPTED = int(State.ADOPTED)
_NO_PORT, _NO_ADDRESS, _PORT_IS_LOST = -4, -5, -6  # beside what flows.insert returns
_PORTS_TRIED = 64  # with nine tenths of the ports taken, one new connection of a thousand finds none
_ENDPOINTS_TRIED = 8  # when replies would clash; with the last, other ports of the client are tried


@inlined
def _is_echo(packet):
    """Tell whether a packet is an echo request: its identifier stands for a port, and an endpoint has none."""
    return packet.protocol == _ICMP or packet.protocol == _ICMPV6 | _IPV6


@inlined
def _insert(node, endpoint, new_addrs, port, state, hop_back, now):
    """Insert the packet's connection to an endpoint, with a source port as on the wire; return as flows.insert does."""
    tables, packet = node.tables, node.packet[0]
    addrs, ports, protocol = packet.addrs, packet.ports, packet.protocol
    endpoint_port = np.uint32(0) if _is_echo(packet) else np.uint32(endpoint.port)
    new_ports = endpoint_port << np.uint32(16) | np.uint32(port)
    slot = flows.insert(
        tables, addrs, ports, new_addrs, new_ports, protocol, state, endpoint.next_hop, hop_back, now
    )  # fmt: skip
    if slot == flows.FULL:
        flows.drop_early(tables, addrs, ports, new_addrs, new_ports, protocol, now)
    return slot


@inlined
def _source_towards(tables, packet, endpoint):
    """Return the address that the packet's connection is to come from: the node's own on the way, or 0 if it has none.

    By way of the kernel, which takes no packet from its own address, an endpoint reaches itself from the VIP: its
    answers go where VIPs are routed, and turn round as they leave (xdp/bpf/egress.c).
    """
    hop = tables.next_hops[np.int64(endpoint.next_hop)]
    if hop.state != _KERNEL or endpoint.addr != np.uint32(packet.addrs):
        return hop.source
    vip = np.uint32(packet.addrs >> np.uint64(32))
    return vip if services.is_vip(tables, vip, packet.protocol) else np.uint32(0)


@inlined
def _may_leave_from(node, source, port):
    """Tell whether a connection may leave from a port: no socket of the node has it, and it is no Service's.

    Identifiers of echo requests are nobody's.
    """
    if _is_echo(node.packet[0]):
        return True
    if is_occupied(node.masquerading, port):
        return False
    return services.find_frontend(node.tables, source, swapped16(port), node.packet[0].protocol) == services.MISS


@inlined
def _insert_from_a_port(node, endpoint, address, sources, choices, state, hop_back, now):
    """Insert the packet's connection from a port of `address`: the client's own, if it may be, else any of its class.

    Of an echo request, from an identifier: the client's own, or any.

    To allocate a port *is* to insert the reply's key: TAKEN means another one. The five-tuple and the table's secret
    give where to begin and how far to go on (double hashing), so that no two connections try the same ports in the same
    order: with a common step, runs of taken ports grow. NO_PORT: all that were tried are taken.
    Where there are `choices`, each try draws one of these `sources`, too.
    """
    tables, packet, masquerading = node.tables, node.packet[0], node.masquerading
    port = np.uint64(swapped16(packet.ports & np.uint32(0xFFFF)))
    first, count = (np.uint64(0), np.uint64(1 << 16)) if _is_echo(packet) else range_for(masquerading, port)
    hash_key = tables.control[0].hash_key
    tried = hash_tuple(packet.addrs, packet.ports, packet.protocol, hash_key[1], hash_key[0])
    if port - first >= count:  # u64: also if it is below
        port = first + ((tried >> np.uint64(32)) * count >> np.uint64(32))
    step = hash_tuple(packet.addrs, packet.ports, packet.protocol, hash_key[0], hash_key[1]) | np.uint64(1)
    for _ in range(_PORTS_TRIED):
        source = sources[np.int64((tried & _LOW) * np.uint64(choices) >> np.uint64(32))] if choices else address
        if _may_leave_from(node, source, port):
            new_addrs = np.uint64(endpoint.addr) << np.uint64(32) | np.uint64(source)
            slot = _insert(node, endpoint, new_addrs, swapped16(port), state, hop_back, now)
            if slot != flows.TAKEN or flows.find(tables, packet.addrs, packet.ports, packet.protocol) != flows.MISS:
                return slot
        tried += step
        port = first + ((tried >> np.uint64(32)) * count >> np.uint64(32))
    return np.int64(_NO_PORT)


@inlined
def _begin(node, service, endpoint, state, hop_back, frames, start, now, is_last):
    """Insert the packet's connection to an endpoint; return its slot, FULL, TAKEN, or why it has no source.

    A masqueraded one comes from a port of the node. One that is not keeps its client's address and port; in the last
    try the address alone: endpoints know this port already. So does the kernel (net/netfilter/nf_nat_core.c).
    Its port is one of those that masquerading has: of clients that choose theirs as Linux does, none has these.
    """
    tables, packet, masquerading = node.tables, node.packet[0], node.masquerading
    first, client = np.uint8(state | service.timeouts), np.uint32(packet.addrs)
    is_hidden, is_known = is_masqueraded(node, service, endpoint, frames, start), state == _ADOPTED
    if is_hidden and is_known:
        return np.int64(_PORT_IS_LOST)  # the one that the endpoint knows the connection by
    if not is_hidden and (is_known or not is_last):
        new_addrs = np.uint64(endpoint.addr) << np.uint64(32) | np.uint64(client)
        return _insert(node, endpoint, new_addrs, np.uint16(packet.ports), first, hop_back, now)
    sources = masquerading.sources6 if packet.protocol & _IPV6 else masquerading.sources
    address, choices = client, 0
    if is_hidden:
        address = _source_towards(tables, packet, endpoint)
        # By way of the kernel, addresses that were given to come from are of no use.
        choices = 0 if tables.next_hops[np.int64(endpoint.next_hop)].state == _KERNEL else len(sources)
        if address == 0 and choices == 0:
            return np.int64(_NO_ADDRESS)
    slot = _insert_from_a_port(node, endpoint, address, sources, choices, first, hop_back, now)
    return np.int64(flows.TAKEN) if slot == _NO_PORT and not is_hidden else slot


@inlined
def _name_client(tables, packet, frames, start):
    """Give the client of an IPv6 packet a name, in `packet`, too; return whether there is one for it."""
    first, second = wire6.source_of(frames, start)
    client = naming.intern_client(tables, first, second)
    packet.addrs = packet.addrs & _DESTINATION | np.uint64(swapped32(client))
    return client != naming.NOBODY


@inlined
def _route_back(node, frames, start):
    """Return the target of the route to the packet's client: no name is needed for it."""
    if node.packet[0].protocol & _IPV6:
        first, second = wire6.source_of(frames, start)
        return hops_compiled.route_target6(node.hops, swapped64(first), swapped64(second))
    return hops_compiled.route_target(node.hops, swapped32(np.uint32(node.packet[0].addrs)))


@inlined
def admit(node, frames, start, length, longest, row, event, now):
    """Choose an endpoint for a new connection, insert both directions, send. Return (reason, egress ifindex)."""
    tables, packet = node.tables, node.packet[0]
    addrs, ports, protocol = packet.addrs, packet.ports, packet.protocol
    nowhere = np.uint32(NOWHERE)

    is_ipv6 = protocol & _IPV6 != 0
    row = row_for(node, row, frames, start)
    if row == services.MISS:
        return Reason.SOURCE_REFUSED, nowhere
    service = tables.services[row]
    state = tables.machine[0].first_state[event]
    reason = begins_with(service, state, event)
    if reason != Reason.ADMITTED:
        return reason, nowhere
    route_back = np.int64(_route_back(node, frames, start))
    if route_back == hops_compiled.NO_ROUTE:
        return Reason.NO_NEXT_HOP, nowhere
    if is_ipv6 and not _name_client(tables, packet, frames, start):
        return Reason.NAMES_FULL, nowhere
    addrs = packet.addrs
    hop_back = hops_compiled.row_of(node.hops, route_back, swapped32(np.uint32(addrs)))
    if hop_back == hops_compiled.PENDING:
        return Reason.NO_NEXT_HOP, np.uint32(AWAITED)
    if tables.next_hops[hop_back].state == _UNRESOLVED:  # the answer would be lost: it is quicker than ARP
        return Reason.NO_NEXT_HOP, np.uint32(AWAITED)
    whose, which = chooser(node, service, frames, start)
    for attempt in range(_ENDPOINTS_TRIED):
        chosen = choose(node, row, whose, which, attempt, now)
        endpoint = tables.endpoints[chosen]
        reason, egress = way_to(tables, np.int64(endpoint.next_hop), packet.ttl, longest)
        if reason != Reason.FORWARDED:
            packet.next_hop = endpoint.next_hop
            return reason, egress
        is_last = attempt == _ENDPOINTS_TRIED - 1
        slot = _begin(node, service, endpoint, state, np.uint32(hop_back), frames, start, now, is_last)
        if slot >= 0:
            services.count_begun(tables, service, chosen)
            if service.needs & _AFFINITY:
                affinity.remember(tables, whose, chosen, now)
            reason, egress = forward(node, frames, start, length, longest, slot, event, now)
            is_sent = reason == Reason.FORWARDED or reason == Reason.TO_KERNEL
            return Reason.ADMITTED if is_sent else reason, egress
        if slot != flows.TAKEN:
            return _refusal(slot), nowhere
        # The endpoint talks to this client and port already, through another frontend: the reply could not be told
        # apart. (Or another writer is about to publish this very connection.)
        slot = flows.find(tables, addrs, ports, protocol)
        if slot != flows.MISS:
            return forward(node, frames, start, length, longest, slot, event, now)
    return Reason.REPLY_CLASH, nowhere


@inlined
def _refusal(slot):
    """Return why `_begin` has begun nothing."""
    if slot == flows.FULL:
        return Reason.TABLE_FULL
    if slot == _PORT_IS_LOST:
        return Reason.MID_STREAM_RESET
    return Reason.NO_SNAT_PORT if slot == _NO_PORT else Reason.NO_SNAT_ADDRESS
