"""AF_XDP sockets: one UMEM for the node, and a socket with four rings per (interface, queue).

All sockets share the UMEM, each with a fill and completion ring of its own: a frame that came in on one interface goes
out on another without a copy of ours. The first socket registers the memory; any living one lends it to the next.
What compiled code needs is in `Socket.queue` and `Umem.new_pool()`; dataplane/rings.py works on it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
import time
from dataclasses import replace
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeAlias, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from dataplane.rings import DESCRIPTOR, LOCAL_CHUNKS, Count, Pool, Queue, Ring, return_all
from dataplane.window import CACHE_LINE_WORDS, Window, line
from xdp.errors import AttachError, Error, MissingFeatureError, UsageError

Mode: TypeAlias = Literal["auto", "copy", "zero-copy"]

XDP_PACKET_HEADROOM_BYTES = 256  # what the kernel leaves free in front of a received frame

_AF_XDP = 44
_SOL_XDP = 283
_MMAP_OFFSETS, _RX_RING, _TX_RING, _UMEM_REG, _FILL_RING, _COMPLETION_RING, _STATISTICS, _OPTIONS = range(1, 9)
_MAX_TX_SKB_BUDGET = 9  # Linux 6.17
_SHARED_UMEM, _COPY, _ZERO_COPY, _USE_NEED_WAKEUP = 1, 2, 4, 8
_PAGE_OFFSETS = {"rx": 0, "tx": 0x80000000, "fill": 0x100000000, "completion": 0x180000000}
_SO_SNDBUFFORCE, _SO_BUSY_POLL, _SO_PREFER_BUSY_POLL, _SO_BUSY_POLL_BUDGET = 32, 46, 69, 70
_RELEASE_S, _RELEASE_STEP_S = 0.5, 0.002  # the kernel frees a closed socket's queue in a work item of its own

# Sent frames keep their kernel buffers (about 0.8 KB each) charged to the socket until the receiver is done with them;
# the default of 208 KB stalls after some 250.
_SEND_BUFFER_BYTES = 16 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class NoZeroCopyError(AttachError):
    """A socket cannot be zero-copy, as it is asked for or as the sockets are whose UMEM it shares."""


class Options(TypedDict, total=False):
    """Options of a socket, as Socket explains them."""

    ring_entries: int
    mode: Mode
    busy_poll_us: int
    tx_budget: int


class Statistics(NamedTuple):
    """Losses of a socket as the kernel counts them (XDP_STATISTICS), in frames."""

    rx_dropped: int  # no free chunk, or the frame does not fit into one
    rx_invalid_descs: int  # stays 0: refused addresses on the fill ring show as rx_dropped only
    tx_invalid_descs: int  # refused, and their chunks never complete
    rx_ring_full: int
    rx_fill_ring_empty_descs: int
    tx_ring_empty_descs: int

    @property
    def lost(self) -> int:
        """Frames that were redirected to the socket and never reached the RX ring."""
        return self.rx_dropped + self.rx_ring_full


class Umem:
    """Memory for frames, shared by all sockets of the node; leaving the context closes them.

    `chunks` of `chunk_bytes` (2048 or 4096), of which `headroom_bytes` stay free in front of a received frame in
    addition to the kernel's 256. Every socket takes a fill ring's worth, and as much again while it transmits. `mode`
    is that of its sockets, if they do not say otherwise.
    """

    def __init__(
        self, chunks: int = 16384, chunk_bytes: int = 2048, headroom_bytes: int = 0, mode: Mode = "auto"
    ) -> None:
        if chunk_bytes not in (2048, 4096):
            raise UsageError(f"chunk size {chunk_bytes}: AF_XDP takes 2048 or 4096 bytes")
        self.chunks = chunks
        self.chunk_bytes = chunk_bytes
        self.headroom_bytes = headroom_bytes
        self.mode = mode
        self._memory = mmap.mmap(-1, chunks * chunk_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Huge pages spare TLB misses; a child that forks must not make the pinned pages copy on write.
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
            try:
                self._memory.madvise(advice)
            except OSError:
                continue
        self.frames = np.frombuffer(self._memory, np.uint8)
        self.sockets: list[Socket] = []
        self.shared = self._new_pool()
        self.shared.shared_chunks[:] = np.arange(chunks, dtype=np.uint64)[::-1] * np.uint64(chunk_bytes)
        self.shared.shared_count[0] = chunks
        self._pools: list[Pool] = []
        self.lost_chunks = 0  # that the kernel held when their socket was closed; at most

    @property
    def frame_bytes(self) -> int:
        """The longest frame that can be received."""
        return self.chunk_bytes - XDP_PACKET_HEADROOM_BYTES - self.headroom_bytes

    def _new_pool(self) -> Pool:
        return Pool(
            chunks=np.zeros(LOCAL_CHUNKS, np.uint64),
            free=line(np.int64),  # type: ignore[arg-type]
            shared_chunks=np.zeros(self.chunks, np.uint64),
            shared_count=line(np.int64),  # type: ignore[arg-type]
            shared_lock=line(),  # type: ignore[arg-type]
            chunk_mask=np.uint64(2**64 - self.chunk_bytes),
        )

    def new_pool(self) -> Pool:
        """Return the free chunks for one more worker: an empty list of its own, and the one that all share."""
        own = self._new_pool()
        pool = replace(self.shared, chunks=own.chunks, free=own.free)
        self._pools.append(pool)
        return pool

    def drop_pool(self, pool: Pool) -> None:
        """Forget the chunks of a worker that has ended; it has given them back."""
        self._pools = [other for other in self._pools if other is not pool]

    def open(self, interface: str, queue: int = 0, **options: Unpack[Options]) -> Socket:
        """Return a bound socket of `queue` of `interface`; see Socket for the options."""
        options.setdefault("mode", self.mode)
        return Socket(self, interface, queue, **options)

    def whereabouts(self) -> dict[str, npt.NDArray[np.uint64]]:
        """Return {place: addresses of the chunks there}, for a moment in which no worker runs.

        "kernel" is what is in none of our places: frames in flight, or one that the kernel took from a fill ring and
        could not deliver. A chunk in two places is listed in both.
        """
        mask = self.shared.chunk_mask
        places = {"shared": self.shared.shared_chunks[: self.shared.shared_count[0]].copy()}
        for number, pool in enumerate(self._pools):
            places[f"worker {number}"] = pool.chunks[: pool.free[0]].copy()
        for sock in self.sockets:
            for name in _PAGE_OFFSETS:
                held = _waiting(getattr(sock.queue, name)) & mask
                places[f"{sock.interface}/{sock.queue_id} {name}"] = held
        everything = np.arange(self.chunks, dtype=np.uint64) * np.uint64(self.chunk_bytes)
        places["kernel"] = np.setdiff1d(everything, np.concatenate(list(places.values())))
        return places

    def reclaim(self) -> int:
        """Return the chunks that went down with closed sockets to the shared list; return how many.

        Only when no worker runs, holds frames of its own, or has some in flight.
        """
        lost = self.whereabouts()["kernel"]
        count = int(self.shared.shared_count[0])
        self.shared.shared_chunks[count : count + len(lost)] = lost
        self.shared.shared_count[0] = count + len(lost)
        self.lost_chunks = 0
        return len(lost)

    def close(self) -> None:
        """Close all sockets; the memory goes with the last array over it."""
        for sock in list(self.sockets):
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _waiting(ring: Ring) -> npt.NDArray[np.uint64]:
    """Return the addresses between consumer and producer of a ring."""
    count = (int(ring.producer[0]) - int(ring.consumer[0])) & 0xFFFFFFFF
    slots = (int(ring.consumer[0]) + np.arange(count)) & (len(ring.slots) - 1)
    entries = ring.slots[slots]
    return np.asarray(entries["addr"] if entries.dtype == DESCRIPTOR else entries, np.uint64)


class Socket:
    """An AF_XDP socket bound to one queue of one interface; a context manager.

    `ring_entries` is the size of each ring, a power of two. `mode` is "auto" (zero-copy where the driver has it),
    "copy" or "zero-copy"; it is settled by the first socket of a UMEM, which the others join. `busy_poll_us` makes the
    worker's own `drive` poll the device for so long. `tx_budget` is how many frames one system call may send in copy
    mode where the kernel lets us choose (Linux 6.17; 32 before).
    Raises UsageError, AttachError or MissingFeatureError. `fd` goes into the XSKMAP entry of the queue.
    """

    def __init__(
        self,
        umem: Umem,
        interface: str,
        queue: int = 0,
        *,
        ring_entries: int = 2048,
        mode: Mode = "auto",
        busy_poll_us: int = 0,
        tx_budget: int = 256,
    ) -> None:
        self.umem = umem
        self.interface = interface
        self.queue_id = queue
        self._name = f"{interface} queue {queue}"
        self._windows: list[Window] = []
        self._is_dead = False
        if ring_entries <= 0 or ring_entries & (ring_entries - 1):
            raise UsageError(f"{self._name}: {ring_entries} ring entries: a power of two is needed")
        if any((other.interface, other.queue_id) == (interface, queue) for other in umem.sockets):
            raise UsageError(f"{self._name}: has a socket of this UMEM already; open each queue once")
        try:
            ifindex = socket.if_nametoindex(interface)
        except OSError:
            raise UsageError(f"{interface}: no such interface; `ip link` lists them") from None
        try:
            self._socket = socket.socket(_AF_XDP, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        except OSError as error:
            raise self._explained(error, "socket") from None
        try:
            self._set_up(ifindex, ring_entries, mode, busy_poll_us, tx_budget)
        except OSError as error:
            self.close()
            raise self._explained(error, "set-up") from None
        except BaseException:
            self.close()
            raise
        umem.sockets.append(self)

    @property
    def fd(self) -> int:
        """The descriptor, for the XSKMAP and for poll."""
        return self._socket.fileno()

    def _set_up(self, ifindex: int, ring_entries: int, mode: Mode, busy_poll_us: int, tx_budget: int) -> None:
        self._ask(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER_BYTES)
        if busy_poll_us:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_PREFER_BUSY_POLL, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_BUSY_POLL, busy_poll_us)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_BUSY_POLL_BUDGET, 64)
        lenders = [other.fd for other in self.umem.sockets]
        if not lenders:
            umem = self.umem
            registration = (umem.frames.ctypes.data, len(umem.frames), umem.chunk_bytes, umem.headroom_bytes, 0)
            self._socket.setsockopt(_SOL_XDP, _UMEM_REG, struct.pack("=QQIIII", *registration, 0))
        for option in (_FILL_RING, _COMPLETION_RING, _RX_RING, _TX_RING):
            self._socket.setsockopt(_SOL_XDP, option, ring_entries)
        self.queue = self._map_rings(ring_entries)
        self._bind(ifindex, lenders, mode)
        self._ask(_SOL_XDP, _MAX_TX_SKB_BUDGET, min(tx_budget, ring_entries))
        (flags,) = struct.unpack("=I", self._socket.getsockopt(_SOL_XDP, _OPTIONS, 4))
        self.mode = "zero-copy" if flags & 1 else "copy"

    def _ask(self, level: int, option: int, value: int) -> bool:
        """Set an option that we can do without; return whether the kernel took it."""
        try:
            self._socket.setsockopt(level, option, value)
        except OSError:
            return False
        return True

    def _map_rings(self, entries: int) -> Queue:
        answer = self._socket.getsockopt(_SOL_XDP, _MMAP_OFFSETS, 128)
        layouts = dict(zip(("rx", "tx", "fill", "completion"), struct.iter_unpack("=4Q", answer), strict=True))
        rings = {name: self._map_ring(name, layout, entries) for name, layout in layouts.items()}
        counts = np.zeros(2 * CACHE_LINE_WORDS, np.uint64)
        return Queue(lock=line(), counts=counts, frames=self.umem.frames, fd=self.fd, **rings)  # type: ignore[arg-type]

    def _map_ring(self, name: str, layout: tuple[int, int, int, int], entries: int) -> Ring:
        producer, consumer, slots, flags = layout
        dtype = DESCRIPTOR if name in ("rx", "tx") else np.dtype(np.uint64)
        window = Window(-(-(slots + entries * dtype.itemsize) // mmap.PAGESIZE) * mmap.PAGESIZE)
        window.lay(self.fd, _PAGE_OFFSETS[name])
        self._windows.append(window)
        words = [window.array(offset, np.uint32, 1) for offset in (producer, consumer, flags)]
        return Ring(*words, slots=window.array(slots, dtype, entries))  # type: ignore[arg-type,misc]

    def _bind(self, ifindex: int, lenders: list[int], mode: Mode) -> None:
        flags = {"auto": 0, "copy": _COPY, "zero-copy": _ZERO_COPY}[mode] | _USE_NEED_WAKEUP
        # With a lender the flags are its: any other bit is refused. One whose interface has gone lends nothing.
        attempts = [(_SHARED_UMEM, fd) for fd in lenders] or [(flags, 0)]
        for attempt, (flags, lender) in enumerate(attempts, 1):
            address = struct.pack("=HHIII", _AF_XDP, flags, ifindex, self.queue_id, lender)
            code = self._try_bind(address)
            if code == 0:
                return
            if code != errno.EBADF or attempt == len(attempts):
                raise OSError(code, os.strerror(code))

    def _try_bind(self, address: bytes) -> int:
        """Bind and return 0 or the error number; a queue closed a moment ago is busy a little longer."""
        deadline = time.monotonic() + _RELEASE_S
        while _libc.bind(self.fd, address, len(address)):
            code = ctypes.get_errno()
            if code != errno.EBUSY or time.monotonic() > deadline:
                return code
            time.sleep(_RELEASE_STEP_S)
        return 0

    def _explained(self, error: OSError, step: str) -> Error:
        """Return the exception that tells a user what `error` means here."""
        code = errno.errorcode.get(error.errno or 0, str(error.errno))
        name = self._name
        megabytes = len(self.umem.frames) >> 20
        explanations: dict[int, Error] = {
            errno.EPERM: MissingFeatureError(f"{name}: AF_XDP needs CAP_NET_RAW and CAP_NET_ADMIN; run as root"),
            errno.EAFNOSUPPORT: MissingFeatureError(f"{name}: this kernel has no AF_XDP; try --engine raw"),
            errno.EBUSY: AttachError(f"{name}: in use by another AF_XDP socket; stop the program that holds it"),
            errno.ENODEV: AttachError(f"{name}: the interface has gone"),
            errno.ENETDOWN: AttachError(f"{name}: the interface is down; `ip link set {self.interface} up`"),
            errno.EINVAL: AttachError(f"{name}: refused (EINVAL); `ethtool -l {self.interface}` lists the queues"),
            errno.EOPNOTSUPP: NoZeroCopyError(
                f"{name}: the driver has no zero-copy mode, as this memory for frames needs"
            ),
            errno.ENOBUFS: MissingFeatureError(
                f"{name}: {megabytes} MB of frames exceed RLIMIT_MEMLOCK; raise it (ulimit -l), or grant CAP_IPC_LOCK"
            ),
            errno.ENOMEM: MissingFeatureError(
                f"{name}: not enough memory for {megabytes} MB of frames; use fewer chunks"
            ),
            errno.EBADF: AttachError(f"{name}: every socket that shared the UMEM has lost its interface; close them"),
        }
        return explanations.get(error.errno or 0) or AttachError(f"{name}: AF_XDP {step} failed ({code})")

    def statistics(self) -> Statistics:
        """Return the kernel's counts of lost frames."""
        answer = self._socket.getsockopt(_SOL_XDP, _STATISTICS, 48)
        return Statistics(*struct.unpack("=6Q", answer))

    def lost(self) -> int:
        """Return how many frames the kernel has dropped for want of a place since the socket was opened."""
        return self.statistics().lost

    def unread(self) -> int:
        """Return how many received frames nobody has taken from the RX ring yet."""
        return len(_waiting(self.queue.rx))

    def is_dead(self) -> bool:
        """Whether the socket has lost its interface, for good."""
        self._is_dead |= self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ENETDOWN
        return self._is_dead

    def counts(self) -> dict[str, int]:
        """Return our own counts, by the names of `Count` in lower case."""
        return {count.name.lower(): int(self.queue.counts[count]) for count in Count}

    def close(self) -> None:
        """Close the socket and take its rings out of our memory; no worker may use it any more.

        The chunks in its rings return to the shared list, except those that the kernel still held (Umem.reclaim).
        """
        chunks = np.zeros(0, np.uint64)
        if self in self.umem.sockets:
            chunks = self._chunks()
            self.umem.lost_chunks += self._held_by_kernel()
        for window in self._windows:  # a mapping keeps a socket alive, and its queue busy
            window.clear()
        self._windows.clear()
        self._socket.close()
        if self in self.umem.sockets:
            self.umem.sockets.remove(self)
            # Only now: until the socket has gone the kernel may write into chunks of the fill ring.
            return_all(replace(self.umem.shared, chunks=chunks, free=np.array([len(chunks)])))

    def _held_by_kernel(self) -> int:
        """Return how many chunks the kernel has taken from the TX and fill rings and not given back."""
        queue = self.queue
        pairs = ((queue.tx.consumer, queue.completion.producer), (queue.fill.consumer, queue.rx.producer))
        return sum((int(taken[0]) - int(given[0])) & 0xFFFFFFFF for taken, given in pairs)

    def _chunks(self) -> npt.NDArray[np.uint64]:
        """Return the chunks in the four rings."""
        rings = (self.queue.rx, self.queue.tx, self.queue.fill, self.queue.completion)
        return np.concatenate([_waiting(ring) for ring in rings]) & self.umem.shared.chunk_mask

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
