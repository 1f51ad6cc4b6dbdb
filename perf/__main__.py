"""Measure: `python -m perf --out DIR [--only CASE..] [--quick]`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from perf import measure, report
from perf.measure import Case, Trial
from perf.subjects import BareAfXdp, BareRedirect, Cpus, Iptables, Subject, Testbed, Turnout, raised_conntrack
from perf.traffic import Traffic
from xdp.errors import Error, MissingFeatureError, UsageError

CASES = (
    Case(
        "established",
        ("bare-xdp", "turnout-xdp", "iptables"),
        (1, 1_000, 100_000),
        False,
        "bare-xdp",
        "how close is the forwarding of known flows to an XDP program that only redirects?",
    ),
    Case(
        "new-flows",
        ("bare-afxdp", "turnout-xdp", "iptables"),
        (0,),
        True,
        "bare-afxdp",
        "every packet begins a flow: how close is the decision in userspace to a loop that only forwards?",
    ),
    Case(
        "afxdp",
        ("bare-afxdp", "turnout-afxdp"),
        (1_000,),
        True,
        "bare-afxdp",
        "all in userspace: how close is the pipeline to a loop that only forwards?",
    ),
)
_FRAME_CHECK_SEQUENCE = 4
_CONNTRACK_ENTRIES = 4_194_304
_CAPACITY = 3_000_000
_AS_IS: Any = {"highlight": False, "markup": False, "soft_wrap": True}


def subjects() -> dict[str, Subject]:
    """Return everything that can be measured, by name."""
    every: Sequence[Subject] = (
        BareRedirect(),
        BareAfXdp(),
        Iptables(),
        Turnout("xdp", _CAPACITY),
        Turnout("afxdp", _CAPACITY),
    )
    return {subject.name: subject for subject in every}


def choose_cases(names: Sequence[str] | None) -> list[Case]:
    """Return the cases with these names, all without names. Raises UsageError for one that does not exist."""
    known = {case.name: case for case in CASES}
    for name in names or ():
        if name not in known:
            raise UsageError(f"--only {name}: no such case; the cases are {', '.join(known)}")
    return [case for case in CASES if not names or case.name in names]


def open_beds(wanted: Sequence[str], stack: ExitStack, cpus: Cpus, console: Console) -> dict[str, Testbed]:
    """Start a testbed with each subject; one that this machine cannot have is named and left out."""
    known, beds = subjects(), {}
    for name in wanted:
        with ExitStack() as mine:
            try:
                bed = mine.enter_context(Testbed(f"turnout-perf-{name}", cpus))
                mine.enter_context(known[name].running(bed))
                measure.check(known[name], bed)
            except MissingFeatureError as error:
                if os.geteuid() != 0:
                    raise
                console.print(f"left out: {error}", style="yellow", **_AS_IS)
                continue
            except (Error, ImportError) as error:
                console.print(f"left out: {name}: {error}", style="red", **_AS_IS)
                continue
            beds[name] = bed
            stack.push(mine.pop_all())
    return beds


def run_case(
    case: Case, flows: int, beds: Mapping[str, Testbed], rounds: int, seconds: float, tick: Progress, task: int
) -> dict[str, list[Trial]]:
    """Warm every bed up, then measure them in turns."""
    names = [name for name in case.subjects if name in beds]
    most_new = _CAPACITY // 2 // (rounds + 2)
    for name in names:
        beds[name].prepare(flows)

    def trial(name: str) -> Trial:
        return measure.measure(case, beds[name], seconds, most_new)

    return measure.interleaved(names, rounds, trial, lambda: tick.advance(task))  # type: ignore[arg-type]


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(
        prog="python -m perf", description="measure turnout beside iptables and bare programs"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, results.txt and rates.png")
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"of: {', '.join(case.name for case in CASES)}")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter trials: under two minutes")
    arguments = parser.parse_args()
    # Ended by `kill`, everything is left as it was, as with Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console(stderr=True)
    try:
        return run(arguments.out, choose_cases(arguments.only), arguments.quick, console)
    except Error as error:
        console.print(str(error), style="red", **_AS_IS)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def run(folder: Path, cases: Sequence[Case], quick: bool, console: Console) -> int:
    """Measure `cases`, write the results into `folder` and print the table."""
    rounds, seconds = (5, 0.25) if quick else (15, 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    cpus = Cpus()
    made: list[report.Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ExitStack() as stack:
        stack.enter_context(raised_conntrack(_CONNTRACK_ENTRIES))
        wanted = list(dict.fromkeys(name for case in cases for name in case.subjects))
        beds = open_beds(wanted, stack, cpus, console)
        stack.enter_context(cpus.pinned(cpus.generator))
        given = report.conditions(cpus.describe(), measure.quiet())
        progress = stack.enter_context(Progress(*columns, console=console, disable=not console.is_terminal))
        for case in cases:
            for flows in case.flows:
                here = [name for name in case.subjects if name in beds]
                what = f"{case.name}, {flows:,} flows" if flows else case.name
                task = progress.add_task(what, total=rounds * len(here))
                trials = run_case(case, flows, beds, rounds, seconds, progress, task)
                bytes_on_wire = int(Traffic.FRAME_BYTES) + _FRAME_CHECK_SEQUENCE
                made += report.rows(case, flows, trials, given, bytes_on_wire)
    report.write(folder, made, cases)
    print(report.table(made, cases))
    console.print(f"results.json, results.txt and rates.png are in {folder}", **_AS_IS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
