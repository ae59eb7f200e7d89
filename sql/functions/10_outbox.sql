-- Outboxes: finding them, reading them, waking their readers, publishing to them.
--
-- A caller's name is looked up once, and means what it means to the caller: by functions without a
-- search_path of their own. Everything behind them takes the name of the outbox table.

create or replace function @schema@.relay_relation(relation_name text) returns oid
language plpgsql stable security invoker as $$
begin
    return pg_catalog.to_regclass(relation_name);
exception
    when invalid_name or syntax_error or invalid_parameter_value or feature_not_supported
        or undefined_object or insufficient_privilege then
        -- A relay may name an outbox by a table whose schema is closed to it.
        return null;
end
$$;
comment on function @schema@.relay_relation(text) is
    'The relation that this text names to the caller; null if none, whatever the text.';

create or replace function @schema@.relay_bound_triggers(outbox_table text)
returns table (
    target oid, trigger_name name, trigger_type integer, function_id oid, argument text,
    is_owned boolean
)
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select
        t.tgrelid, t.tgname, t.tgtype::integer, t.tgfoid,
        convert_from(substring(t.tgargs from 1 for greatest(position(decode('00', 'hex') in t.tgargs) - 1, 0)), 'SQL_ASCII'),
        has_column_privilege(p.proowner, d.refobjid, 'payload', 'insert with grant option')
    from pg_depend as d
    join pg_trigger as t on t.oid = d.objid
    join pg_proc as p on p.oid = t.tgfoid
    where d.classid = 'pg_trigger'::regclass
        and d.refclassid = 'pg_class'::regclass
        and d.refobjid = to_regclass(format('%I.%I', @schema_name@, outbox_table))
        and t.tgrelid <> d.refobjid
$$;
comment on function @schema@.relay_bound_triggers(text) is
    'The triggers tied to an outbox. PostgreSQL itself keeps the link, through the condition of each trigger: it follows renames and a dump; the clones of a row trigger in partitions are not tied. Anybody may name an outbox in a trigger: it is owned where its function belongs to who may grant inserting into the outbox.';

create or replace function @schema@.relay_captured_table(outbox_table text) returns oid
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    -- Only the stream table itself has a truncate trigger, never one of its partitions.
    select t.target
    from @schema@.relay_bound_triggers(outbox_table) as t
    where t.is_owned and t.trigger_type & 32 <> 0
    limit 1
$$;
comment on function @schema@.relay_captured_table(text) is
    'The table that an outbox captures now, whatever it is called; null where there is none.';

create or replace function @schema@.relay_find_outbox(
    outbox text, relation oid, is_required boolean default false
) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
    words text[];
    found_names text[];
begin
    begin
        words := parse_ident(outbox);
    exception
        when invalid_parameter_value then
            words := array[outbox];
    end;
    select array_agg(f.name order by f.name)
    into found_names
    from (
        select
            c.outbox_table_name as name,
            case
                when n.nspname = @schema_name@ and t.relname = c.outbox_table_name
                    or c.adopted is not null and (@schema@.relay_adopted(c.outbox_table_name)).relation = relation
                    or c.outbox_table_name in (
                        select o.relname
                        from pg_trigger as g
                        join pg_depend as d on d.classid = 'pg_trigger'::regclass and d.objid = g.oid
                        join pg_class as o on o.oid = d.refobjid and d.refclassid = 'pg_class'::regclass
                        join pg_proc as p on p.oid = g.tgfoid
                        where g.tgrelid = relation
                            and g.tgtype & 32 <> 0
                            and o.oid <> relation
                            and o.relnamespace = (select s.oid from pg_namespace as s where s.nspname = @schema_name@)
                            and has_column_privilege(p.proowner, o.oid, 'payload', 'insert with grant option'))
                    then 1
                when c.stream_schema = n.nspname
                    and c.stream_table = t.relname
                    and @schema@.relay_captured_table(c.outbox_table_name) is null
                    then 2
                when c.outbox_table_name in (outbox, words[cardinality(words)])
                    and (cardinality(words) = 1 or words[1] = @schema_name@)
                    then 3
                when c.stream_schema is null and c.adopted is null and c.stream_table = outbox then 4
                -- Its table is gone, or closed to the caller.
                when relation is null
                    and c.stream_table = words[cardinality(words)]
                    and c.stream_schema = coalesce(words[cardinality(words) - 1], c.stream_schema)
                    then 5
                -- Last: whoever owns a table chooses such a name, and must not take it from others.
                when c.adopted is not null and c.stream_table = outbox then 6
            end as place
        from @schema@.pgt_outbox_config as c
        left join pg_class as t on t.oid = relation
        left join pg_namespace as n on n.oid = t.relnamespace
    ) as f
    where f.place is not null
    group by f.place
    order by f.place
    limit 1;
    if cardinality(found_names) > 1 then
        raise exception using
            errcode = 'RL003',
            message = format('%s names more than one outbox: %s', quote_literal(outbox), array_to_string(found_names, ', ')),
            hint = 'name the table with its schema, or the outbox table';
    end if;
    if is_required and found_names is null then
        raise exception using
            errcode = 'RL003',
            message = format('there is no outbox for %s', quote_nullable(outbox)),
            hint = format('select %I.enable_outbox(%s)', @schema_name@, quote_nullable(outbox));
    end if;
    return found_names[1];
end
$$;
comment on function @schema@.relay_find_outbox(text, oid, boolean) is
    'The outbox table of a stream table or outbox named so; null, or RL003 where it is required, if there is none. Definer: who asks may not read the catalog.';

create or replace function @schema@.relay_outbox_named(outbox text) returns text
language sql stable security invoker as $$
    select @schema@.relay_find_outbox(outbox, @schema@.relay_relation(outbox), true)
$$;
comment on function @schema@.relay_outbox_named(text) is
    'The outbox table of a stream table or outbox that this text names to the caller; RL003 if there is none.';

create or replace function @schema@.relay_settings(outbox_table text)
returns @schema@.pgt_outbox_config
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select c from @schema@.pgt_outbox_config as c where c.outbox_table_name = outbox_table
$$;
comment on function @schema@.relay_settings(text) is
    'The settings of an outbox; null if there is none. Definer: who asks may not read the catalog; it shows no event.';

create or replace function @schema@.relay_outbox_of(outbox_table text)
returns table (
    outbox_relation text, outbox_oid oid, stream_table text, delta_relation text,
    key_columns text[], pgt_id uuid, retention_hours integer, sequence_cache bigint, last_id bigint,
    max_id bigint, swept_through bigint, is_adopted boolean
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    sequence_id oid;
    settings @schema@.pgt_outbox_config;
    adopted record;
begin
    outbox_relation := format('%I.%I', @schema_name@, relay_outbox_of.outbox_table);
    outbox_oid := to_regclass(outbox_relation);
    select c.* into settings
    from @schema@.pgt_outbox_config as c
    where c.outbox_table_name = relay_outbox_of.outbox_table;
    if not found or outbox_oid is null then
        raise exception using
            errcode = 'RL003',
            message = format(
                case when found then 'the table of outbox %s was dropped by hand' else 'there is no outbox %s' end,
                quote_nullable(relay_outbox_of.outbox_table)),
            hint = format(
                case when settings.adopted is null then 'select %I.enable_outbox(%s)'
                    else 'select %I.disable_outbox(%s), and adopt its table again' end,
                @schema_name@, coalesce(quote_literal(settings.stream_table), '<stream table>'));
    end if;
    stream_table := settings.stream_table;
    delta_relation := format('%I.%I', @schema_name@, settings.delta_table_name);
    key_columns := settings.key_columns;
    pgt_id := settings.pgt_id;
    retention_hours := settings.retention_hours;
    swept_through := settings.swept_through;
    is_adopted := settings.adopted is not null;
    if is_adopted then
        adopted := @schema@.relay_adopted(settings.outbox_table_name);
        perform @schema@.relay_refuse_adopted(settings, adopted);
        outbox_oid := adopted.relation;
        sequence_id := adopted.sequence_id;
        outbox_relation := format('%I.relay_adopted_rows(%L)', @schema_name@, settings.outbox_table_name);
    else
        sequence_id := pg_get_serial_sequence(outbox_relation, 'id')::regclass;
    end if;
    select q.seqcache, coalesce(pg_sequence_last_value(q.seqrelid), q.seqstart - 1)
    into sequence_cache, last_id
    from pg_sequence as q
    where q.seqrelid = sequence_id;
    execute format('select coalesce(max(o.id), 0) from %s as o',
        @schema@.relay_rows(outbox_relation, 'above => null, newest => true'))
    into max_id;
    return next;
end
$$;
comment on function @schema@.relay_outbox_of(text) is
    'What a reader of an outbox must know; relations are quoted for use in SQL text, that of an adopted outbox is a call of relay_adopted_rows, and its oid that of the table. last_id is the highest id ever drawn, max_id the highest visible one. RL003 if there is none, RL005 where an adopted one can''t be read. Definer: readers may not see the catalog.';

create or replace function @schema@.relay_note_drained(outbox_table text) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    update @schema@.pgt_outbox_config as c
    set last_drained_at = now()
    where c.outbox_table_name = outbox_table
$$;
comment on function @schema@.relay_note_drained(text) is
    'Notes when an outbox was last read to the end of a claim check. Definer: readers may not write the catalog.';

create or replace function @schema@.outbox_rows_consumed(stream_table text, outbox_id bigint)
returns void
language sql volatile security invoker as $$
    select @schema@.relay_note_drained(@schema@.relay_outbox_named(stream_table))
$$;
comment on function @schema@.outbox_rows_consumed(text, bigint) is
    'A reader is through with the rows of a claim check. They stay, since other pipelines may still need them, until retention sweeps them with their outbox row.';

create or replace function @schema@.relay_status(outbox_table text) returns jsonb
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    counts jsonb;
begin
    -- The caller's own right to read the outbox is the check.
    execute format(
        $query$
            select jsonb_build_object(
                'row_count', count(*),
                'claim_check_count', count(*) filter (where o.is_claim_check),
                'oldest_row', min(o.created_at),
                'newest_row', max(o.created_at)
            )
            from %I.%I as o
        $query$,
        @schema_name@, outbox_table
    ) into counts;
    return counts
        || jsonb_build_object(
            'enabled', true,
            'outbox_table', outbox_table,
            'captured_table', @schema@.relay_captured_table(outbox_table)::regclass)
        || to_jsonb(@schema@.relay_settings(outbox_table))
        - '{outbox_table_name, delta_table_name, sleep_sequence_name, pgt_id, capture_schema, capture_function, snapshot_through, had_rows}'::text[];
end
$$;
comment on function @schema@.relay_status(text) is
    'Part of outbox_status: settings and counts, with the caller''s own rights.';

create or replace function @schema@.outbox_status(stream_table text) returns jsonb
language sql stable security invoker as $$
    select @schema@.relay_status(@schema@.relay_outbox_named(stream_table))
$$;
comment on function @schema@.outbox_status(text) is
    'State of an outbox as JSON, for relays and the owner of the table; counts its rows, so it reads the whole outbox.';

-- ---------------------------------------------------------------------------
-- Waking
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_sleep(
    outbox_table text, sleeper text, seconds integer default null
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    -- One after the other, so that each sees all sleepers: what it sets is not undone by another.
    perform pg_advisory_xact_lock(hashtextextended(@schema_name@ || ':sleep ' || outbox_table, 0));
    delete from @schema@.relay_sleepers as s
    where s.outbox_table = relay_sleep.outbox_table
        and (
            s.sleeper = relay_sleep.sleeper
            -- Left by a relay that was killed.
            or s.sleeps_until < clock_timestamp() - interval '1 hour'
        );
    if seconds is not null then
        insert into @schema@.relay_sleepers (outbox_table, sleeper, sleeps_until)
        values (outbox_table, sleeper, clock_timestamp() + make_interval(secs => seconds));
    end if;
    perform setval(
        to_regclass(format('%I.%I', @schema_name@, c.sleep_sequence_name)),
        coalesce(
            (
                select greatest(1, ceil(date_part('epoch', max(s.sleeps_until))))::bigint
                from @schema@.relay_sleepers as s
                where s.outbox_table = relay_sleep.outbox_table
            ),
            1
        )
    )
    from @schema@.pgt_outbox_config as c
    where c.outbox_table_name = outbox_table;
end
$$;
comment on function @schema@.relay_sleep(text, text, integer) is
    'Says that a relay sleeps on an outbox for so long, so that publishers notify meanwhile; null: it is awake. Definer: the flags are no business of others.';

create or replace function @schema@.relay_wake(channel text, outbox_table text) returns uuid
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
begin
    perform pg_notify(channel, outbox_table);
    return gen_random_uuid();
end
$$;
comment on function @schema@.relay_wake(text, text) is
    'Wakes relays that sleep on an outbox, once the transaction commits. Called by the default of a column, which costs a third of a trigger, and returns a value for it.';

create or replace function @schema@.relay_channel(base text) returns text
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    select base || case @schema_name@ when 'pgtrickle' then '' else '_' || left(md5(@schema_name@), 8) end
$$;
comment on function @schema@.relay_channel(text) is
    'Name of a notification channel: in another schema than the default one with a digest of its name.';

-- ---------------------------------------------------------------------------
-- Publishing
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_publish(
    outbox_table text, inserted jsonb, deleted jsonb, headers jsonb
) returns bigint
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    settings constant @schema@.pgt_outbox_config := @schema@.relay_settings(outbox_table);
    inserted_rows bigint;
    deleted_rows bigint;
    is_claim_check boolean;
    published_id bigint;
begin
    if settings.adopted is not null then
        raise exception using
            errcode = 'RL005',
            message = format('outbox %s is a table of its application', settings.stream_table),
            hint = 'insert into that table';
    end if;
    if jsonb_typeof(inserted) is distinct from 'array' or jsonb_typeof(deleted) is distinct from 'array' then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'inserted and deleted must be JSON arrays of rows',
            hint = format($hint$select %I.outbox_publish('orders', '[{"id": 1}]')$hint$, @schema_name@);
    end if;
    if jsonb_typeof(headers) is distinct from 'object' then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'headers must be a JSON object',
            hint = $hint$headers => '{"traceparent": "..."}'$hint$;
    end if;
    inserted_rows := jsonb_array_length(inserted);
    deleted_rows := jsonb_array_length(deleted);
    if inserted_rows + deleted_rows = 0 then
        return null;
    end if;
    is_claim_check := inserted_rows + deleted_rows > settings.claim_check_rows
        or pg_column_size(inserted) + pg_column_size(deleted) > settings.claim_check_bytes;
    execute format(
        $insert$
            insert into %I.%I (inserted_count, deleted_count, is_claim_check, payload, headers)
            values ($1, $2, $3, $4, $5)
            returning id
        $insert$,
        @schema_name@, outbox_table
    )
    into published_id
    using
        inserted_rows, deleted_rows, is_claim_check,
        case
            when is_claim_check then jsonb_build_object('v', 1, 'claim_check', true,
                'inserted_count', inserted_rows, 'deleted_count', deleted_rows)
            else jsonb_build_object('v', 1, 'inserted', inserted, 'deleted', deleted)
        end,
        headers;
    if is_claim_check then
        execute format(
            $insert$
                insert into %I.%I (outbox_id, row_num, row_op, row_data)
                select $1, i.ordinality - 1, 'INSERT', i.value
                from jsonb_array_elements($2) with ordinality as i
                union all
                select $1, $4 + d.ordinality - 1, 'DELETE', d.value
                from jsonb_array_elements($3) with ordinality as d
            $insert$,
            @schema_name@, settings.delta_table_name
        ) using published_id, inserted, deleted, inserted_rows;
    end if;
    return published_id;
end
$$;
comment on function @schema@.relay_publish(text, jsonb, jsonb, jsonb) is
    'Writes one row to an outbox with the caller''s own rights, see outbox_publish.';

create or replace function @schema@.outbox_publish(
    stream_table text, inserted jsonb, deleted jsonb default '[]', headers jsonb default '{}'
) returns bigint
language sql volatile security invoker as $$
    select @schema@.relay_publish(@schema@.relay_outbox_named(stream_table), inserted, deleted, headers)
$$;
comment on function @schema@.outbox_publish(text, jsonb, jsonb, jsonb) is
    'Publishes rows in the current transaction and returns the outbox id; null when both arrays are empty. Headers travel to the broker. The right to insert into the outbox table is the check.';

