"""SQS: the server of the tests and a standard queue.

That server is no measure of SQS. The rows say what the relay makes of it beside a bare client.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aioboto3
import msgspec
from aiobotocore.config import AioConfig

from relay.demo.embedded import LOOPBACK
from scripts.benchmark.backends import (
    Destination,
    Origin,
    ServerMissing,
    Stretch,
    observed,
    payload,
)
from scripts.benchmark.server import free_port, running_server
from scripts.benchmark.surroundings import Surroundings

REGION: Final = "eu-central-1"

# The server takes some 1,500 events a second and gives away some 400.
_MOST_EVENTS: Final = 3_000
# As many as the relay has in flight by default.
_CALLS_AT_ONCE: Final = 8
_PER_CALL: Final = 10
_SILENCE_S: Final = 30.0
_KEY_ID, _SECRET = "RELAY_BENCH_SQS_KEY_ID", "RELAY_BENCH_SQS_SECRET"
# The server trusts whatever it is given.
_ANY: Final = "any"
_REPOSITORY: Final = Path(__file__).resolve().parents[3]

Entry = Mapping[str, object]


class _Envelope(msgspec.Struct, frozen=True):
    dedup_key: str


_decode_envelope = msgspec.json.Decoder(_Envelope).decode


class _Queues:
    """One queue after the other, looked at over a client of our own."""

    def __init__(self, url: str, client: Any) -> None:
        self._url = url
        self._client = client
        self._made = 0

    @property
    def place(self) -> Mapping[str, object]:
        """The newest, as a sink or source of type ``sqs``."""
        return {
            "type": "sqs",
            "queue_url": self._queue_url,
            "region": REGION,
            "access_key_id": f"${{env:{_KEY_ID}}}",
            "secret_access_key": f"${{env:{_SECRET}}}",
        }

    @property
    def _queue_url(self) -> str:
        return f"{self._url}/123456789012/bench-{self._made}"

    async def recreate(self) -> None:
        """Make another, empty queue."""
        self._made += 1
        await self._client.create_queue(QueueName=f"bench-{self._made}")

    async def count(self) -> int:
        """How many messages there are to receive."""
        name = "ApproximateNumberOfMessages"
        answer = await self._client.get_queue_attributes(
            QueueUrl=self._queue_url, AttributeNames=[name]
        )
        return int(answer["Attributes"][name])

    async def taken(self) -> list[Entry]:
        """All messages, as entries to send again; they are out of the queue then."""
        found: list[Entry] = []
        while received := await self._receive(0):
            await self._delete(received)
            found += [
                {
                    "Id": str(number),
                    "MessageBody": one["Body"],
                    "MessageAttributes": one.get("MessageAttributes", {}),
                }
                for number, one in enumerate(received)
            ]
        return found

    async def add(self, entries: Sequence[Entry]) -> float:
        """Send all, every acceptance counted; how many seconds that took. Raises `RuntimeError`."""
        calls = iter(
            [
                [{**entry, "Id": str(number)} for number, entry in enumerate(part)]
                for part in _parts(entries)
            ]
        )
        accepted = 0

        async def send() -> None:
            nonlocal accepted
            for part in calls:
                answer = await self._client.send_message_batch(
                    QueueUrl=self._queue_url, Entries=part
                )
                accepted += len(answer.get("Successful", ()))

        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_CALLS_AT_ONCE):
                tasks.create_task(send())
        elapsed_s = time.perf_counter() - started
        if accepted != len(entries):
            raise RuntimeError(f"{accepted} of {len(entries)} messages were accepted")
        return elapsed_s

    async def consume(self, messages: int) -> float:
        """Receive and delete so many; how many seconds that took. Raises `RuntimeError`."""
        # A message may be given more than once.
        deleted: set[str] = set()
        elapsed_s = 0.0
        started = time.perf_counter()

        async def take() -> None:
            nonlocal elapsed_s
            while len(deleted) < messages:
                received = await self._receive(1)
                if received:
                    await self._delete(received)
                    deleted.update(one["MessageId"] for one in received)
                    elapsed_s = time.perf_counter() - started

        async with asyncio.timeout(_SILENCE_S + messages / 50), asyncio.TaskGroup() as tasks:
            for _ in range(_CALLS_AT_ONCE):
                tasks.create_task(take())
        if len(deleted) != messages:
            raise RuntimeError(f"{len(deleted)} of {messages} messages were deleted")
        return elapsed_s

    async def _receive(self, wait_s: int) -> Sequence[Mapping[str, Any]]:
        answer = await self._client.receive_message(
            QueueUrl=self._queue_url,
            MaxNumberOfMessages=_PER_CALL,
            WaitTimeSeconds=wait_s,
            MessageAttributeNames=["All"],
        )
        found: Sequence[Mapping[str, Any]] = answer.get("Messages", ())
        return found

    async def _delete(self, received: Sequence[Mapping[str, Any]]) -> int:
        entries = [
            {"Id": str(number), "ReceiptHandle": one["ReceiptHandle"]}
            for number, one in enumerate(received)
        ]
        answer = await self._client.delete_message_batch(QueueUrl=self._queue_url, Entries=entries)
        return len(answer.get("Successful", ()))


def _parts(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    left = iter(entries)
    while part := list(itertools.islice(left, _PER_CALL)):
        yield part


@contextlib.asynccontextmanager
async def _queues() -> AsyncIterator[_Queues]:
    """The queues of a server of our own."""
    if importlib.util.find_spec("moto") is None:
        raise ServerMissing("moto is missing: pip install 'moto[server,sqs]'")
    port = free_port()
    url = f"http://{LOOPBACK}:{port}"
    command = (sys.executable, "-m", "tests.servers.sqs_program", "-H", LOOPBACK, "-p", str(port))
    session = aioboto3.Session(
        aws_access_key_id=_ANY, aws_secret_access_key=_ANY, region_name=REGION
    )
    with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-sqs-") as directory:
        async with (
            running_server(command, Path(directory), port, {"PYTHONPATH": str(_REPOSITORY)}),
            session.client(
                "sqs", endpoint_url=url, config=AioConfig(max_pool_connections=2 * _CALLS_AT_ONCE)
            ) as client,
        ):
            yield _Queues(url, client)


class ToSqs(Destination):
    """`to-sqs`."""

    title = "SQS"
    most_events = _MOST_EVENTS

    def __init__(self, queues: _Queues) -> None:
        self._queues = queues
        self._entries: Sequence[Entry] = ()

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, _: Surroundings) -> AsyncIterator[Destination]:
        """Part of the protocol."""
        async with _queues() as queues:
            yield cls(queues)

    @property
    def environment(self) -> Mapping[str, str]:
        return {_KEY_ID: _ANY, _SECRET: _ANY}

    def sink(self) -> Mapping[str, object]:
        return self._queues.place

    async def empty(self) -> None:
        await self._queues.recreate()
        self._entries = ()

    async def until_holding(self, messages: int, timeout_s: float) -> Stretch:
        return await observed(self._queues.count, messages, timeout_s)

    async def read(self) -> set[str]:
        self._entries = await self._queues.taken()
        return {_decode_envelope(str(one["MessageBody"])).dedup_key for one in self._entries}

    async def floor(self) -> float:
        await self._queues.recreate()
        return len(self._entries) / await self._queues.add(self._entries)


class FromSqs(Origin):
    """`from-sqs`."""

    title = "SQS"
    most_events = _MOST_EVENTS
    target_per_s: float | None = None
    hard_bar_per_s: float | None = None

    def __init__(self, queues: _Queues) -> None:
        self._queues = queues
        self._entries: Sequence[Entry] = ()

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, _: Surroundings) -> AsyncIterator[Origin]:
        """Part of the protocol."""
        async with _queues() as queues:
            yield cls(queues)

    @property
    def environment(self) -> Mapping[str, str]:
        return {_KEY_ID: _ANY, _SECRET: _ANY}

    def source(self) -> Mapping[str, object]:
        return self._queues.place

    async def fill(self, messages: int) -> None:
        self._entries = [{"MessageBody": payload(number).decode()} for number in range(messages)]
        await self._queues.recreate()
        await self._queues.add(self._entries)

    async def floor(self) -> float:
        # The queue gave them away.
        await self._queues.recreate()
        await self._queues.add(self._entries)
        return len(self._entries) / await self._queues.consume(len(self._entries))
