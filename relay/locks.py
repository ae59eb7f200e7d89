"""Who runs what: session advisory locks on one dedicated connection.

A relay owns a pipeline exactly as long as this connection holds the pipeline's lock. All relays of
a group share one more lock, in shared mode, by which they count each other. When the connection
does not answer in time everything counts as lost, at once: the server frees the locks of a dead
connection by itself, and another relay may already be at work.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence

import asyncpg
import msgspec

from relay.errors import NotConnected, RelayError
from relay.partition import pipeline_of
from relay.postgres import Connection, Database, connect, postgres_errors, wandering_session
from relay.settings import DEFAULT_SCHEMA, PostgresSettings

_NAMESPACE = "pgtrickle-relay"

# A relay's pipelines are the exclusive locks of the session that holds the lock of the members.
_MEMBERS = """
with advisory as (
    select pid, mode, classid, objid
    from pg_catalog.pg_locks
    where locktype = 'advisory' and objsubid = 1 and granted
        and database = (select oid from pg_catalog.pg_database where datname = current_database())
),
member as (
    select
        pid,
        (select count(*) from advisory as held
         where held.pid = joined.pid and held.mode = 'ExclusiveLock') as held,
        exists (
            select from advisory as mark
            where mark.pid = joined.pid and mark.classid = $3 and mark.objid = $4
        ) as is_full
    from advisory as joined
    where classid = $1 and objid = $2
)
select
    count(*) as members,
    bool_or(pid = pg_backend_pid()) as is_member,
    coalesce(
        array_agg(held) filter (where not is_full and pid <> pg_backend_pid()), '{}'
    ) as held_by_open
from member
"""

# Who holds these locks, which only members may hold. What a mere role may not see of others is
# null.
_HOLDERS = """
with advisory as materialized (
    select pid, classid, objid
    from pg_catalog.pg_locks
    where locktype = 'advisory' and objsubid = 1 and granted
        and database = (select oid from pg_catalog.pg_database where datname = current_database())
)
select
    wanted.name,
    held.pid,
    activity.usename,
    activity.application_name,
    activity.client_addr,
    exists (
        select from advisory as member
        where member.pid = held.pid and member.classid = $4 and member.objid = $5
    ) as is_member
from unnest($1::text[], $2::oid[], $3::oid[]) as wanted (name, high, low)
join advisory as held on held.classid = wanted.high and held.objid = wanted.low
left join pg_catalog.pg_stat_activity as activity on activity.pid = held.pid
"""

# The second is null for the only reader. PostgreSQL counts how often a session has a lock.
_ACQUIRE = """
select case
    when $2::bigint is null then pg_try_advisory_lock($1)
    when not pg_try_advisory_lock_shared($2) then false
    when pg_try_advisory_lock($1) then true
    else not pg_advisory_unlock_shared($2)
end as taken
"""


def lock_key(*parts: str) -> int:
    """The signed 64-bit advisory lock key of a name, spread by SHA-256."""
    digest = hashlib.sha256("\x00".join((_NAMESPACE, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


class Members(msgspec.Struct, frozen=True):
    """The relays of a group that are alive, this one included.

    ``held_by_open`` says how many pipelines each of the others owns, without those that are full.
    """

    count: int
    held_by_open: Sequence[int] = ()


async def unowned(database: Database, group_id: str, pipelines: Sequence[str]) -> list[str]:
    """Of these pipelines, the ones that no relay of the group owns. Raises `Outage`."""
    if not pipelines:
        return []
    scope = _scope(database.settings)
    asked = _of_holders(scope, group_id, [(name, name) for name in pipelines])
    rows = await database.fetch("looking for pipelines that nobody runs", _HOLDERS, *asked)
    return sorted({*pipelines} - {row["name"] for row in rows if row["is_member"]})


class Locks:
    """The locks of one relay. Not safe for concurrent calls: the coordinator is its only user."""

    def __init__(self, settings: PostgresSettings, group_id: str) -> None:
        self._settings = settings
        self._group_id = group_id
        self._scope = _scope(settings)
        self._member_key = lock_key(*self._scope, "member", group_id)
        self._full_key = lock_key(*self._scope, "full", group_id)
        self._is_full = False
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
        self._is_full = False
        if connection is None:
            return
        try:
            with contextlib.suppress(RelayError), postgres_errors("leaving the group"):
                await connection.close(timeout=self._settings.heartbeat_timeout_s)
        finally:
            connection.terminate()

    async def members(self) -> Members:
        """The relays of the group that are alive; also the heartbeat.

        Raises `Outage` when the server does not answer in time; all locks are gone then, as where
        our session is not the one that took them.
        """
        row = await self._query(_MEMBERS, *_halves(self._member_key), *_halves(self._full_key))
        if not row["is_member"]:
            self._abandon()
            raise wandering_session()
        return Members(count=row["members"], held_by_open=tuple(row["held_by_open"]))

    async def show_full(self, *, is_full: bool) -> None:
        """Let the others know whether this relay can take no more pipelines. Raises `Outage`."""
        if is_full != self._is_full:
            verb = "pg_advisory_lock_shared" if is_full else "pg_advisory_unlock_shared"
            await self._query(f"select pg_catalog.{verb}($1)", self._full_key)
            self._is_full = is_full

    async def try_acquire(self, pipeline: str) -> bool:
        """Take a pipeline, or one of its readers, if nobody has it. Raises `Outage`."""
        if pipeline in self._held:
            return True
        row = await self._query(_ACQUIRE, self.key(pipeline), self._shared_key(pipeline))
        if row["taken"]:
            self._held.add(pipeline)
        return bool(row["taken"])

    async def strangers(self, pipelines: Sequence[str]) -> Mapping[str, str]:
        """Of these, the ones that a session outside of the group holds, and which. Raises `Outage`.

        Whoever may connect can take an advisory lock; such a pipeline runs nowhere.
        """
        if not pipelines:
            return {}
        locks = [(name, lock) for name in pipelines for lock in {name, pipeline_of(name)}]
        rows = await self._fetch(_HOLDERS, *_of_holders(self._scope, self._group_id, locks))
        return {row["name"]: _stranger(row) for row in rows if not row["is_member"]}

    async def release(self, pipeline: str) -> None:
        """Let a pipeline go. Raises `Outage`."""
        if pipeline in self._held:
            self._held.discard(pipeline)
            await self._query(
                "select pg_advisory_unlock($1), pg_advisory_unlock_shared($2)",
                self.key(pipeline),
                self._shared_key(pipeline),
            )

    def key(self, pipeline: str) -> int:
        """The lock of a pipeline, or of one of its readers.

        Who has a reader also has the lock of its pipeline, shared with those who have the others.
        """
        return _pipeline_key(self._scope, self._group_id, pipeline)

    def _shared_key(self, name: str) -> int | None:
        pipeline = pipeline_of(name)
        return None if pipeline == name else self.key(pipeline)

    async def _query(self, query: str, *args: object) -> asyncpg.Record:
        """The one row of a query."""
        (row,) = await self._fetch(query, *args)
        return row

    async def _fetch(self, query: str, *args: object) -> list[asyncpg.Record]:
        if self._connection is None:
            raise NotConnected("the ownership connection is closed")
        try:
            with postgres_errors("asking for ownership"):
                return await self._connection.fetch(
                    query, *args, timeout=self._settings.heartbeat_timeout_s
                )
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        connection, self._connection = self._connection, None
        self._held.clear()
        self._is_full = False
        if connection is not None:
            connection.terminate()


def _scope(settings: PostgresSettings) -> Sequence[str]:
    """What sets the locks of one catalog apart from those of another in its database."""
    return () if settings.schema == DEFAULT_SCHEMA else (settings.schema,)


def _pipeline_key(scope: Sequence[str], group_id: str, pipeline: str) -> int:
    return lock_key(*scope, "pipeline", group_id, pipeline)


def _of_holders(
    scope: Sequence[str], group_id: str, locks: Sequence[tuple[str, str]]
) -> Sequence[object]:
    """What `_HOLDERS` is asked with: a name for each lock of a pipeline that is asked about."""
    halves = [_halves(_pipeline_key(scope, group_id, lock)) for _, lock in locks]
    member = lock_key(*scope, "member", group_id)
    return [name for name, _ in locks], *map(list, zip(*halves, strict=True)), *_halves(member)


def _stranger(row: asyncpg.Record) -> str:
    known = {
        "role": row["usename"],
        "application": row["application_name"],
        "address": row["client_addr"],
    }
    facts = [f"{name} {fact}" for name, fact in known.items() if fact]
    return ", ".join([f"pid {row['pid']}", *facts])


def _halves(key: int) -> tuple[int, int]:
    """How pg_locks shows a 64-bit key: high and low 32 bits, as unsigned oids."""
    unsigned = key & 0xFFFFFFFFFFFFFFFF
    return unsigned >> 32, unsigned & 0xFFFFFFFF
