"""Tables in a file: what one process writes, its successor finds."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from tests.small_disk import small_disk
from tests.small_node import SMALL
from xdp import files, removing
from xdp.errors import LayoutError, NotRunningError
from xdp.tables import Capacity


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tables" / "node"


def test_what_is_written_is_there_for_the_next_one(folder):
    with files.open_or_create(folder, SMALL) as first:
        assert first.is_new
        for name, (dtype, rows) in SMALL.rows().items():
            assert not getattr(first.tables, name).view(np.uint8).any(), name
            assert getattr(first.tables, name).nbytes == dtype.itemsize * rows
        first.tables.flows[-1]["packets"] = 7
        first.tables.worker_counters[3]["packets"][5] = 9
    second = files.open_or_create(folder, SMALL)
    assert not second.is_new
    assert second.tables.flows[-1]["packets"] == 7
    assert second.tables.worker_counters[3]["packets"][5] == 9


def test_both_see_the_same_bytes(folder):
    one, two = files.open_or_create(folder, SMALL), files.open_tables(folder, read_only=True)
    one.tables.heartbeats[0] = 12
    assert two.tables.heartbeats[0] == 12
    with pytest.raises(ValueError, match="read-only"):
        two.tables.heartbeats[0] = 13


def test_another_capacity_or_layout_is_refused(folder):
    files.open_or_create(folder, SMALL)
    with pytest.raises(LayoutError, match=r"capacity.connections: 200, now 1000000"):
        files.open_or_create(folder, Capacity())
    stored = json.loads((folder / "layout").read_text())
    del stored["structs"]["flow"]["state"]
    (folder / "layout").write_text(json.dumps(stored))
    with pytest.raises(LayoutError, match=r"structs.flow.state: absent"):
        files.open_or_create(folder, SMALL)
    (folder / "layout").write_text("[]")
    with pytest.raises(LayoutError, match="holds no description"):
        files.open_or_create(folder, SMALL)


def test_a_file_that_was_cut_short_is_refused(folder):
    files.open_or_create(folder, SMALL)
    os.truncate(folder / "tables", 4096)
    with pytest.raises(LayoutError, match="cut short"):
        files.open_or_create(folder, SMALL)


def test_tables_of_an_earlier_boot_are_made_anew(folder):
    files.open_or_create(folder, SMALL).tables.flows[0]["packets"] = 1
    stored = json.loads((folder / "layout").read_text())
    (folder / "layout").write_text(json.dumps({**stored, "boot": "another"}))
    again = files.open_or_create(folder, SMALL)
    assert again.is_new
    assert again.tables.flows[0]["packets"] == 0


def test_what_an_interrupted_creation_left_is_made_anew(folder):
    folder.mkdir(parents=True)
    (folder / "tables").write_bytes(b"x" * 100)
    with pytest.raises(NotRunningError):
        files.open_tables(folder)
    assert files.open_or_create(folder, SMALL).is_new


def test_remove_leaves_nothing_and_says_whether_there_was_anything(folder):
    assert not removing.files(folder)
    files.open_or_create(folder, SMALL)
    assert removing.files(folder)
    assert not folder.exists()


@pytest.mark.root
def test_F112_a_full_file_system_is_told_and_leaves_nothing(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        with pytest.raises(files.NoRoomError, match=r"no room for \d+ MB of tables: No space left .*; free some space"):
            files.open_or_create(disk / "node", SMALL)
        assert list(disk.iterdir()) == []
