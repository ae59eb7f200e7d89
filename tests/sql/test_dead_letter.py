"""Dead letters: stored once, listed, sent again, purged."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from psycopg import Connection

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session

STORE = (
    "select pgtrickle.relay_dead_letter('default', 'p', 'forward', %s::text[], %s::text[],"
    " %s::text[], %s::text[], %s::jsonb[], %s::bytea[], %s::jsonb[], %s::text[], %s::text[],"
    " %s::int[])"
)
FAIL = "select pgtrickle.relay_dlq_fail(%s::bigint[], %s::text[], %s::integer[])"


@pytest.fixture
def db(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run("select pgtrickle.enable_outbox('events', capture => 'none')")
        opened.run(
            "select pgtrickle.set_relay_outbox('p', 'events', null, '{\"type\": \"stdout\"}')"
        )
        yield opened


def store(db: Session, *keys: str, error: str = "too large") -> list[int]:
    each = len(keys)
    ids: list[int] = db.value(
        STORE,
        list(keys),
        ["s"] * each,
        [None] * each,
        ["insert"] * each,
        ['{"h": "1"}'] * each,
        [b"\x00\xff"] * each,
        ['{"outbox_id": 7}'] * each,
        ["rejected"] * each,
        [error] * each,
        [1] * each,
    )
    return ids


def notices(connection: Connection[tuple[object, ...]]) -> list[dict[str, object]]:
    return [json.loads(note.payload) for note in connection.notifies(timeout=5, stop_after=1)]


def test_a_message_that_fails_again_keeps_its_entry_and_counts_its_attempts(db: Session) -> None:
    first = store(db, "a", "b")
    again = store(db, "c", "a", error="still too large")

    assert again[1] == first[0]
    assert db.rows(
        "select dedup_key, attempts, error, payload, metadata from pgtrickle.relay_dlq_list('p')"
    ) == [
        ("a", 2, "still too large", b"\x00\xff", {"outbox_id": 7}),
        ("b", 1, "too large", b"\x00\xff", {"outbox_id": 7}),
        ("c", 1, "still too large", b"\x00\xff", {"outbox_id": 7}),
    ]


def test_the_list_begins_with_the_oldest_or_with_the_newest(db: Session) -> None:
    store(db, "a", "b", "c")
    keys = "select dedup_key from pgtrickle.relay_dlq_list({})"

    assert db.rows(keys.format("'p', 2")) == [("a",), ("b",)]
    for whose in ("'p'", "null"):
        newest = keys.format(f"{whose}, 2, newest_first => true")
        assert db.rows(newest) == [("c",), ("b",)]


def test_ids_come_in_the_order_of_the_messages_even_with_one_twice_and_a_huge_key(
    db: Session,
) -> None:
    huge = "k" * 10_000

    ids = store(db, "z", "a", "z", huge)

    assert ids[0] == ids[2]
    assert len(set(ids)) == 3
    assert db.rows("select id from pgtrickle.relay_dlq where dedup_key = %s", huge) == [(ids[3],)]


def test_a_requested_retry_is_taken_until_it_is_settled(db: Session) -> None:
    wanted, _ = store(db, "a", "b")
    take = "select id, dedup_key, headers, op from pgtrickle.relay_dlq_take('default', 'p', 10)"
    assert db.rows(take) == []

    db.run("select pgtrickle.relay_dlq_retry(%s)", wanted)
    assert db.rows(take) == db.rows(take) == [(wanted, "a", {"h": "1"}, "insert")]
    db.run("select pgtrickle.relay_dlq_settle(%s::bigint[])", [wanted])

    assert db.rows("select dedup_key from pgtrickle.relay_dlq_list()") == [("b",)]


def test_a_retry_that_one_relay_has_taken_is_no_other_s_until_its_lease_runs_out(
    db: Session,
) -> None:
    ids = store(db, "a", "b", "c")
    db.run("select pgtrickle.relay_dlq_put_back(%s::bigint[])", ids)
    take = "select id from pgtrickle.relay_dlq_take('default', 'p', %s, 60)"

    first, second = db.rows(take, 2), db.rows(take, 2)

    assert (first, second) == ([(ids[0],), (ids[1],)], [(ids[2],)])
    assert db.rows(take, 2) == []
    db.run("update pgtrickle.relay_dlq_retries set taken_until = now() where id = %s", ids[1])
    assert db.rows(take, 2) == [(ids[1],)]


def test_a_retry_that_fails_is_not_tried_again_by_itself(db: Session) -> None:
    (only,) = store(db, "a")
    db.run("select pgtrickle.relay_dlq_retry(%s)", only)

    db.run(FAIL, [only], ["no luck"], [1])

    assert db.rows(
        "select attempts, error, retry_requested_at from pgtrickle.relay_dlq_list()"
    ) == [(2, "no luck", None)]


def test_a_retry_that_two_relays_made_and_that_failed_for_both_counts_once(db: Session) -> None:
    (only,) = store(db, "a")
    db.run("select pgtrickle.relay_dlq_retry(%s)", only)

    for error in ("no luck", "no luck here either"):
        db.run(FAIL, [only], [error], [1])

    assert db.rows("select attempts, error from pgtrickle.relay_dlq_list()") == [(2, "no luck")]


def test_a_relay_that_fails_late_does_not_take_back_what_was_asked_for_since(db: Session) -> None:
    (only,) = store(db, "a")
    db.run("select pgtrickle.relay_dlq_retry(%s)", only)
    # Two relays have taken it by now.
    db.run(FAIL, [only], ["no luck"], [1])
    db.run("select pgtrickle.relay_dlq_retry(%s)", only)

    db.run(FAIL, [only], ["no luck here either"], [1])

    assert db.rows(
        "select attempts, error, retry_requested_at is not null from pgtrickle.relay_dlq_list()"
    ) == [(2, "no luck", True)]


def test_a_retry_tells_the_relays(db: Session) -> None:
    ids = store(db, "a", "b")
    db.run("listen pgtrickle_relay_config")
    expected = {"direction": "relay_outbox_config", "event": "RETRY", "name": "p", "enabled": True}

    for ask, value in (
        ("select pgtrickle.relay_dlq_retry(%s)", ids[0]),
        ("select pgtrickle.relay_dlq_retry_all(%s)", "p"),
        ("select pgtrickle.relay_dlq_put_back(%s::bigint[])", ids),
    ):
        db.run(ask, value)
        assert notices(db.connection) == [expected]
    assert db.value("select pgtrickle.relay_dlq_retry_all('p')") == 2


def test_purging_by_age_keeps_the_young(db: Session) -> None:
    store(db, "old", "young")
    db.run(
        "update pgtrickle.relay_dlq set last_failed_at = now() - interval '3 days'"
        " where dedup_key = 'old'"
    )

    assert db.value("select pgtrickle.relay_dlq_purge('p', interval '1 day')") == 1
    assert db.rows(
        "select pipeline, entries, retries_requested from pgtrickle.relay_dlq_stats()"
    ) == [("p", 1, 0)]
    assert db.value("select pgtrickle.relay_dlq_purge('p')") == 1


def test_unknown_entries_and_pipelines_are_errors(db: Session) -> None:
    with db.refused("RL040") as said:
        db.run("select pgtrickle.relay_dlq_retry(99)")
    assert "relay_dlq_list" in said.message_hint
    with db.refused("RL011"):
        db.run("select pgtrickle.relay_dlq_retry_all('nobody')")
