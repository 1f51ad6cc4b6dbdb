"""Updates: from the change of one Service until its first packet arrives at the new endpoint."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

from perf.bed import Service, Testbed
from perf.cases import Point
from perf.measure import Reading, Watched
from perf.subjects import Programmable
from perf.traffic import Task
from xdp.errors import Error

_RATE_PPS, _BURST = 80_000.0, 16  # a burst, of which four packets go to the new endpoint, every 200 us
_BEFORE_S = 0.02
_LONGEST_S = 60.0


@dataclass(frozen=True)
class Update:
    """One endpoint of the last Service is exchanged for another, as the subject's control plane does it.

    The clock runs from before the file is put in place, or the command is started, that says so.
    """

    unit = "ms"
    mode = "new flows, 16 every 200 us"
    more_is_better = False
    loss_limit = 1.0

    def prepare(self, bed: Testbed, point: Point) -> None:
        """Choose the stream."""
        bed.prepare(point.load)

    def trial(self, bed: Testbed, seconds: float, most_new: int) -> Reading:  # noqa: ARG002 - it takes its time
        """Change the Service once. Error: no packet came to the new endpoint."""
        subject = bed.subject
        assert isinstance(subject, Programmable)
        service = bed.services[-1]
        last = service.endpoints[-1]
        new = bed.spare if last != bed.spare else bed.original_last
        wanted = replace(service, endpoints=(*service.endpoints[:-1], new))
        sink, began = bed.out.sink, 0
        with Watched() as watched, sink.doing(Task.WATCH, new):
            changing = _Changing(subject, bed, wanted)
            changing.start()
            bed.out.generator.send_paced(_RATE_PPS, _BURST, _LONGEST_S, lambda: bool(sink.first_ns or changing.error))
            changing.join()
            began, first = changing.began_ns, sink.first_ns
        if changing.error or not first:
            raise Error(f"{subject.name}: a change of a Service is not in force: {changing.error or 'no packet came'}")
        return Reading({"": (first - began) / 1e6}, watched.steal, watched.waited)


class _Changing(threading.Thread):
    """Changes the last Service, on the CPUs that the generator leaves free."""

    def __init__(self, subject: Programmable, bed: Testbed, service: Service) -> None:
        super().__init__(name="change")
        self.began_ns = 0
        self.error: Error | None = None
        self._subject, self._bed, self._service = subject, bed, service

    def run(self) -> None:
        time.sleep(_BEFORE_S)
        with self._bed.cpus.pinned(self._bed.cpus.others):
            self.began_ns = time.monotonic_ns()
            try:
                self._subject.change(self._bed, len(self._bed.services) - 1, self._service)
            except Error as error:
                self.error = error
