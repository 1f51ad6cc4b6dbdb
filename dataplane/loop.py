"""The packet loop of one queue, compiled: receive a burst, take each frame through the pipeline, transmit, recycle.

Busy while there is work; asleep in poll(2) otherwise, waking every IDLE_WAKE_MS to beat. A turn ends in a quiescent
state: the loop holds no record, so what was withdrawn before may be reused when the turn counter has moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataplane import rings
from dataplane.libc import POLLIN, coarse_ns
from dataplane.pipeline import AWAITED, handle
from dataplane.rings import DESCRIPTOR, POLL, Queue
from xdp.atomic import load_acquire, store_release
from xdp.bundle import Bundle, bundle_at
from xdp.clock import BASE_JIFFIES, BASE_NS, HERTZ
from xdp.jit import compiled, inlined
from xdp.schema import Limit, Reason

BURST = int(Limit.BURST)
HELD = 64  # frames of a queue that wait for a neighbour, at most
_IDLE_WAKE_MS = int(Limit.IDLE_WAKE_MS)
_IDLE_TURNS = 32  # empty turns before the loop sleeps: about 3 us, less than a sleep and a wake-up cost
_FORWARDED, _ADMITTED = int(Reason.FORWARDED), int(Reason.ADMITTED)
_FIRST_PASS, _FIRST_DROP = 32, 64
_NO_NEXT_HOP, _NEXT_HOP_QUEUE = int(Reason.NO_NEXT_HOP), int(Reason.NEXT_HOP_QUEUE)
_VANISHED, _TX_FULL = int(Reason.VANISHED), int(Reason.TX_FULL)
_NOT_FORWARDABLE = int(Reason.NOT_FORWARDABLE)


# A queue that a loop may transmit on: its interface, and where its bundle is. An array of them is of one type whatever
# the number of interfaces, which a tuple of queues would not be.
PORT = np.dtype([("ifindex", "u8"), ("address", "u8")])


def new_ports(queues: Sequence[tuple[int, Queue]]) -> npt.NDArray[np.void]:
    """Return a PORT row for each (ifindex, queue). The queues must outlive the rows."""
    return np.array([(ifindex, queue.address) for ifindex, queue in queues], PORT)


@dataclass(frozen=True, eq=False)
class Scratch(Bundle):
    """What one loop works in. `burst` and `held` are descriptors, `outgoing` and `reasons` have a row per port."""

    burst: npt.NDArray[np.void]
    held: npt.NDArray[np.void]
    held_since: npt.NDArray[np.uint32]
    held_count: npt.NDArray[np.int64]
    held_epoch: npt.NDArray[np.uint32]
    outgoing: npt.NDArray[np.void]
    reasons: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    polls: npt.NDArray[np.void]


def new_scratch(fd: int, ports: int) -> Scratch:
    """Return the scratch space of the loop that sleeps on `fd` and may transmit on `ports` ports."""
    room = BURST + HELD
    scratch = Scratch(
        burst=np.zeros(BURST, DESCRIPTOR),
        held=np.zeros(HELD, DESCRIPTOR),
        held_since=np.zeros(HELD, np.uint32),
        held_count=np.zeros(1, np.int64),
        held_epoch=np.zeros(1, np.uint32),
        outgoing=np.zeros((ports, room), DESCRIPTOR),
        reasons=np.zeros((ports, room), np.int64),
        counts=np.zeros(ports, np.int64),
        polls=np.zeros(1, POLL),
    )
    scratch.polls[0]["fd"], scratch.polls[0]["events"] = fd, POLLIN
    return scratch


@inlined
def jiffies(clock):
    """Return the lower 32 bits of the jiffies; `clock` is the words of xdp.clock."""
    passed_us = (coarse_ns() - clock[BASE_NS]) // 1000
    return np.uint32(load_acquire(clock, BASE_JIFFIES) + passed_us * clock[HERTZ] // 1_000_000)


@inlined
def _count(counters, reason):
    counters.packets[reason] += np.uint64(1)


@inlined
def _port_of(ports, ifindex, own):
    """Return the port to transmit on towards an interface: the loop's own if it is that interface's, else the first."""
    if ports[own].ifindex == ifindex:
        return own
    for port in range(len(ports)):
        if ports[port].ifindex == ifindex:
            return port
    return -1


@inlined
def _settle(ports, own, pool, scratch, descriptor, reason, ifindex, counters):
    """Put a frame among the outgoing ones, or give its chunk back, counted."""
    port = _port_of(ports, ifindex, own) if reason == _FORWARDED or reason == _ADMITTED else -1
    if port >= 0:
        place = scratch.counts[port]
        scratch.outgoing[port, place].addr = descriptor.addr
        scratch.outgoing[port, place].len = descriptor.len
        scratch.reasons[port, place] = reason
        scratch.counts[port] = place + 1
        return
    if reason < _FIRST_PASS:
        reason = _NOT_FORWARDABLE  # the interface has just been taken away
    elif reason < _FIRST_DROP:
        reason = _VANISHED  # AF_XDP cannot give a frame back to the kernel
    rings.put_chunk(pool, descriptor.addr)
    _count(counters, reason)


@inlined
def _hold(pool, scratch, descriptor, now, counters):
    """Keep a frame until its next hop is known, if there is room."""
    place = scratch.held_count[0]
    if place == len(scratch.held):
        rings.put_chunk(pool, descriptor.addr)
        _count(counters, _NEXT_HOP_QUEUE)
        return
    scratch.held[place].addr = descriptor.addr
    scratch.held[place].len = descriptor.len
    scratch.held_since[place] = now
    scratch.held_count[0] = place + 1


@inlined
def _retry_held(node, frames, ports, own, pool, scratch, now, counters):
    """Try the held frames again if a next hop has changed since, and drop those that have waited for a second."""
    epoch = node.tables.control[0].next_hop_epoch
    changed = epoch != scratch.held_epoch[0]
    scratch.held_epoch[0] = epoch
    kept = 0
    for place in range(scratch.held_count[0]):
        descriptor = scratch.held[place]
        waited = np.int32(now - scratch.held_since[place])
        reason, ifindex = np.int64(_NO_NEXT_HOP), np.uint32(AWAITED)
        if changed:
            verdict, ifindex = handle(node, frames, np.int64(descriptor.addr), np.int64(descriptor.len), now)
            reason = np.int64(verdict)
        if ifindex == AWAITED and waited < np.int32(node.tables.control[0].hertz):
            scratch.held[kept].addr = descriptor.addr
            scratch.held[kept].len = descriptor.len
            scratch.held_since[kept] = scratch.held_since[place]
            kept += 1
        else:
            _settle(ports, own, pool, scratch, descriptor, reason, ifindex, counters)
    scratch.held_count[0] = kept


@inlined
def _transmit(ports, queue, pool, scratch, counters):
    """Send what is outgoing on every port; what finds no room is dropped, counted."""
    for port in range(len(ports)):
        count = scratch.counts[port]
        if count == 0:
            continue
        scratch.counts[port] = 0
        sent = rings.transmit(bundle_at(queue, ports[port].address), pool, scratch.outgoing[port], count)
        for place in range(count):
            if place < sent:
                _count(counters, scratch.reasons[port, place])
            else:
                rings.put_chunk(pool, scratch.outgoing[port, place].addr)
                _count(counters, _TX_FULL)


@compiled
def run(node, number, ports, own, queue, pool, scratch, clock, stop):
    """Serve `queue`, row `own` of `ports`, as worker `number` until `stop[0]` is not zero; return its turns."""
    tables = node.tables
    counters = tables.worker_counters[number]
    frames = queue.frames
    empty = 0
    turns = np.uint64(0)
    rings.refill(queue, pool)
    while load_acquire(stop, 0) == 0:
        now = jiffies(clock)
        store_release(tables.heartbeats, number, np.uint64(now) | np.uint64(1 << 32))
        received = rings.receive(queue, scratch.burst, BURST)
        for place in range(received):
            descriptor = scratch.burst[place]
            verdict, ifindex = handle(node, frames, np.int64(descriptor.addr), np.int64(descriptor.len), now)
            reason = np.int64(verdict)
            if ifindex == AWAITED:
                _hold(pool, scratch, descriptor, now, counters)
            else:
                _settle(ports, own, pool, scratch, descriptor, reason, ifindex, counters)
        if scratch.held_count[0]:
            _retry_held(node, frames, ports, own, pool, scratch, now, counters)
        _transmit(ports, queue, pool, scratch, counters)
        rings.refill(queue, pool)
        turns += np.uint64(1)
        store_release(tables.turns, number, load_acquire(tables.turns, number) + np.uint64(1))
        empty = 0 if received else empty + 1
        if empty >= _IDLE_TURNS:
            rings.reap(queue, pool)
            is_waiting = rings.kick(queue, pool) > 0 or scratch.held_count[0] > 0
            rings.wait(scratch.polls, 1 if is_waiting else _IDLE_WAKE_MS)
            empty = _IDLE_TURNS - 1
    for place in range(scratch.held_count[0]):
        rings.put_chunk(pool, scratch.held[place].addr)
        _count(counters, _NO_NEXT_HOP)
    scratch.held_count[0] = 0
    rings.return_all(pool)
    store_release(tables.heartbeats, number, 0)
    return turns
