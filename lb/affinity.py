"""Who was given which endpoint last: the memory of sessionAffinity ClientIP, compiled. Any number of writers, no locks.

A hash table of bounded size, shared so that it survives a restart: buckets of AFFINITY_WAYS entries of two words. The
first word is the key, a keyed hash of a client's address and a Service port's identity; the second one holds the
endpoint's row and when it was given last.

* A new entry takes an empty place of its bucket or that of the oldest. It is claimed by compare-and-swap of the key,
  which is stored last.
* An entry is advice: what it says counts only while the Service has that endpoint as a candidate, so a reader that
  meets one in the middle of a change is given a candidate all the same. Two writers that remember one client at once
  have chosen alike, because the choice depends on the client alone.
* Before an endpoint's row is reused for another, `forget` takes out what remembers it.
"""

from __future__ import annotations

import numpy as np

from xdp.atomic import compare_and_swap, load_acquire, store_release
from xdp.hash import first_place, hash_tuple
from xdp.jit import compiled, inlined
from xdp.schema import Limit

MISS = -1

_WAYS = int(Limit.AFFINITY_WAYS)
_EMPTY, _CLAIMED = np.uint64(0), np.uint64(1)
_NEVER_A_KEY = np.uint64(2)  # this bit is set in every key, so that none is EMPTY or CLAIMED
_LOW = np.uint64(0xFFFFFFFF)


@inlined
def client_of(address, identity):
    """Return what stands for a client (address as on the wire) of a Service port when its endpoint is chosen."""
    return np.uint64(identity) << np.uint64(32) | np.uint64(address)


@inlined
def _find(tables, client):
    """Return (key, first place) of a client."""
    secret = tables.control[0].hash_key
    hashed = hash_tuple(client, np.uint32(0), np.uint8(0), secret[0], secret[1])
    buckets = len(tables.affinity_words) // (2 * _WAYS)
    return hashed | _NEVER_A_KEY, first_place(hashed, buckets) * _WAYS


@inlined
def _age(now, value):
    return np.int64(np.int32(np.uint32(now) - np.uint32(value >> np.uint64(32))))


@inlined
def _is_member(tables, service, endpoint):
    """Tell whether an endpoint's row is among the candidates of a row of `services`."""
    low = np.int64(service.first_slot) + np.int64(service.slots)
    end = low + np.int64(service.members)
    high = end
    while low < high:
        middle = (low + high) >> 1
        if np.int64(tables.maglev[middle]) < endpoint:
            low = middle + 1
        else:
            high = middle
    return low < end and np.int64(tables.maglev[low]) == endpoint


@compiled
def remembered(tables, row, client, now):
    """Return the endpoint that a client (as from `client_of`) is to keep at row `row` of services, or MISS."""
    words, service = tables.affinity_words, tables.services[row]
    key, first = _find(tables, client)
    for place in range(first, first + _WAYS):
        if load_acquire(words, 2 * place) == key:
            value = load_acquire(words, 2 * place + 1)
            endpoint = np.int64(value & _LOW)
            is_old = _age(now, value) > np.int64(service.affinity_s) * np.int64(tables.control[0].hertz)
            return np.int64(MISS) if is_old or not _is_member(tables, service, endpoint) else endpoint
    return np.int64(MISS)


@compiled
def remember(tables, client, endpoint, now):
    """Note that a client was given an endpoint just now."""
    words = tables.affinity_words
    key, first = _find(tables, client)
    value = np.uint64(now) << np.uint64(32) | np.uint64(endpoint)
    for place in range(first, first + _WAYS):
        if load_acquire(words, 2 * place) == key:
            store_release(words, 2 * place + 1, value)
            return
    for _ in range(_WAYS):  # as often as another writer may be quicker
        victim, held, oldest = first, _CLAIMED, np.int64(-1) << np.int64(40)
        for place in range(first, first + _WAYS):
            has = load_acquire(words, 2 * place)
            age = _age(now, load_acquire(words, 2 * place + 1))
            if has == _EMPTY:
                victim, held = place, has
                break
            if has != _CLAIMED and age > oldest:
                victim, held, oldest = place, has, age
        if held != _CLAIMED and compare_and_swap(words, 2 * victim, held, _CLAIMED):
            store_release(words, 2 * victim + 1, value)
            store_release(words, 2 * victim, key)
            return


@compiled
def forget(tables, now, oldest, gone):
    """Take out entries older than `oldest` jiffies, and those of endpoints in `gone` (i64, ascending); count them."""
    words = tables.affinity_words
    count = 0
    for place in range(len(words) // 2):
        key = load_acquire(words, 2 * place)
        if key == _EMPTY or key == _CLAIMED:
            continue
        value = load_acquire(words, 2 * place + 1)
        endpoint = np.int64(value & _LOW)
        at = np.searchsorted(gone, endpoint)
        if _age(now, value) > oldest or (at < len(gone) and gone[at] == endpoint):
            count += compare_and_swap(words, 2 * place, key, _EMPTY)
    return count


@compiled
def abandon(tables):
    """Take out what a writer that died has claimed. Nobody else may be writing."""
    words = tables.affinity_words
    for place in range(len(words) // 2):
        compare_and_swap(words, 2 * place, _CLAIMED, _EMPTY)
