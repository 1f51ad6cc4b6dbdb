"""Clients and servers: answers are counted by server, failures by cause."""

from __future__ import annotations

import os

import pytest

from perf import clients
from perf.world import World, wait_until

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def world():
    with World(f"twc{os.getpid()}", {"client": "clients", "web-1": "servers", "web-2": "servers"}) as made:
        for name in ("web-1", "web-2"):
            clients.serve_http(made[name], name)
        clients.serve_udp(made["web-1"], "web-1")
        yield made


def test_every_request_is_answered_by_name(world):
    result = clients.load_http(world["client"], f"{world['web-2'].ip}:8080", connections=20, requests=5)
    assert (result.answers, result.failures, result.flows, result.moved) == ({"web-2": 100}, {}, 20, 0)
    assert result.flows_by_server == {"web-2": 20}


def test_a_large_body_arrives_whole(world):
    result = clients.load_http(world["client"], f"{world['web-1'].ip}:8080", connections=2, bytes=3_000_000)
    assert (result.answers, result.failed) == ({"web-1": 2}, 0)


def test_a_closed_port_is_refused(world):
    result = clients.load_http(world["client"], f"{world['web-1'].ip}:8081", connections=3)
    assert (result.answered, result.failures) == (0, {"refused": 3})


def test_datagrams_are_answered_by_name(world):
    result = clients.load_udp(world["client"], f"{world['web-1'].ip}:8080", flows=20, requests=3)
    assert (result.answers, result.failures) == ({"web-1": 60}, {})


def test_a_datagram_without_an_answer_is_a_timeout(world):
    result = clients.load_udp(world["client"], f"{world['web-2'].ip}:8080", flows=1, requests=1, timeout=0.05)
    assert result.failed == 1


def test_a_load_beside_something_else_ends_when_told(world):
    target = f"{world['web-1'].ip}:8080"
    before = world.node.packets("eth0")
    with clients.Load(world["client"], "http-load", target, seconds=60, requests=1000, concurrent=3) as load:
        assert wait_until(lambda: world.node.packets("eth0") > before + 100, 10, 0.02)
    assert (load.result.failed, load.result.flows) == (0, 3)
    assert load.result.answers["web-1"] > 3
    assert load.result.seconds < 60
