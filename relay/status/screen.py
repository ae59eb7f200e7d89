"""From a scene to the lines of a screen: pure, and the same for the same scene and size.

Every line has exactly the width asked for. What a line says, it says in words or marks; colour
only repeats it. Texts from outside are shown without control characters, so that no pipeline name
and no error message can steer the terminal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from io import StringIO

import msgspec
from rich.color import ColorSystem
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from relay.catalog import DeadLetterSummary
from relay.status.detail import detail
from relay.status.fleet import Fleet, LogLine, PipelineLine, delivered, lines_of
from relay.status.table import ASCII_SIGNS, ORDERS, Signs, Sort, is_unwell, table
from relay.status.text import clean, duration, filled, fitted, wrapped

_LEVEL_STYLES = {"warning": "yellow", "error": "red", "critical": "red"}
_SMALLEST_LOG = 3
_MOST_BANNER = 3
_MOST_PROGRESS = 3
_MOST_TROUBLE = 3
_MOST_LOG_ENTRY = 3


class Mode(StrEnum):
    """What keys mean at the moment."""

    BROWSE = "browse"
    FILTER = "filter"
    CONFIRM = "confirm"
    HELP = "help"


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A key of the view: what the bottom line calls it, and what the help says of it.

    ``rank``: where there is no room for all at the bottom, the highest is left out first.
    """

    key: str
    label: str
    help: str
    rank: int = 0


_KEYS = (
    Key(key="↑↓", label="move", help="or k, j; PgUp, PgDn, Home, End go further", rank=2),
    Key(key="enter", label="details", help="show or hide those of the selected pipeline", rank=1),
    Key(key="s", label="sort", help="by the next column; the unwell (!) stay first", rank=4),
    Key(key="/", label="filter", help="what has a text in name, source, sink or state", rank=3),
    Key(key="p", label="pause", help="or resume the selected pipeline; asks first", rank=1),
    Key(key="r", label="retry", help="the selected pipeline's dead letters; asks first", rank=2),
    Key(
        key="d",
        label="dead letters",
        help="open the details, then read one after the other",
        rank=5,
    ),
    Key(key="t", label="try one", help="the selected dead letter again; asks first", rank=5),
)
_HELP_KEY = Key(key="?", label="help", help="this")
_LEAVE = Key(key="q", label="quit", help="the view; no relay is touched")
_STOP = Key(key="q", label="stop", help="this relay, and leave the view; asks first")
# Not in the bottom line.
_MORE_KEYS = (
    Key(key="esc", label="", help="close what is open, or else drop the filter"),
    Key(key="Ctrl-L", label="", help="draw the screen again"),
)


class ViewState(msgspec.Struct, frozen=True, kw_only=True):
    """What the user has chosen to see.

    ``selected`` is a pipeline's name and its owner's, ``letter`` the id of one of its dead letters.
    """

    selected: tuple[str, str] | None = None
    letter: int | None = None
    is_open: bool = False
    sort: Sort = Sort.NAME
    filter: str = ""
    mode: Mode = Mode.BROWSE
    question: str = ""
    notice: str = ""


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is on the screen.

    ``dead_letters`` are the latest by pipeline, as far as they were read. ``banner`` and ``keys``
    are what whoever shows the view adds to it. ``stops_relay``: leaving the view stops the relay
    that it shows. ``stale``: why what is shown is old, empty where it is not.
    """

    fleet: Fleet
    view: ViewState
    now: datetime
    log: Sequence[LogLine] = ()
    dead_letters: Mapping[str, Sequence[DeadLetterSummary]] = {}
    banner: Sequence[str] = ()
    keys: Sequence[Key] = ()
    stops_relay: bool = False
    stale: str = ""


def visible_lines(lines: Sequence[PipelineLine], view: ViewState) -> list[PipelineLine]:
    """Those that the view leaves in, the unwell first, and then in its order."""
    wanted = view.filter.casefold()
    visible = [
        line
        for line in lines
        if wanted in f"{line.name} {line.source} {line.sink} {line.state}".casefold()
    ]
    order = ORDERS.get(view.sort)
    if order is not None:
        visible.sort(key=order)
    return sorted(visible, key=lambda line: not is_unwell(line))


def selected_line(lines: Sequence[PipelineLine], view: ViewState) -> PipelineLine | None:
    """The selected pipeline; the first one where the selected one is not there."""
    for line in lines:
        if (line.name, line.owner) == view.selected:
            return line
    same = [line for line in lines if view.selected and line.name == view.selected[0]]
    return next(iter([*same, *lines]), None)


def selected_letter(
    letters: Sequence[DeadLetterSummary], view: ViewState
) -> DeadLetterSummary | None:
    """The selected dead letter, if it is there."""
    return next((letter for letter in letters if letter.id == view.letter), None)


class Renderer:
    """Draws scenes for one kind of terminal.

    ``colours`` None: bold and reverse only. ``is_unicode`` False: nothing beyond ASCII of our own.
    """

    def __init__(self, *, colours: ColorSystem | None, is_unicode: bool) -> None:
        self._colours = colours
        self._signs = Signs() if is_unicode else ASCII_SIGNS
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
        every = lines_of(scene.fleet, scene.now)
        heading = self._heading(scene, every, width)
        room = max(0, height - len(heading) - 1)
        is_help = scene.view.mode is Mode.HELP
        body = self._help(scene) if is_help else self._body(scene, every, width, room)
        screen = [*heading, *filled(body, room), self._footer(scene, width)]
        return [fitted(line, width) for line in filled(screen, height)]

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

    def _heading(self, scene: Scene, lines: Sequence[PipelineLine], width: int) -> list[Text]:
        heading = [_about(scene), _summary(scene, lines)]
        for relay in scene.fleet.relays:
            if relay.blocked or not relay.database_connected:
                heading += wrapped(relay.trouble, width, "bold red", most=_MOST_TROUBLE)
        heading += _progress(scene.fleet, width)
        heading += wrapped(scene.stale, width, "bold red", most=_MOST_TROUBLE)
        for text in scene.banner:
            heading += wrapped(text, width, "bold cyan", most=_MOST_BANNER, indent=1)
        return heading

    def _body(
        self, scene: Scene, every: Sequence[PipelineLine], width: int, room: int
    ) -> list[Text]:
        """Table above, details where open, log below; the table and the log give way."""
        lines = visible_lines(every, scene.view)
        chosen = selected_line(lines, scene.view)
        is_open = scene.view.is_open and chosen is not None
        # A fleet's relays log elsewhere: this is what the view itself has to say, if anything.
        has_log = bool(scene.log) or scene.stops_relay
        rest = room - (_SMALLEST_LOG + 1 if has_log else 0)
        body = table(
            lines,
            chosen,
            sort=scene.view.sort,
            signs=self._signs,
            width=width,
            rows=max(2, room // 4 if is_open else rest),
            with_reasons=not is_open,
        )
        if not lines:
            body.append(Text(f"  {_why_empty(scene)}", "dim"))
        if is_open and chosen is not None:
            body.append(self._rule(chosen.name, width))
            letters = scene.dead_letters.get(chosen.name, ())
            rows = max(0, rest - len(body))
            letter = selected_letter(letters, scene.view)
            body += detail(chosen, letters, letter, width, rows, self._signs)
        if has_log:
            body.append(self._rule("log", width))
            body += _log_lines(scene.log, width, room - len(body))
        return body

    def _help(self, scene: Scene) -> list[Text]:
        lines = [Text(""), Text(" keys", "bold"), Text("")]
        for key in (*self._keys(scene), *_MORE_KEYS):
            meaning = f"{key.label}: {key.help}" if key.label else key.help
            lines.append(Text(f"   {self._shown(key):<9}{meaning}"))
        return lines

    def _footer(self, scene: Scene, width: int) -> Text:
        view = scene.view
        match view.mode:
            case Mode.FILTER:
                return Text(f" filter: {clean(view.filter)}_   enter keep  esc drop", "reverse")
            case Mode.CONFIRM:
                return Text(f" {clean(view.question)}  y yes  n no", "bold reverse")
            case Mode.HELP:
                return Text(" any key goes back", "reverse")
            case Mode.BROWSE:
                pass
        if view.notice:
            return Text(f" {clean(view.notice)}", "bold reverse")
        start = f" filter: {clean(view.filter)} (esc drops it) " if view.filter else ""
        keys = list(self._keys(scene))
        while True:
            text = start + "".join(f" {self._shown(key)} {key.label} " for key in keys)
            if len(text) <= width or not any(key.rank for key in keys):
                return Text(text, "reverse")
            keys.remove(max(keys, key=lambda key: key.rank))

    def _keys(self, scene: Scene) -> Sequence[Key]:
        return (*scene.keys, *_KEYS, _HELP_KEY, _STOP if scene.stops_relay else _LEAVE)

    def _shown(self, key: Key) -> str:
        return self._signs.moves if key.key == "↑↓" else key.key

    def _rule(self, title: str, width: int) -> Text:
        dash = self._signs.dash
        start = Text(f"{dash} {clean(title)} ", "dim")
        start.truncate(width, overflow="ellipsis")
        return start.append(dash * (width - start.cell_len))


def _about(scene: Scene) -> Text:
    """Who is looked at."""
    relays = scene.fleet.relays
    members = max([len(relays), *(relay.members for relay in relays)])
    about = Text(" ")
    about.append(f"pgtrickle-relay {relays[0].version if relays else ''}", "bold")
    about.append(f"  group {clean(relays[0].group_id)}" if relays else "")
    about.append(f"  {members} {'relay' if members == 1 else 'relays'}")
    if relays:
        is_connected = all(relay.database_connected for relay in relays)
        about.append("  database ")
        about.append("connected", "green") if is_connected else about.append("lost", "bold red")
        begun = min(relay.started_at for relay in relays)
        about.append(f"  up {duration((scene.now - begun).total_seconds())}")
    return about


def _summary(scene: Scene, lines: Sequence[PipelineLine]) -> Text:
    """Whether all is well, as far as it is known, and how much is done."""
    count = len({line.name for line in lines})
    unwell = len({line.name for line in lines if is_unwell(line)})
    retrying = len({line.name for line in lines if line.state == "retrying"})
    pipelines = f"{count} {'pipeline' if count == 1 else 'pipelines'}"
    summary = Text(" ")
    if unwell:
        summary.append(f"{unwell} of {pipelines} unwell", "bold red")
    elif retrying:
        summary.append(f"{retrying} of {pipelines} retrying", "yellow")
    else:
        summary.append(pipelines)
        if not scene.stale and not any(relay.trouble for relay in scene.fleet.relays):
            summary.append("  all well", "green")
    total = delivered(scene.fleet)
    return summary.append(
        f"  {sum(line.rate_per_s for line in lines):,.0f}/s"
        f"  published {total.get('forward', 0):,}  consumed {total.get('reverse', 0):,}"
    )


def _progress(fleet: Fleet, width: int) -> list[Text]:
    """A line for each backfill and seek, those first that don't go on by themselves."""
    ongoing = sorted(fleet.ongoing, key=lambda one: not one.is_unwell)
    lines = [Text(f" {clean(one.progress)}", "yellow" if one.is_unwell else "") for one in ongoing]
    if len(lines) > _MOST_PROGRESS:
        hidden = len(lines) - _MOST_PROGRESS + 1
        lines[-hidden:] = [Text(f" {hidden} more backfills and seeks: status --once has them")]
    return [fitted(line, width) for line in lines]


def _log_lines(log: Sequence[LogLine], width: int, rows: int) -> list[Text]:
    """The latest entries that fit, the newest last."""
    lines: list[Text] = []
    for entry in reversed(log):
        style = _LEVEL_STYLES.get(entry.level, "")
        text = wrapped(
            entry.as_short_text(), width, style, most=_MOST_LOG_ENTRY, indent=1, hanging=9
        )
        if len(lines) + len(text) > rows:
            break
        lines[:0] = text
    return lines or [Text(" nothing so far", "dim")][: max(0, rows)]


def _why_empty(scene: Scene) -> str:
    relays = scene.fleet.relays
    if scene.view.filter:
        return "no pipeline matches the filter"
    if any(not relay.is_ready or relay.members > len(relays) for relay in relays):
        return "nothing runs here at the moment"
    return "no pipelines yet: select pgtrickle.set_relay_outbox(...) makes one"
