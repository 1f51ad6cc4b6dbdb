"""Measurements without wires: what they measure is what they say."""

from __future__ import annotations

from perf import size


def test_a_table_takes_all_connections_of_its_capacity_and_then_some():
    found = size.measure(30_000, lookups=10_000)
    assert found.refused == 0
    assert 30_000 < found.most < 45_000
    assert 150 < found.bytes_each < 170
    assert 0 < found.sweep_percent <= 1.01
