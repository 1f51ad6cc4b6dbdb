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
_ONE_MOMENT_NS = 500_000
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
        first_ns, first = self._at_once()
        time.sleep(_MEASURE_S)
        last_ns, last = self._at_once()
        rate = ((last - first) & 0xFFFFFFFF) / ((last_ns - first_ns) / 1e9)
        self.hertz = min(_KNOWN_HERTZ, key=lambda hertz: abs(hertz - rate))
        self.words[HERTZ] = self.hertz
        self.words[BASE_NS] = _coarse_ns()
        self.words[BASE_JIFFIES] = self.now()
        self.calibrate()

    def _at_once(self) -> tuple[int, int]:
        """Return (monotonic ns, jiffies) of one moment: tried again while the two readings lie far apart."""
        while True:
            before = time.monotonic_ns()
            jiffies = self.now()
            if time.monotonic_ns() - before < _ONE_MOMENT_NS:
                return before, jiffies

    def now(self) -> int:
        """Return the lower 32 bits of the jiffies, from the kernel."""
        return kernel.prog_test_run(self._program, _FRAME, out_size=64)[0] & 0xFFFFFFFF

    def calibrate(self) -> None:
        """Correct what compiled code counts from, against the drift of two clocks: called every few seconds.

        Only one word changes, so a reader sees the old base or the new one; they differ by the drift.
        """
        while True:
            before = _coarse_ns()
            jiffies = self.now()
            if _coarse_ns() == before:  # no tick in between
                break
        passed_us = (before - int(self.words[BASE_NS])) // 1000
        self.words[BASE_JIFFIES] = jiffies - passed_us * self.hertz // 1_000_000


class MonotonicClock:
    """CLOCK_MONOTONIC_COARSE in steps of its own: for engines without BPF. The same after a restart of the daemon."""

    hertz = 250

    def __init__(self) -> None:
        self.words = np.zeros(8, np.int64)
        self.words[HERTZ] = self.hertz

    def now(self) -> int:
        """Return the lower 32 bits of the number of steps since the machine was booted."""
        return _coarse_ns() // 1000 * self.hertz // 1_000_000 & 0xFFFFFFFF

    def calibrate(self) -> None:
        """Nothing: there is only one clock."""


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
