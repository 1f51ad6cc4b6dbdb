"""What many Services cost, stage by stage: `python -m perf.services [--services N..] [--form json|yaml|folder]`.

Manifests of N Services with three endpoints each are written, read, resolved and programmed into tables in plain
memory, then one Service after the other is changed. No root, no packets. Times are of this process on this machine
now: compare runs of the same minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, NamedTuple

from lb import maglev, manifests
from lb.live import Changes, Live
from lb.model import EndpointSlice, Service
from lb.rows import rows_of
from lb.table import ServiceTable
from xdp.tables import Capacity, Tables

_ENDPOINTS = 3
_VIPS, _PODS = int(IPv4Address("10.96.0.1")), int(IPv4Address("10.128.0.1"))
_FORMS = ("json", "yaml", "folder")


class Cost(NamedTuple):
    """Seconds of each stage, and what the process holds."""

    services: int
    stages: dict[str, float]
    rss_mb: float


def objects(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return Service `number` and its EndpointSlice, as `kubectl get` prints them."""
    name = f"service-{number}"
    address = str(IPv4Address(_VIPS + number))
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "load", "uid": f"{number:032x}", "labels": {"app": name}},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": address,
            "clusterIPs": [address],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
            "selector": {"app": name},
            "sessionAffinity": "None",
        },
    }
    endpoints = [
        {
            "addresses": [str(IPv4Address(_PODS + _ENDPOINTS * number + index))],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": f"node-{index}",
            "targetRef": {"kind": "Pod", "name": f"{name}-{index}", "namespace": "load"},
        }
        for index in range(_ENDPOINTS)
    ]
    part = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-x", "namespace": "load", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }
    return service, part


def write(folder: Path, services: int, form: str) -> str:
    """Write the manifests of so many Services below `folder`; return the path to give to `load`."""
    if form == "folder":
        for number in range(services):
            write_one(folder, number, objects(number))
        return str(folder)
    path = folder / f"services.{form}"
    with path.open("w") as out:
        if form == "json":
            items = [item for number in range(services) for item in objects(number)]
            json.dump({"apiVersion": "v1", "kind": "List", "items": items}, out)
        else:
            for number in range(services):
                out.writelines(_yaml(item) for item in objects(number))
    return str(path)


def write_one(folder: Path, number: int, written: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Write one Service's file, as careful writers do: aside, then renamed into place."""
    aside = folder / f".{number}"
    aside.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(written)}))
    aside.rename(folder / f"{number}.json")


def _yaml(value: dict[str, Any]) -> str:
    return "---\n" + "".join(_lines(value, 0))


def _lines(value: Any, depth: int) -> Iterator[str]:
    """Yield `value` as kubectl writes YAML: blocks, two spaces deeper for each mapping."""
    pad = "  " * depth
    for key, item in value.items():
        if isinstance(item, dict):
            yield f"{pad}{key}:\n"
            yield from _lines(item, depth + 1)
        elif isinstance(item, list):
            yield f"{pad}{key}:\n"
            for each in item:
                if isinstance(each, dict):
                    yield f"{pad}- {''.join(_lines(each, depth + 1)).lstrip()}"
                else:
                    yield f"{pad}- {json.dumps(each)}\n"
        else:
            yield f"{pad}{key}: {json.dumps(item)}\n"


def measure(services: int, form: str, changes: int = 1000) -> Cost:
    """Return what so many Services cost, and then so many changes of one."""
    stages: dict[str, float] = {}
    last = time.perf_counter()

    def took(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        stages[stage], last = now - last, time.perf_counter()

    _program(Live.of(*_few()))  # compile
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write(folder, services, form)
        reader = manifests.Reader([path])
        last = time.perf_counter()
        found = reader.load()
        took("read")
        live = Live.of(found.services, found.slices)
        took("resolve")
        table = _program(live)
        took("program")
        if form == "folder":
            for stage in ("first change of a file", "change of a file"):
                write_one(folder, services // 2, objects(services))
                last = time.perf_counter()
                _change(live, table, reader.reload({str(folder / f"{services // 2}.json")}))
                took(stage)
    seconds = sorted(_changes(live, table, found.slices, changes))
    stages["change p50"], stages["change p99"] = seconds[changes // 2], seconds[changes * 99 // 100]
    return Cost(services, stages, _rss_mb())


def _few() -> tuple[list[Service], list[EndpointSlice]]:
    with tempfile.TemporaryDirectory() as name:
        found = manifests.load([write(Path(name), 2, "json")])
    return list(found.services), list(found.slices)


def _program(live: Live) -> ServiceTable:
    """Return a table that has been given what is live, as at a start."""
    table = ServiceTable(Tables.in_memory(Capacity(connections=1000)), maglev.DEFAULT_SEED, lambda _: 1)
    table.apply(rows_of(live.snapshot()))
    return table


def _change(live: Live, table: ServiceTable, changes: Changes | None) -> None:
    assert changes is not None
    plan = live.plan(changes)
    table.update(plan.rows, plan.without)
    live.commit(plan)


def _changes(live: Live, table: ServiceTable, slices: Sequence[EndpointSlice], count: int) -> Iterator[float]:
    """Take an endpoint from one Service after the other, or give it back; yield the seconds until packets see it."""
    for number in range(count):
        part = slices[number // 2 * 7919 % len(slices)]
        changed = part if number % 2 else replace(part, endpoints=part.endpoints[:-1])
        began = time.perf_counter()
        _change(live, table, Changes({}, {(part.namespace, part.name): changed}))
        yield time.perf_counter() - began
        table.release(table.take_parted())


def _rss_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m perf.services", description="what many Services cost")
    parser.add_argument("--services", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--form", choices=_FORMS, default="json")
    given = parser.parse_args()
    for services in given.services:
        cost = measure(services, given.form)
        stages = "  ".join(f"{stage} {seconds:.5f}" for stage, seconds in cost.stages.items())
        print(f"{services:>7,} {given.form}: seconds {stages}; memory {cost.rss_mb:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
