"""What is valid in manifests and yet serves nobody."""

from __future__ import annotations

from dataclasses import replace

from lb.model import EndpointSlice, Service
from lb.notes import notes

WEB = Service("shop", "web")
SLICE = EndpointSlice("shop", "web-1", "web", "IPv4")


def test_a_service_with_its_slice_needs_no_note():
    assert not list(notes([WEB], [SLICE]))


def test_a_slice_without_the_label_or_with_another_name_or_namespace_belongs_to_no_service():
    strays = [replace(SLICE, service_name=None), replace(SLICE, namespace="other"), replace(SLICE, service_name="wbe")]
    said = list(notes([WEB], [SLICE, *strays]))
    assert said == [
        "EndpointSlice shop/web-1: belongs to no Service; give it the label kubernetes.io/service-name",
        "EndpointSlice other/web-1: belongs to Service other/web, which is not here",
        "EndpointSlice shop/web-1: belongs to Service shop/wbe, which is not here",
    ]


def test_a_service_without_a_slice_is_told_which_label_one_needs():
    (said,) = notes([WEB], [])
    assert said.startswith(
        "Service shop/web: has no EndpointSlice; one needs the label kubernetes.io/service-name: web"
    )


def test_what_is_headless_external_or_somebody_elses_is_left_alone():
    services = [
        replace(WEB, is_headless=True),
        replace(WEB, type="ExternalName"),
        replace(WEB, proxy_name="other"),
    ]
    slices = [replace(SLICE, service_name=None, is_headless=True), replace(SLICE, service_name="x", proxy_name="other")]
    assert not list(notes(services, slices))
