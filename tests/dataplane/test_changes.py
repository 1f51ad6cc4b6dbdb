"""A node whose manifests change a little: as if all had been read again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node import MemoryNode

HOSTS = {"b": {"10.2.0.1"}, "c": {"10.2.0.2"}}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[MemoryNode]:
    return MemoryNode(tmp_path, {"allow-external-ips": "0.0.0.0/0"})


def service(name: str, port: dict[str, Any], **spec: Any) -> dict[str, Any]:
    ports = [{"protocol": "TCP", **port}]
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"ports": ports, **spec}}


def slice_of(name: str, *hosts: str, port: int = 8080) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-1", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [host]} for host in hosts],
        "ports": [{"name": "", "port": port}],
    }


def assert_served(node: MemoryNode, wanted: dict[str, str]) -> None:
    """Check {frontend: the name of its Service}, as it is shown and as packets find it."""
    assert {place: each["name"] for each in node.answer("services") for place in each["frontends"]} == wanted
    assert node.programmed() == {place: HOSTS[name] for place, name in wanted.items()}


def test_S13_a_node_port_gives_way_to_a_vip_of_the_nodes_own_and_comes_back(node, caplog):
    caplog.set_level(logging.WARNING)
    own = [str(network.node_interface.address.ip) for network in node.networks]
    at = [f"{address}:30080" for address in own]
    external = service("b", {"port": 30080}, externalIPs=own[:1])
    node_port = service("c", {"port": 80, "nodePort": 30080}, clusterIP="10.96.0.3", type="NodePort")
    slices = [slice_of(name, *hosts) for name, hosts in HOSTS.items()]
    only_c = {**dict.fromkeys(at, "c"), "10.96.0.3:80": "c"}
    said = f"Service default/c: spec.ports: node port {at[0]}/TCP is a VIP of Service port default/b:30080"

    node.reload(node_port, *slices)
    assert_served(node, only_c)
    for objects in ((external, node_port), (node_port, external)):
        node.reload(*objects, *slices)
        assert_served(node, {**only_c, at[0]: "b"})
        assert [record.message for record in caplog.records if said in record.message]
        caplog.clear()
        node.reload(node_port, *slices)
        assert_served(node, only_c)
    node.reload(external, *slices)
    node.reload(external, node_port, *slices)  # the node port comes behind
    assert_served(node, {**only_c, at[0]: "b"})
    assert [record.message for record in caplog.records if said in record.message]


def test_what_vips_of_the_nodes_own_do_not_concern_is_planned_alone(node):
    own = str(node.networks[0].node_interface.address.ip)
    external = service("b", {"port": 30080}, externalIPs=[own])
    node.reload(external, slice_of("b", "10.2.0.1"))
    assert not node.reload(external, slice_of("b", "10.2.0.1", "10.2.0.2"))
