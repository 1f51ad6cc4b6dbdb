"""Everybody at once on one mapped flow table: compiled writers, XDP, the sweep, a Service that changes.

Nothing may be torn, doubled or lost. XDP forwards what the writers insert, and admits connections itself.

What a record must hold follows from the number of its key, so that any mix-up shows: in a frame that XDP forwards, and
in every record that a writer finds.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from conntrack import compiled as flows
from conntrack import grace, passes
from conntrack.table import FlowTable
from lb.rows import ServiceRow
from lb.table import ServiceTable
from tests.packets import rewritten, tcp_frame, udp_frame
from xdp import kernel, maps, mounts, rcu, removing, stages
from xdp.atomic import fence, fetch_add, load_acquire, store_release
from xdp.clock import JiffyClock
from xdp.jit import compiled, inlined
from xdp.routes import RouteMap
from xdp.schema import Direction, HopState, Protocol, Reason, State, Tag
from xdp.tables import Capacity, Tables

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.slow]

CAPACITY = Capacity(
    connections=25_000, frontends=16, services=8, maglev_slots=4096, endpoints=8, next_hops=8, cpus=os.cpu_count() or 1
)
KEYS = 12_000
HOT_KEYS = 512  # which half of all operations are about
WRITERS = 3
TURN = 64  # operations between two quiescent states
OPERATIONS = int(os.environ.get("OPERATIONS", "12_000_000"))
ADMITTED_KEYS = 2048  # of connections that XDP admits
LOOPBACK = 1
XDP_DROP, XDP_PASS, XDP_REDIRECT = 1, 2, 4

VIP = 0x0A60_0001
VIP_PORT = 80
ADMITTING = (0x0A60_0002, 80)  # a frontend at which XDP admits, to one or both of:
MACS = b"\2\0\0\0\0\2\2\0\0\0\0\1"
ADMITTED_TO = ((0xAC20_0001, 8080), (0xAC20_0002, 8080))
_TCP, _UDP = int(Protocol.TCP), int(Protocol.UDP)
_VIP_WIRE = np.uint64(int.from_bytes(VIP.to_bytes(4, "big"), "little"))
_VIP_PORT_WIRE = np.uint32(int.from_bytes(VIP_PORT.to_bytes(2, "big"), "little"))
_ONE = np.uint64(1)
_TCP_STATES = 1 << State.SYN_SENT | 1 << State.SYN_RECEIVED | 1 << State.ESTABLISHED | 1 << State.ADOPTED
_UDP_STATES = 1 << State.UDP_UNREPLIED | 1 << State.UDP_REPLIED
_ORIGINAL, _REPLY = int(Direction.ORIGINAL), int(Direction.REPLY)
_SYN_SENT, _UDP_UNREPLIED = int(State.SYN_SENT), int(State.UDP_UNREPLIED)
_EMPTY, _CLAIMED = np.uint64(Tag.EMPTY), np.uint64(Tag.CLAIMED)

# What a writer counts.
OPS, FOUND, INSERTED, FULL, TAKEN, WITHDRAWN, WRONG = range(7)
COUNTS = 7


def client_of(key: int) -> tuple[int, int]:
    """Return address and port of the client of a key, as host numbers; `tuples_of` says the same in compiled code."""
    return 0x0A00_0000 | key >> 4, 20_000 + (key & 15)


def endpoint_of(key: int) -> tuple[int, int]:
    return 0xAC10_0000 | (key * 40_503 & 0xFFFFF), 1024 + key


@inlined
def _wire32(number):
    n = np.uint64(number)
    m = np.uint64(0xFF)
    return (
        (n & m) << np.uint64(24)
        | (n >> np.uint64(8) & m) << np.uint64(16)
        | (n >> np.uint64(16) & m) << np.uint64(8)
        | n >> np.uint64(24) & m
    )


@inlined
def _wire16(number):
    return np.uint32((number & 0xFF) << 8 | number >> 8)


@inlined
def tuples_of(key):
    """Return (addrs, ports, new addrs, new ports, protocol) of a key: what packets have, and what they become."""
    client = _wire32(0x0A00_0000 | key >> 4)
    client_port = _wire16(20_000 + (key & 15))
    endpoint = _wire32(0xAC10_0000 | (key * 40_503 & 0xFFFFF))
    endpoint_port = _wire16(1024 + key)
    return (
        _VIP_WIRE << np.uint64(32) | client,
        np.uint32(_VIP_PORT_WIRE << np.uint32(16) | client_port),
        endpoint << np.uint64(32) | client,
        np.uint32(endpoint_port << np.uint32(16) | client_port),
        np.uint8(_TCP if key & 1 else _UDP),
    )


@inlined
def _is_record(record, way, addrs, ports, new_addrs, new_ports, protocol, peer):
    states = _TCP_STATES if protocol == _TCP else _UDP_STATES
    return (
        np.uint64(record.dst_addr) << np.uint64(32) | np.uint64(record.src_addr) == addrs
        and np.uint32(record.dst_port) << np.uint32(16) | np.uint32(record.src_port) == ports
        and np.uint64(record.new_dst_addr) << np.uint64(32) | np.uint64(record.new_src_addr) == new_addrs
        and np.uint32(record.new_dst_port) << np.uint32(16) | np.uint32(record.new_src_port) == new_ports
        and record.protocol == protocol
        and record.direction == way
        and np.int64(record.peer) == peer
        and (states >> record.state) & 1 == 1
    )


@compiled
def is_whole(tables, slot, key):
    """Tell whether the original's record at `slot` and its peer's say what `key` implies."""
    addrs, ports, new_addrs, new_ports, protocol = tuples_of(key)
    original = tables.flows[slot]
    peer = np.int64(original.peer)
    back, back_ports = flows.turned_addrs(addrs), flows.turned_ports(ports)
    reply, reply_ports = flows.turned_addrs(new_addrs), flows.turned_ports(new_ports)
    return _is_record(original, _ORIGINAL, addrs, ports, new_addrs, new_ports, protocol, peer) and _is_record(
        tables.flows[peer], _REPLY, reply, reply_ports, back, back_ports, protocol, slot
    )


@inlined
def _random(seed):
    """Return the next number of a xorshift generator, whose state `seed` (one u64) changes."""
    x = seed[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    seed[0] = x
    return np.int64(x >> np.uint64(8))


@compiled
def write(tables, number, keys, hot, operations, expired_jiffies, seed, clock, counts, held):
    """Be worker `number`: find random keys, check what is found, insert what is missing, withdraw now and then.

    What was found or inserted is checked again when the turn ends (`held`: slots and keys): until then none is reused.
    """
    store_release(tables.heartbeats, number, _ONE)
    grace.enter(tables, number)
    while counts[OPS] < operations:
        now = np.uint32(load_acquire(clock, 0))
        holding = 0
        for _ in range(TURN):
            dice = _random(seed)
            key = (dice >> 10) % (hot if dice & 1 else keys)
            addrs, ports, new_addrs, new_ports, protocol = tuples_of(key)
            slot = flows.find(tables, addrs, ports, protocol)
            counts[OPS] += 1
            if slot != flows.MISS:
                counts[FOUND] += 1
                counts[WRONG] += not is_whole(tables, slot, key)
                held[holding, 0], held[holding, 1] = slot, key
                holding += 1
                if dice & 0x1E0 == 0:
                    counts[WITHDRAWN] += flows.withdraw(tables, slot)
                continue
            state = _SYN_SENT if protocol == _TCP else _UDP_UNREPLIED
            seen = now - np.uint32(expired_jiffies if dice & 0x1E == 0 else 0)
            slot = flows.insert(
                tables, addrs, ports, new_addrs, new_ports, protocol, np.uint8(state), np.uint32(1), np.uint32(1),
                np.uint32(seen),
            )  # fmt: skip
            if slot >= 0:
                counts[INSERTED] += 1
                counts[WRONG] += not is_whole(tables, slot, key)
                held[holding, 0], held[holding, 1] = slot, key
                holding += 1
            elif slot == flows.FULL:
                counts[FULL] += 1
            else:
                counts[TAKEN] += 1
        fence()
        for place in range(holding):
            counts[WRONG] += not is_whole(tables, held[place, 0], held[place, 1])
        if dice & 7:
            grace.turn(tables, number)
        else:  # as before a sleep: outside nothing is held
            grace.leave(tables, number)
            grace.enter(tables, number)
    grace.leave(tables, number)
    store_release(tables.heartbeats, number, np.uint64(0))


@compiled
def insert_all(tables, keys, now):
    """Insert every key, until somebody has; return how often this writer had to try again."""
    retries = 0
    for key in range(keys):
        addrs, ports, new_addrs, new_ports, protocol = tuples_of(key)
        state = np.uint8(_SYN_SENT if protocol == _TCP else _UDP_UNREPLIED)
        while flows.find(tables, addrs, ports, protocol) == flows.MISS:
            slot = flows.insert(
                tables, addrs, ports, new_addrs, new_ports, protocol, state, np.uint32(1), np.uint32(1), now
            )
            if slot == flows.FULL:
                return np.int64(flows.FULL)
            retries += slot == flows.TAKEN
    return np.int64(retries)


@compiled
def withdraw_all(tables):
    for slot in range(len(tables.flows)):
        if flows.tag_at(tables.tags, slot) >= np.uint64(Tag.FIRST):
            flows.withdraw(tables, slot)


@compiled
def claim_and_leave(tables, owners, operations, seed):
    """Claim slots in random buckets and empty them again; return how many were somebody's already."""
    doubled = 0
    buckets = len(tables.tags) // 4
    for _ in range(operations):
        dice = _random(seed)
        slot = flows._claim_in(tables.tags, dice % buckets, dice >> 16 & 15)
        if slot == flows.FULL:
            continue
        doubled += fetch_add(owners, slot, _ONE) != np.uint64(0)
        fetch_add(owners, slot, np.uint64(0xFFFFFFFFFFFFFFFF))
        doubled += not flows._swap_tag(tables.tags, slot, _CLAIMED, _EMPTY)
    return doubled


@dataclass
class Arena:
    """The tables, the program over them, and their clock."""

    shared: maps.SharedMaps
    program: int
    clock: JiffyClock
    table: FlowTable

    @property
    def tables(self) -> Tables:
        return self.shared.tables


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    folder = Path(f"/run/turnout/bpf/test-race-{os.getpid()}")
    mounts.mount_bpffs(folder.parent)
    with maps.create(folder, CAPACITY) as shared:
        try:
            program = stages.load(shared, offloads=True)
        finally:
            removing.maps(folder)
        clock = JiffyClock()
        table = FlowTable(shared.tables, clock, rcu.wait_for_grace)
        table.create()
        shared.tables.control[0]["aged_from"] = (clock.now() - 1000 * clock.hertz) & 0xFFFFFFFF
        hop = shared.tables.next_hops[1]
        hop["dst_mac"], hop["src_mac"] = list(b"\2\0\0\0\0\2"), list(b"\2\0\0\0\0\1")
        hop["ifindex"], hop["mtu"], hop["state"], hop["used"] = LOOPBACK, 1500, HopState.FORWARD, 1
        RouteMap(shared.routes_fd).replace({(0, 0): 1})
        yield Arena(shared, program, clock, table)
        os.close(program)


@dataclass
class Watched:
    """What the frames of a key look like before and after."""

    frame: bytes
    expected: tuple[bytes, ...]  # one of them
    may_drop: bool = False  # with the table full: it begins a connection


def frames_of(key: int) -> tuple[Watched, Watched]:
    """Return the frames of both directions of a key: those that move a TCP connection on."""
    client, vip, endpoint = client_of(key), (VIP, VIP_PORT), endpoint_of(key)
    make, flags = (tcp_frame, ("A", "SA")) if key & 1 else (udp_frame, ("", ""))
    request = make(client, vip, flags[0])
    reply = make(endpoint, client, flags[1])
    return (
        Watched(request, (rewritten(request, source=client, destination=endpoint, macs=MACS),)),
        Watched(reply, (rewritten(reply, source=(VIP, VIP_PORT), destination=client, macs=MACS),)),
    )


def admitted_of(key: int) -> Watched:
    """Return the frame that begins a connection which XDP admits."""
    client = 0x0B00_0000 | key >> 4, 20_000 + (key & 15)
    frame = tcp_frame(client, ADMITTING, "S")
    begun = tuple(rewritten(frame, source=client, destination=endpoint, macs=MACS) for endpoint in ADMITTED_TO)
    return Watched(frame, begun, may_drop=True)


def admitted_replies_of(key: int) -> list[Watched]:
    """Return the frames that answer it, from either endpoint."""
    client, found = (0x0B00_0000 | key >> 4, 20_000 + (key & 15)), []
    for endpoint in ADMITTED_TO:
        reply = tcp_frame(endpoint, client, "SA")
        found.append(Watched(reply, (rewritten(reply, source=ADMITTING, destination=client, macs=MACS),)))
    return found


@dataclass
class Seen:
    """What an XDP reader saw."""

    runs: int = 0
    forwarded: int = 0
    wrong: int = 0


def watch(program: int, watched: list[Watched], stop: threading.Event, seed: int) -> Seen:
    """Send frames through XDP until told to stop; check each that it forwards."""
    seen, random = Seen(), np.random.default_rng(seed)
    while not stop.is_set():
        for index in random.integers(0, len(watched), 512):
            one = watched[index]
            verdict, out, _ = kernel.prog_test_run(program, one.frame, out_size=128)
            seen.runs += 1
            if verdict == XDP_REDIRECT:
                seen.forwarded += 1
                seen.wrong += out not in one.expected
            else:
                allowed = XDP_DROP if one.may_drop else XDP_PASS
                seen.wrong += verdict != allowed or out != one.frame
    return seen


@compiled
def expire(tables, keys, most, jiffies, seed):
    """Let so many random connections that XDP has admitted be idle for longer: it admits them anew.

    A record may be another key's by the time it is written. What it loses then is time to live.
    """
    for _ in range(most):
        key = _random(seed) % keys
        client, port = _wire32(0x0B00_0000 | key >> 4), _wire16(20_000 + (key & 15))
        addrs = _wire32(ADMITTING[0]) << np.uint64(32) | client
        ports = np.uint32(_wire16(ADMITTING[1]) << np.uint32(16) | port)
        slot = flows.find(tables, addrs, ports, np.uint8(_TCP))
        if slot != flows.MISS:
            record = tables.flows[slot]
            record.last_seen -= np.uint32(jiffies)
            tables.flows[record.peer].last_seen -= np.uint32(jiffies)


def change(arena: Arena, stop: threading.Event, most: int) -> int:
    """Change the Service at which XDP admits until told to stop, and have its connections expire; return how often."""
    services = ServiceTable(arena.tables, 0, lambda _: 1)
    services.adopt()
    seed, changes = np.array([0x9E3779B97F4A7C15], np.uint64), 0
    places = [(IPv4Address(host), port) for host, port in ADMITTED_TO]
    while not stop.is_set() and changes < most:
        endpoints = (places[:1], places, places[1:], places)[changes % 4]
        frontend = (IPv4Address(ADMITTING[0]), ADMITTING[1], _TCP)
        services.apply([ServiceRow((frontend,), tuple(endpoints), admits_here=True)])
        parted = services.take_parted()
        arena.table.wait_for_grace()
        services.forget(arena.clock.now(), parted.endpoints)
        services.release(parted)
        expire(arena.tables, ADMITTED_KEYS, ADMITTED_KEYS // 8, 200 * arena.clock.hertz, seed)
        changes += 1
    return changes


def sweep(table: FlowTable, stop: threading.Event) -> list[int]:
    freed = []
    while not stop.is_set():
        freed.append(table.sweep())
    return freed


def published(tables: Tables, way: Direction) -> npt.NDArray[np.int64]:
    slots = np.zeros(len(tables.flows), np.int64)
    return slots[: passes.used_slots(tables.tags, tables.flows, way, slots)]


def assert_pairs(tables: Tables, most: int) -> int:
    """Check that every record has its other direction, and none is there twice; return the number of connections."""
    originals, replies = published(tables, Direction.ORIGINAL), published(tables, Direction.REPLY)
    records = tables.flows[originals]
    keys = {bytes(record)[:13] for record in np.concatenate([records, tables.flows[replies]])}
    assert len(keys) == len(originals) + len(replies), "a five-tuple is there twice"
    assert sorted(records["peer"]) == sorted(replies), "a direction is without the other"
    assert sorted(tables.flows[replies]["peer"]) == sorted(originals)
    assert len(originals) <= most
    return len(originals)


def empty_out(arena: Arena) -> None:
    withdraw_all(arena.tables)
    for _ in range(2):  # what XDP has retired is withdrawn first
        arena.table.sweep()
    assert not arena.tables.tags.any(), "a slot was lost"


def run_writers(count: int, function: Callable[[int], object]) -> list[Future[object]]:
    with ThreadPoolExecutor(count) as pool:
        return [pool.submit(function, number) for number in range(count)]


def test_no_slot_is_claimed_twice():
    tables = Tables.in_memory(Capacity(connections=40, maglev_slots=16))
    owners = np.zeros(len(tables.flows), np.uint64)
    seeds = np.arange(1, 4, dtype=np.uint64).reshape(3, 1) * np.uint64(0x9E3779B97F4A7C15)
    doubled = run_writers(3, lambda number: claim_and_leave(tables, owners, 500_000, seeds[number]))
    assert [job.result() for job in doubled] == [0, 0, 0]
    assert not tables.tags.any()


def test_of_writers_that_insert_the_same_connection_at_once_one_wins(arena: Arena):
    now = np.uint32(arena.clock.now())
    for _ in range(8):
        retries = [job.result() for job in run_writers(WRITERS, lambda _: insert_all(arena.tables, KEYS // 2, now))]
        assert flows.FULL not in retries
        assert assert_pairs(arena.tables, KEYS) == KEYS // 2
        empty_out(arena)


@pytest.mark.faults(103)
def test_writers_xdp_and_the_sweep_share_one_table(arena: Arena, capsys: pytest.CaptureFixture[str]):
    tables, stop = arena.tables, threading.Event()
    watched = [one for key in [*range(HOT_KEYS), *range(HOT_KEYS, KEYS, 97)] for one in frames_of(key)]
    watched += [admitted_of(key) for key in range(ADMITTED_KEYS)]
    watched += [one for key in range(0, ADMITTED_KEYS, 4) for one in admitted_replies_of(key)]
    words = np.array([arena.clock.now()], np.uint64)
    expired = np.uint32(200 * arena.clock.hertz)
    counts, held = np.zeros((WRITERS, COUNTS), np.int64), np.zeros((WRITERS, TURN, 2), np.int64)
    seeds = np.arange(1, WRITERS + 1, dtype=np.uint64).reshape(WRITERS, 1) * np.uint64(0x9E3779B97F4A7C15)
    share = OPERATIONS // WRITERS
    change(arena, stop, 1)  # compile it

    def writer(number: int) -> None:
        write(tables, number, KEYS, HOT_KEYS, share, expired, seeds[number], words, counts[number], held[number])

    with ThreadPoolExecutor(4) as others:
        readers = [others.submit(watch, arena.program, watched, stop, seed) for seed in (1, 2)]
        sweeper = others.submit(sweep, arena.table, stop)
        changer = others.submit(change, arena, stop, sys.maxsize)
        try:
            for job in run_writers(WRITERS, writer):
                job.result()
        finally:
            stop.set()
    seen, freed = [reader.result() for reader in readers], sweeper.result()

    total, changes = counts.sum(axis=0), changer.result()
    admitted = int(tables.xdp_counters["packets"][:, Reason.ADMITTED].sum())
    runs, forwarded = sum(one.runs for one in seen), sum(one.forwarded for one in seen)
    with capsys.disabled():
        print(  # noqa: T201  how much was tried is the point
            f"\n{WRITERS} writers: {total[OPS]:,} operations ({total[FOUND]:,} found and compared, {total[INSERTED]:,} "
            f"inserted, {total[WITHDRAWN]:,} withdrawn, {total[TAKEN]:,} lost a race, {total[FULL]:,} found no room); "
            f"XDP: {runs:,} frames, {forwarded:,} forwarded, {admitted:,} of them new connections; "
            f"sweep: {len(freed):,} passes, {sum(freed):,} slots freed; {changes:,} changes of a Service"
        )
    assert total[WRONG] == 0, "a writer found a record that is not its key's"
    assert [one.wrong for one in seen] == [0, 0], "XDP forwarded a frame along another key's record"
    assert total[OPS] >= OPERATIONS - WRITERS * TURN
    assert forwarded > 0
    assert admitted > ADMITTED_KEYS, "some were admitted again"
    assert min(len(freed), changes) > 0
    assert_pairs(tables, KEYS + ADMITTED_KEYS)
    empty_out(arena)


def test_afterwards_the_table_takes_its_capacity_again(arena: Arena):
    now = np.uint32(arena.clock.now())
    assert insert_all(arena.tables, CAPACITY.connections, now) == 0
    assert arena.table.used() == CAPACITY.connections
    empty_out(arena)


@pytest.mark.faults(103)
def test_a_slot_that_a_reply_led_to_is_not_reused_without_grace(arena: Arena):
    """The loser of a race has published its reply: a reader may be on the way from there to the original."""
    addrs, ports, new_addrs, new_ports, protocol = (
        np.uint64(1),
        np.uint32(2),
        np.uint64(3),
        np.uint32(4),
        np.uint8(_UDP),
    )
    state, hop, now = np.uint8(_UDP_UNREPLIED), np.uint32(1), np.uint32(arena.clock.now())
    assert flows.insert(arena.tables, addrs, ports, new_addrs, new_ports, protocol, state, hop, hop, now) >= 0
    taken = flows.insert(arena.tables, addrs, ports, np.uint64(5), new_ports, protocol, state, hop, hop, now)
    assert taken == flows.TAKEN  # the same original towards another endpoint
    tags = arena.tables.tags.view(np.uint16)
    assert np.count_nonzero(tags == Tag.WITHDRAWN) == 2
    assert np.count_nonzero(tags >= Tag.FIRST) == 2
    empty_out(arena)
