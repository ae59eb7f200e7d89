-- Sending again, or leaving out: putting a pipeline where an outbox is to be read from.
--
-- What is not committed when a position is moved is still delivered: every id that is missing below
-- the new position becomes a pending gap of it.

create or replace function @schema@.relay_seek_after(
    p_outbox_table text, p_to text, p_id bigint, p_time timestamptz
) returns bigint
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_outbox record;
    v_swept @schema@.pgt_outbox_config;
    v_after bigint;
    v_time timestamptz := p_time;
    v_id bigint := p_id;
begin
    -- The sweeper locks it too: what it deletes now would be missing behind the new position.
    select c.* into v_swept
    from @schema@.pgt_outbox_config as c
    where c.outbox_table_name = p_outbox_table
    for no key update;
    select * into v_outbox from @schema@.relay_outbox_of(p_outbox_table);
    begin
        if p_to ~ '^[0-9]{1,18}$' then
            v_id := p_to::bigint;
        elsif p_to not in ('earliest', 'latest') then
            v_time := p_to::timestamptz;
        end if;
    exception
        when data_exception then
            null;
    end;
    execute format(
        $query$
        select case
            when $1 = 'earliest' then 0
            when $1 = 'latest' then greatest(max(o.id), $4)
            when $2 is not null then $2 - 1
            when $3 is not null then coalesce(min(o.id) filter (where o.created_at >= $3) - 1, max(o.id), $4)
        end
        from %s as o
        $query$, v_outbox.outbox_relation)
    into v_after
    using p_to, v_id, v_time, v_outbox.swept_through;
    if v_after is null or v_after not between 0 and v_outbox.last_id then
        raise exception using
            errcode = '22023',
            message = format('%L is no place in outbox "%s"', coalesce(p_to, p_id::text, p_time::text), p_outbox_table),
            hint = format('It is earliest, latest, an id from 1 to %s, or a time.', v_outbox.last_id + 1);
    elsif v_id <= v_outbox.swept_through
        or v_time <= coalesce(v_swept.swept_created_at, case when v_outbox.swept_through > 0 then 'infinity'::timestamptz end)
    then
        raise exception using
            errcode = 'RL006',
            message = format('retention has swept rows %s to %s of outbox "%s", the last of %s',
                coalesce(v_id, 1), v_outbox.swept_through, p_outbox_table, v_swept.swept_created_at),
            hint = 'earliest sends what is left.';
    end if;
    return v_after;
end
$$;
comment on function @schema@.relay_seek_after(text, text, bigint, timestamptz) is
    'Part of relay_seek_to, runs as it does. The id behind which a position is to stand. 22023 where there is no such place, RL006 where retention has swept there. Keeps the sweeper away until the transaction ends.';

create or replace function @schema@.relay_seek_to(
    p_pipeline text, p_to text, p_relay_group text, p_id bigint default null,
    p_time timestamptz default null
) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    relay_group text not null := p_relay_group;
    v_config @schema@.relay_outbox_config;
    g @schema@.relay_groups;
    v_group text;
    v_outbox record;
    v_after bigint;
    v_visible int8multirange;
    v_gaps int8multirange;
    v_rows bigint;
    v_readers text[];
    v_hint text;
begin
    perform @schema@.relay_find_pipeline(p_pipeline);
    select c.* into v_config from @schema@.relay_outbox_config as c where c.name = p_pipeline;
    if not found then
        raise exception using
            errcode = '22023',
            message = format('pipeline "%s" reads no outbox', p_pipeline),
            hint = 'The position of a reverse pipeline is kept by its broker.';
    end if;
    v_group := v_config.config #>> '{source,consumer_group}';
    if v_group is not null then
        -- From here on nobody else polls it.
        g := @schema@.relay_group_find(v_group, true);
    end if;
    if relay_group <> coalesce(g.relay_group_id, relay_group)
        or v_group is null and relay_group <> 'default' and not exists (
            select from @schema@.relay_consumer_offsets as o where o.relay_group_id = relay_group
            union all
            select from @schema@.relay_workers as w where w.relay_group_id = relay_group)
    then
        raise exception using
            errcode = '22023',
            message = format('relay group "%s" has no position of pipeline "%s"', relay_group, p_pipeline),
            hint = 'select pipeline, relay_group_id, last_change_id from relay_readers() shows who has one.';
    end if;

    v_after := @schema@.relay_seek_after(v_config.outbox_table_name, p_to, p_id, p_time);
    select * into v_outbox from @schema@.relay_outbox_of(v_config.outbox_table_name);
    execute format(
        $query$
        select
            coalesce(range_agg(int8range(o.id, o.id, '[]')) filter (where o.id <= $1), '{}'),
            count(*) filter (where o.id > $1)
        from %s as o
        $query$, v_outbox.outbox_relation)
    into v_visible, v_rows
    using v_after;
    -- Below what was swept nothing is read in order: what is left there is a gap, too.
    v_gaps := int8multirange(int8range(1, v_after + 1)) - v_visible
        + int8multirange(int8range(v_after + 1, greatest(v_after, v_outbox.swept_through) + 1));
    v_after := greatest(v_after, v_outbox.swept_through);

    if v_group is null then
        if not exists (
            select from @schema@.relay_consumer_offsets as o
            where o.relay_group_id = relay_group and o.pipeline = p_pipeline)
        then
            perform @schema@.relay_place(
                relay_group, p_pipeline, v_config.outbox_table_name, @schema@.relay_partitioning(v_config.config));
        end if;
        -- All of its readers, in the order in which others lock them.
        v_readers := array(
            select o.pipeline_id
            from @schema@.relay_consumer_offsets as o
            where o.relay_group_id = relay_group and o.pipeline = p_pipeline
            order by o.pipeline_id
            for update);
        update @schema@.relay_consumer_offsets as o
        set
            outbox_table = v_config.outbox_table_name,
            last_change_id = v_after,
            epoch = o.epoch + 1,
            worker_id = null,
            updated_at = now()
        where o.relay_group_id = relay_group and o.pipeline_id = any (v_readers);
        delete from @schema@.relay_pending_gaps as p
        where p.relay_group_id = relay_group and p.pipeline_id = any (v_readers);
        insert into @schema@.relay_pending_gaps (relay_group_id, pipeline_id, first_id, last_id)
        select relay_group, r.name, lower(s.gap), upper(s.gap) - 1
        from unnest(v_readers) as r (name)
        cross join unnest(v_gaps) as s (gap);
    else
        perform @schema@.seek_offset(v_group, 'relay_seek', v_after);
        perform @schema@.relay_group_leave(v_group, 'relay_seek');
        perform @schema@.relay_group_note_gaps(g.group_id, v_gaps, array['']);
        -- Of another run: the next poll notes who holds the outbox before it reads the gaps.
        update @schema@.relay_groups as r
        set watermark = coalesce(lower(v_gaps) - 1, v_after), server_instance = ''
        where r.group_id = g.group_id;
    end if;
    delete from @schema@.relay_seeks as s
    where s.pipeline = p_pipeline and s.relay_group_id = relay_group;
    insert into @schema@.relay_seeks
        (pipeline, relay_group_id, outbox_table, sought_to, sought_by, after_id, through_id)
    values (
        p_pipeline, relay_group, v_config.outbox_table_name, coalesce(p_to, p_id::text, p_time::text), session_user,
        v_after, v_outbox.max_id);
    perform pg_notify(
        @schema@.relay_channel('pgtrickle_relay_config'),
        json_build_object('direction', 'relay_outbox_config', 'event', 'SEEK', 'name', p_pipeline)::text);
    raise notice using
        message = format('pipeline "%s" goes on behind id %s: %s rows are sent from there', p_pipeline, v_after, v_rows),
        detail = 'So is what is not committed yet below it. What was sent before is sent again with the same dedup keys.';
    return v_rows;
exception
    when others then
        -- With a remedy it is a person's to mend, for whom the calls on the way there are noise.
        get stacked diagnostics v_hint = pg_exception_hint;
        if v_hint = '' then
            raise;
        end if;
        raise exception using errcode = sqlstate, message = sqlerrm, hint = v_hint;
end
$$;
comment on function @schema@.relay_seek_to(text, text, text, bigint, timestamptz) is
    'Definer, since only functions write positions. What relay_seek does, to a place in words, to an id or to a time.';

-- Each is one expression, which PostgreSQL puts in the place of the call.

create or replace function @schema@.relay_seek(
    pipeline text, "to" text, relay_group text default 'default'
) returns bigint
language sql volatile security invoker as $$
    select @schema@.relay_seek_to(pipeline, "to", relay_group)
$$;
comment on function @schema@.relay_seek(text, text, text) is
    'Put a pipeline at the ''earliest'' row that is left, at the ''latest'', which sends nothing again, or at an id or a time in a text; running or not, with a consumer group or without. Gives how many rows are sent from there. What is not committed yet is sent wherever it lies. RL006 where retention has swept.';

create or replace function @schema@.relay_seek(
    pipeline text, outbox_id bigint, relay_group text default 'default'
) returns bigint
language sql volatile security invoker as $$
    select @schema@.relay_seek_to(pipeline, null, relay_group, p_id => outbox_id)
$$;
comment on function @schema@.relay_seek(text, bigint, text) is
    'The same by an id: the row with this id is the first that is sent.';

create or replace function @schema@.relay_seek(
    pipeline text, since timestamptz, relay_group text default 'default'
) returns bigint
language sql volatile security invoker as $$
    select @schema@.relay_seek_to(pipeline, null, relay_group, p_time => since)
$$;
comment on function @schema@.relay_seek(text, timestamptz, text) is
    'The same by a time: all rows with created_at since then are sent, and rows that were written beside the first of them. created_at is when the statement ran, not when it was committed.';

create or replace function @schema@.relay_seek_progress(relay_group_id text)
returns table (
    pipeline text, sought_to text, sought_by text, sought_at timestamptz, after_id bigint,
    through_id bigint, reached_id bigint
)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select
        s.pipeline, s.sought_to, s.sought_by, s.sought_at, s.after_id, s.through_id,
        least(s.through_id, coalesce(
            (select f.watermark
             from @schema@.relay_groups as r
             cross join lateral @schema@.relay_group_find(r.group_name, false) as f
             where r.group_name = c.config #>> '{source,consumer_group}'),
            (select min(o.last_change_id)
             from @schema@.relay_consumer_offsets as o
             where o.pipeline = s.pipeline and o.relay_group_id = s.relay_group_id)))
    from @schema@.relay_seeks as s
    join @schema@.relay_outbox_config as c on c.name = s.pipeline and c.outbox_table_name = s.outbox_table
    where s.relay_group_id = relay_seek_progress.relay_group_id
    order by s.sought_at
$$;
comment on function @schema@.relay_seek_progress(text) is
    'Definer, since only functions read positions. Where relay_seek put each pipeline last, who was logged in, and how far the slowest of its readers has come since: until reached_id is through_id, rows are sent that were there at that moment.';
