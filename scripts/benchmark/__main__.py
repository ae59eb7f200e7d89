"""`scripts/bench [ROW …]`: measure, show, write, and say by the exit code whether all is met."""

from __future__ import annotations

import argparse
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import Progress

from scripts.benchmark.backends import SINKS, SOURCES, ServerMissing
from scripts.benchmark.backfill import backfill
from scripts.benchmark.capture import capture
from scripts.benchmark.fleet import claim_check, fleet, idle
from scripts.benchmark.forward import forward
from scripts.benchmark.group import group
from scripts.benchmark.latency import latency, latency_reverse
from scripts.benchmark.peers import peers_from_kafka, peers_to_jetstream
from scripts.benchmark.report import print_table, write_results
from scripts.benchmark.row import Row
from scripts.benchmark.shape import shape
from scripts.benchmark.sinks import TARGET_OF_FLOOR, to_destination
from scripts.benchmark.sources import from_origin

Measure = Callable[[argparse.Namespace, Callable[[str], None]], Awaitable[Row]]

MISSED, SERVER_MISSING = 1, 3


def _throughput(measure: Callable[..., Awaitable[Row]], backend: str) -> Measure:
    return lambda options, say: measure(
        backend,
        events=options.events,
        runs=options.runs,
        target_of_floor=options.of_floor,
        say=say,
    )


ROWS: dict[str, Measure] = {
    "forward": lambda options, say: forward(events=options.events, runs=options.runs, say=say),
    "group": lambda options, say: group(
        events=options.events, runs=options.runs, seconds=options.seconds, say=say
    ),
    "shape": lambda options, say: shape(events=options.events, runs=options.runs, say=say),
    "capture": lambda options, say: capture(seconds=options.seconds, runs=options.runs, say=say),
    "backfill": lambda options, say: backfill(
        events=options.events, seconds=options.seconds, runs=options.runs, say=say
    ),
    "latency": lambda options, say: latency(seconds=4 * options.seconds, say=say),
    "latency-reverse": lambda options, say: latency_reverse(seconds=4 * options.seconds, say=say),
    "claim-check": lambda _, say: claim_check(say=say),
    "fleet": lambda options, say: fleet(runs=options.runs, say=say),
    "idle": lambda options, say: idle(seconds=4 * options.seconds, say=say),
    **{f"to-{backend}": _throughput(to_destination, backend) for backend in SINKS},
    **{f"from-{backend}": _throughput(from_origin, backend) for backend in SOURCES},
    "peers-to-jetstream": lambda options, say: peers_to_jetstream(
        events=options.events, runs=options.runs, say=say
    ),
    "peers-from-kafka": lambda options, say: peers_from_kafka(
        events=options.events, runs=options.runs, say=say
    ),
}
PEERS = tuple(row for row in ROWS if row.startswith("peers-"))
# A request for each event takes minutes a run, and programs of others are seldom installed.
ON_DEMAND = frozenset((*PEERS, *(row for row in ROWS if row.endswith("-each"))))


def main() -> int:
    """Measure the rows that the command line names, else all but a few; the exit code."""
    options = _options()
    console, stderr = Console(), Console(stderr=True)
    load, _, _ = os.getloadavg()
    with Progress(
        console=stderr, transient=True, disable=not stderr.is_terminal, refresh_per_second=2
    ) as progress:
        rows, missing = uvloop.run(_measure(options, progress))
    if rows:
        print_table(rows, console)
        for path in write_results(rows, options.output, load):
            stderr.print(f"written: {path}")
    for name, reason in missing.items():
        stderr.print(f"{name} is not measured: {reason}", soft_wrap=True)
    if not all(row.is_met for row in rows):
        return MISSED
    return SERVER_MISSING if missing else 0


async def _measure(
    options: argparse.Namespace, progress: Progress
) -> tuple[list[Row], dict[str, str]]:
    """The rows, and why others can't be measured here."""
    wanted = [name for row in options.rows for name in (PEERS if row == "peers" else (row,))]
    names = list(dict.fromkeys(wanted)) or [row for row in ROWS if row not in ON_DEMAND]
    task = progress.add_task("", total=len(names))
    rows, missing = [], dict[str, str]()
    for name in names:
        progress.update(task, description=name)
        try:
            rows.append(await ROWS[name](options, progress.console.print))
        except ServerMissing as reason:
            missing[name] = str(reason)
        progress.advance(task)
    return rows, missing


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure the relay on servers of its own; exit code 1 when a target is missed.",
    )
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help=f"of {', '.join(ROWS)}, or peers for all peers-…; default all but peers-… and …-each",
    )
    parser.add_argument("--output", type=Path, default=Path("bench-results"), metavar="DIRECTORY")
    parser.add_argument("--runs", type=int, default=5, help="runs of a row, turns of capture")
    parser.add_argument("--events", type=int, default=100_000, help="events of a run")
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="of one load of capture; a latency takes 4 times",
    )
    parser.add_argument(
        "--of-floor",
        type=float,
        default=TARGET_OF_FLOOR,
        metavar="PART",
        help="of its floor that each to-… and from-… must reach; default 0.5",
    )
    options = parser.parse_args()
    unknown = sorted(set(options.rows) - {*ROWS, "peers"})
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}: choose from {', '.join(ROWS)}")
    if min(options.runs, options.events, options.seconds) <= 0:
        parser.error("--runs, --events and --seconds must be above 0")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
