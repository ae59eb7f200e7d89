"""The file source: lines, positions, rotation, truncation, end of input."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from relay.backends.files import FileSink, FileSource
from relay.contracts import Batch, Source
from relay.errors import (
    ConfigurationError,
    DestinationMissing,
    EndOfInput,
    MessageTooLarge,
    OwnershipLost,
    PositionLost,
)
from relay.message import RelayMessage
from tests.contract.evidence import (
    assert_same_message,
    complete_message,
    dedup_keys,
    numbered,
    until,
)
from tests.contract.source_contract import collect, messages_of
from tests.contract.surroundings import RememberedPositions, backend_context


class Reader:
    """A directory, a catalog, and sources that stand for one pipeline."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "in.jsonl"
        self.catalog = RememberedPositions()

    def source(self, *, batch_size: int = 100, **options: object) -> Source:
        return self.source_with(options, batch_size)

    def source_with(self, options: Mapping[str, object], batch_size: int = 100) -> Source:
        context = backend_context(
            catalog=self.catalog,
            direction="reverse",
            file_roots=(self.directory,),
            batch_size=batch_size,
        )
        return FileSource.from_options(
            {"type": "file", "input": str(self.path), **options}, context
        )

    def append(self, *lines: str, path: Path | None = None) -> None:
        with (path or self.path).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    async def drain(self, **options: object) -> list[Batch]:
        """Read to the end of input, acknowledging everything."""
        source = self.source_with(options)
        await source.connect()
        batches: list[Batch] = []
        try:
            async with asyncio.timeout(20):
                while True:
                    batch = await source.poll()
                    batches.append(batch)
                    await source.acknowledge(batch)
        except EndOfInput:
            await source.aclose()
        return [batch for batch in batches if not batch.is_empty]


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


def payloads(batches: list[Batch]) -> list[object]:
    return [json.loads(message.payload) for message in messages_of(batches)]


@pytest.mark.shows("source:file.input", "error:EndOfInput")
async def test_the_end_of_the_file_is_the_end_of_input(reader: Reader) -> None:
    reader.append('{"a":1}', '{"a":2}')

    assert payloads(await reader.drain()) == [{"a": 1}, {"a": 2}]


async def test_a_second_run_reads_what_was_added_since(reader: Reader) -> None:
    reader.append('{"a":1}')
    await reader.drain()
    assert await reader.drain() == []
    reader.append('{"a":2}')

    assert payloads(await reader.drain()) == [{"a": 2}]


async def test_a_last_line_without_line_break_counts_at_the_end_of_input(reader: Reader) -> None:
    reader.path.write_text('{"a":1}\n{"a":2}')

    assert payloads(await reader.drain()) == [{"a": 1}, {"a": 2}]
    reader.path.write_text('{"a":1}\n{"a":2}\n{"a":3}\n')
    assert payloads(await reader.drain()) == [{"a": 3}]


@pytest.mark.shows("source:file.follow")
async def test_a_line_whose_end_is_missing_waits_for_it_while_following(reader: Reader) -> None:
    reader.path.write_text('{"a":1}\n{"a"')
    source = reader.source(follow=True)
    await source.connect()
    first = await collect(source, 1)
    assert not (await source.poll()).messages

    reader.append(":2}")

    assert payloads([*first, *await collect(source, 1)]) == [{"a": 1}, {"a": 2}]
    await source.aclose()


async def test_lines_of_our_own_sink_come_back_as_the_messages_they_were(reader: Reader) -> None:
    sink = FileSink.from_options(
        {"type": "file", "output": str(reader.path)},
        backend_context(file_roots=(reader.directory,)),
    )
    await sink.connect()
    await sink.publish([complete_message()])
    await sink.aclose()

    (message,) = messages_of(await reader.drain())

    assert_same_message(message, complete_message())


async def test_cloudevents_of_our_own_sink_come_back_where_that_is_asked_for(
    reader: Reader,
) -> None:
    sink = FileSink.from_options(
        {"type": "file", "output": str(reader.path), "content": "cloudevents"},
        backend_context(file_roots=(reader.directory,)),
    )
    await sink.connect()
    await sink.publish(numbered(1))
    await sink.aclose()

    (message,) = messages_of(await reader.drain(content="cloudevents"))

    assert_same_message(message, numbered(1)[0])


@pytest.mark.parametrize(
    "line",
    [
        '{"v":1,"dedup_key":"theirs","payload":{}}',
        '{"v":2,"dedup_key":"theirs","key":null,"subject":"","op":"insert","payload":{},'
        '"is_full_refresh":false,"stream_table":"","outbox_id":null,"refresh_id":null,'
        '"created_at":null,"headers":{}}',
        '{"v":1,"dedup_key":"theirs","key":null,"subject":"","op":"insert","payload":{},'
        '"is_full_refresh":false,"stream_table":"","outbox_id":null,"refresh_id":null,'
        '"created_at":null,"headers":{},"more":1}',
        '{"v":1,"dedup_key":"theirs","key":null,"subject":"","op":"burn","payload":{},'
        '"is_full_refresh":false,"stream_table":"","outbox_id":null,"refresh_id":null,'
        '"created_at":null,"headers":{}}',
    ],
)
async def test_a_line_that_differs_from_our_envelope_in_anything_is_a_payload(
    reader: Reader, line: str
) -> None:
    reader.append(line)

    (message,) = messages_of(await reader.drain())

    assert message.payload == line.encode()
    assert message.dedup_key == "theirs"


@pytest.mark.shows("source:file.content")
async def test_content_payload_looks_into_no_line(reader: Reader) -> None:
    sink = FileSink.from_options(
        {"type": "file", "output": str(reader.path)},
        backend_context(file_roots=(reader.directory,)),
    )
    await sink.connect()
    await sink.publish(numbered(1))
    await sink.aclose()

    (message,) = messages_of(await reader.drain(content="payload"))

    assert json.loads(message.payload)["payload"] == {"number": 0}
    assert message.dedup_key == "m:0"


async def test_content_envelope_refuses_other_lines(reader: Reader) -> None:
    reader.append('{"a":1}')

    (batch,) = await reader.drain(content="envelope")

    assert not batch.messages
    assert "envelope" in str(batch.rejected[0].error)


async def test_the_dedup_key_is_the_lines_own_or_its_place(reader: Reader) -> None:
    reader.append(
        '{"dedup_key":"own"}', '{"dedup_key":17}', '{"dedup_key":null}', '{"dedup_key":{}}', "[1]"
    )

    keys = dedup_keys(messages_of(await reader.drain()))

    assert keys[:2] == ["own", "17"]
    names = {key.rsplit(":", 1)[0] for key in keys[2:]}
    assert len(names) == 1
    assert names.pop().startswith("in.jsonl:")
    assert [key.rsplit(":", 1)[1] for key in keys[2:]] == ["37", "56", "73"]


async def test_the_subject_of_a_plain_line_is_the_files_name(reader: Reader) -> None:
    reader.append("{}")

    (message,) = messages_of(await reader.drain())

    assert message.subject == "in.jsonl"


@pytest.mark.shows("error:MessageUndecodable")
async def test_a_line_that_does_not_decode_costs_only_itself(reader: Reader) -> None:
    reader.path.write_bytes(b'{"a":1}\n{"a":\n{"a":"\xff"}\n\n  \r\n{"a":2}\r\n')

    batches = await reader.drain()

    assert payloads(batches) == [{"a": 1}, {"a": 2}]
    refused = [rejected.message.payload for batch in batches for rejected in batch.rejected]
    assert refused == [b'{"a":', b'{"a":"\xff"}']


async def test_a_byte_order_mark_is_not_part_of_the_first_line(reader: Reader) -> None:
    reader.path.write_bytes(b'\xef\xbb\xbf{"a":1}\n')

    assert payloads(await reader.drain()) == [{"a": 1}]


@pytest.mark.shows("source:file.max_line_bytes", "error:MessageTooLarge")
async def test_a_line_above_the_limit_is_refused_and_its_beginning_kept(reader: Reader) -> None:
    huge = '"' + "x" * 3_000_000 + '"'
    reader.append('{"a":1}', huge, '{"a":2}', '"' + "y" * 150_000 + '"')

    batches = await reader.drain(max_line_bytes=100_000)

    assert payloads(batches) == [{"a": 1}, {"a": 2}]
    refused = [rejected for batch in batches for rejected in batch.rejected]
    assert [rejected.message.payload[:2] for rejected in refused] == [b'"x', b'"y']
    assert all(len(rejected.message.payload) == 65536 for rejected in refused)
    assert all(isinstance(rejected.error, MessageTooLarge) for rejected in refused)
    assert "100000" in str(refused[0].error)


async def test_a_rotated_file_is_read_to_its_end_before_its_successor(reader: Reader) -> None:
    reader.append('{"a":1}', '{"a":2}')
    source = reader.source(follow=True, batch_size=1)
    await source.connect()
    batches = await collect(source, 1)
    rotated = reader.directory / "in.jsonl.1"

    reader.path.rename(rotated)
    reader.append('{"a":4}')
    reader.append('{"a":3}', path=rotated)
    batches += await collect(source, 3)

    assert payloads(batches) == [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}]
    assert len(set(dedup_keys(messages_of(batches)))) == 4
    for batch in batches:
        await source.acknowledge(batch)
    await source.aclose()
    again = reader.source(follow=True)
    await again.connect()
    reader.append('{"a":5}')
    assert payloads(await collect(again, 1)) == [{"a": 5}]
    await again.aclose()


async def test_a_rotated_files_last_line_counts_even_without_line_break(reader: Reader) -> None:
    reader.path.write_text('{"a":1}')
    source = reader.source(follow=True)
    await source.connect()
    assert not (await source.poll()).messages

    reader.path.rename(reader.directory / "in.jsonl.1")
    reader.append('{"a":2}')

    assert payloads(await collect(source, 2)) == [{"a": 1}, {"a": 2}]
    await source.aclose()


async def test_a_rotated_files_writer_may_finish_a_little_later(reader: Reader) -> None:
    reader.append('{"a":1}')
    source = reader.source(follow=True)
    await source.connect()
    batches = await collect(source, 1)
    rotated = reader.directory / "in.jsonl.1"
    reader.path.rename(rotated)
    reader.append('{"a":3}')
    collecting = asyncio.create_task(collect(source, 2))
    await asyncio.wait([collecting], timeout=0.3)

    reader.append('{"a":2}', path=rotated)

    assert payloads([*batches, *await collecting]) == [{"a": 1}, {"a": 2}, {"a": 3}]
    await source.aclose()


async def test_several_rotations_while_nobody_reads_lose_nothing(reader: Reader) -> None:
    reader.append('{"a":1}', '{"a":2}')
    source = reader.source(follow=True, batch_size=1)
    await source.connect()
    (first,) = await collect(source, 1)
    await source.acknowledge(first)
    await source.aclose()

    reader.path.rename(reader.directory / "in.jsonl.2")
    reader.append('{"a":3}', path=reader.directory / "in.jsonl.1")
    reader.append('{"a":4}')
    again = reader.source(follow=True)
    await again.connect()

    assert payloads(await collect(again, 3)) == [{"a": 2}, {"a": 3}, {"a": 4}]
    await again.aclose()


async def test_a_followed_file_that_is_away_for_a_moment_is_waited_for(reader: Reader) -> None:
    reader.append('{"a":1}')
    source = reader.source(follow=True)
    await source.connect()
    (batch,) = await collect(source, 1)
    await source.acknowledge(batch)
    await source.aclose()
    reader.path.unlink()
    await source.connect()
    assert await source.is_healthy()
    assert not (await source.poll()).messages

    reader.append('{"a":1}')

    (again,) = await collect(source, 1)
    assert dedup_keys(again.messages) != dedup_keys(batch.messages)
    await source.aclose()


@pytest.mark.parametrize("is_open_meanwhile", [True, False])
async def test_a_file_that_was_cut_back_and_written_again_gives_new_messages(
    reader: Reader, is_open_meanwhile: bool
) -> None:
    reader.append('{"a":1}', '{"a":2}')
    source = reader.source(follow=True)
    await source.connect()
    (batch,) = await collect(source, 2)
    await source.acknowledge(batch)
    if not is_open_meanwhile:
        await source.aclose()

    os.truncate(reader.path, 0)
    reader.append('{"a":1}')
    if not is_open_meanwhile:
        await source.connect()
    (again,) = await collect(source, 1)

    assert payloads([again]) == [{"a": 1}]
    assert dedup_keys(again.messages)[0] not in dedup_keys(batch.messages)
    await source.aclose()


@pytest.mark.parametrize("is_open_meanwhile", [True, False])
@pytest.mark.parametrize(
    "lines",
    [['{"b":1}', '{"b":2}'], ['{"b":1}', '{"b":2}', '{"b":3}'], ['{"a":1}', '{"b":2}', "7"]],
)
async def test_a_file_that_is_overwritten_in_place_is_another_one_however_long_it_is(
    reader: Reader, lines: list[str], is_open_meanwhile: bool
) -> None:
    reader.append('{"a":1}', '{"a":2}')
    source = reader.source(follow=True)
    await source.connect()
    (batch,) = await collect(source, 2)
    await source.acknowledge(batch)
    if not is_open_meanwhile:
        await source.aclose()
    before = reader.path.stat().st_ino

    reader.path.write_text("".join(f"{line}\n" for line in lines))
    if not is_open_meanwhile:
        await source.connect()
    again = await collect(source, len(lines))

    assert reader.path.stat().st_ino == before
    assert payloads(again) == [json.loads(line) for line in lines]
    assert not set(dedup_keys(messages_of(again))) & set(dedup_keys(batch.messages))
    await source.aclose()


async def test_a_writer_that_takes_back_an_unfinished_line_repeats_nothing(
    reader: Reader,
) -> None:
    reader.append('{"a":1}')
    source = reader.source(follow=True)
    await source.connect()
    (batch,) = await collect(source, 1)
    await source.acknowledge(batch)
    sound_bytes = reader.path.stat().st_size
    with reader.path.open("a", encoding="utf-8") as file:
        file.write('{"a":2')
    assert (await source.poll()).is_empty

    # As our own sink does when it opens the file again after a crash.
    os.truncate(reader.path, sound_bytes)
    assert (await source.poll()).is_empty
    reader.append('{"a":3}')
    (following,) = await collect(source, 1)

    assert payloads([following]) == [{"a": 3}]
    await source.aclose()


async def test_a_replaced_file_is_read_from_its_beginning(reader: Reader) -> None:
    reader.append('{"a":1}')
    await reader.drain()
    reader.append('{"a":1}', '{"a":2}', path=reader.directory / "new")
    (reader.directory / "new").replace(reader.path)

    assert payloads(await reader.drain()) == [{"a": 1}, {"a": 2}]


async def test_a_rejected_batch_voids_those_polled_behind_it(reader: Reader) -> None:
    reader.append('{"a":1}', '{"a":2}', '{"a":3}')
    source = reader.source(batch_size=1)
    await source.connect()
    first, second = await collect(source, 2)

    await source.reject(first)
    await source.acknowledge(second)

    assert reader.catalog.cursors == {}
    assert payloads(await collect(source, 3)) == [{"a": 1}, {"a": 2}, {"a": 3}]
    await source.aclose()


async def test_a_reject_beside_a_poll_that_runs_loses_nothing(reader: Reader) -> None:
    reader.append(*(f'{{"a":{number}}}' for number in range(50)))
    source = reader.source(batch_size=1, follow=True)
    await source.connect()
    settled: list[Batch] = []

    async with asyncio.timeout(20):
        while len(settled) < 50:
            batch = await source.poll()
            if batch.is_empty:
                continue
            following = asyncio.create_task(source.poll())
            await asyncio.sleep(0)
            await source.reject(batch)
            again = await following
            if again.is_empty:
                (again,) = await collect(source, 1)
            await source.acknowledge(again)
            settled.append(again)

    assert payloads(settled) == [{"a": number} for number in range(50)]
    await source.aclose()


async def test_a_source_that_lost_its_pipeline_cannot_move_the_position(reader: Reader) -> None:
    reader.append('{"a":1}')
    old, new = reader.source(), reader.source()
    await old.connect()
    (batch,) = await collect(old, 1)
    await new.connect()

    with pytest.raises(OwnershipLost):
        await old.acknowledge(batch)

    assert payloads(await collect(new, 1)) == [{"a": 1}]
    await old.aclose()
    await new.aclose()


async def test_a_remembered_position_that_makes_no_sense_is_said(reader: Reader) -> None:
    reader.append('{"a":1}')
    reader.catalog.cursors["pipeline", f"file:{reader.path.resolve()}"] = b'{"offset":"x"}'
    source = reader.source()

    with pytest.raises(PositionLost, match=r"in\.jsonl"):
        await source.connect()
    await source.aclose()


@pytest.mark.parametrize("follow", [True, False])
async def test_a_file_that_never_existed_is_missing(reader: Reader, follow: bool) -> None:
    source = reader.source(follow=follow)

    with pytest.raises(DestinationMissing, match=r"in\.jsonl"):
        await source.connect()
    await source.aclose()


async def test_a_named_pipe_as_input_is_refused(reader: Reader) -> None:
    os.mkfifo(reader.path)
    source = reader.source()

    with pytest.raises(ConfigurationError, match="not a regular file"):
        await source.connect()
    await source.aclose()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"input": None}, "source.input is missing"),
        ({"input": "/etc/passwd"}, "files.roots"),
        ({"type": "stdin"}, "source.input does not go with type stdin"),
        ({"type": "stdin", "input": None, "follow": True}, "source.follow does not go"),
        ({"folow": True}, "did you mean follow"),
        ({"max_line_bytes": 0}, "source.max_line_bytes"),
        ({"content": "xml"}, "source.content"),
    ],
)
def test_wrong_options_are_named(reader: Reader, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        reader.source_with(options)

    assert said in str(raised.value)


async def test_a_followed_file_that_another_writes_is_read_while_it_rotates(
    reader: Reader,
) -> None:
    sink = FileSink.from_options(
        {"type": "file", "output": str(reader.path), "rotate_bytes": 5000},
        backend_context(file_roots=(reader.directory,)),
    )
    await sink.connect()
    await sink.publish(numbered(1))
    source = reader.source(follow=True)
    await source.connect()
    arrived: list[RelayMessage] = []

    async def write() -> None:
        for start in range(1, 100, 11):
            await sink.publish(numbered(11, start=start))

    async def read() -> list[RelayMessage]:
        arrived.extend((await source.poll()).messages)
        return arrived

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        reading = tasks.create_task(until(read, 100))

    assert dedup_keys(reading.result()) == dedup_keys(numbered(100))
    await sink.aclose()
    await source.aclose()
