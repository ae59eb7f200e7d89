"""The few questions that we ask the JetStream API, and the parts of its answers that we read.

https://docs.nats.io/reference/reference-protocols/nats_api_reference
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from relay.backends.nats.connection import Connection
from relay.errors import DestinationMissing

API = "$JS.API"
NANOSECONDS = 1_000_000_000


class StreamConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A stream's configuration; durations in nanoseconds, -1 where there is no limit."""

    name: str
    subjects: list[str] = []
    storage: str = "file"
    duplicate_window: int = 0
    max_msg_size: int = -1


class StreamInfo(msgspec.Struct, frozen=True):
    """A stream, and since when it exists."""

    config: StreamConfig
    created: datetime


class ConsumerConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A consumer's configuration; durations in nanoseconds."""

    durable_name: str
    ack_policy: str = ""
    ack_wait: int = 0
    deliver_policy: str = ""
    filter_subject: str = ""
    filter_subjects: list[str] = []
    max_deliver: int = 0
    max_ack_pending: int = 0
    replay_policy: str = ""
    deliver_subject: str = ""


class Position(msgspec.Struct, frozen=True):
    """A place in a consumer's deliveries and in its stream."""

    consumer_seq: int = 0
    stream_seq: int = 0


class ConsumerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A consumer, and how far it is."""

    config: ConsumerConfig
    delivered: Position = Position()
    ack_floor: Position = Position()
    num_ack_pending: int = 0


class _Nothing(msgspec.Struct, frozen=True):
    pass


class _StreamFilter(msgspec.Struct, frozen=True):
    subject: str


class _Streams(msgspec.Struct, frozen=True):
    streams: list[StreamInfo] | None = None


class _NewConsumer(msgspec.Struct, frozen=True):
    stream_name: str
    config: ConsumerConfig


async def check_enabled(connection: Connection) -> None:
    """Raise `ConfigurationError` where the server, or our account, has no JetStream."""
    await connection.request(f"{API}.INFO", None, _Nothing, "looking for JetStream")


async def stream_info(connection: Connection, name: str) -> StreamInfo:
    """The stream of that name. Raises `DestinationMissing`."""
    return await connection.request(
        f"{API}.STREAM.INFO.{name}", None, StreamInfo, f"looking for the stream {name!r}"
    )


async def streams_on(connection: Connection, subject: str) -> list[StreamInfo]:
    """The streams that listen on a subject or on a part of a filter."""
    found = await connection.request(
        f"{API}.STREAM.LIST",
        _StreamFilter(subject),
        _Streams,
        f"looking for a stream on {subject!r}",
    )
    return found.streams or []


async def create_stream(connection: Connection, config: StreamConfig) -> StreamInfo:
    """Make the stream; harmless when it exists with the same configuration."""
    return await connection.request(
        f"{API}.STREAM.CREATE.{config.name}",
        config,
        StreamInfo,
        f"creating the stream {config.name!r}",
    )


async def consumer_info(connection: Connection, stream: str, durable: str) -> ConsumerInfo | None:
    """The consumer of that name, None where there is none."""
    try:
        return await connection.request(
            f"{API}.CONSUMER.INFO.{stream}.{durable}",
            None,
            ConsumerInfo,
            f"looking for the consumer {durable!r}",
        )
    except DestinationMissing:
        return None


async def create_consumer(
    connection: Connection, stream: str, config: ConsumerConfig
) -> ConsumerInfo:
    """Make the durable consumer; harmless when it exists with the same configuration."""
    return await connection.request(
        f"{API}.CONSUMER.DURABLE.CREATE.{stream}.{config.durable_name}",
        _NewConsumer(stream, config),
        ConsumerInfo,
        f"creating the consumer {config.durable_name!r}",
    )
