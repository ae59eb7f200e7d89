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
    with orders.refused("RL003"):
        orders.run("select pgtrickle.relay_outbox_of('outbox_orders')")
    for call in (
        "repair_outbox('orders')",
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


def test_relay_outbox_of_gives_a_reader_everything(orders: Session) -> None:
    orders.run("insert into orders values (1, 'pen'); ")
    orders.run("insert into orders values (2, 'ink')")

    [row] = orders.rows(
        "select outbox_relation, outbox_oid = outbox_relation::regclass, stream_table,"
        " delta_relation, key_columns, retention_hours, sequence_cache, last_id, max_id,"
        " swept_through, pgt_id = (select distinct pgt_id from pgtrickle.outbox_orders)"
        " from pgtrickle.relay_outbox_of('outbox_orders')"
    )
    outbox, delta = "pgtrickle.outbox_orders", "pgtrickle.outbox_delta_rows_orders"
    assert row == (outbox, True, "orders", delta, ["id"], 24, 1, 2, 2, 0, True)


def test_an_outbox_is_found_by_its_name_or_its_tables_read_like_any_name(orders: Session) -> None:
    orders.run('create schema "Shop"; create table "Shop"."Or.ders" (id int primary key)')
    quoted = orders.value('select pgtrickle.enable_outbox(\'"Shop"."Or.ders"\')')
    orders.run("insert into orders values (1, 'pen')")

    for name in ("orders", "public.orders", "ORDERS", "outbox_orders", "pgtrickle.outbox_orders"):
        assert orders.value("select pgtrickle.relay_outbox_named(%s)", name) == "outbox_orders"
        status = orders.value("select pgtrickle.outbox_status(%s)", name)
        assert status.items() >= {
            "enabled": True, "stream_table": "orders", "outbox_table": "outbox_orders",
            "captured_table": "public.orders", "row_count": 1, "claim_check_count": 0,
            "capture": "auto", "key_columns": ["id"], "retention_hours": 24, "notify": True,
        }.items()  # fmt: skip
        assert status["oldest_row"] == status["newest_row"]
    for name in ('"Shop"."Or.ders"', '"outbox_Or.ders"', 'pgtrickle."outbox_Or.ders"'):
        assert orders.value("select pgtrickle.relay_outbox_named(%s)", name) == quoted
    for name in ("Shop.Or.ders", '"Or.ders"x', '"', "a.b.c.d", "shop.orders", '"Orders"', ""):
        with orders.refused("RL003"):
            orders.run("select pgtrickle.relay_outbox_named(%s)", name)


def test_the_key_is_the_primary_key_in_its_order_or_what_was_said(db: Session) -> None:
    db.run('create table a (x int, "Y" int, primary key ("Y", x)); create table b (x int, z int)')
    db.run("create table c (id int, name text, primary key (id) include (name))")
    db.run("create table st (a int, __pgt_row_id bigint)")
    db.run("select pgtrickle.enable_outbox(t) from unnest('{a,c,st}'::text[]) as t")
    db.run("select pgtrickle.enable_outbox('b', key_columns => '{z}')")

    keys = db.rows("select stream_table, key_columns from pgtrickle.pgt_outbox_config order by 1")
    assert keys == [("a", ["Y", "x"]), ("b", ["z"]), ("c", ["id"]), ("st", ["__pgt_row_id"])]


def test_awkward_names_work_everywhere(db: Session) -> None:
    names = ['O"rd.ers', "Ünï 🐘", "%s {x}", "a'b", "select", "delta_rows_x", "x"]
    for name in names:
        quoted = '"' + name.replace('"', '""') + '"'
        db.connection.execute(f"create table {quoted} (id int primary key)")
        outbox = db.value("select pgtrickle.enable_outbox(%s)", quoted)
        db.connection.execute(f"insert into {quoted} values (1)")

        assert outbox == f"outbox_{name}"
        [relation, stream] = db.rows(
            "select outbox_relation, stream_table from pgtrickle.relay_outbox_of(%s)", outbox
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
        assert db.value("select pgtrickle.relay_outbox_named(%s)", f'"{name}"') == outbox
        assert db.value("select max_id from pgtrickle.relay_outbox_of(%s)", outbox) == 1


def test_tables_of_one_name_in_two_schemas_have_outboxes_of_their_own(orders: Session) -> None:
    orders.run("create schema shop; create table shop.orders (id int)")
    outbox = orders.value("select pgtrickle.enable_outbox('shop.orders')")
    orders.run("insert into shop.orders values (1)")

    assert outbox.startswith("outbox_orders_")
    assert orders.value("select pgtrickle.relay_outbox_named('shop.orders')") == outbox
    assert orders.value("select pgtrickle.relay_outbox_named('orders')") == "outbox_orders"
    orders.run("set search_path = pg_catalog")
    with orders.refused("RL003") as said:
        orders.run("select pgtrickle.relay_outbox_named('orders')")
    assert "outbox_orders" in said.message_primary


def test_ids_of_an_outbox_enabled_again_continue_above_the_old_ones(orders: Session) -> None:
    orders.run("insert into orders values (1, 'pen')")
    with orders.connection.transaction(force_rollback=True):
        orders.run("insert into orders values (2, 'ink')")
    orders.run("select pgtrickle.disable_outbox('orders')")
    assert orders.value("select count(*) from pg_trigger where tgrelid = 'orders'::regclass") == 0

    orders.run("select pgtrickle.enable_outbox('orders')")
    assert orders.rows(
        "select last_id, max_id from pgtrickle.relay_outbox_of('outbox_orders')"
    ) == [(2, 0)]
    orders.run("insert into orders values (3, 'cup')")
    assert orders.value("select id from pgtrickle.outbox_orders") == 3
    orders.run("select pgtrickle.disable_outbox('orders')")
    orders.run("select pgtrickle.enable_outbox('orders')")
    assert orders.value("select last_id from pgtrickle.relay_outbox_of('outbox_orders')") == 3


def test_an_outbox_survives_its_table_and_can_be_disabled_by_who_enabled_it(
    orders: Session,
) -> None:
    orders.run("insert into orders values (1, 'pen'); drop table orders")

    assert orders.value("select max_id from pgtrickle.relay_outbox_of('outbox_orders')") == 1
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
    orders.run("select pgtrickle.relay_sleep('outbox_orders', 'relay 1')")
    orders.run("insert into orders values (3, 'cup')")
    assert heard() == []
    orders.run("select pgtrickle.relay_sleep('outbox_orders', 'relay 1', -1)")
    orders.run("insert into orders values (4, 'jar')")
    assert heard() == []


def test_who_falls_asleep_after_the_row_was_written_is_not_woken_for_it(orders: Session) -> None:
    """It polls again after as long as it has slept, a second at most."""
    with session(_same_database(orders)) as writer:
        orders.run("listen pgtrickle_outbox_new")
        with writer.connection.transaction():
            writer.run("insert into orders values (1, 'pen')")
            orders.run("select pgtrickle.relay_sleep('outbox_orders', 'relay 1', 60)")
        with writer.connection.transaction():
            writer.run("insert into orders values (2, 'ink')")
            orders.run("notify pgtrickle_outbox_new, 'the first was committed'")

        notified = orders.connection.notifies(timeout=5, stop_after=2)
        assert [said.payload for said in notified] == ["the first was committed", "outbox_orders"]


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
    assert orders.rows(
        "select swept_through, last_id from pgtrickle.relay_outbox_of('outbox_old')"
    ) == [(15, 20)]
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


def test_settings_that_make_no_sense_are_refused_and_null_opens_nothing(db: Session) -> None:
    db.run("create table t (id int)")
    for settings in (
        "capture => null", "capture => 'x'", "retention_hours => null", "retention_hours => -1",
        "notify => null", "claim_check_rows => null", "claim_check_rows => -1",
        "claim_check_bytes => null", "claim_check_bytes => 134217729",
    ):  # fmt: skip
        for name in ("t", "a stream"):
            with db.refused("22023"):
                db.run(f"select pgtrickle.enable_outbox('{name}', {settings})")
    for name in (None, ""):
        with db.refused("RL001"):
            db.run("select pgtrickle.enable_outbox(%s, capture => 'none')", name)
    for call in ("disable_outbox(null)", "repair_outbox(null)", "outbox_status(null)"):
        with db.refused("RL001" if "repair" in call else "RL003"):
            db.run(f"select pgtrickle.{call}")
    db.run("select pgtrickle.disable_outbox(null, true)")
    assert db.value("select count(*) from pgtrickle.pgt_outbox_config") == 0


def test_an_outbox_that_was_just_written_or_never_notifies_can_be_disabled(db: Session) -> None:
    for notify in ("false", "true"):
        db.run("create table st (id int primary key)")
        db.run(f"select pgtrickle.enable_outbox('st', notify => {notify})")
        db.run("begin; insert into st values (1); select pgtrickle.disable_outbox('st'); commit")
        db.run("drop table st")
    assert db.value("select count(*) from pgtrickle.pgt_outbox_config") == 0


def test_a_prepared_transaction_can_write_while_nobody_sleeps(
    any_postgres_server: PostgresServer, orders: Session
) -> None:
    if orders.value("show max_prepared_transactions") == "0":
        pytest.skip("this server allows no prepared transaction")
    orders.run("begin; insert into orders values (1, 'pen'); prepare transaction 'relay test'")
    orders.run("commit prepared 'relay test'")

    assert orders.value("select max_id from pgtrickle.relay_outbox_of('outbox_orders')") == 1


def _same_database(opened: Session) -> str:
    info = opened.connection.info
    return f"postgresql://{info.user}@{info.host}:{info.port}/{info.dbname}"
