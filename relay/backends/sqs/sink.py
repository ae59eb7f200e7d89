"""The SQS sink: see the package for what it promises.

Up to ten messages go in one ``SendMessageBatch``, as far as the limit of bytes allows, and
``max_in_flight`` calls are in flight at a time. Events without a key share one message group. With
``ordering`` ``strict``, the default, at most one event of a key is in flight, so that none
overtakes another whichever entry of a batch is refused; it costs a hot key one call per event. With
``pipelined`` one call may carry several of a key, and an event behind a refused one may be stored
before it. Of one group at most one call is in flight either way. What a FIFO queue drops as a
repeat, by our dedup key, it does not say: duplicates are not counted. An entry that the queue
refuses by the sender's fault is refused for good, any other is tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Self, cast

import msgspec

from relay.backends.sqs.entry import Entry, check_size, entry_maker
from relay.backends.sqs.errors import of_entry
from relay.backends.sqs.flight import Flight
from relay.backends.sqs.identifier import deduplication_id, escape, group_id
from relay.backends.sqs.options import DEFAULT_GROUP, SqsSinkOptions, target_of
from relay.backends.sqs.queue import Queue, open_queue
from relay.context import BackendContext
from relay.contracts import ALL_ACCEPTED, Failure, PublishResult
from relay.errors import (
    ErrorKind,
    MessageRejected,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.message import RelayMessage
from relay.options import parse_options
from relay.template import compile_routing, compile_template


class _Item(msgspec.Struct, frozen=True, gc=False):
    """A message of a publish, by its index there, as it will be sent."""

    index: int
    entry: Entry
    group: str | None
    dedup_id: str | None


class SqsSink:
    """Sends messages to one queue, several batches at a time."""

    def __init__(self, options: SqsSinkOptions, context: BackendContext) -> None:
        """`from_options` checks what this takes."""
        self._options = options
        self._is_fifo = target_of(options, "sink").is_fifo
        self._render = compile_routing(options.subject_template, options.routing)
        group = options.message_group_id or (DEFAULT_GROUP if self._is_fifo else None)
        self._group_of = None if group is None else compile_template(group, escape=escape)
        self._make_entry = entry_maker(options.format, namespace=context.dedup_namespace)
        self._is_strict = context.ordering != "pipelined"
        self._queue: Queue | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``sink`` object. Raises `ConfigurationError`; does no I/O."""
        return cls(parse_options(options, SqsSinkOptions, path="sink"), context)

    async def connect(self) -> None:
        """Reconnect, and learn the queue's limit for one message where it says."""
        await self.aclose()
        self._queue = await open_queue(self._options, path="sink")

    async def describe(self) -> dict[str, str]:
        """The queue and what it keeps."""
        queue = self._open()
        return {
            "server": queue.target.host,
            "queue": queue.name,
            "order": "kept within a message group" if self._is_fifo else "not kept",
            "deduplication": "5 minutes" if self._is_fifo else "none",
            "largest message": f"{queue.message_bytes} bytes",
        }

    def subject_of(self, message: RelayMessage) -> str:
        """The subject by template or routing, which the message bears in its metadata."""
        return self._render(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Send all; see the package for order and for what counts as accepted.

        Sending stops at the first failure that is not a message's own; what was not sent fails for
        the same reason. Raises `Outage` where no call was answered.
        """
        queue = self._open()
        errors: dict[int, RelayError] = {}
        items = self._items(messages, errors, queue)
        flight = Flight(
            [item.group if self._is_fifo else None for item in items],
            [item.entry.size for item in items],
            keys=[messages[item.index].key if self._is_strict else None for item in items],
            batch_bytes=queue.batch_bytes,
        )
        await self._fly(queue, flight, items)
        errors.update((items[number].index, error) for number, error in flight.errors.items())
        if not errors:
            return ALL_ACCEPTED
        first = next(iter(flight.errors.values()), None)
        if isinstance(first, NotConnected | TimedOut) and len(flight.errors) == len(messages):
            raise first
        unsent = {items[number].index for number in flight.unsent}
        return PublishResult(
            failures=[
                Failure(index, errors[index], was_sent=index not in unsent)
                for index in sorted(errors)
            ]
        )

    async def is_healthy(self) -> bool:
        """True when the queue answers within seconds."""
        queue = self._queue
        return queue is not None and await queue.is_healthy()

    async def aclose(self) -> None:
        """Close the connections."""
        queue, self._queue = self._queue, None
        if queue is not None:
            await queue.aclose()

    def _open(self) -> Queue:
        if self._queue is None:
            raise NotConnected("the sqs sink is not connected")
        return self._queue

    def _items(
        self, messages: Sequence[RelayMessage], errors: dict[int, RelayError], queue: Queue
    ) -> list[_Item]:
        """What can be sent; what can't fails at once."""
        limit, whose = queue.message_bytes, "the queue allows"
        if self._options.max_message_bytes is not None and self._options.max_message_bytes < limit:
            limit, whose = self._options.max_message_bytes, "sink.max_message_bytes allows"
        items: list[_Item] = []
        for index, message in enumerate(messages):
            try:
                entry = check_size(self._make_entry(message), limit, whose)
                group = None if self._group_of is None else group_id(self._group_of(message))
                dedup_id = deduplication_id(message.dedup_key) if self._is_fifo else None
            except MessageRejected as error:
                errors[index] = error
            else:
                items.append(_Item(index, entry, group, dedup_id))
        return items

    async def _fly(self, queue: Queue, flight: Flight, items: Sequence[_Item]) -> None:
        """Send batch after batch, so many at a time, until nothing more may be sent."""
        in_flight: dict[asyncio.Task[dict[int, RelayError]], list[int]] = {}
        try:
            while True:
                while len(in_flight) < self._options.max_in_flight and (batch := flight.take()):
                    sending = asyncio.create_task(self._send(queue, items, batch))
                    in_flight[sending] = batch
                if not in_flight:
                    break
                settled, _ = await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
                for sent in settled:
                    flight.settle(in_flight.pop(sent), sent.result())
        finally:
            for sending in in_flight:
                sending.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)
        flight.fail_unsent()

    async def _send(
        self, queue: Queue, items: Sequence[_Item], batch: Sequence[int]
    ) -> dict[int, RelayError]:
        """Send one batch; those that failed. One refused as a whole is halved until it is clear
        for which of its messages."""
        try:
            answer = await queue.send([_as_entry(number, items[number]) for number in batch])
        except MessageRejected as error:
            if len(batch) == 1:
                return {batch[0]: error}
        except RelayError as error:
            return dict.fromkeys(batch, error)
        else:
            return _failed(answer, batch, f"sending to the queue {queue.name}")
        half = len(batch) // 2
        errors = await self._send(queue, items, batch[:half])
        stop = next((one for one in errors.values() if one.kind is not ErrorKind.MESSAGE), None)
        if stop is not None:
            return {**errors, **dict.fromkeys(batch[half:], stop)}
        return {**errors, **await self._send(queue, items, batch[half:])}


def _as_entry(number: int, item: _Item) -> Mapping[str, object]:
    entry: dict[str, object] = {
        "Id": str(number),
        "MessageBody": item.entry.body,
        "MessageAttributes": item.entry.attributes,
    }
    if item.group is not None:
        entry["MessageGroupId"] = item.group
    if item.dedup_id is not None:
        entry["MessageDeduplicationId"] = item.dedup_id
    return entry


def _failed(
    answer: Mapping[str, object], batch: Sequence[int], doing: str
) -> dict[int, RelayError]:
    """What the answer says of each message that was not accepted; silence is no acceptance."""
    accepted = {
        str(one.get("Id"))
        for one in cast("Sequence[Mapping[str, object]]", answer.get("Successful", ()))
    }
    refused = {
        str(one.get("Id")): one
        for one in cast("Sequence[Mapping[str, object]]", answer.get("Failed", ()))
    }
    errors: dict[int, RelayError] = {}
    silent = Outage(f"{doing}: the answer does not say what became of every message")
    for number in batch:
        if str(number) in refused:
            errors[number] = of_entry(refused[str(number)], doing)
        elif str(number) not in accepted:
            errors[number] = silent
    return errors
