"""Endpoints on this node, behind veths that keep all their offloads. Ids are those of docs/behaviours.md.

    client (10.77.1.2) ---- eth0 +------+ cali-web ---- web (10.244.0.2)
                                 | node |
    far    (10.77.2.2) ---- eth1 +------+ cali-api ---- api (10.244.0.3)

Over IPv6 the pods are fd77::2 and fd77::3. Only eth0 and eth1 are given, but for engine `raw`, which needs those of
pods, too. On their way out there nothing is left to a device: what the client gets was finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address

import pytest
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from perf import clients
from perf.world import Host, World, wait_until
from tests.daemon import Daemon
from tests.node import NODE_NAME
from tests.scenarios.site import NODE_PORT, at_node_port
from tests.services import Service, split, vip
from xdp import kernel, links
from xdp.addresses import with_port

pytestmark = [pytest.mark.root, pytest.mark.bpf]

FOLLOWED_S = 1.5  # a second, and what commands take on a busy machine
BULK = 8_000_000
WEB, BULK_NUMBER, DNS = 1, 2, 10  # last numbers of VIPs
FORWARDING = {4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding"}

# Reads all that a client sends, then says what it was and sends it back.
_BULK_SERVER = """
import hashlib, socketserver, sys
class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        got = b"".join(iter(lambda: self.request.recv(1 << 20), b""))
        self.request.sendall(hashlib.sha256(got).digest() + got)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    address_family = int(sys.argv[1])
with Server(("", 9000), Handler) as server:
    print(flush=True)
    server.serve_forever()
"""


class Pods:
    """A node with two pods, and whoever asks them."""

    def __init__(self, world: World, daemon: Daemon, family: int) -> None:
        self.world, self.daemon, self.family = world, daemon, family
        self.socket_family = socket.AF_INET if family == 4 else socket.AF_INET6
        anywhere = "0.0.0.0" if family == 4 else "[::]"
        for name in ("web", "api"):
            pod = world.add_pod(name)
            clients.serve_http(pod, name, f"{anywhere}:8080")
            clients.serve_udp(pod, name, f"{anywhere}:5353")
        family_number = str(int(self.socket_family))
        server = world["web"].popen([sys.executable, "-c", _BULK_SERVER, family_number], stdout=-1)
        assert server.stdout is not None
        server.stdout.readline()
        clients.serve_http(world["far"], "far", f"{anywhere}:8080")
        clients.serve_http(world.node, "node", f"{anywhere}:8080")
        world.node.run(["ethtool", "-K", "eth0", "tx", "off"])

    @property
    def client(self) -> Host:
        return self.world["client"]

    def vip(self, number: int) -> str:
        return split(vip(number, 0, self.family))[0]

    def ip(self, host: str) -> str:
        end = self.world[host].interfaces[0]
        return end.ip if self.family == 4 else end.ip6

    def service(
        self, name: str, number: int, frontend_port: int, port: int, *hosts: str, protocol: str = "TCP"
    ) -> Service:
        places = {with_port(ip_address(self.ip(host)), port): host for host in hosts}
        here = {place: {"nodeName": NODE_NAME} for place, host in places.items() if host in ("web", "api")}
        return Service(name, vip(number, frontend_port, self.family), tuple(places), protocol, about=here)

    def serve(self, *services: Service) -> None:
        self.daemon.apply(*services)
        self.daemon.wait_for(lambda: self.daemon.ask("status")["state"] == "ok")

    def serve_all(self) -> None:
        self.serve(
            self.service("web", WEB, 80, 8080, "web"),
            self.service("dns", DNS, 53, 5353, "web", protocol="UDP"),
            self.service("bulk", BULK_NUMBER, 90, 9000, "web"),
        )

    def connect(self, number: int = WEB, port: int = 80) -> socket.socket:
        with self.client.entered():
            return socket.create_connection((self.vip(number), port), timeout=5)

    def datagrams(self) -> socket.socket:
        """Return a socket of the client's."""
        with self.client.entered():
            sock = socket.socket(self.socket_family, socket.SOCK_DGRAM)
        sock.settimeout(5)
        return sock

    def get(self, number: int = WEB, more: int = 100) -> str:
        """Return who answers an HTTP request."""
        with self.connect(number) as sock:
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
        with self.tap(self.client) as sock:
            sock.settimeout(0.2)
            yield frames
            with contextlib.suppress(TimeoutError):
                while True:
                    frames.append(arrived(sock))

    def tap(self, host: Host) -> socket.socket:
        """Return a socket that sees the packets of a host."""
        kind = 0x0800 if self.family == 4 else 0x86DD
        with host.entered():
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind))
        sock.bind(("eth0", kind))
        return sock


def arrived(sock: socket.socket) -> bytes:
    """Return the next frame that arrives at a tap; neighbours that are looked for are not counted."""
    while True:
        frame, (_, _, kind, _, _) = sock.recvfrom(1 << 17)
        is_discovery = frame[12:14] == b"\x86\xdd" and frame[20] == 58 and 133 <= frame[54] <= 137
        if kind != socket.PACKET_OUTGOING and not is_discovery:
            return frame


def ask(sock: socket.socket, more: int = 100) -> str:
    sock.sendall(f"GET /{more} HTTP/1.1\r\n\r\n".encode())
    got = b""
    while len(got) < more:
        part = sock.recv(1 << 16)
        assert part, "closed"
        got += part
    return got.partition(b"Server: ")[2].partition(b"\r")[0].decode()


def life_of(packet: Packet) -> int:
    """Return the hops that a packet has left."""
    return packet.ttl if "IP" in packet else packet.hlim  # type: ignore[no-any-return]


def finished(frame: bytes) -> bytes:
    """Return a frame with the checksums that it ought to have."""
    packet = Ether(frame)
    for layer in ("IP", "TCP", "UDP"):
        if layer in packet:
            del packet[layer].chksum
    return bytes(packet)


BY_KERNEL = ("xdp", "xdp-generic", "afxdp", "xdp-6")  # and AF_XDP's rings know no families
with_raw = pytest.mark.parametrize("pods", [*BY_KERNEL, "raw", "raw-6"], indirect=True, scope="module")


@pytest.fixture(scope="module", params=BY_KERNEL)
def pods(request: pytest.FixtureRequest) -> Iterator[Pods]:
    hosts, prefix = {"client": "clients", "far": "servers"}, f"tl{os.getpid() % 100_000}"
    engine, is_ipv6 = request.param.removesuffix("-6"), request.param.endswith("-6")
    with World(prefix, hosts, ipv6=is_ipv6) as world, Daemon(world, engine) as daemon:
        made = Pods(world, daemon, 6 if is_ipv6 else 4)
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
    with pods.connect(BULK_NUMBER, 90) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        got = b"".join(iter(lambda: sock.recv(1 << 20), b""))
    assert got[:32] == hashlib.sha256(sent).digest()
    assert got[32:] == sent
    if pods.daemon.engine == "raw":
        return  # a frame larger than the MTU counts as one
    (flow,) = [one for one in pods.daemon.ask("flows") if one["frontend"] == vip(BULK_NUMBER, 90, pods.family)][-1:]
    headers = 66 if pods.family == 4 else 86
    for way in ("original", "reply"):  # counted as frames on the wire, of 1514 bytes
        least = BULK // (1514 - headers)
        assert least <= flow["packets"][way] < 2 * least
        assert BULK + headers * least <= flow["bytes"][way] < BULK + headers * 2 * least


@pytest.mark.faults(66)
@with_raw
def test_T14_what_the_client_gets_is_finished_and_comes_from_the_vip(pods: Pods):
    with pods.heard() as frames:
        assert pods.get() == "web"
        with pods.datagrams() as asking:
            asking.sendto(b"who", (pods.vip(DNS), 53))
            assert asking.recv(100) == b"web who"
    assert len(frames) >= 5  # SYN, data, FIN and an acknowledgement at least; the datagram
    for frame in frames:
        packet = Ether(frame)
        assert packet.payload.src in (pods.vip(WEB), pods.vip(DNS))
        assert (packet.src, packet.dst) == (pods.world.node.mac, pods.client.mac)
        assert life_of(packet) == 63  # one router, which is the kernel
        assert frame[:14] + finished(frame)[14:] == frame


@with_raw
def test_T14_requests_have_one_ttl_less_and_the_client_s_address(pods: Pods):
    with pods.tap(pods.world["web"]) as sock:
        sock.settimeout(1)
        assert pods.get() == "web"
        seen = [arrived(sock) for _ in range(4)]
    for frame in seen:
        packet = Ether(frame)
        ends = packet.payload.src, packet.payload.dst, packet["TCP"].dport
        assert ends == (pods.ip("client"), pods.ip("web"), 8080)
        assert life_of(packet) == 63
        assert frame[:14] + finished(frame)[14:] == frame


def test_T14_an_endpoint_may_be_the_node_itself(pods: Pods):
    pods.serve(pods.service("web", WEB, 80, 8080, "node"))
    with pods.heard() as frames:
        assert pods.get(more=100_000) == "node"
    assert {Ether(frame).payload.src for frame in frames} == {pods.vip(WEB)}


@pytest.mark.faults(111)
def test_T14_firewalls_and_path_filters_of_the_node_see_whole_connections(pods: Pods):
    node = pods.world.node
    family, network = ("ip", "10.244.0.0/24") if pods.family == 4 else ("ip6", "fd77::/64")
    rules = f"""
        table {family} tt {{
            chain through {{
                type filter hook forward priority 0; policy drop;
                ct state invalid drop
                ct state established accept
                {family} daddr {network} ct state new accept
            }}
            chain paths {{
                type filter hook prerouting priority 0
                {family} saddr {network} fib saddr . iif oif missing drop
            }}
            chain out {{
                type nat hook postrouting priority 100
                {family} saddr {network} oifname "eth*" masquerade
            }}
        }}
    """
    node.run(["nft", "-f", "-"], text_in=rules)
    for name in ("all", "eth0", "cali-web"):
        node.sysctl(f"net/ipv4/conf/{name}/rp_filter", 1)
    try:
        assert [pods.get(more=size) for size in (100, 300_000)] == ["web", "web"]
    finally:
        node.run(["nft", "delete", "table", family, "tt"])
        for name in ("all", "eth0", "cali-web"):
            node.sysctl(f"net/ipv4/conf/{name}/rp_filter", 0)


def test_N1_an_error_from_a_pod_is_about_what_the_client_has_sent(pods: Pods):
    pods.serve(pods.service("dns", DNS, 53, 5999, "web", protocol="UDP"))  # where nobody listens
    with pods.datagrams() as sock, pods.heard() as frames:
        sock.connect((pods.vip(DNS), 53))
        sock.send(b"who")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)
    (frame,) = frames
    packet, header = Ether(frame), 20 if pods.family == 4 else 40
    error, at = packet.payload.payload, 14 + header
    quote, dns = error.payload, pods.vip(DNS)
    assert (packet.payload.src, quote.src, quote.dst, quote.dport) == (dns, pods.ip("client"), dns, 53)
    error.delfieldval("chksum" if pods.family == 4 else "cksum")
    assert bytes(packet)[at:] == frame[at:]
    # The quoted checksum is that of what was sent.
    del quote["UDP in ICMP"].chksum
    assert bytes(quote)[header : header + 8] == frame[at + 8 + header :][:8]


def test_T14_a_path_that_is_narrower_behind_the_node_is_told_to_the_client(pods: Pods):
    node, pod = pods.world.node, pods.world["web"]
    node.run(["ip", "link", "set", "cali-web", "mtu", "1400"])
    pod.run(["ip", "link", "set", "eth0", "mtu", "1400"])
    try:
        level, discover, mtu = (socket.IPPROTO_IP, 10, 14) if pods.family == 4 else (socket.IPPROTO_IPV6, 23, 24)
        with pods.datagrams() as sock:
            sock.setsockopt(level, discover, 2)  # IP_MTU_DISCOVER: DO
            sock.connect((pods.vip(DNS), 53))
            with contextlib.suppress(OSError):
                sock.send(bytes(1450))
            assert wait_until(lambda: sock.getsockopt(level, mtu) == 1400, 5)  # IP_MTU
    finally:
        pods.client.run(["ip", f"-{pods.family}", "route", "flush", "cache"])
        node.run(["ip", "link", "set", "cali-web", "mtu", "1500"])
        pod.run(["ip", "link", "set", "eth0", "mtu", "1500"])


def test_T14_interfaces_of_pods_are_shown_as_they_come_and_go(pods: Pods):
    both = [pods.service("web", WEB, 80, 8080, "web"), pods.service("api", BULK_NUMBER, 80, 8080, "api")]
    pods.serve(*both)

    def shown() -> list[tuple[str, str]]:
        return [(one["name"], one["why"]) for one in pods.daemon.ask("interfaces") if one["engine"] == "kernel"]

    assert shown() == [("cali-api", "1 endpoint on this node"), ("cali-web", "1 endpoint on this node")]
    node = pods.world.node
    node.run(["ip", "link", "set", "cali-api", "down"])
    assert wait_until(lambda: [name for name, _ in shown()] == ["cali-web"], FOLLOWED_S)
    pods.world.lead_to_pod("api")
    assert wait_until(lambda: len(shown()) == 2, FOLLOWED_S)
    pods.daemon.wait_for(lambda: pods.daemon.ask("status")["state"] == "ok")
    assert pods.get(BULK_NUMBER) == "api"


def test_T14_it_goes_on_without_the_daemon_and_a_successor_takes_over(pods: Pods):
    daemon = pods.daemon
    with pods.connect() as sock:
        assert ask(sock) == "web"
        daemon.signal(9)
        daemon.wait()
        assert ask(sock, 300_000) == "web"
        time.sleep(0.1)  # the heartbeat is stale
        assert pods.who() == "web"  # admitted by XDP
        daemon.start()
        assert ask(sock, 300_000) == "web"
        assert pods.get() == "web"


def test_L_a_drained_endpoint_on_this_node_keeps_its_connections_over_a_restart(pods: Pods):
    daemon = pods.daemon
    pods.serve(
        pods.service("web", WEB, 80, 8080, "web", "far"), pods.service("dns", DNS, 53, 5353, "far", protocol="UDP")
    )
    place = with_port(ip_address(pods.ip("web")), 8080)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(pods.connect()) for _ in range(12)]
        of_web = [sock for sock in socks if ask(sock) == "web"]
        assert of_web
        daemon.turnout("drain", place)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        daemon.start()
        assert {ask(sock) for sock in of_web} == {"web"}
        assert {pods.get() for _ in range(6)} == {"far"}
    daemon.turnout("ready", place)


def test_T14_the_program_where_frames_leave_comes_back_when_it_was_taken_off(pods: Pods):
    pin = pods.daemon.settings.egress_pin("eth0")
    link = kernel.open_pinned(pin)
    try:
        links.detach(link)
    finally:
        os.close(link)
    assert wait_until(lambda: pods.who() == "web", FOLLOWED_S)


@pytest.mark.faults(111)
def test_T14_without_forwarding_in_the_kernel_status_says_so(pods: Pods):
    name = FORWARDING[pods.family]
    pods.world.node.sysctl(name, 0)
    try:
        assert pods.daemon.ask("status")["why"] == [
            f"endpoints on this node: the kernel does not forward to them; set {name.replace('/', '.')} to 1"
        ]
    finally:
        pods.world.node.sysctl(name, 1)


def test_T3_towards_an_endpoint_on_this_node_nobody_is_masqueraded(pods: Pods):
    daemon = pods.daemon
    daemon.signal(15)
    daemon.wait()
    daemon.start_with = ["--masquerade", "all"]
    try:
        daemon.start()
        assert pods.get() == "web"
        assert split(daemon.ask("flows")[-1]["client"])[0] == pods.ip("client")
        with pods.world["web"].entered():
            listening = socket.create_server(("", 7000), family=pods.socket_family)
        pods.serve(at_node_port(pods.service("web", WEB, 80, 7000, "web")))
        with listening:
            for at in ((pods.vip(WEB), 80), (pods.ip("node"), NODE_PORT)):
                with pods.client.entered():
                    sock = socket.create_connection(at, timeout=5)
                with sock:
                    accepted, (seen, *_) = listening.accept()
                    accepted.close()
                assert seen == pods.ip("client")
    finally:
        daemon.start_with = []
        daemon.signal(15)
        daemon.wait()


@pytest.fixture
def routed(pods: Pods) -> Iterator[None]:
    """The client is a router that sends what is to VIPs to the node, also what has come from there."""
    network = "10.96.0.0/16" if pods.family == 4 else "fd96::/64"
    pods.client.sysctl(FORWARDING[pods.family], 1)
    pods.world.node.run(["ip", "route", "add", network, "via", pods.ip("client")])
    yield
    pods.world.node.run(["ip", "route", "delete", network])
    pods.client.sysctl(FORWARDING[pods.family], 0)


@pytest.mark.faults(111)
@with_raw
@pytest.mark.usefixtures("routed")
@pytest.mark.parametrize("rp_filter", [0, 1], ids=["any-path", "strict-paths"])
def test_T5_an_endpoint_on_this_node_reaches_itself_through_its_service(pods: Pods, rp_filter: int):
    node, itself = pods.world.node, pods.world["web"]
    closed = pods.service("closed", WEB, 53, 5999, "web", protocol="UDP")  # where nobody listens
    pods.serve(
        pods.service("web", WEB, 80, 8080, "web"),
        closed,
        pods.service("dns", DNS, 53, 5353, "web", protocol="UDP"),
    )
    for name in ("all", "eth0", "cali-web"):
        node.sysctl(f"net/ipv4/conf/{name}/rp_filter", rp_filter)
    try:
        for more in (100, 1_000_000):
            with itself.entered():
                sock = socket.create_connection((pods.vip(WEB), 80), timeout=5)
            with sock:
                assert ask(sock, more) == "web"
        with itself.entered():
            served, refused = (socket.socket(pods.socket_family, socket.SOCK_DGRAM) for _ in range(2))
        with served, refused:
            for sock, number in ((served, DNS), (refused, WEB)):
                sock.settimeout(5)
                sock.connect((pods.vip(number), 53))
                sock.send(b"who")
            assert served.recv(100) == b"web who"
            with pytest.raises(ConnectionRefusedError):  # an error about its own packet
                refused.recv(100)
    finally:
        for name in ("all", "eth0", "cali-web"):
            node.sysctl(f"net/ipv4/conf/{name}/rp_filter", 0)
    result = clients.load_http(itself, vip(WEB, 80, pods.family), flows=50, concurrent=10, requests=5)
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
    result = clients.load_http(pods.client, vip(WEB, 80, pods.family), flows=200, concurrent=20, requests=5)
    assert (result.flows, result.failures, result.moved) == (200, {}, 0)


@pytest.mark.parametrize(
    "options", [(), ("-R",), ("-u", "-b", "10M"), ("-u", "-b", "10M", "-R")], ids=["up", "down", "udp-up", "udp-down"]
)
def test_T14_iperf3_measures_a_pod(pods: Pods, options: tuple[str, ...]):
    server = pods.world["web"].popen(["iperf3", "-s"], stdout=-3)
    services = [
        pods.service(f"iperf-{protocol.lower()}", WEB, 5201, 5201, "web", protocol=protocol)
        for protocol in ("TCP", "UDP")
    ]
    try:
        pods.serve(*services)
        command = ["iperf3", "-c", pods.vip(WEB), "-t", "1", "-J", *options]
        report = json.loads(pods.client.run(command, check=False).stdout)
    finally:
        pods.world.end(server)
    assert "error" not in report, report["error"]
    end = report["end"]
    if "-u" in options:
        assert end["sum"]["packets"] > 300
        assert end["sum"]["lost_packets"] < end["sum"]["packets"] / 2  # a busy machine may lose some
    else:
        assert end["sum_received"]["bytes"] > 10_000_000  # more than a few segments that are sent again


@pytest.mark.parametrize("pods", ["xdp", "xdp-6"], indirect=True)
def test_an_interface_that_takes_no_redirected_frames_is_left_to_the_kernel_within_a_second(pods: Pods):
    far = pods.world["far"]
    pods.serve(pods.service("web", WEB, 80, 8080, "far"))
    assert pods.get() == "far"
    far.run(["ethtool", "-K", "eth0", "gro", "off"])
    try:
        with pods.connect() as sock:
            assert wait_until(lambda: pods.who() == "far", FOLLOWED_S)
            assert ask(sock) == "far"
        assert any("eth1: takes no redirected frames" in line for line in pods.daemon.ask("status")["why"])
        hops = {hop["destination"]: hop["state"] for hop in pods.daemon.ask("nexthops")}
        assert hops[pods.ip("far")] == "kernel"
    finally:
        far.run(["ethtool", "-K", "eth0", "gro", "on"])
    pods.daemon.wait_for(lambda: pods.daemon.ask("status")["state"] == "ok")
    assert pods.get() == "far"


@pytest.mark.parametrize("pods", ["xdp", "xdp-6"], indirect=True)
def test_so_are_answers_to_clients_behind_one(pods: Pods):
    pods.serve(pods.service("web", WEB, 80, 8080, "far"))
    pods.client.run(["ethtool", "-K", "eth0", "gro", "off"])
    try:
        pods.daemon.wait_for(lambda: "eth0" in str(pods.daemon.ask("status")["why"]))
        assert pods.get(more=300_000) == "far"
    finally:
        pods.client.run(["ethtool", "-K", "eth0", "gro", "on"])
    pods.daemon.wait_for(lambda: pods.daemon.ask("status")["state"] == "ok")
