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
    """Which inbox, in which database, and what goes into its columns (see `relay.mapping`)."""

    type: Annotated[str, Key("`pg-inbox`.")]
    inbox: Annotated[
        str | None,
        Key(
            "The name given to `create_inbox` or `enable_inbox_tracking`, looked up in the catalog"
            " of the database it is in.",
            required_unless="inbox_table",
            excludes=("inbox_table",),
        ),
    ] = None
    inbox_table: Annotated[
        str | None,
        Key(
            "A table of a database that needs no catalog, with columns of our names and a unique"
            " index on `event_id`. Either this or `inbox`."
        ),
    ] = None
    schema: Annotated[
        str | None,
        Key("Narrows the search for `inbox`; the schema of `inbox_table`, `pgtrickle` by default."),
    ] = None
    url: Annotated[
        str | None,
        Key(
            "Another database, as a libpq URL or keywords; without it the relay's own.",
            schemes=(*_SCHEMES, ""),
            connection=True,
        ),
    ] = None
    sslmode: Annotated[
        SslMode | None, Key("TLS for `url`, as libpq spells it.", connection=True, needs="url")
    ] = None
    sslrootcert: Annotated[str | None, Key("CA file for `url`.", connection=True, needs="url")] = (
        None
    )
    sslcert: Annotated[
        str | None, Key("Client certificate file for `url`.", connection=True, needs="url")
    ] = None
    sslkey: Annotated[
        str | None, Key("Client key file for `url`.", connection=True, needs="url")
    ] = None
    columns: Annotated[
        Mapping[str, str],
        Key(
            "Inbox field to rule, see [Rules](#rules); wins, field by field, over the pipeline's"
            " `columns`."
        ),
    ] = {}
    source: Annotated[
        str | None,
        Key(
            "Text of the `source` column; the stream table otherwise, or the pipeline's name where"
            " there is none."
        ),
    ] = None
    subject_template: Annotated[
        str | None,
        Key(
            "The event type in a forward pipeline, `{stream_table}.{op}` by default. A reverse"
            " pipeline has `event_type_from` instead.",
            template=True,
        ),
    ] = None
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
