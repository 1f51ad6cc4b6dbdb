"""What it takes to wake a thread: `python -m perf.wake [--wakes N] [--every US]`.

A first packet is punted to a packet loop that sleeps, as it does on a node with nothing else to do. Here a thread reads
an eventfd that another one, on another CPU, writes to: from before it writes until the reader runs. A first packet
cannot be quicker than that, whatever is done with it then.
"""

from __future__ import annotations

import argparse
import os
import threading

import numpy as np
import numpy.typing as npt

from dataplane.libc import monotonic_ns, write
from perf.bed import Cpus
from xdp.atomic import load_acquire, store_release
from xdp.intrinsics import External
from xdp.jit import compiled

# ssize_t read(int fd, void *buf, size_t len)
_read = External("read", "int64(int32, uintp, uint64)")


@compiled
def _sleep(fd, room, due, delays):
    """Read `fd` again and again; fill `delays` (i64 ns) with how long after `due[0]` this thread ran."""
    for number in range(len(delays)):
        if _read(fd, room.ctypes.data, np.uint64(8)) != 8:
            return number
        delays[number] = monotonic_ns() - np.int64(load_acquire(due, 0))
        store_release(due, 0, np.uint64(0))
    return len(delays)


@compiled
def _wake(fd, one, due, wakes, every_ns):
    """Write to `fd` so many times, one every so often; the reader has fallen asleep again by then."""
    start = monotonic_ns()
    for number in range(wakes):
        while monotonic_ns() < start + (number + 1) * every_ns or load_acquire(due, 0) != 0:
            pass
        store_release(due, 0, np.uint64(monotonic_ns()))
        if write(fd, one.ctypes.data, np.uint64(8)) != 8:
            return number
    return wakes


def measure(wakes: int = 10_000, every_us: int = 500) -> npt.NDArray[np.float64]:
    """Return how many microseconds each of so many wakes took."""
    cpus, due, delays = Cpus(), np.zeros(1, np.uint64), np.zeros(wakes, np.int64)
    fd = os.eventfd(0)
    try:
        _sleep(fd, np.zeros(1, np.uint64), due, delays[:0])  # compiles
        _wake(fd, np.ones(1, np.uint64), due, 0, every_us * 1000)

        def sleep() -> None:
            with Cpus.pinned(cpus.others):
                _sleep(fd, np.zeros(1, np.uint64), due, delays)

        sleeper = threading.Thread(target=sleep)
        sleeper.start()
        with Cpus.pinned(cpus.generator):
            _wake(fd, np.ones(1, np.uint64), due, wakes, every_us * 1000)
        sleeper.join()
    finally:
        os.close(fd)
    return delays / 1000


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m perf.wake", description="what it takes to wake a thread")
    parser.add_argument("--wakes", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=500, metavar="US")
    arguments = parser.parse_args()
    took_us = measure(arguments.wakes, arguments.every)
    for name, share in (("p50", 50), ("p90", 90), ("p99", 99), ("p99.9", 99.9)):
        print(f"{name:>6}  {np.percentile(took_us, share):>7.1f} us")


if __name__ == "__main__":
    main()
