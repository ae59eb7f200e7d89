"""The NATS JetStream source: see the package for what it promises."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Self

import msgspec
from msgspec import structs
from nats.aio.subscription import Subscription
from nats.js.api import ConsumerConfig, ConsumerInfo, DeliverPolicy, SequenceInfo, StreamInfo

from relay import wire
from relay.backends.nats import headers as wire_headers
from relay.backends.nats.connection import Connection, Received, connect, standing
from relay.backends.nats.errors import mapped
from relay.backends.nats.options import NatsSourceOptions, check_name, durable_for, servers_of
from relay.context import BackendContext
from relay.contracts import Batch, Rejected, sorted_out
from relay.errors import (
    ConfigurationError,
    DestinationMissing,
    MessageRejected,
    MessageUndecodable,
    NotConnected,
    Outage,
    PositionLost,
    RelayError,
    TimedOut,
)
from relay.escape import headers_from
from relay.message import RelayMessage
from relay.options import parse_options

POLL_WAIT_S = 1.0

_ANSWER_TIMEOUT_S = 5.0
# JetStream allows so many unacknowledged messages by default.
_DEFAULT_ACK_PENDING = 1000
# So many messages of the stream, ours and others' in between, are nacked one by one.
_WIDEST_RECLAIM = 200_000
# How much later than said the server may notice that the time of a message has run out.
_EXPIRY_MARGIN_S = 1.0
_CHUNK_MESSAGES = 4096

_ACK = b"+ACK"
_NAK = b"-NAK"
# Takes a message off the server's redelivery queue until the time is over, in ns. A message that is
# on the queue already keeps its place at a nack without a delay.
_UNQUEUE = b'-NAK {"delay": 1000000000}'
_PROGRESS = b"+WPI"

_NO_RESPONDERS = "503"
_MARKER = wire.TITLE.format.lower()


class _Position(msgspec.Struct, frozen=True):
    """Stream sequences handed out together, and over which connection."""

    connection: Connection
    sequences: tuple[int, ...]


class _Settling(msgspec.Struct):
    """Answers to deliveries, and how many of them the server has not confirmed yet."""

    left: int
    is_over: asyncio.Event = msgspec.field(default_factory=asyncio.Event)
    is_consumer_gone: bool = False


class NatsSource:
    """Reads a durable pull consumer of JetStream and acknowledges when asked to."""

    def __init__(self, options: NatsSourceOptions, context: BackendContext) -> None:
        """`from_options` checks what this takes."""
        self._options = options
        self._durable = options.durable_name or durable_for(context.pipeline)
        self._batch_size = context.batch_size
        self._batch_bytes = context.batch_bytes
        self._name = f"pgtrickle-relay {context.pipeline}"
        self._connection: Connection | None = None
        self._stream = ""
        self._stream_epoch = 0
        # By the reply subject that the answers of one go share.
        self._settling: dict[str, _Settling] = {}
        self._confirmations = ""
        self._count_settled = 0
        # What requests are answered to, and how many messages those still are to bring.
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._expected = 0
        self._request_ends_s = 0.0
        self._is_next_single = False
        # How many of the messages that were nacked have not come again.
        self._redeliveries = 0
        # By the monotonic clock, before when nothing is asked for.
        self._pull_from_s = 0.0
        # With their stream sequence.
        self._buffer: deque[tuple[int, Received]] = deque()
        # By stream sequence, everything unacknowledged here, with its newest reply subject.
        self._held: dict[int, str] = {}
        self._failure: RelayError | None = None
        self._wake = asyncio.Event()
        self._is_interrupted = False

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``source`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, NatsSourceOptions, path="source")
        servers_of(parsed.url, "source")
        if parsed.stream is not None:
            check_name(parsed.stream, "source.stream")
        if parsed.durable_name is not None:
            check_name(parsed.durable_name, "source.durable_name")
        if parsed.max_deliver == 0:
            raise ConfigurationError(
                "source.max_deliver must be positive", remedy="or -1 for no limit"
            )
        return cls(parsed, context)

    @property
    def keep_alive_interval_s(self) -> float | None:
        """A third of the time after which the server would deliver again."""
        return self._options.ack_wait_seconds / 3

    async def connect(self) -> None:
        """Open; find the stream, find or make the consumer, nack what is unacknowledged.

        Raises `DestinationMissing` without a stream, and `ConfigurationError` where the consumer
        exists but is not what the keys say.
        """
        await self.aclose()
        connection = await connect(self._options, name=self._name, path="source")
        try:
            self._confirmations = connection.client.new_inbox()
            await connection.subscribe(f"{self._confirmations}.*", self._on_confirmation)
            stream = await self._find_stream(connection)
            self._stream = stream.config.name or ""
            created = stream.created or datetime.fromtimestamp(0, UTC)
            self._stream_epoch = int(created.timestamp() * 1_000_000)
            consumer = await self._find_consumer(connection)
            connection.on_trouble = self._wake.set
            await self._reclaim(connection, consumer)
        except BaseException:
            await connection.aclose()
            raise
        self._failure = None
        self._connection = connection

    async def poll(self) -> Batch:
        """What has arrived, at most a batch; waits up to a second for the first message.

        The next messages are already asked for when it returns.
        """
        deadline = time.monotonic() + POLL_WAIT_S
        while True:
            connection = self._open()
            await self._pull_ahead(connection)
            left_s = deadline - time.monotonic()
            if self._buffer or self._is_interrupted or left_s <= 0:
                break
            self._wake.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
            except TimeoutError:
                overdue_s = time.monotonic() - self._request_ends_s
                if self._expected and overdue_s > _ANSWER_TIMEOUT_S:
                    connection.abort(TimedOut(f"{connection.address} does not answer our requests"))
        was_cut_short, self._is_interrupted = self._is_interrupted, False
        batch = self._batch(connection, was_cut_short=was_cut_short)
        await self._pull_ahead(connection)
        return batch

    def interrupt(self) -> None:
        """Make the waiting poll, or the next one, return at once."""
        self._is_interrupted = True
        self._wake.set()

    async def acknowledge(self, batch: Batch) -> None:
        """Acknowledge every message of the batch and wait until the server confirms each."""
        connection, position = self._open(), batch.position
        if isinstance(position, _Position) and position.connection is not connection:
            raise NotConnected("this batch was handed out before the source was opened again")
        sequences = self._sequences(batch)
        await self._settle(connection, [self._held[one] for one in sequences], _ACK)
        for sequence in sequences:
            self._held.pop(sequence, None)

    async def keep_alive(self, batch: Batch) -> None:
        """Restart the server's clock for this batch and for what is waiting to be polled."""
        connection = self._open()
        waiting = (sequence for sequence, _ in self._buffer)
        replies = [self._held[one] for one in (*self._sequences(batch), *waiting)]
        lines = (_published(reply, _PROGRESS) for reply in replies)
        await connection.send(lines, timeout_s=_ANSWER_TIMEOUT_S)

    async def reject(self, batch: Batch) -> None:
        """Nack this batch and whatever else we hold, so that the order stays.

        The server delivers again in the order of the nacks, and the loop rejects the last of its
        batches first. To acknowledge or reject another batch afterwards does nothing more.
        """
        connection = self._open()
        if self._sequences(batch):
            await self._release(connection)

    async def lag(self) -> int | None:
        """What the consumer has not delivered yet, and what is not acknowledged."""
        consumer = await self._consumer_info(self._open())
        if consumer is None:
            return None
        return (consumer.num_pending or 0) + (consumer.num_ack_pending or 0)

    async def is_healthy(self) -> bool:
        """True when the server answers a ping within seconds."""
        connection = self._connection
        return connection is not None and await connection.is_healthy()

    async def aclose(self) -> None:
        """Nack everything that is not acknowledged, and close."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            # What can't be nacked now is nacked on the next connection.
            with contextlib.suppress(RelayError):
                await self._release(connection)
        finally:
            await connection.aclose()
            self._subscription = None
            self._buffer.clear()
            self._held.clear()

    def _sequences(self, batch: Batch) -> list[int]:
        """What of a batch is still ours to answer for."""
        position = batch.position
        if not isinstance(position, _Position) or position.connection is not self._connection:
            return []
        return [sequence for sequence in position.sequences if sequence in self._held]

    def _open(self) -> Connection:
        if self._failure is not None:
            raise self._failure
        return standing(self._connection)

    async def _find_stream(self, connection: Connection) -> StreamInfo:
        options = self._options
        if options.stream is not None:
            try:
                return await connection.stream_info(options.stream)
            except DestinationMissing:
                raise DestinationMissing(
                    f"there is no stream {options.stream!r} on {connection.address}",
                    remedy="create it, or correct source.stream",
                ) from None
        await connection.ask(connection.manager.account_info(), "looking for JetStream")
        found = await connection.streams_on(options.subject)
        if not found:
            raise DestinationMissing(
                f"no stream stores the subject {options.subject!r}",
                remedy="create one, or correct source.subject",
            )
        if len(found) > 1:
            names = ", ".join(str(stream.config.name) for stream in found)
            raise ConfigurationError(
                f"several streams store the subject {options.subject!r}: {names}",
                remedy="choose one with source.stream",
            )
        return found[0]

    async def _find_consumer(self, connection: Connection) -> ConsumerInfo:
        options = self._options
        found = await self._consumer_info(connection)
        if found is None:
            wanted = ConsumerConfig(
                durable_name=self._durable,
                ack_wait=options.ack_wait_seconds,
                deliver_policy=DeliverPolicy(options.deliver_policy),
                filter_subject=options.subject,
                max_deliver=options.max_deliver,
                max_ack_pending=max(_DEFAULT_ACK_PENDING, 4 * self._batch_size),
            )
            creating = connection.manager.add_consumer(self._stream, wanted)
            return await connection.ask(creating, f"creating the consumer {self._durable!r}")
        if differences := _differences(found.config, options):
            raise ConfigurationError(
                f"the consumer {self._durable!r} of stream {self._stream!r} exists with"
                f" {'; '.join(differences)}",
                remedy="choose another durable_name, correct the keys, or delete the consumer",
            )
        return found

    async def _consumer_info(self, connection: Connection) -> ConsumerInfo | None:
        """How far the consumer is, None where there is none."""
        asking = connection.manager.consumer_info(self._stream, self._durable)
        doing = f"looking for the consumer {self._durable!r}"
        try:
            found: ConsumerInfo = await connection.ask(asking, doing)
        except DestinationMissing:
            return None
        return found

    async def _reclaim(self, connection: Connection, consumer: ConsumerInfo) -> None:
        """Have everything unacknowledged delivered again now, in order and before what is new.

        Otherwise the server would sit out ``ack_wait`` on what a lost connection or a killed
        process held, and deliver later messages first. The pipeline is ours alone, so nobody else
        works on them. The server ignores answers to what is not pending.
        """
        self._pull_from_s = 0.0
        self._redeliveries = consumer.num_ack_pending or 0
        if not self._redeliveries:
            return
        replies = self._replies_to_all(consumer)
        if replies is None:
            # Once its time has run out the server delivers it by itself, in order, if nothing new
            # was asked for until then.
            wait_s = self._options.ack_wait_seconds + _EXPIRY_MARGIN_S
            self._pull_from_s = time.monotonic() + wait_s
        else:
            await self._settle(connection, replies, _UNQUEUE, _NAK)

    def _replies_to_all(self, consumer: ConsumerInfo) -> Sequence[str] | None:
        """Where to answer all unacknowledged deliveries; None where they lie too far apart."""
        nothing = SequenceInfo(0, 0)
        delivered, settled = consumer.delivered or nothing, consumer.ack_floor or nothing
        first, last = settled.stream_seq + 1, delivered.stream_seq
        if last - first >= _WIDEST_RECLAIM:
            return None
        head = f"$JS.ACK.{self._stream}.{self._durable}.1."
        tail = f".{delivered.consumer_seq}.0.0"
        return [f"{head}{sequence}{tail}" for sequence in range(first, last + 1)]

    async def _pull_ahead(self, connection: Connection) -> None:
        """Keep about a batch asked for beyond what is waiting.

        One subscription for all requests, so that nothing overtakes on its way to us.
        """
        if time.monotonic() < self._pull_from_s:
            return
        if self._subscription is None:
            self._inbox, self._expected = f"{connection.client.new_inbox()}.", 0
            self._subscription = await connection.subscribe(f"{self._inbox}*", self._on_message)
        if len(self._buffer) + self._expected > self._batch_size // 2:
            return
        wanted = 1 if self._is_next_single else self._batch_size
        if self._redeliveries:
            # The server puts a redelivery that max_bytes leaves no room for behind all others. They
            # were in memory together once, so no more than them is asked for, whatever their size.
            wanted = min(self._batch_size, self._redeliveries - self._expected)
            if wanted <= 0:
                return
        request = {"batch": wanted, "expires": int(POLL_WAIT_S * 10**9)}
        if not (self._is_next_single or self._redeliveries):
            request["max_bytes"] = max(self._batch_bytes, 2 * connection.client.max_payload)
        self._is_next_single = False
        self._expected += wanted
        self._request_ends_s = time.monotonic() + POLL_WAIT_S
        # Behind the subscription, and with the number that the server may say it was left with.
        with mapped("asking for messages"):
            await connection.client.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._durable}",
                msgspec.json.encode(request),
                reply=f"{self._inbox}{wanted}",
            )

    async def _release(self, connection: Connection) -> None:
        """Nack all that we hold, in order; nothing more is delivered to us."""
        subscription, self._subscription = self._subscription, None
        consumer = None
        if subscription is not None:
            draining = subscription.drain()  # type: ignore[no-untyped-call]  # so in the library
            await connection.ask(draining, "ending requests")
            # The server looks for requests that nobody waits for when it is asked about the
            # consumer. Left there, the first message would be tried on one and end up last.
            consumer = await self._consumer_info(connection)
        replies: Sequence[str] = [self._held[sequence] for sequence in sorted(self._held)]
        # What is nacked may be here again before all nacks are confirmed.
        self._held.clear()
        self._buffer.clear()
        if consumer is not None:
            self._redeliveries = consumer.num_ack_pending or 0
            if self._redeliveries > len(replies):
                # Something was on its way to the subscription when it ended.
                replies = self._replies_to_all(consumer) or replies
        await self._settle(connection, replies, _UNQUEUE, _NAK)

    async def _on_message(self, message: Received) -> None:
        if not message.reply.startswith("$JS.ACK."):
            self._on_status(message)
            return
        self._expected = max(0, self._expected - 1)
        sequence, _ = _place_of(message.reply)
        is_copy = sequence in self._held
        self._held[sequence] = message.reply
        if not is_copy:
            self._redeliveries = max(0, self._redeliveries - 1)
            self._buffer.append((sequence, message))
            self._wake.set()

    def _on_status(self, message: Received) -> None:
        """The server ends a request: nothing came in time, or it can't go on."""
        headers = message.headers or {}
        code, text = headers.get("Status"), headers.get("Description", "")
        if code is None or not message.subject.startswith(self._inbox):
            return
        unanswered = headers.get("Nats-Pending-Messages", str(self._expected))
        self._expected = max(0, self._expected - int(unanswered))
        if code == _NO_RESPONDERS:
            self._failure = Outage(f"nobody answers for the consumer {self._durable!r}")
        elif "MaxBytes" in text:
            # Not even one message fits: the next one comes by itself, however large it is.
            self._is_next_single = message.subject == f"{self._inbox}{unanswered}"
        elif "Consumer Deleted" in text:
            self._failure = self._consumer_gone()
        elif code == "409" and "Batch Completed" not in text:
            self._failure = Outage(f"the server ended our request: {text}")
        elif code == "400":
            self._failure = ConfigurationError(f"the server refuses our request: {text}")
        self._wake.set()

    def _batch(self, connection: Connection, *, was_cut_short: bool) -> Batch:
        taken: list[tuple[int, Received]] = []
        size = 0
        while self._buffer and len(taken) < self._batch_size and size < self._batch_bytes:
            taken.append(self._buffer.popleft())
            size += len(taken[-1][1].data)
        if not taken:
            is_answered = time.monotonic() >= self._pull_from_s + POLL_WAIT_S
            return Batch(is_end_of_backlog=is_answered and not was_cut_short)
        messages, rejected = sorted_out(itertools.starmap(self._decoded, taken))
        last, arrived_last = taken[-1]
        return Batch(
            messages=messages,
            rejected=rejected,
            position=_Position(connection, tuple(sequence for sequence, _ in taken)),
            checkpoint=f"{self._stream}:{last}",
            is_end_of_backlog=_place_of(arrived_last.reply)[1] and not self._buffer,
        )

    def _decoded(self, sequence: int, arrived: Received) -> RelayMessage | Rejected:
        headers = arrived.headers or {}
        error: MessageRejected | None = None
        try:
            if _MARKER in map(str.lower, headers):
                # As our own sink sent it, unless it only looks so.
                own = {name: text for name, text in headers.items() if name[:5].lower() != "nats-"}
                restored = wire.restore(arrived.data, headers_from(own), wire.TITLE)
                if restored is not None:
                    subject = restored.subject or arrived.subject
                    return structs.replace(restored, token=arrived.reply, subject=subject)
            if not wire.is_json(arrived.data):
                error = MessageUndecodable(f"the message on {arrived.subject!r} is not JSON")
        except MessageRejected as reason:
            error = reason
        default_key = f"nats:{self._stream}:{self._stream_epoch}:{sequence}"
        plain = RelayMessage(
            dedup_key=headers.get(wire_headers.MESSAGE_ID) or default_key,
            payload=arrived.data,
            subject=arrived.subject,
            headers=headers,
            token=arrived.reply,
        )
        return plain if error is None else Rejected(plain, error)

    async def _settle(
        self, connection: Connection, replies: Sequence[str], *answers: bytes
    ) -> None:
        """Answer each delivery and wait until the server confirms all. Raises `Outage`."""
        for start in range(0, len(replies), _CHUNK_MESSAGES):
            chunk = replies[start : start + _CHUNK_MESSAGES]
            self._count_settled += 1
            shared = f"{self._confirmations}.{self._count_settled}"
            settling = self._settling[shared] = _Settling(left=len(chunk) * len(answers))
            try:
                lines = (_published(one, body, shared) for one in chunk for body in answers)
                await connection.send(lines, timeout_s=_ANSWER_TIMEOUT_S)
                await connection.ask(settling.is_over.wait(), "acknowledging")
            finally:
                del self._settling[shared]
            if settling.is_consumer_gone:
                raise self._consumer_gone()

    def _consumer_gone(self) -> PositionLost:
        return PositionLost(
            f"the consumer {self._durable!r} of stream {self._stream!r} was deleted while in use",
            remedy="it is made again on the next start and begins where deliver_policy says",
        )

    async def _on_confirmation(self, confirmation: Received) -> None:
        settling = self._settling.get(confirmation.subject)
        if settling is not None:
            settling.left -= 1
            if (confirmation.headers or {}).get("Status") == _NO_RESPONDERS:
                settling.is_consumer_gone = True
            if not settling.left:
                settling.is_over.set()


def _published(subject: str, body: bytes, reply: str = "") -> bytes:
    return b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), len(body), body)


def _place_of(reply: str) -> tuple[int, bool]:
    """The stream sequence in an acknowledgement subject, and whether the server had no more then.

    https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-15.md
    """
    tokens = reply.split(".")
    # With the names of domain and account, or without.
    at = 5 if len(tokens) == 9 else 7
    return int(tokens[at]), tokens[at + 3] == "0"


def _differences(found: ConsumerConfig, wanted: NatsSourceOptions) -> list[str]:
    """What of an existing consumer contradicts the keys, in words."""
    filters = found.filter_subjects or [found.filter_subject or ">"]
    compared = (
        ("subject", ", ".join(filters), wanted.subject),
        ("ack policy", found.ack_policy, "explicit"),
        ("deliver_policy", found.deliver_policy, wanted.deliver_policy),
        ("ack_wait_seconds", f"{found.ack_wait or 0:g}", f"{wanted.ack_wait_seconds:g}"),
        ("max_deliver", str(found.max_deliver or -1), str(wanted.max_deliver)),
    )
    differences = ["push delivery, not pull"] if found.deliver_subject else []
    return differences + [
        f"{name} {here}, not {there}" for name, here, there in compared if here != there
    ]
