"""Files and standard streams: the types ``file``, ``stdout`` and ``stdin``.

Sink. Guarantees: a batch is written, flushed and synced before `publish` returns; one writer per
file (advisory lock); a crash leaves no torn line, because an unfinished last one, which nobody
acknowledged, is taken away when the file is opened again. Ordering: always strict, at no cost:
one thread writes. Deduplication: none; a repeated message is written again with the same key.
What it does not do: create directories, follow a symbolic link out of the allowed directories.

Source. Guarantees: JSON lines in order, each byte of a file handed out at least once; the position
is kept in the catalog and moves only with an acknowledgement; a file that was rotated is read to
its end before its successor, and one that is cut back or overwritten in place, which its first line
or the bytes before the position tell, is another file. Deduplication: by the ``dedup_key`` of the
object, else ``{file name}:{identity}:{byte offset}``, which is the same on every reading; lines of
stdin have a UUID, made when they are read. What it does not do: remember a position in stdin, read
what was overwritten or removed before it was read.
"""

from relay.backends.files.sink import FileSink
from relay.backends.files.source import FileSource
from relay.backends.files.stdin import StdinSource

__all__ = ["FileSink", "FileSource", "StdinSource"]
