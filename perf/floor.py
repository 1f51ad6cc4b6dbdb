"""What memory alone costs: `python -m perf.floor [--flows N..] [--trials N]`.

A program that does nothing but read and write cache lines of a packet's flow, in memory as large as the table of so
many connections (both directions, 80 % full). A known flow needs one line, its record; a new one four: a record and a
bucket of tags for each direction. Their misses overlap, with those of the next packets, too, unless the lines are read
in turn: a quarter of that is what a line costs that is waited for.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from statistics import median
from typing import NamedTuple

from perf import front
from perf.traffic import PROGRAMS, Words
from xdp import loader

# What is measured: lines, and whether each is waited for.
KINDS = ((1, False), (4, False), (4, True))
_LINE_WORDS = 8


class Floor(NamedTuple):
    """Net nanoseconds per packet, trial by trial, of so many lines."""

    flows: int
    lines: int
    in_turn: bool
    nets_ns: tuple[float, ...]

    @property
    def name(self) -> str:
        """The lines, in words."""
        return ("1 line" if self.lines == 1 else f"{self.lines} lines") + ", in turn" * self.in_turn


def measure(flows: int, lines: int, *, in_turn: bool = False, trials: int = 10) -> Floor:
    """Return what reading and writing so many lines costs each packet, with so many flows."""
    with front.loaded(flows, front.Kind()) as made, ExitStack() as stack:
        memory = Words(made.folder, "lines", max(flows * 5 // 2, 1), _LINE_WORDS)
        stack.callback(memory.close)
        program = loader.load(made.folder, PROGRAMS / "touch.c", "touch", {"TOUCHED": lines, "IN_TURN": int(in_turn)})
        stack.callback(os.close, program)
        pairs = [made.pair_ns(program) for _ in range(trials)]
        touched, expected = int(memory.rows[:, 0].sum()), trials * front.PACKETS * lines
        if touched != expected:
            raise AssertionError(f"{touched} of {expected} lines were written: this measures something else")
    return Floor(flows, lines, in_turn, tuple(mine - base for base, mine in pairs))


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m perf.floor", description="what cold memory costs a packet")
    parser.add_argument("--flows", type=int, nargs="+", default=[1, 1000, 16_384, 100_000, 500_000, 1_000_000])
    parser.add_argument("--trials", type=int, default=10)
    arguments = parser.parse_args()
    print(f"{'flows':>9}  {'memory':<16}{'net ns':>6}  {'range':>12}")
    for flows in arguments.flows:
        for lines, in_turn in KINDS:
            found = measure(flows, lines, in_turn=in_turn, trials=arguments.trials)
            spread = f"{min(found.nets_ns):.0f} to {max(found.nets_ns):.0f}"
            print(f"{flows:>9,}  {found.name:<16}{median(found.nets_ns):>6.0f}  {spread:>12}", flush=True)


if __name__ == "__main__":
    main()
