"""What an operator has said about endpoints, kept beside the control socket: a restart forgets none of it.

The words are HAProxy's. Who is drained gets no new connections, who is in maintenance loses those it has, too. An
endpoint that no manifest has any more is forgotten: who has its place later is another one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from lb.model import AdminState, Place
from xdp.addresses import read_place, with_port
from xdp.writing import remove, write

log = logging.getLogger(__name__)


def keep(path: Path, states: Mapping[Place, AdminState]) -> None:
    """Write the endpoints that are not ready for all to a file; without any there is none. Errors as `write`."""
    if states:
        write(path, json.dumps({with_port(*place): state for place, state in states.items()}) + "\n")
    else:
        remove(path)


def kept(path: Path) -> dict[Place, AdminState]:
    """Return what `keep` has written, nothing without a file. Of one that says nothing a log line tells."""
    try:
        said = {read_place(text): AdminState(state) for text, state in json.loads(path.read_text()).items()}
        return {(address, port): state for (address, port), state in said.items() if port is not None}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("%s: not read, every endpoint is ready: %s", path, error)
        return {}
