"""Prometheus metrics: what `status` says, under names that dashboards can rely on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dataplane.control import Answer
from xdp.errors import Error, MissingFeatureError, UsageError

_ANSWER_S = 5.0  # a scrape gives up sooner than Prometheus does (10 s)
_CLIENT_S = 10.0  # from its connection until it has its answer; who is slower is let go
_MOST_CLIENTS = 64  # each has a thread; a scraper is one at a time

_VERDICTS = ("forwarded", "passed", "dropped", "punted")  # of a path, they add up to `received`
_COUNTS = {
    "received": "Packets that a path was given",
    "admitted": "Packets that began a connection without userspace; also in forwarded",
    "redirect_failed": "Frames that were lost after XDP had redirected them",
    "punt_lost": "Packets that were punted and found no room in a ring of AF_XDP",
    "originated": "Packets that nobody sent: answers of our own",
}


def _version() -> str:
    try:
        return version("turnout")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def families(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Yield the metrics that follow from the answer to `status`."""
    build = GaugeMetricFamily("turnout_build_info", "Version and engine; the value is 1", labels=["version", "engine"])
    build.add_metric([_version(), str(status["engine"])], 1)
    yield build
    seed = GaugeMetricFamily("turnout_seed_info", "Fingerprint of Maglev's seed; the value is 1", labels=["seed"])
    seed.add_metric([str(status["seed"])], 1)
    yield seed
    health = GaugeMetricFamily("turnout_state", "1 for the state that the node is in", labels=["state"])
    for state in ("ok", "degraded", "failed"):
        health.add_metric([state], status["state"] == state)
    yield health
    gauges = {
        "turnout_uptime_seconds": ("Since this daemon was started", status["uptime_s"]),
        "turnout_services": ("Services served", status["services"]),
        "turnout_endpoints": ("Endpoints known", status["endpoints"]),
        "turnout_service_ports_without_endpoint": (
            "Service ports that refuse new clients, as they have no endpoint",
            status["without_endpoint"]["count"],
        ),
        "turnout_flows": ("Connections in the flow table", status["flows"]["used"]),
        "turnout_flows_capacity": ("Connections that fit into the flow table", status["flows"]["capacity"]),
        "turnout_desired_revision": ("Revision of the manifests as they were read last", status["revision"]["desired"]),
        "turnout_programmed_revision": ("Revision that packets see", status["revision"]["programmed"]),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(name, text, value=value)
    yield from _reload(status)
    yield from _packets(status)
    yield from _sockets(status)


def _reload(status: Mapping[str, Any]) -> Iterator[Metric]:
    is_current = status["revision"]["desired"] == status["revision"]["programmed"]
    yield GaugeMetricFamily(
        "turnout_config_last_reload_successful", "Whether the manifests read last were applied", value=is_current
    )
    yield GaugeMetricFamily(
        "turnout_config_last_reload_success_timestamp_seconds",
        "When manifests were applied last",
        value=status["applied_at_s"],
    )


def _packets(status: Mapping[str, Any]) -> Iterator[Metric]:
    total = CounterMetricFamily(
        "turnout_packets", "Packets by who saw them and what became of them", labels=["path", "verdict"]
    )
    others = {
        name: CounterMetricFamily(f"turnout_packets_{name}", text, labels=["path"]) for name, text in _COUNTS.items()
    }
    for path, counts in status["packets"].items():
        for name, count in counts.items():
            if name in _VERDICTS:
                total.add_metric([path, name], count)
            else:
                others[name].add_metric([path], count)
    yield total
    yield from others.values()
    reasons = CounterMetricFamily(
        "turnout_packets_by_reason", "Packets by the reason of their verdict", labels=["reason"]
    )
    for reason, count in status["reasons"].items():
        reasons.add_metric([reason], count)
    yield reasons
    received = CounterMetricFamily(
        "turnout_interface_receive_packets", "Packets that the driver received", labels=["interface"]
    )
    for interface in status["interfaces"]:
        received.add_metric([interface["name"]], interface["rx_packets"])
    yield received


def _sockets(status: Mapping[str, Any]) -> Iterator[Metric]:
    total = CounterMetricFamily(
        "turnout_sockets", "Clients on this node by what became of them as they connected", labels=["verdict"]
    )
    for verdict in ("led", "passed", "refused") if status["sockets"] else ():
        total.add_metric([verdict], status["sockets"][verdict])
    yield total


class NodeCollector(Collector):
    """Asks the node anew for every scrape. `turnout_up` is 0 when it does not answer."""

    def __init__(self, ask: Callable[[], Mapping[str, Any]]) -> None:
        self._ask = ask

    def collect(self) -> Iterable[Metric]:
        """Return all metrics."""
        try:
            found = list(families(self._ask()))
        except Exception:  # noqa: BLE001 - a scrape that fails must not fill the daemon's log with tracebacks
            return [GaugeMetricFamily("turnout_up", "Whether the node answered", value=0)]
        return [GaugeMetricFamily("turnout_up", "Whether the node answered", value=1), *found]


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing: a line per scrape is of no use to anybody."""


class _Server(ThreadingMixIn, WSGIServer):
    """Gives every client a thread, of which there are not too many, and not for too long. Nobody waits for clients."""

    daemon_threads = True
    request_queue_size = _MOST_CLIENTS

    def __init__(self, *arguments: Any) -> None:
        self._clients: set[Any] = set()  # their sockets
        super().__init__(*arguments)
        self.socket.setblocking(False)  # a client may have gone before it is taken

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a client if there are not too many."""
        if len(self._clients) >= _MOST_CLIENTS:
            super().shutdown_request(request)
            return
        self._clients.add(request)
        asyncio.get_running_loop().call_later(_CLIENT_S, self._let_go, request)
        super().process_request(request, client_address)

    def _let_go(self, request: Any) -> None:
        """Let a client go that has been here for too long: a socket's own timeout begins anew with every byte."""
        if request in self._clients:
            with contextlib.suppress(OSError):  # it is going at this moment
                request.shutdown(socket.SHUT_RDWR)  # its thread wakes, and closes it

    def shutdown_request(self, request: Any) -> None:
        """Part with a client."""
        self._clients.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: the client has gone away."""

    def server_bind(self) -> None:
        """Bind without asking a name server who we are, as http.server would."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


@contextlib.contextmanager
def serve(address: tuple[str, int], answer: Answer) -> Iterator[int]:
    """Serve metrics at `address` while the context lasts; its value is the port. To be entered inside the event loop.

    `answer` is called in the event loop only. UsageError: an address that is not of this machine; Error: the port is
    taken.
    """
    loop = asyncio.get_running_loop()

    async def status() -> Any:
        return answer("status", {})

    def ask() -> Any:
        return asyncio.run_coroutine_threadsafe(status(), loop).result(_ANSWER_S)

    registry = CollectorRegistry(auto_describe=False)  # true: it would ask while the loop waits for us here
    registry.register(NodeCollector(ask))
    with _listening(address) as server:
        server.set_app(make_wsgi_app(registry))
        loop.add_reader(server.socket, server.handle_request)
        try:
            yield server.server_port
        finally:
            loop.remove_reader(server.socket)


def check(address: tuple[str, int]) -> None:
    """Raise what `serve` would raise for this address, before anything else is done."""
    _listening(address).server_close()


def _listening(address: tuple[str, int]) -> _Server:
    host, port = address
    kind = _Server6 if ":" in host else _Server
    try:
        return make_server(host, port, _no_app, kind, _Handler)
    except OSError as error:
        place = f"--metrics {f'[{host}]' if ':' in host else host}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise Error(f"{place}: the port is taken; see `ss -ltnp`, or give another one") from None
        if error.errno == errno.EACCES:
            raise MissingFeatureError(f"{place}: not permitted; take a port above 1023, or run as root") from None
        raise UsageError(f"{place}: {error.strerror}; expected an address of this machine") from None


def _no_app(_environment: Any, start_response: Any) -> list[bytes]:
    start_response("503 Service Unavailable", [])
    return []
