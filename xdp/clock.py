"""The kernel's jiffies, read from userspace: the clock of last-seen times and heartbeats.

XDP reads `bpf_jiffies64()`, which costs 2 to 6 ns where `bpf_ktime_get_ns` costs 34. Userspace has no jiffies, but
CLOCK_MONOTONIC_COARSE moves with the same tick: a two-instruction program asks the kernel for the number now and then,
and in between the coarse clock is counted on. Only the lower 32 bits are kept; differences are signed.
"""

from __future__ import annotations

import struct
import time
from typing import Protocol

import numpy as np
import numpy.typing as npt

from xdp import kernel

# struct bpf_insn: call helper 118 (bpf_jiffies64), exit. The run's result is the lower half of r0.
_JIFFIES = struct.pack("<BBhi", 0x85, 0, 0, 118) + struct.pack("<BBhi", 0x95, 0, 0, 0)
_FRAME = bytes(14)
_KNOWN_HERTZ = (100, 250, 300, 1000)
_MEASURE_S = 0.05
_CLOCK_MONOTONIC_COARSE = 6  # linux/time.h; Python does not name it

# Words of `Clock.words`: what compiled code needs to tell the jiffies.
BASE_NS, BASE_JIFFIES, HERTZ = 0, 1, 2


class Clock(Protocol):
    """Where time comes from. `words` (i64: coarse ns, the jiffies then, hertz) serve compiled code."""

    hertz: int
    words: npt.NDArray[np.int64]

    def now(self) -> int:
        """Return the lower 32 bits of the jiffies."""
        ...


def _coarse_ns() -> int:
    return time.clock_gettime_ns(_CLOCK_MONOTONIC_COARSE)


class JiffyClock:
    """The kernel's own jiffies; needs the privilege to load a program."""

    def __init__(self) -> None:
        self._program = kernel.prog_load("jiffies", _JIFFIES)
        self.words = np.zeros(8, np.int64)
        first_ns, first = time.monotonic_ns(), self.now()
        time.sleep(_MEASURE_S)
        ticks, passed_s = (self.now() - first) & 0xFFFFFFFF, (time.monotonic_ns() - first_ns) / 1e9
        self.hertz = min(_KNOWN_HERTZ, key=lambda hertz: abs(hertz - ticks / passed_s))
        self.words[HERTZ] = self.hertz
        self.calibrate()

    def now(self) -> int:
        """Return the lower 32 bits of the jiffies, from the kernel."""
        return kernel.prog_test_run(self._program, _FRAME, out_size=64)[0] & 0xFFFFFFFF

    def calibrate(self) -> None:
        """Take a new base for compiled code: called once a second or so, against the drift of two clocks."""
        while True:
            before = _coarse_ns()
            jiffies = self.now()
            if _coarse_ns() == before:  # no tick in between
                break
        # One writer, and a reader that sees one new word and one old is wrong by a tick at most.
        self.words[BASE_JIFFIES] = jiffies
        self.words[BASE_NS] = before


class ManualClock:
    """A clock for tests: it stands until it is told to move."""

    def __init__(self, hertz: int = 250, start_s: float = 1000.0) -> None:
        self.hertz = hertz
        self.words = np.zeros(8, np.int64)
        self._now = round(start_s * hertz)

    def now(self) -> int:
        """Return the time in jiffies."""
        return self._now & 0xFFFFFFFF

    def advance(self, seconds: float) -> None:
        """Move on by `seconds`."""
        self._now += round(seconds * self.hertz)
