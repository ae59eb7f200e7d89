-- Dead letters: messages that could not be delivered, kept with all that sending them again takes.

create or replace function pgtrickle.relay_dead_letter(
    p_relay_group_id text,
    p_pipeline text,
    p_direction text,
    p_dedup_keys text[],
    p_subjects text[],
    p_message_keys text[],
    p_ops text[],
    p_headers jsonb[],
    p_payloads bytea[],
    p_metadata jsonb[],
    p_error_kinds text[],
    p_errors text[],
    p_attempts integer[]
)
returns bigint[]
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
    with letters as materialized (
        select *
        from unnest(
            p_dedup_keys, p_subjects, p_message_keys, p_ops, p_headers, p_payloads, p_metadata,
            p_error_kinds, p_errors, p_attempts
        ) with ordinality as l (
            dedup_key, subject, message_key, op, headers, payload, metadata,
            error_kind, error, attempts, place
        )
    ), latest as (
        -- One statement can't write an entry twice.
        select distinct on (l.dedup_key) l.*
        from letters as l
        order by l.dedup_key, l.place desc
    ), written as (
        insert into pgtrickle.relay_dlq as d (
            relay_group_id, pipeline, direction, dedup_key, subject, message_key, op, headers,
            payload, metadata, error_kind, error, attempts
        )
        select
            p_relay_group_id, p_pipeline, p_direction, l.dedup_key, l.subject, l.message_key, l.op,
            coalesce(l.headers, '{}'), l.payload, coalesce(l.metadata, '{}'), l.error_kind, l.error,
            coalesce(l.attempts, 1)
        from latest as l
        order by l.place
        on conflict (relay_group_id, pipeline, md5(dedup_key)) do update
        set
            error_kind = excluded.error_kind,
            error = excluded.error,
            attempts = d.attempts + excluded.attempts,
            last_failed_at = now(),
            retry_requested_at = null
        returning d.id, d.dedup_key
    )
    select coalesce(array_agg(w.id order by l.place), '{}')
    from letters as l
    join written as w using (dedup_key)
$$;

comment on function pgtrickle.relay_dead_letter(text, text, text, text[], text[], text[], text[], jsonb[], bytea[], jsonb[], text[], text[], integer[]) is
    'Store messages that can''t be delivered and return their entries'' ids, in order. A message that is there already gets no second entry: its attempts add up. Definer: dead letters are written by functions only.';

revoke all on function pgtrickle.relay_dead_letter(text, text, text, text[], text[], text[], text[], jsonb[], bytea[], jsonb[], text[], text[], integer[]) from public;

create or replace function pgtrickle.relay_dlq_list(
    name text default null,
    limit_rows integer default 100
)
returns table (
    id bigint,
    relay_group_id text,
    pipeline text,
    direction text,
    dedup_key text,
    subject text,
    message_key text,
    op text,
    headers jsonb,
    payload bytea,
    metadata jsonb,
    error_kind text,
    error text,
    attempts integer,
    first_failed_at timestamptz,
    last_failed_at timestamptz,
    retry_requested_at timestamptz
)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select
        d.id, d.relay_group_id, d.pipeline, d.direction, d.dedup_key, d.subject, d.message_key,
        d.op, d.headers, d.payload, d.metadata, d.error_kind, d.error, d.attempts,
        d.first_failed_at, d.last_failed_at, d.retry_requested_at
    from pgtrickle.relay_dlq as d
    where name is null
        or d.pipeline = name
    order by d.id
    limit limit_rows
$$;

comment on function pgtrickle.relay_dlq_list(text, integer) is
    'Dead letters of one pipeline, or of all, oldest first. A payload that is text reads as convert_from(payload, ''UTF8''). Definer: dead letters are read by functions only.';

revoke all on function pgtrickle.relay_dlq_list(text, integer) from public;

create or replace function pgtrickle.relay_dlq_notify(p_pipelines text[])
returns void
language sql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select pg_notify(
        'pgtrickle_relay_config',
        json_build_object(
            'direction', case n.direction
                when 'forward' then 'relay_outbox_config' else 'relay_inbox_config'
            end,
            'event', 'RETRY',
            'name', n.name,
            'enabled', true
        )::text)
    from pgtrickle.relay_pipeline_names as n
    where n.name = any (p_pipelines)
$$;

comment on function pgtrickle.relay_dlq_notify(text[]) is
    'Tell the relays that these pipelines have dead letters to send again.';

revoke all on function pgtrickle.relay_dlq_notify(text[]) from public;

create or replace function pgtrickle.relay_dlq_retry(id bigint)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_pipeline text;
begin
    update pgtrickle.relay_dlq as d
    set retry_requested_at = now()
    where d.id = relay_dlq_retry.id
    returning d.pipeline into v_pipeline;
    if not found then
        raise exception using
            errcode = 'RL040',
            message = format('there is no dead letter %s', coalesce(relay_dlq_retry.id::text, 'null')),
            detail = 'It was delivered or purged, or never existed.',
            hint = 'select id, pipeline, error from pgtrickle.relay_dlq_list();';
    end if;
    perform pgtrickle.relay_dlq_notify(array[v_pipeline]);
end
$$;

comment on function pgtrickle.relay_dlq_retry(bigint) is
    'Ask for one dead letter to be sent again, through its pipeline and with its deduplication key. Definer: dead letters are written by functions only.';

revoke all on function pgtrickle.relay_dlq_retry(bigint) from public;

create or replace function pgtrickle.relay_dlq_retry_all(pipeline text)
returns bigint
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_requested bigint;
begin
    perform pgtrickle.relay_require_pipeline(relay_dlq_retry_all.pipeline);
    update pgtrickle.relay_dlq as d
    set retry_requested_at = now()
    where d.pipeline = relay_dlq_retry_all.pipeline;
    get diagnostics v_requested = row_count;
    perform pgtrickle.relay_dlq_notify(array[relay_dlq_retry_all.pipeline]);
    return v_requested;
end
$$;

comment on function pgtrickle.relay_dlq_retry_all(text) is
    'Ask for all dead letters of a pipeline to be sent again; returns how many. Definer: dead letters are written by functions only.';

revoke all on function pgtrickle.relay_dlq_retry_all(text) from public;

create or replace function pgtrickle.relay_dlq_purge(
    pipeline text,
    older_than interval default null
)
returns bigint
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_purged bigint;
begin
    delete from pgtrickle.relay_dlq as d
    where d.pipeline = relay_dlq_purge.pipeline
        and (older_than is null or d.last_failed_at < now() - older_than);
    get diagnostics v_purged = row_count;
    return v_purged;
end
$$;

comment on function pgtrickle.relay_dlq_purge(text, interval) is
    'Delete dead letters of a pipeline, all or those that failed last before a time; returns how many. Works for pipelines that are deleted too. Definer: dead letters are written by functions only.';

revoke all on function pgtrickle.relay_dlq_purge(text, interval) from public;

create or replace function pgtrickle.relay_dlq_stats()
returns table (
    pipeline text,
    direction text,
    entries bigint,
    retries_requested bigint,
    oldest_failed_at timestamptz,
    newest_failed_at timestamptz
)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select
        d.pipeline,
        max(d.direction),
        count(*),
        count(d.retry_requested_at),
        min(d.first_failed_at),
        max(d.last_failed_at)
    from pgtrickle.relay_dlq as d
    group by d.pipeline
    order by d.pipeline
$$;

comment on function pgtrickle.relay_dlq_stats() is
    'Number and age of dead letters, by pipeline. Definer: dead letters are read by functions only.';

revoke all on function pgtrickle.relay_dlq_stats() from public;

create or replace function pgtrickle.relay_dlq_take(
    p_relay_group_id text,
    p_pipeline text,
    p_max_rows integer
)
returns table (
    id bigint,
    dedup_key text,
    subject text,
    message_key text,
    op text,
    headers jsonb,
    payload bytea,
    metadata jsonb,
    error_kind text,
    error text,
    attempts integer
)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select
        d.id, d.dedup_key, d.subject, d.message_key, d.op, d.headers, d.payload, d.metadata,
        d.error_kind, d.error, d.attempts
    from pgtrickle.relay_dlq as d
    where d.relay_group_id = p_relay_group_id
        and d.pipeline = p_pipeline
        and d.retry_requested_at is not null
    order by d.id
    limit p_max_rows
$$;

comment on function pgtrickle.relay_dlq_take(text, text, integer) is
    'Dead letters that are to be sent again, oldest first. They stay requested until settled or failed: a crash repeats them. Definer: dead letters are read by functions only.';

revoke all on function pgtrickle.relay_dlq_take(text, text, integer) from public;

create or replace function pgtrickle.relay_dlq_settle(p_ids bigint[])
returns void
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
    delete from pgtrickle.relay_dlq as d where d.id = any (p_ids)
$$;

comment on function pgtrickle.relay_dlq_settle(bigint[]) is
    'These dead letters were delivered. Definer: dead letters are written by functions only.';

revoke all on function pgtrickle.relay_dlq_settle(bigint[]) from public;

create or replace function pgtrickle.relay_dlq_fail(
    p_ids bigint[],
    p_errors text[],
    p_attempts integer[]
)
returns void
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
    update pgtrickle.relay_dlq as d
    set
        attempts = d.attempts + 1,
        error = coalesce(f.error, d.error),
        last_failed_at = now(),
        retry_requested_at = null
    from unnest(p_ids, p_errors, p_attempts) as f (id, error, attempts)
    -- A webhook receiver runs in several relays, which may all have taken the same letter. Whoever
    -- is late must not take back what was asked for after the first of them.
    where d.id = f.id
        and d.retry_requested_at is not null
        and d.attempts = f.attempts
$$;

comment on function pgtrickle.relay_dlq_fail(bigint[], text[], integer[]) is
    'These dead letters failed again, which had failed so often when they were taken; of several relays that tried one, the first counts. Definer: dead letters are written by functions only.';

revoke all on function pgtrickle.relay_dlq_fail(bigint[], text[], integer[]) from public;

create or replace function pgtrickle.relay_dlq_put_back(p_ids bigint[])
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_pipelines text[];
begin
    with requested as (
        update pgtrickle.relay_dlq as d
        set retry_requested_at = now()
        where d.id = any (p_ids)
        returning d.pipeline
    )
    select array_agg(distinct r.pipeline) into v_pipelines from requested as r;
    perform pgtrickle.relay_dlq_notify(v_pipelines);
end
$$;

comment on function pgtrickle.relay_dlq_put_back(bigint[]) is
    'Send these dead letters again: what condemned them was an outage. Definer: dead letters are written by functions only.';

revoke all on function pgtrickle.relay_dlq_put_back(bigint[]) from public;
