"""See it work: `turnout demo`. A node, a client and three endpoints in network namespaces, real traffic, and a summary.

    1  two worlds that are alike (scene.py): turnout runs on the node of one, iptables on that of the other
    2  HTTP and UDP clients through turnout's VIPs, with a live picture (display.py)
    3  what a packet, a connection and a request cost on both sides (cost.py)
    4  all is removed, and what was seen is told (summary.py)

Whatever ends it, nothing stays: what a killed demo could not remove, the next one does.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.table import Table

from perf.clients import Load, Result
from perf.demo import scene, summary
from perf.demo.cost import Comparison, NotCompared, compare
from perf.demo.display import Display
from perf.demo.scene import ENDPOINTS, MANIFEST, Daemon, Names, Port, Side
from xdp.errors import Error, MissingFeatureError
from xdp.schema import Reason, Verdict, verdict_of

LOAD_S = 5.0
_POLL_S = 0.25
_REQUESTS = 10  # on each connection
_CONCURRENT = {"tcp": 24, "udp": 12}
_PATIENCE_S = 4.0  # a daemon that needs longer is compiling
_ENDED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _EndedError(BaseException):
    """A signal told us to end."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


def main(name: str | None = None, *, keep: bool = False, remove: bool = False, seconds: float = LOAD_S) -> int:
    """Run the demo under `name`, with traffic for `seconds`; return the exit code: 1 if something did not work.

    `keep` leaves turnout's world for a look around, `remove` only removes that. Errors: what kept it from running.
    """
    names = Names("demo" if name is None else f"demo-{name}")
    console = Console(stderr=True, highlight=False, markup=False)
    try:
        with _ending_in_order():
            if remove:
                found = scene.clean(names)
                console.print("removed" if found else "nothing of a demo is left", soft_wrap=True)
                return 0
            return _run(names, keep, seconds, console)
    except _EndedError as end:
        console.print("interrupted; all that the demo had made is removed", soft_wrap=True)
        return 128 + end.number


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Turn the first signal that ends us into an exception, ignore those that follow: cleaning up takes a second."""

    def end(number: int, _frame: Any) -> NoReturn:
        _ignore()
        raise _EndedError(number)

    before = {number: signal.signal(number, end) for number in _ENDED_BY}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore() -> None:
    for number in _ENDED_BY:
        signal.signal(number, signal.SIG_IGN)


def _run(names: Names, keep: bool, seconds: float, console: Console) -> int:
    services = scene.ports()
    began = time.monotonic()
    with ExitStack() as kept, Display(console) as display, ExitStack() as both:
        if scene.clean(names):
            display.say("the world of an earlier demo was still there; it is removed")
        scene.refuse_others(names)
        kept.callback(scene.forget, names)
        try:
            traffic, costs = _play(names, services, seconds, display, kept, both)
            if keep:
                kept.pop_all()  # and nothing closes it
        finally:
            _ignore()  # from here on everything is being removed
    next_steps = _kept_steps(names, services) if keep else _next_steps(names)
    with contextlib.suppress(BrokenPipeError):
        print(summary.text(services, traffic, costs, next_steps), flush=True)
    left = "" if keep else "; nothing is left behind"
    console.print(f"the demo took {time.monotonic() - began:.0f} s{left}", soft_wrap=True)
    return 1 if summary.problems(traffic, costs) else 0


def _play(
    names: Names, services: dict[str, Port], seconds: float, display: Display, kept: ExitStack, both: ExitStack
) -> tuple[summary.Traffic, Comparison | NotCompared]:
    """Do all that is to be seen. The world of turnout goes with `kept`, that of iptables with `both`."""
    with display.step("a client, a node and three endpoints, in network namespaces"):
        ours = scene.build(kept, "turnout", names.worlds[0])
        daemon = Daemon(names, ours).start()
        scene.start_servers(ours)
    with display.step("the same again, with iptables on the node"):
        theirs = scene.build(both, "iptables", names.worlds[1])
        scene.start_servers(theirs)
        missing = ""
        try:
            scene.start_iptables(theirs, services)
        except MissingFeatureError as error:
            missing = str(error)
    with display.step(f"turnout run -f {_shown(MANIFEST)} -i eth0 eth1, on the node"):
        _wait(daemon, display)
    with display.step("HTTP and UDP clients, through the Services' addresses"):
        traffic = _traffic(daemon, ours, services, seconds, display)
    if missing:
        return traffic, NotCompared(missing, is_failure=False)
    with display.step("what it costs: turnout and iptables in turns"):
        return traffic, _costs([ours, theirs], services, display)


def _wait(daemon: Daemon, display: Display) -> None:
    began = time.monotonic()

    def tick() -> None:
        if time.monotonic() - began > _PATIENCE_S:
            so_far = f"{time.monotonic() - began:.0f} s so far"
            words = f"the very first start compiles the packet path, once, for about half a minute; {so_far}"
            display.show(words, words)

    daemon.wait(tick)


def _costs(sides: list[Side], services: dict[str, Port], display: Display) -> Comparison | NotCompared:
    def tick(share: float) -> None:
        display.show(ProgressBar(total=1.0, completed=share, width=60), f"{share:.0%} done")

    try:
        return compare(sides, services, tick)
    except Error as error:
        return NotCompared(str(error), is_failure=True)


def _traffic(
    daemon: Daemon, side: Side, services: dict[str, Port], seconds: float, display: Display
) -> summary.Traffic:
    """Run real clients for so long, and show meanwhile what the node says of itself."""
    before = daemon.ask("status")
    loads = {
        protocol: Load(
            side.client,
            "http-load" if protocol == "tcp" else "udp-load",
            port.target,
            seconds=seconds,
            requests=_REQUESTS,
            concurrent=_CONCURRENT[protocol],
        )
        for protocol, port in services.items()
    }
    with ExitStack() as stack:
        for load in loads.values():
            stack.enter_context(load)
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < seconds:
            _show_traffic(daemon, elapsed / seconds, before, display)
            time.sleep(min(_POLL_S, max(0.0, seconds - elapsed)))
    return _accounts(before, daemon.ask("status"), {protocol: load.result for protocol, load in loads.items()})


def _show_traffic(daemon: Daemon, share: float, before: Any, display: Display) -> None:
    services, now = daemon.ask("services"), _accounts(before, daemon.ask("status"), {})
    table = Table("Service", *ENDPOINTS, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    flows = 0
    for service in services:
        counts = [endpoint["flows"] for endpoint in service["endpoints"]]
        flows += sum(counts)
        where = f"{service['namespace']}/{service['name']} {service['frontends'][0]}/{service['protocol']}"
        table.add_row(where, *(f"{count:,}" for count in counts))
    words = f"{flows:,} connections; packets: XDP {now.in_xdp:,}, userspace {now.in_userspace:,}"
    display.show(Group(ProgressBar(total=1.0, completed=share, width=60), table, words), words)


def _accounts(before: Any, after: Any, loads: dict[str, Result]) -> summary.Traffic:
    """Return what became of packets between two answers to `status`."""

    def gained(part: str, kind: str) -> int:
        return int(after["packets"][part][kind]) - int(before["packets"][part][kind])

    modes = sorted({str(interface["xdp_mode"] or "raw") for interface in after["interfaces"]})
    return summary.Traffic(
        loads,
        gained("xdp", "forwarded"),
        gained("userspace", "forwarded"),
        {
            "dropped by XDP": gained("xdp", "dropped"),
            "lost on their way out of XDP": gained("xdp", "redirect_failed"),
            "dropped by userspace": gained("userspace", "dropped"),
            "lost on their way to userspace": gained("userspace", "punt_lost"),
        },
        f"engine {after['engine']}, {' and '.join(modes)} mode, on {len(after['interfaces'])} interfaces",
        {
            reason: count - before["reasons"].get(reason, 0)
            for reason, count in after["reasons"].items()
            if verdict_of(Reason[reason]) is Verdict.DROP and count > before["reasons"].get(reason, 0)
        },
    )


# What to do next.


def _shown(path: Path) -> str:
    """Return `path` as one would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _program() -> str:
    """Return how `turnout` was called."""
    return shlex.quote(sys.argv[0]) if Path(sys.argv[0]).name == "turnout" else "turnout"


def _asked_for(names: Names) -> str:
    """Return the option that leads to this demo again."""
    return "" if names.node == "demo" else f" --name {names.node.removeprefix('demo-')}"


def _next_steps(names: Names) -> list[str]:
    turnout = _program()
    steps = [
        (f"{turnout} demo{_asked_for(names)} --keep", "the same, and the world stays for a look around"),
        (f"{turnout} validate -f {_shown(MANIFEST)}", "what was served; write your own Services like it"),
        ("make perf", "measure against iptables and a bare XDP program"),
    ]
    width = max(len(command) for command, _ in steps)
    return [f"{command:<{width}}   {what}" for command, what in steps]


def _kept_steps(names: Names, services: dict[str, Port]) -> list[str]:
    turnout, world = _program(), names.worlds[0]
    vip = services["tcp"].service.vip
    steps = [
        (f"ip netns exec {world}-client curl http://{vip}/", "ask the Service; the answer names the endpoint"),
        (f"{turnout} get flows --name {names.node} --limit 10", "who talks to whom"),
        (f"{turnout} status --name {names.node}", "how the node is"),
        (f"{turnout} demo{_asked_for(names)} --remove", "remove it all"),
    ]
    width = max(len(command) for command, _ in steps)
    hosts = ", ".join(f"{world}-{host}" for host in ("node", "client", *ENDPOINTS))
    return [f"{command:<{width}}   {what}" for command, what in steps] + [f"namespaces: {hosts}"]
