"""Secret references, resolved in memory: ``${env:NAME}`` and ``${file:/path}``.

A value is either one reference or holds several inside a longer text (a connection string, say).
What was resolved is remembered so that `mask` can take it out of any text before it is shown.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from relay.errors import SecretUnresolved

DEFAULT_FILE_ROOTS = ("/run/secrets", "/var/run/secrets", "/etc/pgtrickle-relay/secrets")
DEFAULT_ENV_ALLOW = ("RELAY_*",)
OWN_PREFIX = "PGTRICKLE_RELAY_"
MASK = "******"

# Patterns that PostgreSQL reads too (``scripts/key_rules.py``). A secret's name by what is in it,
# and what a header or a URL's parameter is called besides.
_SENSITIVE = (
    "password|passwd|token|secret|access_key|seed|credential|authorization|auth_value|cookie"
    "|api[-_]?key|private_key"
)
_SHORT_NAME = "key|auth|sig|signature|session|jwt|pwd|pass|code"
SECRET_HEADER = rf"\.headers\.(.*({_SENSITIVE}).*|(.*[-_])?({_SHORT_NAME}))$"
_PARAMETER = rf"([^?&;=\s]*({_SENSITIVE})[^?&;=\s]*|{_SHORT_NAME})"
# What is left of a text without references: a password in a URL, a token in a user's place, or a
# parameter, of a query or of libpq's keywords.
SECRET_IN_URL = (
    r"://[^/@\s:]*:[^/@\s]+@|(nats|tls|https?)://[^/?#@\s:]+@"
    rf"|(^|[?&;\s]){_PARAMETER}(\s*=|\s+=\s+)'?[^&;'\s]"
)
REFERENCES_ONLY = r"^$|^((bearer|basic|token|apikey) +)?(\$\{(env|file):[^}]+\})+$"

_REFERENCE = re.compile(r"\$\{(env|file):([^}]+)\}")
_SECRET_KEY = re.compile(rf"({_SENSITIVE})[^.]*$|{SECRET_HEADER}|\.mask\..+\.hash$", re.IGNORECASE)
_QUERY_SECRET = re.compile(rf"(?<=[?&;])({_PARAMETER}=)([^&;#\s]+)", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):([^/@\s]+)@")
_SHORTEST_MASKED = 4


class SecretPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What references may reach.

    ``file_roots``: directories under which a file may be read. ``env_allow``: shell patterns of
    variable names; None allows all. The relay's own ``PGTRICKLE_RELAY_*`` are reached only where
    ``is_operator`` is true.
    """

    file_roots: Sequence[str] = DEFAULT_FILE_ROOTS
    env_allow: Sequence[str] | None = DEFAULT_ENV_ALLOW
    is_operator: bool = False


# What the runtime settings themselves may refer to: whoever writes them runs the process.
OPERATOR = SecretPolicy(file_roots=("/",), env_allow=None, is_operator=True)


class Secrets:
    """Resolves references under a policy, and masks what it resolved."""

    def __init__(self, policy: SecretPolicy, environment: Mapping[str, str]) -> None:
        self._policy = policy
        self._environment = environment
        self._resolved: set[str] = set()

    def resolve(self, value: object) -> object:
        """The same structure with every reference in its texts replaced.

        Raises `SecretUnresolved` naming the reference, never its value.
        """
        if isinstance(value, str):
            return _REFERENCE.sub(lambda found: self._look_up(found[1], found[2]), value)
        if isinstance(value, Mapping):
            return {name: self.resolve(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.resolve(inner) for inner in value]
        return value

    def mask(self, text: str) -> str:
        """The text without any secret that was resolved here, and without passwords in URLs."""
        for secret in sorted(self._resolved, key=len, reverse=True):
            text = text.replace(secret, MASK)
        return mask_urls(text)

    def _look_up(self, scheme: str, name: str) -> str:
        value = self._from_environment(name) if scheme == "env" else self._from_file(name)
        if len(value) >= _SHORTEST_MASKED:
            self._resolved.add(value)
        return value

    def _from_environment(self, name: str) -> str:
        reference = f"${{env:{name}}}"
        if name.upper().startswith(OWN_PREFIX) and not self._policy.is_operator:
            raise SecretUnresolved(
                f"{reference} reaches for the relay's own settings",
                remedy="give the pipeline a variable of its own",
            )
        allowed = self._policy.env_allow
        if allowed is not None and not any(fnmatch.fnmatchcase(name, rule) for rule in allowed):
            raise SecretUnresolved(
                f"{reference} is not on the allow-list", remedy="add it to secrets.env_allow"
            )
        try:
            return self._environment[name]
        except KeyError:
            raise SecretUnresolved(
                f"{reference}: the environment has no such variable",
                remedy="set it where the relay is started",
            ) from None

    def _from_file(self, name: str) -> str:
        reference = f"${{file:{name}}}"
        path = Path(name).resolve()
        roots = [Path(root).resolve() for root in self._policy.file_roots]
        if not any(path.is_relative_to(root) for root in roots):
            raise SecretUnresolved(
                f"{reference} lies outside of the allowed directories",
                remedy="add its directory to secrets.file_roots",
            )
        try:
            return path.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SecretUnresolved(
                f"{reference} can't be read: {getattr(error, 'strerror', None) or 'not UTF-8'}"
            ) from None


def references(value: object) -> list[str]:
    """All references in a structure, as they are written."""
    if isinstance(value, str):
        return [found[0] for found in _REFERENCE.finditer(value)]
    if isinstance(value, Mapping):
        return [found for inner in value.values() for found in references(inner)]
    if isinstance(value, list | tuple):
        return [found for inner in value for found in references(inner)]
    return []


def is_secret_key(path: str) -> bool:
    """True for a key, with the keys around it in front, under which a secret is expected."""
    return _SECRET_KEY.search(path) is not None


def masked(value: object, name: str = "") -> object:
    """A structure fit to be shown: values under secret keys, and passwords in URLs, are masked.

    A reference is not a secret and stays readable.
    """
    if isinstance(value, Mapping):
        return {key: masked(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(inner, name) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    if is_secret_key(name) and _REFERENCE.fullmatch(value) is None:
        return MASK
    return mask_urls(value)


def mask_urls(text: str) -> str:
    """The text with the password of every URL in it masked, and its secret parameters."""

    def replace(found: re.Match[str]) -> str:
        if _REFERENCE.fullmatch(found[2]):
            return found[0]
        return f"{found[1]}:{MASK}@"

    def replace_parameter(found: re.Match[str]) -> str:
        return found[0] if _REFERENCE.fullmatch(found[4]) else f"{found[1]}{MASK}"

    return _QUERY_SECRET.sub(replace_parameter, _URL_PASSWORD.sub(replace, text))
