"""Frames that wait in a packet loop: for a neighbour to answer, or for the first fragment of their datagram.

For either as many as HELD, so that one kind does not take the other's room; a second, or half a minute. The one that
came first makes room for one more: who is silent, or sends pieces only, may fill all places, but a neighbour that
answers does so before they are filled again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xdp.atomic import load_acquire
from xdp.bundle import Bundle
from xdp.jit import inlined
from xdp.schema import Limit, Reason

HELD = 64  # frames of a queue that wait for the same kind of thing, at most
ROOM = 2 * HELD

_LIFE_S = int(Limit.FRAGMENT_S)
_ALONE, _QUEUE = int(Reason.FRAGMENT_ALONE), int(Reason.NEXT_HOP_QUEUE)


@dataclass(frozen=True, eq=False)
class Held(Bundle):
    """What is known of the frames that wait, in the first `count[0]` of ROOM places. The frames are the loop's."""

    since: npt.NDArray[np.uint32]  # jiffies
    reason: npt.NDArray[np.int64]  # what they wait for
    count: npt.NDArray[np.int64]
    epoch: npt.NDArray[np.uint32]  # [0]: that of the last try
    turn: npt.NDArray[np.int64]  # [0]: the place to look at first for one that makes room


def new_held() -> Held:
    """Return the places of a loop, nobody in them."""
    return Held(
        since=np.zeros(ROOM, np.uint32),
        reason=np.zeros(ROOM, np.int64),
        count=np.zeros(1, np.int64),
        epoch=np.zeros(1, np.uint32),
        turn=np.zeros(1, np.int64),
    )


@inlined
def place_for(held, reason):
    """Return the place for one more frame that waits for `reason`. Somebody may be in it, who has to go: see `refusal`.

    Frames that wait for the same kind of thing go by turns, so nearly in the order in which they came: jiffies are too
    coarse to say who was first. What a frame waits for may become another kind of thing, so of one kind there may be
    more than HELD, and of the other none: then anybody goes.
    """
    count, turn = held.count[0], held.turn[0]
    alike, first, next_one = 0, np.int64(-1), np.int64(-1)
    for place in range(count):
        if (held.reason[place] == _ALONE) == (reason == _ALONE):
            alike += 1
            if first < 0:
                first = place
            if next_one < 0 and place >= turn:
                next_one = place
    if alike < HELD and count < ROOM:
        return count
    place = max(first, 0) if next_one < 0 else next_one
    held.turn[0] = place + 1
    return place


@inlined
def put(held, place, reason, since):
    """Note who waits in a place that `place_for` has returned."""
    held.since[place] = since
    held.reason[place] = reason
    if place == held.count[0]:
        held.count[0] = place + 1


@inlined
def refusal(reason):
    """Return what a frame is dropped for that finds no room, or has to make it."""
    return np.int64(_ALONE) if reason == _ALONE else np.int64(_QUEUE)


@inlined
def is_patient(node, reason, since, now):
    """Tell whether a frame goes on waiting."""
    hertz = np.int32(node.tables.control[0].hertz)
    return np.int32(now - since) < (np.int32(_LIFE_S * hertz) if reason == _ALONE else hertz)


@inlined
def nap_ms(held, longest):
    """Return how long a loop may sleep with what waits: `longest`, if nothing does.

    A neighbour's answer is waited for by the millisecond. A first fragment wakes the loop itself, or, where it comes to
    another one, has the others follow a little later: somebody who sends pieces only is not to keep us awake.
    """
    nap = np.int64(longest)
    for place in range(held.count[0]):
        nap = min(nap, np.int64(20) if held.reason[place] == _ALONE else np.int64(1))
    return nap


@inlined
def has_news(node, held):
    """Tell whether something has come since the last time that makes it worth while to try again what waits."""
    epoch = node.tables.control[0].next_hop_epoch + np.uint32(load_acquire(node.fragments.begun, 0))
    has_changed = epoch != held.epoch[0]
    held.epoch[0] = epoch
    return has_changed
