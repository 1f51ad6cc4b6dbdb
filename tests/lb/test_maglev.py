"""Maglev's promises: equal shares, little movement, and every node agrees."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lb import maglev

SEED = 7
FIRST = int(IPv4Address("10.244.0.1"))
GOLDEN = [1, 0, 1, 0, 2, 0, 1, 0, 2, 2, 0, 1, 2, 0, 0, 1, 2, 2, 0, 1, 1, 2, 1, 0]
GOLDEN_IPV6 = [0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1]


def endpoints(count: int, first: int = FIRST) -> list[tuple[IPv4Address | IPv6Address, int]]:
    return [(IPv4Address(first + number), 8080) for number in range(count)]


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 50, 655])
def test_a_table_is_prime_and_has_a_hundred_slots_for_each_endpoint(count):
    assert is_prime(maglev.table_size(count))
    assert maglev.table_size(count) >= 100 * count


def test_sizes_of_tables():
    assert [maglev.table_size(count) for count in (0, 1, 2, 3, 4, 6, 100, 655, 6000)] == [
        0,
        101,
        307,
        307,
        601,
        601,
        19207,
        65537,
        65537,
    ]


@pytest.mark.faults(121)
def test_even_a_huge_service_has_ten_slots_for_each_endpoint():
    for count in (7_000, 100_000):
        assert is_prime(maglev.table_size(count))
        assert maglev.table_size(count) >= 10 * count


@pytest.mark.parametrize("count", [1, 2, 3, 10, 100, 1000, 7000])
def test_shares_are_equal_within_one_slot(count):
    shares = np.bincount(maglev.positions(endpoints(count), SEED), minlength=count)
    assert shares.max() - shares.min() <= 1


@pytest.mark.faults(121)
def test_no_endpoint_has_an_empty_table():
    assert len(maglev.positions([], SEED)) == 0


@pytest.mark.faults(130)
def test_the_table_is_the_same_on_every_machine():
    """A golden value: whoever changes it makes nodes of two versions disagree."""
    table = maglev.positions(endpoints(3), maglev.DEFAULT_SEED)
    assert table[:24].tolist() == GOLDEN
    mixed = [(IPv6Address("fd00:244:1::a"), 443), (IPv6Address("fd00:244:2::a"), 443)]
    assert maglev.positions(mixed, 1)[:12].tolist() == GOLDEN_IPV6


@pytest.mark.faults(131)
def test_another_seed_is_another_table():
    assert (maglev.positions(endpoints(3), 1) != maglev.positions(endpoints(3), 2)).any()


def test_the_same_address_with_another_port_is_another_endpoint():
    one = maglev.positions([(IPv4Address("10.0.0.1"), 80), (IPv4Address("10.0.0.1"), 81)], SEED)
    assert set(one.tolist()) == {0, 1}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.randoms(use_true_random=False))
def test_the_order_of_the_endpoints_does_not_matter(count, random):
    ordered = endpoints(count)
    shuffled = list(ordered)
    random.shuffle(shuffled)
    expected = [ordered[index] for index in maglev.positions(ordered, SEED)]
    assert [shuffled[index] for index in maglev.positions(shuffled, SEED)] == expected


def moved_needlessly(count: int, first: int, gone: int) -> float:
    """Return the part of the slots of the endpoints that stay that moves when `gone` of `count` is removed."""
    before = endpoints(count, first)
    after = before[:gone] + before[gone + 1 :]
    old = np.array(before, object)[:, 0][maglev.positions(before, SEED)]
    new = np.array(after, object)[:, 0][maglev.positions(after, SEED)]
    assert len(old) == len(new)
    stays = old != before[gone][0]
    return float((old != new)[stays].mean())


@pytest.mark.faults(130)
@pytest.mark.parametrize(
    ("count", "usual"), [(3, 0.03), (5, 0.035), (10, 0.035), (20, 0.035), (100, 0.02), (655, 0.012)]
)
def test_removing_an_endpoint_moves_little_beside_its_share(count, usual):
    """The usual figure is the algorithm's own at a hundred slots for each endpoint (the paper's figure 12)."""
    samples = 40 if count <= 20 else 6
    moved = [moved_needlessly(count, FIRST + 4096 * sample, sample % count) for sample in range(samples)]
    assert np.median(moved) <= usual


def test_removing_one_of_two_moves_only_its_share():
    old, new = maglev.positions(endpoints(2), SEED), maglev.positions(endpoints(1), SEED)
    assert set(old.tolist()) == {0, 1}
    assert set(new.tolist()) == {0}


@pytest.mark.parametrize(
    "weights", [(1, 1, 1), (3, 1), (1, 2, 3, 4), (100, 1, 100), (65535, 32768, 1), (1,) * 50 + (25,) * 10]
)
def test_L_shares_are_as_the_weights_within_one_percent(weights):
    shares = np.bincount(maglev.positions(endpoints(len(weights)), SEED, weights), minlength=len(weights))
    wanted = np.array(weights) / sum(weights)
    assert np.abs(shares / shares.sum() - wanted).max() <= 0.01
    assert np.abs(shares - wanted * shares.sum()).max() < len(weights)


def test_L_equal_weights_are_none():
    assert (maglev.positions(endpoints(5), SEED, [7] * 5) == maglev.positions(endpoints(5), SEED)).all()


def test_L_weights_go_with_their_endpoints_and_not_with_their_order():
    ordered, weights = endpoints(6), [1, 2, 3, 4, 5, 6]
    expected = [ordered[index] for index in maglev.positions(ordered, SEED, weights)]
    found = [ordered[::-1][index] for index in maglev.positions(ordered[::-1], SEED, weights[::-1])]
    assert found == expected
