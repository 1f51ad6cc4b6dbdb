"""What Services may ask for that this version does not do, and who asks for it: nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lb.model import DEFAULT_OPTIONS, EndpointSlice, NotHonoured, Options, Service

# What the dataplane does not act on yet: feature -> what happens instead. Whoever teaches it one removes the line.
NOT_YET: Mapping[str, str] = {
    "ipv6": "IPv6 is not forwarded yet; left out",
    "sctp": "SCTP is not forwarded yet; this port is left out",
    "node-port": "node ports are not served yet; left out",
    "external-policy-local": "not honoured yet: clients from outside reach endpoints on every node",
    "internal-policy-local": "not honoured yet: clients reach endpoints on every node",
    "affinity": "not honoured yet: each connection of a client may reach another endpoint",
    "source-ranges": "not honoured yet; the load balancer's addresses are left out, so that nobody else gets in",
    "health-check": "not served yet",
    "weights": "not honoured yet: every endpoint has the same share",
    "hints": "topology hints are not honoured yet: endpoints of every zone are chosen from",
    "forwarding": "not honoured yet: nat is used",
    "scheduler": "not honoured yet: maglev is used",
    "admit": "not honoured yet: userspace admits new connections",
    "timeouts": "not honoured yet: the defaults are used",
    "mid-stream": "not honoured yet: connections are adopted in mid-stream",
    "endpoint-removed": "not honoured yet: connections to a removed endpoint go on",
}

# Annotations that need a feature. `when_stalled` is missing because it is honoured.
_OPTION_FEATURES = {
    "forwarding": "forwarding",
    "scheduler": "scheduler",
    "admit": "admit",
    "mid_stream": "mid-stream",
    "endpoint_removed": "endpoint-removed",
    "weights": "weights",
    "timeouts_s": "timeouts",
}


class LeftOut:
    """Collects what one Service asks for in vain."""

    def __init__(self, service: Service, not_yet: Mapping[str, str]) -> None:
        self.service = service
        self.not_yet = not_yet
        self.found: list[NotHonoured] = []

    def add(self, field: str, reason: str) -> None:
        """Note `field`."""
        self.found.append(NotHonoured(f"Service {self.service.namespace}/{self.service.name}", field, reason))

    def notes(self, feature: str, field: str) -> bool:
        """Note `field` if the feature behind it is not there yet, and return whether it was noted."""
        if feature not in self.not_yet:
            return False
        self.add(field, self.not_yet[feature])
        return True

    def look_at_fields(self, slices: Sequence[EndpointSlice]) -> None:
        """Note every other field of the Service, and of its slices, that wants what is not there yet."""
        service = self.service
        if not (service.cluster_ips or service.external_ips or service.ingress):
            self.add("spec.clusterIP", "no address to answer at; set one (in a cluster the apiserver does that)")
        for index, port in enumerate(service.ports):
            if port.protocol == "SCTP":
                self.notes("sctp", f"spec.ports[{index}].protocol")
            if port.node_port:
                self.notes("node-port", f"spec.ports[{index}].nodePort")
        if service.external_traffic_policy == "Local":
            self.notes("external-policy-local", "spec.externalTrafficPolicy")
        if service.internal_traffic_policy == "Local":
            self.notes("internal-policy-local", "spec.internalTrafficPolicy")
        if service.affinity_s:
            self.notes("affinity", "spec.sessionAffinity")
        if service.source_ranges and service.ingress:
            self.notes("source-ranges", "spec.loadBalancerSourceRanges")
        if service.health_check_node_port:
            self.notes("health-check", "spec.healthCheckNodePort")
        if any(endpoint.zone_hints or endpoint.node_hints for part in slices for endpoint in part.endpoints):
            self.notes("hints", "endpoints[].hints")
        if service.options is not DEFAULT_OPTIONS:
            self.look_at_options(service.options)

    def look_at_options(self, options: Options) -> None:
        """Note every annotation that wants what is not there yet."""
        for attribute, feature in _OPTION_FEATURES.items():
            if getattr(options, attribute) != getattr(DEFAULT_OPTIONS, attribute):
                name = attribute.removesuffix("_s").replace("_", "-")
                self.notes(feature, f"metadata.annotations[turnout.dev/{name}]")
