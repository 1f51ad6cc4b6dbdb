"""Real clients and servers through a node, with each engine."""

from __future__ import annotations

import hashlib
import json
import math
import random
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from perf import clients
from perf.world import wait_until
from tests.node import NODE_NAME
from tests.scenarios.site import DNS_PORT, ECHO_PORT, ENGINES_4, ENGINES_6, SERVERS, WEB_PORT, Site, echoed
from tests.services import Service, split, write_manifests
from xdp.schema import Reason

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.parametrize("site", [*ENGINES_4, *ENGINES_6], indirect=True, scope="session"),
]
LARGE_BYTES = 10_000_000


@pytest.fixture(autouse=True)
def _services(site: Site) -> Iterator[None]:
    site.serve()
    yield
    site.check_accounts()


def assert_spread(connections: dict[str, int]) -> None:
    """Assert that flows are spread as chance would: within five standard deviations of equal shares."""
    total = sum(connections.values())
    share = 1 / len(SERVERS)
    margin = 5 * math.sqrt(total * share * (1 - share))
    assert set(connections) == set(SERVERS)
    assert all(abs(count - total * share) < margin for count in connections.values()), connections


def test_connections_are_kept_and_spread(site):
    result = clients.load_http(site.client, site.web.frontend, connections=400, concurrent=40, requests=3)
    assert (result.flows, result.answered, result.failures, result.moved) == (400, 1200, {}, 0)
    assert_spread({name: count // 3 for name, count in result.answers.items()})


def test_two_hundred_connections_at_a_time(site):
    result = clients.load_http(site.client, site.web.frontend, connections=200, concurrent=200, requests=10)
    assert (result.answered, result.failures, result.moved) == (2000, {}, 0)


def test_datagrams_are_answered_by_one_server_each_and_spread(site):
    result = clients.load_udp(site.client, site.dns.frontend, flows=300, concurrent=30, requests=3)
    assert (result.flows, result.answered, result.failures, result.moved) == (300, 900, {}, 0)
    assert_spread({name: count // 3 for name, count in result.answers.items()})


def test_large_answers_arrive(site):
    result = clients.load_http(site.client, site.web.frontend, connections=3, bytes=LARGE_BYTES, timeout=30)
    assert (result.answered, result.failures) == (3, {})


def test_ten_megabytes_go_both_ways_unchanged(site):
    echo = site.web.with_endpoints(*site.places(ECHO_PORT, "web-2"))
    site.daemon.apply(echo, site.dns)
    sent = random.Random(1).randbytes(LARGE_BYTES)
    assert echoed(site, echo, sent) == hashlib.sha256(sent).digest()


def test_flows_are_told_with_what_they_have_carried(site):
    with site.asking() as ask:
        names = {ask() for _ in range(5)}
        (flow,) = [flow for flow in site.daemon.ask("flows") if flow["client"].endswith(f":{ask.port}")]
    assert (flow["service"], flow["state"]) == ("shop/dns:main", "udp_replied")
    assert flow["packets"] == {"original": 5, "reply": 5}
    assert flow["endpoint"] in site.places(DNS_PORT, names.pop())
    assert not names


def test_a_connection_to_a_port_where_nobody_listens_is_refused(site):
    site.daemon.apply(site.web.with_endpoints(*site.places(WEB_PORT + 1, "web-1")), site.dns)
    result = clients.load_http(site.client, site.web.frontend, connections=5)
    assert (result.answered, result.failures) == (0, {"refused": 5})


@pytest.mark.families(6, why="its world has both")
def test_a_service_of_both_families_serves_each_by_its_own_endpoints(site):
    four, six = "10.96.0.7", split(site.vip(7, 80))[0]
    ends = [site.world[name].interfaces[0] for name in SERVERS]
    clients.serve_http(site.world[SERVERS[0]], SERVERS[0], f"0.0.0.0:{WEB_PORT}")
    places = [f"{ends[0].ip}:{WEB_PORT}", *(f"[{end.ip6}]:{WEB_PORT}" for end in ends[1:])]
    both = Service(
        "both", f"{four}:80", tuple(places), spec={"clusterIPs": [four, six], "ipFamilyPolicy": "RequireDualStack"}
    )
    write_manifests(site.daemon.file, [both, site.web, site.dns])
    site.daemon.wait_for(lambda: sum(shown["name"] == "both" for shown in site.daemon.ask("services")) == 2)
    site.wait_until_ok()
    names = {url: {asked(site, url) for _ in range(20)} for url in (f"http://{four}/", f"http://[{six}]/")}
    assert list(names.values()) == [{SERVERS[0]}, {*SERVERS[1:]}]
    told = {flow["frontend"]: flow for flow in site.daemon.ask("flows", service="shop/both")}
    assert told.keys() == {f"{four}:80", f"[{six}]:80"}
    client = told[f"[{six}]:80"]["client"]
    found = site.daemon.ask("flows", client=client)  # its kernel may have used the port for another frontend before
    assert {flow["client"] for flow in found} == {client}
    assert f"[{six}]:80" in [flow["frontend"] for flow in found]
    host = client.rpartition(":")[0].strip("[]")
    assert {flow["client"] for flow in site.daemon.ask("flows", client=host)} >= {client}


def asked(site: Site, url: str) -> str:
    """Return the name of the server that answers curl."""
    return site.client.run(["curl", "-sS", "-g", "-m", "5", url]).stdout.strip()


def test_T7_T9_who_cannot_be_served_is_told_at_once(site):
    dead, silent = replace(site.web, endpoints=()), replace(site.dns, endpoints=())
    site.daemon.apply(dead, silent)
    port = split(dead.frontend)[1]
    for url in (f"http://{dead.frontend}/", f"http://{site.vip(1, port + 1)}/"):
        done = site.client.run(["curl", "-sS", "-m", "5", "-w", "%{time_total}", url], check=False)
        assert done.returncode == 7, done.stderr
        assert "refused" in done.stderr or "connect to server" in done.stderr
        assert float(done.stdout) < 0.9  # a SYN that is not answered is sent again after a second
    vip, port = split(silent.frontend)
    for number in (port, port + 1):
        with site.client.entered():
            sock = socket.socket(site.socket_family, socket.SOCK_DGRAM)
        with sock:
            sock.settimeout(5)
            sock.connect((vip, number))
            sock.send(b"anybody?")
            with pytest.raises(ConnectionRefusedError):
                sock.recv(100)
    site.serve()


def test_L_least_connections_brings_a_new_endpoint_up(site):
    web = replace(site.web, annotations={"turnout.dev/scheduler": "least-connections"})
    alone, both = (web.with_endpoints(*site.places(WEB_PORT, *hosts)) for hosts in (("web-1",), ("web-1", "web-2")))

    def hundred() -> clients.Load:
        return site.load("http-load", web, flows=100, concurrent=100, interval=0.5)

    def are_open(count: int) -> bool:
        flows = site.daemon.ask("flows", service=f"shop/{web.name}")
        return sum(flow["state"] == "established" for flow in flows) >= count

    site.daemon.apply(alone, site.dns)
    with hundred() as first:
        site.daemon.wait_for(lambda: are_open(100))
        site.daemon.apply(both, site.dns)
        with hundred() as second:
            site.daemon.wait_for(lambda: are_open(200))
    assert (first.result.flows_by_server, first.result.failures) == ({"web-1": 100}, {})
    assert (sum(second.result.flows_by_server.values()), second.result.failures) == (100, {})
    assert second.result.flows_by_server["web-2"] > 60, "75 on the average; Maglev would give 50"

    def load() -> int:
        with site.tables() as shared:
            return int(shared.tables.endpoints["load"].sum())

    assert wait_until(lambda: load() == 0, 20), "what is closed is counted no more"


@pytest.mark.parametrize("size", [1472, 1473, 3000, 20_000, 65_000])
def test_N4_large_datagrams_arrive_whole_both_ways(site, size):
    """The kernels of client and server cut them, and put them together again."""
    with site.asking() as ask:
        sent = random.Random(size).randbytes(size)
        for _ in range(3):
            assert ask.large(sent) == sent


@pytest.mark.families(6, why="IPv4 has options")
@pytest.mark.parametrize("kind", [socket.IPV6_HOPOPTS, socket.IPV6_DSTOPTS], ids=["hop-by-hop", "destination"])
def test_N9_clients_and_servers_that_send_extension_headers(site: Site, kind: int):
    """Of new connections, and of known ones; the kernels at both ends look at checksums."""
    is_xdp = site.daemon.engine.startswith("xdp")
    with site.asking() as plain, site.asking() as extended:
        extended.extend(kind)
        before = site.counted(Reason.OPTIONS)
        for ask in (plain, extended):
            assert len({ask() for _ in range(5)} - {None}) == 1
        assert site.counted(Reason.OPTIONS) - before == (4 if is_xdp else 0)
        plain.extend(kind)
        assert plain()
    echo = site.web.with_endpoints(*site.places(ECHO_PORT, "web-2"))
    site.daemon.apply(echo, site.dns)
    sent = random.Random(2).randbytes(500_000)
    assert echoed(site, echo, sent, kind) == hashlib.sha256(sent).digest()
    assert (site.counted(Reason.OPTIONS) - before > 300) == is_xdp


@pytest.mark.families(4, why="its packets are made by hand; test_tools.py has ping over both")
def test_T10_a_vip_answers_ping(site):
    vip = split(site.web.frontend)[0]
    with site.client.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with sock:
        sock.settimeout(5)
        for number, size in enumerate((0, 56, 1400)):
            body = struct.pack("!HH", 4711, number) + bytes(size)
            check = sum(struct.unpack(f"!{len(body) // 2}H", body)) + 0x0800
            request = struct.pack("!BBH", 8, 0, ~(check % 0xFFFF) & 0xFFFF) + body
            sock.sendto(request, (vip, 0))
            answer, (source, _) = sock.recvfrom(2048)  # the kernel has looked at its checksums
            assert source == vip
            assert answer[20:22] + answer[24:] == bytes(2) + body


@pytest.mark.families(4, why="it sees no packets")
def test_idle_workers_sleep(site):
    def turns() -> int:
        with site.tables() as shared:
            return int(shared.tables.workers["turn"].sum())

    def rate() -> float:
        before, started = turns(), time.monotonic()
        wait_until(lambda: turns() - before >= 32 * workers, 5, 0.05)
        return (turns() - before) / (time.monotonic() - started) / workers

    workers = len(site.world.node.interfaces)
    # Four steps, four times a second, once the last packets of others have come; busy, it turns a million times.
    assert wait_until(lambda: 5 < rate() < 1000, 30)


def test_S10_a_load_balancer_asks_the_health_check_port(site: Site):
    health = 32_100
    spec = {
        "type": "LoadBalancer",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": health,
        "ports": [{"name": "main", "port": 80, "nodePort": 32_000}],
    }
    here = replace(site.web, spec=spec, about={site.web.endpoints[0]: {"nodeName": NODE_NAME}})

    def asked() -> tuple[str, int]:
        url = f"http://{site.world.node.interfaces[0].ip}:{health}/healthz"
        body, _, code = site.client.run(["curl", "-s", "-w", "%{http_code}", url]).stdout.rpartition("\n")
        return code, json.loads(body)["localEndpoints"]

    site.daemon.apply(here)
    assert wait_until(lambda: asked() == ("200", 1), 10)
    site.daemon.apply(replace(here, about={}))
    assert wait_until(lambda: asked() == ("503", 0), 10)
    site.serve()
