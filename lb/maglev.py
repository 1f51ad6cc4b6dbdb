"""Maglev: which endpoint a slot of a Service's table belongs to (Eisenbud et al., NSDI 2016, section 3.4).

Every endpoint has its own permutation of the slots, and the endpoints take turns to claim the next free slot of theirs;
one with a third of the largest weight takes every third turn.
The table follows from the names of the endpoints (address and port) and the seed alone: neither their order nor what
was there before matters, so every node that shares a VIP agrees. Shares are as the weights within one slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

import numpy as np
import numpy.typing as npt

from xdp.addresses import address_of, is_ipv6
from xdp.jit import compiled, inlined

DEFAULT_SEED = 0x7475726E6F757421

_SLOTS_PER_ENDPOINT = 100
_FIRST_STEP = 3  # endpoints; 307 slots
_LARGEST_USUAL = 65537  # the paper's small table
_FEWEST_PER_ENDPOINT = 10
_IPV4_MAPPED = 0xFFFF_0000_0000

_FREE = np.uint32(0xFFFFFFFF)
_ONE = np.uint64(1)
_HALF = np.uint64(32)
# An odd multiplier and a finalizer with good avalanche (Pelle Evensen's rrmxmx family uses the second).
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_FINAL = np.uint64(0xD6E8FEB86659FD93)
_SALT_TURN, _SALT_OFFSET, _SALT_SKIP = np.uint64(1), np.uint64(2), np.uint64(3)


@lru_cache
def table_size(endpoints: int) -> int:
    """Return the number of slots for `endpoints` endpoints: a prime, at least 100 for each; 0 for none.

    Sizes grow in steps that double (3, 6, 12 ... endpoints: 307, 601, 1201 ... slots), for another size is another
    permutation and moves nearly every slot: within a step, adding or removing an endpoint moves little else. One
    endpoint has the smallest table, as every table of it is the same. Above 655 endpoints the size stays at 65537
    while that leaves ten slots for each (imbalance up to 10 %): larger tables fall out of the CPU's cache and take
    long to rebuild.
    """
    if endpoints <= 1:
        return 101 if endpoints else 0
    step = _FIRST_STEP
    while step < endpoints:
        step *= 2
    usual = min(_SLOTS_PER_ENDPOINT * step, max(_LARGEST_USUAL, _FEWEST_PER_ENDPOINT * step))
    return _next_prime(usual)


def names_of(endpoints: Iterable[tuple[IPv4Address | IPv6Address, int]]) -> npt.NDArray[np.uint64]:
    """Return the names of `endpoints` (address, port) as an array of shape (n, 3): address high, address low, port.

    An IPv4 address has its IPv4-mapped form.
    """
    words: list[int] = []
    for address, port in endpoints:
        number = int(address)
        if address.version == 4:
            number |= _IPV4_MAPPED
        words += (number >> 64, number & 0xFFFF_FFFF_FFFF_FFFF, port)
    return np.array(words, np.uint64).reshape(-1, 3)


def names_of_packed(endpoints: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Return the names of endpoints that are given as numbers, address << 16 | port (addresses of xdp/addresses.py)."""
    names = np.zeros((len(endpoints), 3), np.uint64)
    if not any(is_ipv6(endpoint >> 16) for endpoint in endpoints):
        packed = np.array(endpoints, np.uint64)
        names[:, 1] = packed >> np.uint64(16) | np.uint64(_IPV4_MAPPED)
        names[:, 2] = packed & np.uint64(0xFFFF)
        return names
    return names_of((address_of(endpoint >> 16), endpoint & 0xFFFF) for endpoint in endpoints)


def scratch_for(endpoints: int) -> npt.NDArray[np.uint64]:
    """Return the working memory that `fill` wants for up to `endpoints` endpoints of one Service."""
    return np.empty((max(endpoints, 1), 4), np.uint64)


def positions(
    endpoints: Iterable[tuple[IPv4Address | IPv6Address, int]], seed: int, weights: Iterable[int] = ()
) -> npt.NDArray[np.uint32]:
    """Return a fresh table: the index into `endpoints` for every slot. Without `weights` all have the same."""
    names = names_of(endpoints)
    given = np.array(list(weights) or [1] * len(names), np.uint32)
    slots = np.empty(table_size(len(names)), np.uint32)
    fill(slots, names, np.arange(len(names), dtype=np.uint32), given, np.uint64(seed), scratch_for(len(names)))
    return slots


def _next_prime(number: int) -> int:
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number


@inlined
def _hash(salt, seed, names, index):
    """Return 64 bits that follow from a name, a seed and a salt: the same on every machine, for good."""
    value = (seed + salt) * _SPREAD
    for word in range(3):
        value ^= names[index, word]
        value = (value ^ (value >> _HALF)) * _FINAL
        value = (value ^ (value >> _HALF)) * _FINAL
        value ^= value >> _HALF
    return value


@compiled
def fill(slots, names, values, weights, seed, scratch):
    """Fill `slots` (u32, a prime number of them) with one of `values` (u32, row of an endpoint) each.

    `names` are as from `names_of`, one per value and each only once; `weights` (u32) likewise, none of them zero;
    `seed` is a u64; `scratch` has a row of four u64 per endpoint. 0xffffffff cannot be a value. Cost: about 3 us for 3
    endpoints.
    """
    endpoints = len(values)
    size = np.uint64(len(slots))
    if endpoints == 0 or size < 2:
        return
    # Who takes the first turn is a matter of names, too. Columns: turn, then credit; endpoint, position, skip.
    for index in range(endpoints):
        scratch[index, 0] = _hash(_SALT_TURN, seed, names, index)
        scratch[index, 1] = np.uint64(index)
    _sort(scratch, endpoints)
    largest = np.uint64(0)
    for turn in range(endpoints):
        endpoint = np.int64(scratch[turn, 1])
        largest = max(largest, np.uint64(weights[endpoint]))
        scratch[turn, 0] = 0
        scratch[turn, 2] = _hash(_SALT_OFFSET, seed, names, endpoint) % size
        scratch[turn, 3] = _hash(_SALT_SKIP, seed, names, endpoint) % (size - _ONE) + _ONE
    for slot in range(len(slots)):
        slots[slot] = _FREE
    free = len(slots)
    while True:
        for turn in range(endpoints):
            scratch[turn, 0] += np.uint64(weights[np.int64(scratch[turn, 1])])
            if scratch[turn, 0] < largest:
                continue
            scratch[turn, 0] -= largest
            position = scratch[turn, 2]
            skip = scratch[turn, 3]
            while slots[position] != _FREE:
                position += skip
                if position >= size:
                    position -= size
            slots[position] = values[np.int64(scratch[turn, 1])]
            scratch[turn, 2] = position
            free -= 1
            if free == 0:
                return


@compiled
def fill_all(slots, ranges, names, values, weights, ends, seed, scratch):
    """Fill one table after the other: that of Service i is `slots[ranges[i, 0] : ranges[i, 0] + ranges[i, 1]]`.

    Its endpoints are those of `names`, `values` and `weights` before `ends[i]`, from where the one before it ends.
    """
    first = 0
    for service in range(len(ends)):
        last = ends[service]
        start, count = ranges[service, 0], ranges[service, 1]
        mine = slots[start : start + count]
        fill(mine, names[first:last], values[first:last], weights[first:last], seed, scratch)
        first = last


@compiled
def _sort(rows, length):
    """Sort the first `length` rows by their first column, in place; only columns 0 and 1 move (Shell, Ciura's gaps)."""
    for gap in (8858, 3937, 1750, 701, 301, 132, 57, 23, 10, 4, 1):
        for index in range(gap, length):
            key, endpoint = rows[index, 0], rows[index, 1]
            hole = index
            while hole >= gap and rows[hole - gap, 0] > key:
                rows[hole, 0], rows[hole, 1] = rows[hole - gap, 0], rows[hole - gap, 1]
                hole -= gap
            rows[hole, 0], rows[hole, 1] = key, endpoint
