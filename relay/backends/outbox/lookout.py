"""One question a second for all outboxes of a process whose readers have nothing to do.

Publishers notify while a reader sleeps; a transaction that wrote before the reader fell asleep and
commits afterwards does not. So somebody has to look, at least once a second, and a question for
each of hundreds of outboxes costs more than all else that an idle relay does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final
from weakref import WeakKeyDictionary

from relay.errors import RelayError
from relay.postgres import Database

INTERVAL_S: Final = 1.0

# The driver prepares a statement once where its text has less than 15 kB; a name has 63 bytes.
_OUTBOXES_A_QUESTION: Final = 64
_LOOKOUTS: Final[WeakKeyDictionary[Database, Lookout]] = WeakKeyDictionary()


class Lookout:
    """Wakes readers of outboxes that have a row above their position."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._idle: dict[Callable[[], None], tuple[str, int]] = {}
        self._task: asyncio.Task[None] | None = None

    @staticmethod
    def of(database: Database) -> Lookout:
        """The one of this process for its database."""
        return _LOOKOUTS.setdefault(database, Lookout(database))

    @contextlib.contextmanager
    def watching(self, relation: str, position: int, wake: Callable[[], None]) -> Iterator[None]:
        """Call ``wake`` when the outbox has a row above the position, or can't be looked at.

        Within a second or so of the row's commit, while the block lasts.
        """
        self._idle[wake] = (relation, position)
        if self._task is None:
            self._task = asyncio.create_task(self._look_for_ever())
        try:
            yield
        finally:
            del self._idle[wake]
            if not self._idle:
                self._task.cancel()
                self._task = None

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            # In a steady order, so that the same statements serve again.
            idle = iter(sorted(self._idle.items(), key=lambda item: item[1]))
            while some := list(islice(idle, _OUTBOXES_A_QUESTION)):
                await self._look(some)

    async def _look(self, idle: list[tuple[Callable[[], None], tuple[str, int]]]) -> None:
        question = " union all ".join(
            f"select {number} as number"
            f" where exists (select from {relation} as o where o.id > ($1::bigint[])[{number}])"
            for number, (_, (relation, _)) in enumerate(idle, 1)
        )
        try:
            rows = await self._database.fetch(
                "looking at idle outboxes", question, [position for _, (_, position) in idle]
            )
            found = {row["number"] for row in rows}
        except RelayError:
            # One of them is gone, or the database: each reader finds out which by itself.
            found = set(range(1, len(idle) + 1))
        for number, (wake, _) in enumerate(idle, 1):
            if number in found:
                wake()
