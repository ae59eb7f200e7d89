"""The status view: what keys do, and when the screen is drawn.

The view never fails or delays the relay it looks at: where it can't go on, it restores the
terminal, logs why, and ends alone. Frames are taken in the event loop, drawn and written in a
thread (`relay.status.terminal`); a frame is taken only when the one before was begun. An action
that fails is a line at the bottom of the screen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Self

import msgspec

from relay.catalog import DeadLetterSummary
from relay.errors import RelayError
from relay.settings import UiSettings
from relay.status.fleet import LATEST_DEAD_LETTERS, LogTail, PipelineLine, Watched, lines_of
from relay.status.screen import (
    Key,
    Mode,
    Renderer,
    Scene,
    ViewState,
    selected_letter,
    selected_line,
    visible_lines,
)
from relay.status.table import Sort
from relay.status.terminal import Terminal
from relay.status.text import clock

_log = logging.getLogger(__name__)

_REFRESH_CATALOG_S = 2.0
_PAGE = 10

Action = Callable[[], Awaitable[str | None]]


class StatusView:
    """Shows ``watched`` and ``log`` on the terminal of this process for as long as it is open.

    Meanwhile the log is not written to standard error, unless the view ``is_lost``.
    ``on_quit`` is called when the user quits. Where that stops the relay, ``stops_relay`` makes
    the view say so, and ask before it quits. ``on_lost`` is called once where the view can't go on,
    with the terminal restored, before the reason is logged. Both in the event loop's thread.
    ``banner`` gives lines for the top of the screen, ``keys`` are more keys, each with what it
    does; that may give a line for the bottom. Use it as a context manager, where `can_show` is
    true: leaving the block restores the terminal, whatever the reason.
    """

    def __init__(
        self,
        watched: Watched,
        log: LogTail,
        settings: UiSettings,
        *,
        on_quit: Callable[[], None],
        on_lost: Callable[[], None] = lambda: None,
        banner: Callable[[], Sequence[str]] = tuple,
        keys: Mapping[Key, Action] | None = None,
        stops_relay: bool = False,
    ) -> None:
        self._watched = watched
        self._log = log
        self._refresh_s = settings.refresh_ms / 1000
        self._on_quit = on_quit
        self._on_lost = on_lost
        self._banner = banner
        self._keys = keys or {}
        self._stops_relay = stops_relay
        self._renderer = Renderer.for_standard_output()
        self._terminal = Terminal(self._on_key, self._lost)
        self._view = ViewState()
        self._confirmed: Callable[[], None] | None = None
        self._actions: asyncio.Queue[Action] = asyncio.Queue()
        self._touched = asyncio.Event()
        self._opened = asyncio.Event()
        self._dead_letters: Mapping[str, Sequence[DeadLetterSummary]] = {}
        self._stale = ""
        self._tried: dict[int, tuple[str, DeadLetterSummary]] = {}
        self._running: asyncio.Task[None] | None = None
        self.is_lost = False

    async def __aenter__(self) -> Self:
        self._log.show_on_stderr(shown=False)
        try:
            self._terminal.open()
            self._running = asyncio.create_task(self._run(), name="status view")
        except Exception as error:  # noqa: BLE001 - the relay goes on without its view
            self._lost(error)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._terminal.close()
        self._log.show_on_stderr(shown=True)
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    def restore(self) -> None:
        """Restore the terminal at once; for exits that run no cleanup."""
        self._terminal.restore()

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._draw())
                tasks.create_task(self._refresh())
                tasks.create_task(self._act())
        except Exception as error:  # noqa: BLE001 - the relay goes on without its view
            self._lost(error)

    def _lost(self, error: BaseException | None = None) -> None:
        """End the view, and nothing else; without an error the terminal is gone."""
        if self.is_lost:
            return
        self.is_lost = True
        self._terminal.close()
        self._log.show_on_stderr(shown=True)
        if self._running is not None:
            self._running.cancel()
        self._on_lost()
        if error is None or isinstance(error, OSError):
            _log.warning("the terminal of the status view is gone", extra=_said(error))
        else:
            _log.error("the status view failed", exc_info=error)

    async def _draw(self) -> None:
        while True:
            self._touched.clear()
            if not self._terminal.is_busy:
                scene = Scene(
                    fleet=self._watched.fleet(),
                    view=self._view,
                    now=datetime.now(UTC),
                    log=self._log.entries(),
                    dead_letters=self._dead_letters,
                    banner=self._banner(),
                    keys=list(self._keys),
                    stops_relay=self._stops_relay,
                    stale=self._stale,
                )
                self._terminal.show(partial(self._renderer.render, scene))
            await _within(self._refresh_s, self._touched)

    async def _refresh(self) -> None:
        read_at = datetime.now(UTC)
        while True:
            self._opened.clear()
            try:
                await self._watched.refresh()
                line = selected_line(self._visible(), self._view)
                if self._view.is_open and line is not None and line.dead_letters:
                    letters = await self._watched.dead_letters(line.name)
                    self._dead_letters = {line.name: letters}
                    self._touched.set()
                await self._look_at_tried()
                read_at, self._stale = datetime.now(UTC), ""
            except RelayError as error:
                self._stale = f"not refreshed since {clock(read_at)}: {error}"
            await _within(_REFRESH_CATALOG_S, self._opened)

    async def _look_at_tried(self) -> None:
        """Say what became of the dead letters that the user has tried again."""
        for name, letter in list(self._tried.values()):
            outcome = _outcome(name, letter, await self._watched.dead_letters(name))
            if outcome:
                del self._tried[letter.id]
                self._change(notice=outcome)

    async def _act(self) -> None:
        """One action after the other; what it says is shown until the next key."""
        while True:
            action = await self._actions.get()
            try:
                notice = await action() or ""
                await self._watched.refresh()
            except RelayError as error:
                notice = str(error)
            self._change(notice=notice)

    def _on_key(self, key: str) -> None:
        match self._view.mode:
            case Mode.FILTER:
                self._edit_filter(key)
            case Mode.CONFIRM:
                self._answer(key)
            case Mode.HELP:
                self._change(mode=Mode.BROWSE)
            case Mode.BROWSE:
                self._change(notice="")
                self._browse(key)

    def _browse(self, key: str) -> None:
        match key:
            case "up" | "k":
                self._move(-1)
            case "down" | "j":
                self._move(1)
            case "page up":
                self._move(-_PAGE)
            case "page down":
                self._move(_PAGE)
            case "home":
                self._move_to(0)
            case "end":
                self._move_to(-1)
            case "enter":
                self._change(is_open=not self._view.is_open)
                self._opened.set()
            case "escape" if self._view.is_open:
                self._change(is_open=False)
            case "escape":
                self._chosen()
                self._change(filter="")
            case "s":
                sort = _after(self._view.sort)
                self._change(sort=sort, notice=f"sorted by {sort.value}")
            case "/":
                self._change(mode=Mode.FILTER)
            case "p":
                self._ask_to_switch()
            case "r":
                self._ask_to_retry()
            case "d":
                self._next_letter()
            case "t":
                self._ask_to_retry_letter()
            case "?" | "h":
                self._change(mode=Mode.HELP)
            case "redraw":
                self._terminal.redraw()
                self._touched.set()
            case "q" if self._stops_relay:
                self._ask("Stop this relay?", self._stop)
            case "q":
                self._on_quit()
            case _:
                for action in (do for one, do in self._keys.items() if one.key == key):
                    self._actions.put_nowait(action)

    def _edit_filter(self, key: str) -> None:
        text = self._view.filter
        match key:
            case "enter":
                self._change(mode=Mode.BROWSE)
            case "escape":
                self._change(mode=Mode.BROWSE, filter="")
            case "backspace":
                self._change(filter=text[:-1])
            case "clear":
                self._change(filter="")
            case _ if len(key) == 1:
                self._change(filter=text + key)
            case _:
                pass

    def _ask_to_switch(self) -> None:
        line = self._chosen()
        if line is None:
            return
        name = line.name

        async def pause() -> str:
            await self._watched.pause(name)
            return f"{name} is paused; its position is kept"

        async def resume() -> str:
            await self._watched.resume(name)
            return f"{name} is resumed"

        if line.is_enabled:
            self._ask(f"pause {name}?", partial(self._actions.put_nowait, pause))
        else:
            self._ask(f"resume {name}?", partial(self._actions.put_nowait, resume))

    def _ask_to_retry(self) -> None:
        line = self._chosen()
        if line is None or not self._has_letters(line):
            return
        name = line.name

        async def retry() -> str:
            return f"{await self._watched.retry_dead_letters(name)} dead letters are tried again"

        self._ask(
            f"try {line.dead_letters} dead letters of {name} again?",
            partial(self._actions.put_nowait, retry),
        )

    def _next_letter(self) -> None:
        line = self._chosen()
        if line is None or not self._has_letters(line):
            return
        letters = self._dead_letters.get(line.name, ())
        if not self._view.is_open:
            self._change(is_open=True)
            self._opened.set()
        elif letters:
            letter = selected_letter(letters, self._view)
            after = 0 if letter is None else letters.index(letter) + 1
            self._change(letter=letters[after % len(letters)].id)

    def _ask_to_retry_letter(self) -> None:
        line = self._chosen()
        if line is None or not self._has_letters(line):
            return
        letter = selected_letter(self._dead_letters.get(line.name, ()), self._view)
        if not self._view.is_open or letter is None:
            self._change(notice="select one of the dead letters with d")
            return
        name, chosen = line.name, letter

        async def retry() -> str:
            await self._watched.retry_dead_letter(chosen.id)
            self._tried[chosen.id] = name, chosen
            self._opened.set()
            by = "" if line.status is not None else f", as soon as a relay runs {name}"
            return f"dead letter {chosen.id} is tried again{by}"

        self._change(letter=chosen.id)
        self._ask(
            f"try dead letter {chosen.id} of {name} again?",
            partial(self._actions.put_nowait, retry),
        )

    def _has_letters(self, line: PipelineLine) -> bool:
        if not line.dead_letters:
            self._change(notice=f"{line.name} has no dead letters")
        return bool(line.dead_letters)

    def _stop(self) -> None:
        self._change(notice="stopping: what is in flight is finished first")
        self._on_quit()

    def _ask(self, question: str, confirmed: Callable[[], None]) -> None:
        self._confirmed = confirmed
        self._change(mode=Mode.CONFIRM, question=question)

    def _answer(self, key: str) -> None:
        confirmed, self._confirmed = self._confirmed, None
        self._change(mode=Mode.BROWSE, question="")
        if key in ("y", "Y") and confirmed is not None:
            confirmed()

    def _move(self, by: int) -> None:
        lines = self._visible()
        chosen = selected_line(lines, self._view)
        if chosen is not None:
            self._move_to(min(max(0, lines.index(chosen) + by), len(lines) - 1))

    def _move_to(self, index: int) -> None:
        lines = self._visible()
        if lines:
            self._change(selected=(lines[index].name, lines[index].owner))
            self._opened.set()

    def _chosen(self) -> PipelineLine | None:
        """The selected pipeline; it stays selected if the order changes from now on."""
        line = selected_line(self._visible(), self._view)
        if line is not None:
            self._change(selected=(line.name, line.owner))
        return line

    def _visible(self) -> list[PipelineLine]:
        return visible_lines(lines_of(self._watched.fleet(), datetime.now(UTC)), self._view)

    def _change(self, **fields: object) -> None:
        self._view = msgspec.structs.replace(self._view, **fields)
        self._touched.set()


def _outcome(name: str, before: DeadLetterSummary, latest: Sequence[DeadLetterSummary]) -> str:
    """What became of a dead letter that was tried again; empty as long as nobody can tell."""
    now = next((letter for letter in latest if letter.id == before.id), None)
    if now is not None:
        is_waiting = now.retry_requested_at is not None
        return "" if is_waiting else f"dead letter {now.id} was refused again: {now.error}"
    if len(latest) >= LATEST_DEAD_LETTERS and latest[-1].id > before.id:
        return ""  # Newer ones have driven it out of the list.
    return f"dead letter {before.id} of {name} is delivered"


def _after(sort: Sort) -> Sort:
    every = list(Sort)
    return every[(every.index(sort) + 1) % len(every)]


def _said(error: BaseException | None) -> Mapping[str, object]:
    return {} if error is None else {"error": str(error)}


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Wait for the event, but no longer than that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
