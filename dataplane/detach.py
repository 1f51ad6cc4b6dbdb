"""Removing what a node has left: programs on their pinned links, a filter, neighbours being kept, and the tables."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection, Sequence

from dataplane.control import Lock, RunningError
from dataplane.settings import Settings, interface_of
from xdp.errors import Error, UsageError


def detach(settings: Settings, interfaces: Sequence[str] = ()) -> list[str]:
    """Take the node's programs off `interfaces` (all, if none are named) and return what was removed, in words.

    The tables go with the last link. Error: the node runs, or works in another network namespace; UsageError: the node
    has no link to one of `interfaces` although it has others.
    """
    try:
        with Lock(settings):
            return _detach(settings, interfaces)
    except RunningError as error:
        holder = str(error).partition(";")[0]
        raise Error(f"{holder}; stop it first, or let it end with --on-exit detach") from None


def _detach(settings: Settings, interfaces: Sequence[str]) -> list[str]:
    from dataplane import namespace, reserved
    from dataplane.offloads import Offloads
    from xdp import loader, removing
    from xdp.writing import remove

    namespace.need_the_same(settings, "detach")
    pins = {interface_of(pin): pin for pin in settings.link_pins()}
    removed = [] if interfaces and pins else remove_raw(settings)
    if unknown := [name for name in interfaces if name not in pins]:
        if pins:
            raise UsageError(f"{unknown[0]}: node {settings.name!r} has no program there, only on {', '.join(pins)}")
        interfaces = ()
    for name, pin in pins.items():
        if not interfaces or name in interfaces:
            link = loader.link_at(pin)
            loader.detach(pin)
            loader.detach(settings.egress_pin(name))
            if link is not None and link.ifindex:  # else the interface has gone, and its neighbours with it
                _let_neighbours_go(link.ifindex)
            removed.append(f"{name}: the programs and their links")
    Offloads(settings.offloads_path).restore_others(_passed({interface_of(pin) for pin in settings.link_pins()}))
    if settings.pins.is_dir() and not settings.link_pins():
        if settings.hook_pins():
            removed.append("clients on this node: the programs and their links")
        for pin in (*settings.egress_pins(), *settings.hook_pins()):  # of interfaces that have gone; of a cgroup
            loader.detach(pin)
        removing.maps(settings.pins)
        if settings.pins.is_dir():  # programs of a compiler that was interrupted
            for pin in settings.pins.iterdir():
                pin.unlink()
            settings.pins.rmdir()
        removed.append(f"{settings.pins}: the tables")
    if not settings.link_pins():
        # Of offloads, those of interfaces that have gone.
        for path in (settings.offloads_path, settings.administered_path, settings.whereabouts_path):
            remove(path)
        reserved.give_back(settings.reserved_path)
        remove(settings.namespace_path)
    with contextlib.suppress(OSError):
        settings.socket_path.unlink()  # of a daemon that was killed
    return removed


def remove_raw(settings: Settings) -> list[str]:
    """Remove what engine `raw` has left of a node that does not run; return what, in words."""
    if not settings.filter_record.exists() and not settings.table_folder.exists():
        return []
    from dataplane import ingress
    from xdp import removing

    removed = []
    for name in ingress.remove(settings.filter_record) or ():
        with contextlib.suppress(OSError):  # it has gone, and its neighbours with it
            _let_neighbours_go(socket.if_nametoindex(name))
        removed.append(f"{name}: the ingress filter")
    if removing.files(settings.table_folder):
        removed.append(f"{settings.table_folder}: the tables")
    return removed


def _passed(names: Collection[str]) -> set[int]:
    """Return the numbers of interfaces, and of what is beneath them."""
    from dataplane.netdev import NetDev

    if not names:
        return set()
    with NetDev() as netdev:
        links = [link for link in netdev.interfaces() if link.name in names]
    return {number for link in links for number in (*link.beneath, link.ifindex)}


def _let_neighbours_go(ifindex: int) -> None:
    """Give the neighbour entries that the node had asked for on an interface back to the kernel."""
    from dataplane.mirror import left_with_the_kernel
    from dataplane.netdev import NetDev
    from xdp import links

    if links.xdp_state(ifindex) is not None:
        return  # one of the same number in another namespace was meant: here, a node is at work
    with NetDev() as netdev, contextlib.suppress(OSError):
        netdev.let_go(left_with_the_kernel(netdev.neighbours(), [ifindex]))
