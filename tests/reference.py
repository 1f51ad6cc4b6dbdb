"""What becomes of a frame, in plain Python: no compiled code, no BPF, no shared memory.

Small and slow, to be read beside docs/architecture.md: `Reference.xdp` is what the kernel's side does with a frame,
`Reference.userspace` what the pipeline does with one that it is given. Addresses and ports are host numbers, times are
jiffies. The tables of conntrack/states.py and Maglev's are taken from the product; they have tests of their own.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from conntrack import states
from lb import maglev
from xdp.addresses import address_of
from xdp.schema import (
    Direction,
    Event,
    HopState,
    Limit,
    Masquerade,
    MidStream,
    Ping,
    Protocol,
    Reason,
    Scheduler,
    State,
    Verdict,
    WhenStalled,
    verdict_of,
)

Address = tuple[int, int]
IPV6 = 1 << 128  # a bit of IPv6 addresses

_ETHERNET, _IPV4, _IPV6 = 14, 20, 40
_TAGS = (b"\x81\0", b"\x88\xa8")  # of VLANs
_M64 = (1 << 64) - 1
_TRIES, _XDP_TRIES = 8, 2
_PORTS_TRIED = 64
_PRIVILEGED = 600, 1023  # of which a privileged port becomes one
_MOST_PIECES = 128
_CLIENT_ANSWERS, _CHARGE = 100, 32  # in a second, and what one in so many answers costs
_OF_FRAGMENTS = (
    Reason.FRAGMENT_ALONE,
    Reason.FRAGMENT_OVERLAP,
    Reason.FRAGMENT_AGAIN,
    Reason.FRAGMENT_BROKEN,
)
_FRAGMENT_S, _LEAD_S = 30, 1
_ICMP_ERRORS = (3, 4, 11, 12)
_ICMPV6_ERRORS = (1, 2, 3, 4)
_DISCOVERY = range(133, 138)
_ICMPV6 = Protocol.ICMPV6 | Protocol.IPV6
_EXTENSION_HEADERS = (0, 43, 44, 60)  # the first is of options for every hop
_EXTENSIONS, _EXTENSION_BYTES = 4, 128
_ROUTING, _FRAGMENT, _NO_PROTOCOL = 43, 44, 59
_ECHO6_REQUEST, _ECHO6_REPLY = 128, 129
_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_LEAST: dict[int, int] = {Protocol.TCP: 20, Protocol.UDP: 8}
_REFUSED = (Reason.NO_ENDPOINT, Reason.NOT_SERVED, Reason.MID_STREAM_RESET, Reason.ENDPOINT_REMOVED)
KERNEL, AWAITED = 0xFFFFFFFE, 0xFFFFFFFF
_CHECK_AT = {Protocol.TCP: 16, Protocol.UDP: 6, Protocol.ICMP: 2, Protocol.ICMPV6: 2}


# Where a five-tuple lies.


def hash_of(addrs: int, ports: int, protocol: int, key0: int, key1: int) -> int:
    """Return the hash of a five-tuple as it lies in memory (hash.h)."""
    a = (addrs ^ key0) * 0x9E3779B97F4A7C15 & _M64
    b = ((protocol << 32 | ports) ^ key1) * 0x6A09E667F3BCC909 & _M64
    mixed = a ^ (b >> 32 | b << 32 & _M64)
    mixed ^= mixed >> 29
    mixed = mixed * 0xBB67AE8584CAA73B & _M64
    return mixed ^ mixed >> 32


def first_place(hashed: int, buckets: int) -> int:
    return (hashed & 0xFFFFFFFF) * buckets >> 32


def second_place(hashed: int, buckets: int) -> int:
    return ((hashed * 0x9E3779B97F4A7C15 & _M64) >> 32) * buckets >> 32


# Bytes.


def _words(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"!{len(data) // 2}H", data)


def adjusted(check: int, old: bytes, new: bytes) -> int:
    """Return a checksum after the bytes that it covers became others (RFC 1624 equation 3)."""
    total = (~check & 0xFFFF) + sum(~word & 0xFFFF for word in _words(old)) + sum(_words(new))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Key(NamedTuple):
    """A five-tuple."""

    source: Address
    destination: Address
    protocol: int

    def turned(self) -> Key:
        """Return the other direction."""
        return Key(self.destination, self.source, self.protocol)

    @property
    def transport(self) -> int:
        """Return the protocol, whatever the family."""
        return self.protocol & ~Protocol.IPV6 if self.is_ipv6 else self.protocol

    @property
    def is_ipv6(self) -> bool:
        """Return whether its addresses are IPv6's. There are IPv4 protocols with that bit, SCTP for one."""
        return bool(self.source[0] & IPV6)

    @property
    def is_echo(self) -> bool:
        """Return whether it is that of echo requests, or of their replies: one port is the identifier, the other 0."""
        return self.transport == (Protocol.ICMPV6 if self.is_ipv6 else Protocol.ICMP)

    def fields(self, l4: int) -> tuple[slice, bytes]:
        """Return where ports, or an identifier, lie in a frame whose transport header is at `l4`, and these."""
        ports = struct.pack("!HH", self.source[1], self.destination[1])
        if self.is_echo:
            return slice(l4 + 4, l4 + 6), ports[:2] if self.source[1] else ports[2:]
        return slice(l4, l4 + 4), ports

    def in_memory(self) -> tuple[int, int, int]:
        """Return (addrs, ports, protocol) as the bytes of a frame lie in memory."""
        addrs = struct.pack("!II", self.source[0], self.destination[0])
        ports = struct.pack("!HH", self.source[1], self.destination[1])
        return int.from_bytes(addrs, "little"), int.from_bytes(ports, "little"), self.protocol


NO_KEY = Key((0, 0), (0, 0), 0)


@dataclass(frozen=True)
class Packet:
    """A frame that was parsed: what it is, and whose."""

    reason: Reason
    key: Key = NO_KEY
    l4: int = 0
    ttl: int = 0
    flags: int = 0
    is_source_routed: bool = False
    datagram: tuple[int, int, int, int] | None = None  # of a fragment: source, destination, protocol, identification
    offset: int = 0
    has_more: bool = False
    size: int = 0  # of what follows the IPv4 header, or that of an IPv6 fragment
    quoted: int = 0  # where the transport header lies that an ICMPv6 error quotes
    unknown_at: int = 0  # where an IPv6 packet names a protocol that nobody knows
    asked: int = 0  # its destination, whatever it quotes
    is_discovery: bool = False  # between IPv6 neighbours
    is_unsound: bool = False  # what its TCP or UDP header says of lengths cannot be
    is_damaged: bool = False  # the checksum of its IPv4 header is wrong

    @property
    def has_options(self) -> bool:
        """Return whether the IPv4 header has some, or extension headers follow the IPv6 header."""
        return self.l4 > _ETHERNET + (_IPV6 if self.key.is_ipv6 else _IPV4)

    @property
    def event(self) -> Event:
        """What it tells the state machine."""
        if self.key.is_echo:
            return Event.ECHO
        return states.event_of(self.flags) if self.key.transport == Protocol.TCP else Event.DATA


def _echo_key(key: Key, number: bytes, *, is_reply: bool) -> Key:
    """Return the five-tuple of an echo request with an identifier, or of its reply: who is asked has port 0."""
    port = int.from_bytes(number)
    if is_reply:
        return key._replace(destination=(key.destination[0], port))
    return key._replace(source=(key.source[0], port))


def _key(ip: bytes, ports: bytes) -> Key:
    source, destination = struct.unpack("!II", ip[12:20])
    source_port, destination_port = struct.unpack("!HH", ports[:4])
    return Key((source, source_port), (destination, destination_port), ip[9])


def parse(frame: bytes) -> Packet:
    """Return what a frame is."""
    ip = frame[_ETHERNET:]
    if is_ipv6(frame):
        return _parse_ipv6(ip)
    if len(frame) >= _ETHERNET and frame[12:14] != b"\x08\0":
        return Packet(Reason.NOT_IPV4)
    if len(ip) < _IPV4:
        return Packet(Reason.TOO_SHORT)
    if ip[0] >> 4 != 4:
        return Packet(Reason.NOT_IPV4)
    header, total = (ip[0] & 15) * 4, int.from_bytes(ip[2:4], "big")
    packet = Packet(Reason.TOO_SHORT, _key(ip, bytes(4)), ttl=ip[8], asked=int.from_bytes(ip[16:20]))
    if header < _IPV4 or not header <= total <= len(ip):
        return packet
    protocol, fragment, l4 = ip[9], int.from_bytes(ip[6:8], "big") & 0x3FFF, ip[header:total]
    packet = replace(
        packet,
        reason=Reason.NOT_TCP_UDP,
        l4=_ETHERNET + header,
        is_source_routed=_has_source_route(ip[_IPV4:header]),
        is_damaged=checksum(ip[:header]) != 0,
    )
    if fragment:
        return _parse_fragment(replace(packet, size=total - header), ip, l4, fragment)
    if protocol == Protocol.ICMP:
        return _parse_icmp(packet, l4)
    if protocol not in (Protocol.TCP, Protocol.UDP):
        return packet
    if total - header < (20 if protocol == Protocol.TCP else 8):
        return replace(packet, reason=Reason.TOO_SHORT)
    flags = l4[13] & 0x3F if protocol == Protocol.TCP else 0
    return replace(packet, reason=Reason.FORWARDED, key=_key(ip, l4), flags=flags, is_unsound=_is_unsound(protocol, l4))


def _is_unsound(protocol: int, l4: bytes) -> bool:
    said = 4 * (l4[12] >> 4) if protocol == Protocol.TCP else int.from_bytes(l4[4:6])
    return not _LEAST[protocol] <= said <= len(l4)


def vlan_tags(frame: bytes, served: Collection[int]) -> tuple[Reason, int]:
    """Return how many bytes of VLAN tags a frame has, FORWARDED if it is to be looked into; else why it is passed."""
    kinds = [frame[at : at + 2] for at in (12, 16, 20)]
    count = next((n for n, kind in enumerate(kinds) if kind not in _TAGS), 3)
    if count and len(kinds[min(count, 2)]) < 2:
        return Reason.TOO_SHORT, 0
    vlans = [int.from_bytes(frame[at : at + 2], "big") & 0xFFF for at in (14, 18)[:count]]
    is_served = next(filter(None, vlans), 0) in served and 4095 not in vlans
    if count == 3 or (count and not is_served):
        return Reason.OTHER_VLAN, 0
    return Reason.FORWARDED, 4 * count


def is_ipv6(frame: bytes) -> bool:
    """Return whether a frame says that it is IPv6."""
    return frame[12:14] == b"\x86\xdd"


def _address6(octets: bytes) -> int:
    return IPV6 | int.from_bytes(octets, "big")


def octets_of(address: int) -> bytes:
    """Return the bytes of an address in a header."""
    return (address ^ IPV6).to_bytes(16, "big") if address & IPV6 else address.to_bytes(4, "big")


def _parse_ipv6(ip: bytes) -> Packet:
    if len(ip) < _IPV6:
        return Packet(Reason.TOO_SHORT)
    if ip[0] >> 4 != 6:
        return Packet(Reason.NOT_IPV4)
    payload = int.from_bytes(ip[4:6], "big")
    behind = ip[_IPV6 : _IPV6 + payload]
    ends = (_address6(ip[8:24]), 0), (_address6(ip[24:40]), 0)
    packet = Packet(Reason.TOO_SHORT, Key(*ends, Protocol.IPV6), ttl=ip[7], asked=ends[1][0])
    if len(behind) < payload:
        return packet
    walked = _walked(ip[6], behind)
    if walked is None:
        return packet
    l4, protocol = behind[walked.at :], walked.protocol
    packet = replace(
        packet,
        reason=Reason.NOT_TCP_UDP,
        l4=_ETHERNET + _IPV6 + walked.at,
        is_source_routed=walked.is_source_routed,
    )
    if walked.fragment:
        return _parse_fragment6(packet, walked, l4)
    if protocol == Protocol.ICMPV6:
        return _parse_icmpv6(packet, l4)
    if protocol not in _LEAST:
        return replace(packet, unknown_at=0 if protocol == _NO_PROTOCOL else walked.named_at)
    return _with_ports6(packet, protocol, l4, Reason.FORWARDED) or replace(packet, reason=Reason.TOO_SHORT)


def _with_ports6(packet: Packet, protocol: int, l4: bytes, reason: Reason) -> Packet | None:
    """Return a packet of TCP or UDP for a reason, unless it has no checksum; None: its header does not fit."""
    if len(l4) < _LEAST.get(protocol, 1 << 16):
        return None
    source_port, destination_port = struct.unpack("!HH", l4[:4])
    (source, _), (destination, _), _ = packet.key
    key = Key((source, source_port), (destination, destination_port), protocol | Protocol.IPV6)
    is_unsummed = protocol == Protocol.UDP and l4[6:8] == b"\0\0"
    flags = l4[13] & 0x3F if protocol == Protocol.TCP else 0
    is_unsound = packet.datagram is None and _is_unsound(protocol, l4)
    return replace(
        packet, reason=Reason.UNSUMMED if is_unsummed else reason, key=key, flags=flags, is_unsound=is_unsound
    )


class Walked(NamedTuple):
    """What follows extension headers, how long they are, where it was named, and whether the sender says which way.

    Of a fragment also the field that says which it is, and the number of its datagram.
    """

    protocol: int
    at: int
    named_at: int
    is_source_routed: bool
    fragment: int = 0
    number: int = 0


def _walked(protocol: int, behind: bytes) -> Walked | None:
    """Return what comes of a walk over extension headers; None: they do not fit.

    What follows more than are walked over is no protocol.
    """
    at, is_source_routed, walked, named_at = 0, False, _EXTENSION_HEADERS, 6
    for _ in range(_EXTENSIONS):
        if protocol not in walked:
            break
        header = behind[at : at + 8]
        if len(header) < 8:
            return None
        if protocol == _ROUTING and (not header[2] or header[3]):
            is_source_routed = True
        walked = _EXTENSION_HEADERS[1:]  # options for every hop come first
        fragment = int.from_bytes(header[2:4], "big") & 0xFFF9 if protocol == _FRAGMENT else 0
        length = 8 if protocol == _FRAGMENT else 8 * (header[1] + 1)
        protocol, named_at, at = header[0], _IPV6 + at, at + length
        if fragment and at <= len(behind):
            return Walked(protocol, at, named_at, is_source_routed, fragment, int.from_bytes(header[4:8], "big"))
        if at > _EXTENSION_BYTES and not fragment:
            return Walked(_NO_PROTOCOL, 0, 0, is_source_routed)
    if at > len(behind):
        return None
    if protocol in _EXTENSION_HEADERS[1:]:
        protocol = _NO_PROTOCOL
    return Walked(protocol, at, named_at, is_source_routed)


def _parse_fragment6(packet: Packet, walked: Walked, l4: bytes) -> Packet:
    """Return a fragment; a first one with a whole transport header has ports."""
    key = packet.key._replace(protocol=walked.protocol | Protocol.IPV6)
    packet = replace(
        packet,
        reason=Reason.VIP_FRAGMENT,
        key=key,
        datagram=(key.source[0], key.destination[0], key.protocol, walked.number),
        offset=walked.fragment >> 3,
        has_more=bool(walked.fragment & 1),
        size=len(l4),
    )
    first = None if packet.offset else _with_ports6(packet, walked.protocol, l4, Reason.FLOW_FRAGMENT)
    return first or packet


def _parse_icmpv6(packet: Packet, icmp: bytes) -> Packet:
    quote = icmp[8:]
    if len(icmp) < 8:
        return replace(packet, reason=Reason.TOO_SHORT)
    if icmp[0] in (_ECHO6_REQUEST, _ECHO6_REPLY):
        is_reply = icmp[0] == _ECHO6_REPLY
        key = _echo_key(packet.key._replace(protocol=_ICMPV6), icmp[4:6], is_reply=is_reply)
        return replace(packet, reason=Reason.ECHO_REPLY if is_reply else Reason.VIP_ECHO, key=key)
    if icmp[0] not in _ICMPV6_ERRORS:
        return replace(packet, reason=Reason.OTHER_ICMP, is_discovery=icmp[0] in _DISCOVERY)
    if len(quote) < _IPV6:
        return replace(packet, reason=Reason.TOO_SHORT)
    if quote[0] >> 4 != 6:
        return replace(packet, reason=Reason.OTHER_ICMP)
    walked = _walked(quote[6], quote[_IPV6:])
    if walked is None:
        return replace(packet, reason=Reason.TOO_SHORT)
    ports = quote[_IPV6 + walked.at :]
    if walked.protocol not in (*_LEAST, Protocol.ICMPV6) or walked.fragment >> 3:
        return replace(packet, reason=Reason.OTHER_ICMP)
    if len(ports) < 8:
        return replace(packet, reason=Reason.TOO_SHORT)
    source_port, destination_port = struct.unpack("!HH", ports[:4])
    source, destination = (_address6(quote[8:24]), source_port), (_address6(quote[24:40]), destination_port)
    key = Key(destination, source, walked.protocol | Protocol.IPV6)
    if walked.protocol == Protocol.ICMPV6:
        if ports[0] not in (_ECHO6_REQUEST, _ECHO6_REPLY):
            return replace(packet, reason=Reason.OTHER_ICMP)
        key = Key((destination[0], 0), (source[0], 0), _ICMPV6)
        key = _echo_key(key, ports[4:6], is_reply=ports[0] == _ECHO6_REQUEST)
    return replace(packet, reason=Reason.ICMP_ERROR, key=key, quoted=packet.l4 + 8 + _IPV6 + walked.at)


def _digest6(address: int, seed: int) -> int:
    """Return what stands for an IPv6 address where nodes are to choose alike."""
    octets = octets_of(address)
    high, low = int.from_bytes(octets[:8], "little"), int.from_bytes(octets[8:], "little")
    return hash_of(high, low & 0xFFFFFFFF, low >> 32, seed, ~seed & _M64)


def _parse_fragment(packet: Packet, ip: bytes, l4: bytes, fragment: int) -> Packet:
    """Return a fragment; a first one with a whole transport header has ports."""
    key, number = packet.key, int.from_bytes(ip[4:6], "big")
    packet = replace(
        packet,
        reason=Reason.VIP_FRAGMENT,
        datagram=(key.source[0], key.destination[0], key.protocol, number),
        offset=fragment & 0x1FFF,
        has_more=bool(fragment & 0x2000),
    )
    if packet.offset or len(l4) < _LEAST.get(key.protocol, 1 << 16):
        return packet
    flags = l4[13] & 0x3F if key.protocol == Protocol.TCP else 0
    return replace(packet, reason=Reason.FLOW_FRAGMENT, key=_key(ip, l4), flags=flags)


def _has_source_route(options: bytes) -> bool:
    while len(options) > 1 and options[0]:
        if options[0] in (131, 137):
            return True
        size = 1 if options[0] == 1 else options[1]
        if options[0] != 1 and size < 2:
            return False
        options = options[size:]
    return False


def _parse_icmp(packet: Packet, icmp: bytes) -> Packet:
    quote = icmp[8:]
    if len(icmp) < 8:
        return replace(packet, reason=Reason.TOO_SHORT)
    if icmp[0] in (_ECHO_REQUEST, _ECHO_REPLY):
        is_reply = icmp[0] == _ECHO_REPLY
        key = _echo_key(packet.key, icmp[4:6], is_reply=is_reply)
        return replace(packet, reason=Reason.ECHO_REPLY if is_reply else Reason.VIP_ECHO, key=key)
    if icmp[0] not in _ICMP_ERRORS:
        return replace(packet, reason=Reason.OTHER_ICMP)
    if len(quote) < _IPV4:
        return replace(packet, reason=Reason.TOO_SHORT)
    header = (quote[0] & 15) * 4
    is_usable = quote[0] >> 4 == 4 and header >= _IPV4 and quote[9] in (Protocol.TCP, Protocol.UDP, Protocol.ICMP)
    if not is_usable or int.from_bytes(quote[6:8], "big") & 0x1FFF:
        return replace(packet, reason=Reason.OTHER_ICMP)
    if len(quote) < header + 8:
        return replace(packet, reason=Reason.TOO_SHORT)
    key, message = _key(quote, quote[header:]).turned(), quote[header:]
    if quote[9] == Protocol.ICMP:
        if message[0] not in (_ECHO_REQUEST, _ECHO_REPLY):
            return replace(packet, reason=Reason.OTHER_ICMP)
        key = _echo_key(_key(quote, bytes(4)).turned(), message[4:6], is_reply=message[0] == _ECHO_REQUEST)
    return replace(packet, reason=Reason.ICMP_ERROR, key=key)


# What is known.


@dataclass(frozen=True)
class Hop:
    """Where frames go next."""

    state: HopState = HopState.FORWARD
    macs: bytes = bytes(12)
    ifindex: int = 0
    mtu: int = 1500
    source: int = 0  # the node's own address on the way there

    def refusal(self, ttl: int, length: int) -> Reason:
        """Return why a frame cannot go there, or FORWARDED."""
        if ttl <= 1:
            return Reason.TTL_EXPIRED
        if self.state == HopState.UNRESOLVED:
            return Reason.NO_NEXT_HOP
        if self.state == HopState.KERNEL:
            return Reason.FORWARDED
        if self.state != HopState.FORWARD:
            return Reason.NOT_FORWARDABLE
        return Reason.TOO_BIG if length > self.mtu + _ETHERNET else Reason.FORWARDED


@dataclass(frozen=True)
class Service:
    """A Service port: its endpoints, what XDP does with new connections when userspace is stalled, and otherwise."""

    endpoints: tuple[Address, ...]
    when_stalled: WhenStalled = WhenStalled.ADMIT
    admits_here: bool = False
    is_elsewhere: bool = False
    ranges: tuple[tuple[int, int], ...] | None = None  # first and last address of those who may come; None: everybody
    local: frozenset[Address] = frozenset()
    masquerade: Masquerade = Masquerade.NOBODY
    affinity_s: int = 0
    identity: int = 0
    scheduler: Scheduler = Scheduler.MAGLEV
    mid_stream: MidStream = MidStream.ADOPT
    timeouts: tuple[tuple[str, float], ...] = ()  # other than the default ones, by their names for Services
    inside: Service | None = None  # for clients inside the cluster

    @property
    def needs_userspace(self) -> bool:
        """Return whether more than Maglev is to be looked at."""
        return bool(self.ranges is not None or self.masquerade or self.affinity_s or self.scheduler or self.inside)

    def admits(self, client: int) -> bool:
        """Return whether a client may come."""
        return self.ranges is None or any(first <= client <= last for first, last in self.ranges)

    def select(self, key: Key, seed: int, attempt: int, dice: int | None = None) -> Address:
        """Return the endpoint of a new connection: by Maglev or, with `dice`, by chance."""
        table = maglev.positions([(address_of(host), port) for host, port in self.endpoints], seed)
        if key.is_ipv6:
            source, destination = (_digest6(host, seed) for host in (key.source[0], key.destination[0]))
            addrs = source ^ (destination >> 32 | destination << 32 & _M64)
            source &= 0xFFFFFFFF
        else:
            addrs = key.in_memory()[0]
            source = addrs & 0xFFFFFFFF
        ports, protocol = int.from_bytes(struct.pack("!HH", key.source[1], key.destination[1]), "little"), key.protocol
        if self.affinity_s:
            addrs, ports = source | self.identity << 32, 0
        key0 = seed if dice is None else dice
        hashed = hash_of(addrs, ports, protocol, key0, ~key0 & _M64)
        return self.endpoints[table[(((hashed >> 32) * len(table) >> 32) + attempt) % len(table)]]


@dataclass
class Connection:
    """Both directions of a connection: `translated` is what the endpoint gets of what the client sends."""

    original: Key
    translated: Key
    state: State
    timeouts: tuple[tuple[str, float], ...] = ()
    last_seen: list[int] = field(default_factory=lambda: [0, 0])
    packets: list[int] = field(default_factory=lambda: [0, 0])
    bytes: list[int] = field(default_factory=lambda: [0, 0])

    def key_of(self, way: Direction) -> Key:
        """Return what packets of a direction look like."""
        return self.original if way == Direction.ORIGINAL else self.translated.turned()

    def after(self, way: Direction) -> Key:
        """Return what packets of a direction become."""
        return self.translated if way == Direction.ORIGINAL else self.original.turned()

    def touch(self, way: Direction, event: Event, length: int, now: int) -> None:
        """Note a packet. A SYN of the client on an open connection does not keep it."""
        self.state = states.TRANSITIONS.get((self.state, way, event), self.state)
        is_opening = self.state in (State.SYN_SENT, State.SYN_RECEIVED)
        if event != Event.SYN or way != Direction.ORIGINAL or is_opening:
            self.last_seen[way] = now
        self.packets[way] += 1
        self.bytes[way] += length


class Limits:
    """How many answers of a kind may be given: to one client in a second, and to all."""

    def __init__(self, hertz: int, secret: tuple[int, int]) -> None:
        self._hertz = hertz
        self._secret = secret
        self._left: dict[str, tuple[int, int]] = {}  # of each kind, in parts of an answer, and since when
        self._given: Counter[tuple[str, int, int]] = Counter()  # by kind, client and second
        self._drawn = 0

    def take(self, kind: str, client: int, now: int) -> bool:
        """Return whether there is an answer for a client, and take it out."""
        full = Limit.ANSWERS * self._hertz
        left, since = self._left.get(kind, (full, now))
        left = min(full, left + (now - since & 0xFFFFFFFF) * Limit.ANSWERS)
        self._left[kind] = left, now
        who = kind, client >> 64 if client & IPV6 else client, now // self._hertz
        if left < _CHARGE * self._hertz or self._given[who] == _CLIENT_ANSWERS:
            return False
        self._given[who] += 1
        self._drawn += 1
        if hash_of(self._drawn, 0, 0, *self._secret) % _CHARGE == 0:
            self._left[kind] = left - _CHARGE * self._hertz, now
        return True


@dataclass
class Datagram:
    """A datagram in fragments: the ports of its first, which pieces have come (of blocks), and why no more may."""

    ports: tuple[int, int]
    since: int
    over: Reason | None = None
    pieces: list[tuple[int, int]] = field(default_factory=list)
    total: int = 0

    def refusal(self, first: int, behind: int, is_last: bool) -> Reason:
        """Return why a piece is not to be sent on, or FORWARDED."""
        if self.over:
            return self.over
        if any(low <= first and behind <= high for low, high in self.pieces):
            return Reason.FRAGMENT_AGAIN
        if (
            any(first < high and low < behind for low, high in self.pieces)
            or (self.total and (behind > self.total or is_last))
            or (is_last and any(high > behind for _, high in self.pieces))
        ):
            self.over = Reason.FRAGMENT_OVERLAP
            return Reason.FRAGMENT_OVERLAP
        return Reason.FRAGMENT_BROKEN if len(self.pieces) == _MOST_PIECES else Reason.FORWARDED

    def note(self, first: int, behind: int, is_last: bool) -> bool:
        """Note a piece; return whether all have come."""
        self.pieces.append((first, behind))
        self.total = behind if is_last else self.total
        return sum(high - low for low, high in self.pieces) == self.total


def piece_of(packet: Packet) -> tuple[int, int, bool] | None:
    """Return first block, block behind, and whether it is the last piece; None: no datagram has it."""
    header = packet.l4 - _ETHERNET - (_IPV6 + 8 if packet.key.is_ipv6 else 0)
    protocol = packet.key.transport
    is_hidden = packet.offset == 0 and packet.size < _LEAST[protocol]
    is_tiny = packet.offset == 1 and protocol == Protocol.TCP
    is_uneven = packet.has_more and packet.size % 8
    is_beyond = header + packet.offset * 8 + packet.size > 65535
    if is_hidden or is_tiny or is_uneven or is_beyond or not packet.size:
        return None
    return packet.offset, packet.offset + -(-packet.size // 8), not packet.has_more


class Outcome(NamedTuple):
    """What became of a frame: why, its bytes then, and the interface it leaves by (0: by none; AWAITED: not yet)."""

    reason: Reason
    frame: bytes
    ifindex: int = 0


class Reference:
    """A node. `services` by frontend (address, port, protocol), `hops` by destination address."""

    def __init__(
        self,
        services: Mapping[tuple[int, int, int], Service],
        hops: Mapping[int, Hop],
        seed: int,
        hertz: int,
        secret: tuple[int, int] = (0, 0),
        inside: tuple[tuple[int, int], ...] = (),
        snat_ports: tuple[int, int] = (61000, 65535),
        link: int = 0,
        named: Callable[[int], int] = int,
        sources: tuple[int, ...] = (),
        vlans: frozenset[int] = frozenset({0}),
        stations: frozenset[bytes] = frozenset(),
    ) -> None:
        self._services = services
        self._vlans = vlans
        self.stations = stations  # MAC addresses that frames are ours by; none: all are
        self._more = 0  # bytes of the VLAN tags of the frame at hand that count against the MTU
        self.vips = {address for address, _, _ in services}
        self._hops = hops
        self._seed = seed
        self._hertz = hertz
        self._secret = secret
        self._inside = inside
        self._snat_ports = snat_ports
        self._sources = sources  # IPv4 addresses that others come from; none: the node's own on the way
        self._named = named  # the number that stands for an address in the tables
        self._link = link  # the interface that answers leave by
        self.ping = Ping.ANSWER
        self.occupied: frozenset[int] = frozenset()  # ports that sockets of the node have
        self._narrow = Hop()  # where a frame did not fit last
        self._limits = Limits(hertz, secret)
        self.flows: dict[Key, tuple[Connection, Direction]] = {}
        self.turns: Counter[Service] = Counter()  # of round robin
        self.loads: Counter[Address] = Counter()  # of endpoints: what least connections has given them
        self.datagrams: dict[tuple[int, int, int, int], Datagram] = {}
        self.followed: dict[tuple[int, int, int, int], int] = {}  # by XDP, since when
        self.given: dict[tuple[int, int], tuple[Address, int]] = {}  # endpoint and when, by identity and client

    def xdp(self, frame: bytes, now: int, *, is_stalled: bool = False, offloads: bool = True) -> Outcome:
        """Return what XDP does with a frame. A frame that is punted is as it was.

        Where XDP does not offload, userspace forwards what is known while it lives.
        """
        return self._untagged(frame, lambda inner: self._xdp(inner, now, is_stalled=is_stalled, offloads=offloads))

    def _untagged(self, frame: bytes, judge: Callable[[bytes], Outcome]) -> Outcome:
        """Return what becomes of a frame whose VLAN tags stay where they are."""
        reason, count = vlan_tags(frame, self._vlans)
        if self.stations and len(frame) >= _ETHERNET and not frame[0] & 1 and frame[:6] not in self.stations:
            reason = Reason.OTHER_STATION
        if reason != Reason.FORWARDED:
            return Outcome(reason, frame)
        self._more = max(0, count - 4)
        outcome = judge(frame[:12] + frame[12 + count :])
        inner = outcome.frame
        return outcome._replace(frame=inner[:12] + frame[12 : 12 + count] + inner[12:])

    def _xdp(self, frame: bytes, now: int, *, is_stalled: bool, offloads: bool) -> Outcome:
        packet = parse(frame)
        length = len(frame)
        if reason := _of_nobodys(frame, packet) or self._unsummed_of_flow(packet, now):
            return Outcome(reason, frame)
        if packet.reason in (Reason.ICMP_ERROR, Reason.ECHO_REPLY):
            flow = self._live_flow(packet.key, now)
            if flow is not None:
                return self._icmp_in_xdp(frame, packet, flow, is_stalled=is_stalled)
            packet = packet if self._is_about_a_frontend(packet) else _unknown_icmp(packet)
        if packet.reason != Reason.FORWARDED:
            return self._rest_in_xdp(frame, packet, now, is_stalled=is_stalled)
        flow = self._live_flow(packet.key, now)
        is_reopened = flow is not None and self._reopens(flow, packet)
        if flow and not is_reopened:
            if packet.ttl > 1 and self._is_left_alone(packet.key, flow):
                return Outcome(Reason.LEFT_TO_EGRESS, frame)
            is_walked = packet.has_options or not (offloads or self._is_for_kernel(flow))
            if packet.ttl > 1 and is_walked and not is_stalled:
                return Outcome(Reason.OPTIONS if offloads else Reason.NOT_OFFLOADED, frame)
            sent = self._send(frame, packet, flow, length, now)
            is_punted = sent.reason == Reason.TOO_BIG and not is_stalled
            return Outcome(Reason.OVERSIZED, frame) if is_punted else sent
        if self._is_reset(packet):
            return Outcome(Reason.ENDPOINT_REMOVED if is_stalled else Reason.TO_BE_RESET, frame)
        service = self._service(packet.key)
        if service is None:
            what = self._what_is(replace(packet, is_source_routed=False))
            return Outcome(Reason.VIP_STRAY if what == Reason.NOT_SERVED and not is_stalled else what, frame)
        if refusal := _refusal_of_a_first(replace(packet, is_source_routed=False)):
            return Outcome(refusal, frame)
        if service.mid_stream == MidStream.PASS and states.FIRST_STATE.get(packet.event) == State.ADOPTED:
            return Outcome(Reason.MID_STREAM_PASSED, frame)
        punted = Outcome(Reason.REOPENED if is_reopened else Reason.NEW_FLOW, frame)
        return self._decided_in_xdp(punted, packet, service, now, is_stalled=is_stalled, offloads=offloads)

    def _decided_in_xdp(
        self, punted: Outcome, packet: Packet, service: Service, now: int, *, is_stalled: bool, offloads: bool
    ) -> Outcome:
        """Return what XDP does with the first packet of a connection, which else is `punted`."""
        frame = punted.frame
        may_admit = not service.needs_userspace
        if service.admits_here and offloads and may_admit and not packet.has_options:
            admitted = self._admit_in_xdp(frame, packet, service, now)
            return punted if verdict_of(admitted.reason) == Verdict.DROP and not is_stalled else admitted
        if is_stalled and service.when_stalled == WhenStalled.ADMIT and may_admit:
            return self._admit_in_xdp(frame, packet, service, now)
        return self._punt(punted.reason, frame, service.when_stalled, is_stalled)

    def _is_for_kernel(self, flow: tuple[Connection, Direction]) -> bool:
        return self._hop_to(flow[0].after(flow[1]).destination[0]).state == HopState.KERNEL

    def _is_left_alone(self, key: Key, flow: tuple[Connection, Direction]) -> bool:
        """Tell whether a packet of a flow is translated by the program where it leaves."""
        return self._is_for_kernel(flow) and _is_left_to_egress(key, *flow)

    def _icmp_in_xdp(
        self, frame: bytes, packet: Packet, flow: tuple[Connection, Direction], *, is_stalled: bool
    ) -> Outcome:
        """Return what XDP does with an error about a flow, or with the reply to an echo request."""
        if self._is_left_alone(packet.key, flow):
            return Outcome(Reason.LEFT_TO_EGRESS, frame)
        if packet.reason == Reason.ECHO_REPLY and packet.ttl <= 1:
            return Outcome(Reason.TTL_EXPIRED, frame)
        otherwise = WhenStalled.PASS if packet.reason == Reason.ICMP_ERROR else WhenStalled.DROP
        return self._punt(packet.reason, frame, otherwise, is_stalled)

    def _rest_in_xdp(self, frame: bytes, packet: Packet, now: int, *, is_stalled: bool) -> Outcome:
        """Return what XDP does with what is neither TCP nor UDP in one piece."""
        if packet.datagram and packet.reason == Reason.FLOW_FRAGMENT:
            flow = self._live_flow(packet.key, now)
            if flow is not None and not self._is_left_alone(packet.key, flow):
                self.followed[packet.datagram] = now
            packet = replace(packet, reason=Reason.VIP_FRAGMENT)
        if packet.datagram and packet.reason == Reason.UNSUMMED:
            packet = replace(packet, reason=Reason.VIP_FRAGMENT)
        what = self._what_is(replace(packet, is_source_routed=False))
        is_piece = packet.datagram is not None and packet.reason == Reason.VIP_FRAGMENT
        since = self.followed.get(packet.datagram) if is_piece else None  # type: ignore[arg-type]
        if since is not None and now - since & 0xFFFFFFFF <= _FRAGMENT_S * self._hertz:
            what = Reason.TTL_EXPIRED if packet.ttl <= 1 else Reason.FLOW_FRAGMENT
        if what == Reason.NOT_SERVED and packet.reason in (Reason.NOT_TCP_UDP, Reason.ICMP_ERROR) and not is_stalled:
            what = Reason.ICMP_ERROR if packet.reason == Reason.ICMP_ERROR else Reason.VIP_STRAY
        if verdict_of(what) == Verdict.PUNT:
            return self._punt(what, frame, WhenStalled.DROP, is_stalled)
        return Outcome(what, frame)

    def userspace(self, frame: bytes, now: int) -> Outcome:
        """Return what the pipeline does with a frame: what is dropped may be answered."""
        return self._untagged(frame, lambda inner: self._userspace(inner, now))

    def _userspace(self, frame: bytes, now: int) -> Outcome:
        outcome = self._judge(frame, now)
        is_over = verdict_of(outcome.reason) == Verdict.DROP and outcome.ifindex == 0
        packet = parse(frame)
        is_first = packet.datagram is not None and packet.reason in (Reason.FLOW_FRAGMENT, Reason.UNSUMMED)
        is_known = outcome.reason != Reason.MALFORMED  # whose it is
        if is_over and is_first and is_known and outcome.reason not in _OF_FRAGMENTS:
            self._begin_datagram(packet, now, Reason.FRAGMENT_ALONE)
        return self._refuse(frame, outcome.reason, now) if is_over else outcome

    def _judge(self, frame: bytes, now: int) -> Outcome:
        packet = parse(frame)
        if reason := _of_nobodys(frame, packet) or self._unsummed_of_flow(packet, now):
            return Outcome(reason, frame)
        if packet.reason == Reason.ICMP_ERROR:
            return self._translate_error(frame, packet, now)
        if packet.reason == Reason.VIP_FRAGMENT and packet.datagram:
            return self._follow(frame, packet, now)
        if packet.reason == Reason.FLOW_FRAGMENT:
            refusal = self._lead(packet, now)
            if refusal != Reason.FORWARDED:
                return Outcome(refusal, frame)
            packet = replace(packet, reason=Reason.FORWARDED)
        packet = self._with_flow_of_echo(packet, now)
        if packet.reason != Reason.FORWARDED:
            what = self._what_is(packet)
            return self._answer_echo(frame, packet, now) if what == Reason.VIP_ECHO else Outcome(what, frame)
        flow = self.flows.get(packet.key)
        if flow and not self._is_expired(flow[0], now) and not self._reopens(flow, packet):
            if packet.is_source_routed and packet.ttl > 1:
                return Outcome(Reason.SOURCE_ROUTED, frame)
            return self._send(frame, packet, flow, len(frame), now)
        if self._is_reset(packet):
            return Outcome(Reason.ENDPOINT_REMOVED, frame)
        service = self._service(packet.key)
        if packet.datagram and packet.key.destination[0] not in self.vips:
            return Outcome(Reason.OTHER_FRAGMENT, frame)
        if service is None:
            return Outcome(self._what_is(packet), frame)
        refusal = _refusal_of_a_first(packet)
        if refusal:
            return Outcome(refusal, frame)
        if flow:
            self.withdraw(flow[0])
        return self._admit(frame, packet, service, now)

    def _unsummed_of_flow(self, packet: Packet, now: int) -> Reason | None:
        is_unsummed = packet.reason == Reason.UNSUMMED and packet.datagram is None
        return packet.reason if is_unsummed and self._live_flow(packet.key, now) else None

    def _with_flow_of_echo(self, packet: Packet, now: int) -> Packet:
        """Return a packet; an echo request that is forwarded, and a reply of a flow, like one of any other flow."""
        if packet.reason == Reason.ECHO_REPLY:
            is_known = self._live_flow(packet.key, now) is not None
            return replace(packet, reason=Reason.FORWARDED) if is_known else _unknown_icmp(packet)
        is_asked = packet.reason == Reason.VIP_ECHO and self.ping == Ping.FORWARD
        return (
            replace(packet, reason=Reason.FORWARDED) if is_asked and self._what_is(packet) == packet.reason else packet
        )

    def withdraw(self, connection: Connection) -> None:
        """Forget a connection."""
        for way in states.BOTH:
            del self.flows[connection.key_of(way)]

    def _datagram_of(self, packet: Packet, now: int) -> Datagram | None:
        assert packet.datagram
        found = self.datagrams.get(packet.datagram)
        is_old = found and now - found.since & 0xFFFFFFFF > _FRAGMENT_S * self._hertz
        return None if is_old else found

    def _lead(self, packet: Packet, now: int) -> Reason:
        """Return why a first fragment is not to be sent on, or FORWARDED."""
        assert packet.datagram
        piece, datagram = piece_of(packet), self._datagram_of(packet, now)
        if datagram and now - datagram.since & 0xFFFFFFFF > _LEAD_S * self._hertz:
            del self.datagrams[packet.datagram]
            datagram = None
        if datagram:
            refusal = datagram.refusal(*(piece or (packet.offset, packet.offset, not packet.has_more)))
            if refusal != Reason.FORWARDED:
                return refusal
        return Reason.FORWARDED if piece else Reason.FRAGMENT_BROKEN

    def _begin_datagram(self, packet: Packet, now: int, over: Reason | None = None) -> None:
        assert packet.datagram
        datagram = self.datagrams[packet.datagram] = Datagram(
            (packet.key.source[1], packet.key.destination[1]), now, over
        )
        self._note(packet, datagram)

    def _note(self, packet: Packet, datagram: Datagram) -> None:
        assert packet.datagram
        piece = piece_of(packet) if packet.key.transport in _LEAST else None
        if piece is None or datagram.note(*piece):
            del self.datagrams[packet.datagram]

    def _follow(self, frame: bytes, packet: Packet, now: int) -> Outcome:
        """Return what becomes of a fragment without ports."""
        datagram = self._datagram_of(packet, now)
        if datagram is None:
            what = self._what_is(packet)
            if what == Reason.VIP_FRAGMENT and packet.key.transport not in _LEAST:
                what = Reason.NOT_SERVED
            elif what == Reason.VIP_FRAGMENT and (not packet.offset or not piece_of(packet)):
                what = Reason.FRAGMENT_BROKEN
            elif what == Reason.VIP_FRAGMENT:
                return Outcome(Reason.FRAGMENT_ALONE, frame, AWAITED)
            return Outcome(what, frame)
        piece = piece_of(packet) if packet.offset else None
        refusal = datagram.refusal(*piece) if piece else Reason.FRAGMENT_BROKEN
        if refusal != Reason.FORWARDED:
            return Outcome(refusal, frame)
        (source, _), (destination, _), protocol = packet.key
        ports = datagram.ports
        flow = self._live_flow(Key((source, ports[0]), (destination, ports[1]), protocol), now)
        if flow is None:
            return Outcome(Reason.FRAGMENT_ALONE, frame)
        after = flow[0].after(flow[1])
        hop = self._hop_to(after.destination[0])
        refusal = self._refusal(hop, packet.ttl, len(frame))
        if refusal != Reason.FORWARDED:
            return self._refused(refusal, frame)
        to_kernel = hop.state == HopState.KERNEL
        if to_kernel and _is_left_to_egress(flow[0].key_of(flow[1]), *flow):
            return Outcome(Reason.TO_KERNEL, frame, KERNEL)
        flow[0].touch(flow[1], Event.DATA, len(frame), now)
        self._note(packet, datagram)
        if to_kernel:
            return Outcome(Reason.TO_KERNEL, _readdressed(frame, after), KERNEL)
        return Outcome(Reason.FORWARDED, _routed(_readdressed(frame, after), hop), hop.ifindex)

    def _what_is(self, packet: Packet) -> Reason:
        """Return what becomes of a packet with neither flow nor frontend; a punt: that is userspace's to say."""
        if packet.asked not in self.vips:
            others = {
                Reason.FORWARDED: Reason.NOT_OURS,
                Reason.UNSUMMED: Reason.OTHER_FRAGMENT if packet.datagram else Reason.NOT_OURS,
                Reason.VIP_FRAGMENT: Reason.OTHER_FRAGMENT,
                Reason.VIP_ECHO: Reason.OTHER_ICMP,
            }
            return others.get(packet.reason, packet.reason)
        refusal = _refusal_of_a_first(packet)
        if refusal:
            return refusal
        if packet.reason == Reason.UNSUMMED:
            return packet.reason
        if packet.reason == Reason.VIP_FRAGMENT or (packet.reason == Reason.VIP_ECHO and self.ping != Ping.DROP):
            return packet.reason
        return Reason.NOT_SERVED

    def _refuse(self, frame: bytes, reason: Reason, now: int) -> Outcome:
        """Return the drop of a frame, answered if its sender is to be told."""
        packet = parse(frame)
        if packet.key.is_ipv6:
            return self._refuse6(frame, packet, reason, now)
        is_uncut = bool(frame[20] & 0x40)
        protocol = frame[23]
        is_told = (reason == Reason.TOO_BIG and is_uncut) or reason in _REFUSED
        is_reset = protocol == Protocol.TCP and bool(packet.flags & 4) and reason in _REFUSED
        is_later = int.from_bytes(frame[20:22], "big") & 0x1FFF
        is_error = protocol == Protocol.ICMP and not (
            reason == Reason.TOO_BIG and packet.reason in (Reason.VIP_ECHO, Reason.ECHO_REPLY)
        )
        if not is_told or is_reset or is_later or is_error or not _has_a_sender(frame):
            return Outcome(reason, frame)
        if not self._limits.take("refusals", packet.key.source[0], now):
            return Outcome(Reason.ANSWER_LIMITED, frame)
        if reason == Reason.TOO_BIG:
            mtu = self._narrow.mtu - self._more
            return Outcome(reason, _unreachable(frame, 4, self._complainant(packet), mtu), self._link)
        destination = packet.key.destination[0]
        if protocol == Protocol.TCP:
            return Outcome(reason, _reset(frame, packet), self._link)
        return Outcome(reason, _unreachable(frame, 3 if protocol in (17, 132) else 2, destination, 0), self._link)

    def _refuse6(self, frame: bytes, packet: Packet, reason: Reason, now: int) -> Outcome:
        is_long, protocol = reason == Reason.TOO_BIG, packet.key.transport
        is_reset = protocol == Protocol.TCP and bool(packet.flags & 4) and not is_long
        is_known = protocol in _LEAST or packet.unknown_at or (is_long and protocol == Protocol.ICMPV6)
        is_told = (is_long or reason in _REFUSED) and is_known
        is_told = is_told and packet.reason != Reason.ICMP_ERROR and not packet.offset
        if not is_told or is_reset or not _has_a_sender6(frame):
            return Outcome(reason, frame)
        if not self._limits.take("refusals", packet.key.source[0], now):
            return Outcome(Reason.ANSWER_LIMITED, frame)
        if is_long:
            mtu = self._narrow.mtu - self._more
            return Outcome(reason, _error6(frame, packet, 2, 0, self._complainant(packet), mtu), self._link)
        if protocol == Protocol.TCP:
            return Outcome(reason, _reset6(frame, packet), self._link)
        if packet.unknown_at:
            return Outcome(
                reason, _error6(frame, packet, 4, 1, packet.key.destination[0], packet.unknown_at), self._link
            )
        return Outcome(reason, _error6(frame, packet, 1, 4, packet.key.destination[0], 0), self._link)

    def _answer_echo6(self, frame: bytes, packet: Packet, now: int) -> Outcome:
        if not _has_a_sender6(frame):
            return Outcome(Reason.NOT_SERVED, frame)
        if not self._limits.take("echoes", packet.key.source[0], now):
            return Outcome(Reason.ANSWER_LIMITED, frame)
        icmp = frame[packet.l4 :]
        new = bytearray(frame[6:12] + frame[:6] + frame[12:22] + frame[38:54] + frame[22:38] + icmp)
        new[21], new[54] = 64, _ECHO6_REPLY
        _adjust(new, 56, icmp[:2], new[54:56])
        if packet.has_options:  # extension headers were for the way here
            length = _ETHERNET + _IPV6 + int.from_bytes(frame[18:20], "big") - packet.l4
            new[18:21] = length.to_bytes(2, "big") + bytes((Protocol.ICMPV6,))
            del new[_ETHERNET + _IPV6 + length :]
        return Outcome(Reason.ECHO_ANSWERED, bytes(new), self._link)

    def _complainant(self, packet: Packet) -> int:
        """Return who says that a packet is too long: the node, where it was to a client."""
        connection, way = self.flows.get(packet.key, (None, Direction.ORIGINAL))
        if connection is None or way == Direction.ORIGINAL:
            return packet.key.destination[0]
        return self._hop_to(connection.translated.destination[0]).source or packet.key.destination[0]

    def _answer_echo(self, frame: bytes, packet: Packet, now: int) -> Outcome:
        if packet.key.is_ipv6:
            return self._answer_echo6(frame, packet, now)
        if not _has_a_sender(frame):
            return Outcome(Reason.NOT_SERVED, frame)
        if not self._limits.take("echoes", packet.key.source[0], now):
            return Outcome(Reason.ANSWER_LIMITED, frame)
        new = bytearray(frame[6:12] + frame[:6] + frame[12:26] + frame[30:34] + frame[26:30] + frame[34:])
        new[22], new[packet.l4] = 64, 0
        _adjust(new, 24, frame[22:24], new[22:24])
        _adjust(new, packet.l4 + 2, frame[packet.l4 : packet.l4 + 2], new[packet.l4 : packet.l4 + 2])
        return Outcome(Reason.ECHO_ANSWERED, bytes(new), self._link)

    def _service(self, key: Key) -> Service | None:
        if key.is_echo:  # of the lowest port
            there = [place for place in self._services if place[0] == key.destination[0]]
            return self._services[min(there)] if there and not key.destination[1] else None
        return self._services.get((*key.destination, key.protocol))

    def _live_flow(self, key: Key, now: int) -> tuple[Connection, Direction] | None:
        flow = self.flows.get(key)
        return flow if flow and not self._is_expired(flow[0], now) else None

    def _is_expired(self, connection: Connection, now: int) -> bool:
        if connection.state == State.RESET:
            return True
        own_s = [seconds for name, seconds in connection.timeouts if connection.state in states.NAMED[name]]
        timeout = round((own_s[0] if own_s else states.TIMEOUT_S[connection.state]) * self._hertz)
        return all((now - seen) & 0xFFFFFFFF > timeout for seen in connection.last_seen)

    def _is_reset(self, packet: Packet) -> bool:
        flow = self.flows.get(packet.key)
        return flow is not None and flow[0].state == State.RESET and not self._reopens(flow, packet)

    def reset(self, key: Key) -> None:
        """Have a connection reset: its Service has lost the endpoint."""
        self.flows[key][0].state = State.RESET

    @staticmethod
    def _reopens(flow: tuple[Connection, Direction], packet: Packet) -> bool:
        connection, way = flow
        return way == Direction.ORIGINAL and packet.event == Event.SYN and connection.state in states.REOPENS

    @staticmethod
    def _punt(reason: Reason, frame: bytes, when_stalled: WhenStalled, is_stalled: bool) -> Outcome:
        if is_stalled:
            reason = Reason.STALLED_PASSED if when_stalled == WhenStalled.PASS else Reason.STALLED_DROPPED
        return Outcome(reason, frame)

    @staticmethod
    def _refused(reason: Reason, frame: bytes) -> Outcome:
        """Return what becomes of a frame that cannot go to its next hop: it waits where that is not resolved."""
        return Outcome(reason, frame, AWAITED if reason == Reason.NO_NEXT_HOP else 0)

    def _refusal(self, hop: Hop, ttl: int, length: int) -> Reason:
        refusal = hop.refusal(ttl, length + self._more)
        if refusal == Reason.TOO_BIG:
            self._narrow = hop
        return refusal

    def _hop_to(self, address: int) -> Hop:
        return self._hops.get(address, Hop(HopState.UNRESOLVED))

    def _admit_in_xdp(self, frame: bytes, packet: Packet, service: Service, now: int) -> Outcome:
        old = self.flows.get(packet.key)
        if old:
            self.withdraw(old[0])
        return self._admit(frame, packet, service, now, _XDP_TRIES)._replace(ifindex=0)

    def _admit(self, frame: bytes, packet: Packet, service: Service, now: int, tries: int = _TRIES) -> Outcome:
        if not service.admits(packet.key.source[0]):
            return Outcome(Reason.SOURCE_REFUSED, frame)
        if service.inside and self._is_inside(packet.key.source[0]):
            service = service.inside
        state = states.FIRST_STATE.get(packet.event)
        if state is None:
            return Outcome(Reason.STRAY_RST if packet.event == Event.RST else Reason.BAD_FLAGS, frame)
        if state == State.ADOPTED and service.mid_stream:
            if service.mid_stream == MidStream.PASS:
                return Outcome(Reason.MID_STREAM_PASSED, frame)
            return Outcome(Reason.MID_STREAM_RESET, frame)
        if not service.endpoints:
            return Outcome(Reason.NO_LOCAL_ENDPOINT if service.is_elsewhere else Reason.NO_ENDPOINT, frame)
        way_back = self._hops.get(packet.key.source[0])
        if way_back is None or way_back.state == HopState.UNRESOLVED:
            return Outcome(Reason.NO_NEXT_HOP, frame, AWAITED if way_back else 0)
        for attempt in range(tries):
            client = service.identity, packet.key.source[0]
            kept = self._kept(service, client, now) if service.affinity_s and not attempt else None
            endpoint = kept or self._schedule(service, packet.key, attempt, now)
            if tries == _XDP_TRIES and endpoint[0] == packet.key.source[0]:
                return Outcome(Reason.STALLED_DROPPED, frame)
            refusal = self._refusal(self._hop_to(endpoint[0]), packet.ttl, len(frame))
            if refusal != Reason.FORWARDED:
                return self._refused(refusal, frame)
            is_last = attempt == _TRIES - 1
            begun = self._begin(packet.key, service, endpoint, state, now, is_last=is_last)
            if begun == Reason.ADMITTED:
                self.loads[endpoint] += service.scheduler == Scheduler.LEAST_CONNECTIONS
                if service.affinity_s:
                    self.given[client] = endpoint, now
                return self._send(frame, packet, self.flows[packet.key], len(frame), now)._replace(reason=begun)
            if begun != Reason.REPLY_CLASH:
                return Outcome(begun, frame)
        return Outcome(Reason.REPLY_CLASH, frame)

    def _begin(self, key: Key, service: Service, endpoint: Address, state: State, now: int, *, is_last: bool) -> Reason:
        """Note a connection to an endpoint; return ADMITTED, or why it cannot be."""
        sources: Iterable[Address] = [key.source]
        is_masqueraded = self._is_masqueraded(service, endpoint, key.source[0])
        if is_masqueraded:
            if state == State.ADOPTED:
                return Reason.MID_STREAM_RESET
            is_by_kernel = self._hop_to(endpoint[0]).state == HopState.KERNEL
            given = () if is_by_kernel or key.is_ipv6 else self._sources
            addresses = given or (self._source_towards(endpoint, key),)
            if not addresses[0]:
                return Reason.NO_SNAT_ADDRESS
            sources = self._ports_of(addresses, key)
        elif is_last and state != State.ADOPTED:
            sources = self._ports_of((key.source[0],), key)
        for source in sources:
            translated = Key(source, (endpoint[0], 0) if key.is_echo else endpoint, key.protocol)
            taken = self.flows.get(translated.turned())
            if taken and self._is_expired(taken[0], now):
                self.withdraw(taken[0])
            if translated.turned() not in self.flows:
                connection = Connection(key, translated, state, service.timeouts, [now, now])
                for way in states.BOTH:
                    self.flows[connection.key_of(way)] = connection, way
                return Reason.ADMITTED
        return Reason.NO_SNAT_PORT if is_masqueraded else Reason.REPLY_CLASH

    def _schedule(self, service: Service, key: Key, attempt: int, now: int) -> Address:
        if service.scheduler == Scheduler.ROUND_ROBIN:
            self.turns[service] += 1
            return service.endpoints[(self.turns[service] - 1) % len(service.endpoints)]
        dice = self._secret[1] ^ now << 32
        if service.scheduler == Scheduler.LEAST_CONNECTIONS:
            two = [service.select(key, self._seed, attempt, each) for each in (dice, ~dice & _M64)]
            return min(two, key=lambda endpoint: self.loads[endpoint])
        return service.select(key, self._seed, attempt, dice if service.scheduler == Scheduler.RANDOM else None)

    def _kept(self, service: Service, client: tuple[int, int], now: int) -> Address | None:
        endpoint, since = self.given.get(client, ((0, 0), now))
        is_old = (now - since & 0xFFFFFFFF) > service.affinity_s * self._hertz
        return endpoint if endpoint in service.endpoints and not is_old else None

    def _is_inside(self, client: int) -> bool:
        return any(first <= client <= last for first, last in self._inside)

    def _is_masqueraded(self, service: Service, endpoint: Address, client: int) -> bool:
        if endpoint[0] == client:
            return True
        if endpoint in service.local and self._hop_to(endpoint[0]).state == HopState.KERNEL:
            return False
        return {
            Masquerade.NOBODY: False,
            Masquerade.OUTSIDE: not self._is_inside(client),
            Masquerade.REMOTE: endpoint not in service.local,
            Masquerade.EVERYBODY: True,
        }[service.masquerade]

    def _source_towards(self, endpoint: Address, key: Key) -> int:
        hop = self._hop_to(endpoint[0])
        return key.destination[0] if hop.state == HopState.KERNEL and endpoint[0] == key.source[0] else hop.source

    def _ports_of(self, addresses: Sequence[int], key: Key) -> Iterator[Address]:
        """Yield where a masqueraded connection may come from, in the order in which it is tried."""
        first, last = self._snat_ports if key.source[1] >= 1024 else _PRIVILEGED
        if key.is_echo:
            first, last = 0, 0xFFFF
        source, destination = ((self._named(host), port) for host, port in (key.source, key.destination))
        words = Key(source, destination, key.protocol).in_memory()
        hashed = hash_of(*words, self._secret[1], self._secret[0])
        step = hash_of(*words, *self._secret) | 1
        for number in range(_PORTS_TRIED):
            tried = hashed + number * step & _M64
            any_port = first + ((tried >> 32) * (last - first + 1) >> 32)
            host = addresses[(tried & 0xFFFFFFFF) * len(addresses) >> 32]
            port = key.source[1] if not number and first <= key.source[1] <= last else any_port
            is_taken = port in self.occupied or (host, port, key.protocol) in self._services
            if key.is_echo or not is_taken:
                yield host, port

    def _send(self, frame: bytes, packet: Packet, flow: tuple[Connection, Direction], length: int, now: int) -> Outcome:
        connection, way = flow
        after = connection.after(way)
        hop = self._hop_to(after.destination[0])
        refusal = self._refusal(hop, packet.ttl, length)
        if refusal != Reason.FORWARDED:
            return self._refused(refusal, frame)
        to_kernel = hop.state == HopState.KERNEL
        if to_kernel and _is_left_to_egress(packet.key, connection, way):
            return Outcome(Reason.TO_KERNEL, frame, KERNEL)
        if to_kernel and self._comes_from_here(packet.key, after, way):
            return Outcome(Reason.NOT_FORWARDABLE, frame)
        if packet.datagram:
            self._begin_datagram(packet, now)
        if to_kernel:
            connection.touch(way, packet.event, length, now)
            return Outcome(Reason.TO_KERNEL, _translated(frame, packet, after), KERNEL)
        connection.touch(way, packet.event, length, now)
        return Outcome(Reason.FORWARDED, _rewritten(frame, packet, after, hop), hop.ifindex)

    def _comes_from_here(self, before: Key, after: Key, way: Direction) -> bool:
        """Tell whether a packet would come from an address of the node, which its kernel takes from nobody."""
        if way == Direction.REPLY:
            return after.source[0] not in self.vips
        return after.source != before.source and not _reaches_itself(before, after)

    def egress(self, frame: bytes, now: int) -> Outcome:
        """Return what the program does with a frame that the kernel sends by an interface of ours."""
        packet = parse(frame)
        if packet.reason == Reason.UNSUMMED:  # half a checksum may look like none
            packet = replace(packet, reason=Reason.FORWARDED)
        if packet.reason in (Reason.VIP_FRAGMENT, Reason.FLOW_FRAGMENT):
            return Outcome(Reason.OTHER_FRAGMENT, frame)
        if packet.reason == Reason.VIP_ECHO:
            return Outcome(Reason.OTHER_ICMP, frame)
        if packet.reason not in (Reason.FORWARDED, Reason.ICMP_ERROR, Reason.ECHO_REPLY):
            return Outcome(packet.reason, frame)
        flow = self._live_flow(packet.key, now)
        if flow is None or flow[1] != Direction.REPLY:
            return Outcome(Reason.NOT_OURS if packet.reason == Reason.FORWARDED else Reason.OTHER_ICMP, frame)
        connection, way = flow
        if packet.reason == Reason.ICMP_ERROR and packet.key.is_echo:
            return Outcome(Reason.OTHER_ICMP, frame)
        if _reaches_itself(packet.key, connection.after(way)):
            if packet.reason == Reason.ICMP_ERROR:
                return Outcome(Reason.OTHER_ICMP, frame)
            connection.touch(way, packet.event, len(frame), now)
            return Outcome(Reason.TO_KERNEL, frame[6:12] + _translated(frame, packet, connection.after(way))[6:])
        after = packet.key._replace(source=connection.after(way).source)
        if packet.key.is_echo:
            after = after._replace(destination=(after.destination[0], connection.after(way).destination[1]))
        if packet.reason == Reason.ICMP_ERROR:
            return Outcome(Reason.FORWARDED, _translated_error(frame, packet, packet.key, after))
        connection.touch(way, packet.event, len(frame), now)
        return Outcome(Reason.FORWARDED, _translated(frame, packet, after))

    def _is_about_a_frontend(self, packet: Packet) -> bool:
        """Tell whether an ICMP error is to a VIP that is said to have sent what it quotes, as one of its frontends."""
        host, port = packet.key.destination
        is_frontend = (host, port, packet.key.protocol) in self._services
        is_to_sender = packet.asked == host and host in self.vips
        return packet.reason == Reason.ICMP_ERROR and is_frontend and is_to_sender

    def _imagined(self, packet: Packet, now: int) -> Key | None:
        """Return what the endpoint would get of a client whose next packet, in mid-stream, were adopted; or None."""
        key = packet.key
        if not self._is_about_a_frontend(packet) or _is_martian(key) or self._is_reset(packet):
            return None
        service = self._services[*key.destination, key.protocol]
        if not service.admits(key.source[0]):
            return None
        if service.inside and self._is_inside(key.source[0]):
            service = service.inside
        may_be_adopted = key.transport == Protocol.UDP or service.mid_stream == MidStream.ADOPT
        if not service.endpoints or service.scheduler or not may_be_adopted:
            return None
        kept = self._kept(service, (service.identity, key.source[0]), now) if service.affinity_s else None
        endpoint = kept or service.select(key, self._seed, 0)
        if self._is_masqueraded(service, endpoint, key.source[0]):
            return None
        return key._replace(destination=endpoint)

    def _translate_error(self, frame: bytes, packet: Packet, now: int) -> Outcome:
        flow = self._live_flow(packet.key, now)
        before, after = packet.key, flow[0].after(flow[1]) if flow else self._imagined(packet, now)
        if after is None:
            return Outcome(Reason.ICMP_UNUSABLE, frame)
        if packet.is_source_routed and packet.ttl > 1:
            return Outcome(Reason.SOURCE_ROUTED, frame)
        hop = self._hop_to(after.destination[0])
        refusal = hop.refusal(packet.ttl, len(frame) + self._more)
        if refusal != Reason.FORWARDED:
            return self._refused(refusal, frame)
        if hop.state == HopState.KERNEL:
            is_left = flow is not None and _is_left_to_egress(before, *flow)
            new = frame if is_left else _translated_error(frame, packet, before, after)
            return Outcome(Reason.TO_KERNEL, new, KERNEL)
        return Outcome(Reason.FORWARDED, _routed(_translated_error(frame, packet, before, after), hop), hop.ifindex)


def _unknown_icmp(packet: Packet) -> Packet:
    """Return an ICMP message that is of no flow."""
    return replace(packet, reason=Reason.OTHER_ICMP)


def _reaches_itself(before: Key, after: Key) -> bool:
    """Tell whether an endpoint reaches itself by way of the kernel."""
    return (after.source[0], after.destination[0]) == (before.destination[0], before.source[0])


def _is_left_to_egress(before: Key, connection: Connection, way: Direction) -> bool:
    """Tell whether a packet that the kernel routes is translated as it leaves, and not before."""
    return way == Direction.REPLY and before.destination[0] == connection.after(way).destination[0]


def _is_martian(key: Key) -> bool:
    """Tell whether a packet comes from an address that is no host's."""
    address = key.source[0]
    if key.is_ipv6:
        return _is_martian6(octets_of(address))
    return address >> 24 in (0, 127) or address >> 28 == 14 or address == 0xFFFFFFFF


def _is_martian6(source: bytes) -> bool:
    """Tell the same of an IPv6 address: none, loopback, IPv4-mapped or multicast."""
    return int.from_bytes(source) <= 1 or source[:12] == bytes(10) + b"\xff\xff" or source[0] == 0xFF


def _refusal_of_a_first(packet: Packet) -> Reason | None:
    """Return why a packet to a VIP begins nothing, whatever the Service is."""
    if packet.ttl <= 1:
        return Reason.TTL_EXPIRED
    if packet.reason == Reason.FORWARDED and _is_martian(packet.key):
        return Reason.MARTIAN_SOURCE
    is_unsound = packet.reason == Reason.FORWARDED and packet.is_unsound
    if packet.reason == Reason.TOO_SHORT or packet.is_damaged or is_unsound:
        return Reason.MALFORMED
    return Reason.SOURCE_ROUTED if packet.is_source_routed else None


def _of_nobodys(frame: bytes, packet: Packet) -> Reason | None:
    """Return why a frame is the kernel's, whatever is known: none that says it is to a VIP, or to one host."""
    is_cut = packet.reason == Reason.TOO_SHORT and packet.key.source[0] == packet.key.destination[0] == 0
    if packet.reason == Reason.NOT_IPV4 or is_cut or packet.is_discovery:
        return packet.reason
    return Reason.FOR_MANY if frame[0] & 1 else None


def _has_a_sender(frame: bytes) -> bool:
    """Tell whether a frame is one host's, to us alone."""
    return frame[26] not in (0, 127) and frame[26] < 224 and not frame[6] & 1 and frame[26:30] != frame[30:34]


def _has_a_sender6(frame: bytes) -> bool:
    return not frame[6] & 1 and not _is_martian6(frame[22:38]) and frame[22:38] != frame[38:54]


def _answer6(frame: bytes, protocol: int, source: int, l4: bytes, check_at: int) -> bytes:
    """Return an answer of our own, whose checksum is zero yet."""
    pseudo = octets_of(source) + frame[22:38] + struct.pack("!II", len(l4), protocol)
    l4 = l4[:check_at] + checksum(pseudo + l4).to_bytes(2, "big") + l4[check_at + 2 :]
    header = struct.pack("!IHBB", 6 << 28, len(l4), protocol, 64)
    return frame[6:12] + frame[:6] + frame[12:14] + header + octets_of(source) + frame[22:38] + l4


def _error6(frame: bytes, packet: Packet, kind: int, code: int, source: int, rest: int) -> bytes:
    """Return the ICMPv6 error that quotes what has room in the frame, at least to the ports or to what is unknown."""
    least = max(packet.l4 - _ETHERNET + 8, packet.unknown_at + 1)
    quoted = min(_IPV6 + int.from_bytes(frame[18:20], "big"), max(least, len(frame) - 62), 1232)
    icmp = struct.pack("!BBHI", kind, code, 0, rest) + frame[14 : 14 + quoted]
    return _answer6(frame, Protocol.ICMPV6, source, icmp, 2)


def _reset6(frame: bytes, packet: Packet) -> bytes:
    segment = frame[packet.l4 : _ETHERNET + _IPV6 + int.from_bytes(frame[18:20], "big")]
    return _answer6(frame, Protocol.TCP, packet.key.destination[0], _reset_of(segment, packet), 16)


def checksum(data: bytes) -> int:
    """Return the Internet checksum of bytes whose own is zero."""
    return adjusted(0xFFFF, b"", data + bytes(len(data) % 2))


def _answer(frame: bytes, tos: int, protocol: int, source: int, l4: bytes) -> bytes:
    """Return an answer of our own: back to where a frame came from, as a packet of `source`."""
    ip = bytearray(struct.pack("!BBHHHBBHI", 0x45, tos, _IPV4 + len(l4), 0, 0x4000, 64, protocol, 0, source))
    ip += frame[26:30]
    ip[10:12] = checksum(ip).to_bytes(2, "big")
    return frame[6:12] + frame[:6] + frame[12:14] + bytes(ip) + l4


def _reset(frame: bytes, packet: Packet) -> bytes:
    """Return the RST that a closed port answers a TCP segment with (RFC 9293 section 3.10.7.1)."""
    tcp = _reset_of(frame[packet.l4 : _ETHERNET + int.from_bytes(frame[16:18], "big")], packet)
    pseudo = frame[30:34] + frame[26:30] + struct.pack("!HH", Protocol.TCP, len(tcp))
    tcp = tcp[:16] + checksum(pseudo + tcp).to_bytes(2, "big") + tcp[18:]
    return _answer(frame, 0, Protocol.TCP, packet.key.destination[0], tcp)


def _reset_of(segment: bytes, packet: Packet) -> bytes:
    """Return it without a checksum."""
    source_port, port, sequence, acknowledged, offset = struct.unpack("!HHIIB", segment[:13])
    length = max(0, len(segment) - (offset >> 4) * 4) + bool(packet.flags & 2) + bool(packet.flags & 1)
    marks = (acknowledged, 0, 4) if packet.flags & 16 else (0, sequence + length & 0xFFFFFFFF, 20)
    return struct.pack("!HHIIBB", port, source_port, *marks[:2], 0x50, marks[2]) + bytes(6)


def _unreachable(frame: bytes, code: int, source: int, mtu: int) -> bytes:
    """Return the ICMP error that quotes a frame's IPv4 header and eight bytes."""
    ip = frame[_ETHERNET:]
    quote = ip[: min((ip[0] & 15) * 4 + 8, int.from_bytes(ip[2:4], "big"))]
    icmp = struct.pack("!BBHHH", 3, code, 0, 0, mtu) + quote
    return _answer(frame, 0xC0, Protocol.ICMP, source, icmp[:2] + checksum(icmp).to_bytes(2, "big") + icmp[4:])


def _rewritten(frame: bytes, packet: Packet, after: Key, hop: Hop) -> bytes:
    return _routed(_translated(frame, packet, after), hop)


def _translated6(frame: bytes, packet: Packet, after: Key) -> bytes:
    new = bytearray(frame)
    check_at = packet.l4 + _CHECK_AT[Protocol(after.transport)]
    where, ports = after.fields(packet.l4)
    new[22:54] = octets_of(after.source[0]) + octets_of(after.destination[0])
    new[where] = ports
    _adjust(new, check_at, frame[22:54] + frame[where], new[22:54] + ports)
    if after.transport == Protocol.UDP and new[check_at : check_at + 2] == b"\0\0":
        new[check_at : check_at + 2] = b"\xff\xff"
    return bytes(new)


def _routed(frame: bytes, hop: Hop) -> bytes:
    new = bytearray(frame)
    new[:12] = hop.macs
    if is_ipv6(frame):
        new[21] -= 1
        return bytes(new)
    new[22] -= 1
    _adjust(new, 24, frame[22:24], new[22:24])
    return bytes(new)


def _translated(frame: bytes, packet: Packet, after: Key) -> bytes:
    if after.is_ipv6:
        return _translated6(frame, packet, after)
    new = bytearray(frame)
    check_at = packet.l4 + _CHECK_AT[Protocol(after.protocol)]
    where, ports = after.fields(packet.l4)
    new[26:34] = struct.pack("!II", after.source[0], after.destination[0])
    new[where] = ports
    _adjust(new, 24, frame[26:34], new[26:34])
    if after.is_echo:  # no addresses (RFC 792)
        _adjust(new, check_at, frame[where], ports)
    elif after.protocol == Protocol.TCP or frame[check_at : check_at + 2] != b"\0\0":
        _adjust(new, check_at, frame[26:34] + frame[where], new[26:34] + ports)
        if after.protocol == Protocol.UDP and new[check_at : check_at + 2] == b"\0\0":
            new[check_at : check_at + 2] = b"\xff\xff"
    return bytes(new)


def _readdressed(frame: bytes, after: Key) -> bytes:
    new = bytearray(frame)
    if after.is_ipv6:
        new[22:54] = octets_of(after.source[0]) + octets_of(after.destination[0])
        return bytes(new)
    new[26:34] = struct.pack("!II", after.source[0], after.destination[0])
    _adjust(new, 24, frame[26:34], new[26:34])
    return bytes(new)


def _adjust(frame: bytearray, at: int, old: bytes, new: bytes) -> None:
    frame[at : at + 2] = adjusted(int.from_bytes(frame[at : at + 2], "big"), old, new).to_bytes(2, "big")


def _translated_error6(frame: bytes, packet: Packet, before: Key, after: Key) -> bytes:
    new, icmp = bytearray(frame), packet.l4
    stop = _ETHERNET + _IPV6 + int.from_bytes(frame[18:20], "big")
    quote = icmp + 8
    check_at = packet.quoted + _CHECK_AT[Protocol(after.transport)]
    where, ports = after.turned().fields(packet.quoted)
    new[quote + 8 : quote + 40] = octets_of(after.destination[0]) + octets_of(after.source[0])
    new[where] = ports
    if check_at + 2 <= stop:
        was, became = (data[quote + 8 : quote + 40] + data[where] for data in (frame, bytes(new)))
        _adjust(new, check_at, was, became)
        if after.transport == Protocol.UDP and new[check_at : check_at + 2] == b"\0\0":
            new[check_at : check_at + 2] = b"\xff\xff"
    if after.source[0] != before.source[0]:
        new[22:38] = octets_of(after.source[0])
    new[38:54] = octets_of(after.destination[0])
    end = stop - (stop - quote) % 2
    _adjust(new, icmp + 2, frame[22:54] + frame[quote:end], new[22:54] + new[quote:end])
    return bytes(new)


def _translated_error(frame: bytes, packet: Packet, before: Key, after: Key) -> bytes:
    if after.is_ipv6:
        return _translated_error6(frame, packet, before, after)
    new, icmp = bytearray(frame), packet.l4
    stop = _ETHERNET + int.from_bytes(frame[16:18], "big")  # padding follows
    quote = icmp + 8
    quoted = quote + (frame[quote] & 15) * 4
    check_at = quoted + _CHECK_AT[Protocol(after.protocol)]
    # The quoted packet travelled the other way.
    where, ports = after.turned().fields(quoted)
    new[quote + 12 : quote + 20] = struct.pack("!II", after.destination[0], after.source[0])
    new[where] = ports
    addresses = slice(quote + 12, quote + 20)
    _adjust(new, quote + 10, frame[addresses], new[addresses])
    is_summed = after.protocol == Protocol.TCP or frame[check_at : check_at + 2] != b"\0\0"
    if after.is_echo:
        _adjust(new, check_at, frame[where], ports)
    elif check_at + 2 <= stop and is_summed:
        _adjust(new, check_at, frame[addresses] + frame[where], new[addresses] + ports)
        if after.protocol == Protocol.UDP and new[check_at : check_at + 2] == b"\0\0":
            new[check_at : check_at + 2] = b"\xff\xff"
    end = stop - (stop - quote) % 2  # an odd byte at the end has not changed
    _adjust(new, icmp + 2, frame[quote:end], new[quote:end])
    if after.source[0] != before.source[0]:
        new[26:30] = struct.pack("!I", after.source[0])
    new[30:34] = struct.pack("!I", after.destination[0])
    _adjust(new, 24, frame[26:34], new[26:34])
    return bytes(new)
