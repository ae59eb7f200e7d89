"""migrate runs nothing of a lesser role, whatever was made before or put in the place of ours."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import asyncpg
import pytest

from relay.errors import CatalogError
from relay.migrate import MigrationReport, migrate, migration_script
from tests.attack.conftest import LOOT, Scene
from tests.sql.test_migrate import psql

WRITE_LOOT = "perform m.steal()"
RETURNS_TRIGGER = f"returns trigger language plpgsql as 'begin {WRITE_LOOT}; return null; end'"
OWNERS_TRICKS = {
    "a view in the place of the record": (
        "alter table pgtrickle.relay_migrations rename to old;"
        "create view pgtrickle.relay_migrations as select * from pgtrickle.old where m.steal() = 1"
    ),
    "a trigger": "create trigger x after insert or update on pgtrickle.relay_migrations"
    " for each row execute function m.t()",
    "a deferred trigger": "create constraint trigger x after insert or update on"
    " pgtrickle.relay_migrations deferrable initially deferred for each row execute function m.t()",
    "a rule": "create rule x as on insert to pgtrickle.relay_migrations do also select m.steal()",
    "a policy": "alter table pgtrickle.relay_migrations enable row level security, force row level"
    " security; create policy x on pgtrickle.relay_migrations using (m.steal() = 1)"
    " with check (m.steal() = 1)",
    "a default": "alter table pgtrickle.relay_migrations alter applied_at"
    " set default now() + m.steal() * interval '1 s'",
    "a check": "alter table pgtrickle.relay_migrations add check (m.steal() = 1)",
    "an index": "create function m.i() returns int language plpgsql immutable as"
    " 'begin return m.steal(); end';create index x on pgtrickle.relay_migrations (m.i())",
    "a generated column": "create function m.i() returns int language plpgsql immutable as"
    " 'begin return m.steal(); end'; alter table pgtrickle.relay_migrations"
    " add x int generated always as (m.i()) stored",
    "a child": "create table pgtrickle.child () inherits (pgtrickle.relay_migrations)",
    "a domain": "create domain pgtrickle.d as text check (m.steal() = 1);"
    "alter table pgtrickle.relay_migrations alter version type pgtrickle.d",
}
# Nothing of these may stop a migration, nor run in one.
HARMLESS = {
    "an overload of the runner": "create function pgtrickle.relay_apply(text) returns jsonb"
    " language sql as 'select to_jsonb(m.steal())'; create function pgtrickle.relay_apply(varchar,"
    " varchar) returns jsonb language sql as 'select to_jsonb(m.steal())'",
    "changed functions": "create or replace function pgtrickle.relay_channel(base text) returns"
    " text language sql immutable as 'select m.steal()::text';"
    "grant execute on all functions in schema pgtrickle to public;"
    "create function pgtrickle.relay_grant_execute(text, text, text) returns void language sql as"
    " 'select m.steal()'",
    "an operator": "create function pgtrickle.eq(text, text) returns boolean language sql as"
    " 'select m.steal() = 1'; create operator pgtrickle.= (function = pgtrickle.eq,"
    " leftarg = text, rightarg = text)",
    "default privileges": "alter default privileges for role pgtrickle_owner"
    " grant execute on functions to mallory",
}


def run(dsn: str) -> MigrationReport:
    async def work() -> MigrationReport:
        connection = await asyncpg.connect(dsn)
        try:
            return await migrate(connection, on_step=lambda _: None)
        finally:
            await connection.close()

    return asyncio.run(work())


def run_script(scene: Scene, directory: Path) -> int:
    script = directory / "migrate.sql"
    script.write_text(migration_script())
    command = [psql(), "-X", "-q", "-f", str(script), scene.database.dsn]
    return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode


def prepare(scene: Scene) -> None:
    run(scene.database.dsn)
    scene.admin.run(f"set role mallory; {LOOT}; reset role")
    scene.admin.run(
        f"create function m.t() {RETURNS_TRIGGER}; alter function m.t() owner to mallory"
    )
    scene.admin.run("grant usage on schema m to pgtrickle_owner")
    # So that there is something to do.
    scene.admin.run(
        "update pgtrickle.relay_migrations set checksum = 'old' where filename = 'functions'"
    )


@pytest.mark.parametrize("trick", OWNERS_TRICKS)
def test_what_the_catalogs_owner_put_in_the_way_is_refused_unread(
    unmigrated: Scene, trick: str, tmp_path: Path
) -> None:
    prepare(unmigrated)
    unmigrated.admin.run("grant create on schema m to pgtrickle_owner; set role pgtrickle_owner")
    unmigrated.admin.run(f"{OWNERS_TRICKS[trick]}; reset role")
    unmigrated.admin.run("truncate m.loot")

    with pytest.raises(CatalogError, match="is not the table that migrate made"):
        run(unmigrated.database.dsn)
    assert run_script(unmigrated, tmp_path) != 0
    assert unmigrated.loot() == set()


@pytest.mark.parametrize("trick", HARMLESS)
def test_what_the_catalogs_owner_changed_is_put_right_and_never_run(
    unmigrated: Scene, trick: str, tmp_path: Path
) -> None:
    prepare(unmigrated)
    unmigrated.admin.run(f"set role pgtrickle_owner; {HARMLESS[trick]}; reset role")

    assert run_script(unmigrated, tmp_path) == 0
    run(unmigrated.database.dsn)
    assert unmigrated.loot() == set()
    assert unmigrated.admin.rows(
        "select p.oid::regprocedure::text from pg_proc as p, aclexplode(p.proacl) as a"
        " where p.pronamespace = 'pgtrickle'::regnamespace and a.grantee = 'mallory'::regrole"
    ) == []  # fmt: skip
    assert not unmigrated.admin.value(
        "select has_function_privilege('mallory', 'pgtrickle.relay_remove_outbox(text)', 'execute')"
    )
    unmigrated.admin.run("alter default privileges for role pgtrickle_owner"
                         " revoke execute on functions from mallory")  # fmt: skip


@pytest.mark.parametrize(
    "made, said",
    [
        ("create schema pgtrickle authorization mallory", "belongs to mallory"),
        ("create schema pgtrickle authorization mallory; set role mallory; create table"
         " pgtrickle.relay_migrations (filename text primary key, checksum text, version text,"
         " applied_at timestamptz default now()); reset role", "a superuser runs nothing"),
        ("create schema pgtrickle; grant create on schema pgtrickle to mallory", "right to create"),
        ("create schema pgtrickle; create function pgtrickle.f() returns int language sql as"
         " 'select 1'; alter function pgtrickle.f() owner to mallory", r"f\(\) .of mallory"),
        ("create schema pgtrickle; create table pgtrickle.t (); alter table pgtrickle.t owner to"
         " mallory", "pgtrickle.t .of mallory"),
        ("create schema pgtrickle; create function m.eq(int, int) returns boolean language sql as"
         " 'select true'; create operator pgtrickle.=== (function = m.eq, leftarg = int, rightarg"
         " = int); alter operator pgtrickle.=== (int, int) owner to mallory", "of mallory"),
    ],
)  # fmt: skip
def test_a_schema_of_others_is_not_taken(unmigrated: Scene, made: str, said: str) -> None:
    unmigrated.admin.run(made)
    if "owner to mallory" in made:
        unmigrated.admin.run("alter schema pgtrickle owner to pgtrickle_owner")
    with pytest.raises(CatalogError, match=said):
        run(unmigrated.database.dsn)
    assert unmigrated.admin.value("select to_regclass('pgtrickle.pgt_outbox_config')") is None


@pytest.mark.parametrize(
    "before, after, said",
    [
        ("alter role pgtrickle_owner login", "alter role pgtrickle_owner nologin", "rights of its"),
        ("alter role pgtrickle_owner superuser",
         "alter role pgtrickle_owner nosuperuser", "rights"),
        ("alter role pgtrickle_owner bypassrls",
         "alter role pgtrickle_owner nobypassrls", "rights"),
        ("grant alice to pgtrickle_owner", "revoke alice from pgtrickle_owner", "rights of its"),
        ("grant pgtrickle_owner to mallory with admin option",
         "revoke pgtrickle_owner from mallory cascade", "mallory may give role"),
    ],
)  # fmt: skip
def test_an_owner_role_with_more_rights_or_other_masters_is_refused(
    unmigrated: Scene, before: str, after: str, said: str
) -> None:
    if not unmigrated.admin.rows("select from pg_roles where rolname = 'pgtrickle_owner'"):
        unmigrated.admin.run("create role pgtrickle_owner")
    unmigrated.admin.run(before)
    try:
        with pytest.raises(CatalogError, match=said):
            run(unmigrated.database.dsn)
    finally:
        unmigrated.admin.run(after)
    run(unmigrated.database.dsn)
