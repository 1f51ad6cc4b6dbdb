"""What an operator has said about endpoints, kept beside the control socket: a restart forgets none of it.

The words are HAProxy's. Who is drained gets no new connections, who is in maintenance loses those it has, too. An
endpoint that no manifest has any more is forgotten: who has its place later is another one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from lb.model import AdminState, Place
from xdp.addresses import read_place, with_port

log = logging.getLogger(__name__)


class Administered:
    """The endpoints that are not ready for all, and their state; `path` is where it is kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._states = _read(path)

    @property
    def states(self) -> Mapping[Place, AdminState]:
        """What was said last."""
        return self._states

    def say(self, places: Iterable[Place], state: AdminState) -> None:
        """Note the state of endpoints. OSError: it cannot be kept, and is as before."""
        self._change({**self._states, **dict.fromkeys(places, state)})

    def retain(self, places: Iterable[Place]) -> None:
        """Forget all endpoints but these."""
        if self._states:
            there = set(places)
            self._change({place: state for place, state in self._states.items() if place in there})

    def _change(self, states: Mapping[Place, AdminState]) -> None:
        states = {place: state for place, state in states.items() if state is not AdminState.READY}
        if states == self._states:
            return
        if states:
            draft = self._path.with_suffix(".draft")
            draft.write_text(json.dumps({with_port(*place): state for place, state in states.items()}) + "\n")
            draft.replace(self._path)
        else:
            self._path.unlink(missing_ok=True)
        self._states = states


def _read(path: Path) -> dict[Place, AdminState]:
    try:
        said = {read_place(text): AdminState(state) for text, state in json.loads(path.read_text()).items()}
        return {(address, port): state for (address, port), state in said.items() if port is not None}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("%s: not read, every endpoint is ready: %s", path, error)
        return {}
