"""What is made machine code, where it is kept, and that it is called as Python would."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from perf.world import wait_until
from xdp import kept
from xdp.jit import compiled, inlined
from xdp.schema import Reason


def has_machine_code(function: Any) -> bool:
    """Tell whether a compiled function has been made machine code for Python to call."""
    return bool(function.entries)


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


@compiled
def given_back(one, another):
    return another, one


@pytest.mark.parametrize(
    "value",
    [0, -1, 2**63 - 1, 2**64 - 1, True, False, 0.1, -0.0, math.inf, Reason.NO_ENDPOINT,
     np.uint8(255), np.int16(-3), np.uint32(2**32 - 1), np.int64(-(2**63)), np.uint64(2**64 - 1), np.bool_(1),
     np.float32(0.5)],
)  # fmt: skip
def test_numbers_come_back_as_they_were_given(value: Any) -> None:
    back = given_back(value, 7)
    assert back == (7, value)
    assert type(back[1]) is type(
        value.item() if isinstance(value, np.generic) else int(value) if isinstance(value, Reason) else value
    )


@compiled
def reason_of(number):
    if number < 0:
        return Reason.TOO_SHORT
    return Reason.NO_ENDPOINT


@compiled
def doubled_in(array):
    for index in range(len(array)):
        array[index] *= 2


def test_members_of_an_enum_come_back_as_members() -> None:
    assert reason_of(-1) is Reason.TOO_SHORT
    assert reason_of(1) is Reason.NO_ENDPOINT


def test_an_array_is_the_caller_s_however_it_lies_in_memory() -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert doubled_in(array[1]) is None
    doubled_in(array[:, 0])
    doubled_in(array[0, ::-1])
    assert array.tolist() == [[0, 2, 4, 6], [16, 10, 12, 14], [16, 9, 10, 11]]


@compiled
def first_of(row):
    row.first += 1
    return row.second


def test_a_row_is_the_caller_s_too() -> None:
    rows = np.zeros(2, [("first", np.uint32), ("second", np.uint64)])
    rows["second"] = 5, 6
    assert first_of(rows[1]) == 6
    assert rows["first"].tolist() == [0, 1]


def test_arguments_that_are_missing_are_told() -> None:
    with pytest.raises(TypeError, match="1 arguments are missing"):
        given_back(1)


_PROGRAM = """
import sys
import numpy as np
from xdp import hash
print(hash.hash_tuple(np.uint64(1), np.uint32(2), np.uint8(6), np.uint64(3), np.uint64(4)))
print("made" if "numba" in sys.modules else "found")
"""


def test_what_is_cached_is_not_compiled_again(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    program = [sys.executable, "-c", _PROGRAM]
    first, second = (
        subprocess.run(program, check=True, capture_output=True, text=True, env=environment).stdout.split()
        for _ in range(2)
    )
    assert first[0] == second[0]
    assert (first[1], second[1]) == ("made", "found")


def test_what_was_kept_and_is_damaged_is_made_again(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    program = [sys.executable, "-c", _PROGRAM]
    subprocess.run(program, check=True, capture_output=True, env=environment)
    (place,) = tmp_path.rglob("*.code")
    whole = place.read_bytes()
    for damaged in (b"", b"{}\n", whole[: len(whole) // 2]):
        place.write_bytes(damaged)
        again = subprocess.run(program, check=True, capture_output=True, text=True, env=environment)
        assert again.stdout.split()[1] == "made"
        assert place.read_bytes() == whole


def test_what_was_lowered_for_one_root_is_found_by_another(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    program = [sys.executable, "-c", _PROGRAM]

    def run() -> list[str]:
        done = subprocess.run(program, check=True, capture_output=True, text=True, env=environment)
        return done.stdout.split()

    first = run()
    (code,), (lowered,) = tmp_path.rglob("*.code"), tmp_path.rglob("*.lowered")
    made_at = lowered.stat().st_mtime_ns
    code.unlink()
    assert run() == first
    assert lowered.stat().st_mtime_ns == made_at
    code.unlink()
    lowered.write_bytes(lowered.read_bytes()[:-1])
    assert run() == first
    assert lowered.stat().st_mtime_ns > made_at, "damaged, and made again"


def wants(pid: int, lock: Path) -> bool:
    """Tell whether a process has got to a lock: it has its file open."""
    with contextlib.suppress(FileNotFoundError):  # one that has just been closed
        return any(fd.readlink() == lock for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


def test_what_another_process_is_compiling_is_waited_for(tmp_path: Path) -> None:
    environment, program = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, [sys.executable, "-c", _PROGRAM]
    subprocess.run(program, check=True, capture_output=True, env=environment)
    (code,) = tmp_path.rglob("*.code")
    lock, made = code.with_suffix(".lock"), code.read_bytes()
    code.unlink()
    with kept.alone(lock):
        second = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True)
        assert wait_until(lambda: wants(second.pid, lock), 30)
        code.write_bytes(made)
    assert second.communicate()[0].split()[1] == "found"


def test_threads_that_come_first_at_once_have_one_engine_between_them():
    """The code of a second one goes when it does: those that call it crash."""
    script = """
import threading, time
import numpy as np
from conntrack import compiled
from xdp import calls

make, made = calls.binding.create_mcjit_compiler, []

def slowly(*arguments):
    made.append(arguments)
    time.sleep(0.2)
    return make(*arguments)

calls.binding.create_mcjit_compiler = slowly
tags, found = np.zeros(64, np.uint64), np.zeros(4, np.int64)
threads = [threading.Thread(target=compiled.claimed_slots, args=(tags, found)) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(made) == 1, made
"""
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True)
