"""An interface as a packet socket sees it."""

from __future__ import annotations

import contextlib
import socket
import struct

from perf.world import Host

_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_AUXDATA = 263, 8  # linux/if_packet.h
_AUXDATA = struct.Struct("=IIIHHHH")  # status, length, captured, MAC offset, network offset, VLAN tag, VLAN type
_VLAN_VALID = 1 << 4

TO_US = (socket.PACKET_HOST, socket.PACKET_BROADCAST, socket.PACKET_MULTICAST)
TO_ANYBODY = (*TO_US, socket.PACKET_OTHERHOST)


class Wire:
    """An interface as a packet socket sees it: sends frames, and collects what arrives."""

    def __init__(self, host: Host, interface: str, kinds: tuple[int, ...] = TO_US) -> None:
        self._kinds = kinds
        with host.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        self._socket.setblocking(False)
        self._socket.bind((interface, _ETH_P_ALL))

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def received(self) -> list[bytes]:
        """Return the frames that have arrived since the last call and were addressed to this interface, or to all."""
        frames = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, ancillary, _, (_, _, kind, *_) = self._socket.recvmsg(1 << 16, 256)
                if kind in self._kinds:
                    frames.append(_with_tag(data, ancillary))
        return frames

    def close(self) -> None:
        self._socket.close()


def _with_tag(data: bytes, ancillary: list[tuple[int, int, bytes]]) -> bytes:
    """Return a frame with the VLAN tag that the kernel took out for the socket's sake."""
    for level, kind, value in ancillary:
        if (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA):
            status, _, _, _, _, tag, tag_type = _AUXDATA.unpack_from(value)
            if status & _VLAN_VALID:
                return data[:12] + struct.pack("!HH", tag_type, tag) + data[12:]
    return data
