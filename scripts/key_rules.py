"""Writes ``sql/functions/50_key_rules.sql``: the rules that SQL applies when a pipeline is set.

They are made from the declarations of the keys (`relay.options.Key`). What holds for a sink and a
source, or for both directions of a pipeline, stands once under ``both``. Run by `scripts/docs.py`.
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
    "word": {"kinds": ["string"]},
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
    "text or list": {"kinds": ["string", "array"], "pattern": "", "must": "a text or a list"},
}
_SCALARS: Mapping[object, str] = {str: "text", int: "integer", float: "number", bool: "boolean"}
_HEAD = """\
-- Written by scripts/docs.py from the options types: whoever declares a key there changes this.

create or replace function @schema@.relay_key_rules()
returns jsonb
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $rules$
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
        return one_of(get_args(annotation))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        of = {} if arguments[1] is object else {"of": value_rule(arguments[1], key)}
        return {"is": "object", **of}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"is": "list", "of": value_rule(arguments[0], key)}
    rule: Rule = {"is": "template" if key.template else _SCALARS[annotation]}
    if key.secret:
        rule["secret"] = True
    if key.schemes:
        rule |= url_rule(key.schemes)
    if key.ge is not None:
        until = f" to {key.le}" if key.le is not None else " on"
        rule |= {"ge": key.ge, "must": f"{TYPES[rule['is']]['must']} from {key.ge}{until}"}
    if key.le is not None:
        rule["le"] = key.le
    return rule


def one_of(words: Sequence[str]) -> Rule:
    """The rule for one of a few words."""
    return {"is": "word", "pattern": f"^({'|'.join(words)})$", "must": " or ".join(words)}


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
    """The rules for one type of backend, or one direction of pipelines."""
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
        rule = one_of([kind]) if name == "type" else value_rule(field.type, key)
        if name in _FIXED_TYPES.get(kind, ()):
            rule = one_of([_FIXED_TYPES[kind][name]])
            rule["must"] = f"{rule['must']} for a {kind} pipeline"
        for word in ("connection", "needs", "excludes", "required_unless"):
            if value := getattr(key, word):
                rule[word] = value
        if (key.required or field.required) and name not in ("type", "source_type", "sink_type"):
            rule |= {"required_unless": "profile"} if key.connection else {"required": True}
        rules[name] = rule
    if any(key.connection for key in declared.values()):
        rules["profile"] = {"is": "text"}
    return rules


# What the source or the sink of a pipeline's direction always is.
_FIXED_TYPES: Mapping[str, Mapping[str, str]] = {
    "forward": {"source_type": "outbox"},
    "reverse": {"sink_type": "pg-inbox"},
}


def refused(words: str, hint: str) -> Rule:
    """The rule for a key that people may take for one that may be set here."""
    return {"refused": [words, hint]}


def all_rules() -> dict[str, dict[str, Rules]]:
    """Rules by backend and role, and those of ``pipeline`` by direction."""
    found: dict[str, dict[str, Rules]] = {
        "pipeline": {
            direction: rules_of(PipelineConfig, direction) for direction in ("forward", "reverse")
        }
    }
    for role, table in (("sink", SINKS), ("source", SOURCES)):
        for type_ in table:
            found.setdefault(type_, {})[role] = rules_of(options_of(role, type_), type_)
    for roles in found.values():
        one, other = [*roles.values(), *roles.values()][:2]
        both = {name: rule for name, rule in one.items() if other.get(name) == rule}
        for role, rules in roles.items():
            roles[role] = {name: rule for name, rule in rules.items() if name not in both}
        roles["both"] = both
    return found


def rules_file() -> str:
    """The whole text of the file."""
    parts = [
        f"{json.dumps(backend)}: {{\n"
        + ",\n".join(
            f"{json.dumps(role)}: {{\n"
            + ",\n".join(
                f"    {json.dumps(key)}: {json.dumps(rule)}" for key, rule in rules.items()
            )
            + "\n}"
            for role, rules in roles.items()
        )
        + "}"
        for backend, roles in all_rules().items()
    ]
    words = {
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
    parts += [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in words.items()]
    rules = ",\n".join(parts)
    return f"{_HEAD}{{\n{rules}\n}}{_TAIL}"
