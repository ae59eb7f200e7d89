-- What the fleet of relays shows about itself.

create or replace function @schema@.relay_schema_version() returns text
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    select '0.29.0'
$$;
comment on function @schema@.relay_schema_version() is 'Version of the relay catalog.';

create or replace function @schema@.relay_report(
    p_relay_group_id text, p_worker_id text, p_report jsonb
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    insert into @schema@.relay_workers as w
        (relay_group_id, worker_id, host, pid, version, report)
    values (
        p_relay_group_id,
        p_worker_id,
        p_report ->> 'host',
        case when p_report ->> 'pid' ~ '^[0-9]{1,9}$' then (p_report ->> 'pid')::integer end,
        p_report ->> 'version',
        p_report
    )
    on conflict (relay_group_id, worker_id) do update
    set
        host = excluded.host,
        pid = excluded.pid,
        version = excluded.version,
        last_seen_at = now(),
        report = excluded.report;
    -- Relays that were killed.
    delete from @schema@.relay_workers as w where w.last_seen_at < now() - interval '1 day';
    delete from @schema@.relay_group_consumers as c
    where c.last_heartbeat_at < now() - interval '1 day'
        and not exists (
            select from @schema@.relay_group_leases as l
            where l.group_id = c.group_id and l.consumer_id = c.consumer_id)
$$;
comment on function @schema@.relay_report(text, text, jsonb) is
    'Definer, since only functions write the fleet. Heartbeat of one relay; host, pid and version are read from the report.';

create or replace function @schema@.relay_retire(p_relay_group_id text, p_worker_id text)
returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    delete from @schema@.relay_workers as w
    where w.relay_group_id = p_relay_group_id and w.worker_id = p_worker_id
$$;
comment on function @schema@.relay_retire(text, text) is
    'Definer, since only functions write the fleet. A relay leaves it.';

create or replace function @schema@.relay_fleet(p_relay_group_id text default null)
returns table (
    relay_group_id text, worker_id text, host text, pid integer, version text,
    started_at timestamptz, last_seen_at timestamptz, is_alive boolean, report jsonb
)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select
        w.relay_group_id, w.worker_id, w.host, w.pid, w.version, w.started_at, w.last_seen_at,
        w.last_seen_at > now() - interval '15 seconds', w.report
    from @schema@.relay_workers as w
    where p_relay_group_id is null
        or w.relay_group_id = p_relay_group_id
    order by w.relay_group_id, w.worker_id
$$;
comment on function @schema@.relay_fleet(text) is
    'Definer, since only functions read the fleet. Relays, when they were last seen and what they report; alive: within 15 seconds. A webhook receiver is in the report of every relay, with what it did there.';

create or replace function @schema@.relay_outbox_lag(p_outbox_table text, p_positions bigint[])
returns table (reads_above bigint, max_id bigint, oldest_unsent_at timestamptz)
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_outbox record;
begin
    select * into v_outbox from @schema@.relay_outbox_of(p_outbox_table);
    return query execute format(
        $query$
        select
            p.position,
            $1,
            (select o.created_at from %s as o where o.id > p.position order by o.id limit 1)
        from unnest($2) as p (position)
        $query$, @schema@.relay_rows(v_outbox.outbox_relation, 'above => p.position, max_rows => 1'))
    using v_outbox.max_id, p_positions;
exception
    -- One pipeline whose outbox is gone must not hide the lag of the others.
    when sqlstate 'RL003' or sqlstate 'RL005' or undefined_table then
        return;
end
$$;
comment on function @schema@.relay_outbox_lag(text, bigint[]) is
    'Highest visible id of an outbox and the age of the first row above each position; nothing where it is gone.';

create or replace function @schema@.relay_lag(relay_group_id text, pipelines text[] default null)
returns table (
    pipeline text, last_change_id bigint, max_outbox_id bigint, lag_rows bigint,
    oldest_unsent_at timestamptz, pending_gaps bigint, worker_id text, updated_at timestamptz
)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    with positions as materialized (
        select
            r.name,
            c.outbox_table_name,
            g.group_id,
            coalesce(g.watermark, o.last_change_id) as last_change_id,
            coalesce(
                g.watermark,
                o.last_change_id,
                -- Its readers are others now, and begin together.
                (select min(f.last_change_id)
                 from @schema@.relay_consumer_offsets as f
                 where f.pipeline = c.name and f.relay_group_id = relay_lag.relay_group_id),
                c.start_after_id) as reads_above,
            o.worker_id,
            o.updated_at
        from @schema@.relay_outbox_config as c
        cross join lateral @schema@.relay_reader_names(c.name, @schema@.relay_partitioning(c.config)) as r (name)
        left join @schema@.relay_consumer_offsets as o
            on o.pipeline_id = r.name and o.relay_group_id = relay_lag.relay_group_id
        left join lateral (
            select f.*
            from @schema@.relay_groups as r
            cross join lateral @schema@.relay_group_find(r.group_name, false) as f
            where r.group_name = c.config #>> '{source,consumer_group}'
        ) as g on true
        where pipelines is null or c.name = any (pipelines) or r.name = any (pipelines)
    ), outboxes as materialized (
        select d.outbox_table_name, l.*
        from (
            select p.outbox_table_name, array_agg(distinct p.reads_above) as positions
            from positions as p
            where p.outbox_table_name is not null
            group by p.outbox_table_name
        ) as d
        cross join lateral @schema@.relay_outbox_lag(d.outbox_table_name, d.positions) as l
    )
    select
        p.name,
        p.last_change_id,
        l.max_id,
        case when l.max_id is not null then greatest(l.max_id - p.reads_above, 0) end,
        l.oldest_unsent_at,
        case
            when p.group_id is null then (
                select count(*)
                from @schema@.relay_pending_gaps as a
                where a.relay_group_id = relay_lag.relay_group_id and a.pipeline_id = p.name)
            else (select count(*) from @schema@.relay_group_gaps as a where a.group_id = p.group_id)
        end,
        p.worker_id,
        p.updated_at
    from positions as p
    left join outboxes as l using (outbox_table_name, reads_above)
    order by p.name
$$;
comment on function @schema@.relay_lag(text, text[]) is
    'Definer, since only functions read positions. How far the readers of these forward pipelines, these readers, or all, are behind their outboxes: one line for each reader. lag_rows is a distance of ids, null where the outbox is gone; pending gaps are not in it.';

create or replace function @schema@.relay_delivered(
    relay_group_id text, pipeline text, outbox_id bigint
) returns table (is_settled boolean, dead_letters bigint)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select
        bool_and(case
            when g.group_id is null then
                coalesce(o.last_change_id >= relay_delivered.outbox_id, false)
                and not exists (
                    select from @schema@.relay_pending_gaps as a
                    where a.relay_group_id = o.relay_group_id and a.pipeline_id = o.pipeline_id
                        and relay_delivered.outbox_id between a.first_id and a.last_id)
            else
                g.frontier >= relay_delivered.outbox_id
                and not exists (
                    select from @schema@.relay_group_gaps as a
                    where a.group_id = g.group_id and relay_delivered.outbox_id between a.first_id and a.last_id)
                and not exists (
                    select from @schema@.relay_group_leases as a
                    where a.group_id = g.group_id and relay_delivered.outbox_id = any (a.outbox_ids))
                and not exists (
                    select from @schema@.relay_group_returned as a
                    where a.group_id = g.group_id and a.outbox_id = relay_delivered.outbox_id)
        end),
        (select count(*) from @schema@.relay_dlq as d
         where d.relay_group_id = relay_delivered.relay_group_id and d.pipeline = c.name
            and d.metadata ->> 'outbox_id' = relay_delivered.outbox_id::text)
    from @schema@.relay_outbox_config as c
    cross join lateral @schema@.relay_reader_names(c.name, @schema@.relay_partitioning(c.config)) as r (name)
    left join @schema@.relay_consumer_offsets as o
        on o.pipeline_id = r.name and o.relay_group_id = relay_delivered.relay_group_id
    left join @schema@.relay_groups as g on g.group_name = c.config #>> '{source,consumer_group}'
    where c.name = relay_delivered.pipeline
    group by c.name
$$;
comment on function @schema@.relay_delivered(text, text, bigint) is
    'Definer, since only functions read positions. Whether all readers of a forward pipeline are done with a row of its outbox, and how many dead letters of that row there are; nothing where there is no such pipeline. An id that holds no row is done with as soon as it is known that none comes.';
