-- Enabling and disabling outboxes, and the triggers that capture changes.
--
-- What puts triggers on a table runs as the caller, who must own it; what writes
-- the catalog is a definer function that checks ownership again, since anybody
-- can call it.

create or replace function pgtrickle.relay_cut_name(wanted text, max_bytes integer)
returns text
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    fitting text := left(wanted, max_bytes);
begin
    while octet_length(fitting) > max_bytes
    loop
        fitting := left(fitting, -1);
    end loop;
    return fitting;
end
$$;

comment on function pgtrickle.relay_cut_name(text, integer) is
    'The longest beginning of a name that fits into so many bytes, never half a character.';

revoke all on function pgtrickle.relay_cut_name(text, integer) from public;

create or replace function pgtrickle.relay_free_name(wanted text, seed text)
returns text
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    free_name text := pgtrickle.relay_cut_name(wanted, 63);
    attempt integer := 0;
begin
    while exists (
        select from pg_class where relnamespace = 'pgtrickle'::regnamespace and relname = free_name
        union all
        select from pg_type where typnamespace = 'pgtrickle'::regnamespace and typname = free_name
        union all
        select from pg_proc where pronamespace = 'pgtrickle'::regnamespace and proname = free_name
        union all
        select from pgtrickle.pgt_outbox_config as c where c.outbox_table_name = free_name
    )
    loop
        free_name := pgtrickle.relay_cut_name(wanted, 55) || '_'
            || left(md5(seed || case attempt when 0 then '' else attempt::text end), 7);
        attempt := attempt + 1;
    end loop;
    return free_name;
end
$$;

comment on function pgtrickle.relay_free_name(text, text) is
    'A name in schema pgtrickle that nothing has: cut to 63 bytes, and with 7 characters of a digest of the seed where it is taken.';

revoke all on function pgtrickle.relay_free_name(text, text) from public;

create or replace function pgtrickle.relay_capture_single(operation text, settings pgtrickle.relay_outbox_settings)
returns text
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select format(
        $piece$
        insert into pgtrickle.%1$I (inserted_count, deleted_count, payload)
        select %2$s, %3$s, c.payload
        from (
            select %4$s as payload
            from %5$s as changed
            where %2$s + %3$s <= %6$s
                and pg_column_size(changed.*) <= %7$s
                and %8$s
            -- A fence: the payload is built once.
            offset 0
        ) as c
        where pg_column_size(c.payload) <= %9$s;
        $piece$,
        settings.outbox_table_name,
        case operation when 'DELETE' then 0 else 1 end,
        case operation when 'INSERT' then 0 else 1 end,
        case operation
            when 'INSERT' then
                $piece$jsonb_insert('{"v":1,"inserted":[],"deleted":[]}', '{inserted,0}', to_jsonb(changed.*))$piece$
            when 'DELETE' then
                $piece$jsonb_insert('{"v":1,"inserted":[],"deleted":[]}', '{deleted,0}', to_jsonb(changed.*))$piece$
            else
                $piece$jsonb_build_object(
                    'v', 1,
                    'inserted', jsonb_build_array(to_jsonb(changed.*)),
                    'deleted', (select jsonb_build_array(to_jsonb(changed.*)) from old_rows as changed)
                )$piece$
        end,
        case operation when 'DELETE' then 'old_rows' else 'new_rows' end,
        settings.claim_check_rows,
        -- What takes this little, be it compressed, is far from where jsonb ends.
        least(32768, settings.claim_check_bytes),
        case operation
            when 'INSERT' then 'not exists (select from new_rows offset 1)'
            when 'DELETE' then 'not exists (select from old_rows offset 1)'
            else format(
                'not exists (select from new_rows offset 1) and not exists (select from old_rows offset 1)'
                ' and exists (select from old_rows as changed where pg_column_size(changed.*) <= %s)',
                least(32768, settings.claim_check_bytes)
            )
        end,
        settings.claim_check_bytes
    )
$$;

comment on function pgtrickle.relay_capture_single(text, pgtrickle.relay_outbox_settings) is
    'Part of a capture function: writes one small row, without counting and adding up. Others are left to the rest of it.';

revoke all on function pgtrickle.relay_capture_single(text, pgtrickle.relay_outbox_settings) from public;

create or replace function pgtrickle.relay_capture_inline(operation text, settings pgtrickle.relay_outbox_settings)
returns text
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select format(
        $piece$
        insert into pgtrickle.%1$I (inserted_count, deleted_count, payload)
        select c.inserted_rows, c.deleted_rows, c.payload
        from (
            select
                %2$s as inserted_rows,
                %3$s as deleted_rows,
                jsonb_build_object('v', 1, 'inserted', %4$s, 'deleted', %5$s) as payload
            from %6$s
            where %2$s + %3$s between 1 and %7$s
                and %8$s <= %9$s
            -- A fence: the payload is built once.
            offset 0
        ) as c
        where pg_column_size(c.payload) <= %10$s;
        $piece$,
        settings.outbox_table_name,
        case operation when 'DELETE' then '0' else 'i.changed_rows' end,
        case operation when 'INSERT' then '0' else 'd.changed_rows' end,
        case operation
            when 'DELETE' then $piece$'[]'::jsonb$piece$
            else '(select jsonb_agg(to_jsonb(changed.*)) from new_rows as changed)'
        end,
        case operation
            when 'INSERT' then $piece$'[]'::jsonb$piece$
            else '(select jsonb_agg(to_jsonb(changed.*)) from old_rows as changed)'
        end,
        concat_ws(
            ' cross join ',
            case when operation <> 'DELETE' then
                '(select count(*) as changed_rows, sum(pg_column_size(changed.*)) as changed_bytes'
                ' from new_rows as changed) as i'
            end,
            case when operation <> 'INSERT' then
                '(select count(*) as changed_rows, sum(pg_column_size(changed.*)) as changed_bytes'
                ' from old_rows as changed) as d'
            end
        ),
        settings.claim_check_rows,
        concat_ws(
            ' + ',
            case when operation <> 'DELETE' then 'i.changed_bytes' end,
            case when operation <> 'INSERT' then 'd.changed_bytes' end
        ),
        -- What takes this little, be it compressed, is far from where jsonb ends.
        least(65536, settings.claim_check_bytes),
        settings.claim_check_bytes
    )
$$;

comment on function pgtrickle.relay_capture_inline(text, pgtrickle.relay_outbox_settings) is
    'Part of a capture function: writes few and small rows in one statement; others are left to the rest of it.';

revoke all on function pgtrickle.relay_capture_inline(text, pgtrickle.relay_outbox_settings) from public;

create or replace function pgtrickle.relay_capture_measure(direction text)
returns text
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select replace(replace($piece$
            with captured as materialized (
                select to_jsonb(changed.*) as row_data
                from $transition$ as changed
                limit claim_check_rows + 1
            )
            select
                count(*),
                coalesce(sum(pg_column_size(c.row_data)), 0),
                case
                    when count(*) <= claim_check_rows
                        and coalesce(sum(pg_column_size(c.row_data)), 0) <= claim_check_bytes
                    then (select jsonb_agg(r.row_data) from captured as r)
                end
            into $direction$_rows, $direction$_bytes, $direction$_json
            from captured as c;
        $piece$,
        '$transition$', case direction when 'inserted' then 'new_rows' else 'old_rows' end),
        '$direction$', direction)
$$;

comment on function pgtrickle.relay_capture_measure(text) is
    'Part of a capture function: turns rows to JSON once, and together only if they are few and small.';

revoke all on function pgtrickle.relay_capture_measure(text) from public;

create or replace function pgtrickle.relay_capture_spill(direction text, delta_table text)
returns text
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select replace(replace(replace(replace(replace($piece$
            begin
                insert into pgtrickle.$delta$ (outbox_id, row_num, row_op, row_data)
                select captured_id, $first$ + row_number() over () - 1, '$operation$', to_jsonb(changed.*)
                from $transition$ as changed;
            exception when program_limit_exceeded or out_of_memory or internal_error then
                -- Some row is larger than jsonb can be: the others are kept whole.
                next_row := $first$;
                for changed_row in select * from $transition$
                loop
                    begin
                        row_json := to_jsonb(changed_row);
                    exception when program_limit_exceeded or out_of_memory or internal_error then
                        row_json := jsonb_build_object('pgtrickle_omitted', sqlerrm);
                    end;
                    insert into pgtrickle.$delta$ (outbox_id, row_num, row_op, row_data)
                    values (captured_id, next_row, '$operation$', row_json);
                    next_row := next_row + 1;
                end loop;
            end;
        $piece$,
        '$transition$', case direction when 'inserted' then 'new_rows' else 'old_rows' end),
        '$operation$', case direction when 'inserted' then 'INSERT' else 'DELETE' end),
        '$first$', case direction when 'inserted' then '0' else 'inserted_rows' end),
        '$direction$', direction),
        '$delta$', quote_ident(delta_table))
$$;

comment on function pgtrickle.relay_capture_spill(text, text) is
    'Part of a capture function: writes rows to the delta table, one by one only where jsonb ends.';

revoke all on function pgtrickle.relay_capture_spill(text, text) from public;

create or replace function pgtrickle.relay_capture_body(settings pgtrickle.relay_outbox_settings)
returns text
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select format(
        $body$
-- Nearly every statement ends in the first insert of its branch, so what the others need
-- is declared behind it: each transaction prepares anew what it evaluates.
begin
    if tg_op = 'INSERT' then%11$s
        if found then
            return null;
        end if;
        %8$s
    elsif tg_op = 'UPDATE' then%12$s
        if found then
            return null;
        end if;
        %9$s
    elsif tg_op = 'DELETE' then%13$s
        if found then
            return null;
        end if;
        %10$s
    else
        perform pgtrickle.relay_capture_truncate(%3$L, tg_relid);
        return null;
    end if;
    if found then
        return null;
    end if;

declare
    claim_check_rows constant bigint := %1$s;
    claim_check_bytes constant bigint := %2$s;
    inserted_rows bigint := 0;
    deleted_rows bigint := 0;
    inserted_bytes bigint := 0;
    deleted_bytes bigint := 0;
    inserted_json jsonb;
    deleted_json jsonb;
    is_claim_check boolean := false;
    refresh constant uuid := gen_random_uuid();
    captured_id bigint;
    changed_row record;
    row_json jsonb;
    next_row bigint;
begin
    begin
        if tg_op <> 'DELETE' then%4$send if;
        if tg_op <> 'INSERT' then%5$send if;
        is_claim_check := inserted_rows + deleted_rows > claim_check_rows
            or inserted_bytes + deleted_bytes > claim_check_bytes;
    exception when program_limit_exceeded or out_of_memory or internal_error then
        -- Larger than jsonb can be, which must not abort the statement.
        is_claim_check := true;
    end;
    if is_claim_check then
        if tg_op <> 'DELETE' then
            select count(*) into inserted_rows from new_rows;
        end if;
        if tg_op <> 'INSERT' then
            select count(*) into deleted_rows from old_rows;
        end if;
    end if;
    if inserted_rows + deleted_rows = 0 then
        return null;
    end if;

    insert into pgtrickle.%3$I (
        refresh_id, inserted_count, deleted_count, is_claim_check, payload
    )
    values (
        refresh, inserted_rows, deleted_rows, is_claim_check,
        case
            when is_claim_check then jsonb_build_object(
                'v', 1, 'claim_check', true, 'inserted_count', inserted_rows,
                'deleted_count', deleted_rows, 'refresh_id', refresh
            )
            else jsonb_build_object(
                'v', 1,
                'inserted', coalesce(inserted_json, '[]'),
                'deleted', coalesce(deleted_json, '[]')
            )
        end
    )
    returning id into captured_id;

    if is_claim_check then
        if tg_op <> 'DELETE' then%6$send if;
        if tg_op <> 'INSERT' then%7$send if;
    end if;
    return null;
end;
end
        $body$,
        settings.claim_check_rows,
        settings.claim_check_bytes,
        settings.outbox_table_name,
        pgtrickle.relay_capture_measure('inserted'),
        pgtrickle.relay_capture_measure('deleted'),
        pgtrickle.relay_capture_spill('inserted', settings.delta_table_name),
        pgtrickle.relay_capture_spill('deleted', settings.delta_table_name),
        pgtrickle.relay_capture_inline('INSERT', settings),
        pgtrickle.relay_capture_inline('UPDATE', settings),
        pgtrickle.relay_capture_inline('DELETE', settings),
        pgtrickle.relay_capture_single('INSERT', settings),
        pgtrickle.relay_capture_single('UPDATE', settings),
        pgtrickle.relay_capture_single('DELETE', settings)
    )
$$;

comment on function pgtrickle.relay_capture_body(pgtrickle.relay_outbox_settings) is
    'Source of the trigger function of one outbox: generated, so that its plans are cached.';

revoke all on function pgtrickle.relay_capture_body(pgtrickle.relay_outbox_settings) from public;

create or replace function pgtrickle.relay_capture_truncate(outbox_table text, relation oid)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    -- truncate only on a parent leaves the rows of its children: a truncate
    -- downstream would lose them.
    if exists (
        select
        from pgtrickle.relay_capture_targets(relation) as t
        where t.target <> relation
            and pg_relation_size(t.target) > 0
    ) then
        raise warning 'truncate only % is not captured: its children keep their rows', relation::regclass;
        return;
    end if;
    execute format(
        $insert$
            insert into pgtrickle.%I (payload)
            values ('{"v": 1, "full_refresh": true, "inserted": [], "deleted": []}')
        $insert$,
        outbox_table
    );
end
$$;

comment on function pgtrickle.relay_capture_truncate(text, oid) is
    'Captures truncate: a full refresh without rows. Part of every capture function.';

revoke all on function pgtrickle.relay_capture_truncate(text, oid) from public;

create or replace function pgtrickle.relay_capture_targets(relation oid)
returns table (target oid)
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    with recursive family as (
        select relation as target
        union
        select i.inhrelid
        from family as f
        join pg_inherits as i on i.inhparent = f.target
    )
    select f.target
    from family as f
    join pg_class as c on c.oid = f.target
    -- Foreign tables have no transition tables.
    where c.relkind in ('r', 'p')
$$;

comment on function pgtrickle.relay_capture_targets(oid) is
    'A table, its partitions and children: a statement fires the triggers of the table that it names only.';

revoke all on function pgtrickle.relay_capture_targets(oid) from public;

create or replace function pgtrickle.relay_missing_triggers(relation oid, capture_function regproc)
returns table (target oid, operation text)
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select t.target, o.operation
    from pgtrickle.relay_capture_targets(relation) as t
    cross join (values ('insert', 4), ('delete', 8), ('update', 16), ('truncate', 32)) as o (operation, bit)
    where not exists (
            select
            from pg_trigger as g
            where g.tgrelid = t.target
                and g.tgfoid = capture_function
                and g.tgtype & o.bit <> 0
        )
        -- Truncating one partition, like detaching it, is no change of rows.
        and (o.operation <> 'truncate' or t.target = relation)
$$;

comment on function pgtrickle.relay_missing_triggers(oid, regproc) is
    'Triggers that a captured table, its partitions and children lack.';

revoke all on function pgtrickle.relay_missing_triggers(oid, regproc) from public;

create or replace function pgtrickle.relay_outbox_capture(outbox_table text)
returns table (relation oid, capture_function regproc)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select c.stream_table_oid::oid, to_regproc(format('pgtrickle.%I', s.capture_function_name))
    from pgtrickle.pgt_outbox_config as c
    join pgtrickle.relay_outbox_settings as s using (outbox_table_name)
    where c.outbox_table_name = relay_outbox_capture.outbox_table
        and s.capture
$$;

comment on function pgtrickle.relay_outbox_capture(text) is
    'What a captured outbox captures and with which function; no row for others. Definer: table owners may not see the catalog.';

revoke all on function pgtrickle.relay_outbox_capture(text) from public;

create or replace function pgtrickle.relay_attach_capture(outbox_table text)
returns integer
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    missing record;
    created_triggers integer := 0;
begin
    for missing in
        select m.target, m.operation, o.capture_function
        from pgtrickle.relay_outbox_capture(outbox_table) as o
        cross join lateral pgtrickle.relay_missing_triggers(o.relation, o.capture_function) as m
        order by m.target <> o.relation, m.target
    loop
        execute format(
            'create trigger %I after %s on %s %s for each statement execute function %s()',
            pgtrickle.relay_cut_name(
                format('pgtrickle_%s_%s_%s', missing.operation, left(md5(outbox_table), 7), outbox_table), 63
            ),
            missing.operation,
            missing.target::regclass,
            case missing.operation
                when 'insert' then 'referencing new table as new_rows'
                when 'update' then 'referencing old table as old_rows new table as new_rows'
                when 'delete' then 'referencing old table as old_rows'
                else ''
            end,
            missing.capture_function
        );
        created_triggers := created_triggers + 1;
    end loop;
    return created_triggers;
exception
    when lock_not_available then
        raise exception using
            errcode = 'lock_not_available',
            message = format('the tables of outbox %I are in use: their triggers could not be created', outbox_table),
            hint = 'try again when no long transaction writes them, or set lock_timeout to wait longer';
end
$$;

comment on function pgtrickle.relay_attach_capture(text) is
    'Creates the triggers that a captured outbox lacks, as the owner of the tables, and returns how many.';

revoke all on function pgtrickle.relay_attach_capture(text) from public;

create or replace function pgtrickle.relay_primary_key(relation oid)
returns text[]
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select array_agg(a.attname::text order by k.position)
    from pg_index as i
    cross join lateral unnest(i.indkey) with ordinality as k (attnum, position)
    join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.attnum
    where i.indrelid = relation
        and i.indisprimary
$$;

comment on function pgtrickle.relay_primary_key(oid) is
    'Columns of the primary key in its order; null without one.';

revoke all on function pgtrickle.relay_primary_key(oid) from public;

create or replace function pgtrickle.relay_create_outbox_tables(
    settings pgtrickle.relay_outbox_settings,
    stream_table text
)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    first_id bigint := coalesce(
        (
            select h.last_id
            from pgtrickle.relay_outbox_high_water as h
            where h.outbox_table_name = settings.outbox_table_name
        ),
        0
    ) + 1;
begin
    execute format(
        $create$
            create table pgtrickle.%1$I (
                id bigint generated always as identity (start with %2$s cache 1) primary key,
                pgt_id uuid not null default %3$L,
                -- Unique is enough: random bytes for each row cost as much as capturing it.
                refresh_id uuid not null default
                    encode(timestamptz_send(clock_timestamp()) || int8send(pg_backend_pid()), 'hex')::uuid,
                created_at timestamptz not null default clock_timestamp(),
                inserted_count bigint not null default 0,
                deleted_count bigint not null default 0,
                is_claim_check boolean not null default false,
                payload jsonb,
                headers jsonb not null default '{}'
            );
            comment on table pgtrickle.%1$I is %4$L;

            create table pgtrickle.%5$I (
                outbox_id bigint not null references pgtrickle.%1$I (id) on delete cascade,
                row_num bigint not null,
                row_op text not null check (row_op in ('INSERT', 'DELETE')),
                row_data jsonb not null,
                primary key (outbox_id, row_num)
            );
            comment on table pgtrickle.%5$I is %6$L;

            create view pgtrickle.%7$I as
            select o.* from pgtrickle.%1$I as o order by o.id desc limit 1;
            comment on view pgtrickle.%7$I is %8$L;

            create unlogged sequence pgtrickle.%9$I;
            comment on sequence pgtrickle.%9$I is %10$L;
        $create$,
        settings.outbox_table_name,
        first_id,
        settings.pgt_id,
        format('Outbox of %s: one row for each captured statement or publication.', stream_table),
        settings.delta_table_name,
        format('Rows of large deltas in the outbox of %s: inserted ones from row_num 0 on, then deleted ones.', stream_table),
        settings.latest_view_name,
        format('Latest row in the outbox of %s.', stream_table),
        settings.sleep_sequence_name,
        format('Until when, in seconds since 1970, some relay sleeps on the outbox of %s.', stream_table)
    );
    if settings.notify then
        execute format(
            $create$
                create constraint trigger relay_notify after insert on pgtrickle.%I
                deferrable initially deferred
                for each row execute function pgtrickle.relay_notify_outbox(%L)
            $create$,
            settings.outbox_table_name,
            format('pgtrickle.%I', settings.sleep_sequence_name)
        );
    end if;
    if to_regrole('pgtrickle_relay') is not null then
        execute format(
            'grant select on pgtrickle.%I, pgtrickle.%I, pgtrickle.%I to pgtrickle_relay',
            settings.outbox_table_name, settings.delta_table_name, settings.latest_view_name
        );
    end if;
end
$$;

comment on function pgtrickle.relay_create_outbox_tables(pgtrickle.relay_outbox_settings, text) is
    'The tables and the view of one outbox; ids continue where a disabled outbox of this name ended.';

revoke all on function pgtrickle.relay_create_outbox_tables(pgtrickle.relay_outbox_settings, text) from public;

create or replace function pgtrickle.relay_create_capture_function(
    settings pgtrickle.relay_outbox_settings,
    relation oid
)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    body text := pgtrickle.relay_capture_body(settings);
    virtual_columns text[] := (
        select array_agg(a.attname::text)
        from pg_attribute as a
        where a.attrelid = relation
            and a.attgenerated = 'v'
            and not a.attisdropped
    );
begin
    if virtual_columns is not null then
        -- Transition tables show them as null: absent is better than wrong.
        body := replace(body, 'to_jsonb(changed.*)', format('to_jsonb(changed.*) - %L::text[]', virtual_columns));
        raise notice 'virtual generated columns are not captured: %', array_to_string(virtual_columns, ', ');
    end if;
    -- Definer: applications that write the table need no right on the outbox. Its
    -- owner is no superuser, so neither is a cast to JSON of a user's type in it.
    execute format(
        $create$
            create function pgtrickle.%1$I()
            returns trigger
            language plpgsql
            volatile
            security definer
            set search_path = pg_catalog, pg_temp
            as %2$L;
            comment on function pgtrickle.%1$I() is %3$L;
            revoke all on function pgtrickle.%1$I() from public;
        $create$,
        settings.capture_function_name,
        body,
        format('Captures changes into %I. Definer: who changes the table has no right on the outbox.', settings.outbox_table_name)
    );
end
$$;

comment on function pgtrickle.relay_create_capture_function(pgtrickle.relay_outbox_settings, oid) is
    'Creates the trigger function of one outbox.';

revoke all on function pgtrickle.relay_create_capture_function(pgtrickle.relay_outbox_settings, oid) from public;

create or replace function pgtrickle.relay_create_outbox(
    stream_table text,
    relation oid,
    retention_hours integer,
    capture boolean,
    notify boolean,
    key_columns text[],
    claim_check_rows integer,
    claim_check_bytes bigint
)
returns text
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    settings pgtrickle.relay_outbox_settings;
    stream_name text := stream_table;
    seed text := stream_table;
begin
    perform pgtrickle.relay_check_stream(stream_table, relation, capture, key_columns);
    if relation is not null then
        select c.relname, n.nspname, n.nspname || '.' || c.relname
        into stream_name, settings.stream_schema, seed
        from pg_class as c
        join pg_namespace as n on n.oid = c.relnamespace
        where c.oid = relation;
    end if;
    -- Names are chosen one after the other, so that no two outboxes choose the same.
    perform pg_advisory_xact_lock(hashtextextended('pgtrickle:outbox names', 0));
    if exists (
        select
        from pgtrickle.pgt_outbox_config as c
        where c.stream_table_oid::oid = relation
            or (relation is null and c.stream_table_oid is null and c.stream_table_name = stream_name)
    ) then
        raise exception using
            errcode = 'RL002',
            message = format('the outbox of %s is enabled already', stream_table),
            hint = format('select pgtrickle.outbox_status(%L)', stream_table);
    end if;

    settings.outbox_table_name := pgtrickle.relay_free_name('outbox_' || stream_name, seed);
    settings.delta_table_name := pgtrickle.relay_free_name('outbox_delta_rows_' || stream_name, seed);
    settings.latest_view_name := pgtrickle.relay_free_name('pgt_outbox_latest_' || stream_name, seed);
    settings.sleep_sequence_name := pgtrickle.relay_free_name('outbox_sleep_' || stream_name, seed);
    settings.pgt_id := gen_random_uuid();
    settings.key_columns := coalesce(key_columns, pgtrickle.relay_primary_key(relation));
    settings.capture := capture;
    settings.notify := notify;
    settings.claim_check_rows := claim_check_rows;
    settings.claim_check_bytes := claim_check_bytes;
    settings.swept_through := 0;
    settings.enabled_by := pgtrickle.relay_role_in_force();
    if capture then
        settings.capture_function_name := pgtrickle.relay_free_name('outbox_capture_' || stream_name, seed);
    end if;

    insert into pgtrickle.pgt_outbox_config (
        outbox_table_name, stream_table_oid, stream_table_name, retention_hours
    )
    values (settings.outbox_table_name, relation, stream_name, retention_hours);
    insert into pgtrickle.relay_outbox_settings
    values (settings.*);
    perform pgtrickle.relay_create_outbox_tables(settings, stream_name);
    if capture then
        perform pgtrickle.relay_create_capture_function(settings, relation);
    end if;
    return settings.outbox_table_name;
end
$$;

comment on function pgtrickle.relay_create_outbox(text, oid, integer, boolean, boolean, text[], integer, bigint) is
    'The catalog''s half of enable_outbox. Definer: table owners have no rights in the schema; it checks that the role in force owns the table.';

revoke all on function pgtrickle.relay_create_outbox(text, oid, integer, boolean, boolean, text[], integer, bigint) from public;

create or replace function pgtrickle.relay_open_capture(outbox_table text)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    captured record;
begin
    select o.relation, o.capture_function into captured
    from pgtrickle.relay_outbox_capture(outbox_table) as o;
    if found then
        perform pgtrickle.relay_require_table_owner(captured.relation);
        execute format(
            'grant execute on function %s() to %I', captured.capture_function, pgtrickle.relay_role_in_force()
        );
    end if;
end
$$;

comment on function pgtrickle.relay_open_capture(text) is
    'Lets the role in force, which must own the captured table, attach its capture function. Definer: only the function''s owner can grant that.';

revoke all on function pgtrickle.relay_open_capture(text) from public;

create or replace function pgtrickle.relay_seal_capture(outbox_table text)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    captured record;
begin
    select o.relation, o.capture_function into captured
    from pgtrickle.relay_outbox_capture(outbox_table) as o;
    -- Its owner made it and may enable tables of its own.
    if found and pgtrickle.relay_role_in_force() <> current_user then
        perform pgtrickle.relay_require_table_owner(captured.relation);
        execute format(
            'revoke execute on function %s() from %I', captured.capture_function, pgtrickle.relay_role_in_force()
        );
    end if;
end
$$;

comment on function pgtrickle.relay_seal_capture(text) is
    'Takes back relay_open_capture: attached to another table, the function would forge events. Definer: only its owner can revoke that.';

revoke all on function pgtrickle.relay_seal_capture(text) from public;

create or replace function pgtrickle.relay_drop_outbox(outbox_table text)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set client_min_messages = warning
as $$
declare
    settings pgtrickle.relay_outbox_settings;
    relation oid;
    last_id bigint;
begin
    select s.* into settings
    from pgtrickle.relay_outbox_settings as s
    where s.outbox_table_name = outbox_table;
    if not found then
        raise exception using
            errcode = 'RL005',
            message = format('outbox %I is the extension''s', outbox_table),
            hint = 'disable it with the functions of the extension';
    end if;
    select t.oid into relation
    from pgtrickle.pgt_outbox_config as c
    join pg_class as t on t.oid = c.stream_table_oid::oid
    where c.outbox_table_name = outbox_table;
    if relation is not null then
        perform pgtrickle.relay_require_table_owner(relation);
    elsif not pg_has_role(pgtrickle.relay_role_in_force(), current_user, 'usage')
        and pgtrickle.relay_role_in_force() <> settings.enabled_by
    then
        raise exception using
            errcode = 'RL004',
            message = format('outbox %I was enabled by %I', outbox_table, settings.enabled_by),
            hint = format('set role %I, or let a member of %I do this', settings.enabled_by, current_user);
    end if;

    -- Triggers first: a writer holds its table before it waits for the outbox.
    if settings.capture_function_name is not null then
        execute format('drop function if exists pgtrickle.%I() cascade', settings.capture_function_name);
    end if;
    if to_regclass(format('pgtrickle.%I', outbox_table)) is not null then
        execute format('lock table pgtrickle.%I in access exclusive mode', outbox_table);
        select o.last_id into last_id
        from pgtrickle.relay_outbox_of(outbox_table, null) as o;
        insert into pgtrickle.relay_outbox_high_water as h (outbox_table_name, last_id)
        values (outbox_table, last_id)
        on conflict (outbox_table_name) do update
        set last_id = greatest(h.last_id, excluded.last_id), disabled_at = now();
    end if;
    execute format('drop view if exists pgtrickle.%I', settings.latest_view_name);
    execute format('drop sequence if exists pgtrickle.%I', settings.sleep_sequence_name);
    execute format('drop table if exists pgtrickle.%I, pgtrickle.%I', settings.delta_table_name, outbox_table);
    delete from pgtrickle.pgt_outbox_config as c where c.outbox_table_name = outbox_table;
    delete from pgtrickle.relay_outbox_settings as s where s.outbox_table_name = outbox_table;
end
$$;

comment on function pgtrickle.relay_drop_outbox(text) is
    'The catalog''s half of disable_outbox. Definer: table owners have no rights in the schema; it checks that the role in force owns the table, or enabled the outbox of a table that is gone.';

revoke all on function pgtrickle.relay_drop_outbox(text) from public;

create or replace function pgtrickle.relay_check_stream(
    stream_table text,
    relation oid,
    capture boolean,
    key_columns text[]
)
returns void
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    foreign_table oid;
    unknown_column text;
begin
    if relation is null then
        if capture or coalesce(stream_table, '') = '' then
            raise exception using
                errcode = 'RL001',
                message = format('there is no table %s', coalesce(stream_table, 'null')),
                detail = 'The name is read like any table name: unquoted capitals are folded, and search_path counts.',
                hint = 'name it with its schema, or with capture => false for a stream without a table';
        end if;
        if not pg_has_role(pgtrickle.relay_role_in_force(), to_regrole('pgtrickle_publisher'), 'usage') then
            raise exception using
                errcode = 'RL004',
                message = format('role %I may not enable a stream without a table', pgtrickle.relay_role_in_force()),
                hint = format('grant pgtrickle_publisher to %I', pgtrickle.relay_role_in_force());
        end if;
        return;
    end if;

    perform pgtrickle.relay_require_table_owner(relation);
    if not exists (
        select
        from pg_class as c
        where c.oid = relation
            and c.relkind in ('r', 'p')
            and c.relpersistence <> 't'
            and c.relnamespace not in ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
    ) then
        raise exception using
            errcode = 'RL005',
            message = format('%s cannot have an outbox', relation::regclass),
            detail = 'It is a view, a foreign, temporary or system table.',
            hint = 'enable the outbox of an ordinary or partitioned table';
    end if;
    for foreign_table in
        select t.target from pgtrickle.relay_capture_targets(relation) as t where capture
    loop
        perform pgtrickle.relay_require_table_owner(foreign_table);
    end loop;

    select k.name into unknown_column
    from unnest(key_columns) as k (name)
    where not exists (
        select
        from pg_attribute as a
        where a.attrelid = relation
            and a.attname = k.name
            and a.attnum > 0
            and not a.attisdropped
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

comment on function pgtrickle.relay_check_stream(text, oid, boolean, text[]) is
    'What can keep a table from having an outbox: RL001, RL004, RL005, or a key column that is not there.';

revoke all on function pgtrickle.relay_check_stream(text, oid, boolean, text[]) from public;

do $only_if_ours$
begin
    if not pgtrickle.relay_may_define('enable_outbox') then
        return;
    end if;

    create or replace function pgtrickle.enable_outbox(
        stream_table text,
        retention_hours integer default 24,
        capture boolean default true,
        notify boolean default true,
        key_columns text[] default null,
        claim_check_rows integer default 1000,
        claim_check_bytes bigint default 1048576
    )
    returns text
    language plpgsql
    volatile
    security invoker
    as $function$
    declare
        relation oid := pgtrickle.relay_find_relation(stream_table);
        outbox_table text := pgtrickle.relay_find_outbox(null, relation);
        waits text := pg_catalog.current_setting('lock_timeout');
        is_new boolean := false;
        created_triggers integer := 0;
    begin
        if waits = '0' then
            -- A trigger that waits for its lock makes every later writer wait behind it.
            perform pg_catalog.set_config('lock_timeout', '5s', true);
        end if;

        if outbox_table is null then
            outbox_table := pgtrickle.relay_create_outbox(
                stream_table, relation, retention_hours, capture, notify,
                key_columns, claim_check_rows, claim_check_bytes
            );
            is_new := true;
        end if;
        if relation is not null and capture then
            perform pgtrickle.relay_open_capture(outbox_table);
            created_triggers := pgtrickle.relay_attach_capture(outbox_table);
            perform pgtrickle.relay_seal_capture(outbox_table);
        end if;
        if not is_new and created_triggers = 0 then
            raise exception using
                errcode = 'RL002',
                message = pg_catalog.format('the outbox of %s is enabled already', stream_table),
                hint = pg_catalog.format('select pgtrickle.outbox_status(%L)', stream_table);
        end if;

        perform pg_catalog.set_config('lock_timeout', waits, true);
        return outbox_table;
    end
    $function$;

    comment on function pgtrickle.enable_outbox(text, integer, boolean, boolean, text[], integer, bigint) is
        'Gives a table an outbox, captures its changes from now on, and returns the name of the outbox table. Called again, it captures partitions and children that were added since; RL002 when there are none.';

    revoke all on function pgtrickle.enable_outbox(text, integer, boolean, boolean, text[], integer, bigint) from public;
end
$only_if_ours$;

do $only_if_ours$
begin
    if not pgtrickle.relay_may_define('disable_outbox') then
        return;
    end if;

    create or replace function pgtrickle.disable_outbox(stream_table text, if_exists boolean default false)
    returns void
    language plpgsql
    volatile
    security invoker
    as $function$
    declare
        relation oid := pgtrickle.relay_find_relation(stream_table);
        outbox_table text := pgtrickle.relay_find_outbox(stream_table, relation);
        waits text := pg_catalog.current_setting('lock_timeout');
    begin
        if outbox_table is null and if_exists then
            return;
        end if;
        outbox_table := pgtrickle.relay_require_outbox(stream_table, relation);
        if waits = '0' then
            perform pg_catalog.set_config('lock_timeout', '5s', true);
        end if;
        perform pgtrickle.relay_drop_outbox(outbox_table);
        perform pg_catalog.set_config('lock_timeout', waits, true);
    end
    $function$;

    comment on function pgtrickle.disable_outbox(text, boolean) is
        'Stops capturing and drops the outbox with what was not delivered yet. Its highest id is kept: a later outbox of this name continues above it.';

    revoke all on function pgtrickle.disable_outbox(text, boolean) from public;
end
$only_if_ours$;

create or replace function pgtrickle.relay_uncaptured_partitions()
returns table (outbox_table text, stream_table text, uncaptured text, remedy text)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select
        c.outbox_table_name,
        c.stream_table_name,
        m.target::regclass::text,
        format('select pgtrickle.enable_outbox(%L)', c.stream_table_oid::regclass)
    from pgtrickle.pgt_outbox_config as c
    cross join lateral pgtrickle.relay_outbox_capture(c.outbox_table_name) as o
    cross join lateral pgtrickle.relay_missing_triggers(o.relation, o.capture_function) as m
    group by c.outbox_table_name, c.stream_table_name, c.stream_table_oid, m.target
    order by 1, 3
$$;

comment on function pgtrickle.relay_uncaptured_partitions() is
    'Tables whose changes an outbox should capture and does not: partitions and children added after it was enabled, or a trigger dropped by hand. Definer: the relay may not see the catalog.';

revoke all on function pgtrickle.relay_uncaptured_partitions() from public;
