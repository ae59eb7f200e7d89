"""HTTP, as a sink that calls a webhook and as a source that is one.

**Sink.** A message is accepted when the request that carries it was answered 2xx: an array per
request, or a request per message. Order is per key. The dedup key travels as ``Idempotency-Key``
and in the formats that carry it; whether a repetition is noticed is up to the receiver.

**Source.** An HTTP server that answers 200 only when what it was sent is settled, which for an
inbox means after the commit. Order is that in which requests were received completely. Every relay
of the group listens. What is bad is refused with a 4xx and never becomes a dead letter.
"""

from __future__ import annotations

from relay.backends.webhook.sink import WebhookSink
from relay.backends.webhook.source import WebhookSource

__all__ = ["WebhookSink", "WebhookSource"]
