"""What an operator has said about endpoints, and the file that keeps it."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from dataplane.administered import keep, kept, next_deadline_s, overdue, read_said
from lb.model import AdminState, Said
from xdp.errors import UsageError
from xdp.writing import UnwritableError

DRAIN, MAINT, READY = Said(AdminState.DRAIN), Said(AdminState.MAINT), Said(AdminState.READY)
UNTIL = Said(AdminState.DRAIN, 1234.567)
A, B = (ip_address("10.0.0.1"), 8080), (ip_address("2001:db8::1"), 8080)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "node.administered"


def test_L_a_successor_knows_what_was_said(path):
    for said in ({A: DRAIN, B: MAINT}, {A: UNTIL, B: MAINT}, {A: DRAIN}):
        keep(path, said)
        assert kept(path) == said


def test_L_where_everybody_is_ready_there_is_no_file(path):
    keep(path, {A: DRAIN})
    keep(path, {})
    assert not path.exists()
    assert kept(path) == {}
    keep(path, {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"x:1": "drain"}',
        '{"10.0.0.1:1": "off"}',
        '{"10.0.0.1:1": 7}',
        '{"10.0.0.1:1": "drain until soon"}',
    ],
)
def test_a_file_that_says_nothing_leaves_everybody_ready_and_is_told_of(path, text, caplog):
    path.write_text(text)
    assert kept(path) == {}
    assert "not read, every endpoint is ready" in caplog.text


def test_what_cannot_be_kept_is_an_error(tmp_path):
    with pytest.raises(UnwritableError, match="nowhere"):
        keep(tmp_path / "nowhere" / "node.administered", {A: DRAIN})


def test_L_a_drain_may_have_a_deadline_from_now_on():
    assert read_said("drain", 60, 1000.5) == Said(AdminState.DRAIN, 1060.5)
    assert [read_said(state, None, 1000.5) for state in ("drain", "maint", "ready")] == [DRAIN, MAINT, READY]


@pytest.mark.faults(87)
@pytest.mark.parametrize(
    ("state", "deadline_s", "message"),
    [
        ("off", None, "'off' is no state; known are ready, drain, maint"),
        ("maint", 60, "a deadline for maint; only a drain has one"),
        ("ready", 60, "a deadline for ready; only a drain has one"),
        ("drain", 0, "0 s is no deadline; expected 1 to 31622400, or none"),
        ("drain", -1, "-1 s is no deadline; expected 1 to 31622400, or none"),
        ("drain", 10**400, "s is no deadline; expected 1 to 31622400, or none"),
    ],
)
def test_what_cannot_be_said_is_refused(state, deadline_s, message):
    with pytest.raises(UsageError, match=message):
        read_said(state, deadline_s, 0.0)


def test_drains_are_over_at_their_deadline_one_after_the_other():
    later = Said(AdminState.DRAIN, 2000.0)
    said = {A: UNTIL, B: later, (A[0], 1): MAINT, (A[0], 2): DRAIN}
    assert next_deadline_s(said) == UNTIL.deadline_s
    assert overdue(said, 1234.0) == {}
    assert overdue(said, 1234.567) == {A: UNTIL}
    assert overdue(said, 2000.0) == {A: UNTIL, B: later}
    assert next_deadline_s({A: DRAIN}) is None
