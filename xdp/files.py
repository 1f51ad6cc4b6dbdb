"""The shared tables as one file that is mapped: for a node that has no BPF, and yet may be restarted.

folder/tables holds the tables of `Capacity.rows()` one behind the other, folder/layout says how they are laid out, and
in which boot of the machine they were made. It is written last: a folder without it is the rest of a creation that was
interrupted. Tables of an earlier boot are made anew: their times mean nothing.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from xdp import maps, removing
from xdp.errors import Error, LayoutError, NotRunningError
from xdp.removing import LAYOUT_NAME, TABLES_NAME
from xdp.tables import Capacity, Tables
from xdp.writing import explained, write

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ROW_ALIGNMENT = 4096


class NoRoomError(Error):
    """The file system has no room for the tables."""


@dataclass
class SharedFile:
    """The tables of one node; the counterpart of xdp.maps.SharedMaps, a context manager as that is."""

    capacity: Capacity
    tables: Tables
    is_new: bool  # made just now, all zero

    def close(self) -> None:
        """Nothing: the memory stays mapped until its last array has gone."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def in_memory(capacity: Capacity) -> SharedFile:
    """Return tables that end with this process."""
    return SharedFile(capacity, Tables.in_memory(capacity), is_new=True)


def open_or_create(folder: Path, capacity: Capacity) -> SharedFile:
    """Take over the tables in `folder`, or make them; the caller sees to it that nobody else does at the same time.

    LayoutError: they have another layout or capacity. NoRoomError: there is no room for them.
    """
    if is_complete(folder):
        return open_tables(folder, capacity)
    removing.files(folder)
    try:
        with explained(folder, f"no room for {_size(capacity) >> 20} MB of tables"):
            folder.mkdir(parents=True, mode=0o700)
            with (folder / TABLES_NAME).open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, _size(capacity))
            tables = _map(folder, capacity, read_only=False)
            write(folder / LAYOUT_NAME, json.dumps({**maps.describe(capacity), "boot": _boot()}))
    except Error as error:
        removing.files(folder)
        raise NoRoomError(str(error)) from None
    return SharedFile(capacity, tables, is_new=True)


def open_tables(folder: Path, capacity: Capacity | None = None, *, read_only: bool = False) -> SharedFile:
    """Open the tables in `folder`; without `capacity`, whatever it is.

    NotRunningError: there are none; LayoutError: they have another layout or capacity.
    """
    if not is_complete(folder):
        raise NotRunningError(f"{folder}: no tables are here; start `turnout run` first")
    stored = _stored(folder)
    stored.pop("boot")
    maps.refuse_differences(folder, stored, capacity)
    capacity = Capacity(**stored["capacity"])
    if (folder / TABLES_NAME).stat().st_size < _size(capacity):
        raise LayoutError(f"{folder}/tables was cut short by somebody; `turnout detach` first")
    return SharedFile(capacity, _map(folder, capacity, read_only), is_new=False)


def is_complete(folder: Path) -> bool:
    """Return whether the tables in `folder` were all made, since the machine was booted."""
    return (folder / LAYOUT_NAME).exists() and _stored(folder)["boot"] == _boot()


def _boot() -> str:
    return _BOOT_ID.read_text().strip()


def _stored(folder: Path) -> dict[str, Any]:
    try:
        stored = json.loads((folder / LAYOUT_NAME).read_text())
        if isinstance(stored["capacity"], dict) and isinstance(stored["boot"], str):
            return stored  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError):
        pass
    raise LayoutError(f"{folder}/layout holds no description of the tables; `turnout detach` first")


def _places(capacity: Capacity) -> Iterator[tuple[str, np.dtype, int, int]]:
    """Yield (name, dtype, rows, offset in the file), and at last the end."""
    offset = 0
    for name, (dtype, rows) in capacity.rows().items():
        yield name, dtype, rows, offset
        offset += -(-dtype.itemsize * rows // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    yield "", np.dtype("u1"), 0, offset


def _size(capacity: Capacity) -> int:
    return max(offset for *_, offset in _places(capacity))


def _map(folder: Path, capacity: Capacity, read_only: bool) -> Tables:
    access = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
    with (folder / TABLES_NAME).open("rb" if read_only else "r+b") as file:
        memory = mmap.mmap(file.fileno(), _size(capacity), mmap.MAP_SHARED, access)
    return Tables.over(
        {name: np.frombuffer(memory, dtype, rows, offset) for name, dtype, rows, offset in _places(capacity) if name}
    )
