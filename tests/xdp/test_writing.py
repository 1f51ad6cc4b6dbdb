"""Files are there whole or not at all, and one that cannot be written is told of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_disk import filled, remount, small_disk
from xdp.errors import MissingFeatureError
from xdp.writing import UnwritableError, explained, remove, write


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def test_a_file_says_what_was_written_last(tmp_path: Path):
    for text in ("one", "another", ""):
        write(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_left_is_in_nobody_s_way(tmp_path: Path):
    (tmp_path / "file.new").write_text("ha")
    write(tmp_path / "file", "half")
    assert (tmp_path / "file").read_text() == "half"
    (tmp_path / "file.new").write_text("ha")
    for _ in range(2):
        remove(tmp_path / "file")
        assert not list(tmp_path.iterdir())


@pytest.mark.root
def test_F112_without_room_a_file_says_what_it_said_before(disk: Path):
    write(disk / "file", "before")
    with filled(disk):
        for _ in range(2):
            with pytest.raises(UnwritableError) as caught:
                write(disk / "file", "after")
            assert str(caught.value) == (
                f"{disk}/file: cannot be written: No space left on device; "
                f"free some space or inodes (`df -h {disk}`, `df -i {disk}`)"
            )
            assert (disk / "file").read_text() == "before"
            assert {path.name for path in disk.iterdir()} == {"file", "filler"}
    write(disk / "file", "after")
    assert (disk / "file").read_text() == "after"


@pytest.mark.root
def test_F112_on_a_read_only_file_system_nothing_is_written_or_removed(disk: Path):
    write(disk / "file", "before")
    remount(disk, "ro")
    with pytest.raises(UnwritableError, match=r"file: cannot be written: Read-only .*; mount it writable"):
        write(disk / "file", "after")
    with pytest.raises(UnwritableError, match="file: cannot be removed: Read-only"):
        remove(disk / "file")
    remove(disk / "absent")
    assert (disk / "file").read_text() == "before"


def test_without_its_folder_a_file_cannot_be_written(tmp_path: Path):
    with pytest.raises(UnwritableError, match=r"No such file or directory; is .*/nowhere a folder\?"):
        write(tmp_path / "nowhere" / "file", "text")


@pytest.mark.parametrize(
    ("number", "kind", "cure"),
    [(1, MissingFeatureError, "run as root"), (13, MissingFeatureError, "run as root"), (5, UnwritableError, "ls -ld")],
)
def test_what_is_not_permitted_is_a_missing_privilege_and_all_else_is_not(number: int, kind: type, cure: str):
    with (
        pytest.raises(kind, match=rf"/run/x/file: cannot be made: .*{cure}"),
        explained(Path("/run/x/file"), "cannot be made"),
    ):
        raise OSError(number, "for a reason")
