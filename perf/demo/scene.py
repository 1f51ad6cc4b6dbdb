"""The two sides of the demo: worlds that are alike, with turnout on the node of one and iptables on that of the other.

    client -- eth0 | node | eth1 -- [switch] -- web-1, web-2, web-3

Both serve the Services of examples/demo.yaml. Everything belongs to the worlds, so that it goes with them.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Self

from dataplane.control import ask
from dataplane.detach import detach
from dataplane.settings import Settings, merge
from lb import manifests
from lb.model import NodeView
from lb.resolve import resolve
from perf import clients
from perf.bed import CLIENTS, Service
from perf.subjects.iptables import load_kube_proxy_rules
from perf.traffic import PINS
from perf.world import Host, World
from xdp import mounts
from xdp.errors import Error, MissingFeatureError, NotRunningError, TimedOutError, UsageError

MANIFEST = Path(__file__).resolve().parents[2] / "examples" / "demo.yaml"
ENDPOINTS = {"web-1": "servers", "web-2": "servers", "web-3": "servers"}
_READY_S = 170.0
_PROGRAM = [sys.executable, "-c", "from dataplane.cli import main; main()"]


@dataclass(frozen=True)
class Port:
    """A Service port of the manifest: its name, and what iptables is told of it."""

    key: str  # namespace/name:port
    service: Service

    @property
    def target(self) -> str:
        """The frontend as ADDRESS:PORT."""
        return f"{self.service.vip}:{self.service.port}"


def ports(manifest: Path = MANIFEST) -> dict[str, Port]:
    """Return the two Service ports of the demo by protocol, tcp and udp. Error: the manifest is not there."""
    if not manifest.exists():
        raise Error(f"{manifest}: not found; the demo runs from a checkout, with `make demo`")
    found = manifests.load([str(manifest)])
    made = {}
    for port in resolve(found.services, found.slices, NodeView("", "")).ports:
        protocol = port.protocol.lower()
        vip = IPv4Address(str(port.frontends[0].address))
        endpoints = tuple(IPv4Address(str(endpoint.address)) for endpoint in port.cluster)
        made[protocol] = Port(port.key, Service(vip, endpoints, protocol, port.port))
    return made


@dataclass(frozen=True)
class Names:
    """The names that everything has: of the node, and of the prefixes of both worlds."""

    node: str

    @property
    def worlds(self) -> tuple[str, str]:
        """The prefixes of the worlds with turnout and with iptables."""
        return f"turnout-{self.node}", f"turnout-{self.node}-iptables"

    @property
    def settings(self) -> Settings:
        """The settings with which the node is asked and its pins are found."""
        return merge({"name": self.node}, {})


def clean(names: Names) -> bool:
    """Remove what an earlier demo left behind; return whether there was any. Error: it still runs."""
    try:
        found = [World.clean_leftovers(prefix) for prefix in names.worlds]
    except UsageError as error:
        raise Error(f"this demo is running already ({error.args[0].partition(':')[0]}); try another --name") from None
    if any(found):
        forget(names)
    return any(found)


def refuse_others(names: Names) -> None:
    """Raise Error if a node that has our name is not of the demo: it runs, or it has left its tables."""
    settings = names.settings
    if settings.pins.exists() or settings.socket_path.exists():
        raise Error(
            f"node {settings.name!r} is not the demo's, and it runs or has left its tables in {settings.pins}; "
            f"stop it and `turnout detach --name {settings.name}`, or give the demo another --name"
        )


def forget(names: Names) -> None:
    """Remove what a node of ours has left in /run/turnout. It has ended, and nobody else has its name."""
    with contextlib.suppress(Error):
        detach(names.settings)
    names.settings.lock_path.unlink(missing_ok=True)


@dataclass
class Side:
    """One of the two worlds, and what its node forwards with."""

    name: str
    world: World
    folder: Path  # of the pins of generator and sink

    @property
    def client(self) -> Host:
        """The host that dials."""
        return self.world["client"]


def build(stack: ExitStack, name: str, prefix: str) -> Side:
    """Build a world, which goes with `stack`; nothing answers in it yet."""
    mounts.mount_bpffs(PINS)
    world = stack.enter_context(World(prefix, {"client": "client", **ENDPOINTS}))
    folder = PINS / prefix
    world.owns_folder(folder)
    folder.mkdir()
    # Clients of the generator, many more than there are hosts.
    world.node.run(["ip", "route", "add", CLIENTS[4], "via", world["client"].ip])
    return Side(name, world, folder)


def start_servers(one: Side) -> None:
    """Start an HTTP server and a UDP responder at every endpoint; they answer when this returns."""
    for name in ENDPOINTS:
        for serve in (clients.serve_http, clients.serve_udp):
            # With its end at a terminal's, a server that is kept would hold up whoever reads our stderr.
            serve(one.world[name], name, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def start_iptables(one: Side, services: dict[str, Port]) -> None:
    """Load kube-proxy's rules. MissingFeatureError: the machine has no iptables-nft."""
    try:
        load_kube_proxy_rules(one.world.node, [port.service for port in services.values()])
    except Error as error:
        raise MissingFeatureError(f"iptables: {error}; `make setup` installs it") from None


@dataclass
class Daemon:
    """`turnout run` on the node of a side."""

    names: Names
    side: Side
    _process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> Self:
        """Start it; `wait` until it is ready."""
        settings = self.names.settings
        world = self.side.world
        world.owns_folder(settings.pins)
        folder = Path(tempfile.mkdtemp(prefix=f"{world.prefix}-"))
        world.owns_folder(folder)
        self._log = folder / "log"
        interfaces = [word for interface in world.node.interfaces for word in ("-i", interface.name)]
        options = ["--name", settings.name, "-f", str(MANIFEST), *interfaces, "--on-exit", "detach"]
        with self._log.open("w") as log:
            self._process = world.node.popen(
                [*_PROGRAM, "run", *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    def wait(self, tick: Callable[[], None]) -> None:
        """Wait until it is ready; `tick` is called meanwhile. Error: it ended, or took too long, and what it said."""
        deadline = time.monotonic() + _READY_S
        last = ""
        while True:
            if self._process.poll() is not None:
                kind = MissingFeatureError if self._process.returncode == 77 else Error
                raise kind(f"`turnout run` ended with {self._process.returncode}; it said: {self._said()}")
            with contextlib.suppress(NotRunningError, TimedOutError):
                status = self.ask("status")
                if status["state"] == "ok":
                    return
                last = "; ".join(status["why"])
            if time.monotonic() >= deadline:
                raise TimedOutError(f"`turnout run` was not ready within {_READY_S:.0f} s; {last or self._said()}")
            tick()
            time.sleep(0.1)

    def ask(self, question: str) -> Any:
        """Return what the control socket answers."""
        return ask(self.names.settings, question, timeout_s=5.0)

    def _said(self) -> str:
        return " | ".join(self._log.read_text().strip().splitlines()[-5:]) or "nothing"
