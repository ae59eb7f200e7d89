"""The messages of one publish on their way into commands, of which many are sent in one go."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import msgspec

from relay.backends.redis.connection import pack_one
from relay.backends.redis.entry import LENGTHS, Frame, Limits, frame_of, packed_fields
from relay.backends.redis.key import check_key
from relay.backends.redis.options import RedisSinkOptions
from relay.errors import MessageRejected, MessageUndecodable, RelayError
from relay.message import RelayMessage
from relay.template import Render
from relay.wire import FIELD, bodies_encoder, encoder

# What is under way at a time; a transaction holds up the other clients of the server.
_CHUNK_BYTES = 1024 * 1024
_CHUNK_MESSAGES = 1000
_BODIES_AT_ONCE = 250
_KNOWN_FRAMES = 1024
# The server's default for proto-max-bulk-len.
_LONGEST_VALUE = 512 * 1024 * 1024

_Slot = tuple[str, str, bool]


class Chunk(msgspec.Struct, frozen=True):
    """What is sent in one go: of which messages, and the parts of their commands.

    ``end``: all messages before this one are in here, in a chunk before, or failed. ``keys``: the
    entities, of which some have several messages where ``repeats_key``.
    """

    end: int = 0
    indexes: Sequence[int] = ()
    parts: Sequence[bytes] = ()
    keys: AbstractSet[str | None] = frozenset()
    repeats_key: bool = False


class Commands:
    """How the messages of one sink become ``XADD`` commands."""

    def __init__(self, options: RedisSinkOptions, *, render: Render, namespace: str) -> None:
        self.bodies = bodies_encoder(options.format, namespace=namespace)
        self._encode = encoder(options.format, FIELD, namespace=namespace)
        self._format = options.format
        self._namespace = namespace
        self._render = render
        self._limits = Limits(options.max_message_bytes, _LONGEST_VALUE)
        trimming = [] if options.maxlen is None else [b"MAXLEN", b"~", b"%d" % options.maxlen]
        self._before_fields = b"".join(map(pack_one, [*trimming, b"*"]))
        self._fixed_arguments = 3 + len(trimming)
        # By op and full-refresh mark; None where messages are packed one at a time.
        self._frames: dict[tuple[str, bool], Frame | None] = {}
        self.known: dict[_Slot, Frame] = {}
        """By stream, op and full-refresh mark, for some streams, the frame behind the key."""

    @property
    def limit(self) -> int:
        """What is not larger than this passes no limit."""
        return min(self._limits.message_bytes, self._limits.value_bytes)

    def limit_values(self, value_bytes: int | None) -> None:
        """The server's limit for one value; None where it does not tell."""
        self._limits = Limits(self._limits.message_bytes, value_bytes or _LONGEST_VALUE)

    def frame(self, message: RelayMessage) -> Frame | None:
        """What the command of this message has in common with others; None where nothing.

        Raises `MessageRejected` where no stream can be of that name.
        """
        if message.headers:
            return None
        kind = (message.op, message.is_full_refresh)
        if kind not in self._frames:
            self._frames[kind] = frame_of(message, self._format, self._namespace)
        frame = self._frames[kind]
        if frame is None:
            return None
        frame = frame.behind_head(self._head(message, frame.arguments))
        # A stream for each entity is not worth to be remembered.
        if message.subject and len(self.known) < _KNOWN_FRAMES:
            self.known[message.subject, *kind] = frame
        return frame

    def alone(self, message: RelayMessage) -> bytes:
        """The command of this message, whatever it is. Raises `MessageRejected`."""
        count, fields = packed_fields(message, self._encode, self._limits)
        return self._head(message, count) + fields

    def _head(self, message: RelayMessage, arguments: int) -> bytes:
        """What stands in front of the fields."""
        return b"*%d\r\n$4\r\nXADD\r\n%b%b" % (
            self._fixed_arguments + arguments,
            pack_one(check_key(message.subject or self._render(message)).encode()),
            self._before_fields,
        )


class Packing:
    """Puts messages into chunks, in order.

    Those whose dedup keys are in ``skipped`` are left out. What can't be sent is noted in
    ``failed`` by its index.
    """

    def __init__(
        self,
        messages: Sequence[RelayMessage],
        commands: Commands,
        *,
        skipped: AbstractSet[str],
        failed: dict[int, RelayError],
    ) -> None:
        self._messages = messages
        self._commands = commands
        self._skipped = skipped
        self._failed = failed
        self._bodies: list[bytes | MessageUndecodable] = []
        self._at = 0

    def next_chunk(self) -> Chunk:
        """The next commands; without any when every message is packed or has failed."""
        messages, bodies, skipped, commands = (
            self._messages,
            self._bodies,
            self._skipped,
            self._commands,
        )
        known, limit, lengths, all_lengths = commands.known, commands.limit, LENGTHS, len(LENGTHS)
        indexes: list[int] = []
        parts: list[bytes] = []
        size = 0
        at, end = self._at, len(messages)
        while at < end and len(indexes) < _CHUNK_MESSAGES:
            if at == len(bodies):
                bodies += commands.bodies(messages[at : at + _BODIES_AT_ONCE])
            message, body = messages[at], bodies[at]
            if skipped and message.dedup_key in skipped:
                at += 1
                continue
            try:
                if not isinstance(body, bytes):
                    raise body
                # Without a call for each: this is done for every message.
                frame = (
                    None
                    if message.headers
                    else known.get((message.subject, message.op, message.is_full_refresh))
                ) or commands.frame(message)
                key = message.dedup_key.encode("utf-8", "surrogatepass")
                body_bytes, key_bytes = len(body), len(key)
                command: tuple[bytes, ...]
                if frame is not None and (added := frame.size + body_bytes + key_bytes) <= limit:
                    command = (
                        frame.front,
                        lengths[body_bytes] if body_bytes < all_lengths else _length(body_bytes),
                        body,
                        frame.between,
                        lengths[key_bytes] if key_bytes < all_lengths else _length(key_bytes),
                        key,
                        frame.behind,
                    )
                else:
                    command = (commands.alone(message),)
                    added = len(command[0])
            except MessageRejected as error:
                self._failed[at] = error
                at += 1
                continue
            if size and size + added > _CHUNK_BYTES:
                break
            parts += command
            size += added
            indexes.append(at)
            at += 1
        self._at = at
        entities = [messages[index].key for index in indexes]
        keys = set(entities) - {None}
        return Chunk(
            end=at,
            indexes=indexes,
            parts=parts,
            keys=keys,
            repeats_key=len(keys) < len(entities) - entities.count(None),
        )


def _length(size_bytes: int) -> bytes:
    return b"$%d\r\n" % size_bytes
