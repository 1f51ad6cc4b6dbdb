"""Clients that keep their endpoint. Ids are those of docs/behaviours.md."""

from __future__ import annotations

from typing import Any

import pytest

from tests.node import ScenarioNode
from tests.packets import rst, syn, udp
from tests.services import Service

SECONDS = 60
NODE_PORT = 30_081
STICKY: dict[str, Any] = {
    "type": "NodePort",
    "ports": [{"name": "main", "port": 80, "nodePort": NODE_PORT}],
    "sessionAffinity": "ClientIP",
    "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": SECONDS}},
}


def serve(node: ScenarioNode, *hosts: str, name: str = "web") -> Service:
    """Make one Service with affinity. Memory outlasts scenarios: each has a Service of its own."""
    service = Service(name, node.vip(7, 80), tuple(node.endpoint(host) for host in hosts), spec=STICKY)
    node.apply(service)
    return service


def given(node: ScenarioNode, service: Service, host: str = "client") -> str:
    """Open a connection from a host, at a port of its own; return where it goes."""
    return node.send(syn(node.client(host), service.at), host).only[0]


def test_S11_every_connection_of_a_client_goes_to_the_same_endpoint(node):
    service = serve(node, "web-1", "web-2", "web-3", name="all")
    assert len({given(node, service) for _ in range(20)}) == 1


def test_S11_also_when_endpoints_come_and_go(node):
    service = serve(node, "web-1", name="come")
    assert given(node, service) == "web-1"
    for hosts in (("web-1", "web-2"), ("web-3", "web-1", "web-2"), ("near", "web-1", "web-2", "web-3")):
        serve(node, *hosts, name="come")
        assert {given(node, service) for _ in range(4)} == {"web-1"}


def test_S11_through_every_frontend_of_the_port(node):
    service = serve(node, "web-1", name="ways")
    assert given(node, service) == "web-1"
    serve(node, "web-1", "web-2", "web-3", name="ways")
    assert node.send(syn(node.client(), node.own("client", NODE_PORT))).only[0] == "web-1"


def test_S11_an_endpoint_that_left_is_forgotten(node):
    service = serve(node, "web-1", name="left")
    assert given(node, service) == "web-1"
    serve(node, "web-2", name="left")
    assert given(node, service) == "web-2"
    serve(node, "web-1", "web-2", name="left")
    assert {given(node, service) for _ in range(4)} == {"web-2"}


@pytest.mark.engines("memory", why="only its clock can be moved")
def test_S11_after_the_timeout_a_client_may_get_another_and_each_connection_begins_it_anew(node):
    service = serve(node, "web-1", name="time")
    assert given(node, service) == "web-1"
    serve(node, "web-1", "web-2", "web-3", "near", name="time")
    node.advance(SECONDS)
    assert given(node, service) == "web-1"
    node.advance(SECONDS)
    assert given(node, service) == "web-1"
    after = set()
    for number in range(8):  # each time another Service, as chance may choose the same endpoint
        service = serve(node, "web-1", name=f"time-{number}")
        assert given(node, service) == "web-1"
        serve(node, "web-1", "web-2", "web-3", "near", name=f"time-{number}")
        node.advance(SECONDS + 1)
        after.add(given(node, service))
    assert len(after) > 1


def test_S11_a_packet_that_begins_no_connection_remembers_nobody(node):
    service = serve(node, "web-1", name="rst")
    node.send(rst(node.client("other"), service.at), "other")
    used = serve(node, "web-2", name="rst")
    assert given(node, used, "other") == "web-2"


def test_S11_datagrams_too(node):
    spec = {"sessionAffinity": "ClientIP"}
    service = Service("dns", node.vip(17, 53), (node.endpoint("web-1", 5353),), "UDP", spec=spec)
    node.apply(service)
    assert node.send(udp(node.client(), service.at)).only[0] == "web-1"
    more = tuple(node.endpoint(host, 5353) for host in ("web-1", "web-2", "web-3"))
    node.apply(service.with_endpoints(*more))
    assert {node.send(udp(node.client(), service.at)).only[0] for _ in range(8)} == {"web-1"}
