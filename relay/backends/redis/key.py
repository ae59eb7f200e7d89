"""Stream keys: what a value may contribute to one, and which ones are taken.

Redis takes any bytes as a key; people, access rules (``~pgtrickle:*``) and clusters read a
structure into them. So a value that a template puts into a key never adds a segment, a pattern or
a hash tag: ``:``, ``*``, ``?``, ``[``, ``]``, ``{``, ``}``, ``\\``, ``%``, white space and control
characters become ``%XX`` of their UTF-8 bytes. An empty value becomes ``_`` and the value ``_``
becomes ``%5F``, so that the escaping can be undone.
"""

from __future__ import annotations

from functools import lru_cache

from relay.errors import NameInvalid, TemplateInvalid
from relay.escape import fitting, value_escape
from relay.template import filled

MAX_KEY_BYTES = 4096

# One value of a template, fit to be part of a segment.
escape = value_escape(r"[:*?\[\]{}\\]")


@lru_cache(maxsize=4096)
def check_key(key: str) -> str:
    """The key, when a message can be sent to it. Raises `NameInvalid`, `MessageTooLarge`."""
    if not key:
        raise NameInvalid("the stream key is empty")
    return fitting(key, "the stream key", MAX_KEY_BYTES)


def check_template(text: str) -> None:
    """Raise `TemplateInvalid` where no value could make a key of this template."""
    if not filled(text, "x").strip():
        raise TemplateInvalid("the stream key template is empty")
