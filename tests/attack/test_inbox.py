"""Attacks on inboxes: by a plain login, by another member of the relay's role, by a table's owner.

The loot is a table into which code of the attacker writes as whom it ran.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import pytest

from relay.backends.inbox import InboxSink
from relay.catalog import Catalog
from relay.errors import ConfigurationError, DestinationMissing, RelayError
from relay.postgres import Database
from relay.settings import PostgresSettings
from tests.contract.evidence import numbered
from tests.contract.surroundings import backend_context
from tests.servers.postgres import Database as ServerDatabase
from tests.sql.outbox_session import Session, session

RELAY, ALICE, MALLORY = "attack_inbox_relay", "attack_inbox_alice", "attack_inbox_mallory"

SETTING = f"""
create schema app authorization {ALICE};
grant usage, create on schema app to {MALLORY};
grant usage on schema app to public;
create table app.loot (who text);
grant all on app.loot to public;
create function app.spy() returns trigger language plpgsql as
    $$ begin insert into app.loot values (current_user); return new; end $$;
create function app.spied(text) returns boolean language plpgsql immutable as
    $$ begin perform app.spied_text(); return true; end $$;
create function app.spied_text() returns text language plpgsql as
    $$ begin insert into app.loot values (current_user); return 'x'; end $$;
alter function app.spy() owner to {ALICE};
grant execute on all functions in schema app to public;
alter function app.spied(text) owner to {ALICE};
alter function app.spied_text() owner to {ALICE};
"""
TABLE = """
create table app.messages (event_id text primary key, event_type text, payload jsonb,
    processed_at timestamptz, error text, retry_count int not null default 0);
"""
ADOPT = "select pgtrickle.enable_inbox_tracking('mine', 'app.messages')"


@pytest.fixture
def boss(any_migrated_database: ServerDatabase) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.new_role(RELAY, "pgtrickle_relay")
        opened.new_role(ALICE, "pgtrickle_relay")
        opened.new_role(MALLORY)
        opened.run(SETTING)
        yield opened


@pytest.fixture
def alice(boss: Session, any_migrated_database: ServerDatabase) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run(f"set session authorization {ALICE}")
        opened.run(TABLE)
        yield opened


@pytest.fixture
def mallory(boss: Session, any_migrated_database: ServerDatabase) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run(f"set session authorization {MALLORY}")
        yield opened


@pytest.fixture
def member(boss: Session, any_migrated_database: ServerDatabase) -> Iterator[Session]:
    """Another member of pgtrickle_relay, which has nothing else."""
    with session(any_migrated_database.dsn) as opened:
        opened.run(f"set session authorization {RELAY}")
        yield opened


@contextlib.asynccontextmanager
async def sink(database: ServerDatabase) -> AsyncIterator[InboxSink]:
    """The relay, as a login that is a member of pgtrickle_relay and nothing else."""
    dsn = database.server.database_dsn(database.name, user=RELAY)
    opened = Database(PostgresSettings(url=dsn, schema=database.server.schema, pool_size=1))
    await opened.open()
    try:
        made = InboxSink.from_options(
            {"type": "pg-inbox", "inbox": "mine"},
            backend_context(
                database=opened,
                catalog=Catalog(opened, "default"),
                direction="reverse",
                pipeline="p",
            ),
        )
        await made.connect()
        yield made
        await made.aclose()
    finally:
        await opened.aclose()


async def receive(database: ServerDatabase, count: int = 3) -> None:
    async with sink(database) as opened:
        await opened.publish(numbered(count))


def looters(db: Session) -> set[str]:
    return {row[0] for row in db.rows("select distinct who from app.loot")}


def inboxes(db: Session) -> list[str]:
    return [row[0] for row in db.rows("select inbox_name from pgtrickle.relay_inboxes order by 1")]


@pytest.mark.parametrize(
    "trap",
    [
        "create trigger t before insert on app.messages for each row execute function app.spy()",
        "create trigger t after insert on app.messages for each row execute function app.spy()",
        "create trigger t after insert on app.messages execute function app.spy()",
        "alter table app.messages enable row level security, force row level security;"
        " create policy p on app.messages using (app.spied(event_id))"
        " with check (app.spied(event_id))",
        "alter table app.messages add column d text default app.spied_text()",
        "alter table app.messages add check (app.spied(event_id))",
        "create index on app.messages ((app.spied(event_id)))",
        "alter table app.messages add column g boolean"
        " generated always as (app.spied(event_id)) stored",
        "create domain app.checked as jsonb check (app.spied(value::text));"
        " alter table app.messages alter payload type app.checked",
    ],
    ids=[
        "before", "after", "statement", "policy", "default", "check", "index", "generated",
        "domain",
    ],
)  # fmt: skip
async def test_code_in_a_table_runs_as_its_owner_when_the_relay_writes(
    boss: Session, alice: Session, any_migrated_database: ServerDatabase, trap: str
) -> None:
    await asyncio.to_thread(alice.run, trap)
    with contextlib.suppress(Exception):
        # Domains are looked through since tables are compared by type.
        alice.run(ADOPT)
    boss.run("truncate app.loot")

    with contextlib.suppress(RelayError):
        await receive(any_migrated_database)

    assert looters(boss) == {ALICE}


@pytest.mark.parametrize("call", ["inbox_mark_processed", "replay_inbox_messages"])
def test_a_trigger_on_an_adopted_table_never_runs_as_the_catalogs_owner(
    boss: Session, alice: Session, call: str
) -> None:
    alice.run(ADOPT)
    alice.run(
        "insert into app.messages values ('a', 't', '{}');"
        " create trigger t before update on app.messages for each row execute function app.spy()"
    )

    assert alice.value(f"select pgtrickle.{call}('mine', array['a'])") == 1

    assert looters(boss) == {ALICE}


def test_marking_takes_the_callers_own_right_on_the_table(
    boss: Session, alice: Session, member: Session
) -> None:
    alice.run(ADOPT)
    alice.run("insert into app.messages values ('a', 't', '{}')")

    with member.refused("42501"):
        member.run("select pgtrickle.inbox_mark_processed('mine', 'a')")


def test_a_view_over_the_catalog_in_the_place_of_the_table_changes_nothing(
    boss: Session, alice: Session
) -> None:
    boss.run("select pgtrickle.set_relay_inbox('victim', 'received', '{\"type\": \"stdin\"}')")
    alice.run(ADOPT)
    alice.run("drop table app.messages cascade")
    alice.run(
        "create view app.messages as select name as event_id, name as event_type,"
        " config as payload, created_at as processed_at, name as error, 0 as retry_count"
        " from pgtrickle.relay_inbox_config"
    )

    before = boss.rows("select * from pgtrickle.relay_inbox_config")
    # The view's owner has no right on the catalog; as the catalog's owner it would be written.
    alice.run("alter view app.messages set (security_invoker = true)")
    with contextlib.suppress(Exception):
        alice.run("select pgtrickle.inbox_mark_processed('mine', 'victim')")

    assert boss.rows("select * from pgtrickle.relay_inbox_config") == before
    assert boss.value("select status from pgtrickle.inbox_status('mine')") == "broken"


@pytest.mark.parametrize("view", ["create view", "create materialized view"])
def test_only_an_ordinary_table_becomes_an_inbox(alice: Session, view: str) -> None:
    alice.run(f"{view} app.v as select 'a'::text as event_id, '{{}}'::jsonb as payload")

    with alice.refused("RL032"):
        alice.run("select pgtrickle.enable_inbox_tracking('v', 'app.v')")


@pytest.mark.parametrize("table", ["pg_catalog.pg_proc", "pgtrickle.relay_inboxes"])
def test_not_even_a_superuser_adopts_a_table_of_a_catalog(boss: Session, table: str) -> None:
    with boss.refused("RL032"):
        boss.run(
            "select pgtrickle.enable_inbox_tracking('c', %s, event_id_column => 'inbox_name')",
            table,
        )


def test_a_function_that_stands_under_the_name_already_is_left_alone(
    boss: Session, alice: Session, mallory: Session
) -> None:
    mallory.run(
        "create function app.receive_mine(text[], text[], text[]) returns bigint language sql"
        " as 'select 0::bigint'"
    )

    alice.run(ADOPT)

    (receive_function,) = boss.rows("select receive_function from pgtrickle.relay_inbox('mine')")[0]
    assert receive_function != "app.receive_mine"
    assert (
        boss.value("select prosrc from pg_proc where proname = 'receive_mine'")
        == "select 0::bigint"
    )


def test_an_overload_of_another_is_in_nobodys_way(
    boss: Session, alice: Session, mallory: Session
) -> None:
    alice.run(ADOPT)
    mallory.run(
        "create function app.receive_mine(int) returns bigint language sql as 'select 0::bigint';"
        " comment on function app.receive_mine(int) is"
        " 'Part of inbox mine, made by pgtrickle-relay.'"
    )

    assert boss.value("select status from pgtrickle.inbox_status('mine')") == "healthy"
    alice.run(ADOPT)
    alice.run("select pgtrickle.disable_inbox_tracking('mine')")

    assert inboxes(boss) == []
    assert boss.value("select count(*) from pg_proc where proname = 'receive_mine'") == 1


def test_default_privileges_open_the_functions_to_nobody(
    boss: Session, alice: Session, mallory: Session
) -> None:
    alice.run(f"alter default privileges grant execute on functions to {MALLORY}")
    alice.run(ADOPT)

    allowed = boss.rows(
        "select p.proname from pg_proc as p where p.pronamespace = 'app'::regnamespace"
        " and p.prosecdef and (has_function_privilege(%s, p.oid, 'execute')"
        " or has_function_privilege('public', p.oid, 'execute'))",
        MALLORY,
    )

    assert allowed == []
    assert boss.value("select count(*) from pg_proc where prosecdef and proname ~ '_mine'") == 2


@pytest.mark.parametrize("moment", ["before connecting", "while connected"])
async def test_a_function_that_its_owner_changed_is_not_called(
    boss: Session, alice: Session, any_migrated_database: ServerDatabase, moment: str
) -> None:
    alice.run(ADOPT)
    arguments = "text[], text[], text[]"
    change = (
        f"create or replace function app.receive_mine({arguments}) returns bigint"
        " language plpgsql security invoker as"
        " $$ begin insert into app.loot values (current_user); return 0; end $$"
    )

    async def attacked() -> None:
        if moment == "before connecting":
            alice.run(change)
        async with sink(any_migrated_database) as opened:
            alice.run(change)
            await opened.publish(numbered(3))

    with pytest.raises(ConfigurationError):
        await attacked()

    assert looters(boss) == set()


async def test_a_function_in_the_place_of_one_that_was_dropped_is_not_called(
    boss: Session, alice: Session, mallory: Session, any_migrated_database: ServerDatabase
) -> None:
    alice.run(ADOPT)
    async with sink(any_migrated_database) as opened:
        alice.run("drop function app.receive_mine")
        mallory.run(
            "create function app.receive_mine(text[], text[], text[]) returns bigint"
            " language plpgsql as"
            " $$ begin insert into app.loot values (current_user); return 0; end $$"
        )
        with pytest.raises(ConfigurationError):
            await opened.publish(numbered(3))

    assert looters(boss) == set()
    assert boss.value("select status from pgtrickle.inbox_status('mine')") == "broken"


async def test_a_table_of_another_under_the_name_is_not_written(
    boss: Session, alice: Session, mallory: Session, any_migrated_database: ServerDatabase
) -> None:
    alice.run(ADOPT)
    async with sink(any_migrated_database) as opened:
        alice.run("alter table app.messages rename to elsewhere")
        mallory.run(TABLE)
        mallory.run(
            f"grant all on app.messages to {ALICE};"
            " create trigger t before insert on app.messages for each row"
            " execute function app.spy()"
        )
        with pytest.raises(DestinationMissing):
            await opened.publish(numbered(3))

    assert looters(boss) == set()
    assert boss.value("select status from pgtrickle.inbox_status('mine')") == "broken"


@pytest.mark.parametrize("smuggled", [False, True])
async def test_a_deferred_trigger_does_not_wait_for_the_relays_commit(
    boss: Session, alice: Session, any_migrated_database: ServerDatabase, smuggled: bool
) -> None:
    alice.run("create table app.other (a int)")
    alice.run(ADOPT)
    trap = (
        "create constraint trigger late after insert on app.{} deferrable initially deferred"
        " for each row execute function app.spy()"
    )
    if smuggled:
        alice.run(trap.format("other"))
        alice.run(
            "create function app.smuggle() returns trigger language plpgsql as $$ begin"
            " set constraints all deferred; insert into app.other values (1);"
            " return null; end $$;"
            " create trigger smuggle after insert on app.messages execute function app.smuggle()"
        )
    else:
        alice.run(trap.format("messages"))

    with contextlib.suppress(RelayError):
        await receive(any_migrated_database)

    assert looters(boss) <= {ALICE}


@pytest.mark.parametrize("refused", [False, True])
async def test_a_trigger_puts_no_statement_in_the_place_of_one_that_the_relay_prepared(
    boss: Session, alice: Session, any_migrated_database: ServerDatabase, refused: bool
) -> None:
    alice.run(
        "create function app.hijack() returns trigger language plpgsql as $$"
        " declare s text; begin"
        " for s in select name from pg_prepared_statements where not from_sql loop"
        " execute format('deallocate %I', s);"
        " execute format('prepare %I (oid, oid, text, text[], text[], text[]) as"
        " insert into app.loot values (current_user) returning 1::bigint, true', s);"
        f" end loop; {'perform 1 / 0;' if refused else ''} return null; end $$;"
        " create trigger hijack after insert on app.messages execute function app.hijack()"
    )
    alice.run(ADOPT)

    async with sink(any_migrated_database) as opened:
        for _ in range(3):
            with contextlib.suppress(RelayError):
                await opened.publish(numbered(3))

    assert looters(boss) == set()
    assert boss.value("select count(*) from app.messages") == (0 if refused else 3)


async def test_what_a_trigger_sets_in_the_session_does_not_stay(
    boss: Session, alice: Session, any_migrated_database: ServerDatabase
) -> None:
    alice.run(
        "create function app.poison() returns trigger language plpgsql as $$ begin"
        " perform set_config('search_path', 'app', false);"
        " create temp table if not exists pg_attribute (attname name); return null; end $$;"
        " create trigger poison after insert on app.messages execute function app.poison()"
    )
    alice.run(ADOPT)
    server = any_migrated_database.server
    dsn = server.database_dsn(any_migrated_database.name, user=RELAY)
    database = Database(PostgresSettings(url=dsn, schema=server.schema, pool_size=1))
    await database.open()
    made = InboxSink.from_options(
        {"type": "pg-inbox", "inbox": "mine"},
        backend_context(
            database=database, catalog=Catalog(database, "d"), direction="reverse", pipeline="p"
        ),
    )
    await made.connect()

    await made.publish(numbered(1))
    row = await database.fetch_row(
        "looking",
        "select pg_catalog.current_setting('search_path') as path,"
        " (select pg_catalog.count(*) from pg_catalog.pg_class where relname"
        " operator(pg_catalog.=) 'pg_attribute') as n",
    )
    await database.aclose()

    assert row is not None
    assert (row["path"], row["n"]) == (boss.said("pg_catalog, pgtrickle"), 1)
    assert boss.value("select count(*) from app.messages") == 1


def test_another_member_neither_removes_nor_takes_over_an_inbox(
    boss: Session, alice: Session, member: Session
) -> None:
    alice.run(ADOPT)
    with member.refused("42501"):
        member.run("select pgtrickle.disable_inbox_tracking('mine')")
    with member.refused("42501"):
        member.run("select pgtrickle.relay_forget_inbox('mine', false)")
    with member.refused("42501"):
        member.run(
            "select pgtrickle.relay_register_inbox(jsonb_populate_record("
            "pgtrickle.relay_find_inbox('mine'), '{\"adopted\": false}'))"
        )
    with member.refused("42501"):
        member.run(
            "select pgtrickle.relay_register_inbox(jsonb_populate_record("
            "pgtrickle.relay_find_inbox('mine'), jsonb_build_object('inbox_name', 'x',"
            " 'inbox_schema', 'pgtrickle', 'inbox_table', 'relay_outbox_config')))"
        )
    assert inboxes(boss) == ["mine"]


def test_a_proof_of_an_earlier_transaction_or_for_something_else_proves_nothing(
    boss: Session, alice: Session, member: Session
) -> None:
    alice.run(ADOPT)
    prove = (
        "do $$ begin execute format('comment on function app.receive_mine is %L',"
        " concat('pgtrickle-relay inbox {} ', pg_current_xact_id())); end $$"
    )
    register = (
        "select pgtrickle.relay_register_inbox(jsonb_populate_record("
        "pgtrickle.relay_find_inbox('mine'), '{\"policies\": \"bypassed\"}'))"
    )

    alice.run(prove.format("mine"))
    with member.refused("42501") as earlier:
        member.run(register)
    with alice.refused("42501") as something_else:
        alice.run(f"{prove.format('another')}; {register}")

    for said in (earlier, something_else):
        assert said.message_primary.endswith(": no comment of this transaction on its function")
    assert boss.value("select policies from pgtrickle.relay_inboxes") == "enforced"


def test_an_inbox_whose_function_somebody_left_in_the_way_names_what_to_drop(
    boss: Session, alice: Session
) -> None:
    alice.run(ADOPT)
    alice.run("comment on function app.receive_mine is 'mine'")

    with alice.refused("42501") as said:
        alice.run("select pgtrickle.disable_inbox_tracking('mine')")
    alice.run(said.message_hint)
    alice.run("select pgtrickle.disable_inbox_tracking('mine')")

    assert inboxes(boss) == []


def test_code_in_an_index_that_a_superuser_analyzes_removes_no_inbox(
    boss: Session, alice: Session, member: Session
) -> None:
    alice.run(ADOPT)
    boss.run(f"create schema trap authorization {RELAY}")
    member.run(
        "create table trap.t (id int);"
        " create function trap.f(int) returns int language plpgsql immutable as $f$ begin"
        " begin execute $q$ select pgtrickle.relay_unregister_inbox('mine') $q$;"
        " exception when others then null; end;"
        " begin execute $q$ select pgtrickle.disable_inbox_tracking('mine') $q$;"
        " exception when others then null; end;"
        " return 1; end $f$;"
        " create index on trap.t (trap.f(id)); insert into trap.t values (1)"
    )

    boss.run("analyze trap.t")

    assert inboxes(boss) == ["mine"]


async def test_a_table_that_changed_its_owner_is_refused_with_the_remedy(
    boss: Session, alice: Session, any_migrated_database: ServerDatabase
) -> None:
    alice.run(ADOPT)
    boss.run(f"alter table app.messages owner to {MALLORY}")

    with pytest.raises(ConfigurationError, match=r"mine.*belongs to") as raised:
        await receive(any_migrated_database)

    assert "enable_inbox_tracking" in str(raised.value.remedy)
    (status, problem) = boss.rows("select status, problem from pgtrickle.inbox_status('mine')")[0]
    assert status == "broken"
    assert MALLORY in problem
    boss.run(f"alter table app.messages owner to {ALICE}")
    await receive(any_migrated_database)


@pytest.mark.parametrize(
    "change",
    [
        "alter table app.messages enable row level security",
        "alter table app.messages drop column event_type",
        "alter table app.messages rename to renamed",
        "alter table app.messages rename column payload to body",
        "drop table app.messages cascade",
        "alter table app.messages drop constraint messages_pkey",
        "alter table app.messages alter payload type text",
        "create rule r as on insert to app.messages do also insert into app.loot values (user)",
    ],
)
async def test_a_changed_table_is_broken_and_adopting_it_again_mends_it(
    boss: Session, alice: Session, any_migrated_database: ServerDatabase, change: str
) -> None:
    alice.run(ADOPT)
    if "drop column" in change:
        alice.run("drop view app.pending_mine, app.dlq_mine, app.stats_mine")
    if " type " in change:
        alice.run("drop view app.pending_mine, app.dlq_mine, app.stats_mine")
    alice.run(change)

    with pytest.raises((ConfigurationError, DestinationMissing)):
        await receive(any_migrated_database)

    assert boss.value("select status from pgtrickle.inbox_status('mine')") == "broken"
    assert boss.value("select problem from pgtrickle.inbox_status('mine')")
    alice.run("drop table if exists app.messages, app.renamed cascade")
    alice.run(TABLE)
    alice.run(ADOPT)
    await receive(any_migrated_database)
    assert looters(boss) == set()


def test_policies_that_would_not_hold_are_passed_by_only_where_the_owner_says_so(
    boss: Session, alice: Session
) -> None:
    alice.run("alter table app.messages enable row level security")

    with alice.refused("RL032") as said:
        alice.run(ADOPT)
    assert "force row level security" in said.message_primary
    alice.run(ADOPT.replace("')", "', policies => 'bypassed')"))

    assert boss.value("select status from pgtrickle.inbox_status('mine')") == "healthy"


def test_a_member_needs_no_create_anywhere_and_can_put_no_trigger_on_our_tables(
    boss: Session, member: Session
) -> None:
    member.run("select pgtrickle.create_inbox('ours', retention_hours => 1)")

    assert boss.rows(
        "select distinct pg_get_userbyid(relowner) from pg_class"
        " where relname in ('ours', 'pending_ours', 'dlq_ours', 'stats_ours')"
    ) == [("pgtrickle_owner",)]
    for statement in (
        "create trigger t before insert on pgtrickle.ours for each row execute function app.spy()",
        "alter table pgtrickle.ours add column x int",
        "create rule r as on insert to pgtrickle.ours do instead nothing",
        "create policy p on pgtrickle.ours",
        "insert into pgtrickle.ours values ('a', 't', null, null, '{}')",
        "select payload from pgtrickle.ours",
        "update pgtrickle.ours set payload = '{}'",
        "delete from pgtrickle.ours",
        "create or replace function pgtrickle.receive_ours(text[], text[], text[], text[], text[],"
        " text[], text[]) returns bigint language sql as 'select 1::bigint'",
    ):
        with member.refused("42501"):
            member.run(statement)


@pytest.mark.parametrize("name", ["relay_inboxes", "outbox_orders", "pgt_x", "relay_new"])
def test_an_inbox_does_not_take_a_name_of_the_catalog(member: Session, name: str) -> None:
    with member.refused("22023"):
        member.run("select pgtrickle.create_inbox(%s)", name)


def test_a_plain_login_may_call_nothing_that_makes_or_removes(
    boss: Session, mallory: Session
) -> None:
    boss.run("select pgtrickle.create_inbox('ours')")
    mallory.run("create table app.m (event_id text primary key, payload jsonb)")

    for statement in (
        "select pgtrickle.create_inbox('x')",
        "select pgtrickle.enable_inbox_tracking('x', 'app.m')",
        "select pgtrickle.drop_inbox('ours')",
        "select pgtrickle.disable_inbox_tracking('ours')",
        "select pgtrickle.relay_inbox('ours')",
        "select pgtrickle.inbox_status()",
        "select pgtrickle.receive_ours('{}', '{}', '{}', '{}', '{}', '{}', '{}')",
        "select pgtrickle.inbox_mark_processed('ours', 'a')",
    ):
        with mallory.refused("42501"):
            mallory.run(statement)


async def test_names_that_need_quotes_and_names_of_the_generated_code_work(
    boss: Session, any_migrated_database: ServerDatabase
) -> None:
    boss.run(
        """do $$ begin create role "Role x"; exception when duplicate_object then null; end $$"""
    )
    boss.run('create schema "S x" authorization "Role x"')
    boss.run(
        """create table "S x"."My ""In'box %" ("new_rows" text primary key, "m" jsonb,
            "c1" text default 'd', "kept" timestamptz, "$1" int not null default 0,
            "swept_rows" text, "swept" text)"""
    )
    boss.run('alter table "S x"."My ""In\'box %" owner to "Role x"')

    boss.run(
        "select pgtrickle.enable_inbox_tracking('mine', %s, event_id_column => 'new_rows',"
        " payload_column => 'm', event_type_column => 'swept', processed_at_column => 'kept',"
        " retry_count_column => '$1', error_column => 'swept_rows', retention_hours => 1)",
        '"S x"."My ""In\'box %"',
    )
    await receive(any_migrated_database, 3)

    assert boss.value("select pgtrickle.inbox_mark_failed('mine', 'm:0', 'e')") is True
    assert boss.value("select pgtrickle.inbox_mark_processed('mine', array['m:1'])") == 1
    boss.run(
        """update "S x"."My ""In'box %" set kept = kept - interval '1 day' where kept is not null"""
    )
    assert boss.value("""select "S x".sweep_mine(10)""") == 1
    assert boss.rows(
        "select total_messages, pending_messages from pgtrickle.inbox_status('mine')"
    ) == [(2, 2)]
    assert boss.rows(
        """select "new_rows", "$1", swept_rows from "S x".pending_mine order by 1"""
    ) == [
        ("m:0", 1, "e"),
        ("m:2", 0, None),
    ]
    assert boss.rows(
        "select distinct pg_get_userbyid(p.proowner) from pg_proc as p"
        " where p.pronamespace = '\"S x\"'::regnamespace"
    ) == [("Role x",)]
    boss.run("select pgtrickle.disable_inbox_tracking('mine')")
    assert (
        boss.rows(
            "select proname from pg_proc where pronamespace = '\"S x\"'::regnamespace"
            " union all select relname from pg_class where relkind = 'v'"
            " and relnamespace = '\"S x\"'::regnamespace"
        )
        == []
    )


@pytest.mark.parametrize(
    "arguments",
    [
        "null",
        "'x', null",
        "'x', max_retries => null",
        "'x', with_stats => null, with_dead_letter => null, schedule => null",
        "'x', readers => null, max_retries => -1",
    ],
)
def test_null_opens_nothing(member: Session, arguments: str) -> None:
    with pytest.raises(Exception, match=r"inbox|schema"):
        member.run(f"select pgtrickle.create_inbox({arguments})")
    assert member.rows("select * from pgtrickle.relay_inbox()") == []
