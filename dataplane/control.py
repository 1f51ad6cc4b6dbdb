"""The control socket: who runs under a name, and what it answers. One JSON object a line, in both directions.

    {"command": "flows", "options": {"limit": 5}}   ->   {"data": [...]}
    {"command": "flaws"}                            ->   {"error": {"message": "...", "exit_code": 2}}

A client that is slow, silent, rude or gone costs the daemon one bounded buffer and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Self

from dataplane.settings import Settings, interface_of
from xdp.errors import ConfigError, Error, MissingFeatureError, NotRunningError, TimedOutError, UsageError
from xdp.writing import explained

COMMANDS = ("status", "services", "endpoints", "flows", "nexthops", "interfaces", "reasons", "administer")
_OPTIONS: Mapping[str, Mapping[str, type]] = {
    "flows": {"service": str, "endpoint": str, "client": str, "limit": int},
    "administer": {"endpoints": list, "state": str, "deadline_s": int},
}
ANSWER_TIMEOUT_S = 30.0  # a million flows take a few seconds

_LONGEST_REQUEST = 1 << 16  # bytes
_LONGEST_PATH = 107  # of sockaddr_un.sun_path, without the final zero
_MOST_CLIENTS = 256
_SILENCE_S = 10.0  # until a client that says nothing is let go
_DRAIN_S = 30.0  # until a client that does not read is let go
_PIECE = 1 << 16  # bytes of an answer that are written before the loop looks elsewhere

Answer = Callable[[str, dict[str, Any]], Any]  # plain data, or an awaitable of it

log = logging.getLogger(__name__)


class RunningError(Error):
    """A daemon of that name runs already."""


class Lock:
    """The right to be the node of a name, for as long as the context lasts. RunningError: somebody else has it."""

    def __init__(self, settings: Settings) -> None:
        self._name = settings.name
        self._path = settings.lock_path
        self._socket_path = str(settings.socket_path)
        self._fd = -1

    def __enter__(self) -> Self:
        _check_length(self._socket_path)  # now, and not when programs are attached already
        while not self._has_lock():
            pass  # the one before us removed the file between our two steps
        try:
            with explained(self._path):
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except Error:
            self._let_go()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _let_go(self) -> None:
        with contextlib.suppress(OSError):  # whoever wants the name finds a file that nobody holds
            self._path.unlink()
        self._close()

    def _has_lock(self) -> bool:
        """Lock the file and return whether it is still the one of that name; make it if there is none."""
        with explained(self._path, "cannot be made"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._fd).st_ino == self._path.stat().st_ino:
                return True
        except FileNotFoundError:
            pass
        except OSError:
            pid = os.pread(self._fd, 20, 0).decode(errors="replace").strip()
            self._close()
            raise RunningError(
                f"node {self._name!r} is running already (pid {pid or 'unknown'}); "
                "stop it first, or give this one another --name"
            ) from None
        self._close()
        return False

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1


class Server:
    """Answers on the control socket while the context lasts. To be entered by the one who holds the Lock.

    Before that it may have its address already, with `bind`: whoever asks is told that nobody is there.
    `answer(command, options)` runs in the event loop; it returns plain data or raises an Error.
    """

    def __init__(self, settings: Settings, answer: Answer) -> None:
        self._path = settings.socket_path
        self._answer = answer
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._inode = 0

    def bind(self) -> socket.socket:
        """Have the socket's address, or raise an Error; nobody can connect yet. `close` gives it up."""
        if self._listener is None:
            self._listener = _bound(str(self._path))
            self._inode = self._path.stat().st_ino
        return self._listener

    def close(self) -> None:
        """Give up the address."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(
            self._serve, sock=self.bind(), limit=_LONGEST_REQUEST, backlog=_MOST_CLIENTS
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        clients = list(self._clients)
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        self.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            if len(self._clients) > _MOST_CLIENTS:
                await _send(writer, _refusal(Error(f"{_MOST_CLIENTS} clients are being served; try again")))
                return
            while request := await _read(reader):
                await _send(writer, await self._reply(request))
        except ValueError:  # readline: longer than the limit
            with contextlib.suppress(OSError):
                await _send(writer, _refusal(UsageError(f"the request is longer than {_LONGEST_REQUEST} bytes")))
        except (OSError, asyncio.CancelledError):
            pass  # the client is gone or too slow (TimeoutError is an OSError), or the daemon ends
        finally:
            self._clients.discard(task)
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _reply(self, line: bytes) -> bytes:
        try:
            data = self._answer(*_parse(line))
            if isinstance(data, Awaitable):
                data = await data
            # Encoding a million flows takes seconds; in a thread it takes turns with the loop.
            return await asyncio.to_thread(_encode, {"data": data})
        except Error as error:
            return _refusal(error)
        except Exception as error:  # a bug of ours must not end the daemon, nor stay unseen
            log.exception("control socket: no answer to %s", line[:200])
            return _refusal(Error(f"internal error: {type(error).__name__}: {error}; the daemon's log has the details"))


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    """Return (command, options) of a request. UsageError: it is none."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError("the request is not a line of JSON") from None
    if not isinstance(request, dict):
        raise UsageError('the request is not an object; expected {"command": ..., "options": {...}}')
    command, options = request.get("command"), request.get("options") or {}
    if not isinstance(command, str) or command not in COMMANDS:
        raise UsageError(f"{json.dumps(command)[:60]} is no command; known are {', '.join(COMMANDS)}")
    known = _OPTIONS.get(command, {})
    if not isinstance(options, dict) or any(name not in known for name in options):
        raise UsageError(
            f"{command}: unknown options {json.dumps(options)[:60]}; known are {', '.join(known) or 'none'}"
        )
    for name, value in options.items():
        expected = known[name]
        if type(value) is not expected or (isinstance(value, list) and any(type(item) is not str for item in value)):
            raise UsageError(f"{command}: option {name} is not of type {expected.__name__}")
    return command, options


def _encode(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply, separators=(",", ":"), default=str).encode() + b"\n"


def _refusal(error: Error) -> bytes:
    return _encode({"error": {"message": str(error), "exit_code": error.exit_code}})


# asyncio.timeout, not wait_for: in Python 3.11 that one may lose a cancellation, and the daemon would not end.


async def _read(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(_SILENCE_S):
        return await reader.readline()


async def _send(writer: asyncio.StreamWriter, reply: bytes) -> None:
    view = memoryview(reply)
    async with asyncio.timeout(_DRAIN_S):
        for start in range(0, len(view), _PIECE):
            writer.write(view[start : start + _PIECE])
            await writer.drain()


def _check_length(path: str) -> None:
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(f"{path}: too long for a socket ({_LONGEST_PATH} bytes at most); give a shorter --name")


def _bound(path: str) -> socket.socket:
    """Return a socket at `path`, readable and writable by its owner; what a dead daemon left is removed."""
    _check_length(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        with explained(Path(path), "the control socket cannot be made"):
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
            listener.bind(path)
        listener.setblocking(False)
    except Error:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


# The client's side: plain blocking sockets, which need no event loop.


def ask(
    settings: Settings, command: str, options: dict[str, Any] | None = None, timeout_s: float = ANSWER_TIMEOUT_S
) -> Any:
    """Return what the running node of this name answers to `command`.

    NotRunningError: there is none; TimedOutError: no answer within `timeout_s`; Error: what it refused, with its exit
    code.
    """
    deadline = time.monotonic() + timeout_s
    line = _exchange(settings, _encode({"command": command, "options": options or {}}), deadline, timeout_s)
    try:
        reply = json.loads(line)
        if "error" in reply:
            raise _error_of(reply["error"])
        return reply["data"]
    except (ValueError, KeyError, TypeError):
        raise Error(f"{settings.socket_path}: an answer that is none; is it a turnout of another version?") from None


def _exchange(settings: Settings, request: bytes, deadline: float, timeout_s: float) -> bytes:
    path = settings.socket_path
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
        try:
            client.settimeout(timeout_s)
            client.connect(str(path))
            with contextlib.suppress(BrokenPipeError):  # who is refused at once has an answer to read
                client.sendall(request, socket.MSG_NOSIGNAL)
            received = bytearray()
            while not received.endswith(b"\n"):
                client.settimeout(max(0.001, deadline - time.monotonic()))
                piece = client.recv(1 << 20)
                if not piece:
                    raise NotRunningError(f"node {settings.name!r} ended without an answer; see its log")
                received += piece
            return bytes(received)
        except TimeoutError:
            raise TimedOutError(
                f"node {settings.name!r} did not answer within {timeout_s:g} s; is it stopped?"
            ) from None
        except PermissionError:
            raise MissingFeatureError(f"{path}: not permitted; run as root") from None
        except OSError as error:
            raise _not_running(settings, error) from None


def _not_running(settings: Settings, error: OSError) -> Error:
    if "too long" in str(error):
        return ConfigError(f"{settings.socket_path}: too long for a socket; give a shorter --name")
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
        others = sorted(path.stem for path in settings.run_folder.glob("*.sock") if path.stem != settings.name)
        apart = f" (others, with --name: {', '.join(others)})" if others else ""
        return NotRunningError(f"node {settings.name!r} is not running; {_what_goes_on(settings)}{apart}")
    return NotRunningError(f"node {settings.name!r} does not answer: {error.strerror or error}")


def _what_goes_on(settings: Settings) -> str:
    """Return what a node that does not run has left, and what can be done, in words."""
    served: list[str] = []
    with contextlib.suppress(OSError):  # of others
        served = [interface_of(pin) for pin in settings.link_pins()]
    if not served:
        return f"start it with `turnout run{settings.flag}`"
    return (
        f"its programs on {', '.join(served)} go on forwarding: `turnout run{settings.flag}` takes over, "
        f"`turnout detach{settings.flag}` ends it"
    )


def _error_of(refusal: Any) -> Error:
    """Return the exception that a daemon's refusal stands for."""
    error = Error(str(refusal["message"]))
    error.exit_code = int(refusal["exit_code"])
    return error
