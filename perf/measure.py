"""Trials and what they say: interleaved A B A B, ratios paired by round, medians with their spread."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

from perf.bed import Lane, Testbed
from perf.subjects import Subject
from perf.traffic import Load, Seen, Task
from perf.world import wait_until
from xdp.errors import Error

_STEAL_LIMIT = 0.02  # of the machine's time: above, the hypervisor had other plans and the trial says nothing
_RETRIES = 4
_FIRST_PACKET_S = 20.0
_VERIFIED = 2000  # frames whose checksums are looked at before anything is measured


class Outcome(Protocol):
    """What one trial found: numbers by variant ("" where there is one), and what speaks for or against believing it."""

    @property
    def values(self) -> Mapping[str, float]:
        """The numbers."""

    @property
    def steal(self) -> float:
        """The share of the machine's time that the hypervisor took."""

    @property
    def waited(self) -> float:
        """The share of the trial in which the generator waited for its CPU."""

    @property
    def loss(self) -> float:
        """The share of the frames that did not arrive."""

    @property
    def sent(self) -> int:
        """Frames sent."""


@dataclass(frozen=True)
class Reading:
    """An Outcome that is not a rate."""

    values: Mapping[str, float]
    steal: float = 0.0
    waited: float = 0.0
    loss: float = 0.0
    sent: int = 0


@dataclass(frozen=True)
class Trial:
    """What one trial saw: frames sent by the generator, received by the node, arrived at the sink, and in what time."""

    sent: int
    received: int
    arrived: int
    seconds: float
    steal: float  # share of the machine's time that the hypervisor took
    waited: float = 0.0  # share of the trial in which the generator waited for its CPU

    @property
    def values(self) -> dict[str, float]:
        """The rate."""
        return {"": self.rate_pps}

    @property
    def rate_pps(self) -> float:
        """Packets that arrived, per second."""
        return self.arrived / self.seconds

    @property
    def loss(self) -> float:
        """The share of the frames that did not arrive."""
        return 1 - self.arrived / self.sent


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """The distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles of one value or more."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def paired_ratios(ours: Sequence[Outcome], theirs: Sequence[Outcome], variant: str = "") -> Spread:
    """Return the spread of our number over theirs, round by round: what drifts in both cancels out."""
    pairs = zip(ours, theirs, strict=True)
    return spread([mine.values[variant] / other.values[variant] for mine, other in pairs])


_O = TypeVar("_O", bound=Outcome)


def interleaved(
    names: Sequence[str],
    rounds: int,
    trial: Callable[[str], _O],
    progress: Callable[[], object],
    loss_limit: float = 1.0,
) -> dict[str, list[_O]]:
    """Run `rounds` rounds of one trial of each name; every other round backwards.

    A trial with stolen time, or with a larger share of frames lost than `loss_limit`, is repeated, a few times at most.
    """
    trials: dict[str, list[_O]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            outcome, retries = trial(name), 0
            while (outcome.steal > _STEAL_LIMIT or outcome.loss > loss_limit) and retries < _RETRIES:
                outcome, retries = trial(name), retries + 1
            trials[name].append(outcome)
            progress()
    return trials


class Watched:
    """Watches over a trial: `with Watched() as watched: ...`, then `watched.steal` and `watched.waited` (shares)."""

    steal = waited = 0.0

    def __enter__(self) -> Self:
        self._before = (*cpu_times(), waited_s(), time.perf_counter())
        return self

    def __exit__(self, *_: object) -> None:
        stolen, ticks, waited, start = self._before
        stolen_now, ticks_now = cpu_times()
        self.steal = (stolen_now - stolen) / max(1, ticks_now - ticks)
        self.waited = (waited_s() - waited) / (time.perf_counter() - start)


def cpu_times() -> tuple[int, int]:
    """Return (ticks stolen from this machine, ticks in all) since boot."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[7], sum(fields)


def waited_s() -> float:
    """Return the seconds that this thread has been waiting for a CPU that something else had; 0 if nobody counts."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def check(subject: Subject, bed: Testbed) -> None:
    """Send a few frames slowly: Error unless all arrive, translated as they should be, with right checksums."""
    if not wait_until(lambda: _comes_through(bed), _FIRST_PACKET_S, 0.05):
        raise Error(f"{subject.name}: no packet came through within {_FIRST_PACKET_S:.0f} s: it does not forward")
    bed.prepare(Load(64, services=bed.shape.services))
    _check_lane(subject, bed.out)
    if bed.shape.endpoints == 1 and subject.leads_back:  # of several, a reply may be another's
        bed.prepare(Load(64), bed.back)
        _check_lane(subject, bed.back)


def _check_lane(subject: Subject, lane: Lane) -> None:
    lane.sink.settled()  # what waited for a neighbour comes late, and each packet is counted twice, not at once
    before = [lane.sink.count(word) for word in (Seen.PACKETS, Seen.TRANSLATED, Seen.WRONG)]
    with lane.sink.doing(Task.VERIFY):
        lane.generator.send_in_step(lane.sink, frames=_VERIFIED, window=128)
        lane.sink.settled()
    arrived, translated, wrong = (lane.sink.count(word) - was for word, was in enumerate(before))
    if arrived < _VERIFIED:
        raise Error(f"{subject.name}: of {_VERIFIED} packets {arrived} arrived: it does not forward")
    if translated != (arrived if subject.translates else 0):
        raise Error(f"{subject.name}: {translated} of {arrived} packets came translated")
    if wrong:
        raise Error(f"{subject.name}: {wrong} of {arrived} packets came with a wrong checksum")


def _comes_through(bed: Testbed) -> bool:
    bed.out.generator.choose(Load(64, new_every=1))
    return bed.out.generator.send_in_step(bed.out.sink, frames=1).lost == 0


def quiet(timeout_s: float = 20.0, busy: float = 0.10) -> bool:
    """Wait until the machine has been idle but for `busy` of its time over half a second; return whether it was."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        before = os.times().elapsed, _busy_ticks()
        time.sleep(0.5)
        elapsed = os.times().elapsed - before[0]
        share = (_busy_ticks() - before[1]) / os.sysconf("SC_CLK_TCK") / elapsed / (os.cpu_count() or 1)
        if share <= busy:
            return True
    return False


def _busy_ticks() -> int:
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4]
