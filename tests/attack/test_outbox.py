"""Outboxes: nobody runs code as another, reads another's events, forges or removes them."""

from __future__ import annotations

from tests.attack.conftest import Scene, refused

EVIL = """
    create type m.evil as enum ('x');
    create function m.evil_json(m.evil) returns json language sql as
        'select to_json(m.steal())';
    create cast (m.evil as json) with function m.evil_json(m.evil)
"""
STRANGERS = ("mallory", "bob", "dbo", "a_publisher", "a_relay")


def test_a_cast_to_json_runs_as_the_owner_of_its_table_only(scene: Scene) -> None:
    with scene.as_role("mallory") as mallory:
        mallory.run(EVIL)
        mallory.run("create table m.t (id int primary key, e m.evil)")
        mallory.run("select pgtrickle.enable_outbox('m.t'); insert into m.t values (1, 'x')")
        mallory.run("grant all on m.t to public; grant usage on type m.evil to public")
    with scene.as_role("alice") as alice:
        alice.run("insert into m.t values (2, 'x')")
        # In alice's own table, in every shape, from before and after it was enabled.
        alice.run("alter table al.orders add e m.evil; update al.orders set e = 'x'")
        for shape in ("e m.evil", "e m.evil[]", "e d", "e c", "e c[]", "e s"):
            alice.run("drop table if exists al.t cascade; drop domain if exists al.d;"
                      "drop type if exists al.c cascade; drop type if exists al.s cascade;"
                      "create domain al.d as m.evil; create type al.c as (x m.evil);"
                      "create type al.s as range (subtype = m.evil)")  # fmt: skip
            alice.run(f"set search_path = al; create table t (id int primary key, {shape})")
            alice.run("select pgtrickle.enable_outbox('al.t')")
            value = {"[": "'{x}'", "d": "'x'", "c": "row('x')::al.c", "s": "'[x,x]'"}
            literal = (
                "array[row('x')::al.c]"
                if shape == "e c[]"
                else value.get(
                    shape[-2] if shape.endswith("]") and shape[-3] != "c" else shape[-1], "'x'"
                )
            )
            literal = "'{x}'" if shape == "e m.evil[]" else literal
            alice.run(f"insert into t values (1, {literal}); update t set id = 2")
            # By the way around bad values and by the delta table too.
            alice.run("alter table t add j json")
            alice.run(f"insert into t select g, {literal}, '1' from generate_series(3, 1100) as g")
            alice.run(rf"""insert into t values (0, {literal}, '"\u0000"')""")
            alice.run("select pgtrickle.disable_outbox('al.t')")
    assert scene.loot() <= {"mallory"}
    assert '"e": "x"' in str(scene.events()[-1]).replace("'", '"')


def test_a_type_or_table_that_changes_hands_takes_no_rights_along(scene: Scene) -> None:
    admin = scene.admin
    with scene.as_role("alice") as alice:
        alice.run(
            "create type al.mine as enum ('x'); create table al.t (id int primary key, e al.mine);"
            "select pgtrickle.enable_outbox('al.t'); insert into al.t values (1, 'x')"
        )
    # The type becomes mallory's, who makes a cast after capture began.
    admin.run("alter type al.mine owner to mallory; grant usage on schema al to mallory")
    with scene.as_role("mallory") as mallory:
        mallory.run(
            "create function m.j(al.mine) returns json language sql as 'select to_json(m.steal())';"
            "create cast (al.mine as json) with function m.j(al.mine)"
        )
    with scene.as_role("alice") as alice:
        alice.run("insert into al.t values (2, 'x')")
    assert scene.loot() == set()
    # The table becomes mallory's, with capture still of alice: only plain values are told.
    admin.run("alter table al.t owner to mallory")
    with scene.as_role("mallory") as mallory:
        mallory.run("alter table al.t add f al.mine; insert into al.t values (3, 'x', 'x')")
    assert scene.loot() == set()
    assert len(scene.events("outbox_t")) == 3
    problems = admin.rows("select problem from pgtrickle.relay_capture_problems()")
    assert "belongs to alice, the table to mallory" in str(problems)
    # Repaired, it runs as mallory, whose type it may tell by the cast; alice can't forge any more.
    admin.run("grant create on schema al to mallory")
    with scene.as_role("mallory") as mallory:
        mallory.run("select pgtrickle.repair_outbox('al.t'); insert into al.t values (4, 'x')")
    assert scene.loot() == {"mallory"}
    assert admin.rows("select * from pgtrickle.relay_capture_problems()") == []
    with scene.as_role("alice") as alice:
        refused(
            alice,
            "insert into pgtrickle.outbox_t (payload) values ('{}')",
            "select pgtrickle.outbox_publish('al.t', '[1]')",
            "select pgtrickle.disable_outbox('al.t')",
        )


def test_reassigned_tables_say_who_must_repair_and_nobody_else_can(scene: Scene) -> None:
    scene.admin.run("reassign owned by alice to bob")
    with scene.as_role("bob") as bob:
        with bob.refused("42501") as said:
            bob.run("insert into al.orders values (2)")
        assert "repair_outbox" in said.message_hint
        bob.run("insert into al.orders select 1, 'x' where false")
        refused(bob, "select pgtrickle.repair_outbox('al.orders')")
    with scene.as_role("mallory") as mallory:
        refused(mallory, "select pgtrickle.repair_outbox('al.orders')", states="RL001")
    assert scene.admin.value("select pgtrickle.repair_outbox('al.orders')") > 0
    with scene.as_role("bob") as bob:
        bob.run("insert into al.orders values (2); select pgtrickle.disable_outbox('al.orders')")


def test_nobody_else_reads_writes_or_removes_an_outbox(scene: Scene) -> None:
    owner = "select oid::int from pg_proc where proname = 'pgtrickle_capture_orders'"
    function = scene.admin.value(owner)
    for role in STRANGERS:
        with scene.as_role(role) as stranger:
            refused(
                stranger,
                "select pgtrickle.disable_outbox('al.orders')",
                "select pgtrickle.disable_outbox('outbox_orders')",
                "select pgtrickle.outbox_publish('al.orders', '[]', '[{\"id\": 1}]')",
                "select pgtrickle.outbox_publish('outbox_orders', '[{\"id\": 1}]')",
                "insert into pgtrickle.outbox_orders (payload) values ('{}')",
                "insert into pgtrickle.outbox_delta_rows_orders values (1, 0, 'INSERT', '{}')",
                f"select pgtrickle.relay_drop_outbox('outbox_orders', {function})",
                "select pgtrickle.relay_transfer_outbox('outbox_orders', 'm.loot'::regclass,"
                f" {function})",
                f"select pgtrickle.relay_claim_function({function}, 'disable outbox_orders')",
                "select pgtrickle.relay_remove_outbox('outbox_orders')",
                f"select pgtrickle.relay_take_outbox('outbox_orders', {function})",
                "select pgtrickle.relay_drop_outbox('outbox_orders', null)",
                "create trigger x after insert on m.loot execute function"
                " al.pgtrickle_capture_orders()",
                states="42501 RL004",
            )
            if role != "a_relay":
                refused(stranger, "select pgtrickle.outbox_status('al.orders')",
                        "select * from pgtrickle.outbox_orders")  # fmt: skip
    assert len(scene.events()) == 1


def test_nobody_chooses_an_id_or_a_time_and_nobody_but_publishers_publish(scene: Scene) -> None:
    with scene.as_role("a_publisher") as publisher:
        publisher.run("select pgtrickle.enable_outbox('events', capture => 'none')")
        assert publisher.value("select pgtrickle.outbox_publish('events', '[1]')") == 1
    scene.admin.run(
        "grant insert, select on al.orders to public; grant usage on schema al to public"
    )
    for role, outbox in (("alice", "orders"), ("a_publisher", "events"), ("a_relay", "events")):
        with scene.as_role(role) as writer:
            refused(
                writer,
                *(
                    f"insert into pgtrickle.outbox_{outbox} ({column}) overriding system value"
                    f" values ({value})"
                    for column, value in (
                        ("id", "7"),
                        ("created_at", "now()"),
                        ("pgt_id", "null"),
                        ("refresh_id", "gen_random_uuid()"),
                    )
                ),
                f"update pgtrickle.outbox_{outbox} set payload = '{{}}'",
                f"delete from pgtrickle.outbox_{outbox}",
                f"truncate pgtrickle.outbox_{outbox}",
                f"select setval('pgtrickle.outbox_{outbox}_id_seq', 1)",
                f"select nextval('pgtrickle.outbox_{outbox}_id_seq')",
            )
    with scene.as_role("a_relay") as relay:
        refused(relay, "select pgtrickle.outbox_publish('events', '[1]')")
    for role in ("mallory", "bob"):
        with scene.as_role(role) as stranger:
            refused(
                stranger,
                "select pgtrickle.outbox_publish('events', '[1]')",
                "select pgtrickle.enable_outbox('x', capture => 'none')",
                "select pgtrickle.disable_outbox('events')",
                "select pgtrickle.relay_drop_stream('events')",
            )


def test_what_runs_in_an_index_or_by_autovacuum_drops_nothing(scene: Scene) -> None:
    function = scene.admin.value("select 'al.pgtrickle_capture_orders()'::regprocedure::oid::int")
    with scene.as_role("mallory") as mallory:
        calls = (
            "pgtrickle.disable_outbox(''al.orders'')",
            f"pgtrickle.relay_drop_outbox(''outbox_orders'', {function})",
            f"pgtrickle.relay_claim_function({function}, ''disable outbox_orders'')",
            "pgtrickle.repair_outbox(''al.orders'')",
        )
        mallory.run(
            "create table m.tried (state text);"
            "create function m.g() returns int language plpgsql as $$ begin "
            + "".join(
                f"begin execute 'select {call}'; exception when others then"
                " insert into m.tried values (sqlstate); end; "
                for call in calls
            )
            + "return 1; end $$; create table m.t (id int);"
            "create function m.f(int) returns int language plpgsql immutable as"
            " 'begin return m.g(); end';"
            "create index i on m.t (m.f(id)); insert into m.t select generate_series(1, 3)"
        )
    for upkeep in ("vacuum analyze m.t", "reindex table m.t", "analyze m.t"):
        scene.admin.run(upkeep)
    assert len(scene.events()) == 1
    tried = {row[0] for row in scene.admin.rows("select state from m.tried")}
    assert tried <= {"42501", "RL001", "RL004"}  # RL001: al is closed to mallory


def test_a_definer_function_of_an_administrator_may_enable_for_others(scene: Scene) -> None:
    scene.admin.run(
        "create function public.enable_all() returns text language sql security definer as"
        " $$select pgtrickle.enable_outbox('m.mine')$$; grant execute on function"
        " public.enable_all() to public"
    )
    with scene.as_role("mallory") as mallory:
        mallory.run("create table m.mine (id int)")
        assert mallory.value("select public.enable_all()") == "outbox_mine"
        mallory.run("insert into m.mine values (1)")


def test_claims_serve_one_operation_in_one_transaction_for_one_function(scene: Scene) -> None:
    claim = "select pgtrickle.relay_claim_function('{}'::regprocedure, '{}')"
    mine = "m.pgtrickle_capture_t()"
    theirs = scene.admin.value("select 'al.pgtrickle_capture_orders()'::regprocedure::oid::text")
    drop = "select pgtrickle.relay_drop_outbox('outbox_orders', '{}'::regprocedure)"
    stream = (
        "row('outbox_s', null, 's', 'outbox_delta_rows_s', null, null, 'none', null, null, null,"
        " true, 1, 1, 24, 0, 0, now(), null, 0, null, false, null)::pgtrickle.pgt_outbox_config"
    )
    with scene.as_role("mallory") as mallory:
        mallory.run("create table m.t (id int); select pgtrickle.enable_outbox('m.t')")
        mallory.run(
            "do $do$ begin execute (select format('create function m.s() returns trigger language"
            " plpgsql security definer %s as %L', (select string_agg(format('set %s to %s',"
            " split_part(c, '=', 1), case when c like 'search_path%' then split_part(c, '=', 2)"
            " else quote_literal(split_part(c, '=', 2)) end), ' ')"
            " from unnest((pgtrickle.relay_function_shape('capture')).configuration) as c),"
            f" pgtrickle.relay_source({stream}, null, 'capture'))); end $do$;"
            "revoke all on function m.s() from public"
        )
        for steps in (
            (claim.format(mine, "disable outbox_orders"), drop.format(mine)),
            (claim.format(mine, "disable outbox_orders"), drop.format(theirs)),
            (claim.format(mine, "repair outbox_orders"), "select pgtrickle.relay_transfer_outbox("
             f"'outbox_orders', 'm.t'::regclass, '{mine}'::regprocedure)"),
            (claim.format(mine, "repair outbox_orders"), "select pgtrickle.relay_transfer_outbox("
             f"'outbox_orders', 'al.orders'::regclass, '{mine}'::regprocedure)"),
            (claim.format(mine, "enable outbox_orders"), "select pgtrickle.relay_register_outbox("
             "row('outbox_x', 'al', 'orders', 'outbox_delta_rows_x', 's', null, 'auto', null, null,"
             " null, true, 1, 1, 24, 0, 0, now(), null, 0, null, false, null)"
             "::pgtrickle.pgt_outbox_config,"
             f" 'al.orders'::regclass, '{mine}'::regprocedure)"),
            # A stream without a table is made by publishers only, however right the function is.
            (claim.format("m.s()", "enable outbox_s"), "select pgtrickle.relay_register_outbox("
             f"{stream}, null, 'm.s()'::regprocedure)"),
        ):  # fmt: skip
            refused(mallory, "; ".join(steps), states="RL004 RL005 40001 42501")
    with scene.as_role("alice") as alice:
        # Of another transaction, and of another operation.
        alice.run(claim.format(theirs, "disable outbox_orders"))
        refused(alice, drop.format(theirs))
        refused(alice, f"{claim.format(theirs, 'repair outbox_orders')}; {drop.format(theirs)}")
    # Inside the victim's own transaction, after a repair: no claim is left over.
    with scene.as_role("mallory") as mallory:
        mallory.run(
            "create function m.deputy() returns trigger language plpgsql security definer as $$"
            f"begin perform pgtrickle.relay_drop_outbox('outbox_orders', '{theirs}'::regprocedure);"
            "return null; end $$; grant execute on function m.deputy() to public"
        )
    with scene.as_role("alice") as alice:
        alice.run("create trigger d after insert on al.orders execute function m.deputy()")
        for before in ("select pgtrickle.repair_outbox('al.orders')",
                       "alter function al.pgtrickle_capture_orders() reset all;"
                       "select pgtrickle.repair_outbox('al.orders')"):  # fmt: skip
            refused(alice, f"{before}; insert into al.orders values (9)", states="RL004")
    assert len(scene.events()) == 1


def test_strangers_triggers_that_name_an_outbox_bind_nothing(scene: Scene) -> None:
    condition = "when ('pgtrickle.outbox_orders'::regclass is not null)"
    with scene.as_role("mallory") as mallory:
        mallory.run(
            "create table m.orders (id int primary key);"
            "create function m.nothing() returns trigger language plpgsql as"
            " 'begin return null; end';"
            + "".join(
                f'create trigger "!pgtrickle_{n}" after {event} on m.orders for each statement'
                f" {condition} execute function m.nothing();"
                for n, event in enumerate(("insert", "truncate"))
            )
        )
        # Its own outbox, not alice's.
        assert mallory.value("select pgtrickle.enable_outbox('m.orders')") != "outbox_orders"
    named = "select pgtrickle.outbox_status('outbox_orders') ->> 'captured_table'"
    assert scene.admin.value(named) == "al.orders"
    with scene.as_role("alice") as alice:
        assert alice.value("select pgtrickle.repair_outbox('al.orders')") == 0
        alice.run("select pgtrickle.disable_outbox('al.orders')")
    left = scene.admin.value("select count(*) from pg_trigger where tgrelid = 'm.orders'::regclass")
    assert left == 4


def test_squatted_names_and_default_privileges_give_nothing_away(scene: Scene) -> None:
    squat = "returns trigger language plpgsql security definer as 'begin return null; end'"
    with scene.as_role("bob") as bob:
        bob.run(f"create function al.pgtrickle_capture_cards() {squat}")
        refused(bob, f"create or replace function al.pgtrickle_capture_orders() {squat}")
    with scene.as_role("alice") as alice:
        alice.run(
            "alter default privileges grant execute on functions to mallory, public;"
            "alter default privileges in schema al grant execute on functions to mallory;"
            "create table al.cards (id int primary key); select pgtrickle.enable_outbox('al.cards')"
        )
        alice.run("insert into al.cards values (1)")
    assert scene.admin.rows(
        "select p.proowner::regrole::text, p.proacl::text from pg_proc as p"
        " join pg_trigger as t on t.tgfoid = p.oid and t.tgrelid = 'al.cards'::regclass"
        " group by 1, 2"
    ) == [("alice", "{alice=X/alice}")]
    assert len(scene.events("outbox_cards")) == 1


def test_a_capture_function_that_its_owner_changed_writes_only_their_own_outbox(
    scene: Scene,
) -> None:
    with scene.as_role("mallory") as mallory:
        mallory.run("create table m.t (id int); select pgtrickle.enable_outbox('m.t')")
        mallory.run(
            "create or replace function m.pgtrickle_capture_t() returns trigger language plpgsql"
            " security definer as $$ begin perform m.steal(); insert into pgtrickle.outbox_orders"
            " (payload) values ('{}'); return null; end $$"
        )
        refused(mallory, "insert into m.t values (1)")
        mallory.run("grant insert on m.t to public")
    refused(scene.admin, "insert into m.t values (1)")
    assert scene.loot() == set()
    assert len(scene.events()) == 1


def test_names_of_others_do_not_change_where_an_application_publishes(scene: Scene) -> None:
    with scene.as_role("a_publisher") as publisher:
        for stream in ("order_events", "payments"):
            publisher.run(f"select pgtrickle.enable_outbox('{stream}', capture => 'none')")
    with scene.as_role("mallory") as mallory:
        for table in ("orders", "order_events", "payments", "outbox_payments"):
            mallory.run(f"create table m.{table} (id int primary key)")
            mallory.run(f"select pgtrickle.enable_outbox('m.{table}')")
    with scene.as_role("a_publisher") as publisher:
        for name in ("order_events", "outbox_order_events", "outbox_payments", "payments"):
            publisher.run(f"select pgtrickle.outbox_publish('{name}', '[1]')")
    assert len(scene.events("outbox_order_events")) == len(scene.events("outbox_payments")) == 2
    for outbox in ("outbox_orders", "outbox_payments", "outbox_order_events"):
        of = scene.admin.value("select stream_table from pgtrickle.relay_outbox_of(%s)", outbox)
        assert f"outbox_{of}" == outbox
    with scene.as_role("a_relay") as relay:
        for name in ("al.orders", "outbox_orders"):
            assert relay.value("select pgtrickle.relay_outbox_named(%s)", name) == "outbox_orders"


def test_a_database_owner_without_superuser_gets_nothing_of_others(scene: Scene) -> None:
    with scene.as_role("dbo") as dbo:
        refused(
            dbo,
            "select * from pgtrickle.pgt_outbox_config", "select * from pgtrickle.relay_migrations",
            "create table pgtrickle.x (id int)", "drop schema pgtrickle cascade",
            "create function pgtrickle.relay_put(int) returns int language sql as 'select 1'",
            "alter schema pgtrickle owner to dbo", "set role pgtrickle_owner",
            "alter function pgtrickle.relay_put(jsonb, text, anyelement, boolean) owner to dbo",
        )  # fmt: skip
