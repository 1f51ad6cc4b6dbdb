"""A bare AF_XDP loop, without a thought about packets: what sockets cost, and the bar for the engine `afxdp`.

    python -m perf.echo [--bytes N] [--seconds S] [--sink xdp|stack] [--trials N]

prints the rates of receiving only, of an echo (MAC addresses swapped, back through the same socket), and of forwarding
between two sockets of one UMEM, over veth pairs in a network namespace of its own. Frames come from the kernel's
BPF_PROG_TEST_RUN with live frames, on another CPU than the loop when there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import socket
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from dataplane import rings
from dataplane.afxdp import Socket, Umem
from dataplane.libc import POLLIN
from xdp import kernel, links
from xdp.atomic import load_acquire, store_release
from xdp.instructions import R0, R1, R2, R3, REDIRECT, Program, assemble, call, leave, load32, load_map, move_constant
from xdp.jit import compiled

_XDP_DROP, _XDP_PASS = 1, 2
_REDIRECT_MAP = 51  # enum bpf_func_id
_CLONE_NEWNET = 0x40000000
_WAIT_MS = 20
_BURST = 64
_FRAMES_PER_CALL = 1 << 20  # begin and end of a call wait for RCU, 20 ms or so in which nothing is sent
_libc = ctypes.CDLL(None, use_errno=True)


class Act(IntEnum):
    """What the loop does with a frame."""

    DROP = 0
    SEND = 1
    SWAP_AND_SEND = 2


class Word(IntEnum):
    """Shared words of a loop: what it is told, and what it counted."""

    STOP = 0
    RECEIVED = 1
    SENT = 2
    TURNS = 3
    WAITS = 4


@compiled
def swap_macs(frames, addr):
    """Swap destination and source address of the frame at `addr`."""
    for i in range(addr, addr + np.uint64(6)):
        j = i + np.uint64(6)
        frames[i], frames[j] = frames[j], frames[i]


@compiled
def loop(inward, outward, pool, descriptors, polls, words, act):
    """Receive from one queue and send (`act`) to another or the same until `words[STOP]` is set, counting."""
    received = 0
    sent = 0
    turns = 0
    waits = 0
    while load_acquire(words, Word.STOP) == 0:
        turns += 1
        rings.refill(inward, pool)
        count = rings.receive(inward, descriptors, len(descriptors))
        received += count
        taken = 0
        if count > 0 and act != Act.DROP:
            if act == Act.SWAP_AND_SEND:
                for i in range(count):
                    swap_macs(inward.frames, descriptors[i].addr)
            taken = rings.transmit(outward, pool, descriptors, count)
            sent += taken
        rest = descriptors[taken:count]
        rings.release(pool, rest, len(rest))
        store_release(words, Word.RECEIVED, received)
        store_release(words, Word.SENT, sent)
        if count == 0:
            left = rings.kick(outward, pool)
            rings.reap(outward, pool)
            waits += 1
            rings.wait(polls, 1 if left > 0 else _WAIT_MS)
    store_release(words, Word.TURNS, turns)
    store_release(words, Word.WAITS, waits)


class Loop:
    """A thread that runs `loop`; a context manager. Its chunks are back in the shared list afterwards."""

    def __init__(self, inward: Socket, outward: Socket, act: Act, burst: int = _BURST, cpu: int = -1) -> None:
        self.words: npt.NDArray[np.uint64] = np.zeros(16, np.uint64)
        self._pool = inward.umem.new_pool()
        descriptors = np.zeros(burst, rings.DESCRIPTOR)
        polls = np.array([(inward.fd, POLLIN, 0)], rings.POLL)
        self._arguments = (inward.queue, outward.queue, self._pool, descriptors, polls, self.words, int(act))
        self._cpu = cpu
        self._thread = threading.Thread(target=self._run, name="echo")

    def _run(self) -> None:
        if self._cpu >= 0:
            os.sched_setaffinity(0, {self._cpu})
        loop(*self._arguments)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.words[Word.STOP] = 1
        self._thread.join()
        rings.return_all(self._pool)

    def count(self, word: Word) -> int:
        """Return one of the counts, RECEIVED and SENT also while the loop runs."""
        return int(self.words[word])


def verdict_program(verdict: int) -> int:
    """Return the descriptor of a program that gives every packet this XDP verdict."""
    return kernel.prog_load("verdict", assemble([move_constant(R0, verdict), leave()]))


def interface_program(ifindex: int) -> int:
    """Return the descriptor of a program that redirects every packet to an interface."""
    program: Program = [move_constant(R1, ifindex), move_constant(R2, 0), call(REDIRECT), leave()]
    return kernel.prog_load("to_interface", assemble(program))


def socket_program(xskmap: int) -> int:
    """Return the descriptor of a program that redirects to the AF_XDP socket of the packet's queue, if there is one."""
    program: Program = [
        load32(R2, R1, 16),  # ctx->rx_queue_index
        *load_map(R1, xskmap),
        move_constant(R3, _XDP_PASS),
        call(_REDIRECT_MAP),
        leave(),
    ]
    return kernel.prog_load("to_socket", assemble(program))


@contextlib.contextmanager
def attached(program: int, interface: str, mode: links.Mode = "native") -> Iterator[None]:
    """Attach a program to an interface for the duration of the block, then close its descriptor."""
    link = links.create_xdp(program, socket.if_nametoindex(interface), mode)
    try:
        yield
    finally:
        os.close(link)
        os.close(program)


@contextlib.contextmanager
def fed(*sockets: Socket) -> Iterator[None]:
    """Redirect all that arrives at the sockets' interfaces to them for the duration of the block."""
    with contextlib.ExitStack() as stack:
        for interface in sorted({sock.interface for sock in sockets}):
            xskmap = kernel.map_create("sockets", 4, 4, 64, map_type=kernel.XSKMAP)
            stack.callback(os.close, xskmap)
            for sock in sockets:
                if sock.interface == interface:
                    kernel.map_update(xskmap, struct.pack("=I", sock.queue_id), struct.pack("=i", sock.fd))
            stack.enter_context(attached(socket_program(xskmap), interface))
        yield


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Put this thread into a fresh network namespace; it goes when the block ends."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if _libc.unshare(_CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        try:
            yield
        finally:
            _libc.setns(home, _CLONE_NEWNET)
    finally:
        os.close(home)


def veth_pair(near: str, far: str) -> None:
    """Make a veth pair, both ends up, without IPv6 chatter and transmit offloads."""
    queues = ("numtxqueues", "1", "numrxqueues", "1")  # native XDP wants as many receive as the peer's transmit queues
    _ip("link", "add", near, *queues, "type", "veth", "peer", "name", far, *queues)
    for end in (near, far):
        _ip("link", "set", end, "addrgenmode", "none")
        _ip("link", "set", end, "up")


def received_frames(interface: str) -> int:
    """Return the interface's own count of frames received."""
    answer = subprocess.run(["ip", "-s", "-j", "link", "show", interface], check=True, capture_output=True)
    return int(json.loads(answer.stdout)[0]["stats64"]["rx"]["packets"])


def frame_of(length: int) -> bytes:
    """Return a frame from and to locally administered addresses, of an Ethernet type for experiments."""
    return bytes.fromhex("020000000002 020000000001 88b5") + bytes(length - 14)


class Result(NamedTuple):
    """One measurement: rates in frames per second, calls per frame sent (received, if none is)."""

    received_pps: float
    sent_pps: float
    sink_pps: float
    sendto_per_frame: float
    lost: int


def measure(inward: Socket, outward: Socket, act: Act, target: str, sink: str, frame: bytes, seconds: float) -> Result:
    """Run the loop under as many frames as the generator makes, and return what came through."""
    generator = interface_program(socket.if_nametoindex(target))
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[0]})
    with Loop(inward, outward, act, cpu=cpus[-1]) as running:
        while running.count(Word.RECEIVED) == 0:  # compiling
            kernel.prog_test_run_live(generator, frame, 64)
        before = _counts(running, inward, outward, sink)
        start = time.perf_counter()
        while time.perf_counter() < start + seconds:
            kernel.prog_test_run_live(generator, frame, _FRAMES_PER_CALL)
        after = _counts(running, inward, outward, sink)
        elapsed = time.perf_counter() - start
    os.close(generator)
    os.sched_setaffinity(0, set(cpus))
    received, sent, arrived, calls, lost = (new - old for new, old in zip(after, before, strict=True))
    frames = max(1, sent or received)
    return Result(received / elapsed, sent / elapsed, arrived / elapsed, calls / frames, lost)


def _counts(running: Loop, inward: Socket, outward: Socket, sink: str) -> tuple[int, ...]:
    calls = outward.counts()["sendto"]
    lost = inward.lost()
    return (running.count(Word.RECEIVED), running.count(Word.SENT), received_frames(sink), calls, lost)


def main() -> None:
    """Print the three rates: medians, and the range of what was sent (or received)."""
    parser = argparse.ArgumentParser(prog="python -m perf.echo", description=__doc__.partition("\n")[0])
    parser.add_argument("--bytes", type=int, default=64, help="frame length, without FCS")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a trial")
    parser.add_argument("--trials", type=int, default=5, help="of each case, interleaved")
    parser.add_argument("--sink", choices=("xdp", "stack"), default="stack", help="what takes the frames sent")
    options = parser.parse_args()
    with own_network(), contextlib.ExitStack() as stack:
        for near, far in (("a0", "a1"), ("b0", "b1")):
            veth_pair(near, far)
        if options.sink == "xdp":
            for end in ("a0", "b1"):
                stack.enter_context(attached(verdict_program(_XDP_DROP), end))
        umem = stack.enter_context(Umem())
        ingress, egress = umem.open("a1"), umem.open("b0")
        stack.enter_context(fed(ingress))
        cases = {
            "receive": (ingress, ingress, Act.DROP, "a0", "a0"),
            "echo": (ingress, ingress, Act.SWAP_AND_SEND, "a0", "a0"),
            "forward": (ingress, egress, Act.SEND, "a0", "b1"),
        }
        results: dict[str, list[Result]] = {name: [] for name in cases}
        for _ in range(options.trials):
            for name, case in cases.items():
                results[name].append(measure(*case, frame_of(options.bytes), options.seconds))
    for name, trials in results.items():
        middle = Result(*(statistics.median(values) for values in zip(*trials, strict=True)))
        rates = [trial.sent_pps or trial.received_pps for trial in trials]
        fields = (f"{field} {value:.6g}" for field, value in middle._asdict().items())
        print(f"{name:8}", *fields, f"range {min(rates):.6g} to {max(rates):.6g}")


if __name__ == "__main__":
    main()
