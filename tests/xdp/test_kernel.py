"""The narrow door: what goes in comes out, and what is refused is said in one line."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf.world import World, wait_until
from tests.programs import returning
from xdp import kernel, links
from xdp.errors import KernelError, MissingFeatureError

pytestmark = [pytest.mark.root, pytest.mark.bpf]

DROP, PASS, TX = 1, 2, 3
FRAME = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(46)


@pytest.fixture
def table() -> Iterator[int]:
    fd = kernel.map_create("table", 4, 8, 10, kernel.MMAPABLE)
    yield fd
    os.close(fd)


def test_a_map_is_what_it_was_created_as(table):
    info = kernel.map_info(table)
    assert (info.type, info.key_size, info.value_size) == (kernel.ARRAY, 4, 8)
    assert (info.max_entries, info.map_flags, info.name) == (10, kernel.MMAPABLE, "table")


def test_a_map_returns_what_was_stored():
    fd = kernel.map_create("words", 8, 4, 2, map_type=kernel.HASH)
    assert kernel.map_lookup(fd, b"somebody", 4) is None
    kernel.map_update(fd, b"somebody", b"here")
    assert kernel.map_lookup(fd, b"somebody", 4) == b"here"
    assert kernel.map_delete(fd, b"somebody")
    assert not kernel.map_delete(fd, b"somebody")
    os.close(fd)


def test_a_map_that_cannot_be_is_named_with_its_size():
    with pytest.raises(KernelError, match=r"map huge: .*2000000000 entries of 2000 bytes") as refused:
        kernel.map_create("huge", 4, 2000, 2_000_000_000, kernel.MMAPABLE)
    assert refused.value.errno in (errno.E2BIG, errno.ENOMEM)


def test_a_full_map_says_so():
    fd = kernel.map_create("one", 4, 4, 1, map_type=kernel.HASH)
    kernel.map_update(fd, b"key1", b"here")
    with pytest.raises(KernelError, match="map update") as refused:
        kernel.map_update(fd, b"key2", b"here")
    assert refused.value.errno == errno.E2BIG
    os.close(fd)


@pytest.mark.parametrize("verdict", [DROP, PASS, TX])
def test_a_test_run_tells_verdict_and_frame(verdict):
    program = returning(verdict)
    got, frame, duration_ns = kernel.prog_test_run(program, FRAME, repeat=10)
    assert (got, frame) == (verdict, FRAME)
    assert duration_ns < 1_000_000
    os.close(program)


def test_a_test_run_comes_from_the_interface_named(world: World):
    # r0 = ctx->ingress_ifindex
    program = kernel.prog_load("number", struct.pack("=BBhi", 0x61, 0x10, 12, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0))
    with world.node.entered():
        ifindex = socket.if_nametoindex("eth1")
        context = struct.pack("=4xI4xI8x", len(FRAME), ifindex)  # struct xdp_md
        assert kernel.prog_test_run(program, FRAME, context=context)[0] == ifindex
    os.close(program)


def test_live_frames_are_really_sent(world: World):
    program = returning(TX)
    before = world["client"].packets("eth0")
    with world.node.entered():
        # XDP_TX needs transmit queues of XDP at the interface: a program there makes them.
        link = links.create_xdp(program, socket.if_nametoindex("eth0"), "native")
        kernel.prog_test_run_live(program, FRAME, 100, ingress_ifindex=socket.if_nametoindex("eth0"))
    assert wait_until(lambda: world["client"].packets("eth0") - before >= 100, timeout_s=2)
    os.close(link)
    os.close(program)


def test_the_verifier_says_why():
    with pytest.raises(KernelError, match=r"program silent: refused by the verifier\n(.|\n)*R0 !read_ok"):
        kernel.prog_load("silent", struct.pack("=BBhi", 0x95, 0, 0, 0))


def test_a_program_knows_its_name():
    program = returning(PASS)
    info = kernel.prog_info(program)
    assert (info.type, info.name, info.map_ids) == (kernel.XDP_PROGRAM, "answer", ())
    again = kernel.prog_fd_by_id(info.id)
    assert kernel.prog_info(again) == info
    assert kernel.kind_of(program) == "prog"
    os.close(again)
    os.close(program)


def test_a_pin_is_found_again_and_can_be_replaced(table, folder: Path):
    folder.mkdir()
    program = returning(PASS)
    kernel.pin(table, folder / "thing")
    with pytest.raises(KernelError) as taken:
        kernel.pin(program, folder / "thing")
    assert taken.value.errno == errno.EEXIST
    assert list(kernel.pinned_maps(folder)) == ["thing"]
    kernel.replace_pin(program, folder / "thing")
    found = kernel.open_pinned(folder / "thing")
    assert kernel.prog_info(found).id == kernel.prog_info(program).id
    assert kernel.pinned_maps(folder) == {}
    assert [path.name for path in folder.iterdir()] == ["thing"]
    os.close(found)
    os.close(program)


def test_an_absent_pin_is_enoent(folder: Path):
    with pytest.raises(KernelError) as absent:
        kernel.open_pinned(folder / "nothing")
    assert absent.value.errno == errno.ENOENT


def test_a_pin_outside_a_bpffs_is_explained(table, tmp_path: Path):
    with pytest.raises((KernelError, MissingFeatureError), match="is not a bpffs"):
        kernel.pin(table, tmp_path / "thing")


def test_without_capabilities_the_missing_ones_are_named():
    code = """
from xdp import kernel, errors
try:
    kernel.map_create("table", 4, 4, 1)
except errors.MissingFeatureError as error:
    print(error)
"""
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("map table: not permitted (EPERM); run as root, or with CAP_BPF")
