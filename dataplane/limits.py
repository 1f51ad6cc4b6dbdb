"""How many answers of our own are given: to one client, and in all.

In all, so that a flood makes a packet loop send no more than ANSWERS a second. Such a limit tells tales: whoever can be
answered counts how many answers are left, and so learns what was answered to the address that he has forged in other
packets (CVE-2020-25705, "SAD DNS"). So, as in Linux since (net/ipv4/icmp.c):

* Each client has a limit of its own, which is looked at first. Who is over it takes nothing from what is there for all;
  what a client gets depends on nobody else while that lasts.
* What is there for all is charged at random: every answer pays CHARGE with a chance of one in CHARGE. So many answers
  are counted no more exactly than a die is thrown so many times: by +-176 of a thousand, where all that one client can
  be given in a second are CLIENT_ANSWERS. Where Linux takes 0, 1 or 2 away, that is +-26.

A client is an IPv4 address, or the network of an IPv6 one: who has a /64 has all addresses there (RFC 6177). The table
of clients has a place for each that can be answered in a second, four times over, by a hash under the tables' secret;
an entry of another second is a free place: nothing is ever cleared. Where all WAYS places of a client are taken,
by chance alone, it is limited by what there is for all.

The throws are the hashes of a counter, under the same secret: `drawn` begins anywhere, and in a test where that says.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xdp.bundle import Bundle
from xdp.hash import first_place, hash_tuple
from xdp.jit import inlined
from xdp.schema import Limit

REFUSALS, ECHOES = 0, 1
CLIENT_ANSWERS = 100
CHARGE = 32

# How many answers may still be given (in parts of one: as many as there are jiffies in a second), and when it was told.
BUDGET = np.dtype([("left", "u4"), ("since", "u4")])

# Who was given how many answers in which second; by half of the hash whose other half says where.
CLIENT = np.dtype([("who", "u4"), ("second", "u4"), ("given", "u4")])

_ANSWERS = int(Limit.ANSWERS)
_KINDS = 2
_CLIENTS = 4 * _KINDS * _ANSWERS
_WAYS = 8


@dataclass(frozen=True, eq=False)
class Limits(Bundle):
    """Those of one packet loop: the BUDGET of each kind of answers, a CLIENT in each place, and how much was drawn."""

    budgets: npt.NDArray[np.void]
    clients: npt.NDArray[np.void]
    drawn: npt.NDArray[np.uint64]


def new_limits() -> Limits:
    """Return the limits of a packet loop that has given no answer yet."""
    drawn = np.array([secrets.randbits(64)], np.uint64)
    return Limits(np.zeros(_KINDS, BUDGET), np.zeros(_CLIENTS, CLIENT), drawn)


@inlined
def _draw(limits, key):
    """Return 64 bits that nobody foresees who does not know the secret."""
    limits.drawn[0] += np.uint64(1)
    return hash_tuple(limits.drawn[0], np.uint32(0), np.uint8(0), key[0], key[1])


@inlined
def _has_one_left(limits, client, family, kind, second, key):
    """Tell whether a client may be given another answer of a kind in this second, and count that it is."""
    hashed = hash_tuple(client, np.uint32(kind), np.uint8(family), key[0], key[1])
    who = np.uint32(hashed >> np.uint64(32))
    first = first_place(hashed, len(limits.clients) - _WAYS)
    for place in range(first, first + _WAYS):
        entry = limits.clients[place]
        if entry.second != second or entry.given == 0:
            entry.who, entry.second, entry.given = who, second, np.uint32(1)
            return True
        if entry.who == who:
            if entry.given == CLIENT_ANSWERS:
                return False
            entry.given += np.uint32(1)
            return True
    return True


@inlined
def may_answer(node, kind, client, family, now):
    """Tell whether a client (u64: address or network, of a family) may be given another answer, and count that it is.

    What there is for all grows by ANSWERS a second, and holds as many.
    """
    limits, control = node.limits, node.tables.control[0]
    hertz = np.int64(control.hertz)
    budget = limits.budgets[kind]
    passed = np.int64(np.uint32(np.uint32(now) - budget.since))
    left = min(np.int64(budget.left) + passed * _ANSWERS, _ANSWERS * hertz)
    budget.left = left
    budget.since = now
    if left < CHARGE * hertz:
        return False
    second = np.uint32(np.int64(np.uint32(now)) // hertz)
    if not _has_one_left(limits, client, family, kind, second, control.hash_key):
        return False
    if _draw(limits, control.hash_key) % np.uint64(CHARGE) == 0:
        budget.left = left - CHARGE * hertz
    return True
