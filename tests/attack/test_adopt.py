"""Nothing of somebody's table runs with the rights of the relay, and nobody adopts another's."""

from __future__ import annotations

import psycopg
import pytest

from tests.attack.conftest import Scene, refused
from tests.sql.outbox_session import Session

ADOPT = (
    "select pgtrickle.adopt_outbox('{0}', '{1}', id => 'seq', payload => 'body', key => 'who',"
    " delete_delivered => {2})"
)
COLUMNS = "seq bigint generated always as identity primary key, who {0}, body jsonb"
READ = (
    "select * from pgtrickle.outbox_own",
    "select * from pgtrickle.relay_adopted_rows('outbox_own', newest => true, with_payload => true)"
    " where id > 0",
    "select * from pgtrickle.relay_outbox_of('outbox_own')",
    "select * from pgtrickle.relay_lag('default')",
    "select pgtrickle.set_relay_outbox('p', 'own', '{\"type\": \"stdout\"}')",
    "select pgtrickle.relay_seek('p', 'earliest')",
    "select pgtrickle.relay_group_poll('g', 'c', 10, 30, 1000000)",
    "select * from pgtrickle.relay_capture_problems()",
    "select pgtrickle.outbox_status('own')",
    "select pgtrickle.relay_sweep_outbox('outbox_own')",
)


def read_all(opened: Session) -> None:
    """All that a relay does with an outbox; what fails fails."""
    for statement in READ:
        try:
            opened.run(statement)
        except psycopg.Error:
            opened.run("rollback")


def adopted(mallory: Session, type_: str = "text", *, deletes: bool = True) -> None:
    mallory.run(f"create table m.own ({COLUMNS.format(type_)})")
    mallory.run(ADOPT.format("own", "m.own", deletes))
    mallory.run("insert into m.own (who, body) select null, '1' from generate_series(1, 3)")


def test_nobody_adopts_reads_sweeps_or_releases_the_table_of_another(scene: Scene) -> None:
    with scene.as_role("alice") as alice:
        alice.run(
            f"create table al.events ({COLUMNS.format('text')}); grant all on al.events to public;"
            "grant usage on schema al to public"
        )
        alice.run("insert into al.events (who, body) values ('w', '\"secret\"')")
    for role in ("mallory", "a_relay", "a_publisher", "dbo", "bob"):
        with scene.as_role(role) as other:
            refused(other, ADOPT.format("stolen", "al.events", True))
    with scene.as_role("mallory") as mallory:
        # Her function over the table of alice, with the marks of ours.
        mallory.run(f"create table m.own ({COLUMNS.format('text')})")
        mallory.run(ADOPT.format("own", "m.own", False))
        body = mallory.value("select pg_get_functiondef('m.pgtrickle_read_own'::regproc)")
        mallory.run("select pgtrickle.disable_outbox('own')")
        mallory.run(body.replace("m.own", "al.events"))
        function = "'m.pgtrickle_read_own'::regproc"
        wanted = (
            'jsonb_populate_record(null::pgtrickle.pgt_outbox_config, \'{"stream_table": "x",'
            ' "outbox_table_name": "outbox_x", "delta_table_name": "outbox_delta_rows_x",'
            ' "retention_hours": 0, "capture": "none", "notify": false, "claim_check_rows": 0,'
            ' "claim_check_bytes": 0, "adopted": {}}\')'
        )
        register = f"select pgtrickle.relay_register_adopted({wanted}, {function}, null)"
        refused(mallory, register)
        with mallory.refused("RL005") as refusal:
            mallory.run(
                "do $$ begin execute format('comment on function m.pgtrickle_read_own is %L',"
                " 'pgtrickle-relay: adopt x in transaction ' || pg_current_xact_id()); end $$;"
                f"{register}"
            )
        assert "belongs to mallory, the table to alice" in refusal.message_primary
    with scene.as_role("alice") as alice:
        alice.run(ADOPT.format("events", "al.events", True))
    for role in ("mallory", "a_publisher", "dbo"):
        with scene.as_role(role) as other:
            refused(
                other,
                "select * from pgtrickle.outbox_events",
                "select * from pgtrickle.relay_adopted_rows('outbox_events')",
                "select al.pgtrickle_sweep_events('{1}')",
                "select pgtrickle.relay_sweep_outbox('outbox_events')",
                "select pgtrickle.relay_sweep_adopted('outbox_events', '{1}')",
                "select pgtrickle.disable_outbox('events')",
            )
    with scene.as_role("a_relay") as relay:
        assert relay.value("select count(*) from pgtrickle.outbox_events") == 1
        refused(
            relay,
            "select al.pgtrickle_sweep_events('{1}')",
            "select pgtrickle.disable_outbox('events')",
            "select pgtrickle.relay_drop_stream('outbox_events'); select 1/0",
            states="42501 RL004 22012",
        )
        relay.run("select pgtrickle.relay_drop_stream('outbox_events')")
    assert scene.admin.value("select count(*) from pgtrickle.outbox_events") == 1


def test_nothing_of_an_adopted_table_runs_with_other_rights_than_its_owners(scene: Scene) -> None:
    with scene.as_role("mallory") as mallory:
        mallory.run(
            "create type m.evil as enum ('x');"
            "create function m.evil_text(m.evil) returns text language plpgsql as"
            " $$ begin perform m.steal(); return 'x'; end $$;"
            "create cast (m.evil as text) with function m.evil_text(m.evil);"
            "create function m.constant(integer) returns integer immutable language plpgsql as"
            " $$ begin perform m.steal(); return 1; end $$;"
            "create function m.spring() returns trigger language plpgsql as"
            " $$ begin perform m.steal(); return old; end $$"
        )
        adopted(mallory, "m.evil")
        mallory.run("update m.own set who = 'x'")
        mallory.run(
            # All that PostgreSQL computes while it plans or runs a statement on the table.
            "create index on m.own ((m.constant(1) + seq));"
            "create index on m.own (seq) where m.constant(1) = 1;"
            "create statistics m.s on (m.constant(1) + seq), seq from m.own;"
            "alter table m.own add check (m.constant(1) = 1);"
            "create policy p on m.own using (m.constant(1) = 1);"
            "alter table m.own enable row level security;"
            "create trigger t before delete on m.own for each row execute function m.spring();"
            "create constraint trigger d after delete on m.own deferrable initially deferred"
            " for each row execute function m.spring()"
        )
    scene.admin.run("select pgtrickle.create_consumer_group('g', 'own', 'earliest')")
    for opened in ("a_relay", None):
        if opened is None:
            read_all(scene.admin)
        else:
            with scene.as_role(opened) as relay:
                read_all(relay)
    scene.admin.run("select pgtrickle.delete_relay('p')")
    scene.admin.run("select pgtrickle.drop_consumer_group('g')")
    scene.admin.run("select pgtrickle.create_consumer_group('h', 'own', 'latest')")
    with scene.as_role("a_relay") as relay:
        sweep = "select pgtrickle.relay_sweep_outbox('outbox_own')"
        if int(scene.database.server.version.partition(".")[0]) < 18:
            # A deferrable trigger could run at the commit.
            refused(relay, sweep, states="RL034")
        else:
            assert relay.value(sweep) == 3
    assert scene.loot() == {"mallory"}


@pytest.mark.parametrize("kind", ["read", "sweep"])
def test_a_function_beside_the_table_that_its_owner_changed_gives_them_no_rights(
    scene: Scene, kind: str
) -> None:
    with scene.as_role("mallory") as mallory:
        mallory.run(
            "create table m.trap (n int);"
            "create function m.spring() returns trigger language plpgsql as"
            " $$ begin perform m.steal(); return null; end $$;"
            "create constraint trigger spring after insert on m.trap deferrable initially deferred"
            " for each row execute function m.spring()"
        )
        adopted(mallory)
    scene.admin.run("select pgtrickle.create_consumer_group('g', 'own', 'latest')")
    definition, drop = scene.admin.rows(
        "select regexp_replace(pg_get_functiondef(oid), E'(BEGIN ATOMIC|AS \\\\$).*', ''),"
        f" oid::regprocedure::text from pg_proc where proname = 'pgtrickle_{kind}_own'"
    )[0]
    attacks = [
        f"alter function {drop} security invoker",
        f"alter function {drop} volatile",
        f"alter function {drop} set work_mem = '1MB'",
    ]
    if kind == "read":
        # The same but for its body, which arms a trigger that would run when the relay commits.
        mine = (
            f"{definition} begin atomic select 1::bigint, null::timestamptz, null::bytea,"
            " null::bytea, array[m.arm()] where 'm.own_seq_seq'::regclass is not null; end"
        )
        attacks += [mine, mine.replace("SECURITY DEFINER", "SECURITY INVOKER")]
    with scene.as_role("mallory") as mallory:
        mallory.run(
            "create function m.arm() returns text language plpgsql as"
            " $$ begin insert into m.trap values (1); if current_user <> 'mallory' then"
            " perform nextval('m.ran'); end if; return 'x'; end $$;"
            # What a sequence has counted is not undone.
            "create sequence m.ran; grant all on sequence m.ran to public;"
            "grant all on m.trap to public"
        )
        for attack in attacks:
            mallory.run("begin")
            mallory.run(attack)
            mallory.run("commit")
            for role in ("a_relay", "dbo"):
                with scene.as_role(role) as other:
                    read_all(other)
            read_all(scene.admin)
    assert scene.loot() <= {"mallory"}
    assert scene.admin.rows("select from m.trap") == []
    assert not scene.admin.value("select is_called from m.ran")
