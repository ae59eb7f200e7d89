"""Message group ids and deduplication ids: what SQS takes as one.

Both are 1 to 128 letters, digits and ASCII punctuation, says the reference of SendMessage
(https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html). In a
value that a template puts into a group id everything else, and ``%``, becomes ``%XX`` of its UTF-8
bytes; an empty value becomes ``_`` and the value ``_`` becomes ``%5F``, so that the escaping can be
undone. What is longer than 128 characters goes as its SHA-256.
"""

from __future__ import annotations

import hashlib
import re

from relay.errors import MessageUndecodable
from relay.escape import value_escape

_LONGEST = 128
_LEGAL = re.compile(r"[!-~]{1,128}")


# One value of a template, fit to be part of a group id.
escape = value_escape(r"[^!-~]")


def group_id(rendered: str) -> str:
    """The group id for what a template gave."""
    if _LEGAL.fullmatch(rendered):
        return rendered
    shortened = escape(rendered)
    return shortened if 0 < len(shortened) <= _LONGEST else digest(rendered)


def deduplication_id(dedup_key: str) -> str:
    """The dedup key itself where SQS takes it, else its SHA-256: the same for the same key."""
    return dedup_key if _LEGAL.fullmatch(dedup_key) else digest(dedup_key)


def digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal. Raises `MessageUndecodable` for a lone surrogate."""
    try:
        return hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError:
        raise MessageUndecodable("a text of the message has no UTF-8 form") from None
