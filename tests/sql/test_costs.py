"""What each relay asks every few seconds costs what its own pipelines cost, in pages read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session

LETTERS = 30_000
STDOUT = """'{"type": "stdout"}'"""


@pytest.fixture
def db(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run("select pgtrickle.enable_outbox('events', capture => 'none')")
        opened.run(f"select pgtrickle.set_relay_outbox('many', 'events', {STDOUT})")
        yield opened


@pytest.fixture
def letters(db: Session) -> Session:
    for pipeline, count in (("many", LETTERS), ("few", 3)):
        db.run(
            "insert into pgtrickle.relay_dlq"
            " (relay_group_id, pipeline, direction, dedup_key, payload, metadata, error_kind,"
            " error) select 'default', %s, 'forward', 'key-' || g,"
            " convert_to(repeat('x', 200), 'UTF8'), jsonb_build_object('outbox_id', g),"
            " 'rejected', 'no' from generate_series(1, %s) as g",
            pipeline,
            count,
        )
    db.run("vacuum analyze pgtrickle.relay_dlq")
    return db


def pages(db: Session, query: str) -> int:
    """Pages that a query reads, from memory or not, once everything it plans is known."""
    db.rows(query)
    (plan,) = db.value(f"explain (analyze, buffers, format json) {query}")
    return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])


def size(db: Session, table: str) -> int:
    return int(db.value("select pg_total_relation_size(%s::regclass)", f"pgtrickle.{table}"))


def test_asking_for_all_dead_letters_again_rewrites_none_of_them(letters: Session) -> None:
    stats = "select * from pgtrickle.relay_dlq_stats()"
    before, counting = size(letters, "relay_dlq"), pages(letters, stats)

    assert letters.value("select pgtrickle.relay_dlq_retry_all('many')") == LETTERS
    asked = size(letters, "relay_dlq_retries")
    assert letters.value("select pgtrickle.relay_dlq_retry_all('many')") == LETTERS

    assert size(letters, "relay_dlq") == before
    assert size(letters, "relay_dlq_retries") == asked < before / 2
    # Index pages of the letters, and what was asked for: never the letters themselves.
    assert pages(letters, stats) < counting + 2 * asked / 8192 < before / 8192


def test_counting_the_dead_letters_of_some_pipelines_reads_those_of_no_other(
    letters: Session,
) -> None:
    own = pages(letters, "select * from pgtrickle.relay_dlq_stats('{few}')")
    everything = pages(letters, "select * from pgtrickle.relay_dlq_stats()")

    assert own * 5 < everything
    assert letters.rows(
        "select pipeline, entries from pgtrickle.relay_dlq_stats('{few, none}')"
    ) == [("few", 3)]


def test_what_relays_ask_of_dead_letters_costs_no_more_for_many_of_them(letters: Session) -> None:
    counted = "select entries from pgtrickle.relay_dlq_stats('{many}', 1000)"
    of_a_row = "select * from pgtrickle.relay_delivered('default', 'many', 77)"

    assert pages(letters, counted) * 5 < pages(letters, counted.replace("1000", "null"))
    assert pages(letters, of_a_row) * 5 < size(letters, "relay_dlq_by_pipeline") / 8192
    assert letters.value(counted) == 1000
    assert letters.value(counted.replace("many", "few")) == 3
    assert letters.value(of_a_row.replace("*", "dead_letters")) == 1


def test_the_lag_of_some_pipelines_looks_at_no_outbox_of_another(db: Session) -> None:
    db.run(
        "select pgtrickle.enable_outbox('o' || g, capture => 'none')"
        " from generate_series(1, 100) as g"
    )
    db.run(
        f"select pgtrickle.set_relay_outbox('q' || g, 'o' || g, {STDOUT}::jsonb)"
        " from generate_series(1, 100) as g"
    )

    some = pages(db, "select * from pgtrickle.relay_lag('default', '{q7,q8}')")
    everything = pages(db, "select * from pgtrickle.relay_lag('default')")

    assert some * 5 < everything


def test_what_is_wrong_with_capture_is_asked_once_of_each_table(db: Session) -> None:
    for table in ("a", "b", "c"):
        db.run(f"create table {table} (id int primary key, note text)")
        db.run(f"select pgtrickle.enable_outbox('{table}')")

    db.run("begin")
    db.run("set local track_functions = 'all'")
    assert not db.rows("select * from pgtrickle.relay_capture_problems()")
    calls = dict(db.rows("select funcname, calls from pg_stat_xact_user_functions"))
    db.run("rollback")

    assert calls["relay_captured_table"] <= 3
    assert calls["relay_function_problem"] <= 3 * 2
    assert calls["relay_capture_mode"] <= 3 * 2
