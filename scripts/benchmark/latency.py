"""`latency` and `latency-reverse`: how long one event takes while a hundred a second come.

From the commit of a row to its event at a consumer of the stream, and from the publish of a message
to the commit of its row in the inbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from statistics import quantiles
from typing import Final

import msgspec

from scripts.benchmark.backends.nats import message, nats_source
from scripts.benchmark.bare_nats import connected
from scripts.benchmark.inbox import Inbox
from scripts.benchmark.orders import COLUMNS, VALUES, make_table
from scripts.benchmark.row import Row, Target
from scripts.benchmark.surroundings import STREAM, Surroundings, surroundings

EVENTS_PER_S: Final = 100
TARGETS_MS: Final = {"p50": 10.0, "p95": 25.0, "p99": 50.0}

_WARM_UP_EVENTS: Final = 50
_ARRIVAL_TIMEOUT_S: Final = 10.0
_INBOX: Final = "arrived"


class _Order(msgspec.Struct, frozen=True):
    id: int


class _Envelope(msgspec.Struct, frozen=True):
    payload: _Order


async def latency(*, seconds: float, say: Callable[[str], None]) -> Row:
    """Commit single rows at a steady pace for so long, and see when a consumer has each.

    A commit's time is PostgreSQL's own, taken before the commit is durable; an arrival's is that
    of the bytes in this process.
    """
    async with surroundings() as around:
        await make_table(around.postgres, "orders")
        await around.postgres.execute("select pgtrickle.enable_outbox('orders')")
        await around.fresh_stream()
        await around.set_pipeline("orders-to-jetstream", "orders")
        async with around.relay():
            committed, arrived, copies = await _observe(around, round(seconds * EVENTS_PER_S))
    return _row("latency", "commit to consumer", committed, arrived, copies, say)


async def latency_reverse(*, seconds: float, say: Callable[[str], None]) -> Row:
    """Publish single messages at a steady pace for so long, and see when the inbox has each.

    A publish's time is that before it is sent; an arrival's is the commit timestamp of its row,
    which PostgreSQL takes before the commit is durable.
    """
    async with surroundings() as around:
        await around.fresh_stream()
        await around.reverse("stream-to-inbox", _INBOX, nats_source(around))
        async with around.relay():
            published = await _publish(around, round(seconds * EVENTS_PER_S) + _WARM_UP_EVENTS)
            await _until_in_inbox(around, len(published))
        rows = await around.postgres.fetch(
            "select (payload ->> 'id')::int as id,"
            " extract(epoch from pg_xact_commit_timestamp(xmin))::float8 as at"
            f" from pgtrickle.{_INBOX}"
        )
    arrived = {row["id"]: row["at"] for row in rows}
    copies = len(rows) - len(arrived)
    return _row("latency-reverse", "publish to inbox commit", published, arrived, copies, say)


def _row(
    name: str,
    way: str,
    sent: Mapping[int, float],
    arrived: Mapping[int, float],
    copies: int,
    say: Callable[[str], None],
) -> Row:
    """The row of these times. The first events are left out: they find cold caches."""
    delays = [
        1000 * (arrived[order] - at)
        for order, at in sorted(sent.items())[_WARM_UP_EVENTS:]
        if order in arrived
    ]
    cuts = quantiles(delays, n=100, method="inclusive")
    figures = {
        "p50_ms": cuts[49],
        "p95_ms": cuts[94],
        "p99_ms": cuts[98],
        "max_ms": max(delays),
        "copies": float(copies),
    }
    say(f"{name}: p50 {cuts[49]:.1f} ms, p95 {cuts[94]:.1f} ms, p99 {cuts[98]:.1f} ms")
    return Row(
        name=name,
        title=f"{way} at {EVENTS_PER_S} events a second",
        targets=[
            Target(figure=part, value=figures[f"{part}_ms"], bound="below", limit=limit, unit="ms")
            for part, limit in TARGETS_MS.items()
        ],
        figures=figures,
        runs=[figures],
        counted={"sent": len(sent), "received": len(sent.keys() & arrived.keys())},
    )


async def _publish(around: Surroundings, messages: int) -> dict[int, float]:
    """When each was published; a message is sent whether or not the last was acknowledged."""
    published: dict[int, float] = {}
    due = time.perf_counter()
    async with connected(around.servers.nats.url, around.servers.nats.token) as publisher:
        for number in range(messages):
            published[number] = time.time()
            publisher.publish(message(number))
            due += 1 / EVENTS_PER_S
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return published


async def _until_in_inbox(around: Surroundings, messages: int) -> None:
    """Wait until the inbox holds so many; what is missing after a while shows in the row."""
    with contextlib.suppress(TimeoutError):
        await Inbox(around.postgres, f"pgtrickle.{_INBOX}").until_holding(
            messages, _ARRIVAL_TIMEOUT_S
        )


async def _observe(
    around: Surroundings, events: int
) -> tuple[dict[int, float], dict[int, float], int]:
    """When each order was committed, when it arrived first, and how many arrived again."""
    total = events + _WARM_UP_EVENTS
    arrived: dict[int, float] = {}
    everything = asyncio.Event()
    copies = 0
    decode = msgspec.json.Decoder(_Envelope).decode

    def arrive(_: bytes, __: bytes, ___: bytes, body: bytes) -> None:
        nonlocal copies
        now = time.time()
        order = decode(body).payload.id
        copies += order in arrived
        arrived.setdefault(order, now)
        if len(arrived) == total:
            everything.set()

    async with connected(around.servers.nats.url, around.servers.nats.token) as consumer:
        await consumer.consume(STREAM, arrive)
        await _commit(around, total)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ARRIVAL_TIMEOUT_S):
                await everything.wait()
    rows = await around.postgres.fetch(
        "select id, extract(epoch from pg_xact_commit_timestamp(xmin))::float8 as at from orders"
    )
    return {row["id"]: row["at"] for row in rows}, arrived, copies


async def _commit(around: Surroundings, rows: int) -> None:
    insert = await around.postgres.prepare(f"insert into orders ({COLUMNS}) values ({VALUES})")
    due = time.perf_counter()
    for _ in range(rows):
        await insert.fetch()
        due += 1 / EVENTS_PER_S
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
