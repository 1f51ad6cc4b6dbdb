"""A status as a node gives it, for tests of what reads one (test_metrics.py holds its keys to the view)."""

from __future__ import annotations

from typing import Any

STATUS: dict[str, Any] = {
    "state": "ok",
    "why": [],
    "engine": "xdp",
    "seed": "public",
    "uptime_s": 93784.2,
    "services": 2,
    "endpoints": 3,
    "interfaces": [
        {"name": "eth0", "engine": "xdp", "xdp_mode": "native", "why": "", "rx_packets": 1000},
        {"name": "eth1", "engine": "xdp", "xdp_mode": "generic", "why": "asked for", "rx_packets": 5},
    ],
    "flows": {"used": 250_000, "capacity": 1_000_000},
    "snat_ports_left_out": 2,
    "taken_out": {"drain": 2, "maint": 1, "next_deadline_s": 599.9, "ended": 17},
    "without_endpoint": {"count": 1, "ports": ["shop/old:http"]},
    "revision": {"desired": 7, "programmed": 7},
    "applied_at_s": 1_790_000_000.5,
    "packets": {
        "xdp": {
            "received": 1234,
            "forwarded": 1200,
            "passed": 20,
            "dropped": 9,
            "punted": 5,
            "admitted": 0,
            "redirect_failed": 2,
        },
        "userspace": {"received": 4, "forwarded": 3, "passed": 0, "dropped": 1, "punt_lost": 1, "originated": 0},
        "egress": {"received": 50, "forwarded": 30, "passed": 20},
    },
    "sockets": {"led": 12, "passed": 30, "refused": 1, "reasons": {"LED": 12, "NOT_OURS": 30, "NO_ENDPOINT": 1}},
    "reasons": {"FORWARDED": 1200, "NEW_FLOW": 4},
}
