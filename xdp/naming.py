"""Names of IPv6 addresses, compiled: find, intern, pin, and what the sweep does to them. Many writers, no locks.

A name is a row of `names`; its number stands wherever an IPv4 address stands in a table (docs/adr/0029). An address is
two u64 as they lie in the header, and has two buckets of NAME_WAYS rows to choose from.

* A writer claims a FREE row by compare-and-swap, fills it, makes it a CANDIDATE and looks for the address again. If it
  finds another one it frees its own, and tries again; else it is ALIVE. Of two that name one address at a time, whoever
  became a candidate last sees the other: no address has two names that can be found.
* Who only reads takes a DYING name as it takes an ALIVE one. Who is about to put a name into a record makes it alive.
* The sweep (one thread) goes over all flows in a pass. What was neither used nor pinned is DYING at its end. The next
  pass begins after a grace period; what is DYING all through it and still not used is WITHDRAWN, and FREE after another
  grace period. So a row has another address only when nobody can hold the number that it was for.
"""

from __future__ import annotations

import numpy as np

from xdp.atomic import compare_and_swap, fetch_add, load_acquire, store_release
from xdp.hash import first_place, hash_tuple, second_place
from xdp.jit import compiled, inlined
from xdp.schema import Limit, NameState

NOBODY = 0  # the row that is no name

_WAYS, _KEPT = int(Limit.NAME_WAYS), int(Limit.NAMES_KEPT)
_FREE, _CLAIMED = np.uint32(NameState.FREE), np.uint32(NameState.CLAIMED)
_CANDIDATE, _ALIVE = np.uint32(NameState.CANDIDATE), np.uint32(NameState.ALIVE)
_DYING, _WITHDRAWN = np.uint32(NameState.DYING), np.uint32(NameState.WITHDRAWN)
_TRIES = 64  # of writers that name one address at a time, and of a full bucket's rows
_ONE, _MINUS_ONE = np.uint32(1), np.uint32(0xFFFFFFFF)
_ONE_MORE, _ONE_LESS = np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)
_LANE = np.uint64(0xFFFF)


@inlined
def hash_address(first, second, key0, key1):
    """Return the keyed hash of an address; the twin of `hash_address` in hash.h."""
    return hash_tuple(first, np.uint32(second), second >> np.uint64(32), key0, key1)


@inlined
def _places(tables, first, second):
    key = tables.control[0].hash_key
    hashed = hash_address(first, second, key[0], key[1])
    buckets = len(tables.names) // _WAYS
    return first_place(hashed, buckets) * _WAYS, second_place(hashed, buckets) * _WAYS


@inlined
def _is_of(tables, row, first, second):
    addr = tables.names[row].addr
    return addr[0] == first and addr[1] == second


@compiled
def find(tables, first, second):
    """Return the number of an address, or NOBODY."""
    one, other = _places(tables, first, second)
    for way in range(2 * _WAYS):
        row = (one if way < _WAYS else other) + way % _WAYS
        state = load_acquire(tables.name_states, row)
        if (state == _ALIVE or state == _DYING) and _is_of(tables, row, first, second):
            return np.int64(row)
    return np.int64(NOBODY)


@inlined
def sum_of(value):
    """Return the folded sum of the four 16-bit words of a u64."""
    total = (
        (value & _LANE) + (value >> np.uint64(16) & _LANE) + (value >> np.uint64(32) & _LANE) + (value >> np.uint64(48))
    )
    total = (total & _LANE) + (total >> np.uint64(16))
    return (total & _LANE) + (total >> np.uint64(16))


@inlined
def _other_of(tables, first, second, besides):
    """Return a row other than `besides` that names an address or is about to, or NOBODY."""
    one, other = _places(tables, first, second)
    for way in range(2 * _WAYS):
        row = (one if way < _WAYS else other) + way % _WAYS
        state = load_acquire(tables.name_states, row)
        is_taken = state == _CANDIDATE or state == _ALIVE or state == _DYING
        if row != besides and is_taken and _is_of(tables, row, first, second):
            return np.int64(row)
    return np.int64(NOBODY)


@inlined
def _free_row(tables, first, second):
    """Return a free row for an address, in the emptier bucket, or NOBODY."""
    one, other = _places(tables, first, second)
    best, most = np.int64(NOBODY), 0
    for start in (one, other):
        place, free = np.int64(NOBODY), 0
        for row in range(start, start + _WAYS):
            if row != NOBODY and load_acquire(tables.name_states, row) == _FREE:
                place, free = np.int64(row), free + 1
        if free > most:
            best, most = place, free
    return best


@compiled
def intern(tables, first, second):
    """Return the number of an address, alive: the one that it has, or a new one. NOBODY: there is no room."""
    states = tables.name_states
    for _ in range(_TRIES):
        row = find(tables, first, second)
        if row != NOBODY:
            state = load_acquire(states, row)
            if state == _ALIVE or (state == _DYING and compare_and_swap(states, row, _DYING, _ALIVE)):
                return row
            continue
        row = _free_row(tables, first, second)
        if row == NOBODY:
            return row
        if not compare_and_swap(states, row, _FREE, _CLAIMED):
            continue
        fetch_add(tables.name_count, 0, _ONE_MORE)
        name = tables.names[row]
        name.addr[0] = first
        name.addr[1] = second
        total = sum_of(first) + sum_of(second)
        name.sum = np.uint32((total & _LANE) + (total >> np.uint64(16)))
        compare_and_swap(states, row, _CLAIMED, _CANDIDATE)  # a full barrier: what others are doing is seen after it
        if _other_of(tables, first, second, row) == NOBODY:
            store_release(states, row, _ALIVE)
            return row
        store_release(states, row, _FREE)  # nobody reads a candidate
        fetch_add(tables.name_count, 0, _ONE_LESS)
    return np.int64(NOBODY)


@compiled
def intern_client(tables, first, second):
    """Return the same for a client's address: the last rows, one in NAMES_KEPT, are left to configuration."""
    rows = len(tables.names)
    if count(tables) >= rows - rows // _KEPT and find(tables, first, second) == NOBODY:
        return np.int64(NOBODY)
    return intern(tables, first, second)


@compiled
def pin(tables, first, second):
    """Return the number of an address, as `intern` does, which stays until it is unpinned as often."""
    for _ in range(_TRIES):
        row = intern(tables, first, second)
        if row == NOBODY:
            return row
        fetch_add(tables.name_pins, row, _ONE)
        if find(tables, first, second) == row:
            return row
        fetch_add(tables.name_pins, row, _MINUS_ONE)
    return np.int64(NOBODY)


@compiled
def unpin(tables, row):
    """Take back one `pin`."""
    fetch_add(tables.name_pins, row, _MINUS_ONE)


@compiled
def count(tables):
    """Return how many names there are, those that are being made or let go among them."""
    return load_acquire(tables.name_count, 0)


@compiled
def end_pass(tables, used):
    """Let names die, or live again, after a pass that has seen which flows use (`used`: u8 by row).

    Return (how many are DYING, how many WITHDRAWN): these are to be `release`d after a grace period. Names that are
    DYING at the call must have been so for a grace period when the pass began.
    """
    states = tables.name_states
    dying, withdrawn = 0, 0
    for row in range(len(tables.names)):
        state = load_acquire(states, row)
        is_needed = used[row] != 0 or load_acquire(tables.name_pins, row) != 0
        if state == _ALIVE and not is_needed:
            dying += compare_and_swap(states, row, _ALIVE, _DYING)
        elif state == _DYING and is_needed:
            compare_and_swap(states, row, _DYING, _ALIVE)
        elif state == _DYING:
            withdrawn += compare_and_swap(states, row, _DYING, _WITHDRAWN)
        withdrawn += state == _WITHDRAWN  # who was about to release it died
    return dying, withdrawn


@compiled
def release(tables):
    """Free what was withdrawn before a grace period."""
    for row in range(len(tables.names)):
        if compare_and_swap(tables.name_states, row, _WITHDRAWN, _FREE):
            fetch_add(tables.name_count, 0, _ONE_LESS)


@compiled
def unfinished(tables, rows):
    """Fill `rows` with the names that somebody is making just now; return how many."""
    found = 0
    for row in range(len(tables.names)):
        state = load_acquire(tables.name_states, row)
        if (state == _CLAIMED or state == _CANDIDATE) and found < len(rows):
            rows[found] = row
            found += 1
    return found


@compiled
def take_over(tables, abandoned):
    """Give up a dead daemon's pins, and the names that its writers have left unfinished (`abandoned`: rows).

    They must have been so for a grace period: XDP may be naming clients meanwhile. A count that is too high for that
    does no harm; at 0 names are not looked at.
    """
    for row in abandoned:
        compare_and_swap(tables.name_states, row, _CLAIMED, _FREE)
        compare_and_swap(tables.name_states, row, _CANDIDATE, _FREE)
    before, names = count(tables), np.uint64(0)
    for row in range(len(tables.names)):
        tables.name_pins[row] = 0
        if load_acquire(tables.name_states, row) != _FREE:
            names += _ONE_MORE
    fetch_add(tables.name_count, 0, names - before)
