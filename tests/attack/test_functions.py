"""Every function that others may call is on the security page, with what it runs as."""

from __future__ import annotations

import re
from pathlib import Path

from tests.attack.conftest import Scene

PAGE = Path(__file__).parents[2] / "docs" / "SECURITY-MODEL.md"
FUNCTIONS = """
    select p.proname::text, p.proowner::regrole::text, p.prosecdef,
        coalesce(array_to_string(p.proconfig, '; '), ''),
        coalesce((select string_agg(distinct case a.grantee when 0 then 'public' else
            regexp_replace(a.grantee::regrole::text, '^pgtrickle_', '') end, ', ')
            from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) as a
            where a.grantee <> p.proowner), ''),
        l.lanname::text, p.prosrc
    from pg_proc as p join pg_language as l on l.oid = p.prolang
    where p.pronamespace = 'pgtrickle'::regnamespace
    order by 1
"""
PINNED = "search_path=pg_catalog, pg_temp"
# A caller's names are read as in the caller's own statements; each only passes them on.
WITHOUT_SEARCH_PATH = {
    "relay_relation", "relay_outbox_named", "outbox_rows_consumed", "outbox_status",
    "outbox_publish", "enable_outbox", "repair_outbox", "disable_outbox", "set_relay_outbox",
    "create_consumer_group", "enable_inbox_tracking", "set_relay_inbox", "create_inbox",
    "disable_inbox_tracking", "drop_inbox", "get_relay_config", "enable_relay", "disable_relay",
    "delete_relay", "relay_dlq_retry_all", "backfill", "relay_seek", "adopt_outbox",
}  # fmt: skip

# Options are given with the sign of an operator, but call none.
_SETTING = re.compile(r"(?:raise \w+ using|get stacked diagnostics)[^;]*")

# The triggers of the marked table find what they name, as in a statement of the caller's.
WITH_THE_CALLERS = {
    "inbox_mark_failed", "inbox_mark_processed", "relay_mark_inbox", "replay_inbox_messages",
}  # fmt: skip


def rows_of_page() -> dict[str, tuple[str, str]]:
    """Function to who may execute it and whom it runs as."""
    row = re.compile(r"^\| `(\w+)` \| ([\w, ]+) \| (\w+) \| \S.* \|$", re.MULTILINE)
    found = row.findall(PAGE.read_text())
    assert len({name for name, *_ in found}) == len(found)
    return {name: (who, runs_as) for name, who, runs_as in found}


def test_every_function_that_others_may_execute_is_explained(scene: Scene) -> None:
    page = rows_of_page()
    seen = {
        name: (grants, "owner" if is_definer else "caller")
        for name, _, is_definer, _, grants, *_ in scene.admin.rows(FUNCTIONS)
        if grants
    }
    assert seen == {name: page.get(name) for name in seen}, "docs/SECURITY-MODEL.md explains it"
    assert set(page) - set(seen) == set(), "docs/SECURITY-MODEL.md explains what is not there"


def test_every_rule_of_the_page_has_the_test_that_it_names() -> None:
    tests = Path(__file__).parents[1]
    code = "".join(file.read_text() for file in tests.glob("*/test_*.py"))

    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))

    assert named
    assert {name for name in named if f"def {name}(" not in code} == set()


def test_functions_belong_to_the_owner_and_fix_where_names_are_looked_up(scene: Scene) -> None:
    for name, owner, is_definer, settings, *_ in scene.admin.rows(FUNCTIONS):
        assert owner == "pgtrickle_owner", name
        is_pinned = PINNED in settings
        may_lack_it = name in WITHOUT_SEARCH_PATH | WITH_THE_CALLERS
        assert is_pinned or (may_lack_it and not is_definer), name


def test_functions_without_a_search_path_qualify_every_name(scene: Scene) -> None:
    for name, _, _, _, _, language, source in scene.admin.rows(FUNCTIONS):
        if name in WITHOUT_SEARCH_PATH:
            assert language in ("plpgsql", "sql")
            code = re.sub(r"--.*|'(?:[^']|'')*'", "", source)
            code = _SETTING.sub(lambda said: said[0].replace(" = ", " "), code)
            calls = set(re.findall(r"(?<![.\w])(\w+)\(", code)) - {"operator", "coalesce"}
            assert calls == set(), name
            # Operators too, but for those of boolean, := and =>.
            assert re.findall(r"(?<![:=<>(])\s(?:=|<>|<|>|<=|>=|\|\||->>?|::|[-+*/])\s", code) == []


def test_tables_of_the_catalog_are_closed_and_outboxes_open_to_few(scene: Scene) -> None:
    open_to = scene.admin.rows(
        "select c.relname::text, a.grantee::regrole::text,"
        " string_agg(a.privilege_type, ' ' order by a.privilege_type)"
        " from pg_class as c, aclexplode(c.relacl) as a where c.relnamespace ="
        " 'pgtrickle'::regnamespace and a.grantee <> c.relowner and relkind <> 'S' group by 1, 2"
    )
    assert sorted(open_to) == [
        # Shows what its reader may read the outbox of.
        ("backfill_progress", "-", "SELECT"),
    ] + [
        (table, role, right)
        for table in ("outbox_delta_rows_orders", "outbox_orders")
        for role, right in (
            ("alice", "INSERT SELECT" if "delta" in table else "SELECT"),
            ("pgtrickle_relay", "SELECT"),
        )
    ]
    create = "select has_schema_privilege(%s, 'pgtrickle', 'create')"
    for role in ("alice", "mallory", "a_relay", "a_publisher", "dbo"):
        assert not scene.admin.value(create, role)
