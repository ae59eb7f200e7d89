"""A relay in this process over a real database, with everything that it tells its observers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import asyncpg
import msgspec

from relay.app import Relay
from relay.events import BatchAcknowledged, LagObserved, PipelineState, Polled, StateChanged
from relay.settings import MetricsSettings, PostgresSettings, RelaySettings, Settings
from tests.unit.in_memory import Heard

BOUND_S = 15.0
QUICK = Settings(
    metrics=MetricsSettings(addr="127.0.0.1:0", lag_interval_s=0.05),
    relay=RelaySettings(
        coordinate_interval_s=0.05,
        failed_retry_s=0.1,
        retry_initial_ms=10,
        retry_max_ms=40,
        poll_interval_ms=5,
        shutdown_timeout_s=5.0,
        report_interval_s=0.1,
    ),
)

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@dataclass
class Catalog:
    """The database as its owner: tables, outboxes, pipelines."""

    dsn: str
    connection: Connection

    async def run(self, query: str, *args: object) -> None:
        await self.connection.execute(query, *args)

    async def value(self, query: str, *args: object) -> object:
        found: object = await self.connection.fetchval(query, *args)
        return found

    async def orders(self, arguments: str = "") -> None:
        """A table with an outbox; `arguments` of `enable_outbox`, with a comma in front."""
        await self.run("create table public.orders (id int primary key, note text)")
        await self.run(f"select pgtrickle.enable_outbox('orders'{arguments})")

    async def insert(self, first: int, last: int, note: str = "") -> None:
        """Orders with these ids, each in a transaction of its own."""
        for id_ in range(first, last + 1):
            await self.run("insert into public.orders values ($1, $2)", id_, note)

    async def forward(self, name: str, sink: Mapping[str, object], **keys: object) -> None:
        """A pipeline from the orders to a sink."""
        config = {"source": {"outbox": "orders"}, "sink": sink, **keys}
        await self.run(
            "select pgtrickle.set_relay_outbox($1, $2::text::jsonb)", name, json.dumps(config)
        )

    async def reverse(
        self, name: str, source: Mapping[str, object], inbox: str, **keys: object
    ) -> None:
        """A pipeline from a source into an inbox of this database."""
        config = {"source": source, "sink": {"inbox": inbox}, **keys}
        await self.run(
            "select pgtrickle.set_relay_inbox($1, $2::text::jsonb)", name, json.dumps(config)
        )


class AtWork:
    """A running relay and what it told so far."""

    def __init__(self, relay: Relay, heard: Heard, task: asyncio.Task[bool]) -> None:
        self.relay = relay
        self.heard = heard
        self.task = task

    def polled(self, pipeline: str) -> list[int]:
        """The sizes of the batches so far."""
        return [
            event.messages
            for event in self.heard.of(Polled)
            if event.pipeline == pipeline and event.messages
        ]

    def acknowledged(self, pipeline: str) -> int:
        """How many messages are acknowledged."""
        return sum(
            event.messages
            for event in self.heard.of(BatchAcknowledged)
            if event.pipeline == pipeline
        )

    def states(self, pipeline: str) -> list[PipelineState]:
        return [one.state for one in self.heard.of(StateChanged) if one.pipeline == pipeline]

    def reasons(self, pipeline: str) -> list[str]:
        """Why it failed, each time."""
        return [
            event.reason
            for event in self.heard.of(StateChanged)
            if event.pipeline == pipeline and event.state is PipelineState.FAILED
        ]

    async def until_acknowledged(self, messages: int, *pipelines: str) -> None:
        await self.heard.until(
            lambda: all(self.acknowledged(pipeline) >= messages for pipeline in pipelines)
        )

    async def until_state(self, pipeline: str, state: PipelineState) -> None:
        await self.heard.until(lambda: state in self.states(pipeline))

    async def a_while(self, pipeline: str) -> None:
        """Until its lag was looked at ten times more: what did not happen then will not."""
        seen = self._lags(pipeline)
        await self.heard.until(lambda: self._lags(pipeline) >= seen + 10)

    def _lags(self, pipeline: str) -> int:
        return sum(event.pipeline == pipeline for event in self.heard.of(LagObserved))


@contextlib.asynccontextmanager
async def at_work(
    dsn: str,
    *,
    environment: Mapping[str, str] | None = None,
    relay: Mapping[str, object] | None = None,
    **sections: object,
) -> AsyncIterator[AtWork]:
    """A relay with these settings over quick ones; `relay` changes single keys of its section."""
    settings = msgspec.structs.replace(
        QUICK,
        **{
            "postgres": PostgresSettings(url=dsn, pool_size=6),
            "relay": msgspec.structs.replace(QUICK.relay, **(relay or {})),
            **sections,
        },
    )
    made = Relay(settings, environment or {})
    heard = Heard()
    made.events.subscribe(heard)
    task = asyncio.create_task(made.run())
    task.add_done_callback(lambda _: heard.look_again())
    try:
        yield AtWork(made, heard, task)
    finally:
        made.coordinator.stop()
        async with asyncio.timeout(BOUND_S):
            await task


def lines(path: Path) -> list[dict[str, object]]:
    """The envelopes in a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def to_file(path: Path) -> dict[str, object]:
    """A sink into this file."""
    return {"type": "file", "output": str(path)}
