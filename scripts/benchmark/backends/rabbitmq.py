"""RabbitMQ: a node of the distribution with a durable classic queue and persistent messages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import aiormq
import msgspec
from aiormq import spec
from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage

from relay.demo.embedded import LOOPBACK
from scripts.benchmark.backends import (
    Destination,
    Origin,
    ServerMissing,
    Stretch,
    observed,
    payload,
)
from scripts.benchmark.server import START_TIMEOUT_S, free_port, running_server
from scripts.benchmark.surroundings import Surroundings

EXCHANGE: Final = "bench"

# As many as the relay's sink keeps in flight by default.
_WINDOW: Final = 4096
_ACKNOWLEDGED_AT_ONCE: Final = 1_000
_PREFETCH: Final = 4 * _ACKNOWLEDGED_AT_ONCE
_SILENCE_S: Final = 30.0
_LOOK_S: Final = 0.1
# The one on the path may be a wrapper that only its own user can run.
_BINARIES: Final = Path("/usr/lib/rabbitmq/bin")
_ELSEWHERE: Final = "/opt/homebrew/sbin:/opt/homebrew/bin:/usr/local/sbin:/usr/local/bin"


class Message(msgspec.Struct, frozen=True):
    """A message as a queue has it."""

    routing_key: str
    properties: spec.Basic.Properties
    body: bytes


@contextlib.asynccontextmanager
async def _server() -> AsyncIterator[str]:
    """The address of a node of our own."""
    server, epmd = _binary("rabbitmq-server"), _binary("epmd")
    port, epmd_port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-rabbitmq-") as name:
        directory = Path(name)
        (directory / "epmd").mkdir()
        (directory / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = {LOOPBACK}:{port}\nlog.console = true\nlog.file = false\n"
            "disk_free_limit.absolute = 1MB\n"
        )
        (directory / "enabled_plugins").write_text("[].\n")
        environment = {
            "HOME": str(directory),
            # The script becomes the virtual machine then, so that it can be ended.
            "RUNNING_UNDER_SYSTEMD": "true",
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "RABBITMQ_NODENAME": f"{directory.name}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        # Else the node would leave one behind as a daemon.
        epmd_command = (epmd, "-port", str(epmd_port), "-address", LOOPBACK)
        async with (
            running_server(epmd_command, directory / "epmd", epmd_port),
            running_server([server], directory, port, environment),
        ):
            yield f"amqp://{LOOPBACK}:{port}"


def _binary(name: str) -> Path:
    """A program of the distribution's package. Raises `ServerMissing`."""
    if (_BINARIES / name).exists():
        return _BINARIES / name
    found = shutil.which(name) or shutil.which(name, path=_ELSEWHERE)
    if found is None:
        raise ServerMissing(f"{name} is missing: apt-get install rabbitmq-server")
    return Path(found)


class _Queues:
    """One queue after the other, bound to the exchange, looked at over a channel of our own."""

    def __init__(self, url: str, connection: AbstractConnection, looker: AbstractChannel) -> None:
        self.url = url
        self._connection = connection
        self._looker = looker
        self._made = 0

    @property
    def queue(self) -> str:
        """The newest."""
        return f"bench-{self._made}"

    async def renew(self) -> None:
        """Make another, empty queue; the one before goes with its consumers."""
        await self._looker.queue_delete(self.queue)
        self._made += 1
        await self._looker.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
        await self._looker.queue_declare(self.queue, durable=True)
        await self._looker.queue_bind(self.queue, EXCHANGE, "#")

    async def count(self) -> int:
        """How many messages are ready in the newest."""
        declared = await self._looker.queue_declare(self.queue, passive=True)
        return declared.message_count or 0

    async def taken(self) -> list[Message]:
        """All messages of the newest, in order; they are out of it then."""
        count = await self.count()
        found: list[Message] = []
        are_all = asyncio.Event()

        async def take(message: DeliveredMessage) -> None:
            properties = message.header.properties
            found.append(Message(message.routing_key or "", properties, message.body))
            if len(found) == count:
                are_all.set()

        channel = await self._connection.channel()
        if count:
            await channel.basic_consume(self.queue, take, no_ack=True)
            async with asyncio.timeout(_SILENCE_S + count / 1000):
                await are_all.wait()
        await channel.close()
        return found

    async def add(self, messages: Sequence[Message]) -> float:
        """Publish all, every confirmation counted; how many seconds that took.

        Raises `RuntimeError` where the queue does not have all that was confirmed.
        """
        before, confirmed = await self.count(), 0
        channel = await self._connection.channel()
        started = time.perf_counter()
        for start in range(0, len(messages), _WINDOW):
            answers = await asyncio.gather(
                *(
                    channel.basic_publish(
                        message.body,
                        exchange=EXCHANGE,
                        routing_key=message.routing_key,
                        properties=message.properties,
                        mandatory=True,
                        wait=False,
                    )
                    for message in messages[start : start + _WINDOW]
                )
            )
            confirmed += sum(isinstance(answer, spec.Basic.Ack) for answer in answers)
        elapsed_s = time.perf_counter() - started
        await channel.close()
        if not confirmed == await self.count() - before == len(messages):
            raise RuntimeError(f"{confirmed} of {len(messages)} messages were confirmed")
        return elapsed_s

    async def consume(self) -> float:
        """Take and acknowledge everything; how many seconds that took.

        Raises `RuntimeError` where something is left.
        """
        count, seen = await self.count(), 0
        are_all = asyncio.Event()
        channel = await self._connection.channel()

        async def take(message: DeliveredMessage) -> None:
            nonlocal seen
            seen += 1
            if seen % _ACKNOWLEDGED_AT_ONCE == 0 or seen == count:
                await channel.basic_ack(message.delivery_tag or 0, multiple=True)
            if seen == count:
                are_all.set()

        await channel.basic_qos(prefetch_count=_PREFETCH)
        started = time.perf_counter()
        await channel.basic_consume(self.queue, take)
        async with asyncio.timeout(_SILENCE_S + count / 1000):
            await are_all.wait()
        elapsed_s = time.perf_counter() - started
        await channel.close()
        # What is not acknowledged comes back with the end of its channel.
        if left := await self.count():
            raise RuntimeError(f"{left} of {count} messages were not acknowledged")
        return elapsed_s


@contextlib.asynccontextmanager
async def _queues() -> AsyncIterator[_Queues]:
    async with _server() as url, await _connected(url) as connection:
        yield _Queues(url, connection, await connection.channel())


async def _connected(url: str) -> AbstractConnection:
    """A connection, as soon as the node lets users in. Raises `TimeoutError`."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            with contextlib.suppress(OSError, aiormq.exceptions.AMQPError):
                return await aiormq.connect(url)
            await asyncio.sleep(_LOOK_S)


class ToRabbit(Destination):
    """`to-rabbitmq`."""

    title = "RabbitMQ"

    def __init__(self, queues: _Queues) -> None:
        self._queues = queues
        self._messages: Sequence[Message] = ()

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, _: Surroundings) -> AsyncIterator[Destination]:
        """Part of the protocol."""
        async with _queues() as queues:
            yield cls(queues)

    def sink(self) -> Mapping[str, object]:
        return {"type": "rabbitmq", "url": self._queues.url, "exchange": EXCHANGE}

    async def empty(self) -> None:
        await self._queues.renew()
        self._messages = ()

    async def until_holding(self, messages: int, timeout_s: float) -> Stretch:
        return await observed(self._queues.count, messages, timeout_s)

    async def read(self) -> set[str]:
        self._messages = await self._queues.taken()
        return {message.properties.message_id or "" for message in self._messages}

    async def floor(self) -> float:
        await self._queues.renew()
        return len(self._messages) / await self._queues.add(self._messages)


class FromRabbit(Origin):
    """`from-rabbitmq`."""

    title = "RabbitMQ"
    target_per_s: float | None = None
    hard_bar_per_s: float | None = None

    def __init__(self, queues: _Queues) -> None:
        self._queues = queues
        self._messages: Sequence[Message] = ()

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, _: Surroundings) -> AsyncIterator[Origin]:
        """Part of the protocol."""
        async with _queues() as queues:
            yield cls(queues)

    def source(self) -> Mapping[str, object]:
        return {"type": "rabbitmq", "url": self._queues.url, "queue": self._queues.queue}

    async def fill(self, messages: int) -> None:
        self._messages = [
            Message(
                "bench",
                spec.Basic.Properties(delivery_mode=2, message_id=f"m{number}"),
                payload(number),
            )
            for number in range(messages)
        ]
        await self._queues.renew()
        await self._queues.add(self._messages)

    async def floor(self) -> float:
        # The queue gave them away.
        await self._queues.renew()
        await self._queues.add(self._messages)
        return len(self._messages) / await self._queues.consume()
