"""Services as tests write them, and the manifests that say so."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.packets import Address, address
from xdp.addresses import with_port


@dataclass(frozen=True)
class Service:
    """A Service port, written as text: `Service("web", "10.96.0.1:80", ("10.77.2.2:8080",))`."""

    name: str
    frontend: str
    endpoints: tuple[str, ...] = ()
    protocol: str = "TCP"
    annotations: Mapping[str, str] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)  # more fields of the Service's spec
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # more fields of an endpoint, by its text
    ingress: tuple[str, ...] = ()  # addresses of a load balancer

    def with_endpoints(self, *endpoints: str) -> Service:
        """Return the same Service with other endpoints."""
        return replace(self, endpoints=endpoints)

    @property
    def at(self) -> Address:
        """The frontend as numbers."""
        return address(self.frontend)

    @property
    def key(self) -> str:
        """The port's name in answers."""
        return f"shop/{self.name}:main"

    def living(self) -> Iterator[str]:
        """Yield the endpoints that serve."""
        for endpoint in self.endpoints:
            conditions = self.about.get(endpoint, {}).get("conditions", {})
            if conditions.get("ready", True) or (conditions.get("terminating") and conditions.get("serving", True)):
                yield endpoint

    def objects(self) -> list[dict[str, Any]]:
        """Return the Kubernetes objects: the Service, and a slice for every port number of its endpoints."""
        vip, port = split(self.frontend)
        slices: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for endpoint in self.endpoints:
            host, number = split(endpoint)
            slices.setdefault((number, "IPv6" if ":" in host else "IPv4"), []).append(
                {"addresses": [host], **self.about.get(endpoint, {})}
            )
        metadata = {"namespace": "shop", "name": self.name, "annotations": dict(self.annotations)}
        ports = [{"name": "main", "port": int(port), "protocol": self.protocol}]
        spec = {"clusterIP": vip, "ports": ports, **self.spec}
        status = {"loadBalancer": {"ingress": [{"ip": ip} for ip in self.ingress]}}
        return [
            {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": status},
            *(
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "namespace": "shop",
                        "name": f"{self.name}-{number}-{address_type.lower()}",
                        "labels": {"kubernetes.io/service-name": self.name},
                    },
                    "addressType": address_type,
                    "ports": [{"name": "main", "port": number, "protocol": self.protocol}],
                    "endpoints": endpoints,
                }
                for (number, address_type), endpoints in slices.items()
            ),
        ]

    def shown(self) -> tuple[str, str, str, frozenset[str]]:
        """Return what `get services` is to say: name, protocol, frontend, endpoints."""
        return self.name, self.protocol, self.frontend, frozenset(self.endpoints)


def split(place: str) -> tuple[str, int]:
    """Return (address, port) of `10.0.0.1:80` or `[2001:db8::1]:80`."""
    host, _, port = place.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def vip(number: int, port: int, family: int) -> str:
    """Return a port of a Service's address, as manifests and clients write it."""
    return f"10.96.0.{number}:{port}" if family == 4 else f"[fd96::{number:x}]:{port}"


def write_manifests(path: Path, services: Iterable[Service]) -> None:
    """Replace the manifest file at once, as careful editors and controllers do."""
    items = [one for service in services for one in service.objects()]
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    beside.replace(path)


def text_of(place: Address) -> str:
    """Return an address and port as `10.0.0.1:80` or `[2001:db8::1]:80`."""
    return with_port(*place)
