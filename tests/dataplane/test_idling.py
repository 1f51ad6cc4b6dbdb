"""dataplane/idling.py: how long a loop looks for frames before it sleeps."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dataplane import idling
from xdp.jit import compiled

HOUR_NS = 3600 * 10**9


@compiled
def _is_over(row, empty):
    return idling.is_over(row[0], empty)


@compiled
def _learn(row, now_ns):
    idling.learn(row[0], now_ns)


def _idling(since: int = 0, patience: int = 0):
    return np.array([(since, patience)], idling.IDLING)


def test_a_loop_that_has_learnt_nothing_sleeps_at_once():
    assert _is_over(_idling(), idling.TURNS)


def test_a_patient_one_looks_on_from_when_frames_stopped_to_come():
    row = _idling(patience=HOUR_NS)
    before = time.monotonic_ns()
    assert not _is_over(row, idling.TURNS)
    assert before <= row[0]["since"] <= time.monotonic_ns()
    since = int(row[0]["since"])
    assert not any(_is_over(row, empty) for empty in range(idling.TURNS + 1, 1000))
    assert row[0]["since"] == since


def test_its_patience_ends():
    row = _idling(time.monotonic_ns() - HOUR_NS - 1, HOUR_NS)
    ends = [empty for empty in range(idling.TURNS + 1, idling.TURNS + 40) if _is_over(row, empty)]
    assert ends, "the clock is looked at now and then"
    assert len(ends) < 4, "and not at every turn"


def test_short_sleeps_make_patient_up_to_a_limit_and_a_long_one_less():
    row = _idling(since=1000)
    seen = []
    for _ in range(6):
        _learn(row, 1000 + idling.MOST_NS)
        seen.append(int(row[0]["patience"]))
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[1] < seen[-1] == idling.MOST_NS
    _learn(row, 1001 + idling.MOST_NS)
    assert row[0]["patience"] == idling.MOST_NS // 2


@pytest.mark.parametrize("patience", [0, 8_000, 64_000])
def test_long_sleeps_make_impatient(patience: int):
    row = _idling(patience=patience)
    for _ in range(8):
        _learn(row, HOUR_NS)
    assert row[0]["patience"] == 0
