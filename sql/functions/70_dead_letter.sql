-- Dead letters: messages that could not be delivered, kept with all that sending them again takes.
--
-- What is to be sent again stands in a table of its own: asking for it rewrites no letter.

create or replace function @schema@.relay_dead_letter(
    p_relay_group_id text, p_pipeline text, p_direction text, p_dedup_keys text[],
    p_subjects text[], p_message_keys text[], p_ops text[], p_headers jsonb[], p_payloads bytea[],
    p_metadata jsonb[], p_error_kinds text[], p_errors text[], p_attempts integer[]
) returns bigint[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_pipeline text := @schema@.relay_pipeline_of(p_pipeline);
    v_ids bigint[];
begin
    if num_nulls(
        p_dedup_keys, p_subjects, p_message_keys, p_ops, p_headers, p_payloads, p_metadata,
        p_error_kinds, p_errors, p_attempts) > 0
    then
        raise exception using
            errcode = '22004',
            message = 'a list of what the dead letters consist of is null',
            hint = 'Single subjects, keys, headers and payloads may be null, whole lists may not.';
    end if;
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
        insert into @schema@.relay_dlq as d (
            relay_group_id, pipeline, direction, dedup_key, subject, message_key, op, headers,
            payload, metadata, key_hash, error_kind, error, attempts
        )
        select
            p_relay_group_id, v_pipeline, p_direction, l.dedup_key, l.subject, l.message_key, l.op,
            coalesce(l.headers, '{}'), l.payload, coalesce(l.metadata, '{}'),
            coalesce((l.metadata ->> 'key_hash')::bigint, 0), l.error_kind, l.error, coalesce(l.attempts, 1)
        from latest as l
        order by l.place
        on conflict (relay_group_id, pipeline, md5(dedup_key)) do update
        set
            error_kind = excluded.error_kind,
            error = excluded.error,
            attempts = d.attempts + excluded.attempts,
            last_failed_at = now()
        returning d.id, d.dedup_key
    ), not_again as (
        delete from @schema@.relay_dlq_retries as r
        using written as w
        where r.relay_group_id = p_relay_group_id and r.pipeline = v_pipeline and r.id = w.id
    )
    select coalesce(array_agg(w.id order by l.place), '{}') into v_ids
    from letters as l
    join written as w using (dedup_key);
    return v_ids;
end
$$;
comment on function @schema@.relay_dead_letter(text, text, text, text[], text[], text[], text[], jsonb[], bytea[], jsonb[], text[], text[], integer[]) is
    'Definer, since only functions write dead letters. Store messages that can''t be delivered and return their entries'' ids, in order. A message that is there already gets no second entry: its attempts add up. Those of a reader (orders/3) are its pipeline''s.';

create or replace function @schema@.relay_dlq_list(
    name text default null, limit_rows integer default 100, newest_first boolean default false
) returns table (
    id bigint, relay_group_id text, pipeline text, direction text, dedup_key text, subject text,
    message_key text, op text, headers jsonb, payload bytea, metadata jsonb, error_kind text,
    error text, attempts integer, first_failed_at timestamptz, last_failed_at timestamptz,
    retry_requested_at timestamptz
)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select
        d.id, d.relay_group_id, d.pipeline, d.direction, d.dedup_key, d.subject, d.message_key,
        d.op, d.headers, d.payload, d.metadata, d.error_kind, d.error, d.attempts,
        d.first_failed_at, d.last_failed_at, r.requested_at
    from (
        (
            select o.*
            from @schema@.relay_dlq as o
            where not newest_first and (name is null or o.pipeline = name)
            order by o.id
            limit limit_rows
        )
        union all
        (
            select n.*
            from @schema@.relay_dlq as n
            where newest_first and (name is null or n.pipeline = name)
            order by n.id desc
            limit limit_rows
        )
    ) as d
    left join @schema@.relay_dlq_retries as r using (relay_group_id, pipeline, id)
    order by case when newest_first then -d.id else d.id end
$$;
comment on function @schema@.relay_dlq_list(text, integer, boolean) is
    'Definer, since only functions read dead letters. Those of one pipeline, or of all, oldest first unless newest_first. A payload that is text reads as convert_from(payload, ''UTF8'').';

create or replace function @schema@.relay_dlq_put_back(p_ids bigint[], p_pipeline text default null)
returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    ids bigint[] not null := case when p_pipeline is null then p_ids else '{}' end;
    v_letters bigint;
    v_pipelines text[];
begin
    select count(*), array_agg(distinct d.pipeline) into v_letters, v_pipelines
    from @schema@.relay_dlq as d
    where d.id = any (ids) or d.pipeline = p_pipeline;
    insert into @schema@.relay_dlq_retries (relay_group_id, pipeline, id)
    select d.relay_group_id, d.pipeline, d.id
    from @schema@.relay_dlq as d
    left join @schema@.relay_dlq_retries as r using (relay_group_id, pipeline, id)
    where (d.id = any (ids) or d.pipeline = p_pipeline) and r.requested_at is null
    on conflict do nothing;
    perform pg_notify(
        @schema@.relay_channel('pgtrickle_relay_config'),
        json_build_object(
            'direction', case n.direction
                when 'forward' then 'relay_outbox_config' else 'relay_inbox_config'
            end,
            'event', 'RETRY',
            'name', n.name,
            'enabled', true)::text)
    from @schema@.relay_pipeline_names as n
    where n.name = any (v_pipelines);
    return v_letters;
end
$$;
comment on function @schema@.relay_dlq_put_back(bigint[], text) is
    'Definer, since only functions write dead letters. Ask for these, or for all of a pipeline, to be sent again and wake the relays; returns how many of them are there.';

create or replace function @schema@.relay_dlq_retry(id bigint) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    id bigint not null := relay_dlq_retry.id;
begin
    if @schema@.relay_dlq_put_back(array[id]) = 0 then
        raise exception using
            errcode = 'RL040',
            message = format('there is no dead letter %s: it was delivered or purged, or never existed', id),
            hint = format('select id, pipeline, error from %I.relay_dlq_list();', @schema_name@);
    end if;
end
$$;
comment on function @schema@.relay_dlq_retry(bigint) is
    'Definer, since only functions write dead letters. Ask for one to be sent again, through its pipeline and with its deduplication key.';

create or replace function @schema@.relay_dlq_retry_all(pipeline text) returns bigint
language sql volatile security invoker as $$
    select @schema@.relay_dlq_put_back(null, (@schema@.relay_find_pipeline(pipeline)).name)
$$;
comment on function @schema@.relay_dlq_retry_all(text) is
    'Ask for all of a pipeline to be sent again; returns how many. Those that were asked for before are not touched.';

create or replace function @schema@.relay_dlq_purge(pipeline text, older_than interval default null)
returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    pipeline text not null := relay_dlq_purge.pipeline;
    v_ids bigint[];
begin
    v_ids := array(
        select d.id
        from @schema@.relay_dlq as d
        where d.pipeline = relay_dlq_purge.pipeline
            and (older_than is null or d.last_failed_at < now() - older_than));
    perform @schema@.relay_dlq_settle(v_ids);
    return cardinality(v_ids);
end
$$;
comment on function @schema@.relay_dlq_purge(text, interval) is
    'Definer, since only functions write dead letters. Delete those of a pipeline, all or those that failed last before a time; returns how many. Works for pipelines that are deleted too.';

create or replace function @schema@.relay_dlq_share(
    p_reader text, out pipeline text, out readers bigint, out rest bigint
)
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select
        @schema@.relay_pipeline_of(p_reader),
        coalesce(
            (select (@schema@.relay_partitioning(c.config) ->> 'partitions')::bigint
             from @schema@.relay_outbox_config as c
             where n.number is not null and c.name = @schema@.relay_pipeline_of(p_reader)),
            1),
        coalesce(n.number - 1, 0)
    from (select substring(p_reader from '/([0-9]{1,9})$')::bigint) as n (number)
$$;
comment on function @schema@.relay_dlq_share(text) is
    'Part of relay_dlq_take and relay_dlq_stats: which dead letters are a reader''s, those of the pipeline whose key_hash leaves this rest; all of them where there is one reader.';

create or replace function @schema@.relay_dlq_stats(
    pipelines text[] default null, at_most bigint default null
) returns table (
    pipeline text, direction text, entries bigint, retries_requested bigint,
    oldest_failed_at timestamptz, newest_failed_at timestamptz
)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select p.name, d.direction, d.entries, r.requested, d.oldest_failed_at, d.newest_failed_at
    from unnest(coalesce(pipelines, array(select distinct a.pipeline from @schema@.relay_dlq as a))) as p (name)
    cross join lateral @schema@.relay_dlq_share(p.name) as s
    cross join lateral (
        select
            max(a.direction) as direction,
            count(*) as entries,
            min(a.first_failed_at) as oldest_failed_at,
            max(a.last_failed_at) as newest_failed_at
        from (
            select o.direction, o.first_failed_at, o.last_failed_at
            from @schema@.relay_dlq as o
            where o.pipeline = s.pipeline
                and (s.readers = 1 and s.rest = 0 or exists (
                    select from @schema@.relay_dlq as l where l.id = o.id and l.key_hash % s.readers = s.rest))
            limit at_most
        ) as a
    ) as d
    cross join lateral (
        select count(*) as requested
        from (
            select
            from @schema@.relay_dlq_retries as o
            where o.pipeline = s.pipeline
                and (s.readers = 1 and s.rest = 0 or exists (
                    select from @schema@.relay_dlq as l where l.id = o.id and l.key_hash % s.readers = s.rest))
            limit at_most
        ) as a
    ) as r
    where d.entries > 0
    order by p.name
$$;
comment on function @schema@.relay_dlq_stats(text[], bigint) is
    'Definer, since only functions read dead letters. Their number and age, by pipeline: of these pipelines, or of all. Of a reader (orders/3) those that it sends again. With at_most it looks at so many of each pipeline at most, and costs no more however many there are.';

create or replace function @schema@.relay_dlq_take(
    p_relay_group_id text, p_pipeline text, p_max_rows integer, p_seconds integer default 0
) returns setof @schema@.relay_dlq
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    with free as (
        select r.id
        from @schema@.relay_dlq_share(p_pipeline) as s
        join @schema@.relay_dlq_retries as r using (pipeline)
        where r.relay_group_id = p_relay_group_id
            and (s.readers = 1 and s.rest = 0 or exists (
                select from @schema@.relay_dlq as l where l.id = r.id and l.key_hash % s.readers = s.rest))
            and (r.taken_until is null or r.taken_until <= clock_timestamp())
        order by r.id
        limit p_max_rows
        for update of r skip locked
    ), taken as (
        update @schema@.relay_dlq_retries as r
        set taken_until = clock_timestamp() + make_interval(secs => p_seconds)
        from free as f
        where r.relay_group_id = p_relay_group_id and r.pipeline = @schema@.relay_pipeline_of(p_pipeline) and r.id = f.id
        returning r.relay_group_id, r.pipeline, r.id
    )
    select d.*
    from taken as t
    join @schema@.relay_dlq as d using (relay_group_id, pipeline, id)
    order by d.id
$$;
comment on function @schema@.relay_dlq_take(text, text, integer, integer) is
    'Definer, since only functions write dead letters. Those that are to be sent again, oldest first; for so many seconds nobody else takes them. They stay requested until settled or failed: a crash repeats them.';

create or replace function @schema@.relay_dlq_settle(p_ids bigint[]) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    with settled as (
        delete from @schema@.relay_dlq as d
        where d.id = any (p_ids)
        returning d.relay_group_id, d.pipeline, d.id
    )
    delete from @schema@.relay_dlq_retries as r
    using settled as s
    where r.relay_group_id = s.relay_group_id and r.pipeline = s.pipeline and r.id = s.id
$$;
comment on function @schema@.relay_dlq_settle(bigint[]) is
    'Definer, since only functions write dead letters. These were delivered.';

create or replace function @schema@.relay_dlq_fail(
    p_ids bigint[], p_errors text[], p_attempts integer[]
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    -- Whoever is late, and whose lease went to another meanwhile, must not take back what was asked
    -- for after that one.
    with failed as (
        update @schema@.relay_dlq as d
        set
            attempts = d.attempts + 1,
            error = coalesce(f.error, d.error),
            last_failed_at = now()
        from unnest(p_ids, p_errors, p_attempts) as f (id, error, attempts)
        where d.id = f.id
            and d.attempts = f.attempts
            and exists (
                select
                from @schema@.relay_dlq_retries as r
                where r.relay_group_id = d.relay_group_id
                    and r.pipeline = d.pipeline
                    and r.id = d.id)
        returning d.relay_group_id, d.pipeline, d.id
    )
    delete from @schema@.relay_dlq_retries as r
    using failed as f
    where r.relay_group_id = f.relay_group_id and r.pipeline = f.pipeline and r.id = f.id
$$;
comment on function @schema@.relay_dlq_fail(bigint[], text[], integer[]) is
    'Definer, since only functions write dead letters. These failed again, which had failed so often when they were taken; of several relays that tried one, the first counts.';
