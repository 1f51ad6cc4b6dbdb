"""What becomes of a frame, in plain Python: no compiled code, no BPF, no shared memory.

Small and slow, to be read beside docs/architecture.md: `Reference.xdp` is what the kernel's side does with a frame,
`Reference.userspace` what the pipeline does with one that it is given. Addresses and ports are host numbers, times are
jiffies. The tables of conntrack/states.py and Maglev's are taken from the product; they have tests of their own.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import NamedTuple

from conntrack import states
from lb import maglev
from xdp.schema import Direction, Event, HopState, Protocol, Reason, State, WhenStalled

Address = tuple[int, int]

_ETHERNET, _IPV4 = 14, 20
_M64 = (1 << 64) - 1
_TRIES = 8
_ICMP_ERRORS = (3, 4, 11, 12)
AWAITED = 0xFFFFFFFF
_CHECK_AT = {Protocol.TCP: 16, Protocol.UDP: 6}


# Where a five-tuple lies.


def hash_of(addrs: int, ports: int, protocol: int, key0: int, key1: int) -> int:
    """Return the hash of a five-tuple as it lies in memory (hash.h)."""
    a = (addrs ^ key0) * 0x9E3779B97F4A7C15 & _M64
    b = ((protocol << 32 | ports) ^ key1) * 0x6A09E667F3BCC909 & _M64
    mixed = a ^ (b >> 32 | b << 32 & _M64)
    mixed ^= mixed >> 29
    mixed = mixed * 0xBB67AE8584CAA73B & _M64
    return mixed ^ mixed >> 32


def first_bucket(hashed: int, buckets: int) -> int:
    return (hashed & 0xFFFFFFFF) * buckets >> 32


def second_bucket(hashed: int, buckets: int) -> int:
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

    @property
    def event(self) -> Event:
        """What it tells the state machine."""
        return states.event_of(self.flags) if self.key.protocol == Protocol.TCP else Event.DATA


def _key(ip: bytes, ports: bytes) -> Key:
    source, destination = struct.unpack("!II", ip[12:20])
    source_port, destination_port = struct.unpack("!HH", ports[:4])
    return Key((source, source_port), (destination, destination_port), ip[9])


def parse(frame: bytes) -> Packet:
    """Return what a frame is."""
    ip = frame[_ETHERNET:]
    if len(frame) >= _ETHERNET and frame[12:14] != b"\x08\0":
        return Packet(Reason.NOT_IPV4)
    if len(ip) < _IPV4:
        return Packet(Reason.TOO_SHORT)
    if ip[0] >> 4 != 4:
        return Packet(Reason.NOT_IPV4)
    header, total = (ip[0] & 15) * 4, int.from_bytes(ip[2:4], "big")
    if header < _IPV4 or not header <= total <= len(ip):
        return Packet(Reason.TOO_SHORT)
    protocol, fragment, l4 = ip[9], int.from_bytes(ip[6:8], "big") & 0x3FFF, ip[header:total]
    if fragment:
        return Packet(Reason.VIP_FRAGMENT, _key(ip, bytes(4)), _ETHERNET + header, ip[8])
    if protocol == Protocol.ICMP:
        return _parse_error(l4, _ETHERNET + header, ip[8])
    if protocol not in (Protocol.TCP, Protocol.UDP):
        return Packet(Reason.NOT_TCP_UDP)
    if total - header < (20 if protocol == Protocol.TCP else 8):
        return Packet(Reason.TOO_SHORT)
    flags = l4[13] & 0x3F if protocol == Protocol.TCP else 0
    return Packet(Reason.FORWARDED, _key(ip, l4), _ETHERNET + header, ip[8], flags)


def _parse_error(icmp: bytes, l4: int, ttl: int) -> Packet:
    quote = icmp[8:]
    if len(quote) < _IPV4:
        return Packet(Reason.TOO_SHORT)
    header = (quote[0] & 15) * 4
    is_usable = quote[0] >> 4 == 4 and header >= _IPV4 and quote[9] in (Protocol.TCP, Protocol.UDP)
    if icmp[0] not in _ICMP_ERRORS or not is_usable or int.from_bytes(quote[6:8], "big") & 0x1FFF:
        return Packet(Reason.OTHER_ICMP)
    if len(quote) < header + 8:
        return Packet(Reason.TOO_SHORT)
    return Packet(Reason.ICMP_ERROR, _key(quote, quote[header:]).turned(), l4, ttl)


# What is known.


@dataclass(frozen=True)
class Hop:
    """Where frames go next."""

    state: HopState = HopState.FORWARD
    macs: bytes = bytes(12)
    ifindex: int = 0
    mtu: int = 1500

    def refusal(self, ttl: int, length: int) -> Reason:
        """Return why a frame cannot go there, or FORWARDED."""
        if ttl <= 1:
            return Reason.TTL_EXPIRED
        if self.state == HopState.UNRESOLVED:
            return Reason.NO_NEXT_HOP
        if self.state != HopState.FORWARD:
            return Reason.NOT_FORWARDABLE
        return Reason.TOO_BIG if length > self.mtu + _ETHERNET else Reason.FORWARDED


@dataclass(frozen=True)
class Service:
    """A Service port: its endpoints, and what XDP does with new connections when userspace is stalled."""

    endpoints: tuple[Address, ...]
    when_stalled: WhenStalled = WhenStalled.DROP

    def select(self, key: Key, seed: int, attempt: int) -> Address:
        """Return the endpoint of a new connection."""
        table = maglev.positions([(IPv4Address(host), port) for host, port in self.endpoints], seed)
        hashed = hash_of(*key.in_memory(), seed, ~seed & _M64)
        return self.endpoints[table[(((hashed >> 32) * len(table) >> 32) + attempt) % len(table)]]


@dataclass
class Connection:
    """Both directions of a connection: `translated` is what the endpoint gets of what the client sends."""

    original: Key
    translated: Key
    state: State
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
        """Note a packet."""
        self.state = states.TRANSITIONS.get((self.state, way, event), self.state)
        self.last_seen[way] = now
        self.packets[way] += 1
        self.bytes[way] += length


class Outcome(NamedTuple):
    """What became of a frame: why, its bytes then, and the interface it leaves by (0: by none; AWAITED: not yet)."""

    reason: Reason
    frame: bytes
    ifindex: int = 0


class Reference:
    """A node. `services` by frontend (address, port, protocol), `hops` by destination address."""

    def __init__(
        self, services: Mapping[tuple[int, int, int], Service], hops: Mapping[int, Hop], seed: int, hertz: int
    ) -> None:
        self._services = services
        self._vips = {address for address, _, _ in services}
        self._hops = hops
        self._seed = seed
        self._hertz = hertz
        self.flows: dict[Key, tuple[Connection, Direction]] = {}

    def xdp(self, frame: bytes, now: int, *, is_stalled: bool = False, offloads: bool = True) -> Outcome:
        """Return what XDP does with a frame. A frame that is punted is as it was.

        Where XDP does not offload, userspace forwards what is known while it lives.
        """
        packet = parse(frame)
        length = len(frame)
        if packet.reason == Reason.VIP_FRAGMENT:
            if packet.key.destination[0] not in self._vips:
                return Outcome(Reason.OTHER_FRAGMENT, frame)
            return self._punt(Reason.VIP_FRAGMENT, frame, WhenStalled.DROP, is_stalled)
        if packet.reason == Reason.ICMP_ERROR:
            if self._live_flow(packet.key, now) is None:
                return Outcome(Reason.OTHER_ICMP, frame)
            return self._punt(Reason.ICMP_ERROR, frame, WhenStalled.PASS, is_stalled)
        if packet.reason != Reason.FORWARDED:
            return Outcome(packet.reason, frame)
        flow = self._live_flow(packet.key, now)
        if flow:
            if self._reopens(flow, packet):
                return self._punt(Reason.REOPENED, frame, WhenStalled.DROP, is_stalled)
            if packet.ttl > 1 and not offloads and not is_stalled:
                return Outcome(Reason.NOT_OFFLOADED, frame)
            return self._send(frame, packet, flow, length, now)
        service = self._service(packet.key)
        if service is None:
            return Outcome(Reason.NOT_OURS, frame)
        if packet.ttl <= 1:
            return Outcome(Reason.TTL_EXPIRED, frame)
        return self._punt(Reason.NEW_FLOW, frame, service.when_stalled, is_stalled)

    def userspace(self, frame: bytes, now: int) -> Outcome:
        """Return what the pipeline does with a frame."""
        packet = parse(frame)
        if packet.reason == Reason.VIP_FRAGMENT:
            is_vip = packet.key.destination[0] in self._vips
            return Outcome(Reason.FRAGMENT if is_vip else Reason.OTHER_FRAGMENT, frame)
        if packet.reason == Reason.ICMP_ERROR:
            return self._translate_error(frame, packet, now)
        if packet.reason != Reason.FORWARDED:
            return Outcome(packet.reason, frame)
        flow = self.flows.get(packet.key)
        if flow and not self._is_expired(flow[0], now) and not self._reopens(flow, packet):
            return self._send(frame, packet, flow, len(frame), now)
        service = self._service(packet.key)
        if service is None:
            return Outcome(Reason.NOT_OURS, frame)
        if flow:
            self.withdraw(flow[0])
        return self._admit(frame, packet, service, now)

    def withdraw(self, connection: Connection) -> None:
        """Forget a connection."""
        for way in states.BOTH:
            del self.flows[connection.key_of(way)]

    def _service(self, key: Key) -> Service | None:
        return self._services.get((*key.destination, key.protocol))

    def _live_flow(self, key: Key, now: int) -> tuple[Connection, Direction] | None:
        flow = self.flows.get(key)
        return flow if flow and not self._is_expired(flow[0], now) else None

    def _is_expired(self, connection: Connection, now: int) -> bool:
        timeout = round(states.TIMEOUT_S[connection.state] * self._hertz)
        return all((now - seen) & 0xFFFFFFFF > timeout for seen in connection.last_seen)

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

    def _hop_to(self, address: int) -> Hop:
        return self._hops.get(address, Hop(HopState.UNRESOLVED))

    def _admit(self, frame: bytes, packet: Packet, service: Service, now: int) -> Outcome:
        if packet.ttl <= 1:
            return Outcome(Reason.TTL_EXPIRED, frame)
        state = states.FIRST_STATE.get(packet.event)
        if state is None:
            return Outcome(Reason.STRAY_RST if packet.event == Event.RST else Reason.BAD_FLAGS, frame)
        if packet.key.source[0] not in self._hops:
            return Outcome(Reason.NO_NEXT_HOP, frame)
        for attempt in range(_TRIES):
            if not service.endpoints:
                return Outcome(Reason.NO_ENDPOINT, frame)
            endpoint = service.select(packet.key, self._seed, attempt)
            refusal = self._hop_to(endpoint[0]).refusal(packet.ttl, len(frame))
            if refusal != Reason.FORWARDED:
                return self._refused(refusal, frame)
            translated = packet.key._replace(destination=endpoint)
            if translated.turned() not in self.flows:
                connection = Connection(packet.key, translated, state, [now, now])
                for way in states.BOTH:
                    self.flows[connection.key_of(way)] = connection, way
                sent = self._send(frame, packet, self.flows[packet.key], len(frame), now)
                return sent._replace(reason=Reason.ADMITTED)
        return Outcome(Reason.REPLY_CLASH, frame)

    def _send(self, frame: bytes, packet: Packet, flow: tuple[Connection, Direction], length: int, now: int) -> Outcome:
        connection, way = flow
        after = connection.after(way)
        hop = self._hop_to(after.destination[0])
        refusal = hop.refusal(packet.ttl, length)
        if refusal != Reason.FORWARDED:
            return self._refused(refusal, frame)
        connection.touch(way, packet.event, length, now)
        return Outcome(Reason.FORWARDED, _rewritten(frame, packet, after, hop), hop.ifindex)

    def _translate_error(self, frame: bytes, packet: Packet, now: int) -> Outcome:
        flow = self._live_flow(packet.key, now)
        if flow is None:
            return Outcome(Reason.ICMP_UNUSABLE, frame)
        before, after = packet.key, flow[0].after(flow[1])
        hop = self._hop_to(after.destination[0])
        refusal = hop.refusal(packet.ttl, len(frame))
        if refusal != Reason.FORWARDED:
            return self._refused(refusal, frame)
        return Outcome(Reason.FORWARDED, _translated_error(frame, packet, before, after, hop), hop.ifindex)


def _rewritten(frame: bytes, packet: Packet, after: Key, hop: Hop) -> bytes:
    new = bytearray(frame)
    l4, check_at = packet.l4, packet.l4 + _CHECK_AT[Protocol(after.protocol)]
    new[:12] = hop.macs
    new[22] -= 1
    new[26:34] = struct.pack("!II", after.source[0], after.destination[0])
    new[l4 : l4 + 4] = struct.pack("!HH", after.source[1], after.destination[1])
    _adjust(new, 24, frame[22:24] + frame[26:34], new[22:24] + new[26:34])
    if after.protocol == Protocol.TCP or frame[check_at : check_at + 2] != b"\0\0":
        _adjust(new, check_at, frame[26:34] + frame[l4 : l4 + 4], new[26:34] + new[l4 : l4 + 4])
        if after.protocol == Protocol.UDP and new[check_at : check_at + 2] == b"\0\0":
            new[check_at : check_at + 2] = b"\xff\xff"
    return bytes(new)


def _adjust(frame: bytearray, at: int, old: bytes, new: bytes) -> None:
    frame[at : at + 2] = adjusted(int.from_bytes(frame[at : at + 2], "big"), old, new).to_bytes(2, "big")


def _translated_error(frame: bytes, packet: Packet, before: Key, after: Key, hop: Hop) -> bytes:
    new, icmp = bytearray(frame), packet.l4
    stop = _ETHERNET + int.from_bytes(frame[16:18], "big")  # padding follows
    quote = icmp + 8
    ports = quote + (frame[quote] & 15) * 4
    check_at = ports + _CHECK_AT[Protocol(after.protocol)]
    # The quoted packet travelled the other way.
    new[quote + 12 : quote + 20] = struct.pack("!II", after.destination[0], after.source[0])
    new[ports : ports + 4] = struct.pack("!HH", after.destination[1], after.source[1])
    addresses = slice(quote + 12, quote + 20)
    _adjust(new, quote + 10, frame[addresses], new[addresses])
    is_summed = after.protocol == Protocol.TCP or frame[check_at : check_at + 2] != b"\0\0"
    if check_at + 2 <= stop and is_summed:
        _adjust(new, check_at, frame[addresses] + frame[ports : ports + 4], new[addresses] + new[ports : ports + 4])
        if after.protocol == Protocol.UDP and new[check_at : check_at + 2] == b"\0\0":
            new[check_at : check_at + 2] = b"\xff\xff"
    end = stop - (stop - quote) % 2  # an odd byte at the end has not changed
    _adjust(new, icmp + 2, frame[quote:end], new[quote:end])
    new[:12] = hop.macs
    new[22] -= 1
    if after.source[0] != before.source[0]:
        new[26:30] = struct.pack("!I", after.source[0])
    new[30:34] = struct.pack("!I", after.destination[0])
    _adjust(new, 24, frame[22:24] + frame[26:34], new[22:24] + new[26:34])
    return bytes(new)
