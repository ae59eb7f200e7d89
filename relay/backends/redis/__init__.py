"""Redis Streams, as a sink and as a source. Needs Redis 6.2.

**Sink.** A message is accepted when Redis has answered its ``XADD``; whether that survives a crash
or a failover is the server's setting (``appendfsync``, ``min-replicas-to-write``), and
``wait_replicas`` waits for replicas. With ``ordering: strict`` no event overtakes another of its
key: a transaction of a thousand commands is sent when the one before it is answered, and a server
that refuses one of its entries has stored none. ``pipelined`` sends plain commands, for proxies
without transactions: an event behind a refused one of its key may be stored before it. Redis stores
what it is sent: after a lost connection an entry can be there twice.

**Source.** A consumer group, acknowledged after the write, in the order of the stream: what is
pending for this consumer comes before what can be claimed of dead ones and before anything new. A
pending entry that was trimmed or deleted becomes a dead letter. The dedup key is ours, else the
field ``pgt_dedup_key``, else ``redis:{stream}:{generation}:{id}``: a stream that is deleted and
made again is another, and the old one takes with it what was not acknowledged.

Neither connects again by itself, follows redirections of a Redis Cluster or asks a Sentinel.
"""

from __future__ import annotations

from relay.backends.redis.sink import RedisSink
from relay.backends.redis.source import RedisSource

__all__ = ["RedisSink", "RedisSource"]
