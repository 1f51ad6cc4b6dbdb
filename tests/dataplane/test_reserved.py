"""Ports that the kernel is not to give away: reserved in a namespace, and given back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane import reserved
from dataplane.settings import PortRange
from perf.world import World
from xdp import sysctl

SYSCTL = "net/ipv4/ip_local_reserved_ports"


@given(st.sets(st.integers(1, 65535), max_size=40))
def test_ports_as_text_and_back(ports):
    assert reserved.read_ports(reserved.as_text(ports)) == ports


def test_runs_of_ports_are_written_as_ranges():
    assert reserved.as_text({1, 2, 3, 7, 9, 10}) == "1-3,7,9-10"
    assert reserved.as_text(()) == ""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(f"tr{os.getpid() % 100_000}", ["client"]) as world:
        yield world


@pytest.fixture
def inside(world: World) -> Iterator[None]:
    with world.node.entered():
        sysctl.write(SYSCTL, "")
        yield


@pytest.mark.root
def test_C12_ports_are_reserved_beside_others_and_only_they_are_given_back(inside: None, tmp_path: Path):
    record = tmp_path / "node.ports"
    sysctl.write(SYSCTL, "8080,61005-61009")
    reserved.reserve(PortRange(61000, 65535), record)
    assert sysctl.read(SYSCTL) == "8080,61000-65535"
    sysctl.write(SYSCTL, "8080,9090,61000-65535")  # somebody else's business
    reserved.give_back(record)
    assert sysctl.read(SYSCTL) == "8080,9090,61005-61009"
    assert not record.exists()
    reserved.give_back(record)
    assert sysctl.read(SYSCTL) == "8080,9090,61005-61009"


@pytest.mark.root
def test_C12_a_successor_with_other_ports_gives_those_of_its_predecessor_back(inside: None, tmp_path: Path):
    record = tmp_path / "node.ports"
    for ports, text in ((PortRange(61000, 61099), "61000-61099"), (PortRange(62000, 62099), "62000-62099")):
        reserved.reserve(ports, record)
        assert sysctl.read(SYSCTL) == text
    reserved.give_back(record)
    assert sysctl.read(SYSCTL) == ""


@pytest.mark.root
def test_C12_nodes_that_share_ports_give_them_back_when_the_last_has_no_use_for_them(inside: None, tmp_path: Path):
    first, second, third = (tmp_path / f"{name}.ports" for name in ("first", "second", "third"))
    sysctl.write(SYSCTL, "8080,61005-61009")
    reserved.reserve(PortRange(61000, 61099), first)
    reserved.reserve(PortRange(61050, 61199), second)
    reserved.reserve(PortRange(61000, 61099), first)  # a restart
    reserved.give_back(first)
    assert sysctl.read(SYSCTL) == "8080,61005-61009,61050-61199"
    reserved.reserve(PortRange(61190, 61199), third)
    reserved.give_back(second)
    assert sysctl.read(SYSCTL) == "8080,61005-61009,61190-61199"
    reserved.give_back(third)
    assert sysctl.read(SYSCTL) == "8080,61005-61009"


@pytest.mark.root
def test_C12_a_node_of_another_network_namespace_has_no_part_in_them(inside: None, world: World, tmp_path: Path):
    here, there = tmp_path / "here.ports", tmp_path / "there.ports"
    reserved.reserve(PortRange(61000, 61099), here)
    with world["client"].entered():
        reserved.reserve(PortRange(61000, 61099), there)
    reserved.give_back(here)
    assert sysctl.read(SYSCTL) == ""
    with world["client"].entered():
        assert sysctl.read(SYSCTL) == "61000-61099"
        reserved.give_back(there)
        assert sysctl.read(SYSCTL) == ""


@pytest.mark.root
def test_C12_what_a_node_reserved_in_another_network_namespace_is_not_taken_back_here(
    inside: None, world: World, tmp_path: Path
):
    record = tmp_path / "node.ports"
    with world["client"].entered():
        reserved.reserve(PortRange(61000, 61099), record)
    sysctl.write(SYSCTL, "61000-61099")
    reserved.give_back(record)
    assert sysctl.read(SYSCTL) == "61000-61099"
    assert not record.exists()


def test_C12_what_cannot_be_reserved_is_said_and_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(reserved, "_SYSCTL", "net/ipv4/no_such_thing")
    reserved.reserve(PortRange(61000, 65535), tmp_path / "node.ports")
    assert "ports 61000-65535 are not reserved for masquerading: net.ipv4.no_such_thing" in caplog.text
    assert list(tmp_path.iterdir()) == []
