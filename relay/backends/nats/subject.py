"""Subjects: what a value may contribute to one, and which ones a server takes.

A value that a template puts into a subject never adds a token, a wildcard or a line: ``.``, ``*``,
``>``, ``%``, white space, control characters and a ``$`` in front become ``%XX`` of their UTF-8
bytes. An empty value becomes ``_`` and the value ``_`` becomes ``%5F``, so that the escaping can
be undone. Other characters stay as they are; subjects are UTF-8
(https://docs.nats.io/nats-concepts/subjects).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from relay.errors import NameInvalid, TemplateInvalid
from relay.escape import fitting, value_escape
from relay.template import filled

# A server ends the connection at a control line above 4,096 bytes, which also holds the reply.
MAX_SUBJECT_BYTES = 2048

# One value of a template, fit to be part of a token.
escape = value_escape(r"[.*>]|^\$")

_UNSENDABLE = re.compile(r"[\s\x00-\x20\x7f\ud800-\udfff]")


@lru_cache(maxsize=4096)
def check_subject(subject: str) -> str:
    """The subject, when a message can be published to it.

    Raises `NameInvalid`, or `MessageTooLarge` naming the limit.
    """
    problem = _problem(subject)
    if problem:
        raise NameInvalid(f"the subject {subject[:80]!r} {problem}")
    return fitting(subject, "the subject", MAX_SUBJECT_BYTES)


def check_template(text: str) -> None:
    """Raise `TemplateInvalid` where no value could make a subject of this template."""
    problem = _problem(filled(text, "x"))
    if problem:
        raise TemplateInvalid(f"the subject template {text!r} {problem}")


def filter_of(template: str) -> str:
    """The subject filter that covers exactly the tokens of a template."""
    tokens = filled(template, "\x00").split(".")
    return ".".join("*" if "\x00" in token else token for token in tokens)


def covering(templates: Iterable[str]) -> list[str]:
    """Filters that cover all templates: the constant beginning of each, then everything.

    Raises `TemplateInvalid` for a template that begins with a variable.
    """
    filters: list[str] = []
    for template in templates:
        tokens = filter_of(template).split(".")
        if tokens[0] == "*":
            raise TemplateInvalid(
                f"no stream can be created for the subject template {template!r}",
                remedy="begin it with a constant token, or create the stream yourself",
            )
        constant = tokens.index("*") if "*" in tokens else None
        filters.append(
            ".".join(tokens) if constant is None else ".".join([*tokens[:constant], ">"])
        )
    unique = list(dict.fromkeys(filters))
    wide = [one[:-1] for one in unique if one.endswith(">")]
    return [one for one in unique if not any(one.startswith(w) and one[:-1] != w for w in wide)]


def _problem(subject: str) -> str:
    if not subject:
        return "is empty"
    if _UNSENDABLE.search(subject):
        return "has white space or control characters"
    for token in subject.split("."):
        if not token:
            return "has an empty token"
        if token in ("*", ">"):
            return f"has the wildcard {token}"
    return ""
