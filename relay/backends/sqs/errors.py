"""Everything that can go wrong with SQS, as errors of the relay.

Two tables: one for the exceptions of the client library, one for the codes in the service's
answers (https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/CommonErrors.html and
the errors of each action). Older servers put ``AWS.SimpleQueueService.`` in front of a code, newer
ones ``Exception`` behind some, and have ``KMS.`` where older ones have ``Kms``.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial

from botocore import exceptions as client

from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    MessageRejected,
    MessageTooLarge,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.network import causes, mapped_by, not_connected, of_network
from relay.tls import of_tls

# By name, since releases of the library differ in which classes they have. The nearest class of
# an exception's ancestry decides; what is not here is about how the client is set up.
CLIENT_ERRORS: Mapping[str, type[RelayError]] = {
    "BotoCoreError": ConfigurationError,
    "HTTPClientError": NotConnected,
    "ConnectionError": NotConnected,
    "ConnectTimeoutError": TimedOut,
    "ReadTimeoutError": TimedOut,
    "IncompleteReadError": NotConnected,
    "ChecksumError": NotConnected,
    "FlexibleChecksumError": NotConnected,
    "NoCredentialsError": AuthenticationRefused,
    "NoAuthTokenError": AuthenticationRefused,
    "PartialCredentialsError": AuthenticationRefused,
    "TokenRetrievalError": AuthenticationRefused,
    "UnauthorizedSSOTokenError": AuthenticationRefused,
    "SSOError": AuthenticationRefused,
    # The instance or the container may not have them ready yet.
    "CredentialRetrievalError": Outage,
    "MetadataRetrievalError": Outage,
    "CapacityNotAvailableError": Outage,
}

# As `_plain` spells them.
_CODES_OF: Mapping[type[RelayError], str] = {
    DestinationMissing: "NonExistentQueue QueueDoesNotExist QueueDeletedRecently",
    AuthenticationRefused: (
        "AccessDenied AuthFailure ExpiredToken IncompleteSignature InvalidAccessKeyId "
        "InvalidClientTokenId InvalidSecurity InvalidSignature MissingAuthenticationToken "
        "NotAuthorized OptInRequired RequestExpired SignatureDoesNotMatch UnrecognizedClient "
        "KmsAccessDenied"
    ),
    Outage: (
        "InternalError InternalFailure InternalServerError KmsThrottled KmsThrottling "
        "OverLimit RequestThrottled RequestTimeout ServiceUnavailable Throttling "
        "TooManyRequests Throttled RequestLimitExceeded BandwidthLimitExceeded LimitExceeded "
        "SlowDown PriorRequestNotComplete"
    ),
    ConfigurationError: (
        "InvalidAction InvalidAddress InvalidAttributeName KmsDisabled KmsInvalidKeyUsage "
        "KmsInvalidState KmsNotFound KmsOptInRequired UnknownOperation UnsupportedOperation"
    ),
    MessageTooLarge: "BatchRequestTooLong MessageTooLong",
    MessageRejected: (
        "InvalidAttributeValue InvalidMessageContents InvalidParameterCombination "
        "InvalidParameterValue MissingParameter Validation"
    ),
}
CODES: Mapping[str, type[RelayError]] = {
    code: kind for kind, codes in _CODES_OF.items() for code in codes.split()
}

_REMEDIES: Mapping[str, str] = {
    "NonExistentQueue": "create it, or correct queue_url and region",
    "QueueDoesNotExist": "create it, or correct queue_url and region",
    "AccessDenied": "allow it in the policy of the queue or of the key's owner",
    "ExpiredToken": "renew access_key_id, secret_access_key and session_token",
    "RequestExpired": "set the clock of this machine",
    "KmsAccessDenied": "allow the queue's KMS key to the key's owner",
    "OverLimit": "too many messages are received and not deleted",
}
_NO_SUCH_QUEUE = ("NonExistentQueue", "QueueDoesNotExist")
_CHECK_KEYS = "correct access_key_id, secret_access_key, session_token and region"
_NO_KEYS = "set access_key_id and secret_access_key, or what the AWS chain reads"
_PREFIX = "AWS.SimpleQueueService."
_CODE_IN_XML = re.compile(r"<Code>(?:AWS\.SimpleQueueService\.)?([\w.]+)</Code>")
_PARAMETER = re.compile(r"\bparameter ([A-Z]\w*)")
_LONGEST_TEXT = 300


def of_answer(error: client.ClientError, doing: str, *, is_publish: bool = False) -> RelayError:
    """The relay's error for an answer that is one.

    ``is_publish`` blames what is wrong with a parameter on the message.
    """
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = code_of(error)
    kind = CODES.get(_plain(code)) or _by_status(int(status))
    text = str(error.response.get("Error", {}).get("Message", ""))
    return _told(kind, code, text, doing, is_publish=is_publish)


def of_entry(entry: Mapping[str, object], doing: str) -> RelayError:
    """The relay's error for one entry of a batch that was not accepted."""
    code = str(entry.get("Code", "")).removeprefix(_PREFIX)
    by_fault = MessageRejected if entry.get("SenderFault") else Outage
    kind = CODES.get(_plain(code), by_fault)
    if kind.kind is ErrorKind.MESSAGE and by_fault is Outage:
        kind = Outage
    return _told(kind, code, str(entry.get("Message", "")), doing, is_publish=True)


def code_of(error: client.ClientError) -> str:
    """The code of an answer that is an error, also of one that is in the older XML form."""
    told = error.response.get("Error", {})
    codes = [str(told.get(name, "")).removeprefix(_PREFIX) for name in ("Code", "QueryErrorCode")]
    codes += _CODE_IN_XML.findall(str(told.get("Message", "")))
    return next((one for one in codes if _plain(one) in CODES), codes[0])


def of_exception(
    error: BaseException, doing: str, *, is_publish: bool = False
) -> RelayError | None:
    """The relay's error for what the client, TLS or the network raised; None for others."""
    if isinstance(error, RelayError):
        return error
    if isinstance(error, client.ClientError):
        return of_answer(error, doing, is_publish=is_publish)
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError):
            return of_tls(cause, doing)
        if isinstance(cause, socket.gaierror):
            return NotConnected(
                f"{doing}: the name of the host is not known",
                remedy="correct queue_url or endpoint_url",
            )
    if isinstance(error, client.BotoCoreError):
        return _of_client(error, doing)
    if type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore"):
        # The few that are no BotoCoreError: an answer that is not what the protocol says.
        return NotConnected(f"{doing}: the answer is not one of SQS ({type(error).__name__})")
    return of_network(error, doing)


def mapped(doing: str, *, is_publish: bool = False) -> AbstractContextManager[None]:
    """Turn whatever the client library raises inside into an error of the relay."""
    return mapped_by(partial(of_exception, is_publish=is_publish), doing)


def _told(
    kind: type[RelayError], code: str, text: str, doing: str, *, is_publish: bool
) -> RelayError:
    if kind.kind is ErrorKind.MESSAGE and not is_publish:
        kind = ConfigurationError
    if kind is AuthenticationRefused:
        # What a service says of a wrong signature may repeat the request, and so a token.
        refused = ": ".join(part for part in (doing, "access is refused", code) if part)
        return kind(refused, remedy=_REMEDIES.get(_plain(code), _CHECK_KEYS))
    if code in _NO_SUCH_QUEUE:
        return kind(f"{doing}: there is no such queue", remedy=_REMEDIES[code])
    words = " ".join(text.split())[:_LONGEST_TEXT].rstrip(".")
    said = ": ".join(part for part in (doing, code, words) if part)
    remedy = _REMEDIES.get(_plain(code), "")
    if not is_publish or CODES.get(_plain(code), MessageRejected) is not MessageRejected:
        return kind(said, remedy=remedy)
    # What does not fit, such as a body, a group or an attribute, is quoted in what is said of it.
    at = _PARAMETER.search(words)
    told = kind(": ".join(part for part in (doing, code, at and at[0]) if part), remedy=remedy)
    told.quoting = said
    return told


def _plain(code: str) -> str:
    return code.removesuffix("Exception").replace("KMS.", "Kms")


def _by_status(status: int) -> type[RelayError]:
    if status in (401, 403):
        return AuthenticationRefused
    if status == 404:
        return DestinationMissing
    if status in (408, 429) or status >= 500:
        return Outage
    return MessageRejected


def _of_client(error: BaseException, doing: str) -> RelayError:
    kind = next(CLIENT_ERRORS[one.__name__] for one in type(error).__mro__ if _is_telling(one))
    if kind is TimedOut:
        return kind(f"{doing}: no answer in time")
    if kind is AuthenticationRefused:
        return kind(f"{doing}: there are no usable credentials", remedy=_NO_KEYS)
    if kind is NotConnected:
        for cause in _causes(error):
            if isinstance(cause, OSError) and cause.errno is not None:
                return not_connected(cause, doing)
        return kind(f"{doing}: the connection was ended")
    if isinstance(error, client.NoRegionError):
        return kind(f"{doing}: the region is not known", remedy="set region")
    words = " ".join(str(error).split())[:_LONGEST_TEXT]
    return kind(f"{doing}: {words or type(error).__name__}")


def _is_telling(kind: type[object]) -> bool:
    return kind.__name__ in CLIENT_ERRORS and kind.__module__.startswith(
        ("botocore", "aiobotocore")
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it came from, the transport's own among it."""
    for seen in causes(error):
        yield seen
        # The HTTP library keeps what TLS or the network said beside the chain.
        for inner in ("certificate_error", "os_error"):
            beside = getattr(seen, inner, None)
            if isinstance(beside, BaseException):
                yield beside
