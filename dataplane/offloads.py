"""Offloads that are in XDP's way, switched off, and switched on again afterwards, whatever happens in between.

Generic XDP sees frames after GRO has merged them: they are longer than the MTU, and a redirect drops them. And where a
driver takes VLAN tags out of received frames, XDP takes what is tagged for untagged, whichever VLAN it is of.
What is to be restored is on disk before it is changed, so that whoever cleans up behind a killed daemon knows.
(LRO and GRO in hardware are switched off by the kernel itself while a generic program is attached.)
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from dataplane.netdev import has_gro, has_rxvlan, set_gro, set_rxvlan

_log = logging.getLogger(__name__)
_Changed = frozenset[tuple[str, int]]


class Offload(NamedTuple):
    """How one is asked for and switched, by an interface's name, and why it is off."""

    is_on: Callable[[str], bool]
    switch: Callable[..., bool]
    why: str


# By their names in the record, less "_was_on".
OFFLOADS: Mapping[str, Offload] = {
    "gro": Offload(has_gro, set_gro, "GRO switched off, generic XDP cannot forward what it merges"),
    "rxvlan": Offload(has_rxvlan, set_rxvlan, "rxvlan switched off, XDP cannot see VLAN tags that it takes out"),
}


class Offloads:
    """What was on, of which interface by number, and is off because of us; kept in the file `record`."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._changed = _read(record)

    def switch_off(self, ifindex: int, which: str) -> None:
        """Switch an offload off on an interface, if it is on."""
        name, offload = _name_of(ifindex), OFFLOADS[which]
        if name and offload.is_on(name):
            self._write(self._changed | {(which, ifindex)})
            if offload.switch(name, is_on=False):
                _log.info("%s: %s; it comes back at the end", name, offload.why)

    def restore(self, ifindexes: Collection[int] | None = None, which: Collection[str] = tuple(OFFLOADS)) -> None:
        """Switch these offloads on again on these interfaces, or all, as far as they were."""
        wanted = frozenset(
            (kind, ifindex)
            for kind, ifindex in self._changed
            if kind in which and (ifindexes is None or ifindex in ifindexes)
        )
        for kind, ifindex in wanted:
            name = _name_of(ifindex)
            if name:
                OFFLOADS[kind].switch(name, is_on=True)
        self._write(self._changed - wanted)

    def _write(self, changed: _Changed) -> None:
        if changed == self._changed:
            return
        self._changed = changed
        if not changed:
            self._record.unlink(missing_ok=True)
            return
        self._record.parent.mkdir(parents=True, exist_ok=True)
        beside = self._record.with_name(f"{self._record.name}.new")
        told = {f"{which}_was_on": sorted(index for kind, index in changed if kind == which) for which in OFFLOADS}
        beside.write_text(json.dumps(told))
        beside.replace(self._record)


def _read(record: Path) -> _Changed:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        told = json.loads(record.read_text())
        return frozenset((which, int(index)) for which in OFFLOADS for index in told.get(f"{which}_was_on", ()))
    return frozenset()


def _name_of(ifindex: int) -> str:
    with contextlib.suppress(OSError):
        return socket.if_indextoname(ifindex)
    return ""
