"""XDP as a writer of the flow table: room that it makes, ways that it learns, what it refuses, and its races."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path

import numpy as np
import pytest

from conntrack import compiled, passes
from conntrack.table import FlowTable
from lb.rows import ServiceRow
from lb.table import ServiceTable
from tests import packets
from tests.conntrack.flows import insert_many
from tests.packets import CLIENT, CLIENT6, ENDPOINT, ENDPOINT6, VIP6, address
from tests.small_node import LOST_CLIENT, ROUTES, SEED, write_hops
from tests.xdp.test_race import assert_pairs
from xdp import kernel, maps, mounts, naming, rcu, removing, stages
from xdp.addresses import IPV6, address_of, host_bits, number_of
from xdp.byteorder import swap32
from xdp.clock import JiffyClock
from xdp.names import Names, words_of
from xdp.routes import RouteMap
from xdp.schema import HopState, Limit, NameState, Reason, RouteTarget, RowUse, State, Tag, verdict_of
from xdp.tables import Capacity, Tables

pytestmark = [pytest.mark.root, pytest.mark.bpf]

XDP_REDIRECT = 4

VIPS = [address(f"10.96.0.{host}:80") for host in (10, 11, 12)]
_HOP = ROUTES[ENDPOINT[0], 32]


@dataclass
class Kernel:
    """The tables, and the program over them with nobody to punt to."""

    shared: maps.SharedMaps
    program: int
    clock: JiffyClock
    table: FlowTable
    routes: RouteMap

    @property
    def tables(self) -> Tables:
        return self.shared.tables

    def send(self, frame: bytes) -> tuple[Reason, bytes]:
        """Run the program on a frame; return why it ended as it did, and the frame then."""
        before = self.counts()
        action, after, _ = kernel.prog_test_run(self.program, frame)
        counted = self.counts() - before
        assert counted.sum() == 1
        reason = Reason(int(counted.argmax()))
        assert (action == 4) == (verdict_of(reason) == 0)
        return reason, after

    def counts(self) -> np.ndarray:
        return self.tables.xdp_counters["packets"].sum(axis=0, dtype=np.int64)

    def slot_of(self, frame_source: packets.Address, destination: packets.Address, protocol: int = 6) -> int:
        """Return the slot of a flow, or MISS."""
        (source, source_port), (host, port) = frame_source, destination
        addrs = np.uint64(swap32(host) << 32 | swap32(source))
        ports = np.uint32(socket.htons(port) << 16 | socket.htons(source_port))
        return int(compiled.find(self.tables, addrs, ports, np.uint8(protocol)))


def serve(shared: maps.SharedMaps, rows: list[ServiceRow]) -> None:
    ServiceTable(shared.tables, SEED, lambda host: ROUTES[number_of(host), host_bits(number_of(host))]).apply(rows)


def service(vip: packets.Address, *endpoints: packets.Address, protocol: int = 6) -> ServiceRow:
    return ServiceRow(
        ((address_of(vip[0]), vip[1], protocol),), tuple((address_of(host), port) for host, port in endpoints)
    )


@pytest.fixture(params=[1])
def xdp(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """XDP alone, over a table for `param` connections."""
    folder = Path(f"/run/turnout/bpf/test-admission-{os.getpid()}")
    mounts.mount_bpffs(folder.parent)
    capacity = Capacity(request.param, 32, 32, 16_384, 32, 64, os.cpu_count() or 1)
    with maps.create(folder, capacity) as shared:
        try:
            program = stages.load(shared, offloads=True)
        finally:
            removing.maps(folder)
        clock = JiffyClock()
        table = FlowTable(shared.tables, clock, rcu.wait_for_grace)
        table.create()
        shared.tables.control[0]["aged_from"] = (clock.now() - 1_000_000 * clock.hertz) & 0xFFFFFFFF
        write_hops(shared.tables)
        routes = RouteMap(shared.routes_fd)
        routes.replace(ROUTES)
        serve(shared, [*(service(vip, ENDPOINT) for vip in VIPS), service(VIP6, ENDPOINT6)])
        yield Kernel(shared, program, clock, table, routes)
        os.close(program)


def syn_of(port: int, vip: packets.Address = VIPS[0], host: int = CLIENT[0]) -> bytes:
    return packets.syn((host, port), vip)


def fill(xdp: Kernel) -> list[int]:
    """Open connections until every slot is taken; return the clients' ports."""
    ports = []
    for port in range(1024, 4096):
        reason, _ = xdp.send(syn_of(port))
        assert reason in (Reason.ADMITTED, Reason.TABLE_FULL)
        if reason == Reason.ADMITTED:
            ports.append(port)
        if xdp.tables.tags.view(np.uint16).all():
            return ports
    raise AssertionError("the table never filled")


def age(xdp: Kernel, seconds: float) -> None:
    jiffies = np.uint32(round(seconds * xdp.clock.hertz))
    xdp.tables.flows["last_seen"] -= jiffies
    xdp.tables.flows["retired_at"] -= jiffies


def test_c7_with_nobody_to_sweep_xdp_reuses_records_a_second_past_their_deadline(xdp: Kernel):
    ports = fill(xdp)
    assert len(ports) == 16, "two buckets of 16 records"
    used = xdp.table.used()
    assert xdp.send(syn_of(ports[0]))[0] == Reason.FORWARDED, "what is known goes on"
    assert xdp.send(syn_of(5000))[0] == Reason.TABLE_FULL
    assert xdp.table.used() == used, "nothing has expired"
    age(xdp, 61)
    for port in range(5000, 5010):
        assert xdp.send(syn_of(port))[0] == Reason.TABLE_FULL, "retired just now: somebody may still look"
    assert (xdp.tables.tags.view(np.uint16) == Tag.RETIRED).all()
    age(xdp, 1.1)
    for port in range(5000, 5006):
        assert xdp.send(syn_of(port))[0] == Reason.ADMITTED
    assert assert_pairs(xdp.tables, 16) == 6


def test_c6_xdp_takes_nothing_from_a_connection_that_lives(xdp: Kernel):
    ports = fill(xdp)
    age(xdp, 59)  # SYN_SENT ends after 60
    for port in range(5000, 5100):
        assert xdp.send(syn_of(port))[0] == Reason.TABLE_FULL
    for port in ports:
        assert xdp.send(syn_of(port))[0] == Reason.FORWARDED


def test_the_sweep_frees_what_xdp_has_retired(xdp: Kernel):
    fill(xdp)
    age(xdp, 61)
    xdp.send(syn_of(5000))
    for _ in range(2):
        xdp.table.sweep()
    assert not xdp.tables.tags.any()
    assert not xdp.tables.published.any()


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_a_client_s_port_that_an_endpoint_knows_already_gets_another_endpoint_or_none(xdp: Kernel):
    """Through two VIPs to one endpoint from one port: the replies could not be told apart."""
    assert xdp.send(syn_of(4000, VIPS[0]))[0] == Reason.ADMITTED
    before = xdp.tables.tags.copy()
    assert xdp.send(syn_of(4000, VIPS[1]))[0] == Reason.REPLY_CLASH
    assert (xdp.tables.tags == before).all()


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_what_has_expired_keeps_no_client_s_port_with_nobody_to_sweep(xdp: Kernel):
    assert xdp.send(syn_of(4000, VIPS[0]))[0] == Reason.ADMITTED
    age(xdp, 61)
    assert xdp.send(syn_of(4000, VIPS[1]))[0] == Reason.ADMITTED
    source = (CLIENT[0], 4000)
    assert xdp.slot_of(source, VIPS[0]) == compiled.MISS
    assert assert_pairs(xdp.tables, 16) == 1
    assert xdp.send(packets.syn_ack(ENDPOINT, source))[0] == Reason.FORWARDED
    assert xdp.tables.flows[xdp.slot_of(source, VIPS[1])]["state"] == State.SYN_RECEIVED


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_a_client_on_the_link_that_nobody_knows_is_answered_where_it_came_from(xdp: Kernel):
    """With userspace away nobody can ask for its MAC address; its frame has it."""
    stranger = address("10.9.0.77:4000")
    xdp.routes.replace({**ROUTES, (address("10.9.0.0:0")[0], 16): int(RouteTarget.ON_LINK)})
    frame = syn_of(stranger[1], host=stranger[0])
    assert xdp.send(frame)[0] == Reason.ADMITTED
    first = len(xdp.tables.next_hops) - len(xdp.tables.next_hops) // Limit.LEARNED_SHARE
    hop = xdp.tables.next_hops[first]
    assert (bytes(hop["dst_mac"]), bytes(hop["src_mac"])) == (frame[6:12], frame[:6])
    assert (hop["ifindex"], hop["state"], hop["used"]) == (1, HopState.FORWARD, 1)
    assert swap32(hop["destination"]) == stranger[0]
    reply = packets.syn_ack(ENDPOINT, stranger)
    reason, answer = xdp.send(reply)
    assert reason == Reason.FORWARDED
    assert answer[:12] == frame[6:12] + frame[:6]
    xdp.send(syn_of(4001, host=stranger[0]))
    assert int(xdp.tables.control[0]["learned"]) == 1, "one client, one row"


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_a_client_without_a_route_is_not_admitted(xdp: Kernel):
    nowhere = address("192.0.2.1:4000")
    assert xdp.send(syn_of(nowhere[1], host=nowhere[0]))[0] == Reason.NO_NEXT_HOP
    assert not xdp.tables.tags.any()


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_a_client_whose_neighbour_does_not_answer_is_not_admitted(xdp: Kernel):
    assert xdp.send(packets.syn(LOST_CLIENT, VIPS[0]))[0] == Reason.NO_NEXT_HOP
    assert not xdp.tables.tags.any()


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_ways_that_xdp_may_learn_run_out_and_nothing_breaks(xdp: Kernel):
    network = address("10.9.0.0:0")[0]
    xdp.routes.replace({**ROUTES, (network, 16): int(RouteTarget.ON_LINK)})
    reasons = [xdp.send(syn_of(4000, host=network + host))[0] for host in range(1, 10)]
    room = len(xdp.tables.next_hops) // Limit.LEARNED_SHARE
    assert reasons == [Reason.ADMITTED] * room + [Reason.NO_NEXT_HOP] * (9 - room)


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_ways_that_are_given_back_are_learned_again_and_others_are_not_touched(xdp: Kernel):
    """However many clients XDP has met: it is what is taken now that counts."""
    network = address("10.9.0.0:0")[0]
    xdp.routes.replace({**ROUTES, (network, 16): int(RouteTarget.ON_LINK)})
    room = len(xdp.tables.next_hops) // Limit.LEARNED_SHARE
    learned = xdp.tables.next_hops[-room:]
    for host in range(1, room + 2):
        xdp.send(syn_of(4000, host=network + host))
    before = learned.copy()
    for turn in range(3 * room):
        learned[1] = 0
        assert xdp.send(syn_of(4000, host=network + 100 + turn))[0] == Reason.ADMITTED
        assert swap32(learned[1]["destination"]) == network + 100 + turn
    assert (learned[[0, 2, 3]] == before[[0, 2, 3]]).all()


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_a_row_that_another_cpu_is_filling_is_not_taken(xdp: Kernel):
    network = address("10.9.0.0:0")[0]
    xdp.routes.replace({**ROUTES, (network, 16): int(RouteTarget.ON_LINK)})
    learned = xdp.tables.next_hops[-(len(xdp.tables.next_hops) // Limit.LEARNED_SHARE) :]
    learned[0]["used"] = RowUse.TAKEN
    assert xdp.send(syn_of(4000, host=network + 1))[0] == Reason.ADMITTED
    assert learned["used"].tolist() == [RowUse.TAKEN, RowUse.OF_HOST, RowUse.FREE, RowUse.FREE]


@pytest.mark.parametrize("xdp", [60_000], indirect=True)
def test_xdp_admits_beside_userspace_into_a_table_and_userspace_finds_its_flows(xdp: Kernel):
    before, ports = 19_000, range(1024, 7024)
    assert insert_many(xdp.tables, 0, before, np.uint8(State.SYN_SENT), np.uint32(JiffyClock().now())) == before
    admitted = sum(xdp.send(syn_of(port))[0] == Reason.ADMITTED for port in ports)
    assert admitted == len(ports)
    assert all(xdp.slot_of((CLIENT[0], port), VIPS[0]) != compiled.MISS for port in ports)
    assert assert_pairs(xdp.tables, before + len(ports)) == before + len(ports)
    record = xdp.tables.flows[xdp.slot_of((CLIENT[0], 1024), VIPS[0])]
    assert record["state"] == State.SYN_SENT


@pytest.mark.slow
@pytest.mark.parametrize("xdp", [20_000], indirect=True)
def test_cpus_that_admit_the_same_connections_at_once_make_each_once(xdp: Kernel):
    """Two XDP runs on two CPUs, and the sweep, over the same few connections that begin again and again."""
    ports = range(1024, 1024 + 256)

    def admit(seed: int) -> dict[Reason, int]:
        random, seen = np.random.default_rng(seed), dict[Reason, int]()
        for port in random.integers(ports.start, ports.stop, 6_000).tolist():
            action, after, _ = kernel.prog_test_run(xdp.program, syn_of(port))
            seen[action] = seen.get(action, 0) + 1
            assert action in (1, 4)
            if action == 4:
                assert after[30:34] == ENDPOINT[0].to_bytes(4, "big")
        return seen

    def sweep() -> int:
        freed = 0
        for _ in range(60):
            slots = np.zeros(64, np.int64)
            count = passes.used_slots(xdp.tables.tags, xdp.tables.flows, 0, slots)
            for slot in slots[: count // 2]:
                compiled.withdraw(xdp.tables, slot)
            freed += xdp.table.sweep()
        return freed

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(admit, 1), pool.submit(admit, 2), pool.submit(sweep)]
        seen = [job.result() for job in jobs]
    assert seen[0][4] + seen[1][4] > 11_500
    assert seen[2] > 200, seen
    assert_pairs(xdp.tables, len(ports))


# IPv6: clients need a name first.

NETWORK6 = address("[2001:db8:9::]:0")[0]


def syn6(port: int, host: int = CLIENT6[0]) -> bytes:
    return packets.syn((host, port), VIP6)


def state_of(tables: Tables, host: int) -> NameState:
    """Return how the one name of an address stands, FREE if it has none."""
    is_its = (tables.names["addr"] == np.array(words_of(IPv6Address(host ^ IPV6)), np.uint64)).all(axis=1)
    states = tables.names["state"][is_its & (tables.names["state"] != NameState.FREE)].tolist()
    assert len(states) <= 1, "one address, one name"
    return NameState(states[0]) if states else NameState.FREE


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_N9_a_client_of_ipv6_that_nobody_knows_gets_a_name(xdp: Kernel):
    assert state_of(xdp.tables, CLIENT6[0]) == NameState.FREE
    names = naming.count(xdp.tables)
    reason, after = xdp.send(syn6(4000))
    assert (reason, packets.addresses_of(after)[1]) == (Reason.ADMITTED, ENDPOINT6[0])
    assert (state_of(xdp.tables, CLIENT6[0]), naming.count(xdp.tables)) == (NameState.ALIVE, names + 1)
    assert xdp.send(packets.syn_ack(ENDPOINT6, (CLIENT6[0], 4000)))[0] == Reason.FORWARDED
    assert xdp.send(syn6(4001))[0] == Reason.ADMITTED
    assert naming.count(xdp.tables) == names + 1, "the second connection has the same name"
    assert assert_pairs(xdp.tables, 2) == 2


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_N9_a_name_that_dies_lives_again_with_the_next_connection(xdp: Kernel):
    assert xdp.send(syn6(4000))[0] == Reason.ADMITTED
    (row,) = np.flatnonzero(xdp.tables.names["pins"] == 0)[
        xdp.tables.names["state"][xdp.tables.names["pins"] == 0] != 0
    ]
    naming.end_pass(xdp.tables, np.zeros(len(xdp.tables.names), np.uint8))
    assert xdp.tables.names[row]["state"] == NameState.DYING
    assert xdp.send(syn6(4000))[0] == Reason.FORWARDED
    assert xdp.tables.names[row]["state"] == NameState.DYING, "who only reads leaves it"
    assert xdp.send(syn6(4001))[0] == Reason.ADMITTED
    assert xdp.tables.names[row]["state"] == NameState.ALIVE


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_N9_a_client_that_somebody_else_is_naming_just_now_never_gets_a_second_name(xdp: Kernel):
    names, known = xdp.tables.names, naming.count(xdp.tables)
    row = naming.intern(xdp.tables, *map(np.uint64, words_of(IPv6Address(CLIENT6[0] ^ IPV6))))
    names[row]["state"] = NameState.CANDIDATE
    before = names.copy()
    assert xdp.send(syn6(4000))[0] == Reason.NAMES_FULL, "given up after a few tries"
    assert (names["state"] == before["state"]).all(), "what it had claimed is free again"
    assert naming.count(xdp.tables) == known + 1
    names[row]["state"] = NameState.ALIVE
    assert xdp.send(syn6(4000))[0] == Reason.ADMITTED
    assert state_of(xdp.tables, CLIENT6[0]) == NameState.ALIVE


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_N9_without_room_for_a_name_a_client_is_not_admitted(xdp: Kernel):
    names = xdp.tables.names
    names["state"][names["state"] == NameState.FREE] = NameState.CLAIMED
    assert xdp.send(syn6(4000))[0] == Reason.NAMES_FULL
    assert not xdp.tables.tags.any()


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_N9_a_client_on_the_link_is_answered_where_it_came_from_and_keeps_its_name(xdp: Kernel):
    stranger = NETWORK6 + 0x77
    xdp.routes.replace({**ROUTES, (NETWORK6, 64): int(RouteTarget.ON_LINK)})
    frame = syn6(4000, stranger)
    assert xdp.send(frame)[0] == Reason.ADMITTED
    first = len(xdp.tables.next_hops) - len(xdp.tables.next_hops) // Limit.LEARNED_SHARE
    hop = xdp.tables.next_hops[first]
    assert (bytes(hop["dst_mac"]), bytes(hop["src_mac"])) == (frame[6:12], frame[:6])
    assert (hop["ifindex"], hop["state"], hop["used"], hop["prefix_len"]) == (1, HopState.FORWARD, 1, 128)
    number = swap32(int(hop["destination"]))
    assert number_of(Names(xdp.tables).address_of(number)) == stranger
    assert xdp.tables.names[number]["pins"] == 1, "as long as there is a row for it"
    reason, answer = xdp.send(packets.syn_ack(ENDPOINT6, (stranger, 4000)))
    assert (reason, answer[:12]) == (Reason.FORWARDED, frame[6:12] + frame[:6])
    xdp.send(syn6(4001, stranger))
    assert int(xdp.tables.control[0]["learned"]) == 1, "one client, one row"


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_N9_an_address_of_ipv4_never_takes_a_route_of_ipv6_whatever_its_bits_are(xdp: Kernel):
    stranger, row6 = address("198.51.100.7:4000"), ROUTES[CLIENT6[0], 128]
    mapped = IPV6 | 0xFFFF << 32
    xdp.routes.replace({(IPV6, 0): row6, (mapped, 96): row6})
    assert xdp.send(packets.syn(stranger, VIPS[0]))[0] == Reason.NO_NEXT_HOP
    xdp.routes.replace({(0, 0): 1, (IPV6, 0): row6, (mapped, 96): int(RouteTarget.NO_ROUTE)})
    assert xdp.send(packets.syn(stranger, VIPS[0]))[0] == Reason.ADMITTED


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_N9_the_last_names_are_not_for_clients(xdp: Kernel):
    rows = len(xdp.tables.names)
    xdp.tables.name_count[0] = rows - rows // Limit.NAMES_KEPT
    assert xdp.send(syn6(4000))[0] == Reason.NAMES_FULL
    xdp.tables.name_count[0] -= 1
    assert xdp.send(syn6(4000))[0] == Reason.ADMITTED
    xdp.tables.name_count[0] += 1
    assert xdp.send(syn6(4001))[0] == Reason.ADMITTED, "it has its name"


@pytest.mark.parametrize("xdp", [200], indirect=True)
def test_N9_an_address_of_ipv6_never_takes_a_route_of_ipv4(xdp: Kernel):
    client = NETWORK6 + 0x78
    row = ROUTES[CLIENT6[0], 128]
    xdp.routes.replace({(0, 0): 1, (IPV6, 0): int(RouteTarget.NO_ROUTE), (NETWORK6, 64): row})
    assert xdp.send(syn6(4000, client))[0] == Reason.ADMITTED
    way = xdp.tables.flows["next_hop"][xdp.tables.flows["direction"] == 1]
    assert row in way
    assert xdp.send(syn6(4000, address("[2001:db8:8::1]:0")[0]))[0] == Reason.NO_NEXT_HOP


@pytest.mark.slow
@pytest.mark.parametrize("xdp", [20_000], indirect=True)
def test_N9_writers_that_name_the_same_clients_at_once_give_each_one_name(xdp: Kernel):
    """Two XDP runs and a compiled writer name the same few clients, while names begin to die and live again."""
    hosts = [NETWORK6 + host for host in range(1, 65)]
    xdp.routes.replace({**ROUTES, (NETWORK6, 64): ROUTES[CLIENT6[0], 128]})

    def admit(seed: int) -> int:
        random, refused = np.random.default_rng(seed), 0
        for turn in range(2500):
            frame = syn6(1024 + turn, hosts[int(random.integers(len(hosts)))])
            refused += kernel.prog_test_run(xdp.program, frame)[0] != XDP_REDIRECT
        return refused

    def intern() -> int:
        random, none = np.random.default_rng(3), 0
        for _ in range(8_000):
            words = words_of(IPv6Address(hosts[int(random.integers(len(hosts)))] ^ IPV6))
            none += naming.intern(xdp.tables, *map(np.uint64, words)) == naming.NOBODY
        return none

    def let_go() -> int:
        unused, dying = np.zeros(len(xdp.tables.names), np.uint8), 0
        for _ in range(40):
            dying += naming.end_pass(xdp.tables, unused)[0]
            naming.end_pass(xdp.tables, unused + 1)
        return dying

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(admit, 1), pool.submit(admit, 2), pool.submit(intern), pool.submit(let_go)]
        refused, refused_too, none, gone = (job.result() for job in jobs)
    assert refused + refused_too < 40, "given up after a few tries, and counted"
    assert (none, gone > 50) == (0, True), gone
    for host in hosts:
        state_of(xdp.tables, host)  # one at most
    used = np.count_nonzero(xdp.tables.names["state"])
    assert naming.count(xdp.tables) == used
