"""After any changes one by one, everything is as if it had been read at once; and what is wrong is found as ever."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lb import manifests
from lb.errors import ManifestError
from lb.live import Changes, Live
from lb.manifests import Manifests, Reader
from lb.model import EndpointSlice, EndpointState, HealthCheck, NodeView, PortSpec, Service, SliceEndpoint, SlicePort
from lb.resolve import resolve
from lb.rows import NOTHING_HERE, Here, rows_of
from lb.table import ServiceTable
from xdp.byteorder import swap16, swap32
from xdp.errors import TableFullError
from xdp.schema import Protocol
from xdp.tables import Capacity, Tables

CAPACITY = Capacity(connections=10, frontends=64, services=64, maglev_slots=64 * 601, endpoints=64, next_hops=4)


def service(number: int, *ports: int) -> Service:
    specs = tuple(PortSpec(f"p{port}", port) for port in ports or (80,))
    return Service("shop", f"web-{number}", cluster_ips=(IPv4Address(f"10.96.0.{number}"),), ports=specs)


def part(number: int, of: int, *hosts: int, state: EndpointState = EndpointState.READY) -> EndpointSlice:
    endpoints = tuple(SliceEndpoint(IPv4Address(f"10.2.0.{host}"), state) for host in hosts)
    ports = (SlicePort("p80", 8080), SlicePort("p81", 8081))
    return EndpointSlice("shop", f"slice-{number}", f"web-{of}", "IPv4", ports, endpoints)


def changes(*objects: Service | EndpointSlice, gone: tuple[Service | EndpointSlice, ...] = ()) -> Changes:
    services: dict[tuple[str, str], Service | None] = {}
    slices: dict[tuple[str, str], EndpointSlice | None] = {}
    for each, value in [*((each, None) for each in gone), *((each, each) for each in objects)]:
        into: dict[Any, Any] = services if isinstance(each, Service) else slices
        into[each.namespace, each.name] = value
    return Changes(services, slices)


class Programmed:
    """Live Services and their table."""

    def __init__(self, here: Here = NOTHING_HERE) -> None:
        self.here = here
        self.live = Live()
        self.tables = Tables.in_memory(CAPACITY)
        self.table = ServiceTable(self.tables, 7, lambda _: 1)

    def change(self, change: Changes) -> set[str]:
        plan = self.live.plan(change, self.here)
        self.table.update(plan.rows, plan.without)
        left = self.live.commit(plan)
        self.table.release(self.table.take_parted())
        return {str(address) for address in left}

    def packets_see(self) -> dict[tuple[int, int, int], set[tuple[int, int]]]:
        """Return {frontend: its endpoints} as the tables have it, and what they have of VIPs."""
        found = {}
        for frontend in self.tables.frontends[self.tables.frontends["used"] == 1]:
            row = self.tables.services[frontend["service"]]
            slots = self.tables.maglev[row["first_slot"] : row["first_slot"] + row["slots"]]
            records = self.tables.endpoints[np.unique(slots)]
            key = (swap32(frontend["addr"]), swap16(frontend["port"]), int(frontend["protocol"]))
            found[key] = {(swap32(record["addr"]), swap16(record["port"])) for record in records}
        return found


def test_a_changed_slice_changes_its_service_and_no_other():
    node = Programmed()
    node.change(changes(service(1), service(2), part(1, 1, 1, 2), part(2, 2, 3)))
    before = node.tables.frontends.copy()
    plan = node.live.plan(changes(part(1, 1, 1)))
    assert [row.frontends for row in plan.rows] == [((IPv4Address("10.96.0.1"), 80, int(Protocol.TCP)),)]
    node.change(changes(part(1, 1, 1)))
    assert node.packets_see()[int(IPv4Address("10.96.0.1")), 80, 6] == {(int(IPv4Address("10.2.0.1")), 8080)}
    others = before["addr"] != swap32(int(IPv4Address("10.96.0.1")))
    assert (node.tables.frontends[others] == before[others]).all()


def test_what_changes_nothing_for_the_node_writes_nothing():
    node = Programmed()
    node.change(changes(service(1), part(1, 1, 1, 2)))
    plan = node.live.plan(changes(part(1, 1, 1, 2)))
    assert (plan.rows, plan.without) == ([], [])


def test_the_addresses_that_nobody_has_any_more_are_told():
    node = Programmed()
    node.change(changes(service(1), service(2), part(1, 1, 1, 2), part(2, 2, 2)))
    assert node.change(changes(part(1, 1))) == {"10.2.0.1"}
    assert node.change(changes(gone=(service(2),))) == {"10.2.0.2"}


def test_node_ports_come_and_go_at_the_addresses_of_the_node():
    node = Programmed(Here((IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2"))))
    node.change(changes(replace(service(1), ports=(PortSpec("p80", 80, node_port=30080),)), part(1, 1, 1)))
    places = {(int(IPv4Address(address)), 30080, int(Protocol.TCP)) for address in ("192.0.2.1", "192.0.2.2")}
    assert places < node.packets_see().keys()
    node.change(changes(service(1)))
    assert not places & node.packets_see().keys()


def test_S10_health_checks_follow_the_endpoints_here():
    live = Live(NodeView("n1"))
    asked = replace(service(1), external_traffic_policy="Local", health_check_node_port=32000)
    here = [SliceEndpoint(IPv4Address("10.2.0.1"), EndpointState.READY, node_name="n1")]
    for endpoints, count in ((here, 1), ([], 0)):
        live.commit(live.plan(changes(asked, replace(part(1, 1), endpoints=tuple(endpoints)))))
        assert live.snapshot().health_checks == tuple(
            HealthCheck("shop", "web-1", 32000, count, family) for family in (4, 6)
        )
        assert live.health_checks() == list(live.snapshot().health_checks)
    live.commit(live.plan(changes(gone=(asked,))))
    assert live.snapshot().health_checks == ()
    assert live.health_checks() == []


def test_a_plan_that_is_dropped_leaves_no_trace():
    node = Programmed()
    node.change(changes(service(1), part(1, 1, 1)))
    before = node.live.snapshot()
    node.live.plan(changes(service(1, 81), part(1, 1, 5), gone=(service(2),)))
    assert node.live.snapshot() == before
    assert node.live.plan(changes(part(1, 1, 1))).rows == []


@pytest.mark.faults(115, 116)
@pytest.mark.parametrize("seed", range(20))
def test_any_changes_end_where_reading_everything_ends(seed: int):
    choose = random.Random(seed)
    node = Programmed()
    services: dict[str, Service] = {}
    slices: dict[str, EndpointSlice] = {}
    for _ in range(40):
        come: list[Service | EndpointSlice] = []
        gone: list[Service | EndpointSlice] = []
        for _ in range(choose.randint(1, 3)):
            if choose.random() < 0.4:
                each = service(choose.randint(1, 4), *choose.sample((80, 81), choose.randint(1, 2)))
                (come if choose.random() < 0.7 else gone).append(each)
            else:
                states = tuple(EndpointState)
                hosts = choose.sample(range(1, 9), choose.randint(0, 4))
                of_slice = part(choose.randint(1, 5), choose.randint(1, 5), *hosts, state=choose.choice(states))
                (come if choose.random() < 0.8 else gone).append(of_slice)
        change = changes(*come, gone=tuple(gone))
        for known, changed in ((services, change.services), (slices, change.slices)):
            for (_, name), value in changed.items():
                if value is None:
                    known.pop(name, None)
                else:
                    known[name] = value  # type: ignore[index,assignment]
        node.change(change)
        whole = resolve(services.values(), slices.values())
        assert sorted(map(_comparable, node.live.snapshot().ports)) == sorted(map(_comparable, whole.ports))
        assert set(node.live.snapshot().not_honoured) == set(whole.not_honoured)
        assert node.live.services == len({(port.namespace, port.name) for port in whole.ports})
        assert node.live.endpoints == len({(e.address, e.port) for port in whole.ports for e in port.cluster})
        other = Programmed()
        other.table.apply(rows_of(whole))
        assert node.packets_see() == other.packets_see()


def _comparable(port: Any) -> tuple[Any, ...]:
    return (*port.identity, port.frontends, sorted(port.endpoints), sorted(port.cluster), port.options == port.options)


# Files.


def _objects(choose: random.Random) -> list[dict[str, Any]]:
    """Return objects as manifests write them, of which now and then two do not fit together."""
    made: list[dict[str, Any]] = []
    for _ in range(choose.randint(0, 2)):
        number = choose.randint(1, 9)
        metadata = {"name": f"web-{number}"}
        if choose.random() < 0.5:
            spec: dict[str, Any] = {"clusterIP": f"10.96.0.{choose.randint(1, 12)}", "ports": [{"port": 80}]}
            if choose.random() < 0.2:
                spec["externalIPs"] = [f"10.2.0.{choose.randint(1, 40)}"]
            if choose.random() < 0.1:
                spec["ports"][0] |= {"name": "a", "nodePort": 30000 + number}
                spec["ports"].append({"name": "b", "port": 81, "nodePort": 30000 + choose.randint(1, 20)})
            made.append({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
        else:
            host = f"10.96.0.{number}" if choose.random() < 0.05 else f"10.2.0.{choose.randint(1, 40)}"
            labels = {"kubernetes.io/service-name": f"web-{choose.randint(1, 9)}"}
            made.append(
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {**metadata, "labels": labels},
                    "addressType": "IPv4",
                    "endpoints": [{"addresses": [host]}],
                    "ports": [{"port": 8080}],
                }
            )
    if choose.random() < 0.03:
        made.append({"kind": "Pod"})
    return made


def _read(folder: Path) -> Manifests | str:
    try:
        return manifests.load([str(folder)])
    except ManifestError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(20))
def test_reading_what_changed_tells_what_reading_everything_tells(seed: int, tmp_path: Path):
    choose = random.Random(seed)
    reader = Reader([str(tmp_path)])
    reader.load()
    services: dict[tuple[str, str], Service] = {}
    slices: dict[tuple[str, str], EndpointSlice] = {}
    quick = 0
    for turn in range(60):
        names = set()
        for _ in range(choose.randint(1, 2)):
            path = tmp_path / f"{choose.randint(1, 8)}.json"
            names.add(str(path))
            if choose.random() < 0.2:
                path.unlink(missing_ok=True)
                continue
            aside = tmp_path / f".{turn}"
            aside.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": _objects(choose)}))
            aside.rename(path)
        whole = _read(tmp_path)
        change = reader.reload(names)
        if change is None:
            if isinstance(whole, str):
                with pytest.raises(ManifestError) as caught:
                    reader.load()
                assert str(caught.value) == whole
                continue
            found = reader.load()
            services = {(each.namespace, each.name): each for each in found.services}
            slices = {(each.namespace, each.name): each for each in found.slices}
        else:
            quick += 1
            for known, changed in ((services, change.services), (slices, change.slices)):
                known.update(changed)  # type: ignore[arg-type]
                for name in [name for name, value in known.items() if value is None]:
                    del known[name]
        assert not isinstance(whole, str)
        assert sorted(services) == sorted((each.namespace, each.name) for each in whole.services)
        assert all(services[each.namespace, each.name] == each for each in whole.services)
        assert sorted(slices) == sorted((each.namespace, each.name) for each in whole.slices)
        assert all(slices[each.namespace, each.name] == each for each in whole.slices)
    assert quick > 5


@pytest.mark.faults(102)
def test_a_row_that_finds_no_room_leaves_services_and_table_as_they_were():
    node = Programmed()
    node.change(changes(service(1), part(1, 1, 1)))
    seen, before = node.packets_see(), node.live.snapshot()
    many = changes(*(service(1, *range(1, 70)),))
    plan = node.live.plan(many)
    with pytest.raises(TableFullError, match="this version has room for"):
        node.table.update(plan.rows, plan.without)
    assert (node.packets_see(), node.live.snapshot()) == (seen, before)
