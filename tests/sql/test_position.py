"""Positions of pipelines: ownership epochs, gaps, starts, cursors, lag."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session

COMMIT = (
    "select pgtrickle.relay_commit('default', 'p', %s, %s,"
    " %s::bigint[], %s::bigint[], %s::bigint[])"
)
CLAIM = (
    "select epoch, last_change_id, gap_first_ids, gap_last_ids"
    " from pgtrickle.relay_claim('default', 'p', %s, %s)"
)


@pytest.fixture
def db(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run("select pgtrickle.enable_outbox('events', capture => 'none')")
        yield opened


def publish(db: Session) -> None:
    db.run("""select pgtrickle.outbox_publish('events', '[{"a": 1}]')""")


def test_a_new_position_starts_at_the_earliest_row(db: Session) -> None:
    assert db.rows(CLAIM, "outbox_events", "w1") == [(1, 0, [], [])]


def test_position_and_gaps_are_committed_together_and_come_back_with_the_next_claim(
    db: Session,
) -> None:
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w1')")

    db.run(COMMIT, 1, 20, [], [3, 7], [5, 7])
    db.run(COMMIT, 1, 30, [3], [4, 25], [4, 28])

    assert db.rows(CLAIM, "outbox_events", "w2") == [(2, 30, [4, 7, 25], [4, 7, 28])]


def test_a_commit_repeated_after_a_lost_answer_changes_nothing(db: Session) -> None:
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w1')")
    for _ in range(2):
        db.run(COMMIT, 1, 20, [], [3], [5])

    assert db.rows(CLAIM, "outbox_events", "w1") == [(2, 20, [3], [5])]


def test_a_position_never_goes_back(db: Session) -> None:
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w1')")
    db.run(COMMIT, 1, 20, [], [], [])
    db.run(COMMIT, 1, 10, [], [], [])

    assert db.rows(CLAIM, "outbox_events", "w1") == [(2, 20, [], [])]


def test_who_lost_the_pipeline_can_write_nothing(db: Session) -> None:
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w1')")
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w2')")

    with db.refused("RL020") as said:
        db.run(COMMIT, 1, 20, [], [1], [1])
    assert "owned by w2" in said.message_primary
    with db.refused("RL020"):
        db.run("select pgtrickle.relay_commit('default', 'p', 1, 5, p_is_reset => true)")
    with db.refused("RL020"):
        db.run("select pgtrickle.relay_cursor_set('default', 'p', 1, 'file', '{}')")
    db.run("select pgtrickle.relay_release('default', 'p', 1)")
    assert db.rows(CLAIM, "outbox_events", "w3") == [(3, 0, [], [])]
    db.run("select pgtrickle.relay_release('default', 'p', 3)")
    assert db.value("select worker_id from pgtrickle.relay_consumer_offsets") is None


def test_another_outbox_starts_a_new_position(db: Session) -> None:
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w1')")
    db.run(COMMIT, 1, 20, [], [3], [5])

    assert db.rows(CLAIM, "outbox_others", "w1") == [(3, 0, [], [])]


def test_reset_moves_anywhere_and_forgets_the_gaps(db: Session) -> None:
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w1')")
    db.run(COMMIT, 1, 20, [], [3], [5])

    db.run("select pgtrickle.relay_commit('default', 'p', 1, 2, p_is_reset => true)")

    assert db.rows(CLAIM, "outbox_events", "w1") == [(2, 2, [], [])]


def test_latest_starts_behind_what_is_visible_and_owes_what_is_being_written(
    db: Session, any_migrated_database: Database
) -> None:
    publish(db)
    with session(any_migrated_database.dsn) as writer:
        writer.run("begin")
        publish(writer)
        publish(db)
        db.run(
            "select pgtrickle.set_relay_outbox('p',"
            """ '{"source": {"outbox": "events"}, "sink": {"type": "stdout"},"""
            """ "start": "latest"}')"""
        )
        writer.run("commit")
    publish(db)
    # Set again before it ran: it still owes what came meanwhile.
    db.run(
        "select pgtrickle.set_relay_outbox('p',"
        """ '{"source": {"outbox": "events"}, "sink": {"type": "stdout"}, "start": "latest"}')"""
    )

    assert db.rows(CLAIM, "outbox_events", "w1") == [(1, 3, [2], [2])]


def test_each_relay_group_has_its_own_position(db: Session) -> None:
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w1')")
    db.run(COMMIT, 1, 20, [], [], [])

    rows = db.rows(
        "select last_change_id from pgtrickle.relay_claim('blue', 'p', 'outbox_events', 'w')"
    )

    assert rows == [(0,)]


def test_a_reverse_pipeline_has_an_epoch_and_a_cursor_of_its_source(db: Session) -> None:
    assert db.rows(CLAIM, None, "w1") == [(1, 0, [], [])]
    assert db.rows(CLAIM, None, "w1") == [(2, 0, [], [])]
    assert db.value("select pgtrickle.relay_cursor_get('default', 'p', 'file')") is None

    for offset in (5, 9):
        db.run(
            "select pgtrickle.relay_cursor_set('default', 'p', 2, 'file', %s::jsonb)",
            f'{{"offset": {offset}}}',
        )

    assert db.value("select pgtrickle.relay_cursor_get('default', 'p', 'file')") == {"offset": 9}


def test_a_commit_is_one_indexed_write_with_a_million_gaps_present(db: Session) -> None:
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w1')")
    db.run(
        "insert into pgtrickle.relay_pending_gaps"
        " select 'default', 'p', 2 * i, 2 * i from generate_series(1, 1000000) as i"
    )
    db.run("analyze pgtrickle.relay_pending_gaps")
    db.run("set statement_timeout = '100ms'")

    for step in range(20):
        opened = 3_000_000 + step
        db.run(COMMIT, 1, 2_000_001 + step, [2 * (step + 1)], [opened], [opened])

    db.run("reset statement_timeout")
    assert db.value("select count(*) from pgtrickle.relay_pending_gaps") == 1_000_000


def test_lag_counts_from_the_position_and_names_the_oldest_unsent_row(db: Session) -> None:
    for _ in range(3):
        publish(db)
    for name, group in (("p", "null"), ("grouped", '"g"')):
        db.run(
            "select pgtrickle.set_relay_outbox(%s, %s::jsonb)",
            name,
            f'{{"source": {{"outbox": "events", "consumer_group": {group}}},'
            ' "sink": {"type": "stdout"}}',
        )
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w1')")
    db.run(COMMIT, 1, 2, [], [1], [1])

    rows = db.rows(
        "select pipeline, last_change_id, max_outbox_id, lag_rows, pending_gaps, worker_id,"
        " oldest_unsent_at = (select created_at from pgtrickle.outbox_events"
        " where id = last_change_id + 1)"
        " from pgtrickle.relay_lag('default')"
    )

    assert rows == [("grouped", 0, 3, 3, 0, None, True), ("p", 2, 3, 1, 1, "w1", True)]


def test_a_row_is_delivered_when_all_readers_are_behind_it_and_it_is_no_gap(db: Session) -> None:
    for _ in range(3):
        publish(db)
    sink = '"sink": {"type": "stdout"}'
    for name, source, more in (
        ("p", '"outbox": "events"', ""),
        ("parted", '"outbox": "events"', ', "partitions": 2'),
        ("grouped", '"outbox": "events", "consumer_group": "g"', ""),
    ):
        db.run(
            "select pgtrickle.set_relay_outbox(%s, %s::jsonb)",
            name,
            f'{{"source": {{{source}}}, {sink}{more}}}',
        )

    def settled(name: str) -> list[tuple[object, ...]]:
        return [
            db.rows(
                "select is_settled, dead_letters from pgtrickle.relay_delivered('default', %s, %s)",
                name,
                number,
            )
            for number in (1, 2, 3)
        ]

    assert settled("nobody") == [[], [], []]
    assert settled("p") == [[(False, 0)]] * 3
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w1')")
    db.run(COMMIT, 1, 2, [], [1], [1])
    assert settled("p") == [[(False, 0)], [(True, 0)], [(False, 0)]]

    for reader in ("parted/1", "parted/2"):
        db.run(
            "insert into pgtrickle.relay_consumer_offsets"
            " (relay_group_id, pipeline_id, last_change_id) values ('default', %s, %s)",
            reader,
            int(reader[-1]),
        )
    assert settled("parted") == [[(True, 0)], [(False, 0)], [(False, 0)]]

    polled = db.rows("select lease_token from pgtrickle.poll_outbox('g', 'c', 2)")
    assert settled("grouped") == [[(False, 0)]] * 3
    db.run("select pgtrickle.commit_offset('g', 'c', 1, %s)", polled[0][0])
    assert settled("grouped") == [[(True, 0)], [(False, 0)], [(False, 0)]]
    db.run("select pgtrickle.relay_group_release('g', %s)", polled[0][0])
    assert settled("grouped") == [[(True, 0)], [(False, 0)], [(False, 0)]]


def test_a_pipeline_whose_outbox_is_gone_hides_no_other_lag(db: Session) -> None:
    db.run(
        "insert into pgtrickle.relay_outbox_config (name, config)"
        """ values ('broken', '{"source": {"outbox": "nothing"}}'), ('nonsense', '17')"""
    )
    db.run("select pgtrickle.set_relay_outbox('p', 'events', null, '{\"type\": \"stdout\"}')")

    rows = db.rows("select pipeline, lag_rows from pgtrickle.relay_lag('default')")

    assert rows == [("broken", None), ("nonsense", None), ("p", 0)]
