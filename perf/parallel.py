"""What two CPUs do together that one does alone: `python -m perf.parallel [--trials N]`.

As perf.cost, but on one CPU and then on two at once, each with flows of its own, as with a NIC of two queues.
What shares a cache line for writing shows as less than twice the rate. Two CPUs that are halves of one core show it
with the bare program, too: that is the ceiling.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Sequence
from statistics import median

from perf import cost
from perf.bed import Cpus
from perf.front import PACKETS, Front, Kind
from perf.traffic import Traffic
from xdp.errors import MissingFeatureError
from xdp.schema import Reason

FLOWS = 4 * int(Traffic.SOURCE_PORTS)


def measure(flows: int = FLOWS, trials: int = 5) -> tuple[list[float], list[float]]:
    """Return the speed-ups of (turnout's program, the bare program), trial by trial. Error: there is one CPU only."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        raise MissingFeatureError("two CPUs are needed to compare them with one")
    ups: tuple[list[float], list[float]] = ([], [])
    with cost.bench(flows, Kind(), cpus=2) as bench:
        for _ in range(trials):
            for program, mine in zip((bench.ours, bench.front.bare), ups, strict=True):
                bench.front.call(program)
                alone = [_rate(_run_on(bench.front, [cpu])) for cpu in cpus]
                mine.append(_rate(_run_on(bench.front, cpus)) / (sum(alone) / 2))
        cost.need_counted(bench.shared.tables, Reason.FORWARDED, trials * 4 * PACKETS)
    return ups


def _rate(nanoseconds: Sequence[float]) -> float:
    return sum(1e9 / each for each in nanoseconds)


def _run_on(front: Front, cpus: Sequence[int]) -> list[float]:
    """Run the front program on these CPUs at once; return the nanoseconds per packet of each."""
    taken: list[float] = []
    together = threading.Barrier(len(cpus))

    def body(cpu: int) -> None:
        with Cpus.pinned({cpu}):
            together.wait()
            taken.append(front.run_ns())

    threads = [threading.Thread(target=body, args=(cpu,)) for cpu in cpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m perf.parallel", description="two CPUs against one")
    parser.add_argument("--trials", type=int, default=5)
    ours, bare = measure(trials=parser.parse_args().trials)
    print(f"two CPUs do {median(ours):.2f} times what one does (the bare program: {median(bare):.2f})")


if __name__ == "__main__":
    main()
