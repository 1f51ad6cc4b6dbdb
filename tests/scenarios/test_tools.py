"""The tools that people reach for, through a node, with each engine: curl, nginx, dig, iperf3, ping and tracepath."""

from __future__ import annotations

import filecmp
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perf.world import wait_until
from tests.scenarios.site import ENGINES_4, ENGINES_6, SERVERS, Site
from tests.services import Service, split

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.parametrize("site", [*ENGINES_4, *ENGINES_6], indirect=True, scope="session"),
]
NAMES_PORT, IPERF_PORT, NGINX_PORT = 5300, 5201, 8088
NAMES_HOST, IPERF_HOST, NGINX_HOST = 53, 52, 51  # last numbers of VIPs
NGINX = """
daemon off; master_process off; user root; pid {folder}/pid; error_log {folder}/error.log;
events {{ }}
http {{
    access_log off; client_max_body_size 0; client_body_temp_path {folder}/body;
    server {{
        listen {port}; listen [::]:{port};
        location = / {{ return 200 {name}; }}
        location /files/ {{ root {folder}; dav_methods PUT; }}
    }}
}}
"""
UPLOAD_BYTES = 50_000_000
LONG = [f"{number:03}".ljust(200, ".") for number in range(15)]  # 3,000 bytes: three fragments
ANSWERS = {name: f"192.0.2.{number}" for number, name in enumerate(SERVERS, 1)}


@pytest.fixture(autouse=True)
def _accounts(site: Site) -> Iterator[None]:
    yield
    site.check_accounts()


def serve(site: Site, *services: Service) -> None:
    site.serve()
    site.daemon.apply(*services)
    site.wait_until_ok()


@pytest.fixture
def nginx(site: Site, tmp_path: Path) -> Iterator[Service]:
    """nginx on every server, which tells its name and keeps what is put there."""
    servers = []
    for name in SERVERS:
        folder = tmp_path / name
        (folder / "files").mkdir(parents=True)
        conf = folder / "conf"
        conf.write_text(NGINX.format(folder=folder, name=name, port=NGINX_PORT))
        command = ["nginx", "-c", str(conf), "-e", str(folder / "error.log")]
        servers.append(site.world[name].popen(command, stdout=subprocess.DEVNULL))
    web = Service("nginx", site.vip(NGINX_HOST, 80), site.places(NGINX_PORT, *SERVERS))
    serve(site, web)
    for name in SERVERS:
        assert wait_until(lambda: curl(site, f"http://{site.places(NGINX_PORT, name)[0]}/"), 10)  # noqa: B023
    yield web
    for server in servers:
        site.world.end(server)


def curl(site: Site, *words: str) -> str:
    return site.client.run(["curl", "-sS", "-g", "-m", "30", *words], check=False, timeout_s=40).stdout


def test_T1_curl_asks_nginx_again_on_the_connection_that_it_has(site, nginx):
    url = f"http://{nginx.frontend}/"
    answers = set()
    for _ in range(10):
        said = curl(site, "-w", " %{num_connects}\n", *[url] * 20).split()
        assert said[1::2] == ["1", *["0"] * 19]
        (name,) = set(said[::2])
        answers.add(name)
    assert len(answers) > 1, "each connection has an endpoint of its own"


def test_T1_what_curl_puts_on_nginx_comes_back_as_it_was(site, nginx, tmp_path):
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(random.Random(1).randbytes(UPLOAD_BYTES))
    site.daemon.apply(nginx.with_endpoints(*site.places(NGINX_PORT, "web-2")))
    url = f"http://{nginx.frontend}/files/large"
    assert curl(site, "-o", "/dev/null", "-w", "%{http_code}", "-T", str(sent), url) == "201"
    assert filecmp.cmp(sent, tmp_path / "web-2" / "files" / "large", shallow=False)
    assert curl(site, "-o", str(received), "-w", "%{http_code}", url) == "200"
    assert filecmp.cmp(sent, received, shallow=False)


@pytest.fixture
def names(site: Site) -> Iterator[None]:
    """dnsmasq on every server, each with an answer of its own."""
    servers = []
    for name, address in ANSWERS.items():
        command = [
            "dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--user=root",
        ]
        command += [f"--port={NAMES_PORT}", "--edns-packet-max=4096", "--pid-file="]
        command += [f"--address=/who.test/{address}", f"--txt-record=long.test,{','.join(LONG)}"]
        servers.append(site.world[name].popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    places = site.places(NAMES_PORT, *SERVERS)
    serve(
        site,
        Service("names", site.vip(NAMES_HOST, 53), places, "UDP"),
        Service("names-tcp", site.vip(NAMES_HOST, 53), places),
    )
    for name in SERVERS:
        assert wait_until(lambda: dig(site, "who.test", at=split(site.places(NAMES_PORT, name)[0])), 10)  # noqa: B023
    yield
    for server in servers:
        site.world.end(server)


def dig(site: Site, name: str, *options: str, at: tuple[str, int] | None = None) -> list[str]:
    address, port = at or split(site.vip(NAMES_HOST, 53))
    command = ["dig", f"@{address}", "-p", str(port), "+short", "+time=2", "+tries=1", *options, name]
    return site.client.run(command, check=False).stdout.splitlines()


def test_T1_dig_is_answered_over_udp_and_tcp(site, names):
    for options in ((), ("+tcp",)):
        assert {*dig(site, "who.test", *options)} <= {*ANSWERS.values()}
        asked = [dig(site, "who.test", *options) for _ in range(30)]
        assert {line for answer in asked for line in answer} == {*ANSWERS.values()}, "all servers are asked"


def test_N4_a_long_answer_of_a_name_server_arrives_in_fragments(site, names):
    expected = [" ".join(f'"{part}"' for part in LONG)]
    assert dig(site, "long.test", "TXT", "+bufsize=4096", "+ignore", "+notcp") == expected
    assert dig(site, "long.test", "TXT", "+tcp") == expected


@pytest.fixture
def iperf(site: Site) -> Iterator[None]:
    """iperf3 on one server: its control connection and its streams must meet."""
    server = site.world["web-1"].popen(["iperf3", "-s", "-p", str(IPERF_PORT)], stdout=subprocess.DEVNULL)
    places = site.places(IPERF_PORT, "web-1")
    serve(
        site,
        Service("iperf", site.vip(IPERF_HOST, IPERF_PORT), places),
        Service("iperf-udp", site.vip(IPERF_HOST, IPERF_PORT), places, "UDP"),
    )
    yield
    site.world.end(server)


def measure(site: Site, *options: str) -> dict[str, Any]:
    """Return the end of iperf3's report: the sums of all streams."""
    vip, port = split(site.vip(IPERF_HOST, IPERF_PORT))
    command = ["iperf3", "-c", vip, "-p", str(port), "-t", "1", "-J", *options]
    done = site.client.run(command, check=False)
    report = json.loads(done.stdout)
    assert "error" not in report, report["error"]
    return report["end"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", [(), ("-R",)], ids=["up", "down"])
def test_T1_iperf3_measures_tcp(site, iperf, way):
    end = measure(site, "-P", "4", *way)
    assert end["sum_received"]["bytes"] > 1_000_000
    assert len(end["streams"]) == 4


@pytest.mark.parametrize("way", [(), ("-R",)], ids=["up", "down"])
def test_T1_iperf3_measures_udp(site, iperf, way):
    total = measure(site, "-u", "-b", "10M", *way)["sum"]
    assert total["packets"] > 300
    assert total["lost_packets"] < total["packets"] / 2  # a busy machine may lose some


def test_T10_ping_is_answered(site):
    serve(site, site.web)
    said = site.client.run(["ping", "-n", "-c", "5", "-i", "0.2", "-W", "2", split(site.vip(1, 80))[0]]).stdout
    assert " 5 received" in said, said


def test_T9_T12_tracepath_sees_the_node_and_then_the_vip(site):
    serve(site, site.web)
    node, vip = site.world.node, split(site.vip(1, 80))[0]
    gateway = node.interface_to("clients")
    network = "10.96.0.0/16" if site.family == 4 else "fd96::/64"
    node.run(["ip", "route", "add", network, "dev", "eth1"])  # without a route there is no TTL to run out
    try:
        said = site.client.run(["tracepath", "-n", "-m", "4", vip], timeout_s=30).stdout
    finally:
        node.run(["ip", "route", "delete", network, "dev", "eth1"])
    lines = [line.split() for line in said.splitlines()]
    hops = [words[1] for words in lines if words[0].rstrip(":").isdigit()]
    assert list(dict.fromkeys(hops)) == [gateway.ip if site.family == 4 else gateway.ip6, vip], said
    assert "hops 2" in said, said
