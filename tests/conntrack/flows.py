"""Flows for tests of the table: numbered connections, each with a five-tuple of its own."""

from __future__ import annotations

import numpy as np

from conntrack import compiled
from conntrack.table import FlowTable
from xdp.byteorder import swap16, swap32
from xdp.clock import ManualClock
from xdp.jit import compiled as compile_it
from xdp.schema import Protocol, State
from xdp.tables import Capacity, Tables

TCP = np.uint8(Protocol.TCP)


def small(connections: int) -> Tables:
    """Return tables that hold flows and hardly anything else."""
    return Tables.in_memory(
        Capacity(connections=connections, frontends=4, services=2, maglev_slots=16, endpoints=2, next_hops=4)
    )


def key(number: int) -> tuple[np.uint64, np.uint32, np.uint64, np.uint32]:
    """Return (addrs, ports, new addrs, new ports) of connection `number`, as they lie in memory."""
    client, vip, endpoint = 0x0A00_0000 + number, 0x0A60_0001, 0xAC10_0001
    return (
        np.uint64(swap32(vip) << 32 | swap32(client)),
        np.uint32(swap16(80) << 16 | swap16(40_000)),
        np.uint64(swap32(endpoint) << 32 | swap32(client)),
        np.uint32(swap16(8080) << 16 | swap16(40_000)),
    )


class Flows:
    """A flow table in memory, with a clock that stands still."""

    def __init__(self, connections: int) -> None:
        self.clock = ManualClock()
        self.tables = small(connections)
        self.table = FlowTable(self.tables, self.clock)
        self.table.create()

    def insert(self, number: int, state: State = State.SYN_SENT, protocol: np.uint8 = TCP) -> int:
        """Insert a connection; return its slot, FULL or TAKEN."""
        hop_out, hop_back = np.uint32(1), np.uint32(2)
        now = np.uint32(self.clock.now())
        slot = compiled.insert(self.tables, *key(number), protocol, np.uint8(state), hop_out, hop_back, now)
        return int(slot)

    def find(self, number: int, protocol: np.uint8 = TCP) -> int:
        """Return the slot of a connection's original direction, or MISS."""
        addrs, ports, _, _ = key(number)
        return int(compiled.find(self.tables, addrs, ports, protocol))

    def find_reply(self, number: int, protocol: np.uint8 = TCP) -> int:
        """Return the slot of a connection's reply direction, or MISS."""
        _, _, addrs, ports = key(number)
        return int(compiled.find(self.tables, turned_addrs(addrs), turned_ports(ports), protocol))

    def fill(self, first: int, count: int, state: State = State.SYN_SENT) -> int:
        """Insert connections until one finds no room; return how many were inserted."""
        now = np.uint32(self.clock.now())
        return int(insert_many(self.tables, first, count, np.uint8(state), now))


def turned_addrs(addrs: np.uint64) -> np.uint64:
    return np.uint64(int(addrs) >> 32 | (int(addrs) & 0xFFFFFFFF) << 32)


def turned_ports(ports: np.uint32) -> np.uint32:
    return np.uint32(int(ports) >> 16 | (int(ports) & 0xFFFF) << 16)


@compile_it
def insert_many(tables, first, count, state, now):
    """Insert connections of their own five-tuples until one finds no room; return how many were inserted."""
    for number in range(first, first + count):
        client = np.uint64(number)
        slot = compiled.insert(
            tables, np.uint64(1 << 32) | client, np.uint32(7), np.uint64(2 << 32) | client, np.uint32(9), TCP, state,
            np.uint32(1), np.uint32(2), now,
        )  # fmt: skip
        if slot < 0:
            return number - first
    return count
