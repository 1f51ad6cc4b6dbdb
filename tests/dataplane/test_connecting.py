"""The programs that lead clients on this node come whole or not at all, and are put back while there is a cgroup."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dataplane.connecting import Connecting, detach_hooks
from dataplane.settings import Settings
from tests import cgroups
from xdp import kernel, links, loader, maps, removing
from xdp.errors import AttachError
from xdp.tables import Capacity

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SMALL = Capacity(connections=100, frontends=16, services=8, maglev_slots=16, endpoints=8, next_hops=8, cpus=2)
NAME = f"test-connecting-{os.getpid()}"
HOOKS = sorted(kernel.CGROUP_HOOKS)


class Made(NamedTuple):
    settings: Settings
    cgroup: Path
    shared: maps.SharedMaps

    def connecting(self) -> Connecting:
        return Connecting(self.settings, self.cgroup, self.shared)

    def attached(self) -> list[str]:
        """Return the hooks that have a program of ours."""
        found = {pin.name.removeprefix("hook-"): loader.link_at(pin) for pin in self.settings.hook_pins()}
        return [hook for hook, link in found.items() if link is not None and link.cgroup_id]


@pytest.fixture
def made() -> Iterator[Made]:
    settings = Settings(NAME, (), ())
    with cgroups.made(NAME) as cgroup, maps.create(settings.pins, SMALL) as shared:
        yield Made(settings, cgroup, shared)
        detach_hooks(settings)
    removing.maps(settings.pins)


@pytest.fixture
def connecting(made: Made) -> Iterator[Connecting]:
    with contextlib.closing(made.connecting()) as one:
        one.prepare()
        yield one


def test_nothing_is_attached_until_all_can_be(made: Made, connecting: Connecting):
    assert made.attached() == []
    connecting.attach()
    assert made.attached() == HOOKS
    connecting.follow()
    assert connecting.why == ""


def test_a_start_that_comes_to_nothing_takes_back_what_it_has_attached(
    made: Made, connecting: Connecting, monkeypatch: pytest.MonkeyPatch
):
    create = links.create_cgroup

    def refuse(program: int, cgroup: Path, hook: str) -> int:
        if hook == "recvmsg4":
            raise AttachError("taken")
        return create(program, cgroup, hook)

    monkeypatch.setattr(links, "create_cgroup", refuse)
    with pytest.raises(AttachError, match="taken"):
        connecting.attach()
    assert made.settings.hook_pins() == []


def test_what_an_earlier_daemon_has_attached_stays_when_its_successor_fails(made: Made, connecting: Connecting):
    connecting.attach()
    loader.detach(made.settings.hook_pin("connect6"))
    with contextlib.closing(made.connecting()) as successor:
        successor.prepare()
        successor.attach()
        assert made.attached() == HOOKS
        successor.let_go()
    assert made.attached() == [hook for hook in HOOKS if hook != "connect6"]


def test_a_program_of_somebody_else_on_our_link_is_replaced(made: Made, connecting: Connecting):
    connecting.attach()
    code = bytes.fromhex("b700000001000000" + "9500000000000000")  # return 1
    other = kernel.prog_load("connect4", code, kernel.CGROUP_PROGRAM)
    loader.attach_hook(other, made.cgroup, "connect4", made.settings.hook_pin("connect4"))
    connecting.follow()
    link = loader.link_at(made.settings.hook_pin("connect4"))
    assert link is not None
    assert link.program_id != kernel.prog_info(other).id
    os.close(other)


def test_a_cgroup_that_has_gone_is_told_and_attached_to_when_it_comes_again(made: Made, connecting: Connecting):
    connecting.attach()
    made.cgroup.rmdir()
    connecting.follow()
    assert connecting.why.startswith(f"clients on this node are not led: {made.cgroup}: No such file or directory")
    made.cgroup.mkdir()
    connecting.follow()
    assert (connecting.why, made.attached()) == ("", HOOKS)
