"""Metrics: what Prometheus reads is what `status` says."""

from __future__ import annotations

import asyncio
import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dataplane.metrics import check, serve
from xdp.errors import Error, UsageError

STATUS = {
    "state": "degraded",
    "why": ["eth1: down"],
    "engine": "xdp",
    "uptime_s": 12.5,
    "services": 3,
    "endpoints": 9,
    "interfaces": [{"name": "eth0", "engine": "xdp", "xdp_mode": "native", "why": "", "rx_packets": 1000}],
    "flows": {"used": 12, "capacity": 1000},
    "revision": {"desired": 5, "programmed": 4},
    "packets": {
        "xdp": {"received": 900, "forwarded": 850, "passed": 30, "dropped": 10, "punted": 10},
        "userspace": {"received": 9, "forwarded": 9, "dropped": 0, "punt_lost": 1, "originated": 0},
    },
    "reasons": {"FORWARDED": 850, "NEW_FLOW": 10},
}


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
    samples = scrape(lambda command, options: asked.append((command, options)) or STATUS, host)
    assert asked == [("status", {})]
    expected = {
        "turnout_up": 1,
        "turnout_state{degraded}": 1,
        "turnout_state{ok}": 0,
        "turnout_services": 3,
        "turnout_endpoints": 9,
        "turnout_flows": 12,
        "turnout_flows_capacity": 1000,
        "turnout_desired_revision": 5,
        "turnout_programmed_revision": 4,
        "turnout_config_last_reload_successful": 0,
        "turnout_uptime_seconds": 12.5,
        "turnout_packets_total{xdp}{forwarded}": 850,
        "turnout_packets_total{userspace}{punt_lost}": 1,
        "turnout_packets_by_reason_total{NEW_FLOW}": 10,
        "turnout_xsk_lost_total": 1,
        "turnout_interface_receive_packets_total{eth0}": 1000,
    }
    assert {name: samples[name] for name in expected} == expected
    assert any(name.startswith("turnout_build_info") and "xdp" in name for name in samples)


def test_a_node_that_cannot_answer_is_down_but_scraped():
    def fail(command, options):
        raise RuntimeError("starting")

    assert scrape(fail) == {"turnout_up": 0}


def test_the_time_of_the_last_reload_is_told_if_known():
    samples = scrape(lambda *_: {**STATUS, "applied_at_s": 1_790_000_000.5})
    assert samples["turnout_config_last_reload_success_timestamp_seconds"] == 1_790_000_000.5


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
