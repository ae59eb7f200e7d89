"""What the operating system says about a file, in the relay's errors; and which files are ours."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    NotConnected,
    Outage,
    RelayError,
)

# What is not listed is an outage: it is tried again and loses nothing.
_BY_ERRNO: dict[int, tuple[type[RelayError], str]] = {
    errno.ENOENT: (DestinationMissing, "create it, or its directory"),
    errno.ENOTDIR: (DestinationMissing, "a part of the path is not a directory"),
    errno.EACCES: (AuthenticationRefused, "give the relay's user access to it"),
    errno.EPERM: (AuthenticationRefused, "give the relay's user access to it"),
    errno.EROFS: (AuthenticationRefused, "the file system is read-only"),
    errno.EISDIR: (ConfigurationError, "name a file, not a directory"),
    errno.ELOOP: (ConfigurationError, "name the file itself, not a symbolic link"),
    errno.ENAMETOOLONG: (ConfigurationError, "choose a shorter name"),
    errno.EINVAL: (ConfigurationError, "this kind of file can't be used"),
    errno.ENXIO: (ConfigurationError, "this kind of file can't be used"),
    errno.ENOSPC: (Outage, "free some space; nothing is lost meanwhile"),
    errno.EDQUOT: (Outage, "free some space; nothing is lost meanwhile"),
    errno.EFBIG: (Outage, "the file has reached a limit; set rotate_bytes"),
    errno.EPIPE: (NotConnected, "nobody reads it any more"),
    errno.EBADF: (NotConnected, "the stream is closed"),
}


@contextlib.contextmanager
def file_errors(doing: str, name: str) -> Iterator[None]:
    """Map what file operations raise. ``doing`` completes "while …", ``name`` is the file."""
    try:
        yield
    except OSError as error:
        kind, remedy = _BY_ERRNO.get(error.errno or 0, (Outage, ""))
        said = error.strerror or type(error).__name__
        raise kind(f"{name}: {said} while {doing}", remedy=remedy) from error
    except ValueError as error:
        # A NUL character or a lone surrogate in a path never reaches the operating system.
        raise ConfigurationError(f"{name!a} can't be a file's name: {error}") from error


def allowed_path(text: str, roots: Sequence[Path]) -> Path:
    """The absolute path without symbolic links.

    Raises `ConfigurationError` where it does not lie inside one of the roots.
    """
    with file_errors("looking it up", text):
        path = Path(os.path.realpath(text))
        allowed = [Path(os.path.realpath(root)) for root in roots]
    if not any(root in path.parents for root in allowed):
        listed = ", ".join(str(root) for root in allowed) or "none"
        raise ConfigurationError(
            f"{path} lies outside of the directories that file pipelines may use: {listed}",
            remedy="choose a path inside one of them, or add its directory to files.roots",
        )
    return path
