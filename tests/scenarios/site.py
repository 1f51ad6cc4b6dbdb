"""A node between real clients and servers, with a daemon that comes and goes."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address

import numpy as np

from perf import clients
from perf.world import Host, World, wait_until
from tests.node import Daemon, Service
from xdp import maps
from xdp.maps import SharedMaps
from xdp.schema import Reason, WhenStalled

HOSTS = {"client": "clients", "web-1": "servers", "web-2": "servers", "web-3": "servers"}
SERVERS = ("web-1", "web-2", "web-3")
WEB_PORT, DNS_PORT = 8080, 5353


class Site:
    """Hosts that serve HTTP and UDP by name, and the node's daemon in front of them."""

    def __init__(self, world: World, daemon: Daemon) -> None:
        self.world = world
        self.daemon = daemon
        self._ports = itertools.count(10_000)  # below those that the kernel gives to sockets
        self.web = Service("web", "10.96.0.1:80", self.places(WEB_PORT, *SERVERS))
        self.dns = Service("dns", "10.96.0.10:53", self.places(DNS_PORT, *SERVERS), "UDP")
        for name in SERVERS:
            clients.serve_http(world[name], name, f"0.0.0.0:{WEB_PORT}")
            clients.serve_udp(world[name], name, f"0.0.0.0:{DNS_PORT}")

    @property
    def client(self) -> Host:
        """The host that clients run on."""
        return self.world["client"]

    def places(self, port: int, *hosts: str) -> tuple[str, ...]:
        """Return a port of hosts, as manifests write it."""
        return tuple(f"{self.world[host].ip}:{port}" for host in hosts)

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
    def asking(self) -> Iterator[Asking]:
        """Make a UDP client with a socket of its own, on a port that no other has had: a flow."""
        with self.client.entered():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock:
            sock.bind(("", next(self._ports)))
            yield Asking(sock, self.dns.frontend)

    def check_accounts(self) -> None:
        """Assert that the accounts add up, as soon as nothing is under way."""

        def is_balanced() -> bool:
            packets = self.daemon.ask("status")["packets"]
            xdp, user = packets["xdp"], packets["userspace"]
            return (
                xdp["received"] == xdp["forwarded"] + xdp["passed"] + xdp["dropped"] + xdp["punted"]
                and user["received"] == user["forwarded"] + user["dropped"] == xdp["punted"] - user["punt_lost"]
            )

        assert wait_until(is_balanced, 5), self.daemon.ask("status")["packets"]

    def tables(self) -> SharedMaps:
        """Return the shared tables, to be looked at: also when the daemon does not answer."""
        return maps.open_tables(self.daemon.settings.pins, read_only=True)

    def counted(self, reason: Reason) -> int:
        """Return how often XDP has counted a reason, read from the table."""
        with self.tables() as shared:
            return int(shared.tables.xdp_counters["packets"][:, reason].sum())

    def when_stalled(self, service: Service) -> str:
        """Return what the tables say of new connections to a Service while the daemon stands still."""
        address, port = IPv4Address(service.at[0]).packed, service.at[1]
        with self.tables() as shared:
            frontends = shared.tables.frontends
            is_it = frontends["addr"] == int.from_bytes(address, "little")
            (place,) = np.flatnonzero(is_it & (frontends["port"] == int.from_bytes(port.to_bytes(2, "big"), "little")))
            row = shared.tables.services[frontends[place]["service"]]
        return WhenStalled(int(row["when_stalled"])).name.lower()

    def endpoints_of_flows(self) -> dict[tuple[str, str], str]:
        """Return {(client, frontend): endpoint} of every connection."""
        return {(flow["client"], flow["frontend"]): flow["endpoint"] for flow in self.daemon.ask("flows")}

    def has_programs(self) -> list[str]:
        """Return the interfaces of the node that have an XDP program."""
        links = json.loads(self.world.node.run(["ip", "-j", "link"]).stdout)
        return [link["ifname"] for link in links if "xdp" in link]


class Asking:
    """One UDP flow of a client."""

    def __init__(self, sock: socket.socket, frontend: str) -> None:
        host, port = frontend.split(":")
        self._socket = sock
        self._to = (host, int(port))
        self._number = 0

    @property
    def port(self) -> int:
        """The client's port."""
        return int(self._socket.getsockname()[1])

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


def _tcp_counters(host: Host) -> dict[str, int]:
    text = host.run(["cat", "/proc/net/snmp", "/proc/net/netstat"]).stdout
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith(("Tcp:", "TcpExt:"))]
    return {
        name: int(value)
        for names, values in zip(lines[::2], lines[1::2], strict=True)
        for name, value in zip(names, values, strict=True)
    }
