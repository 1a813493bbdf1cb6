"""Searches in the DHT that outlive who asked: hivemind's leave their own tasks behind when they are cancelled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Searches:
    """Those under way on this loop. ``tasks`` are theirs, for whoever ends the node."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()

    async def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What a search finds. It goes on when the caller is cancelled."""
        search = asyncio.create_task(work)
        self.tasks.add(search)
        search.add_done_callback(self._ended)
        return await asyncio.shield(search)

    async def settle(self, within_s: float) -> None:
        """Wait until all have ended by themselves, no longer than ``within_s``."""
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=within_s)

    def _ended(self, search: asyncio.Task[Any]) -> None:
        self.tasks.discard(search)
        if not search.cancelled() and (error := search.exception()) is not None:
            log.debug("a search failed: %s", error)
