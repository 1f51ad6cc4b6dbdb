"""A run: cases one after the other, their testbeds made when wanted, their trials interleaved."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from perf import measure
from perf.bed import Cpus, Shape, Testbed
from perf.cases import Case, Point
from perf.measure import Outcome
from perf.subjects import Subject
from perf.traffic import PINS, Kit
from xdp.errors import Error, MissingFeatureError


@dataclass(frozen=True)
class Effort:
    """How much is done: rounds of trials, seconds of a trial, connections that tables have room for; without whom."""

    rounds: int
    seconds: float
    capacity: int
    is_quick: bool = False
    left_out: frozenset[str] = frozenset()

    @property
    def most_new(self) -> int:
        """Flows that one trial may begin."""
        return self.capacity // 2 // (self.rounds + 2)

    def points(self, case: Case) -> list[Point]:
        """Return the points of a case that are measured."""
        return [point for point in case.points if point.quick or not self.is_quick]


class Run:
    """A context manager that measures `case` after `case`. `told` is told what is left out, and why."""

    def __init__(self, subjects: Mapping[str, Subject], effort: Effort, told: Callable[[str], object]) -> None:
        self.cpus = Cpus()
        self._subjects = subjects
        self._effort = effort
        self._told = told
        self._stack = ExitStack()
        self._missing: set[str] = set()  # what this machine cannot have
        self._beds: dict[str, Testbed] = {}
        self._ends: dict[str, ExitStack] = {}  # closed twice, by us and with the run, does nothing

    def __enter__(self) -> Self:
        self._kit = self._stack.enter_context(Kit(PINS / "turnout-perf-kit"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(
        self, case: Case, progress: Callable[[Point, int], Callable[[], object]]
    ) -> Iterator[tuple[Point, dict[str, list[Outcome]]]]:
        """Yield each point with its trials by subject. `progress` is told of a point and its trials, and ticks."""
        points = self._effort.points(case)
        for shape in dict.fromkeys(point.shape for point in points):
            here = [point for point in points if point.shape == shape]
            wanted = [name for name in self._names(case) if not all(name in point.left_out for point in here)]
            self._want(wanted, shape)
            with self.cpus.pinned(self.cpus.generator):
                for point in here:
                    there = {name: self._beds[name] for name in wanted if name in self._beds}
                    there = {name: bed for name, bed in there.items() if name not in point.left_out}
                    rounds = case.rounds or self._effort.rounds
                    yield point, self._trials(case, point, there, rounds, progress(point, rounds * len(there)))

    def _names(self, case: Case) -> list[str]:
        """Return the case's subjects; one of another commit is named after the one that it is beside."""
        return [
            name
            for wanted in case.subjects
            for name in self._subjects
            if name.partition("@")[0] == wanted and name not in self._missing | self._effort.left_out
        ]

    def _trials(
        self, case: Case, point: Point, beds: dict[str, Testbed], rounds: int, tick: Callable[[], object]
    ) -> dict[str, list[Outcome]]:
        effort, kind = self._effort, case.kind

        def trial(name: str) -> Outcome:
            return kind.trial(beds[name], effort.seconds, effort.most_new)

        try:
            for bed in beds.values():
                kind.prepare(bed, point)
            return measure.interleaved(list(beds), rounds, trial, tick, kind.loss_limit)
        except Error as error:
            self._told(f"left out: {case.name}, {point.shape.services} Services: {error}")
            return {}

    def _want(self, wanted: Sequence[str], shape: Shape) -> None:
        """Have a testbed of this shape for each of these subjects, and no others: those that fit are kept.

        A subject that this machine cannot have is named and left out.
        """
        for name, bed in list(self._beds.items()):
            if name not in wanted or bed.shape != shape:
                del self._beds[name]
                self._ends.pop(name).close()
        for name in wanted:
            if name in self._beds:
                continue
            with ExitStack() as mine:
                try:
                    self._beds[name] = self._bed(self._subjects[name], shape, mine)
                except (Error, ImportError) as error:
                    if os.geteuid() != 0:
                        raise
                    if isinstance(error, MissingFeatureError):
                        self._missing.add(name)
                    self._told(f"left out: {error if name in str(error) else f'{name}: {error}'}")
                    continue
                self._ends[name] = self._stack.enter_context(mine.pop_all())

    def _bed(self, subject: Subject, shape: Shape, stack: ExitStack) -> Testbed:
        prefix = "turnout-perf-" + subject.name.replace("@", "-").replace("turnout-", "")[:24]
        bed = stack.enter_context(Testbed(prefix, self.cpus, self._kit, shape))
        stack.enter_context(subject.running(bed))
        bed.subject = subject
        measure.check(subject, bed)
        return bed
