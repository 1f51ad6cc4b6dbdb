"""Who may be given an endpoint of a Service port, and which: what `admit` decides before anything is remembered.

It depends on the packet and the Service, so that nodes with the same Services decide alike (docs/adr/0005): of an ICMP
error, on the packet that it quotes, turned round (docs/adr/0043). Schedulers and what is remembered of a client differ
from node to node.
"""

from __future__ import annotations

import numpy as np

from dataplane import wire6
from lb import affinity
from lb import compiled as services
from xdp.byteorder import swapped32, swapped64
from xdp.jit import inlined
from xdp.schema import Event, HopState, Masquerade, MidStream, Needs, Protocol, Reason, State

_IPV6 = int(Protocol.IPV6)
_RST = int(Event.RST)
_KERNEL = int(HopState.KERNEL)
_RANGES, _SHORT_CUT, _AFFINITY = int(Needs.RANGES), int(Needs.SHORT_CUT), int(Needs.AFFINITY)
_OUTSIDE, _REMOTE = int(Masquerade.OUTSIDE), int(Masquerade.REMOTE)
_EVERYBODY = int(Masquerade.EVERYBODY)
_ADOPTED = int(State.ADOPTED)
_PASS = int(MidStream.PASS)


@inlined
def _is_inside(node, frames, start):
    """Tell whether a packet's client is inside the cluster."""
    packet, masquerading = node.packet[0], node.masquerading
    if packet.protocol & _IPV6:
        first, second = wire6.client_of(frames, start, packet)
        ranges = masquerading.inside6
        return services.is_in_ranges6(ranges, 0, len(ranges), swapped64(first), swapped64(second))
    ranges = masquerading.inside
    return services.is_in_ranges(ranges, 0, len(ranges), swapped32(np.uint32(packet.addrs)))


@inlined
def _is_in_ranges_of(node, service, frames, start):
    """Tell whether a packet's client is in a Service port's source ranges."""
    tables, packet = node.tables, node.packet[0]
    first, count = service.first_range, service.ranges
    if packet.protocol & _IPV6:
        high, low = wire6.client_of(frames, start, packet)
        return services.is_in_ranges6(tables.ranges6, first, count, swapped64(high), swapped64(low))
    return services.is_in_ranges(tables.ranges, first, count, swapped32(np.uint32(packet.addrs)))


@inlined
def is_martian(packet, frames, start):
    """Tell whether a packet's client has an address that no host has: the kernel routes hardly any either."""
    if packet.protocol & _IPV6:
        return wire6.is_martian(wire6.client_of(frames, start, packet))
    client = np.uint32(packet.addrs)
    network = client & np.uint32(0xFF)  # the first byte on the wire
    return network == 0 or network == 127 or network >> np.uint32(4) == 14 or client == np.uint32(0xFFFFFFFF)


@inlined
def row_for(node, row, frames, start):
    """Return the row that admits a packet's client where `row` is its frontend's; MISS: it is refused."""
    service = node.tables.services[row]
    if service.needs & _RANGES and not _is_in_ranges_of(node, service, frames, start):
        return np.int64(services.MISS)
    if service.needs & _SHORT_CUT and _is_inside(node, frames, start):
        return np.int64(service.inside)
    return np.int64(row)


@inlined
def begins_with(service, state, event):
    """Return why no connection to a Service port begins with such a packet, or ADMITTED."""
    if state == 0:
        return Reason.STRAY_RST if event == _RST else Reason.BAD_FLAGS
    if state == _ADOPTED and service.mid_stream:
        return Reason.MID_STREAM_PASSED if service.mid_stream == _PASS else Reason.MID_STREAM_RESET
    if service.slots == 0:
        return Reason.NO_LOCAL_ENDPOINT if service.is_elsewhere else Reason.NO_ENDPOINT
    return Reason.ADMITTED


@inlined
def chooser(node, service, frames, start):
    """Return what the choice of an endpoint depends on, in place of addresses and ports: with affinity, the client."""
    packet, seed = node.packet[0], node.tables.control[0].maglev_seed
    is_ipv6 = packet.protocol & _IPV6
    if service.needs & _AFFINITY:
        client = wire6.client_digest(frames, start, packet, seed) if is_ipv6 else packet.addrs
        return affinity.client_of(np.uint32(client), service.identity), np.uint32(0)
    return wire6.pair_of(frames, start, packet, seed) if is_ipv6 else packet.addrs, packet.ports


@inlined
def choose(node, row, whose, which, attempt, now):
    """Return the row of the endpoint for whom `chooser` has named: at first the one that was given last, if any."""
    tables, packet = node.tables, node.packet[0]
    if attempt == 0 and tables.services[row].needs & _AFFINITY:
        kept = affinity.remembered(tables, row, whose, now)
        if kept != affinity.MISS:
            return kept
    return services.schedule(tables, row, whose, which, packet.protocol, attempt, now)


@inlined
def is_masqueraded(node, service, endpoint, frames, start):
    """Tell whether the endpoint is to see another address in place of that of a packet's client.

    Answers of an endpoint on this node that the kernel routes come back here whoever else the client is.
    """
    if endpoint.addr == np.uint32(node.packet[0].addrs):
        return True
    if endpoint.is_local and node.tables.next_hops[np.int64(endpoint.next_hop)].state == _KERNEL:
        return False
    if service.masquerade == _EVERYBODY:
        return True
    if service.masquerade == _REMOTE:
        return endpoint.is_local == 0
    return service.masquerade == _OUTSIDE and not _is_inside(node, frames, start)
