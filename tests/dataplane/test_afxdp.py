"""AF_XDP sockets on veth pairs in a network namespace of the test's own:

a0 ---- a1 [sockets] b0 ---- b1
"""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataplane import rings
from dataplane.afxdp import NoZeroCopyError, Umem
from perf import echo
from perf.echo import Act, Loop, Word
from xdp import kernel
from xdp.errors import AttachError, UsageError

pytestmark = [pytest.mark.root, pytest.mark.bpf]

ROOT = Path(__file__).resolve().parents[2]
RING = 64
FRAME = echo.frame_of(60)
DEADLINE_S = 10


@pytest.fixture
def network():
    with echo.own_network():
        for near, far in (("a0", "a1"), ("b0", "b1")):
            echo.veth_pair(near, far)
        yield


@pytest.fixture
def umem(network):
    with Umem(chunks=1024) as memory:
        yield memory


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


def until(claim):
    """Wait until `claim()` holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)


def inject(interface, frame=FRAME, count=1):
    """Let `count` frames arrive at the other end of `interface`."""
    program = echo.interface_program(socket.if_nametoindex(interface))
    # The kernel sends a whole page-pool of copies of what it is given; up to 64 go at a time.
    kernel.prog_test_run_live(program, frame, count, batch_size=min(64, count))


@contextlib.contextmanager
def tap(interface):
    """Open a raw socket that sees what arrives at `interface`."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as raw:
        raw.bind((interface, 3))
        raw.settimeout(DEADLINE_S)
        yield raw


def frames_of(umem, count, length=60):
    """Return descriptors of `count` fresh frames and the pool that they came from."""
    pool = umem.new_pool()
    out = np.zeros(count, rings.DESCRIPTOR)
    chunk = np.zeros(1, np.uint64)
    for row in out:
        assert rings.take_chunk(pool, chunk)
        start = int(chunk[0])
        umem.frames[start : start + length] = np.frombuffer(FRAME.ljust(length, b"\0"), np.uint8)
        row["addr"], row["len"] = start, length
    return out, pool


def assert_every_chunk_is_once(umem, kernel_holds=0):
    places = umem.whereabouts()
    everything = np.sort(np.concatenate(list(places.values())))
    assert everything.tolist() == [i * umem.chunk_bytes for i in range(umem.chunks)], {
        k: len(v) for k, v in places.items()
    }
    assert len(places["kernel"]) <= kernel_holds


def settle(*sockets):
    """Wait until nothing is in flight: what left the TX rings is on the completion rings, or back in a pool."""
    pool = sockets[0].umem.new_pool()
    for sock in sockets:
        until(lambda sock=sock: rings.kick(sock.queue, pool) == 0)
        until(lambda sock=sock: sock.queue.completion.producer[0] == sock.queue.tx.consumer[0])
        rings.reap(sock.queue, pool)


def test_a_frame_crosses_two_sockets_without_a_copy(umem):
    inward, outward = umem.open("a1"), umem.open("b0")
    pool, descriptors = umem.new_pool(), np.zeros(8, rings.DESCRIPTOR)
    rings.refill(inward.queue, pool)
    with echo.fed(inward), tap("b1") as sink:
        inject("a0")
        until(lambda: rings.receive(inward.queue, descriptors, 8) == 1)
        start, length = int(descriptors[0]["addr"]), int(descriptors[0]["len"])
        assert umem.frames[start : start + length].tobytes() == FRAME
        assert rings.transmit(outward.queue, pool, descriptors, 1) == 1
        assert outward.queue.tx.slots[0] == descriptors[0]
        assert sink.recv(2048) == FRAME
    until(lambda: rings.reap(outward.queue, pool) == 1)
    assert_every_chunk_is_once(umem)


def test_traffic_in_both_directions_keeps_every_chunk(umem):
    left, right = umem.open("a1", ring_entries=RING), umem.open("b0", ring_entries=RING)
    with echo.fed(left, right), contextlib.ExitStack() as stack:
        for far in ("a0", "b1"):
            stack.enter_context(echo.attached(echo.verdict_program(1), far))
        with Loop(left, right, Act.SEND) as eastward, Loop(right, left, Act.SEND) as westward:
            until(lambda: left.queue.fill.producer[0] and right.queue.fill.producer[0])  # compiled and running
            for _ in range(20):
                inject("a0", count=500)
                inject("b1", count=500)
            until(lambda: eastward.count(Word.SENT) > RING and westward.count(Word.SENT) > RING)
    settle(left, right)
    # The kernel keeps the chunk of a frame for which the RX ring had no room, one for each socket at most.
    assert_every_chunk_is_once(umem, kernel_holds=2)


@pytest.mark.faults(88)
def test_an_empty_fill_ring_loses_frames_counts_them_and_heals(umem):
    sock, pool, descriptors = umem.open("a1"), umem.new_pool(), np.zeros(8, rings.DESCRIPTOR)
    with echo.fed(sock):
        inject("a0", count=3)
        until(lambda: sock.statistics().lost == 3)
        assert sock.statistics().rx_fill_ring_empty_descs == 3
        rings.refill(sock.queue, pool)
        inject("a0")
        until(lambda: rings.receive(sock.queue, descriptors, 8) == 1)


@pytest.mark.faults(88)
def test_a_full_rx_ring_loses_frames_and_counts_them_but_no_chunk(umem):
    sock, pool, descriptors = umem.open("a1", ring_entries=RING), umem.new_pool(), np.zeros(256, rings.DESCRIPTOR)
    with echo.fed(sock):
        rings.refill(sock.queue, pool)
        inject("a0", count=RING)
        until(lambda: rings.distance(sock.queue.rx.producer[0], sock.queue.rx.consumer[0]) == RING)
        rings.refill(sock.queue, pool)
        inject("a0", count=10)
        until(lambda: sock.statistics().rx_ring_full == 10)
        assert rings.receive(sock.queue, descriptors, 256) == RING
        rings.release(pool, descriptors, RING)
        inject("a0")
        until(lambda: rings.receive(sock.queue, descriptors, 256) == 1)
        rings.release(pool, descriptors, 1)
    assert_every_chunk_is_once(umem, kernel_holds=1)


@pytest.mark.faults(88)
def test_a_burst_larger_than_the_ring_goes_out_whole(umem):
    sock = umem.open("b0", ring_entries=RING)
    frames, pool = frames_of(umem, 2 * RING)
    before = echo.received_frames("b1")
    assert rings.transmit(sock.queue, pool, frames, len(frames)) == len(frames)
    assert sock.counts()["tx_full"] == 0
    until(lambda: echo.received_frames("b1") - before == len(frames))
    until(lambda: rings.reap(sock.queue, pool) >= 0 and pool.free[0] + pool.shared_count[0] == umem.chunks)


@pytest.mark.faults(88)
def test_completions_that_nobody_drained_do_not_stop_transmission(umem):
    sock = umem.open("b0", ring_entries=RING)
    frames, pool = frames_of(umem, 2 * RING)
    assert rings.transmit(sock.queue, pool, frames, RING) == RING
    until(lambda: rings.distance(sock.queue.completion.producer[0], sock.queue.completion.consumer[0]) == RING)
    for i, row in enumerate(frames[RING:]):  # as `submit` does, but without reaping
        sock.queue.tx.slots[i] = row
    sock.queue.tx.producer[:] += np.uint32(RING)
    assert rings.kick(sock.queue, pool) == 0
    until(lambda: rings.reap(sock.queue, pool) >= 0 and pool.free[0] + pool.shared_count[0] == umem.chunks)


@pytest.mark.faults(90)
def test_an_interface_that_is_down_keeps_what_fits_and_refuses_the_rest(umem):
    sock = umem.open("b0", ring_entries=RING)
    ip("link", "set", "b0", "down")
    frames, pool = frames_of(umem, RING + 10)
    assert rings.transmit(sock.queue, pool, frames, RING + 10) == RING
    assert sock.counts()["tx_full"] == 10
    assert rings.kick(sock.queue, pool) == RING
    ip("link", "set", "b0", "up")
    before = echo.received_frames("b1")
    until(lambda: rings.kick(sock.queue, pool) == 0)
    until(lambda: echo.received_frames("b1") - before == RING)


@pytest.mark.faults(90)
def test_a_deleted_interface_stops_nothing_and_its_chunks_return(umem):
    first, second = umem.open("a1", ring_entries=RING), umem.open("b0", ring_entries=RING)
    pool = umem.new_pool()
    for sock in (first, second):
        rings.refill(sock.queue, pool)
    ip("link", "delete", "a0")
    frames, sender = frames_of(umem, 4)
    assert rings.transmit(first.queue, sender, frames, 2) == 2
    assert rings.kick(first.queue, sender) == 2
    assert rings.transmit(second.queue, sender, frames[2:], 2) == 2
    echo.veth_pair("c0", "c1")
    third = umem.open("c0")  # the first socket is dead, the second lends the memory
    first.close()
    settle(second)
    assert third.mode == "copy"
    assert_every_chunk_is_once(umem)


def test_a_umem_outlives_all_its_sockets(umem):
    for _ in range(3):
        sock = umem.open("a1", ring_entries=RING)
        pool = umem.new_pool()
        rings.refill(sock.queue, pool)
        rings.return_all(pool)
        sock.close()
    assert_every_chunk_is_once(umem)


@pytest.mark.faults(92)
def test_a_closed_socket_frees_its_queue_though_arrays_remain(umem):
    sock = umem.open("a1")
    queue = sock.queue
    sock.close()
    with umem.open("a1"):
        assert queue.rx.producer[0] == 0
        assert rings.receive(queue, np.zeros(1, rings.DESCRIPTOR), 1) == 0


def test_chunks_that_went_down_with_a_socket_can_be_reclaimed(umem):
    sock = umem.open("b0")
    frames_of(umem, 5)[1].free[0] -= 3  # as if three were in flight when the socket closed
    sock.close()
    assert umem.reclaim() == 5 + 3
    assert_every_chunk_is_once(umem)


@pytest.mark.faults(89)
def test_descriptors_beyond_the_umem_are_refused_and_counted(umem):
    sock = umem.open("b0", ring_entries=RING)
    frames, pool = frames_of(umem, 2)
    frames[0]["addr"] = umem.chunks * umem.chunk_bytes
    before = echo.received_frames("b1")
    assert rings.transmit(sock.queue, pool, frames, 2) == 2
    until(lambda: rings.kick(sock.queue, pool) == 0)
    assert sock.statistics().tx_invalid_descs == 1
    until(lambda: echo.received_frames("b1") - before == 1)
    sock.queue.fill.slots[0] = umem.chunks * umem.chunk_bytes
    sock.queue.fill.producer[:] = 1
    with echo.fed(sock):
        inject("b1")
        until(lambda: sock.statistics().rx_dropped == 1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        pytest.param(("a1", 0), UsageError, "a1 queue 0: has a socket", id="open already"),
        pytest.param(("eth9", 0), UsageError, "eth9: no such interface", id="no interface"),
        pytest.param(("b0", 7), AttachError, "ethtool -l b0", id="no queue"),
    ],
)
def test_what_cannot_be_bound_is_explained(umem, arguments, error, words):
    umem.open("a1")
    with pytest.raises(error, match=words):
        umem.open(*arguments)


@pytest.mark.faults(92)
def test_a_queue_that_another_program_holds_is_explained(umem):
    umem.open("a1")
    with Umem(chunks=64) as other, pytest.raises(AttachError, match="a1 queue 0: in use by another AF_XDP socket"):
        other.open("a1")


@pytest.mark.faults(92)
def test_zero_copy_that_the_driver_lacks_is_explained(umem):
    with pytest.raises(NoZeroCopyError, match="a1 queue 0: the driver has no zero-copy mode"):
        umem.open("a1", mode="zero-copy")
    assert umem.open("a1").mode == "copy"


def test_sockets_are_of_their_memorys_mode(network):
    with Umem(chunks=64, mode="zero-copy") as umem:
        with pytest.raises(NoZeroCopyError):
            umem.open("a1")
        assert umem.open("a1", mode="copy").mode == "copy"


def test_ring_sizes_are_powers_of_two(umem):
    with pytest.raises(UsageError, match="power of two"):
        umem.open("a1", ring_entries=100)


WITHOUT = """
from dataplane.afxdp import Umem
from xdp.errors import MissingFeatureError
try:
    Umem(chunks=32768).open("a1")
except MissingFeatureError as error:
    print(error)
"""


@pytest.mark.faults(112)
@pytest.mark.parametrize(
    ("capabilities", "words"),
    [
        pytest.param("-net_raw", "CAP_NET_RAW", id="no packet sockets"),
        pytest.param("-ipc_lock", "RLIMIT_MEMLOCK", id="no locked memory"),
    ],
)
@pytest.mark.usefixtures("network")
def test_a_missing_privilege_is_named(capabilities, words):
    command = ["setpriv", "--bounding-set", capabilities, sys.executable, "-c", WITHOUT]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert words in run.stdout


def test_a_socket_that_prefers_busy_polling_receives(umem):
    sock, pool, descriptors = umem.open("a1", busy_poll_us=20), umem.new_pool(), np.zeros(8, rings.DESCRIPTOR)
    rings.refill(sock.queue, pool)
    with echo.fed(sock):
        inject("a0")
        until(lambda: rings.drive(sock.queue) is None and rings.receive(sock.queue, descriptors, 8) == 1)
