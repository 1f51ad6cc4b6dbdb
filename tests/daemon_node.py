"""A daemon between silent hosts: they see every frame and answer none.

So nothing is on the wires but what a test sends. The node's kernel does not forward, so that a frame it was given goes
no further.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from perf.world import World, wait_until
from tests.daemon import Daemon
from tests.node import HOSTS, ScenarioNode, Sent
from tests.services import Service
from tests.wires import TO_ANYBODY, Wire
from xdp.schema import FIRST_PUNT, Reason, Verdict, verdict_of

_PATIENCE_S = 5.0  # a held frame is dropped after one second

# A kernel with IPv6 tells of itself, unasked.
_SILENCE = "table ip6 silence {\nchain output {\ntype filter hook output priority 0; policy drop;\n}\n}\n"

_Counts: TypeAlias = npt.NDArray[np.int64]  # by reason


class DaemonNode(ScenarioNode):
    """A daemon between silent hosts."""

    _PATH = "xdp"  # who sees every packet

    def __init__(self, world: World, daemon: Daemon, family: int = 4) -> None:
        super().__init__(family)
        self.engine = daemon.engine
        self.daemon = daemon
        for host in HOSTS:  # a host without address answers nothing
            world[host].run(["ip", "address", "flush", "dev", "eth0"])
            world[host].sysctl("net/ipv6/conf/eth0/disable_ipv6", 1)
        world.node.sysctl("net/ipv4/ip_forward", 0)
        if family == 6:
            world.node.sysctl("net/ipv6/conf/all/forwarding", 0)
            world.node.run(["nft", "-f", "-"], text_in=_SILENCE)
        self._hosts = {host: Wire(world[host], "eth0") for host in HOSTS}
        self._shared = daemon.tables()
        self._inside = self._listen_inside(world)
        self._applied: tuple[Service, ...] | None = None
        self._not_ours = self._packets()[self._PATH]["received"]

    def _listen_inside(self, world: World) -> list[Wire]:
        """Return the places where the kernel's frames come by."""
        return [Wire(world.node, interface.name, TO_ANYBODY) for interface in world.node.interfaces]

    def close(self) -> None:
        self._shared.close()
        for one in (*self._hosts.values(), *self._inside):
            one.close()

    def apply(self, *services: Service) -> None:
        if services != self._applied:
            self.daemon.apply(*services)
            self._applied = services

    def answer(self, command: str, **options: Any) -> Any:
        return self.daemon.ask(command, **options)

    def _packets(self) -> dict[str, dict[str, int]]:
        return self.status()["packets"]  # type: ignore[no-any-return]

    def send_all(self, frames: Sequence[bytes], host: str = "client", ends: int | None = None) -> Sent:
        strays = self._collect()  # before the first frame, what a kernel says when its interfaces come up
        assert not (self.sent and any(strays)), f"frames that nobody has sent: {strays}"
        before, originated = self._counts(), self._originated()
        for frame in frames:
            self._hosts[host].send(self.on_the_wire(frame, host))
        self.sent += len(frames)
        after = self._settled(before, len(frames) if ends is None else ends)
        grown = sum(after) - sum(before)
        ends = Counter(
            {
                Reason(number): int(grown[number])
                for number in np.flatnonzero(grown).tolist()
                if verdict_of(number) is not Verdict.PUNT
            }
        )
        left, passed = self._collect_all(
            sum(count for reason, count in ends.items() if verdict_of(reason) is Verdict.FORWARD)
            + self._originated()
            - originated,
            sum(count for reason, count in ends.items() if verdict_of(reason) is Verdict.PASS),
        )
        return Sent(left, passed, ends)

    def _counts(self) -> tuple[_Counts, _Counts]:
        """Return how often XDP, and how often userspace, has counted each reason: from the tables, which is quick."""
        tables = self._shared.tables
        xdp, user = (
            rows["packets"].sum(axis=0).astype(np.int64) for rows in (tables.xdp_counters, tables.worker_counters)
        )
        return xdp, user

    def _originated(self) -> int:
        """Return how many packets userspace has sent of its own; counted before the packets that were the reason."""
        return int(self._shared.tables.worker_counters["originated"].sum())

    def _is_settled(self, xdp: _Counts, user: _Counts, before: tuple[_Counts, _Counts], count: int) -> bool:
        """Whether so many frames more than before have met their ends."""
        in_xdp = (xdp - before[0])[:FIRST_PUNT].sum()
        return bool(in_xdp + (user - before[1]).sum() >= count)  # those lost are counted there, too

    def _settled(self, before: tuple[_Counts, _Counts], count: int) -> tuple[_Counts, _Counts]:
        """Return the counts when so many more frames have met their ends."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            xdp, user = self._counts()
            if self._is_settled(xdp, user, before, count):
                return xdp, user
            assert time.monotonic() < deadline, (self.status(), self.daemon.said())

    def _collect(self) -> tuple[list[tuple[str, bytes]], list[bytes]]:
        left = [(host, frame) for host, wire_end in self._hosts.items() for frame in wire_end.received()]
        return left, [frame for inside in self._inside for frame in inside.received()]

    def _collect_all(self, left: int, passed: int) -> tuple[list[tuple[str, bytes]], list[bytes]]:
        """Return what has left and what was passed, when there are so many of them."""
        found: tuple[list[tuple[str, bytes]], list[bytes]] = ([], [])

        def is_complete() -> bool:
            for all_of_them, more in zip(found, self._collect(), strict=True):
                all_of_them.extend(more)  # type: ignore[arg-type]
            return len(found[0]) >= left and len(found[1]) >= passed

        wait_until(is_complete, _PATIENCE_S, 0.0005)
        return found

    def check_accounts(self) -> None:
        packets = self._packets()
        xdp, user = packets["xdp"], packets["userspace"]
        assert xdp["received"] == self.sent + self._not_ours
        assert xdp["received"] == xdp["forwarded"] + xdp["passed"] + xdp["dropped"] + xdp["punted"]
        assert user["received"] == user["forwarded"] + user["dropped"]
        assert user["received"] == xdp["punted"] - user["punt_lost"]
        assert xdp["redirect_failed"] == 0


class RawNode(DaemonNode):
    """A daemon of engine `raw`: every frame is seen by userspace, and most by the kernel, too."""

    _PATH = "userspace"

    def _listen_inside(self, world: World) -> list[Wire]:
        """A packet socket is a tap before the filter: what gets past the filter is sent to a wire of its own."""
        world.node.run(["ip", "link", "add", "probe", "type", "veth", "peer", "name", "probed"])
        for end in ("probe", "probed"):
            world.node.run(["ip", "link", "set", end, "up"])
        names = ", ".join(f'"{interface.name}"' for interface in world.node.interfaces)
        rules = f"type filter hook ingress devices = {{ {names} }} priority 1\ndup to probe"
        world.node.run(["nft", "-f", "-"], text_in=f"table netdev probe {{\nchain ingress {{\n{rules}\n}}\n}}\n")
        return [Wire(world.node, "probed", TO_ANYBODY)]

    def _is_settled(
        self,
        xdp: _Counts,  # noqa: ARG002
        user: _Counts,
        before: tuple[_Counts, _Counts],
        count: int,
    ) -> bool:
        return bool(user.sum() >= before[1].sum() + count)

    def check_accounts(self) -> None:
        user = self._packets()["userspace"]
        assert user["received"] == self.sent + self._not_ours
        assert user["received"] == user["forwarded"] + user["passed"] + user["dropped"]
        assert user["punt_lost"] == 0
