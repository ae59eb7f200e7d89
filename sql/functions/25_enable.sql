-- Enabling, repairing and disabling outboxes.
--
-- What is made beside somebody's table is made by the caller, as ordinary DDL. Who acts for an
-- outbox shows it by what only an owner can do: a comment on the capture function that names the
-- operation and the transaction. An outbox belongs to the role that may grant inserting into it.
--
-- What people call has no search_path of its own: a name means what it means to the caller.

create or replace function @schema@.relay_free_name(schema_name text, wanted text, seed text)
returns text
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    schema_id oid := (select n.oid from pg_namespace as n where n.nspname = schema_name);
    -- The type cuts to 63 bytes, never half a character.
    free_name text := wanted::name;
    attempt integer := 0;
begin
    while exists (select from pg_class where relnamespace = schema_id and relname = free_name)
        or exists (select from pg_type where typnamespace = schema_id and typname = free_name)
        or exists (select from pg_proc where pronamespace = schema_id and proname = free_name)
    loop
        free_name := substr(('8 bytes ' || wanted)::name, 9) || '_'
            || left(md5(seed || case attempt when 0 then '' else attempt::text end), 7);
        attempt := attempt + 1;
    end loop;
    return free_name;
end
$$;
comment on function @schema@.relay_free_name(text, text, text) is
    'A name that nothing has in a schema: cut to 63 bytes, and with 7 characters of a digest of the seed where it is taken.';

create or replace function @schema@.relay_function_shape(
    kind text, out arguments text, out result regtype, out configuration text[]
)
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    -- As PostgreSQL stores them: the session that writes has no part in what is told, and statements
    -- are planned once in a session, not six times.
    select s.arguments, s.result, array[
        'search_path=pg_catalog, pg_temp', 'TimeZone=UTC', 'DateStyle=ISO', 'IntervalStyle=postgres',
        'bytea_output=hex', 'extra_float_digits=1', 'plan_cache_mode=force_generic_plan'
    ]
    from (values
        ('capture', '', 'trigger'::regtype),
        ('snapshot', '', 'bigint'),
        ('backfill', 'pipeline text, filter text, after_key text[], chunk_rows integer', 'jsonb')
    ) as s (kind, arguments, result)
    where s.kind = relay_function_shape.kind
$$;
comment on function @schema@.relay_function_shape(text) is
    'Arguments, result and settings of a function beside a table.';

create or replace function @schema@.relay_function_of(outbox_table text, kind text) returns oid
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    settings constant @schema@.pgt_outbox_config := @schema@.relay_settings(outbox_table);
    capture_id oid;
begin
    if settings.adopted is not null then
        return case kind
            when 'capture' then (@schema@.relay_adopted(outbox_table)).reader_id
            when 'sweep' then (@schema@.relay_adopted(outbox_table)).sweeper_id
        end;
    end if;
    select b.function_id
    into capture_id
    from @schema@.relay_bound_triggers(outbox_table) as b
    where b.is_owned
    order by b.trigger_type & 32 desc
    limit 1;
    if not found then
        select p.oid
        into capture_id
        from pg_proc as p
        join pg_namespace as n on n.oid = p.pronamespace
        where n.nspname = settings.capture_schema
            and p.proname = settings.capture_function
            and p.pronargs = 0
            and has_column_privilege(
                p.proowner, format('%I.%I', @schema_name@, outbox_table), 'payload', 'insert with grant option');
    end if;
    if kind = 'capture' then
        return capture_id;
    end if;
    -- It is known by its text and its owner, so no name has to be kept.
    return (
        select p.oid
        from pg_proc as c
        join pg_proc as p on p.pronamespace = c.pronamespace and p.proowner = c.proowner
        where c.oid = capture_id
            and p.prorettype <> c.prorettype
            and starts_with(p.prosrc, format(E'\n-- pgtrickle-relay %s', kind))
            and position(format('%I.relay_captured_table(%L)', @schema_name@, outbox_table) in p.prosrc) > 0
        limit 1
    );
end
$$;
comment on function @schema@.relay_function_of(text, text) is
    'The capture, snapshot or backfill function of an outbox; of an adopted one what reads its table, in the place of capture, or sweeps it. That of capture outlives its table; null where it is gone or belongs to a role that does not own the outbox.';

create or replace function @schema@.relay_make_function(
    settings @schema@.pgt_outbox_config, relation oid, kind text
) returns oid
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    shape constant record := @schema@.relay_function_shape(kind);
    place record;
    function_name text;
    function_id oid;
    others text;
begin
    select c.relname, n.nspname, quote_ident(pg_get_userbyid(c.relowner)) as owner, c.relowner, p.proname as made_before,
        has_schema_privilege(c.relowner, n.oid, 'create') as may_create
    into place
    from pg_class as c
    join pg_namespace as n on n.oid = c.relnamespace
    left join pg_proc as p
        on p.oid = @schema@.relay_function_of(settings.outbox_table_name, kind)
        and p.pronamespace = n.oid and p.proowner = c.relowner
    where c.oid = relation;
    if not place.may_create then
        raise exception using
            errcode = 'insufficient_privilege',
            message = format('%s, who owns the table, may not create the capture function beside it in schema %I',
                place.owner, place.nspname),
            hint = format('grant create on schema %I to %s', place.nspname, place.owner);
    end if;
    function_name := coalesce(place.made_before, @schema@.relay_free_name(
        place.nspname, format('pgtrickle_%s_%s', kind, place.relname), settings.outbox_table_name));
    execute format(
        'create %s function %I.%I(%s) returns %s language plpgsql volatile security definer %s as %L',
        case when place.made_before is null then '' else 'or replace' end,
        place.nspname,
        function_name,
        shape.arguments,
        shape.result,
        (
            select string_agg(format('set %s to %s', split_part(c, '=', 1), case
                when starts_with(c, 'search_path') then split_part(c, '=', 2)
                else quote_literal(split_part(c, '=', 2))
            end), ' ')
            from unnest(shape.configuration) as c
        ),
        @schema@.relay_source(settings, relation, kind)
    );
    function_id := (
        select p.oid
        from pg_proc as p
        join pg_namespace as n on n.oid = p.pronamespace
        where n.nspname = place.nspname
            and p.proname = function_name
            and pg_get_function_identity_arguments(p.oid) = shape.arguments);
    if (select p.proowner <> place.relowner from pg_proc as p where p.oid = function_id) then
        execute format('alter function %s owner to %s', function_id::regprocedure, place.owner);
    end if;
    -- Default privileges may have given it to others.
    select string_agg(distinct quote_ident(pg_get_userbyid(a.grantee)), ', ') into others
    from pg_proc as p
    cross join lateral aclexplode(p.proacl) as a
    where p.oid = function_id and a.grantee not in (0, p.proowner);
    execute format('revoke all on function %s from %s', function_id::regprocedure, concat_ws(', ', 'public', others));
    if kind = 'snapshot' and to_regrole('pgtrickle_relay') is not null then
        execute format('grant execute on function %s to pgtrickle_relay', function_id::regprocedure);
    end if;
    return function_id;
end
$$;
comment on function @schema@.relay_make_function(@schema@.pgt_outbox_config, oid, text) is
    'Makes the capture, snapshot or backfill function beside a table, or makes it again, as ordinary DDL of the caller: it belongs to the table''s owner, who alone may execute it; snapshots are called by the relay, too.';

create or replace function @schema@.relay_claim_function(
    function_id oid, operation text default null
) returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
begin
    execute format('comment on function %s is %L', function_id::regprocedure, case
        when operation is null then 'Captures the changes of its table for pgtrickle-relay. Definer: who writes the table needs no right on the outbox.'
        else format('pgtrickle-relay: %s in transaction %s', operation, pg_current_xact_id())
    end);
end
$$;
comment on function @schema@.relay_claim_function(oid, text) is
    'Shows by a comment, which only its owner can make, that the caller acts for the owner of a capture function in this operation and transaction; null ends that.';

create or replace function @schema@.relay_require_claim(function_id oid, operation text)
returns void
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
begin
    if obj_description(function_id, 'pg_proc')
        is distinct from format('pgtrickle-relay: %s in transaction %s', operation, pg_current_xact_id())
    then
        raise exception using
            errcode = 'RL004',
            message = format('nobody has shown the right to %s', operation),
            hint = format('call enable_outbox, repair_outbox or disable_outbox of schema %I', @schema_name@);
    end if;
end
$$;
comment on function @schema@.relay_require_claim(oid, text) is
    'RL004 unless relay_claim_function was called for this operation in this transaction.';

create or replace function @schema@.relay_function_problem(
    function_id oid, relation oid, settings @schema@.pgt_outbox_config, kind text
) returns text
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select case
        when c.oid is null then 'the table is gone'
        when p.oid is null then format('the %s function is missing', kind)
        when p.proowner <> c.relowner then format('the %s function belongs to %I, the table to %I',
            kind, pg_get_userbyid(p.proowner), pg_get_userbyid(c.relowner))
        -- The key that marks the first row of a statement may have been renamed since.
        when regexp_replace(p.prosrc, '(?n)record_image_eq[(].*', '', 'g') is distinct from
            regexp_replace(@schema@.relay_source(settings, relation, kind), '(?n)record_image_eq[(].*', '', 'g')
        then format('the %s function is not the one that the relay makes for the table as it is', kind)
        when not (
            p.prosecdef
            and p.provolatile = 'v'
            and p.prolang = (select l.oid from pg_language as l where l.lanname = 'plpgsql')
            and p.prorettype = s.result
            and pg_get_function_identity_arguments(p.oid) = s.arguments
            and p.proconfig is not distinct from s.configuration
        ) then format('the %s function runs with other settings than those that the relay gives it', kind)
        when p.proacl is null or exists (
            select
            from aclexplode(p.proacl) as a
            where a.grantee <> p.proowner
                and (kind <> 'snapshot' or a.grantee is distinct from to_regrole('pgtrickle_relay'))
        ) then format('the %s function may be executed by others than its owner', kind)
    end
    from @schema@.relay_function_shape(kind) as s
    left join pg_class as c on c.oid = relation
    left join pg_proc as p on p.oid = function_id
$$;
comment on function @schema@.relay_function_problem(oid, oid, @schema@.pgt_outbox_config, text) is
    'What is wrong with a capture, snapshot or backfill function; null where it stands as the relay makes it.';

create or replace function @schema@.relay_trigger_problems(
    outbox_table text, relation oid, mode text, function_id oid
) returns table (phase integer, target oid, problem text, step text)
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    with family as materialized (
        select f.* from @schema@.relay_family(relation) as f
    ), wanted as materialized (
        -- Their names sort before those of others, and their condition ties them to the outbox: they go with it.
        select
            f.member as target,
            n.name as trigger_name,
            e.bit + case w.level when 'row' then 1 else 0 end as trigger_type,
            w.argument,
            format(
                'create trigger %I after %s on %s %s for each %s when (%L::regclass is not null) execute function ',
                n.name, e.event, f.member::regclass,
                case
                    when e.event = 'truncate' or w.argument = 'each' then ''
                    when e.event = 'insert' then 'referencing new table as new_rows'
                    when e.event = 'delete' then 'referencing old table as old_rows'
                    else 'referencing old table as old_rows new table as new_rows'
                end,
                w.level, format('%I.%I', @schema_name@, outbox_table)
            ) as definition
        from family as f
        cross join (values ('insert', 4), ('delete', 8), ('update', 16), ('truncate', 32)) as e (event, bit)
        cross join lateral (
            select
                case when mode = 'row' and e.event <> 'truncate' then 'row' else 'statement' end as level,
                case
                    when mode = 'statement' or e.event = 'truncate' then 'statement'
                    -- PostgreSQL has no transition tables for the row triggers of the others.
                    when f.kind = 'r' and not f.is_child and @schema@.relay_first_by(relation, mode) is not null then 'first'
                    else 'each'
                end as argument
        ) as w
        cross join lateral (
            select format('!pgtrickle_%s_%s', left(md5(@schema_name@ || '.' || outbox_table), 7), e.event) as name
        ) as n
        where f.kind in ('r', 'p')
            and mode <> 'none'
            -- Truncating one partition, like detaching it, is no change of rows.
            and (e.event <> 'truncate' or not f.is_child)
            -- The row trigger of a partitioned table is cloned to its partitions by PostgreSQL.
            and (w.level = 'statement' or not f.is_child
                or not exists (select from pg_class as c where c.oid = f.member and c.relispartition))
    ), bound as materialized (
        select b.*, b.function_id = relay_trigger_problems.function_id
            and (b.target, b.trigger_name, b.trigger_type, b.argument) in (
                select w.target, w.trigger_name, w.trigger_type, w.argument from wanted as w) as is_right
        from @schema@.relay_bound_triggers(outbox_table) as b
        -- Those of a former owner, too, and of partitions that are none any more.
        where b.is_owned or b.target in (select f.member from family as f)
    )
    select
        1, b.target,
        case
            when (b.target, b.trigger_name) in (select w.target, w.trigger_name from wanted as w)
            then format('trigger %s is not of the kind that the other triggers of the table ask for', b.trigger_name)
            else format('trigger %s is left over: it captures what no longer belongs to the table', b.trigger_name)
        end,
        format('drop trigger %I on %s', b.trigger_name, b.target::regclass)
    from bound as b
    where b.is_right is not true
    union all
    select
        2, w.target,
        case
            when (w.target, w.trigger_name) not in (select b.target, b.trigger_name from bound as b)
            then format('trigger %s is missing: these changes are not captured', w.trigger_name)
        end,
        w.definition || format('%I.%I(%L)', n.nspname, p.proname, w.argument)
    from wanted as w
    left join pg_proc as p on p.oid = function_id
    left join pg_namespace as n on n.oid = p.pronamespace
    where (w.target, w.trigger_name) not in (select b.target, b.trigger_name from bound as b where b.is_right)
    union all
    -- The clones that PostgreSQL keeps in partitions, too.
    select
        3, f.member,
        format('trigger %s is disabled: these changes are not captured', t.tgname),
        format('alter table %s enable trigger %I', f.member::regclass, t.tgname)
    from family as f
    join pg_trigger as t on t.tgrelid = f.member and t.tgenabled not in ('O', 'A')
    where t.tgname in (select w.trigger_name from wanted as w)
$$;
comment on function @schema@.relay_trigger_problems(text, oid, text, oid) is
    'What is wrong with the triggers that capture a table and its partitions into an outbox, each with the DDL that mends it; phase by phase, since one makes room for the next.';

create or replace function @schema@.relay_check_stream(
    stream_table text, relation oid, key_columns text[]
) returns void
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    obstacle record;
    unknown_column text;
begin
    if relation is null then
        raise exception using
            errcode = 'RL001',
            message = format('there is no table %s', coalesce(stream_table, 'null')),
            hint = 'name it with its schema, capitals in quotes, or with capture => ''none'' for a stream without a table';
    end if;
    select o.reason, o.remedy
    into obstacle
    from pg_class as c
    join pg_namespace as n on n.oid = c.relnamespace
    cross join lateral (
        select case when c.relispartition then
            format('select %I.enable_outbox(%L)', @schema_name@, pg_partition_root(relation)::text) end as remedy
    ) as p
    cross join lateral (values
        (
            c.relkind not in ('r', 'p') or c.relpersistence = 't'
                or n.nspname in ('pg_catalog', 'information_schema', @schema_name@),
            'it is a view, a foreign, temporary or system table',
            coalesce(p.remedy, 'enable the outbox of an ordinary or partitioned table')
        ),
        (
            c.relispartition,
            'it is a partition, and what is written through its parent would be missing',
            p.remedy
        ),
        (
            exists (select from @schema@.relay_family(relation) as f where f.kind = 'f'),
            'one of its partitions or children is a foreign table, for which PostgreSQL has no transition tables',
            'detach the foreign table, or publish with capture => ''none'''
        )
    ) as o (is_so, reason, remedy)
    where c.oid = relation and o.is_so
    limit 1;
    if found then
        raise exception using
            errcode = 'RL005',
            message = format('%s cannot have an outbox: %s', relation::regclass, obstacle.reason),
            hint = obstacle.remedy;
    end if;
    select k.name into unknown_column
    from unnest(key_columns) as k (name)
    where not exists (
        select
        from pg_attribute as a
        where a.attrelid = relation and a.attname = k.name and a.attnum > 0 and not a.attisdropped
    )
    limit 1;
    if found then
        raise exception using
            errcode = 'undefined_column',
            message = format('%s has no column %I to be its key', relation::regclass, unknown_column),
            hint = 'key_columns names columns of the table as they are stored, without quotes';
    end if;
end
$$;
comment on function @schema@.relay_check_stream(text, oid, text[]) is
    'What can keep a table from having an outbox: RL001, RL005, or a key column that is not there.';

create or replace function @schema@.relay_take_outbox(outbox_table text, function_id oid)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    settings constant @schema@.pgt_outbox_config := @schema@.relay_settings(outbox_table);
    owner_role regrole := quote_ident(current_user)::regrole;
    previous regrole;
begin
    if function_id is not null then
        update @schema@.pgt_outbox_config as c
        set capture_schema = n.nspname, capture_function = p.proname
        from pg_proc as p
        join pg_namespace as n on n.oid = p.pronamespace
        where c.outbox_table_name = outbox_table and p.oid = function_id
        returning p.proowner into owner_role;
    end if;
    for previous in
        select distinct x.grantee
        from pg_attribute as a
        cross join lateral aclexplode(a.attacl) as x
        where a.attrelid = to_regclass(format('%I.%I', @schema_name@, outbox_table))
            and x.is_grantable
            and x.grantee <> owner_role
    loop
        execute format('revoke all on %1$I.%2$I, %1$I.%3$I from %4$s cascade',
            @schema_name@, outbox_table, settings.delta_table_name, previous);
    end loop;
    -- Never id and created_at: nobody chooses a place in the order, or a time.
    execute format(
        $grant$
            grant select, insert (inserted_count, deleted_count, is_claim_check, payload, headers, key_columns)
                on %1$I.%2$I to %4$s with grant option;
            grant select, insert on %1$I.%3$I to %4$s with grant option
        $grant$,
        @schema_name@, outbox_table, settings.delta_table_name, owner_role
    );
    if to_regrole('pgtrickle_relay') is not null then
        execute format('grant select on %1$I.%2$I, %1$I.%3$I to pgtrickle_relay',
            @schema_name@, outbox_table, settings.delta_table_name);
    end if;
end
$$;
comment on function @schema@.relay_take_outbox(text, oid) is
    'Gives an outbox to the owner of its capture function, without asking, and takes it from who had it: they may insert into it and let others do so. Definer: nobody has rights on the catalog; only the catalog''s owner, whose outbox it is where no function captures, may execute it.';

create or replace function @schema@.relay_create_outbox(
    settings @schema@.pgt_outbox_config, function_id oid
) returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    first_id bigint := 1 + coalesce(
        (
            select h.last_id
            from @schema@.relay_outbox_high_water as h
            where h.outbox_table_name = settings.outbox_table_name
        ),
        0
    );
begin
    insert into @schema@.pgt_outbox_config values (settings.*);
    execute format(
        $create$
            create unlogged sequence %1$I.%8$I;
            comment on sequence %1$I.%8$I is %9$L;
            grant select on sequence %1$I.%8$I to public;

            create table %1$I.%2$I (
                id bigint generated always as identity (start with %3$s cache 1) primary key,
                pgt_id uuid not null default %4$L,
                refresh_id uuid not null default %10$s,
                created_at timestamptz not null default clock_timestamp(),
                inserted_count bigint not null default 0,
                deleted_count bigint not null default 0,
                is_claim_check boolean not null default false,
                payload jsonb,
                headers jsonb not null default '{}',
                key_columns text[]
            );
            comment on table %1$I.%2$I is %5$L;
            comment on column %1$I.%2$I.key_columns is
                'Columns of the key in this row, where they were renamed since the outbox was enabled.';

            create table %1$I.%6$I (
                outbox_id bigint not null,
                row_num bigint not null,
                row_op text not null check (row_op in ('INSERT', 'DELETE')),
                row_data jsonb not null,
                primary key (outbox_id, row_num)
            );
            comment on table %1$I.%6$I is %7$L;
        $create$,
        @schema_name@,
        settings.outbox_table_name,
        first_id,
        settings.pgt_id,
        format('Outbox of %s: one row for each captured statement or publication.', settings.stream_table),
        settings.delta_table_name,
        format('Rows of large deltas in the outbox of %s: inserted ones from row_num 0 on, then deleted ones.', settings.stream_table),
        settings.sleep_sequence_name,
        format('Until when, in seconds since 1970, some relay sleeps on the outbox of %s. For all to read: publishers do.', settings.stream_table),
        -- Unique is enough: random bytes for each row cost as much as capturing it. Wakes relays only while
        -- one sleeps: a notify in every commit serialises commits and forbids prepare transaction. Who falls
        -- asleep now polls again after as long as it slept.
        format(
            case when settings.notify then
                'case when pg_sequence_last_value(%1$L::regclass) > date_part(''epoch'', clock_timestamp()) then %2$I.relay_wake(%3$L, %4$L) else %5$s end'
            else '%5$s' end,
            format('%I.%I', @schema_name@, settings.sleep_sequence_name), @schema_name@,
            @schema@.relay_channel('pgtrickle_outbox_new'), settings.outbox_table_name,
            'encode(timestamptz_send(clock_timestamp()) || int8send(pg_backend_pid()), ''hex'')::uuid')
    );
    perform @schema@.relay_take_outbox(settings.outbox_table_name, function_id);
end
$$;
comment on function @schema@.relay_create_outbox(@schema@.pgt_outbox_config, oid) is
    'The tables of one outbox; ids continue where a disabled outbox of this name ended.';

create or replace function @schema@.relay_outbox_plan(
    wanted @schema@.pgt_outbox_config, relation oid
) returns @schema@.pgt_outbox_config
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    seed text := wanted.stream_table;
begin
    if wanted.capture is null or wanted.capture not in ('auto', 'statement', 'row', 'none')
        or wanted.retention_hours is null or wanted.retention_hours < 0
        or wanted.claim_check_rows is null or wanted.claim_check_rows < 0
        or wanted.claim_check_bytes is null or wanted.claim_check_bytes not between 0 and 134217728
        or wanted.notify is null
    then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = format('the outbox of %s can''t be enabled with these settings', wanted.stream_table),
            hint = 'capture is auto, statement, row or none; retention_hours and claim_check_rows are 0 or more; claim_check_bytes at most 134217728';
    end if;
    wanted.stream_schema := null;
    if relation is not null or wanted.capture <> 'none' or wanted.stream_table = '' is not false then
        perform @schema@.relay_check_stream(wanted.stream_table, relation, wanted.key_columns);
        select c.relname, n.nspname, n.nspname || '.' || c.relname
        into wanted.stream_table, wanted.stream_schema, seed
        from pg_class as c
        join pg_namespace as n on n.oid = c.relnamespace
        where c.oid = relation;
        wanted.key_columns := coalesce(wanted.key_columns, @schema@.relay_primary_key(relation));
    end if;
    wanted.outbox_table_name := @schema@.relay_free_name(@schema_name@, 'outbox_' || wanted.stream_table, seed);
    wanted.delta_table_name := @schema@.relay_free_name(@schema_name@, 'outbox_delta_rows_' || wanted.stream_table, seed);
    wanted.sleep_sequence_name := @schema@.relay_free_name(@schema_name@, 'outbox_sleep_' || wanted.stream_table, seed);
    wanted.pgt_id := gen_random_uuid();
    wanted.swept_through := 0;
    wanted.snapshot_through := 0;
    wanted.had_rows := exists (
        select from @schema@.relay_family(relation) as f where pg_relation_size(f.member) > 0);
    wanted.enabled_at := now();
    wanted.last_drained_at := null;
    wanted.last_drained_count := 0;
    return wanted;
end
$$;
comment on function @schema@.relay_outbox_plan(@schema@.pgt_outbox_config, oid) is
    'The settings of a new outbox, completed: how its tables will be called, and its key. RL001, RL005 or an error about an argument where it can''t be.';

create or replace function @schema@.relay_register_outbox(
    wanted @schema@.pgt_outbox_config, relation oid, function_id oid
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    plan @schema@.pgt_outbox_config;
    problem text;
    refreshes record;
begin
    -- Names are chosen one after the other, so that no two outboxes choose the same.
    perform pg_advisory_xact_lock(hashtextextended(@schema_name@ || ':outbox names', 0));
    plan := @schema@.relay_outbox_plan(wanted, relation);
    if wanted.outbox_table_name is distinct from plan.outbox_table_name
        or wanted.delta_table_name is distinct from plan.delta_table_name
    then
        raise exception using
            errcode = 'serialization_failure',
            message = format('another outbox took the name %I meanwhile', wanted.outbox_table_name),
            hint = 'try again';
    end if;
    perform @schema@.relay_require_claim(function_id, 'enable ' || plan.outbox_table_name);
    problem := @schema@.relay_function_problem(function_id, relation, plan, 'capture');
    if problem is not null then
        raise exception using errcode = 'RL005', message = format('%s cannot have an outbox: %s', relation::regclass, problem);
    end if;
    select r.* into refreshes from @schema@.relay_refreshes(relation) as r where plan.capture <> 'none';
    if refreshes.missing_grant is not null and refreshes.is_stream then
        if not refreshes.has_triggers or refreshes.refresh_mode = 'FULL' then
            raise exception using
                errcode = 'RL005',
                message = format('%s cannot have an outbox: pg_trickle fires no trigger on it (%s), and rights to follow its refreshes are missing',
                    relation::regclass,
                    case when refreshes.has_triggers then 'its refresh mode is FULL' else 'pg_trickle.user_triggers is off' end),
                hint = refreshes.missing_grant;
        end if;
        raise notice using
            message = format('full refreshes of %s will not be captured: rights are missing', relation::regclass),
            hint = refreshes.missing_grant;
    elsif refreshes.refresh_mode = 'FULL' or refreshes.is_stream and not refreshes.has_triggers then
        raise notice '% is refreshed without triggers: its events will be snapshots of all rows', relation::regclass;
    end if;
    plan.snapshot_through := coalesce(refreshes.newest, 0);
    perform @schema@.relay_create_outbox(plan, function_id);
    return plan.outbox_table_name;
end
$$;
comment on function @schema@.relay_register_outbox(@schema@.pgt_outbox_config, oid, oid) is
    'The catalog''s half of enable_outbox. Definer: table owners may not create in the schema; it acts for who has made the capture function of the table''s owner in this transaction, and compares that function with what the generator makes.';

create or replace function @schema@.relay_create_stream(
    wanted @schema@.pgt_outbox_config, publishers name[]
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    plan @schema@.pgt_outbox_config;
    publisher name;
begin
    perform pg_advisory_xact_lock(hashtextextended(@schema_name@ || ':outbox names', 0));
    if exists (
        select from @schema@.pgt_outbox_config as c
        where c.stream_schema is null and c.adopted is null and c.stream_table = wanted.stream_table
    ) then
        raise exception using
            errcode = 'RL002',
            message = format('the outbox of %s is enabled already', wanted.stream_table),
            hint = format('select %I.outbox_status(%L)', @schema_name@, wanted.stream_table);
    end if;
    plan := @schema@.relay_outbox_plan(wanted, null);
    perform @schema@.relay_create_outbox(plan, null);
    foreach publisher in array coalesce(
        nullif(publishers, '{}'),
        array(select r.rolname from pg_roles as r where r.rolname = 'pgtrickle_publisher'))
    loop
        execute format(
            $grant$
                grant select (id), insert (inserted_count, deleted_count, is_claim_check, payload, headers, key_columns)
                    on %1$I.%2$I to %4$I;
                grant insert on %1$I.%3$I to %4$I
            $grant$,
            @schema_name@, plan.outbox_table_name, plan.delta_table_name, publisher
        );
    end loop;
    return plan.outbox_table_name;
end
$$;
comment on function @schema@.relay_create_stream(@schema@.pgt_outbox_config, name[]) is
    'Makes the outbox of a stream without a table, for members of pgtrickle_relay and pgtrickle_publisher; the publishers named may publish to it, all members of pgtrickle_publisher where none is. Definer: they may not create in the schema.';

create or replace function @schema@.relay_enable(
    wanted @schema@.pgt_outbox_config, relation oid, publishers name[]
) returns text
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    plan constant @schema@.pgt_outbox_config := @schema@.relay_outbox_plan(wanted, relation);
    outbox_table text := @schema@.relay_find_outbox(null, relation);
    function_id oid;
begin
    if relation is null then
        return @schema@.relay_create_stream(plan, publishers);
    end if;
    if publishers <> '{}' then
        raise exception using
            errcode = 'RL005',
            message = format('%s is captured: its events are written by its triggers alone', wanted.stream_table),
            hint = 'Leave publishers out, or enable a stream of another name with capture => ''none''.';
    end if;
    if outbox_table is not null then
        -- A table that was dropped and made again goes on in its outbox.
        if plan.capture = 'none' or @schema@.relay_captured_table(outbox_table) is not null
            or @schema@.relay_repair(outbox_table, relation) = 0
        then
            raise exception using
                errcode = 'RL002',
                message = format('the outbox of %s is enabled already', wanted.stream_table),
                hint = format('select %I.outbox_status(%L), or repair_outbox where something is wrong with it',
                    @schema_name@, wanted.stream_table);
        end if;
        return outbox_table;
    end if;
    if plan.capture = 'auto' and @schema@.relay_capture_mode('auto', relation) = 'row' then
        raise notice '% has triggers after each row: its changes are told before they run', relation::regclass;
    end if;
    function_id := @schema@.relay_make_function(plan, relation, 'capture');
    perform @schema@.relay_claim_function(function_id, 'enable ' || plan.outbox_table_name);
    outbox_table := @schema@.relay_register_outbox(plan, relation, function_id);
    perform @schema@.relay_claim_function(function_id);
    perform @schema@.relay_repair(outbox_table, relation);
    perform @schema@.relay_say_rows(outbox_table);
    return outbox_table;
end
$$;
comment on function @schema@.relay_enable(@schema@.pgt_outbox_config, oid, name[]) is
    'Part of relay_change_outbox: what it makes is ordinary DDL of the caller.';

-- ---------------------------------------------------------------------------
-- Repairing
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_transfer_outbox(
    outbox_table text, relation oid, function_id oid
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    captured oid := @schema@.relay_captured_table(outbox_table);
    settings constant @schema@.pgt_outbox_config := @schema@.relay_settings(outbox_table);
    owner_role oid := (select c.relowner from pg_class as c where c.oid = relation);
    outbox_relation text := format('%I.%I', @schema_name@, outbox_table);
    is_named_so boolean;
    problem text;
begin
    perform @schema@.relay_require_claim(function_id, 'repair ' || outbox_table);
    select c.relname = settings.stream_table and n.nspname = settings.stream_schema
    into is_named_so
    from pg_class as c
    join pg_namespace as n on n.oid = c.relnamespace
    where c.oid = relation;
    if captured is distinct from relation
        and not (captured is null and is_named_so
            and has_column_privilege(owner_role, outbox_relation, 'payload', 'insert with grant option'))
    then
        raise exception using
            errcode = 'RL004',
            message = format('outbox %I does not belong to %s: its table was dropped, or given away together with its capture function',
                outbox_table, pg_get_userbyid(owner_role)::regrole),
            hint = format('let a superuser or a member of %s call repair_outbox', quote_ident(current_user)::regrole);
    end if;
    problem := @schema@.relay_function_problem(function_id, relation, settings, 'capture');
    if problem is not null then
        raise exception using errcode = 'RL005', message = format('%s cannot be repaired: %s', outbox_table, problem);
    end if;
    perform @schema@.relay_take_outbox(outbox_table, function_id);
end
$$;
comment on function @schema@.relay_transfer_outbox(text, oid, oid) is
    'The catalog''s half of repair_outbox: gives an outbox to the owner of its table. Definer: nobody has rights on the catalog; it acts for who has claimed the new capture function, of the owner of the table that is captured already or that has the name and the rights.';

create or replace function @schema@.relay_repair(outbox_table text, relation oid) returns integer
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    settings constant @schema@.pgt_outbox_config := @schema@.relay_settings(outbox_table);
    captured constant oid := coalesce(@schema@.relay_captured_table(outbox_table), relation);
    mode constant text := @schema@.relay_capture_mode(settings.capture, captured);
    made_before constant oid := @schema@.relay_function_of(outbox_table, 'capture');
    function_id oid := made_before;
    step text;
    kind text;
    steps integer := 0;
begin
    if settings.adopted is not null then
        raise exception using
            errcode = 'RL005',
            message = format('nothing is captured into outbox %s: it is a table of its application', settings.stream_table),
            hint = format('select %I.disable_outbox(%L), and adopt the table again; its pipelines keep their positions',
                @schema_name@, settings.stream_table);
    end if;
    if @schema@.relay_function_problem(function_id, captured, settings, 'capture') is not null then
        function_id := @schema@.relay_make_function(settings, captured, 'capture');
        if function_id is distinct from made_before then
            if has_function_privilege(format('%I.relay_take_outbox(text, oid)', @schema_name@), 'execute') then
                perform @schema@.relay_take_outbox(outbox_table, function_id);
            else
                perform @schema@.relay_claim_function(function_id, 'repair ' || outbox_table);
                perform @schema@.relay_transfer_outbox(outbox_table, captured, function_id);
            end if;
            perform @schema@.relay_claim_function(function_id);
        end if;
        steps := 1;
    end if;
    if current_setting('lock_timeout') = '0' then
        -- A trigger that waits for its lock makes every later writer wait behind it.
        perform set_config('lock_timeout', '5s', true);
    end if;
    for place in 1..3 loop
        for step in
            select t.step
            from @schema@.relay_trigger_problems(outbox_table, captured, mode, function_id) as t
            where t.phase = place
            order by t.target <> captured, t.target
        loop
            execute step;
            steps := steps + 1;
        end loop;
    end loop;
    foreach kind in array array['snapshot', 'backfill'] loop
        if @schema@.relay_source(settings, captured, kind) is not null and @schema@.relay_function_problem(
            @schema@.relay_function_of(outbox_table, kind), captured, settings, kind) is not null
        then
            perform @schema@.relay_make_function(settings, captured, kind);
            steps := steps + 1;
        end if;
    end loop;
    return steps;
end
$$;
comment on function @schema@.relay_repair(text, oid) is
    'Part of relay_change_outbox: what it makes and drops is ordinary DDL of the caller, until function and triggers are those that are wanted. Returns how many steps that took.';

-- ---------------------------------------------------------------------------
-- Disabling
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_remove_outbox(outbox_table text) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set client_min_messages = warning as $$
declare
    settings @schema@.pgt_outbox_config;
    outbox_relation text := format('%I.%I', @schema_name@, outbox_table);
    last_id bigint;
begin
    delete from @schema@.pgt_outbox_config as c
    where c.outbox_table_name = outbox_table
    returning c.* into settings;
    delete from @schema@.relay_backfills as b where b.pgt_id = settings.pgt_id;
    if settings.adopted is not null then
        execute format('drop view if exists %s', outbox_relation);
    elsif to_regclass(outbox_relation) is not null then
        execute format('lock table %s in access exclusive mode', outbox_relation);
        select coalesce(pg_sequence_last_value(q.seqrelid), q.seqstart - 1)
        into last_id
        from pg_sequence as q
        where q.seqrelid = pg_get_serial_sequence(outbox_relation, 'id')::regclass;
        insert into @schema@.relay_outbox_high_water as h (outbox_table_name, last_id)
        values (outbox_table, last_id)
        on conflict (outbox_table_name) do update
        set last_id = greatest(h.last_id, excluded.last_id), disabled_at = now();
        execute format('drop table %s cascade', outbox_relation);
    end if;
    execute format('drop table if exists %I.%I', @schema_name@, settings.delta_table_name);
    execute format('drop sequence if exists %I.%I', @schema_name@, settings.sleep_sequence_name);
end
$$;
comment on function @schema@.relay_remove_outbox(text) is
    'Drops the tables of an outbox, without asking, and keeps its highest id. Definer: they belong to the catalog''s owner, who alone may execute it.';

create or replace function @schema@.relay_drop_outbox(outbox_table text, function_id oid)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    perform @schema@.relay_require_claim(function_id, 'disable ' || outbox_table);
    if function_id is distinct from @schema@.relay_function_of(outbox_table, 'capture') then
        raise exception using
            errcode = 'RL004',
            message = format('%s is not the capture function of outbox %I', function_id::regprocedure, outbox_table);
    end if;
    perform @schema@.relay_remove_outbox(outbox_table);
end
$$;
comment on function @schema@.relay_drop_outbox(text, oid) is
    'The catalog''s half of disable_outbox. Definer: the tables belong to the catalog''s owner; it acts for who has claimed the capture function of the outbox.';

create or replace function @schema@.relay_drop_stream(outbox_table text) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    if exists (
        select from @schema@.pgt_outbox_config as c
        where c.outbox_table_name = outbox_table and c.stream_schema is null and c.adopted is null
    ) then
        perform @schema@.relay_remove_outbox(outbox_table);
    end if;
end
$$;
comment on function @schema@.relay_drop_stream(text) is
    'Drops the outbox of a stream without a table, for members of pgtrickle_relay and pgtrickle_publisher. Definer: it belongs to the catalog''s owner.';

create or replace function @schema@.relay_disable(outbox_table text) returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    function_id constant oid := @schema@.relay_function_of(outbox_table, 'capture');
    others constant oid[] := array[
        @schema@.relay_function_of(outbox_table, 'snapshot'), @schema@.relay_function_of(outbox_table, 'backfill'),
        @schema@.relay_function_of(outbox_table, 'sweep')];
    step text;
begin
    if current_setting('lock_timeout') = '0' then
        perform set_config('lock_timeout', '5s', true);
    end if;
    if function_id is not null then
        -- Triggers first: a writer holds its table before it waits for the outbox.
        for step in
            select format('drop trigger %I on %s', b.trigger_name, b.target::regclass)
            from @schema@.relay_bound_triggers(outbox_table) as b
            where b.is_owned
        loop
            execute step;
        end loop;
        perform @schema@.relay_claim_function(function_id, 'disable ' || outbox_table);
        perform @schema@.relay_drop_outbox(outbox_table, function_id);
        for step in
            select format('drop function %s', p.oid::regprocedure) from pg_proc as p where p.oid = function_id or p.oid = any (others)
        loop
            execute step;
        end loop;
    elsif has_function_privilege(format('%I.relay_remove_outbox(text)', @schema_name@), 'execute') then
        perform @schema@.relay_remove_outbox(outbox_table);
    elsif (select s.stream_schema is null and s.adopted is null from @schema@.relay_settings(outbox_table) as s) then
        perform @schema@.relay_drop_stream(outbox_table);
    else
        raise exception using
            errcode = 'RL004',
            message = format('the capture function of outbox %I, which shows to whom it belongs, is gone', outbox_table),
            hint = 'let a superuser call disable_outbox';
    end if;
end
$$;
comment on function @schema@.relay_disable(text) is
    'Part of relay_change_outbox: what it drops beside the table is ordinary DDL of the caller.';

-- ---------------------------------------------------------------------------
-- What people call
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_change_outbox(
    operation text, called text, relation oid, wanted @schema@.pgt_outbox_config default null,
    publishers name[] default '{}', if_exists boolean default false
) returns text
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    waits constant text := current_setting('lock_timeout');
    outbox_table text;
    answer text;
    v_detail text;
    v_hint text;
begin
    if operation = 'repair' and relation is null then
        perform @schema@.relay_check_stream(called, null, null);
    elsif operation in ('repair', 'disable') then
        outbox_table := @schema@.relay_find_outbox(called, relation, if_exists is not true);
    end if;
    if outbox_table is not null or operation in ('enable', 'adopt') and relation is not null then
        perform @schema@.relay_check_event_triggers();
    end if;
    if operation = 'enable' then
        answer := @schema@.relay_enable(wanted, relation, publishers);
    elsif operation = 'repair' then
        answer := @schema@.relay_repair(outbox_table, relation);
    elsif operation = 'adopt' then
        answer := @schema@.relay_adopt(wanted, relation);
    elsif outbox_table is not null then
        perform @schema@.relay_disable(outbox_table);
    end if;
    perform set_config('lock_timeout', waits, true);
    return answer;
exception
    when lock_not_available then
        raise exception using
            errcode = 'lock_not_available',
            message = format('the tables of the outbox of %s are in use: its triggers could not be changed', called),
            hint = 'try again when no long transaction writes them, or set lock_timeout to wait longer';
    when others then
        -- With a remedy it is a person's to mend, for whom the calls on the way there are noise.
        get stacked diagnostics v_detail = pg_exception_detail, v_hint = pg_exception_hint;
        if sqlstate = '42501' and v_hint = '' then
            v_hint := case
                when relation is null then 'It takes membership in pgtrickle_relay or pgtrickle_publisher.'
                else format('It is done with your own rights: let the owner of the table call %s_outbox.', operation)
            end;
        end if;
        if v_hint = '' then
            raise;
        end if;
        raise exception using
            errcode = sqlstate, message = concat_ws(': ', sqlerrm, nullif(v_detail, '')), hint = v_hint;
end
$$;
comment on function @schema@.relay_change_outbox(text, text, oid, @schema@.pgt_outbox_config, name[], boolean) is
    'The caller''s half of enable_outbox, repair_outbox and disable_outbox: gives lock_timeout back, and says briefly what is wrong.';

create or replace function @schema@.enable_outbox(
    stream_table text, retention_hours integer default 24, capture text default 'auto',
    notify boolean default true, key_columns text[] default null,
    claim_check_rows integer default 1000, claim_check_bytes bigint default 1048576,
    publishers name[] default '{}'
) returns text
language sql volatile security invoker as $$
    select @schema@.relay_change_outbox(
        'enable', stream_table, @schema@.relay_relation(stream_table),
        pg_catalog.jsonb_populate_record(null::@schema@.pgt_outbox_config, pg_catalog.jsonb_build_object(
            'stream_table', stream_table, 'retention_hours', retention_hours, 'capture', capture,
            'notify', notify, 'key_columns', key_columns,
            'claim_check_rows', claim_check_rows, 'claim_check_bytes', claim_check_bytes)),
        publishers)
$$;
comment on function @schema@.enable_outbox(text, integer, text, boolean, text[], integer, bigint, name[]) is
    'Gives a table an outbox, captures its changes from now on, and returns the name of the outbox table. RL002 where it has one.';

create or replace function @schema@.repair_outbox(stream_table text) returns integer
language sql volatile security invoker as $$
    select @schema@.relay_change_outbox(
        'repair', stream_table, @schema@.relay_relation(stream_table))::pg_catalog.int4
$$;
comment on function @schema@.repair_outbox(text) is
    'Makes the capture function and the triggers of a table and its partitions what they should be, and returns how many steps that took; 0: nothing was wrong.';

create or replace function @schema@.disable_outbox(
    stream_table text, if_exists boolean default false
) returns void
language sql volatile security invoker as $$
    -- Of type void, like the function, so that PostgreSQL puts it in the place of the call.
    select case
        when @schema@.relay_change_outbox(
            'disable', stream_table, @schema@.relay_relation(stream_table), if_exists => if_exists) is null
        then null::pg_catalog.void
    end
$$;
comment on function @schema@.disable_outbox(text, boolean) is
    'Stops capturing and drops the outbox with what was not delivered yet; an adopted outbox is released, and its table and rows stay. Its highest id is kept: a later outbox of this name continues above it.';

-- ---------------------------------------------------------------------------
-- What is wrong
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_capture_problems()
returns table (outbox_table text, stream_table text, relation text, problem text, remedy text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on as $$
#variable_conflict use_column
begin
    return query
    select c.outbox_table_name, c.stream_table,
        coalesce(p.target::regclass::text, format('%I.%I', c.stream_schema, c.stream_table)), p.problem,
        coalesce(p.remedy, format('select %I.repair_outbox(%L)', @schema_name@,
            coalesce(o.captured::regclass::text, format('%I.%I', c.stream_schema, c.stream_table))))
    from @schema@.pgt_outbox_config as c
    cross join lateral (
        select @schema@.relay_captured_table(c.outbox_table_name) as captured,
            @schema@.relay_function_of(c.outbox_table_name, 'capture') as function_id
        offset 0  -- asked once: else each use of the names is a call
    ) as o
    cross join lateral (
        select @schema@.relay_function_problem(o.function_id, o.captured, c, 'capture') as problem
        offset 0
    ) as f
    cross join lateral (
        select null::oid, 'nothing is captured: the table or its triggers are gone, or its capture function belongs to a role without rights on the outbox', null
        where o.captured is null
        union all
        select o.captured, f.problem, null
        where o.captured is not null
        union all
        select o.captured, 'its rows can''t be backfilled: ' || @schema@.relay_function_problem(
            @schema@.relay_function_of(c.outbox_table_name, 'backfill'), o.captured, c, 'backfill'), null
        where f.problem is null
        union all
        select t.target, t.problem, null
        from @schema@.relay_trigger_problems(
            c.outbox_table_name, o.captured, @schema@.relay_capture_mode(c.capture, o.captured), o.function_id) as t
        union all
        select f.member,
            'a foreign table is among the partitions: PostgreSQL refuses to write it through a captured parent',
            'detach the foreign table'
        from @schema@.relay_family(o.captured) as f
        where f.kind = 'f'
        union all
        select f.member,
            format('trigger %I runs inside the statement, before capture can see it: what it changes in the same table comes first', t.tgname),
            'let an AFTER trigger do it'
        from @schema@.relay_family(o.captured) as f
        join pg_class as r on r.oid = f.member
        join pg_trigger as t on t.tgrelid = f.member and t.tgtype & 3 = 3 and not t.tgisinternal
        join pg_proc as p on p.oid = t.tgfoid
        where p.prosrc ~* format('\m(insert\s+into|update|delete\s+from)\s+(only\s+)?(\S+\.)?"?%s\M',
            regexp_replace(r.relname, '([^[:alnum:]_])', '\\\1', 'g'))
        union all
        select f.member,
            format('trigger %I runs before capture: what it changes is told in the wrong order', t.tgname),
            format('rename the trigger on %s', f.member::regclass)
        from @schema@.relay_family(o.captured) as f
        join pg_trigger as t on t.tgrelid = f.member and not t.tgisinternal and t.tgtype & 2 = 0
        where t.tgname < '!pgtrickle_'::name
        union all
        select o.captured, format('column %I of the key is gone', k.name), 'give the table a primary key'
        from unnest(c.key_columns) as k (name)
        where o.captured is not null
            and @schema@.relay_primary_key(o.captured) is null
            and not exists (
                select from pg_attribute as a
                where a.attrelid = o.captured and a.attname = k.name and not a.attisdropped)
        union all
        select o.captured, s.problem, s.remedy
        from @schema@.relay_refreshes(o.captured) as r
        cross join lateral (values
            (case when r.missing_grant is not null then 'full refreshes are not captured: rights are missing' end,
                r.missing_grant),
            (case when not r.has_triggers then 'pg_trickle fires no trigger on it: pg_trickle.user_triggers is off' end,
                'set pg_trickle.user_triggers to auto'),
            ('full refreshes are not captured: ' || @schema@.relay_function_problem(
                @schema@.relay_function_of(c.outbox_table_name, 'snapshot'), o.captured, c, 'snapshot'), null)
        ) as s (problem, remedy)
        where r.is_stream
        union all
        -- A dump keeps the oid by which the extension knows a table.
        select o.captured, 'pg_trickle does not know this table any more, as after a restore from a dump: nothing refreshes it',
            'mend it in pg_trickle, or let it make another stream table and enable that one'
        from @schema@.relay_refreshes(o.captured) as r
        where not r.is_stream
            and c.key_columns = array['__pgt_row_id']
            and @schema@.relay_extension_table('pgt_stream_tables') is not null
    ) as p (target, problem, remedy)
    where c.stream_schema is not null and c.capture <> 'none' and p.problem is not null
    union all
    select c.outbox_table_name, c.stream_table, a.relation::regclass::text, p.problem, p.remedy
    from @schema@.pgt_outbox_config as c
    cross join lateral @schema@.relay_adopted(c.outbox_table_name) as a
    cross join lateral @schema@.relay_adopted_problem(
        c, a.relation, a.id_column, a.sequence_id, a.reader_id, a.sweeper_id) as p
    where c.adopted is not null and p.problem is not null
    order by 1, 3, 4;
end
$$;
comment on function @schema@.relay_capture_problems() is
    'What is wrong with capture or with an adopted table, and how to mend it. Definer: the relay may not see the catalog.';
