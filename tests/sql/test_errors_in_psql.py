"""What somebody at psql sees of a slip: what is wrong, what helps, and one line of where."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session
from tests.sql.test_migrate import psql

STDOUT = """'{"type": "stdout"}'"""

# Statements that fail: message, hint, and where it was raised.
SLIPS = [
    f"select pgtrickle.set_relay_outbox('p', 'orderz', {STDOUT})",
    "select pgtrickle.set_relay_outbox('p', 'orders', '{…}')",
    "select pgtrickle.set_relay_outbox('p', 'orders', '{\"type\": \"natz\"}')",
    f"select pgtrickle.set_relay_outbox('', 'orders', {STDOUT})",
    f"select pgtrickle.set_relay_outbox('p', 'orders', 'taken', {STDOUT})",
    f"select pgtrickle.set_relay_outbox('in', 'orders', {STDOUT})",
    """select pgtrickle.set_relay_outbox('p', '{"source": {}, "sink": {"type": "stdout"}}')""",
    """select pgtrickle.set_relay_outbox('p', 'orders', '{"type": "pg-inbox", "inbox": "x"}')""",
    "select pgtrickle.set_relay_inbox('p', 'received', '{\"type\": \"kafka\"}')",
    """select pgtrickle.set_relay_inbox('p', 'relay_x', '{"type": "stdin"}')""",
    "select pgtrickle.enable_relay('on')",
    "select pgtrickle.disable_relay('on')",
    "select pgtrickle.delete_relay('on')",
    "select pgtrickle.get_relay_config('on')",
    "select pgtrickle.create_inbox('x', 'nowhere')",
    "select pgtrickle.create_inbox('received', 'public')",
    "select pgtrickle.create_inbox('relay_x')",
    "select pgtrickle.create_inbox('x', max_retries => -1)",
    "select pgtrickle.enable_inbox_tracking('x', 'nowhere')",
    "select pgtrickle.enable_inbox_tracking('x', 'bad')",
    "select pgtrickle.disable_inbox_tracking('received')",
    "select pgtrickle.drop_inbox('nowhere')",
    "select pgtrickle.enable_outbox('nowhere')",
    "select pgtrickle.enable_outbox('public.bad', key_columns => '{x}')",
    "select pgtrickle.enable_outbox('orders', capture => 'none')",
    "set role slips; select pgtrickle.enable_outbox('public.bad')",
    "select pgtrickle.repair_outbox('nowhere')",
    "select pgtrickle.repair_outbox('public.bad')",
    "select pgtrickle.disable_outbox('nowhere')",
    "set role slips; select pgtrickle.disable_outbox('public.captured')",
    "set role slips; select pgtrickle.enable_outbox('x', capture => 'none')",
    "select pgtrickle.inbox_mark_processed('nowhere', 'a')",
    "select pgtrickle.inbox_mark_failed('nowhere', 'a', 'e')",
    "select * from pgtrickle.inbox_status('nowhere')",
    "select pgtrickle.relay_dlq_retry_all('nowhere')",
    "select pgtrickle.create_consumer_group('taken', 'others')",
    "select pgtrickle.create_consumer_group('new', 'nowhere')",
    "select pgtrickle.commit_offset('nowhere', 'c', 1)",
    "select pgtrickle.commit_offset('taken', 'c', 1)",
    "select pgtrickle.extend_lease('nowhere', 'c')",
    "select pgtrickle.extend_lease('taken', 'c')",
    "select pgtrickle.poll_outbox('nowhere', 'c')",
    "select pgtrickle.poll_outbox('taken', 'c', 0)",
    "begin isolation level serializable; select pgtrickle.poll_outbox('taken', 'c')",
    "select pgtrickle.seek_offset('nowhere', 'c', 1)",
    "select pgtrickle.seek_offset('taken', 'c', 1)",
    "select pgtrickle.consumer_heartbeat('nowhere', 'c')",
    "select pgtrickle.consumer_lag('nowhere')",
    "select pgtrickle.drop_consumer_group('nowhere')",
    "select pgtrickle.relay_dlq_retry(1)",
    "select pgtrickle.relay_seek('nowhere', 'latest')",
    "select pgtrickle.relay_seek('in', 'latest')",
    "call pgtrickle.backfill('nowhere')",
    "call pgtrickle.backfill('orders')",
]


@pytest.fixture
def db(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run(
            "select pgtrickle.enable_outbox('orders', capture => 'none');"
            "select pgtrickle.enable_outbox('others', capture => 'none');"
            "select pgtrickle.create_consumer_group('taken', 'others');"
            "select pgtrickle.set_relay_inbox('in', 'received', '{\"type\": \"stdin\"}');"
            "create table public.bad (event_id text primary key);"
            "create table public.captured (id int primary key);"
            "select pgtrickle.enable_outbox('public.captured')"
        )
        opened.new_role("slips")
        yield opened


def test_a_slip_is_said_in_three_lines_with_its_remedy(db: Session) -> None:
    program = psql()
    for slip in SLIPS:
        lines = seen(program, db.dsn, db.said(slip))

        assert lines[0].startswith("ERROR:  "), (slip, lines)
        assert any(line.startswith("HINT:  ") and len(line) > 10 for line in lines), (slip, lines)
        assert len(lines) == 3, (slip, lines)


def seen(program: str, dsn: str, statement: str) -> list[str]:
    done = subprocess.run(
        [program, "-X", "-q", "-d", dsn, "-f", "-"],
        input="set client_min_messages = warning;\n" + statement,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stderr.replace("psql:<stdin>:2: ", "").splitlines()
