"""Which network namespace a node works in: what it leaves is taken up, or taken away, there and nowhere else.

Pins and records lie in the file system, which several namespaces share. Names and numbers of interfaces and sysctls
are each namespace's own: whoever reads a record in another one would change what is somebody else's.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from dataplane.settings import Settings
from xdp import netns
from xdp.errors import Error
from xdp.writing import remove, write


def note(settings: Settings) -> None:
    """Note that the node works in the namespace of this thread. Errors as writing.explained."""
    write(settings.namespace_path, f"{netns.here()}\n")


def need_the_same(settings: Settings, command: str) -> None:
    """Raise an Error that says where `turnout COMMAND` is to be run, if the node has left something elsewhere.

    What it has left in a namespace that has gone since is forgotten. Nothing is known of what an earlier version left.
    """
    try:
        inode = int(settings.namespace_path.read_text())
    except (OSError, ValueError):
        return
    if inode == netns.here():
        return
    place = _way_into(inode)
    if place is None and not _is_at_work(settings):
        for record in (settings.offloads_path, settings.reserved_path, settings.namespace_path):
            remove(record)
        return
    cure = (
        f"`nsenter --net={place} turnout {command}{settings.flag}`" if place else "`lsns -t net` shows which there are"
    )
    otherwise = ", or give this one another --name" if command == "run" else ""
    raise Error(f"node {settings.name!r} works in another network namespace; {command} it there: {cure}{otherwise}")


def _way_into(inode: int) -> Path | None:
    """Return a file by which a namespace can be entered: its name, or that of a process in it; None: it has neither."""
    for place in (*Path("/run/netns").glob("*"), *Path("/proc").glob("[0-9]*/ns/net")):
        with contextlib.suppress(OSError):  # it goes away at this moment
            if place.stat().st_ino == inode:
                return place
    return None


def _is_at_work(settings: Settings) -> bool:
    """Whether a program that the node has left is on an interface still."""
    from xdp import loader

    return any((link := loader.link_at(pin)) is not None and link.ifindex for pin in settings.link_pins())
