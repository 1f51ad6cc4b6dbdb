"""Names of IPv6 addresses: given once, kept while they are needed, and reused only when nobody can hold them."""

from __future__ import annotations

import threading
from ipaddress import IPv6Address

import numpy as np
import pytest

from xdp import naming
from xdp.errors import TableFullError
from xdp.names import Names, words_of
from xdp.schema import Limit, NameState
from xdp.tables import Capacity, Tables

_SMALL = Capacity(
    connections=200, frontends=8, services=4, maglev_slots=64, endpoints=4, next_hops=8, affinities=8, names=1024
)
A, B = IPv6Address("2001:db8::a"), IPv6Address("2001:db8::b")


@pytest.fixture
def tables() -> Tables:
    made = Tables.in_memory(_SMALL)
    made.control[0]["hash_key"] = (0x1234_5678_9ABC_DEF1, 0xFEDC_BA98_7654_3211)
    return made


@pytest.fixture
def names(tables: Tables) -> Names:
    return Names(tables)


def end_pass(tables: Tables, *used: int) -> None:
    marks = np.zeros(len(tables.names), np.uint8)
    marks[list(used)] = 1
    naming.end_pass(tables, marks)
    naming.release(tables)


def test_an_address_has_one_number_and_a_number_one_address(names: Names):
    numbers = {address: names.intern(address) for address in (A, B)}
    assert 0 not in numbers.values()
    assert numbers[A] != numbers[B]
    for address, number in numbers.items():
        assert (names.intern(address), names.find(address), names.address_of(number)) == (number, number, address)
    assert names.count() == 2


def test_an_unknown_address_has_no_number(names: Names):
    assert names.find(A) == 0
    assert names.find(IPv6Address("::")) == 0


@pytest.mark.parametrize("text", ["::", "::1", "2001:db8::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"])
def test_a_name_knows_the_sum_of_its_address(text: str, tables: Tables, names: Names):
    address = IPv6Address(text)
    total = sum(np.frombuffer(address.packed, "<u2").astype(int))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert tables.names[names.intern(address)]["sum"] == total


def test_half_of_all_rows_are_named_before_one_finds_no_room(names: Names):
    def name_all(numbers: range) -> None:
        for number in numbers:
            names.intern(IPv6Address(number))

    name_all(range(_SMALL.names))
    with pytest.raises(TableFullError, match="no room for the name"):
        name_all(range(_SMALL.names, 2 * _SMALL.names + 1))
    assert names.address_of(names.find(IPv6Address(7))) == IPv6Address(7)


def test_a_name_that_nobody_uses_dies_in_one_pass_and_is_gone_in_the_next(tables: Tables, names: Names):
    number = names.intern(A)
    end_pass(tables, number)
    assert tables.names[number]["state"] == NameState.ALIVE
    end_pass(tables)
    assert (tables.names[number]["state"], names.find(A)) == (NameState.DYING, number)
    end_pass(tables)
    assert (tables.names[number]["state"], names.find(A)) == (NameState.FREE, 0)


@pytest.mark.parametrize("how", ["used", "interned", "pinned"])
def test_a_dying_name_that_is_needed_lives_on(how: str, tables: Tables, names: Names):
    number = names.intern(A)
    end_pass(tables)
    if how == "interned":
        assert names.intern(A) == number
    elif how == "pinned":
        assert names.pin(A) == number
    end_pass(tables, *([number] if how == "used" else []))
    assert names.find(A) == number


def test_a_pinned_name_stays_until_it_is_released_as_often(tables: Tables, names: Names):
    number = names.pin(A)
    assert names.pin(A) == number
    names.release(number)
    for _ in range(3):
        end_pass(tables)
    assert names.find(A) == number
    names.release(number)
    for _ in range(2):
        end_pass(tables)
    assert names.find(A) == 0


def test_a_withdrawn_name_is_not_reused_before_it_is_released(tables: Tables, names: Names):
    number = names.intern(A)
    marks = np.zeros(len(tables.names), np.uint8)
    assert naming.end_pass(tables, marks) == (1, 0)
    assert naming.end_pass(tables, marks) == (0, 1)
    assert names.find(A) == 0
    assert names.intern(A) != number
    naming.release(tables)
    assert tables.names[number]["state"] == NameState.FREE


def test_what_a_dead_writer_claimed_is_given_up(tables: Tables, names: Names):
    number = names.pin(A)
    tables.names["state"][1:3] = NameState.CLAIMED, NameState.CANDIDATE
    if number in (1, 2):
        number = 0
    rows = np.zeros(8, np.int64)
    assert naming.unfinished(tables, rows) == 2
    naming.take_over(tables, rows[:1])
    assert naming.unfinished(tables, rows) == 1, "somebody has begun that one since: XDP"
    naming.take_over(tables, rows[:1])
    assert naming.count(tables) == np.count_nonzero(tables.names["state"])
    assert not (tables.names["state"] == NameState.CLAIMED).any()
    assert not (tables.names["state"] == NameState.CANDIDATE).any()
    assert not tables.names["pins"].any()
    assert names.find(A) == number


def test_the_last_names_are_for_configuration(tables: Tables, names: Names):
    known = np.uint64(1), np.uint64(1)
    number = naming.intern_client(tables, *known)
    tables.name_count[0] = len(tables.names) - len(tables.names) // Limit.NAMES_KEPT
    assert naming.intern_client(tables, np.uint64(2), np.uint64(1)) == naming.NOBODY
    assert naming.intern_client(tables, *known) == number
    assert names.pin(A) != naming.NOBODY


def test_writers_that_name_the_same_addresses_at_once_agree(tables: Tables, names: Names):
    addresses = [IPv6Address((0x20010DB8 << 96) + number) for number in range(900)]
    names.intern(IPv6Address("::"))  # compiled before the race
    found: list[list[int]] = [[], [], []]
    start = threading.Barrier(3)

    def work(mine: list[int]) -> None:
        own = [tuple(map(np.uint64, words_of(address))) for address in addresses]
        start.wait()
        mine.extend(int(naming.intern(tables, *words)) for words in own)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert 0 not in found[0]
    assert names.count() == len(addresses) + 1
