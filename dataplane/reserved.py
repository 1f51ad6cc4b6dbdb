"""Ports that the kernel is not to give to connections of its own, because masqueraded ones leave from them.

They are added to net.ipv4.ip_local_reserved_ports of the network namespace. A file says which ones a node has there, so
that they are given back at the end, by whoever ends it: this node, `turnout detach`, or a successor with another range.
What an administrator has reserved is in no such file; what several nodes have stays until the last one ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataplane.settings import PortRange
from xdp import netns, sysctl
from xdp.errors import Error
from xdp.writing import explained, remove, write

_SYSCTL = "net/ipv4/ip_local_reserved_ports"

log = logging.getLogger(__name__)


def reserve(ports: PortRange, record: Path) -> None:
    """Reserve `ports`, noting in `record` which ones no administrator had; a log line says if that cannot be.

    Those that the note names until now, and nobody needs any more, are given back.
    """
    try:
        with _in_turn(record):
            others, now = _of_others(record), read_ports(sysctl.read(_SYSCTL))
            kept = now - (_noted(record) - others)  # of an administrator, and of other nodes
            ours = set(range(ports.first, ports.last + 1)) - (kept - others)
            write(record, f"{netns.here()} {as_text(ours)}\n")
            _set(now, kept | ours)
    except Error as error:
        log.warning("ports %s are not reserved for masquerading: %s", ports, error)


def give_back(record: Path) -> None:
    """Take back what only `record` names, and the note. Error: the kernel refused it, or the file system."""
    if record.exists():
        with _in_turn(record):
            now = read_ports(sysctl.read(_SYSCTL))
            _set(now, now - (_noted(record) - _of_others(record)))
            remove(record)


def _set(now: set[int], wanted: set[int]) -> None:
    if now != wanted:
        sysctl.write(_SYSCTL, as_text(wanted))


@contextlib.contextmanager
def _in_turn(record: Path) -> Iterator[None]:
    """Keep others from changing the same while this does."""
    with explained(record.parent, "cannot be locked"):
        folder = os.open(record.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _noted(record: Path) -> set[int]:
    """Return the ports of this network namespace that a note names."""
    try:
        namespace, _, ports = record.read_text().partition(" ")
    except FileNotFoundError:
        return set()
    return read_ports(ports) if namespace == str(netns.here()) else set()


def _of_others(record: Path) -> set[int]:
    """Return the ports that the notes of other nodes name."""
    others = [path for path in record.parent.glob(f"*{record.suffix}") if path != record]
    return {port for path in others for port in _noted(path)}


def read_ports(text: str) -> set[int]:
    """Return the ports that a text like `8080,9000-9009` names."""
    ports: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        ports |= set(range(int(first), int(last or first) + 1))
    return ports


def as_text(ports: Iterable[int]) -> str:
    """Return such a text for `ports`."""
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in _runs(sorted(ports)))


def _runs(ascending: Iterable[int]) -> Iterator[tuple[int, int]]:
    run: tuple[int, int] | None = None
    for port in ascending:
        if run and port == run[1] + 1:
            run = run[0], port
        else:
            if run:
                yield run
            run = port, port
    if run:
        yield run
