"""From a plain mapping to a typed, frozen options object, with errors in the user's words.

Used for the runtime settings and for the ``source`` and ``sink`` objects of the catalog alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Literal, TypeVar, get_args, get_origin

import msgspec

from relay.errors import ConfigurationError

T = TypeVar("T")

_AT = re.compile(r" - at `([^`]*)`$")


def parse_options(options: Mapping[str, object], into: type[T], *, path: str) -> T:
    """Convert a mapping to a frozen struct.

    ``path`` is where the mapping stands, for the error's text (``sink``, ``postgres``). Texts that
    spell a number or a boolean are accepted where one is expected. Raises `ConfigurationError`
    for an unknown key (with the nearest known one), a missing key or a wrong value.
    """
    _refuse_unknown_keys(options, into, path)
    try:
        return msgspec.convert(options, into, strict=False)
    except msgspec.ValidationError as error:
        raise _in_words(str(error), into, path) from None


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
            near = get_close_matches(name, known, n=1)
            raise ConfigurationError(
                f"{path}.{name} is not a known key" if path else f"{name} is not a known key",
                remedy=f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}",
            )
        inner = _struct_in(known[name])
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown_keys(value, inner, f"{path}.{name}" if path else name)


def _struct_in(annotation: object) -> type[msgspec.Struct] | None:
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return annotation
    return None


def _in_words(error: str, into: type[T], path: str) -> ConfigurationError:
    inside = ""
    found = _AT.search(error)
    if found:
        error = error[: found.start()]
        inside = found[1].removeprefix("$").removeprefix(".")
    where = ".".join(part for part in (path, inside) if part)
    missing = re.fullmatch(r"Object missing required field `([^`]+)`", error)
    if missing:
        return ConfigurationError(f"{where}.{missing[1]} is missing".lstrip("."))
    choices = _choices(into, inside)
    return ConfigurationError(
        f"{where}: {error[:1].lower()}{error[1:]}",
        remedy=f"use one of {', '.join(choices)}" if choices else "",
    )


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
    return [
        word
        for option in (here, *get_args(here))
        if get_origin(option) is Literal
        for word in get_args(option)
    ]
