"""Real clients and servers through a node, with each engine."""

from __future__ import annotations

import hashlib
import math
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from perf import clients
from perf.world import Host, wait_until
from tests.scenarios.site import SERVERS, WEB_PORT, Site

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.parametrize("site", ["xdp", "xdp-generic", "afxdp"], indirect=True, scope="module"),
]
LARGE_BYTES = 10_000_000
ECHO_PORT = 9090


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


def echo_once(host: Host, listening: threading.Event) -> None:
    """Take one connection on `host`, and send back all that comes."""
    with host.entered(), socket.create_server(("", ECHO_PORT)) as server:
        listening.set()
        connection, _ = server.accept()
        with connection:
            while piece := connection.recv(1 << 18):
                connection.sendall(piece)


def test_ten_megabytes_go_both_ways_unchanged(site):
    echo = site.web.with_endpoints(*site.places(ECHO_PORT, "web-2"))
    site.daemon.apply(echo, site.dns)
    sent = random.Random(1).randbytes(LARGE_BYTES)
    listening = threading.Event()
    server = threading.Thread(target=echo_once, args=(site.world["web-2"], listening), daemon=True)
    server.start()
    listening.wait(5)
    with site.client.entered():
        connection = socket.socket()
    received = hashlib.sha256()
    with connection:
        connection.settimeout(30)
        vip, port = echo.frontend.split(":")
        connection.connect((vip, int(port)))

        def upload() -> None:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=upload, daemon=True)
        sender.start()
        while piece := connection.recv(1 << 18):
            received.update(piece)
        sender.join()
    server.join()
    assert received.digest() == hashlib.sha256(sent).digest()


def test_flows_are_told_with_what_they_have_carried(site):
    with site.asking() as ask:
        names = {ask() for _ in range(5)}
        (flow,) = [flow for flow in site.daemon.ask("flows") if flow["client"].endswith(f":{ask.port}")]
    assert (flow["service"], flow["state"]) == ("shop/dns:main", "udp_replied")
    assert flow["packets"] == {"original": 5, "reply": 5}
    assert flow["endpoint"].split(":")[0] == site.world[names.pop()].ip
    assert not names


def test_a_connection_to_a_port_where_nobody_listens_is_refused(site):
    site.daemon.apply(site.web.with_endpoints(*site.places(WEB_PORT + 1, "web-1")), site.dns)
    result = clients.load_http(site.client, site.web.frontend, connections=5)
    assert (result.answered, result.failures) == (0, {"refused": 5})


def test_idle_workers_sleep(site):
    def turns() -> int:
        with site.tables() as shared:
            return int(shared.tables.workers["turn"].sum())

    workers = len(site.world.node.interfaces)
    before, started = turns(), time.monotonic()
    wait_until(lambda: turns() - before >= 20 * workers, 5, 0.05)
    rate = (turns() - before) / (time.monotonic() - started) / workers
    assert 5 < rate < 500  # it wakes every 20 ms to beat; busy, it turns a million times
