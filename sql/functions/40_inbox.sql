-- Inboxes: tables that messages are written to, each message once.
--
-- Beside each table stand generated functions that belong to the table's owner: one receives, one
-- counts, one sweeps. So triggers, policies, defaults and checks of the table run with its owner's
-- rights, never with the relay's or the catalog's. Who makes or removes them proves by PostgreSQL's
-- own DDL that they may; definer functions here touch nothing but the catalog and our own schema.

create or replace function @schema@.relay_base_type(p_type oid) returns oid
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    with recursive base (type) as (
        select p_type
        union all
        select t.typbasetype
        from base as b
        join pg_type as t on t.oid = b.type and t.typtype = 'd'
    )
    select b.type from base as b join pg_type as t on t.oid = b.type where t.typtype <> 'd'
$$;
comment on function @schema@.relay_base_type(oid) is
    'Runs as its caller. The type below all domains.';

-- ---------------------------------------------------------------------------
-- What is generated, and whether it still stands
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_inbox_parts(p_inbox @schema@.relay_inboxes)
returns table (
    purpose text, kind text, part_name text, arguments text, result text, part_language text,
    source text, fields text[], types text[]
)
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_table text := format('%I.%I', p_inbox.inbox_schema, p_inbox.inbox_table);
    v_id text := quote_ident(p_inbox.columns ->> 'event_id');
    v_processed text := 'm.' || quote_ident(p_inbox.columns ->> 'processed_at');
    v_received text := coalesce('m.' || quote_ident(p_inbox.columns ->> 'received_at'), 'null') || '::timestamptz';
    v_type text := coalesce('m.' || quote_ident(p_inbox.columns ->> 'event_type'), 'null::text');
    v_waits text := coalesce(v_processed || ' is null', 'true');
    v_failed text := 'm.' || quote_ident(p_inbox.columns ->> 'retry_count') || ' >= ' || p_inbox.max_retries;
    v_dead text := coalesce(v_processed || ' is null and ' || v_failed, 'false');
    v_pending text := v_waits || coalesce(' and not (' || v_failed || ')', '');
    v record;
begin
    select
        string_agg(quote_ident(f.column_name), ', ' order by f.n) as columns,
        string_agg(format('m.c%s::%s', f.n, f.type), ', ' order by f.n) as values,
        string_agg('$' || f.n, ', ' order by f.n) as parameters,
        string_agg('c' || f.n, ', ' order by f.n) as aliases,
        string_agg(case f.type when 'bytea' then 'bytea[]' else 'text[]' end, ', ' order by f.n) as arguments,
        array_agg(f.field order by f.n) as fields,
        array_agg(f.type order by f.n) as types
    into v
    from (
        select w.field, a.attname::text as column_name, row_number() over (order by w.place) as n,
            format_type(@schema@.relay_base_type(a.atttypid), null) as type
        from unnest(array['event_id', 'event_type', 'source', 'aggregate_id', 'trace_id', 'payload', 'headers'])
            with ordinality as w (field, place)
        join pg_class as c
            on c.relname = p_inbox.inbox_table and c.relnamespace = to_regnamespace(quote_ident(p_inbox.inbox_schema))
        join pg_attribute as a
            on a.attrelid = c.oid and a.attname = p_inbox.columns ->> w.field and not a.attisdropped
    ) as f;
    -- Parameters have no name and a column wins over a variable, so that no column's name can matter.
    return query
    select w.purpose, w.kind, p_inbox.parts ->> w.purpose, w.arguments, w.result, w.part_language, w.source,
        v.fields, v.types
    from (values
        ('receive', 'function', true, v.arguments, 'bigint', 'plpgsql', format($code$
#variable_conflict use_column
declare
    new_rows bigint;
begin
    insert into %s (%s)
    select %s
    from unnest(%s) as m (%s)
    on conflict (%s) do nothing;
    get diagnostics new_rows = row_count;
    set constraints all immediate;
    return new_rows;
end
$code$, v_table, v.columns, v.values, v.parameters, v.aliases, v_id)),
        ('count', 'function', true, '', 'jsonb', 'sql', format($code$
select jsonb_build_object(
    'total', count(*),
    'pending', count(*) filter (where %1$s),
    'processed', count(*) filter (where not (%2$s)),
    'dead', count(*) filter (where %3$s),
    'oldest', min(%4$s) filter (where %1$s))
from %5$s as m
$code$, v_pending, v_waits, v_dead, v_received, v_table)),
        ('sweep', 'function', v_processed is not null and p_inbox.retention_hours is not null,
            'integer', 'bigint', 'plpgsql', format($code$
#variable_conflict use_column
declare
    swept_rows bigint;
begin
    delete from %1$s as swept
    where swept.%2$s in (
        select m.%2$s
        from %1$s as m
        where %3$s < now() - make_interval(hours => %4$s)
        order by %3$s
        limit coalesce($1, 1000)
        for update skip locked);
    get diagnostics swept_rows = row_count;
    set constraints all immediate;
    return swept_rows;
end
$code$, v_table, v_id, v_processed, p_inbox.retention_hours)),
        ('pending', 'view', v_processed is not null, null, null, null,
            format('select m.* from %s as m where %s', v_table, v_pending)),
        ('dlq', 'view', v_dead <> 'false' and p_inbox.with_dead_letter, null, null, null,
            format('select m.* from %s as m where %s', v_table, v_dead)),
        ('stats', 'view', v_processed is not null and p_inbox.with_stats, null, null, null, format($code$
select
    %1$s as event_type,
    count(*) as total,
    count(*) filter (where %2$s) as pending,
    count(*) filter (where not (%3$s)) as processed,
    count(*) filter (where %4$s) as dead_letters,
    min(%5$s) filter (where %2$s) as oldest_pending_at
from %6$s as m
group by 1
$code$, v_type, v_pending, v_waits, v_dead, v_received, v_table))
    ) as w (purpose, kind, is_wanted, arguments, result, part_language, source)
    where w.is_wanted;
end
$$;
comment on function @schema@.relay_inbox_parts(@schema@.relay_inboxes) is
    'Runs as its caller. The functions and views beside the table of an inbox, as they are made and as they are compared.';

create or replace function @schema@.relay_inbox_problems(p_inbox @schema@.relay_inboxes)
returns setof text
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_table text := format('%I.%I', p_inbox.inbox_schema, p_inbox.inbox_table);
    t record;
begin
    select c.*, n.nspname, r.rolname, r.rolsuper or r.rolbypassrls as is_above_policies
    into t
    from pg_class as c
    join pg_namespace as n on n.oid = c.relnamespace
    join pg_roles as r on r.oid = c.relowner
    where n.nspname = p_inbox.inbox_schema and c.relname = p_inbox.inbox_table;
    if not found then
        return next format('table %s is gone: it was dropped, renamed or moved', v_table);
        return;
    end if;
    if t.relkind not in ('r', 'p') or t.relpersistence = 't'
        or t.nspname in ('pg_catalog', 'information_schema', 'pg_toast')
    then
        return next format('%s is not an ordinary table', v_table);
        return;
    end if;
    return query
    with actual as (
        select a.attname, a.attnum, @schema@.relay_base_type(a.atttypid) as type,
            a.attgenerated <> '' or a.attidentity = 'a' as is_computed,
            a.attnotnull and not a.atthasdef and a.attidentity = '' as needs_value
        from pg_attribute as a
        where a.attrelid = t.oid and a.attnum > 0 and not a.attisdropped
    ), wanted as (
        select f.field, k.types::regtype[] as types, p_inbox.columns ->> f.field as name
        from (values
            ('{event_id,event_type,source,aggregate_id,trace_id,error}', '{text,varchar}'),
            ('{payload}', '{jsonb,json,text,bytea}'),
            ('{headers}', '{jsonb}'),
            ('{received_at,processed_at}', '{timestamptz,timestamp}'),
            ('{retry_count}', '{int4,int8,int2}')
        ) as k (fields, types)
        cross join unnest(k.fields::text[]) as f (field)
    )
    (select p.problem
    from wanted as w
    left join actual as a on a.attname = w.name
    cross join lateral (values
        (1, w.field in ('event_id', 'payload') and w.name is null, format('field %s has no column', w.field)),
        (2, w.name is not null and a.attname is null,
            format('column %s for %s does not exist', quote_ident(w.name), w.field)),
        (3, a.type <> all (w.types::oid[]),
            format('column %s for %s is of type %s, but must be %s', quote_ident(w.name), w.field,
                format_type(a.type, null), array_to_string(w.types, ' or '))),
        (4, a.is_computed and w.field <> 'received_at',
            format('column %s is generated, and can''t be written', quote_ident(w.name))),
        (5, w.field = 'event_id' and a.attname is not null and not exists (
                select
                from pg_index as i
                where i.indrelid = t.oid
                    and i.indisunique and i.indisvalid and i.indimmediate
                    and i.indpred is null and i.indexprs is null
                    and i.indnkeyatts = 1 and i.indkey[0] = a.attnum),
            format('column %s has no unique key of its own, so that a repeated message would be written twice',
                quote_ident(w.name)))
    ) as p (place, is_so, problem)
    where p.is_so
    order by p.place)
    union all
    select format('column %I is not null without a default, and nothing is written to it', a.attname)
    from actual as a
    where a.needs_value
        and not exists (
            select from wanted as w
            where w.name = a.attname and w.field not in ('received_at', 'processed_at', 'error', 'retry_count'))
    union all
    select format('column %I stands for more than one field: %s', w.name, string_agg(w.field, ', '))
    from wanted as w
    where w.name is not null
    group by w.name
    having count(*) > 1
    union all
    select format('rule %I of %s rewrites what is written', r.rulename, v_table)
    from pg_rewrite as r
    where r.ev_class = t.oid
    union all
    select format('trigger %I of %s is deferrable: before PostgreSQL 18 it may run with the rights of the relay', g.tgname, v_table)
    from pg_trigger as g
    join pg_proc as p on p.oid = g.tgfoid
    join pg_roles as r on r.oid = p.proowner
    where g.tgrelid = t.oid and g.tgdeferrable and not g.tgisinternal and not r.rolsuper
        and current_setting('server_version_num')::integer < 180000
    union all
    select format('row-level security of %s does not hold for its owner %I%s', v_table, t.rolname,
        case when t.is_above_policies then '' else format(': alter table %s force row level security', v_table) end)
    where t.relrowsecurity and (t.is_above_policies or not t.relforcerowsecurity)
        and p_inbox.policies <> 'bypassed';
    if p_inbox.parts is null or found then
        return;
    end if;
    return query
    select case
        when p.oid is null then
            format('function %I.%I is gone', t.nspname, w.part_name)
        when p.proowner <> t.relowner then
            format('function %I.%I belongs to %I, but the table to %I',
                t.nspname, w.part_name, pg_get_userbyid(p.proowner), t.rolname)
        else format('function %I.%I is not as it was made', t.nspname, w.part_name) end
    from @schema@.relay_inbox_parts(p_inbox) as w
    left join pg_proc as p
        on p.pronamespace = t.relnamespace and p.proname = w.part_name
        and pg_get_function_identity_arguments(p.oid) = w.arguments
    left join pg_language as l on l.oid = p.prolang
    where w.kind = 'function'
        and (p.oid is null
            or p.proowner <> t.relowner
            or not p.prosecdef
            or p.prokind <> 'f' or p.proretset or p.prosupport <> 0
            or l.lanname <> w.part_language
            or p.prosrc <> w.source or p.prosqlbody is not null
            or format_type(p.prorettype, null) <> w.result
            or p.proconfig is distinct from array['search_path=pg_catalog, pg_temp']);
end
$$;
comment on function @schema@.relay_inbox_problems(@schema@.relay_inboxes) is
    'Runs as its caller. Why a table does not fit as an inbox, or does so no longer: its kind, columns, types, key, policies, and the functions beside it.';

create or replace function @schema@.relay_refuse_deferred() returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
begin
    if current_setting('server_version_num')::integer < 180000 and exists (
        select
        from pg_locks as l
        join pg_trigger as g on g.tgrelid = l.relation
        join pg_proc as p on p.oid = g.tgfoid
        join pg_roles as r on r.oid = p.proowner
        where l.pid = pg_backend_pid()
            and l.locktype = 'relation'
            and l.database = (select d.oid from pg_database as d where d.datname = current_database())
            and l.mode not in ('AccessShareLock', 'RowShareLock')
            and g.tgdeferrable
            and (not g.tgisinternal and not r.rolsuper
                or exists (
                    select from pg_index as i
                    where i.indexrelid = g.tgconstrindid
                        and (i.indexprs is not null or i.indpred is not null)))
    ) then
        raise exception using
            errcode = 'RL034',
            message = 'a deferrable trigger of a table that was written would run with the rights of the relay',
            hint = 'Make the trigger not deferrable, or use PostgreSQL 18.';
    end if;
end
$$;
comment on function @schema@.relay_refuse_deferred() is
    'Runs as its caller. RL034 where something that this transaction wrote waits for the commit to run with the caller''s rights.';

create or replace function @schema@.relay_inbox_is_intact(
    p_table oid, p_function oid, p_version text
) returns boolean
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
begin
    if not exists (
        select from pg_class as c
        where c.oid = p_table and starts_with(p_version, concat_ws(' ', c.relnamespace, c.relname, ''))
    ) then
        raise exception using
            errcode = '42P01',
            message = 'the table of the inbox was dropped, renamed or moved';
    end if;
    if not exists (
        select
        from pg_proc as p
        cross join pg_class as c
        where p.oid = p_function and c.oid = p_table
            and concat_ws(' ', c.relnamespace, c.relname, p.xmin, p.ctid, c.relowner, c.relkind,
                c.relrowsecurity, c.relforcerowsecurity) = p_version
    ) then
        raise exception using
            errcode = 'RL034',
            message = 'the inbox was changed since the relay looked at it';
    end if;
    perform @schema@.relay_refuse_deferred();
    return true;
end
$$;
comment on function @schema@.relay_inbox_is_intact(oid, oid, text) is
    'Runs as its caller. RL034 unless the function beside an inbox is the one that relay_inbox looked at, and nothing that this transaction wrote waits for the commit to run with the caller''s rights.';

-- ---------------------------------------------------------------------------
-- Making
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_build_inbox(
    p_inbox @schema@.relay_inboxes, p_readers name[]
) returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    i @schema@.relay_inboxes := p_inbox;
    v_before @schema@.relay_inboxes := @schema@.relay_find_inbox(i.inbox_name, null, false);
    v_table text;
    v_schema oid := to_regnamespace(quote_ident(i.inbox_schema));
    v_owner name;
    v_readers text := (select string_agg(quote_ident(r.name), ', ') from unnest(p_readers) as r (name));
    v_comment text := format('Part of inbox %s, made by pgtrickle-relay.', i.inbox_name);
    v_problems text[];
    v_receive text;
    v_role text;
    v_detail text;
    v_hint text;
    f record;
begin
    perform @schema@.relay_check_event_triggers();
    if not i.adopted then
        if i.inbox_schema = @schema_name@
            and current_user <> (select pg_get_userbyid(n.nspowner) from pg_namespace as n where n.oid = v_schema)
        then
            perform @schema@.relay_create_inbox(i, p_readers);
            return;
        end if;
        i := @schema@.relay_new_inbox(i);
    elsif v_before.adopted then
        perform @schema@.relay_drop_inbox_parts(v_before, false, false);
    end if;
    v_table := format('%I.%I', i.inbox_schema, i.inbox_table);
    v_owner := (
        select pg_get_userbyid(c.relowner) from pg_class as c
        where c.relname = i.inbox_table and c.relnamespace = v_schema);
    v_problems := array(select p from @schema@.relay_inbox_problems(i) as p);
    if v_problems <> '{}' then
        raise exception using
            errcode = 'RL032',
            message = format('table %s does not fit as an inbox: %s', v_table, array_to_string(v_problems, '; ')),
            hint = 'Change the table, or say which column is meant, as in event_id_column => ''id''. Where policies need not hold, say policies => ''bypassed''.';
    elsif not pg_has_role(v_owner, 'usage') then
        raise exception using
            errcode = 'RL004',
            message = format('only %I, who owns %s, can make it an inbox', v_owner, v_table),
            hint = format('Call it as %I, or as a role that is a member of it.', v_owner);
    end if;
    -- ALTER ... OWNER wants it of the new owner too, but not where a superuser says it.
    select r.rolname into v_role
    from pg_roles as r
    where r.rolname in (current_user, v_owner)
        and not has_schema_privilege(r.rolname, v_schema, 'create')
        and not (select c.rolsuper from pg_roles as c where c.rolname = current_user);
    if found then
        raise exception using
            errcode = '42501',
            message = format('the functions of inbox "%s" stand in schema %I, where %I may not create them',
                i.inbox_name, i.inbox_schema, v_role),
            hint = format('grant create on schema %I to %I;', i.inbox_schema, v_role);
    end if;
    -- Free names: what stands there already belongs to somebody.
    select jsonb_object_agg(
        w.purpose,
        @schema@.relay_free_name(i.inbox_schema, w.purpose || '_' || i.inbox_name, i.inbox_name))
    into i.parts
    from @schema@.relay_inbox_parts(i) as w;

    for f in
        select w.*, case w.kind
            when 'view' then format('view %I.%I', i.inbox_schema, w.part_name)
            else format('function %I.%I(%s)', i.inbox_schema, w.part_name, w.arguments) end as part
        from @schema@.relay_inbox_parts(i) as w
    loop
        if f.kind = 'view' then
            execute format('create %s as %s', f.part, f.source);
        else
            execute format(
                'create %s returns %s language %s security definer set search_path = pg_catalog, pg_temp as %L',
                f.part, f.result, f.part_language, f.source);
        end if;
        if v_owner <> current_user then
            execute format('alter %s owner to %I', f.part, v_owner);
        end if;
        execute format('comment on %s is %L', f.part, v_comment);
        continue when f.kind = 'view';
        -- Default privileges may have given it to anybody.
        select string_agg(distinct case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end, ', ')
        into v_role
        from pg_proc as p
        cross join lateral aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) as a
        where p.oid = substr(f.part, 10)::regprocedure and a.grantee <> p.proowner;
        execute format('revoke all on %s from %s', f.part, coalesce(v_role, 'public'));
        if to_regrole('pgtrickle_relay') is not null then
            execute format('grant execute on %s to pgtrickle_relay', f.part);
        end if;
        v_receive := case f.purpose when 'receive' then f.part else v_receive end;
    end loop;
    for v_role in
        select r.rolname from pg_roles as r
        where (r.rolname = 'pgtrickle_relay' or r.rolname = any (p_readers))
            and not has_schema_privilege(r.rolname, v_schema, 'usage')
    loop
        if not (select pg_has_role(n.nspowner, 'usage') from pg_namespace as n where n.oid = v_schema) then
            raise exception using
                errcode = '42501',
                message = format('%I may not use schema %I, in which inbox "%s" stands', v_role, i.inbox_schema, i.inbox_name),
                hint = format('grant usage on schema %I to %I;', i.inbox_schema, v_role);
        end if;
        execute format('grant usage on schema %I to %I', i.inbox_schema, v_role);
    end loop;
    if v_readers is not null then
        execute format('grant select, update (processed_at, error, retry_count) on %s to %s', v_table, v_readers);
        for v_role in select w.part_name from @schema@.relay_inbox_parts(i) as w where w.kind = 'view' loop
            execute format('grant select on %I.%I to %s', i.inbox_schema, v_role, v_readers);
        end loop;
    end if;

    execute format('comment on %s is %L', v_receive,
        format('pgtrickle-relay inbox %s %s', i.inbox_name, pg_current_xact_id()));
    perform @schema@.relay_register_inbox(i);
    execute format('comment on %s is %L', v_receive, v_comment);
exception
    when others then
        -- With a remedy it is a person's to mend, for whom the calls on the way there are noise.
        get stacked diagnostics v_detail = pg_exception_detail, v_hint = pg_exception_hint;
        if v_hint = '' then
            raise;
        end if;
        raise exception using
            errcode = sqlstate, message = concat_ws(': ', sqlerrm, nullif(v_detail, '')), hint = v_hint;
end
$$;
comment on function @schema@.relay_build_inbox(@schema@.relay_inboxes, name[]) is
    'Runs as its caller, whose DDL is the proof that they may. Make the functions and views beside the table of an inbox, and register it.';

create or replace function @schema@.relay_register_inbox(p_inbox @schema@.relay_inboxes)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    i @schema@.relay_inboxes := p_inbox;
    v_schema oid := to_regnamespace(quote_ident(i.inbox_schema));
    v_owner oid := (
        select c.relowner from pg_class as c where c.relname = i.inbox_table and c.relnamespace = v_schema);
    v_problems text[];
    v_other @schema@.relay_inboxes;
begin
    i.parts := coalesce(i.parts, '{}');
    v_problems := array(
        select 'the table stands in the schema of the catalog'
        where i.inbox_schema = @schema_name@ and (i.adopted or v_owner <> quote_ident(current_user)::regrole)
        union all
        -- Only the owner of a function, and a superuser, can comment on it.
        select 'no comment of this transaction on its function'
        where not exists (
            select from pg_proc as p
            where p.pronamespace = v_schema and p.proname = i.parts ->> 'receive' and p.proowner = v_owner
                and obj_description(p.oid, 'pg_proc')
                    = format('pgtrickle-relay inbox %s %s', i.inbox_name, pg_current_xact_id()))
        union all
        select p from @schema@.relay_inbox_problems(i) as p
        union all
        select format('function %I is executable by others', p.proname)
        from @schema@.relay_inbox_parts(i) as w
        join pg_proc as p
            on p.proname = w.part_name and p.pronamespace = v_schema
            and pg_get_function_identity_arguments(p.oid) = w.arguments
        cross join lateral aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) as a
        where a.grantee not in (p.proowner, coalesce(to_regrole('pgtrickle_relay')::oid, p.proowner))
        union all
        select format('%I is no view of the owner', w.part_name)
        from @schema@.relay_inbox_parts(i) as w
        where w.kind = 'view' and not exists (
            select from pg_class as c
            where c.relname = w.part_name and c.relnamespace = v_schema
                and c.relkind = 'v' and c.relowner = v_owner));
    if v_problems <> '{}' then
        raise exception using
            errcode = '42501',
            message = format('nothing proves that you may make %I.%I an inbox: %s',
                i.inbox_schema, i.inbox_table, array_to_string(v_problems, '; ')),
            hint = format('Use %I.enable_inbox_tracking.', @schema_name@);
    end if;
    select r.* into v_other
    from @schema@.relay_inboxes as r
    where r.inbox_name = i.inbox_name or (r.inbox_schema = i.inbox_schema and r.inbox_table = i.inbox_table)
    order by r.inbox_name = i.inbox_name desc
    limit 1
    for update;
    if found then
        -- The same table again, or another in the place of one that works no longer.
        if v_other.inbox_name <> i.inbox_name or not i.adopted or not v_other.adopted
            or (v_other.inbox_schema, v_other.inbox_table) <> (i.inbox_schema, i.inbox_table)
                and not exists (select from @schema@.relay_inbox_problems(v_other))
        then
            raise exception using
                errcode = 'RL031',
                message = format('inbox "%s" exists already: %I.%I is its table',
                    v_other.inbox_name, v_other.inbox_schema, v_other.inbox_table),
                hint = format('Choose another name, or: select %I.%I(%L);', @schema_name@,
                    case when v_other.adopted then 'disable_inbox_tracking' else 'drop_inbox' end, v_other.inbox_name);
        end if;
        delete from @schema@.relay_inboxes as r where r.inbox_name = i.inbox_name;
    end if;
    i.created_at := now();
    i.parts := i.parts || (
        select jsonb_build_object('arguments', w.arguments)
        from @schema@.relay_inbox_parts(i) as w where w.purpose = 'receive');
    insert into @schema@.relay_inboxes select i.*;
exception
    when unique_violation then
        raise exception using
            errcode = 'RL031',
            message = format('inbox "%s", or one of its table, was made just now', i.inbox_name),
            hint = 'Choose another name.';
    when check_violation or not_null_violation then
        raise exception using
            errcode = '22023',
            message = format('the settings of inbox "%s" make no sense', i.inbox_name),
            hint = 'max_retries is 0 or more, retention_hours more than 0 or null, policies enforced or bypassed.';
end
$$;
comment on function @schema@.relay_register_inbox(@schema@.relay_inboxes) is
    'Definer, since nobody but the catalog''s owner writes the catalog. Registers an inbox after comparing all that stands beside its table, for whoever proves with a comment on its function to be the owner.';

-- ---------------------------------------------------------------------------
-- Finding
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_find_inbox(
    p_inbox text, p_schema text default null, p_must_exist boolean default true
) returns @schema@.relay_inboxes
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
    i @schema@.relay_inboxes;
begin
    select r.* into i
    from @schema@.relay_inboxes as r
    where r.inbox_name = p_inbox and (p_schema is null or r.inbox_schema = p_schema);
    if not found and p_must_exist is not false then
        raise exception using
            errcode = 'RL030',
            message = format('there is no inbox "%s"%s', coalesce(p_inbox, 'null'), ' in schema ' || quote_ident(p_schema)),
            hint = format('select %I.create_inbox(%L%s);', @schema_name@, p_inbox,
                ', schema => ' || quote_literal(p_schema));
    end if;
    return i;
end
$$;
comment on function @schema@.relay_find_inbox(text, text, boolean) is
    'Definer, since nobody but the catalog''s owner reads the catalog. The inbox of this name; where there is none RL030, or null if it need not exist.';

create or replace function @schema@.relay_inbox(inbox text default null, schema text default null)
returns table (
    inbox_name text, inbox_schema name, inbox_table name, adopted boolean, max_retries integer,
    retention_hours integer, created_at timestamptz, fields text[], types text[],
    receive_function text, count_function text, sweep_function text, table_id oid, function_id oid,
    version text, is_foreign boolean, problem text
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
    if inbox is not null then
        perform @schema@.relay_find_inbox(inbox, schema);
    end if;
    return query
    select
        i.inbox_name, i.inbox_schema, i.inbox_table, i.adopted, i.max_retries, i.retention_hours,
        i.created_at, w.fields, w.types,
        format('%I.%I', i.inbox_schema, i.parts ->> 'receive'),
        format('%I.%I', i.inbox_schema, i.parts ->> 'count'),
        quote_ident(i.inbox_schema) || '.' || quote_ident(i.parts ->> 'sweep'),
        c.oid, p.oid,
        concat_ws(' ', c.relnamespace, c.relname, p.xmin, p.ctid, c.relowner, c.relkind, c.relrowsecurity,
            c.relforcerowsecurity),
        i.inbox_schema <> @schema_name@,
        (select nullif(string_agg(b, '; '), '') from @schema@.relay_inbox_problems(i) as b)
    from @schema@.relay_inboxes as i
    left join @schema@.relay_inbox_parts(i) as w on w.purpose = 'receive'
    left join pg_class as c
        on c.relname = i.inbox_table and c.relnamespace = to_regnamespace(quote_ident(i.inbox_schema))
    left join pg_proc as p
        on p.proname = i.parts ->> 'receive' and p.pronamespace = c.relnamespace
        and pg_get_function_identity_arguments(p.oid) = w.arguments
    where $1 is null or i.inbox_name = $1
    order by i.inbox_name;
end
$$;
comment on function @schema@.relay_inbox(text, text) is
    'Definer, since nobody but the catalog''s owner reads the catalog. How to write one inbox, or each: the functions beside its table, the fields they take in their order, and what is wrong with it, null where nothing is. RL030 where there is none.';

-- ---------------------------------------------------------------------------
-- Removing
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_drop_inbox_parts(
    p_inbox @schema@.relay_inboxes, p_with_table boolean, p_cascade boolean
) returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_part text := format('Part of inbox %s, made by pgtrickle-relay.', p_inbox.inbox_name);
    v_schema oid := to_regnamespace(quote_ident(p_inbox.inbox_schema));
    v_cascade text := case when p_cascade then 'cascade' else 'restrict' end;
    f record;
begin
    perform @schema@.relay_check_event_triggers();
    -- Only what still has our comment: another's object may have taken the name.
    for f in
        select format('view %I.%I', p_inbox.inbox_schema, c.relname) as part, c.relowner as owner
        from pg_class as c
        where c.relnamespace = v_schema and c.relkind = 'v'
            and c.relname in (select w.value from jsonb_each_text(p_inbox.parts) as w)
            and obj_description(c.oid, 'pg_class') = v_part
        union all
        select 'function ' || p.oid::regprocedure, p.proowner
        from pg_proc as p
        where p.pronamespace = v_schema
            and p.proname in (select w.value from jsonb_each_text(p_inbox.parts) as w)
            and obj_description(p.oid, 'pg_proc') = v_part
    loop
        if pg_has_role(f.owner, 'usage') then
            execute format('drop %s %s', f.part, v_cascade);
        else
            raise notice '% is left over: it belongs to %', f.part, pg_get_userbyid(f.owner);
        end if;
    end loop;
    if p_with_table then
        execute format('drop table if exists %I.%I %s', p_inbox.inbox_schema, p_inbox.inbox_table, v_cascade);
    end if;
end
$$;
comment on function @schema@.relay_drop_inbox_parts(@schema@.relay_inboxes, boolean, boolean) is
    'Runs as its caller. Drop the functions and views beside an inbox, and its table if so asked.';

create or replace function @schema@.relay_forget_inbox(p_inbox text, p_cascade boolean) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    i @schema@.relay_inboxes := @schema@.relay_find_inbox(p_inbox);
    v_receive text := format('%I.%I(%s)', i.inbox_schema, i.parts ->> 'receive', i.parts ->> 'arguments');
begin
    if i.inbox_schema = @schema_name@ then
        if exists (
            select from pg_class as c
            where c.relname = i.inbox_table and c.relnamespace = to_regnamespace(quote_ident(@schema_name@))
                and (c.relowner <> quote_ident(current_user)::regrole or c.relkind not in ('r', 'p'))
        ) then
            raise exception using
                errcode = '42501',
                message = format('%I.%I is no table of the catalog''s owner', i.inbox_schema, i.inbox_table);
        end if;
        perform @schema@.relay_drop_inbox_parts(i, true, p_cascade);
    elsif exists (
        select from pg_proc as p
        where p.pronamespace = to_regnamespace(quote_ident(i.inbox_schema))
            and p.proname = i.parts ->> 'receive'
            and pg_get_function_identity_arguments(p.oid) = i.parts ->> 'arguments'
    ) then
        raise exception using
            errcode = '42501',
            message = format('only the owner of function %s can do this with inbox "%s"', v_receive, i.inbox_name),
            hint = format('drop function %s;', v_receive);
    end if;
    delete from @schema@.relay_inboxes as r where r.inbox_name = i.inbox_name;
end
$$;
comment on function @schema@.relay_forget_inbox(text, boolean) is
    'Definer, since nobody but the catalog''s owner writes the catalog. Takes an inbox out of it: one in our schema with its table, one of others when its owner, and nobody else can, has dropped its function.';

create or replace function @schema@.relay_remove_inbox(
    p_inbox @schema@.relay_inboxes, p_with_table boolean, p_cascade boolean
) returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
begin
    if p_inbox is null then
        return;
    elsif p_with_table and p_inbox.adopted then
        raise exception using
            errcode = 'RL033',
            message = format('inbox "%s" is an adopted table and is not dropped: %I.%I was there before',
                p_inbox.inbox_name, p_inbox.inbox_schema, p_inbox.inbox_table),
            hint = format('select %I.disable_inbox_tracking(%L);', @schema_name@, p_inbox.inbox_name);
    elsif not p_with_table and p_inbox.inbox_schema = @schema_name@ then
        raise exception using
            errcode = 'RL033',
            message = format('inbox "%s" has no other owner that could keep its table', p_inbox.inbox_name),
            hint = format('select %I.drop_inbox(%L);', @schema_name@, p_inbox.inbox_name);
    elsif p_inbox.inbox_schema <> @schema_name@ then
        perform @schema@.relay_drop_inbox_parts(p_inbox, p_with_table, p_cascade);
    end if;
    perform @schema@.relay_forget_inbox(p_inbox.inbox_name, p_cascade);
end
$$;
comment on function @schema@.relay_remove_inbox(@schema@.relay_inboxes, boolean, boolean) is
    'Runs as its caller, whose DDL is the proof that they may. Drop what stands beside an inbox, with its table or without, and forget it.';

-- ---------------------------------------------------------------------------
-- What people call
--
-- Each is one expression, which PostgreSQL puts in the place of the call: an error then comes with
-- the one line that says where it was raised, and a name means what it means to the caller.
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_new_inbox(p_inbox @schema@.relay_inboxes)
returns @schema@.relay_inboxes
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    i @schema@.relay_inboxes := p_inbox;
    v_table text := quote_ident(i.inbox_schema) || '.' || quote_ident(i.inbox_name);
begin
    if coalesce(octet_length(i.inbox_name), 0) not between 1 and 63 then
        raise exception using
            errcode = '22023',
            message = format('"%s" can''t be the name of an inbox', i.inbox_name),
            hint = 'Its table has the same name: 1 to 63 bytes.';
    elsif i.inbox_schema is null or to_regnamespace(quote_ident(i.inbox_schema)) is null then
        raise exception using
            errcode = '3F000',
            message = format('there is no schema "%s"', i.inbox_schema),
            hint = format('create schema %I;', i.inbox_schema);
    elsif i.inbox_schema = @schema_name@ and i.inbox_name ~ '^(relay_|pgt_|outbox_)' then
        raise exception using
            errcode = '22023',
            message = format('"%s" can''t be the name of an inbox in schema %I', i.inbox_name, i.inbox_schema),
            hint = 'Names that begin with relay_, pgt_ or outbox_ are kept for the catalog and for outboxes.';
    elsif to_regclass(v_table) is not null then
        raise exception using
            errcode = 'RL031',
            message = format('%s is there already', v_table),
            hint = case when i.inbox_schema = @schema_name@ then 'Choose another name.' else format(
                'Choose another name, or: select %I.enable_inbox_tracking(%L, %L);', @schema_name@, i.inbox_name, v_table) end;
    end if;
    execute format(
        $ddl$
        create table %s (
            event_id text primary key,
            event_type text not null,
            source text,
            aggregate_id text,
            payload jsonb not null,
            received_at timestamptz not null default now(),
            processed_at timestamptz,
            error text,
            retry_count integer not null default 0,
            trace_id text,
            headers jsonb not null default '{}'
        )
        $ddl$, v_table);
    execute format('comment on table %s is %L', v_table,
        'Messages received by pgtrickle-relay, one row for each deduplication key.');
    -- For the pending view, the dead-letter view and the sweep.
    execute format('create index on %s (received_at) where processed_at is null', v_table);
    execute format('create index on %s (received_at) where processed_at is null and retry_count > 0', v_table);
    execute format('create index on %s (processed_at) where processed_at is not null', v_table);
    if i.inbox_schema = @schema_name@ and to_regrole('pgtrickle_relay') is not null then
        execute format(
            'grant select (event_id, processed_at, error, retry_count), update (processed_at, error, retry_count) on %s to pgtrickle_relay',
            v_table);
    end if;
    i.inbox_table := i.inbox_name;
    i.policies := 'enforced';
    i.parts := null;
    i.columns := (
        select jsonb_object_agg(a.attname, a.attname) from pg_attribute as a
        where a.attrelid = to_regclass(v_table) and a.attnum > 0);
    return i;
end
$$;
comment on function @schema@.relay_new_inbox(@schema@.relay_inboxes) is
    'Runs as its caller, whose DDL is the proof that they may. Part of create_inbox: make the table, and say how it is to be registered.';

create or replace function @schema@.relay_create_inbox(
    p_inbox @schema@.relay_inboxes, p_readers name[]
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    p_inbox.inbox_schema := @schema_name@;
    p_inbox.adopted := false;
    perform @schema@.relay_build_inbox(p_inbox, p_readers);
end
$$;
comment on function @schema@.relay_create_inbox(@schema@.relay_inboxes, name[]) is
    'Definer, since nobody but the catalog''s owner creates in our schema. create_inbox there: table, functions and views are new and belong to the catalog''s owner.';

create or replace function @schema@.create_inbox(
    inbox_name text, schema text default @schema_name@, max_retries integer default 5,
    schedule text default '1s', with_dead_letter boolean default true,
    with_stats boolean default true, retention_hours integer default null,
    readers name[] default '{}'
) returns void
language sql volatile security invoker as $$
    select @schema@.relay_build_inbox(
        pg_catalog.jsonb_populate_record(null::@schema@.relay_inboxes, pg_catalog.jsonb_build_object(
            'inbox_name', inbox_name, 'inbox_schema', schema, 'adopted', false, 'max_retries', max_retries,
            'schedule', schedule, 'with_dead_letter', with_dead_letter, 'with_stats', with_stats,
            'retention_hours', retention_hours)),
        readers)
$$;
comment on function @schema@.create_inbox(text, text, integer, text, boolean, boolean, integer, name[]) is
    'Runs as its caller. Create an inbox table with its functions and views. In our schema it belongs to the catalog''s owner, elsewhere to the caller. readers are roles that may read it and mark its messages.';

create or replace function @schema@.relay_adopted_inbox(
    p_inbox @schema@.relay_inboxes, p_called text, p_table oid
) returns @schema@.relay_inboxes
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
begin
    if p_table is null or p_inbox.inbox_name is null then
        raise exception using
            errcode = 'RL032',
            message = format('there is no table %s to adopt as inbox', coalesce(p_called, 'null')),
            hint = format('select %I.create_inbox(%L);', @schema_name@, p_inbox.inbox_name);
    end if;
    select n.nspname, c.relname into p_inbox.inbox_schema, p_inbox.inbox_table
    from pg_class as c
    join pg_namespace as n on n.oid = c.relnamespace
    where c.oid = p_table;
    -- An optional field whose column has the default name, and is not there, is left out.
    p_inbox.columns := (
        select jsonb_object_agg(m.key, m.value)
        from jsonb_each_text(p_inbox.columns) as m
        where m.key <> m.value or m.key in ('event_id', 'payload') or exists (
            select from pg_attribute as a
            where a.attrelid = p_table and a.attname = m.value and not a.attisdropped));
    return p_inbox;
end
$$;
comment on function @schema@.relay_adopted_inbox(@schema@.relay_inboxes, text, oid) is
    'Runs as its caller. Part of enable_inbox_tracking: how a table is to be registered as an inbox.';

create or replace function @schema@.enable_inbox_tracking(
    inbox_name text, table_name text, event_id_column text default 'event_id',
    event_type_column text default 'event_type', source_column text default 'source',
    aggregate_id_column text default 'aggregate_id', payload_column text default 'payload',
    headers_column text default 'headers', received_at_column text default 'received_at',
    processed_at_column text default 'processed_at', error_column text default 'error',
    retry_count_column text default 'retry_count', trace_id_column text default 'trace_id',
    max_retries integer default 5, retention_hours integer default null,
    policies text default 'enforced'
) returns void
language sql volatile security invoker as $$
    select @schema@.relay_build_inbox(
        @schema@.relay_adopted_inbox(
            pg_catalog.jsonb_populate_record(null::@schema@.relay_inboxes, pg_catalog.jsonb_build_object(
                'inbox_name', inbox_name, 'adopted', true, 'max_retries', max_retries, 'schedule', '1s',
                'with_dead_letter', true, 'with_stats', true, 'retention_hours', retention_hours,
                'policies', policies, 'columns', pg_catalog.jsonb_build_object(
                    'event_id', event_id_column, 'event_type', event_type_column, 'source', source_column,
                    'aggregate_id', aggregate_id_column, 'payload', payload_column, 'headers', headers_column,
                    'received_at', received_at_column, 'processed_at', processed_at_column,
                    'error', error_column, 'retry_count', retry_count_column, 'trace_id', trace_id_column))),
            table_name, @schema@.relay_relation(table_name)),
        '{}')
$$;
comment on function @schema@.enable_inbox_tracking(text, text, text, text, text, text, text, text, text, text, text, text, text, integer, integer, text) is
    'Runs as its caller. Make a table of the caller an inbox, with columns of other names where said; again after the table was changed. RL032 lists all that does not fit. The table stays the caller''s: it is never dropped.';

create or replace function @schema@.disable_inbox_tracking(inbox_name text) returns void
language sql volatile security invoker as $$
    select @schema@.relay_remove_inbox(@schema@.relay_find_inbox(inbox_name), false, false)
$$;
comment on function @schema@.disable_inbox_tracking(text) is
    'Runs as its caller. Forget an inbox and drop the functions and views beside it; the table and its messages stay.';

create or replace function @schema@.drop_inbox(
    inbox_name text, if_exists boolean default false, "cascade" boolean default false
) returns void
language sql volatile security invoker as $$
    select @schema@.relay_remove_inbox(
        @schema@.relay_find_inbox(inbox_name, null, if_exists is not true), true, "cascade" is true)
$$;
comment on function @schema@.drop_inbox(text, boolean, boolean) is
    'Runs as its caller. Drop an inbox with its messages, functions and views; never an adopted table (RL033).';

create or replace function @schema@.inbox_status(name text default null)
returns table (
    inbox_name text, inbox_schema text, inbox_table text, status text, total_messages bigint,
    pending_messages bigint, dlq_messages bigint, processed_messages bigint,
    oldest_pending_at timestamptz, max_retries integer, retention_hours integer, adopted boolean,
    created_at timestamptz, problem text
)
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    i record;
    v_counts jsonb;
    v_problem text;
    v_hint text;
begin
    for i in select r.* from @schema@.relay_inbox(name) as r
    loop
        v_counts := null;
        v_problem := i.problem;
        if v_problem is null then
            begin
                execute format('select %s()', i.count_function) into v_counts;
            exception
                when others then
                    v_problem := sqlerrm;
            end;
        end if;
        return query select
            i.inbox_name, i.inbox_schema::text, i.inbox_table::text,
            case when v_problem is not null then 'broken' when v_counts ->> 'dead' <> '0' then 'degraded' else 'healthy' end,
            (v_counts ->> 'total')::bigint, (v_counts ->> 'pending')::bigint, (v_counts ->> 'dead')::bigint,
            (v_counts ->> 'processed')::bigint, (v_counts ->> 'oldest')::timestamptz,
            i.max_retries, i.retention_hours, i.adopted, i.created_at, v_problem;
    end loop;
exception
    when sqlstate 'RL030' then
        get stacked diagnostics v_hint = pg_exception_hint;
        raise exception using errcode = 'RL030', message = sqlerrm, hint = v_hint;
end
$$;
comment on function @schema@.inbox_status(text) is
    'Runs as its caller. State of one inbox, or of all: healthy, degraded (there are dead letters) or broken, with the reason. Counts their messages.';

create or replace function @schema@.inbox_health(name text) returns jsonb
language sql volatile security invoker set search_path = pg_catalog, pg_temp as $$
    select to_jsonb(s) from @schema@.inbox_status(coalesce(name, '')) as s
$$;
comment on function @schema@.inbox_health(text) is
    'Runs as its caller. The row of inbox_status as one object.';

-- No search_path of its own: triggers of the table see the caller's.
create or replace function @schema@.relay_mark_inbox(
    p_inbox @schema@.relay_inboxes, p_event_ids text[], p_mark text, p_error text default null
) returns integer
language plpgsql volatile security invoker as $$
declare
    v_retries text := pg_catalog.quote_ident(p_inbox.columns ->> 'retry_count');
    v_set text;
    v_marked integer;
begin
    if p_inbox.columns ->> 'processed_at' is null then
        raise exception using
            errcode = 'RL032',
            message = pg_catalog.format('inbox "%s" has no column for processed_at', p_inbox.inbox_name),
            hint = pg_catalog.format('Add the column to %I.%I, then call %I.enable_inbox_tracking again.',
                p_inbox.inbox_schema, p_inbox.inbox_table, @schema_name@);
    end if;
    -- concat_ws leaves out what is null: the columns that an adopted table lacks.
    v_set := pg_catalog.concat_ws(', ',
        pg_catalog.format('%I = %s', p_inbox.columns ->> 'processed_at',
            case p_mark when 'processed' then 'pg_catalog.now()' else 'null' end),
        pg_catalog.quote_ident(p_inbox.columns ->> 'error') || ' = $2',
        case p_mark
            when 'failed' then v_retries || ' = marked.' || v_retries || ' + 1'
            when 'pending' then v_retries || ' = 0'
        end);
    execute pg_catalog.format('update %I.%I as marked set %s where marked.%I = any ($1)',
        p_inbox.inbox_schema, p_inbox.inbox_table, v_set, p_inbox.columns ->> 'event_id')
    using p_event_ids, p_error;
    get diagnostics v_marked = row_count;
    return v_marked;
end
$$;
comment on function @schema@.relay_mark_inbox(@schema@.relay_inboxes, text[], text, text) is
    'Runs as its caller, with nothing but the caller''s own rights on the table. Makes messages processed, failed or pending; returns how many.';

create or replace function @schema@.replay_inbox_messages(name text, event_ids text[])
returns integer
language sql volatile security invoker as $$
    select @schema@.relay_mark_inbox(@schema@.relay_find_inbox(name), event_ids, 'pending')
$$;
comment on function @schema@.replay_inbox_messages(text, text[]) is
    'Runs as its caller, who needs UPDATE on the marking columns of the table. Make messages pending again, processed or dead; returns how many.';

create or replace function @schema@.inbox_mark_processed(name text, event_ids text[])
returns integer
language sql volatile security invoker as $$
    select @schema@.relay_mark_inbox(@schema@.relay_find_inbox(name), event_ids, 'processed')
$$;
comment on function @schema@.inbox_mark_processed(text, text[]) is
    'Runs as its caller, who needs UPDATE on the marking columns of the table. Messages were processed; returns how many there were.';

create or replace function @schema@.inbox_mark_processed(name text, event_id text) returns boolean
language sql volatile security invoker as $$
    select @schema@.inbox_mark_processed(name, array[event_id]) operator(pg_catalog.>) 0
$$;
comment on function @schema@.inbox_mark_processed(text, text) is
    'Runs as its caller, who needs UPDATE on the marking columns of the table. One message was processed; false where there is none of this id.';

create or replace function @schema@.inbox_mark_failed(name text, event_id text, error text)
returns boolean
language sql volatile security invoker as $$
    select @schema@.relay_mark_inbox(@schema@.relay_find_inbox(name), array[event_id], 'failed', error)
        operator(pg_catalog.>) 0
$$;
comment on function @schema@.inbox_mark_failed(text, text, text) is
    'Runs as its caller, who needs UPDATE on the marking columns of the table. Processing a message failed: counts a retry and keeps the error. After max_retries it is in the dead-letter view instead of the pending one.';
