"""Frontend look-up and endpoint selection from compiled code. Tuples as in xdp/hash.py."""

from __future__ import annotations

import numpy as np

from xdp.atomic import fetch_add, load_acquire, store_release
from xdp.hash import first_place, hash_tuple, second_place
from xdp.jit import compiled, inlined
from xdp.schema import Limit, Protocol, Scheduler

MISS = -1

_WAYS = int(Limit.FRONTEND_WAYS)
_IPV6 = int(Protocol.IPV6)
_RANDOM, _ROUND_ROBIN = int(Scheduler.RANDOM), int(Scheduler.ROUND_ROBIN)
_LEAST_CONNECTIONS = int(Scheduler.LEAST_CONNECTIONS)
USED = np.uint64(1 << 56)  # of a frontend's key: there is one


@inlined
def frontend_key(addr, port, protocol):
    """Return the first eight bytes of a frontend as u64; address and port as on the wire."""
    return USED | np.uint64(protocol) << np.uint64(48) | np.uint64(port) << np.uint64(32) | np.uint64(addr)


@compiled
def frontend_places(hash_key, count, addr, port, protocol):
    """Return the first places (indices of `frontends`, of `count`) of the two groups that a frontend may be in."""
    hashed = hash_tuple(np.uint64(addr), np.uint32(port), protocol, hash_key[0], hash_key[1])
    groups = count // _WAYS
    return first_place(hashed, groups) * _WAYS, second_place(hashed, groups) * _WAYS


@compiled
def reserve_places(hash_key, is_taken, keys, places):
    """Find a free place for each of `keys` (as of `frontend_key`), in the emptier of its two groups.

    Their indices go into `places`, and `is_taken` (u8, one per place) says so from now on. Return how many keys found
    one: all, or the first that did not is `keys[result]`.
    """
    groups = len(is_taken) // _WAYS
    for index in range(len(keys)):
        key = keys[index]
        addr, port = key & np.uint64(0xFFFFFFFF), np.uint32(key >> np.uint64(32) & np.uint64(0xFFFF))
        hashed = hash_tuple(addr, port, key >> np.uint64(48) & np.uint64(0xFF), hash_key[0], hash_key[1])
        best, most = np.int64(MISS), 0
        for first in (first_place(hashed, groups) * _WAYS, second_place(hashed, groups) * _WAYS):
            place, free = np.int64(MISS), 0
            for candidate in range(first, first + _WAYS):
                if is_taken[candidate] == 0:
                    free += 1
                    if place < 0:
                        place = candidate
            if free > most:
                best, most = place, free
        if best < 0:
            return index
        is_taken[best] = 1
        places[index] = best
    return len(keys)


@compiled
def publish(frontends, frontend_keys, keys, places, rows):
    """Let packets see frontends: the Service port's row of each, and only then the key."""
    for index in range(len(keys)):
        frontends[places[index]].service = rows[index]
        store_release(frontend_keys, places[index], keys[index])


@compiled
def overwrite(slots, first, fresh):
    """Store `fresh` (u32) in `slots` from `first` on, while packets read them: each is the old one or the new one."""
    for index in range(len(fresh)):
        store_release(slots, first + index, fresh[index])


@inlined
def _service_at(tables, place, wanted):
    """Return the row of the Service port behind the frontend `wanted` if it is at a place, or MISS.

    A place is used again as soon as it is free: what it says is believed if it is the same frontend's after that.
    """
    keys = tables.frontend_keys
    if load_acquire(keys, place) != wanted:
        return np.int64(MISS)
    row = np.int64(load_acquire(tables.frontend_services, place))
    return row if load_acquire(keys, place) == wanted else np.int64(MISS)


@compiled
def find_frontend(tables, addr, port, protocol):
    """Return the row of the Service port behind (address, port, protocol), or MISS. Port and protocol 0: of a VIP."""
    wanted = frontend_key(addr, port, protocol)
    first, second = frontend_places(tables.control[0].hash_key, len(tables.frontends), addr, port, protocol)
    for place in range(first, first + _WAYS):
        row = _service_at(tables, place, wanted)
        if row != MISS:
            return row
    for place in range(second, second + _WAYS):
        row = _service_at(tables, place, wanted)
        if row != MISS:
            return row
    return np.int64(MISS)


@inlined
def is_vip(tables, addr, protocol):
    """Tell whether an address, or a name if the protocol says so, has a frontend and is none of the node's own."""
    return find_frontend(tables, addr, np.uint16(0), np.uint8(protocol & _IPV6)) != MISS


@compiled
def is_in_ranges(ranges, first, count, address):
    """Tell whether an address (host order) is in one of `count` rows of `ranges` from `first` on, ascending."""
    low, high = np.int64(first), np.int64(first) + np.int64(count)
    while low < high:
        middle = (low + high) >> 1
        if ranges[middle].last < address:
            low = middle + 1
        else:
            high = middle
    return low < np.int64(first) + np.int64(count) and ranges[low].first <= address


@inlined
def _is_below(high, low, bound):
    return high < bound[0] or (high == bound[0] and low < bound[1])


@compiled
def is_in_ranges6(ranges, first, count, high, low):
    """Tell whether an IPv6 address (two u64 in host order) is in one of `count` rows of `ranges` from `first` on."""
    one, end = np.int64(first), np.int64(first) + np.int64(count)
    while one < end:
        middle = (one + end) >> 1
        row = ranges[middle]
        if row.last[0] < high or (row.last[0] == high and row.last[1] < low):
            one = middle + 1
        else:
            end = middle
    return one < np.int64(first) + np.int64(count) and not _is_below(high, low, ranges[one].first)


@compiled
def select(tables, row, addrs, ports, protocol, seed, attempt):
    """Return the row of the endpoint that Maglev chooses for a five-tuple, or MISS if the Service port has none.

    `seed` is a u64: control's, or dice. `attempt` counts from 0: each asks the next slot.
    """
    service = tables.services[row]
    if service.slots == 0:
        return np.int64(MISS)
    hashed = hash_tuple(addrs, ports, protocol, seed, ~seed)
    slot = (np.int64((hashed >> np.uint64(32)) * np.uint64(service.slots) >> np.uint64(32)) + attempt) % service.slots
    return np.int64(tables.maglev[service.first_slot + slot])


@compiled
def schedule(tables, row, addrs, ports, protocol, attempt, now):
    """Return the row of the endpoint that the Service port's scheduler chooses, or MISS; the rest as for `select`.

    `now` (jiffies) and the table's secret make the next connection of the same five-tuple a new throw of the dice.
    """
    service = tables.services[row]
    if service.scheduler == _ROUND_ROBIN and service.slots > 0:
        turn = np.int64(fetch_add(tables.round_robin, row, np.uint32(1)))
        if service.weights:
            return np.int64(tables.maglev[service.first_slot + turn % service.slots])
        return np.int64(tables.maglev[service.first_slot + service.slots + turn % service.members])
    dice = tables.control[0].hash_key[1] ^ np.uint64(now) << np.uint64(32)
    if service.scheduler == _LEAST_CONNECTIONS and service.slots > 0:
        one = select(tables, row, addrs, ports, protocol, dice, attempt)
        other = select(tables, row, addrs, ports, protocol, ~dice, attempt)
        return one if load_acquire(tables.loads, one) <= load_acquire(tables.loads, other) else other
    seed = dice if service.scheduler == _RANDOM else tables.control[0].maglev_seed
    return select(tables, row, addrs, ports, protocol, seed, attempt)


@inlined
def count_begun(tables, service, endpoint):
    """Note that a connection to row `endpoint` has begun, if the Service port wants to know."""
    if service.scheduler == _LEAST_CONNECTIONS:
        fetch_add(tables.loads, endpoint, np.uint32(1))


@compiled
def add_loads(loads, rows, differences):
    """Add to the loads of rows of endpoints, modulo 2^32."""
    for index in range(len(rows)):
        fetch_add(loads, rows[index], differences[index])
