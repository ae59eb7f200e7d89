"""Nobody reads rows through a backfill, or writes events of others with it."""

from __future__ import annotations

from tests.attack.conftest import Scene, refused

TOKEN = "00000000-0000-0000-0000-000000000000"


def test_nobody_else_backfills_a_table_or_sees_how_far_that_is(scene: Scene) -> None:
    before = scene.events()
    for role in ("mallory", "a_relay", "a_publisher", "dbo"):
        with scene.as_role(role) as other:
            refused(
                other,
                "call pgtrickle.backfill('outbox_orders')",
                "call pgtrickle.backfill('pgtrickle.outbox_orders', filter => 'card is not null')",
                "select pgtrickle.relay_begin_backfill('outbox_orders', null, null, 10)",
                "select pgtrickle.relay_register_backfill('outbox_orders',"
                " pgtrickle.relay_function_of('outbox_orders', 'capture'), null, null, '{id}')",
                f"select pgtrickle.relay_backfill_chunk('{TOKEN}', null, 10)",
                f"select pgtrickle.relay_lock_backfill('{TOKEN}')",
                "select al.pgtrickle_backfill_orders(null, 'true', null, 10)",
                "select * from pgtrickle.relay_backfills",
            )
            other.run(f"select pgtrickle.relay_note_backfill('{TOKEN}', 9, '{{9}}', true)")
    assert scene.events() == before
    # With the rights of the owner it is allowed; who may read the outbox sees it.
    scene.admin.run("grant alice to bob")
    try:
        with scene.as_role("bob") as bob:
            bob.run("call pgtrickle.backfill('al.orders')")
            assert bob.value("select sent_rows from pgtrickle.backfill_progress") == 1
    finally:
        scene.admin.run("revoke alice from bob")
    assert len(scene.events()) == len(before) + 1
    for role, seen in (("alice", 1), ("a_relay", 1), ("mallory", 0), ("a_publisher", 0)):
        with scene.as_role(role) as other:
            assert other.value("select count(*) from pgtrickle.backfill_progress") == seen


def test_a_claim_on_another_table_begins_no_backfill(scene: Scene) -> None:
    with scene.as_role("mallory") as mallory:
        mallory.run("create table m.own (id int primary key)")
        mallory.run("select pgtrickle.enable_outbox('m.own')")
        function = "'m.pgtrickle_capture_own()'::regprocedure"
        refused(
            mallory,
            f"select pgtrickle.relay_claim_function({function}, 'backfill outbox_orders');"
            f"select pgtrickle.relay_register_backfill('outbox_orders', {function},"
            " null, null, '{id}')",
        )


def test_a_filter_runs_as_the_owner_of_the_table_even_for_a_superuser(scene: Scene) -> None:
    with scene.as_role("mallory") as mallory:
        mallory.run("create table m.own (id int primary key); insert into m.own values (1)")
        mallory.run("select pgtrickle.enable_outbox('m.own')")
        mallory.run("call pgtrickle.backfill('m.own', filter => 'm.steal() = 1')")
    assert scene.loot() == {"mallory"}
    scene.admin.run("call pgtrickle.backfill('m.own', filter => 'm.steal() = 1')")
    with scene.admin.refused("42501"):
        scene.admin.run(
            "call pgtrickle.backfill('m.own',"
            " filter => 'set_config(''role'', ''postgres'', true) is null')"
        )
    assert scene.loot() == {"mallory"}


def test_a_backfill_function_that_its_owner_changed_is_not_called(scene: Scene) -> None:
    # With the marks by which it is found.
    body = (
        "language plpgsql security {} as $$\n-- pgtrickle-relay backfill, layout 1\n"
        "-- pgtrickle.relay_captured_table('outbox_own')\nbegin perform m.steal();"
        " return '{{\"rows\": 0}}'::jsonb; end $$"
    )
    arguments = "pipeline text, filter text, after_key text[], chunk_rows integer"
    with scene.as_role("mallory") as mallory:
        mallory.run("create table m.own (id int primary key); insert into m.own values (1)")
        mallory.run("select pgtrickle.enable_outbox('m.own')")
        for security in ("invoker", "definer"):
            mallory.run(
                f"create or replace function m.pgtrickle_backfill_own({arguments})"
                f" returns jsonb {body.format(security)}"
            )
            refused(scene.admin, "call pgtrickle.backfill('m.own')", states="55000")
        assert scene.loot() == set()
        mallory.run("select pgtrickle.repair_outbox('m.own')")
        token = mallory.value("select pgtrickle.relay_begin_backfill('outbox_own', null, null, 10)")
        name = mallory.value(
            "select pgtrickle.relay_function_of('outbox_own', 'backfill')::regproc"
        )
        mallory.run(
            f"create or replace function {name}({arguments}) returns jsonb {body.format('invoker')}"
        )
        refused(
            scene.admin,
            f"select pgtrickle.relay_backfill_chunk('{token}', null, 10)",
            states="55000",
        )
    assert scene.loot() == set()


def test_a_deferred_trigger_of_the_owner_runs_before_the_caller_commits(scene: Scene) -> None:
    with scene.as_role("mallory") as mallory:
        mallory.run(
            "create table m.own (id int primary key); insert into m.own values (1);"
            "create table m.trap (n int);"
            "create function m.spring() returns trigger language plpgsql as"
            " $$ begin perform m.steal(); return null; end $$;"
            "create constraint trigger spring after insert on m.trap deferrable initially deferred"
            " for each row execute function m.spring();"
            "create function m.arm() returns boolean language plpgsql as"
            " $$ begin insert into m.trap values (1); return true; end $$;"
            "select pgtrickle.enable_outbox('m.own')"
        )
    scene.admin.run("call pgtrickle.backfill('m.own', filter => 'm.arm()')")
    assert scene.loot() == {"mallory"}
