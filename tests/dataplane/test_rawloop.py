"""The packet loop of engine `raw`, what of it needs no socket: frames that wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conntrack.table import FlowTable
from dataplane import holding, packetrings, rawloop
from dataplane.originals import new_originals
from tests import packets
from tests.packets import CLIENT, DNS_VIP
from tests.small_node import SMALL, Pipeline, service_ports, service_table
from xdp.clock import ManualClock
from xdp.jit import compiled
from xdp.schema import Reason
from xdp.tables import Tables

SLOT_BYTES = 2048


@compiled
def _retry_held(node: Any, originals: Any, queue: Any, scratch: Any, now: Any) -> None:
    rawloop._retry_held(node, originals, queue, scratch, now, node.tables.worker_counters[0])


def new_queue() -> packetrings.Queue:
    """Return one without sockets, of which only `held` is looked at."""
    none, no_words, no_places = np.zeros(0, np.uint8), np.zeros(0, np.uint32), np.zeros(8, np.int64)
    held = np.zeros((holding.ROOM + 1) * SLOT_BYTES, np.uint8)
    return packetrings.Queue(none, no_words, 0, none, no_words, SLOT_BYTES, no_places, no_places, none, held, 0, 0, 0)


@pytest.mark.parametrize("reason", [Reason.NO_NEXT_HOP, Reason.FRAGMENT_ALONE])
def test_a_frame_that_has_waited_for_too_long_is_dropped_and_no_other_s_datagram_with_it(reason: Reason):
    tables, clock = Tables.in_memory(SMALL), ManualClock()
    FlowTable(tables, clock).create()
    service_table(tables).apply(service_ports())
    pipeline, scratch, queue = Pipeline(tables), rawloop.new_scratch(0, 0), new_queue()
    first, second = (
        packets.fragment_of(packets.udp(CLIENT, DNS_VIP, bytes(1600)), *cut) for cut in ((0, 800), (800, 1608))
    )
    assert pipeline.send(first, clock.now()).reason == Reason.ADMITTED
    late = np.frombuffer(packets.syn(), np.uint8)
    queue.held[packetrings.VNET_BYTES :][: len(late)] = late
    scratch.held.reason[0], scratch.held.since[0], scratch.held.count[0] = reason, clock.now() - 31 * clock.hertz, 1
    scratch.lengths[0] = len(late)
    scratch.held.epoch[0] = tables.control[0]["next_hop_epoch"] + pipeline.node.fragments.begun[0]  # no news
    _retry_held(pipeline.node, new_originals(8), queue, scratch, np.uint32(clock.now()))
    assert int(scratch.held.count[0]) == 0
    assert np.flatnonzero(tables.worker_counters[0]["packets"]).tolist() == [reason]
    assert pipeline.send(second, clock.now()).reason == Reason.FORWARDED
