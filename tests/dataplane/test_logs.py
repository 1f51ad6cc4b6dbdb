"""Messages: a line each, for people or machines, and not a thousand times the same."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from dataplane import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text_has_the_time_and_names_what_is_more_than_information(stream):
    logs.configure("text", stream)
    logging.getLogger("dataplane.node").info("serving %d Services", 3)
    logging.getLogger("dataplane.node").warning("eth0: down")
    assert re.fullmatch(r"\d\d:\d\d:\d\d serving 3 Services\n\d\d:\d\d:\d\d warning: eth0: down\n", stream.getvalue())


def test_json_is_an_object_a_line_also_with_a_traceback(stream):
    logs.configure("json", stream)
    try:
        raise KeyError("oops")
    except KeyError:
        logging.getLogger("dataplane").exception("failed\nbadly")
    entry = json.loads(stream.getvalue())
    assert (entry["level"], entry["logger"], entry["message"]) == ("error", "dataplane", "failed\nbadly")
    assert "KeyError" in entry["traceback"]


def test_debug_is_for_those_who_ask(stream):
    logs.configure("text", stream)
    logging.getLogger("dataplane").debug("hidden")
    logs.configure("text", stream, debug=True)
    logging.getLogger("dataplane").debug("shown")
    assert "hidden" not in stream.getvalue()
    assert "debug: shown" in stream.getvalue()


@pytest.mark.faults(86)
def test_a_line_that_repeats_itself_is_held_back_and_counted():
    now = [0.0]
    repeats = logs.Repeats(lambda: now[0])

    def passes(text: str) -> str | None:
        record = logging.LogRecord("x", logging.WARNING, "", 0, text, (), None)
        return record.getMessage() if repeats.filter(record) else None

    assert [passes("table full") for _ in range(5)] == ["table full"] * 3 + [None] * 2
    assert passes("something else") == "something else"
    now[0] = 61
    assert passes("table full") == "table full (2 more of these were held back)"
    assert passes("table full") == "table full"
