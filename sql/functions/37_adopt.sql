-- Outboxes that people have already: their table is read where it stands, in commit order.
--
-- Beside the table stands a function that reads it and, where that is asked for, one that deletes
-- from it. Both belong to the table's owner and run as the owner, so that types, policies, triggers
-- and indexes of the table run nothing with the rights of the relay or of the catalog. The reading
-- one has a body that PostgreSQL has parsed: it follows each rename, goes through a dump, and keeps
-- its columns and its sequence from being dropped or retyped. A view in our schema, called like an
-- outbox, names both functions: so the table of an outbox is found without a name or an oid stored.

create or replace function @schema@.relay_rows(p_relation text, p_bounds text) returns text
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    select case when p_relation like '%)' then left(p_relation, -1) || ', ' || p_bounds || ')' else p_relation end
$$;
comment on function @schema@.relay_rows(text, text) is
    'Runs as its caller. What stands behind "from" to read an outbox: its table, or where it is adopted the call of relay_adopted_rows with these arguments. What they say has to stand in the statement''s conditions as well.';

create or replace function @schema@.relay_adopted(
    outbox_table text, out relation oid, out id_column name, out sequence_id oid, out reader_id oid,
    out sweeper_id oid, out version text
)
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    with beside as materialized (
        select p.oid, p.pronargs, concat_ws(' ', p.oid, p.xmin, p.ctid) as version
        from pg_rewrite as r
        join pg_depend as d
            on d.classid = 'pg_rewrite'::regclass and d.objid = r.oid and d.refclassid = 'pg_proc'::regclass
        join pg_proc as p on p.oid = d.refobjid
        where r.ev_class = to_regclass(format('%I.%I', @schema_name@, outbox_table))
            and p.pronamespace <> (select n.oid from pg_namespace as n where n.nspname = @schema_name@)
    ), reader as materialized (
        select b.oid, s.objid as sequence_id, s.refobjid as relation, s.refobjsubid as attnum
        from beside as b
        -- The only sequence that it names is that of the id.
        left join pg_depend as d
            on d.classid = 'pg_proc'::regclass and d.objid = b.oid and d.refclassid = 'pg_class'::regclass
            and exists (select from pg_class as c where c.oid = d.refobjid and c.relkind = 'S')
        left join pg_depend as s
            on s.classid = 'pg_class'::regclass and s.objid = d.refobjid and s.refclassid = 'pg_class'::regclass
            and s.deptype in ('a', 'i')
        where b.pronargs > 1
        order by s.refobjid
        limit 1
    )
    select
        r.relation, (select a.attname from pg_attribute as a where a.attrelid = r.relation and a.attnum = r.attnum),
        r.sequence_id, r.oid, (select b.oid from beside as b where b.pronargs = 1),
        (select string_agg(b.version, ', ' order by b.pronargs) from beside as b)
    from (select) as one
    left join reader as r on true
$$;
comment on function @schema@.relay_adopted(text) is
    'Runs as its caller, and reads PostgreSQL''s catalogs. The table of an adopted outbox as it is called now, its id and its functions, and what changes when one of these is replaced; nulls where it is gone.';

-- ---------------------------------------------------------------------------
-- What stands beside the table
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_reader_settings() returns text[]
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    -- Policies that would hide rows are an error; the order of ids is never had by sorting all of the table.
    select (@schema@.relay_function_shape('capture')).configuration || array['row_security=off', 'enable_seqscan=off', 'enable_bitmapscan=off']
$$;
comment on function @schema@.relay_reader_settings() is
    'Runs as its caller. What the function that reads an adopted table pins, as PostgreSQL stores it.';

create or replace function @schema@.relay_settings_clause(p_settings text[]) returns text
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    select string_agg(format('set %s to %s', split_part(c, '=', 1), case
        when starts_with(c, 'search_path') then split_part(c, '=', 2)
        else quote_literal(split_part(c, '=', 2))
    end), ' ')
    from unnest(p_settings) as c
$$;
comment on function @schema@.relay_settings_clause(text[]) is
    'Runs as its caller. Settings as PostgreSQL stores them, as clauses of a function.';

create or replace function @schema@.relay_reader_source(
    p_pgt_id uuid, p_relation oid, p_columns jsonb, p_sequence_id oid
) returns text
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
begin
    return (select format(
        $source$(
    firsts bigint[], lasts bigint[], above bigint, max_rows bigint, newest boolean, with_payload boolean
) returns table (id bigint, created_at timestamptz, payload bytea, headers bytea, fields text[])
language sql stable security definer %5$s
begin atomic
    select f.id, f.created_at, f.payload, f.headers, f.fields
    from (
        select g.id, g.created_at, g.payload, g.headers, g.fields
        from unnest($1, $2) as r (first_id, last_id)
        cross join lateral (
            select %1$s from %2$s as t where t.%3$I between r.first_id and r.last_id order by t.%3$I limit $4
        ) as g
        union all
        (select %1$s from %2$s as t where t.%3$I > $3 order by t.%3$I limit $4)
        union all
        (select %1$s from %2$s as t where $5 order by t.%3$I desc limit 1)
    ) as f
    where %4$L::regclass is not null
    order by f.id
    limit $4;
end$source$,
        format('t.%I as id, %s as created_at', p_columns ->> 'id', coalesce(
            't.' || quote_ident(p_columns ->> 'created_at') || '::timestamptz', 'null::timestamptz'))
        || (
            select string_agg(format(', case when $6 then %s end as %s', e.expression, e.name), '' order by e.place)
            from (values
                (1, 'payload', case
                    when @schema@.relay_base_type(a.atttypid) = 'bytea'::regtype then format('t.%I::bytea', a.attname)
                    else format('convert_to(t.%I::text, %L)', a.attname, u.encoding) end),
                (2, 'headers', case when p_columns ? 'headers'
                    then format('convert_to(t.%I::text, %L)', p_columns ->> 'headers', u.encoding) else 'null::bytea' end),
                (3, 'fields', format('array[%s, md5(concat_ws('' '', %L, %s))]',
                    (
                        select string_agg(coalesce('t.' || quote_ident(p_columns ->> w.field) || '::text', 'null::text'), ', ' order by w.n)
                        from unnest(array['key', 'dedup_key', 'event_type', 'subject']) with ordinality as w (field, n)
                    ),
                    p_pgt_id,
                    (select string_agg(format('t.%I::text', v.value), ', ' order by v.key) from jsonb_each_text(p_columns) as v)))
            ) as e (place, name, expression)
        ),
        p_relation::regclass, p_columns ->> 'id', p_sequence_id::regclass,
        @schema@.relay_settings_clause(@schema@.relay_reader_settings()))
    from pg_attribute as a
    -- Where the database does not know what its texts are encoded in, the relay gets them as they are.
    cross join (select case getdatabaseencoding() when 'SQL_ASCII' then 'SQL_ASCII' else 'UTF8' end as encoding) as u
    where a.attrelid = p_relation and a.attname = p_columns ->> 'payload');
end
$$;
comment on function @schema@.relay_reader_source(uuid, oid, jsonb, oid) is
    'Runs as its caller. Arguments and body of the function that reads an adopted table: rows in ranges of ids, rows above an id and the newest one, seen in one snapshot and by id. The last field differs where the id comes again with another event.';

create or replace function @schema@.relay_sweeper_source(p_outbox_table text) returns text
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    select format(
        $source$
declare
    adopted constant record := %1$I.relay_adopted(%2$L);
    deleted_rows bigint;
begin
    execute format('delete from %%s as t where t.%%I = any ($1)', adopted.relation::regclass, adopted.id_column) using ids;
    get diagnostics deleted_rows = row_count;
    -- Nothing of the owner's is left to the commit, which the relay makes with its own rights.
    set constraints all immediate;
    return deleted_rows;
end
$source$, @schema_name@, p_outbox_table)
$$;
comment on function @schema@.relay_sweeper_source(text) is
    'Runs as its caller. Source of the function that deletes delivered rows from an adopted table.';

-- ---------------------------------------------------------------------------
-- What is wrong
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_adopted_problem(
    p_settings @schema@.pgt_outbox_config, p_relation oid, p_id_column name, p_sequence_id oid,
    p_reader_id oid, p_sweeper_id oid, out problem text, out remedy text
)
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select o.problem, o.remedy
    from (select) as one
    left join pg_class as c on c.oid = p_relation
    left join pg_attribute as a on a.attrelid = c.oid and a.attname = p_id_column and a.attnum > 0 and not a.attisdropped
    left join pg_attrdef as f on f.adrelid = c.oid and f.adnum = a.attnum
    left join pg_sequence as q on q.seqrelid = p_sequence_id
    left join pg_proc as r on r.oid = p_reader_id
    left join pg_proc as w on w.oid = p_sweeper_id
    left join pg_namespace as o_n on o_n.nspname = @schema_name@
    cross join lateral (
        select c.oid::regclass::text as relation_name,
            format('alter table %s alter column %s', c.oid::regclass, quote_ident(a.attname)) as alter_id,
            quote_ident(coalesce(a.attname, p_id_column)) as id_name, quote_ident(pg_get_userbyid(o_n.nspowner)) as catalog_owner,
            format('select %I.disable_outbox(%L)', @schema_name@, p_settings.stream_table) as release,
            a.attidentity <> ''
                or pg_get_expr(f.adbin, f.adrelid) = format('nextval(%L::regclass)', p_sequence_id::regclass::text) as is_drawn
    ) as n
    cross join lateral (values
        (c.oid is null, 'its table or the function that reads it is gone',
            n.release || ', and adopt the table again'),
        (c.relkind <> 'r' or c.relispartition
                or exists (select from pg_inherits as i where c.oid in (i.inhrelid, i.inhparent))
                or c.relnamespace in (o_n.oid, 'pg_catalog'::regnamespace, 'information_schema'::regnamespace),
            format('%s is not an ordinary table: views, foreign and system tables, partitions and tables with children can''t be read in commit order', n.relation_name),
            'let the application write its events to an ordinary table, or capture the table with enable_outbox'),
        (c.relpersistence <> 'p',
            format('%s loses its rows and begins its ids again after a crash', n.relation_name),
            format('alter table %s set logged', n.relation_name)),
        (c.relrowsecurity and c.relforcerowsecurity,
            format('row-level security of %s holds for its owner, and could hide events', n.relation_name),
            format('alter table %s no force row level security', n.relation_name)),
        (exists (select from pg_rewrite as x where x.ev_class = c.oid),
            format('a rule rewrites what is written to %s', n.relation_name), 'drop the rule'),
        (a.attnum is null, format('%s has no column %s', n.relation_name, n.id_name),
            format('alter table %s add column seq bigint generated always as identity unique', n.relation_name)),
        (a.atttypid <> 'int8'::regtype or q.seqrelid is null,
            format('column %s of %s is not a bigint that PostgreSQL draws from a sequence', n.id_name, n.relation_name),
            format('alter table %s add column seq bigint generated always as identity unique', n.relation_name)),
        (n.is_drawn and a.attidentity <> 'a' and (p_settings.adopted ->> 'ids_drawn_by_insert')::boolean is not true,
            format('ids of %s may be drawn ahead of the insert, and an event with such an id would be lost', n.relation_name),
            format('%s, or say ids_drawn_by_insert => true where every insert leaves the id to PostgreSQL', case a.attidentity
                when 'd' then n.alter_id || ' set generated always'
                else format('alter table %s add column seq bigint generated always as identity unique', n.relation_name) end)),
        (n.is_drawn is not true, format('column %s of %s is no longer drawn from its sequence', n.id_name, n.relation_name),
            n.alter_id || ' set default nextval(...)'),
        (not a.attnotnull, format('column %s of %s may be null', n.id_name, n.relation_name), n.alter_id || ' set not null'),
        (q.seqcache > 1,
            format('the sequence of %s has cache %s: sessions draw ids long before they write them', n.relation_name, q.seqcache),
            case when a.attidentity <> '' then n.alter_id || ' set cache 1'
                else format('alter sequence %s cache 1', p_sequence_id::regclass) end),
        (q.seqincrement < 1 or q.seqcycle or q.seqmin < 1,
            format('the sequence of %s counts down, begins again at its end, or may draw ids below 1', n.relation_name),
            format('alter sequence %s increment 1 minvalue 1 no cycle', p_sequence_id::regclass)),
        (not exists (
                select
                from pg_index as i
                where i.indrelid = c.oid and i.indisunique and i.indisvalid and i.indpred is null
                    and i.indexprs is null and i.indnkeyatts = 1 and i.indkey[0] = a.attnum),
            format('column %s of %s has no unique index of its own', n.id_name, n.relation_name),
            format('create unique index concurrently on %s (%s)', n.relation_name, n.id_name)),
        (p_reader_id is not null and (r.proowner <> c.relowner or w.proowner <> c.relowner),
            format('the function that reads %s belongs to %s, the table to %s', n.relation_name,
                r.proowner::regrole, c.relowner::regrole),
            n.release || ' as a superuser, and adopt the table again'),
        (p_reader_id is not null and not (
                r.prosecdef and r.prolang = (select l.oid from pg_language as l where l.lanname = 'sql')
                and r.provolatile = 's' and r.prosqlbody is not null
                and r.proconfig is not distinct from @schema@.relay_reader_settings()),
            format('the function that reads %s is not as it was made', n.relation_name),
            n.release || ', and adopt the table again'),
        (p_reader_id is not null and (p_settings.adopted ->> 'delete_delivered')::boolean and (
                w.oid is null or not w.prosecdef
                or w.prolang <> (select l.oid from pg_language as l where l.lanname = 'plpgsql')
                or w.prosrc <> @schema@.relay_sweeper_source(p_settings.outbox_table_name)
                or w.proconfig is distinct from array['search_path=pg_catalog, pg_temp']),
            format('the function that deletes from %s is not as it was made', n.relation_name),
            n.release || ', and adopt the table again'),
        (p_reader_id is not null and not has_sequence_privilege(o_n.nspowner, p_sequence_id, 'select'),
            format('%s may not read the sequence of %s', n.catalog_owner, n.relation_name),
            format('grant select on sequence %s to %s', p_sequence_id::regclass, n.catalog_owner))
    ) as o (is_so, problem, remedy)
    where o.is_so
    limit 1
$$;
comment on function @schema@.relay_adopted_problem(@schema@.pgt_outbox_config, oid, name, oid, oid, oid) is
    'Runs as its caller, and reads PostgreSQL''s catalogs. The first reason why a table can''t be read as an outbox without losing an event, or only with rights that are not its owner''s; nothing where all is well.';

create or replace function @schema@.relay_refuse_adopted(
    p_settings @schema@.pgt_outbox_config, p_adopted record
) returns void
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v record;
begin
    select p.* into v
    from @schema@.relay_adopted_problem(
        p_settings, p_adopted.relation, p_adopted.id_column, p_adopted.sequence_id,
        p_adopted.reader_id, p_adopted.sweeper_id) as p;
    if v.problem is not null then
        raise exception using
            errcode = 'RL005',
            message = format('outbox %s can''t be read: %s', p_settings.stream_table, v.problem),
            hint = v.remedy;
    end if;
end
$$;
comment on function @schema@.relay_refuse_adopted(@schema@.pgt_outbox_config, record) is
    'Runs as its caller. RL005 with the reason and the remedy where the table of an adopted outbox can''t be read.';

-- ---------------------------------------------------------------------------
-- Reading
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_adopted_rows(
    outbox_table text, above bigint default 0, max_rows bigint default null,
    firsts bigint[] default null, lasts bigint[] default null, newest boolean default false,
    with_payload boolean default false
) returns table (
    id bigint, created_at timestamptz, inserted_count bigint, deleted_count bigint,
    is_claim_check boolean, payload bytea, headers bytea, fields text[]
)
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    settings constant @schema@.pgt_outbox_config := @schema@.relay_settings(outbox_table);
    adopted constant record := @schema@.relay_adopted(outbox_table);
    is_read boolean := false;
begin
    perform @schema@.relay_refuse_adopted(settings, adopted);
    if above > pg_sequence_last_value(adopted.sequence_id) and above < 9223372036854775807 then
        raise exception using
            errcode = 'RL005',
            message = format('ids of outbox %s were drawn up to %s already, and begin again', settings.stream_table, above),
            detail = 'Its sequence was set back, or its table truncated with restart identity.',
            hint = format('select setval(%L, %s), or where the rows are new ones: relay_seek to earliest',
                adopted.sequence_id::regclass, above);
    end if;
    begin
        -- One call, hence one snapshot: what makes the order of commits readable.
        return query execute format(
            $query$
            select r.id, r.created_at, 1::bigint, 0::bigint, false, r.payload, r.headers, r.fields
            from %s($1, $2, $3, $4, $5, $6) as r
            $query$, adopted.reader_id::regproc)
        using firsts, lasts, above, max_rows, newest, with_payload;
        is_read := true;
        raise exception 'undo all that the function did but its rows';
    exception
        when raise_exception then
            if not is_read then
                raise;
            end if;
    end;
    if (@schema@.relay_adopted(outbox_table)).version is distinct from adopted.version then
        raise exception using
            errcode = 'RL034',
            message = format('the function that reads outbox %s was changed while it ran', settings.stream_table);
    end if;
end
$$;
comment on function @schema@.relay_adopted_rows(text, bigint, bigint, bigint[], bigint[], boolean, boolean) is
    'Runs as its caller, who needs the right to execute the function beside the table. The rows of an adopted outbox by id: in ranges, above an id, the newest; as many as max_rows, whose payload, headers and fields (key, deduplication key, event type, subject, digest) are null unless asked for. RL005 where it can''t be read. What its owner made of the function is found out before and behind the call, and leaves nothing behind.';

create or replace function @schema@.relay_sweep_adopted(p_outbox_table text, p_ids bigint[])
returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    settings constant @schema@.pgt_outbox_config := @schema@.relay_settings(p_outbox_table);
    adopted constant record := @schema@.relay_adopted(p_outbox_table);
begin
    perform @schema@.relay_refuse_adopted(settings, adopted);
    execute format('select %s($1)', adopted.sweeper_id::regproc) using p_ids;
    if (@schema@.relay_adopted(p_outbox_table)).version is distinct from adopted.version then
        raise exception using
            errcode = 'RL034',
            message = format('the function that deletes from outbox %s was changed while it ran', settings.stream_table);
    end if;
    perform @schema@.relay_refuse_deferred();
end
$$;
comment on function @schema@.relay_sweep_adopted(text, bigint[]) is
    'Part of relay_sweep_outbox, runs as it does: deletes these rows through the function beside the table, which runs as the table''s owner and is compared before and behind the call.';

-- ---------------------------------------------------------------------------
-- Adopting
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_register_adopted(
    p_wanted @schema@.pgt_outbox_config, p_reader_id oid, p_sweeper_id oid
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    wanted @schema@.pgt_outbox_config := p_wanted;
    adopted record;
begin
    perform pg_advisory_xact_lock(hashtextextended(@schema_name@ || ':outbox names', 0));
    if exists (
        select from @schema@.pgt_outbox_config as c
        where c.stream_schema is null and c.stream_table = wanted.stream_table
    ) then
        raise exception using
            errcode = 'RL002',
            message = format('outbox %s is there already', wanted.stream_table),
            hint = format('Choose another name, or: select %I.disable_outbox(%L)', @schema_name@, wanted.stream_table);
    end if;
    perform @schema@.relay_require_claim(p_reader_id, 'adopt ' || wanted.stream_table);
    wanted := @schema@.relay_outbox_plan(p_wanted, null);
    if wanted.outbox_table_name is distinct from p_wanted.outbox_table_name then
        raise exception using
            errcode = 'serialization_failure',
            message = format('another outbox took the name %I meanwhile', p_wanted.outbox_table_name),
            hint = 'try again';
    end if;
    wanted.pgt_id := p_wanted.pgt_id;
    wanted.adopted := jsonb_build_object(
        'ids_drawn_by_insert', wanted.adopted -> 'ids_drawn_by_insert', 'delete_delivered', wanted.adopted -> 'delete_delivered');
    execute format(
        $view$
        create view %1$I.%2$I as
        select r.* from %1$I.relay_adopted_rows(%2$L, with_payload => true) as r where %3$s
        $view$,
        @schema_name@, wanted.outbox_table_name, (
            select string_agg(format('%L::regprocedure is not null', p.oid::regprocedure), ' and ')
            from pg_proc as p where p.oid in (p_reader_id, p_sweeper_id)));
    execute format('comment on view %I.%I is %L', @schema_name@, wanted.outbox_table_name,
        format('Outbox %s: the rows of a table of somebody else, which the functions that it names read and sweep.', wanted.stream_table));
    adopted := @schema@.relay_adopted(wanted.outbox_table_name);
    perform @schema@.relay_refuse_adopted(wanted, adopted);
    if exists (
        select from @schema@.pgt_outbox_config as c
        where c.adopted is not null and (@schema@.relay_adopted(c.outbox_table_name)).relation = adopted.relation
            or @schema@.relay_captured_table(c.outbox_table_name) = adopted.relation
    ) then
        raise exception using
            errcode = 'RL002',
            message = format('%s has an outbox already', adopted.relation::regclass),
            hint = format('select %I.disable_outbox(%L)', @schema_name@, adopted.relation::regclass);
    end if;
    insert into @schema@.pgt_outbox_config values (wanted.*);
    execute format('grant select on %I.%I to %I', @schema_name@, wanted.outbox_table_name, (
        select pg_get_userbyid(c.relowner) from pg_class as c where c.oid = adopted.relation));
    if to_regrole('pgtrickle_relay') is not null then
        execute format('grant select on %I.%I to pgtrickle_relay', @schema_name@, wanted.outbox_table_name);
    end if;
    return wanted.outbox_table_name;
end
$$;
comment on function @schema@.relay_register_adopted(@schema@.pgt_outbox_config, oid, oid) is
    'The catalog''s half of adopt_outbox. Definer: table owners may not create in the schema; it acts for who has claimed the function that reads the table in this transaction, and proves that function to belong to the table''s owner.';

create or replace function @schema@.relay_check_adopted_columns(p_relation oid, p_columns jsonb)
returns void
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v record;
begin
    select w.field, w.types, w.column_name, a.attname, format_type(a.atttypid, null) as type
    into v
    from (
        select k.field, k.types::regtype[]::oid[] as types, k.types as words, p_columns ->> k.field as column_name, k.place
        from (values
            (1, 'id', '{}'),
            (2, 'payload', '{jsonb,json,text,varchar,bytea}'),
            (3, 'headers', '{jsonb,json,text,varchar}'),
            (4, 'created_at', '{timestamptz,timestamp}'),
            (5, 'key', '{}'), (6, 'dedup_key', '{}'), (7, 'event_type', '{}'), (8, 'subject', '{}')
        ) as k (place, field, types)
    ) as w
    left join pg_attribute as a
        on a.attrelid = p_relation and a.attname = w.column_name and a.attnum > 0 and not a.attisdropped
    where w.column_name is null and w.field in ('id', 'payload')
        or w.column_name is not null and (
            a.attname is null or w.types <> '{}' and @schema@.relay_base_type(a.atttypid) <> all (w.types))
    order by w.place
    limit 1;
    if found then
        raise exception using
            errcode = 'RL005',
            message = format('%s can''t be an outbox: %s', p_relation::regclass, case
                when v.column_name is null then format('it is not said which column is the %s', v.field)
                when v.attname is null then format('it has no column %I for %s', v.column_name, v.field)
                else format('column %I for %s is of type %s', v.column_name, v.field, v.type) end),
            hint = case
                when v.field = 'id' then format('alter table %s add column seq bigint generated always as identity unique, then id => ''seq''', p_relation::regclass)
                when v.types <> '{}' and v.attname is not null then format('It must be %s.', array_to_string(v.types::regtype[], ' or '))
                else format('%s => ''<column>'' names a column as it is stored, without quotes.', v.field) end;
    end if;
end
$$;
comment on function @schema@.relay_check_adopted_columns(oid, jsonb) is
    'Runs as its caller. RL005 where a column that an outbox needs is not said, not there, or of a type that can''t be read.';

create or replace function @schema@.relay_adopt(p_wanted @schema@.pgt_outbox_config, p_relation oid)
returns text
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    wanted @schema@.pgt_outbox_config;
    columns constant jsonb := p_wanted.adopted -> 'columns';
    deletes constant boolean := coalesce((p_wanted.adopted ->> 'delete_delivered')::boolean, false);
    place record;
    sequence_id oid;
    made oid[];
    role_name name;
    part record;
begin
    select c.relname, n.oid as schema_id, n.nspname, pg_get_userbyid(c.relowner) as owner, c.relowner,
        has_schema_privilege(c.relowner, n.oid, 'create') as may_create
    into place
    from pg_class as c
    join pg_namespace as n on n.oid = c.relnamespace
    where c.oid = p_relation;
    if not found then
        raise exception using
            errcode = 'RL001',
            message = 'there is no table of this name',
            detail = 'The name is read like any table name: unquoted capitals are folded, and search_path counts.',
            hint = 'name it with its schema';
    end if;
    wanted := @schema@.relay_outbox_plan(p_wanted, null);
    if wanted.retention_hours > 0 and (not deletes or columns ->> 'created_at' is null) then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'retention_hours says how long delivered rows are kept before they are deleted',
            hint = 'It needs delete_delivered => true, and a created_at column that tells their age.';
    end if;
    sequence_id := (
        select d.objid
        from pg_attribute as a
        join pg_depend as d
            on d.refclassid = 'pg_class'::regclass and d.refobjid = a.attrelid and d.refobjsubid = a.attnum
            and d.classid = 'pg_class'::regclass and d.deptype in ('a', 'i')
        join pg_class as s on s.oid = d.objid and s.relkind = 'S'
        where a.attrelid = p_relation and a.attname = columns ->> 'id'
        limit 1);
    perform @schema@.relay_refuse_adopted(wanted, r)
    from (
        select p_relation as relation, (columns ->> 'id')::name as id_column, sequence_id as sequence_id,
            null::oid as reader_id, null::oid as sweeper_id
    ) as r
    where columns ->> 'id' is not null;
    perform @schema@.relay_check_adopted_columns(p_relation, columns);
    if not place.may_create then
        raise exception using
            errcode = 'insufficient_privilege',
            message = format('%I may not create the function that reads the table in schema %I', place.owner, place.nspname),
            detail = 'It stands beside the table and belongs to the owner of the table.',
            hint = format('grant create on schema %I to %I', place.nspname, place.owner);
    end if;
    for part in
        select * from (values
            ('read', true, @schema@.relay_reader_source(wanted.pgt_id, p_relation, columns, sequence_id)),
            ('sweep', deletes, format(
                '(ids bigint[]) returns bigint language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as %L',
                @schema@.relay_sweeper_source(wanted.outbox_table_name)))
        ) as w (kind, is_wanted, source)
        where w.is_wanted
    loop
        made := made || @schema@.relay_make_beside(place.schema_id, place.relowner, format('pgtrickle_%s_%s', part.kind, place.relname),
            wanted.outbox_table_name, part.source);
    end loop;
    -- The last number drawn is read by the catalog, the functions are called by name.
    for role_name in
        select r.rolname from pg_roles as r
        where r.rolname = 'pgtrickle_relay'
            or r.oid = (select n.nspowner from pg_namespace as n where n.nspname = @schema_name@)
    loop
        if not has_schema_privilege(role_name, place.schema_id, 'usage') then
            if not (select pg_has_role(n.nspowner, 'usage') from pg_namespace as n where n.oid = place.schema_id) then
                raise exception using
                    errcode = 'insufficient_privilege',
                    message = format('%I may not use schema %I, in which the table stands', role_name, place.nspname),
                    hint = format('grant usage on schema %I to %I', place.nspname, role_name);
            end if;
            execute format('grant usage on schema %I to %I', place.nspname, role_name);
        end if;
        execute format('grant select on sequence %s to %I', sequence_id::regclass, role_name);
        execute format('grant execute on function %s to %I', made[1]::regprocedure, role_name);
    end loop;
    if deletes then
        execute format('grant execute on function %s to %I', made[2]::regprocedure, (
            select pg_get_userbyid(n.nspowner) from pg_namespace as n where n.nspname = @schema_name@));
    end if;

    execute format('comment on function %s is %L', made[1]::regprocedure,
        format('pgtrickle-relay: adopt %s in transaction %s', wanted.stream_table, pg_current_xact_id()));
    perform @schema@.relay_register_adopted(wanted, made[1], made[2]);
    execute format('comment on function %s is %L', made[1]::regprocedure,
        'Reads its table for pgtrickle-relay. Definer: so that nothing of the table runs with other rights than its owner''s.');
    if exists (
        select from @schema@.relay_adopted_rows(
            wanted.outbox_table_name, null, 1, array[(-9223372036854775808)::bigint], array[0::bigint]))
    then
        raise exception using
            errcode = 'RL005',
            message = format('%s has rows with ids below 1, which are not read', p_relation::regclass),
            hint = 'give them ids from the sequence, or delete them';
    end if;
    return wanted.outbox_table_name;
end
$$;
comment on function @schema@.relay_adopt(@schema@.pgt_outbox_config, oid) is
    'Part of relay_change_outbox: what it makes is ordinary DDL of the caller.';

create or replace function @schema@.relay_make_beside(
    p_schema_id oid, p_owner oid, p_name text, p_seed text, p_source text
) returns oid
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_schema name := (select n.nspname from pg_namespace as n where n.oid = p_schema_id);
    v_name text := @schema@.relay_free_name(v_schema, p_name, p_seed);
    v_id oid;
    v_others text;
begin
    execute format('create function %I.%I%s', v_schema, v_name, p_source);
    v_id := (select p.oid from pg_proc as p where p.pronamespace = p_schema_id and p.proname = v_name);
    execute format('alter function %s owner to %I', v_id::regprocedure, pg_get_userbyid(p_owner));
    -- Default privileges may have given it to others.
    select string_agg(distinct quote_ident(pg_get_userbyid(a.grantee)), ', ') into v_others
    from pg_proc as p
    cross join lateral aclexplode(p.proacl) as a
    where p.oid = v_id and a.grantee not in (0, p.proowner);
    execute format('revoke all on function %s from %s', v_id::regprocedure, concat_ws(', ', 'public', v_others));
    return v_id;
end
$$;
comment on function @schema@.relay_make_beside(oid, oid, text, text, text) is
    'Makes a function beside an adopted table under a free name, as ordinary DDL of the caller: it belongs to the table''s owner, who alone may execute it.';

create or replace function @schema@.adopt_outbox(
    name text, "table" text, id text, payload text, key text default null,
    dedup_key text default null, event_type text default null, subject text default null,
    headers text default null, created_at text default null,
    ids_drawn_by_insert boolean default false, delete_delivered boolean default false,
    retention_hours integer default 0
) returns text
language sql volatile security invoker as $$
    select @schema@.relay_change_outbox(
        'adopt', "table", @schema@.relay_relation("table"),
        pg_catalog.jsonb_populate_record(null::@schema@.pgt_outbox_config, pg_catalog.jsonb_build_object(
            'stream_table', name, 'retention_hours', retention_hours, 'capture', 'none', 'notify', false,
            'claim_check_rows', 0, 'claim_check_bytes', 0,
            'adopted', pg_catalog.jsonb_build_object(
                'ids_drawn_by_insert', coalesce(ids_drawn_by_insert, false),
                'delete_delivered', coalesce(delete_delivered, false),
                'columns', pg_catalog.jsonb_strip_nulls(pg_catalog.jsonb_build_object(
                    'id', id, 'payload', payload, 'key', key, 'dedup_key', dedup_key, 'event_type', event_type,
                    'subject', subject, 'headers', headers, 'created_at', created_at))))))
$$;
comment on function @schema@.adopt_outbox(text, text, text, text, text, text, text, text, text, text, boolean, boolean, integer) is
    'Makes a table that an application writes its events to an outbox of this name, read where it stands, and returns what it is called in the catalog. The table''s owner calls it and names its columns. Rows are deleted only with delete_delivered, once every pipeline and group is through with them. RL005 with the reason where reading could lose an event.';
