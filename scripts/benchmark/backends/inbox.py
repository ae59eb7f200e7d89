"""The inbox of another database, on the same server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping

from scripts.benchmark.backends import Destination, Stretch
from scripts.benchmark.inbox import Inbox
from scripts.benchmark.surroundings import Surroundings, migrated_database

_URL = "RELAY_BENCH_INBOX_URL"
_INBOX = "arrived"


class ToInbox(Destination):
    """`to-inbox`."""

    title = "the inbox of another database"

    def __init__(self, url: str, inbox: Inbox) -> None:
        self._url = url
        self._inbox = inbox

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, around: Surroundings) -> AsyncIterator[Destination]:
        """Part of the protocol."""
        async with migrated_database(around.servers) as (url, postgres):
            await postgres.execute("select pgtrickle.create_inbox($1)", _INBOX)
            yield cls(url, Inbox(postgres, f"pgtrickle.{_INBOX}"))

    @property
    def environment(self) -> Mapping[str, str]:
        return {_URL: self._url}

    def sink(self) -> Mapping[str, object]:
        return {"type": "pg-inbox", "url": f"${{env:{_URL}}}", "inbox": _INBOX}

    async def empty(self) -> None:
        await self._inbox.empty()

    async def until_holding(self, messages: int, timeout_s: float) -> Stretch:
        return await self._inbox.until_holding(messages, timeout_s)

    async def read(self) -> set[str]:
        return await self._inbox.read()

    async def floor(self) -> float:
        return await self._inbox.floor()
