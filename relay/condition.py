"""A condition over one message, in CEL (https://cel.dev), compiled once per pipeline.

Only what a condition names is converted: the variables, and of the payload the top-level fields. A
value that nests deeper than `MOST_LEVELS` never reaches the library, which would end the process at
some thousands; nor does a longer expression than `MOST_CHARACTERS`, for the same reason.

Numbers: a JSON number without point and exponent is an int, else a double; an int beyond 64 bits
becomes a double. The two compare as numbers, ``10 == 10.0``; arithmetic between them is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import msgspec

from relay.errors import ConfigurationError, DriverMissing, MessageUndecodable
from relay.message import RelayMessage

MOST_LEVELS: Final = 100
MOST_CHARACTERS: Final = 4096

VARIABLES: Mapping[str, Callable[[RelayMessage], object]] = {
    "op": lambda message: message.op,
    "key": lambda message: message.key,
    "subject": lambda message: message.subject,
    "headers": lambda message: dict(message.headers),
    "stream_table": lambda message: message.stream_table,
}
# Those of the library besides operators and macros. It finds out about others when it meets them,
# which would be with each message.
FUNCTIONS: Final = frozenset(
    {
        "bytes", "contains", "double", "duration", "dyn", "endsWith", "getDate", "getDayOfMonth",
        "getDayOfWeek", "getDayOfYear", "getFullYear", "getHours", "getMilliseconds", "getMinutes",
        "getMonth", "getSeconds", "int", "matches", "size", "startsWith", "string", "timestamp",
        "type", "uint",
    }
)  # fmt: skip

_ReadPayload = Callable[[bytes], Any]

_TOKEN = re.compile(
    r"""(?xs)
    (?P<space> \s+ | //[^\n]* )
    | (?P<raw> \b[bB]?[rR][bB]? (?: \"{3}.*?\"{3} | '{3}.*?'{3} | "[^"]*" | '[^']*' ) )
    | (?P<string> (?:\b[bB])? (?:
        \"{3}(?:\\.|[^\\])*?\"{3} | '{3}(?:\\.|[^\\])*?'{3}
        | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' ) )
    | (?P<name> [A-Za-z_]\w* )
    | (?P<other> . )
    """
)
_PLAIN_NAME = re.compile(r"""["']([^"'\\\x00-\x1f]+)["']""")
_BOUND_BY_MACRO = re.compile(r"\b(?:all|exists|exists_one|map|filter)\s*\(\s*([A-Za-z_]\w*)\s*,")
_OPERATOR = re.compile(r"\W")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Condition:
    """One compiled condition.

    Raises `ConfigurationError` where it does not compile or names what there is not, and
    `DriverMissing` without the library.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MOST_CHARACTERS:
            raise ConfigurationError(
                f"where has {len(source)} characters, {MOST_CHARACTERS} is the most"
            )
        try:
            import cel
        except ModuleNotFoundError as error:
            raise DriverMissing(
                f"where needs the Python module {error.name}",
                remedy="pip install 'pgtrickle-relay[filter]'",
            ) from None
        try:
            self._program = cel.compile(source)
        except Exception as error:  # noqa: BLE001 - the library promises no type
            said = str(error).partition("ERROR: ")[2] or str(error)
            reason = said.partition("\n")[0].removeprefix("<input>:")
            raise ConfigurationError(f"where does not compile: {reason}") from None
        named = set(self._program.variables())
        bound = set(_BOUND_BY_MACRO.findall(source))
        _refuse_unknown("variable", named - bound, {*VARIABLES, "payload"})
        functions = {name for name in self._program.functions() if not _OPERATOR.search(name)}
        _refuse_unknown("function", functions, FUNCTIONS)
        self._variables = {name: read for name, read in VARIABLES.items() if name in named}
        self._read_payload = _payload_reader(fields_of(source)) if "payload" in named else None

    @property
    def names_subject(self) -> bool:
        """Whether it asks for the subject."""
        return "subject" in self._variables

    def holds(self, message: RelayMessage) -> bool:
        """Whether it is true of this message.

        Raises `MessageUndecodable` where it can't be told, with what the library said only in
        ``quoting``: it may repeat values.
        """
        values = {name: read(message) for name, read in self._variables.items()}
        if self._read_payload is not None:
            values["payload"] = self._read_payload(message.payload)
        try:
            holds = self._program.execute(values)
        except Exception as error:  # noqa: BLE001 - the library raises what it likes
            refused = MessageUndecodable(f"where can't be told of this message: {_reason(error)}")
            refused.quoting = f"{refused}: {error}"
            raise refused from None
        if not isinstance(holds, bool):
            raise MessageUndecodable(
                f"where gives a value of type {type(holds).__name__}, not true or false"
            )
        return holds


def fields_of(source: str) -> frozenset[str] | None:
    """The top-level fields of the payload that an expression names; None where it may need all."""
    tokens = [
        (str(found.lastgroup), found[0])
        for found in _TOKEN.finditer(source)
        if found.lastgroup != "space"
    ]
    tokens += [("other", "")] * 3
    fields: set[str] = set()
    for index, token in enumerate(tokens):
        if token != ("name", "payload"):
            continue
        behind = [text for _, text in tokens[index + 1 : index + 4]]
        if index and tokens[index - 1][1] == ".":
            return None
        plain = _PLAIN_NAME.fullmatch(behind[1])
        if behind[0] == "." and tokens[index + 2][0] == "name" and behind[2] != "(":
            fields.add(behind[1])
        elif behind[0] == "[" and behind[2] == "]" and plain is not None:
            fields.add(plain[1])
        else:
            return None
    return frozenset(fields)


def _payload_reader(fields: Collection[str] | None) -> _ReadPayload:
    """A function that reads these fields, or all of the payload; nothing that nests too deep."""
    if fields is None:
        read_all = msgspec.json.Decoder().decode
        return lambda payload: _bounded(_readable(read_all, payload))
    names = sorted(fields)
    places = [f"field_{number}" for number in range(len(names))]
    row_type = msgspec.defstruct(
        "Fields",
        [(place, Any, msgspec.UNSET) for place in places],
        rename=dict(zip(places, names, strict=True)),
    )
    read = msgspec.json.Decoder(row_type).decode

    def read_fields(payload: bytes) -> object:
        values = msgspec.structs.astuple(_readable(read, payload))
        return {
            name: _bounded(value)
            for name, value in zip(names, values, strict=True)
            if value is not msgspec.UNSET
        }

    return read_fields


def _readable(read: _ReadPayload, payload: bytes) -> Any:
    try:
        return read(payload)
    except _UNREADABLE:
        raise MessageUndecodable("the payload is not JSON that where could look into") from None


def _bounded(value: object) -> object:
    """The value. Raises `MessageUndecodable` where it nests too deep."""
    level: list[object] = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_LEVELS):
        if not level:
            return value
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)  # type: ignore[attr-defined]  # a list
            if isinstance(inner, dict | list)
        ]
    raise MessageUndecodable(f"the payload nests deeper than the {MOST_LEVELS} levels of where")


def _refuse_unknown(kind: str, names: Collection[str], known: Collection[str]) -> None:
    for name in sorted(set(names) - set(known)):
        raise ConfigurationError(
            f"where names the {kind} {name}, which there is not",
            remedy=f"known are {', '.join(sorted(known))}",
        )


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return "it lacks a field (ask with has() first)"
    if isinstance(error, TypeError):
        return "its values are of types that don't go together"
    return f"{type(error).__name__} of the expression"
