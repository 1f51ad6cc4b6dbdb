"""From a destination to its row of next_hops, compiled: a longest-prefix match, then a hash table of hosts.

The control plane (dataplane/nexthops.py) is the only writer of everything here but the board of requests.

* Routes of a family lie in two buffers. A generation says which one is live (its lowest bit); the writer fills the
  other one and then advances the generation. A reader that finds the generation changed after its search searches
  again: only then can its buffer have been written under its eyes. Numbers torn on the way stay inside the arrays.
* Hosts, and requests, are known by their IPv4 address or by the number of their IPv6 address's name, in host order.
  Below 2^24 it is a name: no host of IPv4 is in 0.0.0.0/8 (RFC 1122 section 3.2.1.3).
* Hosts are single words (address and row), so that a reader sees all of an entry or nothing. One that is removed leaves
  no gap: those behind it that were pushed there move up, each there twice for a moment. Who searches meanwhile may miss
  one, and asks for it.
* Requests are a board, not a ring: an address goes to the place of its hash, so that a thousand packets for one
  unresolved host are one request. Producers go from empty to full by compare-and-swap, the consumer back. The first
  half is for destinations without a row, the second for those that have one but do not answer: however many of these
  ask again and again, they do not keep a new client out.

Rows, too, are written here, because XDP reads them meanwhile.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataplane.libc import write
from xdp import schema
from xdp.atomic import compare_and_swap, fence, fetch_add, load_acquire, store_release
from xdp.bundle import Bundle
from xdp.byteorder import swapped32
from xdp.hash import GOLDEN
from xdp.jit import compiled
from xdp.schema import HopState, RouteTarget, RowUse
from xdp.tables import Tables

MISS = -1  # no route: nothing to wait for
PENDING = -2  # asked for: try again when control.next_hop_epoch has grown
ON_LINK = int(RouteTarget.ON_LINK)  # each destination has a row of its own
NO_ROUTE = int(RouteTarget.NO_ROUTE)  # do not forward

LENGTHS, LENGTHS6 = 33, 129  # all bits first, then down to 0
REQUESTS = 4096  # places of one half of the board, a power of two
_PLACES = 8  # that a request tries
_TAKEN = 1 << 32
_LOW = 0xFFFFFFFF
_IPV4, _IPV6 = 0, 1  # families: places of their generations
_UNRESOLVED = int(HopState.UNRESOLVED)
_FREE_ROW = int(RowUse.FREE)
_WORDS = schema.NEXT_HOP.itemsize // 8
_STATE_WORD = schema.NEXT_HOP.fields["state"][1] // 8  # type: ignore[index]
_STATE_SHIFT = schema.NEXT_HOP.fields["state"][1] % 8 * 8  # type: ignore[index]


@dataclass(frozen=True, eq=False)
class Hops(Bundle):
    """What `lookup` reads, as one argument for compiled code. Addresses are in host order."""

    generation: npt.NDArray[np.uint64]  # [family]: its lowest bit is the live buffer of its three arrays
    starts: npt.NDArray[np.uint32]  # [buffer, 32 - prefix length]: first entry of that length; the last one is the end
    networks: npt.NDArray[np.uint32]  # [buffer, entry], ascending within a length
    targets: npt.NDArray[np.uint32]  # [buffer, entry]: a row, ON_LINK or NO_ROUTE
    starts6: npt.NDArray[np.uint32]  # [buffer, 128 - prefix length], and so on: the same of IPv6
    highs6: npt.NDArray[np.uint64]  # the higher 64 bits of networks ...
    lows6: npt.NDArray[np.uint64]  # ... and the lower
    targets6: npt.NDArray[np.uint32]
    hosts: npt.NDArray[np.uint64]  # the shared table: a power of two of them, address << 32 | row, 0: empty
    requests: npt.NDArray[np.uint64]  # 2 x REQUESTS of them: 1 << 32 | address, 0: empty
    lost_requests: npt.NDArray[np.uint64]  # [0]: those that found no place on the board
    rows: npt.NDArray[np.uint64]  # next_hops as words
    one: npt.NDArray[np.uint64]  # [0]: 1, which is what a ring of the bell writes
    doorbell: int  # an eventfd: readable when there is a request


def new_hops(tables: Tables, routes: int) -> Hops:
    """Return an index over the shared tables, without routes yet, with room for that many."""
    doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    hops = Hops(
        generation=np.zeros(2, np.uint64),
        starts=np.zeros((2, LENGTHS + 1), np.uint32),
        networks=np.zeros((2, routes), np.uint32),
        targets=np.zeros((2, routes), np.uint32),
        starts6=np.zeros((2, LENGTHS6 + 1), np.uint32),
        highs6=np.zeros((2, routes), np.uint64),
        lows6=np.zeros((2, routes), np.uint64),
        targets6=np.zeros((2, routes), np.uint32),
        hosts=tables.hosts,
        requests=np.zeros(2 * REQUESTS, np.uint64),
        lost_requests=np.zeros(1, np.uint64),
        rows=tables.next_hops.view(np.uint64),
        one=np.ones(1, np.uint64),
        doorbell=doorbell,
    )
    weakref.finalize(hops, os.close, doorbell)
    return hops


@compiled
def lookup(hops, address_be32):
    """Return the row of the way to an address; MISS if there is none, PENDING if it was asked for just now.

    A row may be unresolved: then its neighbour is asked for again, and the caller waits as with PENDING.
    """
    address = swapped32(address_be32)
    return row_of(hops, np.int64(route_target(hops, address)), address)


@compiled
def lookup6(hops, name_be32, high, low):
    """Return the row of the way to an IPv6 address, as `lookup` does: its halves in host order, and its name."""
    return row_of(hops, np.int64(route_target6(hops, high, low)), swapped32(name_be32))


@compiled
def row_of(hops, target, address):
    """Return the row, MISS or PENDING that a route's target comes to for an address or a name's number (host order)."""
    if target == NO_ROUTE:
        return MISS
    row = host_row(hops, address) if target == ON_LINK else target
    if row == MISS:
        request(hops, address, 0)
        return PENDING
    if (load_acquire(hops.rows, row * _WORDS + _STATE_WORD) >> np.uint64(_STATE_SHIFT)) & np.uint64(255) == _UNRESOLVED:
        request(hops, address, REQUESTS)
    return row


@compiled
def route_target(hops, address):
    """Return the target of the longest prefix that covers an address in host order, NO_ROUTE without one."""
    while True:
        generation = load_acquire(hops.generation, _IPV4)
        target = _search(hops, np.int64(generation & np.uint64(1)), np.uint32(address))
        fence()
        if load_acquire(hops.generation, _IPV4) == generation:
            return target


@compiled
def route_target6(hops, high, low):
    """Return the target of the longest prefix that covers an IPv6 address, NO_ROUTE without one."""
    while True:
        generation = load_acquire(hops.generation, _IPV6)
        target = _search6(hops, np.int64(generation & np.uint64(1)), np.uint64(high), np.uint64(low))
        fence()
        if load_acquire(hops.generation, _IPV6) == generation:
            return target


@compiled
def _search(hops, buffer, address):
    for step in range(LENGTHS):
        low = np.int64(hops.starts[buffer, step])
        end = np.int64(hops.starts[buffer, step + 1])
        if low >= end:
            continue
        wanted = np.uint32((np.uint64(address) >> np.uint64(step)) << np.uint64(step))
        high = end
        while low < high:
            middle = (low + high) >> 1
            if hops.networks[buffer, middle] < wanted:
                low = middle + 1
            else:
                high = middle
        if low < end and hops.networks[buffer, low] == wanted:
            return hops.targets[buffer, low]
    return np.uint32(NO_ROUTE)


@compiled
def _search6(hops, buffer, high, low):
    for step in range(LENGTHS6):
        first = np.int64(hops.starts6[buffer, step])
        end = np.int64(hops.starts6[buffer, step + 1])
        if first >= end:
            continue
        wanted_high, wanted_low = _masked6(high, low, step)
        last = end
        while first < last:
            middle = (first + last) >> 1
            network_high = hops.highs6[buffer, middle]
            if network_high < wanted_high or (network_high == wanted_high and hops.lows6[buffer, middle] < wanted_low):
                first = middle + 1
            else:
                last = middle
        if first < end and hops.highs6[buffer, first] == wanted_high and hops.lows6[buffer, first] == wanted_low:
            return hops.targets6[buffer, first]
    return np.uint32(NO_ROUTE)


@compiled
def _masked6(high, low, step):
    """Return the halves of an address without its lowest `step` bits."""
    if step < 64:
        return high, low >> np.uint64(step) << np.uint64(step)
    if step < 128:
        return high >> np.uint64(step - 64) << np.uint64(step - 64), np.uint64(0)
    return np.uint64(0), np.uint64(0)


@compiled
def publish_routes(hops, starts, networks, targets):
    """Change `hops` to these routes of IPv4 (arrays as in Hops, for one buffer)."""
    generation = load_acquire(hops.generation, _IPV4) + np.uint64(1)
    buffer = np.int64(generation & np.uint64(1))
    fence()  # whoever still reads this buffer will find the generation changed
    for step in range(LENGTHS + 1):
        hops.starts[buffer, step] = starts[step]
    for entry in range(len(networks)):
        hops.networks[buffer, entry] = networks[entry]
        hops.targets[buffer, entry] = targets[entry]
    store_release(hops.generation, _IPV4, generation)
    fence()


@compiled
def publish_routes6(hops, starts, highs, lows, targets):
    """Change `hops` to these routes of IPv6."""
    generation = load_acquire(hops.generation, _IPV6) + np.uint64(1)
    buffer = np.int64(generation & np.uint64(1))
    fence()
    for step in range(LENGTHS6 + 1):
        hops.starts6[buffer, step] = starts[step]
    for entry in range(len(targets)):
        hops.highs6[buffer, entry] = highs[entry]
        hops.lows6[buffer, entry] = lows[entry]
        hops.targets6[buffer, entry] = targets[entry]
    store_release(hops.generation, _IPV6, generation)
    fence()


@compiled
def _find_host(hosts, address):
    """Return (place, word) of an address in `hosts`, or of the empty place where it would be.

    It is never full: twice the rows. What is at the place may be another word a moment later, of another host.
    """
    last = len(hosts) - 1
    place = np.int64((np.uint64(address) * np.uint64(GOLDEN)) >> np.uint64(32)) & last
    while True:
        word = load_acquire(hosts, place)
        if word == 0 or word >> np.uint64(32) == np.uint64(address):
            return place, word
        place = (place + 1) & last


@compiled
def host_row(hops, address):
    """Return the row of a host (address, or its name's number), MISS if it has none."""
    _, word = _find_host(hops.hosts, address)
    return np.int64(word & np.uint64(_LOW)) if word != 0 else MISS


@compiled
def set_host_row(hops, address, row):
    """Change `hops`: an address, or a name's number, has this row from now on."""
    word = np.uint64(address) << np.uint64(32) | np.uint64(row)
    while True:
        place, found = _find_host(hops.hosts, address)
        if compare_and_swap(hops.hosts, place, found, word):  # XDP adds hosts, too
            return


@compiled
def advance(epochs):
    """Have frames that wait for a next hop tried again."""
    fetch_add(epochs, 0, np.uint32(1))


@compiled
def _remove_at(hosts, hole):
    """Change `hosts`: the entry at place `hole` is gone, and the others are still found."""
    last = len(hosts) - 1
    place = hole
    while True:
        place = (place + 1) & last
        word = load_acquire(hosts, place)
        if word == 0:
            store_release(hosts, hole, word)
            return
        home = np.int64(((word >> np.uint64(32)) * np.uint64(GOLDEN)) >> np.uint64(32)) & last
        if (place - home) & last >= (place - hole) & last:
            store_release(hosts, hole, word)
            hole = place


@compiled
def remove_host(hops, epochs, address):
    """Change `hops`: an address, or a name's number, has no row any more. Who has just missed another tries again."""
    place, word = _find_host(hops.hosts, address)
    if word != 0:
        _remove_at(hops.hosts, place)
        fetch_add(epochs, 0, np.uint32(1))


@compiled
def mend_hosts(hops, used):
    """Change `hops`: entries whose row is free (`used` by row) go, and those that are not found are put where they are.

    XDP may have added one behind a place that was just being emptied.
    """
    hosts = hops.hosts
    for place in range(len(hosts)):
        word = load_acquire(hosts, place)
        if word == 0:
            continue
        address, row = word >> np.uint64(32), np.int64(word & np.uint64(_LOW))
        if used[row] == _FREE_ROW:
            _remove_at(hosts, place)
        elif _find_host(hosts, address)[0] != place:
            _remove_at(hosts, place)
            if host_row(hops, address) == MISS:
                set_host_row(hops, address, row)


@compiled
def request(hops, address, half):
    """Ask the control plane for the way to an address, or a name's number.

    It goes to the half of the board that begins at `half`. Where the board is full the request is lost, and counted.
    """
    word = np.uint64(address) | np.uint64(_TAKEN)
    first = np.int64((np.uint64(address) * np.uint64(GOLDEN)) >> np.uint64(40))
    for step in range(_PLACES):
        place = half + ((first + step) & (REQUESTS - 1))
        if compare_and_swap(hops.requests, place, np.uint64(0), word):
            write(hops.doorbell, hops.one.ctypes.data, 8)
            return
        if load_acquire(hops.requests, place) == word:
            return
    fetch_add(hops.lost_requests, 0, np.uint64(1))


@compiled
def take_requests(hops, start, addresses):
    """Fill `addresses` (uint32, host order) from the board, emptying it; return how many, and where to go on.

    It looks from place `start` on and around, so that no place waits for ever when there are more than fit.
    """
    count = 0
    place = start
    for _ in range(len(hops.requests)):
        if count == len(addresses):
            break
        word = load_acquire(hops.requests, place)
        if word != 0:
            store_release(hops.requests, place, np.uint64(0))
            addresses[count] = np.uint32(word & np.uint64(_LOW))
            count += 1
        place = (place + 1) & (len(hops.requests) - 1)
    return count, place


@compiled
def write_row(rows, epochs, row, new):
    """Change a row to the words `new` and advance the epoch; return whether anything differed.

    A new MAC address of the neighbour is one store: its first word. What touches the second word (our MAC address, the
    interface) goes through HOP_UNRESOLVED, and the state is stored last. A reader that has seen HOP_FORWARD just
    before may still mix both versions in one frame: it goes to an address that nobody has on that wire, and is lost.
    """
    base = row * _WORDS
    is_same = True
    for word in range(_WORDS):
        is_same &= rows[base + word] == new[word]
    if is_same:
        return False
    state = np.uint64(0xFF) << np.uint64(_STATE_SHIFT)
    if rows[base + 1] != new[1] or (rows[base + _STATE_WORD] ^ new[_STATE_WORD]) & state:
        store_release(rows, base + _STATE_WORD, rows[base + _STATE_WORD] & ~state)  # HOP_UNRESOLVED is 0
        fence()
    for word in range(_WORDS):
        if word != _STATE_WORD:
            store_release(rows, base + word, new[word])
    store_release(rows, base + _STATE_WORD, new[_STATE_WORD])
    fetch_add(epochs, 0, np.uint32(1))
    return True
