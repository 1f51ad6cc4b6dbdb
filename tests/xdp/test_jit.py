"""Where compiled code is cached, and what is made machine code."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest

from perf.world import wait_until
from xdp import cache
from xdp.jit import cache_folder, compiled, inlined


@pytest.mark.parametrize("first", ["xdp.jit", "xdp.atomic", "numba"])
def test_the_cache_belongs_to_these_sources_whatever_is_imported_first(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numba reads its configuration once, and would keep compiled code beside the sources, where it goes stale."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    program = f"import {first}, xdp.jit, numba; print(numba.config.CACHE_DIR)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(cache_folder())


def has_machine_code(function: Any) -> bool:
    """Tell whether a compiled function has been made machine code for Python to call."""
    return bool(function.overloads)


@pytest.fixture
def three() -> tuple[Any, Any, Any]:
    """Return a function that calls one that is inlined and one that is not, and these."""

    @inlined
    def doubled(number):
        return 2 * number

    @compiled
    def lowered(number, by=1):
        return number - by

    @compiled
    def both(number):
        return lowered(doubled(number)) + lowered(number, 10)

    return both, doubled, lowered


def test_only_what_python_calls_is_made_machine_code(three: tuple[Any, Any, Any]) -> None:
    both, doubled, lowered = three
    assert both(21) == 41 + 11
    assert [has_machine_code(each) for each in three] == [True, False, False]
    assert (doubled(4), lowered(4), lowered(4, 3)) == (8, 3, 1)
    assert [has_machine_code(each) for each in three] == [True, True, True]


def test_what_python_has_called_can_be_called_by_compiled_code(three: tuple[Any, Any, Any]) -> None:
    both, doubled, lowered = three
    assert (doubled(4), lowered(4)) == (8, 3)
    assert both(21) == 52
    assert both(0.5) == 0.0 - 9.5, "other types are another version of each"


def test_other_jitted_code_may_call_ours_and_be_called(three: tuple[Any, Any, Any]) -> None:
    both, _, _ = three

    @numba.njit
    def tripled(number):
        return 3 * number

    @numba.njit
    def caller(number):
        return tripled(both(number))

    assert caller(21) == 3 * 52
    assert tripled(5) == 15, "linked before it was called"


_PROGRAM = """
from xdp import hash
import numpy as np
print(hash.hash_tuple(np.uint64(1), np.uint32(2), np.uint8(6), np.uint64(3), np.uint64(4)))
print(sum(hash.hash_tuple.stats.cache_hits.values()))
"""


def test_what_is_cached_is_not_compiled_again(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-c", _PROGRAM]
    first, second = (
        subprocess.run(program, check=True, capture_output=True, text=True, env=environment).stdout.split()
        for _ in range(2)
    )
    assert first[0] == second[0]
    assert (first[1], second[1]) == ("0", "1")


def wants(pid: int, lock: Path) -> bool:
    """Tell whether a process has got to a lock: it has its file open."""
    with contextlib.suppress(FileNotFoundError):  # one that has just been closed
        return any(fd.readlink() == lock for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


def test_what_another_process_is_compiling_is_waited_for(tmp_path: Path) -> None:
    environment, program = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}, [sys.executable, "-c", _PROGRAM]
    subprocess.run(program, check=True, capture_output=True, env=environment)
    made = {path: path.read_bytes() for path in tmp_path.rglob("*.nb?")}
    for path in made:
        path.unlink()
    (lock,) = tmp_path.rglob("hash_tuple.lock")
    with cache.alone(lock):
        second = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True)
        assert wait_until(lambda: wants(second.pid, lock), 30)
        for path, content in made.items():
            path.write_bytes(content)
    assert second.communicate()[0].split()[1] == "1", "found, not made again"
