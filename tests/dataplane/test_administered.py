"""What an operator has said about endpoints, and the file that keeps it."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from dataplane.administered import Administered
from lb.model import AdminState

A, B = (ip_address("10.0.0.1"), 8080), (ip_address("2001:db8::1"), 8080)
DRAIN, MAINT, READY = AdminState.DRAIN, AdminState.MAINT, AdminState.READY


@pytest.fixture
def path(tmp_path):
    return tmp_path / "node.administered"


def test_L_a_successor_knows_what_was_said(path):
    said = Administered(path)
    said.say([A, B], DRAIN)
    said.say([B], MAINT)
    assert Administered(path).states == said.states == {A: DRAIN, B: MAINT}


def test_L_who_is_ready_or_gone_is_forgotten_and_so_is_the_file(path):
    said = Administered(path)
    said.say([A, B], DRAIN)
    said.retain([A])
    assert Administered(path).states == {A: DRAIN}
    said.say([A], READY)
    assert not said.states
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"10.0.0.1": "drain"}', '{"x:1": "drain"}', '{"10.0.0.1:1": "off"}'])
def test_a_file_that_says_nothing_leaves_everybody_ready_and_is_told_of(path, text, caplog):
    path.write_text(text)
    assert not Administered(path).states
    assert ("not read" in caplog.text) == (text != '{"10.0.0.1": "drain"}')


def test_what_cannot_be_kept_changes_nothing(tmp_path):
    said = Administered(tmp_path / "nowhere" / "node.administered")
    with pytest.raises(OSError, match="nowhere"):
        said.say([A], DRAIN)
    assert not said.states
