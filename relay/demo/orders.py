"""The demo's application: a shop that writes orders and knows nothing of the relay."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque

import asyncpg

from relay.postgres import Connection, postgres_errors

_SCHEMA = """
create table orders (
    id bigint generated always as identity primary key,
    customer text not null,
    total numeric(10, 2) not null,
    status text not null default 'new',
    placed_at timestamptz not null default now()
)
"""
_INSERT = """
insert into orders (customer, total)
select 'customer ' || n % 97, 5 + n % 400 + 0.95
from generate_series($1::bigint, $1::bigint + $2::bigint - 1) as n
returning id
"""
_UPDATE = "update orders set status = 'shipped' where id = any ($1::bigint[])"
_DELETE = "delete from orders where id = any ($1::bigint[])"

# What an order goes through, as the shop's ten next statements.
_ROUND = ("insert", "update", "insert", "update", "insert", "insert", "update", "delete")
_MOST_STATEMENTS_PER_S = 200
_REMEMBERED = 10_000


class Shop:
    """Writes orders at a steady rate, each statement a transaction; counts its own rows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._new: deque[int] = deque(maxlen=_REMEMBERED)
        self._shipped: deque[int] = deque(maxlen=_REMEMBERED)
        self.inserted = 0
        self.updated = 0
        self.deleted = 0

    @property
    def events(self) -> int:
        """What the outbox must have: an update is the old row deleted and the new one inserted."""
        return self.inserted + 2 * self.updated + self.deleted

    async def open(self) -> None:
        """Make the table."""
        with postgres_errors("making the orders table"):
            await self._connection.execute(_SCHEMA)

    async def write(self, rate: float, closing: asyncio.Event) -> None:
        """Write ``rate`` rows a second until closing time; never stops half-way in a statement."""
        rows = max(1, round(rate / _MOST_STATEMENTS_PER_S))
        interval_s = rows / rate
        due_s = time.monotonic()
        turn = 0
        while not closing.is_set():
            with postgres_errors("writing orders"):
                await self._do(_ROUND[turn % len(_ROUND)], rows)
            turn += 1
            # A machine that can't keep up writes as fast as it can and does not catch up later.
            due_s = max(due_s + interval_s, time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due_s - time.monotonic()):
                    await closing.wait()

    async def _do(self, what: str, rows: int) -> None:
        if what == "update" and self._new:
            ids = _taken(self._new, rows)
            self.updated += _affected(await self._connection.execute(_UPDATE, ids))
            self._shipped.extend(ids)
        elif what == "delete" and self._shipped:
            ids = _taken(self._shipped, rows)
            self.deleted += _affected(await self._connection.execute(_DELETE, ids))
        else:
            written: list[asyncpg.Record] = await self._connection.fetch(
                _INSERT, self.inserted, rows
            )
            self.inserted += len(written)
            self._new.extend(row["id"] for row in written)


def _taken(ids: deque[int], rows: int) -> list[int]:
    return [ids.popleft() for _ in range(min(rows, len(ids)))]


def _affected(status: str) -> int:
    """The row count in a command tag, as in ``UPDATE 3``."""
    return int(status.rpartition(" ")[2])
