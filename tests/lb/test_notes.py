"""What is valid in manifests and yet serves nobody."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from lb.documents import dotted
from lb.model import EndpointSlice, EndpointState, PortSpec, Service, SliceEndpoint, SlicePort
from lb.notes import notes

WEB = Service("shop", "web")
SLICE = EndpointSlice("shop", "web-1", "web", "IPv4")


def test_a_service_with_its_slice_needs_no_note():
    assert not list(notes([WEB], [SLICE]))


def test_a_slice_without_the_label_or_with_another_name_or_namespace_belongs_to_no_service():
    strays = [replace(SLICE, service_name=None), replace(SLICE, namespace="other"), replace(SLICE, service_name="wbe")]
    said = [f"{note.object}: {note.message}" for note in notes([WEB], [SLICE, *strays])]
    assert said == [
        "EndpointSlice shop/web-1: belongs to no Service; give it the label kubernetes.io/service-name",
        "EndpointSlice other/web-1: belongs to Service other/web, which is not here",
        "EndpointSlice shop/web-1: belongs to Service shop/wbe, which is not here",
    ]


def test_a_service_without_a_slice_is_told_which_label_one_needs():
    (said,) = notes([WEB], [])
    assert said.object == "Service shop/web"
    assert said.message.startswith("has no EndpointSlice; one needs the label kubernetes.io/service-name: web")


def test_what_is_headless_external_or_somebody_elses_is_left_alone():
    services = [
        replace(WEB, is_headless=True),
        replace(WEB, type="ExternalName"),
        replace(WEB, proxy_name="other"),
    ]
    slices = [replace(SLICE, service_name=None, is_headless=True), replace(SLICE, service_name="x", proxy_name="other")]
    assert not list(notes(services, slices))


NAMED = replace(WEB, ports=(PortSpec("http", 80), PortSpec("dns", 53, "UDP")))
NAMELESS = replace(WEB, ports=(PortSpec("", 80),))
HTTP, DNS = SlicePort("http", 8080), SlicePort("dns", 5353, "UDP")


def served(*ports: SlicePort, host: str | None = "10.2.0.1") -> EndpointSlice:
    endpoints = (SliceEndpoint(ip_address(host), EndpointState.READY),) if host else ()
    return replace(SLICE, ports=ports, endpoints=endpoints)


@pytest.mark.parametrize(
    ("service", "port", "of_slice", "of_service"),
    [
        (
            NAMED,
            SlicePort("htp", 8080),
            'ports[0].name: "htp" is no port of Service shop/web; did you mean "http"?',
            'spec.ports[0]: no EndpointSlice has a port "http" with protocol TCP: nobody serves it',
        ),
        (
            NAMED,
            SlicePort("web", 8080),
            'ports[0].name: "web" is no port of Service shop/web; known are http, dns',
            'spec.ports[0]: no EndpointSlice has a port "http" with protocol TCP: nobody serves it',
        ),
        (
            NAMED,
            SlicePort("http", 8080, "UDP"),
            'ports[0]: UDP is not the protocol of port "http" of Service shop/web, TCP is',
            'spec.ports[0]: no EndpointSlice has a port "http" with protocol TCP: nobody serves it',
        ),
        (
            NAMED,
            SlicePort(None, 8080),
            "ports[0]: a port without a name is ignored; give it the name of a port, as a port of Service shop/web has",
            'spec.ports[0]: no EndpointSlice has a port "http" with protocol TCP: nobody serves it',
        ),
        (
            NAMELESS,
            SlicePort("http", 8080),
            'ports[0].name: "http" is no port of Service shop/web; that has no name: write ""',
            'spec.ports[0]: no EndpointSlice has a port "" with protocol TCP: nobody serves it',
        ),
        (
            NAMELESS,
            SlicePort(None, 8080),
            'ports[0]: a port without a name is ignored; give it the name "", as a port of Service shop/web has',
            'spec.ports[0]: no EndpointSlice has a port "" with protocol TCP: nobody serves it',
        ),
    ],
)
def test_E2_ports_that_do_not_find_each_other_are_noted_on_both_sides(service, port, of_slice, of_service):
    more = [DNS] if service is NAMED else []
    said = [(note.object, f"{dotted(note.path)}: {note.message}") for note in notes([service], [served(port, *more)])]
    assert said == [("EndpointSlice shop/web-1", of_slice), ("Service shop/web", of_service)]


def test_ports_may_be_in_several_slices_and_who_has_no_endpoints_needs_none():
    for slices in (
        [served(HTTP, DNS)],
        [served(HTTP), replace(served(DNS), name="web-2")],
        [served(host=None)],  # as a cluster has for a Service without Pods
        [served(host=None), replace(served(HTTP, DNS), name="web-2")],
        [served(HTTP, DNS, SlicePort("every", None))],
    ):
        assert not list(notes([NAMED], slices))
    (note,) = notes([NAMED], [served(HTTP)])
    assert (note.object, note.path) == ("Service shop/web", ("spec", "ports", 1))
