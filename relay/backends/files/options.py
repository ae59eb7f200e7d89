"""The keys of a file sink and a file source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

FileFormat = Literal["jsonl", "json_pretty", "csv"]
LineContent = Literal["auto", "envelope", "payload", "cloudevents"]

Positive = Annotated[int, msgspec.Meta(gt=0)]
DEFAULT_MAX_LINE_BYTES = 16 * 1024 * 1024


class FileSinkOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's keys.

    ``type``: ``file`` or ``stdout``. ``output``: the file's path, for ``file`` only; its directory
    must exist. ``format``: ``jsonl`` (one JSON object a line, default), ``json_pretty`` (indented
    documents, an empty line after each) or ``csv`` (RFC 4180, a header line, fixed columns).
    ``content``: what each document holds, ``envelope`` (default), ``payload`` (the row alone; a
    file has no place for the rest) or ``cloudevents``; not with ``csv``. ``rotate_bytes``: start a
    new file before this one grows larger; without it, never. ``rotate_keep``: how many rotated
    files to keep, ``output.1`` being the youngest; without it, all. ``subject_template`` (default
    ``{stream_table}.{op}``) and ``routing`` (event type or op to template): the event's subject.
    """

    type: Literal["file", "stdout"] = "file"
    output: str | None = None
    format: FileFormat = "jsonl"
    content: Literal["envelope", "payload", "cloudevents"] | None = None
    rotate_bytes: Positive | None = None
    rotate_keep: Positive | None = None
    subject_template: str = "{stream_table}.{op}"
    routing: Mapping[str, str] = {}


class FileSourceOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The source's keys.

    ``type``: ``file`` or ``stdin``. ``input``: the file's path, for ``file`` only. ``follow``
    (default false): wait for more at the file's end, over rotations, instead of completing the
    pipeline. ``content``: what a line is; ``auto`` (default) takes a line with exactly the keys of
    our envelope for one and any other for a plain payload, ``envelope`` and ``cloudevents`` refuse
    all other lines, ``payload`` looks into none. ``max_line_bytes`` (default 16 MiB): a longer
    line is refused, and the beginning of it kept.
    """

    type: Literal["file", "stdin"] = "file"
    input: str | None = None
    follow: bool = False
    content: LineContent = "auto"
    max_line_bytes: Positive = DEFAULT_MAX_LINE_BYTES
