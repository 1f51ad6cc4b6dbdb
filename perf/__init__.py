"""Worlds of network namespaces, traffic, peers, and one way to measure them."""
