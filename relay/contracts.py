"""The two contracts between the loop and the backends, and what passes between them.

A backend implements `Source`, `Sink` or both. It never retries, waits, counts or dead-letters:
the loop does so once, for all. Every method may raise `relay.errors.Outage` (the loop reconnects
and tries again) and `relay.errors.ConfigurationError` (the pipeline stops until someone changes
something); the driver's own exceptions never come through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from relay.errors import MessageRejected, RelayError
from relay.message import RelayMessage


class Rejected(msgspec.Struct, frozen=True):
    """A message that the source received but could not decode: it goes to the dead letters."""

    message: RelayMessage
    error: MessageRejected


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """What one poll returned, in source order.

    ``position`` is the source's own and means: everything up to here, once this batch is settled.
    A batch without messages but with a position is legal (a chunk's end, a closed gap); it is
    acknowledged like any other.
    ``filtered`` counts the messages that the pipeline's shape left out of it already.
    ``checkpoint`` names the position for people: logs, metrics, status.
    ``is_end_of_backlog`` says that the source had nothing more at the moment of the poll.
    """

    messages: Sequence[RelayMessage] = ()
    rejected: Sequence[Rejected] = ()
    filtered: int = 0
    position: object = None
    checkpoint: str = ""
    is_end_of_backlog: bool = False

    @property
    def is_empty(self) -> bool:
        """True where there is nothing to publish, to dead-letter, to count or to acknowledge."""
        return not (self.messages or self.rejected or self.filtered) and self.position is None


def sorted_out(
    found: Iterable[RelayMessage | Rejected],
) -> tuple[list[RelayMessage], list[Rejected]]:
    """The messages, and what could not be decoded, each in order."""
    messages: list[RelayMessage] = []
    rejected: list[Rejected] = []
    for one in found:
        if isinstance(one, Rejected):
            rejected.append(one)
        else:
            messages.append(one)
    return messages, rejected


class Failure(msgspec.Struct, frozen=True):
    """One message of a publish that was not accepted; ``index`` counts in what was published.

    ``was_sent`` is False where it only waited behind the failure of another, whose error it bears.
    """

    index: int
    error: RelayError
    was_sent: bool = True


class PublishResult(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to each message: those not named in ``failures`` are durably accepted.

    ``failures`` is in ascending order of ``index``. A failure of kind ``message`` is permanent,
    any other transient: the loop publishes those again, in order, and not before the longest time
    that any of them asks for (`relay.errors.Outage`). `NotConnected` and `TimedOut` say that the
    connection is gone: the loop connects again before it publishes again.
    ``duplicates`` counts accepted messages that the destination already had.
    """

    failures: Sequence[Failure] = ()
    duplicates: int = 0


ALL_ACCEPTED = PublishResult()


class Source(Protocol):
    """Where messages come from.

    One task calls `poll`; `acknowledge`, `keep_alive` and `reject` may run beside it, for batches
    that are unacknowledged. Batches are acknowledged in the order in which they were polled.

    Loss: until a batch is acknowledged the source hands it out again after a reconnect, a crash or
    `reject`. `connect` after a failure or a forced stop resumes from what was acknowledged.
    Order: as the broker keeps it; within a batch, and from batch to batch.
    Where: in the one relay that owns the pipeline. Push sources (an HTTP receiver) run on every
    relay of the group: they say ``runs_everywhere = True`` on their class, and keep no position in
    the catalog, since a position has one owner.
    """

    @property
    def keep_alive_interval_s(self) -> float | None:
        """How often unacknowledged batches must be kept alive, in seconds; None where never."""

    async def connect(self) -> None:
        """Open, and resume from what was acknowledged. Forgets all unacknowledged batches.

        Idempotent: an open source starts over. Raises `Outage`, `ConfigurationError`.
        """

    async def poll(self) -> Batch:
        """Wait until there is something, or the source's own wait (some seconds) is over.

        Never cancelled by the loop while it may hold messages: `interrupt` ends its wait instead.
        Raises `EndOfInput` when all was handed out and nothing more can come; `Outage` when the
        connection is gone, after which every unacknowledged batch is void; `PositionLost`.
        """

    def interrupt(self) -> None:
        """Make a waiting `poll` return at once with what it has. Callable at any time."""

    async def acknowledge(self, batch: Batch) -> None:
        """Make it durable that this batch is settled; returns only when it is.

        Raises `OwnershipLost` or `LeaseLost` when it is not ours any more, `Outage` when unknown.
        """

    async def keep_alive(self, batch: Batch) -> None:
        """Extend the time that the broker gives for this batch."""

    async def reject(self, batch: Batch) -> None:
        """Release this batch (nack), so that it is handed out again at once, to anybody."""

    async def is_healthy(self) -> bool:
        """True when a poll would be answered now. Never raises, returns within seconds."""

    async def aclose(self) -> None:
        """Release everything: leases, connections, tasks. Idempotent, never raises."""


class NothingExpires:
    """For sources whose unacknowledged batches stay theirs without a sign of life."""

    keep_alive_interval_s: float | None = None

    async def keep_alive(self, batch: Batch) -> None:
        """Nothing to do."""


class Sink(Protocol):
    """Where messages go.

    Order: messages of one key are accepted in the order given, within a publish and from one to
    the next, under the backend's documented ``ordering``.
    Loss: a message counts as accepted only when it is durable at the destination.
    Cancellation: a cancelled publish may have been accepted in part; the loop repeats it with the
    same keys.
    """

    async def connect(self) -> None:
        """Open, or reconnect when open. Raises `Outage`, `ConfigurationError`."""

    def subject_of(self, message: RelayMessage) -> str:
        """The subject, topic, stream or routing key that this message will go to.

        Pure and quick. Raises `MessageRejected` where the template needs what the message lacks.
        """

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Publish all, in order, and wait for what is accepted. Called by one task at a time.

        One bad message never fails its neighbours. Raises `Outage` where nothing can be said
        of any message (all are then repeated) and `ConfigurationError`.
        """

    async def is_healthy(self) -> bool:
        """True when a publish would be answered now. Never raises, returns within seconds."""

    async def aclose(self) -> None:
        """Release everything. Idempotent, never raises."""


@runtime_checkable
class Measuring(Protocol):
    """What a source may offer besides: how much its broker has for it."""

    async def lag(self) -> int | None:
        """How many messages are not acknowledged, handed out or not; None where nobody tells.

        Asked for now and then, beside everything else. Not cancelled while the source is in use,
        so it ends within seconds by itself. Raises `Outage`, `ConfigurationError`.
        """


@runtime_checkable
class Describing(Protocol):
    """What a source or a sink may offer besides: facts about its broker, for logs and people."""

    async def describe(self) -> Mapping[str, str]:
        """A few facts by name, such as the server and how long it deduplicates; no secrets.

        Asked for after `connect`. Raises `Outage`, `ConfigurationError`.
        """
