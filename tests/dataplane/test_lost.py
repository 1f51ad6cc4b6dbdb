"""What is told of frames that a driver did not take, by itself: tests/scenarios/ has it with real ones."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from dataplane.lost import Losses
from xdp.errors import MissingFeatureError
from xdp.redirects import Lost

OURS, THEIRS = 2, 9
GIVEN = {"eth0": SimpleNamespace(ifindex=2), "eth1": SimpleNamespace(ifindex=3)}
NAMES = {2: "eth0", 3: "eth1"}
FULL, REFUSED = Lost(2, 3, 0), Lost(2, 3, errno.EOPNOTSUPP)


@dataclass
class Kernel:
    """Counts as the tracepoints do, and answers for what an interface takes."""

    frames: dict[Lost, int] = field(default_factory=dict)
    takes: bool | None = None

    def counts(self) -> dict[Lost, int]:
        return dict(self.frames)

    def close(self) -> None:
        self.frames = {}

    def takes_redirects(self, _ifindex: int) -> bool | None:
        return self.takes


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def losses(kernel: Kernel) -> Losses:
    made = Losses()
    made.open(lambda: kernel)  # type: ignore[arg-type, return-value]
    return made


def look(losses: Losses, kernel: Kernel, now: float) -> None:
    losses.look(GIVEN, kernel, now)  # type: ignore[arg-type]


def test_only_redirects_between_interfaces_and_from_ours_are_counted(losses: Losses, kernel: Kernel) -> None:
    kernel.frames = {FULL: 3, Lost(THEIRS, 3, 0): 5, Lost(2, 0, errno.ENOBUFS): 7}
    assert losses.counts({OURS}) == {FULL: 3}
    losses.close()
    assert losses.counts({OURS}) == {}


def test_an_interface_that_loses_frames_for_its_driver_is_left_to_the_kernel_while_nobody_knows(losses, kernel) -> None:
    kernel.frames = {REFUSED: 1}
    look(losses, kernel, 100.0)
    assert losses.refusing == {3: "eth1"}
    assert losses.complaints({OURS}, NAMES.__getitem__, 100.0) == [], "it is told of with the others that take none"
    look(losses, kernel, 101.0)
    assert losses.refusing == {3: "eth1"}, "nothing is sent there now, so nothing is lost"
    kernel.takes = True
    look(losses, kernel, 102.0)
    assert losses.refusing == {}
    assert losses.complaints({OURS}, NAMES.__getitem__, 102.0) == []


def test_frames_that_were_lost_are_told_of_for_a_minute(losses, kernel) -> None:
    kernel.takes, kernel.frames = True, {Lost(2, 3, errno.ENETDOWN): 4}
    look(losses, kernel, 100.0)
    (text,) = losses.complaints({OURS}, NAMES.__getitem__, 159.0)
    assert text.startswith(f"eth1: 4 frames were lost on their way out (errno {errno.ENETDOWN})")
    assert losses.complaints({OURS}, NAMES.__getitem__, 160.0) == []


def test_a_full_ring_is_told_of_when_it_stays_full(losses, kernel) -> None:
    kernel.takes = True
    for second in range(6):
        kernel.frames = {FULL: 10 * (second + 1)}
        look(losses, kernel, 100.0 + second)
        told = losses.complaints({OURS}, NAMES.__getitem__, 100.0 + second)
        assert bool(told) == (second == 5), second
    look(losses, kernel, 106.0)
    assert losses.complaints({OURS}, NAMES.__getitem__, 106.0) == [], "it has ended"


def test_a_kernel_that_tells_nothing_is_named_and_loses_nothing() -> None:
    def refuse() -> None:
        raise MissingFeatureError("no BTF")

    losses = Losses()
    losses.open(refuse)  # type: ignore[arg-type]
    assert losses.uncounted == "no BTF"
    assert losses.counts({OURS}) == {}
    losses.close()
