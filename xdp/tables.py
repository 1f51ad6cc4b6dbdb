"""The shared tables: their names, types and sizes, and the arrays as compiled code takes them.

A table is the same bytes for everybody. Here it is described; xdp/maps.py makes it a BPF array map that userspace
maps, `Tables.in_memory` makes it plain memory of the same layout (no BPF: unit tests, the raw engine, a laptop).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from xdp import schema
from xdp.bundle import Bundle
from xdp.schema import Limit

# A bucket of 16 tags, two to choose from, the emptier one taken: the first insertion fails at a load of about 0.85.
HIGHEST_LOAD = 0.80


@dataclass(frozen=True)
class Capacity:
    """How many of each thing the tables hold. Given at start; part of the layout that a successor must share."""

    connections: int = 1_000_000
    frontends: int = 262_144
    services: int = 131_072  # rows: a change needs a second row until the first may be reused
    maglev_slots: int = 33_554_432  # 100,000 Services of 3 endpoints take 30.7 million
    endpoints: int = 524_288
    next_hops: int = 65_536
    cpus: int = 1
    ranges: int = 131_072  # source ranges
    affinities: int = 262_144  # clients that keep their endpoint; beyond that, the oldest are forgotten
    names: int = 262_144  # IPv6 addresses that flows and configuration use at a time

    @property
    def buckets(self) -> int:
        """Buckets of the flow table: two records per connection at the highest load that never refuses one."""
        return max(2, math.ceil(2 * self.connections / HIGHEST_LOAD / Limit.BUCKET_TAGS))

    def rows(self) -> dict[str, tuple[np.dtype, int]]:
        """Return {table: (dtype of a row, number of rows)}: the one list of shared tables."""
        return {
            "tags": (schema.BUCKET, self.buckets),
            "flows": (schema.FLOW, self.buckets * Limit.BUCKET_TAGS),
            # Two choices of four places, at most half full: an insertion that fails is a matter of 10^-12.
            "frontends": (schema.FRONTEND, max(2, 2 * self.frontends // Limit.FRONTEND_WAYS) * Limit.FRONTEND_WAYS),
            "services": (schema.SERVICE, self.services),
            "maglev": (schema.MAGLEV_LINE, -(-self.maglev_slots // 16)),
            "endpoints": (schema.ENDPOINT, self.endpoints),
            "ranges": (schema.RANGE, self.ranges),
            "ranges6": (schema.RANGE6, self.ranges),
            # Like frontends; and row 0 is nobody's.
            "names": (schema.NAME, min(max(2, 2 * self.names // Limit.NAME_WAYS) * Limit.NAME_WAYS, Limit.MAX_NAMES)),
            "affinity": (schema.AFFINITY, max(1, self.affinities // Limit.AFFINITY_WAYS) * Limit.AFFINITY_WAYS),
            "next_hops": (schema.NEXT_HOP, self.next_hops),
            "hosts": (schema.HOST, 1 << (2 * self.next_hops - 1).bit_length()),
            "datagrams": (schema.DATAGRAM, Limit.DATAGRAMS),
            "control": (schema.CONTROL, 1),
            "workers": (schema.WORKER, Limit.MAX_WORKERS),
            "machine": (schema.MACHINE, 1),
            "passages": (schema.PASSAGE, self.cpus),
            "xdp_counters": (schema.COUNTERS, self.cpus),
            "egress_counters": (schema.COUNTERS, self.cpus),
            "connect_counters": (schema.COUNTERS, self.cpus),
            "worker_counters": (schema.COUNTERS, Limit.MAX_WORKERS),
        }

    def describe(self) -> dict[str, int]:
        """Return the numbers by name, as stored beside the maps."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Tables(Bundle):
    """Every shared table as a numpy array: one argument for compiled code.

    `tags` is the flat array of u64 words (BUCKET_WORDS per bucket), `maglev` that of endpoint rows, `hosts` that of
    words; the others have one structured row per entry. The last ones are the fields of rows that go through atomic
    accesses: whether a flow is published, names (state, pins, how many), both words of an affinity, a Service's turn,
    an endpoint's load, a frontend's key and Service port, a worker's heartbeat, turn and the word that says since when
    something waits for it.
    """

    tags: npt.NDArray[np.uint64]
    flows: npt.NDArray[np.void]
    frontends: npt.NDArray[np.void]
    services: npt.NDArray[np.void]
    maglev: npt.NDArray[np.uint32]
    endpoints: npt.NDArray[np.void]
    ranges: npt.NDArray[np.void]
    ranges6: npt.NDArray[np.void]
    names: npt.NDArray[np.void]
    affinity: npt.NDArray[np.void]
    next_hops: npt.NDArray[np.void]
    hosts: npt.NDArray[np.uint64]
    datagrams: npt.NDArray[np.void]
    control: npt.NDArray[np.void]
    workers: npt.NDArray[np.void]
    machine: npt.NDArray[np.void]
    passages: npt.NDArray[np.void]
    xdp_counters: npt.NDArray[np.void]
    egress_counters: npt.NDArray[np.void]
    connect_counters: npt.NDArray[np.void]
    worker_counters: npt.NDArray[np.void]
    published: npt.NDArray[np.uint8]
    name_states: npt.NDArray[np.uint32]
    name_pins: npt.NDArray[np.uint32]
    name_count: npt.NDArray[np.uint64]
    frontend_keys: npt.NDArray[np.uint64]
    frontend_services: npt.NDArray[np.uint32]
    affinity_words: npt.NDArray[np.uint64]
    round_robin: npt.NDArray[np.uint32]
    loads: npt.NDArray[np.uint32]
    heartbeats: npt.NDArray[np.uint64]
    turns: npt.NDArray[np.uint64]
    waiting_since: npt.NDArray[np.uint64]

    @classmethod
    def over(cls, arrays: Mapping[str, npt.NDArray[np.void]]) -> Tables:
        """Return the tables over one structured array per name of `Capacity.rows()`."""
        words = {
            "tags": arrays["tags"].view(np.uint64),
            "maglev": arrays["maglev"].view(np.uint32),
            "hosts": arrays["hosts"].view(np.uint64),
            "published": arrays["flows"]["published"],
            "name_states": arrays["names"]["state"],
            "name_pins": arrays["names"]["pins"],
            "name_count": arrays["control"]["names"],
            "round_robin": arrays["services"]["turn"],
            "loads": arrays["endpoints"]["load"],
            "affinity_words": arrays["affinity"].view(np.uint64),
            "frontend_keys": arrays["frontends"].view(np.uint64)[::2],
            "frontend_services": arrays["frontends"]["service"],
            "heartbeats": arrays["workers"]["heartbeat"],
            "turns": arrays["workers"]["turn"],
            "waiting_since": arrays["workers"]["waiting_since"],
        }
        return cls(**{**arrays, **words})  # type: ignore[arg-type]

    @classmethod
    def in_memory(cls, capacity: Capacity) -> Tables:
        """Return zeroed tables in this process's own memory."""
        return cls.over({name: np.zeros(rows, dtype) for name, (dtype, rows) in capacity.rows().items()})
