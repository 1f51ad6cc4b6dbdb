"""The command line: `turnout`. Thin: it reads arguments, asks others, and says what came of it.

stdout is data, stderr is messages. Everything heavy is imported where it is used, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

from dataplane.arguments import Command, Group, Wait, common, common_with, flag, output
from dataplane.preflight import need_cgroup, need_interfaces, need_privileges
from dataplane.settings import DEFAULT_SNAT_PORTS, Settings, merge
from xdp.errors import ConfigError, Error, NotRunningError, TimedOutError

_EXIT_OF_STATE = {"ok": 0, "degraded": 5, "failed": 1}
# What the machine lacks, wherever it is noticed, is no bug of ours.
_SHORTAGES = {
    errno.EMFILE: "raise the limit (`ulimit -n`, or LimitNOFILE= of a systemd unit)",
    errno.ENFILE: "raise fs.file-max, or stop what has so many open",
    errno.ENOSPC: "free some space (`df -h`, `df -i`)",
    errno.EDQUOT: "free some space (`quota`)",
    errno.EROFS: "mount it writable",
    errno.ENOMEM: "free some memory, or give a smaller --capacity",
}
_INTERRUPTED = 130  # as a shell says it: 128 + SIGINT
_POLL_S = 0.1
_DRAIN_POLL_S = 0.5  # the node looks at every connection


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start threads for algebra, which first spin idly
    is_debug = "--debug" in arguments or os.environ.get("TURNOUT_DEBUG", "0") not in ("", "0")
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = turnout.main(arguments, "turnout", standalone_mode=False, obj=is_debug)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - a traceback shown to a user is a bug
        if is_debug and not isinstance(error, SystemExit | KeyboardInterrupt | click.ClickException):
            traceback.print_exception(error)
        code = _tell(error, is_debug)
    _leave(code if isinstance(code, int) else 0)


def _leave(code: int) -> NoReturn:
    """End the process. What stdout still holds is written, or dropped if nobody reads it."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
    sys.exit(code)


def _tell(error: BaseException, is_debug: bool) -> int:
    """Say on stderr what went wrong, in a line; return the exit code."""
    if isinstance(error, BaseExceptionGroup):
        return _tell(_worst(error), is_debug)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return 2
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "turnout"
        text = _lower_first(error.format_message()).rstrip(".")
        _say(f"{where}: {text}" if "id you mean" in text else f"{where}: {text}; see `{where} --help`")
        return 2
    if isinstance(error, click.exceptions.Abort | KeyboardInterrupt):
        return _INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, ConfigError):  # one line per problem, each with its place, as compilers do
        _say(str(error))
        return error.exit_code
    if isinstance(error, Error):
        _say(f"turnout: {error}")
        return error.exit_code
    if isinstance(error, MemoryError):
        _say("turnout: out of memory; give a smaller --capacity")
        return 1
    if isinstance(error, OSError) and error.errno in _SHORTAGES:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"turnout: {where}{_lower_first(error.strerror or str(error))}; {_SHORTAGES[error.errno]}")
        return 1
    hint = "" if is_debug else "; --debug shows where"
    _say(f"turnout: internal error: {type(error).__name__}: {error}{hint}; please report it")
    return 1


def _worst(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the exception of a group to tell of: ours if there is one."""
    flat = [_worst(error) if isinstance(error, BaseExceptionGroup) else error for error in group.exceptions]
    return next((error for error in flat if isinstance(error, Error)), flat[0])


def _say(text: str) -> None:
    from dataplane.output import printable

    with contextlib.suppress(OSError):
        click.echo("\n".join(map(printable, text.splitlines())), err=True)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


_CONFIG = click.option("--config", metavar="FILE", help="Take flags from this file, in YAML; flags given here win.")
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(
    cls=Group,
    context_settings=_SETTINGS,
    examples="""
    turnout demo
    turnout validate -f web.yaml
    turnout run -f web.yaml -i eth0
    turnout status
    turnout get flows --limit 20
    """,
    exit_codes={
        0: "ok",
        1: "failed",
        2: "wrong usage: arguments, an unknown interface",
        3: "not running",
        4: "an invalid manifest or configuration",
        5: "degraded (status)",
        6: "timed out",
        77: "the machine lacks a privilege or a feature",
    },
)
@click.version_option(package_name="turnout", message="turnout %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.  [env: TURNOUT_DEBUG]")
def turnout() -> None:
    """A Service load balancer for one node: a userspace dataplane with XDP offload.

    Services and their endpoints are Kubernetes manifests; nothing else of Kubernetes is needed.
    """


@turnout.command(
    cls=Command,
    examples="""
    turnout run -f web.yaml -i eth0
    turnout run -f manifests/ -i eth0 eth1 --metrics 127.0.0.1:17420
    kubectl get svc,endpointslices -A -o yaml | turnout run -f - -i eth0
    turnout run --config turnout.yaml
    """,
)
@flag("file", "-f", "--file")
@flag("interface", "-i", "--interface")
@flag("engine", default="auto")
@flag("xdp-mode", default="auto")
@_CONFIG
@flag("capacity", default="1000000")
@flag("announce", default="none")
@flag("ping", default="answer")
@flag("on-exit")
@flag("node-name")
@flag("zone")
@flag("allow-external-ips")
@flag("nodeport-addresses")
@flag("masquerade", default="auto")
@flag("cluster-cidr")
@flag("snat-ports", default=str(DEFAULT_SNAT_PORTS))
@flag("snat-addresses")
@flag("vlan")
@flag("socket-cgroup")
@flag("seed-file")
@flag("metrics")
@flag("log-format", default="text")
@common_with("Name this node, where several run.  [default: node; env: TURNOUT_NAME]")
def run(config: str | None, **flags: Any) -> None:
    """Serve, until SIGTERM or Ctrl-C.

    Files are watched: a change is applied whole or, if anything is wrong with it, not at all. SIGHUP reads them again.
    After SIGTERM the kernel goes on forwarding known connections, so that a restart cuts nothing; Ctrl-C removes all.
    """
    need_privileges("run")
    settings = _settings(config, flags)
    if not settings.files:
        raise click.UsageError("no manifests; give them with -f PATH", click.get_current_context())
    if not settings.interfaces:
        raise click.UsageError("no interfaces; give them with -i IFACE", click.get_current_context())
    need_interfaces(settings.interfaces)
    if settings.socket_cgroup is not None:
        need_cgroup(settings.socket_cgroup, settings.engine)
    if settings.metrics is not None:
        from dataplane import metrics

        metrics.check(settings.metrics)
    _operate(settings, is_debug=click.get_current_context().obj)


def _operate(settings: Settings, is_debug: bool) -> None:
    """Run the node to its end."""
    import asyncio

    from dataplane import logs

    logs.configure(settings.log_format, debug=is_debug)
    from dataplane.node import Node  # a fifth of a second

    def stop(*_: object) -> NoReturn:
        raise SystemExit(0)

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    # Until the node handles them: what is half started is taken back. asyncio would let a Ctrl-C wait for all of it.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    async def operate() -> None:
        await Node(settings).run()

    asyncio.run(operate())


def _settings(config: str | None, flags: dict[str, Any]) -> Settings:
    from_file: dict[str, Any] = {}
    if config is not None:
        from dataplane import config as files

        from_file = files.load(config)
    return merge(flags, from_file)


@turnout.command(
    cls=Command,
    examples="""
    turnout validate -f web.yaml
    turnout validate -f manifests/ more.yaml
    kubectl get svc,endpointslices -A -o yaml | turnout validate -f -
    """,
)
@flag("file", "-f", "--file")
@_CONFIG
@flag("allow-external-ips")
@common_with("Makes no difference here: files are checked alike for every node.")
def validate(config: str | None, **flags: Any) -> None:
    """Check manifests.

    Every problem is told with its line, and what is valid but not served is noted. Needs no root and no running node.
    """
    settings = _settings(config, flags)
    if not settings.files:
        raise click.UsageError("no manifests; give them with -f PATH", click.get_current_context())
    from dataplane.output import counted
    from lb import manifests, notes
    from lb.documents import undotted
    from lb.model import NodeView
    from lb.resolve import resolve

    once: manifests.Once = {}
    found = manifests.load(settings.files, once=once)
    where = ", ".join(settings.files)
    if not found.files and "-" not in settings.files:
        raise ConfigError(f"{where}: no manifest here; expected files that end in .yaml, .yml or .json")
    snapshot = resolve(
        found.services,
        found.slices,
        NodeView(settings.node_name, settings.zone),
        settings.allow_external_ips,
    )
    told = [(note.object, undotted(note.field), note.reason) for note in snapshot.not_honoured]
    for note in found.place([*told, *notes.notes(found.services, found.slices)], once):
        _say(f"note: {note}")
    if not found.services:
        _say(f"note: {where}: no Service found: there is nothing to serve")
    endpoints = sum(len(part.endpoints) for part in found.slices)
    counts = {"Service": len(found.services), "EndpointSlice": len(found.slices), "endpoint": endpoints}
    _say(f"valid: {', '.join(counted(count, word) for word, count in counts.items())}")


@turnout.command(
    cls=Command,
    examples="""
    turnout status
    turnout status --wait 30
    turnout status -o json | jq .flows
    """,
)
@output("text", "json")
@click.option("--wait", type=Wait(), metavar="SECONDS", help="Wait so long for the state to be ok.")
@common
def status(name: str | None, output: str, wait: float | None) -> int:
    """Show whether the node is well.

    Exit code 0 if it is, 5 if degraded, 1 if failed, 3 if it does not run.
    """
    from dataplane.output import as_json, show_status

    settings = _named(name)
    data = _ask(settings, "status") if wait is None else _wait_until_ok(settings, wait)
    _end_with_the_reader()
    if output == "json":
        click.echo(as_json(data))
    else:
        show_status(settings.name, data)
    return _EXIT_OF_STATE.get(data["state"], 1)


def _end_with_the_reader() -> None:
    """Let SIGPIPE end this process, as it ends other tools, when `| head` has seen enough."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _named(name: str | None) -> Settings:
    return merge({"name": name}, {})


def _ask(settings: Settings, command: str, options: dict[str, Any] | None = None, **timeout: float) -> Any:
    from dataplane.control import ask

    return ask(settings, command, options, **timeout)


def _wait_until_ok(settings: Settings, seconds: float) -> Any:
    """Return the status once it is ok. TimedOutError: it was not within `seconds`, and why."""
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            data = _ask(settings, "status", timeout_s=max(left, _POLL_S))
            if data["state"] == "ok":
                return data
            last = f"{data['state']}: {'; '.join(data['why'])}"
        except (NotRunningError, TimedOutError) as error:
            last = str(error)
        if time.monotonic() >= deadline:
            raise TimedOutError(f"node {settings.name!r} was not ok within {seconds:g} s; {last}")
        time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))


@turnout.group(
    cls=Group,
    examples="""
    turnout get services
    turnout get flows --service shop/web --limit 20
    turnout get reasons -o json
    """,
)
def get() -> None:
    """Show Services, flows and the rest."""


def _getter(kind: str, text: str) -> None:
    """Add `get KIND`, which takes no options of its own."""

    def show(name: str | None, output: str) -> None:
        _show(kind, name, output, {})

    examples = f"turnout get {kind}\nturnout get {kind} -o json"
    get.command(kind, cls=Command, help=text, examples=examples)(output("table", "json")(common(show)))


def _show(kind: str, name: str | None, output: str, options: dict[str, Any]) -> None:
    from dataplane.output import as_json, show_table

    data = _ask(_named(name), kind, options)
    _end_with_the_reader()
    if output == "json":
        click.echo(as_json(data))
    else:
        show_table(f"{kind}-wide" if output == "wide" else kind, data)
        if not data:
            _say(f"no {kind}")


_getter("services", "Service ports: frontends, ready endpoints, flows.")
_getter("endpoints", "Endpoints: state, weight, connections.")
_getter("nexthops", "Where packets go next.")
_getter("interfaces", "Interfaces, and how packets are taken there.")
_getter("reasons", "Packets by what became of them.")


@get.command(
    "flows",
    cls=Command,
    examples="""
    turnout get flows --limit 20
    turnout get flows --service shop/web:http --client 192.0.2.7
    turnout get flows --endpoint 10.244.1.5:8080 -o wide
    """,
)
@click.option("--service", metavar="NS/NAME[:PORT]", help="Only connections to this Service.")
@click.option("--endpoint", metavar="IP[:PORT]", help="Only connections that this endpoint serves.")
@click.option("--client", metavar="IP[:PORT]", help="Only connections of this client.")
@click.option("--limit", type=click.IntRange(min=1), metavar="COUNT", help="At most so many.")
@output("table", "wide", "json")
@common
def flows(name: str | None, output: str, **filters: Any) -> None:
    """Connections: who talks to whom, and how much."""
    _show("flows", name, output, {key: value for key, value in filters.items() if value is not None})


def _administrator(state: str, text: str, *more: Callable[[Any], Any]) -> None:
    """Add the command STATE, which is what an operator wants of endpoints from now on; `more` are its own options."""

    def administer(
        name: str | None,
        output: str,
        endpoints: tuple[str, ...],
        wait: float | None = None,
        deadline: int | None = None,
    ) -> None:
        from dataplane.output import as_json, show_table

        settings = _named(name)
        said = {"endpoints": list(endpoints), "state": state}
        data = _ask(settings, "administer", said if deadline is None else {**said, "deadline_s": deadline})
        for port in sorted({port for row in data for port in row["without_endpoint"]}):
            _say(f"warning: {port} has no endpoint left for new clients; they are refused")
        if wait is not None:
            data = _wait_until_idle(settings, [row["address"] for row in data], wait)
        _end_with_the_reader()
        if output == "json":
            click.echo(as_json(data))
        else:
            show_table("administered", data)

    examples = f"turnout {state} 10.244.1.5:8080\nturnout {state} 10.244.1.5 10.244.1.6"
    command = turnout.command(state, cls=Command, help=text, examples=examples)
    argument = click.argument("endpoints", nargs=-1, required=True, metavar="IP[:PORT]...")
    for decorate in (common, output("table", "json"), *more, argument, command):
        administer = decorate(administer)


def _wait_until_idle(settings: Settings, places: list[str], seconds: float) -> Any:
    """Return what is told of endpoints once no connection to them is open. TimedOutError: some are after `seconds`.

    Meanwhile an endpoint may go from the manifests: its connections go on.
    """
    from dataplane.output import countdown, counted

    deadline = time.monotonic() + seconds
    with countdown("connections") as tell:
        while True:
            data = _ask(settings, "administer", {"endpoints": places})
            left = sum(row["open"] for row in data)
            if not left:
                return data
            tell(left)
            if time.monotonic() >= deadline:
                are_open = f"{counted(left, 'connection')} still open"
                raise TimedOutError(f"{are_open} after {seconds:g} s; the endpoints stay drained")
            time.sleep(min(_DRAIN_POLL_S, max(0.0, deadline - time.monotonic())))


_administrator(
    "drain",
    "Give endpoints no new connections; those that they have go on. Kept over restarts, until `turnout ready`.",
    click.option("--wait", type=Wait(), metavar="SECONDS", help="Wait so long for the last connection to end."),
    click.option(
        "--deadline",
        type=int,
        metavar="SECONDS",
        help="End what is left after so long, as `turnout maint` does. Default: never.",
    ),
)
_administrator("maint", "Give endpoints no new connections, and end those that they have: TCP connections are reset.")
_administrator("ready", "Give endpoints new connections again.")


@turnout.command(
    cls=Command,
    examples="""
    turnout demo
    turnout demo --keep
    turnout demo --remove
    """,
)
@click.option("--keep", is_flag=True, help="Leave the world as it is afterwards, for a look around.")
@click.option("--remove", is_flag=True, help="Only remove the world that was kept.")
@common_with("Call node and world demo-NAME, not demo: for a second demo beside another.  [env: TURNOUT_NAME]")
def demo(name: str | None, keep: bool, remove: bool) -> int:
    """See it work, in network namespaces of its own.

    Real clients ask Services, through turnout and through iptables; half a minute, and nothing is left behind.
    """
    need_privileges("demo")
    if keep and remove:
        raise click.UsageError("--keep and --remove exclude each other", click.get_current_context())
    from perf import demo as show

    return show.main(name, keep=keep, remove=remove)


@turnout.command(
    cls=Command,
    examples="""
    turnout detach
    turnout detach -i eth0
    turnout detach --name edge
    """,
)
@flag("interface", "-i", "--interface", help_text="Only from these interfaces. Default: all.")
@common
def detach(name: str | None, interfaces: tuple[str, ...]) -> None:
    """Remove what a stopped node has left.

    That is its XDP programs, which go on forwarding known connections, and its tables.
    """
    from dataplane.detach import detach as remove

    need_privileges("detach")
    settings = _named(name)
    removed = remove(settings, interfaces)
    for line in removed:
        _say(f"removed {line}")
    if not removed:
        _say(f"node {settings.name!r} has left nothing behind")


if __name__ == "__main__":
    main()
