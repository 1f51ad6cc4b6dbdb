"""What `status` is told of connections that found no room."""

from __future__ import annotations

import pytest

from dataplane.settings import Settings
from dataplane.shortages import Shortages
from tests.small_node import SMALL
from xdp.schema import Reason
from xdp.tables import Tables

SETTINGS = Settings("node", ("services.yaml",), ("eth0",), capacity=1234)


@pytest.mark.parametrize("counters", ["worker_counters", "xdp_counters"])
@pytest.mark.parametrize(
    ("reason", "what", "words"),
    [
        (Reason.TABLE_FULL, "connections", "a --capacity larger than 1,234"),
        (Reason.NAMES_FULL, "names", "over IPv6 found no room for the name of their client"),
        (Reason.NO_SNAT_PORT, "masquerading", "among 61000-65535, or 600-1023 for privileged ones"),
    ],
)
def test_what_there_was_no_room_for_is_told_once(counters: str, reason: Reason, what: str, words: str):
    tables = Tables.in_memory(SMALL)
    packets = getattr(tables, counters)["packets"]
    packets[0, reason] = 7  # of a daemon before
    shortages = Shortages(SETTINGS, tables)
    assert list(shortages.news()) == []
    packets[0, reason] += 2
    packets[1, reason] += 3
    packets[0, Reason.NO_ENDPOINT] += 9
    ((told, text),) = shortages.news()
    assert told == what
    assert text.startswith("5 new connections ")
    assert words in text
    assert list(shortages.news()) == []


def test_hosts_and_routes_that_found_no_row_are_told_once():
    refused = 5  # before
    shortages = Shortages(SETTINGS, Tables.in_memory(SMALL), lambda: refused)
    assert list(shortages.news()) == []
    refused = 8
    ((told, text),) = shortages.news()
    assert told == "next hops"
    assert text.startswith("3 times a host or a route found no room")
    assert list(shortages.news()) == []
