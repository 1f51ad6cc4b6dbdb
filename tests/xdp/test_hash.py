"""The hash in C, in compiled code and in plain Python: one function, three times."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.native import Native
from tests.reference import first_place, hash_of, second_place
from xdp import hash as twin
from xdp.jit import compiled
from xdp.schema import Limit, Tag

SAMPLES = 20_000


@compiled
def _all_of(addrs, ports, protocols, key0, key1, buckets, out):
    """Fill `out` (n, 5) with hash, first and second place, tag, and home."""
    for i in range(len(addrs)):
        hashed = twin.hash_tuple(addrs[i], ports[i], protocols[i], key0, key1)
        out[i, 0] = hashed
        out[i, 1] = np.uint64(twin.first_place(hashed, buckets))
        out[i, 2] = np.uint64(twin.second_place(hashed, buckets))
        out[i, 3] = twin.tag_of(hashed)
        out[i, 4] = np.uint64(twin.home_of(hashed))


@compiled
def _hits(words, tag):
    return twin.hits_of(
        twin.lanes_equal(words[0], tag),
        twin.lanes_equal(words[1], tag),
        twin.lanes_equal(words[2], tag),
        twin.lanes_equal(words[3], tag),
    )


@compiled
def _lowest(hits):
    return twin.lowest_hit(hits)


@compiled
def _count(hits):
    return twin.hit_count(hits)


@compiled
def _lanes(word, tag):
    return twin.lanes_equal(word, tag)


@pytest.fixture(scope="module")
def native() -> Native:
    return Native()


@pytest.mark.parametrize("buckets", [2, 3, 125_000, 2**31 - 1])
def test_a_five_tuple_lies_in_the_same_place_for_all(buckets: int, native: Native):
    random = np.random.default_rng(buckets)
    addrs = random.integers(0, 2**64, SAMPLES, np.uint64)
    ports = random.integers(0, 2**32, SAMPLES, np.uint32)
    protocols = random.choice(np.array([0, 1, 6, 17, 255], np.uint8), SAMPLES)
    keys = random.integers(0, 2**64, 2, np.uint64)
    out = np.zeros((SAMPLES, 5), np.uint64)
    _all_of(addrs, ports, protocols, keys[0], keys[1], buckets, out)
    library = native.library
    for index in range(SAMPLES):
        key = int(addrs[index]), int(ports[index]), int(protocols[index])
        hashed = library.native_hash(native.tuple(*key), int(keys[0]), int(keys[1]))
        in_c = [
            hashed,
            library.native_first_place(hashed, buckets),
            library.native_second_place(hashed, buckets),
            library.native_tag(hashed),
            library.native_home(hashed),
        ]
        assert out[index].tolist() == in_c
        assert hash_of(*key, int(keys[0]), int(keys[1])) == hashed
        assert [first_place(hashed, buckets), second_place(hashed, buckets)] == in_c[1:3]
    assert out[:, 1:3].max() < buckets
    assert out[:, 3].min() >= Tag.FIRST


def test_tags_and_buckets_are_spread_evenly():
    """Neighbouring clients, one VIP: each of 256 buckets gets its share, give or take six standard deviations."""
    count, buckets = 65_536, 256
    addrs = np.arange(count, dtype=np.uint64) << np.uint64(8) | np.uint64(0x0100600A << 32)
    ports = np.full(count, 0x5000_1234, np.uint32)
    out = np.zeros((count, 5), np.uint64)
    _all_of(addrs, ports, np.full(count, 6, np.uint8), np.uint64(1), np.uint64(2), buckets, out)
    share = count / buckets
    for column in (1, 2):
        sizes = np.bincount(out[:, column].astype(np.int64), minlength=buckets)
        assert abs(sizes - share).max() < 6 * share**0.5
    assert len(np.unique(out[:, 3])) > 0.6 * count


_tags = st.one_of(st.integers(0, 3), st.sampled_from([0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]), st.integers(0, 0xFFFF))


@settings(max_examples=500, deadline=None)
@given(tags=st.lists(_tags, min_size=16, max_size=16), wanted=_tags, place=st.none() | st.integers(0, 15))
def test_tags_are_compared_exactly(tags: list[int], wanted: int, place: int | None, native: Native):
    if place is not None:
        tags[place] = wanted
    words = np.array(tags, np.uint16).view(np.uint64)
    for word in words:
        assert int(_lanes(word, np.uint64(wanted))) == native.library.native_lanes_equal(int(word), wanted)
    hits = int(_hits(words, np.uint64(wanted)))
    assert native.library.native_hits(native.ffi.from_buffer(words), wanted) == hits
    expected = [slot for slot in range(Limit.BUCKET_TAGS) if tags[slot] == wanted]
    assert _count(np.uint64(hits)) == len(expected)
    found = []
    while hits:
        assert native.library.native_lowest_hit(hits) == _lowest(np.uint64(hits))
        found.append(int(_lowest(np.uint64(hits))))
        hits &= hits - 1
    assert sorted(found) == expected
