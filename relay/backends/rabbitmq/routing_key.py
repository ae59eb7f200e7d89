"""Routing keys: what a value may contribute to one, and which ones are taken.

A topic exchange reads words between dots, and bindings have the wildcards ``*`` and ``#``. So a
value that a template puts into a routing key never adds a word or a wildcard: ``.``, ``*``, ``#``,
``%``, white space and control characters become ``%XX`` of their UTF-8 bytes. An empty value
becomes ``_`` and the value ``_`` becomes ``%5F``, so that the escaping can be undone.
"""

from __future__ import annotations

from functools import lru_cache

from relay.backends.rabbitmq.options import MAX_NAME_BYTES
from relay.errors import MessageRejected, TemplateInvalid
from relay.escape import fitting, value_escape
from relay.template import filled

# One value of a template, fit to be part of a word.
escape = value_escape(r"[.*#]")


@lru_cache(maxsize=4096)
def check_routing_key(key: str) -> str:
    """The key, when a message can have it. Raises `NameInvalid`, `MessageTooLarge`."""
    return fitting(key, "the routing key", MAX_NAME_BYTES)


def check_template(text: str) -> None:
    """Raise `TemplateInvalid` where no value could make a key of this template."""
    try:
        check_routing_key(filled(text, ""))
    except MessageRejected as error:
        raise TemplateInvalid(f"the template {text!r:.80}: {error.problem}") from None
