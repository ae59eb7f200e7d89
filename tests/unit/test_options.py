"""Typing a mapping, with errors in the user's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec
import pytest

from relay.errors import ConfigurationError
from relay.options import Key, declared_keys, known_keys, parse_options


class Inner(msgspec.Struct, frozen=True, kw_only=True):
    size: int = 1
    mode: Literal["fast", "safe"] = "safe"


class Outer(msgspec.Struct, frozen=True, kw_only=True):
    """What a test declares.

    name: Who it is, in
        two lines.
    """

    name: str
    inner: Inner = Inner()
    is_on: bool = False
    count: Annotated[int, Key("How many.", ge=1, le=5)] | None = None
    statuses: Annotated[Sequence[int], Key(ge=400)] = ()
    user: Annotated[str | None, Key(needs="password")] = None
    password: Annotated[str | None, Key(needs="user", excludes=("token",))] = None
    token: Annotated[str | None, Key(excludes=("password",))] = None
    topic: Annotated[str | None, Key(required_unless="name")] = None
    path: Annotated[str | None, Key(only="file")] = None
    pattern: Annotated[str, Key(template=True)] = "a"


def test_texts_that_spell_a_number_or_a_boolean_are_accepted() -> None:
    parsed = parse_options(
        {"name": "x", "inner": {"size": "3"}, "is_on": "true"}, Outer, path="sink"
    )

    assert parsed == Outer(name="x", inner=Inner(size=3), is_on=True)


@pytest.mark.parametrize(
    "options,said",
    [
        ({"nam": "x"}, "sink.nam is not a known key (did you mean name?)"),
        ({"zzz": 1}, "known are name, inner, is_on, count"),
        ({"name": "x", "inner": {"sise": 1}}, "sink.inner.sise is not a known key"),
        ({}, "sink.name is missing"),
        ({"name": "x", "inner": {"size": "many"}}, "sink.inner.size: expected `int`"),
        ({"name": "x", "inner": {"mode": "wild"}}, "use one of fast, safe"),
        ({"name": 3}, "sink.name: expected `str`"),
        ({"name": "x", "count": 6}, "sink.count must be from 1 to 5, but is 6"),
        ({"name": "x", "count": "0"}, "sink.count must be from 1 to 5, but is 0"),
        ({"name": "x", "statuses": [500, 200]}, "sink.statuses must be at least 400, but is 200"),
        ({"name": "x", "user": "u"}, "sink needs user and password together"),
        (
            {"name": "x", "user": "u", "password": "p", "token": "t"},
            "sink has both password and token",
        ),
        ({"name": "x", "path": "p"}, "sink.path does not go with type None"),
        ({"name": "x", "pattern": ""}, "sink.pattern is empty"),
    ],
)
def test_what_is_wrong_is_said_with_its_path(options: Mapping[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_options(options, Outer, path="sink")

    assert said in str(refused.value)


def test_all_keys_are_known_by_their_path() -> None:
    assert known_keys(Outer)[:5] == ["name", "inner.size", "inner.mode", "is_on", "count"]


def test_what_a_key_means_stands_in_the_docstring_or_beside_it() -> None:
    declared = declared_keys(Outer)

    assert declared["name"].meaning == "Who it is, in two lines."
    assert declared["count"] == Key("How many.", ge=1, le=5)
    assert declared["is_on"] == Key()
