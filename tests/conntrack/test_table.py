"""The flow table from the outside: who is in it, for how long, and who makes room."""

from __future__ import annotations

import numpy as np
import pytest

from conntrack import compiled, states
from conntrack.compiled import FULL, MISS, TAKEN
from conntrack.table import FlowTable
from tests.conntrack.flows import TCP, Flows, key, turned_addrs, turned_ports
from tests.reference import first_bucket, hash_of, second_bucket
from xdp.byteorder import swap32
from xdp.schema import Direction, Event, Protocol, State, Tag
from xdp.tables import HIGHEST_LOAD

HALVES = 2


@pytest.fixture
def flows() -> Flows:
    return Flows(200)


def tags(flows: Flows) -> np.ndarray:
    return flows.tables.tags.view(np.uint16)


def touch(flows: Flows, slot: int, event: Event = Event.ACK, length: int = 60) -> None:
    compiled.touch(flows.tables, slot, int(event), length, np.uint32(flows.clock.now()))


# In and out.


def test_a_connection_is_found_by_either_direction(flows: Flows):
    slot = flows.insert(1)
    reply = flows.find_reply(1)
    assert flows.find(1) == slot
    assert reply not in (slot, MISS)
    records = flows.tables.flows
    assert (records[slot]["direction"], records[reply]["direction"]) == (Direction.ORIGINAL, Direction.REPLY)
    assert (records[slot]["peer"], records[reply]["peer"]) == (reply, slot)
    assert (records[slot]["next_hop"], records[reply]["next_hop"]) == (1, 2)


def test_a_reply_leaves_as_the_original_turned_round(flows: Flows):
    original = flows.tables.flows[flows.insert(1)]
    reply = flows.tables.flows[flows.find_reply(1)]
    for mine, theirs in (("src", "dst"), ("dst", "src")):
        for field in ("addr", "port"):
            assert original[f"{mine}_{field}"] == reply[f"new_{theirs}_{field}"]
            assert original[f"new_{mine}_{field}"] == reply[f"{theirs}_{field}"]


def test_another_protocol_is_another_connection(flows: Flows):
    slot = flows.insert(1)
    assert flows.find(1, np.uint8(Protocol.UDP)) == MISS
    assert flows.insert(1, protocol=np.uint8(Protocol.UDP)) != slot


def test_a_reply_that_belongs_to_another_connection_is_refused_and_nothing_stays(flows: Flows):
    flows.insert(1)
    before = tags(flows).copy()
    _, _, new_addrs, new_ports = key(1)
    other_vip, _, _, _ = key(1)
    other_vip = np.uint64(int(other_vip) ^ 1 << 63)
    now, hop = np.uint32(0), np.uint32(1)
    slot = compiled.insert(flows.tables, other_vip, np.uint32(5), new_addrs, new_ports, TCP, np.uint8(1), hop, hop, now)
    assert slot == TAKEN
    assert (tags(flows) == before).all()


def test_withdrawing_either_direction_withdraws_both(flows: Flows):
    for find in (flows.find, flows.find_reply):
        flows.insert(1)
        assert compiled.withdraw(flows.tables, find(1))
        assert (flows.find(1), flows.find_reply(1)) == (MISS, MISS)
        assert not compiled.withdraw(flows.tables, 0)


def test_a_stale_slot_withdraws_no_stranger(flows: Flows):
    """Half a connection, as a daemon leaves it that dies in between, whose other slot somebody else has by now."""
    slot = flows.insert(1)
    reply = flows.find_reply(1)
    compiled.withdraw_slot(flows.tables.tags, slot)
    tags(flows)[slot] = 0x1234  # reused, for another connection
    flows.tables.flows[slot]["peer"] = 99
    assert compiled.withdraw(flows.tables, reply)
    assert tags(flows)[slot] == 0x1234


def test_a_withdrawn_slot_is_not_reused_before_a_sweep(flows: Flows):
    slots = {flows.insert(1), flows.find_reply(1)}
    compiled.withdraw(flows.tables, min(slots))
    assert set(np.flatnonzero(tags(flows) == Tag.WITHDRAWN)) == slots
    assert flows.table.sweep() == HALVES
    assert not flows.tables.tags.any()


def test_the_sweep_ends_what_a_dead_writer_withdrew_by_half(flows: Flows):
    for half in (flows.find, flows.find_reply):
        flows.insert(1)
        compiled.withdraw_slot(flows.tables.tags, half(1))
        flows.table.sweep()
        flows.table.sweep()
        assert not flows.tables.tags.any()


def test_slots_are_freed_after_the_grace_period_only(flows: Flows):
    seen = []
    table = FlowTable(flows.tables, flows.clock, lambda: seen.append(np.count_nonzero(tags(flows) == Tag.WITHDRAWN)))
    compiled.withdraw(flows.tables, flows.insert(1))
    assert table.sweep() == HALVES
    assert seen == [HALVES]
    assert table.sweep() == 0
    assert seen == [HALVES], "nothing to free, nothing to wait for"


def test_a_sweep_in_slices_covers_the_table(flows: Flows):
    for number in range(50):
        compiled.withdraw(flows.tables, flows.insert(number))
    total = len(flows.tables.flows)
    assert sum(flows.table.sweep(total // 7) for _ in range(8)) == 50 * HALVES
    assert not flows.tables.tags.any()


# Time.


@pytest.mark.parametrize("state", [state for state in State if State.FREE < state < State.STATES])
def test_c5_a_connection_ends_when_neither_direction_was_seen_for_the_timeout_of_its_state(state: State, flows: Flows):
    flows.insert(1, state)
    flows.clock.advance(states.TIMEOUT_S[state])
    assert not compiled.is_expired(flows.tables, flows.find(1), np.uint32(flows.clock.now()))
    flows.table.sweep()
    assert flows.find(1) != MISS
    flows.clock.advance(0.004)
    assert compiled.is_expired(flows.tables, flows.find(1), np.uint32(flows.clock.now()))
    flows.table.sweep()
    assert (flows.find(1), flows.find_reply(1)) == (MISS, MISS)


@pytest.mark.parametrize("way", list(states.BOTH))
def test_packets_of_one_direction_keep_both(way: Direction, flows: Flows):
    flows.insert(1, State.ESTABLISHED)
    flows.clock.advance(7000)
    touch(flows, flows.find(1) if way == Direction.ORIGINAL else flows.find_reply(1))
    flows.clock.advance(7000)
    flows.table.sweep()
    assert flows.find(1) != MISS
    flows.clock.advance(1001)
    flows.table.sweep()
    assert flows.find(1) == MISS


def test_time_may_wrap_round():
    flows = Flows(10)
    flows.clock.advance((2**32 - 1000 * 250 - 100) / 250)  # 100 jiffies before the clock wraps
    flows.table.prepare()
    flows.insert(1, State.SYN_SENT)
    flows.clock.advance(59)
    flows.table.sweep()
    assert flows.find(1) != MISS
    flows.clock.advance(2)
    flows.table.sweep()
    assert flows.find(1) == MISS


@pytest.mark.parametrize("days", [1, 100, 150, 250])
def test_connections_expire_however_long_the_daemon_has_run(days: int, flows: Flows):
    """2^31 jiffies of 4 ms are 99.4 days."""
    for _ in range(days):
        flows.clock.advance(86_400)
        flows.table.sweep()
    for number, state in enumerate((State.SYN_SENT, State.ESTABLISHED)):
        flows.insert(number, state)
        flows.clock.advance(states.TIMEOUT_S[state])
        flows.table.sweep()
        assert flows.find(number) != MISS
        flows.clock.advance(0.004)
        assert compiled.is_expired(flows.tables, flows.find(number), np.uint32(flows.clock.now()))
        flows.table.sweep()
        assert flows.find(number) == MISS


def test_a_successor_does_not_count_the_time_in_which_nobody_looked(flows: Flows):
    flows.insert(1, State.ESTABLISHED)
    flows.clock.advance(100_000)
    successor = FlowTable(flows.tables, flows.clock)
    successor.take_over()
    successor.sweep()
    assert flows.find(1) != MISS
    flows.clock.advance(8001)
    successor.sweep()
    assert flows.find(1) == MISS


def test_a_successor_gives_up_what_its_predecessor_was_about_to_publish(flows: Flows):
    flows.insert(1)
    tags(flows)[[5, 17]] = Tag.CLAIMED
    flows.insert(2)
    successor = FlowTable(flows.tables, flows.clock)
    assert successor.take_over() == 2
    assert successor.sweep() == 2
    assert successor.used() == 2
    assert flows.find(1) != MISS


def test_a_successor_leaves_what_xdp_publishes_meanwhile(flows: Flows):
    tags(flows)[5] = Tag.CLAIMED

    def publish() -> None:
        tags(flows)[5] = 0x4321

    assert FlowTable(flows.tables, flows.clock, publish).take_over() == 0
    assert tags(flows)[5] == 0x4321


# Packets.


def test_a_packet_counts_in_its_direction_and_changes_the_state_of_both(flows: Flows):
    slot, reply = flows.insert(1), flows.find_reply(1)
    flows.clock.advance(1)
    touch(flows, reply, Event.SYN_ACK, 74)
    touch(flows, reply, Event.SYN_ACK, 74)
    records = flows.tables.flows
    assert records[[slot, reply]]["state"].tolist() == [State.SYN_RECEIVED] * 2
    assert records[[slot, reply]]["packets"].tolist() == [0, 2]
    assert records[[slot, reply]]["bytes"].tolist() == [0, 148]
    assert records[reply]["last_seen"] - records[slot]["last_seen"] == 250


def test_connections_are_told_in_host_numbers(flows: Flows):
    slot = flows.insert(1)
    touch(flows, slot, Event.SYN, 60)
    flows.clock.advance(12)
    (connection,) = flows.table.connections()
    assert connection.client == (0x0A00_0001, 40_000)
    assert connection.frontend == (0x0A60_0001, 80)
    assert connection.endpoint == (0xAC10_0001, 8080)
    assert (connection.protocol, connection.state) == (Protocol.TCP, State.SYN_SENT)
    assert (connection.packets, connection.bytes) == ((1, 0), (60, 0))
    assert (connection.idle_s, connection.expires_s) == (12, 48)


def test_the_connections_to_an_endpoint_can_be_ended(flows: Flows):
    for number in range(5):
        flows.insert(number)
    others = [(0xAC10_0001, 8080, Protocol.UDP), (0xAC10_0002, 8080, Protocol.TCP), (0xAC10_0001, 8081, Protocol.TCP)]
    assert flows.table.end_towards([]) == 0
    assert flows.table.end_towards(others) == 0
    assert flows.table.end_towards([*others, (0xAC10_0001, 8080, Protocol.TCP)]) == 5
    assert flows.table.used() == 0


def test_the_connections_to_many_endpoints_are_ended_in_one_pass(flows: Flows):
    numbers = range(40)
    for number in numbers:
        slot = flows.insert(number)
        flows.tables.flows[slot]["new_dst_addr"] = swap32(0xAC10_0000 + number)
    ended = [number for number in numbers if number % 3]
    assert flows.table.end_towards([(0xAC10_0000 + number, 8080, Protocol.TCP) for number in ended[::-1]]) == len(ended)
    assert [number for number in numbers if flows.find(number) != MISS] == [n for n in numbers if n % 3 == 0]


# Room.


def test_the_stated_capacity_is_had():
    flows = Flows(10_000)
    assert HIGHEST_LOAD * len(flows.tables.flows) >= 2 * 10_000
    assert flows.fill(0, 10_000) == 10_000
    assert flows.table.used() == 10_000
    assert sum(1 for _ in flows.table.connections()) == 10_000


def test_the_first_insertion_fails_above_the_highest_load():
    flows = Flows(50_000)
    inserted = flows.fill(0, 100_000)
    assert 2 * inserted / len(flows.tables.flows) >= HIGHEST_LOAD + 0.02, "0.87, give or take what the secret does"
    assert flows.table.used() == inserted, "the one that failed left nothing"


def full(state: State) -> tuple[Flows, int]:
    """Return a table of two buckets, every slot taken, and the number of a connection that looks for room in both."""
    flows = Flows(1)
    number = 0
    while not tags(flows).all():
        flows.insert(number, state)
        flows.clock.advance(0.1)
        number += 1
    while len(buckets_of(flows, number)) < 2 or len(buckets_of(flows, number, is_reply=True)) < 2:
        number += 1
    return flows, number


def buckets_of(flows: Flows, number: int, *, is_reply: bool = False) -> set[int]:
    addrs, ports, new_addrs, new_ports = key(number)
    if is_reply:
        addrs, ports = turned_addrs(new_addrs), turned_ports(new_ports)
    secret = (int(word) for word in flows.tables.control[0]["hash_key"])
    hashed = hash_of(int(addrs), int(ports), int(TCP), *secret)
    return {first_bucket(hashed, 2), second_bucket(hashed, 2)}


def drop_early(flows: Flows, number: int) -> bool:
    return bool(compiled.drop_early(flows.tables, *key(number), TCP, np.uint32(flows.clock.now())))


def test_c7_the_oldest_unreplied_connection_makes_room():
    flows, number = full(State.SYN_SENT)
    assert drop_early(flows, number)
    assert flows.find(0) == MISS
    assert flows.find(1) != MISS
    assert flows.insert(number) == FULL, "not before a grace period"
    assert not drop_early(flows, number), "one is enough"
    flows.table.sweep()
    assert flows.insert(number) >= 0


def test_c7_unreplied_before_closing():
    flows, number = full(State.CLOSING)
    for half in (flows.find(3), flows.find_reply(3)):  # not the oldest
        flows.tables.flows[half]["state"] = State.SYN_SENT
    assert drop_early(flows, number)
    assert flows.find(3) == MISS
    assert flows.find(0) != MISS
    flows.table.sweep()
    assert flows.insert(number, State.CLOSING) >= 0
    assert drop_early(flows, number)
    assert flows.find(0) == MISS


@pytest.mark.parametrize("state", [State.ESTABLISHED, State.FIN_ORIGINAL, State.FIN_REPLY, State.UDP_REPLIED])
def test_c6_an_established_connection_is_never_dropped_for_a_new_one(state: State):
    flows, number = full(state)
    used = flows.table.used()
    assert not drop_early(flows, number)
    assert flows.table.used() == used
