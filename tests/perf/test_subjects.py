"""Subjects: the same Services for all, and every packet led to an endpoint with its checksums right."""

from __future__ import annotations

import os
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from perf import measure
from perf.subjects import (
    BareAfXdp,
    BareRedirect,
    Cpus,
    Iptables,
    Service,
    Testbed,
    kube_proxy_rules,
    manifests,
    raised_conntrack,
)
from perf.traffic import Seen, Task
from xdp.errors import Error

SERVICES = [
    Service(IPv4Address("10.96.0.10") + n, (IPv4Address("10.77.2.2"), IPv4Address("10.77.2.3"))) for n in range(3)
]


def test_every_service_has_its_chain_and_every_endpoint_its_share():
    rules = kube_proxy_rules(SERVICES)
    assert rules.count("-A KUBE-SERVICES -d ") == 3
    assert rules.count("--probability 0.5000000000") == 3, "the last endpoint takes the rest"
    assert rules.count("-j DNAT --to-destination 10.77.2.3:8080") == 3
    assert rules.count("COMMIT") == 2


def test_rules_speak_of_the_service_s_protocol_and_port():
    rules = kube_proxy_rules([Service(IPv4Address("10.96.0.9"), (IPv4Address("10.77.2.2"),), "tcp", 443)])
    assert '-d 10.96.0.9/32 -p tcp -m comment --comment "shop/service-0:tcp cluster IP" -m tcp --dport 443' in rules
    assert "-m tcp -j DNAT --to-destination 10.77.2.2:8080" in rules


def test_manifests_and_rules_speak_of_the_same_services():
    items = manifests(SERVICES)["items"]
    assert [item["spec"]["clusterIP"] for item in items if item["kind"] == "Service"] == [
        "10.96.0.10",
        "10.96.0.11",
        "10.96.0.12",
    ]
    assert items[1]["endpoints"][1]["addresses"] == ["10.77.2.3"]


def test_the_generator_keeps_a_cpu_to_itself_where_there_are_two():
    cpus = Cpus()
    assert cpus.generator.isdisjoint(cpus.others) == (len(os.sched_getaffinity(0)) > 1)


def test_a_pinned_thread_goes_back():
    before = os.sched_getaffinity(0)
    cpus = Cpus()
    with cpus.pinned(cpus.generator):
        assert os.sched_getaffinity(0) == cpus.generator
    assert os.sched_getaffinity(0) == before


@pytest.fixture(scope="module")
def bed():
    with Testbed(f"tws{os.getpid()}", Cpus(), services=2) as made:
        yield made


@pytest.fixture
def untouched_bed():
    with Testbed(f"twu{os.getpid()}", Cpus()) as made:
        yield made


@pytest.mark.root
def test_connection_tracking_gets_its_limits_back():
    path = Path("/proc/sys/net/netfilter/nf_conntrack_max")
    before = path.read_text()
    with raised_conntrack(2 * int(before)):
        assert int(path.read_text()) == 2 * int(before)
    assert path.read_text() == before


@pytest.mark.root
def test_limits_that_a_killed_run_left_raised_are_put_back():
    path = Path("/proc/sys/net/netfilter/nf_conntrack_max")
    before = int(path.read_text())
    killed = raised_conntrack(3 * before)
    killed.__enter__()
    with raised_conntrack(2 * before):
        pass
    assert int(path.read_text()) == before


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.parametrize("subject", [BareRedirect(), BareAfXdp(), Iptables()], ids=lambda subject: subject.name)
def test_a_subject_leads_every_packet_through(bed, subject):
    with subject.running(bed):
        measure.check(subject, bed)


@pytest.mark.root
@pytest.mark.bpf
def test_a_node_that_does_not_forward_is_found_out(untouched_bed, monkeypatch):
    monkeypatch.setattr(measure, "_FIRST_PACKET_S", 0.2)
    with pytest.raises(Error, match="iptables: no packet came through"):
        measure.check(Iptables(), untouched_bed)


@pytest.mark.root
@pytest.mark.bpf
def test_what_is_sent_is_received_and_arrives(bed):
    with BareRedirect().running(bed):
        bed.prepare(1000)
        case = measure.Case("c", (), (1000,), in_step=False, bare="", question="")
        trial = measure.measure(case, bed, 0.05, 0)
    assert trial.sent == trial.received == trial.arrived > 10_000


@pytest.mark.root
@pytest.mark.bpf
def test_the_sink_notices_a_wrong_checksum(bed, monkeypatch):
    with BareRedirect().running(bed), bed.sink.doing(Task.VERIFY):
        bed.generator.choose(7)
        bed.generator.send_in_step(bed.sink, frames=100)
        assert bed.sink.count(Seen.WRONG) == 0
        # Zero is what generate.c takes the payload for; other bytes are not what it summed up.
        monkeypatch.setattr(bed.generator, "_frame", bytes(42) + b"\1" + bytes(17))
        bed.generator.send_in_step(bed.sink, frames=100)
        assert bed.sink.count(Seen.WRONG) == 100


@pytest.mark.root
@pytest.mark.bpf
def test_flows_that_are_prepared_are_established(untouched_bed):
    bed = untouched_bed
    with Iptables().running(bed):
        bed.prepare(50)
        saved = bed.world.node.run(["iptables-nft-save", "-c", "-t", "filter"]).stdout
    established = next(line for line in saved.splitlines() if "RELATED,ESTABLISHED" in line)
    new = next(line for line in saved.splitlines() if "load balancer firewall" in line)
    assert int(established[1 : established.index(":")]) > 5000
    assert int(new[1 : new.index(":")]) < 200, "only first packets are new"


@pytest.mark.root
@pytest.mark.bpf
def test_new_flows_are_never_sent_twice(bed):
    with BareRedirect().running(bed):
        bed.prepare(0)
        first = bed.generator.next_flow
        bed.generator.send_in_step(bed.sink, frames=10)
        bed.prepare(100)
        bed.prepare(0)
        assert bed.generator.next_flow == first + 10
