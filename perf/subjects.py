"""What is measured: devices that lead the generator's packets from one side of a node to the other.

Each subject has a testbed of its own, the same for all: a world client -- node -- server in which the generator sends
from the client's wire and the sink counts at the server's. A subject is started in the node and does the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol, Self

from perf.traffic import PINS, Generator, Sink, Stream, Task, load_program, mac_word
from perf.world import Host, World, wait_until
from xdp import kernel
from xdp.errors import Error, MissingFeatureError

CLIENTS = "10.200.0.0/13"  # routed to the client's host: 2^19 clients
FIRST_CLIENT = IPv4Address("10.200.0.0")
FIRST_VIP = IPv4Address("10.96.0.10")
SERVICE_PORT, ENDPOINT_PORT = 80, 8080
ENDPOINTS = 4
_READY_S = 180.0  # compiling the packet path for the first time takes long on a busy machine
_FEWEST_WARM = 4096  # packets that warm a bed up, however few its flows


@dataclass(frozen=True)
class Service:
    """A Service: its VIP, the addresses of its endpoints, its protocol (udp, tcp) and port; endpoints have one port."""

    vip: IPv4Address
    endpoints: tuple[IPv4Address, ...]
    protocol: str = "udp"
    port: int = SERVICE_PORT


class Cpus:
    """Who runs where: the generator, and with it the kernel's receive path, on the last CPU; userspace elsewhere."""

    def __init__(self) -> None:
        everyone = sorted(os.sched_getaffinity(0))
        self.generator = {everyone[-1]}
        self.others = set(everyone[:-1]) or self.generator

    @staticmethod
    @contextlib.contextmanager
    def pinned(cpus: set[int]) -> Iterator[None]:
        """Keep the calling thread, and what it starts meanwhile, on `cpus`."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def describe(self) -> str:
        """Return it in words, for the conditions of a row."""
        generator, others = (",".join(map(str, sorted(cpus))) for cpus in (self.generator, self.others))
        return f"generator and kernel receive path on CPU {generator}, userspace on CPU {others}"


class Testbed:
    """A world with generator and sink, as a context manager. `services` Services, traffic goes to the last one."""

    __test__ = False  # pytest takes the name for a test

    def __init__(self, prefix: str, cpus: Cpus, services: int = 1) -> None:
        self.prefix = prefix
        self.cpus = cpus
        self.world = World(prefix, ["client", "server"], static_neighbours=True)
        self.folder = PINS / prefix
        self.flows = 0
        self._first_unused = 0
        self._services = services
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            kernel.mount_bpffs(PINS)
            world = stack.enter_context(self.world)
            world.owns_folder(self.folder)
            self.folder.mkdir()
            self.inside = world.node.interface_to("client")
            self.outside = world.node.interface_to("server")
            client, server = world["client"], world["server"]
            addresses = tuple(IPv4Address(server.ip) + n for n in range(ENDPOINTS))
            for address in addresses[1:]:
                server.run(["ip", "address", "add", f"{address}/24", "dev", "eth0"])
                at = ["lladdr", server.mac, "dev", self.outside.name, "nud", "permanent"]
                world.node.run(["ip", "neighbour", "add", str(address), *at])
            world.node.run(["ip", "route", "add", CLIENTS, "via", client.ip])
            self.services = [Service(FIRST_VIP + n, addresses) for n in range(self._services)]
            stream = Stream("eth0", client.mac, self.inside.mac, FIRST_CLIENT, self.services[-1].vip, SERVICE_PORT)
            self.sink = stack.enter_context(Sink(server, "eth0", ENDPOINT_PORT, self.folder))
            self.generator = stack.enter_context(Generator(client, stream, self.folder))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def prepare(self, flows: int) -> None:
        """Choose what is sent next. Known flows are all seen and answered twice, so that they are established.

        Without replies the kernel's connection tracking, and its rules, would take UDP for new again and again.
        0 flows: every frame will begin one that was never seen before.
        """
        if self.flows == 0:
            self._first_unused = max(self._first_unused, self.generator.next_flow)
        self.flows = flows
        if flows == 0:
            self.generator.choose(0, self._first_unused)
            return
        self.generator.choose(flows)
        self._first_unused = max(self._first_unused, flows)
        with self.sink.doing(Task.REFLECT):
            for _ in range(2):
                self.generator.send_in_step(self.sink, frames=max(flows, _FEWEST_WARM))

    def received(self) -> int:
        """Return the node's own count of packets that came in from the client's side."""
        return self.world.node.packets(self.inside.name)


class Subject(Protocol):
    """Something that forwards. `has_own_cpu`: its packets are not forwarded by the CPU that generates them."""

    name: str
    translates: bool
    has_own_cpu: bool

    def running(self, bed: Testbed) -> AbstractContextManager[None]:
        """Start it in the bed's node; it forwards until the context is left. MissingFeatureError: it cannot be had."""


class BareRedirect:
    """The bar for XDP: a program that writes two MACs and redirects."""

    name = "bare-xdp"
    translates = False
    has_own_cpu = False

    @contextlib.contextmanager
    def running(self, bed: Testbed) -> Iterator[None]:
        """Attach the program."""
        with bed.world.node.entered():
            outward, inward = (socket.if_nametoindex(end.name) for end in (bed.outside, bed.inside))
        macs = {"DST_MAC": mac_word(bed.world["server"].mac), "SRC_MAC": mac_word(bed.outside.mac)}
        program = load_program(bed.folder, "redirect.c", "redirect", {**macs, "IFINDEX": outward})
        try:
            with bed.world.node.entered():
                link = kernel.link_create_xdp(program, inward, "native")
            try:
                yield
            finally:
                os.close(link)
        finally:
            os.close(program)


class BareAfXdp:
    """The bar for AF_XDP: a compiled loop that receives from one socket and sends to another, frames untouched."""

    name = "bare-afxdp"
    translates = False
    has_own_cpu = True

    @contextlib.contextmanager
    def running(self, bed: Testbed) -> Iterator[None]:
        """Run the loop in a thread of ours."""
        from dataplane.afxdp import Umem  # compiles
        from perf import echo

        with ExitStack() as stack:
            with bed.world.node.entered(), bed.cpus.pinned(bed.cpus.others):
                umem = stack.enter_context(Umem())
                inward, outward = umem.open(bed.inside.name), umem.open(bed.outside.name)
                stack.enter_context(echo.fed(inward))
                stack.enter_context(echo.Loop(inward, outward, echo.Act.SEND))
            yield


class Iptables:
    """kube-proxy's rules: iptables-nft, KUBE-SERVICES to KUBE-SVC to KUBE-SEP, the kernel's conntrack and routing."""

    name = "iptables"
    translates = True
    has_own_cpu = False

    @contextlib.contextmanager
    def running(self, bed: Testbed) -> Iterator[None]:
        """Load the rules; frames become packets as a NIC's driver would make them (GRO on), checksums seen as right."""
        node = bed.world.node
        load_kube_proxy_rules(node, bed.services)
        try:
            yield
        finally:
            node.run(["iptables-nft-restore"], text_in="*nat\nCOMMIT\n*filter\nCOMMIT\n")


class Turnout:
    """The daemon itself, with one of its engines."""

    translates = True

    def __init__(self, engine: str, capacity: int = 2_500_000) -> None:
        self.name = f"turnout-{engine}"
        self.has_own_cpu = engine != "xdp"
        self._engine = engine
        self._capacity = capacity

    @contextlib.contextmanager
    def running(self, bed: Testbed) -> Iterator[None]:
        """Start `turnout run` in the node and wait until it says that it is ready."""
        name = bed.prefix + "-d"
        bed.world.owns_folder(PINS / name)
        state = Path(tempfile.mkdtemp(prefix=f"{bed.prefix}-"))
        bed.world.owns_folder(state)
        file = state / "services.json"
        file.write_text(json.dumps(manifests(bed.services)))
        command = [sys.executable, "-c", "from dataplane.cli import main; main()"]
        options = ["--name", name, "-f", str(file), "-i", bed.inside.name, "-i", bed.outside.name]
        options += ["--engine", self._engine, "--capacity", str(self._capacity), "--on-exit", "detach"]
        log = state / "log"
        with log.open("w") as stream, bed.cpus.pinned(bed.cpus.others):
            daemon = bed.world.node.popen([*command, "run", *options], stdout=stream, stderr=stream)
        try:
            self._wait(bed, [*command, "status", "--name", name], daemon, log)
            yield
        finally:
            bed.world.end(daemon)
            shutil.rmtree(state, ignore_errors=True)

    def _wait(self, bed: Testbed, status: Sequence[str], daemon: subprocess.Popen[bytes], log: Path) -> None:
        def is_ready() -> bool:
            return daemon.poll() is not None or bed.world.node.run(status, check=False).returncode == 0

        wait_until(is_ready, _READY_S, 0.1)
        if daemon.poll() is None and bed.world.node.run(status, check=False).returncode == 0:
            return
        said = log.read_text().strip().splitlines()[-5:]
        message = f"{self.name}: the daemon did not become ready; it said: {' | '.join(said) or 'nothing'}"
        raise (MissingFeatureError if daemon.poll() in (1, 77) else Error)(message)


def load_kube_proxy_rules(node: Host, services: Sequence[Service]) -> None:
    """Make `node` what kube-proxy makes of it. Packets come in as from a NIC's driver: GRO on, checksums verified."""
    for interface in node.interfaces:
        node.run(["ethtool", "-K", interface.name, "gro", "on"])
    node.sysctl("net/netfilter/nf_conntrack_checksum", 0)
    node.run(["iptables-nft-restore"], text_in=kube_proxy_rules(services))


def kube_proxy_rules(services: Sequence[Service]) -> str:
    """Return what kube-proxy gives to iptables-restore for Services without a cluster CIDR, as text.

    Chains, comments, marks and their order are those of kube-proxy 1.36; names are numbers instead of hashes.
    """
    chains, rules = [], []
    for number, service in enumerate(services):
        protocol = service.protocol
        name, of = f"KUBE-SVC-{number:016X}", f"shop/service-{number}:{protocol}"
        chains.append(f":{name} - [0:0]")
        portal = (
            f'-d {service.vip}/32 -p {protocol} -m comment --comment "{of} cluster IP" '
            f"-m {protocol} --dport {service.port}"
        )
        rules.append(f"-A KUBE-SERVICES {portal} -j {name}")
        for index, endpoint in enumerate(service.endpoints):
            left = len(service.endpoints) - index
            one_of = f" -m statistic --mode random --probability {1 / left:.10f}" if left > 1 else ""
            separate, target = f"KUBE-SEP-{number:012X}{index:04X}", f"{endpoint}:{ENDPOINT_PORT}"
            chains.append(f":{separate} - [0:0]")
            rules.append(f'-A {name} -m comment --comment "{of} -> {target}"{one_of} -j {separate}')
            rules.append(f'-A {separate} -s {endpoint}/32 -m comment --comment "{of}" -j KUBE-MARK-MASQ')
            match = f'-p {protocol} -m comment --comment "{of}" -m {protocol}'
            rules.append(f"-A {separate} {match} -j DNAT --to-destination {target}")
    return "\n".join([*_NAT_BEFORE, *chains, *_NAT_ALWAYS, *rules, "COMMIT", *_FILTER, "COMMIT", ""])


_PORTALS = '-m comment --comment "kubernetes service portals" -j KUBE-SERVICES'
_NAT_BEFORE = [
    "*nat",
    *(f":KUBE-{name} - [0:0]" for name in ("SERVICES", "POSTROUTING", "MARK-MASQ", "NODEPORTS")),
]
_NAT_ALWAYS = [
    f"-A PREROUTING {_PORTALS}",
    f"-A OUTPUT {_PORTALS}",
    '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
    "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
    "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000",
    '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
    "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
]
_NEW = '-m conntrack --ctstate NEW -m comment --comment "kubernetes'
_ESTABLISHED = '-m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED'
_FILTER = [
    "*filter",
    *(f":KUBE-{name} - [0:0]" for name in ("FORWARD", "EXTERNAL-SERVICES", "SERVICES", "PROXY-FIREWALL")),
    f'-A FORWARD {_NEW} load balancer firewall" -j KUBE-PROXY-FIREWALL',
    '-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',
    f'-A FORWARD {_NEW} service portals" -j KUBE-SERVICES',
    f'-A FORWARD {_NEW} externally-visible service portals" -j KUBE-EXTERNAL-SERVICES',
    "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
    '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT',
    f"-A KUBE-FORWARD {_ESTABLISHED} -j ACCEPT",
]


def manifests(services: Sequence[Service]) -> dict[str, object]:
    """Return the same Services as Kubernetes objects: a List of Services and EndpointSlices."""
    items: list[dict[str, object]] = []
    for number, service in enumerate(services):
        name = f"service-{number}"
        port = {"name": "udp", "protocol": "UDP", "port": SERVICE_PORT, "targetPort": ENDPOINT_PORT}
        items.append(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"namespace": "shop", "name": name},
                "spec": {"clusterIP": str(service.vip), "clusterIPs": [str(service.vip)], "ports": [port]},
            }
        )
        labels = {"kubernetes.io/service-name": name}
        items.append(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"namespace": "shop", "name": f"{name}-1", "labels": labels},
                "addressType": "IPv4",
                "ports": [{"name": "udp", "protocol": "UDP", "port": ENDPOINT_PORT}],
                "endpoints": [
                    {"addresses": [str(address)], "conditions": {"ready": True}} for address in service.endpoints
                ],
            }
        )
    return {"apiVersion": "v1", "kind": "List", "items": items}


_CONNTRACK_MAX = Path("/proc/sys/net/netfilter/nf_conntrack_max")
_CONNTRACK_BEFORE = Path("/run/turnout/conntrack-before.json")
_CONNTRACK_BUCKETS = Path("/sys/module/nf_conntrack/parameters/hashsize")


@contextlib.contextmanager
def raised_conntrack(entries: int) -> Iterator[None]:
    """Give the kernel's connection tracking room for `entries`, a bucket each, for the duration of the block.

    Both are of the machine, not of a network namespace. What they were is kept in a file until they are so again: a run
    that is killed is made good by the next one. Raises MissingFeatureError if there is no connection tracking.
    """
    try:
        if _CONNTRACK_BEFORE.exists():
            before = json.loads(_CONNTRACK_BEFORE.read_text())
        else:
            before = {str(path): path.read_text() for path in (_CONNTRACK_BUCKETS, _CONNTRACK_MAX)}
            _CONNTRACK_BEFORE.parent.mkdir(parents=True, exist_ok=True)
            _CONNTRACK_BEFORE.write_text(json.dumps(before))
        for path in before:
            Path(path).write_text(str(entries))
    except OSError as error:
        raise MissingFeatureError(f"connection tracking cannot be tuned ({error}); run as root on the host") from None
    try:
        yield
    finally:
        for path, text in before.items():
            Path(path).write_text(text)
        _CONNTRACK_BEFORE.unlink(missing_ok=True)
