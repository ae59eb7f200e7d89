"""Amazon SQS, and servers that speak its protocol, as a sink and as a source.

**Sink.** A message is accepted when the queue has named it among the successful ones of a
``SendMessageBatch``: it is then stored redundantly. Up to ten messages go in one call, as far as
the limit of bytes allows, and ``max_in_flight`` calls are in flight at a time. A standard queue
keeps no order, whatever is done here. A FIFO queue (its name ends in ``.fifo``) keeps the order of
a message group, which is by default the event's key; events without a key share one group. With
``ordering`` ``strict``, the default, at most one event of a key is in flight, so that none
overtakes another whichever entry of a batch is refused; it costs a hot key one call per event. With
``pipelined`` one call may carry several of a key, and an event behind a refused one may be stored
before it. Of one group at most one call is in flight either way. A FIFO queue drops what has a
deduplication id, our dedup key, that it has seen in the last five minutes, without saying so:
duplicates are not counted. An entry that the queue refuses by the sender's fault is refused for
good, any other is tried again. SQS takes the characters of XML 1.0 only and at most ten attributes
(`relay.backends.sqs.entry`).

**Source.** Long polls, several at a time while they come back full. A message is deleted when its
batch is acknowledged, and until then hidden from others for ``visibility_timeout``, which is
extended while the batch is worked on; a batch that is released is visible at once. What a killed
relay held, or an answer that was lost on the way, comes again when that time has run out. Order is
the group's on a FIFO queue; a standard queue has none and may repeat a message. A queue with a
redrive policy counts each receipt and moves what was received too often; an outage of the inbox
does not count, since the batch is held. The dedup key is ours where the message is ours, else its
attribute ``Pgtrickle-Dedup-Key``, else its ``MessageDeduplicationId`` (with the group in front
where the queue deduplicates by group) unless that is the SHA-256 of the body, since equal bodies
recur after five minutes, else its ``MessageId``.

Both ask for the queue's attributes when they connect; where that is not permitted, the limits are
those of SQS itself. Credentials are those of the options, or what the AWS chain finds (environment,
shared files, container, instance). Neither makes a queue.
"""

from __future__ import annotations

from relay.backends.sqs.sink import SqsSink
from relay.backends.sqs.source import SqsSource

__all__ = ["SqsSink", "SqsSource"]
