"""Measure: `python -m perf --out DIR [--only CASE..] [--quick] [--against REV]`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from perf import measure, report
from perf.against import checked_out
from perf.cases import Case, Point
from perf.cases.every import CASES
from perf.cases.programs import PROGRAMS, Program
from perf.rows import Row
from perf.run import Effort, Run
from perf.subjects import Subject
from perf.subjects.bare import BareAfXdp, BareRedirect
from perf.subjects.iptables import Iptables
from perf.subjects.nftables import Nftables
from perf.subjects.turnout import Turnout
from perf.tuning import raised_conntrack
from xdp.errors import Error, UsageError

_CONNTRACK_ENTRIES = 4_194_304
_CAPACITY = 3_000_000
ENGINES = ("xdp", "afxdp", "raw")
WHOLE, QUICK = (
    Effort(15, 0.5, _CAPACITY),
    Effort(3, 0.12, _CAPACITY, is_quick=True, left_out=frozenset({"iptables-legacy"})),
)
_AS_IS: Any = {"highlight": False, "markup": False, "soft_wrap": True}


def subjects(against: tuple[str, Path] | None = None) -> dict[str, Subject]:
    """Return everything that can be measured, by name. `against`: a commit's name and a folder that has it."""
    ours: list[Subject] = [Turnout(engine, _CAPACITY) for engine in ENGINES]
    if against is not None:
        name, checkout = against
        ours += [Turnout(engine, _CAPACITY, checkout=checkout, suffix=f"@{name}") for engine in ENGINES]
    peers: list[Subject] = [Iptables("nft"), Iptables("legacy"), Nftables(), Nftables(has_flowtable=True)]
    bars: list[Subject] = [BareRedirect(), BareAfXdp()]
    return {subject.name: subject for subject in (*bars, *ours, *peers)}


def choose_cases(names: Sequence[str] | None) -> list[Case | Program]:
    """Return the cases with these names, all without names. Raises UsageError for one that does not exist."""
    every: tuple[Case | Program, ...] = (*CASES, *PROGRAMS)
    known = {case.name: case for case in every}
    for name in names or ():
        if name not in known:
            raise UsageError(f"--only {name}: no such case; the cases are {', '.join(known)}")
    return [case for case in every if not names or case.name in names]


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(
        prog="python -m perf", description="measure turnout beside bare programs, iptables and nftables"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, results.txt and pictures")
    every = ", ".join(case.name for case in (*CASES, *PROGRAMS))
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"of: {every}")
    parser.add_argument(
        "--quick", action="store_true", help="fewer points, fewer and shorter trials: under two minutes"
    )
    parser.add_argument(
        "--against", metavar="REV", help="measure the turnout of this commit beside that of this folder"
    )
    arguments = parser.parse_args()
    # Ended by `kill`, everything is left as it was, as with Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console(stderr=True)
    try:
        cases = choose_cases(arguments.only)
        with ExitStack() as stack:
            other = stack.enter_context(checked_out(arguments.against)) if arguments.against else None
            return run(arguments.out, cases, subjects(other), QUICK if arguments.quick else WHOLE, console)
    except Error as error:
        console.print(str(error), style="red", **_AS_IS)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def run(
    folder: Path, cases: Sequence[Case | Program], known: dict[str, Subject], effort: Effort, console: Console
) -> int:
    """Measure `cases`, write the results into `folder` and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    def told(text: str) -> None:
        console.print(text, style="yellow", **_AS_IS)

    with ExitStack() as stack:
        stack.enter_context(raised_conntrack(_CONNTRACK_ENTRIES))
        runner = stack.enter_context(Run(known, effort, told))
        given = report.conditions(runner.cpus.describe(), machine_was_quiet=measure.quiet())
        progress = stack.enter_context(Progress(*columns, console=console, disable=not console.is_terminal))

        def shown(case: Case | Program) -> Callable[[Point, int], Callable[[], object]]:
            def begin(point: Point, trials: int) -> Callable[[], object]:
                what = [case.name, point.variant, f"{point.load.flows:,} flows" if point.load.new_every != 1 else ""]
                if point.shape.services > 1:
                    what.append(f"{point.shape.services:,} Services")
                task = progress.add_task(", ".join(filter(None, what)), total=trials)
                return lambda: progress.advance(task)

            return begin

        for case in cases:
            if isinstance(case, Program):
                made += case.rows(effort, given, shown(case))
            else:
                for point, trials in runner.measure(case, shown(case)):
                    made += report.rows(case, point, trials, given) if trials else []
            report.write_rows(folder, made)  # a run that is ended early was not for nothing
    questions = {case.name: case.question for case in cases}
    report.write(folder, made, questions)
    print(report.table(made, questions))
    console.print(f"results.json, results.txt and pictures are in {folder}", **_AS_IS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
