"""The NATS JetStream source: see the package for what it promises."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Self

import msgspec
from msgspec import structs

from relay import wire
from relay.backends.nats import headers as wire_headers
from relay.backends.nats import jetstream
from relay.backends.nats.connection import Connection, connect
from relay.backends.nats.errors import consumer_gone, of_server_text
from relay.backends.nats.jetstream import ConsumerConfig, StreamInfo
from relay.backends.nats.options import (
    NatsSourceOptions,
    check_connection,
    check_name,
    durable_for,
)
from relay.context import BackendContext
from relay.contracts import Batch, Rejected
from relay.errors import (
    ConfigurationError,
    DestinationMissing,
    MessageRejected,
    MessageUndecodable,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.message import RelayMessage
from relay.options import parse_options

POLL_WAIT_S = 1.0

_ANSWER_TIMEOUT_S = 5.0
# JetStream allows so many unacknowledged messages by default.
_DEFAULT_ACK_PENDING = 1000
# So many messages of the stream, ours and others' in between, are asked back one by one.
_WIDEST_RECLAIM = 200_000
# How much later than said the server may notice that the time of a message has run out.
_EXPIRY_MARGIN_S = 1.0
_CHUNK_MESSAGES = 500

_ACK = b"+ACK"
_NAK = b"-NAK"
_PROGRESS = b"+WPI"

_NO_RESPONDERS = 503
_CONFLICT = 409
_BAD_REQUEST = 400

_SHORT_REPLY_TOKENS = 9
_MARKER = wire.TITLE.format.lower()


class _Arrived(msgspec.Struct, frozen=True, gc=False):
    """One delivery, undecoded."""

    sequence: int
    subject: bytes
    reply: bytes
    body: bytes
    block: bytes | None


class _Position(msgspec.Struct, frozen=True):
    """Stream sequences handed out together, and since which `connect`."""

    opening: int
    sequences: tuple[int, ...]


class _Slot(msgspec.Struct):
    """An inbox for the answers to one request at a time; ``expected`` is 0 between requests."""

    inbox: str
    subscription: int = 0
    number: int = 0
    asked: int = 0
    expected: int = 0
    ends_at: float = 0.0


class NatsSource:
    """Reads a durable pull consumer of JetStream and acknowledges when told to."""

    def __init__(
        self,
        options: NatsSourceOptions,
        *,
        durable: str,
        batch_size: int,
        batch_bytes: int,
        name: str,
    ) -> None:
        self._options = options
        self._durable = durable
        self._batch_size = batch_size
        self._batch_bytes = batch_bytes
        self._name = name
        self._connection: Connection | None = None
        self._opening = 0
        self._stream = ""
        self._stream_epoch = 0
        self._confirmations = _Confirmations()
        self._confirmation_prefix = ""
        self._slots: tuple[_Slot, ...] | None = None
        self._is_next_single = False
        # By the monotonic clock, before when nothing is asked for.
        self._pull_from_s = 0.0
        self._buffer: deque[_Arrived] = deque()
        # By stream sequence, everything that is buffered or out, with its newest reply subject.
        self._held: dict[int, bytes] = {}
        self._failure: RelayError | None = None
        self._wake = asyncio.Event()
        self._is_interrupted = False

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``source`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, NatsSourceOptions, path="source")
        check_connection(parsed, "source")
        if parsed.stream is not None:
            check_name(parsed.stream, "source.stream")
        if parsed.durable_name is not None:
            check_name(parsed.durable_name, "source.durable_name")
        if parsed.ack_wait_seconds < 1:
            raise ConfigurationError("source.ack_wait_seconds must be at least 1")
        if parsed.max_deliver == 0 or parsed.max_deliver < -1:
            raise ConfigurationError(
                "source.max_deliver must be positive", remedy="or -1 for no limit"
            )
        return cls(
            parsed,
            durable=parsed.durable_name or durable_for(context.pipeline),
            batch_size=context.batch_size,
            batch_bytes=context.batch_bytes,
            name=f"pgtrickle-relay {context.pipeline}",
        )

    @property
    def keep_alive_interval_s(self) -> float | None:
        """A third of the time after which the server would deliver again."""
        return self._options.ack_wait_seconds / 3

    async def connect(self) -> None:
        """Open anew; find the stream, find or make the consumer, ask back what is unacknowledged.

        Raises `DestinationMissing` without a stream, and `ConfigurationError` where the consumer
        exists but is not what the keys say.
        """
        await self._close()
        connection = await connect(self._options, name=self._name, path="source")
        try:
            stream = await self._find_stream(connection)
            self._stream = stream.config.name
            self._stream_epoch = int(stream.created.timestamp() * 1_000_000)
            consumer = await self._find_consumer(connection)
            self._confirmations = _Confirmations()
            self._confirmation_prefix = f"{connection.new_inbox()}."
            connection.listen(f"{self._confirmation_prefix}*", self._confirmations.on_reply)
            await connection.flush()
            if connection.denied:
                raise of_server_text(connection.denied[-1], "receiving from NATS")
            connection.on_trouble = self._on_trouble
            await self._reclaim(connection, consumer)
        except BaseException:
            await connection.aclose()
            raise
        self._failure = None
        self._opening += 1
        self._connection = connection

    async def poll(self) -> Batch:
        """What has arrived, at most a batch; waits up to a second for the first message.

        The next messages are already asked for when it returns.
        """
        deadline = time.monotonic() + POLL_WAIT_S
        while True:
            connection = self._open()
            self._pull_ahead(connection)
            left_s = deadline - time.monotonic()
            if self._buffer or self._is_interrupted or left_s <= 0:
                break
            self._wake.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
            except TimeoutError:
                self._check_slots(connection)
        was_cut_short, self._is_interrupted = self._is_interrupted, False
        batch = self._batch(self._taken(), was_cut_short=was_cut_short)
        self._pull_ahead(connection)
        return batch

    def interrupt(self) -> None:
        """Make the waiting poll, or the next one, return at once."""
        self._is_interrupted = True
        self._wake.set()

    async def acknowledge(self, batch: Batch) -> None:
        """Acknowledge every message of the batch and wait until the server confirms each."""
        connection = self._open()
        if not self._is_current(batch):
            raise NotConnected("this batch was handed out before the source was opened anew")
        sequences = self._sequences(batch)
        await self._settle(connection, [self._held[one] for one in sequences], _ACK)
        for sequence in sequences:
            self._held.pop(sequence, None)

    async def keep_alive(self, batch: Batch) -> None:
        """Restart the server's clock for this batch and for what is waiting to be polled."""
        connection = self._open()
        waiting = (arrived.sequence for arrived in self._buffer)
        replies = [self._held[one] for one in (*self._sequences(batch), *waiting)]
        connection.write(b"".join(_published(reply, _PROGRESS) for reply in replies))
        await connection.drain(_ANSWER_TIMEOUT_S)

    async def reject(self, batch: Batch) -> None:
        """Give back this batch and whatever else we hold, so that the order stays.

        The server delivers again in the order in which it is given back, and the loop gives back
        the last of its batches first. Another batch that is out is thereby given back too; to
        acknowledge or reject it does nothing more.
        """
        connection = self._open()
        if not self._sequences(batch):
            return
        await self._stop_pulling(connection)
        self._buffer.clear()
        given_back = sorted(self._held)
        await self._settle(connection, [self._held[one] for one in given_back], _NAK)
        for sequence in given_back:
            del self._held[sequence]

    async def is_healthy(self) -> bool:
        """True when the server answers a ping within seconds."""
        connection = self._connection
        return connection is not None and await connection.is_healthy()

    async def aclose(self) -> None:
        """Give back everything that is not acknowledged, and close."""
        await self._close()
        self._held.clear()

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            if connection.loss is None:
                await self._stop_pulling(connection)
                replies = [self._held[sequence] for sequence in sorted(self._held)]
                await self._settle(connection, replies, _NAK)
                self._held.clear()
        except RelayError:
            # What could not be given back is asked back on the next connection.
            pass
        finally:
            self._buffer.clear()
            self._slots = None
            await connection.aclose()

    def _is_current(self, batch: Batch) -> bool:
        position = batch.position
        return not isinstance(position, _Position) or position.opening == self._opening

    def _sequences(self, batch: Batch) -> list[int]:
        """What of a batch is still ours to answer for."""
        position = batch.position
        if not isinstance(position, _Position) or position.opening != self._opening:
            return []
        return [sequence for sequence in position.sequences if sequence in self._held]

    def _open(self) -> Connection:
        if self._failure is not None:
            raise self._failure
        if self._connection is None:
            raise NotConnected("the nats source is not connected")
        if self._connection.loss is not None:
            raise self._connection.loss
        return self._connection

    async def _find_stream(self, connection: Connection) -> StreamInfo:
        options = self._options
        if options.stream is not None:
            try:
                return await jetstream.stream_info(connection, options.stream)
            except DestinationMissing:
                raise DestinationMissing(
                    f"there is no stream {options.stream!r} on {connection.address}",
                    remedy="create it, or correct source.stream",
                ) from None
        await jetstream.check_enabled(connection)
        found = await jetstream.streams_on(connection, options.subject)
        if not found:
            raise DestinationMissing(
                f"no stream stores the subject {options.subject!r}",
                remedy="create one, or correct source.subject",
            )
        if len(found) > 1:
            names = ", ".join(stream.config.name for stream in found)
            raise ConfigurationError(
                f"several streams store the subject {options.subject!r}: {names}",
                remedy="choose one with source.stream",
            )
        return found[0]

    async def _find_consumer(self, connection: Connection) -> jetstream.ConsumerInfo:
        wanted = ConsumerConfig(
            durable_name=self._durable,
            ack_policy="explicit",
            ack_wait=int(self._options.ack_wait_seconds * jetstream.NANOSECONDS),
            deliver_policy=self._options.deliver_policy,
            filter_subject=self._options.subject,
            max_deliver=self._options.max_deliver,
            max_ack_pending=max(_DEFAULT_ACK_PENDING, 4 * self._batch_size),
            replay_policy="instant",
        )
        found = await jetstream.consumer_info(connection, self._stream, self._durable)
        if found is None:
            return await jetstream.create_consumer(connection, self._stream, wanted)
        differences = _differences(found.config, wanted)
        if differences:
            raise ConfigurationError(
                f"the consumer {self._durable!r} of stream {self._stream!r} exists with"
                f" {'; '.join(differences)}",
                remedy="choose another durable_name, correct the keys, or delete the consumer",
            )
        return found

    async def _reclaim(self, connection: Connection, consumer: jetstream.ConsumerInfo) -> None:
        """Have everything unacknowledged delivered again now, in order and before what is new.

        Otherwise the server would sit out ``ack_wait`` on what a lost connection or a killed
        process held, and deliver later messages first. The pipeline is ours alone, so nobody else
        works on them. The subjects are those of ADR-15
        (https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-15.md); the
        server ignores those that are not pending.
        """
        self._held.clear()
        self._pull_from_s = 0.0
        first, last = consumer.ack_floor.stream_seq + 1, consumer.delivered.stream_seq
        if consumer.num_ack_pending == 0:
            return
        if last - first >= _WIDEST_RECLAIM:
            # Where others fill the stream, what is ours lies far apart. Once its time has run out
            # the server delivers it by itself, in order, if nothing new was asked for until then.
            wait_s = self._options.ack_wait_seconds + _EXPIRY_MARGIN_S
            self._pull_from_s = time.monotonic() + wait_s
            return
        delivery = consumer.delivered.consumer_seq
        replies = [
            f"$JS.ACK.{self._stream}.{self._durable}.1.{sequence}.{delivery}.0.0".encode()
            for sequence in range(first, last + 1)
        ]
        await self._settle(connection, replies, _NAK)

    def _pull_ahead(self, connection: Connection) -> None:
        """Keep about a batch asked for beyond what is waiting, in at most two requests."""
        if time.monotonic() < self._pull_from_s:
            return
        if self._slots is None:
            inbox = connection.new_inbox()
            self._slots = tuple(self._slot(connection, f"{inbox}.{name}") for name in "ab")
        expected = sum(slot.expected for slot in self._slots)
        idle = next((slot for slot in self._slots if not slot.expected), None)
        if idle is None or len(self._buffer) + expected > self._batch_size // 2:
            return
        wanted = 1 if self._is_next_single else self._batch_size
        request = {"batch": wanted, "expires": jetstream.NANOSECONDS}
        if not self._is_next_single:
            request["max_bytes"] = max(self._batch_bytes, 2 * connection.max_payload)
        self._is_next_single = False
        idle.number += 1
        idle.expected = idle.asked = wanted
        idle.ends_at = time.monotonic() + POLL_WAIT_S
        connection.write(
            _published(
                f"{jetstream.API}.CONSUMER.MSG.NEXT.{self._stream}.{self._durable}".encode(),
                msgspec.json.encode(request),
                f"{idle.inbox}.{idle.number}",
            )
        )

    def _slot(self, connection: Connection, inbox: str) -> _Slot:
        slot = _Slot(inbox)
        slot.subscription = connection.listen(f"{inbox}.*", partial(self._on_message, slot))
        return slot

    def _check_slots(self, connection: Connection) -> None:
        """A request that the server should have ended long ago means that nobody is there."""
        overdue = time.monotonic() - _ANSWER_TIMEOUT_S
        if any(slot.expected and slot.ends_at < overdue for slot in self._slots or ()):
            connection.abort(TimedOut(f"{connection.address} does not answer our requests"))

    async def _stop_pulling(self, connection: Connection) -> None:
        """End our requests; when it returns, nothing more is delivered to us."""
        slots, self._slots = self._slots, None
        if slots is None:
            return
        for slot in slots:
            await connection.unlisten(slot.subscription)
        # The server looks for requests that nobody waits for when it is asked about the consumer.
        # Left there, the first message given back would be tried on one and end up last.
        await jetstream.consumer_info(connection, self._stream, self._durable)

    def _on_message(
        self, slot: _Slot, subject: bytes, reply: bytes, body: bytes, block: bytes | None
    ) -> None:
        if not reply.startswith(b"$JS.ACK."):
            self._on_status(slot, subject, block)
            return
        slot.expected = max(0, slot.expected - 1)
        sequence = _sequence_of(reply)
        is_copy = sequence in self._held
        self._held[sequence] = reply
        if not is_copy:
            self._buffer.append(_Arrived(sequence, subject, reply, body, block))
            self._wake.set()

    def _on_status(self, slot: _Slot, subject: bytes, block: bytes | None) -> None:
        """The server ends a request: nothing came in time, or it can't go on."""
        if subject != f"{slot.inbox}.{slot.number}".encode():
            return
        code, text = wire_headers.status(block) or (0, "")
        is_untouched = slot.expected == slot.asked
        slot.expected = 0
        if code == _NO_RESPONDERS:
            self._failure = Outage(f"nobody answers for the consumer {self._durable!r}")
        elif code == _CONFLICT and "MaxBytes" in text:
            self._is_next_single = is_untouched
        elif code == _CONFLICT and "Consumer Deleted" in text:
            self._failure = consumer_gone(self._stream, self._durable)
        elif code == _CONFLICT and "Batch Completed" not in text:
            self._failure = Outage(f"the server ended our request: {text}")
        elif code == _BAD_REQUEST:
            self._failure = ConfigurationError(f"the server refuses our request: {text}")
        self._wake.set()

    def _on_trouble(self) -> None:
        self._confirmations.wake()
        self._wake.set()

    def _taken(self) -> list[_Arrived]:
        taken: list[_Arrived] = []
        size = 0
        while self._buffer and len(taken) < self._batch_size and size < self._batch_bytes:
            arrived = self._buffer.popleft()
            size += len(arrived.body)
            taken.append(arrived)
        return taken

    def _batch(self, taken: Sequence[_Arrived], *, was_cut_short: bool) -> Batch:
        if not taken:
            is_answered = time.monotonic() >= self._pull_from_s + POLL_WAIT_S
            return Batch(is_end_of_backlog=is_answered and not was_cut_short)
        messages: list[RelayMessage] = []
        rejected: list[Rejected] = []
        for arrived in taken:
            message, error = self._decoded(arrived)
            if error is None:
                messages.append(message)
            else:
                rejected.append(Rejected(message, error))
        return Batch(
            messages=messages,
            rejected=rejected,
            position=_Position(self._opening, tuple(one.sequence for one in taken)),
            checkpoint=f"{self._stream}:{taken[-1].sequence}",
            is_end_of_backlog=not self._buffer and _is_last(taken[-1].reply),
        )

    def _decoded(self, arrived: _Arrived) -> tuple[RelayMessage, MessageRejected | None]:
        subject = arrived.subject.decode("utf-8", "replace")
        token = arrived.reply.decode()
        headers = wire_headers.parse(arrived.block)
        try:
            restored = _restored(arrived.body, headers)
            if restored is not None:
                return structs.replace(
                    restored, token=token, subject=restored.subject or subject
                ), None
            if not wire.is_json(arrived.body):
                raise MessageUndecodable(f"the message on {subject!r} is not JSON")
            error = None
        except MessageRejected as reason:
            error = reason
        default_key = f"nats:{self._stream}:{self._stream_epoch}:{arrived.sequence}"
        plain = RelayMessage(
            dedup_key=headers.get(wire_headers.MESSAGE_ID) or default_key,
            payload=arrived.body,
            subject=subject,
            headers=headers,
            token=token,
        )
        return plain, error

    async def _settle(self, connection: Connection, replies: Sequence[bytes], verb: bytes) -> None:
        """Answer all deliveries and wait until the server confirms each. Raises `Outage`."""
        confirmations = self._confirmations
        numbers = confirmations.expect(len(replies))
        prefix = self._confirmation_prefix
        for start in range(0, len(replies), _CHUNK_MESSAGES):
            chunk = slice(start, start + _CHUNK_MESSAGES)
            pairs = zip(replies[chunk], numbers[chunk], strict=True)
            connection.write(
                b"".join(_published(reply, verb, f"{prefix}{number}") for reply, number in pairs)
            )
            await connection.drain(_ANSWER_TIMEOUT_S)
        await confirmations.all_of(numbers, connection)
        if confirmations.is_consumer_gone:
            raise consumer_gone(self._stream, self._durable)


class _Confirmations:
    """Which of our answers to deliveries the server has not confirmed yet, by number."""

    def __init__(self) -> None:
        self._next = 0
        self._unconfirmed: set[int] = set()
        self._waiters: set[asyncio.Event] = set()
        self.is_consumer_gone = False

    def expect(self, count: int) -> range:
        """Numbers for so many answers."""
        numbers = range(self._next, self._next + count)
        self._next += count
        self._unconfirmed.update(numbers)
        return numbers

    async def all_of(self, numbers: range, connection: Connection) -> None:
        """Return when all are confirmed. Raises `Outage` when the server goes silent."""
        moved = asyncio.Event()
        self._waiters.add(moved)
        try:
            while left := self._unconfirmed.intersection(numbers):
                if connection.loss is not None:
                    raise connection.loss
                moved.clear()
                try:
                    async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                        await moved.wait()
                except TimeoutError:
                    if len(self._unconfirmed.intersection(numbers)) == len(left):
                        connection.abort(
                            TimedOut(f"{connection.address} does not confirm acknowledgements")
                        )
        finally:
            self._waiters.discard(moved)
            self._unconfirmed.difference_update(numbers)

    def on_reply(self, subject: bytes, _: bytes, __: bytes, block: bytes | None) -> None:
        """The server confirms one answer."""
        self._unconfirmed.discard(int(subject.rpartition(b".")[2]))
        status = wire_headers.status(block)
        if status is not None and status[0] == _NO_RESPONDERS:
            self.is_consumer_gone = True
        if not self._unconfirmed or len(self._unconfirmed) % _CHUNK_MESSAGES == 0:
            self.wake()

    def wake(self) -> None:
        """Let those who wait look again."""
        for waiter in self._waiters:
            waiter.set()


def _published(subject: bytes, body: bytes, reply: str = "") -> bytes:
    return b"PUB %b %b %d\r\n%b\r\n" % (subject, reply.encode(), len(body), body)


def _sequence_of(reply: bytes) -> int:
    """The stream sequence in an acknowledgement subject, in its short and its long form."""
    tokens = reply.split(b".")
    return int(tokens[5] if len(tokens) == _SHORT_REPLY_TOKENS else tokens[7])


def _is_last(reply: bytes) -> bool:
    """True where the server had nothing more for the consumer when it delivered this."""
    tokens = reply.split(b".")
    return (tokens[8] if len(tokens) == _SHORT_REPLY_TOKENS else tokens[10]) == b"0"


def _restored(body: bytes, headers: Mapping[str, str]) -> RelayMessage | None:
    """The message as our own sink sent it, or None for somebody else's."""
    if _MARKER not in map(str.lower, headers):
        return None
    own = {name: value for name, value in headers.items() if name[:5].lower() != "nats-"}
    return wire.restore(body, wire_headers.decode(own), wire.TITLE)


def _differences(found: ConsumerConfig, wanted: ConsumerConfig) -> list[str]:
    """What of an existing consumer contradicts the keys, in words."""
    differences = []
    if found.deliver_subject:
        differences.append("push delivery, not pull")
    filters = found.filter_subjects or [found.filter_subject]
    for name, here, there in (
        ("subject", ", ".join(filters) or ">", wanted.filter_subject),
        ("ack policy", found.ack_policy, wanted.ack_policy),
        ("deliver_policy", found.deliver_policy, wanted.deliver_policy),
        (
            "ack_wait_seconds",
            f"{found.ack_wait / jetstream.NANOSECONDS:g}",
            f"{wanted.ack_wait / jetstream.NANOSECONDS:g}",
        ),
        ("max_deliver", str(found.max_deliver or -1), str(wanted.max_deliver)),
    ):
        if here != there:
            differences.append(f"{name} {here}, not {there}")
    return differences
