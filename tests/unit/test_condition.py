"""Conditions: what compiles, what is converted, how numbers compare, what one message costs."""

from __future__ import annotations

import builtins
import random
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from relay.condition import FUNCTIONS, MOST_CHARACTERS, MOST_LEVELS, Condition, fields_of
from relay.errors import ConfigurationError, DriverMissing, MessageUndecodable
from relay.message import RelayMessage


def message(payload: object = None, **fields: Any) -> RelayMessage:
    body = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
    return RelayMessage(dedup_key="d", payload=body, **fields)


def holds(source: str, payload: object = None, **fields: Any) -> bool:
    return Condition(source).holds(message(payload, **fields))


def test_a_condition_sees_the_message_and_its_payload() -> None:
    order = {"status": "paid", "total": 12, "lines": [{"qty": 3}], "odd-name": True, "note": None}
    true: Mapping[str, dict[str, Any]] = {
        'payload.status == "paid" && payload.total > 10': {},
        'payload["odd-name"]': {},
        "payload.note == null": {},
        "!has(payload.absent)": {},
        "payload.lines.exists(line, line.qty > 2)": {},
        "size(payload) == 5 && 'status' in payload": {},
        'op == "insert" && key == "7" && subject == "orders.insert"': {
            "op": "insert", "key": "7", "subject": "orders.insert",
        },
        'headers["tenant"] == "a" && stream_table == "orders"': {
            "headers": {"tenant": "a"}, "stream_table": "orders",
        },
        "key == null": {},
    }  # fmt: skip
    for source, fields in true.items():
        assert holds(source, order, **fields), source
        assert not holds(f"!({source})", order, **fields), source


def test_numbers_compare_as_numbers_and_calculate_only_with_their_kind() -> None:
    for source, payload in [
        ("payload.n == 10", b'{"n": 10.0}'),
        ("payload.n == 10.0", b'{"n": 10}'),
        ("payload.n in [10]", b'{"n": 10.0}'),
        ("payload.n > 10", b'{"n": 10.5}'),
        ("payload.n < 1e3", b'{"n": 999}'),
        ("payload.n == 9007199254740993", b'{"n": 9007199254740993}'),
        ("payload.n > 9223372036854775807", b'{"n": 9223372036854775808}'),
        ("payload.n > 1", b'{"n": 123456789012345678901234567890}'),
        ("double(payload.n) + 0.5 == 11.0", b'{"n": 10.5}'),
        ("double(payload.n) + 0.5 == 10.5", b'{"n": 10}'),
        ('payload.n != "10"', b'{"n": 10}'),
        ("payload.n + 1 == 11", b'{"n": 10}'),
    ]:
        assert holds(source, payload), source
    for source, payload in [
        ("payload.n + 1 == 11", b'{"n": 10.0}'),
        ("payload.n > 10", b'{"n": "11"}'),
        ("payload.n > 10", b'{"n": null}'),
        ("payload.n + 1 > 0", b'{"n": 9223372036854775807}'),
        ("payload.n > 1", b'{"n": 1e999}'),
    ]:
        with pytest.raises(MessageUndecodable):
            holds(source, payload)


def test_what_can_not_be_told_of_a_message_costs_that_message_and_repeats_no_value() -> None:
    for source, payload, reason in [
        ("payload.total > 10", {"card": "4711"}, "lacks a field"),
        ("payload.card > 10", {"card": "4711"}, "don't go together"),
        ("payload.card + 9223372036854775807 > 1", {"card": 4711}, "OverflowError"),
        ("payload.card", {"card": "4711"}, "type str"),
        ("payload.card == 1", ["4711"], "could look into"),
        ("payload.card == 1", b'{"card": 4711', "could look into"),
    ]:
        with pytest.raises(MessageUndecodable, match=reason) as refused:
            holds(source, payload)
        assert "4711" not in str(refused.value)
        assert refused.value.found_before_sending


def test_a_document_that_nests_deeper_than_the_bound_is_refused_before_the_library_sees_it() -> (
    None
):
    for levels in (MOST_LEVELS, 900, 10_000):
        deep = b"[" * levels + b"]" * levels
        for source in ("payload.deep == 1", "size(payload) == 1"):
            with pytest.raises(MessageUndecodable):
                holds(source, b'{"deep": %b}' % deep)
    shallow = b"[" * (MOST_LEVELS - 1) + b"]" * (MOST_LEVELS - 1)
    assert holds("payload.deep != 1", b'{"deep": %b}' % shallow)
    assert holds("payload.here == 1", b'{"here": 1, "deep": %b}' % (b"[" * 500 + b"]" * 500))


@pytest.mark.parametrize(
    "source,reason",
    [
        ("payload.total >", "does not compile"),
        ("", "does not compile"),
        ("paylod.total > 1", "the variable paylod"),
        ("frob(payload.total)", "the function frob"),
        ("payload.all(p, q > 1)", "the variable q"),
        ("1 == 1" + " || 1 == 1" * MOST_CHARACTERS, "the most"),
    ],
)
def test_a_condition_that_means_nothing_is_refused_with_the_reason(
    source: str, reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Condition(source)


@pytest.mark.shows("error:DriverMissing")
def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "cel":
            raise ModuleNotFoundError("No module named 'cel'", name="cel")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)

    with pytest.raises(DriverMissing, match=r"pip install 'pgtrickle-relay\[filter\]'"):
        Condition("true")


def test_the_longest_and_worst_expression_ends_no_process() -> None:
    for worst in ("'1' + '+1' * 2040 + ' > 0'", "'!' * 4000 + 'true'", "'(' * 2000 + '1'"):
        ran = subprocess.run(
            [
                sys.executable, "-c",
                "from relay.condition import *; from relay.message import RelayMessage\n"
                f"try: Condition({worst}).holds(RelayMessage(dedup_key='', payload=b''))\n"
                "except ConfigurationError: pass",
            ],
            check=False, timeout=60,
        )  # fmt: skip
        assert ran.returncode == 0, worst


def test_the_functions_are_those_of_the_library() -> None:
    """None is listed that it lacks: with some arguments each says something else than unknown."""
    import cel

    for name in FUNCTIONS:
        said = []
        for form in (
            "{}('1')",
            "'1'.{}('1')",
            "'1'.{}()",
            "timestamp('2026-01-01T00:00:00Z').{}()",
        ):
            try:
                said.append(str(cel.compile(form.format(name)).execute({})))
            except Exception as error:  # noqa: BLE001 - whatever it says
                said.append(str(error))
        assert not all("Undefined" in one for one in said), name


def test_only_the_fields_that_are_named_are_converted() -> None:
    for source, fields in {
        "payload.a > 1 && payload.b.c == 2": {"a", "b"},
        'payload["a b"] == 1 || has(payload . c)': {"a b", "c"},
        "payload.a.payload == 1": None,
        "op == 'payload.a'": set(),
        '"payload.x" == payload.y // payload.z': {"y"},
        r"""r"\" == payload.a && payload.b == '\'payload.c'""": {"a", "b"},
        r'r"\" == payload.a && "x" == payload.b': {"a", "b"},
        "'''payload.x''' == payload.a": {"a"},
        "payload.items.map(i, i.payload)": None,
        "payload.size() > 1": None,
        "payload[op] == 1": None,
        "'a' in payload": None,
        "[1].map(payload, payload.b) == [1]": None,
        r'payload["a\"b"] == 1': None,
    }.items():
        assert fields_of(source) == fields, source


def test_naming_fields_changes_no_answer() -> None:
    """The same random conditions over the named fields and over the whole payload."""
    chance = random.Random(20261130)
    parts = [
        "payload.{} == 1", "has(payload.{0}) && payload.{0} != 2", "payload['{}'] in [1, 'x']",
        "'payload.{}' == 'x'", "!has(payload.{}.inner)", "payload.{} == null",
    ]  # fmt: skip

    def answer(condition: Condition, row: dict[str, object]) -> str:
        try:
            return str(condition.holds(message(row)))
        except MessageUndecodable as error:
            return str(error)

    for _ in range(400):
        source = f" {chance.choice(['&&', '||'])} ".join(
            chance.choice(parts).format(chance.choice("abc")) for _ in range(chance.randint(1, 4))
        )
        row: dict[str, object] = {
            name: chance.choice([1, 2, "x", None, {"inner": 1}, 1.0])
            for name in "abcd"
            if chance.random() < 0.7
        }
        named, whole = Condition(source), Condition(f"({source}) && (payload == payload)")
        assert fields_of(source) is not None
        expected = answer(whole, row)
        assert answer(named, row) == expected, (source, row)
