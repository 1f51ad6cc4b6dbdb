"""What the stages of a packet's way read and write, and where frames go that leave it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dataplane import answers, wire
from dataplane.fragments import Fragments, new_fragments
from dataplane.hops_compiled import Hops
from dataplane.settings import DEFAULT_SNAT_PORTS, PortRange
from xdp import schema
from xdp.bundle import Bundle
from xdp.tables import Tables

NOWHERE = 0  # the egress of a frame that is not forwarded
KERNEL = 0xFFFFFFFE  # the egress of a frame that the kernel is to take as received, and to route
AWAITED = 0xFFFFFFFF  # the egress of a frame whose next hop may be known soon: to be tried again


# Where a packet loop's answers go back: its interface, the MAC address there (the first byte lowest), and how many
# answers to ARP it has given in the second that began at `since` (jiffies). `kernel` is the descriptor of what hands
# frames to the kernel there (dataplane/handback.py).
LINK = np.dtype([("mac", "u8"), ("ifindex", "u4"), ("since", "u4"), ("answers", "u4"), ("kernel", "i4")])


def _new_link() -> npt.NDArray[np.void]:
    return np.zeros(1, LINK)


@dataclass(frozen=True, eq=False)
class Masquerading(Bundle):
    """Who is inside the cluster (rows of RANGE and RANGE6, ascending, disjoint), and whose ports others leave from."""

    inside: npt.NDArray[np.void]
    inside6: npt.NDArray[np.void]
    first_port: np.uint64
    ports: np.uint64


@dataclass(frozen=True, eq=False)
class Node(Bundle):
    """All that the stages read and write: the shared tables, the way to every address, and Maglev's seed.

    `packet` is one PACKET record of scratch space, `budgets` say how many answers may still be given: every packet loop
    has its own Node.
    """

    tables: Tables
    hops: Hops
    seed: np.uint64
    masquerading: Masquerading
    packet: npt.NDArray[np.void]
    link: npt.NDArray[np.void] = field(default_factory=_new_link)
    budgets: npt.NDArray[np.void] = field(default_factory=answers.new_budgets)
    fragments: Fragments = field(default_factory=new_fragments)


def new_node(
    tables: Tables,
    hops: Hops,
    seed: int,
    inside: Iterable[tuple[int, int]] = (),
    snat_ports: PortRange = DEFAULT_SNAT_PORTS,
    datagrams: Fragments | None = None,
    inside6: Iterable[tuple[tuple[int, int], tuple[int, int]]] = (),
) -> Node:
    """Return the Node of a packet loop; `inside` are first and last addresses (lb.rows.ranges_of).

    Those of `inside6` are IPv6 addresses, as (higher half, lower half). `datagrams` are those in fragments, which all
    loops of a node share.
    """
    first, last = snat_ports
    ranges = np.array(list(inside), schema.RANGE)
    ranges6 = np.array(list(inside6), schema.RANGE6)
    masquerading = Masquerading(ranges, ranges6, np.uint64(first), np.uint64(last - first + 1))
    packet = np.zeros(1, wire.PACKET)
    shared = datagrams or new_fragments()
    return Node(tables, hops, np.uint64(seed), masquerading, packet, fragments=shared)
