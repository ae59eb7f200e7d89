"""The file sink: formats, rotation, what a crash leaves, and what the system refuses."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from relay.backends.files import FileSink
from relay.backends.files.format import CSV_COLUMNS, Csv, file_format
from relay.backends.files.output import FileOutput
from relay.backends.files.stdout import StreamOutput
from relay.errors import (
    ConfigurationError,
    DestinationMissing,
    NotConnected,
    Outage,
)
from relay.message import RelayMessage
from relay.template import compile_template
from tests.contract.evidence import complete_message, numbered
from tests.contract.surroundings import backend_context
from tests.servers.process import REPOSITORY


def build(directory: Path, **options: object) -> FileSink:
    context = backend_context(file_roots=(directory,), dedup_namespace="shop")
    complete = {"type": "file", "output": str(directory / "out"), **options}
    return FileSink.from_options(complete, context)


async def write(directory: Path, messages: Sequence[RelayMessage], **options: object) -> None:
    sink = build(directory, **options)
    await sink.connect()
    result = await sink.publish(messages)
    assert not result.failures
    await sink.aclose()


def rotated(directory: Path) -> list[Path]:
    """The rotated files, oldest first."""
    return sorted(directory.glob("out.*"), key=lambda path: -int(path.suffix[1:]))


def dedup_keys_in(path: Path) -> list[str]:
    return [json.loads(line)["dedup_key"] for line in path.read_text().splitlines()]


@pytest.mark.shows("sink:file.output")
async def test_jsonl_holds_one_envelope_a_line(tmp_path: Path) -> None:
    await write(tmp_path, [complete_message()])

    (line,) = (tmp_path / "out").read_text().splitlines()
    envelope = json.loads(line)
    assert envelope["v"] == 1
    assert envelope["dedup_key"] == "orders:7:0"
    assert envelope["payload"]["note"] == 'a "b", c\n☃ 🦊'
    assert line.index('"n":1.50') > 0


async def test_a_payload_with_line_breaks_stays_on_one_line(tmp_path: Path) -> None:
    message = RelayMessage(dedup_key="a", payload=b'{\r\n "x": "a\\nb"\n}')

    await write(tmp_path, [message, *numbered(1)])

    lines = (tmp_path / "out").read_bytes().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0])["payload"] == {"x": "a\nb"}


@pytest.mark.shows("sink:file.content")
async def test_content_payload_writes_the_rows_alone(tmp_path: Path) -> None:
    await write(tmp_path, numbered(2), content="payload")

    assert (tmp_path / "out").read_bytes() == b'{"number":0}\n{"number":1}\n'


async def test_content_cloudevents_writes_events_with_the_namespace(tmp_path: Path) -> None:
    await write(tmp_path, numbered(1), content="cloudevents")

    event = json.loads((tmp_path / "out").read_text())
    assert event["specversion"] == "1.0"
    assert event["source"] == "/shop/orders"


@pytest.mark.shows("sink:file.format")
async def test_json_pretty_is_indented_documents_that_parse_one_after_another(
    tmp_path: Path,
) -> None:
    await write(tmp_path, [complete_message(), *numbered(2)], format="json_pretty")

    documents = (tmp_path / "out").read_text().split("\n\n")
    assert documents.pop() == ""
    assert [json.loads(document)["dedup_key"] for document in documents] == [
        "orders:7:0",
        "m:0",
        "m:1",
    ]
    assert '\n  "v": 1' in documents[0]


async def test_csv_parses_back_with_all_columns(tmp_path: Path) -> None:
    awkward = RelayMessage(dedup_key='a,"b"', key="x\r\ny", payload=b'{"t":"a,\\"b"}')
    await write(tmp_path, [complete_message(), awkward], format="csv")
    await write(tmp_path, numbered(1), format="csv")

    with (tmp_path / "out").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert tuple(rows[0]) == CSV_COLUMNS
    assert [row["dedup_key"] for row in rows] == ["orders:7:0", 'a,"b"', "m:0"]
    assert rows[1]["key"] == "x\r\ny"
    assert json.loads(rows[1]["payload"]) == {"t": 'a,"b'}
    assert rows[0]["is_full_refresh"] == "true"
    assert rows[0]["created_at"] == "2025-03-30T02:30:15.123456+00:00"
    assert json.loads(rows[0]["headers"]).keys() == {"traceparent"}


@pytest.mark.shows("sink:file.subject_template", "sink:file.routing")
async def test_the_subject_follows_the_template_and_the_routing(tmp_path: Path) -> None:
    sink = build(tmp_path, subject_template="shop.{stream_table}", routing={"delete": "gone"})

    assert sink.subject_of(numbered(1)[0]) == "shop.orders"
    assert sink.subject_of(RelayMessage(dedup_key="a", payload=b"{}", op="delete")) == "gone"


@pytest.mark.parametrize(
    "options",
    [
        {"format": "jsonl", "content": "payload"},
        {"format": "json_pretty", "content": "payload"},
        {"format": "csv"},
    ],
)
async def test_an_unfinished_end_is_taken_away_wherever_the_crash_cut_it(
    tmp_path: Path, options: dict[str, str]
) -> None:
    awkward = [
        RelayMessage(dedup_key=f"k{number}", key='"\r\n"', payload=b'{"a":["x\\n\\ny",{}]}')
        for number in range(2)
    ]
    await write(tmp_path, awkward, **options)
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").unlink()
    await write(tmp_path, awkward[:1], **options)
    first = (tmp_path / "out").read_bytes()
    second = whole.removeprefix(first)
    header = Csv.header if options["format"] == "csv" else b""

    for end in range(len(whole)):
        (tmp_path / "out").write_bytes(whole[:end])
        await write(tmp_path, awkward[1:], **options)
        written = (tmp_path / "out").read_bytes()
        kept = written.removesuffix(second)
        # A document is complete as soon as only its terminator, two bytes at most, is missing.
        complete = [part for part in (header, first, whole) if len(part) <= end + 2]
        sound = [part for part in (header, first) if len(part) <= end]
        assert kept in {b"".join(complete[-1:]), b"".join(sound[-1:]) or header}, end


async def test_a_line_that_only_lacks_its_line_break_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b'{"theirs":1}')

    await write(tmp_path, numbered(1), content="payload")

    assert (tmp_path / "out").read_bytes() == b'{"theirs":1}\n{"number":0}\n'


@pytest.mark.parametrize("format_", ["json_pretty", "csv"])
async def test_a_file_of_another_format_is_refused_and_left_alone(
    tmp_path: Path, format_: str
) -> None:
    await write(tmp_path, numbered(3))
    before = (tmp_path / "out").read_bytes()
    sink = build(tmp_path, format=format_)

    with pytest.raises(ConfigurationError, match="the file"):
        await sink.connect()

    assert (tmp_path / "out").read_bytes() == before
    await sink.aclose()


async def test_a_csv_record_end_across_two_chunks_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(tmp_path, numbered(6), format="csv")
    whole = (tmp_path / "out").read_bytes()
    for chunk in range(2, 90):
        monkeypatch.setattr("relay.backends.files.format._CHUNK_BYTES", chunk)
        (tmp_path / "out").write_bytes(whole + b'm:7,"a\r\nb')
        sink = build(tmp_path, format="csv")

        await sink.connect()
        await sink.aclose()

        assert (tmp_path / "out").read_bytes() == whole


@pytest.mark.shows("sink:file.rotate_bytes")
async def test_rotation_keeps_lines_whole_and_numbers_the_youngest_one(tmp_path: Path) -> None:
    sink = build(tmp_path, rotate_bytes=1000)
    await sink.connect()
    await sink.publish(numbered(20))
    await sink.publish(numbered(20, start=20))
    await sink.aclose()

    files = rotated(tmp_path)
    assert len(files) > 5
    keys = [key for path in [*files, tmp_path / "out"] for key in dedup_keys_in(path)]
    assert keys == [message.dedup_key for message in numbered(40)]
    assert all(path.stat().st_size <= 1000 for path in files)


@pytest.mark.shows("sink:file.rotate_keep")
async def test_rotation_keeps_no_more_files_than_asked_for(tmp_path: Path) -> None:
    (tmp_path / "out.3").write_text("left by an earlier setting")
    (tmp_path / "out.1").write_text("older")
    (tmp_path / "out.2").write_text("oldest")

    await write(tmp_path, numbered(40), rotate_bytes=1000, rotate_keep=2)

    assert [path.name for path in rotated(tmp_path)] == ["out.2", "out.1"]
    assert dedup_keys_in(tmp_path / "out")[-1] == "m:39"


async def test_a_gap_that_a_crash_left_while_rotating_is_filled_without_loss(
    tmp_path: Path,
) -> None:
    (tmp_path / "out").write_bytes(b'{"a":"now"}\n')
    (tmp_path / "out.2").write_bytes(b'{"a":"older"}\n')

    await write(tmp_path, numbered(1), rotate_bytes=10, content="payload")

    assert (tmp_path / "out.1").read_bytes() == b'{"a":"now"}\n'
    assert (tmp_path / "out.2").read_bytes() == b'{"a":"older"}\n'


async def test_a_message_above_the_rotation_size_gets_a_file_of_its_own(tmp_path: Path) -> None:
    await write(tmp_path, numbered(2), rotate_bytes=1)

    assert dedup_keys_in(tmp_path / "out.1") == ["m:0"]
    assert dedup_keys_in(tmp_path / "out") == ["m:1"]


async def test_each_rotated_csv_file_has_the_header_line(tmp_path: Path) -> None:
    await write(tmp_path, numbered(4), rotate_bytes=250, format="csv")

    assert rotated(tmp_path)
    for path in [*rotated(tmp_path), tmp_path / "out"]:
        with path.open(newline="") as file:
            assert tuple(next(csv.reader(file))) == CSV_COLUMNS


async def test_a_second_writer_of_the_same_file_is_refused(tmp_path: Path) -> None:
    first, second = build(tmp_path), build(tmp_path, rotate_bytes=200)
    await first.connect()

    with pytest.raises(ConfigurationError, match="another pipeline or process"):
        await second.connect()

    await first.aclose()
    await second.connect()
    await second.publish(numbered(5))
    with pytest.raises(ConfigurationError, match="another pipeline or process"):
        await first.connect()
    await first.aclose()
    await second.aclose()


def test_a_file_that_is_renamed_while_it_is_being_opened_is_not_written(tmp_path: Path) -> None:
    class Overtaken(FileOutput):
        """Somebody rotates the file between its opening and its locking."""

        has_happened = False

        def _lock(self, file: int) -> None:
            if not self.has_happened:
                self.has_happened = True
                (tmp_path / "out").rename(tmp_path / "out.1")
            super()._lock(file)

    format_ = file_format("jsonl", "payload", "")
    output = Overtaken(str(tmp_path / "out"), (tmp_path,), format_)

    output.open()
    assert (tmp_path / "out").exists()
    output.append([b"{}\n"])
    output.close()

    assert (tmp_path / "out").read_bytes() == b"{}\n"
    assert (tmp_path / "out.1").read_bytes() == b""


async def test_a_file_that_was_moved_away_is_begun_again_at_its_path(tmp_path: Path) -> None:
    sink = build(tmp_path)
    await sink.connect()
    await sink.publish(numbered(1))
    (tmp_path / "out").rename(tmp_path / "moved")

    await sink.publish(numbered(1, start=1))

    assert dedup_keys_in(tmp_path / "moved") == ["m:0"]
    assert dedup_keys_in(tmp_path / "out") == ["m:1"]
    await sink.aclose()


@pytest.mark.shows("error:DestinationMissing")
async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    sink = build(tmp_path, output=str(tmp_path / "absent" / "out"))

    with pytest.raises(DestinationMissing, match="absent/out"):
        await sink.connect()
    await sink.aclose()


async def test_a_directory_as_output_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    sink = build(tmp_path)

    with pytest.raises(ConfigurationError, match="directory"):
        await sink.connect()
    await sink.aclose()


async def test_a_named_pipe_as_output_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out")
    sink = build(tmp_path)

    with pytest.raises(ConfigurationError, match="not a regular file"):
        await sink.connect()
    await sink.aclose()


@pytest.mark.parametrize(
    "output", ["/etc/out", "../out", "sub/../../out", ".", "link/out", "a\x00b", "\ud800"]
)
async def test_an_output_outside_of_the_allowed_directories_is_refused(
    tmp_path: Path, output: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)

    with pytest.raises(ConfigurationError) as raised:
        build(root, output=str(root / output) if not output.startswith("/") else output)

    assert "files.roots" in str(raised.value) or "can't be a file's name" in str(raised.value)


async def test_a_link_that_was_put_in_place_later_is_not_followed_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    sink = build(root)
    (root / "out").symlink_to(tmp_path / "outside")

    with pytest.raises(ConfigurationError, match="outside"):
        await sink.connect()

    assert not (tmp_path / "outside").exists()
    await sink.aclose()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"type": "file", "output": None}, "sink.output is missing"),
        ({"type": "stdout"}, "does not go with type stdout"),
        ({"type": "stdout", "output": None, "rotate_bytes": 1}, "rotate_bytes does not go"),
        ({"format": "csv", "content": "payload"}, "sink.content does not go with format csv"),
        ({"rotate_keep": 3}, "sink.rotate_keep needs rotate_bytes"),
        ({"rotate_bytes": 0}, "sink.rotate_bytes"),
        ({"format": "xml"}, "sink.format"),
        ({"ouput": "x"}, "did you mean output"),
        ({"subject_template": "{stream_tabel}"}, "did you mean {stream_table}"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        build(tmp_path, **options)

    assert said in str(raised.value)


async def run_script(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, whose limits and user it may change."""
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script, str(directory)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )


WITHOUT_PERMISSION = """
import asyncio, os, sys
from pathlib import Path
from relay.errors import AuthenticationRefused
from tests.unit.test_files_sink import build

async def main():
    # Made before, because what is imported later could not be read any more.
    sink = build(Path(sys.argv[1]))
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    try:
        await sink.connect()
    except AuthenticationRefused as error:
        print(error)

asyncio.run(main())
"""


async def test_what_the_user_may_not_write_is_said_with_its_path(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)

    result = await run_script(WITHOUT_PERMISSION, closed)

    assert "closed/out" in result.stdout, result.stderr
    assert "access" in result.stdout


FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
from relay.errors import Outage
from tests.contract.evidence import numbered
from tests.unit.test_files_sink import build

async def main():
    sink = build(Path(sys.argv[1]))
    await sink.connect()
    await sink.publish(numbered(5))
    size = Path(sys.argv[1], "out").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
    try:
        await sink.publish(numbered(5, start=5))
    except Outage as error:
        print("outage:", error)
    assert not await sink.is_healthy()
    assert Path(sys.argv[1], "out").stat().st_size == size
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await sink.connect()
    await sink.publish(numbered(5, start=5))
    await sink.aclose()

asyncio.run(main())
"""


async def test_a_file_that_can_grow_no_more_is_an_outage_and_leaves_no_half_line(
    tmp_path: Path,
) -> None:
    result = await run_script(FULL_DISK, tmp_path)

    assert result.returncode == 0, result.stderr
    assert "outage:" in result.stdout
    assert dedup_keys_in(tmp_path / "out") == [message.dedup_key for message in numbered(10)]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


class Pipe:
    """A pipe in the place of stdout."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.stream = StreamOutput(self.writer, "stdout")

    def sink(self) -> FileSink:
        format_ = file_format("jsonl", "payload", "")
        return FileSink(self.stream.writer(b""), format_, compile_template("all"), "stdout")


async def read_lines(reader: int, last: bytes) -> list[bytes]:
    def read() -> bytes:
        data = b""
        while not data.endswith(last + b"\n"):
            chunk = os.read(reader, 65536)
            assert chunk
            data += chunk
        return data

    return (await asyncio.wait_for(asyncio.to_thread(read), 20)).splitlines()


async def test_lines_reach_the_reader_of_stdout_before_the_publish_returns() -> None:
    pipe = Pipe()
    sink = pipe.sink()
    await sink.connect()

    await sink.publish(numbered(3))

    assert os.read(pipe.reader, 65536).splitlines() == [m.payload for m in numbered(3)]
    await sink.aclose()
    os.close(pipe.reader)
    os.close(pipe.writer)


async def test_a_reader_of_stdout_that_stalls_holds_up_its_publish_only() -> None:
    pipe = Pipe()
    sink, successor = pipe.sink(), pipe.sink()
    await sink.connect()
    large = [
        RelayMessage(dedup_key=str(number), payload=b'"%04d%s"' % (number, b"x" * 995))
        for number in range(500)
    ]

    publishing = asyncio.create_task(sink.publish(large))
    done, _ = await asyncio.wait([publishing], timeout=0.1)
    assert not done
    publishing.cancel()
    await asyncio.wait_for(sink.aclose(), 5)

    # The line in which writing stopped is completed first; no line is torn.
    await successor.connect()
    reading = asyncio.create_task(read_lines(pipe.reader, large[-1].payload))
    await successor.publish(large)
    lines = await reading
    assert all(len(line) == 1001 for line in lines)
    await successor.aclose()
    os.close(pipe.reader)
    os.close(pipe.writer)


async def test_a_closed_reader_of_stdout_is_an_outage() -> None:
    pipe = Pipe()
    sink = pipe.sink()
    await sink.connect()
    os.close(pipe.reader)

    with pytest.raises(NotConnected, match="nobody reads"):
        await sink.publish(numbered(1))

    assert not await sink.is_healthy()
    await sink.aclose()
    os.close(pipe.writer)


async def test_stdout_that_leads_to_a_file_is_written_there(tmp_path: Path) -> None:
    with (tmp_path / "redirected").open("wb") as file:
        stream = StreamOutput(file.fileno(), "stdout")
        format_ = file_format("csv", "envelope", "")
        sink = FileSink(stream.writer(format_.header), format_, compile_template("all"), "stdout")
        await sink.connect()
        await sink.publish(numbered(2))
        await sink.publish(numbered(1, start=2))
        await sink.aclose()

    with (tmp_path / "redirected").open(newline="") as file_again:
        assert [row["dedup_key"] for row in csv.DictReader(file_again)] == ["m:0", "m:1", "m:2"]


@pytest.mark.shows("sink:file.type")
def test_type_stdout_needs_no_path() -> None:
    sink = FileSink.from_options({"type": "stdout"}, backend_context())

    assert sink.subject_of(numbered(1)[0]) == "orders.insert"


def test_an_outage_is_what_an_unknown_error_of_the_system_is() -> None:
    from relay.backends.files.errors import file_errors

    with pytest.raises(Outage), file_errors("testing", "out"):
        raise OSError(9999, "unheard of")
