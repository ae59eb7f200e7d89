-- Written by scripts/docs.py from the options types: whoever declares a key there changes this.

create or replace function @schema@.relay_key_rules()
returns jsonb
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $rules$
    select $json${
"pipeline": {
"forward": {
    "source_type": {"is": "word", "pattern": "^(outbox)$", "must": "outbox for a forward pipeline"},
    "sink_type": {"is": "text"},
    "start": {"is": "word", "pattern": "^(earliest|latest)$", "must": "earliest or latest"},
    "on_reset": {"is": "word", "pattern": "^(earliest|latest|fail)$", "must": "earliest or latest or fail"},
    "parallelism": {"is": "integer", "ge": 1, "must": "a whole number from 1 to 64", "le": 64},
    "visibility_seconds": {"is": "integer", "ge": 1, "must": "a whole number from 1 to 604800", "le": 604800},
    "collapse_updates": {"is": "boolean"},
    "snapshot_markers": {"is": "boolean"},
    "dedup_namespace": {"is": "text"},
    "key_columns": {"is": "list", "of": {"is": "text"}},
    "dedup_key_from": {"refused": ["is not a key of a forward pipeline", "It belongs to reverse pipelines."]},
    "event_type_from": {"refused": ["is not a key of a forward pipeline", "It belongs to reverse pipelines."]},
    "columns": {"refused": ["is not a key of a forward pipeline", "It belongs to reverse pipelines."]}
},
"reverse": {
    "source_type": {"is": "text"},
    "sink_type": {"is": "word", "pattern": "^(pg-inbox)$", "must": "pg-inbox for a reverse pipeline"},
    "start": {"refused": ["is not a key of a reverse pipeline", "It belongs to forward pipelines."]},
    "on_reset": {"refused": ["is not a key of a reverse pipeline", "It belongs to forward pipelines."]},
    "parallelism": {"refused": ["is not a key of a reverse pipeline", "It belongs to forward pipelines."]},
    "visibility_seconds": {"refused": ["is not a key of a reverse pipeline", "It belongs to forward pipelines."]},
    "collapse_updates": {"refused": ["is not a key of a reverse pipeline", "It belongs to forward pipelines."]},
    "snapshot_markers": {"refused": ["is not a key of a reverse pipeline", "It belongs to forward pipelines."]},
    "dedup_namespace": {"refused": ["is not a key of a reverse pipeline", "It belongs to forward pipelines."]},
    "key_columns": {"refused": ["is not a key of a reverse pipeline", "It belongs to forward pipelines."]},
    "dedup_key_from": {"is": "text"},
    "event_type_from": {"is": "text"},
    "columns": {"is": "object", "of": {"is": "text"}}
},
"both": {
    "config_version": {"is": "integer", "ge": 1, "must": "a whole number from 1 to 1", "le": 1},
    "source": {"is": "object", "required": true},
    "sink": {"is": "object", "required": true},
    "description": {"is": "text"},
    "batch_size": {"is": "integer", "ge": 1, "must": "a whole number from 1 to 100000", "le": 100000},
    "poll_interval_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 to 3600000", "le": 3600000},
    "prefetch": {"is": "integer", "ge": 0, "must": "a whole number from 0 to 8", "le": 8},
    "max_attempts": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "retry_initial_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 to 86400000", "le": 86400000},
    "retry_max_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 to 86400000", "le": 86400000},
    "breaker_threshold": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "ordering": {"is": "word", "pattern": "^(strict|pipelined)$", "must": "strict or pipelined"},
    "allow_plaintext_secrets": {"is": "boolean"}
}},
"nats": {
"sink": {
    "subject_template": {"is": "template"},
    "routing": {"is": "object", "of": {"is": "template"}},
    "create_stream": {"is": "boolean", "needs": "stream"},
    "duplicate_window_s": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "max_in_flight": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "ack_timeout_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "format": {"is": "word", "pattern": "^(envelope|payload|cloudevents)$", "must": "envelope or payload or cloudevents"}
},
"source": {
    "subject": {"is": "text", "required": true},
    "durable_name": {"is": "text"},
    "deliver_policy": {"is": "word", "pattern": "^(all|last|new|last_per_subject)$", "must": "all or last or new or last_per_subject"},
    "ack_wait_seconds": {"is": "number", "ge": 1, "must": "a number from 1 on"},
    "max_deliver": {"is": "integer", "ge": -1, "must": "a whole number from -1 on"}
},
"both": {
    "type": {"is": "word", "pattern": "^(nats)$", "must": "nats"},
    "url": {"is": "text", "pattern": "(?i)^(\\s*((nats|tls)://|\\$\\{|(?![^,]*://))[^,]*(,|$))*$", "must": "a text that begins with nats:// or tls://, or without any", "connection": true, "required_unless": "profile"},
    "user": {"is": "text", "connection": true, "needs": "password", "excludes": ["token", "creds_file", "nkey_seed"]},
    "password": {"is": "text", "secret": true, "connection": true, "needs": "user"},
    "token": {"is": "text", "secret": true, "connection": true, "excludes": ["creds_file", "nkey_seed"]},
    "creds_file": {"is": "text", "connection": true, "excludes": ["nkey_seed"]},
    "nkey_seed": {"is": "text", "secret": true, "connection": true},
    "tls": {"is": "boolean", "connection": true},
    "tls_ca": {"is": "text", "connection": true},
    "tls_cert": {"is": "text", "connection": true, "needs": "tls_key"},
    "tls_key": {"is": "text", "connection": true, "needs": "tls_cert"},
    "tls_insecure": {"is": "boolean", "connection": true},
    "stream": {"is": "text"},
    "profile": {"is": "text"}
}},
"kafka": {
"sink": {
    "topic": {"is": "text", "excludes": ["topic_template"], "required_unless": "topic_template"},
    "topic_template": {"is": "template"},
    "routing": {"is": "object", "of": {"is": "template"}},
    "key_template": {"is": "template"},
    "acks": {"is": "word", "pattern": "^(all|1)$", "must": "all or 1"},
    "compression": {"is": "word", "pattern": "^(none|gzip|snappy|lz4|zstd)$", "must": "none or gzip or snappy or lz4 or zstd"},
    "linger_ms": {"is": "integer", "ge": 0, "must": "a whole number from 0 on"},
    "max_request_size": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "format": {"is": "word", "pattern": "^(envelope|payload|cloudevents)$", "must": "envelope or payload or cloudevents"}
},
"source": {
    "topic": {"is": "text or list", "of": {"is": "text"}, "required": true},
    "group_id": {"is": "text"},
    "group_instance_id": {"is": "text"},
    "auto_offset_reset": {"is": "word", "pattern": "^(earliest|latest)$", "must": "earliest or latest"},
    "on_position_lost": {"is": "word", "pattern": "^(fail|earliest|latest)$", "must": "fail or earliest or latest"},
    "isolation_level": {"is": "word", "pattern": "^(read_committed|read_uncommitted)$", "must": "read_committed or read_uncommitted"},
    "session_timeout_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "rebalance_timeout_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "fetch_max_bytes": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"}
},
"both": {
    "type": {"is": "word", "pattern": "^(kafka)$", "must": "kafka"},
    "brokers": {"is": "text or list", "pattern": "(?i)^(\\s*((kafka|plaintext|ssl|sasl_plaintext|sasl_ssl)://|\\$\\{|(?![^,]*://))[^,]*(,|$))*$", "must": "a text that begins with kafka:// or plaintext:// or ssl:// or sasl_plaintext:// or sasl_ssl://, or without any", "of": {"is": "text", "pattern": "(?i)^(\\s*((kafka|plaintext|ssl|sasl_plaintext|sasl_ssl)://|\\$\\{|(?![^,]*://))[^,]*(,|$))*$", "must": "a text that begins with kafka:// or plaintext:// or ssl:// or sasl_plaintext:// or sasl_ssl://, or without any"}, "connection": true, "required_unless": "profile"},
    "sasl_mechanism": {"is": "word", "pattern": "^(PLAIN|SCRAM-SHA-256|SCRAM-SHA-512)$", "must": "PLAIN or SCRAM-SHA-256 or SCRAM-SHA-512", "connection": true, "needs": "sasl_username"},
    "sasl_username": {"is": "text", "connection": true, "needs": "sasl_password"},
    "sasl_password": {"is": "text", "secret": true, "connection": true, "needs": "sasl_username"},
    "tls": {"is": "boolean", "connection": true},
    "tls_ca": {"is": "text", "connection": true},
    "tls_cert": {"is": "text", "connection": true, "needs": "tls_key"},
    "tls_key": {"is": "text", "connection": true, "needs": "tls_cert"},
    "tls_insecure": {"is": "boolean", "connection": true},
    "request_timeout_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "client": {"refused": ["can't be set here", "Options of the client library live in a profile of the relay."]},
    "profile": {"is": "text"}
}},
"redis": {
"sink": {
    "stream_key": {"is": "template"},
    "routing": {"is": "object", "of": {"is": "template"}},
    "maxlen": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "max_message_bytes": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "wait_replicas": {"is": "integer", "ge": 0, "must": "a whole number from 0 on"},
    "format": {"is": "word", "pattern": "^(envelope|payload|cloudevents)$", "must": "envelope or payload or cloudevents"}
},
"source": {
    "stream_key": {"is": "text", "required": true},
    "group_name": {"is": "text"},
    "consumer_name": {"is": "text"},
    "start_id": {"is": "text"},
    "block_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 to 1000", "le": 1000},
    "count": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "claim_idle_ms": {"is": "integer", "ge": 1000, "must": "a whole number from 1000 on"},
    "payload_field": {"is": "text"}
},
"both": {
    "type": {"is": "word", "pattern": "^(redis)$", "must": "redis"},
    "url": {"is": "text", "pattern": "(?i)^((redis|rediss)://|\\$\\{)", "must": "a text that begins with redis:// or rediss://", "connection": true, "required_unless": "profile"},
    "username": {"is": "text", "connection": true},
    "password": {"is": "text", "secret": true, "connection": true},
    "db": {"is": "integer", "ge": 0, "must": "a whole number from 0 on", "connection": true},
    "tls": {"is": "boolean", "connection": true},
    "tls_ca": {"is": "text", "connection": true},
    "tls_cert": {"is": "text", "connection": true, "needs": "tls_key"},
    "tls_key": {"is": "text", "connection": true, "needs": "tls_cert"},
    "tls_insecure": {"is": "boolean", "connection": true},
    "timeout_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "profile": {"is": "text"}
}},
"sqs": {
"sink": {
    "message_group_id": {"is": "template"},
    "subject_template": {"is": "template"},
    "routing": {"is": "object", "of": {"is": "template"}},
    "max_message_bytes": {"is": "integer", "ge": 1, "must": "a whole number from 1 to 1048576", "le": 1048576},
    "format": {"is": "word", "pattern": "^(envelope|payload|cloudevents)$", "must": "envelope or payload or cloudevents"}
},
"source": {
    "visibility_timeout": {"is": "integer", "ge": 1, "must": "a whole number from 1 to 43200", "le": 43200},
    "wait_time_seconds": {"is": "integer", "ge": 1, "must": "a whole number from 1 to 20", "le": 20}
},
"both": {
    "type": {"is": "word", "pattern": "^(sqs)$", "must": "sqs"},
    "queue_url": {"is": "text", "pattern": "(?i)^((http|https)://|\\$\\{)", "must": "a text that begins with http:// or https://", "connection": true, "required_unless": "profile"},
    "region": {"is": "text", "connection": true},
    "endpoint_url": {"is": "text", "pattern": "(?i)^((http|https)://|\\$\\{)", "must": "a text that begins with http:// or https://", "connection": true},
    "access_key_id": {"is": "text", "secret": true, "connection": true, "needs": "secret_access_key"},
    "secret_access_key": {"is": "text", "secret": true, "connection": true, "needs": "access_key_id"},
    "session_token": {"is": "text", "secret": true, "connection": true, "needs": "access_key_id"},
    "tls_ca": {"is": "text", "connection": true, "excludes": ["tls_insecure"]},
    "tls_cert": {"is": "text", "connection": true, "needs": "tls_key", "excludes": ["tls_insecure"]},
    "tls_key": {"is": "text", "connection": true, "needs": "tls_cert"},
    "tls_insecure": {"is": "boolean", "connection": true},
    "timeout_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "max_in_flight": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "profile": {"is": "text"}
}},
"rabbitmq": {
"sink": {
    "exchange": {"is": "text", "required_unless": "routing_key_template"},
    "exchange_type": {"is": "text", "needs": "declare_exchange"},
    "routing_key_template": {"is": "template"},
    "routing": {"is": "object", "of": {"is": "template"}},
    "declare_exchange": {"is": "boolean", "needs": "exchange"},
    "mandatory": {"is": "boolean"},
    "max_in_flight": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "max_message_bytes": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "confirm_timeout_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "format": {"is": "word", "pattern": "^(envelope|payload|cloudevents)$", "must": "envelope or payload or cloudevents"}
},
"source": {
    "queue": {"is": "text", "required": true},
    "declare_queue": {"is": "boolean"},
    "prefetch_count": {"is": "integer", "ge": 1, "must": "a whole number from 1 to 65535", "le": 65535},
    "exclusive": {"is": "boolean"}
},
"both": {
    "type": {"is": "word", "pattern": "^(rabbitmq)$", "must": "rabbitmq"},
    "url": {"is": "text", "pattern": "(?i)^((amqp|amqps)://|\\$\\{)", "must": "a text that begins with amqp:// or amqps://", "connection": true, "required_unless": "profile"},
    "username": {"is": "text", "connection": true},
    "password": {"is": "text", "secret": true, "connection": true},
    "vhost": {"is": "text", "connection": true},
    "tls": {"is": "boolean", "connection": true},
    "tls_ca": {"is": "text", "connection": true},
    "tls_cert": {"is": "text", "connection": true, "needs": "tls_key"},
    "tls_key": {"is": "text", "connection": true, "needs": "tls_cert"},
    "tls_insecure": {"is": "boolean", "connection": true},
    "timeout_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "profile": {"is": "text"}
}},
"webhook": {
"sink": {
    "url": {"is": "text", "pattern": "(?i)^((http|https)://|\\$\\{)", "must": "a text that begins with http:// or https://", "connection": true, "required_unless": "profile"},
    "method": {"is": "word", "pattern": "^(POST|PUT|PATCH)$", "must": "POST or PUT or PATCH"},
    "headers": {"is": "object", "of": {"is": "text"}, "connection": true},
    "timeout_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "batch_mode": {"is": "boolean"},
    "max_in_flight": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "retry_on_status": {"is": "list", "of": {"is": "integer", "ge": 400, "must": "a whole number from 400 to 599", "le": 599}},
    "bearer_token": {"is": "text", "secret": true, "connection": true, "excludes": ["username"]},
    "username": {"is": "text", "connection": true, "needs": "password"},
    "password": {"is": "text", "secret": true, "connection": true, "needs": "username"},
    "hmac_secret": {"is": "text", "secret": true, "connection": true},
    "tls_insecure": {"is": "boolean", "connection": true},
    "subject_template": {"is": "template"},
    "routing": {"is": "object", "of": {"is": "template"}},
    "format": {"is": "word", "pattern": "^(envelope|payload|cloudevents)$", "must": "envelope or payload or cloudevents"}
},
"source": {
    "listen_addr": {"is": "text", "connection": true, "required_unless": "profile"},
    "path": {"is": "text"},
    "auth_header": {"is": "text", "connection": true, "needs": "auth_value"},
    "auth_value": {"is": "text", "secret": true, "connection": true},
    "signature": {"is": "word", "pattern": "^(hmac-sha256|github|stripe|svix)$", "must": "hmac-sha256 or github or stripe or svix", "connection": true, "needs": "hmac_secret"},
    "signature_header": {"is": "text", "connection": true, "needs": "signature"},
    "signature_tolerance_s": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "hmac_secret": {"is": "text", "secret": true, "connection": true, "needs": "signature"},
    "answer_timeout_ms": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"}
},
"both": {
    "type": {"is": "word", "pattern": "^(webhook)$", "must": "webhook"},
    "max_body_bytes": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "tls": {"is": "boolean", "connection": true},
    "tls_ca": {"is": "text", "connection": true},
    "tls_cert": {"is": "text", "connection": true, "needs": "tls_key"},
    "tls_key": {"is": "text", "connection": true, "needs": "tls_cert"},
    "profile": {"is": "text"}
}},
"pg-inbox": {
"sink": {

},
"both": {
    "type": {"is": "word", "pattern": "^(pg-inbox)$", "must": "pg-inbox"},
    "inbox": {"is": "text", "excludes": ["inbox_table"], "required_unless": "inbox_table"},
    "inbox_table": {"is": "text"},
    "schema": {"is": "text"},
    "url": {"is": "text", "pattern": "(?i)^(\\s*((postgresql|postgres)://|\\$\\{|(?![^,]*://))[^,]*(,|$))*$", "must": "a text that begins with postgresql:// or postgres://, or without any", "connection": true},
    "sslmode": {"is": "word", "pattern": "^(disable|allow|prefer|require|verify-ca|verify-full)$", "must": "disable or allow or prefer or require or verify-ca or verify-full", "connection": true, "needs": "url"},
    "sslrootcert": {"is": "text", "connection": true, "needs": "url"},
    "sslcert": {"is": "text", "connection": true, "needs": "url"},
    "sslkey": {"is": "text", "connection": true, "needs": "url"},
    "columns": {"is": "object", "of": {"is": "text"}},
    "source": {"is": "text"},
    "subject_template": {"is": "template"},
    "routing": {"is": "object", "of": {"is": "template"}},
    "profile": {"is": "text"}
}},
"stdout": {
"sink": {

},
"both": {
    "type": {"is": "word", "pattern": "^(stdout)$", "must": "stdout"},
    "format": {"is": "word", "pattern": "^(jsonl|json_pretty|csv)$", "must": "jsonl or json_pretty or csv"},
    "content": {"is": "word", "pattern": "^(envelope|payload|cloudevents)$", "must": "envelope or payload or cloudevents"},
    "subject_template": {"is": "template"},
    "routing": {"is": "object", "of": {"is": "template"}}
}},
"file": {
"sink": {
    "output": {"is": "text", "required": true},
    "format": {"is": "word", "pattern": "^(jsonl|json_pretty|csv)$", "must": "jsonl or json_pretty or csv"},
    "content": {"is": "word", "pattern": "^(envelope|payload|cloudevents)$", "must": "envelope or payload or cloudevents"},
    "rotate_bytes": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"},
    "rotate_keep": {"is": "integer", "ge": 1, "must": "a whole number from 1 on", "needs": "rotate_bytes"},
    "subject_template": {"is": "template"},
    "routing": {"is": "object", "of": {"is": "template"}}
},
"source": {
    "input": {"is": "text", "required": true},
    "follow": {"is": "boolean"},
    "content": {"is": "word", "pattern": "^(auto|envelope|payload|cloudevents)$", "must": "auto or envelope or payload or cloudevents"},
    "max_line_bytes": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"}
},
"both": {
    "type": {"is": "word", "pattern": "^(file)$", "must": "file"}
}},
"outbox": {
"source": {

},
"both": {
    "type": {"is": "word", "pattern": "^(outbox)$", "must": "outbox"},
    "outbox": {"is": "text", "required": true},
    "outbox_table": {"is": "text"},
    "consumer_group": {"is": "text"}
}},
"stdin": {
"source": {

},
"both": {
    "type": {"is": "word", "pattern": "^(stdin)$", "must": "stdin"},
    "content": {"is": "word", "pattern": "^(auto|envelope|payload|cloudevents)$", "must": "auto or envelope or payload or cloudevents"},
    "max_line_bytes": {"is": "integer", "ge": 1, "must": "a whole number from 1 on"}
}},
"types": {"text": {"kinds": ["string"], "pattern": "", "must": "a text"}, "word": {"kinds": ["string"]}, "integer": {"kinds": ["string", "number"], "pattern": "^-?[0-9]{1,18}$", "must": "a whole number"}, "number": {"kinds": ["string", "number"], "pattern": "^-?[0-9]{1,18}(\\.[0-9]{1,18})?$", "must": "a number"}, "boolean": {"kinds": ["string", "boolean"], "pattern": "(?i)^(true|false)$", "must": "true or false"}, "template": {"kinds": ["string"], "pattern": "", "must": "a template"}, "object": {"kinds": ["object"], "must": "an object"}, "list": {"kinds": ["array"], "must": "a list"}, "text or list": {"kinds": ["string", "array"], "pattern": "", "must": "a text or a list"}},
"variables": ["stream_table", "op", "key", "outbox_id", "refresh_id", "dedup_key"],
"in_template": "\\{\\{|\\}\\}|\\$\\{(env|file):[^}]+\\}|\\{(stream_table|op|key|outbox_id|refresh_id|dedup_key|payload(\\.[^.{}]+)+)\\}",
"references_only": "^$|^((bearer|basic|token|apikey) +)?(\\$\\{(env|file):[^}]+\\})+$",
"secret_header": "\\.headers\\.(.*(password|passwd|token|secret|access_key|seed|credential|authorization|auth_value|cookie|api[-_]?key|private_key).*|(.*[-_])?(key|auth|sig|signature|session|jwt|pwd|pass|code))$",
"secret_in_url": "://[^/@\\s:]*:[^/@\\s]+@|(nats|tls|https?)://[^/?#@\\s:]+@|(^|[?&;\\s])([^?&;=\\s]*(password|passwd|token|secret|access_key|seed|credential|authorization|auth_value|cookie|api[-_]?key|private_key)[^?&;=\\s]*|key|auth|sig|signature|session|jwt|pwd|pass|code)(\\s*=|\\s+=\\s+)'?[^&;'\\s]",
"secret_hint": "Write a reference that the relay resolves, and nothing beside it: ${env:NAME} or ${file:/run/secrets/name}. \"allow_plaintext_secrets\": true takes it as it is."
}$json$::jsonb
$rules$;

comment on function @schema@.relay_key_rules() is
    'Keys of pipelines and of each backend''s sink and source, with what holds for them.';
