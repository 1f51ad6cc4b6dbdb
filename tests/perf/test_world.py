"""Worlds: laid out by rule, made whole, and gone afterwards whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from perf.world import RECORDS, World, mac_of, plan, start_time, wait_until
from xdp.errors import Error, UsageError

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("/proc/thread-self/ns/net")
PREFIX = f"twt{os.getpid()}"


def namespaces(prefix: str = PREFIX) -> list[str]:
    return sorted(path.name for path in Path("/run/netns").glob(f"{prefix}-*"))


def records(prefix: str = PREFIX) -> list[Path]:
    return list(RECORDS.glob(f"{prefix}*"))


def test_every_network_is_a_subnet_with_the_node_first():
    clients, servers = plan({"client": "clients", "web-1": "servers", "web-2": "servers"})
    assert (str(clients.node_interface.address), clients.node_interface.name) == ("10.77.1.1/24", "eth0")
    assert (str(servers.node_interface.address), servers.node_interface.name) == ("10.77.2.1/24", "eth1")
    assert {name: end.ip for name, end in servers.hosts.items()} == {"web-1": "10.77.2.2", "web-2": "10.77.2.3"}
    assert (clients.has_switch, servers.has_switch) == (False, True)


def test_hosts_without_networks_get_one_each():
    assert [network.name for network in plan(["a", "b"])] == ["a", "b"]


def test_a_mac_is_made_of_the_address():
    (network,) = plan(["a"])
    assert network.hosts["a"].mac == mac_of(network.hosts["a"].address.ip) == "02:00:0a:4d:01:02"


@pytest.mark.parametrize("hosts", [{f"h{n}": "one" for n in range(254)}, [f"h{n}" for n in range(256)]])
def test_a_plan_that_does_not_fit_is_refused(hosts):
    with pytest.raises(UsageError, match="room for"):
        plan(hosts)


@pytest.mark.parametrize("prefix", ["", "../x", "a b", "x" * 41])
def test_a_prefix_is_a_plain_word(prefix):
    with pytest.raises(UsageError, match="no prefix"):
        World(prefix, ["a"])


def test_no_host_takes_the_name_of_the_node():
    with pytest.raises(UsageError, match="that is the node"):
        World(PREFIX, ["a", "node"])


def test_a_process_is_known_by_its_start_time():
    child = subprocess.Popen(["sleep", "60"])
    began = start_time(child.pid)
    child.kill()
    assert began is not None
    assert wait_until(lambda: start_time(child.pid) is None, 5), "a zombie has ended"
    child.wait()


def udp_socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


@pytest.fixture(scope="module")
def world():
    with World(PREFIX, {"client": "clients", "web-1": "servers", "web-2": "servers"}, queues=2) as made:
        yield made


@pytest.mark.root
def test_packets_pass_through_the_node_both_ways(world):
    with world["web-2"].call(udp_socket) as server, world["client"].call(udp_socket) as client:
        server.bind(("0.0.0.0", 9000))
        server.settimeout(5)
        client.settimeout(5)
        before = world.node.packets("eth0")
        client.sendto(b"question", (world["web-2"].ip, 9000))
        data, sender = server.recvfrom(100)
        server.sendto(b"answer", sender)
        assert (data, sender[0], client.recv(100)) == (b"question", world["client"].ip, b"answer")
        assert world.node.packets("eth0") > before


@pytest.mark.root
def test_the_far_ends_play_a_wire(world):
    shown = world["web-1"].run(["ethtool", "-k", "eth0"]).stdout
    assert "tx-checksumming: off" in shown
    assert "tx-tcp-segmentation: off" in shown
    assert "generic-receive-offload: on" in shown


@pytest.mark.root
def test_addresses_and_macs_are_those_of_the_plan(world):
    link = json.loads(world["web-2"].run(["ip", "-j", "address", "show", "dev", "eth0"]).stdout)[0]
    assert (link["address"], link["addr_info"][0]["local"]) == (world["web-2"].mac, world["web-2"].ip)
    assert len([one for one in link["addr_info"] if one["family"] == "inet6"]) == 0


@pytest.mark.root
def test_every_veth_has_the_queues_asked_for(world):
    assert world["client"].call(os.listdir, "/proc/self/net")  # the namespace is another one
    shown = json.loads(world.node.run(["ip", "-d", "-j", "link", "show", "dev", "eth0"]).stdout)[0]
    assert (shown["num_rx_queues"], shown["num_tx_queues"]) == (2, 2)


@pytest.mark.root
def test_a_thread_comes_back_from_a_namespace(world):
    home = HERE.readlink()
    with world.node.entered():
        inside = HERE.readlink()
    assert inside != home
    assert HERE.readlink() == home


@pytest.mark.root
def test_a_command_that_fails_says_what_it_said(world):
    with pytest.raises(Error, match=r"client: ip route add nonsense: exit 1: Error: any valid prefix"):
        world["client"].run(["ip", "route", "add", "nonsense"])


@pytest.mark.root
def test_a_bpffs_outside_sys_is_seen_from_inside(world):
    here = sorted(path.name for path in Path("/run").iterdir())
    assert sorted(world.node.run(["ls", "-A", "/run"]).stdout.split()) == here


@pytest.mark.root
def test_a_second_world_of_the_same_prefix_is_refused_while_the_first_lives(world):
    with pytest.raises(UsageError, match=f"belongs to process {os.getpid()}"):
        World(PREFIX, ["a"]).__enter__()
    assert f"{PREFIX}-client" in namespaces()


@pytest.mark.root
def test_leaving_a_world_leaves_nothing(tmp_path):
    prefix = PREFIX + "l"
    folder = tmp_path / "pins"
    folder.mkdir()
    with World(prefix, ["a"]) as world:
        world.owns_folder(folder)
        # A child of the child must go as well: processes end by group.
        process = world["a"].popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
        grandchild = int(process.stdout.readline())
        assert start_time(grandchild) is not None
        assert namespaces(prefix)
    assert wait_until(lambda: start_time(grandchild) is None, 5)
    assert (process.returncode, namespaces(prefix), records(prefix), folder.exists()) == (-15, [], [], False)


@pytest.mark.root
def test_an_exception_leaves_nothing():
    prefix = PREFIX + "x"
    with pytest.raises(ZeroDivisionError), World(prefix, ["a"]):
        raise ZeroDivisionError
    assert (namespaces(prefix), records(prefix)) == ([], [])


@pytest.mark.root
def test_a_namespace_of_somebody_else_is_left_alone():
    prefix = PREFIX + "f"
    subprocess.run(["ip", "netns", "add", f"{prefix}-a"], check=True)
    try:
        with pytest.raises(UsageError, match=f"namespace {prefix}-a exists"):
            World(prefix, ["a"]).__enter__()
        assert namespaces(prefix) == [f"{prefix}-a"]
    finally:
        subprocess.run(["ip", "netns", "delete", f"{prefix}-a"], check=True)


_OWNER = """
import sys, time
sys.path.insert(0, {root!r})
from perf.world import World
with World({prefix!r}, ["a", "b"]) as world:
    child = world["a"].popen(["sleep", "600"])
    print(child.pid, flush=True)
    time.sleep(600)
"""


def owner(prefix: str) -> tuple[subprocess.Popen[str], int]:
    """Start a process that owns a world with a process in it; return it and that process's pid."""
    code = _OWNER.format(root=str(ROOT), prefix=prefix)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return process, int(process.stdout.readline())


@pytest.mark.root
def test_what_a_killed_owner_left_is_cleaned_at_the_next_start():
    prefix = PREFIX + "k"
    process, child = owner(prefix)
    with process:
        process.kill()
    assert (len(namespaces(prefix)), start_time(child) is not None) == (3, True)
    assert World.clean_leftovers(prefix)
    assert wait_until(lambda: start_time(child) is None, 5)
    assert (namespaces(prefix), records(prefix)) == ([], [])
    assert not World.clean_leftovers(prefix)


@pytest.mark.root
def test_a_process_that_only_has_the_recorded_number_is_spared():
    prefix = PREFIX + "n"
    process, child = owner(prefix)
    with process:
        process.kill()
    (path,) = records(prefix)
    record = json.loads(path.read_text())
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        record["processes"].append([bystander.pid, start_time(bystander.pid) - 1])
        path.write_text(json.dumps(record))
        World.clean_leftovers(prefix)
        assert start_time(child) is None
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.root
def test_ctrl_c_leaves_nothing():
    prefix = PREFIX + "c"
    process, child = owner(prefix)
    with process:
        process.send_signal(signal.SIGINT)
        process.wait(10)
    assert (namespaces(prefix), records(prefix), start_time(child)) == ([], [], None)


@pytest.mark.root
def test_a_switch_is_between_the_node_and_its_hosts(world):
    ports = world.switch("servers").run(["ip", "-o", "link", "show", "master", "br0"]).stdout
    assert {line.split()[1].partition("@")[0] for line in ports.splitlines()} == {"node", "port0", "port1"}
    with pytest.raises(UsageError, match="clients has no switch"):
        world.switch("clients")
