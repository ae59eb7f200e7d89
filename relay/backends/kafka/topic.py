"""Topic names: what a value may contribute to one, and which ones Kafka takes.

A topic is made of letters, digits, ``.``, ``_`` and ``-``, at most 249 of them. In a value that a
template puts into a name everything else becomes ``_``, and so does ``.``: access rules by prefix
(``pgtrickle.``) and people read a structure into it that a value must not change. An empty value
becomes ``_`` as well. Two values can thus share a topic, ``a.b`` and ``a_b`` for one; Kafka itself
advises against names that differ in these characters only.
"""

from __future__ import annotations

import re
from functools import lru_cache

from relay.errors import ConfigurationError, NameInvalid, TemplateInvalid
from relay.template import filled

MAX_LENGTH = 249

_TO_REPLACE = re.compile(r"[^A-Za-z0-9_-]")
_LETTERS = "topics are made of letters, digits, dots, underscores and hyphens"
_LEGAL = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_LENGTH}}}")


def escape(value: str) -> str:
    """One value of a template, fit to be part of a name."""
    return _TO_REPLACE.sub("_", value) or "_"


@lru_cache(maxsize=4096)
def check_topic(topic: str) -> str:
    """The topic, when a message can be sent to it. Raises `NameInvalid`."""
    if len(topic) > MAX_LENGTH:
        raise NameInvalid(
            f"the topic {topic[:40]!r}… has {len(topic)} characters, the limit is {MAX_LENGTH}"
        )
    if not is_legal(topic):
        raise NameInvalid(f"{topic!r} can't be the name of a Kafka topic")
    return topic


def is_legal(topic: str) -> bool:
    """Whether Kafka takes this name."""
    return topic not in (".", "..") and _LEGAL.fullmatch(topic) is not None


def check_template(text: str) -> None:
    """Raise `TemplateInvalid` where no value could make a topic of this template."""
    if not is_legal(filled(text, "x")):
        raise TemplateInvalid(f"no topic can be made of the template {text!r}", remedy=_LETTERS)


def check_names(path: str, topics: list[str]) -> None:
    """Raise `ConfigurationError` for no name, a name given twice, and one that Kafka refuses."""
    if not topics:
        raise ConfigurationError(f"{path} is empty")
    for topic in topics:
        if not is_legal(topic):
            raise ConfigurationError(
                f"{path} has {topic!r}, which can't be the name of a Kafka topic", remedy=_LETTERS
            )
        if topics.count(topic) > 1:
            raise ConfigurationError(f"{path} has {topic!r} twice")
