"""The command line, run as users run it: what it says, where, and with which exit code."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataplane.arguments import _spread
from dataplane.cli import main
from dataplane.control import COMMANDS
from dataplane.settings import Settings
from tests.answering import answering
from tests.statuses import STATUS

ROOT = Path(__file__).resolve().parents[2]
TURNOUT = [sys.executable, "-m", "dataplane.cli"]
HELPS = (
    [],
    *([name] for name in ("run", "validate", "status", "get", "demo", "detach")),
    *(["get", name] for name in ("services", "endpoints", "flows", "nexthops", "interfaces", "reasons")),
)
WEB = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  ports:
  - {name: http, port: 80}
  - {name: sip, port: 5060, protocol: SCTP}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.0.1.2]}, {addresses: [10.0.1.3]}]
"""
XDP_PACKETS = "received 1,234, forwarded 1,200, passed 20, dropped 9, punted 5, admitted 0, redirect-failed 2"
FLOW = {
    "protocol": "TCP",
    "client": "192.0.2.1:4000",
    "frontend": "10.96.0.10:80",
    "snat": "10.0.1.1:61000",
    "endpoint": "10.0.1.2:8080",
    "service": "shop/web:http",
    "state": "established",
    "offloaded": True,
    "packets": {"original": 3, "reply": 2},
    "bytes": {"original": 300, "reply": 200},
    "idle_s": 0.25,
    "expires_s": 431_999.75,
}
SERVICE = {
    "namespace": "shop",
    "name": "web",
    "port": "http",
    "protocol": "TCP",
    "frontends": ["10.96.0.10:80"],
    "endpoints": [
        {"address": "10.0.1.2:8080", "state": "ready", "weight": 1, "flows": 1},
        {"address": "10.0.1.3:8080", "state": "unready", "weight": 1, "flows": 2},
    ],
}


def turnout(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a run folder that is nobody else's if `run_folder` is given."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    environment |= options.pop("env", {})
    if (folder := options.pop("run_folder", None)) is not None:
        environment["TURNOUT_RUN"] = str(folder)
    return subprocess.run(
        [*TURNOUT, *args], capture_output=True, text=True, timeout=30, env=environment, check=False, **options
    )


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same in this process: quicker, for what needs no process of its own."""
    monkeypatch.setenv("TURNOUT_RUN", str(tmp_path))

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(args)
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def web(tmp_path: Path) -> str:
    path = tmp_path / "web.yaml"
    path.write_text(WEB)
    return str(path)


@contextlib.contextmanager
def node(folder: Path, **answers: Any) -> Iterator[list[Any]]:
    """A control socket that gives these answers (a list for `status` is one after the other); the questions."""
    asked: list[Any] = []

    def answer(command: str, options: dict[str, Any]) -> Any:
        asked.append((command, options))
        value = answers[command]
        return value.pop(0) if command == "status" and isinstance(value, list) else value

    with answering(Settings("node", (), (), run_folder=folder), answer):
        yield asked


# Help.


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_help_fits_80_columns_and_has_examples(command, call):
    code, out, err = call(*command, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert f"  turnout {' '.join(command)}".rstrip() in out.partition("Examples:")[2]


def test_help_takes_less_than_150_ms_of_cpu():
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "run" in turnout("--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.15


def test_no_command_is_wrong_usage_with_the_help():
    done = turnout()
    assert (done.returncode, done.stdout) == (2, "")
    assert "validate" in done.stderr


def test_the_version_is_told():
    assert turnout("--version").stdout.startswith("turnout ")


# Wrong usage.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["runn"], "turnout: no such command 'runn'. Did you mean 'run'?"),
        (["run", "--enginee", "x"], "turnout run: no such option '--enginee'. (Did you mean one of: '--engine'"),
        (["run", "--engine", "xpd"], "'--engine': 'xpd' is not one of auto, xdp, afxdp, raw; did you mean \"xdp\"?"),
        (["run", "--capacity", "0"], "'0' is not a number of connections; expected 1 to 500000000"),
        (["run", "--capacity", "many"], "'many' is not a number of connections"),
        (["run", "--metrics", "9100"], "'9100' is not ADDR:PORT; expected an address like 127.0.0.1:17420"),
        (["run", "--allow-external-ips", "10.0.0.1/8"], "10.0.0.1/8 has host bits set; expected a network like"),
        (["run", "-i", "a/b"], "'a/b' is no name of an interface; see `ip -br link`"),
        (["run", "--on-exit", ""], "'' is not one of keep, detach"),
        (["status", "--name", "a/b"], "'a/b' is no name; expected letters, digits, - and _"),
        *((["status", "--wait", text], f"{text!r} is no time to wait") for text in ("soon", "nan", "inf", "1e11")),
        (["drain", "10.0.0.1", "--wait", "-1"], "'-1' is no time to wait; expected seconds, 0 to 31622400"),
        (["drain", "10.0.0.1", "--deadline", "soon"], "'soon' is not a valid integer"),
        (["maint", "10.0.0.1", "--deadline", "60"], "turnout maint: no such option '--deadline'"),
        (["status", "more"], "got unexpected extra argument (more)"),
        (["get", "flowz"], "turnout get: no such command 'flowz'. Did you mean 'flows'?"),
        (["get", "flows", "--limit", "0"], "0 is not in the range x>=1"),
        (["get", "flows", "-o", "yaml"], "'yaml' is not one of 'table', 'wide', 'json'"),
        (["validate"], "turnout validate: no manifests; give them with -f PATH"),
    ],
)
def test_wrong_usage_is_one_line_with_the_cure(args, message, call):
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_name_in_the_environment_is_read_as_the_flag_is(tmp_path):
    assert turnout("status", env={"TURNOUT_NAME": "../x"}).returncode == 2
    assert "node 'edge'" in turnout("status", env={"TURNOUT_NAME": "edge"}, run_folder=tmp_path).stderr


def test_flags_of_several_values_take_them_in_a_row_and_one_by_one():
    flags = {"-f", "--file", "-i"}
    assert _spread(["-f", "a", "b", "-i", "x"], flags) == ["-f", "a", "-f", "b", "-i", "x"]
    assert _spread(["--file=a", "b", "-", "--zone", "z"], flags) == [
        *("--file=a", "--file", "b", "--file", "-"),
        *("--zone", "z"),
    ]
    assert _spread(["-f", "a", "--", "b"], flags) == ["-f", "a", "--", "b"]
    assert _spread(["--zone", "z", "b"], flags) == ["--zone", "z", "b"]


# Validate.


def test_valid_manifests_exit_0_and_what_is_not_honoured_is_named(web):
    done = turnout("validate", "-f", web)
    assert (done.returncode, done.stdout) == (0, "")
    nobody = 'no EndpointSlice has a port "sip" with protocol SCTP: nobody serves it'
    assert done.stderr.splitlines() == [
        f"note: {web}:9: Service shop/web: spec.ports[1].protocol: SCTP is not forwarded yet; this port is left out",
        f"note: {web}:9: Service shop/web: spec.ports[1]: {nobody}",
        "valid: 1 Service, 1 EndpointSlice, 2 endpoints",
    ]


def test_ports_that_do_not_find_each_other_and_missing_node_ports_are_noted_with_their_lines():
    wrong = WEB.replace("http, port: 8080", "htp, port: 8080").replace("SCTP", "UDP")
    wrong = wrong.replace("  ports:\n", "  type: NodePort\n  ports:\n").replace(
        "port: 80}", "port: 80, nodePort: 30080}"
    )
    done = turnout("validate", "-f", "-", input=wrong)
    assert done.returncode == 0
    served = "no EndpointSlice has a port"
    cure = "no node port to answer at; set one (in a cluster the apiserver does that)"
    meant = '"htp" is no port of Service shop/web; did you mean "http"?'
    assert done.stderr.splitlines() == [
        f'note: <stdin>:9: Service shop/web: spec.ports[0]: {served} "http" with protocol TCP: nobody serves it',
        f"note: <stdin>:10: Service shop/web: spec.ports[1].nodePort: {cure}",
        f'note: <stdin>:10: Service shop/web: spec.ports[1]: {served} "sip" with protocol UDP: nobody serves it',
        f"note: <stdin>:16: EndpointSlice shop/web-1: ports[0].name: {meant}",
        "valid: 1 Service, 1 EndpointSlice, 2 endpoints",
    ]


def test_slices_and_services_that_do_not_find_each_other_are_noted(tmp_path):
    path = tmp_path / "web.yaml"
    path.write_text(WEB.replace(", labels: {kubernetes.io/service-name: web}", ""))
    done = turnout("validate", "-f", str(path))
    assert done.returncode == 0
    assert (
        f"note: {path}:11: EndpointSlice shop/web-1: belongs to no Service; give it the label kubernetes.io"
        in done.stderr
    )
    assert (
        f"note: {path}:2: Service shop/web: has no EndpointSlice; one needs the label kubernetes.io/service-"
        in done.stderr
    )


def test_files_without_a_service_are_noted_and_no_file_at_all_is_an_error(tmp_path):
    done = turnout("validate", "-f", str(tmp_path))
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == f"{tmp_path}: no manifest here; expected files that end in .yaml, .yml or .json\n"
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    for arguments in (["-f", str(tmp_path)], ["-f", "-"]):
        done = turnout("validate", *arguments, input="")
        assert done.returncode == 0
        assert done.stderr.splitlines() == [
            f"note: {arguments[1]}: no Service found: there is nothing to serve",
            "valid: 0 Services, 0 EndpointSlices, 0 endpoints",
        ]


def test_manifests_from_stdin_a_folder_and_a_config_file(web, tmp_path):
    assert turnout("validate", "-f", "-", input=WEB).returncode == 0
    assert turnout("validate", "-f", str(tmp_path)).returncode == 0
    (tmp_path / "turnout.conf").write_text("file: web.yaml\n")
    assert turnout("validate", "--config", str(tmp_path / "turnout.conf")).returncode == 0


def test_every_problem_of_every_file_is_told(web, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(WEB.replace("port: 80}", "port: 70000}").replace("clusterIP", "clusterIp"))
    done = turnout("validate", "-f", web, str(bad), str(tmp_path / "none.yaml"))
    assert (done.returncode, done.stdout) == (4, "")
    lines = done.stderr.splitlines()
    assert f'{bad}:6: Service shop/web: spec.clusterIp: unknown field; did you mean "clusterIP"?' in lines
    assert any(line.startswith(f"{bad}:8: Service shop/web: spec.ports[0].port: 70000 is not a port") for line in lines)
    assert f"{tmp_path}/none.yaml: no such file or folder; check the path given with -f" in lines


def test_a_wrong_configuration_file_exits_4(tmp_path):
    path = tmp_path / "turnout.yaml"
    path.write_text("capacity: 0\nzonne: a\n")
    done = turnout("validate", "--config", str(path))
    assert done.returncode == 4
    assert done.stderr.splitlines() == [
        f"{path}:1: capacity: '0' is not a number of connections; expected 1 to 500000000",
        f'{path}:2: zonne: unknown setting; did you mean "zone"?',
    ]


# Asking a node.


@pytest.mark.parametrize(
    "command", [["status"], *(["get", name] for name in COMMANDS[1:-1]), ["drain", "10.0.0.1"]], ids=" ".join
)
def test_without_a_node_it_is_not_running(command, call):
    assert call(*command) == (3, "", "turnout: node 'node' is not running; start it with `turnout run`\n")


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("degraded", 5), ("failed", 1)])
def test_the_exit_code_of_status_is_the_state(tmp_path, state, code):
    why = [] if state == "ok" else ["eth1: the interface is down", "and \x1b[31mmore"]
    with node(tmp_path, status={**STATUS, "state": state, "why": why}):
        text, data = turnout("status", run_folder=tmp_path), turnout("status", "-o", "json", run_folder=tmp_path)
    assert (text.returncode, data.returncode) == (code, code)
    assert json.loads(data.stdout)["state"] == state
    first, *rest = text.stdout.splitlines()
    assert first == f"{state.upper()}  node node: 2 Services, 3 endpoints, up 1 d 2 h"
    assert ("  why       eth1: the interface is down" in rest) == (state != "ok")
    assert any(line.startswith("  next      ") for line in rest) == (state != "ok")
    assert "\x1b" not in text.stdout


def test_status_shows_the_node_on_one_screen(tmp_path):
    with node(tmp_path, status=STATUS):
        assert turnout("status", run_folder=tmp_path).stdout.splitlines() == [
            "OK  node node: 2 Services, 3 endpoints, up 1 d 2 h",
            "engine      xdp",
            "seed        public",
            "interfaces  eth0 native, 1,000 packets received",
            "            eth1 generic, 5 packets received: asked for",
            "flows       [#####...............] 250,000 of 1,000,000 (25.0%)",
            "revision    7 programmed",
            "packets     xdp: " + XDP_PACKETS,
            "            userspace: received 4, forwarded 3, passed 0, dropped 1, punt-lost 1, originated 0",
            "            egress: received 50, forwarded 30, passed 20",
            "taken out   2 drained (next deadline in 9 min 59 s), 1 in maintenance; 17 connections ended by that",
            "refusing    shop/old:http: no endpoint for new clients",
            "sockets     led 12, passed 30, refused 1",
            "reasons     FORWARDED 1,200",
            "            NEW_FLOW 4",
        ]


def test_status_waits_until_the_node_is_ok(tmp_path):
    degraded = {**STATUS, "state": "degraded", "why": ["not yet"]}
    with node(tmp_path, status=[degraded, degraded, STATUS]) as asked:
        assert turnout("status", "--wait", "20", run_folder=tmp_path).returncode == 0
    assert len(asked) == 3


def test_status_that_waits_in_vain_times_out_and_says_why(tmp_path):
    done = turnout("status", "--wait", "0.2", run_folder=tmp_path)
    assert (done.returncode, done.stdout) == (6, "")
    assert "was not ok within 0.2 s; node 'node' is not running" in done.stderr
    with node(tmp_path, status={**STATUS, "state": "degraded", "why": ["eth1: down"]}):
        done = turnout("status", "--wait", "0.2", run_folder=tmp_path)
    assert done.returncode == 6
    assert "degraded: eth1: down" in done.stderr


def test_tables_have_headings_and_a_line_for_each(tmp_path):
    with node(tmp_path, services=[SERVICE], flows=[FLOW], reasons={"NEW_FLOW": 3}, nexthops=[]):
        services = turnout("get", "services", run_folder=tmp_path).stdout.splitlines()
        flows = turnout("get", "flows", run_folder=tmp_path).stdout.splitlines()
        wide = turnout("get", "flows", "-o", "wide", run_folder=tmp_path).stdout.splitlines()
        reasons = turnout("get", "reasons", run_folder=tmp_path).stdout.splitlines()
        nothing = turnout("get", "nexthops", run_folder=tmp_path)
    assert [line.split() for line in services] == [
        ["SERVICE", "PROTOCOL", "FRONTENDS", "READY", "FLOWS"],
        ["shop/web:http", "TCP", "10.96.0.10:80", "1/2", "3"],
    ]
    assert flows[0].split()[:6] == ["PROTOCOL", "CLIENT", "FRONTEND", "ENDPOINT", "SERVICE", "STATE"]
    assert flows[1].split()[1:4] == ["192.0.2.1:4000", "10.96.0.10:80", "10.0.1.2:8080"]
    assert wide[0].split()[:9] == [*flows[0].split()[:8], "SNAT"]
    assert "10.0.1.1:61000" in wide[1].split()
    assert [line.split() for line in reasons] == [["REASON", "PACKETS"], ["NEW_FLOW", "3"]]
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "no nexthops\n")


def test_json_is_what_the_node_says(tmp_path):
    with node(tmp_path, flows=[FLOW], services=[SERVICE]):
        assert json.loads(turnout("get", "flows", "-o", "json", run_folder=tmp_path).stdout) == [FLOW]
        assert json.loads(turnout("get", "services", "-o", "json", run_folder=tmp_path).stdout) == [SERVICE]


def test_filters_of_flows_are_the_nodes_work(tmp_path):
    with node(tmp_path, flows=[]) as asked:
        turnout("get", "flows", "--service", "shop/web", "--client", "192.0.2.1", "--limit", "5", run_folder=tmp_path)
    assert asked == [("flows", {"service": "shop/web", "client": "192.0.2.1", "limit": 5})]


@pytest.mark.faults(87)
def test_what_is_said_of_an_endpoint_is_answered_with_its_deadline(tmp_path):
    row = {"address": "10.0.1.2:8080", "state": "drain", "deadline_s": 59.9, "open": 3, "without_endpoint": ["a/b:c"]}
    other = {**row, "address": "10.0.1.3:8080", "deadline_s": None}
    with node(tmp_path, administer=[row, other]) as asked:
        told = turnout("drain", "10.0.1.2", "10.0.1.3:8080", "--deadline", "60", run_folder=tmp_path)
        turnout("drain", "10.0.1.2", run_folder=tmp_path)
    assert [line.split() for line in told.stdout.splitlines()] == [
        ["ADDRESS", "STATE", "DEADLINE", "OPEN"],
        ["10.0.1.2:8080", "drain", "in", "59", "s", "3"],
        ["10.0.1.3:8080", "drain", "-", "3"],
    ]
    assert told.stderr == "warning: a/b:c has no endpoint left for new clients; they are refused\n"
    assert asked == [
        ("administer", {"endpoints": ["10.0.1.2", "10.0.1.3:8080"], "state": "drain", "deadline_s": 60}),
        ("administer", {"endpoints": ["10.0.1.2"], "state": "drain"}),
    ]


@pytest.mark.faults(124)
def test_escape_sequences_in_names_do_not_reach_the_terminal(tmp_path):
    nasty = {**SERVICE, "name": "we\x1b]0;owned\x07b\n[bold]"}
    with node(tmp_path, services=[nasty]):
        for output in ("table", "json"):
            shown = turnout("get", "services", "-o", output, run_folder=tmp_path).stdout
            assert not set(shown) & {"\x1b", "\x07"}
            assert "owned" in shown
            assert "[bold]" in shown


# Surroundings.


def on_terminal(*args: str, columns: int, env: dict[str, str]) -> str:
    """Return what a command prints on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ours)
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "TERM": "xterm"}
        process = subprocess.Popen([*TURNOUT, *args], stdout=theirs, stderr=theirs, env=environment | env)
        os.close(theirs)
        said = b""
        while select.select([ours], [], [], 20)[0]:
            try:
                said += os.read(ours, 65536)
            except OSError:  # EIO: the other side is closed
                break
        process.wait()
    return said.decode()


@pytest.mark.faults(124)
def test_colours_only_on_a_terminal_that_wants_them(tmp_path):
    env = {"TURNOUT_RUN": str(tmp_path)}
    with node(tmp_path, status=STATUS):
        assert "\x1b[1;32mOK" in on_terminal("status", columns=80, env=env)
        assert "\x1b[1;32m" not in on_terminal("status", columns=80, env={**env, "NO_COLOR": "1"})
        assert "\x1b" not in turnout("status", run_folder=tmp_path).stdout


@pytest.mark.faults(124)
def test_a_terminal_of_20_columns_shows_everything(tmp_path):
    with node(tmp_path, services=[SERVICE]):
        shown = on_terminal("get", "services", columns=20, env={"TURNOUT_RUN": str(tmp_path), "NO_COLOR": "1"})
    assert "…" not in shown
    assert "Traceback" not in shown


@pytest.mark.faults(124)
def test_a_locale_without_unicode_is_no_obstacle(tmp_path):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    with node(tmp_path, services=[{**SERVICE, "name": "wéb"}]):
        done = turnout("get", "services", env=environment, run_folder=tmp_path)
    assert done.returncode == 0
    assert "w\\xe9b" in done.stdout


@pytest.mark.faults(124)
def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    with node(tmp_path, flows=[FLOW] * 5_000):
        done = subprocess.run(
            f"{' '.join(TURNOUT)} get flows -o json | head -1; echo ${{PIPESTATUS[0]}}",
            shell=True,
            executable="/bin/bash",
            capture_output=True,
            text=True,
            timeout=30,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TURNOUT_RUN": str(tmp_path)},
            check=False,
        )
    assert done.stdout.splitlines() == ["[", "141"]  # as a shell tells of SIGPIPE
    assert done.stderr == ""


def test_tracebacks_are_for_those_who_ask(tmp_path):
    broken = {**STATUS, "flows": None}
    with node(tmp_path, status=broken):
        plain = turnout("status", run_folder=tmp_path)
        asked = turnout("status", "--debug", run_folder=tmp_path)
    assert (plain.returncode, asked.returncode) == (1, 1)
    assert plain.stderr.startswith("turnout: internal error: TypeError: ")
    assert "Traceback" not in plain.stderr
    assert "Traceback" in asked.stderr


@pytest.mark.root
@pytest.mark.parametrize("command", ["run", "detach", "demo"])
def test_without_root_it_exits_77_and_touches_nothing(command, tmp_path):
    program = [*TURNOUT, command, *(["-f", "/nonexistent", "-i", "nosuch"] if command == "run" else [])]
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", *program],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TURNOUT_RUN": str(tmp_path)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr.startswith(f"turnout: `turnout {command}` needs root (here: no CAP_NET_ADMIN); try `sudo ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_detach_of_nothing_says_so(tmp_path):
    done = turnout("detach", run_folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "node 'node' has left nothing behind\n")


@pytest.mark.root
@pytest.mark.faults(83)
@pytest.mark.parametrize(
    ("secret", "problem"),
    [(None, "no such file; check the path given with --seed-file"), ("short", "5 bytes are no secret; expected 16")],
    ids=["missing", "short"],
)
def test_a_start_without_the_secret_that_it_is_told_of_exits_4_and_touches_nothing(tmp_path, secret, problem):
    seed, run_folder = tmp_path / "seed", tmp_path / "run"
    run_folder.mkdir()
    if secret is not None:
        seed.write_text(secret)
        seed.chmod(0o600)
    done = turnout("run", "-f", "web.yaml", "-i", "lo", "--seed-file", str(seed), run_folder=run_folder)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"{seed}: {problem}")
    assert list(run_folder.iterdir()) == []
