"""Grace periods from compiled code: who may still be looking at a record that was taken away (docs/adr/0004).

A reader is *in* between `enter` and `leave`, where it may find records and rows and hold them until its `turn` ends.
Outside it holds nothing and nobody waits for it, so a worker leaves before it sleeps. Whoever takes things away asks
who is in (`readers`), and waits until each of those has turned or left (conntrack/table.py).

Each step is one atomic addition, which is a full barrier: what was read before it was done with before it, and what is
read after it is read after it can be seen. With the fence in `readers` no reader is overlooked: either it is seen
to be in, or it sees that the record is gone.
"""

from __future__ import annotations

import numpy as np

from xdp.atomic import fence, fetch_add, load_acquire
from xdp.jit import compiled, inlined

_ONE, _TWO = np.uint64(1), np.uint64(2)


@inlined
def enter(tables, number):
    """Let worker `number`, which was out, look at records from here on."""
    fetch_add(tables.turns, number, _ONE)


@inlined
def turn(tables, number):
    """End a turn of worker `number`: it has let go of all that it found, and goes on looking."""
    fetch_add(tables.turns, number, _TWO)


@inlined
def leave(tables, number):
    """Take worker `number` out: it has let go of all that it found."""
    fetch_add(tables.turns, number, _ONE)


@compiled
def readers(tables, turns):
    """Store the turn of every worker that is in and has a heartbeat in `turns` (u64), 0 for the others.

    What was taken away before the call is not found by those that enter after it.
    """
    fence()
    for number in range(len(turns)):
        word = load_acquire(tables.turns, number)
        is_in = word & _ONE and load_acquire(tables.heartbeats, number)
        turns[number] = word if is_in else np.uint64(0)


@compiled
def have_turned(tables, turns):
    """Return whether each of the `readers` has turned or left since, or lost its heartbeat."""
    for number in range(len(turns)):
        is_there = turns[number] and load_acquire(tables.heartbeats, number)
        if is_there and load_acquire(tables.turns, number) == turns[number]:
            return False
    return True
