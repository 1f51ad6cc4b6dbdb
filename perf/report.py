"""Results as rows, as a picture and as a table that says what the numbers mean."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perf.measure import Case, Spread, Trial, ratios, spread

_ROOT = Path(__file__).resolve().parent.parent
# Distinguishable without colour: marker, line and grey.
_STYLES = {
    "bare-xdp": {"marker": "o", "linestyle": "-", "color": "0.0", "hatch": ""},
    "turnout-xdp": {"marker": "s", "linestyle": "--", "color": "0.3", "hatch": "//"},
    "iptables": {"marker": "^", "linestyle": ":", "color": "0.5", "hatch": ".."},
    "bare-afxdp": {"marker": "D", "linestyle": "-", "color": "0.6", "hatch": "xx"},
    "turnout-afxdp": {"marker": "v", "linestyle": "-.", "color": "0.75", "hatch": "\\\\"},
}
_WAITED_LIMIT = 0.05
_PLAIN = {"marker": "x", "linestyle": "-", "color": "0.4", "hatch": ""}


@dataclass(frozen=True)
class Row:
    """One number with its circumstances, as in results.json. `low` and `high` are quartiles; ratios are of pairs."""

    case: str
    subject: str
    flows: int  # 0: every packet began a flow
    services: int
    packet_bytes: int
    value: float
    unit: str
    low: float
    high: float
    spread: float  # high - low as a share of the value
    trials: int
    loss: float  # the worst trial's
    steal: float  # the worst trial's
    waited: float  # share of the time in which the generator waited for its CPU, median
    ratio_to_bare: float | None
    ratio_to_bare_spread: tuple[float, float] | None
    ratio_to_iptables: float | None
    ratio_to_iptables_spread: tuple[float, float] | None
    mode: str
    receiver: str
    frames: int  # sent in all trials
    kernel: str
    commit: str
    cpu: str
    cpus: int
    machine_was_quiet: bool
    when: str


def conditions(receiver: str, machine_was_quiet: bool) -> dict[str, Any]:
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


def rows(
    case: Case, flows: int, trials: Mapping[str, Sequence[Trial]], given: Mapping[str, Any], packet_bytes: int
) -> list[Row]:
    """Return a row for each subject of one measurement."""
    to_bare, to_iptables = ratios(trials, case.bare), ratios(trials, "iptables")

    def pair(of: Spread | None) -> tuple[float | None, tuple[float, float] | None]:
        return (None, None) if of is None else (round(of.median, 4), (round(of.low, 4), round(of.high, 4)))

    made = []
    for subject, done in trials.items():
        rate = spread([trial.rate_pps for trial in done])
        bare, bare_spread = pair(to_bare.get(subject))
        iptables, iptables_spread = pair(to_iptables.get(subject))
        row = Row(
            case=case.name,
            subject=subject,
            flows=flows,
            services=1,
            packet_bytes=packet_bytes,
            value=round(rate.median),
            unit="packets/s",
            low=round(rate.low),
            high=round(rate.high),
            spread=round(rate.relative, 4),
            trials=len(done),
            loss=round(max(trial.loss for trial in done), 6),
            steal=round(max(trial.steal for trial in done), 4),
            waited=round(spread([trial.waited for trial in done]).median, 4),
            ratio_to_bare=bare,
            ratio_to_bare_spread=bare_spread,
            ratio_to_iptables=iptables,
            ratio_to_iptables_spread=iptables_spread,
            mode="in step with the sink" if case.in_step else "as fast as generated",
            frames=sum(trial.sent for trial in done),
            **given,
        )
        made.append(row)
    return made


def write(folder: Path, made: Sequence[Row], cases: Sequence[Case]) -> None:
    """Write results.json, results.txt and rates.png into `folder`."""
    (folder / "results.json").write_text(json.dumps([asdict(row) for row in made], indent=1) + "\n")
    (folder / "results.txt").write_text(table(made, cases))
    if made:
        picture(folder / "rates.png", made)


def is_undisturbed(made: Sequence[Row]) -> bool:
    """Return whether the machine was ours: quiet at the start, and bare programs' generators never had to wait.

    With the other subjects the generator also waits for the kernel's own packet thread, which is part of the work.
    """
    return all(row.machine_was_quiet and (row.subject != "bare-xdp" or row.waited <= _WAITED_LIMIT) for row in made)


def table(made: Sequence[Row], cases: Sequence[Case]) -> str:
    """Return the results as text, with what they mean."""
    lines: list[str] = []
    for case in cases:
        of_case = [row for row in made if row.case == case.name]
        if not of_case:
            continue
        lines += [f"{case.name}: {case.question}", ""]
        head = ("flows", "subject", "Mpps", "quartiles", "loss", f"of {case.bare}", "of iptables")
        lines.append("  {:>8}  {:14} {:>7}  {:>13}  {:>7}  {:>14} {:>12}".format(*head))
        for row in of_case:
            flows = f"{row.flows:,}" if row.flows else "all new"
            quartiles = f"{row.low / 1e6:.2f}-{row.high / 1e6:.2f}"
            loss = f"{row.loss:.2%}" if row.loss else "-"
            bare, iptables = (_times(ratio) for ratio in (row.ratio_to_bare, row.ratio_to_iptables))
            cells = (flows, row.subject, row.value / 1e6, quartiles, loss, bare, iptables)
            lines.append("  {:>8}  {:14} {:7.3f}  {:>13}  {:>7}  {:>14} {:>12}".format(*cells))
        lines.append("")
    if made:
        first = made[0]
        quiet = "" if is_undisturbed(made) else " The machine was busy with other things: do not quote this."
        told = (
            f"Conditions: {first.packet_bytes}-byte UDP over veth pairs in native XDP mode; {first.receiver};"
            f" medians of {first.trials} interleaved trials; Linux {first.kernel}, {first.cpu}, {first.cpus} CPUs;"
            f" turnout {first.commit}.{quiet} A rate includes generating and receiving each frame, which cost the same"
            " for every subject: the ratios are the result (paired by round), the absolute numbers are this machine's."
        )
        lines += [*textwrap.wrap(told, 100), ""]
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def picture(path: Path, made: Sequence[Row]) -> None:
    """Draw rates against flows, and beside it the rates at which new flows and AF_XDP run."""
    import matplotlib as mpl  # takes a second: not for --help

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(3, 2))
    established = [row for row in made if row.case == "established"]
    for subject in dict.fromkeys(row.subject for row in established):
        mine = sorted((row for row in established if row.subject == subject), key=lambda row: row.flows)
        style = _STYLES.get(subject, _PLAIN)
        values = [row.value / 1e6 for row in mine]
        errors = [
            [(row.value - row.low) / 1e6 for row in mine],
            [(row.high - row.value) / 1e6 for row in mine],
        ]
        left.errorbar(
            [row.flows for row in mine],
            values,
            yerr=errors,
            label=subject,
            capsize=3,
            marker=style["marker"],
            linestyle=style["linestyle"],
            color=style["color"],
        )
    left.set_xscale("log")
    left.set_xlabel("flows")
    left.set_ylabel("forwarded, million packets/s")
    left.set_ylim(bottom=0)
    left.set_title("Established flows")
    if established:
        left.legend()
    others = [row for row in made if row.case != "established"]
    labels = [f"{row.case}\n{row.subject}" for row in others]
    for place, row in enumerate(others):
        style = _STYLES.get(row.subject, _PLAIN)
        error = [[(row.value - row.low) / 1e6], [(row.high - row.value) / 1e6]]
        right.bar(place, row.value / 1e6, yerr=error, capsize=3, color="0.9", edgecolor="0.2", hatch=style["hatch"])
    right.set_visible(bool(others))
    right.set_xticks(range(len(others)), labels, rotation=30, ha="right", fontsize=8)
    right.set_ylabel("forwarded, million packets/s")
    right.set_title("Decided in userspace")
    first = made[0]
    figure.text(
        0.01,
        0.01,
        f"{first.packet_bytes}-byte UDP, veth, native XDP; {first.receiver}; medians and quartiles of {first.trials}"
        f" interleaved trials; Linux {first.kernel}; {first.commit}",
        fontsize=7,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
