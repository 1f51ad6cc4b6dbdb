"""Answers of a node for people: one screen of status, tables without frames. JSON stays as it came."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

_BAR = 20  # characters
_TOP_REASONS = 8
_TOP_PORTS = 4  # of Services

Row = Mapping[str, Any]


def printable(value: object) -> str:
    """Return `value` as text that no terminal takes for a command: control characters spelled out."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def as_json(data: Any) -> str:
    """Return `data` as JSON, in ASCII; a list with an item in each line, as a million flows are quickly written so."""
    if isinstance(data, list) and data:
        return "[\n" + ",\n".join(map(json.dumps, data)) + "\n]"
    return json.dumps(data, indent=2)


def duration(seconds: float) -> str:
    """Return a span of time in its two largest units: 3 d 4 h, 2 min 5 s, 12 s."""
    rest = int(seconds)
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, rest = divmod(rest, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def counted(count: int, word: str) -> str:
    """Return a number of things, named by `word`, which takes an s for more than one: 1 Service, 2,000 Services."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def bar(used: int, capacity: int) -> str:
    """Return `used` of `capacity` as a bar with its numbers."""
    share = used / capacity if capacity else 0.0
    filled = min(_BAR, round(share * _BAR))
    return f"[{'#' * filled}{'.' * (_BAR - filled)}] {used:,} of {capacity:,} ({share:.1%})"


# Status.

_NEXT = {"failed": "look at the log of `turnout run`", "degraded": "turnout get interfaces; turnout get reasons"}


def status_lines(name: str, status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, text) for each line of the status; the first is the verdict."""
    state = str(status["state"])
    served = f"{counted(status['services'], 'Service')}, {counted(status['endpoints'], 'endpoint')}"
    lines = [(state.upper(), f"node {name}: {served}, up {duration(status['uptime_s'])}")]
    lines += [("  why", printable(reason)) for reason in status["why"]]
    if state in _NEXT:
        lines.append(("  next", _next_step(status)))
    lines.append(("engine", printable(status["engine"])))
    lines.append(("seed", printable(status["seed"])))
    for label, interface in zip(_first_only("interfaces"), status["interfaces"], strict=False):
        lines.append((label, _interface_line(interface)))
    lines.append(("flows", bar(status["flows"]["used"], status["flows"]["capacity"])))
    revision = status["revision"]
    behind = "" if revision["programmed"] == revision["desired"] else f"; the files are at {revision['desired']:,}"
    lines.append(("revision", f"{revision['programmed']:,} programmed{behind}"))
    for label, (path, counts) in zip(_first_only("packets"), status["packets"].items(), strict=False):
        lines.append((label, f"{path}: " + ", ".join(f"{word(kind)} {count:,}" for kind, count in counts.items())))
    if any(status["taken_out"].values()):
        lines.append(("taken out", _taken_out(status["taken_out"])))
    if (without := status["without_endpoint"])["count"]:
        lines.append(("refusing", _without_endpoint(without)))
    if status["sockets"]:
        counts = [f"{kind} {count:,}" for kind, count in status["sockets"].items() if kind != "reasons"]
        lines.append(("sockets", ", ".join(counts)))
    for label, text in zip(_first_only("reasons"), _top_reasons(status["reasons"]), strict=False):
        lines.append((label, text))
    return lines


def _first_only(label: str) -> Iterable[str]:
    yield label
    while True:
        yield ""


def word(name: str) -> str:
    """Return a field's name as a word: punt_lost -> punt-lost."""
    return name.replace("_", "-")


def _next_step(status: Mapping[str, Any]) -> str:
    """Return the command that helps with the first complaint."""
    revision = status["revision"]
    if revision["programmed"] != revision["desired"]:
        return "turnout validate -f PATH, with the paths given to `turnout run`"
    return _NEXT[str(status["state"])]


def _taken_out(counts: Row) -> str:
    left_s, ended = counts["next_deadline_s"], counts["ended"]
    within = "" if left_s is None else f" (next deadline in {duration(left_s)})"
    lost = f"; {counted(ended, 'connection')} ended by that" if ended else ""
    return f"{counts['drain']:,} drained{within}, {counts['maint']:,} in maintenance{lost}"


def _without_endpoint(without: Row) -> str:
    more = "" if without["count"] <= _TOP_PORTS else f" and {without['count'] - _TOP_PORTS:,} more"
    return printable(", ".join(without["ports"][:_TOP_PORTS])) + f"{more}: no endpoint for new clients"


def _interface_line(interface: Row) -> str:
    why = f": {printable(interface['why'])}" if interface["why"] else ""
    is_raw = interface["engine"] == "raw" and not interface["why"].startswith("not attached")
    without = "raw" if is_raw else "not attached"
    name, mode = printable(interface["name"]), printable(interface["xdp_mode"] or without)
    return f"{name} {mode}, {counted(interface['rx_packets'], 'packet')} received{why}"


def _top_reasons(reasons: Mapping[str, int]) -> list[str]:
    ranked = sorted(reasons.items(), key=lambda item: -item[1])
    lines = [f"{printable(name)} {count:,}" for name, count in ranked[:_TOP_REASONS]]
    if len(ranked) > _TOP_REASONS:
        lines.append(f"and {len(ranked) - _TOP_REASONS} more: turnout get reasons")
    return lines


_COLOURS = {"OK": "bold green", "DEGRADED": "bold yellow", "FAILED": "bold red"}


def show_status(name: str, status: Mapping[str, Any], stream: IO[str] | None = None) -> None:
    """Print the status to `stream` (stdout)."""
    from rich.text import Text

    console = _console(stream)
    lines = status_lines(name, status)
    label, text = lines[0]
    console.print(Text.assemble((label, _COLOURS.get(label, "bold")), f"  {text}"), soft_wrap=True)
    width = max(len(label) for label, _ in lines[1:])
    for label, text in lines[1:]:
        console.print(Text(f"{label:<{width}}  {text}".rstrip()), soft_wrap=True)


# Tables.


def show_table(kind: str, data: Any, stream: IO[str] | None = None) -> None:
    """Print what `get` answers as a table with a line of headings, each row a line, however narrow the terminal is."""
    from rich.text import Text

    rows = [_COLUMNS[kind](row) for row in _rows(data)] if kind in _COLUMNS else [_plain(row) for row in _rows(data)]
    if not rows:
        return
    columns = [_column(heading, rows) for heading in dict.fromkeys(name for row in rows for name in row)]
    head, *lines = ("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))
    stream = stream or sys.stdout
    _console(stream).print(Text(head, "bold"), soft_wrap=True)
    stream.writelines(f"{line}\n" for line in lines)


def _column(heading: str, rows: Sequence[Row]) -> list[str]:
    """Return a column's cells, the heading first, all of a width: numbers to the right, all else to the left."""
    from rich.cells import cell_len

    is_number = all(isinstance(row.get(heading), int | float) for row in rows)
    cells = [heading.upper(), *(_cell(row.get(heading, "")) for row in rows)]
    widths = [cell_len(cell) for cell in cells]
    padding = [" " * (max(widths) - width) for width in widths]
    return [f"{pad}{cell}" if is_number else f"{cell}{pad}" for cell, pad in zip(cells, padding, strict=True)]


def _console(stream: IO[str] | None) -> Any:
    from rich.console import Console

    return Console(file=stream or sys.stdout, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def countdown(what: str) -> Iterator[Callable[[int], None]]:
    """Show on stderr, if that is a terminal, how few are left of what; yield the function that is told how many."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn(f"{what} {{task.fields[left]:,}} left"), BarColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None, left=0)

        def tell(left: int) -> None:
            total = max(left, int(progress.tasks[0].total or 0))
            progress.update(task, total=total, completed=total - left, left=left)

        yield tell


def _rows(data: Any) -> list[Row]:
    if isinstance(data, dict):
        return [{"reason": name, "packets": count} for name, count in data.items()]
    return list(data)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(value)


def _plain(row: Row) -> dict[str, Any]:
    """Return a row whose cells are its fields."""
    return {word(name): _flat(value) for name, value in row.items()}


def _flat(value: Any) -> Any:
    if isinstance(value, Mapping):
        return "/".join(printable(item) for item in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(printable(item) for item in value)
    return value


def _service(row: Row) -> dict[str, Any]:
    endpoints = row["endpoints"]
    ready = sum(endpoint["state"] == "ready" for endpoint in endpoints)
    return {
        "service": f"{row['namespace']}/{row['name']}:{row['port']}",
        "protocol": row["protocol"],
        "frontends": ",".join(row["frontends"]) or "-",
        "ready": f"{ready}/{len(endpoints)}",
        "flows": sum(endpoint["flows"] for endpoint in endpoints),
    }


def _flow(row: Row) -> dict[str, Any]:
    return {
        "protocol": row["protocol"],
        "client": row["client"],
        "frontend": row["frontend"],
        "endpoint": row["endpoint"],
        "service": row["service"],
        "state": row["state"],
        "packets": f"{row['packets']['original']}/{row['packets']['reply']}",
        "idle": f"{row['idle_s']:.1f} s",
    }


def _wide_flow(row: Row) -> dict[str, Any]:
    return {
        **_flow(row),
        "snat": row["snat"],
        "offloaded": row["offloaded"],
        "bytes": f"{row['bytes']['original']}/{row['bytes']['reply']}",
        "expires": f"{row['expires_s']:.0f} s",
    }


def _administered(row: Row) -> dict[str, Any]:
    left_s = row["deadline_s"]
    deadline = None if left_s is None else f"in {duration(left_s)}"
    return {"address": row["address"], "state": row["state"], "deadline": deadline, "open": row["open"]}


_COLUMNS: Mapping[str, Callable[[Row], dict[str, Any]]] = {
    "services": _service,
    "flows": _flow,
    "flows-wide": _wide_flow,
    "administered": _administered,
}
