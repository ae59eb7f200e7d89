"""A database with alice, who owns what is attacked, and mallory, who owns one schema."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
import pytest

from tests.servers.postgres import Database, PostgresServer
from tests.sql.conftest import schema_of_the_catalog as schema_of_the_catalog
from tests.sql.outbox_session import Session, session

# What must not come about, whoever asks: mallory's code as somebody else.
LOOT = """
    create table m.loot (who text, what text); grant all on m.loot to public;
    grant usage on schema m to public;
    create function m.steal() returns integer language plpgsql as $$
    declare secret text := 'nothing';
    begin
        begin
            execute 'select payload::text from pgtrickle.outbox_orders limit 1' into secret;
        exception when others then null;
        end;
        insert into m.loot values (current_user, secret);
        return 1;
    end $$
"""


@dataclass
class Scene:
    """`admin` is a superuser's session; `as_role` logs in as somebody else."""

    admin: Session
    database: Database

    @contextmanager
    def as_role(self, role: str) -> Iterator[Session]:
        dsn = self.database.server.database_dsn(self.database.name, user=role)
        with session(dsn) as opened:
            yield opened

    def loot(self) -> set[str]:
        """As whom mallory's code ran, mallory and who called it apart."""
        return {row[0] for row in self.admin.rows("select who from m.loot")}

    def events(self, outbox: str = "outbox_orders") -> list[object]:
        rows = self.admin.rows(f'select payload from pgtrickle."{outbox}" order by id')
        return [row[0] for row in rows]


def stage(database: Database) -> Iterator[Scene]:
    with session(database.dsn) as admin:
        for role, *groups in (
            ("mallory",), ("alice",), ("bob",), ("dbo",),
            ("a_publisher", "pgtrickle_publisher"), ("a_relay", "pgtrickle_relay"),
        ):  # fmt: skip
            admin.new_role(role, *groups)
        admin.run(
            f"create schema m authorization mallory; create schema al authorization alice;"
            "create schema b authorization bob; grant usage, create on schema al to bob;"
            f'alter database "{database.name}" owner to dbo'
        )
        yield Scene(admin, database)


@pytest.fixture
def scene(any_migrated_database: Database) -> Iterator[Scene]:
    """alice's table orders is captured and holds one event; mallory has set up shop."""
    for made in stage(any_migrated_database):
        with made.as_role("alice") as alice:
            alice.run(
                "create table al.orders (id int primary key, card text);"
                "select pgtrickle.enable_outbox('al.orders');"
                "insert into al.orders values (1, 'secret')"
            )
        with made.as_role("mallory") as mallory:
            mallory.run(LOOT)
        yield made


@pytest.fixture
def unmigrated(any_postgres_server: PostgresServer) -> Iterator[Scene]:
    """The same people in a database that has no catalog yet."""
    with any_postgres_server.database() as created:
        yield from stage(created)


def refused(opened: Session, *statements: str, states: str = "42501 RL004") -> None:
    """Each statement fails for lack of a right, and for nothing else."""
    for statement in statements:
        with pytest.raises(psycopg.Error) as failure:
            opened.run(statement)
        assert failure.value.sqlstate in states.split(), (statement, failure.value)
