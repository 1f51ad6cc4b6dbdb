"""Echo requests that go on to an endpoint (`--ping forward`), and replies. Ids are those of docs/behaviours.md.

An identifier stands where TCP and UDP have the client's port; of who is asked the port is 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from perf.world import World
from tests import packets
from tests.daemon import Daemon
from tests.node import NODE_NAME, ScenarioNode
from tests.packets import Address, addresses_of, echo_reply, echo_request, icmp_error, rewritten, syn
from tests.scenarios.site import HOSTS, WEB_PORT, Site
from tests.services import Service, split, text_of
from xdp.schema import Reason

forward = pytest.mark.flags(ping="forward")
masqueraded = pytest.mark.flags(ping="forward", masquerade="all")
PAYLOADS = (b"", b"odd", bytes(range(256)) * 5 + bytes(100))


def serve(node: ScenarioNode, *hosts: str, number: int = 1, port: int = 80, **fields: Any) -> Service:
    service = Service("web", node.vip(number, port), tuple(node.endpoint(host) for host in hosts), **fields)
    node.apply(service)
    return service


def vip_of(service: Service) -> Address:
    return service.at[0], 0


def asked(node: ScenarioNode, client: Address, service: Service, host: str = "web-1") -> Address:
    """Have an echo request answered, both compared whole; return whom the endpoint on `host` sees as its client."""
    endpoint, at = (node.at(host, 0)[0], 0), node.host_of(client)
    seen: Address = (0, 0)
    for payload in PAYLOADS:
        request = echo_request(vip_of(service), client, payload)
        to, left = node.send(request, at).only
        seen = addresses_of(left)[0], packets.identifier_of(left)
        assert (to, left) == (host, rewritten(request, seen, endpoint, node.macs(host)))
        reply = echo_reply(endpoint, seen, payload)
        sent = node.send(reply, host)
        assert sent.left == [(at, rewritten(reply, vip_of(service), client, node.macs(at)))]
        assert sent.passed == (seen_by_kernel(node, reply, host) if seen[0] == node.own(host)[0] else [])
        assert sent.reason is Reason.FORWARDED
    return seen


def seen_by_kernel(node: ScenarioNode, frame: bytes, host: str) -> list[bytes]:
    """Return what the kernel gets beside us of what is to an address of the node's own: it says nothing to it."""
    return [node.on_the_wire(frame, host)] if node.engine == "raw" else []


@forward
def test_N3_an_echo_request_to_a_vip_goes_to_an_endpoint_and_the_reply_comes_from_the_vip(node):
    service, client = serve(node, "web-1"), node.client()
    assert asked(node, client, service) == client
    flow = node.flow(client)
    assert (flow["protocol"], flow["state"]) == ("ICMP" if node.family == 4 else "ICMPV6", "echo")
    assert (flow["frontend"], flow["service"]) == (text_of(vip_of(service)), service.key)
    assert flow["packets"] == {"original": len(PAYLOADS), "reply": len(PAYLOADS)}
    assert node.send(syn(client, service.at)).only[0] == "web-1"  # nobody else's port was taken


@forward
def test_N3_who_asks_goes_on_with_one_endpoint_and_others_are_spread(node):
    service = serve(node, "web-1", "web-2", "web-3")
    clients = [node.client() for _ in range(30)]
    first, second = ([node.send(echo_request(vip_of(service), each)).only[0] for each in clients] for _ in range(2))
    assert first == second
    assert set(first) == {"web-1", "web-2", "web-3"}


@pytest.mark.faults(73)
@masqueraded
def test_N3_identifiers_that_collide_are_told_apart(node):
    service, first = serve(node, "web-1"), node.client()
    second = node.at("other", first[1])
    assert asked(node, first, service) == node.own("web-1", first[1])
    seen = asked(node, second, service)
    assert seen[0] == node.own("web-1")[0]
    assert seen[1] != first[1]
    assert asked(node, first, service) == node.own("web-1", first[1])


@masqueraded
def test_N3_every_identifier_can_be_asked_with(node):
    service = serve(node, "web-1")
    for number in (1, 700, 1023, 1024, 30_080, 0xFFFF):  # among them ports that no connection may leave from
        assert asked(node, node.at("client", number), service) == node.own("web-1", number)


@forward
def test_N3_a_reply_that_nobody_has_asked_for_is_the_kernel_s(node):
    service, client = serve(node, "web-1"), node.client()
    endpoint = node.at("web-1", 0)[0], 0
    reply = echo_reply(endpoint, node.own("web-1", 99))
    for _ in range(2):
        sent = node.send(reply, "web-1")
        assert (sent.left, sent.passed) == ([], [node.on_the_wire(reply, "web-1")])
        assert sent.reason is Reason.OTHER_ICMP
        node.send(echo_request(vip_of(service), client))


@masqueraded
def test_N1_an_error_about_an_echo_request_is_about_the_client_s_own(node):
    service, client = serve(node, "web-1"), node.client()
    other = node.at("other", client[1])
    for asking in (client, other):  # one whose identifier stays, and one whose becomes another
        at = node.host_of(asking)
        request = echo_request(vip_of(service), asking)
        _, left = node.send(request, at).only
        about = echo_request(vip_of(service), asking, ttl=63)
        for kind in ("time-exceeded", "host-unreachable"):
            expected = icmp_error(about, kind, source=vip_of(service), ttl=59)
            error = icmp_error(left, kind)
            sent = node.send(error, "web-1")
            assert sent.left == [(at, node.macs(at) + expected[12:])]
            assert sent.passed == seen_by_kernel(node, error, "web-1")


@forward
def test_N1_an_error_about_a_reply_is_about_the_endpoint_s_own(node):
    service, client = serve(node, "web-1"), node.client()
    endpoint = node.at("web-1", 0)[0], 0
    node.send(echo_request(vip_of(service), client))
    _, left = node.send(echo_reply(endpoint, client), "web-1").only
    expected = icmp_error(echo_reply(endpoint, client, ttl=63), "host-unreachable", source=client, ttl=59)
    error = icmp_error(left, "host-unreachable", source=client)
    sent = node.send(error)
    assert sent.left == [("web-1", node.macs("web-1") + expected[12:])]


@forward
def test_T7_without_an_endpoint_nobody_answers(node):
    service = serve(node)
    sent = node.send(echo_request(vip_of(service), node.client()))
    assert (sent.left, sent.passed, sent.reason) == ([], [], Reason.NO_ENDPOINT)


@forward
def test_C8_when_its_endpoint_has_gone_the_next_request_goes_to_another(node):
    service, client = serve(node, "web-1"), node.client()
    asked(node, client, service)
    asked(node, client, serve(node, "web-2"), "web-2")
    asked(node, client, serve(node, "web-1", "web-2"), "web-2")


@forward
def test_of_the_ports_of_a_vip_the_lowest_one_s_endpoints_answer(node):
    high = Service("high", node.vip(1, 443), (node.endpoint("web-1"),))
    low = Service("low", node.vip(1, 80), (node.endpoint("web-2"),), "UDP")
    for services, host in (((high,), "web-1"), ((high, low), "web-2"), ((high,), "web-1")):
        node.apply(*services)
        asked(node, node.client(), high, host)


@forward
def test_S7_who_may_not_come_is_not_answered_either(node):
    refused = "192.0.2.0/24" if node.family == 4 else "2001:db8:ffff::/48"
    spec = {"type": "LoadBalancer", "loadBalancerSourceRanges": [refused]}
    balancer = Service(
        "web", node.vip(1, 80), (node.endpoint("web-1"),), spec=spec, ingress=(split(node.vip(2, 80))[0],)
    )
    node.apply(balancer)
    sent = node.send(echo_request((balancer.at[0] + 1, 0), node.client()))
    assert (sent.left, sent.reason) == ([], Reason.SOURCE_REFUSED)
    asked(node, node.client(), balancer)


@forward
@pytest.mark.engines("memory", why="only its clock can be moved")
def test_C5_after_a_minute_an_echo_is_forgotten(node):
    service, client = serve(node, "web-1"), node.client()
    asked(node, client, service)
    node.advance(59)
    asked(node, client, service)
    node.advance(61)
    reply = echo_reply((node.at("web-1", 0)[0], 0), client)
    assert node.send(reply, "web-1").reason is Reason.OTHER_ICMP


@forward
@pytest.mark.engines("memory", why="a wire of the same MTU carries no such frame")
def test_T13_who_asks_with_too_long_a_packet_is_told_how_long_it_may_be(node):
    service, client = serve(node, "web-1"), node.client()
    frame = echo_request(vip_of(service), client, b"x" * 1480, **({"flags": "DF"} if node.family == 4 else {}))
    expected = packets.unreachable_to(node.on_the_wire(frame, "client"), 4, mtu=1500)
    sent = node.send(frame)
    assert (sent.only, sent.reason) == (("client", expected), Reason.TOO_BIG)


# Real ones.


class Asked(Site):
    """A site whose node forwards echo requests, with a pod."""

    def __init__(self, world: World, daemon: Daemon, family: int) -> None:
        super().__init__(world, daemon, family)
        world.add_pod("pod")

    def answer_with(self, *hosts: str, local: bool = False) -> None:
        """Have these hosts be the endpoints of the one VIP."""
        places = self.places(WEB_PORT, *hosts)
        about = {place: {"nodeName": NODE_NAME} for place in places} if local else {}
        self.daemon.apply(Service("web", self.vip(1, 80), places, about=about))
        self.wait_until_ok()

    def ping(self) -> str:
        """Return what ping(8) says of the VIP."""
        vip, _ = split(self.vip(1, 0))
        return self.client.run(["ping", "-n", "-c", "10", "-i", "0.1", "-s", "1400", "-W", "5", vip]).stdout

    def flows_to(self, host: str) -> list[dict[str, Any]]:
        """Return the echoes of a host."""
        (place,) = self.places(0, host)
        return [flow for flow in self.daemon.ask("flows") if flow["endpoint"] == place]


@pytest.fixture(scope="module", params=["xdp", "xdp-6", "raw", "raw-6"])
def pinged(request: pytest.FixtureRequest) -> Iterator[Asked]:
    engine, is_ipv6 = request.param.removesuffix("-6"), request.param.endswith("-6")
    prefix, flags = f"te{os.getpid() % 100_000}", {"ping": "forward"}
    with World(prefix, HOSTS, ipv6=is_ipv6) as world, Daemon(world, engine, flags=flags) as daemon:
        made = Asked(world, daemon, 6 if is_ipv6 else 4)
        daemon.start()
        yield made


@pytest.mark.root
@pytest.mark.bpf
def test_N3_ping_is_answered_by_an_endpoint_and_once(pinged: Asked):
    pinged.answer_with("web-1")
    said = pinged.ping()
    assert " 10 received" in said, said
    assert "duplicate" not in said, said
    (flow,) = pinged.flows_to("web-1")
    assert flow["packets"] == {"original": 10, "reply": 10}
    pinged.check_accounts()


@pytest.mark.root
@pytest.mark.bpf
def test_N3_the_node_s_own_ping_of_an_endpoint_is_answered(pinged: Asked):
    pinged.answer_with("web-1")
    (address,) = pinged.addresses("web-1")
    said = pinged.world.node.run(["ping", "-n", "-c", "3", "-i", "0.1", "-W", "5", address]).stdout
    assert " 3 received" in said, said


@pytest.mark.root
@pytest.mark.bpf
def test_L_an_endpoint_that_is_maintained_is_not_asked_any_more(pinged: Asked):
    pinged.answer_with("web-2")
    pinged.ping()
    assert pinged.flows_to("web-2")
    pinged.answer_with("web-2", "web-3")
    place = pinged.places(WEB_PORT, "web-2")[0]
    pinged.daemon.turnout("maint", place)
    pinged.daemon.wait_for(lambda: not pinged.flows_to("web-2"))
    assert " 10 received" in pinged.ping()
    assert not pinged.flows_to("web-2")
    pinged.daemon.turnout("ready", place)


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.parametrize("pinged", ["xdp", "xdp-6"], indirect=True, scope="module")
def test_N3_T14_an_endpoint_on_this_node_answers(pinged: Asked):
    pinged.answer_with("pod", local=True)
    said = pinged.ping()
    assert " 10 received" in said, said
    (flow,) = pinged.flows_to("pod")
    assert flow["packets"] == {"original": 10, "reply": 10}
