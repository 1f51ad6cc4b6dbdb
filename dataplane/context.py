"""What the stages of a packet's way read and write, and where frames go that leave it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv6Address

import numpy as np
import numpy.typing as npt

from dataplane import wire
from dataplane.fragments import Fragments, new_fragments
from dataplane.hops_compiled import Hops
from dataplane.limits import Limits, new_limits
from dataplane.settings import DEFAULT_SNAT_PORTS, PortRange
from lb.rows import ranges_of
from xdp import schema
from xdp.addresses import IPAddress, IPNetwork, halves, is_ipv6
from xdp.bundle import Bundle
from xdp.names import Names
from xdp.tables import Tables

NOWHERE = 0  # the egress of a frame that is not forwarded
KERNEL = 0xFFFFFFFE  # the egress of a frame that the kernel is to take as received, and to route
AWAITED = 0xFFFFFFFF  # the egress of a frame whose next hop may be known soon: to be tried again

_PORTS = 1 << 16

# Where a packet loop's answers go back: its interface, the MAC address there (the first byte lowest), and how many
# answers to ARP it has given in the second that began at `since` (jiffies). `kernel` is the descriptor of what hands
# frames to the kernel there (dataplane/handback.py). Of `begun` first packets of connections, `unfinished` had a
# checksum that a device was to finish.
LINK = np.dtype(
    [
        *(("mac", "u8"), ("ifindex", "u4"), ("since", "u4"), ("answers", "u4"), ("kernel", "i4")),
        *(("begun", "u8"), ("unfinished", "u8")),
    ]
)


def _new_link() -> npt.NDArray[np.void]:
    return np.zeros(1, LINK)


def _new_flow() -> npt.NDArray[np.void]:
    return np.zeros(1, schema.FLOW)


@dataclass(frozen=True, eq=False)
class Masquerading(Bundle):
    """Who is inside the cluster (rows of RANGE and RANGE6, ascending, disjoint), and where others come from.

    `sources` are addresses, and names of IPv6 ones, as they lie in flows; of a family without any it is the node's
    address on the way to the endpoint. `occupied` has a bit for each port, from the lowest up: sockets of the node have
    it. The control plane writes it (`occupy`) while packet loops read.
    """

    inside: npt.NDArray[np.void]
    inside6: npt.NDArray[np.void]
    first_port: np.uint64
    ports: np.uint64
    sources: npt.NDArray[np.uint32]
    sources6: npt.NDArray[np.uint32]
    occupied: npt.NDArray[np.uint64]


def masquerading(
    inside: Iterable[IPNetwork] = (),
    ports: PortRange = DEFAULT_SNAT_PORTS,
    sources: Iterable[IPAddress] = (),
    names: Names | None = None,
) -> Masquerading:
    """Return what is said of masquerading by networks, a range of ports, and addresses, as packet loops take it.

    The names of IPv6 addresses are pinned in `names`. TableFullError: there is no room for one.
    """
    ranges = ranges_of(inside) or ()
    fours = [pair for pair in ranges if not is_ipv6(pair[0])]
    sixes = [(halves(first), halves(last)) for first, last in ranges if is_ipv6(first)]
    numbers: dict[int, list[int]] = {4: [], 6: []}
    for address in sources:
        if isinstance(address, IPv6Address):
            assert names is not None
            numbers[6].append(names.pin(address))
        else:
            numbers[4].append(int(address))
    return Masquerading(
        np.array(fours, schema.RANGE),
        np.array(sixes, schema.RANGE6),
        np.uint64(ports.first),
        np.uint64(ports.last - ports.first + 1),
        np.array(numbers[4], np.uint32).byteswap(),
        np.array(numbers[6], np.uint32).byteswap(),
        np.zeros(_PORTS // 64, np.uint64),
    )


def occupy(masqueraded: Masquerading, ports: Iterable[int]) -> None:
    """Have new connections leave from none of these ports, and again from those of the last call."""
    bits = np.zeros(_PORTS, np.uint8)
    bits[list(ports)] = 1
    masqueraded.occupied[:] = np.packbits(bits, bitorder="little").view(np.uint64)


@dataclass(frozen=True, eq=False)
class Node(Bundle):
    """All that the stages read and write: the shared tables, and the way to every address.

    `packet` is one PACKET record of scratch space, `imagined` one FLOW that is in no table, and `limits` say how many
    answers may be given: every packet loop has its own Node.
    """

    tables: Tables
    hops: Hops
    masquerading: Masquerading
    packet: npt.NDArray[np.void]
    link: npt.NDArray[np.void] = field(default_factory=_new_link)
    imagined: npt.NDArray[np.void] = field(default_factory=_new_flow)
    limits: Limits = field(default_factory=new_limits)
    fragments: Fragments = field(default_factory=new_fragments)


def new_node(
    tables: Tables,
    hops: Hops,
    masqueraded: Masquerading | None = None,
    datagrams: Fragments | None = None,
) -> Node:
    """Return the Node of a packet loop. `datagrams` are those in fragments, which all loops of a node share."""
    packet = np.zeros(1, wire.PACKET)
    shared = datagrams or new_fragments()
    return Node(tables, hops, masqueraded or masquerading(), packet, fragments=shared)
