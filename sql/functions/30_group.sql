-- Consumer groups: competing consumers share one outbox, each row goes to one of them.
--
-- A group has one position. Everything up to its frontier is settled, except gaps
-- (ids that were not visible when the frontier passed them), leases (rows in the hands of a
-- consumer) and returned rows (nobody's). The watermark lies just below the lowest exception.
--
-- No row is skipped, whatever order transactions commit in. An insert takes RowExclusiveLock on
-- the outbox before it draws an id and keeps it until its commit is visible. A poll therefore
--   1. reads the rows above the frontier,
--   2. then reads who holds that lock,
--   3. reads the gaps of earlier polls again where one of their holders has ended; without a
--      holder left, what that read does not show was rolled back,
--   4. then notes the ids missing among the rows of step 1, with the holders of step 2, to be
--      read again by the next poll: their writer may have ended between steps 1 and 2.
-- Each statement of a volatile function has its own snapshot at READ COMMITTED; at other levels
-- the order of the steps would mean nothing, so they are refused.
--
-- Gaps that wait for the same transactions form a cohort, so that a poll compares a few sets of
-- holders and reads nothing of those whose holders all live, however many gaps they have. The
-- holder '' stands for "not read again yet" and never lives.

-- ---------------------------------------------------------------------------
-- Making, finding, dropping
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_group_create(
    p_group text, p_outbox_table text, p_start text default 'earliest',
    p_is_new boolean default false
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_outbox record;
    v_is_new boolean;
    g @schema@.relay_groups;
begin
    if length(p_group) not between 1 and 200 or p_start not in ('earliest', 'latest') then
        raise exception using
            errcode = '22023',
            message = format('consumer group "%s" can''t start at %L', p_group, p_start),
            hint = 'A name has 1 to 200 characters; a group starts at ''earliest'' or at ''latest''.';
    end if;
    select * into v_outbox from @schema@.relay_outbox_of(p_outbox_table);
    if v_outbox.sequence_cache > 1 then
        raise exception using
            errcode = 'RL005',
            message = format('outbox "%s" hands out ids in blocks of %s, older than the lock that tells who may still use them',
                p_outbox_table, v_outbox.sequence_cache),
            hint = format('alter table %s alter column id set cache 1;', v_outbox.outbox_relation);
    end if;

    insert into @schema@.relay_groups (group_name, outbox_table_name, pgt_id, auto_offset_reset)
    values (p_group, p_outbox_table, v_outbox.pgt_id, p_start)
    on conflict (group_name) do nothing;
    v_is_new := found;
    if p_is_new and not v_is_new then
        raise exception using
            errcode = 'RL023',
            message = format('consumer group "%s" exists already', p_group),
            hint = format('Choose another name, or: select %I.drop_consumer_group(%L);', @schema_name@, p_group);
    end if;
    g := @schema@.relay_group_find(p_group, true);
    if g.outbox_table_name <> p_outbox_table then
        raise exception using
            errcode = 'RL023',
            message = format('consumer group "%s" exists and reads outbox "%s", not "%s"',
                p_group, g.outbox_table_name, p_outbox_table),
            hint = 'Choose another name, or drop the group first.';
    end if;
    if v_is_new and p_start = 'latest' then
        perform @schema@.relay_group_to_end(g);
    end if;
    return v_is_new;
end
$$;
comment on function @schema@.relay_group_create(text, text, text, boolean) is
    'Definer, since only functions write groups. Make a consumer group on an outbox table; where it exists and reads the same one false, or RL023 if it has to be new.';

create or replace function @schema@.create_consumer_group(
    name text, outbox text, auto_offset_reset text default 'latest'
) returns void
language sql volatile security invoker as $$
    -- Of type void, like the function, so that PostgreSQL puts it in the place of the call.
    select case
        when @schema@.relay_group_create(name, @schema@.relay_outbox_named(outbox), auto_offset_reset, true)
        then null::pg_catalog.void
    end
$$;
comment on function @schema@.create_consumer_group(text, text, text) is
    'Make a consumer group; the outbox is named like a table in a query, or by its own name, and stays the group''s under whatever name. From ''latest'' it delivers what is not visible now, transactions in progress included.';

create or replace function @schema@.relay_group_to_end(p_group @schema@.relay_groups) returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_end record;
begin
    select * into v_end from @schema@.relay_outbox_end(p_group.outbox_table_name);
    perform @schema@.relay_group_note_gaps(p_group.group_id, v_end.gaps, array['']);
    update @schema@.relay_groups as r
    set frontier = v_end.after_id
    where r.group_id = p_group.group_id;
end
$$;
comment on function @schema@.relay_group_to_end(@schema@.relay_groups) is
    'Put a group that has nothing yet behind what is visible now.';

create or replace function @schema@.relay_outbox_end(
    p_outbox text, out after_id bigint, out gaps int8multirange
)
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_outbox record;
begin
    select * into v_outbox from @schema@.relay_outbox_of(p_outbox);
    execute format(
        $query$
        select
            coalesce(max(r.id), $1),
            coalesce(
                range_agg(int8range(r.previous + 1, r.id)) filter (where r.id > r.previous + 1),
                '{}')
        from (
            select o.id, lag(o.id, 1, $1) over (order by o.id) as previous
            from %s as o
            where o.id > $1
        ) as r
        $query$, @schema@.relay_rows(v_outbox.outbox_relation, 'above => $1'))
    into after_id, gaps
    using v_outbox.swept_through;
end
$$;
comment on function @schema@.relay_outbox_end(text) is
    'Highest visible id of an outbox and the ids missing below it, seen in one snapshot: who starts at the end still owes what is being written at this moment.';

create or replace function @schema@.relay_group_find(p_group text, p_lock boolean)
returns @schema@.relay_groups
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_isolation text := current_setting('transaction_isolation');
    g @schema@.relay_groups;
begin
    if p_lock then
        if pg_is_in_recovery() or v_isolation not in ('read committed', 'read uncommitted') then
            raise exception using
                errcode = 'RL005',
                message = format('consumer groups can''t be used %s: a row that commits late could be lost', case
                    when pg_is_in_recovery() then 'on a standby'
                    else 'at isolation level ' || v_isolation
                end),
                hint = 'Use READ COMMITTED on the primary: begin isolation level read committed.';
        end if;
        perform from @schema@.relay_groups as r where r.group_name = p_group for no key update;
    end if;
    select r.* into g from @schema@.relay_groups as r where r.group_name = p_group;
    if not found then
        raise exception using
            errcode = 'RL022',
            message = format('consumer group "%s" does not exist', p_group),
            hint = format('select %I.create_consumer_group(%L, ''<stream table>'');',
                @schema_name@, p_group);
    end if;
    g.watermark := greatest(
        g.watermark,
        coalesce(
            least(
                (select p.first_id
                 from @schema@.relay_group_gaps as p
                 where p.group_id = g.group_id and p.first_id > g.watermark
                 order by p.first_id
                 limit 1),
                (select min(l.outbox_ids[1])
                 from @schema@.relay_group_leases as l
                 where l.group_id = g.group_id and l.expires_at >= g.leases_since),
                (select r.outbox_id
                 from @schema@.relay_group_returned as r
                 where r.group_id = g.group_id and r.outbox_id > g.watermark
                 order by r.outbox_id
                 limit 1)
            ) - 1,
            g.frontier));
    return g;
end
$$;
comment on function @schema@.relay_group_find(text, boolean) is
    'A group with its watermark as it is now; RL022 where there is none. Locked until the transaction ends where asked, so that polls of one group go one after another.';

create or replace function @schema@.relay_group_check_pipeline(p_group text, p_pipeline text)
returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_other text;
begin
    select min(c.name) into v_other
    from @schema@.relay_outbox_config as c
    where c.config #>> '{source,consumer_group}' = p_group and c.name <> p_pipeline;
    if v_other is not null then
        raise exception using
            errcode = 'RL023',
            message = format('consumer group "%s" belongs to pipeline "%s": each of two would get a part of the rows',
                p_group, v_other),
            hint = 'Give each pipeline a consumer group of its own; parallelism adds workers to a pipeline.';
    end if;
end
$$;
comment on function @schema@.relay_group_check_pipeline(text, text) is
    'RL023 where another pipeline reads this group. Whoever holds the group''s lock sees every other one.';

create or replace function @schema@.relay_group_join(
    p_group text, p_pipeline text, p_relay_group_id text, p_outbox_table text, p_consumer text,
    p_on_reset text
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    pipeline text not null := p_pipeline;
    relay_group_id text not null := p_relay_group_id;
    outbox_table text not null := p_outbox_table;
    on_reset text not null := p_on_reset;
    g @schema@.relay_groups := @schema@.relay_group_find(p_group, true);
    v_is_reset boolean;
begin
    perform @schema@.relay_group_check_pipeline(p_group, pipeline);
    if g.outbox_table_name <> outbox_table or g.relay_group_id <> p_relay_group_id then
        raise exception using
            errcode = 'RL023',
            message = format('consumer group "%s" reads outbox "%s" for relay group "%s": another would get a part of the rows',
                p_group, g.outbox_table_name, coalesce(g.relay_group_id, p_relay_group_id)),
            hint = format('Use another consumer group. Once the relays of that group are gone: select %I.relay_forget_group(%L);',
                @schema_name@, g.relay_group_id);
    end if;
    update @schema@.relay_groups as r
    set relay_group_id = p_relay_group_id
    where r.group_id = g.group_id and r.relay_group_id is null;
    v_is_reset := on_reset <> 'fail'
        and g.frontier > (select o.last_id from @schema@.relay_outbox_of(g.outbox_table_name) as o);
    if v_is_reset then
        perform @schema@.seek_offset(p_group, p_consumer, 0);
    end if;
    if v_is_reset and on_reset = 'latest' then
        perform @schema@.relay_group_to_end(g);
    end if;
    perform @schema@.consumer_heartbeat(p_group, p_consumer);
    return v_is_reset;
end
$$;
comment on function @schema@.relay_group_join(text, text, text, text, text, text) is
    'Definer, since only functions write groups. A worker of a pipeline becomes a consumer; true where the group stood beyond its outbox and was put where on_reset says. RL023 where the group belongs to another pipeline, outbox or relay group: the first that joins has it.';

create or replace function @schema@.relay_group_unbind(p_group text) returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
begin
    update @schema@.relay_groups as r set relay_group_id = null where r.group_name = p_group;
    if found then
        raise notice using
            message = format('consumer group "%s" stays, with its position, and holds back retention', p_group),
            hint = format('A pipeline that names it goes on where this one stopped. Where none will: select %I.drop_consumer_group(%L);', @schema_name@, p_group);
    end if;
end
$$;
comment on function @schema@.relay_group_unbind(text) is
    'A pipeline does not read this group any more: the next one may.';

create or replace function @schema@.drop_consumer_group(name text, if_exists boolean default false)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_group_id bigint;
    v_hint text;
begin
    delete from @schema@.relay_groups as r
    where r.group_name = name
    returning r.group_id into v_group_id;
    if not found and if_exists is not true then
        perform @schema@.relay_group_find(name, false);
    end if;
    -- Leases first: this waits for a release in progress, whose rows the next statement then sees.
    delete from @schema@.relay_group_leases as l where l.group_id = v_group_id;
    delete from @schema@.relay_group_returned as r where r.group_id = v_group_id;
    delete from @schema@.relay_group_gaps as p where p.group_id = v_group_id;
    delete from @schema@.relay_group_cohorts as c where c.group_id = v_group_id;
    delete from @schema@.relay_group_consumers as c where c.group_id = v_group_id;
exception
    when sqlstate 'RL022' then
        get stacked diagnostics v_hint = pg_exception_hint;
        raise exception using errcode = sqlstate, message = sqlerrm, hint = v_hint;
end
$$;
comment on function @schema@.drop_consumer_group(text, boolean) is
    'Definer, since only functions write groups. Drop a consumer group with its position and leases.';

-- ---------------------------------------------------------------------------
-- Polling
-- ---------------------------------------------------------------------------

create or replace function @schema@.poll_outbox(
    "group" text, consumer text, batch_size integer default 100,
    visibility_seconds integer default 30, max_bytes bigint default 16777216
) returns table (
    outbox_id bigint, pgt_id uuid, created_at timestamptz, inserted_count bigint,
    deleted_count bigint, is_claim_check boolean, payload jsonb, lease_token uuid, refresh_id uuid,
    headers jsonb
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_poll record;
    v_hint text;
begin
    if (
        select c.adopted is not null
        from @schema@.relay_groups as r
        join @schema@.pgt_outbox_config as c using (outbox_table_name)
        where r.group_name = "group"
    ) then
        raise exception using
            errcode = 'RL005',
            message = format('consumer group "%s" reads an outbox that is a table of its application, whose rows are not those of poll_outbox', "group"),
            hint = 'Let a pipeline read it, with this group as its source.consumer_group.';
    end if;
    v_poll := @schema@.relay_group_poll("group", consumer, batch_size, visibility_seconds, max_bytes);
    return query execute format(
        $query$
        select
            o.id, o.pgt_id, o.created_at,
            case when f.is_so then 0 else o.inserted_count::bigint end, o.deleted_count::bigint,
            o.is_claim_check and not f.is_so,
            case when f.is_so then '{"v": 1, "deleted": [], "inserted": []}' else o.payload end,
            $1, o.refresh_id, o.headers
        from %s as o
        -- A backfill for one pipeline is nothing to others, who settle the row.
        cross join lateral (select jsonb_typeof(o.payload -> 'backfill') is not distinct from 'string') as f (is_so)
        where o.id = any ($2)
        order by o.id
        $query$, v_poll.outbox_relation)
    using v_poll.lease_token, v_poll.outbox_ids;
exception
    when sqlstate 'RL022' or sqlstate 'RL005' or invalid_parameter_value then
        get stacked diagnostics v_hint = pg_exception_hint;
        raise exception using errcode = sqlstate, message = sqlerrm, hint = v_hint;
end
$$;
comment on function @schema@.poll_outbox(text, text, integer, integer, bigint) is
    'Definer, since only functions write groups. Lease the next rows of a group, in id order: returned ones first, then new ones; at least one, then as many as batch size and bytes (as stored) allow. All rows of a poll carry its lease token.';

create or replace function @schema@.relay_group_poll(
    p_group text, p_consumer text, p_batch_size integer, p_seconds integer, p_max_bytes bigint,
    p_max_messages integer default null, p_lease_token uuid default null, out lease_token uuid,
    out outbox_ids bigint[], out is_settled boolean, out outbox_relation text
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    consumer text not null := p_consumer;
    batch_size integer not null := p_batch_size;
    visibility_seconds integer not null := p_seconds;
    max_bytes bigint not null := p_max_bytes;
    v_instance text;
    v_outbox record;
    g @schema@.relay_groups;
    v_new bigint[];
    v_holders text[] := '{}';
    v_frontier bigint;
begin
    if consumer = ''
        or batch_size not between 1 and 100000
        or visibility_seconds not between 1 and 604800
        or max_bytes < 1
    then
        raise exception using
            errcode = '22023',
            message = format('consumer %L can''t lease %s rows of %s bytes for %s seconds',
                consumer, batch_size, max_bytes, visibility_seconds),
            hint = 'A named consumer leases 1 to 100000 rows of 1 byte or more for 1 to 604800 seconds (a week).';
    end if;
    if p_lease_token is not null then
        -- Others wait for the group until this is committed. Should the server lose it, the rows are
        -- leased again; once they are settled it can't be lost any more, since that is written later.
        perform set_config('synchronous_commit', 'off', true);
    end if;
    g := @schema@.relay_group_find(p_group, true);
    select * into v_outbox from @schema@.relay_outbox_of(g.outbox_table_name);
    if v_outbox.last_id < g.frontier then
        raise exception using
            errcode = 'RL005',
            message = format('consumer group "%s" stands at id %s, but outbox "%s" ends at id %s: it was made again or restored',
                p_group, g.frontier, g.outbox_table_name, v_outbox.last_id),
            hint = format('select %I.seek_offset(%L, %L, 0);', @schema_name@, p_group, consumer);
    end if;
    if v_outbox.pgt_id <> g.pgt_id then
        -- Made again: ids go on above the old ones. Should they not, what lies below is a gap.
        perform @schema@.seek_offset(p_group, consumer, g.frontier);
        perform @schema@.relay_group_note_gaps(
            g.group_id, int8multirange(int8range(1, g.frontier, '[]')), array['']);
        g := @schema@.relay_group_find(p_group, true);
    end if;

    execute format(
        $query$
        select coalesce(array_agg(r.id order by r.id), '{}')
        from (select o.id from %s as o where o.id > $1 order by o.id limit $2) as r
        $query$, @schema@.relay_rows(v_outbox.outbox_relation, 'above => $1, max_rows => $2'))
    into v_new
    using g.frontier, batch_size;

    -- Spared where no id is missing.
    if v_new[cardinality(v_new)] - g.frontier > cardinality(v_new)
        or exists (select from @schema@.relay_group_cohorts as c where c.group_id = g.group_id)
    then
        v_holders := array(
            select distinct l.virtualtransaction
            from pg_locks as l
            where l.locktype = 'relation'
                and l.database = (select d.oid from pg_database as d where d.datname = current_database())
                and l.relation = v_outbox.outbox_oid
                and l.mode = 'RowExclusiveLock'
                and l.granted
            order by 1);
    end if;

    -- Virtual transaction ids are comparable within one run of the server. After the crash of a
    -- backend the postmaster lives on; the reset time of the statistics tells such a restart.
    v_instance := concat_ws(' ',
        extract(epoch from pg_postmaster_start_time()),
        extract(epoch from pg_stat_get_bgwriter_stat_reset_time()));
    if v_instance <> g.server_instance then
        update @schema@.relay_group_cohorts as c
        set holders = array_prepend('', v_holders)
        where c.group_id = g.group_id;
        update @schema@.relay_groups as r
        set server_instance = v_instance
        where r.group_id = g.group_id;
    end if;

    perform @schema@.relay_group_read_gaps(
        g.group_id, v_outbox.outbox_relation, v_holders, batch_size, v_new = '{}');
    outbox_ids := @schema@.relay_group_pick(
        g, v_outbox.outbox_relation, v_new, batch_size, max_bytes, p_max_messages);
    v_frontier := greatest(g.frontier, outbox_ids[cardinality(outbox_ids)]);
    perform @schema@.relay_group_note_gaps(
        g.group_id,
        int8multirange(int8range(g.frontier, v_frontier, '(]')) - (
            select coalesce(range_agg(int8range(i.id, i.id, '[]')), '{}') from unnest(v_new) as i (id)),
        array_prepend('', v_holders));
    lease_token := @schema@.relay_group_lease(
        g, consumer, outbox_ids, v_frontier, visibility_seconds, p_lease_token);
    is_settled := lease_token is null
        and not exists (
            select from @schema@.relay_group_leases as l where l.group_id = g.group_id);
    outbox_relation := v_outbox.outbox_relation;
end
$$;
comment on function @schema@.relay_group_poll(text, text, integer, integer, bigint, integer, uuid) is
    'Definer, since only functions write groups. What poll_outbox does, giving the ids of the rows alone, bounded also by how many messages they make, under a token that the caller may choose; then the commit does not wait for the disk. Settled: there is nothing to lease, and nobody holds anything. RL005 where the group stands beyond its outbox.';

create or replace function @schema@.relay_group_read_gaps(
    p_group_id bigint, p_relation text, p_holders text[], p_limit integer, p_is_idle boolean
) returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    c_slice constant integer := 1000;
    v_until timestamptz := clock_timestamp() + interval '300 milliseconds';
    v_slices integer := 0;
    v_left integer := p_limit;
    v_cohort record;
    v_gaps int8multirange;
    v_found bigint[];
    v_read int8range;
begin
    -- Bounded, since the group is locked: the next polls go on where this one stops, faster than
    -- polls of this size note gaps. A poll that has nothing else to deliver looks longer.
    while v_left > 0 and (
        v_slices < 5 + 2 * p_limit / c_slice
        or (p_is_idle and v_left = p_limit and clock_timestamp() < v_until))
    loop
        select
            c.cohort_id,
            c.holders,
            array(
                select h.holder from unnest(c.holders) as h (holder)
                where h.holder = any (p_holders)
                order by h.holder) as living
        into v_cohort
        from @schema@.relay_group_cohorts as c
        where c.group_id = p_group_id and not c.holders <@ p_holders
        order by c.cohort_id
        limit 1;
        exit when not found;
        with slice as (
            delete from @schema@.relay_group_gaps as p
            where p.cohort_id = v_cohort.cohort_id
                and p.first_id <= (
                    select max(s.first_id)
                    from (
                        select g.first_id
                        from @schema@.relay_group_gaps as g
                        where g.cohort_id = v_cohort.cohort_id
                        order by g.first_id
                        limit c_slice
                    ) as s)
            returning p.first_id, p.last_id
        )
        select range_agg(int8range(s.first_id, s.last_id, '[]')) into v_gaps from slice as s;
        if v_gaps is null then
            delete from @schema@.relay_group_cohorts as c where c.cohort_id = v_cohort.cohort_id;
            continue;
        end if;

        execute format(
            $query$
            select coalesce(array_agg(f.id order by f.id), '{}')
            from (
                select v.id
                from unnest($1) as s (gap)
                cross join lateral (
                    select o.id
                    from %s as o
                    where o.id >= lower(s.gap) and o.id < upper(s.gap)
                    order by o.id
                    limit $2
                ) as v
                order by v.id
                limit $2
            ) as f
            $query$,
            @schema@.relay_rows(p_relation,
                'above => null, firsts => array[lower(s.gap)], lasts => array[upper(s.gap) - 1], max_rows => $2'))
        into v_found
        using v_gaps, v_left;
        insert into @schema@.relay_group_returned (group_id, outbox_id)
        select p_group_id, f.id from unnest(v_found) as f (id);

        -- What was read and not seen waits for the holders that live, or was rolled back.
        v_read := int8range(null, case when cardinality(v_found) = v_left then v_found[v_left] end, '(]');
        v_gaps := v_gaps - (
            select coalesce(range_agg(int8range(f.id, f.id, '[]')), '{}') from unnest(v_found) as f (id));
        if v_cohort.living <> '{}' then
            perform @schema@.relay_group_note_gaps(
                p_group_id, v_gaps * int8multirange(v_read), v_cohort.living);
        end if;
        perform @schema@.relay_group_note_gaps(
            p_group_id, v_gaps - int8multirange(v_read), v_cohort.holders);
        v_left := v_left - cardinality(v_found);
        v_slices := v_slices + 1;
    end loop;
end
$$;
comment on function @schema@.relay_group_read_gaps(bigint, text, text[], integer, boolean) is
    'Step 3 of a poll: read gaps again of which a holder has ended. Rows that have become visible are returned rows from now on, what is still missing joins the cohort of the holders that live.';

create or replace function @schema@.relay_group_note_gaps(
    p_group_id bigint, p_gaps int8multirange, p_holders text[]
) returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_cohort_id bigint;
begin
    if isempty(p_gaps) then
        return;
    end if;
    select c.cohort_id into v_cohort_id
    from @schema@.relay_group_cohorts as c
    where c.group_id = p_group_id and c.holders = p_holders;
    if not found then
        insert into @schema@.relay_group_cohorts (group_id, holders)
        values (p_group_id, p_holders)
        returning cohort_id into v_cohort_id;
    end if;
    insert into @schema@.relay_group_gaps (group_id, first_id, last_id, cohort_id)
    select p_group_id, lower(r.gap), upper(r.gap) - 1, v_cohort_id
    from unnest(p_gaps) as r (gap);
end
$$;
comment on function @schema@.relay_group_note_gaps(bigint, int8multirange, text[]) is
    'Step 4 of a poll: remember missing ids with the transactions that may still show them.';

create or replace function @schema@.relay_group_pick(
    p_group @schema@.relay_groups, p_relation text, p_new bigint[], p_batch_size integer,
    p_max_bytes bigint, p_max_messages integer
) returns bigint[]
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_returned bigint[];
    v_existing bigint[];
    v_picked bigint[];
begin
    -- Rows of leases that have run out are anybody's. One that is locked is being settled or
    -- extended at this moment.
    with expired as (
        select l.lease_token
        from @schema@.relay_group_leases as l
        where l.group_id = p_group.group_id
            and l.expires_at >= p_group.leases_since
            and l.expires_at <= clock_timestamp()
        for update skip locked
    ), gone as (
        delete from @schema@.relay_group_leases as l
        using expired as e
        where l.lease_token = e.lease_token
        returning l.outbox_ids
    )
    insert into @schema@.relay_group_returned (group_id, outbox_id)
    select p_group.group_id, i.outbox_id
    from gone
    cross join lateral unnest(gone.outbox_ids) as i (outbox_id)
    on conflict do nothing;

    v_returned := array(
        select r.outbox_id
        from @schema@.relay_group_returned as r
        where r.group_id = p_group.group_id
        order by r.outbox_id
        limit p_batch_size);
    execute format(
        $query$
        select
            coalesce(array_agg(s.id order by s.id), '{}'),
            coalesce(
                array_agg(s.id order by s.id) filter (
                    where s.place <= $2 and s.bytes_before < $3 and s.messages_before < $4),
                '{}')
        from (
            select
                o.id,
                row_number() over w as place,
                coalesce(sum(pg_column_size(o.payload)) over (
                    w rows between unbounded preceding and 1 preceding), 0) as bytes_before,
                coalesce(sum(coalesce(o.inserted_count, 0) + coalesce(o.deleted_count, 0)) over (
                    w rows between unbounded preceding and 1 preceding), 0) as messages_before
            from %s as o
            where o.id = any ($1)
            window w as (order by o.id)
        ) as s
        $query$, @schema@.relay_rows(p_relation, 'above => null, firsts => $1, lasts => $1, with_payload => true'))
    into v_existing, v_picked
    using v_returned || p_new, p_batch_size, p_max_bytes, coalesce(p_max_messages, 2147483647);

    if v_returned <> '{}' then
        delete from @schema@.relay_group_returned as r
        where r.group_id = p_group.group_id
            and r.outbox_id = any (v_returned)
            and (r.outbox_id = any (v_picked) or r.outbox_id <> all (v_existing));
    end if;
    return v_picked;
end
$$;
comment on function @schema@.relay_group_pick(@schema@.relay_groups, text, bigint[], integer, bigint, integer) is
    'The rows of this poll: lowest ids first, within batch size, bytes and messages, those of leases that ran out among them. Returned rows that were deleted meanwhile are dropped.';

create or replace function @schema@.relay_group_lease(
    p_group @schema@.relay_groups, p_consumer text, p_ids bigint[], p_frontier bigint,
    p_seconds integer, p_lease_token uuid
) returns uuid
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_now timestamptz := clock_timestamp();
    v_expires_at timestamptz := v_now + make_interval(secs => p_seconds);
    v_token uuid := case when p_ids <> '{}' then coalesce(p_lease_token, gen_random_uuid()) end;
begin
    -- An idle consumer is written every 3 seconds.
    insert into @schema@.relay_group_consumers as c
        (group_id, consumer_id, newest_lease, last_heartbeat_at)
    values (p_group.group_id, p_consumer, v_token, v_now)
    on conflict (group_id, consumer_id) do update
    set newest_lease = excluded.newest_lease, last_heartbeat_at = excluded.last_heartbeat_at
    where c.newest_lease is distinct from excluded.newest_lease
        or c.last_heartbeat_at not between v_now - interval '3 seconds' and v_now;
    if v_token is null then
        return null;
    end if;
    insert into @schema@.relay_group_leases
        (lease_token, group_id, consumer_id, outbox_ids, leased_at, expires_at)
    values (v_token, p_group.group_id, p_consumer, p_ids, v_now, v_expires_at);
    update @schema@.relay_groups as r
    set
        frontier = p_frontier,
        watermark = p_group.watermark,
        -- The lease just made counts too: the clock may have gone back.
        leases_since = coalesce(
            (select min(l.expires_at)
             from @schema@.relay_group_leases as l
             where l.group_id = p_group.group_id
                and l.expires_at >= least(p_group.leases_since, v_expires_at)),
            v_now)
    where r.group_id = p_group.group_id;
    return v_token;
end
$$;
comment on function @schema@.relay_group_lease(@schema@.relay_groups, text, bigint[], bigint, integer, uuid) is
    'Write down who holds the rows of this poll, and the group''s position; null where there are none.';

-- ---------------------------------------------------------------------------
-- Settling
-- ---------------------------------------------------------------------------
-- A lease is known by its token. Who gives none is known by name alone, and means the newest poll
-- under that name: a predecessor of the same name that was killed has an older lease, which runs
-- out and is delivered again.

create or replace function @schema@.relay_group_find_lease(
    p_group text, p_consumer text, p_lease_token uuid, p_last_offset bigint,
    out lease @schema@.relay_group_leases, out problem text[]
)
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_hint text;
    v_token uuid := nullif(p_lease_token, '00000000-0000-0000-0000-000000000000');
    g @schema@.relay_groups;
begin
    -- A lease that has run out but was not taken over is still good: nobody else has its rows.
    select l.* into lease
    from @schema@.relay_groups as r
    join @schema@.relay_group_consumers as c using (group_id)
    join @schema@.relay_group_leases as l using (group_id, consumer_id)
    where r.group_name = p_group
        and c.consumer_id = p_consumer
        and l.lease_token = coalesce(v_token, c.newest_lease)
    for update of l;
    if found then
        return;
    end if;
    begin
        g := @schema@.relay_group_find(p_group, false);
    exception
        when sqlstate 'RL022' then
            get stacked diagnostics v_hint = pg_exception_hint;
            problem := array[sqlstate, sqlerrm, v_hint];
            return;
    end;
    if v_token is null and p_last_offset <= g.watermark and not exists (
        select
        from @schema@.relay_group_consumers as c
        where c.group_id = g.group_id and c.consumer_id = p_consumer and c.newest_lease is not null)
    then
        return;
    end if;
    problem := array[
        'RL021',
        format('the lease of consumer "%s" of group "%s" is lost: it was settled, or it ran out and another consumer has its rows',
            p_consumer, p_group),
        'Poll again. Ask for a longer lease, or extend it while work goes on.'];
end
$$;
comment on function @schema@.relay_group_find_lease(text, text, uuid, bigint) is
    'The lease of this token, locked; null where nothing is leased and all up to the offset is settled. Returns what is wrong, for the caller to raise: RL021 where the lease is lost, RL022 where the group itself is missing, each with message and hint.';

create or replace function @schema@.commit_offset(
    "group" text, consumer text, last_offset bigint,
    lease_token uuid default '00000000-0000-0000-0000-000000000000'
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    "group" text not null := commit_offset."group";
    consumer text not null := commit_offset.consumer;
    last_offset bigint not null := commit_offset.last_offset;
    lease_token uuid not null := commit_offset.lease_token;
    v_found record := @schema@.relay_group_find_lease("group", consumer, lease_token, last_offset);
    v_lease @schema@.relay_group_leases := v_found.lease;
    v_rest bigint[];
begin
    if v_found.problem is not null then
        raise exception using
            errcode = v_found.problem[1], message = v_found.problem[2], hint = v_found.problem[3];
    end if;
    v_rest := array(
        select i.id from unnest(v_lease.outbox_ids) as i (id) where i.id > last_offset order by i.id);
    if v_rest <> '{}' then
        update @schema@.relay_group_leases as l
        set outbox_ids = v_rest
        where l.lease_token = v_lease.lease_token and l.outbox_ids <> v_rest;
        return;
    end if;
    delete from @schema@.relay_group_leases as l where l.lease_token = v_lease.lease_token;
    if lease_token = '00000000-0000-0000-0000-000000000000' then
        update @schema@.relay_group_consumers as c
        set newest_lease = null
        where c.group_id = v_lease.group_id
            and c.consumer_id = v_lease.consumer_id
            and c.newest_lease = v_lease.lease_token;
    end if;
end
$$;
comment on function @schema@.commit_offset(text, text, bigint, uuid) is
    'Definer, since only functions write leases. Settle what the poll of this token returned, without one the newest poll under this name, up to an id: never rows of another poll. RL021 where that lease is lost. By name a finished commit may be repeated. Does not lock the group.';

create or replace function @schema@.extend_lease(
    "group" text, consumer text, extension_seconds integer default 30,
    lease_token uuid default '00000000-0000-0000-0000-000000000000'
) returns timestamptz
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    consumer text not null := extend_lease.consumer;
    extension_seconds integer not null := extend_lease.extension_seconds;
    lease_token uuid not null := extend_lease.lease_token;
    v_found record;
    v_lease @schema@.relay_group_leases;
begin
    if extension_seconds not between 1 and 604800 then
        raise exception using
            errcode = '22023',
            message = format('a lease of %s seconds is out of range', extension_seconds),
            hint = 'Lease rows for 1 to 604800 seconds (a week).';
    end if;
    v_found := @schema@.relay_group_find_lease("group", consumer, lease_token, null);
    if v_found.problem is not null then
        raise exception using
            errcode = v_found.problem[1], message = v_found.problem[2], hint = v_found.problem[3];
    end if;
    v_lease := v_found.lease;
    v_lease.expires_at := greatest(
        v_lease.expires_at, clock_timestamp() + make_interval(secs => extension_seconds));
    update @schema@.relay_group_leases as l
    set expires_at = v_lease.expires_at
    where l.lease_token = v_lease.lease_token;
    perform @schema@.consumer_heartbeat("group", consumer);
    return v_lease.expires_at;
end
$$;
comment on function @schema@.extend_lease(text, text, integer, uuid) is
    'Definer, since only functions write leases. Keep the rows of the poll of this token, without one of the newest poll under this name, for so many seconds from now; never shortens. A heartbeat too. RL021 where they are lost.';

create or replace function @schema@.relay_group_release(p_group text, p_lease_token uuid)
returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    with gone as (
        delete from @schema@.relay_group_leases as l
        using @schema@.relay_groups as g
        where l.lease_token = p_lease_token
            and g.group_id = l.group_id
            and g.group_name = p_group
        returning l.group_id, l.outbox_ids
    ), returned as (
        insert into @schema@.relay_group_returned (group_id, outbox_id)
        select gone.group_id, i.outbox_id
        from gone
        cross join lateral unnest(gone.outbox_ids) as i (outbox_id)
        on conflict do nothing
    )
    select exists (select from gone)
$$;
comment on function @schema@.relay_group_release(text, uuid) is
    'Definer, since only functions write leases. Give the rows of a lease back at once; false when it was lost already.';

create or replace function @schema@.relay_group_leave(p_group text, p_consumer text) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    delete from @schema@.relay_group_consumers as c
    using @schema@.relay_groups as g
    where c.consumer_id = p_consumer
        and g.group_id = c.group_id
        and g.group_name = p_group
$$;
comment on function @schema@.relay_group_leave(text, text) is
    'Definer, since only functions write consumers. Forget a consumer that is gone for good. Leases it still has run out.';

create or replace function @schema@.seek_offset("group" text, consumer text, new_offset bigint)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    new_offset bigint not null := seek_offset.new_offset;
    g @schema@.relay_groups;
    v_outbox record;
    v_hint text;
begin
    g := @schema@.relay_group_find("group", true);
    select * into v_outbox from @schema@.relay_outbox_of(g.outbox_table_name);
    if new_offset not between 0 and v_outbox.last_id then
        raise exception using
            errcode = '22023',
            message = format('consumer group "%s" can''t be put at %s: outbox "%s" goes from 0 to %s',
                "group", new_offset, g.outbox_table_name, v_outbox.last_id),
            hint = 'A position beyond the end would skip rows that are not written yet.';
    end if;
    if new_offset < v_outbox.swept_through then
        raise warning using
            message = format('rows of outbox "%s" up to id %s were deleted by retention: consumer group "%s" starts with what is left',
                g.outbox_table_name, v_outbox.swept_through, "group");
    end if;
    -- Leases first: this waits for a release in progress, whose rows the next statement then sees.
    delete from @schema@.relay_group_leases as l where l.group_id = g.group_id;
    delete from @schema@.relay_group_returned as r where r.group_id = g.group_id;
    delete from @schema@.relay_group_gaps as p where p.group_id = g.group_id;
    delete from @schema@.relay_group_cohorts as c where c.group_id = g.group_id;
    update @schema@.relay_groups as r
    set
        frontier = new_offset,
        watermark = new_offset,
        leases_since = '-infinity',
        pgt_id = v_outbox.pgt_id
    where r.group_id = g.group_id;
    -- Last, as extend_lease does it: leases before consumers.
    perform @schema@.consumer_heartbeat("group", consumer);
exception
    when sqlstate 'RL022' or sqlstate 'RL005' then
        get stacked diagnostics v_hint = pg_exception_hint;
        raise exception using errcode = sqlstate, message = sqlerrm, hint = v_hint;
end
$$;
comment on function @schema@.seek_offset(text, text, bigint) is
    'Definer, since only functions write groups. Put the whole group at a new_offset, forward or back: a group has one, the consumer only says who asks. Rows above are delivered (again), rows up to it are not, all leases are lost.';

create or replace function @schema@.consumer_heartbeat("group" text, consumer text) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_hint text;
begin
    insert into @schema@.relay_group_consumers as c (group_id, consumer_id, last_heartbeat_at)
    select r.group_id, consumer, clock_timestamp()
    from @schema@.relay_groups as r
    where r.group_name = "group"
    on conflict (group_id, consumer_id) do update
    set last_heartbeat_at = excluded.last_heartbeat_at;
    if not found then
        begin
            perform @schema@.relay_group_find("group", false);
        exception
            when sqlstate 'RL022' then
                get stacked diagnostics v_hint = pg_exception_hint;
                raise exception using errcode = sqlstate, message = sqlerrm, hint = v_hint;
        end;
    end if;
end
$$;
comment on function @schema@.consumer_heartbeat(text, text) is
    'Definer, since only functions write consumers. Say that a consumer lives; consumer_lag shows it. Leases are kept by extend_lease only.';

create or replace function @schema@.consumer_lag("group" text)
returns table (
    consumer_id text, committed_offset bigint, max_outbox_id bigint, lag bigint,
    last_heartbeat_at timestamptz, is_alive boolean, leased_rows bigint, pending_gaps bigint,
    returned_rows bigint
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    g @schema@.relay_groups;
    v_hint text;
begin
    g := @schema@.relay_group_find("group", false);
    return query
    select
        c.consumer_id,
        g.watermark,
        o.max_id,
        greatest(o.max_id - g.watermark, 0),
        c.last_heartbeat_at,
        c.last_heartbeat_at > clock_timestamp() - interval '30 seconds',
        (select coalesce(sum(cardinality(l.outbox_ids)), 0)::bigint
         from @schema@.relay_group_leases as l
         where l.group_id = g.group_id and l.consumer_id = c.consumer_id),
        (select count(*) from @schema@.relay_group_gaps as p where p.group_id = g.group_id),
        (select count(*) from @schema@.relay_group_returned as r where r.group_id = g.group_id)
    from @schema@.relay_group_consumers as c
    cross join @schema@.relay_outbox_of(g.outbox_table_name) as o
    where c.group_id = g.group_id
    order by c.consumer_id;
exception
    when sqlstate 'RL022' then
        get stacked diagnostics v_hint = pg_exception_hint;
        raise exception using errcode = sqlstate, message = sqlerrm, hint = v_hint;
end
$$;
comment on function @schema@.consumer_lag(text) is
    'Definer, since only functions read groups. Each consumer of a group with the position that they share, the rows in its hands, and what else keeps the position down. The lag is a distance of ids. Alive: seen within 30 seconds, three heartbeats of the relay.';
