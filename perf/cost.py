"""What the XDP program costs per packet, driver left out: `python -m perf.cost [--flows N..] [--trials N]`.

Net cost = that of the front program (perf/front.py) with turnout's, less that of the front with a bare program; the
trials of the two are interleaved.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from conntrack import compiled
from conntrack.table import FlowTable
from dataplane.vlans import words_of
from lb import maglev
from lb.rows import ServiceRow
from lb.table import ServiceTable
from perf import front
from perf.bed import Cpus
from perf.front import CLIENTS, ENDPOINT, ENDPOINT_PORT, PACKETS, PREFIX6, VIP, VIP_PORT, VLAN, Front, Kind
from perf.traffic import PINS, Order, Traffic
from xdp import maps, removing, stages
from xdp.byteorder import swap16, swapped16
from xdp.clock import JiffyClock
from xdp.jit import compiled as jit
from xdp.names import Names
from xdp.routes import RouteMap
from xdp.schema import HopState, Protocol, Reason, State
from xdp.tables import Capacity, Tables

_WIRE_VIP_PORT, _WIRE_ENDPOINT_PORT = swap16(VIP_PORT), swap16(ENDPOINT_PORT)
_CAPACITY = Capacity().connections  # of a table that nobody has asked to be larger
_ADMISSIONS = 500_000
_DOUBTFUL = 100_000  # one new flow in so many, at most, meets two tags like its own: XDP leaves it (admit.c)

# What is measured, beside admission.
KINDS = (
    Kind(),
    Kind(is_reply=True),
    Kind(Protocol.TCP),
    Kind(Protocol.UDP | Protocol.IPV6),
    Kind(vlan_tags=1),
    Kind(vlan_tags=2),
)


class Cost(NamedTuple):
    """Net nanoseconds per packet: median and range over the trials, beside the bare program's own (front included)."""

    flows: int
    protocol: str
    direction: str
    net_ns: float
    least_ns: float
    most_ns: float
    bare_ns: float
    nets_ns: tuple[float, ...]  # of all trials


@jit
def _fill(tables: Any, hosts: Any, flows: int, protocol: Any, state: Any, now: Any) -> int:
    """Insert flow 0 to `flows` as perf/bpf/restore.c sends them; return how many found room.

    `hosts` (u64) are the VIP, the endpoint and the clients, as they lie in flows.
    """
    for flow in range(flows):
        client = hosts[2 + flow // 32768]
        port = np.uint32(swapped16(1024 + flow % 32768))
        addrs = hosts[0] << np.uint64(32) | client
        new_addrs = hosts[1] << np.uint64(32) | client
        ports = np.uint32(_WIRE_VIP_PORT) << np.uint32(16) | port
        new_ports = np.uint32(_WIRE_ENDPOINT_PORT) << np.uint32(16) | port
        slot = compiled.insert(
            tables, addrs, ports, new_addrs, new_ports, protocol, state, np.uint32(1), np.uint32(1), now
        )
        if slot < 0:
            return flow
    return flows


@contextmanager
def _filled_tables(folder: Path, flows: int, protocol: int, *, capacity: int) -> Iterator[maps.SharedMaps]:
    removing.maps(folder)
    room = Capacity(max(flows, capacity), 64, 64, 1024, 64, 64, os.sysconf("SC_NPROCESSORS_CONF"))
    try:
        with maps.create(folder, room) as shared:
            tables = shared.tables
            clock = JiffyClock()
            table = FlowTable(tables, clock)
            table.create()
            tables.control[0]["vlans"] = words_of([(VLAN, VLAN)])
            hop = tables.next_hops[1]
            hop["ifindex"], hop["mtu"], hop["state"] = 1, 1500, HopState.FORWARD
            state = State.UDP_REPLIED if protocol & ~Protocol.IPV6 == Protocol.UDP else State.ESTABLISHED
            arguments = (np.uint8(protocol), np.uint8(state), np.uint32(clock.now()))
            hosts = [VIP, ENDPOINT, *range(CLIENTS, CLIENTS + flows // int(Traffic.SOURCE_PORTS) + 1)]
            if protocol & Protocol.IPV6:
                hosts = [Names(tables).pin(IPv6Address(PREFIX6 << 96 | host)) for host in hosts]
            wire = np.array(hosts, np.uint32).byteswap().astype(np.uint64)
            assert _fill(tables, wire, flows, *arguments) == flows
            yield shared
    finally:
        removing.maps(folder)


class Bench(NamedTuple):
    """The front program, turnout's, and its tables."""

    front: Front
    ours: int
    shared: maps.SharedMaps


@contextmanager
def bench(flows: int, kind: Kind, *, cpus: int = 1, capacity: int = _CAPACITY, filled: bool = True) -> Iterator[Bench]:
    """Load the programs over a table with so many flows, `filled` or still empty; see front.loaded."""
    folder = PINS / f"perf-cost-{os.getpid()}"
    tables = _filled_tables(folder, flows if filled else 0, kind.protocol, capacity=capacity)
    with tables as shared, front.loaded(flows, kind, cpus=cpus) as made:
        ours = stages.load(shared, offloads=True)
        try:
            yield Bench(made, ours, shared)
        finally:
            os.close(ours)


def need_counted(tables: Tables, reason: Reason, expected: int, *, spared: int = 0) -> None:
    """Raise AssertionError unless turnout's program has counted so many packets for this reason, or `spared` fewer."""
    counted = int(tables.xdp_counters["packets"][:, reason].sum())
    if not expected - spared <= counted <= expected:
        raise AssertionError(f"{counted} of {expected} packets were {reason.name}: this measures something else")


def _cost(flows: int, kind: Kind, direction: str, pairs: Sequence[tuple[float, float]]) -> Cost:
    nets = tuple(mine - base for base, mine in pairs)
    bare = median(base for base, _ in pairs)
    return Cost(flows, kind.name, direction, median(nets), min(nets), max(nets), bare, nets)


def measure(flows: int, kind: Kind, *, trials: int = 10, capacity: int = _CAPACITY) -> Cost:
    """Return the net cost of turnout's program with so many flows in a table for `capacity`, at least for them."""
    with bench(flows, kind, capacity=capacity) as made:
        pairs = [made.front.pair_ns(made.ours) for _ in range(trials)]
        need_counted(made.shared.tables, Reason.FORWARDED, trials * PACKETS)
    return _cost(flows, kind, "reply" if kind.is_reply else "original", pairs)


def measure_admission(trials: int = 10) -> Cost:
    """Return the net cost of a new UDP flow that XDP admits by itself, both directions inserted, nobody to punt to.

    Each trial begins with an empty table, whose pages have been touched before, and admits _ADMISSIONS flows.
    """
    pairs = []
    # Each CPU counts flows for itself: on another one they would begin again.
    one_cpu = Cpus.pinned(Cpus().generator)
    with bench(_ADMISSIONS, Kind(), capacity=2 * _ADMISSIONS, filled=False) as made, one_cpu:
        tables, first = made.shared.tables, made.front
        RouteMap(made.shared.routes_fd).replace({(0, 0): 1})
        row = ServiceRow(((IPv4Address(VIP), VIP_PORT, int(Protocol.UDP)),), ((IPv4Address(ENDPOINT), ENDPOINT_PORT),))
        ServiceTable(tables, maglev.DEFAULT_SEED, lambda _: 1).apply([row])
        for _ in range(trials):
            first.orders[:, Order.NEXT] = 0
            first.call(first.bare)
            base = first.run_ns(_ADMISSIONS)
            tables.tags[:] = 0
            tables.published[:] = 0
            first.orders[:, Order.NEXT] = 0
            first.call(made.ours)
            pairs.append((base, first.run_ns(_ADMISSIONS)))
        admissions = trials * _ADMISSIONS
        need_counted(tables, Reason.ADMITTED, admissions, spared=admissions // _DOUBTFUL)
    return _cost(0, Kind(), "admitted", pairs)


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m perf.cost", description="net cost of the XDP program per packet")
    parser.add_argument("--flows", type=int, nargs="+", default=[1, 1000, 16_384, 100_000, 500_000, 1_000_000])
    parser.add_argument("--trials", type=int, default=10)
    arguments = parser.parse_args()
    print(f"{'flows':>9}  {'packets':<23}{'net ns':>8}  {'range':>14}  {'bare ns':>8}")
    for flows in arguments.flows:
        for kind in KINDS:
            cost = measure(flows, kind, trials=arguments.trials)
            spread = f"{cost.least_ns:.0f} to {cost.most_ns:.0f}"
            what = f"{cost.protocol} {cost.direction}"
            print(f"{flows:>9,}  {what:<23}{cost.net_ns:>8.1f}  {spread:>14}  {cost.bare_ns:>8.1f}", flush=True)
    cost = measure_admission(arguments.trials)
    spread = f"{cost.least_ns:.0f} to {cost.most_ns:.0f}"
    print(f"{'new':>9}  {'UDP admitted':<23}{cost.net_ns:>8.1f}  {spread:>14}  {cost.bare_ns:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
