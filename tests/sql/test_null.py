"""A null argument is an error, or means nothing: it never opens anything."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session

# Each function with sound arguments, and which of them may be null.
CALLS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "relay_group_create": (("'h'", "'outbox_events'", "'latest'"), ()),
    "create_consumer_group": (("'h'", "'events'", "'latest'"), ()),
    "drop_consumer_group": (("'nobody'", "false"), ()),
    "relay_group_poll": (
        ("'g'", "'c'", "1", "30", "1000::bigint", "1", "gen_random_uuid()"),
        (5, 6),
    ),
    "relay_group_join": (("'g'", "'p'", "'default'", "'outbox_events'", "'c'", "'fail'"), ()),
    "poll_outbox": (("'g'", "'c'", "1", "30", "1000::bigint"), ()),
    "commit_offset": (("'g'", "'c'", "3", "gen_random_uuid()"), ()),
    "extend_lease": (("'g'", "'c'", "30", "gen_random_uuid()"), ()),
    "seek_offset": (("'g'", "'c'", "0"), ()),
    "consumer_heartbeat": (("'g'", "'c'"), ()),
    "consumer_lag": (("'g'",), ()),
    "relay_claim": (("'default'", "'p'", "'outbox_events'", "'w'"), ()),
    "relay_commit": (
        ("'default'", "'p'", "1", "1", "'{}'", "'{}'", "'{}'", "false"),
        (),
    ),
    "relay_cursor_set": (("'default'", "'p'", "1", "'f'", "'{}'"), ()),
    "relay_forget_group": (("'gone'",), ()),
    "relay_sweep_outbox": (("'outbox_events'", "1"), ()),
    "relay_dlq_retry": (("1",), ()),
    "relay_dlq_retry_all": (("'p'",), ()),
    "relay_dlq_put_back": (("'{1}'",), ()),
    "relay_dlq_purge": (("'p'", "interval '1 day'"), (1,)),
    "relay_dead_letter": (
        (
            "'default'", "'p'", "'forward'", "'{a}'", "'{s}'", "'{k}'", "'{insert}'",
            "array['{}'::jsonb]", "array['x'::bytea]", "array['{}'::jsonb]",
            "'{e}'", "'{e}'", "'{1}'",
        ),
        (),
    ),
    "relay_report": (("'default'", "'w'", "'{}'"), ()),
}  # fmt: skip
# These do nothing where an argument is null: there is nothing to find, and nothing to refuse.
HARMLESS = {
    "relay_group_release": ("'g'", "gen_random_uuid()"),
    "relay_group_leave": ("'g'", "'nobody'"),
    "relay_release": ("'default'", "'p'", "1"),
    "relay_cursor_get": ("'default'", "'p'", "'f'"),
    "relay_dlq_take": ("'default'", "'p'", "10"),
    "relay_dlq_settle": ("'{1}'",),
    "relay_dlq_fail": ("'{1}'", "'{e}'", "'{1}'"),
    "relay_retire": ("'default'", "'w'"),
}
# A null is refused as such, by a column, or as the name of something that is not there.
REFUSED = {"22004", "23502", "RL003", "RL011", "RL020", "RL022"}
STATE = (
    "select (select jsonb_agg(to_jsonb(t)) from pgtrickle.relay_groups as t),"
    " (select jsonb_agg(to_jsonb(t)) from pgtrickle.relay_group_leases as t),"
    " (select jsonb_agg(to_jsonb(t)) from pgtrickle.relay_group_returned as t),"
    " (select jsonb_agg(to_jsonb(t)) from pgtrickle.relay_consumer_offsets as t),"
    " (select jsonb_agg(to_jsonb(t)) from pgtrickle.relay_pending_gaps as t),"
    " (select jsonb_agg(to_jsonb(t)) from pgtrickle.relay_cursors as t),"
    " (select jsonb_agg(to_jsonb(t)) from pgtrickle.relay_dlq as t),"
    " (select jsonb_agg(to_jsonb(t)) from pgtrickle.relay_workers as t),"
    " (select count(*) from pgtrickle.outbox_events)"
)


@pytest.fixture
def db(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run(
            "select pgtrickle.enable_outbox('events', retention_hours => 0, capture => 'none')"
        )
        opened.run("insert into pgtrickle.outbox_events (payload) values ('{}'), ('{}'), ('{}')")
        opened.run(
            "select pgtrickle.set_relay_outbox('p', 'events', null, '{\"type\": \"stdout\"}')"
        )
        opened.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w')")
        opened.run("select pgtrickle.relay_commit('default', 'p', 1, 2, '{}', '{1}', '{1}')")
        opened.run("select pgtrickle.relay_cursor_set('default', 'p', 1, 'f', '{}')")
        opened.run("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
        opened.run("select pgtrickle.poll_outbox('g', 'c')")
        opened.run(
            "insert into pgtrickle.relay_dlq (relay_group_id, pipeline, direction, dedup_key,"
            " error_kind, error) values ('default', 'p', 'forward', 'k', 'e', 'e')"
        )
        opened.run("select pgtrickle.relay_report('default', 'w', '{}')")
        yield opened


def test_a_null_argument_settles_moves_and_deletes_nothing_and_is_refused(db: Session) -> None:
    before = db.rows(STATE)

    for function, (arguments, may_be_null) in CALLS.items():
        for place in range(len(arguments)):
            if place in may_be_null:
                continue
            given = ", ".join("null" if i == place else a for i, a in enumerate(arguments))
            with pytest.raises(psycopg.Error) as refused:
                db.run(f"select pgtrickle.{function}({given})")
            assert refused.value.sqlstate in REFUSED, f"{function}({given})"
            assert db.rows(STATE) == before, f"{function}({given})"

    for function, harmless in HARMLESS.items():
        for place in range(len(harmless)):
            given = ", ".join("null" if i == place else a for i, a in enumerate(harmless))
            if (function, place) not in {("relay_dlq_take", 2), ("relay_dlq_fail", 1)}:
                db.run(f"select pgtrickle.{function}({given})")
            assert db.rows(STATE) == before, f"{function}({given})"


def test_committing_null_says_which_argument_is_null(db: Session) -> None:
    for argument, call in {
        "last_offset": "commit_offset('g', 'c', null)",
        "lease_token": "commit_offset('g', 'c', 3, null)",
        "consumer": "extend_lease('g', null)",
        "batch_size": "poll_outbox('g', 'c', null)",
        "new_offset": "seek_offset('g', 'c', null)",
        "pipeline": "relay_dlq_purge(null)",
    }.items():
        with db.refused("22004") as said:
            db.run(f"select pgtrickle.{call}")
        assert f'"{argument}"' in said.message_primary
    assert db.rows("select outbox_ids from pgtrickle.relay_group_leases") == [([1, 2, 3],)]
