"""Measurements without wires: what they measure is what they say."""

from __future__ import annotations

import pytest

from perf import cost, floor, front, size, wake


def test_a_table_takes_all_connections_of_its_capacity_and_then_some():
    found = size.measure(30_000, lookups=10_000)
    assert found.refused == 0
    assert 30_000 < found.most < 45_000
    assert 150 < found.bytes_each < 170
    assert 0 < found.sweep_percent <= 1.01


@pytest.mark.root
@pytest.mark.bpf
def test_programs_and_memory_are_measured_by_packets_that_are_what_they_should_be():
    """Each raises AssertionError where counters do not say what it has sent."""
    assert len(floor.measure(1000, 4, in_turn=True, trials=1).nets_ns) == 1
    found = cost.measure(1000, front.Kind(is_reply=True), trials=1, capacity=1000)
    assert (found.flows, found.protocol, found.direction) == (1000, "UDP", "reply")
    assert found.bare_ns > 0


def test_a_thread_that_sleeps_is_woken_as_often_as_asked_and_takes_time_for_it():
    took_us = wake.measure(40, every_us=200)
    assert len(took_us) == 40
    assert took_us.min() > 0.1
