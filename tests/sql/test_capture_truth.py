"""Capture says what happened, whatever the values, the names and the writer's session are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers.postgres import Database, PostgresServer
from tests.sql.outbox_session import Session, session

# The writer of a captured table can set all of these; none may change what is said of a row.
HOSTILE = """
    set timezone = 'America/Caracas'; set datestyle = 'German, DMY'; set intervalstyle = 'iso_8601';
    set bytea_output = 'escape'; set extra_float_digits = -15; set quote_all_identifiers = on;
    set plpgsql.extra_errors = 'all'; set xmlbinary = 'hex'; set xmloption = 'document';
    set array_nulls = off; set transform_null_equals = on; set row_security = off;
    set escape_string_warning = off; set standard_conforming_strings = off;
    set backslash_quote = off; set enable_seqscan = off; set jit = on; set work_mem = '64kB';
    set search_path = hostile, "$user", public
"""
# What a stranger puts in front of pg_catalog for whoever has their schema in the search_path.
SHADOWS = """
    create schema hostile;
    create function hostile.shadow() returns integer language sql as 'select 1 / 0';
    create function hostile.to_jsonb(anyelement) returns jsonb language sql as
        'select to_jsonb(hostile.shadow())';
    create function hostile.format(text, variadic text[]) returns text language sql as
        'select hostile.shadow()::text';
    create function hostile.jsonb_build_object(variadic "any") returns jsonb language internal
        as 'jsonb_build_array';
    create function hostile.wrong(jsonb, text) returns jsonb language sql as 'select null::jsonb';
    create operator hostile.-> (function = hostile.wrong, leftarg = jsonb, rightarg = text);
    create table hostile.new_rows (id int); create table hostile.old_rows (id int);
    create table hostile.pg_attribute (attrelid int); create table hostile.pg_proc (oid int)
"""
_WORDS = """
    r c j i d f a e h k n o p q s t w x new_rows old_rows row_list row_count tg_relid tg_op
    tg_argv captured_id new old payload found inserted deleted inserted_rows
    claim_check_rows value object field id is_each is_first max_rows row_json few key_now
    outbox_id row_num headers key_columns current_user user select limit attnum attrelid
    table_name member pgtrickle_omitted
"""
COLUMNS = _WORDS.split()


@pytest.fixture
def db(any_postgres_server: PostgresServer) -> Iterator[Session]:
    with any_postgres_server.migrated_database() as database, session(database.dsn) as opened:
        yield opened


def enabled(db: Session, ddl: str, name: str = "t", **settings: str) -> str:
    db.run(ddl)
    more = "".join(f", {key} => {value}" for key, value in settings.items())
    return str(db.value(f"select pgtrickle.enable_outbox(%s{more})", name))


def events(db: Session, outbox: str = "outbox_t") -> list[dict[str, Any]]:
    quoted = '"' + outbox.replace('"', '""') + '"'
    return [row[0] for row in db.rows(f"select payload from pgtrickle.{quoted} order by id")]


def told(db: Session, outbox: str = "outbox_t") -> list[tuple[Any, Any]]:
    return [(event.get("deleted"), event.get("inserted")) for event in events(db, outbox)]


def problems(db: Session) -> list[Any]:
    return db.rows("select relation, problem from pgtrickle.relay_capture_problems()")


def test_a_value_that_json_cannot_hold_is_left_out_and_named(db: Session) -> None:
    bad = {
        r'{"a":"\u0000"}': "22P05", '{"a":1e200000}': "22003", r'{"a":"\ud800"}': "22P02",
        r'["\udc00"]': "22P02",
    }  # fmt: skip
    db.run(
        "create type pair as (n int, j json); create domain djson as json;"
        "create table t (id int primary key, d json, many json[], p pair, m djson, ok text)"
    )
    db.run("insert into t values (0, %s, null, null, null, 'was there')", next(iter(bad)))
    enabled(db, "")

    db.run("update t set ok = 'changed'; delete from t where id = 0")
    for number, (text, state) in enumerate(bad.items(), 1):
        db.run(
            "insert into t values (%s, %s, array[%s::json], row(1, %s::json), %s, 'ok')",
            number, text, text, text, text,
        )  # fmt: skip
        row = told(db)[-1][1][0]
        assert (row["id"], row["ok"]) == (number, "ok")
        assert row["pgtrickle_omitted"] == dict.fromkeys(("d", "many", "p", "m"), state)
        assert row.keys() == {"id", "ok", "pgtrickle_omitted"}
    omitted = {"pgtrickle_omitted": {"d": "22P05"}}
    rest = {"id": 0, "many": None, "p": None, "m": None}
    was, now = rest | omitted | {"ok": "was there"}, rest | omitted | {"ok": "changed"}
    assert told(db)[:2] == [([was], [now]), ([now], [])]
    # One bad row among many: the others are whole, small or large.
    db.run("truncate t")
    for rows in (3, 1500):
        db.run(
            "insert into t select n, case n when 2 then %s else '1' end::json"
            f" from generate_series(1, {rows}) as n", next(iter(bad))
        )  # fmt: skip
        db.run("delete from t")
    [small, _, large, _] = events(db)[-4:]
    whole = [row for row in small["inserted"] if "pgtrickle_omitted" not in row]
    assert [(row["id"], row["d"]) for row in whole] == [(1, 1), (3, 1)]
    assert large == {"v": 1, "claim_check": True, "inserted_count": 1500, "deleted_count": 0}
    assert (
        db.rows(
            "select count(*), count(*) filter (where row_data ? 'pgtrickle_omitted')"
            " from pgtrickle.outbox_delta_rows_t group by outbox_id, row_op"
        )
        == [(1500, 1)] * 2
    )


def test_columns_may_be_called_like_anything_in_the_generated_code(db: Session) -> None:
    names = [n for n in COLUMNS if n != "id"]
    columns = ", ".join(f'"{name}" int default 7' for name in names)
    for mode in ("statement", "row"):
        outbox = enabled(
            db, f"create table {mode}_t (id int primary key, {columns})", f"{mode}_t",
            capture=f"'{mode}'", claim_check_rows="3",
        )  # fmt: skip
        row = {"id": 1, **dict.fromkeys(names, 7)}
        db.run(f"insert into {mode}_t values (1); update {mode}_t set r = 8")
        assert told(db, outbox) == [([], [row]), ([row], [row | {"r": 8}])]
        db.run(f"insert into {mode}_t select g from generate_series(2, 2001) as g")
        db.run(f"update {mode}_t set r = r + 1; delete from {mode}_t; truncate {mode}_t")
        assert [e.get("claim_check") for e in events(db, outbox)[2:]] == [True] * 3 + [None]
        assert db.value(
            f"select count(*) from pgtrickle.outbox_delta_rows_{mode}_t where row_data->>'id' > ''"
        ) == (2000 + 2001 + 2001 + 2001)


def test_1600_columns_and_none_are_captured(db: Session) -> None:
    columns = ", ".join(f"c{n} int default {n}" for n in range(1599))
    enabled(db, f"create table t (j json, {columns}); create table none ()")
    db.value("select pgtrickle.enable_outbox('none')")
    whole = {"j": 1, **{f"c{n}": n for n in range(1599)}}

    db.run("insert into t values ('1'); insert into none default values")
    db.run("insert into t select '1' from generate_series(1, 1001); delete from none")
    db.run(r"""insert into t values ('"\u0000"')""")

    assert told(db)[0] == ([], [whole])
    delta = "select row_data from pgtrickle.outbox_delta_rows_t where row_num = 1000"
    assert db.value(delta) == whole
    assert told(db)[-1][1][0].items() >= {"c0": 0, "c1598": 1598}.items()
    assert told(db)[-1][1][0]["pgtrickle_omitted"] == {"j": "22P05"}
    assert told(db, "outbox_none") == [([], [{}]), ([{}], [])]


VALUES = """
    create type mood as enum ('a "b"'); create type pair as (b bytea, t timestamptz, i interval);
    create domain stamp as timestamptz; create type span as range (subtype = float8);
    create table v (
        id int primary key, tstz timestamptz, ts timestamp, dt date, tm timetz, iv interval,
        by bytea, f4 real, f8 double precision, mo money, nu numeric, rt tstzrange,
        mr tstzmultirange, rf span, ats timestamptz[], aby bytea[], aiv interval[], af float8[],
        co pair, aco pair[], st stamp, ast stamp[], en mood, aen mood[], po point, bo box,
        ip inet, bi varbit, ch char(4), js json, jb jsonb, ajb jsonb[], tsv tsvector, rc regclass,
        lsn pg_lsn, tid tid, x xml, oa oidvector, na name, qc "char", iv2 interval[], tx text,
        tstz2 timestamptz, dt2 date
    )
"""
ROW = r"""
    insert into public.v values (
        %s, timestamptz '2024-02-30'::date + 0, '0044-03-15 BC', 'infinity', '04:05:06.789-08',
        '-1 year 2 mons -3 days 04:05:06.7', decode('00ff5c27', 'hex'), 'NaN', 1e-300, 12.34,
        'NaN', '[2020-01-01 00:00+00,infinity)', '{[2020-01-01 00:00+00,2020-01-02 00:00+00)}',
        '[0.1,0.30000000000000004)', array['2020-01-01 00:00+00', null]::timestamptz[],
        array[decode('5c', 'hex')], array[interval '1 mon -1 day'], array[0.1, '-Infinity'],
        (decode('00', 'hex'), '2020-01-01 00:00+00', '1 day'), null,
        '2020-01-01 00:00+00', array['2020-01-01 00:00+00']::stamp[], 'a "b"', '{"a \"b\""}',
        '(1.1,1e-20)', '(1,2),(3,4)', '::1/64', '101', 'a', '{"a": 1e400}', '[1e400]',
        array['{"k": null}'::jsonb], 'a:1A b', 'public.v', '0/16B3748', '(1,2)', null,
        '1 2', 'n', 'c', null, repeat('é"\', 10), '-infinity', '0001-01-01 BC'
    )
"""


def test_what_the_writers_session_has_set_changes_nothing(db: Session) -> None:
    row = ROW.replace("timestamptz '2024-02-30'::date + 0", "'2024-02-29 23:59:59.123456+00'")
    # Read the same under standard_conforming_strings = off.
    literal = row.replace('\'{"a \\"b\\""}\'', "array['a \"b\"']::mood[]").replace("\"\\'", "'")
    db.run(SHADOWS)
    db.run(VALUES)
    db.run("select pgtrickle.enable_outbox('v'), set_config('x.y', 'z', false)")
    db.run(literal.replace("%s", "1"))
    for setting in HOSTILE.split(";"):
        db.run(setting)
    # Input follows the session: the same values are read from the table.
    db.run("create temporary table copied as select * from public.v; update copied set id = 2")
    db.run("insert into public.v select * from copied")
    db.run("update public.v set id = 3 where id = 2")
    # By the way that leaves out what can't be said, and by the delta table.
    db.run("alter table public.v add column bad json")
    db.run("update public.v set bad = json '\"\\\\u0000\"' where id = 3")

    [plain, copied, moved, guarded] = told(db, "outbox_v")
    expected = plain[1][0]
    assert copied[1][0] == expected | {"id": 2}
    assert moved == ([expected | {"id": 2}], [expected | {"id": 3}])
    assert guarded[1][0] == expected | {"id": 3, "pgtrickle_omitted": {"bad": "22P05"}}
    assert expected["tstz"] == "2024-02-29T23:59:59.123456+00:00"
    assert expected["by"] == r"\x00ff5c27"
    assert (expected["iv"], expected["f8"]) == ("-10 mons -3 days +04:05:06.7", 1e-300)
    assert expected["rf"] == "[0.1,0.30000000000000004)"
    assert expected["mr"] == '{["2020-01-01 00:00:00+00","2020-01-02 00:00:00+00")}'
    assert expected["mo"] == "$12.34"
    assert "1" + "0" * 400 in db.value("select payload::text from pgtrickle.outbox_v where id = 2")


@pytest.mark.parametrize(
    "schema, table, role",
    [
        ('S" %s {x}', 'T"%1$s to_jsonb(changed.*)', 'R" o\'le'),
        ("é" * 31, "ü" * 31 + "x", "ö" * 31),
        ("select", "new_rows", "current_user"),
        ("a.b", "$source$ $$", "\\"),
    ],
)  # fmt: skip
def test_names_that_need_quotes_are_only_names(
    db: Session, schema: str, table: str, role: str
) -> None:
    def quoted(name: str) -> str:
        return '"' + name.replace('"', '""') + '"'

    def run(text: str) -> None:
        db.connection.execute(db.said(text).encode())

    if not db.rows("select from pg_roles where rolname = %s", role):
        run(f"create role {quoted(role)}")
    where = f"{quoted(schema)}.{quoted(table)}"
    # A column's name that would be code if generated code were made by substitution.
    evil = quoted(" default values;select 1/0;return null;--%s%1$I$source$'")
    run(f"create schema {quoted(schema)} authorization {quoted(role)}")
    run(f"set role {quoted(role)}; create table {where} (id int primary key, {evil} text)")
    for mode in ("auto", "row"):
        outbox = db.value("select pgtrickle.enable_outbox(%s, capture => %s)", where, mode)
        run(f"insert into {where} values (1, 'x')")
        run(f"insert into {where} select n from generate_series(2, 1200) as n; delete from {where}")
        run(f"truncate {where}")
        [one, *_] = told(db, outbox)
        assert one[1][0]["id"] == 1
        assert len(events(db, outbox)) == 4
        assert db.value("select pgtrickle.repair_outbox(%s)", where) == 0
        assert db.value("select pgtrickle.outbox_status(%s) ->> 'stream_table'", where) == table
        if mode == "auto":
            db.run("reset role")
            assert problems(db) == []
            # Found by its outbox too, quoted like any name.
            found = db.value("select pgtrickle.relay_outbox_named(%s)", quoted(outbox))
            assert found == outbox
            run(f"set role {quoted(role)}; select pgtrickle.disable_outbox({_literal(where)})")
    run(f"alter table {where} rename to other; insert into {quoted(schema)}.other values (7)")
    assert told(db, outbox)[-1][1][0]["id"] == 7
    run(f"reset role; drop schema {quoted(schema)} cascade")


def _literal(text: str) -> str:
    return " E'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def test_generated_columns_are_told_as_postgresql_shows_them(db: Session) -> None:
    virtual = ", w int generated always as (i * 3) virtual" if _is_18(db) else ""
    enabled(
        db, f"create table t (i int primary key, d int generated always as (i * 2) stored{virtual})"
    )
    db.run("insert into t values (1); update t set i = 2; alter table t alter d drop expression")
    db.run("update t set d = 0")
    assert told(db) == [
        ([], [{"i": 1, "d": 2}]),
        ([{"i": 1, "d": 2}], [{"i": 2, "d": 4}]),
        ([{"i": 2, "d": 4}], [{"i": 2, "d": 0}]),
    ]


def test_a_table_may_change_in_any_way_while_it_is_captured(db: Session) -> None:
    enabled(db, "create table t (id int primary key, a text, b int)")
    db.run("insert into t values (1, 'x', 2)")
    for number, change in enumerate(
        (
            "alter table t alter b type numeric(9, 2)", "alter table t add c int[] default '{1}'",
            "alter table t rename id to key", "alter table t drop a",
            "alter table t alter key type bigint", "alter table t add a jsonb default '{}'",
            "alter table t rename to u", "create schema s; alter table u set schema s",
            "alter table s.u rename key to id; alter schema s rename to z",
            "alter table z.u alter a type text using a::text", "alter table z.u rename to t",
        ), 1,
    ):  # fmt: skip
        db.run(change)
        where = db.value("select tgrelid::regclass::text from pg_trigger where tgtype & 32 <> 0")
        db.run(f"update {where} set b = {number}")
        columns = [row[0] for row in db.rows(f"select to_jsonb(t) from {where} as t")]
        assert told(db)[-1][1] == columns, change
        renamed = db.value("select key_columns from pgtrickle.outbox_t order by id desc limit 1")
        assert renamed == (["key"] if "key" in columns[0] else None)
        assert db.value("select pgtrickle.relay_outbox_named('outbox_t')") == "outbox_t"
        assert problems(db) == []
    assert len(events(db)) == 12


def test_a_table_that_is_made_again_goes_on_in_its_outbox(db: Session) -> None:
    enabled(db, "create table t (id int primary key)")
    db.run("insert into t values (1); drop table t")
    assert ["nothing is captured" in problem for _, problem in problems(db)] == [True]
    db.run("create table t (id int primary key, more text)")
    assert db.value("select pgtrickle.enable_outbox('t')") == "outbox_t"
    db.run("insert into t values (2, 'x')")

    assert db.rows("select id, payload -> 'inserted' from pgtrickle.outbox_t order by id") == [
        (1, [{"id": 1}]), (2, [{"id": 2, "more": "x"}]),
    ]  # fmt: skip
    assert db.value("select count(distinct pgt_id) from pgtrickle.outbox_t") == 1
    assert problems(db) == []
    with db.refused("RL002"):
        db.run("select pgtrickle.enable_outbox('t')")


def test_a_row_trigger_that_was_switched_off_in_one_partition_is_a_problem(db: Session) -> None:
    db.run(
        "create table t (id int primary key) partition by range (id);"
        "create table t_1 partition of t for values from (0) to (10);"
        "create table t_2 partition of t for values from (10) to (20);"
        "select pgtrickle.enable_outbox('t', capture => 'row'); alter table t_2 disable trigger all"
    )
    found = problems(db)
    assert len(found) == 3
    assert all("is disabled" in str(problem) and "t_2" in str(problem) for problem in found)
    assert db.value("select pgtrickle.repair_outbox('t')") == 3
    assert problems(db) == []
    db.run("insert into t values (15)")
    assert db.value("select count(*) from pgtrickle.outbox_t") == 1


def test_triggers_that_were_switched_off_or_came_later_are_problems_and_mended(db: Session) -> None:
    enabled(db, "create table t (id int primary key)")
    nothing = "returns trigger language plpgsql as 'begin return null; end'"
    for change, said in (
        ("alter table t disable trigger user", "is disabled"),
        ("alter table t disable trigger all", "is disabled"),
        ('drop trigger "!pgtrickle_{}_update" on t', "is missing"),
        ("alter function pgtrickle_capture_t() reset all", "other settings"),
        ("alter function pgtrickle_capture_t() set timezone = 'Asia/Tokyo'", "other settings"),
        ("alter function pgtrickle_capture_t() security invoker", "other settings"),
        ("grant execute on function pgtrickle_capture_t() to public", "may be executed by others"),
        (f"create or replace function pgtrickle_capture_t() {nothing}", "not the one"),
        (f"create function f() {nothing}; create trigger f after insert on t for each row"
         " execute function f()", "not of the kind"),
        ("drop trigger f on t", "not of the kind"),
        ("drop table t cascade; create table t (id int primary key)", "nothing is captured"),
    ):  # fmt: skip
        db.run(change.format(db.value("select left(md5('pgtrickle' || '.outbox_t'), 7)")))
        assert any(said in problem for _, problem in problems(db)), change
        assert db.value("select pgtrickle.repair_outbox('t')") > 0
        assert problems(db) == [], change
        db.run("insert into t values (1); delete from t")
    assert len(events(db)) == 22
    db.run(
        "create function g() returns trigger language plpgsql as"
        " 'begin update t set id = id; return new; end';"
        "create trigger g before insert on t for each row execute function g();"
        'create trigger " a" after insert on t for each statement execute function f()'
    )
    assert {problem.split(":")[0] for _, problem in problems(db)} == {
        "trigger g runs inside the statement, before capture can see it",
        'trigger " a" runs before capture',
        "the capture function is not the one that the relay makes for the table as it is",
    }


def test_truncate_only_says_so_and_loses_nothing(db: Session) -> None:
    enabled(db, "create table t (id int); create table child () inherits (t)")
    db.run("insert into child values (1); truncate only t; truncate t; truncate child")
    full = {"v": 1, "full_refresh": True, "inserted": [], "deleted": []}
    assert events(db)[1:] == [full]
    assert any("truncate only" in notice for notice in db.notices)


def test_other_statements_and_what_fails_inside_them(db: Session) -> None:
    enabled(db, "create table t (id int primary key, n int default 0)")
    db.run("create table u (id int primary key)")
    db.run("select pgtrickle.enable_outbox('u')")
    db.run(
        "create function may_fail() returns trigger language plpgsql as $$ begin"
        " begin insert into t values (new.id + 100); perform 1 / (new.id - 1); exception when"
        " division_by_zero then null; end; return null; end $$;"
        "create trigger z after insert on u for each row execute function may_fail()"
    )
    db.run("select pgtrickle.repair_outbox('u')")
    db.run(
        "with a as (insert into t values (1), (2) returning id), b as (insert into u select id"
        " from a returning id) insert into t select id + 10 from b"
    )
    with db.connection.transaction():
        db.run("savepoint s; insert into t values (50); rollback to s; insert into t values (51)")

    def ids(outbox: str) -> list[int]:
        return [row["id"] for _, rows in told(db, outbox) for row in rows]

    # The subtransaction of row 1 failed, with the event that it wrote.
    assert sorted(ids("outbox_t")) == [1, 2, 11, 12, 51, 102]
    assert ids("outbox_u") == [1, 2]
    assert sorted(row[0] for row in db.rows("select id from t")) == sorted(ids("outbox_t"))


@pytest.mark.slow
def test_a_row_of_more_than_a_gigabyte_does_not_fail(migrated_database: Database) -> None:
    with session(migrated_database.dsn) as db:
        enabled(db, "create table t (id int primary key, a text, b text)")
        db.run("alter table t alter a set storage external, alter b set storage external")
        db.run("insert into t values (1, repeat('x', 600000000))")
        db.run("update t set b = repeat('y', 600000000)")
        omitted = {"pgtrickle_omitted": {"a": "54000", "b": "54000"}}
        assert told(db)[-1][1] == [{"id": 1} | omitted]


def _is_18(db: Session) -> bool:
    return db.connection.info.server_version >= 180000
