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
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from conntrack.table import FlowTable, seconds_of_a_pass
from dataplane import administered, opening, views
from dataplane.announce import Announcer
from dataplane.connecting import Connecting, detach_hooks
from dataplane.context import Masquerading, masquerading, occupy
from dataplane.control import Lock, Server
from dataplane.engine import Engine
from dataplane.health_checks import HealthChecks
from dataplane.led import LedSockets
from dataplane.lost import Losses
from dataplane.netdev import NetDev
from dataplane.nexthops import NextHops
from dataplane.rawengine import RawEngine
from dataplane.reclaim import Reclaim
from dataplane.reserved import give_back, reserve
from dataplane.settings import PRIVILEGED_SNAT_PORTS, Settings
from dataplane.shortages import Shortages
from dataplane.sockets import Sockets
from dataplane.stations import Stations
from dataplane.ticks import every, next_tick, tick
from dataplane.unswept import Unswept
from dataplane.vlans import words_of
from dataplane.watch import changes
from dataplane.whereabouts import Whereabouts
from lb import maglev, manifests
from lb.incarnations import Incarnations, Seat
from lb.live import Live, Plan
from lb.model import AdminState, NodeView, NotHonoured, Place, ServicePort, Snapshot
from lb.rows import (
    Here,
    answering,
    echo_protocol,
    hidden_node_ports,
    impatient,
    known_as,
    living,
    local_addresses,
    rows_of,
    vips_at,
)
from lb.table import Change, Parted, ServiceTable
from xdp import files, maps, removing
from xdp.addresses import IPAddress, number_of
from xdp.clock import JiffyClock, MonotonicClock
from xdp.errors import ConfigError, Error, MissingFeatureError, UsageError
from xdp.names import Names
from xdp.routes import RouteMap, Targets
from xdp.schema import Ping, Protocol, Reason
from xdp.writing import remove

_SWEEP_SLOTS = 1 << 20  # at a time: 20 ms when all are in use
_CALIBRATE_S = 5.0  # two clocks that drift by 500 ppm at worst: half a jiffy
_READ_LOSSES_S = 5.0
_BEGIN_AGAIN_S = 1.0
_ANNOUNCE_S = 0.25
_LOOK_AT_INTERFACES_S = 1.0  # of queues and programs netlink tells no changes; of all else at once
_LOOK_AT_REDIRECTS_S = 0.5
_LOOK_AT_SOCKETS_S, _LOOKING_SHARE = 1.0, 0.001  # of a CPU, at most: a millisecond where tables of sockets are small
_LOOK_AT_CLIENTS_S = 1.0
_LISTEN_AGAIN_S = 10.0
_TIDY_S = 5.0
_COUNT_LOADS_S, _COUNT_LOADS_ANYWAY_S = 1.0, 8.0
_COUNTING_SHARE = 0.01  # of a CPU, at most; what was compiled the first time counts, too

log = logging.getLogger(__name__)


class Node:
    """One node: `run` it until a signal ends it, `answer` questions about it meanwhile."""

    # What `_start` makes, in this order.
    netdev: NetDev
    shared: maps.SharedMaps | files.SharedFile
    clock: JiffyClock | MonotonicClock
    flows: FlowTable
    next_hops: NextHops
    services: ServiceTable
    engine: Engine | RawEngine
    masquerading: Masquerading
    stations: Stations

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.started = time.monotonic()
        self.live = Live()
        self._incarnations = Incarnations()
        self._whereabouts = Whereabouts(settings.whereabouts_path)
        self.here = Here(administered=administered.kept(settings.administered_path))  # what was programmed with it
        self.desired = 0
        self.programmed = 0
        self.rejected: Error | None = None  # the manifests that the files say now, if they cannot be applied
        self.applied_at_s = time.time()
        self.losses = Losses()
        self._manifests = manifests.Reader(settings.files)
        self._files: AsyncIterator[set[str] | None] = changes(())
        self._changed_files: set[str] | None = set()  # since they were read; None: any may have
        self._is_in_step = False  # what was read last is what runs
        self.troubles: dict[str, tuple[float, str]] = {}  # by job: when it last failed, and how
        self._changed = asyncio.Event()
        self._links_changed = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        self._checks_changed = asyncio.Event()
        self._loads_changed = asyncio.Event()
        self.health_checks = HealthChecks(lambda: self.engine.is_alive)
        self._stopping = asyncio.Event()
        self._signal = signal.SIGTERM
        self._lost_seen = 0
        self._vips: frozenset[int] = frozenset()
        self._hidden: set[NotHonoured] = set()  # node ports, by VIPs of the node's own
        self._unswept: Unswept | None = None  # None: connections of all Services
        self._has_served = False
        self.announcer = Announcer() if settings.announce == "arp" else None
        self._sockets: Sockets | None = None
        self.occupied: frozenset[int] = frozenset()  # ports that sockets of the node have
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
            self._files = changes(settings.files)  # from here on: what is written while we start is not missed
            first = self._load()
            try:
                self._start(stack, first)
                await self._serve(server)
            except KeyboardInterrupt:  # while starting
                self._signal = signal.SIGINT
                raise

    # Starting.

    def _load(self) -> Live:
        """Read all manifests, and resolve them."""
        settings = self.settings
        self.desired += 1
        found = self._manifests.load()
        view = NodeView(settings.node_name, settings.zone)
        return Live.of(found.services, found.slices, view, settings.allow_external_ips)

    def _plan(self, names: set[str]) -> Plan | None:
        """Read the files that have changed, and resolve what they change; return None if all have to be read."""
        changes = self._manifests.reload(names)
        if changes is None or not self.here.has_timeouts(filter(None, changes.services.values())):
            return None
        self.desired += 1
        here = self.here
        plan = self.live.plan(changes, here)
        addresses = here.node_port_addresses
        # Where VIPs of the node's own addresses come or go, node ports of Services that have not changed go or come.
        return plan if vips_at(addresses, plan.before) == vips_at(addresses, plan.after) else None

    def _start(self, stack: contextlib.ExitStack, first: Live) -> None:
        settings = self.settings
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
        reserve(settings.snat_ports, settings.reserved_path)
        stack.callback(self._give_ports_back_if_unused)
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
        self.services = ServiceTable(tables, maglev.DEFAULT_SEED, self.next_hops.row_for)
        self.services.adopt()
        if self.shared.is_new:
            self._whereabouts.forget()
        self._incarnations.know(self._whereabouts.read())
        self.end_succeeded((), first.snapshot().ports)
        self._apply(first)
        self.shortages = Shortages(settings, tables, lambda: self.next_hops.rows_refused)
        self.next_hops.when_addresses_change = self._reprogram
        self.engine.tidy(self.flows)
        self.masquerading = masquerading(
            settings.cluster_cidr, settings.snat_ports, settings.snat_addresses, Names(tables)
        )
        try:
            self._sockets = stack.enter_context(Sockets([PRIVILEGED_SNAT_PORTS, settings.snat_ports]))
            self.look_at_sockets(self._sockets)
        except MissingFeatureError as error:
            self._sockets = None
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

    @property
    def _worker_counters(self) -> Any:
        return self.shared.tables.worker_counters

    def _let_go_if_unused(self) -> None:
        """Give neighbours back to the kernel if this start came to nothing."""
        if not self._has_served and not self.settings.link_pins():
            self.next_hops.let_go_all()

    def _give_ports_back_if_unused(self) -> None:
        if not self.settings.link_pins():
            give_back(self.settings.reserved_path)

    def _announce_start(self) -> None:
        ports = len(self.snapshot.ports)
        for name, attachment in self.engine.attachments.items():
            how = f"XDP {attachment.mode}" if attachment.mode else "packet sockets"
            log.info("%s: %s%s", name, how, f" ({attachment.why})" if attachment.why else "")
        log.info("serving %d Service ports, engine %s", ports, self.engine.name)

    # Serving.

    async def _serve(self, server: Server) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self._note("event loop", context.get("exception") or context))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload_all)
        jobs: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "next hops": self.next_hops.run,
            "rows of next hops": Reclaim(self.next_hops, self.flows, self.shared.tables).run,
            "interfaces": self._follow_interfaces,
            "redirects": lambda: every(_LOOK_AT_REDIRECTS_S, self._watch_redirects),
            "sweep": self._sweep,
            "loads": self._count_connections,
            "clock": lambda: every(_CALIBRATE_S, self.clock.calibrate),
            "losses": lambda: every(_READ_LOSSES_S, self.read_losses),
            "shortages": lambda: every(_READ_LOSSES_S, self.look_for_shortages),
            "health checks": self._answer_health_checks,
            "files": self._follow_files,
            "reload": self._reload,
        }
        if self._sockets is not None:
            jobs["sockets"] = partial(self._follow_sockets, self._sockets)
        if self.clients is not None and self.led is not None:
            jobs["clients on this node"] = partial(self._follow_clients, self.clients, self.led)
        if self.engine.needs_rows:
            jobs["tidy"] = self._tidy
        if self.announcer is not None:
            jobs["announcing"] = lambda: every(_ANNOUNCE_S, self._announce)
        async with server, asyncio.TaskGroup() as group:
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
            async for names in self._files:
                if names is None or self._changed_files is None:
                    self._changed_files = None
                else:
                    self._changed_files |= names
                self._reload_wanted.set()
        finally:
            self._files = changes(self.settings.files)
            self._reload_all()

    def _reload_all(self) -> None:
        self._changed_files = None
        self._reload_wanted.set()

    async def _reload(self) -> None:
        """Read the manifests again when asked to, one time after the other, and apply them if they are right.

        If they are not, nothing changes and `status` says why. Reading takes seconds when there are many: in a thread.
        """
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            names, self._changed_files = self._changed_files, set()
            is_in_step, self._is_in_step = self._is_in_step, False
            try:
                plan = await asyncio.to_thread(self._plan, names) if names is not None and is_in_step else None
                if plan is not None:
                    await asyncio.to_thread(self.end_succeeded, plan.before, plan.after)
                if plan is not None and plan.here == self.here:
                    self._apply_plan(plan)
                else:
                    live = await asyncio.to_thread(self._load)
                    await asyncio.to_thread(self.end_succeeded, self.snapshot.ports, live.snapshot().ports)
                    self._apply(live)
            except Exception as error:
                if not isinstance(error, Error):
                    self._reload_all()
                    raise
                self.rejected = error
                kind = "manifests" if isinstance(error, ConfigError) else "configuration"
                log.error("%s not applied, what ran before goes on:\n%s", kind, error)

    @property
    def snapshot(self) -> Snapshot:
        """What runs, resolved."""
        return self.live.snapshot()

    def _apply(self, live: Live) -> None:
        """Make the node do what all manifests say."""
        before, snapshot = self.snapshot, live.snapshot()
        change = self._program(snapshot, self.here.administered)
        known = set(before.not_honoured)
        self.live = live
        self._note_who_is_where(before.ports, snapshot.ports)
        self._forget_gone(self.here.administered)
        self.next_hops.retain(live.endpoint_addresses())
        self._has_applied(change, [note for note in dict.fromkeys(snapshot.not_honoured) if note not in known])

    def _apply_plan(self, plan: Plan) -> None:
        """Make the node do what a few manifests have changed."""
        self.engine.expect_more(plan.rows)
        self.next_hops.add_local(local_addresses(plan.rows))
        names = Names(self.shared.tables)
        before = [known_as(frontend, names) for frontend in plan.without]  # while these have names
        change = self.services.update(plan.rows, plan.without)
        if self._unswept is not None:
            self._unswept.add(plan.resolved, before)
        left = self.live.commit(plan)
        self.next_hops.leave(left)
        self._note_who_is_where(plan.before, plan.after)
        self._follow_vips([*plan.before, *plan.after])
        self._forget_gone(self._may_have_gone(plan), left)
        if self.engine.needs_rows:
            self.engine.expect(rows_of(self.snapshot, self.here), self.next_hops.own_addresses())
        seen, come = (set(hidden_node_ports(ports, self.here)) for ports in (plan.before, plan.after))
        self._tell_hidden(self._hidden - seen | come)
        self._has_applied(change, plan.not_honoured)

    def _has_applied(self, change: Change, not_honoured: Iterable[NotHonoured]) -> None:
        for note in not_honoured:
            log.warning("%s", note)
        self._is_in_step, self.rejected, self.applied_at_s = True, None, time.time()
        self.programmed = self.desired
        self._has_programmed(change)

    def _administer(self, endpoints: Sequence[str] = (), state: str | None = None) -> Awaitable[list[dict[str, Any]]]:
        """Have an operator's word of endpoints, or only tell of them; return them with what is open to each.

        UsageError: there is no such endpoint. Error: nothing has changed, or a restart will forget it.
        """
        if state is None:  # one that has gone may have connections still
            return asyncio.to_thread(views.administered, self, [views.place_of(text) for text in endpoints])
        places = sorted({place for text in endpoints for place in views.places_of(self, text)}, key=str)
        if state not in [*AdminState]:
            raise UsageError(f"{state!r} is no state; known are {', '.join(AdminState)}")
        states = {**self.here.administered, **dict.fromkeys(places, AdminState(state))}
        states = {place: said for place, said in states.items() if said is not AdminState.READY}
        self._has_programmed(self._program(self.snapshot, states))
        try:
            administered.keep(self.settings.administered_path, states)
        except Error as error:
            raise Error(f"it is so, but a restart will forget it: {error}") from None
        return asyncio.to_thread(views.administered, self, places)

    def _note_who_is_where(self, before: Iterable[ServicePort], after: Iterable[ServicePort]) -> None:
        changed = self._incarnations.remember(before, after)
        try:
            self._whereabouts.add(changed, lambda: self._incarnations.everybody(self.snapshot.ports))
        except Error as error:
            self._note("Pods that may change while no daemon is there", error)

    def _follow_vips(self, changed: Iterable[ServicePort]) -> None:
        """Bring the VIPs to be announced up to date where these Service ports were changed."""
        if self.announcer is None:
            return
        touched = {number_of(each.address) for port in changed for each in port.frontends if each.address is not None}
        there = {address for address in touched if self.services.is_vip(address)}
        if there != touched & self._vips:
            self._vips = self._vips - touched | there

    def _may_have_gone(self, plan: Plan) -> Collection[Place]:
        """Return which endpoints an operator has had a word of are in no Service any more that a plan is about."""
        administered = self.here.administered
        if not administered:
            return ()
        before, after = (
            {(each.address, each.port) for port in ports for each in port.endpoints}
            for ports in (plan.before, plan.after)
        )
        return before & administered.keys() - after

    def _forget_gone(self, suspects: Collection[Place], left: Collection[IPAddress] = ()) -> None:
        """Forget what was said of those of these endpoints that no manifest has any more, at `left` for certain."""
        gone = {place for place in suspects if place[0] in left}
        if others := set(suspects) - gone:
            gone |= others.difference(self.live.places())
        if gone:
            states = {place: said for place, said in self.here.administered.items() if place not in gone}
            self.here = replace(self.here, administered=states)
            try:
                administered.keep(self.settings.administered_path, states)
            except Error as error:
                self._note("endpoints that are drained", error)

    def _reprogram(self) -> None:
        """Bring the rows up to date when not the Services but the node's addresses have changed."""
        try:
            self._has_programmed(self._program(self.snapshot, self.here.administered))
        except Error as error:
            self._note("addresses", error)

    def _program(self, snapshot: Snapshot, states: Mapping[Place, AdminState]) -> Change:
        """Make the tables say all of a snapshot, at the addresses that the node has now."""
        settings, own = self.settings, self.next_hops.own_addresses()
        families = tuple(sorted({network.version for network in settings.cluster_cidr}))
        timeouts = {port.options.timeouts_s for port in snapshot.ports} - {()}
        sets = self.flows.timeout_sets(timeouts, self.here.timeout_sets.values())
        addresses = self._node_port_addresses()
        here = Here(
            addresses,
            settings.masquerades,
            families,
            states,
            sets,
            leads_clients=self.clients is not None,
            vips=vips_at(frozenset(addresses), snapshot.ports),
        )
        rows = rows_of(snapshot, here)
        self.next_hops.add_local(local_addresses(rows))
        with self.engine.expecting(rows, own):
            change = self.services.apply(rows, own)
        self.here, self._unswept = here, None
        self._tell_hidden(set(hidden_node_ports(snapshot.ports, here)))
        self._vips = self.services.vips() if self.announcer is not None else self._vips
        return change

    def _tell_hidden(self, now: set[NotHonoured]) -> None:
        """Say which node ports give way to a VIP, if they have not until now."""
        for note in sorted(now - self._hidden):
            log.warning("%s", note)
        self._hidden = now

    def end_succeeded(self, before: Iterable[ServicePort], after: Iterable[ServicePort]) -> None:
        """End the connections to endpoints whose place is another Pod's, before that one is given any (C9).

        Not in the event loop: it takes passes over all connections, and a grace period between.
        """
        succeeded = self._incarnations.succeeded(before, after)
        ended = self._end_at([*succeeded, *(((address, 0), "ICMP") for (address, _), _ in succeeded)])
        if ended:
            log.info("%d connections ended: another Pod has the place of their endpoint", ended)

    def _end_at(self, seats: Iterable[Seat]) -> int:
        """End the connections to endpoints; return how many. Of protocol ICMP, echoes of either family."""
        names = Names(self.shared.tables)
        ends: dict[int, list[tuple[int, int]]] = {}
        for (address, port), protocol in seats:
            number, _, of_family = known_as((address, port, Protocol[protocol]), names)
            if protocol == "ICMP":
                of_family = echo_protocol(address.version)
            ends.setdefault(of_family, []).append((number, port))
        return sum(holder.end_at(protocol, places) for protocol, places in ends.items() for holder in self._holders())

    def _holders(self) -> list[FlowTable | LedSockets]:
        """Return who has connections."""
        return [self.flows] if self.led is None else [self.flows, self.led]

    def _node_port_addresses(self) -> tuple[IPAddress, ...]:
        return self.next_hops.node_port_addresses(self.settings.nodeport_addresses)

    def _has_programmed(self, change: Change) -> None:
        self._changed.set()
        self._checks_changed.set()
        self._loads_changed.set()
        log.debug("applied %s", change)

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
        self.announcer.announce(self._vips, served, now)
        self.announcer.turn(now)

    async def _answer_health_checks(self) -> None:
        """Have the health check ports answered as of the last change; where that failed, try again."""
        try:
            while True:
                self._checks_changed.clear()
                problems = await self.health_checks.apply(self.live.health_checks(), self._node_port_addresses())
                for problem in problems:
                    self._note("health check", problem)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LISTEN_AGAIN_S if problems else None):
                        await self._checks_changed.wait()
        finally:
            self.health_checks.close()

    async def _sweep(self) -> None:
        """Look at every flow in turn, and clear up behind a change as soon as nobody can see what was before."""
        while True:
            cpu_s = await asyncio.to_thread(self._sweep_slice)
            await asyncio.to_thread(self.services.forget, self.clock.now())
            if self._changed.is_set():
                self._changed.clear()
                await self._clear_up_behind(self.services.take_parted(), self.take_unswept())
            slices = -(-self.flows.slots_of_a_pass // _SWEEP_SLOTS)
            await tick(self._changed, next_tick(seconds_of_a_pass(cpu_s * slices) / slices))

    async def _clear_up_behind(self, parted: Parted, unswept: Unswept | None) -> None:
        try:
            await asyncio.to_thread(self.flows.wait_for_grace)
            self.clear_up(parted)
            await asyncio.to_thread(self.end_strays, unswept)
            await asyncio.to_thread(self.engine.tidy, self.flows)
        except Exception:
            self._unswept = None  # what was taken is lost
            raise

    def _sweep_slice(self) -> float:
        """Sweep a slice of the flows; return the seconds of CPU that it took."""
        began = time.thread_time()
        self.flows.sweep(_SWEEP_SLOTS)
        return time.thread_time() - began

    async def _count_connections(self) -> None:
        """Keep the loads that least connections goes by: admission adds to them, and nobody takes anything off.

        What begins while they are counted is counted, and may be counted twice until the next time.
        """
        while True:
            self._loads_changed.clear()
            rows, endpoints = self.services.loaded()
            if not rows:
                await self._loads_changed.wait()
                continue
            counts, cpu_s = await asyncio.to_thread(self._count_open, endpoints)
            self.services.correct_loads(rows, endpoints, counts)
            await asyncio.sleep(min(max(_COUNT_LOADS_S, cpu_s / _COUNTING_SHARE), _COUNT_LOADS_ANYWAY_S))

    def _count_open(self, endpoints: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.uint32], float]:
        """Return how many connections to these endpoints are open, and the seconds of CPU that it took to count."""
        began = time.thread_time()
        return self.flows.count_open(endpoints), time.thread_time() - began

    def clear_up(self, parted: Parted) -> None:
        """Make reusable what a change has parted with; nobody looks at it any more."""
        self.services.forget(self.clock.now(), parted.endpoints)
        self.services.release(parted)

    def take_unswept(self) -> Unswept | None:
        """Return what has changed since the last call, None for everything: for `end_strays` after a grace period."""
        unswept, self._unswept = self._unswept, Unswept()
        return unswept

    def end_strays(self, unswept: Unswept | None = None) -> None:
        """End UDP flows whose Service has their endpoint no more, and echoes: by themselves they never would (C8).

        TCP goes on, but for Services that would rather have it reset.

        After a grace period: a packet that chose such an endpoint before the change has inserted its flow by then.
        Of few Services that have changed, in the end only these are looked at.
        """
        names, later = Names(self.shared.tables), self._unswept
        if unswept is None or later is None:
            unswept, snapshot = None, self.snapshot
        else:  # a frontend that one has lost may be another's by now
            snapshot = self.live.snapshot_of(unswept.services | later.services)
        for holder in self._holders():
            for protocol in (Protocol.UDP, Protocol.UDP | Protocol.IPV6):
                pairs = living(snapshot, self.here, protocol, names)
                if unswept is None:
                    holder.keep_only(protocol, pairs)
                else:
                    holder.reset_others(protocol, unswept.frontends_of(protocol), pairs)
            for protocol in (Protocol.TCP, Protocol.TCP | Protocol.IPV6):
                lost = impatient(snapshot, self.here, protocol, names)
                if lost:
                    holder.reset_others(protocol, lost, living(snapshot, self.here, protocol, names))
        if self.settings.ping == "forward":
            for family in (4, 6):
                self.flows.keep_only(echo_protocol(family), answering(self.snapshot, self.here, family, names))
        out = [place for place, state in self.here.administered.items() if state is AdminState.MAINT]
        self._end_at((place, protocol) for place in out for protocol in ("TCP", "UDP"))

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(_TIDY_S)
            await asyncio.to_thread(self.engine.tidy, self.flows)

    def read_losses(self) -> None:
        """Add what the sockets have lost since the last call to the counters, which outlive the sockets."""
        lost = self.engine.lost()
        row = self._worker_counters[0]["packets"]
        row[Reason.PUNT_LOST] += lost - self._lost_seen
        self._lost_seen = lost

    def look_for_shortages(self) -> None:
        """Say so when new connections have found no room since the last call."""
        for what, words in self.shortages.news():
            self._note(what, words)

    async def _follow_sockets(self, sockets: Sockets) -> None:
        """Keep new masqueraded connections from the ports that sockets of the node have."""
        while True:
            await tick(asyncio.Event(), next_tick(_LOOK_AT_SOCKETS_S))
            cpu_s = await asyncio.to_thread(self.look_at_sockets, sockets)
            await asyncio.sleep(max(0.0, cpu_s / _LOOKING_SHARE - _LOOK_AT_SOCKETS_S))

    async def _follow_clients(self, clients: Connecting, led: LedSockets) -> None:
        """Keep clients on this node led; end what was about to connect when its endpoint went."""
        while True:
            await tick(asyncio.Event(), next_tick(_LOOK_AT_CLIENTS_S))
            clients.follow()
            await asyncio.to_thread(led.look_again)

    def look_at_sockets(self, sockets: Sockets) -> float:
        """Find out which ports sockets of the node have; return the seconds of CPU that it took."""
        began = time.thread_time()
        now = sockets.ports()
        took_s = time.thread_time() - began
        if now != self.occupied:
            occupy(self.masquerading, now | self.occupied)
            self.engine.spare(now, self.flows)
            occupy(self.masquerading, now)
            self.occupied = now
        return took_s

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
            self._whereabouts.forget()
            log.info("stopped; %s and tables removed", "programs" if goes_on else "filter")
        elif goes_on:
            log.info("stopped; XDP goes on forwarding known flows; `turnout detach` ends that")
        elif settings.on_exit == "keep":
            log.info("stopped; packets of Services are dropped until the next start, or `turnout detach`")
        else:
            self.engine.detach()
            self.next_hops.let_go_all()
            log.info("stopped; the next start goes on with the connections, `turnout detach` forgets them")
