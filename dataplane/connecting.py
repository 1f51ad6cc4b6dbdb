"""Clients on this node, led to endpoints as they connect: the programs of xdp/bpf/connect.c at the hooks of a cgroup.

Their links are pinned: what they do goes on without the daemon, and its successor replaces the programs on them.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dataplane.settings import Settings
from xdp import kernel, loader, stages
from xdp.errors import Error
from xdp.maps import SharedMaps

_SOURCE = stages.SOURCE.with_name("connect.c")

log = logging.getLogger(__name__)


class Connecting:
    """The programs at the hooks of a cgroup.

    `prepare` does what may fail without touching what runs, `attach` puts them in force, `follow` keeps them there, and
    `close` leaves them to go on by themselves. `why` says what is wrong, and is empty if nothing is.
    """

    def __init__(self, settings: Settings, cgroup: Path, shared: SharedMaps) -> None:
        self._settings = settings
        self._cgroup = cgroup
        self._shared = shared
        self._programs: dict[str, int] = {}  # descriptors by hook
        self._ids: dict[str, int] = {}
        self._new: list[Path] = []  # pins of links that were not there before
        self.why = ""

    def prepare(self) -> None:
        """Load the programs. Errors as loader.load."""
        hooks = list(kernel.CGROUP_HOOKS)
        programs = loader.load_all(self._shared.folder, _SOURCE, hooks, kind="cgroup")
        self._programs = dict(zip(hooks, programs, strict=True))
        self._ids = {hook: kernel.prog_info(program).id for hook, program in self._programs.items()}

    def attach(self) -> None:
        """Attach them all; on an error nothing stays attached that was not before."""
        try:
            for hook in reversed(self._programs):  # who is led is to be told of the VIP from the first on
                self._attach(hook)
        except BaseException:
            self.let_go()
            raise

    def _attach(self, hook: str) -> None:
        pin = self._settings.hook_pin(hook)
        if not loader.attach_hook(self._programs[hook], self._cgroup, hook, pin):
            self._new.append(pin)

    def let_go(self) -> None:
        """Take off what was not attached before this daemon."""
        for pin in self._new:
            loader.detach(pin)
        self._new = []

    def follow(self) -> None:
        """Put back what somebody has taken off; say in `why` if that fails, and try again with the next call."""
        missing = [hook for hook in self._programs if not self._is_attached(hook)]
        before = self.why
        try:
            for hook in missing:
                self._attach(hook)
            self.why = ""
        except Error as error:
            self.why = f"clients on this node are not led: {error}"
        if self.why:
            log.log(logging.DEBUG if self.why == before else logging.WARNING, "%s", self.why)
        elif missing:
            log.warning("%s: programs had been taken off (%s); they are back", self._cgroup, ", ".join(missing))

    def _is_attached(self, hook: str) -> bool:
        info = loader.link_at(self._settings.hook_pin(hook))
        here = loader.number_of_cgroup(self._cgroup)
        return info is not None and here != 0 and (info.cgroup_id, info.program_id) == (here, self._ids[hook])

    def close(self) -> None:
        """Close the descriptors of the programs."""
        for program in self._programs.values():
            os.close(program)
        self._programs = {}


def detach_hooks(settings: Settings) -> None:
    """Take the programs of a node off the cgroup that they are at."""
    for pin in settings.hook_pins():
        loader.detach(pin)
