"""Frames that wait in a packet loop: for a neighbour to answer, or for the first fragment of their datagram.

For either as many as HELD, so that one kind does not take the other's room; a second, or half a minute.
"""

from __future__ import annotations

import numpy as np

from xdp.atomic import load_acquire
from xdp.jit import inlined
from xdp.schema import Limit, Reason

HELD = 64  # frames of a queue that wait for the same kind of thing, at most
ROOM = 2 * HELD

_LIFE_S = int(Limit.FRAGMENT_S)
_ALONE, _QUEUE = int(Reason.FRAGMENT_ALONE), int(Reason.NEXT_HOP_QUEUE)


@inlined
def has_room(reasons, count, reason):
    """Tell whether one more frame may wait for `reason`; `reasons` are those of the `count` that wait."""
    alike = 0
    for place in range(count):
        alike += (reasons[place] == _ALONE) == (reason == _ALONE)
    return alike < HELD


@inlined
def refusal(reason):
    """Return what a frame is dropped for that finds no room."""
    return np.int64(_ALONE) if reason == _ALONE else np.int64(_QUEUE)


@inlined
def patience(node, reason):
    """Return how long a frame waits, in jiffies."""
    hertz = np.int32(node.tables.control[0].hertz)
    return np.int32(_LIFE_S * hertz) if reason == _ALONE else hertz


@inlined
def nap_ms(reasons, count, longest):
    """Return how long a loop may sleep with `count` waiting frames: `longest`, if there are none.

    A neighbour's answer is waited for by the millisecond. A first fragment wakes the loop itself, or, where it comes to
    another one, has the others follow a little later: somebody who sends pieces only is not to keep us awake.
    """
    nap = np.int64(longest)
    for place in range(count):
        nap = min(nap, np.int64(20) if reasons[place] == _ALONE else np.int64(1))
    return nap


@inlined
def epoch(node):
    """Return what grows when it is worth while to try again what waits."""
    return node.tables.control[0].next_hop_epoch + np.uint32(load_acquire(node.fragments.begun, 0))
