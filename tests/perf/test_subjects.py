"""Subjects: the same Services for all, and every packet led to an endpoint with its checksums right."""

from __future__ import annotations

import os
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from perf import measure
from perf.bed import Cpus, Service, Shape, Testbed
from perf.cases import Point
from perf.cases.delays import FirstPacket, HalfLoad
from perf.cases.memory import Memory, bytes_per_connection
from perf.cases.rates import Connections, Rate
from perf.cases.updates import Update
from perf.subjects import iptables, nftables
from perf.subjects.bare import BareAfXdp, BareRedirect
from perf.subjects.iptables import Iptables
from perf.subjects.nftables import Nftables
from perf.subjects.turnout import Turnout, manifests
from perf.traffic import PINS, Kit, Load, Seen, Task
from perf.tuning import raised_conntrack
from xdp.errors import Error, MissingFeatureError

A, B, C = (IPv4Address(f"10.77.2.{n}") for n in (2, 3, 4))
SERVICES = [Service(IPv4Address("10.96.0.10") + n, (A, B)) for n in range(3)]
NEW = Load(new_every=1)


def test_every_service_has_its_chain_and_every_endpoint_its_share():
    rules = iptables.kube_proxy_rules(SERVICES)
    assert rules.count("-A KUBE-SERVICES -d ") == 3
    assert rules.count("--probability 0.5000000000") == 3, "the last endpoint takes the rest"
    assert rules.count("-j DNAT --to-destination 10.77.2.3:8080") == 3
    assert rules.count("COMMIT") == 2


def test_rules_speak_of_the_service_s_protocol_and_port():
    rules = iptables.kube_proxy_rules([Service(IPv4Address("10.96.0.9"), (A,), "tcp", 443)])
    assert '-d 10.96.0.9/32 -p tcp -m comment --comment "shop/service-0:tcp cluster IP" -m tcp --dport 443' in rules
    assert "-m tcp -j DNAT --to-destination 10.77.2.2:8080" in rules


def test_a_change_of_rules_writes_all_portals_and_the_chains_of_one_service():
    changed = [*SERVICES[:2], replace(SERVICES[2], endpoints=(A, C))]
    rules = iptables.changed_rules(changed, 2, SERVICES[2])
    assert rules.count("-A KUBE-SERVICES -d ") == 3
    assert rules.count("-j DNAT") == 2
    assert "10.77.2.3" not in rules
    assert "-X KUBE-SEP-0000000000020203" in rules


def test_a_change_of_a_table_touches_one_service():
    rules = nftables.changed_rules(2, SERVICES[2], replace(SERVICES[2], endpoints=(A, C)))
    assert "add rule ip kube-proxy service-00000002 numgen random mod 2 vmap" in rules
    assert "delete chain ip kube-proxy endpoint-00000002-0203" in rules
    assert "service-00000001" not in rules


def test_manifests_speak_of_the_same_service():
    service, endpoints = manifests(7, SERVICES[2])["items"]
    assert service["spec"]["clusterIP"] == "10.96.0.12"
    assert [endpoint["addresses"] for endpoint in endpoints["endpoints"]] == [["10.77.2.2"], ["10.77.2.3"]]
    assert endpoints["metadata"]["labels"] == {"kubernetes.io/service-name": service["metadata"]["name"]}


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
def kit():
    with Kit(PINS / f"twk{os.getpid()}") as made:
        yield made


@pytest.fixture
def make_bed(kit):
    def make(**shape):
        return Testbed(f"tws{os.getpid()}", Cpus(), kit, Shape(**shape))

    return make


@pytest.fixture
def bed(make_bed):
    with make_bed() as made:
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


SUBJECTS = [BareRedirect(), Iptables("nft"), Iptables("legacy"), Nftables(), Turnout("xdp", 20_000)]


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_a_subject_leads_every_packet_of_every_kind_through(make_bed, subject):
    """Requests and replies, known flows and new ones, long frames, paced ones; and an endpoint changes and back."""
    with make_bed(endpoints=1) as bed, subject.running(bed):
        bed.subject = subject
        measure.check(subject, bed)
        for kind, load in (
            (Rate(in_step=True), Load(100)),
            (Rate(in_step=True), Load(100, new_every=7)),
            (Rate(in_step=True), Load(100, is_mixed=True)),
            (HalfLoad(), Load(100)),
            (FirstPacket(), NEW),
        ):
            kind.prepare(bed, Point(load))
            outcome = kind.trial(bed, 0.02, 1000)
            assert outcome.sent > 0
            assert outcome.loss <= 0.01, (kind, load)
            assert all(value > 0 for value in outcome.values.values())
        if subject.translates:
            for _ in range(2):
                assert 0 < Update().trial(bed, 1.0, 1000).values[""] < 30_000


@pytest.mark.root
@pytest.mark.bpf
def test_a_flowtable_takes_known_flows_or_the_lack_of_it_is_named(bed):
    missing = ""
    try:
        with Nftables(has_flowtable=True).running(bed):
            measure.check(Nftables(has_flowtable=True), bed)
    except MissingFeatureError as error:
        missing = str(error)
    assert not missing or "nftables-flowtable: this kernel has no flowtables (CONFIG_NF_FLOW_TABLE" in missing


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.parametrize("subject", [BareRedirect(), Iptables("nft"), Nftables()], ids=lambda subject: subject.name)
def test_connections_are_opened_and_closed(make_bed, subject):
    with make_bed(services=2, protocol="tcp") as bed, subject.running(bed):
        measure.check(subject, bed)
        Connections().prepare(bed, Point(NEW))
        arrived, answered = bed.out.sink.packets(), bed.back.sink.packets()
        outcome = Connections().trial(bed, 5.0, 1000)
        assert (outcome.sent, outcome.loss) == (4000, 0.0)
        assert bed.out.sink.packets() - arrived == 4000
        assert bed.back.sink.packets() - answered == 2000
        assert outcome.values[""] > 100


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.parametrize(
    ("subject", "shape"),
    [
        *((subject, {"family": 6}) for subject in (BareRedirect(), Iptables("nft"), Turnout("xdp", 20_000))),
        *((subject, {"vlan": 5}) for subject in (BareRedirect(), Turnout("xdp", 20_000))),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "-".join(map(str, *value.items())),
)
def test_ipv6_and_tagged_frames_are_led_through_too(make_bed, subject, shape):
    with make_bed(endpoints=1, **shape) as bed, subject.running(bed):
        measure.check(subject, bed)
        for load in (Load(100), Load(100, new_every=7), Load(100, is_mixed=True)):
            Rate(in_step=True).prepare(bed, Point(load))
            outcome = Rate(in_step=True).trial(bed, 0.02, 1000)
            assert outcome.sent > 0
            assert outcome.loss <= 0.01, load


@pytest.mark.root
@pytest.mark.bpf
def test_ipv6_connections_are_opened_and_closed_too(make_bed):
    with make_bed(protocol="tcp", family=6) as bed, BareRedirect().running(bed):
        measure.check(BareRedirect(), bed)
        Connections().prepare(bed, Point(NEW))
        outcome = Connections().trial(bed, 5.0, 100)
        assert (outcome.sent, outcome.loss) == (400, 0.0)


@pytest.mark.root
@pytest.mark.bpf
def test_a_bare_loop_forwards(make_bed):
    with make_bed(services=2) as bed, BareAfXdp().running(bed):
        measure.check(BareAfXdp(), bed)


@pytest.mark.root
@pytest.mark.bpf
def test_a_node_that_does_not_forward_is_found_out(bed, monkeypatch):
    monkeypatch.setattr(measure, "_FIRST_PACKET_S", 0.2)
    with pytest.raises(Error, match="iptables-nft: no packet came through"):
        measure.check(Iptables(), bed)


@pytest.mark.root
@pytest.mark.bpf
def test_a_change_that_fails_is_told(bed, monkeypatch):
    with Iptables().running(bed):
        bed.subject = subject = Iptables()
        subject._restore = "/nowhere"
        with pytest.raises(Error, match="iptables-nft: a change of a Service is not in force"):
            Update().trial(bed, 1.0, 1000)


@pytest.mark.root
@pytest.mark.bpf
def test_what_is_sent_is_received_and_arrives(bed):
    with BareRedirect().running(bed):
        Rate().prepare(bed, Point(Load(1000)))
        trial = Rate().trial(bed, 0.05, 0)
    assert trial.sent == trial.received == trial.arrived > 10_000


@pytest.mark.root
@pytest.mark.bpf
def test_the_sink_notices_a_wrong_checksum(bed, monkeypatch):
    generator, sink = bed.out.generator, bed.out.sink
    with BareRedirect().running(bed), sink.doing(Task.VERIFY):
        before = sink.count(Seen.WRONG)
        generator.choose(Load(7))
        generator.send_in_step(sink, frames=100)
        assert sink.count(Seen.WRONG) == before
        # Zero is what generate.c takes the payload for; other bytes are not what it summed up.
        monkeypatch.setattr(generator, "_frame", bytes(42) + b"\1" + bytes(17))
        generator.send_in_step(sink, frames=100)
        assert sink.count(Seen.WRONG) == before + 100


@pytest.mark.root
@pytest.mark.bpf
def test_stamps_leave_checksums_right_and_lateness_counts(bed):
    generator, sink = bed.out.generator, bed.out.sink
    with BareRedirect().running(bed):
        generator.choose(Load(7))
        before = sink.count(Seen.WRONG)
        with sink.doing(Task.VERIFY):
            generator.send_paced(10_000, 10, 0.01)
        assert sink.count(Seen.WRONG) == before
        with sink.doing(Task.TIME):
            generator.send_paced(10_000, 10, 0.01)
            (on_time,) = sink.delays_ns([0.5])
        with sink.doing(Task.TIME):
            generator.send_paced(1e12, 10, 0.05)  # all are due at once: half of them are 25 ms late
            (late,) = sink.delays_ns([0.5])
    assert on_time > 0
    assert late > 5e6


@pytest.mark.root
@pytest.mark.bpf
def test_flows_that_are_prepared_are_established(bed):
    with Iptables().running(bed):
        bed.prepare(Load(50))
        saved = bed.world.node.run(["iptables-nft-save", "-c", "-t", "filter"]).stdout
    established = next(line for line in saved.splitlines() if "RELATED,ESTABLISHED" in line)
    new = next(line for line in saved.splitlines() if "load balancer firewall" in line)
    assert int(established[1 : established.index(":")]) > 5000
    assert int(new[1 : new.index(":")]) < 200, "only first packets are new"


@pytest.mark.root
@pytest.mark.bpf
def test_new_flows_are_never_sent_twice(bed):
    generator, sink = bed.out.generator, bed.out.sink
    with BareRedirect().running(bed):
        generator.choose(NEW)
        first = generator.next_new
        generator.send_in_step(sink, frames=10)
        bed.prepare(Load(100))
        generator.choose(Load(100, new_every=5))
        generator.send_in_step(sink, frames=100)
        assert generator.next_new == first + 30


@pytest.mark.root
@pytest.mark.bpf
def test_a_connection_takes_memory(bed):
    with Iptables().running(bed):
        Memory().prepare(bed, Point(Load(20_000)))
        assert 200 < Memory().trial(bed, 0, 0).values["connection"] < 2000
    assert 60 < bytes_per_connection() < 400


@pytest.mark.root
@pytest.mark.bpf
def test_two_generators_of_a_kit_do_not_mix_their_orders(make_bed):
    with make_bed(endpoints=1) as bed, BareRedirect().running(bed):
        bed.out.generator.choose(Load(5, new_every=2))
        bed.back.generator.choose(Load(9))
        bed.back.generator.send_in_step(bed.back.sink, frames=20)
        first = bed.out.generator.next_new
        bed.out.generator.send_in_step(bed.out.sink, frames=20)
        assert bed.out.generator.next_new == first + 10
