"""Messages on stderr: text for people and journald, JSON for machines; a line that repeats itself is held back."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

_BURST = 3  # equal lines ...
_WINDOW_S = 60.0  # ... within this time; the rest is counted
_MOST_KNOWN = 1000


def configure(log_format: str, stream: TextIO | None = None, *, debug: bool = False) -> None:
    """Send all messages to `stream` (stderr) in `log_format`, "text" or "json"."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter(is_timed=not _has_journal()))
    handler.addFilter(Repeats())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for package in ("dataplane", "lb", "conntrack", "xdp"):
        logging.getLogger(package).setLevel(logging.DEBUG if debug else logging.INFO)
    # Others' libraries speak of their own affairs; only what is wrong matters here.
    for package in ("asyncio", "numba", "pyroute2"):
        logging.getLogger(package).setLevel(logging.WARNING)


def _has_journal() -> bool:
    """Return whether stderr goes to journald, which notes the time itself."""
    try:
        device, inode = os.environ.get("JOURNAL_STREAM", "").split(":")
        status = os.fstat(2)
        return (status.st_dev, status.st_ino) == (int(device), int(inode))
    except (ValueError, OSError):
        return False


class TextFormatter(logging.Formatter):
    """`18:20:01 warning: eth0: ...`; what is merely information bears no level."""

    def __init__(self, *, is_timed: bool) -> None:
        super().__init__("%(asctime)s %(said)s" if is_timed else "%(said)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line of `record`."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        record.said = level + record.message
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of `record`."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class Repeats(logging.Filter):
    """Lets a line through a few times a minute; the first one after that says how many were held back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[int, str], list[float]] = {}  # line -> [start of its window, how often]

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether `record` is to be shown; add the count of those that were not."""
        message = record.getMessage()
        now = self._clock()
        window = self._seen.setdefault((record.levelno, message), [now, 0])
        if now - window[0] < _WINDOW_S:
            window[1] += 1
            self._forget()
            return window[1] <= _BURST
        held_back = int(window[1]) - _BURST
        window[:] = [now, 1]
        if held_back > 0:
            record.msg, record.args = f"{message} ({held_back} more of these were held back)", ()
        return True

    def _forget(self) -> None:
        while len(self._seen) > _MOST_KNOWN:
            del self._seen[next(iter(self._seen))]
