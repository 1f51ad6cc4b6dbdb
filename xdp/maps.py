"""The shared tables as pinned BPF maps, and those maps as numpy arrays.

Every table of `Capacity.rows()` is an array map with BPF_F_MMAPABLE, pinned at folder/<name> and mapped: what is
written here is what XDP reads, and the other way round. Maps of the kernel's own kinds lie beside them. The map
`layout` is pinned last and says what all of them were created with; a folder without it is the rest of a creation that
was interrupted, and is made anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from xdp import kernel, mounts, schema
from xdp.errors import KernelError, LayoutError, NotRunningError
from xdp.removing import LAYOUT_NAME
from xdp.schema import Limit, Stage
from xdp.tables import Capacity, Tables
from xdp.writing import explained

_LAYOUT_ROW = struct.pack("=I", 0)
_SHOWN = 3  # differences that a message names


@dataclass(frozen=True)
class MapKind:
    """What a map is created with. Sizes in bytes."""

    type: int
    key_size: int
    value_size: int
    entries: int
    flags: int = 0


@dataclass
class SharedMaps:
    """The pinned maps of one node, open: a context manager that closes descriptors and mappings, never pins."""

    folder: Path
    capacity: Capacity
    tables: Tables
    descriptors: dict[str, int]  # of every map, by name
    is_new: bool  # made just now, all zero

    @property
    def sockets_fd(self) -> int:
        """XSKMAP {u32 worker: AF_XDP socket}: where XDP punts to."""
        return self.descriptors["sockets"]

    @property
    def queues_fd(self) -> int:
        """Hash map {u32 ifindex, u32 queue: u32 worker}: who reads a queue."""
        return self.descriptors["queues"]

    @property
    def routes_fd(self) -> int:
        """Longest-prefix match {struct prefix: u32 row of next_hops or route_target}: the way back to a client."""
        return self.descriptors["routes"]

    @property
    def stages_fd(self) -> int:
        """Program array {u32 stage: program}: what a packet may be handed on to."""
        return self.descriptors["stages"]

    @property
    def led_fd(self) -> int:
        """Hash map {LED: VIP} of the sockets that were led to an endpoint; the oldest are forgotten."""
        return self.descriptors["led_sockets"]

    def close(self) -> None:
        """Close the descriptors. A table's memory stays mapped until its last array has gone."""
        for fd in self.descriptors.values():
            os.close(fd)
        self.descriptors = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def kinds(capacity: Capacity) -> dict[str, MapKind]:
    """Return every map by name, `layout` last."""
    tables = {
        name: MapKind(kernel.ARRAY, 4, dtype.itemsize, rows, kernel.MMAPABLE)
        for name, (dtype, rows) in capacity.rows().items()
    }
    return {
        **tables,
        "sockets": MapKind(kernel.XSKMAP, 4, 4, Limit.MAX_WORKERS),
        "queues": MapKind(kernel.HASH, 8, 4, Limit.MAX_WORKERS),
        "stages": MapKind(kernel.PROG_ARRAY, 4, 4, Stage.STAGES),
        "routes": MapKind(kernel.LPM_TRIE, schema.PREFIX.itemsize, 4, 2 * Limit.MAX_ROUTES, kernel.NO_PREALLOC),
        "led_sockets": MapKind(kernel.LRU_HASH, schema.LED.itemsize, schema.VIP.itemsize, Limit.LED_SOCKETS),
        LAYOUT_NAME: MapKind(kernel.ARRAY, 4, schema.LAYOUT.itemsize, 1),
    }


def open_or_create(folder: Path, capacity: Capacity) -> SharedMaps:
    """Take over the maps pinned in `folder`, or make them. LayoutError: they have another layout or capacity."""
    with _locked(folder):
        if is_complete(folder):
            return open_tables(folder, capacity)
        return _create(folder, capacity)


def create(folder: Path, capacity: Capacity) -> SharedMaps:
    """Make and pin the maps in `folder`, which lies in a bpffs. LayoutError: there are complete ones already."""
    with _locked(folder):
        if is_complete(folder):
            raise LayoutError(f"{folder}: there are tables already; open them, or `turnout detach` first")
        return _create(folder, capacity)


def open_tables(folder: Path, capacity: Capacity | None = None, *, read_only: bool = False) -> SharedMaps:
    """Open the maps pinned in `folder`; without `capacity`, whatever it is.

    `read_only` arrays cannot be written, for observers. NotRunningError: no tables; LayoutError: they have another
    layout or capacity than this version, or than `capacity`.
    """
    if not is_complete(folder):
        raise NotRunningError(f"{folder}: no tables are pinned here; start `turnout run` first")
    stored = _stored_layout(folder)
    refuse_differences(folder, stored, capacity)
    capacity = Capacity(**stored["capacity"])
    with ExitStack() as undo:
        descriptors = {}
        for name, kind in kinds(capacity).items():
            descriptors[name] = fd = _open(folder / name)
            undo.callback(os.close, fd)
            _refuse_another_kind(folder / name, kernel.map_info(fd), kind)
        tables = _map(capacity, descriptors, read_only)
        undo.pop_all()
    return SharedMaps(folder, capacity, tables, descriptors, is_new=False)


def is_complete(folder: Path) -> bool:
    """Return whether the maps in `folder` were all made."""
    return (folder / LAYOUT_NAME).exists()


def describe(capacity: Capacity) -> dict[str, Any]:
    """Return layout and capacity as plain data, as stored beside the maps."""
    described = {**schema.describe(), "capacity": capacity.describe()}
    return json.loads(json.dumps(described))  # type: ignore[no-any-return]


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Return where two trees of plain data differ, one line each: `structs.flow.state: ['u1', 38], now ['u2', 38]`."""
    if isinstance(old, dict) and isinstance(new, dict):
        places = {key: f"{place}.{key}" if place else str(key) for key in {**old, **new}}
        return [line for key, where in places.items() for line in differences(old.get(key), new.get(key), where)]
    if old == new:
        return []
    return [f"{place}: {_shown(old)}, now {_shown(new)}"]


def _shown(value: Any) -> str:
    return "absent" if value is None else f"{sorted(value)}" if isinstance(value, dict) else f"{value}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it alone: nobody creates, opens or removes half a set of maps meanwhile."""
    mounts.mount_bpffs(folder.parent)
    with explained(folder, "cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _create(folder: Path, capacity: Capacity) -> SharedMaps:
    text = json.dumps(describe(capacity), separators=(",", ":")).encode()
    if len(text) > Limit.LAYOUT_BYTES:
        raise LayoutError(f"the layout's description takes {len(text)} bytes; raise LAYOUT_BYTES in schema.h")
    for name in kernel.pinned_maps(folder):
        (folder / name).unlink()
    with ExitStack() as undo:
        undo.callback(_leave_nothing, folder, kinds(capacity))
        descriptors = {}
        for name, kind in kinds(capacity).items():
            descriptors[name] = fd = kernel.map_create(
                name, kind.key_size, kind.value_size, kind.entries, kind.flags, kind.type
            )
            undo.callback(os.close, fd)
        tables = _map(capacity, descriptors, read_only=False)
        kernel.map_update(descriptors[LAYOUT_NAME], _LAYOUT_ROW, text.ljust(Limit.LAYOUT_BYTES, b"\0"))
        for name, fd in descriptors.items():
            kernel.pin(fd, folder / name)
        undo.pop_all()
    return SharedMaps(folder, capacity, tables, descriptors, is_new=True)


def _leave_nothing(folder: Path, names: Iterable[str]) -> None:
    """Remove what a creation that failed has made; it has no descriptor to spare for looking what that is."""
    with suppress(OSError):
        for name in names:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _map(capacity: Capacity, descriptors: dict[str, int], read_only: bool) -> Tables:
    arrays = {
        name: array_over(descriptors[name], dtype, rows, read_only) for name, (dtype, rows) in capacity.rows().items()
    }
    return Tables.over(arrays)


def array_over(fd: int, dtype: np.dtype, rows: int, read_only: bool = False) -> npt.NDArray[np.void]:
    """Return a mappable array map as `rows` rows of `dtype`. The mapping lasts as long as the array."""
    stride = -(-dtype.itemsize // 8) * 8  # the kernel rounds values up to 8 bytes
    if stride != dtype.itemsize:
        dtype = np.dtype(
            {
                "names": list(dtype.names or ()),
                "formats": [kind for kind, *_ in (dtype.fields or {}).values()],
                "offsets": [offset for _, offset, *_ in (dtype.fields or {}).values()],
                "itemsize": stride,
            }
        )
    access = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
    try:
        memory = mmap.mmap(fd, stride * rows, mmap.MAP_SHARED, access)
    except OSError as error:
        message = f"mapping {stride * rows} bytes of a table: {error.strerror}"
        raise KernelError(message, error.errno or errno.EIO) from None
    return np.frombuffer(memory, dtype, rows)


def _open(path: Path) -> int:
    try:
        return kernel.open_pinned(path)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        raise LayoutError(f"{path} is missing, its table was unpinned by somebody; `turnout detach` first") from None


def _stored_layout(folder: Path) -> dict[str, Any]:
    fd = kernel.open_pinned(folder / LAYOUT_NAME)
    try:
        size = kernel.map_info(fd).value_size
        text = (kernel.map_lookup(fd, _LAYOUT_ROW, size) or b"").rstrip(b"\0")
    finally:
        os.close(fd)
    try:
        stored = json.loads(text)
    except ValueError:
        stored = None
    if not isinstance(stored, dict) or not isinstance(stored.get("capacity"), dict):
        raise LayoutError(f"{folder / LAYOUT_NAME} holds no description of the tables; `turnout detach` first")
    return stored


def refuse_differences(folder: Path, stored: dict[str, Any], capacity: Capacity | None) -> None:
    """Raise LayoutError if `stored` is not this version's layout, or not of `capacity`."""
    expected = describe(capacity or Capacity())
    stored_capacity, asked_capacity = stored["capacity"], expected["capacity"]
    lines = differences({**stored, "capacity": None}, {**expected, "capacity": None})
    if capacity is not None:
        lines += differences(stored_capacity, asked_capacity, "capacity")
    elif unknown := stored_capacity.keys() ^ asked_capacity.keys():
        lines += [f"capacity.{name}: known to one version only" for name in sorted(unknown)]
    if not lines:
        return
    cure = "`turnout detach` first"
    if all(line.startswith("capacity.") for line in lines):
        cure = "give the same --capacity, or `turnout detach` first"
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    raise LayoutError(
        f"{folder}: the pinned tables differ from what is asked for: {'; '.join(lines[:_SHOWN])}{more}; {cure}"
    )


def _refuse_another_kind(path: Path, info: kernel.MapInfo, kind: MapKind) -> None:
    found = MapKind(info.type, info.key_size, info.value_size, info.max_entries, info.map_flags)
    if found != kind:
        raise LayoutError(f"{path} is another map: {found}, expected {kind}; `turnout detach` first")
