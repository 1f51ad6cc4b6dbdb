"""What is asked: a case is one question, its points are the circumstances under which it is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from perf.bed import ONE_SERVICE, Shape, Testbed
from perf.measure import Outcome
from perf.traffic import Load


@dataclass(frozen=True)
class Point:
    """The circumstances of one measurement. `variant` tells points apart that flows and Services do not.

    `left_out` subjects are not measured here. Points that are not `quick` wait for a whole run.
    """

    load: Load
    shape: Shape = ONE_SERVICE
    variant: str = ""
    quick: bool = True
    left_out: frozenset[str] = frozenset()


class Kind(Protocol):
    """A way to measure. `loss_limit`: above it, a trial is repeated."""

    @property
    def unit(self) -> str:
        """Of what is measured; "" if `units` has one for each variant."""

    @property
    def mode(self) -> str:
        """How frames are sent, in words."""

    @property
    def more_is_better(self) -> bool:
        """Whether it is."""

    @property
    def loss_limit(self) -> float:
        """The share of frames that may be lost in a trial."""

    def prepare(self, bed: Testbed, point: Point) -> None:
        """Get a bed ready for trials under the point's circumstances."""

    def trial(self, bed: Testbed, seconds: float, most_new: int) -> Outcome:
        """Measure once, for about so long, with at most so many new flows."""


@dataclass(frozen=True)
class Case:
    """A question. Ratios refer to `bare`, and to iptables-nft. Without `rounds`: as many as the run has."""

    name: str
    question: str
    kind: Kind
    subjects: tuple[str, ...]
    bare: str
    points: Sequence[Point]
    rounds: int | None = None

    def unit(self, variant: str) -> str:
        """Return the unit of what a trial found under this name."""
        units: Mapping[str, str] = getattr(self.kind, "units", {})
        return units.get(variant, self.kind.unit)


PEERS = ("iptables-nft", "iptables-legacy", "nftables", "nftables-flowtable")
EVERYBODY = ("bare-xdp", "turnout-xdp", *PEERS)
