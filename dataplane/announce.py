"""Telling the neighbours that this node has the VIPs, and hearing when somebody else says so (RFC 5227).

Requests for a VIP are answered by the packet loops (dataplane/pipeline.py). Here are the announcements: twice, two
seconds apart, when a VIP or an interface is new, so that a neighbour that knew another node sends to us from now on.
An ARP packet whose sender claims a VIP is a conflict, unless we have sent it: it is told and not fought over, so that a
node that takes over is let do so.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import NamedTuple

from dataplane.netdev import Interface

_ETH_P_ARP = 0x0806
_ARP = struct.Struct("!6s6sHHHBBH6sI6sI")  # with the Ethernet header
_REQUEST = 1
_BROADCAST, _NOBODY = b"\xff" * 6, bytes(6)
_TIMES, _INTERVAL_S = 2, 2.0  # ANNOUNCE_NUM, ANNOUNCE_INTERVAL
_AT_A_TIME = 50  # announcements in one turn, of which there are four a second
_HEARD_AT_A_TIME = 256  # what is more stays in the socket, or is lost: a conflict is told again
_CONFLICT_SHOWN_S = 60.0
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
    """Return the frame that announces `vip` (host order) at `mac`: sender and target are the VIP."""
    return _ARP.pack(_BROADCAST, mac, _ETH_P_ARP, 1, 0x0800, 6, 4, _REQUEST, mac, vip, _NOBODY, vip)


class Announcer:
    """Announces VIPs on interfaces from `announce` on until `withdraw`; one thread calls everything here."""

    def __init__(self) -> None:
        self.sent = 0
        self.heard = 0  # conflicting packets
        self._interfaces: dict[str, Interface] = {}
        self._sockets: dict[str, socket.socket] = {}
        self._vips: frozenset[int] = frozenset()
        self._due: deque[_Due] = deque()
        self._conflicts: dict[tuple[int, str], Conflict] = {}  # by VIP and MAC address

    def announce(self, vips: Collection[int], interfaces: Mapping[str, Interface], now: float) -> None:
        """Have these VIPs, which packets can reach by now, announced where they have not been."""
        fresh = {
            name
            for name, interface in interfaces.items()
            if interface.is_up and not _is_same(self._interfaces.get(name), interface)
        }
        for name in self._sockets.keys() - interfaces.keys() | fresh & self._sockets.keys():
            self._sockets.pop(name).close()
        for name in fresh:
            with contextlib.suppress(OSError):  # it went away again
                self._sockets[name] = _open(interfaces[name])
        wanted = frozenset(vips)
        self._due.extend(_Due(now, name, vip, _TIMES) for name in sorted(fresh) for vip in sorted(wanted))
        old = sorted(self._sockets.keys() - fresh)
        self._due.extend(_Due(now, name, vip, _TIMES) for name in old for vip in sorted(wanted - self._vips))
        self._interfaces = {name: interface for name, interface in interfaces.items() if interface.is_up}
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

    def conflicts(self, now: float) -> list[str]:
        """Return who else claims VIPs of ours, in words."""
        return [
            f"{IPv4Address(vip)}: {mac} on {name} says that it has this address, too; take the address, or --announce, "
            "from one of the two"
            for (vip, _), (mac, name, at_s) in self._conflicts.items()
            if now - at_s < _CONFLICT_SHOWN_S and vip in self._vips
        ]

    def withdraw(self) -> None:
        """Announce nothing any more."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()
        self._due.clear()
        self._interfaces = {}

    def _send(self, due: _Due) -> None:
        with contextlib.suppress(OSError):  # down: it is announced again when it comes up
            self._sockets[due.name].send(announcement(self._interfaces[due.name].mac, due.vip))
            self.sent += 1

    def _hear(self, name: str, sock: socket.socket, now: float) -> None:
        ours = {interface.mac for interface in self._interfaces.values()}
        with contextlib.suppress(OSError):
            for _ in range(_HEARD_AT_A_TIME):
                frame, origin = sock.recvfrom(64)
                if len(frame) < _ARP.size or origin[2] == socket.PACKET_OUTGOING:
                    continue
                *_, mac, sender, _target_mac, _target = _ARP.unpack_from(frame)
                if sender in self._vips and mac not in ours:
                    self._note(sender, Conflict(mac.hex(":"), name, now))

    def _note(self, vip: int, conflict: Conflict) -> None:
        self.heard += 1
        self._conflicts = {
            key: known for key, known in self._conflicts.items() if conflict.at_s - known.at_s < _CONFLICT_SHOWN_S
        }
        is_known = (vip, conflict.mac) in self._conflicts
        if not is_known and len(self._conflicts) == _MOST_CONFLICTS:
            return
        self._conflicts[vip, conflict.mac] = conflict
        if not is_known:
            _log.error("%s is announced by %s, too (heard on %s)", IPv4Address(vip), conflict.mac, conflict.interface)


def _is_same(known: Interface | None, interface: Interface) -> bool:
    return known is not None and (known.ifindex, known.mac) == (interface.ifindex, interface.mac)


def _open(interface: Interface) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    sock.bind((interface.name, _ETH_P_ARP))
    return sock
