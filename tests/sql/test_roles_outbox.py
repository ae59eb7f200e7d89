"""Who may do what with outboxes: owners, relays, publishers, strangers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.postgres import PostgresServer
from tests.sql.outbox_session import Session, session


@pytest.fixture
def db(any_postgres_server: PostgresServer) -> Iterator[Session]:
    with any_postgres_server.migrated_database() as database, session(database.dsn) as opened:
        for role in ("relay_owner_a", "relay_owner_b"):
            opened.new_role(role)
        for role in ("relay_owner_a", "relay_owner_b"):
            opened.run(f"create schema {role} authorization {role}")
            opened.run(f"grant usage on schema {role} to relay_owner_a, relay_owner_b")
        opened.run("set role relay_owner_a; create table relay_owner_a.orders (id int); reset role")
        yield opened


def test_a_table_owner_without_any_other_right_enables_and_disables(db: Session) -> None:
    db.run("set role relay_owner_a; set search_path = relay_owner_a")

    assert db.value("select pgtrickle.enable_outbox('orders')") == "outbox_orders"
    db.run("insert into orders values (1)")
    assert db.value("select pgtrickle.outbox_status('orders') -> 'row_count'") == 1
    db.run("select pgtrickle.disable_outbox('orders')")


def test_another_role_may_not_touch_a_table_or_its_outbox(db: Session) -> None:
    db.run("set role relay_owner_b")
    with db.refused("RL004") as said:
        db.run("select pgtrickle.enable_outbox('relay_owner_a.orders')")
    assert said.message_hint.startswith("set role relay_owner_a")
    with db.refused("RL004"):
        db.run(
            "select pgtrickle.relay_create_outbox('orders', 'relay_owner_a.orders'::regclass,"
            " 24, true, true, null, 1, 1)"
        )
    db.run("set role relay_owner_a; select pgtrickle.enable_outbox('relay_owner_a.orders')")
    db.run("set role relay_owner_b")
    for call in (
        "disable_outbox('relay_owner_a.orders')",
        "relay_drop_outbox('outbox_orders')",
        "relay_open_capture('outbox_orders')",
        "outbox_status('relay_owner_a.orders')",
        "enable_outbox('relay_owner_a.orders')",
    ):
        with db.refused("RL004"):
            db.run(f"select pgtrickle.{call}")
    with db.refused("42501"):
        db.run("select pgtrickle.outbox_publish('outbox_orders', '[1]')")


def test_the_role_in_force_counts_and_not_the_login(db: Session) -> None:
    # The login is a superuser, who may everything.
    db.run("set role relay_owner_b")
    with db.refused("RL004"):
        db.run("select pgtrickle.enable_outbox('relay_owner_a.orders')")
    db.run("reset role")
    db.run("select pgtrickle.enable_outbox('relay_owner_a.orders')")


def test_a_member_of_the_owner_is_an_owner(db: Session) -> None:
    db.new_role("relay_owner_member", "relay_owner_a")
    db.run("set role relay_owner_member")

    assert db.value("select pgtrickle.enable_outbox('relay_owner_a.orders')") == "outbox_orders"


def test_a_capture_function_cannot_be_attached_to_another_table(db: Session) -> None:
    db.run("set role relay_owner_a; select pgtrickle.enable_outbox('relay_owner_a.orders')")
    db.run("create table relay_owner_a.forged (id int)")
    for role in ("relay_owner_a", "relay_owner_b"):
        db.run(f"set role {role}; create table if not exists {role}.forged (id int)")
        with db.refused("42501"):
            db.run(
                f"create trigger forge after insert on {role}.forged"
                " referencing new table as new_rows for each statement"
                " execute function pgtrickle.outbox_capture_orders()"
            )


def test_the_relays_role_reads_outboxes_and_nothing_of_the_catalog(db: Session) -> None:
    db.run("set role relay_owner_a; select pgtrickle.enable_outbox('relay_owner_a.orders')")
    db.run("insert into relay_owner_a.orders values (1)")
    db.run("reset role")
    db.new_role("relay_login", "pgtrickle_relay")
    db.run("set role relay_login")

    for relation in ("outbox_orders", "outbox_delta_rows_orders", "pgt_outbox_latest_orders"):
        db.rows(f"select * from pgtrickle.{relation}")
    for call in (
        "relay_outbox('orders')",
        "relay_outbox('relay_owner_a.orders')",
        "relay_sweep_outbox('outbox_orders')",
        "relay_sleep('outbox_orders', 'me', 1)",
        "relay_wake('outbox_orders', 'me')",
        "outbox_status('orders')",
        "outbox_rows_consumed('orders', 1)",
        "relay_uncaptured_partitions()",
    ):
        db.rows(f"select * from pgtrickle.{call}")
    for table in (
        "pgt_outbox_config",
        "relay_outbox_settings",
        "relay_outbox_high_water",
        "relay_sleepers",
        "relay_migrations",
        "relay_outbox_config",
    ):
        with db.refused("42501"):
            db.run(f"select * from pgtrickle.{table}")
    with db.refused("42501"):
        db.run("delete from pgtrickle.outbox_orders")


def test_a_publisher_publishes_and_enables_streams_without_a_table(db: Session) -> None:
    db.new_role("relay_publisher_login", "pgtrickle_publisher")
    db.run("set role relay_owner_b")
    with db.refused("RL004"):
        db.run("select pgtrickle.enable_outbox('events', capture => 'none')")
    db.run("set role relay_publisher_login")
    db.run("select pgtrickle.enable_outbox('events', capture => 'none')")

    assert db.value("select pgtrickle.outbox_publish('events', '[1]')") == 1
    with db.refused("42501"):
        db.run("select * from pgtrickle.outbox_events")
    db.run("set role relay_owner_b")
    with db.refused("RL004"):
        db.run("select pgtrickle.disable_outbox('events')")
    db.run("set role relay_publisher_login; select pgtrickle.disable_outbox('events')")


def test_everything_of_ours_belongs_to_the_owner_role_and_nothing_runs_as_superuser(
    db: Session,
) -> None:
    db.run("select pgtrickle.enable_outbox('relay_owner_a.orders')")

    assert (
        db.rows(
            "select c.relname from pg_class as c where c.relnamespace = 'pgtrickle'::regnamespace"
            " and c.relowner <> 'pgtrickle_owner'::regrole"
            " union all select p.proname from pg_proc as p"
            " where p.pronamespace = 'pgtrickle'::regnamespace"
            " and p.proowner <> 'pgtrickle_owner'::regrole"
        )
        == []
    )
    assert (
        db.rows(
            "select p.oid::regprocedure::text from pg_proc as p"
            " where p.pronamespace = 'pgtrickle'::regnamespace and p.prosecdef"
            " and not coalesce('search_path=pg_catalog, pg_temp' = any (p.proconfig), false)"
        )
        == []
    )
