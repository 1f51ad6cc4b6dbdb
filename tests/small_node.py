"""A small node as data: Services, endpoints and ways to them; and the same in shared tables, for compiled code."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Address, ip_network
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from conntrack import states
from dataplane import hops_compiled, stations
from dataplane.context import masquerading, new_node, occupy
from dataplane.pipeline import handle
from dataplane.settings import PortRange
from dataplane.vlans import words_of
from lb.rows import ServiceRow
from lb.table import ServiceTable
from tests.packets import (
    CLIENT,
    CLIENT6,
    DNS_VIP,
    DNS_VIP6,
    ENDPOINT,
    ENDPOINT6,
    IPV6,
    NODE_MAC,
    OTHER_CLIENT,
    OTHER_CLIENT6,
    OTHER_ENDPOINT,
    OTHER_ENDPOINT6,
    OTHER_VIP,
    ROUTER,
    VIP,
    VIP6,
    address,
)
from tests.reference import Hop, Key, Outcome, Reference, Service
from xdp.addresses import IPAddress, address_of, host_bits, number_of
from xdp.byteorder import swap16, swap32
from xdp.names import Names
from xdp.schema import (
    Direction,
    HopState,
    Limit,
    Masquerade,
    MidStream,
    Ping,
    Protocol,
    Reason,
    Scheduler,
    State,
    Tag,
    WhenStalled,
)
from xdp.tables import Capacity, Tables

SEED = 0x7475726E6F757421
SMALL = Capacity(
    connections=200,
    frontends=512,
    services=64,
    maglev_slots=16_384,
    endpoints=64,
    next_hops=64,
    cpus=64,
    affinities=64,
    names=256,
)

# Seconds, no few of the ages in tests sum up to either.
QUICK = (("syn", 5.8), ("established", 24.5), ("udp-unreplied", 5.8), ("udp", 24.5))
_QUICK_SET = 1

DEAD_VIP = address("10.96.0.20:80")  # no endpoints
ELSEWHERE_VIP = address("10.96.0.34:80")  # its endpoints are on other nodes, and its policy is Local
CLOSED_VIP = address("10.96.0.25:80")  # one client only may come, and a network that none is in
EXTERNAL_VIP = address("10.96.0.26:80")  # everybody is masqueraded towards its endpoints on other nodes
OUTER_VIP = address("10.96.0.27:80")  # who is outside the cluster is masqueraded
NARROWED_VIP = address("10.96.0.28:80")  # its policy is Local, but not for clients inside the cluster
NAMELESS_VIP = address("10.96.0.29:80")  # everybody is masqueraded, and the node has no address to do it with
STICKY_VIP = address("10.96.0.30:80")  # clients keep their endpoints
STICKY_TOO_VIP = address("10.96.0.31:80")  # another frontend of the same Service port, whose endpoints are fewer
RANDOM_VIP = address("10.96.0.32:80")
TURNS_VIP = address("10.96.0.33:80")  # its endpoints take turns
LOADS_VIP = address("10.96.0.42:80")  # the endpoint with fewer connections
LOST_VIP = address("10.96.0.21:80")  # its endpoint has no next hop
FOREIGN_VIP = address("10.96.0.22:80")  # its endpoint is behind an interface that is not ours
NARROW_VIP = address("10.96.0.23:80")  # its endpoint is behind a small MTU
HERE_VIP = address("10.96.0.24:80")  # XDP admits even while userspace is there
POD_VIP = address("10.96.0.35:80")  # its endpoint is on this node: the kernel routes to it; everybody is masqueraded
POD_DNS_VIP = address("10.96.0.36:53")
DEAF_VIP = address("10.96.0.37:80")  # its endpoint is behind a driver that takes no redirected frames; masqueraded
PASSING_VIP = address("10.96.0.38:80")  # unknown connections are passed
RESETTING_VIP = address("10.96.0.39:80")  # unknown connections are reset; XDP admits
POD_ENDPOINT = address("10.244.0.2:8080")
DEAF_ENDPOINT = address("10.2.0.50:8080")
DEAF_CLIENT = address("10.1.0.12:40000")  # a client behind such a driver
LOST_ENDPOINT = address("10.2.0.30:8080")
LOST_CLIENT = address("10.1.0.13:40000")  # its neighbour does not answer
FOREIGN_ENDPOINT = address("10.2.0.31:8080")
NARROW_ENDPOINT = address("10.2.0.32:8080")
DEAD_VIP6 = address("[fd00:96::20]:80")
NARROW_VIP6 = address("[fd00:96::23]:80")
OUTER_VIP6 = address("[fd00:96::27]:80")
HERE_VIP6 = address("[fd00:96::24]:80")  # XDP admits even while userspace is there
PASSED_VIP6 = address("[fd00:96::40]:80")  # of mid-stream segments
RESET_VIP6 = address("[fd00:96::41]:80")
STICKY_VIP6 = address("[fd00:96::30]:80")
PASSING_VIP6 = address("[fd00:96::2]:80")
POD_VIP6 = address("[fd00:96::35]:80")  # its endpoint is on this node; everybody is masqueraded
POD_DNS_VIP6 = address("[fd00:96::36]:53")
DEAF_VIP6 = address("[fd00:96::37]:80")  # its endpoint is behind a driver that takes no redirected frames; masqueraded
POD_ENDPOINT6 = address("[2001:db8:244::2]:8080")
DEAF_ENDPOINT6 = address("[2001:db8:2::50]:8080")
DEAF_CLIENT6 = address("[2001:db8:1::12]:40000")
NARROW_ENDPOINT6 = address("[2001:db8:2::32]:8080")
DNS_ENDPOINT6 = address("[2001:db8:2::40]:5353")
MID_STREAM_VIPS6 = (PASSED_VIP6, RESET_VIP6)
TCP_VIPS6 = (
    *(VIP6, VIP6, VIP6, HERE_VIP6, HERE_VIP6, DEAD_VIP6, NARROW_VIP6, OUTER_VIP6, STICKY_VIP6, PASSING_VIP6),
    *MID_STREAM_VIPS6,
)
CLIENTS6 = (CLIENT6, OTHER_CLIENT6, (CLIENT6[0], 40_001), (ENDPOINT6[0], 40_001))
INSIDE6 = ((OTHER_CLIENT6[0], OTHER_CLIENT6[0]),)
OWN6 = address("[2001:db8:2::1]:0")[0]
DNS_ENDPOINTS = (address("10.2.0.40:5353"), address("10.2.0.41:5353"))

TCP_VIPS = (VIP, OTHER_VIP, DEAD_VIP, LOST_VIP, FOREIGN_VIP, NARROW_VIP, HERE_VIP, ELSEWHERE_VIP, CLOSED_VIP)
POD_VIPS = (POD_VIP, POD_DNS_VIP)
POD_VIPS6 = (POD_VIP6, POD_DNS_VIP6)
STICKY_VIPS = (STICKY_VIP, STICKY_TOO_VIP)
SCHEDULED_VIPS = (RANDOM_VIP, TURNS_VIP, LOADS_VIP)
MID_STREAM_VIPS = (PASSING_VIP, RESETTING_VIP)
MASQUERADED_VIPS = (EXTERNAL_VIP, OUTER_VIP, NARROWED_VIP, NAMELESS_VIP)
CLIENTS = (CLIENT, OTHER_CLIENT, address("10.1.0.10:40001"))
MARTIANS = [address(f"{each}:40000") for each in ("0.0.0.9", "127.0.0.1", "224.0.0.1", "255.255.255.255")]
MARTIANS6 = [address(f"[{each}]:40000") for each in ("::", "::1", "ff02::1", "::ffff:10.1.0.10")]
HAIRPIN = (ENDPOINT[0], 40_001)  # an endpoint that is a client
POD_HAIRPIN = (POD_ENDPOINT[0], 40_001)  # one on this node
POD_HAIRPIN6 = (POD_ENDPOINT6[0], 40_001)
INSIDE = ((OTHER_CLIENT[0], OTHER_CLIENT[0]),)
SNAT_PORTS = PortRange(40_001, 40_004)  # the first is the port of two clients
OCCUPIED = frozenset({40_004, 700})  # by sockets of the node
PRIVILEGED = ((CLIENT[0], 111), (CLIENT[0], 700), (CLIENT[0], 1023))  # clients
OWN = address("10.2.0.1:0")[0]  # the node's own address towards the endpoints
STATIONS = tuple(bytes.fromhex(mac.replace(":", "")) for mac in (NODE_MAC, "02:00:5e:00:01:05", "02:00:00:00:00:02"))
VLANS = (5, 63, 64, 4094)  # that are served, beside untagged frames and those with a priority tag

_TCP6, _UDP6 = Protocol.TCP | Protocol.IPV6, Protocol.UDP | Protocol.IPV6
SERVICES: dict[tuple[int, int, int], Service] = {
    (*VIP, Protocol.TCP): Service((ENDPOINT, OTHER_ENDPOINT)),
    (*OTHER_VIP, Protocol.TCP): Service((ENDPOINT, OTHER_ENDPOINT), WhenStalled.PASS),
    (*DNS_VIP, Protocol.UDP): Service(DNS_ENDPOINTS, WhenStalled.DROP),
    (*DEAD_VIP, Protocol.TCP): Service(()),
    (*ELSEWHERE_VIP, Protocol.TCP): Service((), is_elsewhere=True),
    (*CLOSED_VIP, Protocol.TCP): Service(
        (ENDPOINT,), ranges=((1, 5), (OTHER_CLIENT[0], OTHER_CLIENT[0]), (OTHER_CLIENT[0] + 2, 0xFFFFFFFF))
    ),
    (*EXTERNAL_VIP, Protocol.TCP): Service(
        (ENDPOINT, OTHER_ENDPOINT), local=frozenset({OTHER_ENDPOINT}), masquerade=Masquerade.REMOTE
    ),
    (*OUTER_VIP, Protocol.TCP): Service((ENDPOINT,), masquerade=Masquerade.OUTSIDE),
    (*NARROWED_VIP, Protocol.TCP): Service((), is_elsewhere=True, inside=Service((ENDPOINT,))),
    (*NAMELESS_VIP, Protocol.TCP): Service((NARROW_ENDPOINT,), masquerade=Masquerade.EVERYBODY),
    (*STICKY_VIP, Protocol.TCP): Service((ENDPOINT, OTHER_ENDPOINT, NARROW_ENDPOINT), affinity_s=3600, identity=7),
    (*STICKY_TOO_VIP, Protocol.TCP): Service((ENDPOINT,), affinity_s=3600, identity=7),
    (*RANDOM_VIP, Protocol.TCP): Service((ENDPOINT, OTHER_ENDPOINT), scheduler=Scheduler.RANDOM, timeouts=QUICK),
    (*TURNS_VIP, Protocol.TCP): Service((ENDPOINT, OTHER_ENDPOINT), scheduler=Scheduler.ROUND_ROBIN),
    (*LOADS_VIP, Protocol.TCP): Service(
        (ENDPOINT, OTHER_ENDPOINT, NARROW_ENDPOINT), scheduler=Scheduler.LEAST_CONNECTIONS
    ),
    (*PASSING_VIP, Protocol.TCP): Service((ENDPOINT,), mid_stream=MidStream.PASS),
    (*RESETTING_VIP, Protocol.TCP): Service(
        (OTHER_ENDPOINT,), admits_here=True, mid_stream=MidStream.RESET, timeouts=QUICK
    ),
    (*LOST_VIP, Protocol.TCP): Service((LOST_ENDPOINT,)),
    (*FOREIGN_VIP, Protocol.TCP): Service((FOREIGN_ENDPOINT,)),
    (*NARROW_VIP, Protocol.TCP): Service((NARROW_ENDPOINT,)),
    (*HERE_VIP, Protocol.TCP): Service((ENDPOINT, POD_ENDPOINT), admits_here=True),
    (*POD_VIP, Protocol.TCP): Service(
        (POD_ENDPOINT,), local=frozenset({POD_ENDPOINT}), masquerade=Masquerade.EVERYBODY
    ),
    (*POD_DNS_VIP, Protocol.UDP): Service(((POD_ENDPOINT[0], 5353),)),
    (*VIP6, _TCP6): Service((ENDPOINT6, OTHER_ENDPOINT6)),
    (*PASSING_VIP6, _TCP6): Service((ENDPOINT6, OTHER_ENDPOINT6), WhenStalled.PASS),
    (*DNS_VIP6, _UDP6): Service((DNS_ENDPOINT6,), WhenStalled.DROP, timeouts=QUICK),
    (*DEAD_VIP6, _TCP6): Service(()),
    (*HERE_VIP6, _TCP6): Service((ENDPOINT6, POD_ENDPOINT6), admits_here=True),
    (*PASSED_VIP6, _TCP6): Service((ENDPOINT6,), mid_stream=MidStream.PASS),
    (*RESET_VIP6, _TCP6): Service((ENDPOINT6,), mid_stream=MidStream.RESET),
    (*NARROW_VIP6, _TCP6): Service((NARROW_ENDPOINT6,)),
    (*OUTER_VIP6, _TCP6): Service((ENDPOINT6,), masquerade=Masquerade.OUTSIDE),
    (*STICKY_VIP6, _TCP6): Service((ENDPOINT6, OTHER_ENDPOINT6, NARROW_ENDPOINT6), affinity_s=3600, identity=9),
    (*DEAF_VIP, Protocol.TCP): Service((DEAF_ENDPOINT,), masquerade=Masquerade.EVERYBODY),
    (*POD_VIP6, _TCP6): Service((POD_ENDPOINT6,), local=frozenset({POD_ENDPOINT6}), masquerade=Masquerade.EVERYBODY),
    (*POD_DNS_VIP6, _UDP6): Service(((POD_ENDPOINT6[0], 5353),)),
    (*DEAF_VIP6, _TCP6): Service((DEAF_ENDPOINT6,), masquerade=Masquerade.EVERYBODY),
}
_CLIENT_SIDE, _SERVER_SIDE = 2, 3  # interfaces
LINK = 7  # the interface that the packet loop serves, and that answers leave by


def _macs(number: int) -> bytes:
    return bytes([2, 0, 0, 0, 1, number, 2, 0, 0, 0, 0, number])


HOPS: dict[int, Hop] = {
    **{host: Hop(macs=_macs(1), ifindex=_CLIENT_SIDE) for host in (CLIENT[0], OTHER_CLIENT[0])},
    ENDPOINT[0]: Hop(macs=_macs(2), ifindex=_SERVER_SIDE, source=OWN),
    OTHER_ENDPOINT[0]: Hop(macs=_macs(3), ifindex=_SERVER_SIDE, source=OWN),
    POD_ENDPOINT[0]: Hop(HopState.KERNEL, ifindex=9, mtu=100),
    DEAF_ENDPOINT[0]: Hop(HopState.KERNEL, _macs(8), _SERVER_SIDE),
    DEAF_CLIENT[0]: Hop(HopState.KERNEL, _macs(9), _CLIENT_SIDE),
    POD_ENDPOINT6[0]: Hop(HopState.KERNEL, ifindex=9, mtu=100),
    DEAF_ENDPOINT6[0]: Hop(HopState.KERNEL, _macs(15), _SERVER_SIDE),
    DEAF_CLIENT6[0]: Hop(HopState.KERNEL, _macs(16), _CLIENT_SIDE),
    **{host: Hop(HopState.UNRESOLVED) for host in (LOST_ENDPOINT[0], LOST_CLIENT[0])},
    FOREIGN_ENDPOINT[0]: Hop(HopState.FOREIGN, _macs(4), 9),
    NARROW_ENDPOINT[0]: Hop(macs=_macs(5), ifindex=_SERVER_SIDE, mtu=100),
    **{host: Hop(macs=_macs(6), ifindex=_SERVER_SIDE) for host, _ in DNS_ENDPOINTS},
    **{host: Hop(macs=_macs(10), ifindex=_CLIENT_SIDE) for host in (CLIENT6[0], OTHER_CLIENT6[0])},
    ENDPOINT6[0]: Hop(macs=_macs(11), ifindex=_SERVER_SIDE, source=OWN6),
    OTHER_ENDPOINT6[0]: Hop(macs=_macs(12), ifindex=_SERVER_SIDE, source=OWN6),
    NARROW_ENDPOINT6[0]: Hop(macs=_macs(13), ifindex=_SERVER_SIDE, mtu=130, source=OWN6),
    DNS_ENDPOINT6[0]: Hop(macs=_macs(14), ifindex=_SERVER_SIDE),
    ROUTER[0]: Hop(macs=_macs(7), ifindex=_CLIENT_SIDE),
}
_ROW = {host: row for row, host in enumerate(HOPS, 1)}  # row 0 stays unresolved


ROUTES = {(host, host_bits(host)): row for host, row in _ROW.items()}  # as XDP looks them up


def name_of(tables: Tables, host: int) -> int:
    """Return the number that stands for an address in the tables: itself, or an IPv6 address's name, for good."""
    return Names(tables).pin(IPv6Address(host ^ IPV6)) if host & IPV6 else host


def named(tables: Tables, host: int) -> int:
    """Return the number that stands for an address in the tables now."""
    return Names(tables).find(IPv6Address(host ^ IPV6)) if host & IPV6 else host


def _host_of(tables: Tables, number: int, is_ipv6: int) -> int:
    """Return the address that a number of the tables stands for."""
    return number_of(Names(tables).address_of(number)) if is_ipv6 else number


def write_hops(tables: Tables) -> hops_compiled.Hops:
    """Write HOPS as rows, and return what leads to them."""
    for host, hop in HOPS.items():
        row = tables.next_hops[_ROW[host]]
        row["dst_mac"], row["src_mac"] = list(hop.macs[:6]), list(hop.macs[6:])
        row["ifindex"], row["mtu"], row["state"], row["used"] = hop.ifindex, hop.mtu, hop.state, 1
        row["source"] = swap32(name_of(tables, hop.source))
    hops = hops_compiled.new_hops(tables, routes=len(HOPS))
    hosts = sorted(host for host in HOPS if not host & IPV6)
    starts = np.full(hops_compiled.LENGTHS + 1, len(hosts), np.uint32)
    starts[0] = 0  # 32 bits: all of them
    rows = np.array([_ROW[host] for host in hosts], np.uint32)
    hops_compiled.publish_routes(hops, starts, np.array(hosts, np.uint32), rows)
    hosts = sorted(host for host in HOPS if host & IPV6)
    starts = np.full(hops_compiled.LENGTHS6 + 1, len(hosts), np.uint32)
    starts[0] = 0
    halves = np.array([_halves(host) for host in hosts], np.uint64).T.copy()
    rows = np.array([_ROW[host] for host in hosts], np.uint32)
    hops_compiled.publish_routes6(hops, starts, halves[0], halves[1], rows)
    return hops


def service_table(tables: Tables) -> ServiceTable:
    """Return the writer of the Service rows of `tables`, for which there is a QUICK set of timeouts."""
    sets = tables.machine[0]["timeout"].reshape(Limit.TIMEOUT_SETS, -1)
    sets[_QUICK_SET] = states.timeouts_in_jiffies(QUICK, int(tables.control[0]["hertz"]))
    return ServiceTable(tables, SEED, lambda host: _ROW[number_of(host)])


def service_ports(services: dict[tuple[int, int, int], Service] = SERVICES) -> list[ServiceRow]:
    """Return Services as the table takes them, one port per frontend."""
    return [
        _row_of(service)._replace(frontends=((address_of(host), port, protocol & ~Protocol.IPV6),))
        for (host, port, protocol), service in services.items()
    ]


def _row_of(service: Service) -> ServiceRow:
    return ServiceRow(
        frontends=(),
        endpoints=tuple((address_of(host), port) for host, port in service.endpoints),
        when_stalled=service.when_stalled,
        admits_here=service.admits_here,
        is_elsewhere=service.is_elsewhere,
        ranges=service.ranges,
        local=frozenset((address_of(host), port) for host, port in service.local),
        masquerade=service.masquerade,
        affinity_s=service.affinity_s,
        identity=service.identity,
        scheduler=service.scheduler,
        mid_stream=service.mid_stream,
        timeouts=16 * _QUICK_SET if service.timeouts else 0,
        inside=_row_of(service.inside) if service.inside else None,
    )


def reference_of(
    tables: Tables,
    hertz: int,
    services: dict[tuple[int, int, int], Service] = SERVICES,
    sources: tuple[int, ...] = (),
) -> Reference:
    """Return the model of a node with these tables."""
    first, second = map(int, tables.control[0]["hash_key"])
    inside = (*INSIDE, *INSIDE6)
    model = Reference(
        services,
        HOPS,
        SEED,
        hertz,
        (first, second),
        inside,
        SNAT_PORTS,
        LINK,
        lambda host: named(tables, host),
        sources,
        frozenset({0, *VLANS}),
        frozenset(STATIONS),
    )
    model.occupied = OCCUPIED
    return model


def _halves(host: int) -> tuple[int, int]:
    return host >> 64 & (1 << 64) - 1, host & (1 << 64) - 1


class Pipeline:
    """Compiled code over `tables`, frames in and frames out."""

    def __init__(self, tables: Tables, snat_ports: PortRange = SNAT_PORTS, sources: Iterable[IPAddress] = ()) -> None:
        self.tables = tables
        inside = [ip_network(address_of(first)) for first, _ in (*INSIDE, *INSIDE6)]  # single addresses
        snat = masquerading(inside, snat_ports, sources, Names(tables))
        occupy(snat, OCCUPIED)
        self.node = new_node(tables, write_hops(tables), snat)
        self.node.link[0]["ifindex"] = LINK
        tables.control[0]["ping"] = Ping.ANSWER
        tables.control[0]["vlans"] = words_of((vlan, vlan) for vlan in VLANS)
        tables.control[0]["stations"] = stations.words_of(STATIONS)
        self._memory = np.zeros(4096, np.uint8)

    def send(self, frame: bytes, now: int) -> Outcome:
        """Take a frame to its verdict."""
        start, length = 100, len(frame)  # anywhere, as in a UMEM
        self._memory[start : start + length] = np.frombuffer(frame, np.uint8)
        reason, ifindex = handle(self.node, self._memory, start, length, np.uint32(now))
        length = int(self.node.packet[0]["length"])
        return Outcome(Reason(int(reason)), self._memory[start : start + length].tobytes(), int(ifindex))

    def clear(self) -> None:
        """Let as many answers be given as ever, and forget fragments."""
        self.node.limits.budgets[:] = 0
        self.node.limits.clients[:] = 0
        self.node.limits.drawn[:] = 0
        self.node.fragments.datagrams[:] = 0

    def age(self, jiffies: int) -> None:
        """Make every record older."""
        self.tables.flows["last_seen"] -= np.uint32(jiffies)
        self.tables.affinity["last_given"] -= np.uint32(jiffies)
        self.node.fragments.datagrams["since"] -= np.uint32(jiffies)


def _address(tables: Tables, host: int, port: int, protocol: int) -> tuple[int, int]:
    return _host_of(tables, swap32(host), protocol & Protocol.IPV6), swap16(port)


class Flow(NamedTuple):
    """A flow record as it is, with its peer's key in place of its number."""

    after: Key
    direction: Direction
    state: State
    timeouts: int
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
        key = _key_of(tables, record)
        assert key not in found, f"{key} is there twice"
        after = Key(
            _address(tables, record["new_src_addr"], record["new_src_port"], key.protocol),
            _address(tables, record["new_dst_addr"], record["new_dst_port"], key.protocol),
            key.protocol,
        )
        found[key] = Flow(
            after,
            Direction(int(record["direction"])),
            State(int(record["state"]) & Limit.STATE_BITS),
            int(record["state"]) >> 4,
            int(record["last_seen"]),
            int(record["packets"]),
            int(record["bytes"]),
            _key_of(tables, tables.flows[record["peer"]]),
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
            _QUICK_SET if connection.timeouts else 0,
            connection.last_seen[way] & 0xFFFFFFFF,
            connection.packets[way],
            connection.bytes[way],
            connection.key_of(Direction(1 - way)),
            _ROW[connection.after(way).destination[0]],
        )
        for key, (connection, way) in reference.flows.items()
    }


def _key_of(tables: Tables, record: npt.NDArray[np.void]) -> Key:
    protocol = int(record["protocol"])
    return Key(
        _address(tables, record["src_addr"], record["src_port"], protocol),
        _address(tables, record["dst_addr"], record["dst_port"], protocol),
        protocol,
    )
