"""Writes ``sql/functions/50_key_rules.sql``: the rules that SQL applies when a pipeline is set.

They are made from the declarations of the keys (`relay.options.Key`): a line for the keys that have
one rule in the same places. A place is a backend, its sink or its source, or a pipeline's
direction. Run by `scripts/docs.py`.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import msgspec

from relay import secrets
from relay.options import Key, declared_keys
from relay.pipeline_config import PipelineConfig
from relay.registry import SINKS, SOURCES, options_of
from relay.template import VARIABLES

NAME = "sql/functions/50_key_rules.sql"

Rule = dict[str, Any]
Rules = dict[str, Rule]

# What values of a type are: kinds of JSON, a pattern for their text, and the words of an error.
TYPES: Mapping[str, Rule] = {
    "text": {"kinds": ["string"], "pattern": "", "must": "a text"},
    "word": {"kinds": ["string"], "pattern": ""},
    "integer": {
        "kinds": ["string", "number"],
        "pattern": "^-?[0-9]{1,18}$",
        "must": "a whole number",
    },
    "number": {
        "kinds": ["string", "number"],
        "pattern": r"^-?[0-9]{1,18}(\.[0-9]{1,18})?$",
        "must": "a number",
    },
    "boolean": {
        "kinds": ["string", "boolean"],
        "pattern": "(?i)^(true|false)$",
        "must": "true or false",
    },
    "template": {"kinds": ["string"], "pattern": "", "must": "a template"},
    "object": {"kinds": ["object"], "must": "an object"},
    "list": {"kinds": ["array"], "must": "a list"},
    "word or object": {"kinds": ["string", "object"], "pattern": "", "must": "a word or an object"},
    "nothing": {"kinds": []},
    "text or list": {"kinds": ["string", "array"], "pattern": "", "must": "a text or a list"},
}
_SCALARS: Mapping[object, str] = {str: "text", int: "integer", float: "number", bool: "boolean"}
_HEAD = """\
-- Written by scripts/docs.py from the options types: whoever declares a key there changes this.

create or replace function @schema@.relay_key_rules() returns jsonb
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $rules$
    select $json$"""
_TAIL = """$json$::jsonb
$rules$;
comment on function @schema@.relay_key_rules() is
    'Keys of pipelines and of each backend''s sink and source, with what holds for them.';
"""


def value_rule(annotation: object, key: Key) -> Rule:
    """What a value of this type must be, and each element of a list or an object."""
    arguments = [part for part in get_args(annotation) if part is not type(None)]
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return value_rule(arguments[0], key)
    if origin in (typing.Union, types.UnionType):
        one, *others = (value_rule(part, key) for part in arguments)
        for other in others:
            one |= other | {"is": f"{one['is']} or {other['is']}"}
        return one
    if origin is Literal:
        return {"is": "word", "words": list(get_args(annotation))}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        of = {} if arguments[1] is object else {"of": value_rule(arguments[1], key)}
        return {"is": "object", **of}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"is": "list", "of": value_rule(arguments[0], key)}
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        inner = rules_of(annotation, "")
        return {
            "is": "object",
            "members": inner,
            "of": {"is": "nothing", "must": f"under {' or '.join(inner)}"},
        }
    rule: Rule = {"is": "template" if key.template else _SCALARS[annotation]}
    if key.secret:
        rule["secret"] = True
    if key.schemes:
        rule |= url_rule(key.schemes)
    rule |= {name: bound for name in ("ge", "le") if (bound := getattr(key, name)) is not None}
    return rule


def url_rule(schemes: Sequence[str]) -> Rule:
    """The rule for how a URL begins; where none is needed, several may be separated by commas."""
    named = [scheme for scheme in schemes if scheme]
    begins = rf"({'|'.join(named)})://|\$\{{"
    must = f"a text that begins with {' or '.join(f'{name}://' for name in named)}"
    if "" not in schemes:
        return {"pattern": f"(?i)^({begins})", "must": must}
    pattern = rf"(?i)^(\s*({begins}|(?![^,]*://))[^,]*(,|$))*$"
    return {"pattern": pattern, "must": f"{must}, or without any"}


def rules_of(struct: type[msgspec.Struct], kind: str) -> Rules:
    """The rules for one type of backend, or one direction of pipelines, by key."""
    rules: Rules = {}
    declared = declared_keys(struct)
    for field in msgspec.structs.fields(struct):
        name, key = field.encode_name, declared[field.encode_name]
        if key.only and key.only != kind:
            if key.only in ("forward", "reverse"):
                rules[name] = refused(
                    f"is not a key of a {kind} pipeline", f"It belongs to {key.only} pipelines."
                )
            continue
        if key.profile_only:
            rules[name] = refused(
                "can't be set here", "Options of the client library live in a profile of the relay."
            )
            continue
        if name == "type":
            continue  # SQL has looked the rules up by it.
        rule = value_rule(field.type, key)
        if fixed := _FIXED_TYPES.get((kind, name)):
            rule = {"is": "word", "words": [fixed], "must": f"{fixed} for a {kind} pipeline"}
        for word in ("connection", "needs", "excludes", "required_unless"):
            if value := getattr(key, word):
                rule[word] = value
        if (key.required or field.required) and name not in ("source_type", "sink_type"):
            rule |= {"required_unless": "profile"} if key.connection else {"required": True}
        rules[name] = rule
    if any(key.connection for key in declared.values()):
        rules["profile"] = {"is": "text"}
    return rules


# What the source or the sink of a pipeline's direction always is.
_FIXED_TYPES: Mapping[tuple[str, str], str] = {
    ("forward", "source_type"): "outbox",
    ("reverse", "sink_type"): "pg-inbox",
}


def refused(words: str, hint: str) -> Rule:
    """The rule for a key that people may take for one that may be set here."""
    return {"refused": [words, hint]}


def all_places() -> dict[str, dict[str, Rules]]:
    """Rules of each backend by role, and those of ``pipeline`` by direction."""
    found: dict[str, dict[str, Rules]] = {
        "pipeline": {
            direction: rules_of(PipelineConfig, direction) for direction in ("forward", "reverse")
        }
    }
    for role, table in (("sink", SINKS), ("source", SOURCES)):
        for type_ in table:
            found.setdefault(type_, {})[role] = rules_of(options_of(role, type_), type_)
    return found


def lines() -> list[Rule]:
    """The rules, each with all the keys and places for which it holds."""
    places: dict[tuple[str, str], list[str]] = {}
    for backend, roles in all_places().items():
        for role, rules in roles.items():
            for key, rule in rules.items():
                is_everywhere = all(other.get(key) == rule for other in roles.values())
                place = backend if is_everywhere else f"{backend}.{role}"
                held_in = places.setdefault((key, json.dumps(rule)), [])
                if place not in held_in:
                    held_in.append(place)
    keys: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for (key, rule), held_in in places.items():
        keys.setdefault((tuple(held_in), rule), []).append(key)
    return [
        {"in": held_in, "keys": named, **json.loads(rule)}
        for (held_in, rule), named in keys.items()
    ]


def rules_file() -> str:
    """The whole text of the file."""
    words = {
        "roles": {type_: list(roles) for type_, roles in all_places().items()},
        "types": TYPES,
        "variables": list(VARIABLES),
        "in_template": r"\{\{|\}\}|\$\{(env|file):[^}]+\}|\{("
        + "|".join(VARIABLES)
        + r"|payload(\.[^.{}]+)+)\}",
        "references_only": secrets.REFERENCES_ONLY,
        "secret_header": secrets.SECRET_HEADER,
        "secret_in_url": secrets.SECRET_IN_URL,
        "secret_hint": "Write a reference that the relay resolves, and nothing beside it:"
        " ${env:NAME} or ${file:/run/secrets/name}."
        ' "allow_plaintext_secrets": true takes it as it is.',
    }
    rules = ",\n".join(json.dumps(line) for line in lines())
    rest = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in words.items())
    return f'{_HEAD}{{\n"rules": [\n{rules}\n],\n{rest}\n}}{_TAIL}'
