"""The benchmarks run and count at the destination; how fast they are is not judged here."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmark.backends import SINKS, SOURCES
from scripts.benchmark.report import write_results
from scripts.benchmark.row import Row, Target
from tests.servers.finding import leave_out
from tests.servers.process import REPOSITORY

RUN_TIMEOUT_S = 180.0
MET, MISSED, MISUSED, SERVER_MISSING = 0, 1, 2, 3
THROUGHPUTS = [*(f"to-{name}" for name in SINKS), *(f"from-{name}" for name in SOURCES)]


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

    if code == SERVER_MISSING:
        leave_out(err.strip())
    assert code in (MET, MISSED), err
    assert name in out, err
    found = results(output)
    assert found["is_met"] is (code == MET)
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


async def test_backfill_counts_the_rows_in_the_outbox_and_times_writers(tmp_path: Path) -> None:
    small = ("--events", "100", "--seconds", "0.5", "--runs", "1")

    row = await measured("backfill", *small, output=tmp_path / "results")

    assert row["counted"] == {"sent": 1000, "received": 1000}
    assert row["figures"]["rows_per_s"] > 0
    assert row["figures"]["failed_writers"] == 0
    assert row["figures"]["alone_p99_ms"] > 0


@pytest.mark.parametrize("name", ["latency", "latency-reverse"])
async def test_latency_sees_every_event_at_its_destination(tmp_path: Path, name: str) -> None:
    row = await measured(name, "--seconds", "0.25", output=tmp_path / "results")

    assert row["counted"] == {"sent": 150, "received": 150}
    assert 0 < row["figures"]["p50_ms"] <= row["figures"]["p95_ms"] <= row["figures"]["p99_ms"]


@pytest.mark.parametrize("name", THROUGHPUTS)
async def test_a_throughput_below_its_part_of_the_floor_is_told_and_ends_with_1(
    tmp_path: Path, name: str
) -> None:
    unreachable = ("--events", "300", "--runs", "1", "--of-floor", "1e9")

    row = await measured(name, *unreachable, output=tmp_path / "results")

    assert row["counted"] == {"sent": 300, "received": 300}
    [run] = row["runs"]
    assert run["per_s"] > 0
    assert run["floor_per_s"] > 0
    assert run["of_floor"] == pytest.approx(run["per_s"] / run["floor_per_s"])
    targets = {target["figure"].split(",")[0]: target for target in row["targets"]}
    assert targets["of the floor"]["value"] == pytest.approx(100 * run["of_floor"])
    assert targets["of the floor"]["value"] < targets["of the floor"]["limit"] == 1e11
    assert row["is_met"] is False


async def test_a_throughput_above_its_part_of_the_floor_ends_with_0(tmp_path: Path) -> None:
    reachable = ("--events", "3000", "--runs", "2", "--of-floor", "0.000001")

    row = await measured("to-file", *reachable, output=tmp_path / "results")

    assert row["counted"] == {"sent": 6000, "received": 6000}
    assert len(row["runs"]) == 2
    assert row["is_met"] is True


async def test_peers_that_are_not_installed_are_named_with_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEBEZIUM_SERVER_HOME", raising=False)
    monkeypatch.setenv("BENTO", "no-such-program")

    code, _, err = await bench("peers", output=tmp_path / "results")

    assert code == SERVER_MISSING
    assert "peers-to-jetstream is not measured" in err
    assert "peers-from-kafka is not measured" in err
    assert "DEBEZIUM_SERVER_HOME" in err
    assert "BENTO" in err


@pytest.mark.skipif(
    "DEBEZIUM_SERVER_HOME" not in os.environ and "BENTO" not in os.environ,
    reason="a program of others, which no run of the tests installs",
)
async def test_peers_take_turns_at_the_same_work(tmp_path: Path) -> None:
    row = await measured(
        "peers-to-jetstream", "--events", "400", "--runs", "1", output=tmp_path / "out"
    )

    programs = {figure.partition(": ")[0] for figure in row["figures"]}
    assert "relay" in programs
    assert len(programs) > 1
    assert row["counted"]["sent"] == row["counted"]["received"] == 600 * len(programs)
    assert row["figures"]["relay: overtaken"] == 0


async def test_an_unknown_row_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    code, _, err = await bench("frward", output=tmp_path / "results")

    assert code == MISUSED
    assert "forward" in err
    assert all(name in err for name in THROUGHPUTS)


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
    write_results([row(fast, 3), row(slow, 3)], tmp_path, load=0.5)
    assert results(tmp_path)["is_met"] is False
    assert results(tmp_path)["load_before"] == 0.5
    told = (tmp_path / "results.md").read_text()
    assert "| x | rate | 50.0 | at least 40.0 | met |" in told
    assert "| x | delay | 50.0 | below 40.0 | MISSED |" in told
