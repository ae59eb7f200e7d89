-- Retention: nobody else sweeps an outbox on plain PostgreSQL.

create or replace function pgtrickle.relay_outbox_names(outbox_table text)
returns text[]
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select array_remove(
        array[
            c.outbox_table_name,
            c.stream_table_name,
            s.stream_schema || '.' || c.stream_table_name,
            quote_ident(s.stream_schema) || '.' || quote_ident(c.stream_table_name),
            t.relname,
            n.nspname || '.' || t.relname,
            quote_ident(n.nspname) || '.' || quote_ident(t.relname)
        ],
        null
    )
    from pgtrickle.pgt_outbox_config as c
    left join pgtrickle.relay_outbox_settings as s using (outbox_table_name)
    left join pg_class as t on t.oid = c.stream_table_oid::oid
    left join pg_namespace as n on n.oid = t.relnamespace
    where c.outbox_table_name = relay_outbox_names.outbox_table
$$;

comment on function pgtrickle.relay_outbox_names(text) is
    'All texts by which a pipeline or group may mean this outbox, also from before a rename.';

revoke all on function pgtrickle.relay_outbox_names(text) from public;

create or replace function pgtrickle.relay_outbox_readers(outbox_table text)
returns table (
    relay_group_id text,
    pipeline_id text,
    last_change_id bigint,
    start_gaps int8multirange
)
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    with pipelines as (
        select p.name, p.start_after_id, p.start_gaps, p.config -> 'source' ->> 'consumer_group' as group_name
        from pgtrickle.relay_outbox_config as p
        where p.config -> 'source' ->> 'outbox' = any (pgtrickle.relay_outbox_names(outbox_table))
    )
    select f.relay_group_id, p.name, coalesce(f.last_change_id, p.start_after_id),
        case when f.last_change_id is null then p.start_gaps else '{}' end
    from pipelines as p
    left join pgtrickle.relay_consumer_offsets as f
        on f.pipeline_id = p.name
        and f.outbox_table = relay_outbox_readers.outbox_table
    where p.group_name is null
    union all
    select null, p.name, 0, '{}'
    from pipelines as p
    where p.group_name is not null
        and not exists (
            select from pgtrickle.relay_groups as g where g.group_name = p.group_name
        )
    union all
    select null, g.group_name, g.watermark, '{}'
    from pgtrickle.relay_groups as g
    where g.outbox_table = relay_outbox_readers.outbox_table
$$;

comment on function pgtrickle.relay_outbox_readers(text) is
    'Who reads an outbox and how far they are: pipelines, enabled or not, in each relay group, and consumer groups. One that has not begun stands at its start.';

revoke all on function pgtrickle.relay_outbox_readers(text) from public;

create or replace function pgtrickle.relay_sweep_outbox(outbox_table text, max_rows integer default 1000)
returns bigint
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    retention interval;
    deleted_rows bigint;
    highest_id bigint;
begin
    -- An outbox of the extension has no settings of ours: the extension sweeps it.
    select make_interval(hours => c.retention_hours)
    into retention
    from pgtrickle.pgt_outbox_config as c
    join pgtrickle.relay_outbox_settings as s using (outbox_table_name)
    where c.outbox_table_name = outbox_table;
    if not found
        or not pg_try_advisory_xact_lock(hashtextextended('pgtrickle:sweep:' || outbox_table, 0))
    then
        return 0;
    end if;

    execute format(
        $sweep$
            with readers as materialized (
                select * from pgtrickle.relay_outbox_readers($1)
            ),
            oldest as (
                select o.id, o.created_at
                from pgtrickle.%1$I as o
                where o.id <= coalesce((select min(r.last_change_id) from readers as r), o.id)
                order by o.id
                limit $2
            ),
            swept as (
                delete from pgtrickle.%1$I as o
                using oldest as a
                where o.id = a.id
                    and a.created_at < now() - $3
                    and not exists (
                        select
                        from readers as r
                        where r.start_gaps @> a.id
                            -- Gaps of one reader are disjoint: the nearest one below decides.
                            or a.id <= (
                                select g.last_id
                                from pgtrickle.relay_pending_gaps as g
                                where g.relay_group_id = r.relay_group_id
                                    and g.pipeline_id = r.pipeline_id
                                    and g.first_id <= a.id
                                order by g.first_id desc
                                limit 1
                            )
                    )
                returning o.id
            )
            select count(*), max(s.id) from swept as s
        $sweep$,
        outbox_table
    ) into deleted_rows, highest_id using outbox_table, max_rows, retention;

    if deleted_rows > 0 then
        update pgtrickle.relay_outbox_settings as s
        set swept_through = greatest(s.swept_through, highest_id)
        where s.outbox_table_name = outbox_table;
        update pgtrickle.pgt_outbox_config as c
        set last_drained_at = now(), last_drained_count = deleted_rows
        where c.outbox_table_name = outbox_table;
    end if;
    return deleted_rows;
end
$$;

comment on function pgtrickle.relay_sweep_outbox(text, integer) is
    'Deletes up to max_rows rows that are past retention and behind every reader, and returns how many; 0 while another relay sweeps. Definer: readers may not delete.';

revoke all on function pgtrickle.relay_sweep_outbox(text, integer) from public;

create or replace function pgtrickle.relay_swept_outboxes()
returns setof text
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select s.outbox_table_name::text
    from pgtrickle.relay_outbox_settings as s
    join pgtrickle.pgt_outbox_config as c using (outbox_table_name)
    order by 1
$$;

comment on function pgtrickle.relay_swept_outboxes() is
    'The outboxes that relays sweep, whoever reads them: all but those of the extension. Definer: relays may not read the settings.';

revoke all on function pgtrickle.relay_swept_outboxes() from public;
