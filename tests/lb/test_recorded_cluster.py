"""A real cluster's dump, as each of its nodes sees it. The expectations were worked out by hand."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, ip_address, ip_network
from pathlib import Path

import pytest

from lb import manifests
from lb.model import Endpoint, EndpointState, Frontend, FrontendKind, HealthCheck, NodeView, ServicePort, Snapshot
from lb.not_yet import NOT_YET
from lb.notes import notes
from lb.resolve import resolve
from lb.rows import Here, rows_of
from xdp.schema import Masquerade

DATA = Path(__file__).parent.parent / "data" / "kubernetes"
NODES = {f"node-{number}": NodeView(f"node-{number}", "zone-a" if number < 3 else "zone-b") for number in (1, 2, 3, 4)}
WEB_READY = {"10.244.1.10", "10.244.1.11", "10.244.2.10", "10.244.3.10", "10.244.4.10"}


@pytest.fixture(scope="module")
def cluster() -> manifests.Manifests:
    return manifests.load([str(DATA / "cluster.yaml")])


def view(cluster: manifests.Manifests, node: str, **options: object) -> Snapshot:
    """Return what a node is to do, all features included unless `options` say otherwise."""
    return resolve(cluster.services, cluster.slices, NODES[node], **{"not_yet": {}, **options})  # type: ignore[arg-type]


def port_of(snapshot: Snapshot, key: str, protocol: str = "TCP", family: int = 4) -> ServicePort:
    (port,) = [port for port in snapshot.ports if (port.key, port.protocol, port.family) == (key, protocol, family)]
    return port


def spots(endpoints: tuple[Endpoint, ...]) -> set[str]:
    return {f"{endpoint.address}:{endpoint.port}" for endpoint in endpoints}


def addresses(endpoints: tuple[Endpoint, ...]) -> set[str]:
    return {str(endpoint.address) for endpoint in endpoints}


def test_yaml_and_json_say_the_same(cluster):
    as_json = manifests.load([str(DATA / "cluster.json")])
    assert (as_json.services, as_json.slices) == (cluster.services, cluster.slices)


def test_what_is_programmed_is_what_a_cluster_proxy_would_program(cluster):
    """Not headless (db), ExternalName (search) nor another proxy's (other-proxy)."""
    keys = {(port.key, port.protocol, port.family) for port in view(cluster, "node-1").ports}
    assert keys == {
        ("default/kubernetes:https", "TCP", 4),
        ("infra/ingress:http", "TCP", 4),
        ("infra/ingress:https", "TCP", 4),
        ("infra/kube-dns:dns", "UDP", 4),
        ("infra/kube-dns:dns", "UDP", 6),
        ("infra/kube-dns:dns-tcp", "TCP", 4),
        ("infra/kube-dns:dns-tcp", "TCP", 6),
        ("infra/sip:diameter", "SCTP", 4),
        ("shop/cart:grpc", "TCP", 4),
        ("shop/db-write:pg", "TCP", 4),
        ("shop/empty:80", "TCP", 4),
        ("shop/manual:5000", "TCP", 4),
        ("shop/web:http", "TCP", 4),
        ("shop/web:http", "TCP", 6),
        ("shop/web:metrics", "TCP", 4),
        ("shop/web:metrics", "TCP", 6),
        ("shop/web-local:8000", "TCP", 4),
        ("shop/web-nodeport:http", "TCP", 4),
        ("shop/web-zone:http", "TCP", 4),
    }


def test_a_service_in_both_families_has_its_own_endpoints_in_each(cluster):
    snapshot = view(cluster, "node-1")
    ipv4, ipv6 = port_of(snapshot, "shop/web:http"), port_of(snapshot, "shop/web:http", family=6)
    assert ipv4.frontends == (Frontend(FrontendKind.CLUSTER_IP, ip_address("10.96.245.204"), 80),)
    assert ipv6.frontends == (Frontend(FrontendKind.CLUSTER_IP, ip_address("fd00:96::4:de08"), 80),)
    assert spots(ipv4.cluster) == {f"{address}:8080" for address in WEB_READY}
    assert addresses(ipv6.cluster) == {
        "fd00:244:1::a",
        "fd00:244:1::b",
        "fd00:244:2::a",
        "fd00:244:3::a",
        "fd00:244:4::a",
    }
    assert {str(e.address): e.state for e in ipv4.endpoints}["10.244.2.11"] is EndpointState.UNREADY


def test_ports_go_by_name_and_protocol(cluster):
    snapshot = view(cluster, "node-1")
    assert spots(port_of(snapshot, "shop/web:metrics").cluster) == {f"{address}:9090" for address in WEB_READY}
    assert spots(port_of(snapshot, "infra/kube-dns:dns", "UDP").cluster) == {"10.244.1.13:53", "10.244.3.12:53"}
    assert spots(port_of(snapshot, "infra/kube-dns:dns-tcp").cluster) == {"10.244.1.13:53", "10.244.3.12:53"}


def test_a_named_target_port_is_another_number_in_each_pod(cluster):
    cart = port_of(view(cluster, "node-1"), "shop/cart:grpc")
    assert spots(cart.cluster) == {"10.244.1.12:7000", "10.244.2.12:7001", "10.244.3.11:7002"}
    assert cart.affinity_s == 600


@pytest.mark.parametrize(
    ("node", "local"),
    [
        ("node-1", {"10.244.1.10", "10.244.1.11"}),
        ("node-2", {"10.244.2.10"}),  # 10.244.2.11 is not ready
        ("node-3", {"10.244.3.10"}),
        ("node-4", {"10.244.4.10"}),
    ],
)
def test_the_local_policy_leaves_the_pods_of_this_node(cluster, node, local):
    snapshot = view(cluster, node)
    internal = port_of(snapshot, "shop/web-local:8000")
    assert addresses(internal.candidates(FrontendKind.CLUSTER_IP)) == local
    assert addresses(internal.cluster) == WEB_READY
    external = port_of(snapshot, "shop/web-nodeport:http")
    assert external.frontends == (
        Frontend(FrontendKind.CLUSTER_IP, ip_address("10.106.54.159"), 80),
        Frontend(FrontendKind.NODE_PORT, None, 30080),
    )
    assert addresses(external.candidates(FrontendKind.NODE_PORT)) == local
    assert addresses(external.candidates(FrontendKind.CLUSTER_IP)) == WEB_READY


@pytest.mark.parametrize(
    ("node", "zone"),
    [
        ("node-1", {"10.244.1.10", "10.244.1.11", "10.244.2.10"}),
        ("node-2", {"10.244.1.10", "10.244.1.11", "10.244.2.10"}),
        ("node-3", {"10.244.3.10", "10.244.4.10"}),
        ("node-4", {"10.244.3.10", "10.244.4.10"}),
    ],
)
def test_hints_keep_traffic_in_its_zone(cluster, node, zone):
    assert addresses(port_of(view(cluster, node), "shop/web-zone:http").cluster) == zone


def test_a_load_balancers_addresses_with_who_may_come(cluster):
    """Mode Proxy and host names are not captured; a leading space in a range is nothing."""
    ingress = port_of(view(cluster, "node-2"), "infra/ingress:https")
    assert ingress.frontends == (
        Frontend(FrontendKind.CLUSTER_IP, ip_address("10.107.43.126"), 443),
        Frontend(FrontendKind.LOAD_BALANCER, ip_address("198.51.100.80"), 443),
        Frontend(FrontendKind.NODE_PORT, None, 31938),
    )
    assert ingress.source_ranges == (ip_network("203.0.113.0/24"), ip_network("198.51.100.0/25"))
    assert addresses(ingress.candidates(FrontendKind.LOAD_BALANCER)) == {"10.244.2.13"}
    on_node_1 = port_of(view(cluster, "node-1"), "infra/ingress:https")
    assert on_node_1.candidates(FrontendKind.LOAD_BALANCER) == ()


def test_external_addresses_need_permission(cluster):
    refused = port_of(view(cluster, "node-1"), "infra/sip:diameter", "SCTP")
    assert [str(frontend.address) for frontend in refused.frontends] == ["10.98.104.227"]
    snapshot = view(cluster, "node-1", allow_external_ips=(ip_network("198.51.100.0/29"),))
    allowed = port_of(snapshot, "infra/sip:diameter", "SCTP")
    assert [str(frontend.address) for frontend in allowed.frontends] == ["10.98.104.227", "198.51.100.7"]


def test_slices_made_by_hand_and_services_with_nobody_behind_them(cluster):
    snapshot = view(cluster, "node-1")
    manual = port_of(snapshot, "shop/manual:5000")
    assert {str(e.address): e.state for e in manual.endpoints} == {
        "10.244.1.200": EndpointState.READY,  # no conditions at all
        "10.244.2.200": EndpointState.SERVING,
    }
    assert addresses(manual.cluster) == {"10.244.1.200"}
    assert manual.local == ()  # no nodeName: remote
    assert port_of(snapshot, "shop/empty:80").cluster == ()
    assert port_of(snapshot, "default/kubernetes:https").endpoints == ()


def test_what_is_not_honoured_is_named(cluster):
    entries = view(cluster, "node-1", not_yet=NOT_YET).not_honoured
    assert [(entry.object.removeprefix("Service "), entry.field) for entry in entries] == [
        ("infra/sip", "spec.externalIPs[0]"),
        ("infra/sip", "spec.ports[0].protocol"),
    ]


def test_a_node_that_does_not_know_who_it_is_says_what_it_cannot_honour(cluster):
    snapshot = resolve(cluster.services, cluster.slices, NodeView(), not_yet={})
    nameless = [(note.object.removeprefix("Service "), note.field) for note in snapshot.not_honoured]
    assert nameless == [
        ("infra/ingress", "spec.externalTrafficPolicy"),
        ("infra/ingress", "spec.healthCheckNodePort"),
        ("infra/sip", "spec.externalIPs[0]"),
        ("shop/web-local", "spec.internalTrafficPolicy"),
        ("shop/web-nodeport", "spec.externalTrafficPolicy"),
        ("shop/web-zone", "endpoints[].hints"),
    ]
    local = port_of(snapshot, "shop/web-local:8000")
    assert addresses(local.candidates(FrontendKind.CLUSTER_IP)) == WEB_READY
    assert addresses(port_of(snapshot, "shop/web-zone:http").cluster) == WEB_READY


@pytest.mark.parametrize("file", ["cluster.yaml", "cluster-after.json"])
def test_E2_all_ports_of_a_real_cluster_find_each_other(file):
    """Its Services without Pods have slices without ports."""
    found = manifests.load([str(DATA / file)])
    assert not [note for note in notes(found.services, found.slices) if note.path]


@pytest.mark.faults(114)
def test_the_watch_streams_end_in_the_cluster_as_it_was_afterwards(tmp_path):
    """Their objects carry managedFields and whatever else an apiserver sends."""
    objects: dict[tuple[str, str, str], object] = {}
    for kind, stream in (("Service", "watch-services.jsonl"), ("EndpointSlice", "watch-endpointslices.jsonl")):
        for line in (DATA / stream).read_text().splitlines():
            event = json.loads(line)
            if event["type"] == "BOOKMARK":
                continue
            metadata = event["object"]["metadata"]
            key = (kind, metadata["namespace"], metadata["name"])
            objects[key] = event["object"]
            if event["type"] == "DELETED":
                del objects[key]
    replayed_file = tmp_path / "replayed.json"
    replayed_file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects.values())}))
    replayed = manifests.load([str(replayed_file)])
    after = manifests.load([str(DATA / "cluster-after.json")])
    were_there_before = {("default", "kubernetes")}
    assert {s for s in after.services if (s.namespace, s.name) not in were_there_before} == set(replayed.services)
    assert set(after.slices) == set(replayed.slices)


@pytest.mark.parametrize(("node", "endpoints"), [("node-1", 0), ("node-2", 1), ("node-3", 1), ("node-4", 1)])
def test_S10_a_load_balancer_is_told_how_many_endpoints_a_node_has(cluster, node, endpoints):
    check, check6 = view(cluster, node).health_checks
    (spec,) = [service for service in cluster.services if service.name == "ingress"]
    assert check == HealthCheck("infra", "ingress", spec.health_check_node_port, endpoints, 4)
    assert check6 == check._replace(family=6)


OWN = IPv4Address("192.168.10.1")
BALANCER = IPv4Address("198.51.100.80")


@pytest.mark.parametrize(
    ("node", "places"),
    [
        ("node-1", ()),
        ("node-2", ("10.244.2.13",)),
        ("node-3", ("10.244.3.13",)),
        ("node-4", ("10.244.4.11",)),
    ],
)
def test_the_rows_of_a_load_balancer_with_a_local_policy_from_each_node(cluster, node, places):
    """T6, T8, S7, S8: its address with a filter, the node port without, and only what is on the node."""
    here = Here((OWN,), "external", knows_inside=(4,))
    by_frontend = {
        frontend: row for row in rows_of(view(cluster, node, not_yet=NOT_YET), here) for frontend in row.frontends
    }
    balancer, node_port = by_frontend[BALANCER, 443, 6], by_frontend[OWN, 31938, 6]
    for row in (balancer, node_port):
        assert tuple(str(address) for address, _ in row.endpoints) == places
        assert row.is_elsewhere == (not places)
        assert row.masquerade is Masquerade.NOBODY
        assert {str(address) for address, _ in row.inside.endpoints} == {"10.244.2.13", "10.244.3.13", "10.244.4.11"}
    assert (balancer.ranges, node_port.ranges) == (
        (
            (int(IPv4Address("198.51.100.0")), int(IPv4Address("198.51.100.127"))),
            (int(IPv4Address("203.0.113.0")), int(IPv4Address("203.0.113.255"))),
        ),
        None,
    )


def test_the_rows_of_a_service_with_affinity_have_its_identity_in_common(cluster):
    rows = [row for row in rows_of(view(cluster, "node-1", not_yet=NOT_YET), Here((OWN,))) if row.affinity_s]
    assert {row.affinity_s for row in rows} == {600}
    assert len({row.identity for row in rows}) == 1
    assert 0 not in {row.identity for row in rows}
