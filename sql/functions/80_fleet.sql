-- What the fleet of relays shows about itself.

create or replace function pgtrickle.relay_schema_version()
returns text
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select '0.29.0'
$$;

comment on function pgtrickle.relay_schema_version() is
    'Version of the relay catalog.';

revoke all on function pgtrickle.relay_schema_version() from public;

create or replace function pgtrickle.relay_report(
    p_relay_group_id text,
    p_worker_id text,
    p_report jsonb
)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    insert into pgtrickle.relay_workers as w
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
    delete from pgtrickle.relay_workers as w where w.last_seen_at < now() - interval '1 day';
end
$$;

comment on function pgtrickle.relay_report(text, text, jsonb) is
    'Heartbeat of one relay; host, pid and version are read from the report. Definer: the fleet is written by functions only.';

revoke all on function pgtrickle.relay_report(text, text, jsonb) from public;

create or replace function pgtrickle.relay_retire(p_relay_group_id text, p_worker_id text)
returns void
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
    delete from pgtrickle.relay_workers as w
    where w.relay_group_id = p_relay_group_id and w.worker_id = p_worker_id
$$;

comment on function pgtrickle.relay_retire(text, text) is
    'A relay leaves the fleet. Definer: the fleet is written by functions only.';

revoke all on function pgtrickle.relay_retire(text, text) from public;

create or replace function pgtrickle.relay_fleet(p_relay_group_id text default null)
returns table (
    relay_group_id text,
    worker_id text,
    host text,
    pid integer,
    version text,
    started_at timestamptz,
    last_seen_at timestamptz,
    is_alive boolean,
    report jsonb
)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select
        w.relay_group_id, w.worker_id, w.host, w.pid, w.version, w.started_at, w.last_seen_at,
        w.last_seen_at > now() - interval '15 seconds', w.report
    from pgtrickle.relay_workers as w
    where p_relay_group_id is null
        or w.relay_group_id = p_relay_group_id
    order by w.relay_group_id, w.worker_id
$$;

comment on function pgtrickle.relay_fleet(text) is
    'Relays, when they were last seen and what they report; alive: within 15 seconds. A webhook receiver is in the report of every relay, with what it did there. Definer: the fleet is read by functions only.';

revoke all on function pgtrickle.relay_fleet(text) from public;

create or replace function pgtrickle.relay_outbox_lag(
    p_outbox text,
    p_after_id bigint,
    out max_outbox_id bigint,
    out oldest_unsent_at timestamptz
)
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_outbox record;
begin
    select * into v_outbox from pgtrickle.relay_outbox(p_outbox);
    max_outbox_id := v_outbox.max_id;
    execute format(
        'select o.created_at from %s as o where o.id > $1 order by o.id limit 1',
        v_outbox.outbox_relation)
    into oldest_unsent_at
    using p_after_id;
exception
    -- One pipeline whose outbox is gone must not hide the lag of the others.
    when sqlstate 'RL003' or undefined_table then
        max_outbox_id := coalesce(p_after_id, 0);
end
$$;

comment on function pgtrickle.relay_outbox_lag(text, bigint) is
    'Highest visible id of an outbox and the age of the first row above a position.';

revoke all on function pgtrickle.relay_outbox_lag(text, bigint) from public;

create or replace function pgtrickle.relay_lag(relay_group_id text)
returns table (
    pipeline text,
    last_change_id bigint,
    max_outbox_id bigint,
    lag_rows bigint,
    oldest_unsent_at timestamptz,
    pending_gaps bigint,
    worker_id text,
    updated_at timestamptz
)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    with positions as (
        select
            c.name,
            c.config -> 'source' ->> 'outbox' as outbox,
            g.group_id,
            coalesce(pgtrickle.relay_group_low(g), o.last_change_id) as last_change_id,
            coalesce(pgtrickle.relay_group_low(g), o.last_change_id, c.start_after_id) as starts_after_id,
            o.worker_id,
            o.updated_at
        from pgtrickle.relay_outbox_config as c
        left join pgtrickle.relay_consumer_offsets as o
            on o.pipeline_id = c.name
            and o.relay_group_id = relay_lag.relay_group_id
        left join pgtrickle.relay_groups as g
            on g.group_name = c.config -> 'source' ->> 'consumer_group'
    )
    select
        p.name,
        p.last_change_id,
        l.max_outbox_id,
        greatest(l.max_outbox_id - p.starts_after_id, 0),
        l.oldest_unsent_at,
        case
            when p.group_id is null then (
                select count(*)
                from pgtrickle.relay_pending_gaps as a
                where a.relay_group_id = relay_lag.relay_group_id and a.pipeline_id = p.name)
            else (select count(*) from pgtrickle.relay_group_gaps as a where a.group_id = p.group_id)
        end,
        p.worker_id,
        p.updated_at
    from positions as p
    cross join lateral pgtrickle.relay_outbox_lag(p.outbox, p.starts_after_id) as l
    order by p.name
$$;

comment on function pgtrickle.relay_lag(text) is
    'How far each forward pipeline is behind its outbox. lag_rows is a distance of ids; pending gaps are not in it. Definer: positions are read by functions only.';

revoke all on function pgtrickle.relay_lag(text) from public;
