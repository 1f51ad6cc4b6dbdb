"""What follows from Services and slices: the rules one by one, by their ids in docs/behaviours.md."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.model import (
    Endpoint,
    EndpointSlice,
    EndpointState,
    FrontendKind,
    Ingress,
    NodeView,
    Options,
    PortSpec,
    Service,
    ServicePort,
    SliceEndpoint,
    SlicePort,
    claims,
)
from lb.not_yet import NOT_YET
from lb.resolve import ranges_of_family, resolve
from lb.rows import ranges_of, rows_of
from xdp.schema import Protocol

READY, SERVING = EndpointState.READY, EndpointState.SERVING
TERMINATING, UNREADY = EndpointState.TERMINATING, EndpointState.UNREADY
HERE = NodeView("node-1", "zone-a")
VIP = ip_address("10.96.0.10")


def service(**fields: object) -> Service:
    settings = {"cluster_ips": (VIP,), "ports": (PortSpec("http", 80),), **fields}
    return Service("shop", "web", **settings)  # type: ignore[arg-type]


def endpoint(address: str, state: EndpointState = READY, node: str | None = None, **fields: object) -> SliceEndpoint:
    return SliceEndpoint(ip_address(address), state, node, **fields)  # type: ignore[arg-type]


def slice_of(*endpoints: SliceEndpoint, name: str = "web-1", **fields: object) -> EndpointSlice:
    settings = {"service_name": "web", "address_type": "IPv4", "ports": (SlicePort("http", 8080),), **fields}
    return EndpointSlice("shop", name, endpoints=endpoints, **settings)  # type: ignore[arg-type]


def resolved(service_: Service, *slices: EndpointSlice, node: NodeView = HERE, **options: object) -> list[ServicePort]:
    snapshot = resolve([service_], slices, node, **{"not_yet": {}, **options})  # type: ignore[arg-type]
    return list(snapshot.ports)


def spots(endpoints: tuple[Endpoint, ...]) -> list[str]:
    return [f"{endpoint.address}:{endpoint.port}" for endpoint in endpoints]


def test_S1_a_port_is_known_by_its_name_or_else_its_number():
    named, nameless = service(), service(ports=(PortSpec("", 80),))
    assert [port.key for port in resolved(named) + resolved(nameless)] == ["shop/web:http", "shop/web:80"]


@pytest.mark.parametrize(
    "ignored",
    [
        pytest.param(service(type="ExternalName"), id="S2-external-name"),
        pytest.param(service(is_headless=True, cluster_ips=()), id="S3-headless"),
        pytest.param(service(proxy_name=""), id="S1-proxy-name-empty"),
        pytest.param(service(proxy_name="cilium"), id="S1-proxy-name"),
    ],
)
def test_services_that_are_not_ours_are_skipped_whole(ignored):
    assert resolved(ignored, slice_of(endpoint("10.0.0.1"))) == []
    assert list(claims(ignored)) == []


def test_S3_a_service_without_any_address_is_named():
    snapshot = resolve([service(cluster_ips=())], [])
    assert snapshot.ports == ()
    assert [entry.field for entry in snapshot.not_honoured] == ["spec.clusterIP"]


def test_a_node_port_that_nobody_has_given_is_named():
    ports = (PortSpec("http", 80, node_port=30080), PortSpec("adm", 81))
    named = [entry.field for entry in resolve([service(type="NodePort", ports=ports)], []).not_honoured]
    assert named == ["spec.ports[1].nodePort"]
    assert not resolve([service(type="LoadBalancer", ports=ports)], []).not_honoured  # it need not have any


def test_S4_the_same_number_with_two_protocols_is_two_ports():
    dns = service(ports=(PortSpec("dns", 53, "UDP"), PortSpec("dns-tcp", 53, "TCP")))
    part = slice_of(endpoint("10.0.0.1"), ports=(SlicePort("dns", 5353, "UDP"), SlicePort("dns-tcp", 5354, "TCP")))
    assert {port.protocol: spots(port.cluster) for port in resolved(dns, part)} == {
        "UDP": ["10.0.0.1:5353"],
        "TCP": ["10.0.0.1:5354"],
    }


def test_S5_external_addresses_are_served_only_from_the_list():
    external = service(external_ips=(ip_address("192.0.2.1"), ip_address("198.51.100.1")))
    snapshot = resolve([external], [], HERE, (ip_network("192.0.2.0/24"),))
    assert [str(frontend.address) for frontend in snapshot.ports[0].frontends] == ["10.96.0.10", "192.0.2.1"]
    assert [str(entry) for entry in snapshot.not_honoured] == [
        "Service shop/web: spec.externalIPs[1]: 198.51.100.1 is in no network of --allow-external-ips; left out"
    ]


def test_an_address_that_is_written_twice_is_one_frontend():
    twice = service(ingress=(Ingress(VIP, 0), Ingress(ip_address("192.0.2.1"), 1), Ingress(ip_address("192.0.2.1"), 2)))
    assert [frontend.kind for frontend in resolved(twice)[0].frontends] == [
        FrontendKind.CLUSTER_IP,
        FrontendKind.LOAD_BALANCER,
    ]


@pytest.mark.parametrize(("pods4", "pods6", "told"), [(1, 1, {4: 1, 6: 1}), (0, 2, {4: 0, 6: 2}), (2, 0, {4: 2, 6: 0})])
def test_S10_a_pod_of_two_families_is_one_endpoint_to_who_asks_in_one(pods4, pods6, told):
    asked = service(cluster_ips=(VIP, ip_address("fd00::10")), health_check_node_port=32000)
    slices = [
        slice_of(*[endpoint(f"10.0.0.{n}", node="node-1") for n in range(pods4)]),
        slice_of(*[endpoint(f"fd00::{n}", node="node-1") for n in range(pods6)], address_type="IPv6", name="web-2"),
    ]
    assert {check.family: check.local_endpoints for check in resolve([asked], slices, HERE).health_checks} == told


@pytest.mark.parametrize(("cluster_ip", "told"), [(VIP, 1), (ip_address("fd00::10"), 2)], ids=str)
def test_S10_of_a_service_of_one_family_it_is_meant_over_either(cluster_ip, told):
    asked = service(cluster_ips=(cluster_ip,), health_check_node_port=32000)
    slices = [
        slice_of(endpoint("10.0.0.1", node="node-1")),
        slice_of(*[endpoint(f"fd00::{n}", node="node-1") for n in (1, 2)], address_type="IPv6", name="web-2"),
    ]
    checks = resolve([asked], slices, HERE).health_checks
    assert [(check.family, check.local_endpoints) for check in checks] == [(4, told), (6, told)]


@pytest.mark.parametrize("allowed", [(), (ip_network("192.0.2.0/24"),)], ids=["not-allowed", "allowed"])
def test_S6_S7_an_address_of_a_load_balancer_is_that_though_it_is_an_external_one_too(allowed):
    balanced = ip_address("192.0.2.1")
    ranges = (ip_network("203.0.113.0/24"),)
    both = service(external_ips=(balanced,), ingress=(Ingress(balanced, 0),), source_ranges=ranges)
    snapshot = resolve([both], [], HERE, allowed)
    (port,) = snapshot.ports
    assert [(frontend.kind, frontend.address) for frontend in port.frontends] == [
        (FrontendKind.CLUSTER_IP, VIP),
        (FrontendKind.LOAD_BALANCER, balanced),
    ]
    assert snapshot.not_honoured == ()
    (filtered,) = [row for row in rows_of(snapshot) if row.frontends == ((balanced, 80, int(Protocol.TCP)),)]
    assert filtered.ranges == ranges_of(ranges)


def test_S7_source_ranges_hold_at_a_cluster_ip_that_a_load_balancer_has_too():
    both = service(ingress=(Ingress(VIP, 0),), source_ranges=(ip_network("203.0.113.0/24"),))
    assert [frontend.kind for frontend in resolved(both)[0].frontends] == [FrontendKind.LOAD_BALANCER]


@pytest.mark.parametrize(
    ("ranges", "filter4"),
    [
        ([], None),
        (["203.0.113.0/24"], ["203.0.113.0/24"]),
        (["203.0.113.0/24", "0.0.0.0/0"], None),
        (["2001:db8::/32"], None),
        (["2001:db8::/32", "203.0.113.0/24"], ["203.0.113.0/24"]),
    ],
    ids=["absent", "one", "everybody", "other-family", "both-families"],
)
def test_S7_source_ranges_of_a_family(ranges, filter4):
    expected = None if filter4 is None else tuple(map(ip_network, filter4))
    assert ranges_of_family([ip_network(text) for text in ranges], 4) == expected


def test_S8_S9_the_policies_choose_the_list():
    local = service(
        internal_traffic_policy="Local", external_traffic_policy="Cluster", ports=(PortSpec("http", 80, "TCP", 30080),)
    )
    (port,) = resolved(local, slice_of(endpoint("10.0.0.1", node="node-1"), endpoint("10.0.0.2", node="node-2")))
    assert spots(port.candidates(FrontendKind.CLUSTER_IP)) == ["10.0.0.1:8080"]
    assert spots(port.candidates(FrontendKind.NODE_PORT)) == ["10.0.0.1:8080", "10.0.0.2:8080"]


@pytest.mark.faults(115)
def test_E1_slices_join_by_label_namespace_and_family():
    web = service(cluster_ips=(VIP, ip_address("fd00::10")))
    slices = [
        slice_of(endpoint("10.0.0.1")),
        slice_of(endpoint("fd00::1"), address_type="IPv6", name="web-2"),
        slice_of(endpoint("10.0.0.2"), service_name=None, name="web-3"),
        slice_of(endpoint("10.0.0.3"), service_name="other", name="web-4"),
        slice_of(endpoint("10.0.0.4"), is_headless=True, name="web-5"),
        slice_of(endpoint("10.0.0.5"), proxy_name="x", name="web-6"),
        slice_of(address_type="FQDN", name="web-7"),
        EndpointSlice("other", "web-1", "web", "IPv4", (SlicePort("http", 8080),), (endpoint("10.0.0.6"),)),
    ]
    assert [(port.family, spots(port.cluster)) for port in resolved(web, *slices)] == [
        (4, ["10.0.0.1:8080"]),
        (6, ["fd00::1:8080"]),
    ]


@pytest.mark.faults(115)
@pytest.mark.parametrize("port", [SlicePort(None, 8080), SlicePort("http", None), SlicePort("http", 0)])
def test_E2_a_slice_port_without_name_or_number_is_ignored(port):
    assert resolved(service(), slice_of(endpoint("10.0.0.1"), ports=(port,)))[0].endpoints == ()


@pytest.mark.faults(115)
def test_E2_an_empty_name_is_a_name_and_slices_may_differ_in_number():
    nameless = service(ports=(PortSpec("", 80),))
    slices = [
        slice_of(endpoint("10.0.0.1"), ports=(SlicePort("", 1111),)),
        slice_of(endpoint("10.0.0.2"), ports=(SlicePort("", 2222),), name="web-2"),
    ]
    assert spots(resolved(nameless, *slices)[0].cluster) == ["10.0.0.1:1111", "10.0.0.2:2222"]


@pytest.mark.faults(115)
@pytest.mark.parametrize(
    ("first", "second", "state"),
    [
        (TERMINATING, READY, READY),
        (READY, SERVING, READY),
        (SERVING, UNREADY, UNREADY),
        (TERMINATING, SERVING, SERVING),
    ],
)
def test_E4_an_endpoint_in_two_slices_is_one_and_as_alive_as_the_livelier_says(first, second, state):
    slices = [slice_of(endpoint("10.0.0.1", first)), slice_of(endpoint("10.0.0.1", second), name="web-2")]
    assert [e.state for e in resolved(service(), *slices)[0].endpoints] == [state]


@pytest.mark.faults(115)
@pytest.mark.parametrize(
    ("states", "chosen"),
    [
        ([READY, SERVING], [0]),
        ([UNREADY, SERVING, TERMINATING], [1]),
        ([UNREADY, TERMINATING], []),
        ([], []),
    ],
)
def test_E5_ready_endpoints_or_else_those_that_still_serve(states, chosen):
    (port,) = resolved(service(), slice_of(*[endpoint(f"10.0.0.{n}", state) for n, state in enumerate(states)]))
    assert spots(port.cluster) == [f"10.0.0.{n}:8080" for n in chosen]
    assert len(port.endpoints) == len(states)


def hinted(zones: tuple[str, ...] = (), nodes: tuple[str, ...] = ()) -> dict[str, object]:
    return {"zone_hints": zones, "node_hints": nodes}


@pytest.mark.faults(115)
@pytest.mark.parametrize(
    ("hints", "chosen"),
    [
        ([hinted(("zone-a",)), hinted(("zone-b",)), hinted(("zone-a", "zone-b"))], [0, 2]),
        ([hinted(("zone-a",)), hinted(("zone-b",)), hinted()], [0, 1, 2]),
        ([hinted(("zone-b",)), hinted(("zone-c",)), hinted(("zone-b",))], [0, 1, 2]),
        ([hinted((), ("node-1",)), hinted((), ("node-2",)), hinted((), ("node-1",))], [0, 2]),
        (
            [hinted(("zone-a",), ("node-2",)), hinted(("zone-b",), ("node-3",)), hinted(("zone-a",), ("node-3",))],
            [0, 2],
        ),
        ([hinted(("zone-a",), ("node-1",)), hinted(("zone-a",), ("node-2",)), hinted(("zone-a",))], [0, 1, 2]),
    ],
    ids=["zone", "one-without", "no-zone-names-me", "node", "node-names-others-then-zone", "node-hints-incomplete"],
)
def test_E6_topology(hints, chosen):
    endpoints = [endpoint(f"10.0.0.{number}", **fields) for number, fields in enumerate(hints)]
    (port,) = resolved(service(), slice_of(*endpoints))
    assert spots(port.cluster) == [f"10.0.0.{number}:8080" for number in chosen]


def test_E6_an_unready_endpoint_needs_no_hint_and_the_fallback_has_no_topology():
    ready = slice_of(endpoint("10.0.0.1", zone_hints=("zone-a",)), endpoint("10.0.0.2", UNREADY))
    assert spots(resolved(service(), ready)[0].cluster) == ["10.0.0.1:8080"]
    fallback = slice_of(
        endpoint("10.0.0.1", SERVING, zone_hints=("zone-a",)), endpoint("10.0.0.2", SERVING, zone_hints=("zone-b",))
    )
    assert len(resolved(service(), fallback)[0].cluster) == 2


def test_E7_the_local_list_knows_no_topology_and_falls_back_by_itself():
    part = slice_of(
        endpoint("10.0.0.1", SERVING, "node-1", zone_hints=("zone-b",)),
        endpoint("10.0.0.2", READY, "node-2", zone_hints=("zone-b",)),
    )
    (port,) = resolved(service(), part)
    assert spots(port.cluster) == ["10.0.0.2:8080"]
    assert spots(port.local) == ["10.0.0.1:8080"]


def test_a_node_without_a_name_has_no_local_endpoints():
    (port,) = resolved(service(), slice_of(endpoint("10.0.0.1"), endpoint("10.0.0.2", node="n")), node=NodeView())
    assert port.local == ()


def test_weights_are_by_address():
    weighted = service(options=Options(weights=((ip_address("10.0.0.2"), 5),)))
    part = slice_of(endpoint("10.0.0.1"), endpoint("10.0.0.2"))
    assert [e.weight for e in resolved(weighted, part)[0].endpoints] == [1, 5]


def test_every_option_that_is_not_honoured_is_named():
    wishes = Options(
        forwarding="ipip",
        scheduler="least-connections",
        admit="xdp",
        when_stalled="pass",
        mid_stream="reset",
        endpoint_removed="reset",
        weights=((ip_address("10.0.0.2"), 5),),
        timeouts_s=(("udp", 5),),
    )
    names = [entry.field for entry in resolve([service(options=wishes)], []).not_honoured]
    assert names == ["metadata.annotations[turnout.dev/forwarding]"]
    assert resolve([service(options=wishes)], [], not_yet={}).not_honoured == ()


def test_a_feature_that_is_there_is_honoured_everywhere():
    everything = service(
        cluster_ips=(VIP, ip_address("fd00::10")),
        ports=(PortSpec("http", 80, "TCP", 30080), PortSpec("sctp", 80, "SCTP", 30081)),
        external_traffic_policy="Local",
        internal_traffic_policy="Local",
        affinity_s=60,
        health_check_node_port=30090,
        ingress=(Ingress(ip_address("192.0.2.1"), 0),),
        source_ranges=(ip_network("203.0.113.0/24"),),
    )
    part = slice_of(endpoint("10.0.0.1", zone_hints=("zone-a",)))
    refused = resolve([everything], [part], not_yet=NOT_YET)
    assert [(port.family, port.protocol) for port in refused.ports] == [(4, "TCP"), (6, "TCP")]
    assert [entry.field for entry in refused.not_honoured] == [
        "spec.ports[1].protocol",
        "spec.externalTrafficPolicy",
        "spec.internalTrafficPolicy",
        "spec.healthCheckNodePort",
        "endpoints[].hints",
    ]
    assert refused.health_checks == ()
    assert resolve([everything], [part], HERE, not_yet={}).not_honoured == ()


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(EndpointState)), max_size=12), st.randoms())
def test_the_order_of_slices_and_endpoints_changes_no_choice(written, random):
    parts = [
        slice_of(endpoint(f"10.0.0.{number}", state), name=f"web-{index}")
        for index, (number, state) in enumerate(written)
    ]
    (before,) = resolved(service(), *parts)
    random.shuffle(parts)
    (after,) = resolved(service(), *parts)
    assert set(before.cluster) == set(after.cluster)
    assert set(before.endpoints) == set(after.endpoints)
    assert all(e.state in (READY, SERVING) for e in before.cluster)
