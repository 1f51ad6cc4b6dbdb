"""turnout itself: the daemon, with one of its engines, of this checkout or of another."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from perf.bed import Service, Testbed
from perf.subjects.iptables import receive_like_a_nic
from perf.traffic import ENDPOINT_PORT, PINS
from perf.world import wait_until
from xdp.errors import Error, MissingFeatureError

_READY_S = 180.0  # compiling the packet path for the first time takes long on a busy machine


class Turnout:
    """The daemon itself, with one of its engines; of `checkout` (a folder with another commit), if one is given."""

    translates = True
    leads_back = True

    def __init__(self, engine: str, capacity: int, *, checkout: Path | None = None, suffix: str = "") -> None:
        self.name = f"turnout-{engine}{suffix}"
        self._engine = engine
        self._capacity = capacity
        program = [sys.executable, "-P", "-c", "from dataplane.cli import main; main()"]
        self._program = ["env", f"--chdir={checkout}", f"PYTHONPATH={checkout}", *program] if checkout else program

    @contextlib.contextmanager
    def running(self, bed: Testbed) -> Iterator[None]:
        """Start `turnout run` in the node and wait until it says that it is ready."""
        name = bed.prefix + "-d"
        bed.world.owns_folder(PINS / name)
        folder = bed.state / "services"
        folder.mkdir()
        for number, service in enumerate(bed.services):
            _write(folder, number, service)
        options = ["--name", name, "-f", str(folder), "-i", bed.inside.name, "-i", bed.outside.name]
        options += ["--engine", self._engine, "--capacity", str(self._capacity), "--on-exit", "detach"]
        if bed.shape.vlan:
            options += ["--vlan", str(bed.shape.vlan)]
        if self._engine == "raw":  # without a program of ours, a veth takes redirected frames only with GRO
            receive_like_a_nic(bed.world.node)
        log = bed.state / "log"
        with log.open("w") as stream, bed.cpus.pinned(bed.cpus.others):
            bed.daemon = bed.world.node.popen([*self._program, "run", *options], stdout=stream, stderr=stream)
        try:
            self._wait(bed, [*self._program, "status", "--name", name], bed.daemon, log)
            yield
        finally:
            bed.world.end(bed.daemon)
            bed.daemon = None
            shutil.rmtree(folder)

    def change(self, bed: Testbed, number: int, service: Service) -> None:
        """Put another file in the place of the Service's: the daemon watches."""
        bed.services[number] = service
        _write(bed.state / "services", number, service)

    def _wait(self, bed: Testbed, status: Sequence[str], daemon: subprocess.Popen[bytes], log: Path) -> None:
        def is_ready() -> bool:
            return daemon.poll() is not None or bed.world.node.run(status, check=False).returncode == 0

        wait_until(is_ready, _READY_S, 0.1)
        if daemon.poll() is None and bed.world.node.run(status, check=False).returncode == 0:
            return
        said = log.read_text().strip().splitlines()[-5:]
        message = f"{self.name}: the daemon did not become ready; it said: {' | '.join(said) or 'nothing'}"
        raise (MissingFeatureError if daemon.poll() in (1, 77) else Error)(message)


def _write(folder: Path, number: int, service: Service) -> None:
    beside = folder / f".{number}"
    beside.write_text(json.dumps(manifests(number, service)))
    beside.rename(folder / f"{number:06}.json")


def manifests(number: int, service: Service) -> dict[str, object]:
    """Return a Service as Kubernetes objects: a List of a Service and its EndpointSlice."""
    name, protocol = f"service-{number}", service.protocol.upper()
    port = {"name": "port", "protocol": protocol}
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"namespace": "shop", "name": name},
                "spec": {
                    "clusterIP": str(service.vip),
                    "clusterIPs": [str(service.vip)],
                    "ports": [{**port, "port": service.port, "targetPort": ENDPOINT_PORT}],
                },
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "namespace": "shop",
                    "name": f"{name}-1",
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": f"IPv{service.vip.version}",
                "ports": [{**port, "port": ENDPOINT_PORT}],
                "endpoints": [
                    {"addresses": [str(address)], "conditions": {"ready": True}} for address in service.endpoints
                ],
            },
        ],
    }
