"""A node with two hosts on wires of their own, and a folder for pins."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf.world import World
from xdp import mounts

_BPFFS = Path("/run/turnout/bpf")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(f"tx{os.getpid() % 100_000}", ["client", "web"]) as world:
        yield world


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in a bpffs, that does not exist yet and is gone afterwards."""
    mounts.mount_bpffs(_BPFFS)
    path = _BPFFS / f"test-xdp-{os.getpid()}"
    _empty(path)
    yield path
    _empty(path)


def _empty(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        for pin in path.iterdir():
            pin.unlink()
        path.rmdir()
