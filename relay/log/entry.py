"""One line of the log, made of a record, and its two forms."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime

import msgspec

# What a log call may pass as ``extra``, in the order in which it is written. Anything else is left
# out: a field that nobody has looked at could carry a payload.
FIELDS = (
    "pipeline",
    "direction",
    "worker",
    "source",
    "sink",
    "side",
    "state",
    "batch",
    "checkpoint",
    "attempt",
    "messages",
    "duplicates",
    "dead_lettered",
    "filtered",
    "delivered",
    "failed",
    "duration_s",
    "delay_s",
    "repeated",
    "members",
    "event",
    "outbox",
    "kind",
    "error",
)

_SAID_BEFORE = frozenset({"pipeline", "direction"})
_KNOWN_OF_A_PIPELINE = frozenset({"source", "sink", "side"})
_LONGEST_TEXT = 2000
_LONGEST_EXCEPTION_TEXT = 300
_NOT_PRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN_VALUE = re.compile(r"[^\s\"=]+")
_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "31"}

FieldValue = str | int | float | bool


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One record, fit to be shown: masked, of bounded length, without line breaks in its texts.

    ``fields`` in the order of `FIELDS`. ``trace`` has the lines of a traceback, if there is one.
    """

    at: datetime
    level: str
    logger: str
    message: str
    fields: Mapping[str, FieldValue]
    trace: Sequence[str] = ()

    def as_json(self) -> str:
        """One JSON object without line breaks."""
        line: dict[str, object] = {"ts": self.at, "level": self.level, "msg": self.message}
        line.update(self.fields)
        line["logger"] = self.logger
        if self.trace:
            line["trace"] = self.trace
        return msgspec.json.encode(line).decode()

    def as_text(self, *, colour: bool = False) -> str:
        """For people: local time, level, pipeline, message, what else is known; trace below."""
        clock = self.at.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        level = f"{self.level.upper():<8}"
        if colour:
            level = f"\x1b[{_COLOURS.get(self.level, '0')}m{level}\x1b[0m"
        words = [clock, level, *self._pipeline(), self._message(), *self._rest(_SAID_BEFORE)]
        return "\n".join([" ".join(words), *(f"    {line}" for line in self.trace)])

    def as_short_text(self) -> str:
        """For people with little room: in one line, what happened first, and the time of day."""
        clock = self.at.astimezone().strftime("%H:%M:%S")
        rest = self._rest(_SAID_BEFORE | _KNOWN_OF_A_PIPELINE)
        return " ".join(
            [clock, f"{self.level.upper():<7}", self._message(), *self._pipeline(), *rest]
        )

    def _message(self) -> str:
        is_ours = self.logger.partition(".")[0] == "relay"
        return self.message if is_ours else f"{self.logger}: {self.message}"

    def _pipeline(self) -> list[str]:
        return [f"[{self.fields['pipeline']}]"] if "pipeline" in self.fields else []

    def _rest(self, but: AbstractSet[str]) -> list[str]:
        return [f"{name}={_shown(value)}" for name, value in self.fields.items() if name not in but]


def entry_of(record: logging.LogRecord, mask: Callable[[str], str]) -> LogEntry:
    """The entry of a record, every text of it masked."""
    trace: Sequence[str] = ()
    if record.exc_info is not None and record.exc_info[1] is not None:
        trace = [_clean(line, mask) for line in _trace(record.exc_info[1], mask)]
    return LogEntry(
        at=datetime.fromtimestamp(record.created, UTC),
        level=record.levelname.lower(),
        logger=record.name,
        message=_clean(record.getMessage(), mask),
        fields={
            name: _clean(value, mask) if isinstance(value, str) else value
            for name in FIELDS
            if isinstance(value := getattr(record, name, None), str | int | float | bool)
        },
        trace=trace,
    )


def _clean(text: str, mask: Callable[[str], str]) -> str:
    """Masked before anything else: what is cut or escaped would not be recognised any more."""
    text = mask(text)
    if len(text) > _LONGEST_TEXT:
        text = f"{text[:_LONGEST_TEXT]}… ({len(text)} characters)"
    text = _NOT_PRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text.encode("utf-8", "backslashreplace").decode()


def _shown(value: FieldValue) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return text if _PLAIN_VALUE.fullmatch(text) else '"' + text.replace('"', '\\"') + '"'


def _trace(error: BaseException, mask: Callable[[str], str]) -> list[str]:
    """The frames, causes first, with one short line of each exception's text.

    What follows the first line of a database error is its detail, which quotes the row.
    """
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    lines = [] if cause is None else [*_trace(cause, mask), "which led to:"]
    lines.extend(
        f"{frame.filename}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    )
    text = next(iter(mask(str(error)).splitlines()), "")
    if len(text) > _LONGEST_EXCEPTION_TEXT:
        text = f"{text[:_LONGEST_EXCEPTION_TEXT]}…"
    lines.append(f"{type(error).__qualname__}: {text}")
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            lines.extend(f"| {line}" for line in _trace(inner, mask))
    return lines
