"""What a pipeline sends of its messages: which ones, which columns, and what is masked.

Made of the keys ``ops``, ``where``, ``select``, ``exclude``, ``rename`` and ``mask``; a pipeline
without any of them has no shape. All of them name the columns as the row has them. The order is:
``ops``, ``where``, ``select`` or ``exclude``, ``mask``, ``rename``.

A truncation and the markers of a snapshot have no row: ``ops`` decides on truncations, nothing else
concerns them. What can't be looked into is refused, since nobody knows what of it may go out.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from relay.condition import Condition
from relay.errors import ConfigurationError, MessageUndecodable
from relay.events import Direction
from relay.message import RelayMessage
from relay.pipeline_config import Mask, PipelineConfig

KEYS: Final = ("ops", "where", "select", "exclude", "rename", "mask")

REDACTED: Final = "***"

# Names what capture had to leave out of a row: without it the row would look whole.
_OMITTED: Final = "pgtrickle_omitted"
_WITHOUT_ROW = frozenset({"truncate", "snapshot_begin", "snapshot_end"})
_IN_TEMPLATE = re.compile(r"\{\{|\{payload\.([^.{}]+)[^{}]*\}")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_Masking = Callable[[bytes], str | bytes]
_decode_row = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Shape:
    """Chooses and shapes the messages of one pipeline.

    ``resolve`` replaces secret references. ``subject_of`` gives the subject of a forward message,
    which ``where`` may name. Raises `ConfigurationError` and `SecretUnresolved`.
    """

    def __init__(
        self,
        config: PipelineConfig,
        direction: Direction,
        *,
        resolve: Callable[[object], object],
        subject_of: Callable[[RelayMessage], str] | None = None,
    ) -> None:
        self._is_forward = direction == "forward"
        self._sent_ops, self._ops = _ops_of(config, direction)
        self._where = None if config.where is None else Condition(config.where)
        asks_for_subject = self._where is not None and self._where.names_subject
        self._subject_of = subject_of if asks_for_subject else None
        self._select = config.select
        self._exclude = frozenset(config.exclude or ())
        self._rename = config.rename or {}
        self._masks = {
            column: _masking(column, mask, resolve) for column, mask in (config.mask or {}).items()
        }
        self._changes_rows = bool(
            config.select is not None or self._exclude or self._rename or self._masks
        )
        _refuse_contradictions(config)

    def sends(self, op: str) -> bool:
        """Whether messages of this op go out, once updates are put together."""
        return self._sent_ops is None or op in self._sent_ops or op.startswith("snapshot_")

    def of(self, message: RelayMessage) -> RelayMessage | None:
        """The message as it goes out; None where it does not. Raises `MessageRejected`."""
        if self._is_forward and message.op == "event":
            raise MessageUndecodable("what is no row can't be chosen and shaped as one")
        if self._ops is not None and message.op not in self._ops:
            return message if message.op.startswith("snapshot_") else None
        if message.op in _WITHOUT_ROW and message.payload == b"null":
            return message
        if self._where is not None and not self._where.holds(self._with_subject(message)):
            return None
        return self._shaped(message)

    def all_of(self, messages: Sequence[RelayMessage]) -> list[RelayMessage]:
        """Those that go out, in order. Raises `MessageRejected` where one of them is refused."""
        return [shaped for message in messages if (shaped := self.of(message)) is not None]

    def refuse_hidden(self, columns: Sequence[str], whose: str) -> None:
        """Raise `ConfigurationError` where one of these does not go out as it is."""
        for column in columns:
            if key := self._hidden_by(column):
                raise _needed(whose, column, key)

    def refuse_missing(self, columns: Sequence[str], whose: str, *, masked: bool = False) -> None:
        """The same for columns by the names with which they go out; ``masked`` ones may do."""
        originals = {new: old for old, new in self._rename.items()}
        for column in columns:
            if column in self._rename and column not in originals:
                raise ConfigurationError(
                    f"{whose} needs the column {column}, which rename calls {self._rename[column]}",
                    remedy="use the name with which it goes out",
                )
            key = self._hidden_by(originals.get(column, column))
            if key and not (masked and key == "mask"):
                raise _needed(whose, column, key)

    def _hidden_by(self, column: str) -> str:
        if column in self._exclude:
            return "exclude"
        if self._select is not None and column not in self._select:
            return "select"
        return "mask" if column in self._masks else ""

    def _with_subject(self, message: RelayMessage) -> RelayMessage:
        if self._subject_of is None:
            return message
        return msgspec.structs.replace(message, subject=self._subject_of(self._shaped(message)))

    def _shaped(self, message: RelayMessage) -> RelayMessage:
        if not self._changes_rows:
            return message
        try:
            row = _decode_row(message.payload)
        except _UNREADABLE:
            raise MessageUndecodable(
                "the payload is no object that columns could be chosen of"
            ) from None
        if self._select is not None:
            row = {name: row[name] for name in (*self._select, _OMITTED) if name in row}
        columns: dict[str, object] = {}
        for name, value in row.items():
            if name in self._exclude:
                continue
            new_name = self._rename.get(name, name)
            if new_name in columns:
                raise MessageUndecodable(f"rename gives two columns the name {new_name}")
            mask = self._masks.get(name)
            columns[new_name] = value if mask is None else _masked(mask, bytes(value))
        return msgspec.structs.replace(message, payload=msgspec.json.encode(columns))


def shape_of(
    config: PipelineConfig,
    direction: Direction,
    *,
    templates: Mapping[str, Sequence[str]],
    resolve: Callable[[object], object],
    subject_of: Callable[[RelayMessage], str] | None = None,
) -> Shape | None:
    """The shape of a pipeline, None where it has none of the keys.

    ``templates``: those of its sink by key. Raises `ConfigurationError` where a column does not go
    out that these, the key or a rule of the pipeline needs, and as `Shape` does.
    """
    if all(getattr(config, key) is None for key in KEYS):
        return None
    shape = Shape(config, direction, resolve=resolve, subject_of=subject_of)
    shape.refuse_hidden(config.key_columns or (), "key_columns")
    for name in ("dedup_key_from", "event_type_from"):
        shape.refuse_hidden(_in_rule(getattr(config, name) or ""), name)
    for field, rule in (config.columns or {}).items():
        shape.refuse_missing(_in_rule(rule), f"columns.{field}", masked=True)
    for name, texts in templates.items():
        for text in texts:
            columns = [found[1] for found in _IN_TEMPLATE.finditer(text) if found[1]]
            shape.refuse_missing(columns, name)
    return shape


def _ops_of(
    config: PipelineConfig, direction: Direction
) -> tuple[frozenset[str] | None, frozenset[str] | None]:
    """What is sent, and what has to be let through for it while updates are in halves.

    The rows of a snapshot, ``upsert``, go along with inserts and updates.
    """
    if config.ops is None:
        return None, None
    sent = frozenset(config.ops)
    if not sent.isdisjoint(("insert", "update")):
        sent |= {"upsert"}
    if direction == "reverse" or "update" not in sent:
        return sent, sent
    if not config.collapse_updates:
        raise ConfigurationError(
            "ops names update, which needs collapse_updates",
            remedy="without it an update of an outbox is a delete and an insert",
        )
    return sent, sent | {"delete", "insert"}


def _refuse_contradictions(config: PipelineConfig) -> None:
    rename = config.rename or {}
    for other, columns in (("rename", rename), ("mask", config.mask or {})):
        for column in config.exclude or ():
            if column in columns:
                raise ConfigurationError(
                    f"exclude and {other} both name {column}", remedy="leave it out of one of them"
                )
    named = [rename.get(column, column) for column in config.select or rename]
    if len(set(named)) < len(named):
        raise ConfigurationError("rename gives two columns one name", remedy="choose another")


def _in_rule(rule: str) -> Sequence[str]:
    form, _, path = rule.partition(":")
    return (path.partition(".")[0],) if form == "payload" and path else ()


def _needed(whose: str, column: str, key: str) -> ConfigurationError:
    how = {"exclude": "leaves out", "select": "does not list", "mask": "changes"}[key]
    return ConfigurationError(
        f"{whose} needs the column {column}, which {key} {how}",
        remedy=f"it has to go out as it is: change {key}, or let something else be the {whose}",
    )


def _masking(column: str, mask: Mask | str, resolve: Callable[[object], object]) -> _Masking:
    if isinstance(mask, str):
        return lambda _: REDACTED
    if mask.keep_last is not None:
        kept = mask.keep_last
        return lambda value: _end_of(value, kept)
    secret = str(resolve(mask.hash)).encode()
    if not secret:
        raise ConfigurationError(f"mask.{column}.hash is empty", remedy="it needs a secret")
    return lambda value: hmac.new(secret, _text(value).encode(), hashlib.sha256).hexdigest()


def _masked(mask: _Masking, value: bytes) -> object:
    return None if value == b"null" else mask(value)


def _end_of(value: bytes, characters: int) -> str:
    text = _text(value)
    if len(text) <= characters or value.startswith((b"{", b"[")):
        return REDACTED
    return REDACTED + text[-characters:]


def _text(value: bytes) -> str:
    """A string bare, all else as JSON spells it."""
    try:
        return msgspec.json.decode(value, type=str) if value.startswith(b'"') else value.decode()
    except _UNREADABLE:
        raise MessageUndecodable("a column to be masked is not valid text") from None
