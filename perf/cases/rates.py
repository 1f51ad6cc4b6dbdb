"""Rates: how many packets, or connections, a subject leads through in a second."""

from __future__ import annotations

from dataclasses import dataclass

from perf.bed import Lane, Testbed
from perf.cases import Point
from perf.measure import Reading, Trial, Watched
from perf.traffic import Step, Task

_WITHOUT_LIMIT = 1 << 40


@dataclass(frozen=True)
class Rate:
    """Packets per second. `in_step`: sent no faster than they arrive, which finds the rate without loss.

    Otherwise as fast as the generator makes them. Of new flows, a trial begins `most_new` at most: tables are finite.
    """

    in_step: bool = False
    is_reply: bool = False
    unit = "packets/s"
    more_is_better = True

    @property
    def mode(self) -> str:
        """How frames are sent, in words."""
        return "in step with the sink" if self.in_step else "as fast as generated"

    @property
    def loss_limit(self) -> float:
        """In step nothing may be lost."""
        return 0.0 if self.in_step else 1.0

    def _lane(self, bed: Testbed) -> Lane:
        return bed.back if self.is_reply else bed.out

    def prepare(self, bed: Testbed, point: Point) -> None:
        """Warm the bed up."""
        bed.prepare(point.load, self._lane(bed))

    def trial(self, bed: Testbed, seconds: float, most_new: int) -> Trial:
        """Send for so long."""
        lane = self._lane(bed)
        received, arrived = bed.received(lane), lane.sink.packets()
        with Watched() as watched:
            if self.in_step:
                frames = most_new * bed.load.new_every or _WITHOUT_LIMIT
                sent = lane.generator.send_in_step(lane.sink, frames=frames, seconds=seconds)
            else:
                sent = lane.generator.send_for(seconds)
        arrived = lane.sink.settled() - arrived
        received = bed.received(lane) - received
        return Trial(sent.frames, received, arrived, sent.seconds, watched.steal, watched.waited)


@dataclass(frozen=True)
class Connections:
    """TCP connections per second, opened and closed: six packets each, of which the sink answers two."""

    unit = "connections/s"
    mode = "512 connections at a time, each packet after the answer to the last"
    more_is_better = True
    loss_limit = 0.0

    def prepare(self, bed: Testbed, point: Point) -> None:
        """Choose the stream."""
        bed.load = point.load
        bed.out.generator.choose(point.load)

    def trial(self, bed: Testbed, seconds: float, most_new: int) -> Reading:
        """Open and close connections for so long."""
        out, back = bed.out, bed.back
        with Watched() as watched, out.sink.doing(Task.CONVERSE):
            sent = out.generator.converse(out.sink, back.sink, connections=most_new, seconds=seconds)
        rate = (sent.frames - sent.lost) / int(Step.STEPS) / sent.seconds
        return Reading({"": rate}, watched.steal, watched.waited, sent.lost / sent.frames, sent.frames)
