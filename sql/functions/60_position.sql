-- Positions of pipelines: who may write them, and writing them.
--
-- Each claim raises the epoch. A worker that lost its pipeline still has the old one, so that
-- whatever it writes late is refused (RL020) instead of moving the position under the new owner.

create or replace function @schema@.relay_pipeline_of(p_reader text) returns text
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    select regexp_replace(p_reader, '/[0-9]+$', '')
$$;
comment on function @schema@.relay_pipeline_of(text) is
    'Runs as its caller. The pipeline whose reader this is: orders of orders/3; the name itself where it is the only reader.';

create or replace function @schema@.relay_partitioning(p_config jsonb) returns jsonb
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    select case
        when p_config #>> '{source,consumer_group}' is null
            and p_config ->> 'partitions' ~ '^([2-9]|[1-5][0-9]|6[0-4])$'
        then jsonb_build_object(
            'partitions', (p_config ->> 'partitions')::integer, 'key_columns', p_config -> 'key_columns')
        else '{}'
    end
$$;
comment on function @schema@.relay_partitioning(jsonb) is
    'Runs as its caller. By what a pipeline deals keys to its readers: their number, and the columns that make the key; {} for one reader. Where two configurations differ in it, a key may have another reader.';

create or replace function @schema@.relay_reader_names(p_pipeline text, p_partitioning jsonb)
returns setof text
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    select p_pipeline where p_partitioning = '{}'
    union all
    select p_pipeline || '/' || n.number
    from generate_series(1, (p_partitioning ->> 'partitions')::integer) as n (number)
$$;
comment on function @schema@.relay_reader_names(text, jsonb) is
    'Runs as its caller. What the readers of a pipeline are called, by its partitioning.';

create or replace function @schema@.relay_place(
    p_relay_group_id text, p_pipeline text, p_outbox_table text, p_partitioning jsonb
) returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_readers text[];
    v_after_id bigint;
    v_gaps int8multirange;
    v_swept_through bigint;
begin
    select c.start_after_id, c.start_gaps into v_after_id, v_gaps
    from @schema@.relay_outbox_config as c
    where c.name = p_pipeline;
    -- Waits for a sweep that does not know of this position yet.
    select c.swept_through into v_swept_through
    from @schema@.pgt_outbox_config as c
    where c.outbox_table_name = p_outbox_table
    for share;
    if v_swept_through > coalesce(v_after_id, 0) then
        -- Transactions that were open when retention passed them are still read.
        v_gaps := coalesce(v_gaps, '{}') + int8multirange(int8range(coalesce(v_after_id, 0) + 1, v_swept_through, '[]'));
        v_after_id := v_swept_through;
    end if;

    with placed as (
        insert into @schema@.relay_consumer_offsets as o
            (relay_group_id, pipeline_id, partitioning, outbox_table, last_change_id)
        select p_relay_group_id, r.name, p_partitioning, p_outbox_table, coalesce(v_after_id, 0)
        from @schema@.relay_reader_names(p_pipeline, p_partitioning) as r (name)
        on conflict (relay_group_id, pipeline_id) do update
        set
            outbox_table = excluded.outbox_table,
            last_change_id = excluded.last_change_id,
            epoch = o.epoch + 1
        where o.outbox_table <> excluded.outbox_table
        returning o.pipeline_id
    )
    select array_agg(p.pipeline_id) into v_readers from placed as p;
    delete from @schema@.relay_pending_gaps as g
    where g.relay_group_id = p_relay_group_id and g.pipeline_id = any (v_readers);
    insert into @schema@.relay_pending_gaps (relay_group_id, pipeline_id, first_id, last_id)
    select p_relay_group_id, r.name, lower(g.gap), upper(g.gap) - 1
    from unnest(v_readers) as r (name)
    cross join unnest(v_gaps) as g (gap);
end
$$;
comment on function @schema@.relay_place(text, text, text, jsonb) is
    'Part of relay_claim: give every reader of a pipeline that has no position, or one in another outbox, the start of its pipeline, or what retention has left. All of them, since retention waits for each position that there is.';

create or replace function @schema@.relay_claim(
    p_relay_group_id text, p_pipeline text, p_outbox_table text, p_worker_id text,
    p_partitioning jsonb default '{}'
) returns table (epoch bigint, last_change_id bigint, gap_first_ids bigint[], gap_last_ids bigint[])
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    worker_id text not null := p_worker_id;
    partitioning jsonb not null := p_partitioning;
    v_pipeline text := @schema@.relay_pipeline_of(p_pipeline);
    v_bound text;
begin
    select c.outbox_table_name into v_bound from @schema@.relay_outbox_config as c where c.name = v_pipeline;
    if v_bound <> coalesce(p_outbox_table, '') then
        raise exception using
            errcode = 'RL020',
            message = format('pipeline "%s" was set again and reads outbox "%s", not %L', v_pipeline, v_bound, p_outbox_table),
            hint = 'Read its configuration again.';
    end if;
    perform
    from @schema@.relay_consumer_offsets as o
    where o.relay_group_id = p_relay_group_id
        and o.pipeline_id = p_pipeline
        and o.outbox_table is not distinct from p_outbox_table;
    if not found then
        perform @schema@.relay_place(p_relay_group_id, v_pipeline, p_outbox_table, p_partitioning);
    end if;
    perform
    from @schema@.relay_consumer_offsets as o
    where o.relay_group_id = p_relay_group_id and o.pipeline = v_pipeline and o.partitioning <> p_partitioning;
    if found then
        raise exception using
            errcode = 'RL020',
            message = format('the positions of pipeline "%s" are those of other readers: partitions or key_columns were changed',
                v_pipeline),
            hint = 'Relays bring them together by themselves, once all former readers have stopped.';
    end if;

    update @schema@.relay_consumer_offsets as o
    set epoch = o.epoch + 1, worker_id = p_worker_id, updated_at = now()
    where o.relay_group_id = p_relay_group_id and o.pipeline_id = p_pipeline
    returning o.epoch, o.last_change_id into epoch, last_change_id;

    select
        coalesce(array_agg(g.first_id order by g.first_id), '{}'),
        coalesce(array_agg(g.last_id order by g.first_id), '{}')
    into gap_first_ids, gap_last_ids
    from @schema@.relay_pending_gaps as g
    where g.relay_group_id = p_relay_group_id and g.pipeline_id = p_pipeline;
    return next;
end
$$;
comment on function @schema@.relay_claim(text, text, text, text, jsonb) is
    'Definer, since only functions write positions. Take the position of a pipeline, or of one of its readers: raises its epoch, so that the owner before can''t write it any more, and returns it with its pending gaps. Without an outbox (reverse pipelines) only the epoch counts. RL020 where the pipeline is bound to another outbox, or its positions are of another partitioning.';

create or replace function @schema@.relay_to_repartition(p_relay_group_id text) returns setof text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select distinct c.name
    from @schema@.relay_outbox_config as c
    join @schema@.relay_consumer_offsets as o on o.pipeline = c.name
    where o.relay_group_id = p_relay_group_id
        and o.partitioning <> @schema@.relay_partitioning(c.config)
$$;
comment on function @schema@.relay_to_repartition(text) is
    'Definer, since only functions read positions. The pipelines whose positions are of other readers than they have now.';

create or replace function @schema@.relay_repartition(
    p_relay_group_id text, p_pipeline text, p_partitioning jsonb, p_lock bigint
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_former record;
    v_gaps int8multirange;
begin
    -- A relay holds it, shared or not, as long as it runs a reader of this pipeline.
    if not pg_try_advisory_xact_lock(p_lock) then
        return false;
    end if;
    perform
    from @schema@.relay_outbox_config as c
    where c.name = p_pipeline and @schema@.relay_partitioning(c.config) = p_partitioning
    for share;
    if not found then
        return false;
    end if;

    perform
    from @schema@.relay_consumer_offsets as o
    where o.relay_group_id = p_relay_group_id and o.pipeline = p_pipeline
    order by o.pipeline_id
    for update;
    select min(o.last_change_id) as last_change_id, max(o.epoch) as epoch, max(o.outbox_table) as outbox_table
    into v_former
    from @schema@.relay_consumer_offsets as o
    where o.relay_group_id = p_relay_group_id and o.pipeline = p_pipeline
    having count(*) filter (where o.partitioning <> p_partitioning) > 0;
    if not found then
        return true;
    end if;

    select range_agg(int8range(g.first_id, least(g.last_id, v_former.last_change_id), '[]')) into v_gaps
    from @schema@.relay_pending_gaps as g
    join @schema@.relay_consumer_offsets as o using (relay_group_id, pipeline_id)
    where o.relay_group_id = p_relay_group_id
        and o.pipeline = p_pipeline
        and g.first_id <= v_former.last_change_id;
    perform @schema@.relay_forget_positions(p_pipeline, p_relay_group_id);
    insert into @schema@.relay_consumer_offsets
        (relay_group_id, pipeline_id, partitioning, outbox_table, last_change_id, epoch)
    select p_relay_group_id, r.name, p_partitioning, v_former.outbox_table, v_former.last_change_id, v_former.epoch + 1
    from @schema@.relay_reader_names(p_pipeline, p_partitioning) as r (name);
    insert into @schema@.relay_pending_gaps (relay_group_id, pipeline_id, first_id, last_id)
    select p_relay_group_id, r.name, lower(g.gap), upper(g.gap) - 1
    from @schema@.relay_reader_names(p_pipeline, p_partitioning) as r (name)
    cross join unnest(v_gaps) as g (gap);
    return true;
end
$$;
comment on function @schema@.relay_repartition(text, text, jsonb, bigint) is
    'Definer, since only functions write positions. Bring the readers of a pipeline to one position, below which none has anything left but in gaps, and give it to those of this partitioning, with epochs above all former ones. False, and nothing is done, while a relay holds the lock, or where the pipeline is partitioned otherwise by now.';

create or replace function @schema@.relay_forget_positions(
    p_pipeline text, p_relay_group_id text default null
) returns bigint
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_positions bigint;
begin
    delete from @schema@.relay_pending_gaps as g
    using @schema@.relay_consumer_offsets as o
    where o.pipeline = p_pipeline
        and (p_relay_group_id is null or o.relay_group_id = p_relay_group_id)
        and g.relay_group_id = o.relay_group_id
        and g.pipeline_id = o.pipeline_id;
    delete from @schema@.relay_consumer_offsets as o
    where o.pipeline = p_pipeline
        and (p_relay_group_id is null or o.relay_group_id = p_relay_group_id);
    get diagnostics v_positions = row_count;
    return v_positions;
end
$$;
comment on function @schema@.relay_forget_positions(text, text) is
    'Runs as its caller. Remove the positions and gaps of a pipeline, in one relay group or in all; returns how many positions it had.';

create or replace function @schema@.relay_commit(
    p_relay_group_id text, p_pipeline text, p_epoch bigint, p_last_change_id bigint,
    p_closed_first_ids bigint[] default '{}', p_opened_first_ids bigint[] default '{}',
    p_opened_last_ids bigint[] default '{}', p_is_reset boolean default false
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    last_change_id bigint not null := p_last_change_id;
    closed_first_ids bigint[] not null := p_closed_first_ids;
    opened_first_ids bigint[] not null := p_opened_first_ids;
    opened_last_ids bigint[] not null := p_opened_last_ids;
    is_reset boolean not null := p_is_reset;
    o @schema@.relay_consumer_offsets;
begin
    update @schema@.relay_consumer_offsets as r
    set
        last_change_id = case
            when p_is_reset then p_last_change_id
            else greatest(r.last_change_id, p_last_change_id)
        end,
        updated_at = now()
    where r.relay_group_id = p_relay_group_id
        and r.pipeline_id = p_pipeline
        and r.epoch = p_epoch;
    if not found then
        select r.* into o
        from @schema@.relay_consumer_offsets as r
        where r.relay_group_id = p_relay_group_id and r.pipeline_id = p_pipeline;
        raise exception using
            errcode = 'RL020',
            message = format('pipeline "%s" of relay group "%s" has another owner: %s', p_pipeline, p_relay_group_id, case
                when o.epoch is null then 'its position was deleted'
                else format('its position is at epoch %s, owned by %s, and this worker has epoch %s',
                    o.epoch, coalesce(o.worker_id, 'nobody'), coalesce(p_epoch::text, 'null'))
            end),
            hint = 'Stop this worker. What it has not committed is delivered again by the owner.';
    end if;

    if p_is_reset then
        delete from @schema@.relay_pending_gaps as g
        where g.relay_group_id = p_relay_group_id and g.pipeline_id = p_pipeline;
    elsif cardinality(p_closed_first_ids) > 0 then
        -- By the index: one condition for both would read all gaps.
        delete from @schema@.relay_pending_gaps as g
        where g.relay_group_id = p_relay_group_id
            and g.pipeline_id = p_pipeline
            and g.first_id = any (p_closed_first_ids);
    end if;
    if cardinality(p_opened_first_ids) > 0 then
        -- A commit whose answer was lost is repeated: its gaps are there already.
        insert into @schema@.relay_pending_gaps as g (relay_group_id, pipeline_id, first_id, last_id)
        select p_relay_group_id, p_pipeline, r.first_id, r.last_id
        from unnest(p_opened_first_ids, p_opened_last_ids) as r (first_id, last_id)
        on conflict (relay_group_id, pipeline_id, first_id) do update
        set last_id = excluded.last_id;
    end if;
end
$$;
comment on function @schema@.relay_commit(text, text, bigint, bigint, bigint[], bigint[], bigint[], boolean) is
    'Definer, since only functions write positions. Write position and gaps together: the position never goes back, gaps that begin at the closed ids go, the opened ranges come. A reset puts the position anywhere, also back, and removes all other gaps: the outbox was made again. RL020 where the epoch has moved on.';

create or replace function @schema@.relay_release(
    p_relay_group_id text, p_pipeline text, p_epoch bigint
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    update @schema@.relay_consumer_offsets as o
    set worker_id = null, updated_at = now()
    where o.relay_group_id = p_relay_group_id
        and o.pipeline_id = p_pipeline
        and o.epoch = p_epoch
$$;
comment on function @schema@.relay_release(text, text, bigint) is
    'Definer, since only functions write positions. Give up ownership; does nothing where it is lost already.';

create or replace function @schema@.relay_forget_group(relay_group_id text) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    relay_group_id text not null := relay_forget_group.relay_group_id;
    v_positions bigint;
begin
    if exists (
        select from @schema@.relay_fleet(relay_group_id) as f where f.is_alive
    ) then
        raise exception using
            errcode = 'RL024',
            message = format('relay group "%s" is at work', relay_group_id),
            hint = 'Stop its relays first: without its positions they would deliver everything again.';
    end if;
    delete from @schema@.relay_consumer_offsets as o
    where o.relay_group_id = relay_forget_group.relay_group_id;
    get diagnostics v_positions = row_count;
    delete from @schema@.relay_pending_gaps as g
    where g.relay_group_id = relay_forget_group.relay_group_id;
    delete from @schema@.relay_cursors as c
    where c.relay_group_id = relay_forget_group.relay_group_id;
    delete from @schema@.relay_seeks as s
    where s.relay_group_id = relay_forget_group.relay_group_id;
    update @schema@.relay_groups as g
    set relay_group_id = null
    where g.relay_group_id = relay_forget_group.relay_group_id;
    return v_positions;
end
$$;
comment on function @schema@.relay_forget_group(text) is
    'Definer, since only functions write positions. Remove positions, gaps and cursors of a relay group that is gone, so that it holds back no retention, and return how many positions it had. Its consumer groups and dead letters stay, the former for another relay group. RL024 while one of its relays lives.';

create or replace function @schema@.relay_cursor_get(
    p_relay_group_id text, p_pipeline text, p_cursor_key text
) returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select c.position
    from @schema@.relay_cursors as c
    where c.relay_group_id = p_relay_group_id
        and c.pipeline_id = p_pipeline
        and c.cursor_key = p_cursor_key
$$;
comment on function @schema@.relay_cursor_get(text, text, text) is
    'Definer, since only functions read positions. Position that a source keeps for itself; null where there is none.';

create or replace function @schema@.relay_cursor_set(
    p_relay_group_id text, p_pipeline text, p_epoch bigint, p_cursor_key text, p_cursor jsonb
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    -- Refused where ownership is lost; else a claim waits until the cursor is written.
    select @schema@.relay_commit(p_relay_group_id, p_pipeline, p_epoch, 0);
    insert into @schema@.relay_cursors as c (relay_group_id, pipeline_id, cursor_key, position)
    values (p_relay_group_id, p_pipeline, p_cursor_key, p_cursor)
    on conflict (relay_group_id, pipeline_id, cursor_key) do update
    set position = excluded.position, updated_at = now()
$$;
comment on function @schema@.relay_cursor_set(text, text, bigint, text, jsonb) is
    'Definer, since only functions write positions. Write a position that a source keeps for itself. RL020 where the epoch has moved on.';
