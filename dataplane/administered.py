"""What an operator has said about endpoints, kept beside the control socket: a restart forgets none of it.

The words are HAProxy's. Who is drained gets no new connections, who is in maintenance loses those it has, too. A drain
may have a deadline, at which it becomes maintenance: a client that keeps its connection alive would never let go. An
endpoint that no manifest has any more is forgotten: who has its place later is another one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from lb.model import AdminState, Place, Said
from xdp.addresses import read_place, with_port
from xdp.errors import UsageError
from xdp.writing import remove, write

_LONGEST_S = 366 * 86_400
_UNTIL = " until "  # in the file, between a state and its deadline

log = logging.getLogger(__name__)


def read_said(state: str, deadline_s: int | None, now_s: float) -> Said:
    """Return what is said by a state and, from now on, a deadline. UsageError: that cannot be."""
    if state not in [*AdminState]:
        raise UsageError(f"{state!r} is no state; known are {', '.join(AdminState)}")
    if deadline_s is None:
        return Said(AdminState(state))
    if state != AdminState.DRAIN:
        raise UsageError(f"a deadline for {state}; only a drain has one")
    if not 1 <= deadline_s <= _LONGEST_S:
        raise UsageError(f"{deadline_s} s is no deadline; expected 1 to {_LONGEST_S}, or none")
    return Said(AdminState.DRAIN, now_s + deadline_s)


def overdue(said: Mapping[Place, Said], now_s: float) -> dict[Place, Said]:
    """Return the drains whose deadline has passed."""
    return {place: each for place, each in said.items() if each.deadline_s is not None and each.deadline_s <= now_s}


def next_deadline_s(said: Mapping[Place, Said]) -> float | None:
    """Return when the next drain is over, None if none has a deadline."""
    return min((each.deadline_s for each in said.values() if each.deadline_s is not None), default=None)


def keep(path: Path, said: Mapping[Place, Said]) -> None:
    """Write what was said of endpoints that are not ready for all to a file; else there is none. Errors as `write`."""
    if said:
        write(path, json.dumps({with_port(*place): _as_text(each) for place, each in said.items()}) + "\n")
    else:
        remove(path)


def kept(path: Path) -> dict[Place, Said]:
    """Return what `keep` has written, nothing without a file. Of one that says nothing a log line tells."""
    try:
        said = {read_place(text): _of_text(word) for text, word in json.loads(path.read_text()).items()}
        return {(address, port): each for (address, port), each in said.items() if port is not None}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("%s: not read, every endpoint is ready: %s", path, error)
        return {}


def _as_text(said: Said) -> str:
    return said.state if said.deadline_s is None else f"{said.state}{_UNTIL}{said.deadline_s}"


def _of_text(text: str) -> Said:
    state, until, deadline_s = text.partition(_UNTIL)
    return Said(AdminState(state), float(deadline_s) if until else None)
