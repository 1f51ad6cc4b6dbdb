"""How many answers are given, to one client and in all, and what one learns from that about another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from conntrack.table import FlowTable
from dataplane import limits
from dataplane.limits import CLIENT_ANSWERS, Limits
from tests import packets
from tests.packets import CLIENT, CLIENT6, OTHER_CLIENT, VIP, VIP6, Address, address
from tests.reference import octets_of
from tests.small_node import DEAD_VIP, DEAD_VIP6, SMALL, Pipeline, service_ports, service_table
from xdp.addresses import IPV6
from xdp.clock import ManualClock
from xdp.schema import Limit, Reason
from xdp.tables import Tables

pytestmark = pytest.mark.faults(78)
VICTIM, WATCHER = CLIENT, OTHER_CLIENT
SECRET = 0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210

QUESTIONS = {
    (False, False): packets.syn(CLIENT, DEAD_VIP),
    (False, True): packets.echo_request(VIP, CLIENT),
    (True, False): packets.syn(CLIENT6, DEAD_VIP6),
    (True, True): packets.echo_request(VIP6, CLIENT6),
}  # by whether they are of IPv6, and echo requests


def from_client(frame: bytes, client: Address) -> bytes:
    """Return a question of another client: the transport's checksum is not looked at."""
    source = octets_of(client[0])
    at = 22 if len(source) == 16 else 26
    return packets.resummed(frame[:at] + source + frame[at + len(source) :])


class Answering:
    """A node whose dice are known. What it is asked is refused, or echoed."""

    def __init__(self, drawn: int = 0) -> None:
        self.tables = Tables.in_memory(SMALL)
        clock = ManualClock()
        FlowTable(self.tables, clock).create()
        self.tables.control[0]["hash_key"] = SECRET
        self.pipeline = Pipeline(self.tables)
        service_table(self.tables).apply(service_ports())
        self.hertz, self.now = clock.hertz, 10 * clock.hertz
        self.shake(drawn)

    def shake(self, drawn: int) -> None:
        """Have given no answers yet, and draw these numbers from now on."""
        self.pipeline.clear()
        self.pipeline.node.limits.drawn[0] = drawn

    def ask(self, client: Address, times: int = 1, *, is_echo: bool = False) -> int:
        """Return how many of so many questions of a client are answered, at once."""
        frame = from_client(QUESTIONS[bool(client[0] & IPV6), is_echo], client)
        answered = Reason.ECHO_ANSWERED if is_echo else Reason.NO_ENDPOINT
        found = [self.pipeline.send(frame, self.now).reason for _ in range(times)]
        assert set(found) <= {answered, Reason.ANSWER_LIMITED}
        return found.count(answered)

    def ask_from(self, clients: Iterable[Address]) -> int:
        """Return how many of these clients are answered, who ask once each."""
        return sum(map(self.ask, clients))


@pytest.fixture
def node() -> Answering:
    return Answering()


def invented(count: int, first: int = 0) -> list[Address]:
    """Return so many clients that nobody has heard of."""
    return [(address("10.8.0.0:1")[0] + first + number, 4000) for number in range(count)]


@pytest.mark.parametrize("is_echo", [False, True], ids=["refusals", "echoes"])
@pytest.mark.parametrize("client", [CLIENT, CLIENT6], ids=["IPv4", "IPv6"])
def test_a_client_is_given_so_many_answers_in_a_second(node, client, is_echo):
    for _ in range(3):
        assert node.ask(client, CLIENT_ANSWERS + 50, is_echo=is_echo) == CLIENT_ANSWERS
        node.now += node.hertz
    assert node.ask(client, is_echo=is_echo)


def test_refusals_and_echoes_are_counted_apart(node):
    assert node.ask(CLIENT, CLIENT_ANSWERS + 1) == CLIENT_ANSWERS
    assert node.ask(CLIENT, CLIENT_ANSWERS + 1, is_echo=True) == CLIENT_ANSWERS


@pytest.mark.parametrize("forged", [0, 1, 50, CLIENT_ANSWERS, 1000])
def test_what_a_client_gets_does_not_depend_on_what_was_answered_to_another(node, forged):
    node.ask(VICTIM, forged)
    assert node.ask(WATCHER, CLIENT_ANSWERS + 50) == CLIENT_ANSWERS


def test_who_is_over_its_limit_takes_nothing_from_others(node):
    assert node.ask(VICTIM, 3000) == CLIENT_ANSWERS
    assert [node.ask(client, 100) for client in invented(4)] == [100] * 4


def test_the_addresses_of_an_ipv6_network_are_one_client(node):
    network = [address(f"[2001:db8:1::{number:x}]:4000") for number in range(1, CLIENT_ANSWERS + 50)]
    assert node.ask_from(network) == CLIENT_ANSWERS
    assert node.ask(address("[2001:db8:1:1::1]:4000")) == 1, "another network"
    assert node.ask(address("[2001:db9::1]:4000"), CLIENT_ANSWERS) == CLIENT_ANSWERS
    assert node.ask(address("32.1.13.185:4000")) == 1, "an address that begins like that network"


@pytest.mark.faults(85)
def test_a_flood_of_invented_sources_is_limited_in_all():
    """A second's worth at once, and as much in each second after it, but for the dice."""
    node, counts = Answering(), []
    for drawn in range(0, 200_000, 10_000):
        node.shake(drawn)
        at_once = node.ask_from(invented(2500))
        node.now += node.hertz
        counts += [at_once, node.ask_from(invented(2500))]
        node.now += node.hertz
    assert max(counts) < 1.6 * Limit.ANSWERS
    assert abs(np.mean(counts) - Limit.ANSWERS) < 0.1 * Limit.ANSWERS


def test_F078_whoever_counts_what_is_left_for_all_learns_less_of_another_client_than_chance_hides():
    """Who has many addresses takes all that is left, after the victim was given all that it could be, or nothing."""
    node, left = Answering(), {}
    for forged in (0, CLIENT_ANSWERS):
        left[forged] = []
        for drawn in range(80):
            node.shake(100_000 * (2 * drawn + bool(forged)))
            assert node.ask(VICTIM, forged) == forged
            left[forged].append(node.ask_from(invented(2000)))
            node.now += 10 * node.hertz
    told = np.mean(left[0]) - np.mean(left[CLIENT_ANSWERS])
    assert np.std(left[0]) > CLIENT_ANSWERS > 0, "what one count is off by"
    assert told < np.std(left[0])
    assert best_guess(left[0], left[CLIENT_ANSWERS]) < 0.75


@pytest.mark.parametrize("start", [10_000, 1 << 31, (1 << 31) + 10_000, (1 << 32) - 300], ids=hex)
def test_so_many_neighbours_are_answered_in_a_second_whatever_the_clock_says(node, start):
    """A worker's first question comes at any time: jiffies begin five minutes before they wrap."""
    node.tables.control[0]["answers_arp"] = 1
    for second in range(3):
        now = start + second * node.hertz & 0xFFFFFFFF
        found = [node.pipeline.send(packets.arp(), now).reason for _ in range(Limit.ARP_ANSWERS + 1)]
        assert found == [Reason.ARP_ANSWERED] * Limit.ARP_ANSWERS + [Reason.ARP_LIMITED]


def best_guess(without: list[int], with_them: list[int]) -> float:
    """Return how often the best bound between two sorts of counts tells which is which; a coin does half the time."""
    bounds = sorted({*without, *with_them})
    right = [sum(n >= bound for n in without) + sum(n < bound for n in with_them) for bound in bounds]
    return max(right) / (len(without) + len(with_them))


def test_a_client_whose_places_are_taken_is_limited_as_all_are():
    node = Answering()
    few = limits.new_limits()
    few = Limits(few.budgets, few.clients[:9].copy(), np.zeros(1, np.uint64))
    node.pipeline.node = replace(node.pipeline.node, limits=few)
    assert [node.ask(client, CLIENT_ANSWERS + 1) for client in invented(3)] == [CLIENT_ANSWERS] * 3
    assert node.ask_from(invented(5, first=3)) == 5
    assert node.ask(VICTIM, CLIENT_ANSWERS + 1) == CLIENT_ANSWERS + 1


def test_every_packet_loop_throws_its_own_dice():
    assert limits.new_limits().drawn[0] != limits.new_limits().drawn[0]
