-- Finding, reading, waking, publishing to and sweeping outboxes.

create or replace function pgtrickle.relay_role_in_force()
returns name
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select case current_setting('role')
        when 'none' then session_user
        else current_setting('role')::name
    end
$$;

comment on function pgtrickle.relay_role_in_force() is
    'The role whose rights count: that of set role, else the login; also inside a definer function.';

revoke all on function pgtrickle.relay_role_in_force() from public;

create or replace function pgtrickle.relay_require_table_owner(relation oid)
returns void
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    owner_role oid := (select c.relowner from pg_class as c where c.oid = relation);
begin
    if not pg_has_role(pgtrickle.relay_role_in_force(), owner_role, 'usage') then
        raise exception using
            errcode = 'RL004',
            message = format(
                'role %I does not own table %s', pgtrickle.relay_role_in_force(), relation::regclass
            ),
            detail = format('It belongs to %I.', pg_get_userbyid(owner_role)),
            hint = format('set role %I, or let a member of it do this', pg_get_userbyid(owner_role));
    end if;
end
$$;

comment on function pgtrickle.relay_require_table_owner(oid) is
    'Raises RL004 unless the role in force owns the table, itself or by membership.';

revoke all on function pgtrickle.relay_require_table_owner(oid) from public;

-- No search_path of its own: the name means what it means to the caller.
create or replace function pgtrickle.relay_find_relation(relation_name text)
returns oid
language plpgsql
stable
security invoker
as $$
begin
    return pg_catalog.to_regclass(relation_name);
exception
    when invalid_name or syntax_error or invalid_parameter_value or feature_not_supported
        or undefined_object or insufficient_privilege then
        -- A relay may name an outbox by a table whose schema is closed to it.
        return null;
end
$$;

comment on function pgtrickle.relay_find_relation(text) is
    'The relation that this text names under the caller''s search_path; null if none, whatever the text.';

revoke all on function pgtrickle.relay_find_relation(text) from public;

create or replace function pgtrickle.relay_find_outbox(outbox text, relation oid)
returns text
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    found_names text[];
begin
    select array_agg(c.outbox_table_name order by c.outbox_table_name)
    into found_names
    from pgtrickle.pgt_outbox_config as c
    where c.stream_table_oid::oid = relation
        or to_regclass(format('pgtrickle.%I', c.outbox_table_name)) = relation;
    if found_names is null then
        select array_agg(c.outbox_table_name)
        into found_names
        from pgtrickle.pgt_outbox_config as c
        where c.outbox_table_name = outbox;
    end if;
    if found_names is null then
        select array_agg(c.outbox_table_name order by c.outbox_table_name)
        into found_names
        from pgtrickle.pgt_outbox_config as c
        left join pgtrickle.relay_outbox_settings as s using (outbox_table_name)
        where outbox in (
            c.stream_table_name,
            s.stream_schema || '.' || c.stream_table_name,
            quote_ident(s.stream_schema) || '.' || quote_ident(c.stream_table_name)
        );
    end if;
    if cardinality(found_names) > 1 then
        raise exception using
            errcode = 'RL003',
            message = format('%s names more than one outbox', quote_literal(outbox)),
            detail = format('It could be %s.', array_to_string(found_names, ', ')),
            hint = 'name the table with its schema, or the outbox table';
    end if;
    return found_names[1];
end
$$;

comment on function pgtrickle.relay_find_outbox(text, oid) is
    'The outbox table of a stream table or outbox named so; null if there is none. Definer: who asks may not read the catalog.';

revoke all on function pgtrickle.relay_find_outbox(text, oid) from public;

create or replace function pgtrickle.relay_require_outbox(outbox text, relation oid)
returns text
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    outbox_table text := pgtrickle.relay_find_outbox(outbox, relation);
begin
    if outbox_table is null then
        raise exception using
            errcode = 'RL003',
            message = format('there is no outbox for %s', coalesce(quote_literal(outbox), 'null')),
            hint = format('select pgtrickle.enable_outbox(%s)', quote_nullable(outbox));
    end if;
    return outbox_table;
end
$$;

comment on function pgtrickle.relay_require_outbox(text, oid) is
    'The outbox table of a stream table or outbox named so; RL003 if there is none.';

revoke all on function pgtrickle.relay_require_outbox(text, oid) from public;

create or replace function pgtrickle.relay_outbox_sequence(outbox_relation oid)
returns oid
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select s.oid
    from pg_attribute as a
    left join pg_attrdef as f on f.adrelid = a.attrelid and f.adnum = a.attnum
    join pg_depend as d
        on (d.refclassid = 'pg_class'::regclass and d.refobjid = a.attrelid and d.refobjsubid = a.attnum)
        or (d.classid = 'pg_attrdef'::regclass and d.objid = f.oid)
    join pg_class as s
        on s.relkind = 'S'
        and (
            (d.classid = 'pg_class'::regclass and s.oid = d.objid)
            or (d.refclassid = 'pg_class'::regclass and s.oid = d.refobjid)
        )
    where a.attrelid = outbox_relation
        and a.attname = 'id'
    limit 1
$$;

comment on function pgtrickle.relay_outbox_sequence(oid) is
    'The sequence that the id of an outbox is drawn from: identity, serial or a plain default.';

revoke all on function pgtrickle.relay_outbox_sequence(oid) from public;

create or replace function pgtrickle.relay_outbox_of(outbox text, relation oid)
returns table (
    outbox_table text,
    outbox_relation text,
    outbox_oid oid,
    stream_table text,
    delta_relation text,
    delta_style text,
    key_columns text[],
    has_headers boolean,
    retention_hours integer,
    sequence_cache bigint,
    last_id bigint,
    max_id bigint,
    swept_through bigint
)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    delta_oid oid;
    sequence_oid oid;
begin
    outbox_table := pgtrickle.relay_require_outbox(outbox, relation);
    outbox_relation := format('pgtrickle.%I', outbox_table);
    outbox_oid := to_regclass(outbox_relation);
    if outbox_oid is null then
        raise exception using
            errcode = 'RL003',
            message = format('the outbox table %s is gone', outbox_relation),
            detail = 'pgt_outbox_config still names it: it was dropped by hand.',
            hint = format('select pgtrickle.disable_outbox(%L)', outbox);
    end if;

    select
        c.stream_table_name,
        c.retention_hours,
        s.key_columns,
        coalesce(s.swept_through, 0),
        to_regclass(format(
            'pgtrickle.%I',
            coalesce(s.delta_table_name, 'outbox_delta_rows_' || c.stream_table_name)
        ))
    into stream_table, retention_hours, key_columns, swept_through, delta_oid
    from pgtrickle.pgt_outbox_config as c
    left join pgtrickle.relay_outbox_settings as s using (outbox_table_name)
    where c.outbox_table_name = outbox_table;

    select
        max(case a.attname when 'row_op' then 'row_op' when 'op' then 'op' end)
            filter (where a.attrelid = delta_oid),
        coalesce(bool_or(a.attname = 'headers') filter (where a.attrelid = outbox_oid), false)
    into delta_style, has_headers
    from pg_attribute as a
    where a.attrelid in (outbox_oid, delta_oid)
        and a.attnum > 0
        and not a.attisdropped;
    delta_relation := (
        select format('pgtrickle.%I', d.relname) from pg_class as d where d.oid = delta_oid
    );

    sequence_oid := pgtrickle.relay_outbox_sequence(outbox_oid);
    select q.seqcache, coalesce(pg_sequence_last_value(q.seqrelid), q.seqstart - 1)
    into sequence_cache, last_id
    from pg_sequence as q
    where q.seqrelid = sequence_oid;

    execute format('select coalesce(max(id), 0) from %s', outbox_relation) into max_id;
    return next;
end
$$;

comment on function pgtrickle.relay_outbox_of(text, oid) is
    'What a reader of an outbox must know, see relay_outbox. Definer: readers may not see the catalog.';

revoke all on function pgtrickle.relay_outbox_of(text, oid) from public;

create or replace function pgtrickle.relay_outbox(outbox text)
returns table (
    outbox_table text,
    outbox_relation text,
    outbox_oid oid,
    stream_table text,
    delta_relation text,
    delta_style text,
    key_columns text[],
    has_headers boolean,
    retention_hours integer,
    sequence_cache bigint,
    last_id bigint,
    max_id bigint,
    swept_through bigint
)
language sql
stable
security invoker
as $$
    select * from pgtrickle.relay_outbox_of(outbox, pgtrickle.relay_find_relation(outbox))
$$;

comment on function pgtrickle.relay_outbox(text) is
    'One row on an outbox, named by its stream table or itself; relations are quoted for use in SQL text. last_id is the highest id ever drawn, max_id the highest visible one. RL003 if there is none.';

revoke all on function pgtrickle.relay_outbox(text) from public;

create or replace function pgtrickle.outbox_rows_consumed_of(outbox_table text)
returns void
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
    update pgtrickle.pgt_outbox_config as c
    set last_drained_at = now()
    where c.outbox_table_name = outbox_table
$$;

comment on function pgtrickle.outbox_rows_consumed_of(text) is
    'Notes when an outbox was last read to the end of a claim check. Definer: readers may not write the catalog.';

revoke all on function pgtrickle.outbox_rows_consumed_of(text) from public;

do $only_if_ours$
begin
    if not pgtrickle.relay_may_define('outbox_rows_consumed') then
        return;
    end if;

    create or replace function pgtrickle.outbox_rows_consumed(stream_table text, outbox_id bigint)
    returns void
    language plpgsql
    volatile
    security invoker
    as $function$
    begin
        perform pgtrickle.outbox_rows_consumed_of(
            pgtrickle.relay_require_outbox(stream_table, pgtrickle.relay_find_relation(stream_table))
        );
    end
    $function$;

    comment on function pgtrickle.outbox_rows_consumed(text, bigint) is
        'A reader is through with the rows of a claim check. They stay, since other pipelines may still need them, until retention sweeps them with their outbox row.';

    revoke all on function pgtrickle.outbox_rows_consumed(text, bigint) from public;
end
$only_if_ours$;

create or replace function pgtrickle.relay_outbox_report(outbox_table text)
returns jsonb
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    report jsonb;
    counts jsonb;
begin
    if not coalesce(
        pg_has_role(pgtrickle.relay_role_in_force(), to_regrole('pgtrickle_relay'), 'usage'), false
    ) then
        perform pgtrickle.relay_require_table_owner(c.stream_table_oid)
        from pgtrickle.pgt_outbox_config as c
        where c.outbox_table_name = outbox_table;
    end if;

    select to_jsonb(o) - 'outbox_oid'
        || jsonb_build_object(
            'enabled_at', c.enabled_at,
            'last_drained_at', c.last_drained_at,
            'last_drained_count', c.last_drained_count,
            'capture', coalesce(s.capture, false),
            'notify', coalesce(s.notify, false),
            'claim_check_rows', s.claim_check_rows,
            'claim_check_bytes', s.claim_check_bytes
        )
    into report
    from pgtrickle.relay_outbox_of(outbox_table, null) as o
    join pgtrickle.pgt_outbox_config as c on c.outbox_table_name = o.outbox_table
    left join pgtrickle.relay_outbox_settings as s on s.outbox_table_name = o.outbox_table;

    execute format(
        $query$
            select jsonb_build_object(
                'row_count', count(*),
                'claim_check_count', count(*) filter (where o.is_claim_check),
                'oldest_created_at', min(o.created_at),
                'newest_created_at', max(o.created_at)
            )
            from %s as o
        $query$,
        report ->> 'outbox_relation'
    ) into counts;
    return report || counts;
end
$$;

comment on function pgtrickle.relay_outbox_report(text) is
    'What outbox_status shows to relays and the owner of the table. Definer: neither may see the catalog.';

revoke all on function pgtrickle.relay_outbox_report(text) from public;

do $only_if_ours$
begin
    if not pgtrickle.relay_may_define('outbox_status') then
        return;
    end if;

    create or replace function pgtrickle.outbox_status(stream_table text)
    returns jsonb
    language plpgsql
    stable
    security invoker
    as $function$
    begin
        return pgtrickle.relay_outbox_report(
            pgtrickle.relay_require_outbox(stream_table, pgtrickle.relay_find_relation(stream_table))
        );
    end
    $function$;

    comment on function pgtrickle.outbox_status(text) is
        'State of an outbox as JSON; counts its rows, so it reads the whole outbox.';

    revoke all on function pgtrickle.outbox_status(text) from public;
end
$only_if_ours$;

create or replace function pgtrickle.relay_tell_sleep(outbox_table text)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    sleep_sequence regclass := (
        select to_regclass(format('pgtrickle.%I', s.sleep_sequence_name))
        from pgtrickle.relay_outbox_settings as s
        where s.outbox_table_name = relay_tell_sleep.outbox_table
    );
begin
    -- An outbox of the extension has no publishers that could notify.
    if sleep_sequence is not null then
        perform setval(
            sleep_sequence,
            coalesce(
                (
                    select greatest(1, ceil(date_part('epoch', max(s.sleeps_until))))::bigint
                    from pgtrickle.relay_sleepers as s
                    where s.outbox_table = relay_tell_sleep.outbox_table
                ),
                1
            )
        );
    end if;
end
$$;

comment on function pgtrickle.relay_tell_sleep(text) is
    'Part of relay_sleep and relay_wake: puts where publishers look until when the last relay sleeps.';

revoke all on function pgtrickle.relay_tell_sleep(text) from public;

create or replace function pgtrickle.relay_sleep(outbox_table text, sleeper text, seconds integer)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    -- One after the other, so that each sees all sleepers: what it tells is not undone by another.
    perform pg_advisory_xact_lock(hashtextextended('pgtrickle:sleep ' || outbox_table, 0));
    insert into pgtrickle.relay_sleepers as s (outbox_table, sleeper, sleeps_until)
    values (outbox_table, sleeper, clock_timestamp() + make_interval(secs => seconds))
    on conflict on constraint relay_sleepers_pkey do update
    set sleeps_until = excluded.sleeps_until;
    perform pgtrickle.relay_tell_sleep(outbox_table);
end
$$;

comment on function pgtrickle.relay_sleep(text, text, integer) is
    'Says that a relay sleeps on an outbox for so long: publishers notify meanwhile. Definer: the flags are no business of others.';

revoke all on function pgtrickle.relay_sleep(text, text, integer) from public;

create or replace function pgtrickle.relay_wake(outbox_table text, sleeper text)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pg_advisory_xact_lock(hashtextextended('pgtrickle:sleep ' || outbox_table, 0));
    delete from pgtrickle.relay_sleepers as s
    where s.outbox_table = relay_wake.outbox_table
        and (
            s.sleeper = relay_wake.sleeper
            -- Left by a relay that was killed.
            or s.sleeps_until < clock_timestamp() - interval '1 hour'
        );
    perform pgtrickle.relay_tell_sleep(outbox_table);
end
$$;

comment on function pgtrickle.relay_wake(text, text) is
    'Takes back relay_sleep. Definer: the flags are no business of others.';

revoke all on function pgtrickle.relay_wake(text, text) from public;

create or replace function pgtrickle.relay_notify_outbox()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Only while somebody sleeps: a notify in every commit serialises commits and
    -- forbids prepare transaction. Without a query, which would be most of what this costs.
    if pg_sequence_last_value(tg_argv[0]::regclass) > date_part('epoch', clock_timestamp()) then
        perform pg_notify('pgtrickle_outbox_new', tg_table_name);
    end if;
    return null;
end
$$;

comment on function pgtrickle.relay_notify_outbox() is
    'At commit, wakes relays that sleep on this outbox; its argument is the sequence that says so. Definer: it fires as whoever commits.';

revoke all on function pgtrickle.relay_notify_outbox() from public;

create or replace function pgtrickle.relay_publish(
    outbox_table text,
    inserted jsonb,
    deleted jsonb,
    headers jsonb
)
returns bigint
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    settings pgtrickle.relay_outbox_settings;
    inserted_rows bigint;
    deleted_rows bigint;
    refresh uuid := gen_random_uuid();
    is_claim_check boolean;
    published_id bigint;
begin
    if coalesce(jsonb_typeof(inserted), '') <> 'array' or coalesce(jsonb_typeof(deleted), '') <> 'array' then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'inserted and deleted must be JSON arrays of rows',
            hint = $hint$select pgtrickle.outbox_publish('orders', '[{"id": 1}]')$hint$;
    end if;
    if coalesce(jsonb_typeof(headers), '') <> 'object' then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'headers must be a JSON object',
            hint = $hint$headers => '{"traceparent": "..."}'$hint$;
    end if;
    select s.* into settings
    from pgtrickle.relay_outbox_settings as s
    where s.outbox_table_name = relay_publish.outbox_table;
    if not found then
        raise exception using
            errcode = 'RL005',
            message = format('outbox %I is the extension''s: only its refreshes write it', outbox_table),
            hint = 'publish from a database where the outbox is ours';
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
            insert into pgtrickle.%I (
                pgt_id, refresh_id, inserted_count, deleted_count, is_claim_check, payload, headers
            )
            values ($1, $2, $3, $4, $5, $6, $7)
            returning id
        $insert$,
        outbox_table
    )
    into published_id
    using
        settings.pgt_id, refresh, inserted_rows, deleted_rows, is_claim_check,
        case
            when is_claim_check then jsonb_build_object(
                'v', 1, 'claim_check', true, 'inserted_count', inserted_rows,
                'deleted_count', deleted_rows, 'refresh_id', refresh
            )
            else jsonb_build_object('v', 1, 'inserted', inserted, 'deleted', deleted)
        end,
        headers;

    if is_claim_check then
        execute format(
            $insert$
                insert into pgtrickle.%I (outbox_id, row_num, row_op, row_data)
                select $1, i.ordinality - 1, 'INSERT', i.value
                from jsonb_array_elements($2) with ordinality as i
                union all
                select $1, $4 + d.ordinality - 1, 'DELETE', d.value
                from jsonb_array_elements($3) with ordinality as d
            $insert$,
            settings.delta_table_name
        ) using published_id, inserted, deleted, inserted_rows;
    end if;
    return published_id;
end
$$;

comment on function pgtrickle.relay_publish(text, jsonb, jsonb, jsonb) is
    'Writes one row to an outbox, see outbox_publish. Definer: publishers have no rights on the outbox tables.';

revoke all on function pgtrickle.relay_publish(text, jsonb, jsonb, jsonb) from public;

do $only_if_ours$
begin
    if not pgtrickle.relay_may_define('outbox_publish') then
        return;
    end if;

    create or replace function pgtrickle.outbox_publish(
        stream_table text,
        inserted jsonb,
        deleted jsonb default '[]',
        headers jsonb default '{}'
    )
    returns bigint
    language plpgsql
    volatile
    security invoker
    as $function$
    begin
        return pgtrickle.relay_publish(
            pgtrickle.relay_require_outbox(stream_table, pgtrickle.relay_find_relation(stream_table)),
            inserted,
            deleted,
            headers
        );
    end
    $function$;

    comment on function pgtrickle.outbox_publish(text, jsonb, jsonb, jsonb) is
        'Publishes rows in the current transaction and returns the outbox id; null when both arrays are empty. Headers travel to the broker.';

    revoke all on function pgtrickle.outbox_publish(text, jsonb, jsonb, jsonb) from public;
end
$only_if_ours$;
