"""What both sources of an outbox do alike, the only reader of its position and the group's worker.

`OutboxReading` is what their pipeline says, `Watch` waits for rows, `Unpacker` makes messages of
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import msgspec

from relay.backends.outbox.adopted import AdoptedDecoder
from relay.backends.outbox.claim_check import PAGE_ROWS, ClaimCheckReader, Page
from relay.backends.outbox.decoder import PART_ROWS, ROW_ID, Decoded, OutboxDecoder
from relay.backends.outbox.lookout import Lookout
from relay.backends.outbox.options import OutboxSourceOptions
from relay.backends.outbox.reader import standby
from relay.backends.outbox.row import OutboxRows
from relay.backends.outbox.wakefulness import Wakefulness
from relay.catalog import OUTBOX_CHANNEL, OutboxDescription
from relay.context import BackendContext
from relay.contracts import Batch
from relay.errors import NotConnected, OutboxUnsafe, RelayError
from relay.events import ClaimCheckFetched
from relay.partition import KEYLESS, KEYLESS_REMEDY, pipeline_of
from relay.postgres import Database

_log = logging.getLogger(__name__)

POLL_WAIT_S: Final = 1.0
REST_S: Final = 5.0
HEALTH_TIMEOUT_S: Final = 2.0
CLOSE_TIMEOUT_S: Final = 2.0

OnReset = Literal["earliest", "latest", "fail"]


class OutboxReading(msgspec.Struct, frozen=True, kw_only=True):
    """What a forward pipeline says about reading its outbox.

    ``on_reset``: what to do where the position lies beyond the outbox. ``key_columns``: what
    identifies an entity, null for the primary key. ``visibility_seconds``: length of a lease. For
    the rest see `OutboxDecoder`.
    """

    on_reset: OnReset = "fail"
    collapse_updates: bool = False
    snapshot_markers: bool = False
    key_columns: tuple[str, ...] | None = None
    visibility_seconds: int = 30


class Watch:
    """Waits for rows of one outbox: looks again and again, and asks publishers to notify."""

    def __init__(self, context: BackendContext) -> None:
        self._context = context
        self._news = asyncio.Event()
        self._is_interrupted = False
        self._outbox_table = ""
        self._unsubscribe: Callable[[], None] | None = None
        self._wakefulness: Wakefulness | None = None

    def begin(self, outbox_table: str) -> None:
        """Watch this outbox."""
        self._outbox_table = outbox_table
        self._wakefulness = Wakefulness(
            catalog=self._context.catalog,
            outbox_table=outbox_table,
            sleeper=f"{self._context.worker_id}:{self._context.pipeline}",
            poll_interval_s=self._context.poll_interval_s,
        )
        self._unsubscribe = self._context.database.subscribe(OUTBOX_CHANNEL, self._notified)

    async def first(
        self, find: Callable[[], Awaitable[Batch | None]], has_more: Callable[[], bool]
    ) -> Batch | None:
        """What `find` finds, within a second or so; None where it finds nothing.

        An empty batch where it was interrupted before it looked. ``has_more`` tells whether it
        would find something again at once. Raises `NotConnected` before `begin`, `Outage`.
        """
        wakefulness = self._wakefulness
        if wakefulness is None:
            raise NotConnected("the outbox source is not connected")
        deadline = _now() + POLL_WAIT_S
        self._news.clear()
        if await self._wait(wakefulness.gather_s):
            return Batch()
        while True:
            self._news.clear()
            batch = await find()
            if batch is not None:
                await wakefulness.found(is_full=has_more())
                return batch
            wait_s = await wakefulness.found_nothing()
            if await self._wait(min(wait_s, deadline - _now())) or _now() >= deadline:
                return None

    async def rest(self, relation: str, position: int) -> bool:
        """True as soon as the outbox may have a row above the position, which ought to have none.

        False where it was interrupted, or nothing came for some seconds. Raises `NotConnected`
        before `begin`, `Outage`.
        """
        if self._wakefulness is None:
            raise NotConnected("the outbox source is not connected")
        await self._wakefulness.found_nothing()
        with Lookout.of(self._context.database).watching(relation, position, self._news.set):
            was_interrupted = await self._wait(REST_S)
        return self._news.is_set() and not was_interrupted

    def interrupt(self) -> None:
        """End the wait of `first` or `rest`, this one or the next."""
        self._is_interrupted = True
        self._news.set()

    @property
    def is_interrupted(self) -> bool:
        """True where it is to return soon."""
        return self._is_interrupted

    async def end(self) -> None:
        """Watch no longer, and spare publishers the notification. Raises `Outage`."""
        unsubscribe, self._unsubscribe = self._unsubscribe, None
        wakefulness, self._wakefulness = self._wakefulness, None
        if unsubscribe is not None:
            unsubscribe()
        if wakefulness is not None:
            await wakefulness.end()

    async def _wait(self, seconds: float) -> bool:
        """Until there is news or the time is over; True when interrupted."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._news.wait()
        was_interrupted, self._is_interrupted = self._is_interrupted, False
        return was_interrupted

    def _notified(self, outbox_table: str) -> None:
        if outbox_table in ("", self._outbox_table):
            self._news.set()


class Unpacker:
    """Makes messages of outbox rows, and of a claim check page by page.

    Raises `ConfigurationError` where the shape of the pipeline hides a column of the key.
    """

    def __init__(
        self, context: BackendContext, reading: OutboxReading, outbox: OutboxDescription
    ) -> None:
        self._context = context
        self._outbox = outbox
        key_columns = reading.key_columns or tuple(outbox.key_columns or ())
        if context.shape is not None and key_columns != (ROW_ID,):
            context.shape.refuse_hidden(key_columns, "key")
        decoder = AdoptedDecoder if outbox.is_adopted else OutboxDecoder
        self._decoder = decoder(
            outbox_table=outbox.outbox_table,
            stream_table=outbox.stream_table,
            pipeline=pipeline_of(context.pipeline),
            key_columns=key_columns,
            follows_renames=reading.key_columns is None,
            namespace=context.dedup_namespace,
            collapse_updates=reading.collapse_updates,
            snapshot_markers=reading.snapshot_markers,
            shape=context.shape,
            partition=context.partition,
        )
        self._claim_check: ClaimCheckReader | None = None
        partition = context.partition
        self._looks_for_keys = partition.of > 1 and partition.number == 1

    @property
    def claim_check_id(self) -> int | None:
        """The outbox row whose pages come next."""
        return None if self._claim_check is None else self._claim_check.outbox_id

    def forget_claim_check(self) -> None:
        """Give no more pages: it is handed out again from its beginning."""
        self._claim_check = None

    async def unpack(self, rows: OutboxRows) -> Decoded:
        """As much of these as belongs into one batch; of a claim check `next_page` gives the rows.

        Other pipelines have their turn in between.
        """
        decoded = Decoded()
        for start in range(0, len(rows), PART_ROWS):
            await asyncio.sleep(0)
            if not self._decoder.decode(rows.part(start, start + PART_ROWS), decoded):
                break
        if self._looks_for_keys:
            self._look_for_keys(decoded)
        if decoded.claim_check is not None:
            self._claim_check = ClaimCheckReader(
                database=self._context.database,
                outbox=self._outbox,
                decoder=self._decoder,
                claim_check=decoded.claim_check,
                page_rows=min(PAGE_ROWS, self._context.batch_size),
                page_bytes=self._context.batch_bytes,
            )
        return decoded

    def _look_for_keys(self, decoded: Decoded) -> None:
        """Say so where the first messages that a key could deal have none."""
        keys = [message.key for message in decoded.messages if message.op != "truncate"]
        if not keys:
            return
        self._looks_for_keys = False
        if all(key is None for key in keys):
            _log.warning(
                "%s; %s",
                KEYLESS,
                KEYLESS_REMEDY,
                extra={"pipeline": self._context.pipeline, "direction": self._context.direction},
            )

    async def next_page(self) -> Page | None:
        """The next page of the claim check; None where it has none yet. Raises `Outage`."""
        page = None if self._claim_check is None else await self._claim_check.next_page()
        if page is None:
            return None
        if page.is_last:
            self._claim_check = None
        if page.rows:
            self._context.emit(
                ClaimCheckFetched(
                    pipeline=self._context.pipeline,
                    direction=self._context.direction,
                    rows=page.rows,
                )
            )
        return page


def batch_of(found: Decoded | Page, position: object = None, checkpoint: str = "") -> Batch:
    """What was found, as it is handed out."""
    return Batch(
        messages=found.messages,
        rejected=found.rejected,
        filtered=found.filtered,
        position=position,
        checkpoint=checkpoint,
    )


async def outbox_of(context: BackendContext, options: OutboxSourceOptions) -> OutboxDescription:
    """The outbox that is meant; raises as `refuse_unsafe`, and `ConfigurationError`."""
    catalog = context.catalog
    outbox = await catalog.outbox(
        options.outbox_table or await catalog.outbox_named(options.outbox)
    )
    await refuse_unsafe(context.database, outbox)
    return outbox


async def refuse_unsafe(database: Database, outbox: OutboxDescription) -> None:
    """Raises `OutboxUnsafe` where reading could lose an event, and `Outage`."""
    if outbox.sequence_cache != 1:
        raise OutboxUnsafe(
            f"the sequence of {outbox.outbox_table} has cache {outbox.sequence_cache}:"
            " sessions would draw ids long before they write them",
            remedy="alter sequence … cache 1",
        )
    row = await database.fetch_row(
        "checking the server",
        "select pg_catalog.pg_is_in_recovery() as is_standby,"
        " pg_catalog.current_setting('transaction_isolation') as isolation",
    )
    if row is not None and row["is_standby"]:
        raise standby()
    if row is not None and row["isolation"] != "read committed":
        raise OutboxUnsafe(
            f"the relay's transactions run at {row['isolation']}, which hides fresh commits",
            remedy="remove default_transaction_isolation from the relay's connection string",
        )


async def answers(database: Database) -> bool:
    """True when the database answers within a bound."""
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            await database.execute("checking the outbox", "select 1")
    except (RelayError, TimeoutError):
        return False
    return True


def _now() -> float:
    return asyncio.get_running_loop().time()
