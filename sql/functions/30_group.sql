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

-- ---------------------------------------------------------------------------
-- Making and dropping
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_group_create(
    p_group text,
    p_outbox text,
    p_start text default 'earliest'
)
returns boolean
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_outbox record;
    v_existing text;
begin
    perform pgtrickle.relay_require_read_committed();
    if coalesce(length(p_group), 0) not between 1 and 200 then
        raise exception using
            errcode = '22023',
            message = 'a consumer group needs a name of 1 to 200 characters';
    end if;
    if p_start is null or p_start not in ('earliest', 'latest') then
        raise exception using
            errcode = '22023',
            message = format('consumer group "%s" can''t start at %L', p_group, p_start),
            hint = 'Start at ''earliest'' or at ''latest''.';
    end if;
    select * into v_outbox from pgtrickle.relay_outbox(p_outbox);
    if v_outbox.sequence_cache > 1 then
        raise exception using
            errcode = 'RL005',
            message = format('outbox "%s" hands out ids in blocks of %s',
                v_outbox.outbox_table, v_outbox.sequence_cache),
            detail = 'Ids drawn from a cached block are older than the lock that tells who may still use them.',
            hint = format('alter table %s alter column id set cache 1;', v_outbox.outbox_relation);
    end if;

    insert into pgtrickle.relay_groups as g
        (group_name, outbox_table, outbox_oid, auto_offset_reset, server_instance)
    values
        (p_group, v_outbox.outbox_table, v_outbox.outbox_oid, p_start,
         pgtrickle.relay_server_instance())
    on conflict (group_name) do nothing;
    if found then
        if p_start = 'latest' then
            perform pgtrickle.relay_group_start_at_end(p_group, p_outbox);
        end if;
        return true;
    end if;

    select g.outbox_table into v_existing from pgtrickle.relay_groups as g where g.group_name = p_group;
    if v_existing is distinct from v_outbox.outbox_table then
        raise exception using
            errcode = 'RL023',
            message = format('consumer group "%s" exists and reads outbox "%s", not "%s"',
                p_group, v_existing, v_outbox.outbox_table),
            hint = 'Choose another name, or drop the group first.';
    end if;
    return false;
end
$$;

comment on function pgtrickle.relay_group_create(text, text, text) is
    'Make a consumer group on an outbox (stream table or outbox table name); false where it exists already. Definer: groups are written by functions only.';

revoke all on function pgtrickle.relay_group_create(text, text, text) from public;

create or replace function pgtrickle.relay_group_start_at_end(p_group text, p_outbox text)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    g pgtrickle.relay_groups := pgtrickle.relay_group_lock(p_group);
    v_start record;
begin
    select * into v_start from pgtrickle.relay_outbox_end(p_outbox);
    perform pgtrickle.relay_group_note_gaps(
        g.group_id, v_start.gaps, pgtrickle.relay_outbox_holders(g.outbox_oid));
    update pgtrickle.relay_groups as r
    set frontier = v_start.after_id
    where r.group_id = g.group_id;
end
$$;

comment on function pgtrickle.relay_group_start_at_end(text, text) is
    'Put a new group behind the highest visible id. Ids missing below it are gaps, so that what is being written at this moment is delivered.';

revoke all on function pgtrickle.relay_group_start_at_end(text, text) from public;

create or replace function pgtrickle.relay_outbox_end(
    p_outbox text,
    out after_id bigint,
    out gaps int8multirange
)
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_outbox record;
begin
    select * into v_outbox from pgtrickle.relay_outbox(p_outbox);
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
        $query$, v_outbox.outbox_relation)
    into after_id, gaps
    using v_outbox.swept_through;
end
$$;

comment on function pgtrickle.relay_outbox_end(text) is
    'Highest visible id of an outbox and the ids missing below it, seen in one snapshot.';

revoke all on function pgtrickle.relay_outbox_end(text) from public;

create or replace function pgtrickle.relay_group_drop(p_group text)
returns boolean
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_group_id bigint;
begin
    delete from pgtrickle.relay_groups as g where g.group_name = p_group
    returning g.group_id into v_group_id;
    if not found then
        return false;
    end if;
    perform pgtrickle.relay_group_forget(v_group_id);
    delete from pgtrickle.relay_group_consumers as c where c.group_id = v_group_id;
    return true;
end
$$;

comment on function pgtrickle.relay_group_drop(text) is
    'Drop a consumer group with its position; false where there is none. Definer: groups are written by functions only.';

revoke all on function pgtrickle.relay_group_drop(text) from public;

create or replace function pgtrickle.relay_group_forget(p_group_id bigint)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Leases first: this waits for a release in progress, whose rows the next statement then sees.
    delete from pgtrickle.relay_group_leases as l where l.group_id = p_group_id;
    delete from pgtrickle.relay_group_returned as r where r.group_id = p_group_id;
    delete from pgtrickle.relay_group_gaps as p where p.group_id = p_group_id;
    delete from pgtrickle.relay_group_cohorts as c where c.group_id = p_group_id;
end
$$;

comment on function pgtrickle.relay_group_forget(bigint) is
    'Remove all exceptions from a group''s position.';

revoke all on function pgtrickle.relay_group_forget(bigint) from public;

-- ---------------------------------------------------------------------------
-- Polling
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_group_poll(
    p_group text,
    p_consumer text,
    p_batch_size integer default 100,
    p_visibility_seconds integer default 30,
    p_max_bytes bigint default 16777216
)
returns table (
    lease_token uuid,
    outbox_id bigint,
    refresh_id uuid,
    created_at timestamptz,
    inserted_count bigint,
    deleted_count bigint,
    is_claim_check boolean,
    payload jsonb,
    headers jsonb,
    pgt_id uuid
)
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    g pgtrickle.relay_groups;
    v_relation text;
    v_new bigint[];
    v_holders text[];
    v_ids bigint[];
    v_frontier bigint;
    v_token uuid;
begin
    perform pgtrickle.relay_group_check_arguments(
        p_consumer, p_batch_size, p_visibility_seconds, p_max_bytes);
    g := pgtrickle.relay_group_locate(pgtrickle.relay_group_lock(p_group));
    v_relation := pgtrickle.relay_relation(g.outbox_oid);

    v_new := pgtrickle.relay_group_read_new(v_relation, g.frontier, p_batch_size);
    if v_new = '{}' then
        perform pgtrickle.relay_group_check_end(g);
    end if;
    v_holders := pgtrickle.relay_group_watch(g, v_new);
    perform pgtrickle.relay_group_take_back(g);
    perform pgtrickle.relay_group_read_gaps(g.group_id, v_relation, p_batch_size, v_new = '{}');
    v_ids := pgtrickle.relay_group_pick(g.group_id, v_relation, v_new, p_batch_size, p_max_bytes);

    v_frontier := greatest(g.frontier, v_ids[cardinality(v_ids)]);
    perform pgtrickle.relay_group_note_gaps(
        g.group_id, pgtrickle.relay_holes(g.frontier, v_new, v_frontier), v_holders);
    v_token := pgtrickle.relay_group_lease(
        g, p_consumer, v_ids, v_frontier, p_visibility_seconds);

    return query execute format(
        $query$
        select
            $1, o.id, o.refresh_id, o.created_at, o.inserted_count::bigint,
            o.deleted_count::bigint, o.is_claim_check, o.payload, %s, o.pgt_id
        from %s as o
        where o.id = any ($2)
        order by o.id
        $query$, pgtrickle.relay_headers_expression(g.outbox_oid), v_relation)
    using v_token, v_ids;
end
$$;

comment on function pgtrickle.relay_group_poll(text, text, integer, integer, bigint) is
    'Lease the next rows of a group, in id order: returned ones first, then new ones; at least one, then as many as batch size and bytes (as stored) allow. Definer: the group''s tables are closed to its callers.';

revoke all on function pgtrickle.relay_group_poll(text, text, integer, integer, bigint) from public;

create or replace function pgtrickle.relay_group_check_arguments(
    p_consumer text,
    p_batch_size integer,
    p_visibility_seconds integer,
    p_max_bytes bigint
)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if coalesce(p_consumer, '') = '' then
        raise exception using
            errcode = '22023',
            message = 'a consumer needs a name',
            hint = 'Give each consumer of the group a name of its own.';
    end if;
    if p_batch_size is null or p_batch_size not between 1 and 100000 then
        raise exception using
            errcode = '22023',
            message = format('batch size %s is out of range', coalesce(p_batch_size::text, 'null')),
            hint = 'Ask for 1 to 100000 rows.';
    end if;
    if p_visibility_seconds is null or p_visibility_seconds not between 1 and 604800 then
        raise exception using
            errcode = '22023',
            message = format('a lease of %s seconds is out of range',
                coalesce(p_visibility_seconds::text, 'null')),
            hint = 'Lease rows for 1 to 604800 seconds (a week).';
    end if;
    if p_max_bytes is null or p_max_bytes < 1 then
        raise exception using
            errcode = '22023',
            message = format('a batch of %s bytes is out of range', coalesce(p_max_bytes::text, 'null')),
            hint = 'Allow at least 1 byte: a batch always has one row, whatever its size.';
    end if;
end
$$;

comment on function pgtrickle.relay_group_check_arguments(text, integer, integer, bigint) is
    'Refuse arguments of a poll that mean nothing.';

revoke all on function pgtrickle.relay_group_check_arguments(text, integer, integer, bigint) from public;

create or replace function pgtrickle.relay_require_read_committed()
returns void
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if pg_is_in_recovery() then
        raise exception using
            errcode = 'RL005',
            message = 'this server is a standby: consumer groups work on the primary only',
            hint = 'Connect to the primary.';
    end if;
    if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
        raise exception using
            errcode = 'RL005',
            message = format('consumer groups can''t be used at isolation level %s',
                current_setting('transaction_isolation')),
            detail = 'With one snapshot for the whole transaction a row that commits late could be lost.',
            hint = 'Use READ COMMITTED: begin isolation level read committed.';
    end if;
end
$$;

comment on function pgtrickle.relay_require_read_committed() is
    'Refuse standbys and isolation levels under which the order of a poll''s steps means nothing.';

revoke all on function pgtrickle.relay_require_read_committed() from public;

create or replace function pgtrickle.relay_group_lock(p_group text)
returns pgtrickle.relay_groups
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    g pgtrickle.relay_groups;
begin
    perform pgtrickle.relay_require_read_committed();
    select r.* into g
    from pgtrickle.relay_groups as r
    where r.group_name = p_group
    for no key update;
    if not found then
        perform pgtrickle.relay_group_missing(p_group);
    end if;
    return g;
end
$$;

comment on function pgtrickle.relay_group_lock(text) is
    'The group, locked until the transaction ends: polls of one group go one after another.';

revoke all on function pgtrickle.relay_group_lock(text) from public;

create or replace function pgtrickle.relay_group_missing(p_group text)
returns void
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception using
        errcode = 'RL022',
        message = format('consumer group "%s" does not exist', p_group),
        hint = format('select pgtrickle.create_consumer_group(%L, ''<stream table>'');', p_group);
end
$$;

comment on function pgtrickle.relay_group_missing(text) is
    'Raise RL022.';

revoke all on function pgtrickle.relay_group_missing(text) from public;

create or replace function pgtrickle.relay_group_locate(p_group pgtrickle.relay_groups)
returns pgtrickle.relay_groups
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_instance text := pgtrickle.relay_server_instance();
begin
    if pgtrickle.relay_relation(p_group.outbox_oid) is null then
        select o.outbox_oid into p_group.outbox_oid
        from pgtrickle.relay_outbox(p_group.outbox_table) as o;
    elsif p_group.server_instance = v_instance then
        return p_group;
    end if;
    -- The remembered holders mean nothing any more: every gap waits for all who hold the lock
    -- now, and is read again after that.
    update pgtrickle.relay_group_cohorts as c
    set holders = pgtrickle.relay_outbox_holders(p_group.outbox_oid), checked_through = 0
    where c.group_id = p_group.group_id;
    update pgtrickle.relay_groups as r
    set outbox_oid = p_group.outbox_oid, server_instance = v_instance
    where r.group_id = p_group.group_id;
    return p_group;
end
$$;

comment on function pgtrickle.relay_group_locate(pgtrickle.relay_groups) is
    'Follow an outbox that was made anew and a server that was started anew: all gaps are noted afresh.';

revoke all on function pgtrickle.relay_group_locate(pgtrickle.relay_groups) from public;

create or replace function pgtrickle.relay_server_instance()
returns text
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    -- After the crash of a backend the postmaster lives on, but a prepared transaction gets
    -- another virtual id; the reset time of the statistics tells such a restart.
    select concat_ws(
        ' ',
        extract(epoch from pg_postmaster_start_time()),
        extract(epoch from pg_stat_get_bgwriter_stat_reset_time()))
$$;

comment on function pgtrickle.relay_server_instance() is
    'Name of this run of the server: virtual transaction ids are comparable within it.';

revoke all on function pgtrickle.relay_server_instance() from public;

create or replace function pgtrickle.relay_relation(p_oid oid)
returns text
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select format('%I.%I', n.nspname, c.relname)
    from pg_class as c
    join pg_namespace as n on n.oid = c.relnamespace
    where c.oid = p_oid
$$;

comment on function pgtrickle.relay_relation(oid) is
    'Quoted, qualified name of a table for use in SQL text; null when it is gone.';

revoke all on function pgtrickle.relay_relation(oid) from public;

create or replace function pgtrickle.relay_headers_expression(p_oid oid)
returns text
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select case
        when exists (
            select from pg_attribute as a
            where a.attrelid = p_oid and a.attname = 'headers' and not a.attisdropped)
        then 'o.headers'
        else $literal$'{}'::jsonb$literal$
    end
$$;

comment on function pgtrickle.relay_headers_expression(oid) is
    'SQL text that reads the headers of an outbox row aliased o; outboxes of the extension have none.';

revoke all on function pgtrickle.relay_headers_expression(oid) from public;

create or replace function pgtrickle.relay_outbox_holders(p_outbox oid)
returns text[]
language sql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(array_agg(distinct l.virtualtransaction order by l.virtualtransaction), '{}')
    from pg_locks as l
    where l.locktype = 'relation'
        and l.database = (select d.oid from pg_database as d where d.datname = current_database())
        and l.relation = p_outbox
        and l.mode = 'RowExclusiveLock'
        and l.granted
$$;

comment on function pgtrickle.relay_outbox_holders(oid) is
    'Transactions that may have drawn an id of the outbox and not yet shown it.';

revoke all on function pgtrickle.relay_outbox_holders(oid) from public;

create or replace function pgtrickle.relay_group_read_new(
    p_relation text,
    p_frontier bigint,
    p_limit integer
)
returns bigint[]
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_ids bigint[];
begin
    execute format(
        $query$
        select coalesce(array_agg(r.id order by r.id), '{}')
        from (select o.id from %s as o where o.id > $1 order by o.id limit $2) as r
        $query$, p_relation)
    into v_ids
    using p_frontier, p_limit;
    return v_ids;
end
$$;

comment on function pgtrickle.relay_group_read_new(text, bigint, integer) is
    'Step 1 of a poll: ids above the frontier.';

revoke all on function pgtrickle.relay_group_read_new(text, bigint, integer) from public;

create or replace function pgtrickle.relay_group_check_end(p_group pgtrickle.relay_groups)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_last_id bigint;
begin
    select o.last_id into v_last_id from pgtrickle.relay_outbox(p_group.outbox_table) as o;
    if v_last_id < p_group.frontier then
        raise exception using
            errcode = 'RL005',
            message = format('consumer group "%s" stands at id %s, but outbox "%s" ends at id %s',
                p_group.group_name, p_group.frontier, p_group.outbox_table, v_last_id),
            detail = 'The outbox was made anew or restored from an older state; its next rows would be skipped.',
            hint = format('select pgtrickle.seek_offset(%L, ''<consumer>'', 0);', p_group.group_name);
    end if;
end
$$;

comment on function pgtrickle.relay_group_check_end(pgtrickle.relay_groups) is
    'Refuse to wait for rows at a position that the outbox has not reached.';

revoke all on function pgtrickle.relay_group_check_end(pgtrickle.relay_groups) from public;

create or replace function pgtrickle.relay_group_watch(
    p_group pgtrickle.relay_groups,
    p_new bigint[]
)
returns text[]
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_complete boolean :=
        p_new[cardinality(p_new)] - p_group.frontier = cardinality(p_new) or p_new = '{}';
    v_holders text[];
begin
    if v_complete and not exists (
        select from pgtrickle.relay_group_cohorts as c where c.group_id = p_group.group_id
    ) then
        return '{}';
    end if;
    v_holders := pgtrickle.relay_outbox_holders(p_group.outbox_oid);
    update pgtrickle.relay_group_cohorts as c
    set
        holders = array(
            select h.holder from unnest(c.holders) as h (holder)
            where h.holder = any (v_holders)
            order by h.holder),
        checked_through = 0
    where c.group_id = p_group.group_id
        and not c.holders <@ v_holders;
    return v_holders;
end
$$;

comment on function pgtrickle.relay_group_watch(pgtrickle.relay_groups, bigint[]) is
    'Step 2 of a poll: the lock''s holders; cohorts that lost one are marked for reading. Spared where no id is missing.';

revoke all on function pgtrickle.relay_group_watch(pgtrickle.relay_groups, bigint[]) from public;

create or replace function pgtrickle.relay_group_take_back(p_group pgtrickle.relay_groups)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := clock_timestamp();
begin
    -- A lease that is locked is being settled or extended at this moment.
    with expired as (
        select l.lease_token
        from pgtrickle.relay_group_leases as l
        where l.group_id = p_group.group_id
            and l.expires_at >= p_group.leases_since
            and l.expires_at <= v_now
        for update skip locked
    ), gone as (
        delete from pgtrickle.relay_group_leases as l
        using expired as e
        where l.lease_token = e.lease_token
        returning l.outbox_ids
    )
    insert into pgtrickle.relay_group_returned (group_id, outbox_id)
    select p_group.group_id, i.outbox_id
    from gone
    cross join lateral unnest(gone.outbox_ids) as i (outbox_id)
    on conflict do nothing;
end
$$;

comment on function pgtrickle.relay_group_take_back(pgtrickle.relay_groups) is
    'Rows of leases that have run out become anybody''s; their tokens are lost.';

revoke all on function pgtrickle.relay_group_take_back(pgtrickle.relay_groups) from public;

create or replace function pgtrickle.relay_group_pick(
    p_group_id bigint,
    p_relation text,
    p_new bigint[],
    p_batch_size integer,
    p_max_bytes bigint
)
returns bigint[]
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_returned bigint[];
    v_existing bigint[];
    v_picked bigint[];
begin
    v_returned := array(
        select r.outbox_id
        from pgtrickle.relay_group_returned as r
        where r.group_id = p_group_id
        order by r.outbox_id
        limit p_batch_size);
    if v_returned = '{}' and p_new = '{}' then
        return '{}';
    end if;
    execute format(
        $query$
        select
            coalesce(array_agg(s.id order by s.id), '{}'),
            coalesce(
                array_agg(s.id order by s.id)
                    filter (where s.place <= $2 and s.bytes_before < $3),
                '{}')
        from (
            select
                o.id,
                row_number() over w as place,
                coalesce(sum(pg_column_size(o.payload)) over (
                    w rows between unbounded preceding and 1 preceding), 0) as bytes_before
            from %s as o
            where o.id = any ($1)
            window w as (order by o.id)
        ) as s
        $query$, p_relation)
    into v_existing, v_picked
    using v_returned || p_new, p_batch_size, p_max_bytes;

    if v_returned <> '{}' then
        delete from pgtrickle.relay_group_returned as r
        where r.group_id = p_group_id
            and r.outbox_id = any (v_returned)
            and (r.outbox_id = any (v_picked) or r.outbox_id <> all (v_existing));
    end if;
    return v_picked;
end
$$;

comment on function pgtrickle.relay_group_pick(bigint, text, bigint[], integer, bigint) is
    'The rows of this poll: lowest ids first, within batch size and bytes. Returned rows that were deleted meanwhile are dropped.';

revoke all on function pgtrickle.relay_group_pick(bigint, text, bigint[], integer, bigint) from public;

create or replace function pgtrickle.relay_group_lease(
    p_group pgtrickle.relay_groups,
    p_consumer text,
    p_ids bigint[],
    p_frontier bigint,
    p_visibility_seconds integer
)
returns uuid
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := clock_timestamp();
    v_expires_at timestamptz := v_now + make_interval(secs => p_visibility_seconds);
    v_token uuid;
    v_watermark bigint;
begin
    if p_ids <> '{}' then
        v_token := gen_random_uuid();
        insert into pgtrickle.relay_group_leases
            (lease_token, group_id, consumer_id, outbox_ids, leased_at, expires_at)
        values
            (v_token, p_group.group_id, p_consumer, p_ids, v_now, v_expires_at);
    end if;
    perform pgtrickle.relay_group_seen(p_group.group_id, p_consumer, v_token);
    p_group.frontier := p_frontier;
    v_watermark := pgtrickle.relay_group_low(p_group);
    if v_token is not null or v_watermark > p_group.watermark then
        update pgtrickle.relay_groups as r
        set
            frontier = p_frontier,
            watermark = greatest(r.watermark, v_watermark),
            -- The lease just made counts too: the clock may have gone back.
            leases_since = coalesce(
                (select min(l.expires_at)
                 from pgtrickle.relay_group_leases as l
                 where l.group_id = p_group.group_id
                    and l.expires_at >= least(p_group.leases_since, v_expires_at)),
                v_now)
        where r.group_id = p_group.group_id;
    end if;
    return v_token;
end
$$;

comment on function pgtrickle.relay_group_lease(pgtrickle.relay_groups, text, bigint[], bigint, integer) is
    'Write down who holds the rows of this poll, and the group''s position.';

revoke all on function pgtrickle.relay_group_lease(pgtrickle.relay_groups, text, bigint[], bigint, integer) from public;

create or replace function pgtrickle.relay_group_seen(
    p_group_id bigint,
    p_consumer text,
    p_lease_token uuid
)
returns void
language sql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
    insert into pgtrickle.relay_group_consumers as c
        (group_id, consumer_id, newest_lease, last_heartbeat_at)
    values
        (p_group_id, p_consumer, p_lease_token, clock_timestamp())
    on conflict (group_id, consumer_id) do update
    set newest_lease = excluded.newest_lease, last_heartbeat_at = excluded.last_heartbeat_at
    where c.newest_lease is distinct from excluded.newest_lease
        or c.last_heartbeat_at not between
            excluded.last_heartbeat_at - interval '3 seconds' and excluded.last_heartbeat_at
$$;

comment on function pgtrickle.relay_group_seen(bigint, text, uuid) is
    'Remember a consumer and the lease of its newest poll; an idle one is written every 3 seconds.';

revoke all on function pgtrickle.relay_group_seen(bigint, text, uuid) from public;

create or replace function pgtrickle.relay_group_low(p_group pgtrickle.relay_groups)
returns bigint
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(
        least(
            (select p.first_id
             from pgtrickle.relay_group_gaps as p
             where p.group_id = p_group.group_id and p.first_id > p_group.watermark
             order by p.first_id
             limit 1),
            (select min(l.outbox_ids[1])
             from pgtrickle.relay_group_leases as l
             where l.group_id = p_group.group_id and l.expires_at >= p_group.leases_since),
            (select r.outbox_id
             from pgtrickle.relay_group_returned as r
             where r.group_id = p_group.group_id and r.outbox_id > p_group.watermark
             order by r.outbox_id
             limit 1)
        ) - 1,
        p_group.frontier)
$$;

comment on function pgtrickle.relay_group_low(pgtrickle.relay_groups) is
    'Id up to which everything is settled without exception.';

revoke all on function pgtrickle.relay_group_low(pgtrickle.relay_groups) from public;

-- ---------------------------------------------------------------------------
-- Gaps
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_holes(
    p_after bigint,
    p_ids bigint[],
    p_through bigint
)
returns int8multirange
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(range_agg(int8range(r.previous + 1, r.id)), '{}')
    from (
        select i.id, lag(i.id, 1, p_after) over (order by i.id) as previous
        from unnest(p_ids) as i (id)
        where i.id <= p_through
    ) as r
    where r.id > r.previous + 1
$$;

comment on function pgtrickle.relay_holes(bigint, bigint[], bigint) is
    'Ids missing between p_after and the last of the given ids that is not above p_through.';

revoke all on function pgtrickle.relay_holes(bigint, bigint[], bigint) from public;

create or replace function pgtrickle.relay_group_note_gaps(
    p_group_id bigint,
    p_gaps int8multirange,
    p_holders text[]
)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_cohort_id bigint;
begin
    if isempty(p_gaps) then
        return;
    end if;
    insert into pgtrickle.relay_group_cohorts (group_id, holders, checked_through)
    values (p_group_id, p_holders, 0)
    returning cohort_id into v_cohort_id;
    insert into pgtrickle.relay_group_gaps (group_id, first_id, last_id, cohort_id)
    select p_group_id, lower(r.gap), upper(r.gap) - 1, v_cohort_id
    from unnest(p_gaps) as r (gap);
end
$$;

comment on function pgtrickle.relay_group_note_gaps(bigint, int8multirange, text[]) is
    'Step 4 of a poll: remember missing ids with the transactions that may still show them.';

revoke all on function pgtrickle.relay_group_note_gaps(bigint, int8multirange, text[]) from public;

create or replace function pgtrickle.relay_group_read_gaps(
    p_group_id bigint,
    p_relation text,
    p_limit integer,
    p_is_idle boolean
)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    c_slice constant integer := 1000;
    v_cohort pgtrickle.relay_group_cohorts;
    v_slices integer := 0;
    v_found integer := 0;
    v_until timestamptz := clock_timestamp() + interval '300 milliseconds';
begin
    -- Bounded, since the group is locked: the next polls go on where this one stops, faster than
    -- polls of this size note gaps. A poll that has nothing else to deliver looks longer.
    while v_found < p_limit
        and (v_slices < 5 + 2 * p_limit / c_slice or (p_is_idle and v_found = 0 and clock_timestamp() < v_until))
    loop
        select c.* into v_cohort
        from pgtrickle.relay_group_cohorts as c
        where c.group_id = p_group_id and c.checked_through is not null
        order by c.cohort_id
        limit 1;
        exit when not found;
        v_found := v_found
            + pgtrickle.relay_group_read_slice(v_cohort, p_relation, c_slice, p_limit - v_found);
        v_slices := v_slices + 1;
    end loop;
end
$$;

comment on function pgtrickle.relay_group_read_gaps(bigint, text, integer, boolean) is
    'Step 3 of a poll: read marked cohorts again; rows that have become visible are returned rows from now on.';

revoke all on function pgtrickle.relay_group_read_gaps(bigint, text, integer, boolean) from public;

create or replace function pgtrickle.relay_group_read_slice(
    p_cohort pgtrickle.relay_group_cohorts,
    p_relation text,
    p_slice integer,
    p_limit integer
)
returns integer
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_first bigint[];
    v_last bigint[];
    v_found bigint[];
    v_through bigint;
begin
    select array_agg(s.first_id order by s.first_id), array_agg(s.last_id order by s.first_id)
    into v_first, v_last
    from (
        select p.first_id, p.last_id
        from pgtrickle.relay_group_gaps as p
        where p.cohort_id = p_cohort.cohort_id and p.first_id > p_cohort.checked_through
        order by p.first_id
        limit p_slice
    ) as s;
    if v_first is null then
        perform pgtrickle.relay_group_cohort_checked(p_cohort);
        return 0;
    end if;

    execute format(
        $query$
        select coalesce(array_agg(f.id order by f.id), '{}')
        from (
            select v.id
            from unnest($1, $2) as s (first_id, last_id)
            cross join lateral (
                select o.id
                from %s as o
                where o.id between s.first_id and s.last_id
                order by o.id
                limit $3
            ) as v
            order by v.id
            limit $3
        ) as f
        $query$, p_relation)
    into v_found
    using v_first, v_last, p_limit;

    v_through := case
        when cardinality(v_found) = p_limit then v_found[p_limit]
        else v_last[cardinality(v_last)]
    end;
    perform pgtrickle.relay_group_close_gaps(
        p_cohort, v_first[1], v_through, v_found);
    if v_through = v_last[cardinality(v_last)] and cardinality(v_first) < p_slice then
        perform pgtrickle.relay_group_cohort_checked(p_cohort);
    else
        update pgtrickle.relay_group_cohorts as c
        set checked_through = v_through
        where c.cohort_id = p_cohort.cohort_id;
    end if;
    return cardinality(v_found);
end
$$;

comment on function pgtrickle.relay_group_read_slice(pgtrickle.relay_group_cohorts, text, integer, integer) is
    'Read the next gaps of one cohort; gives the number of rows that have become visible.';

revoke all on function pgtrickle.relay_group_read_slice(pgtrickle.relay_group_cohorts, text, integer, integer) from public;

create or replace function pgtrickle.relay_group_close_gaps(
    p_cohort pgtrickle.relay_group_cohorts,
    p_from bigint,
    p_through bigint,
    p_found bigint[]
)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    -- Without a holder left, what was read and not seen was rolled back.
    v_decided boolean := p_cohort.holders = '{}';
    v_closed int8multirange := case
        when v_decided then int8multirange(int8range(p_from, p_through, '[]'))
        else (select coalesce(range_agg(int8range(f.id, f.id, '[]')), '{}')
              from unnest(p_found) as f (id))
    end;
begin
    insert into pgtrickle.relay_group_returned (group_id, outbox_id)
    select p_cohort.group_id, f.id from unnest(p_found) as f (id);

    with touched as (
        delete from pgtrickle.relay_group_gaps as p
        where p.cohort_id = p_cohort.cohort_id
            and p.first_id between p_from and p_through
            and (v_decided or int8range(p.first_id, p.last_id, '[]') && v_closed)
        returning p.first_id, p.last_id
    )
    insert into pgtrickle.relay_group_gaps (group_id, first_id, last_id, cohort_id)
    select p_cohort.group_id, lower(r.rest), upper(r.rest) - 1, p_cohort.cohort_id
    from touched as t
    cross join lateral unnest(
        int8multirange(int8range(t.first_id, t.last_id, '[]')) - v_closed) as r (rest);
end
$$;

comment on function pgtrickle.relay_group_close_gaps(pgtrickle.relay_group_cohorts, bigint, bigint, bigint[]) is
    'Take the rows found, and all that is decided, out of the gaps of one cohort.';

revoke all on function pgtrickle.relay_group_close_gaps(pgtrickle.relay_group_cohorts, bigint, bigint, bigint[]) from public;

create or replace function pgtrickle.relay_group_cohort_checked(
    p_cohort pgtrickle.relay_group_cohorts
)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    -- Moving gaps costs a write each; two cohorts with the same holders are harmless.
    c_movable constant bigint := 10000;
    v_twin_id bigint;
    v_gaps bigint := pgtrickle.relay_group_cohort_size(p_cohort.cohort_id, c_movable + 1);
begin
    if v_gaps = 0 then
        delete from pgtrickle.relay_group_cohorts as c where c.cohort_id = p_cohort.cohort_id;
        return;
    end if;
    if v_gaps <= c_movable then
        select c.cohort_id into v_twin_id
        from pgtrickle.relay_group_cohorts as c
        where c.group_id = p_cohort.group_id
            and c.holders = p_cohort.holders
            and c.checked_through is null
        order by c.cohort_id desc
        limit 1;
    end if;
    if v_twin_id is null then
        update pgtrickle.relay_group_cohorts as c
        set checked_through = null
        where c.cohort_id = p_cohort.cohort_id;
        return;
    end if;
    update pgtrickle.relay_group_gaps as p
    set cohort_id = v_twin_id
    where p.cohort_id = p_cohort.cohort_id;
    delete from pgtrickle.relay_group_cohorts as c where c.cohort_id = p_cohort.cohort_id;
end
$$;

comment on function pgtrickle.relay_group_cohort_checked(pgtrickle.relay_group_cohorts) is
    'A cohort has been read to its end: it is gone, joins another with the same holders, or rests.';

revoke all on function pgtrickle.relay_group_cohort_checked(pgtrickle.relay_group_cohorts) from public;

create or replace function pgtrickle.relay_group_cohort_size(p_cohort_id bigint, p_limit bigint)
returns bigint
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select count(*)
    from (
        select from pgtrickle.relay_group_gaps as p where p.cohort_id = p_cohort_id limit p_limit
    ) as g
$$;

comment on function pgtrickle.relay_group_cohort_size(bigint, bigint) is
    'Number of gaps in a cohort, counted up to a limit.';

revoke all on function pgtrickle.relay_group_cohort_size(bigint, bigint) from public;

-- ---------------------------------------------------------------------------
-- Settling
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_group_commit(p_group text, p_lease_token uuid)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    -- A lease that has run out but was not taken over is still good: nobody else has its rows.
    delete from pgtrickle.relay_group_leases as l
    using pgtrickle.relay_groups as g
    where l.lease_token = p_lease_token
        and g.group_id = l.group_id
        and g.group_name = p_group;
    if not found then
        perform pgtrickle.relay_group_lease_lost(p_group, p_lease_token::text);
    end if;
end
$$;

comment on function pgtrickle.relay_group_commit(text, uuid) is
    'Settle exactly the rows of a lease. Does not lock the group. Definer: leases are written by functions only.';

revoke all on function pgtrickle.relay_group_commit(text, uuid) from public;

create or replace function pgtrickle.relay_group_lease_lost(p_group text, p_lease text)
returns void
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if not exists (select from pgtrickle.relay_groups as g where g.group_name = p_group) then
        perform pgtrickle.relay_group_missing(p_group);
    end if;
    raise exception using
        errcode = 'RL021',
        message = format('lease %s of consumer group "%s" is lost', coalesce(p_lease, 'null'), p_group),
        detail = 'It was settled or given back before, or it ran out and its rows went to another consumer.',
        hint = 'Poll again. Ask for a longer lease, or extend it while work goes on.';
end
$$;

comment on function pgtrickle.relay_group_lease_lost(text, text) is
    'Raise RL021, or RL022 where the group itself is missing.';

revoke all on function pgtrickle.relay_group_lease_lost(text, text) from public;

create or replace function pgtrickle.relay_group_extend(
    p_group text,
    p_lease_token uuid,
    p_seconds integer
)
returns timestamptz
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_expires_at timestamptz;
begin
    if p_seconds is null or p_seconds not between 1 and 604800 then
        raise exception using
            errcode = '22023',
            message = format('a lease of %s seconds is out of range', coalesce(p_seconds::text, 'null')),
            hint = 'Lease rows for 1 to 604800 seconds (a week).';
    end if;
    update pgtrickle.relay_group_leases as l
    set expires_at = greatest(l.expires_at, clock_timestamp() + make_interval(secs => p_seconds))
    from pgtrickle.relay_groups as g
    where l.lease_token = p_lease_token
        and g.group_id = l.group_id
        and g.group_name = p_group
    returning l.expires_at into v_expires_at;
    if not found then
        perform pgtrickle.relay_group_lease_lost(p_group, p_lease_token::text);
    end if;
    return v_expires_at;
end
$$;

comment on function pgtrickle.relay_group_extend(text, uuid, integer) is
    'Keep a lease for so many seconds from now; never shortens it. Definer: leases are written by functions only.';

revoke all on function pgtrickle.relay_group_extend(text, uuid, integer) from public;

create or replace function pgtrickle.relay_group_release(p_group text, p_lease_token uuid)
returns boolean
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_returned boolean;
begin
    with gone as (
        delete from pgtrickle.relay_group_leases as l
        using pgtrickle.relay_groups as g
        where l.lease_token = p_lease_token
            and g.group_id = l.group_id
            and g.group_name = p_group
        returning l.group_id, l.outbox_ids
    ), returned as (
        insert into pgtrickle.relay_group_returned (group_id, outbox_id)
        select gone.group_id, i.outbox_id
        from gone
        cross join lateral unnest(gone.outbox_ids) as i (outbox_id)
        on conflict do nothing
    )
    select true into v_returned from gone;
    return coalesce(v_returned, false);
end
$$;

comment on function pgtrickle.relay_group_release(text, uuid) is
    'Give the rows of a lease back at once; false when it was lost already. Definer: leases are written by functions only.';

revoke all on function pgtrickle.relay_group_release(text, uuid) from public;

create or replace function pgtrickle.relay_group_heartbeat(p_group text, p_consumer text)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    insert into pgtrickle.relay_group_consumers as c (group_id, consumer_id, last_heartbeat_at)
    select g.group_id, p_consumer, clock_timestamp()
    from pgtrickle.relay_groups as g
    where g.group_name = p_group
    on conflict (group_id, consumer_id) do update
    set last_heartbeat_at = excluded.last_heartbeat_at;
    if not found then
        perform pgtrickle.relay_group_missing(p_group);
    end if;
end
$$;

comment on function pgtrickle.relay_group_heartbeat(text, text) is
    'Say that a consumer lives. Definer: consumers are written by functions only.';

revoke all on function pgtrickle.relay_group_heartbeat(text, text) from public;

create or replace function pgtrickle.relay_group_seek(p_group text, p_offset bigint)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    g pgtrickle.relay_groups := pgtrickle.relay_group_lock(p_group);
    v_outbox record;
begin
    select * into v_outbox from pgtrickle.relay_outbox(g.outbox_table);
    if p_offset is null or p_offset not between 0 and v_outbox.last_id then
        raise exception using
            errcode = '22023',
            message = format('consumer group "%s" can''t be put at %s: outbox "%s" goes from 0 to %s',
                p_group, coalesce(p_offset::text, 'null'), g.outbox_table, v_outbox.last_id),
            hint = 'A position beyond the end would skip rows that are not written yet.';
    end if;
    if p_offset < v_outbox.swept_through then
        raise warning using
            message = format('rows of outbox "%s" up to id %s were deleted by retention',
                g.outbox_table, v_outbox.swept_through),
            detail = format('Consumer group "%s" starts with what is left.', p_group);
    end if;
    perform pgtrickle.relay_group_forget(g.group_id);
    update pgtrickle.relay_groups as r
    set
        frontier = p_offset,
        watermark = p_offset,
        leases_since = '-infinity',
        outbox_oid = v_outbox.outbox_oid,
        server_instance = pgtrickle.relay_server_instance()
    where r.group_id = g.group_id;
end
$$;

comment on function pgtrickle.relay_group_seek(text, bigint) is
    'Put a group at a position, forward or back: rows above are delivered (again), rows up to it are not, all leases are lost. Definer: groups are written by functions only.';

revoke all on function pgtrickle.relay_group_seek(text, bigint) from public;

-- ---------------------------------------------------------------------------
-- Looking
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_group_watermark(p_group text)
returns bigint
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    g pgtrickle.relay_groups;
begin
    select r.* into g from pgtrickle.relay_groups as r where r.group_name = p_group;
    if not found then
        perform pgtrickle.relay_group_missing(p_group);
    end if;
    return pgtrickle.relay_group_low(g);
end
$$;

comment on function pgtrickle.relay_group_watermark(text) is
    'Every row of the outbox up to this id is settled by the group. Never goes back, but for seek_offset. Definer: groups are read by functions only.';

revoke all on function pgtrickle.relay_group_watermark(text) from public;

create or replace function pgtrickle.relay_group_status(p_group text)
returns table (
    outbox_table text,
    watermark bigint,
    frontier bigint,
    max_outbox_id bigint,
    pending_gaps bigint,
    leased_rows bigint,
    returned_rows bigint
)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    g pgtrickle.relay_groups;
begin
    select r.* into g from pgtrickle.relay_groups as r where r.group_name = p_group;
    if not found then
        perform pgtrickle.relay_group_missing(p_group);
    end if;
    return query
    select
        g.outbox_table,
        pgtrickle.relay_group_low(g),
        g.frontier,
        o.max_id,
        (select count(*) from pgtrickle.relay_group_gaps as p where p.group_id = g.group_id),
        (select coalesce(sum(cardinality(l.outbox_ids)), 0)::bigint
         from pgtrickle.relay_group_leases as l where l.group_id = g.group_id),
        (select count(*) from pgtrickle.relay_group_returned as r where r.group_id = g.group_id)
    from pgtrickle.relay_outbox(g.outbox_table) as o;
end
$$;

comment on function pgtrickle.relay_group_status(text) is
    'Position of a group and what keeps its watermark down. Definer: groups are read by functions only.';

revoke all on function pgtrickle.relay_group_status(text) from public;

-- ---------------------------------------------------------------------------
-- The names of pg_trickle 0.28
-- ---------------------------------------------------------------------------
-- They carry no lease token, so a consumer is known by its name alone. What keeps them sound:
-- only the lease of the newest poll under that name counts. A predecessor of the same name that
-- was killed has an older lease, which runs out and is delivered again; a late row that another
-- poll returned is in another lease, whatever its id.

create or replace function pgtrickle.relay_group_newest_lease(p_group text, p_consumer text)
returns uuid
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select c.newest_lease
    from pgtrickle.relay_groups as g
    join pgtrickle.relay_group_consumers as c using (group_id)
    where g.group_name = p_group
        and c.consumer_id = p_consumer
$$;

comment on function pgtrickle.relay_group_newest_lease(text, text) is
    'Lease of a consumer''s newest poll; null when that was empty or is settled. It may be lost.';

revoke all on function pgtrickle.relay_group_newest_lease(text, text) from public;

create or replace function pgtrickle.relay_group_commit_through(
    p_group text,
    p_consumer text,
    p_last_offset bigint
)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_token uuid := pgtrickle.relay_group_newest_lease(p_group, p_consumer);
    v_held bigint[];
    v_rest bigint[];
begin
    if v_token is null and p_last_offset <= pgtrickle.relay_group_watermark(p_group) then
        return;
    end if;
    select l.outbox_ids into v_held
    from pgtrickle.relay_group_leases as l
    where l.lease_token = v_token
    for update;
    if not found then
        perform pgtrickle.relay_group_lease_lost(p_group, format('of consumer %s', p_consumer));
    end if;
    v_rest := array(select i.id from unnest(v_held) as i (id) where i.id > p_last_offset order by i.id);
    if v_rest = '{}' then
        delete from pgtrickle.relay_group_leases as l where l.lease_token = v_token;
        update pgtrickle.relay_group_consumers as c
        set newest_lease = null
        where c.consumer_id = p_consumer and c.newest_lease = v_token;
    elsif v_rest <> v_held then
        update pgtrickle.relay_group_leases as l set outbox_ids = v_rest where l.lease_token = v_token;
    end if;
end
$$;

comment on function pgtrickle.relay_group_commit_through(text, text, bigint) is
    'Settle what the consumer''s newest poll returned, up to an id; repeating a finished commit does nothing. Definer: leases are written by functions only.';

revoke all on function pgtrickle.relay_group_commit_through(text, text, bigint) from public;

create or replace function pgtrickle.relay_group_extend_newest(
    p_group text,
    p_consumer text,
    p_seconds integer
)
returns timestamptz
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_token uuid := pgtrickle.relay_group_newest_lease(p_group, p_consumer);
begin
    if v_token is null then
        perform pgtrickle.relay_group_lease_lost(p_group, format('of consumer %s', p_consumer));
    end if;
    return pgtrickle.relay_group_extend(p_group, v_token, p_seconds);
end
$$;

comment on function pgtrickle.relay_group_extend_newest(text, text, integer) is
    'Extend the lease of a consumer''s newest poll. Definer: leases are read by functions only.';

revoke all on function pgtrickle.relay_group_extend_newest(text, text, integer) from public;

create or replace function pgtrickle.relay_group_lag(p_group text)
returns table (
    consumer_id text,
    committed_offset bigint,
    max_outbox_id bigint,
    lag bigint,
    last_heartbeat_at timestamptz,
    is_alive boolean
)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    s record;
begin
    select * into s from pgtrickle.relay_group_status(p_group);
    return query
    select
        c.consumer_id,
        s.watermark,
        s.max_outbox_id,
        greatest(s.max_outbox_id - s.watermark, 0),
        c.last_heartbeat_at,
        c.last_heartbeat_at > clock_timestamp() - interval '30 seconds'
    from pgtrickle.relay_group_consumers as c
    join pgtrickle.relay_groups as g using (group_id)
    where g.group_name = p_group
    order by c.consumer_id;
end
$$;

comment on function pgtrickle.relay_group_lag(text) is
    'Consumers of a group with the group''s position. Alive: seen within 30 seconds, three heartbeats of the relay. Definer: consumers are read by functions only.';

revoke all on function pgtrickle.relay_group_lag(text) from public;

do $only_if_ours$
begin
    if pgtrickle.relay_may_define('create_consumer_group') then
        create or replace function pgtrickle.create_consumer_group(
            name text,
            outbox text,
            auto_offset_reset text default 'latest'
        )
        returns void
        language plpgsql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
        begin
            if not pgtrickle.relay_group_create(name, outbox, auto_offset_reset) then
                raise exception using
                    errcode = 'RL023',
                    message = format('consumer group "%s" exists already', name),
                    hint = format('Choose another name, or: select pgtrickle.drop_consumer_group(%L);', name);
            end if;
        end
        $function$;

        comment on function pgtrickle.create_consumer_group(text, text, text) is
            'Make a consumer group. From ''latest'' it delivers what is not visible now, transactions in progress included.';

        revoke all on function pgtrickle.create_consumer_group(text, text, text) from public;
    end if;

    if pgtrickle.relay_may_define('drop_consumer_group') then
        create or replace function pgtrickle.drop_consumer_group(
            name text,
            if_exists boolean default false
        )
        returns void
        language plpgsql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
        begin
            if not pgtrickle.relay_group_drop(name) and not if_exists then
                perform pgtrickle.relay_group_missing(name);
            end if;
        end
        $function$;

        comment on function pgtrickle.drop_consumer_group(text, boolean) is
            'Drop a consumer group with its position and leases.';

        revoke all on function pgtrickle.drop_consumer_group(text, boolean) from public;
    end if;

    if pgtrickle.relay_may_define('poll_outbox') then
        create or replace function pgtrickle.poll_outbox(
            "group" text,
            consumer text,
            batch_size integer default 100,
            visibility_seconds integer default 30
        )
        returns table (
            outbox_id bigint,
            pgt_id uuid,
            created_at timestamptz,
            inserted_count bigint,
            deleted_count bigint,
            is_claim_check boolean,
            payload jsonb
        )
        language sql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
            select
                r.outbox_id, r.pgt_id, r.created_at, r.inserted_count, r.deleted_count,
                r.is_claim_check, r.payload
            from pgtrickle.relay_group_poll($1, $2, $3, $4) as r
        $function$;

        comment on function pgtrickle.poll_outbox(text, text, integer, integer) is
            'Lease the next rows of a group for a consumer.';

        revoke all on function pgtrickle.poll_outbox(text, text, integer, integer) from public;
    end if;

    if pgtrickle.relay_may_define('commit_offset') then
        create or replace function pgtrickle.commit_offset(
            "group" text,
            consumer text,
            last_offset bigint
        )
        returns void
        language sql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
            select pgtrickle.relay_group_commit_through($1, $2, $3)
        $function$;

        comment on function pgtrickle.commit_offset(text, text, bigint) is
            'Settle what the newest poll under this name returned, up to an id: never rows of an older poll, nor of another consumer. RL021 where that lease is lost.';

        revoke all on function pgtrickle.commit_offset(text, text, bigint) from public;
    end if;

    if pgtrickle.relay_may_define('extend_lease') then
        create or replace function pgtrickle.extend_lease(
            "group" text,
            consumer text,
            extension_seconds integer default 30
        )
        returns timestamptz
        language sql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
            select pgtrickle.relay_group_extend_newest($1, $2, $3)
        $function$;

        comment on function pgtrickle.extend_lease(text, text, integer) is
            'Keep the rows of the newest poll for so many seconds from now. RL021 where they are lost.';

        revoke all on function pgtrickle.extend_lease(text, text, integer) from public;
    end if;

    if pgtrickle.relay_may_define('consumer_heartbeat') then
        create or replace function pgtrickle.consumer_heartbeat("group" text, consumer text)
        returns void
        language sql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
            select pgtrickle.relay_group_heartbeat($1, $2)
        $function$;

        comment on function pgtrickle.consumer_heartbeat(text, text) is
            'Say that a consumer lives; consumer_lag shows it. Leases are kept by extend_lease only.';

        revoke all on function pgtrickle.consumer_heartbeat(text, text) from public;
    end if;

    if pgtrickle.relay_may_define('seek_offset') then
        create or replace function pgtrickle.seek_offset(
            "group" text,
            consumer text,
            new_offset bigint
        )
        returns void
        language sql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
            -- The position is the group's; the consumer only says who asks.
            select pgtrickle.relay_group_heartbeat($1, $2);
            select pgtrickle.relay_group_seek($1, $3)
        $function$;

        comment on function pgtrickle.seek_offset(text, text, bigint) is
            'Put the whole group at a position: a group has one. All its leases are lost.';

        revoke all on function pgtrickle.seek_offset(text, text, bigint) from public;
    end if;

    if pgtrickle.relay_may_define('consumer_lag') then
        create or replace function pgtrickle.consumer_lag("group" text)
        returns table (
            consumer_id text,
            committed_offset bigint,
            max_outbox_id bigint,
            lag bigint,
            last_heartbeat_at timestamptz,
            is_alive boolean
        )
        language sql
        stable
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
            select * from pgtrickle.relay_group_lag($1)
        $function$;

        comment on function pgtrickle.consumer_lag(text) is
            'Each consumer of a group with the position that they share. The lag is a distance of ids.';

        revoke all on function pgtrickle.consumer_lag(text) from public;
    end if;
end
$only_if_ours$;
