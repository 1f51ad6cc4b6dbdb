"""Pictures of a run, told apart without colour: by marker, line and hatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perf.rows import Row

_STYLES: dict[str, tuple[Any, Any, str, str]] = {
    "bare-xdp": ("o", "-", "0.0", ""),
    "turnout-xdp": ("s", "--", "0.25", "///"),
    "iptables-nft": ("^", ":", "0.45", "..."),
    "iptables-legacy": ("<", "-.", "0.55", "xx"),
    "nftables": ("P", (0, (5, 1)), "0.4", "--"),
    "nftables-flowtable": ("X", (0, (3, 1, 1, 1)), "0.5", "++"),
    "bare-afxdp": ("D", "-", "0.6", "oo"),
    "turnout-afxdp": ("v", "-.", "0.3", "\\\\\\"),
    "turnout-raw": (">", ":", "0.3", "//"),
}
_PLAIN: tuple[Any, Any, str, str] = ("*", (0, (1, 2)), "0.35", "*")


def draw(folder: Path, made: Sequence[Row]) -> list[Path]:
    """Draw what there are rows for; return the pictures' files."""
    import matplotlib as mpl  # takes a second: not for --help

    mpl.use("Agg")
    kinds: list[tuple[str, Sequence[Row], Callable[[Any, Sequence[Row]], None]]] = [
        ("flows", [row for row in made if row.case == "established"], _flows),
        ("services", [row for row in made if row.case == "services" and row.variant == "to the last"], _services),
        ("mixed", [row for row in made if row.case == "mixed"], _mixed),
        ("first-packet", [row for row in made if row.case == "first-packet"], _first_packet),
        ("update", [row for row in made if row.case == "update"], _update),
        ("latency", [row for row in made if row.case == "latency"], _latency),
        ("rates", [row for row in made if row.case in _RATES], _rates),
    ]
    return [_picture(folder / f"{name}.png", rows, how) for name, rows, how in kinds if rows]


def _picture(path: Path, rows: Sequence[Row], how: Callable[[Any, Sequence[Row]], None]) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(12 if how is _rates else 8, 5))
    how(axes, rows)
    first = rows[0]
    trials = max(row.trials for row in rows)
    modes = " or ".join(dict.fromkeys(row.mode for row in rows))
    figure.text(
        0.01,
        0.01,
        f"UDP over veth, native XDP; {modes}; {first.receiver};\nmedians and quartiles of up to {trials}"
        f" interleaved trials; Linux {first.kernel}, {first.cpu}; turnout {first.commit}",
        fontsize=7,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _subjects(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.subject for row in rows))


def _style(subject: str) -> tuple[Any, Any, str, str]:
    return _STYLES.get(subject, _PLAIN)


def _line(axes: Any, label: str, rows: Sequence[Row], x: Sequence[Any], scale: float = 1.0, **more: Any) -> None:
    marker, line, grey, _ = _style(rows[0].subject)
    errors = [
        [(row.value - row.low) / scale for row in rows],
        [(row.high - row.value) / scale for row in rows],
    ]
    style = {"marker": marker, "linestyle": line, "color": grey, "capsize": 3, **more}
    axes.errorbar(x, [row.value / scale for row in rows], yerr=errors, label=label, **style)


def _against(axes: Any, rows: Sequence[Row], field: str, scale: float) -> None:
    """Draw a line for each subject against a field of its rows, on a logarithmic axis."""
    for subject in _subjects(rows):
        mine = sorted((row for row in rows if row.subject == subject), key=lambda row: int(getattr(row, field)))
        _line(axes, subject, mine, [getattr(row, field) for row in mine], scale)
    axes.set_xscale("log")
    axes.grid(visible=True, color="0.9")
    axes.legend()


def _flows(axes: Any, rows: Sequence[Row]) -> None:
    _against(axes, rows, "flows", 1e6)
    axes.set_ylim(bottom=0)
    axes.set(title="Known flows, 64-byte packets", xlabel="flows", ylabel="forwarded, million packets/s")


def _services(axes: Any, rows: Sequence[Row]) -> None:
    _against(axes, rows, "services", 1e6)
    axes.set_yscale("log")
    axes.set(
        title="Every packet begins a flow, to the last of the Services",
        xlabel="Services",
        ylabel="forwarded, million packets/s",
    )


def _mixed(axes: Any, rows: Sequence[Row]) -> None:
    shares = [float(row.variant.split()[0]) for row in rows]
    for subject in _subjects(rows):
        mine = [row for row in rows if row.subject == subject]
        _line(axes, subject, mine, [float(row.variant.split()[0]) for row in mine], 1e6)
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted(set(shares)))
    axes.grid(visible=True, color="0.9")
    axes.legend()
    axes.set(
        title="1,000 known flows and some new ones",
        xlabel="packets that begin a flow, %",
        ylabel="forwarded, million packets/s",
    )


def _first_packet(axes: Any, rows: Sequence[Row]) -> None:
    for subject in _subjects(rows):
        for share, fill in (("p50", "full"), ("p99", "none")):
            mine = [row for row in rows if row.subject == subject and row.variant.endswith(share)]
            mine.sort(key=lambda row: row.services)
            _line(axes, f"{subject}, {share}", mine, [row.services for row in mine], fillstyle=fill)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(visible=True, color="0.9")
    axes.legend(fontsize=7, ncols=2)
    axes.set(title="First packet of a flow, to the last of the Services", xlabel="Services", ylabel="under way, µs")


def _update(axes: Any, rows: Sequence[Row]) -> None:
    _against(axes, rows, "services", 1.0)
    axes.set_yscale("log")
    axes.set(
        title="One endpoint changes: from file or command to the first packet at the new one",
        xlabel="Services",
        ylabel="ms",
    )


def _latency(axes: Any, rows: Sequence[Row]) -> None:
    for subject in _subjects(rows):
        mine = [row for row in rows if row.subject == subject]
        _line(axes, subject, mine, [row.variant for row in mine])
    axes.set_yscale("log")
    axes.grid(visible=True, color="0.9")
    axes.legend()
    axes.set(
        title="Known flows, each subject at half of its own rate", xlabel="share of packets", ylabel="under way, µs"
    )


_RATES = ("replies", "sizes", "new-flows", "afxdp")


def _rates(axes: Any, rows: Sequence[Row]) -> None:
    labels = []
    for place, row in enumerate(rows):
        error = [[(row.value - row.low) / 1e6], [(row.high - row.value) / 1e6]]
        bar = {"color": "0.92", "edgecolor": "0.2", "hatch": _style(row.subject)[3]}
        axes.bar(place, row.value / 1e6, yerr=error, capsize=3, **bar)
        of = f"{row.flows:,} flows" if row.flows else ""
        labels.append(" ".join(filter(None, (row.case, row.variant, of))) + f"\n{row.subject}")
    axes.set_xticks(range(len(rows)), labels, rotation=60, ha="right", fontsize=6)
    axes.set(title="Other rates", ylabel="forwarded, million packets/s")
