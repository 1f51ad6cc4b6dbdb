"""Which endpoints a client may get: policies and topology. Ids are those of docs/behaviours.md."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from tests.node import NODE_NAME, ZONE, ScenarioNode
from tests.packets import Address, ack, address, reset_to, rst, syn
from tests.services import Service, split, text_of
from xdp.schema import Reason

LOCAL = {"internalTrafficPolicy": "Local"}
HERE, THERE = {"nodeName": NODE_NAME}, {"nodeName": "node-2"}
TERMINATING = {"conditions": {"ready": False, "serving": True, "terminating": True}}
UNREADY = {"conditions": {"ready": False}}


def serve(node: ScenarioNode, spec: dict[str, Any], **about: dict[str, Any]) -> Service:
    """Serve one Service; `about` are its endpoints by host (web_1) with what their slice says of them."""
    places = {node.endpoint(host.replace("_", "-")): fields for host, fields in about.items()}
    service = Service("web", node.vip(1, 80), tuple(places), spec=spec, about=places)
    node.apply(service)
    return service


def chosen(node: ScenarioNode, service: Service, connections: int = 20) -> set[str]:
    """Return the hosts that so many new connections go to."""
    return {node.send(syn(node.client(), service.at)).only[0] for _ in range(connections)}


def test_S9_the_internal_policy_local_leaves_the_endpoints_of_this_node(node):
    service = serve(node, LOCAL, web_1=HERE, web_2=THERE, web_3=HERE)
    assert chosen(node, service) == {"web-1", "web-3"}
    service = serve(node, {}, web_1=HERE, web_2=THERE, web_3=HERE)
    assert chosen(node, service) == {"web-1", "web-2", "web-3"}


def test_T8_endpoints_that_are_all_on_other_nodes_are_no_endpoints(node):
    service, client = serve(node, LOCAL, web_1=THERE, web_2={}), node.client()
    sent = node.send(syn(client, service.at))
    assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.NO_LOCAL_ENDPOINT)
    assert node.flows(client=text_of(client)) == []


def test_T7_no_endpoint_anywhere_is_another_reason(node):
    service = serve(node, LOCAL, web_1=THERE | UNREADY)
    frame = node.on_the_wire(syn(node.client(), service.at), "client")
    sent = node.send(frame)
    assert (sent.only, sent.reason) == (("client", reset_to(frame)), Reason.NO_ENDPOINT)


@pytest.mark.parametrize(("spec", "hosts"), [({}, {"web-2"}), (LOCAL, {"web-1"})], ids=["E5-cluster", "E7-local"])
def test_who_terminates_is_chosen_when_nobody_else_is_there_in_each_list_by_itself(node, spec, hosts):
    service = serve(node, spec, web_1=HERE | TERMINATING, web_2=THERE)
    assert chosen(node, service, 10) == hosts
    service = serve(node, spec, web_1=HERE | TERMINATING, web_2=THERE | UNREADY)
    assert chosen(node, service, 3) == {"web-1"}


def test_E6_hints_keep_connections_in_the_zone(node):
    mine, other = {"hints": {"forZones": [{"name": ZONE}]}}, {"hints": {"forZones": [{"name": "zone-b"}]}}
    assert chosen(node, serve(node, {}, web_1=mine, web_2=other, web_3=mine)) == {"web-1", "web-3"}
    assert chosen(node, serve(node, {}, web_1=mine, web_2=other, web_3={})) == {"web-1", "web-2", "web-3"}


def test_E6_hints_for_nodes_come_before_those_for_zones(node):
    def of(name: str) -> dict[str, Any]:
        return {"hints": {"forNodes": [{"name": name}], "forZones": [{"name": ZONE}]}}

    assert chosen(node, serve(node, {}, web_1=of(NODE_NAME), web_2=of("node-2"))) == {"web-1"}


def test_C1_connections_stay_when_the_policy_takes_their_endpoint_away(node):
    service, client = serve(node, {}, web_1=THERE), node.client()
    assert node.send(syn(client, service.at)).only[0] == "web-1"
    serve(node, LOCAL, web_1=THERE, web_2=HERE)
    assert node.send(syn(client, service.at)).only[0] == "web-1"
    assert chosen(node, service, 5) == {"web-2"}


BALANCERS = {4: "198.51.100.7", 6: "2001:db8:51::7"}
ANYBODY, NOBODY = {4: "0.0.0.0/0", 6: "::/0"}, {4: "192.0.2.0/24", 6: "2001:db8::/32"}


def balancer(node: ScenarioNode) -> Address:
    """Return where a load balancer has put the Service."""
    return address(f"{BALANCERS[4]}:80" if node.family == 4 else f"[{BALANCERS[6]}]:80")


def behind_a_balancer(node: ScenarioNode, *ranges: str, **spec: Any) -> Service:
    """Serve a Service at a load balancer's address too, for these clients."""
    place = node.endpoint("web-1")
    service = Service(
        "web",
        node.vip(1, 80),
        (place,),
        spec={"type": "LoadBalancer", "loadBalancerSourceRanges": list(ranges), **spec},
        ingress=(BALANCERS[node.family],),
    )
    node.apply(service)
    return service


def test_S7_only_clients_in_the_source_ranges_reach_the_load_balancers_address(node):
    other, at = ip_network(split(node.endpoint("other"))[0]), balancer(node)
    service = behind_a_balancer(node, str(other), f" {NOBODY[node.family]}")
    assert node.send(syn(node.client("other"), at), "other").only[0] == "web-1"
    client = node.client()
    for frame in (syn(client, at), ack(client, at), rst(client, at)):
        sent = node.send(frame)
        assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.SOURCE_REFUSED)
    assert node.flows(client=text_of(client)) == []
    assert node.send(syn(client, service.at)).only[0] == "web-1"  # its cluster IP is open


def test_S7_no_ranges_and_those_of_another_family_only_are_no_filter(node):
    for ranges in ((), (NOBODY[10 - node.family],), (NOBODY[node.family], ANYBODY[node.family])):
        behind_a_balancer(node, *ranges)
        assert node.send(syn(node.client(), balancer(node))).reason is Reason.ADMITTED


def test_C1_a_connection_that_was_let_in_stays_when_the_ranges_change(node):
    behind_a_balancer(node)
    client, at = node.client(), balancer(node)
    node.send(syn(client, at))
    behind_a_balancer(node, NOBODY[node.family])
    assert node.send(ack(client, at)).only[0] == "web-1"
    assert node.send(syn(node.client(), at)).reason is Reason.SOURCE_REFUSED


def test_L_an_endpoint_without_weight_keeps_its_connections_and_gets_no_more(node):
    service = serve(node, {}, web_1={}, web_2={})
    clients = [node.client() for _ in range(10)]
    before = {client: node.send(syn(client, service.at)).only[0] for client in clients}
    weights = {"turnout.dev/weights": f"{split(node.endpoint('web-1'))[0]}=0"}
    node.apply(replace(service, annotations=weights))
    assert {client: node.send(ack(client, service.at)).only[0] for client in clients} == before
    assert chosen(node, service, 10) == {"web-2"}


def test_L_with_round_robin_endpoints_take_turns(node):
    service = serve(node, {}, web_1={}, web_2={}, web_3={})
    node.apply(replace(service, annotations={"turnout.dev/scheduler": "round-robin"}))
    hosts = [node.send(syn(node.client(), service.at)).only[0] for _ in range(9)]
    assert hosts[:3] == hosts[3:6] == hosts[6:]
    assert set(hosts) == {"web-1", "web-2", "web-3"}


def test_L_random_reaches_all_endpoints(node):
    service = serve(node, {}, web_1={}, web_2={}, web_3={})
    node.apply(replace(service, annotations={"turnout.dev/scheduler": "random"}))
    assert chosen(node, service, 40) == {"web-1", "web-2", "web-3"}
