-- How the rows of a captured table become events: the generated capture function and its parts.
--
-- The function stands beside its table and belongs to the table's owner, as whom it runs. It is
-- made by enable_outbox as ordinary DDL of the caller; nothing of this file runs with more rights
-- than those of its caller.

create or replace function @schema@.relay_family(relation oid)
returns table (member oid, kind "char", is_child boolean)
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    with recursive family as (
        select relation as id, false as is_child
        union
        select i.inhrelid, true
        from family as f
        join pg_inherits as i on i.inhparent = f.id
    )
    select f.id, c.relkind, f.is_child
    from family as f
    join pg_class as c on c.oid = f.id
$$;
comment on function @schema@.relay_family(oid) is
    'A table, its partitions and children: a statement fires the triggers of the table that it names only.';

-- jit: guesses about the recursion are high enough that PostgreSQL would compile it, for a tenth of
-- a second.
create or replace function @schema@.relay_is_plain(
    column_types oid[], relation oid, is_pinned boolean default false
) returns boolean
language sql stable security invoker set search_path = pg_catalog, pg_temp set jit = off as $$
    with recursive part as (
        select unnest(column_types) as id
        union
        select i.id
        from part as p
        join pg_type as t on t.oid = p.id
        cross join lateral (
            select t.typelem as id where t.typelem <> 0
            union all
            select t.typbasetype where t.typbasetype <> 0
            union all
            select a.atttypid
            from pg_attribute as a
            where a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped
        ) as i
    )
    select coalesce(bool_and(
        -- Money and names of objects print by settings that a capture function does not pin.
        (p.id < 16384 and (is_pinned or t.typname <> 'money' and t.typname !~ '^reg'))
        -- These are taken apart, whatever casts there are.
        or t.typtype in ('d', 'c')
        or t.typcategory = 'A'
        or (
            -- Only the owner of a type can make a cast of it.
            p.id >= 16384
            and t.typowner in (c.relowner, 10)
            and pg_get_userbyid(c.relowner) = current_user
            and not exists (
                select
                from pg_cast as j
                left join pg_proc as f on f.oid = j.castfunc
                where j.castsource = p.id
                    and j.casttarget = 'json'::regtype
                    and f.proowner is distinct from t.typowner
            )
        )
    ), false)
    from part as p
    join pg_type as t on t.oid = p.id
    cross join pg_class as c
    where c.oid = relation
$$;
comment on function @schema@.relay_is_plain(oid[], oid, boolean) is
    'Whether to_jsonb may be called on columns of these types as the owner of the table: it calls casts to json of other types, which must be the owner''s own or the system''s.';

create or replace function @schema@.relay_row_expression(relation oid, is_guarded boolean)
returns text
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    field record;
    object text := $literal$'{}'::jsonb$literal$;
    pairs integer := 0;
begin
    for field in
        select
            a.attname,
            case
                -- A foreign base type of somebody else's table is not even printed.
                when pg_get_userbyid(c.relowner) = current_user
                    or t.typtype <> 'b' or t.typcategory = 'A' or t.oid < 16384
                    then @schema@.relay_is_plain(array[t.oid], relation, true)
            end as is_plain,
            t.oid < 16384 and @schema@.relay_is_plain(array[t.oid], relation) as is_simple
        from pg_attribute as a
        join pg_type as t on t.oid = a.atttypid
        join pg_class as c on c.oid = a.attrelid
        where a.attrelid = relation
            and a.attnum > 0
            and not a.attisdropped
            -- PostgreSQL hides virtual columns from triggers: absent is better than wrong.
            and a.attgenerated <> 'v'
            and (not starts_with(a.attname, '__pgt_') or a.attname = '__pgt_row_id')
        order by a.attnum
    loop
        if is_guarded or not field.is_simple then
            object := format('%1$I.relay_put(%2$s, %3$L, r.%3$I, %4$L)',
                @schema_name@, object, field.attname, field.is_plain);
            pairs := 0;
        else
            -- A call takes 100 arguments at most.
            object := case pairs % 50
                when 0 then object || ' || jsonb_build_object('
                else left(object, -1) || ', '
            end || format('%1$L, r.%1$I)', field.attname);
            pairs := pairs + 1;
        end if;
    end loop;
    return object;
end
$$;
comment on function @schema@.relay_row_expression(oid, boolean) is
    'SQL text that makes the event of a row r of a table; guarded: each value by itself, so that one that can''t be told is left out and named.';

create or replace function @schema@.relay_put(
    object jsonb, field text, value anyelement, is_plain boolean
) returns jsonb
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp set lc_monetary = 'C'
set quote_all_identifiers = off as $$
declare
    reason text := 'owner';
begin
    begin
        if is_plain is not null then
            return object || jsonb_build_object(
                field,
                case
                    when num_nulls(value) = 1 then null
                    when is_plain then to_jsonb(value)
                    else to_jsonb(format('%s', value))
                end
            );
        end if;
    exception
        when others then
            reason := sqlstate;
    end;
    return object || jsonb_build_object(
        'pgtrickle_omitted',
        case jsonb_typeof(object -> 'pgtrickle_omitted')
            when 'object' then object -> 'pgtrickle_omitted'
            else '{}'
        end || jsonb_build_object(field, reason)
    );
end
$$;
comment on function @schema@.relay_put(jsonb, text, anyelement, boolean) is
    'Part of relay_row_expression: the object with one more field, or with its name among what is omitted, and why: the SQLSTATE, or owner where is_plain is null.';

create or replace function @schema@.relay_primary_key(relation oid) returns text[]
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select coalesce(
        (
            select array_agg(a.attname::text order by k.position)
            from pg_index as i
            cross join lateral unnest(i.indkey) with ordinality as k (attnum, position)
            join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.attnum
            where i.indrelid = relation
                and i.indisprimary
                -- Columns behind them are only included in the index.
                and k.position <= i.indnkeyatts
        ),
        (
            select array['__pgt_row_id']
            from pg_attribute as a
            where a.attrelid = relation and a.attname = '__pgt_row_id' and not a.attisdropped
        )
    )
$$;
comment on function @schema@.relay_primary_key(oid) is
    'Columns of the primary key in its order; of a stream table of pg_trickle its row id; null without either.';

create or replace function @schema@.relay_is_quick(outbox_table text, relation oid default null)
returns boolean
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    select coalesce(
        not bool_or(a.attgenerated = 'v' or starts_with(a.attname, '__pgt_'))
        and array_agg(a.attname::text) @> coalesce((@schema@.relay_settings(outbox_table)).key_columns, '{}')
        and (relation is not null or max(a.atttypid) < 16384)
        and @schema@.relay_is_plain(array_agg(distinct a.atttypid), min(r.captured)),
        false)
    from (select coalesce(relation, @schema@.relay_captured_table(outbox_table)) as captured) as r
    cross join lateral (
        select f.member from @schema@.relay_family(r.captured) as f where relation is null
        union all
        select relation where relation is not null
    ) as f
    join pg_attribute as a on a.attrelid = f.member and a.attnum > 0 and not a.attisdropped
$$;
comment on function @schema@.relay_is_quick(text, oid) is
    'Whether the rows of a captured table may be told by relay_capture_quick: plain columns, and the key among them. Without a relation, for all of the family and as long as no column changes: immutable as far as a plan goes, since PostgreSQL plans a statement on the transition table again whenever the table is altered. With one, at this moment.';

create or replace function @schema@.relay_capture_quick(
    settings @schema@.pgt_outbox_config, operation text
) returns text
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    select format(
        $piece$
            insert into %1$I.%2$I (inserted_count, deleted_count, payload)
            select %3$s, %4$s, jsonb_build_object('v', 1, 'inserted', %5$s, 'deleted', %6$s)
            from (
                select %7$s
                where %1$I.relay_is_quick(%2$L) or %1$I.relay_is_quick(%2$L, tg_relid)
                offset 0
            ) as c
            where %3$s + %4$s between 1 and %8$s
                and %9$s <= %10$s;$piece$,
        @schema_name@,
        settings.outbox_table_name,
        case operation when 'DELETE' then '0' else 'jsonb_array_length(c.i)' end,
        case operation when 'INSERT' then '0' else 'jsonb_array_length(c.d)' end,
        case operation when 'DELETE' then $json$'[]'::jsonb$json$ else 'c.i' end,
        case operation when 'INSERT' then $json$'[]'::jsonb$json$ else 'c.d' end,
        -- In an expression r.* is the row, whatever its columns are called.
        string_agg(
            format('to_jsonb(array(select coalesce(r.*) from %I as r limit %s)) as %s',
                s.rows, settings.claim_check_rows + 1, s.alias),
            ', ' order by s.alias desc
        ),
        settings.claim_check_rows,
        string_agg(format('pg_column_size(c.%s)', s.alias), ' + ' order by s.alias desc),
        settings.claim_check_bytes
    )
    from (values ('i', 'new_rows', 'DELETE'), ('d', 'old_rows', 'INSERT')) as s (alias, rows, without)
    where s.without <> operation
$$;
comment on function @schema@.relay_capture_quick(@schema@.pgt_outbox_config, text) is
    'Part of a capture function: few rows whose values are plain are written in one statement, in half the time that the rest of the function takes for them.';

create or replace function @schema@.relay_capture_first(first_by text[]) returns text
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    select case when cardinality(first_by) > 0 then format(
        $piece$
    if tg_argv[0] = 'first' then
        declare
            is_first boolean;
            is_first_sql text;
        begin
            begin
                if tg_op = 'DELETE' then
                    select record_image_eq(row(%1$s), row(%3$s)) into is_first from old_rows as r where %5$s limit 1;
                else
                    select record_image_eq(row(%2$s), row(%3$s)) into is_first from new_rows as r where %5$s limit 1;
                end if;
            exception
                when others then
                    -- A column of the key was renamed.
                    select format(
                        'select record_image_eq(row(%%1$s), row(%%2$s)) from %%3$I as r limit 1',
                        string_agg(format('($1).%%I', k), ', '), string_agg(format('r.%%I', k), ', '),
                        case tg_op when 'DELETE' then 'old_rows' else 'new_rows' end)
                    into is_first_sql
                    from unnest(%4$I.relay_primary_key(tg_relid)) as k
                    where %5$s
                    having count(*) > 0;
                    if is_first_sql is null then
                        null;
                    elsif tg_op = 'DELETE' then
                        execute is_first_sql into is_first using old;
                    else
                        execute is_first_sql into is_first using new;
                    end if;
            end;
            if not is_first then
                return null;
            end if;
            -- Rows of a table that lost its primary key can't be told apart.
            is_each := is_first is null;
        end;
    end if;$piece$,
        string_agg(format('old.%I', k), ', '),
        string_agg(format('new.%I', k), ', '),
        string_agg(format('r.%I', k), ', '),
        @schema_name@,
        'exists (select from pg_index as k where k.indrelid = tg_relid and k.indisprimary and k.indimmediate)'
    ) else '' end
    from unnest(first_by) as k
$$;
comment on function @schema@.relay_capture_first(text[]) is
    'Part of a capture function in front of row triggers of others: the first row of a statement, known by its primary key, tells all of them, so that what other triggers do comes behind.';

create or replace function @schema@.relay_capture_mode(capture text, relation oid) returns text
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    with recursive changed as (
        select f.member, false as is_changed_in_turn from @schema@.relay_family(relation) as f
        union
        -- What foreign keys change in turn, before the statement is told.
        select k.conrelid, true
        from changed as c
        join pg_constraint as k on k.confrelid = c.member
        where k.contype = 'f' and (k.confdeltype in ('c', 'n', 'd') or k.confupdtype in ('c', 'n', 'd'))
    )
    select case
        when capture <> 'auto' then capture
        when exists (
            select
            from changed as c
            left join pg_trigger as t
                on t.tgrelid = c.member and not t.tgisinternal and not starts_with(t.tgname, '!pgtrickle_')
            where case
                when c.is_changed_in_turn
                then t.oid is not null or c.member in (select f.member from @schema@.relay_family(relation) as f)
                else t.tgtype & 67 = 1
            end
        ) then 'row'
        else 'statement'
    end
$$;
comment on function @schema@.relay_capture_mode(text, oid) is
    'How a table is captured: what was asked for; for auto, row where triggers after each row, or what foreign keys change in turn, could change it before the statement is told.';

create or replace function @schema@.relay_first_by(relation oid, mode text) returns text[]
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select @schema@.relay_primary_key(relation)
    where exists (select from pg_index as i where i.indrelid = relation and i.indisprimary and i.indimmediate)
        and not exists (select from pg_inherits as i where relation in (i.inhrelid, i.inhparent))
        and (mode = 'row' or exists (
            select
            from pg_trigger as t
            where t.tgrelid = relation
                and not t.tgisinternal
                and t.tgtype & 66 = 0
                and t.tgtype & 28 <> 0
                and not starts_with(t.tgname, '!pgtrickle_')
        ))
$$;
comment on function @schema@.relay_first_by(oid, text) is
    'The primary key of a table that triggers of others may change before a statement is told as a whole; null where none does, or it has no such key.';

create or replace function @schema@.relay_current_rows(relation oid, operation text) returns text
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select format(
        '(select t.* from only %s as t where (%s) in (%s))',
        relation::regclass,
        string_agg(format('t.%I', k.name), ', ' order by k.place),
        concat_ws(
            ' union all ',
            case when operation <> 'DELETE' then 'select ' || string_agg(format('n.%I', k.name), ', ' order by k.place) || ' from new_rows as n' end,
            case when operation <> 'INSERT' then 'select ' || string_agg(format('o.%I', k.name), ', ' order by k.place) || ' from old_rows as o' end)
    )
    from unnest(@schema@.relay_primary_key(relation)) with ordinality as k (name, place)
    where exists (select from pg_index as i where i.indrelid = relation and i.indisprimary and i.indimmediate)
        -- Rows that a policy hides from the owner are told as they were written.
        and not row_security_active(relation)
    having count(*) > 0
$$;
comment on function @schema@.relay_current_rows(oid, text) is
    'SQL text for the rows of a statement as they are now: one that makes several kinds of change is told in parts, and triggers of others may have changed its rows in between.';

create or replace function @schema@.relay_capture_source(
    settings @schema@.pgt_outbox_config, relation oid
) returns text
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select format(
        $source$
-- pgtrickle-relay capture, layout 2
#variable_conflict use_variable
%1$s%2$s
declare
    current_rows constant text := %3$s;
    has_new constant boolean := tg_op <> 'DELETE' or current_rows is not null;
    has_old constant boolean := tg_op <> 'INSERT';
    max_rows constant bigint := %6$s;
    row_json text := %4$I.relay_row_expression(tg_relid, false);
    is_guarded boolean := false;
    is_claim_check boolean;
    new_count bigint := 0;
    old_count bigint := 0;
    new_list jsonb := '[]';
    old_list jsonb := '[]';
    new_bytes bigint := 0;
    old_bytes bigint := 0;
    few constant text := 'select count(*), coalesce(jsonb_agg(c.j), ''[]''), coalesce(sum(pg_column_size(c.j)), 0)'
        ' from (select %%s as j from %%s as r limit %%s) as c';
    new_rows_sql constant text := %7$s;
    old_rows_sql constant text := %8$s;
    key_now text[];
    captured_id bigint;
begin
    if tg_op = 'TRUNCATE' then
        if exists (
            select from %4$I.relay_family(tg_relid) as f where f.member <> tg_relid and pg_relation_size(f.member) > 0
        ) then
            raise warning 'truncate only %% is not captured: its children keep their rows', tg_relid::regclass;
        else
            insert into %4$I.%5$I (payload)
            values ('{"v": 1, "full_refresh": true, "inserted": [], "deleted": []}');
        end if;
        return null;
    end if;
    loop
        begin
            is_claim_check := false;
            if has_new then
                execute format(few, row_json, new_rows_sql, max_rows + 1)
                into new_count, new_list, new_bytes%9$s;
            end if;
            if has_old then
                execute format(few, row_json, old_rows_sql, max_rows + 1)
                into old_count, old_list, old_bytes%10$s;
            end if;
            if new_count + old_count > max_rows or new_bytes + old_bytes > %11$s then
                is_claim_check := true;
                if has_new then
                    execute format('select count(%%s) from %%s as r', row_json, new_rows_sql)
                    into new_count%9$s;
                end if;
                if has_old then
                    execute format('select count(%%s) from %%s as r', row_json, old_rows_sql)
                    into old_count%10$s;
                end if;
            end if;
            exit;
        exception
            when others then
                if is_guarded then
                    -- Each row can be told, but all of them are too large for one value.
                    is_claim_check := true;
                    if has_new then
                        execute format('select count(*) from %%s as r', new_rows_sql) into new_count%9$s;
                    end if;
                    if has_old then
                        execute format('select count(*) from %%s as r', old_rows_sql) into old_count%10$s;
                    end if;
                    exit;
                end if;
                is_guarded := true;
                row_json := %4$I.relay_row_expression(tg_relid, true);
        end;
    end loop;
    if new_count + old_count = 0 then
        return null;
    end if;
    if not has_column_privilege(%12$L::regclass, 'payload', 'insert') then
        raise exception using
            errcode = 'insufficient_privilege',
            message = format('%%I may not write the outbox of %%s', current_user, tg_relid::regclass),
            detail = 'The table or its capture function has another owner now.',
            hint = format('select %%I.repair_outbox(%%L)', %4$L, tg_relid::regclass);
    end if;
    if not coalesce(new_list -> 0, old_list -> 0, '{}') ?& %13$L::text[] then
        key_now := %4$I.relay_primary_key(tg_relid);
    end if;

    insert into %4$I.%5$I (inserted_count, deleted_count, is_claim_check, payload, key_columns)
    values (
        new_count, old_count, is_claim_check,
        case
            when is_claim_check then jsonb_build_object('v', 1, 'claim_check', true,
                'inserted_count', new_count, 'deleted_count', old_count)
            else jsonb_build_object('v', 1, 'inserted', new_list, 'deleted', old_list)
        end,
        key_now
    )
    returning id into captured_id;
    if is_claim_check and has_new then
        execute format(
            'insert into %%I.%%I (outbox_id, row_num, row_op, row_data)'
            ' select %%s, row_number() over () - 1, ''INSERT'', %%s from %%s as r',
            %4$L, %14$L, captured_id, row_json, new_rows_sql
        )%9$s;
    end if;
    if is_claim_check and has_old then
        execute format(
            'insert into %%I.%%I (outbox_id, row_num, row_op, row_data)'
            ' select %%s, %%s + row_number() over () - 1, ''DELETE'', %%s from %%s as r',
            %4$L, %14$L, captured_id, new_count, row_json, old_rows_sql
        )%10$s;
    end if;
    return null;
end;
end
$source$,
        case when m.mode = 'row' then format(E'declare\n    is_each boolean := tg_argv[0] = %L;\nbegin%s',
            'each', @schema@.relay_capture_first(f.first_by)) else 'begin' end,
        case when m.mode = 'row' or f.first_by is not null then '' else format(
            $quick$
    begin
        if tg_op = 'INSERT' then%s
        elsif tg_op = 'UPDATE' then%s
        elsif tg_op = 'DELETE' then%s
        end if;
        if found then
            return null;
        end if;
    exception
        when others then
            -- Some value can't be told, or the row can't be written: what follows finds out.
            null;
    end;
$quick$,
            @schema@.relay_capture_quick(settings, 'INSERT'),
            @schema@.relay_capture_quick(settings, 'UPDATE'),
            @schema@.relay_capture_quick(settings, 'DELETE')
        ) end,
        case
            when f.first_by is null then 'null'
            else format('%s%I.relay_current_rows(tg_relid, tg_op)%s',
                case when m.mode = 'row' then 'case when not is_each then ' else '' end, @schema_name@,
                case when m.mode = 'row' then ' end' else '' end)
        end,
        @schema_name@,
        settings.outbox_table_name,
        settings.claim_check_rows,
        format($sql$coalesce(current_rows, %s'new_rows')$sql$,
            case when m.mode = 'row' then $sql$case when is_each then '(select ($1).*)' end, $sql$ else '' end),
        case when m.mode = 'row' then $sql$case when is_each then '(select ($1).*)' else 'old_rows' end$sql$
            else quote_literal('old_rows') end,
        case when m.mode = 'row' then ' using new' else '' end,
        case when m.mode = 'row' then ' using old' else '' end,
        settings.claim_check_bytes,
        format('%I.%I', @schema_name@, settings.outbox_table_name),
        coalesce(settings.key_columns, '{}'),
        settings.delta_table_name
    )
    -- Asked once: without offset each use of the name is a call.
    from (select @schema@.relay_capture_mode(settings.capture, relation) as mode offset 0) as m
    cross join lateral (select @schema@.relay_first_by(relation, m.mode) as first_by) as f
$$;
comment on function @schema@.relay_capture_source(@schema@.pgt_outbox_config, oid) is
    'Source of the capture function of a table with these settings, made by format alone. What it evaluates of a row is conversion to JSON; the rest are its own names, which can''t meet a column''s.';
