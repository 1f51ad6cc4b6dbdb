"""A node between real clients and servers, with a daemon that comes and goes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv6Address
from typing import Any

import numpy as np

from perf import clients
from perf.world import Host, Interface, World, wait_until
from tests.daemon import Daemon
from tests.services import Service, split, vip
from xdp.addresses import IPV6
from xdp.byteorder import swap16, swap32
from xdp.files import SharedFile
from xdp.maps import SharedMaps
from xdp.names import words_of
from xdp.schema import Reason

HOSTS = {"client": "clients", "web-1": "servers", "web-2": "servers", "web-3": "servers"}
ENGINES_4, ENGINES_6 = ("xdp", "xdp-generic", "afxdp", "raw"), ("xdp-6", "afxdp-6", "raw-6")
# For what depends on userspace, not on how it gets its frames: the same with XDP in generic mode, and IPv6 over AF_XDP.
EACH_PATH = ("xdp", "afxdp", "raw", "xdp-6", "raw-6")
SERVERS = ("web-1", "web-2", "web-3")
WEB_PORT, DNS_PORT, ECHO_PORT, NODE_PORT = 8080, 5353, 9090, 30_080


class Site:
    """Hosts that serve HTTP and UDP by name, and the node's daemon in front of them."""

    def __init__(self, world: World, daemon: Daemon, family: int = 4) -> None:
        self.world = world
        self.daemon = daemon
        self.family = family
        self._ports = itertools.count(10_000)  # below those that the kernel gives to sockets
        self.web = Service("web", self.vip(1, 80), self.places(WEB_PORT, *SERVERS))
        self.dns = Service("dns", self.vip(10, 53), self.places(DNS_PORT, *SERVERS), "UDP")
        anywhere = "0.0.0.0" if family == 4 else "[::]"
        for name in SERVERS:
            clients.serve_http(world[name], name, f"{anywhere}:{WEB_PORT}")
            clients.serve_udp(world[name], name, f"{anywhere}:{DNS_PORT}")

    def vip(self, number: int, port: int) -> str:
        """Return a port of a Service's address, as manifests and clients write it."""
        return vip(number, port, self.family)

    @property
    def socket_family(self) -> int:
        """The family of sockets that clients open."""
        return socket.AF_INET if self.family == 4 else socket.AF_INET6

    def ip(self, host: str) -> str:
        """Return a host's address."""
        end = self.world[host].interfaces[0]
        return end.ip if self.family == 4 else end.ip6

    @property
    def client(self) -> Host:
        """The host that clients run on."""
        return self.world["client"]

    def places(self, port: int, *hosts: str) -> tuple[str, ...]:
        """Return a port of hosts, as manifests write it."""
        ends = [self.world[host].interfaces[0] for host in hosts]
        return tuple(f"{end.ip}:{port}" if self.family == 4 else f"[{end.ip6}]:{port}" for end in ends)

    def own(self, end: Interface, port: int) -> str:
        """Return a port of one of the node's own addresses."""
        return f"{end.ip}:{port}" if self.family == 4 else f"[{end.ip6}]:{port}"

    def addresses(self, *hosts: str) -> list[str]:
        """Return the addresses of hosts."""
        ends = [self.world[host].interfaces[0] for host in hosts]
        return [str(end.ip if self.family == 4 else end.ip6) for end in ends]

    def serve(self) -> None:
        """Have the daemon running, with the two Services, and well."""
        process = self.daemon.process
        if process is None or process.poll() is not None:
            self.daemon.start()
        self.daemon.apply(self.web, self.dns)
        self.wait_until_ok()

    def wait_until_ok(self) -> None:
        """Return when the status is ok."""
        self.daemon.wait_for(lambda: self.daemon.ask("status")["state"] == "ok")

    def lost_segments(self) -> int:
        """Return how many TCP segments were sent again so far, by all hosts, that their receiver had not got already.

        A sender that waits for a busy machine sends again what is merely late: the receiver says so (DSACK).
        """
        counters = [_tcp_counters(host) for name, host in self.world.hosts.items() if name != "node"]
        return sum(of_host["RetransSegs"] - of_host["TCPDSACKOldSent"] for of_host in counters)

    def load(self, kind: str, service: Service, **options: float) -> clients.Load:
        """Return a load of flows that are all open from the beginning and ask without end, answer by answer."""
        given = {"flows": 20, "concurrent": 20, "requests": 1_000_000, "interval": 0.005, "timeout": 5, **options}
        return clients.Load(self.client, kind, service.frontend, **given)

    @contextlib.contextmanager
    def asking(self, client: str = "client") -> Iterator[Asking]:
        """Make a UDP client with a socket of its own, on a port that no other has had: a flow."""
        with self.world[client].entered():
            sock = socket.socket(self.socket_family, socket.SOCK_DGRAM)
        with sock:
            sock.bind(("", next(self._ports)))
            yield Asking(sock, self.dns.frontend)

    def check_accounts(self) -> None:
        """Assert that the accounts add up, as soon as nothing is under way."""

        def is_balanced() -> bool:
            packets = self.daemon.ask("status")["packets"]
            xdp, user = packets["xdp"], packets["userspace"]
            if self.daemon.engine == "raw":
                return user["received"] == user["forwarded"] + user["passed"] + user["dropped"]
            return (
                xdp["received"] == xdp["forwarded"] + xdp["passed"] + xdp["dropped"] + xdp["punted"]
                and user["received"] == user["forwarded"] + user["dropped"] == xdp["punted"] - user["punt_lost"]
            )

        assert wait_until(is_balanced, 5), self.daemon.ask("status")["packets"]

    def tables(self) -> SharedMaps | SharedFile:
        """Return the shared tables, to be looked at: also when the daemon does not answer."""
        return self.daemon.tables()

    def counted(self, reason: Reason) -> int:
        """Return how often XDP has counted a reason, read from the table."""
        with self.tables() as shared:
            return int(shared.tables.xdp_counters["packets"][:, reason].sum())

    def row(self, service: Service) -> np.void:
        """Return the row of a Service in the tables: what a packet finds."""
        host, port = service.at
        with self.tables() as shared:
            frontends = shared.tables.frontends
            if self.family == 6:
                words = np.array(words_of(IPv6Address(host ^ IPV6)), np.uint64)
                names = shared.tables.names  # one that has died may say the same still
                (host,) = np.flatnonzero((names["addr"] == words).all(axis=1) & (names["pins"] > 0))
            is_it = frontends["addr"] == swap32(int(host))
            (place,) = np.flatnonzero(is_it & (frontends["port"] == swap16(port)))
            return shared.tables.services[frontends[place]["service"]].copy()  # type: ignore[no-any-return]

    def endpoints_of_flows(self, *, active: bool = False) -> dict[tuple[str, str], str]:
        """Return {(client, frontend): endpoint} of every connection, or of those only that have just been used."""
        flows = [flow for flow in self.daemon.ask("flows") if not active or is_active(flow)]
        return {(flow["client"], flow["frontend"]): flow["endpoint"] for flow in flows}

    def has_programs(self) -> list[str]:
        """Return the interfaces of the node that have an XDP program."""
        links = json.loads(self.world.node.run(["ip", "-j", "link"]).stdout)
        return [link["ifname"] for link in links if "xdp" in link]


@contextlib.contextmanager
def undisturbed(site: Site) -> Iterator[None]:
    """Keep HTTP connections and UDP flows asking meanwhile; none may lose a packet, fail or move."""
    with site.load("http-load", site.web) as http, site.load("udp-load", site.dns) as udp:
        site.daemon.wait_for(lambda: count_active(site) == 40)
        before = site.lost_segments()
        yield
        after = site.lost_segments()
    for load in (http, udp):
        result = load.result
        assert (result.flows, result.failures, result.moved) == (20, {}, 0)
        assert result.answered >= 5 * result.flows, result
    assert after <= before  # the notice that one was merely late may be late itself


def is_active(flow: Mapping[str, Any]) -> bool:
    """Whether a connection is open and has just been used: those that other tests have left are not."""
    return flow["state"] in ("established", "udp_replied") and flow["idle_s"] < 0.1


def count_active(site: Site) -> int:
    """Return how many connections are."""
    return sum(map(is_active, site.daemon.ask("flows")))


def at_node_port(service: Service, port: int = NODE_PORT) -> Service:
    """Return a Service that has a node port, too."""
    ports = [{"name": "main", "port": service.at[1], "nodePort": port, "protocol": service.protocol}]
    return replace(service, spec={"type": "NodePort", "ports": ports})


class Asking:
    """One UDP flow of a client."""

    def __init__(self, sock: socket.socket, frontend: str) -> None:
        self._socket = sock
        self._to = split(frontend)
        self._number = 0

    @property
    def port(self) -> int:
        """The client's port."""
        return int(self._socket.getsockname()[1])

    def extend(self, kind: int) -> None:
        """Have an extension header in every datagram from now on: see `extend`."""
        extend(self._socket, kind)

    def __call__(self, timeout_s: float = 1.0) -> str | None:
        """Send a datagram; return the name of the server that answers, None if none does."""
        self._number += 1
        asked = str(self._number).encode()
        self._socket.settimeout(timeout_s)
        self._socket.sendto(asked, self._to)
        with contextlib.suppress(TimeoutError):
            while True:
                name, _, echoed = self._socket.recv(2048).partition(b" ")
                if echoed == asked:
                    return name.decode()
        return None

    def large(self, datagram: bytes, timeout_s: float = 3.0) -> bytes:
        """Send a datagram of any length; return what the server sends back behind its name."""
        self._socket.settimeout(timeout_s)
        self._socket.sendto(datagram, self._to)
        return self._socket.recv(1 << 16).partition(b" ")[2]


def _tcp_counters(host: Host) -> dict[str, int]:
    text = host.run(["cat", "/proc/net/snmp", "/proc/net/netstat"]).stdout
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith(("Tcp:", "TcpExt:"))]
    return {
        name: int(value)
        for names, values in zip(lines[::2], lines[1::2], strict=True)
        for name, value in zip(names, values, strict=True)
    }


def extend(sock: socket.socket, kind: int) -> None:
    """Have an IPv6 extension header with nothing but padding in all that a socket sends.

    `kind`: IPV6_HOPOPTS or IPV6_DSTOPTS of `socket`.
    """
    sock.setsockopt(socket.IPPROTO_IPV6, kind, bytes((0, 0, 1, 4, 0, 0, 0, 0)))


def _echo_once(host: Host, family: int, listening: threading.Event, extension: int | None) -> None:
    """Take one connection on `host`, and send back all that comes."""
    with host.entered(), socket.create_server(("", ECHO_PORT), family=family) as server:
        if extension:
            extend(server, extension)
        listening.set()
        connection, _ = server.accept()
        with connection:
            while piece := connection.recv(1 << 18):
                connection.sendall(piece)


def echoed(site: Site, echo: Service, sent: bytes, extension: int | None = None) -> bytes:
    """Send bytes through a Service whose endpoint is web-2, which sends them back; return the digest of what comes.

    Both may have an extension header in each packet: see `extend`.
    """
    listening = threading.Event()
    of_server = site.world["web-2"], site.socket_family, listening, extension
    server = threading.Thread(target=_echo_once, args=of_server, daemon=True)
    server.start()
    listening.wait(5)
    with site.client.entered():
        connection = socket.socket(site.socket_family)
    received = hashlib.sha256()
    with connection:
        if extension:
            extend(connection, extension)
        connection.settimeout(30)
        connection.connect(split(echo.frontend))

        def upload() -> None:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=upload, daemon=True)
        sender.start()
        while piece := connection.recv(1 << 18):
            received.update(piece)
        sender.join()
    server.join()
    return received.digest()


def who_answers(sock: socket.socket) -> str:
    """Ask by HTTP; return the server's name."""
    sock.sendall(b"GET /10 HTTP/1.1\r\n\r\n")
    got = b""
    while b"\r\n\r\n" not in got or len(got.partition(b"\r\n\r\n")[2]) < 10:
        part = sock.recv(1 << 16)
        assert part, "closed"
        got += part
    return got.partition(b"Server: ")[2].partition(b"\r")[0].decode()
