"""The inbox sink against PostgreSQL: rights, refused rows, adopted tables, another database."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

import msgspec
import psycopg
import pytest

from relay.backends.inbox import InboxSink
from relay.catalog import Catalog
from relay.contracts import PublishResult
from relay.errors import (
    AuthenticationRefused,
    CatalogMissing,
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    MessageRejected,
    Outage,
)
from relay.events import Direction
from relay.message import RelayMessage
from relay.postgres import Database
from relay.settings import PostgresSettings
from tests.contract.evidence import numbered
from tests.contract.surroundings import backend_context
from tests.servers.postgres import Database as ServerDatabase
from tests.servers.postgres import PostgresServer

NUL = b'{"a":"\\u0000"}'


@pytest.fixture
def relay_dsn(migrated_database: ServerDatabase) -> Iterator[str]:
    """A login that has nothing but membership in `pgtrickle_relay`."""
    role = f"{migrated_database.name}_login"
    run(migrated_database.dsn, f"create role {role} login in role pgtrickle_relay")
    yield migrated_database.server.database_dsn(migrated_database.name, user=role)
    run(migrated_database.server.dsn, f"drop role {role}")


def run(dsn: str, *statements: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def rows(dsn: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(query.encode()).fetchall()


@contextlib.asynccontextmanager
async def connected(
    dsn: str, direction: Direction = "reverse", **options: object
) -> AsyncIterator[InboxSink]:
    """A sink into the relay's own database, which is the one of ``dsn``."""
    database = Database(PostgresSettings(url=dsn, pool_size=2))
    await database.open()
    try:
        sink = InboxSink.from_options(
            {"type": "pg-inbox", **options},
            backend_context(
                database=database,
                catalog=Catalog(database, "default"),
                direction=direction,
                pipeline="orders-in",
            ),
        )
        await sink.connect()
        yield sink
        await sink.aclose()
    finally:
        await database.aclose()


def with_payloads(payloads: Mapping[int, bytes], count: int) -> list[RelayMessage]:
    return [
        msgspec.structs.replace(message, payload=payloads.get(number, message.payload))
        for number, message in enumerate(numbered(count))
    ]


def failed(result: PublishResult) -> list[int]:
    assert all(isinstance(failure.error, MessageRejected) for failure in result.failures)
    return [failure.index for failure in result.failures]


def event_ids(dsn: str, table: str) -> list[object]:
    return [row[0] for row in rows(dsn, f"select event_id from {table} order by ctid")]


def numbered_ids(numbers: Sequence[int]) -> list[object]:
    return [f"m:{number}" for number in numbers]


@pytest.mark.shows("sink:pg-inbox.inbox")
async def test_a_login_with_nothing_but_membership_writes_an_inbox_of_the_catalog(
    migrated_database: ServerDatabase, relay_dsn: str
) -> None:
    run(migrated_database.dsn, "select pgtrickle.create_inbox('order_inbox')")

    async with connected(relay_dsn, inbox="order_inbox") as sink:
        first = await sink.publish(numbered(3))
        again = await sink.publish(numbered(5))

    assert (first.duplicates, again.duplicates) == (0, 3)
    assert event_ids(migrated_database.dsn, "pgtrickle.order_inbox") == numbered_ids(range(5))
    assert rows(
        migrated_database.dsn,
        "select event_type, source, aggregate_id, payload, headers->>'op', trace_id"
        " from pgtrickle.order_inbox where event_id = 'm:4'",
    ) == [("orders.insert", "orders", "k0", {"number": 4}, "insert", None)]


async def test_insert_and_select_on_the_event_id_are_all_the_rights_it_takes(
    database: ServerDatabase,
) -> None:
    role = f"{database.name}_writer"
    run(
        database.dsn,
        "create table public.inbox (event_id text primary key, payload jsonb, note text)",
        f"create role {role} login",
        f"grant insert (event_id, payload), select (event_id) on public.inbox to {role}",
    )
    try:
        dsn = database.server.database_dsn(database.name, user=role)
        async with connected(dsn, inbox_table="inbox", schema="public") as sink:
            result = await sink.publish(with_payloads({1: NUL}, 3))

        assert failed(result) == [1]
        assert event_ids(database.dsn, "public.inbox") == numbered_ids([0, 2])
    finally:
        run(database.dsn, f"drop owned by {role}", f"drop role {role}")


async def test_missing_rights_are_named_with_the_grant(database: ServerDatabase) -> None:
    role = f"{database.name}_nobody"
    run(
        database.dsn,
        "create table public.inbox (event_id text primary key, payload jsonb)",
        f"create role {role} login",
    )
    try:
        dsn = database.server.database_dsn(database.name, user=role)
        with pytest.raises(
            AuthenticationRefused, match=r"grant insert \(event_id, payload\), select \(event_id\)"
        ):
            async with connected(dsn, inbox_table="inbox", schema="public"):
                pass
    finally:
        run(database.dsn, f"drop role {role}")


async def test_rights_taken_away_while_running_fail_the_whole_at_once(
    migrated_database: ServerDatabase, relay_dsn: str
) -> None:
    run(migrated_database.dsn, "select pgtrickle.create_inbox('inbox')")

    async with connected(relay_dsn, inbox="inbox") as sink:
        run(
            migrated_database.dsn,
            "revoke execute on function pgtrickle.receive_inbox from pgtrickle_relay",
        )
        with pytest.raises(AuthenticationRefused):
            await sink.publish(numbered(10))


async def test_duplicates_within_one_batch_are_counted(migrated_database: ServerDatabase) -> None:
    run(migrated_database.dsn, "select pgtrickle.create_inbox('inbox')")

    async with connected(migrated_database.dsn, inbox="inbox") as sink:
        result = await sink.publish([*numbered(3), *numbered(3), *with_payloads({0: NUL}, 1)])

    assert failed(result) == [6]
    assert result.duplicates == 3


@pytest.mark.parametrize(
    "statement,bad",
    [
        ("", RelayMessage(dedup_key="bad", payload=NUL)),
        ("", RelayMessage(dedup_key="bad", payload=b"{")),
        ("", RelayMessage(dedup_key="bad", payload=b"[" * 100_000)),
        ("", RelayMessage(dedup_key="".join(map(chr, range(300, 4300))), payload=b"{}")),
        ("", RelayMessage(dedup_key="b\x00d", payload=b"{}")),
        ("", RelayMessage(dedup_key="b\ud800d", payload=b"{}")),
        (
            "add check (payload->>'number' is not null)",
            RelayMessage(dedup_key="bad", payload=b"{}"),
        ),
        (
            "add foreign key (trace_id) references public.trace",
            RelayMessage(dedup_key="bad", payload=b"{}", headers={"trace_id": "x"}),
        ),
        (
            "add foreign key (trace_id) references public.trace deferrable initially deferred",
            RelayMessage(dedup_key="bad", payload=b"{}", headers={"trace_id": "x"}),
        ),
    ],
    ids=[
        "NUL",
        "no JSON",
        "deep",
        "long key",
        "NUL in the key",
        "lone surrogate",
        "check",
        "foreign key",
        "deferred foreign key",
    ],
)
async def test_a_refused_row_costs_only_itself(
    migrated_database: ServerDatabase, statement: str, bad: RelayMessage
) -> None:
    run(
        migrated_database.dsn,
        "select pgtrickle.create_inbox('inbox')",
        "create table public.trace (id text primary key)",
    )
    if statement:
        run(migrated_database.dsn, f"alter table pgtrickle.inbox {statement}")
    good = numbered(20, prefix="good")

    async with connected(migrated_database.dsn, inbox="inbox") as sink:
        result = await sink.publish([*good[:13], bad, *good[13:]])
        repeated = await sink.publish(good)

    assert failed(result) == [13]
    assert repeated.duplicates == 20
    assert event_ids(migrated_database.dsn, "pgtrickle.inbox") == [m.dedup_key for m in good]


async def test_three_refused_rows_of_two_thousand_are_found_quickly(
    migrated_database: ServerDatabase,
) -> None:
    run(migrated_database.dsn, "select pgtrickle.create_inbox('inbox')")
    messages = with_payloads({7: NUL, 999: NUL, 1999: NUL}, 2000)

    async with connected(migrated_database.dsn, inbox="inbox") as sink:
        await sink.publish(numbered(10, prefix="warm"))
        started = time.perf_counter()
        result = await sink.publish(messages)
        took_s = time.perf_counter() - started

    assert failed(result) == [7, 999, 1999]
    assert result.duplicates == 0
    assert len(event_ids(migrated_database.dsn, "pgtrickle.inbox")) == 2007
    # Some 60 statements; one per row would be 4,000. Generous, for slow machines.
    assert took_s < 10.0


async def test_every_row_refused_is_a_failure_of_each_and_nothing_is_written(
    migrated_database: ServerDatabase,
) -> None:
    run(migrated_database.dsn, "select pgtrickle.create_inbox('inbox')")

    async with connected(migrated_database.dsn, inbox="inbox") as sink:
        result = await sink.publish(with_payloads(dict.fromkeys(range(300), NUL), 300))

    assert failed(result) == list(range(300))
    assert not event_ids(migrated_database.dsn, "pgtrickle.inbox")


async def test_rows_keep_their_order_around_refused_ones(migrated_database: ServerDatabase) -> None:
    run(migrated_database.dsn, "select pgtrickle.create_inbox('inbox')")
    bad = {3: NUL, 4: NUL, 50: NUL}

    async with connected(migrated_database.dsn, inbox="inbox") as sink:
        assert failed(await sink.publish(with_payloads(bad, 100))) == list(bad)

    assert event_ids(migrated_database.dsn, "pgtrickle.inbox") == numbered_ids(
        [number for number in range(100) if number not in bad]
    )


@pytest.mark.parametrize("change", ["drop table {0} cascade", "alter table {0} rename to gone"])
async def test_a_table_that_goes_away_while_running_is_a_missing_destination(
    migrated_database: ServerDatabase, change: str
) -> None:
    run(migrated_database.dsn, "select pgtrickle.create_inbox('inbox')")

    async with connected(migrated_database.dsn, inbox="inbox") as sink:
        await sink.publish(numbered(1))
        run(migrated_database.dsn, change.format("pgtrickle.inbox"))
        with pytest.raises(DestinationMissing):
            await sink.publish(numbered(3))


async def test_a_column_that_goes_away_while_running_is_left_out_after_the_next_connect(
    database: ServerDatabase,
) -> None:
    run(database.dsn, "create table inbox (event_id text unique, payload text, source text)")

    async with connected(database.dsn, inbox_table="inbox", schema="public") as sink:
        run(database.dsn, "alter table inbox drop column source")
        with pytest.raises(ConfigurationError, match="source"):
            await sink.publish(numbered(3))
        await sink.connect()
        await sink.publish(numbered(3))

    assert len(event_ids(database.dsn, "inbox")) == 3


@pytest.mark.parametrize(
    "state,kind",
    [
        ("40001", ErrorKind.OUTAGE),
        ("40P01", ErrorKind.OUTAGE),
        ("53100", ErrorKind.OUTAGE),
        ("25006", ErrorKind.OUTAGE),
    ],
)
async def test_what_is_wrong_with_the_whole_is_said_once_and_not_searched_for(
    database: ServerDatabase, state: str, kind: ErrorKind
) -> None:
    run(
        database.dsn,
        "create table inbox (event_id text unique, payload jsonb)",
        "create sequence tries",
        "create function refuse() returns trigger language plpgsql as $$ begin"
        " perform nextval('public.tries');"
        f" raise exception using errcode = '{state}', message = 'on purpose'; end $$",
        "create trigger refuse before insert on inbox for each row execute function refuse()",
    )

    async with connected(database.dsn, inbox_table="inbox", schema="public") as sink:
        with pytest.raises((Outage, ConfigurationError)) as raised:
            await sink.publish(numbered(100))

    assert raised.value.kind is kind
    assert rows(database.dsn, "select last_value from tries") == [(1,)]


ROW_TRIGGER = (
    "create function public.look() returns trigger language plpgsql as $$ begin {0}; return new;"
    " end $$",
    "create trigger look before insert on public.inbox for each row execute function public.look()",
)
IF_BAD = "if new.event_id like 'bad%' then {0}; end if"


@contextlib.contextmanager
def inbox_of_a_writer(server_database: ServerDatabase, *statements: str) -> Iterator[str]:
    """`public.inbox`, altered so, and a login that may write to it and do nothing else."""
    role = f"{server_database.name}_writer"
    run(
        server_database.dsn,
        "create table public.inbox (event_id text primary key, payload jsonb)",
        "create table public.secret (id text)",
        f"create role {role} login",
        f"grant insert, select (event_id) on public.inbox to {role}",
        *statements,
    )
    try:
        yield server_database.server.database_dsn(server_database.name, user=role)
    finally:
        run(server_database.dsn, f"drop owned by {role}", f"drop role {role}")


@pytest.mark.parametrize(
    "statements",
    [
        (
            "alter table public.inbox enable row level security",
            "create policy p on public.inbox for insert with check (event_id like 'm:%')",
            "create policy r on public.inbox for select using (true)",
        ),
        [
            text.format(IF_BAD.format("insert into public.secret values ('x')"))
            for text in ROW_TRIGGER
        ],
        [text.format(IF_BAD.format("perform gone()")) for text in ROW_TRIGGER],
        *(
            [
                text.format(IF_BAD.format(f"raise exception 'no' using errcode = '{state}'"))
                for text in ROW_TRIGGER
            ]
            for state in ("P0001", "MY001", "42501", "42P01", "38000", "55000")
        ),
        (
            "create domain public.id as text check (value like 'm:%')",
            "alter table public.inbox alter event_id type public.id",
        ),
    ],
    ids=[
        "policy",
        "right of a trigger",
        "function of a trigger",
        "P0001",
        "MY001",
        "42501",
        "42P01",
        "38000",
        "55000",
        "domain",
    ],
)
@pytest.mark.parametrize("count", [0, 4])
async def test_what_may_be_one_rows_fault_is_searched_for_before_it_stops_all(
    database: ServerDatabase, statements: Sequence[str], count: int
) -> None:
    bad = RelayMessage(dedup_key="bad", payload=b"{}")
    good = numbered(count)
    with inbox_of_a_writer(database, *statements) as dsn:
        async with connected(dsn, inbox_table="inbox", schema="public") as sink:
            result = await sink.publish([*good[:2], bad, *good[2:]])

        assert failed(result) == [min(2, count)]
        assert event_ids(database.dsn, "public.inbox") == numbered_ids(range(count))


async def test_a_row_against_a_policy_of_an_adopted_table_costs_only_itself(
    migrated_database: ServerDatabase, relay_dsn: str
) -> None:
    owner = f"{migrated_database.name}_owner"
    run(
        migrated_database.dsn,
        f"create role {owner}",
        "create table public.mine (event_id text primary key, payload jsonb)",
        f"alter table public.mine owner to {owner}",
        "alter table public.mine enable row level security, force row level security",
        "create policy p on public.mine for all using (true) with check (event_id like 'm:%')",
        f"grant create, usage on schema public to {owner}",
        f"grant pgtrickle_relay to {owner}",
        f"set session authorization {owner};"
        " select pgtrickle.enable_inbox_tracking('mine', 'public.mine', event_type_column => null,"
        " source_column => null, aggregate_id_column => null, received_at_column => null,"
        " processed_at_column => null, error_column => null, retry_count_column => null,"
        " trace_id_column => null)",
    )
    try:
        bad = RelayMessage(dedup_key="bad", payload=b"{}")
        async with connected(relay_dsn, inbox="mine") as sink:
            result = await sink.publish([*numbered(3), bad])

        assert failed(result) == [3]
        assert event_ids(migrated_database.dsn, "public.mine") == numbered_ids(range(3))
    finally:
        run(migrated_database.dsn, f"drop owned by {owner} cascade", f"drop role {owner}")


@pytest.mark.parametrize(
    "code,told",
    [
        ("raise exception 'bad %', new.payload", "raised by PL/pgSQL function public.look() line"),
        (
            "raise exception 'wait %', new.payload using errcode = '40001'",
            "raised by PL/pgSQL function public.look() line",
        ),
        ("perform (new.payload ->> 'card')::uuid", "invalid text representation [22P02]"),
    ],
    ids=["RAISE", "outage by RAISE", "value"],
)
async def test_no_error_repeats_what_a_row_holds_but_for_its_dead_letter(
    database: ServerDatabase, code: str, told: str
) -> None:
    message = RelayMessage(dedup_key="m:0", payload=b'{"card": "4111"}')
    statements = [text.format(code) for text in ROW_TRIGGER]
    with inbox_of_a_writer(database, *statements) as dsn:
        async with connected(dsn, inbox_table="inbox", schema="public") as sink:
            try:
                (failure,) = (await sink.publish([message])).failures
                error = failure.error
            except Outage as outage:
                error = outage

    assert told in str(error)
    assert "4111" not in str(error)
    assert "4111" in error.quoting


async def test_a_refusal_of_all_rows_repeats_no_words_of_a_trigger(
    database: ServerDatabase,
) -> None:
    function, trigger = (text.format("raise 'card 4111'") for text in ROW_TRIGGER)
    statements = [function, trigger.replace("for each row", "for each statement")]
    with inbox_of_a_writer(database, *statements) as dsn:
        async with connected(dsn, inbox_table="inbox", schema="public") as sink:
            with pytest.raises(Outage, match=r"refuses all rows.*raised by PL/pgSQL") as caught:
                await sink.publish(numbered(2))

    assert "4111" not in str(caught.value)


@pytest.mark.parametrize(
    "statements",
    [
        ["revoke insert on public.inbox from public, {role}"],
        [text.format("insert into public.secret values ('x')") for text in ROW_TRIGGER],
        [text.format("perform gone()") for text in ROW_TRIGGER],
    ],
    ids=["right on the table", "right of a trigger", "function of a trigger"],
)
async def test_what_fails_every_row_alike_is_a_wrong_configuration(
    database: ServerDatabase, statements: Sequence[str]
) -> None:
    with inbox_of_a_writer(database) as dsn:
        async with connected(dsn, inbox_table="inbox", schema="public") as sink:
            await sink.publish(numbered(1))
            run(
                database.dsn,
                *(text.replace("{role}", f"{database.name}_writer") for text in statements),
            )
            with pytest.raises(ConfigurationError) as raised:
                await sink.publish(numbered(4, prefix="late"))

    assert "migrate" not in str(raised.value)
    assert len(event_ids(database.dsn, "public.inbox")) == 1


async def test_a_right_on_the_table_that_is_gone_is_no_fault_of_a_single_row(
    database: ServerDatabase,
) -> None:
    with inbox_of_a_writer(database) as dsn:
        async with connected(dsn, inbox_table="inbox", schema="public") as sink:
            run(database.dsn, f"revoke insert on public.inbox from {database.name}_writer")
            with pytest.raises(AuthenticationRefused, match="permission denied"):
                await sink.publish(numbered(1))
            with pytest.raises(AuthenticationRefused, match="grant insert"):
                await sink.connect()


async def test_an_adopted_table_is_written_under_its_own_names_and_types(
    migrated_database: ServerDatabase,
) -> None:
    run(
        migrated_database.dsn,
        'create schema "My App"',
        'create table "My App"."In.box" ("Id %" varchar(50) unique not null, "select" text,'
        " body bytea, received_at timestamptz default now(), processed_at timestamptz,"
        " error text, retry_count int not null default 0)",
        """select pgtrickle.enable_inbox_tracking('theirs', '"My App"."In.box"',
            event_id_column => 'Id %', event_type_column => 'select', payload_column => 'body')""",
    )

    async with connected(migrated_database.dsn, inbox="theirs") as sink:
        result = await sink.publish(
            [
                *with_payloads({1: b'{"a": "\xff"}'}, 2),
                RelayMessage(dedup_key="x" * 51, payload=b"{}"),
            ]
        )

    assert failed(result) == [2]
    assert rows(migrated_database.dsn, 'select "Id %", "select", body from "My App"."In.box"') == [
        ("m:0", "orders.insert", b'{"number":0}'),
        ("m:1", "orders.insert", b'{"a": "\xff"}'),
    ]


@pytest.mark.shows("sink:pg-inbox.inbox_table", "sink:pg-inbox.schema")
async def test_event_ids_and_payloads_keep_the_types_of_the_table(database: ServerDatabase) -> None:
    run(database.dsn, "create table inbox (event_id uuid primary key, payload json)")
    good = RelayMessage(dedup_key="7b0cb1a2-4a4f-4d1c-8e9a-0d3c5a2f9b11", payload=b'{"a" : 1}')

    async with connected(database.dsn, inbox_table="inbox", schema="public") as sink:
        result = await sink.publish([numbered(1)[0], good])

    assert failed(result) == [0]
    assert rows(database.dsn, "select event_id::text, payload::text from inbox") == [
        (good.dedup_key, '{"a" : 1}')
    ]


@pytest.mark.shows("sink:pg-inbox.columns", "sink:pg-inbox.source")
async def test_columns_come_from_where_the_mapping_says(migrated_database: ServerDatabase) -> None:
    run(migrated_database.dsn, "select pgtrickle.create_inbox('inbox')")
    message = RelayMessage(
        dedup_key="1",
        payload=b'{"id": 7, "data": {"a": 1}, "meta": {"b": 2}}',
        headers={"X-Type": "created"},
    )

    async with connected(
        migrated_database.dsn,
        inbox="inbox",
        source="shop",
        columns={
            "event_id": "payload:id",
            "event_type": "header:x-type",
            "aggregate_id": "constant:all",
            "payload": "payload:data",
            "headers": "payload:meta",
        },
    ) as sink:
        result = await sink.publish([message, numbered(1)[0]])

    assert failed(result) == [1]
    assert rows(
        migrated_database.dsn,
        "select event_id, event_type, source, aggregate_id, payload, headers from pgtrickle.inbox",
    ) == [("7", "created", "shop", "all", {"a": 1}, {"b": 2})]


async def test_a_mapped_column_that_the_table_lacks_is_refused(database: ServerDatabase) -> None:
    run(database.dsn, "create table inbox (event_id text primary key, payload jsonb)")

    with pytest.raises(ConfigurationError, match="columns maps trace_id"):
        async with connected(
            database.dsn, inbox_table="inbox", schema="public", columns={"trace_id": "subject"}
        ):
            pass


async def test_a_table_that_does_not_fit_is_told_all_that_is_wrong(
    database: ServerDatabase,
) -> None:
    run(database.dsn, "create table inbox (event_id text, payload int, headers point)")

    with pytest.raises(ConfigurationError) as raised:
        async with connected(database.dsn, inbox_table="inbox", schema="public"):
            pass

    assert "event_id has no unique index" in str(raised.value)
    assert "payload is integer" in str(raised.value)
    assert "headers is point" in str(raised.value)


async def test_missing_tables_columns_and_inboxes_are_named(
    migrated_database: ServerDatabase,
) -> None:
    run(migrated_database.dsn, "create table public.inbox (id text primary key)")
    wrong: list[tuple[type[Exception], str, dict[str, object]]] = [
        (DestinationMissing, "pgtrickle.nothing", {"inbox_table": "nothing"}),
        (ConfigurationError, "no inbox", {"inbox": "nothing"}),
        (
            ConfigurationError,
            "no column event_id; it has no column payload",
            {"inbox_table": "inbox", "schema": "public"},
        ),
    ]

    for error, said, options in wrong:
        with pytest.raises(error, match=said):
            async with connected(migrated_database.dsn, "reverse", **options):
                pass


@pytest.mark.shows("sink:pg-inbox.url")
async def test_another_database_is_written_through_its_own_catalog(
    database: ServerDatabase, another_migrated_database: ServerDatabase
) -> None:
    run(another_migrated_database.dsn, "select pgtrickle.create_inbox('inbox')")

    async with connected(
        database.dsn, "forward", inbox="inbox", url=another_migrated_database.dsn
    ) as sink:
        assert failed(await sink.publish(with_payloads({1: NUL}, 3))) == [1]

    assert event_ids(another_migrated_database.dsn, "pgtrickle.inbox") == numbered_ids([0, 2])


@pytest.mark.shows("error:CatalogMissing")
async def test_another_database_without_a_catalog_is_told_apart_from_our_own(
    migrated_database: ServerDatabase, database: ServerDatabase
) -> None:
    with pytest.raises(CatalogMissing, match=r"sink\.url.*inbox_table"):
        async with connected(migrated_database.dsn, inbox="inbox", url=database.dsn):
            pass


async def test_what_is_accepted_waits_for_the_disk_where_commits_do_not(
    database: ServerDatabase,
) -> None:
    run(
        database.dsn,
        f"alter database {database.name} set synchronous_commit to off",
        "create table inbox (event_id text unique, payload jsonb, level text"
        " default current_setting('synchronous_commit'))",
        "create function note() returns trigger language plpgsql as $$ begin"
        " update public.inbox set level = current_setting('synchronous_commit');"
        " return null; end $$",
        "create constraint trigger note after insert on inbox deferrable initially deferred"
        " for each row execute function note()",
    )

    async with connected(database.dsn, inbox_table="inbox", schema="public") as sink:
        await sink.publish(numbered(3))

    assert {row[0] for row in rows(database.dsn, "select level from inbox")} == {"on"}


async def test_the_oldest_supported_server_is_written_to_alike(
    any_postgres_server: PostgresServer,
) -> None:
    with any_postgres_server.database() as database:
        run(database.dsn, "create table inbox (event_id text primary key, payload jsonb)")
        async with connected(database.dsn, inbox_table="inbox", schema="public") as sink:
            result = await sink.publish(with_payloads({2: NUL}, 5))

        assert failed(result) == [2]
        assert event_ids(database.dsn, "inbox") == numbered_ids([0, 1, 3, 4])
