-- Inboxes: tables that messages are written to, each message once.
--
-- What creates or drops tables runs as the caller. What reads or writes the catalog is a definer
-- function, which looks at the role in force where it must know who asks.

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

create or replace function pgtrickle.relay_inbox_fields()
returns table (field text, is_required boolean, types text[])
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    values
        ('event_id', true, array['text', 'character varying']),
        ('event_type', false, array['text', 'character varying']),
        ('source', false, array['text', 'character varying']),
        ('aggregate_id', false, array['text', 'character varying']),
        ('payload', true, array['jsonb', 'json', 'text', 'bytea']),
        ('headers', false, array['jsonb']),
        ('received_at', false, array['timestamp with time zone', 'timestamp without time zone']),
        ('processed_at', false, array['timestamp with time zone', 'timestamp without time zone']),
        ('error', false, array['text', 'character varying']),
        ('retry_count', false, array['integer', 'bigint', 'smallint']),
        ('trace_id', false, array['text', 'character varying'])
$$;

comment on function pgtrickle.relay_inbox_fields() is
    'Fields of an inbox and the column types that can hold them.';

revoke all on function pgtrickle.relay_inbox_fields() from public;

-- ---------------------------------------------------------------------------
-- Making
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_build_inbox(p_inbox text, p_schema text)
returns oid
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_relation text := format('%I.%I', p_schema, p_inbox);
begin
    if coalesce(octet_length(p_inbox), 0) not between 1 and 63 then
        raise exception using
            errcode = '22023',
            message = format('"%s" can''t be the name of an inbox', p_inbox),
            hint = 'Its table has the same name: 1 to 63 bytes.';
    end if;
    if to_regclass(v_relation) is not null then
        raise exception using
            errcode = 'RL031',
            message = format('there is a table %s already, and it is no inbox', v_relation),
            hint = format('select pgtrickle.enable_inbox_tracking(%L, %L);', p_inbox, v_relation);
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
        $ddl$, v_relation);
    execute format('comment on table %s is %L', v_relation,
        'Messages received by pgtrickle-relay, one row for each deduplication key.');
    execute format('create index on %s (received_at) where processed_at is null', v_relation);
    execute format(
        'create index on %s (received_at) where processed_at is null and retry_count > 0', v_relation);
    execute format('create index on %s (processed_at) where processed_at is not null', v_relation);
    return v_relation::regclass;
end
$$;

comment on function pgtrickle.relay_build_inbox(text, text) is
    'Create the table of an inbox. Its partial indexes serve the pending view, the dead-letter view and relay_sweep_inbox.';

revoke all on function pgtrickle.relay_build_inbox(text, text) from public;

create or replace function pgtrickle.relay_build_inbox_views(
    p_inbox text,
    p_table oid,
    p_columns jsonb,
    p_max_retries integer,
    p_with_dead_letter boolean,
    p_with_stats boolean
)
returns name[]
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_schema text := (select n.nspname from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
        where c.oid = p_table);
    v_table text := pgtrickle.relay_relation(p_table);
    v_names name[] := array[
        pgtrickle.relay_view_name('pending_', p_inbox, v_schema),
        case when p_with_dead_letter and p_columns ? 'retry_count'
            then pgtrickle.relay_view_name('dlq_', p_inbox, v_schema) end,
        case when p_with_stats then pgtrickle.relay_view_name('stats_', p_inbox, v_schema) end];
    v_dead text := case when p_columns ? 'retry_count'
        then format('i.%I >= %s', p_columns ->> 'retry_count', p_max_retries) else 'false' end;
    v_received text := case when p_columns ? 'received_at'
        then format('i.%I', p_columns ->> 'received_at') else 'null::timestamptz' end;
begin
    if not p_columns ? 'processed_at' then
        return array[null, null, null]::name[];
    end if;
    execute format(
        'create view %I.%I as select i.* from %s as i where i.%I is null and not (%s)',
        v_schema, v_names[1], v_table, p_columns ->> 'processed_at', v_dead);
    execute format('comment on view %I.%I is %L', v_schema, v_names[1],
        'Messages that wait to be processed.');
    if v_names[2] is not null then
        execute format(
            'create view %I.%I as select i.* from %s as i where i.%I is null and %s',
            v_schema, v_names[2], v_table, p_columns ->> 'processed_at', v_dead);
        execute format('comment on view %I.%I is %L', v_schema, v_names[2],
            format('Messages that failed %s times.', p_max_retries));
    end if;
    if v_names[3] is not null then
        execute format(
            $ddl$
            create view %1$I.%2$I as
            select
                %3$s as event_type,
                count(*) as total,
                count(*) filter (where i.%4$I is null and not (%5$s)) as pending,
                count(i.%4$I) as processed,
                count(*) filter (where i.%4$I is null and %5$s) as dead_letters,
                min(%6$s) filter (where i.%4$I is null) as oldest_pending_at
            from %7$s as i
            group by 1
            $ddl$,
            v_schema, v_names[3],
            case when p_columns ? 'event_type' then format('i.%I', p_columns ->> 'event_type')
                else 'null::text' end,
            p_columns ->> 'processed_at', v_dead, v_received, v_table);
        execute format('comment on view %I.%I is %L', v_schema, v_names[3],
            'Messages by event type; counts the whole inbox.');
    end if;
    return v_names;
end
$$;

comment on function pgtrickle.relay_build_inbox_views(text, oid, jsonb, integer, boolean, boolean) is
    'Create the views of an inbox, as far as its columns allow; returns the names of the pending, dead-letter and statistics view.';

revoke all on function pgtrickle.relay_build_inbox_views(text, oid, jsonb, integer, boolean, boolean) from public;

create or replace function pgtrickle.relay_view_name(p_prefix text, p_inbox text, p_schema text)
returns name
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_wanted text := p_prefix || p_inbox;
    v_name text := pgtrickle.relay_cut_name(v_wanted, 63);
begin
    if v_name <> v_wanted or to_regclass(format('%I.%I', p_schema, v_name)) is not null then
        v_name := pgtrickle.relay_cut_name(v_wanted, 55) || '_' || left(md5(v_wanted), 7);
    end if;
    return v_name;
end
$$;

comment on function pgtrickle.relay_view_name(text, text, text) is
    'Name of a view of an inbox: cut to 63 bytes, with 7 characters of a digest where it was cut or is taken.';

revoke all on function pgtrickle.relay_view_name(text, text, text) from public;

create or replace function pgtrickle.relay_grant_inbox(p_table oid, p_columns jsonb)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_table text := pgtrickle.relay_relation(p_table);
    v_schema oid := (select c.relnamespace from pg_class as c where c.oid = p_table);
    v_owner name := (select c.relowner::regrole::text from pg_class as c
        where c.oid = 'pgtrickle.relay_inboxes'::regclass);
    v_role name;
begin
    foreach v_role in array array[v_owner, 'pgtrickle_relay']
    loop
        continue when to_regrole(quote_ident(v_role)) is null
            or has_schema_privilege(v_role, v_schema, 'usage');
        execute format('grant usage on schema %s to %I', v_schema::regnamespace, v_role);
    end loop;
    if (select c.relowner::regrole::text from pg_class as c where c.oid = p_table) <> v_owner then
        execute format('grant select, update, delete on %s to %I', v_table, v_owner);
    end if;
    if to_regrole('pgtrickle_relay') is not null then
        execute format('grant insert, select (%I) on %s to pgtrickle_relay',
            p_columns ->> 'event_id', v_table);
    end if;
end
$$;

comment on function pgtrickle.relay_grant_inbox(oid, jsonb) is
    'Let the relay write an inbox and see which messages are there, and the catalog''s owner count and sweep them.';

revoke all on function pgtrickle.relay_grant_inbox(oid, jsonb) from public;

create or replace function pgtrickle.relay_record_inbox(
    p_inbox text,
    p_table oid,
    p_columns jsonb,
    p_views name[],
    p_settings jsonb
)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    insert into pgtrickle.relay_inboxes (
        inbox_name, inbox_schema, inbox_table, adopted, max_retries, schedule, with_dead_letter,
        with_stats, retention_hours, columns, pending_view, dead_letter_view, stats_view
    )
    select
        p_inbox, n.nspname, c.relname, s.adopted, s.max_retries, s.schedule, s.with_dead_letter,
        s.with_stats, s.retention_hours, p_columns, p_views[1], p_views[2], p_views[3]
    from pg_class as c
    join pg_namespace as n on n.oid = c.relnamespace
    cross join jsonb_to_record(p_settings) as s (
        adopted boolean, max_retries integer, schedule text, with_dead_letter boolean,
        with_stats boolean, retention_hours integer)
    where c.oid = p_table;
exception
    when unique_violation then
        perform pgtrickle.relay_inbox_exists_already(p_inbox, p_table);
    when check_violation then
        raise exception using
            errcode = '22023',
            message = format('the settings of inbox "%s" make no sense', p_inbox),
            detail = p_settings::text,
            hint = 'max_retries is 0 or more, retention_hours more than 0 or null.';
end
$$;

comment on function pgtrickle.relay_record_inbox(text, oid, jsonb, name[], jsonb) is
    'Write an inbox into the catalog. RL031 where its name or its table is there.';

revoke all on function pgtrickle.relay_record_inbox(text, oid, jsonb, name[], jsonb) from public;

create or replace function pgtrickle.relay_inbox_exists_already(p_inbox text, p_table oid)
returns void
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_taken text := (
        select format('%I.%I is the table of inbox "%s"', i.inbox_schema, i.inbox_table, i.inbox_name)
        from pgtrickle.relay_inboxes as i
        where i.inbox_name = p_inbox
            or format('%I.%I', i.inbox_schema, i.inbox_table) = pgtrickle.relay_relation(p_table)
        order by i.inbox_name = p_inbox desc
        limit 1);
begin
    raise exception using
        errcode = 'RL031',
        message = format('inbox "%s" exists already', p_inbox),
        detail = v_taken,
        hint = format('Choose another name, or: select pgtrickle.drop_inbox(%L);', p_inbox);
end
$$;

comment on function pgtrickle.relay_inbox_exists_already(text, oid) is
    'Raise RL031 with the table that is in the way.';

revoke all on function pgtrickle.relay_inbox_exists_already(text, oid) from public;

create or replace function pgtrickle.relay_register_inbox(
    p_inbox text,
    p_table oid,
    p_columns jsonb,
    p_views name[],
    p_settings jsonb
)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgtrickle.relay_require_table_owner(p_table);
    perform pgtrickle.relay_record_inbox(p_inbox, p_table, p_columns, p_views, p_settings);
end
$$;

comment on function pgtrickle.relay_register_inbox(text, oid, jsonb, name[], jsonb) is
    'Write an inbox into the catalog for the owner of its table. Definer: the catalog is written by functions only.';

revoke all on function pgtrickle.relay_register_inbox(text, oid, jsonb, name[], jsonb) from public;

create or replace function pgtrickle.relay_own_columns()
returns jsonb
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select jsonb_object_agg(f.field, f.field) from pgtrickle.relay_inbox_fields() as f
$$;

comment on function pgtrickle.relay_own_columns() is
    'Columns of an inbox that relay_build_inbox made: they are named like the fields.';

revoke all on function pgtrickle.relay_own_columns() from public;

create or replace function pgtrickle.relay_create_inbox(
    p_inbox text,
    p_max_retries integer,
    p_schedule text,
    p_with_dead_letter boolean,
    p_retention_hours integer
)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_columns jsonb := pgtrickle.relay_own_columns();
    v_table oid := pgtrickle.relay_build_inbox(p_inbox, 'pgtrickle');
    v_views name[] := pgtrickle.relay_build_inbox_views(
        p_inbox, v_table, v_columns, p_max_retries, p_with_dead_letter, true);
begin
    perform pgtrickle.relay_grant_inbox(v_table, v_columns);
    perform pgtrickle.relay_record_inbox(p_inbox, v_table, v_columns, v_views, jsonb_build_object(
        'adopted', false, 'max_retries', p_max_retries, 'schedule', p_schedule,
        'with_dead_letter', p_with_dead_letter, 'with_stats', true,
        'retention_hours', p_retention_hours));
end
$$;

comment on function pgtrickle.relay_create_inbox(text, integer, text, boolean, integer) is
    'Create an inbox that belongs to the catalog''s owner; for set_relay_inbox.';

revoke all on function pgtrickle.relay_create_inbox(text, integer, text, boolean, integer) from public;

-- ---------------------------------------------------------------------------
-- Adopting
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_inbox_problems(p_table oid, p_columns jsonb)
returns setof text
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    with actual as (
        select a.attname::text as name, format_type(a.atttypid, null) as type, a.attnum,
            a.attnotnull and not a.atthasdef and a.attidentity = '' as needs_value
        from pg_attribute as a
        where a.attrelid = p_table and a.attnum > 0 and not a.attisdropped
    ), wanted as (
        select f.field, f.is_required, f.types, coalesce(p_columns ->> f.field, f.field) as name
        from pgtrickle.relay_inbox_fields() as f
    )
    select format('column %I for %s does not exist', w.name, w.field)
    from wanted as w
    where not exists (select from actual as a where a.name = w.name)
        and (w.is_required or w.name <> w.field)
    union all
    select format('column %I for %s is of type %s, but must be %s',
        w.name, w.field, a.type, array_to_string(w.types, ' or '))
    from wanted as w
    join actual as a using (name)
    where a.type <> all (w.types)
    union all
    select format('column %I has no unique key of its own, so that a repeated message would be written twice', a.name)
    from wanted as w
    join actual as a using (name)
    where w.field = 'event_id'
        and not exists (
            select
            from pg_index as i
            where i.indrelid = p_table
                and i.indisunique and i.indisvalid and i.indimmediate
                and i.indpred is null and i.indexprs is null
                and i.indnkeyatts = 1 and i.indkey[0] = a.attnum)
    union all
    select format('column %I is not null without a default, and nothing is written to it', a.name)
    from actual as a
    where a.needs_value
        and not exists (
            select from wanted as w
            where w.name = a.name and w.field not in ('received_at', 'processed_at', 'error', 'retry_count'))
    union all
    select format('column %I stands for more than one field: %s', w.name, string_agg(w.field, ', '))
    from wanted as w
    group by w.name
    having count(*) > 1
$$;

comment on function pgtrickle.relay_inbox_problems(oid, jsonb) is
    'Why a table does not fit as an inbox: columns, types, the unique key, columns that nobody fills.';

revoke all on function pgtrickle.relay_inbox_problems(oid, jsonb) from public;

create or replace function pgtrickle.relay_adopt_inbox(
    p_inbox text,
    p_table_name text,
    p_table oid,
    p_columns jsonb,
    p_settings jsonb
)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_problems text[];
    v_columns jsonb;
    v_views name[];
begin
    if p_table is null or not exists (
        select from pg_class as c where c.oid = p_table and c.relkind in ('r', 'p')
    ) then
        raise exception using
            errcode = 'RL032',
            message = format('there is no table %s to adopt as inbox', coalesce(p_table_name, 'null')),
            hint = format('select pgtrickle.create_inbox(%L);', p_inbox);
    end if;
    perform pgtrickle.relay_require_table_owner(p_table);
    v_problems := array(select * from pgtrickle.relay_inbox_problems(p_table, p_columns));
    if v_problems <> '{}' then
        raise exception using
            errcode = 'RL032',
            message = format('table %s does not fit as an inbox', pgtrickle.relay_relation(p_table)),
            detail = array_to_string(v_problems, E'\n'),
            hint = 'Change the table, or say which column is meant, as in event_id_column => ''id''.';
    end if;
    -- Optional fields without a column are left out.
    select jsonb_object_agg(f.field, a.attname)
    into v_columns
    from pgtrickle.relay_inbox_fields() as f
    join pg_attribute as a
        on a.attrelid = p_table
        and a.attname = coalesce(p_columns ->> f.field, f.field)
        and a.attnum > 0
        and not a.attisdropped;
    v_views := pgtrickle.relay_build_inbox_views(
        p_inbox, p_table, v_columns, (p_settings ->> 'max_retries')::integer, true, true);
    perform pgtrickle.relay_grant_inbox(p_table, v_columns);
    perform pgtrickle.relay_register_inbox(p_inbox, p_table, v_columns, v_views, p_settings);
end
$$;

comment on function pgtrickle.relay_adopt_inbox(text, text, oid, jsonb, jsonb) is
    'Make an existing table an inbox, see enable_inbox_tracking.';

revoke all on function pgtrickle.relay_adopt_inbox(text, text, oid, jsonb, jsonb) from public;

-- ---------------------------------------------------------------------------
-- Finding
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_find_inbox(p_inbox text, p_schema text default null)
returns pgtrickle.relay_inboxes
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    i pgtrickle.relay_inboxes;
begin
    select r.* into i
    from pgtrickle.relay_inboxes as r
    where p_inbox in (r.inbox_name, r.inbox_table)
        and (p_schema is null or r.inbox_schema = p_schema)
    order by r.inbox_name = p_inbox desc, r.inbox_schema = 'pgtrickle' desc
    limit 1;
    if not found then
        i := pgtrickle.relay_find_extension_inbox(p_inbox);
    end if;
    if i.inbox_name is null then
        raise exception using
            errcode = 'RL030',
            message = format('there is no inbox "%s"', coalesce(p_inbox, 'null')),
            hint = case
                when p_schema is null then format('select pgtrickle.create_inbox(%L);', p_inbox)
                else format('select pgtrickle.create_inbox(%L, schema => %L);', p_inbox, p_schema)
            end;
    end if;
    return i;
end
$$;

comment on function pgtrickle.relay_find_inbox(text, text) is
    'The inbox of this name or table; RL030 where there is none. Definer: the catalog is read by functions only.';

revoke all on function pgtrickle.relay_find_inbox(text, text) from public;

create or replace function pgtrickle.relay_find_extension_inbox(p_inbox text)
returns pgtrickle.relay_inboxes
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    i pgtrickle.relay_inboxes;
    v_row jsonb;
begin
    if exists (
        select from pg_class as c
        where c.oid = to_regclass('pgtrickle.pgt_inbox_config')
            and c.relkind = 'r'
            -- Its owner may not have granted it.
            and has_table_privilege(c.oid, 'select')
    ) then
        execute 'select to_jsonb(c) from pgtrickle.pgt_inbox_config as c where c.inbox_name = $1'
        into v_row
        using p_inbox;
    end if;
    if v_row is null then
        return null;
    end if;
    i.inbox_name := p_inbox;
    i.inbox_schema := coalesce(v_row ->> 'inbox_schema', 'pgtrickle');
    i.inbox_table := coalesce(v_row ->> 'inbox_table', v_row ->> 'table_name', p_inbox);
    -- The extension's table: it looks after it, as an owner of an adopted one does.
    i.adopted := true;
    i.max_retries := coalesce((v_row ->> 'max_retries')::integer, 5);
    i.columns := (
        select jsonb_object_agg(f.field, coalesce(
            v_row ->> (f.field || '_column'),
            case f.field when 'event_id' then v_row ->> 'id_column' end,
            f.field))
        from pgtrickle.relay_inbox_fields() as f);
    return i;
end
$$;

comment on function pgtrickle.relay_find_extension_inbox(text) is
    'An inbox that the pg_trickle extension made, in the words of ours; null where there is none.';

revoke all on function pgtrickle.relay_find_extension_inbox(text) from public;

create or replace function pgtrickle.relay_inbox(
    inbox text,
    schema text default null,
    out inbox_relation text,
    out columns jsonb,
    out payload_type text,
    out conflict_target text
)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    i pgtrickle.relay_inboxes := pgtrickle.relay_find_inbox(inbox, schema);
begin
    inbox_relation := format('%I.%I', i.inbox_schema, i.inbox_table);
    if to_regclass(inbox_relation) is null then
        raise exception using
            errcode = 'RL030',
            message = format('the table %s of inbox "%s" is gone', inbox_relation, i.inbox_name),
            detail = 'It was dropped or renamed by hand.',
            hint = format('select pgtrickle.drop_inbox(%L);', i.inbox_name);
    end if;
    select
        jsonb_object_agg(f.key, quote_ident(f.value)),
        max(case format_type(a.atttypid, null)
            when 'character varying' then 'text'
            else format_type(a.atttypid, null)
        end) filter (where f.key = 'payload')
    into columns, payload_type
    from jsonb_each_text(i.columns) as f
    join pg_attribute as a
        on a.attrelid = to_regclass(inbox_relation)
        and a.attname = f.value
        and not a.attisdropped
    where f.key in ('event_id', 'event_type', 'source', 'aggregate_id', 'payload', 'headers', 'trace_id');
    conflict_target := columns ->> 'event_id';
end
$$;

comment on function pgtrickle.relay_inbox(text, text) is
    'How to write an inbox: its table, the quoted column of each field that it has, the type of its payload and the column that tells duplicates. RL030 where there is none. Definer: the catalog is read by functions only.';

revoke all on function pgtrickle.relay_inbox(text, text) from public;

-- ---------------------------------------------------------------------------
-- Dropping
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_drop_inbox_objects(
    p_inbox pgtrickle.relay_inboxes,
    p_with_table boolean,
    p_cascade boolean
)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_view name;
begin
    foreach v_view in array array[p_inbox.pending_view, p_inbox.dead_letter_view, p_inbox.stats_view]
    loop
        continue when v_view is null;
        execute format('drop view if exists %I.%I %s',
            p_inbox.inbox_schema, v_view, case when p_cascade then 'cascade' else 'restrict' end);
    end loop;
    if p_with_table then
        execute format('drop table if exists %I.%I %s',
            p_inbox.inbox_schema, p_inbox.inbox_table,
            case when p_cascade then 'cascade' else 'restrict' end);
    end if;
end
$$;

comment on function pgtrickle.relay_drop_inbox_objects(pgtrickle.relay_inboxes, boolean, boolean) is
    'Drop the views of an inbox, and its table if so asked.';

revoke all on function pgtrickle.relay_drop_inbox_objects(pgtrickle.relay_inboxes, boolean, boolean) from public;

create or replace function pgtrickle.relay_drop_own_inbox(p_inbox text, p_cascade boolean)
returns boolean
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    i pgtrickle.relay_inboxes := pgtrickle.relay_find_inbox(p_inbox);
    v_owner oid := (
        select c.relowner from pg_class as c
        where c.oid = to_regclass(format('%I.%I', i.inbox_schema, i.inbox_table)));
begin
    if i.adopted or v_owner <> current_user::regrole then
        return false;
    end if;
    perform pgtrickle.relay_drop_inbox_objects(i, true, p_cascade);
    delete from pgtrickle.relay_inboxes as r where r.inbox_name = i.inbox_name;
    return true;
end
$$;

comment on function pgtrickle.relay_drop_own_inbox(text, boolean) is
    'Drop an inbox that set_relay_inbox made; false where the table belongs to somebody else. Definer: it is the owner''s table.';

revoke all on function pgtrickle.relay_drop_own_inbox(text, boolean) from public;

create or replace function pgtrickle.relay_unregister_inbox(p_inbox text)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    i pgtrickle.relay_inboxes := pgtrickle.relay_find_inbox(p_inbox);
    v_table oid := to_regclass(format('%I.%I', i.inbox_schema, i.inbox_table));
begin
    if v_table is not null then
        perform pgtrickle.relay_require_table_owner(v_table);
    end if;
    delete from pgtrickle.relay_inboxes as r where r.inbox_name = i.inbox_name;
end
$$;

comment on function pgtrickle.relay_unregister_inbox(text) is
    'Take an inbox out of the catalog for the owner of its table. Definer: the catalog is written by functions only.';

revoke all on function pgtrickle.relay_unregister_inbox(text) from public;

-- ---------------------------------------------------------------------------
-- Working
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_inbox_column(p_inbox pgtrickle.relay_inboxes, p_field text)
returns text
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if not p_inbox.columns ? p_field then
        raise exception using
            errcode = 'RL032',
            message = format('inbox "%s" has no column for %s', p_inbox.inbox_name, p_field),
            hint = format('Add the column to %I.%I, then adopt the table again.',
                p_inbox.inbox_schema, p_inbox.inbox_table);
    end if;
    return p_inbox.columns ->> p_field;
end
$$;

comment on function pgtrickle.relay_inbox_column(pgtrickle.relay_inboxes, text) is
    'Column of a field; RL032 where an adopted table has none.';

revoke all on function pgtrickle.relay_inbox_column(pgtrickle.relay_inboxes, text) from public;

create or replace function pgtrickle.relay_mark_inbox(
    p_inbox text,
    p_event_ids text[],
    p_assignments text[],
    p_error text default null
)
returns integer
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    i pgtrickle.relay_inboxes := pgtrickle.relay_find_inbox(p_inbox);
    v_assignments text;
    v_marked integer;
begin
    select string_agg(
        format(
            case a.value
                when 'now' then '%1$I = now()'
                when 'null' then '%1$I = null'
                when 'zero' then '%1$I = 0'
                when 'more' then '%1$I = i.%1$I + 1'
                when 'error' then '%1$I = $2'
            end,
            pgtrickle.relay_inbox_column(i, a.field)),
        ', ')
    into v_assignments
    from (
        select split_part(p, '=', 1) as field, split_part(p, '=', 2) as value
        from unnest(p_assignments) as p
    ) as a
    -- Only the processed mark is indispensable.
    where i.columns ? a.field or a.field = 'processed_at';

    execute format('update %I.%I as i set %s where i.%I = any ($1)',
        i.inbox_schema, i.inbox_table, v_assignments, pgtrickle.relay_inbox_column(i, 'event_id'))
    using p_event_ids, p_error;
    get diagnostics v_marked = row_count;
    return v_marked;
end
$$;

comment on function pgtrickle.relay_mark_inbox(text, text[], text[], text) is
    'Change the state of messages; assignments are field=now, null, zero, more or error. Definer: callers need no right on the table.';

revoke all on function pgtrickle.relay_mark_inbox(text, text[], text[], text) from public;

create or replace function pgtrickle.relay_inbox_counts(
    p_inbox pgtrickle.relay_inboxes,
    out pending bigint,
    out processed bigint,
    out dead_letters bigint,
    out oldest_pending_at timestamptz
)
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_waits text := case when p_inbox.columns ? 'processed_at'
        then format('i.%I is null', p_inbox.columns ->> 'processed_at') else 'true' end;
    v_dead text := case when p_inbox.columns ? 'retry_count' and p_inbox.columns ? 'processed_at'
        then format('i.%I >= %s', p_inbox.columns ->> 'retry_count', p_inbox.max_retries) else 'false' end;
begin
    execute format(
        $query$
        select
            count(*) filter (where %1$s and not (%2$s)),
            count(*) filter (where not (%1$s)),
            count(*) filter (where %1$s and %2$s),
            min(%3$s) filter (where %1$s and not (%2$s))
        from %4$I.%5$I as i
        $query$,
        v_waits, v_dead,
        case when p_inbox.columns ? 'received_at'
            then format('i.%I::timestamptz', p_inbox.columns ->> 'received_at') else 'null::timestamptz' end,
        p_inbox.inbox_schema, p_inbox.inbox_table)
    into pending, processed, dead_letters, oldest_pending_at;
exception
    when undefined_table or undefined_column then
        null;
end
$$;

comment on function pgtrickle.relay_inbox_counts(pgtrickle.relay_inboxes) is
    'Messages of an inbox by state; nulls where its table was dropped or changed by hand.';

revoke all on function pgtrickle.relay_inbox_counts(pgtrickle.relay_inboxes) from public;

create or replace function pgtrickle.relay_inbox_states(p_inbox text default null)
returns table (
    inbox_name text,
    inbox_table text,
    adopted boolean,
    pending bigint,
    processed bigint,
    dead_letters bigint,
    oldest_pending_at timestamptz,
    max_retries integer,
    retention_hours integer,
    created_at timestamptz
)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select
        i.inbox_name, format('%I.%I', i.inbox_schema, i.inbox_table), i.adopted, c.pending,
        c.processed, c.dead_letters, c.oldest_pending_at, i.max_retries, i.retention_hours, i.created_at
    from pgtrickle.relay_inboxes as i
    cross join lateral pgtrickle.relay_inbox_counts(i) as c
    where p_inbox is null or i.inbox_name = (pgtrickle.relay_find_inbox(p_inbox)).inbox_name
    order by i.inbox_name
$$;

comment on function pgtrickle.relay_inbox_states(text) is
    'What inbox_status shows. Definer: callers need no right on the tables.';

revoke all on function pgtrickle.relay_inbox_states(text) from public;

create or replace function pgtrickle.relay_sweep_inbox(p_inbox text, p_max_rows integer default 1000)
returns bigint
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    i pgtrickle.relay_inboxes := pgtrickle.relay_find_inbox(p_inbox);
    v_swept bigint;
begin
    if i.retention_hours is null
        or not i.columns ? 'processed_at'
        or not pg_try_advisory_xact_lock(hashtextextended('pgtrickle:sweep-inbox:' || i.inbox_name, 0))
    then
        return 0;
    end if;
    execute format(
        $query$
        delete from %1$I.%2$I as i
        where i.ctid = any (array(
            select o.ctid
            from %1$I.%2$I as o
            where o.%3$I < now() - $1
            order by o.%3$I
            limit $2
            for update skip locked
        ))
        $query$, i.inbox_schema, i.inbox_table, i.columns ->> 'processed_at')
    using make_interval(hours => i.retention_hours), p_max_rows;
    get diagnostics v_swept = row_count;
    return v_swept;
end
$$;

comment on function pgtrickle.relay_sweep_inbox(text, integer) is
    'Delete processed messages that are older than the inbox keeps them; returns how many, 0 while another sweeps. Without retention nothing is deleted. Definer: callers have no right to delete.';

revoke all on function pgtrickle.relay_sweep_inbox(text, integer) from public;

-- ---------------------------------------------------------------------------
-- The names of pg_trickle 0.28
-- ---------------------------------------------------------------------------

do $only_if_ours$
begin
    if pgtrickle.relay_may_define('create_inbox') then
        create or replace function pgtrickle.create_inbox(
            inbox_name text,
            schema text default 'pgtrickle',
            max_retries integer default 5,
            schedule text default '1s',
            with_dead_letter boolean default true,
            with_stats boolean default true,
            retention_hours integer default null
        )
        returns void
        language plpgsql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
        declare
            v_columns jsonb := pgtrickle.relay_own_columns();
            v_table oid;
            v_views name[];
        begin
            perform pgtrickle.relay_require_free_inbox(create_inbox.inbox_name);
            v_table := pgtrickle.relay_build_inbox(create_inbox.inbox_name, schema);
            v_views := pgtrickle.relay_build_inbox_views(
                create_inbox.inbox_name, v_table, v_columns, max_retries, with_dead_letter, with_stats);
            perform pgtrickle.relay_grant_inbox(v_table, v_columns);
            perform pgtrickle.relay_register_inbox(
                create_inbox.inbox_name, v_table, v_columns, v_views,
                jsonb_build_object(
                    'adopted', false, 'max_retries', max_retries, 'schedule', schedule,
                    'with_dead_letter', with_dead_letter, 'with_stats', with_stats,
                    'retention_hours', retention_hours));
        end
        $function$;

        comment on function pgtrickle.create_inbox(text, text, integer, text, boolean, boolean, integer) is
            'Create an inbox table with its views; it belongs to the caller.';

        revoke all on function pgtrickle.create_inbox(text, text, integer, text, boolean, boolean, integer) from public;
    end if;

    if pgtrickle.relay_may_define('enable_inbox_tracking') then
        -- No search_path of its own: the table's name means what it means to the caller.
        create or replace function pgtrickle.enable_inbox_tracking(
            inbox_name text,
            table_name text,
            event_id_column text default 'event_id',
            event_type_column text default 'event_type',
            source_column text default 'source',
            aggregate_id_column text default 'aggregate_id',
            payload_column text default 'payload',
            headers_column text default 'headers',
            received_at_column text default 'received_at',
            processed_at_column text default 'processed_at',
            error_column text default 'error',
            retry_count_column text default 'retry_count',
            trace_id_column text default 'trace_id',
            max_retries integer default 5,
            retention_hours integer default null
        )
        returns void
        language plpgsql
        volatile
        security invoker
        as $function$
        begin
            perform pgtrickle.relay_require_free_inbox(enable_inbox_tracking.inbox_name);
            perform pgtrickle.relay_adopt_inbox(
                enable_inbox_tracking.inbox_name,
                table_name,
                pgtrickle.relay_find_relation(table_name),
                pg_catalog.jsonb_build_object(
                    'event_id', event_id_column, 'event_type', event_type_column,
                    'source', source_column, 'aggregate_id', aggregate_id_column,
                    'payload', payload_column, 'headers', headers_column,
                    'received_at', received_at_column, 'processed_at', processed_at_column,
                    'error', error_column, 'retry_count', retry_count_column,
                    'trace_id', trace_id_column),
                pg_catalog.jsonb_build_object(
                    'adopted', true, 'max_retries', max_retries, 'schedule', '1s',
                    'with_dead_letter', true, 'with_stats', true,
                    'retention_hours', retention_hours));
        end
        $function$;

        comment on function pgtrickle.enable_inbox_tracking(text, text, text, text, text, text, text, text, text, text, text, text, text, integer, integer) is
            'Make a table of the caller an inbox, with columns of other names where said. RL032 lists all that does not fit. The table stays the caller''s: it is never dropped.';

        revoke all on function pgtrickle.enable_inbox_tracking(text, text, text, text, text, text, text, text, text, text, text, text, text, integer, integer) from public;
    end if;

    if pgtrickle.relay_may_define('disable_inbox_tracking') then
        create or replace function pgtrickle.disable_inbox_tracking(inbox_name text)
        returns void
        language plpgsql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
        declare
            i pgtrickle.relay_inboxes := pgtrickle.relay_find_inbox(disable_inbox_tracking.inbox_name);
        begin
            perform pgtrickle.relay_unregister_inbox(disable_inbox_tracking.inbox_name);
            perform pgtrickle.relay_drop_inbox_objects(i, false, false);
        end
        $function$;

        comment on function pgtrickle.disable_inbox_tracking(text) is
            'Forget an inbox and drop its views; the table and its messages stay.';

        revoke all on function pgtrickle.disable_inbox_tracking(text) from public;
    end if;

    if pgtrickle.relay_may_define('drop_inbox') then
        create or replace function pgtrickle.drop_inbox(
            inbox_name text,
            if_exists boolean default false,
            "cascade" boolean default false
        )
        returns void
        language plpgsql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
        declare
            i pgtrickle.relay_inboxes;
        begin
            begin
                i := pgtrickle.relay_find_inbox(drop_inbox.inbox_name);
            exception
                when sqlstate 'RL030' then
                    if if_exists then
                        return;
                    end if;
                    raise;
            end;
            if i.adopted then
                raise exception using
                    errcode = 'RL033',
                    message = format('inbox "%s" is an adopted table and is not dropped', i.inbox_name),
                    detail = format('%I.%I was there before it became an inbox.', i.inbox_schema, i.inbox_table),
                    hint = format('select pgtrickle.disable_inbox_tracking(%L);', i.inbox_name);
            end if;
            if not pgtrickle.relay_drop_own_inbox(i.inbox_name, "cascade") then
                perform pgtrickle.relay_unregister_inbox(i.inbox_name);
                perform pgtrickle.relay_drop_inbox_objects(i, true, "cascade");
            end if;
        end
        $function$;

        comment on function pgtrickle.drop_inbox(text, boolean, boolean) is
            'Drop an inbox with its messages and views; never an adopted table (RL033).';

        revoke all on function pgtrickle.drop_inbox(text, boolean, boolean) from public;
    end if;

    if pgtrickle.relay_may_define('inbox_status') then
        create or replace function pgtrickle.inbox_status(name text default null)
        returns table (
            inbox_name text,
            inbox_table text,
            adopted boolean,
            pending bigint,
            processed bigint,
            dead_letters bigint,
            oldest_pending_at timestamptz,
            max_retries integer,
            retention_hours integer,
            created_at timestamptz
        )
        language sql
        stable
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
            select * from pgtrickle.relay_inbox_states(name)
        $function$;

        comment on function pgtrickle.inbox_status(text) is
            'State of one inbox, or of all; counts their messages.';

        revoke all on function pgtrickle.inbox_status(text) from public;
    end if;

    if pgtrickle.relay_may_define('inbox_health') then
        create or replace function pgtrickle.inbox_health(name text)
        returns jsonb
        language sql
        stable
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
            select jsonb_build_object(
                'inbox', s.inbox_name,
                'status', case
                    when s.pending is null then 'broken'
                    when s.dead_letters > 0 then 'degraded'
                    else 'healthy'
                end,
                'pending', s.pending,
                'processed', s.processed,
                'dead_letters', s.dead_letters,
                'oldest_pending_age_seconds', extract(epoch from now() - s.oldest_pending_at),
                'problem', case
                    when s.pending is null then format('the table %s was dropped or changed', s.inbox_table)
                    when s.dead_letters > 0 then format('%s messages failed %s times', s.dead_letters, s.max_retries)
                end)
            from pgtrickle.relay_inbox_states(name) as s
        $function$;

        comment on function pgtrickle.inbox_health(text) is
            'healthy, degraded (there are dead letters) or broken (its table is gone), with counts and the reason.';

        revoke all on function pgtrickle.inbox_health(text) from public;
    end if;

    if pgtrickle.relay_may_define('replay_inbox_messages') then
        create or replace function pgtrickle.replay_inbox_messages(name text, event_ids text[])
        returns integer
        language sql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
            select pgtrickle.relay_mark_inbox(
                name, event_ids, array['processed_at=null', 'error=null', 'retry_count=zero'])
        $function$;

        comment on function pgtrickle.replay_inbox_messages(text, text[]) is
            'Make messages pending again, processed or dead; returns how many.';

        revoke all on function pgtrickle.replay_inbox_messages(text, text[]) from public;
    end if;

    if pgtrickle.relay_may_define('inbox_mark_processed') then
        create or replace function pgtrickle.inbox_mark_processed(name text, event_ids text[])
        returns integer
        language sql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
            select pgtrickle.relay_mark_inbox(name, event_ids, array['processed_at=now', 'error=null'])
        $function$;

        comment on function pgtrickle.inbox_mark_processed(text, text[]) is
            'Messages were processed; returns how many there were.';

        revoke all on function pgtrickle.inbox_mark_processed(text, text[]) from public;

        create or replace function pgtrickle.inbox_mark_processed(name text, event_id text)
        returns boolean
        language sql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
            select pgtrickle.inbox_mark_processed(name, array[event_id]) > 0
        $function$;

        comment on function pgtrickle.inbox_mark_processed(text, text) is
            'One message was processed; false where there is none of this id.';

        revoke all on function pgtrickle.inbox_mark_processed(text, text) from public;
    end if;

    if pgtrickle.relay_may_define('inbox_mark_failed') then
        create or replace function pgtrickle.inbox_mark_failed(name text, event_id text, error text)
        returns boolean
        language sql
        volatile
        security invoker
        set search_path = pg_catalog, pg_temp
        as $function$
            select pgtrickle.relay_mark_inbox(
                name, array[event_id],
                array['processed_at=null', 'error=error', 'retry_count=more'], error) > 0
        $function$;

        comment on function pgtrickle.inbox_mark_failed(text, text, text) is
            'Processing a message failed: counts a retry and keeps the error. After max_retries it is in the dead-letter view instead of the pending one.';

        revoke all on function pgtrickle.inbox_mark_failed(text, text, text) from public;
    end if;
end
$only_if_ours$;

create or replace function pgtrickle.relay_require_free_inbox(p_inbox text)
returns void
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from pgtrickle.relay_inboxes as i where i.inbox_name = p_inbox) then
        perform pgtrickle.relay_inbox_exists_already(p_inbox, null);
    end if;
end
$$;

comment on function pgtrickle.relay_require_free_inbox(text) is
    'RL031 where an inbox has this name. Definer: the catalog is read by functions only.';

revoke all on function pgtrickle.relay_require_free_inbox(text) from public;
