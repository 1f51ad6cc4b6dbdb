"""Who is waited for before a slot is used again: workers that look at records, and no others."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from conntrack import grace
from conntrack.table import FlowTable
from xdp.clock import ManualClock
from xdp.schema import Limit
from xdp.tables import Capacity, Tables

WORKER = 3


@pytest.fixture
def tables() -> Tables:
    tables = Tables.in_memory(Capacity(connections=20, frontends=4, services=2, maglev_slots=16, endpoints=2))
    tables.heartbeats[WORKER] = 1
    return tables


@pytest.fixture
def turns() -> np.ndarray:
    return np.zeros(Limit.MAX_WORKERS, np.uint64)


def test_a_worker_that_is_in_is_waited_for_until_it_turns(tables, turns):
    grace.enter(tables, WORKER)
    grace.readers(tables, turns)
    assert np.flatnonzero(turns).tolist() == [WORKER]
    assert not grace.have_turned(tables, turns)
    grace.turn(tables, WORKER)
    assert grace.have_turned(tables, turns)


def test_a_worker_that_leaves_and_comes_back_has_turned(tables, turns):
    grace.enter(tables, WORKER)
    grace.readers(tables, turns)
    grace.leave(tables, WORKER)
    assert grace.have_turned(tables, turns)
    grace.enter(tables, WORKER)
    assert grace.have_turned(tables, turns)


def test_a_worker_that_sleeps_is_not_waited_for(tables, turns):
    grace.enter(tables, WORKER)
    grace.turn(tables, WORKER)
    grace.leave(tables, WORKER)
    grace.readers(tables, turns)
    assert not turns.any()


def test_a_worker_that_ended_in_a_turn_is_not_waited_for(tables, turns):
    grace.enter(tables, WORKER)
    grace.readers(tables, turns)
    tables.heartbeats[WORKER] = 0
    assert grace.have_turned(tables, turns)
    grace.readers(tables, turns)
    assert not turns.any()


def test_the_table_waits_for_those_who_are_in_alone(tables):
    """The first call returns although nobody turns; the second when the worker does, and not before."""
    table = FlowTable(tables, ManualClock())
    table.wait_for_grace()
    grace.enter(tables, WORKER)
    is_over = threading.Event()
    waiter = threading.Thread(target=lambda: (table.wait_for_grace(), is_over.set()))
    waiter.start()
    assert not is_over.wait(0.05)
    while waiter.is_alive():  # it may not have looked yet
        grace.turn(tables, WORKER)
    waiter.join()
    assert is_over.is_set()
