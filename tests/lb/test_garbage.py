"""What the garbage collector may still find after a great many objects, and after few."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from lb.garbage import leave_alone, no_collections


class Cycle:
    """Refers to itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    gc.unfreeze()
    yield
    assert gc.isenabled()
    gc.unfreeze()


def test_after_a_small_change_garbage_is_found_whenever_it_was_made():
    before = weakref.ref(Cycle())
    with no_collections():
        meanwhile = weakref.ref(Cycle())
        many = [[] for _ in range(10_000)]  # type: ignore[var-annotated] # where collections are made, one is made
        assert meanwhile() is not None
    del many
    gc.collect()
    assert (before(), meanwhile()) == (None, None)


def test_a_great_many_objects_are_never_looked_at_and_go_with_the_last_reference():
    with no_collections():
        made: list[list[object]] = [[] for _ in range(200_000)]
    frozen = gc.get_freeze_count()
    assert frozen > len(made)
    is_there = weakref.ref(kept := Cycle())
    del kept, made
    assert gc.get_freeze_count() <= frozen - 200_000
    gc.collect()
    assert is_there() is None


def test_what_is_left_alone_is_never_looked_at_and_what_was_garbage_has_gone():
    garbage, kept = weakref.ref(Cycle()), Cycle()
    leave_alone()
    assert garbage() is None
    assert not any(each is kept for each in gc.get_objects())
    is_there = weakref.ref(made := Cycle())
    del made
    gc.collect()
    assert is_there() is None
