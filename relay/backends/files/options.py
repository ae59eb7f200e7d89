"""The keys of a file sink and a file source."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from relay.options import Key, Routing, Template

FileFormat = Literal["jsonl", "json_pretty", "csv"]
LineContent = Literal["auto", "envelope", "payload", "cloudevents"]

DEFAULT_MAX_LINE_BYTES = 16 * 1024 * 1024


class FileSinkOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's keys."""

    type: Annotated[Literal["file", "stdout"], Key("`file` or `stdout`.")] = "file"
    output: Annotated[
        str | None, Key("The file's path; its directory must exist.", only="file", required=True)
    ] = None
    format: Annotated[
        FileFormat,
        Key(
            "`jsonl` (one JSON object a line), `json_pretty` (indented documents, an empty line"
            " after each) or `csv` (RFC 4180, a header line, fixed columns)."
        ),
    ] = "jsonl"
    content: Annotated[
        Literal["envelope", "payload", "cloudevents"] | None,
        Key(
            "What each document holds, `envelope` by default; `payload` is the row alone. Not with"
            " `csv`."
        ),
    ] = None
    rotate_bytes: Annotated[
        int | None,
        Key("Start a new file before this one grows larger; never by default.", ge=1, only="file"),
    ] = None
    rotate_keep: Annotated[
        int | None,
        Key(
            "How many rotated files to keep, `output.1` being the youngest; all by default.",
            ge=1,
            only="file",
            needs="rotate_bytes",
        ),
    ] = None
    subject_template: Template = "{stream_table}.{op}"
    routing: Routing = {}


class FileSourceOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The source's keys."""

    type: Annotated[Literal["file", "stdin"], Key("`file` or `stdin`.")] = "file"
    input: Annotated[str | None, Key("The file's path.", only="file", required=True)] = None
    follow: Annotated[
        bool,
        Key(
            "Wait for more at the file's end, over rotations, instead of completing the pipeline.",
            only="file",
        ),
    ] = False
    content: Annotated[
        LineContent,
        Key(
            "What a line is: `auto` takes one with exactly the keys of our envelope for an envelope"
            " and any other for a payload, `envelope` and `cloudevents` refuse all other lines,"
            " `payload` looks into none."
        ),
    ] = "auto"
    max_line_bytes: Annotated[
        int, Key("A longer line is refused, and the beginning of it kept.", ge=1)
    ] = DEFAULT_MAX_LINE_BYTES
