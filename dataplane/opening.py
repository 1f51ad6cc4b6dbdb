"""Open what a node stands on: tables, clock, flow table and engine - those asked for, or the best that work here.

An attempt that fails leaves nothing behind, and what a predecessor left is refused before anything in it is changed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from conntrack.table import FlowTable
from dataplane import views
from dataplane.detach import remove_raw
from dataplane.engine import Engine
from dataplane.netdev import Interface
from dataplane.output import counted
from dataplane.rawengine import RawEngine
from dataplane.settings import Settings
from xdp import files, links, loader, maps, mounts, rcu, removing
from xdp.clock import Clock, JiffyClock, MonotonicClock
from xdp.errors import AttachError, MissingFeatureError
from xdp.schema import Reason, Verdict
from xdp.tables import Capacity, Tables
from xdp.writing import explained

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """What a node stands on. The engine is prepared, and not started."""

    shared: maps.SharedMaps | files.SharedFile
    clock: JiffyClock | MonotonicClock
    flows: FlowTable
    engine: Engine | RawEngine


def open_node(
    stack: contextlib.ExitStack, settings: Settings, interfaces: Sequence[Interface], has_served: Callable[[], bool]
) -> Opened:
    """Open everything; `stack` closes it. New tables are removed then, too, if the node has not served."""
    if settings.engine == "raw":
        return _open_raw(stack, settings, interfaces, has_served, "asked for")
    try:
        with contextlib.ExitStack() as attempt:
            opened = _open_xdp(attempt, settings, interfaces, has_served)
            stack.push(attempt.pop_all())
            return opened
    except MissingFeatureError as error:
        if settings.engine != "auto":
            raise
        log.warning("no engine xdp: %s", error)
        return _open_raw(stack, settings, interfaces, has_served, f"no engine xdp: {error}")


def _open_xdp(
    stack: contextlib.ExitStack, settings: Settings, interfaces: Sequence[Interface], has_served: Callable[[], bool]
) -> Opened:
    mounts.mount_bpffs(settings.bpffs)
    _refuse_foreign_programs(settings, interfaces)
    shared = stack.enter_context(maps.open_or_create(settings.pins, _capacity(settings)))
    if shared.is_new:
        stack.callback(lambda: None if has_served() or settings.link_pins() else removing.maps(settings.pins))
    clock = JiffyClock()
    flows = _open_flows(shared, clock, rcu.wait_for_grace)
    if not shared.is_new:
        _write_off(shared.tables)
    engine = Engine(settings, shared, clock)
    stack.callback(engine.stop)
    engine.prepare(interfaces)
    remove_raw(settings)  # what engine raw has left is in nobody's way, and of no use
    return Opened(shared, clock, flows, engine)


def _open_raw(
    stack: contextlib.ExitStack,
    settings: Settings,
    interfaces: Sequence[Interface],
    has_served: Callable[[], bool],
    why: str,
) -> Opened:
    if settings.link_pins():
        raise AttachError(
            f"node {settings.name!r} has left XDP programs, which would take packets first; `turnout detach` first"
        )
    capacity = _capacity(settings)
    try:
        shared = stack.enter_context(files.open_or_create(settings.table_folder, capacity))
    except files.NoRoomError as error:
        log.warning("%s: tables in memory; a restart forgets connections", error)
        shared = files.in_memory(capacity)
    if shared.is_new:
        stack.callback(lambda: None if has_served() else removing.files(settings.table_folder))
    clock = MonotonicClock()
    flows = _open_flows(shared, clock, lambda: None)
    engine = RawEngine(settings, shared.tables, capacity, clock, why)
    stack.callback(engine.stop)
    engine.prepare(interfaces)
    return Opened(shared, clock, flows, engine)


def _open_flows(
    shared: maps.SharedMaps | files.SharedFile, clock: Clock, wait_for_readers: Callable[[], None]
) -> FlowTable:
    """Make the flow table, or take over what is in it."""
    flows = FlowTable(shared.tables, clock, wait_for_readers)
    if shared.is_new:
        flows.create()
        return flows
    shared.tables.workers[:] = 0  # of a predecessor that was killed: nobody is to wait for its turns
    abandoned = flows.take_over()
    lost = f", {counted(abandoned, 'slot')} given up" if abandoned else ""
    log.info("took over %s%s", counted(flows.used(), "connection"), lost)
    return flows


def _write_off(tables: Tables) -> None:
    """Count as lost what XDP had punted to the daemon before this one and that one never saw."""
    rcu.wait_for_grace()
    xdp, user = (views.by_verdict(rows) for rows in (tables.xdp_counters, tables.worker_counters))
    lost = max(0, xdp[Verdict.PUNT] - sum(user.values()))  # one cut short by a kill is no reason not to start
    tables.worker_counters[0]["packets"][Reason.PUNT_LOST] = lost


def _capacity(settings: Settings) -> Capacity:
    # XDP counts in the row of its CPU: there must be one for each that may come online.
    return Capacity(connections=settings.capacity, cpus=os.sysconf("SC_NPROCESSORS_CONF"))


def _refuse_foreign_programs(settings: Settings, interfaces: Sequence[Interface]) -> None:
    """Refuse an interface that has somebody else's XDP program, before anything is changed."""
    for interface in interfaces:
        pin = settings.link_pin(interface.name)
        if links.xdp_state(interface.ifindex) is None or pin.exists():
            continue
        holder = loader.find_link(settings.link_pins_of_all(), interface.ifindex)
        if holder is None:
            raise AttachError(links.taken(interface.ifindex))
        node = holder.parent.name
        if node != settings.name:
            raise AttachError(
                f"{interface.name}: is served by turnout node {node!r}; stop that and `turnout detach --name {node}`, "
                f"or be its successor with --name {node}"
            )
        with explained(pin, "cannot be renamed"):  # the interface was, since an earlier daemon attached it
            holder.rename(pin)
