"""One frame from start to verdict, in userspace: parse - flow - service - admit - rewrite.

The same stages in the same order, with the same words, as xdp/bpf/lb.c and the picture in docs/architecture.md. What
XDP punts comes here; with the engines that have no XDP program to forward, everything does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from conntrack import compiled as flows
from dataplane import answers, answers6, fragments, hops_compiled, wire, wire6
from dataplane.fragments import Fragments, new_fragments
from dataplane.hops_compiled import Hops
from dataplane.rings import lock, unlock
from dataplane.settings import DEFAULT_SNAT_PORTS, PortRange
from lb import affinity
from lb import compiled as services
from xdp import naming, schema
from xdp.bundle import Bundle
from xdp.byteorder import swapped16, swapped32, swapped64
from xdp.hash import hash_tuple
from xdp.jit import compiled, inlined
from xdp.schema import Direction, Event, HopState, Limit, Masquerade, MidStream, Needs, Protocol, Reason, State
from xdp.tables import Tables

_TCP, _UDP, _IPV6 = int(Protocol.TCP), int(Protocol.UDP), int(Protocol.IPV6)
_ORIGINAL = int(Direction.ORIGINAL)
_SYN, _RST, _DATA = int(Event.SYN), int(Event.RST), int(Event.DATA)
_FORWARD, _UNRESOLVED, _KERNEL = int(HopState.FORWARD), int(HopState.UNRESOLVED), int(HopState.KERNEL)
_REPLY = int(Direction.REPLY)
_ARP_ANSWERS = int(Limit.ARP_ANSWERS)
_RANGES, _SHORT_CUT, _AFFINITY = int(Needs.RANGES), int(Needs.SHORT_CUT), int(Needs.AFFINITY)
_OUTSIDE, _REMOTE = int(Masquerade.OUTSIDE), int(Masquerade.REMOTE)
_EVERYBODY = int(Masquerade.EVERYBODY)
_DESTINATION = np.uint64(0xFFFFFFFF00000000)  # of both addresses
_ADOPTED, _RESET = int(State.ADOPTED), int(State.RESET)
_PASS = int(MidStream.PASS)
_NO_PORT, _NO_ADDRESS, _PORT_IS_LOST = -4, -5, -6  # beside what flows.insert returns
_FIRST_DROP = 64  # reasons from here on are drops
_PORTS_TRIED = 64  # with nine tenths of the ports taken, one new connection of a thousand finds none
_ENDPOINTS_TRIED = 8  # when replies would clash: with two thirds of a client's ports taken, 4 % of new flows fail

NOWHERE = 0  # the egress of a frame that is not forwarded
KERNEL = 0xFFFFFFFE  # the egress of a frame that the kernel is to take as received, and to route
AWAITED = 0xFFFFFFFF  # the egress of a frame whose next hop may be known soon: to be tried again


# Where a packet loop's answers go back: its interface, the MAC address there (the first byte lowest), and how many
# answers to ARP it has given in the second that began at `since` (jiffies). `kernel` is the descriptor of what hands
# frames to the kernel there (dataplane/handback.py).
LINK = np.dtype([("mac", "u8"), ("ifindex", "u4"), ("since", "u4"), ("answers", "u4"), ("kernel", "i4")])


def _new_link() -> npt.NDArray[np.void]:
    return np.zeros(1, LINK)


@dataclass(frozen=True, eq=False)
class Masquerading(Bundle):
    """Who is inside the cluster (rows of RANGE and RANGE6, ascending, disjoint), and whose ports others leave from."""

    inside: npt.NDArray[np.void]
    inside6: npt.NDArray[np.void]
    first_port: np.uint64
    ports: np.uint64


@dataclass(frozen=True, eq=False)
class Node(Bundle):
    """All that the stages read and write: the shared tables, the way to every address, and Maglev's seed.

    `packet` is one PACKET record of scratch space, `budgets` say how many answers may still be given: every packet loop
    has its own Node.
    """

    tables: Tables
    hops: Hops
    seed: np.uint64
    masquerading: Masquerading
    packet: npt.NDArray[np.void]
    link: npt.NDArray[np.void] = field(default_factory=_new_link)
    budgets: npt.NDArray[np.void] = field(default_factory=answers.new_budgets)
    fragments: Fragments = field(default_factory=new_fragments)


def new_node(
    tables: Tables,
    hops: Hops,
    seed: int,
    inside: Iterable[tuple[int, int]] = (),
    snat_ports: PortRange = DEFAULT_SNAT_PORTS,
    datagrams: Fragments | None = None,
    inside6: Iterable[tuple[tuple[int, int], tuple[int, int]]] = (),
) -> Node:
    """Return the Node of a packet loop; `inside` are first and last addresses (lb.rows.ranges_of).

    Those of `inside6` are IPv6 addresses, as (higher half, lower half). `datagrams` are those in fragments, which all
    loops of a node share.
    """
    first, last = snat_ports
    ranges = np.array(list(inside), schema.RANGE)
    ranges6 = np.array(list(inside6), schema.RANGE6)
    masquerading = Masquerading(ranges, ranges6, np.uint64(first), np.uint64(last - first + 1))
    packet = np.zeros(1, wire.PACKET)
    shared = datagrams or new_fragments()
    return Node(tables, hops, np.uint64(seed), masquerading, packet, fragments=shared)


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
def _forward(node, frames, start, length, longest, slot, event, now):
    """Rewrite: send a packet along its flow. Return (reason, egress ifindex)."""
    tables, packet = node.tables, node.packet[0]
    flow = tables.flows[slot]
    row = np.int64(flow.next_hop)
    reason, egress = way_to(tables, row, packet.ttl, longest)
    packet.next_hop = row
    if egress == KERNEL:
        if packet.protocol & _IPV6:  # no program translates what leaves by way of the kernel
            return Reason.NOT_FORWARDABLE, np.uint32(NOWHERE)
        if flow.direction == _REPLY:  # translated as it leaves (egress.c)
            return Reason.TO_KERNEL, egress
        if flow.new_src_addr != flow.src_addr:  # the kernel takes no packet that comes from its own address
            return Reason.NOT_FORWARDABLE, np.uint32(NOWHERE)
        reason, row = Reason.TO_KERNEL, np.int64(wire.TO_KERNEL)
    if reason == Reason.FORWARDED or reason == Reason.TO_KERNEL:
        if packet.fragment:
            fragments.begin(node, frames, start, packet.ports, np.uint8(0), now)
        flows.touch(tables, slot, event, length, now)
        if packet.protocol & _IPV6:
            wire6.rewrite(frames, start, flow, tables, row)
        else:
            wire.rewrite(frames, start, packet.l4, flow, tables.next_hops, row)
    return reason, egress


@inlined
def _is_inside(masquerading, client):
    """Tell whether a client (host order) is inside the cluster."""
    return services.is_in_ranges(masquerading.inside, 0, len(masquerading.inside), client)


@inlined
def _is_inside6(masquerading, high, low):
    """Tell whether an IPv6 client (two u64 in host order) is inside the cluster."""
    return services.is_in_ranges6(masquerading.inside6, 0, len(masquerading.inside6), high, low)


@inlined
def _is_packet_inside(node, client):
    """Tell whether the packet's client, an address or a name as in tables, is inside the cluster."""
    if node.packet[0].protocol & _IPV6:
        addr = node.tables.names[np.int64(swapped32(client))].addr
        return _is_inside6(node.masquerading, swapped64(addr[0]), swapped64(addr[1]))
    return _is_inside(node.masquerading, swapped32(client))


@inlined
def _is_masqueraded(node, service, endpoint, client):
    """Tell whether the endpoint is to see an address of the node in place of the client's (as on the wire).

    Answers of an endpoint on this node that the kernel routes come back here whoever the client is.
    """
    if endpoint.is_local and node.tables.next_hops[np.int64(endpoint.next_hop)].state == _KERNEL:
        return False
    if endpoint.addr == client or service.masquerade == _EVERYBODY:
        return True
    if service.masquerade == _REMOTE:
        return endpoint.is_local == 0
    return service.masquerade == _OUTSIDE and not _is_packet_inside(node, client)


@inlined
def _insert(node, endpoint, new_addrs, port, state, hop_back, now):
    """Insert the packet's connection to an endpoint, with a source port as on the wire; return as flows.insert does."""
    tables, packet = node.tables, node.packet[0]
    addrs, ports, protocol = packet.addrs, packet.ports, packet.protocol
    new_ports = np.uint32(endpoint.port) << np.uint32(16) | np.uint32(port)
    slot = flows.insert(
        tables, addrs, ports, new_addrs, new_ports, protocol, state, endpoint.next_hop, hop_back, now
    )  # fmt: skip
    if slot == flows.FULL:
        flows.drop_early(tables, addrs, ports, new_addrs, new_ports, protocol, now)
    return slot


@inlined
def _insert_masqueraded(node, endpoint, new_addrs, state, hop_back, now):
    """Insert the packet's connection from one of the node's ports: the client's own, if it may be, else any.

    To allocate a port *is* to insert the reply's key: TAKEN means another one. The five-tuple and the table's secret
    give where to begin and how far to go on (double hashing), so that no two connections try the same ports in the same
    order: with a common step, runs of taken ports grow. NO_PORT: all that were tried are taken.
    """
    tables, packet, masquerading = node.tables, node.packet[0], node.masquerading
    first, count = masquerading.first_port, masquerading.ports
    hash_key = tables.control[0].hash_key
    tried = hash_tuple(packet.addrs, packet.ports, packet.protocol, hash_key[1], hash_key[0])
    port = np.uint64(swapped16(packet.ports & np.uint32(0xFFFF)))
    if port - first >= count:  # u64: also if it is below
        port = first + ((tried >> np.uint64(32)) * count >> np.uint64(32))
    step = hash_tuple(packet.addrs, packet.ports, packet.protocol, hash_key[0], hash_key[1]) | np.uint64(1)
    for _ in range(_PORTS_TRIED):
        slot = _insert(node, endpoint, new_addrs, swapped16(port), state, hop_back, now)
        if slot != flows.TAKEN or flows.find(tables, packet.addrs, packet.ports, packet.protocol) != flows.MISS:
            return slot
        tried += step
        port = first + ((tried >> np.uint64(32)) * count >> np.uint64(32))
    return np.int64(_NO_PORT)


@inlined
def _begin(node, service, endpoint, state, hop_back, now):
    """Insert the packet's connection to an endpoint; return its slot, FULL, TAKEN, or why it has no source."""
    tables, packet = node.tables, node.packet[0]
    client = np.uint32(packet.addrs)
    new_addrs = np.uint64(endpoint.addr) << np.uint64(32)
    if _is_masqueraded(node, service, endpoint, client):
        if state == _ADOPTED:
            return np.int64(_PORT_IS_LOST)  # the one that the endpoint knows the connection by
        source = tables.next_hops[np.int64(endpoint.next_hop)].source
        if source == 0:
            return np.int64(_NO_ADDRESS)
        new_addrs |= np.uint64(source)
        return _insert_masqueraded(node, endpoint, new_addrs, state, hop_back, now)
    new_addrs |= np.uint64(client)
    return _insert(node, endpoint, new_addrs, np.uint16(packet.ports), state, hop_back, now)


@inlined
def _row_for(node, row, client):
    """Return the row that admits a client (host order) where `row` is its frontend's; MISS: it is refused."""
    tables, service = node.tables, node.tables.services[row]
    if service.needs & _RANGES and not services.is_in_ranges(
        tables.ranges, service.first_range, service.ranges, client
    ):
        return np.int64(services.MISS)
    if service.needs & _SHORT_CUT and _is_inside(node.masquerading, client):
        return np.int64(service.inside)
    return np.int64(row)


@inlined
def _row_for6(node, row, frames, start):
    """Return the same for the client of an IPv6 packet."""
    tables, service = node.tables, node.tables.services[row]
    first, second = wire6.source_of(frames, start)
    high, low = swapped64(first), swapped64(second)
    if service.needs & _RANGES and not services.is_in_ranges6(
        tables.ranges6, service.first_range, service.ranges, high, low
    ):
        return np.int64(services.MISS)
    if service.needs & _SHORT_CUT and _is_inside6(node.masquerading, high, low):
        return np.int64(service.inside)
    return np.int64(row)


@inlined
def _name_client(tables, packet, frames, start):
    """Give the client of an IPv6 packet a name, in `packet`, too; return whether there is one for it."""
    first, second = wire6.source_of(frames, start)
    client = naming.intern(tables, first, second)
    packet.addrs = packet.addrs & _DESTINATION | np.uint64(swapped32(client))
    return client != naming.NOBODY


@inlined
def _chooser(node, service, frames, start):
    """Return what the choice of an endpoint depends on, in place of addresses and ports: with affinity, the client."""
    packet = node.packet[0]
    is_ipv6 = packet.protocol & _IPV6
    if service.needs & _AFFINITY:
        client = wire6.source_digest(frames, start, node.seed) if is_ipv6 else packet.addrs
        return affinity.client_of(np.uint32(client), service.identity), np.uint32(0)
    return wire6.pair_of(frames, start, node.seed) if is_ipv6 else packet.addrs, packet.ports


@inlined
def _way_back(node, frames, start):
    """Return the row of the way to the packet's client, or as hops_compiled.lookup."""
    client = np.uint32(node.packet[0].addrs)
    if node.packet[0].protocol & _IPV6:
        first, second = wire6.source_of(frames, start)
        return hops_compiled.lookup6(node.hops, client, swapped64(first), swapped64(second))
    return hops_compiled.lookup(node.hops, client)


@inlined
def _begins_with(service, state, event):
    """Return why no connection to a Service port begins with such a packet, or ADMITTED."""
    if state == 0:
        return Reason.STRAY_RST if event == _RST else Reason.BAD_FLAGS
    if state == _ADOPTED and service.mid_stream:
        return Reason.MID_STREAM_PASSED if service.mid_stream == _PASS else Reason.MID_STREAM_RESET
    if service.slots == 0:
        return Reason.NO_LOCAL_ENDPOINT if service.is_elsewhere else Reason.NO_ENDPOINT
    return Reason.ADMITTED


@inlined
def _admit(node, frames, start, length, longest, row, event, now):
    """Admit: choose an endpoint for a new connection, insert both directions, send. Return (reason, egress ifindex)."""
    tables, packet = node.tables, node.packet[0]
    addrs, ports, protocol = packet.addrs, packet.ports, packet.protocol
    nowhere = np.uint32(NOWHERE)

    is_ipv6 = protocol & _IPV6 != 0
    row = _row_for6(node, row, frames, start) if is_ipv6 else _row_for(node, row, swapped32(np.uint32(addrs)))
    if row == services.MISS:
        return Reason.SOURCE_REFUSED, nowhere
    service = tables.services[row]
    state = tables.machine[0].first_state[event]
    reason = _begins_with(service, state, event)
    if reason != Reason.ADMITTED:
        return reason, nowhere
    if is_ipv6 and not _name_client(tables, packet, frames, start):
        return Reason.NAMES_FULL, nowhere
    addrs = packet.addrs
    hop_back = _way_back(node, frames, start)
    if hop_back < 0:
        return Reason.NO_NEXT_HOP, np.uint32(AWAITED if hop_back == hops_compiled.PENDING else NOWHERE)
    if tables.next_hops[hop_back].state == _UNRESOLVED:  # the answer would be lost: it is quicker than ARP
        return Reason.NO_NEXT_HOP, np.uint32(AWAITED)
    is_affine = service.needs & _AFFINITY
    whose, which = _chooser(node, service, frames, start)
    kept = affinity.remembered(tables, row, whose, now) if is_affine else np.int64(affinity.MISS)
    for attempt in range(_ENDPOINTS_TRIED):
        chosen = kept
        if attempt > 0 or kept == affinity.MISS:
            chosen = services.schedule(tables, row, whose, which, protocol, node.seed, attempt, now)
        endpoint = tables.endpoints[chosen]
        reason, egress = way_to(tables, np.int64(endpoint.next_hop), packet.ttl, longest)
        if egress == KERNEL and is_ipv6:
            reason, egress = Reason.NOT_FORWARDABLE, nowhere
        if reason != Reason.FORWARDED:
            packet.next_hop = endpoint.next_hop
            return reason, egress
        slot = _begin(node, service, endpoint, state, np.uint32(hop_back), now)
        if slot >= 0:
            if is_affine:
                affinity.remember(tables, whose, chosen, now)
            reason, egress = _forward(node, frames, start, length, longest, slot, event, now)
            has_begun = reason == Reason.FORWARDED or reason == Reason.TO_KERNEL
            return Reason.ADMITTED if has_begun else reason, egress
        if slot != flows.TAKEN:
            return _refusal(slot), nowhere
        # The endpoint talks to this client and port already, through another frontend: the reply could not be told
        # apart. (Or another writer is about to publish this very connection.)
        slot = flows.find(tables, addrs, ports, protocol)
        if slot != flows.MISS:
            return _forward(node, frames, start, length, longest, slot, event, now)
    return Reason.REPLY_CLASH, nowhere


@inlined
def _refusal(slot):
    """Return why `_begin` has begun nothing."""
    if slot == flows.FULL:
        return Reason.TABLE_FULL
    if slot == _PORT_IS_LOST:
        return Reason.MID_STREAM_RESET
    return Reason.NO_SNAT_PORT if slot == _NO_PORT else Reason.NO_SNAT_ADDRESS


@inlined
def _translate_error(node, frames, start, longest, now):
    """Send an ICMP error along the flow whose packet it quotes. Return (reason, egress ifindex)."""
    tables, packet = node.tables, node.packet[0]
    slot = flows.find(tables, packet.addrs, packet.ports, packet.protocol)
    if slot == flows.MISS or flows.is_expired(tables, slot, now):
        return Reason.ICMP_UNUSABLE, np.uint32(NOWHERE)
    if packet.source_routed and packet.ttl > 1:
        return Reason.SOURCE_ROUTED, np.uint32(NOWHERE)
    flow = tables.flows[slot]
    row = np.int64(flow.next_hop)
    reason, egress = way_to(tables, row, packet.ttl, longest)
    if packet.protocol & _IPV6:
        if egress == KERNEL:
            return Reason.NOT_FORWARDABLE, np.uint32(NOWHERE)
        if reason == Reason.FORWARDED:
            wire6.translate_error(frames, start, flow, tables, row)
        return reason, egress
    if egress == KERNEL:
        if flow.direction != _REPLY:
            wire.translate_error(frames, start, packet.l4, flow, tables.next_hops, wire.TO_KERNEL)
        return Reason.TO_KERNEL, egress
    if reason == Reason.FORWARDED:
        wire.translate_error(frames, start, packet.l4, flow, tables.next_hops, row)
    return reason, egress


@inlined
def _answer_arp(node, frames, start, length, now):
    """Answer a question for a VIP where it lies. Return (reason, egress ifindex)."""
    tables, link = node.tables, node.link[0]
    asked = wire.parse_arp(frames, start, length)
    if asked == 0:
        return Reason.NOT_IPV4, np.uint32(NOWHERE)
    if not _is_vip(tables, asked):
        return Reason.NOT_IPV4, np.uint32(NOWHERE)
    if np.int32(np.uint32(now) - link.since) >= np.int32(tables.control[0].hertz):
        link.since = now
        link.answers = 0
    if link.answers == _ARP_ANSWERS:
        return Reason.ARP_LIMITED, np.uint32(NOWHERE)
    link.answers += np.uint32(1)
    wire.answer_arp(frames, start, link.mac)
    return Reason.ARP_ANSWERED, link.ifindex


@inlined
def _is_vip_of(tables, address, family):
    """Tell whether an address or a name has a frontend, and is none of the node's own. Family: 0, or IPV6."""
    return services.find_frontend(tables, address, np.uint16(0), np.uint8(family)) != services.MISS


@inlined
def _is_vip(tables, address):
    """The same of an IPv4 address (as on the wire)."""
    return _is_vip_of(tables, address, 0)


@inlined
def _begin_ipv6(node, frames, start, length, longest, now):
    """Parse an IPv6 packet. Return (reason, egress); FORWARDED and NOWHERE: to go on with names for addresses."""
    tables, packet = node.tables, node.packet[0]
    found = wire6.parse(frames, start, length, packet)
    if (
        found == Reason.TOO_SHORT
        or found == Reason.NOT_IPV4
        or found == Reason.NOT_TCP_UDP
        or found == Reason.OTHER_ICMP
    ):
        return found, np.uint32(NOWHERE)
    wire6.name_ends(tables, frames, start, packet, found == Reason.ICMP_ERROR)
    if found == Reason.ICMP_ERROR:
        return _translate_error(node, frames, start, longest, now)
    if found == Reason.UNSUMMED or found == Reason.VIP_ECHO:
        if not _is_vip_of(tables, np.uint32(packet.addrs >> np.uint64(32)), _IPV6):
            found = Reason.OTHER_ICMP if found == Reason.VIP_ECHO else Reason.NOT_OURS
        elif packet.ttl <= 1:
            found = Reason.TTL_EXPIRED
        elif found == Reason.VIP_ECHO:
            if tables.control[0].answers_echo:
                return answers6.answer_echo(node, frames, start, now)
            found = Reason.NOT_SERVED
    return found, np.uint32(NOWHERE)


@inlined
def _is_martian(packet):
    """Tell whether a packet comes from an address that no host has: the kernel routes hardly any either."""
    if packet.protocol & _IPV6:  # a name
        return False
    source = np.uint32(packet.addrs)
    network = source & np.uint32(0xFF)  # the first byte on the wire
    return network == 0 or network == 127 or network >> np.uint32(4) == 14 or source == np.uint32(0xFFFFFFFF)


@inlined
def _handle_rest(node, frames, start, length, longest, found, now):
    """Neither TCP nor UDP in one piece. Return (reason, egress); FORWARDED and NOWHERE: to go on as if it were."""
    nowhere = np.uint32(NOWHERE)
    if found == Reason.ICMP_ERROR:
        return _translate_error(node, frames, start, longest, now)
    if found == Reason.NOT_IPV4 and node.tables.control[0].answers_arp:
        return _answer_arp(node, frames, start, length, now)
    if found == Reason.NOT_IPV4 or found == Reason.TOO_SHORT:
        return found, nowhere
    if found == Reason.VIP_FRAGMENT:
        return _follow(node, frames, start, length, longest, now)
    if found == Reason.FLOW_FRAGMENT:
        return fragments.lead(node, frames, start, now), nowhere
    return _answer_other(node, frames, start, found, now)


@inlined
def _answer_other(node, frames, start, found, now):
    """Another protocol, or ICMP that is no error: ours if it is to a VIP. Return (reason, egress ifindex)."""
    tables, packet = node.tables, node.packet[0]
    nowhere = np.uint32(NOWHERE)
    if not _is_vip(tables, np.uint32(packet.addrs >> np.uint64(32))):
        return Reason.OTHER_ICMP if found == Reason.VIP_ECHO else found, nowhere
    if packet.ttl <= 1:
        return Reason.TTL_EXPIRED, nowhere
    if packet.source_routed:
        return Reason.SOURCE_ROUTED, nowhere
    if found == Reason.VIP_ECHO and tables.control[0].answers_echo:
        return answers.answer_echo(node, frames, start, now)
    return Reason.NOT_SERVED, nowhere


@compiled
def _follow(node, frames, start, length, longest, now):
    """Send a fragment where the first of its datagram was sent. Return (reason, egress): AWAITED, if none was yet."""
    tables, packet = node.tables, node.packet[0]
    nowhere = np.uint32(NOWHERE)
    lock(node.fragments.lock)
    datagram = fragments.find(node, packet, now)
    if datagram == fragments.MISS:
        unlock(node.fragments.lock)
        return _await_first(node, frames, start)
    reason, egress = fragments.check(node, frames, start, datagram), nowhere
    if reason == Reason.FORWARDED:
        reason = Reason.FRAGMENT_ALONE
        ports = node.fragments.datagrams[datagram].ports
        slot = flows.find(tables, packet.addrs, ports, packet.protocol)
        if slot != flows.MISS and not flows.is_expired(tables, slot, now):
            flow = tables.flows[slot]
            row = np.int64(flow.next_hop)
            reason, egress = way_to(tables, row, packet.ttl, longest)
            if egress == KERNEL:
                reason, row = Reason.TO_KERNEL, np.int64(wire.TO_KERNEL)
            is_left_alone = egress == KERNEL and flow.direction == _REPLY
            if not is_left_alone and (reason == Reason.FORWARDED or reason == Reason.TO_KERNEL):
                flows.touch(tables, slot, _DATA, length, now)
                wire.rewrite_addresses(frames, start, flow, tables.next_hops, row)
                fragments.note(node, frames, start, datagram)
    unlock(node.fragments.lock)
    return reason, egress


@inlined
def _await_first(node, frames, start):
    """Return (reason, egress) of a fragment of whose datagram nothing is known."""
    packet = node.packet[0]
    nowhere = np.uint32(NOWHERE)
    if not _is_vip(node.tables, np.uint32(packet.addrs >> np.uint64(32))):
        return Reason.OTHER_FRAGMENT, nowhere
    if packet.ttl <= 1:
        return Reason.TTL_EXPIRED, nowhere
    if packet.source_routed:
        return Reason.SOURCE_ROUTED, nowhere
    if packet.protocol != _TCP and packet.protocol != _UDP:
        return Reason.NOT_SERVED, nowhere
    shape = fragments.shape(frames, start, packet)
    if shape != Reason.FORWARDED:
        return shape, nowhere
    return Reason.FRAGMENT_ALONE, np.uint32(AWAITED)


@compiled
def handle(node, frames, start, length, now):
    """Take a frame, `frames[start : start + length]`, to its verdict, and answer it if that is ours to do.

    Return (reason, egress), where `egress` is an ifindex, NOWHERE, KERNEL or AWAITED.

    With an ifindex the frame is to be transmitted: it was rewritten where it lies, and is `node.packet[0].length` bytes
    long; an answer may be longer than what it answers, and the frame must have room for answers.LONGEST_GROWN bytes.
    With KERNEL the kernel is to have it, rewritten, too; but for a reply, which is translated as it leaves.
    A verdict of DROP means that the packet is dropped, and that what is to be transmitted is our answer to it.
    Otherwise it is as it was, and what is to happen is the reason's verdict. With AWAITED (NO_NEXT_HOP, FRAGMENT_ALONE)
    nothing was stored, and the frame may be tried again when `holding.epoch` has grown.
    """
    reason, egress = judge(node, frames, start, length, now)
    if np.int64(reason) >= _FIRST_DROP and egress == NOWHERE:
        if wire6.is_ipv6(frames, start, length):
            return answers6.refuse(node, frames, start, np.int64(reason), now)
        return answers.refuse(node, frames, start, np.int64(reason), now)
    return np.int64(reason), egress


@inlined
def _parse(node, frames, start, length, longest, now):
    """Parse a frame, and deal with all but TCP and UDP. Return (reason, egress); FORWARDED and NOWHERE: to go on."""
    found = wire.parse(frames, start, length, node.packet[0])
    if found == Reason.FORWARDED:
        return found, np.uint32(NOWHERE)
    if found == Reason.NOT_IPV4 and wire6.is_ipv6(frames, start, length):
        return _begin_ipv6(node, frames, start, length, longest, now)
    return _handle_rest(node, frames, start, length, longest, found, now)


@compiled
def judge(node, frames, start, length, now, segment=0):
    """Take a frame to its verdict, all stages in their order, and refuse nobody. Return (reason, egress) as `handle`.

    `segment` is given for a frame that a device will cut into frames of that length: they have to fit the MTU.
    """
    longest = segment or length
    tables, packet = node.tables, node.packet[0]

    found, egress = _parse(node, frames, start, length, longest, now)
    if found != Reason.FORWARDED or egress != NOWHERE:
        return found, egress

    event = _DATA
    if packet.protocol & ~np.uint8(_IPV6) == _TCP:
        event = np.int64(tables.machine[0].event_of_flags[packet.tcp_flags])
    slot = flows.find(tables, packet.addrs, packet.ports, packet.protocol)
    if slot != flows.MISS:
        flow = tables.flows[slot]
        reopened = event == _SYN and flow.direction == _ORIGINAL and tables.machine[0].reopens[flow.state & 15]
        if not reopened and not flows.is_expired(tables, slot, now):
            if packet.source_routed and packet.ttl > 1:
                return Reason.SOURCE_ROUTED, np.uint32(NOWHERE)
            return _forward(node, frames, start, length, longest, slot, event, now)
        if flow.state == _RESET and not reopened:  # over for every packet, so that those of others need not be asked
            return Reason.ENDPOINT_REMOVED, np.uint32(NOWHERE)

    destination = np.uint32(packet.addrs >> np.uint64(32))
    service = services.find_frontend(tables, destination, np.uint16(packet.ports >> np.uint32(16)), packet.protocol)
    if (service == services.MISS or packet.fragment) and not _is_vip_of(tables, destination, packet.protocol & _IPV6):
        return Reason.OTHER_FRAGMENT if packet.fragment else Reason.NOT_OURS, np.uint32(NOWHERE)
    if packet.ttl <= 1:
        return Reason.TTL_EXPIRED, np.uint32(NOWHERE)
    if _is_martian(packet):
        return Reason.MARTIAN_SOURCE, np.uint32(NOWHERE)
    if packet.source_routed:
        return Reason.SOURCE_ROUTED, np.uint32(NOWHERE)
    if service == services.MISS:
        return Reason.NOT_SERVED, np.uint32(NOWHERE)
    if slot != flows.MISS:
        flows.withdraw(tables, slot)
    return _admit(node, frames, start, length, longest, service, event, now)
