#!/usr/bin/env python3
"""Writes the generated parts of docs/RELAY.md and docs/SQL.md.

    scripts/docs.py            rewrite what is stale
    scripts/docs.py --check    change nothing, exit 1 and name what is stale

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``. What it
says comes from the settings and option structs with their docstrings, the comments in ``conf``,
the metrics, the errors and the SQL files: whoever changes one of these changes the reference. A
key that none of them explains is explained in `WORDS`; one that nobody explains is an error.
"""

from __future__ import annotations

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
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402 - the checkout's own modules come first

from relay import cli, errors, metrics, registry, settings, template, wire  # noqa: E402
from relay.backends.files.options import FileSinkOptions, FileSourceOptions  # noqa: E402
from relay.backends.inbox.options import InboxSinkOptions  # noqa: E402
from relay.backends.kafka.options import KafkaSinkOptions, KafkaSourceOptions  # noqa: E402
from relay.backends.nats.options import NatsSinkOptions, NatsSourceOptions  # noqa: E402
from relay.backends.outbox.source import OutboxSourceOptions  # noqa: E402
from relay.backends.rabbitmq.options import (  # noqa: E402
    RabbitSinkOptions,
    RabbitSourceOptions,
)
from relay.backends.redis.options import RedisSinkOptions, RedisSourceOptions  # noqa: E402
from relay.backends.sqs.options import SqsSinkOptions, SqsSourceOptions  # noqa: E402
from relay.backends.webhook.options import WebhookSinkOptions, WebhookSourceOptions  # noqa: E402
from relay.pipeline_config import PipelineConfig  # noqa: E402

NOTHING = "-"
GENERATED = ("docs/RELAY.md", "docs/SQL.md")

_HELP_COLUMNS = "96"
_PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end: \2 -->)", re.DOTALL)

# The words of keys that their docstring mentions only in passing, or explains for several at once.
WORDS: Mapping[str, str] = {
    "postgres.sslmode": "TLS, as libpq spells it; wins over the same parameter inside the URL.",
    "postgres.sslrootcert": "CA file, as libpq spells it; wins over the URL.",
    "postgres.sslcert": "Client certificate file, as libpq spells it; wins over the URL.",
    "postgres.sslkey": "Client key file, as libpq spells it; wins over the URL.",
    "postgres.application_name": "Shown in `pg_stat_activity`, followed by what the connection does"
    " (`work`, `lock`, `listen`, `migrate`).",
    "postgres.connect_timeout_s": "How long connecting may take, and waiting for a connection of"
    " the pool.",
    "postgres.command_timeout_s": "How long one statement may take.",
    "log.format": "`text` for people, `json` for machines. Logs go to standard error.",
    "log.level": "The least severe level that is written. `debug` names every batch.",
    "metrics.enabled": "Whether there is an HTTP server.",
    "ui.mode": "`tui` shows the status view, where standard input and output are a terminal.",
    "ui.refresh_ms": "How often the view is drawn again.",
    "relay.batch_size": "Most messages in a batch; a pipeline's own key wins.",
    "relay.batch_bytes": "About the most payload bytes in a batch.",
    "relay.prefetch": "Polled batches that may wait while one is published; a pipeline's own key"
    " wins.",
    "relay.poll_interval_ms": "First pause after an empty poll; a pipeline's own key wins.",
    "relay.retry_initial_ms": "First wait after a failure; a pipeline's own key wins.",
    "relay.retry_max_ms": "Longest wait after a failure; a pipeline's own key wins.",
    "relay.breaker_threshold": "Rejections in a row, without one success, after which the sink"
    " counts as broken; a pipeline's own key wins.",
    "backends": "Named connection profiles, see [Profiles](#profiles).",
    "config.config_version": "Version of the configuration's shape; filled in.",
    "config.source_type": "Filled in from `source.type`.",
    "config.source": "Where events come from.",
    "config.sink_type": "Filled in from `sink.type`.",
    "config.sink": "Where events go.",
    "config.description": "A note for people. The relay does not read it.",
    "config.batch_size": "Most messages in a batch.",
    "config.poll_interval_ms": "First pause after an empty poll. It doubles up to 1 s; a"
    " notification ends it at once.",
    "config.prefetch": "Polled batches that may wait while one is published. Of an outbox the rows"
    " of one more are read ahead.",
    "config.max_attempts": "Attempts of a message that fails transiently, before it becomes a dead"
    " letter. Without it the relay never gives up.",
    "config.retry_initial_ms": "First wait after a failure. Waits double and are jittered.",
    "config.retry_max_ms": "Longest wait after a failure.",
    "config.breaker_threshold": "Rejections in a row, without one success, after which the pipeline"
    " is suspended and probes.",
    "config.ordering": "`strict`: no event of a key overtakes another, also under retries."
    " `pipelined`: faster on hot keys. Read by the sinks of brokers and webhooks; inboxes and files"
    " are always strict.",
    "config.allow_plaintext_secrets": "Accept a secret that is not a reference.",
    "config.start": "Where a new position starts. `latest`: behind what is visible when the"
    " pipeline is set; transactions open at that moment are still delivered.",
    "config.on_reset": "What to do when the position lies beyond the outbox, which was made anew or"
    " restored.",
    "config.parallelism": "Slots of a consumer group. Not available in this version: leave it out.",
    "config.visibility_seconds": "Length of a consumer group's lease, in seconds. Not available in"
    " this version: leave it out.",
    "config.collapse_updates": "Send the delete and the insert of one key in one outbox row as one"
    " `update`. Needs a key.",
    "config.snapshot_markers": "Frame a full refresh with `snapshot_begin` and `snapshot_end`.",
    "config.dedup_namespace": "Goes in front of every dedup key. Set it where several databases, or"
    " several pipelines of one outbox, feed one deduplicating destination.",
    "config.key_columns": "Columns whose values are the `key`; the primary key of the table"
    " otherwise.",
    "config.dedup_key_from": "Where the dedup key comes from, see [Rules](#rules); what the source"
    " says otherwise.",
    "config.event_type_from": "Where the event type comes from, see [Rules](#rules); the message's"
    " subject otherwise.",
    "config.columns": "Inbox field to rule, see [Rules](#rules).",
    "outbox.type": "`outbox`; may be left out.",
    "outbox.outbox": "The table, or the outbox table. Required.",
    "outbox.consumer_group": "Null for a reader of its own. Not available in this version: the"
    " catalog accepts a group, and the relay refuses to run the pipeline.",
    "nats.type": "`nats`.",
    "nats.url": "`nats://host:port` or `tls://host:port`, several separated by commas. Required"
    " unless a profile brings it.",
    "nats.user": "User name, with `password`.",
    "nats.password": "Password, with `user`.",
    "nats.token": "Token, instead of user and password.",
    "nats.creds_file": "Path of a credentials file on the relay's machine.",
    "nats.nkey_seed": "The NKey seed itself, as a secret reference.",
    "nats.tls": "Refuse a server that offers no TLS.",
    "nats.tls_ca": "PEM file of the authority; implies `tls`.",
    "nats.tls_cert": "PEM file of the client certificate; implies `tls`.",
    "nats.tls_key": "PEM file of the client key; implies `tls`.",
    "nats.tls_insecure": "Accept any server certificate.",
    "nats.subject_template": "The subject of each event.",
    "nats.routing": "Other templates by event type or op.",
    "nats.create_stream": "Make `stream` where it is missing: on file storage, for the constant"
    " beginning of the templates. A stream that exists is never changed.",
    "nats.duplicate_window_s": "Duplicate window, in seconds, of a stream that the relay makes.",
    "nats.max_in_flight": "Messages under way without acknowledgement, at most.",
    "nats.ack_timeout_ms": "How long to go on without a single acknowledgement.",
    "nats.format": "`envelope`, `payload` or `cloudevents`, see [Formats](#formats).",
    "kafka.type": "`kafka`.",
    "kafka.sasl_mechanism": "How to log in; `SCRAM-SHA-512` unless something else is said.",
    "kafka.sasl_username": "User name, with `sasl_password`.",
    "kafka.sasl_password": "Password, with `sasl_username`.",
    "kafka.tls": "Speak TLS.",
    "kafka.tls_ca": "PEM file of the authority; implies `tls`.",
    "kafka.tls_cert": "PEM file of the client certificate; implies `tls`.",
    "kafka.tls_key": "PEM file of the client key; implies `tls`.",
    "kafka.tls_insecure": "Accept any server certificate.",
    "kafka.topic_template": "Where each event goes, a template, instead of `topic`.",
    "kafka.format": "`envelope`, `payload` or `cloudevents`, see [Formats](#formats).",
    "rabbitmq.type": "`rabbitmq`.",
    "rabbitmq.username": "User name, with `password`.",
    "rabbitmq.password": "Password, with `username`.",
    "rabbitmq.vhost": "The virtual host.",
    "rabbitmq.tls": "Speak TLS whatever the scheme of `url`.",
    "rabbitmq.tls_ca": "PEM file of the authority; implies `tls`.",
    "rabbitmq.tls_cert": "PEM file of the client certificate; implies `tls`, and logs in where"
    " there is no user.",
    "rabbitmq.tls_key": "PEM file of the client key; implies `tls`.",
    "rabbitmq.tls_insecure": "Accept any server certificate.",
    "rabbitmq.exchange_type": "Of an exchange that `declare_exchange` makes, by default `topic`.",
    "rabbitmq.format": "`envelope`, `payload` or `cloudevents`, see [Formats](#formats).",
    "redis.type": "`redis`.",
    "redis.username": "User name of an ACL user, with `password`.",
    "redis.password": "Password; alone, that of the default user.",
    "redis.db": "Number of the database.",
    "redis.tls": "Speak TLS whatever the scheme of `url`.",
    "redis.tls_ca": "PEM file of the authority; implies `tls`.",
    "redis.tls_cert": "PEM file of the client certificate; implies `tls`.",
    "redis.tls_key": "PEM file of the client key; implies `tls`.",
    "redis.tls_insecure": "Accept any server certificate.",
    "redis.format": "`envelope`, `payload` or `cloudevents`, see [Formats](#formats).",
    "sqs.type": "`sqs`.",
    "sqs.endpoint_url": "Where requests are sent, by default the scheme and host of `queue_url`.",
    "sqs.tls_ca": "PEM file of the authority that signed the server's certificate, by default the"
    " public ones.",
    "sqs.access_key_id": "Who we are, with `secret_access_key`; without both the AWS chain is"
    " asked: environment, shared files, container, instance.",
    "sqs.secret_access_key": "The secret key, with `access_key_id`.",
    "sqs.session_token": "The token of temporary credentials, with the other two.",
    "sqs.tls_cert": "PEM file of the client certificate, with `tls_key`.",
    "sqs.tls_key": "PEM file of the client key, with `tls_cert`.",
    "sqs.tls_insecure": "Accept any server certificate.",
    "sqs.routing": "Other subjects by event type or op.",
    "sqs.format": "`envelope`, `payload` or `cloudevents`, see [Formats](#formats).",
    "webhook-sink.type": "`webhook`.",
    "webhook-sink.bearer_token": "Sent as `Authorization: Bearer`.",
    "webhook-sink.username": "Basic authentication, with `password`.",
    "webhook-sink.password": "Basic authentication, with `username`.",
    "webhook-sink.hmac_secret": "Signs each request by Standard Webhooks; `whsec_…` or any text.",
    "webhook-sink.tls": "Refuse a URL that is not `https`.",
    "webhook-sink.tls_ca": "PEM file of the receiver's authority.",
    "webhook-sink.tls_cert": "PEM file of our certificate.",
    "webhook-sink.tls_key": "PEM file of our key.",
    "webhook-sink.tls_insecure": "Accept any certificate of the receiver.",
    "webhook-sink.subject_template": "The subject that a message bears.",
    "webhook-sink.routing": "Other templates by event type or op.",
    "webhook-sink.format": "`envelope`, `payload` or `cloudevents`, see [Formats](#formats).",
    "webhook-source.type": "`webhook`.",
    "webhook-source.auth_header": "The header of `auth_value`; `Authorization` by default.",
    "webhook-source.hmac_secret": "The secret of `signature`.",
    "webhook-source.signature_header": "Where `hmac-sha256` finds the signature.",
    "webhook-source.signature_tolerance_s": "How old or early a signed request may be, in seconds;"
    " `stripe` and `svix`.",
    "webhook-source.answer_timeout_ms": "A request that is not settled by then is answered 503.",
    "webhook-source.max_body_bytes": "Larger bodies are refused, as are arrays of more than 100,000"
    " elements.",
    "webhook-source.tls": "Insist on TLS.",
    "webhook-source.tls_ca": "PEM file of the authority whose certificates senders must show.",
    "webhook-source.tls_cert": "PEM file of the server's certificate; makes it a TLS server.",
    "webhook-source.tls_key": "PEM file of the server's key.",
    "file-sink.type": "`file` or `stdout`.",
    "file-sink.subject_template": "The event's subject.",
    "file-sink.routing": "Other templates by event type or op.",
    "file-source.type": "`file` or `stdin`.",
    "pg-inbox.type": "`pg-inbox`.",
    "pg-inbox.schema": "Narrows the search for `inbox`; the schema of `inbox_table`, `pgtrickle` by"
    " default.",
    "pg-inbox.inbox_table": "A table of a database that needs no catalog, with columns of our names"
    " and a unique index on `event_id`. Either this or `inbox`.",
    "pg-inbox.inbox": "The name given to `create_inbox` or `enable_inbox_tracking`, looked up in"
    " the catalog of the database it is in.",
    "pg-inbox.url": "Another database, as a libpq URL or keywords; without it the relay's own.",
    "pg-inbox.sslmode": "TLS for `url`, as libpq spells it.",
    "pg-inbox.sslrootcert": "CA file for `url`.",
    "pg-inbox.sslcert": "Client certificate file for `url`.",
    "pg-inbox.sslkey": "Client key file for `url`.",
    "pg-inbox.columns": "Inbox field to rule, see [Rules](#rules); wins, field by field, over the"
    " pipeline's `columns`.",
    "pg-inbox.source": "Text of the `source` column; the stream table otherwise, or the pipeline's"
    " name where there is none.",
    "pg-inbox.subject_template": "The event type in a forward pipeline, `{stream_table}.{op}` by"
    " default. A reverse pipeline has `event_type_from` instead.",
    "pg-inbox.routing": "Other templates by event type or op, in a forward pipeline.",
}

# What people call, by topic; everything else is the relay's own business.
SQL_TOPICS: Mapping[str, Sequence[str]] = {
    "sql-outbox": (
        "enable_outbox",
        "disable_outbox",
        "outbox_publish",
        "outbox_status",
        "outbox_rows_consumed",
        "relay_uncaptured_partitions",
    ),
    "sql-pipeline": (
        "set_relay_outbox",
        "set_relay_inbox",
        "enable_relay",
        "disable_relay",
        "delete_relay",
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
    "sql-fleet": ("relay_lag", "relay_fleet", "relay_forget_group", "relay_schema_version"),
    "sql-working": (
        "relay_outbox",
        "relay_sleep",
        "relay_wake",
        "relay_sweep_outbox",
        "relay_claim",
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
# Raised below and caught on the way up.
_CAUGHT = {"relay_lag": {"RL003", "RL005", "RL022"}}


class Unexplained(Exception):
    """A key, function or part that nothing explains."""


# ---------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One row of a reference table."""

    name: str
    type: str
    default: str
    meaning: str


def keys_of(struct: type[msgspec.Struct], topic: str, prefix: str = "") -> Iterator[Key]:
    """The keys of a struct with their words. Raises `Unexplained`."""
    explained = explanations(struct)
    for field in msgspec.structs.fields(struct):
        name = field.encode_name
        words = WORDS.get(f"{topic}.{name}") or explained.get(name)
        if words is None:
            raise Unexplained(f"nothing explains {topic}.{name}")
        yield Key(f"{prefix}{name}", type_words(field.type), _default(field), words)


def explanations(struct: type[msgspec.Struct]) -> dict[str, str]:
    """What the docstrings of a struct and of those it extends say about single keys."""
    found: dict[str, str] = {}
    for known in reversed(struct.__mro__):
        text = " ".join((known.__doc__ or "").split())
        for item, words in _found_with_rest(_ITEM, text):
            for name in re.findall(r"``(\w+)``(?: \([^)]*\))?(?:, | and |$)", item[1]):
                found[name] = _sentence(words)
    return found


def _found_with_rest(pattern: re.Pattern[str], text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Each match with the text from its end to the next match."""
    matches = list(pattern.finditer(text))
    ends = [*(match.start() for match in matches[1:]), len(text)]
    for match, end in zip(matches, ends[: len(matches)], strict=True):
        yield match, text[match.end() : end]


_ITEM = re.compile(r"(?:^|(?<=\. ))((?:``\w+``(?: \((?:[^()`]|``[^`]*``)*\))?(?:, | and )?)+): ")


def conf_comments() -> dict[str, str]:
    """The comment above each key of the packaged settings, by dotted path."""
    found: dict[str, str] = {}
    for path in ("config", "postgres/default", "log/text", "metrics/default", "ui/none"):
        section = [] if path == "config" else [path.partition("/")[0]]
        comment: list[str] = []
        group = ""
        for line in (ROOT / "conf" / f"{path}.yaml").read_text(encoding="utf-8").splitlines():
            stripped = line.strip()
            key = re.match(r"( *)(\w+):", line)
            if stripped.startswith("#"):
                comment.append(stripped.lstrip("# "))
            elif key is None:
                comment = []
            else:
                if not key[1]:
                    group = key[2]
                name = [*section, key[2]] if section or not key[1] else [group, key[2]]
                if comment:
                    found[".".join(name)] = _sentence(" ".join(comment))
                comment = []
    return found


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
        return "object"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return "list of texts"
    raise Unexplained(f"no words for the type {annotation}")


_TYPE_WORDS: Mapping[object, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "text",
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


def _sentence(words: str) -> str:
    words = words.strip().replace("``", "`")
    words = words.rstrip(".,;")
    return f"{words[:1].upper()}{words[1:]}."


def _table(keys: Sequence[Key]) -> str:
    return _rows(
        ("key", "type", "default", "meaning"),
        [(f"`{key.name}`", key.type, key.default, key.meaning) for key in keys],
    )


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
    comments = conf_comments()
    keys: list[Key] = []
    for field in msgspec.structs.fields(settings.Settings):
        section = field.type
        if not (isinstance(section, type) and issubclass(section, msgspec.Struct)):
            keys.append(Key(field.name, "object", "empty", WORDS[field.name]))
            continue
        explained = explanations(section)
        for inner in msgspec.structs.fields(section):
            path = f"{field.name}.{inner.name}"
            words = WORDS.get(path) or comments.get(path) or explained.get(inner.name)
            if words is None:
                raise Unexplained(f"nothing explains {path}")
            keys.append(Key(path, type_words(inner.type), _default(inner), words))
    return _table(keys)


def pipeline_part() -> str:
    rules = _pipeline_rules()
    rows: list[tuple[str, ...]] = []
    defaults = {field.name: field for field in msgspec.structs.fields(settings.RelaySettings)}
    for key in keys_of(PipelineConfig, "config"):
        rule = rules[key.name]
        default = key.default
        if default == NOTHING and key.name in defaults:
            default = f"{_default(defaults[key.name])} (`relay.{key.name}`)"
        type_ = key.type
        if rule.range:
            type_ = f"{type_} {rule.range}"
        rows.append((f"`{key.name}`", rule.direction, type_, default, key.meaning))
    if missing := rules.keys() - {row[0].strip("`") for row in rows}:
        raise Unexplained(f"the catalog knows keys that the relay does not: {sorted(missing)}")
    return _rows(("key", "pipelines", "type", "default", "meaning"), rows)


@dataclass(frozen=True)
class _Rule:
    direction: str
    range: str


def _pipeline_rules() -> dict[str, _Rule]:
    text = (ROOT / "sql/functions/51_config_rules.sql").read_text(encoding="utf-8")
    rules = {}
    for direction, key, type_, lowest, highest in re.findall(
        r"^        \((null|'forward'|'reverse'), '(\w+)', '(\w+)', (\w+), (\w+), .*\),?$",
        text,
        re.MULTILINE,
    ):
        range_ = ""
        if type_ == "integer" and key != "config_version":
            range_ = f"from {lowest}" if highest == "null" else f"{lowest} to {highest}"
        both = "both" if direction == "null" else direction.strip("'")
        rules[key] = _Rule(both, range_)
    return rules


def options_part(struct: type[msgspec.Struct], topic: str) -> Callable[[], str]:
    def part() -> str:
        return _table(list(keys_of(struct, topic)))

    return part


def nats_part(struct: type[msgspec.Struct]) -> Callable[[], str]:
    common = {field.name for field in msgspec.structs.fields(struct.__mro__[1])}

    def part() -> str:
        keys = list(keys_of(struct, "nats"))
        return _table([key for key in keys if key.name not in common])

    return part


def nats_connection_part() -> str:
    struct = NatsSinkOptions.__mro__[1]
    return _table(list(keys_of(struct, "nats")))


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
        text = cli._parser("run").format_help()  # noqa: SLF001 - what --help prints
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
        text = path.read_text(encoding="utf-8")
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
        raised = set(re.findall(r"errcode = '(RL\d{3})'", function.body))
        if re.search(r"pgtrickle\.relay_refuse\(", function.body):
            raised.add("RL013" if "'RL013'" in function.body else "RL010")
        own.setdefault(function.name, set()).update(raised)
        code = _QUOTED.sub("''", re.sub(r"--.*", "", function.body))
        called = set(re.findall(r"pgtrickle\.(\w+)\(", code)) & names
        calls.setdefault(function.name, set()).update(called - {function.name, "relay_refuse"})
    own["relay_refuse"] = set()
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
    for path in sorted((ROOT / "sql/functions").glob("9*_privilege*.sql")):
        for grant in re.findall(
            r"select pgtrickle\.relay_grant_execute\((.*?)\);", _without_comments(path), re.DOTALL
        ):
            grantee, *granted = re.findall(r"'(\w+)'", grant)
            callers.update(dict.fromkeys(granted, grantee))
    return Relations(codes_of, callers)


_QUOTED = re.compile(r"'(?:[^']|'')*'")


def _without_comments(path: Path) -> str:
    return re.sub(r"--.*", "", path.read_text(encoding="utf-8"))


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
    "outbox": options_part(OutboxSourceOptions, "outbox"),
    "nats-connection": nats_connection_part,
    "nats-sink": nats_part(NatsSinkOptions),
    "nats-source": nats_part(NatsSourceOptions),
    "file-sink": options_part(FileSinkOptions, "file-sink"),
    "file-source": options_part(FileSourceOptions, "file-source"),
    "pg-inbox": options_part(InboxSinkOptions, "pg-inbox"),
    "kafka-sink": options_part(KafkaSinkOptions, "kafka"),
    "kafka-source": options_part(KafkaSourceOptions, "kafka"),
    "rabbitmq-sink": options_part(RabbitSinkOptions, "rabbitmq"),
    "rabbitmq-source": options_part(RabbitSourceOptions, "rabbitmq"),
    "redis-sink": options_part(RedisSinkOptions, "redis"),
    "redis-source": options_part(RedisSourceOptions, "redis"),
    "sqs-sink": options_part(SqsSinkOptions, "sqs"),
    "sqs-source": options_part(SqsSourceOptions, "sqs"),
    "webhook-sink": options_part(WebhookSinkOptions, "webhook-sink"),
    "webhook-source": options_part(WebhookSourceOptions, "webhook-source"),
    "templates": templates_part,
    "metadata": metadata_part,
    "envelope": envelope_part,
    "metrics": metrics_part,
    "errors": errors_part,
    "help": help_part,
    "evidence-sink": evidence_part("sink"),
    "evidence-source": evidence_part("source"),
    **{topic: sql_part(topic) for topic in SQL_TOPICS},
}


def regenerated(text: str) -> str:
    """The document with every generated part written anew. Raises `Unexplained`."""

    def written(found: re.Match[str]) -> str:
        make = PARTS.get(found[2])
        if make is None:
            raise Unexplained(f"there is no generated part {found[2]!r}")
        return f"{found[1]}{make()}{found[4]}"

    return _PART.sub(written, text)


def stale_documents() -> dict[Path, str]:
    """What would be written to each document that is not up to date. Raises `Unexplained`."""
    stale = {}
    for name in GENERATED:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        fresh = regenerated(text)
        if fresh != text:
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
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
