"""A psql-like session for the tests of the SQL.

Tests write ``pgtrickle`` for the catalog's schema. Where a database has it in `ODD_SCHEMA`, the
session says that name to the server instead, and the tests read ``pgtrickle`` in its answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, LiteralString, cast

import psycopg
import pytest
from psycopg import sql

Row = tuple[Any, ...]

ODD_SCHEMA = 'Relay "x"'
_ODD_IDENTIFIER = '"Relay ""x"""'
_ODD_CHANNEL = rf"\1_{hashlib.md5(ODD_SCHEMA.encode(), usedforsecurity=False).hexdigest()[:8]}"
_IS_ODD = (
    "select count(*) filter (where nspname = 'pgtrickle') = 0"
    " and count(*) filter (where nspname = %s) = 1 from pg_catalog.pg_namespace"
)


def in_odd_schema(text: str) -> str:
    """A test's SQL, or a name in it, for the catalog in `ODD_SCHEMA`."""
    text = re.sub(r"\b(pgtrickle_(?:relay_config|outbox_new))\b", _ODD_CHANNEL, text)
    text = re.sub(r"'pgtrickle'(?!::reg)", f"'{ODD_SCHEMA}'", text)
    return re.sub(r"\bpgtrickle\b(?!-)", _ODD_IDENTIFIER.replace("\\", r"\\"), text)


def from_odd_schema(value: Any) -> Any:
    """What the server said, with the schema called as the tests call it."""
    if isinstance(value, str):
        return value.replace(_ODD_IDENTIFIER, "pgtrickle").replace(ODD_SCHEMA, "pgtrickle")
    if isinstance(value, list | tuple):
        return type(value)(from_odd_schema(each) for each in value)
    if isinstance(value, dict):
        return {name: from_odd_schema(each) for name, each in value.items()}
    return value


@dataclass
class Refusal:
    """What the server said; absent parts are empty."""

    message_primary: str = ""
    message_hint: str = ""


class Session:
    """One connection in autocommit; SQL text is the tests' own."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.is_odd = bool(self.connection.execute(_IS_ODD, [ODD_SCHEMA]).fetchall()[0][0])
        self.notices: list[str] = []
        self.connection.add_notice_handler(
            lambda said: self.notices.append(self._heard(said.message_primary or ""))
        )

    def run(self, text: str, *values: object) -> None:
        """Execute; several statements in one text are one transaction."""
        self._execute(text, values)

    def rows(self, text: str, *values: object) -> list[Row]:
        """All rows of one query."""
        rows: list[Row] = self._heard(self._execute(text, values).fetchall())
        return rows

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
        refusal.message_primary = self._heard(said.message_primary or "")
        refusal.message_hint = self._heard(said.message_hint or "")

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

    def said(self, text: str) -> str:
        """The text as the server is to get it, for what goes past `run` and `rows`."""
        return in_odd_schema(text) if self.is_odd else text

    def _execute(self, text: str, values: tuple[object, ...]) -> psycopg.Cursor[Row]:
        values = tuple(self.said(value) if isinstance(value, str) else value for value in values)
        return self.connection.execute(cast("LiteralString", self.said(text)), values or None)

    def _heard(self, said: Any) -> Any:
        return from_odd_schema(said) if self.is_odd else said


@contextmanager
def session(dsn: str) -> Iterator[Session]:
    """A session that is closed at the end."""
    opened = Session(dsn)
    try:
        yield opened
    finally:
        opened.close()
