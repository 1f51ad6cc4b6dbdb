"""Where traffic goes: the Service model, the manifests it is read from, and the choice of an endpoint.

Knows addresses and ports, never bytes of a packet. Importing it needs no root, no bcc and no network card.
"""
