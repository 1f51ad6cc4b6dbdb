"""Who waits in a packet loop, and who goes when there is no room, whatever becomes of what frames wait for."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane import holding
from dataplane.holding import HELD, ROOM
from xdp.jit import compiled
from xdp.schema import Reason

ALONE, AWAITED = int(Reason.FRAGMENT_ALONE), int(Reason.NO_NEXT_HOP)


@compiled
def _place_for(held: Any, reason: Any) -> Any:
    return holding.place_for(held, reason)


@compiled
def _put(held: Any, place: Any, reason: Any, since: Any) -> Any:
    holding.put(held, place, reason, since)


def hold(held: holding.Held, reason: int, since: int) -> int:
    """Have one more frame wait; return its place."""
    place = int(_place_for(held, np.int64(reason)))
    _put(held, np.int64(place), np.int64(reason), np.uint32(since))
    return place


def test_of_those_that_wait_for_the_same_the_first_make_room():
    held = holding.new_held()
    assert [hold(held, AWAITED, number) for number in range(HELD)] == [*range(HELD)]
    assert [hold(held, ALONE, number) for number in range(HELD)] == [*range(HELD, ROOM)]
    assert [hold(held, AWAITED, HELD + number) for number in range(3)] == [0, 1, 2]
    assert [hold(held, ALONE, HELD + number) for number in range(2)] == [HELD, HELD + 1]
    assert int(held.count[0]) == ROOM


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([ALONE, AWAITED]), st.integers(0, ROOM - 1), st.booleans()), max_size=400))
def test_a_place_is_one_of_them_also_where_frames_come_to_wait_for_something_else(steps):
    held = holding.new_held()
    for since, (reason, other, changes) in enumerate(steps):
        count = int(held.count[0])
        assert 0 <= hold(held, reason, since) < ROOM
        assert count <= int(held.count[0]) <= min(count + 1, ROOM)
        if changes and other < int(held.count[0]):
            held.reason[other] = ALONE if held.reason[other] == AWAITED else AWAITED


def test_where_all_wait_for_the_other_thing_somebody_goes():
    held = holding.new_held()
    for number in range(ROOM):
        hold(held, ALONE if number < HELD else AWAITED, number)
    held.reason[:] = ALONE
    assert 0 <= hold(held, AWAITED, ROOM) < ROOM
    assert int(held.count[0]) == ROOM
