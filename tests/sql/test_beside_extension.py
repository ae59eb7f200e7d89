"""Beside the extension pg_trickle: in a schema of our own, with its stream tables as ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import asyncpg
import msgspec
import pytest

from relay import postgres
from relay.backends.outbox.source import OutboxSource
from relay.catalog import Catalog
from relay.errors import MigrationRefused, RelayError
from relay.housekeeping import Housekeeping
from relay.message import RelayMessage
from relay.migrate import migrate, uninstall
from relay.settings import PostgresSettings, schema_identifier
from tests.contract.surroundings import backend_context
from tests.servers.postgres import PostgresServer
from tests.sql.outbox_session import Row, Session, session

FIXTURE = Path(__file__).with_name("extension_fixture.sql")
SCHEMA = 'Relay "x"'
OURS = schema_identifier(SCHEMA)

GRANTS = """
do $$ begin
    if to_regrole('pgtrickle_owner') is null then create role pgtrickle_owner nologin; end if;
end $$;
grant usage on schema pgtrickle to pgtrickle_owner;
grant select on pgtrickle.pgt_stream_tables, pgtrickle.pgt_dependencies to pgtrickle_owner;
"""
HISTORY = "grant select on pgtrickle.pgt_refresh_history to pgtrickle_owner"

EVERYTHING = """
select classid::regclass::text, (pg_identify_object(classid, objid, 0)).identity
from (
    select 'pg_class'::regclass as classid, oid as objid from pg_class
    union all select 'pg_proc'::regclass, oid from pg_proc
    union all select 'pg_namespace'::regclass, oid from pg_namespace
    union all select 'pg_authid'::regclass, oid from pg_authid
) as x
where objid >= 16384 order by 1, 2
"""


def install(db: Session, version: str = "0.45.0") -> None:
    db.run(f"set fixture.version = '{version}'")
    db.run(FIXTURE.read_text())


async def migrated(dsn: str, schema: str = SCHEMA) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await migrate(connection, on_step=lambda _: None, schema=schema)
    finally:
        await connection.close()


@pytest.fixture
def empty(any_postgres_server: PostgresServer) -> Iterator[Session]:
    with any_postgres_server.database() as created, session(created.dsn) as opened:
        yield opened


@pytest.fixture
async def beside(empty: Session) -> Session:
    install(empty)
    empty.run(GRANTS)
    empty.run(HISTORY)
    await migrated(empty.dsn)
    empty.run(f"set search_path = public, {OURS}")
    return empty


@pytest.fixture
def no_user_triggers(beside: Session) -> None:
    """For every session that begins from here on, and for this one."""
    name = beside.connection.info.dbname
    beside.run(f"alter database {name} set pg_trickle.user_triggers = 'off'")
    beside.run("set pg_trickle.user_triggers = 'off'")


@pytest.fixture
def totals(beside: Session) -> Session:
    beside.run("select pgtrickle.create_stream_table('totals', 'city text, amount int')")
    assert beside.value("select enable_outbox('totals')") == "outbox_totals"
    return beside


@pytest.fixture
async def relay_database(beside: Session) -> AsyncIterator[postgres.Database]:
    """What a relay sees that has nothing but its role."""
    beside.new_role("relay_beside", "pgtrickle_relay")
    url = beside.dsn.replace("postgres@", "relay_beside@")
    database = postgres.Database(PostgresSettings(url=url, schema=SCHEMA))
    await database.open()
    yield database
    await database.aclose()


async def nobody(_: Sequence[str]) -> Sequence[str]:
    return ()


@pytest.fixture
def relay(relay_database: postgres.Database) -> Housekeeping:
    return Housekeeping(
        catalog=Catalog(relay_database, "default"),
        worker_id="w",
        owned=dict,
        unowned=nobody,
        report=lambda: b"{}",
        emit=lambda _: None,
    )


def refresh(db: Session, action: str, statements: str, table: str = "totals") -> None:
    db.run("select pgtrickle.refresh(%s, %s, %s)", table, action, statements)


def outbox(db: Session) -> list[Row]:
    return db.rows(
        "select payload, (select array_agg(d.row_data order by d.row_num) from"
        f" {OURS}.outbox_delta_rows_totals as d where d.outbox_id = o.id)"
        f" from {OURS}.outbox_totals as o order by id"
    )


def row(number: int, city: str, amount: int) -> dict[str, object]:
    return {"__pgt_row_id": number, "city": city, "amount": amount}


def snapshot(*rows: dict[str, object]) -> Row:
    payload: dict[str, object] = {"v": 1, "full_refresh": True}
    if not rows:
        return payload | {"inserted": [], "deleted": []}, None
    counts = {"inserted_count": len(rows), "deleted_count": 0}
    return payload | {"claim_check": True} | counts, list(rows)


PARIS, ROME = row(1, "Paris", 3), row(2, "Rome", 5)
FILL = "insert into totals values (1, 'Paris', 3, 1), (2, 'Rome', 5, 1)"


# Migrating -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.28.0", "0.45.0", "0.67.0"])
async def test_its_schema_is_refused_before_anything_is_changed(
    empty: Session, version: str
) -> None:
    install(empty, version)
    before = empty.rows(EVERYTHING)

    with pytest.raises(MigrationRefused) as refusal:
        await migrated(empty.dsn, "pgtrickle")

    assert f"belongs to extension pg_trickle {version}" in str(refusal.value)
    assert "postgres.schema=pgtrickle_relay" in refusal.value.remedy
    assert empty.rows(EVERYTHING) == before


async def test_event_triggers_that_would_refuse_our_objects_are_named_with_the_grant(
    empty: Session,
) -> None:
    install(empty)
    before = empty.rows(EVERYTHING)

    with pytest.raises(MigrationRefused) as refusal:
        await migrated(empty.dsn, "pgtrickle_relay")

    assert "event triggers of pg_trickle" in str(refusal.value)
    assert empty.rows(EVERYTHING) == before
    for statement in refusal.value.remedy.split("; "):
        empty.run(statement)
    await migrated(empty.dsn, "pgtrickle_relay")
    assert empty.value("select pgtrickle_relay.relay_schema_version()")


async def test_a_table_owner_without_rights_on_its_catalog_is_told_the_grant(
    beside: Session,
) -> None:
    beside.new_role("beside_owner")
    beside.run("grant create on schema public to beside_owner")
    beside.run("create table orders (id int primary key); alter table orders owner to beside_owner")
    beside.run("set role beside_owner")

    with beside.refused("42501") as refusal:
        beside.run("select enable_outbox('orders')")

    assert refusal.message_primary.startswith("the event triggers of pg_trickle")
    beside.run("reset role")
    for statement in refusal.message_hint.split("; "):
        beside.run(statement)
    beside.run("set role beside_owner")
    assert beside.value("select enable_outbox('orders')") == "outbox_orders"
    beside.run("select disable_outbox('orders')")


# Living together -----------------------------------------------------------------------------


async def test_outboxes_live_beside_those_of_the_extension(totals: Session) -> None:
    totals.run("select pgtrickle.enable_outbox(p_name => 'totals')")

    refresh(totals, "DIFFERENTIAL", FILL)
    totals.run("select outbox_publish('totals', '[{\"city\": \"Oslo\"}]')")

    (theirs,) = totals.rows("select payload from pgtrickle.outbox_totals")
    assert len(theirs[0]) == 2
    assert "__pgt_row_id" in theirs[0][0]
    assert [payload["inserted"] for payload, _ in outbox(totals)] == [
        [PARIS, ROME],
        [{"city": "Oslo"}],
    ]
    status = totals.value("select outbox_status('totals')")
    assert (status["captured_table"], status["key_columns"]) == (
        "public.totals",
        ["__pgt_row_id"],
    )


async def test_repairing_and_disabling_work_in_a_schema_whose_name_needs_quotes(
    totals: Session,
) -> None:
    totals.run("drop function pgtrickle_snapshot_totals()")
    assert totals.rows("select problem, remedy from relay_capture_problems()") == [
        (
            "full refreshes are not captured: the snapshot function is missing",
            f"select {OURS}.repair_outbox('public.totals')",
        )
    ]
    assert totals.value("select repair_outbox('totals')") == 1
    assert totals.rows("select * from relay_capture_problems()") == []

    totals.run("select disable_outbox('totals')")

    assert totals.rows(r"select proname from pg_proc where proname like 'pgtrickle\_%'") == []


async def test_dropping_our_schema_takes_our_triggers_and_writes_go_on(totals: Session) -> None:
    totals.run(f"drop schema {OURS} cascade")

    refresh(totals, "DIFFERENTIAL", FILL)

    assert totals.value("select count(*) from totals") == 2
    assert totals.value("select count(*) from pg_trigger where not tgisinternal") == 0


async def test_uninstalling_takes_the_functions_beside_the_table_too(totals: Session) -> None:
    connection = await asyncpg.connect(totals.dsn)
    left = await uninstall(connection, schema=SCHEMA)
    await connection.close()

    assert left == []
    assert totals.rows(r"select proname from pg_proc where proname like 'pgtrickle\_%'") == []
    assert totals.value("select count(*) from pgtrickle.pgt_stream_tables") == 1


async def test_dropping_the_extension_meets_nothing_of_ours(totals: Session) -> None:
    totals.run("drop extension pg_trickle cascade")

    totals.run(FILL)
    assert [payload["inserted"] for payload, _ in outbox(totals)] == [[PARIS, ROME]]
    assert totals.rows("select * from relay_capture_problems()") == []


async def test_a_stream_table_that_the_extension_knows_no_longer_is_no_healthy_one(
    totals: Session,
) -> None:
    totals.run("update pgtrickle.pgt_stream_tables set pgt_relid = 1")

    ((problem, remedy),) = totals.rows("select problem, remedy from relay_capture_problems()")

    assert "nothing refreshes it" in problem
    assert "another stream table" in remedy


# Stream tables -------------------------------------------------------------------------------


async def test_a_differential_refresh_is_told_as_it_was_without_internal_columns(
    totals: Session,
) -> None:
    refresh(totals, "DIFFERENTIAL", FILL)
    refresh(
        totals, "DIFFERENTIAL", "update totals set amount = 9, __pgt_count = 2 where city = 'Rome'"
    )
    refresh(totals, "DIFFERENTIAL", "delete from totals where city = 'Paris'")
    refresh(totals, "NO_DATA", "delete from totals where false")

    assert [payload for payload, _ in outbox(totals)] == [
        {"v": 1, "inserted": [PARIS, ROME], "deleted": []},
        {"v": 1, "inserted": [ROME | {"amount": 9}], "deleted": [ROME]},
        {"v": 1, "inserted": [], "deleted": [PARIS]},
    ]


async def test_a_full_refresh_becomes_one_snapshot(totals: Session, relay: Housekeeping) -> None:
    refresh(totals, "FULL", FILL)
    assert outbox(totals) == []

    await relay.write_snapshots()
    await relay.write_snapshots()

    assert outbox(totals) == [snapshot(PARIS, ROME)]


async def test_every_kind_of_full_refresh_is_seen_and_an_empty_one_is_a_truncation(
    totals: Session, relay: Housekeeping
) -> None:
    refresh(totals, "REINITIALIZE", FILL)
    await relay.write_snapshots()
    totals.run(
        "select pgtrickle.refresh('totals', 'DIFFERENTIAL', 'delete from totals where amount = 3',"
        " p_is_fallback => true)"
    )
    await relay.write_snapshots()
    refresh(totals, "FULL", "truncate totals")
    await relay.write_snapshots()

    assert outbox(totals) == [snapshot(PARIS, ROME), snapshot(ROME), snapshot()]


@pytest.mark.shows("setting:postgres.schema")
async def test_a_snapshot_goes_out_as_framed_upserts_whose_key_is_the_row_id(
    totals: Session, relay: Housekeeping, relay_database: postgres.Database
) -> None:
    context = backend_context(database=relay_database, catalog=Catalog(relay_database, "default"))
    context = msgspec.structs.replace(context, pipeline_options={"snapshot_markers": True})
    source = OutboxSource.from_options({"outbox": "totals"}, context)
    await source.connect()

    refresh(totals, "FULL", FILL)
    await relay.write_snapshots()
    messages: list[RelayMessage] = []
    async with asyncio.timeout(30):
        while len(messages) < 4:
            messages += (await source.poll()).messages
    await source.aclose()

    assert [(m.op, m.key, m.payload, m.is_full_refresh) for m in messages] == [
        ("snapshot_begin", None, b"null", True),
        ("upsert", "1", b'{"city":"Paris","amount":3}', True),
        ("upsert", "2", b'{"city":"Rome","amount":5}', True),
        ("snapshot_end", None, b"null", True),
    ]


async def test_refreshes_that_are_numbered_from_1_again_are_seen(
    totals: Session, relay: Housekeeping
) -> None:
    totals.run(f"update {OURS}.pgt_outbox_config set snapshot_through = 900")
    refresh(totals, "FULL", FILL)

    await relay.write_snapshots()
    await relay.write_snapshots()

    assert outbox(totals) == [snapshot(PARIS, ROME)]


async def test_relays_that_see_different_settings_write_no_snapshot_in_turn(
    no_user_triggers: None, totals: Session, relay: Housekeeping
) -> None:
    refresh(totals, "FULL", FILL)
    refresh(totals, "DIFFERENTIAL", "delete from totals where city = 'Paris'")
    await relay.write_snapshots()

    totals.run("set pg_trickle.user_triggers = 'auto'")
    assert totals.rows("select * from relay_due_snapshots()") == []


async def test_of_several_relays_one_writes_the_snapshot(
    totals: Session, relay: Housekeeping
) -> None:
    refresh(totals, "FULL", FILL)

    await asyncio.gather(*(relay.write_snapshots() for _ in range(4)))

    assert outbox(totals) == [snapshot(PARIS, ROME)]


async def test_a_snapshot_waits_for_who_writes_the_table(
    totals: Session, relay: Housekeeping
) -> None:
    refresh(totals, "FULL", FILL)
    with session(totals.dsn) as writer, writer.connection.transaction():
        writer.run("delete from public.totals where city = 'Rome'")
        with pytest.raises(RelayError, match="lock timeout"):
            await relay.write_snapshots()

    await relay.write_snapshots()

    assert [payload["v"] for payload, _ in outbox(totals)] == [1, 1]
    assert outbox(totals)[1] == snapshot(PARIS)


REPLACE = "create or replace function pgtrickle_snapshot_totals() returns bigint language plpgsql"


@pytest.mark.parametrize(
    "change",
    [
        f"{REPLACE} as $$ begin create role stolen; return 1; end $$",
        "alter function pgtrickle_snapshot_totals() security invoker",
    ],
)
async def test_a_snapshot_function_that_its_owner_changed_is_not_called(
    totals: Session, relay: Housekeeping, change: str
) -> None:
    refresh(totals, "FULL", FILL)
    totals.run(change)

    await relay.write_snapshots()

    assert outbox(totals) == []
    assert "snapshot function" in totals.value("select problem from relay_capture_problems()")
    totals.run("select repair_outbox('totals')")
    await relay.write_snapshots()
    assert outbox(totals) == [snapshot(PARIS, ROME)]


async def test_a_snapshot_function_that_changes_under_the_relay_undoes_what_it_did(
    totals: Session,
) -> None:
    refresh(totals, "FULL", FILL)
    ((version,),) = totals.rows("select version from relay_due_snapshots()")
    check = "select relay_snapshot_is_intact('outbox_totals', %s)"
    assert totals.value(check, version) is True

    totals.run("alter function pgtrickle_snapshot_totals() cost 7")

    with totals.refused("RL034"):
        totals.run(check, version)


async def test_what_a_cast_of_the_owner_defers_runs_as_the_owner_and_never_as_the_relay(
    beside: Session, relay: Housekeeping
) -> None:
    beside.new_role("beside_owner")
    beside.run("grant create on schema public to beside_owner")
    beside.run("grant usage on schema pgtrickle to beside_owner")
    beside.run("grant select on all tables in schema pgtrickle to beside_owner")
    beside.run("set role beside_owner")
    beside.run(
        "create type mood as enum ('good'); create table seen (who text); create table log (n int);"
        "create function mood_json(mood) returns json language plpgsql as"
        " $$ begin insert into public.log values (1); return '1'; end $$;"
        "create cast (mood as json) with function mood_json(mood);"
        "create function note() returns trigger language plpgsql as"
        " $$ begin insert into public.seen values (current_user); return null; end $$;"
        "create constraint trigger later after insert on log deferrable initially deferred"
        " for each row execute function note()"
    )
    beside.run("reset role; select pgtrickle.create_stream_table('totals', 'city mood')")
    beside.run("alter table totals owner to beside_owner; select enable_outbox('totals')")
    refresh(beside, "FULL", "insert into totals values (1, 'good', 1)")

    await relay.write_snapshots()

    assert set(beside.rows("select who from seen")) == {("beside_owner",)}
    assert outbox(beside) == [snapshot({"__pgt_row_id": 1, "city": 1})]


async def test_a_table_that_was_given_away_gets_a_snapshot_function_of_its_new_owner(
    totals: Session, relay: Housekeeping
) -> None:
    totals.new_role("beside_heir")
    totals.run(
        "grant create on schema public to beside_heir; alter table totals owner to beside_heir"
    )
    refresh(totals, "FULL", FILL)
    await relay.write_snapshots()
    assert outbox(totals) == []
    assert len(totals.rows("select * from relay_capture_problems()")) == 2

    totals.run("select repair_outbox('totals')")

    assert totals.rows("select * from relay_capture_problems()") == []
    await relay.write_snapshots()
    assert outbox(totals) == [snapshot(PARIS, ROME)]


async def test_nobody_but_the_relay_and_the_owner_writes_snapshots(totals: Session) -> None:
    totals.new_role("beside_stranger")
    totals.run("set role beside_stranger")

    for call in (
        "select pgtrickle_snapshot_totals()",
        "select relay_end_snapshot('outbox_totals', 7)",
        "select * from relay_due_snapshots()",
    ):
        with totals.refused("42501"):
            totals.run(call)


async def test_a_stream_table_in_full_mode_is_announced_as_snapshots(beside: Session) -> None:
    beside.run("select pgtrickle.create_stream_table('totals', 'city text', 'FULL')")

    beside.run("select enable_outbox('totals')")

    assert (
        "public.totals is refreshed without triggers: its events will be snapshots of all rows"
        in (beside.notices)
    )


async def test_a_history_that_cannot_be_read_is_said_with_the_grant_and_heals(
    beside: Session, relay: Housekeeping
) -> None:
    beside.run("revoke select on pgtrickle.pgt_refresh_history from pgtrickle_owner")
    beside.run("select pgtrickle.create_stream_table('totals', 'city text, amount int')")

    beside.run("select enable_outbox('totals')")

    assert any("will not be captured: rights are missing" in said for said in beside.notices)
    ((problem, remedy),) = beside.rows("select problem, remedy from relay_capture_problems()")
    assert problem == "full refreshes are not captured: rights are missing"
    refresh(beside, "FULL", FILL)
    await relay.write_snapshots()
    assert outbox(beside) == []
    beside.run(remedy)
    await relay.write_snapshots()
    assert outbox(beside) == [snapshot(PARIS, ROME)]


async def test_without_user_triggers_every_refresh_becomes_a_snapshot(
    no_user_triggers: None, totals: Session, relay: Housekeeping
) -> None:
    refresh(totals, "DIFFERENTIAL", FILL)

    assert totals.rows("select problem, remedy from relay_capture_problems()") == [
        (
            "pg_trickle fires no trigger on it: pg_trickle.user_triggers is off",
            "set pg_trickle.user_triggers to auto",
        )
    ]
    await relay.write_snapshots()

    assert outbox(totals) == [snapshot(PARIS, ROME)]


async def test_a_stream_table_of_another_schema_asks_for_the_grant_that_the_relay_needs(
    beside: Session, relay: Housekeeping
) -> None:
    beside.run("create schema sales; set search_path = sales, " + OURS)
    beside.run("select pgtrickle.create_stream_table('totals', 'city text, amount int')")
    beside.run("select enable_outbox('totals')")

    assert beside.rows("select remedy from relay_capture_problems()") == [
        ("grant usage on schema sales to pgtrickle_relay",)
    ]
    refresh(beside, "FULL", FILL)
    await relay.write_snapshots()
    assert outbox(beside) == []
    beside.run("grant usage on schema sales to pgtrickle_relay")
    await relay.write_snapshots()
    assert outbox(beside) == [snapshot(PARIS, ROME)]


@pytest.mark.parametrize("triggers, mode", [("off", "DIFFERENTIAL"), ("auto", "FULL")])
async def test_a_stream_table_that_nothing_would_tell_of_is_refused(
    beside: Session, triggers: str, mode: str
) -> None:
    beside.run("revoke select on pgtrickle.pgt_refresh_history from pgtrickle_owner")
    beside.run(f"set pg_trickle.user_triggers = '{triggers}'")
    beside.run(f"select pgtrickle.create_stream_table('totals', 'city text', '{mode}')")

    with beside.refused("RL005") as refusal:
        beside.run("select enable_outbox('totals')")

    assert refusal.message_hint.endswith(
        "grant select on pgtrickle.pgt_refresh_history to pgtrickle_owner"
    )
