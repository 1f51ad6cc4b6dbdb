"""Whether connections begin with packets whose checksums are whole, and what to do if they do not.

A local kernel that sends through a veth leaves checksums to a device, and there is none. An XDP program cannot see
that: it forwards what the endpoint drops, and nothing but a stalled client would tell. Userspace sees the first packets
of most connections, and counts (pipeline.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

_WORDS = (
    "packets come with unfinished checksums, which endpoints drop: `ethtool -K PEER tx off` at the far end of the veth"
)
_LEAST, _SHARE, _ENOUGH = 2, 8, 16  # by chance, one of 65536 looks so: two of sixteen are none


class Begun(NamedTuple):
    """First packets of connections so far, and those of them whose checksum was unfinished."""

    packets: int
    unfinished: int


def begun(links: Iterable[Any]) -> Begun:
    """Return what packet loops of an interface have counted, each in its row of LINK."""
    rows = list(links)
    return Begun(sum(int(row["begun"]) for row in rows), sum(int(row["unfinished"]) for row in rows))


class Checksums:
    """Looks at what interfaces have counted, again and again."""

    def __init__(self) -> None:
        self._seen: dict[str, Begun] = {}

    def news(self, counted: Mapping[str, Begun]) -> Iterator[tuple[str, str]]:
        """Yield (interface, words) where a good part of what has come since the last time was unfinished."""
        for name, now in counted.items():
            before = self._seen.setdefault(name, Begun(0, 0))
            packets, unfinished = now.packets - before.packets, now.unfinished - before.unfinished
            is_much = unfinished >= _LEAST and unfinished * _SHARE >= packets
            if is_much or packets >= _ENOUGH or packets < 0:  # fewer: its workers have begun anew
                self._seen[name] = now
            if is_much:
                yield name, _WORDS
