"""Services at the node's own addresses. Ids are those of docs/behaviours.md."""

from __future__ import annotations

import pytest

from tests.node import NODE_NAME, ScenarioNode
from tests.packets import (
    address,
    addresses_of,
    first_fragment,
    fragment_of,
    icmp_error,
    rewritten,
    rst,
    syn,
    syn_ack,
    udp,
    unreachable_to,
)
from tests.services import Service, split, text_of
from xdp.schema import Reason

NODE_PORT = 30080
WEB = {"type": "NodePort", "ports": [{"name": "main", "port": 80, "nodePort": NODE_PORT}]}
DNS = {"type": "NodePort", "ports": [{"name": "main", "port": 53, "nodePort": NODE_PORT, "protocol": "UDP"}]}


def web(node: ScenarioNode, *hosts: str, **spec: str) -> Service:
    places = tuple(node.endpoint(host) for host in hosts)
    return Service("web", node.vip(1, 80), places, spec=WEB | spec, about={places[0]: {"nodeName": NODE_NAME}})


@pytest.mark.parametrize("at", ["client", "web-1"])
def test_T6_a_connection_to_any_address_of_the_node_goes_to_an_endpoint(node, at):
    node.apply(web(node, "web-1"))
    dialled, client, endpoint = node.own(at, NODE_PORT), node.client(), node.at("web-1", 8080)
    frame = syn(client, dialled)
    sent = node.send(frame)
    assert (sent.only, sent.reason) == (
        ("web-1", rewritten(frame, client, endpoint, node.macs("web-1"))),
        Reason.ADMITTED,
    )
    answer = syn_ack(endpoint, client)
    assert node.send(answer, "web-1").only == ("client", rewritten(answer, dialled, client, node.macs("client")))
    assert node.flow(client)["service"] == "shop/web:main"


def test_T6_a_datagram_to_a_node_port(node):
    node.apply(Service("dns", node.vip(10, 53), (node.endpoint("web-2", 5353),), "UDP", spec=DNS))
    client, endpoint = node.client(), node.at("web-2", 5353)
    frame = udp(client, node.own("client", NODE_PORT))
    assert node.send(frame).only == ("web-2", rewritten(frame, client, endpoint, node.macs("web-2")))
    answer = udp(endpoint, client)
    back = rewritten(answer, node.own("client", NODE_PORT), client, node.macs("client"))
    assert node.send(answer, "web-2").only == ("client", back)


def dns(node: ScenarioNode) -> int:
    """Serve datagrams at a node port that nothing else has had; return its number."""
    port = NODE_PORT + 50
    spec = {"type": "NodePort", "ports": [{"name": "main", "port": 53, "nodePort": port, "protocol": "UDP"}]}
    node.apply(Service("dns", node.vip(10, 53), (node.endpoint("web-2", 5353),), "UDP", spec=spec))
    return port


def test_T6_all_else_at_the_node_s_own_address_is_the_kernel_s(node):
    port, client, own = dns(node), node.client(), node.own("client")[0]
    from_server = rst(node.at("web-2", 5353), (node.own("web-2")[0], 40_000))
    for frame, host, reason in (  # which the kernel answers to none of
        (rst(client, (own, 22)), "client", Reason.NOT_OURS),
        (rst(client, (own, port)), "client", Reason.NOT_OURS),
        (fragment_of(udp(client, (own, port + 1), bytes(64)), 0, 40, 11), "client", Reason.OTHER_FRAGMENT),
        (fragment_of(udp(client, (own, port), bytes(64)), 40, 72, 12), "client", Reason.OTHER_FRAGMENT),
        (from_server, "web-2", Reason.NOT_OURS),
    ):
        sent = node.send(frame, host)
        assert (sent.left, sent.passed, sent.reason) == ([], [node.on_the_wire(frame, host)], reason)


@pytest.mark.engines(
    "xdp", "xdp-generic", "afxdp", "raw", why="userspace gets errors that XDP has found to be about a flow"
)
def test_T6_errors_about_what_the_node_itself_has_sent_are_the_kernel_s(node):
    port, client, server = dns(node), node.client(), node.at("web-2", 5353)
    for about, host in (
        (syn(node.own("client", 22), client), "client"),
        (udp(node.own("client", port + 1), client), "client"),
        (udp(node.own("web-2", 40_000), server), "web-2"),
    ):
        frame = icmp_error(about, "too-big")
        sent = node.send(frame, host)
        assert (sent.left, sent.passed, sent.reason) == ([], [node.on_the_wire(frame, host)], Reason.OTHER_ICMP)


def test_N1_an_error_about_an_answer_of_a_node_port_reaches_the_endpoint(node):
    node.apply(web(node, "web-1"))
    dialled, client, endpoint = node.own("client", NODE_PORT), node.client(), node.at("web-1", 8080)
    assert node.send(syn(client, dialled)).reason is Reason.ADMITTED
    _, answer = node.send(syn_ack(endpoint, client), "web-1").only
    host, arrived = node.send(icmp_error(answer, "too-big")).only
    assert (host, addresses_of(arrived)[1]) == ("web-1", endpoint[0])


@pytest.mark.engines("memory", "xdp", "xdp-generic", "afxdp", why="the filter of raw knows of no flows")
def test_T6_the_first_fragment_of_no_flow_at_a_node_port_is_the_kernel_s(node):
    frame = first_fragment(node.client(), node.own("client", dns(node)))
    sent = node.send(frame)
    passed = [node.on_the_wire(frame, "client")]
    assert (sent.left, sent.passed, sent.reason) == ([], passed, Reason.OTHER_FRAGMENT)


@pytest.mark.families(4, why="fragments of IPv6 at node ports are the kernel's")
@pytest.mark.engines("raw", why="the others leave it to the kernel, which says the same")
def test_T6_the_first_fragment_of_no_flow_at_a_node_port_is_refused(node):
    frame = node.on_the_wire(first_fragment(node.client(), node.own("client", dns(node))), "client")
    sent = node.send(frame)
    assert (sent.only, sent.reason) == (("client", unreachable_to(frame, 3)), Reason.NOT_SERVED)


def test_S8_the_external_policy_local_leaves_the_endpoints_of_this_node_to_node_ports_only(node):
    service = web(node, "web-1", "web-2", externalTrafficPolicy="Local")
    node.apply(service)
    dialled = node.own("client", NODE_PORT)
    assert {node.send(syn(node.client(), dialled)).only[0] for _ in range(10)} == {"web-1"}
    assert {node.send(syn(node.client(), service.at)).only[0] for _ in range(20)} == {"web-1", "web-2"}


def test_T6_get_services_shows_where_it_is_dialled(node):
    node.apply(web(node, "web-1"))
    (shown,) = node.answer("services")
    ends = [text_of(node.own(host, NODE_PORT)) for host in ("client", "web-1", "other")]
    assert shown["frontends"] == [node.vip(1, 80), *ends]


@pytest.mark.faults(110, 118)
@pytest.mark.engines("xdp", "raw", why="in memory there is no kernel, and with the others what follows is the same")
def test_T6_an_address_that_the_node_gets_later_has_its_node_ports_too(node):
    node.apply(web(node, "web-1"))
    place, length = (f"10.99.99.1:{NODE_PORT}", 32) if node.family == 4 else (f"[fd99::1]:{NODE_PORT}", 128)
    client, inside = node.client(), node.daemon.world.node
    command = [f"{split(place)[0]}/{length}", "dev", "eth0"]

    def frontends() -> list[str]:
        return node.answer("services")[0]["frontends"]

    inside.run(["ip", "address", "add", *command])
    try:
        node.daemon.wait_for(lambda: place in frontends())
        assert node.send(syn(client, address(place))).only[0] == "web-1"
    finally:
        inside.run(["ip", "address", "del", *command])
    node.daemon.wait_for(lambda: place not in frontends())
