"""A worker whose loop ends in an exception says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from dataplane.context import new_node
from dataplane.crew import Queue
from dataplane.engine import Engine
from dataplane.hops_compiled import new_hops
from dataplane.loop import new_ports
from dataplane.netdev import Interface
from dataplane.settings import Settings
from dataplane.worker import Worker
from tests.small_node import SMALL
from xdp.clock import ManualClock
from xdp.tables import Tables

NO_POOL = None  # which is what the loop cannot be compiled for


@pytest.fixture
def tables() -> Tables:
    return Tables.in_memory(SMALL)


@pytest.fixture
def worker(tables) -> Iterator[Worker]:
    node = new_node(tables, new_hops(tables, 1))
    bell = os.eventfd(0)
    sock = SimpleNamespace(fd=bell, queue=None)
    worker = Worker(node, 0, new_ports(), 0, sock, NO_POOL, ManualClock())
    yield worker
    worker.stop()
    os.close(bell)


def test_a_loop_that_ends_in_an_exception_is_told_in_status(tables, worker):
    engine = Engine(Settings("n", (), ()), SimpleNamespace(tables=tables), ManualClock())
    engine.queues = [Queue(Interface("eth0", 2, b"", 1500, is_up=True), 0)]
    engine._workers = [worker]
    tables.heartbeats[0] = 1
    assert engine.is_alive
    worker.start()
    worker._thread.join()
    assert engine.stalled() == ["worker of eth0 queue 0: ended by TypeError; restart the daemon"]
    assert not engine.is_alive
    assert tables.heartbeats[0] == 0
    with pytest.raises(type(worker.failure)):
        _ = worker.is_beating
