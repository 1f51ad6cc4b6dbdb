"""Interfaces with several queues: a worker for each, and replies on another queue than the requests."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from perf import clients
from perf.world import World
from tests.daemon import Daemon
from tests.scenarios.site import HOSTS, Site
from tests.services import split
from xdp.schema import Reason

pytestmark = [pytest.mark.root, pytest.mark.bpf]

QUEUES = 2
CONNECTIONS = 100


@pytest.fixture(scope="module", params=["xdp", "afxdp", "raw"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A node whose interfaces, and all others, have two queues."""
    with (
        World(f"tq{os.getpid() % 100_000}", HOSTS, queues=QUEUES) as world,
        Daemon(world, request.param) as daemon,
    ):
        made = Site(world, daemon)
        daemon.start()
        made.serve()
        yield made
        made.check_accounts()


def received(site: Site, interface: str) -> list[int]:
    """Return how many packets each queue of an interface of the node has handed to XDP or, of engine raw, a worker."""
    if site.daemon.engine == "raw":
        first = QUEUES * int(interface.removeprefix("eth"))
        with site.tables() as shared:
            counts = shared.tables.worker_counters["packets"][first : first + QUEUES]
            return [int(count) for count in counts.sum(axis=1)]
    text = site.world.node.run(["ethtool", "-S", interface]).stdout
    found = dict(re.findall(r"rx_queue_(\d+)_xdp_packets: (\d+)", text))
    return [int(found[str(queue)]) for queue in range(QUEUES)]


def admitted(site: Site) -> list[int]:
    """Return how many connections each worker has admitted."""
    with site.tables() as shared:
        counts = shared.tables.worker_counters["packets"][:, Reason.ADMITTED]
        return [int(count) for count in counts[: QUEUES * len(site.world.node.interfaces)]]


def test_new_connections_are_spread_over_the_queues_and_kept(site):
    before = admitted(site)
    result = clients.load_http(site.client, site.web.frontend, connections=CONNECTIONS, concurrent=20, requests=5)
    assert (result.answered, result.failures, result.moved) == (5 * CONNECTIONS, {}, 0)
    grown = np.subtract(admitted(site), before)
    of_clients = grown[:QUEUES]  # workers are numbered by interface and queue, and eth0 is the clients'
    assert sum(of_clients) == sum(grown) == CONNECTIONS
    assert min(of_clients) > CONNECTIONS / 10, of_clients


def test_datagrams_are_answered_whatever_the_queue(site):
    result = clients.load_udp(site.client, site.dns.frontend, flows=100, concurrent=20, requests=5)
    assert (result.answered, result.failures, result.moved) == (500, {}, 0)


def test_T15_replies_arrive_on_another_queue_than_requests(site):
    """Of many flows some have it so, and are answered like the others."""
    seen = set()
    for _ in range(64):
        with site.asking() as ask:
            assert ask() is not None
            before = received(site, "eth0"), received(site, "eth1")
            assert all(ask() is not None for _ in range(5))
            after = received(site, "eth0"), received(site, "eth1")
        seen.add(tuple(int(np.argmax(np.subtract(b, a))) for a, b in zip(before, after, strict=True)))
        if {request != reply for request, reply in seen} == {True, False}:
            return
    pytest.fail(f"only {seen}")


def are_refused(site: Site) -> bool:
    """Whether all of many clients, on whatever queue they are, are told that nobody serves a port of a VIP."""
    for _ in range(24):
        with site.client.entered():
            client = socket.socket()
        with client:
            client.settimeout(0.5)
            try:
                client.connect(split(site.vip(1, 81)))
            except ConnectionRefusedError:
                continue
            except TimeoutError:
                return False
    return True


def test_answers_leave_from_queues_that_only_receive(site):
    """The kernel sends by none of them: another queue of the interface does it for them."""
    node, daemon = site.world.node, site.daemon
    daemon.signal(signal.SIGTERM)
    daemon.wait()
    node.run(["ethtool", "-L", "eth0", "tx", "1"])
    try:
        daemon.start()
        site.serve()
        daemon.wait_for(lambda: are_refused(site))
    finally:
        node.run(["ethtool", "-L", "eth0", "tx", str(QUEUES)])
    daemon.wait_for(lambda: are_refused(site))
