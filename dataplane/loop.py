"""The packet loop of one queue, compiled: receive a burst, take each frame through the pipeline, transmit, recycle.

Busy while there is work; asleep in poll(2) otherwise, until a frame is punted or the loop is told to stop. A turn ends
in a quiescent state: the loop holds no record, so what was withdrawn before may be reused when the turn counter has
moved. A loop that sleeps is out (conntrack/grace.py): nobody waits for it.

XDP minds how long a punted frame waits, not how long ago the loop turned; so each turn begins by saying that nothing
waits, and receives after that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conntrack import grace
from dataplane import holding, idling, rings
from dataplane.context import AWAITED, KERNEL, NOWHERE
from dataplane.holding import Held
from dataplane.libc import MSG_DONTWAIT, POLLIN, coarse_ns, monotonic_ns, sendto
from dataplane.pipeline import handle, look_ahead
from dataplane.rings import DESCRIPTOR, POLL, Queue
from xdp.atomic import load_acquire, store_release
from xdp.bundle import Bundle, bundle_at
from xdp.clock import BASE_JIFFIES, BASE_NS, HERTZ
from xdp.jit import compiled, inlined
from xdp.schema import FIRST_DROP, FIRST_PASS, Limit, Reason

BURST = int(Limit.BURST)
NAP_MS = 250  # how often a sleeper turns: so long a frame counts as waiting that was lost on its way here
_VANISHED, _TX_FULL = int(Reason.VANISHED), int(Reason.TX_FULL)
_NOT_FORWARDABLE = int(Reason.NOT_FORWARDABLE)


# A queue that a loop may transmit on: its interface (0: none), and where its bundle is. An array of them is of one type
# whatever the number of interfaces, which a tuple of queues would not be.
PORT = np.dtype([("ifindex", "u8"), ("address", "u8")])


def new_ports() -> npt.NDArray[np.void]:
    """Return a PORT row for each worker that there may be, none of them open: a loop reads them on every turn."""
    return np.zeros(int(Limit.MAX_WORKERS), PORT)


def open_port(ports: npt.NDArray[np.void], number: int, ifindex: int, queue: Queue) -> None:
    """Let the loops transmit on a queue, which must outlive its row."""
    ports[number]["address"] = queue.address
    ports[number]["ifindex"] = ifindex  # last: from here on the row is found


def shut_port(ports: npt.NDArray[np.void], number: int) -> None:
    """Take a row away. A loop that has found it uses the queue until the end of its turn."""
    ports[number]["ifindex"] = 0


@dataclass(frozen=True, eq=False)
class Scratch(Bundle):
    """What one loop works in. `burst` and `waiting` are descriptors, `outgoing` and `reasons` have a row per port."""

    burst: npt.NDArray[np.void]
    waiting: npt.NDArray[np.void]  # in the places of `held`
    held: Held
    outgoing: npt.NDArray[np.void]
    reasons: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    polls: npt.NDArray[np.void]
    idling: npt.NDArray[np.void]  # one row


def new_scratch(fd: int, bell: int, ports: int) -> Scratch:
    """Return the scratch space of the loop that sleeps on `fd`, and on `bell`, and may transmit on `ports` ports."""
    room = BURST + holding.ROOM
    scratch = Scratch(
        burst=np.zeros(BURST, DESCRIPTOR),
        waiting=np.zeros(holding.ROOM, DESCRIPTOR),
        held=holding.new_held(),
        outgoing=np.zeros((ports, room), DESCRIPTOR),
        reasons=np.zeros((ports, room), np.int64),
        counts=np.zeros(ports, np.int64),
        polls=np.zeros(2, POLL),
        idling=np.zeros(1, idling.IDLING),
    )
    scratch.polls["fd"], scratch.polls["events"] = (fd, bell), POLLIN
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
def _handle(node, frames, descriptor, now):
    """Take a frame to its verdict; return (reason, egress). Its descriptor says how long it is then."""
    verdict, ifindex = handle(node, frames, np.int64(descriptor.addr), np.int64(descriptor.len), now)
    descriptor.len = node.packet[0].length
    return np.int64(verdict), ifindex


@inlined
def _hand_back(node, frames, pool, descriptor, reason, counters):
    """Have the kernel take a frame as received on this loop's interface."""
    frame = frames.ctypes.data + np.int64(descriptor.addr)
    length = np.uint64(descriptor.len)
    if sendto(node.link[0].kernel, np.uintp(frame), length, MSG_DONTWAIT, np.uintp(0), np.uint32(0)) < 0:
        reason = np.int64(_TX_FULL)
    rings.put_chunk(pool, descriptor.addr)
    _count(counters, reason)


@inlined
def _settle(node, frames, ports, own, pool, scratch, descriptor, reason, ifindex, counters):
    """Put a frame among the outgoing ones, or give its chunk back, counted. What is dropped may have an answer."""
    if ifindex == KERNEL:
        _hand_back(node, frames, pool, descriptor, reason, counters)
        return
    port = _port_of(ports, ifindex, own) if ifindex != NOWHERE else -1
    if port >= 0:
        place = scratch.counts[port]
        scratch.outgoing[port, place].addr = descriptor.addr
        scratch.outgoing[port, place].len = descriptor.len
        scratch.reasons[port, place] = reason
        scratch.counts[port] = place + 1
        return
    if reason < FIRST_PASS:
        reason = _NOT_FORWARDABLE  # the interface has just been taken away
    elif reason < FIRST_DROP:
        reason = _VANISHED  # AF_XDP cannot give a frame back to the kernel
    rings.put_chunk(pool, descriptor.addr)
    _count(counters, reason)


@inlined
def _hold(pool, scratch, descriptor, reason, now, counters):
    """Keep a frame until what it waits for has come. One that has waited for longer may have to make room."""
    held = scratch.held
    place = holding.place_for(held, reason)
    if place < held.count[0]:
        rings.put_chunk(pool, scratch.waiting[place].addr)
        _count(counters, holding.refusal(reason))
    scratch.waiting[place].addr = descriptor.addr
    scratch.waiting[place].len = descriptor.len
    holding.put(held, place, reason, now)


@inlined
def _retry_held(node, frames, ports, own, pool, scratch, now, counters):
    """Try the held frames again if something has come since, and drop those that have waited for too long."""
    held = scratch.held
    has_news = holding.has_news(node, held)
    count = held.count[0]
    held.count[0] = 0
    for place in range(count):
        descriptor, since = scratch.waiting[place], held.since[place]
        reason, ifindex = held.reason[place], np.uint32(AWAITED)
        if has_news:
            reason, ifindex = _handle(node, frames, descriptor, now)
        if ifindex == AWAITED and holding.is_patient(node, reason, since, now):
            kept = held.count[0]
            scratch.waiting[kept].addr = descriptor.addr
            scratch.waiting[kept].len = descriptor.len
            holding.put(held, kept, reason, since)
        else:
            _settle(node, frames, ports, own, pool, scratch, descriptor, reason, ifindex, counters)


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
                reason = scratch.reasons[port, place]
                if reason >= FIRST_DROP:  # it is our answer
                    counters.originated += np.uint64(1)
                _count(counters, reason)
            else:
                rings.put_chunk(pool, scratch.outgoing[port, place].addr)
                _count(counters, _TX_FULL)


@inlined
def beat(tables, number, now):
    """Store the time of a turn of worker `number`."""
    store_release(tables.heartbeats, number, np.uint64(now) | np.uint64(1 << 32))


@compiled
def run(node, number, ports, own, queue, pool, scratch, clock, stop):
    """Serve `queue`, row `own` of `ports`, as worker `number` until `stop[0]` is not zero; return its turns."""
    tables = node.tables
    counters = tables.worker_counters[number]
    frames = queue.frames
    empty = 0
    turns = np.uint64(0)
    rings.refill(queue, pool)
    beat(tables, number, jiffies(clock))
    grace.enter(tables, number)
    while load_acquire(stop, 0) == 0:
        now = jiffies(clock)
        beat(tables, number, now)
        if load_acquire(tables.waiting_since, number):
            store_release(tables.waiting_since, number, np.uint64(0))
        received = rings.receive(queue, scratch.burst, BURST)
        look_ahead(tables, frames, scratch.burst, received)
        for place in range(received):
            descriptor = scratch.burst[place]
            reason, ifindex = _handle(node, frames, descriptor, now)
            if ifindex == AWAITED:
                _hold(pool, scratch, descriptor, reason, now, counters)
            else:
                _settle(node, frames, ports, own, pool, scratch, descriptor, reason, ifindex, counters)
        if scratch.held.count[0]:
            _retry_held(node, frames, ports, own, pool, scratch, now, counters)
        _transmit(ports, queue, pool, scratch, counters)
        rings.refill(queue, pool)
        turns += np.uint64(1)
        grace.turn(tables, number)
        empty = 0 if received else empty + 1
        if empty >= idling.TURNS and idling.is_over(scratch.idling[0], empty):
            rings.reap(queue, pool)
            is_waiting = rings.kick(queue, pool) > 0 or rings.is_short(queue)
            nap_ms = holding.nap_ms(scratch.held, NAP_MS)
            grace.leave(tables, number)
            rings.wait(scratch.polls, 1 if is_waiting else nap_ms)
            grace.enter(tables, number)
            idling.learn(scratch.idling[0], monotonic_ns())
            empty = idling.TURNS - 1
    grace.leave(tables, number)
    for place in range(scratch.held.count[0]):
        rings.put_chunk(pool, scratch.waiting[place].addr)
        _count(counters, scratch.held.reason[place])
    scratch.held.count[0] = 0
    rings.return_all(pool)
    store_release(tables.heartbeats, number, 0)
    return turns
