"""Consumer groups in SQL: leases, settling, positions, errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session


@pytest.fixture
def db(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run("select pgtrickle.enable_outbox('events', capture => 'none')")
        yield opened


@pytest.fixture
def other(db: Session, any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        yield opened


def write(
    db: Session, rows: int = 1, payload: str = '{"v":1,"inserted":[{}],"deleted":[]}'
) -> None:
    db.run(
        "insert into pgtrickle.outbox_events (pgt_id, refresh_id, inserted_count, deleted_count,"
        " is_claim_check, payload) select gen_random_uuid(), gen_random_uuid(), 1, 0, false,"
        " %s::jsonb from generate_series(1, %s)",
        payload,
        rows,
    )


def poll(db: Session, consumer: str, batch: int = 100, lease_s: int = 30) -> tuple[str, list[int]]:
    rows = db.rows(
        "select lease_token, outbox_id from pgtrickle.poll_outbox('g', %s, %s, %s)",
        consumer,
        batch,
        lease_s,
    )
    return (rows[0][0] if rows else ""), [row[1] for row in rows]


def old_poll(db: Session, consumer: str, batch: int = 100) -> list[int]:
    rows = db.rows("select outbox_id from pgtrickle.poll_outbox('g', %s, %s)", consumer, batch)
    return [row[0] for row in rows]


def settle(db: Session, consumer: str, token: str) -> None:
    """Settle all rows of a lease."""
    db.run("select pgtrickle.commit_offset('g', %s, 1000000, %s)", consumer, token)


def watermark(db: Session) -> int:
    return int(db.value("select watermark from pgtrickle.relay_group_find('g', false)"))


def run_out(db: Session) -> None:
    """Let all leases run out without waiting for the clock."""
    db.run("update pgtrickle.relay_group_leases set expires_at = leased_at")
    db.run("update pgtrickle.relay_groups set leases_since = '-infinity'")


def test_two_consumers_share_the_rows_and_none_is_given_to_both(
    db: Session, other: Session
) -> None:
    write(db, 10)
    db.run("select pgtrickle.relay_group_create('g', 'outbox_events')")

    first_token, first = poll(db, "one", 4)
    second_token, second = poll(other, "two", 100)
    settle(db, "two", second_token)
    before = watermark(db)
    settle(db, "one", first_token)

    assert (first, second) == ([1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert (before, watermark(db)) == (0, 10)
    assert poll(db, "one") == ("", [])


def test_rows_of_a_lease_that_ran_out_go_to_another_and_the_late_commit_is_refused(
    db: Session,
) -> None:
    write(db, 3)
    db.run("select pgtrickle.relay_group_create('g', 'outbox_events')")
    lost, _ = poll(db, "slow")
    run_out(db)

    kept, again = poll(db, "quick")

    assert again == [1, 2, 3]
    with db.refused("RL021") as said:
        settle(db, "slow", lost)
    assert "lost" in said.message_primary
    assert "longer lease" in said.message_hint
    settle(db, "quick", kept)
    assert watermark(db) == 3


def test_a_lease_that_ran_out_but_was_not_taken_over_can_still_be_settled(db: Session) -> None:
    write(db, 2)
    db.run("select pgtrickle.relay_group_create('g', 'outbox_events')")
    token, _ = poll(db, "slow")
    run_out(db)

    settle(db, "slow", token)

    assert poll(db, "quick") == ("", [])


def test_released_rows_are_delivered_at_once_and_before_new_ones(db: Session) -> None:
    write(db, 3)
    db.run("select pgtrickle.relay_group_create('g', 'outbox_events')")
    token, _ = poll(db, "one", 2)

    assert db.value("select pgtrickle.relay_group_release('g', %s)", token) is True
    assert db.value("select pgtrickle.relay_group_release('g', %s)", token) is False

    assert watermark(db) == 0
    assert poll(db, "two")[1] == [1, 2, 3]


def test_extending_a_lease_never_shortens_it_and_a_lost_one_is_refused(db: Session) -> None:
    write(db)
    db.run("select pgtrickle.relay_group_create('g', 'outbox_events')")
    token, _ = poll(db, "one", lease_s=600)

    until = db.value("select pgtrickle.extend_lease('g', 'one', 1, %s)", token)

    assert db.value("select %s > now() + interval '590 seconds'", until)
    db.run("select pgtrickle.relay_group_release('g', %s)", token)
    with db.refused("RL021"):
        db.run("select pgtrickle.extend_lease('g', 'one', 1, %s)", token)


def test_committing_inside_the_consumers_transaction_settles_with_it(
    db: Session, other: Session
) -> None:
    write(db, 2)
    db.run("select pgtrickle.relay_group_create('g', 'outbox_events')")
    token, _ = poll(db, "one")
    run_out(db)

    other.run("begin")
    settle(other, "one", token)
    meanwhile = poll(db, "two")
    other.run("rollback")

    assert meanwhile == ("", []), "a lease that is being settled is not taken over"
    assert poll(db, "two")[1] == [1, 2]


def test_a_row_that_commits_late_is_delivered_though_later_ones_were_settled(
    db: Session, other: Session
) -> None:
    db.run("select pgtrickle.relay_group_create('g', 'outbox_events')")
    other.run("begin")
    write(other)
    write(db, 2)

    token, early = poll(db, "one")
    settle(db, "one", token)
    held_back = watermark(db)
    assert poll(db, "one") == ("", [])
    other.run("commit")
    token, late = poll(db, "one")
    settle(db, "one", token)

    assert (early, held_back, late) == ([2, 3], 0, [1])
    assert watermark(db) == 3


def test_a_rolled_back_id_does_not_hold_the_watermark(db: Session, other: Session) -> None:
    db.run("select pgtrickle.relay_group_create('g', 'outbox_events')")
    other.run("begin")
    write(other)
    write(db)
    token, _ = poll(db, "one")
    settle(db, "one", token)

    other.run("rollback")
    assert poll(db, "one") == ("", [])

    assert watermark(db) == 2


def test_an_id_that_was_rolled_back_before_the_poll_is_decided_by_the_next(db: Session) -> None:
    db.run("select pgtrickle.relay_group_create('g', 'outbox_events')")
    db.run("begin")
    write(db)
    db.run("rollback")
    write(db)
    token, rows = poll(db, "one")
    settle(db, "one", token)
    undecided = watermark(db)

    assert poll(db, "one") == ("", [])

    assert (rows, undecided, watermark(db)) == ([2], 0, 2)


def test_a_prepared_transaction_is_waited_for(db: Session, other: Session) -> None:
    if db.value("show max_prepared_transactions") == "0":
        pytest.skip("this server has no prepared transactions")
    db.run("update pgtrickle.pgt_outbox_config set notify = false")
    db.run("select pgtrickle.relay_group_create('g', 'outbox_events')")
    other.run("begin")
    write(other)
    other.run("prepare transaction 'later'")
    write(db)

    token, early = poll(db, "one")
    settle(db, "one", token)
    # Another run of the server: the prepared transaction has another name.
    db.run("update pgtrickle.relay_groups set server_instance = 'before'")
    db.run("update pgtrickle.relay_group_cohorts set holders = '{9/999}'")
    between = poll(db, "one")
    db.run("commit prepared 'later'")

    assert (early, between, poll(db, "one")[1]) == ([2], ("", []), [1])


def test_latest_starts_at_the_end_but_delivers_what_is_being_written(
    db: Session, other: Session
) -> None:
    write(db, 2)
    other.run("begin")
    write(other)
    write(db)

    db.run("select pgtrickle.create_consumer_group('g', 'events')")

    assert poll(db, "one") == ("", [])
    other.run("commit")
    assert poll(db, "one")[1] == [3]


def test_a_batch_ends_at_its_bytes_but_has_at_least_one_row(db: Session) -> None:
    write(db, 3, '{"v":1,"inserted":[{"text":"' + "x" * 500 + '"}],"deleted":[]}')
    db.run("select pgtrickle.relay_group_create('g', 'outbox_events')")

    tiny = db.rows("select outbox_id from pgtrickle.poll_outbox('g', 'one', 10, 30, 1)")
    rest = db.rows("select outbox_id from pgtrickle.poll_outbox('g', 'one', 10, 30, 100000)")

    assert (tiny, rest) == ([(1,)], [(2,), (3,)])


def test_a_poll_brings_refresh_id_headers_and_payload(db: Session) -> None:
    db.run("""select pgtrickle.outbox_publish('events', '[{"a": 1}]', '[]', '{"trace": "t"}')""")
    db.run("select pgtrickle.relay_group_create('g', 'outbox_events')")

    (row,) = db.rows(
        "select refresh_id is not null, inserted_count, deleted_count, is_claim_check,"
        " payload -> 'inserted', headers from pgtrickle.poll_outbox('g', 'one')"
    )

    assert row == (True, 1, 0, False, [{"a": 1}], {"trace": "t"})


def test_commit_offset_settles_only_what_the_newest_poll_returned(db: Session) -> None:
    write(db, 6)
    db.run("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
    killed = old_poll(db, "one", 2)
    successor = old_poll(db, "one", 2)
    stranger = old_poll(db, "two", 2)

    db.run("select pgtrickle.commit_offset('g', 'one', 6)")
    run_out(db)

    assert (killed, successor, stranger) == ([1, 2], [3, 4], [5, 6])
    assert old_poll(db, "three") == [1, 2, 5, 6]


def test_a_token_settles_its_own_poll_and_no_later_one_of_its_consumer(db: Session) -> None:
    write(db, 4)
    db.run("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
    (first, _), (_, second_rows) = poll(db, "one", 2), poll(db, "one", 2)

    settle(db, "one", first)
    run_out(db)

    assert second_rows == poll(db, "two")[1] == [3, 4]


def test_commit_offset_in_the_middle_keeps_the_rest_leased(db: Session) -> None:
    write(db, 4)
    db.run("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
    old_poll(db, "one")

    db.run("select pgtrickle.commit_offset('g', 'one', 2)")
    between = (watermark(db), old_poll(db, "two"))
    db.run("select pgtrickle.commit_offset('g', 'one', 4)")
    db.run("select pgtrickle.commit_offset('g', 'one', 4)")

    assert between == (2, [])
    assert watermark(db) == 4


def test_commit_offset_after_the_lease_was_lost_is_refused(db: Session) -> None:
    write(db, 2)
    db.run("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
    old_poll(db, "one")
    run_out(db)
    old_poll(db, "two")

    with db.refused("RL021"):
        db.run("select pgtrickle.commit_offset('g', 'one', 2)")
    with db.refused("RL021"):
        db.run("select pgtrickle.extend_lease('g', 'one')")


def test_seek_offset_moves_the_group_back_and_only_it_does(db: Session) -> None:
    write(db, 4)
    db.run("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
    old_poll(db, "one")
    db.run("select pgtrickle.commit_offset('g', 'one', 4)")

    db.run("select pgtrickle.seek_offset('g', 'one', 2)")

    assert (watermark(db), old_poll(db, "one")) == (2, [3, 4])
    with db.refused("22023") as said:
        db.run("select pgtrickle.seek_offset('g', 'one', 5)")
    assert "from 0 to 4" in said.message_primary


def test_consumer_lag_shows_the_shared_position_and_who_is_alive(db: Session) -> None:
    write(db, 4)
    db.run("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
    old_poll(db, "one", 3)
    db.run("select pgtrickle.commit_offset('g', 'one', 3)")
    db.run("select pgtrickle.consumer_heartbeat('g', 'two')")
    db.run(
        "update pgtrickle.relay_group_consumers set last_heartbeat_at = now() - interval '1 hour'"
        " where consumer_id = 'two'"
    )

    rows = db.rows(
        "select consumer_id, committed_offset, max_outbox_id, lag, is_alive"
        " from pgtrickle.consumer_lag('g')"
    )

    assert rows == [("one", 3, 4, 1, True), ("two", 3, 4, 1, False)]


def test_a_consumer_that_finds_nothing_is_alive_as_long_as_it_polls(db: Session) -> None:
    db.run("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
    poll(db, "one")
    is_alive = "select is_alive from pgtrickle.consumer_lag('g')"
    db.run("update pgtrickle.relay_group_consumers set last_heartbeat_at = now() - interval '1 h'")
    before = db.value(is_alive)

    poll(db, "one")

    assert (before, db.value(is_alive)) == (False, True)


def test_each_mistake_has_its_own_error(db: Session) -> None:
    db.run("select pgtrickle.create_consumer_group('g', 'events')")
    db.run("select pgtrickle.enable_outbox('other', capture => 'none')")

    with db.refused("RL022") as said:
        db.run("select pgtrickle.poll_outbox('nobody', 'one')")
    assert "create_consumer_group('nobody'" in said.message_hint
    with db.refused("RL023"):
        db.run("select pgtrickle.create_consumer_group('g', 'events')")
    with db.refused("RL023"):
        db.run("select pgtrickle.relay_group_create('g', 'outbox_other')")
    with db.refused("RL003"):
        db.run("select pgtrickle.create_consumer_group('h', 'nothing')")
    with db.refused("22023"):
        db.run("select pgtrickle.poll_outbox('g', 'one', 0)")
    with db.refused("22023"):
        db.run("select pgtrickle.create_consumer_group('h', 'events', 'sometime')")
    with db.refused("RL022"):
        db.run("select pgtrickle.drop_consumer_group('nobody')")
    db.run("select pgtrickle.drop_consumer_group('nobody', true)")
    db.run("select pgtrickle.drop_consumer_group('g')")
    with db.refused("RL022"):
        db.run("select pgtrickle.commit_offset('g', 'one', 1)")


def test_other_isolation_levels_are_refused(db: Session) -> None:
    db.run("select pgtrickle.create_consumer_group('g', 'events')")
    db.run("begin isolation level repeatable read")

    with db.refused("RL005") as said:
        db.run("select pgtrickle.poll_outbox('g', 'one')")

    assert "READ COMMITTED" in said.message_hint
    db.run("rollback")


def test_an_outbox_with_a_cached_sequence_is_refused(db: Session) -> None:
    db.run("alter table pgtrickle.outbox_events alter column id set cache 20")

    with db.refused("RL005") as said:
        db.run("select pgtrickle.create_consumer_group('g', 'events')")

    assert "set cache 1" in said.message_hint


def test_a_group_beyond_the_end_of_its_outbox_says_so(db: Session) -> None:
    write(db, 3)
    db.run("select pgtrickle.create_consumer_group('g', 'events')")
    poll(db, "one")
    db.run("truncate pgtrickle.outbox_events restart identity cascade")

    with db.refused("RL005") as said:
        poll(db, "one")

    assert "seek_offset" in said.message_hint


def test_rows_deleted_while_nobody_held_them_do_not_stop_the_group(db: Session) -> None:
    write(db, 3)
    db.run("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
    token, _ = poll(db, "one")
    db.run("select pgtrickle.relay_group_release('g', %s)", token)
    db.run("delete from pgtrickle.outbox_events where id < 3")

    token, rest = poll(db, "one")
    settle(db, "one", token)

    assert (rest, watermark(db)) == ([3], 3)


def test_many_gaps_of_one_open_writer_are_not_read_again(db: Session, other: Session) -> None:
    db.run("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
    other.run("begin")
    write(other)
    write(db, 2000)
    db.run("delete from pgtrickle.outbox_events where id % 2 = 0")
    token, _ = poll(db, "one", 10000)
    settle(db, "one", token)
    for _ in range(3):
        poll(db, "one")

    resting = db.rows(
        "select holders <> '{\"\"}', cardinality(holders) from pgtrickle.relay_group_cohorts"
    )

    assert resting == [(True, 1)]
    assert db.value("select pending_gaps from pgtrickle.consumer_lag('g')") >= 1000
    other.run("commit")
    assert poll(db, "one")[1] == [1]
