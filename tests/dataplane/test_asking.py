"""Which neighbours are asked for and when again, by a clock that stands still."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from dataplane.asking import LONGEST_RETRY_S, RECHECK_S, RETRY_S, SEEK_S, Asking, Need
from dataplane.mirror import Mirror
from dataplane.netdev import Interface, Neighbour, NeighbourKey, NeighbourState

KEY: NeighbourKey = (2, 0x0A000001)
MAC = b"\2\0\0\0\0\1"


class Site:
    """A kernel that notes what it is told, and what neighbours are needed for."""

    def __init__(self) -> None:
        self.told: list[tuple[str, list[NeighbourKey]]] = []
        self.needs: dict[NeighbourKey, Need] = {}
        self.mirror = Mirror(["eth0"])
        self.mirror.set_interfaces([Interface("eth0", 2, MAC, 1500, is_up=True)])
        self.asking = Asking(self, self.mirror, lambda key: self.needs.get(key, Need.NOTHING))

    def neighbours(self) -> list[Neighbour]:
        return list(self.mirror.neighbours.values())

    def resolve(self, keys: Iterable[NeighbourKey], *, keep: bool) -> dict[NeighbourKey, int]:
        self.told.append(("keep" if keep else "ask", sorted(keys)))
        return {}

    def let_go(self, keys: Iterable[NeighbourKey]) -> None:
        self.told.append(("let go", sorted(keys)))

    def said(self, now: float = 0.0) -> list[tuple[str, list[NeighbourKey]]]:
        """Return what is sent now."""
        self.told.clear()
        self.asking.flush(now)
        return self.told

    def knows(self, state: NeighbourState, **fields: bool) -> None:
        self.mirror.set_neighbours([Neighbour(*KEY, MAC, state, **fields)])


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.mark.parametrize(("need", "word"), [(Need.KEPT, "keep"), (Need.CLIENT, "ask")])
def test_what_a_neighbour_is_needed_for_decides_whether_it_is_kept(site: Site, need: Need, word: str):
    site.needs[KEY] = need
    site.asking.ask(KEY)
    assert site.said() == [(word, [KEY])]
    assert site.said() == []


def test_what_was_asked_for_is_not_asked_for_again_unless_it_is_to_be_kept_now(site: Site):
    site.needs[KEY] = Need.CLIENT
    for expected in ([("ask", [KEY])], []):
        site.asking.ask_unless_asked(KEY, keep=False)
        assert site.said() == expected
    site.needs[KEY] = Need.KEPT
    site.asking.ask_unless_asked(KEY, keep=True)
    assert site.said() == [("keep", [KEY])]


def test_packets_ask_once_a_second(site: Site):
    site.needs[KEY] = Need.CLIENT
    sent = []
    for now in (0.0, 0.5, 0.9, 1.0, 1.5):
        site.asking.ask_for_packets(KEY, now)
        sent += [now for _ in site.said(now)]
    assert sent == [0.0, 1.0]


@pytest.mark.parametrize("state", [NeighbourState.PERMANENT, NeighbourState.NOARP])
def test_what_an_administrator_has_set_is_left_alone(site: Site, state: NeighbourState):
    site.knows(state)
    site.asking.ask(KEY)
    assert site.said() == []


def looks(site: Site, until_s: float) -> list[float]:
    """Return when the neighbour was asked for, looking every half second."""
    sent = []
    for step in range(int(2 * until_s)):
        site.asking.look_again(step / 2)
        sent += [step / 2 for _ in site.said(step / 2)]
    return sent


def test_a_silent_neighbour_is_asked_ever_less_often(site: Site):
    site.needs[KEY] = Need.CLIENT
    site.asking.ask(KEY)
    site.said()
    sent = looks(site, 2000)
    waits = [later - earlier for earlier, later in zip([0.0, *sent], sent, strict=False)]
    assert waits == [min(RETRY_S * 2**n, LONGEST_RETRY_S) for n in range(len(waits))]
    assert waits[-1] == LONGEST_RETRY_S


def test_a_neighbour_that_answers_is_looked_at_once_a_minute(site: Site):
    site.needs[KEY] = Need.CLIENT
    site.knows(NeighbourState.REACHABLE)
    site.asking.ask(KEY)
    site.said()
    assert looks(site, 4 * RECHECK_S) == [RECHECK_S, 2 * RECHECK_S, 3 * RECHECK_S]


def test_what_the_kernel_manages_is_left_to_it(site: Site):
    site.needs[KEY] = Need.KEPT
    site.knows(NeighbourState.REACHABLE, is_managed=True)
    site.asking.ask(KEY)
    site.said()
    assert looks(site, 200) == []


def test_a_neighbour_that_nothing_needs_is_let_go(site: Site):
    site.needs[KEY] = Need.KEPT
    site.asking.ask(KEY)
    site.said()
    site.needs.clear()
    site.asking.settle(KEY)
    assert site.said() == [("let go", [KEY])]
    assert looks(site, 20) == []


def test_a_neighbour_that_is_no_longer_kept_is_a_clients_from_then_on(site: Site):
    site.needs[KEY] = Need.KEPT
    site.asking.ask(KEY)
    site.said()
    site.needs[KEY] = Need.CLIENT
    site.asking.settle(KEY)
    assert site.said() == [("let go", [KEY]), ("ask", [KEY])]


def test_what_a_predecessor_had_kept_stays_until_it_is_known_who_is_wanted(site: Site):
    site.asking.adopt(KEY, 0.0)
    assert site.said() == []
    site.needs[KEY] = Need.KEPT
    site.asking.let_go_of_the_rest()
    assert site.said() == []
    site.needs.clear()
    site.asking.let_go_of_the_rest()
    assert site.said() == [("let go", [KEY])]


def test_who_leaves_gives_everything_back(site: Site):
    site.knows(NeighbourState.REACHABLE, is_managed=True, is_ours=True)
    site.needs[KEY] = Need.KEPT
    site.asking.ask(KEY)
    site.asking.let_go_all()
    assert site.told == [("let go", [KEY])]
    assert site.said() == []


def test_a_stranger_that_does_not_answer_is_given_up_and_one_that_does_is_kept_in_sight(site: Site):
    site.asking.seek(KEY, 0.0)
    site.asking.seek(KEY, 0.5)
    assert site.said() == [("ask", [KEY])]
    site.asking.look_again(SEEK_S)
    assert site.said(SEEK_S) == [("let go", [KEY])]
    site.asking.seek(KEY, 10.0)
    site.said(10.0)
    site.needs[KEY] = Need.CLIENT
    assert site.asking.has_found(KEY)
    site.asking.look_again(10.0 + SEEK_S)
    assert site.said(10.0 + SEEK_S) == []
    assert looks(site, 70.0) == []
    site.asking.look_again(10.0 + RECHECK_S)
    assert site.said(10.0 + RECHECK_S) == [("ask", [KEY])]


def test_a_stranger_that_an_endpoint_turns_out_to_be_is_kept(site: Site):
    site.asking.seek(KEY, 0.0)
    site.needs[KEY] = Need.KEPT
    site.asking.ask(KEY)
    assert site.said() == [("keep", [KEY])]
    site.asking.look_again(SEEK_S - 1)
    assert site.said(SEEK_S - 1) == []
