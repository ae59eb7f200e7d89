"""The outbox as a source of one worker of a consumer group.

Guarantees. Loss: what is leased is delivered again until it is settled, to this worker or, when its
lease has run out, to any. Order: none across workers; what one worker is given is in id order.
Sharing: a row is with one worker at a time. A worker that is slower than its lease, or was stopped
for longer, has lost it: nothing of it is settled, and the rows go to others with the same keys.

Each poll of the group gives a lease with a token of its own; the rows of one lease may make several
batches. A batch settles what its own token leased, up to its last row, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Final
from uuid import UUID, uuid4

import msgspec

from relay.backends.outbox.options import OutboxSourceOptions
from relay.backends.outbox.reader import RowFetcher
from relay.backends.outbox.reading import (
    CLOSE_TIMEOUT_S,
    OutboxReading,
    Unpacker,
    Watch,
    answers,
    batch_of,
    outbox_of,
)
from relay.context import BackendContext
from relay.contracts import Batch
from relay.errors import LeaseLost, NotConnected, Outage, RelayError

HEARTBEAT_S: Final = 10.0

_log = logging.getLogger(__name__)


class _Token(msgspec.Struct, frozen=True, kw_only=True):
    """Settles the rows of a lease up to ``through_id``; a page in the middle of a row has none."""

    lease_token: UUID
    through_id: int | None = None
    is_last: bool = False
    consumed_claim_check: int | None = None


class _Lease(msgspec.Struct, kw_only=True):
    """Rows that are ours for a while, handed out up to ``position``."""

    token: UUID
    ids: Sequence[int]
    position: int


class _Session(msgspec.Struct, kw_only=True, frozen=True):
    """What `connect` found, until the next one."""

    outbox_table: str
    fetcher: RowFetcher
    unpacker: Unpacker


class GroupSource:
    """One consumer of a group; it is called like the worker."""

    def __init__(
        self,
        options: OutboxSourceOptions,
        group: str,
        reading: OutboxReading,
        context: BackendContext,
    ) -> None:
        self._options = options
        self._group = group
        self._reading = reading
        self._context = context
        self._database = context.database
        self._catalog = context.catalog
        self._consumer = context.worker_id
        self._watch = Watch(context)
        self._session: _Session | None = None
        # Asked for, and neither settled nor released; the one that has rows which no batch has.
        self._held: set[UUID] = set()
        self._lease: _Lease | None = None
        self._is_behind = False
        self._is_settled = False

    @property
    def keep_alive_interval_s(self) -> float | None:
        """Half of the lease. Extending is a heartbeat too, so not longer than between two."""
        return min(self._reading.visibility_seconds / 2, HEARTBEAT_S)

    async def connect(self) -> None:
        """Join the group, and check that reading can lose nothing.

        What is still held from before is released. Raises `OutboxUnsafe`, `ConfigurationError`,
        `Outage`.
        """
        await self._end_session()
        outbox = await outbox_of(self._context, self._options)
        was_reset = await self._catalog.join_group(
            self._group,
            self._context.pipeline,
            outbox.outbox_table,
            self._consumer,
            self._reading.on_reset,
        )
        if was_reset:
            _log.warning(
                "consumer group %s stood beyond its outbox, which was recreated or restored;"
                " reading it from %s",
                self._group,
                "its beginning" if self._reading.on_reset == "earliest" else "its end",
                extra={"pipeline": self._context.pipeline, "direction": self._context.direction},
            )
        self._session = _Session(
            outbox_table=outbox.outbox_table,
            fetcher=RowFetcher(outbox, self._context.batch_size, self._context.batch_bytes),
            unpacker=Unpacker(self._context, self._reading, outbox),
        )
        self._watch.begin(outbox.outbox_table)

    async def poll(self) -> Batch:
        """The next rows of the lease in hand, or of a new one; or the next page of a claim check.

        It is the end of the backlog when no other worker of the group has a row in hand either.
        Raises `NotConnected` before `connect`, `OutboxUnsafe`, `Outage`.
        """
        session = self._session
        if session is None:
            raise NotConnected("the outbox source is not connected")
        batch = await self._watch.first(lambda: self._next(session), lambda: self._is_behind)
        return Batch(is_end_of_backlog=self._is_settled) if batch is None else batch

    def interrupt(self) -> None:
        """End the wait of a poll, this one or the next."""
        self._watch.interrupt()

    async def acknowledge(self, batch: Batch) -> None:
        """Settle the rows of this batch. Raises `LeaseLost`, `Outage`."""
        token = batch.position
        if not isinstance(token, _Token) or token.through_id is None:
            return
        session = self._session
        if session is None or token.lease_token not in self._held:
            raise LeaseLost("this batch was handed out before the source was connected again")
        if token.is_last:
            # From here on nothing is left to be kept alive.
            self._held.discard(token.lease_token)
        try:
            await self._catalog.settle_lease(
                self._group, self._consumer, token.lease_token, token.through_id
            )
        except (Outage, asyncio.CancelledError):
            self._held.add(token.lease_token)
            raise
        self._debug("settled", token.lease_token, str(token.through_id))
        if token.consumed_claim_check is not None:
            await self._catalog.rows_consumed(session.outbox_table, token.consumed_claim_check)

    async def keep_alive(self, batch: Batch) -> None:
        """Extend the lease of this batch. Raises `LeaseLost`, `Outage`."""
        token = batch.position
        if not isinstance(token, _Token) or token.lease_token not in self._held:
            return
        try:
            await self._catalog.extend_lease(
                self._group, self._consumer, token.lease_token, self._reading.visibility_seconds
            )
        except LeaseLost:
            # It may have been settled meanwhile.
            if token.lease_token in self._held:
                raise

    async def reject(self, batch: Batch) -> None:
        """Give the rest of this batch's lease to whoever polls next. Raises `Outage`."""
        if isinstance(batch.position, _Token):
            await self._release(batch.position.lease_token)

    async def is_healthy(self) -> bool:
        """True when connected and the database answers."""
        return self._session is not None and await answers(self._database)

    async def aclose(self) -> None:
        """Release what is held and leave the group; what can't be released runs out."""
        with contextlib.suppress(RelayError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._end_session()
                await self._catalog.leave_group(self._group, self._consumer)

    async def _next(self, session: _Session) -> Batch | None:
        """What there is now, without waiting; None for nothing."""
        lease = self._lease or await self._take()
        if lease is None:
            return None
        unpacker, fetcher = session.unpacker, session.fetcher
        if unpacker.claim_check_id is not None:
            return await self._next_page(unpacker, lease)
        async with self._database.connection("reading the outbox") as connection:
            read = await fetcher.fetch(connection, fetcher.above_of_ids, lease.position, lease.ids)
        decoded = await unpacker.unpack(read.rows)
        if decoded.claim_check is not None:
            return await self._next_page(unpacker, lease)
        # Without rows: somebody deleted what was left.
        through_id = read.rows.ids[decoded.rows - 1] if read.rows.ids else lease.ids[-1]
        return batch_of(decoded, self._through(lease, through_id), str(through_id))

    async def _next_page(self, unpacker: Unpacker, lease: _Lease) -> Batch | None:
        outbox_id = unpacker.claim_check_id
        page = await unpacker.next_page()
        if page is None or outbox_id is None:
            return None
        if not page.is_last:
            return batch_of(page, _Token(lease_token=lease.token))
        through = self._through(lease, outbox_id, consumed_claim_check=outbox_id)
        return batch_of(page, through, str(outbox_id))

    def _through(
        self, lease: _Lease, id_: int, *, consumed_claim_check: int | None = None
    ) -> _Token:
        lease.position = id_
        is_last = id_ >= lease.ids[-1]
        if is_last:
            self._lease = None
        return _Token(
            lease_token=lease.token,
            through_id=id_,
            is_last=is_last,
            consumed_claim_check=consumed_claim_check,
        )

    async def _take(self) -> _Lease | None:
        """Lease the next rows. The token is ours, so that it is known whatever becomes of this."""
        token = uuid4()
        self._held.add(token)
        taken = await self._catalog.lease(
            self._group,
            self._consumer,
            token,
            max_messages=self._context.batch_size,
            max_bytes=self._context.batch_bytes,
            seconds=self._reading.visibility_seconds,
        )
        self._is_settled = taken.is_settled
        self._is_behind = len(taken.outbox_ids) >= self._context.batch_size
        if not taken.outbox_ids:
            self._held.discard(token)
            return None
        if _log.isEnabledFor(logging.DEBUG):
            self._debug("leased", token, ",".join(_ranges(taken.outbox_ids)))
        self._lease = _Lease(token=token, ids=taken.outbox_ids, position=taken.outbox_ids[0] - 1)
        return self._lease

    async def _release(self, token: UUID) -> None:
        if self._lease is not None and self._lease.token == token:
            self._lease = None
            if self._session is not None:
                self._session.unpacker.forget_claim_check()
        if token in self._held:
            await self._catalog.release_lease(self._group, token)
            self._held.discard(token)

    def _debug(self, message: str, token: UUID, checkpoint: str) -> None:
        fields = {
            "pipeline": self._context.pipeline,
            "direction": self._context.direction,
            "batch": str(token),
            "checkpoint": checkpoint,
        }
        _log.debug(message, extra=fields)

    async def _end_session(self) -> None:
        """Forget everything and release what is held. Raises `Outage`."""
        self._session = None
        for token in tuple(self._held):
            await self._release(token)
        self._lease = None
        await self._watch.end()


def _ranges(ids: Sequence[int]) -> Iterator[str]:
    """The ids in ascending order, those that follow each other as ``first-last``."""
    for _, run in itertools.groupby(enumerate(ids), lambda entry: entry[1] - entry[0]):
        found = [id_ for _, id_ in run]
        yield str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"
