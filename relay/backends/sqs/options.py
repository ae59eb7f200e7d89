"""The keys of an SQS ``sink`` and ``source`` object, and which queue they mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec

from relay.errors import ConfigurationError

DEFAULT_SUBJECT = "pgtrickle.{stream_table}.{op}"
DEFAULT_GROUP = "{key}"

# The service's own limit for one message and for all of a call together.
MOST_BYTES = 1024 * 1024
_LONGEST_WAIT_S = 20
_LONGEST_VISIBILITY_S = 12 * 60 * 60

_REGION_IN_HOST = re.compile(
    r"(?:^|\.)sqs(?:-fips)?\.([a-z]{2,4}(?:-[a-z]+)+-\d+)\.|^([a-z]{2}(?:-[a-z]+)+-\d+)\.queue\."
)


class SqsConnectionOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What sink and source have in common.

    ``queue_url``: the queue as SQS names it, such as
    ``https://sqs.eu-central-1.amazonaws.com/1234/orders``. ``region``: the region that requests are
    signed for; by default the one in the URL, else the one of the AWS settings around the relay.
    ``endpoint_url``: where requests are sent, by default the
    scheme and host of ``queue_url``. ``access_key_id`` and ``secret_access_key``, with
    ``session_token`` for temporary ones: who we are; without them the AWS chain is asked
    (environment, shared files, container, instance). ``tls_ca``: PEM file of the authority that
    signed the server's certificate, by default the public ones; ``tls_cert`` and ``tls_key``: PEM
    files of a client certificate; ``tls_insecure`` accepts any certificate. ``timeout_ms``: how
    long to wait for an answer, in milliseconds, default 10000. ``max_in_flight``: the most calls
    that are under way at a time, default 8.
    """

    type: str
    queue_url: str
    region: str | None = None
    endpoint_url: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_insecure: bool = False
    timeout_ms: int = 10_000
    max_in_flight: int = 8


class SqsSinkOptions(SqsConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's keys.

    ``message_group_id``: the message group of each event, a template; on a FIFO queue by default
    ``{key}``, on a standard queue none unless it is set (SQS then shares the queue fairly among
    groups). ``subject_template``: the subject that an event bears in its metadata. ``routing``:
    other subjects by event type or op. ``max_message_bytes``: the most bytes of one message, body
    and attributes together; by default what the queue allows, which is never exceeded. ``format``:
    ``envelope``, ``payload`` or ``cloudevents``.
    """

    message_group_id: str | None = None
    subject_template: str = DEFAULT_SUBJECT
    routing: Mapping[str, str] = {}
    max_message_bytes: int | None = None
    format: str = "envelope"


class SqsSourceOptions(SqsConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The source's keys.

    ``visibility_timeout``: how long a message that was received stays hidden from others, 1 to
    43200 seconds, default 30; it is extended while the message is worked on. ``wait_time_seconds``:
    how long a receive waits for messages, 1 to 20 seconds, default 2. A longer wait means fewer
    calls for an idle queue; closing waits at most 3 seconds for it, and what a longer one is
    still given is hidden until the visibility timeout has run out.
    """

    visibility_timeout: int = 30
    wait_time_seconds: int = 2


class Target(msgspec.Struct, frozen=True):
    """The queue, and where requests about it go."""

    queue_url: str
    name: str
    endpoint_url: str
    host: str
    region: str | None

    @property
    def is_fifo(self) -> bool:
        """Whether the queue keeps order and deduplicates; SQS demands that its name says so."""
        return self.name.endswith(".fifo")


def target_of(options: SqsConnectionOptions, path: str) -> Target:
    """The queue that the keys name. Raises `ConfigurationError`."""
    scheme, host, way = _taken_apart(options.queue_url, f"{path}.queue_url")
    name = way.rpartition("/")[2]
    if not name:
        raise ConfigurationError(
            f"{path}.queue_url names no queue",
            remedy="write https://sqs.<region>.amazonaws.com/<account>/<queue>",
        )
    endpoint_url = f"{scheme}://{host}"
    if options.endpoint_url is not None:
        endpoint_url = options.endpoint_url
        _, host, _ = _taken_apart(endpoint_url, f"{path}.endpoint_url")
    region = options.region or _region_in(options.queue_url)
    return Target(options.queue_url, name, endpoint_url, host, region)


def check_connection(options: SqsConnectionOptions, path: str) -> None:
    """Raise `ConfigurationError` for keys that contradict each other or make no sense."""
    target_of(options, path)
    for one, other in (("access_key_id", "secret_access_key"), ("tls_cert", "tls_key")):
        if (getattr(options, one) is None) != (getattr(options, other) is None):
            raise ConfigurationError(f"{path} needs {one} and {other} together")
    if options.session_token is not None and options.access_key_id is None:
        raise ConfigurationError(f"{path}.session_token needs access_key_id and secret_access_key")
    if options.tls_insecure and (options.tls_ca or options.tls_cert):
        raise ConfigurationError(
            f"{path} has tls_insecure beside tls_ca or tls_cert", remedy="leave tls_insecure out"
        )
    for name in ("timeout_ms", "max_in_flight"):
        if getattr(options, name) < 1:
            raise ConfigurationError(f"{path}.{name} must be at least 1")


def check_sink(options: SqsSinkOptions) -> None:
    """Raise `ConfigurationError` for what makes no sense for a sink."""
    check_connection(options, "sink")
    limit = options.max_message_bytes
    if limit is not None and not 1 <= limit <= MOST_BYTES:
        raise ConfigurationError(
            f"sink.max_message_bytes must be from 1 to {MOST_BYTES}, the limit of SQS"
        )
    if options.message_group_id == "":
        raise ConfigurationError(
            "sink.message_group_id is empty", remedy="leave it out for the default"
        )


def check_source(options: SqsSourceOptions) -> None:
    """Raise `ConfigurationError` for what makes no sense for a source."""
    check_connection(options, "source")
    for name, highest in (
        ("visibility_timeout", _LONGEST_VISIBILITY_S),
        ("wait_time_seconds", _LONGEST_WAIT_S),
    ):
        if not 1 <= getattr(options, name) <= highest:
            raise ConfigurationError(f"source.{name} must be from 1 to {highest} seconds")


def _taken_apart(url: str, path: str) -> tuple[str, str, str]:
    """Scheme, host with port, and path. Raises `ConfigurationError`, which never has the URL."""
    try:
        parts = urlsplit(url)
        is_address = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_address = False
    if not is_address or parts.scheme not in ("http", "https") or not url.isprintable():
        raise ConfigurationError(
            f"{path} is not an HTTP address",
            remedy="write https://sqs.<region>.amazonaws.com/<account>/<queue>",
        )
    if "@" in parts.netloc:
        raise ConfigurationError(
            f"{path} has credentials in it", remedy="set access_key_id and secret_access_key"
        )
    return parts.scheme, parts.netloc, parts.path.rstrip("/")


def _region_in(url: str) -> str | None:
    found = _REGION_IN_HOST.search(urlsplit(url).hostname or "")
    return None if found is None else found[1] or found[2]
