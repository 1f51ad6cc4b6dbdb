"""Links: a program runs where it was put, and whoever is in its way is named."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf.world import World, wait_until
from tests import cgroups
from tests.programs import returning
from xdp import kernel, links, mounts, syscalls
from xdp.errors import AttachError, KernelError

pytestmark = [pytest.mark.root, pytest.mark.bpf]

DROP, PASS = 1, 2


def test_a_link_runs_its_program_until_the_last_reference_goes(world: World):
    first, second = returning(PASS), returning(DROP)
    first_id, second_id = kernel.prog_info(first).id, kernel.prog_info(second).id
    with world.node.entered():
        ifindex = socket.if_nametoindex("eth0")
        assert links.xdp_state(ifindex) is None
        link = links.create_xdp(first, ifindex, "native")
        assert links.xdp_state(ifindex) == links.XdpState("native", first_id)
        info = links.info(link)
        assert (info.ifindex, info.program_id) == (ifindex, first_id)
        assert info in list(links.every())
        links.update(link, second, first)
        assert links.xdp_state(ifindex) == links.XdpState("native", second_id)
        with pytest.raises(KernelError, match="another program by now"):
            links.update(link, second, first)
        os.close(link)
        assert wait_until(lambda: links.xdp_state(ifindex) is None, timeout_s=2)
    os.close(first)
    os.close(second)


def test_a_detached_link_is_defunct(world: World):
    program = returning(PASS)
    with world.node.entered():
        ifindex = socket.if_nametoindex("eth0")
        link = links.create_xdp(program, ifindex, "generic")
        links.detach(link)
        assert links.xdp_state(ifindex) is None
        assert links.info(link).ifindex == 0
        links.detach(link)
    os.close(link)
    os.close(program)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    with cgroups.made(f"tx{os.getpid()}") as folder:
        yield folder


def letting_on(hook: str) -> int:
    """Load a program for a hook of a cgroup that lets all on."""
    return returning(1, hook, kernel.CGROUP_PROGRAM)


@pytest.mark.parametrize("hook", kernel.CGROUP_HOOKS)
def test_a_program_is_at_the_hook_of_a_cgroup_that_it_is_called_after(cgroup: Path, hook: str):
    program = letting_on(hook)
    assert kernel.prog_info(program).type == kernel.CGROUP_PROGRAM
    link = links.create_cgroup(program, cgroup, hook)
    info = links.info(link)
    assert (info.cgroup_id, info.ifindex, info.program_id) == (
        cgroup.stat().st_ino,
        0,
        kernel.prog_info(program).id,
    )
    links.detach(link)
    assert links.info(link).cgroup_id == 0
    other = next(name for name in kernel.CGROUP_HOOKS if name != hook)
    with pytest.raises(KernelError, match=f"hook {other}: Invalid argument"):
        links.create_cgroup(program, cgroup, other)
    os.close(link)
    os.close(program)


def test_what_is_no_cgroup_cannot_be_attached_to(cgroup: Path, tmp_path: Path):
    program = letting_on("connect4")
    with pytest.raises(AttachError, match=f"{tmp_path}: is not the folder of a cgroup v2"):
        links.create_cgroup(program, tmp_path, "connect4")
    with pytest.raises(AttachError, match=f"{cgroup}/none: No such file"):
        links.create_cgroup(program, cgroup / "none", "connect4")
    os.close(program)


def test_a_hook_that_another_program_has_for_itself_is_named(cgroup: Path):
    program, folder = letting_on("connect4"), os.open(cgroup, os.O_RDONLY)
    alone = syscalls.ffi.new("uint32_t[]", [folder, program, kernel.CGROUP_HOOKS["connect4"], 0])
    attach = syscalls.ffi.cast("int", 8)  # BPF_PROG_ATTACH, without BPF_F_ALLOW_MULTI
    assert syscalls.libc.syscall(syscalls.BPF, attach, alone, syscalls.ffi.cast("unsigned int", 16)) == 0
    with pytest.raises(AttachError, match=r"hook connect4: not permitted \(EPERM\).*another program has the hook for"):
        links.create_cgroup(program, cgroup, "connect4")
    os.close(folder)
    os.close(program)


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_an_interface_with_a_program_is_busy_and_the_program_is_named(world: World, mode: links.Mode):
    program = returning(PASS)
    with world.node.entered():
        ifindex = socket.if_nametoindex("eth0")
        link = links.create_xdp(program, ifindex, "native")
        which = rf"eth0: another XDP program \(native, id {kernel.prog_info(program).id}\) is attached; "
        expected = rf"{which}end its owner, of whom `bpftool link show id {links.info(link).id}` tells"
        with pytest.raises(AttachError, match=expected):
            links.create_xdp(program, ifindex, mode)
    os.close(link)
    os.close(program)


def test_a_program_that_is_on_no_link_is_told_with_what_removes_it(world: World):
    program, pin = returning(PASS), Path(f"/run/turnout/bpf/{world.prefix}-stranger")
    mounts.mount_bpffs(pin.parent)
    kernel.pin(program, pin)
    world.node.run(["ip", "link", "set", "dev", "eth0", "xdpdrv", "pinned", str(pin)])
    pin.unlink()
    with world.node.entered():
        ifindex = socket.if_nametoindex("eth0")
        with pytest.raises(AttachError, match=r"is attached; remove it \(`ip link set dev eth0 xdp off`\)"):
            links.create_xdp(program, ifindex, "native")
        world.node.run(["ip", "link", "set", "dev", "eth0", "xdp", "off"])
        assert links.xdp_state(ifindex) is None
    os.close(program)


def test_a_driver_without_xdp_is_named_with_its_errno_and_the_cure(world: World):
    program = returning(PASS)
    with (
        world.node.entered(),
        pytest.raises(AttachError, match=r"lo: native XDP refused \(EOPNOTSUPP: [^)]+\); try --xdp-mode"),
    ):
        links.create_xdp(program, 1, "native")
    os.close(program)


def test_an_interface_that_is_not_there_is_named(world: World):
    program = returning(PASS)
    with world.node.entered(), pytest.raises(AttachError, match="interface 9999: no such interface"):
        links.create_xdp(program, 9999, "native")
    with world.node.entered():
        assert links.xdp_state(9999) is None
    os.close(program)
