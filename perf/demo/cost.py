"""What forwarding costs on both sides, measured in turns.

A packet of a known flow: the generator sends 64-byte UDP of 1,000 flows as fast as one CPU makes, receives and forwards
it; a sink behind the node counts. A connection and a request: a real client, one at a time, on an otherwise idle node.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from perf import measure
from perf.bed import FIRST_CLIENT, Cpus
from perf.demo.scene import Port, Side
from perf.measure import Spread, Trial, spread
from perf.traffic import Generator, Kit, Load, Seen, Sink, Stream, Task
from xdp.errors import Error

FLOWS = 1000
_WARM_FRAMES = 4096
_TRIAL_S = 0.2
_ROUNDS = 5
_CONNECTIONS = 50  # of a side in a round
_ANSWER_S = 2.0


@dataclass(frozen=True)
class Cost:
    """What one side takes: of one CPU for a packet, of a client's time for a connection and a request on it."""

    packet_ns: float
    connect_us: float
    request_us: float


@dataclass(frozen=True)
class Comparison:
    """Costs by side; `ratio` is how many packets turnout forwards while iptables forwards one, trial by trial."""

    by_side: dict[str, Cost]
    ratio: Spread


@dataclass(frozen=True)
class NotCompared:
    """Why there is no comparison, and whether that is because something did not work."""

    why: str
    is_failure: bool


class _Bed:
    """Generator and sink of one side."""

    def __init__(self, side: Side, echo: Port, kit: Kit, stack: ExitStack) -> None:
        node, client = side.world.node, side.client
        inside = node.interface_to("client")
        service = echo.service
        stream = Stream("eth0", client.mac, inside.mac, FIRST_CLIENT[4], service.vip, service.port)
        switch = side.world.switch("servers")
        self.sink = stack.enter_context(Sink(kit, switch, "node"))
        self.generator = stack.enter_context(Generator(kit, client, stream))

    def warm(self) -> None:
        """Have every flow seen and answered twice, so that it is established."""
        self.generator.choose(Load(FLOWS))
        with self.sink.doing(Task.REFLECT):
            for _ in range(2):
                self.generator.send_in_step(self.sink, frames=_WARM_FRAMES)

    def trial(self) -> Trial:
        """Send for a moment as fast as frames can be made."""
        arrived, translated = (self.sink.count(word) for word in (Seen.PACKETS, Seen.TRANSLATED))
        stolen, ticks = measure.cpu_times()
        sent = self.generator.send_for(_TRIAL_S)
        arrived = self.sink.settled() - arrived
        translated = self.sink.count(Seen.TRANSLATED) - translated
        stolen_now, ticks_now = measure.cpu_times()
        if not arrived or translated != arrived:
            raise Error(f"of {sent.frames} packets {arrived} arrived, {translated} of them at an endpoint's port")
        steal = (stolen_now - stolen) / max(1, ticks_now - ticks)
        return Trial(sent.frames, sent.frames, arrived, sent.seconds, steal)


def compare(sides: Sequence[Side], services: dict[str, Port], tick: Callable[[float], None]) -> Comparison:
    """Measure both sides, the first against the second; `tick` is told the share that is done.

    Error: packets or answers were missing.
    """
    done, steps = 0, _ROUNDS * len(sides) * 2

    def advance() -> None:
        nonlocal done
        done += 1
        tick(done / steps)

    times: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    for number in range(_ROUNDS):
        for side in sides if number % 2 == 0 else reversed(sides):
            times[side.name] += side.client.call(_openings, services["tcp"], _CONNECTIONS)
            advance()
    cpus = Cpus()
    with ExitStack() as stack:
        kit = stack.enter_context(Kit(sides[0].folder / "kit"))
        beds = {side.name: _Bed(side, services["udp"], kit, stack) for side in sides}
        stack.enter_context(cpus.pinned(cpus.generator))
        for bed in beds.values():
            bed.warm()
        trials = measure.interleaved(list(beds), _ROUNDS, lambda name: beds[name].trial(), advance)
    costs = {
        name: Cost(
            packet_ns=statistics.median(1e9 / trial.rate_pps for trial in trials[name]),
            connect_us=statistics.median(connect for connect, _ in times[name]) * 1e6,
            request_us=statistics.median(request for _, request in times[name]) * 1e6,
        )
        for name in times
    }
    ours, theirs = (trials[side.name] for side in sides)
    return Comparison(costs, spread([b.seconds / b.arrived * a.rate_pps for a, b in zip(ours, theirs, strict=True)]))


def _openings(web: Port, count: int) -> list[tuple[float, float]]:
    """Open connections one after the other, with a request on each; return the seconds of both, for each."""
    seconds = []
    target = str(web.service.vip), web.service.port
    for _ in range(count):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
                client.settimeout(_ANSWER_S)
                start = time.perf_counter()
                client.connect(target)
                connected = time.perf_counter()
                client.sendall(b"GET /0 HTTP/1.1\r\nHost: vip\r\n\r\n")
                answer = b""
                while not answer.partition(b"\r\n\r\n")[2].endswith(b"\n"):
                    piece = client.recv(4096)
                    if not piece:
                        raise OSError("the connection was closed")
                    answer += piece
                seconds.append((connected - start, time.perf_counter() - connected))
        except OSError as error:
            raise Error(f"{web.target}: no answer over a new connection: {error}") from None
    return seconds
