"""An engine whose steps fail once: the next look at the interfaces brings them to their end."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from dataplane import engine, rawengine
from dataplane.afxdp import NoZeroCopyError
from dataplane.engine import Engine
from dataplane.netdev import Interface
from dataplane.rawengine import RawEngine
from dataplane.settings import Settings
from tests.small_node import SMALL
from xdp.clock import ManualClock
from xdp.errors import AttachError
from xdp.loader import Attachment
from xdp.tables import Tables

ETH0 = Interface("eth0", 2, bytes.fromhex("020000000002"), 1500, is_up=True)
NO_FLOWS = None  # only who leaves an interface asks for them


class FailingOnce:
    """Steps by their names, of which one fails the first time that it is asked for after `arm`."""

    def __init__(self) -> None:
        self._armed = ""

    def arm(self, step: str) -> None:
        self._armed = step

    @property
    def has_failed(self) -> bool:
        return not self._armed

    def step(self, name: str) -> None:
        if name == self._armed:
            self._armed = ""
            raise AttachError(f"{name}: refused")


class PaperWorker:
    """A worker whose loop is never run."""

    def __init__(self, fails: FailingOnce, number: int, sock: Any) -> None:
        self.number, self.sock, self.failure = number, sock, None
        self.node = SimpleNamespace(link=[{}])
        self.has_begun = self.is_beating = False
        self._fails = fails

    def start(self) -> None:
        assert not self.has_begun
        self._fails.step("start")
        self.has_begun = self.is_beating = True

    def stop(self) -> None:
        self.has_begun = False


def socket_of(number: int) -> Any:
    nothing = SimpleNamespace(lost=lambda: 0, unread=lambda: 0, is_dead=lambda: False, close=lambda: None)
    nothing.queue_id, nothing.fd, nothing.takes = number, 100 + number, lambda _: True
    nothing.queue = SimpleNamespace(address=1000 + number)
    return nothing


@pytest.fixture
def fails() -> FailingOnce:
    return FailingOnce()


class PaperKernel:
    """Maps and links as data: what XDP would find."""

    def __init__(self, fails: FailingOnce, monkeypatch: pytest.MonkeyPatch) -> None:
        self.maps: dict[int, dict[bytes, bytes]] = {1: {}, 2: {}}
        self.runs: dict[str, int] = {}  # programs by interface
        self.modes: list[str] = []  # that were asked for
        self.programs: dict[int, int] = {}  # what was loaded by descriptors
        self._loaded = count(1)
        self._fails = fails
        monkeypatch.setattr(engine.kernel, "map_update", self.map_update)
        monkeypatch.setattr(engine.kernel, "map_keys", lambda fd, _: list(self.maps[fd]))
        monkeypatch.setattr(engine.loader, "attach", self.attach)
        monkeypatch.setattr(engine.loader, "is_attached", lambda link, number: self.runs.get(link.interface) == number)
        monkeypatch.setattr(engine, "open_handback", lambda _: SimpleNamespace(fileno=lambda: 9, close=lambda: None))
        monkeypatch.setattr(engine.kernel, "prog_info", lambda program: SimpleNamespace(id=self.programs[program]))
        monkeypatch.setattr(engine.stages, "load", self.load)

    def map_update(self, fd: int, key: bytes, value: bytes) -> None:
        self._fails.step("map")
        self.maps[fd][key] = value

    def attach(self, program: int, interface: str, mode: str, pin: Path) -> Attachment:
        self._fails.step("attach")
        self.modes.append(mode)
        self.runs[interface] = self.programs[program]
        return Attachment(interface, ETH0.ifindex, "native", "", pin, was_replaced=True)

    def load(self, _shared: object, *, offloads: bool) -> int:  # noqa: ARG002
        self._fails.step("load")
        program = os.eventfd(0)
        self.programs[program] = next(self._loaded)
        return program


@pytest.mark.parametrize("step", ["open", "load", "worker", "start", "map", "attach", "nothing"])
def test_more_queues_are_served_though_a_step_fails_the_first_time(step, fails, monkeypatch, tmp_path):
    """The program that their interface runs is another copy: a veth does not run on new queues what it has already."""
    world = PaperKernel(fails, monkeypatch)
    shared = SimpleNamespace(tables=Tables.in_memory(SMALL), queues_fd=1, sockets_fd=2)
    made = Engine(Settings("n", (), ("eth0",), run_folder=tmp_path), shared, ManualClock())
    line = made._lines["eth0"] = engine.Line("eth0", ETH0)
    made._umem = PaperUmem(fails)

    def new_worker(_engine: Engine, _line: engine.Line, sock: Any, number: int) -> PaperWorker:
        fails.step("worker")
        return PaperWorker(fails, number, sock)

    monkeypatch.setattr(Engine, "_new_worker", new_worker)
    monkeypatch.setattr(made, "_offloads", PaperOffloads())
    monkeypatch.setattr(engine, "_longest_mtu", lambda _: 1500)
    made._load()
    made._open_sockets(line)
    made._start_all(None, None)
    made._attach(line)
    before = world.runs["eth0"]
    assert made.is_in_step({"eth0": ETH0})

    more = {"eth0": replace(ETH0, rx_queues=3)}
    fails.arm("" if step == "nothing" else step)
    for _ in range(2):
        if not made.is_in_step(more):
            made.follow(more, NO_FLOWS)
    assert fails.has_failed
    assert made.is_in_step(more)
    assert made.complaints() == []
    assert [worker.has_begun for worker in line.workers] == [True] * 3
    assert sorted(worker.number for worker in line.workers) == [0, 1, 2]
    assert len(made.queues) == 3
    numbers = {struct.pack("=II", ETH0.ifindex, n): struct.pack("=I", n) for n in range(3)}
    assert world.maps[1] == numbers
    assert world.runs["eth0"] > before
    made.stop()


@pytest.mark.parametrize(
    ("interface", "is_handed_on"),
    [
        pytest.param(ETH0, False, id="NIC"),
        pytest.param(replace(ETH0, kind="bond"), True, id="bond"),
        pytest.param(replace(ETH0, kind="bond", beneath=(3, 4)), True, id="bond-with-slaves"),
        pytest.param(replace(ETH0, beneath=(3,)), True, id="NIC-with-a-virtual-function"),
        pytest.param(replace(ETH0, kind="bridge", beneath=(3,)), False, id="bridge"),
        pytest.param(replace(ETH0, kind="veth", master_ifindex=3), False, id="port"),
    ],
)
def test_no_native_program_is_given_to_what_hands_it_on_to_its_ports(interface: Interface, is_handed_on: bool):
    assert engine.mode_for(interface, "generic") == ("generic", "")
    if not is_handed_on:
        assert engine.mode_for(interface, "auto") == ("auto", "")
        assert engine.mode_for(interface, "native") == ("native", "")
        return
    mode, why = engine.mode_for(interface, "auto")
    assert mode == "generic"
    assert "would run on its ports" in why
    with pytest.raises(AttachError, match=r"eth0: .*; give it with --xdp-mode generic, or the ports with -i"):
        engine.mode_for(interface, "native")


def test_the_mode_is_decided_where_it_is_attached_and_where_it_may_fail(fails, monkeypatch, tmp_path):
    """Nothing has been changed when it is refused."""
    world = PaperKernel(fails, monkeypatch)
    shared = SimpleNamespace(tables=Tables.in_memory(SMALL), queues_fd=1, sockets_fd=2)
    bond = replace(ETH0, kind="bond")
    monkeypatch.setattr(Engine, "_load_egress", lambda *_: None)
    refusing = Engine(Settings("n", (), ("eth0",), run_folder=tmp_path, xdp_mode="native"), shared, ManualClock())
    with pytest.raises(AttachError, match="eth0: a native XDP program would run on its ports"):
        refusing.prepare([bond])
    refusing.stop()
    made = Engine(Settings("n", (), ("eth0",), run_folder=tmp_path), shared, ManualClock())
    monkeypatch.setattr(made, "_offloads", PaperOffloads())
    made._load()
    line = made._lines["eth0"] = engine.Line("eth0", bond)
    made._attach(line)
    assert world.modes == ["generic"]
    assert "would run on its ports" in made.attachments["eth0"].why
    made.stop()


class MixedUmem:
    """Memory for sockets of eth0, which can be zero-copy, and of others, which cannot."""

    made: ClassVar[list[MixedUmem]] = []

    def __init__(self, chunks: int, chunk_bytes: int, mode: str = "auto") -> None:
        self.chunks, self.lost_chunks, self.chunk_bytes, self.mode = chunks, 0, chunk_bytes, mode
        self.frame_bytes = chunk_bytes - 256
        self.sockets: list[Any] = []
        self.is_open = True
        self.made.append(self)

    def open(self, interface: str, queue: int) -> Any:
        if self.mode == "auto" and interface != "eth0" and self.sockets:
            raise NoZeroCopyError(f"{interface} queue {queue}: the driver has no zero-copy mode")
        sock = socket_of(queue)
        sock.close = lambda: self.sockets.remove(sock)
        self.sockets.append(sock)
        return sock

    def close(self) -> None:
        assert not self.sockets
        self.is_open = False


@pytest.fixture
def mixed(fails, monkeypatch, tmp_path) -> Engine:
    PaperKernel(fails, monkeypatch)
    monkeypatch.setattr(MixedUmem, "made", [])
    monkeypatch.setattr(engine, "Umem", MixedUmem)
    monkeypatch.setattr(Engine, "_load_egress", lambda *_: None)
    monkeypatch.setattr(Engine, "_new_worker", lambda _engine, _line, sock, number: PaperWorker(fails, number, sock))
    monkeypatch.setattr(
        Engine, "_close", lambda made, lines, _flows: (made._end_workers(lines), made._close_sockets(lines))
    )
    shared = SimpleNamespace(tables=Tables.in_memory(SMALL), queues_fd=1, sockets_fd=2)
    made = Engine(Settings("n", (), ("eth0", "eth1"), run_folder=tmp_path), shared, ManualClock())
    monkeypatch.setattr(made, "_offloads", PaperOffloads())
    return made


def test_all_sockets_are_in_copy_mode_where_one_cannot_be_zero_copy(mixed, caplog):
    """Whichever interface is given first."""
    eth1 = replace(ETH0, name="eth1", ifindex=3, rx_queues=2)
    mixed.prepare([ETH0, eth1])
    refused, memory = MixedUmem.made
    assert (refused.is_open, memory.is_open, memory.mode) == (False, True, "copy")
    assert len(memory.sockets) == 3
    assert caplog.messages == ["eth1 queue 0: the driver has no zero-copy mode; all interfaces are served in copy mode"]
    mixed.stop()
    assert not memory.is_open


def test_all_sockets_change_to_copy_mode_for_an_interface_that_comes_back_without_zero_copy(mixed):
    mixed.prepare([ETH0])
    mixed._lines["eth1"] = engine.Line("eth1", replace(ETH0, name="eth1", ifindex=3))  # gone since the start
    mixed._start_all(None, None)
    given = {name: line.interface for name, line in mixed._lines.items()}
    mixed.follow(given, NO_FLOWS)
    assert mixed.complaints() == ["eth1 queue 0: the driver has no zero-copy mode"]
    mixed.follow(given, NO_FLOWS)
    assert mixed.complaints() == []
    assert [memory.mode for memory in MixedUmem.made] == ["auto", "copy"]
    assert len(MixedUmem.made[1].sockets) == 2
    mixed.stop()


class PaperOffloads:
    """Nothing to switch off."""

    def switch_off(self, *_: object) -> None: ...

    def keep_off(self, *_: object) -> None: ...

    def restore(self, *_: object) -> None: ...

    def complaints(self) -> list[str]:
        return []


class PaperUmem:
    """Sockets for whoever asks."""

    def __init__(self, fails: FailingOnce) -> None:
        self.sockets: list[Any] = []
        self.chunks, self.lost_chunks, self.chunk_bytes, self.mode = 1 << 20, 0, 4096, "auto"
        self._fails = fails

    def close(self) -> None: ...

    def open(self, _interface: str, queue: int) -> Any:
        self._fails.step("open")
        self.sockets.append(socket_of(queue))
        return self.sockets[-1]


@pytest.mark.parametrize("step", ["open", "worker", "start", "filter", "listen", "nothing"])
def test_an_interface_that_is_back_is_served_though_a_step_fails_the_first_time(step, fails, monkeypatch):
    listening: list[Any] = []

    def open_socket(interface: Interface) -> Any:
        fails.step("open")
        sock = socket_of(0)

        def listen(_many: bool, _group: int | None) -> None:
            fails.step("listen")
            assert sock not in listening
            listening.append(sock)

        sock.listen = listen
        return sock

    def new_worker(_engine: RawEngine, _line: rawengine.Line, sock: Any, number: int) -> PaperWorker:
        fails.step("worker")
        return PaperWorker(fails, number, sock)

    monkeypatch.setattr(rawengine, "PacketSocket", open_socket)
    monkeypatch.setattr(rawengine, "has_lro", lambda _: False)
    monkeypatch.setattr(RawEngine, "_new_worker", new_worker)
    made = RawEngine(Settings("n", (), ("eth0",)), Tables.in_memory(SMALL), SMALL, ManualClock(), "")
    monkeypatch.setattr(made, "_put_filter", lambda: fails.step("filter"))
    line = made._lines["eth0"] = rawengine.Line("eth0", ETH0)
    given = {"eth0": replace(ETH0, rx_queues=2)}
    fails.arm("" if step == "nothing" else step)
    for _ in range(2):
        if not made.is_in_step(given):
            made.follow(given, NO_FLOWS)
    assert fails.has_failed
    assert made.is_in_step(given)
    assert [worker.has_begun for worker in line.workers] == [True] * 2
    assert line.sockets == listening[-2:]
    assert [worker.sock for worker in line.workers] == line.sockets
