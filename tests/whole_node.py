"""A whole node with any engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from perf.world import World
from tests.daemon import Daemon
from tests.daemon_node import DaemonNode, RawNode
from tests.memory_node import MemoryNode
from tests.node import HOSTS, ScenarioNode


@contextlib.contextmanager
def whole_node(
    engine: str, folder: Path, prefix: str, flags: Mapping[str, str] | None = None, family: int = 4
) -> Iterator[ScenarioNode]:
    """Make a node with an engine; it is gone afterwards. `prefix` names the world's namespaces.

    `flags` are more flags of `run`, by their names with _ for -; several values of one stand with blanks between.
    """
    flags = {name.replace("_", "-"): value for name, value in (flags or {}).items()}
    if engine == "memory":
        yield MemoryNode(folder, flags, family)
        return
    with (
        World(prefix, HOSTS, static_neighbours=True, ipv6=family == 6) as world,
        Daemon(world, engine, flags=flags) as daemon,
    ):
        daemon.start()
        node = (RawNode if engine == "raw" else DaemonNode)(world, daemon, family)
        try:
            yield node
        finally:
            node.close()
