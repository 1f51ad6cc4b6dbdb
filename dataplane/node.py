"""The node: tables, Services, next hops and an engine, put together and kept up to date until it is told to stop.

What fails at start leaves nothing behind. What fails later (a bad manifest, a neighbour that does not answer) changes
nothing that works, and is told in `status`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from conntrack.table import FlowTable
from dataplane import views
from dataplane.control import Lock, Server
from dataplane.engine import Engine
from dataplane.netdev import Interface, NetDev
from dataplane.nexthops import NextHops
from dataplane.settings import Settings
from dataplane.watch import changes
from lb import maglev, manifests
from lb.model import NodeView, Snapshot
from lb.resolve import resolve
from lb.rows import Address, rows_of
from lb.table import ServiceTable
from xdp import kernel, maps
from xdp.clock import JiffyClock
from xdp.errors import AttachError, ConfigError, Error, MissingFeatureError
from xdp.redirects import RedirectErrors
from xdp.schema import Protocol, Reason, Verdict
from xdp.tables import Capacity

_SWEEP_PASS_S = 4.0  # one look at every record; the shortest timeout is 10 s
_SWEEP_SLOTS = 1 << 20  # at a time: 20 ms when all are in use
_CALIBRATE_S = 5.0  # two clocks that drift by 500 ppm at worst: half a jiffy
_READ_LOSSES_S = 5.0
_BEGIN_AGAIN_S = 1.0

log = logging.getLogger(__name__)


class Node:
    """One node: `run` it until a signal ends it, `answer` questions about it meanwhile."""

    # What `_start` makes, in this order.
    netdev: NetDev
    shared: maps.SharedMaps
    clock: JiffyClock
    flows: FlowTable
    next_hops: NextHops
    services: ServiceTable
    engine: Engine

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.started = time.monotonic()
        self.snapshot = Snapshot((), ())
        self.desired = 0
        self.programmed = 0
        self.rejected: Error | None = None  # the manifests that the files say now, if they cannot be applied
        self.applied_at_s = time.time()
        self.redirects: RedirectErrors | None = None
        self.uncounted = ""  # why redirects that fail are not counted
        self._cache: manifests.Cache = {}
        self._stdin: bytes | None = None
        self._files: AsyncIterator[None] = changes(())
        self._gone: set[Address] = set()  # endpoints that no Service port has any more
        self.troubles: dict[str, tuple[float, str]] = {}  # by job: when it last failed, and how
        self._changed = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        self._stopping = asyncio.Event()
        self._signal = signal.SIGTERM
        self._lost_seen = 0

    def answer(self, command: str, options: dict[str, Any]) -> Any:
        """Return what `command` of the control socket asks for, as plain data (docs/operations.md).

        What looks at every flow is returned as an awaitable: it runs in a thread, beside the event loop.
        """
        view = views.VIEWS[command]
        if view in views.LONG:
            return asyncio.to_thread(view, self, **options)
        return view(self, **options)

    async def run(self) -> None:
        """Start, serve until a signal, stop. Error: what kept it from starting."""
        settings = self.settings
        if settings.engine == "raw":
            raise MissingFeatureError("--engine raw: not in this version; use xdp, afxdp or auto")
        with contextlib.ExitStack() as stack:
            stack.enter_context(Lock(settings))
            self._files = changes(settings.files)  # from here on: what is written while we start is not missed
            first = self._load()
            try:
                self._start(stack, first)
                await self._serve()
            except KeyboardInterrupt:  # while starting
                self._signal = signal.SIGINT
                raise

    # Starting.

    def _load(self) -> Snapshot:
        settings = self.settings
        self.desired += 1
        if "-" in settings.files and self._stdin is None:
            self._stdin = sys.stdin.buffer.read()  # there is no reading it again at a SIGHUP
        found = manifests.load(settings.files, io.BytesIO(self._stdin or b""), cache=self._cache)
        view = NodeView(settings.node_name, settings.zone)
        return resolve(found.services, found.slices, view, settings.allow_external_ips)

    def _start(self, stack: contextlib.ExitStack, first: Snapshot) -> None:
        settings = self.settings
        self.netdev = stack.enter_context(NetDev())
        interfaces = [self.netdev.interface(name) for name in settings.interfaces]
        kernel.mount_bpffs(settings.bpffs)
        self._refuse_foreign_programs(interfaces)
        self.shared = stack.enter_context(maps.open_or_create(settings.pins, self._capacity()))
        if self.shared.is_new:
            stack.callback(self._remove_if_unused)
        tables = self.shared.tables
        self.clock = JiffyClock()
        self.flows = FlowTable(tables, self.clock, kernel.membarrier_global)
        if self.shared.is_new:
            self.flows.create()
        else:
            abandoned = self.flows.take_over()
            self._write_off()
            log.info(
                "took over %d connections%s", self.flows.used(), f", {abandoned} slots given up" if abandoned else ""
            )
        self.engine = Engine(settings, self.shared, self.clock, maglev.DEFAULT_SEED)
        stack.callback(self._stop)
        self.engine.prepare(interfaces)
        try:
            self.redirects = stack.enter_context(RedirectErrors())
        except Error as error:
            self.uncounted = str(error)
        # What packets see changes from here on.
        self.next_hops = NextHops(tables, self.netdev, settings.interfaces)
        if self.shared.is_new:
            stack.callback(self._let_go_if_unused)
        self.services = ServiceTable(tables, maglev.DEFAULT_SEED, self.next_hops.row_for)
        self.services.adopt()
        self._apply(first)
        self.engine.start(self.next_hops.hops)
        if self.settings.announce != "none":
            log.warning("--announce %s: not honoured yet: route the VIPs to this node", self.settings.announce)
        if self.uncounted:
            log.warning("%s", self.uncounted)
        self._announce_start()

    def _write_off(self) -> None:
        """Count as lost what XDP had punted to the daemon before this one and that one never saw."""
        kernel.membarrier_global()
        xdp, user = (views.by_verdict(rows) for rows in (self.shared.tables.xdp_counters, self._worker_counters))
        lost = max(0, xdp[Verdict.PUNT] - sum(user.values()))  # one cut short by a kill is no reason not to start
        self._worker_counters[0]["packets"][Reason.PUNT_LOST] = lost

    @property
    def _worker_counters(self) -> Any:
        return self.shared.tables.worker_counters

    def _capacity(self) -> Capacity:
        # XDP counts in the row of its CPU: there must be one for each that may come online.
        return Capacity(connections=self.settings.capacity, cpus=os.sysconf("SC_NPROCESSORS_CONF"))

    def _refuse_foreign_programs(self, interfaces: list[Interface]) -> None:
        """Refuse an interface that has somebody else's XDP program, before anything is changed."""
        for interface in interfaces:
            state = kernel.xdp_state(interface.ifindex)
            if state is not None and not self.settings.link_pin(interface.name).exists():
                raise AttachError(
                    f"{interface.name}: another XDP program ({state.mode}, id {state.program_id}) is attached; "
                    f"remove it (`ip link set {interface.name} xdp off`, or stop the program that owns it) "
                    "or give another interface"
                )

    def _remove_if_unused(self) -> None:
        """Remove tables that this start has made if nothing came to be attached to them."""
        if not self.settings.link_pins():
            maps.remove(self.settings.pins)

    def _let_go_if_unused(self) -> None:
        """Give neighbours back to the kernel if this start came to nothing."""
        if not self.settings.link_pins():
            self.next_hops.let_go_all()

    def _announce_start(self) -> None:
        ports = len(self.snapshot.ports)
        for name, attachment in self.engine.attachments.items():
            log.info("%s: XDP %s%s", name, attachment.mode, f" ({attachment.why})" if attachment.why else "")
        log.info("serving %d Service ports, engine %s", ports, self.engine.name)

    # Serving.

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self._note("event loop", context.get("exception") or context))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload_wanted.set)
        jobs: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "next hops": self.next_hops.run,
            "sweep": self._sweep,
            "clock": lambda: _every(_CALIBRATE_S, self.clock.calibrate),
            "losses": lambda: _every(_READ_LOSSES_S, self.read_losses),
            "files": self._follow_files,
            "reload": self._reload,
        }
        async with Server(self.settings, self.answer), asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._keep_up(name, job)) for name, job in jobs.items()]
            with self._metrics():
                await self._stopping.wait()
            for task in tasks:
                task.cancel()

    async def _keep_up(self, name: str, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a job; if it fails, say so and begin it again: what it does not look after must not end the rest."""
        while True:
            try:
                await job()
            except Exception as error:  # noqa: BLE001 - whatever it is, known flows and the other jobs go on
                self._note(name, error)
            await asyncio.sleep(_BEGIN_AGAIN_S)

    def _note(self, name: str, trouble: object) -> None:
        """Log trouble in a job, and remember it for `status`."""
        text = f"{type(trouble).__name__}: {trouble}" if isinstance(trouble, BaseException) else str(trouble)
        log.error("%s: %s", name, text, exc_info=trouble if log.isEnabledFor(logging.DEBUG) else None)  # type: ignore[arg-type]
        self.troubles[name] = (time.monotonic(), text)

    def _metrics(self) -> contextlib.AbstractContextManager[object]:
        if self.settings.metrics is None:
            return contextlib.nullcontext()
        from dataplane.metrics import serve  # prometheus_client takes 54 ms to import

        return serve(self.settings.metrics, self.answer)

    def _told_to_stop(self, number: signal.Signals) -> None:
        self._signal = number
        self._stopping.set()

    async def _follow_files(self) -> None:
        try:
            async for _ in self._files:
                self._reload_wanted.set()
        finally:
            self._files = changes(self.settings.files)
            self._reload_wanted.set()

    async def _reload(self) -> None:
        """Read the manifests again when asked to, one time after the other, and apply them if they are right.

        If they are not, nothing changes and `status` says why. Reading takes seconds when there are many: in a thread.
        """
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            try:
                self._apply(await asyncio.to_thread(self._load))
            except Error as error:
                self.rejected = error
                kind = "manifests" if isinstance(error, ConfigError) else "configuration"
                log.error("%s not applied, what ran before goes on:\n%s", kind, error)

    def _apply(self, snapshot: Snapshot) -> None:
        change = self.services.apply(rows_of(snapshot))
        for note in set(snapshot.not_honoured) - set(self.snapshot.not_honoured):
            log.warning("%s", note)
        self.snapshot, self.rejected, self.applied_at_s = snapshot, None, time.time()
        self.programmed = self.desired
        self.next_hops.retain({endpoint.address for port in snapshot.ports for endpoint in port.endpoints})  # type: ignore[misc]
        present = {(endpoint.address, endpoint.port) for port in snapshot.ports for endpoint in port.endpoints}
        self._gone = (self._gone | change.gone) - present
        self._changed.set()
        log.debug("applied %s", change)

    async def _sweep(self) -> None:
        """Look at every flow in turn, and clear up behind a change as soon as nobody can see what was before."""
        slices = -(-len(self.shared.tables.flows) // _SWEEP_SLOTS)
        while True:
            await asyncio.to_thread(self.flows.sweep, _SWEEP_SLOTS)
            if self._changed.is_set():
                self._changed.clear()
                parted, gone = self.services.take_parted(), self._gone
                self._gone = set()
                await asyncio.to_thread(self.flows.wait_for_grace)
                self.services.release(parted)
                # A packet that chose such an endpoint before the change has inserted its flow by now. TCP connections
                # go on (C8), but a UDP flow never ends by itself.
                udp = [(int(address), number, int(Protocol.UDP)) for address, number in gone]
                await asyncio.to_thread(self.flows.end_towards, udp)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SWEEP_PASS_S / slices):
                    await self._changed.wait()

    def read_losses(self) -> None:
        """Add what the AF_XDP sockets have lost since the last call to the counters, which outlive the sockets."""
        lost = self.engine.lost()
        row = self._worker_counters[0]["packets"]
        row[Reason.PUNT_LOST] += lost - self._lost_seen
        self._lost_seen = lost

    # Stopping.

    def _stop(self) -> None:
        self.engine.stop_workers()
        self.read_losses()
        self.engine.stop()
        if not self.engine.attachments:
            return  # it never came to serve
        if (self.settings.on_exit or ("detach" if self._signal == signal.SIGINT else "keep")) == "detach":
            self.engine.detach()
            self.next_hops.let_go_all()
            maps.remove(self.settings.pins)
            log.info("stopped; programs and tables removed")
        else:
            log.info("stopped; XDP goes on forwarding known flows; `turnout detach` ends that")


async def _every(seconds: float, job: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        job()
