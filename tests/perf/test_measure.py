"""Trials: taken in turns, paired by round, repeated when the machine was not ours."""

from __future__ import annotations

import json

import pytest

from perf import report
from perf.__main__ import CASES, choose_cases, subjects
from perf.measure import Case, Trial, interleaved, paired_ratios, spread
from xdp.errors import UsageError


def trial(rate: float, *, sent: int = 1000, arrived: int = 1000, steal: float = 0.0) -> Trial:
    return Trial(sent, sent, arrived, arrived / rate, steal)


def test_trials_are_taken_in_turns_every_other_round_backwards():
    order = []

    def one(name):
        order.append(name)
        return trial(1)

    interleaved(["a", "b"], 3, one, lambda: None)
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_a_trial_with_stolen_time_is_repeated():
    outcomes = iter([trial(1, steal=0.5), trial(2)])
    (kept,) = interleaved(["a"], 1, lambda _: next(outcomes), lambda: None)["a"]
    assert kept.rate_pps == 2


def test_a_machine_that_is_never_ours_ends_the_repeating():
    (kept,) = interleaved(["a"], 1, lambda _: trial(1, steal=0.5), lambda: None)["a"]
    assert kept.steal == 0.5


def test_ratios_are_paired_by_round():
    # The machine became twice as slow; the ratio did not change.
    ratio = paired_ratios([trial(100), trial(50)], [trial(200), trial(100)])
    assert (ratio.median, ratio.low, ratio.high) == (0.5, 0.5, 0.5)


def test_a_spread_is_the_quartiles():
    got = spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (got.low, got.median, got.high) == (2.0, 3.0, 4.0)
    assert got.relative == pytest.approx(2 / 3)


def test_loss_is_what_did_not_arrive():
    assert trial(1, sent=1000, arrived=900).loss == pytest.approx(0.1)


def test_an_unknown_case_is_refused_by_name():
    with pytest.raises(UsageError, match="--only nonsense: no such case; the cases are established"):
        choose_cases(["nonsense"])


def test_every_case_names_subjects_that_exist():
    assert {name for case in CASES for name in (*case.subjects, case.bare)} <= set(subjects())


CASE = Case("established", ("bare-xdp", "iptables"), (1, 1000), in_step=False, bare="bare-xdp", question="how close?")
GIVEN = report.conditions("all on CPU 1", machine_was_quiet=False)


def made_rows():
    trials = {"bare-xdp": [trial(3e6), trial(3.2e6)], "iptables": [trial(6e5), trial(8e5, sent=1010)]}
    return [row for flows in CASE.flows for row in report.rows(CASE, flows, trials, GIVEN, 64)]


def test_a_row_has_its_ratios_and_its_circumstances():
    row = made_rows()[1]
    assert (row.case, row.subject, row.flows, row.value, row.unit) == (
        "established",
        "iptables",
        1,
        700_000,
        "packets/s",
    )
    assert (row.ratio_to_bare, row.ratio_to_iptables) == (0.225, 1.0)
    assert row.loss == pytest.approx(0.0099, abs=1e-4)
    assert row.kernel
    assert row.commit


def test_a_subject_without_its_reference_has_no_ratio():
    (row,) = report.rows(CASE, 1, {"iptables": [trial(1)]}, GIVEN, 64)
    assert (row.ratio_to_bare, row.ratio_to_iptables) == (None, 1.0)


def test_the_table_says_what_the_numbers_mean():
    text = report.table(made_rows(), [CASE])
    assert "established: how close?" in text
    assert "0.23x" in text or "0.22x" in text
    assert "do not quote this" in text
    assert "the ratios are" in text.replace("\n", " ")
    assert max(len(line) for line in text.splitlines()) <= 100


def test_a_generator_that_had_to_wait_makes_numbers_that_nobody_quotes():
    given = {**GIVEN, "machine_was_quiet": True}
    calm, hindered = trial(3e6), Trial(1000, 1000, 1000, 1.0, 0.0, waited=0.3)
    assert report.is_undisturbed(report.rows(CASE, 1, {"bare-xdp": [calm]}, given, 64))
    assert not report.is_undisturbed(report.rows(CASE, 1, {"bare-xdp": [hindered]}, given, 64))
    assert report.is_undisturbed(report.rows(CASE, 1, {"iptables": [hindered]}, given, 64))


def test_json_text_and_picture_are_written(tmp_path):
    report.write(tmp_path, made_rows(), [CASE])
    assert [row["subject"] for row in json.loads((tmp_path / "results.json").read_text())] == [
        "bare-xdp",
        "iptables",
    ] * 2
    assert (tmp_path / "results.txt").read_text().startswith("established")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_is_an_empty_list(tmp_path):
    report.write(tmp_path, [], [CASE])
    assert json.loads((tmp_path / "results.json").read_text()) == []
