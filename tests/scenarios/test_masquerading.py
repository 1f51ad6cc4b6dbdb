"""Connections that leave from an address of the node. Ids are those of docs/behaviours.md.

Hosts of the network `other` are inside the cluster, those of `client` are not.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.node import NODE_NAME, ScenarioNode
from tests.packets import (
    Address,
    ack,
    addresses_of,
    data,
    icmp_error,
    ports_of,
    reset_to,
    rewritten,
    syn,
    syn_ack,
    udp,
    unreachable_to,
)
from tests.services import Service, text_of
from xdp.schema import Reason

FIRST, LAST = 30_000, 60_999  # many: those that are drawn hardly ever meet those that are kept
NODE_PORT = 30_080
WEB = {"type": "NodePort", "ports": [{"name": "main", "port": 80, "nodePort": NODE_PORT}]}
outside = pytest.mark.flags(cluster_cidr="10.77.3.0/24 fd77:0:3::/64", snat_ports=f"{FIRST}-{LAST}")
everybody = pytest.mark.flags(masquerade="all", snat_ports=f"{FIRST}-{LAST}")
_fresh = iter(range(FIRST, LAST))  # client ports that a connection may keep


def serve(node: ScenarioNode, *hosts: str, local: str = "", **spec: Any) -> Service:
    places = tuple(node.endpoint(host) for host in hosts)
    about = {node.endpoint(local): {"nodeName": NODE_NAME}} if local else {}
    service = Service("web", node.vip(1, 80), places, spec=WEB | spec, about=about)
    node.apply(service)
    return service


def client_of(node: ScenarioNode, host: str = "client") -> Address:
    """Return a place on a host whose port a masqueraded connection may keep."""
    return node.at(host, next(_fresh))


def sees(node: ScenarioNode, client: Address, dialled: Address, host: str = "web-1") -> Address:
    """Open a connection, answers included, compared whole; return whom the endpoint on `host` sees as its client."""
    endpoint, at = node.at(host, 8080), node.host_of(client)
    sent = node.send(syn(client, dialled), at)
    assert sent.reason is Reason.ADMITTED
    source = sent.only[1]
    seen = addresses_of(source)[0], ports_of(source)[0]
    assert node.flow(client)["snat"] == (text_of(seen) if seen != client else None)
    for first in (syn(client, dialled), ack(client, dialled), data(client, dialled, b"x" * 1400)):
        assert node.send(first, at).only == (host, rewritten(first, seen, endpoint, node.macs(host)))
        for answer in (syn_ack(endpoint, seen), data(endpoint, seen)):
            assert node.send(answer, host).only == (at, rewritten(answer, dialled, client, node.macs(at)))
    return seen


@outside
def test_T2_who_is_outside_the_cluster_comes_from_the_node_s_address(node):
    service, client = serve(node, "web-1"), client_of(node)
    assert sees(node, client, service.at) == node.own("web-1", client[1])


@outside
def test_T2_who_is_inside_the_cluster_keeps_its_address(node):
    service, client = serve(node, "web-1"), client_of(node, "other")
    assert sees(node, client, service.at) == client


@everybody
def test_T2_masquerade_all_spares_nobody(node):
    service, client = serve(node, "web-1"), client_of(node, "other")
    assert sees(node, client, service.at) == node.own("web-1", client[1])


@outside
@pytest.mark.parametrize("host", ["client", "other"])
def test_T3_external_clients_are_masqueraded_towards_endpoints_on_other_nodes(node, host):
    serve(node, "web-1")
    client = client_of(node, host)
    assert sees(node, client, node.own(host, NODE_PORT)) == node.own("web-1", client[1])


@everybody
def test_C11_a_masqueraded_connection_that_nobody_knows_is_reset(node):
    service, client = serve(node, "web-1"), client_of(node)
    for frame in (ack(client, service.at), data(client, service.at)):
        sent = node.send(frame)
        assert (sent.only, sent.reason) == (
            ("client", reset_to(node.on_the_wire(frame, "client"))),
            Reason.MID_STREAM_RESET,
        )
    assert sees(node, client, service.at) == node.own("web-1", client[1])


@outside
def test_T3_towards_an_endpoint_on_this_node_they_keep_their_address(node):
    serve(node, "web-1", local="web-1")
    client = client_of(node)
    assert sees(node, client, node.own("client", NODE_PORT)) == client


@outside
def test_T3_under_a_local_policy_they_keep_it_always(node):
    serve(node, "web-1", "web-2", local="web-1", externalTrafficPolicy="Local")
    for _ in range(5):
        client = client_of(node)
        assert sees(node, client, node.own("client", NODE_PORT)) == client


@outside
def test_T4_a_pod_has_all_endpoints_of_a_local_policy_and_keeps_its_address(node):
    serve(node, "web-1", "web-2", local="web-1", externalTrafficPolicy="Local")
    hosts = set()
    for _ in range(20):
        client = client_of(node, "other")
        host, frame = node.send(syn(client, node.own("other", NODE_PORT)), "other").only
        assert (host, frame) == (
            host,
            rewritten(syn(client, node.own("other", NODE_PORT)), client, node.at(host, 8080), node.macs(host)),
        )
        hosts.add(host)
    assert hosts == {"web-1", "web-2"}


def test_T5_an_endpoint_reaches_itself_through_its_service(node):
    service = serve(node, "web-1")
    source = sees(node, node.at("web-1", 40_000), service.at)
    assert source[0] == node.own("web-1")[0]
    assert source[1] != 40_000


@outside
def test_C12_a_port_outside_the_range_becomes_one_inside_and_no_two_are_the_same(node):
    service = serve(node, "web-3")
    seen = [sees(node, node.client(), service.at, "web-3") for _ in range(20)]
    assert len(set(seen)) == 20
    assert all(address == node.own("web-3")[0] and FIRST <= port <= LAST for address, port in seen)


@outside
def test_C12_privileged_ports_stay_privileged(node):
    service = serve(node, "web-2")
    kept, drawn = (sees(node, node.at("client", port), service.at, "web-2") for port in (1023, 22))
    assert kept == node.own("web-2", 1023)
    assert 600 <= drawn[1] <= 1022


@outside
def test_C12_two_clients_with_the_same_port_are_told_apart(node):
    serve(node, "web-1")
    dialled = node.own("client", NODE_PORT)
    first = client_of(node)
    second = node.at("other", first[1])
    assert sees(node, first, dialled) == node.own("web-1", first[1])
    other = sees(node, second, dialled)
    assert other[1] != first[1]


@outside
def test_N1_an_error_about_a_masqueraded_packet_is_about_the_client_s_own(node):
    service, client = serve(node, "web-1"), client_of(node)
    _, left = node.send(syn(client, service.at)).only
    about = syn(client, service.at, ttl=63)  # as it left the client, a hop later
    expected = icmp_error(about, source=service.at, ttl=59)
    assert node.send(icmp_error(left), "web-1").only == ("client", node.macs("client") + expected[12:])


@outside
@pytest.mark.engines("raw", why="the others leave it to the kernel, which answers likewise")
def test_C12_what_an_endpoint_sends_to_a_port_of_no_connection_is_refused(node):
    node.apply(
        Service("web", node.vip(1, 80), (node.endpoint("web-1"),)),
        Service("dns", node.vip(10, 53), (node.endpoint("web-1", 5353),), "UDP"),
    )
    own = node.own("web-1", LAST)
    for frame, refused in (
        (syn_ack(node.at("web-1", 8080), own), reset_to),
        (data(node.at("web-1", 8080), own), reset_to),
        (udp(node.at("web-1", 5353), own), unreachable_to),
    ):
        sent = node.send(frame, "web-1")
        expected = refused(node.on_the_wire(frame, "web-1"))
        assert (sent.only, sent.reason) == (("web-1", expected), Reason.NOT_SERVED)
    sent = node.send(icmp_error(syn(own, node.at("web-1", 8080)), "too-big"), "web-1")
    assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.ICMP_UNUSABLE)


@outside
def test_T2_datagrams_too(node):
    service = Service("dns", node.vip(10, 53), (node.endpoint("web-1", 5353),), "UDP")
    node.apply(service)
    client, endpoint = client_of(node), node.at("web-1", 5353)
    frame, source = udp(client, service.at), node.own("web-1", client[1])
    assert node.send(frame).only == ("web-1", rewritten(frame, source, endpoint, node.macs("web-1")))
    answer = udp(endpoint, source)
    back = rewritten(answer, service.at, client, node.macs("client"))
    assert node.send(answer, "web-1").only == ("client", back)


@outside
@pytest.mark.engines("xdp", why="in memory there is no kernel, and the others begin alike")
def test_C12_the_ports_are_reserved_in_the_kernel_while_it_runs(node):
    reserved = node.daemon.world.node.run(["cat", "/proc/sys/net/ipv4/ip_local_reserved_ports"]).stdout
    assert reserved.strip() == f"{FIRST}-{LAST}"


@pytest.mark.flags(masquerade="all", snat_addresses="10.77.2.100 10.77.2.101 fd77:0:2::100 fd77:0:2::101")
@pytest.mark.engines("memory", "xdp", "raw", why="generic XDP and afxdp begin connections as xdp does")
def test_C12_connections_come_from_every_address_that_was_given(node):
    service = serve(node, "web-1")
    seen = {text_of(sees(node, node.client(), service.at)).rpartition(":")[0].strip("[]") for _ in range(20)}
    assert seen == ({"10.77.2.100", "10.77.2.101"} if node.family == 4 else {"fd77:0:2::100", "fd77:0:2::101"})


@pytest.mark.flags(masquerade="all", snat_ports="30000-30000")
@pytest.mark.engines("memory", why="looked at every few seconds otherwise; what is counted is the same with all")
def test_C12_no_free_port_is_counted_and_told_in_status(node):
    service = serve(node, "web-1")
    assert node.send(syn(node.client(), service.at)).reason is Reason.ADMITTED
    sent = node.send(syn(node.client(), service.at))
    assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.NO_SNAT_PORT)
    node.look_for_shortages()
    (why,) = node.status()["why"]
    assert why == (
        "masquerading: 1 new connections found no free port among 30000-30000, or 600-1023 for privileged ones; "
        "see --snat-ports and --snat-addresses"
    )
