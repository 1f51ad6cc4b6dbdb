"""Manifests: what is read, and what every kind of bad input is answered with."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lb import manifests
from lb.errors import ManifestError
from lb.model import EndpointState, PortSpec, SlicePort
from xdp.errors import ConfigError

SERVICE = """\
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
spec:
  clusterIP: 10.96.0.10
  ports:
  - name: http
    port: 80
"""
SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-1
  namespace: shop
  labels:
    kubernetes.io/service-name: web
addressType: IPv4
ports:
- name: http
  port: 8080
endpoints:
- addresses:
  - 10.244.1.10
"""


def load(text: str | bytes) -> manifests.Manifests:
    data = text.encode() if isinstance(text, str) else text
    return manifests.load(["-"], io.BytesIO(data))


def problems(text: str | bytes) -> list[str]:
    """Return what is said about `text` as a file web.yaml."""
    with pytest.raises(ManifestError) as caught:
        load(text)
    return [str(problem).replace("<stdin>", "web.yaml", 1) for problem in caught.value.problems]


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


def test_S12_fields_that_are_not_read_change_nothing():
    more = """\
  selector: {app: web}
  publishNotReadyAddresses: true
  trafficDistribution: PreferClose
  loadBalancerIP: 192.0.2.1
  loadBalancerClass: example.com/other
"""
    service = SERVICE.replace("    port: 80\n", "    port: 80\n    appProtocol: kubernetes.io/h2c\n") + more
    part = SLICE.replace("  port: 8080\n", "  port: 8080\n  appProtocol: kubernetes.io/h2c\n")
    assert load(f"{service}---\n{part}") == load(f"{SERVICE}---\n{SLICE}")


def test_a_service_and_its_slice():
    read = load(f"{SERVICE}---\n{SLICE}")
    (service,), (part,) = read.services, read.slices
    assert (service.namespace, service.name, service.ports) == ("shop", "web", (PortSpec("http", 80),))
    assert str(service.cluster_ips[0]) == "10.96.0.10"
    assert (part.service_name, part.ports) == ("web", (SlicePort("http", 8080),))
    assert [(str(e.address), e.state) for e in part.endpoints] == [("10.244.1.10", EndpointState.READY)]


def test_json_lists_in_lists_and_lists_of_a_kind(tmp_path):
    import yaml

    service, part = yaml.safe_load(SERVICE), yaml.safe_load(SLICE)
    bare = {key: value for key, value in service.items() if key not in ("apiVersion", "kind")}
    nested = {"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", "kind": "List", "items": [part]}]}
    of_kind = {"apiVersion": "v1", "kind": "ServiceList", "metadata": {"resourceVersion": "1"}, "items": [bare]}
    (tmp_path / "a.json").write_text(json.dumps(nested))
    (tmp_path / "b.json").write_text(json.dumps(of_kind))
    assert manifests.load([str(tmp_path)]).services == load(SERVICE).services
    assert manifests.load([str(tmp_path)]).slices == load(SLICE).slices


def test_null_is_as_good_as_absent_and_empty_documents_are_nothing():
    read = load(f"---\n---\n{SERVICE}status: null\n---\n# nothing\n---\n{SLICE}")
    assert len(read.services) == len(read.slices) == 1
    assert load(changed(SLICE, "ports:\n- name: http\n  port: 8080\n", "ports: null\n")).slices[0].ports == ()
    assert load("").services == ()


def test_a_folder_is_its_visible_manifests_and_everything_is_read_once(tmp_path):
    (tmp_path / "a.yaml").write_text(SERVICE)
    (tmp_path / "b.yml").write_text(SLICE)
    (tmp_path / ".hidden.yaml").write_text("nonsense")
    (tmp_path / "notes.txt").write_text("nonsense")
    read = manifests.load([str(tmp_path), str(tmp_path / "a.yaml")])
    assert read.files == (tmp_path / "a.yaml", tmp_path / "b.yml")
    assert read.folders == (tmp_path,)
    assert len(read.services) == 1


@pytest.mark.faults(120)
def test_a_byte_order_mark_and_windows_line_ends_are_no_problem():
    assert load(b"\xef\xbb\xbf" + SERVICE.replace("\n", "\r\n").encode()).services == load(SERVICE).services


@pytest.mark.faults(120)
def test_norway_is_a_country():
    """YAML 1.1 would read these as booleans, a date and a number of base 60."""
    text = changed(
        SERVICE, "  name: web", "  labels: {a: no, b: on, c: 2026-01-01, d: 12:30, e: 0o8, f: 1_000}\n  name: no"
    )
    assert load(text).services[0].name == "no"


def test_text_may_be_tagged_and_ports_may_be_hexadecimal():
    assert load(changed(SERVICE, "port: 80", "port: 0x50")).services[0].ports[0].port == 80
    assert load(changed(SERVICE, "name: web", "name: !!str 80")).services[0].name == "80"


def test_anchors_are_allowed():
    text = changed(SERVICE, "clusterIP: 10.96.0.10", "clusterIP: &vip 10.96.0.10\n  clusterIPs: [*vip]")
    assert load(text).services == load(SERVICE).services


def test_white_space_around_a_source_range_is_nothing():
    text = changed(SERVICE, "  ports:", "  loadBalancerSourceRanges: [' 203.0.113.0/24', '198.51.100.0/25 ']\n  ports:")
    assert [str(network) for network in load(text).services[0].source_ranges] == ["203.0.113.0/24", "198.51.100.0/25"]


def test_S6_ingress_in_mode_proxy_and_host_names_are_not_captured():
    text = SERVICE + (
        "status: {loadBalancer: {ingress: [{ip: 192.0.2.1}, {ip: 192.0.2.2, ipMode: Proxy}, {hostname: x.example},"
        " {ip: 192.0.2.3, ipMode: VIP}]}}\n"
    )
    assert [str(entry.address) for entry in load(text).services[0].ingress] == ["192.0.2.1", "192.0.2.3"]


@pytest.mark.faults(115)
@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        ("{}", EndpointState.READY),
        ("null", EndpointState.READY),
        ("{ready: null}", EndpointState.READY),
        ("{ready: true, terminating: true}", EndpointState.READY),
        ("{ready: false}", EndpointState.UNREADY),
        ("{ready: false, serving: true}", EndpointState.UNREADY),
        ("{ready: false, terminating: true}", EndpointState.SERVING),
        ("{ready: false, serving: true, terminating: true}", EndpointState.SERVING),
        ("{ready: false, serving: false, terminating: true}", EndpointState.TERMINATING),
    ],
)
def test_E3_conditions(conditions, state):
    assert load(f"{SLICE}  conditions: {conditions}\n").slices[0].endpoints[0].state is state


def test_options():
    annotations = (
        "  annotations:\n"
        "    other.example/x: whatever\n"
        "    turnout.dev/when-stalled: pass\n"
        "    turnout.dev/weights: 10.244.1.10=3, fd00::1=0\n"
        "    turnout.dev/timeouts: established=2h13m20s,udp=30s\n"
    )
    options = load(changed(SERVICE, "spec:", annotations + "spec:")).services[0].options
    assert options.when_stalled == "pass"
    assert [(str(address), weight) for address, weight in options.weights] == [("10.244.1.10", 3), ("fd00::1", 0)]
    assert options.timeouts_s == (("established", 8000), ("udp", 30))


NULLS = ["externalIPs: [null]", "clusterIPs: [null]", "loadBalancerSourceRanges: [~]", "ipFamilies: [null]"]


@pytest.mark.parametrize("line", NULLS)
def test_a_list_holds_no_nulls(line):
    (problem,) = problems(changed(SERVICE, "  ports:", f"  {line}\n  ports:"))
    assert problem.endswith("[0]: is null; remove it")


# manifest, old text, new text, what is said (after the name of the file)
BAD = [
    pytest.param(
        SERVICE,
        "port: 80",
        "port: 0",
        ("10: Service shop/web: spec.ports[0].port: 0 is not a port (1 to 65535)"),
        id="port-0",
    ),
    pytest.param(
        SERVICE,
        "port: 80",
        "port: 70000",
        ("10: Service shop/web: spec.ports[0].port: 70000 is not a port (1 to 65535)"),
        id="port-70000",
    ),
    pytest.param(
        SERVICE,
        "port: 80",
        "port: -1",
        ("10: Service shop/web: spec.ports[0].port: -1 is not a port (1 to 65535)"),
        id="port-negative",
    ),
    pytest.param(
        SERVICE,
        "port: 80",
        "port: http",
        ('10: Service shop/web: spec.ports[0].port: "http" is not a port (1 to 65535)'),
        id="port-word",
    ),
    pytest.param(
        SERVICE,
        "port: 80",
        "port: '80'",
        ('10: Service shop/web: spec.ports[0].port: "80" is text, not a port; write it without quotes'),
        id="port-quoted",
    ),
    pytest.param(
        SERVICE,
        "port: 80",
        "port: 010",
        ('10: Service shop/web: spec.ports[0].port: "010" is not a port; write it without leading zeros'),
        id="port-octal",
    ),
    pytest.param(
        SERVICE,
        "port: 80",
        "port: 1e3",
        ("10: Service shop/web: spec.ports[0].port: 1000.0 is not a port (1 to 65535)"),
        id="port-float",
    ),
    pytest.param(
        SERVICE,
        "port: 80",
        "port: true",
        ("10: Service shop/web: spec.ports[0].port: true is not a port (1 to 65535)"),
        id="port-true",
    ),
    pytest.param(
        SERVICE,
        "    port: 80\n",
        "",
        ("9: Service shop/web: spec.ports[0]: port is missing"),
        id="port-missing",
    ),
    pytest.param(
        SERVICE,
        "port: 80",
        "port: null",
        ("9: Service shop/web: spec.ports[0]: port is missing"),
        id="port-null",
    ),
    pytest.param(
        SERVICE,
        "  ports:\n  - name: http\n    port: 80\n",
        "",
        ("6: Service shop/web: spec: ports is missing; a Service has at least one"),
        id="ports-missing",
    ),
    pytest.param(
        SERVICE,
        "  - name: http\n    port: 80",
        "    name: http",
        ('8: Service shop/web: spec.ports: {"name": "http"} is not a list'),
        id="ports-no-list",
    ),
    pytest.param(
        SERVICE,
        "    port: 80\n",
        "    port: 80\n  - port: 81\n",
        ("11: Service shop/web: spec.ports[1]: name is missing; each port needs one when there are several"),
        id="second-port-nameless",
    ),
    pytest.param(
        SERVICE,
        "    port: 80\n",
        "    port: 80\n  - {name: http, port: 81}\n",
        ('11: Service shop/web: spec.ports[1].name: "http" is the name of another port, too'),
        id="port-names-equal",
    ),
    pytest.param(
        SERVICE,
        "    port: 80\n",
        "    port: 80\n  - {name: b, port: 80}\n",
        ("11: Service shop/web: spec.ports[1].port: 80 with protocol TCP comes twice"),
        id="port-twice",
    ),
    pytest.param(
        SERVICE,
        "    port: 80",
        "    protocol: tcp\n    port: 80",
        ('10: Service shop/web: spec.ports[0].protocol: "tcp" is not known; did you mean "TCP"?'),
        id="protocol",
    ),
    pytest.param(
        SERVICE,
        "clusterIP:",
        "clusterIp:",
        ('7: Service shop/web: spec.clusterIp: unknown field; did you mean "clusterIP"?'),
        id="unknown-field",
    ),
    pytest.param(
        SERVICE,
        "name: http",
        "weight: 3",
        (
            "9: Service shop/web: spec.ports[0].weight: unknown field; known are name, protocol, "
            "appProtocol, port, targetPort, nodePort"
        ),
        id="unknown-field-far-off",
    ),
    pytest.param(
        SERVICE,
        "clusterIP:",
        "clusterAddress: null\n  clusterIP:",
        ('7: Service shop/web: spec.clusterAddress: unknown field; did you mean "clusterIPs"?'),
        id="unknown-null-field",
    ),
    pytest.param(
        SERVICE,
        "name: http",
        "<<: {name: http}",
        (
            "9: Service shop/web: spec.ports[0][<<]: unknown field; known are name, protocol, appProtocol, "
            "port, targetPort, nodePort"
        ),
        id="merge-key",
    ),
    pytest.param(
        SERVICE,
        "kind: Service",
        "kind: Servise",
        ('2: kind: "Servise" is not a kind that is read here; did you mean "Service"?'),
        id="unknown-kind",
    ),
    pytest.param(
        SERVICE,
        "kind: Service",
        "kind: Deployment",
        ('2: kind: "Deployment" is not a kind that is read here; known are Service, EndpointSlice, List'),
        id="foreign-kind",
    ),
    pytest.param(
        SERVICE,
        "kind: Service",
        "kind: Endpoints",
        ('2: kind: "Endpoints" is not a kind that is read here; use an EndpointSlice'),
        id="endpoints-kind",
    ),
    pytest.param(
        SERVICE,
        "kind: Service\n",
        "",
        ("1: kind is missing; expected Service, EndpointSlice or List"),
        id="kind-missing",
    ),
    pytest.param(
        SERVICE,
        "kind: Service",
        "kind: [1]",
        ("2: kind: [1] is not a kind that is read here; known are Service, EndpointSlice, List"),
        id="kind-no-text",
    ),
    pytest.param(
        SERVICE,
        "apiVersion: v1",
        "apiVersion: v2",
        ('1: Service shop/web: apiVersion: "v2"; expected "v1"'),
        id="version",
    ),
    pytest.param(
        SERVICE,
        "apiVersion: v1\n",
        "",
        ('1: Service shop/web: apiVersion: missing; expected "v1"'),
        id="version-missing",
    ),
    pytest.param(
        SLICE,
        "discovery.k8s.io/v1",
        "discovery.k8s.io/v1beta1",
        ('1: EndpointSlice shop/web-1: apiVersion: "discovery.k8s.io/v1beta1"; expected "discovery.k8s.io/v1"'),
        id="version-old",
    ),
    pytest.param(
        SERVICE,
        "  clusterIP: 10.96.0.10",
        "  clusterIP: 10.96.0.10\n  clusterIP: 10.96.0.11",
        ("8: Service shop/web: spec.clusterIP: comes twice; remove one"),
        id="duplicate-key",
    ),
    pytest.param(
        SERVICE,
        "  name: web\n",
        "",
        ("3: Service (no name): metadata: name is missing"),
        id="name-missing",
    ),
    pytest.param(
        SERVICE,
        "name: web",
        "name: 80",
        ('4: Service (no name): metadata.name: 80 is not text; quote it: "80"'),
        id="name-number",
    ),
    pytest.param(
        SERVICE,
        "name: web",
        'name: "\\e[31mred"',
        (
            '4: Service shop/\\x1b[31mred: metadata.name: "\\u001b[31mred" is not a name: a to z, 0 to 9 and '
            "dashes between them, 63 at most"
        ),
        id="name-escape",
    ),
    pytest.param(
        SERVICE,
        "name: web",
        "name: wéb",
        (
            '4: Service shop/wéb: metadata.name: "w\\u00e9b" is not a name: a to z, 0 to 9 and dashes between '
            "them, 63 at most"
        ),
        id="name-unicode",
    ),
    pytest.param(
        SERVICE,
        "  name: web",
        "  labels: {a: true}\n  name: web",
        ('4: Service shop/web: metadata.labels.a: true is not text; quote it: "true"'),
        id="label-boolean",
    ),
    pytest.param(
        SERVICE,
        "  ports:",
        "  type: LoadBalanser\n  ports:",
        ('8: Service shop/web: spec.type: "LoadBalanser" is not known; did you mean "LoadBalancer"?'),
        id="type",
    ),
    pytest.param(
        SERVICE,
        "  ports:",
        "  externalTrafficPolicy: local\n  ports:",
        ('8: Service shop/web: spec.externalTrafficPolicy: "local" is not known; did you mean "Local"?'),
        id="policy",
    ),
    pytest.param(
        SERVICE,
        "  ports:",
        "  sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}\n  ports:",
        (
            "8: Service shop/web: spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is not a number "
            "of seconds (1 to 86400)"
        ),
        id="affinity-time",
    ),
    pytest.param(
        SERVICE,
        "10.96.0.10",
        "ten",
        ('7: Service shop/web: spec.clusterIP: "ten" is not an IP address'),
        id="vip-words",
    ),
    pytest.param(
        SERVICE,
        "10.96.0.10",
        "10.096.0.10",
        ('7: Service shop/web: spec.clusterIP: "10.096.0.10" is not an IP address; octets have no leading zeros'),
        id="vip-zeros",
    ),
    pytest.param(
        SERVICE,
        "10.96.0.10",
        "'::ffff:10.96.0.10'",
        ('7: Service shop/web: spec.clusterIP: "::ffff:10.96.0.10" is an IPv4-mapped address; write 10.96.0.10'),
        id="vip-mapped",
    ),
    pytest.param(
        SERVICE,
        "10.96.0.10",
        "fe80::1%eth0",
        (
            '7: Service shop/web: spec.clusterIP: "fe80::1%eth0" has a zone; an address that needs one '
            "cannot be reached from elsewhere"
        ),
        id="vip-zone",
    ),
    pytest.param(
        SERVICE,
        "10.96.0.10",
        "127.0.0.1",
        ("7: Service shop/web: spec.clusterIP: 127.0.0.1 is loopback; it cannot be served from or sent to"),
        id="vip-loopback",
    ),
    pytest.param(
        SERVICE,
        "10.96.0.10",
        "10.96",
        ("7: Service shop/web: spec.clusterIP: 10.96 is not an IP address"),
        id="vip-number",
    ),
    pytest.param(
        SERVICE,
        "  ports:",
        "  clusterIPs: [10.96.0.11]\n  ports:",
        ('8: Service shop/web: spec.clusterIPs[0]: "10.96.0.11" differs from spec.clusterIP "10.96.0.10"'),
        id="vips-differ",
    ),
    pytest.param(
        SERVICE,
        "  ports:",
        "  clusterIPs: [10.96.0.10, 10.96.0.11]\n  ports:",
        (
            "8: Service shop/web: spec.clusterIPs: more than one address of a family; expected at most one "
            "IPv4 and one IPv6 address"
        ),
        id="vips-one-family",
    ),
    pytest.param(
        SERVICE,
        "  ports:",
        "  loadBalancerSourceRanges: [203.0.113.7/24]\n  ports:",
        (
            '8: Service shop/web: spec.loadBalancerSourceRanges[0]: "203.0.113.7/24" has bits set behind its '
            'prefix; did you mean "203.0.113.0/24"?'
        ),
        id="range-host-bits",
    ),
    pytest.param(
        SERVICE,
        "  ports:",
        "  loadBalancerSourceRanges: [203.0.113.7]\n  ports:",
        (
            '8: Service shop/web: spec.loadBalancerSourceRanges[0]: "203.0.113.7" has no prefix length; '
            "write 203.0.113.7/32"
        ),
        id="range-no-prefix",
    ),
    pytest.param(
        SERVICE,
        "  ports:",
        "  loadBalancerSourceRanges: [203.0.113.0/255.255.255.0]\n  ports:",
        (
            '8: Service shop/web: spec.loadBalancerSourceRanges[0]: "203.0.113.0/255.255.255.0" has no '
            "prefix length; write 203.0.113.0/24"
        ),
        id="range-netmask",
    ),
    pytest.param(
        SERVICE,
        "  ports:",
        "  loadBalancerSourceRanges: [all]\n  ports:",
        ('8: Service shop/web: spec.loadBalancerSourceRanges[0]: "all" is not a network; write it as 192.0.2.0/24'),
        id="range-words",
    ),
    pytest.param(
        SERVICE,
        "  name: web",
        "  annotations: {turnout.dev/wieghts: a}\n  name: web",
        ('4: Service shop/web: metadata.annotations[turnout.dev/wieghts]: unknown annotation; did you mean "weights"?'),
        id="annotation",
    ),
    pytest.param(
        SERVICE,
        "  name: web",
        "  annotations: {turnout.dev/forwarding: dsr}\n  name: web",
        (
            '4: Service shop/web: metadata.annotations[turnout.dev/forwarding]: "dsr" is not known; did you '
            'mean "dsr-l2"?'
        ),
        id="annotation-choice",
    ),
    pytest.param(
        SERVICE,
        "  name: web",
        "  annotations: {turnout.dev/weights: 10.0.0.1=-1}\n  name: web",
        ('4: Service shop/web: metadata.annotations[turnout.dev/weights]: "-1" is not a weight (0 to 65535)'),
        id="weight-negative",
    ),
    pytest.param(
        SERVICE,
        "  name: web",
        "  annotations: {turnout.dev/weights: 10.0.0.1=NaN}\n  name: web",
        ('4: Service shop/web: metadata.annotations[turnout.dev/weights]: "NaN" is not a weight (0 to 65535)'),
        id="weight-nan",
    ),
    pytest.param(
        SERVICE,
        "  name: web",
        "  annotations: {turnout.dev/timeouts: udp=soon}\n  name: web",
        (
            '4: Service shop/web: metadata.annotations[turnout.dev/timeouts]: "soon" is not a duration; '
            "write it as 90s, 5m or 2h13m20s, from 1s to 240h"
        ),
        id="timeout",
    ),
    pytest.param(
        SERVICE,
        "  name: web",
        "  annotations: {turnout.dev/timeouts: 'udp=5s, udp=6s'}\n  name: web",
        "4: Service shop/web: metadata.annotations[turnout.dev/timeouts]: udp is given twice",
        id="timeout-twice",
    ),
    pytest.param(
        SERVICE,
        "  name: web",
        "  annotations: {turnout.dev/timeouts: udp=0s}\n  name: web",
        (
            '4: Service shop/web: metadata.annotations[turnout.dev/timeouts]: "0s" is not a duration; write '
            "it as 90s, 5m or 2h13m20s, from 1s to 240h"
        ),
        id="timeout-zero",
    ),
    pytest.param(
        SLICE,
        "10.244.1.10",
        "127.0.0.1",
        (
            "14: EndpointSlice shop/web-1: endpoints[0].addresses[0]: 127.0.0.1 is loopback; an endpoint "
            "must be an address that packets can be sent to"
        ),
        id="E8-loopback",
    ),
    pytest.param(
        SLICE,
        "10.244.1.10",
        "169.254.1.1",
        (
            "14: EndpointSlice shop/web-1: endpoints[0].addresses[0]: 169.254.1.1 is link-local; an endpoint "
            "must be an address that packets can be sent to"
        ),
        id="E8-link-local",
    ),
    pytest.param(
        SLICE,
        "10.244.1.10",
        "224.0.0.1",
        (
            "14: EndpointSlice shop/web-1: endpoints[0].addresses[0]: 224.0.0.1 is multicast; an endpoint "
            "must be an address that packets can be sent to"
        ),
        id="E8-multicast",
    ),
    pytest.param(
        SLICE,
        "10.244.1.10",
        "0.0.0.0",
        (
            "14: EndpointSlice shop/web-1: endpoints[0].addresses[0]: 0.0.0.0 is unspecified; an endpoint "
            "must be an address that packets can be sent to"
        ),
        id="E8-unspecified",
    ),
    pytest.param(
        SLICE,
        "10.244.1.10",
        "0.1.2.3",
        (
            '14: EndpointSlice shop/web-1: endpoints[0].addresses[0]: 0.1.2.3 is in 0.0.0.0/8 ("this '
            'network"); an endpoint must be an address that packets can be sent to'
        ),
        id="E8-this-network",
    ),
    pytest.param(
        SLICE,
        "10.244.1.10",
        "255.255.255.255",
        (
            "14: EndpointSlice shop/web-1: endpoints[0].addresses[0]: 255.255.255.255 is broadcast; an "
            "endpoint must be an address that packets can be sent to"
        ),
        id="E8-broadcast",
    ),
    pytest.param(
        SLICE,
        "10.244.1.10",
        "fd00::1",
        (
            "14: EndpointSlice shop/web-1: endpoints[0].addresses[0]: fd00::1 is not an IPv4 address, as "
            "addressType says"
        ),
        id="endpoint-family",
    ),
    pytest.param(
        SLICE,
        "10.244.1.10",
        "pod-1",
        ('14: EndpointSlice shop/web-1: endpoints[0].addresses[0]: "pod-1" is not an IP address'),
        id="endpoint-words",
    ),
    pytest.param(
        SLICE,
        "- addresses:\n  - 10.244.1.10",
        "- addresses: []",
        ("13: EndpointSlice shop/web-1: endpoints[0]: addresses is missing; expected one address"),
        id="endpoint-empty",
    ),
    pytest.param(
        SLICE,
        "addressType: IPv4\n",
        "",
        ("1: EndpointSlice shop/web-1: addressType is missing; expected IPv4 or IPv6"),
        id="address-type-missing",
    ),
    pytest.param(
        SLICE,
        "port: 8080",
        "port: 65536",
        ("11: EndpointSlice shop/web-1: ports[0].port: 65536 is not a port (0 to 65535)"),
        id="slice-port",
    ),
    pytest.param(
        SLICE,
        "- addresses:",
        "- conditions: {ready: yes}\n  addresses:",
        ('13: EndpointSlice shop/web-1: endpoints[0].conditions.ready: "yes" is not true or false'),
        id="condition",
    ),
    pytest.param(
        SERVICE,
        SERVICE,
        "- 1\n",
        ("1: [1] is not an object; expected a mapping with apiVersion, kind and metadata"),
        id="not-an-object",
    ),
    pytest.param(
        SERVICE,
        "    port: 80",
        "\tport: 80",
        (
            "10: is not YAML: while scanning a plain scalar, found a tab character that violates "
            "indentation; the line has a tab: YAML is indented with spaces"
        ),
        id="tab",
    ),
    pytest.param(
        SERVICE,
        "ports:",
        "ports: [",
        ("9: is not YAML: while parsing a flow node, did not find expected node content"),
        id="unparsable",
    ),
    pytest.param(
        SERVICE,
        "web",
        "we\x00b",
        ("4: a NUL byte; this is not a text file"),
        id="nul",
    ),
    pytest.param(
        SERVICE,
        "web",
        "we\x07b",
        ("4: character 7 is not allowed in YAML; remove it"),
        id="control",
    ),
    pytest.param(
        SERVICE,
        "name: web",
        "name: !!python/object:os.system web",
        ('4: unknown tag "!!python/object:os.system"'),
        id="tag",
    ),
    pytest.param(
        SERVICE,
        "name: web",
        "name: *web",
        ("4: alias *web stands for nothing before it"),
        id="alias",
    ),
    pytest.param(
        SERVICE,
        "name: web",
        "[a]: web",
        ("4: a key must be text"),
        id="complex-key",
    ),
    pytest.param(
        SERVICE,
        SERVICE,
        "apiVersion: v1\nkind: List\nitems: {}\n",
        ("3: items: {} is not a list"),
        id="list-items",
    ),
    pytest.param(
        SERVICE,
        SERVICE,
        '{"kind": NaN}',
        ('1: kind: "NaN" is not a kind that is read here; known are Service, EndpointSlice, List'),
        id="json-nan",
    ),
]


@pytest.mark.faults(120, 121)
@pytest.mark.parametrize(("text", "old", "new", "said"), BAD)
def test_bad_input(text, old, new, said):
    assert problems(changed(text, old, new)) == [f"web.yaml:{said}"]


@pytest.mark.faults(120)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {x: 1, x: 2}\na: 5", ["1: a.x: comes twice; remove one", "2: a: comes twice; remove one"]),
        (
            "a: [1, {x: 1, x: 2}]\na: [1]",
            ["1: a[1].x: comes twice; remove one", "2: a: comes twice; remove one"],
        ),
        ("kind: [a]\nx: 1\nx: 2", ["3: x: comes twice; remove one"]),
    ],
)
def test_keys_that_come_twice_in_what_comes_twice(text, said):
    told = problems(text)
    assert [line for line in told if "comes twice" in line] == [f"web.yaml:{line}" for line in said]


@pytest.mark.parametrize("word", [".Inf", "-.INF", ".NaN", ".NAN"])
def test_what_is_no_finite_number_is_no_port(word):
    (line,) = problems(changed(SERVICE, "port: 80", f"port: {word}"))
    assert line.startswith("web.yaml:10: Service shop/web: spec.ports[0].port: ")


def test_every_problem_is_reported_at_once_in_order_of_line():
    text = (
        changed(changed(SERVICE, "port: 80", "port: 0"), "clusterIP:", "clusterIp:")
        + "---\n"
        + changed(SLICE, "10.244.1.10", "127.0.0.1")
    )
    assert [line.split(":")[1] for line in problems(text)] == ["7", "10", "25"]
    assert "\n".join(problems(text)).count("\n") == 2


def test_a_problem_is_a_configuration_error_with_exit_code_4():
    with pytest.raises(ConfigError) as caught:
        load("kind: x")
    assert caught.value.exit_code == 4
    assert (
        str(caught.value)
        == '<stdin>:1: kind: "x" is not a kind that is read here; known are Service, EndpointSlice, List'
    )


@pytest.mark.parametrize("field", ["annotations", "name"])
def test_what_is_nested_too_deep_is_an_error_of_the_manifest(field, tmp_path):
    path = tmp_path / "web.json"
    text = json.dumps({"kind": "Service", "apiVersion": "v1", "metadata": {field: {"a": "deep"}}})
    path.write_text(text.replace('"deep"', "[" * 985 + "]" * 985))
    with pytest.raises(ManifestError, match="is nested more than 100 levels deep"):
        manifests.load([str(path)])


@pytest.mark.faults(116)
def test_S13_two_services_on_one_vip_and_port():
    other = changed(SERVICE, "name: web", "name: shop")
    assert problems(f"{SERVICE}---\n{other}") == [
        "web.yaml:18: Service shop/shop: spec.clusterIP: 10.96.0.10:80/TCP belongs to Service shop/web already"
    ]
    elsewhere = changed(other, "port: 80", "port: 81")
    assert len(load(f"{SERVICE}---\n{elsewhere}").services) == 2


def test_S13_an_external_address_and_a_node_port_can_be_claimed_twice_as_well():
    external = changed(
        changed(SERVICE, "name: web", "name: shop"), "clusterIP: 10.96.0.10", "externalIPs: [10.96.0.10]"
    )
    assert problems(f"{SERVICE}---\n{external}") == [
        "web.yaml:18: Service shop/shop: spec.externalIPs[0]: 10.96.0.10:80/TCP belongs to Service shop/web already"
    ]
    one = SERVICE + "    nodePort: 30080\n"
    two = changed(changed(one, "name: web", "name: shop"), "10.96.0.10", "10.96.0.11")
    (line,) = problems(f"{one}---\n{two}")
    assert line == (
        "web.yaml:23: Service shop/shop: spec.ports[0].nodePort: node port 30080/TCP belongs to "
        "Service shop/web already"
    )


def test_S13_two_ports_of_one_service_want_different_node_ports():
    web = SERVICE + "    nodePort: 30080\n  - name: admin\n    port: 81\n    nodePort: 30080\n"
    place = "Service shop/web: spec.ports[1].nodePort"
    assert problems(web) == [f"web.yaml:14: {place}: node port 30080/TCP belongs to spec.ports[0].nodePort already"]
    assert load(web + "    protocol: UDP\n").services
    checked = changed(SERVICE + "    nodePort: 30080\n", "clusterIP", "healthCheckNodePort: 30080\n  clusterIP")
    place = "Service shop/web: spec.healthCheckNodePort"
    assert problems(checked) == [f"web.yaml:7: {place}: node port 30080/TCP belongs to spec.ports[0].nodePort already"]


def test_the_same_object_twice(tmp_path):
    assert problems(f"{SLICE}---\n{SLICE}") == [
        "web.yaml:19: EndpointSlice shop/web-1: metadata.name: an object of this kind and name is above already"
    ]
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(SLICE)
    with pytest.raises(ManifestError, match=r"b.yaml:4: .* an object of this kind and name is in .*a.yaml already"):
        manifests.load([str(tmp_path)])


@pytest.mark.faults(121)
def test_E8_an_endpoint_that_is_a_vip():
    looped = changed(SLICE, "10.244.1.10", "10.96.0.10")
    (line,) = problems(f"{SERVICE}---\n{looped}")
    assert line == (
        "web.yaml:25: EndpointSlice shop/web-1: endpoints[0].addresses[0]: "
        "10.96.0.10 is a VIP of Service shop/web; an endpoint must be a pod or a host"
    )
    # The external address of another Service may well be a node's own.
    other = changed(changed(SERVICE, "name: web", "name: b"), "clusterIP: 10.96.0.10", "externalIPs: [10.244.1.10]")
    assert load(f"{SERVICE}---\n{other}---\n{SLICE}").slices


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    (tmp_path / "utf16.yaml").write_bytes("a: 1".encode("utf-16"))
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    (tmp_path / "broken.json").write_text('{"a": 1,\n "b": }')
    (tmp_path / "twice.json").write_text('{"kind": "x",\n "kind": "Service"}')
    with pytest.raises(ManifestError) as caught:
        manifests.load([str(tmp_path), str(tmp_path / "web.yaml")])
    said = [str(problem).removeprefix(f"{tmp_path}/") for problem in caught.value.problems]
    assert said == [
        "broken.json:2: is not JSON: expecting value",
        "dangling.yaml: no such file or folder; check the path given with -f",
        "latin.yaml:2: byte 0xe9 is not UTF-8; save the file as UTF-8",
        'twice.json:1: Service (no name): apiVersion: missing; expected "v1"',
        "twice.json:1: Service (no name): metadata is missing",
        "twice.json:2: kind: comes twice; remove one",
        "utf16.yaml: is UTF-16; save it as UTF-8",
        "web.yaml: no such file or folder; check the path given with -f",
    ]


def test_F120_ten_megabytes_are_read(tmp_path):
    path, line = tmp_path / "web.yaml", "# " + 97 * "x" + "\n"
    path.write_text(SERVICE + "\n" + 50_000 * line + f"---\n{SLICE}\n" + 50_000 * line)
    found = manifests.load([str(path)])
    assert (len(found.services), len(found.slices)) == (1, 1)


def test_line_numbers_of_json(tmp_path):
    import yaml

    broken = yaml.safe_load(changed(SERVICE, "port: 80", "port: 70000"))
    (tmp_path / "web.json").write_text(json.dumps(broken, indent=1))
    with pytest.raises(ManifestError) as caught:
        manifests.load([str(tmp_path)])
    (problem,) = caught.value.problems
    assert problem.path == "spec.ports[0].port"
    assert (tmp_path / "web.json").read_text().splitlines()[problem.line - 1].strip() == '"port": 70000'


@pytest.mark.faults(120)
def test_a_bomb_of_aliases_is_refused_before_it_goes_off():
    text = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join([f'*{previous}'] * 9)}]\n"
        for previous, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    (line,) = problems(text)
    assert line.endswith("aliases add more than 100000 values")


@pytest.mark.parametrize(
    "text", ["[" * 5000, '{"a":' * 5000, "- " * 500 + "x", '{"kind": "List", "items": [' * 50 + "]}" * 50]
)
def test_endless_nesting_is_refused(text):
    (line,) = problems(text)
    assert "nested" in line


@pytest.mark.faults(121)
def test_a_huge_number_is_no_port():
    (line,) = problems(changed(SERVICE, "port: 80", f"port: {'9' * 5000}"))
    assert "is not a port" in line
    assert len(line) < 300


def test_unchanged_files_are_read_once(tmp_path):
    (tmp_path / "a.yaml").write_text(SERVICE)
    (tmp_path / "b.yaml").write_text(SLICE)
    cache: manifests.Cache = {}
    before = manifests.load([str(tmp_path)], cache=cache)
    again = manifests.load([str(tmp_path)], cache=cache)
    assert again.services[0] is before.services[0]
    (tmp_path / "new").write_text(changed(SERVICE, "port: 80", "port: 8000"))
    (tmp_path / "new").rename(tmp_path / "a.yaml")
    after = manifests.load([str(tmp_path)], cache=cache)
    assert after.services[0].ports[0].port == 8000
    assert after.slices[0] is before.slices[0]
    (tmp_path / "b.yaml").unlink()
    assert manifests.load([str(tmp_path)], cache=cache).slices == ()
    assert set(cache) == {tmp_path / "a.yaml"}


def test_a_bad_file_is_not_remembered_and_good_ones_still_are(tmp_path):
    (tmp_path / "a.yaml").write_text("kind: x")
    cache: manifests.Cache = {}
    for _ in range(2):
        with pytest.raises(ManifestError):
            manifests.load([str(tmp_path)], cache=cache)
    (tmp_path / "a.yaml").write_text(SERVICE)
    assert manifests.load([str(tmp_path)], cache=cache).services


EMPTY = ["", "\n \n", "# nothing yet\n", "---\n", "---\n# nothing\n---\n"]


@pytest.mark.faults(117, 122)
@pytest.mark.parametrize("text", EMPTY)
def test_a_file_that_is_empty_now_and_was_not_is_refused_until_it_is_written(text, tmp_path):
    path = tmp_path / "web.yaml"
    path.write_text(SERVICE)
    (tmp_path / "other.yaml").write_text(SLICE)
    reader = manifests.Reader([str(tmp_path)])
    reader.load()
    path.write_text(text)
    assert reader.reload({str(path)}) is None
    for _ in range(2):  # SIGHUP reads by the same rule
        with pytest.raises(ManifestError) as caught:
            reader.load()
        (said,) = caught.value.problems
        assert str(said) == (
            f"{path}: is empty now, and was not; to take away all that it had, write `{{kind: List, items: []}}`, "
            "or delete it from the folder that is given"
        )
    path.write_text(SERVICE)
    assert len(reader.load().services) == 1


@pytest.mark.faults(117)
def test_a_file_may_be_emptied_in_so_many_words_or_deleted_or_be_empty_from_the_beginning(tmp_path):
    path, other = tmp_path / "web.yaml", tmp_path / "other.yaml"
    for text in EMPTY:
        other.write_text(text)
        path.write_text(SERVICE)
        reader = manifests.Reader([str(tmp_path)])
        assert len(reader.load().services) == 1
        path.write_text("{kind: List, items: []}")
        assert reader.reload({str(path)}).services == {("shop", "web"): None}
        path.write_text(text)
        assert reader.load().services == ()
        path.write_text(SERVICE)
        assert len(reader.load().services) == 1
        path.unlink()
        assert reader.load().services == ()
        path.write_text(text)
        assert reader.load().services == ()


@pytest.fixture
def ten_seconds():
    """What takes longer fails."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def pipe(tmp_path):
    """A pipe of that name, and who writes it once, as `-f <(...)` does."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(f"{SERVICE}---\n{SLICE}",))
    writer.start()
    yield path
    writer.join(10)
    assert not writer.is_alive()


@pytest.mark.usefixtures("ten_seconds")
def test_a_pipe_that_is_given_is_waited_for_read_once_and_remembered(pipe, tmp_path):
    (tmp_path / "other.yaml").write_text(changed(changed(SERVICE, "web", "other"), "0.10", "0.11"))
    reader = manifests.Reader([str(pipe), str(tmp_path / "other.yaml")])
    first = reader.load()
    assert (len(first.services), len(first.slices)) == (2, 1)
    (tmp_path / "other.yaml").write_text(changed(SERVICE, "web", "b"))  # SIGHUP, and what it changes is wrong
    assert reader.reload({str(tmp_path / "other.yaml")}) is None
    with pytest.raises(ManifestError, match=r"10\.96\.0\.10:80/TCP belongs to Service shop/web already"):
        reader.load()
    (tmp_path / "other.yaml").unlink()
    (tmp_path / "other.yaml").write_text("{kind: List, items: []}")
    assert reader.load().services == first.services[:1]
    pipe.unlink()
    assert reader.load().services == first.services[:1]
    pipe.write_text(changed(SERVICE, "web", "file"))  # a file can be read again
    assert [service.name for service in reader.load().services] == ["file"]
    pipe.write_text(changed(SERVICE, "port: 80", "port: x"))
    with pytest.raises(ManifestError, match=r"pipe:10: Service shop/web: spec\.ports\[0\]\.port"):
        reader.load()


def test_what_is_wrong_in_a_pipe_has_its_line(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, changed(SERVICE, "port: 80", "port: 0").encode())
    os.close(writing)
    reader = manifests.Reader([f"/dev/fd/{reading}"])
    for _ in range(2):
        with pytest.raises(ManifestError, match=rf"/dev/fd/{reading}:10: Service shop/web: spec\.ports\[0\]\.port"):
            reader.load()
    os.close(reading)


@pytest.mark.faults(120)
@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.usefixtures("ten_seconds")
def test_a_pipe_in_a_folder_is_not_waited_for(is_linked, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "web.yaml").write_text(SERVICE)
    reader = manifests.Reader([str(folder)])
    reader.load()
    pipe = (tmp_path if is_linked else folder) / "pipe.yaml"
    os.mkfifo(pipe)
    if is_linked:
        (folder / "pipe.yaml").symlink_to(pipe)
    assert reader.reload({str(folder / "pipe.yaml")}) is None
    if is_linked:
        with pytest.raises(ManifestError, match=r"pipe\.yaml: is no regular file; a pipe can be given by its name"):
            reader.load()
    else:
        assert len(reader.load().services) == 1


@pytest.mark.usefixtures("ten_seconds")
def test_a_pipe_in_the_place_of_a_given_file_is_not_waited_for(tmp_path):
    path = tmp_path / "web.yaml"
    path.write_text(SERVICE)
    reader = manifests.Reader([str(path)])
    reader.load()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ManifestError, match="is no regular file"):
        reader.load()


def test_the_package_needs_neither_root_nor_numba_nor_yaml_to_be_imported():
    heavy = "('numba', 'yaml', 'bcc', 'pyroute2')"
    code = f"import sys, lb.resolve, lb.manifests; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert result.stdout == "[]\n"


def read_or_refuse(data: bytes) -> None:
    """Read `data`, or be refused in words that can be shown; fail on anything else."""
    said = ""
    try:
        load(data)
    except ManifestError as error:
        said = "\n".join(map(str, error.problems)) or "\0"
    assert all(line.isprintable() for line in said.split("\n"))


@pytest.mark.faults(120)
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b'{"\\ud800": 1}')
@example(b'{"kind": "\\ud800"}')
@example(b"? [a]\n: b")
@example(b"%YAML 9.9\n---\na")
@example(b"{a: 1, a: [}")
@example(b"*a")
@example(b"&a a: *a")
def test_any_text_is_read_or_refused(data):
    read_or_refuse(data)


PIECES = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        80,
        1e3,
        "",
        "None",
        "10.0.0.1",
        "fd00::1",
        "\x1b[2J",
        "\n",
        "Local",
        "127.0.0.1/8",
        [],
        {},
        [None],
        {"a": 1},
    ]
).map(copy.deepcopy)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_an_object_with_anything_in_any_place_is_read_or_refused(data):
    import yaml

    root = yaml.safe_load(data.draw(st.sampled_from([RICH_SERVICE, RICH_SLICE])))
    for _ in range(data.draw(st.integers(1, 3))):
        place, key = root, data.draw(st.sampled_from(sorted(root)))
        while isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 3)):
            place = place[key]
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        place[key] = data.draw(PIECES)
        if data.draw(st.booleans()) and isinstance(place, dict):
            place[data.draw(st.text(max_size=5))] = data.draw(PIECES)
        if not isinstance(root, dict) or not root:
            return
    read_or_refuse(json.dumps(root).encode())
    read_or_refuse(yaml.safe_dump(root).encode())


RICH_SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {a: b},
  annotations: {turnout.dev/weights: 10.0.0.1=1, turnout.dev/admit: xdp},
  ownerReferences: [{kind: a, controller: true}], managedFields: [{fieldsV1: {f: {}}}]}
spec: {type: LoadBalancer, clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, 'fd00::1'], externalIPs: [192.0.2.1],
  ipFamilies: [IPv4, IPv6], loadBalancerSourceRanges: [203.0.113.0/24], sessionAffinity: ClientIP,
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 5}}, externalTrafficPolicy: Local, healthCheckNodePort: 30000,
  ports: [{name: a, port: 80, nodePort: 30001, targetPort: http}, {name: b, port: 81, protocol: UDP}]}
status: {loadBalancer: {ingress: [{ip: 192.0.2.2, ipMode: VIP}, {hostname: a}]}, conditions: [{type: a}]}
"""
RICH_SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: a, port: 80}, {name: b, port: 81, protocol: UDP}]
endpoints: [{addresses: [10.0.0.1], conditions: {ready: true, serving: null}, nodeName: a, zone: b,
  targetRef: {kind: Pod}, hints: {forZones: [{name: b}], forNodes: [{name: a}]}}]
"""
