"""Small files that are there whole or not at all, and what a user is told when one cannot be written.

Beside a file of such text there may be one more, of the same name with `.new` behind it: the rest of a writer that was
killed. Writers of one file take turns; the next one writes over it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from xdp.errors import Error, MissingFeatureError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST)
_NOT_PERMITTED = (errno.EACCES, errno.EPERM)


class UnwritableError(Error):
    """A file cannot be written, or made."""


def write(path: Path, text: str) -> None:
    """Have a file say `text`, in one step: who reads it meanwhile finds all of it, or all that it said before.

    Errors as `explained`: the file says what it said before.
    """
    beside = _beside(path)
    with explained(path):
        try:
            beside.write_text(text)
            beside.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()  # where there is no room, half a text is in the way, too
            raise


def remove(path: Path) -> None:
    """Have no such file. Errors as `explained`."""
    with explained(path, "cannot be removed"):
        for one in (path, _beside(path)):
            if os.path.lexists(one):  # a read-only file system refuses to remove what is not there, too
                one.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


@contextlib.contextmanager
def explained(path: Path, what: str = "cannot be written") -> Iterator[None]:
    """Say of an OSError which file it is about, what went wrong, and the cure.

    MissingFeatureError: it is not permitted; UnwritableError: anything else, such as a file system that is full.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in _NOT_PERMITTED:
            raise MissingFeatureError(f"{path}: {what}: {why}; run as root") from None
        raise UnwritableError(f"{path}: {what}: {why}; {_cure(error.errno, path.parent)}") from None


def _cure(number: int | None, folder: Path) -> str:
    if number in _NO_ROOM:
        return f"free some space or inodes (`df -h {folder}`, `df -i {folder}`)"
    if number == errno.EROFS:
        return f"mount it writable (`findmnt -T {folder}`)"
    if number in _NO_FOLDER:
        return f"is {folder} a folder?"
    return f"look at `ls -ld {folder}`"
