"""Worlds of network namespaces: hosts, wires and switches around one node, for tests, the demo and measurements.

    client-1 ---- eth0 +------+ eth1 ---- [switch] ---- web-1
    client-2 ---- eth2 | node |               |-------- web-2
                       +------+

A network is one subnet behind one interface of the node. A network of one host is a veth pair; several hosts share
a switch (a namespace of its own with a bridge). The node routes between networks, and every host's default route
leads to the node, so that VIPs do too. IPv6 is off unless it is asked for: nothing but what a test sends is on the
wires.

Network n (from 1) is 10.77.n.0/24, the node is .1 there and hosts follow from .2; with IPv6 it is also fd77:0:n::/64,
with the same last numbers. The MAC of every interface is
02:00 and its IPv4 address. The ends far from the node play a wire: transmit offloads are off (a local kernel would
send partial checksums and frames larger than the MTU), and GRO is on, because a frame that XDP redirects into a veth
is lost unless the peer has NAPI.

Everything is recorded in /run/turnout/worlds/PREFIX.json before it is made. Leaving the world removes it; what a
killed owner left behind is removed when the next world of the same prefix starts, or by `World.clean_leftovers`.
Processes keep the mount namespace (`nsenter --net`), so that pins under /run/turnout/bpf stay visible to them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface
from pathlib import Path
from typing import Any, Self, TypeVar

from xdp.errors import Error, MissingFeatureError, TimedOutError, UsageError

_T = TypeVar("_T")

RECORDS = Path("/run/turnout/worlds")
_NAMESPACES = Path("/run/netns")
_OWN_NAMESPACE = Path("/proc/thread-self/ns/net")
_SPACE = IPv4Network("10.77.0.0/16")
_POD_SPACE = IPv4Network("10.244.0.0/24")
_POD_GATEWAY6 = "fd77::1"
_PODS = "pods"
_LONGEST_PREFIX = 40  # a namespace is a file name; pins and sockets are named after it too
_TERM_S = 3.0  # a process that ignores SIGTERM for so long is killed
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Interface:
    """One end of a wire as the namespace that holds it sees it."""

    name: str
    address: IPv4Interface
    network: str

    @property
    def ip(self) -> str:
        """The address as text, without its prefix length."""
        return str(self.address.ip)

    @property
    def address6(self) -> IPv6Interface:
        """The IPv6 address, in worlds that have it."""
        *_, number, host = self.address.ip.packed
        return IPv6Interface(f"fd77:0:{number:x}::{host:x}/64")

    @property
    def ip6(self) -> str:
        """The same as text, without its prefix length."""
        return str(self.address6.ip)

    @property
    def mac(self) -> str:
        """The hardware address: 02:00 and the IPv4 address."""
        return mac_of(self.address.ip)


@dataclass(frozen=True)
class NetworkPlan:
    """One subnet: the node's interface and the hosts on it; with a switch when there are several."""

    name: str
    node_interface: Interface
    hosts: Mapping[str, Interface]

    @property
    def has_switch(self) -> bool:
        """Several hosts on one subnet need a switch between them and the node."""
        return len(self.hosts) > 1


def mac_of(address: IPv4Address) -> str:
    """Return the MAC that the world gives to the interface with this address."""
    return ":".join(f"{byte:02x}" for byte in b"\x02\x00" + address.packed)


def plan(hosts: Mapping[str, str] | Sequence[str]) -> list[NetworkPlan]:
    """Lay out networks for `hosts`: {host: network}, or only names, each then with a network of its own.

    Raises UsageError when there are more networks or hosts than the address plan has room for.
    """
    networks: dict[str, list[str]] = {}
    for host, network in (hosts if isinstance(hosts, Mapping) else {name: name for name in hosts}).items():
        networks.setdefault(network, []).append(host)
    subnets = list(_SPACE.subnets(new_prefix=24))[1:]
    if len(networks) > len(subnets):
        raise UsageError(f"a world has room for {len(subnets)} networks, not for {len(networks)}")
    plans = []
    for number, (network, names) in enumerate(networks.items()):
        addresses = [IPv4Interface((address, 24)) for address in subnets[number].hosts()]
        if len(names) >= len(addresses):
            raise UsageError(f"network {network} has room for {len(addresses) - 1} hosts, not for {len(names)}")
        ends = {name: Interface("eth0", at, network) for name, at in zip(names, addresses[1:], strict=False)}
        plans.append(NetworkPlan(network, Interface(f"eth{number}", addresses[0], network), ends))
    return plans


def start_time(pid: int) -> int | None:
    """Return when process `pid` started (clock ticks since boot), None if it has ended: with the pid, its identity."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the command may contain anything, also parentheses
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass
class _Record:
    """What a world has made, on disk: namespaces, processes (pid and start time) and folders."""

    prefix: str
    namespaces: list[str] = field(default_factory=list)
    processes: list[tuple[int, int]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    owner: tuple[int, int] = (0, 0)

    @property
    def path(self) -> Path:
        return RECORDS / f"{self.prefix}.json"

    def save(self) -> None:
        """Replace the file at once: it is whole even if we are killed here."""
        RECORDS.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.__dict__))
        beside.replace(self.path)

    @classmethod
    def load(cls, prefix: str) -> _Record | None:
        try:
            fields = json.loads((RECORDS / f"{prefix}.json").read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise Error(f"{RECORDS / prefix}.json is damaged ({error}); remove it and namespaces {prefix}-*") from None
        fields["processes"] = [tuple(one) for one in fields["processes"]]
        return cls(**fields)

    @property
    def has_owner(self) -> bool:
        pid, started = self.owner
        return started != 0 and start_time(pid) == started

    def remove(self) -> None:
        """End the processes that are still those recorded, then remove namespaces and folders, then the record."""
        _end_processes([pid for pid, started in self.processes if start_time(pid) == started])
        here = [name for name in self.namespaces if (_NAMESPACES / name).exists()]
        if here:
            _ip_batch([f"netns delete {name}" for name in here])
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        self.path.unlink(missing_ok=True)


def _end_processes(pids: Sequence[int]) -> None:
    """End the process groups led by `pids`: SIGTERM, and SIGKILL for those that stay."""
    started = {pid: start_time(pid) for pid in pids}

    def signal_all(number: signal.Signals) -> list[int]:
        left = [pid for pid in pids if started[pid] is not None and start_time(pid) == started[pid]]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number) if _leads_group(pid) else os.kill(pid, number)
        return left

    if not signal_all(signal.SIGTERM):
        return
    wait_until(lambda: not any(start_time(pid) == started[pid] for pid in pids if started[pid]), _TERM_S)
    if signal_all(signal.SIGKILL):
        wait_until(lambda: not any(start_time(pid) == started[pid] for pid in pids if started[pid]), _TERM_S)


def _leads_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def wait_until(condition: Callable[[], object], timeout_s: float, interval_s: float = 0.005) -> bool:
    """Poll `condition` until it is true or `timeout_s` is over; return whether it became true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return bool(condition())
        time.sleep(interval_s)
    return True


def _command(argv: Sequence[str], *, text_in: str | None = None, timeout_s: float = 30.0) -> str:
    """Run `argv` to its end and return its stdout. Raises Error with what it said on stderr."""
    try:
        done = subprocess.run(argv, input=text_in, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise MissingFeatureError(f"{argv[0]}: not found; `make setup` installs it") from None
    except subprocess.TimeoutExpired:
        raise TimedOutError(f"{' '.join(argv)}: no end after {timeout_s} s") from None
    if done.returncode:
        raise Error(f"{' '.join(argv)}: exit {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _ip_batch(lines: Sequence[str], namespace: str | None = None) -> None:
    """Run `lines` as commands of ip(8), in one process, inside `namespace` if one is named."""
    where = ["-n", namespace] if namespace else []
    _command(["ip", *where, "-batch", "-"], text_in="\n".join(lines) + "\n")


def _write_sysctls(values: Mapping[str, str]) -> None:
    for name, value in values.items():
        Path("/proc/sys", name).write_text(value)


@dataclass
class Host:
    """A network namespace that plays a machine: the node, a client or an endpoint."""

    name: str
    namespace: str
    interfaces: tuple[Interface, ...]
    _started: Callable[[subprocess.Popen[Any]], None]

    @property
    def ip(self) -> str:
        """The address of the first interface, as text."""
        return self.interfaces[0].ip

    @property
    def mac(self) -> str:
        """The MAC of the first interface, as text."""
        return self.interfaces[0].mac

    def interface_to(self, network: str) -> Interface:
        """Return the interface that leads to `network`. Raises UsageError if none does."""
        for interface in self.interfaces:
            if interface.network == network:
                return interface
        known = ", ".join(interface.network for interface in self.interfaces)
        raise UsageError(f"{self.name} has no interface to {network}; its networks are {known}")

    def inside(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs `argv` in this namespace and in our mount namespace."""
        return ["nsenter", f"--net={_NAMESPACES / self.namespace}", "--", *argv]

    def run(
        self, argv: Sequence[str], *, text_in: str | None = None, timeout_s: float = 30.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run `argv` here to its end. Raises Error with its stderr when it fails (unless `check` is False)."""
        try:
            done = subprocess.run(
                self.inside(argv), input=text_in, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise TimedOutError(f"{self.name}: {' '.join(argv)}: no end after {timeout_s} s") from None
        if check and done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise Error(f"{self.name}: {' '.join(argv)}: exit {done.returncode}: {said}")
        return done

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start `argv` here as the leader of a process group of its own; the world ends it when it is left.

        `options` are those of subprocess.Popen. Ctrl-C on the terminal does not reach it: the world ends things in
        order.
        """
        process = subprocess.Popen(self.inside(argv), start_new_session=True, **options)
        self._started(process)
        return process

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread into this namespace: sockets opened meanwhile belong to it for good.

        For short pieces of code; an event loop or another thread is not taken along.
        """
        with _OWN_NAMESPACE.open() as before, (_NAMESPACES / self.namespace).open() as target:
            _setns(target.fileno())
            try:
                yield
            finally:
                _setns(before.fileno())

    def call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Return `function(*arguments)`, computed by a thread of its own in this namespace."""

        def body() -> _T:
            with self.entered():
                return function(*arguments)

        with ThreadPoolExecutor(1, thread_name_prefix=self.namespace) as pool:
            return pool.submit(body).result()

    def sysctl(self, name: str, value: str | int) -> None:
        """Set a sysctl of this namespace, e.g. `net/ipv4/ip_forward`."""
        with self.entered():
            _write_sysctls({name: str(value)})

    def packets(self, interface: str, counter: str = "rx_packets") -> int:
        """Return a counter of `interface` (a name under `statistics/`, e.g. tx_dropped), as netlink tells it."""
        shown = json.loads(_command(["ip", "-n", self.namespace, "-s", "-j", "link", "show", "dev", interface]))
        way, _, name = counter.partition("_")
        return int(shown[0]["stats64"][way][name])


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise Error(f"cannot enter a network namespace ({os.strerror(code)}); run as root")


class World:
    """A node with hosts around it, as a context manager: `with World("tw", {"client": "c", "web-1": "s"}) as world`.

    `hosts` is {host: network}, or only names, each then on a network of its own. `queues` is the number of receive
    and transmit queues of every veth. `static_neighbours` fills neighbour tables beforehand: no ARP on the wires.
    With `offloads` far ends do not play a wire: they leave checksums and segmentation to somebody else. With `ipv6`
    every interface has an address of that family, too.
    Afterwards `world.node` and `world["web-1"]` are Hosts. Raises MissingFeatureError without root, UsageError if a
    running process owns a world of this prefix.
    """

    def __init__(
        self,
        prefix: str,
        hosts: Mapping[str, str] | Sequence[str],
        *,
        node: str = "node",
        queues: int = 1,
        static_neighbours: bool = False,
        offloads: bool = False,
        ipv6: bool = False,
    ) -> None:
        if not prefix or len(prefix) > _LONGEST_PREFIX or not prefix.replace("-", "").replace("_", "").isalnum():
            raise UsageError(f"{prefix!r} is no prefix: letters, digits, - and _, at most {_LONGEST_PREFIX} of them")
        self.prefix = prefix
        self.networks = plan(hosts)
        self.hosts: dict[str, Host] = {}
        self._node_name = node
        self._queues = queues
        self._static_neighbours = static_neighbours
        self._offloads = "on" if offloads else "off"
        self._ipv6 = ipv6
        self._record = _Record(prefix)
        self._processes: list[subprocess.Popen[Any]] = []
        if node in self._interfaces():
            raise UsageError(f"no host can be called {node!r}: that is the node")

    @property
    def node(self) -> Host:
        """The host in the middle."""
        return self.hosts[self._node_name]

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def switch(self, network: str) -> Host:
        """Return the switch of `network`; its port `node` leads to the node. UsageError: it has none."""
        for one in self.networks:
            if one.name == network and one.has_switch:
                return Host(f"switch-{network}", self._switch(one), (), self._note_process)
        raise UsageError(f"network {network} has no switch: it needs several hosts")

    def __enter__(self) -> Self:
        self.clean_leftovers(self.prefix)
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def add_pod(self, name: str) -> Host:
        """Make a pod of the node: behind a veth that keeps all its offloads, with a route of its own.

        The node's end is called `cali-NAME`. Pods have addresses from 10.244.0.2 and fd77::2 on.
        """
        number = sum(host.interfaces[0].network == _PODS for host in self.hosts.values())
        end = Interface("eth0", IPv4Interface((_POD_SPACE[number + 2], 32)), _PODS)
        gateway, node_end = str(_POD_SPACE[1]), f"cali-{name}"
        pod = self.hosts[name] = Host(name, self._namespace(name), (end,), self._note_process)
        self._record.namespaces.append(pod.namespace)
        self._record.save()
        _ip_batch([f"netns add {pod.namespace}"])
        with pod.entered():
            _write_sysctls(_SYSCTLS | _WITH_IPV6 if self._ipv6 else _SYSCTLS)
        _ip_batch([self._veth(node_end, None, end.name, end.mac, pod.namespace)], self.node.namespace)
        families = [(end.ip, gateway), (end.ip6, _POD_GATEWAY6)] if self._ipv6 else [(end.ip, gateway)]
        lines = ["link set lo up", "link set eth0 up"]
        for address, through in families:
            lines += [f"address add {address} dev eth0", f"route add {through} dev eth0"]
            lines.append(f"route add default via {through}")
        _ip_batch(lines, pod.namespace)
        self.lead_to_pod(name)
        return pod

    def lead_to_pod(self, name: str) -> None:
        """Have the node's end of a pod's veth up, with its addresses and routes, whatever it has lost."""
        (end,), node_end = self.hosts[name].interfaces, f"cali-{name}"
        lines = [f"link set {node_end} up", f"address replace {_POD_SPACE[1]}/32 dev {node_end}"]
        lines.append(f"route replace {end.ip} dev {node_end}")
        if self._ipv6:
            lines.append(f"address replace {_POD_GATEWAY6} dev {node_end} nodad")
            lines.append(f"route replace {end.ip6} dev {node_end}")
        _ip_batch(lines, self.node.namespace)

    def owns_folder(self, folder: Path) -> None:
        """Promise that `folder` goes with the world (pins of a daemon, state, logs), also after a crash."""
        self._record.folders.append(str(folder))
        self._record.save()

    def end(self, process: subprocess.Popen[Any]) -> int:
        """End a process that a host started, SIGTERM first; return its exit code."""
        if process.poll() is None:
            # A zombie of ours counts as ended for start_time(), so that waiting here needs no second thread.
            _end_processes([process.pid])
        code = process.wait()
        self._processes = [one for one in self._processes if one is not process]
        return code

    @staticmethod
    def clean_leftovers(prefix: str) -> bool:
        """Remove what a world of this prefix left behind when its owner was killed; return whether there was any.

        Only what its record names is touched, and a process only if its start time is the recorded one. Raises
        UsageError if the owner still runs.
        """
        _need_root()
        record = _Record.load(prefix)
        if record is None:
            return False
        if record.has_owner:
            raise UsageError(f"world {prefix} belongs to process {record.owner[0]}: end that, or take another prefix")
        record.remove()
        return True

    def _namespace(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def _switch(self, network: NetworkPlan) -> str:
        return self._namespace(f"switch-{network.name}")

    def _interfaces(self) -> dict[str, tuple[Interface, ...]]:
        return {name: (interface,) for network in self.networks for name, interface in network.hosts.items()}

    def _build(self) -> None:
        node_interfaces = tuple(network.node_interface for network in self.networks)
        interfaces = {self._node_name: node_interfaces, **self._interfaces()}
        switches = [self._switch(network) for network in self.networks if network.has_switch]
        self.hosts = {
            name: Host(name, self._namespace(name), ends, self._note_process) for name, ends in interfaces.items()
        }
        namespaces = [host.namespace for host in self.hosts.values()] + switches
        for name in namespaces:
            if (_NAMESPACES / name).exists():
                raise UsageError(f"namespace {name} exists and no record says whose it is; `ip netns delete {name}`")
        record = self._record
        record.namespaces = namespaces
        me = os.getpid()
        record.owner = (me, start_time(me) or 0)
        record.save()
        _ip_batch([f"netns add {name}" for name in record.namespaces])
        for namespace in record.namespaces:
            with Host("", namespace, (), self._note_process).entered():
                _write_sysctls(_SYSCTLS | _WITH_IPV6 if self._ipv6 and namespace not in switches else _SYSCTLS)
        self.node.sysctl("net/ipv4/ip_forward", 1)
        if self._ipv6:
            self.node.sysctl("net/ipv6/conf/all/forwarding", 1)
        _ip_batch([line for network in self.networks for line in self._wires(network)], self.node.namespace)
        for network in self.networks:
            if network.has_switch:
                self._build_switch(network)
        for name, host in self.hosts.items():
            _ip_batch(self._addressing(name), host.namespace)
            if name != self._node_name:
                host.run(["ethtool", "-K", "eth0", "tx", self._offloads, "gro", "on"])

    def _veth(self, name: str, mac: str | None, peer: str, peer_mac: str | None, peer_namespace: str) -> str:
        """Return the line of ip(8) for a veth pair whose second end is in another namespace."""

        def end(interface: str, address: str | None) -> str:
            queues = f"numrxqueues {self._queues} numtxqueues {self._queues}"
            return f"{interface} {'address ' + address if address else ''} {queues}"

        return f"link add {end(name, mac)} type veth peer {end(peer, peer_mac)} netns {peer_namespace}"

    def _wires(self, network: NetworkPlan) -> list[str]:
        """Return the lines that connect the node to a network."""
        node_end = network.node_interface
        if network.has_switch:
            return [self._veth(node_end.name, node_end.mac, "node", None, self._switch(network))]
        ((host, host_end),) = network.hosts.items()
        return [self._veth(node_end.name, node_end.mac, host_end.name, host_end.mac, self._namespace(host))]

    def _build_switch(self, network: NetworkPlan) -> None:
        switch = self.switch(network.name)
        ports = {f"port{number}": host for number, host in enumerate(network.hosts)}
        # One that snoops joins a group of its own, and says so by IGMP, twice (net/bridge/br_multicast.c).
        lines = ["link add br0 type bridge mcast_snooping 0", "link set br0 up"]
        for port, host in ports.items():
            end = network.hosts[host]
            lines.append(self._veth(port, None, end.name, end.mac, self._namespace(host)))
        lines += [f"link set {port} master br0 up" for port in ("node", *ports)]
        _ip_batch(lines, switch.namespace)
        tags = ("txvlan", "off", "tx-vlan-stag-hw-insert", "off")  # a wire has them in frames: a bridge takes them out
        switch.run(["ethtool", "-K", "node", "tx", self._offloads, *tags, "gro", "on"])
        for port in ports:
            switch.run(["ethtool", "-K", port, "tx", self._offloads])

    def _addressing(self, name: str) -> list[str]:
        """Return the lines that give a host its addresses, routes and, on request, neighbours."""
        lines = ["link set lo up"]
        for end in self.hosts[name].interfaces:
            lines += [f"address add {end.address} dev {end.name}", f"link set {end.name} up"]
            if self._ipv6:
                lines.append(f"address add {end.address6} dev {end.name} nodad")
        if name != self._node_name:
            lines.append(f"route add default via {self._plan_of(name).node_interface.ip}")
            if self._ipv6:
                lines.append(f"route add default via {self._plan_of(name).node_interface.ip6}")
        if self._static_neighbours:
            for end in self.hosts[name].interfaces:
                lines += [
                    f"neighbour add {address} lladdr {other.mac} dev {end.name} nud permanent"
                    for other in self._everyone(end.network)
                    if other.ip != end.ip
                    for address in ((other.ip, other.ip6) if self._ipv6 else (other.ip,))
                ]
        return lines

    def _plan_of(self, host: str) -> NetworkPlan:
        return next(network for network in self.networks if host in network.hosts)

    def _everyone(self, network: str) -> list[Interface]:
        found = next(one for one in self.networks if one.name == network)
        return [found.node_interface, *found.hosts.values()]

    def _note_process(self, process: subprocess.Popen[Any]) -> None:
        self._processes.append(process)
        started = start_time(process.pid)
        if started is not None:
            # Those that have ended need no remembering: the record stays short in a long run.
            alive = [(pid, since) for pid, since in self._record.processes if start_time(pid) == since]
            self._record.processes = [*alive, (process.pid, started)]
            self._record.save()

    def _remove(self) -> None:
        _end_processes([process.pid for process in self._processes if process.poll() is None])
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._processes.clear()
        self._record.remove()


# In every namespace before anything is up. Generated frames have a source that is not routed back where they came from.
_SYSCTLS = {
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
}


# In a world with IPv6: an address is there at once, and nobody asks for more than he was given.
_WITH_IPV6 = {
    f"net/ipv6/conf/{which}/{name}": value
    for which in ("all", "default")
    for name, value in {"disable_ipv6": "0", "accept_dad": "0", "accept_ra": "0", "autoconf": "0"}.items()
}


def _need_root() -> None:
    if os.geteuid() != 0:
        raise MissingFeatureError("network namespaces need root; run this as root")
