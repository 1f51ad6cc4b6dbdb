"""The node: tables, Services, next hops and an engine, put together and kept up to date until it is told to stop.

What fails at start leaves nothing behind. What fails later (a bad manifest, a neighbour that does not answer) changes
nothing that works, and is told in `status`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from conntrack.table import FlowTable, seconds_of_a_slice
from dataplane import administered, namespace, opening, views
from dataplane.announce import Announcer
from dataplane.connecting import Connecting, detach_hooks
from dataplane.context import Masquerading, masquerading
from dataplane.control import Lock, Server
from dataplane.deadlines import Deadlines
from dataplane.engine import Engine
from dataplane.health_checks import HealthChecks
from dataplane.in_force import InForce
from dataplane.jobs import Job, Jobs
from dataplane.led import LedSockets
from dataplane.loads import Loads
from dataplane.lost import Losses
from dataplane.netdev import NetDev
from dataplane.nexthops import NextHops
from dataplane.occupied import Occupied
from dataplane.output import counted
from dataplane.rawengine import RawEngine
from dataplane.reclaim import Reclaim
from dataplane.reloading import Reloading
from dataplane.reserved import give_back, reserve
from dataplane.seeds import read_seed
from dataplane.settings import PRIVILEGED_SNAT_PORTS, Settings
from dataplane.shortages import Shortages
from dataplane.sockets import Sockets
from dataplane.stations import Stations
from dataplane.strays import Strays
from dataplane.ticks import every, next_tick, tick
from dataplane.vlans import words_of
from lb.garbage import leave_alone
from lb.live import Live
from lb.table import Parted, ServiceTable
from xdp import files, maps, removing
from xdp.clock import JiffyClock, MonotonicClock
from xdp.errors import Error, MissingFeatureError
from xdp.names import Names
from xdp.routes import RouteMap, Targets
from xdp.schema import Ping, Reason
from xdp.writing import remove

_SWEEP_SLOTS = 1 << 21  # at a time: 20 ms when all are in use
_CALIBRATE_S = 5.0  # two clocks that drift by 500 ppm at worst: half a jiffy
_READ_LOSSES_S = 5.0
_ANNOUNCE_S = 0.25
_LOOK_AT_INTERFACES_S = 1.0  # of queues and programs netlink tells no changes; of all else at once
_LOOK_AT_REDIRECTS_S = 1.0
_LOOK_AT_CLIENTS_S = 1.0
_TRY_AGAIN_S = 10.0
_TIDY_S = 5.0

log = logging.getLogger(__name__)


class Node:
    """One node: `run` it until a signal ends it, `answer` questions about it meanwhile.

    `clock_s` tells the seconds that deadlines are kept in: those of a clock that a restart does not set back.
    """

    # What `_start` makes, in this order.
    netdev: NetDev
    shared: maps.SharedMaps | files.SharedFile
    clock: JiffyClock | MonotonicClock
    flows: FlowTable
    next_hops: NextHops
    services: ServiceTable
    engine: Engine | RawEngine
    in_force: InForce
    loads: Loads
    strays: Strays
    deadlines: Deadlines
    masquerading: Masquerading
    stations: Stations

    def __init__(self, settings: Settings, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.seed = read_seed(settings.seed_file)
        self.clock_s = clock_s
        self.started = time.monotonic()
        self.manifests = Reloading(settings)
        self.losses = Losses()
        self.jobs = Jobs()
        self._changed = asyncio.Event()
        self._links_changed = asyncio.Event()
        self.addresses_changed = asyncio.Event()
        self._checks_changed = asyncio.Event()
        self.health_checks = HealthChecks(lambda: self.engine.is_alive)
        self._stopping = asyncio.Event()
        self._signal = signal.SIGTERM
        self._lost_seen = 0
        self._has_served = False
        self.announcer = Announcer() if settings.announces else None
        self.occupied: Occupied | None = None  # ports that sockets of the node have, where the kernel tells them
        self.clients: Connecting | None = None  # clients on this node, if they are led to endpoints as they connect ...
        self.led: LedSockets | None = None  # ... and their sockets

    def answer(self, command: str, options: dict[str, Any]) -> Any:
        """Return what `command` of the control socket asks for, as plain data (docs/operations.md).

        What looks at every flow is returned as an awaitable: it runs in a thread, beside the event loop.
        """
        if command == "administer":
            return self._administer(**options)
        view = views.VIEWS[command]
        if view in views.LONG:
            return asyncio.to_thread(view, self, **options)
        return view(self, **options)

    async def run(self) -> None:
        """Start, serve until a signal, stop. Error: what kept it from starting."""
        settings = self.settings
        with contextlib.ExitStack() as stack:
            stack.enter_context(Lock(settings))
            server = Server(settings, self.answer)
            stack.callback(server.close)
            server.bind()  # while nothing is attached yet
            self.manifests.watch()  # from here on: what is written while we start is not missed
            first = self.manifests.load()
            try:
                self._start(stack, first)
                leave_alone()
                await self._serve(server)
            except KeyboardInterrupt:  # while starting
                self._signal = signal.SIGINT
                raise

    # Starting.

    def _start(self, stack: contextlib.ExitStack, first: Live) -> None:
        settings = self.settings
        namespace.need_the_same(settings, "run")
        self.netdev = stack.enter_context(NetDev([socket.AF_INET, socket.AF_INET6]))
        interfaces = [self.netdev.interface(name) for name in settings.interfaces]
        opened = opening.open_node(stack, settings, interfaces, lambda: self._has_served)
        self.shared, self.clock, self.flows, self.engine = opened
        stack.callback(self._stop)
        if isinstance(self.engine, Engine):
            self.losses.open()
            stack.callback(self.losses.close)
        self._prepare_clients(stack)
        tables = self.shared.tables
        namespace.note(settings)
        if self.shared.is_new:
            stack.callback(self._forget_namespace_if_unused)
            stack.callback(self._give_ports_back_if_unused)
        reserve(settings.snat_ports, settings.reserved_path)
        # What packets see changes from here on.
        self.next_hops = NextHops(
            tables,
            self.netdev,
            settings.interfaces,
            publish=self._publisher(),
            serves_through_kernel=self.engine.serves_through_kernel,
        )
        if self.shared.is_new:
            stack.callback(self._let_go_if_unused)
        self.services = ServiceTable(tables, self.seed.number, self.next_hops.row_for)
        self.services.adopt()
        self.put_together()
        if self.shared.is_new:
            self.in_force.whereabouts.forget()
        self.in_force.incarnations.know(self.in_force.whereabouts.read())
        self.strays.end_succeeded((), first.snapshot().ports)
        self.in_force.apply(first)
        self.manifests.has_applied()
        self.shortages = Shortages(settings, tables, lambda: self.next_hops.rows_refused)
        self.next_hops.when_addresses_change = self.addresses_changed.set
        self.engine.tidy(self.flows)
        self.masquerading = masquerading(
            settings.cluster_cidr, settings.snat_ports, settings.snat_addresses, Names(tables)
        )
        try:
            sockets = stack.enter_context(Sockets([PRIVILEGED_SNAT_PORTS, settings.snat_ports]))
            occupied = Occupied(sockets, self.masquerading, self.engine, self.flows)
            occupied.look()
            self.occupied = occupied
        except MissingFeatureError as error:
            log.warning("masqueraded connections may leave from ports that others have here: %s", error)
        tables.control[0]["vlans"] = words_of(settings.vlans)
        self.stations = Stations(partial(tables.control[0].__setitem__, "stations"), self.engine.hear)
        self.stations.follow(self.next_hops.stations())
        if self.clients is not None:
            stack.callback(self._let_clients_go_if_unused, self.clients)
            self.clients.attach()
        self.engine.start(self.next_hops.hops, self.masquerading)
        self._has_served = True
        if self.clients is None:
            detach_hooks(settings)
        self.shared.tables.control[0]["answers_arp"] = self.announcer is not None
        self.shared.tables.control[0]["ping"] = Ping[self.settings.ping.upper()]
        self._announce()  # what packets can reach by now
        if self.losses.uncounted:
            log.warning("%s", self.losses.uncounted)
        self._announce_start()

    def put_together(self) -> None:
        """Make what stands on tables, next hops and engine."""
        names = Names(self.shared.tables)
        self.in_force = InForce(
            self.settings,
            self.flows,
            names,
            self.next_hops,
            self.services,
            self.engine,
            leads_clients=self.clients is not None,
            when_programmed=self._has_programmed,
            note=self.jobs.note,
        )
        self.loads = Loads(self.services, self.flows)
        self.strays = Strays(self.in_force, self.flows, self.led, names, has_echoes=self.settings.ping == "forward")
        self.deadlines = Deadlines(self.in_force, self.clock_s)

    def _prepare_clients(self, stack: contextlib.ExitStack) -> None:
        """Get ready to lead clients on this node, if that is asked for and can be."""
        cgroup = self.settings.socket_cgroup
        if cgroup is None or not isinstance(self.shared, maps.SharedMaps):
            return
        self.clients = Connecting(self.settings, cgroup, self.shared)
        stack.callback(self.clients.close)
        self.clients.prepare()
        self.led = LedSockets(self.shared.led_fd, Names(self.shared.tables))

    def _let_clients_go_if_unused(self, clients: Connecting) -> None:
        """Take back what leads clients if this start came to nothing."""
        if not self._has_served:
            clients.let_go()

    def _publisher(self) -> Callable[[Targets], None]:
        """Return what is to be told of routes: XDP's own map, where there is XDP."""
        if isinstance(self.shared, maps.SharedMaps):
            return RouteMap(self.shared.routes_fd).replace
        return lambda _: None

    def _let_go_if_unused(self) -> None:
        """Give neighbours back to the kernel if this start came to nothing."""
        if not self._has_served and not self.settings.link_pins():
            self.next_hops.let_go_all()

    def _give_ports_back_if_unused(self) -> None:
        """Give ports back if this start came to nothing."""
        if not self._has_served and not self.settings.link_pins():
            give_back(self.settings.reserved_path)

    def _forget_namespace_if_unused(self) -> None:
        if not self._has_served and not self.settings.link_pins():
            remove(self.settings.namespace_path)

    def _announce_start(self) -> None:
        ports = len(self.in_force.snapshot.ports)
        for name, attachment in self.engine.attachments.items():
            how = f"XDP {attachment.mode}" if attachment.mode else "packet sockets"
            log.info("%s: %s%s", name, how, f" ({attachment.why})" if attachment.why else "")
        log.info("serving %s, engine %s", counted(ports, "Service port"), self.engine.name)

    # Serving.

    async def _serve(self, server: Server) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.jobs.note("event loop", context.get("exception") or context))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self.manifests.reload_as_asked)
        jobs: dict[str, Job] = {
            "next hops": self.next_hops.run,
            "rows of next hops": Reclaim(self.next_hops, self.flows, self.shared.tables).run,
            "interfaces": self._follow_interfaces,
            "addresses": self.follow_addresses,
            "redirects": lambda: every(_LOOK_AT_REDIRECTS_S, self._watch_redirects),
            "sweep": self._sweep,
            "loads": self.loads.run,
            "clock": lambda: every(_CALIBRATE_S, self.clock.calibrate),
            "losses": lambda: every(_READ_LOSSES_S, self.read_losses),
            "shortages": lambda: every(_READ_LOSSES_S, self.look_for_shortages),
            "health checks": self._answer_health_checks,
            "deadlines of drains": self.deadlines.run,
            "files": self.manifests.follow_files,
            "reload": partial(self.manifests.run, self.in_force, self.strays),
        }
        if self.occupied is not None:
            jobs["sockets"] = self.occupied.run
        if self.clients is not None and self.led is not None:
            jobs["clients on this node"] = partial(self._follow_clients, self.clients, self.led)
        if self.engine.needs_rows:
            jobs["tidy"] = self._tidy
        if self.announcer is not None:
            jobs["announcing"] = lambda: every(_ANNOUNCE_S, self._announce)
        async with server, asyncio.TaskGroup() as group:
            tasks = self.jobs.start(group, jobs)
            with self._metrics():
                await self._stopping.wait()
            for task in tasks:
                task.cancel()

    def _metrics(self) -> contextlib.AbstractContextManager[object]:
        if self.settings.metrics is None:
            return contextlib.nullcontext()
        from dataplane.metrics import serve  # prometheus_client takes 54 ms to import

        return serve(self.settings.metrics, self.answer)

    def _told_to_stop(self, number: signal.Signals) -> None:
        self._signal = number
        self._stopping.set()

    def _administer(
        self, endpoints: Sequence[str] = (), state: str | None = None, deadline_s: int | None = None
    ) -> Awaitable[list[dict[str, Any]]]:
        """Have an operator's word of endpoints, or only tell of them; return them with what is open to each.

        UsageError: there is no such endpoint, or no such word. Error: nothing has changed, or a restart will forget it.
        """
        if state is None:  # one that has gone may have connections still
            return asyncio.to_thread(views.administered, self, [views.place_of(text) for text in endpoints])
        places = sorted({place for text in endpoints for place in views.places_of(self, text)}, key=str)
        self.in_force.administer(dict.fromkeys(places, administered.read_said(state, deadline_s, self.clock_s())))
        return asyncio.to_thread(views.administered, self, places)

    def _has_programmed(self) -> None:
        self._changed.set()
        self._checks_changed.set()
        self.loads.changed.set()
        self.deadlines.changed.set()

    async def _follow_interfaces(self) -> None:
        """Have the engine serve what the interfaces are now."""
        self.next_hops.when_links_change = self._links_changed.set
        while True:
            self.stations.follow(self.next_hops.stations())
            given = {name: self.netdev.with_real_queues(link) for name, link in self.next_hops.given().items()}
            if not self.engine.is_in_step(given):
                await asyncio.to_thread(self.engine.follow, given, self.flows)
            await tick(self._links_changed, next_tick(_LOOK_AT_INTERFACES_S))
            self._links_changed.clear()

    async def follow_addresses(self) -> None:
        """Serve node ports at the addresses that the node has now; where that failed, try again."""
        while True:
            await self.addresses_changed.wait()
            try:
                self.in_force.reprogram()
            except Error as error:
                self.jobs.note("addresses", error)
                await asyncio.sleep(_TRY_AGAIN_S)
            else:
                self.addresses_changed.clear()

    def _watch_redirects(self) -> None:
        """Have the kernel route what would leave by an interface that takes no redirected frames."""
        given = self.next_hops.given() if self.engine.redirects_natively else {}
        self.losses.look(given, self.netdev, time.monotonic())
        self.next_hops.set_refusing(self.losses.refusing)

    def _announce(self) -> None:
        """Announce the VIPs on our interfaces, as they are now; hear who else does."""
        if self.announcer is None:
            return
        now = time.monotonic()
        served = {name: link for name, link in self.next_hops.given().items() if name in self.engine.attachments}
        self.announcer.announce(self.in_force.vips, served, now)
        self.announcer.turn(now)

    async def _answer_health_checks(self) -> None:
        """Have the health check ports answered as of the last change; where that failed, try again."""
        try:
            while True:
                self._checks_changed.clear()
                live = self.in_force.live
                problems = await self.health_checks.apply(live.health_checks(), self.in_force.node_port_addresses())
                for problem in problems:
                    self.jobs.note("health check", problem)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TRY_AGAIN_S if problems else None):
                        await self._checks_changed.wait()
        finally:
            self.health_checks.close()

    async def _sweep(self) -> None:
        """Look at every flow in turn, and clear up behind a change as soon as nobody can see what was before."""
        while True:
            cpu_s = await asyncio.to_thread(self._sweep_slice)
            if self._changed.is_set():
                self._changed.clear()
                await self._clear_up_behind()
            slices = -(-self.flows.slots // _SWEEP_SLOTS)
            await tick(self._changed, next_tick(seconds_of_a_slice(cpu_s, slices)))

    async def _clear_up_behind(self) -> None:
        """Clear up behind the changes until now; what fails is done with the next try."""
        parted, unswept = self.services.take_parted(), self.in_force.take_unswept()
        try:
            await asyncio.to_thread(self.flows.wait_for_grace)
            self.clear_up(parted)
            parted = Parted([], [])
            await asyncio.to_thread(self.strays.end, unswept)
            await asyncio.to_thread(self.engine.tidy, self.flows)
        except BaseException:
            self.services.put_back(parted)
            self.in_force.unswept = None  # of which connections some have been looked at
            self._changed.set()
            raise

    def _sweep_slice(self) -> float:
        """Sweep a slice of the flows, and forget clients; return the seconds of CPU that the flows took."""
        began = time.thread_time()
        self.flows.sweep(_SWEEP_SLOTS)
        took_s = time.thread_time() - began
        self.services.forget(self.clock.now())
        return took_s

    def clear_up(self, parted: Parted) -> None:
        """Make reusable what a change has parted with; nobody looks at it any more."""
        self.services.forget(self.clock.now(), parted.endpoints)
        self.services.release(parted)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(_TIDY_S)
            await asyncio.to_thread(self.engine.tidy, self.flows)

    def read_losses(self) -> None:
        """Add what the sockets have lost since the last call to the counters, which outlive the sockets."""
        lost = self.engine.lost()
        row = self.shared.tables.worker_counters[0]["packets"]
        row[Reason.PUNT_LOST] += lost - self._lost_seen
        self._lost_seen = lost

    def look_for_shortages(self) -> None:
        """Say so when new connections have found no room since the last call, or come to nothing."""
        for what, words in (*self.shortages.news(), *self.engine.unfinished()):
            self.jobs.note(what, words)

    async def _follow_clients(self, clients: Connecting, led: LedSockets) -> None:
        """Keep clients on this node led; end what was about to connect when its endpoint went."""
        while True:
            await tick(asyncio.Event(), next_tick(_LOOK_AT_CLIENTS_S))
            clients.follow()
            await asyncio.to_thread(led.look_again)

    # Stopping.

    def _stop(self) -> None:
        self.shared.tables.control[0]["answers_arp"] = 0  # before anything goes that answers would lead to
        if self.announcer is not None:
            self.announcer.withdraw()
        self.engine.stop_workers()
        self.read_losses()
        self.engine.stop()
        if not self._has_served:
            return
        settings, goes_on = self.settings, self.engine.goes_on_alone
        if (settings.on_exit or ("detach" if self._signal == signal.SIGINT else "keep")) == "detach":
            self.engine.detach()
            self.next_hops.let_go_all()
            give_back(settings.reserved_path)
            detach_hooks(settings)
            removing.maps(settings.pins)
            removing.files(settings.table_folder)
            remove(settings.administered_path)
            remove(settings.namespace_path)
            self.in_force.whereabouts.forget()
            log.info("stopped; %s and tables removed", "programs" if goes_on else "filter")
        elif goes_on:
            log.info("stopped; XDP goes on forwarding known flows; `turnout detach` ends that")
        elif settings.on_exit == "keep":
            log.info("stopped; packets of Services are dropped until the next start, or `turnout detach`")
        else:
            self.engine.detach()
            self.next_hops.let_go_all()
            remove(settings.namespace_path)
            log.info("stopped; the next start goes on with the connections, `turnout detach` forgets them")
