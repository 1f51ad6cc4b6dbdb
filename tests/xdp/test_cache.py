"""XDP programs that were compiled before: loaded over any tables, and never instead of what the sources say now."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from xdp import cache, kernel, loader, maps, removing
from xdp.cache import Program
from xdp.schema import Reason
from xdp.tables import Capacity

SMALL = Capacity(connections=100, frontends=16, services=8, maglev_slots=8, endpoints=8, next_hops=8, cpus=2)
COUNT = Path(__file__).with_name("count.c")
NOT_OURS = {"VERDICT_REASON": "REASON_NOT_OURS"}
FRAME = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(46)
PASS = 2


@pytest.fixture(autouse=True)
def folder_of_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "turnout" / "programs"


@pytest.fixture
def tables() -> Iterator[list[maps.SharedMaps]]:
    """Two sets of tables, alike."""
    folders = [Path(f"/run/turnout/bpf/test-cache-{number}-{os.getpid()}") for number in range(2)]
    made = [maps.create(folder, SMALL) for folder in folders]
    yield made
    for shared, folder in zip(made, folders, strict=True):
        shared.close()
        removing.maps(folder)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls the compiler fails."""

    def run(*_: object, **__: object) -> None:
        raise AssertionError("the compiler was called")

    monkeypatch.setattr(loader.subprocess, "run", run)


def counted(shared: maps.SharedMaps) -> int:
    return int(shared.tables.xdp_counters[:]["packets"][:, Reason.NOT_OURS].sum())


def only_file(folder: Path) -> Path:
    (found,) = folder.glob("*.json")
    return found


@pytest.mark.root
@pytest.mark.bpf
def test_what_was_compiled_is_loaded_over_other_tables(tables, folder_of_programs, request):
    first = loader.load(tables[0].folder, COUNT, "count", NOT_OURS)
    assert only_file(folder_of_programs).suffix == ".json"
    request.getfixturevalue("no_compiler")
    second = loader.load(tables[1].folder, COUNT, "count", NOT_OURS)
    for program, runs in ((first, 3), (second, 5)):
        assert kernel.prog_test_run(program, FRAME, repeat=runs)[0] == PASS
    assert [counted(shared) for shared in tables] == [3, 5]
    assert kernel.prog_info(first).tag == kernel.prog_info(second).tag
    with pytest.raises(AssertionError, match="the compiler was called"):
        loader.load(tables[1].folder, COUNT, "count", {"VERDICT_REASON": "REASON_NOT_IPV4"})


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.parametrize("change", ["rubbish", "refused", "map missing"])
def test_what_cannot_be_used_is_compiled_anew(tables, folder_of_programs, change):
    os.close(loader.load(tables[0].folder, COUNT, "count", NOT_OURS))
    place = only_file(folder_of_programs)
    good = json.loads(place.read_text())
    bad = {
        "rubbish": "no JSON",
        "refused": json.dumps({**good, "instructions": "00" * 8 + good["instructions"][16:]}),
        "map missing": json.dumps({**good, "maps": dict.fromkeys(good["maps"], "nowhere")}),
    }[change]
    place.write_text(bad)
    program = loader.load(tables[0].folder, COUNT, "count", NOT_OURS)
    assert kernel.prog_test_run(program, FRAME)[0] == PASS
    assert json.loads(only_file(folder_of_programs).read_text()) == good


@pytest.mark.root
@pytest.mark.bpf
def test_without_a_place_to_keep_programs_they_are_compiled_every_time(tables, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    for _ in range(2):
        os.close(loader.load(tables[0].folder, COUNT, "count", NOT_OURS))


def test_another_text_header_or_option_is_another_program(tmp_path):
    headers = tmp_path / "headers"
    headers.mkdir()
    header = headers / "a.h"
    header.write_text("1")

    def place(text: bytes = b"text", *options: str) -> Path:
        return cache.place_of(text, [headers], options)

    before = place()
    assert place() == before
    assert place(b"other") != before
    assert place(b"text", "-DX=1") != before
    header.write_text("2")
    assert place() != before


def test_those_not_used_for_longest_are_dropped(folder_of_programs, monkeypatch):
    monkeypatch.setattr(cache, "_KEEP", 2)
    places = [folder_of_programs / f"{number}.json" for number in range(3)]
    for age, place in enumerate(places[:2]):
        cache.keep(Program(bytes(8), {0: "flows"}), place)
        os.utime(place, (age, age))
    assert cache.read(places[0]) == Program(bytes(8), {0: "flows"})  # used: now the second is the oldest
    cache.keep(Program(bytes(16), {}), places[2])
    assert sorted(folder_of_programs.iterdir()) == [places[0], places[2]]
