"""What programs cost by themselves, without wires: of XDP and of the userspace pipeline, and two CPUs against one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perf.bed import Shape
from perf.cases import Point
from perf.measure import spread
from perf.rows import Row
from perf.run import Effort
from perf.traffic import Load

Progress = Callable[[Point, int], Callable[[], object]]


@dataclass(frozen=True)
class Program:
    """A question that no testbed is needed for. `numbers` yields (variant, the trials' numbers) for so many flows.

    `of_services`: it is the number of Services that differs, not that of flows.
    """

    name: str
    question: str
    unit: str
    mode: str
    flows: Sequence[int]
    quick_flows: Sequence[int]
    numbers: Callable[[int, Effort], Iterator[tuple[str, Sequence[float]]]]
    of_services: bool = False

    def rows(self, effort: Effort, given: Mapping[str, Any], progress: Progress) -> list[Row]:
        """Measure; return the rows."""
        made = []
        for number in self.quick_flows if effort.is_quick else self.flows:
            flows, services = (0, number) if self.of_services else (number, 1)
            tick = progress(Point(Load(flows, new_every=int(self.of_services)), Shape(services)), 1)
            for variant, numbers in self.numbers(number, effort):
                value = spread(list(numbers))
                row = Row(
                    case=self.name,
                    variant=variant,
                    subject="turnout",
                    flows=flows,
                    services=services,
                    packet_bytes=64,
                    value=round(value.median, 3),
                    unit=self.unit,
                    low=round(value.low, 3),
                    high=round(value.high, 3),
                    spread=round(value.relative, 4),
                    trials=len(numbers),
                    loss=0.0,
                    steal=0.0,
                    waited=0.0,
                    ratio_to_bare=None,
                    ratio_to_bare_spread=None,
                    ratio_to_iptables=None,
                    ratio_to_iptables_spread=None,
                    ratio_to_against=None,
                    ratio_to_against_spread=None,
                    mode=self.mode,
                    frames=0,
                    **given,
                )
                made.append(row)
            tick()
        return made


def _trials(effort: Effort) -> int:
    return 3 if effort.is_quick else 10


def _cost(flows: int, effort: Effort) -> Iterator[tuple[str, Sequence[float]]]:
    from perf import cost  # compiles

    for kind in cost.KINDS:
        found = cost.measure(flows, kind, trials=_trials(effort))
        yield f"{found.protocol} {found.direction}", found.nets_ns


def _floor(flows: int, effort: Effort) -> Iterator[tuple[str, Sequence[float]]]:
    from perf import floor

    for lines, in_turn in floor.KINDS:
        found = floor.measure(flows, lines, in_turn=in_turn, trials=_trials(effort))
        yield found.name, found.nets_ns


def _admission(_: int, effort: Effort) -> Iterator[tuple[str, Sequence[float]]]:
    from perf import cost

    yield "UDP", cost.measure_admission(_trials(effort)).nets_ns


def _pipeline(flows: int, effort: Effort) -> Iterator[tuple[str, Sequence[float]]]:
    from perf import pipeline

    found = pipeline.measure(flows, packets=200_000 if effort.is_quick else 2_000_000)
    yield "first packet", [found.new_ns]
    yield "known flow", [found.known_ns]


def _parallel(flows: int, effort: Effort) -> Iterator[tuple[str, Sequence[float]]]:
    from perf import parallel

    ours, bare = parallel.measure(flows, trials=_trials(effort))
    yield "turnout", ours
    yield "bare", bare


def _update(services: int, effort: Effort) -> Iterator[tuple[str, Sequence[float]]]:
    from perf import update

    taken = update.measure(services, changes=20 if effort.is_quick else 200)
    for share in (50, 99):
        yield f"p{share}", [float(np.percentile(taken, share))]


def _size(connections: int, _: Effort) -> Iterator[tuple[str, Sequence[float]]]:
    from perf import size

    found = size.measure(connections)
    yield "refused below the capacity", [found.refused]
    yield "at the first refusal", [found.most]


def _sweep(connections: int, _: Effort) -> Iterator[tuple[str, Sequence[float]]]:
    from perf import size

    yield "", [size.measure(connections).sweep_percent]


PROGRAMS = (
    Program(
        "program-cost",
        "what does the XDP program add to a packet that XDP sees anyway?",
        "ns",
        "net of the bare program",
        (1, 1000, 16_384, 100_000, 500_000, 1_000_000),
        (1, 16_384),
        _cost,
    ),
    Program(
        "memory-cost",
        "what do the cache lines of a flow cost by themselves, however little is done with them?",
        "ns",
        "net of the bare program",
        (1, 1000, 16_384, 100_000, 500_000, 1_000_000),
        (1, 16_384),
        _floor,
    ),
    Program(
        "admission-cost",
        "what does a new flow take that XDP admits by itself, both directions inserted?",
        "ns",
        "net of the bare program",
        (0,),
        (0,),
        _admission,
    ),
    Program(
        "pipeline-cost",
        "what does a packet take in the userspace pipeline, sockets left out?",
        "ns",
        "frames in plain memory",
        (1000, 100_000, 1_000_000),
        (1000,),
        _pipeline,
    ),
    Program(
        "two-cpus",
        "how many times the rate of one CPU do two reach?",
        "times one CPU",
        "the XDP program alone, flows of its own on each CPU",
        (131_072,),
        (131_072,),
        _parallel,
    ),
    Program(
        "update-cost",
        "how long does a change of one of so many Services take, from the objects to the tables?",
        "ms",
        "tables in plain memory",
        (1000, 10_000, 100_000),
        (1000,),
        _update,
        of_services=True,
    ),
    Program(
        "table-size",
        "does a table for so many connections take them all, and how many more?",
        "connections",
        "tables in plain memory",
        (1_000_000, 10_000_000),
        (1_000_000,),
        _size,
    ),
    Program(
        "sweep-cost",
        "what does the sweep take of a CPU, with so many connections?",
        "%",
        "tables in plain memory, at the daemon's pace",
        (1_000_000, 10_000_000),
        (1_000_000,),
        _sweep,
    ),
)
