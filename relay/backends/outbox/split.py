"""Taking a JSON document apart without recursion, for documents that nest too deep to decode.

Only for what PostgreSQL has accepted as JSON already: nothing is validated here, and it is slow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},:]', re.DOTALL)


def array_elements(array: bytes) -> list[bytes]:
    """The elements of a JSON array, each as its own document; none where it is no array."""
    text = array.strip()
    return list(_parts(text)) if text.startswith(b"[") else []


def object_members(document: bytes) -> dict[str, bytes]:
    """The members of a JSON object by name, each value as its own document."""
    members: dict[str, bytes] = {}
    for part in _parts(document.strip()):
        name = _TOKEN.match(part)
        if name is not None:
            value = part[name.end() :].lstrip().removeprefix(b":").strip()
            members[msgspec.json.decode(name[0], type=str)] = value
    return members


def _parts(text: bytes) -> Iterator[bytes]:
    """What stands between the commas of the outermost brackets."""
    depth = 0
    start = 1
    for token in _TOKEN.finditer(text):
        character = token[0][:1]
        if character in b"[{":
            depth += 1
        elif character in b"]}":
            depth -= 1
            if depth == 0:
                last = text[start : token.start()].strip()
                if last:
                    yield last
        elif character == b"," and depth == 1:
            yield text[start : token.start()].strip()
            start = token.end()
