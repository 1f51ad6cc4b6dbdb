"""Tells when manifests may have changed, however that was done.

Editors write in place or rename over, a mounted ConfigMap swaps the symbolic link `..data`, a folder may vanish and
come back. So a change is what stat(2) sees: a signature over all files, taken anew whenever the kernel reports
something in a folder that matters, and now and then in any case (a folder that did not exist cannot be watched).

In a folder of a hundred thousand files that look takes half a second. So where the kernel names files that lie in a
given folder, and no link leads elsewhere, only these are looked at.

Whoever writes in place is given a moment to be done. A file that is renamed into its place is whole: nobody waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lb.manifests import is_manifest

if TYPE_CHECKING:
    from asyncinotify import Inotify, Mask

DEBOUNCE_MS = 80  # a writer that truncates and then writes is given this long to be done
_LOOK_ANYWAY_S = 4.0  # at disks of other machines, of which the kernel tells nothing
_LOOK_AGAIN_S = 1.0  # where folders are missing, or the kernel does not watch them
_GATHER_S = 0.02  # what happens at about the same time is looked at together
_LOOK_SHARE = 100  # looking without a cause takes at most a hundredth of the time
_UNREST_S = 2.0  # a file that never rests is reported nevertheless

_log = logging.getLogger(__name__)

Signature = dict[str, tuple[int, ...] | None]


class Stir(NamedTuple):
    """What something happened to, None for any path; and whether it was nothing but renames into place."""

    paths: Collection[str] | None
    is_whole: bool = False


def signature(paths: Sequence[str]) -> Signature:
    """Return what stat(2) says of `paths`, and of the manifests in those that are folders; None of what is absent."""
    found: Signature = {}
    for path in _named(paths):
        found[path] = _stat(path)
        try:
            with os.scandir(path) as entries:
                found.update((entry.path, _stat(entry.path)) for entry in entries if is_manifest(entry.name))
        except OSError:  # no folder, or it went away meanwhile, or it may not be read: its own entry tells
            continue
    return found


def _named(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path != "-"]  # stdin is read once


def _stat(path: str) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - of 100,000 files in a folder, each a few times
    except OSError:
        return None
    if stat.S_ISDIR(status.st_mode):  # its times are those of whatever comes into it and goes
        return status.st_dev, status.st_ino, status.st_mode
    return status.st_dev, status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def folders(paths: Sequence[str]) -> dict[Path, tuple[int, int]]:
    """Return the folders in which something happens when a file in `paths` changes: as named, and behind links.

    Each with its device and inode, which the kernel watches: another folder may get the name.
    """
    found: dict[Path, tuple[int, int]] = {}
    for path in _named(paths):
        for place in (Path(path).absolute(), Path(os.path.realpath(path))):
            for folder in (place.parent, place):
                with contextlib.suppress(OSError):
                    status = folder.stat()
                    if stat.S_ISDIR(status.st_mode):
                        found[folder] = status.st_dev, status.st_ino
    return found


def changes(paths: Sequence[str], debounce_ms: int = DEBOUNCE_MS) -> AsyncIterator[set[str] | None]:
    """Return an endless iterator that yields when files have changed and then rested for `debounce_ms`.

    It yields the names of the files in given folders that have changed; None where any may have.
    What happens after this call is not missed, even before the first step: call it, then read the files.
    """
    return _changes(paths, signature(paths), debounce_ms)


async def _changes(paths: Sequence[str], known: Signature, debounce_ms: int) -> AsyncIterator[set[str] | None]:
    if not _named(paths):
        await asyncio.Event().wait()
    not_before = 0.0
    told: set[str] = set()
    has_links = _has_links(paths)
    while True:
        async for happened, is_whole in _stirrings(paths, told):
            start = time.monotonic()
            if happened is not None and not happened and start < not_before:
                continue
            names = _files_of(paths, happened) if happened and not has_links else None
            if names is None:
                now = await asyncio.to_thread(signature, paths)
                not_before = start + _LOOK_SHARE * (time.monotonic() - start)
                if now != known:
                    is_all = happened is not None and _changed_paths(known, now) <= set(happened)
                    rest_ms = 0 if is_whole and is_all else debounce_ms
                    known = await _at_rest(lambda: signature(paths), now, rest_ms)
                    has_links = _has_links(paths)
                    yield None
                continue
            now = _look_at(names)
            if any(known.get(name) != seen for name, seen in now.items()):
                now = await _at_rest(lambda: _look_at(names), now, 0 if is_whole else debounce_ms)  # noqa: B023 - awaited at once
                changed = {name for name, seen in now.items() if known.get(name) != seen}
                for name in changed:
                    if now[name] is None:
                        known.pop(name, None)
                    else:
                        known[name] = now[name]
                yield changed


def _changed_paths(before: Signature, now: Signature) -> set[str]:
    """Return the absolute paths of what is other than before."""
    names = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    return {str(Path(name).absolute()) for name in names}


def _look_at(names: Iterable[str]) -> Signature:
    return {name: _stat(name) for name in names}


def _has_links(paths: Sequence[str]) -> bool:
    """Tell whether a link leads from `paths`: then what happens elsewhere matters, too."""
    for path in _named(paths):
        if Path(path).resolve() != Path(path).absolute():
            return True
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            if any(entry.is_symlink() for entry in entries):
                return True
    return False


def _given(paths: Sequence[str]) -> dict[str, str]:
    """Return {absolute path: as it was given}."""
    return {str(Path(path).absolute()): path for path in _named(paths)}


def _files_of(paths: Sequence[str], happened: Collection[str]) -> set[str] | None:
    """Return the manifests in given folders that are among the paths that something happened to.

    None if something happened to what is neither: a folder, a link, a file that is given by name.
    """
    given = _given(paths)
    found: set[str] = set()
    for path in happened:
        folder, name = os.path.split(path)
        if path in given or Path(path).is_symlink():
            return None
        if folder in given and is_manifest(name):
            found.add(os.path.join(given[folder], name))  # noqa: PTH118 - as scandir, and `load`, name it
    return found


async def _at_rest(look: Callable[[], Signature], seen: Signature, rest_ms: int) -> Signature:
    """Return what `look` returns once that has not changed for `rest_ms`, or after `_UNREST_S`; at once for 0."""
    deadline = time.monotonic() + _UNREST_S
    while rest_ms:
        await asyncio.sleep(rest_ms / 1000)
        now = await asyncio.to_thread(look)
        if now == seen or time.monotonic() >= deadline:
            return now
        seen = now
    return seen


async def _stirrings(paths: Sequence[str], told: set[str]) -> AsyncIterator[Stir]:
    """Yield the paths that something happened to in the folders, none now and then, None for any path.

    This begins with any, as what had happened before is not told, and ends with any when the folders are others.

    Where the kernel refuses to watch them this ends after a second, to be called again. Why it refuses is logged if it
    is not in `told`, and then it is.
    """
    from asyncinotify import Inotify, Mask

    watched, given = folders(paths), _given(paths)
    try:
        if watched:
            with Inotify(sync_timeout=0) as inotify:
                for folder in watched:
                    with contextlib.suppress(PermissionError):
                        inotify.add_watch(folder, Mask.ONLYDIR | _happenings(Mask))
                yield Stir(None)
                stir = Stir(())
                while stir.paths is not None and folders(paths) == watched:
                    stir = await _next(inotify, Mask, given)
                    yield stir
                yield Stir(None)
                return
    except FileNotFoundError:  # a folder went away before it could be watched
        pass
    except OSError as error:  # no more inotify instances, watches or descriptors
        if str(error) not in told:
            told.add(str(error))
            _log.warning(
                "manifests are looked at once a second, because the kernel does not watch them: %s; "
                "fs.inotify.max_user_instances and fs.inotify.max_user_watches limit that, too",
                error.strerror,
            )
    await asyncio.sleep(_LOOK_AGAIN_S)
    yield Stir(None)


def _happenings(mask: type[Mask]) -> Mask:
    """Return all that may change what stat(2) says of a folder or of what lies in it."""
    written = mask.CREATE | mask.MODIFY | mask.CLOSE_WRITE | mask.ATTRIB
    return written | mask.MOVE | mask.DELETE | mask.DELETE_SELF | mask.MOVE_SELF


async def _next(inotify: Inotify, mask: type[Mask], given: Collection[str]) -> Stir:
    """Return what something happened to within a moment, nothing if nothing did for long; `given` are our own paths.

    Any path if the kernel has dropped events, or has ended a watch because its folder is gone.
    """
    try:
        async with asyncio.timeout(_LOOK_ANYWAY_S):
            events = [await inotify.get()]
    except TimeoutError:
        return Stir(())
    await asyncio.sleep(_GATHER_S)
    while (event := inotify.sync_get()) is not None:
        events.append(event)
    if any(event.mask & (mask.Q_OVERFLOW | mask.IGNORED) for event in events):
        return Stir(None)
    happened = [(str(event.path), event.mask) for event in events if event.path is not None]
    ours = [what for path, what in happened if path in given or is_manifest(os.path.basename(path))]  # noqa: PTH119
    return Stir({path for path, _ in happened}, bool(ours) and all(mask.MOVED_TO in what for what in ours))
