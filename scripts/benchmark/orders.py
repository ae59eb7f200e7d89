"""The table that the rows write: one event of it is about 200 bytes as JSON."""

from __future__ import annotations

from typing import Final

from relay.postgres import Connection

COLUMNS: Final = "customer, total, note"
VALUES: Final = (
    "'customer 17', 12.95, 'leave it with the neighbour on the left, who is at home in the"
    " mornings; ring twice'"
)


async def make_table(connection: Connection, name: str) -> None:
    """An empty table of orders."""
    await connection.execute(
        f"create table {name} ("
        " id bigint generated always as identity primary key, customer text not null,"
        " total numeric(10, 2) not null, status text not null default 'new',"
        " placed_at timestamptz not null default now(), note text)"
    )
