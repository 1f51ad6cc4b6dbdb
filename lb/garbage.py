"""Keeping Python's garbage collector out of the way of what stays: a great many objects, and all that a start makes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_MANY = 100_000  # objects: to look at so many takes 10 ms


@contextmanager
def no_collections() -> Iterator[None]:
    """Make no collections meanwhile, and never look at what was made if it is much.

    Of a million young objects none is garbage. Looking takes half of the time, and a second at once later on, while
    packets of new connections wait. What was made still goes when nothing refers to it. But what is garbage by then,
    and refers to itself, stays for ever: so not after every small change.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_count()[0] > _MANY:
            gc.freeze()
        if was_enabled:
            gc.enable()


def leave_alone() -> None:
    """Never look again at what is there now; what is garbage by now goes.

    It takes 10 to 40 ms after a start, which each full collection would take later on, when nobody has chosen it.
    """
    gc.collect()
    gc.freeze()
