"""From Service ports to rows of the packet path."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

import pytest

from conntrack import states
from lb import annotations
from lb.annotations import read_options
from lb.model import (
    AdminState,
    EndpointSlice,
    EndpointState,
    Ingress,
    NodeView,
    Options,
    PortSpec,
    Said,
    Service,
    SliceEndpoint,
    SlicePort,
)
from lb.resolve import resolve
from lb.rows import NOTHING_HERE, Here, ServiceRow, has_endpoint, living, ranges_of, rows_of
from xdp.addresses import number_of
from xdp.names import Names
from xdp.schema import Masquerade, MidStream, Protocol, WhenStalled
from xdp.tables import Capacity, Tables

VIP, BALANCER, HERE, THERE = (IPv4Address(text) for text in ("10.96.0.10", "192.0.2.1", "10.0.0.1", "10.0.0.2"))
TCP = int(Protocol.TCP)
LOCAL = frozenset({(HERE, 8080)})
SLICE = EndpointSlice(
    "shop", "web-1", "web", "IPv4", (SlicePort("http", 8080),),
    (SliceEndpoint(HERE, EndpointState.READY, "node-1"), SliceEndpoint(THERE, EndpointState.READY, "node-2")),
)  # fmt: skip


def rows(here: Here = NOTHING_HERE, **fields: object) -> list[ServiceRow]:
    settings = {"cluster_ips": (VIP,), "ports": (PortSpec("http", 80),), **fields}
    service = Service("shop", "web", **settings)  # type: ignore[arg-type]
    return rows_of(resolve([service], [SLICE], NodeView("node-1"), not_yet={}), here)


def test_frontends_with_the_same_candidates_share_a_row():
    assert rows(ingress=(Ingress(BALANCER, 0),)) == [
        ServiceRow(((VIP, 80, TCP), (BALANCER, 80, TCP)), ((HERE, 8080), (THERE, 8080)), local=LOCAL)
    ]


def test_a_policy_of_some_frontends_makes_a_row_of_their_own():
    assert rows(ingress=(Ingress(BALANCER, 0),), external_traffic_policy="Local") == [
        ServiceRow(((VIP, 80, TCP),), ((HERE, 8080), (THERE, 8080)), local=LOCAL),
        ServiceRow(((BALANCER, 80, TCP),), ((HERE, 8080),), local=LOCAL),
    ]


def test_T8_a_row_says_that_its_endpoints_are_elsewhere():
    service = Service("shop", "web", cluster_ips=(VIP,), ports=(PortSpec("http", 80),), internal_traffic_policy="Local")
    (elsewhere,) = rows_of(resolve([service], [SLICE], NodeView("node-3"), not_yet={}))
    assert elsewhere == ServiceRow(((VIP, 80, TCP),), (), is_elsewhere=True)
    (nowhere,) = rows_of(resolve([service], [], NodeView("node-3"), not_yet={}))
    assert nowhere == ServiceRow(((VIP, 80, TCP),), ())


def test_S7_source_ranges_are_those_of_the_load_balancers_address_only():
    ranges = (ip_network("203.0.113.128/25"), ip_network("198.51.100.0/25"), ip_network("203.0.113.0/24"))
    internal, external = rows(ingress=(Ingress(BALANCER, 0),), source_ranges=ranges)
    assert (internal.frontends, internal.ranges) == (((VIP, 80, TCP),), None)
    assert (external.frontends, external.endpoints) == (((BALANCER, 80, TCP),), internal.endpoints)
    first, last = int(IPv4Address("198.51.100.0")), int(IPv4Address("203.0.113.255"))
    assert external.ranges == ((first, first + 127), (last - 255, last))


def test_both_families_of_a_service_have_rows_of_their_own():
    vip, pod, here = (ip_address(text) for text in ("2001:db8:96::10", "2001:db8::1", "2001:db8:ffff::1"))
    slice6 = EndpointSlice(
        "shop", "web-6", "web", "IPv6", (SlicePort("http", 8080),), (SliceEndpoint(pod, EndpointState.READY),)
    )
    service = Service("shop", "web", cluster_ips=(VIP, vip), ports=(PortSpec("http", 80, node_port=30080),))
    snapshot = resolve([service], [SLICE, slice6], NodeView("node-1"), not_yet={})
    four, six = rows_of(snapshot, Here(node_port_addresses=(HERE, here)))
    assert four.frontends == ((VIP, 80, TCP), (HERE, 30080, TCP))
    assert six == ServiceRow(((vip, 80, TCP), (here, 30080, TCP)), ((pod, 8080),))
    tables = Tables.in_memory(Capacity(connections=1, maglev_slots=16, names=8))
    names = Names(tables)
    numbers = [names.intern(address) for address in (vip, pod)]
    assert list(living(snapshot, NOTHING_HERE, TCP | Protocol.IPV6, names)) == [((numbers[0], 80), (numbers[1], 8080))]
    assert next(living(snapshot, NOTHING_HERE, TCP, names)) == ((int(VIP), 80), (int(HERE), 8080))


def test_S7_a_filter_without_entries_is_no_lack_of_a_filter():
    assert ranges_of(None) is None
    assert ranges_of(()) == ()


def test_S7_source_ranges_are_merged_in_each_family():
    ranges = [ip_network(text) for text in ("2001:db8:1::/48", "10.0.0.0/8", "2001:db8::/48", "2600::/16")]
    first, last = number_of(ip_address("2001:db8::")), number_of(ip_address("2001:db8:1:ffff:ffff:ffff:ffff:ffff"))
    assert ranges_of(ranges) == (
        (0x0A000000, 0x0AFFFFFF),
        (first, last),
        (number_of(ip_address("2600::")), number_of(ip_address("2600:ffff:ffff:ffff:ffff:ffff:ffff:ffff"))),
    )


def test_a_service_port_without_endpoints_has_a_row():
    assert rows(ports=(PortSpec("other", 81),)) == [ServiceRow(((VIP, 81, TCP),), ())]


def test_what_happens_while_userspace_stalls_is_in_the_row():
    (row,) = rows(options=Options(when_stalled="pass"))
    assert row.when_stalled is WhenStalled.PASS


def test_L_who_is_drained_is_no_candidate_and_who_is_in_maintenance_does_not_live():
    service = Service("shop", "web", cluster_ips=(VIP,), ports=(PortSpec("http", 80),))
    snapshot = resolve([service], [SLICE], NodeView("node-1"), not_yet={})
    names = Names(Tables.in_memory(Capacity(connections=1, maglev_slots=16, names=8)))
    for state, lives in ((AdminState.DRAIN, 2), (AdminState.MAINT, 1)):
        here = Here(administered={(HERE, 8080): Said(state), (THERE, 9090): Said(state)})
        (row,) = rows_of(snapshot, here)
        assert row.endpoints == ((THERE, 8080),)
        assert len([*living(snapshot, here, TCP, names)]) == lives


def test_L_a_service_port_whose_last_endpoint_is_taken_out_is_without_one():
    service = Service("shop", "web", cluster_ips=(VIP,), ports=(PortSpec("http", 80),))
    (port,) = resolve([service], [SLICE], NodeView("node-1"), not_yet={}).ports
    usable = [(each.address, each.port) for each in port.cluster]
    for taken in range(len(usable) + 1):
        said = dict.fromkeys(usable[:taken], Said(AdminState.DRAIN))
        assert has_endpoint(port, Here(administered=said)) == (taken < len(usable))


def test_C5_timeouts_are_in_the_row_as_the_flow_table_numbers_them():
    quick = Options(timeouts_s=(("udp", 5),))
    service = Service("shop", "web", cluster_ips=(VIP,), ports=(PortSpec("http", 80),), options=quick)
    snapshot = resolve([service], [SLICE], NodeView("node-1"), not_yet={})
    here = Here(timeout_sets={(("udp", 9),): 16, quick.timeouts_s: 32})
    assert [row.timeouts for row in rows_of(snapshot, here)] == [32]
    assert here.has_timeouts([service, Service("shop", "other")])
    assert not Here().has_timeouts([service])


def test_C5_every_name_that_a_service_may_write_is_that_of_a_timeout():
    problems: list[Any] = []
    for name in states.NAMED:
        options = read_options({"turnout.dev/timeouts": f"{name}=1s"}, lambda *problem: problems.append(problem))
        assert options.timeouts_s == ((name, 1),)
    assert not problems
    assert {*annotations._TIMEOUTS} == {*states.NAMED}


def test_T6_a_node_port_is_a_frontend_at_every_address_that_serves_them():
    own = (IPv4Address("10.9.0.1"), IPv4Address("10.9.1.1"))
    fields = {"cluster_ips": (VIP,), "ports": (PortSpec("http", 80, node_port=30080),)}
    service = Service("shop", "web", external_traffic_policy="Local", **fields)
    snapshot = resolve([service], [SLICE], NodeView("node-1"), not_yet={})
    assert rows_of(snapshot, Here(own)) == [
        ServiceRow(((VIP, 80, TCP),), ((HERE, 8080), (THERE, 8080)), local=LOCAL),
        ServiceRow(((own[0], 30080, TCP), (own[1], 30080, TCP)), ((HERE, 8080),), local=LOCAL),
    ]


EXTERNAL = {"ingress": (Ingress(BALANCER, 0),), "external_traffic_policy": "Cluster"}
LOCAL_POLICY = {"ingress": (Ingress(BALANCER, 0),), "external_traffic_policy": "Local"}
M = Masquerade


@pytest.mark.parametrize(
    ("here", "fields", "cluster_ip", "balancer"),
    [
        pytest.param(Here(), EXTERNAL, M.NOBODY, M.NOBODY, id="unless-asked-nobody"),
        pytest.param(Here(knows_inside=(4,)), EXTERNAL, M.NOBODY, M.NOBODY, id="none-is-none"),
        pytest.param(Here(masquerade="external"), EXTERNAL, M.NOBODY, M.REMOTE, id="T3"),
        pytest.param(Here(masquerade="external", knows_inside=(4,)), EXTERNAL, M.OUTSIDE, M.REMOTE, id="T2"),
        pytest.param(Here(masquerade="all"), EXTERNAL, M.EVERYBODY, M.REMOTE, id="T2-all"),
        pytest.param(Here(masquerade="all"), LOCAL_POLICY, M.EVERYBODY, M.NOBODY, id="T3-local-never"),
    ],
)
def test_who_is_masqueraded(here: Here, fields: dict[str, Any], cluster_ip: Masquerade, balancer: Masquerade):
    found = {address: row.masquerade for row in rows(here, **fields) for address, _, _ in row.frontends}
    assert found == {VIP: cluster_ip, BALANCER: balancer}


def test_T4_clients_inside_the_cluster_have_all_endpoints_of_a_local_policy():
    _, plain = rows(**LOCAL_POLICY)
    assert plain.inside is None
    _, external = rows(Here(knows_inside=(4,), masquerade="external"), **LOCAL_POLICY)
    assert external.endpoints == ((HERE, 8080),)
    assert external.inside == ServiceRow((), ((HERE, 8080), (THERE, 8080)), local=LOCAL)
    assert external.tells_packets
    assert all(row.inside is None for row in rows(Here(knows_inside=(4,)), **EXTERNAL))


def test_T4_so_have_sockets_of_the_node_whose_packets_tell_nothing():
    cluster_ip, external = rows(Here(leads_clients=True), **LOCAL_POLICY)
    assert cluster_ip.inside is None
    assert external.inside == ServiceRow((), ((HERE, 8080), (THERE, 8080)), local=LOCAL)
    assert not external.tells_packets
    _, known = rows(Here(leads_clients=True, knows_inside=(4,)), **LOCAL_POLICY)
    assert known.tells_packets


def test_C11_with_source_ranges_what_would_be_passed_is_reset():
    options, ranges = Options(mid_stream="pass"), (ip_network("10.0.0.0/8"),)
    internal, external = rows(ingress=(Ingress(BALANCER, 0),), source_ranges=ranges, options=options)
    assert (internal.mid_stream, external.mid_stream) == (MidStream.PASS, MidStream.RESET)


def test_L_an_endpoint_without_weight_gets_no_new_connections():
    (row,) = rows(options=Options(weights=((HERE, 0), (THERE, 3))))
    assert (row.endpoints, row.weights) == (((THERE, 8080),), ())
    (row,) = rows(options=Options(weights=((THERE, 3),)))
    assert (row.endpoints, row.weights) == (
        ((HERE, 8080), (THERE, 8080)),
        (((HERE, 8080), 1), ((THERE, 8080), 3)),
    )
    (row,) = rows(options=Options(weights=((HERE, 0), (THERE, 0))))
    assert (row.endpoints, row.is_elsewhere) == ((), False)
