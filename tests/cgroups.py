"""Cgroups of tests: a socket belongs to the cgroup that its process is in when it is made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from xdp import mounts


def mounted() -> Path:
    """Return where the hierarchy of cgroups v2 is mounted."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return next(Path(line.split()[1]) for line in lines if line.split()[2] == "cgroup2")


@contextlib.contextmanager
def made(name: str) -> Iterator[Path]:
    """Make a cgroup, which is empty again at the end."""
    folder = mounted() / name
    folder.mkdir(exist_ok=True)  # of a test that was killed
    assert mounts.is_cgroup(folder)
    try:
        yield folder
    finally:
        folder.rmdir()


@contextlib.contextmanager
def entered(cgroup: Path) -> Iterator[None]:
    """Have this process in a cgroup meanwhile: what sockets it makes belong there for good."""
    before = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    _move(cgroup)
    try:
        yield
    finally:
        _move(mounted() / before.lstrip("/"))


def _move(cgroup: Path) -> None:
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
