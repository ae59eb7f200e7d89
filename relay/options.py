"""What a configuration key is, and from a plain mapping to a typed, frozen options object.

A key is declared once, where its struct has it: type and default as for any struct, its meaning in
the struct's docstring, all else as a `Key` in its annotation. From that follow the checks here with
their words, the rules that SQL applies when a pipeline is set (``scripts/docs.py`` writes them) and
the tables of the reference. Used for the runtime settings and for the ``source`` and ``sink``
objects of the catalog alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from inspect import cleandoc
from typing import Annotated, Literal, TypeVar, get_args, get_origin

import msgspec

from relay.errors import ConfigurationError, suggestion

T = TypeVar("T")

# In a docstring: a key at the beginning of a line, and what is said of it, indented further on.
_MEANING = re.compile(r"^(\w+): (.+(?:\n +.+)*)", re.MULTILINE)
_NO_TEXT = re.compile(r"Expected `str(?: \| null)?`, got `(?:int|float|bool)`")
_AT = re.compile(r" - at `([^`]*)`$")


class Key(msgspec.Struct, frozen=True):
    """What is to be known of one key besides its type and default.

    meaning: Markdown for the reference, unless a docstring says it.
    ge, gt, le: What a number must be at least, above, and at most; each element of a list, too.
    schemes: Those that a URL may have, an empty one where it may have none.
    template: A text, or each of an object, in which `relay.template.VARIABLES` may stand.
    secret: In the catalog a reference only.
    connection: Comes from a profile as a whole, or from the row as a whole.
    profile_only: Comes from a profile only.
    only: The one type of backend, or direction of a pipeline, that has the key.
    required: A key with a default that must be given nevertheless, by those that have it.
    needs: A key that must stand beside it; ``excludes``: those that must not.
    required_unless: The key without which this one is required.
    """

    meaning: str = ""
    ge: int | None = None
    gt: int | None = None
    le: int | None = None
    schemes: Sequence[str] = ()
    template: bool = False
    secret: bool = False
    connection: bool = False
    profile_only: bool = False
    only: str = ""
    required: bool = False
    needs: str = ""
    excludes: Sequence[str] = ()
    required_unless: str = ""

    @property
    def bounds(self) -> str:
        """What a number must do: ``be from 1 to 8``. Empty where it may be any."""
        if self.gt is not None:
            return f"be above {self.gt}"
        if self.le is not None:
            return f"be from {self.ge} to {self.le}"
        if self.ge is None:
            return ""
        return f"be at least {self.ge}" if self.ge else "not be negative"

    def allows(self, number: float) -> bool:
        """Whether a number is within the bounds."""
        return (
            (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
        )


Positive = Annotated[int, Key(ge=1)]
Connecting = Annotated[str | None, Key(connection=True)]
ConnectingFlag = Annotated[bool, Key(connection=True)]
Credential = Annotated[str | None, Key(secret=True, connection=True)]

# Keys that mean the same in several backends.
Template = Annotated[str, Key("The subject of each event.", template=True)]
Routing = Annotated[Mapping[str, str], Key("Other templates by event type or op.", template=True)]
Format = Annotated[
    Literal["envelope", "payload", "cloudevents"],
    Key("How an event is written, see [Formats](#formats)."),
]
TimeoutMs = Annotated[int, Key("How long to wait for an answer, in milliseconds.", ge=1)]
TlsCert = Annotated[
    str | None,
    Key("PEM file of our certificate.", connection=True, needs="tls_key"),
]
TlsKey = Annotated[
    str | None, Key("PEM file of the key of `tls_cert`.", connection=True, needs="tls_cert")
]
TlsInsecure = Annotated[bool, Key("Accept any certificate of the server.", connection=True)]


def parse_options(
    options: Mapping[str, object], into: type[T], *, path: str, kind: object = None
) -> T:
    """Convert a mapping to a frozen struct.

    ``path`` is where the mapping stands, for the error's text (``sink``, ``postgres``); ``kind``
    is what keys with ``only`` are for, by default its ``type``. Texts that spell a number or a
    boolean are accepted where one is expected. Raises `ConfigurationError` for an unknown key
    (with the nearest known one), a missing key, a wrong value, or keys that don't go together.
    """
    _refuse_unknown_keys(options, into, path)
    try:
        parsed = msgspec.convert(options, into, strict=False)
    except msgspec.ValidationError as error:
        raise _in_words(str(error), into, path) from None
    check_values(parsed, path)
    _refuse_combinations(options, into, path, options.get("type") if kind is None else kind)
    return parsed


def check_values(parsed: object, path: str) -> None:
    """Raise `ConfigurationError` for a number outside of its bounds, or an empty template."""
    for name, rule in declared_keys(type(parsed)).items():
        value = getattr(parsed, name)
        where = f"{path}.{name}" if path else name
        if rule.template and "" in (value.values() if isinstance(value, Mapping) else (value,)):
            raise ConfigurationError(f"{where} is empty", remedy="leave it out for the default")
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int | float) and not rule.allows(number):
                raise ConfigurationError(f"{where} must {rule.bounds}, but is {number}")
    for field in msgspec.structs.fields(parsed):  # type: ignore[arg-type]  # a struct, by contract
        if _struct_in(field.type):
            check_values(getattr(parsed, field.name), field.name)


def declared_keys(struct: type) -> dict[str, Key]:
    """The declaration of each key of a struct; its meaning stands in the struct's docstring."""
    meanings = {
        name: " ".join(words.split())
        for known in reversed(struct.__mro__)
        for name, words in _MEANING.findall(cleandoc(known.__doc__ or ""))
    }
    declared: dict[str, Key] = {}
    for field in msgspec.structs.fields(struct):
        name, outer = field.encode_name, (field.type, *get_args(field.type))
        keys = [part for one in outer for part in get_args(one) if isinstance(part, Key)]
        rule = keys[0] if keys else Key()
        words = meanings.get(name, rule.meaning)
        declared[name] = msgspec.structs.replace(rule, meaning=words)
    return declared


def known_keys(struct: type[msgspec.Struct], prefix: str = "") -> list[str]:
    """The dotted paths of all keys that a struct has, those of inner structs included."""
    keys: list[str] = []
    for field in msgspec.structs.fields(struct):
        inner = _struct_in(field.type)
        path = f"{prefix}{field.encode_name}"
        keys.extend([path] if inner is None else known_keys(inner, f"{path}."))
    return keys


def _refuse_unknown_keys(options: Mapping[str, object], into: type[T], path: str) -> None:
    known = {field.encode_name: field.type for field in msgspec.structs.fields(into)}  # type: ignore[arg-type]  # a struct type, by contract
    for name, value in options.items():
        if name not in known:
            raise ConfigurationError(
                f"{path}.{name} is not a known key" if path else f"{name} is not a known key",
                remedy=suggestion(name, known),
            )
        inner = _struct_in(known[name])
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown_keys(value, inner, f"{path}.{name}" if path else name)


def _refuse_combinations(
    options: Mapping[str, object], into: type[T], path: str, kind: object
) -> None:
    given = {name for name, value in options.items() if value is not None and value is not False}
    declared = declared_keys(into)
    for name, rule in declared.items():
        where = f"{path}.{name}" if path else name
        problem = remedy = ""
        beside = next((other for other in rule.excludes if other in given), None)
        if rule.only and rule.only != kind:
            if name in given:
                problem = f"{where} does not go with type {kind}"
                if not path:
                    problem = f"{where} belongs to {rule.only} pipelines"
        elif name not in given:
            if rule.required:
                problem = f"{where} is missing"
            elif rule.required_unless and rule.required_unless not in given:
                both = ", and not both" if rule.required_unless in rule.excludes else ""
                problem = f"{path} needs {name} or {rule.required_unless}{both}"
        elif beside is not None:
            problem, remedy = f"{path} has both {name} and {beside}", "choose one"
        elif rule.needs and rule.needs not in given:
            problem = f"{where} needs {rule.needs}"
            if declared[rule.needs].needs == name:
                pair = [known for known in declared if known in (name, rule.needs)]
                problem = f"{path} needs {' and '.join(pair)} together"
        if problem:
            raise ConfigurationError(problem, remedy=remedy)


def _struct_in(annotation: object) -> type[msgspec.Struct] | None:
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return annotation
    return None


def _in_words(error: str, into: type[T], path: str) -> ConfigurationError:
    inside = ""
    found = _AT.search(error)
    if found:
        error = error[: found.start()]
        inside = found[1].removeprefix("$").removeprefix(".").replace("[...]", ".<name>")
    where = ".".join(part for part in (path, inside) if part)
    missing = re.fullmatch(r"Object missing required field `([^`]+)`", error)
    if missing:
        return ConfigurationError(f"{where}.{missing[1]} is missing".lstrip("."))
    choices = _choices(into, inside)
    remedy = f"use one of {', '.join(choices)}" if choices else ""
    if _NO_TEXT.match(error):
        remedy = "put the value in quotes"
    return ConfigurationError(f"{where}: {error[:1].lower()}{error[1:]}", remedy=remedy)


def _choices(into: type[T], path: str) -> list[str]:
    """The words that the field at this path may hold, where it takes one of a few."""
    here: object = into
    for name in path.split("."):
        struct = _struct_in(here)
        fields = (
            {}
            if struct is None
            else {field.encode_name: field.type for field in msgspec.structs.fields(struct)}
        )
        here = fields.get(name)
    options = [here, *get_args(here)]
    options += [inner for option in options for inner in get_args(option)]
    words = [
        word for option in options if get_origin(option) is Literal for word in get_args(option)
    ]
    return list(dict.fromkeys(words))
