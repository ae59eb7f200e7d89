"""The ``sink`` object of a ``pg-inbox`` pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec

from relay.errors import ConfigurationError
from relay.options import Key, Routing, parse_options
from relay.settings import SslMode

_SCHEMES = ("postgresql", "postgres")


class InboxSinkOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which inbox, in which database, and what goes into its columns (see `relay.mapping`).

    type: `pg-inbox`.
    inbox: The name given to `create_inbox` or `enable_inbox_tracking`, looked up in the catalog of
        the database it is in.
    inbox_table: A table of a database that needs no catalog, with columns of our names and a unique
        index on `event_id`. Either this or `inbox`.
    schema: Narrows the search for `inbox`; the schema of `inbox_table`, `pgtrickle` by default.
    url: Another database, as a libpq URL or keywords; without it the relay's own.
    sslmode: TLS for `url`, as libpq spells it.
    sslrootcert: CA file for `url`.
    sslcert: Client certificate file for `url`.
    sslkey: Client key file for `url`.
    columns: Inbox field to rule, see [Rules](#rules); wins, field by field, over the pipeline's
        `columns`.
    source: Text of the `source` column; the stream table otherwise, or the pipeline's name where
        there is none.
    subject_template: The event type in a forward pipeline, `{stream_table}.{op}` by default. A
        reverse pipeline has `event_type_from` instead.
    """

    type: str
    inbox: Annotated[str | None, Key(required_unless="inbox_table", excludes=("inbox_table",))] = (
        None
    )
    inbox_table: str | None = None
    schema: str | None = None
    url: Annotated[str | None, Key(schemes=(*_SCHEMES, ""), connection=True)] = None
    sslmode: Annotated[SslMode | None, Key(connection=True, needs="url")] = None
    sslrootcert: Annotated[str | None, Key(connection=True, needs="url")] = None
    sslcert: Annotated[str | None, Key(connection=True, needs="url")] = None
    sslkey: Annotated[str | None, Key(connection=True, needs="url")] = None
    columns: Mapping[str, str] = {}
    source: str | None = None
    subject_template: Annotated[str | None, Key(template=True)] = None
    routing: Routing = {}


def inbox_sink_options(options: Mapping[str, object]) -> InboxSinkOptions:
    """Parse, and refuse what does not go together. Raises `ConfigurationError`."""
    parsed = parse_options(options, InboxSinkOptions, path="sink")
    if parsed.url is not None and not parsed.url.strip():
        raise ConfigurationError(
            "sink.url is empty", remedy="leave it out to write to the relay's own database"
        )
    scheme, separator, _ = (parsed.url or "").partition("://")
    if separator and scheme not in _SCHEMES:
        raise ConfigurationError(
            "sink.url is not a PostgreSQL address", remedy="write postgresql://host/database"
        )
    return parsed
