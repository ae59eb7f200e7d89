-- Positions of pipelines: who may write them, and writing them.
--
-- Each claim raises the epoch. A worker that lost its pipeline still has the old one, so that
-- whatever it writes late is refused (RL020) instead of moving the position under the new owner.

create or replace function @schema@.relay_claim(
    p_relay_group_id text,
    p_pipeline text,
    p_outbox_table text,
    p_worker_id text
)
returns table (
    epoch bigint,
    last_change_id bigint,
    gap_first_ids bigint[],
    gap_last_ids bigint[],
    is_new boolean
)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    worker_id text not null := p_worker_id;
    v_config @schema@.relay_outbox_config;
    v_outbox_table text;
begin
    select c.* into v_config from @schema@.relay_outbox_config as c where c.name = p_pipeline;
    if v_config.outbox_table_name <> coalesce(p_outbox_table, '') then
        raise exception using
            errcode = 'RL020',
            message = format('pipeline "%s" reads outbox "%s", not %L',
                p_pipeline, v_config.outbox_table_name, p_outbox_table),
            detail = 'It was set again meanwhile.',
            hint = 'Read its configuration again.';
    end if;
    insert into @schema@.relay_consumer_offsets (relay_group_id, pipeline_id, outbox_table)
    values (p_relay_group_id, p_pipeline, p_outbox_table)
    on conflict (relay_group_id, pipeline_id) do nothing;
    is_new := found;

    select o.outbox_table into v_outbox_table
    from @schema@.relay_consumer_offsets as o
    where o.relay_group_id = p_relay_group_id and o.pipeline_id = p_pipeline
    for update;
    if is_new or v_outbox_table <> p_outbox_table then
        -- A new position starts where its pipeline starts.
        is_new := true;
        update @schema@.relay_consumer_offsets as o
        set outbox_table = p_outbox_table, last_change_id = coalesce(v_config.start_after_id, 0)
        where o.relay_group_id = p_relay_group_id and o.pipeline_id = p_pipeline;
        delete from @schema@.relay_pending_gaps as g
        where g.relay_group_id = p_relay_group_id and g.pipeline_id = p_pipeline;
        insert into @schema@.relay_pending_gaps (relay_group_id, pipeline_id, first_id, last_id)
        select p_relay_group_id, p_pipeline, lower(r.gap), upper(r.gap) - 1
        from unnest(v_config.start_gaps) as r (gap);
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

comment on function @schema@.relay_claim(text, text, text, text) is
    'Definer, since only functions write positions. Take a pipeline''s position: raises its epoch, so that the owner before can''t write it any more, and returns it with its pending gaps. Without an outbox (reverse pipelines) only the epoch counts. RL020 where the pipeline is bound to another outbox.';

create or replace function @schema@.relay_commit(
    p_relay_group_id text,
    p_pipeline text,
    p_epoch bigint,
    p_last_change_id bigint,
    p_closed_first_ids bigint[] default '{}',
    p_opened_first_ids bigint[] default '{}',
    p_opened_last_ids bigint[] default '{}',
    p_is_reset boolean default false
)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
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
            message = format('pipeline "%s" of relay group "%s" has another owner',
                p_pipeline, p_relay_group_id),
            detail = case
                when o.epoch is null then 'Its position was deleted.'
                else format('The position is at epoch %s, owned by %s; this worker has epoch %s.',
                    o.epoch, coalesce(o.worker_id, 'nobody'), coalesce(p_epoch::text, 'null'))
            end,
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
    p_relay_group_id text,
    p_pipeline text,
    p_epoch bigint
)
returns void
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
    update @schema@.relay_consumer_offsets as o
    set worker_id = null, updated_at = now()
    where o.relay_group_id = p_relay_group_id
        and o.pipeline_id = p_pipeline
        and o.epoch = p_epoch
$$;

comment on function @schema@.relay_release(text, text, bigint) is
    'Definer, since only functions write positions. Give up ownership; does nothing where it is lost already.';

create or replace function @schema@.relay_forget_group(relay_group_id text)
returns bigint
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
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
            detail = 'Without its positions it would deliver everything again.',
            hint = 'Stop its relays first.';
    end if;
    delete from @schema@.relay_consumer_offsets as o
    where o.relay_group_id = relay_forget_group.relay_group_id;
    get diagnostics v_positions = row_count;
    delete from @schema@.relay_pending_gaps as g
    where g.relay_group_id = relay_forget_group.relay_group_id;
    delete from @schema@.relay_cursors as c
    where c.relay_group_id = relay_forget_group.relay_group_id;
    update @schema@.relay_groups as g
    set relay_group_id = null
    where g.relay_group_id = relay_forget_group.relay_group_id;
    return v_positions;
end
$$;

comment on function @schema@.relay_forget_group(text) is
    'Definer, since only functions write positions. Remove positions, gaps and cursors of a relay group that is gone, so that it holds back no retention, and return how many positions it had. Its consumer groups and dead letters stay, the former for another relay group. RL024 while one of its relays lives.';

create or replace function @schema@.relay_cursor_get(
    p_relay_group_id text,
    p_pipeline text,
    p_cursor_key text
)
returns jsonb
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select c.position
    from @schema@.relay_cursors as c
    where c.relay_group_id = p_relay_group_id
        and c.pipeline_id = p_pipeline
        and c.cursor_key = p_cursor_key
$$;

comment on function @schema@.relay_cursor_get(text, text, text) is
    'Definer, since only functions read positions. Position that a source keeps for itself; null where there is none.';

create or replace function @schema@.relay_cursor_set(
    p_relay_group_id text,
    p_pipeline text,
    p_epoch bigint,
    p_cursor_key text,
    p_cursor jsonb
)
returns void
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
    -- Refused where ownership is lost; else a claim waits until the cursor is written.
    select @schema@.relay_commit(p_relay_group_id, p_pipeline, p_epoch, 0);
    insert into @schema@.relay_cursors as c (relay_group_id, pipeline_id, cursor_key, position)
    values (p_relay_group_id, p_pipeline, p_cursor_key, p_cursor)
    on conflict (relay_group_id, pipeline_id, cursor_key) do update
    set position = excluded.position, updated_at = now()
$$;

comment on function @schema@.relay_cursor_set(text, text, bigint, text, jsonb) is
    'Definer, since only functions write positions. Write a position that a source keeps for itself. RL020 where the epoch has moved on.';
