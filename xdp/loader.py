"""The parent's side of programs: have one compiled, attach it, replace it between two packets, take it off.

A program hangs on a pinned link, which survives this process, `kill -9` included. A successor that finds the pin
replaces the program through it (BPF_LINK_UPDATE): no packet passes without one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from xdp import cache, kept, kernel, links
from xdp.compile import PROGRAM_TYPES, Function, headers_of, macros, text_of
from xdp.errors import AttachError, Error, KernelError, MissingFeatureError, UsageError
from xdp.writing import explained

_ROOT = Path(__file__).resolve().parent.parent
_COMPILE_TIMEOUT_S = 60
_LOG_LINES = 25  # of the compiler or the verifier, from the end: the verifier says last what it refused

WantedMode = Literal["auto", "native", "generic"]
Kind = Literal["xdp", "tc", "cgroup"]


class LoadError(Error):
    """A program does not compile, or the verifier refuses it."""


@dataclass(frozen=True)
class Attachment:
    """A program on an interface. `why` says why it is not in native mode, and is empty if it is."""

    interface: str
    ifindex: int
    mode: str  # "native" or "generic"; "egress" for a program where frames leave
    why: str
    pin: Path
    was_replaced: bool  # it took the place of an earlier daemon's program, on that one's link or on a new one


def load(
    folder: Path,
    source: Path,
    function: str,
    defines: Mapping[str, str | int] | None = None,
    kind: Kind = "xdp",
) -> int:
    """Compile `function` of `source` over the maps pinned in `folder`; return a descriptor of the program.

    `defines` become macros, beside those that xdp.compile gives every program. LoadError carries the last lines of the
    compiler's or the verifier's log; MissingFeatureError: no bcc, or no privilege.
    """
    return load_all(folder, source, [function], defines, kind)[0]


def load_all(
    folder: Path,
    source: Path,
    functions: Sequence[str],
    defines: Mapping[str, str | int] | None = None,
    kind: Kind = "xdp",
) -> list[int]:
    """Do the same for several functions of a file; return a descriptor for each."""
    options = [f"{name}={value}" for name, value in (defines or {}).items()]
    text, given = text_of(source), macros(kernel.pinned_maps(folder), options)
    wanted = [
        Function(name, folder / f"{name}+{os.getpid()}", cache.place_of(text, headers_of(source), [name, *given]))
        for name in functions
    ]
    if programs := _load_kept(wanted, folder, kind):
        return programs
    with kept.alone(wanted[0].place.with_name("lock")):  # whom it has waited for has made them
        return _load_kept(wanted, folder, kind) or _compile(folder, source, wanted, options, kind)


def _compile(folder: Path, source: Path, functions: Sequence[Function], options: Iterable[str], kind: str) -> list[int]:
    """Have a child compile functions; return a descriptor for each."""
    before = kernel.pinned_maps(folder)
    shown = ", ".join(function.name for function in functions)
    try:
        _run_compiler(shown, folder, source, functions, options, kind)
        strays = kernel.pinned_maps(folder).keys() - before.keys()
        for name in strays:
            (folder / name).unlink()
        if strays:
            raise LoadError(f"{source}: {shown} uses {', '.join(sorted(strays))}, which is not a shared table")
        with contextlib.ExitStack() as undo:
            programs = []
            for function in functions:
                programs.append(kernel.open_pinned(function.pin))
                undo.callback(os.close, programs[-1])
            undo.pop_all()
        return programs
    finally:
        for function in functions:
            function.pin.unlink(missing_ok=True)


def _run_compiler(
    shown: str, folder: Path, source: Path, functions: Iterable[Function], options: Iterable[str], kind: str
) -> None:
    command = [sys.executable, "-m", "xdp.compile", "--source", str(source), "--type", kind, "--maps", str(folder)]
    for function in functions:
        command += ["--function", function.name, "--pin", str(function.pin), "--keep", str(function.place)]
    command += [f"-D{option}" for option in options]
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
        raise LoadError(f"{source}: {shown} was not compiled within {_COMPILE_TIMEOUT_S} s") from None
    log = child.stdout.decode(errors="replace").replace("/virtual/main.c", str(source)).strip()
    if child.returncode == MissingFeatureError.exit_code:
        raise MissingFeatureError(log)
    if child.returncode < 0:
        log += f"\nthe compiler was killed by signal {-child.returncode}"
    if child.returncode:
        raise LoadError(f"{source}: {shown} does not load:\n{_tail(log)}")


def _load_kept(functions: Iterable[Function], folder: Path, kind: str) -> list[int]:
    """Load what was compiled before; nothing if one is missing, or is refused: then the compiler says why."""
    with contextlib.ExitStack() as undo:
        programs = []
        for function in functions:
            program = cache.read(function.place)
            if program is None:
                return []
            try:
                with program.over(folder) as code:
                    programs.append(kernel.prog_load(function.name, code, PROGRAM_TYPES[kind]))
            except Error:
                return []
            undo.callback(os.close, programs[-1])
        undo.pop_all()
    return programs


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


def attach_egress(program: int, interface: str, pin: Path) -> Attachment:
    """Put `program` where frames leave by `interface`, on a link pinned at `pin`: an earlier daemon's, if it lives.

    Errors as links.create_egress.
    """
    try:
        ifindex = socket.if_nametoindex(interface)
    except OSError:
        raise UsageError(f"{interface}: no such interface in this network namespace; see `ip -br link`") from None
    link = _open(pin)
    if link is not None:
        try:
            if links.info(link).ifindex == ifindex:
                links.update(link, program)
                return Attachment(interface, ifindex, "egress", "", pin, was_replaced=True)
        finally:
            os.close(link)
        detach(pin)  # its interface has gone, perhaps to be made again under the same name
    _pin_link(links.create_egress(program, ifindex), pin)
    return Attachment(interface, ifindex, "egress", "", pin, was_replaced=False)


def attach_hook(program: int, cgroup: Path, hook: str, pin: Path) -> bool:
    """Put `program` at a hook of a cgroup, on a link pinned at `pin`: an earlier daemon's, if it lives there.

    Return whether it took the place of another program of ours. Errors as links.create_cgroup.
    """
    link = _open(pin)
    if link is not None:
        try:
            if links.info(link).cgroup_id == number_of_cgroup(cgroup) != 0:
                links.update(link, program)
                return True
        finally:
            os.close(link)
        detach(pin)  # of another cgroup, or of one that has gone
    _pin_link(links.create_cgroup(program, cgroup, hook), pin)
    return False


def number_of_cgroup(cgroup: Path) -> int:
    """Return the kernel's number of a cgroup; 0 if it has gone."""
    try:
        return cgroup.stat().st_ino
    except OSError:
        return 0


def link_at(pin: Path) -> links.LinkInfo | None:
    """Return what the kernel says of a pinned link; None if there is none."""
    link = _open(pin)
    if link is None:
        return None
    try:
        return links.info(link)
    finally:
        os.close(link)


def is_attached(attachment: Attachment, program_id: int) -> bool:
    """Return whether the link is there, lives on its interface, and runs this program."""
    info = link_at(attachment.pin)
    return info is not None and (info.ifindex, info.program_id) == (attachment.ifindex, program_id)


def rename(attachment: Attachment, interface: str, pin: Path) -> Attachment:
    """Move the pin of an interface that is called otherwise now."""
    with explained(pin, "cannot be renamed"), contextlib.suppress(FileNotFoundError):
        attachment.pin.rename(pin)  # if it is not there, whoever looks after it attaches anew
    return replace(attachment, interface=interface, pin=pin)


def find_link(pins: Iterable[Path], ifindex: int) -> Path | None:
    """Return which of the pins holds the link whose program is on an interface, whatever its name was."""
    state = links.xdp_state(ifindex)
    for pin in pins if state else ():
        info = link_at(pin)
        if info is not None and state is not None and (info.ifindex, info.program_id) == (ifindex, state.program_id):
            return pin
    return None


def detach(pin: Path) -> bool:
    """Take the program off and remove the pin; return whether there was one."""
    link = _open(pin)
    if link is None:
        return False
    try:
        links.detach(link)
        pin.unlink(missing_ok=True)
    finally:
        os.close(link)
    return True


def _create_pinned(program: int, ifindex: int, mode: WantedMode, pin: Path) -> tuple[str, str]:
    """Attach on a new link that is pinned at `pin`; return (mode, why not native)."""
    link, got, why = _create(program, ifindex, mode)
    _pin_link(link, pin)
    return got, why


def _pin_link(link: int, pin: Path) -> None:
    """Pin a link, and close its descriptor: without a pin, that detaches."""
    try:
        with explained(pin.parent, "the folder of pins cannot be made"):
            pin.parent.mkdir(parents=True, exist_ok=True)
        kernel.pin(link, pin)
    finally:
        os.close(link)


def _create(program: int, ifindex: int, mode: WantedMode) -> tuple[int, str, str]:
    """Attach; return (link, mode, why not native)."""
    if mode == "generic":
        return links.create_xdp(program, ifindex, "generic"), "generic", "asked for"
    try:
        return links.create_xdp(program, ifindex, "native"), "native", ""
    except AttachError as error:
        if mode == "native" or links.xdp_state(ifindex) is not None:  # taken: generic would only hide it
            raise
        why = str(error).partition(";")[0]
        return links.create_xdp(program, ifindex, "generic"), "generic", why


def _take_over(program: int, interface: str, ifindex: int, mode: WantedMode, pin: Path) -> Attachment | None:
    """Put `program` on the link pinned at `pin`; None if there is none that can be kept, and then the pin is free."""
    link = _open(pin)
    if link is None:
        return None
    try:
        info = links.info(link)
        if info.ifindex == 0:  # its interface has gone, perhaps to be made again under the same name
            pin.unlink()
            return None
        state = links.xdp_state(ifindex)
        if info.ifindex != ifindex or state is None or state.program_id != info.program_id:
            # A link does not tell its namespace, and numbers of interfaces repeat: its program must be the one we see.
            raise AttachError(
                f"{interface}: {pin} holds the program of interface number {info.ifindex}, elsewhere; "
                "give this node another --name, or `turnout detach` first"
            )
        if mode not in ("auto", state.mode):
            got, why = _change_mode(program, link, state, mode, pin)
            return Attachment(interface, ifindex, got, why, pin, was_replaced=True)
        links.update(link, program)
    finally:
        os.close(link)
    why = "" if state.mode == "native" else "asked for" if mode == "generic" else "as an earlier daemon attached it"
    return Attachment(interface, ifindex, state.mode, why, pin, was_replaced=True)


def _change_mode(program: int, link: int, state: links.XdpState, mode: WantedMode, pin: Path) -> tuple[str, str]:
    """Put `program` on a new link in `mode` in place of `link`, which is in `state`; return (mode, why not native).

    A link keeps its mode for life, and an interface has one mode at a time: between the two links it has no program.
    When `mode` is refused, the old program is attached again as it was.
    """
    ifindex = links.info(link).ifindex
    old_program = kernel.prog_fd_by_id(state.program_id)
    try:
        links.detach(link)
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
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
