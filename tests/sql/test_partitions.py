"""Positions of pipelines with partitions: one for each reader, brought together when N changes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from relay.partition import key_hash, partitions_of
from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session

LOCK = 4711
NATS = {"type": "nats", "url": "nats://localhost", "subject_template": "s"}


@pytest.fixture
def db(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run("select pgtrickle.enable_outbox('events', capture => 'none')")
        yield opened


def deal(db: Session, partitions: int, **keys: object) -> str:
    """Set the pipeline to so many readers; their partitioning."""
    config = {"source": {"outbox": "events"}, "sink": NATS, "partitions": partitions, **keys}
    db.run("select pgtrickle.set_relay_outbox('p', %s::jsonb)", json.dumps(config))
    dealt = db.value("select pgtrickle.relay_partitioning(pgtrickle.get_relay_config('p'))")
    return json.dumps(dealt)


def claim(db: Session, reader: str, dealt: str, group: str = "default") -> tuple[object, ...]:
    (row,) = db.rows(
        "select epoch, last_change_id, gap_first_ids, gap_last_ids"
        " from pgtrickle.relay_claim(%s, %s, 'outbox_events', 'w', %s::jsonb)",
        group,
        reader,
        dealt,
    )
    return row


def commit(db: Session, reader: str, epoch: object, last: int, *gaps: tuple[int, int]) -> None:
    db.run(
        "select pgtrickle.relay_commit('default', %s, %s, %s, '{}', %s::bigint[], %s::bigint[])",
        reader,
        epoch,
        last,
        [first for first, _ in gaps],
        [last_id for _, last_id in gaps],
    )


def repartition(db: Session, dealt: str) -> bool:
    done: bool = db.value(
        "select pgtrickle.relay_repartition('default', 'p', %s::jsonb, %s)", dealt, LOCK
    )
    return done


def waiting(db: Session) -> list[object]:
    return [name for (name,) in db.rows("select pgtrickle.relay_to_repartition('default')")]


def positions(db: Session) -> list[tuple[object, ...]]:
    return db.rows(
        "select pipeline_id, last_change_id,"
        " array(select array[g.first_id, g.last_id] from pgtrickle.relay_pending_gaps as g"
        "  where g.pipeline_id = o.pipeline_id order by 1)"
        " from pgtrickle.relay_consumer_offsets as o order by pipeline_id"
    )


def test_readers_have_a_position_each_and_retention_waits_for_all_from_the_first_claim(
    db: Session,
) -> None:
    dealt = deal(db, 3)
    for _ in range(10):
        db.run("select pgtrickle.outbox_publish('events', '[{}]')")

    epochs = {name: claim(db, name, dealt)[0] for name in ("p/1", "p/3")}
    commit(db, "p/1", epochs["p/1"], 8)
    commit(db, "p/3", epochs["p/3"], 6, (2, 3))

    assert positions(db) == [("p/1", 8, []), ("p/2", 0, []), ("p/3", 6, [[2, 3]])]
    assert db.rows(
        "select pipeline_id, reads_above from pgtrickle.relay_outbox_readers('outbox_events')"
        " order by 1"
    ) == [("p/1", 8), ("p/2", 0), ("p/3", 6)]
    lag = "select pipeline, lag_rows, pending_gaps from pgtrickle.relay_lag('default', %s)"
    assert db.rows(lag, ["p"]) == [("p/1", 2, 0), ("p/2", 10, 0), ("p/3", 4, 1)]
    assert db.rows(lag, ["p/3"]) == [("p/3", 4, 1)]
    assert db.rows("select distinct pipeline from pgtrickle.relay_readers()") == [("p",)]
    db.run("select pgtrickle.delete_relay('p')")
    assert positions(db) == []
    assert db.value("select count(*) from pgtrickle.relay_pending_gaps") == 0


def test_a_change_of_partitions_goes_on_where_the_slowest_was_with_the_gaps_of_all(
    db: Session,
) -> None:
    assert claim(db, "p", deal(db, 1)) == (1, 0, [], [])
    commit(db, "p", 1, 100, (10, 20))
    four = deal(db, 4)
    assert waiting(db) == ["p"]
    with db.refused("RL020") as said:
        claim(db, "p/1", four)
    assert "those of other readers" in said.message_primary

    assert repartition(db, four)
    assert repartition(db, four)
    assert waiting(db) == []
    assert positions(db) == [(f"p/{n}", 100, [[10, 20]]) for n in range(1, 5)]
    with db.refused("RL020"):
        claim(db, "p", "{}")
    with db.refused("RL020"):
        commit(db, "p", 1, 200)

    for number, (last, *gaps) in enumerate(
        [(150, (15, 15), (130, 140)), (120, (10, 20), (110, 111)), (125,), (400, (115, 300))], 1
    ):
        epoch = claim(db, f"p/{number}", four)[0]
        db.run(
            "select pgtrickle.relay_commit('default', %s, %s, 100, '{10}')", f"p/{number}", epoch
        )
        commit(db, f"p/{number}", epoch, last, *gaps)
    one = deal(db, 1)
    assert db.rows("select pipeline, last_change_id from pgtrickle.relay_lag('default')") == [
        ("p", None)
    ]
    assert repartition(db, one)
    assert positions(db) == [("p", 120, [[10, 20], [110, 111], [115, 120]])]
    assert claim(db, "p", "{}")[0] > 2


def test_no_reader_of_another_number_is_at_work_when_they_are_brought_together(
    db: Session, any_migrated_database: Database
) -> None:
    two = deal(db, 2)
    epoch = claim(db, "p/1", two)[0]
    commit(db, "p/1", epoch, 50)
    three = deal(db, 3)

    with session(any_migrated_database.dsn) as relay:
        relay.run("select pg_advisory_lock_shared(%s)", LOCK)
        assert not repartition(db, three)
        relay.run("select pg_advisory_unlock_shared(%s)", LOCK)
        relay.run("select pg_advisory_lock(%s)", LOCK)
        assert not repartition(db, three)
    # Who has not learned of the change goes on as before, and can't bring it back.
    commit(db, "p/1", epoch, 60)
    assert claim(db, "p/2", two)[1] == 0
    assert not repartition(db, two)

    assert repartition(db, three)
    assert positions(db) == [(f"p/{n}", 0, []) for n in (1, 2, 3)]
    with db.refused("RL020"):
        commit(db, "p/1", epoch, 70)
    with db.refused("RL020"):
        claim(db, "p/1", two)
    # Back to two: an epoch of the first two readers can't be one of today's.
    assert repartition(db, deal(db, 2))
    with db.refused("RL020"):
        commit(db, "p/1", epoch, 80)
    assert claim(db, "p/1", two)[0] > epoch


def test_other_key_columns_deal_the_keys_otherwise(db: Session) -> None:
    claim(db, "p/1", deal(db, 2))
    assert waiting(db) == []
    deal(db, 2, batch_size=7)
    assert waiting(db) == []
    by_customer = deal(db, 2, key_columns=["customer"])
    assert waiting(db) == ["p"]
    assert repartition(db, by_customer)
    claim(db, "p/1", by_customer)
    deal(db, 1)
    assert waiting(db) == ["p"]


def test_another_outbox_moves_all_readers_at_once_and_none_writes_what_it_did_elsewhere(
    db: Session,
) -> None:
    two = deal(db, 2)
    epochs = [claim(db, f"p/{number}", two)[0] for number in (1, 2)]
    commit(db, "p/2", epochs[1], 50, (3, 4))
    db.run("select pgtrickle.enable_outbox('others', capture => 'none')")
    deal(db, 2, source={"outbox": "others"})

    db.run("select pgtrickle.relay_claim('default', 'p/1', 'outbox_others', 'w', %s::jsonb)", two)

    assert positions(db) == [("p/1", 0, []), ("p/2", 0, [])]
    with db.refused("RL020"):
        commit(db, "p/2", epochs[1], 60)


def test_dead_letters_are_the_pipeline_s_and_each_is_sent_again_by_the_reader_of_its_key(
    db: Session,
) -> None:
    keys = [str(number) for number in range(20)] + [None]
    store = (
        "select pgtrickle.relay_dead_letter('default', 'p/2', 'forward', %s::text[], %s::text[],"
        " %s::text[], %s::text[], array_fill('{}'::jsonb, array[21]), array_fill(''::bytea,"
        " array[21]), %s::jsonb[], %s::text[], %s::text[], array_fill(1, array[21]))"
    )
    each = ["x"] * 21
    metadata = [json.dumps({"key_hash": key_hash(key)}) for key in keys]
    db.run(store, [f"d{key}" for key in keys], each, keys, each, metadata, each, each)
    assert db.rows("select distinct pipeline from pgtrickle.relay_dlq_list('p')") == [("p",)]

    for partitions in (3, 1):
        deal(db, partitions)
        names = [f"p/{n}" for n in (1, 2, 3)] if partitions == 3 else ["p"]
        assert db.value("select pgtrickle.relay_dlq_retry_all('p')") == 21
        for number, name in enumerate(names):
            own = {key for key in keys if key_hash(key) % partitions == number}
            taken = "select message_key from pgtrickle.relay_dlq_take('default', %s, 100)"
            assert {key for (key,) in db.rows(taken, name)} == own
            assert db.rows(
                "select entries, retries_requested from pgtrickle.relay_dlq_stats(%s)", [name]
            ) == [(len(own), len(own))]
    # A reader that has not learned yet that there is one only.
    assert db.rows("select id from pgtrickle.relay_dlq_take('default', 'p/3', 100)") == []
    assert db.value("select entries from pgtrickle.relay_dlq_stats()") == 21


def test_what_partitions_do_not_go_with_is_refused_with_the_reason(db: Session) -> None:
    for keys, problem in (
        ({"source": {"outbox": "events", "consumer_group": "g"}}, "consumer group"),
        ({"snapshot_markers": True}, "snapshot_markers"),
        ({"sink": {"type": "file", "output": "x"}}, "another sink than file"),
        ({"partitions": 65}, "partitions is 65"),
    ):
        with db.refused("RL010") as said:
            deal(db, **{"partitions": 2, **keys})  # type: ignore[arg-type]  # as a user would
        assert problem in said.message_primary
    with db.refused("RL010") as said:
        db.run("select pgtrickle.set_relay_outbox('p/3', 'events', %s::jsonb)", json.dumps(NATS))
    assert "one reader of a pipeline" in said.message_hint
    with db.refused("RL010"):
        db.run(
            "select pgtrickle.set_relay_inbox('p/3', 'i', '{\"type\": \"stdin\"}'::jsonb)",
        )
    with db.refused("23514"):
        db.run("insert into pgtrickle.relay_outbox_config (name, config) values ('p/3', '{}')")


def test_what_a_row_says_that_was_written_by_hand_means_the_same_to_both(db: Session) -> None:
    for stated in (1, 2, 64, 65, 0, -4, "4", "many", 4.0, 2.5, True, None, [4], {"n": 4}):
        for source in ({"outbox": "events"}, {"outbox": "events", "consumer_group": "g"}, "x"):
            config = {"partitions": stated, "source": source}
            dealt = db.value("select pgtrickle.relay_partitioning(%s::jsonb)", json.dumps(config))
            assert dealt.get("partitions", 1) == partitions_of(config), config
