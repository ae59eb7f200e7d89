"""Whatever is written while a backfill runs, its events and the captured ones give the table.

Each interleaving has rows that were there before their outbox, writers with open transactions, a
backfill that is interrupted and goes on, and a consumer that looks now and then. They take turns at
random; what another one's lock keeps from going on gives up after a moment and is tried again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest

from tests.servers.postgres import PostgresServer
from tests.sql.outbox_session import Session, session

INTERLEAVINGS = int(os.environ.get("PGTRICKLE_TEST_INTERLEAVINGS", "150"))
RANDOM_SEED = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(10**9)
KEYS = 12

STATEMENTS = (
    "insert into t values ({a}, 'k', {v}) on conflict (a, b) do update set v = excluded.v",
    "insert into t values ({a}, 'k', {v}) on conflict do nothing",
    "update t set v = {v} where a between {a} and {b}",
    "update t set v = {v} where a = {a}",
    "update t set a = {b} where a = {a}",
    "update t set a = a + 100 where a = {a}",
    "update t set a = a - 100 where a >= 100",
    "delete from t where a = {a}",
    "delete from t where a between {a} and {b}",
    "select from t where a = {a} for update",
    "savepoint s; update t set v = {v} where a = {a}; rollback to s",
)
ENDS = ("commit", "commit", "rollback")
# A lock that is held, uniqueness, a transaction that has failed, writers among themselves.
MAY_FAIL = {"55P03", "23505", "25P02", "40P01", "RL004"}


class Consumer:
    """Folds events by key, in the order in which a reader in commit order gets them."""

    def __init__(self, db: Session, pipeline: str) -> None:
        self._db = db
        self._pipeline = pipeline
        self._seen: list[int] = []
        self.rows: dict[tuple[int, str], int] = {}
        self.backfilled = 0

    def look(self) -> None:
        for outbox_id, payload in self._db.rows(
            "select id, payload from pgtrickle.outbox_t where id <> all (%s) order by id",
            self._seen,
        ):
            self._seen.append(outbox_id)
            self._fold(outbox_id, payload)

    def _fold(self, outbox_id: int, payload: dict[str, Any]) -> None:
        deleted, inserted = payload.get("deleted", []), payload.get("inserted", [])
        if payload.get("backfill", True) not in (True, self._pipeline):
            return
        if payload.get("claim_check"):
            delta = self._db.rows(
                "select row_op, row_data from pgtrickle.outbox_delta_rows_t"
                " where outbox_id = %s order by row_num",
                outbox_id,
            )
            deleted = [row for op, row in delta if op == "DELETE"]
            inserted = [row for op, row in delta if op == "INSERT"]
        for row in deleted:
            self.rows.pop((row["a"], row["b"]), None)
        for row in inserted:
            self.rows[row["a"], row["b"]] = row["v"]
        self.backfilled += len(inserted) if payload.get("backfill") else 0


class Backfill:
    """The loop of the procedure, one step at a time; a step is committed later, or never."""

    def __init__(self, db: Session, pipeline: str | None, chunk_rows: int) -> None:
        self._db = db
        self._arguments = pipeline, chunk_rows
        self._token: str | None = None
        self.is_finished = False

    def step(self, *, interrupt: bool) -> None:
        pipeline, chunk_rows = self._arguments
        if self.is_finished:
            return
        if interrupt:
            self._db.run("rollback")
            self._token = None
        elif self._token is None:
            self._token = self._db.value(
                "select pgtrickle.relay_begin_backfill('outbox_t', %s, null, %s)",
                pipeline, chunk_rows,
            )  # fmt: skip
        elif not self._is_open():
            self._db.run("begin")
            self._db.run(
                "select pgtrickle.relay_backfill_chunk(%s, null, %s)", self._token, chunk_rows
            )
        else:
            self._db.run("commit")
            self.is_finished = self._db.value(
                "select count(finished_at) > 0 from pgtrickle.relay_backfills"
            )

    def _is_open(self) -> bool:
        return self._db.connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE


@contextmanager
def stage(server: PostgresServer, sessions: int) -> Iterator[list[Session]]:
    """Sessions in a database with a captured table; locks are waited for but shortly."""
    with server.migrated_database() as database, ExitStack() as stack:
        opened = [stack.enter_context(session(database.dsn)) for _ in range(sessions)]
        opened[0].run(
            "create table t (a int, b text, v int, primary key (a, b));"
            "select pgtrickle.enable_outbox('t', claim_check_rows => 3);"
            "select pgtrickle.set_relay_outbox("
            " 'one', 't', '{\"type\": \"stdout\"}')"
        )
        for each in opened[1:]:
            each.run("set deadlock_timeout = '10ms'; set lock_timeout = '3ms'")
        yield opened


def attempt(db: Session, text: str) -> None:
    try:
        db.run(text)
    except psycopg.Error as error:
        if error.sqlstate not in MAY_FAIL:
            raise


def prepare(db: Session, dice: random.Random) -> None:
    """Rows that no event tells of, and nothing of the interleaving before."""
    db.run(
        "begin; set local session_replication_role = replica;"
        "delete from pgtrickle.outbox_t; delete from pgtrickle.outbox_delta_rows_t;"
        "delete from pgtrickle.relay_backfills; delete from t;"
        "insert into t select a, 'k', -a from generate_series(1, 12) as a"
        f" where a % {dice.choice((1, 1, 2, 3))} = 0; commit"
    )


def play(sessions: list[Session], dice: random.Random) -> tuple[list[str], int]:
    """One interleaving to its end; what was done, and how many rows the backfill sent."""
    admin, loader, *writers = sessions
    prepare(admin, dice)
    consumer = Consumer(admin, "one")
    pipeline = dice.choice((None, "one"))
    backfill = Backfill(loader, pipeline, dice.choice((1, 2, 3, 5)))
    done: list[str] = []
    for _ in range(dice.randrange(10, 40)):
        actor = dice.choice(["backfill"] * 3 + ["consumer"] + writers * 2)  # type: ignore[list-item]
        if actor == "consumer":
            done.append("look")
            consumer.look()
        elif actor == "backfill":
            interrupt = dice.random() < 0.1
            done.append("interrupt" if interrupt else "backfill")
            try:
                backfill.step(interrupt=interrupt)
            except psycopg.Error as error:
                if error.sqlstate not in MAY_FAIL:
                    raise
                loader.run("rollback")
        else:
            assert isinstance(actor, Session)
            is_idle = actor.connection.info.transaction_status == 0
            text = dice.choice(STATEMENTS if is_idle or dice.random() < 0.6 else ENDS)
            text = text.format(a=dice.randrange(KEYS), b=dice.randrange(KEYS), v=dice.randrange(99))
            done.append(f"{writers.index(actor)}: {text}")
            attempt(actor, f"begin; {text}" if is_idle else text)
    for writer in writers:
        attempt(writer, dice.choice(("commit", "rollback")))
    loader.run("rollback")
    if not backfill.is_finished:
        loader.run("call pgtrickle.backfill('t', %s, chunk_rows => 3)", pipeline)
    consumer.look()
    truth = {(a, b): v for a, b, v in admin.rows("select a, b, v from t")}
    assert consumer.rows == truth, "\n".join(done)
    return done, consumer.backfilled


@pytest.mark.slow
def test_events_of_a_backfill_and_of_writers_folded_by_key_are_the_table(
    postgres_server: PostgresServer,
) -> None:
    with stage(postgres_server, 4) as sessions:
        sent = interrupted = 0
        for number in range(INTERLEAVINGS):
            try:
                done, rows = play(sessions, random.Random(f"{RANDOM_SEED} {number}"))
            except AssertionError as failure:
                raise AssertionError(f"seed {RANDOM_SEED}, interleaving {number}") from failure
            sent += rows
            interrupted += "interrupt" in done
        assert sent > INTERLEAVINGS
        assert interrupted > INTERLEAVINGS / 10
