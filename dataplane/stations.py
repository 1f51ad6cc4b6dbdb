"""Whom frames of this node are addressed to: the MAC addresses of our interfaces, and of devices on top of them.

An interface that listens to all, and a bridge or hub that floods, bring frames for other machines, too. These are the
kernel's, which ignores them. Packets are compared with the few addresses that there is room for (docs/adr/0045).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

import numpy as np
import numpy.typing as npt

from dataplane.netdev import Interface
from xdp.schema import Limit

_ROOM = int(Limit.STATIONS)

log = logging.getLogger(__name__)


def words_of(addresses: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    """Return MAC addresses as packet paths compare them; none, or more than there is room for: nothing is compared."""
    words = [int.from_bytes(address, "little") for address in addresses]
    if not words or len(words) > _ROOM:
        return np.zeros(_ROOM, np.uint64)
    return np.array(words + words[:1] * (_ROOM - len(words)), np.uint64)


def stations_of(ours: Collection[Interface], links: Collection[Interface]) -> tuple[bytes, ...]:
    """Return the MAC addresses that frames of these interfaces are ours by, their own first.

    Of what is on top of them, by whatever else is between, only what is up: a standby router has the address of the one
    that is not. A tunnel that is bound to one of them (GRE, IPIP, SIT) has no MAC address: no frame is to it.
    """
    found = {link.ifindex: link for link in ours}
    others = {link.ifindex: link for link in links if link.is_up and link.mac}
    while more := {number: link for number, link in others.items() if number not in found and _is_on(link, found)}:
        found |= more
    return tuple(dict.fromkeys(link.mac for link in found.values()))


def _is_on(link: Interface, lower: dict[int, Interface]) -> bool:
    """Tell whether a device is on top of one of others: of a lower one of its own, or as the master of ports."""
    return link.lower_ifindex in lower or any(port.master_ifindex == link.ifindex for port in lower.values())


class Stations:
    """Keeps packets compared with the addresses that there are: `write` is told of words, `tell` of addresses."""

    def __init__(
        self, write: Callable[[npt.NDArray[np.uint64]], None], tell: Callable[[frozenset[bytes]], None]
    ) -> None:
        self._write = write
        self._tell = tell
        self._known: tuple[bytes, ...] | None = None

    def follow(self, addresses: tuple[bytes, ...]) -> None:
        """Make these the addresses (`stations_of`), and say so where they cannot be compared."""
        if addresses == self._known:
            return
        words = words_of(addresses) if all(addresses) else words_of(())
        self._write(words)
        self._tell(frozenset(addresses) if words[0] else frozenset())
        self._known = addresses  # and not before: what fails is tried again with the next call
        if addresses and not words[0]:
            why = f"{len(addresses)} of them, and room for {_ROOM}" if all(addresses) else "an interface has none"
            log.warning("frames are not compared with our MAC addresses (%s): those for other machines are served", why)
