"""Beside the extension's objects: they stay as they are, and the relay's own functions work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from relay.migrate import StepKind, migrate
from tests.servers.postgres import PostgresServer
from tests.sql.outbox_session import Session, session

FIXTURE = Path(__file__).with_name("extension_fixture.sql")

THEIRS = """
select 'relation', c.relname::text, c.relowner::regrole::text,
    (select string_agg(
        concat_ws(' ', a.attname, a.atttypid::regtype, a.attnotnull), ',' order by a.attnum
     ) from pg_attribute as a where a.attrelid = c.oid and a.attnum > 0),
    obj_description(c.oid, 'pg_class'),
    (select count(*) from pg_trigger as t where t.tgrelid = c.oid)::text
from pg_class as c where c.relnamespace = 'pgtrickle'::regnamespace
union all
select 'function', p.oid::regprocedure::text, p.proowner::regrole::text, p.prosrc,
    obj_description(p.oid, 'pg_proc'), p.proacl::text
from pg_proc as p where p.pronamespace = 'pgtrickle'::regnamespace
"""


@pytest.fixture
def empty_dsn(any_postgres_server: PostgresServer) -> Iterator[str]:
    with any_postgres_server.database() as created:
        yield created.dsn


@pytest.fixture
async def beside(empty_dsn: str) -> Session:
    with session(empty_dsn) as opened:
        opened.run(FIXTURE.read_text())
        before = set(opened.rows(THEIRS))
    connection = await asyncpg.connect(empty_dsn)
    await migrate(connection, on_step=lambda _: None)
    again = await migrate(connection, on_step=lambda _: None)
    await connection.close()
    assert {step.kind for step in again.steps if step.is_applied} == {StepKind.FUNCTIONS}
    opened = Session(empty_dsn)
    assert before <= set(opened.rows(THEIRS)), before - set(opened.rows(THEIRS))
    return opened


@pytest.fixture(autouse=True)
def close_after(beside: Session) -> Iterator[None]:
    yield
    beside.close()


def test_the_extensions_functions_still_answer_under_their_names(beside: Session) -> None:
    assert beside.value("select pgtrickle.enable_outbox('shipments')") == "the extension's"
    assert beside.value("select pgtrickle.outbox_status('shipments')") == {"of": "the extension"}


async def test_an_outbox_that_the_extension_adds_later_is_readable_after_the_next_migrate(
    beside: Session, empty_dsn: str
) -> None:
    may_read = "select has_table_privilege('pgtrickle_relay', 'pgtrickle.outbox_returns', 'select')"
    beside.run("create table pgtrickle.outbox_returns (like pgtrickle.outbox_shipments)")
    assert beside.value(may_read) is False

    connection = await asyncpg.connect(empty_dsn)
    await migrate(connection, on_step=lambda _: None)
    await connection.close()

    assert beside.value(may_read) is True


def test_an_outbox_of_the_extension_is_found_with_its_spelling(beside: Session) -> None:
    for name in ("shipments", "public.shipments", "outbox_shipments"):
        assert beside.rows(
            "select outbox_relation, stream_table, delta_relation, delta_style, key_columns,"
            " has_headers, sequence_cache, last_id, max_id from pgtrickle.relay_outbox(%s)",
            name,
        ) == [
            (
                "pgtrickle.outbox_shipments",
                "shipments",
                "pgtrickle.outbox_delta_rows_shipments",
                "op",
                None,
                False,
                1,
                1,
                1,
            )
        ]


def test_a_relay_reads_it_with_nothing_but_its_role(beside: Session) -> None:
    beside.new_role("relay_beside", "pgtrickle_relay")
    beside.run("set role relay_beside")

    assert beside.value("select max_id from pgtrickle.relay_outbox('shipments')") == 1
    assert beside.value("select count(*) from pgtrickle.outbox_shipments") == 1
    assert beside.rows("select * from pgtrickle.outbox_delta_rows_shipments") == []
    beside.run("select pgtrickle.relay_sleep('outbox_shipments', 'relay', 10)")
    beside.run("select pgtrickle.relay_wake('outbox_shipments', 'relay')")


def test_an_outbox_of_the_extension_is_neither_swept_nor_written(beside: Session) -> None:
    beside.run("update pgtrickle.outbox_shipments set created_at = now() - interval '30 days'")

    assert beside.value("select pgtrickle.relay_sweep_outbox('outbox_shipments')") == 0
    with beside.refused("RL005"):
        beside.run("select pgtrickle.outbox_publish('shipments', '[1]')")
    assert beside.value("select count(*) from pgtrickle.outbox_shipments") == 1
