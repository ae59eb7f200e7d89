"""When an outbox source sleeps, and when publishers are asked to wake it.

A notification in every commit serialises commits, so publishers notify only while a relay says
that it sleeps. A source that finds something at every poll needs no notification, and says that it
is awake. One that finds something now and then goes on asking for notifications, since each change
between the two is a write.
"""

from __future__ import annotations

import asyncio
from typing import Final

from relay.catalog import Catalog

ASLEEP_FOR_S: Final = 60
RENEW_BEFORE_S: Final = 20.0
LONGEST_PAUSE_S: Final = 1.0

# A source is busy after so many polls within `BUSY_S` that found something, or after so many in a
# row that filled a batch. Empty polls in between do not count: publishers that notify are so slow
# that the source catches up with them each time.
BUSY_POLLS: Final = 16
BUSY_FULL_POLLS: Final = 3
BUSY_S: Final = 0.1
# A busy source lets a batch gather before it looks again: each poll costs the publishers' server.
GATHER_S: Final = 0.005
# A busy source that finds nothing looks again after so long, so many times, before it sleeps.
LINGER_S: Final = 0.005
LINGER_POLLS: Final = 10


class Wakefulness:
    """The state of one source between busy and asleep.

    ``sleeper`` names the source among those that sleep on this outbox.
    """

    def __init__(
        self, *, catalog: Catalog, outbox_table: str, sleeper: str, poll_interval_s: float
    ) -> None:
        self._catalog = catalog
        self._outbox_table = outbox_table
        self._sleeper = sleeper
        self._poll_interval_s = min(poll_interval_s, LONGEST_PAUSE_S)
        self._asleep_until: float | None = None
        self._finds = 0
        self._full_finds = 0
        self._finding_since = 0.0
        self._empty_polls = 0
        self._is_busy = False
        self._is_behind = False

    @property
    def gather_s(self) -> float:
        """How long to leave new rows alone before the next poll, so that it finds many at once."""
        return GATHER_S if self._is_busy and not self._is_behind else 0.0

    async def found(self, *, is_full: bool) -> None:
        """A poll found something. Raises `Outage`."""
        now = asyncio.get_running_loop().time()
        if now - self._finding_since > BUSY_S:
            self._finds = 0
            self._finding_since = now
        self._finds += 1
        self._is_behind = is_full
        self._full_finds = self._full_finds + 1 if is_full else 0
        self._empty_polls = 0
        if not self._is_busy:
            self._is_busy = self._full_finds >= BUSY_FULL_POLLS or (self._finds >= BUSY_POLLS)
        if self._is_busy and self._asleep_until is not None:
            await self.end()

    async def found_nothing(self) -> float:
        """A poll found nothing: how many seconds to wait for news, 0 to look once more at once.

        Once more, because a transaction that committed just before publishers were asked to notify
        has notified nobody. Raises `Outage`.
        """
        self._full_finds = 0
        self._empty_polls += 1
        if self._is_busy and self._empty_polls <= LINGER_POLLS:
            return LINGER_S
        if self._is_busy:
            self._is_busy = False
            self._empty_polls = 1
        now = asyncio.get_running_loop().time()
        if self._asleep_until is None or now > self._asleep_until - RENEW_BEFORE_S:
            had_asked = self._asleep_until is not None and now < self._asleep_until
            await self._catalog.sleep(self._outbox_table, self._sleeper, ASLEEP_FOR_S)
            self._asleep_until = now + ASLEEP_FOR_S
            if not had_asked:
                return 0.0
        return min(self._poll_interval_s * (1 << min(self._empty_polls - 1, 20)), LONGEST_PAUSE_S)

    async def end(self) -> None:
        """Spare publishers the notification. Raises `Outage`."""
        if self._asleep_until is not None:
            await self._catalog.wake(self._outbox_table, self._sleeper)
            self._asleep_until = None
