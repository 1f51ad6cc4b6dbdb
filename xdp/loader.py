"""The parent's side of XDP programs: have one compiled, attach it, replace it between two packets, take it off.

A program hangs on a pinned link, which survives this process, `kill -9` included. A successor that finds the pin
replaces the program through it (BPF_LINK_UPDATE): no packet passes without one.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xdp import kernel
from xdp.errors import AttachError, Error, MissingFeatureError, UsageError

_ROOT = Path(__file__).resolve().parent.parent
_COMPILE_TIMEOUT_S = 60
_LOG_LINES = 25  # of the compiler or the verifier, from the end: the verifier says last what it refused

WantedMode = Literal["auto", "native", "generic"]


class LoadError(Error):
    """A program does not compile, or the verifier refuses it."""


@dataclass(frozen=True)
class Attachment:
    """A program on an interface. `why` says why it is not in native mode, and is empty if it is."""

    interface: str
    ifindex: int
    mode: str  # "native" or "generic"
    why: str
    pin: Path
    was_replaced: bool  # it took the place of an earlier daemon's program, on that one's link or on a new one


def load(folder: Path, source: Path, function: str, defines: Mapping[str, str | int] | None = None) -> int:
    """Compile `function` of `source` over the maps pinned in `folder`; return a descriptor of the program.

    `defines` become macros, beside those that xdp.compile gives every program. LoadError carries the last lines of the
    compiler's or the verifier's log; MissingFeatureError: no bcc, or no privilege.
    """
    before = kernel.pinned_maps(folder)
    pin = folder / f"{function}+{os.getpid()}"
    command = [sys.executable, "-m", "xdp.compile", "--source", str(source)]
    command += ["--function", function, "--pin", str(pin), "--maps", str(folder)]
    command += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        child = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            timeout=_COMPILE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LoadError(f"{source}: {function} was not compiled within {_COMPILE_TIMEOUT_S} s") from None
    log = child.stdout.decode(errors="replace").replace("/virtual/main.c", str(source)).strip()
    if child.returncode == MissingFeatureError.exit_code:
        raise MissingFeatureError(log)
    if child.returncode < 0:
        log += f"\nthe compiler was killed by signal {-child.returncode}"
    if child.returncode:
        raise LoadError(f"{source}: {function} does not load:\n{_tail(log)}")
    try:
        program = kernel.open_pinned(pin)
    finally:
        pin.unlink(missing_ok=True)
    strays = kernel.pinned_maps(folder).keys() - before.keys()
    if strays:
        os.close(program)
        for name in strays:
            (folder / name).unlink()
        raise LoadError(f"{source}: {function} uses {', '.join(sorted(strays))}, which is not a shared table")
    return program


def _tail(log: str) -> str:
    lines = log.splitlines()
    left_out = [f"[{len(lines) - _LOG_LINES} lines left out]"] if len(lines) > _LOG_LINES else []
    return "\n".join([*left_out, *lines[-_LOG_LINES:]])


def attach(program: int, interface: str, mode: WantedMode, pin: Path) -> Attachment:
    """Put `program` on `interface` of this network namespace, on a link pinned at `pin`.

    A link that is pinned there already, by an earlier daemon, gets the new program between two packets; one whose
    interface has gone is replaced, and so is one in another mode than `mode`, or it is as it was if that mode is
    refused. `auto` is native if the driver can. UsageError: no such interface; AttachError: it has an XDP program of
    somebody else, or refuses.
    """
    try:
        ifindex = socket.if_nametoindex(interface)
    except OSError:
        raise UsageError(f"{interface}: no such interface in this network namespace; see `ip -br link`") from None
    if (taken := _take_over(program, interface, ifindex, mode, pin)) is not None:
        return taken
    got, why = _create_pinned(program, ifindex, mode, pin)
    return Attachment(interface, ifindex, got, why, pin, was_replaced=False)


def detach(pin: Path) -> bool:
    """Take the program off and remove the pin; return whether there was one."""
    link = _open(pin)
    if link is None:
        return False
    try:
        kernel.link_detach(link)
        pin.unlink(missing_ok=True)
    finally:
        os.close(link)
    return True


def _create_pinned(program: int, ifindex: int, mode: WantedMode, pin: Path) -> tuple[str, str]:
    """Attach on a new link that is pinned at `pin`; return (mode, why not native)."""
    link, got, why = _create(program, ifindex, mode)
    try:
        pin.parent.mkdir(parents=True, exist_ok=True)
        kernel.pin(link, pin)
    finally:
        os.close(link)  # without a pin, this detaches
    return got, why


def _create(program: int, ifindex: int, mode: WantedMode) -> tuple[int, str, str]:
    """Attach; return (link, mode, why not native)."""
    if mode == "generic":
        return kernel.link_create_xdp(program, ifindex, "generic"), "generic", "asked for"
    try:
        return kernel.link_create_xdp(program, ifindex, "native"), "native", ""
    except AttachError as error:
        if mode == "native" or kernel.xdp_state(ifindex) is not None:  # taken: generic would only hide it
            raise
        why = str(error).partition(";")[0]
        return kernel.link_create_xdp(program, ifindex, "generic"), "generic", why


def _take_over(program: int, interface: str, ifindex: int, mode: WantedMode, pin: Path) -> Attachment | None:
    """Put `program` on the link pinned at `pin`; None if there is none that can be kept, and then the pin is free."""
    link = _open(pin)
    if link is None:
        return None
    try:
        info = kernel.link_info(link)
        if info.ifindex == 0:  # its interface has gone, perhaps to be made again under the same name
            pin.unlink()
            return None
        state = kernel.xdp_state(ifindex)
        if info.ifindex != ifindex or state is None or state.program_id != info.program_id:
            # A link does not tell its namespace, and numbers of interfaces repeat: its program must be the one we see.
            raise AttachError(
                f"{interface}: {pin} holds the program of interface number {info.ifindex}, elsewhere; "
                "give this node another --name, or `turnout detach` first"
            )
        if mode not in ("auto", state.mode):
            got, why = _change_mode(program, link, state, mode, pin)
            return Attachment(interface, ifindex, got, why, pin, was_replaced=True)
        kernel.link_update(link, program)
    finally:
        os.close(link)
    why = "" if state.mode == "native" else "asked for" if mode == "generic" else "as an earlier daemon attached it"
    return Attachment(interface, ifindex, state.mode, why, pin, was_replaced=True)


def _change_mode(program: int, link: int, state: kernel.XdpState, mode: WantedMode, pin: Path) -> tuple[str, str]:
    """Put `program` on a new link in `mode` in place of `link`, which is in `state`; return (mode, why not native).

    A link keeps its mode for life, and an interface has one mode at a time: between the two links it has no program.
    When `mode` is refused, the old program is attached again as it was.
    """
    ifindex = kernel.link_info(link).ifindex
    old_program = kernel.prog_fd_by_id(state.program_id)
    try:
        kernel.link_detach(link)
        pin.unlink()
        try:
            return _create_pinned(program, ifindex, mode, pin)
        except Error:
            _create_pinned(old_program, ifindex, "native" if state.mode == "native" else "generic", pin)
            raise
    finally:
        os.close(old_program)


def _open(pin: Path) -> int | None:
    try:
        return kernel.open_pinned(pin)
    except kernel.KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
