"""Programs on interfaces: one memory on both sides, replaced without a gap, and one clear error when it cannot be."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from perf.world import World, wait_until
from tests import cgroups
from xdp import kernel, links, loader, maps, removing
from xdp.errors import AttachError, UsageError
from xdp.schema import Reason
from xdp.tables import Capacity

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SMALL = Capacity(connections=100, frontends=16, services=8, maglev_slots=8, endpoints=8, next_hops=8, cpus=2)
COUNT = Path(__file__).with_name("count.c")
FRAME = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(46)
DROP, PASS = 1, 2


@dataclass
class Loaded:
    """Tables, and two programs over them that count for different reasons."""

    folder: Path
    shared: maps.SharedMaps
    first: int
    second: int

    def counted(self, reason: Reason) -> int:
        return int(self.shared.tables.xdp_counters[0]["packets"][reason])


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    folder = Path(f"/run/turnout/bpf/test-loader-{os.getpid()}")
    with maps.create(folder, SMALL) as shared:
        first = loader.load(folder, COUNT, "count", {"VERDICT_REASON": "REASON_NOT_OURS"})
        second = loader.load(folder, COUNT, "count", {"VERDICT_REASON": "REASON_NOT_IPV4"})
        yield Loaded(folder, shared, first, second)
    removing.maps(folder)


@pytest.fixture
def pin(folder: Path) -> Iterator[Path]:
    """Where a link is pinned; it is taken off afterwards."""
    path = folder / "links" / "eth0"
    yield path
    loader.detach(path)
    if path.parent.exists():
        path.parent.rmdir()


def state_of(world: World, interface: str = "eth0") -> links.XdpState | None:
    with world.node.entered():
        return links.xdp_state(socket.if_nametoindex(interface))


def test_numpy_sees_what_xdp_writes(loaded: Loaded):
    before = loaded.counted(Reason.NOT_OURS)
    verdict, _, _ = kernel.prog_test_run(loaded.first, FRAME, repeat=1000)
    assert (verdict, loaded.counted(Reason.NOT_OURS) - before) == (PASS, 1000)


def test_xdp_sees_what_numpy_writes(loaded: Loaded):
    control = loaded.shared.tables.control
    control[0]["stall_jiffies"] = 0xD20B
    assert kernel.prog_test_run(loaded.first, FRAME)[0] == DROP
    control[0]["stall_jiffies"] = 0
    assert kernel.prog_test_run(loaded.first, FRAME)[0] == PASS


def test_a_program_uses_the_pinned_maps_and_leaves_no_pin(loaded: Loaded):
    ids = {kernel.map_info(loaded.shared.descriptors[name]).id for name in ("xdp_counters", "control")}
    assert set(kernel.prog_info(loaded.first).map_ids) == ids
    assert {path.name for path in loaded.folder.iterdir()} == set(loaded.shared.descriptors)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param(
            "u32 row = 0;", "u32 row = 0; int idle;", r"broken.c:\d+:\d+: error: unused variable", id="warning"
        ),
        pytest.param("(void *)(eth + 1) > end", "!eth->h_proto || !end", r"invalid access to packet", id="verifier"),
        pytest.param("int count(", "int counts(", "Unknown program", id="no such function"),
        pytest.param("/control", "/contrail", "count uses contrail, which is not a shared table", id="stray table"),
    ],
)
def test_F097_a_program_that_does_not_load_is_one_error_and_changes_nothing(
    loaded: Loaded, tmp_path: Path, old: str, new: str, message: str
):
    source = tmp_path / "broken.c"
    text = COUNT.read_text()
    assert old in text
    source.write_text(text.replace(old, new))
    with pytest.raises(loader.LoadError, match=message) as refused:
        loader.load(loaded.folder, source, "count", {"VERDICT_REASON": "REASON_NOT_OURS"})
    assert str(refused.value).startswith(f"{source}: count ")
    assert "Traceback" not in str(refused.value)
    assert kernel.prog_test_run(loaded.first, FRAME)[0] == PASS
    assert {path.name for path in loaded.folder.iterdir()} == set(loaded.shared.descriptors)


def test_a_source_that_is_not_there_is_named(loaded: Loaded, tmp_path: Path):
    with pytest.raises(UsageError, match=r"absent.c: No such file"):
        loader.load(loaded.folder, tmp_path / "absent.c", "count")


def test_a_program_is_replaced_under_traffic_without_missing_a_frame(loaded: Loaded, world: World, pin: Path):
    with world.node.entered():
        attachment = loader.attach(loaded.first, "eth0", "auto", pin)
    assert (attachment.mode, attachment.why, attachment.was_replaced) == ("native", "", False)
    reasons = (Reason.NOT_OURS, Reason.NOT_IPV4)
    before = [loaded.counted(reason) for reason in reasons]
    with world["client"].entered():
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        wire.bind(("eth0", 0))
    done = threading.Event()

    def send() -> int:
        sent = 0
        while not done.is_set():
            sent += wire.send(FRAME) == len(FRAME)
        return sent

    totals: list[int] = []
    sender = threading.Thread(target=lambda: totals.append(send()))
    sender.start()
    with world.node.entered():
        for program in (loaded.second, loaded.first) * 10:
            at = [loaded.counted(reason) for reason in reasons]
            taken = loader.attach(program, "eth0", "auto", pin)
            assert taken.was_replaced
            assert wait_until(lambda at=at, n=program == loaded.second: loaded.counted(reasons[n]) > at[n], timeout_s=2)
    done.set()
    sender.join()
    wire.close()

    def seen() -> list[int]:
        return [loaded.counted(reason) - old for reason, old in zip(reasons, before, strict=True)]

    # The far end's own traffic (ARP, for one) may be counted on top: never fewer than were sent.
    assert wait_until(lambda: sum(seen()) >= totals[0], timeout_s=2), (seen(), totals)
    assert all(seen())


def test_a_link_outlives_the_process_that_made_it(loaded: Loaded, world: World, pin: Path):
    kernel.pin(loaded.first, loaded.folder / "program")
    code = """
import sys
from pathlib import Path
from xdp import kernel, loader
loader.attach(kernel.open_pinned(Path(sys.argv[1])), "eth0", "native", Path(sys.argv[2]))
"""
    command = ["nsenter", f"--net=/run/netns/{world.node.namespace}", sys.executable, "-c", code]
    subprocess.run([*command, loaded.folder / "program", pin], check=True)
    (loaded.folder / "program").unlink()
    assert state_of(world) == links.XdpState("native", kernel.prog_info(loaded.first).id)
    with world.node.entered():
        assert loader.attach(loaded.second, "eth0", "auto", pin).was_replaced
    assert state_of(world) == links.XdpState("native", kernel.prog_info(loaded.second).id)
    assert loader.detach(pin)
    assert state_of(world) is None
    assert not loader.detach(pin)


@pytest.mark.faults(98)
def test_a_program_of_somebody_else_is_left_alone(loaded: Loaded, world: World, pin: Path):
    with world.node.entered():
        foreign = links.create_xdp(loaded.second, socket.if_nametoindex("eth0"), "generic")
        for mode in ("auto", "native", "generic"):
            with pytest.raises(AttachError, match=r"eth0: another XDP program \(generic, id \d+\)"):
                loader.attach(loaded.first, "eth0", mode, pin)  # type: ignore[arg-type]
        links.detach(foreign)
        os.close(foreign)
    assert not pin.exists()


def test_auto_falls_back_to_generic_and_says_why(loaded: Loaded, world: World, pin: Path):
    with world.node.entered():
        attachment = loader.attach(loaded.first, "lo", "auto", pin)
    assert (attachment.mode, attachment.why) == (
        "generic",
        "lo: native XDP refused (EOPNOTSUPP: Underlying driver does not support XDP in native mode)",
    )
    assert state_of(world, "lo") == links.XdpState("generic", kernel.prog_info(loaded.first).id)


def test_native_is_not_quietly_generic(loaded: Loaded, world: World, pin: Path):
    with world.node.entered(), pytest.raises(AttachError, match="try --xdp-mode generic"):
        loader.attach(loaded.first, "lo", "native", pin)


def test_another_mode_that_is_asked_for_is_given(loaded: Loaded, world: World, pin: Path):
    with world.node.entered():
        assert loader.attach(loaded.first, "eth0", "native", pin).mode == "native"
        changed = loader.attach(loaded.first, "eth0", "generic", pin)
        kept = loader.attach(loaded.first, "eth0", "auto", pin)
    assert (changed.mode, changed.why, changed.was_replaced) == ("generic", "asked for", True)
    assert (kept.mode, kept.why, kept.was_replaced) == ("generic", "as an earlier daemon attached it", True)


def test_another_mode_that_is_refused_leaves_the_program_that_ran(loaded: Loaded, world: World, pin: Path):
    with world.node.entered():
        loader.attach(loaded.first, "lo", "generic", pin)
        with pytest.raises(AttachError, match=r"lo: native XDP refused \(EOPNOTSUPP: Underlying"):
            loader.attach(loaded.second, "lo", "native", pin)
    assert state_of(world, "lo") == links.XdpState("generic", kernel.prog_info(loaded.first).id)
    with world.node.entered():
        assert loader.attach(loaded.second, "lo", "auto", pin).was_replaced
    assert state_of(world, "lo") == links.XdpState("generic", kernel.prog_info(loaded.second).id)


def test_an_interface_that_was_made_again_gets_its_program_again(loaded: Loaded, world: World, pin: Path):
    def ip(*words: str) -> None:
        subprocess.run(["ip", "-n", world.node.namespace, "link", *words], check=True)

    for _ in range(2):
        ip("add", "short", "type", "veth", "peer", "name", "lived")
        with world.node.entered():
            attachment = loader.attach(loaded.first, "short", "auto", pin)
        assert not attachment.was_replaced
        assert state_of(world, "short") == links.XdpState("native", kernel.prog_info(loaded.first).id)
        ip("del", "short")
    assert loader.detach(pin)


def test_a_pin_that_belongs_to_another_interface_is_not_taken(loaded: Loaded, world: World, pin: Path):
    with world["web"].entered():
        loader.attach(loaded.first, "eth0", "auto", pin)
    # The same number and name, but another namespace.
    with world.node.entered(), pytest.raises(AttachError, match="holds the program of interface number"):
        loader.attach(loaded.second, "eth0", "auto", pin)
    with world["web"].entered():
        assert links.xdp_state(socket.if_nametoindex("eth0")) is not None


def test_an_interface_that_is_not_there_is_a_usage_error(loaded: Loaded, world: World, pin: Path):
    with world.node.entered(), pytest.raises(UsageError, match="eth9: no such interface in this network namespace"):
        loader.attach(loaded.first, "eth9", "auto", pin)


def test_a_program_at_a_hook_is_replaced_on_its_link_and_moves_with_its_cgroup(pin: Path):
    hook, code = "getpeername4", bytes.fromhex("b700000001000000" + "9500000000000000")  # return 1
    first, second = (kernel.prog_load(hook, code, kernel.CGROUP_PROGRAM) for _ in range(2))
    name = f"tx{os.getpid()}"
    with cgroups.made(name) as folder:
        assert loader.link_at(pin) is None
        assert not loader.attach_hook(first, folder, hook, pin)
        before = loader.link_at(pin)
        assert before is not None
        assert (before.cgroup_id, before.program_id) == (folder.stat().st_ino, kernel.prog_info(first).id)
        assert loader.attach_hook(second, folder, hook, pin)
        after = loader.link_at(pin)
        assert after is not None
        assert (after.id, after.program_id) == (before.id, kernel.prog_info(second).id)
    with pytest.raises(AttachError, match=f"{name}: No such file"):
        loader.attach_hook(first, folder, hook, pin)
    with cgroups.made(name) as folder:
        assert not loader.attach_hook(first, folder, hook, pin)
        anew = loader.link_at(pin)
        assert anew is not None
        assert anew.cgroup_id == folder.stat().st_ino
        assert loader.detach(pin)
    os.close(first)
    os.close(second)


def test_a_program_for_a_hook_is_compiled_for_it_and_kept(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "hooks.c"
    source.write_text(
        "int connect4(struct bpf_sock_addr *ctx) { return ctx->user_ip4 != 0; }\n"
        "int recvmsg6(struct bpf_sock_addr *ctx) { return ctx->user_ip6[0] ? 1 : 1; }\n"
    )
    for kept in (False, True):
        assert bool(list(tmp_path.rglob("*.json"))) is kept
        for program in loader.load_all(loaded.folder, source, ["connect4", "recvmsg6"], kind="cgroup"):
            assert kernel.prog_info(program).type == kernel.CGROUP_PROGRAM
            os.close(program)
