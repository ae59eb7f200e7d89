"""Putting a pipeline where an outbox is to be read from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session

SEEK = "select pgtrickle.relay_seek('p', %s)"
POSITION = (
    "select last_change_id, epoch, worker_id from pgtrickle.relay_consumer_offsets"
    " where pipeline_id = 'p'"
)
GAPS = (
    "select first_id, last_id from pgtrickle.relay_pending_gaps where pipeline_id = 'p' order by 1"
)


@pytest.fixture
def db(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run("select pgtrickle.enable_outbox('events', capture => 'none')")
        opened.run("""select pgtrickle.set_relay_outbox('p', 'events', '{"type": "stdout"}')""")
        opened.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w')")
        yield opened


def publish(db: Session, rows: int = 1) -> None:
    for _ in range(rows):
        db.run("""select pgtrickle.outbox_publish('events', '[{"a": 1}]')""")


def sweep_through(db: Session, id_: int) -> None:
    """As if retention had come that far."""
    db.run(
        "update pgtrickle.pgt_outbox_config set swept_through = %s, swept_created_at ="
        " (select max(created_at) from pgtrickle.outbox_events where id <= %s)",
        id_, id_,
    )  # fmt: skip
    db.run("delete from pgtrickle.outbox_events where id < %s", id_)


def test_each_kind_of_place_and_how_many_rows_are_sent_from_there(db: Session) -> None:
    publish(db, 5)
    third = db.value("select created_at::text from pgtrickle.outbox_events where id = 3")
    for to, rows, behind in (
        ("earliest", 5, 0), ("latest", 0, 5), ("2", 4, 1), ("6", 0, 5), (third, 3, 2),
        ("infinity", 0, 5), ("-infinity", 5, 0),
    ):  # fmt: skip
        assert db.value(SEEK, to) == rows, to
        assert db.rows(POSITION)[0][0] == behind, to
    assert db.value("select pgtrickle.relay_seek('p', 2)") == 4
    assert db.value("select pgtrickle.relay_seek('p', %s::timestamptz)", third) == 3
    assert "goes on behind id 2: 3 rows" in db.notices[-1]
    assert db.rows(POSITION) == [(2, 10, None)]
    with db.refused("RL020"):
        db.run("select pgtrickle.relay_commit('default', 'p', 1, 5)")


def test_what_is_not_committed_at_that_moment_becomes_a_gap(db: Session) -> None:
    publish(db, 2)
    with session(db.dsn) as other:
        other.run("begin")
        publish(other, 2)
        publish(db, 2)
        db.run(SEEK, "latest")
        other.run("commit")
    assert db.rows(POSITION)[0][0] == 6
    assert db.rows(GAPS) == [(3, 4)]
    db.run(SEEK, "earliest")
    assert db.rows(GAPS) == []


def test_where_retention_has_swept_only_what_is_left_can_be_sent(db: Session) -> None:
    publish(db, 5)
    swept = db.value("select created_at::text from pgtrickle.outbox_events where id = 3")
    sweep_through(db, 3)
    for to in ("2", "3", swept, "-infinity"):
        with db.refused("RL006") as said:
            db.run(SEEK, to)
        assert "to 3 of outbox" in said.message_primary
    # Row 3 was left, since a reader waits for it.
    assert db.value(SEEK, "earliest") == 3
    assert (db.rows(POSITION)[0][0], db.rows(GAPS)) == (3, [(1, 3)])
    assert db.value(SEEK, "4") == 2
    after = db.value("select created_at::text from pgtrickle.outbox_events where id = 5")
    assert db.value(SEEK, after) == 1


def test_nothing_is_swept_while_a_position_is_being_put_before_it(db: Session) -> None:
    publish(db, 3)
    db.run("update pgtrickle.outbox_events set created_at = now() - interval '2 days'")
    db.run("select pgtrickle.relay_seek('p', 'latest')")
    with session(db.dsn) as other:
        other.run("begin")
        assert other.value("select pgtrickle.relay_seek('p', 'earliest')") == 3
        assert db.value("select pgtrickle.relay_sweep_outbox('outbox_events')") == 0
        other.run("commit")
    assert db.value("select pgtrickle.relay_sweep_outbox('outbox_events')") == 0
    db.run("select pgtrickle.relay_seek('p', 'latest')")
    assert db.value("select pgtrickle.relay_sweep_outbox('outbox_events')") == 3
    with db.refused("RL006"):
        db.run("select pgtrickle.relay_seek('p', now() - interval '3 days')")


def test_a_place_that_there_is_not_is_refused(db: Session) -> None:
    publish(db, 2)
    for to in ("0", "4", "soon", "", "99999999999999999999", None):
        with db.refused("22023"):
            db.run(SEEK, to)
    with db.refused("22023"):
        db.run("select pgtrickle.relay_seek('p', 'latest', 'nobody')")
    with db.refused("RL011"):
        db.run("select pgtrickle.relay_seek('q', 'latest')")
    db.run(
        """select pgtrickle.set_relay_inbox('in', '{"source": {"type": "stdin"},
        "sink": {"inbox": "i"}}')"""
    )
    with db.refused("22023") as said:
        db.run("select pgtrickle.relay_seek('in', 'latest')")
    assert "reads no outbox" in said.message_primary


def test_a_paused_pipeline_that_never_ran_starts_where_it_was_put(db: Session) -> None:
    publish(db, 3)
    db.run("""select pgtrickle.set_relay_outbox('q', 'events', '{"type": "stdout"}')""")
    db.run("select pgtrickle.disable_relay('q')")
    db.run("select pgtrickle.relay_seek('q', 3)")

    claimed = db.value(
        "select last_change_id from pgtrickle.relay_claim('default', 'q', 'outbox_events', 'w')"
    )
    assert claimed == 2


def test_all_readers_of_a_pipeline_with_partitions_are_moved(db: Session) -> None:
    publish(db, 3)
    db.run(
        """select pgtrickle.set_relay_outbox('many', '{"source": {"outbox": "events"},
        "sink": {"type": "stdout"}, "partitions": 3}')"""
    )
    claim = "select pgtrickle.relay_claim('default', %s, 'outbox_events', 'w', %s)"
    partitioning = db.value(
        "select pgtrickle.relay_partitioning(config)::text from pgtrickle.relay_outbox_config"
        " where name = 'many'"
    )
    for _ in range(2):
        assert db.value("select pgtrickle.relay_seek('many', 3)") == 1
        db.run(claim, "many/2", partitioning)
    assert db.rows(
        "select pipeline_id, last_change_id from pgtrickle.relay_consumer_offsets"
        " where pipeline = 'many' order by 1"
    ) == [("many/1", 2), ("many/2", 2), ("many/3", 2)]


def test_a_consumer_group_loses_its_leases_and_keeps_what_is_open_as_gaps(db: Session) -> None:
    publish(db, 2)
    db.run("""select pgtrickle.set_relay_outbox('g', 'events', 'sharers', '{"type": "stdout"}')""")
    db.run(
        "select pgtrickle.relay_group_join('sharers', 'g', 'default', 'outbox_events', 'c', 'fail')"
    )
    polled = "select outbox_id from pgtrickle.poll_outbox('sharers', 'c', 10) order by 1"
    assert db.rows(polled) == [(1,), (2,)]
    with session(db.dsn) as other:
        other.run("begin")
        publish(other)
        publish(db)
        assert db.value("select pgtrickle.relay_seek('g', 'latest')") == 0
        with db.refused("RL021"):
            db.run("select pgtrickle.commit_offset('sharers', 'c', 2)")
        assert db.rows(polled) == []
        other.run("commit")
    assert db.rows(polled) == [(3,)]
    assert db.value("select pgtrickle.relay_seek('g', 'earliest')") == 4
    assert db.rows(polled) == [(1,), (2,), (3,), (4,)]
    with db.refused("22023"):
        db.run("select pgtrickle.relay_seek('g', 'latest', 'another')")


def test_who_sought_and_how_far_it_is_is_told(db: Session) -> None:
    publish(db, 5)
    db.run("""select pgtrickle.set_relay_outbox('g', 'events', 'sharers', '{"type": "stdout"}')""")
    db.run(
        "select pgtrickle.relay_group_join('sharers', 'g', 'default', 'outbox_events', 'c', 'fail')"
    )
    told = (
        "select sought_to, sought_by = session_user, after_id, through_id, reached_id"
        " from pgtrickle.relay_seek_progress('default') where pipeline = %s"
    )
    for pipeline in ("p", "g"):
        db.run("select pgtrickle.relay_seek(%s, 'earliest')", pipeline)
        db.run("select pgtrickle.relay_seek(%s, 3)", pipeline)
        assert db.rows(told, pipeline) == [("3", True, 2, 5, 2)]
    # What comes later is not of it.
    publish(db, 2)
    for position, reached in ((4, 4), (7, 5)):
        epoch = db.rows(POSITION)[0][1]
        db.run("select pgtrickle.relay_commit('default', 'p', %s, %s)", epoch, position)
        assert db.rows(told, "p") == [("3", True, 2, 5, reached)]
    db.run("select pgtrickle.poll_outbox('sharers', 'c', 10)")
    db.run("select pgtrickle.commit_offset('sharers', 'c', 7)")
    assert db.rows(told, "g") == [("3", True, 2, 5, 5)]

    db.run("select pgtrickle.delete_relay('g')")
    db.run("select pgtrickle.relay_forget_group('default')")
    assert db.value("select count(*) from pgtrickle.relay_seeks") == 0
