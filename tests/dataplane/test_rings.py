"""Rings and pools in plain memory: the test plays the kernel."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataplane import rings
from dataplane.rings import BATCH_CHUNKS, DESCRIPTOR, LOCAL_CHUNKS, Pool, Queue, Ring
from xdp.jit import compiled

CHUNK = 2048
SIZE = 64
ROOT = Path(__file__).resolve().parents[2]


def ring(dtype, cursor=0):
    words = [np.full(1, value, np.uint32) for value in (cursor, cursor, 0)]
    return Ring(*words, np.zeros(SIZE, dtype))


def new_queue(cursor=0):
    return Queue(
        rx=ring(DESCRIPTOR, cursor),
        tx=ring(DESCRIPTOR, cursor),
        fill=ring(np.uint64, cursor),
        completion=ring(np.uint64, cursor),
        lock=np.zeros(1, np.uint64),
        counts=np.zeros(16, np.uint64),
        frames=np.zeros(CHUNK, np.uint8),
        fd=-1,
    )


def new_pools(chunks, workers=1):
    """Return pools over `chunks` chunks, all of them in the shared list."""
    shared = np.arange(chunks, dtype=np.uint64) * np.uint64(CHUNK)
    common = (shared, np.array([chunks]), np.zeros(1, np.uint64), np.uint64(2**64 - CHUNK))
    return [Pool(np.zeros(LOCAL_CHUNKS, np.uint64), np.zeros(1, np.int64), *common) for _ in range(workers)]


def free_chunks(*pools):
    own = [pool.chunks[: pool.free[0]] for pool in pools]
    return sorted(np.concatenate([*own, pools[0].shared_chunks[: pools[0].shared_count[0]]]).tolist())


def descriptors(*addresses):
    return np.array([(address, 60, 0) for address in addresses], DESCRIPTOR)


# Cursors run free modulo 2**32: begin at zero, and where they wrap within the test.
cursors = pytest.mark.parametrize("cursor", [0, 2**32 - 3], ids=["zero", "wrap"])


@cursors
def test_received_frames_come_in_order_and_free_their_slots(cursor):
    queue = new_queue(cursor)
    for i in range(5):
        queue.rx.slots[(cursor + i) % SIZE] = (i * CHUNK + 256, 60 + i, 0)
    queue.rx.producer[:] += np.uint32(5)
    out = np.zeros(SIZE, DESCRIPTOR)
    assert rings.receive(queue, out, 3) == 3
    assert rings.receive(queue, out[3:], 60) == 2
    assert [(int(row["addr"]), int(row["len"])) for row in out[:5]] == [(i * CHUNK + 256, 60 + i) for i in range(5)]
    assert queue.rx.consumer[0] == queue.rx.producer[0]
    assert rings.receive(queue, out, 64) == 0


@cursors
def test_refill_fills_the_ring_and_no_more(cursor):
    queue, (pool,) = new_queue(cursor), new_pools(100)
    assert rings.refill(queue, pool) == SIZE
    assert rings.refill(queue, pool) == 0
    assert sorted([*free_chunks(pool), *queue.fill.slots.tolist()]) == [i * CHUNK for i in range(100)]


def test_refill_with_too_few_chunks_gives_what_there_is_and_counts_it():
    queue, (pool,) = new_queue(), new_pools(10)
    assert rings.refill(queue, pool) == 10
    assert queue.counts[rings.Count.FILL_SHORT] == 1
    assert free_chunks(pool) == []


def test_a_fill_ring_that_lacks_only_a_few_is_left_alone():
    queue, (pool,) = new_queue(), new_pools(100)
    rings.refill(queue, pool)
    queue.fill.consumer[:] += np.uint32(rings.REFILL_CHUNKS - 1)
    assert rings.refill(queue, pool) == 0
    queue.fill.consumer[:] += np.uint32(1)
    assert rings.refill(queue, pool) == rings.REFILL_CHUNKS


@cursors
def test_submit_takes_what_the_ring_has_room_for(cursor):
    queue, (pool,) = new_queue(cursor), new_pools(0)
    frames = descriptors(*(i * CHUNK for i in range(SIZE + 10)))
    assert rings.submit(queue, pool, frames, len(frames)) == SIZE
    assert rings.submit(queue, pool, frames[SIZE:], 10) == 0
    queue.tx.consumer[:] += np.uint32(4)
    assert rings.submit(queue, pool, frames[SIZE:], 10) == 4
    assert queue.tx.slots[(cursor + 3) % SIZE]["addr"] == (SIZE + 3) * CHUNK
    assert queue.lock[0] == 0


@cursors
def test_completed_frames_return_as_whole_chunks(cursor):
    queue, (pool,) = new_queue(cursor), new_pools(0)
    pool = replace(pool, shared_chunks=np.zeros(10, np.uint64))
    for i in range(7):
        queue.completion.slots[(cursor + i) % SIZE] = i * CHUNK + 256 + i
    queue.completion.producer[:] += np.uint32(7)
    assert rings.reap(queue, pool) == 7
    assert rings.reap(queue, pool) == 0
    assert free_chunks(pool) == [i * CHUNK for i in range(7)]


def test_a_pool_that_overflows_spills_and_one_that_is_dry_draws():
    near, far = new_pools(BATCH_CHUNKS, workers=2)
    assert rings.take_chunk(near, np.zeros(1, np.uint64))
    assert near.free[0] == BATCH_CHUNKS - 1
    assert near.shared_count[0] == 0
    assert not rings.take_chunk(far, np.zeros(1, np.uint64))
    near, far = (replace(pool, shared_chunks=np.zeros(4096, np.uint64)) for pool in (near, far))
    near.free[0] = 0
    for i in range(LOCAL_CHUNKS + 1):
        rings.put_chunk(near, np.uint64(i * CHUNK))
    assert near.shared_count[0] == BATCH_CHUNKS
    far = replace(far, shared_chunks=near.shared_chunks)
    assert rings.take_chunk(far, np.zeros(1, np.uint64))
    assert far.free[0] == BATCH_CHUNKS - 1


@compiled
def churn(pool, held, rounds, seed):
    """Take and put chunks in uneven bursts, with room for 700 in `held`; return whether a chunk came twice."""
    count = 0
    state = np.uint64(seed)
    for _ in range(rounds):
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        wanted = np.int64((state >> np.uint64(33)) % np.uint64(700))
        while count < wanted and rings.take_chunk(pool, held[count : count + 1]):
            count += 1
        while count > wanted:
            count -= 1
            rings.put_chunk(pool, held[count])
    for i in range(count):
        rings.put_chunk(pool, held[i])


@pytest.mark.faults(89)
def test_workers_that_trade_chunks_lose_and_double_none():
    pools = new_pools(1000, workers=4)  # fewer than they want together
    threads = [
        threading.Thread(target=churn, args=(pool, np.zeros(700, np.uint64), 5000, seed))
        for seed, pool in enumerate(pools)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert free_chunks(*pools) == [i * CHUNK for i in range(1000)]
    for pool in pools:
        rings.return_all(pool)
    assert pools[0].shared_count[0] == 1000


@compiled
def count_under_lock(word, counter, rounds):
    for _ in range(rounds):
        rings.lock(word)
        counter[0] += 1
        rings.unlock(word)


def test_the_lock_excludes():
    word, counter = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    threads = [threading.Thread(target=count_under_lock, args=(word, counter, 50_000)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter[0] == 150_000


@pytest.mark.faults(90)
def test_kicking_a_dead_socket_returns():
    queue, (pool,) = new_queue(), new_pools(0)
    queue.tx.flags[0] = 1
    assert rings.submit(queue, pool, descriptors(0), 1) == 1
    assert rings.kick(queue, pool) == 1
    assert queue.counts[rings.Count.TX_STALLED] == 1


def test_wait_ends_with_its_time_or_its_event():
    read, write = os.pipe()
    try:
        polls = np.array([(read, 1, 0)], rings.POLL)
        assert rings.wait(polls, 1) == 0
        os.write(write, b"x")
        assert rings.wait(polls, 10_000) == 1
    finally:
        os.close(read)
        os.close(write)


CACHED = """
import sys
import numpy as np
from dataplane import rings
rings.wait(np.zeros(0, rings.POLL), 0)
print("numba" in sys.modules)
"""


def test_a_second_process_compiles_nothing(tmp_path):
    # Calls into the C library by symbol name can be cached, pointers could not.
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", CACHED], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert [run.stdout.split() for run in runs] == [["True"], ["False"]]
