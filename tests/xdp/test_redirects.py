"""What is lost after the verdict is counted to the frame, where it was lost and why.

    client eth0 ---- eth0 [program] node eth1 ---- eth0 web

Errors are those of Linux 6.18; kernels before 6.3 say ENXIO where a peer has neither XDP nor GRO.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dataplane.afxdp import Umem
from perf import echo
from perf.world import Host, World, wait_until
from xdp import instructions as bpf
from xdp import kernel, links, redirects
from xdp.errors import MissingFeatureError
from xdp.redirects import NO_ROOM, Lost, RedirectErrors

pytestmark = [pytest.mark.root, pytest.mark.bpf]

FRAMES = 100
DROP, TX, REDIRECT = 1, 3, 4
NOWHERE = 4444  # no interface has this number
VETH_RING_FRAMES = 256
DEADLINE_S = 5


def returning(verdict: int) -> int:
    """Load the program `return verdict`."""
    return kernel.prog_load("answer", bpf.assemble([bpf.move_constant(bpf.R0, verdict), bpf.leave()]))


def redirecting(ifindex: int) -> int:
    """Load the program that redirects everything to an interface."""
    code: bpf.Program = [
        bpf.move_constant(bpf.R1, ifindex),
        bpf.move_constant(bpf.R2, 0),
        bpf.call(bpf.REDIRECT),
        bpf.leave(),
    ]
    return kernel.prog_load("redirect", bpf.assemble(code))


@dataclass
class Bench:
    """A node between two hosts; frames go in at the client."""

    world: World
    inward: int  # ifindex of the node's eth0
    outward: int  # ifindex of the node's eth1

    @contextmanager
    def running(self, program: int, mode: links.Mode = "native") -> Iterator[None]:
        """Have `program` on the node's eth0."""
        with self.world.node.entered():
            link = links.create_xdp(program, self.inward, mode)
        os.close(program)
        yield
        os.close(link)

    def send(self, frames: int = FRAMES, frame_bytes: int = 60) -> None:
        """Send from the client and wait until XDP has seen all of it."""
        node = self.world.node
        addresses = bytes.fromhex("02000a4d0102 020000000001 88b5")
        before = node.packets("eth0")
        with self.world["client"].entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("eth0", 0))
            for _ in range(frames):
                raw.send(addresses.ljust(frame_bytes, b"\0"))
        assert wait_until(lambda: node.packets("eth0") - before == frames, DEADLINE_S)

    @contextmanager
    def counting(self, host: str = "node") -> Iterator[RedirectErrors]:
        """Count in the namespace of `host`."""
        with self.world.hosts[host].entered():
            errors = RedirectErrors()
        with errors:
            yield errors

    @contextmanager
    def changed(self, host: str, change: str, back: str) -> Iterator[None]:
        """Run command `change` on a host, and `back` afterwards."""
        on: Host = self.world.hosts[host]
        on.run(change.split())
        try:
            yield
        finally:
            on.run(back.split())


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with World(f"tt-{os.getpid()}", ["client", "web"], static_neighbours=True) as world:
        with world.node.entered():
            inward, outward = socket.if_nametoindex("eth0"), socket.if_nametoindex("eth1")
        yield Bench(world, inward, outward)


WITHOUT_GRO = ("web", "ethtool -K eth0 gro off", "ethtool -K eth0 gro on")
DOWN = ("node", "ip link set eth1 down", "ip link set eth1 up")
PEER_DOWN = ("web", "ip link set eth0 down", "ip link set eth0 up")
SMALL_MTU = ("node", "ip link set eth1 mtu 1000", "ip link set eth1 mtu 1500")
PEER_SMALL_MTU = ("web", "ip link set eth0 mtu 1000", "ip link set eth0 mtu 1500")


@pytest.mark.parametrize(
    ("change", "frame_bytes", "mode", "error"),
    [
        pytest.param(WITHOUT_GRO, 60, "native", errno.EOPNOTSUPP, id="peer-without-xdp-and-gro"),
        pytest.param(DOWN, 60, "native", errno.ENETDOWN, id="down"),
        pytest.param(DOWN, 60, "generic", errno.ENETDOWN, id="down-generic"),
        pytest.param(PEER_DOWN, 60, "native", errno.ENXIO, id="peer-down"),
        pytest.param(SMALL_MTU, 1019, "native", errno.EMSGSIZE, id="longer-than-mtu-and-vlan-tag"),
        pytest.param(SMALL_MTU, 1019, "generic", errno.EMSGSIZE, id="longer-than-mtu-and-vlan-tag-generic"),
        pytest.param(PEER_SMALL_MTU, 1019, "native", 0, id="longer-than-mtu-of-peer"),
    ],
)
def test_redirects_that_fail_are_counted_to_the_frame(
    bench: Bench, change: Sequence[str], frame_bytes: int, mode: links.Mode, error: int
):
    before = bench.world["web"].packets("eth0")
    with bench.changed(*change), bench.running(redirecting(bench.outward), mode), bench.counting() as errors:
        bench.send(FRAMES, frame_bytes)
        lost = Lost(bench.inward, bench.outward, error)
        assert wait_until(lambda: errors.counts() == {lost: FRAMES}, DEADLINE_S), errors.counts()
    assert bench.world["web"].packets("eth0") == before


@pytest.mark.parametrize("mode", ["native", "generic"])
@pytest.mark.parametrize("frame_bytes", [60, 1518])  # a VLAN tag more than the MTU is let through
def test_redirects_that_arrive_are_not_counted(bench: Bench, mode: links.Mode, frame_bytes: int):
    web, before = bench.world["web"], bench.world["web"].packets("eth0")
    client = ("client", "ip link set eth0 mtu 1504", "ip link set eth0 mtu 1500")
    with bench.changed(*client), bench.running(redirecting(bench.outward), mode), bench.counting() as errors:
        bench.send(FRAMES, frame_bytes)
        assert wait_until(lambda: web.packets("eth0") - before == FRAMES, DEADLINE_S)
        assert errors.counts() == {}


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_an_interface_that_has_gone_is_named(bench: Bench, mode: links.Mode):
    with bench.running(redirecting(NOWHERE), mode), bench.counting() as errors:
        bench.send()
        assert errors.counts() == {Lost(bench.inward, NOWHERE, errno.EINVAL): FRAMES}


def test_kinds_of_loss_are_told_apart_and_add_up(bench: Bench):
    with bench.counting() as errors:
        for frames, to in ((7, NOWHERE), (5, bench.outward), (3, NOWHERE)):
            with bench.changed(*DOWN), bench.running(redirecting(to)):
                bench.send(frames)
        nowhere = Lost(bench.inward, NOWHERE, errno.EINVAL)
        assert errors.counts() == {nowhere: 10, Lost(bench.inward, bench.outward, errno.ENETDOWN): 5}


def test_xdp_tx_to_a_peer_without_xdp_and_gro_is_counted(bench: Bench):
    without_gro = ("client", *WITHOUT_GRO[1:])
    with bench.changed(*without_gro), bench.running(returning(TX)), bench.counting() as errors:
        bench.send()
        lost = Lost(bench.inward, bench.inward, errno.ENXIO)
        assert wait_until(lambda: errors.counts() == {lost: FRAMES}, DEADLINE_S), errors.counts()


def test_a_full_ring_is_counted_without_an_error(bench: Bench):
    # A peer with GRO and without XDP is not woken for XDP_TX: frames lie in its ring until a redirect wakes it.
    client, too_many = bench.world["client"], 44
    before = client.packets("eth0")
    with bench.running(returning(TX)), bench.counting() as errors:
        bench.send(VETH_RING_FRAMES + too_many)
        lost = Lost(bench.inward, bench.inward, 0)
        assert wait_until(lambda: errors.counts() == {lost: too_many}, DEADLINE_S), errors.counts()
        assert client.packets("eth0") == before
        with bench.world.node.entered():
            program = redirecting(bench.inward)
            kernel.prog_test_run_live(program, bytes(60), 1, 1, ingress_ifindex=bench.outward)
            os.close(program)
        assert wait_until(lambda: client.packets("eth0") - before == VETH_RING_FRAMES, DEADLINE_S)
        assert errors.counts() == {lost: too_many, Lost(bench.outward, bench.inward, 0): 1}


@pytest.mark.parametrize("verdict", [DROP, 0])
def test_drops_are_not_losses(bench: Bench, verdict: int):
    with bench.running(returning(verdict)), bench.counting() as errors:
        bench.send()
        assert errors.counts() == {}


def test_a_redirect_verdict_without_a_redirect_is_counted(bench: Bench):
    with bench.running(returning(REDIRECT)), bench.counting() as errors:
        bench.send()
        assert errors.counts() == {Lost(bench.inward, 0, errno.EBADRQC): FRAMES}


def test_another_namespace_with_the_same_numbers_is_not_ours(bench: Bench):
    with bench.running(redirecting(NOWHERE)), bench.counting("web") as theirs, bench.counting() as ours:
        bench.send()
        assert ours.counts()
        assert theirs.counts() == {}


def test_it_counts_from_its_making_to_its_closing(bench: Bench):
    with bench.running(redirecting(NOWHERE)):
        bench.send()
        with bench.counting() as errors:
            assert errors.counts() == {}
            bench.send(3)
            assert sum(errors.counts().values()) == 3
        bench.send()
        with bench.counting() as errors:
            assert errors.counts() == {}


def test_losses_beyond_the_map_are_counted_together(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(redirects, "_ENTRIES", 1)
    with bench.counting() as errors:
        for to in (NOWHERE, NOWHERE + 1):
            with bench.running(redirecting(to)):
                bench.send()
        assert errors.counts() == {NO_ROOM: 2 * FRAMES}


def test_frames_that_a_socket_does_not_take_are_counted_against_no_interface():
    with echo.own_network():
        echo.veth_pair("a0", "a1")
        with Umem(chunks=64) as umem, umem.open("a1") as sock, RedirectErrors() as errors, echo.fed(sock):
            program = redirecting(socket.if_nametoindex("a0"))
            kernel.prog_test_run_live(program, bytes(60), FRAMES, ingress_ifindex=socket.if_nametoindex("a0"))
            os.close(program)
            lost = Lost(socket.if_nametoindex("a1"), 0, errno.ENOMEM)  # its fill ring is empty
            assert wait_until(lambda: errors.counts() == {lost: FRAMES}, DEADLINE_S), errors.counts()
            assert sock.statistics().rx_dropped == FRAMES


def test_nothing_stays_open(bench: Bench):
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()  # what others have left open
    before = open_files()
    with bench.counting():
        assert open_files() > before
    assert open_files() == before


def test_a_kernel_that_does_not_tell_is_a_missing_feature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("xdp.btf._VMLINUX", tmp_path / "vmlinux")
    with pytest.raises(MissingFeatureError, match=r"failed redirects are not counted: .*CONFIG_DEBUG_INFO_BTF"):
        RedirectErrors()


def test_a_tracepoint_with_other_arguments_is_a_missing_feature(monkeypatch: pytest.MonkeyPatch):
    first = replace(redirects._TRACEPOINTS[0], parameters=7)
    monkeypatch.setattr(redirects, "_TRACEPOINTS", (first,))
    with pytest.raises(MissingFeatureError, match="tracepoint xdp_redirect_err has other arguments"):
        RedirectErrors()


def test_without_privilege_it_says_what_it_needs():
    code = "from xdp.redirects import *\ntry: RedirectErrors()\nexcept MissingFeatureError as error: print(error)"
    plain = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", sys.executable, "-c", code]
    root = Path(redirects.__file__).parent.parent
    said = subprocess.run(plain, capture_output=True, text=True, check=True, cwd=root).stdout
    assert "failed redirects are not counted" in said
    assert "CAP_BPF" in said


def test_an_offset_that_is_no_field_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(redirects.Btf, "offset", lambda *_: 3)
    with pytest.raises(MissingFeatureError, match=r"program xdp_redirect_err: refused by the verifier$"):
        RedirectErrors()
