"""Stream keys: what a value may contribute to one, and which ones are taken.

Redis takes any bytes as a key; people, access rules (``~pgtrickle:*``) and clusters read a
structure into them. So a value that a template puts into a key never adds a segment, a pattern or
a hash tag: ``:``, ``*``, ``?``, ``[``, ``]``, ``{``, ``}``, ``\\``, ``%``, white space and control
characters become ``%XX`` of their UTF-8 bytes. An empty value becomes ``_`` and the value ``_``
becomes ``%5F``, so that the escaping can be undone.
"""

from __future__ import annotations

import re
from functools import lru_cache

from relay.errors import MessageRejected, MessageTooLarge, TemplateInvalid

MAX_KEY_BYTES = 4096

_TO_ESCAPE = re.compile(r"[:*?\[\]{}\\%\s\x00-\x20\x7f\ud800-\udfff]")
_VARIABLE = re.compile(r"\{\{|\}\}|\{[^{}]*\}")


class KeyInvalid(MessageRejected):
    """The stream key of this message is none."""

    found_before_sending = True


def escape(value: str) -> str:
    """One value of a template, fit to be part of a segment."""
    if value in ("", "_"):
        return "%5F" if value else "_"
    return _TO_ESCAPE.sub(
        lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogatepass")),
        value,
    )


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
    if not _VARIABLE.sub("x", text).strip():
        raise TemplateInvalid("the stream key template is empty")
