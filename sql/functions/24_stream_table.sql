-- Stream tables of the extension pg_trickle: ordinary tables, captured like any other.
--
-- While one is refreshed in full no trigger fires. The extension's history of refreshes tells that
-- it happened; then the relay has a snapshot of the table written into its outbox, by a function
-- that stands beside the table and belongs to the table's owner.

create or replace function @schema@.relay_extension_table(table_name text) returns oid
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select c.oid
    from pg_extension as e
    join pg_depend as d on d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid and d.deptype = 'e'
    join pg_class as c on d.classid = 'pg_class'::regclass and c.oid = d.objid
    where e.extname = 'pg_trickle'
        and c.relname = table_name
        and c.relkind = 'r'
        -- Reading it must run nothing of others.
        and not c.relrowsecurity
        and not exists (select from pg_attribute as a where a.attrelid = c.oid and a.atttypid >= 16384)
$$;
comment on function @schema@.relay_extension_table(text) is
    'A table of the catalog of pg_trickle, whatever its schema; null where there is none.';

create or replace function @schema@.relay_missing_grant(reader regrole, table_names text[])
returns text
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select format('grant usage on schema %1$s to %2$s; grant select on %3$s to %2$s',
        min(c.relnamespace::regnamespace::text), reader, string_agg(c.oid::regclass::text, ', ' order by c.relname))
    from unnest(table_names) as t (name)
    join pg_class as c on c.oid = @schema@.relay_extension_table(t.name)
    where not has_schema_privilege(reader, c.relnamespace, 'usage')
        or not has_table_privilege(reader, c.oid, 'select')
    having count(*) > 0
$$;
comment on function @schema@.relay_missing_grant(regrole, text[]) is
    'What a role lacks to read these tables of pg_trickle, as SQL; null: nothing.';

create or replace function @schema@.relay_check_event_triggers() returns void
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    remedy text;
begin
    select string_agg(@schema@.relay_missing_grant(r.name, array['pgt_stream_tables', 'pgt_dependencies']), '; ')
    into remedy
    from (
        select quote_ident(current_user)::regrole as name
        union
        select n.nspowner::regrole from pg_namespace as n where n.nspname = @schema_name@
    ) as r
    where exists (
        select
        from pg_event_trigger as t
        join pg_depend as d on d.classid = 'pg_proc'::regclass and d.objid = t.evtfoid and d.deptype = 'e'
        join pg_extension as e on d.refclassid = 'pg_extension'::regclass and e.oid = d.refobjid
        where e.extname = 'pg_trickle' and t.evtenabled <> 'D'
    );
    if remedy is not null then
        raise exception using
            errcode = 'insufficient_privilege',
            message = 'the event triggers of pg_trickle would refuse this: they read its catalog as whoever changes a table or function',
            hint = remedy;
    end if;
end
$$;
comment on function @schema@.relay_check_event_triggers() is
    'Says which grant is missing before the event triggers of pg_trickle fail without a word about it.';

create or replace function @schema@.relay_refreshes(relation oid)
returns table (
    is_stream boolean, refresh_mode text, newest bigint, last_id bigint, has_triggers boolean,
    missing_grant text
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
    streams regclass := @schema@.relay_extension_table('pgt_stream_tables');
    history regclass := @schema@.relay_extension_table('pgt_refresh_history');
begin
    is_stream := false;
    has_triggers := coalesce(current_setting('pg_trickle.user_triggers', true), '') <> 'off';
    if streams is null or history is null then
        return next;
        return;
    end if;
    select
        nullif(concat_ws('; ',
            @schema@.relay_missing_grant(
                quote_ident(current_user)::regrole, array['pgt_stream_tables', 'pgt_refresh_history']),
            case when not has_schema_privilege(to_regrole('pgtrickle_relay'), c.relnamespace, 'usage')
                then format('grant usage on schema %s to pgtrickle_relay', c.relnamespace::regnamespace) end
        ), ''),
        exists (
            select from pg_attribute as a
            where a.attrelid = relation and a.attname = '__pgt_row_id' and not a.attisdropped
        )
    into missing_grant, is_stream
    from pg_class as c
    where c.oid = relation;
    if missing_grant is not null then
        if has_table_privilege(streams, 'select') then
            execute format('select s.refresh_mode from %s as s where s.pgt_relid = $1', streams)
            into refresh_mode using relation;
        end if;
        return next;
        return;
    end if;
    execute format(
        $query$
            select true, s.refresh_mode, (
                select h.refresh_id
                from %1$s as h
                where h.pgt_id = s.pgt_id
                    and h.status = 'COMPLETED'
                    and h.action not in ('NO_DATA', 'SKIP')
                    -- What triggers see is told already.
                    and (not $2 or h.action not in ('DIFFERENTIAL', 'INCREMENTAL')
                        or to_jsonb(h) ->> 'was_full_fallback' = 'true')
                order by h.refresh_id desc
                limit 1
            ), (select max(h.refresh_id) from %1$s as h)
            from %2$s as s
            where s.pgt_relid = $1
        $query$,
        history, streams
    ) into is_stream, refresh_mode, newest, last_id using relation, has_triggers;
    is_stream := coalesce(is_stream, false);
    return next;
end
$$;
comment on function @schema@.relay_refreshes(oid) is
    'Whether a table is a stream table, its newest refresh that no trigger saw, and the last one of all. missing_grant: what keeps us from reading that, or the relay from writing a snapshot. Definer: reads the catalog of pg_trickle, whose owner it trusts.';

create or replace function @schema@.relay_snapshot_source(
    settings @schema@.pgt_outbox_config, relation oid
) returns text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select format(
        $source$
-- pgtrickle-relay snapshot, layout 1
declare
    relation constant regclass := %1$I.relay_captured_table(%2$L);
    row_count bigint;
    snapshot_id bigint;
begin
    perform set_config('lock_timeout', '500ms', true), set_config('row_security', 'off', true);
    -- Whoever has written it has committed: their ids are below, later ones above.
    execute format('lock table %%s in share mode', relation);
    execute format('select count(*) from %%s', relation) into row_count;
    insert into %1$I.%2$I (inserted_count, is_claim_check, payload, key_columns)
    values (
        row_count, row_count > 0,
        case
            when row_count = 0 then '{"v": 1, "full_refresh": true, "inserted": [], "deleted": []}'
            else jsonb_build_object('v', 1, 'full_refresh', true, 'claim_check', true,
                'inserted_count', row_count, 'deleted_count', 0)
        end,
        (
            select %1$I.relay_primary_key(relation)
            from unnest(%4$L::text[]) as k (name)
            where not exists (select from pg_attribute as a where a.attrelid = relation and a.attname = k.name)
            limit 1
        )
    )
    returning id into snapshot_id;
    for attempt in 1..2 loop
        begin
            execute format(
                'insert into %%I.%%I (outbox_id, row_num, row_op, row_data)'
                ' select %%s, row_number() over () - 1, ''INSERT'', %%s from %%s as r',
                %5$L, %3$L, snapshot_id, %1$I.relay_row_expression(relation, attempt = 2), relation
            );
            exit;
        exception
            when others then
                -- Some value can't be told: each by itself.
                if attempt = 2 then
                    raise;
                end if;
        end;
    end loop;
    -- Nothing of the owner's is left to the commit, which the relay makes with its own rights.
    set constraints all immediate;
    return snapshot_id;
end
$source$,
        @schema_name@, settings.outbox_table_name, settings.delta_table_name, coalesce(settings.key_columns, '{}'), @schema_name@
    )
    from @schema@.relay_refreshes(relation) as r
    where r.is_stream
$$;
comment on function @schema@.relay_snapshot_source(@schema@.pgt_outbox_config, oid) is
    'Source of the snapshot function of a stream table with these settings; null for any other table. Definer: who enables an outbox may not read the extension''s catalog; it says whether the table is in it.';

create or replace function @schema@.relay_source(
    settings @schema@.pgt_outbox_config, relation oid, kind text
) returns text
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
begin
    return case kind
        when 'capture' then @schema@.relay_capture_source(settings, relation)
        when 'snapshot' then @schema@.relay_snapshot_source(settings, relation)
        when 'backfill' then @schema@.relay_backfill_source(settings)
    end;
end
$$;
comment on function @schema@.relay_source(@schema@.pgt_outbox_config, oid, text) is
    'Source of the capture, snapshot or backfill function of a table with these settings; null where it has none of the kind.';

create or replace function @schema@.relay_due_snapshots(to_write text default null)
returns table (outbox_table text, refresh_id bigint, function text, version text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    if @schema@.relay_extension_table('pgt_refresh_history') is null
        or not pg_try_advisory_xact_lock(hashtextextended(@schema_name@ || ':snapshot ' || to_write, 0))
    then
        return;
    end if;
    return query
    with due as materialized (
        select c as settings, s.id as relation, r.newest
        from (
            -- Most outboxes are of other tables, which cost nothing here.
            select distinct a.attrelid as id
            from pg_trigger as t
            join pg_attribute as a on a.attrelid = t.tgrelid
            where t.tgtype & 32 <> 0
                and starts_with(t.tgname, '!pgtrickle_')
                and a.attname = '__pgt_row_id'
                and not a.attisdropped
        ) as s
        join @schema@.pgt_outbox_config as c on c.outbox_table_name = @schema@.relay_find_outbox(null, s.id)
        cross join lateral @schema@.relay_refreshes(s.id) as r
        where c.outbox_table_name = coalesce(to_write, c.outbox_table_name)
            -- The ids of an extension that was dropped and made again begin at 1.
            and (r.newest > c.snapshot_through or r.newest is not null and r.last_id < c.snapshot_through)
    )
    select (d.settings).outbox_table_name, d.newest, p.oid::regproc::text, concat_ws(' ', p.oid, p.xmin, p.ctid)
    from due as d
    join pg_proc as p on p.oid = @schema@.relay_function_of((d.settings).outbox_table_name, 'snapshot')
    where @schema@.relay_function_problem(p.oid, d.relation, d.settings, 'snapshot') is null;
end
$$;
comment on function @schema@.relay_due_snapshots(text) is
    'The outboxes whose stream table was refreshed in full since the last look, each with the function that writes the snapshot. Of one that is to be written, nothing where another relay writes it. Definer: the relay may see neither the catalog nor that of pg_trickle.';

create or replace function @schema@.relay_snapshot_is_intact(outbox_table text, version text)
returns boolean
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
begin
    if not exists (
        select
        from pg_proc as p
        where p.oid = @schema@.relay_function_of(outbox_table, 'snapshot')
            and concat_ws(' ', p.oid, p.xmin, p.ctid) = version
            and @schema@.relay_function_problem(
                p.oid, @schema@.relay_captured_table(outbox_table), @schema@.relay_settings(outbox_table), 'snapshot') is null
    ) then
        raise exception using
            errcode = 'RL034',
            message = format('the snapshot function of outbox %I was changed since the relay looked at it', outbox_table);
    end if;
    return true;
end
$$;
comment on function @schema@.relay_snapshot_is_intact(text, text) is
    'Before and behind a call of a snapshot function, which its owner can change at any time: RL034 unless it is the one that was looked at.';

create or replace function @schema@.relay_end_snapshot(outbox_table text, refresh_id bigint)
returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    update @schema@.pgt_outbox_config as c
    set snapshot_through = refresh_id
    where c.outbox_table_name = outbox_table
$$;
comment on function @schema@.relay_end_snapshot(text, bigint) is
    'Notes, in the transaction that writes a snapshot, which refresh it tells. Definer: the relay may not write the catalog.';
