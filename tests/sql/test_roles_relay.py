"""What a login with nothing but membership in pgtrickle_relay can do, and what nobody else can."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session

MEMBER, STRANGER = "relay_member", "relay_stranger"
CATALOG = (
    "relay_outbox_config", "relay_inbox_config", "relay_pipeline_names", "relay_consumer_offsets",
    "relay_pending_gaps", "relay_cursors", "relay_dlq", "relay_workers", "relay_groups",
    "relay_group_gaps", "relay_group_cohorts", "relay_group_leases", "relay_group_returned",
    "relay_group_consumers", "relay_inboxes", "relay_dlq_retries", "relay_outbox_high_water",
    "relay_sleepers", "relay_migrations", "pgt_outbox_config",
)  # fmt: skip


@pytest.fixture
def owner(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.new_role(MEMBER, "pgtrickle_relay")
        opened.new_role(STRANGER)
        opened.run("select pgtrickle.enable_outbox('events', capture => 'none')")
        opened.run("""select pgtrickle.outbox_publish('events', '[{"a": 1}]')""")
        yield opened


@pytest.fixture
def member(owner: Session, any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run(f"set session authorization {MEMBER}")
        yield opened


def test_a_member_does_everything_through_functions(member: Session) -> None:
    for statement in (
        """select pgtrickle.set_relay_outbox('p', 'events', 'g', '{"type": "stdout"}')""",
        """select pgtrickle.set_relay_outbox('p',
            '{"source": {"outbox": "events"}, "sink": {"type": "stdout"}, "start": "latest"}')""",
        "select pgtrickle.set_relay_inbox('q', 'received', '{\"type\": \"stdin\"}')",
        "select pgtrickle.disable_relay('p')",
        "select pgtrickle.enable_relay('p')",
        "select pgtrickle.get_relay_config('p')",
        "select * from pgtrickle.list_relay_configs()",
        """select pgtrickle.relay_validate_config('forward', '{"source_type": "outbox",
            "source": {"outbox": "e"}, "sink_type": "nats",
            "sink": {"type": "nats", "url": "nats://h", "routing": {"insert": "{op}"}}}')""",
        "select pgtrickle.relay_schema_version()",
        "select * from pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w')",
        "select pgtrickle.relay_commit('default', 'p', 1, 1, '{}', '{}', '{}')",
        "select pgtrickle.relay_commit('default', 'p', 1, 0, p_is_reset => true)",
        "select pgtrickle.relay_cursor_set('default', 'p', 1, 'f', '{}')",
        "select pgtrickle.relay_cursor_get('default', 'p', 'f')",
        "select * from pgtrickle.relay_lag('default')",
        "select pgtrickle.relay_release('default', 'p', 1)",
        """select pgtrickle.relay_dead_letter('default', 'p', 'forward',
            '{a}', '{s}', '{k}', '{insert}',
            array['{}'::jsonb], array['x'::bytea], array['{}'::jsonb],
            '{rejected}', '{e}', '{1}')""",
        "select pgtrickle.relay_dlq_retry(id) from pgtrickle.relay_dlq_list('p')",
        "select pgtrickle.relay_dlq_retry_all('p')",
        "select * from pgtrickle.relay_dlq_take('default', 'p', 1)",
        "select pgtrickle.relay_dlq_fail('{1}', '{e}', '{1}')",
        "select pgtrickle.relay_dlq_put_back('{1}')",
        "select pgtrickle.relay_dlq_settle('{1}')",
        "select pgtrickle.relay_dlq_purge('p')",
        "select * from pgtrickle.relay_dlq_stats()",
        "select pgtrickle.relay_report('default', 'w', '{}')",
        "select * from pgtrickle.relay_fleet()",
        "select pgtrickle.relay_retire('default', 'w')",
        "select pgtrickle.create_consumer_group('h', 'events', 'earliest')",
        "select * from pgtrickle.poll_outbox('h', 'one')",
        "select pgtrickle.extend_lease('h', 'one')",
        "select pgtrickle.commit_offset('h', 'one', 1)",
        "select pgtrickle.consumer_heartbeat('h', 'one')",
        "select pgtrickle.seek_offset('h', 'one', 0)",
        "select * from pgtrickle.consumer_lag('h')",
        """select pgtrickle.relay_group_release('h', lease_token)
            from pgtrickle.poll_outbox('h', 'one')""",
        "select pgtrickle.drop_consumer_group('h')",
        "select * from pgtrickle.relay_inbox('received')",
        "select pgtrickle.receive_received('{a}', '{t}', '{}', '{}', '{}', '{\"{}\"}', '{\"{}\"}')",
        "select event_id from pgtrickle.received",
        "select pgtrickle.inbox_mark_processed('received', 'a')",
        "select pgtrickle.inbox_mark_failed('received', 'a', 'e')",
        "select pgtrickle.replay_inbox_messages('received', '{a}')",
        "select * from pgtrickle.inbox_status()",
        "select pgtrickle.inbox_health('received')",
        "select pgtrickle.count_received()",
        "select pgtrickle.drop_inbox('received')",
        "select pgtrickle.delete_relay('p')",
    ):
        member.run(statement)


def test_a_member_may_not_touch_the_catalog(member: Session) -> None:
    for table in CATALOG:
        with member.refused("42501"):
            member.run(f"select * from pgtrickle.{table}")
        with member.refused("42501"):
            member.run(f"grant select on pgtrickle.{table} to {MEMBER}")
        assert not member.value(
            "select has_table_privilege(%s::regclass, 'insert, update, delete, truncate')",
            f"pgtrickle.{table}",
        )


def test_a_member_may_not_read_the_messages_of_an_inbox(member: Session) -> None:
    member.run("select pgtrickle.set_relay_inbox('q', 'received', '{\"type\": \"stdin\"}')")

    with member.refused("42501"):
        member.run("select payload from pgtrickle.received")
    with member.refused("42501"):
        member.run("delete from pgtrickle.received")


def test_every_definer_function_pins_its_search_path_and_belongs_to_the_catalogs_owner(
    owner: Session,
) -> None:
    loose = owner.rows(
        "select p.proname from pg_proc as p"
        " where p.pronamespace = 'pgtrickle'::regnamespace and p.prosecdef"
        " and (not 'search_path=pg_catalog, pg_temp' = any (coalesce(p.proconfig, '{}'))"
        " or p.proowner <> 'pgtrickle_owner'::regrole)"
    )

    assert loose == []


def test_a_member_adopts_a_table_of_its_own(owner: Session, member: Session) -> None:
    owner.run(f"create schema app authorization {MEMBER}")
    member.run("create table app.messages (event_id text primary key, payload jsonb)")

    member.run("select pgtrickle.enable_inbox_tracking('mine', 'app.messages')")

    assert (
        member.value("select receive_function from pgtrickle.relay_inbox('mine')")
        == "app.receive_mine"
    )
    member.run("select pgtrickle.disable_inbox_tracking('mine')")
