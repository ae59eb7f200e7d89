"""The outbox as a source, one reader per pipeline, or one for each of its partitions.

Guarantees. Loss: no event is skipped, in whatever order transactions commit or roll back and
however the row was inserted; an event is handed out again until its position is committed. Order:
commit order per key; a transaction that stays open delays nothing but its own events. Both hold
where ids come from the outbox's own sequence, with cache 1 and drawn by the INSERT, and on a
primary; anything else is refused, or said here. Dedup key: ``{outbox_table}:{outbox_id}:{index}``,
behind the pipeline's namespace where it has one.

Committing: position and pending gaps together, as changes to what the batch before committed.
A reader of a partition reads every row, gives the messages of its own keys, and passes the others:
position, gaps and order are those of an only reader.
What it does not do: share an outbox between competing workers; that is what groups are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from relay.backends.outbox.gap import PositionDelta
from relay.backends.outbox.group import GroupSource
from relay.backends.outbox.options import OutboxSourceOptions
from relay.backends.outbox.reader import CommitOrderReader, Round
from relay.backends.outbox.reading import (
    CLOSE_TIMEOUT_S,
    OutboxReading,
    Unpacker,
    Watch,
    answers,
    batch_of,
    outbox_of,
)
from relay.catalog import CONFIG_CHANNEL, Claim, OutboxDescription
from relay.context import BackendContext
from relay.contracts import Batch, NothingExpires
from relay.errors import LeaseLost, NotConnected, OwnershipLost, PositionLost, RelayError
from relay.options import parse_options
from relay.partition import pipeline_of

FLUSH_INTERVAL_S: Final = 1.0

_log = logging.getLogger(__name__)


class _Token(msgspec.Struct, frozen=True, kw_only=True):
    """The position of a batch. ``session``: a batch of an earlier one is void."""

    session: int
    delta: PositionDelta
    consumed_claim_check: int | None = None


class _Session(msgspec.Struct, kw_only=True):
    """One ownership of the position, from claim to the next.

    ``left_some``: the last round left something behind, as far as it knows. ``ahead``: the one
    behind it, which the server reads while that one is decoded and published. ``is_idle``: nothing
    is left to read, to wait for or to commit.
    """

    number: int
    epoch: int
    outbox: OutboxDescription
    reader: CommitOrderReader
    unpacker: Unpacker
    left_some: bool = False
    is_idle: bool = False
    ahead: asyncio.Task[Round] | None = None

    @property
    def has_more(self) -> bool:
        """True when there is more to hand out at once, as far as is known."""
        return self.unpacker.claim_check_id is not None or self.left_some

    async def read(self) -> Round:
        """The next round, which may have been read ahead."""
        ahead, self.ahead = self.ahead, None
        return await (self.reader.read() if ahead is None else ahead)

    def read_ahead(self) -> None:
        """Begin to read the next round."""
        self.ahead = asyncio.create_task(self.reader.read())

    async def aclose(self) -> None:
        """Read no further."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)


class OutboxSource(NothingExpires):
    """One reader of one outbox."""

    def __init__(
        self, options: OutboxSourceOptions, reading: OutboxReading, context: BackendContext
    ) -> None:
        self._options = options
        self._reading = reading
        self._context = context
        self._database = context.database
        self._catalog = context.catalog
        self._watch = Watch(context)
        self._outbox_table = ""
        self._session: _Session | None = None
        self._sessions = 0
        self._is_stale = False
        self._unsubscribe: Callable[[], None] | None = None
        self._may_be_moved = False
        self._flush_at = 0.0

    @classmethod
    def from_options(
        cls, options: Mapping[str, object], context: BackendContext
    ) -> OutboxSource | GroupSource:
        """Build from a catalog row's ``source``. Raises `ConfigurationError`."""
        parsed = parse_options(options, OutboxSourceOptions, path="source")
        known = {
            name: value
            for name, value in context.pipeline_options.items()
            if name in OutboxReading.__struct_fields__
        }
        reading = parse_options(known, OutboxReading, path="")
        if parsed.consumer_group is not None:
            return GroupSource(parsed, parsed.consumer_group, reading, context)
        return cls(parsed, reading, context)

    async def connect(self) -> None:
        """Take over the position and check that reading from it can lose nothing.

        Raises `OutboxUnsafe`, `PositionLost`, `ConfigurationError`, `Outage`.
        """
        await self._end_session()
        outbox = await outbox_of(self._context, self._options)
        self._session = await self._begin_session(outbox)
        self._outbox_table = outbox.outbox_table
        self._watch.begin(outbox.outbox_table)
        self._unsubscribe = self._database.subscribe(CONFIG_CHANNEL, self._config_changed)

    async def poll(self) -> Batch:
        """The next rows in commit order, or the next page of a claim check.

        Raises `NotConnected` before `connect`, `OutboxUnsafe`, `Outage`, and `LeaseLost` where
        somebody has moved the position.
        """
        session = self._session
        if session is None:
            raise NotConnected("the outbox source is not connected")
        if self._may_be_moved:
            self._may_be_moved = False
            await self._refuse_moved()
        if self._is_stale:
            await session.aclose()
            session = self._session = await self._begin_session(session.outbox)
        current, reader = session, session.reader
        if session.is_idle and not await self._watch.rest(
            session.outbox.rows(f"above => {reader.position}, max_rows => 1"), reader.position
        ):
            return Batch(is_end_of_backlog=not self._may_be_moved)
        batch = await self._watch.first(lambda: self._next(current), lambda: current.has_more)
        session.is_idle = not (
            batch or session.has_more or reader.pending_gaps or reader.has_changes
        )
        if batch is None:
            return Batch() if self._may_be_moved else self._idle(session)
        return batch

    def interrupt(self) -> None:
        """End the wait of a poll, this one or the next."""
        self._watch.interrupt()

    async def acknowledge(self, batch: Batch) -> None:
        """Commit position and gaps of this batch.

        Raises `OwnershipLost`, `LeaseLost` where somebody has moved the position, `Outage`.
        """
        token = batch.position
        if not isinstance(token, _Token):
            return
        session = self._session
        if session is None or token.session != session.number:
            raise NotConnected("this batch was handed out before the source reconnected")
        delta = token.delta
        try:
            await self._catalog.commit(
                self._context.pipeline,
                session.epoch,
                delta.position,
                closed=delta.closed,
                opened=delta.opened,
            )
        except OwnershipLost:
            await self._refuse_moved()
            raise
        if token.consumed_claim_check is not None:
            await self._catalog.rows_consumed(self._outbox_table, token.consumed_claim_check)

    async def reject(self, batch: Batch) -> None:  # noqa: ARG002 - all that is unacknowledged comes again
        """The next poll starts again from what was acknowledged."""
        self._is_stale = True

    async def is_healthy(self) -> bool:
        """True when connected and the database answers."""
        return self._session is not None and await answers(self._database)

    async def aclose(self) -> None:
        """Give up ownership of the position and take back the request to be woken."""
        session = self._session
        with contextlib.suppress(RelayError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._end_session()
                if session is not None:
                    await self._catalog.release(self._context.pipeline, session.epoch)

    async def _next(self, session: _Session) -> Batch | None:
        """What there is now, without waiting; None for nothing."""
        batch = await self._round(session)
        while batch is None and session.reader.has_due_gaps and not self._watch.is_interrupted:
            # Noted or stirred in the round that has just ended, or too many for one round.
            batch = await self._round(session)
        return batch

    async def _round(self, session: _Session) -> Batch | None:
        reader, unpacker = session.reader, session.unpacker
        if unpacker.claim_check_id is not None:
            return await self._next_page(session)
        read = await session.read()
        session.left_some = read.has_more
        if read.may_have_claim_check:
            decoded = await unpacker.unpack(read.rows)
            reader.settle(read, decoded.rows)
        else:
            reader.settle(read, len(read.rows))
            if read.has_more and read.locks is None:
                session.read_ahead()
            decoded = await unpacker.unpack(read.rows)
        if decoded.claim_check is not None:
            return await self._next_page(session)
        if not read.rows.ids:
            return None
        return batch_of(decoded, self._token(session), str(reader.position))

    async def _next_page(self, session: _Session) -> Batch | None:
        outbox_id = session.unpacker.claim_check_id
        page = await session.unpacker.next_page()
        if page is None:
            return None
        if not page.is_last:
            return batch_of(page)
        token = self._token(session, consumed_claim_check=outbox_id)
        return batch_of(page, token, str(session.reader.position))

    def _idle(self, session: _Session) -> Batch:
        """Nothing came. Gaps that were decided meanwhile are committed now and then."""
        if session.unpacker.claim_check_id is not None:
            return Batch()
        if session.reader.has_changes and _now() >= self._flush_at:
            return Batch(
                position=self._token(session),
                checkpoint=str(session.reader.position),
                is_end_of_backlog=True,
            )
        return Batch(is_end_of_backlog=True)

    def _token(self, session: _Session, *, consumed_claim_check: int | None = None) -> _Token:
        self._flush_at = _now() + FLUSH_INTERVAL_S
        return _Token(
            session=session.number,
            delta=session.reader.delta(),
            consumed_claim_check=consumed_claim_check,
        )

    async def _end_session(self) -> None:
        """Forget everything, and spare publishers the notification. Raises `Outage`."""
        session, self._session = self._session, None
        unsubscribe, self._unsubscribe = self._unsubscribe, None
        if unsubscribe is not None:
            unsubscribe()
        if session is not None:
            await session.aclose()
        await self._watch.end()

    def _config_changed(self, notice: str) -> None:
        """What `relay_seek` notifies, or that a notification may have been missed."""
        if notice and '"SEEK"' not in notice:
            return
        self._may_be_moved = True
        self._watch.interrupt()

    async def _refuse_moved(self) -> None:
        """Raise `LeaseLost` where nobody owns the position: another relay would own it."""
        lags = await self._catalog.lag([self._context.pipeline])
        if lags and lags[0].worker_id is None:
            pipeline = pipeline_of(self._context.pipeline)
            said = [one.progress for one in await self._catalog.seeks() if one.pipeline == pipeline]
            raise LeaseLost(said[-1] if said else "the position was released")

    async def _begin_session(self, outbox: OutboxDescription) -> _Session:
        """Claim the position and check it against what the outbox has."""
        self._sessions += 1
        claim = await self._catalog.claim(
            self._context.pipeline,
            outbox.outbox_table,
            self._context.worker_id,
            self._context.partitioning,
        )
        position = claim.last_change_id
        firsts, lasts = list(claim.gap_first_ids), list(claim.gap_last_ids)
        if position > outbox.last_id:
            # What the description said may be older than the position: another relay moved on.
            outbox = await self._catalog.outbox(outbox.outbox_table)
        if position > outbox.last_id:
            position, gaps = await self._reset(outbox, claim)
            firsts, lasts = [first for first, _ in gaps], [last for _, last in gaps]
        elif position < outbox.swept_through:
            raise self._swept(outbox, position)
        reader = CommitOrderReader(
            database=self._database,
            outbox=outbox,
            batch_size=self._context.batch_size,
            batch_bytes=self._context.batch_bytes,
        )
        await reader.start(position, firsts, lasts)
        self._is_stale = False
        return _Session(
            number=self._sessions,
            epoch=claim.epoch,
            outbox=outbox,
            reader=reader,
            unpacker=Unpacker(self._context, self._reading, outbox),
        )

    async def _reset(
        self, outbox: OutboxDescription, claim: Claim
    ) -> tuple[int, list[tuple[int, int]]]:
        """The outbox was recreated: start where the pipeline says."""
        found = (
            f"the position {claim.last_change_id} lies beyond the outbox {outbox.outbox_table},"
            f" whose highest id is {outbox.last_id}: it was recreated or restored"
        )
        if self._reading.on_reset == "fail":
            raise PositionLost(
                found, remedy="set on_reset to earliest or latest, or delete and set the pipeline"
            )
        _log.warning(
            "%s; reading it from %s",
            found,
            "its beginning" if self._reading.on_reset == "earliest" else "its end",
            extra={"pipeline": self._context.pipeline, "direction": self._context.direction},
        )
        await self._catalog.reset_offset(self._context.pipeline, claim.epoch, 0)
        if self._reading.on_reset == "earliest":
            return 0, []
        position, gaps = await self._end_of(outbox)
        await self._catalog.commit(self._context.pipeline, claim.epoch, position, opened=gaps)
        return position, gaps

    async def _end_of(self, outbox: OutboxDescription) -> tuple[int, list[tuple[int, int]]]:
        """The highest visible id and the holes below, which open transactions may still fill."""
        rows = await self._database.fetch(
            "looking for the end of the outbox",
            "select n.before + 1 as first_id, n.id - 1 as last_id, n.is_last, n.id from ("
            " select o.id, lag(o.id, 1, 0::bigint) over by_id as before,"
            "  lead(o.id) over by_id is null as is_last"
            f" from {outbox.outbox_relation} as o window by_id as (order by o.id)"
            ") as n where n.is_last or n.id > n.before + 1 order by n.id",
        )
        gaps = [
            (row["first_id"], row["last_id"]) for row in rows if row["first_id"] <= row["last_id"]
        ]
        return (rows[-1]["id"] if rows else 0), gaps

    def _swept(self, outbox: OutboxDescription, position: int) -> PositionLost:
        return PositionLost(
            f"the rows {position + 1} to {outbox.swept_through} of {outbox.outbox_table} were"
            f" swept before pipeline {self._context.pipeline} had read all of them",
            remedy="relay_seek to earliest goes on with what is there",
        )


def _now() -> float:
    return asyncio.get_running_loop().time()
