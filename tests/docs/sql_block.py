"""SQL blocks: statements with what they return, run one after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg

from tests.docs.expectation import is_as_said

_RETURNS, _ERROR, _NOTHING = "-- returns: ", "-- error: ", "-- returns no rows"


@dataclass(frozen=True)
class Statement:
    """One statement; ``rows`` or ``error`` where the page says what comes of it."""

    text: str
    rows: tuple[str, ...] | None
    error: str | None


def statements(block: str) -> Iterator[Statement]:
    """The statements of a block with what is said behind each. Quotes may hold semicolons."""
    lines = block.splitlines()
    number = 0
    while number < len(lines):
        text: list[str] = []
        while number < len(lines):
            text.append(lines[number])
            number += 1
            if _is_complete("\n".join(text)):
                break
        rows: list[str] = []
        error: str | None = None
        says_nothing = False
        while number < len(lines) and lines[number].startswith((_RETURNS, _ERROR, _NOTHING)):
            line = lines[number]
            number += 1
            if line.startswith(_RETURNS):
                rows.append(line.removeprefix(_RETURNS))
            elif line.startswith(_ERROR):
                error = line.removeprefix(_ERROR)
            else:
                says_nothing = True
        if "".join(text).strip():
            yield Statement("\n".join(text), tuple(rows) if rows or says_nothing else None, error)


def run(connection: psycopg.Connection[tuple[object, ...]], statement: Statement) -> None:
    """Run a statement. Raises `AssertionError` where it does something else than is said."""
    try:
        cursor = connection.execute(statement.text.encode())
    except psycopg.Error as error:
        happened = f"{error.sqlstate} {error.diag.message_primary}"
        _compare(statement, f"error: {happened}", hint=error.diag.message_hint or "")
        return
    came = "" if cursor.pgresult is None else "\n".join(_rows(cursor.pgresult))
    _compare(statement, came)


def _compare(statement: Statement, came: str, *, hint: str = "") -> None:
    said = f"{statement.text}\n-- came:\n{came}\n{hint}"
    is_error = came.startswith("error: ")
    assert is_error == (statement.error is not None), said
    if statement.error is not None:
        assert is_as_said(f"error: {statement.error}…", came), said
    elif statement.rows is not None:
        assert is_as_said("\n".join(statement.rows), came), said


def _rows(result: psycopg.pq.abc.PGresult) -> list[str]:
    """The rows as PostgreSQL writes them."""
    return [" | ".join(_cells(result, row)) for row in range(result.ntuples)]


def _cells(result: psycopg.pq.abc.PGresult, row: int) -> Iterator[str]:
    for column in range(result.nfields):
        value = result.get_value(row, column)
        yield "null" if value is None else value.decode()


def _is_complete(text: str) -> bool:
    bare = re.sub(r"'(?:[^']|'')*'", "''", re.sub(r"^--.*", "", text, flags=re.MULTILINE))
    return bare.count("'") % 2 == 0 and bare.rstrip().endswith(";")
