"""Stream keys: what a value may contribute to one, and which ones are taken.

Redis takes any bytes as a key; people, access rules (``~pgtrickle:*``) and clusters read a
structure into them. So a value that a template puts into a key never adds a segment, a pattern or
a hash tag: ``:``, ``*``, ``?``, ``[``, ``]``, ``{``, ``}``, ``\\``, ``%``, white space and control
characters become ``%XX`` of their UTF-8 bytes. An empty value becomes ``_`` and the value ``_``
becomes ``%5F``, so that the escaping can be undone.
"""

from __future__ import annotations

from functools import lru_cache

from relay.errors import MessageRejected, MessageTooLarge, TemplateInvalid
from relay.escape import value_escape
from relay.template import filled

MAX_KEY_BYTES = 4096

# One value of a template, fit to be part of a segment.
escape = value_escape(r"[:*?\[\]{}\\]")


class KeyInvalid(MessageRejected):
    """The stream key of this message is none."""

    found_before_sending = True


@lru_cache(maxsize=4096)
def check_key(key: str) -> str:
    """The key, when a message can be sent to it. Raises `KeyInvalid`, `MessageTooLarge`."""
    if not key:
        raise KeyInvalid("the stream key is empty")
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise KeyInvalid("the stream key has no UTF-8 form") from None
    if size > MAX_KEY_BYTES:
        raise MessageTooLarge(
            f"the stream key has {size} bytes, the limit is {MAX_KEY_BYTES} bytes"
        )
    return key


def check_template(text: str) -> None:
    """Raise `TemplateInvalid` where no value could make a key of this template."""
    if not filled(text, "x").strip():
        raise TemplateInvalid("the stream key template is empty")
