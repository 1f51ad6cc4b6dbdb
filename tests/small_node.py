"""A small node as data: Services, endpoints and ways to them; and the same in shared tables, for compiled code."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dataplane import hops_compiled, wire
from dataplane.pipeline import Node, handle
from lb.rows import ServiceRow
from lb.table import ServiceTable
from tests.packets import CLIENT, DNS_VIP, ENDPOINT, OTHER_CLIENT, OTHER_ENDPOINT, OTHER_VIP, ROUTER, VIP, address
from tests.reference import Hop, Key, Outcome, Reference, Service
from xdp.byteorder import swap16, swap32
from xdp.schema import Direction, HopState, Protocol, Reason, State, Tag, WhenStalled
from xdp.tables import Capacity, Tables

SEED = 0x7475726E6F757421
SMALL = Capacity(connections=200, frontends=32, services=32, maglev_slots=16_384, endpoints=32, next_hops=32, cpus=64)

DEAD_VIP = address("10.96.0.20:80")  # no endpoints
LOST_VIP = address("10.96.0.21:80")  # its endpoint has no next hop
FOREIGN_VIP = address("10.96.0.22:80")  # its endpoint is behind an interface that is not ours
NARROW_VIP = address("10.96.0.23:80")  # its endpoint is behind a small MTU
LOST_ENDPOINT = address("10.2.0.30:8080")
FOREIGN_ENDPOINT = address("10.2.0.31:8080")
NARROW_ENDPOINT = address("10.2.0.32:8080")
DNS_ENDPOINTS = (address("10.2.0.40:5353"), address("10.2.0.41:5353"))

TCP_VIPS = (VIP, OTHER_VIP, DEAD_VIP, LOST_VIP, FOREIGN_VIP, NARROW_VIP)
CLIENTS = (CLIENT, OTHER_CLIENT, address("10.1.0.10:40001"))

SERVICES: dict[tuple[int, int, int], Service] = {
    (*VIP, Protocol.TCP): Service((ENDPOINT, OTHER_ENDPOINT)),
    (*OTHER_VIP, Protocol.TCP): Service((ENDPOINT, OTHER_ENDPOINT), WhenStalled.PASS),
    (*DNS_VIP, Protocol.UDP): Service(DNS_ENDPOINTS),
    (*DEAD_VIP, Protocol.TCP): Service(()),
    (*LOST_VIP, Protocol.TCP): Service((LOST_ENDPOINT,)),
    (*FOREIGN_VIP, Protocol.TCP): Service((FOREIGN_ENDPOINT,)),
    (*NARROW_VIP, Protocol.TCP): Service((NARROW_ENDPOINT,)),
}
_CLIENT_SIDE, _SERVER_SIDE = 2, 3  # interfaces


def _macs(number: int) -> bytes:
    return bytes([2, 0, 0, 0, 1, number, 2, 0, 0, 0, 0, number])


HOPS: dict[int, Hop] = {
    **{host: Hop(macs=_macs(1), ifindex=_CLIENT_SIDE) for host in (CLIENT[0], OTHER_CLIENT[0])},
    ENDPOINT[0]: Hop(macs=_macs(2), ifindex=_SERVER_SIDE),
    OTHER_ENDPOINT[0]: Hop(macs=_macs(3), ifindex=_SERVER_SIDE),
    LOST_ENDPOINT[0]: Hop(HopState.UNRESOLVED),
    FOREIGN_ENDPOINT[0]: Hop(HopState.FOREIGN, _macs(4), 9),
    NARROW_ENDPOINT[0]: Hop(macs=_macs(5), ifindex=_SERVER_SIDE, mtu=100),
    **{host: Hop(macs=_macs(6), ifindex=_SERVER_SIDE) for host, _ in DNS_ENDPOINTS},
    ROUTER[0]: Hop(macs=_macs(7), ifindex=_CLIENT_SIDE),
}
_ROW = {host: row for row, host in enumerate(HOPS, 1)}  # row 0 stays unresolved


def write_hops(next_hops: npt.NDArray[np.void]) -> hops_compiled.Hops:
    """Write HOPS as rows, and return what leads to them."""
    for host, hop in HOPS.items():
        row = next_hops[_ROW[host]]
        row["dst_mac"], row["src_mac"] = list(hop.macs[:6]), list(hop.macs[6:])
        row["ifindex"], row["mtu"], row["state"], row["used"] = hop.ifindex, hop.mtu, hop.state, 1
    hops = hops_compiled.new_hops(next_hops, routes=len(HOPS))
    hosts = sorted(HOPS)
    starts = np.full(hops_compiled.LENGTHS + 1, len(hosts), np.uint32)
    starts[0] = 0  # 32 bits: all of them
    rows = np.array([_ROW[host] for host in hosts], np.uint32)
    hops_compiled.publish_routes(hops, starts, np.array(hosts, np.uint32), rows)
    return hops


def service_table(tables: Tables) -> ServiceTable:
    """Return the writer of the Service rows of `tables`."""
    return ServiceTable(tables, SEED, lambda host: _ROW[int(host)])


def service_ports(services: dict[tuple[int, int, int], Service] = SERVICES) -> list[ServiceRow]:
    """Return Services as the table takes them, one port per frontend."""
    return [
        ServiceRow(
            ((IPv4Address(host), port, protocol),),
            tuple((IPv4Address(host), port) for host, port in service.endpoints),
            service.when_stalled,
        )
        for (host, port, protocol), service in services.items()
    ]


class Pipeline:
    """Compiled code over `tables`, frames in and frames out."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.node = Node(tables, write_hops(tables.next_hops), np.uint64(SEED), np.zeros(1, wire.PACKET))
        self._memory = np.zeros(4096, np.uint8)

    def send(self, frame: bytes, now: int) -> Outcome:
        """Take a frame to its verdict."""
        start, length = 100, len(frame)  # anywhere, as in a UMEM
        self._memory[start : start + length] = list(frame)
        reason, ifindex = handle(self.node, self._memory, start, length, np.uint32(now))
        return Outcome(Reason(int(reason)), self._memory[start : start + length].tobytes(), int(ifindex))

    def age(self, jiffies: int) -> None:
        """Make every record older."""
        self.tables.flows["last_seen"] -= np.uint32(jiffies)


def _address(host: int, port: int) -> tuple[int, int]:
    return swap32(host), swap16(port)


class Flow(NamedTuple):
    """A flow record as it is, with its peer's key in place of its number."""

    after: Key
    direction: Direction
    state: State
    last_seen: int
    packets: int
    bytes: int
    peer: Key
    next_hop: int


def flows_of(tables: Tables) -> dict[Key, Flow]:
    """Return every published record by its five-tuple; a five-tuple that is there twice is an error."""
    tags = tables.tags.view(np.uint16)
    found: dict[Key, Flow] = {}
    for slot in np.flatnonzero(tags >= Tag.FIRST):
        record = tables.flows[slot]
        key = _key_of(record)
        assert key not in found, f"{key} is there twice"
        after = Key(
            _address(record["new_src_addr"], record["new_src_port"]),
            _address(record["new_dst_addr"], record["new_dst_port"]),
            key.protocol,
        )
        found[key] = Flow(
            after,
            Direction(int(record["direction"])),
            State(int(record["state"])),
            int(record["last_seen"]),
            int(record["packets"]),
            int(record["bytes"]),
            _key_of(tables.flows[record["peer"]]),
            int(record["next_hop"]),
        )
    return found


def flows_expected(reference: Reference) -> dict[Key, Flow]:
    """Return what the reference model believes, as `flows_of` tells it."""
    return {
        key: Flow(
            connection.after(way),
            way,
            connection.state,
            connection.last_seen[way] & 0xFFFFFFFF,
            connection.packets[way],
            connection.bytes[way],
            connection.key_of(Direction(1 - way)),
            _ROW[connection.after(way).destination[0]],
        )
        for key, (connection, way) in reference.flows.items()
    }


def _key_of(record: npt.NDArray[np.void]) -> Key:
    return Key(
        _address(record["src_addr"], record["src_port"]),
        _address(record["dst_addr"], record["dst_port"]),
        int(record["protocol"]),
    )
