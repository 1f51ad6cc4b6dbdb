"""The state machine: its tables, and the compiled code and memory that they become."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from conntrack import states
from conntrack.states import ACK, BOTH, FIN, FIRST_STATE, ORIGINAL, PSH, REPLY, RST, SYN, TRANSITIONS, URG, event_of
from xdp import schema
from xdp.schema import Direction, Event, State

HERTZ = 250
REAL = [state for state in State if state != State.STATES]
EVENTS = [event for event in Event if event != Event.EVENTS]
E, S = Event, State
Move = tuple[Direction, Event]


@pytest.fixture(scope="module")
def machine() -> npt.NDArray[np.void]:
    row = np.zeros(1, schema.MACHINE)
    states.write_machine(row, HERTZ)
    return row[0]


def through(start: State, *moves: Move) -> State:
    state = start
    for way, event in moves:
        state = TRANSITIONS.get((state, way, event), state)
    return state


@pytest.mark.parametrize(
    ("flags", "event"),
    [
        (SYN, E.SYN),
        (SYN | PSH, E.SYN),
        (SYN | ACK, E.SYN_ACK),
        (SYN | ACK | PSH, E.SYN_ACK),
        (ACK, E.ACK),
        (ACK | PSH, E.ACK),
        (ACK | PSH | URG, E.ACK),
        (FIN | ACK, E.FIN),
        (FIN | ACK | PSH, E.FIN),
        (RST, E.RST),
        (RST | ACK, E.RST),
        (RST | ACK | PSH, E.RST),
    ],
)
def test_flags_that_stacks_send(flags: int, event: Event):
    assert event_of(flags) is event


@pytest.mark.faults(52)
@pytest.mark.parametrize(
    "flags",
    [
        0,
        PSH,
        URG,
        PSH | URG,
        FIN,
        FIN | PSH | URG,
        SYN | FIN,
        SYN | FIN | ACK,
        SYN | RST,
        SYN | RST | ACK,
        FIN | RST,
        63,
    ],
)
def test_c13_flags_that_no_stack_sends_create_no_state_and_change_none(flags: int):
    assert event_of(flags) is E.INVALID
    assert E.INVALID not in FIRST_STATE
    assert not [move for move in TRANSITIONS if move[2] == E.INVALID]


def test_the_machine_in_memory_says_what_the_tables_say(machine: npt.NDArray[np.void]):
    for flags in range(64):
        assert machine["event_of_flags"][flags] == event_of(flags)
    for state, way, event in itertools.product(REAL, BOTH, EVENTS):
        expected = TRANSITIONS.get((state, way, event), state)
        assert machine["next_state"][state << 4 | way << 3 | event] == expected
    for event in EVENTS:
        assert machine["first_state"][event] == FIRST_STATE.get(event, S.FREE)
    for state in REAL:
        assert machine["reopens"][state] == (state in states.REOPENS)
        assert machine["early_drop"][state] == states.EARLY_DROP.get(state, 0)
        expected = states.AT_ONCE if state == S.RESET else states.TIMEOUT_S.get(state, 0) * HERTZ
        assert machine["timeout"][state] == expected
    assert not machine["timeout"][16:].any(), "sets that Services may ask for"


def test_numbers_that_are_no_state_or_event_lead_nowhere(machine: npt.NDArray[np.void]):
    for state, way, event in itertools.product(range(16), range(2), range(8)):
        if state >= S.STATES or event >= E.EVENTS:
            assert machine["next_state"][state << 4 | way << 3 | event] == state


def test_every_state_but_free_ends_some_time():
    assert set(states.TIMEOUT_S) == set(REAL) - {S.FREE}


def test_nothing_leads_to_a_free_record():
    assert S.FREE not in TRANSITIONS.values()
    assert S.FREE not in FIRST_STATE.values()


def test_c2_a_handshake_establishes():
    assert FIRST_STATE[E.SYN] is S.SYN_SENT
    assert through(S.SYN_SENT, (REPLY, E.SYN_ACK)) is S.SYN_RECEIVED
    assert through(S.SYN_SENT, (REPLY, E.SYN_ACK), (ORIGINAL, E.ACK)) is S.ESTABLISHED


@pytest.mark.faults(56, 57)
def test_c2_repeated_handshake_packets_change_nothing():
    assert through(S.SYN_SENT, (ORIGINAL, E.SYN)) is S.SYN_SENT
    assert through(S.SYN_RECEIVED, (REPLY, E.SYN_ACK), (ORIGINAL, E.SYN)) is S.SYN_RECEIVED
    assert through(S.ESTABLISHED, (REPLY, E.SYN_ACK), (ORIGINAL, E.SYN)) is S.ESTABLISHED


@pytest.mark.faults(61, 65)
def test_c2_simultaneous_open():
    assert through(S.SYN_SENT, (REPLY, E.SYN), (ORIGINAL, E.SYN_ACK), (REPLY, E.SYN_ACK), (ORIGINAL, E.ACK)) is (
        S.ESTABLISHED
    )


@pytest.mark.faults(60)
@pytest.mark.parametrize("state", [S.SYN_RECEIVED, S.ESTABLISHED])
def test_c2_a_fin_of_one_side_keeps_the_other(state: State):
    assert through(state, (ORIGINAL, E.FIN)) is S.FIN_ORIGINAL
    assert through(state, (REPLY, E.FIN)) is S.FIN_REPLY
    half_closed = [(REPLY, E.ACK), (REPLY, E.ACK), (ORIGINAL, E.ACK), (ORIGINAL, E.FIN)]
    assert through(state, (ORIGINAL, E.FIN), *half_closed) is S.FIN_ORIGINAL
    assert states.TIMEOUT_S[S.FIN_ORIGINAL] == states.TIMEOUT_S[S.FIN_REPLY] == states.TIMEOUT_S[S.ESTABLISHED]


@pytest.mark.faults(60)
@pytest.mark.parametrize("first", BOTH)
def test_c2_fins_of_both_sides_close_in_either_order(first: Direction):
    assert through(S.ESTABLISHED, (first, E.FIN), (Direction(1 - first), E.FIN)) is S.TIME_WAIT


def test_c2_a_syn_begins_anew_on_what_is_closing_only():
    assert set(states.REOPENS) == {S.TIME_WAIT, S.CLOSING, S.RESET}


@pytest.mark.faults(59)
@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize("state", [S.SYN_RECEIVED, S.ESTABLISHED, S.FIN_ORIGINAL, S.FIN_REPLY])
def test_c3_a_rst_shortens_a_connection_s_life_and_data_revives_it(state: State, way: Direction):
    assert through(state, (way, E.RST)) is S.CLOSING
    assert states.TIMEOUT_S[S.CLOSING] == 10
    for first in BOTH:
        revived = through(state, (way, E.RST), (first, E.ACK))
        assert states.TIMEOUT_S[revived] == 60
        assert through(revived, (Direction(1 - first), E.ACK)) is S.ESTABLISHED


@pytest.mark.parametrize("late", BOTH)
@pytest.mark.parametrize("state", [S.ESTABLISHED, S.FIN_ORIGINAL, S.FIN_REPLY])
def test_c3_what_crosses_a_rst_makes_no_connection_that_lasts(state: State, late: Direction):
    """However much one side has sent before it saw the RST of the other."""
    reached = through(state, (Direction(1 - late), E.RST), *[(late, E.ACK)] * 9)
    assert states.TIMEOUT_S[reached] == 60
    assert states.EARLY_DROP[reached] == 1


@pytest.mark.parametrize("state", [S.SYN_SENT, S.ADOPTED])
def test_c3_a_rst_of_the_endpoint_refuses_a_connection(state: State):
    assert through(state, (REPLY, E.RST)) is S.CLOSING


@pytest.mark.parametrize("first", sorted(set(FIRST_STATE.values())))
def test_c6_what_one_side_says_alone_never_makes_a_connection_that_lasts(first: State):
    reached = {first}
    for _ in states.TIMEOUT_S:
        reached |= {through(state, (ORIGINAL, event)) for state in reached for event in Event if event < E.EVENTS}
    assert reached <= {first, S.ADOPTED_FIN}
    assert {(states.EARLY_DROP[state], states.TIMEOUT_S[state]) for state in reached} == {(1, states.TIMEOUT_S[first])}


def test_c6_nor_does_a_client_alone_whom_the_endpoint_has_refused():
    reached = {S.CLOSING}
    for _ in states.TIMEOUT_S:
        reached |= {through(state, (ORIGINAL, event)) for state in reached for event in Event if event < E.EVENTS}
    assert max(states.TIMEOUT_S[state] for state in reached) == 60


def test_c3_a_rst_does_not_shorten_time_wait():
    assert through(S.TIME_WAIT, (ORIGINAL, E.RST)) is S.TIME_WAIT


def test_c11_a_connection_met_in_mid_stream_is_adopted_until_a_reply_proves_it():
    for event in (E.ACK, E.FIN, E.SYN_ACK):
        assert FIRST_STATE[event] is S.ADOPTED
    assert through(S.ADOPTED, (ORIGINAL, E.ACK)) is S.ADOPTED
    assert through(S.ADOPTED, (REPLY, E.ACK)) is S.ESTABLISHED


@pytest.mark.parametrize("answer", [[E.FIN], [E.ACK, E.FIN], [E.DATA, E.ACK, E.FIN]])
def test_c11_a_connection_met_at_its_client_s_fin_closes_with_the_endpoint_s(answer: list[Event]):
    met = through(FIRST_STATE[E.FIN], (ORIGINAL, E.FIN))
    assert through(met, *((REPLY, event) for event in answer), (ORIGINAL, E.ACK)) is S.TIME_WAIT
    assert through(met, (REPLY, E.ACK)) is S.FIN_ORIGINAL
    assert through(met, (REPLY, E.RST)) is S.CLOSING


def test_c2_a_handshake_after_a_challenge_ack_establishes():
    challenged = through(S.SYN_SENT, (REPLY, E.ACK), (ORIGINAL, E.RST), (ORIGINAL, E.SYN))
    assert challenged is S.ADOPTED
    assert through(challenged, (REPLY, E.SYN_ACK)) is S.SYN_RECEIVED
    assert through(challenged, (REPLY, E.SYN_ACK), (ORIGINAL, E.ACK)) is S.ESTABLISHED


def test_a_rst_begins_no_connection():
    assert E.RST not in FIRST_STATE


def test_udp_is_unreplied_until_a_reply():
    assert FIRST_STATE[E.DATA] is S.UDP_UNREPLIED
    assert through(S.UDP_UNREPLIED, (ORIGINAL, E.DATA)) is S.UDP_UNREPLIED
    assert through(S.UDP_UNREPLIED, (REPLY, E.DATA)) is S.UDP_REPLIED


def test_c8_nothing_but_a_syn_leads_out_of_a_reset_connection():
    assert not [move for move, after in TRANSITIONS.items() if S.RESET in (move[0], after)]


def test_c5_defaults():
    expected = {
        S.ESTABLISHED: 2 * 3600 + 13 * 60 + 20,
        S.SYN_SENT: 60,
        S.CLOSING: 10,
        S.TIME_WAIT: 60,
        S.UDP_REPLIED: 120,
        S.UDP_UNREPLIED: 30,
    }
    assert {state: states.TIMEOUT_S[state] for state in expected} == expected


def test_c6_c7_established_connections_never_make_room():
    assert not {S.ESTABLISHED, S.FIN_ORIGINAL, S.FIN_REPLY, S.UDP_REPLIED} & states.EARLY_DROP.keys()
    assert states.EARLY_DROP[S.SYN_SENT] < states.EARLY_DROP[S.CLOSING]
