"""A psql-like session for the tests of the outbox SQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, LiteralString, cast

import psycopg
import pytest
from psycopg import sql

Row = tuple[Any, ...]


@dataclass
class Refusal:
    """What the server said; absent parts are empty."""

    message_primary: str = ""
    message_detail: str = ""
    message_hint: str = ""


class Session:
    """One connection in autocommit; SQL text is the tests' own."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.notices: list[str] = []
        self.connection.add_notice_handler(
            lambda said: self.notices.append(said.message_primary or "")
        )

    def run(self, text: str, *values: object) -> None:
        """Execute; several statements in one text are one transaction."""
        self.connection.execute(cast("LiteralString", text), values or None)

    def rows(self, text: str, *values: object) -> list[Row]:
        """All rows of one query."""
        return self.connection.execute(cast("LiteralString", text), values or None).fetchall()

    def value(self, text: str, *values: object) -> Any:
        """First column of the first row."""
        return self.rows(text, *values)[0][0]

    @contextmanager
    def refused(self, state: str) -> Iterator[Refusal]:
        """The block fails with this SQLSTATE; what is yielded is filled when it has ended."""
        refusal = Refusal()
        with pytest.raises(psycopg.Error) as failure:
            yield refusal
        said = failure.value.diag
        assert failure.value.sqlstate == state, failure.value
        refusal.message_primary = said.message_primary or ""
        refusal.message_detail = said.message_detail or ""
        refusal.message_hint = said.message_hint or ""

    def new_role(self, name: str, *member_of: str) -> None:
        """A login role, made afresh; roles belong to the cluster."""
        identifier = sql.Identifier(name)
        exists = self.rows("select from pg_roles where rolname = %s", name)
        if not exists:
            self.connection.execute(sql.SQL("create role {} login").format(identifier))
        for group in member_of:
            self.connection.execute(
                sql.SQL("grant {} to {}").format(sql.Identifier(group), identifier)
            )

    def close(self) -> None:
        self.connection.close()


@contextmanager
def session(dsn: str) -> Iterator[Session]:
    """A session that is closed at the end."""
    opened = Session(dsn)
    try:
        yield opened
    finally:
        opened.close()
