"""The ingress filter, packet by packet: what it drops is just what the packet path takes.

What becomes of packets is tests/scenarios; here, what the sets hold and what is left.
"""

from __future__ import annotations

import json
import subprocess

import pytest

from dataplane import ingress
from dataplane.ingress import Filter, Places
from perf import echo
from tests.packets import CLIENT, DNS_VIP, ENDPOINT, OTHER_ENDPOINT, VIP
from xdp.errors import AttachError
from xdp.schema import Protocol

pytestmark = pytest.mark.root

WEB, DNS = (*VIP, Protocol.TCP), (*DNS_VIP, Protocol.UDP)
SERVER, OTHER = (*ENDPOINT, Protocol.TCP), (*OTHER_ENDPOINT, Protocol.UDP)
BEFORE = Places(frozenset({WEB, DNS}), frozenset(), frozenset({SERVER}))
AFTER = Places(frozenset({DNS}), frozenset({WEB}), frozenset({SERVER, OTHER}))


@pytest.fixture
def record(tmp_path):
    with echo.own_network():
        echo.veth_pair("a0", "a1")
        yield tmp_path / "node.filter"


def sets():
    """Return the elements of the sets, by name."""
    listed = json.loads(subprocess.run(["nft", "-j", "list", "ruleset"], check=True, capture_output=True).stdout)
    found = [item["set"] for item in listed["nftables"] if "set" in item]
    return {one["name"]: len(one.get("elem", [])) for one in found}


def tables():
    return subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout.splitlines()


def test_a_change_is_what_differs(record):
    filter_ = Filter("node", record)
    filter_.start(BEFORE, ["a0", "a1"])
    assert sets() == {"vips": 2, "frontends": 2, "retired": 0, "endpoints": 1, "quoted": 1}
    filter_.update(AFTER)
    assert sets() == {"vips": 1, "frontends": 1, "retired": 1, "endpoints": 2, "quoted": 2}
    filter_.update(Places())
    assert set(sets().values()) == {0}


def test_a_start_takes_the_place_of_what_was_left(record):
    Filter("node", record).start(BEFORE, ["a0"])
    Filter("node", record).start(Places(), ["a0", "a1"])
    assert tables() == ["table netdev turnout_node"]
    assert set(sets().values()) == {0}


def test_what_a_record_tells_of_is_removed_once(record):
    Filter("a-b_c", record).start(BEFORE, ["a0", "a1"])
    assert tables() == ["table netdev turnout_a-b_c"]
    assert ingress.remove(record) == ["a0", "a1"]
    assert tables() == []
    assert not record.exists()
    assert ingress.remove(record) is None


def test_other_tables_are_left_alone(record):
    subprocess.run(["nft", "add", "table", "netdev", "mine"], check=True)
    filter_ = Filter("node", record)
    filter_.start(BEFORE, ["a0"])
    filter_.remove()
    assert tables() == ["table netdev mine"]


def test_a_filter_that_was_taken_away_is_missed(record):
    filter_ = Filter("node", record)
    filter_.start(BEFORE, ["a0"])
    assert filter_.is_there()
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    assert not filter_.is_there()
    with pytest.raises(AttachError, match="nftables refuses the ingress filter"):
        filter_.update(AFTER)
    filter_.start(AFTER, ["a0"])
    assert sets()["retired"] == 1


def test_ten_thousand_places_are_one_transaction(record):
    many = frozenset({(CLIENT[0] + n, 80, int(Protocol.TCP)) for n in range(10_000)})
    filter_ = Filter("node", record)
    filter_.start(Places(many, frozenset(), many), ["a0"])
    assert sets() == {"vips": 10_000, "frontends": 10_000, "retired": 0, "endpoints": 10_000, "quoted": 10_000}


def test_what_this_kernel_needs_is_here():
    ingress.need_nft()


def test_without_interfaces_there_is_no_table(record):
    filter_ = Filter("node", record)
    filter_.start(BEFORE, ["a0"])
    filter_.start(BEFORE, [])
    assert tables() == []
    assert not record.exists()
