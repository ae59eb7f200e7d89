"""A process that writes through the file sink and is killed in the middle, again and again."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sys
from pathlib import Path

import pytest

from relay.backends.files import FileSink
from relay.message import RelayMessage
from tests.contract.surroundings import backend_context
from tests.servers.process import REPOSITORY

ROUNDS = 6

WRITER = """
import asyncio, sys
from pathlib import Path
from tests.unit.test_files_crash import build, message

async def main():
    path, format_, start = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    sink = build(path, format_)
    await sink.connect()
    while True:
        result = await sink.publish([message(number) for number in range(start, start + 40)])
        assert not result.failures
        start += 40
        print(start, flush=True)

asyncio.run(main())
"""


def build(path: Path, format_: str) -> FileSink:
    """A sink that rotates often, so that kills fall into rotations too."""
    return FileSink.from_options(
        {"type": "file", "output": str(path), "format": format_, "rotate_bytes": 300_000},
        backend_context(file_roots=(path.parent,)),
    )


def message(number: int) -> RelayMessage:
    """Large enough that a batch is written in many pages."""
    payload = json.dumps({"number": number, "text": 'a,"b"\n' * 200}).encode()
    return RelayMessage(dedup_key=f"m:{number}", key="a\r\nb", payload=payload)


def numbers_in(text: bytes, format_: str) -> list[int]:
    """The numbers of all events in a file; fails where one of them is torn."""
    if format_ == "csv":
        rows = csv.DictReader(io.StringIO(text.decode(), newline=""), strict=True)
        keys = [row["dedup_key"] for row in rows if json.loads(row["payload"])]
    else:
        separator = b"\n" if format_ == "jsonl" else b"\n\n"
        *documents, rest = text.split(separator)
        assert rest == b""
        keys = [json.loads(document)["dedup_key"] for document in documents]
    return [int(key.removeprefix("m:")) for key in keys]


def all_files(path: Path) -> list[Path]:
    """The rotated files and the file itself, oldest first."""
    rotated = path.parent.glob(f"{path.name}.*")
    return [*sorted(rotated, key=lambda found: -int(found.suffix[1:])), path]


@pytest.mark.parametrize("format_", ["jsonl", "json_pretty", "csv"])
async def test_a_killed_writer_leaves_no_torn_line_and_nothing_acknowledged_is_missing(
    tmp_path: Path, format_: str
) -> None:
    path = tmp_path / "out"
    acknowledged = 0

    for round_ in range(ROUNDS):
        writer = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", WRITER, str(path), format_, str(acknowledged)),
            stdout=asyncio.subprocess.PIPE,
            cwd=REPOSITORY,
        )
        assert writer.stdout is not None
        try:
            async with asyncio.timeout(60):
                for _ in range(5 + 3 * round_):
                    acknowledged = int(await writer.stdout.readline())
        finally:
            # At any point of the next write: the process goes on while the signal travels.
            writer.kill()
        said = (await writer.stdout.read()).split(b"\n")[:-1]
        acknowledged = int(said[-1]) if said else acknowledged
        await writer.wait()

    repaired = build(path, format_)
    await repaired.connect()
    await repaired.aclose()
    numbers = [
        number for found in all_files(path) for number in numbers_in(found.read_bytes(), format_)
    ]
    assert len(all_files(path)) > 1
    assert set(range(acknowledged)) <= set(numbers)
    # What repeats is what was written and not acknowledged, in order each time.
    first_seen = list(dict.fromkeys(numbers))
    assert first_seen == sorted(first_seen)
