"""What Services may ask for and do not get, and who asks for it: nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lb.model import DEFAULT_OPTIONS, EndpointSlice, NodeView, NotHonoured, Options, Service

# What the dataplane does not act on yet: feature -> what happens instead. Whoever teaches it one removes the line.
NOT_YET: Mapping[str, str] = {
    "sctp": "SCTP is not forwarded yet; this port is left out",
    "forwarding": "not honoured yet: nat is used",
}
# Annotations that need a feature. Those that are missing are honoured.
_OPTION_FEATURES = {
    "forwarding": "forwarding",
}


_FIELD_OF = {
    "external_traffic_policy": "spec.externalTrafficPolicy",
    "internal_traffic_policy": "spec.internalTrafficPolicy",
}
_NOBODY_IS_LOCAL = "without --node-name no endpoint is known to be on this node: clients reach those on every node"


class LeftOut:
    """Collects what one Service asks for in vain, on a node."""

    def __init__(self, service: Service, not_yet: Mapping[str, str], node: NodeView) -> None:
        self.service = service
        self.not_yet = not_yet
        self.node = node
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
            if service.type == "NodePort" and not port.node_port:
                at = f"spec.ports[{index}].nodePort"
                self.add(at, "no node port to answer at; set one (in a cluster the apiserver does that)")
            if port.protocol == "SCTP":
                self.notes("sctp", f"spec.ports[{index}].protocol")
        if not self.node.name:
            for policy in ("external_traffic_policy", "internal_traffic_policy"):
                if getattr(service, policy) == "Local":
                    self.add(_FIELD_OF[policy], _NOBODY_IS_LOCAL)
            if service.health_check_node_port:
                self.add("spec.healthCheckNodePort", "without --node-name not served")
        if not (self.node.zone or self.node.name) and any(
            endpoint.zone_hints or endpoint.node_hints for part in slices for endpoint in part.endpoints
        ):
            self.add("endpoints[].hints", "without --zone and --node-name endpoints of every zone are chosen from")
        if service.options is not DEFAULT_OPTIONS:
            self.look_at_options(service.options)

    def look_at_options(self, options: Options) -> None:
        """Note every annotation that wants what is not there yet."""
        for attribute, feature in _OPTION_FEATURES.items():
            if getattr(options, attribute) != getattr(DEFAULT_OPTIONS, attribute):
                name = attribute.removesuffix("_s").replace("_", "-")
                self.notes(feature, f"metadata.annotations[turnout.dev/{name}]")
