"""A node whose manifests change a little: as if all had been read again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from dataplane import jobs, reloading
from dataplane import node as node_module
from dataplane.in_force import InForce
from dataplane.nexthops import NextHops
from lb.live import Live
from lb.table import Change
from tests.memory_node import MemoryNode
from tests.packets import syn, udp
from tests.services import Service, write_manifests
from xdp.addresses import address_of, number_of
from xdp.errors import TableFullError, UsageError

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


def test_S13_a_node_port_gives_way_when_the_node_gets_the_address_of_a_vip(node, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    external = service("b", {"port": 30080}, externalIPs=["192.0.2.1"])
    node_port = service("c", {"port": 80, "nodePort": 30080}, clusterIP="10.96.0.3", type="NodePort")
    node.reload(external, node_port, *[slice_of(name, *hosts) for name, hosts in HOSTS.items()])
    assert "192.0.2.1:30080" not in caplog.text
    monkeypatch.setattr(node._node.next_hops, "node_port_addresses", lambda _: (ip_address("192.0.2.1"),))
    node._node.in_force.reprogram()
    assert_served(node, {"192.0.2.1:30080": "b", "10.96.0.3:80": "c"})
    assert caplog.text.count("node port 192.0.2.1:30080/TCP is a VIP of Service port default/b:30080") == 1


def test_status_looks_at_no_service_and_at_no_next_hop_that_is_well(node, monkeypatch):
    """Of both there may be a hundred thousand, and new next hops are not resolved meanwhile."""
    hosts = [f"10.2.{number >> 8}.{number & 255}" for number in range(1, 121)]  # no route leads there
    near = str(next(iter(node.networks[0].hosts.values())).address.ip)
    node.reload(service("b", {"port": 80}, clusterIP="10.96.0.2"), slice_of("b", *hosts, near))
    node.reload(
        service("b", {"port": 80}, clusterIP="10.96.0.2"),
        service("c", {"port": 80}, clusterIP="10.96.0.3"),
        slice_of("b", *hosts, near),
        slice_of("c", hosts[0], near),
    )
    monkeypatch.setattr(InForce, "snapshot", property(lambda _: pytest.fail("a look at all Services")))
    describe = NextHops.describe

    def described(self, numbers):
        assert len(numbers) == 100
        return describe(self, numbers)

    monkeypatch.setattr(NextHops, "describe", described)
    status = node.status()
    assert (status["services"], status["endpoints"]) == (2, 121)
    *told, more = status["why"]
    assert told == [f"endpoint {host}: no route, or its neighbour does not answer" for host in hosts[:100]]
    assert more == "20 more endpoints are out of reach; `turnout get nexthops` lists all"


def test_service_ports_without_an_endpoint_are_counted_as_they_change(node):
    def told():
        return node.status()["without_endpoint"]["ports"]

    b, c = service("b", {"port": 80}, clusterIP="10.96.0.2"), service("c", {"port": 80}, clusterIP="10.96.0.3")
    node.reload(b, c, slice_of("b", "10.2.0.1"))
    assert told() == ["default/c:80"]
    node.reload(b, c, slice_of("b"), slice_of("c", "10.2.0.1"))
    assert told() == ["default/b:80"]
    node.reload(c, slice_of("c", "10.2.0.1"))
    assert told() == []


@pytest.mark.parametrize(("name", "cure"), [("", "--node-name"), ("one", "the nodeName one")])
def test_an_endpoint_behind_an_interface_that_is_not_given_is_told_with_what_to_give(tmp_path, monkeypatch, name, cure):
    node = MemoryNode(tmp_path)
    node._node.settings = replace(node._node.settings, node_name=name)
    node.reload(service("b", {"port": 80}, clusterIP="10.96.0.2"), slice_of("b", "10.2.0.1"))
    hop = {"state": "foreign", "destination": "10.2.0.1", "interface": "eth7"}
    monkeypatch.setattr(NextHops, "describe", lambda *_: [hop])
    expected = (
        f"endpoint 10.2.0.1: reached through eth7, which is not given; add -i eth7, or {cure} if it is on this node"
    )
    assert node.status()["why"] == [expected]


def test_who_is_no_endpoint_any_more_need_not_be_in_reach(node):
    one = service("b", {"port": 80}, clusterIP="10.96.0.2")
    node.reload(one, slice_of("b", "10.2.0.1"))
    assert node.status()["state"] == "degraded"
    away = slice_of("b", "10.2.0.1")
    away["endpoints"][0]["conditions"] = {"ready": False}
    node.reload(one, away)
    assert (node.status()["state"], node.status()["endpoints"]) == ("ok", 0)


def test_a_change_of_one_service_looks_at_no_other(tmp_path, monkeypatch):
    node = MemoryNode(tmp_path, {"announce": "arp"})
    one = service("b", {"port": 80}, clusterIP="10.96.0.2"), slice_of("b", "10.2.0.1", "10.2.0.2")
    before = service("c", {"port": 80}, clusterIP="10.96.0.3"), slice_of("c", "10.2.0.3")
    after = service("c", {"port": 80}, clusterIP="10.96.0.4"), slice_of("c", "10.2.0.4")
    node.reload(*one, *before)
    node.answer("administer", endpoints=["10.2.0.1:8080", "10.2.0.3:8080"], state="drain")
    node.reload(*one, *before)  # and all connections have been looked at since
    monkeypatch.setattr(InForce, "snapshot", property(lambda _: pytest.fail("a look at all Services")))
    monkeypatch.setattr(Live, "places", lambda _: pytest.fail("a look at all endpoints"))
    for objects, vips, drained in (
        ((*one, *after), {"10.96.0.2", "10.96.0.4"}, {"10.2.0.1"}),
        ((*one, after[1]), {"10.96.0.2"}, {"10.2.0.1"}),
        (after, {"10.96.0.4"}, set()),
    ):
        assert not node.reload(*objects)
        assert {str(address_of(vip)) for vip in node._node.in_force.vips} == vips
        assert {str(address) for address, _ in node._node.in_force.here.administered} == drained


def test_what_is_said_of_an_endpoint_is_kept_while_another_service_has_it(tmp_path):
    node = MemoryNode(tmp_path)
    both = service("b", {"port": 80}, clusterIP="10.96.0.2"), service("c", {"port": 80}, clusterIP="10.96.0.3")
    node.reload(*both, slice_of("b", "10.2.0.1"), slice_of("c", "10.2.0.1"))
    node.answer("administer", endpoints=["10.2.0.1:8080"], state="drain")
    node.reload(*both, slice_of("b", "10.2.0.1"))
    assert len(node._node.in_force.here.administered) == 1
    node.reload(*both, slice_of("b", "10.2.0.1", port=8081))
    assert not node._node.in_force.here.administered


def test_an_address_that_two_services_have_is_a_vip_until_both_have_gone(tmp_path):
    node = MemoryNode(tmp_path, {"announce": "arp", "allow-external-ips": "0.0.0.0/0"})
    both = [service(name, {"port": port}, externalIPs=["192.0.2.1"]) for name, port in (("b", 80), ("c", 81))]
    for objects in (both, both[1:], [], both[:1]):
        node.reload(*objects)
        assert len(node._node.in_force.vips) == bool(objects)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_C8_what_loses_its_endpoint_by_a_change_is_what_a_look_at_everything_finds(tmp_path, family, seed):
    choose = random.Random(seed)
    node = MemoryNode(tmp_path, family=family)
    vips = [node.vip(number, 53) for number in (1, 2)]  # that go from one Service to another now and then
    endpoints = [node.endpoint(host) for host in ("web-1", "web-2", "web-3")]
    services: dict[str, Service] = {}
    alone, ended = 0, 0
    for turn in range(40):
        name = choose.choice("abc")
        services.pop(name, None)
        free = sorted({*vips} - {each.frontend for each in services.values()})
        if free and choose.random() < 0.8:
            annotations = {"turnout.dev/endpoint-removed": choose.choice(("keep", "reset"))}
            some = tuple(choose.sample(endpoints, choose.randint(0, 3)))
            services[name] = Service(name, choose.choice(free), some, choose.choice(("UDP", "TCP")), annotations)
        before = shown(node)
        alone += not node.reload(*(part for each in services.values() for part in each.objects()))
        after = shown(node)
        ended += before != after
        node._node.strays.end()
        assert shown(node) == after
        for each in services.values():
            for port in range(3):
                client = node.client()[0], 40_000 + 10 * turn + port
                node.send((udp if each.protocol == "UDP" else syn)(client, each.at))
    assert alone > 30
    assert ended > 4


def shown(node: MemoryNode) -> set[tuple[str, ...]]:
    """Return what is to be seen of connections, but for their counters."""
    flows = node.flows()
    return {(each["protocol"], *(each[k] for k in ("client", "frontend", "endpoint", "state"))) for each in flows}


def test_what_vips_of_the_nodes_own_do_not_concern_is_planned_alone(node):
    own = str(node.networks[0].node_interface.address.ip)
    external = service("b", {"port": 30080}, externalIPs=[own])
    node.reload(external, slice_of("b", "10.2.0.1"))
    assert not node.reload(external, slice_of("b", "10.2.0.1", "10.2.0.2"))


class Refusing:
    """Has tables refuse what they are told, for as long as it is asked to."""

    def __init__(self, node: MemoryNode, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.tries = 0
        self.is_over = False
        self._error = error
        self._apply = node._node.services.apply
        monkeypatch.setattr(node._node.services, "apply", self.apply)
        for module in (node_module, reloading):
            monkeypatch.setattr(module, "_TRY_AGAIN_S", 0.001)

    def apply(self, *arguments: Any) -> Change:
        self.tries += 1
        if not self.is_over:
            raise self._error
        return self._apply(*arguments)


async def until(is_so: Callable[[], object], job: Coroutine[Any, Any, None]) -> None:
    """Run a job until something is so."""
    running = asyncio.create_task(job)
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110 - whatever a job does in its thread
            await asyncio.sleep(0.001)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def why(node: MemoryNode) -> list[str]:
    """Return what is not as it should be; in a thread, as `status` has an event loop of its own."""
    return list((await asyncio.to_thread(node.status))["why"])


def test_an_address_that_came_when_tables_were_full_is_served_as_soon_as_they_are_not(node, monkeypatch):
    port = service("c", {"port": 80, "nodePort": 30080}, clusterIP="10.96.0.3", type="NodePort")
    node.reload(port, slice_of("c", *HOSTS["c"]))
    monkeypatch.setattr(node._node.next_hops, "node_port_addresses", lambda _: (ip_address("192.0.2.1"),))
    refusing = Refusing(node, monkeypatch, TableFullError("no room"))

    async def scenario() -> None:
        node._node.addresses_changed.set()
        await until(lambda: refusing.tries > 2, node._node.follow_addresses())
        assert "addresses: TableFullError: no room" in await why(node)
        refusing.is_over = True
        await until(lambda: "192.0.2.1:30080" in node.programmed(), node._node.follow_addresses())
        refusing.tries = 0
        await until(lambda: True, node._node.follow_addresses())
        assert refusing.tries == 0

    asyncio.run(scenario())


def test_manifests_that_were_refused_for_a_reason_that_passes_are_tried_again(node, monkeypatch, caplog):
    node.apply(Service("b", node.vip(1, 80), (node.endpoint("web-1"),)))
    refusing = Refusing(node, monkeypatch, TableFullError("no room"))
    manifests, in_force = node._node.manifests, node._node.in_force
    write_manifests(node._file, [Service("b", node.vip(2, 80), (node.endpoint("web-1"),))])

    async def scenario() -> None:
        manifests.reload_all()
        await until(lambda: refusing.tries > 2, manifests.run(in_force, node._node.strays))
        told = (await why(node))[0]
        assert told == "the configuration of before goes on, the new one cannot be applied yet: no room"
        assert caplog.text.count("no room") == 1
        refusing.is_over = True
        await until(lambda: manifests.rejected is None, manifests.run(in_force, node._node.strays))
        assert list(node.programmed()) == [node.vip(2, 80)]

    asyncio.run(scenario())


def test_manifests_that_are_wrong_are_read_again_when_they_change(node, monkeypatch):
    monkeypatch.setattr(reloading, "_TRY_AGAIN_S", 0.001)
    manifests = node._node.manifests
    node.apply(Service("b", node.vip(1, 80), (node.endpoint("web-1"),)))
    node._file.write_text("{")

    async def scenario() -> None:
        manifests.reload_all()
        await until(lambda: manifests.rejected, manifests.run(node._node.in_force, node._node.strays))
        read = manifests.desired
        assert "is not valid" in (await why(node))[0]
        ended = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, ended.set)
        await until(ended.is_set, manifests.run(node._node.in_force, node._node.strays))
        assert manifests.desired == read

    asyncio.run(scenario())


@pytest.mark.parametrize("failing", ["grace", "connections", "filter"])
def test_what_a_change_leaves_behind_is_cleared_up_though_it_fails_the_first_time(node, monkeypatch, failing):
    whole, done = node._node, []
    monkeypatch.setattr(jobs, "_BEGIN_AGAIN_S", 0.001)

    def step(name: str, do: Callable[..., object] = lambda *_: None) -> Callable[..., None]:
        def stepped(*arguments: object) -> None:
            done.append((name, *arguments))
            if name == failing and [each[0] for each in done].count(name) == 1:
                raise OSError("no such luck")
            do(*arguments)

        return stepped

    both = tuple(map(node.endpoint, ("web-1", "web-2")))
    node.apply(Service("b", node.vip(1, 80), both))
    monkeypatch.setattr(whole.flows, "wait_for_grace", step("grace"))
    monkeypatch.setattr(whole.services, "release", step("room", whole.services.release))
    monkeypatch.setattr(whole.strays, "end", step("connections", whole.strays.end))
    monkeypatch.setattr(whole.engine, "tidy", step("filter"), raising=False)
    write_manifests(node._file, [Service("b", node.vip(1, 80), both[:1])])
    whole.in_force.apply(whole.manifests.load())

    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            (task,) = whole.jobs.start(group, {"sweep": whole._sweep})
            async with asyncio.timeout(20):
                while [each[0] for each in done].count("filter") < 1 + (failing == "filter"):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            task.cancel()

    asyncio.run(scenario())
    released = [parted for name, parted in (each[:2] for each in done if each[0] == "room") if parted]
    assert [(len(parted.rows), len(parted.endpoints)) for parted in released] == [(1, 1)]
    assert [each[0] for each in done[-4:]] == ["grace", "room", "connections", "filter"]


def test_flows_of_a_service_or_an_endpoint_that_is_none_are_an_error(node):
    near = str(next(iter(node.networks[0].hosts.values())).address.ip)
    one = service("b", {"port": 80}, clusterIP="10.96.0.2")
    node.reload(one, slice_of("b", near))
    for filters in ({"service": "default/b"}, {"service": "default/b:80"}, {"endpoint": near}):
        assert node.flows(**filters) == []
    for wrong in ("default/c", "b", "default/b:81", "default/b:"):
        with pytest.raises(UsageError, match=f"^{wrong} is no Service; `turnout get services` lists them"):
            node.flows(service=wrong)
    with pytest.raises(UsageError, match=r"^10.2.0.9:80 is no endpoint of any Service; `turnout get endpoints`"):
        node.flows(endpoint="10.2.0.9:80")
    node.send(syn(node.client(), (number_of(ip_address("10.96.0.2")), 80)))
    assert len(node.flows(endpoint=near)) == 1
    node.reload(one, slice_of("b", "10.2.0.1"))
    assert len(node.flows(endpoint=near)) == 1, "one that has gone, and has connections"
