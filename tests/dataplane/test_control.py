"""The control socket, tried with good clients and bad ones."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane import control
from dataplane.control import Lock, ask
from dataplane.settings import Settings
from tests.answering import answering
from xdp.errors import ConfigError, Error, NotRunningError, TimedOutError, UsageError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings("edge", (), (), run_folder=tmp_path)


_PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.sampled_from(control.COMMANDS))


def _nested(children):
    keys = st.sampled_from(["command", "options", "limit", "client", "x"])
    return st.one_of(st.lists(children, max_size=3), st.dictionaries(keys, children, max_size=4))


def echo(command, options):
    return [command, options]


def raw_exchange(settings: Settings, request: bytes) -> dict:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(settings.socket_path))
        with contextlib.suppress(BrokenPipeError):
            client.sendall(request)
        return json.loads(client.makefile("rb").readline())


def test_a_question_is_answered(settings):
    with answering(settings, echo):
        assert ask(settings, "flows", {"limit": 5, "client": "10.0.0.1"}) == [
            "flows",
            {"limit": 5, "client": "10.0.0.1"},
        ]
        assert ask(settings, "status") == ["status", {}]


@pytest.mark.faults(124)
def test_only_the_owner_may_ask_and_the_socket_goes_with_the_server(settings):
    with answering(settings, echo):
        assert stat.S_IMODE(settings.socket_path.stat().st_mode) == 0o600
    assert not settings.socket_path.exists()


def test_many_questions_on_one_connection(settings):
    with answering(settings, echo), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(settings.socket_path))
        client.sendall(b'{"command":"status"}\n' * 100)
        lines = client.makefile("rb")
        assert [json.loads(lines.readline()) for _ in range(100)] == [{"data": ["status", {}]}] * 100


def test_a_large_answer_arrives_whole(settings):
    rows = [{"client": f"10.0.{i >> 8 & 255}.{i & 255}:1"} for i in range(100_000)]
    with answering(settings, lambda *_: rows):
        assert ask(settings, "flows") == rows


def test_nobody_there_is_not_running(settings):
    with pytest.raises(NotRunningError, match=r"node 'edge' is not running; start it with `turnout run --name edge`"):
        ask(settings, "status")


def test_programs_that_go_on_without_their_node_are_told(settings):
    settings.pins.mkdir(parents=True)
    for interface in ("eth0", "eth1.7"):
        settings.link_pin(interface).touch()
    settings.egress_pin("eth2").touch()
    (settings.run_folder / "other.sock").touch()
    with pytest.raises(NotRunningError) as refused:
        ask(settings, "status")
    assert str(refused.value) == (
        "node 'edge' is not running; its programs on eth0, eth1.7 go on forwarding: `turnout run --name edge` takes "
        "over, `turnout detach --name edge` ends it (others, with --name: other)"
    )


@pytest.mark.faults(123)
def test_the_socket_of_a_dead_daemon_is_not_running_and_is_replaced(settings):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(settings.socket_path))
    with pytest.raises(NotRunningError, match="is not running"):
        ask(settings, "status")
    with answering(settings, echo):
        assert ask(settings, "status") == ["status", {}]


def test_other_nodes_that_run_are_named(settings, tmp_path):
    other = Settings("other", (), (), run_folder=tmp_path)
    with answering(other, echo), pytest.raises(NotRunningError, match=r"\(others, with --name: other\)"):
        ask(settings, "status")


def test_a_node_that_does_not_answer_in_time_is_told(settings):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(settings.socket_path))
        silent.listen()
        with pytest.raises(TimedOutError, match=r"did not answer within 0.1 s"):
            ask(settings, "status", timeout_s=0.1)


def test_a_refusal_keeps_its_message_and_exit_code(settings):
    def refuse(command, options):
        raise UsageError("no such flow")

    with answering(settings, refuse), pytest.raises(Error, match="no such flow") as caught:
        ask(settings, "flows")
    assert caught.value.exit_code == 2


def test_a_bug_in_an_answer_is_told_and_the_server_goes_on(settings, caplog):
    def fail(command, options):
        if command == "flows":
            raise KeyError("oops")
        return command

    with answering(settings, fail):
        with pytest.raises(Error, match="internal error: KeyError"):
            ask(settings, "flows")
        assert ask(settings, "status") == "status"
    assert "oops" in caplog.text


@pytest.mark.faults(124)
@pytest.mark.parametrize(
    ("request_line", "message"),
    [
        (b"hello\n", "not a line of JSON"),
        (b"\xff\xfe\n", "not a line of JSON"),
        (b"[" * 60_000 + b"\n", "not a line of JSON"),
        (b"[1]\n", "not an object"),
        (b'{"command":"flaws"}\n', '"flaws" is no command; known are status'),
        (b'{"command":["flows"]}\n', "is no command"),
        (b'{"command":"flows","options":[1]}\n', "unknown options"),
        (b'{"command":"flows","options":{"__class__":1}}\n', "unknown options"),
        (b'{"command":"status","options":{"limit":1}}\n', "unknown options"),
        (b'{"command":"flows","options":{"limit":"1"}}\n', "option limit is not of type int"),
        (b'{"command":"flows","options":{"limit":true}}\n', "option limit is not of type int"),
        (b'{"command":"flows","options":{"client":7}}\n', "option client is not of type str"),
        (b'{"command":"administer","options":{"endpoints":"10.0.0.1"}}\n', "option endpoints is not of type list"),
        (b'{"command":"administer","options":{"endpoints":[1]}}\n', "option endpoints is not of type list"),
        (b'{"command":"administer","options":{"deadline_s":1.5}}\n', "option deadline_s is not of type int"),
        (b"x" * 1_000_000, "longer than 65536 bytes"),
    ],
)
def test_a_request_that_is_none_is_refused(settings, request_line, message):
    with answering(settings, echo):
        reply = raw_exchange(settings, request_line)
        assert message in reply["error"]["message"]
        assert reply["error"]["exit_code"] == 2
        assert ask(settings, "status") == ["status", {}]


@pytest.mark.faults(124)
@given(
    st.one_of(st.binary(max_size=80), st.recursive(_PLAIN, _nested, max_leaves=8).map(lambda v: json.dumps(v).encode()))
)
def test_any_bytes_are_a_request_or_wrong_usage(line):
    try:
        command, _ = control._parse(line)
    except UsageError:
        return
    assert command in control.COMMANDS


@pytest.mark.faults(124)
def test_clients_that_are_silent_slow_or_gone_do_not_keep_others_waiting(settings):
    large = "x" * 10_000_000
    with answering(settings, lambda *_: large), contextlib.ExitStack() as stack:
        for number in range(30):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(settings.socket_path))
            if number % 3:  # asks, and does not read
                client.sendall(b'{"command":"flows"}\n')
            if number % 3 == 2:  # and goes away
                client.close()
        assert ask(settings, "status", timeout_s=5) == large


@pytest.mark.faults(124)
def test_more_clients_than_are_served_are_told_so(settings, monkeypatch):
    monkeypatch.setattr(control, "_MOST_CLIENTS", 8)
    with answering(settings, echo), contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(settings.socket_path))
        with pytest.raises(Error, match="8 clients are being served; try again"):
            ask(settings, "status")


def test_a_silent_client_is_let_go(settings, monkeypatch):
    monkeypatch.setattr(control, "_SILENCE_S", 0.05)
    with answering(settings, echo), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(settings.socket_path))
        assert client.recv(1) == b""


def test_a_hundred_clients_at_once(settings):
    with answering(settings, echo), ThreadPoolExecutor(20) as pool:
        assert list(pool.map(lambda _: ask(settings, "status"), range(100))) == [["status", {}]] * 100


@pytest.mark.faults(123)
def test_a_path_that_is_too_long_for_a_socket_says_so(tmp_path):
    settings = Settings("n" * 64, (), (), run_folder=tmp_path / ("f" * 60))
    settings.run_folder.mkdir()
    with pytest.raises(ConfigError, match="too long for a socket"), answering(settings, echo):
        pass
    with pytest.raises(ConfigError, match="too long for a socket"):
        ask(settings, "status")


def test_a_second_node_of_the_same_name_is_refused_and_another_name_is_not(settings, tmp_path):
    with Lock(settings), Lock(Settings("other", (), (), run_folder=tmp_path)):
        with pytest.raises(
            Error, match=rf"node 'edge' is running already \(pid {os.getpid()}\); stop it first"
        ) as caught:
            Lock(settings).__enter__()
        assert caught.value.exit_code == 1
    with Lock(settings):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults(123)
def test_of_many_that_want_a_name_one_has_it_at_a_time(settings):
    holders, refused = [], []

    def want(number: int) -> None:
        for _ in range(50):
            try:
                with Lock(settings):
                    holders.append(number)
                    assert holders == [number]
                    holders.remove(number)
            except Error:
                refused.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(want, range(4)))
    assert len(refused) < 200


@pytest.mark.faults(123)
def test_the_lock_of_a_killed_node_is_free(settings):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from dataplane.control import Lock; from dataplane.settings import Settings\n"
        "Lock(Settings('edge', (), (), run_folder=Path(sys.argv[1]))).__enter__()\n"
        "print('locked', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(settings.run_folder)], stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"locked\n"
        with pytest.raises(Error, match=rf"pid {child.pid}\)"):
            Lock(settings).__enter__()
        child.kill()
    with Lock(settings):
        pass


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Error, match=r"edge.lock: cannot be made"):
        Lock(Settings("edge", (), (), run_folder=tmp_path / "file")).__enter__()
