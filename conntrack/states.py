"""The state machine of TCP, UDP and echo requests as three tables: transitions, timeouts, and who makes room.

The tables are the documentation, the test data and the program: `write_machine` puts them where both packet paths read
them. Behaviours C2 to C7.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from xdp.schema import Direction, Event, State

S, E = State, Event
ORIGINAL, REPLY = Direction.ORIGINAL, Direction.REPLY
BOTH = (ORIGINAL, REPLY)

FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32

_OPEN = (S.SYN_SENT, S.SYN_RECEIVED, S.ADOPTED, S.ESTABLISHED)
_UNREPLIED = (S.SYN_SENT, S.ADOPTED, S.ADOPTED_FIN)
_TCP = (*_OPEN, S.ADOPTED_FIN, S.FIN_ORIGINAL, S.FIN_REPLY, S.TIME_WAIT, S.CLOSING)

# (state, direction, event) -> next state. What is not listed stays as it is.
TRANSITIONS: dict[tuple[State, Direction, Event], State] = {
    (S.SYN_SENT, REPLY, E.SYN_ACK): S.SYN_RECEIVED,
    (S.SYN_SENT, REPLY, E.SYN): S.SYN_RECEIVED,  # simultaneous open, RFC 9293 3.5
    (S.SYN_SENT, REPLY, E.ACK): S.ADOPTED,  # a challenge ACK for an older connection
    (S.SYN_RECEIVED, ORIGINAL, E.ACK): S.ESTABLISHED,
    (S.SYN_RECEIVED, ORIGINAL, E.DATA): S.ESTABLISHED,
    (S.ADOPTED, REPLY, E.ACK): S.ESTABLISHED,
    (S.ADOPTED, REPLY, E.DATA): S.ESTABLISHED,
    (S.ADOPTED, REPLY, E.SYN_ACK): S.SYN_RECEIVED,  # the older one is reset, and a SYN sent again is answered
    (S.ADOPTED, ORIGINAL, E.FIN): S.ADOPTED_FIN,  # the first packet's, too
    (S.ADOPTED_FIN, REPLY, E.ACK): S.FIN_ORIGINAL,
    (S.ADOPTED_FIN, REPLY, E.DATA): S.FIN_ORIGINAL,
    # A FIN from one side keeps the other. What only the client has said anything on stays unreplied, whatever it says:
    # a flood of SYN and FIN, or SYN, RST and ACK, must not make connections that last (C6).
    **{(s, ORIGINAL, E.FIN): S.FIN_ORIGINAL for s in _OPEN if s not in _UNREPLIED},
    **{(s, REPLY, E.FIN): S.FIN_REPLY for s in _OPEN},
    (S.ADOPTED_FIN, REPLY, E.FIN): S.TIME_WAIT,
    (S.FIN_ORIGINAL, REPLY, E.FIN): S.TIME_WAIT,
    (S.FIN_REPLY, ORIGINAL, E.FIN): S.TIME_WAIT,
    # A RST shortens a flow's life and never ends it, so a blind one does no harm: data revives the flow (C3). For as
    # long as an open one once both sides have gone on: what one side had sent before it saw the RST may come late.
    **{(s, ORIGINAL, E.RST): S.CLOSING for s in _TCP if s != S.TIME_WAIT and s not in _UNREPLIED},
    **{(s, REPLY, E.RST): S.CLOSING for s in _TCP if s != S.TIME_WAIT},
    **{(S.CLOSING, ORIGINAL, event): S.ADOPTED for event in (E.ACK, E.DATA)},
    **{(S.CLOSING, REPLY, event): S.SYN_RECEIVED for event in (E.ACK, E.DATA)},
    (S.UDP_UNREPLIED, REPLY, E.DATA): S.UDP_REPLIED,
}

# The state of a connection after its first packet. What is not listed creates none.
FIRST_STATE: dict[Event, State] = {
    E.DATA: S.UDP_UNREPLIED,  # the only event that UDP knows, and TCP does not
    E.SYN: S.SYN_SENT,
    E.ACK: S.ADOPTED,
    E.FIN: S.ADOPTED,
    E.SYN_ACK: S.ADOPTED,
    E.ECHO: S.ECHO,
}

# A SYN from the client in one of these begins another connection (C2).
REOPENS = (S.TIME_WAIT, S.CLOSING, S.RESET)

# Idle for this long, a connection ends (C5; nf_conntrack's established timeout here is kube-proxy's 2 h 13 m 20 s).
TIMEOUT_S: dict[State, float] = {
    S.SYN_SENT: 60,
    S.SYN_RECEIVED: 60,
    S.ADOPTED: 60,
    S.ADOPTED_FIN: 60,
    S.ESTABLISHED: 8000,
    S.FIN_ORIGINAL: 8000,  # half-closed connections may stay silent for as long as open ones
    S.FIN_REPLY: 8000,
    S.TIME_WAIT: 60,
    S.CLOSING: 10,
    S.RESET: 8000,  # kept for so long; to packets it is over at once (write_machine)
    S.UDP_UNREPLIED: 30,
    S.UDP_REPLIED: 120,
    S.ECHO: 60,
}

# What a Service may call them.
NAMED: dict[str, tuple[State, ...]] = {
    "syn": (S.SYN_SENT, S.SYN_RECEIVED, S.ADOPTED, S.ADOPTED_FIN),
    "established": (S.ESTABLISHED, S.FIN_ORIGINAL, S.FIN_REPLY),
    "closing": (S.CLOSING,),
    "time-wait": (S.TIME_WAIT,),
    "udp": (S.UDP_REPLIED,),
    "udp-unreplied": (S.UDP_UNREPLIED,),
    "icmp": (S.ECHO,),
}

AT_ONCE = 0xFFFFFFFF  # a timeout of -1 jiffies

# Who goes first when both buckets are full: never an established connection (C6, C7).
EARLY_DROP: dict[State, int] = {
    **dict.fromkeys((S.SYN_SENT, S.SYN_RECEIVED, S.ADOPTED, S.ADOPTED_FIN, S.UDP_UNREPLIED, S.ECHO), 1),
    **dict.fromkeys((S.CLOSING, S.TIME_WAIT, S.RESET), 2),
}


def event_of(flags: int) -> Event:
    """Return what the TCP flags FIN..URG say. Combinations that no stack sends are INVALID (C13)."""
    syn, fin, rst, ack = (bool(flags & bit) for bit in (SYN, FIN, RST, ACK))
    if syn + fin + rst > 1 or not (syn or fin or rst or ack):
        return E.INVALID
    if fin and not ack:
        return E.INVALID  # Xmas and its kin: a FIN of a real connection acknowledges
    if syn:
        return E.SYN_ACK if ack else E.SYN
    if rst:
        return E.RST
    return E.FIN if fin else E.ACK


def timeouts_in_jiffies(named: Iterable[tuple[str, float]], hertz: int) -> npt.NDArray[np.uint32]:
    """Return a set of timeouts, by state: the defaults but for those that are `named`, in seconds.

    A connection in state RESET is over for every packet, however early (AT_ONCE), so that others pay nothing for it.
    """
    timeout_s = {**TIMEOUT_S, **{state: seconds for name, seconds in named for state in NAMED[name]}}
    jiffies = np.array([round(timeout_s.get(state, 0) * hertz) for state in range(16)], np.uint32)  # type: ignore[call-overload]
    jiffies[S.RESET] = AT_ONCE
    return jiffies


def write_machine(machine: npt.NDArray[np.void], hertz: int) -> None:
    """Write the tables into the one row of `machine`, with the default timeouts for who has no others."""
    row = machine[0]
    row["event_of_flags"] = [event_of(flags) for flags in range(64)]
    row["next_state"] = [
        TRANSITIONS.get((State(state), Direction(way), Event(event)), State(state))
        if state < State.STATES and event < Event.EVENTS
        else state
        for state in range(16)
        for way in range(2)
        for event in range(8)
    ]
    row["first_state"] = [FIRST_STATE.get(event, S.FREE) for event in range(8)]  # type: ignore[call-overload]
    row["reopens"] = [state in REOPENS for state in range(16)]
    row["early_drop"] = [EARLY_DROP.get(state, 0) for state in range(16)]  # type: ignore[call-overload]
    row["timeout"][:16] = timeouts_in_jiffies((), hertz)
