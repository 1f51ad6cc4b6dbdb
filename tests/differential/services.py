"""The Services of both nodes: as manifests, and as the rules that kube-proxy makes of them (nftables mode).

Two things are not kube-proxy's: masquerading keeps a port that is free (`fully-random` would make every port another),
and chains are named by what they are for. Hosts of the network `client` are inside the cluster, the others are not.
"""

from __future__ import annotations

from tests.node import NODE_NAME, ScenarioNode
from tests.packets import Address, address
from tests.services import Service

INSIDE = "10.77.1.0/24"
NODE_PORT = 30_080
SNAT_PORTS = "30000-30999"

WEB = address("10.96.0.1:80")
MANY = address("10.96.0.2:80")
STICKY = address("10.96.0.3:80")
RANGED = address("10.97.0.4:80")  # only hosts of network `others` may come
NOT_HERE = address("10.97.0.5:80")  # externalTrafficPolicy Local, no endpoint here
NOT_HERE_INSIDE = address("10.96.0.6:80")  # internalTrafficPolicy Local, no endpoint here
NAMED = address("10.96.0.10:53")
NOBODY = address("10.96.0.20:80")
NOBODY_NAMED = address("10.96.0.20:53")
ELSEWHERE: Address = address("192.0.2.1:80")  # nobody's


def manifests(node: ScenarioNode) -> tuple[Service, ...]:
    """Return the Services for turnout."""
    one, three = (node.endpoint("web-1"),), tuple(node.endpoint(f"web-{n}") for n in (1, 2, 3))
    away = {one[0]: {"nodeName": f"not-{NODE_NAME}"}}
    ports = [{"name": "main", "port": 80, "nodePort": NODE_PORT}]
    sticky = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 3600}}}
    balanced = {"type": "LoadBalancer"}
    return (
        Service("web", "10.96.0.1:80", one, spec={"type": "NodePort", "ports": ports}),
        Service("many", "10.96.0.2:80", three),
        Service("sticky", "10.96.0.3:80", three, spec=sticky),
        Service(
            "ranged",
            "10.96.0.4:80",
            one,
            spec=balanced | {"loadBalancerSourceRanges": ["10.77.3.0/24"]},
            ingress=("10.97.0.4",),
        ),
        Service(
            "not-here",
            "10.96.0.5:80",
            one,
            spec=balanced | {"externalTrafficPolicy": "Local"},
            about=away,
            ingress=("10.97.0.5",),
        ),
        Service("not-here-inside", "10.96.0.6:80", one, spec={"internalTrafficPolicy": "Local"}, about=away),
        Service("dns", "10.96.0.10:53", (node.endpoint("web-1", 5353),), "UDP"),
        Service("nobody", "10.96.0.20:80"),
        Service("nobody-named", "10.96.0.20:53", (), "UDP"),
    )


RULES = f"""
table ip kube-proxy {{
 set cluster-ips {{ type ipv4_addr;
  elements = {{ 10.96.0.1, 10.96.0.2, 10.96.0.3, 10.96.0.4, 10.96.0.5, 10.96.0.6, 10.96.0.10, 10.96.0.20 }} }}
 set nodeport-ips {{ type ipv4_addr; elements = {{ 10.77.1.1, 10.77.2.1, 10.77.3.1 }} }}
 set sticky-1 {{ type ipv4_addr; flags dynamic,timeout; timeout 3600s; }}
 set sticky-2 {{ type ipv4_addr; flags dynamic,timeout; timeout 3600s; }}
 set sticky-3 {{ type ipv4_addr; flags dynamic,timeout; timeout 3600s; }}
 chain mark-for-masquerade {{ mark set mark or 0x4000; }}
 chain reject-chain {{ reject; }}
 chain masquerading {{ mark and 0x4000 == 0 return; mark set mark xor 0x4000; masquerade; }}
 chain endpoint-web-1 {{ ip saddr 10.77.2.2 jump mark-for-masquerade; meta l4proto tcp dnat to 10.77.2.2:8080; }}
 chain endpoint-web-2 {{ ip saddr 10.77.2.3 jump mark-for-masquerade; meta l4proto tcp dnat to 10.77.2.3:8080; }}
 chain endpoint-web-3 {{ ip saddr 10.77.2.4 jump mark-for-masquerade; meta l4proto tcp dnat to 10.77.2.4:8080; }}
 chain endpoint-dns {{ ip saddr 10.77.2.2 jump mark-for-masquerade; meta l4proto udp dnat to 10.77.2.2:5353; }}
 chain sticky-web-1 {{ update @sticky-1 {{ ip saddr }}; goto endpoint-web-1; }}
 chain sticky-web-2 {{ update @sticky-2 {{ ip saddr }}; goto endpoint-web-2; }}
 chain sticky-web-3 {{ update @sticky-3 {{ ip saddr }}; goto endpoint-web-3; }}
 chain service-web {{ ip daddr 10.96.0.1 ip saddr != {INSIDE} jump mark-for-masquerade; goto endpoint-web-1; }}
 chain service-many {{
  ip saddr != {INSIDE} jump mark-for-masquerade;
  numgen random mod 3 vmap {{ 0 : goto endpoint-web-1, 1 : goto endpoint-web-2, 2 : goto endpoint-web-3 }};
 }}
 chain service-sticky {{
  ip saddr != {INSIDE} jump mark-for-masquerade;
  ip saddr @sticky-1 goto sticky-web-1; ip saddr @sticky-2 goto sticky-web-2; ip saddr @sticky-3 goto sticky-web-3;
  numgen random mod 3 vmap {{ 0 : goto sticky-web-1, 1 : goto sticky-web-2, 2 : goto sticky-web-3 }};
 }}
 chain service-dns {{ ip saddr != {INSIDE} jump mark-for-masquerade; goto endpoint-dns; }}
 chain external-web {{ jump mark-for-masquerade; goto endpoint-web-1; }}
 chain firewall-ranged {{ ip saddr 10.77.3.0/24 return; drop; }}
 map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict;
  elements = {{
   10.96.0.1 . tcp . 80 : goto service-web, 10.96.0.2 . tcp . 80 : goto service-many,
   10.96.0.3 . tcp . 80 : goto service-sticky, 10.97.0.4 . tcp . 80 : goto external-web,
   10.96.0.10 . udp . 53 : goto service-dns,
  }} }}
 map service-nodeports {{ type inet_proto . inet_service : verdict;
  elements = {{ tcp . {NODE_PORT} : goto external-web }} }}
 map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict;
  elements = {{
   10.96.0.20 . tcp . 80 : goto reject-chain, 10.96.0.20 . udp . 53 : goto reject-chain,
   10.97.0.5 . tcp . 80 : drop, 10.96.0.6 . tcp . 80 : drop,
  }} }}
 map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict;
  elements = {{ 10.97.0.4 . tcp . 80 : goto firewall-ranged }} }}
 chain services {{
  ip daddr . meta l4proto . th dport vmap @service-ips;
  ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports;
 }}
 chain cluster-ips-check {{ ip daddr @cluster-ips reject; }}
 chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
 chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}
 chain filter-prerouting {{ type filter hook prerouting priority -110; ct state new jump firewall-check; }}
 chain filter-forward {{
  type filter hook forward priority -110;
  ct state new jump service-endpoints-check; ct state new jump cluster-ips-check;
 }}
 chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
 chain nat-postrouting {{ type nat hook postrouting priority 100; jump masquerading; }}
}}
"""
