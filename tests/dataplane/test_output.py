"""Answers as people read them."""

from __future__ import annotations

import io
import json

import pytest

from dataplane.output import as_json, bar, duration, printable, show_table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (12, "12 s"), (125, "2 min 5 s"), (3600, "1 h"), (93784, "1 d 2 h"), (86400 * 400, "400 d")],
)
def test_a_span_of_time_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("used", "capacity", "text"),
    [
        (0, 10, "[....................] 0 of 10 (0.0%)"),
        (5, 10, "[##########..........] 5 of 10 (50.0%)"),
        (12, 10, "[####################] 12 of 10 (120.0%)"),
        (0, 0, "[....................] 0 of 0 (0.0%)"),
    ],
)
def test_a_bar_shows_how_full_something_is(used, capacity, text):
    assert bar(used, capacity) == text


def test_what_a_terminal_would_obey_is_spelled_out():
    assert printable("a\x1b[2J\r\n\u202eb\u00e9") == r"a\x1b[2J\r\n\u202ebé"


@pytest.mark.parametrize("data", [[], [1, {"a": [2]}], {"a": {"b": None}}])
def test_json_comes_back_as_it_was(data):
    assert json.loads(as_json(data)) == data


def test_a_table_of_anything_has_a_column_for_each_field():
    stream = io.StringIO()
    show_table(
        "nexthops",
        [{"is_up": True, "mac": None, "of": ["a", "b"]}, {"mac": "02:00", "count": {"x": 1, "y": 2}}],
        stream,
    )
    assert [line.split() for line in stream.getvalue().splitlines()] == [
        ["IS-UP", "MAC", "OF", "COUNT"],
        ["yes", "-", "a,b"],
        ["02:00", "1/2"],
    ]
