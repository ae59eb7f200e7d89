-- Positions of pipelines: who may write them, and writing them.
--
-- Each claim raises the epoch. A worker that lost its pipeline still has the old one, so that
-- whatever it writes late is refused (RL020) instead of moving the position under the new owner.

create or replace function pgtrickle.relay_claim(
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
    v_outbox_table text;
begin
    insert into pgtrickle.relay_consumer_offsets (relay_group_id, pipeline_id, outbox_table)
    values (p_relay_group_id, p_pipeline, p_outbox_table)
    on conflict (relay_group_id, pipeline_id) do nothing;
    is_new := found;

    select o.outbox_table into v_outbox_table
    from pgtrickle.relay_consumer_offsets as o
    where o.relay_group_id = p_relay_group_id and o.pipeline_id = p_pipeline
    for update;
    if is_new or v_outbox_table <> p_outbox_table then
        is_new := true;
        perform pgtrickle.relay_start_position(p_relay_group_id, p_pipeline, p_outbox_table);
    end if;

    update pgtrickle.relay_consumer_offsets as o
    set epoch = o.epoch + 1, worker_id = p_worker_id, updated_at = now()
    where o.relay_group_id = p_relay_group_id and o.pipeline_id = p_pipeline
    returning o.epoch, o.last_change_id into epoch, last_change_id;

    select
        coalesce(array_agg(g.first_id order by g.first_id), '{}'),
        coalesce(array_agg(g.last_id order by g.first_id), '{}')
    into gap_first_ids, gap_last_ids
    from pgtrickle.relay_pending_gaps as g
    where g.relay_group_id = p_relay_group_id and g.pipeline_id = p_pipeline;
    return next;
end
$$;

comment on function pgtrickle.relay_claim(text, text, text, text) is
    'Take a pipeline''s position: raises its epoch, so that the owner before can''t write it any more, and returns it with its pending gaps. Without an outbox (reverse pipelines) only the epoch counts. Definer: positions are written by functions only.';

revoke all on function pgtrickle.relay_claim(text, text, text, text) from public;

create or replace function pgtrickle.relay_start_position(
    p_relay_group_id text,
    p_pipeline text,
    p_outbox_table text
)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_after_id bigint;
    v_gaps int8multirange;
begin
    select c.start_after_id, c.start_gaps into v_after_id, v_gaps
    from pgtrickle.relay_outbox_config as c
    where c.name = p_pipeline;

    update pgtrickle.relay_consumer_offsets as o
    set outbox_table = p_outbox_table, last_change_id = coalesce(v_after_id, 0)
    where o.relay_group_id = p_relay_group_id and o.pipeline_id = p_pipeline;
    delete from pgtrickle.relay_pending_gaps as g
    where g.relay_group_id = p_relay_group_id and g.pipeline_id = p_pipeline;
    insert into pgtrickle.relay_pending_gaps (relay_group_id, pipeline_id, first_id, last_id)
    select p_relay_group_id, p_pipeline, lower(r.gap), upper(r.gap) - 1
    from unnest(v_gaps) as r (gap);
end
$$;

comment on function pgtrickle.relay_start_position(text, text, text) is
    'Put a new position where its pipeline starts.';

revoke all on function pgtrickle.relay_start_position(text, text, text) from public;

create or replace function pgtrickle.relay_commit(
    p_relay_group_id text,
    p_pipeline text,
    p_epoch bigint,
    p_last_change_id bigint,
    p_closed_first_ids bigint[] default '{}',
    p_opened_first_ids bigint[] default '{}',
    p_opened_last_ids bigint[] default '{}'
)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    update pgtrickle.relay_consumer_offsets as o
    set last_change_id = greatest(o.last_change_id, p_last_change_id), updated_at = now()
    where o.relay_group_id = p_relay_group_id
        and o.pipeline_id = p_pipeline
        and o.epoch = p_epoch;
    if not found then
        perform pgtrickle.relay_ownership_lost(p_relay_group_id, p_pipeline, p_epoch);
    end if;

    if cardinality(p_closed_first_ids) > 0 then
        delete from pgtrickle.relay_pending_gaps as g
        where g.relay_group_id = p_relay_group_id
            and g.pipeline_id = p_pipeline
            and g.first_id = any (p_closed_first_ids);
    end if;
    if cardinality(p_opened_first_ids) > 0 then
        -- A commit whose answer was lost is repeated: its gaps are there already.
        insert into pgtrickle.relay_pending_gaps as g (relay_group_id, pipeline_id, first_id, last_id)
        select p_relay_group_id, p_pipeline, r.first_id, r.last_id
        from unnest(p_opened_first_ids, p_opened_last_ids) as r (first_id, last_id)
        on conflict (relay_group_id, pipeline_id, first_id) do update
        set last_id = excluded.last_id;
    end if;
end
$$;

comment on function pgtrickle.relay_commit(text, text, bigint, bigint, bigint[], bigint[], bigint[]) is
    'Write position and gaps together: the position never goes back, gaps that begin at the closed ids go, the opened ranges come. RL020 where the epoch has moved on. Definer: positions are written by functions only.';

revoke all on function pgtrickle.relay_commit(text, text, bigint, bigint, bigint[], bigint[], bigint[]) from public;

create or replace function pgtrickle.relay_ownership_lost(
    p_relay_group_id text,
    p_pipeline text,
    p_epoch bigint
)
returns void
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    o pgtrickle.relay_consumer_offsets;
begin
    select r.* into o
    from pgtrickle.relay_consumer_offsets as r
    where r.relay_group_id = p_relay_group_id and r.pipeline_id = p_pipeline;
    raise exception using
        errcode = 'RL020',
        message = format('pipeline "%s" of relay group "%s" has another owner', p_pipeline, p_relay_group_id),
        detail = case
            when o.epoch is null then 'Its position was deleted.'
            else format('The position is at epoch %s, owned by %s; this worker has epoch %s.',
                o.epoch, coalesce(o.worker_id, 'nobody'), coalesce(p_epoch::text, 'null'))
        end,
        hint = 'Stop this worker. What it has not committed is delivered again by the owner.';
end
$$;

comment on function pgtrickle.relay_ownership_lost(text, text, bigint) is
    'Raise RL020 with who owns the pipeline now.';

revoke all on function pgtrickle.relay_ownership_lost(text, text, bigint) from public;

create or replace function pgtrickle.relay_reset_offset(
    p_relay_group_id text,
    p_pipeline text,
    p_epoch bigint,
    p_last_change_id bigint
)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    update pgtrickle.relay_consumer_offsets as o
    set last_change_id = p_last_change_id, updated_at = now()
    where o.relay_group_id = p_relay_group_id
        and o.pipeline_id = p_pipeline
        and o.epoch = p_epoch;
    if not found then
        perform pgtrickle.relay_ownership_lost(p_relay_group_id, p_pipeline, p_epoch);
    end if;
    delete from pgtrickle.relay_pending_gaps as g
    where g.relay_group_id = p_relay_group_id and g.pipeline_id = p_pipeline;
end
$$;

comment on function pgtrickle.relay_reset_offset(text, text, bigint, bigint) is
    'Put a position anywhere, also back, without gaps: its outbox was made anew. RL020 where the epoch has moved on. Definer: positions are written by functions only.';

revoke all on function pgtrickle.relay_reset_offset(text, text, bigint, bigint) from public;

create or replace function pgtrickle.relay_release(
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
    update pgtrickle.relay_consumer_offsets as o
    set worker_id = null, updated_at = now()
    where o.relay_group_id = p_relay_group_id
        and o.pipeline_id = p_pipeline
        and o.epoch = p_epoch
$$;

comment on function pgtrickle.relay_release(text, text, bigint) is
    'Give up ownership; does nothing where it is lost already. Definer: positions are written by functions only.';

revoke all on function pgtrickle.relay_release(text, text, bigint) from public;

create or replace function pgtrickle.relay_cursor_get(
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
    from pgtrickle.relay_cursors as c
    where c.relay_group_id = p_relay_group_id
        and c.pipeline_id = p_pipeline
        and c.cursor_key = p_cursor_key
$$;

comment on function pgtrickle.relay_cursor_get(text, text, text) is
    'Position that a source keeps for itself; null where there is none. Definer: positions are read by functions only.';

revoke all on function pgtrickle.relay_cursor_get(text, text, text) from public;

create or replace function pgtrickle.relay_cursor_set(
    p_relay_group_id text,
    p_pipeline text,
    p_epoch bigint,
    p_cursor_key text,
    p_cursor jsonb
)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Locked, so that a claim waits until the cursor is written.
    perform
    from pgtrickle.relay_consumer_offsets as o
    where o.relay_group_id = p_relay_group_id
        and o.pipeline_id = p_pipeline
        and o.epoch = p_epoch
    for share;
    if not found then
        perform pgtrickle.relay_ownership_lost(p_relay_group_id, p_pipeline, p_epoch);
    end if;
    insert into pgtrickle.relay_cursors as c (relay_group_id, pipeline_id, cursor_key, position)
    values (p_relay_group_id, p_pipeline, p_cursor_key, p_cursor)
    on conflict (relay_group_id, pipeline_id, cursor_key) do update
    set position = excluded.position, updated_at = now();
end
$$;

comment on function pgtrickle.relay_cursor_set(text, text, bigint, text, jsonb) is
    'Write a position that a source keeps for itself. RL020 where the epoch has moved on. Definer: positions are written by functions only.';

revoke all on function pgtrickle.relay_cursor_set(text, text, bigint, text, jsonb) from public;
