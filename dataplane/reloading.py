"""The manifests of a node: read again when files have changed, in force if they are right."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator

from dataplane.in_force import InForce
from dataplane.news import News
from dataplane.settings import Settings
from dataplane.strays import Strays
from dataplane.watch import changes
from lb import manifests
from lb.live import Live, Plan
from lb.model import NodeView
from lb.rows import vips_at
from xdp.errors import ConfigError, Error

_TRY_AGAIN_S = 10.0  # what was refused for a reason that may pass, such as rows that wait for a grace period
_SHARE = 10  # trying again takes at most one part of so many of the time

log = logging.getLogger(__name__)


class Reloading:
    """What the files said last, and what of it runs. Revisions count how often they have been read."""

    def __init__(self, settings: Settings) -> None:
        self.desired = 0
        self.programmed = 0
        self.applied_at_s = time.time()
        self.rejected: Error | None = None  # the manifests that the files say now, if they cannot be applied
        self._settings = settings
        self._manifests = manifests.Reader(settings.files)
        self._files: AsyncIterator[set[str] | None] = changes(())
        self._changed_files: set[str] | None = set()  # since they were read; None: any may have
        self._is_in_step = False  # what was read last is what runs
        self._is_asked = False  # by somebody who wants to know what came of it
        self._is_wanted = asyncio.Event()
        self._try_again_s = _TRY_AGAIN_S

    def watch(self) -> None:
        """From here on, what is written is not missed."""
        self._files = changes(self._settings.files)

    def load(self) -> Live:
        """Read all manifests, and resolve them."""
        settings = self._settings
        self.desired += 1
        found = self._manifests.load()
        view = NodeView(settings.node_name, settings.zone)
        return Live.of(found.services, found.slices, view, settings.allow_external_ips)

    def plan(self, names: set[str], in_force: InForce) -> Plan | None:
        """Read the files that have changed, and resolve what they change; return None if all have to be read."""
        found = self._manifests.reload(names)
        if found is None or not in_force.here.has_timeouts(filter(None, found.services.values())):
            return None
        self.desired += 1
        here = in_force.here
        plan = in_force.live.plan(found, here)
        addresses = here.node_port_addresses
        # Where VIPs of the node's own addresses come or go, node ports of Services that have not changed go or come.
        return plan if vips_at(addresses, plan.before) == vips_at(addresses, plan.after) else None

    def has_applied(self) -> None:
        """Note that what was read last is in force."""
        self._is_in_step, self.rejected, self.applied_at_s = True, None, time.time()
        self.programmed = self.desired

    def reload_all(self) -> None:
        """Have all manifests read again, whichever have changed."""
        self._changed_files = None
        self._is_wanted.set()

    def reload_as_asked(self) -> None:
        """Have all manifests read again, and say so even if nothing has changed."""
        self._is_asked = True
        self.reload_all()

    async def follow_files(self) -> None:
        """Have files read again as they change."""
        try:
            async for names in self._files:
                if names is None or self._changed_files is None:
                    self._changed_files = None
                else:
                    self._changed_files |= names
                self._is_wanted.set()
        finally:
            self.watch()
            self.reload_all()

    @property
    def may_pass(self) -> bool:
        """Return whether what was rejected is right: so it is tried again, though no file changes."""
        return self.rejected is not None and not isinstance(self.rejected, ConfigError)

    async def _until_wanted(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._try_again_s if self.may_pass else None):
                await self._is_wanted.wait()
        self._is_wanted.clear()

    async def run(self, in_force: InForce, strays: Strays) -> None:
        """Read the manifests again when asked to, one time after the other, and apply them if they are right.

        If they are not, nothing changes and `status` says why. Reading takes seconds when there are many: in a thread.
        """
        news = News(in_force.live.services, in_force.live.endpoints)
        while True:
            await self._until_wanted()
            is_asked, self._is_asked = self._is_asked, False
            began_s = time.monotonic()
            names, self._changed_files = self._changed_files, set()
            is_in_step, self._is_in_step = self._is_in_step, False
            try:
                plan = None
                if names is not None and is_in_step:
                    with _whatever_fails_is_wrong():
                        plan = await asyncio.to_thread(self.plan, names, in_force)
                if plan is not None:
                    await asyncio.to_thread(strays.end_succeeded, plan.before, plan.after)
                if plan is not None and plan.here == in_force.here:
                    change = in_force.apply_plan(plan)
                else:
                    with _whatever_fails_is_wrong():
                        live = await asyncio.to_thread(self.load)
                    await asyncio.to_thread(strays.end_succeeded, in_force.snapshot.ports, live.snapshot().ports)
                    change = in_force.apply(live)
                if self.rejected is not None:
                    log.info("manifests are right again, and applied")
                if any(change):
                    news.applied(in_force.live.services, in_force.live.endpoints)
                elif is_asked:
                    log.info("manifests read again as asked: nothing has changed")
                self.has_applied()
            except Error as error:
                if not self.may_pass or str(error) != str(self.rejected):  # once, however often it is tried
                    kind = "manifests" if isinstance(error, ConfigError) else "configuration"
                    trace = error if log.isEnabledFor(logging.DEBUG) else None
                    log.error("%s not applied, what ran before goes on:\n%s", kind, error, exc_info=trace)
                self.rejected = error
                self._try_again_s = max(_TRY_AGAIN_S, _SHARE * (time.monotonic() - began_s))
            except Exception:
                self.reload_all()
                raise


@contextlib.contextmanager
def _whatever_fails_is_wrong() -> Iterator[None]:
    """Make an Error of what should not happen while manifests are read: as they are, they would fail again at once."""
    try:
        yield
    except Error:
        raise
    except Exception as error:
        raise ConfigError(f"internal error: {type(error).__name__}: {error}; please report it") from error
