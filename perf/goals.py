"""What is aimed at, beside what was measured: `python -m perf.goals results.json` prints the table as markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from perf.rows import Row, read
from xdp.errors import Error

_Found = Callable[[Sequence[Row]], float | None]


@dataclass(frozen=True)
class Goal:
    """A number to reach. `measured` finds it among the rows of a run; `bound` says what stands in the way."""

    id: str
    what: str
    aim: str
    measured: _Found
    bound: str
    command: str


def _pick(
    rows: Sequence[Row], case: str, *, variant: str = "", flows: int | None = None, services: int = 1,
    subject: str = "turnout-xdp",
) -> Row | None:  # fmt: skip
    for row in rows:
        wanted = (case, variant, subject, services) == (row.case, row.variant, row.subject, row.services)
        if wanted and flows in {None, row.flows}:
            return row
    return None


def _bare(case: str, **which: object) -> _Found:
    def found(rows: Sequence[Row]) -> float | None:
        row = _pick(rows, case, **which)  # type: ignore[arg-type]
        return row.ratio_to_bare if row else None

    return found


def _iptables(case: str, **which: object) -> _Found:
    def found(rows: Sequence[Row]) -> float | None:
        row = _pick(rows, case, **which)  # type: ignore[arg-type]
        return row.ratio_to_iptables if row else None

    return found


def _value(case: str, **which: object) -> _Found:
    def found(rows: Sequence[Row]) -> float | None:
        row = _pick(rows, case, **which)  # type: ignore[arg-type]
        return row.value if row else None

    return found


def _over(one: _Found, other: _Found) -> _Found:
    """Return the first number over the second: of medians, where there are no pairs."""

    def found(rows: Sequence[Row]) -> float | None:
        first, second = one(rows), other(rows)
        return first / second if first is not None and second else None

    return found


def _nothing(_: Sequence[Row]) -> None:
    return None


_VETH = "generator, veth and forwarding share a CPU"
_MEMORY = "memory: the line of a flow is cold, and its page"
_ONLY = "`python -m perf --out DIR --only {}`"
_COST, _PIPELINE, _PARALLEL, _SIZE, _UPDATE = (
    f"`python -m perf.{name}`" for name in ("cost", "pipeline", "parallel", "size", "update")
)
_LAST, _UNIFORM = "to the last", "uniform"
_RATE_TO_ESTABLISHED = _value("mixed", variant="0 % new", flows=1000)


def _established() -> list[Goal]:
    command = _ONLY.format("established")
    near = [
        Goal("G1", f"known flows, {flows:,}: of bare XDP", aim, _bare("established", flows=flows), bound, command)
        for flows, aim, bound in (
            (1000, ">= 0.92", _VETH),
            (100_000, ">= 0.65", _MEMORY),
            (1_000_000, ">= 0.60", _MEMORY),
        )
    ]
    rate = _value("established", flows=1000)
    far = [
        Goal(
            "G2",
            f"known flows, 1,000: of {peer}",
            aim,
            _over(rate, _value("established", flows=1000, subject=peer)),
            bound,
            command,
        )
        for peer, aim, bound in (
            ("iptables-nft", ">= 5", "veth, which both pay"),
            ("iptables-legacy", ">= 5", "veth, which both pay"),
            ("nftables", ">= 5", "veth, which both pay"),
            ("nftables-flowtable", ">= 1.5", "needs a kernel with CONFIG_NF_FLOW_TABLE"),
        )
    ]
    return near + far


def _programs() -> list[Goal]:
    return [
        Goal(
            "G3", f"XDP program, {kind}, {flows:,} flows: net ns", aim,
            _value("program-cost", variant=kind, flows=flows, subject="turnout"), bound, _COST,
        )
        for kind in ("UDP original", "UDP reply", "TCP original")
        for flows, aim, bound in (
            (1, "<= 35", "parsing, hashing, checksums by differences"),
            (16_384, "<= 60", "lines from the second or third cache"),
            (500_000, "<= 140", _MEMORY),
        )
    ]  # fmt: skip


def _new_flows() -> list[Goal]:
    new, services = _ONLY.format("new-flows"), _ONLY.format("services")
    rate = _value("services", variant=_LAST)
    return [
        Goal("G4", "new flows in userspace: of bare AF_XDP", ">= 0.8", _bare("new-flows"), "six lines of memory", new),
        Goal("G4", "new flows in userspace: of iptables-nft", ">= 2.5", _iptables("new-flows"), "AF_XDP transmit", new),
        *(
            Goal(
                "G4", f"the same, 10,000 Services, {how}: of iptables-legacy", ">= 30",
                _over(
                    _value("services", variant=how, services=10_000),
                    _value("services", variant=how, services=10_000, subject="iptables-legacy"),
                ),
                "AF_XDP transmit", services,
            )
            for how in (_LAST, _UNIFORM)
        ),
        Goal(
            "G4", "the same, 10,000 Services: of 1 Service", ">= 0.95",
            _over(_value("services", variant=_LAST, services=10_000), rate), "cold slots and frontends", services,
        ),
        Goal(
            "G5", "admitted in XDP: net ns", "<= 200",
            _value("admission-cost", variant="UDP", subject="turnout"), "four lines of memory, written", _COST,
        ),
        Goal(
            "G6", "TCP connections: of iptables-nft", ">= 3", _iptables("connections"),
            "the first packet's way through userspace", _ONLY.format("connections"),
        ),
        *(
            Goal(
                "G7", f"{share} % new flows: of known ones only", aim,
                _over(_value("mixed", variant=f"{share} % new", flows=1000), _RATE_TO_ESTABLISHED),
                "new flows leave the fast path", _ONLY.format("mixed"),
            )
            for share, aim in ((1, ">= 0.9"), (5, ">= 0.65"), (20, ">= 0.35"))
        ),
    ]  # fmt: skip


def _rest() -> list[Goal]:
    memory, update, latency = _ONLY.format("memory"), _ONLY.format("update"), _ONLY.format("latency")
    first, afxdp = _ONLY.format("first-packet"), _ONLY.format("afxdp")
    return [
        Goal(
            "G8", "an IPv4 connection, both directions: bytes", "<= 170", _value("memory", variant="connection"),
            "a line for each direction, at most 80 % full", memory,
        ),
        Goal(
            "G8", "of 10,000,000 connections in a table for as many: refused", "0",
            _value("table-size", variant="refused below the capacity", flows=10_000_000, subject="turnout"),
            "two choices of sixteen places", _SIZE,
        ),
        Goal(
            "G8", "sweep of 10,000,000 connections: % of a CPU", "<= 1",
            _value("sweep-cost", flows=10_000_000, subject="turnout"), "every record is read", _SIZE,
        ),
        Goal(
            "G9", "a change of one of 100,000 Services, in memory: ms, p99", "<= 1",
            _value("update-cost", variant="p99", services=100_000, subject="turnout"),
            "one row and its slots are written", _UPDATE,
        ),
        Goal(
            "G9", "one file of 10,000 changes, to the first packet: ms", "measured",
            _value("update", variant=_LAST, services=10_000), "waiting for more changes, then reading", update,
        ),
        Goal(
            "G10", "half load, p50: us more than bare XDP", "<= 1",
            lambda rows: _difference(rows, "latency", "p50"), "sixteen programs: frames come in batches", latency,
        ),
        Goal("G10", "half load, p99: of bare XDP", "<= 1.25", _bare("latency", variant="p99"), _VETH, latency),
        Goal(
            "G10", "a flow's first packet, p99: us", "<= 100",
            _value("first-packet", variant=f"{_LAST}, p99"), "waking a thread", first,
        ),
        Goal(
            "G10", "the same with 10,000 Services: of 1 Service", "<= 1.05",
            _over(
                _value("first-packet", variant=f"{_LAST}, p99", services=10_000),
                _value("first-packet", variant=f"{_LAST}, p99"),
            ),
            "waking a thread, and chance", first,
        ),
        Goal("G11", "memory of the daemon without its tables: MB", "<= 200", _value("memory", variant="daemon"),
             "Python and numba", memory),
        Goal("G11", "idle daemon: % of a CPU", "<= 0.5", _value("memory", variant="idle"),
             "ticks of the control plane", memory),
        Goal(
            "G12", "engine afxdp, 1,000 flows: of bare AF_XDP", ">= 0.8",
            _bare("afxdp", flows=1000, subject="turnout-afxdp"), "sockets", afxdp,
        ),
        Goal(
            "G12", "engine raw, 1,000 flows: of iptables", "measured",
            _iptables("afxdp", flows=1000, subject="turnout-raw"), "copies of frames", afxdp,
        ),
        *(
            Goal(
                "G12", f"pipeline in memory, {flows:,} flows: ns", aim,
                _value("pipeline-cost", variant="known flow", flows=flows, subject="turnout"), _MEMORY, _PIPELINE,
            )
            for flows, aim in ((1000, "<= 60"), (1_000_000, "<= 120"))
        ),
        Goal(
            "G13", "two CPUs: times one", ">= 1.9", _value("two-cpus", variant="turnout", subject="turnout"),
            "CPUs that share a core: the bare program is the ceiling", _PARALLEL,
        ),
        *(
            Goal(
                "G14", f"XDP program, UDP over IPv6, {flows:,} flows: net ns more than over IPv4", "measured",
                partial(_more_than_udp, "UDP over IPv6", flows=flows), "two names more are looked up", _COST,
            )
            for flows in (1, 16_384)
        ),
        Goal(
            "G14", "XDP program, UDP in a VLAN, 1 flows: net ns more than untagged", "measured",
            partial(_more_than_udp, "UDP in a VLAN", flows=1), "the type is looked at three times more", _COST,
        ),
        *(
            Goal(
                "G14", f"known flows {how}, 1,000: of IPv4 untagged", aim,
                _over(_value(case, flows=1000), _value("established", flows=1000)), bound,
                _ONLY.format(f"established {case}"),
            )
            for how, case, aim, bound in (
                ("over IPv6", "ipv6", ">= 0.85", "two names more are looked up, frames are 14 bytes longer"),
                ("in a VLAN", "vlan", ">= 0.95", "the type is looked at three times more"),
            )
        ),
        Goal(
            "G14", "known flows over IPv6, 1,000: of bare XDP", "measured", _bare("ipv6", flows=1000),
            "two names more are looked up", _ONLY.format("ipv6"),
        ),
        Goal("G14", "ipip of nat", ">= 0.9", _nothing, "not in this version", "-"),
    ]  # fmt: skip


def _difference(rows: Sequence[Row], case: str, variant: str) -> float | None:
    ours, bare = _pick(rows, case, variant=variant), _pick(rows, case, variant=variant, subject="bare-xdp")
    return ours.value - bare.value if ours and bare else None


def _more_than_udp(packets: str, rows: Sequence[Row], flows: int) -> float | None:
    theirs, plain = (
        _pick(rows, "program-cost", variant=f"{kind} original", flows=flows, subject="turnout")
        for kind in (packets, "UDP")
    )
    return theirs.value - plain.value if theirs and plain else None


GOALS = (*_established(), *_programs(), *_new_flows(), *_rest())


def table(rows: Sequence[Row]) -> str:
    """Return goals and what these rows say of them, as a table in markdown."""
    lines = ["| | what | goal | measured | what bounds it | command |", "|---|---|---|---|---|---|"]
    for goal in GOALS:
        found = goal.measured(rows)
        measured = "-" if found is None else f"{found:.3g}"
        lines.append(f"| {goal.id} | {goal.what} | {goal.aim} | {measured} | {goal.bound} | {goal.command} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m perf.goals", description="goals beside what a run measured")
    parser.add_argument("results", type=Path, nargs="+", help="results.json of one run or several; later ones win")
    try:
        rows = [row for path in reversed(parser.parse_args().results) for row in read(path)]
    except Error as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if rows:
        versions = ", ".join(dict.fromkeys(f"{row.commit} ({row.when[:10]}, {row.cpu})" for row in rows))
        print(f"Measured: turnout {versions}; medians of up to {max(row.trials for row in rows)} trials.\n")
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
