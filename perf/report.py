"""Results as rows and as a table that says what the numbers mean."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perf import pictures
from perf.cases import Case, Point
from perf.measure import Outcome, paired_ratios, spread
from perf.rows import Row
from perf.traffic import least_frame

_ROOT = Path(__file__).resolve().parent.parent
_FRAME_CHECK_SEQUENCE = 4
_MIXED_BYTES = (7 * 64 + 4 * 594 + 1518) / 12
_WAITED_LIMIT = 0.05
FULL_SPEED = "as fast as generated"
IPTABLES = "iptables-nft"


def conditions(receiver: str, *, machine_was_quiet: bool) -> dict[str, Any]:
    """Return what is the same for all rows of a run: kernel, commit, CPUs and who ran where."""
    return {
        "kernel": platform.release(),
        "commit": commit(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count() or 1,
        "receiver": receiver,
        "machine_was_quiet": machine_was_quiet,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str:
    """Return the version that was measured, `+` when the checkout had changes; `unknown` without git."""
    try:
        command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty=+", "--abbrev=10"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_model() -> str:
    """Return what the CPU calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def rows(case: Case, point: Point, trials: Mapping[str, Sequence[Outcome]], given: Mapping[str, Any]) -> list[Row]:
    """Return a row for each subject, and each number that a trial found, of one measurement."""
    return [
        _row(case, point, subject, name, trials, given) for subject, done in trials.items() for name in done[0].values
    ]


def _row(
    case: Case, point: Point, subject: str, name: str, trials: Mapping[str, Sequence[Outcome]], given: Mapping[str, Any]
) -> Row:
    done = trials[subject]

    def ratio(to: str | None) -> tuple[float | None, tuple[float, float] | None]:
        others = trials.get(to or "")
        if not others or any(not other.values.get(name) for other in others):
            return None, None
        of = paired_ratios(done, others, name)
        return round(of.median, 4), (round(of.low, 4), round(of.high, 4))

    value = spread([trial.values[name] for trial in done])
    bare, bare_spread = ratio(case.bare)
    iptables, iptables_spread = ratio(IPTABLES)
    against, against_spread = ratio(next((other for other in trials if other.startswith(f"{subject}@")), None))
    return Row(
        case=case.name,
        variant=", ".join(filter(None, (point.variant, name))),
        subject=subject,
        flows=0 if point.load.new_every == 1 else point.load.flows,
        services=point.shape.services,
        packet_bytes=_packet_bytes(point),
        value=_rounded(value.median),
        unit=case.unit(name),
        low=_rounded(value.low),
        high=_rounded(value.high),
        spread=round(value.relative, 4),
        trials=len(done),
        loss=round(max(trial.loss for trial in done), 6),
        steal=round(max(trial.steal for trial in done), 4),
        waited=round(spread([trial.waited for trial in done]).median, 4),
        ratio_to_bare=bare,
        ratio_to_bare_spread=bare_spread,
        ratio_to_iptables=iptables,
        ratio_to_iptables_spread=iptables_spread,
        ratio_to_against=against,
        ratio_to_against_spread=against_spread,
        mode=case.kind.mode,
        frames=sum(trial.sent for trial in done),
        **given,
    )


def _packet_bytes(point: Point) -> int:
    if point.load.is_mixed:
        return round(_MIXED_BYTES)
    return _FRAME_CHECK_SEQUENCE + max(point.load.frame_bytes, least_frame(point.shape.family, point.shape.vlan))


def _rounded(value: float) -> float:
    return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")


def write_rows(folder: Path, made: Sequence[Row]) -> None:
    """Write results.json into `folder`."""
    (folder / "results.json").write_text(json.dumps([asdict(row) for row in made], indent=1) + "\n")


def write(folder: Path, made: Sequence[Row], questions: Mapping[str, str]) -> None:
    """Write results.json, results.txt and the pictures into `folder`. `questions` by case."""
    write_rows(folder, made)
    (folder / "results.txt").write_text(table(made, questions))
    pictures.draw(folder, made)


def is_undisturbed(made: Sequence[Row]) -> bool:
    """Return whether the machine was ours: quiet at the start, and bare programs' generators never had to wait.

    With the other subjects the generator also waits for the kernel's own packet thread, which is part of the work.
    """
    return all(
        row.machine_was_quiet and (row.subject != "bare-xdp" or row.mode != FULL_SPEED or row.waited <= _WAITED_LIMIT)
        for row in made
    )


_LINE = "  {:>9} {:>8} {:20} {:18} {:>11} {:>17} {:>7} {:>6} {:>6}"


def table(made: Sequence[Row], questions: Mapping[str, str]) -> str:
    """Return the results as text, with what they mean."""
    lines: list[str] = []
    for case in dict.fromkeys(row.case for row in made):
        of_case = [row for row in made if row.case == case]
        lines += [f"{case}: {questions.get(case, '')}", ""]
        has_other = any(row.ratio_to_against for row in of_case)
        head = ("flows", "services", "", "subject", "value", "quartiles", "loss", "/bare", "/ipt")
        lines.append(_LINE.format(*head) + (" /other" if has_other else ""))
        lines += [_line(row) + (f" {_times(row.ratio_to_against):>6}" if has_other else "") for row in of_case]
        lines.append("")
    if made:
        first = made[0]
        trials = "medians of {} to {} interleaved trials".format(*_range([row.trials for row in made]))
        quiet = "" if is_undisturbed(made) else " The machine was busy with other things: do not quote this."
        told = (
            f"Conditions: UDP of 64 bytes where nothing else is said, over veth pairs in native XDP mode;"
            f" {first.receiver}; {trials}; Linux {first.kernel}, {first.cpu}, {first.cpus} CPUs;"
            f" turnout {first.commit}.{quiet} /bare and /ipt are this number over that of the bare program and of"
            f" {IPTABLES}, paired by round. A rate includes generating and receiving each frame, which cost the same"
            " for every subject: the ratios are the result, the absolute numbers are this machine's."
        )
        lines += [*textwrap.wrap(told, 100), ""]
    return "\n".join(lines)


def _range(numbers: Sequence[int]) -> tuple[int, int]:
    return min(numbers), max(numbers)


def _line(row: Row) -> str:
    million = row.unit == "packets/s"
    scale, unit = (1e6, "M/s") if million else (1000, "k/s") if row.unit == "connections/s" else (1, row.unit)
    value, low, high = (f"{number / scale:.3g}" for number in (row.value, row.low, row.high))
    flows = f"{row.flows:,}" if row.flows else "new"
    loss = f"{row.loss:.2%}" if row.loss else "-"
    ratios = (_times(row.ratio_to_bare), _times(row.ratio_to_iptables))
    return _LINE.format(
        flows, f"{row.services:,}", row.variant, row.subject, f"{value} {unit}", f"{low} to {high}", loss, *ratios
    )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g}"
