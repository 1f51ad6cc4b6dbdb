"""What is set on the machine for a run, and put back afterwards: room in the kernel's connection tracking."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from xdp.errors import MissingFeatureError

_CONNTRACK_MAX = Path("/proc/sys/net/netfilter/nf_conntrack_max")
_CONNTRACK_BEFORE = Path("/run/turnout/conntrack-before.json")
_CONNTRACK_BUCKETS = Path("/sys/module/nf_conntrack/parameters/hashsize")


@contextlib.contextmanager
def raised_conntrack(entries: int) -> Iterator[None]:
    """Give the kernel's connection tracking room for `entries`, a bucket each, for the duration of the block.

    Both are of the machine, not of a network namespace. What they were is kept in a file until they are so again: a run
    that is killed is made good by the next one. Raises MissingFeatureError if there is no connection tracking.
    """
    try:
        if _CONNTRACK_BEFORE.exists():
            before = json.loads(_CONNTRACK_BEFORE.read_text())
        else:
            before = {str(path): path.read_text() for path in (_CONNTRACK_BUCKETS, _CONNTRACK_MAX)}
            _CONNTRACK_BEFORE.parent.mkdir(parents=True, exist_ok=True)
            _CONNTRACK_BEFORE.write_text(json.dumps(before))
        for path in before:
            Path(path).write_text(str(entries))
    except OSError as error:
        raise MissingFeatureError(f"connection tracking cannot be tuned ({error}); run as root on the host") from None
    try:
        yield
    finally:
        for path, text in before.items():
            Path(path).write_text(text)
        _CONNTRACK_BEFORE.unlink(missing_ok=True)
