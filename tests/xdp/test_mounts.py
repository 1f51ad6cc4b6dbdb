"""File systems of the kernel's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cgroups
from xdp import mounts

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]


def test_a_mount_made_in_a_private_mount_namespace_outlives_it(tmp_path: Path):
    code = "import sys; from pathlib import Path; from xdp import mounts"
    mount, check = (
        f"{code}; mounts.mount_bpffs(*map(Path, sys.argv[1:]))",
        f"{code}; mounts.is_bpffs(Path(sys.argv[1])) or sys.exit(3)",
    )
    # The outer namespace plays that of process 1.
    script = f"""
        unshare --mount --propagation slave {sys.executable} -c '{mount}' {tmp_path}/bpf /proc/$$/ns/mnt &&
        {sys.executable} -c '{check}' {tmp_path}/bpf"""
    subprocess.run(["unshare", "--mount", "--propagation", "shared", "sh", "-c", script], check=True)
    assert not mounts.is_bpffs(tmp_path / "bpf")


def test_set_up_mounts_a_bpffs_where_there_is_none(tmp_path: Path):
    made = tmp_path / "made" / "bpf"
    try:
        subprocess.run(["make", "--no-print-directory", "bpffs", f"BPFFS={made}"], cwd=ROOT, check=True)
        assert mounts.is_bpffs(made)
    finally:
        subprocess.run(["umount", made], check=False)


def test_only_a_folder_of_cgroups_v2_is_a_cgroup(tmp_path: Path):
    with cgroups.made(f"tx{os.getpid()}") as cgroup:
        assert mounts.is_cgroup(cgroup)
        assert mounts.is_cgroup(cgroups.mounted())
        for other in (tmp_path, tmp_path / "none", cgroup / "cgroup.procs", cgroups.mounted().parent):
            assert not mounts.is_cgroup(other)
