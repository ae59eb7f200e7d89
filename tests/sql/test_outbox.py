"""Outboxes: names, errors, publishing, waking, retention, high water."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.postgres import PostgresServer
from tests.sql.outbox_session import Session, session


@pytest.fixture
def db(any_postgres_server: PostgresServer) -> Iterator[Session]:
    with any_postgres_server.migrated_database() as database, session(database.dsn) as opened:
        yield opened


@pytest.fixture
def orders(db: Session) -> Session:
    db.run("create table orders (id int primary key, item text)")
    db.value("select pgtrickle.enable_outbox('orders')")
    return db


def test_a_missing_table_is_an_error_that_says_what_to_do(db: Session) -> None:
    for name in ("nowhere", "no.where", "Orders", "a.b.c.d", "", "'", '"', "x" * 200, "🐘"):
        with db.refused("RL001") as said:
            db.run("select pgtrickle.enable_outbox(%s)", name)
        assert "capture => 'none'" in said.message_hint
    with db.refused("RL001"):
        db.run("select pgtrickle.enable_outbox(null)")


def test_enabling_twice_and_disabling_what_is_not_enabled_are_errors(orders: Session) -> None:
    with orders.refused("RL002") as said:
        orders.run("select pgtrickle.enable_outbox('orders')")
    assert "outbox_status" in said.message_hint
    orders.run("select pgtrickle.disable_outbox('orders')")
    with orders.refused("RL003") as said:
        orders.run("select pgtrickle.disable_outbox('orders')")
    assert said.message_hint == "select pgtrickle.enable_outbox('orders')"
    orders.run("select pgtrickle.disable_outbox('orders', if_exists => true)")
    for call in (
        "relay_outbox('orders')",
        "outbox_status('orders')",
        "outbox_rows_consumed('orders', 1)",
        "outbox_publish('orders', '[1]')",
    ):
        with orders.refused("RL003"):
            orders.run(f"select pgtrickle.{call}")


def test_what_is_no_ordinary_table_is_refused(db: Session) -> None:
    db.run("create view v as select 1 as id; create temporary table temporary_one (id int)")
    for name in ("v", "temporary_one", "pg_class"):
        with db.refused("RL005"):
            db.run("select pgtrickle.enable_outbox(%s)", name)


def test_an_unknown_key_column_is_refused(db: Session) -> None:
    db.run("create table t (id int)")
    with db.refused("42703") as said:
        db.run("select pgtrickle.enable_outbox('t', key_columns => '{nope}')")
    assert "nope" in said.message_primary


def test_relay_outbox_tells_a_reader_everything(orders: Session) -> None:
    orders.run("insert into orders values (1, 'pen'); ")
    orders.run("insert into orders values (2, 'ink')")
    oid = orders.value("select 'pgtrickle.outbox_orders'::regclass::oid::int")

    for name in ("orders", "public.orders", "outbox_orders", "pgtrickle.outbox_orders"):
        assert orders.rows(
            "select outbox_table, outbox_relation, outbox_oid::int, stream_table, delta_relation,"
            " delta_style, key_columns, has_headers, retention_hours, sequence_cache, last_id,"
            " max_id, swept_through from pgtrickle.relay_outbox(%s)",
            name,
        ) == [
            (
                "outbox_orders",
                "pgtrickle.outbox_orders",
                oid,
                "orders",
                "pgtrickle.outbox_delta_rows_orders",
                "row_op",
                ["id"],
                True,
                24,
                1,
                2,
                2,
                0,
            )
        ]


def test_the_key_is_the_primary_key_in_its_order_or_what_was_said(db: Session) -> None:
    db.run('create table a (x int, "Y" int, primary key ("Y", x)); create table b (x int, z int)')
    db.run(
        "select pgtrickle.enable_outbox('a'), pgtrickle.enable_outbox('b', key_columns => '{z}')"
    )

    assert db.value("select key_columns from pgtrickle.relay_outbox('a')") == ["Y", "x"]
    assert db.value("select key_columns from pgtrickle.relay_outbox('b')") == ["z"]


def test_awkward_names_work_everywhere(db: Session) -> None:
    names = ['O"rd.ers', "Ünï 🐘", "%s {x}", "a'b", "select", "delta_rows_x", "x"]
    for name in names:
        quoted = '"' + name.replace('"', '""') + '"'
        db.connection.execute(f"create table {quoted} (id int primary key)")
        outbox = db.value("select pgtrickle.enable_outbox(%s)", quoted)
        db.connection.execute(f"insert into {quoted} values (1)")

        assert outbox == f"outbox_{name}"
        [relation, stream] = db.rows(
            "select outbox_relation, stream_table from pgtrickle.relay_outbox(%s)", quoted
        )[0]
        assert stream == name
        assert db.value(f"select payload -> 'inserted' from {relation}") == [{"id": 1}]
        assert db.value("select pgtrickle.outbox_status(%s) -> 'row_count'", quoted) == 1
    for name in names:
        db.run("select pgtrickle.disable_outbox(%s)", '"' + name.replace('"', '""') + '"')
    assert db.value("select count(*) from pgtrickle.pgt_outbox_config") == 0


def test_long_names_are_cut_to_63_bytes_and_collisions_get_a_digest(db: Session) -> None:
    first, second = "é" * 30 + "a", "é" * 30 + "b"
    long_one, long_two = "t" * 62 + "1", "t" * 62 + "2"
    outboxes = []
    for name in (first, second, long_one, long_two):
        db.connection.execute(f'create table "{name}" (id int)')
        outboxes.append(db.value("select pgtrickle.enable_outbox(%s)", f'"{name}"'))
        db.connection.execute(f'insert into "{name}" values (1)')

    assert outboxes[0] == "outbox_" + "é" * 28
    assert outboxes[2] == "outbox_" + "t" * 56
    for cut, name in ((outboxes[1], second), (outboxes[3], long_two)):
        digest = db.value("select left(md5('public.' || %s), 7)", name)
        assert cut.endswith(f"_{digest}")
        assert len(cut.encode()) <= 63
    for name, outbox in zip((first, second, long_one, long_two), outboxes, strict=True):
        assert (
            db.value("select outbox_table from pgtrickle.relay_outbox(%s)", f'"{name}"') == outbox
        )
        assert db.value("select max_id from pgtrickle.relay_outbox(%s)", outbox) == 1


def test_tables_of_one_name_in_two_schemas_have_outboxes_of_their_own(orders: Session) -> None:
    orders.run("create schema shop; create table shop.orders (id int)")
    outbox = orders.value("select pgtrickle.enable_outbox('shop.orders')")
    orders.run("insert into shop.orders values (1)")

    assert outbox.startswith("outbox_orders_")
    assert orders.value("select outbox_table from pgtrickle.relay_outbox('shop.orders')") == outbox
    assert orders.value("select outbox_table from pgtrickle.relay_outbox('orders')") == (
        "outbox_orders"
    )
    orders.run("set search_path = pg_catalog")
    with orders.refused("RL003") as said:
        orders.run("select pgtrickle.relay_outbox('orders')")
    assert "outbox_orders" in said.message_detail


def test_ids_of_an_outbox_enabled_again_continue_above_the_old_ones(orders: Session) -> None:
    orders.run("insert into orders values (1, 'pen')")
    with orders.connection.transaction(force_rollback=True):
        orders.run("insert into orders values (2, 'ink')")
    orders.run("select pgtrickle.disable_outbox('orders')")
    assert orders.value("select count(*) from pg_trigger where tgrelid = 'orders'::regclass") == 0

    orders.run("select pgtrickle.enable_outbox('orders')")
    assert orders.rows("select last_id, max_id from pgtrickle.relay_outbox('orders')") == [(2, 0)]
    orders.run("insert into orders values (3, 'cup')")
    assert orders.value("select id from pgtrickle.outbox_orders") == 3
    orders.run("select pgtrickle.disable_outbox('orders')")
    orders.run("select pgtrickle.enable_outbox('orders')")
    assert orders.value("select last_id from pgtrickle.relay_outbox('orders')") == 3


def test_an_outbox_survives_its_table_and_can_be_disabled_by_who_enabled_it(
    orders: Session,
) -> None:
    orders.run("insert into orders values (1, 'pen'); drop table orders")

    assert orders.value("select max_id from pgtrickle.relay_outbox('orders')") == 1
    orders.run("select pgtrickle.disable_outbox('orders')")
    assert orders.value("select count(*) from pgtrickle.pgt_outbox_config") == 0


def test_publishing_writes_rows_headers_and_claim_checks(db: Session) -> None:
    db.value("select pgtrickle.enable_outbox('billing events', capture => 'none')")

    assert (
        db.value(
            "select pgtrickle.outbox_publish('billing events', '[{\"a\": 1}]', '[{\"a\": 0}]',"
            ' \'{"traceparent": "00"}\')'
        )
        == 1
    )
    assert db.value("select pgtrickle.outbox_publish('billing events', '[]')") is None
    assert (
        db.value(
            "select pgtrickle.outbox_publish('billing events',"
            " (select jsonb_agg(n) from generate_series(1, 1001) as n), '[\"gone\"]')"
        )
        == 2
    )

    assert db.rows(
        'select payload, headers, is_claim_check from pgtrickle."outbox_billing events"'
        " where id = 1"
    ) == [({"v": 1, "inserted": [{"a": 1}], "deleted": [{"a": 0}]}, {"traceparent": "00"}, False)]
    assert db.rows(
        'select row_num, row_op, row_data from pgtrickle."outbox_delta_rows_billing events"'
        " where row_num in (0, 1001) order by 1"
    ) == [(0, "INSERT", 1), (1001, "DELETE", "gone")]
    with db.refused("RL002"):
        db.run("select pgtrickle.enable_outbox('billing events', capture => 'none')")


@pytest.mark.parametrize(
    "arguments",
    ["'{}'", "null", "'[]', null", "'[]', '1'", "'[1]', headers => '[]'", "'[1]', headers => null"],
)
def test_publishing_what_is_no_array_is_refused(orders: Session, arguments: str) -> None:
    with orders.refused("22023") as said:
        orders.run(f"select pgtrickle.outbox_publish('orders', {arguments})")
    assert said.message_hint


def test_publishers_notify_only_while_a_relay_sleeps(orders: Session) -> None:
    orders.run("listen pgtrickle_outbox_new")

    def heard() -> list[str]:
        orders.run("select 1")
        return [said.payload for said in orders.connection.notifies(timeout=0.2)]

    orders.run("insert into orders values (1, 'pen')")
    assert heard() == []
    orders.run("select pgtrickle.relay_sleep('outbox_orders', 'relay 1', 60)")
    orders.run("insert into orders values (2, 'ink')")
    assert heard() == ["outbox_orders"]
    orders.run("select pgtrickle.relay_wake('outbox_orders', 'relay 1')")
    orders.run("insert into orders values (3, 'cup')")
    assert heard() == []
    orders.run("select pgtrickle.relay_sleep('outbox_orders', 'relay 1', -1)")
    orders.run("insert into orders values (4, 'jar')")
    assert heard() == []


def test_the_sleeping_flag_is_read_at_commit(orders: Session) -> None:
    with session(_same_database(orders)) as writer:
        orders.run("listen pgtrickle_outbox_new")
        with writer.connection.transaction():
            writer.run("insert into orders values (1, 'pen')")
            orders.run("select pgtrickle.relay_sleep('outbox_orders', 'relay 1', 60)")

        assert [said.payload for said in orders.connection.notifies(timeout=5, stop_after=1)] == [
            "outbox_orders"
        ]


def test_notifying_can_be_switched_off_for_an_outbox(db: Session) -> None:
    db.run("create table quiet (id int)")
    db.value("select pgtrickle.enable_outbox('quiet', notify => false)")
    db.run("listen pgtrickle_outbox_new")
    db.run("select pgtrickle.relay_sleep('outbox_quiet', 'relay 1', 60)")
    db.run("insert into quiet values (1)")

    assert list(db.connection.notifies(timeout=0.2)) == []


def test_sweeping_deletes_only_what_is_old_and_behind_every_reader(orders: Session) -> None:
    orders.run("select pgtrickle.enable_outbox('old', capture => 'none')")
    orders.run("insert into pgtrickle.outbox_old (payload) select '{}' from generate_series(1, 20)")
    orders.run(
        "update pgtrickle.outbox_old set created_at = now() - interval '25 hours' where id <= 15"
    )
    orders.run("insert into pgtrickle.outbox_delta_rows_old values (1, 0, 'INSERT', '{}')")
    orders.run(
        "insert into pgtrickle.relay_outbox_config (name, enabled, config, outbox_table_name)"
        " values ('fast', true, '{}', 'outbox_old'), ('slow', false, '{}', 'outbox_old'),"
        " ('other', false, '{}', 'outbox_orders')"
    )
    assert orders.value("select pgtrickle.relay_sweep_outbox('outbox_old')") == 0

    orders.run(
        "insert into pgtrickle.relay_consumer_offsets"
        " (relay_group_id, pipeline_id, outbox_table, last_change_id) values"
        " ('default', 'fast', 'outbox_old', 20), ('default', 'slow', 'outbox_old', 10)"
    )
    orders.run("insert into pgtrickle.relay_pending_gaps values ('default', 'fast', 3, 4)")
    assert orders.value("select pgtrickle.relay_sweep_outbox('outbox_old', 5)") == 3
    assert orders.value("select pgtrickle.relay_sweep_outbox('outbox_old')") == 5
    left = [row[0] for row in orders.rows("select id from pgtrickle.outbox_old order by id")]
    assert left == [3, 4, *range(11, 21)]
    assert orders.value("select count(*) from pgtrickle.outbox_delta_rows_old") == 0

    orders.run("delete from pgtrickle.relay_pending_gaps")
    orders.run("update pgtrickle.relay_consumer_offsets set last_change_id = 20")
    assert orders.value("select pgtrickle.relay_sweep_outbox('outbox_old')") == 7
    assert orders.rows("select swept_through, last_id from pgtrickle.relay_outbox('old')") == [
        (15, 20)
    ]
    assert orders.value("select pgtrickle.outbox_status('old') -> 'last_drained_count'") == 7


def test_one_sweeper_works_at_a_time(orders: Session) -> None:
    orders.run("update pgtrickle.pgt_outbox_config set retention_hours = 0")
    orders.run("insert into orders values (1, 'pen')")
    with session(_same_database(orders)) as other, other.connection.transaction():
        assert other.value("select pgtrickle.relay_sweep_outbox('outbox_orders')") == 1
        assert orders.value("select pgtrickle.relay_sweep_outbox('outbox_orders')") == 0


def test_consumed_rows_stay_for_other_pipelines(orders: Session) -> None:
    orders.run("insert into orders select n, 'x' from generate_series(1, 1001) as n")
    orders.run("select pgtrickle.outbox_rows_consumed('orders', 1)")

    assert orders.value("select count(*) from pgtrickle.outbox_delta_rows_orders") == 1001
    assert orders.value("select last_drained_at from pgtrickle.pgt_outbox_config") is not None


def test_a_prepared_transaction_can_write_while_nobody_sleeps(
    any_postgres_server: PostgresServer, orders: Session
) -> None:
    if orders.value("show max_prepared_transactions") == "0":
        pytest.skip("this server allows no prepared transaction")
    orders.run("begin; insert into orders values (1, 'pen'); prepare transaction 'relay test'")
    orders.run("commit prepared 'relay test'")

    assert orders.value("select max_id from pgtrickle.relay_outbox('orders')") == 1


def _same_database(opened: Session) -> str:
    info = opened.connection.info
    return f"postgresql://{info.user}@{info.host}:{info.port}/{info.dbname}"
