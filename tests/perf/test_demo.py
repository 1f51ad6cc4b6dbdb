"""The demo: it ends well, says what it saw, and leaves nothing behind, however it is ended."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from perf.clients import Result
from perf.demo import scene, summary
from perf.demo.cost import Comparison, Cost, NotCompared
from perf.demo.display import Display
from perf.measure import Spread
from perf.world import RECORDS, plan, wait_until
from xdp.errors import Error

ROOT = Path(__file__).resolve().parents[2]
NAMES = scene.Names(f"demo-t{os.getpid()}")
OPTIONS = ["--name", f"t{os.getpid()}"]
SHORT = (
    f"import sys; from perf import demo; sys.exit(demo.main('t{os.getpid()}', seconds=2.0, keep='keep' in sys.argv))"
)
START_S = 180.0  # with the packet path to be compiled on a busy machine


# What needs no root.


def test_the_manifest_speaks_of_the_hosts_of_the_world():
    client, servers = plan({"client": "client", **scene.ENDPOINTS})
    hosts = tuple(end.address.ip for end in servers.hosts.values())
    assert {protocol: port.service.endpoints for protocol, port in scene.ports().items()} == {
        "tcp": hosts,
        "udp": hosts,
    }
    assert client.name == "client"


def test_a_missing_manifest_is_told(tmp_path):
    with pytest.raises(Error, match=r"demo\.yaml: not found; the demo runs from a checkout"):
        scene.ports(tmp_path / "demo.yaml")


def a_load(**changes: object) -> Result:
    spread = dict.fromkeys(scene.ENDPOINTS, 30)
    return Result(**{"flows": 9, "answers": spread, "flows_by_server": dict.fromkeys(spread, 3), **changes})


def seen(in_xdp: int = 990, **changes: object) -> summary.Traffic:
    lost = {"dropped by XDP": 0, "lost on their way to userspace": 2}
    return summary.Traffic({"tcp": a_load(**changes), "udp": a_load()}, in_xdp, 10, lost, "engine xdp")


COSTS = Comparison({"turnout": Cost(400, 90, 150), "iptables": Cost(2000, 50, 150)}, Spread(5.0, 4.8, 5.2))


def test_a_summary_of_what_went_well():
    text = summary.text(scene.ports(), seen(), COSTS, ["turnout demo --keep   again"])
    assert text.startswith("All 180 requests were answered")
    rows = [line.split() for line in text.splitlines()]
    assert ["shop/web:http", "10.96.0.10:80/TCP", "3", "3", "3", "connections,", "90", "answers"] in rows
    assert any(row[:5] == ["XDP,", "inside", "the", "kernel", "990"] and row[5] == "99.0%" for row in rows)
    assert ["lost", "on", "their", "way", "to", "userspace", "2"] in [row[:7] for row in rows]
    assert "dropped by XDP" not in text, "nothing was"
    assert "iptables takes 5.0 times as long (quartiles 4.8 to 5.2)" in text
    assert "the first packet wakes userspace" in text, "the slower one is named"
    assert max(map(len, text.splitlines())) <= 140


def test_what_was_lost_is_told_with_the_reasons():
    traffic = replace(seen(), lost={"dropped by XDP": 12, "dropped by userspace": 0}, drops={"NO_NEXT_HOP": 12})
    rows = [line.split() for line in summary.text(scene.ports(), traffic, COSTS, []).splitlines()]
    assert ["dropped", "by", "XDP", "12", "NO_NEXT_HOP", "12"] in rows
    assert not [row for row in rows if row[:3] == ["dropped", "by", "userspace"]]


@pytest.mark.parametrize(
    ("traffic", "costs", "problem"),
    [
        (seen(failures={"timeout": 3}), COSTS, "3 of 93 tcp requests failed: timeout 3"),
        (seen(moved=2), COSTS, "2 tcp connections were answered by more than one endpoint"),
        (seen(answers={"web-1": 5, "web-3": 5}), COSTS, "web-2 answered no tcp request"),
        (seen(in_xdp=0), COSTS, "XDP forwarded no packet"),
        (seen(), NotCompared("no answer", is_failure=True), "the comparison with iptables: no answer"),
    ],
)
def test_what_did_not_work_is_named_first(traffic, costs, problem):
    assert summary.problems(traffic, costs) == [problem]
    assert summary.text(scene.ports(), traffic, costs, []).startswith(f"Something did not work:\n  {problem}\n")


def test_a_machine_without_iptables_is_not_a_failure():
    missing = NotCompared("iptables: not found", is_failure=False)
    assert summary.problems(seen(), missing) == []
    assert "not compared: iptables: not found" in summary.text(scene.ports(), seen(), missing, [])


def played(**options: object) -> str:
    """Return what a display writes about two steps."""
    out = io.StringIO()
    with Display(Console(file=out, width=80, **options)) as display:
        with display.step("building"):
            display.show("a picture", "half done")
        with display.step("asking"):
            pass
    return out.getvalue()


def test_without_a_terminal_steps_are_plain_lines():
    lines = played().splitlines()
    assert [line.partition(" in ")[0] for line in lines] == ["building", "  done", "asking", "  done"]


def test_on_a_terminal_steps_stay_and_pictures_go():
    last = played(force_terminal=True).rpartition("done ")[0]
    assert "done" in last
    assert "a picture" not in last.splitlines()[-1]


# For real.


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SHORT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def turnout(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from dataplane.cli import main; main()", *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False, cwd=ROOT, timeout=START_S + 60)


def left_behind() -> list[str]:
    """Return everything that a demo of ours has made and not removed."""
    folders = [Path("/run/netns"), Path("/run/turnout"), Path("/run/turnout/bpf"), RECORDS, Path("/tmp")]
    files = [str(path) for folder in folders if folder.is_dir() for path in folder.iterdir() if NAMES.node in path.name]
    return files + processes()


def processes() -> list[str]:
    """Return the command lines that name the demo's node, and those that run inside its namespaces."""
    inodes = {path.stat().st_ino for path in Path("/run/netns").glob(f"turnout-{NAMES.node}*")}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if NAMES.node in command or (process / "ns/net").stat().st_ino in inodes:
                found.append(f"{process.name}: {command}")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def daemon_serves() -> bool:
    done = turnout("get", "flows", "--name", NAMES.node, "--limit", "1", "-o", "json")
    return done.returncode == 0 and done.stdout.strip() != "[]"


@pytest.fixture
def clean_up() -> Iterator[None]:
    yield
    turnout("demo", "--remove", *OPTIONS)


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.slow
def test_after_sigkill_the_next_demo_cleans_up_and_ends_well(clean_up):
    killed = start()
    assert wait_until(daemon_serves, START_S, 0.1), "traffic flows"
    daemon = int((scene.Names(NAMES.node).settings.lock_path).read_text())
    killed.kill()
    os.kill(daemon, signal.SIGKILL)
    killed.communicate(timeout=30)
    assert len(left_behind()) > 5, "nobody could clean up"

    again = start()
    out, err = again.communicate(timeout=START_S)
    assert again.returncode == 0, out + err
    assert err.startswith("the world of an earlier demo was still there; it is removed\n")
    assert err.endswith("nothing is left behind\n")
    assert out.startswith("All ")
    assert "iptables takes " in out
    assert left_behind() == []


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_it_and_all_is_removed(number, clean_up):
    demo = start()
    assert wait_until(daemon_serves, START_S, 0.1), "traffic flows"
    second = turnout("demo", *OPTIONS)
    assert (second.returncode, "this demo is running already" in second.stderr) == (1, True), second.stderr
    os.killpg(demo.pid, number)
    out, err = demo.communicate(timeout=30)
    assert (demo.returncode, out) == (128 + number, "")
    assert err.endswith("interrupted; all that the demo had made is removed\n")
    assert "Traceback" not in err
    assert left_behind() == []


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.slow
def test_a_kept_world_serves_until_it_is_removed(clean_up):
    demo = start("keep")
    out, err = demo.communicate(timeout=START_S)
    assert demo.returncode == 0, out + err
    curl = next(line for line in out.splitlines() if "ip netns exec" in line).split("   ")[0].split()
    answer = subprocess.run([*curl, "--silent", "--max-time", "5"], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() in scene.ENDPOINTS
    status = turnout("status", "--name", NAMES.node)
    assert status.returncode == 0, status.stdout
    assert not [name for name in left_behind() if "iptables" in name]

    removed = turnout("demo", "--remove", *OPTIONS)
    assert (removed.returncode, removed.stderr) == (0, "removed\n")
    assert left_behind() == []


@pytest.mark.root
@pytest.mark.bpf
def test_tables_of_somebody_else_are_not_touched(clean_up):
    pins = NAMES.settings.pins
    pins.mkdir(parents=True)
    try:
        done = turnout("demo", *OPTIONS)
        assert done.returncode == 1
        assert f"has left its tables in {pins}; stop it and `turnout detach --name {NAMES.node}`" in done.stderr
        assert pins.is_dir()
    finally:
        pins.rmdir()
    assert left_behind() == []


def test_keeping_and_removing_exclude_each_other():
    done = turnout("demo", "--keep", "--remove")
    assert done.returncode == 2 or os.geteuid() != 0
