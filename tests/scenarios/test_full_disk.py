"""Where the run folder has no room: a start says so and leaves nothing, and a node that runs does what it can."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dataplane.settings import DEFAULT_RUN_FOLDER
from perf.world import World
from tests.daemon import Daemon
from tests.scenarios.site import HOSTS, Site
from tests.scenarios.test_interfaces import take_off, why, within_a_second
from tests.small_disk import filled, remount, small_disk

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(f"tf{os.getpid() % 100_000}", HOSTS) as world:
        yield world


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder of its own, whose pins are where all are: nothing is mounted that may be left."""
    with small_disk(tmp_path / "run") as folder:
        (folder / "bpf").symlink_to(Path(DEFAULT_RUN_FOLDER) / "bpf")
        monkeypatch.setenv("TURNOUT_RUN", str(folder))
        yield folder


def start_in_vain(daemon: Daemon) -> str:
    """Start it; return the line that it ends with, and assert that nothing stays."""
    with pytest.raises(AssertionError):
        daemon.start()
    assert daemon.wait() == 1
    *_, line = daemon.said().splitlines()
    assert "internal error" not in daemon.said()
    settings, node = daemon.settings, daemon.host
    assert not any("xdp" in link for link in json.loads(node.run(["ip", "-j", "link"]).stdout))
    assert node.run(["nft", "list", "tables"]).stdout == ""
    assert not settings.pins.exists()
    assert {path.name for path in settings.run_folder.iterdir()} <= {"bpf", "filler", "tables"}
    return line


@pytest.mark.parametrize("engine", ["xdp", "raw"])
def test_F112_a_start_in_a_full_run_folder_says_so_and_leaves_nothing(world: World, disk: Path, engine: str):
    with Daemon(world, engine) as daemon:
        with filled(disk):
            line = start_in_vain(daemon)
        lock = daemon.settings.lock_path
        assert line.startswith(
            f"turnout: {lock}: cannot be written: No space left on device; free some space or inodes"
        )


def test_F112_a_start_in_a_read_only_run_folder_says_so_and_leaves_nothing(world: World, disk: Path):
    with Daemon(world, "xdp") as daemon:
        remount(disk, "ro")
        line = start_in_vain(daemon)
        remount(disk, "rw")
        assert line.startswith(f"turnout: {daemon.settings.lock_path}: cannot be made: Read-only file system; mount it")


def test_F100_a_start_over_a_read_only_bpffs_says_so_and_leaves_nothing(world: World, disk: Path):
    (disk / "bpf").unlink()
    (disk / "bpf").mkdir()
    world.node.run(["mount", "-t", "bpf", "bpf", str(disk / "bpf")])
    try:
        with Daemon(world, "xdp") as daemon:
            remount(disk / "bpf", "ro")
            line = start_in_vain(daemon)
            remount(disk / "bpf", "rw")
            assert line.startswith(f"turnout: {daemon.settings.pins}: cannot be made: Read-only file system; mount it")
    finally:
        world.node.run(["umount", str(disk / "bpf")])


# As many inodes as there is room for: the folder, its link, the lock, the socket, and no more.
@pytest.mark.parametrize(
    ("engine", "inodes", "what"),
    [
        ("xdp", 3, "sock: the control socket cannot be made"),
        ("xdp", 4, "namespace: cannot be written"),
        ("xdp", 5, "offloads: cannot be written"),
        ("raw", 6, "filter: cannot be written"),
    ],
    ids=["socket", "namespace", "offloads", "filter"],
)
def test_F112_a_start_that_cannot_make_a_file_says_which_and_leaves_nothing(
    world: World, disk: Path, engine: str, inodes: int, what: str
):
    with Daemon(world, engine) as daemon:
        remount(disk, f"nr_inodes={inodes}")
        line = start_in_vain(daemon)
        remount(disk, "nr_inodes=100")
        assert f"/{daemon.settings.name}.{what}: No space left on device; free some space or inodes" in line
        assert line.startswith("turnout: ")
        ethtool = world.node.run(["ethtool", "-k", "eth0"]).stdout
        assert "rx-vlan-offload: on" in ethtool


def test_F112_without_room_for_a_record_other_interfaces_are_followed_until_there_is(world: World, disk: Path):
    """In generic mode GRO is off, and what is to be switched on again is on the disk first."""
    with Daemon(world, "xdp-generic") as daemon:
        daemon.settings = replace(daemon.settings, interfaces=("eth1", "eth0"))  # trouble comes first
        site = Site(world, daemon)
        daemon.start()
        site.serve()
        with filled(disk):
            world.node.run(["ethtool", "-K", "eth1", "gro", "on"])
            take_off(site, "eth1")
            record = daemon.settings.offloads_path
            daemon.wait_for(lambda: f"eth1: {record}: cannot be written: No space left on device; free" in why(site))
            assert daemon.ask("status")["state"] == "degraded"
            with within_a_second():
                take_off(site, "eth0")
                daemon.wait_for(lambda: "eth0" in site.has_programs())
            with site.asking() as ask:
                assert ask() is not None
            assert "cannot be written" in why(site)
        with within_a_second():
            daemon.wait_for(lambda: "eth1: served again" in daemon.said())
        site.wait_until_ok()
        assert "generic-receive-offload: off" in world.node.run(["ethtool", "-k", "eth1"]).stdout
    assert "generic-receive-offload: on" in world.node.run(["ethtool", "-k", "eth1"]).stdout
