"""Which class serves which ``type``. Plain tables; a class is imported when it is first needed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Protocol, cast

import msgspec

from relay.context import BackendContext
from relay.contracts import Sink, Source
from relay.errors import ConfigurationError, DriverMissing, suggestion

SINKS: Mapping[str, str] = {
    "nats": "relay.backends.nats:NatsSink",
    "kafka": "relay.backends.kafka:KafkaSink",
    "redis": "relay.backends.redis:RedisSink",
    "sqs": "relay.backends.sqs:SqsSink",
    "rabbitmq": "relay.backends.rabbitmq:RabbitSink",
    "webhook": "relay.backends.webhook:WebhookSink",
    "pg-inbox": "relay.backends.inbox:InboxSink",
    "stdout": "relay.backends.files:FileSink",
    "file": "relay.backends.files:FileSink",
}

SOURCES: Mapping[str, str] = {
    "outbox": "relay.backends.outbox:OutboxSource",
    "nats": "relay.backends.nats:NatsSource",
    "kafka": "relay.backends.kafka:KafkaSource",
    "redis": "relay.backends.redis:RedisSource",
    "sqs": "relay.backends.sqs:SqsSource",
    "rabbitmq": "relay.backends.rabbitmq:RabbitSource",
    "webhook": "relay.backends.webhook:WebhookSource",
    "stdin": "relay.backends.files:FileSource",
    "file": "relay.backends.files:FileSource",
}

# The extra of the distribution that brings a backend's driver.
EXTRAS: Mapping[str, str] = {
    "nats": "nats",
    "kafka": "kafka",
    "redis": "redis",
    "sqs": "sqs",
    "rabbitmq": "rabbitmq",
    "webhook": "webhook",
}


# What nobody needs to run pipelines: `all` brings the others, `demo` and `dev` servers and tests.
_FOR_TRYING = ("all", "demo", "dev")
_OF_EXTRA = re.compile(r"""extra == ['"](\w+)['"]""")


class _Buildable(Protocol):
    __name__: str

    def from_options(self, options: Mapping[str, object], context: BackendContext) -> object: ...


def build_sink(type_: str, options: Mapping[str, object], context: BackendContext) -> Sink:
    """The sink of that type. Raises `ConfigurationError`, `DriverMissing`."""
    return cast("Sink", _resolve(SINKS, "sink", type_).from_options(options, context))


def build_source(type_: str, options: Mapping[str, object], context: BackendContext) -> Source:
    """The source of that type. Raises `ConfigurationError`, `DriverMissing`."""
    return cast("Source", _resolve(SOURCES, "source", type_).from_options(options, context))


def options_of(role: str, type_: str) -> type[msgspec.Struct]:
    """The struct that declares a backend's keys. Raises as `build_source` does.

    By convention it is called ``NatsSinkOptions`` for the class ``NatsSink``, in ``options``.
    """
    table = SINKS if role == "sink" else SOURCES
    name = _resolve(table, role, type_).__name__
    module = importlib.import_module(f"{table[type_].partition(':')[0]}.options")
    return cast("type[msgspec.Struct]", getattr(module, f"{name}Options"))


def source_runs_everywhere(type_: str) -> bool:
    """Whether every relay of a group runs the pipelines with this type of source.

    Imports the source's class, and nothing for other types. False for what can't be built: the one
    relay that then owns it tells why.
    """
    try:
        return bool(getattr(_resolve(SOURCES, "source", type_), "runs_everywhere", False))
    except (ConfigurationError, ImportError):
        return False


def missing_extras() -> Sequence[str]:
    """The extras whose distributions are not all installed."""
    missing = set()
    for requirement in metadata.requires("pgtrickle-relay") or ():
        named, extra = re.match(r"[\w.-]+", requirement), _OF_EXTRA.search(requirement)
        if named is None or extra is None or extra[1] in _FOR_TRYING:
            continue
        try:
            metadata.version(named[0])
        except metadata.PackageNotFoundError:
            missing.add(extra[1])
    return sorted(missing)


def _resolve(table: Mapping[str, str], role: str, type_: str) -> _Buildable:
    target = table.get(type_)
    if target is None:
        raise ConfigurationError(
            f"{type_!r} is not a type of {role}", remedy=suggestion(type_, table)
        )
    module, _, name = target.partition(":")
    try:
        return cast("_Buildable", getattr(importlib.import_module(module), name))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "relay":
            raise
        extra = EXTRAS.get(type_, "all")
        raise DriverMissing(
            f"the {type_} {role} needs the Python module {error.name}",
            remedy=f"pip install 'pgtrickle-relay[{extra}]'",
        ) from None
