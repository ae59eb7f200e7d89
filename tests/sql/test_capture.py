"""Capture triggers: what is written for which statement, and what must not hurt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.postgres import Database, PostgresServer
from tests.sql.outbox_session import Session, session

ORDERS = "create table orders (id int primary key, item text, price numeric)"


@pytest.fixture
def db(any_postgres_server: PostgresServer) -> Iterator[Session]:
    with any_postgres_server.migrated_database() as database, session(database.dsn) as opened:
        yield opened


@pytest.fixture
def orders(db: Session) -> Session:
    db.run(ORDERS)
    db.value("select pgtrickle.enable_outbox('orders')")
    return db


def events(db: Session, outbox: str = "outbox_orders") -> list[dict[str, object]]:
    return [row[0] for row in db.rows(f'select payload from pgtrickle."{outbox}" order by id')]


def inserted(*rows: dict[str, object]) -> dict[str, object]:
    return {"v": 1, "inserted": list(rows), "deleted": []}


def test_each_statement_writes_one_row_with_what_it_changed(orders: Session) -> None:
    orders.run("insert into orders values (1, 'pen', 2), (2, 'ink', 3)")
    orders.run("update orders set price = 9 where id = 1")
    orders.run("delete from orders where id = 2")
    orders.run("truncate orders")

    pen, ink = {"id": 1, "item": "pen", "price": 2}, {"id": 2, "item": "ink", "price": 3}
    assert events(orders) == [
        {"v": 1, "inserted": [pen, ink], "deleted": []},
        {"v": 1, "inserted": [pen | {"price": 9}], "deleted": [pen]},
        {"v": 1, "inserted": [], "deleted": [ink]},
        {"v": 1, "full_refresh": True, "inserted": [], "deleted": []},
    ]
    assert orders.rows(
        "select inserted_count, deleted_count, is_claim_check, headers"
        " from pgtrickle.outbox_orders order by id"
    ) == [(2, 0, False, {}), (1, 1, False, {}), (0, 1, False, {}), (0, 0, False, {})]
    assert orders.value("select count(distinct pgt_id) from pgtrickle.outbox_orders") == 1
    assert orders.value("select count(distinct refresh_id) from pgtrickle.outbox_orders") == 4


def test_a_statement_that_changes_no_row_writes_nothing(orders: Session) -> None:
    orders.run("update orders set price = 1")
    orders.run("delete from orders")
    orders.run("insert into orders select 1, 'x', 1 where false")

    assert events(orders) == []


def test_insert_on_conflict_do_update_writes_one_row_for_each_side(orders: Session) -> None:
    orders.run("insert into orders values (1, 'pen', 2)")
    orders.run(
        "insert into orders values (1, 'pen', 5), (2, 'ink', 3)"
        " on conflict (id) do update set price = excluded.price"
    )

    written = [(len(e["inserted"]), len(e["deleted"])) for e in events(orders)]  # type: ignore[arg-type]
    assert sorted(written[1:]) == [(1, 0), (1, 1)]


def test_copy_and_merge_are_captured(orders: Session) -> None:
    with orders.connection.cursor().copy("copy orders from stdin") as copy:
        copy.write_row((1, "pen", 2))
    orders.run(
        "merge into orders o using (values (1, 7), (2, 8)) as s (id, price) on s.id = o.id"
        " when matched then update set price = s.price"
        " when not matched then insert values (s.id, 'new', s.price)"
    )

    assert sum(len(e["inserted"]) for e in events(orders)) == 3  # type: ignore[misc,arg-type]


def test_a_rolled_back_statement_leaves_no_event(orders: Session) -> None:
    with orders.connection.transaction(force_rollback=True):
        orders.run("insert into orders values (1, 'pen', 2)")

    assert events(orders) == []


def test_many_rows_become_a_claim_check(orders: Session) -> None:
    orders.run("insert into orders select n, 'x', n from generate_series(1, 1000) as n")
    orders.run("update orders set price = price + 1")

    [inline, claim] = events(orders)
    assert len(inline["inserted"]) == 1000  # type: ignore[arg-type]
    assert claim == {"v": 1, "claim_check": True, "inserted_count": 1000, "deleted_count": 1000}
    assert orders.rows(
        "select row_op, min(row_num), max(row_num), count(*), count(distinct row_data -> 'id')"
        " from pgtrickle.outbox_delta_rows_orders where outbox_id = 2 group by 1 order by 2"
    ) == [("INSERT", 0, 999, 1000, 1000), ("DELETE", 1000, 1999, 1000, 1000)]


def test_large_rows_become_a_claim_check_by_their_bytes(db: Session) -> None:
    db.run("create table notes (id int primary key, body text)")
    db.value("select pgtrickle.enable_outbox('notes', claim_check_bytes => 100000)")
    # Compresses a hundredfold: what counts is what it is as JSON.
    for size in (10, 40_000, 99_000, 101_000):
        db.run("insert into notes values (%s, repeat('a', %s))", size, size)
    db.run("update notes set id = id + 1 where id = 99000")

    flags = [
        row[0] for row in db.rows("select is_claim_check from pgtrickle.outbox_notes order by id")
    ]
    assert flags == [False, False, False, True, True]
    assert db.value(
        "select length(row_data ->> 'body') from pgtrickle.outbox_delta_rows_notes"
    ) == (101_000)


def test_a_row_larger_than_jsonb_can_be_does_not_abort_the_statement(db: Session) -> None:
    db.run("create table blobs (id int primary key, body text)")
    db.value("select pgtrickle.enable_outbox('blobs')")

    db.run("insert into blobs values (1, repeat('a', 270000000)), (2, 'small')")

    assert events(db, "outbox_blobs") == [
        inserted({"id": 1, "pgtrickle_omitted": {"body": "54000"}}, {"id": 2, "body": "small"})
    ]


def test_partitions_are_captured_exactly_once_however_they_are_written(db: Session) -> None:
    db.run(
        "create table sales (id int, day int, primary key (id, day)) partition by range (day);"
        "create table sales_1 partition of sales for values from (0) to (10);"
        "create table sales_2 partition of sales for values from (10) to (20)"
        " partition by range (day);"
        "create table sales_2a partition of sales_2 for values from (10) to (20);"
    )
    db.value("select pgtrickle.enable_outbox('sales')")

    db.run("insert into sales values (1, 1), (2, 11)")
    db.run("insert into sales_1 values (3, 2)")
    db.run("insert into sales_2 values (4, 12)")
    db.run("insert into sales_2a values (5, 13)")
    db.run("update sales set day = 15 where id = 1")
    db.run("delete from sales_2a where id = 5")
    db.run("truncate sales")

    assert [
        ([r["id"] for r in e["inserted"]], [r["id"] for r in e["deleted"]])  # type: ignore[attr-defined]
        for e in events(db, "outbox_sales")
    ] == [([1, 2], []), ([3], []), ([4], []), ([5], []), ([1], [1]), ([], [5]), ([], [])]


PROBLEMS = "select relation, problem, remedy from pgtrickle.relay_capture_problems()"


def test_partitions_that_come_and_go_are_problems_that_repair_outbox_mends(db: Session) -> None:
    db.run(
        "create table sales (id int, day int) partition by range (day);"
        "create table sales_1 partition of sales for values from (0) to (10);"
    )
    db.value("select pgtrickle.enable_outbox('sales')")
    db.run(
        "create table sales_2 partition of sales for values from (10) to (20);"
        "alter table sales detach partition sales_1; insert into sales_2 values (1, 11)"
    )

    problems = db.rows(PROBLEMS)
    assert {row[0] for row in problems} == {"public.sales_1", "public.sales_2"}
    assert {row[2] for row in problems} == {"select pgtrickle.repair_outbox('public.sales')"}
    assert {row[1].split()[3] for row in problems} == {"missing:", "left"}
    with db.refused("RL002"):
        db.run("select pgtrickle.enable_outbox('sales')")
    assert db.value("select pgtrickle.repair_outbox('public.sales')") == 6
    db.run("insert into sales_2 values (2, 12); insert into sales_1 values (3, 3)")

    assert db.rows(PROBLEMS) == []
    assert db.value("select pgtrickle.repair_outbox('sales')") == 0
    assert events(db, "outbox_sales") == [inserted({"id": 2, "day": 12})]


def test_what_a_foreign_table_or_a_leaf_partition_would_miss_is_refused(db: Session) -> None:
    db.run(
        "create foreign data wrapper none; create server s foreign data wrapper none;"
        "create table sales (id int, day int) partition by range (day);"
        "create table sales_1 partition of sales for values from (0) to (10);"
        "create foreign table f partition of sales for values from (10) to (20) server s;"
        "create table parent (id int); create foreign table g () inherits (parent) server s"
    )
    for name, reason, hint in (
        ("sales", "foreign", "detach"), ("parent", "foreign", "detach"),
        ("sales_1", "written through its parent", "enable_outbox('public.sales')"),
        ("f", "foreign, temporary", "enable_outbox('public.sales')"),
    ):  # fmt: skip
        with db.refused("RL005") as said:
            db.run(f"select pgtrickle.enable_outbox('{name}')")
        assert reason in said.message_primary
        assert hint in said.message_hint
    db.run("alter table sales detach partition f; select pgtrickle.enable_outbox('sales')")
    db.run("alter table sales attach partition f for values from (10) to (20)")
    assert "detach the foreign table" in {row[2] for row in db.rows(PROBLEMS)}


def test_children_by_inheritance_are_captured_and_truncate_only_loses_nothing(db: Session) -> None:
    db.run("create table parent (id int); create table child (extra text) inherits (parent)")
    db.value("select pgtrickle.enable_outbox('parent')")

    db.run("insert into child values (1, 'x')")
    db.run("update parent set id = 2")
    db.run("truncate only parent")
    db.run("truncate parent")

    assert events(db, "outbox_parent") == [
        {"v": 1, "inserted": [{"id": 1, "extra": "x"}], "deleted": []},
        {"v": 1, "inserted": [{"id": 2}], "deleted": [{"id": 1}]},
        {"v": 1, "full_refresh": True, "inserted": [], "deleted": []},
    ]
    assert any("truncate only" in notice for notice in db.notices)


def test_renaming_and_altering_a_captured_table_keeps_it_captured(orders: Session) -> None:
    orders.run("insert into orders values (1, 'pen', 2)")
    orders.run("alter table orders rename to purchases")
    orders.run("alter table purchases drop column item, add column changed_rows int default 7")
    orders.run("insert into purchases (id, price) values (2, 3)")
    orders.run("alter table purchases rename column price to amount")
    orders.run("delete from purchases where id = 2")
    orders.run("alter table purchases alter column id type bigint")
    orders.run("insert into purchases (id, amount) values (3000000000, 1)")

    assert events(orders)[1:] == [
        {"v": 1, "inserted": [{"id": 2, "price": 3, "changed_rows": 7}], "deleted": []},
        {"v": 1, "inserted": [], "deleted": [{"id": 2, "amount": 3, "changed_rows": 7}]},
        {"v": 1, "inserted": [{"id": 3000000000, "amount": 1, "changed_rows": 7}], "deleted": []},
    ]
    for name in ("purchases", "public.purchases", "orders"):
        assert orders.value("select pgtrickle.relay_outbox_named(%s)", name) == "outbox_orders"
    assert orders.rows(PROBLEMS) == []


def test_generated_columns_and_awkward_column_names_are_captured(db: Session) -> None:
    db.run(
        'create table t (i int, changed int default 3, "new_rows" int default 4, "q""x" text,'
        " double int generated always as (i * 2) stored)"
    )
    db.value("select pgtrickle.enable_outbox('t')")

    db.run("insert into t (i) values (1)")

    assert events(db, "outbox_t") == [
        {
            "v": 1,
            "inserted": [{"i": 1, "changed": 3, "new_rows": 4, 'q"x': None, "double": 2}],
            "deleted": [],
        }
    ]


def test_virtual_generated_columns_are_left_out_rather_than_captured_as_null(
    migrated_database: Database,
) -> None:
    with session(migrated_database.dsn) as db:
        if db.connection.info.server_version < 180000:
            pytest.skip("virtual generated columns came with PostgreSQL 18")
        db.run("create table t (i int, double int generated always as (i * 2) virtual)")
        db.value("select pgtrickle.enable_outbox('t')")

        db.run("insert into t values (1)")

        assert events(db, "outbox_t")[0]["inserted"] == [{"i": 1}]


def test_changes_by_foreign_key_actions_are_captured(orders: Session) -> None:
    orders.run("create table lines (id int, order_id int references orders on delete cascade)")
    orders.value("select pgtrickle.enable_outbox('lines')")
    orders.run("insert into orders values (1, 'pen', 2)")
    orders.run("insert into lines values (1, 1), (2, 1)")

    orders.run("delete from orders")

    assert len(events(orders, "outbox_lines")[1]["deleted"]) == 2  # type: ignore[arg-type]


def test_an_application_that_may_only_insert_needs_no_other_right(orders: Session) -> None:
    orders.new_role("clerk")
    orders.run("grant insert on orders to clerk")

    orders.run("set role clerk")
    orders.run("insert into orders values (1, 'pen', 2)")
    with orders.refused("42501"):
        orders.run("select * from pgtrickle.outbox_orders")
    orders.run("reset role")

    assert len(events(orders)) == 1


def test_a_cast_to_json_runs_as_the_owner_of_its_table_and_type(db: Session) -> None:
    db.new_role("relay_diarist")
    db.run("create schema d authorization relay_diarist; set role relay_diarist")
    db.run(
        "create table d.label (id text, words text); insert into d.label values ('good', 'fine');"
        "create type d.mood as enum ('good');"
        "create function d.mood_json(d.mood) returns json language sql as $$select"
        " json_build_array(current_user, (select words from d.label where id = $1::text))$$;"
        "create cast (d.mood as json) with function d.mood_json(d.mood);"
        "create domain d.feeling as d.mood; create type d.pair as (a d.mood, b d.mood[]);"
        "create table d.diary (id int, feels d.mood, f d.feeling, p d.pair, many d.mood[]);"
        "select pgtrickle.enable_outbox('d.diary'); grant insert on d.diary to public;"
        "grant usage on schema d to public; reset role"
    )

    db.new_role("clerk")
    db.run("set role clerk; insert into d.diary values (1, 'good', 'good', ('good', '{good}'))")
    db.run("reset role")

    told = ["relay_diarist", "fine"]
    assert events(db, "outbox_diary")[0]["inserted"] == [
        {"id": 1, "feels": told, "f": told, "p": {"a": told, "b": [told]}, "many": None}
    ]


def test_creating_triggers_gives_up_on_a_busy_table_and_leaves_nothing(
    any_postgres_server: PostgresServer, db: Session
) -> None:
    db.run(ORDERS)
    info = db.connection.info
    with session(f"postgresql://{info.user}@{info.host}:{info.port}/{info.dbname}") as other:
        other.connection.autocommit = False
        other.run("insert into orders values (1, 'pen', 2)")
        db.run("set lock_timeout = '100ms'")
        with db.refused("55P03") as said:
            db.run("select pgtrickle.enable_outbox('orders')")
        other.connection.rollback()

    assert "lock_timeout" in said.message_hint
    assert db.rows("select * from pgtrickle.pgt_outbox_config") == []
    assert db.value("show lock_timeout") == "100ms"
    db.run("reset lock_timeout")
    db.value("select pgtrickle.enable_outbox('orders')")
    assert db.value("show lock_timeout") == "0"


@pytest.mark.parametrize("owner", ["postgres", "capture_owner"])
def test_few_plain_rows_take_the_quick_way_whoever_owns_the_table(db: Session, owner: str) -> None:
    db.new_role("capture_owner")
    db.run("grant create on schema public to capture_owner; set track_functions = 'all'")
    db.run(f"set role {owner}; {ORDERS}; select pgtrickle.enable_outbox('orders')")
    slow_calls = (
        "select coalesce(sum(calls), 0) from pg_stat_xact_user_functions"
        " where funcname = 'relay_row_expression'"
    )
    for statement, is_quick in (
        ("insert into orders values (1, 'pen', 2)", True),
        ("update orders set id = 2", True),
        ("alter table orders rename id to number", True),
        # The key has another name than in the settings: it must be told with each row.
        ("delete from orders", False),
    ):
        with db.connection.transaction():
            db.run(statement)
            assert (db.value(slow_calls) == 0) is is_quick, statement
