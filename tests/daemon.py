"""`turnout run` in the node of a world."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from dataplane.control import ask
from dataplane.settings import Settings
from perf.world import Host, World, wait_until
from tests.node import CONNECTIONS, NODE_NAME, ZONE
from tests.services import Service, write_manifests
from xdp import files, maps
from xdp.errors import Error
from xdp.files import SharedFile
from xdp.maps import SharedMaps

ROOT = Path(__file__).parents[1]
TURNOUT = [sys.executable, "-m", "dataplane.cli"]
START_S = 180.0  # the first start of a version compiles the packet path
_ENGINE_FLAGS = {
    "xdp": ["--engine", "xdp", "--xdp-mode", "native"],
    "xdp-auto": ["--engine", "xdp"],
    "xdp-generic": ["--engine", "xdp", "--xdp-mode", "generic"],
    "afxdp": ["--engine", "afxdp"],
    "raw": ["--engine", "raw"],
}


class Daemon:
    """`turnout run` in the node of a world. A context manager: leaving it ends the daemon and removes what it made."""

    def __init__(
        self,
        world: World,
        engine: str,
        *,
        capacity: int = CONNECTIONS,
        on_exit: str | None = None,
        host: Host | None = None,
        flags: Mapping[str, str] | None = None,
    ) -> None:
        self.world = world
        self.host = host or world.node
        self.engine = engine
        self.folder = Path(tempfile.mkdtemp(prefix=f"{world.prefix}-"))
        world.owns_folder(self.folder)
        self.file = self.folder / "services.json"
        self.log = self.folder / "log"
        names = tuple(interface.name for interface in self.host.interfaces)
        self.settings = Settings(
            f"{world.prefix}-{engine}-{self.host.name}", (str(self.file),), names, capacity=capacity
        )
        self._flags = [*_ENGINE_FLAGS[engine], *(["--on-exit", on_exit] if on_exit else [])]
        self.start_with: list[str] = []  # flags beside those, which win
        for name, value in (flags or {}).items():
            self._flags += [f"--{name}", *value.split()]
        self.process: subprocess.Popen[Any] | None = None

    def __enter__(self) -> Self:
        write_manifests(self.file, ())
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.world.end(self.process)
        self.turnout("detach", check=False)
        self.settings.lock_path.unlink(missing_ok=True)

    def turnout(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line for this node."""
        command = [*TURNOUT, *arguments, "--name", self.settings.name]
        return self._in_folder(command, check)

    def _in_folder(self, command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.host.inside(command), capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
        )
        assert not check or done.returncode == 0, (command, done.returncode, done.stderr)
        return done

    def rename(self, old: str, new: str) -> None:
        """Serve an interface that is called otherwise now, from the next start on."""
        names = tuple(new if name == old else name for name in self.settings.interfaces)
        self.settings = replace(self.settings, interfaces=names)

    def start(self) -> None:
        """Start it; return when it serves."""
        self.launch()
        self.wait_for(lambda: self.process.poll() is not None or self.is_answering(), START_S)  # type: ignore[union-attr]
        assert self.process.poll() is None, self.said()  # type: ignore[union-attr]

    def launch(self) -> None:
        """Start it, and do not wait."""
        interfaces = [word for name in self.settings.interfaces for word in ("-i", name)]
        command = [*TURNOUT, "run", "--name", self.settings.name, "-f", str(self.file), *interfaces, *self._flags]
        command += ["--capacity", str(self.settings.capacity), "--node-name", NODE_NAME, "--zone", ZONE]
        command += self.start_with
        with self.log.open("a") as stream:
            self.process = self.host.popen(command, stdout=stream, stderr=stream, cwd=ROOT)

    def restart(self, *flags: str) -> None:
        """Stop it as an operator does, and start it again, with these flags beside its own."""
        self.signal(signal.SIGTERM)
        assert self.wait() == 0, self.said()
        self.start_with = [*flags]
        self.start()

    def tables(self) -> SharedMaps | SharedFile:
        """Return the shared tables, to be looked at: also when the daemon does not answer."""
        if self.engine == "raw":
            return files.open_tables(self.settings.table_folder, read_only=True)
        return maps.open_tables(self.settings.pins, read_only=True)

    def is_answering(self) -> bool:
        """Whether the control socket answers: the daemon serves."""
        try:
            ask(self.settings, "interfaces", timeout_s=5)
        except Error:
            return False
        return True

    def said(self) -> str:
        """Return what it wrote on stderr."""
        return self.log.read_text()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for its end; return its exit code."""
        assert self.process is not None
        return self.process.wait(timeout_s)

    def ask(self, command: str, **options: Any) -> Any:
        """Return what the control socket answers."""
        return ask(self.settings, command, options, timeout_s=30)

    def apply(self, *services: Service) -> None:
        """Change the manifest file; return when the daemon has applied it, as the watch over files has told it."""
        before = self.ask("status")["revision"]["desired"]
        write_manifests(self.file, services)
        self.wait_for_services(*services)  # which costs less to ask for than the status
        self.wait_for(lambda: self.ask("status")["revision"]["programmed"] > before)

    def wait_for_services(self, *services: Service) -> None:
        """Return when these are the Services, and flows to what they no longer have are gone, of TCP reset."""
        wanted = {service.shown() for service in services}
        self.wait_for(lambda: self._services() == wanted)
        living = {(service.key, endpoint) for service in services for endpoint in service.living()}
        living |= {("", f"{endpoint.rpartition(':')[0]}:0") for _, endpoint in living}  # echoes
        impatient = {
            service.key for service in services if service.annotations.get("turnout.dev/endpoint-removed") == "reset"
        }
        self.wait_for(lambda: self._ends_of_what_goes_on(impatient) <= living)

    def _ends_of_what_goes_on(self, impatient: set[str]) -> set[tuple[str, str]]:
        """Return Service (of an echo: any) and endpoint of flows, but of TCP only where the Service has them reset."""
        return {
            (flow["service"] if flow["protocol"] in ("TCP", "UDP") else "", flow["endpoint"])
            for flow in self.ask("flows")
            if flow["protocol"] != "TCP" or (flow["service"] in impatient and flow["state"] != "reset")
        }

    def _services(self) -> set[tuple[str, str, str, frozenset[str]]]:
        return {
            (
                shown["name"],
                shown["protocol"],
                shown["frontends"][0],
                frozenset(endpoint["address"] for endpoint in shown["endpoints"]),
            )
            for shown in self.ask("services")
        }

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 15.0) -> None:
        """Wait until something is true; if it does not become so, fail with what the daemon said."""
        assert wait_until(condition, timeout_s), f"not within {timeout_s} s; the daemon said:\n{self.said()}"
