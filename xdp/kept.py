"""Files of what was made once and is kept: where they lie, who makes them, and that they are whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_PATIENCE_S, _LOOK_AGAIN_S = 120.0, 0.05  # for another process that compiles


def base() -> Path:
    """Return the folder of all that turnout keeps, which need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turnout"


def write(place: Path, content: bytes) -> None:
    """Make a file, perhaps in place of another: who reads it finds the one or the other. OSError: it cannot be."""
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_suffix(f".{os.getpid()}")
    fresh.write_bytes(content)
    fresh.rename(place)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold a file's lock: whoever else wants what is being compiled waits for it.

    Where none can be written, go on; and where somebody has held it for longer than anything takes to compile.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            _acquire(stack.enter_context(lock.open("w")).fileno())
        yield


def _acquire(fd: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_AGAIN_S)
