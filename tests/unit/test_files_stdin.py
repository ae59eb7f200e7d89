"""The stdin source, over a pipe in the place of stdin."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relay.backends.files import FileSource, StdinSource
from relay.backends.files.options import FileSourceOptions
from relay.backends.files.stdin import StdinInput
from relay.errors import ConfigurationError, EndOfInput, NotConnected
from tests.contract.evidence import dedup_keys
from tests.contract.source_contract import assert_nothing_more, collect, messages_of
from tests.contract.surroundings import backend_context


class Stdin:
    """The reading end as stdin of a process; the writing end in the test's hands."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.input = StdinInput(self.reader)

    def source(self, *, batch_size: int = 100) -> StdinSource:
        context = backend_context(direction="reverse", batch_size=batch_size)
        return StdinSource(FileSourceOptions(type="stdin"), self.input, context)

    def write(self, data: bytes) -> None:
        os.write(self.writer, data)

    def end(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
        self.writer = -1


@pytest.fixture
async def stdin() -> AsyncIterator[Stdin]:
    stdin = Stdin()
    yield stdin
    stdin.end()
    os.close(stdin.reader)


async def test_lines_are_handed_out_and_the_end_of_the_stream_ends_the_input(stdin: Stdin) -> None:
    source = stdin.source()
    await source.connect()
    stdin.write(b'{"a":1}\nnonsense\n{"dedup_key":"own"}\n{"a":2}')
    stdin.end()

    batches = await collect(source, 4)

    messages = messages_of(batches)
    assert [m.payload for m in messages] == [b'{"a":1}', b'{"dedup_key":"own"}', b'{"a":2}']
    assert messages[1].dedup_key == "own"
    assert uuid.UUID(messages[0].dedup_key) != uuid.UUID(messages[2].dedup_key)
    assert messages[0].subject == "stdin"
    assert [r.message.payload for batch in batches for r in batch.rejected] == [b"nonsense"]
    with pytest.raises(EndOfInput):
        await source.poll()
    await source.aclose()


async def test_a_silent_stream_does_not_hold_up_a_poll_and_can_be_interrupted(
    stdin: Stdin,
) -> None:
    source = stdin.source()
    await source.connect()
    started = time.monotonic()
    batch = await source.poll()
    assert 0.9 < time.monotonic() - started < 1.7
    assert batch.is_end_of_backlog

    polling = asyncio.create_task(source.poll())
    await asyncio.sleep(0)
    started = time.monotonic()
    source.interrupt()
    await polling

    assert time.monotonic() - started < 0.5
    await source.aclose()


async def test_what_was_not_acknowledged_goes_to_the_next_source_with_the_same_keys(
    stdin: Stdin,
) -> None:
    source = stdin.source(batch_size=2)
    await source.connect()
    stdin.write(b"1\n2\n3\n4\n5\n6\n")
    batches = await collect(source, 6)
    await source.acknowledge(batches[0])
    await source.aclose()

    successor = stdin.source()
    await successor.connect()
    again = await collect(successor, 4)

    assert [m.payload for m in messages_of(again)] == [b"3", b"4", b"5", b"6"]
    assert dedup_keys(messages_of(again)) == dedup_keys(messages_of(batches[1:]))
    await successor.aclose()


async def test_a_reconnect_hands_out_again_what_is_unacknowledged(stdin: Stdin) -> None:
    source = stdin.source(batch_size=2)
    await source.connect()
    stdin.write(b"1\n2\n3\n4\n")
    batches = await collect(source, 4)
    await source.acknowledge(batches[0])

    await source.connect()

    assert [m.payload for m in messages_of(await collect(source, 2))] == [b"3", b"4"]
    await source.aclose()


async def test_a_rejected_batch_comes_again_and_what_is_acknowledged_does_not(
    stdin: Stdin,
) -> None:
    source = stdin.source(batch_size=2)
    await source.connect()
    stdin.write(b"1\n2\n3\n4\n")
    batches = await collect(source, 4)

    await source.acknowledge(batches[0])
    await source.reject(batches[1])
    again = await collect(source, 2)
    for batch in again:
        await source.acknowledge(batch)

    assert [m.payload for m in messages_of(again)] == [b"3", b"4"]
    await assert_nothing_more(source)
    await source.aclose()


async def test_a_poll_that_was_cut_off_loses_nothing(stdin: Stdin) -> None:
    source = stdin.source()
    await source.connect()
    polling = asyncio.create_task(source.poll())
    await asyncio.sleep(0)
    polling.cancel()
    await asyncio.wait([polling])
    stdin.write(b"1\n2\n")
    await source.aclose()

    successor = stdin.source()
    await successor.connect()

    assert [m.payload for m in messages_of(await collect(successor, 2))] == [b"1", b"2"]
    await successor.aclose()


async def test_only_one_pipeline_can_read_stdin(stdin: Stdin) -> None:
    first, second = stdin.source(), stdin.source()
    await first.connect()

    with pytest.raises(ConfigurationError, match="another pipeline"):
        await second.connect()

    await second.aclose()
    await first.aclose()
    await second.connect()
    assert await second.is_healthy()
    await second.aclose()
    await second.aclose()


async def test_polling_before_connecting_is_an_outage(stdin: Stdin) -> None:
    with pytest.raises(NotConnected):
        await stdin.source().poll()


async def test_stdin_that_leads_from_a_file_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"1\n2\n")
    with (tmp_path / "in").open("rb") as file:
        source = StdinSource(
            FileSourceOptions(type="stdin"), StdinInput(file.fileno()), backend_context()
        )
        await source.connect()

        assert [m.payload for m in messages_of(await collect(source, 2))] == [b"1", b"2"]
        with pytest.raises(EndOfInput):
            await source.poll()
        await source.aclose()


@pytest.mark.shows("source:file.type")
def test_type_stdin_needs_no_path() -> None:
    source = FileSource.from_options({"type": "stdin"}, backend_context())

    assert isinstance(source, StdinSource)
    assert source.keep_alive_interval_s is None
