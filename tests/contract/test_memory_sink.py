"""The in-memory sink under the contract, and its faults."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import pytest

from relay.contracts import Sink
from relay.errors import MessageRejected, Outage, TimedOut
from relay.message import RelayMessage
from relay.wire import restore
from tests.contract.evidence import numbered, until
from tests.contract.sink_contract import SinkContract, SinkHarness, deliver
from tests.servers.memory import SPELLING, Faults, MemoryChannel, MemorySink

LIMIT_BYTES = 64 * 1024


class MemorySinkHarness(SinkHarness):
    def __init__(self) -> None:
        self.channel = MemoryChannel(oversize_bytes=LIMIT_BYTES, deduplicates=True)
        self.faults = Faults()
        self.faults.refused["bad"] = MessageRejected("refused on purpose")
        self.faults.refused["bad:1"] = MessageRejected("refused on purpose")
        self.faults.refused["bad:2"] = MessageRejected("refused on purpose")

    def make(self) -> MemorySink:
        return MemorySink(self.channel, faults=self.faults)

    async def received(self, at_least: int) -> Sequence[RelayMessage]:
        return await until(self._read, at_least)

    def unacceptable(self, dedup_key: str) -> RelayMessage:
        return RelayMessage(dedup_key=dedup_key, payload=b"{}")

    def oversize(self, dedup_key: str) -> RelayMessage:
        return RelayMessage(dedup_key=dedup_key, payload=b'"%s"' % (b"x" * LIMIT_BYTES))

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

    async def _read(self) -> Sequence[RelayMessage]:
        found = []
        for record in self.channel.records:
            message = restore(record.encoded.body, record.encoded.headers, SPELLING)
            assert message is not None
            found.append(message)
        return found


class TestMemorySink(SinkContract):
    backend = "memory"
    lacks: ClassVar = {
        "tls": "memory has no connection to encrypt",
        "authentication": "memory asks for no credentials",
    }

    @pytest.fixture
    async def harness(self) -> MemorySinkHarness:
        return MemorySinkHarness()


async def connected(faults: Faults) -> tuple[MemorySink, MemoryChannel]:
    channel = MemoryChannel()
    sink = MemorySink(channel, faults=faults)
    await sink.connect()
    return sink, channel


async def test_publishes_fail_as_often_as_was_asked_for() -> None:
    faults = Faults()
    sink, channel = await connected(faults)
    faults.fail_next(2, TimedOut("no answer"))

    for _ in range(2):
        with pytest.raises(TimedOut):
            await sink.publish(numbered(3))
    await sink.publish(numbered(3))

    assert len(channel.records) == 3


async def test_nothing_behind_a_transient_failure_is_stored() -> None:
    faults = Faults()
    sink, channel = await connected(faults)
    faults.refused["m:1"] = Outage("busy")

    result = await sink.publish(numbered(4))

    assert [failure.index for failure in result.failures] == [1, 2, 3]
    assert len(channel.records) == 1


async def test_a_publish_waits_while_the_acknowledgement_is_held_back() -> None:
    faults = Faults()
    sink, channel = await connected(faults)
    faults.accepting.clear()
    publishing = asyncio.create_task(deliver(sink, numbered(3)))
    done, _ = await asyncio.wait([publishing], timeout=0.05)

    assert not done
    assert len(channel.records) == 3
    faults.accepting.set()
    await asyncio.wait_for(publishing, 5)

    assert len(channel.records) == 3


def test_the_sink_is_a_sink() -> None:
    sink: Sink = MemorySink(MemoryChannel())

    assert sink.subject_of(numbered(1)[0]) == "orders.insert"
