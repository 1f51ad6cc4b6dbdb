"""Real clients and servers: HTTP over TCP and single datagrams over UDP, whose answers name the server that gave them.

    serve_http(host, "web-1")                   -> a process; it is listening when this returns
    load_http(host, "10.96.0.10:80", connections=100).answers      -> {"web-1": 34, "web-2": 33, "web-3": 33}

This file is also the program that runs inside the namespaces, with nothing but the standard library:

    python clients.py http-server|udp-server --name NAME --listen ADDRESS:PORT
    python clients.py http-load|udp-load --target ADDRESS:PORT [options]      prints a Result as JSON

A `Result` counts answers by server, failures by cause, and flows that were answered by more than one server, which must
never happen to a connection.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import errno
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from perf.world import Host

_READY = "ready"
_LARGEST_ANSWER = 64 << 20


@dataclass
class Result:
    """What a load saw. `flows` are TCP connections or UDP sockets."""

    flows: int = 0
    answers: dict[str, int] = field(default_factory=dict)  # by server
    failures: dict[str, int] = field(default_factory=dict)  # by cause: refused, reset, timeout, closed, garbled ...
    moved: int = 0  # flows that were answered by more than one server
    flows_by_server: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def answered(self) -> int:
        """All answers."""
        return sum(self.answers.values())

    @property
    def failed(self) -> int:
        """All failures."""
        return sum(self.failures.values())


# In the parent: start the programs inside a host's namespace.


def serve_http(host: Host, name: str, listen: str = "0.0.0.0:8080", **options: Any) -> subprocess.Popen[str]:
    """Start an HTTP server in `host` that answers with `name`; it listens when this returns. `options`: of Popen."""
    return _serve(host, "http-server", name, listen, options)


def serve_udp(host: Host, name: str, listen: str = "0.0.0.0:8080", **options: Any) -> subprocess.Popen[str]:
    """Start a UDP server in `host` that answers every datagram with `name`; it listens when this returns."""
    return _serve(host, "udp-server", name, listen, options)


def load_http(host: Host, target: str, *, timeout_s: float = 60.0, **options: float) -> Result:
    """Run HTTP requests from `host` to the end. `options`: those of `http-load`, e.g. connections=100, requests=5."""
    return _result(host.run(_command("http-load", target=target, **options), timeout_s=timeout_s).stdout)


def load_udp(host: Host, target: str, *, timeout_s: float = 60.0, **options: float) -> Result:
    """Run UDP requests from `host` to the end. `options`: those of `udp-load`, e.g. flows=100, requests=5."""
    return _result(host.run(_command("udp-load", target=target, **options), timeout_s=timeout_s).stdout)


class Load:
    """A load that runs beside something else: `with Load(host, "http-load", target, seconds=60) as load: ...`.

    Leaving the block ends it, the requests in flight first; then `load.result` is there.
    """

    def __init__(self, host: Host, kind: str, target: str, **options: float) -> None:
        self.result = Result()
        self._host = host
        self._command = _command(kind, target=target, **options)

    def __enter__(self) -> Self:
        self._process = self._host.popen(self._command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        out, _err = self._process.communicate(timeout=30)
        if out:
            self.result = _result(out)


def _command(kind: str, **options: Any) -> list[str]:
    given = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    # -I: neither this folder nor the environment decides what the program imports.
    return [sys.executable, "-I", str(Path(__file__).resolve()), kind, *given]


def _serve(host: Host, kind: str, name: str, listen: str, options: Mapping[str, Any]) -> subprocess.Popen[str]:
    process = host.popen(_command(kind, name=name, listen=listen), stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    with process.stdout:  # it says nothing more
        is_ready = process.stdout.readline().strip() == _READY
    if not is_ready:
        from xdp.errors import Error  # the program itself runs isolated and needs nothing of ours

        raise Error(f"{host.name}: {kind} {name} does not listen at {listen}; is the port taken?")
    return process


def _result(text: str) -> Result:
    return Result(**json.loads(text))


# In the child.


def _say_ready(out: IO[str] = sys.stdout) -> None:
    print(_READY, file=out, flush=True)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


async def _http_server(name: str, address: tuple[str, int]) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                path = request.split(b" ", 2)[1]
                wanted = min(int(path[1:] or 0), _LARGEST_ANSWER) if path[1:].isdigit() else 0
                body = f"{name}\n".encode() + b"." * wanted
                head = f"HTTP/1.1 200 OK\r\nServer: {name}\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, *address, backlog=4096)
    _say_ready()
    async with server:
        await server.serve_forever()


class _UdpAnswers(asyncio.DatagramProtocol):
    def __init__(self, name: str) -> None:
        self._name = name.encode()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, sender: Any) -> None:
        self._transport.sendto(self._name + b" " + data, sender)  # type: ignore[attr-defined]


async def _udp_server(name: str, address: tuple[str, int]) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(lambda: _UdpAnswers(name), local_addr=address)
    _say_ready()
    await asyncio.Event().wait()


class _Tally:
    """Counts what flows see, until they are done, time is over or SIGINT says so."""

    def __init__(self, seconds: float) -> None:
        self.answers: collections.Counter[str] = collections.Counter()
        self.failures: collections.Counter[str] = collections.Counter()
        self.flows_by_server: collections.Counter[str] = collections.Counter()
        self.flows = self.moved = 0
        self._start = time.monotonic()
        self._end = self._start + seconds if seconds else float("inf")
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    @property
    def is_over(self) -> bool:
        return self._stopped or time.monotonic() >= self._end

    def finish_flow(self, servers: set[str]) -> None:
        self.flows += 1
        self.moved += len(servers) > 1
        self.flows_by_server.update(servers)

    def result(self) -> Result:
        seconds = round(time.monotonic() - self._start, 4)
        by_server = dict(self.flows_by_server)
        return Result(self.flows, dict(self.answers), dict(self.failures), self.moved, by_server, seconds)


def _cause(error: BaseException) -> str:
    """Return one word for what went wrong."""
    if isinstance(error, asyncio.IncompleteReadError):
        return "closed"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, OSError):
        names = {errno.ECONNREFUSED: "refused", errno.ECONNRESET: "reset", errno.EPIPE: "reset"}
        return names.get(error.errno or 0, errno.errorcode.get(error.errno or 0, "error").lower())
    return "garbled"


async def _http_flow(tally: _Tally, options: argparse.Namespace) -> None:
    """Open a connection and send requests on it, each after the last one's answer."""
    servers: set[str] = set()
    writer = None
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(*options.target), options.timeout)
        for number in range(options.requests):
            if tally.is_over and number:
                break
            writer.write(f"GET /{options.bytes} HTTP/1.1\r\nHost: vip\r\n\r\n".encode())
            name = await asyncio.wait_for(_http_answer(reader), options.timeout)
            tally.answers[name] += 1
            servers.add(name)
            if options.interval:
                await asyncio.sleep(options.interval)
    except (OSError, asyncio.IncompleteReadError, ValueError, IndexError) as error:
        tally.failures[_cause(error)] += 1
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), options.timeout)
    tally.finish_flow(servers)


async def _http_answer(reader: asyncio.StreamReader) -> str:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
    body = await reader.readexactly(int(lines["Content-Length"]))
    name = body.partition(b"\n")[0].decode()
    if name != lines["Server"]:
        raise ValueError(head)
    return name


class _UdpClient(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.answers: asyncio.Queue[bytes | Exception] = asyncio.Queue()

    def datagram_received(self, data: bytes, _sender: Any) -> None:
        self.answers.put_nowait(data)

    def error_received(self, error: Exception) -> None:
        self.answers.put_nowait(error)


async def _udp_flow(tally: _Tally, options: argparse.Namespace) -> None:
    """Open a connected socket and send datagrams on it, each after the last one's answer or its timeout."""
    servers: set[str] = set()
    loop = asyncio.get_running_loop()
    transport, client = await loop.create_datagram_endpoint(_UdpClient, remote_addr=options.target)
    for number in range(options.requests):
        if tally.is_over and number:
            break
        sent = str(number).encode()
        transport.sendto(sent)
        try:
            async with asyncio.timeout(options.timeout):
                while True:
                    answer = await client.answers.get()
                    if isinstance(answer, Exception):
                        raise answer
                    name, _, echoed = answer.decode().rpartition(" ")
                    if echoed.encode() == sent:  # not the late answer to an earlier one
                        break
            tally.answers[name] += 1
            servers.add(name)
        except (OSError, ValueError) as error:
            tally.failures[_cause(error)] += 1
        if options.interval:
            await asyncio.sleep(options.interval)
    transport.close()
    tally.finish_flow(servers)


async def _load(options: argparse.Namespace) -> Result:
    """Keep `concurrent` flows going until `flows` are done or `seconds` are over."""
    tally = _Tally(options.seconds)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, tally.stop)
    flow = _http_flow if options.kind == "http-load" else _udp_flow
    left = options.flows or sys.maxsize

    async def worker() -> None:
        nonlocal left
        await asyncio.sleep(options.interval * random.random())  # noqa: S311 - in step, all would ask at once each time
        while left > 0 and not tally.is_over:
            left -= 1
            await flow(tally, options)

    await asyncio.gather(*(worker() for _ in range(min(options.concurrent, left))))
    return tally.result()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clients.py", description="small clients and servers that name themselves")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("http-server", "udp-server"):
        server = kinds.add_parser(kind)
        server.add_argument("--name", required=True, help="what it answers with")
        server.add_argument("--listen", type=_address, required=True, metavar="ADDRESS:PORT")
    for kind in ("http-load", "udp-load"):
        load = kinds.add_parser(kind)
        load.add_argument("--target", type=_address, required=True, metavar="ADDRESS:PORT")
        flows = ("--connections", "--flows") if kind == "http-load" else ("--flows",)
        load.add_argument(
            *flows, dest="flows", type=int, default=0, help="how many in all; 0: until --seconds are over"
        )
        load.add_argument("--concurrent", type=int, default=50, help="how many at a time")
        load.add_argument("--requests", type=int, default=1, help="on each, one after the other")
        load.add_argument("--interval", type=float, default=0.0, help="seconds between two of them")
        load.add_argument("--bytes", type=int, default=0, help="of the answer's body beside the name (HTTP)")
        load.add_argument("--timeout", type=float, default=2.0, help="seconds until an answer counts as lost")
        load.add_argument("--seconds", type=float, default=0.0, help="end after so long; 0: when all is done")
    return parser


def main() -> int:
    """Run as a program."""
    options = _parser().parse_args()
    try:
        if options.kind == "http-server":
            asyncio.run(_http_server(options.name, options.listen))
        elif options.kind == "udp-server":
            asyncio.run(_udp_server(options.name, options.listen))
        else:
            if not options.flows and not options.seconds:
                options.flows = 100
            print(json.dumps(asdict(asyncio.run(_load(options)))))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        print(f"clients.py {options.kind}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
