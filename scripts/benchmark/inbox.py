"""An inbox table as the rows look at it: what it holds, since when, and how fast it fills."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from relay.postgres import Connection
from scripts.benchmark.backends import Stretch

FLOOR_BATCH_ROWS: Final = 2_000

_LOOK_S: Final = 0.2
_COLUMNS: Final = {
    "event_id": "text",
    "event_type": "text",
    "source": "text",
    "aggregate_id": "text",
    "payload": "jsonb",
    "headers": "jsonb",
    "trace_id": "text",
}


class Inbox:
    """One inbox table of the shape that `create_inbox` gives it; ``table`` is quoted if need be."""

    def __init__(self, postgres: Connection, table: str) -> None:
        self._postgres = postgres
        self._table = table
        self._columns: Sequence[Sequence[str | None]] = ()

    async def empty(self) -> None:
        """Make it empty, and forget what was read of it."""
        await self._postgres.execute(f"truncate {self._table}")
        self._columns = ()

    async def count(self) -> int:
        """How many rows are committed."""
        return int(await self._postgres.fetchval(f"select count(*) from {self._table}"))

    async def until_holding(self, rows: int, timeout_s: float, *, warm_up: int = 0) -> Stretch:
        """Wait for so many rows, looking seldom: a count reads them all. Raises `TimeoutError`.

        By the table's own clock: from the beginning of the first batch's transaction to that of
        the last one's, in which everything but the last batch was written. ``warm_up``: so many
        rows before them are not counted.
        """
        started = time.perf_counter()
        while (held := await self.count()) < rows:
            if time.perf_counter() > started + timeout_s:
                raise TimeoutError(f"{held} of {rows} rows arrived")
            await asyncio.sleep(_LOOK_S)
        elapsed_s = time.perf_counter() - started
        row = await self._postgres.fetchrow(
            "select extract(epoch from max(received_at) - min(received_at))::float8 as seconds,"
            " count(*) filter (where received_at < last.at) as rows"
            f" from (select received_at from {self._table} order by received_at offset $1) as i,"
            f" (select max(received_at) as at from {self._table}) as last",
            warm_up,
        )
        if row is None or not row["rows"]:
            # A single batch has no other end than the look that found it.
            return Stretch(rows, elapsed_s)
        return Stretch(row["rows"], row["seconds"])

    async def read(self) -> set[str]:
        """Read all rows, and keep them for `floor`; their event ids."""
        names = ", ".join(f"{name}::text" for name in _COLUMNS)
        rows = await self._postgres.fetch(f"select {names} from {self._table} order by received_at")
        self._columns = [[row[name] for row in rows] for name in _COLUMNS]
        return set(self._columns[0])  # type: ignore[arg-type]  # the primary key is never null

    async def floor(self) -> float:
        """Rows a second of bare asyncpg that writes the rows of `read` into the emptied table.

        One statement and one commit for each 2,000 rows, with the clause that skips what is there.
        """
        columns = self._columns
        rows = len(columns[0])
        await self._postgres.execute(f"truncate {self._table}")
        arrays = ", ".join(f"${n}::text[]" for n in range(1, len(_COLUMNS) + 1))
        values = ", ".join(f"{name}::{type_}" for name, type_ in _COLUMNS.items())
        insert = await self._postgres.prepare(
            f"insert into {self._table} ({', '.join(_COLUMNS)}) select {values}"
            f" from unnest({arrays}) as sent ({', '.join(_COLUMNS)})"
            " on conflict (event_id) do nothing"
        )
        started = time.perf_counter()
        for start in range(0, rows, FLOOR_BATCH_ROWS):
            await insert.fetch(*(column[start : start + FLOOR_BATCH_ROWS] for column in columns))
        elapsed_s = time.perf_counter() - started
        if await self.count() != rows:
            raise RuntimeError("the floor did not write every row")
        return rows / elapsed_s
