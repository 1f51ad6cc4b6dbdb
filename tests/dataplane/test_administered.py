"""What an operator has said about endpoints, and the file that keeps it."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from dataplane.administered import keep, kept
from lb.model import AdminState
from xdp.writing import UnwritableError

A, B = (ip_address("10.0.0.1"), 8080), (ip_address("2001:db8::1"), 8080)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "node.administered"


def test_L_a_successor_knows_what_was_said(path):
    said = {A: AdminState.DRAIN, B: AdminState.MAINT}
    keep(path, said)
    assert kept(path) == said
    keep(path, {A: AdminState.DRAIN})
    assert kept(path) == {A: AdminState.DRAIN}


def test_L_where_everybody_is_ready_there_is_no_file(path):
    keep(path, {A: AdminState.DRAIN})
    keep(path, {})
    assert not path.exists()
    assert kept(path) == {}
    keep(path, {})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x:1": "drain"}', '{"10.0.0.1:1": "off"}', '{"10.0.0.1:1": 7}'])
def test_a_file_that_says_nothing_leaves_everybody_ready_and_is_told_of(path, text, caplog):
    path.write_text(text)
    assert kept(path) == {}
    assert "not read, every endpoint is ready" in caplog.text


def test_what_cannot_be_kept_is_an_error(tmp_path):
    with pytest.raises(UnwritableError, match="nowhere"):
        keep(tmp_path / "nowhere" / "node.administered", {A: AdminState.DRAIN})
