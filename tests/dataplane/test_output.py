"""Answers as people read them."""

from __future__ import annotations

import io
import json

import pytest

from dataplane.output import as_json, bar, counted, duration, printable, show_table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (12, "12 s"), (125, "2 min 5 s"), (3600, "1 h"), (93784, "1 d 2 h"), (86400 * 400, "400 d")],
)
def test_a_span_of_time_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


def test_one_thing_is_not_told_in_the_plural():
    assert [counted(count, "Service") for count in (0, 1, 2000)] == ["0 Services", "1 Service", "2,000 Services"]


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


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("make", [Terminal, io.StringIO], ids=["terminal", "pipe"])
@pytest.mark.parametrize("columns", [80, 20])
@pytest.mark.parametrize("kind", ["flows", "flows-wide", "endpoints"])
def test_a_row_is_a_line_and_no_cell_is_cut_however_narrow_the_terminal_is(monkeypatch, kind, columns, make):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    client, endpoint = "[2001:db8:1234:5678:9abc:def0:1234:5678]:53430", "[2001:db8:1234:5678:9abc:def0:1234:9]:8080"
    counts = {"original": 123_456_789, "reply": 123_456_789}
    row = {"protocol": "TCP", "client": client, "frontend": "[fd96::1]:80", "endpoint": endpoint, "service": "shop/a:b"}
    row |= {"state": "established", "packets": counts, "bytes": counts, "idle_s": 0.1, "expires_s": 1e6, "snat": client}
    stream = make()
    show_table(kind, [{**row, "offloaded": True}, {**row, "offloaded": False}], stream)
    head, *lines = stream.getvalue().splitlines()
    assert "CLIENT" in head
    assert len(lines) == 2
    for line in lines:
        assert {client, endpoint, "shop/a:b"} <= set(line.split())
        assert line == line.rstrip()


def test_columns_stand_below_their_headings():
    stream = io.StringIO()
    show_table("reasons", {"NEW_FLOW": 3, "宽": 1234}, stream)
    assert stream.getvalue() == "REASON    PACKETS\nNEW_FLOW        3\n宽           1234\n"


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
