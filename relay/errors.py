"""What can go wrong, as one tree; each error says whose trouble it is and what to do about it.

```
RelayError
├── ConfigurationError        kind configuration: an operator must change something
│   ├── SecretUnresolved      a ${env:…} or ${file:…} reference leads nowhere
│   ├── TemplateInvalid       a subject, topic or key template that cannot be compiled
│   ├── DriverMissing         the library of a backend or of conditions is not installed
│   ├── AuthenticationRefused the broker does not accept our credentials
│   ├── DestinationMissing    the stream, topic, queue, table or path does not exist
│   ├── OutboxUnsafe          the outbox cannot be read without risking an event
│   └── PositionLost          the committed position no longer fits the source
├── CatalogError              kind configuration: the database lacks what the relay needs
│   ├── CatalogMissing        `migrate` has not been run
│   └── MigrationRefused      the database is newer, a standby, or was changed by hand
├── Outage                    kind outage: the broker is away; wait and try again
│   ├── NotConnected          used before connect, or after the connection was lost
│   └── TimedOut              no answer within the time allowed; it may have been accepted
├── OwnershipLost             kind outage: another relay holds this pipeline now
│   └── LeaseLost             the lease on these outbox rows ran out
├── MessageRejected           kind message: this one message, for good
│   ├── MessageTooLarge       found before sending; names the limit
│   ├── NameInvalid           found before sending; no name of the broker can be like that
│   └── MessageUndecodable    what was read is not what the format promises
└── EndOfInput                not a failure: the source has nothing more, ever
```

The loop decides by ``kind`` alone; a backend maps its driver's exceptions to this tree.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum


def suggestion(word: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """As a remedy for an unknown word: the nearest known one, else ``otherwise`` or all of them."""
    words = list(known)
    near = get_close_matches(word, words, n=1)
    return f"did you mean {near[0]}?" if near else otherwise or f"known are {', '.join(words)}"


class ErrorKind(StrEnum):
    """Whose trouble an error is; the relay's reaction follows from it."""

    MESSAGE = "message"
    OUTAGE = "outage"
    CONFIGURATION = "configuration"


class RelayError(Exception):
    """Root of all errors that the relay raises on purpose.

    ``remedy`` is what the reader can do about it, in one sentence, or empty. ``str()`` gives the
    problem and the remedy on one line and never contains a secret or a payload. ``quoting`` is what
    a server said that may repeat what it was sent: for the dead letter that holds the same.
    ``retry_after_s`` is what an `Outage` may carry.
    """

    kind: ErrorKind = ErrorKind.OUTAGE
    retry_after_s: float | None = None
    quoting: str = ""

    def __init__(self, problem: str, *, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem} ({self.remedy})" if self.remedy else self.problem


class ConfigurationError(RelayError):
    """Something that an operator wrote is wrong; trying again changes nothing until it is."""

    kind = ErrorKind.CONFIGURATION


class SecretUnresolved(ConfigurationError):
    """A secret reference names a variable or a file that is absent or not allowed."""


class TemplateInvalid(ConfigurationError):
    """A template names an unknown variable or is not well formed."""


class DriverMissing(ConfigurationError):
    """The library of a backend, or of conditions, is not installed; the remedy names the extra."""


class AuthenticationRefused(ConfigurationError):
    """The broker or destination refused our credentials, certificate or permissions."""


class DestinationMissing(ConfigurationError):
    """The stream, topic, queue, group, table or path does not exist and is not ours to make."""


class OutboxUnsafe(ConfigurationError):
    """Reading this outbox could lose an event: a cached sequence, a standby, a missing column."""


class PositionLost(ConfigurationError):
    """The committed position lies outside of what the source still has; names the range."""


class CatalogError(RelayError):
    """The database does not have what the relay needs."""

    kind = ErrorKind.CONFIGURATION


class CatalogMissing(CatalogError):
    """The relay's catalog is not in this database."""


class MigrationRefused(CatalogError):
    """The migration did not start, because going on could harm: nothing was changed."""


class Outage(RelayError):
    """The broker or destination is away or overloaded; nothing is wrong with the message.

    It may ask to back off for ``retry_after_s`` seconds; up to an hour is granted.
    """

    kind = ErrorKind.OUTAGE

    def __init__(
        self, problem: str, *, remedy: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(problem, remedy=remedy)
        self.retry_after_s = retry_after_s


class NotConnected(Outage):
    """There is no connection: not yet, or not any more."""


class TimedOut(Outage):
    """No answer came in time. What was sent may or may not have been accepted."""


class OwnershipLost(RelayError):
    """Another relay has taken this pipeline; our position is not written any more."""

    kind = ErrorKind.OUTAGE


class LeaseLost(OwnershipLost):
    """The lease on these rows ran out and another worker may have them."""


class MessageRejected(RelayError):
    """The destination, or the format, rejects this one message for good.

    ``found_before_sending`` is true where the relay itself saw it: that says nothing about the
    health of the destination.
    """

    kind = ErrorKind.MESSAGE
    found_before_sending = False


class NameInvalid(MessageRejected):
    """The subject, topic, stream or routing key of this message is none that the broker takes."""

    found_before_sending = True


class MessageTooLarge(MessageRejected):
    """The message exceeds a limit of the destination, which the text names."""

    found_before_sending = True


class MessageUndecodable(MessageRejected):
    """What was read does not decode, or lacks a field that the configuration asks for."""

    found_before_sending = True


class EndOfInput(Exception):
    """The source is exhausted and complete: no further poll will return a message."""
