"""Telling the neighbours that this node has the VIPs, and hearing when somebody else says so (RFC 5227, RFC 4861).

Requests for a VIP are answered by the packet loops (dataplane/pipeline.py). Here are the announcements: twice, two
seconds apart, when a VIP or an interface is new, so that a neighbour that knew another node sends to us from now on.
An ARP packet whose sender claims a VIP is a conflict, unless we have sent it: it is told and not fought over, so that a
node that takes over is let do so. So is a neighbour advertisement, by which IPv6 does the same.

Questions for an IPv6 VIP go to a group, of which this node becomes a member: so the interface lets them through, and a
switch that listens to who is a member of what brings them.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import NamedTuple

from dataplane.netdev import Interface
from xdp.addresses import address_of, from_wire, is_ipv6, to_wire

_ETH_P_ARP, _ETH_P_IPV6 = 0x0806, 0x86DD
_ARP = struct.Struct("!6s6sHHHBBH6s4s6s4s")  # with the Ethernet header
_REQUEST = 1
_BROADCAST, _NOBODY = b"\xff" * 6, bytes(6)
_ADVERTISEMENT = struct.Struct("!BBHI16sBB6s")  # with the option that says where its sender is on the link
_ICMPV6, _ADVERTISED, _OVERRIDE, _LINK_ADDRESS = 58, 136, 1 << 29, 2
_ALL_NODES, _ALL_NODES_MAC = IPv6Address("ff02::1").packed, bytes.fromhex("333300000001")
_ICMP6_FILTER = 1  # a level ICMPV6 option that Python does not name: a bit for each type that is not wanted
_ONLY_ADVERTISEMENTS = struct.pack(
    "=8I", *(0xFFFFFFFF ^ (n == _ADVERTISED >> 5) << (_ADVERTISED & 31) for n in range(8))
)
_SOL_PACKET, _ADD_MEMBERSHIP, _DROP_MEMBERSHIP, _OF_GROUP = 263, 1, 2, 0
_TIMES, _INTERVAL_S = 2, 2.0  # ANNOUNCE_NUM, ANNOUNCE_INTERVAL
_AT_A_TIME = 50  # announcements in one turn, of which there are four a second
_HEARD_AT_A_TIME = 256  # what is more stays in the socket, or is lost: a conflict is told again
_CONFLICT_SHOWN_S = 60.0
_ASIDE = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_MOST_CONFLICTS = 64  # that are remembered: whoever invents addresses must not fill the memory

_log = logging.getLogger(__name__)


class Conflict(NamedTuple):
    """Who else claims a VIP, and since when it was last heard."""

    mac: str
    interface: str
    at_s: float


@dataclass(slots=True)
class _Due:
    at_s: float
    name: str
    vip: int
    times: int


def announcement(mac: bytes, vip: int) -> bytes:
    """Return the frame that announces `vip` (a number of xdp/addresses.py) at `mac`: sender and target are the VIP."""
    octets = to_wire(vip)
    if is_ipv6(vip):
        return _advertisement(mac, octets)
    return _ARP.pack(_BROADCAST, mac, _ETH_P_ARP, 1, 0x0800, 6, 4, _REQUEST, mac, octets, _NOBODY, octets)


def _advertisement(mac: bytes, vip: bytes) -> bytes:
    """Return the unsolicited neighbour advertisement to all nodes (RFC 4861 section 7.2.6)."""
    message = _ADVERTISEMENT.pack(_ADVERTISED, 0, 0, _OVERRIDE, vip, _LINK_ADDRESS, 1, mac)
    header = struct.pack("!IHBB", 6 << 28, len(message), _ICMPV6, 255) + vip + _ALL_NODES
    pseudo = vip + _ALL_NODES + struct.pack("!II", len(message), _ICMPV6)
    total = sum(struct.unpack(f"!{len(pseudo + message) // 2}H", pseudo + message))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    summed = message[:2] + struct.pack("!H", ~total & 0xFFFF) + message[4:]
    return _ALL_NODES_MAC + mac + struct.pack("!H", _ETH_P_IPV6) + header + summed


def group_of(vip: int) -> bytes:
    """Return the group that questions for an IPv6 address go to (RFC 4291 section 2.7.1)."""
    return IPv6Address("ff02::1:ff00:0").packed[:13] + to_wire(vip)[13:]


class Announcer:
    """Announces VIPs on interfaces from `announce` on until `withdraw`; one thread calls everything here."""

    def __init__(self) -> None:
        self.sent = 0
        self.heard = 0  # conflicting packets
        self._interfaces: dict[str, Interface] = {}
        self._sockets: dict[str, socket.socket] = {}
        self._listeners: dict[str, _Listener] = {}
        self._vips: frozenset[int] = frozenset()
        self._due: deque[_Due] = deque()
        self._conflicts: dict[tuple[int, str], Conflict] = {}  # by VIP and MAC address

    def announce(self, vips: Collection[int], interfaces: Mapping[str, Interface], now: float) -> None:
        """Have these VIPs, which packets can reach by now, announced where they have not been."""
        up = {name: interface for name, interface in interfaces.items() if interface.is_up}
        fresh = {
            name
            for name, interface in up.items()
            if name not in self._sockets or not _is_same(self._interfaces[name], interface)
        }
        wanted = frozenset(vips)
        for name in self._sockets.keys() - (up.keys() - fresh):  # one that is down, too: it is new when it comes up
            self._sockets.pop(name).close()
            self._listeners.pop(name).close()
        for name in fresh:
            with contextlib.suppress(OSError):  # it went away again; else the next call tries again
                self._sockets[name] = _open(up[name])
                self._listeners[name] = _Listener(up[name], self._sockets[name])
        groups = {group_of(vip) for vip in wanted if is_ipv6(vip)}
        for listener in self._listeners.values():
            listener.join(groups)
        opened = sorted(fresh & self._sockets.keys())
        self._due.extend(_Due(now, name, vip, _TIMES) for name in opened for vip in sorted(wanted))
        old = sorted(self._sockets.keys() - fresh)
        self._due.extend(_Due(now, name, vip, _TIMES) for name in old for vip in sorted(wanted - self._vips))
        self._interfaces = up
        self._vips = wanted

    def turn(self, now: float) -> None:
        """Send what is due, and hear what others say."""
        for _ in range(min(_AT_A_TIME, len(self._due))):
            if self._due[0].at_s > now:
                break
            due = self._due.popleft()
            if due.vip in self._vips and due.name in self._sockets:
                self._send(due)
                if due.times > 1:
                    self._due.append(_Due(now + _INTERVAL_S, due.name, due.vip, due.times - 1))
        for name, sock in self._sockets.items():
            self._hear(name, sock, now)
        for name, listener in self._listeners.items():
            for vip, mac in listener.heard():
                self._note(name, vip, mac, now)

    def conflicts(self, now: float) -> list[str]:
        """Return who else claims VIPs of ours, in words."""
        return [
            f"{address_of(vip)}: {mac} on {name} says that it has this address, too; take the address, or --announce, "
            "from one of the two"
            for (vip, _), (mac, name, at_s) in self._conflicts.items()
            if now - at_s < _CONFLICT_SHOWN_S and vip in self._vips
        ]

    def withdraw(self) -> None:
        """Announce nothing any more."""
        for sock in self._sockets.values():
            sock.close()
        for listener in self._listeners.values():
            listener.close()
        self._sockets.clear()
        self._listeners.clear()
        self._due.clear()
        self._interfaces = {}

    def _send(self, due: _Due) -> None:
        with contextlib.suppress(OSError):  # down: it is announced again when it comes up
            self._sockets[due.name].send(announcement(self._interfaces[due.name].mac, due.vip))
            self.sent += 1

    def _hear(self, name: str, sock: socket.socket, now: float) -> None:
        with contextlib.suppress(OSError):
            for _ in range(_HEARD_AT_A_TIME):
                frame, origin = sock.recvfrom(64)
                if len(frame) < _ARP.size or origin[2] == socket.PACKET_OUTGOING:
                    continue
                *_, mac, sender, _target_mac, _target = _ARP.unpack_from(frame)
                self._note(name, from_wire(sender), mac, now)

    def _note(self, name: str, vip: int, mac: bytes, now: float) -> None:
        """Note who says that it has an address, if that is a VIP and it is not us."""
        if vip not in self._vips or mac in {interface.mac for interface in self._interfaces.values()}:
            return
        self.heard += 1
        conflict = Conflict(mac.hex(":"), name, now)
        self._conflicts = {key: known for key, known in self._conflicts.items() if now - known.at_s < _CONFLICT_SHOWN_S}
        is_known = (vip, conflict.mac) in self._conflicts
        if not is_known and len(self._conflicts) == _MOST_CONFLICTS:
            return
        self._conflicts[vip, conflict.mac] = conflict
        if not is_known:
            _log.error("%s is announced by %s, too (heard on %s)", address_of(vip), conflict.mac, name)


class _Listener:
    """A member of the groups that questions for IPv6 VIPs go to, on one interface; hears advertisements there.

    `link` is a packet socket of that interface.
    """

    def __init__(self, interface: Interface, link: socket.socket) -> None:
        self._name, self._ifindex = interface.name, interface.ifindex
        self._link = link
        self._groups: set[bytes] = set()
        self._socket: socket.socket | None = None  # there may be no IPv6

    def join(self, groups: set[bytes]) -> None:
        """Be a member of these groups and of no others; where that fails, the next call tries again."""
        if groups == self._groups:
            return
        with contextlib.suppress(OSError):
            if self._socket is None:
                self._socket = _open_icmpv6(self._name)
            for group in self._groups - groups:
                self._groups.remove(group)  # also if it cannot be left: the interface went away, and so did this
                self._change(self._socket, group, socket.IPV6_LEAVE_GROUP, _DROP_MEMBERSHIP)
            for group in groups - self._groups:
                self._change(self._socket, group, socket.IPV6_JOIN_GROUP, _ADD_MEMBERSHIP)
                self._groups.add(group)

    def _change(self, sock: socket.socket, group: bytes, how: int, otherwise: int) -> None:
        """Join or leave a group; where the kernel has no room for a membership, have the interface let it through."""
        try:
            sock.setsockopt(socket.IPPROTO_IPV6, how, struct.pack("=16sI", group, self._ifindex))
        except OSError:
            request = struct.pack("=iHH8s", self._ifindex, _OF_GROUP, 6, b"\x33\x33" + group[12:])
            self._link.setsockopt(_SOL_PACKET, otherwise, request)

    def heard(self) -> Iterator[tuple[int, bytes]]:
        """Yield (address, MAC address) of those who say that they have an address, since the last call."""
        if self._socket is None:
            return
        with contextlib.suppress(OSError):
            for _ in range(_HEARD_AT_A_TIME):
                message, about, *_ = self._socket.recvmsg(64, socket.CMSG_SPACE(4))
                is_of_this_link = any(int.from_bytes(value, sys.byteorder) == 255 for _, _, value in about)
                if len(message) >= _ADVERTISEMENT.size and is_of_this_link:
                    *_, target, kind, _length, mac = _ADVERTISEMENT.unpack_from(message)
                    if kind == _LINK_ADDRESS:
                        yield from_wire(target), mac

    def close(self) -> None:
        """Leave all groups."""
        if self._socket is not None:
            self._socket.close()


def _open_icmpv6(name: str) -> socket.socket:
    """Return a socket that hears neighbour advertisements on an interface."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW | _ASIDE, _ICMPV6)
    try:
        sock.setsockopt(_ICMPV6, _ICMP6_FILTER, _ONLY_ADVERTISEMENTS)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)  # no router has sent it on (RFC 4861)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
    except OSError:
        sock.close()
        raise
    return sock


def _is_same(known: Interface, interface: Interface) -> bool:
    return (known.ifindex, known.mac) == (interface.ifindex, interface.mac)


def _open(interface: Interface) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | _ASIDE, 0)
    sock.bind((interface.name, _ETH_P_ARP))
    return sock
