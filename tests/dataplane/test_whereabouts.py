"""Which Pod was seen where last, as a file tells."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from dataplane import whereabouts
from dataplane.whereabouts import Whereabouts
from lb.incarnations import Seat
from xdp.writing import UnwritableError

V4: Seat = ((ip_address("10.0.0.1"), 80), "TCP")
V6: Seat = ((ip_address("2001:db8::1"), 53), "UDP")


def unasked() -> dict[Seat, str]:
    raise AssertionError("it is not to be written anew")


def test_what_was_added_last_counts(tmp_path):
    known = Whereabouts(tmp_path / "node.pods")
    assert known.read() == {}
    known.add({}, unasked)
    assert not (tmp_path / "node.pods").exists()
    known.add({V4: "first", V6: "a \n name"}, unasked)
    known.add({V4: "second"}, unasked)
    assert Whereabouts(tmp_path / "node.pods").read() == {V4: "second", V6: "a \n name"}
    known.forget()
    known.forget()
    assert Whereabouts(tmp_path / "node.pods").read() == {}


def test_half_a_line_is_left_out_and_more_are_told(tmp_path, caplog):
    path = tmp_path / "node.pods"
    Whereabouts(path).add({V4: "first"}, unasked)
    whole = path.read_text()
    for half in (whole[:20], whole[:3]):
        path.write_text(whole + half)
        assert Whereabouts(path).read() == {V4: "first"}
        assert not caplog.messages
    broken = Whereabouts(path)
    broken.read()
    broken.add({V6: "other"}, lambda: {V4: "first", V6: "other"})  # not behind half a line
    assert Whereabouts(path).read() == {V4: "first", V6: "other"}
    path.write_text(whole + "[]\n[1, 2, 3, 4]\nnull\n")
    assert Whereabouts(path).read() == {V4: "first"}
    assert "3 lines not read" in caplog.text
    path.write_bytes(b"\xff\xfe")
    assert Whereabouts(path).read() == {}
    assert "not read" in caplog.text


def test_it_is_written_anew_when_most_of_it_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(whereabouts, "_FEW", 3)
    path = tmp_path / "node.pods"
    known = Whereabouts(path)
    for number in range(3):
        known.add({V4: str(number)}, unasked)
    known.add({V4: "3"}, lambda: {V4: "3", V6: "other"})
    assert len(path.read_text().splitlines()) == 2
    for number in range(4, 9):
        known.add({V4: str(number)}, unasked)
    assert Whereabouts(path).read() == {V4: "8", V6: "other"}
    successor = Whereabouts(path)
    successor.read()
    successor.add({V4: "9"}, lambda: {V4: "9"})
    assert len(path.read_text().splitlines()) == 1


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    with pytest.raises(UnwritableError, match="No such file"):
        Whereabouts(tmp_path / "absent" / "node.pods").add({V4: "first"}, unasked)


def test_what_could_not_be_written_is_made_good_with_the_next_change(tmp_path):
    folder = tmp_path / "folder"
    known = Whereabouts(folder / "node.pods")
    with pytest.raises(UnwritableError, match="No such file"):
        known.add({V4: "first"}, unasked)
    folder.mkdir()
    known.add({V6: "other"}, lambda: {V4: "first", V6: "other"})
    assert Whereabouts(folder / "node.pods").read() == {V4: "first", V6: "other"}
