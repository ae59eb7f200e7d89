-- Retention: nobody else sweeps an outbox.

create or replace function @schema@.relay_outbox_readers(p_outbox_table text)
returns table (
    relay_group_id text, pipeline_id text, group_id bigint, reads_above bigint,
    start_gaps int8multirange
)
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select
        o.relay_group_id, coalesce(o.pipeline_id, c.name), null::bigint, coalesce(o.last_change_id, c.start_after_id),
        case when o.last_change_id is null then c.start_gaps else '{}' end
    from @schema@.relay_outbox_config as c
    left join @schema@.relay_consumer_offsets as o
        on o.pipeline = c.name and o.outbox_table = c.outbox_table_name
    where c.outbox_table_name = p_outbox_table
        and c.config #>> '{source,consumer_group}' is null
    union all
    select
        null, null, g.group_id,
        least(
            g.frontier,
            (select min(l.outbox_ids[1]) - 1
             from @schema@.relay_group_leases as l where l.group_id = g.group_id),
            (select min(r.outbox_id) - 1
             from @schema@.relay_group_returned as r where r.group_id = g.group_id)),
        '{}'
    from @schema@.relay_groups as g
    where g.outbox_table_name = p_outbox_table
    union all
    select null, c.name, null, 0, '{}'
    from @schema@.relay_outbox_config as c
    where c.outbox_table_name = p_outbox_table
        and c.config #>> '{source,consumer_group}' is not null
        and not exists (
            select from @schema@.relay_groups as g
            where g.group_name = c.config #>> '{source,consumer_group}')
$$;
comment on function @schema@.relay_outbox_readers(text) is
    'Who reads an outbox, and above which id, its pending gaps aside: pipelines, enabled or not, each of their readers in each relay group, and consumer groups. One that has not begun stands at its start; a pipeline whose group was dropped, at the first row.';

create or replace function @schema@.relay_sweep_outbox(
    outbox_table text, max_rows integer default 1000
) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    swept_table text not null := relay_sweep_outbox.outbox_table;
    batch_rows integer not null := relay_sweep_outbox.max_rows;
    v_outbox record;
    v_deleted_rows bigint;
    v_highest_id bigint;
    v_created_at timestamptz;
    v_adopted_ids bigint[];
begin
    -- One sweeper at a time; what another one holds is left to it.
    perform
    from @schema@.pgt_outbox_config as c
    where c.outbox_table_name = swept_table
        and coalesce((c.adopted ->> 'delete_delivered')::boolean, true)
    for no key update skip locked;
    if not found then
        return 0;
    end if;
    select * into v_outbox from @schema@.relay_outbox_of(swept_table);

    -- One statement, so that a row is seen in exactly one place, whoever moves it meanwhile: ahead
    -- of a reader, in one of its gaps, in the hands of a consumer, released, or settled.
    execute format(
        $sweep$
        with readers as materialized (
            select * from %1$I.relay_outbox_readers($1)
        ), oldest as materialized (
            select o.id, o.created_at
            from %2$s as o
            where o.id <= (select coalesce(min(r.reads_above), $4) from readers as r)
            order by o.id
            limit $2
        ), swept as (
            %3$s oldest as a
            where o.id = a.id
                and coalesce(a.created_at, '-infinity') < now() - $3
                -- Gaps of one reader are disjoint: the nearest one below decides.
                and not exists (
                    select
                    from readers as r
                    where r.start_gaps @> a.id
                        or a.id <= (
                            select g.last_id
                            from %1$I.relay_pending_gaps as g
                            where g.relay_group_id = r.relay_group_id
                                and g.pipeline_id = r.pipeline_id
                                and g.first_id <= a.id
                            order by g.first_id desc
                            limit 1)
                        or a.id <= (
                            select g.last_id
                            from %1$I.relay_group_gaps as g
                            where g.group_id = r.group_id and g.first_id <= a.id
                            order by g.first_id desc
                            limit 1))
            %4$s
        )
        select count(*), max(s.id), max(s.created_at), array_agg(s.id) filter (where $4 = 0) from swept as s
        $sweep$,
        @schema_name@,
        @schema@.relay_rows(v_outbox.outbox_relation, 'max_rows => $2'),
        case when v_outbox.is_adopted then 'select o.id, o.created_at from oldest as o,'
            else format('delete from %s as o using', v_outbox.outbox_relation) end,
        case when not v_outbox.is_adopted then format(
            'returning o.id, o.created_at), swept_deltas as (delete from %s as d using swept as s where d.outbox_id = s.id',
            v_outbox.delta_relation) end)
    into v_deleted_rows, v_highest_id, v_created_at, v_adopted_ids
    -- What nobody reads is kept where it belongs to somebody else: it is not delivered.
    using swept_table, batch_rows, make_interval(hours => v_outbox.retention_hours),
        case when v_outbox.is_adopted then 0 else 9223372036854775807 end;

    if v_deleted_rows > 0 then
        if v_outbox.is_adopted then
            perform @schema@.relay_sweep_adopted(swept_table, v_adopted_ids);
        end if;
        update @schema@.pgt_outbox_config as c
        set
            swept_through = greatest(c.swept_through, v_highest_id),
            swept_created_at = greatest(c.swept_created_at, v_created_at),
            last_drained_at = now(),
            last_drained_count = v_deleted_rows
        where c.outbox_table_name = swept_table;
    end if;
    return v_deleted_rows;
end
$$;
comment on function @schema@.relay_sweep_outbox(text, integer) is
    'Definer, since readers may not delete. Deletes up to max_rows rows, with their delta rows, that are past retention and behind every reader, and returns how many; 0 while another relay sweeps.';

create or replace function @schema@.relay_swept_outboxes() returns setof text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select c.outbox_table_name::text from @schema@.pgt_outbox_config as c order by 1
$$;
comment on function @schema@.relay_swept_outboxes() is
    'Definer, since relays may not read the settings. The outboxes that relays sweep, whoever reads them.';
