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
    with db.refused("42501"):
        db.run("select pgtrickle.enable_outbox('relay_owner_a.orders')")
    db.run("set role relay_owner_a; select pgtrickle.enable_outbox('relay_owner_a.orders')")
    db.run("set role relay_owner_b")
    with db.refused("RL002"):
        db.run("select pgtrickle.enable_outbox('relay_owner_a.orders')")
    assert db.value("select pgtrickle.repair_outbox('relay_owner_a.orders')") == 0
    for call in (
        "disable_outbox('relay_owner_a.orders')",
        "outbox_status('relay_owner_a.orders')",
        "outbox_publish('outbox_orders', '[1]')",
    ):
        with db.refused("42501"):
            db.run(f"select pgtrickle.{call}")


def test_the_role_in_force_counts_and_not_the_login(db: Session) -> None:
    # The login is a superuser, who may everything; the function still belongs to the table's owner.
    db.run("set role relay_owner_b")
    with db.refused("42501"):
        db.run("select pgtrickle.enable_outbox('relay_owner_a.orders')")
    db.run("reset role")
    db.run("select pgtrickle.enable_outbox('relay_owner_a.orders')")
    owner = "select proowner::regrole::text from pg_proc where proname = 'pgtrickle_capture_orders'"
    assert db.value(owner) == "relay_owner_a"


def test_an_owner_who_may_not_create_in_the_schema_is_told_the_grant(db: Session) -> None:
    db.run("create table public.loose (id int); alter table public.loose owner to relay_owner_a")
    db.run("revoke create on schema public from public; set role relay_owner_a")
    with db.refused("42501") as said:
        db.run("select pgtrickle.enable_outbox('public.loose')")
    assert said.message_hint == "grant create on schema public to relay_owner_a"
    db.run(f"reset role; {said.message_hint}; set role relay_owner_a")
    db.run("select pgtrickle.enable_outbox('public.loose'); insert into public.loose values (1)")


def test_a_member_of_the_owner_is_an_owner(db: Session) -> None:
    db.new_role("relay_owner_member", "relay_owner_a")
    db.run("set role relay_owner_member")

    assert db.value("select pgtrickle.enable_outbox('relay_owner_a.orders')") == "outbox_orders"


def test_a_capture_function_cannot_be_attached_by_others(db: Session) -> None:
    db.run("set role relay_owner_a; select pgtrickle.enable_outbox('relay_owner_a.orders')")
    db.run("set role relay_owner_b; create table relay_owner_b.forged (id int)")
    with db.refused("42501"):
        db.run(
            "create trigger forge after insert on relay_owner_b.forged"
            " referencing new table as new_rows for each statement"
            " execute function relay_owner_a.pgtrickle_capture_orders()"
        )


def test_the_relays_role_reads_outboxes_and_nothing_of_the_catalog(db: Session) -> None:
    db.run("set role relay_owner_a; select pgtrickle.enable_outbox('relay_owner_a.orders')")
    db.run("insert into relay_owner_a.orders values (1)")
    db.run("reset role")
    db.new_role("relay_login", "pgtrickle_relay")
    db.run("set role relay_login")

    for relation in ("outbox_orders", "outbox_delta_rows_orders"):
        db.rows(f"select * from pgtrickle.{relation}")
    for call in (
        "relay_outbox_of('outbox_orders')",
        "relay_outbox_named('relay_owner_a.orders')",
        "relay_sleep('outbox_orders', 'me', 1)",
        "relay_sleep('outbox_orders', 'me')",
        "outbox_status('orders')",
        "outbox_rows_consumed('orders', 1)",
        "relay_capture_problems()",
    ):
        db.rows(f"select * from pgtrickle.{call}")
    for table in (
        "pgt_outbox_config",
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
    with db.refused("42501"):
        db.run("select pgtrickle.enable_outbox('events', capture => 'none')")
    db.run("set role relay_publisher_login")
    db.run("select pgtrickle.enable_outbox('events', capture => 'none')")

    assert db.value("select pgtrickle.outbox_publish('events', '[1]')") == 1
    with db.refused("42501"):
        db.run("select * from pgtrickle.outbox_events")
    db.run("set role relay_owner_b")
    with db.refused("42501"):
        db.run("select pgtrickle.disable_outbox('events')")
    db.run("set role relay_publisher_login; select pgtrickle.disable_outbox('events')")


def test_a_relay_member_makes_a_stream_whose_publishers_it_names(db: Session) -> None:
    db.new_role("relay_relay_login", "pgtrickle_relay")
    db.new_role("relay_publisher_login", "pgtrickle_publisher")
    db.new_role("relay_named_login")
    db.run("set role relay_relay_login")
    db.run(
        "select pgtrickle.enable_outbox('events', capture => 'none',"
        " publishers => '{relay_named_login}')"
    )
    with db.refused("42501"):
        db.run("select pgtrickle.outbox_publish('events', '[1]')")
    db.run("set role relay_publisher_login")
    with db.refused("42501"):
        db.run("select pgtrickle.outbox_publish('events', '[1]')")
    db.run("set role relay_named_login")

    assert db.value("select pgtrickle.outbox_publish('events', '[1]')") == 1
    with db.refused("42501"):
        db.run("select pgtrickle.disable_outbox('events')")
    db.run("set role relay_relay_login; select pgtrickle.disable_outbox('events')")


def test_a_captured_table_has_no_publishers(db: Session) -> None:
    with db.refused("RL005"):
        db.run("select pgtrickle.enable_outbox('relay_owner_a.orders', publishers => '{public}')")


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
