"""Ports that the kernel is not to give to connections of its own, because masqueraded ones leave from them.

They are added to net.ipv4.ip_local_reserved_ports of the network namespace. A file says which ones were added, so that
they are given back at the end, by whoever ends it: this node, `turnout detach`, or a successor with another range.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataplane.settings import PortRange
from xdp import sysctl
from xdp.errors import Error
from xdp.writing import remove, write

_SYSCTL = "net/ipv4/ip_local_reserved_ports"

log = logging.getLogger(__name__)


def reserve(ports: PortRange, record: Path) -> None:
    """Reserve `ports`, noting in `record` which ones were not reserved before; a log line says if that cannot be."""
    try:
        give_back(record)
        before = read_ports(sysctl.read(_SYSCTL))
        added = set(range(ports.first, ports.last + 1)) - before
        if added:
            write(record, as_text(added) + "\n")
            sysctl.write(_SYSCTL, as_text(before | added))
    except Error as error:
        with contextlib.suppress(Error):
            remove(record)
        log.warning("ports %s are not reserved for masquerading: %s", ports, error)


def give_back(record: Path) -> None:
    """Take back what `reserve` noted in `record`, and the note. Error: the kernel refused it, or the file system."""
    with contextlib.suppress(FileNotFoundError):
        added = read_ports(record.read_text())
        sysctl.write(_SYSCTL, as_text(read_ports(sysctl.read(_SYSCTL)) - added))
        remove(record)


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
