"""The in-memory source under the contract, and its end of input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import pytest

from relay.contracts import Source
from relay.errors import EndOfInput
from relay.message import RelayMessage
from relay.wire import Encoded, encoder
from tests.contract.evidence import dedup_keys, numbered
from tests.contract.source_contract import SourceContract, SourceHarness, collect, messages_of
from tests.servers.memory import SPELLING, MemoryChannel, MemorySource, Record


class MemorySourceHarness(SourceHarness):
    def __init__(self) -> None:
        self.channel = MemoryChannel()
        self._encode = encoder("envelope", SPELLING)

    def make(self, *, batch_size: int = 100) -> Source:
        return MemorySource(self.channel, batch_size=batch_size)

    async def feed(self, messages: Sequence[RelayMessage]) -> None:
        for message in messages:
            self.channel.append(Record(message.subject, self._encode(message)))

    async def feed_bodies(self, bodies: Sequence[bytes]) -> Sequence[bytes]:
        for body in bodies:
            self.channel.append(Record("theirs", Encoded(body, {})))
        return bodies

    async def cut(self) -> None:
        self.channel.cut()

    async def stall(self) -> None:
        self.channel.cut()

    async def restore(self) -> None:
        self.channel.restore()

    async def restart(self) -> None:
        self.channel.restart()

    def mapping(self) -> AbstractContextManager[object]:
        return nullcontext()

    def exceptions(self) -> Iterable[BaseException]:
        return ()


class TestMemorySource(SourceContract):
    backend = "memory"
    lacks: ClassVar = {
        "lag": "nobody asks what is in memory",
        "keep alive": "batches in memory never expire",
        "tls": "memory has no connection to encrypt",
        "authentication": "memory asks for no credentials",
    }

    @pytest.fixture
    async def harness(self) -> MemorySourceHarness:
        return MemorySourceHarness()


async def test_a_completed_channel_ends_the_input_after_its_last_message() -> None:
    harness = MemorySourceHarness()
    await harness.feed(numbered(3))
    harness.channel.complete()
    source = harness.make()
    await source.connect()

    batches = await collect(source, 3)

    assert dedup_keys(messages_of(batches)) == ["m:0", "m:1", "m:2"]
    with pytest.raises(EndOfInput):
        await source.poll()
    await source.aclose()


async def test_two_sources_share_the_messages_of_a_channel() -> None:
    harness = MemorySourceHarness()
    await harness.feed(numbered(20))
    one, other = harness.make(batch_size=10), harness.make(batch_size=10)
    await one.connect()
    await other.connect()

    first, second = await one.poll(), await other.poll()

    arrived = [*first.messages, *second.messages]
    assert sorted(dedup_keys(arrived)) == sorted(dedup_keys(numbered(20)))
    await one.aclose()
    await other.aclose()
