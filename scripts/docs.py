#!/usr/bin/env python3
"""Writes the generated parts of the documentation, the files of docs/monitoring, and the SQL rules
of keys, sql/functions/50_key_rules.sql.

    scripts/docs.py            rewrite what is stale
    scripts/docs.py --check    change nothing, exit 1 and name what is stale

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``. What it
says comes from the declarations of the keys, the metrics, the errors and the SQL files: whoever
changes one of these changes the reference. A key without a declaration is an error.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import key_rules  # noqa: E402 - the checkout's own modules come first
import monitoring  # noqa: E402
import msgspec  # noqa: E402

from relay import cli, errors, metrics, registry, settings, template, wire  # noqa: E402
from relay.migrate import filled  # noqa: E402
from relay.options import Key, declared_keys  # noqa: E402
from relay.pipeline_config import Mask, PipelineConfig  # noqa: E402
from relay.status import screen  # noqa: E402
from relay.tls import TlsKeys  # noqa: E402

NOTHING = "-"
GENERATED = ("docs/RELAY.md", "docs/SQL.md", "docs/OPERATIONS.md", "docs/QUESTIONS.md")

_HELP_COLUMNS = "96"
_PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end: \2 -->)", re.DOTALL)

# What people call, by topic; everything else is the relay's own business.
SQL_TOPICS: Mapping[str, Sequence[str]] = {
    "sql-outbox": (
        "enable_outbox",
        "repair_outbox",
        "disable_outbox",
        "adopt_outbox",
        "outbox_publish",
        "outbox_status",
        "outbox_rows_consumed",
        "relay_capture_problems",
    ),
    "sql-pipeline": (
        "set_relay_outbox",
        "set_relay_inbox",
        "enable_relay",
        "disable_relay",
        "delete_relay",
        "relay_seek",
        "get_relay_config",
        "list_relay_configs",
        "relay_validate_config",
    ),
    "sql-inbox": (
        "create_inbox",
        "enable_inbox_tracking",
        "disable_inbox_tracking",
        "drop_inbox",
        "inbox_status",
        "inbox_health",
        "inbox_mark_processed",
        "inbox_mark_failed",
        "replay_inbox_messages",
    ),
    "sql-group": (
        "create_consumer_group",
        "drop_consumer_group",
        "poll_outbox",
        "commit_offset",
        "extend_lease",
        "consumer_heartbeat",
        "seek_offset",
        "consumer_lag",
        "relay_group_create",
        "relay_group_release",
    ),
    "sql-dead-letter": (
        "relay_dlq_list",
        "relay_dlq_stats",
        "relay_dlq_retry",
        "relay_dlq_retry_all",
        "relay_dlq_purge",
    ),
    "sql-fleet": (
        "relay_lag",
        "relay_fleet",
        "relay_readers",
        "relay_outbox_sizes",
        "relay_forget_group",
        "relay_schema_version",
    ),
    "sql-working": (
        "relay_outbox_of",
        "relay_sleep",
        "relay_sweep_outbox",
        "relay_claim",
        "relay_to_repartition",
        "relay_repartition",
        "relay_commit",
        "relay_release",
        "relay_cursor_get",
        "relay_cursor_set",
        "relay_dead_letter",
        "relay_dlq_take",
        "relay_dlq_settle",
        "relay_dlq_fail",
        "relay_dlq_put_back",
        "relay_inbox",
        "relay_report",
        "relay_retire",
    ),
}

# Raised by a trigger, which no function body names.
_RAISED_BY_TRIGGERS = {"set_relay_outbox": {"RL012"}, "set_relay_inbox": {"RL012"}}
# Raised below for other callers, or caught on the way up.
_CAUGHT = {
    "repair_outbox": {"RL002"},
    "disable_outbox": {"RL001", "RL002", "RL005"},
    "relay_lag": {"RL003", "RL005", "RL022"},
    "set_relay_outbox": {"RL004", "RL031", "RL032"},
    "set_relay_inbox": {"RL003", "RL005", "RL022", "RL023"},
    "disable_relay": {"RL010", "RL013"},
    "create_inbox": {"RL030"},
    "enable_inbox_tracking": {"RL030"},
}


class Unexplained(Exception):
    """A key, function or part that nothing explains."""


# ---------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------


def keys_of(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[Key, Sequence[str]]]:
    """Each key's declaration and its row of a table. Raises `Unexplained`."""
    declared = declared_keys(struct)
    of_tls = TlsKeys.__struct_fields__
    for field in sorted(msgspec.structs.fields(struct), key=lambda field: field.name in of_tls):
        key = declared[field.encode_name]
        if not key.meaning:
            raise Unexplained(f"nothing explains {struct.__name__}.{field.name}")
        type_ = type_words(field.type)
        if key.ge is not None and key.le != key.ge:
            type_ += f" {key.ge} to {key.le}" if key.le is not None else f" from {key.ge}"
        if key.template or key.secret:
            type_ = type_.replace("text", "template" if key.template else "secret")
        default = _default(field)
        if key.required or key.required_unless:
            default = (
                f"required without `{key.required_unless}`" if key.required_unless else "required"
            )
        words = (
            f"{key.meaning} For `{key.only}` only." if key.only in registry.SINKS else key.meaning
        )
        yield key, (f"`{prefix}{field.encode_name}`", type_, default, words)


def _found_with_rest(pattern: re.Pattern[str], text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Each match with the text from its end to the next match."""
    matches = list(pattern.finditer(text))
    ends = [*(match.start() for match in matches[1:]), len(text)]
    for match, end in zip(matches, ends[: len(matches)], strict=True):
        yield match, text[match.end() : end]


def type_words(annotation: object) -> str:
    """A type in the reader's words."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_words(option) for option in arguments if option is not type(None))
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in arguments)
    if origin is typing.Annotated:
        return type_words(arguments[0])
    if annotation in _TYPE_WORDS:
        return _TYPE_WORDS[annotation]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "object" if arguments[1] is object else f"object of {type_words(arguments[1])}s"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        of = type_words(arguments[0])
        return f"list of {of}" if get_origin(arguments[0]) is Literal else f"list of {of}s"
    raise Unexplained(f"no words for the type {annotation}")


_TYPE_WORDS: Mapping[object, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "text",
    Mask: "mask",
}


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value: object = field.default
    if value is msgspec.NODEFAULT:
        value = field.default_factory()
    if value is None:
        return NOTHING
    if value == {} or value == "":
        return "empty"
    return f"`{_plain(value)}`"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(_plain(inner) for inner in value)
    return str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    return _rows(("key", "type", "default", "meaning"), rows)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        " | ".join(header),
        " | ".join("---" for _ in header),
        *(" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows),
    ]
    return "".join(f"| {line} |\n" for line in lines)


# ---------------------------------------------------------------------------
# Settings, pipelines, backends
# ---------------------------------------------------------------------------


def settings_part() -> str:
    rows: list[Sequence[str]] = []
    for field in msgspec.structs.fields(settings.Settings):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            rows += [row for _, row in keys_of(field.type, f"{field.name}.")]
        else:
            words = declared_keys(settings.Settings)[field.name].meaning
            rows.append((f"`{field.name}`", "object", "empty", words))
    return _table(rows)


def pipeline_part() -> str:
    rows = []
    defaults = {field.name: field for field in msgspec.structs.fields(settings.RelaySettings)}
    for key, (shown, type_, default, words) in keys_of(PipelineConfig):
        name = shown.strip("`")
        if default == NOTHING and name in defaults:
            default = f"{_default(defaults[name])} (`relay.{name}`)"
        rows.append((shown, key.only or "both", type_, default, words))
    return _rows(("key", "pipelines", "type", "default", "meaning"), rows)


def backend_parts() -> Iterator[tuple[str, Callable[[], str]]]:
    """A table for each class of the registry, called after the last type that it serves."""
    for role, types_ in (("sink", registry.SINKS), ("source", registry.SOURCES)):
        for type_ in {target: type_ for type_, target in types_.items()}.values():
            yield f"{type_}-{role}", functools.partial(options_part, role, type_)


def options_part(role: str, type_: str) -> str:
    return _table([row for _, row in keys_of(registry.options_of(role, type_))])


# ---------------------------------------------------------------------------
# Templates, names, metrics, errors, command line
# ---------------------------------------------------------------------------

_VARIABLE_WORDS = {
    "stream_table": "The table, without its schema.",
    "op": "`insert`, `update`, `delete`, `upsert`, `truncate`, `snapshot_begin`, `snapshot_end` or"
    " `event`.",
    "key": "The row's key; empty where it has none.",
    "outbox_id": "Id of the outbox row.",
    "refresh_id": "Id of the captured statement.",
    "dedup_key": "The dedup key.",
    "event_type": "The `event_type` header; empty where the publisher set none.",
    "subject": "The `subject` header; empty where the publisher set none.",
}


def templates_part() -> str:
    rows = [(f"`{{{name}}}`", _VARIABLE_WORDS[name]) for name in template.VARIABLES]
    rows.append(("`{payload.a.b}`", "A single value inside the row: text, number or boolean."))
    return _rows(("variable", "value"), rows)


_METADATA_WORDS = {
    "dedup_key": "Dedup key, the same on every repetition.",
    "op": "What happened.",
    "key": "Key of the row, where it has one.",
    "stream_table": "The table.",
    "outbox_id": "Id of the outbox row.",
    "refresh_id": "Id of the captured statement.",
    "full_refresh": "`true` for a row of a full refresh.",
    "created_at": "When the outbox row was written, RFC 3339.",
    "format": "`envelope`, `payload` or `cloudevents`: how the body is to be read.",
}


def metadata_part() -> str:
    rows = [
        (f"`{getattr(wire.TITLE, field)}`", _METADATA_WORDS[field])
        for field in wire.Spelling.__struct_fields__
    ]
    return _rows(("NATS header", "value"), rows)


def metadata_of_all_part() -> str:
    """Our metadata as each backend spells them, backends of one spelling in one column."""
    columns: dict[str, list[str]] = {}
    for type_ in registry.SINKS:
        if (spelling := _spelling_of(type_)) is not None:
            columns.setdefault(spelling, []).append(f"`{type_}`")
    rows = [
        (*(f"`{getattr(getattr(wire, one), field)}`" for one in columns), _METADATA_WORDS[field])
        for field in wire.Spelling.__struct_fields__
    ]
    return _rows((*map(", ".join, columns.values()), "value"), rows)


_SPELT = re.compile(r"(?:\bwire\.|from relay\.wire import )(TITLE|HTTP|LOWER|FIELD)\b")
# What has metadata in its body alone.
_WITHOUT_METADATA = ("pg-inbox", "file", "stdout")


def _spelling_of(type_: str) -> str | None:
    """The one spelling that the modules of a backend use; None where it writes no metadata."""
    if type_ in _WITHOUT_METADATA:
        return None
    package = registry.SINKS[type_].partition(":")[0].replace(".", "/")
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / package).glob("*.py"))
    found = {match[1] for text in texts for match in _SPELT.finditer(text)}
    if len(found) != 1:
        raise Unexplained(f"{package} spells our metadata as {sorted(found)}")
    return found.pop()


def view_keys_part() -> str:
    """The keys that the view declares, in the order in which it does."""
    groups = (one if isinstance(one, tuple) else (one,) for one in vars(screen).values())
    keys = [key for group in groups for key in group if isinstance(key, screen.Key)]
    return _rows(
        ("key", "what it does"),
        [(f"`{key.key}`", f"{key.label}: {key.help}".removeprefix(": ")) for key in keys],
    )


def envelope_part() -> str:
    return ", ".join(f"`{field}`" for field in wire.Envelope.__struct_fields__) + "\n"


def metrics_part() -> str:
    rows = [
        (
            f"`{metrics.PREFIX}{spec.name}`",
            spec.type,
            ", ".join(f"`{label}`" for label in spec.label_names) or NOTHING,
            spec.help if spec.of is None else f"{spec.help} Only {spec.of} pipelines.",
        )
        for spec in metrics.METRICS
    ]
    return _rows(("metric", "type", "labels", "meaning"), rows)


def errors_part() -> str:
    rows = []
    for error in _tree(errors.RelayError):
        if not error.__subclasses__() or error is not errors.RelayError:
            words = " ".join((error.__doc__ or "").split())
            rows.append((f"`{error.__name__}`", error.kind.value, words.replace("``", "`")))
    return _rows(("error", "kind", "meaning"), rows)


def _tree(error: type[errors.RelayError]) -> Iterator[type[errors.RelayError]]:
    yield error
    for below in error.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from _tree(below)


def help_part() -> str:
    former = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _HELP_COLUMNS
    try:
        text = cli.parser().format_help()
    finally:
        if former is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = former
    return f"<!-- not executed: this is what --help prints -->\n```text\n{text.strip()}\n```\n"


def evidence_part(role: Literal["sink", "source"]) -> Callable[[], str]:
    """Which promises of the contract the suite shows for each backend, and why not the others."""

    def part() -> str:
        suites = _suites(role, registry.SINKS if role == "sink" else registry.SOURCES)
        evidences = list(dict.fromkeys(name for suite in suites for name in suite.evidences()))
        rows = [[evidence, *(_mark(suite, evidence) for suite in suites)] for evidence in evidences]
        table = _rows(["promise", *(f"`{suite.backend}`" for suite in suites)], rows)
        reasons = [
            f"- `{suite.backend}`, {evidence}: {reason}\n"
            for suite in suites
            for evidence, reason in (suite.lacks | suite.shown_as).items()
        ]
        return f"{table}\n{''.join(reasons)}" if reasons else table

    return part


def _mark(suite: _Suite, evidence: str) -> str:
    if evidence in suite.lacks:
        return "-"
    return "yes, see below" if evidence in suite.shown_as else "yes"


class _Suite(typing.Protocol):
    backend: str
    lacks: dict[str, str]
    shown_as: dict[str, str]

    def evidences(self) -> dict[str, list[str]]: ...


def _suites(role: str, backends: Mapping[str, str]) -> list[_Suite]:
    found: dict[str, _Suite] = {}
    for path in sorted((ROOT / "tests/contract").glob(f"test_*_{role}.py")):
        named = re.findall(
            r'^    backend = "([\w-]+)"', path.read_text(encoding="utf-8"), re.MULTILINE
        )
        if not backends.keys() & named:
            continue
        module = importlib.import_module(f"tests.contract.{path.stem}")
        for name in dir(module):
            suite = getattr(module, name)
            if name.startswith("Test") and getattr(suite, "backend", None) in backends:
                found[suite.backend] = suite
    if missing := backends.keys() - found.keys():
        raise Unexplained(f"no contract suite for the {role} {', '.join(sorted(missing))}")
    return [found[backend] for backend in backends]


# ---------------------------------------------------------------------------
# SQL
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class SqlFunction:
    """One function as its file defines it."""

    name: str
    arguments: tuple[str, ...]
    returns: str
    comment: str
    is_definer: bool
    body: str


@dataclass(frozen=True)
class Relations:
    """Which error codes a function can raise, and who may execute it."""

    codes: Mapping[str, frozenset[str]]
    callers: Mapping[str, str]


def sql_functions() -> list[SqlFunction]:
    """All functions of ``sql/functions``, in the order of their definition."""
    found: list[SqlFunction] = []
    for path in sorted((ROOT / "sql/functions").glob("*.sql")):
        text = _sql(path)
        comments = {
            (name, _spaced(types_)): _unquoted(words)
            for name, types_, words in re.findall(
                r"comment on function pgtrickle\.(\w+)\((.*?)\) is\s+'((?:[^']|'')*)';", text
            )
        }
        for start, definition in _found_with_rest(_FUNCTION, text):
            arguments = _arguments(definition)
            types_ = ", ".join(
                _type_of(argument) for argument in arguments if not argument.startswith("out ")
            )
            header = definition[: definition.index(" as $")] if " as $" in definition else ""
            header = header or definition[: definition.index("\nas $")]
            returns = re.search(r"\breturns (.*?)\s+language ", header, re.DOTALL)
            comment = comments.get((start[1], types_))
            if comment is None:
                raise Unexplained(f"{path.name} has no comment on {start[1]}({types_})")
            found.append(
                SqlFunction(
                    name=start[1],
                    arguments=arguments,
                    returns=_spaced(returns[1]) if returns else _record(arguments),
                    comment=comment,
                    is_definer="security definer" in header,
                    body=definition.partition("comment on function")[0],
                )
            )
    return found


_FUNCTION = re.compile(r"create or replace function pgtrickle\.(\w+)\(")


def _arguments(definition: str) -> tuple[str, ...]:
    """The arguments up to the closing parenthesis; commas inside a type's parentheses stay."""
    parts = [""]
    depth = 1
    for character in definition:
        depth += (character == "(") - (character == ")")
        if depth == 0:
            break
        if character == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(spaced for part in parts if (spaced := _spaced(part)))


def _type_of(argument: str) -> str:
    bare = argument.partition(" default ")[0].removeprefix("variadic ")
    return bare.split(" ", 1)[1]


def _record(arguments: Sequence[str]) -> str:
    outs = [argument.removeprefix("out ") for argument in arguments if argument.startswith("out ")]
    return f"record ({', '.join(outs)})"


def _spaced(text: str) -> str:
    return " ".join(text.split()).replace("( ", "(").replace(" )", ")")


def _unquoted(text: str) -> str:
    return _spaced(text.replace("''", "'"))


def relations(functions: Sequence[SqlFunction]) -> Relations:
    """Error codes by what each function calls, directly or below; callers by the grants."""
    names = {function.name for function in functions}
    own: dict[str, set[str]] = {}
    calls: dict[str, set[str]] = {}
    for function in functions:
        raised = set(re.findall(r"'(RL\d{3})'", function.body))
        own.setdefault(function.name, set()).update(raised)
        code = _QUOTED.sub("''", re.sub(r"--.*", "", function.body))
        called = set(re.findall(r"pgtrickle\.(\w+)\(", code)) & names
        calls.setdefault(function.name, set()).update(called - {function.name})
    for name, codes in _RAISED_BY_TRIGGERS.items():
        own[name] |= codes
    codes_of: dict[str, frozenset[str]] = {}
    for name in own:
        reached, waiting = {name}, [name]
        while waiting:
            fresh = calls.get(waiting.pop(), set()) - reached
            reached |= fresh
            waiting += fresh
        below = {code for reached_name in reached for code in own[reached_name]}
        codes_of[name] = frozenset(below - _CAUGHT.get(name, set()))
    callers: dict[str, str] = {}
    grants = _without_comments(ROOT / "sql/functions/90_privilege.sql")
    for kind, grantee in (
        ("relay", "pgtrickle_relay"),
        ("publisher", "pgtrickle_publisher"),
        ("public", "public"),
    ):
        found = re.search(
            rf"{kind}_functions constant text\[\] := array\[(.*?)\];", grants, re.DOTALL
        )
        granted = re.findall(r"'(\w+)'", found[1]) if found else []
        callers.update(dict.fromkeys(granted, grantee))
    return Relations(codes_of, callers)


_QUOTED = re.compile(r"'(?:[^']|'')*'")


def _without_comments(path: Path) -> str:
    return re.sub(r"--.*", "", _sql(path))


def _sql(path: Path) -> str:
    return filled(path.read_text(encoding="utf-8"), settings.DEFAULT_SCHEMA)


_CALLER_WORDS = {
    "public": "everybody; the owner of the table where it changes one",
    "pgtrickle_relay": "`pgtrickle_relay`",
    "pgtrickle_publisher": "`pgtrickle_publisher`",
}


def sql_part(topic: str) -> Callable[[], str]:
    def part() -> str:
        functions = sql_functions()
        known = relations(functions)
        items = []
        for name in SQL_TOPICS[topic]:
            overloads = [function for function in functions if function.name == name]
            if not overloads:
                raise Unexplained(f"there is no function {name}")
            items += [_item(function, known) for function in overloads]
        return "\n".join(items)

    return part


def _item(function: SqlFunction, known: Relations) -> str:
    arguments = ", ".join(
        argument for argument in function.arguments if not argument.startswith("out ")
    )
    words = re.sub(r"^Definer, [^.]*\. |\s*Definer: .*", "", function.comment)
    codes = ", ".join(f"[`{code}`](#errors)" for code in sorted(known.codes[function.name]))
    caller = _CALLER_WORDS.get(known.callers.get(function.name, ""), "the catalog's owner")
    return (
        f"- **`{function.name}({arguments}) → {function.returns}`**\n"
        f"  {words}\n"
        f"  Errors: {codes or 'none of ours'}. Execute: {caller}.\n"
    )


PARTS: Mapping[str, Callable[[], str]] = {
    "settings": settings_part,
    "pipeline": pipeline_part,
    **dict(backend_parts()),
    "templates": templates_part,
    "metadata": metadata_part,
    "metadata-of-all": metadata_of_all_part,
    "view-keys": view_keys_part,
    "envelope": envelope_part,
    "metrics": metrics_part,
    "alerts": monitoring.alerts_part,
    "errors": errors_part,
    "help": help_part,
    "evidence-sink": evidence_part("sink"),
    "evidence-source": evidence_part("source"),
    **{topic: sql_part(topic) for topic in SQL_TOPICS},
}


def regenerated(text: str) -> str:
    """The document with every generated part rewritten. Raises `Unexplained`."""

    def written(found: re.Match[str]) -> str:
        make = PARTS.get(found[2])
        if make is None:
            raise Unexplained(f"there is no generated part {found[2]!r}")
        return f"{found[1]}{make()}{found[4]}"

    return _PART.sub(written, text)


def stale_documents() -> dict[Path, str]:
    """What would be written to each file that is not up to date. Raises `Unexplained`."""
    stale = {}
    for name in GENERATED:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        fresh = regenerated(text)
        if fresh != text:
            stale[path] = fresh
    for name, fresh in {key_rules.NAME: key_rules.rules_file(), **monitoring.files()}.items():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != fresh:
            stale[path] = fresh
    return stale


def main(arguments: Sequence[str]) -> int:
    try:
        stale = stale_documents()
    except Unexplained as problem:
        print(f"docs: {problem}", file=sys.stderr)
        return 1
    for path, text in stale.items():
        name = path.relative_to(ROOT)
        if "--check" in arguments:
            print(f"{name} is stale: run just docs", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
