"""What the XDP program costs per packet, driver left out: `python -m perf.cost [--flows N..] [--trials N]`.

A front program makes the frame the next flow's again and tail-calls the program (perf/bpf/restore.c): running one
repeatedly (BPF_PROG_TEST_RUN) would feed it the packet that it has just rewritten. Net cost = that of the front with
turnout's program, less that of the front with a bare program that exchanges MAC addresses; the trials of the two are
interleaved. Flows are visited in an order that is no neighbourhood in the table.
"""

from __future__ import annotations

import argparse
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from conntrack import compiled
from conntrack.table import FlowTable
from perf.traffic import PINS, PROGRAMS, Order, Traffic, Words
from xdp import kernel, loader, maps
from xdp.byteorder import swap16, swap32, swapped16, swapped32
from xdp.clock import JiffyClock
from xdp.jit import compiled as jit
from xdp.schema import HopState, Protocol, State
from xdp.tables import Capacity, Tables

_CLIENTS, _VIP, _ENDPOINT = (int(IPv4Address(text)) for text in ("10.1.0.0", "10.96.0.1", "10.2.0.2"))
_VIP_PORT, _ENDPOINT_PORT = 80, 8080
_WIRE_VIP, _WIRE_ENDPOINT = swap32(_VIP), swap32(_ENDPOINT)
_WIRE_VIP_PORT, _WIRE_ENDPOINT_PORT = swap16(_VIP_PORT), swap16(_ENDPOINT_PORT)
_STRIDE = 7919  # a prime that divides no number of flows here
_PACKETS = 1_000_000
_PROG_ARRAY = 3
_FRAME = bytes(Traffic.FRAME_BYTES)


class Cost(NamedTuple):
    """Net nanoseconds per packet: median and range over the trials, beside the bare program's own (front included)."""

    flows: int
    protocol: str
    direction: str
    net_ns: float
    least_ns: float
    most_ns: float
    bare_ns: float


@jit
def _fill(tables: Any, flows: int, protocol: Any, state: Any, now: Any) -> int:
    """Insert flow 0 to `flows` as perf/bpf/restore.c sends them; return how many found room."""
    for flow in range(flows):
        client = np.uint64(swapped32(_CLIENTS + flow // 32768))
        port = np.uint32(swapped16(1024 + flow % 32768))
        addrs = np.uint64(_WIRE_VIP) << np.uint64(32) | client
        new_addrs = np.uint64(_WIRE_ENDPOINT) << np.uint64(32) | client
        ports = np.uint32(_WIRE_VIP_PORT) << np.uint32(16) | port
        new_ports = np.uint32(_WIRE_ENDPOINT_PORT) << np.uint32(16) | port
        slot = compiled.insert(
            tables, addrs, ports, new_addrs, new_ports, protocol, state, np.uint32(1), np.uint32(1), now
        )
        if slot < 0:
            return flow
    return flows


@contextmanager
def _filled_tables(folder: Path, flows: int, protocol: Protocol) -> Iterator[Tables]:
    maps.remove(folder)
    capacity = Capacity(max(flows, 1000), 64, 64, 1024, 64, 64, os.sysconf("SC_NPROCESSORS_CONF"))
    try:
        with maps.create(folder, capacity) as shared:
            tables = shared.tables
            clock = JiffyClock()
            FlowTable(tables, clock).create()
            hop = tables.next_hops[1]
            hop["ifindex"], hop["mtu"], hop["state"] = 1, 1500, HopState.FORWARD
            state = State.UDP_REPLIED if protocol is Protocol.UDP else State.ESTABLISHED
            arguments = (np.uint8(protocol), np.uint8(state), np.uint32(clock.now()))
            assert _fill(tables, flows, *arguments) == flows
            yield tables
    finally:
        maps.remove(folder)


def measure(flows: int, protocol: Protocol = Protocol.UDP, *, reply: bool = False, trials: int = 10) -> Cost:
    """Return the net cost of turnout's program with so many flows in the table."""
    folder, own = PINS / "perf-cost", PINS / "perf-cost-front"
    own.mkdir(parents=True, exist_ok=True)
    with _filled_tables(folder, flows, protocol) as tables:
        words = Words(own, "orders", 1, len(Order))
        measured = kernel.map_create("measured", 4, 4, 2, 0, _PROG_ARRAY)
        kernel.pin(measured, own / "measured")
        try:
            order = words.rows[0]
            order[Order.FLOWS] = flows
            order[Order.SRC_ADDR] = _CLIENTS
            order[Order.DST_ADDR], order[Order.DST_PORT] = (_ENDPOINT, _ENDPOINT_PORT) if reply else (_VIP, _VIP_PORT)
            defines = {"FLOWS": flows, "STRIDE": _STRIDE, "PROTOCOL": int(protocol), "REPLY": int(reply)}
            front = loader.load(own, PROGRAMS / "restore.c", "restore", defines)
            bare = loader.load(own, PROGRAMS / "bare.c", "bare")
            ours = loader.load(folder, PROGRAMS.parents[1] / "xdp" / "bpf" / "lb.c", "xdp_lb", {"OFFLOAD": 1})
            pairs = [(_run(front, measured, bare), _run(front, measured, ours)) for _ in range(trials)]
            expected = trials * _PACKETS
            forwarded = int(tables.xdp_counters["packets"][:, 0].sum())
            if forwarded != expected:
                raise AssertionError(f"{forwarded} of {expected} packets were forwarded: this measures something else")
        finally:
            os.close(measured)
            words.close()
            maps.remove(own)
    nets = [mine - base for base, mine in pairs]
    return Cost(
        flows, protocol.name, "reply" if reply else "original", median(nets), min(nets), max(nets),
        median(base for base, _ in pairs),
    )  # fmt: skip


def _run(front: int, measured: int, program: int) -> float:
    kernel.map_update(measured, struct.pack("=I", 0), struct.pack("=I", program))
    return kernel.prog_test_run(front, _FRAME, repeat=_PACKETS)[2]


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m perf.cost", description="net cost of the XDP program per packet")
    parser.add_argument("--flows", type=int, nargs="+", default=[1, 1000, 16_384, 100_000, 500_000, 1_000_000])
    parser.add_argument("--trials", type=int, default=10)
    arguments = parser.parse_args()
    print(f"{'flows':>9}  {'packets':<14}{'net ns':>8}  {'range':>14}  {'bare ns':>8}")
    for flows in arguments.flows:
        for protocol, reply in ((Protocol.UDP, False), (Protocol.UDP, True), (Protocol.TCP, False)):
            cost = measure(flows, protocol, reply=reply, trials=arguments.trials)
            spread = f"{cost.least_ns:.0f} to {cost.most_ns:.0f}"
            kind = f"{cost.protocol} {cost.direction}"
            print(f"{flows:>9,}  {kind:<14}{cost.net_ns:>8.1f}  {spread:>14}  {cost.bare_ns:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
