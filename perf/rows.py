"""A row of results.json: one number with its circumstances."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from xdp.errors import UsageError


@dataclass(frozen=True)
class Row:
    """One number with its circumstances. `low` and `high` are quartiles; ratios are of pairs of trials.

    A ratio is this value over that of the reference in the same round: of rates a large one is good, of times a small
    one is. `variant` tells rows apart that nothing else does: which percentile, which share of new flows.
    """

    case: str
    variant: str
    subject: str
    flows: int  # known ones; 0: every packet began a flow
    services: int
    packet_bytes: int  # with the frame check sequence; of a mix, the mean
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
    ratio_to_against: float | None  # to the same subject of another commit
    ratio_to_against_spread: tuple[float, float] | None
    mode: str
    receiver: str
    frames: int  # sent in all trials
    kernel: str
    commit: str
    cpu: str
    cpus: int
    machine_was_quiet: bool
    when: str


def read(path: Path) -> list[Row]:
    """Return the rows of a results.json. Raises UsageError if it is none of this version."""
    try:
        return [Row(**fields) for fields in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: not the results.json of a run of this version ({error})") from None
