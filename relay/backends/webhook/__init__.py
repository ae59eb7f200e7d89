"""HTTP, as a sink that calls a webhook and as a source that is one.

**Sink.** A message is accepted when the request that carries it was answered 2xx. With
``batch_mode``, the default, messages go as one JSON array per request, one request at a time, so
that order is kept whatever happens; it costs a round trip per batch. Without it each message is a
request of its own and up to ``max_in_flight`` are in flight. With ``ordering`` ``strict``, the
default, a message then waits for the answer to the one before it *of its own key*; that costs
nothing while keys vary, and a round trip per event where one key has them all. With
``pipelined`` nothing waits, and an event may be accepted before its predecessor of the same key.

``Idempotency-Key`` is the dedup key, and for an array a digest of its dedup keys. A request that
is repeated after a failure holds the same messages under the same key. Only where the relay
itself was restarted in between may an array be cut in another place; each element of the
``envelope`` and ``cloudevents`` formats still carries its own dedup key. An array that is refused
(4xx) is halved until the messages concerned are found; 413 halves it too and makes the next ones
smaller. What ``Retry-After`` asks for is told to the loop, which waits up to an hour. Redirects are
not followed, cookies and proxies of the environment not used. Headers carry any text
(`relay.backends.webhook.header`). What a receiver answers is neither kept nor logged.

What the formats carry: ``envelope`` everything; ``payload`` everything in a request of its own,
and in an array the rows alone; ``cloudevents`` everything but, in an array, the publisher's
headers.

**Source.** An HTTP server that answers 200 only when what it was sent is settled, which for an
inbox means after the commit. A JSON object is one message, an array one for each element, a whole
array of up to 100,000 being answered as one. What comes while a batch is being written gathers for
the next one, a fiftieth of a second at most. Order is that in which requests were received
completely. What is bad (authentication, signature, JSON, size) is refused with a 4xx and a reason
in JSON, and never becomes a dead letter. 503 with ``Retry-After`` says that it can't be written
now: no answer within ``answer_timeout_ms``, too much waiting already, or an end of the pipeline. A
request whose sender has gone away, or was told 503 after its messages were handed on, may still be
delivered. The dedup key is ours where the message is ours, with ``signature: stripe`` the event's
id in the body (and its ``type`` the event type), else ``Idempotency-Key``, else the sender's id
(``webhook-id``, ``svix-id``, ``X-GitHub-Delivery``), with ``:{index}`` behind it for an element of
an array, else a random UUID: then a repetition can't be told from a new message, unless
``dedup_key_from`` names what can.

Every relay of the group listens, since a load balancer sends anywhere; relays on one host need a
port each. Several pipelines of a relay may share one ``listen_addr`` with different paths and the
same TLS keys.
"""

from __future__ import annotations

from relay.backends.webhook.sink import WebhookSink
from relay.backends.webhook.source import WebhookSource

__all__ = ["WebhookSink", "WebhookSource"]
