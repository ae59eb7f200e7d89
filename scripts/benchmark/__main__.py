"""`scripts/bench [ROW …]`: measure, show, write, and say by the exit code whether all is met."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop
from rich.console import Console

from scripts.benchmark.capture import capture
from scripts.benchmark.forward import forward
from scripts.benchmark.latency import latency
from scripts.benchmark.report import print_table, write_results
from scripts.benchmark.row import Row

Measure = Callable[[argparse.Namespace, Callable[[str], None]], Awaitable[Row]]

ROWS: dict[str, Measure] = {
    "forward": lambda options, say: forward(events=options.events, runs=options.runs, say=say),
    "capture": lambda options, say: capture(seconds=options.seconds, runs=options.runs, say=say),
    "latency": lambda options, say: latency(seconds=4 * options.seconds, say=say),
}


def main() -> int:
    """Measure the rows that the command line names, all when it names none; the exit code."""
    options = _options()
    console, progress = Console(), Console(stderr=True)
    if progress.is_terminal:
        with progress.status("measuring"):
            rows = uvloop.run(_measure(options, progress.print))
    else:
        rows = uvloop.run(_measure(options, progress.print))
    print_table(rows, console)
    for path in write_results(rows, options.output):
        progress.print(f"written: {path}")
    return 0 if all(row.is_met for row in rows) else 1


async def _measure(options: argparse.Namespace, say: Callable[[str], None]) -> list[Row]:
    names = list(dict.fromkeys(options.rows)) or list(ROWS)
    return [await ROWS[name](options, say) for name in names]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure the relay on servers of its own; exit code 1 when a target is missed.",
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default all")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), metavar="DIRECTORY")
    parser.add_argument("--runs", type=int, default=5, help="runs of forward and turns of capture")
    parser.add_argument("--events", type=int, default=100_000, help="events of a run of forward")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of one load of capture; latency takes 4 times"
    )
    options = parser.parse_args()
    unknown = sorted(set(options.rows) - set(ROWS))
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}: choose from {', '.join(ROWS)}")
    if min(options.runs, options.events, options.seconds) <= 0:
        parser.error("--runs, --events and --seconds must be above 0")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
