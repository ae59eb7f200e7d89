"""Retention: what a reader still reads stays, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session

PIPELINE = (
    "select pgtrickle.set_relay_outbox('p',"
    """ '{"source": {"outbox": "events"}, "sink": {"type": "stdout"}}')"""
)


@pytest.fixture
def db(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run(
            "select pgtrickle.enable_outbox('events', retention_hours => 0, capture => 'none')"
        )
        yield opened


@pytest.fixture
def other(db: Session, any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        yield opened


def write(db: Session, rows: int = 1) -> None:
    db.run(
        "insert into pgtrickle.outbox_events (payload) select '{}' from generate_series(1, %s)",
        rows,
    )


def sweep(db: Session, rows: int = 1000) -> int:
    return int(db.value("select pgtrickle.relay_sweep_outbox('outbox_events', %s)", rows))


def left(db: Session) -> list[int]:
    return [row[0] for row in db.rows("select id from pgtrickle.outbox_events order by id")]


def test_a_group_made_at_latest_holds_back_only_what_it_will_read(
    db: Session, other: Session
) -> None:
    db.run("begin")
    write(db)
    db.run("rollback")
    write(db, 2)
    other.run("begin")
    write(other)
    write(db, 2)
    db.run("select pgtrickle.create_consumer_group('g', 'events')")

    swept = sweep(db)
    other.run("commit")
    write(db)
    swept_later = sweep(db)

    assert (swept, swept_later) == (4, 0)
    rows = db.rows("select outbox_id from pgtrickle.poll_outbox('g', 'one')")
    assert [row[0] for row in rows] == left(db) == [4, 7]


def test_rows_in_the_hands_of_consumers_or_released_stay(db: Session) -> None:
    write(db, 9)
    db.run("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
    tokens = [
        db.value("select lease_token from pgtrickle.poll_outbox('g', %s, 3)", name)
        for name in ("one", "two", "three")
    ]
    assert sweep(db) == 0

    db.run("select pgtrickle.commit_offset('g', 'one', 3)")
    db.run("select pgtrickle.commit_offset('g', 'three', 9)")
    assert sweep(db) == 3
    db.run("select pgtrickle.relay_group_release('g', %s)", tokens[1])
    assert sweep(db) == 0
    assert left(db) == [4, 5, 6, 7, 8, 9]
    db.run("select pgtrickle.drop_consumer_group('g')")
    assert sweep(db) == 6


def test_a_relay_group_that_is_gone_holds_back_nothing_once_it_is_forgotten(db: Session) -> None:
    write(db, 5)
    db.run(PIPELINE)
    for group, last in (("old", 1), ("new", 5)):
        db.run("select pgtrickle.relay_claim(%s, 'p', 'outbox_events', 'w')", group)
        db.run("select pgtrickle.relay_commit(%s, 'p', 1, %s, '{}', '{1}', '{1}')", group, last)
        db.run("select pgtrickle.relay_cursor_set(%s, 'p', 1, 'f', '{}')", group)
    db.run("select pgtrickle.relay_commit('new', 'p', 1, 5, '{1}')")
    assert sweep(db) == 0

    db.run("select pgtrickle.relay_report('old', 'w', '{}')")
    with db.refused("RL024") as said:
        db.run("select pgtrickle.relay_forget_group('old')")
    db.run("select pgtrickle.relay_retire('old', 'w')")
    forgotten = db.value("select pgtrickle.relay_forget_group('old')")

    assert "Stop its relays" in said.message_hint
    assert (forgotten, sweep(db)) == (1, 5)
    for table in ("consumer_offsets", "cursors", "pending_gaps"):
        assert db.rows(
            f"select count(*) from pgtrickle.relay_{table} where relay_group_id = 'old'"
        ) == [(0,)]
    assert db.value("select pgtrickle.relay_forget_group('old')") == 0


def test_delta_rows_go_with_their_row(db: Session) -> None:
    write(db, 3)
    db.run(
        "insert into pgtrickle.outbox_delta_rows_events"
        " select id, n, 'INSERT', '{}' from generate_series(1, 3) as id, generate_series(0, 2) as n"
    )

    assert sweep(db, 2) == 2

    assert db.rows("select distinct outbox_id from pgtrickle.outbox_delta_rows_events") == [(3,)]


def test_a_sweep_behind_a_lagging_reader_reads_only_what_it_may_delete(db: Session) -> None:
    write(db, 20000)
    db.run(PIPELINE)
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w')")
    db.run("select pgtrickle.relay_commit('default', 'p', 1, 10)")
    db.run("analyze pgtrickle.outbox_events")

    before = rows_read(db)
    swept = sweep(db)
    after = rows_read(db)

    assert swept == 10
    assert after - before < 100


def rows_read(db: Session) -> int:
    db.run("select pg_stat_force_next_flush()")
    found = db.value(
        "select to_jsonb(s) from pg_stat_user_tables as s where relname = 'outbox_events'"
    )
    assert isinstance(found, dict), json.dumps(found)
    return int(found["seq_tup_read"]) + int(found["idx_tup_fetch"])
