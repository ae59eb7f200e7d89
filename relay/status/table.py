"""The table of pipelines: columns as wide as what they hold, reasons below their pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

import msgspec
from rich.cells import cell_len
from rich.text import Text

from relay.status.fleet import PipelineLine
from relay.status.text import clean, duration, latency, short, wrapped

_TROUBLED = frozenset({"failed", "suspended", "stalled"})
_UNSETTLED = frozenset({"starting", "retrying", "stopping", "waiting", "paused"})
_MARK_CELLS = 2
_TREND_S = 60
_MOST_REASON = 3


class Sort(StrEnum):
    """What the pipelines are ordered by; the values are titles of columns."""

    NAME = "pipeline"
    STATE = "state"
    RATE = "rate"
    LAG = "lag"
    LATENCY = "p95"
    ERRORS = "err"
    DEAD_LETTERS = "dead"


ORDERS: Mapping[Sort, Callable[[PipelineLine], float]] = {
    Sort.STATE: lambda line: 0 if line.state in _TROUBLED else 1 if line.state in _UNSETTLED else 2,
    Sort.RATE: lambda line: -line.rate_per_s,
    Sort.LAG: lambda line: -(line.lag_rows or 0),
    Sort.LATENCY: lambda line: -(line.p95_s or 0),
    Sort.ERRORS: lambda line: -line.errors,
    Sort.DEAD_LETTERS: lambda line: -line.dead_letters,
}


class Signs(msgspec.Struct, frozen=True):
    """What is drawn beside words."""

    sparks: str = "▁▂▃▄▅▆▇█"
    arrow: str = "→"
    mark: str = "▸"
    dash: str = "─"
    moves: str = "↑↓"


ASCII_SIGNS = Signs(sparks="_.-:=+*#", arrow="->", mark=">", dash="-", moves="jk")


def is_unwell(line: PipelineLine) -> bool:
    """Whether somebody should look at it."""
    return bool(line.trouble) or line.state in _TROUBLED


def why(line: PipelineLine, width: int, *, most: int = _MOST_REASON) -> list[Text]:
    """Why a pipeline is not well, or what it is trying again; nothing where all is well."""
    status = line.status
    if line.trouble:
        return wrapped(line.trouble, width, "red", most=most)
    if status is None or line.state not in _TROUBLED | {"retrying"}:
        return []
    return wrapped(status.reason or status.last_error, width, "yellow", most=most)


def table(
    lines: Sequence[PipelineLine],
    chosen: PipelineLine | None,
    *,
    sort: Sort,
    signs: Signs,
    width: int,
    rows: int,
    with_reasons: bool,
) -> list[Text]:
    """Heading and pipelines in at most so many rows; reasons as far as there is room for them."""
    reasons: Mapping[int, list[Text]] = {}
    for most in (_MOST_REASON, 1, 0) if with_reasons else ():
        reasons = {
            id(line): why(line, width, most=_MOST_REASON if line is chosen else most)
            for line in lines
            if most or line is chosen
        }
        if 1 + len(lines) + sum(map(len, reasons.values())) <= rows:
            break
    height = max(1, rows - 1 - sum(map(len, reasons.values())))
    shown = _window(lines, chosen, height)
    title = "pipeline" if len(shown) == len(lines) else f"pipeline {len(shown)} of {len(lines)}"
    columns = _columns(lines, title, sort, width - _MARK_CELLS, signs)
    drawn = [Text(" " * _MARK_CELLS, "bold")]
    for column in columns:
        drawn[0].append_text(column.drawn(column.title))
    for line in shown:
        row = Text(signs.mark if line is chosen else " ")
        row.append("!", "bold red") if is_unwell(line) else row.append(" ")
        for column in columns:
            row.append_text(column.drawn(*column.content(line)))
        if line is chosen:
            row.pad_right(width - row.cell_len)
            row.stylize("reverse")
        drawn += [row, *reasons.get(id(line), ())]
    return drawn[:rows]


# A text, and how it is shown.
_Content = tuple[str, str]


class _Column(msgspec.Struct, frozen=True):
    """One column; ``width`` has the space before it."""

    title: str
    content: Callable[[PipelineLine], _Content]
    width: int
    is_right: bool

    def drawn(self, text: str, style: str = "") -> Text:
        """A text as wide as the column."""
        cell = Text(text, style)
        cell.truncate(self.width - 1, overflow="ellipsis")
        gap = " " * (self.width - 1 - cell.cell_len)
        return Text.assemble(" ", gap, cell) if self.is_right else Text.assemble(" ", cell, gap)


def _columns(
    lines: Sequence[PipelineLine], name_title: str, sort: Sort, room: int, signs: Signs
) -> list[_Column]:
    """As wide as what they hold; where that is too much, the name is the last to give way."""

    def fitted(
        title: str, content: Callable[[PipelineLine], _Content], *, usual: int = 0, least: int = 0
    ) -> _Column:
        """Below ``least`` it is left out, without one where it can't be whole.

        ``usual``: so wide at least, so that it does not jump with every figure.
        """
        nonlocal room
        if title.startswith(sort):
            title = title.replace(sort, f"{sort}*", 1)
        wanted = max(usual, cell_len(title), *(cell_len(content(line)[0]) for line in lines), 0) + 1
        given = min(wanted, room)
        given = given if given >= (least or wanted) else 0
        room -= given
        return _Column(title, content, given, is_right=bool(usual))

    def route_of(line: PipelineLine) -> _Content:
        return clean(f"{line.source}{signs.arrow}{line.sink}"), ""

    def trend_of(line: PipelineLine) -> _Content:
        return _sparkline(line, seconds, signs.sparks), ""

    # In the order in which they get their room.
    state = fitted("state", _state)
    name = fitted(name_title, lambda line: (clean(line.name), ""), least=2)
    lag = fitted("lag", _lag, usual=6)
    dead = fitted("dead", _dead_letters, usual=4)
    rate = fitted("rate", _rate, usual=4)
    p95 = fitted("p95", _p95, usual=5)
    errors = fitted("err", _errors, usual=3)
    columns = [name, fitted("route", route_of, least=7), state]
    if len({line.owner for line in lines if line.owner}) > 1:
        columns.append(fitted("owner", lambda line: (clean(line.owner), "")))
    columns.append(rate)
    figures = [lag, p95, errors, dead]
    if room > _TREND_S // 2:
        figures.append(fitted("total", lambda line: (f"{line.delivered:,}", ""), usual=7))
    seconds = min(room - 1, _TREND_S)
    if seconds > len("trend"):
        columns.append(_Column("trend", trend_of, seconds + 1, is_right=False))
    columns += figures
    return [column for column in columns if column.width > 0]


def _state(line: PipelineLine) -> _Content:
    if line.state in _TROUBLED:
        return line.state, "bold red"
    return line.state, "yellow" if line.state in _UNSETTLED else "green"


def _rate(line: PipelineLine) -> _Content:
    return "-" if line.status is None else short(line.rate_per_s), ""


def _p95(line: PipelineLine) -> _Content:
    return "-" if line.p95_s is None else latency(line.p95_s), ""


def _errors(line: PipelineLine) -> _Content:
    return short(line.errors), "yellow" if line.errors else ""


def _dead_letters(line: PipelineLine) -> _Content:
    return short(line.dead_letters), "red" if line.dead_letters else ""


def _lag(line: PipelineLine) -> _Content:
    """Rows behind and the age of the oldest, as in ``12 3s``."""
    if line.lag_rows is None:
        return "-", ""
    age_s = line.oldest_unsent_age_s
    if not line.lag_rows or age_s is None:
        return short(line.lag_rows), ""
    return f"{short(line.lag_rows)} {duration(age_s)}", ""


def _sparkline(line: PipelineLine, seconds: int, sparks: str) -> str:
    """Scaled to its own range, which is a quarter of its highest at least: noise stays small."""
    history = [] if line.status is None else list(line.status.rate_history)[-seconds:]
    highest = max(history, default=0)
    if not highest:
        return " " * seconds
    span = max(highest - min(history), highest / 4)
    top = len(sparks) - 1
    return "".join(
        sparks[max(1, round(top * (1 - (highest - count) / span)))] if count else sparks[0]
        for count in history
    ).rjust(seconds)


def _window(
    lines: Sequence[PipelineLine], chosen: PipelineLine | None, rows: int
) -> Sequence[PipelineLine]:
    """As many lines as there are rows, with the chosen one among them."""
    if len(lines) <= rows or chosen is None:
        return lines[:rows]
    at = next(n for n, line in enumerate(lines) if line is chosen)
    first = min(max(0, at - rows // 2), len(lines) - rows)
    return lines[first : first + rows]
