"""Delays: from when a frame was due until it is at the sink, as shares of all packets (p50, p99 ...)."""

from __future__ import annotations

from dataclasses import dataclass

from perf.bed import Testbed
from perf.cases import Point
from perf.measure import Reading, Watched
from perf.traffic import Task

_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
_WITHOUT_PAUSE_PPS = 1e12
_PROBE_S = 0.1  # of sending, to find out what half the load is


def _paced(bed: Testbed, rate_pps: float, burst: int, seconds: float) -> Reading:
    arrived = bed.out.sink.packets()
    with Watched() as watched, bed.out.sink.doing(Task.TIME):
        sent = bed.out.generator.send_paced(rate_pps, burst, seconds)
        arrived = bed.out.sink.settled() - arrived
        delays = bed.out.sink.delays_ns(list(_SHARES.values()))
    values = {name: delay / 1000 for name, delay in zip(_SHARES, delays, strict=True)}
    return Reading(values, watched.steal, watched.waited, 1 - arrived / sent.frames, sent.frames)


@dataclass(frozen=True)
class HalfLoad:
    """Known flows in bursts, at half the rate at which the same bursts go out without a pause."""

    burst: int = 128
    unit = "us"
    mode = "bursts of 128 on schedule, at half of the subject's own rate"
    more_is_better = False
    loss_limit = 0.01

    def prepare(self, bed: Testbed, point: Point) -> None:
        """Warm the bed up."""
        bed.prepare(point.load)

    def trial(self, bed: Testbed, seconds: float, most_new: int) -> Reading:  # noqa: ARG002 - there are none
        """Find the rate, then send at half of it."""
        most = bed.out.generator.send_paced(_WITHOUT_PAUSE_PPS, self.burst, _PROBE_S)
        bed.out.sink.settled()
        return _paced(bed, most.frames / most.seconds / 2, self.burst, seconds)


@dataclass(frozen=True)
class FirstPacket:
    """First packets of flows, one at a time, on a node that has nothing else to do."""

    rate_pps: float = 2000.0
    unit = "us"
    mode = "one first packet every 500 us"
    more_is_better = False
    loss_limit = 0.0

    def prepare(self, bed: Testbed, point: Point) -> None:
        """Choose the stream."""
        bed.prepare(point.load)

    def trial(self, bed: Testbed, seconds: float, most_new: int) -> Reading:
        """Send for so long."""
        return _paced(bed, self.rate_pps, 1, min(seconds, most_new / self.rate_pps))
