"""Metrics: what Prometheus reads is what `status` says."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dataplane import metrics
from dataplane.metrics import check, serve
from perf.world import wait_until
from tests.statuses import STATUS
from xdp.errors import Error, UsageError

VIEWS = Path(__file__).resolve().parents[2] / "dataplane/views.py"


def scrape(answer, host="127.0.0.1"):
    """Serve, scrape once from a thread, and return {sample: value}."""

    async def once():
        with serve((host, 0), answer) as port:
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
            return await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())

    families = text_string_to_metric_families(asyncio.run(once()))
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_scrape_says_what_status_says(host):
    asked = []
    status = {**STATUS, "state": "degraded", "revision": {"desired": 8, "programmed": 7}}
    samples = scrape(lambda command, options: asked.append((command, options)) or status, host)
    assert asked == [("status", {})]
    expected = {
        "turnout_up": 1,
        "turnout_state{degraded}": 1,
        "turnout_state{ok}": 0,
        "turnout_services": 2,
        "turnout_endpoints": 3,
        "turnout_service_ports_without_endpoint": 1,
        "turnout_flows": 250_000,
        "turnout_flows_capacity": 1_000_000,
        "turnout_desired_revision": 8,
        "turnout_programmed_revision": 7,
        "turnout_config_last_reload_successful": 0,
        "turnout_config_last_reload_success_timestamp_seconds": 1_790_000_000.5,
        "turnout_uptime_seconds": 93784.2,
        "turnout_packets_total{xdp}{forwarded}": 1200,
        "turnout_packets_total{userspace}{dropped}": 1,
        "turnout_packets_received_total{xdp}": 1234,
        "turnout_packets_received_total{userspace}": 4,
        "turnout_packets_total{egress}{forwarded}": 30,
        "turnout_packets_admitted_total{xdp}": 0,
        "turnout_packets_redirect_failed_total{xdp}": 2,
        "turnout_packets_punt_lost_total{userspace}": 1,
        "turnout_packets_originated_total{userspace}": 0,
        "turnout_packets_by_reason_total{NEW_FLOW}": 4,
        "turnout_interface_receive_packets_total{eth0}": 1000,
        "turnout_sockets_total{led}": 12,
        "turnout_sockets_total{passed}": 30,
        "turnout_sockets_total{refused}": 1,
    }
    assert {name: samples[name] for name in expected} == expected
    assert any(name.startswith("turnout_build_info") and "xdp" in name for name in samples)


def test_a_node_that_cannot_answer_is_down_but_scraped():
    def fail(command, options):
        raise RuntimeError("starting")

    assert scrape(fail) == {"turnout_up": 0}


def test_without_clients_on_the_node_nothing_is_told_of_them():
    assert not [name for name in scrape(lambda *_: {**STATUS, "sockets": None}) if name.startswith("turnout_sockets")]


def test_verdicts_add_up_to_what_was_received():
    samples = scrape(lambda *_: STATUS)
    verdicts = {name: value for name, value in samples.items() if name.startswith("turnout_packets_total{xdp}")}
    assert {name.rpartition("{")[2] for name in verdicts} == {"forwarded}", "passed}", "dropped}", "punted}"}
    assert sum(verdicts.values()) == samples["turnout_packets_received_total{xdp}"]


def shape_of_view(name):
    """Return what a view returns or lists, by its source: {key: the same of the dictionary below it, or None}."""
    (view,) = [node for node in ast.parse(VIEWS.read_text()).body if getattr(node, "name", "") == name]
    outermost = next(node for node in ast.walk(view) if isinstance(node, ast.Dict) and node.keys)

    def shape(node):
        return {
            key.value: shape(value) if isinstance(value, ast.Dict) else None
            for key, value in zip(node.keys, node.values, strict=True)
        }

    return shape(outermost)


def shape_of(value):
    return {key: shape_of(item) if isinstance(item, dict) else None for key, item in value.items()}


def test_the_status_of_these_tests_has_the_keys_of_the_view():
    parts = ("packets", "sockets", "taken_out", "without_endpoint")
    whole = shape_of_view("status") | {name: shape_of_view(name) for name in parts}
    assert shape_of({**STATUS, "reasons": None, "sockets": {**STATUS["sockets"], "reasons": None}}) == whole
    for interface in STATUS["interfaces"]:
        assert shape_of(interface) == shape_of_view("interfaces")


def entered(address):
    async def enter():
        with serve(address, lambda *_: STATUS):
            pass

    asyncio.run(enter())


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Error, match=rf"--metrics 127.0.0.1:{port}: the port is taken; see") as caught:
            entered(("127.0.0.1", port))
        assert caught.value.exit_code == 1
        with pytest.raises(Error, match="the port is taken"):
            check(("127.0.0.1", port))
    check(("127.0.0.1", port))


def test_an_address_that_is_not_ours_is_wrong_usage():
    with pytest.raises(UsageError, match=r"--metrics 192.0.2.1:9100: .*expected an address of this machine"):
        entered(("192.0.2.1", 9100))


def in_loop(scenario, answer=lambda *_: STATUS):
    """Serve, and run `scenario(port)` in a thread meanwhile."""

    async def run():
        with serve(("127.0.0.1", 0), answer) as port:
            return await asyncio.to_thread(scenario, port)

    return asyncio.run(run())


def test_no_thread_wakes_up_to_see_whether_somebody_asks():
    before = set(threading.enumerate())

    async def run():
        with serve(("127.0.0.1", 0), lambda *_: STATUS):
            assert set(threading.enumerate()) == before

    asyncio.run(run())


def is_answered(port):
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return b"turnout_up 1" in answer.read()
    return False


def test_a_client_that_says_a_byte_now_and_then_is_let_go(monkeypatch):
    monkeypatch.setattr(metrics, "_CLIENT_S", 0.5)

    def scenario(port):
        began, until = time.monotonic(), time.monotonic() + 5
        with socket.create_connection(("127.0.0.1", port), timeout=5) as slow, contextlib.suppress(OSError):
            slow.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
            slow.settimeout(0.1)
            while time.monotonic() < until:
                slow.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    if not slow.recv(1):
                        break
        return time.monotonic() - began

    assert 0.4 < in_loop(scenario) < 4


def test_clients_beyond_the_most_are_turned_away_until_others_have_gone(monkeypatch):
    monkeypatch.setattr(metrics, "_CLIENT_S", 60.0)

    def scenario(port):
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
                for _ in range(metrics._MOST_CLIENTS + 10)
            ]
            for client in clients[metrics._MOST_CLIENTS :]:
                assert client.recv(1) == b""
            threads = sum("process_request_thread" in thread.name for thread in threading.enumerate())
            assert threads == metrics._MOST_CLIENTS
        assert wait_until(lambda: is_answered(port), 20)

    in_loop(scenario)
