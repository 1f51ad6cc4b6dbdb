"""C declarations are parsed once, and are the same however they are had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import sys
from xdp.declared import declared
ffi = declared("struct pair { uint8_t one; uint32_t other; }; enum colour { RED = 3, GREEN }; int abs(int number);")
pair = ffi.new("struct pair *", {"other": 7})
print(ffi.sizeof(pair[0]), pair.other, ffi.typeof("enum colour").relements["GREEN"], ffi.dlopen(None).abs(-5))
print("parsed" if "pycparser" in sys.modules else "found")
"""


def run(base: Path) -> list[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(base)}
    command = [sys.executable, "-c", _PROGRAM]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()


def test_what_was_parsed_is_found(tmp_path: Path):
    assert run(tmp_path) == ["8 7 4 5", "parsed"]
    assert run(tmp_path) == ["8 7 4 5", "found"]


@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_what_is_damaged_is_parsed_again(tmp_path: Path, share: float):
    run(tmp_path)
    (place,) = tmp_path.rglob("*.py")
    whole = place.read_bytes()
    place.write_bytes(whole[: int(share * len(whole))])
    assert run(tmp_path) == ["8 7 4 5", "parsed"]
    assert place.read_bytes() == whole


def test_where_nothing_can_be_kept_it_is_parsed_every_time():
    assert [run(Path("/proc")) for _ in range(2)] == [["8 7 4 5", "parsed"]] * 2
