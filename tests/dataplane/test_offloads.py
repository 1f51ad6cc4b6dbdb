"""What is switched off, what a driver does not let go, and what of it stands in the record."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path

import pytest

from dataplane.offloads import OFFLOADS, Offload, Offloads, _feature
from tests.small_disk import filled, small_disk
from xdp.writing import UnwritableError

pytestmark = pytest.mark.root
LO = socket.if_nametoindex("lo")


@pytest.fixture
def _fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the driver of the loopback has on and does not switch, as there are NICs with rx-vlan-offload."""
    monkeypatch.setitem(OFFLOADS, "rxvlan", _feature("loopback", "switched off", "cannot be switched off"))  # type: ignore[arg-type]


@pytest.mark.usefixtures("_fixed")
def test_what_a_driver_does_not_let_go_is_complained_about_and_not_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    record = tmp_path / "offloads"
    offloads = Offloads(record)
    assert offloads.complaints() == []
    for _ in range(2):  # as `follow` may have it
        offloads.switch_off(LO, "rxvlan")
        assert offloads.complaints() == ["lo: cannot be switched off"]
        assert not record.exists()
    assert [(one.levelname, one.message) for one in caplog.records] == [("WARNING", "lo: cannot be switched off")]
    offloads.restore([LO + 1])
    offloads.restore([LO], ["gro"])
    assert offloads.complaints() == ["lo: cannot be switched off"]
    offloads.restore([LO])
    assert offloads.complaints() == []


@pytest.mark.usefixtures("_fixed")
def test_what_another_refuses_leaves_the_record_of_what_was_switched(tmp_path: Path) -> None:
    record = tmp_path / "offloads"
    record.write_text(json.dumps({"gro_was_on": [LO], "rxvlan_was_on": [LO]}))
    Offloads(record).switch_off(LO, "rxvlan")
    assert json.loads(record.read_text()) == {"gro_was_on": [LO], "rxvlan_was_on": [], "vlanfilter_was_on": []}


def test_what_is_off_anyway_is_neither_complained_about_nor_recorded(tmp_path: Path) -> None:
    offloads = Offloads(tmp_path / "offloads")
    for which in ("rxvlan", "vlanfilter"):
        offloads.switch_off(LO, which)
    assert offloads.complaints() == []
    assert not (tmp_path / "offloads").exists()


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """An offload that is only said to be there: what it is now, by interface."""
    now: dict[str, bool] = {"lo": True}

    def switch(name: str, *, is_on: bool) -> bool:
        now[name] = is_on
        return True

    monkeypatch.setitem(OFFLOADS, "gro", Offload(now.__getitem__, switch, "off", "not off"))  # type: ignore[arg-type]
    return now


def test_F112_what_cannot_be_noted_is_not_switched_until_it_can(tmp_path: Path, switched: dict[str, bool]) -> None:
    with small_disk(tmp_path / "disk") as disk:
        offloads = Offloads(disk / "offloads")
        with filled(disk):
            for _ in range(2):
                with pytest.raises(UnwritableError, match="offloads: cannot be written: No space left on device"):
                    offloads.switch_off(LO, "gro")
                assert switched["lo"]
        offloads.switch_off(LO, "gro")
        assert not switched["lo"]
        assert json.loads((disk / "offloads").read_text())["gro_was_on"] == [LO]


def test_F112_what_was_switched_is_restored_though_the_note_says_too_much(
    tmp_path: Path, switched: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        record = disk / "offloads"
        record.write_text(json.dumps({"gro_was_on": [LO], "rxvlan_was_on": [LO]}))
        switched["lo"] = False
        offloads = Offloads(record)
        with filled(disk):
            offloads.restore([LO], ["gro"])
        assert switched["lo"]
        assert "offloads: cannot be written" in caplog.text
        offloads.restore([LO], ["gro"])
        assert json.loads(record.read_text())["gro_was_on"] == []


def test_only_those_that_are_wished_for_are_kept_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that does not let it go has what it had in the end, and is not told of when it is needed no more."""
    now = {"a": True, "b": True, "fixed": True}
    wishes = []

    def switch(name: str, *, is_on: bool) -> bool:
        wishes.append((name, is_on))
        now[name] = is_on or name == "fixed"
        return now[name] == is_on

    monkeypatch.setitem(OFFLOADS, "gro", Offload(now.__getitem__, switch, "off", "not off"))  # type: ignore[arg-type]
    monkeypatch.setattr("dataplane.offloads._name_of", {1: "a", 2: "b", 3: "fixed"}.get)
    offloads = Offloads(tmp_path / "offloads")
    offloads.keep_off("gro", [2, 1, 3])
    assert wishes == [("b", False), ("a", False), ("fixed", False), ("fixed", True)]
    assert offloads.complaints() == ["fixed: not off"]
    offloads.keep_off("gro", [1])
    assert now == {"a": False, "b": True, "fixed": True}
    assert offloads.complaints() == []
    assert json.loads((tmp_path / "offloads").read_text())["gro_was_on"] == [1]
    Offloads(tmp_path / "offloads").restore_others([])
    assert now["a"]
    assert not (tmp_path / "offloads").exists()
