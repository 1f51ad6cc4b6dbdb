"""Offloads that are in XDP's way, switched off, and switched on again afterwards, whatever happens in between.

Generic XDP sees frames after GRO has merged them: they are longer than the MTU, and a redirect drops them. Beneath a
macvlan, a VLAN device or a bridge it is the lower devices that merge. And where a driver takes VLAN tags out of
received frames, XDP takes what is tagged for untagged, whichever VLAN it is of.
And where a NIC filters VLANs, those that only we know do not arrive. What a driver does not let go is told of.
What is to be restored is on disk before it is changed, so that whoever cleans up behind a killed daemon knows.
(LRO and GRO in hardware are switched off by the kernel itself while a generic program is attached.)
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dataplane.ethtool import has_feature, has_gro, set_feature, set_gro
from xdp.errors import Error
from xdp.writing import remove, write

_log = logging.getLogger(__name__)
_Changed = frozenset[tuple[str, int]]


class Offload(NamedTuple):
    """How one is asked for and switched, by an interface's name, why it is off, and what if it cannot be."""

    is_on: Callable[[str], bool]
    switch: Callable[..., bool]
    why: str
    otherwise: str


def _feature(name: str, why: str, otherwise: str) -> Offload:
    return Offload(partial(has_feature, feature=name), partial(set_feature, feature=name), why, otherwise)


# By their names in the record, less "_was_on".
OFFLOADS: Mapping[str, Offload] = {
    "gro": Offload(
        has_gro,
        set_gro,
        "GRO switched off, generic XDP cannot forward what it merges",
        "GRO cannot be switched off, and generic XDP drops what it merges; use --engine raw",
    ),
    "rxvlan": _feature(
        "rx-vlan-hw-parse",
        "rx-vlan-offload switched off, XDP cannot see VLAN tags that it takes out",
        "rx-vlan-offload cannot be switched off, and frames with VLAN tags are taken for untagged ones; "
        "use --engine raw",
    ),
    "vlanfilter": _feature(
        "rx-vlan-filter",
        "rx-vlan-filter switched off, it drops frames of VLANs that the kernel has no device for",
        "rx-vlan-filter cannot be switched off, and it drops frames of VLANs that the kernel has no device for; "
        "instead of --vlan, make VLAN devices and give them with -i",
    ),
}


class Offloads:
    """What was on, of which interface by number, and is off because of us; kept in the file `record`."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._changed = _read(record)
        self._refused: _Changed = frozenset()

    def switch_off(self, ifindex: int, which: str) -> None:
        """Switch an offload off on an interface, if it is on; a driver that refuses is complained about.

        Errors as writing.explained: the record cannot be written, and the offload stays on.
        """
        name, offload, change = _name_of(ifindex), OFFLOADS[which], (which, ifindex)
        refused, self._refused = self._refused, self._refused - {change}
        if not name or not offload.is_on(name):
            return
        self._write(self._changed | {change})
        if offload.switch(name, is_on=False):
            _log.info("%s: %s; it comes back at the end", name, offload.why)
            return
        offload.switch(name, is_on=True)  # what was refused would stay wished for
        self._write(self._changed - {change})
        self._refused |= {change}
        if change not in refused:
            _log.warning("%s: %s", name, offload.otherwise)

    def keep_off(self, which: str, ifindexes: Sequence[int]) -> None:
        """Have an offload off on these interfaces, one after the other, and let all others have it again.

        Errors as `switch_off`.
        """
        self.restore_others(ifindexes, [which])
        for ifindex in ifindexes:
            self.switch_off(ifindex, which)

    def complaints(self) -> list[str]:
        """Return what could not be switched off, in words."""
        named = [(_name_of(ifindex), which) for which, ifindex in self._refused]
        return sorted(f"{name}: {OFFLOADS[which].otherwise}" for name, which in named if name)

    def restore(self, ifindexes: Collection[int] | None = None, which: Collection[str] = tuple(OFFLOADS)) -> None:
        """Switch these offloads on again on these interfaces, or all, as far as they were.

        Where the record cannot be written, it says too much: whoever reads it switches on what is on.
        """
        wanted = frozenset(
            (kind, ifindex)
            for kind, ifindex in self._changed | self._refused
            if kind in which and (ifindexes is None or ifindex in ifindexes)
        )
        for kind, ifindex in wanted & self._changed:
            name = _name_of(ifindex)
            if name:
                OFFLOADS[kind].switch(name, is_on=True)
        self._refused -= wanted
        try:
            self._write(self._changed - wanted)
        except Error as error:
            _log.warning("%s", error)

    def restore_others(self, kept: Collection[int], which: Collection[str] = tuple(OFFLOADS)) -> None:
        """Switch these offloads on again on all but these interfaces."""
        self.restore({ifindex for _, ifindex in self._changed | self._refused}.difference(kept), which)

    def _write(self, changed: _Changed) -> None:
        if changed == self._changed:
            return
        if changed:
            told = {f"{which}_was_on": sorted(index for kind, index in changed if kind == which) for which in OFFLOADS}
            write(self._record, json.dumps(told))
        else:
            remove(self._record)
        self._changed = changed


def _read(record: Path) -> _Changed:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        told = json.loads(record.read_text())
        return frozenset((which, int(index)) for which in OFFLOADS for index in told.get(f"{which}_was_on", ()))
    return frozenset()


def _name_of(ifindex: int) -> str:
    with contextlib.suppress(OSError):
        return socket.if_indextoname(ifindex)
    return ""
