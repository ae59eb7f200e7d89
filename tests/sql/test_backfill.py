"""Rows that were there before their outbox, as `backfill` sends them."""

from __future__ import annotations

import threading
import time
from typing import Any

import psycopg
import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session

MANY_TYPES = """
    create domain little as int check (value < 100);
    create type mood as enum ('sad', 'so so', 'happy');
    create type pair as (a int, b text);
    create table t (id int primary key, f float8, n numeric, at timestamptz, d date, i interval,
        b bytea, u uuid, j jsonb, a text[], m mood, l little, p pair,
        "odd ""name' %s" text, r regclass);
    insert into t values
        (1, 0.1, 12.50, '2026-03-01 12:00+02', '2026-03-01', '1 day 02:03',
            '\\x00ff', gen_random_uuid(), '{"a": [1, null]}', '{a,"b c"}',
            'happy', 7, (1, 'x'), 'text', 't'),
        (2, 'NaN', 'NaN', 'infinity', '-infinity',
            null, null, null, null, null, null, null, null, null, null)
"""
KEYS = {
    "int": "generate_series(-3, 3)",
    "bigint": "9007199254740990 + generate_series(0, 6)",
    "text": "unnest(array['', ' ', 'a', 'A', 'ä', '\"', '\\', '{,}', E'\\n', 'NULL'])",
    "char(3)": "unnest(array['a', 'ab', 'abc', ' a'])",
    "uuid": "gen_random_uuid() from generate_series(1, 5)",
    "timestamptz": "'2026-01-01'::timestamptz + generate_series(0, 4) * '1 us'::interval",
    "float8": "unnest(array[0.1, 0.30000000000000004, 1e300, 'NaN', '-Infinity'])",
    "numeric": "unnest(array[0.1, 0.10000000000000000000000000001, 'NaN', 5])",
    "bytea": "unnest(array['\\x', '\\x00', '\\xff']::bytea[])",
    "colour": "unnest(enum_range(null::colour))",
    "short": "unnest(array['x', 'y', 'z'])",
    "date": "unnest(array['-infinity', '2026-01-01', 'infinity']::date[])",
    "boolean": "unnest(array[true, false])",
}


def events(db: Session, outbox: str) -> list[dict[str, Any]]:
    rows = db.rows(f'select payload from pgtrickle."{outbox}" order by id')
    return [row[0] for row in rows]


def test_a_row_that_was_there_is_told_as_a_captured_one(any_migrated_database: Database) -> None:
    with session(any_migrated_database.dsn) as db:
        db.run(MANY_TYPES.replace("%s", "%%"))
        for settings in ("", ", claim_check_rows => 1"):
            db.run(f"select pgtrickle.enable_outbox('t'{settings})")
            db.run("set timezone = 'Asia/Tokyo'; set datestyle = 'German'")

            db.run("call pgtrickle.backfill('t')")
            db.run("update t set id = id")

            sent, captured = events(db, "outbox_t")
            if settings:
                sent["inserted"], captured["inserted"] = (
                    [
                        row[0]
                        for row in db.rows(
                            "select row_data from pgtrickle.outbox_delta_rows_t where row_op ="
                            " 'INSERT' and outbox_id = %s order by row_num", number,
                        )
                    ]
                    for (number,) in db.rows("select id from pgtrickle.outbox_t order by id")
                )  # fmt: skip
            assert len(sent["inserted"]) == 2
            assert sent["inserted"] == captured["inserted"]
            assert (sent["full_refresh"], sent["backfill"]) == (True, True)
            db.run("select pgtrickle.disable_outbox('t')")


def test_each_row_is_sent_once_whatever_its_key(any_migrated_database: Database) -> None:
    with session(any_migrated_database.dsn) as db:
        db.run("create type colour as enum ('red', 'green', 'blue'); create domain short as text")
        for number, (kind, values) in enumerate(KEYS.items()):
            table = f'"t{number} %% ""{kind}"'
            db.run(
                f"create table {table} (n int not null default 1, k {kind}, primary key (k, n));"
                f"insert into {table} (k) select {values}; analyze {table}"
            )
            outbox = db.value("select pgtrickle.enable_outbox(%s)", table)
            rows = db.value(f"select count(*) from {table}")

            db.run("call pgtrickle.backfill(%s, chunk_rows => 2)", table)

            sent = [
                row["k"]
                for event in events(db, outbox.replace('"', '""'))
                for row in event["inserted"]
            ]
            there = db.rows(f"select to_jsonb(t) -> 'k' from {table} as t order by k")
            assert sent == [row[0] for row in there], kind
            assert db.rows(
                "select state, sent_rows, estimated_rows from pgtrickle.backfill_progress"
                " order by started_at desc limit 1"
            ) == [("finished", rows, rows)]


def test_a_filter_and_a_pipeline_say_which_rows_go_to_whom(any_migrated_database: Database) -> None:
    with session(any_migrated_database.dsn) as db:
        db.run(
            "create table t (id int primary key, note text);"
            "insert into t select i, 'note ' || i from generate_series(1, 9) as i;"
            "select pgtrickle.enable_outbox('t');"
            "select pgtrickle.set_relay_outbox('one', 't', '{\"type\": \"stdout\"}');"
            "select pgtrickle.create_consumer_group('g', 'outbox_t', 'earliest')"
        )
        db.run(
            "call pgtrickle.backfill('t', 'one', filter => %s)",
            "id % 2 = 0 or note in (select 'note 3') -- even ones, and one",
        )
        (event,) = events(db, "outbox_t")
        assert [row["id"] for row in event["inserted"]] == [2, 3, 4, 6, 8]
        assert event["backfill"] == "one"
        assert db.rows(
            "select inserted_count, is_claim_check, payload from pgtrickle.poll_outbox('g', 'c')"
        ) == [(0, False, {"v": 1, "inserted": [], "deleted": []})]
        assert db.rows("select pipeline, is_filtered from pgtrickle.backfill_progress") == [
            ("one", True)
        ]


def test_what_keeps_a_table_from_being_backfilled_is_said(any_migrated_database: Database) -> None:
    with session(any_migrated_database.dsn) as db:
        db.run(
            "create table bare (id int unique); select pgtrickle.enable_outbox('bare');"
            "create table parent (id int primary key); create table child () inherits (parent);"
            "select pgtrickle.enable_outbox('parent');"
            "create table t (id int primary key); insert into t values (1);"
            "select pgtrickle.enable_outbox('free', capture => 'none')"
        )
        db.run("select pgtrickle.enable_outbox('t')")
        for call, state, said in (
            ("'nowhere'", "RL003", "no outbox"),
            ("'free'", "55000", "no table is captured"),
            ("'bare'", "55000", "no primary key"),
            ("'parent'", "55000", "no primary key"),
            ("'t', 'nobody'", "RL011", "no pipeline"),
            ("'t', chunk_rows => 0", "22023", "0 rows"),
            ("'t', chunk_rows => null", "22023", "null rows"),
            ("'t', filter => 'nothing = 1'", "42703", "nothing"),
            ("null", "RL003", "no outbox"),
        ):
            with db.refused(state) as refusal:
                db.run(f"call pgtrickle.backfill({call})")
            assert said in refusal.message_primary
        with db.refused("2D000"):
            db.run("select 1; call pgtrickle.backfill('t')")
        db.run("alter table bare alter id set not null")
        db.run("call pgtrickle.backfill('bare')")
        trigger = db.value(
            "select tgname from pg_trigger where tgrelid = 't'::regclass and tgname like '%update'"
        )
        db.run(f'alter table t disable trigger "{trigger}"')
        with db.refused("55000") as refusal:
            db.run("call pgtrickle.backfill('t')")
        assert "repair_outbox" in refusal.message_hint
        db.run("select pgtrickle.repair_outbox('t')")
        db.run("call pgtrickle.backfill('t')")


def test_that_rows_were_there_is_said_until_they_are_sent(any_migrated_database: Database) -> None:
    with session(any_migrated_database.dsn) as db:
        db.run("create table t (id int primary key); create table empty (id int primary key)")
        db.run("insert into t values (1)")
        set_pipeline = 'select pgtrickle.set_relay_outbox(%s, %s, \'{"type": "stdout"}\'::jsonb)'

        db.run("select pgtrickle.enable_outbox('empty')")
        db.run("insert into empty values (1)")
        db.run(set_pipeline, "empty", "empty")
        assert db.notices == []
        db.run("select pgtrickle.enable_outbox('t')")
        db.run(set_pipeline, "one", "t")
        db.run(set_pipeline, "one", "t")
        assert [said.split(" ")[0] for said in db.notices] == ["public.t"] * 2
        db.run("call pgtrickle.backfill('t')")
        db.run(set_pipeline, "two", "t")
        assert len(db.notices) == 2


def test_a_call_that_was_interrupted_goes_on_and_another_takes_over(
    any_migrated_database: Database,
) -> None:
    dsn = any_migrated_database.dsn
    with session(dsn) as db, session(dsn) as writer, session(dsn) as first, session(dsn) as second:
        db.run(
            "create table t (id int primary key); insert into t select generate_series(1, 9);"
            "select pgtrickle.enable_outbox('t')"
        )
        writer.run("begin; select from t where id = 4 for update")
        failures: list[str | None] = []
        calls = [
            threading.Thread(target=_call, args=(opened, failures)) for opened in (first, second)
        ]
        calls[0].start()
        _until(db, "select sent_rows = 3 from pgtrickle.backfill_progress")
        calls[1].start()
        calls[0].join(30)
        assert failures == ["RL004"]
        state = "select state from pgtrickle.backfill_progress"
        assert db.value(state) == "running"
        # As if it had been for so long.
        stand_still = (
            "update pgtrickle.relay_backfills set progressed_at = now() - '1 min'::interval"
        )
        db.run(stand_still)
        assert db.value(state) == "stuck"
        called_by = second.connection.info.backend_pid
        assert db.value("select call_pid from pgtrickle.backfill_progress") == called_by
        db.run("select pg_cancel_backend(%s)", called_by)
        calls[1].join(30)
        assert failures == ["RL004", "57014"]
        db.run(
            "update pgtrickle.relay_backfills set updated_at = now() - '1 min'::interval,"
            " progressed_at = now() - '1 min'::interval"
        )
        assert db.value(state) == "interrupted"
        # In a chunk that takes so long.
        second.run("begin")
        second.run("select from pgtrickle.relay_backfills for update")
        assert db.value(state) == "stuck"
        second.run("rollback")
        writer.run("delete from t where id = 4; commit")

        db.run("call pgtrickle.backfill('t')")

        sent = [row["id"] for event in events(db, "outbox_t") for row in event["inserted"]]
        assert sent == [1, 2, 3, 5, 6, 7, 8, 9]
        assert db.value("select count(*) from pgtrickle.backfill_progress") == 1


@pytest.mark.slow
def test_no_writer_is_ever_the_victim_of_a_deadlock(any_migrated_database: Database) -> None:
    """Each writer locks two rows, the later one first, against the order of a backfill."""
    dsn = any_migrated_database.dsn
    with session(dsn) as db, session(dsn) as loader:
        db.run(
            "create table t (id int primary key, n int default 0);"
            "insert into t select generate_series(1, 200); select pgtrickle.enable_outbox('t')"
        )
        stop = threading.Event()
        failures: list[str | None] = []
        writers = [threading.Thread(target=_write, args=(dsn, n, stop, failures)) for n in range(3)]
        for writer in writers:
            writer.start()
        loader.run("set deadlock_timeout = '10ms'")
        until = time.monotonic() + 2
        while time.monotonic() < until:
            loader.run("call pgtrickle.backfill('t', chunk_rows => 100)")
        stop.set()
        for writer in writers:
            writer.join(30)
        assert failures == []
        rows: dict[int, int] = {}
        for event in events(db, "outbox_t"):
            rows |= {row["id"]: row["n"] for row in event["inserted"]}
        assert rows == dict(db.rows("select id, n from t"))


def _call(opened: Session, failures: list[str | None]) -> None:
    try:
        opened.run("call pgtrickle.backfill('t', chunk_rows => 1)")
    except psycopg.Error as error:
        failures.append(error.sqlstate)


def _write(dsn: str, number: int, stop: threading.Event, failures: list[str | None]) -> None:
    with session(dsn) as db:
        db.run("set deadlock_timeout = '10ms'")
        high, low = 100 + number, 10 + number
        while not stop.is_set():
            try:
                db.run(
                    f"begin; update t set n = n + 1 where id = {high};"
                    f"update t set n = n + 1 where id = {low}; commit"
                )
            except psycopg.Error as error:
                failures.append(error.sqlstate)
                return


def _until(db: Session, question: str) -> None:
    deadline = time.monotonic() + 30
    while db.rows(question) != [(True,)]:
        assert time.monotonic() < deadline, question
