"""Which Pod was seen where last, in a file beside the control socket: what happens while no daemon is there is noticed.

A line for each place whose Pod has changed, the last one of a place counts. It is written anew when most lines say
nothing any more. A daemon that was killed may leave half a line.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from pathlib import Path

from lb.incarnations import Seat
from xdp.writing import explained, remove, write

log = logging.getLogger(__name__)

_FEW = 10_000  # lines that may say nothing


class Whereabouts:
    """The file; read before it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = 0
        self._wanted = 0  # lines that said something when it was last written anew
        self._is_broken = False  # half a line ends it, or what ought to be in it is not

    def read(self) -> dict[Seat, str]:
        """Return who was seen where last. Of lines that say nothing a message tells."""
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s: not read, Pods that have changed meanwhile are not noticed: %s", self._path, error)
            self._is_broken = True
            return {}
        self._is_broken = not text.endswith("\n")
        lines = text.splitlines()
        self._lines, found, bad = len(lines), {}, 0
        for line in lines:
            try:
                address, port, protocol, who = json.loads(line)
                seat = (ip_address(str(address)), int(port)), str(protocol)
                found[seat] = str(who)
            except (ValueError, TypeError):
                bad += 1
        if bad > 1:  # one may be half written
            log.warning("%s: %d lines not read, Pods that have changed meanwhile may not be noticed", self._path, bad)
        return found

    def add(self, changed: Mapping[Seat, str], everybody: Callable[[], Mapping[Seat, str]]) -> None:
        """Note who is where now, of `everybody` only what has changed. Errors as writing.explained.

        What could not be is made good with the next change.
        """
        if not changed:
            return
        if self._is_broken or self._lines + len(changed) > _FEW + 2 * self._wanted:
            self._write_anew(everybody())
            return
        self._is_broken = True
        with explained(self._path), self._path.open("a") as file:
            file.write(_text_of(changed))
        self._lines += len(changed)
        self._is_broken = False

    def _write_anew(self, everybody: Mapping[Seat, str]) -> None:
        self._is_broken = True
        write(self._path, _text_of(everybody))
        self._lines = self._wanted = len(everybody)
        self._is_broken = False

    def forget(self) -> None:
        """Remove the file: there are no connections that anybody could be mistaken in."""
        remove(self._path)


def _text_of(seats: Mapping[Seat, str]) -> str:
    return "".join(
        json.dumps([str(address), port, protocol, who]) + "\n" for ((address, port), protocol), who in seats.items()
    )
