"""kube-proxy's rules in nftables: verdict maps from address and port to chains. With a flowtable, if asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from perf.bed import Service, Testbed
from perf.subjects.iptables import receive_like_a_nic
from perf.traffic import ENDPOINT_PORT
from xdp.addresses import IPAddress
from xdp.errors import Error, MissingFeatureError

_PROGRAMMING_S = 300.0
_TABLE = "ip kube-proxy"


class Nftables:
    """`services` to `service-...` to `endpoint-...` by verdict maps, the kernel's conntrack and routing.

    `has_flowtable`: known flows take nf_tables' own short cut (in software, from ingress), as an operator may add it
    to kube-proxy's rules.
    """

    translates = True
    leads_back = True

    def __init__(self, *, has_flowtable: bool = False) -> None:
        self.name = "nftables-flowtable" if has_flowtable else "nftables"
        self._has_flowtable = has_flowtable

    @contextlib.contextmanager
    def running(self, bed: Testbed) -> Iterator[None]:
        """Load the rules; frames become packets as a NIC's driver would make them (GRO on), checksums seen as right."""
        node = bed.world.node
        receive_like_a_nic(node)
        interfaces = [interface.name for interface in node.interfaces]
        if self._has_flowtable:
            self._need_flowtables(bed, interfaces)
        try:
            node.run(["nft", "-f", "-"], text_in=kube_proxy_table(bed.services), timeout_s=_PROGRAMMING_S)
            if self._has_flowtable:
                node.run(["nft", "-f", "-"], text_in=_flowtable(interfaces))
        except Error as error:
            raise MissingFeatureError(f"{self.name}: the rules cannot be loaded: {error}") from None
        try:
            yield
        finally:
            node.run(["nft", "delete", "table", *_TABLE.split()], timeout_s=_PROGRAMMING_S)

    def _need_flowtables(self, bed: Testbed, interfaces: Sequence[str]) -> None:
        probe = (
            f"table ip probe {{ flowtable f {{ hook ingress priority 0; devices = {{ {', '.join(interfaces)} }}; }} }}"
        )
        if bed.world.node.run(["nft", "-c", "-f", "-"], text_in=probe, check=False).returncode:
            raise MissingFeatureError(
                f"{self.name}: this kernel has no flowtables (CONFIG_NF_FLOW_TABLE, CONFIG_NF_FLOW_TABLE_INET and "
                "CONFIG_NFT_FLOW_OFFLOAD)"
            )

    def change(self, bed: Testbed, number: int, service: Service) -> None:
        """Load what kube-proxy does after a change: the chains of the Service that changed, in one transaction."""
        before, bed.services[number] = bed.services[number], service
        text = changed_rules(number, before, service)
        bed.world.node.run(["nft", "-f", "-"], text_in=text, timeout_s=_PROGRAMMING_S)


def kube_proxy_table(services: Sequence[Service]) -> str:
    """Return what kube-proxy 1.36 gives to nft for Services without a cluster CIDR; names are numbers, not hashes."""
    vips, verdicts, chains = [], [], []
    for number, service in enumerate(services):
        vips.append(str(service.vip))
        verdicts.append(f"{service.vip} . {service.protocol} . {service.port} : goto {_service_chain(number)}")
        chains += [f"chain {name} {{ {'; '.join(rules)}; }}" for name, rules in _chains(number, service).items()]
    sets = [f"elements = {{ {', '.join(vips)} }}", f"elements = {{ {', '.join(verdicts)} }}"] if services else ["", ""]
    return _FRAME.format(vips=sets[0], verdicts=sets[1], chains="\n".join(chains))


def changed_rules(number: int, before: Service, service: Service) -> str:
    """Return the transaction with which kube-proxy makes Service `number` what it is no longer as `before`."""
    old, new = _chains(number, before), _chains(number, service)
    gone = [name for name in old if name not in new]
    lines = [f"add chain {_TABLE} {name}" for name in reversed(new)]
    lines += [f"flush chain {_TABLE} {name}" for name in new]
    lines += [f"add rule {_TABLE} {name} {rule}" for name, rules in reversed(new.items()) for rule in rules]
    lines += [f"flush chain {_TABLE} {name}" for name in gone] + [f"delete chain {_TABLE} {name}" for name in gone]
    return "\n".join(lines) + "\n"


def _service_chain(number: int) -> str:
    return f"service-{number:08X}"


def _endpoint_chain(number: int, endpoint: IPAddress) -> str:
    return f"endpoint-{number:08X}-{int(endpoint) & 0xFFFF:04X}"


def _chains(number: int, service: Service) -> dict[str, list[str]]:
    """Return {chain: rules} of a Service: the choice first, then a chain for each endpoint."""
    ends = [_endpoint_chain(number, endpoint) for endpoint in service.endpoints]
    choice = ", ".join(f"{index} : goto {name}" for index, name in enumerate(ends))
    chains = {_service_chain(number): [f"numgen random mod {len(ends)} vmap {{ {choice} }}"]}
    for name, endpoint in zip(ends, service.endpoints, strict=True):
        chains[name] = [
            f"ip saddr {endpoint} jump mark-for-masquerade",
            f"meta l4proto {service.protocol} dnat to {endpoint}:{ENDPOINT_PORT}",
        ]
    return chains


def _flowtable(interfaces: Sequence[str]) -> str:
    devices = ", ".join(interfaces)
    return (
        f"add flowtable {_TABLE} fast {{ hook ingress priority 0; devices = {{ {devices} }}; }}\n"
        f"add rule {_TABLE} filter-forward ct state established flow add @fast\n"
    )


_FRAME = """table ip kube-proxy {{
 set cluster-ips {{ type ipv4_addr; {vips}
 }}
 set nodeport-ips {{ type ipv4_addr; }}
 map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
 map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
 map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
 map service-nodeports {{ type inet_proto . inet_service : verdict; }}
 chain mark-for-masquerade {{ mark set mark or 0x4000; }}
 chain masquerading {{
  mark and 0x4000 == 0 return; mark set mark xor 0x4000; masquerade fully-random;
 }}
 {chains}
 map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; {verdicts}
 }}
 chain services {{
  ip daddr . meta l4proto . th dport vmap @service-ips;
  ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports;
 }}
 chain reject-chain {{ reject; }}
 chain cluster-ips-check {{ ip daddr @cluster-ips reject; }}
 chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
 chain nodeport-endpoints-check {{ ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}
 chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}
 chain filter-prerouting {{ type filter hook prerouting priority -110; ct state new jump firewall-check; }}
 chain filter-input {{
  type filter hook input priority -110;
  ct state new jump nodeport-endpoints-check; ct state new jump service-endpoints-check;
 }}
 chain filter-forward {{
  type filter hook forward priority -110;
  ct state new jump service-endpoints-check; ct state new jump cluster-ips-check;
 }}
 chain filter-output {{
  type filter hook output priority -110;
  ct state new jump service-endpoints-check; ct state new jump firewall-check;
 }}
 chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
 chain nat-output {{ type nat hook output priority -100; jump services; }}
 chain nat-postrouting {{ type nat hook postrouting priority 100; jump masquerading; }}
}}
"""
