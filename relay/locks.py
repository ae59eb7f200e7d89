"""Who runs what: session advisory locks on one dedicated connection.

A relay owns a pipeline exactly as long as this connection holds the pipeline's lock. All relays of
a group share one more lock, in shared mode, by which they count each other. When the connection
does not answer in time everything counts as lost, at once: the server frees the locks of a dead
connection by itself, and another relay may already be at work.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable

from relay.errors import NotConnected, RelayError
from relay.postgres import Connection, connect, postgres_errors
from relay.settings import PostgresSettings

_NAMESPACE = "pgtrickle-relay"


def lock_key(*parts: str) -> int:
    """The signed 64-bit advisory lock key of a name, spread by SHA-256."""
    digest = hashlib.sha256("\x00".join((_NAMESPACE, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


class Locks:
    """The locks of one relay. Not safe for concurrent calls: the coordinator is its only user."""

    def __init__(self, settings: PostgresSettings, group_id: str) -> None:
        self._settings = settings
        self._group_id = group_id
        self._member_key = lock_key("member", group_id)
        self._connection: Connection | None = None
        self._held: set[str] = set()

    @property
    def held(self) -> frozenset[str]:
        """The pipelines that are ours now."""
        return frozenset(self._held)

    async def open(self, on_lost: Callable[[], None]) -> None:
        """Connect and join the group. Raises as `relay.postgres.connect` does.

        ``on_lost`` is called when the connection ends, for whatever reason; what is then asked of
        these locks raises.
        """
        await self.aclose()
        connection = await connect(self._settings, purpose="lock")
        try:
            with postgres_errors("joining the group"):
                await connection.execute("select pg_advisory_lock_shared($1)", self._member_key)
        except BaseException:
            connection.terminate()
            raise
        connection.add_termination_listener(lambda _: on_lost())
        self._connection = connection

    async def aclose(self) -> None:
        """Give up every lock by ending the session. Idempotent, never raises."""
        connection, self._connection = self._connection, None
        self._held.clear()
        if connection is None:
            return
        try:
            with contextlib.suppress(RelayError), postgres_errors("leaving the group"):
                await connection.close(timeout=self._settings.heartbeat_timeout_s)
        finally:
            connection.terminate()

    async def count_members(self) -> int:
        """How many relays of the group are alive, this one included; also the heartbeat.

        Raises `Outage` when the server does not answer in time; all locks are gone then.
        """
        high, low = _halves(self._member_key)
        return int(
            await self._query(
                "select count(*) from pg_catalog.pg_locks where locktype = 'advisory'"
                " and database = (select oid from pg_catalog.pg_database"
                " where datname = current_database())"
                " and classid = $1 and objid = $2 and objsubid = 1 and granted",
                high,
                low,
            )
        )

    async def try_acquire(self, pipeline: str) -> bool:
        """Take a pipeline if nobody has it. Raises `Outage`."""
        if pipeline in self._held:
            return True
        taken = await self._query("select pg_try_advisory_lock($1)", self._key(pipeline))
        if taken:
            self._held.add(pipeline)
        return bool(taken)

    async def release(self, pipeline: str) -> None:
        """Let a pipeline go. Raises `Outage`."""
        if pipeline in self._held:
            self._held.discard(pipeline)
            await self._query("select pg_advisory_unlock($1)", self._key(pipeline))

    def _key(self, pipeline: str) -> int:
        return lock_key("pipeline", self._group_id, pipeline)

    async def _query(self, query: str, *args: object) -> int | bool:
        if self._connection is None:
            raise NotConnected("the ownership connection is closed")
        try:
            with postgres_errors("asking for ownership"):
                value: int | bool = await self._connection.fetchval(
                    query, *args, timeout=self._settings.heartbeat_timeout_s
                )
        except BaseException:
            self._abandon()
            raise
        return value

    def _abandon(self) -> None:
        connection, self._connection = self._connection, None
        self._held.clear()
        if connection is not None:
            connection.terminate()


def _halves(key: int) -> tuple[int, int]:
    """How pg_locks shows a 64-bit key: high and low 32 bits, as unsigned oids."""
    unsigned = key & 0xFFFFFFFFFFFFFFFF
    return unsigned >> 32, unsigned & 0xFFFFFFFF
