"""The relay's SQL catalog, one method for each SQL function that the relay calls.

The relay has no rights on the catalog's tables; everything goes through these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import ClassVar, Literal, TypeVar
from uuid import UUID

import asyncpg
import msgspec

from relay.errors import CatalogError, ConfigurationError
from relay.events import Direction
from relay.message import RelayMessage, op_named
from relay.partition import WHOLE, Partition, key_hash, partitions_of, pipeline_of
from relay.postgres import Database
from relay.settings import schema_identifier

CONFIG_CHANNEL = "pgtrickle_relay_config"
OUTBOX_CHANNEL = "pgtrickle_outbox_new"
DEAD_LETTERS_COUNTED = 10_000

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

# Server encodings that Python knows by these names. What is not listed is taken for ASCII, which
# all of them contain.
_CODECS: Mapping[str, str] = {"UTF8": "utf-8", "LATIN1": "latin-1", "WIN1252": "cp1252"}


class PipelineRow(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline as it stands in the catalog, or one of its readers (`readers_of`)."""

    name: str
    direction: Direction
    enabled: bool
    config: Mapping[str, object]
    partition: Partition = WHOLE

    @property
    def pipeline(self) -> str:
        """The pipeline's name, also where this is one of its readers."""
        return pipeline_of(self.name)

    @property
    def partitioning(self) -> Mapping[str, object]:
        """How keys are divided among its readers, in the form of `relay_partitioning` in SQL."""
        several = partitions_of(self.config)
        if several == 1:
            return {}
        return {"partitions": several, "key_columns": self.config.get("key_columns")}


def readers_of(rows: Iterable[PipelineRow]) -> list[PipelineRow]:
    """What is run, owned and shown of these pipelines: each, or each of its readers."""
    found: list[PipelineRow] = []
    for row in rows:
        several = partitions_of(row.config) if row.direction == "forward" else 1
        found += (
            [row]
            if several == 1
            else [
                msgspec.structs.replace(
                    row, name=f"{row.name}/{number}", partition=Partition(number, several)
                )
                for number in range(1, several + 1)
            ]
        )
    return found


class OutboxDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What the relay must know to read an outbox. Relations are quoted and schema-qualified.

    ``is_adopted``: it is a table of its application, and ``outbox_relation`` a call that reads it.
    """

    outbox_table: str
    outbox_relation: str
    outbox_oid: int
    stream_table: str
    delta_relation: str
    key_columns: Sequence[str] | None
    sequence_cache: int
    last_id: int
    swept_through: int
    is_adopted: bool = False

    def rows(self, bounds: str) -> str:
        """What stands behind ``from`` for rows within these bounds.

        They are arguments of `relay_adopted_rows`, and have to be conditions of the statement too.
        """
        if not self.is_adopted:
            return self.outbox_relation
        return f"{self.outbox_relation.removesuffix(')')}, {bounds})"


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """Ownership of one pipeline's position, valid until somebody claims it again.

    ``gap_first_ids`` and ``gap_last_ids`` are the pending gaps, as ranges with both ends included.
    """

    epoch: int
    last_change_id: int
    gap_first_ids: Sequence[int]
    gap_last_ids: Sequence[int]


# Asked before and after a call of a function that its owner can change at any time, with the
# parameters 1 to 3.
INBOX_IS_INTACT = "relay_inbox_is_intact($1, $2, $3)"
_SNAPSHOT_IS_INTACT = "relay_snapshot_is_intact($1, $2)"

# As long as a table of many gigabytes may take.
_SNAPSHOT_TIMEOUT_S = 3600.0


class InboxDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What the relay must know to write an inbox through the functions beside its table.

    Functions are quoted; ``fields`` are the parameters of ``receive_function``, each with the type
    of its column in ``types``. The ids and ``version`` are for `INBOX_IS_INTACT`, while connected.
    ``is_foreign``: table and functions belong to somebody else than the catalog.
    """

    inbox_name: str
    fields: Sequence[str]
    types: Sequence[str]
    receive_function: str
    sweep_function: str | None
    table_id: int
    function_id: int
    version: str
    is_foreign: bool


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """One message on its way into the dead-letter queue.

    ``is_transformed``: it is as the sink was given it; otherwise it is as the source gave it, and
    is transformed when it is tried again. ``is_shaped``: the source gave it as the pipeline's shape
    made it, which is not applied again.
    """

    message: RelayMessage
    is_transformed: bool
    is_shaped: bool = False
    error_kind: str
    error: str
    attempts: int


class StoredDeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """One message taken out of the dead-letter queue for another try.

    ``attempts``: how often it had failed by then.
    """

    id: int
    message: RelayMessage
    is_transformed: bool
    is_shaped: bool = False
    attempts: int


class DeadLetterSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One message in the dead-letter queue, for people: why it is there, and not what it holds."""

    id: int
    subject: str | None
    error_kind: str
    error: str
    attempts: int
    last_failed_at: datetime
    retry_requested_at: datetime | None


class Lag(msgspec.Struct, frozen=True, kw_only=True):
    """How far one forward pipeline is behind its outbox; unknown (None) where that is gone."""

    pipeline: str
    last_change_id: int | None
    max_outbox_id: int | None
    lag_rows: int | None
    oldest_unsent_at: datetime | None
    pending_gaps: int
    worker_id: str | None


class Delivered(msgspec.Struct, frozen=True):
    """Whether a pipeline is done with a row, and how many dead letters of it there are."""

    is_settled: bool
    dead_letters: int


class Reader(msgspec.Struct, frozen=True, kw_only=True):
    """Who reads an outbox: a pipeline in a relay group, or a consumer group of an application.

    ``relay_group_id`` and ``last_change_id`` are None where a pipeline has no position yet.
    """

    relay_group_id: str | None
    pipeline: str | None
    consumer_group: str | None
    outbox_table: str | None
    last_change_id: int | None
    updated_at: datetime | None


class OutboxSize(msgspec.Struct, frozen=True, kw_only=True):
    """How much an outbox holds; rows as PostgreSQL last estimated them, None before."""

    outbox_table: str
    stream_table: str
    estimated_rows: int | None
    bytes: int | None


class Backfill(msgspec.Struct, frozen=True, kw_only=True):
    """How far the rows that a table had before its outbox are sent; ``pipeline`` None: to all.

    ``estimated_rows``: what the table had when it began, as PostgreSQL estimated it; None before.
    ``stuck``: the server process ``call_pid`` is at it, and gets no row further; ``interrupted``:
    no call is at it any more.
    """

    stream_table: str
    outbox_table: str
    pipeline: str | None
    is_filtered: bool
    state: Literal["running", "stuck", "interrupted", "finished"]
    sent_rows: int
    estimated_rows: int | None
    started_at: datetime
    progressed_at: datetime
    call_pid: int

    @property
    def is_over(self) -> bool:
        """True when all rows are sent."""
        return self.state == "finished"

    @property
    def is_unwell(self) -> bool:
        """True when it does not go on by itself."""
        return self.state in ("stuck", "interrupted")

    @property
    def progress(self) -> str:
        """How far it is, in words."""
        text = (
            f"backfill of {self.stream_table} to {self.pipeline or 'all'}: {self.state},"
            f" {self.sent_rows} rows sent"
        )
        if not self.is_over and not self.is_filtered and self.estimated_rows is not None:
            text += f", about {max(0, self.estimated_rows - self.sent_rows)} left"
        if self.is_unwell:
            still_s = (datetime.now(UTC) - self.progressed_at).total_seconds()
            text += f", no progress for {still_s:.0f} s"
        return text


class Seek(msgspec.Struct, frozen=True, kw_only=True):
    """Where `relay_seek` put a pipeline last, and how far the slowest of its readers has come.

    ``through_id`` is the highest id that was visible then; ``reached_id`` goes no further.
    """

    pipeline: str
    sought_to: str
    sought_by: str
    sought_at: datetime
    after_id: int
    through_id: int
    reached_id: int

    is_unwell: ClassVar[bool] = False

    @property
    def is_over(self) -> bool:
        """True when what was there at that moment is sent."""
        return self.reached_id >= self.through_id

    @property
    def progress(self) -> str:
        """Who sought, when, to where, and how far it is, in words."""
        reached = "" if self.is_over else f", at id {self.reached_id} of {self.through_id}"
        return (
            f"relay_seek of {self.pipeline} to {self.sought_to} by {self.sought_by}"
            f" at {self.sought_at:%Y-%m-%d %H:%M:%S}: behind id {self.after_id}{reached}"
        )


class FleetRow(msgspec.Struct, frozen=True, kw_only=True):
    """One relay, and what it said of itself when it was last seen, as JSON."""

    relay_group_id: str
    worker_id: str
    host: str | None
    last_seen_at: datetime
    is_alive: bool
    report: bytes


class CaptureProblem(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with the capture of one outbox, and how to mend it."""

    outbox_table: str
    problem: str
    remedy: str | None


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of a consumer group that are one consumer's for a while.

    ``is_settled``: there are none, and nobody else has any either.
    """

    outbox_ids: Sequence[int]
    is_settled: bool


class _Metadata(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    stream_table: str = ""
    outbox_id: int | None = None
    refresh_id: str | None = None
    created_at: datetime | None = None
    is_full_refresh: bool = False
    is_transformed: bool = False
    is_shaped: bool = False
    is_escaped: bool = False
    key_hash: int = 0


class Catalog:
    """The catalog as seen by the relays of one group, ``group_id``."""

    def __init__(self, database: Database, group_id: str) -> None:
        self._database = database
        self.group_id = group_id
        self._schema = schema_identifier(database.settings.schema)
        self._text: DatabaseText | None = None

    async def version(self) -> str:
        """The catalog's version. Raises `CatalogMissing` where there is none."""
        return await self._value(str, "reading the catalog's version", "relay_schema_version")

    async def pipelines(self) -> list[PipelineRow]:
        """All pipelines, enabled or not."""
        columns = "name, direction, enabled, config"
        rows = await self._rows("reading the pipelines", "list_relay_configs", columns=columns)
        return [PipelineRow(**{**dict(row), "config": _object(row["config"])}) for row in rows]

    async def outbox(self, outbox_table: str) -> OutboxDescription:
        """An outbox by its own name. Raises `ConfigurationError` where it is gone."""
        row = await self._row("looking up the outbox", "relay_outbox_of", outbox_table)
        return msgspec.convert({**dict(row), "outbox_table": outbox_table}, OutboxDescription)

    async def outbox_named(self, name: str) -> str:
        """The outbox of a stream table. Raises `ConfigurationError` where it is not enabled."""
        return await self._value(str, "looking up the outbox", "relay_outbox_named", name)

    async def inbox(self, name: str, schema: str | None = None) -> InboxDescription:
        """An inbox. Raises `ConfigurationError` where there is none, or where it is broken."""
        row = await self._row("looking up the inbox", "relay_inbox", name, schema)
        if row["problem"] is not None:
            raise ConfigurationError(
                f"inbox {name} is broken: {row['problem']}",
                remedy=f"select {self._schema}.enable_inbox_tracking('{name}', …), again"
                if row["adopted"]
                else f"select {self._schema}.drop_inbox('{name}'), and create it again",
            )
        return msgspec.convert(dict(row), InboxDescription)

    async def claim(
        self,
        pipeline: str,
        outbox_table: str | None,
        worker_id: str,
        partitioning: Mapping[str, object] | None = None,
    ) -> Claim:
        """Take ownership of a pipeline's position; whoever had it can't write it any more.

        Of one of several readers with its ``partitioning``; raises `OwnershipLost` where the
        positions are of another.
        """
        row = await self._row(
            "claiming the pipeline",
            "relay_claim",
            self.group_id,
            pipeline,
            outbox_table,
            worker_id,
            msgspec.json.encode(partitioning or {}),
        )
        return msgspec.convert(dict(row), Claim)

    async def to_repartition(self) -> frozenset[str]:
        """The pipelines whose positions are of other readers than they have now."""
        doing = "looking for changed partitions"
        rows = await self._rows(doing, "relay_to_repartition", self.group_id)
        return frozenset(row[0] for row in rows)

    async def repartition(
        self, pipeline: str, partitioning: Mapping[str, object], lock_key: int
    ) -> bool:
        """Bring the readers of a pipeline to one position, from which those of today start.

        False, and nothing is done, while a session holds ``lock_key``, or where the pipeline is
        partitioned otherwise by now.
        """
        return await self._value(
            bool,
            "bringing readers to one position",
            "relay_repartition",
            self.group_id,
            pipeline,
            msgspec.json.encode(partitioning),
            lock_key,
        )

    async def commit(
        self,
        pipeline: str,
        epoch: int,
        last_change_id: int,
        *,
        closed: Sequence[int] = (),
        opened: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Write position and gaps together. Raises `OwnershipLost` when the epoch has moved on.

        ``closed`` are the first ids of gaps that are no more, ``opened`` new ranges.
        """
        firsts, lasts = [first for first, _ in opened], [last for _, last in opened]
        gaps = [list(closed), firsts, lasts]
        await self._do(
            "committing the offset",
            "relay_commit",
            self.group_id,
            pipeline,
            epoch,
            last_change_id,
            *gaps,
        )

    async def reset_offset(self, pipeline: str, epoch: int, last_change_id: int) -> None:
        """Set the position anywhere and remove the gaps: the outbox was made again."""
        await self._do(
            "resetting the offset",
            "relay_commit",
            self.group_id,
            pipeline,
            epoch,
            last_change_id,
            [],
            [],
            [],
            True,
        )

    async def release(self, pipeline: str, epoch: int) -> None:
        """Give up ownership; harmless when it was lost already."""
        await self._do("releasing the pipeline", "relay_release", self.group_id, pipeline, epoch)

    async def join_group(
        self, group: str, pipeline: str, outbox_table: str, consumer: str, on_reset: str
    ) -> bool:
        """Become a consumer of a group; True where its position was reset as ``on_reset`` says.

        Raises `ConfigurationError` where the group is gone, or another's.
        """
        return await self._value(
            bool,
            "joining the consumer group",
            "relay_group_join",
            group,
            pipeline,
            self.group_id,
            outbox_table,
            consumer,
            on_reset,
        )

    async def lease(
        self,
        group: str,
        consumer: str,
        lease_token: UUID,
        *,
        max_messages: int,
        max_bytes: int,
        seconds: int,
    ) -> Lease:
        """The next rows of a group: about so many messages and bytes, for so long."""
        row = await self._row(
            "leasing rows",
            "relay_group_poll",
            group,
            consumer,
            max_messages,
            seconds,
            max_bytes,
            max_messages,
            lease_token,
        )
        return msgspec.convert(dict(row), Lease)

    async def extend_lease(
        self, group: str, consumer: str, lease_token: UUID, seconds: int
    ) -> None:
        """Keep the rows of a lease, for so long from now. Raises `LeaseLost`."""
        doing = "extending the lease"
        await self._do(doing, "extend_lease", group, consumer, seconds, lease_token)

    async def settle_lease(
        self, group: str, consumer: str, lease_token: UUID, through_id: int
    ) -> None:
        """The rows of a lease up to this id are delivered. Raises `LeaseLost`."""
        doing = "committing the offset"
        await self._do(doing, "commit_offset", group, consumer, through_id, lease_token)

    async def release_lease(self, group: str, lease_token: UUID) -> None:
        """Give the rest of a lease back at once; harmless when it was lost already."""
        await self._do("releasing the lease", "relay_group_release", group, lease_token)

    async def leave_group(self, group: str, consumer: str) -> None:
        """Be a consumer of this group no longer."""
        await self._do("leaving the consumer group", "relay_group_leave", group, consumer)

    async def cursor(self, pipeline: str, cursor_key: str) -> bytes | None:
        """A source's own remembered position, as JSON."""
        doing = "reading the cursor"
        row = await self._row(doing, "relay_cursor_get", self.group_id, pipeline, cursor_key)
        return None if row[0] is None else bytes(row[0])

    async def set_cursor(self, pipeline: str, epoch: int, cursor_key: str, cursor: bytes) -> None:
        """Remember a source's own position. Raises `OwnershipLost`."""
        await self._do(
            "committing the cursor",
            "relay_cursor_set",
            self.group_id,
            pipeline,
            epoch,
            cursor_key,
            cursor,
        )

    async def sleep(self, outbox_table: str, sleeper: str, seconds: int) -> None:
        """Ask publishers to notify: this relay is idle on that outbox, for so long at most."""
        await self._do("going to sleep", "relay_sleep", outbox_table, sleeper, seconds)

    async def wake(self, outbox_table: str, sleeper: str) -> None:
        """Spare publishers the notification: this relay is polling by itself."""
        await self._do("waking up", "relay_sleep", outbox_table, sleeper)

    async def rows_consumed(self, outbox_table: str, outbox_id: int) -> None:
        """Tell the outbox that a claim check was fetched completely."""
        doing = "reporting a consumed claim check"
        await self._do(doing, "outbox_rows_consumed", outbox_table, outbox_id)

    async def swept_outboxes(self) -> list[str]:
        """The outboxes that relays have to sweep, whoever reads them."""
        rows = await self._rows("listing the outboxes", "relay_swept_outboxes")
        return [row[0] for row in rows]

    async def sweep(self, outbox_table: str, max_rows: int) -> int:
        """Remove rows that are past retention and delivered; returns how many."""
        doing = "sweeping the outbox"
        return await self._value(int, doing, "relay_sweep_outbox", outbox_table, max_rows)

    async def sweep_inbox(self, name: str, max_rows: int) -> int:
        """Remove processed inbox rows that are past retention; returns how many."""
        inbox = await self.inbox(name)
        if inbox.sweep_function is None:
            return 0
        async with (
            self._database.connection("sweeping the inbox") as connection,
            self._database.leaving_nothing(connection, is_needed=inbox.is_foreign),
        ):
            swept = await connection.fetchval(
                f"select case when {INBOX_IS_INTACT} then {inbox.sweep_function}($4) end,"
                f" {INBOX_IS_INTACT}",
                inbox.table_id,
                inbox.function_id,
                inbox.version,
                max_rows,
            )
        return int(swept)

    async def due_snapshots(self) -> list[str]:
        """Outboxes whose stream table was refreshed without triggers since the last snapshot."""
        rows = await self._rows("looking for full refreshes", "relay_due_snapshots")
        return [row["outbox_table"] for row in rows]

    async def snapshot(self, outbox_table: str) -> None:
        """Write all rows of a stream table into its outbox, unless another relay has or does.

        The function that does it belongs to the owner of the table. The rows, and up to which
        refresh they stand for, are written in one transaction.
        """
        async with (
            self._database.connection("writing a snapshot") as connection,
            self._database.leaving_nothing(connection, is_needed=True),
            connection.transaction(isolation="read_committed"),
        ):
            due = await connection.fetchrow("select * from relay_due_snapshots($1)", outbox_table)
            if due is None:
                return
            await connection.execute(
                f"select case when {_SNAPSHOT_IS_INTACT} then {due['function']}() end,"
                f" {_SNAPSHOT_IS_INTACT}",
                outbox_table,
                due["version"],
                timeout=_SNAPSHOT_TIMEOUT_S,
            )
            await connection.execute(
                "select relay_end_snapshot($1, $2)", outbox_table, due["refresh_id"]
            )

    async def dead_letter(
        self, pipeline: str, direction: Direction, letters: Sequence[DeadLetter]
    ) -> list[int]:
        """Store messages that can't be delivered; durable when it returns. Gives their ids."""
        text = await self._database_text()
        stored = [text.storable(letter.message) for letter in letters]
        messages = [message for message, _ in stored]
        return await self._value(
            list[int],
            "writing dead letters",
            "relay_dead_letter",
            self.group_id,
            pipeline,
            direction,
            [message.dedup_key for message in messages],
            [message.subject for message in messages],
            [message.key for message in messages],
            [message.op for message in messages],
            [msgspec.json.encode(message.headers) for message in messages],
            [message.payload for message in messages],
            [
                _metadata(message, letter, is_escaped)
                for letter, (message, is_escaped) in zip(letters, stored, strict=True)
            ],
            [letter.error_kind for letter in letters],
            [text.printable(letter.error) for letter in letters],
            [letter.attempts for letter in letters],
        )

    async def take_dead_letters(
        self, pipeline: str, max_rows: int, lease_s: int = 0
    ) -> list[StoredDeadLetter]:
        """Dead letters of a pipeline for which a retry was asked; nobody else's for so long."""
        asked = self.group_id, pipeline, max_rows, lease_s
        return [
            _stored(row)
            for row in await self._rows("taking dead letters", "relay_dlq_take", *asked)
        ]

    async def settle_dead_letters(self, ids: Sequence[int]) -> None:
        """These were delivered: remove them."""
        await self._do("settling dead letters", "relay_dlq_settle", list(ids))

    async def fail_dead_letters(
        self, letters: Sequence[StoredDeadLetter], errors: Sequence[str]
    ) -> None:
        """Record failed retries, unless the row changed since it was taken."""
        text = await self._database_text()
        await self._do(
            "recording failed retries",
            "relay_dlq_fail",
            [letter.id for letter in letters],
            [text.printable(error) for error in errors],
            [letter.attempts for letter in letters],
        )

    async def put_back(self, ids: Sequence[int]) -> None:
        """Ask for a retry of these: they were rejected during an outage."""
        await self._do("putting back dead letters", "relay_dlq_put_back", list(ids))

    async def lag(self, pipelines: Sequence[str]) -> list[Lag]:
        """How far these forward pipelines of this group are behind; reverse ones are left out."""
        return await self._all(Lag, "measuring lag", "relay_lag", self.group_id, list(pipelines))

    async def delivered(self, pipeline: str, outbox_id: int) -> Delivered | None:
        """What became of a row of an outbox; None where there is no such forward pipeline."""
        asked = self.group_id, pipeline, outbox_id
        found = await self._all(Delivered, "looking for a delivery", "relay_delivered", *asked)
        return next(iter(found), None)

    async def readers(self) -> list[Reader]:
        """Who reads which outbox, in all relay groups, and how far each has come."""
        return await self._all(Reader, "looking who reads the outboxes", "relay_readers")

    async def outbox_sizes(self) -> list[OutboxSize]:
        """How much each outbox holds."""
        return await self._all(OutboxSize, "measuring the outboxes", "relay_outbox_sizes")

    async def backfills(self) -> list[Backfill]:
        """Backfills that run or were interrupted, and those that ended in the last hour."""
        rows = await self._database.fetch(
            "looking at backfills",
            "select * from backfill_progress"
            " where finished_at is null or finished_at > pg_catalog.now() - interval '1 hour'"
            " order by started_at",
        )
        return msgspec.convert([dict(row) for row in rows], list[Backfill])

    async def seeks(self) -> list[Seek]:
        """Where `relay_seek` put each pipeline of this group last, the latest last."""
        return await self._all(Seek, "looking at seeks", "relay_seek_progress", self.group_id)

    async def fleet(self, *, of_all_groups: bool = False) -> list[FleetRow]:
        """The relays of this group, or of all; one that was killed stays listed for a day."""
        group = None if of_all_groups else self.group_id
        return await self._all(FleetRow, "looking at the fleet", "relay_fleet", group)

    async def capture_problems(self) -> list[CaptureProblem]:
        """What is wrong with capture, in all outboxes."""
        doing = "looking for capture problems"
        return await self._all(CaptureProblem, doing, "relay_capture_problems")

    async def oldest_dead_letter_error(self, pipeline: str) -> str:
        """Why the oldest dead letter of a pipeline failed; empty where it has none."""
        doing = "reading a dead letter"
        oldest = await self._all(DeadLetterSummary, doing, "relay_dlq_list", pipeline, 1)
        return oldest[0].error if oldest else ""

    async def latest_dead_letters(self, pipeline: str, limit: int) -> list[DeadLetterSummary]:
        """The dead letters of a pipeline that came last, the newest first."""
        doing = "reading dead letters"
        return await self._all(DeadLetterSummary, doing, "relay_dlq_list", pipeline, limit, True)

    async def dead_letter_counts(self, pipelines: Sequence[str]) -> dict[str, int]:
        """How many dead letters these pipelines have; those without are left out.

        `DEAD_LETTERS_COUNTED` of one means so many or more: every relay asks every few seconds.
        """
        rows = await self._rows(
            "counting dead letters", "relay_dlq_stats", pipelines, DEAD_LETTERS_COUNTED
        )
        return {row["pipeline"]: row["entries"] for row in rows}

    async def report(self, worker_id: str, report: bytes) -> None:
        """Show the fleet what this relay is doing; ``report`` is a JSON object."""
        text = (await self._database_text()).printable_json(report)
        await self._do("reporting to the fleet", "relay_report", self.group_id, worker_id, text)

    async def retire(self, worker_id: str) -> None:
        """Leave the fleet."""
        await self._do("leaving the fleet", "relay_retire", self.group_id, worker_id)

    async def _database_text(self) -> DatabaseText:
        if self._text is None:
            doing, asked = "reading the database's encoding", "pg_catalog.current_setting"
            self._text = DatabaseText(await self._value(str, doing, asked, "server_encoding"))
        return self._text

    async def _do(self, doing: str, function: str, *args: object) -> None:
        """Call a function for its effect."""
        await self._rows(doing, function, *args)

    async def _value(self, into: type[T], doing: str, function: str, *args: object) -> T:
        """What a function returns."""
        return msgspec.convert((await self._row(doing, function, *args))[0], into)

    async def _all(self, into: type[S], doing: str, function: str, *args: object) -> list[S]:
        """The rows of a function that returns a table, each with the columns of that struct."""
        columns = ", ".join(into.__struct_fields__)
        rows = await self._rows(doing, function, *args, columns=columns)
        return [msgspec.convert(dict(row), into) for row in rows]

    async def _row(self, doing: str, function: str, *args: object) -> asyncpg.Record:
        rows = await self._rows(doing, function, *args)
        if not rows:
            raise CatalogError(f"the catalog gave no row while {doing}")
        return rows[0]

    async def _rows(
        self, doing: str, function: str, *args: object, columns: str = "*"
    ) -> list[asyncpg.Record]:
        places = [f"${number}" for number in range(1, len(args) + 1)]
        query = f"select {columns} from {function}({', '.join(places)})"
        return await self._database.fetch(doing, query, *args)


class DatabaseText:
    """Text as a database can hold it.

    NUL and lone surrogates, which no database can hold, are replaced for good by visible escapes.
    Characters that only this database's encoding lacks are escaped so that `original` restores
    them, and a retry sends them.
    """

    def __init__(self, server_encoding: str) -> None:
        self._codec = _CODECS.get(server_encoding, "ascii")

    def storable(self, message: RelayMessage) -> tuple[RelayMessage, bool]:
        """The message as it is stored, and whether that is escaped."""
        visible = _with_texts(message, _visible)
        texts = (
            visible.dedup_key,
            visible.subject,
            visible.key or "",
            visible.stream_table,
            visible.refresh_id or "",
            *visible.headers,
            *visible.headers.values(),
        )
        if self._holds("".join(texts)):
            return visible, False
        return _with_texts(visible, lambda text: text.encode("unicode_escape").decode()), True

    @staticmethod
    def original(message: RelayMessage) -> RelayMessage:
        """The message that `storable` escaped."""
        return _with_texts(message, lambda text: text.encode().decode("unicode_escape"))

    def printable(self, text: str) -> str:
        """For people to read: what the database can't hold is made visible."""
        return _visible(text).encode(self._codec, "backslashreplace").decode(self._codec)

    def printable_json(self, document: bytes) -> bytes:
        """The same inside the strings of a JSON document, where a backslash means something."""
        text = document.decode().encode(self._codec, "xmlcharrefreplace").decode(self._codec)
        return text.encode()

    def _holds(self, text: str) -> bool:
        # In a small encoding a backslash is escaped too, so that two keys never become one.
        if self._codec == "utf-8":
            return True
        try:
            text.encode(self._codec)
        except UnicodeEncodeError:
            return False
        return "\\" not in text


def _with_texts(message: RelayMessage, change: Callable[[str], str]) -> RelayMessage:
    return msgspec.structs.replace(
        message,
        dedup_key=change(message.dedup_key),
        subject=change(message.subject),
        key=None if message.key is None else change(message.key),
        stream_table=change(message.stream_table),
        refresh_id=None if message.refresh_id is None else change(message.refresh_id),
        headers={change(name): change(text) for name, text in message.headers.items()},
    )


def _visible(text: str) -> str:
    return text.replace("\x00", "\\u0000").encode("utf-8", "backslashreplace").decode()


def _object(raw: bytes) -> Mapping[str, object]:
    value = msgspec.json.decode(raw)
    return value if isinstance(value, dict) else {}


def _metadata(message: RelayMessage, letter: DeadLetter, is_escaped: bool) -> bytes:
    return msgspec.json.encode(
        _Metadata(
            stream_table=message.stream_table,
            outbox_id=message.outbox_id,
            refresh_id=message.refresh_id,
            created_at=message.created_at,
            is_full_refresh=message.is_full_refresh,
            is_transformed=letter.is_transformed,
            is_shaped=letter.is_shaped,
            is_escaped=is_escaped,
            key_hash=key_hash(letter.message.key),
        )
    )


def counted(dead_letters: int) -> str:
    """For people, a number that `Catalog.dead_letter_counts` gave."""
    return f"{dead_letters:,}{'+' if dead_letters >= DEAD_LETTERS_COUNTED else ''}"


def _stored(row: asyncpg.Record) -> StoredDeadLetter:
    metadata = msgspec.json.decode(row["metadata"], type=_Metadata)
    message = RelayMessage(
        dedup_key=row["dedup_key"],
        key=row["message_key"],
        subject=row["subject"],
        op=op_named(row["op"]),
        payload=row["payload"],
        is_full_refresh=metadata.is_full_refresh,
        stream_table=metadata.stream_table,
        outbox_id=metadata.outbox_id,
        refresh_id=metadata.refresh_id,
        created_at=metadata.created_at,
        headers=msgspec.json.decode(row["headers"], type=dict[str, str]),
    )
    return StoredDeadLetter(
        id=row["id"],
        is_transformed=metadata.is_transformed,
        is_shaped=metadata.is_shaped,
        attempts=row["attempts"],
        message=DatabaseText.original(message) if metadata.is_escaped else message,
    )
