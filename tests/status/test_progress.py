"""Long one-off work shows how far it is, in a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg

from tests.servers.postgres import Database
from tests.status.emulator import Emulator

BAR = re.compile(rb"\[[#.]{30}\] ([^\x1b]+)\x1b\[K\r")


def test_migrate_and_drain_show_a_bar_which_is_gone_in_the_end(
    database: Database, tmp_path: Path
) -> None:
    migrate = _run("migrate", "--postgres-url", database.dsn)
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute("create table orders (id int primary key)")
        connection.execute("select pgtrickle.enable_outbox('orders')")
        connection.execute(
            "select pgtrickle.set_relay_outbox('out', 'orders', null,"
            " jsonb_build_object('type', 'file', 'output', %s::text))",
            (str(tmp_path / "out"),),
        )
        connection.execute("insert into orders select generate_series(1, 100)")
    drain = _run("drain", "+env=test", f"files.roots=[{tmp_path}]", "--postgres-url", database.dsn)

    assert b"of" in BAR.findall(migrate.output)[0]
    assert "the catalog is now at" in migrate.text
    assert b"delivered" in BAR.findall(drain.output)[0]
    assert "everything is delivered" in drain.text
    assert "[#" not in migrate.text + drain.text


def _run(*arguments: str) -> Emulator:
    terminal = Emulator("relay", arguments)
    try:
        assert terminal.wait() == 0, terminal.text
    finally:
        terminal.close()
    return terminal
