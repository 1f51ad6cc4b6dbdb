"""The generator and the sink: frames that the kernel sends as fast as it can, and what arrives of them.

`Generator` runs perf/bpf/generate.c over live frames (BPF_PROG_TEST_RUN): about 6 million frames per second and CPU,
every header field of each written anew. `Sink` counts at the far end with perf/bpf/sink.c. Both talk with their program
through words in mapped memory, so that looking costs nothing. A `Kit` has the programs: they are compiled once and work
in every testbed of a run, which differ by words, not by code.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, Self

import cffi
import numpy as np
import numpy.typing as npt

from perf.world import Host
from xdp import kernel, links, loader, mounts
from xdp.addresses import IPAddress
from xdp.errors import AttachError
from xdp.schema import Protocol

PROGRAMS = Path(__file__).parent / "bpf"
PINS = Path("/run/turnout/bpf")
SERVICE_PORT, ENDPOINT_PORT = 80, 8080
_ffi = cffi.FFI()
_ffi.cdef((PROGRAMS / "words.h").read_text().replace("#pragma once", ""))


def _enum(name: str, kind: str, prefix: str = "") -> Any:
    members = _ffi.typeof(f"enum {kind}").relements
    return IntEnum(name, {key.removeprefix(prefix): value for key, value in members.items()})


Order = _enum("Order", "order", "ORDER_")
Step = _enum("Step", "step", "STEP_")
Seen = _enum("Seen", "seen", "SEEN_")
Told = _enum("Told", "told", "TOLD_")
Task = _enum("Task", "sink_task", "TASK_")
Delay = _enum("Delay", "delays", "DELAY_")
Traffic = _enum("Traffic", "traffic")

_LOOPBACK = 1
_RUN = 65536  # frames of one system call when nobody waits for answers
_BATCH = 64
_SMALL_BATCH = 16  # where it matters that a frame waits for the rest of its batch
_FIRST_NEW = 1 << 21  # flows below are known ones
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
    """What a generator sends: from many clients to one frontend or, as replies, back. MACs as text.

    `interface` is the sending host's. In replies `server` is the endpoint.
    """

    interface: str
    src_mac: str
    dst_mac: str
    client: IPAddress  # the first; a client has SOURCE_PORTS flows
    server: IPAddress
    server_port: int
    protocol: Protocol = Protocol.UDP
    is_reply: bool = False
    vlan: int = 0  # of the tag that every frame has; 0: none


@dataclass(frozen=True)
class Load:
    """Which frames of a stream are sent: known flows in turn, and every `new_every`th frame begins a flow (0: none).

    Of `services` Services with consecutive addresses, the stream's is the last. `frame_bytes` are without the frame
    check sequence, and more if the stream's frames take more; `is_mixed`: 64, 594 and 1518 bytes as 7 : 4 : 1 instead.
    """

    flows: int = 1000
    new_every: int = 0
    services: int = 1
    frame_bytes: int = int(Traffic.FRAME_BYTES)
    is_mixed: bool = False


def least_frame(family: int, vlan: int) -> int:
    """Return the bytes of the shortest frames of a family, with a tag if there is a VLAN."""
    return int(Traffic.FRAME6_BYTES if family == 6 else Traffic.FRAME_BYTES) + (int(Traffic.VLAN_TAG) if vlan else 0)


def _number(address: IPAddress) -> int:
    """Return what tells an address from others of its network."""
    return int(address) & 0xFFFFFFFF


def _net(address: IPAddress) -> int:
    """Return the first eight bytes of an IPv6 address as they lie in memory; of IPv4 there is no need."""
    assert address.version == 4 or not any(address.packed[8:12])
    return int.from_bytes(address.packed[:8], "little") if address.version == 6 else 0


def _sum_of_nets(*addresses: IPAddress) -> int:
    packed = b"".join(address.packed[:8] for address in addresses if address.version == 6)
    return sum(int.from_bytes(packed[at : at + 2]) for at in range(0, len(packed), 2))


class Sent(NamedTuple):
    """What a generator did: frames sent, frames known to be lost, and the seconds that it took."""

    frames: int
    lost: int
    seconds: float


class Kit:
    """A context manager: the programs of generators and sinks over maps in `folder`, compiled when first wanted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._programs: dict[tuple[object, ...], int] = {}
        self._words: dict[str, Words] = {}
        self._holder: Generator | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            mounts.mount_bpffs(PINS)
            self._folder.mkdir(parents=True, exist_ok=True)
            stack.callback(self._remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _remove(self) -> None:
        for program in self._programs.values():
            os.close(program)
        for words in self._words.values():
            words.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def words(self, name: str, rows: int, words: int) -> Words:
        """Return the words of this name, below the kit's folder."""
        if name not in self._words:
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            self._words[name] = Words(path.parent, path.name, rows, words)
        return self._words[name]

    def program(self, source: str, folder: str, **defines: int) -> int:
        """Return the program that `source` defines under its own name, over the maps in the folder of this name."""
        key = (source, folder, *sorted(defines.items()))
        if key not in self._programs:
            function = source.removesuffix(".c")
            self._programs[key] = load_program(self._folder / folder, source, function, defines)
        return self._programs[key]

    def hand_over(self, orders: npt.NDArray[np.uint64], generator: Generator) -> None:
        """Put a generator's own orders where the program reads them, unless they are there."""
        if self._holder is not generator:
            if self._holder is not None:
                self._holder.orders[:] = orders
            orders[:] = generator.orders
            self._holder = generator


class Generator:
    """Sends frames of a Stream out of an interface of a host, from the calling thread's CPU. A context manager."""

    def __init__(self, kit: Kit, host: Host, stream: Stream) -> None:
        self._kit = kit
        self._host = host
        self._stream = stream
        self._stack = ExitStack()
        self._frame = bytes(int(Traffic.FRAME_BYTES))
        self.orders: npt.NDArray[np.uint64] = np.zeros(int(Order.ORDERS), np.uint64)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stream, row = self._stream, self.orders
            self._shared = self._kit.words("generator/orders", 1, int(Order.ORDERS)).rows[0]
            kind = {"PROTOCOL": int(stream.protocol), "FAMILY": stream.server.version, "VLAN": stream.vlan}
            self._program = self._kit.program("generate.c", "generator", REPLY=int(stream.is_reply), **kind)
            with self._host.entered():
                row[Order.IFINDEX] = socket.if_nametoindex(stream.interface)
                # A test run puts its program into the kernel's XDP dispatcher and takes it out again, each time with
                # an RCU grace period (24 ms in all), unless it is there already. So it is attached where nothing comes.
                with contextlib.suppress(AttachError):  # another generator of this host is there
                    stack.callback(os.close, links.create_xdp(self._program, _LOOPBACK, "generic"))
            row[Order.DST_MAC], row[Order.SRC_MAC] = mac_word(stream.dst_mac), mac_word(stream.src_mac)
            row[Order.CLIENT], row[Order.SERVER] = _number(stream.client), _number(stream.server)
            row[Order.CLIENT_NET], row[Order.SERVER_NET] = _net(stream.client), _net(stream.server)
            row[Order.NET_SUM] = _sum_of_nets(stream.client, stream.server)
            row[Order.SERVER_PORT], row[Order.NEXT_NEW] = stream.server_port, _FIRST_NEW
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _order(self, **words: int) -> None:
        self._kit.hand_over(self._shared, self)
        for name, value in words.items():
            self._shared[Order[name]] = value

    @property
    def next_new(self) -> int:
        """The flow that is begun next."""
        self._kit.hand_over(self._shared, self)
        return int(self._shared[Order.NEXT_NEW])

    def choose(self, load: Load) -> None:
        """Send this from now on. Flows that are begun were never begun before."""
        least = least_frame(self._stream.server.version, self._stream.vlan)
        self._frame = bytes(int(Traffic.LONGEST_FRAME) if load.is_mixed else max(load.frame_bytes, least))
        self._order(
            NEXT=0,
            FLOWS=load.flows,
            NEW_EVERY=load.new_every,
            SINCE_NEW=0,
            SERVERS=load.services,
            SERVER=_number(self._stream.server) - (load.services - 1),
            STAMPED=0,
            MIXED=int(load.is_mixed),
        )

    def _send(self, frames: int, batch: int = _BATCH) -> None:
        kernel.prog_test_run_live(self._program, self._frame, frames, min(frames, batch))

    def send(self, frames: int) -> None:
        """Send so many frames at once, without a thought about who takes them."""
        self._order()
        with self._host.entered():
            while frames > 0:
                self._send(min(frames, _RUN))
                frames -= _RUN

    def send_for(self, seconds: float) -> Sent:
        """Send without pause for about so long. What was lost is for the caller to find out."""
        self._order()
        frames, start = 0, time.perf_counter()
        with self._host.entered():
            while True:
                self._send(_RUN)
                frames += _RUN
                elapsed = time.perf_counter() - start
                if elapsed >= seconds:
                    return Sent(frames, 0, elapsed)

    def send_paced(self, rate_pps: float, burst: int, seconds: float, until: Callable[[], bool] = bool) -> Sent:
        """Send bursts on schedule until the time is over or `until` says so; stamps say when each frame was due.

        A burst that begins late, because the last one took too long, counts from when it should have begun.
        """
        self._order(STAMPED=1)
        interval = burst / rate_pps
        start = due = time.perf_counter()
        frames = 0
        with self._host.entered():
            now = start
            while now < start + seconds and not until():
                now = time.perf_counter()
                while now < due:
                    now = time.perf_counter()
                self._shared[Order.LATE] = int((now - due) * 1e9)
                self._send(burst, _SMALL_BATCH)
                frames += burst
                due += interval
        self._shared[Order.STAMPED] = 0
        return Sent(frames, 0, time.perf_counter() - start)

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
        self._order()
        start = time.perf_counter()
        with self._host.entered():
            while sent < frames and time.perf_counter() - start - idle < seconds:
                now = min(part, frames - sent)
                self._send(now)
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

    def converse(self, sink: Sink, back: Sink, *, connections: int, seconds: float, window: int = 512) -> Sent:
        """Open and close TCP connections, up to `window` at a time, each packet after the answer to the last.

        `sink` converses, `back` sees its answers at the client. Frames are those of clients: four of a connection's
        six packets. A connection with a packet lost is given up.
        """
        opened = lost = 0
        idle = 0.0
        begin = self.next_new
        start = time.perf_counter()
        with self._host.entered():
            while opened < connections and time.perf_counter() - start - idle < seconds:
                now = min(window, connections - opened)
                for step in range(int(Step.STEPS)):
                    answered = step in (Step.SYN, Step.FIN)
                    seen = back if answered else sink
                    expected = seen.packets() + now
                    self._order(STEP=step, NEW_EVERY=1, NEXT_NEW=begin + opened)
                    self._send(now)
                    missing, waited = self._wait(seen, expected, 0)
                    lost, idle = lost + missing, idle + waited
                opened += now
        return Sent(opened * int(Step.STEPS), lost, time.perf_counter() - start - idle)


class Sink:
    """Counts and drops what arrives at an interface of a host, by XDP in native mode. A context manager.

    Sinks of one `place` and kit share their counts: look at differences.
    """

    def __init__(
        self,
        kit: Kit,
        host: Host,
        interface: str,
        protocol: Protocol = Protocol.UDP,
        place: str = "out",
        family: int = 4,
        vlan: int = 0,
    ) -> None:
        self._kit = kit
        self._host = host
        self._interface = interface
        self._kind = {"PROTOCOL": int(protocol), "FAMILY": family, "VLAN": vlan}
        self._place = place
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            cpus = os.cpu_count() or 1
            self._words = self._kit.words(f"{self._place}/seen", cpus, int(Seen.SEENS))
            self._told = self._kit.words(f"{self._place}/told", 1, int(Told.TOLDS))
            self._delays = self._kit.words(f"{self._place}/delays", cpus, int(Delay.COLUMNS))
            ports = {"ENDPOINT_PORT": ENDPOINT_PORT, "SERVICE_PORT": SERVICE_PORT}
            program = self._kit.program("sink.c", self._place, **self._kind, **ports)
            with self._host.entered():
                ifindex = socket.if_nametoindex(self._interface)
                stack.callback(os.close, links.create_xdp(program, ifindex, "native"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def doing(self, task: int, address: IPAddress | None = None) -> Iterator[None]:
        """Give the sink one of the Tasks for the duration of the block; otherwise it drops what it has counted."""
        self._told.rows[0, Told.ADDR] = _number(address) if address else 0
        self._words.rows[:, Seen.FIRST] = 0
        self._delays.rows[:] = 0
        self._told.rows[0, Told.TASK] = task
        try:
            yield
        finally:
            self._told.rows[0, Told.TASK] = Task.DROP

    @property
    def first_ns(self) -> int:
        """When Task.WATCH saw the first packet to its address, on CLOCK_MONOTONIC; 0: not yet."""
        return min((int(first) for first in self._words.rows[:, Seen.FIRST] if first), default=0)

    def delays_ns(self, shares: Sequence[float]) -> list[float]:
        """Return the delays that these shares of the packets seen by Task.TIME did not exceed; NaN without any."""
        counts = np.cumsum(self._delays.rows.sum(axis=0))
        if not counts[-1]:
            return [math.nan for _ in shares]
        return [_delay_ns(int(np.searchsorted(counts, share * float(counts[-1])))) for share in shares]

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


def _delay_ns(column: int) -> float:
    """Return the middle of a column of delays, as perf/bpf/sink.c counts them."""
    steps = int(Delay.STEPS)
    if column < steps:
        return column + 0.5
    return (steps + column % steps + 0.5) * 2.0 ** (column // steps - 1)
