"""The fields that Kubernetes knows in a Service and an EndpointSlice, as a table, and the check against it.

A kind of value is a dict (a mapping with these fields), a list of one kind (a list of such), `str`, `bool`, `dict`
(text to text), `object` (anything), or a function from a value to what is wrong with it ("" for nothing). A value of
null is as good as an absent field everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from difflib import get_close_matches
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from socket import AF_INET, inet_pton
from types import FunctionType
from typing import Any

Kind = Any
Path = tuple[str | int, ...]
Report = Callable[[Path, str], None]

_LONGEST_SHOWN = 60
_DNS_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_DNS_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?")


def shown(value: object) -> str:
    """Return `value` as it stands in a message: in JSON's way, all printable, not too long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: what was meant, or else what there is."""
    candidates = [name for name in known if name]
    if isinstance(word, str):
        folded = {name.lower(): name for name in candidates}
        close = get_close_matches(word.lower()[:100], folded, n=1, cutoff=0.6)
        if close:
            return f'; did you mean "{folded[close[0]]}"?'
    return f"; known are {', '.join(candidates)}" if len(candidates) <= 12 else ""


def check(value: Any, kind: Kind, path: Path, report: Report) -> None:
    """Report everything in `value` that is not of this kind."""
    sort = kind.__class__
    if kind is object or value is None:
        return
    if sort is FunctionType:
        if message := kind(value):
            report(path, message)
    elif sort is dict or sort is list or kind is dict:
        if value.__class__ is not (list if sort is list else dict):
            report(path, _wrong_type(value, "a list" if sort is list else "a mapping"))
        elif sort is dict:
            _check_fields(value, kind, path, report)
        else:
            _check_items(value, kind, path, report)
    elif value.__class__ is not kind:
        report(path, _wrong_type(value, "text" if kind is str else "true or false"))


def _check_fields(value: Any, fields: Kind, path: Path, report: Report) -> None:
    for key, item in value.items():
        kind = fields.get(key)
        if kind is None:
            report((*path, key), "unknown field" + did_you_mean(key, fields))
        elif item is None or (kind is item.__class__ and kind is not dict):
            continue
        # What follows could be left to `check`, one call further down; but nearly all values come this way.
        elif kind.__class__ is FunctionType:
            if message := kind(item):
                report((*path, key), message)
        elif kind.__class__ is dict and item.__class__ is dict:
            _check_fields(item, kind, (*path, key), report)
        elif kind.__class__ is list and item.__class__ is list:
            _check_items(item, kind, (*path, key), report)
        else:
            check(item, kind, (*path, key), report)


def _check_items(value: Any, kind: Kind, path: Path, report: Report) -> None:
    """Check the items of a list, or what a mapping of text to text holds."""
    if kind is dict:
        items, item_kind = value.items(), str
    else:
        items, item_kind = enumerate(value), kind[0]
    for key, item in items:
        if item is None and kind is not dict:
            report((*path, key), "is null; remove it")
        elif item.__class__ is not item_kind:
            check(item, item_kind, (*path, key), report)


def _wrong_type(value: object, expected: str) -> str:
    cure = ""
    if expected == "text" and isinstance(value, bool | int | float):
        cure = f'; quote it: "{str(value).lower() if isinstance(value, bool) else value}"'
    return f"{shown(value)} is not {expected}{cure}"


def number(low: int, high: int, name: str) -> Callable[[Any], str]:
    """Return the kind of whole numbers from `low` to `high`, which are called `name`."""

    def problem(value: Any) -> str:
        if value.__class__ is int and low <= value <= high:
            return ""
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
            if value != str(int(value)):
                return f'"{value}" is not {name}; write it without leading zeros'
            if low <= int(value) <= high:
                return f'"{value}" is text, not {name}; write it without quotes'
        return f"{shown(value)} is not {name} ({low} to {high})"

    return problem


def one_of(*words: str) -> Callable[[Any], str]:
    """Return the kind of these words."""
    known = frozenset(words)

    def problem(value: Any) -> str:
        if value.__class__ is str and value in known:
            return ""
        return f"{shown(value)} is not known" + did_you_mean(value, words)

    return problem


def _label(value: Any) -> str:
    if value.__class__ is not str:
        return _wrong_type(value, "text")
    if _DNS_LABEL.fullmatch(value):
        return ""
    return f"{shown(value)} is not a name: a to z, 0 to 9 and dashes between them, 63 at most"


def _label_or_empty(value: Any) -> str:
    return _label(value) if value != "" else ""


def _name(value: Any) -> str:
    if value.__class__ is not str:
        return _wrong_type(value, "text")
    if _DNS_NAME.fullmatch(value):
        return ""
    return f"{shown(value)} is not a name: a to z, 0 to 9, dashes and dots between them, 253 at most"


def _port_or_name(value: Any) -> str:
    return "" if value.__class__ is str and not value.isdigit() else PORT(value)


@lru_cache(4096)  # an address is checked, then read: the second time costs nothing
def read_address(text: str) -> IPv4Address | IPv6Address | str:
    """Return the address that `text` is, or what is wrong with it."""
    with suppress(OSError, ValueError):
        # The C library is as strict as ipaddress about dotted quads, and five times as fast; what it refuses goes on.
        return IPv4Address(int.from_bytes(inet_pton(AF_INET, text), "big"))
    try:
        address = IPv6Address(text) if ":" in text else IPv4Address(text)
    except ValueError as error:
        why = "; octets have no leading zeros" if "eading zeros" in str(error) else ""
        return f"{shown(text)} is not an IP address{why}"
    if address.version == 6:
        if address.scope_id is not None:
            return f"{shown(text)} has a zone; an address that needs one cannot be reached from elsewhere"
        if address.ipv4_mapped is not None:
            return f"{shown(text)} is an IPv4-mapped address; write {address.ipv4_mapped}"
    return address


def special(address: IPv4Address | IPv6Address) -> str:
    """Return what kind of address no host can have towards others ("loopback"), or "" (E8)."""
    if address.version == 4:
        number_ = int(address)
        first = number_ >> 24
        if 0 < first < 224 and first != 127 and number_ >> 16 != 0xA9FE:
            return ""
        if first == 127:
            return "loopback"
        if number_ == 0:
            return "unspecified"
        if first == 0:
            return 'in 0.0.0.0/8 ("this network")'
        if first == 169:
            return "link-local"
        if first < 240:
            return "multicast"
        return "broadcast" if number_ == 0xFFFFFFFF else ""
    for claim in ("loopback", "unspecified", "link_local", "multicast"):
        if getattr(address, f"is_{claim}"):
            return claim.replace("_", "-")
    return ""


def _address(value: Any) -> str:
    if value.__class__ is not str:
        return f"{shown(value)} is not an IP address"
    address = read_address(value)
    if isinstance(address, str):
        return address
    what = special(address)
    return f"{value} is {what}; it cannot be served from or sent to" if what else ""


def _cluster_ip(value: Any) -> str:
    return "" if value in ("", "None") else _address(value)


def read_network(text: str) -> IPv4Network | IPv6Network | str:
    """Return the network that `text` is, white space around it aside, or what is wrong with it."""
    address, _, length = text.strip().partition("/")
    try:
        network = ip_network(text.strip(), strict=False)
    except ValueError:
        return f"{shown(text)} is not a network; write it as 192.0.2.0/24"
    if not length.isdigit():
        return f"{shown(text)} has no prefix length; write {network}"
    if ip_address(address) != network.network_address:
        return f'{shown(text)} has bits set behind its prefix; did you mean "{network}"?'
    return network


def _network(value: Any) -> str:
    network = read_network(value) if value.__class__ is str else f"{shown(value)} is not a network"
    return network if isinstance(network, str) else ""


PORT = number(1, 65535, "a port")
_PORT_OR_NONE = number(0, 65535, "a port")
_PROTOCOL = one_of("TCP", "UDP", "SCTP")
_POLICY = one_of("Cluster", "Local")
_GENERATION = number(0, 2**63 - 1, "a number")
_PORT_NUMBER = number(0, 2**31 - 1, "a number")

_METADATA: Kind = {
    "name": _name,
    "generateName": str,
    "namespace": _label,
    "selfLink": str,
    "uid": str,
    "resourceVersion": str,
    "generation": _GENERATION,
    "creationTimestamp": str,
    "deletionTimestamp": str,
    "deletionGracePeriodSeconds": _GENERATION,
    "labels": dict,
    "annotations": dict,
    "ownerReferences": [
        {
            "apiVersion": str,
            "kind": str,
            "name": str,
            "uid": str,
            "controller": bool,
            "blockOwnerDeletion": bool,
        }
    ],
    "finalizers": [str],
    "clusterName": str,
    "managedFields": [
        {
            "manager": str,
            "operation": str,
            "apiVersion": str,
            "time": str,
            "fieldsType": str,
            "fieldsV1": object,
            "subresource": str,
        }
    ],
}

_CONDITION: Kind = {
    "type": str,
    "status": str,
    "observedGeneration": _GENERATION,
    "lastTransitionTime": str,
    "reason": str,
    "message": str,
}

SERVICE: Kind = {
    "apiVersion": str,
    "kind": str,
    "metadata": {**_METADATA, "name": _label},
    "spec": {
        "ports": [
            {
                "name": _label_or_empty,
                "protocol": _PROTOCOL,
                "appProtocol": str,
                "port": PORT,
                "targetPort": _port_or_name,
                "nodePort": _PORT_OR_NONE,
            }
        ],
        "selector": dict,
        "clusterIP": _cluster_ip,
        "clusterIPs": [_cluster_ip],
        "type": one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
        "externalIPs": [_address],
        "sessionAffinity": one_of("None", "ClientIP"),
        "loadBalancerIP": str,
        "loadBalancerSourceRanges": [_network],
        "externalName": str,
        "externalTrafficPolicy": _POLICY,
        "healthCheckNodePort": _PORT_OR_NONE,
        "publishNotReadyAddresses": bool,
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": number(1, 86400, "a number of seconds")}},
        "ipFamilies": [one_of("IPv4", "IPv6")],
        "ipFamilyPolicy": one_of("SingleStack", "PreferDualStack", "RequireDualStack"),
        "allocateLoadBalancerNodePorts": bool,
        "loadBalancerClass": str,
        "internalTrafficPolicy": _POLICY,
        "trafficDistribution": str,
    },
    "status": {
        "loadBalancer": {
            "ingress": [
                {
                    "ip": _address,
                    "hostname": str,
                    "ipMode": one_of("VIP", "Proxy"),
                    "ports": [{"port": _PORT_NUMBER, "protocol": str, "error": str}],
                }
            ]
        },
        "conditions": [_CONDITION],
    },
}

_REFERENCE: Kind = {
    "kind": str,
    "namespace": str,
    "name": str,
    "uid": str,
    "apiVersion": str,
    "resourceVersion": str,
    "fieldPath": str,
}

ENDPOINT_SLICE: Kind = {
    "apiVersion": str,
    "kind": str,
    "metadata": _METADATA,
    "addressType": one_of("IPv4", "IPv6", "FQDN"),
    "endpoints": [
        {
            "addresses": [str],  # what they must be depends on addressType
            "conditions": {"ready": bool, "serving": bool, "terminating": bool},
            "hostname": str,
            "targetRef": _REFERENCE,
            "deprecatedTopology": dict,
            "nodeName": str,
            "zone": str,
            "hints": {"forZones": [{"name": str}], "forNodes": [{"name": str}]},
        }
    ],
    "ports": [{"name": _label_or_empty, "protocol": _PROTOCOL, "port": _PORT_OR_NONE, "appProtocol": str}],
}

LIST_METADATA: Kind = {
    "selfLink": str,
    "resourceVersion": str,
    "continue": str,
    "remainingItemCount": _GENERATION,
}
