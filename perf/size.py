"""Whether the flow table holds what it says: `python -m perf.size [--connections N..]`.

A table in plain memory is filled to the capacity that was asked for, both directions of each connection; then they are
looked up, in an order that is no neighbourhood in the table; then one pass of the sweep looks at every record. At last
it is filled further, to the first insertion that finds no room.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any, NamedTuple

import numpy as np

from conntrack import compiled as flows
from conntrack.table import FlowTable, seconds_of_a_slice
from xdp.byteorder import swapped16, swapped32
from xdp.clock import ManualClock
from xdp.jit import compiled
from xdp.schema import Protocol, State
from xdp.tables import Capacity, Tables

_STRIDE = 7919
_VIP, _PORT, _ENDPOINTS = 0x0A600001, 80, 1000
_CLIENTS, _ENDPOINT, _ENDPOINT_PORT = 0x0A010000, 0x0A800001, 8080
_PORTS = 32_768  # of a client


class Size(NamedTuple):
    """What a table of this many connections takes and does. Times are of one thread's CPU."""

    connections: int
    bytes_each: float  # tags and records of both directions, room included
    refused: int  # insertions below the capacity that found no room: 0
    insert_ns: float
    find_ns: float
    sweep_percent: float  # of a CPU, at the daemon's pace
    most: int  # connections at the first refusal


@compiled
def _addrs(number: int, endpoint: bool) -> Any:
    """Return source and destination of a connection's first packet, as sent or as translated."""
    source = np.uint64(swapped32(_CLIENTS + number // _PORTS))
    other = _ENDPOINT + number % _ENDPOINTS if endpoint else _VIP
    return source | np.uint64(swapped32(other)) << np.uint64(32)


@compiled
def _ports(number: int, port: int) -> Any:
    return np.uint32(swapped16(1024 + number % _PORTS)) | np.uint32(swapped16(port)) << np.uint32(16)


@compiled
def _fill(tables: Any, first: int, end: int, protocol: Any, state: Any, now: Any, to_refusal: bool) -> Any:
    """Insert connections; return (how many were refused, the number of the last one)."""
    refused, number = 0, first
    for number in range(first, end):
        slot = flows.insert(
            tables, _addrs(number, False), _ports(number, _PORT), _addrs(number, True),
            _ports(number, _ENDPOINT_PORT), protocol, state, np.uint32(1), np.uint32(2), now,
        )  # fmt: skip
        if slot < 0:
            refused += 1
            if to_refusal:
                break
    return refused, number


@compiled
def _find(tables: Any, connections: int, count: int, protocol: Any) -> int:
    """Look `count` connections up; return how many were there."""
    found, number = 0, 0
    for _ in range(count):
        found += flows.find(tables, _addrs(number, False), _ports(number, _PORT), protocol) != flows.MISS
        number = (number + _STRIDE) % connections
    return found


@functools.cache
def measure(connections: int, lookups: int = 2_000_000) -> Size:
    """Fill a table of this capacity, look into it, sweep it, and fill it up."""
    _measure(50_000, 1000)  # compile
    return _measure(connections, lookups)


def _measure(connections: int, lookups: int) -> Size:
    tables = Tables.in_memory(Capacity(connections, 64, 64, 64, 64, 64, 1))
    for column in (tables.tags, tables.flows.view(np.uint8)):
        column[:] = 1  # touch every page now: the first touch is the kernel's cost
        column[:] = 0
    clock = ManualClock()
    table = FlowTable(tables, clock)
    table.create()
    protocol, state, now = np.uint8(Protocol.TCP), np.uint8(State.ESTABLISHED), np.uint32(clock.now())
    began = time.thread_time_ns()
    refused, _ = _fill(tables, 0, connections, protocol, state, now, False)
    insert_ns = (time.thread_time_ns() - began) / connections
    began = time.thread_time_ns()
    found = _find(tables, connections, lookups, protocol)
    find_ns = (time.thread_time_ns() - began) / lookups
    if found + refused < lookups:
        raise AssertionError(f"{lookups - found} of {lookups} connections were not found: this measures something else")
    began = time.thread_time_ns()
    ended = table.sweep()
    pass_s = (time.thread_time_ns() - began) / 1e9
    if ended or table.used() != connections - refused:
        raise AssertionError(f"{table.used()} connections are left of {connections - refused}")
    _, last = _fill(tables, connections, 2 * connections, protocol, state, now, True)
    used = tables.tags.nbytes + tables.flows.nbytes
    sweep_percent = 100 * pass_s / seconds_of_a_slice(pass_s, slices=1)
    return Size(connections, used / connections, refused, insert_ns, find_ns, sweep_percent, last)


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m perf.size", description="a flow table filled to its capacity")
    parser.add_argument("--connections", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    print(f"{'connections':>12}  {'bytes':>6}  {'refused':>7}  {'most':>11}  insert ns  find ns  sweep %")
    for number in parser.parse_args().connections:
        size = measure(number)
        counts = f"{number:>12,}  {size.bytes_each:>6.1f}  {size.refused:>7,}  {size.most:>11,}"
        print(f"{counts}  {size.insert_ns:>9.0f}  {size.find_ns:>7.0f}  {size.sweep_percent:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
