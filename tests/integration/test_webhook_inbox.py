"""A webhook receiver in front of an inbox: 200 means committed, and a repeat is written once."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
import msgspec
import psycopg
import pytest

from relay.backends.inbox import InboxSink
from relay.backends.webhook import WebhookSource
from relay.catalog import Catalog
from relay.delivery import RetryPolicy
from relay.mapping import compile_reverse
from relay.pipeline import Pipeline
from relay.postgres import Database
from relay.settings import PostgresSettings
from relay.wire import HTTP, encoder
from tests.contract.evidence import complete_message, dedup_keys, numbered
from tests.contract.sink_contract import deliver
from tests.contract.surroundings import backend_context
from tests.contract.webhook_client import PATH, call, sink_of, source_of
from tests.servers.http import OK, HttpServer, Received, Reply
from tests.servers.postgres import Database as ServerDatabase
from tests.unit.in_memory import Heard, KeptLetters

CREATE_TABLE = """
create table public.inbox (
    event_id text primary key,
    event_type text not null,
    aggregate_id text,
    payload jsonb not null,
    arrived bigint generated always as identity
)
"""
WAITERS = """
select count(*) from pg_catalog.pg_locks
where not granted and relation = 'public.inbox'::regclass
"""


class Receiving:
    """A webhook pipeline into an inbox table, running."""

    def __init__(self, dsn: str, addr: str, letters: KeptLetters) -> None:
        self.dsn = dsn
        self.addr = addr
        self.letters = letters

    def rows(self, query: str = "select event_id from public.inbox order by arrived") -> list[str]:
        with psycopg.connect(self.dsn) as connection:
            return [str(row[0]) for row in connection.execute(query.encode())]


@asynccontextmanager
async def receiving(
    dsn: str, *, dedup_key_from: str | None = None, **keys: object
) -> AsyncIterator[Receiving]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(CREATE_TABLE)
    database = Database(PostgresSettings(url=dsn, pool_size=3))
    await database.open()
    source = source_of(**keys)  # type: ignore[arg-type]  # keys of one test each
    context = backend_context(
        database=database,
        catalog=Catalog(database, "default"),
        direction="reverse",
        pipeline="orders-in",
    )
    letters = KeptLetters()
    reshape = compile_reverse(dedup_key_from, None)
    pipeline = Pipeline(
        name="orders-in",
        direction="reverse",
        source=source,
        sink=InboxSink.from_options(
            {"type": "pg-inbox", "inbox_table": "inbox", "schema": "public"}, context
        ),
        transform=lambda messages: list(map(reshape, messages)),
        dead_letters=letters,
        emit=Heard(),
        policy=RetryPolicy(initial_s=0.01, max_s=0.05),
    )
    running = asyncio.create_task(pipeline.run())
    try:
        await until_listening(source)
        yield Receiving(dsn, source.address, letters)
    finally:
        pipeline.stop()
        await running
        await database.aclose()


async def until_listening(source: WebhookSource) -> None:
    async with asyncio.timeout(10):
        while True:
            if await source.is_healthy():
                return
            await asyncio.sleep(0.01)


async def test_a_sender_hears_nothing_before_the_commit_and_then_hears_of_it(
    migrated_database: ServerDatabase,
) -> None:
    async with receiving(migrated_database.dsn) as inbox:
        async with await psycopg.AsyncConnection.connect(migrated_database.dsn) as holder:
            await holder.execute("lock table public.inbox in exclusive mode")
            asking = asyncio.create_task(call(inbox.addr, b'{"a":1}', [(b"webhook-id", b"w")]))
            await until_blocked(migrated_database.dsn)
            # The row is on its way into the table, and the sender knows nothing of it.
            await asyncio.wait([asking], timeout=0.5)
            assert not asking.done()
            await holder.rollback()

        async with asyncio.timeout(10):
            answer = await asking
        assert answer.status == 200
        assert inbox.rows() == ["w"]


async def test_a_sender_who_is_told_503_during_a_blockade_comes_again_and_is_written_once(
    migrated_database: ServerDatabase,
) -> None:
    async with receiving(migrated_database.dsn, answer_timeout_ms=200) as inbox:
        async with await psycopg.AsyncConnection.connect(migrated_database.dsn) as holder:
            await holder.execute("lock table public.inbox in exclusive mode")
            refused = await call(inbox.addr, b'{"a":1}', [(b"webhook-id", b"w")])
            assert refused.status == 503
            await holder.rollback()

        answer = refused
        async with asyncio.timeout(10):
            while answer.status != 200:
                answer = await call(inbox.addr, b'{"a":1}', [(b"webhook-id", b"w")])
        assert inbox.rows() == ["w"]


async def test_repeats_are_written_once_and_what_has_no_name_each_time(
    migrated_database: ServerDatabase,
) -> None:
    async with receiving(migrated_database.dsn) as inbox:
        for _ in range(3):
            await call(inbox.addr, b'{"a":1}', [(b"Idempotency-Key", b"k")])
            await call(inbox.addr, b'[{"a":1},{"a":2}]', [(b"Idempotency-Key", b"many")])
        for _ in range(2):
            await call(inbox.addr, b'{"a":1}')

        rows = inbox.rows()
        assert rows[:3] == ["k", "many:0", "many:1"]
        assert len(rows) == 5


async def test_cloudevents_in_every_mode_are_written_once_under_their_own_identity(
    migrated_database: ServerDatabase,
) -> None:
    event = b'{"specversion":"1.0","id":"%d","source":"/shop","type":"paid","data":{"a":1}}'
    binary = [
        *((b"ce-specversion", b"1.0"), (b"ce-id", b"2"), (b"ce-source", b"/shop")),
        *((b"ce-type", b"paid"), (b"content-type", b"application/json")),
    ]
    kind = (b"content-type", b"application/cloudevents+json")
    many = (b"content-type", b"application/cloudevents-batch+json")
    async with receiving(migrated_database.dsn) as inbox:
        for number in range(2):
            # What a retry may change says nothing about the event.
            retried = (b"Idempotency-Key", b"%d" % number)
            await call(inbox.addr, event % 1, [kind, retried])
            await call(inbox.addr, b'{"a":1}', [*binary, retried])
            await call(inbox.addr, b"[%b,%b]" % (event % 3, event % 4), [many, retried])

        assert inbox.rows() == [f'["/shop","{number}"]' for number in range(1, 5)]
        assert set(inbox.rows("select event_type || payload from public.inbox")) == {'paid{"a": 1}'}


async def test_a_repeated_event_of_stripe_is_written_once_under_its_id_and_type(
    migrated_database: ServerDatabase,
) -> None:
    body = b'{"id":"evt_1","object":"event","type":"charge.succeeded","data":{}}'
    async with receiving(
        migrated_database.dsn, signature="stripe", hmac_secret="whsec_stripe"
    ) as inbox:
        for ago_s in range(2):
            timestamp = int(time.time()) - ago_s
            digest = hmac.new(b"whsec_stripe", b"%d.%b" % (timestamp, body), "sha256").hexdigest()
            signed = (b"Stripe-Signature", f"t={timestamp},v1={digest}".encode())
            assert (await call(inbox.addr, body, [signed])).status == 200

        assert inbox.rows() == ["evt_1"]
        assert inbox.rows("select event_type from public.inbox") == ["charge.succeeded"]


async def test_ids_that_are_not_utf_8_are_kept_apart(migrated_database: ServerDatabase) -> None:
    ids = [b"\xff", b"\xfe", b"\\xff", b"\xc3\x84"]
    async with receiving(migrated_database.dsn) as inbox:
        for id_ in [*ids, *ids]:
            await call(inbox.addr, b'{"a":1}', [(b"Idempotency-Key", id_)])

        assert inbox.rows() == ["\\xff", "\\xfe", "\\x5cxff", "Ä"]


async def test_equal_bodies_are_one_event_where_the_pipeline_says_so(
    migrated_database: ServerDatabase,
) -> None:
    async with receiving(migrated_database.dsn, dedup_key_from="payload:id") as inbox:
        for _ in range(2):
            await call(inbox.addr, b'{"id":"evt_1"}')

        assert inbox.rows() == ["evt_1"]


async def test_what_postgresql_refuses_is_dead_lettered_and_its_neighbours_are_written(
    migrated_database: ServerDatabase,
) -> None:
    async with receiving(migrated_database.dsn) as inbox:
        body = b'[{"a":1},{"a":"\\u0000"},{"a":3}]'

        answer = await call(inbox.addr, body, [(b"Idempotency-Key", b"k")])

        assert answer.status == 200
        assert inbox.rows() == ["k:0", "k:2"]
        assert inbox.letters.keys == ["k:1"]


async def test_from_our_sink_into_the_inbox_each_event_is_written_once(
    migrated_database: ServerDatabase,
) -> None:
    messages = [*numbered(300, keys=7), complete_message()]
    async with receiving(migrated_database.dsn) as inbox:
        for batch_mode in (True, False, True):
            sink = sink_of(f"http://{inbox.addr}{PATH}", batch_mode=batch_mode)
            await sink.connect()
            await deliver(sink, messages)
            await sink.aclose()

        assert sorted(inbox.rows()) == sorted(dedup_keys(messages))
        query = "select event_type from public.inbox where event_id = 'orders:7:0'"
        assert inbox.rows(query) == ["orders.upsert"]


async def until_blocked(dsn: str) -> None:
    """Wait until somebody waits for a lock on the inbox table."""
    async with asyncio.timeout(10), await psycopg.AsyncConnection.connect(dsn) as watcher:
        while True:
            found = await (await watcher.execute(WAITERS)).fetchone()
            if found is not None and found[0]:
                return
            await asyncio.sleep(0.02)


async def cpu_seconds_for(url: str, bodies: Sequence[bytes], headers: dict[str, str]) -> float:
    """What client and server together cost, eight requests at a time, until all are answered 200.

    Both run in this process, so that what else the machine does is left out.
    """
    pending = iter(bodies)
    async with httpx.AsyncClient(trust_env=False) as client:

        async def send() -> None:
            for body in pending:
                response = await client.post(url, content=body, headers=headers)
                assert response.status_code == 200

        started = time.process_time()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(send())
        return time.process_time() - started


def only_reading(request: Received) -> Reply:
    msgspec.json.decode(request.body)
    return OK


@pytest.mark.speed
@pytest.mark.parametrize("in_one, count", [(1, 1000), (500, 50_000)])
async def test_receiving_costs_at_most_twice_what_reading_the_json_costs(
    http_server: HttpServer,
    in_one: int,
    count: int,
) -> None:
    encode = encoder("envelope", HTTP)
    encoded = [encode(message).body for message in numbered(count, keys=100)]
    bodies = [
        b"[%b]" % b",".join(encoded[start : start + in_one]) for start in range(0, count, in_one)
    ]
    headers = {HTTP.format: "envelope"}
    http_server.judge = only_reading
    source = source_of(batch_size=1000)
    await source.connect()

    async def take() -> None:
        while True:
            await source.acknowledge(await source.poll())

    taking = asyncio.create_task(take())
    url = f"http://{source.address}{PATH}"
    floor_s = min([await cpu_seconds_for(http_server.url, bodies, headers) for _ in range(2)])
    ours_s = min([await cpu_seconds_for(url, bodies, headers) for _ in range(2)])
    taking.cancel()
    await asyncio.wait([taking])
    await source.aclose()

    print(f"{in_one} in one: {count / ours_s:,.0f}/s of CPU, floor {count / floor_s:,.0f}/s")
    assert ours_s < 2 * floor_s
