"""Where a five-tuple may lie in the flow table: the compiled twin of bpf/hash.h.

A five-tuple is two numbers and a protocol, as they lie in memory: `addrs` (u64: source in the lower half, destination
in the upper) and `ports` (u32: source in the lower half), every field in network byte order.
"""

from __future__ import annotations

import numpy as np

from xdp.intrinsics import intrinsic, ir, types
from xdp.jit import inlined
from xdp.schema import Limit, Tag

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 by the golden ratio: what it multiplies is spread over the upper bits

_A = np.uint64(GOLDEN)
_B = np.uint64(0x6A09E667F3BCC909)
_C = np.uint64(0xBB67AE8584CAA73B)
_LANES = np.uint64(0x0001000100010001)
_LOW = np.uint64(0x7FFF7FFF7FFF7FFF)
_HALF = np.uint64(0xFFFFFFFF)
_ONE = np.uint64(1)
_TAG_FIRST = np.uint64(Tag.FIRST)
_LAST_TAG = np.uint64(Limit.BUCKET_TAGS - 1)


@inlined
def hash_tuple(addrs, ports, protocol, key0, key1):
    """Return the keyed 64-bit hash of a five-tuple (hash.h says why this one)."""
    a = (np.uint64(addrs) ^ key0) * _A
    b = ((np.uint64(protocol) << np.uint64(32) | np.uint64(ports)) ^ key1) * _B
    mixed = a ^ (b >> np.uint64(32) | b << np.uint64(32))
    mixed ^= mixed >> np.uint64(29)
    mixed *= _C
    return mixed ^ mixed >> np.uint64(32)


@inlined
def first_place(hashed, count):
    """Return the first place of a hash, of `count`."""
    return np.int64((hashed & _HALF) * np.uint64(count) >> np.uint64(32))


@inlined
def second_place(hashed, count):
    """Return the second place of a hash, of `count`; it may be the first one."""
    return np.int64((hashed * _A >> np.uint64(32)) * np.uint64(count) >> np.uint64(32))


@inlined
def home_of(hashed):
    """Return where in its first bucket the flow of a hash lies if there is room; the next best is this number ^ 1."""
    return np.int64(hashed >> np.uint64(32) & _LAST_TAG)


@inlined
def tag_of(hashed):
    """Return the 16-bit tag of a hash as u64: never a reserved value."""
    tag = hashed >> np.uint64(48)
    return tag + _TAG_FIRST if tag < _TAG_FIRST else tag


@inlined
def lanes_equal(word, tag):
    """Return the top bit of each 16-bit lane of `word` that equals `tag`; exact, without carries between lanes."""
    x = word ^ tag * _LANES
    return ~(((x & _LOW) + _LOW) | x | _LOW)


@inlined
def hits_of(lanes0, lanes1, lanes2, lanes3):
    """Return the lanes of a bucket's four words as one number: bit 16 i + w is tag i of word w."""
    return (
        lanes0 >> np.uint64(15) | lanes1 >> np.uint64(14) | lanes2 >> np.uint64(13) | lanes3 >> np.uint64(12)
    )  # fmt: skip


@inlined
def hit_count(hits):
    """Return how many bits of `hits` are set."""
    pairs = (hits & np.uint64(0x5555555555555555)) + (hits >> _ONE & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + (pairs >> np.uint64(2) & np.uint64(0x3333333333333333))
    return np.int64(fours * _LANES >> np.uint64(48))


@inlined
def lowest_hit(hits):
    """Return the number within its bucket of a tag whose bit is set in `hits`; at least one is."""
    bit = trailing_zeros(hits)
    return np.int64((bit & 3) << 2 | bit >> 4)


@inlined
def is_hit(hits, number):
    """Tell whether the bit of tag `number` of a bucket is set in `hits`."""
    return hits >> np.uint64((number & 3) << 4 | number >> 2) & _ONE != 0


@intrinsic
def trailing_zeros(typing_context, word):
    """Return the number of the lowest bit that is set; `word` is not zero."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate
