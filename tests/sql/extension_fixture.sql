-- What pg_trickle leaves in a database, as far as we meet it, without the extension's library.
--
-- Its objects are members of an extension, so that `drop extension` and `pg_dump` treat them as
-- such. The setting fixture.version says which version this is: from 0.29 to 0.45 it has a relay
-- catalog of its own.

insert into pg_catalog.pg_extension
    (oid, extname, extowner, extnamespace, extrelocatable, extversion, extconfig, extcondition)
select pg_catalog.pg_nextoid('pg_catalog.pg_extension', 'oid', 'pg_catalog.pg_extension_oid_index'),
    'pg_trickle', r.oid, 'public'::regnamespace, false, current_setting('fixture.version'), null, null
from pg_catalog.pg_roles as r
where r.rolname = current_user;

create schema pgtrickle;

create table pgtrickle.pgt_stream_tables (
    pgt_id bigserial primary key,
    pgt_relid oid not null unique,
    pgt_name text not null,
    pgt_schema text not null,
    defining_query text not null,
    refresh_mode text not null default 'DIFFERENTIAL' check (refresh_mode in ('FULL', 'DIFFERENTIAL', 'IMMEDIATE'))
);

create table pgtrickle.pgt_dependencies (
    pgt_id bigint not null references pgtrickle.pgt_stream_tables (pgt_id) on delete cascade,
    source_relid oid not null,
    primary key (pgt_id, source_relid)
);

create table pgtrickle.pgt_refresh_history (
    refresh_id bigserial primary key,
    pgt_id bigint not null,
    start_time timestamptz not null default now(),
    action text not null check (action in ('NO_DATA', 'FULL', 'DIFFERENTIAL', 'REINITIALIZE', 'SKIP')),
    was_full_fallback boolean not null default false,
    status text not null check (status in ('RUNNING', 'COMPLETED', 'FAILED', 'SKIPPED'))
);

-- Its outboxes: bare arrays of all rows, ids that begin at 1 again, a time of creation.
create table pgtrickle.pgt_outbox_config (
    stream_table_oid oid primary key,
    stream_table_name text not null,
    outbox_table_name text not null,
    retention_hours integer not null default 24,
    created_at timestamptz not null default now()
);

create function pgtrickle.enable_outbox(p_name text, p_retention_hours integer default 24)
returns void language plpgsql as $$
begin
    insert into pgtrickle.pgt_outbox_config (stream_table_oid, stream_table_name, outbox_table_name)
    select s.pgt_id::oid, s.pgt_name, 'outbox_' || s.pgt_name
    from pgtrickle.pgt_stream_tables as s where s.pgt_name = p_name;
    execute format('create table pgtrickle.%I (id bigserial primary key, pgt_id uuid, refresh_id uuid,'
        ' created_at timestamptz default now(), inserted_count bigint, deleted_count bigint,'
        ' is_claim_check boolean default false, payload jsonb)', 'outbox_' || p_name);
end $$;

create function pgtrickle.disable_outbox(p_name text, p_if_exists boolean default false)
returns void language plpgsql as $$
begin
    delete from pgtrickle.pgt_outbox_config where stream_table_name = p_name;
    execute format('drop table pgtrickle.%I', 'outbox_' || p_name);
end $$;

create function pgtrickle.outbox_status(p_name text) returns jsonb language sql as $$ select '{}'::jsonb $$;
create function pgtrickle.outbox_rows_consumed(p_stream_table text, p_outbox_id bigint) returns void language sql as $$ select $$;
create function pgtrickle.create_consumer_group(p_name text, p_outbox text, p_auto_offset_reset text default 'latest')
returns void language sql as $$ select $$;
create function pgtrickle.poll_outbox(p_group text, p_consumer text, p_batch_size integer default 100)
returns table (outbox_id bigint, payload jsonb) language sql as $$ select null::bigint, null::jsonb where false $$;
create function pgtrickle.commit_offset(p_group text, p_consumer text, p_last_offset bigint) returns void language sql as $$ select $$;
create function pgtrickle.create_inbox(p_name text, p_schema text default 'pgtrickle') returns void language sql as $$ select $$;

-- A stream table with two columns, and its three ways of being refreshed.
create function pgtrickle.create_stream_table(p_name text, p_query text, p_mode text default 'DIFFERENTIAL')
returns void language plpgsql as $$
declare
    relation regclass;
begin
    execute format('create table %s (__pgt_row_id bigint, %s, __pgt_count bigint)', p_name, p_query);
    relation := p_name::regclass;
    execute format('create unique index on %s (__pgt_row_id)', relation);
    insert into pgtrickle.pgt_stream_tables (pgt_relid, pgt_name, pgt_schema, defining_query, refresh_mode)
    select c.oid, c.relname, c.relnamespace::regnamespace::text, p_query, p_mode from pg_class as c where c.oid = relation;
end $$;

create function pgtrickle.refresh(p_relation regclass, p_action text, p_statements text, p_is_fallback boolean default false)
returns bigint language plpgsql as $$
declare
    found_id bigint;
begin
    -- No trigger fires in a full refresh, nor in any where user triggers are off.
    if p_action in ('FULL', 'REINITIALIZE') or p_is_fallback
        or current_setting('pg_trickle.user_triggers', true) = 'off'
    then
        set local session_replication_role = replica;
    end if;
    execute p_statements;
    set local session_replication_role = origin;
    insert into pgtrickle.pgt_refresh_history (pgt_id, action, was_full_fallback, status)
    select s.pgt_id, p_action, p_is_fallback, 'COMPLETED' from pgtrickle.pgt_stream_tables as s where s.pgt_relid = p_relation
    returning refresh_id into found_id;
    -- Its own outbox tells all rows at each refresh, where there is one.
    if to_regclass('pgtrickle.outbox_' || (select s.pgt_name from pgtrickle.pgt_stream_tables as s where s.pgt_relid = p_relation)) is not null then
        execute format('insert into pgtrickle.%I (pgt_id, inserted_count, deleted_count, payload)'
            ' select gen_random_uuid(), count(*), 0, coalesce(jsonb_agg(r), ''[]'') from %s as r',
            'outbox_' || (select s.pgt_name from pgtrickle.pgt_stream_tables as s where s.pgt_relid = p_relation), p_relation);
    end if;
    return found_id;
end $$;

do $$
begin
    if string_to_array(current_setting('fixture.version'), '.')::integer[] between array[0, 29, 0] and array[0, 45, 99] then
        if to_regrole('pgtrickle_relay') is null then
            create role pgtrickle_relay nologin;
        end if;
        create table pgtrickle.relay_outbox_config (name text primary key, enabled boolean not null default true, config jsonb not null);
        create table pgtrickle.relay_inbox_config (name text primary key, enabled boolean not null default true, config jsonb not null);
        create table pgtrickle.relay_consumer_offsets (relay_group_id text, pipeline_id text, last_change_id bigint);
        create function pgtrickle.set_relay_outbox(p_name text, p_config jsonb) returns void language sql as 'select';
        create function pgtrickle.set_relay_inbox(p_name text, p_config jsonb) returns void language sql as 'select';
        create function pgtrickle.enable_relay(p_name text) returns void language sql as 'select';
        create function pgtrickle.disable_relay(p_name text) returns void language sql as 'select';
        create function pgtrickle.delete_relay(p_name text) returns void language sql as 'select';
        create function pgtrickle.get_relay_config(p_name text) returns jsonb language sql as $f$ select '{}'::jsonb $f$;
        create function pgtrickle.list_relay_configs() returns setof jsonb language sql as $f$ select '{}'::jsonb $f$;
    end if;
end $$;

-- As the role in force, like the extension's.
create function pgtrickle.on_ddl() returns event_trigger language plpgsql as $$
begin
    perform from pg_event_trigger_ddl_commands() as c
    join pgtrickle.pgt_stream_tables as s on s.pgt_relid = c.objid
    join pgtrickle.pgt_dependencies as d on d.pgt_id = s.pgt_id;
end $$;

create function pgtrickle.on_drop() returns event_trigger language plpgsql as $$
begin
    perform from pg_event_trigger_dropped_objects() as c
    join pgtrickle.pgt_stream_tables as s on s.pgt_relid = c.objid
    join pgtrickle.pgt_dependencies as d on d.pgt_id = s.pgt_id;
end $$;

do $$
declare
    member text;
begin
    for member in
        select 'schema pgtrickle'
        union all
        select format('table %s', c.oid::regclass) from pg_class as c
        where c.relnamespace = 'pgtrickle'::regnamespace and c.relkind = 'r'
        union all
        select format('sequence %s', c.oid::regclass) from pg_class as c
        where c.relnamespace = 'pgtrickle'::regnamespace and c.relkind = 'S'
        union all
        select format('function %s', p.oid::regprocedure) from pg_proc as p where p.pronamespace = 'pgtrickle'::regnamespace
    loop
        execute 'alter extension pg_trickle add ' || member;
    end loop;
end $$;

create event trigger pg_trickle_ddl_tracker on ddl_command_end execute function pgtrickle.on_ddl();
create event trigger pg_trickle_drop_tracker on sql_drop execute function pgtrickle.on_drop();
alter extension pg_trickle add event trigger pg_trickle_ddl_tracker;
alter extension pg_trickle add event trigger pg_trickle_drop_tracker;
