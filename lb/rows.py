"""From what a node is to do to the rows that the packet path reads: addresses and numbers, no names."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import NamedTuple

from lb.model import Endpoint, FrontendKind, ServicePort, Snapshot
from xdp.schema import Protocol, WhenStalled

Address = tuple[IPv4Address, int]
FrontendKey = tuple[IPv4Address, int, int]  # address, port, protocol; port and protocol 0: the address is a VIP


class ServiceRow(NamedTuple):
    """What the packet path needs to know of frontends that share their candidates."""

    frontends: tuple[FrontendKey, ...]
    endpoints: tuple[Address, ...]  # the candidates for new connections, each once
    when_stalled: WhenStalled = WhenStalled.DROP


def rows_of(snapshot: Snapshot) -> list[ServiceRow]:
    """Return the rows of `snapshot`: one for each Service port and list of candidates.

    What has no IPv4 address (node ports, IPv6) has no row yet: `resolve` has left it out, and said so.
    """
    return [row for port in snapshot.ports for row in _rows_of_port(port)]


def _rows_of_port(port: ServicePort) -> Iterator[ServiceRow]:
    protocol = int(Protocol[port.protocol])
    by_candidates: dict[tuple[Address, ...], list[FrontendKey]] = {}
    for kind, address, number in port.frontends:
        if isinstance(address, IPv4Address):
            by_candidates.setdefault(_candidates(port, kind), []).append((address, number, protocol))
    for candidates, frontends in by_candidates.items():
        yield ServiceRow(tuple(frontends), candidates, WhenStalled[port.options.when_stalled.upper()])


def _candidates(port: ServicePort, kind: FrontendKind) -> tuple[Address, ...]:
    endpoints: tuple[Endpoint, ...] = port.candidates(kind)
    return tuple([(each.address, each.port) for each in endpoints if isinstance(each.address, IPv4Address)])
