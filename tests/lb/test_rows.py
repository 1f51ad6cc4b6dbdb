"""From Service ports to rows of the packet path."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address

from lb.model import (
    EndpointSlice,
    EndpointState,
    Ingress,
    NodeView,
    Options,
    PortSpec,
    Service,
    SliceEndpoint,
    SlicePort,
)
from lb.resolve import resolve
from lb.rows import ServiceRow, rows_of
from xdp.schema import Protocol, WhenStalled

VIP, BALANCER, HERE, THERE = (IPv4Address(text) for text in ("10.96.0.10", "192.0.2.1", "10.0.0.1", "10.0.0.2"))
TCP = int(Protocol.TCP)
SLICE = EndpointSlice(
    "shop", "web-1", "web", "IPv4", (SlicePort("http", 8080),),
    (SliceEndpoint(HERE, EndpointState.READY, "node-1"), SliceEndpoint(THERE, EndpointState.READY, "node-2")),
)  # fmt: skip


def rows(**fields: object) -> list[ServiceRow]:
    settings = {"cluster_ips": (VIP,), "ports": (PortSpec("http", 80),), **fields}
    service = Service("shop", "web", **settings)  # type: ignore[arg-type]
    return rows_of(resolve([service], [SLICE], NodeView("node-1"), not_yet={}))


def test_frontends_with_the_same_candidates_share_a_row():
    assert rows(ingress=(Ingress(BALANCER, 0),)) == [
        ServiceRow(((VIP, 80, TCP), (BALANCER, 80, TCP)), ((HERE, 8080), (THERE, 8080)))
    ]


def test_a_policy_of_some_frontends_makes_a_row_of_their_own():
    assert rows(ingress=(Ingress(BALANCER, 0),), external_traffic_policy="Local") == [
        ServiceRow(((VIP, 80, TCP),), ((HERE, 8080), (THERE, 8080))),
        ServiceRow(((BALANCER, 80, TCP),), ((HERE, 8080),)),
    ]


def test_a_service_port_without_endpoints_has_a_row():
    assert rows(ports=(PortSpec("other", 81),)) == [ServiceRow(((VIP, 81, TCP),), ())]


def test_what_happens_while_userspace_stalls_is_in_the_row():
    (row,) = rows(options=Options(when_stalled="pass"))
    assert row.when_stalled is WhenStalled.PASS


def test_what_has_no_ipv4_address_has_no_row_yet():
    served = rows(cluster_ips=(VIP, ip_address("fd00::10")), ports=(PortSpec("http", 80, node_port=30080),))
    assert [row.frontends for row in served] == [((VIP, 80, TCP),)]
