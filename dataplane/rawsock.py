"""AF_PACKET sockets: a receive ring on an interface, a transmit ring, and a plain socket for what fits into no slot.

None of them needs BPF. Several sockets on one interface share its packets by flow (PACKET_FANOUT_HASH).
What compiled code needs is in `PacketSocket.queue`; dataplane/packetrings.py works on it.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from types import TracebackType
from typing import Self

import numpy as np

from dataplane import packetrings
from dataplane.holding import ROOM
from dataplane.netdev import Interface
from dataplane.packetrings import Queue
from dataplane.vlans import MOST_BYTES, VLAN_TAG_BYTES
from dataplane.window import Window
from dataplane.wire import ETHERNET_BYTES
from xdp.errors import AttachError, Error, MissingFeatureError

BLOCK_BYTES = 17 * 4096  # the longest frame, 64 KB of GSO, fits in: a short block is soon full
BLOCKS = 256  # where packets are few each takes a block, and a worker may stall for as many milliseconds
_RETIRE_MS = 1  # a block that has frames is handed over after so long
_SLOTS = 512

_SOL_PACKET = 263
_RX_RING, _STATISTICS, _VERSION, _RESERVE, _TX_RING, _LOSS, _VNET_HDR = 5, 6, 10, 12, 13, 14, 15
_FANOUT, _QDISC_BYPASS, _IGNORE_OUTGOING = 18, 20, 23
_TPACKET_V2, _TPACKET_V3 = 1, 2
_FANOUT_HASH, _FANOUT_UNIQUE = 0, 0x2000
_SO_SNDBUFFORCE = 32
_SEND_BUFFER_BYTES = 16 << 20
_ETH_P_ALL = 3
_FRAME_BYTES = 2048  # only a granularity for TPACKET_V3
_PAGE_BYTES = 4096


class PacketSocket:
    """The sockets of one worker of an interface: a context manager.

    It gets nothing before `listen`. Raises MissingFeatureError or AttachError.
    """

    def __init__(self, interface: Interface) -> None:
        self.interface = interface
        self._lost = 0
        self._windows: list[Window] = []
        self._sockets: list[socket.socket] = []
        try:
            self._open()
        except OSError as error:
            self.close()
            raise self._explained(error) from None

    @property
    def fd(self) -> int:
        """The descriptor that is readable when there are frames."""
        return self._sockets[0].fileno()

    def _socket(self) -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._sockets.append(made)
        made.setsockopt(_SOL_PACKET, _VNET_HDR, 1)
        return made

    def _open(self) -> None:
        receive, ring, large = self._socket(), self._socket(), self._socket()
        receive.setsockopt(_SOL_PACKET, _VERSION, _TPACKET_V3)
        receive.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
        receive.setsockopt(_SOL_PACKET, _RESERVE, VLAN_TAG_BYTES)  # before each frame, for the tag that is taken out
        frames = BLOCK_BYTES // _FRAME_BYTES * BLOCKS
        request = (BLOCK_BYTES, BLOCKS, _FRAME_BYTES, frames, _RETIRE_MS, 0, 0)
        receive.setsockopt(_SOL_PACKET, _RX_RING, struct.pack("=7I", *request))
        # Past the queueing discipline, where the kernel does not cut GSO frames for a device that cannot.
        ring.setsockopt(_SOL_PACKET, _QDISC_BYPASS, 1)
        for sender in (ring, large):
            with contextlib.suppress(OSError):
                sender.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER_BYTES)
        slot_bytes = _slot_bytes(self.interface.mtu)
        ring.setsockopt(_SOL_PACKET, _VERSION, _TPACKET_V2)
        ring.setsockopt(_SOL_PACKET, _LOSS, 1)  # a slot that the kernel does not understand does not stop the others
        block = max(slot_bytes, _PAGE_BYTES)
        slots = _SLOTS * slot_bytes // block * (block // slot_bytes)
        ring.setsockopt(
            _SOL_PACKET, _TX_RING, struct.pack("=4I", block, slots * slot_bytes // block, slot_bytes, slots)
        )
        received, sent = Window(BLOCK_BYTES * BLOCKS), Window(slots * slot_bytes)
        self._windows = [received, sent]
        received.lay(receive.fileno(), 0)
        sent.lay(ring.fileno(), 0)
        to = struct.pack("=HHiHBB8x", socket.AF_PACKET, 0, 0, 0, 0, 6)  # the kernel reads a frame's own type
        self.queue = Queue(
            frames=received.bytes,
            statuses=received.bytes.view(np.uint32),
            block_bytes=BLOCK_BYTES,
            slots=sent.bytes,
            slot_words=sent.bytes.view(np.uint32),
            slot_bytes=slot_bytes,
            at=np.zeros(8, np.int64),
            reasons=np.zeros(slots, np.int64),
            to=np.frombuffer(bytearray(to), np.uint8),
            held=np.zeros((ROOM + 1) * slot_bytes, np.uint8),
            fd=receive.fileno(),
            slots_fd=ring.fileno(),
            large_fd=large.fileno(),
        )

    def listen(self, is_one_of_many: bool = False, group: int | None = None) -> int | None:
        """Receive from now on. Of many sockets on an interface each gets the group that the one before has returned."""
        receive = self._sockets[0]
        try:
            receive.bind((self.interface.name, _ETH_P_ALL))
            if not is_one_of_many:
                return None
            kind = _FANOUT_HASH if group is not None else _FANOUT_HASH | _FANOUT_UNIQUE
            receive.setsockopt(_SOL_PACKET, _FANOUT, (group or 0) | kind << 16)
            return receive.getsockopt(_SOL_PACKET, _FANOUT) & 0xFFFF
        except OSError as error:
            raise self._explained(error) from None

    def _explained(self, error: OSError) -> Error:
        name = self.interface.name
        code = errno.errorcode.get(error.errno or 0, str(error.errno))
        explanations: dict[int, Error] = {
            errno.EPERM: MissingFeatureError(f"{name}: a packet socket needs CAP_NET_RAW; run as root"),
            errno.EACCES: MissingFeatureError(f"{name}: a packet socket needs CAP_NET_RAW; run as root"),
            errno.EAFNOSUPPORT: MissingFeatureError(f"{name}: this kernel has no packet sockets (CONFIG_PACKET)"),
            errno.EPROTONOSUPPORT: MissingFeatureError(f"{name}: this kernel has no packet sockets (CONFIG_PACKET)"),
            errno.ENOMEM: AttachError(f"{name}: no memory for the rings of a packet socket (32 MB); free some"),
            errno.ENODEV: AttachError(f"{name}: the interface has gone"),
            errno.ENOPROTOOPT: MissingFeatureError(
                f"{name}: this kernel's packet sockets lack an option; Linux 4.20 has it"
            ),
        }
        return explanations.get(error.errno or 0) or AttachError(f"{name}: packet socket refused ({code})")

    def lost(self) -> int:
        """Return how many frames found no room in the ring since it was opened (PACKET_STATISTICS)."""
        if self._sockets:
            _, drops, _ = struct.unpack("=3I", self._sockets[0].getsockopt(_SOL_PACKET, _STATISTICS, 12))
            self._lost += drops
        return self._lost

    def unread(self) -> int:
        """Return how many received frames nobody has taken from the ring yet."""
        return int(packetrings.unread(self.queue)) if self._sockets else 0

    def is_dead(self) -> bool:
        """Whether a socket that listened is bound to nothing any more: its interface has gone."""
        return not self._sockets[0].getsockname()[0]

    def takes(self, mtu: int) -> bool:
        """Return whether a frame of this MTU fits into a slot."""
        return _slot_bytes(mtu) <= self.queue.slot_bytes

    def close(self) -> None:
        """Close the sockets; no worker may use them any more."""
        for window in self._windows:
            window.clear()
        for sock in self._sockets:
            sock.close()
        self._windows, self._sockets = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _slot_bytes(mtu: int) -> int:
    """Return the size of a slot, a power of two, that a frame of this MTU fits into."""
    whole = packetrings.SLOT_DATA + 20 + packetrings.VNET_BYTES + ETHERNET_BYTES + MOST_BYTES + mtu
    return max(2048, 1 << (whole - 1).bit_length())
