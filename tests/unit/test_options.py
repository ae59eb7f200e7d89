"""Typing a mapping, with errors in the user's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
import pytest

from relay.errors import ConfigurationError
from relay.options import known_keys, parse_options


class Inner(msgspec.Struct, frozen=True, kw_only=True):
    size: int = 1
    mode: Literal["fast", "safe"] = "safe"


class Outer(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    inner: Inner = Inner()
    is_on: bool = False


def test_texts_that_spell_a_number_or_a_boolean_are_accepted() -> None:
    parsed = parse_options(
        {"name": "x", "inner": {"size": "3"}, "is_on": "true"}, Outer, path="sink"
    )

    assert parsed == Outer(name="x", inner=Inner(size=3), is_on=True)


@pytest.mark.parametrize(
    "options,said",
    [
        ({"nam": "x"}, "sink.nam is not a known key (did you mean name?)"),
        ({"zzz": 1}, "known are name, inner, is_on"),
        ({"name": "x", "inner": {"sise": 1}}, "sink.inner.sise is not a known key"),
        ({}, "sink.name is missing"),
        ({"name": "x", "inner": {"size": "many"}}, "sink.inner.size: expected `int`"),
        ({"name": "x", "inner": {"mode": "wild"}}, "use one of fast, safe"),
        ({"name": 3}, "sink.name: expected `str`"),
    ],
)
def test_what_is_wrong_is_said_with_its_path(options: Mapping[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_options(options, Outer, path="sink")

    assert said in str(refused.value)


def test_all_keys_are_known_by_their_path() -> None:
    assert known_keys(Outer) == ["name", "inner.size", "inner.mode", "is_on"]
