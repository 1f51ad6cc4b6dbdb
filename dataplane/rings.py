"""AF_XDP rings and free chunks, as compiled code uses them.

A chunk (a slot of the UMEM) is always in exactly one place, and its owner is who may touch it:

    pool --refill--> fill ring --kernel--> RX ring --receive--> worker --transmit--> TX ring --kernel--> completion
     ^                                                             |                                         |
     +---------------------------- release ------------------------+---------------- reap -------------------+

RX and fill ring of a queue belong to the queue's own worker. TX and completion ring are anybody's, under the queue's
lock, which is held for the ring operations of one burst and never during a system call. Frames are fungible: who reaps
a completion owns the chunk, whoever sent it; pools that grow spill into the shared list, pools that run dry draw on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from dataplane.libc import EINTR, MSG_DONTWAIT, errno, poll, recvfrom, sched_yield, sendto
from xdp.atomic import compare_and_swap, fetch_add, load_acquire, store_release
from xdp.bundle import Bundle
from xdp.jit import compiled

DESCRIPTOR = np.dtype({"names": ["addr", "len", "options"], "formats": ["u8", "u4", "u4"]})  # struct xdp_desc
POLL = np.dtype({"names": ["fd", "events", "revents"], "formats": ["i4", "i2", "i2"]})  # struct pollfd

LOCAL_CHUNKS = 512  # a worker's own free list: more than a turn needs, little enough to be left idle
BATCH_CHUNKS = 256  # moved between a worker's list and the shared one, under one lock
REFILL_CHUNKS = 32  # a fill ring that lacks fewer is left alone
_NEED_WAKEUP = 1  # ring flag: the kernel waits for a system call
_SPINS = 256  # tries for a lock before the holder, perhaps preempted, is given this CPU
_STALLED_KICKS = 3  # system calls in a row that move nothing before the rest is left to a later turn
_U32 = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Ring(Bundle):
    """One ring, mapped from the kernel: one-element u32 arrays for the words, `slots` of a power of two.

    Cursors run free modulo 2**32; slot = cursor & (len(slots) - 1). Slots are DESCRIPTOR (RX, TX) or u64 addresses.
    """

    producer: npt.NDArray[np.uint32]
    consumer: npt.NDArray[np.uint32]
    flags: npt.NDArray[np.uint32]
    slots: npt.NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class Queue(Bundle):
    """One AF_XDP socket: its rings, the lock of TX and completion, its counts, the UMEM (u8) and the descriptor."""

    rx: Ring
    tx: Ring
    fill: Ring
    completion: Ring
    lock: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.uint64]
    frames: npt.NDArray[np.uint8]
    fd: int


@dataclass(frozen=True, eq=False)
class Pool(Bundle):
    """The free chunks that one worker may take: a stack of its own, and the shared one behind a lock.

    `free` chunks are in its own stack, `shared_count` in the shared one (one-element arrays). `chunk_mask` makes a
    chunk's address of an address inside it.
    """

    chunks: npt.NDArray[np.uint64]
    free: npt.NDArray[np.int64]
    shared_chunks: npt.NDArray[np.uint64]
    shared_count: npt.NDArray[np.int64]
    shared_lock: npt.NDArray[np.uint64]
    chunk_mask: np.uint64


class Count(IntEnum):
    """What a queue counts: index into `Queue.counts`."""

    SENDTO = 0  # system calls to make the kernel transmit
    RECVFROM = 1  # system calls to make the driver look at the fill ring or poll
    TX_FULL = 2  # frames that `transmit` refused
    TX_STALLED = 3  # kicks given up because the kernel refused to go on
    FILL_SHORT = 4  # refills that found too few free chunks


@compiled
def distance(newer, older):
    """Return how far cursor `newer` is ahead of `older`, both modulo 2**32."""
    return (np.int64(newer) - np.int64(older)) & _U32


@compiled
def lock(word):
    """Take the spinlock `word` (one u64, 0 when free)."""
    spins = 0
    while not compare_and_swap(word, 0, 0, 1):
        while load_acquire(word, 0) != 0:
            spins += 1
            if spins % _SPINS == 0:
                sched_yield()


@compiled
def unlock(word):
    """Give the spinlock `word` back."""
    store_release(word, 0, 0)


@compiled
def _spill(pool):
    """Move a batch from the worker's list to the shared one, which has room for every chunk there is."""
    first = pool.free[0] - BATCH_CHUNKS
    lock(pool.shared_lock)
    shared = pool.shared_count[0]
    for i in range(BATCH_CHUNKS):
        pool.shared_chunks[shared + i] = pool.chunks[first + i]
    pool.shared_count[0] = shared + BATCH_CHUNKS
    unlock(pool.shared_lock)
    pool.free[0] = first


@compiled
def _draw(pool):
    """Move up to a batch from the shared list to the worker's, which has room for it."""
    lock(pool.shared_lock)
    shared = pool.shared_count[0]
    moved = min(BATCH_CHUNKS, shared)
    count = pool.free[0]
    for i in range(moved):
        pool.chunks[count + i] = pool.shared_chunks[shared - moved + i]
    pool.shared_count[0] = shared - moved
    unlock(pool.shared_lock)
    pool.free[0] = count + moved


@compiled
def put_chunk(pool, addr):
    """Give the chunk around address `addr` back to the pool."""
    if pool.free[0] == len(pool.chunks):
        _spill(pool)
    count = pool.free[0]
    pool.chunks[count] = addr & pool.chunk_mask
    pool.free[0] = count + 1


@compiled
def take_chunk(pool, chunk):
    """Store the address of a free chunk in `chunk[0]`; return whether there was one."""
    if pool.free[0] == 0:
        _draw(pool)
    if pool.free[0] == 0:
        return False
    pool.free[0] -= 1
    chunk[0] = pool.chunks[pool.free[0]]
    return True


@compiled
def return_all(pool):
    """Empty the worker's own list into the shared one: the last act of a worker."""
    lock(pool.shared_lock)
    shared = pool.shared_count[0]
    for i in range(pool.free[0]):
        pool.shared_chunks[shared + i] = pool.chunks[i]
    pool.shared_count[0] = shared + pool.free[0]
    unlock(pool.shared_lock)
    pool.free[0] = 0


@compiled
def release(pool, descriptors, count):
    """Give the chunks of the first `count` descriptors back: frames that go nowhere."""
    for i in range(count):
        put_chunk(pool, descriptors[i].addr)


@compiled
def receive(queue, descriptors, limit):
    """Fill `descriptors` with up to `limit` received frames, which are the caller's from then on; return how many.

    Frame i is frames[addr : addr + len]; metadata of the XDP program lies directly before `addr`.
    """
    ring = queue.rx
    mask = len(ring.slots) - 1
    consumer = np.int64(ring.consumer[0])
    count = min(np.int64(limit), distance(load_acquire(ring.producer, 0), consumer))
    for i in range(count):
        slot = (consumer + i) & mask
        descriptors[i].addr = ring.slots[slot].addr
        descriptors[i].len = ring.slots[slot].len
        descriptors[i].options = ring.slots[slot].options
    if count > 0:
        store_release(ring.consumer, 0, consumer + count)
    return count


@compiled
def refill(queue, pool):
    """Move free chunks from the pool to the fill ring as far as it has room; return how many."""
    ring = queue.fill
    mask = len(ring.slots) - 1
    producer = np.int64(ring.producer[0])
    room = len(ring.slots) - distance(producer, load_acquire(ring.consumer, 0))
    if room < min(REFILL_CHUNKS, len(ring.slots)):
        return 0
    filled = 0
    while filled < room:
        slot = (producer + filled) & mask
        if not take_chunk(pool, ring.slots[slot : slot + 1]):
            fetch_add(queue.counts, Count.FILL_SHORT, 1)
            break
        filled += 1
    if filled > 0:
        store_release(ring.producer, 0, producer + filled)
    if load_acquire(ring.flags, 0) & _NEED_WAKEUP:  # zero-copy drivers that ran dry
        drive(queue)
    return filled


@compiled
def is_short(queue):
    """Return whether the fill ring lacks chunks that `refill` did not find in the pool."""
    ring = queue.fill
    room = len(ring.slots) - distance(load_acquire(ring.producer, 0), load_acquire(ring.consumer, 0))
    return room >= min(REFILL_CHUNKS, len(ring.slots))


@compiled
def drive(queue):
    """Make the driver look at the fill ring or, where busy polling is preferred, poll its queue now."""
    recvfrom(queue.fd, 0, 0, MSG_DONTWAIT, 0, 0)
    fetch_add(queue.counts, Count.RECVFROM, 1)


@compiled
def _reap_locked(queue, pool):
    """Return the chunks of transmitted frames to the pool; the caller holds the queue's lock."""
    ring = queue.completion
    mask = len(ring.slots) - 1
    consumer = np.int64(ring.consumer[0])
    count = distance(load_acquire(ring.producer, 0), consumer)
    for i in range(count):
        put_chunk(pool, ring.slots[(consumer + i) & mask])
    if count > 0:
        store_release(ring.consumer, 0, consumer + count)
    return count


@compiled
def reap(queue, pool):
    """Return the chunks of transmitted frames to the pool; return how many there were."""
    ring = queue.completion
    if load_acquire(ring.producer, 0) == load_acquire(ring.consumer, 0):
        return 0
    lock(queue.lock)
    count = _reap_locked(queue, pool)
    unlock(queue.lock)
    return count


@compiled
def kick(queue, pool):
    """Make the kernel transmit what is in the TX ring; return how many of these frames it left there.

    A system call of copy mode sends a limited number of frames (32, unless the kernel knows XDP_MAX_TX_SKB_BUDGET)
    and then says EAGAIN, as it does when the completion ring or the socket's send buffer is full; EBUSY and ENOBUFS
    mean that the driver's queue is. So what counts is whether the ring moves, and completions are reaped when it does
    not. What is left (a device that is down, too) waits for the next kick: a worker with some left sleeps briefly.
    """
    ring = queue.tx
    target = load_acquire(ring.producer, 0)  # what others add meanwhile is theirs to kick
    stalled = 0
    while True:
        consumer = load_acquire(ring.consumer, 0)
        left = distance(target, consumer)
        if left == 0 or left > len(ring.slots):  # there, or past it
            return 0
        if load_acquire(ring.flags, 0) & _NEED_WAKEUP == 0:  # a zero-copy driver is at it
            return left
        result = sendto(queue.fd, 0, 0, MSG_DONTWAIT, 0, 0)
        failure = errno() if result < 0 else 0
        fetch_add(queue.counts, Count.SENDTO, 1)
        if load_acquire(ring.consumer, 0) != consumer:
            stalled = 0
        elif failure != EINTR:
            stalled += 1
            if reap(queue, pool) == 0 and stalled >= _STALLED_KICKS:
                fetch_add(queue.counts, Count.TX_STALLED, 1)
                return left


@compiled
def submit(queue, pool, descriptors, count):
    """Put the first `count` frames on the TX ring without a system call; return how many had room.

    Those are the kernel's from then on, the others stay with the caller.
    """
    ring = queue.tx
    mask = len(ring.slots) - 1
    lock(queue.lock)
    _reap_locked(queue, pool)
    producer = np.int64(ring.producer[0])
    room = len(ring.slots) - distance(producer, load_acquire(ring.consumer, 0))
    taken = min(np.int64(count), room)
    for i in range(taken):
        slot = (producer + i) & mask
        ring.slots[slot].addr = descriptors[i].addr
        ring.slots[slot].len = descriptors[i].len
        ring.slots[slot].options = 0
    if taken > 0:
        store_release(ring.producer, 0, producer + taken)
    unlock(queue.lock)
    return taken


@compiled
def transmit(queue, pool, descriptors, count):
    """Send the first `count` frames; return how many were taken. The others stay with the caller, to be released.

    `descriptors[i].addr` may point anywhere into a chunk. Taken frames leave now or, if the kernel refuses for the
    moment, with a later `kick`: a worker kicks its queue on every turn.
    """
    taken = submit(queue, pool, descriptors, count)
    if taken < count:  # a full ring: let the kernel work, then try once more
        kick(queue, pool)
        rest = descriptors[taken:count]
        taken += submit(queue, pool, rest, len(rest))
        if taken < count:
            fetch_add(queue.counts, Count.TX_FULL, count - taken)
    kick(queue, pool)
    return taken


@compiled
def wait(polls, timeout_ms):
    """Sleep until a descriptor of `polls` (POLL rows) is ready; return how many: 0 after `timeout_ms` or a signal."""
    return max(0, poll(polls.ctypes.data, len(polls), timeout_ms))
