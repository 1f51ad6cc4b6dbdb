"""XDP, compiled code and plain Python, fed the same packets: verdicts, bytes and records agree.

Three nodes begin alike. On `offloaded` every frame goes to the real XDP program, and what it punts to the pipeline over
the very same tables; on `alone` everything goes to the pipeline, over tables in plain memory; beside each walks a
reference model. What leaves by way of the kernel goes through the real program at egress, over the tables of the first.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoReply, ICMPv6PacketTooBig, ICMPv6ParamProblem, IPv6
from scapy.layers.l2 import Ether

from conntrack.table import FlowTable
from dataplane.limits import CLIENT_ANSWERS
from dataplane.stations import words_of
from lb.compiled import USED
from tests import packets
from tests.named_packets import NAMED
from tests.packets import (
    CLIENT,
    CLIENT6,
    DNS_VIP,
    DNS_VIP6,
    ENDPOINT,
    ENDPOINT6,
    OTHER_CLIENT,
    OTHER_CLIENT6,
    OTHER_VIP,
    ROUTER6,
    STRANGER,
    STRANGER6,
    VIP,
    VIP6,
)
from tests.reference import IPV6, Key, Outcome, Reference
from tests.small_node import (
    CLIENTS,
    CLIENTS6,
    DEAD_VIP,
    DEAD_VIP6,
    DEAF_CLIENT,
    DEAF_CLIENT6,
    DEAF_VIP,
    DEAF_VIP6,
    ELSEWHERE_VIP,
    EXTERNAL_VIP,
    FOREIGN_VIP,
    HAIRPIN,
    HERE_VIP,
    HERE_VIP6,
    HOPS,
    LOST_CLIENT,
    LOST_VIP,
    MARTIANS,
    MARTIANS6,
    MASQUERADED_VIPS,
    MID_STREAM_VIPS,
    NARROW_ENDPOINT,
    NARROW_ENDPOINT6,
    NARROW_VIP,
    NARROW_VIP6,
    OUTER_VIP,
    OUTER_VIP6,
    OWN,
    OWN6,
    PASSING_VIP6,
    POD_DNS_VIP,
    POD_DNS_VIP6,
    POD_ENDPOINT,
    POD_ENDPOINT6,
    POD_HAIRPIN,
    POD_HAIRPIN6,
    POD_VIP,
    POD_VIP6,
    POD_VIPS,
    POD_VIPS6,
    PRIVILEGED,
    RANDOM_VIP,
    RESET_VIP6,
    ROUTES,
    SCHEDULED_VIPS,
    SMALL,
    SNAT_PORTS,
    STATIONS,
    STICKY_VIP6,
    STICKY_VIPS,
    TCP_VIPS,
    Pipeline,
    flows_expected,
    flows_of,
    named,
    reference_of,
    service_ports,
    service_table,
)
from xdp import kernel, loader, maps, mounts, naming, removing, stages
from xdp.byteorder import swap16, swap32
from xdp.clock import JiffyClock
from xdp.routes import RouteMap
from xdp.schema import HopState, Limit, Ping, Protocol, Reason, Stage, State, Verdict, verdict_of
from xdp.tables import Tables

pytestmark = [pytest.mark.root, pytest.mark.bpf]

EGRESS = stages.SOURCE.with_name("egress.c")
AF_XDP = 44  # Python does not name it
LOOPBACK = 1
XDP_DROP, XDP_PASS, XDP_REDIRECT = 1, 2, 4
TCX_NEXT, TC_ACT_REDIRECT = 0xFFFFFFFF, 7
ACTION = {
    Verdict.FORWARD: XDP_REDIRECT,
    Verdict.PASS: XDP_PASS,
    Verdict.DROP: XDP_DROP,
    Verdict.PUNT: XDP_REDIRECT,
}
# Around the timeouts, and no few of them sum up to one: XDP asks for the time a moment after us, and would see the
# other side of it.
AGES_S = (1.3, 9.2, 11.3, 31.3, 61.3, 121.3, 8001.3)
PATIENCE_S = 10  # of XDP with the worker: this machine may be busy with something else meanwhile


class Twins:
    """The nodes, and their reference models."""

    def __init__(
        self, shared: maps.SharedMaps, program: int, egress: int, clock: JiffyClock, *, offloads: bool
    ) -> None:
        self.shared = shared
        self._program = program
        self.egress_program = egress
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
        return reference_of(self.tables, self._clock.hertz), reference_of(self._memory, self._clock.hertz)

    def clear(self) -> None:
        """Forget every connection."""
        for tables in (self.tables, self._memory):
            tables.tags[:] = 0
            tables.published[:] = 0
            tables.affinity_words[:] = 0
            tables.round_robin[:] = 0
            tables.loads[:] = 0
            tables.datagrams[:] = 0
            for _ in range(2):  # names of clients
                naming.end_pass(tables, np.zeros(len(tables.names), np.uint8))
            naming.release(tables)
        for pipeline in (self._offloaded, self._alone):
            pipeline.clear()
        self.reference, self._reference_alone = self._models()
        self.let_ping(Ping.ANSWER)
        self.hear(STATIONS)
        self.is_stalled = False
        self._late = 0

    def let_ping(self, what: Ping) -> None:
        """Choose what becomes of echo requests to VIPs, until all is cleared."""
        for tables in (self.tables, self._memory):
            tables.control[0]["ping"] = what
        for model in (self.reference, self._reference_alone):
            model.ping = what

    def hear(self, stations: Collection[bytes]) -> None:
        """Let these be the MAC addresses by which frames are ours, until all is cleared."""
        for tables in (self.tables, self._memory):
            tables.control[0]["stations"] = words_of(stations)
        for model in (self.reference, self._reference_alone):
            model.stations = frozenset(stations)

    @contextlib.contextmanager
    def owning(self, vip: packets.Address) -> Iterator[None]:
        """Let a VIP be an address of the node itself meanwhile."""
        models, kept = (self.reference, self._reference_alone), []
        for tables in (self.tables, self._memory):
            family = Protocol.IPV6 if vip[0] & IPV6 else 0
            key = int(USED) | family << 48 | swap32(named(tables, vip[0]))  # of no port and no protocol
            place = np.flatnonzero(tables.frontend_keys == key)
            tables.frontend_keys[place] = 0
            kept.append((tables.frontend_keys, place, key))
        for model in models:
            model.vips.remove(vip[0])
        yield
        for keys, place, key in kept:
            keys[place] = key
        for model in models:
            model.vips.add(vip[0])

    def remembered(self) -> list[tuple[int, ...]]:
        """Return how much either node remembers: records, names, clients' endpoints, datagrams."""
        return [
            (
                len(flows_of(tables)),
                naming.count(tables),
                np.count_nonzero(tables.affinity_words),
                np.count_nonzero(tables.datagrams["which"]),
                np.count_nonzero(pipeline.node.fragments.datagrams["which"]),
            )
            for tables, pipeline in ((self.tables, self._offloaded), (self._memory, self._alone))
        ]

    def age(self, seconds: float) -> None:
        """Let every connection be idle for longer."""
        jiffies = round(seconds * self._clock.hertz)
        for pipeline in (self._offloaded, self._alone):
            pipeline.age(jiffies)
        self.tables.datagrams["seen"] -= np.uint32(jiffies)
        for model in (self.reference, self._reference_alone):
            for connection in {id(connection): connection for connection, _ in model.flows.values()}.values():
                connection.last_seen[:] = [(seen - jiffies) & 0xFFFFFFFF for seen in connection.last_seen]
            for datagram in model.datagrams.values():
                datagram.since = (datagram.since - jiffies) & 0xFFFFFFFF
            model.followed = {which: at - jiffies & 0xFFFFFFFF for which, at in model.followed.items()}
            model.given = {client: (to, at - jiffies & 0xFFFFFFFF) for client, (to, at) in model.given.items()}

    def reset(self, vip: packets.Address) -> None:
        """Have the TCP connections of a frontend reset, all of them."""
        protocol = Protocol.TCP | (Protocol.IPV6 if vip[0] & IPV6 else 0)
        for tables in (self.tables, self._memory):
            FlowTable(tables, self._clock).reset_others(protocol, [(named(tables, vip[0]), vip[1])], [])
        for model in (self.reference, self._reference_alone):
            for key in [key for key in model.flows if key[1:] == (vip, protocol)]:
                model.reset(key)

    def put(self, key: Key, state: State) -> None:
        """Have an IPv4 connection be in a state; it was seen just now."""
        for tables in (self.tables, self._memory):
            found = flows_of(tables)[key]
            for each in (key, found.peer):
                (source, source_port), (host, port) = each.source, each.destination
                is_it = (tables.flows["src_addr"] == swap32(source)) & (tables.flows["dst_addr"] == swap32(host))
                is_it &= tables.flows["src_port"] == swap16(source_port)
                tables.flows["state"][is_it & (tables.flows["dst_port"] == swap16(port))] = state
        for model in (self.reference, self._reference_alone):
            model.flows[key][0].state = state

    @property
    def now(self) -> int:
        """The time in jiffies."""
        return self._clock.now()

    def send(self, frame: bytes, *, compare: bool = True, now: int | None = None) -> Outcome:
        """Send a frame through all of them, `now` if it is given; return what became of it on the node with XDP.

        Without `compare` the records are left for later: looking at all of them is most of the work.
        """
        now = self.now if now is None else now
        outcome = self._through_xdp(frame, now)
        if verdict_of(outcome.reason) == Verdict.PUNT:
            outcome = self._offloaded.send(frame, now)
            assert outcome == self.reference.userspace(frame, now)
        self.send_alone(frame, now)
        if compare:
            self.compare_records()
        return outcome

    def send_alone(self, frame: bytes, now: int | None = None) -> Outcome:
        """Send a frame through the pipeline alone; return what became of it."""
        now = self._clock.now() if now is None else now
        alone = self._alone.send(frame, now)
        assert alone == self._reference_alone.userspace(frame, now)
        return alone

    def leave(self, frame: bytes) -> Outcome:
        """Let the kernel send a frame by an interface of ours; return what became of it."""
        now = self._clock.now()
        counters = self.tables.egress_counters["packets"]
        before = counters.sum(axis=0, dtype=np.int64)
        action, after, _ = kernel.prog_test_run(self.egress_program, frame)
        self._late = max(self._late, (self._clock.now() - now) & 0xFFFFFFFF)
        counted = counters.sum(axis=0, dtype=np.int64) - before
        expected = self.reference.egress(frame, now)
        turns = expected.reason == Reason.TO_KERNEL
        assert (action, counted.sum(), counted.argmax()) == (
            TC_ACT_REDIRECT if turns else TCX_NEXT,
            1,
            expected.reason,
        )
        assert after == expected.frame
        self.compare_records()
        return expected

    def _through_xdp(self, frame: bytes, now: int) -> Outcome:
        self.tables.workers[0]["heartbeat"] = 0 if self.is_stalled else now
        self.tables.workers[0]["waiting_since"] = 0  # as a worker says at the beginning of its turn
        before = self.counts()
        action, after, _ = kernel.prog_test_run(self._program, frame)
        self._late = max(self._late, (self._clock.now() - now) & 0xFFFFFFFF)
        counted = self.counts() - before
        assert counted.sum() == 1
        reason = Reason(int(counted.argmax()))
        expected = self.reference.xdp(frame, now, is_stalled=self.is_stalled, offloads=self._offloads)
        assert (reason, after) == (expected.reason, expected.frame)
        assert action == (XDP_PASS if self._is_for_kernel(expected) else ACTION[verdict_of(reason)])
        return expected

    def _is_for_kernel(self, outcome: Outcome) -> bool:
        """Whether a frame was rewritten for the kernel to route: its MAC addresses are those of before."""
        if outcome.reason not in (Reason.TO_KERNEL, Reason.ADMITTED):
            return False
        return HOPS[packets.addresses_of(packets.untagged(outcome.frame))[1]].state == HopState.KERNEL

    def counts(self) -> npt.NDArray[np.int64]:
        """Return how many frames XDP has counted, by reason."""
        return self.tables.xdp_counters["packets"].sum(axis=0, dtype=np.int64)

    def compare_records(self) -> None:
        """Assert that every record is as the models say."""
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
    mounts.mount_bpffs(folder.parent)
    try:
        # XDP punts only where a socket is; it need not be bound for a run whose verdict is not carried out.
        with maps.create(folder, SMALL) as shared, socket.socket(AF_XDP, socket.SOCK_RAW) as reader:
            kernel.map_update(shared.sockets_fd, struct.pack("=I", 0), struct.pack("=I", reader.fileno()))
            kernel.map_update(shared.queues_fd, struct.pack("=II", LOOPBACK, 0), struct.pack("=I", 0))
            program = stages.load(shared, offloads=offloads)
            egress = loader.load(folder, EGRESS, "tc_egress", kind="tc")
            RouteMap(shared.routes_fd).replace(ROUTES)
            yield Twins(shared, program, egress, JiffyClock(), offloads=offloads)
            os.close(program)
            os.close(egress)
    finally:
        removing.maps(folder)


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
    if len(NAMED[name]) >= 14:
        twins.leave(NAMED[name])


@pytest.mark.parametrize("name", NAMED)
def test_a_frame_when_its_client_has_flows(name: str, twins: Twins):
    for first in ("syn", "udp", "ipv6-syn", "ipv6-udp"):
        assert twins.send(NAMED[first]).reason == Reason.ADMITTED
    twins.send(NAMED[name])
    endpoint = endpoint_of(twins, CLIENT, VIP, Protocol.TCP)
    for reply in (packets.syn_ack(endpoint), packets.data(endpoint, CLIENT), packets.rst(endpoint, CLIENT)):
        twins.send(reply)
        twins.leave(reply)
    twins.send(NAMED[name])
    if len(NAMED[name]) >= 14:
        twins.leave(NAMED[name])


def endpoint_of(twins: Twins, client: packets.Address, vip: packets.Address, protocol: int) -> packets.Address:
    """Return the endpoint of a connection; that of another, if there is none."""
    return translated_of(twins, client, vip, protocol)[1]


def translated_of(
    twins: Twins, client: packets.Address, vip: packets.Address, protocol: int
) -> tuple[packets.Address, packets.Address]:
    """Return source and destination of a connection as its endpoint sees them; if there is none, of another."""
    flow = twins.reference.flows.get(Key(client, vip, protocol))
    return flow[0].translated[:2] if flow else (client, ENDPOINT6 if vip[0] & IPV6 else ENDPOINT)


MORE_VIPS = (*STICKY_VIPS, *SCHEDULED_VIPS, *MID_STREAM_VIPS)
FLAGS = ("S", "A", "PA", "FA", "R", "RA", "SA", "", "SF", "FPU")


@dataclass(frozen=True)
class Step:
    """A packet of one of a few connections, or something else that happens."""

    kind: str  # "tcp", "udp", "error", "age" or "stall"
    client: packets.Address = CLIENT
    vip: packets.Address = VIP
    is_reply: bool = False
    leaves: bool = False  # by way of the kernel, where it does not arrive
    flags: str = "A"
    payload: int = 0
    ttl: int = 64
    is_uncut: bool = False
    error: str = "port-unreachable"
    seconds: float = 0
    cut: tuple[int, int] = (0, 0)  # what of the datagram is in the fragment
    number: int = 7


_SISTERS = dict(
    zip((*CLIENTS, HAIRPIN, DEAF_CLIENT, POD_HAIRPIN), (*CLIENTS6, DEAF_CLIENT6, POD_HAIRPIN6), strict=True)
)  # of IPv6
_VIPS6 = [VIP6, HERE_VIP6, OUTER_VIP6, STICKY_VIP6, PASSING_VIP6, RESET_VIP6, POD_VIP6, DEAF_VIP6, STRANGER6]
_clients = st.sampled_from([*CLIENTS, HAIRPIN, POD_HAIRPIN, DEAF_CLIENT] * 3 + [*PRIVILEGED, LOST_CLIENT, *MARTIANS])
_ttls = st.sampled_from([64, 64, 64, 255, 2, 1])
_sizes = st.sampled_from([0, 1, 7, 100, 1447, 1500])
_steps = st.one_of(
    st.builds(
        Step,
        kind=st.just("tcp"),
        client=_clients,
        vip=st.sampled_from(
            [
                VIP,
                VIP,
                HERE_VIP,
                *TCP_VIPS,
                *MASQUERADED_VIPS,
                *MASQUERADED_VIPS,
                *STICKY_VIPS,
                *SCHEDULED_VIPS,
                *MID_STREAM_VIPS,
                POD_VIP,
                POD_VIP,
                DEAF_VIP,
                STRANGER,
                (VIP[0], 81),
                *_VIPS6,
                *_VIPS6,
            ]
        ),
        is_reply=st.booleans(),
        leaves=st.booleans(),
        flags=st.sampled_from(["S", "S", *FLAGS]),
        payload=_sizes,
        ttl=_ttls,
        is_uncut=st.booleans(),
    ),
    st.builds(
        Step,
        kind=st.just("udp"),
        client=_clients,
        vip=st.sampled_from([DNS_VIP, DNS_VIP, POD_DNS_VIP, VIP, DNS_VIP6, POD_DNS_VIP6]),
        is_reply=st.booleans(),
        leaves=st.booleans(),
        payload=_sizes,
        ttl=_ttls,
    ),
    st.builds(
        Step,
        kind=st.just("error"),
        client=_clients,
        vip=st.sampled_from([VIP, DNS_VIP, EXTERNAL_VIP, OUTER_VIP, *POD_VIPS, VIP6, DNS_VIP6, *POD_VIPS6]),
        is_reply=st.booleans(),
        leaves=st.booleans(),
        payload=_sizes,
        ttl=_ttls,
        error=st.sampled_from(sorted(packets.ICMP_ERRORS)),
    ),
    st.builds(Step, kind=st.just("age"), seconds=st.sampled_from(AGES_S)),
    st.builds(Step, kind=st.just("stall")),
    st.builds(Step, kind=st.just("reset"), vip=st.sampled_from([VIP, VIP6])),
    st.builds(
        Step,
        kind=st.just("fragment"),
        client=_clients,
        vip=st.sampled_from(
            [DNS_VIP, DNS_VIP, VIP, DEAD_VIP, (VIP[0], 81), STRANGER, DNS_VIP6, DNS_VIP6, VIP6, DEAD_VIP6]
        ),
        is_reply=st.booleans(),
        flags=st.sampled_from(["S", "PA"]),
        payload=st.sampled_from([64, 200]),
        ttl=_ttls,
        cut=st.sampled_from([(0, 32), (0, 32), (32, 48), (32, 72), (48, 72), (0, 8), (8, 32), (24, 40), (40, 300)]),
        number=st.sampled_from([7, 7, 8]),
    ),
)


def frame_of(step: Step, twins: Twins) -> bytes:
    is_udp = step.kind == "udp" or step.vip in (DNS_VIP, POD_DNS_VIP, DNS_VIP6, POD_DNS_VIP6)
    protocol = Protocol.UDP if is_udp else Protocol.TCP
    family, client = (Protocol.IPV6, _SISTERS.get(step.client, CLIENT6)) if step.vip[0] & IPV6 else (0, step.client)
    source, endpoint = translated_of(twins, client, step.vip, protocol | family)
    ends = (endpoint, source) if step.is_reply else (client, step.vip)
    if step.kind == "error":
        # About a packet that we sent: to the client from the VIP, or to the endpoint from the client.
        ends = (step.vip, client) if step.is_reply else (source, endpoint)
    payload = bytes(step.payload)
    if protocol == Protocol.UDP:
        frame = bytes(packets.udp_packet(*ends, payload, ttl=step.ttl))
    else:
        frame = bytes(packets.tcp_packet(*ends, step.flags, payload, ttl=step.ttl))
    frame = packets.uncut(frame) if step.is_uncut and not family else frame
    if step.kind == "fragment":
        return packets.fragment_of(frame, *step.cut, number=step.number)
    kind = step.error if step.error in packets.ICMPV6_ERRORS or not family else "too-big"
    return packets.icmp_error(frame, kind, quoted=576, ttl=step.ttl) if step.kind == "error" else frame


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(_steps, min_size=1, max_size=16))
def test_any_sequence_of_packets(steps: list[Step], twins: Twins):
    twins.clear()
    for step in steps:
        if step.kind == "age":
            twins.age(step.seconds)
        elif step.kind == "stall":
            twins.is_stalled = not twins.is_stalled
        elif step.kind == "reset":
            twins.reset(step.vip)
        elif step.leaves:
            event("leaves " + twins.leave(frame_of(step, twins)).reason.name)
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


@pytest.mark.parametrize("is_stalled", [False, True], ids=["alive", "stalled"])
def test_c8_whoever_sends_on_a_connection_to_be_reset_is_reset(is_stalled: bool, twins: Twins):
    endpoint = connected(twins)
    twins.reset(VIP)
    twins.is_stalled = is_stalled
    for frame in (packets.data(), packets.data(endpoint, CLIENT), packets.ack(ttl=1), packets.syn(endpoint, CLIENT)):
        sent = twins.send(frame)
        assert sent.reason == Reason.ENDPOINT_REMOVED
        assert sent.frame == (frame if is_stalled else packets.reset_to(frame))
    reply = packets.data(endpoint, CLIENT)
    assert twins.leave(reply).frame == reply
    assert twins.send(packets.rst()).frame == packets.rst()
    assert twins.send(packets.syn()).reason == Reason.ADMITTED


@pytest.mark.parametrize("is_stalled", [False, True], ids=["alive", "stalled"])
def test_c8_the_same_of_ipv6(is_stalled: bool, twins: Twins):
    protocol = Protocol.TCP | Protocol.IPV6
    assert twins.send(packets.syn(CLIENT6, VIP6)).reason == Reason.ADMITTED
    endpoint = endpoint_of(twins, CLIENT6, VIP6, protocol)
    twins.reset(VIP6)
    twins.is_stalled = is_stalled
    for frame in (packets.data(CLIENT6, VIP6), packets.data(endpoint, CLIENT6), packets.syn(endpoint, CLIENT6)):
        sent = twins.send(frame)
        assert sent.reason == Reason.ENDPOINT_REMOVED
        assert (sent.frame == frame) == is_stalled
    twins.is_stalled = False
    assert twins.send(packets.syn(CLIENT6, VIP6)).reason == Reason.ADMITTED


@pytest.mark.parametrize("is_reply", [False, True], ids=["client", "endpoint"])
@pytest.mark.parametrize("state", [State.SYN_SENT, State.SYN_RECEIVED, State.ADOPTED, State.ESTABLISHED])
def test_a_syn_of_the_client_keeps_no_open_connection(state: State, is_reply: bool, twins: Twins):
    endpoint, key = connected(twins), Key(CLIENT, VIP, Protocol.TCP)
    twins.put(key, state)
    twins.age(50)
    before = flows_of(twins.tables)
    assert twins.send(packets.syn(endpoint, CLIENT) if is_reply else packets.syn()).reason == Reason.FORWARDED
    after, sent = flows_of(twins.tables), before[key].peer if is_reply else key
    assert after[sent].packets == before[sent].packets + 1
    is_kept = is_reply or state in (State.SYN_SENT, State.SYN_RECEIVED)
    assert (after[sent].last_seen != before[sent].last_seen) == is_kept


def test_either_direction_keeps_a_connection(twins: Twins):
    endpoint = connected(twins)
    for direction in (packets.data(endpoint, CLIENT), packets.data(), packets.data(endpoint, CLIENT)):
        twins.age(5000)
        assert twins.send(direction).reason == Reason.FORWARDED
    twins.age(8001)
    assert twins.send(packets.data(endpoint, CLIENT)).reason == Reason.NOT_OURS


def test_an_error_about_an_expired_connection_is_about_none(twins: Twins):
    connected(twins, RANDOM_VIP)
    error = packets.icmp_error(packets.data(RANDOM_VIP, CLIENT))
    assert twins.send(error).reason == Reason.FORWARDED
    twins.age(8001)
    assert twins.send(error).reason == Reason.ICMP_UNUSABLE


@pytest.mark.faults(75)
@pytest.mark.parametrize(("client", "vip"), [(CLIENT, VIP), (CLIENT, DNS_VIP), (CLIENT6, VIP6), (CLIENT6, DNS_VIP6)])
def test_N2_an_error_about_another_node_s_connection_is_userspace_s_and_dropped_without_it(client, vip, twins: Twins):
    error = packets.icmp_error((packets.udp if vip in (DNS_VIP, DNS_VIP6) else packets.data)(vip, client), "too-big")
    before = twins.counts()
    for _ in range(2):
        assert twins.send(error).reason == Reason.FORWARDED
    assert (twins.counts() - before)[Reason.ICMP_ERROR] == 2
    twins.is_stalled = True
    assert twins.send(error) == (Reason.NOT_SERVED, error, 0)
    assert not flows_of(twins.tables)


@pytest.mark.faults(75)
@pytest.mark.parametrize(("client", "vip"), [(CLIENT, VIP), (CLIENT6, VIP6)])
def test_T6_an_error_to_an_address_of_the_node_about_what_it_does_not_know_is_the_kernel_s(client, vip, twins: Twins):
    error = packets.icmp_error(packets.data(vip, client), "too-big")
    with twins.owning(vip):
        assert twins.send(error).reason == Reason.OTHER_ICMP
        assert twins.send_alone(error).reason == Reason.ICMP_UNUSABLE


@pytest.mark.faults(75)
@pytest.mark.parametrize(("client", "vip", "other"), [(CLIENT, VIP, OTHER_VIP), (CLIENT6, VIP6, PASSING_VIP6)])
def test_N2_an_error_to_another_vip_than_it_quotes_goes_no_further_than_xdp(client, vip, other, twins: Twins):
    error = bytearray(packets.icmp_error(packets.data(vip, client), "too-big"))
    error[53 if vip == VIP6 else 33] = other[0] & 0xFF
    assert twins.send(packets.resummed(bytes(error))).reason == Reason.NOT_SERVED


def test_a_frame_is_too_big_from_one_byte_on(twins: Twins):
    connected(twins, NARROW_VIP)
    for size, reason in ((60, Reason.FORWARDED), (61, Reason.TOO_BIG)):
        assert twins.send(packets.data(destination=NARROW_VIP, payload=bytes(size))).reason == reason


def test_T13_who_sends_too_long_a_packet_is_told_how_long_it_may_be(twins: Twins):
    connected(twins, NARROW_VIP)
    frame = packets.uncut(packets.data(destination=NARROW_VIP, payload=bytes(61)))
    assert twins.send(frame).frame == packets.unreachable_to(frame, 4, mtu=100)
    narrow_client = (NARROW_ENDPOINT[0], 40_002)
    assert twins.send(packets.syn(narrow_client)).reason == Reason.ADMITTED
    endpoint = endpoint_of(twins, narrow_client, VIP, Protocol.TCP)
    answer = packets.uncut(packets.data(endpoint, narrow_client, bytes(61)))
    assert twins.send(answer).frame == packets.unreachable_to(answer, 4, (OWN, 0), mtu=100)


@pytest.mark.faults(85)
def test_T7_T9_T10_answers_are_limited(twins: Twins):
    """To a client in a second, of refusals and of answers to echo requests."""
    for frame, reason in (
        (packets.syn(destination=DEAD_VIP), Reason.NO_ENDPOINT),
        (packets.echo_request(), Reason.ECHO_ANSWERED),
        (packets.syn(CLIENT6, DEAD_VIP6), Reason.NO_ENDPOINT),
    ):
        now = twins.now
        assert {twins.send(frame, compare=False, now=now).reason for _ in range(CLIENT_ANSWERS)} == {reason}
        assert twins.send(frame, now=now).reason == Reason.ANSWER_LIMITED
        assert twins.send(packets.rst(destination=DEAD_VIP), now=now).reason == Reason.STRAY_RST


@pytest.mark.faults(78, 85)
def test_T7_answers_are_limited_in_all_by_the_same_dice(twins: Twins):
    now, answered = twins.now, 0
    frames = [packets.syn((CLIENT[0] + number // 50, 4000), DEAD_VIP) for number in range(0, 5000, 50)]
    for frame in itertools.chain.from_iterable(itertools.repeat(frame, 50) for frame in frames):
        reason = twins.send(frame, compare=False, now=now).reason
        if reason == Reason.ANSWER_LIMITED:
            break
        answered += 1
    assert reason == Reason.ANSWER_LIMITED
    assert 0.4 * Limit.ANSWERS < answered < 2.4 * Limit.ANSWERS
    assert {twins.send(frame, compare=False, now=now).reason for frame in frames} == {Reason.ANSWER_LIMITED}


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


def test_F096_a_worker_that_keeps_a_frame_waiting_is_away_until_it_turns(twins: Twins):
    worker = twins.tables.workers[0]
    worker["heartbeat"], worker["waiting_since"] = 1, 0  # how long ago it turned makes no difference

    def reason() -> Reason:
        before = twins.counts()
        kernel.prog_test_run(twins._program, packets.syn(destination=OTHER_VIP))
        return Reason(int((twins.counts() - before).argmax()))

    assert reason() is Reason.NEW_FLOW
    first = int(worker["waiting_since"])
    assert first
    assert reason() is Reason.NEW_FLOW
    assert worker["waiting_since"] == first
    worker["waiting_since"] = late = first - int(twins.tables.control[0]["stall_jiffies"]) - 1
    assert reason() is Reason.STALLED_PASSED
    assert worker["waiting_since"] == late
    worker["waiting_since"] = 0
    assert reason() is Reason.NEW_FLOW
    worker["waiting_since"] = first + 1_000_000  # nobody says so, and who reads it may not wait for that time
    assert reason() is Reason.STALLED_PASSED
    worker["waiting_since"], worker["heartbeat"] = 0, 0xFFFFFFFF
    assert reason() is Reason.NEW_FLOW


def test_F105_a_stage_that_is_missing_costs_a_packet_and_no_connection(twins: Twins):
    assert twins.send(NAMED["syn"]).reason == Reason.ADMITTED
    twins.tables.workers[0]["heartbeat"] = 0  # XDP admits

    def reason(frame: bytes) -> Reason:
        before = twins.counts()
        kernel.prog_test_run(twins._program, frame)
        return Reason(int((twins.counts() - before).argmax()))

    try:
        for stage, missing, records in ((Stage.SEND, Reason.VANISHED, 4), (Stage.ADMIT, Reason.STALLED_DROPPED, 4)):
            assert kernel.map_delete(twins.shared.stages_fd, struct.pack("=I", stage))
            assert reason(packets.syn((CLIENT[0], 4000 + stage))) is missing
            assert len(flows_of(twins.tables)) == records
            assert reason(packets.ack()) is Reason.FORWARDED
    finally:
        os.close(stages.load(twins.shared, offloads=True))


# Not to be had from XDP by packets alone.
_NEVER_XDP = {
    Reason.NOT_OFFLOADED,  # another engine
    *(Reason.TABLE_FULL, Reason.REPLY_CLASH),  # tests/xdp/test_admission.py
    *(Reason.SOURCE_REFUSED, Reason.NO_SNAT_PORT, Reason.NO_SNAT_ADDRESS, Reason.NAMES_FULL),  # of admission there
    *(Reason.FRAGMENT_ALONE, Reason.FRAGMENT_OVERLAP, Reason.FRAGMENT_AGAIN, Reason.FRAGMENT_BROKEN),  # likewise
    *(Reason.ICMP_UNUSABLE, Reason.VANISHED),  # of what was punted
    Reason.SENT_ON,  # engine raw's
    *(Reason.LED, Reason.LEFT_TO_PACKETS),  # of sockets: tests/scenarios/test_led_clients.py
    *(Reason.NEXT_HOP_QUEUE, Reason.TX_FULL, Reason.PUNT_LOST),  # of rings
    # Nothing is announced here: tests/scenarios/test_announce.py.
    *(Reason.VIP_ARP, Reason.ARP_ANSWERED, Reason.ARP_LIMITED, Reason.VIP_CLAIMED),
    *(Reason.ECHO_ANSWERED, Reason.ANSWER_LIMITED, Reason.SOURCE_ROUTED),  # of what was punted
}


def test_every_reason_of_xdp_is_brought_about(twins: Twins):
    """What no test reaches is not compared."""
    before = twins.counts()
    narrow = endpoint_of(twins, CLIENT, NARROW_VIP, Protocol.TCP)
    to_another = packets.OTHER_MAC + packets.syn()[6:]
    others = (
        packets.syn(destination=NARROW_VIP),
        packets.ack(ttl=1),
        packets.syn(narrow),
        packets.syn()[:33],
        to_another,
    )
    everything = [*NAMED.values(), *others]
    for twins.is_stalled in (False, True):
        for frame in everything:
            twins.send(frame)
        twins.send(packets.data(destination=NARROW_VIP, payload=bytes(200)))
        twins.age(8001)
        for vip in (OTHER_VIP, DEAD_VIP, ELSEWHERE_VIP, LOST_VIP, FOREIGN_VIP):
            twins.send(packets.syn(destination=vip))
        for flags in ("R", "SF"):
            twins.send(bytes(packets.tcp_packet(OTHER_CLIENT, VIP, flags)))
        for vip in MID_STREAM_VIPS:
            twins.send(packets.data(destination=vip))
        twins.send(packets.syn(MARTIANS[0]))
        connected(twins, NARROW_VIP)
        twins.reset(NARROW_VIP)
        twins.send(packets.data(destination=NARROW_VIP))
        for frame in (packets.syn(destination=POD_VIP), packets.ack(destination=POD_VIP), packets.syn(DEAF_CLIENT)):
            twins.send(frame)
        twins.send(packets.syn_ack(endpoint_of(twins, DEAF_CLIENT, VIP, Protocol.TCP), DEAF_CLIENT))
        twins.let_ping(Ping.FORWARD)
        twins.send(packets.echo_request())
        endpoint = endpoint_of(twins, CLIENT, (VIP[0], 0), Protocol.ICMP)
        twins.send(packets.echo_reply(endpoint, CLIENT))
    seen = {Reason(int(reason)) for reason in np.flatnonzero(twins.counts() - before)}
    assert seen == set(Reason) - _NEVER_XDP


@pytest.mark.parametrize("is_stalled", [False, True], ids=["alive", "stalled"])
@pytest.mark.parametrize(
    ("protocol", "client", "vip"),
    [
        pytest.param(Protocol.TCP, CLIENT, POD_VIP, id="tcp"),
        pytest.param(Protocol.UDP, CLIENT, POD_DNS_VIP, id="udp"),
        pytest.param(Protocol.TCP | Protocol.IPV6, CLIENT6, POD_VIP6, id="tcp-6"),
        pytest.param(Protocol.UDP | Protocol.IPV6, CLIENT6, POD_DNS_VIP6, id="udp-6"),
    ],
)
def test_an_endpoint_on_this_node_is_reached_by_way_of_the_kernel(
    protocol: int, client: packets.Address, vip: packets.Address, is_stalled: bool, twins: Twins
):
    is_tcp = protocol & ~Protocol.IPV6 == Protocol.TCP
    packet = packets.tcp_packet if is_tcp else packets.udp_packet
    first, more = (("S",), ("A", bytes(1000))) if is_tcp else ((), (bytes(1000),))
    admitted = twins.send(bytes(packet(client, vip, *first)))
    endpoint = endpoint_of(twins, client, vip, protocol)
    assert admitted.reason == Reason.ADMITTED
    assert admitted.frame == bytes(packet(client, endpoint, *first))  # with the client's address, and its TTL
    twins.is_stalled = is_stalled
    known = twins.send(bytes(packet(client, vip, *more)))
    assert (known.reason, known.frame) == (Reason.TO_KERNEL, bytes(packet(client, endpoint, *more)))
    left = twins.leave(bytes(packet(endpoint, client, *more)))
    assert (left.reason, left.frame) == (Reason.FORWARDED, bytes(packet(vip, client, *more)))
    left = twins.leave(packets.icmp_error(bytes(packet(client, endpoint, *more)), source=endpoint))
    assert left.reason == Reason.FORWARDED
    assert left.frame == packets.icmp_error(bytes(packet(client, vip, *more)), source=vip)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP], ids=["tcp", "udp"])
def test_T5_an_endpoint_on_this_node_reaches_itself_from_the_vip(protocol: Protocol, family: int, twins: Twins):
    """What it sends comes back by a router; what it answers turns round where it would leave."""
    itself, vips = (POD_HAIRPIN, POD_VIPS) if family == 4 else (POD_HAIRPIN6, POD_VIPS6)
    packet, vip, port = (
        (packets.tcp_packet, vips[0], POD_ENDPOINT[1])
        if protocol == Protocol.TCP
        else (packets.udp_packet, vips[1], 5353)
    )
    more = ("A", bytes(999)) if protocol == Protocol.TCP else (bytes(999),)
    first = ("S",) if protocol == Protocol.TCP else ()
    admitted = twins.send(bytes(packet(itself, vip, *first)))
    source, endpoint = translated_of(twins, itself, vip, protocol | (0 if family == 4 else Protocol.IPV6))
    assert (source[0], endpoint) == (vip[0], (itself[0], port))
    assert SNAT_PORTS.first <= source[1] <= SNAT_PORTS.last
    assert admitted[:2] == (Reason.ADMITTED, bytes(packet(source, endpoint, *first)))
    assert twins.send(bytes(packet(itself, vip, *more)))[:2] == (
        Reason.TO_KERNEL,
        bytes(packet(source, endpoint, *more)),
    )
    answer, arrives = bytes(packet(endpoint, source, *more)), bytes(packet(vip, itself, *more))
    assert twins.leave(answer)[:2] == (Reason.TO_KERNEL, answer[6:12] + arrives[6:])
    assert twins.send(answer)[:2] == (Reason.TO_KERNEL, arrives)  # it has come back by the router, too
    error = packets.icmp_error(bytes(packet(source, endpoint, *more)))
    assert twins.leave(error)[:2] == (Reason.OTHER_ICMP, error)
    quoted = Ether(twins.send(error).frame).payload.payload.payload
    expected = packets.host(itself[0]), packets.host(vip[0]), itself[1]
    assert (quoted.src, quoted.dst, quoted.sport) == expected


ECHOES = [
    pytest.param(CLIENT, POD_VIP, POD_ENDPOINT, Protocol.ICMP, id="ipv4"),
    pytest.param(CLIENT6, POD_VIP6, POD_ENDPOINT6, Protocol.ICMPV6 | Protocol.IPV6, id="ipv6"),
]


@pytest.mark.parametrize(("client", "vip", "pod", "protocol"), ECHOES)
def test_N3_the_reply_of_an_endpoint_on_this_node_is_translated_as_it_leaves(client, vip, pod, protocol, twins: Twins):
    twins.let_ping(Ping.FORWARD)
    vip, pod = (vip[0], 0), (pod[0], 0)
    for payload, reason in ((b"", Reason.ADMITTED), (b"odd", Reason.TO_KERNEL), (bytes(range(200)), Reason.TO_KERNEL)):
        asked = twins.send(packets.echo_request(vip, client, payload))
        assert asked[:2] == (reason, packets.echo_request(pod, client, payload))
        left = twins.leave(packets.echo_reply(pod, client, payload))
        assert left[:2] == (Reason.FORWARDED, packets.echo_reply(vip, client, payload))
    error = packets.icmp_error(packets.echo_request(pod, client))
    assert twins.leave(error)[:2] == (Reason.OTHER_ICMP, error)
    stray = packets.echo_reply(pod, (client[0], 5))
    assert twins.leave(stray)[:2] == (Reason.OTHER_ICMP, stray)


DEAF = [
    pytest.param(DEAF_CLIENT, VIP, Protocol.ICMP, id="ipv4"),
    pytest.param(DEAF_CLIENT6, VIP6, Protocol.ICMPV6 | Protocol.IPV6, id="ipv6"),
]


@pytest.mark.parametrize(("client", "vip", "protocol"), DEAF)
@pytest.mark.parametrize("is_stalled", [False, True])
def test_N3_replies_to_whom_the_kernel_leads_do_not_come_to_userspace(client, vip, protocol, is_stalled, twins: Twins):
    """It could only hand them back and, in generic mode, would get them again."""
    twins.let_ping(Ping.FORWARD)
    vip = vip[0], 0
    assert twins.send(packets.echo_request(vip, client)).reason == Reason.ADMITTED
    _, endpoint = translated_of(twins, client, vip, protocol)
    twins.is_stalled = is_stalled
    reply = packets.echo_reply(endpoint, client)
    assert twins.send(reply)[:2] == (Reason.LEFT_TO_EGRESS, reply)
    assert twins.leave(reply)[:2] == (Reason.FORWARDED, packets.echo_reply(vip, client))
    error = packets.icmp_error(packets.echo_request(endpoint, client))
    assert twins.send(error)[:2] == (Reason.LEFT_TO_EGRESS, error)


@pytest.mark.parametrize(
    ("client", "vip", "protocol"),
    [(DEAF_CLIENT, OUTER_VIP, Protocol.TCP), (DEAF_CLIENT6, OUTER_VIP6, Protocol.TCP | Protocol.IPV6)],
    ids=["ipv4", "ipv6"],
)
@pytest.mark.parametrize("is_stalled", [False, True])
def test_T2_replies_to_a_masqueraded_client_behind_the_kernel_are_translated_first(
    client, vip, protocol, is_stalled, twins: Twins
):
    """They are to an address of the node: the kernel would keep them, and reset the endpoint."""
    assert twins.send(packets.syn(client, vip)).reason == Reason.ADMITTED
    source, endpoint = translated_of(twins, client, vip, protocol)
    assert source[0] in (OWN, OWN6)
    twins.is_stalled = is_stalled
    assert twins.send(packets.syn_ack(endpoint, source))[:2] == (Reason.TO_KERNEL, packets.syn_ack(vip, client))
    with twins.owning(vip):
        assert twins.send(packets.syn_ack(endpoint, source)).reason == Reason.NOT_FORWARDABLE


@pytest.mark.parametrize("is_stalled", [False, True])
def test_T9_icmpv6_of_nobody_to_a_vip_is_dropped_but_for_that_between_neighbours(is_stalled, twins: Twins):
    twins.is_stalled = is_stalled
    error = packets.icmp_error(packets.data((VIP6[0], 81), CLIENT6))
    assert twins.send(error).reason == Reason.NOT_SERVED
    assert twins.send(packets.echo_reply(CLIENT6, VIP6)).reason == Reason.NOT_SERVED
    nobodys, neighbours = Reason.NOT_SERVED, Reason.OTHER_ICMP
    for kind, reason in ((132, nobodys), (133, neighbours), (137, neighbours), (138, nobodys)):
        assert twins.send(error[:54] + bytes((kind,)) + error[55:]).reason == reason


@pytest.mark.parametrize("is_stalled", [False, True])
def test_N7_udp_of_an_ipv6_connection_without_a_checksum_is_dropped(is_stalled, twins: Twins):
    assert twins.send(packets.udp(CLIENT6, DNS_VIP6)).reason == Reason.ADMITTED
    endpoint = endpoint_of(twins, CLIENT6, DNS_VIP6, Protocol.UDP | Protocol.IPV6)
    twins.is_stalled = is_stalled
    reply = packets.udp(endpoint, CLIENT6)
    assert twins.send(reply[:60] + bytes(2) + reply[62:]).reason == Reason.UNSUMMED
    assert twins.send(reply).reason == Reason.FORWARDED


@pytest.mark.parametrize("is_ipv6", [False, True])
def test_T12_the_reply_whose_life_ends_here_is_the_kernel_s(is_ipv6: bool, twins: Twins):
    twins.let_ping(Ping.FORWARD)
    client, vip = (CLIENT6, VIP6) if is_ipv6 else (CLIENT, VIP)
    twins.send(packets.echo_request((vip[0], 0), client))
    protocol = Protocol.ICMPV6 | Protocol.IPV6 if is_ipv6 else Protocol.ICMP
    reply = packets.echo_reply(translated_of(twins, client, (vip[0], 0), protocol)[1], client, ttl=1)
    assert twins.send(reply)[:2] == (Reason.TTL_EXPIRED, reply)


@pytest.mark.parametrize(("client", "vip", "pod", "protocol"), ECHOES)
def test_N3_T5_an_endpoint_on_this_node_asks_itself(client, vip, pod, protocol, twins: Twins):
    twins.let_ping(Ping.FORWARD)
    other = (pod[0], 40_001)
    twins.send(packets.echo_request((vip[0], 0), other))
    for itself in (other, (pod[0], 7)):
        twins.send(packets.echo_request((vip[0], 0), itself))
        source, endpoint = translated_of(twins, itself, (vip[0], 0), protocol)
        assert (source[0], endpoint) == (vip[0], (pod[0], 0))
        reply, arrives = packets.echo_reply(endpoint, source), packets.echo_reply((vip[0], 0), itself)
        assert twins.leave(reply)[:2] == (Reason.TO_KERNEL, reply[6:12] + arrives[6:])


@pytest.mark.parametrize("is_ipv6", [False, True])
def test_N3_T13_who_asks_with_too_long_a_packet_is_told(is_ipv6: bool, twins: Twins):
    twins.let_ping(Ping.FORWARD)
    client, vip = (CLIENT6, NARROW_VIP6) if is_ipv6 else (CLIENT, NARROW_VIP)
    narrow = HOPS[(NARROW_ENDPOINT6 if is_ipv6 else NARROW_ENDPOINT)[0]].mtu
    flags = {} if is_ipv6 else {"flags": "DF"}
    for _ in range(2):  # the first one, and one of a flow
        asked = packets.echo_request((vip[0], 0), client, bytes(200), **flags)
        said = twins.send(asked)
        assert said[:2] == (Reason.TOO_BIG, packets.unreachable_to(asked, 4, mtu=narrow))
        twins.send(packets.echo_request((vip[0], 0), client))


@pytest.mark.parametrize("check", [0, 1, 0xFFFE, 0xFFFF])
def test_N7_an_answer_over_ipv6_leaves_with_the_checksum_that_it_had_by_as_much(check: int, twins: Twins):
    """A checksum that is to be finished by a device may look like none, and one that comes to zero is sent as ones."""
    assert twins.send(packets.udp(CLIENT6, POD_DNS_VIP6)).reason == Reason.ADMITTED
    endpoint = endpoint_of(twins, CLIENT6, POD_DNS_VIP6, Protocol.UDP | Protocol.IPV6)
    answer = packets.udp(endpoint, CLIENT6)
    assert twins.leave(answer[:60] + check.to_bytes(2) + answer[62:]).reason == Reason.FORWARDED
    payload = bytes(Ether(packets.udp_with_checksum(0xFFFF, POD_DNS_VIP6, CLIENT6))[UDP].payload)
    left = twins.leave(packets.udp(endpoint, CLIENT6, payload))
    assert left.frame[60:62] == b"\xff\xff"


@pytest.mark.parametrize(("client", "vip"), [(DEAF_CLIENT, VIP), (DEAF_CLIENT6, VIP6)], ids=["4", "6"])
def test_a_client_behind_a_driver_without_redirects_is_answered_by_way_of_the_kernel(
    client: packets.Address, vip: packets.Address, twins: Twins
):
    assert twins.send(packets.syn(client, vip)).reason == Reason.ADMITTED
    endpoint = endpoint_of(twins, client, vip, Protocol.TCP | (Protocol.IPV6 if vip == VIP6 else 0))
    answer = packets.syn_ack(endpoint, client)
    assert twins.send(answer) == (Reason.LEFT_TO_EGRESS, answer, 0)
    assert twins.leave(answer).reason == Reason.FORWARDED


def test_what_userspace_gives_back_turns_round(twins: Twins):
    frame = packets.syn()
    marked = struct.pack("=8xI", Limit.TO_KERNEL_MARK)  # struct __sk_buff
    assert kernel.prog_test_run(twins.egress_program, frame, context=marked)[:2] == (TC_ACT_REDIRECT, frame)


def test_ipv6_goes_the_way_of_ipv4_from_syn_to_fin(twins: Twins):
    """Compared with packets that scapy makes: whole, with checksums of its own."""
    protocol = Protocol.TCP | Protocol.IPV6
    frame = packets.syn(CLIENT6, VIP6)
    admitted = twins.send(frame)
    endpoint = endpoint_of(twins, CLIENT6, VIP6, protocol)
    macs, back = HOPS[endpoint[0]].macs, HOPS[CLIENT6[0]].macs
    assert admitted.reason == Reason.ADMITTED
    assert admitted.frame == packets.rewritten(frame, CLIENT6, endpoint, macs)
    for make, is_reply in (
        (packets.syn_ack, True),
        (packets.ack, False),
        (packets.data, False),
        (packets.data, True),
        (packets.fin, True),
        (packets.fin, False),
    ):
        frame = make(endpoint, CLIENT6) if is_reply else make(CLIENT6, VIP6)
        after = packets.rewritten(frame, VIP6, CLIENT6, back) if is_reply else None
        after = after or packets.rewritten(frame, CLIENT6, endpoint, macs)
        outcome = twins.send(frame)
        assert (outcome.reason, outcome.frame) == (Reason.FORWARDED, after)
    assert twins.reference.flows[Key(CLIENT6, VIP6, protocol)][0].state == State.TIME_WAIT
    assert twins.send(packets.syn(CLIENT6, VIP6)).reason == Reason.ADMITTED


def test_c13_no_ipv6_connection_begins_at_an_address_that_no_host_has(twins: Twins):
    """Nor is such an address given a name; and one that only looks a little like it is a host's."""
    for twins.is_stalled in (False, True):
        for source in MARTIANS6:
            for frame in (
                packets.syn(source, VIP6),
                packets.ack(source, VIP6),
                packets.syn(source, (VIP6[0], 81)),
                packets.udp(source, DNS_VIP6),
            ):
                assert twins.send(frame) == (Reason.MARTIAN_SOURCE, frame, 0)
            assert named(twins.tables, source[0]) == 0
            assert twins.send(packets.syn(source, packets.STRANGER6)).reason == Reason.NOT_OURS
    twins.is_stalled = False
    for host in ("::2", "::1:0:1", "1::", "1::1", "fe00::1", "::fffe:10.1.0.10", "::1:ffff:10.1.0.10"):
        assert twins.send(packets.syn(packets.address(f"[{host}]:5"), VIP6)).reason == Reason.NO_NEXT_HOP


@pytest.mark.parametrize("size", [0, 1, 5, 46, 1400])
def test_udp_over_ipv6_goes_there_and_back(size: int, twins: Twins):
    protocol = Protocol.UDP | Protocol.IPV6
    asked = packets.udp(CLIENT6, DNS_VIP6, bytes(n % 251 for n in range(size)))
    admitted = twins.send(asked)
    endpoint = endpoint_of(twins, CLIENT6, DNS_VIP6, protocol)
    assert admitted.frame == packets.rewritten(asked, CLIENT6, endpoint, HOPS[endpoint[0]].macs)
    answer = packets.udp(endpoint, CLIENT6, bytes(size))
    answered = twins.send(answer)
    assert answered.reason == Reason.FORWARDED
    assert answered.frame == packets.rewritten(answer, DNS_VIP6, CLIENT6, HOPS[CLIENT6[0]].macs)


_EXTENDED = {
    "hop-by-hop": lambda frame: packets.behind(packets.hop_options(), frame),
    "destination": lambda frame: packets.behind(packets.end_options(24), frame),
    "routing": lambda frame: packets.behind(packets.routing(), frame),
    "all": lambda frame: packets.behind(packets.hop_options(16), packets.behind(packets.routing(), frame)),
}


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP], ids=["tcp", "udp"])
@pytest.mark.parametrize("kind", _EXTENDED)
def test_N9_ipv6_packets_with_extension_headers_go_their_way(kind: str, protocol: Protocol, twins: Twins):
    """There by userspace and back by XDP, when userspace is away; as scapy makes them."""
    extended = _EXTENDED[kind]
    make, vip = (packets.tcp_frame, VIP6) if protocol == Protocol.TCP else (packets.udp_frame, DNS_VIP6)
    first = extended(make(CLIENT6, vip, "S"))
    admitted = twins.send(first)
    endpoint = endpoint_of(twins, CLIENT6, vip, protocol | Protocol.IPV6)
    there, back = HOPS[endpoint[0]].macs, HOPS[CLIENT6[0]].macs
    assert (admitted.reason, admitted.frame) == (
        Reason.ADMITTED,
        packets.rewritten(first, CLIENT6, endpoint, there),
    )
    for twins.is_stalled in (False, True):
        asked, answer = extended(make(CLIENT6, vip, "A")), extended(make(endpoint, CLIENT6, "A"))
        before = twins.counts()
        sent = [twins.send(frame) for frame in (asked, answer)]
        assert [outcome.reason for outcome in sent] == [Reason.FORWARDED] * 2
        assert sent[0].frame == packets.rewritten(asked, CLIENT6, endpoint, there)
        assert sent[1].frame == packets.rewritten(answer, vip, CLIENT6, back)
        assert (twins.counts() - before)[Reason.OPTIONS] == (0 if twins.is_stalled else 2)
        plain = make(CLIENT6, vip, "A")
        assert twins.send(plain).frame == packets.rewritten(plain, CLIENT6, endpoint, there)


@pytest.mark.faults(42)
def test_N9_an_ipv6_packet_is_routed_by_its_sender_nowhere(twins: Twins):
    """A routing header with hops to come, or of the type that is forbidden; of a flow, too. Nobody is told."""
    assert twins.send(packets.syn(CLIENT6, VIP6)).reason == Reason.ADMITTED
    endpoint = endpoint_of(twins, CLIENT6, VIP6, Protocol.TCP | Protocol.IPV6)
    for header in (packets.routing(1), packets.routing(0, kind=0), packets.routing(1, kind=0)):
        for frame in (
            packets.syn((CLIENT6[0], 5), VIP6),
            packets.ack(CLIENT6, VIP6),
            packets.syn_ack(endpoint, CLIENT6),
            packets.syn(CLIENT6, (VIP6[0], 81)),
            packets.of_protocol(50),
        ):
            routed = packets.behind(header.copy(), frame)
            assert twins.send(routed) == (Reason.SOURCE_ROUTED, routed, 0)
        stranger = packets.behind(header.copy(), packets.syn(CLIENT6, packets.STRANGER6))
        assert twins.send(stranger) == (Reason.NOT_OURS, stranger, 0)


def test_N9_ipv6_packets_with_extension_headers_of_neither_a_vip_nor_a_flow_pass(twins: Twins):
    """Also between a client and an endpoint, both of whom are known."""
    assert twins.send(packets.syn(CLIENT6, VIP6)).reason == Reason.ADMITTED
    endpoint = endpoint_of(twins, CLIENT6, VIP6, Protocol.TCP | Protocol.IPV6)
    for twins.is_stalled in (False, True):
        for extended in _EXTENDED.values():
            for ends in ((CLIENT6, endpoint), ((endpoint[0], 9), CLIENT6), (endpoint, (CLIENT6[0], 9))):
                frame = extended(packets.syn(*ends))
                assert twins.send(frame) == (Reason.NOT_OURS, frame, 0)
            frame = extended(packets.of_protocol(50, endpoint, CLIENT6))
            assert twins.send(frame) == (Reason.NOT_TCP_UDP, frame, 0)


_PROTOCOLS = (4, 41, 50, 51, 132, 134, 145, 255)


def test_N9_another_protocol_to_an_ipv6_vip_is_not_served(twins: Twins):
    for twins.is_stalled in (False, True):
        for number in (*_PROTOCOLS, 59):
            frame = packets.of_protocol(number)
            for asked in (frame, packets.behind(packets.hop_options(), frame)):
                assert twins.send(asked).reason == Reason.NOT_SERVED
            stranger = packets.of_protocol(number, destination=packets.STRANGER6)
            assert twins.send(stranger) == (Reason.NOT_TCP_UDP, stranger, 0)


@pytest.mark.parametrize("number", _PROTOCOLS)
def test_T9_who_speaks_a_protocol_that_no_ipv6_vip_knows_is_told_where_it_is_named(number: int, twins: Twins):
    frame = packets.of_protocol(number)
    extended = packets.behind(packets.hop_options(16), packets.behind(packets.end_options(), frame))
    for asked, place in ((frame, 6), (extended, 56)):
        said = Ether(twins.send(asked).frame)
        assert (said[IPv6].src, said[IPv6].dst) == (Ether(asked)[IPv6].dst, Ether(asked)[IPv6].src)
        assert (said[ICMPv6ParamProblem].code, said[ICMPv6ParamProblem].ptr) == (1, place)
        assert asked[14 + place] == number
        assert bytes(said[ICMPv6ParamProblem].payload) in asked
        assert bytes(said) == summed_anew(bytes(said))


def test_T9_nobody_is_told_that_nothing_or_too_much_came(twins: Twins):
    """No next header, more extension headers than are walked over, or one who is nobody."""
    many = packets.syn(CLIENT6, VIP6)
    for _ in range(5):
        many = packets.behind(packets.end_options(), many)
    for frame in (
        packets.of_protocol(59),
        packets.behind(packets.end_options(), packets.of_protocol(59)),
        many,
        NAMED["ipv6-extensions-of-136-bytes"],
        *(packets.of_protocol(132, source) for source in MARTIANS6),
    ):
        assert twins.send(frame) == (Reason.NOT_SERVED, frame, 0)


def test_N4_fragments_of_nobody_are_passed(twins: Twins):
    for twins.is_stalled in (False, True):
        for offset, has_more in ((0, True), (9, True), (9, False)):
            frame = packets.fragment6(packets.udp(CLIENT6, packets.STRANGER6, bytes(64)), offset, has_more)
            assert twins.send(frame) == (Reason.OTHER_FRAGMENT, frame, 0)


@pytest.mark.faults(40)
def test_N4_N7_the_rest_of_a_datagram_without_a_checksum_does_not_wait(twins: Twins):
    whole = packets.unsummed(packets.udp(CLIENT6, DNS_VIP6, bytes(192)))
    first, second = (packets.fragment_of(whole, *cut) for cut in ((0, 104), (104, 200)))
    assert twins.send(first) == (Reason.UNSUMMED, first, 0)
    assert twins.send(second) == (Reason.FRAGMENT_ALONE, second, 0)
    twins.is_stalled = True
    assert twins.send(first) == (Reason.STALLED_DROPPED, first, 0)
    stranger = packets.fragment_of(packets.unsummed(packets.udp(CLIENT6, packets.STRANGER6, bytes(192))), 0, 104)
    for twins.is_stalled in (False, True):
        assert twins.send(stranger) == (Reason.OTHER_FRAGMENT, stranger, 0)


@pytest.mark.faults(44)
def test_N4_the_only_fragment_of_an_ipv6_datagram_is_a_packet_like_others(twins: Twins):
    """RFC 6946: whatever else of that number is under way."""
    protocol = Protocol.UDP | Protocol.IPV6
    begun = packets.fragment_of(packets.udp(CLIENT6, DNS_VIP6, bytes(200)), 0, 64)
    assert twins.send(begun).reason == Reason.ADMITTED
    endpoint = endpoint_of(twins, CLIENT6, DNS_VIP6, protocol)
    for twins.is_stalled in (False, True):
        whole = packets.fragment6(packets.udp(CLIENT6, DNS_VIP6), has_more=False)
        there = packets.rewritten(whole, CLIENT6, endpoint, HOPS[endpoint[0]].macs)
        assert [twins.send(whole)[:2] for _ in range(2)] == [(Reason.FORWARDED, there)] * 2
        answer = packets.fragment6(packets.udp(endpoint, CLIENT6), has_more=False)
        back = packets.rewritten(answer, DNS_VIP6, CLIENT6, HOPS[CLIENT6[0]].macs)
        assert twins.send(answer)[:2] == (Reason.FORWARDED, back)


def test_N4_fragments_of_ipv6_clients_that_have_no_name_yet_are_told_apart(twins: Twins):
    """Two with one identification; and what follows the first fragment of an answer is punted, too."""
    clients = CLIENTS6[:2]
    pieces = {
        client: [packets.fragment_of(packets.udp(client, DNS_VIP6, bytes(192)), *cut) for cut in ((0, 104), (104, 200))]
        for client in clients
    }
    assert [twins.send(pieces[client][0]).reason for client in clients] == [Reason.ADMITTED] * 2
    assert [twins.send(pieces[client][1]).reason for client in clients] == [Reason.FORWARDED] * 2
    for client in clients:
        endpoint = endpoint_of(twins, client, DNS_VIP6, Protocol.UDP | Protocol.IPV6)
        answer = packets.udp(endpoint, client, bytes(192))
        for cut in ((0, 104), (104, 200)):
            assert twins.send(packets.fragment_of(answer, *cut)).reason == Reason.FORWARDED


@pytest.mark.parametrize("size", [0, 1, 47, 1400])
def test_N9_an_echo_request_behind_extension_headers_is_answered_without_them(size: int, twins: Twins):
    plain = packets.echo_request(VIP6, CLIENT6, bytes(size))
    expected = twins.send(plain)
    assert expected.reason == Reason.ECHO_ANSWERED
    for extended in _EXTENDED.values():
        assert twins.send(extended(plain)) == expected


@pytest.mark.parametrize("kind", _EXTENDED)
@pytest.mark.parametrize("place", ["behind", "about", "both"])
def test_N1_N9_icmpv6_errors_behind_and_about_extension_headers_are_translated(place: str, kind: str, twins: Twins):
    """As scapy makes them: about what the sender has sent, extension headers and all."""
    extended = _EXTENDED[kind]
    assert twins.send(packets.syn(CLIENT6, VIP6)).reason == Reason.ADMITTED
    endpoint = endpoint_of(twins, CLIENT6, VIP6, Protocol.TCP | Protocol.IPV6)

    def error(about: bytes, source: packets.Address, ttl: int) -> bytes:
        made = packets.icmp_error(extended(about) if place != "behind" else about, "too-big", source, ttl=ttl)
        return extended(made) if place != "about" else made

    for about, source, as_sent, seen, to in (
        (packets.data(VIP6, CLIENT6), ROUTER6, packets.data(endpoint, CLIENT6), ROUTER6, endpoint),
        (packets.data(CLIENT6, endpoint), ROUTER6, packets.data(CLIENT6, VIP6), VIP6, CLIENT6),
    ):
        sent = twins.send(error(about, source, 60))
        assert (sent.reason, sent.frame[12:]) == (Reason.FORWARDED, error(as_sent, seen, 59)[12:])
        assert sent.frame[:12] == HOPS[to[0]].macs


@pytest.mark.parametrize("payload", [b"", b"odd"])
def test_N9_who_is_refused_behind_extension_headers_is_told(payload: bytes, twins: Twins):
    for extended in _EXTENDED.values():
        asked = extended(packets.data(CLIENT6, (VIP6[0], 81), payload))
        outcome = twins.send(asked)
        said = Ether(outcome.frame)
        assert (outcome.reason, said[IPv6].nh, said[IPv6].plen) == (Reason.NOT_SERVED, Protocol.TCP, 20)
        assert (said[TCP].sport, said[TCP].dport, said[TCP].seq, said[TCP].flags) == (81, CLIENT6[1], 2000, "R")
        assert outcome.frame == summed_anew(outcome.frame)
        asked = extended(bytes(packets.tcp_packet(CLIENT6, (VIP6[0], 81), "S", payload)))
        said = Ether(twins.send(asked).frame)
        assert said[TCP].ack == 1000 + 1 + len(payload)
        asked = extended(packets.udp(CLIENT6, (VIP6[0], 82), payload))
        outcome = twins.send(asked)
        said = Ether(outcome.frame)
        assert (outcome.reason, said[ICMPv6DestUnreach].code) == (Reason.NOT_SERVED, 4)
        quoted = bytes(said[ICMPv6DestUnreach].payload)
        assert asked[14:].startswith(quoted)
        assert len(quoted) >= len(asked) - 14 - len(payload), "the sender looks for the ports of its socket"
        assert outcome.frame == summed_anew(outcome.frame)


def test_an_ipv6_endpoint_that_reaches_itself_and_a_client_outside_are_masqueraded(twins: Twins):
    for client, vip in (((ENDPOINT6[0], 40_001), OUTER_VIP6), (CLIENT6, OUTER_VIP6)):
        assert twins.send(packets.syn(client, vip)).reason == Reason.ADMITTED
        source, endpoint = translated_of(twins, client, vip, Protocol.TCP | Protocol.IPV6)
        assert source[0] == OWN6
        assert twins.send(packets.syn_ack(endpoint, source)).reason == Reason.FORWARDED
    assert twins.send(packets.syn((OTHER_CLIENT6[0], 5), OUTER_VIP6)).reason == Reason.ADMITTED
    inside = translated_of(twins, (OTHER_CLIENT6[0], 5), OUTER_VIP6, Protocol.TCP | Protocol.IPV6)[0]
    assert inside == (OTHER_CLIENT6[0], 5)


def test_an_ipv6_client_keeps_its_endpoint_where_the_service_says_so(twins: Twins):
    endpoints = set()
    for port in range(10):
        client = (CLIENT6[0], 50_000 + port)
        twins.send(packets.syn(client, STICKY_VIP6))
        endpoints.add(endpoint_of(twins, client, STICKY_VIP6, Protocol.TCP | Protocol.IPV6))
    assert len(endpoints) == 1


def test_who_sends_an_ipv6_packet_that_is_too_long_is_told_how_long_it_may_be(twins: Twins):
    assert twins.send(packets.syn(CLIENT6, NARROW_VIP6)).reason == Reason.ADMITTED
    for size, reason in ((70, Reason.FORWARDED), (71, Reason.TOO_BIG)):
        frame = packets.data(CLIENT6, NARROW_VIP6, bytes(size))
        outcome = twins.send(frame)
        assert outcome.reason == reason
    said = Ether(outcome.frame)
    assert (said[IPv6].src, said[IPv6].dst) == (Ether(frame)[IPv6].dst, Ether(frame)[IPv6].src)
    assert said[ICMPv6PacketTooBig].mtu == HOPS[NARROW_ENDPOINT6[0]].mtu
    assert outcome.frame == summed_anew(outcome.frame)


def test_an_icmpv6_error_that_is_too_long_is_answered_by_nobody(twins: Twins):
    assert twins.send(packets.syn(CLIENT6, NARROW_VIP6)).reason == Reason.ADMITTED
    error = packets.icmp_error(packets.data(NARROW_VIP6, CLIENT6, bytes(200)))
    assert twins.send(error) == (Reason.TOO_BIG, error, 0)


def test_c13_an_ipv6_vip_answers_no_echo_request_of_an_address_that_no_host_has(twins: Twins):
    for source in MARTIANS6:
        frame = packets.echo6(source=source)
        assert twins.send(frame) == (Reason.NOT_SERVED, frame, 0)


@pytest.mark.parametrize("flags", ["S", "A", "FA", "SF"])
def test_an_ipv6_port_that_nobody_serves_is_closed(flags: str, twins: Twins):
    asked = Ether(packets.tcp_with(flags, CLIENT6, (VIP6[0], 81)))
    outcome = twins.send(bytes(asked))
    said = Ether(outcome.frame)
    length = flags.count("S") + flags.count("F")
    marks = (asked[TCP].ack, 0, "R") if "A" in flags else (0, asked[TCP].seq + length, "RA")
    assert outcome.reason == Reason.NOT_SERVED
    assert (said[TCP].seq, said[TCP].ack, said[TCP].flags) == marks
    assert (said[IPv6].src, said[TCP].sport, said[TCP].dport) == (asked[IPv6].dst, 81, asked[TCP].sport)
    assert outcome.frame == summed_anew(outcome.frame)


def test_an_ipv6_datagram_to_a_port_that_nobody_serves_is_refused(twins: Twins):
    for payload in (b"", b"odd", bytes(range(200)), bytes(1400)):
        asked = packets.udp(CLIENT6, (VIP6[0], 82), payload)
        outcome = twins.send(asked)
        said = Ether(outcome.frame)
        assert (outcome.reason, said[ICMPv6DestUnreach].code) == (Reason.NOT_SERVED, 4)
        assert bytes(said[ICMPv6DestUnreach].payload) in asked
        assert len(said[ICMPv6DestUnreach].payload) >= 48
        assert len(outcome.frame) <= 14 + 1280
        assert outcome.frame == summed_anew(outcome.frame)


def test_an_ipv6_vip_answers_echo_requests(twins: Twins):
    outcome = twins.send(NAMED["ipv6-echo"])
    asked, said = Ether(NAMED["ipv6-echo"]), Ether(outcome.frame)
    assert outcome.reason == Reason.ECHO_ANSWERED
    assert (said[IPv6].src, said[IPv6].dst) == (asked[IPv6].dst, asked[IPv6].src)
    assert (said[ICMPv6EchoReply].id, said[ICMPv6EchoReply].data) == (77, b"ping")
    assert outcome.frame == summed_anew(outcome.frame)


def summed_anew(frame: bytes) -> bytes:
    """Return an IPv6 frame with a transport checksum that scapy has computed."""
    packet = Ether(frame)
    layer = packet[IPv6].payload
    if layer.name == "TCP":
        del layer.chksum
    else:
        del layer.cksum
    return bytes(packet)


@pytest.mark.parametrize("kind", packets.ICMPV6_ERRORS)
def test_icmpv6_errors_are_about_the_packet_as_its_sender_knows_it(kind: str, twins: Twins):
    """Of both directions, and with checksums that scapy has computed anew."""
    twins.send(packets.syn(CLIENT6, VIP6))
    endpoint = endpoint_of(twins, CLIENT6, VIP6, Protocol.TCP | Protocol.IPV6)

    def translated(error: bytes, about: bytes, macs: bytes, source: packets.Address) -> bytes:
        whole = packets.icmp_error(about, kind, source, ttl=59)
        assert twins.send(error).frame == macs + whole[12:]
        return whole

    to_client, to_endpoint = packets.data(VIP6, CLIENT6), packets.data(CLIENT6, endpoint)
    # A router on the way to the client complains to the VIP; one on the way to the endpoint, to the client.
    translated(
        packets.icmp_error(to_client, kind),
        packets.data(endpoint, CLIENT6),
        HOPS[endpoint[0]].macs,
        packets.ROUTER6,
    )
    translated(packets.icmp_error(to_endpoint, kind), packets.data(CLIENT6, VIP6), HOPS[CLIENT6[0]].macs, VIP6)
