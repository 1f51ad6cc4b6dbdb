"""Frontend look-up and endpoint selection from compiled code. Tuples as in xdp/hash.py."""

from __future__ import annotations

import numpy as np

from xdp.atomic import load_acquire
from xdp.hash import first_bucket, hash_tuple, second_bucket
from xdp.jit import compiled, inlined
from xdp.schema import Limit

MISS = -1

_WAYS = int(Limit.FRONTEND_WAYS)
_USED = np.uint64(1 << 56)


@inlined
def frontend_key(addr, port, protocol):
    """Return the first eight bytes of a frontend as u64; address and port as on the wire."""
    return _USED | np.uint64(protocol) << np.uint64(48) | np.uint64(port) << np.uint64(32) | np.uint64(addr)


@compiled
def frontend_places(hash_key, count, addr, port, protocol):
    """Return the first places (indices of `frontends`, of `count`) of the two groups that a frontend may be in."""
    hashed = hash_tuple(np.uint64(addr), np.uint32(port), protocol, hash_key[0], hash_key[1])
    groups = count // _WAYS
    return first_bucket(hashed, groups) * _WAYS, second_bucket(hashed, groups) * _WAYS


@compiled
def find_frontend(tables, addr, port, protocol):
    """Return the row of the Service port behind (address, port, protocol), or MISS. Port and protocol 0: of a VIP."""
    keys = tables.frontend_keys
    wanted = frontend_key(addr, port, protocol)
    first, second = frontend_places(tables.control[0].hash_key, len(keys), addr, port, protocol)
    for place in range(first, first + _WAYS):
        if load_acquire(keys, place) == wanted:
            return np.int64(tables.frontends[place].service)
    for place in range(second, second + _WAYS):
        if load_acquire(keys, place) == wanted:
            return np.int64(tables.frontends[place].service)
    return np.int64(MISS)


@compiled
def select(tables, row, addrs, ports, protocol, seed, attempt):
    """Return the row of the endpoint that Maglev chooses for a five-tuple, or MISS if the Service port has none.

    `seed` (u64) is equal on every node that shares the VIP. `attempt` counts from 0: each asks the next slot.
    """
    service = tables.services[row]
    if service.slots == 0:
        return np.int64(MISS)
    hashed = hash_tuple(addrs, ports, protocol, seed, ~seed)
    slot = (np.int64((hashed >> np.uint64(32)) * np.uint64(service.slots) >> np.uint64(32)) + attempt) % service.slots
    return np.int64(tables.maglev[service.first_slot + slot])
