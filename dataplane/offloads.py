"""GRO, switched off where it would be in the way, and switched on again afterwards, whatever happens in between.

Generic XDP sees frames after GRO has merged them: they are longer than the MTU, and a redirect drops them.
What is to be restored is on disk before it is changed, so that whoever cleans up behind a killed daemon knows.
(LRO and GRO in hardware are switched off by the kernel itself while a generic program is attached.)
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Collection
from pathlib import Path

from dataplane.netdev import has_gro, set_gro

_log = logging.getLogger(__name__)


class Offloads:
    """Interfaces, by number, whose GRO was on and is off because of us; kept in the file `record`."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._changed = _read(record)

    def switch_off(self, ifindex: int) -> None:
        """Switch GRO off on an interface, if it is on."""
        name = _name_of(ifindex)
        if name and has_gro(name):
            self._write(self._changed | {ifindex})
            set_gro(name, is_on=False)
            _log.info("%s: GRO switched off, generic XDP cannot forward what it merges; it comes back at the end", name)

    def restore(self, ifindexes: Collection[int] | None = None) -> None:
        """Switch GRO on again on these interfaces, or all, as far as it was."""
        wanted = self._changed if ifindexes is None else self._changed & set(ifindexes)
        for ifindex in wanted:
            name = _name_of(ifindex)
            if name:
                set_gro(name, is_on=True)
        self._write(self._changed - wanted)

    def _write(self, changed: frozenset[int]) -> None:
        if changed == self._changed:
            return
        self._changed = changed
        if not changed:
            self._record.unlink(missing_ok=True)
            return
        self._record.parent.mkdir(parents=True, exist_ok=True)
        beside = self._record.with_name(f"{self._record.name}.new")
        beside.write_text(json.dumps({"gro_was_on": sorted(changed)}))
        beside.replace(self._record)


def _read(record: Path) -> frozenset[int]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return frozenset(int(ifindex) for ifindex in json.loads(record.read_text())["gro_was_on"])
    return frozenset()


def _name_of(ifindex: int) -> str:
    with contextlib.suppress(OSError):
        return socket.if_indextoname(ifindex)
    return ""
