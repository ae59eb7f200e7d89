"""The benchmarks run and count at the destination; how fast they are is not judged here."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from scripts.benchmark.report import write_results
from scripts.benchmark.row import Row, Target
from tests.servers.process import REPOSITORY

RUN_TIMEOUT_S = 180.0
MISUSED = 2


async def bench(*arguments: str, output: Path) -> tuple[int, str, str]:
    """Run the benchmarks as a person does; exit code, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scripts.benchmark", *arguments, "--output", str(output)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=output.parent,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    try:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def results(output: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((output / "results.json").read_text())
    return written


async def measured(name: str, *arguments: str, output: Path) -> dict[str, Any]:
    """The one row of a small run, whose exit code must be what its targets say."""
    code, out, err = await bench(name, *arguments, output=output)

    assert code in (0, 1), err
    assert name in out
    found = results(output)
    assert found["is_met"] is (code == 0)
    assert (output / "results.svg").read_text().startswith("<svg ")
    [row] = found["rows"]
    assert row["name"] == name
    return dict(row)


async def test_forward_finds_every_event_once_at_a_consumer_and_measures_the_floor(
    tmp_path: Path,
) -> None:
    row = await measured("forward", "--events", "500", "--runs", "1", output=tmp_path / "results")

    assert row["counted"] == {"sent": 500, "received": 500}
    assert row["figures"]["per_s"] > 0
    assert row["figures"]["floor_per_s"] > 0
    assert 200 < row["figures"]["body_bytes"] < 1000


async def test_capture_compares_commits_with_and_without_an_outbox(tmp_path: Path) -> None:
    row = await measured("capture", "--seconds", "1", "--runs", "1", output=tmp_path / "results")

    assert row["counted"]["sent"] == row["counted"]["received"] > 0
    for figure in ("plain_per_s", "alone", "beside_busy_relay", "while_delivered"):
        assert row["figures"][figure] > 0


async def test_latency_sees_every_committed_row_at_a_consumer(tmp_path: Path) -> None:
    row = await measured("latency", "--seconds", "0.25", output=tmp_path / "results")

    assert row["counted"] == {"sent": 150, "received": 150}
    assert 0 < row["figures"]["p50_ms"] <= row["figures"]["p95_ms"] <= row["figures"]["p99_ms"]


async def test_an_unknown_row_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    code, _, err = await bench("frward", output=tmp_path / "results")

    assert code == MISUSED
    assert "forward, capture, latency" in err


def test_a_missed_target_and_a_lost_event_are_both_told(tmp_path: Path) -> None:
    fast = Target(figure="rate", value=50.0, bound="at least", limit=40.0)
    slow = Target(figure="delay", value=50.0, bound="below", limit=40.0)

    def row(target: Target, received: int) -> Row:
        return Row(
            name="x",
            title="x",
            targets=[target],
            figures={},
            runs=[],
            counted={"sent": 3, "received": received},
        )

    assert row(fast, 3).is_met
    assert not row(slow, 3).is_met
    assert not row(fast, 2).is_met
    write_results([row(fast, 3), row(slow, 3)], tmp_path)
    assert results(tmp_path)["is_met"] is False
