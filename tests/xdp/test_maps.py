"""The pinned tables: the same bytes for whoever opens them, and a plain refusal for whoever expects others."""

from __future__ import annotations

import json
import struct
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from tests.programs import returning
from xdp import kernel, maps, removing, schema
from xdp.errors import LayoutError, NotRunningError
from xdp.schema import Limit
from xdp.tables import Capacity, Tables

SMALL = Capacity(connections=100, frontends=16, services=8, maglev_slots=100, endpoints=8, next_hops=8, cpus=2)
needs_bpf = [pytest.mark.root, pytest.mark.bpf]


def test_the_layout_is_plain_data_that_fits_its_map():
    described = maps.describe(Capacity())
    assert described["capacity"] == Capacity().describe()
    assert described["structs"]["flow"]["state"] == ["uint8", schema.FLOW.fields["state"][1]]
    assert len(json.dumps(described)) < schema.LAYOUT.itemsize


def test_every_table_has_a_map_and_the_layout_comes_last():
    kinds = maps.kinds(SMALL)
    assert set(kinds) == {*SMALL.rows(), "routes", "sockets", "queues", "stages", "led_sockets", "layout"}
    assert list(kinds)[-1] == removing.LAYOUT_NAME
    assert kinds["led_sockets"] == maps.MapKind(kernel.LRU_HASH, 32, 24, Limit.LED_SOCKETS)
    assert kinds["flows"] == maps.MapKind(kernel.ARRAY, 4, 64, SMALL.buckets * 16, kernel.MMAPABLE)


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        pytest.param({"a": {"b": 1}}, {"a": {"b": 1}}, [], id="same"),
        pytest.param({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b: 1, now 2"], id="changed"),
        pytest.param({"a": {"b": 1}}, {"a": {}}, ["a.b: 1, now absent"], id="gone"),
        pytest.param({}, {"a": {"b": 1}}, ["a: absent, now ['b']"], id="new"),
    ],
)
def test_differences_are_named_by_place(old, new, lines):
    assert maps.differences(old, new) == lines


class TestPinned:
    pytestmark = needs_bpf

    def test_new_tables_are_all_zero_and_shaped_like_those_in_memory(self, folder: Path):
        with maps.create(folder, SMALL) as shared:
            assert shared.is_new
            in_memory = Tables.in_memory(SMALL)
            for field in fields(Tables):
                table, plain = getattr(shared.tables, field.name), getattr(in_memory, field.name)
                assert (table.shape, table.dtype.names) == (plain.shape, plain.dtype.names)
                assert table.flags.c_contiguous == plain.flags.c_contiguous
                assert table.flags.writeable
                assert not any(table.tobytes())

    def test_what_one_writes_another_reads(self, folder: Path):
        with maps.create(folder, SMALL) as writer, maps.open_tables(folder) as reader:
            assert reader.capacity == SMALL
            assert not reader.is_new
            last = len(writer.tables.maglev) - 1
            writer.tables.maglev[last] = 7
            writer.tables.flows[5]["packets"] = 11
            writer.tables.tags[3] = 13
            assert reader.tables.maglev[last] == 7
            assert reader.tables.flows[5]["packets"] == 11
            assert reader.tables.tags[3] == 13

    def test_the_kernel_reads_the_same_bytes(self, folder: Path):
        with maps.create(folder, SMALL) as shared:
            shared.tables.maglev[99] = 7
            shared.tables.next_hops[3]["mtu"] = 1500
            seen = kernel.map_lookup(
                shared.descriptors["maglev"], struct.pack("=I", 99 // 16), schema.MAGLEV_LINE.itemsize
            )
            assert np.frombuffer(seen or b"", schema.MAGLEV_LINE)["endpoint"][0][99 % 16] == 7
            seen = kernel.map_lookup(shared.descriptors["next_hops"], struct.pack("=I", 3), schema.NEXT_HOP.itemsize)
            assert np.frombuffer(seen or b"", schema.NEXT_HOP)["mtu"] == [1500]

    def test_queues_hold_a_worker_by_interface_and_queue(self, folder: Path):
        with maps.create(folder, SMALL) as shared:
            key = struct.pack("=II", 2, 0)
            kernel.map_update(shared.queues_fd, key, struct.pack("=I", 5))
            assert kernel.map_lookup(shared.queues_fd, key, 4) == struct.pack("=I", 5)
            assert kernel.map_info(shared.sockets_fd).type == kernel.XSKMAP

    def test_arrays_outlive_the_descriptors(self, folder: Path):
        with maps.create(folder, SMALL) as shared:
            flows = shared.tables.flows
        del shared
        flows[1]["bytes"] = 3
        with maps.open_tables(folder) as again:
            assert again.tables.flows[1]["bytes"] == 3

    def test_an_observer_cannot_write(self, folder: Path):
        maps.create(folder, SMALL).close()
        with maps.open_tables(folder, read_only=True) as shared, pytest.raises(ValueError, match="read-only"):
            shared.tables.flows[0]["packets"] = 1

    def test_a_successor_takes_over_what_is_there(self, folder: Path):
        with maps.open_or_create(folder, SMALL) as first:
            assert first.is_new
            first.tables.control[0]["hertz"] = 250
        with maps.open_or_create(folder, SMALL) as second:
            assert not second.is_new
            assert second.tables.control[0]["hertz"] == 250

    def test_tables_are_not_made_twice(self, folder: Path):
        maps.create(folder, SMALL).close()
        with pytest.raises(LayoutError, match="there are tables already"):
            maps.create(folder, SMALL)

    def test_an_interrupted_creation_is_made_anew(self, folder: Path):
        with maps.create(folder, SMALL) as shared:
            shared.tables.control[0]["hertz"] = 250
        (folder / removing.LAYOUT_NAME).unlink()
        with pytest.raises(NotRunningError, match="no tables are pinned here"):
            maps.open_tables(folder)
        other = Capacity(connections=300, frontends=16, services=8, maglev_slots=8, endpoints=8, next_hops=8)
        with maps.open_or_create(folder, other) as shared:
            assert shared.is_new
            assert shared.tables.control[0]["hertz"] == 0
            assert len(shared.tables.flows) == other.buckets * 16

    @pytest.mark.faults(99)
    def test_another_capacity_is_refused_with_the_cure(self, folder: Path):
        maps.create(folder, SMALL).close()
        other = Capacity(**{**SMALL.describe(), "connections": 200})
        with pytest.raises(LayoutError, match=r"capacity.connections: 100, now 200; give the same --capacity, or"):
            maps.open_or_create(folder, other)

    @pytest.mark.faults(99)
    def test_another_layout_is_refused_by_the_name_of_the_field(self, folder: Path):
        described = maps.describe(SMALL)
        described["structs"]["flow"]["state"] = ["uint16", 38]
        with maps.create(folder, SMALL) as shared:
            text = json.dumps(described).encode().ljust(schema.LAYOUT.itemsize, b"\0")
            kernel.map_update(shared.descriptors[removing.LAYOUT_NAME], struct.pack("=I", 0), text)
        for capacity in (None, SMALL):
            with pytest.raises(
                LayoutError, match=r"structs.flow.state: .*uint16.*now .*uint8.*; `turnout detach` first"
            ):
                maps.open_tables(folder, capacity)

    def test_a_layout_that_is_not_ours_is_refused(self, folder: Path):
        with maps.create(folder, SMALL) as shared:
            text = b"pickles".ljust(schema.LAYOUT.itemsize, b"\0")
            kernel.map_update(shared.descriptors[removing.LAYOUT_NAME], struct.pack("=I", 0), text)
        with pytest.raises(LayoutError, match="holds no description of the tables"):
            maps.open_tables(folder)

    @pytest.mark.faults(99)
    def test_a_map_of_another_kind_is_refused_by_name(self, folder: Path):
        maps.create(folder, SMALL).close()
        other = kernel.map_create("flows", 4, 64, 3, kernel.MMAPABLE)
        kernel.replace_pin(other, folder / "flows")
        with pytest.raises(LayoutError, match=r"flows is another map: .*entries=3.*expected .*entries=256"):
            maps.open_tables(folder)

    @pytest.mark.faults(99)
    def test_a_missing_map_is_refused_by_name(self, folder: Path):
        maps.create(folder, SMALL).close()
        (folder / "flows").unlink()
        with pytest.raises(LayoutError, match="flows is missing"):
            maps.open_tables(folder)

    def test_removal_takes_the_maps_and_leaves_what_is_not_a_map(self, folder: Path):
        maps.create(folder, SMALL).close()
        kernel.pin(returning(2), folder / "program")
        removing.maps(folder)
        assert [path.name for path in folder.iterdir()] == ["program"]
        (folder / "program").unlink()
        removing.maps(folder)
        assert not folder.exists()
        removing.maps(folder)

    def test_tables_that_are_not_there_are_not_running(self, folder: Path):
        with pytest.raises(NotRunningError, match="start `turnout run` first"):
            maps.open_tables(folder)
