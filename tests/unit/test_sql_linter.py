"""The SQL linter: each rule fires on its breach, and on nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lint_sql", REPOSITORY / "scripts/lint_sql.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lint_sql"] = module
    spec.loader.exec_module(module)
    return module


lint_sql = _load()

GOOD = """\
create table pgtrickle.t (
    id bigint primary key
);

comment on table pgtrickle.t is 'A TABLE: text is nobody''s business.';

-- serves: the latest row
create index t_latest on pgtrickle.t (id desc);

create or replace function pgtrickle.f(p text) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
    -- SELECT in a comment, "Quoted" and 'SELECT' in strings are left alone.
    return p || "Quoted" || 'SELECT' || $text$CREATE TABLE x$text$;
end
$$;
comment on function pgtrickle.f(text) is 'Answers. Definer: who asks has no right on the table.';
"""


def rules(text: str) -> list[str]:
    return [finding.rule for finding in lint_sql.check(text)]


def test_good_sql_has_no_finding() -> None:
    assert lint_sql.check(GOOD) == []


@pytest.mark.parametrize(
    "old, new, rule, line",
    [
        ("create table", "CREATE table", "case", 1),
        ("    return p ||", "    RETURN p ||", "case", 14),
        ("table pgtrickle.t (", "table t (", "schema", 1),
        ("on pgtrickle.t (id", "on t (id", "schema", 8),
        ("comment on table pgtrickle.t is", "comment on table pgtrickle.u is", "comment", 1),
        ("-- serves: the latest row\n", "-- The latest row.\n", "comment", 8),
        ("comment on function pgtrickle.f(", "comment on function pgtrickle.g(", "comment", 10),
        ("language plpgsql stable", "stable language plpgsql", "attributes", 10),
        ("stable ", "", "attributes", 10),
        (" set search_path = pg_catalog, pg_temp", "", "definer", 10),
        ("search_path = pg_catalog, pg_temp", "search_path = pg_catalog, public", "definer", 10),
        ("Definer: who asks has no right on the table.", "", "definer", 10),
        ("text) returns", "text)\nreturns", "head", 10),
        ("stable security", "stable\nsecurity", "head", 11),
        ("$$;\ncomment on", "$$;\n\ncomment on", "head", 17),
        ("    id bigint primary key\n", "    id bigint\n    , x int\n", "comma", 3),
        ("bigint primary key\n", "bigint primary key \n", "space", 2),
        ("    id bigint", "\tid bigint", "space", 2),
    ],
)
def test_each_rule_fires_where_it_is_broken(old: str, new: str, rule: str, line: int) -> None:
    broken = GOOD.replace(old, new, 1)
    assert broken != GOOD

    assert (rule, line) in [(finding.rule, finding.line) for finding in lint_sql.check(broken)]


def test_the_head_of_a_function_is_written_in_as_few_lines_as_it_fits_into() -> None:
    head = """\
create or replace function @schema@.f(
    first_of_them text default 'a, (b',
    second_of_them numeric(9, 2) default null,
    out third_of_them text
)
returns table (
    one text
)
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
set client_min_messages = warning
as $$
    select 1,
    2
$$;

comment on function @schema@.f(text, numeric) is
    'Answers.';
"""
    wanted = """\
create or replace function @schema@.f(
    first_of_them text default 'a, (b', second_of_them numeric(9, 2) default null,
    out third_of_them text
) returns table (one text)
language sql stable security invoker set search_path = pg_catalog, pg_temp
set client_min_messages = warning as $$
    select 1,
    2
$$;
comment on function @schema@.f(text, numeric) is 'Answers.';
"""

    assert lint_sql.standing_form(head) == wanted


def test_what_a_do_block_creates_is_read_too() -> None:
    text = "do $guard$\nbegin\n    create table t (id int);\nend\n$guard$;\n"

    assert rules(text) == ["comment", "schema"]


def test_a_second_function_of_a_name_needs_a_comment_of_its_own() -> None:
    overload = GOOD.replace("pgtrickle.f(p text)", "pgtrickle.f(p integer)")
    overload = overload[overload.index("create or replace") : overload.index("comment on function")]

    assert rules(GOOD + overload) == ["comment"]


def test_a_file_ends_with_a_new_line() -> None:
    assert rules(GOOD[:-1]) == ["space"]


def test_the_program_names_file_and_line_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.sql"
    bad.write_text("SELECT 1;\n")

    assert lint_sql.main([str(bad)]) == 1
    assert f"{bad}:1: case: SELECT" in capsys.readouterr().out


def test_our_own_sql_is_clean() -> None:
    assert lint_sql.main([]) == 0
