"""Memory: what a connection takes, and the process that is there for it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from perf.bed import Testbed
from perf.cases import Point
from perf.measure import Reading
from xdp.tables import Capacity

_SETTLE_S, _IDLE_S = 8.0, 30.0  # until what a start puts off is done; long enough for what is done now and then
_SMALL, _LARGE = 1 << 20, 1 << 21


def bytes_per_connection() -> float:
    """Return what the tables of turnout grow by for each connection of their capacity."""
    small, large = (
        sum(dtype.itemsize * rows for dtype, rows in Capacity(connections=connections).rows().values())
        for connections in (_SMALL, _LARGE)
    )
    return (large - small) / (_LARGE - _SMALL)


@dataclass(frozen=True)
class Memory:
    """Bytes of connection tracking's entry for each of the known flows; with a daemon, what that takes itself.

    turnout's tables are there from the start: what is told is their size for each connection.
    """

    unit = ""
    units = {"connection": "bytes", "daemon": "MB", "idle": "% of a CPU"}  # noqa: RUF012 - read only
    mode = "known flows"
    more_is_better = False
    loss_limit = 1.0

    def prepare(self, bed: Testbed, point: Point) -> None:
        """Do nothing: what is measured is the difference that known flows make."""
        bed.load = point.load

    def trial(self, bed: Testbed, seconds: float, most_new: int) -> Reading:  # noqa: ARG002 - counted, not timed
        """Make the flows known and look."""
        if bed.daemon is None:
            before = _kernel_bytes()
            bed.prepare(bed.load)
            return Reading({"connection": (_kernel_bytes() - before) / bed.load.flows})
        bed.prepare(bed.load)
        process = Path("/proc", str(bed.daemon.pid))
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        time.sleep(_SETTLE_S)
        before_s = _cpu_s(process)
        time.sleep(_IDLE_S)
        idle = (_cpu_s(process) - before_s) / _IDLE_S
        anonymous = int(status["RssAnon"].split()[0]) * 1024
        values = {"connection": bytes_per_connection(), "daemon": anonymous / 1e6, "idle": 100 * idle}
        return Reading(values)


def _kernel_bytes() -> int:
    """Return what connection tracking's entries take, of all namespaces; 0 before there is any.

    Their extensions, NAT's among them, come on top: in caches that are everybody's, where nobody can tell them apart.
    """
    for line in Path("/proc/slabinfo").read_text().splitlines():
        name, objects, _, size, *_ = line.split()
        if name == "nf_conntrack":
            return int(objects) * int(size)
    return 0


def _cpu_s(process: Path) -> float:
    """Return the CPU time of a process's threads, to the nanosecond (Documentation/scheduler/sched-stats.rst)."""
    return sum(int(task.read_text().split()[0]) for task in process.glob("task/*/schedstat")) / 1e9
