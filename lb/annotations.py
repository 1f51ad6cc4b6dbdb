"""The annotations turnout.dev/... of a Service: the options that Kubernetes has no fields for.

turnout.dev/forwarding        nat, masquerade, dsr-l2, ipip or gue
turnout.dev/scheduler         maglev, random, round-robin or least-connections
turnout.dev/admit             who decides a new connection: userspace or xdp
turnout.dev/when-stalled      new connections while userspace stands still: admit, drop or pass
turnout.dev/mid-stream        packets of unknown connections: adopt, pass or reset
turnout.dev/endpoint-removed  connections to an endpoint that is gone: keep or reset
turnout.dev/weights           10.0.0.1=3, 10.0.0.2=0   (endpoint's address = share; 1 for the others, 0 for none)
turnout.dev/timeouts          established=2h13m20s, udp=120s, ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from lb.fields import Report, did_you_mean, one_of, read_address, shown
from lb.model import DEFAULT_OPTIONS, Options
from xdp.addresses import IPAddress

_PREFIX = "turnout.dev/"
_HEAVIEST = 65535
_LONGEST_S = 10 * 86400  # idle times are differences of jiffies, 31 bits
_TIMEOUTS = ("syn", "established", "closing", "time-wait", "udp", "udp-unreplied", "icmp")
_DURATION = re.compile(r"(?=.)(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s)?")
_CHOICES: Mapping[str, Callable[[Any], str]] = {
    "forwarding": one_of("nat", "masquerade", "dsr-l2", "ipip", "gue"),
    "scheduler": one_of("maglev", "random", "round-robin", "least-connections"),
    "admit": one_of("userspace", "xdp"),
    "when-stalled": one_of("admit", "drop", "pass"),
    "mid-stream": one_of("adopt", "pass", "reset"),
    "endpoint-removed": one_of("keep", "reset"),
}
_NAMES = (*_CHOICES, "weights", "timeouts")


def read_options(annotations: Mapping[str, Any], report: Report) -> Options:
    """Return the options that `annotations` ask for; report those that cannot be, by their place in metadata."""
    values: dict[str, Any] = {}
    for key, value in annotations.items():
        if not key.startswith(_PREFIX) or value.__class__ is not str:
            continue
        path = ("metadata", "annotations", key)
        name = key.removeprefix(_PREFIX)
        if name in _CHOICES:
            if problem := _CHOICES[name](value):
                report(path, problem)
            values[name.replace("-", "_")] = value
        elif name == "weights":
            values["weights"] = tuple(_weights(value, partial(report, path)))
        elif name == "timeouts":
            values["timeouts_s"] = tuple(_timeouts(value, partial(report, path)))
        else:
            report(path, "unknown annotation" + did_you_mean(name, _NAMES))
    return Options(**values) if values else DEFAULT_OPTIONS


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split(","):
        if part.strip():
            left, _, right = part.partition("=")
            yield left.strip(), right.strip()


def _weights(text: str, report: Callable[[str], None]) -> Iterator[tuple[IPAddress, int]]:
    seen: set[IPAddress] = set()
    for left, right in _pairs(text):
        address = read_address(left)
        if isinstance(address, str):
            report(f"{address}; write weights as 10.0.0.1=3, 10.0.0.2=1")
        elif not (right.isascii() and right.isdigit() and len(right) < 9 and int(right) <= _HEAVIEST):
            report(f"{shown(right)} is not a weight (0 to {_HEAVIEST})")
        elif address in seen:
            report(f"{address} has two weights")
        else:
            seen.add(address)
            yield address, int(right)


def _timeouts(text: str, report: Callable[[str], None]) -> Iterator[tuple[str, int]]:
    seen: set[str] = set()
    for name, written in _pairs(text):
        match = _DURATION.fullmatch(written)
        parts = match.groups() if match else ()
        seconds = sum(int(part or 0) * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
        if name not in _TIMEOUTS:
            report(f"{shown(name)} is not a timeout" + did_you_mean(name, _TIMEOUTS))
        elif name in seen:
            report(f"{name} is given twice")
        elif not 1 <= seconds <= _LONGEST_S:
            report(f"{shown(written)} is not a duration; write it as 90s, 5m or 2h13m20s, from 1s to 240h")
        else:
            seen.add(name)
            yield name, seconds
