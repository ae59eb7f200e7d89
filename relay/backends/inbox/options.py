"""The ``sink`` object of a ``pg-inbox`` pipeline."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from relay.errors import ConfigurationError
from relay.options import parse_options
from relay.settings import SslMode


class InboxSinkOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which inbox, in which database, and what goes into its columns.

    ``inbox``: the name given to `create_inbox` or `enable_inbox_tracking`, looked up in the
    catalog of the database it is in; ``schema`` narrows the search. Or ``inbox_table``: a table in
    ``schema`` (default ``pgtrickle``) of a database that needs no catalog, with columns of our
    names and a unique index on ``event_id``.
    ``url``: another database, as a libpq URL or keywords; without it the relay's own. ``sslmode``,
    ``sslrootcert``, ``sslcert``, ``sslkey``: as libpq spells them, for ``url``.
    ``columns``: inbox field to where its value comes from (see `relay.mapping`); it wins, field by
    field, over the pipeline's key of the same name. ``source``: the text of the source column;
    default the stream table, or the pipeline's name where there is none.
    ``subject_template``, ``routing``: the event type in a forward pipeline, default
    ``{stream_table}.{op}``; a reverse pipeline has ``event_type_from`` instead.
    """

    type: str
    inbox: str | None = None
    inbox_table: str | None = None
    schema: str | None = None
    url: str | None = None
    sslmode: SslMode | None = None
    sslrootcert: str | None = None
    sslcert: str | None = None
    sslkey: str | None = None
    columns: Mapping[str, str] = {}
    source: str | None = None
    subject_template: str | None = None
    routing: Mapping[str, str] = {}


def inbox_sink_options(options: Mapping[str, object]) -> InboxSinkOptions:
    """Parse, and refuse what does not go together. Raises `ConfigurationError`."""
    parsed = parse_options(options, InboxSinkOptions, path="sink")
    if bool(parsed.inbox) == bool(parsed.inbox_table):
        raise ConfigurationError(
            "sink needs either inbox or inbox_table",
            remedy="inbox is a name in the catalog, inbox_table with schema a table beside it",
        )
    if parsed.url is None:
        for name in ("sslmode", "sslrootcert", "sslcert", "sslkey"):
            if getattr(parsed, name) is not None:
                raise ConfigurationError(
                    f"sink.{name} is for another database, but there is no sink.url",
                    remedy="the relay's own connection has its own settings under postgres",
                )
    elif not parsed.url.strip():
        raise ConfigurationError(
            "sink.url is empty", remedy="leave it out to write to the relay's own database"
        )
    return parsed
