"""Trials: taken in turns, paired by round, repeated when the machine was not ours."""

from __future__ import annotations

import json

import pytest

from perf import goals, report, rows
from perf.__main__ import choose_cases, subjects
from perf.against import checked_out
from perf.bed import ONE_SERVICE
from perf.cases import Case, Point
from perf.cases.every import CASES
from perf.cases.rates import Rate
from perf.measure import Reading, Trial, interleaved, paired_ratios, spread
from perf.traffic import Load, _delay_ns
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
    assert {name for case in CASES for name in (*case.subjects, case.bare)} <= {*subjects(), ""}


CASE = Case("established", "how close?", Rate(), ("bare-xdp", "iptables-nft"), "bare-xdp", [])
GIVEN = report.conditions("all on CPU 1", machine_was_quiet=False)


def rows_of(trials, load=None, case=CASE, given=GIVEN):
    return report.rows(case, Point(load or Load(1)), trials, given)


def made_rows():
    trials = {"bare-xdp": [trial(3e6), trial(3.2e6)], "iptables-nft": [trial(6e5), trial(8e5, sent=1010)]}
    return [row for flows in (1, 1000) for row in rows_of(trials, Load(flows))]


def test_a_lossy_trial_is_repeated_where_nothing_may_be_lost():
    outcomes = iter([trial(1, sent=1000, arrived=990), trial(2)])
    (kept,) = interleaved(["a"], 1, lambda _: next(outcomes), lambda: None, loss_limit=0.0)["a"]
    assert kept.rate_pps == 2


def test_a_row_has_its_ratios_and_its_circumstances():
    row = made_rows()[1]
    assert (row.case, row.subject, row.flows, row.services, row.packet_bytes, row.value, row.unit) == (
        "established",
        "iptables-nft",
        1,
        1,
        64,
        700_000,
        "packets/s",
    )
    assert (row.ratio_to_bare, row.ratio_to_iptables) == (0.225, 1.0)
    assert row.loss == pytest.approx(0.0099, abs=1e-4)
    assert row.kernel
    assert row.commit


def test_a_row_is_compared_with_the_same_subject_of_another_commit():
    ours, other = rows_of({"turnout-xdp": [trial(3e6)], "turnout-xdp@abc": [trial(2e6)]})
    assert (ours.ratio_to_against, other.ratio_to_against) == (1.5, None)


def test_every_number_of_a_trial_has_a_row():
    found = rows_of({"a": [Reading({"p50": 1.5, "p99": 20.0})]})
    assert [(row.variant, row.value) for row in found] == [("p50", 1.5), ("p99", 20.0)]


def test_a_subject_without_its_reference_has_no_ratio():
    (row,) = rows_of({"iptables-nft": [trial(1)]})
    assert (row.ratio_to_bare, row.ratio_to_iptables) == (None, 1.0)


def test_the_table_says_what_the_numbers_mean():
    text = report.table(made_rows(), {"established": "how close?"})
    assert "established: how close?" in text
    assert "0.225" in text
    assert "do not quote this" in text
    assert "the ratios are" in text.replace("\n", " ")
    assert max(len(line) for line in text.splitlines()) <= 120


def test_a_generator_that_had_to_wait_makes_numbers_that_nobody_quotes():
    given = {**GIVEN, "machine_was_quiet": True}
    calm, hindered = trial(3e6), Trial(1000, 1000, 1000, 1.0, 0.0, waited=0.3)
    assert report.is_undisturbed(rows_of({"bare-xdp": [calm]}, given=given))
    assert not report.is_undisturbed(rows_of({"bare-xdp": [hindered]}, given=given))
    assert report.is_undisturbed(rows_of({"iptables-nft": [hindered]}, given=given))


def test_json_text_and_pictures_are_written_and_read(tmp_path):
    report.write(tmp_path, made_rows(), {})
    assert [row["subject"] for row in json.loads((tmp_path / "results.json").read_text())] == [
        "bare-xdp",
        "iptables-nft",
    ] * 2
    assert rows.read(tmp_path / "results.json")[0].value == 3_100_000
    assert (tmp_path / "results.txt").read_text().startswith("established")
    assert (tmp_path / "flows.png").read_bytes().startswith(b"\x89PNG")


def test_every_case_that_has_a_picture_can_be_drawn(tmp_path):
    from perf import pictures

    made = []
    for case in CASES:
        for point in case.points:
            is_delay = case.name in {"latency", "first-packet"}
            for name in ("p50", "p99") if is_delay else ("",):
                outcome = Reading({name: 2.0})
                made += report.rows(case, point, {subject: [outcome] for subject in case.subjects}, GIVEN)
    drawn = {path.stem for path in pictures.draw(tmp_path, made)}
    assert drawn == {"flows", "services", "mixed", "first-packet", "update", "latency", "rates"}


def test_results_of_another_version_are_refused(tmp_path):
    (tmp_path / "results.json").write_text('[{"case": "x"}]')
    with pytest.raises(UsageError, match=r"results\.json: not the results"):
        rows.read(tmp_path / "results.json")


def test_goals_are_a_table_with_what_was_measured():
    made = rows_of({"bare-xdp": [trial(4e6)], "turnout-xdp": [trial(3e6)]}, Load(1000))
    table = goals.table(made)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]][:2] == ["G1", "G1"]
    assert "| 0.75 |" in table
    assert table.count("| G") == len(goals.GOALS)
    assert all(len(line.split("|")) == 8 for line in table.splitlines())


def test_delays_are_counted_in_columns_of_a_sixteenth():
    assert [_delay_ns(column) for column in (0, 15, 16, 31, 32)] == [0.5, 15.5, 16.5, 31.5, 33]
    assert all(_delay_ns(column) < _delay_ns(column + 1) < 1.13 * _delay_ns(column) for column in range(16, 400))


def test_another_commit_is_checked_out_and_goes_again():
    with checked_out("HEAD") as (name, folder):
        assert (folder / "perf" / "__main__.py").exists()
        assert len(name) == 10
    assert not folder.exists()


def test_a_commit_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="--against nowhere: no such commit"), checked_out("nowhere"):
        pass


def test_points_of_a_case_differ():
    for case in CASES:
        keys = [
            (point.load.flows, point.load.new_every, point.variant, point.shape, point.load.frame_bytes)
            for point in case.points
        ]
        assert len(set(keys)) == len(keys), case.name
    assert ONE_SERVICE.services == 1


def test_nothing_measured_is_an_empty_list(tmp_path):
    report.write(tmp_path, [], {})
    assert json.loads((tmp_path / "results.json").read_text()) == []
