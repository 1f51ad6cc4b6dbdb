"""How long a change of one Service takes in memory: `python -m perf.update [--services N..] [--changes N]`.

From the wanted Services as objects to the store that makes the change visible to packets. Files, the control loop and
wires are left out.
"""

from __future__ import annotations

import argparse
import time
from ipaddress import IPv4Address

import numpy as np

from lb import maglev
from lb.rows import ServiceRow
from lb.table import ServiceTable
from xdp.schema import Protocol
from xdp.tables import Capacity, Tables

_FIRST_VIP, _FIRST_ENDPOINT = IPv4Address("10.96.0.1"), IPv4Address("10.128.0.1")
_ENDPOINTS = 3


def measure(services: int, changes: int = 200) -> list[float]:
    """Return the milliseconds of each of `changes` changes of one endpoint among so many Services."""
    # A frontend takes two entries, with its VIP's; a change needs a second row until the first may be reused.
    tables = Tables.in_memory(
        Capacity(1000, 3 * services + 64, 2 * services + 64, 33_554_432, 4 * services + 4096, 64, 1)
    )
    table = ServiceTable(tables, maglev.DEFAULT_SEED, lambda _: 1)
    table.apply([_row(number) for number in range(services)])
    taken = []
    random = np.random.default_rng(1)
    for change in range(changes):
        number = int(random.integers(services))
        row = _row(number, IPv4Address("10.250.0.1") + change)
        began = time.perf_counter()
        done = table.update([row])
        taken.append((time.perf_counter() - began) * 1000)
        if done.rows_written != 1:
            raise AssertionError(f"{done.rows_written} rows were written for one change: this measures something else")
        table.release(table.take_parted())
    return taken


def _row(number: int, last: IPv4Address | None = None) -> ServiceRow:
    first = _FIRST_ENDPOINT + number * _ENDPOINTS
    addresses = [first + n for n in range(_ENDPOINTS - 1)] + [last or first + _ENDPOINTS - 1]
    frontend = (_FIRST_VIP + number, 80, int(Protocol.TCP))
    return ServiceRow((frontend,), tuple((address, 8080) for address in addresses))


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python -m perf.update", description="a change of one Service, in memory")
    parser.add_argument("--services", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--changes", type=int, default=200)
    arguments = parser.parse_args()
    print(f"{'Services':>9}  {'p50 ms':>8}  {'p99 ms':>8}")
    for services in arguments.services:
        p50, p99 = np.percentile(measure(services, arguments.changes), (50, 99))
        print(f"{services:>9,}  {p50:>8.3f}  {p99:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
