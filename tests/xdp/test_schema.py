"""One layout for C, for compiled code and for whoever reads the pinned maps."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from tests import native
from xdp import loader, maps, mounts, removing, schema
from xdp.schema import Direction, Event, Limit, Reason, State, Verdict, verdict_of
from xdp.tables import Capacity

STRUCTS = native.structs()


@pytest.mark.parametrize("name", STRUCTS)
def test_padding_is_spelled_out(name: str):
    kind = STRUCTS[name]
    at = 0
    for _, (field, offset, *_) in sorted((kind.fields or {}).items(), key=lambda item: item[1][1]):
        assert offset == at
        at += field.itemsize
    assert at == kind.itemsize


def test_gcc_lays_the_structs_out_as_python_believes():
    native.build()  # holds a static assertion for every size and offset
    assert native.layout_asserts().count("_Static_assert") > len(STRUCTS)


@pytest.mark.root
@pytest.mark.bpf
def test_the_bpf_compiler_lays_the_structs_out_as_python_believes(tmp_path: Path):
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include "schema.h"\n{native.layout_asserts()}int layout(struct xdp_md *ctx) {{ return !ctx; }}\n'
    )
    folder = Path(f"/run/turnout/bpf/test-schema-{os.getpid()}")
    small = Capacity(connections=10, frontends=4, services=2, maglev_slots=16, endpoints=2, next_hops=2)
    mounts.mount_bpffs(folder.parent)
    try:
        with maps.create(folder, small):
            os.close(loader.load(folder, source, "layout"))
    finally:
        removing.maps(folder)


@pytest.mark.parametrize("name", sorted(STRUCTS.keys() - {"layout", "machine", "control", "counters", "prefix", "vip"}))
def test_no_row_of_a_large_table_straddles_a_cache_line(name: str):
    size = STRUCTS[name].itemsize
    assert 64 % size == 0, f"{name}: {size} bytes"


def test_the_keys_of_sockets_that_were_led_alike_differ_in_how_they_begin():
    assert schema.LED.fields is not None
    assert schema.LED.fields["cookie"][1] == 0


def test_counters_of_two_cpus_share_no_cache_line():
    assert schema.COUNTERS.itemsize % 64 == 0


def test_a_frontend_s_key_is_its_first_word():
    assert [schema.FRONTEND.fields[field][1] for field in ("addr", "port", "protocol", "used")] == [0, 4, 6, 7]
    assert schema.FRONTEND.itemsize * Limit.FRONTEND_WAYS == 64


def test_a_reason_s_number_gives_its_verdict():
    blocks = {Verdict.FORWARD: 0, Verdict.PASS: 32, Verdict.DROP: 64, Verdict.PUNT: 96}
    for reason in Reason:
        assert blocks[verdict_of(reason)] <= reason < blocks[verdict_of(reason)] + 32
    assert max(Reason) < Limit.MAX_REASONS


def test_the_machine_has_a_place_for_every_state_direction_and_event():
    machine = schema.MACHINE
    places = {state << 4 | way << 3 | event for state, way, event in itertools.product(State, range(2), range(8))}
    assert max(Event) <= 8
    assert Direction.DIRECTIONS == 2
    assert State.STATES <= 16
    assert max(place for place in places if place >> 4 < State.STATES) < machine["next_state"].shape[0]
