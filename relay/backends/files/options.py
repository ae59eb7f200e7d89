"""The keys of a file sink and a file source."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from relay.options import Key, Positive, Routing, Template

FileFormat = Literal["jsonl", "json_pretty", "csv"]
LineContent = Literal["auto", "envelope", "payload", "cloudevents"]

DEFAULT_MAX_LINE_BYTES = 16 * 1024 * 1024


class FileSinkOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's keys.

    type: `file` or `stdout`.
    output: The file's path; its directory must exist.
    format: `jsonl` (one JSON object a line), `json_pretty` (indented documents, an empty line after
        each) or `csv` (RFC 4180, a header line, fixed columns).
    content: What each document holds, `envelope` by default; `payload` is the row alone. Not with
        `csv`.
    rotate_bytes: Start a new file before this one grows larger; never by default.
    rotate_keep: How many rotated files to keep, `output.1` being the youngest; all by default.
    """

    type: Literal["file", "stdout"] = "file"
    output: Annotated[str | None, Key(only="file", required=True)] = None
    format: FileFormat = "jsonl"
    content: Literal["envelope", "payload", "cloudevents"] | None = None
    rotate_bytes: Annotated[int | None, Key(ge=1, only="file")] = None
    rotate_keep: Annotated[int | None, Key(ge=1, only="file", needs="rotate_bytes")] = None
    subject_template: Template = "{stream_table}.{op}"
    routing: Routing = {}


class FileSourceOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The source's keys.

    type: `file` or `stdin`.
    input: The file's path.
    follow: Wait for more at the file's end, over rotations, instead of completing the pipeline.
    content: What a line is: `auto` takes one with exactly the keys of our envelope for an envelope
        and any other for a payload, `envelope` and `cloudevents` refuse all other lines, `payload`
        looks into none.
    max_line_bytes: A longer line is refused, and the beginning of it kept.
    """

    type: Literal["file", "stdin"] = "file"
    input: Annotated[str | None, Key(only="file", required=True)] = None
    follow: Annotated[bool, Key(only="file")] = False
    content: LineContent = "auto"
    max_line_bytes: Positive = DEFAULT_MAX_LINE_BYTES
