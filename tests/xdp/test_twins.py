"""XDP, compiled code and plain Python, fed the same packets: verdicts, bytes and records agree.

Three nodes begin alike. On `offloaded` every frame goes to the real XDP program, and what it punts to the pipeline over
the very same tables; on `alone` everything goes to the pipeline, over tables in plain memory; beside each walks a
reference model.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from conntrack.table import FlowTable
from tests import packets
from tests.packets import CLIENT, DNS_VIP, ENDPOINT, NAMED, OTHER_VIP, STRANGER, VIP
from tests.reference import Key, Outcome, Reference
from tests.small_node import (
    CLIENTS,
    HOPS,
    NARROW_VIP,
    SEED,
    SERVICES,
    SMALL,
    TCP_VIPS,
    Pipeline,
    flows_expected,
    flows_of,
    service_ports,
    service_table,
)
from xdp import kernel, loader, maps
from xdp.clock import JiffyClock
from xdp.schema import Protocol, Reason, State, Verdict, verdict_of
from xdp.tables import Tables

pytestmark = [pytest.mark.root, pytest.mark.bpf]

LB = Path(loader.__file__).parent / "bpf" / "lb.c"
AF_XDP = 44  # Python does not name it
LOOPBACK = 1
XDP_DROP, XDP_PASS, XDP_REDIRECT = 1, 2, 4
ACTION = {
    Verdict.FORWARD: XDP_REDIRECT,
    Verdict.PASS: XDP_PASS,
    Verdict.DROP: XDP_DROP,
    Verdict.PUNT: XDP_REDIRECT,
}
PATIENCE_S = 10  # of XDP with the worker's heartbeat: this machine may be busy with something else meanwhile


class Twins:
    """The nodes, and their reference models."""

    def __init__(self, shared: maps.SharedMaps, program: int, clock: JiffyClock, *, offloads: bool) -> None:
        self._program = program
        self._offloads = offloads
        self._clock = clock
        self.is_stalled = False
        self.tables = shared.tables
        FlowTable(self.tables, clock).create()
        self.tables.control[0]["aged_from"] = (clock.now() - 1_000_000 * clock.hertz) & 0xFFFFFFFF
        self.tables.control[0]["stall_jiffies"] = PATIENCE_S * clock.hertz
        self._late = 0  # jiffies that passed at most between our asking for the time and XDP's
        self._offloaded = Pipeline(self.tables)
        service_table(self.tables).apply(service_ports())
        self._memory = copy_of(self.tables)
        self._alone = Pipeline(self._memory)
        self.reference, self._reference_alone = self._models()

    def _models(self) -> tuple[Reference, Reference]:
        first, second = (Reference(SERVICES, HOPS, SEED, self._clock.hertz) for _ in range(2))
        return first, second

    def clear(self) -> None:
        """Forget every connection."""
        for tables in (self.tables, self._memory):
            tables.tags[:] = 0
        self.reference, self._reference_alone = self._models()
        self.is_stalled = False
        self._late = 0

    def age(self, seconds: float) -> None:
        """Let every connection be idle for longer."""
        jiffies = round(seconds * self._clock.hertz)
        for pipeline in (self._offloaded, self._alone):
            pipeline.age(jiffies)
        for model in (self.reference, self._reference_alone):
            for connection in {id(connection): connection for connection, _ in model.flows.values()}.values():
                connection.last_seen[:] = [(seen - jiffies) & 0xFFFFFFFF for seen in connection.last_seen]

    def send(self, frame: bytes) -> Outcome:
        """Send a frame through all of them; return what became of it on the node with XDP."""
        now = self._clock.now()
        outcome = self._through_xdp(frame, now)
        if verdict_of(outcome.reason) == Verdict.PUNT:
            outcome = self._offloaded.send(frame, now)
            assert outcome == self.reference.userspace(frame, now)
        alone = self._alone.send(frame, now)
        assert alone == self._reference_alone.userspace(frame, now)
        self._compare_records()
        return outcome

    def _through_xdp(self, frame: bytes, now: int) -> Outcome:
        self.tables.workers[0]["heartbeat"] = 0 if self.is_stalled else now
        before = self.counts()
        action, after, _ = kernel.prog_test_run(self._program, frame)
        self._late = max(self._late, (self._clock.now() - now) & 0xFFFFFFFF)
        counted = self.counts() - before
        assert counted.sum() == 1
        reason = Reason(int(counted.argmax()))
        expected = self.reference.xdp(frame, now, is_stalled=self.is_stalled, offloads=self._offloads)
        assert (reason, after) == (expected.reason, expected.frame)
        assert action == ACTION[verdict_of(reason)]
        return expected

    def counts(self) -> npt.NDArray[np.int64]:
        """Return how many frames XDP has counted, by reason."""
        return self.tables.xdp_counters["packets"].sum(axis=0, dtype=np.int64)

    def _compare_records(self) -> None:
        expected = flows_expected(self.reference)
        found = flows_of(self.tables)
        assert found.keys() == expected.keys()
        for key, flow in found.items():
            late = (flow.last_seen - expected[key].last_seen) & 0xFFFFFFFF
            assert late <= self._late
            assert flow._replace(last_seen=expected[key].last_seen) == expected[key]
        assert flows_of(self._memory) == flows_expected(self._reference_alone)


def copy_of(tables: Tables) -> Tables:
    """Return tables in plain memory with the same contents."""
    copy = Tables.in_memory(SMALL)
    for name in SMALL.rows():
        getattr(copy, name)[:] = getattr(tables, name)
    return copy


@contextlib.contextmanager
def made_twins(*, offloads: bool) -> Iterator[Twins]:
    """Make the nodes; without `offloads`, the program is that of engine afxdp."""
    folder = Path(f"/run/turnout/bpf/test-twins-{os.getpid()}-{int(offloads)}")
    kernel.mount_bpffs(folder.parent)
    try:
        # XDP punts only where a socket is; it need not be bound for a run whose verdict is not carried out.
        with maps.create(folder, SMALL) as shared, socket.socket(AF_XDP, socket.SOCK_RAW) as reader:
            kernel.map_update(shared.sockets_fd, struct.pack("=I", 0), struct.pack("=I", reader.fileno()))
            kernel.map_update(shared.queues_fd, struct.pack("=II", LOOPBACK, 0), struct.pack("=I", 0))
            program = loader.load(folder, LB, "xdp_lb", {"OFFLOAD": int(offloads)})
            yield Twins(shared, program, JiffyClock(), offloads=offloads)
            os.close(program)
    finally:
        maps.remove(folder)


@pytest.fixture(scope="module")
def shared_twins() -> Iterator[Twins]:
    with made_twins(offloads=True) as made:
        yield made


@pytest.fixture
def twins(shared_twins: Twins) -> Twins:
    shared_twins.clear()
    return shared_twins


@pytest.mark.parametrize("is_stalled", [False, True], ids=["alive", "stalled"])
@pytest.mark.parametrize("name", NAMED)
def test_a_frame_without_a_flow(name: str, is_stalled: bool, twins: Twins):
    twins.is_stalled = is_stalled
    twins.send(NAMED[name])


@pytest.mark.parametrize("name", NAMED)
def test_a_frame_when_its_client_has_flows(name: str, twins: Twins):
    for first in ("syn", "udp"):
        assert twins.send(NAMED[first]).reason == Reason.ADMITTED
    twins.send(NAMED[name])
    endpoint = endpoint_of(twins, CLIENT, VIP, Protocol.TCP)
    for reply in (packets.syn_ack(endpoint), packets.data(endpoint, CLIENT), packets.rst(endpoint, CLIENT)):
        twins.send(reply)
    twins.send(NAMED[name])


def endpoint_of(twins: Twins, client: packets.Address, vip: packets.Address, protocol: Protocol) -> packets.Address:
    """Return the endpoint of a connection; that of another, if there is none."""
    flow = twins.reference.flows.get(Key(client, vip, protocol))
    return flow[0].translated.destination if flow else ENDPOINT


FLAGS = ("S", "A", "PA", "FA", "R", "RA", "SA", "", "SF", "FPU")


@dataclass(frozen=True)
class Step:
    """A packet of one of a few connections, or something else that happens."""

    kind: str  # "tcp", "udp", "error", "age" or "stall"
    client: packets.Address = CLIENT
    vip: packets.Address = VIP
    is_reply: bool = False
    flags: str = "A"
    payload: int = 0
    ttl: int = 64
    error: str = "port-unreachable"
    seconds: float = 0


_clients = st.sampled_from(CLIENTS)
_ttls = st.sampled_from([64, 64, 64, 255, 2, 1])
_sizes = st.sampled_from([0, 1, 7, 100, 1447, 1500])
_steps = st.one_of(
    st.builds(
        Step,
        kind=st.just("tcp"),
        client=_clients,
        vip=st.sampled_from([VIP, VIP, *TCP_VIPS, STRANGER]),
        is_reply=st.booleans(),
        flags=st.sampled_from(["S", "S", *FLAGS]),
        payload=_sizes,
        ttl=_ttls,
    ),
    st.builds(
        Step,
        kind=st.just("udp"),
        client=_clients,
        vip=st.sampled_from([DNS_VIP, DNS_VIP, VIP]),
        is_reply=st.booleans(),
        payload=_sizes,
        ttl=_ttls,
    ),
    st.builds(
        Step,
        kind=st.just("error"),
        client=_clients,
        vip=st.sampled_from([VIP, DNS_VIP]),
        is_reply=st.booleans(),
        payload=_sizes,
        ttl=_ttls,
        error=st.sampled_from(sorted(packets.ICMP_ERRORS)),
    ),
    st.builds(Step, kind=st.just("age"), seconds=st.sampled_from([1, 9, 11, 31, 61, 121, 8001])),
    st.builds(Step, kind=st.just("stall")),
)


def frame_of(step: Step, twins: Twins) -> bytes:
    protocol = Protocol.UDP if step.kind == "udp" or step.vip == DNS_VIP else Protocol.TCP
    endpoint = endpoint_of(twins, step.client, step.vip, protocol)
    ends = (endpoint, step.client) if step.is_reply else (step.client, step.vip)
    if step.kind == "error":
        # About a packet that we sent: to the client from the VIP, or to the endpoint from the client.
        ends = (step.vip, step.client) if step.is_reply else (step.client, endpoint)
    payload = bytes(step.payload)
    if protocol == Protocol.UDP:
        frame = bytes(packets.udp_packet(*ends, payload, ttl=step.ttl))
    else:
        frame = bytes(packets.tcp_packet(*ends, step.flags, payload, ttl=step.ttl))
    return packets.icmp_error(frame, step.error, quoted=576, ttl=step.ttl) if step.kind == "error" else frame


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(_steps, min_size=1, max_size=16))
def test_any_sequence_of_packets(steps: list[Step], twins: Twins):
    twins.clear()
    for step in steps:
        if step.kind == "age":
            twins.age(step.seconds)
        elif step.kind == "stall":
            twins.is_stalled = not twins.is_stalled
        else:
            event(twins.send(frame_of(step, twins)).reason.name)


def test_a_connection_from_syn_to_time_wait(twins: Twins):
    endpoint = ENDPOINT
    seen = []
    for flags, is_reply in (
        ("S", 0),
        ("SA", 1),
        ("A", 0),
        ("PA", 0),
        ("A", 1),
        ("FA", 0),
        ("A", 1),
        ("FA", 1),
        ("A", 0),
    ):
        endpoint = endpoint_of(twins, CLIENT, VIP, Protocol.TCP)
        ends = (endpoint, CLIENT) if is_reply else (CLIENT, VIP)
        reason = twins.send(bytes(packets.tcp_packet(*ends, flags))).reason
        seen.append((reason, twins.reference.flows[Key(CLIENT, VIP, Protocol.TCP)][0].state))
    forwarded = Reason.FORWARDED
    assert seen == [
        (Reason.ADMITTED, State.SYN_SENT),
        (forwarded, State.SYN_RECEIVED),
        *[(forwarded, State.ESTABLISHED)] * 3,
        *[(forwarded, State.FIN_ORIGINAL)] * 2,
        *[(forwarded, State.TIME_WAIT)] * 2,
    ]


def connected(twins: Twins, vip: packets.Address = VIP) -> packets.Address:
    """Establish a connection; return its endpoint."""
    assert twins.send(packets.syn(destination=vip)).reason == Reason.ADMITTED
    endpoint = endpoint_of(twins, CLIENT, vip, Protocol.TCP)
    twins.send(packets.syn_ack(endpoint))
    twins.send(packets.ack(destination=vip))
    return endpoint


def test_a_syn_begins_anew_on_a_closing_connection_if_it_is_the_client_s(twins: Twins):
    endpoint = connected(twins)
    twins.send(packets.rst())
    assert twins.send(packets.syn(endpoint, CLIENT)).reason == Reason.FORWARDED
    assert twins.send(packets.syn()).reason == Reason.ADMITTED


def test_either_direction_keeps_a_connection(twins: Twins):
    endpoint = connected(twins)
    for direction in (packets.data(endpoint, CLIENT), packets.data(), packets.data(endpoint, CLIENT)):
        twins.age(5000)
        assert twins.send(direction).reason == Reason.FORWARDED
    twins.age(8001)
    assert twins.send(packets.data(endpoint, CLIENT)).reason == Reason.NOT_OURS


def test_an_error_about_an_expired_connection_is_about_none(twins: Twins):
    connected(twins)
    error = packets.icmp_error(packets.data(VIP, CLIENT))
    assert twins.send(error).reason == Reason.FORWARDED
    twins.age(8001)
    assert twins.send(error).reason == Reason.OTHER_ICMP


def test_a_frame_is_too_big_from_one_byte_on(twins: Twins):
    connected(twins, NARROW_VIP)
    for size, reason in ((60, Reason.FORWARDED), (61, Reason.TOO_BIG)):
        assert twins.send(packets.data(destination=NARROW_VIP, payload=bytes(size))).reason == reason


def test_without_offload_userspace_forwards_what_is_known_while_it_lives_and_xdp_does_otherwise():
    with made_twins(offloads=False) as twins:
        endpoint = connected(twins)
        frames = (packets.data(), packets.data(endpoint, CLIENT), packets.ack(ttl=1), packets.fin(), packets.udp())
        for twins.is_stalled in (False, True, False):
            before = twins.counts()
            for frame in frames:
                twins.send(frame)
            grown = twins.counts() - before
            known = Reason.FORWARDED if twins.is_stalled else Reason.NOT_OFFLOADED
            assert grown[known] >= 3
            assert grown[Reason.TTL_EXPIRED] == 1
            assert grown[[Reason.FORWARDED, Reason.NOT_OFFLOADED]].sum() == grown[known]


# Not to be had from XDP by packets alone.
_NEVER_XDP = {
    Reason.ADMITTED,  # it admits nothing yet
    Reason.NOT_OFFLOADED,  # another engine
    *(Reason.NO_NEXT_HOP, Reason.NOT_FORWARDABLE),  # a flow exists only where its endpoint could be reached
    *(Reason.BAD_FLAGS, Reason.STRAY_RST, Reason.NO_ENDPOINT, Reason.TABLE_FULL, Reason.REPLY_CLASH),  # of admission
    *(Reason.FRAGMENT, Reason.ICMP_UNUSABLE, Reason.VANISHED),  # of what was punted
    *(Reason.NEXT_HOP_QUEUE, Reason.TX_FULL, Reason.PUNT_LOST),  # of rings
}


def test_every_reason_of_xdp_is_brought_about(twins: Twins):
    """What no test reaches is not compared."""
    before = twins.counts()
    narrow = endpoint_of(twins, CLIENT, NARROW_VIP, Protocol.TCP)
    everything = [*NAMED.values(), packets.syn(destination=NARROW_VIP), packets.ack(ttl=1), packets.syn(narrow)]
    for twins.is_stalled in (False, True):
        for frame in everything:
            twins.send(frame)
        twins.send(packets.data(destination=NARROW_VIP, payload=bytes(200)))
        twins.age(8001)
        twins.send(packets.syn(destination=OTHER_VIP))
    seen = {Reason(int(reason)) for reason in np.flatnonzero(twins.counts() - before)}
    assert seen == set(Reason) - _NEVER_XDP
