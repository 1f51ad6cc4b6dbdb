"""The narrow door: what goes in comes out, and what is refused is said in one line."""

from __future__ import annotations

import errno
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perf.world import World, wait_until
from tests import cgroups
from xdp import kernel
from xdp.errors import AttachError, MissingFeatureError

pytestmark = [pytest.mark.root, pytest.mark.bpf]

DROP, PASS, TX = 1, 2, 3
FRAME = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(46)


def returning(verdict: int) -> int:
    """Load the program `return verdict`."""
    return kernel.prog_load("answer", struct.pack("=BBhi", 0xB7, 0, 0, verdict) + struct.pack("=BBhi", 0x95, 0, 0, 0))


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
    with pytest.raises(kernel.KernelError, match=r"map huge: .*2000000000 entries of 2000 bytes") as refused:
        kernel.map_create("huge", 4, 2000, 2_000_000_000, kernel.MMAPABLE)
    assert refused.value.errno in (errno.E2BIG, errno.ENOMEM)


def test_a_full_map_says_so():
    fd = kernel.map_create("one", 4, 4, 1, map_type=kernel.HASH)
    kernel.map_update(fd, b"key1", b"here")
    with pytest.raises(kernel.KernelError, match="map update") as refused:
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
        assert kernel.prog_test_run(program, FRAME, ingress_ifindex=ifindex)[0] == ifindex
    os.close(program)


def test_live_frames_are_really_sent(world: World):
    program = returning(TX)
    before = world["client"].packets("eth0")
    with world.node.entered():
        # XDP_TX needs transmit queues of XDP at the interface: a program there makes them.
        link = kernel.link_create_xdp(program, socket.if_nametoindex("eth0"), "native")
        kernel.prog_test_run_live(program, FRAME, 100, ingress_ifindex=socket.if_nametoindex("eth0"))
    assert wait_until(lambda: world["client"].packets("eth0") - before >= 100, timeout_s=2)
    os.close(link)
    os.close(program)


def test_the_verifier_says_why():
    with pytest.raises(kernel.KernelError, match=r"program silent: refused by the verifier\n(.|\n)*R0 !read_ok"):
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
    with pytest.raises(kernel.KernelError) as taken:
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
    with pytest.raises(kernel.KernelError) as absent:
        kernel.open_pinned(folder / "nothing")
    assert absent.value.errno == errno.ENOENT


def test_a_pin_outside_a_bpffs_is_explained(table, tmp_path: Path):
    with pytest.raises((kernel.KernelError, MissingFeatureError), match="is not a bpffs"):
        kernel.pin(table, tmp_path / "thing")


def test_a_mount_made_in_a_private_mount_namespace_outlives_it(tmp_path: Path):
    code = "import sys; from pathlib import Path; from xdp import kernel"
    mount, check = (
        f"{code}; kernel.mount_bpffs(*map(Path, sys.argv[1:]))",
        f"{code}; kernel.is_bpffs(Path(sys.argv[1])) or sys.exit(3)",
    )
    # The outer namespace plays that of process 1.
    script = f"""
        unshare --mount --propagation slave {sys.executable} -c '{mount}' {tmp_path}/bpf /proc/$$/ns/mnt &&
        {sys.executable} -c '{check}' {tmp_path}/bpf"""
    subprocess.run(["unshare", "--mount", "--propagation", "shared", "sh", "-c", script], check=True)
    assert not kernel.is_bpffs(tmp_path / "bpf")


def test_a_link_runs_its_program_until_the_last_reference_goes(world: World):
    first, second = returning(PASS), returning(DROP)
    first_id, second_id = kernel.prog_info(first).id, kernel.prog_info(second).id
    with world.node.entered():
        ifindex = socket.if_nametoindex("eth0")
        assert kernel.xdp_state(ifindex) is None
        link = kernel.link_create_xdp(first, ifindex, "native")
        assert kernel.xdp_state(ifindex) == kernel.XdpState("native", first_id)
        info = kernel.link_info(link)
        assert (info.ifindex, info.program_id) == (ifindex, first_id)
        assert info in list(kernel.links())
        kernel.link_update(link, second, first)
        assert kernel.xdp_state(ifindex) == kernel.XdpState("native", second_id)
        with pytest.raises(kernel.KernelError, match="another program by now"):
            kernel.link_update(link, second, first)
        os.close(link)
        assert wait_until(lambda: kernel.xdp_state(ifindex) is None, timeout_s=2)
    os.close(first)
    os.close(second)


def test_a_detached_link_is_defunct(world: World):
    program = returning(PASS)
    with world.node.entered():
        ifindex = socket.if_nametoindex("eth0")
        link = kernel.link_create_xdp(program, ifindex, "generic")
        kernel.link_detach(link)
        assert kernel.xdp_state(ifindex) is None
        assert kernel.link_info(link).ifindex == 0
        kernel.link_detach(link)
    os.close(link)
    os.close(program)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    with cgroups.made(f"tx{os.getpid()}") as folder:
        yield folder


def letting_on(hook: str) -> int:
    """Load the program `return 1` for a hook of a cgroup."""
    return kernel.prog_load(hook, MOV_1 + EXIT, kernel.CGROUP_PROGRAM)


MOV_1, EXIT = struct.pack("=BBhi", 0xB7, 0, 0, 1), struct.pack("=BBhi", 0x95, 0, 0, 0)


def test_only_a_folder_of_cgroups_v2_is_a_cgroup(cgroup: Path, tmp_path: Path):
    assert kernel.is_cgroup(cgroup)
    assert kernel.is_cgroup(cgroups.mounted())
    for other in (tmp_path, tmp_path / "none", cgroup / "cgroup.procs", cgroups.mounted().parent):
        assert not kernel.is_cgroup(other)


@pytest.mark.parametrize("hook", kernel.CGROUP_HOOKS)
def test_a_program_is_at_the_hook_of_a_cgroup_that_it_is_called_after(cgroup: Path, hook: str):
    program = letting_on(hook)
    assert kernel.prog_info(program).type == kernel.CGROUP_PROGRAM
    link = kernel.link_create_cgroup(program, cgroup, hook)
    info = kernel.link_info(link)
    assert (info.cgroup_id, info.ifindex, info.program_id) == (
        cgroup.stat().st_ino,
        0,
        kernel.prog_info(program).id,
    )
    kernel.link_detach(link)
    assert kernel.link_info(link).cgroup_id == 0
    other = next(name for name in kernel.CGROUP_HOOKS if name != hook)
    with pytest.raises(kernel.KernelError, match=f"hook {other}: Invalid argument"):
        kernel.link_create_cgroup(program, cgroup, other)
    os.close(link)
    os.close(program)


def test_what_is_no_cgroup_cannot_be_attached_to(cgroup: Path, tmp_path: Path):
    program = letting_on("connect4")
    with pytest.raises(AttachError, match=f"{tmp_path}: is not the folder of a cgroup v2"):
        kernel.link_create_cgroup(program, tmp_path, "connect4")
    with pytest.raises(AttachError, match=f"{cgroup}/none: No such file"):
        kernel.link_create_cgroup(program, cgroup / "none", "connect4")
    os.close(program)


def test_a_hook_that_another_program_has_for_itself_is_named(cgroup: Path):
    program, folder = letting_on("connect4"), os.open(cgroup, os.O_RDONLY)
    alone = kernel._ffi.new("uint32_t[]", [folder, program, kernel.CGROUP_HOOKS["connect4"], 0])
    attach = kernel._ffi.cast("int", 8)  # BPF_PROG_ATTACH, without BPF_F_ALLOW_MULTI
    assert kernel._libc.syscall(kernel._BPF_SYSCALL, attach, alone, kernel._ffi.cast("unsigned int", 16)) == 0
    with pytest.raises(AttachError, match=r"hook connect4: not permitted \(EPERM\).*another program has the hook for"):
        kernel.link_create_cgroup(program, cgroup, "connect4")
    os.close(folder)
    os.close(program)


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_an_interface_with_a_program_is_busy_and_the_program_is_named(world: World, mode: kernel.Mode):
    program = returning(PASS)
    with world.node.entered():
        ifindex = socket.if_nametoindex("eth0")
        link = kernel.link_create_xdp(program, ifindex, "native")
        expected = rf"eth0: another XDP program \(native, id {kernel.prog_info(program).id}\) is attached; remove it"
        with pytest.raises(AttachError, match=expected):
            kernel.link_create_xdp(program, ifindex, mode)
    os.close(link)
    os.close(program)


def test_a_driver_without_xdp_is_named_with_its_errno_and_the_cure(world: World):
    program = returning(PASS)
    with (
        world.node.entered(),
        pytest.raises(AttachError, match=r"lo: native XDP refused \(EOPNOTSUPP: [^)]+\); try --xdp-mode"),
    ):
        kernel.link_create_xdp(program, 1, "native")
    os.close(program)


def test_an_interface_that_is_not_there_is_named(world: World):
    program = returning(PASS)
    with world.node.entered(), pytest.raises(AttachError, match="interface 9999: no such interface"):
        kernel.link_create_xdp(program, 9999, "native")
    with world.node.entered():
        assert kernel.xdp_state(9999) is None
    os.close(program)


def seconds_of(call: Callable[[], None]) -> float:
    """Return the median of some runs."""
    times = []
    for _ in range(9):
        before = time.monotonic()
        call()
        times.append(time.monotonic() - before)
    return statistics.median(times)


def test_a_grace_period_is_waited_for_with_and_without_membarrier(table: int):
    zero = struct.pack("=I", 0)
    not_waiting = seconds_of(lambda: kernel.map_update(table, zero, bytes(8)))
    for grace in (kernel.membarrier_global, kernel.map_of_maps_grace()):
        assert seconds_of(grace) > 20 * not_waiting


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
