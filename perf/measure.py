"""Trials and what they say: interleaved A B A B, ratios paired by round, medians with their spread."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.subjects import Subject, Testbed
from perf.traffic import Task
from perf.world import wait_until
from xdp.errors import Error

_STEAL_LIMIT = 0.02  # of the machine's time: above, the hypervisor had other plans and the trial says nothing
_RETRIES = 4
_FIRST_PACKET_S = 20.0
_VERIFIED = 2000  # frames whose checksums are looked at before anything is measured


@dataclass(frozen=True)
class Case:
    """One question: which subjects, at how many flows, and how the frames are sent.

    `flows` 0: every frame begins a flow. `in_step`: frames are sent no faster than they arrive, which finds the rate
    without loss; otherwise as fast as the generator makes them. `bare` and `iptables` name the subjects that the
    ratios refer to, where there are such.
    """

    name: str
    subjects: tuple[str, ...]
    flows: tuple[int, ...]
    in_step: bool
    bare: str
    question: str


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


def paired_ratios(ours: Sequence[Trial], theirs: Sequence[Trial]) -> Spread:
    """Return the spread of our rate over theirs, round by round: what drifts in both cancels out."""
    return spread([mine.rate_pps / other.rate_pps for mine, other in zip(ours, theirs, strict=True)])


def interleaved(
    names: Sequence[str], rounds: int, trial: Callable[[str], Trial], progress: Callable[[], None]
) -> dict[str, list[Trial]]:
    """Run `rounds` rounds of one trial of each name; every other round backwards. Unsteady trials are repeated."""
    trials: dict[str, list[Trial]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            outcome, retries = trial(name), 0
            while outcome.steal > _STEAL_LIMIT and retries < _RETRIES:
                outcome, retries = trial(name), retries + 1
            trials[name].append(outcome)
            progress()
    return trials


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
    bed.prepare(64)
    before = [bed.sink.count(word) for word in range(3)]
    with bed.sink.doing(Task.VERIFY):
        bed.generator.send_in_step(bed.sink, frames=_VERIFIED, window=128)
    arrived, translated, wrong = (bed.sink.count(word) - was for word, was in enumerate(before))
    if arrived < _VERIFIED:
        raise Error(f"{subject.name}: of {_VERIFIED} packets {arrived} arrived: it does not forward")
    if translated != (arrived if subject.translates else 0):
        raise Error(f"{subject.name}: {translated} of {arrived} packets came with an endpoint's port")
    if wrong:
        raise Error(f"{subject.name}: {wrong} of {arrived} packets came with a wrong checksum")


def _comes_through(bed: Testbed) -> bool:
    bed.generator.choose(64)
    return bed.generator.send_in_step(bed.sink, frames=1).lost == 0


def measure(case: Case, bed: Testbed, seconds: float, most_new: int) -> Trial:
    """Run one trial on a bed that is warm. With new flows, at most `most_new` frames: tables are finite."""
    stolen, ticks = cpu_times()
    waited = waited_s()
    received, arrived = bed.received(), bed.sink.packets()
    if case.in_step:
        frames = most_new if bed.flows == 0 else 1 << 40
        sent = bed.generator.send_in_step(bed.sink, frames=frames, seconds=seconds)
    else:
        sent = bed.generator.send_for(seconds)
    waited = (waited_s() - waited) / sent.seconds
    arrived = bed.sink.settled() - arrived
    received = bed.received() - received
    stolen_now, ticks_now = cpu_times()
    steal = (stolen_now - stolen) / max(1, ticks_now - ticks)
    return Trial(sent.frames, received, arrived, sent.seconds, steal, waited)


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


def ratios(trials: Mapping[str, Sequence[Trial]], reference: str) -> dict[str, Spread]:
    """Return each subject's ratio to `reference`; nothing if that was not measured."""
    if reference not in trials:
        return {}
    return {name: paired_ratios(ours, trials[reference]) for name, ours in trials.items()}
