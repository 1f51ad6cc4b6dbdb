"""The generator and the sink: frames that the kernel sends as fast as it can, and what arrives of them.

`Generator` runs perf/bpf/generate.c over live frames (BPF_PROG_TEST_RUN): about 6 million frames per second and CPU,
every header field of each written anew. `Sink` counts at the far end with perf/bpf/sink.c. Both talk with their program
through words in mapped memory, so that looking costs nothing.
"""

from __future__ import annotations

import math
import mmap
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, NamedTuple, Self

import cffi
import numpy as np
import numpy.typing as npt

from perf.world import Host
from xdp import kernel, loader

PROGRAMS = Path(__file__).parent / "bpf"
PINS = Path("/run/turnout/bpf")
_ffi = cffi.FFI()
_ffi.cdef((PROGRAMS / "words.h").read_text().replace("#pragma once", ""))


def _enum(name: str, kind: str, prefix: str = "") -> Any:
    members = _ffi.typeof(f"enum {kind}").relements
    return IntEnum(name, {key.removeprefix(prefix): value for key, value in members.items()})


Order = _enum("Order", "order", "ORDER_")
Seen = _enum("Seen", "seen", "SEEN_")
Task = _enum("Task", "sink_task", "TASK_")
Traffic = _enum("Traffic", "traffic")

_LOOPBACK = 1
_RUN = 65536  # frames of one system call when nobody waits for answers
_BATCH = 64
_NO_PROGRESS_S = 0.1  # frames that are not there by now were lost; on a busy machine a thread waits for its turn


def mac_word(mac: str) -> int:
    """Return the six bytes of a MAC as the low end of a u64 in this machine's memory."""
    return int.from_bytes(bytes.fromhex(mac.replace(":", "")), "little")


class Words:
    """An array map of rows of u64 words, pinned in `folder` for programs and mapped for us."""

    def __init__(self, folder: Path, name: str, rows: int, words: int) -> None:
        self.fd = kernel.map_create(name, 4, 8 * words, rows, kernel.MMAPABLE)
        kernel.replace_pin(self.fd, folder / name)
        size = -(-rows * words * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.rows: npt.NDArray[np.uint64] = np.frombuffer(memory, np.uint64, rows * words).reshape(rows, words)

    def close(self) -> None:
        """Close the descriptor; the memory goes with the last array."""
        os.close(self.fd)


def load_program(folder: Path, source: str, function: str, defines: Mapping[str, int] | None = None) -> int:
    """Compile `function` of perf/bpf/`source` over the maps pinned in `folder`; return the program's descriptor."""
    return loader.load(folder, PROGRAMS / source, function, defines)


@dataclass(frozen=True)
class Stream:
    """What a generator sends: UDP from many clients to one frontend. MACs as text, `interface` of the sending host."""

    interface: str
    src_mac: str
    dst_mac: str
    src: IPv4Address  # the first client; a client has SOURCE_PORTS flows
    dst: IPv4Address
    dst_port: int


class Sent(NamedTuple):
    """What a generator did: frames sent, frames known to be lost, and the seconds that it took."""

    frames: int
    lost: int
    seconds: float


class Generator:
    """A context manager: sends frames of a Stream out of an interface of a host, from the calling thread's CPU."""

    def __init__(self, host: Host, stream: Stream, folder: Path) -> None:
        self._host = host
        self._folder = folder
        self._stream = stream
        self._stack = ExitStack()
        self._frame = bytes(int(Traffic.FRAME_BYTES))
        self._program = -1

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._words = Words(self._folder, "orders", 1, int(Order.ORDERS))
            stack.callback(self._words.close)
            self._program = load_program(self._folder, "generate.c", "generate")
            stack.callback(os.close, self._program)
            with self._host.entered():
                ifindex = socket.if_nametoindex(self._stream.interface)
                # A test run puts its program into the kernel's XDP dispatcher and takes it out again, each time with
                # an RCU grace period (24 ms in all), unless it is there already. So it is attached where nothing comes.
                stack.callback(os.close, kernel.link_create_xdp(self._program, _LOOPBACK, "generic"))
            row, stream = self._words.rows[0], self._stream
            row[Order.DST_MAC], row[Order.SRC_MAC] = mac_word(stream.dst_mac), mac_word(stream.src_mac)
            row[Order.SRC_ADDR], row[Order.DST_ADDR] = int(stream.src), int(stream.dst)
            row[Order.DST_PORT], row[Order.IFINDEX] = stream.dst_port, ifindex
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def next_flow(self) -> int:
        """The flow of the next frame."""
        return int(self._words.rows[0][Order.NEXT])

    def choose(self, flows: int, first: int = 0) -> None:
        """Send flows `first` to `flows` in turn from now on; 0 flows: every frame is a flow of its own."""
        self._words.rows[0][Order.NEXT] = first
        self._words.rows[0][Order.FLOWS] = flows

    def send(self, frames: int) -> None:
        """Send so many frames at once, without a thought about who takes them."""
        with self._host.entered():
            while frames > 0:
                part = min(frames, _RUN)
                kernel.prog_test_run_live(self._program, self._frame, part, min(part, _BATCH))
                frames -= part

    def send_for(self, seconds: float) -> Sent:
        """Send without pause for about so long. What was lost is for the caller to find out."""
        frames, start = 0, time.perf_counter()
        with self._host.entered():
            while True:
                kernel.prog_test_run_live(self._program, self._frame, _RUN, _BATCH)
                frames += _RUN
                elapsed = time.perf_counter() - start
                if elapsed >= seconds:
                    return Sent(frames, 0, elapsed)

    def send_in_step(self, sink: Sink, *, frames: int, seconds: float = math.inf, window: int = 1024) -> Sent:
        """Send up to `frames` for up to `seconds`, never more than `window` ahead of the sink.

        Nothing is lost for want of room in a ring that holds the window: this finds the rate without loss of a
        device that has another CPU to itself. Frames that do not arrive for 100 ms count as lost, and that wait is
        not counted as time.
        """
        part = window // 2
        begin = sink.packets()
        sent = lost = 0
        idle = 0.0
        start = time.perf_counter()
        with self._host.entered():
            while sent < frames and time.perf_counter() - start - idle < seconds:
                now = min(part, frames - sent)
                kernel.prog_test_run_live(self._program, self._frame, now, min(now, _BATCH))
                sent += now
                missing, waited = self._wait(sink, begin + sent - lost, window - part)
                lost, idle = lost + missing, idle + waited
            missing, waited = self._wait(sink, begin + sent - lost, 0)
        return Sent(sent, lost + missing, time.perf_counter() - start - idle - waited)

    @staticmethod
    def _wait(sink: Sink, expected: int, room: int) -> tuple[int, float]:
        """Wait until at most `room` of the `expected` are missing; return (frames given up, seconds it took if any)."""
        progress = time.perf_counter()
        behind = expected - sink.packets()
        while behind > room:
            os.sched_yield()  # the receiver may need this CPU
            now_behind = expected - sink.packets()
            now = time.perf_counter()
            if now_behind < behind:
                behind, progress = now_behind, now
            elif now - progress > _NO_PROGRESS_S:
                return behind, now - progress
        return 0, 0.0


class Sink:
    """A context manager: counts and drops what arrives at an interface of a host, by XDP in native mode."""

    def __init__(self, host: Host, interface: str, endpoint_port: int, folder: Path) -> None:
        self._host = host
        self._interface = interface
        self._port = endpoint_port
        self._folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._words = Words(self._folder, "seen", os.cpu_count() or 1, int(Seen.SEENS))
            stack.callback(self._words.close)
            self._task = Words(self._folder, "task", 1, 1)
            stack.callback(self._task.close)
            program = load_program(self._folder, "sink.c", "sink", {"ENDPOINT_PORT": self._port})
            stack.callback(os.close, program)
            with self._host.entered():
                ifindex = socket.if_nametoindex(self._interface)
                stack.callback(os.close, kernel.link_create_xdp(program, ifindex, "native"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def doing(self, task: int) -> Iterator[None]:
        """Give the sink one of the Tasks for the duration of the block; otherwise it drops what it has counted."""
        self._task.rows[0, 0] = task
        try:
            yield
        finally:
            self._task.rows[0, 0] = Task.DROP

    def count(self, word: int) -> int:
        """Return one of the Seen counts, over all CPUs."""
        return int(self._words.rows[:, word].sum())

    def packets(self) -> int:
        """Return the number of the generator's packets that have arrived."""
        return self.count(Seen.PACKETS)

    def settled(self, quiet_s: float = 0.01) -> int:
        """Wait until nothing more arrives; return the number of packets that have arrived."""
        count = self.packets()
        while True:
            time.sleep(quiet_s)
            now = self.packets()
            if now == count:
                return count
            count = now
