"""How long a packet loop looks for frames before it sleeps: as long as the next one is likely to come meanwhile.

Who punts a frame to a sleeper has to wake it up, which takes several microseconds of the CPU that receives, and many
more until the sleeper runs. So a loop that is woken soon after it fell asleep looks on for longer the next time, up to
MOST_NS; one that sleeps for longer than that, for half as long. As KVM does it for processors that halt (Linux,
Documentation/virt/kvm/halt-polling.rst).
"""

from __future__ import annotations

import numpy as np

from dataplane.libc import monotonic_ns
from xdp.jit import inlined

IDLING = np.dtype([("since", "i8"), ("patience", "i8")])  # when frames stopped to come, and how long to look on, in ns
TURNS = 32  # empty ones, about 3 us, that a loop makes in any case; a power of two
MOST_NS, _LEAST_NS = 64_000, 8_000
_SELDOM = 15  # of so many turns and one, the clock is looked at in one: it takes a quarter of an empty turn


@inlined
def is_over(idling, empty):
    """Tell whether to sleep, after so many empty turns, TURNS at least."""
    if empty == TURNS:
        idling.since = monotonic_ns()
    if idling.patience == 0:
        return True
    return empty & _SELDOM == 0 and monotonic_ns() - idling.since >= idling.patience


@inlined
def learn(idling, now_ns):
    """Change how long to look on, after a sleep that has ended now."""
    if now_ns - idling.since > MOST_NS:
        idling.patience = idling.patience // 2 if idling.patience > _LEAST_NS else 0
    else:
        idling.patience = min(MOST_NS, max(_LEAST_NS, 2 * idling.patience))
