"""From a scene to the lines of a screen: pure, and the same for the same scene and size.

Every line has exactly the width asked for. What a line says, it says in words or marks; colour
only repeats it. Texts from outside are shown without control characters, so that no pipeline name
and no error message can steer the terminal.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from io import StringIO

import msgspec
from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from relay.board import PipelineStatus, RecentBatch
from relay.status.fleet import Fleet, LogLine, PipelineLine, lines_of, started_at

WIDE = 110

_SPARKS = "▁▂▃▄▅▆▇█"
_ASCII_SPARKS = "_.-:=+*#"
_TROUBLED = frozenset({"failed", "suspended", "stalled"})
_UNSETTLED = frozenset({"starting", "retrying", "stopping", "waiting", "paused"})
_LEVEL_STYLES = {"warning": "yellow", "error": "red", "critical": "red"}
_HEADING_LINES, _FOOTER_LINES = 2, 1
_SMALLEST_LOG = 3
_MOST_REASON = 3
_MARK_CELLS = 2
_TREND_S = 60

_HELP = (
    ("↑ ↓, k j", "move; PgUp, PgDn, Home, End go further"),
    ("enter", "show or hide the details of the selected pipeline"),
    ("esc", "close what is open; without anything open, drop the filter"),
    ("s", "sort by the next column; the unwell (!) stay first"),
    ("/", "show only what has a text in name, source, sink or state"),
    ("p", "pause the selected pipeline, or resume it; asks first"),
    ("r", "try the selected pipeline's dead letters again; asks first"),
    ("Ctrl-L", "draw the screen again"),
)
_LEAVE = ("q", "leave the view; no relay is touched")
_STOP = ("q", "stop this relay and leave the view; asks first")


class Sort(StrEnum):
    """What the pipelines are ordered by."""

    NAME = "name"
    STATE = "state"
    RATE = "rate"
    LAG = "lag"
    ERRORS = "errors"


class Mode(StrEnum):
    """What keys mean at the moment."""

    BROWSE = "browse"
    FILTER = "filter"
    CONFIRM = "confirm"
    HELP = "help"


class ViewState(msgspec.Struct, frozen=True, kw_only=True):
    """What the user has chosen to see. ``selected`` is a pipeline's name and its owner's."""

    selected: tuple[str, str] | None = None
    is_open: bool = False
    sort: Sort = Sort.NAME
    filter: str = ""
    mode: Mode = Mode.BROWSE
    question: str = ""
    notice: str = ""


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is on the screen; ``heading`` is a remark of whoever shows the view.

    ``stops_relay``: leaving the view stops the relay that it shows.
    """

    fleet: Fleet
    view: ViewState
    now: datetime
    log: Sequence[LogLine] = ()
    heading: str = ""
    stops_relay: bool = False


def visible_lines(fleet: Fleet, view: ViewState) -> list[PipelineLine]:
    """The pipelines that the view leaves in, the unwell first, and then in its order."""
    wanted = view.filter.casefold()
    lines = [
        line
        for line in lines_of(fleet)
        if wanted in f"{line.name} {line.source} {line.sink} {line.state}".casefold()
    ]
    order = _ORDERS.get(view.sort)
    if order is not None:
        lines.sort(key=order)
    return sorted(lines, key=lambda line: not _is_unwell(line))


def _is_unwell(line: PipelineLine) -> bool:
    return bool(line.trouble) or line.state in _TROUBLED


def selected_line(lines: Sequence[PipelineLine], view: ViewState) -> PipelineLine | None:
    """The selected pipeline; the first one where the selected one is not there."""
    for line in lines:
        if (line.name, line.owner) == view.selected:
            return line
    same = [line for line in lines if view.selected and line.name == view.selected[0]]
    return next(iter([*same, *lines]), None)


_ORDERS: Mapping[Sort, Callable[[PipelineLine], float]] = {
    Sort.STATE: lambda line: 0 if line.state in _TROUBLED else 1 if line.state in _UNSETTLED else 2,
    Sort.RATE: lambda line: -line.rate_per_s,
    Sort.LAG: lambda line: -(line.lag_rows or 0),
    Sort.ERRORS: lambda line: -line.errors,
}


class Renderer:
    """Draws scenes for one kind of terminal.

    ``colours`` None: bold and reverse only. ``is_unicode`` False: nothing beyond ASCII of our own.
    """

    def __init__(self, *, colours: ColorSystem | None, is_unicode: bool) -> None:
        self._colours = colours
        self._sparks = _SPARKS if is_unicode else _ASCII_SPARKS
        self._arrow = "→" if is_unicode else "->"
        self._mark = "▸" if is_unicode else ">"
        self._is_unicode = is_unicode
        self._console = Console(file=StringIO(), force_terminal=True, legacy_windows=False)

    @classmethod
    def for_standard_output(cls) -> Renderer:
        """As `NO_COLOR`, `COLORTERM`, `TERM` and the locale say."""
        encoding = (sys.stdout.encoding or "ascii").lower().replace("-", "")
        console = Console(file=sys.stdout)
        names = {"standard": ColorSystem.STANDARD, "256": ColorSystem.EIGHT_BIT}
        colours = names.get(console.color_system or "", ColorSystem.STANDARD)
        return cls(
            colours=None if os.environ.get("NO_COLOR") else colours,
            is_unicode=encoding == "utf8",
        )

    def render(self, scene: Scene, width: int, height: int) -> list[str]:
        """The screen as lines of text with their escape sequences."""
        return [self._encoded(line) for line in self.draw(scene, width, height)]

    def draw(self, scene: Scene, width: int, height: int) -> list[Text]:
        """The screen as exactly ``height`` lines of exactly ``width`` cells."""
        lines = visible_lines(scene.fleet, scene.view)
        chosen = selected_line(lines, scene.view)
        room = max(0, height - _HEADING_LINES - _FOOTER_LINES)
        if scene.view.mode is Mode.HELP:
            body = self._help(scene)
        else:
            body = self._body(scene, lines, chosen, width, room)
        screen = [*self._heading(scene, width), *_filled(body, room), self._footer(scene)]
        return [_fitted(line, width) for line in _filled(screen, height)]

    def _encoded(self, line: Text) -> str:
        # `Text.render` leaves the style of the whole text out where no part has one of its own.
        segments = Segment.apply_style(
            line.render(self._console), self._console.get_style(line.style)
        )
        colours = self._colours
        if colours is None:
            colours = ColorSystem.STANDARD
            segments = Segment.remove_color(segments)
        return "".join(
            segment.text
            if segment.style is None
            else segment.style.render(segment.text, color_system=colours)
            for segment in segments
        )

    def _heading(self, scene: Scene, width: int) -> list[Text]:
        relays = scene.fleet.relays
        begun = started_at(scene.fleet)
        members = max((relay.members for relay in relays), default=0)
        first = Text(" ")
        first.append(f"pgtrickle-relay {relays[0].version if relays else ''}", "bold")
        first.append(f"  group {_clean(relays[0].group_id)}" if relays else "")
        first.append(f"  {members} {'relay' if members == 1 else 'relays'}")
        if relays:
            is_connected = all(relay.database_connected for relay in relays)
            first.append("  database ")
            first.append("connected", "green") if is_connected else first.append("lost", "bold red")
        if begun is not None:
            first.append(f"  up {_duration((scene.now - begun).total_seconds())}")
        lines = lines_of(scene.fleet)
        unwell = _unwell(scene.fleet, lines)
        count = len({line.name for line in lines})
        second = Text(" ")
        second.append(
            f"{count} {'pipeline' if count == 1 else 'pipelines'}"
            f"  {sum(line.rate_per_s for line in lines):.0f}/s"
            f"  published {_total(lines, lambda status: status.published)}"
            f"  consumed {_total(lines, lambda status: status.consumed)}  "
        )
        second.append(_clean(unwell) or "all well", "bold red" if unwell else "green")
        return [_with_right(first, _clean(scene.heading), width), second]

    def _body(
        self,
        scene: Scene,
        lines: Sequence[PipelineLine],
        chosen: PipelineLine | None,
        width: int,
        room: int,
    ) -> list[Text]:
        """Table above, details where open, log below; the table and the log give way."""
        wanted = max(2, len(lines) + 1)
        reason: list[Text] = []
        if scene.view.is_open and chosen is not None:
            table_rows = min(wanted, max(2, room // 4))
            log_rows = _SMALLEST_LOG
            detail_rows = max(0, room - table_rows - log_rows - 2)
        else:
            if chosen is not None and chosen.trouble:
                reason = _wrapped(f"{chosen.name}: {chosen.trouble}", width, "red")
            table_rows = min(wanted, max(2, room - _SMALLEST_LOG - 1 - len(reason)))
            detail_rows = 0
            log_rows = max(0, room - table_rows - 1 - len(reason))
        body = self._table(scene.view, lines, chosen, width, table_rows)
        if detail_rows and chosen is not None:
            body.append(_rule(chosen.name, width, self._is_unicode))
            body.extend(_filled(self._detail(chosen, width, detail_rows), detail_rows))
        body.extend(reason)
        body.append(_rule("log", width, self._is_unicode))
        return body + _log_lines(scene.log, log_rows)

    def _table(
        self,
        view: ViewState,
        lines: Sequence[PipelineLine],
        chosen: PipelineLine | None,
        width: int,
        rows: int,
    ) -> list[Text]:
        shown = _window(lines, chosen, rows - 1)
        title = "pipeline*" if view.sort is Sort.NAME else "pipeline"
        if len(shown) < len(lines):
            title += f" {len(shown)} of {len(lines)}"
        columns = _columns(lines, title, width, self._arrow, self._sparks)
        head = Text(" " * _MARK_CELLS, "bold")
        for column in columns:
            heading = f"{column.title}*" if column.sort is view.sort else column.title
            head.append_text(_cell(Text(heading), column))
        table = [head]
        for line in shown:
            row = Text(self._mark if line is chosen else " ")
            row.append("!", "bold red") if _is_unwell(line) else row.append(" ")
            for column in columns:
                row.append_text(_cell(column.content(line), column))
            if line is chosen:
                row.stylize("reverse")
            table.append(row)
        if not lines:
            table.append(Text(f"  {_why_empty(view)}", "dim"))
        return _filled(table, rows)

    def _detail(self, line: PipelineLine, width: int, rows: int) -> list[Text]:
        status = line.status
        if status is None:
            state = "no relay shown here runs it" if line.is_enabled else "paused: p resumes it"
            return [Text(f" {line.source} {self._arrow} {line.sink}"), Text(f" {state}")]
        left = [Text(f" {text}") for text in _facts(line, status)]
        left += [Text(f" {text}", "dim") for text in _settings(status.settings)]
        right = [Text(text) for text in _outcome(status)]
        right += [Text(_batch(batch)) for batch in reversed(status.recent_batches)]
        half = width // 2
        detail = [
            Text.assemble(_fitted(one, half - 1), " ", other)
            for one, other in zip(_filled(left, rows), _filled(right, rows), strict=True)
        ]
        trouble = status.trouble or status.reason or status.last_error
        if trouble:
            detail[:0] = _wrapped(trouble, width, "red" if status.trouble else "yellow")
        return detail

    def _help(self, scene: Scene) -> list[Text]:
        lines = [Text(""), Text(" keys", "bold"), Text("")]
        for keys, meaning in (*_HELP, _STOP if scene.stops_relay else _LEAVE):
            shown = keys if self._is_unicode else keys.replace("↑ ↓", "up, down")
            lines.append(Text(f"   {shown:<16}{meaning}"))
        return lines

    def _footer(self, scene: Scene) -> Text:
        view = scene.view
        match view.mode:
            case Mode.FILTER:
                return Text(f" filter: {_clean(view.filter)}_   enter keep  esc drop", "reverse")
            case Mode.CONFIRM:
                return Text(f" {_clean(view.question)}  y yes  n no", "bold reverse")
            case Mode.HELP:
                return Text(" any key goes back", "reverse")
            case Mode.BROWSE:
                pass
        if view.notice:
            return Text(f" {_clean(view.notice)}", "bold reverse")
        arrows = "↑↓" if self._is_unicode else "jk"
        end = "q stop" if scene.stops_relay else "q quit"
        keys = f" {arrows} move  enter detail  s sort  / filter  p pause  r retry  ? help  {end}"
        return Text(
            f" filter: {_clean(view.filter)} (esc drops it) {keys}" if view.filter else keys,
            "reverse",
        )


class _Column(msgspec.Struct, frozen=True):
    """One column; ``width`` has the space before it. Below ``least`` it is left out."""

    title: str
    width: int
    content: Callable[[PipelineLine], Text]
    is_right: bool = False
    sort: Sort | None = None
    least: int = 0


def _columns(
    lines: Sequence[PipelineLine], title: str, width: int, arrow: str, sparks: str
) -> list[_Column]:
    """As wide as what they hold; where that is too much, the name is the last to give way."""

    def route(line: PipelineLine) -> str:
        return _clean(f"{line.source}{arrow}{line.sink}")

    def widest(*texts: str) -> int:
        return max(map(cell_len, texts)) + 1

    names = widest(title, *(_clean(line.name) for line in lines))
    owners = widest("owner", *(_clean(line.owner) for line in lines)) if width >= WIDE else 0
    routes = widest("route", *(route(line) for line in lines))
    room = width - _MARK_CELLS

    def fitted(column: _Column) -> _Column:
        nonlocal room
        given = max(0, min(column.width, room))
        given = given if given >= (column.least or column.width) else 0
        room -= given
        return msgspec.structs.replace(column, width=given)

    # In the order in which they get their room.
    state = fitted(_Column("state", 10, _state, sort=Sort.STATE))
    name = fitted(_Column(title, names, lambda one: Text(_clean(one.name)), least=2))
    lag = fitted(_Column("lag", 9, lambda one: Text(_lag(one)), is_right=True, sort=Sort.LAG))
    errors = fitted(_Column("err", 5, _errors, is_right=True, sort=Sort.ERRORS))
    dead = fitted(_Column("dead", 5, _dead_letters, is_right=True))
    rate = fitted(_Column("rate", 6, _rate, is_right=True, sort=Sort.RATE))
    path = fitted(_Column("route", routes, lambda one: Text(route(one)), least=7))
    owner = fitted(_Column("owner", owners, lambda one: Text(_clean(one.owner)), least=7))
    seconds = min(room - 1, _TREND_S)
    trend = fitted(
        _Column("", seconds + 1, lambda one: Text(_sparkline(one, seconds, sparks)), least=6)
    )
    name = msgspec.structs.replace(name, width=name.width + max(0, room))
    columns = (name, path, state, owner, rate, trend, lag, errors, dead)
    return [column for column in columns if column.width > 0]


def _cell(content: Text, column: _Column) -> Text:
    content.truncate(column.width - 1, overflow="ellipsis")
    gap = " " * (column.width - 1 - content.cell_len)
    return Text.assemble(" ", gap, content) if column.is_right else Text.assemble(" ", content, gap)


def _state(line: PipelineLine) -> Text:
    style = "bold red" if line.state in _TROUBLED else "yellow" if line.state in _UNSETTLED else ""
    return Text(line.state, style or "green")


def _rate(line: PipelineLine) -> Text:
    return Text("-" if line.status is None else _short(line.rate_per_s))


def _errors(line: PipelineLine) -> Text:
    return Text(_short(line.errors), "yellow" if line.errors else "")


def _dead_letters(line: PipelineLine) -> Text:
    return Text(_short(line.dead_letters), "red" if line.dead_letters else "")


def _sparkline(line: PipelineLine, seconds: int, sparks: str) -> str:
    history = [] if line.status is None else list(line.status.rate_history)[-seconds:]
    highest = max(history, default=0)
    if not highest:
        return " " * seconds
    steps = len(sparks) - 1
    return "".join(
        sparks[-(-count * steps // highest)] if count else sparks[0] for count in history
    ).rjust(seconds)


def _lag(line: PipelineLine) -> str:
    """Rows behind and the age of the oldest, as in ``12 3s``."""
    if line.lag_rows is None:
        return "-"
    age_s = None if line.status is None else line.status.oldest_unsent_age_s
    if not line.lag_rows or age_s is None:
        return _short(line.lag_rows)
    return f"{_short(line.lag_rows)} {_duration(age_s)}"


def _facts(line: PipelineLine, status: PipelineStatus) -> Iterator[str]:
    yield f"{status.state.value} since {_clock(status.since)}"
    yield f"owner {_clean(line.owner)}"
    for side, name, is_connected in (
        ("source", status.source, status.source_connected),
        ("sink", status.sink, status.sink_connected),
    ):
        yield f"{side} {name}: {'connected' if is_connected else 'not connected'}"
    done = status.published if line.is_forward else status.consumed
    yield f"{done} delivered, {status.duplicates} duplicates, {status.dead_lettered} dead-lettered"
    yield f"{status.in_flight} in flight, at {_clean(status.checkpoint) or 'the beginning'}"


def _outcome(status: PipelineStatus) -> Iterator[str]:
    latency = status.latency
    if latency is None:
        yield "latency: none in the last minute"
    else:
        yield (
            f"latency ms: p50 {latency.p50_s * 1000:.1f}  p95 {latency.p95_s * 1000:.1f}"
            f"  p99 {latency.p99_s * 1000:.1f}"
        )
    if status.last_error_at is not None:
        yield f"last error {_clock(status.last_error_at)}: {_clean(status.last_error)}"
    yield "recent batches" if status.recent_batches else "no batch yet"


def _batch(batch: RecentBatch) -> str:
    text = (
        f"{_clock(batch.acknowledged_at)} {batch.messages:>5} in {batch.duration_s * 1000:.1f} ms"
    )
    if batch.duplicates:
        text += f", {batch.duplicates} duplicates"
    if batch.dead_lettered:
        text += f", {batch.dead_lettered} dead"
    if batch.attempts > 1:
        text += f", {batch.attempts} attempts"
    return text


def _settings(settings: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield _clean(f"{prefix}{name}: {value}")


def _log_lines(log: Sequence[LogLine], rows: int) -> list[Text]:
    latest = list(log)[-rows:] if rows > 0 else []
    return [
        Text(
            f" {_clean(entry.as_text().partition(chr(10))[0])}", _LEVEL_STYLES.get(entry.level, "")
        )
        for entry in latest
    ]


def _unwell(fleet: Fleet, lines: Sequence[PipelineLine]) -> str:
    """The trouble of a relay, or else the names of all unwell pipelines."""
    for relay in fleet.relays:
        if relay.blocked or not relay.database_connected:
            return relay.trouble
    names = dict.fromkeys(line.name for line in lines if _is_unwell(line))
    return f"not healthy: {', '.join(names)}" if names else ""


def _why_empty(view: ViewState) -> str:
    if view.filter:
        return "no pipeline matches the filter"
    return "no pipelines yet: select pgtrickle.set_relay_outbox(...) makes one"


def _window(
    lines: Sequence[PipelineLine], chosen: PipelineLine | None, rows: int
) -> Sequence[PipelineLine]:
    """As many lines as there are rows, with the chosen one among them."""
    if len(lines) <= rows or chosen is None:
        return lines[: max(0, rows)]
    at = list(lines).index(chosen)
    first = min(max(0, at - rows // 2), len(lines) - rows)
    return lines[first : first + rows]


def _total(lines: Sequence[PipelineLine], count: Callable[[PipelineStatus], int]) -> str:
    return f"{sum(count(line.status) for line in lines if line.status is not None):,}"


def _rule(title: str, width: int, is_unicode: bool) -> Text:
    dash = "─" if is_unicode else "-"
    start = Text(f"{dash} {_clean(title)} ", "dim")
    start.truncate(width, overflow="ellipsis")
    return start.append(dash * (width - start.cell_len))


def _with_right(line: Text, right: str, width: int) -> Text:
    room = width - line.cell_len - cell_len(right) - 1
    return line if not right or room < 2 else line.append(" " * room).append(right, "bold")


def _wrapped(reason: str, width: int, style: str) -> list[Text]:
    lines = textwrap.wrap(
        _clean(reason),
        max(1, width - 4),
        max_lines=_MOST_REASON,
        placeholder="…",
        break_on_hyphens=False,
    )
    return [Text(f"   {line}", style) for line in lines]


def _filled(lines: Sequence[Text], rows: int) -> list[Text]:
    return [*lines[:rows], *(Text("") for _ in range(rows - len(lines)))]


def _fitted(line: Text, width: int) -> Text:
    """The line as wide as that, and whatever it is made of fit to be shown."""
    if not line.plain.isprintable():
        line.plain = _clean(line.plain)
    line.truncate(max(0, width), overflow="ellipsis", pad=True)
    return line


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _short(number: float) -> str:
    """At most five characters."""
    if number < 10 and number != int(number):
        return f"{number:.1f}"
    for unit, size in (("", 1), ("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if number < size * 1000:
            return f"{number / size:.0f}{unit}"
    return f"{number / 1e12:.0f}T"


def _duration(seconds: float) -> str:
    """In the two largest units, as in ``3m12s``."""
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m{whole % 60}s" if minutes else f"{whole}s"


def _clock(at: datetime) -> str:
    return at.astimezone().strftime("%H:%M:%S")


def now() -> datetime:
    """The time of day that a scene is drawn at."""
    return datetime.now(UTC)
