"""Which neighbours the kernel is asked for, and when again.

Decisions are collected and sent by `flush`, many at a time. A neighbour that an endpoint or a gateway needs is kept:
the kernel looks after it for ever (NTF_EXT_MANAGED), or we do where it cannot. One that only clients need is looked at
once a minute, for their traffic does not pass through the kernel; a silent one ever less often.

A stranger for whom packets wait is sought: nothing is kept for him until he answers, and whoever makes up addresses has
the earlier ones forgotten, here and in the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from dataplane.mirror import Mirror, is_fixed, is_usable, left_with_the_kernel
from dataplane.netdev import Neighbour, NeighbourKey
from xdp.addresses import address_of

RECHECK_S = 60.0  # a client's entry, which no packet through the kernel refreshes
RETRY_S = 5.0  # a neighbour that does not answer, doubling ...
LONGEST_RETRY_S = 320.0  # ... up to here
_ASK_AGAIN_S = 1.0  # at most so often on behalf of packets: the kernel's own three probes take as long
_RECHECKS = 2048  # neighbours looked at in one turn: about 2 ms
SOUGHT = 4096  # strangers at a time; the kernel does not age what we ask for, so these are as many entries of its table
SEEK_S = 5.0  # a stranger is given up after that: the kernel's own three probes take three seconds

_log = logging.getLogger(__name__)


class Asker(Protocol):
    """What is needed of dataplane.netdev.NetDev, which has the details."""

    def neighbours(self) -> list[Neighbour]:
        """Return every neighbour entry."""

    def resolve(self, keys: Iterable[NeighbourKey], *, keep: bool) -> dict[NeighbourKey, int]:
        """Ask for MAC addresses; return {neighbour: errno} of those refused."""

    def let_go(self, keys: Iterable[NeighbourKey]) -> None:
        """Stop keeping entries."""


class Need(IntEnum):
    """What a neighbour is needed for; of several, the greatest."""

    NOTHING = 0
    ROW = 1  # it has a row, which nobody has asked for
    CLIENT = 2  # the way to a client
    KEPT = 3  # to an endpoint or a gateway


@dataclass(slots=True)
class _Asked:
    is_kept: bool
    at_s: float
    wait_s: float = RETRY_S  # until the next look


class Asking:
    """The neighbours that we have asked for. `need_of` tells what one is needed for."""

    def __init__(self, asker: Asker, mirror: Mirror, need_of: Callable[[NeighbourKey], Need]) -> None:
        self._asker = asker
        self._mirror = mirror
        self._need_of = need_of
        self._asked: dict[NeighbourKey, _Asked] = {}
        self._to_ask: dict[NeighbourKey, bool] = {}  # whether to keep it
        self._to_let_go: set[NeighbourKey] = set()
        self._recheck: list[NeighbourKey] = []
        self._sought: dict[NeighbourKey, float] = {}  # strangers, and when each was asked for; the earliest first

    # What rows want.

    def ask(self, key: NeighbourKey) -> None:
        """Ask for a neighbour, unless an administrator has set it."""
        if not is_fixed(self._mirror.neighbours.get(key)):
            self._sought.pop(key, None)
            self._to_ask[key] = self._is_kept(key)
            self._to_let_go.discard(key)

    def ask_unless_asked(self, key: NeighbourKey, *, keep: bool) -> None:
        """Ask for a neighbour that was not asked for yet, or not to be kept."""
        asked = self._asked.get(key)
        if asked is None or asked.is_kept < keep:
            self.ask(key)

    def ask_for_packets(self, key: NeighbourKey, now: float) -> None:
        """Ask for a neighbour that packets wait for, but not in haste."""
        asked = self._asked.get(key)
        if asked is None or now - asked.at_s >= _ASK_AGAIN_S:
            self.ask(key)

    def seek(self, key: NeighbourKey, now: float) -> None:
        """Ask for a stranger that packets wait for, but not in haste. Of too many the earliest is given up."""
        at_s = self._sought.get(key)
        if (at_s is not None and now - at_s < _ASK_AGAIN_S) or is_fixed(self._mirror.neighbours.get(key)):
            return
        self._sought.pop(key, None)
        if len(self._sought) >= SOUGHT:
            self._give_up(next(iter(self._sought)))
        self._sought[key] = now
        self._to_ask[key] = False
        self._to_let_go.discard(key)

    def is_sought(self, key: NeighbourKey) -> bool:
        """Return whether packets wait for this stranger."""
        return key in self._sought

    def has_found(self, key: NeighbourKey) -> bool:
        """Return whether a neighbour was sought; from now on it is one of those that rows want."""
        at_s = self._sought.pop(key, None)
        if at_s is not None:
            self._asked[key] = _Asked(is_kept=False, at_s=at_s, wait_s=RECHECK_S)
        return at_s is not None

    def give_back(self, keys: Iterable[NeighbourKey]) -> None:
        """Give entries that nobody needs back to the kernel."""
        self._to_let_go.update(keys)

    def _give_up(self, key: NeighbourKey) -> None:
        del self._sought[key]
        if self._to_ask.pop(key, None) is None:  # else nobody has asked yet
            self._to_let_go.add(key)

    def settle(self, key: NeighbourKey) -> None:
        """Give a neighbour back to the kernel when nothing, or nothing that keeps it, needs it any more."""
        need = self._need_of(key)
        if need is Need.NOTHING:
            self._to_ask.pop(key, None)
        asked = self._asked.get(key)
        if asked is not None and (need is Need.NOTHING or asked.is_kept > (need is Need.KEPT)):
            self._to_let_go.add(key)

    def let_go_of_the_rest(self) -> None:
        """Give back every neighbour that is kept for nothing: a predecessor may have left some."""
        self._to_let_go.update(key for key, asked in self._asked.items() if asked.is_kept and not self._is_kept(key))

    def let_go_all(self) -> None:
        """Give all that was asked for back to the kernel's own ageing, a predecessor's entries included."""
        ours = [ifindex for ifindex in self._mirror.interfaces if self._mirror.is_ours(ifindex)]
        self._asked.clear()
        self._sought.clear()
        self._to_ask.clear()
        self._to_let_go.clear()
        with contextlib.suppress(OSError):
            self._asker.let_go(left_with_the_kernel(self._asker.neighbours(), ours))

    # What the kernel tells.

    def adopt(self, key: NeighbourKey, now: float) -> None:
        """Remember an entry that the kernel keeps for us already."""
        if key not in self._asked:
            self._asked[key] = _Asked(is_kept=True, at_s=now)

    def leave_adopted(self) -> None:
        """Ask for nothing that was adopted: what a predecessor had kept stays so until it is known who is wanted."""
        for key in self._asked:
            self._to_ask.pop(key, None)

    def forget(self, key: NeighbourKey) -> None:
        """Forget that an entry was asked for which is gone: whoever still needs it asks anew."""
        self._asked.pop(key, None)
        self._sought.pop(key, None)

    # As time goes by.

    def look_again(self, now: float) -> None:
        """Ask again for some neighbours: those the kernel does not manage, and those that did not answer.

        Strangers that did not are given up.
        """
        while self._sought and now - self._sought[first := next(iter(self._sought))] >= SEEK_S:
            self._give_up(first)
        if not self._recheck:
            self._recheck = list(self._asked)
        for key in self._recheck[-_RECHECKS:]:
            asked = self._asked.get(key)
            if asked is None or now - asked.at_s < asked.wait_s:
                continue
            neighbour = self._mirror.neighbours.get(key)
            if neighbour is not None and neighbour.is_managed:
                asked.at_s = now
            elif self._need_of(key) is not Need.NOTHING:
                self.ask(key)
        del self._recheck[-_RECHECKS:]

    def flush(self, now: float) -> None:
        """Send what was decided to the kernel."""
        if self._to_let_go:
            self._let_go()
        if not self._to_ask:
            return
        to_ask, self._to_ask = self._to_ask, {}
        for keep in (True, False):
            keys = [key for key, kept in to_ask.items() if kept is keep]
            for key in keys:
                if key not in self._sought:
                    self._asked[key] = _Asked(keep, now, self._wait_s(key))
            for key, code in (self._asker.resolve(keys, keep=keep) if keys else {}).items():
                reason = errno.errorcode.get(code, str(code))
                _log.debug("neighbour %s on interface %d: not asked for (%s)", address_of(key[1]), key[0], reason)
                if key in self._asked:
                    self._asked[key].wait_s = RETRY_S

    def _let_go(self) -> None:
        let_go, self._to_let_go = self._to_let_go, set()
        for key in let_go:
            self._asked.pop(key, None)
        with contextlib.suppress(OSError):
            self._asker.let_go(let_go)
        for key in let_go:  # still used, but no longer kept: a client's from now on
            need = self._need_of(key)
            if need >= Need.CLIENT:
                self._to_ask.setdefault(key, need is Need.KEPT)

    def _is_kept(self, key: NeighbourKey) -> bool:
        return self._need_of(key) is Need.KEPT

    def _wait_s(self, key: NeighbourKey) -> float:
        """Return when to look at a neighbour again that is asked for now."""
        if is_usable(self._mirror.neighbours.get(key)):
            return RECHECK_S
        asked = self._asked.get(key)
        return min(2 * asked.wait_s, LONGEST_RETRY_S) if asked and asked.wait_s != RECHECK_S else RETRY_S
