"""How the rows are shown: tables for people, JSON for machines, a chart for the documentation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

import msgspec
from rich.console import Console
from rich.table import Table

from relay import __version__
from scripts.benchmark.row import Row, Target

_HEADINGS: Final = ("row", "figure", "measured", "target", "")
_BAR_HEIGHT: Final = 22
_BAR_WIDTH: Final = 260
_LABEL_WIDTH: Final = 400
_MET, _MISSED = "#2f855a", "#c53030"


def print_table(rows: Sequence[Row], console: Console) -> None:
    """One line per target, and what was counted at the destination."""
    table = Table(title="Benchmarks")
    table.add_column(_HEADINGS[0], no_wrap=True)
    for heading in _HEADINGS[1:]:
        table.add_column(heading, justify="right" if heading == "measured" else "left")
    for row in rows:
        for line in _lines(row):
            table.add_row(*line)
        table.add_section()
    console.print(table)


def write_results(rows: Sequence[Row], directory: Path, load: float) -> Sequence[Path]:
    """Write ``results.json``, ``results.md`` and ``results.svg``; where they are.

    ``load``: the load average when the first row began, which tells what ran beside it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown, as_svg = (directory / f"results.{end}" for end in ("json", "md", "svg"))
    surroundings = {
        "version": __version__,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
    }
    results = {
        **surroundings,
        "is_met": all(row.is_met for row in rows),
        "rows": [
            {
                **msgspec.to_builtins(row),
                "is_met": row.is_met,
            }
            for row in rows
        ],
    }
    as_json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")
    lines = [_HEADINGS, ["---"] * len(_HEADINGS), *(line for row in rows for line in _lines(row))]
    as_markdown.write_text(
        ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in surroundings.items())
        + "\n\n"
        + "".join(f"| {' | '.join(line)} |\n" for line in lines),
        encoding="utf-8",
    )
    as_svg.write_text(_chart(rows), encoding="utf-8")
    return as_json, as_markdown, as_svg


def _lines(row: Row) -> Iterator[Sequence[str]]:
    """What a table says of a row, under `_HEADINGS`."""
    for target in row.targets:
        verdict = "met" if target.is_met else "MISSED"
        measured = _amount(target.value, target.unit)
        yield row.name, target.figure, measured, _bound(target), verdict
    sent, received = f"{row.counted['sent']:,}", f"{row.counted['received']:,}"
    verdict = "met" if row.is_complete else "MISSED"
    yield row.name, "events at the destination", received, sent, verdict


def _chart(rows: Sequence[Row]) -> str:
    """One bar per target: how far the figure is from its bound, which is the line in the middle."""
    bars: list[str] = []
    for row in rows:
        for target in row.targets:
            top = _BAR_HEIGHT * (len(bars) + 1)
            length = min(target.value / target.limit, 2.0) * _BAR_WIDTH / 2
            label = f"{row.name}: {target.figure}"
            value = f"{_amount(target.value, target.unit)} ({_bound(target)})"
            bars.append(
                f'<text x="{_LABEL_WIDTH / 2 - 8}" y="{top + 14}" text-anchor="end">'
                f"{escape(label)}</text>"
                f'<rect x="{_LABEL_WIDTH / 2}" y="{top + 3}" width="{length:.0f}"'
                f' height="{_BAR_HEIGHT - 6}" fill="{_MET if target.is_met else _MISSED}"/>'
                f'<text x="{_LABEL_WIDTH / 2 + _BAR_WIDTH + 8}" y="{top + 14}">'
                f"{escape(value)}</text>"
            )
    height = _BAR_HEIGHT * (len(bars) + 2)
    middle = _LABEL_WIDTH / 2 + _BAR_WIDTH / 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL_WIDTH + _BAR_WIDTH + 60}"'
            f' height="{height}" font-family="sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            *bars,
            f'<line x1="{middle}" x2="{middle}" y1="{_BAR_HEIGHT}" y2="{height - _BAR_HEIGHT}"'
            ' stroke="black" stroke-dasharray="3 3"/>',
            "</svg>\n",
        ]
    )


def _bound(target: Target) -> str:
    return f"{target.bound} {_amount(target.limit, target.unit)}"


def _amount(value: float, unit: str) -> str:
    number = f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}"
    return f"{number} {unit}".strip() if unit != "/s" else f"{number}/s"
