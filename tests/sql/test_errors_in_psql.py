"""What somebody at psql sees of a slip: what is wrong, what helps, and one line of where."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session
from tests.sql.test_migrate import psql

STDOUT = """'{"type": "stdout"}'"""

# Statements that fail, and how many lines say so. One more where there are details.
SLIPS = {
    f"select pgtrickle.set_relay_outbox('p', 'orderz', {STDOUT})": 3,
    "select pgtrickle.set_relay_outbox('p', 'orders', '{…}')": 3,
    "select pgtrickle.set_relay_outbox('p', 'orders', '{\"type\": \"natz\"}')": 3,
    f"select pgtrickle.set_relay_outbox('', 'orders', {STDOUT})": 3,
    f"select pgtrickle.set_relay_outbox('p', 'orders', 'taken', {STDOUT})": 3,
    f"select pgtrickle.set_relay_outbox('in', 'orders', {STDOUT})": 4,
    """select pgtrickle.set_relay_outbox('p', '{"source": {}, "sink": {"type": "stdout"}}')""": 3,
    """select pgtrickle.set_relay_outbox('p', 'orders', '{"type": "pg-inbox", "inbox": "x"}')""": 3,
    "select pgtrickle.set_relay_inbox('p', 'received', '{\"type\": \"kafka\"}')": 3,
    """select pgtrickle.set_relay_inbox('p', 'relay_x', '{"type": "stdin"}')""": 3,
    "select pgtrickle.enable_relay('on')": 3,
    "select pgtrickle.disable_relay('on')": 3,
    "select pgtrickle.delete_relay('on')": 3,
    "select pgtrickle.get_relay_config('on')": 3,
    "select pgtrickle.create_inbox('x', 'nowhere')": 3,
    "select pgtrickle.create_inbox('received', 'public')": 4,
    "select pgtrickle.create_inbox('relay_x')": 3,
    "select pgtrickle.create_inbox('x', max_retries => -1)": 3,
    "select pgtrickle.enable_inbox_tracking('x', 'nowhere')": 3,
    "select pgtrickle.enable_inbox_tracking('x', 'bad')": 4,
    "select pgtrickle.disable_inbox_tracking('received')": 3,
    "select pgtrickle.drop_inbox('nowhere')": 3,
    "select pgtrickle.enable_outbox('nowhere')": 4,
    "select pgtrickle.enable_outbox('public.bad', key_columns => '{x}')": 3,
    "select pgtrickle.enable_outbox('orders', capture => 'none')": 3,
    "set role slips; select pgtrickle.enable_outbox('public.bad')": 3,
    "select pgtrickle.repair_outbox('nowhere')": 4,
    "select pgtrickle.repair_outbox('public.bad')": 3,
    "select pgtrickle.disable_outbox('nowhere')": 3,
    "set role slips; select pgtrickle.disable_outbox('public.captured')": 3,
    "set role slips; select pgtrickle.enable_outbox('x', capture => 'none')": 3,
    "select pgtrickle.inbox_mark_processed('nowhere', 'a')": 3,
    "select pgtrickle.inbox_mark_failed('nowhere', 'a', 'e')": 3,
    "select * from pgtrickle.inbox_status('nowhere')": 3,
    "select pgtrickle.relay_dlq_retry_all('nowhere')": 3,
    "select pgtrickle.create_consumer_group('taken', 'others')": 3,
    # Without a handler, which would cost each commit and each poll something.
    "select pgtrickle.commit_offset('nowhere', 'c', 1)": 5,
    "select pgtrickle.commit_offset('taken', 'c', 1)": 5,
    "select pgtrickle.poll_outbox('nowhere', 'c')": 5,
}


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


def test_a_slip_is_said_in_a_few_lines_with_its_remedy(db: Session) -> None:
    program = psql()
    for slip, most in SLIPS.items():
        lines = seen(program, db.dsn, db.said(slip))

        assert lines[0].startswith("ERROR:  "), (slip, lines)
        assert any(line.startswith("HINT:  ") and len(line) > 10 for line in lines), (slip, lines)
        assert len(lines) == most, (slip, lines)


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
