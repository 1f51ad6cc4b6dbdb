"""The packet loop of one worker of engine `raw`, compiled: receive a burst, take each frame to its verdict, send.

The sister of dataplane/loop.py: the same turn, heartbeat and sleep, over AF_PACKET rings instead of AF_XDP's. There is
nothing to recycle: frames lie in the ring until they are read, and what waits for a neighbour is copied aside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conntrack import grace
from dataplane import holding, idling, packetrings, pipeline
from dataplane.context import AWAITED, NOWHERE
from dataplane.holding import ROOM, Held
from dataplane.libc import POLLIN, memcpy, monotonic_ns
from dataplane.loop import BURST, NAP_MS, beat, jiffies
from dataplane.originals import judge
from dataplane.packetrings import FRAME, VNET_BYTES
from dataplane.rings import POLL
from xdp.atomic import load_acquire, store_release
from xdp.bundle import Bundle
from xdp.jit import compiled, inlined
from xdp.schema import FIRST_DROP, Reason

_SENT = 32  # reasons below are forwarded
_ANSWERED_BYTES = 1280  # of a frame that is refused: as much as an answer quotes (RFC 4443 section 2.4)


@dataclass(frozen=True, eq=False)
class Scratch(Bundle):
    """What one loop works in: a burst; what waits, and how long those frames are; and a POLL row."""

    burst: npt.NDArray[np.void]
    held: Held
    lengths: npt.NDArray[np.int64]  # of the frames in the places of `held`
    polls: npt.NDArray[np.void]
    idling: npt.NDArray[np.void]  # one row


def new_scratch(fd: int, bell: int) -> Scratch:
    """Return the scratch space of the loop that sleeps on `fd`, and on `bell`."""
    scratch = Scratch(
        burst=np.zeros(BURST, FRAME),
        held=holding.new_held(),
        lengths=np.zeros(ROOM, np.int64),
        polls=np.zeros(2, POLL),
        idling=np.zeros(1, idling.IDLING),
    )
    scratch.polls["fd"], scratch.polls["events"] = (fd, bell), POLLIN
    return scratch


@inlined
def _hold(queue, scratch, frames, start, length, place, reason, since):
    """Copy a frame and its VNET header aside, to a place of those that wait; unless it lies there."""
    to = queue.held.ctypes.data + place * np.int64(queue.slot_bytes)
    source = frames.ctypes.data + start - VNET_BYTES
    if to != source:
        memcpy(to, source, length + VNET_BYTES)
    scratch.lengths[place] = length
    holding.put(scratch.held, place, reason, since)


@inlined
def _keep(queue, scratch, frames, start, length, reason, now, counters):
    """Keep a frame until what it waits for has come. One that has waited for longer may have to make room."""
    if length + VNET_BYTES > np.int64(queue.slot_bytes):
        counters.packets[holding.refusal(reason)] += np.uint64(1)
        return
    place = holding.place_for(scratch.held, reason)
    if place < scratch.held.count[0]:
        counters.packets[holding.refusal(reason)] += np.uint64(1)
    _hold(queue, scratch, frames, start, length, place, reason, now)


@inlined
def _end(node, queue, frames, start, length, reason, now, counters):
    """Count a frame that is not sent. An answer to it is written behind the held frames: here another one follows."""
    aside = ROOM * np.int64(queue.slot_bytes) + VNET_BYTES
    egress = np.uint32(NOWHERE)
    if reason >= FIRST_DROP:
        memcpy(queue.held.ctypes.data + aside, frames.ctypes.data + start, min(length, np.int64(_ANSWERED_BYTES)))
        reason, egress = pipeline.refuse(node, queue.held, aside, length, reason, now)
    if egress == NOWHERE:
        counters.packets[reason] += np.uint64(1)
        return
    for i in range(VNET_BYTES):
        queue.held[aside - VNET_BYTES + i] = 0
    packetrings.send(queue, queue.held, aside, np.int64(node.packet[0].length), egress, reason, counters)


@inlined
def _retry_held(node, originals, queue, scratch, now, counters):
    """Try the held frames again if something has come since, and drop those that have waited for too long."""
    held = scratch.held
    has_news = holding.has_news(node, held)
    count = held.count[0]
    held.count[0] = 0
    for place in range(count):
        start = place * np.int64(queue.slot_bytes) + VNET_BYTES
        length, since = scratch.lengths[place], held.since[place]
        reason, egress = held.reason[place], np.uint32(AWAITED)
        if has_news:
            reason, egress = judge(node, originals, queue.held, start, length, now)
        if egress == AWAITED and holding.is_patient(node, reason, since, now):
            _hold(queue, scratch, queue.held, start, length, held.count[0], reason, since)
        elif egress == AWAITED:  # without news it is not `node.packet[0]`, which is what would be refused
            counters.packets[reason] += np.uint64(1)
        elif reason < _SENT:
            packetrings.send(queue, queue.held, start, length, egress, reason, counters)
        else:
            _end(node, queue, queue.held, start, length, reason, now, counters)


@compiled
def run(node, originals, number, queue, scratch, clock, stop):
    """Serve the sockets of `queue` as worker `number` until `stop[0]` is not zero; return its turns."""
    tables = node.tables
    counters = tables.worker_counters[number]
    empty = 0
    turns = np.uint64(0)
    beat(tables, number, jiffies(clock))
    grace.enter(tables, number)
    while load_acquire(stop, 0) == 0:
        now = jiffies(clock)
        beat(tables, number, now)
        received = packetrings.receive(queue, scratch.burst, BURST, tables.control[0].stations)
        pipeline.look_ahead(tables, queue.frames, scratch.burst, received)
        for place in range(received):
            start, length = scratch.burst[place].addr, np.int64(scratch.burst[place].len)
            reason, egress = np.int64(scratch.burst[place].reason), np.uint32(NOWHERE)
            if reason == Reason.FORWARDED:
                reason, egress = judge(node, originals, queue.frames, start, length, now)
            if reason < _SENT:
                packetrings.send(queue, queue.frames, start, length, egress, reason, counters)
            elif egress == AWAITED:
                _keep(queue, scratch, queue.frames, start, length, reason, now, counters)
            else:
                _end(node, queue, queue.frames, start, length, reason, now, counters)
        if scratch.held.count[0]:
            _retry_held(node, originals, queue, scratch, now, counters)
        packetrings.flush(queue, counters)
        turns += np.uint64(1)
        grace.turn(tables, number)
        empty = 0 if received else empty + 1
        if empty >= idling.TURNS and idling.is_over(scratch.idling[0], empty):
            nap_ms = holding.nap_ms(scratch.held, NAP_MS)
            grace.leave(tables, number)
            packetrings.wait(queue, scratch.polls, nap_ms)
            grace.enter(tables, number)
            idling.learn(scratch.idling[0], monotonic_ns())
            empty = idling.TURNS - 1
    grace.leave(tables, number)
    for place in range(scratch.held.count[0]):
        counters.packets[scratch.held.reason[place]] += np.uint64(1)
    scratch.held.count[0] = 0
    store_release(tables.heartbeats, number, 0)
    return turns
