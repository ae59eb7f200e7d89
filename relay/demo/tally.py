"""What became of the demo's events, counted at their destinations and not by who sent them."""

from __future__ import annotations

import msgspec

from relay.postgres import Connection, postgres_errors

# Every event that must be in the inbox, joined with what is there by its outbox, id and row, which
# is the event id but for the checksum at its end. Latency is from the commit
# that wrote the event to the commit that made it visible in the inbox, by the server's one clock.
_COUNT = """
with expected as (
    select 'outbox_orders:' || o.id || ':' || n as place, o.xmin as written_in
    from outbox_orders as o
    cross join lateral generate_series(0, o.inserted_count + o.deleted_count - 1) as n
), arrived as (
    select
        i.event_id,
        extract(epoch from
            pg_xact_commit_timestamp(i.xmin) - pg_xact_commit_timestamp(e.written_in)) * 1000 as ms
    from expected as e
    left join order_inbox as i on regexp_replace(i.event_id, ':[0-9a-f]{8}$', '') = e.place
)
select
    count(event_id) as received,
    percentile_cont(array[0.5, 0.95, 0.99]) within group (order by ms)
        filter (where event_id is not null) as latency_ms
from arrived
"""
_ROWS = "select count(*) from order_inbox"


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """In milliseconds."""

    p50: float
    p95: float
    p99: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a demo; encoded as JSON it is what ``--json`` prints.

    ``startup_ms``: from the start of the process to the first event committed in the inbox, None
    where none came. ``written``: events of the changes that the application
    committed, by its own count; an update is two. ``published``: events
    in the stream, by the broker's count. ``received``: of the written ones, those in the inbox.
    ``duplicates``: events that reached the inbox again and were skipped there. ``lost``: written
    and not received. ``latency_ms``: from the commit of the change to the commit in the inbox.
    """

    startup_ms: int | None
    written: int
    published: int
    received: int
    duplicates: int
    lost: int
    latency_ms: Percentiles | None


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """What the inbox has of what was written."""

    received: int
    latency_ms: Percentiles | None


async def inbox_rows(connection: Connection) -> int:
    """How many events are in the inbox, whichever they are."""
    with postgres_errors("counting the inbox"):
        return int(await connection.fetchval(_ROWS))


async def count_arrivals(connection: Connection) -> Arrival:
    """Look for every event of the outbox in the inbox."""
    with postgres_errors("counting what arrived"):
        row = await connection.fetchrow(_COUNT)
    if row is None or row["latency_ms"] is None or row["latency_ms"][0] is None:
        return Arrival(received=0, latency_ms=None)
    p50, p95, p99 = (round(float(value), 3) for value in row["latency_ms"])
    return Arrival(received=row["received"], latency_ms=Percentiles(p50=p50, p95=p95, p99=p99))


async def stored_in_stream(url: str, token: str, stream: str) -> int:
    """How many messages the broker has in the stream."""
    import nats  # only now: the demo says itself which extra is missing

    client = await nats.connect(url, token=token, connect_timeout=5)
    try:
        info = await client.jetstream().stream_info(stream)
        return info.state.messages
    finally:
        await client.close()
