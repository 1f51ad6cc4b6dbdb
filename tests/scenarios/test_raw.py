"""Engine `raw` where it differs from the others: offloads, the filter, restarts, no BPF."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from dataplane.settings import DEFAULT_SNAT_PORTS
from perf import clients
from perf.world import World
from tests.daemon import Daemon
from tests.packets import CLIENT, address, udp
from tests.scenarios.site import (
    DNS_PORT,
    ECHO_PORT,
    HOSTS,
    NODE_PORT,
    WEB_PORT,
    Site,
    at_node_port,
    count_active,
    echoed,
)
from tests.services import split
from tests.wires import Wire

pytestmark = pytest.mark.root

LARGE_BYTES = 20_000_000


@pytest.fixture(scope="module", params=["raw", "raw-6"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Real clients and servers that leave checksums and segmentation to devices."""
    family = 6 if request.param == "raw-6" else 4
    prefix = f"tr{os.getpid() % 100_000}"
    with World(prefix, HOSTS, offloads=True, ipv6=family == 6) as world, Daemon(world, "raw") as daemon:
        made = Site(world, daemon, family)
        daemon.start()
        yield made


@pytest.fixture(autouse=True)
def _services(site: Site) -> Iterator[None]:
    site.serve()
    yield
    if site.daemon.is_answering():
        site.check_accounts()


def tables(site: Site) -> list[str]:
    """Return the nftables tables of the node."""
    return site.world.node.run(["nft", "list", "tables"]).stdout.split("\n")[:-1]


def reserved_ports(site: Site) -> str:
    """Return the ports that the kernel gives to nobody by itself."""
    return site.world.node.run(["cat", "/proc/sys/net/ipv4/ip_local_reserved_ports"]).stdout.strip()


def reasons(site: Site) -> dict[str, int]:
    return site.daemon.ask("reasons")  # type: ignore[no-any-return]


# Offloads.


@pytest.fixture(params=["on", "off"])
def finishing(request: pytest.FixtureRequest, site: Site) -> Iterator[str]:
    """Whether the node's own devices finish checksums and segments: with "off" the kernel does it as we transmit."""
    node = site.world.node
    for end in node.interfaces:
        node.run(["ethtool", "-K", end.name, "tx", request.param])
    yield request.param
    for end in node.interfaces:
        node.run(["ethtool", "-K", end.name, "tx", "on"])


@pytest.mark.faults(94)
def test_frames_larger_than_the_mtu_go_both_ways_unchanged(site, finishing):
    echo = site.web.with_endpoints(*site.places(ECHO_PORT, "web-2"))
    site.daemon.apply(echo, site.dns)
    wires = [Wire(site.world.node, end.name) for end in site.world.node.interfaces]
    sent = random.Random(2).randbytes(LARGE_BYTES)
    assert echoed(site, echo, sent) == hashlib.sha256(sent).digest()
    largest = [max(map(len, wire.received())) for wire in wires]
    for wire in wires:
        wire.close()
    assert min(largest) > 3000, (largest, "no frame was larger than the MTU: this tests nothing")


def test_curl_downloads_and_uploads(site, finishing, tmp_path):
    content = random.Random(3).randbytes(LARGE_BYTES)
    given, taken = tmp_path / "given", tmp_path / "taken"
    given.mkdir()
    (given / "large").write_bytes(content)
    server = site.world["web-3"].popen([sys.executable, "-c", _FILES, str(ECHO_PORT), str(given), str(taken)])
    try:
        site.daemon.apply(site.web.with_endpoints(*site.places(ECHO_PORT, "web-3")), site.dns)
        url = f"http://{site.web.frontend}/large"
        ask = [
            "curl",
            "-sS",
            "--fail",
            "--max-time",
            "30",
            "--retry",
            "20",
            "--retry-connrefused",
            "--retry-delay",
            "0",
        ]
        site.client.run([*ask, "-o", str(tmp_path / "got"), url], timeout_s=60)
        assert (tmp_path / "got").read_bytes() == content
        site.client.run([*ask, "-T", str(given / "large"), url], timeout_s=60)
        assert taken.read_bytes() == content
    finally:
        site.world.end(server)


_FILES = """
import http.server, socket, sys
port, folder, taken = sys.argv[1:]
class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *a): super().__init__(*a, directory=folder)
    def log_message(self, *a): pass
    def do_PUT(self):
        open(taken, "wb").write(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(201); self.send_header("Content-Length", "0"); self.end_headers()
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6  # and so both
Server(("", int(port)), Handler).serve_forever()
"""


def test_datagrams_with_unfinished_checksums_are_answered(site, finishing):
    result = clients.load_udp(site.client, site.dns.frontend, flows=30, concurrent=10, requests=3)
    assert (result.answered, result.failures) == (90, {})


# What is not translated.


def test_an_endpoint_can_be_talked_to_past_its_service(site):
    before = reasons(site)
    for name in ("web-1", "web-2"):
        result = clients.load_http(site.client, *site.places(WEB_PORT, name), connections=3, bytes=200_000)
        assert (result.answers, result.failures) == ({name: 3}, {})
    after = reasons(site)
    assert after["SENT_ON"] > before.get("SENT_ON", 0)


def test_the_node_itself_can_talk_to_an_endpoint(site):
    before = reasons(site)
    result = clients.load_http(site.world.node, *site.places(WEB_PORT, "web-1"), connections=3)
    assert (result.answers, result.failures) == ({"web-1": 3}, {})
    after = reasons(site)
    assert after.get("SENT_ON") == before.get("SENT_ON")


def test_the_kernel_gets_no_packet_that_is_ours(site):
    """With the originals left alone, the endpoint's kernel would get every request twice."""
    host = site.world["web-1"]
    site.daemon.apply(site.web, site.dns.with_endpoints(*site.places(DNS_PORT, "web-1")))
    forwarded = _forwarded(site)
    received = host.packets("eth0")
    with site.asking() as ask:
        for _ in range(50):
            assert ask() == "web-1"
    assert host.packets("eth0") - received < 60
    assert _forwarded(site) == forwarded


def _forwarded(site: Site) -> int:
    counters = _snmp(site)
    return counters["Ip.ForwDatagrams" if site.family == 4 else "Ip6OutForwDatagrams"]


def _snmp(site: Site) -> dict[str, int]:
    """Return the counters of the node's kernel, of both families."""
    text = site.world.node.run(["cat", "/proc/net/snmp", "/proc/net/snmp6"], check=False).stdout
    lines = [line.split() for line in text.splitlines()]
    found = {line[0]: int(line[1]) for line in lines if len(line) == 2 and not line[0].endswith(":")}
    fours = [line for line in lines if line[0].endswith(":")]
    for names, values in zip(fours[::2], fours[1::2], strict=True):
        found |= {f"{names[0][:-1]}.{name}": int(value) for name, value in zip(names[1:], values[1:], strict=True)}
    return found


# What is addressed to the node.


@pytest.fixture(params=["none", "all"])
def masquerade(request: pytest.FixtureRequest, site: Site) -> Iterator[str]:
    """Both Services at node ports, while nobody or everybody is masqueraded."""
    daemon = site.daemon
    if request.param != "none":
        daemon.signal(signal.SIGTERM)
        daemon.wait()
        daemon.start_with = ["--masquerade", request.param]
        daemon.start()
    daemon.apply(at_node_port(site.web), at_node_port(site.dns))
    site.wait_until_ok()
    yield request.param
    if request.param != "none":
        site.check_accounts()
        daemon.signal(signal.SIGTERM)
        daemon.wait()
        daemon.start_with = []


@pytest.fixture
def silent(site: Site) -> Iterator[None]:
    """The node's kernel says meanwhile to nobody that a port is closed."""

    def said() -> list[int]:
        counters = _snmp(site)
        told = ["Tcp.OutRsts", "Udp.NoPorts", "Icmp.OutDestUnreachs", "Udp6NoPorts", "Icmp6OutDestUnreachs"]
        return [counters.get(name, 0) for name in told]

    before = said()
    yield
    assert said() == before


def test_T6_clients_come_through_node_ports(site, masquerade, silent):
    for end in site.world.node.interfaces:
        at = site.own(end, NODE_PORT)
        result = clients.load_http(site.client, at, connections=60, concurrent=20, requests=3)
        assert (result.flows, result.answered, result.failures, result.moved) == (60, 180, {}, 0)
        result = clients.load_http(site.client, at, connections=3, bytes=2_000_000)
        assert (result.answered, result.failures) == (3, {})
        result = clients.load_udp(site.client, at, flows=60, concurrent=20, requests=3)
        assert (result.flows, result.answered, result.failures, result.moved) == (60, 180, {}, 0)


def test_T2_clients_of_cluster_ips_while_all_are_masqueraded_or_none(site, masquerade, silent):
    result = clients.load_http(site.client, site.web.frontend, connections=60, concurrent=20, requests=3)
    assert (result.flows, result.answered, result.failures, result.moved) == (60, 180, {}, 0)
    result = clients.load_udp(site.client, site.dns.frontend, flows=60, concurrent=20, requests=3)
    assert (result.flows, result.answered, result.failures, result.moved) == (60, 180, {}, 0)
    with site.world["web-2"].entered():
        listening = socket.create_server(("", ECHO_PORT), family=site.socket_family)
    own = at_node_port(site.web).with_endpoints(*site.places(ECHO_PORT, "web-2"))
    site.daemon.apply(own, site.dns)
    for at in (own.frontend, site.own(site.world.node.interfaces[0], NODE_PORT)):
        with site.client.entered():
            connection = socket.create_connection(split(at), timeout=5)
        accepted, (seen, *_) = listening.accept()
        accepted.close()
        connection.close()
        nodes = [split(site.own(end, 0))[0] for end in site.world.node.interfaces]
        assert (seen in nodes, seen == split(*site.places(0, "client"))[0]) == (
            masquerade == "all",
            masquerade == "none",
        )
    listening.close()


def test_T5_an_endpoint_reaches_itself_through_its_service(site, silent):
    site.daemon.apply(site.web.with_endpoints(*site.places(WEB_PORT, "web-1")), site.dns)
    result = clients.load_http(site.world["web-1"], site.web.frontend, connections=20, requests=3, bytes=100_000)
    assert (result.answers, result.failures) == ({"web-1": 60}, {})


def test_N4_datagrams_in_fragments_through_node_ports(site, masquerade, silent):
    """An ICMP error by the kernel, which gets the later fragments, would be the client's ConnectionRefusedError."""
    for at in (site.dns.frontend, site.own(site.world.node.interfaces[0], NODE_PORT)):
        with site.client.entered():
            sock = socket.socket(site.socket_family, socket.SOCK_DGRAM)
        with sock:
            sock.settimeout(5)
            sock.connect(split(at))
            for size in (10, 3000, 20_000, 60_000):
                sent = random.Random(size).randbytes(size)
                sock.send(sent)
                assert sock.recv(1 << 16).partition(b" ")[2] == sent


def test_connections_of_node_ports_outlast_a_killed_daemon(site, masquerade, silent):
    """Its filter stays, and with it the kernel keeps silent."""
    at = site.own(site.world.node.interfaces[0], NODE_PORT)
    asking = {"flows": 20, "concurrent": 20, "requests": 1_000_000, "interval": 0.005, "timeout": 30}
    with clients.Load(site.client, "http-load", at, **asking) as load:
        site.daemon.wait_for(lambda: count_active(site) >= 20)
        site.daemon.signal(signal.SIGKILL)
        site.daemon.wait()
        site.daemon.start()
        answered = reasons(site)["FORWARDED"]
        site.daemon.wait_for(lambda: reasons(site)["FORWARDED"] > answered + 500)
    assert (load.result.flows, load.result.failures, load.result.moved) == (20, {}, 0)


def test_T6_the_node_s_own_servers_and_clients_are_left_alone(site, masquerade):
    node = site.world.node
    server = clients.serve_http(node, "node", "0.0.0.0:2222" if site.family == 4 else "[::]:2222")
    try:
        result = clients.load_http(site.client, site.own(node.interfaces[0], 2222), connections=5, bytes=100_000)
        assert (result.answers, result.failures) == ({"node": 5}, {})
        result = clients.load_http(site.world["web-1"], site.own(node.interfaces[1], 2222), connections=5)
        assert (result.answers, result.failures) == ({"node": 5}, {})
    finally:
        site.world.end(server)
        server.stdout.close()
    result = clients.load_http(node, *site.places(WEB_PORT, "web-1"), connections=20, bytes=100_000)
    assert (result.answers, result.failures) == ({"web-1": 20}, {})
    result = clients.load_http(site.client, site.own(node.interfaces[0], 2222), connections=1)
    assert result.failures == {"refused": 1}


# The filter.


def test_a_filter_that_somebody_takes_away_is_put_back(site):
    assert tables(site) == [f"table netdev turnout_{site.daemon.settings.name}"]
    told = site.daemon.said().count("it is put back")
    site.world.node.run(["nft", "flush", "ruleset"])
    site.daemon.wait_for(lambda: site.daemon.said().count("it is put back") == told + 1)
    site.daemon.wait_for(lambda: tables(site) != [])


def test_connections_of_a_service_that_is_gone_stay_ours_and_new_ones_are_the_kernels(site):
    retired = "retired" if site.family == 4 else "retired6"
    vip, _ = split(site.web.frontend)
    with site.load("http-load", site.web) as load:
        site.daemon.wait_for(lambda: count_active(site) >= 20)  # not those that other tests have left
        site.daemon.apply(site.dns)
        listed = f"list set netdev turnout_{site.daemon.settings.name} {retired}".split()
        site.daemon.wait_for(lambda: vip in site.world.node.run(["nft", *listed]).stdout)
        answered = reasons(site)["FORWARDED"]
        site.daemon.wait_for(lambda: reasons(site)["FORWARDED"] > answered + 200)
    assert (load.result.flows, load.result.failures) == (20, {})
    result = clients.load_http(site.client, site.web.frontend, connections=1, timeout=0.3)
    assert result.answered == 0


@pytest.mark.parametrize("flags", [(), ("--on-exit", "keep")], ids=["by-default", "told-to-keep"])
def test_what_is_left_after_sigterm(site, flags):
    daemon = site.daemon
    with site.asking() as ask:
        name = ask()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        daemon.start_with = [*flags]
        daemon.start()
        daemon.start_with = []
        daemon.wait_for(lambda: daemon.ask("status")["state"] == "ok")
        assert ask() == name
        assert "took over" in daemon.said()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert len(tables(site)) == bool(flags)
        assert ask(0.2) is None
    assert reserved_ports(site) == str(DEFAULT_SNAT_PORTS)
    daemon.turnout("detach")
    assert reserved_ports(site) == ""
    assert tables(site) == []
    assert not daemon.settings.table_folder.exists()


def test_a_killed_daemon_loses_no_connection_and_its_filter_is_cleaned_up(site):
    with site.load("http-load", site.web, timeout=30) as load:
        site.daemon.wait_for(lambda: count_active(site) >= 20)
        before = site.endpoints_of_flows(active=True)
        site.daemon.signal(signal.SIGKILL)
        site.daemon.wait()
        assert len(tables(site)) == 1
        site.daemon.start()
        after = site.endpoints_of_flows()
        assert {key: after.get(key) for key in before} == before
        answered = reasons(site)["FORWARDED"]
        site.daemon.wait_for(lambda: reasons(site)["FORWARDED"] > answered + 500)
    assert (load.result.flows, load.result.failures, load.result.moved) == (20, {}, 0)
    site.daemon.signal(signal.SIGKILL)
    site.daemon.wait()
    done = site.daemon.turnout("detach")
    assert done.stderr.splitlines() == [
        "removed eth0: the ingress filter",
        "removed eth1: the ingress filter",
        f"removed {site.daemon.settings.table_folder}: the tables",
    ]
    assert "managed" not in site.world.node.run(["ip", "neigh"]).stdout
    assert tables(site) == []
    assert not site.daemon.settings.filter_record.exists()
    assert not site.daemon.settings.table_folder.exists()


def test_ctrl_c_leaves_nothing(site):
    site.daemon.signal(signal.SIGINT)
    assert site.daemon.wait() == 0
    assert tables(site) == []
    assert not site.daemon.settings.table_folder.exists()
    assert not site.daemon.settings.filter_record.exists()


# Losses.


@pytest.mark.faults(94)
@pytest.mark.families(4, why="of what is lost nobody knows the family")
def test_what_finds_no_room_in_the_ring_is_counted(site):
    daemon, count = site.daemon, 400_000
    there, here = site.world.node.mac, site.client.mac
    frame = bytes.fromhex((there + here).replace(":", "")) + udp(CLIENT, address("192.0.2.1:9"))[12:]
    before = daemon.ask("status")["packets"]["userspace"]
    daemon.signal(signal.SIGSTOP)
    try:
        with site.client.entered():
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        with sock:
            sock.bind(("eth0", 0))
            for _ in range(count):
                sock.send(frame)
    finally:
        daemon.signal(signal.SIGCONT)

    def counted() -> int:
        now = daemon.ask("status")["packets"]["userspace"]
        return int(sum(now[key] - before[key] for key in ("received", "punt_lost")))

    daemon.wait_for(lambda: counted() >= count)
    assert counted() < count + 100
    assert daemon.ask("status")["packets"]["userspace"]["punt_lost"] > before["punt_lost"]


# Many workers.


@pytest.mark.parametrize("family", [4, 6])
def test_workers_share_an_interface_and_the_table(family):
    """Both directions of a connection may be different workers'."""
    prefix = f"tw{os.getpid() % 100_000}"
    with World(prefix, HOSTS, queues=4, offloads=True, ipv6=family == 6) as world, Daemon(world, "raw") as daemon:
        site = Site(world, daemon, family)
        daemon.start()
        site.serve()
        result = clients.load_http(site.client, site.web.frontend, connections=200, concurrent=50, requests=5)
        assert (result.answered, result.failures, result.moved) == (1000, {}, 0)
        result = clients.load_udp(site.client, site.dns.frontend, flows=200, concurrent=50, requests=5)
        assert (result.answered, result.failures, result.moved) == (1000, {}, 0)
        site.check_accounts()
        with site.tables() as shared:
            worked = np.count_nonzero(shared.tables.worker_counters["packets"].sum(axis=1) > 100)
        assert worked == 4 * len(world.node.interfaces)
