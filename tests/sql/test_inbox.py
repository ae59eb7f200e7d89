"""Inboxes: created, adopted, written, processed, swept, dropped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session


@pytest.fixture
def db(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        yield opened


def receive(db: Session, table: str, *event_ids: str) -> None:
    for event_id in event_ids:
        db.run(
            f"insert into {table} (event_id, event_type, payload)"
            " values (%s, 'orders.insert', '{}')",
            event_id,
        )


def test_a_created_inbox_has_its_table_and_views(db: Session) -> None:
    db.run("select pgtrickle.create_inbox('orders_in', max_retries => 1)")
    receive(db, "pgtrickle.orders_in", "a", "b", "c")

    assert db.value("select pgtrickle.inbox_mark_processed('orders_in', 'a')") is True
    assert db.value("select pgtrickle.inbox_mark_processed('orders_in', 'zzz')") is False
    assert db.value("select pgtrickle.inbox_mark_failed('orders_in', 'b', 'no stock')") is True

    assert db.rows("select event_id from pgtrickle.pending_orders_in") == [("c",)]
    assert db.rows("select event_id, error, retry_count from pgtrickle.dlq_orders_in") == [
        ("b", "no stock", 1)
    ]
    assert db.rows(
        "select event_type, total, pending, processed, dead_letters from pgtrickle.stats_orders_in"
    ) == [("orders.insert", 3, 1, 1, 1)]
    health = db.value("select pgtrickle.inbox_health('orders_in')")
    assert {
        "inbox_name": "orders_in",
        "inbox_schema": "pgtrickle",
        "status": "degraded",
        "total_messages": 3,
        "pending_messages": 1,
        "dlq_messages": 1,
        "processed_messages": 1,
        "max_retries": 1,
        "retention_hours": None,
        "problem": None,
    }.items() <= health.items()


def test_replayed_messages_are_pending_again(db: Session) -> None:
    db.run("select pgtrickle.create_inbox('orders_in', max_retries => 1)")
    receive(db, "pgtrickle.orders_in", "a", "b", "c")
    assert db.value("select pgtrickle.inbox_mark_processed('orders_in', array['a', 'c'])") == 2
    db.run("select pgtrickle.inbox_mark_failed('orders_in', 'b', 'no stock')")

    assert (
        db.value("select pgtrickle.replay_inbox_messages('orders_in', array['a', 'b', 'x'])") == 2
    )

    assert db.rows(
        "select event_id, error, retry_count from pgtrickle.pending_orders_in order by 1"
    ) == [("a", None, 0), ("b", None, 0)]
    assert db.value("select pgtrickle.inbox_health('orders_in') ->> 'status'") == "healthy"


def test_the_relay_is_told_how_to_write_an_inbox(db: Session) -> None:
    db.run('create schema "Odd schema"')
    db.run("select pgtrickle.create_inbox('In %box', 'Odd schema')")

    (row,) = db.rows(
        "select inbox_schema, inbox_table, fields, types, receive_function, problem"
        " from pgtrickle.relay_inbox('In %box')"
    )
    assert row == (
        "Odd schema",
        "In %box",
        ["event_id", "event_type", "source", "aggregate_id", "trace_id", "payload", "headers"],
        ["text", "text", "text", "text", "text", "jsonb", "jsonb"],
        '"Odd schema"."receive_In %box"',
        None,
    )
    written = "select " + row[4] + "('{a,b}', '{t,t}', '{}', '{}', '{}', '{1,2}', '{{},{}}')"
    assert [db.value(written.replace("{{},{}}", '{"{}","{}"}')) for _ in range(2)] == [2, 0]
    with db.refused("RL030") as said:
        db.run("select * from pgtrickle.relay_inbox('nobody')")
    assert said.message_hint == "select pgtrickle.create_inbox('nobody');"


def test_an_adopted_table_is_written_through_its_own_columns(db: Session) -> None:
    db.run(
        """create table public.messages ("Id" varchar(200) unique not null, kind text, body json,
        done_at timestamptz, tries int not null default 0)"""
    )
    db.run(
        "select pgtrickle.enable_inbox_tracking('mine', 'messages', event_id_column => 'Id',"
        " event_type_column => 'kind', payload_column => 'body', processed_at_column => 'done_at',"
        " retry_count_column => 'tries', max_retries => 2)"
    )

    assert db.rows(
        "select fields, types, receive_function, problem from pgtrickle.relay_inbox('mine')"
    ) == [
        (
            ["event_id", "event_type", "payload"],
            ["character varying", "text", "json"],
            "public.receive_mine",
            None,
        )
    ]
    db.run("""insert into messages ("Id", kind, body) values ('a', 't', '{}')""")
    db.run("select pgtrickle.inbox_mark_failed('mine', 'a', 'e')")
    assert db.rows('select "Id", tries from public.pending_mine') == [("a", 1)]
    with db.refused("RL033") as said:
        db.run("select pgtrickle.drop_inbox('mine')")
    db.run(said.message_hint)
    assert db.rows('select "Id" from messages') == [("a",)]
    with db.refused("RL030"):
        db.run("select pgtrickle.relay_inbox('mine')")


def test_a_table_that_does_not_fit_is_refused_with_everything_that_is_wrong(db: Session) -> None:
    db.run(
        "create table public.messages (event_id int primary key, payload xml, trace_id text,"
        " tenant text not null, created_at timestamptz not null default now())"
    )
    db.run("create unique index on messages (trace_id) where tenant = 'a'")

    with db.refused("RL032") as said:
        db.run("select pgtrickle.enable_inbox_tracking('m', 'messages', headers_column => 'meta')")

    assert said.message_primary.split(": ", 1)[1].split("; ") == [
        "column meta for headers does not exist",
        "column event_id for event_id is of type integer, but must be text or character varying",
        "column payload for payload is of type xml, but must be jsonb or json or text or bytea",
        "column tenant is not null without a default, and nothing is written to it",
    ]
    with db.refused("RL032") as said:
        db.run(
            "select pgtrickle.enable_inbox_tracking('m', 'messages', event_id_column => 'trace_id')"
        )
    assert "no unique key of its own" in said.message_primary
    assert "more than one field" in said.message_primary
    with db.refused("RL032"):
        db.run("select pgtrickle.enable_inbox_tracking('m', 'no_such_table')")


@pytest.mark.parametrize("key", ["unique (event_id) deferrable", "unique (event_id, payload)"])
def test_a_key_that_on_conflict_can_not_use_is_no_unique_key(db: Session, key: str) -> None:
    db.run(f"create table public.messages (event_id text, payload jsonb, {key})")

    with db.refused("RL032") as said:
        db.run("select pgtrickle.enable_inbox_tracking('m', 'messages')")

    assert "no unique key" in said.message_primary


def test_only_the_owner_adopts_a_table(db: Session) -> None:
    db.run("create table public.messages (event_id text primary key, payload jsonb)")
    db.new_role("inbox_stranger", "pgtrickle_relay")
    db.run("set role inbox_stranger")

    with db.refused("RL004"):
        db.run("select pgtrickle.enable_inbox_tracking('m', 'messages')")


def test_names_that_are_taken_are_refused(db: Session) -> None:
    db.run("select pgtrickle.create_inbox('orders_in')")
    db.run("create table pgtrickle.taken (id int)")

    with db.refused("RL031"):
        db.run("select pgtrickle.create_inbox('orders_in')")
    with db.refused("RL031"):
        db.run("select pgtrickle.create_inbox('orders_in', 'public')")
    with db.refused("RL031") as said:
        db.run("select pgtrickle.create_inbox('taken')")
    assert "pgtrickle.taken" in said.message_primary
    with db.refused("22023"):
        db.run("select pgtrickle.create_inbox(repeat('x', 64))")
    with db.refused("22023"):
        db.run("select pgtrickle.create_inbox('odd', retention_hours => -1)")


def test_long_names_get_short_views(db: Session) -> None:
    name = "ü" * 31
    db.run("select pgtrickle.create_inbox(%s)", name)

    (parts,) = db.rows("select parts from pgtrickle.relay_inboxes")[0]
    views = [parts[purpose] for purpose in ("pending", "dlq", "stats")]

    assert len(set(views)) == 3
    assert all(len(view.encode()) <= 63 for view in views)


def test_dropping_removes_table_and_views(db: Session) -> None:
    db.run("select pgtrickle.create_inbox('orders_in')")
    db.run("create view public.mine as select * from pgtrickle.orders_in")
    with db.refused("2BP01"):
        db.run("select pgtrickle.drop_inbox('orders_in')")

    db.run("select pgtrickle.drop_inbox('orders_in', cascade => true)")

    assert db.value("select to_regclass('pgtrickle.orders_in')") is None
    assert db.value("select to_regclass('pgtrickle.pending_orders_in')") is None
    with db.refused("RL030"):
        db.run("select pgtrickle.drop_inbox('orders_in')")
    db.run("select pgtrickle.drop_inbox('orders_in', if_exists => true)")


def test_only_processed_messages_past_retention_are_swept(db: Session) -> None:
    db.run("select pgtrickle.create_inbox('short', retention_hours => 1)")
    db.run("select pgtrickle.create_inbox('forever')")
    for table in ("pgtrickle.short", "pgtrickle.forever"):
        receive(db, table, "old", "older", "young", "waiting")
        db.run(
            f"update {table} set processed_at = now() - case event_id"
            " when 'young' then interval '0'"
            " when 'old' then interval '2 hours' else interval '3 hours' end"
            " where event_id <> 'waiting'"
        )

    (sweep,) = db.rows("select sweep_function from pgtrickle.relay_inbox('short')")[0]
    first = db.value(f"select {sweep}(1)")
    rest = db.value(f"select {sweep}(1000)")

    assert (first, rest) == (1, 1)
    assert db.rows("select event_id from pgtrickle.short order by 1") == [("waiting",), ("young",)]
    assert db.value("select sweep_function from pgtrickle.relay_inbox('forever')") is None


def test_an_inbox_dropped_by_hand_is_shown_as_broken(db: Session) -> None:
    db.run("select pgtrickle.create_inbox('orders_in')")
    db.run("drop table pgtrickle.orders_in cascade")

    assert db.value("select pgtrickle.inbox_health('orders_in') ->> 'status'") == "broken"
    assert "dropped" in db.value("select problem from pgtrickle.inbox_status('orders_in')")
    db.run("select pgtrickle.drop_inbox('orders_in')")
    assert db.rows("select from pgtrickle.inbox_status()") == []


def test_types_are_compared_as_types_and_not_as_they_print(db: Session) -> None:
    db.run(
        "create schema shadow; create domain shadow.text as int; create domain shadow.id as text"
    )
    db.run("create table shadow.wrong (event_id shadow.text primary key, payload jsonb)")
    db.run("create domain shadow.body as jsonb; create domain shadow.deep as shadow.body")
    db.run("create table shadow.fits (event_id shadow.id primary key, payload shadow.deep)")

    with db.refused("RL032") as said:
        db.run("select pgtrickle.enable_inbox_tracking('wrong', 'shadow.wrong')")
    assert "column event_id for event_id is of type integer" in said.message_primary
    db.run("select pgtrickle.enable_inbox_tracking('fits', 'shadow.fits')")
    assert db.value("""select shadow.receive_fits('{a,a,b}', '{1,2,"{}"}')""") == 2


def test_a_partitioned_table_is_swept_by_its_key(db: Session) -> None:
    db.run(
        "create table public.parts (event_id text primary key, payload jsonb, processed_at"
        " timestamptz) partition by hash (event_id)"
    )
    for remainder in range(2):
        db.run(
            f"create table public.parts_{remainder} partition of public.parts"
            f" for values with (modulus 2, remainder {remainder})"
        )
    db.run("select pgtrickle.enable_inbox_tracking('parts', 'parts', retention_hours => 1)")
    db.run(
        "insert into parts select 'e' || g, '{}',"
        " case when g > 10 then now() - interval '1 day' end from generate_series(1, 20) as g"
    )

    assert db.value("select public.sweep_parts(1000)") == 10
    assert db.value("select count(*) from parts where processed_at is null") == 10


def test_readers_see_and_mark_an_inbox_of_ours_and_nothing_more(db: Session) -> None:
    db.new_role("Inbox reader")
    db.run("select pgtrickle.create_inbox('orders_in', readers => array['Inbox reader'])")
    receive(db, "pgtrickle.orders_in", "a", "b")
    db.run('set role "Inbox reader"')

    assert db.value("select pgtrickle.inbox_mark_processed('orders_in', 'a')") is True
    assert db.value("select pgtrickle.inbox_mark_failed('orders_in', 'b', 'e')") is True
    assert db.rows("select event_id, payload from pgtrickle.pending_orders_in") == [("b", {})]
    for statement in (
        "update pgtrickle.orders_in set payload = '1'",
        "delete from pgtrickle.orders_in",
        "select pgtrickle.inbox_status()",
    ):
        with db.refused("42501"):
            db.run(statement)


def test_an_adopted_table_in_a_schema_where_nothing_can_be_created_names_the_grant(
    db: Session,
) -> None:
    db.new_role("Inbox owner", "pgtrickle_relay")
    db.run('create schema "S x"; create table "S x".t (event_id text primary key, payload jsonb)')
    db.run('alter table "S x".t owner to "Inbox owner"; grant usage on schema "S x" to public')
    db.run('set session authorization "Inbox owner"')

    with db.refused("42501") as said:
        db.run("""select pgtrickle.enable_inbox_tracking('t', '"S x".t')""")

    assert said.message_hint == 'grant create on schema "S x" to "Inbox owner";'
