"""kube-proxy's rules in iptables, in both of its variants: nft (as tables of nf_tables) and legacy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from perf.bed import Service, Testbed
from perf.traffic import ENDPOINT_PORT
from perf.world import Host
from xdp.addresses import IPAddress, number_of, with_port
from xdp.errors import Error, MissingFeatureError

_PROGRAMMING_S = 600.0  # ten thousand Services take iptables-nft five minutes


class Iptables:
    """KUBE-SERVICES to KUBE-SVC to KUBE-SEP, the kernel's conntrack and routing. `variant`: nft or legacy."""

    translates = True
    leads_back = True

    def __init__(self, variant: str = "nft") -> None:
        self.name = f"iptables-{variant}"
        self._restore = {4: f"iptables-{variant}-restore", 6: f"ip6tables-{variant}-restore"}

    @contextlib.contextmanager
    def running(self, bed: Testbed) -> Iterator[None]:
        """Load the rules; frames become packets as a NIC's driver would make them (GRO on), checksums seen as right."""
        node, restore = bed.world.node, self._restore[bed.shape.family]
        try:
            load_kube_proxy_rules(node, bed.services, restore)
        except Error as error:
            raise MissingFeatureError(f"{self.name}: the rules cannot be loaded: {error}") from None
        try:
            yield
        finally:
            node.run([restore], text_in="*nat\nCOMMIT\n*filter\nCOMMIT\n", timeout_s=_PROGRAMMING_S)

    def change(self, bed: Testbed, number: int, service: Service) -> None:
        """Load what kube-proxy does after a change: the portals of all Services, the chains of the one that changed."""
        before, bed.services[number] = bed.services[number], service
        text = changed_rules(bed.services, number, before)
        restore = self._restore[bed.shape.family]
        bed.world.node.run([restore, "-w", "--noflush"], text_in=text, timeout_s=_PROGRAMMING_S)


def load_kube_proxy_rules(node: Host, services: Sequence[Service], restore: str = "iptables-nft-restore") -> None:
    """Make `node` what kube-proxy makes of it. Packets come in as from a NIC's driver: GRO on, checksums verified."""
    receive_like_a_nic(node)
    node.run([restore, "-w"], text_in=kube_proxy_rules(services), timeout_s=_PROGRAMMING_S)


def receive_like_a_nic(node: Host) -> None:
    """Have the node take packets as a NIC's driver hands them over: GRO on, checksums verified."""
    for interface in node.interfaces:
        node.run(["ethtool", "-K", interface.name, "gro", "on"])
    node.sysctl("net/netfilter/nf_conntrack_checksum", 0)


def kube_proxy_rules(services: Sequence[Service]) -> str:
    """Return what kube-proxy gives to iptables-restore for Services without a cluster CIDR, as text.

    Chains, comments, marks and their order are those of kube-proxy 1.36; names are numbers instead of hashes.
    """
    chains, rules = [], []
    for number, service in enumerate(services):
        chains += [f":{name} - [0:0]" for name in _chains(number, service)]
        rules += [_portal(number, service), *_rules(number, service)]
    return "\n".join([*_NAT_BEFORE, *chains, *_NAT_ALWAYS, *rules, "COMMIT", *_FILTER, "COMMIT", ""])


def changed_rules(services: Sequence[Service], number: int, before: Service) -> str:
    """Return what kube-proxy gives to `iptables-restore --noflush` when Service `number` is no longer as `before`."""
    names = _chains(number, services[number])
    gone = [name for name in _chains(number, before) if name not in names]
    chains = [f":{name} - [0:0]" for name in ("KUBE-SERVICES", *names, *gone)]
    portals = [_portal(each, service) for each, service in enumerate(services)]
    removals = [f"-X {name}" for name in gone]
    return "\n".join(["*nat", *chains, *portals, *_rules(number, services[number]), *removals, "COMMIT", ""])


def _name(number: int, service: Service) -> str:
    return f"shop/service-{number}:{service.protocol}"


def _endpoint_chain(number: int, endpoint: IPAddress) -> str:
    return f"KUBE-SEP-{number:012X}{int(endpoint) & 0xFFFF:04X}"


def _chains(number: int, service: Service) -> list[str]:
    return [f"KUBE-SVC-{number:016X}", *(_endpoint_chain(number, endpoint) for endpoint in service.endpoints)]


def _portal(number: int, service: Service) -> str:
    return (
        f"-A KUBE-SERVICES -d {service.vip}/{service.vip.max_prefixlen} -p {service.protocol}"
        f' -m comment --comment "{_name(number, service)} cluster IP"'
        f" -m {service.protocol} --dport {service.port} -j KUBE-SVC-{number:016X}"
    )


def _rules(number: int, service: Service) -> list[str]:
    """Return the rules of a Service's own chains: one of its endpoints, each with the same probability."""
    of, protocol, rules = _name(number, service), service.protocol, []
    for index, endpoint in enumerate(service.endpoints):
        left = len(service.endpoints) - index
        one_of = f" -m statistic --mode random --probability {1 / left:.10f}" if left > 1 else ""
        separate, target = _endpoint_chain(number, endpoint), with_port(number_of(endpoint), ENDPOINT_PORT)
        rules += [
            f'-A KUBE-SVC-{number:016X} -m comment --comment "{of} -> {target}"{one_of} -j {separate}',
            f'-A {separate} -s {endpoint}/{endpoint.max_prefixlen} -m comment --comment "{of}" -j KUBE-MARK-MASQ',
            f'-A {separate} -p {protocol} -m comment --comment "{of}" -m {protocol} -j DNAT --to-destination {target}',
        ]
    return rules


_PORTALS = '-m comment --comment "kubernetes service portals" -j KUBE-SERVICES'
_NAT_BEFORE = [
    "*nat",
    *(f":KUBE-{name} - [0:0]" for name in ("SERVICES", "POSTROUTING", "MARK-MASQ", "NODEPORTS")),
]
_NAT_ALWAYS = [
    f"-A PREROUTING {_PORTALS}",
    f"-A OUTPUT {_PORTALS}",
    '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
    "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
    "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000",
    '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
    "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
]
_NEW = '-m conntrack --ctstate NEW -m comment --comment "kubernetes'
_ESTABLISHED = '-m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED'
_FILTER = [
    "*filter",
    *(f":KUBE-{name} - [0:0]" for name in ("FORWARD", "EXTERNAL-SERVICES", "SERVICES", "PROXY-FIREWALL")),
    f'-A FORWARD {_NEW} load balancer firewall" -j KUBE-PROXY-FIREWALL',
    '-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',
    f'-A FORWARD {_NEW} service portals" -j KUBE-SERVICES',
    f'-A FORWARD {_NEW} externally-visible service portals" -j KUBE-EXTERNAL-SERVICES',
    "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
    '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT',
    f"-A KUBE-FORWARD {_ESTABLISHED} -j ACCEPT",
]
