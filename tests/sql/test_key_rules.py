"""The rules that SQL applies and the options of the relay say the same of every key."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import pytest

from relay.errors import ConfigurationError
from relay.options import Key, declared_keys, parse_options
from relay.pipeline_config import PipelineConfig, parse_config, with_profile
from relay.registry import SINKS, SOURCES, build_sink, build_source, options_of
from relay.secrets import is_secret_key
from tests.contract.surroundings import backend_context
from tests.docs.page import read
from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session

BACKENDS = [("sink", type_) for type_ in SINKS] + [("source", type_) for type_ in SOURCES]
Options = Mapping[str, object]


@dataclass(frozen=True)
class Field:
    """One key as its struct has it."""

    name: str
    type: Any
    key: Key
    is_required: bool


@dataclass(frozen=True)
class Case:
    """Options of a backend that differ from good ones in one key, and which key that is."""

    role: str
    type: str
    field: Field
    options: Options
    is_good: bool


@pytest.fixture
def db(migrated_database: Database) -> Iterator[Session]:
    with session(migrated_database.dsn) as opened:
        opened.run(
            """
            create function pg_temp.refusal(direction text, config jsonb) returns text
            language plpgsql as $$ begin
                perform pgtrickle.relay_validate_config(direction, config);
                return null;
            exception when others then return sqlstate;
            end $$
            """
        )
        yield opened


def refusals(db: Session, configs: list[tuple[str, Options]]) -> list[str | None]:
    """The error code of each configuration; None where it is accepted."""
    rows = db.rows(
        "select pg_temp.refusal(d, c) from unnest(%s::text[], %s::jsonb[])"
        " with ordinality as t (d, c, n) order by n",
        [direction for direction, _ in configs],
        [json.dumps(config) for _, config in configs],
    )
    return [code for (code,) in rows]


def around(role: str, type_: str, options: Options, **keys: object) -> tuple[str, Options]:
    """The configuration of a pipeline with this source or sink, and its direction."""
    if role == "sink" or type_ == "outbox":
        config: dict[str, object] = {
            "source_type": "outbox",
            "source": {"outbox": "x"},
            "sink_type": "stdout",
            "sink": {"type": "stdout"},
        }
    else:
        config = {"sink_type": "pg-inbox", "sink": {"type": "pg-inbox", "inbox": "i"}}
    config |= {f"{role}_type": type_, role: options, **keys}
    return ("reverse" if config["source_type"] != "outbox" else "forward"), config


def fields_of(struct: type[msgspec.Struct], kind: str) -> dict[str, Field]:
    declared = declared_keys(struct)
    return {
        field.encode_name: Field(
            field.encode_name,
            field.type,
            declared[field.encode_name],
            field.required or declared[field.encode_name].required,
        )
        for field in msgspec.structs.fields(struct)
        if declared[field.encode_name].only in ("", kind)
    }


def good_values(annotation: Any, key: Key) -> list[object]:
    """Values that a key must accept."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return good_values(arguments[0], key)
    if origin is Literal:
        return list(arguments)
    if annotation is str and key.schemes:
        urls: list[object] = [f"{scheme}://host" for scheme in key.schemes if scheme]
        return ["https://host/queue"] if "https" in key.schemes else urls
    if annotation is str:
        return ["{op}.{payload.a}", "{{x}}{key}"] if key.template else ["x"]
    if annotation in (int, float):
        lowest = 1 if key.ge is None else key.ge
        numbers: list[object] = [lowest, str(lowest)]
        return [*numbers, key.le] if key.le is not None else numbers
    if annotation is bool:
        return [True, "true", False]
    if arguments and isinstance(origin, type) and issubclass(origin, Mapping):
        return [{}, *({"a": value} for value in good_values(arguments[-1], key))]
    if arguments and isinstance(origin, type) and issubclass(origin, Sequence):
        return [[value] for value in good_values(arguments[0], key)]
    if annotation is object:
        return []
    return [value for part in arguments for value in good_values(part, key)]


def kinds(annotation: Any) -> set[str]:
    """What values of a type are in JSON; ``word`` for one of a few."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kinds(arguments[0])
    if origin is Literal:
        return {"word"}
    if isinstance(origin, type) and issubclass(origin, Mapping | Sequence):
        return {"object"} if issubclass(origin, Mapping) else {"list"}
    if arguments:
        return {kind for part in arguments for kind in kinds(part)} - {"NoneType"}
    return {annotation.__name__}


def bad_values(annotation: Any, key: Key) -> list[object]:
    """Values that no key of this type accepts."""
    is_a = kinds(annotation)
    bad: list[object] = [{"a": {"b": 1}}, [["x"]], [True]]
    if not is_a & {"bool", "int", "float"}:
        bad += [5, True, {"a": 5}, [5.5]]
    if not is_a & {"str", "word"}:
        bad += ["many", ""]
    if "word" in is_a:
        bad += ["avro", ""]
    if is_a & {"int", "bool"}:
        bad += [1.5, "1.5"]
    if is_a & {"int", "float"}:
        bad += [True, "1 2"]
    if "list" not in is_a:
        bad += [["x"], []]
    if "object" not in is_a:
        bad += [{"a": "x"}, {}]
    if key.ge is not None:
        bad += [key.ge - 1, str(key.ge - 1), [key.ge - 1]]
    if key.le is not None:
        bad += [key.le + 1, [key.le + 1]]
    if key.schemes:
        bad += ["gopher://host", "gopher://host,gopher://other", ["gopher://host"]]
    if key.template:
        bad += ["{nope}", "a{", "", {"a": "{nope}"}, {"a": "}"}]
    return bad


def good_options(role: str, type_: str, *wanted: str) -> dict[str, object]:
    """The fewest options that are accepted, with the wanted keys and what these need."""
    fields = fields_of(options_of(role, type_), type_)
    given: dict[str, object] = {"type": type_}

    def add(name: str) -> None:
        if name not in given:
            given[name] = {"output": f"{tempfile.gettempdir()}/x"}.get(
                name, good_values(fields[name].type, fields[name].key)[0]
            )
            if fields[name].key.needs:
                add(fields[name].key.needs)

    for name in wanted:
        add(name)
    excluded = {other for name in wanted for other in fields[name].key.excludes}
    for field in fields.values():
        unless = field.key.required_unless
        instead = unless and unless in given
        if (field.is_required or unless) and not instead and field.name not in excluded:
            add(field.name)
    return given


def cases() -> Iterator[Case]:
    for role, type_ in BACKENDS:
        for field in fields_of(options_of(role, type_), type_).values():
            if field.name == "type" or field.key.profile_only:
                continue
            around_it = good_options(role, type_, field.name)
            for value in good_values(field.type, field.key):
                yield Case(role, type_, field, around_it | {field.name: value}, True)
            for value in bad_values(field.type, field.key):
                yield Case(role, type_, field, around_it | {field.name: value}, False)


def is_accepted_by_the_relay(case: Case) -> bool:
    """What Python says; addresses and templates are read when the backend is built."""
    context = msgspec.structs.replace(
        backend_context(direction="forward" if case.role == "sink" else "reverse"),
        file_roots=(Path(tempfile.gettempdir()),),
    )
    try:
        parse_options(case.options, options_of(case.role, case.type), path=case.role)
        if case.field.key.schemes or case.field.key.template:
            build = build_sink if case.role == "sink" else build_source
            build(case.type, case.options, context)
    except ConfigurationError:
        return False
    return True


def test_every_value_of_every_key_is_judged_alike_by_sql_and_the_relay(db: Session) -> None:
    tried = list(cases())
    configs = [
        around(case.role, case.type, case.options, allow_plaintext_secrets=True) for case in tried
    ]

    for case, code in zip(tried, refusals(db, configs), strict=True):
        told = f"{case.role} {case.type}.{case.field.name}: {case.options}: SQL says {code}"
        assert code == (None if case.is_good else "RL010"), told
        assert is_accepted_by_the_relay(case) == case.is_good, told
    assert len(tried) > 2000


def test_every_value_of_every_key_of_a_pipeline_is_judged_alike(db: Session) -> None:
    tried: list[tuple[str, Options, bool]] = []
    for direction, (role, type_) in (
        ("forward", ("sink", "stdout")),
        ("reverse", ("source", "stdin")),
    ):
        fields = fields_of(PipelineConfig, direction)
        for name in set(fields_of(PipelineConfig, "forward")) | set(
            fields_of(PipelineConfig, "reverse")
        ):
            field = fields.get(name)
            if name in (
                "parallelism",
                "visibility_seconds",
                "source",
                "sink",
                "source_type",
                "sink_type",
            ):
                continue
            if field is None:
                tried.append((*around(role, type_, {"type": type_}, **{name: "earliest"}), False))
                continue
            for is_good, values in (
                (True, good_values(field.type, field.key)),
                (False, bad_values(field.type, field.key)),
            ):
                for value in values:
                    keys = {name: value}
                    tried.append((*around(role, type_, {"type": type_}, **keys), is_good))

    codes = refusals(db, [(direction, config) for direction, config, _ in tried])

    for (direction, config, is_good), code in zip(tried, codes, strict=True):
        assert (code is None) == is_good, (config, code)
        try:
            parse_config(direction, config)  # type: ignore[arg-type]  # one of the two
        except ConfigurationError:
            assert not is_good, config
        else:
            assert is_good, config


def test_what_a_key_needs_excludes_or_requires_is_judged_alike(db: Session) -> None:
    tried: list[Case] = []
    for role, type_ in BACKENDS:
        for name, field in fields_of(options_of(role, type_), type_).items():
            if field.is_required and name != "type":
                options = good_options(role, type_)
                tried.append(
                    Case(role, type_, field, {k: v for k, v in options.items() if k != name}, False)
                )
            if field.key.needs:
                options = good_options(role, type_, name)
                del options[field.key.needs]
                tried.append(Case(role, type_, field, options, False))
            for other in field.key.excludes:
                options = good_options(role, type_, name) | good_options(role, type_, other)
                tried.append(Case(role, type_, field, options, False))

    codes = refusals(
        db,
        [
            around(case.role, case.type, case.options, allow_plaintext_secrets=True)
            for case in tried
        ],
    )

    for case, code in zip(tried, codes, strict=True):
        if case.options.get("type") != "outbox":
            assert code == "RL010", case
        assert not is_accepted_by_the_relay(case), case
    assert len(tried) > 50


def test_secrets_are_those_that_are_declared(db: Session) -> None:
    tried: list[tuple[str, Options]] = []
    expected: list[str | None] = []
    for role, type_ in BACKENDS:
        for name, field in fields_of(options_of(role, type_), type_).items():
            assert is_secret_key(f"{role}.{name}") == field.key.secret, name
            if field.key.secret:
                needed = good_options(role, type_, name)
                needed = {k: "${env:X}" if is_secret_key(k) else v for k, v in needed.items()}
                for value, code in (
                    ("${env:X}", None),
                    ("${file:/run/secrets/x}", None),
                    ("x", "RL013"),
                    ("x${env:X}", "RL013"),
                    ("${env:X}x", "RL013"),
                ):
                    tried.append(around(role, type_, needed | {name: value}))
                    expected.append(code)

    for config, code, said in zip(tried, expected, refusals(db, tried), strict=True):
        assert said == code, config
    assert len(tried) > 50


def test_a_profile_stands_for_every_key_of_the_connection(db: Session) -> None:
    tried: list[tuple[str, Options]] = []
    for role, type_ in BACKENDS:
        declared = declared_keys(options_of(role, type_))
        connection = [name for name, key in declared.items() if key.connection]
        options = {k: v for k, v in good_options(role, type_).items() if k not in connection}
        for name in connection:
            good = (
                good_options(role, type_, name) if not declared[name].profile_only else {name: {}}
            )
            mixed = options | {"profile": "p", name: good[name]}
            tried.append(around(role, type_, mixed, allow_plaintext_secrets=True))
            with pytest.raises(ConfigurationError):
                with_profile(role, type_, mixed, {"p": {"type": type_}}, declared)
        if connection:
            alone = around(role, type_, options | {"profile": "p"})
            assert refusals(db, [alone]) == [None], alone

    assert set(refusals(db, tried)) == {"RL010"}
    assert len(tried) > 100


def test_the_reference_lists_every_key() -> None:
    page = read("docs/RELAY.md")
    for role, type_ in BACKENDS:
        table = SINKS if role == "sink" else SOURCES
        last = {target: name for name, target in table.items()}[table[type_]]
        part = page.split(f"<!-- generated: {last}-{role} -->")[1].split("<!-- end")[0]
        for name, key in declared_keys(options_of(role, type_)).items():
            assert f"| `{name}` |" in part, (role, type_, name)
            assert key.meaning.replace("|", "\\|") in part
