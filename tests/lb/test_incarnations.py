"""Who is behind an endpoint, as EndpointSlices tell."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from lb import incarnations
from lb.incarnations import Incarnations, Seat
from lb.live import Changes, Live
from lb.model import EndpointSlice, EndpointState, PortSpec, Service, ServicePort, SliceEndpoint, SlicePort
from lb.resolve import resolve

POD, VIP = ip_address("10.0.0.1"), ip_address("10.96.0.10")
HERE = [((POD, 8080), "TCP")]


def slice_with(*who: str, name: str = "web", protocol: str = "TCP") -> EndpointSlice:
    endpoints = tuple(SliceEndpoint(POD + n, EndpointState.READY, who=each) for n, each in enumerate(who))
    return EndpointSlice("shop", f"{name}-1", name, "IPv4", (SlicePort("http", 8080, protocol),), endpoints)


def ports(*who: str, name: str = "web", protocol: str = "TCP") -> tuple[ServicePort, ...]:
    """Return the port of a Service with these Pods behind its endpoints, each at an address of its own."""
    service = Service("shop", name, cluster_ips=(VIP,), ports=(PortSpec("http", 80, protocol),))
    return resolve([service], [slice_with(*who, name=name, protocol=protocol)], not_yet={}).ports


def change(known: Incarnations, before: tuple[ServicePort, ...], after: tuple[ServicePort, ...]) -> list[Seat]:
    found = known.succeeded(before, after)
    known.remember(before, after)
    return found


def test_C9_another_pod_at_a_place_succeeds_the_one_before():
    assert Incarnations().succeeded(ports("a", "b"), ports("c", "b")) == HERE


def test_C9_who_comes_back_succeeds_nobody_and_who_comes_after_a_while_does():
    known = Incarnations()
    assert change(known, ports("a"), ports()) == []
    assert change(known, ports(), ports("a")) == []
    assert change(known, ports("a"), ports()) == []
    assert change(known, ports(), ports("b")) == HERE
    assert change(known, ports("b"), ports()) == []
    assert change(known, ports(), ports("b")) == []


@pytest.mark.faults(115)
def test_C9_a_pod_that_slices_tell_of_one_after_the_other_succeeds_once():
    known = Incarnations()
    assert change(known, ports("a"), ports("b")) == HERE
    assert change(known, ports("a", name="other"), ports("b", name="other")) == []


def test_C9_a_change_that_fails_is_looked_at_again():
    known = Incarnations()
    assert known.succeeded(ports("a"), ports("b")) == HERE
    assert change(known, ports("a"), ports("b")) == HERE
    assert change(known, ports("a"), ports("b")) == []


def test_C9_pods_of_one_host_may_have_a_port_each_of_the_same_number():
    known, tcp, udp = Incarnations(), ports("a"), ports("b", protocol="UDP")
    assert change(known, ports("old"), tcp) == HERE
    assert change(known, (), udp) == []
    assert change(known, tcp, tcp) == []


def test_who_is_not_told_succeeds_nobody():
    known = Incarnations()
    assert change(known, ports("a"), ports("")) == []
    assert change(known, ports(""), ports("a")) == []
    assert change(known, ports("a"), ports("b")) == HERE


def test_only_so_many_places_are_remembered(monkeypatch):
    monkeypatch.setattr(incarnations, "_REMEMBERED", 2)
    known = Incarnations()
    known.remember(ports("a", "b", "c"), ports())
    assert known.succeeded(ports(), ports("x", "y", "z")) == [((POD + 1, 8080), "TCP"), ((POD + 2, 8080), "TCP")]


def test_a_plan_tells_who_was_and_who_will_be():
    live = Live.of([Service("shop", "web", cluster_ips=(VIP,), ports=(PortSpec("http", 80),))], [slice_with("a")])
    plan = live.plan(Changes({}, {("shop", "web-1"): slice_with("b")}))
    assert Incarnations().succeeded(plan.before, plan.after) == HERE
    assert plan.rows, "an endpoint that is another's is another one"


def test_C9_what_was_known_before_a_restart_is_known():
    known = Incarnations()
    known.know({HERE[0]: "a", ((POD + 1, 8080), "TCP"): "b"})
    assert known.succeeded((), ports("c", "b")) == HERE
    assert known.remember((), ports("c", "b")) == {HERE[0]: "c"}
    assert known.succeeded(ports("c", "b"), ports("c", "b")) == []
    assert known.remember(ports("c", "b"), ports("c")) == {}
    assert known.everybody(ports("c")) == {HERE[0]: "c", ((POD + 1, 8080), "TCP"): "b"}


def test_C9_who_has_gone_before_a_restart_is_known_after_it():
    known = Incarnations()
    known.know({HERE[0]: "a"})
    assert change(known, (), ports()) == []
    assert change(known, ports(), ports("b")) == HERE


def test_C9_only_what_has_changed_is_to_be_noted():
    known = Incarnations()
    assert known.remember(ports("a", "b"), ports("a", "c")) == {((POD + 1, 8080), "TCP"): "c"}
    assert known.remember(ports("a", "c"), ports("a")) == {}
