"""The memory of who was given which endpoint: kept for so long, for so many, and by many writers at once."""

from __future__ import annotations

import threading
from ipaddress import IPv4Address

import numpy as np
import pytest

from lb import affinity, compiled
from lb.rows import ServiceRow
from lb.table import ServiceTable
from tests.packets import VIP, address
from xdp.byteorder import swap16, swap32
from xdp.clock import ManualClock
from xdp.schema import Limit, Protocol
from xdp.tables import Capacity, Tables

ENDPOINTS = tuple((IPv4Address(f"10.2.0.{number}"), 8080) for number in range(1, 9))
SECONDS, IDENTITY, OTHER = 600, 7, 8
FRONTEND = IPv4Address(VIP[0]), VIP[1], int(Protocol.TCP)
CLIENT = address("10.1.0.1:0")[0]


class Memory:
    """One Service port with affinity, and a clock that stands."""

    def __init__(self, affinities: int = 64) -> None:
        capacity = Capacity(
            connections=10, frontends=8, services=8, maglev_slots=8192, endpoints=16, next_hops=4, affinities=affinities
        )
        self.clock = ManualClock()
        self.tables = Tables.in_memory(capacity)
        self.tables.control[0]["hash_key"] = [11, 13]
        self.tables.control[0]["hertz"] = self.clock.hertz
        self.writer = ServiceTable(self.tables, 1, lambda _: 0)
        self.serve(*ENDPOINTS)

    def serve(self, *endpoints: tuple[IPv4Address, int]) -> None:
        self.writer.apply([ServiceRow((FRONTEND,), endpoints, affinity_s=SECONDS, identity=IDENTITY)])
        self.row = int(
            compiled.find_frontend(
                self.tables, np.uint32(swap32(VIP[0])), np.uint16(swap16(VIP[1])), np.uint8(Protocol.TCP)
            )
        )
        service = self.tables.services[self.row]
        first = int(service["first_slot"]) + int(service["slots"])
        self.members = self.tables.maglev[first : first + int(service["members"])].tolist()

    def give(self, client: int, endpoint: int, identity: int = IDENTITY) -> None:
        affinity.remember(self.tables, whom(client, identity), endpoint, np.uint32(self.clock.now()))

    def kept(self, client: int = CLIENT, identity: int = IDENTITY) -> int:
        return int(affinity.remembered(self.tables, self.row, whom(client, identity), np.uint32(self.clock.now())))


def whom(client: int, identity: int = IDENTITY) -> np.uint64:
    return np.uint64(identity << 32 | client)


@pytest.fixture
def memory() -> Memory:
    return Memory()


def test_S11_the_candidates_are_listed_behind_the_slots(memory: Memory):
    assert memory.members == sorted(set(memory.members))
    assert len(memory.members) == len(ENDPOINTS)


def test_S11_what_was_given_is_kept_by_client_and_service_port(memory: Memory):
    assert memory.kept() == affinity.MISS
    memory.give(CLIENT, memory.members[3])
    memory.give(CLIENT + 1, memory.members[4])
    memory.give(CLIENT, memory.members[5], OTHER)
    kept = (memory.kept(), memory.kept(CLIENT + 1), memory.kept(identity=OTHER), memory.kept(CLIENT + 2))
    assert kept == (memory.members[3], memory.members[4], memory.members[5], affinity.MISS)


def test_S11_it_is_kept_for_the_timeout_and_giving_it_again_begins_anew(memory: Memory):
    memory.give(CLIENT, memory.members[3])
    for _ in range(3):
        memory.clock.advance(SECONDS)
        assert memory.kept() == memory.members[3]
        memory.give(CLIENT, memory.members[3])
    memory.clock.advance(SECONDS + 1)
    assert memory.kept() == affinity.MISS


def test_S11_an_endpoint_that_has_left_is_forgotten_and_the_others_are_not(memory: Memory):
    memory.give(CLIENT, memory.members[0])
    memory.give(CLIENT + 1, memory.members[7])
    memory.serve(*ENDPOINTS[1:])
    assert (memory.kept(), memory.kept(CLIENT + 1)) == (affinity.MISS, memory.members[-1])


def test_S11_a_row_that_is_another_endpoint_s_now_is_nobody_s_memory(memory: Memory):
    memory.give(CLIENT, memory.members[0])
    memory.serve(*ENDPOINTS[1:])
    parted = memory.writer.take_parted()
    assert memory.writer.forget(memory.clock.now(), parted.endpoints) == 1
    memory.writer.release(parted)
    memory.serve(*ENDPOINTS[1:], (IPv4Address("10.2.0.99"), 8080))
    assert parted.endpoints[0] in memory.members
    assert memory.kept() == affinity.MISS


def test_S11_when_all_places_are_taken_the_oldest_goes():
    memory = Memory(affinities=Limit.AFFINITY_WAYS)
    for client in range(20):
        memory.give(CLIENT + client, memory.members[client % 8])
        memory.clock.advance(1)
    kept = [client for client in range(20) if memory.kept(CLIENT + client) != affinity.MISS]
    assert kept == list(range(12, 20))


def test_S11_what_nobody_asks_for_any_more_goes_before_the_clock_comes_round(memory: Memory):
    memory.give(CLIENT, memory.members[0])
    memory.clock.advance(86_000)
    assert memory.writer.forget(memory.clock.now()) == 0
    memory.clock.advance(401)
    assert memory.writer.forget(memory.clock.now()) == 1


def test_S11_a_successor_finds_it_and_what_was_being_written_is_free_again(memory: Memory):
    memory.give(CLIENT, memory.members[2])
    free = int(np.flatnonzero(memory.tables.affinity["key"] == 0)[0])
    memory.tables.affinity[free]["key"] = 1  # claimed, by a writer that died
    successor = ServiceTable(memory.tables, 1, lambda _: 0)
    successor.adopt()
    change = successor.apply([ServiceRow((FRONTEND,), ENDPOINTS, affinity_s=SECONDS, identity=IDENTITY)])
    assert change.rows_written == 0
    assert memory.kept() == memory.members[2]
    assert not (memory.tables.affinity["key"] == 1).any()


def test_S11_many_writers_leave_nothing_claimed_and_nothing_but_candidates():
    memory = Memory(affinities=4 * Limit.AFFINITY_WAYS)
    now = np.uint32(memory.clock.now())
    wrong = []

    def write(seed: int) -> None:
        random = np.random.default_rng(seed)
        for client in random.integers(0, 60, 3000).tolist():
            affinity.remember(memory.tables, whom(client), memory.members[client % 8], now)
            kept = affinity.remembered(memory.tables, memory.row, whom(client), now)
            wrong.extend([kept] if kept not in (*memory.members, affinity.MISS) else [])

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not (memory.tables.affinity["key"] == 1).any()
    assert {memory.kept(client) for client in range(60)} <= {*memory.members, affinity.MISS}
