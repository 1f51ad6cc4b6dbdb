"""What the userspace pipeline costs per packet, sockets left out: `python -m perf.pipeline [--flows N..]`.

Frames of 60 bytes in plain memory are taken through `dataplane.pipeline` in bursts as a worker takes them, tables in
plain memory too. First every flow's first packet: parse, frontend, Maglev, insertion of both directions, rewrite. Then,
after a sweep as a daemon makes them, packets of known flows, in an order that is no neighbourhood in the table. A frame
is restored before it is handled: part of the figure.
"""

from __future__ import annotations

import argparse
import struct
import time
from ipaddress import IPv4Address
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from conntrack.table import FlowTable
from dataplane import context, hops_compiled, pipeline, rings
from dataplane.wire import checksum_add
from lb import maglev
from lb.rows import ServiceRow
from lb.table import ServiceTable
from xdp.byteorder import swapped16, swapped32
from xdp.clock import ManualClock
from xdp.jit import compiled, inlined
from xdp.schema import HopState, Limit, Protocol, Reason
from xdp.tables import Capacity, Tables
from xdp.unaligned import load16, load64, store16, store32, store64

_FRAME_BYTES = 60
_CHUNK_BYTES = 2048
_BURST = int(Limit.BURST)
_STRIDE = 7919
_VIP, _VIP_PORT = IPv4Address("10.96.0.1"), 80
_ENDPOINTS = tuple((IPv4Address("10.2.0.2") + number, 8080) for number in range(3))
_CLIENTS = int(IPv4Address("10.1.0.0"))


class Cost(NamedTuple):
    """Nanoseconds of CPU time per packet: of first packets, and the median of packets of known flows."""

    flows: int
    new_ns: float
    known_ns: float


@inlined
def _restore(frames: Any, start: Any, template: Any, flow: int) -> None:
    """Make the frame at `start` the flow's, as its client sent it."""
    for word in range(7):
        store64(frames, start + word * 8, load64(template, word * 8))
    store32(frames, start + 26, swapped32(_CLIENTS + flow // 32768))
    store16(frames, start + 24, checksum_add(load16(template, 24), swapped16(flow // 32768)))
    store32(frames, start + 34, np.uint32(0x50000000 | swapped16(1024 + flow % 32768)))  # to port 80


@compiled
def _send(node: Any, frames: Any, burst: Any, template: Any, flows: int, packets: int, expected: int, now: Any) -> int:
    """Handle `packets` packets; return how many did not end for the `expected` reason."""
    strange = 0
    flow = 0
    for first in range(0, packets, _BURST):
        count = min(_BURST, packets - first)
        for place in range(count):
            _restore(frames, np.int64(burst[place].addr), template, flow)
            flow += _STRIDE
            if flow >= flows:
                flow %= flows
        pipeline.look_ahead(node.tables, frames, burst, count)
        for place in range(count):
            reason, _ = pipeline.handle(node, frames, np.int64(burst[place].addr), _FRAME_BYTES, now)
            strange += reason != expected
    return strange


def _node(flows: int) -> context.Node:
    tables = Tables.in_memory(Capacity(max(flows, 1000), 64, 64, 65536, 64, 64, 1))
    for column in (tables.tags, tables.flows.view(np.uint8)):
        column[:] = 1  # touch every page now: the first touch is the kernel's cost
        column[:] = 0
    FlowTable(tables, ManualClock()).create()
    hop = tables.next_hops[1]
    hop["ifindex"], hop["mtu"], hop["state"] = 1, 1500, HopState.FORWARD
    services = ServiceTable(tables, maglev.DEFAULT_SEED, lambda _: 1)
    services.apply([ServiceRow(((_VIP, _VIP_PORT, int(Protocol.UDP)),), _ENDPOINTS)])
    hops = hops_compiled.new_hops(tables, 16)
    starts = np.zeros(hops_compiled.LENGTHS + 1, np.uint32)
    starts[-1] = 1  # one route, the default, through next hop 1
    hops_compiled.publish_routes(hops, starts, np.zeros(1, np.uint32), np.ones(1, np.uint32))
    return context.new_node(tables, hops)


def _template() -> npt.NDArray[np.uint8]:
    ip = bytes([0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 17, 0, 0]) + IPv4Address(_CLIENTS).packed + _VIP.packed
    total = sum(struct.unpack("!10H", ip))
    check = ~(total + (total >> 16)) & 0xFFFF
    header = bytes(12) + b"\x08\x00" + ip[:10] + check.to_bytes(2, "big") + ip[12:]
    udp = bytes(4) + (26).to_bytes(2, "big") + b"\x43\x21"
    return np.frombuffer((header + udp).ljust(64, b"\0"), np.uint8).copy()


def _burst() -> npt.NDArray[np.void]:
    burst = np.zeros(_BURST, rings.DESCRIPTOR)
    burst["addr"], burst["len"] = np.arange(_BURST) * _CHUNK_BYTES, _FRAME_BYTES
    return burst


def measure(flows: int, packets: int = 2_000_000, trials: int = 5) -> Cost:
    """Return the cost with so many flows in the table."""
    node, template = _node(flows), _template()
    frames, burst = np.zeros(_BURST * _CHUNK_BYTES, np.uint8), _burst()
    now = np.uint32(0)
    _send(node, frames, burst, template, flows, 0, int(Reason.ADMITTED), now)  # compiles, and learns what a node is
    began = time.thread_time_ns()
    strange = _send(node, frames, burst, template, flows, flows, int(Reason.ADMITTED), now)
    new_ns = (time.thread_time_ns() - began) / flows
    known = []
    for _ in range(trials):
        began = time.thread_time_ns()
        strange += _send(node, frames, burst, template, flows, packets, int(Reason.FORWARDED), now)
        known.append((time.thread_time_ns() - began) / packets)
    if strange:
        raise AssertionError(f"{strange} packets were not handled as expected: this measures something else")
    return Cost(flows, new_ns, float(np.median(known)))


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m perf.pipeline", description="cost of the pipeline in memory")
    parser.add_argument("--flows", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    print(f"{'flows':>9}  {'first packet ns':>15}  {'known flow ns':>13}")
    for flows in parser.parse_args().flows:
        cost = measure(flows)
        print(f"{flows:>9,}  {cost.new_ns:>15.0f}  {cost.known_ns:>13.0f}", flush=True)


if __name__ == "__main__":
    main()
