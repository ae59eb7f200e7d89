"""The few questions that we ask the JetStream API, through the manager of the client.

https://docs.nats.io/reference/reference-protocols/nats_api_reference
"""

from __future__ import annotations

import json

from nats.js.api import ConsumerConfig, ConsumerInfo, StorageType, StreamConfig, StreamInfo
from nats.js.errors import APIError

from relay.backends.nats.connection import Connection
from relay.backends.nats.errors import mapped
from relay.errors import DestinationMissing

API = "$JS.API"


async def check_enabled(connection: Connection) -> None:
    """Raise `ConfigurationError` where the server, or our account, has no JetStream."""
    await connection.ask(connection.manager.account_info(), "looking for JetStream")


async def stream_info(connection: Connection, name: str) -> StreamInfo:
    """The stream of that name. Raises `DestinationMissing`."""
    return await connection.ask(
        connection.manager.stream_info(name), f"looking for the stream {name!r}"
    )


async def streams_on(connection: Connection, subject: str) -> list[StreamInfo]:
    """The streams that listen on a subject or on a part of a filter.

    The client's manager lists all streams, or finds one.
    """
    doing = f"looking for a stream on {subject!r}"
    body = json.dumps({"subject": subject}).encode()
    found = json.loads(await connection.request(f"{API}.STREAM.LIST", body, doing))
    with mapped(doing):
        if "error" in found:
            raise APIError.from_error(found["error"])
    return [StreamInfo.from_response(one) for one in found["streams"] or ()]


async def create_stream(
    connection: Connection, name: str, subjects: list[str], *, duplicate_window_s: int
) -> None:
    """Make the stream on file storage; harmless when it exists with the same configuration."""
    config = StreamConfig(
        name=name,
        subjects=subjects,
        storage=StorageType.FILE,
        duplicate_window=duplicate_window_s,
    )
    await connection.ask(connection.manager.add_stream(config), f"creating the stream {name!r}")


async def consumer_info(connection: Connection, stream: str, durable: str) -> ConsumerInfo | None:
    """The consumer of that name, None where there is none."""
    try:
        info: ConsumerInfo = await connection.ask(
            connection.manager.consumer_info(stream, durable),
            f"looking for the consumer {durable!r}",
        )
    except DestinationMissing:
        return None
    return info


async def create_consumer(
    connection: Connection, stream: str, config: ConsumerConfig
) -> ConsumerInfo:
    """Make the durable consumer; harmless when it exists with the same configuration."""
    return await connection.ask(
        connection.manager.add_consumer(stream, config),
        f"creating the consumer {config.durable_name!r}",
    )
