"""Bad input is told in a line that names the thing and the cure, with its exit code, and changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dataplane.control import ask
from dataplane.settings import Settings
from perf.world import Host, World, wait_until
from tests import cgroups
from xdp import kernel, links, maps, removing
from xdp.errors import Error, NotRunningError

pytestmark = [pytest.mark.root, pytest.mark.bpf]

ROOT = Path(__file__).resolve().parents[2]
NAME = f"tb{os.getpid() % 100_000}"
TURNOUT = [sys.executable, "-m", "dataplane.cli"]
SETTINGS = Settings(NAME, (), ())
START_S = 120.0  # the packet path may have to be compiled
VIP = "10.96.0.10"


def manifest(vip: str = VIP, endpoint: str = "10.77.2.2", port: object = 80, more: str = "") -> str:
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop}}
spec:
  clusterIP: {vip}
  ports:
  - port: {port}
{more}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: web-1, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}
addressType: IPv4
ports: [{{name: "", port: 8080}}]
endpoints:
- addresses: [{endpoint}]
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(NAME, ["client", "web"]) as world:
        world.owns_folder(SETTINGS.pins)
        yield world


@pytest.fixture
def web(tmp_path: Path) -> Path:
    path = tmp_path / "web.yaml"
    path.write_text(manifest())
    return path


@pytest.fixture(autouse=True)
def nothing_left(world: World) -> Iterator[None]:
    """Remove what a test leaves on purpose."""
    yield
    done = turnout(world.node, "detach")
    assert done.returncode == 0, done.stderr


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TURNOUT_NAME": NAME, **more}


def turnout(
    node: Host, *args: object, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command on the node to its end."""
    command = node.inside([*prefix, *TURNOUT, *map(str, args)])
    return subprocess.run(
        command, capture_output=True, text=True, timeout=START_S, env=environment(**(env or {})), check=False
    )


def run_args(path: Path, *more: object) -> list[str]:
    return ["run", "-f", str(path), "-i", "eth0", "eth1", "--capacity", "1000", *map(str, more)]


def state(within_s: float = 5.0) -> dict[str, Any]:
    answer: dict[str, Any] = ask(SETTINGS, "status", timeout_s=within_s)
    return answer


@contextlib.contextmanager
def daemon(
    world: World,
    path: Path,
    *more: object,
    prefix: tuple[str, ...] = (),
    settings: Settings = SETTINGS,
    env: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A node that serves; it is ended with SIGTERM."""
    log = path.with_suffix(".log")
    command = [*prefix, *TURNOUT, *run_args(path, *more)]
    with log.open("wb") as stderr:
        process = world.node.popen(command, stderr=stderr, env=environment(**(env or {})))

    def answers() -> bool:
        if process.poll() is not None:
            pytest.fail(f"the daemon ended: {log.read_text()}")
        try:
            return bool(ask(settings, "status", timeout_s=5))
        except Error:
            return False

    try:
        assert wait_until(answers, START_S, 0.05), log.read_text()
        yield process
    finally:
        world.end(process)


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line[:1].isdigit()]  # those with a time are the log's
    assert (done.returncode, done.stdout, len(lines)) == (code, "", 1), done.stderr
    for part in parts:
        assert part in lines[0]


def assert_nothing_was_touched(world: World) -> None:
    assert not SETTINGS.pins.exists()
    assert not SETTINGS.socket_path.exists()
    assert not SETTINGS.table_folder.exists()
    assert not SETTINGS.filter_record.exists()
    assert not SETTINGS.namespace_path.exists()
    assert world.node.run(["nft", "list", "tables"]).stdout == ""
    for name in ("eth0", "eth1"):
        shown = json.loads(world.node.run(["ip", "-j", "link", "show", name]).stdout)
        assert "xdp" not in shown[0]
    neighbours = world.node.run(["ip", "neigh", "show"]).stdout
    assert "managed" not in neighbours
    assert "extern_learn" not in neighbours


# At the start.

ANOTHER = (
    manifest(endpoint="10.77.2.3")
    .replace("name: web", "name: other")
    .replace("service-name: web", "service-name: other")
)
BAD_MANIFESTS = {
    "unparsable": ("kind: [Service\n", "web.yaml:2: is not YAML"),
    "tabs": ("a:\n\tb: c", "web.yaml:2: "),
    "twice": (manifest(more="  clusterIP: 10.96.0.11"), "web.yaml:9: Service shop/web: spec.clusterIP: comes twice"),
    "kind": (manifest().replace("kind: Service", "kind: Servise"), 'web.yaml:3: kind: "Servise" is not a kind'),
    "field": (manifest(more="  typo: x"), "web.yaml:9: Service shop/web: spec.typo: unknown field"),
    "port-0": (manifest(port=0), "web.yaml:8: Service shop/web: spec.ports[0].port: 0 is not a port"),
    "port-70000": (manifest(port=70000), "web.yaml:8: Service shop/web: spec.ports[0].port: 70000 is not a port"),
    "port-text": (manifest(port="http"), "web.yaml:8: Service shop/web: spec.ports[0].port: "),
    "loopback": (manifest(endpoint="127.0.0.1"), "endpoints[0].addresses[0]: 127.0.0.1 is "),
    "one-vip": (manifest() + "---" + ANOTHER, f"{VIP}:80/TCP belongs to Service shop/web already"),
}


@pytest.mark.parametrize(("text", "said"), BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_bad_manifest_is_refused(world, web, text, said):
    web.write_text(text)
    done = turnout(world.node, "validate", "-f", web)
    assert (done.returncode, done.stdout) == (4, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_node_does_not_start_with_bad_manifests(world, web):
    web.write_text(manifest(port=70000))
    done = turnout(world.node, *run_args(web))
    assert_one_line(done, 4, f"{web}:8: Service shop/web: spec.ports[0].port: 70000 is not a port")
    assert_nothing_was_touched(world)


def test_a_missing_manifest_is_refused(world, tmp_path):
    done = turnout(world.node, *run_args(tmp_path / "none.yaml"))
    assert_one_line(done, 4, f"{tmp_path}/none.yaml: no such file or folder; check the path given with -f")
    assert_nothing_was_touched(world)


def test_an_interface_that_does_not_exist_is_refused_with_a_suggestion(world, web):
    done = turnout(world.node, "run", "-f", web, "-i", "eht0")
    assert_one_line(done, 2, 'eht0: no such interface in this network namespace; did you mean "eth0"?')
    done = turnout(world.node, "run", "-f", web, "-i", "eth0,eth1")
    assert_one_line(
        done, 2, "eth0,eth1: no such interface", "; several are given with spaces between them: -i eth0 eth1"
    )
    assert_nothing_was_touched(world)


@pytest.mark.faults(98)
def test_another_xdp_program_is_left_alone(world, web):
    with world.node.entered():
        program = kernel.prog_load("stranger", _PASS)
        link = links.create_xdp(program, socket.if_nametoindex("eth1"), "native")
    try:
        done = turnout(world.node, *run_args(web))
        cure = f"end its owner, of whom `bpftool link show id {links.info(link).id}` tells"
        assert_one_line(done, 1, "eth1: another XDP program (native, id ", cure)
        assert not SETTINGS.pins.exists()
        assert links.info(link).ifindex
    finally:
        os.close(link)
        os.close(program)
    assert_nothing_was_touched(world)


def test_an_interface_that_another_node_serves_is_told_with_how_to_end_that(world, web):
    with daemon(world, web):
        for name in ("eth0", "eth1"):
            done = turnout(world.node, "run", "-f", web, "-i", name, "--name", f"{NAME}-2")
            cure = f"`turnout detach --name {NAME}`, or be its successor with --name {NAME}"
            assert_one_line(done, 1, f"{name}: is served by turnout node '{NAME}'; stop that and {cure}")
    assert not replace(SETTINGS, name=f"{NAME}-2").pins.exists()


# Two instructions: the result is XDP_PASS, and the end.
_PASS = bytes.fromhex("b700000002000000" + "9500000000000000")


def test_metrics_at_an_address_or_port_that_cannot_be_had_keep_it_from_starting(world, web):
    with world.node.entered(), socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = turnout(world.node, *run_args(web, "--metrics", f"127.0.0.1:{port}"))
    assert_one_line(done, 1, f"--metrics 127.0.0.1:{port}: the port is taken")
    assert_nothing_was_touched(world)
    done = turnout(world.node, *run_args(web, "--metrics", "192.0.2.1:9100"))
    assert_one_line(done, 2, "--metrics 192.0.2.1:9100: ", "expected an address of this machine")
    assert_nothing_was_touched(world)


def test_a_folder_that_is_no_cgroup_is_refused(world, web, tmp_path):
    for folder in (tmp_path, tmp_path / "none", web, cgroups.mounted() / "cgroup.procs"):
        done = turnout(world.node, *run_args(web, "--socket-cgroup", folder))
        assert_one_line(done, 2, f"{folder}: is not the folder of a cgroup v2; `findmnt -t cgroup2`")
    done = turnout(world.node, *run_args(web, "--socket-cgroup", "sys/fs"))
    assert_one_line(done, 2, "'sys/fs' is not the whole path of a folder; expected one like /sys/fs/cgroup")
    assert_nothing_was_touched(world)


def test_clients_on_the_node_are_not_for_engine_raw(world, web):
    done = turnout(world.node, *run_args(web, "--engine", "raw", "--socket-cgroup", cgroups.mounted()))
    assert_one_line(done, 2, "--socket-cgroup needs BPF, which engine raw does without; leave out one of the two")
    assert_nothing_was_touched(world)


def test_engine_auto_that_falls_to_raw_says_that_clients_on_the_node_are_not_led(world, web, tmp_path):
    flag = ("--socket-cgroup", cgroups.mounted())
    with daemon(world, web, *flag, env=without_bcc(tmp_path)):
        told = state()
        assert (told["state"], told["engine"], told["sockets"]) == ("degraded", "raw", None)
        assert "clients on this node are not led: engine raw has no BPF" in told["why"][0]


def test_without_bcc_engine_xdp_is_a_missing_feature(world, web, tmp_path):
    done = turnout(world.node, *run_args(web, "--engine", "xdp"), env=without_bcc(tmp_path))
    assert_one_line(done, 77, "bcc", "python3-bpfcc")
    assert_nothing_was_touched(world)


@pytest.mark.faults(100)
def test_without_a_bpffs_engine_xdp_is_a_missing_feature(world, web, tmp_path):
    folder = tmp_path / "run"
    done = turnout(world.node, *run_args(web, "--engine", "xdp"), prefix=NO_MOUNTS, env={"TURNOUT_RUN": str(folder)})
    assert_one_line(done, 77, str(folder / "bpf"), "bpffs", "root")
    assert not list((folder / "bpf").iterdir())
    assert_nothing_was_touched(world)


@pytest.mark.parametrize(("engine", "limit"), [("xdp", 20), ("xdp", 60), ("raw", 12), ("raw", 20), ("raw", 28)])
def test_F112_too_few_descriptors_are_told_and_leave_nothing(world, web, engine, limit):
    done = turnout(world.node, *run_args(web, "--engine", engine), prefix=("prlimit", f"--nofile={limit}"))
    assert_one_line(done, 1, "oo many open files")
    assert "internal error" not in done.stderr
    assert_nothing_was_touched(world)


def without_bcc(folder: Path) -> dict[str, str]:
    """Return the environment of a machine that has no bcc."""
    (folder / "lib").mkdir()
    (folder / "lib" / "bcc.py").write_text("raise ModuleNotFoundError(\"No module named 'bcc'\", name='bcc')\n")
    return {"PYTHONPATH": f"{folder / 'lib'}:{ROOT}"}


NO_MOUNTS = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")


@pytest.mark.parametrize("lacking", ["bcc", "bpffs"])
def test_engine_auto_falls_to_raw_and_says_why(world, web, tmp_path, lacking):
    env = without_bcc(tmp_path) if lacking == "bcc" else {"TURNOUT_RUN": str(tmp_path / "run")}
    prefix = NO_MOUNTS if lacking == "bpffs" else ()
    settings = replace(SETTINGS, run_folder=tmp_path / "run") if lacking == "bpffs" else SETTINGS
    with daemon(world, web, prefix=prefix, settings=settings, env=env) as process:
        told = ask(settings, "status")
        assert (told["state"], told["engine"]) == ("ok", "raw")
        assert [(one["name"], one["xdp_mode"]) for one in told["interfaces"]] == [("eth0", None), ("eth1", None)]
        assert all(one["why"].startswith("no engine xdp: ") and lacking in one["why"] for one in told["interfaces"])
        shown = turnout(world.node, "status", env=env)
        assert (shown.returncode, "eth0 raw, " in shown.stdout) == (0, True)
        assert world.node.run(["nft", "list", "tables"]).stdout == f"table netdev turnout_{NAME}\n"
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(10) == 0
    with daemon(world, web, prefix=prefix, settings=settings, env=env) as process:
        assert "took over 0 connections" in web.with_suffix(".log").read_text(), "the tables of before"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) == 0
    assert_nothing_was_touched(world)


def test_engine_raw_without_the_right_to_packet_sockets_is_a_missing_privilege(world, web):
    no_sockets = ("setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw")
    done = turnout(world.node, *run_args(web, "--engine", "raw"), prefix=no_sockets)
    assert_one_line(done, 77, "CAP_NET_RAW", "sudo")
    assert_nothing_was_touched(world)


def test_engine_raw_without_nft_is_a_missing_feature(world, web, tmp_path):
    done = turnout(world.node, *run_args(web, "--engine", "raw"), prefix=("env", f"PATH={tmp_path}"))
    assert_one_line(done, 77, "nft is not installed", "apt install nftables")
    assert_nothing_was_touched(world)


@pytest.mark.faults(127)
def test_engine_raw_is_refused_where_xdp_programs_were_left(world, web):
    with daemon(world, web):
        pass
    done = turnout(world.node, *run_args(web, "--engine", "raw"))
    assert_one_line(done, 1, "has left XDP programs", "`turnout detach` first")
    assert SETTINGS.link_pins()


@pytest.mark.faults(127)
def test_engine_xdp_clears_up_behind_engine_raw(world, web):
    with daemon(world, web, "--engine", "raw", "--on-exit", "keep"):
        pass
    assert SETTINGS.table_folder.exists()
    with daemon(world, web, "--engine", "xdp"):
        assert world.node.run(["nft", "list", "tables"]).stdout == ""
        assert not SETTINGS.table_folder.exists()
        assert not SETTINGS.filter_record.exists()


def test_another_capacity_or_layout_than_the_tables_of_engine_raw_have_is_refused(world, web):
    with daemon(world, web, "--engine", "raw"):
        pass
    done = turnout(world.node, *run_args(web, "--engine", "raw", "--capacity", 2000))
    assert_one_line(done, 1, "capacity.connections: 1000, now 2000", "give the same --capacity, or `turnout detach`")
    layout = SETTINGS.table_folder / "layout"
    layout.write_text(layout.read_text().replace('"state"', '"stats"'))
    done = turnout(world.node, *run_args(web, "--engine", "raw"))
    assert_one_line(done, 1, str(SETTINGS.table_folder), "stats", "`turnout detach` first")


@pytest.mark.faults(101)
def test_sigterm_during_the_start_leaves_nothing(world, web):
    process = world.node.popen([*TURNOUT, *run_args(web)], stderr=subprocess.PIPE, env=environment())
    assert wait_until(lambda: maps.is_complete(SETTINGS.pins) or process.poll() is not None, START_S)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=START_S)
    assert process.returncode == 0, said
    assert b"Traceback" not in said
    if b"serving" not in said:  # else it was quicker than we are, and is to go on forwarding
        assert_nothing_was_touched(world)


# While it runs.


def test_a_bad_change_changes_nothing_and_is_told_until_it_is_put_right(world, web):
    with daemon(world, web):
        before = ask(SETTINGS, "services")
        web.write_text(manifest(port=70000))
        assert wait_until(lambda: state()["state"] == "degraded", 10), state()
        told = turnout(world.node, "status")
        assert told.returncode == 5
        assert f"{web}:8: Service shop/web: spec.ports[0].port: 70000 is not a port" in told.stdout
        assert "next" in told.stdout
        assert ask(SETTINGS, "services") == before
        revision = state()["revision"]
        assert revision["desired"] > revision["programmed"]
        web.unlink()
        assert wait_until(lambda: "no such file" in " ".join(state()["why"]), 10), state()
        assert ask(SETTINGS, "services") == before
        web.write_text(manifest(vip="10.96.0.11"))
        assert wait_until(lambda: ask(SETTINGS, "services")[0]["frontends"] == ["10.96.0.11:80"], 10), state()
        revision = state()["revision"]
        assert revision["desired"] == revision["programmed"]
    assert str(web) in web.with_suffix(".log").read_text()


@pytest.mark.faults(123)
def test_a_second_node_of_the_same_name_is_refused_and_the_first_goes_on(world, web):
    with daemon(world, web) as first:
        done = turnout(world.node, *run_args(web))
        assert_one_line(done, 1, f"node '{NAME}' is running already (pid ", "another --name")
        done = turnout(world.node, "detach")
        assert_one_line(done, 1, f"node '{NAME}' is running already (pid ", "stop it first")
        assert first.poll() is None
        assert state()["services"] == 1


@pytest.mark.faults(99)
def test_another_capacity_or_layout_than_the_pinned_tables_have_is_refused(world, web):
    with daemon(world, web):
        pass
    pins = sorted(pin.name for pin in SETTINGS.pins.iterdir())
    done = turnout(world.node, *run_args(web, "--capacity", 2000))
    assert_one_line(done, 1, "capacity.connections: 1000, now 2000", "give the same --capacity, or `turnout detach`")
    assert sorted(pin.name for pin in SETTINGS.pins.iterdir()) == pins

    layout = kernel.open_pinned(SETTINGS.pins / removing.LAYOUT_NAME)
    try:
        size = kernel.map_info(layout).value_size
        old = kernel.map_lookup(layout, bytes(4), size) or b""
        kernel.map_update(layout, bytes(4), old.replace(b'"state"', b'"stats"'))
    finally:
        os.close(layout)
    done = turnout(world.node, *run_args(web))
    assert_one_line(done, 1, str(SETTINGS.pins), "stats", "`turnout detach` first")
    assert sorted(pin.name for pin in SETTINGS.pins.iterdir()) == pins


def test_after_a_kill_it_is_not_running_and_detach_removes_what_is_left(world, web):
    with daemon(world, web) as process:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(NotRunningError, match="is not running"):
            state()
        assert SETTINGS.socket_path.exists()
    done = turnout(world.node, "detach")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines() == [
        "removed eth0: the programs and their links",
        "removed eth1: the programs and their links",
        f"removed {SETTINGS.pins}: the tables",
    ]
    assert_nothing_was_touched(world)


def test_ctrl_c_leaves_nothing(world, web):
    with daemon(world, web) as process:
        assert wait_until(lambda: "managed" in world.node.run(["ip", "neigh", "show"]).stdout, 5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) == 0
    assert_nothing_was_touched(world)


@pytest.mark.parametrize("flags", [(), ("--engine", "raw", "--on-exit", "keep")], ids=["xdp", "raw"])
def test_in_another_network_namespace_nothing_is_taken_up_or_away(world, web, flags):
    with daemon(world, web, *flags):
        pass
    way = f"nsenter --net=/run/netns/{world.node.namespace} turnout"
    left = [path for path in (SETTINGS.pins, SETTINGS.table_folder) if path.exists()]
    for command in (["detach"], ["run", "-f", web, "-i", "eth0"]):
        done = turnout(world["client"], *command)
        assert_one_line(done, 1, "works in another network namespace", f"{way} {command[0]} --name {NAME}")
    assert [path for path in (SETTINGS.pins, SETTINGS.table_folder) if path.exists()] == left != []
    assert turnout(world.node, "detach").returncode == 0
    assert_nothing_was_touched(world)


def test_detach_takes_one_interface_or_names_those_there_are(world, web):
    with daemon(world, web):
        pass
    done = turnout(world.node, "detach", "-i", "eth7")
    assert_one_line(done, 2, "eth7", "only on eth0, eth1")
    done = turnout(world.node, "detach", "-i", "eth0")
    assert done.stderr == "removed eth0: the programs and their links\n"
    assert maps.is_complete(SETTINGS.pins)
    done = turnout(world.node, "detach", "-i", "eth1")
    assert done.stderr.splitlines()[-1] == f"removed {SETTINGS.pins}: the tables"
    assert_nothing_was_touched(world)
