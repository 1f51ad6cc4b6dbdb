"""Grace periods are waited for."""

from __future__ import annotations

import os
import statistics
import struct
import time
from collections.abc import Callable

import pytest

from xdp import kernel, rcu

pytestmark = [pytest.mark.root, pytest.mark.bpf]


def seconds_of(call: Callable[[], None]) -> float:
    """Return the median of some runs."""
    times = []
    for _ in range(9):
        before = time.monotonic()
        call()
        times.append(time.monotonic() - before)
    return statistics.median(times)


def test_a_grace_period_is_waited_for_with_and_without_membarrier():
    zero, table = struct.pack("=I", 0), kernel.map_create("table", 4, 8, 1)
    not_waiting = seconds_of(lambda: kernel.map_update(table, zero, bytes(8)))
    for grace in (rcu.wait_for_grace, rcu.map_of_maps_grace()):
        assert seconds_of(grace) > 20 * not_waiting
    os.close(table)
