"""What a person reads who made a slip: one line, their words, the remedy, and no secret."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from relay.cli import run
from tests.servers.finding import free_port
from tests.servers.postgres import Database, PostgresServer
from tests.servers.process import REPOSITORY

SECRET = "hunter2"


class Answer(NamedTuple):
    """What the program said, and its exit code."""

    code: int
    line: str


def typed(
    *arguments: str, environment: Mapping[str, str] | None = None, before: Sequence[str] = ()
) -> Answer:
    """The real program with these arguments; what it said must be one line on standard error."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "relay", *arguments],
        cwd=REPOSITORY,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PG")},
            "PGTRICKLE_RELAY_METRICS_ADDR": "127.0.0.1:0",
            "PYTHONDONTWRITEBYTECODE": "1",
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert re.fullmatch(r"pgtrickle-relay: [^\n]+\n", done.stderr), done.stderr
    assert SECRET not in done.stderr + done.stdout
    return Answer(done.returncode, done.stderr.removeprefix("pgtrickle-relay: ").strip())


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """Where the operator's overlay `mine` stands."""
    (tmp_path / "env").mkdir()
    return tmp_path / "env" / "mine.yaml"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said to these arguments, in this process; the exit code must be 2."""
    assert run(arguments) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"pgtrickle-relay: [^\n]+\n", line), line
    assert SECRET not in line
    return line


GLOBAL = "# @package _global_\n"


@pytest.mark.parametrize(
    "content,said",
    [
        (
            "relay: {group_id: mine}\n",
            r"mine\.yaml has no effect: .* \(make its first line: # @package _global_\)",
        ),
        (
            f"{GLOBAL}relay:\n  group_id: mine\n batch_size: 3\n",
            r"mine\.yaml, line 4, column 2: expected <block end>",
        ),
        (f"{GLOBAL}relay:\n\tgroup_id: mine\n", r"mine\.yaml, line 3, column 1: found character"),
        (f"{GLOBAL}relay: {{a: 1}}\nrelay: {{b: 2}}\n", r"line 3, column 1: found duplicate key"),
        (f"{GLOBAL}postgres: {{url: *{SECRET}}}\n", r"line 2, column 17: found undefined alias"),
        (f"{GLOBAL}postgres: {{url: !{SECRET} x}}\n", r"line 2, column 17: .* for the tag"),
        (f"{GLOBAL}relay: {{group: a}}\n", r"relay\.group is not a known key \(did you mean group"),
        (f"{GLOBAL}relay: 5\n", r"relay: expected `object`, got `int`"),
        (f"{GLOBAL}- {SECRET}\n", r"'env/mine' does not fit: it is a list"),
        (
            f"{GLOBAL}relay: {{group_id: '${{oc.env:NOT_SET}}'}}\n",
            r"relay\.group_id refers to the variable NOT_SET, which is not set",
        ),
        (f"{GLOBAL}relay: {{group_id: '${{{SECRET}'}}\n", r"relay\.group_id can't be read"),
        (
            f"{GLOBAL}defaults:\n  - override /log: jsn\n",
            r"log=jsn: there is no such overlay \(did you mean json",
        ),
        (f"{GLOBAL}defaults: [nothing]\n", r"'env/mine': Could not load 'env/nothing'"),
        (f"{GLOBAL}defaults: words\n", r"defaults must be a list"),
        ("# @package\nrelay: {group_id: a}\n", r"Expected header format"),
        ("# @package foo\nrelay: {group_id: a}\n", r"foo is not a known key"),
        (f'{GLOBAL}relay: {{group_id: "\x01"}}\n', r"mine\.yaml: special characters"),
        (
            f"\ufeff{GLOBAL}relay: {{group_id: a}}\n",
            r"mine\.yaml has no effect: .* byte order mark",
        ),
        (f"{GLOBAL}relay: {'{a: ' * 200}1{'}' * 200}\n", r"an overlay is nested too deeply"),
    ],
)
def test_an_overlay_with_a_slip_is_named_with_the_place(
    overlay: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay.write_text(content)

    line = refused(capsys, "--config-dir", str(overlay.parents[1]), "+env=mine")

    assert re.search(said, line), line


def test_an_overlay_that_is_not_utf8_is_named(
    overlay: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay.write_bytes(GLOBAL.encode() + b'relay: {group_id: "\xff"}\n')

    line = refused(capsys, "--config-dir", str(overlay.parents[1]), "+env=mine")

    assert "mine.yaml is not UTF-8" in line


@pytest.mark.parametrize("is_directory", [True, False])
def test_what_may_not_be_read_is_named(overlay: Path, is_directory: bool) -> None:
    overlay.write_text(GLOBAL)
    (overlay.parents[1] if is_directory else overlay).chmod(0)

    answer = typed(
        "--config-dir", str(overlay.parents[1]), "+env=mine", before=without_roots_eyes()
    )

    overlay.parents[1].chmod(0o700)
    assert answer.code == 2
    assert "Permission denied" in answer.line
    assert str(overlay.parents[1]) in answer.line


def without_roots_eyes() -> list[str]:
    """Root reads everything: a command in front of which it does not."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root reads everything, and there is no setpriv to take that away")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["env=prod"], "did you mean +env=prod?"),
        (["env"], "'env' is not a command"),
        (["+log=json"], "leave out the +"),
        (["+relay.group_id=x"], "leave out the +"),
        ([f"postgres.url=postgresql://u:{SECRET}@h/d?sslmode=require"], "or use --postgres-url"),
        ([f"relay.group_id=a,{SECRET}"], "quote the value: 'relay.group_id=\"…\"'"),
        ([f"relay.group_id=choice({SECRET})"], "relay.group_id has several values"),
        ([f"+relay.group_id={{{SECRET}"], "the value of relay.group_id can't be read"),
        (["relay.group_id="], "relay.group_id is empty"),
        (["--relay-group-id", " "], "relay.group_id is empty"),
        (["relay.group_id=5"], "put the value in quotes"),
        (["relay.group_id"], "write relay.group_id=…"),
        (["metrics.addr=9090"], "metrics.addr '9090' is not host:port (for example 0.0.0.0:9090)"),
        (["--metrics-addr", "here"], "metrics.addr 'here' is not host:port"),
        (["hydra.run.dir=/x"], "settings of Hydra itself have no effect here"),
        (["=x"], "write key=value"),
        (["backends.x={type: nats}"], "write +backends.<name>="),
        (["migrate", "--seconds", "3"], "--seconds does not go with migrate"),
        (["migrate", "drain"], "'drain' is one word too many behind migrate"),
        ([f"postgresql://u:{SECRET}@h/d"], "is not a command"),
        (["--config-dir", ""], "is not a directory"),
        (["+backends.x={url: a}"], "backends.x.type is missing"),
        (["+backends.x={type: natz}"], "'natz', which is not a backend (did you mean nats?)"),
        (
            [f"+backends.x={{type: nats, ulr: {SECRET}}}"],
            "backends.x.ulr is not a known key of nats (did you mean url?)",
        ),
        (["--postgres-url", f"postgresql://u:{SECRET}#@h/d"], "percent-encoded"),
        (["--postgres-url", f"postgresql://u:{SECRET}/@h/d"], "percent-encoded"),
        (["--postgres-url", f"postgresql://u:{SECRET}?@h/d"], "percent-encoded"),
        (["--postgres-url", f"postgresql://u:1@{SECRET}@h/d"], "percent-encoded"),
        (["--postgres-url", "here"], "write postgresql://user@host:5432/database"),
        (
            ["--postgres-url", "postgresql://h/d?target_session_attrs=primry"],
            "has target_session_attrs=primry (use one of any, primary, standby",
        ),
        (["--postgres-url", "postgresql://h/d?sslmode=verify-full"], "root.crt"),
        (["+env=prod", "+env=test"], "env is chosen twice (write +env=[first,second]"),
        (["status", "relay.group_id", "=", "x"], "relay.group_id has no value (write"),
        (["status", ""], "an empty argument (is it a variable in quotes that is not set?)"),
        (["validate", "--sample", "-1"], "--sample: must be above 0, but is -1"),
        (["drain", "--timeout", "nan"], "--timeout: must be above 0, but is nan"),
        (["drain", "--timeout", "soon"], "--timeout: must be above 0, but is soon"),
    ],
)
def test_a_slip_on_the_command_line_is_answered_with_its_remedy(
    arguments: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *arguments)


def test_flags_and_settings_may_stand_before_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--relay-group-id", "a", "postgres.schema=pgtrickle_x", "migrate", "--print"]) == 0

    assert "pgtrickle_x.relay_outbox_config" in capsys.readouterr().out


def test_where_nothing_is_set_the_address_and_the_variable_are_named() -> None:
    port = free_port()

    answer = typed(environment={"PGPORT": str(port), "PGDATABASE": "d"})

    assert answer.code == 3
    assert f"localhost:{port}" in answer.line
    assert "set PGTRICKLE_RELAY_POSTGRES_URL, or --postgres-url" in answer.line


def test_keywords_without_a_server_behind_them_name_the_address_too() -> None:
    port = free_port()

    answer = typed("--postgres-url", f"host=127.0.0.1 port={port} user=u password={SECRET}")

    assert answer.code == 3
    assert f"while connecting to 127.0.0.1:{port}: Connection refused" in answer.line


def test_a_server_without_tls_is_said_to_have_none(migrated_database: Database) -> None:
    answer = typed("--postgres-url", f"{migrated_database.dsn}?sslmode=require")

    assert answer.code == 2
    assert "the PostgreSQL server offers no TLS" in answer.line
    assert "choose another sslmode" in answer.line


def test_a_role_that_is_no_member_is_told_which_grant_it_lacks(
    migrated_database: Database, postgres_server: PostgresServer
) -> None:
    with psycopg.connect(migrated_database.dsn, autocommit=True) as owner:
        owner.execute('create role "No Member" login')
    try:
        answer = typed(
            "--postgres-url",
            postgres_server.database_dsn(migrated_database.name, user="No Member"),
        )
    finally:
        with psycopg.connect(migrated_database.dsn, autocommit=True) as owner:
            owner.execute('drop role "No Member"')

    assert answer.code == 2
    assert 'grant pgtrickle_relay to "No Member"' in answer.line


def test_a_second_migration_says_that_nothing_was_to_do(migrated_database: Database) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "relay", "--postgres-url", migrated_database.dsn, "migrate"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stdout) == (0, "the catalog is up to date at 0.29.0\n")
