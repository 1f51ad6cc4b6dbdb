"""Endpoints on this node, behind veths that keep all their offloads. Ids are those of docs/behaviours.md.

    client (10.77.1.2) ---- eth0 +------+ cali-web ---- web (10.244.0.2)
                                 | node |
    far    (10.77.2.2) ---- eth1 +------+ cali-api ---- api (10.244.0.3)

Only eth0 and eth1 are given, but for engine `raw`, which needs those of pods, too. On their way out there nothing is
left to a device: what the client gets was finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from scapy.layers.l2 import Ether

from perf import clients
from perf.world import Host, World, wait_until
from tests.node import NODE_NAME, Daemon, Service
from tests.scenarios.site import NODE_PORT, at_node_port
from xdp import kernel

pytestmark = [pytest.mark.root, pytest.mark.bpf]

FOLLOWED_S = 1.5  # a second, and what commands take on a busy machine
BULK = 8_000_000
VIP, DNS_VIP, BULK_VIP = "10.96.0.1", "10.96.0.10", "10.96.0.2"

# Reads all that a client sends, then says what it was and sends it back.
_BULK_SERVER = """
import hashlib, socketserver
class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        got = b"".join(iter(lambda: self.request.recv(1 << 20), b""))
        self.request.sendall(hashlib.sha256(got).digest() + got)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
with Server(("", 9000), Handler) as server:
    print(flush=True)
    server.serve_forever()
"""


class Pods:
    """A node with two pods, and whoever asks them."""

    def __init__(self, world: World, daemon: Daemon) -> None:
        self.world, self.daemon = world, daemon
        for name in ("web", "api"):
            pod = world.add_pod(name)
            clients.serve_http(pod, name, "0.0.0.0:8080")
            clients.serve_udp(pod, name, "0.0.0.0:5353")
        server = world["web"].popen([sys.executable, "-c", _BULK_SERVER], stdout=-1)
        assert server.stdout is not None
        server.stdout.readline()
        clients.serve_http(world["far"], "far", "0.0.0.0:8080")
        clients.serve_http(world.node, "node", "0.0.0.0:8080")
        world.node.run(["ethtool", "-K", "eth0", "tx", "off"])

    @property
    def client(self) -> Host:
        return self.world["client"]

    def service(self, name: str, frontend: str, port: int, *hosts: str, protocol: str = "TCP") -> Service:
        places = tuple(f"{self.world[host].ip}:{port}" for host in hosts)
        here = {place: {"nodeName": NODE_NAME} for place in places if place.startswith("10.244.")}
        return Service(name, frontend, places, protocol, about=here)

    def serve(self, *services: Service) -> None:
        self.daemon.apply(*services)
        self.daemon.wait_for(lambda: self.daemon.ask("status")["state"] == "ok")

    def serve_all(self) -> None:
        self.serve(
            self.service("web", f"{VIP}:80", 8080, "web"),
            self.service("dns", f"{DNS_VIP}:53", 5353, "web", protocol="UDP"),
            self.service("bulk", f"{BULK_VIP}:90", 9000, "web"),
        )

    def connect(self, vip: str = VIP, port: int = 80) -> socket.socket:
        with self.client.entered():
            return socket.create_connection((vip, port), timeout=5)

    def get(self, vip: str = VIP, more: int = 100) -> str:
        """Return who answers an HTTP request."""
        with self.connect(vip) as sock:
            return ask(sock, more)

    def who(self) -> str:
        """Return who answers, or nothing."""
        with contextlib.suppress(OSError):
            return self.get()
        return ""

    def packets(self, path: str, verdict: str) -> int:
        return int(self.daemon.ask("status")["packets"][path][verdict])

    @contextlib.contextmanager
    def heard(self) -> Iterator[list[bytes]]:
        """Record what arrives at the client meanwhile."""
        frames: list[bytes] = []
        with self.client.entered():
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        with sock:
            sock.bind(("eth0", 0x0800))
            sock.settimeout(0.2)
            yield frames
            with contextlib.suppress(TimeoutError):
                while True:
                    frame, (_, _, kind, _, _) = sock.recvfrom(1 << 17)
                    if kind != socket.PACKET_OUTGOING:
                        frames.append(frame)


def ask(sock: socket.socket, more: int = 100) -> str:
    sock.sendall(f"GET /{more} HTTP/1.1\r\n\r\n".encode())
    got = b""
    while len(got) < more:
        part = sock.recv(1 << 16)
        assert part, "closed"
        got += part
    return got.partition(b"Server: ")[2].partition(b"\r")[0].decode()


def finished(frame: bytes) -> bytes:
    """Return a frame with the checksums that it ought to have."""
    packet = Ether(frame)
    for layer in ("IP", "TCP", "UDP"):
        if layer in packet:
            del packet[layer].chksum
    return bytes(packet)


BY_KERNEL = ("xdp", "xdp-generic", "afxdp")
with_raw = pytest.mark.parametrize("pods", [*BY_KERNEL, "raw"], indirect=True, scope="module")


@pytest.fixture(scope="module", params=BY_KERNEL)
def pods(request: pytest.FixtureRequest) -> Iterator[Pods]:
    hosts = {"client": "clients", "far": "servers"}
    with World(f"tl{os.getpid() % 100_000}", hosts) as world, Daemon(world, request.param) as daemon:
        made = Pods(world, daemon)
        if daemon.engine == "raw":
            given = (*daemon.settings.interfaces, "cali-web", "cali-api")
            daemon.settings = replace(daemon.settings, interfaces=given)
        daemon.start()
        yield made


@pytest.fixture(autouse=True)
def _served(pods: Pods) -> None:
    if pods.daemon.process is None or pods.daemon.process.poll() is not None:
        pods.daemon.start()
    pods.serve_all()


@with_raw
def test_T14_uploads_and_downloads_arrive_whole(pods: Pods):
    sent = os.urandom(BULK)
    with pods.connect(BULK_VIP, 90) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        got = b"".join(iter(lambda: sock.recv(1 << 20), b""))
    assert got[:32] == hashlib.sha256(sent).digest()
    assert got[32:] == sent
    if pods.daemon.engine == "raw":
        return  # a frame larger than the MTU counts as one
    (flow,) = [one for one in pods.daemon.ask("flows") if one["frontend"] == f"{BULK_VIP}:90"][-1:]
    for way in ("original", "reply"):  # counted as frames on the wire, of 1448 bytes and 66 of headers
        least = BULK // 1448
        assert least <= flow["packets"][way] < 2 * least
        assert BULK + 66 * least <= flow["bytes"][way] < BULK + 66 * 2 * least


@with_raw
def test_T14_what_the_client_gets_is_finished_and_comes_from_the_vip(pods: Pods):
    with pods.heard() as frames:
        assert pods.get() == "web"
        with pods.client.entered():
            asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with asking:
            asking.settimeout(5)
            asking.sendto(b"who", (DNS_VIP, 53))
            assert asking.recv(100) == b"web who"
    assert len(frames) >= 5  # SYN, data, FIN and an acknowledgement at least; the datagram
    for frame in frames:
        packet = Ether(frame)
        assert packet["IP"].src in (VIP, DNS_VIP)
        assert (packet.src, packet.dst) == (pods.world.node.mac, pods.client.mac)
        assert packet["IP"].ttl == 63  # one router, which is the kernel
        assert frame[:14] + finished(frame)[14:] == frame


@with_raw
def test_T14_requests_have_one_ttl_less_and_the_client_s_address(pods: Pods):
    with pods.world["web"].entered():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    with sock:
        sock.bind(("eth0", 0x0800))
        sock.settimeout(1)
        assert pods.get() == "web"
        seen = []
        while len(seen) < 4:
            frame, (_, _, kind, _, _) = sock.recvfrom(1 << 17)
            if kind != socket.PACKET_OUTGOING:
                seen.append(frame)
    for frame in seen:
        packet = Ether(frame)
        assert (packet["IP"].src, packet["IP"].dst, packet["TCP"].dport) == (pods.client.ip, pods.world["web"].ip, 8080)
        assert packet["IP"].ttl == 63
        assert frame[:14] + finished(frame)[14:] == frame


def test_T14_an_endpoint_may_be_the_node_itself(pods: Pods):
    pods.serve(pods.service("web", f"{VIP}:80", 8080, "node"))
    with pods.heard() as frames:
        assert pods.get(more=100_000) == "node"
    assert {Ether(frame)["IP"].src for frame in frames} == {VIP}


def test_T14_firewalls_and_path_filters_of_the_node_see_whole_connections(pods: Pods):
    node = pods.world.node
    rules = """
        table ip tt {
            chain through {
                type filter hook forward priority 0; policy drop;
                ct state invalid drop
                ct state established accept
                ip daddr 10.244.0.0/24 ct state new accept
            }
            chain out {
                type nat hook postrouting priority 100
                ip saddr 10.244.0.0/24 oifname "eth*" masquerade
            }
        }
    """
    node.run(["nft", "-f", "-"], text_in=rules)
    for name in ("all", "eth0", "cali-web"):
        node.sysctl(f"net/ipv4/conf/{name}/rp_filter", 1)
    try:
        assert [pods.get(more=size) for size in (100, 300_000)] == ["web", "web"]
    finally:
        node.run(["nft", "delete", "table", "ip", "tt"])
        for name in ("all", "eth0", "cali-web"):
            node.sysctl(f"net/ipv4/conf/{name}/rp_filter", 0)


def test_N1_an_error_from_a_pod_is_about_what_the_client_has_sent(pods: Pods):
    pods.serve(pods.service("dns", f"{DNS_VIP}:53", 5999, "web", protocol="UDP"))  # where nobody listens
    with pods.client.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock, pods.heard() as frames:
        sock.settimeout(5)
        sock.connect((DNS_VIP, 53))
        sock.send(b"who")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)
    (frame,) = frames
    packet = Ether(frame)
    quote = packet["ICMP"].payload
    assert (packet["IP"].src, quote.src, quote.dst, quote.dport) == (DNS_VIP, pods.client.ip, DNS_VIP, 53)
    del packet["ICMP"].chksum
    assert bytes(packet)[34:] == frame[34:]
    # The quoted checksum is that of what was sent.
    del quote["UDP in ICMP"].chksum
    assert bytes(quote)[20:28] == frame[34 + 8 + 20 : 34 + 8 + 28]


def test_T14_a_path_that_is_narrower_behind_the_node_is_told_to_the_client(pods: Pods):
    node, pod = pods.world.node, pods.world["web"]
    node.run(["ip", "link", "set", "cali-web", "mtu", "1400"])
    pod.run(["ip", "link", "set", "eth0", "mtu", "1400"])
    try:
        with pods.client.entered():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock:
            sock.settimeout(5)
            sock.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER: DO
            sock.connect((DNS_VIP, 53))
            with contextlib.suppress(OSError):
                sock.send(bytes(1450))
            assert wait_until(lambda: sock.getsockopt(socket.IPPROTO_IP, 14) == 1400, 5)  # IP_MTU
    finally:
        pods.client.run(["ip", "route", "flush", "cache"])
        node.run(["ip", "link", "set", "cali-web", "mtu", "1500"])
        pod.run(["ip", "link", "set", "eth0", "mtu", "1500"])


def test_T14_interfaces_of_pods_are_shown_as_they_come_and_go(pods: Pods):
    both = [pods.service("web", f"{VIP}:80", 8080, "web"), pods.service("api", f"{BULK_VIP}:80", 8080, "api")]
    pods.serve(*both)

    def shown() -> list[tuple[str, str]]:
        return [(one["name"], one["why"]) for one in pods.daemon.ask("interfaces") if one["engine"] == "kernel"]

    assert shown() == [("cali-api", "1 endpoint on this node"), ("cali-web", "1 endpoint on this node")]
    node = pods.world.node
    node.run(["ip", "link", "set", "cali-api", "down"])
    assert wait_until(lambda: [name for name, _ in shown()] == ["cali-web"], FOLLOWED_S)
    node.run(["ip", "link", "set", "cali-api", "up"])
    node.run(["ip", "route", "add", pods.world["api"].ip, "dev", "cali-api"])
    assert wait_until(lambda: len(shown()) == 2, FOLLOWED_S)
    pods.daemon.wait_for(lambda: pods.daemon.ask("status")["state"] == "ok")
    assert pods.get(BULK_VIP) == "api"


def test_T14_it_goes_on_without_the_daemon_and_a_successor_takes_over(pods: Pods):
    daemon = pods.daemon
    with pods.connect() as sock:
        assert ask(sock) == "web"
        daemon.signal(9)
        daemon.wait()
        assert ask(sock, 300_000) == "web"
        time.sleep(0.1)  # the heartbeat is stale
        assert pods.get(more=300_000) == "web"  # admitted by XDP
        daemon.start()
        assert ask(sock, 300_000) == "web"
        assert pods.get() == "web"


def test_T14_the_program_where_frames_leave_comes_back_when_it_was_taken_off(pods: Pods):
    pin = pods.daemon.settings.egress_pin("eth0")
    link = kernel.open_pinned(pin)
    try:
        kernel.link_detach(link)
    finally:
        os.close(link)
    assert wait_until(lambda: pods.who() == "web", FOLLOWED_S)


def test_T14_without_forwarding_in_the_kernel_status_says_so(pods: Pods):
    pods.world.node.sysctl("net/ipv4/ip_forward", 0)
    try:
        assert pods.daemon.ask("status")["why"] == [
            "endpoints on this node: the kernel does not forward to them; set net.ipv4.ip_forward to 1"
        ]
    finally:
        pods.world.node.sysctl("net/ipv4/ip_forward", 1)


def test_T3_towards_an_endpoint_on_this_node_nobody_is_masqueraded(pods: Pods):
    daemon = pods.daemon
    daemon.signal(15)
    daemon.wait()
    daemon.start_with = ["--masquerade", "all"]
    try:
        daemon.start()
        assert pods.get() == "web"
        assert daemon.ask("flows")[-1]["client"].startswith(pods.client.ip)
        with pods.world["web"].entered():
            listening = socket.create_server(("", 7000))
        pods.serve(at_node_port(pods.service("web", f"{VIP}:80", 7000, "web")))
        with listening:
            for at in ((VIP, 80), (pods.world.node.ip, NODE_PORT)):
                with pods.connect(*at):
                    accepted, (seen, _) = listening.accept()
                    accepted.close()
                assert seen == pods.client.ip
    finally:
        daemon.start_with = []
        daemon.signal(15)
        daemon.wait()


@pytest.fixture
def routed(pods: Pods) -> Iterator[None]:
    """The client is a router that sends what is to VIPs to the node, also what has come from there."""
    pods.client.sysctl("net/ipv4/ip_forward", 1)
    pods.world.node.run(["ip", "route", "add", "10.96.0.0/16", "via", pods.client.ip])
    yield
    pods.world.node.run(["ip", "route", "delete", "10.96.0.0/16"])
    pods.client.sysctl("net/ipv4/ip_forward", 0)


@with_raw
@pytest.mark.usefixtures("routed")
@pytest.mark.parametrize("rp_filter", [0, 1], ids=["any-path", "strict-paths"])
def test_T5_an_endpoint_on_this_node_reaches_itself_through_its_service(pods: Pods, rp_filter: int):
    node, itself = pods.world.node, pods.world["web"]
    closed = pods.service("closed", f"{VIP}:53", 5999, "web", protocol="UDP")  # where nobody listens
    pods.serve(
        pods.service("web", f"{VIP}:80", 8080, "web"),
        closed,
        pods.service("dns", f"{DNS_VIP}:53", 5353, "web", protocol="UDP"),
    )
    for name in ("all", "eth0", "cali-web"):
        node.sysctl(f"net/ipv4/conf/{name}/rp_filter", rp_filter)
    try:
        for more in (100, 1_000_000):
            with itself.entered():
                sock = socket.create_connection((VIP, 80), timeout=5)
            with sock:
                assert ask(sock, more) == "web"
        with itself.entered():
            served, refused = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        with served, refused:
            for sock, vip in ((served, DNS_VIP), (refused, VIP)):
                sock.settimeout(5)
                sock.connect((vip, 53))
                sock.send(b"who")
            assert served.recv(100) == b"web who"
            with pytest.raises(ConnectionRefusedError):  # an error about its own packet
                refused.recv(100)
    finally:
        for name in ("all", "eth0", "cali-web"):
            node.sysctl(f"net/ipv4/conf/{name}/rp_filter", 0)
    result = clients.load_http(itself, f"{VIP}:80", flows=50, concurrent=10, requests=5)
    assert (result.flows, result.failures, result.moved) == (50, {}, 0)


def test_T14_detach_leaves_no_program(pods: Pods):
    daemon = pods.daemon
    daemon.signal(15)
    daemon.wait()
    assert {pin.name for pin in daemon.settings.egress_pins()} == {"egress-eth0", "egress-eth1"}
    daemon.turnout("detach")
    assert not daemon.settings.pins.exists()
    assert pods.who() == ""


@with_raw
def test_T14_many_connections_at_once(pods: Pods):
    result = clients.load_http(pods.client, f"{VIP}:80", flows=200, concurrent=20, requests=5)
    assert (result.flows, result.failures, result.moved) == (200, {}, 0)


@pytest.mark.parametrize(
    "options", [(), ("-R",), ("-u", "-b", "10M"), ("-u", "-b", "10M", "-R")], ids=["up", "down", "udp-up", "udp-down"]
)
def test_T14_iperf3_measures_a_pod(pods: Pods, options: tuple[str, ...]):
    server = pods.world["web"].popen(["iperf3", "-s"], stdout=-3)
    services = [
        pods.service(f"iperf-{protocol.lower()}", f"{VIP}:5201", 5201, "web", protocol=protocol)
        for protocol in ("TCP", "UDP")
    ]
    try:
        pods.serve(*services)
        report = json.loads(pods.client.run(["iperf3", "-c", VIP, "-t", "1", "-J", *options], check=False).stdout)
    finally:
        pods.world.end(server)
    assert "error" not in report, report["error"]
    end = report["end"]
    if "-u" in options:
        assert end["sum"]["packets"] > 300
        assert end["sum"]["lost_packets"] < end["sum"]["packets"] / 2  # a busy machine may lose some
    else:
        assert end["sum_received"]["bytes"] > 10_000_000  # more than a few segments that are sent again


@pytest.mark.parametrize("pods", ["xdp"], indirect=True)
def test_an_interface_that_takes_no_redirected_frames_is_left_to_the_kernel_within_a_second(pods: Pods):
    far = pods.world["far"]
    pods.serve(pods.service("web", f"{VIP}:80", 8080, "far"))
    assert pods.get() == "far"
    far.run(["ethtool", "-K", "eth0", "gro", "off"])
    try:
        with pods.connect() as sock:
            assert wait_until(lambda: pods.who() == "far", FOLLOWED_S)
            assert ask(sock) == "far"
        assert any("eth1: takes no redirected frames" in line for line in pods.daemon.ask("status")["why"])
        assert [hop["state"] for hop in pods.daemon.ask("nexthops") if hop["destination"] == far.ip] == ["kernel"]
    finally:
        far.run(["ethtool", "-K", "eth0", "gro", "on"])
    pods.daemon.wait_for(lambda: pods.daemon.ask("status")["state"] == "ok")
    assert pods.get() == "far"


@pytest.mark.parametrize("pods", ["xdp"], indirect=True)
def test_so_are_answers_to_clients_behind_one(pods: Pods):
    pods.serve(pods.service("web", f"{VIP}:80", 8080, "far"))
    pods.client.run(["ethtool", "-K", "eth0", "gro", "off"])
    try:
        pods.daemon.wait_for(lambda: "eth0" in str(pods.daemon.ask("status")["why"]))
        assert pods.get(more=300_000) == "far"
    finally:
        pods.client.run(["ethtool", "-K", "eth0", "gro", "on"])
    pods.daemon.wait_for(lambda: pods.daemon.ask("status")["state"] == "ok")
