"""A dump, restored: groups and pipelines go on where they were."""

from __future__ import annotations

import pytest

from tests.servers.postgres import PostgresServer
from tests.sql.outbox_session import Session, session


def write(db: Session, rows: int = 1) -> None:
    db.run(
        "insert into pgtrickle.outbox_events (payload) select '{}' from generate_series(1, %s)",
        rows,
    )


def poll(db: Session, group: str = "g") -> list[int]:
    return [
        row[0] for row in db.rows("select outbox_id from pgtrickle.poll_outbox(%s, 'one')", group)
    ]


def test_after_a_dump_and_restore_groups_and_pipelines_go_on_where_they_were(
    any_postgres_server: PostgresServer,
) -> None:
    server = any_postgres_server
    with server.migrated_database() as old, server.database() as new:
        with session(old.dsn) as db, session(old.dsn) as writer:
            for outbox in ("first", "events"):
                db.run("select pgtrickle.enable_outbox(%s, capture => 'none')", outbox)
            for number in range(10):
                db.run(
                    "select pgtrickle.create_consumer_group(%s, 'events', 'earliest')", f"g{number}"
                )
            write(db, 3)
            writer.run("begin")
            write(writer)
            write(db)
            assert poll(db, "g1") == [1, 2, 3, 5]
            db.run("select pgtrickle.commit_offset('g1', 'one', 3)")
            db.run(
                "select pgtrickle.set_relay_outbox('p', 'events', null, '{\"type\": \"stdout\"}')"
            )
            db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w')")
            db.run("select pgtrickle.relay_commit('default', 'p', 1, 5, '{}', '{4}', '{4}')")
        with session(new.dsn) as db:
            # Other relations have other oids there.
            db.run("create table filler (id serial primary key, t text)")
        server.copy(old, new)

        with session(new.dsn) as db:
            write(db, 2)
            assert poll(db, "g0") == [1, 2, 3, 5, 6, 7]
            assert poll(db, "g1") == [6, 7]
            db.run("update pgtrickle.relay_group_leases set expires_at = leased_at")
            db.run("update pgtrickle.relay_groups set leases_since = '-infinity'")
            assert poll(db, "g1") == [5, 6, 7]
            assert db.value("select pending_gaps from pgtrickle.consumer_lag('g1')") == 0
            assert db.rows(
                "select epoch, last_change_id, gap_first_ids"
                " from pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w')"
            ) == [(2, 5, [4])]
            assert {
                row[0] for row in db.rows("select outbox_table_name from pgtrickle.relay_groups")
            } == {"outbox_events"}


def test_no_table_of_ours_keeps_the_oid_of_an_outbox(any_postgres_server: PostgresServer) -> None:
    with any_postgres_server.migrated_database() as created, session(created.dsn) as db:
        found = db.rows(
            "select c.relname, a.attname from pg_attribute as a"
            " join pg_class as c on c.oid = a.attrelid"
            " where c.relnamespace = 'pgtrickle'::regnamespace and c.relkind = 'r' and a.attnum > 0"
            " and a.atttypid = 'oid'::regtype"
        )

    assert found == []


@pytest.mark.parametrize("ids_go_on", [True, False], ids=["above", "from 1"])
def test_an_outbox_that_was_made_again_loses_no_row_of_its_group(
    any_postgres_server: PostgresServer, ids_go_on: bool
) -> None:
    with any_postgres_server.migrated_database() as created, session(created.dsn) as db:
        db.run("select pgtrickle.enable_outbox('events', capture => 'none')")
        db.run("select pgtrickle.create_consumer_group('g', 'events', 'earliest')")
        write(db, 3)
        assert poll(db) == [1, 2, 3]
        db.run("select pgtrickle.commit_offset('g', 'one', 2)")
        db.run("select pgtrickle.disable_outbox('events')")
        if not ids_go_on:
            db.run("delete from pgtrickle.relay_outbox_high_water")
        db.run("select pgtrickle.enable_outbox('events', capture => 'none')")
        write(db, 4)

        assert poll(db) == ([4, 5, 6, 7] if ids_go_on else [1, 2, 3, 4])
        assert poll(db) == []
