-- What a pipeline's configuration may say, as tables, and the checks that read them.
--
-- A value may be a number or boolean in the form of text, or a ${env:...} or ${file:...} reference
-- that the relay resolves. A template may use the variables of relay_template_variables.

create or replace function pgtrickle.relay_pipeline_rules()
returns table (
    direction text,
    key text,
    value_type text,
    lowest bigint,
    highest bigint,
    allowed text[]
)
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    values
        (null, 'config_version', 'integer', 1, 1, null),
        (null, 'source_type', 'text', null, null, null),
        (null, 'source', 'object', null, null, null),
        (null, 'sink_type', 'text', null, null, null),
        (null, 'sink', 'object', null, null, null),
        (null, 'description', 'text', null, null, null),
        (null, 'allow_plaintext_secrets', 'boolean', null, null, null),
        (null, 'batch_size', 'integer', 1, 100000, null),
        (null, 'poll_interval_ms', 'integer', 1, 3600000, null),
        (null, 'prefetch', 'integer', 0, 8, null),
        (null, 'max_attempts', 'integer', 1, null, null),
        (null, 'retry_initial_ms', 'integer', 1, 86400000, null),
        (null, 'retry_max_ms', 'integer', 1, 86400000, null),
        (null, 'breaker_threshold', 'integer', 1, null, null),
        (null, 'ordering', 'text', null, null, array['strict', 'pipelined']),
        ('forward', 'start', 'text', null, null, array['earliest', 'latest']),
        ('forward', 'on_reset', 'text', null, null, array['earliest', 'latest', 'fail']),
        ('forward', 'parallelism', 'integer', 1, 64, null),
        ('forward', 'visibility_seconds', 'integer', 1, 604800, null),
        ('forward', 'collapse_updates', 'boolean', null, null, null),
        ('forward', 'snapshot_markers', 'boolean', null, null, null),
        ('forward', 'dedup_namespace', 'text', null, null, null),
        ('forward', 'key_columns', 'texts', null, null, null),
        ('reverse', 'dedup_key_from', 'text', null, null, null),
        ('reverse', 'event_type_from', 'text', null, null, null),
        ('reverse', 'columns', 'object', null, null, null)
$$;

comment on function pgtrickle.relay_pipeline_rules() is
    'Keys of a pipeline, in both directions where none is said. Null takes the relay''s default.';

revoke all on function pgtrickle.relay_pipeline_rules() from public;

create or replace function pgtrickle.relay_backend_rules()
returns table (backend text, role text, value_type text, keys text)
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select v.backend, r.role, v.value_type, v.keys
    from (
        values
            ('outbox', 'source', 'text', 'type outbox consumer_group'),

            ('nats', 'both', 'text', 'type profile url user password token creds_file nkey_seed tls_ca tls_cert tls_key'),
            ('nats', 'both', 'boolean', 'tls tls_insecure'),
            ('nats', 'sink', 'template', 'subject_template'),
            ('nats', 'sink', 'templates', 'routing'),
            ('nats', 'sink', 'text', 'stream format'),
            ('nats', 'sink', 'boolean', 'create_stream'),
            ('nats', 'sink', 'number', 'duplicate_window_s max_in_flight ack_timeout_ms'),
            ('nats', 'source', 'text', 'subject stream durable_name deliver_policy'),
            ('nats', 'source', 'number', 'ack_wait_seconds max_deliver'),

            ('kafka', 'both', 'text', 'type profile sasl_mechanism sasl_username sasl_password tls_ca tls_cert tls_key'),
            ('kafka', 'both', 'text or texts', 'brokers'),
            ('kafka', 'both', 'boolean', 'tls tls_insecure'),
            ('kafka', 'both', 'number', 'request_timeout_ms'),
            ('kafka', 'sink', 'template', 'topic_template key_template'),
            ('kafka', 'sink', 'templates', 'routing'),
            ('kafka', 'sink', 'text', 'topic acks compression format'),
            ('kafka', 'sink', 'number', 'linger_ms max_request_size'),
            ('kafka', 'source', 'text or texts', 'topic'),
            ('kafka', 'source', 'text', 'group_id group_instance_id auto_offset_reset on_position_lost isolation_level'),
            ('kafka', 'source', 'number', 'session_timeout_ms rebalance_timeout_ms fetch_max_bytes'),

            ('webhook', 'sink', 'text', 'type profile url method format hmac_secret bearer_token username password tls_ca tls_cert tls_key'),
            ('webhook', 'sink', 'boolean', 'batch_mode tls tls_insecure'),
            ('webhook', 'sink', 'number', 'timeout_ms max_in_flight max_body_bytes'),
            ('webhook', 'sink', 'numbers', 'retry_on_status'),
            ('webhook', 'sink', 'object', 'headers'),
            ('webhook', 'sink', 'template', 'subject_template'),
            ('webhook', 'sink', 'templates', 'routing'),
            ('webhook', 'source', 'text', 'type profile listen_addr path auth_header auth_value signature signature_header hmac_secret tls_ca tls_cert tls_key'),
            ('webhook', 'source', 'boolean', 'tls'),
            ('webhook', 'source', 'number', 'max_body_bytes signature_tolerance_s answer_timeout_ms'),

            ('redis', 'both', 'text', 'type profile url username password tls_ca tls_cert tls_key'),
            ('redis', 'both', 'boolean', 'tls tls_insecure'),
            ('redis', 'both', 'number', 'db timeout_ms'),
            ('redis', 'sink', 'template', 'stream_key'),
            ('redis', 'sink', 'templates', 'routing'),
            ('redis', 'sink', 'text', 'format'),
            ('redis', 'sink', 'number', 'maxlen max_message_bytes wait_replicas'),
            ('redis', 'source', 'text', 'stream_key group_name consumer_name start_id payload_field'),
            ('redis', 'source', 'number', 'block_ms count claim_idle_ms'),

            ('sqs', 'both', 'text', 'type profile queue_url region endpoint_url access_key_id secret_access_key session_token tls_ca tls_cert tls_key'),
            ('sqs', 'both', 'boolean', 'tls_insecure'),
            ('sqs', 'both', 'number', 'timeout_ms max_in_flight'),
            ('sqs', 'sink', 'template', 'message_group_id subject_template'),
            ('sqs', 'sink', 'templates', 'routing'),
            ('sqs', 'sink', 'text', 'format'),
            ('sqs', 'sink', 'number', 'max_message_bytes'),
            ('sqs', 'source', 'number', 'visibility_timeout wait_time_seconds'),

            ('rabbitmq', 'both', 'text', 'type profile url username password vhost tls_ca tls_cert tls_key'),
            ('rabbitmq', 'both', 'boolean', 'tls tls_insecure'),
            ('rabbitmq', 'both', 'number', 'timeout_ms'),
            ('rabbitmq', 'sink', 'template', 'routing_key_template'),
            ('rabbitmq', 'sink', 'templates', 'routing'),
            ('rabbitmq', 'sink', 'text', 'exchange exchange_type format'),
            ('rabbitmq', 'sink', 'boolean', 'declare_exchange mandatory'),
            ('rabbitmq', 'sink', 'number', 'max_in_flight max_message_bytes confirm_timeout_ms'),
            ('rabbitmq', 'source', 'text', 'queue'),
            ('rabbitmq', 'source', 'boolean', 'declare_queue exclusive'),
            ('rabbitmq', 'source', 'number', 'prefetch_count'),

            ('pg-inbox', 'sink', 'text', 'type profile url inbox inbox_table schema source sslmode sslrootcert sslcert sslkey'),
            ('pg-inbox', 'sink', 'object', 'columns'),
            ('pg-inbox', 'sink', 'template', 'subject_template'),
            ('pg-inbox', 'sink', 'templates', 'routing'),

            ('stdout', 'sink', 'text', 'type format content'),
            ('stdout', 'sink', 'template', 'subject_template'),
            ('stdout', 'sink', 'templates', 'routing'),
            ('file', 'sink', 'text', 'type output format content'),
            ('file', 'sink', 'number', 'rotate_bytes rotate_keep'),
            ('file', 'sink', 'template', 'subject_template'),
            ('file', 'sink', 'templates', 'routing'),
            ('stdin', 'source', 'text', 'type content'),
            ('stdin', 'source', 'number', 'max_line_bytes'),
            ('file', 'source', 'text', 'type input content'),
            ('file', 'source', 'boolean', 'follow'),
            ('file', 'source', 'number', 'max_line_bytes')
    ) as v (backend, role, value_type, keys)
    cross join lateral unnest(
        case v.role when 'both' then array['sink', 'source'] else array[v.role] end) as r (role)
$$;

comment on function pgtrickle.relay_backend_rules() is
    'Keys of each backend''s sink and source object by type of value, separated by spaces.';

revoke all on function pgtrickle.relay_backend_rules() from public;

create or replace function pgtrickle.relay_required_keys()
returns table (backend text, role text, any_of text[])
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    values
        ('outbox', 'source', array['outbox']),
        ('nats', 'sink', array['url', 'profile']),
        ('nats', 'source', array['url', 'profile']),
        ('nats', 'source', array['subject']),
        ('kafka', 'sink', array['brokers', 'profile']),
        ('kafka', 'sink', array['topic', 'topic_template']),
        ('kafka', 'source', array['brokers', 'profile']),
        ('kafka', 'source', array['topic']),
        ('webhook', 'sink', array['url', 'profile']),
        ('webhook', 'source', array['listen_addr', 'profile']),
        ('redis', 'sink', array['url', 'profile']),
        ('redis', 'source', array['url', 'profile']),
        ('redis', 'source', array['stream_key']),
        ('sqs', 'sink', array['queue_url', 'profile']),
        ('sqs', 'source', array['queue_url', 'profile']),
        ('rabbitmq', 'sink', array['url', 'profile']),
        ('rabbitmq', 'sink', array['exchange', 'routing_key_template']),
        ('rabbitmq', 'source', array['url', 'profile']),
        ('rabbitmq', 'source', array['queue']),
        ('pg-inbox', 'sink', array['inbox', 'inbox_table']),
        ('file', 'sink', array['output']),
        ('file', 'source', array['input'])
$$;

comment on function pgtrickle.relay_required_keys() is
    'Of each list one key must be there. A profile of the relay''s settings brings the endpoint.';

revoke all on function pgtrickle.relay_required_keys() from public;

create or replace function pgtrickle.relay_connection_keys()
returns text[]
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select string_to_array(
        'url brokers region endpoint_url queue_url listen_addr user username password token creds_file '
        'nkey_seed db vhost sasl_mechanism sasl_username sasl_password access_key_id '
        'secret_access_key session_token role_arn auth_header auth_value bearer_token hmac_secret '
        'signature signature_header '
        'headers sslmode sslrootcert sslcert sslkey tls tls_ca tls_cert tls_key tls_insecure client',
        ' ')
$$;

comment on function pgtrickle.relay_connection_keys() is
    'Keys that come from a profile as a whole: a row that could aim a profile''s credentials at an endpoint of its own would give them away.';

revoke all on function pgtrickle.relay_connection_keys() from public;

create or replace function pgtrickle.relay_template_variables()
returns text[]
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select array['stream_table', 'op', 'key', 'outbox_id', 'refresh_id', 'dedup_key']
$$;

comment on function pgtrickle.relay_template_variables() is
    'What a template may name in braces, besides payload.<field>.';

revoke all on function pgtrickle.relay_template_variables() from public;

-- ---------------------------------------------------------------------------
-- Checks
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_validate_config(p_direction text, p_config jsonb)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_source_type text := p_config ->> 'source_type';
    v_sink_type text := p_config ->> 'sink_type';
begin
    if p_direction is null or p_direction not in ('forward', 'reverse') then
        raise exception using
            errcode = '22023',
            message = format('%L is no direction of a pipeline', p_direction),
            hint = 'forward: outbox to broker; reverse: broker to inbox.';
    end if;
    if p_config is null or jsonb_typeof(p_config) <> 'object' then
        perform pgtrickle.relay_refuse('the configuration is not a JSON object');
    end if;
    perform pgtrickle.relay_check_pipeline_keys(p_direction, p_config);

    if p_direction = 'forward' and v_source_type is distinct from 'outbox' then
        perform pgtrickle.relay_refuse(
            format('source_type of a forward pipeline is outbox, not %s', coalesce(v_source_type, 'null')),
            'For a pipeline from a broker to an inbox use set_relay_inbox.');
    elsif p_direction = 'reverse' and v_sink_type is distinct from 'pg-inbox' then
        perform pgtrickle.relay_refuse(
            format('sink_type of a reverse pipeline is pg-inbox, not %s', coalesce(v_sink_type, 'null')),
            'For a pipeline from an outbox to a broker use set_relay_outbox.');
    end if;
    perform pgtrickle.relay_check_backend('source', v_source_type, p_config -> 'source');
    perform pgtrickle.relay_check_backend('sink', v_sink_type, p_config -> 'sink');
    perform pgtrickle.relay_check_combinations(p_direction, p_config);
    if not coalesce((p_config ->> 'allow_plaintext_secrets')::boolean, false) then
        perform pgtrickle.relay_check_secrets('', p_config);
    end if;
end
$$;

comment on function pgtrickle.relay_validate_config(text, jsonb) is
    'Check a pipeline''s configuration by itself, forward or reverse: keys, types, templates (RL010) and plaintext secrets (RL013). What it refers to is not looked up.';

revoke all on function pgtrickle.relay_validate_config(text, jsonb) from public;

create or replace function pgtrickle.relay_refuse(
    p_message text,
    p_hint text default '',
    p_errcode text default 'RL010'
)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception using errcode = p_errcode, message = p_message, hint = p_hint;
end
$$;

comment on function pgtrickle.relay_refuse(text, text, text) is
    'Raise an error about a configuration, RL010 unless another is said.';

revoke all on function pgtrickle.relay_refuse(text, text, text) from public;

create or replace function pgtrickle.relay_refuse_key(p_path text, p_key text, p_known text[])
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_near text := pgtrickle.relay_nearest(p_key, p_known);
begin
    perform pgtrickle.relay_refuse(
        format('%s is not a known key', concat_ws('.', nullif(p_path, ''), p_key)),
        case
            when v_near is not null then format('Did you mean %s?', v_near)
            else format('Known are %s.', array_to_string(p_known, ', '))
        end);
end
$$;

comment on function pgtrickle.relay_refuse_key(text, text, text[]) is
    'Raise RL010 for an unknown key, with the nearest known one.';

revoke all on function pgtrickle.relay_refuse_key(text, text, text[]) from public;

create or replace function pgtrickle.relay_edit_distance(p_left text, p_right text)
returns integer
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_left text := left(p_left, 60);
    v_right text := left(p_right, 60);
    v_width integer := length(v_right);
    v_above integer[] := array(select generate_series(0, v_width));
    v_row integer[];
begin
    for i in 1 .. length(v_left) loop
        v_row := array[i];
        for j in 1 .. v_width loop
            v_row[j + 1] := least(
                v_above[j + 1] + 1,
                v_row[j] + 1,
                v_above[j] + (substr(v_left, i, 1) <> substr(v_right, j, 1))::integer);
        end loop;
        v_above := v_row;
    end loop;
    return v_above[v_width + 1];
end
$$;

comment on function pgtrickle.relay_edit_distance(text, text) is
    'Levenshtein distance of the first 60 characters; fuzzystrmatch is not installed everywhere.';

revoke all on function pgtrickle.relay_edit_distance(text, text) from public;

create or replace function pgtrickle.relay_nearest(p_word text, p_candidates text[])
returns text
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select n.candidate
    from (
        select c.candidate, pgtrickle.relay_edit_distance(lower(p_word), c.candidate) as distance
        from unnest(p_candidates) as c (candidate)
    ) as n
    where n.distance <= greatest(2, length(n.candidate) / 3)
        and n.distance < length(n.candidate)
    order by n.distance, n.candidate
    limit 1
$$;

comment on function pgtrickle.relay_nearest(text, text[]) is
    'The candidate that a mistyped word may have meant; null where none is near.';

revoke all on function pgtrickle.relay_nearest(text, text[]) from public;

create or replace function pgtrickle.relay_check_pipeline_keys(p_direction text, p_config jsonb)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    e record;
    r record;
    v_known text[] := array(
        select p.key from pgtrickle.relay_pipeline_rules() as p
        where coalesce(p.direction, p_direction) = p_direction);
begin
    for e in select k.key, k.value from jsonb_each(p_config) as k order by k.key loop
        if e.key <> all (v_known) then
            perform pgtrickle.relay_refuse_pipeline_key(p_direction, e.key, v_known);
        end if;
        continue when e.value = 'null';
        select p.* into r from pgtrickle.relay_pipeline_rules() as p where p.key = e.key;
        perform pgtrickle.relay_check_value(e.key, e.value, r.value_type);
        if r.allowed is not null and (e.value #>> '{}') <> all (r.allowed) then
            perform pgtrickle.relay_refuse(
                format('%s is %L', e.key, e.value #>> '{}'),
                format('It must be %s.', array_to_string(r.allowed, ' or ')));
        elsif r.value_type = 'integer'
            and (e.value #>> '{}')::numeric not between coalesce(r.lowest, 0) and coalesce(r.highest, 2147483647)
        then
            perform pgtrickle.relay_refuse(
                format('%s is %s', e.key, e.value #>> '{}'),
                format('It must be from %s to %s.', r.lowest, coalesce(r.highest, 2147483647)));
        end if;
    end loop;
end
$$;

comment on function pgtrickle.relay_check_pipeline_keys(text, jsonb) is
    'Check the keys of a pipeline itself.';

revoke all on function pgtrickle.relay_check_pipeline_keys(text, jsonb) from public;

create or replace function pgtrickle.relay_refuse_pipeline_key(
    p_direction text,
    p_key text,
    p_known text[]
)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from pgtrickle.relay_pipeline_rules() as p where p.key = p_key) then
        perform pgtrickle.relay_refuse(
            format('%s is not a key of a %s pipeline', p_key, p_direction),
            format('Known are %s.', array_to_string(p_known, ', ')));
    elsif exists (
        select from pgtrickle.relay_backend_rules() as b
        where p_key = any (string_to_array(b.keys, ' '))
    ) and pgtrickle.relay_nearest(p_key, p_known) is null then
        perform pgtrickle.relay_refuse(
            format('%s is not a key of the pipeline itself', p_key),
            'It belongs into the source or sink object.');
    end if;
    perform pgtrickle.relay_refuse_key('', p_key, p_known);
end
$$;

comment on function pgtrickle.relay_refuse_pipeline_key(text, text, text[]) is
    'Raise RL010 for a key that is unknown, of the other direction, or one level too high.';

revoke all on function pgtrickle.relay_refuse_pipeline_key(text, text, text[]) from public;

create or replace function pgtrickle.relay_check_value(p_path text, p_value jsonb, p_type text)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_kind text := jsonb_typeof(p_value);
    v_text text := p_value #>> '{}';
    v_fits boolean;
    v_is_reference boolean := v_kind = 'string' and v_text ~ '^\$\{(env|file):[^}]+\}$';
begin
    v_fits := case p_type
        when 'integer' then v_kind in ('number', 'string') and v_text ~ '^-?[0-9]{1,18}$'
        when 'number' then v_is_reference
            or (v_kind in ('number', 'string') and v_text ~ '^-?[0-9]{1,18}(\.[0-9]+)?$')
        when 'boolean' then v_is_reference or v_kind = 'boolean'
            or (v_kind = 'string' and lower(v_text) in ('true', 'false'))
        when 'object' then v_kind = 'object'
        when 'text' then v_kind in ('string', 'number', 'boolean')
        when 'texts' then v_kind = 'array' and not jsonb_path_exists(p_value, 'strict $[*] ? (@.type() != "string")')
        when 'numbers' then v_kind = 'array' and not jsonb_path_exists(p_value, 'strict $[*] ? (@.type() != "number")')
        when 'text or texts' then v_kind = 'string'
            or (v_kind = 'array' and not jsonb_path_exists(p_value, 'strict $[*] ? (@.type() != "string")'))
        when 'template' then v_kind = 'string'
        when 'templates' then v_kind = 'object' and not jsonb_path_exists(p_value, 'strict $.* ? (@.type() != "string")')
    end;
    if not v_fits then
        perform pgtrickle.relay_refuse(
            format('%s is %s', p_path, case v_kind when 'string' then 'a text that does not fit' else 'of type ' || v_kind end),
            format('It must be %s.', case p_type
                when 'integer' then 'a whole number'
                when 'number' then 'a number'
                when 'boolean' then 'true or false'
                when 'object' then 'an object'
                when 'texts' then 'a list of texts'
                when 'numbers' then 'a list of numbers'
                when 'text or texts' then 'a text or a list of texts'
                when 'template' then 'a template'
                when 'templates' then 'an object of event type or op to template'
                else 'a text'
            end));
    end if;
end
$$;

comment on function pgtrickle.relay_check_value(text, jsonb, text) is
    'RL010 where a value is not of its type. Does not show the value: it may be a secret.';

revoke all on function pgtrickle.relay_check_value(text, jsonb, text) from public;

create or replace function pgtrickle.relay_check_backend(p_role text, p_backend text, p_options jsonb)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    e record;
    v_type text;
    v_known text[];
begin
    perform pgtrickle.relay_check_backend_type(p_role, p_backend, p_options);
    select array_agg(k.key order by k.key) into v_known
    from pgtrickle.relay_backend_rules() as b
    cross join lateral unnest(string_to_array(b.keys, ' ')) as k (key)
    where b.backend = p_backend and b.role = p_role;

    for e in select k.key, k.value from jsonb_each(p_options) as k order by k.key loop
        select b.value_type into v_type
        from pgtrickle.relay_backend_rules() as b
        where b.backend = p_backend
            and b.role = p_role
            and e.key = any (string_to_array(b.keys, ' '));
        if not found then
            if e.key = 'client' then
                perform pgtrickle.relay_refuse(
                    format('%s.client can''t be set here', p_role),
                    'Options of the client library live in a profile of the relay''s settings.');
            end if;
            perform pgtrickle.relay_refuse_key(p_role, e.key, v_known);
        end if;
        continue when e.value = 'null';
        perform pgtrickle.relay_check_value(format('%s.%s', p_role, e.key), e.value, v_type);
        if v_type = 'template' then
            perform pgtrickle.relay_check_template(format('%s.%s', p_role, e.key), e.value #>> '{}');
        elsif v_type = 'templates' then
            perform pgtrickle.relay_check_template(format('%s.%s.%s', p_role, e.key, t.key), t.value)
            from jsonb_each_text(e.value) as t;
        end if;
    end loop;
    perform pgtrickle.relay_check_required_keys(p_role, p_backend, p_options);
end
$$;

comment on function pgtrickle.relay_check_backend(text, text, jsonb) is
    'Check a source or sink object against the rules of its backend.';

revoke all on function pgtrickle.relay_check_backend(text, text, jsonb) from public;

create or replace function pgtrickle.relay_check_backend_type(
    p_role text,
    p_backend text,
    p_options jsonb
)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_backends text[] := array(
        select distinct b.backend from pgtrickle.relay_backend_rules() as b
        where b.role = p_role and b.backend <> 'outbox'
        order by 1);
    v_near text;
begin
    if p_options is null or jsonb_typeof(p_options) <> 'object' then
        perform pgtrickle.relay_refuse(format('%s is missing', p_role), 'It must be a JSON object.');
    elsif p_backend is null or (p_backend <> 'outbox' and p_options ->> 'type' is null) then
        perform pgtrickle.relay_refuse(
            format('%s.type is missing', p_role),
            format('It must be one of %s.', array_to_string(v_backends, ', ')));
    elsif not exists (
        select from pgtrickle.relay_backend_rules() as b where b.role = p_role and b.backend = p_backend
    ) then
        v_near := pgtrickle.relay_nearest(p_backend, v_backends);
        perform pgtrickle.relay_refuse(
            format('%s.type %L is not known', p_role, p_backend),
            concat(
                case when v_near is not null then format('Did you mean %s? ', v_near) end,
                format('Known are %s.', array_to_string(v_backends, ', '))));
    elsif p_backend <> coalesce(p_options ->> 'type', p_backend) then
        perform pgtrickle.relay_refuse(
            format('%s_type is %s, but %s.type is %s', p_role, p_backend, p_role, p_options ->> 'type'),
            'They must be the same.');
    end if;
end
$$;

comment on function pgtrickle.relay_check_backend_type(text, text, jsonb) is
    'Check that a source or sink object says which backend it means.';

revoke all on function pgtrickle.relay_check_backend_type(text, text, jsonb) from public;

create or replace function pgtrickle.relay_check_required_keys(
    p_role text,
    p_backend text,
    p_options jsonb
)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_given jsonb := jsonb_strip_nulls(p_options);
    v_missing text[];
    v_mixed text;
begin
    select q.any_of into v_missing
    from pgtrickle.relay_required_keys() as q
    where q.backend = p_backend
        and q.role = p_role
        and not exists (
            select from unnest(q.any_of) as a (key) where coalesce(v_given ->> a.key, '') <> '')
    limit 1;
    if found then
        perform pgtrickle.relay_refuse(
            format('%s.%s is missing', p_role, array_to_string(v_missing, format(' or %s.', p_role))),
            case
                when 'profile' = any (v_missing)
                    then 'Give the endpoint, or the name of a profile in the relay''s settings.'
                else format('A %s %s needs it.', p_backend, p_role)
            end);
    end if;
    if v_given ? 'profile' then
        select k.key into v_mixed
        from unnest(pgtrickle.relay_connection_keys()) as k (key)
        where v_given ? k.key
        limit 1;
        if found then
            perform pgtrickle.relay_refuse(
                format('%s.%s can''t be combined with a profile', p_role, v_mixed),
                'Endpoint, credentials and TLS come from a profile as a whole.');
        end if;
    end if;
end
$$;

comment on function pgtrickle.relay_check_required_keys(text, text, jsonb) is
    'RL010 where a required key is missing, or connection keys stand beside a profile.';

revoke all on function pgtrickle.relay_check_required_keys(text, text, jsonb) from public;

create or replace function pgtrickle.relay_check_template(p_path text, p_template text)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    -- Doubled braces are literal; what is left of a template has single ones only.
    v_bare text := regexp_replace(p_template, '\{\{|\}\}', '', 'g');
    v_name text;
    v_near text;
begin
    if p_template = '' then
        perform pgtrickle.relay_refuse(format('%s is empty', p_path), 'Leave it out for the default.');
    end if;
    for v_name in select m[1] from regexp_matches(v_bare, '\{([^{}]*)\}', 'g') as m loop
        continue when v_name = any (pgtrickle.relay_template_variables())
            or v_name ~ '^payload(\.[^.{}]+)+$';
        v_near := pgtrickle.relay_nearest(v_name, pgtrickle.relay_template_variables());
        perform pgtrickle.relay_refuse(
            format('%s has an unknown variable {%s}', p_path, v_name),
            concat(
                case when v_near is not null then format('Did you mean {%s}? ', v_near) end,
                format('Known are {%s} and {payload.<field>}.',
                    array_to_string(pgtrickle.relay_template_variables(), '}, {'))));
    end loop;
    if regexp_replace(v_bare, '\{[^{}]*\}', '', 'g') ~ '[{}]' then
        perform pgtrickle.relay_refuse(
            format('%s has a brace without its partner', p_path),
            'Write {{ and }} for literal braces.');
    end if;
end
$$;

comment on function pgtrickle.relay_check_template(text, text) is
    'RL010 where a template names an unknown variable or has a stray brace.';

revoke all on function pgtrickle.relay_check_template(text, text) from public;

create or replace function pgtrickle.relay_check_combinations(p_direction text, p_config jsonb)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if (p_config ->> 'retry_max_ms')::bigint < (p_config ->> 'retry_initial_ms')::bigint then
        perform pgtrickle.relay_refuse('retry_max_ms is less than retry_initial_ms');
    end if;
    if (p_config ->> 'parallelism')::integer > 1 and p_config #>> '{source,consumer_group}' is null then
        perform pgtrickle.relay_refuse(
            'parallelism needs a consumer group',
            'Name one in source.consumer_group; its slots share the rows, without order among them.');
    end if;
    if p_config -> 'sink' ? 'inbox' and p_config -> 'sink' ? 'inbox_table' then
        perform pgtrickle.relay_refuse(
            'sink has both inbox and inbox_table',
            'inbox is a name in the catalog, inbox_table with schema a table beside it.');
    end if;
    if p_direction = 'reverse' and exists (
        select from jsonb_each(coalesce(nullif(p_config -> 'columns', 'null'), '{}')) as c
        where jsonb_typeof(c.value) <> 'string'
    ) then
        perform pgtrickle.relay_refuse(
            'columns maps an inbox field to something that is not a text',
            'As in {"aggregate_id": "payload.customer_id"}.');
    end if;
end
$$;

comment on function pgtrickle.relay_check_combinations(text, jsonb) is
    'RL010 for keys that contradict each other.';

revoke all on function pgtrickle.relay_check_combinations(text, jsonb) from public;

create or replace function pgtrickle.relay_check_secrets(p_path text, p_value jsonb)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    c_secret constant text :=
        'passw|token|secret|access_key|seed|credential|authorization|cookie|api[-_]?key|private_key|auth_value|signature_key';
    c_reference constant text := '\$\{(env|file):[^}]+\}';
    e record;
begin
    for e in
        select concat_ws('.', nullif(p_path, ''), k.key) as path, k.key, k.value
        from jsonb_each(case jsonb_typeof(p_value) when 'object' then p_value else '{}' end) as k
        union all
        select p_path, null, a.value
        from jsonb_array_elements(case jsonb_typeof(p_value) when 'array' then p_value else '[]' end) as a
    loop
        if jsonb_typeof(e.value) in ('object', 'array') then
            perform pgtrickle.relay_check_secrets(e.path, e.value);
        elsif jsonb_typeof(e.value) in ('string', 'number') and (
            (e.key ~* c_secret
                and e.value #>> '{}' <> ''
                and e.value #>> '{}' !~ c_reference)
            or regexp_replace(e.value #>> '{}', c_reference, '', 'g') ~ '://[^/@\s:]*:[^/@\s]+@'
        ) then
            perform pgtrickle.relay_refuse(
                format('%s holds a secret in plain text', e.path),
                'Write a reference that the relay resolves: ${env:NAME} or ${file:/run/secrets/name}. '
                '"allow_plaintext_secrets": true takes it as it is.',
                'RL013');
        end if;
    end loop;
end
$$;

comment on function pgtrickle.relay_check_secrets(text, jsonb) is
    'RL013 for a value under a secret''s key, or a password in a URL, that is no reference. Does not show the value.';

revoke all on function pgtrickle.relay_check_secrets(text, jsonb) from public;
