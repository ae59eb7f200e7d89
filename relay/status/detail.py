"""The details of one pipeline: what it does, what was set, what it did last, what it could not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import msgspec
from rich.text import Text

from relay.board import PipelineStatus, RecentBatch
from relay.catalog import DeadLetterSummary, counted
from relay.status.fleet import PipelineLine
from relay.status.table import Signs, why
from relay.status.text import clean, clock, latency, wrapped

# The catalog fills these in, or the route says them already.
_NOT_SET_BY_ANYBODY = frozenset(
    {
        "config_version", "source_type", "sink_type", "source.type", "sink.type",
        "source.outbox_table",
    }
)  # fmt: skip
_MOST_OF_AN_ERROR = 2


def detail(
    line: PipelineLine,
    letters: Sequence[DeadLetterSummary],
    letter: DeadLetterSummary | None,
    width: int,
    rows: int,
    signs: Signs,
) -> list[Text]:
    """The most urgent first, in at most so many rows; dead letters leave half of them.

    ``letter`` is the selected one, which is shown in full as far as there is room.
    """
    lines = why(line, width)
    status = line.status
    if status is not None and status.last_error_at is not None and not lines:
        said = f"last error {clock(status.last_error_at)}: {status.last_error}"
        lines = wrapped(said, width, "yellow", most=_MOST_OF_AN_ERROR, indent=1)
    if line.dead_letters:
        keys = "d reads one, r tries all again" if letter is None else "d next, t tries it, r all"
        lines.append(Text(f" {_counted(line)}: {keys}", "bold"))
        lines += _dead_letters(letters, letter, width, rows, signs)
    right: list[str] = []
    if status is None:
        left = [f"{line.source} {signs.arrow} {line.sink}", _why_nobody_runs_it(line)]
    else:
        left = list(_facts(line, status))
        right = [*_outcome(status), *map(_batch, reversed(status.recent_batches))]
    settings = [Text(f" {text}", "dim") for text in _settings(line.settings)]
    facts = [*(Text(f" {text}") for text in left), *settings]
    half = min(max(text.cell_len for text in facts) + 2, width * 2 // 3)
    for one, other in zip_longest(facts, right):
        row = Text() if one is None else one
        row.truncate(half, overflow="ellipsis", pad=True)
        lines.append(Text.assemble(row, " ", other or ""))
    return lines[:rows]


def _why_nobody_runs_it(line: PipelineLine) -> str:
    what = "none of these relays runs it" if line.is_enabled else "paused: p resumes it"
    return f"{what}; {line.delivered:,} delivered before"


def _counted(line: PipelineLine) -> str:
    many = line.dead_letters != 1
    return f"{counted(line.dead_letters)} dead letter{'s, the latest' if many else ''}"


def _dead_letters(
    letters: Sequence[DeadLetterSummary],
    selected: DeadLetterSummary | None,
    width: int,
    rows: int,
    signs: Signs,
) -> Iterator[Text]:
    """From the selected one on, or else from the latest, as many as half of the rows hold."""
    at = 0 if selected is None else letters.index(selected)
    for letter in letters[at : at + max(1, rows // 2 // _MOST_OF_AN_ERROR)]:
        most = rows if letter is selected else _MOST_OF_AN_ERROR
        text = wrapped(_dead_letter(letter), width, "red", most=most, hanging=9)
        if letter is selected:
            text[0] = Text.assemble((f" {signs.mark} ", "bold"), text[0][3:])
        yield from text


def _dead_letter(letter: DeadLetterSummary) -> str:
    again = ", is tried again" if letter.retry_requested_at is not None else ""
    times = "" if letter.attempts == 1 else f", {letter.attempts} attempts"
    of = "" if letter.subject is None else f" of {letter.subject}"
    when, kind = clock(letter.last_failed_at), letter.error_kind
    return f"{when} id {letter.id}{of} ({kind}{times}{again}): {letter.error}"


def _facts(line: PipelineLine, status: PipelineStatus) -> Iterator[str]:
    yield f"{status.state.value} since {clock(status.since)}, at {clean(line.owner)}"
    for side, name, is_connected in (
        ("source", status.source, status.source_connected),
        ("sink", status.sink, status.sink_connected),
    ):
        yield f"{side} {name}: {'connected' if is_connected else 'not connected'}"
    yield (
        f"{line.delivered:,} delivered, {status.duplicates:,} duplicates,"
        f" {status.dead_lettered:,} dead-lettered"
        + (f", {status.filtered:,} left out" if status.filtered else "")
    )
    yield f"{status.in_flight} in flight, at {clean(status.checkpoint) or 'the beginning'}"
    for worker in status.workers:
        yield (
            f"worker {worker.number} {worker.state.value}: {worker.published:,} delivered,"
            f" {worker.in_flight} in flight"
        )


def _outcome(status: PipelineStatus) -> Iterator[str]:
    if status.latency is None:
        yield "latency: none in the last minute"
    else:
        yield (
            f"latency p50 {latency(status.latency.p50_s)}, p95 {latency(status.latency.p95_s)},"
            f" p99 {latency(status.latency.p99_s)} in the last minute"
        )
    yield "recent batches, in messages" if status.recent_batches else "no batch yet"


def _batch(batch: RecentBatch) -> str:
    text = f"{clock(batch.acknowledged_at)} {batch.messages:>5} in {latency(batch.duration_s)}"
    if batch.duplicates:
        text += f", {batch.duplicates} duplicates"
    if batch.dead_lettered:
        text += f", {batch.dead_lettered} dead"
    if batch.attempts > 1:
        text += f", {batch.attempts} attempts"
    return text


def _settings(settings: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _settings(value, f"{key}.")
        elif key not in _NOT_SET_BY_ANYBODY:
            shown = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            yield clean(f"{key}: {shown}")
