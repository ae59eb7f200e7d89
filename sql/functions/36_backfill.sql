-- Backfill: the rows that a table had before its outbox, sent as events.
--
-- A chunk is one call of a function that stands beside the table and belongs to its owner, in a
-- transaction of its own. It locks the rows of a range of keys against writers and then writes them
-- to the outbox: whoever wrote them before has committed and has a lower outbox id, whoever writes
-- them later waits and gets a higher one. Order is kept per row, so captured changes go on meanwhile.
--
-- It never waits for one row while it holds another one, so no writer becomes the victim of a deadlock
-- with it: it waits for the first row alone, and ends in front of the first of the others that is
-- locked.

-- ---------------------------------------------------------------------------
-- The function beside the table
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_backfill_key(
    relation oid, out columns text[], out keys text, out keys_down text, out whole text,
    out texts text, out after_values text, out through_values text
)
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select
        array_agg(k.name order by k.place),
        string_agg(format('r.%I', k.name), ', ' order by k.place),
        string_agg(format('r.%I desc', k.name), ', ' order by k.place),
        format(case count(*) when 1 then '%s' else 'row(%s)' end, string_agg(format('r.%I', k.name), ', ' order by k.place)),
        format('array[%s]', string_agg(format('format(''%%s'', r.%I)', k.name), ', ' order by k.place)),
        string_agg(format('($1::text[])[%s]::%s', k.place, k.type), ', ' order by k.place),
        string_agg(format('($2::text[])[%s]::%s', k.place, k.type), ', ' order by k.place)
    from (
        select a.attname::text as name, c.place, format_type(b.id, -1) as type, i.indexrelid, i.indisprimary,
            a.attnotnull and (b.id < 16384 or b.kind = 'e') as is_fit
        from pg_index as i
        cross join lateral unnest(i.indkey) with ordinality as c (number, place)
        join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = c.number
        cross join lateral (
            with recursive below as (
                select a.atttypid as id
                union
                select t.typbasetype from below as d join pg_type as t on t.oid = d.id where t.typtype = 'd'
            )
            select t.oid as id, t.typtype as kind from below as d join pg_type as t on t.oid = d.id where t.typtype <> 'd'
        ) as b
        where i.indrelid = relation
            and i.indisunique and i.indimmediate and i.indisvalid and i.indpred is null and i.indexprs is null
            and c.place <= i.indnkeyatts
            -- The children of an ordinary table have no key in common with it.
            and not exists (
                select from pg_inherits as h join pg_class as p on p.oid = h.inhparent
                where h.inhparent = relation and p.relkind = 'r')
    ) as k
    group by k.indexrelid, k.indisprimary
    having bool_and(k.is_fit)
    order by k.indisprimary desc, k.indexrelid
    limit 1
$$;
comment on function @schema@.relay_backfill_key(oid) is
    'The unique key in whose order the rows of a table r are read, and SQL text about it: its columns, up and down, its value, its value as texts, and the values of the texts $1 and $2. The primary key, or the first that has no nulls; null without one. Types of others, whose operators would run as the owner, are not compared.';

create or replace function @schema@.relay_backfill_source(settings @schema@.pgt_outbox_config)
returns text
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
    select format(
        $source$
-- pgtrickle-relay backfill, layout 1
#variable_conflict use_variable
declare
    relation constant regclass := %1$I.relay_captured_table(%2$L);
    key record;
    is_above text;
    through_key text[];
    missed_key text[];
    row_count bigint;
    -- Whom it is for: one pipeline, or all.
    addressee constant jsonb := coalesce(to_jsonb(pipeline), 'true');
    key_now text[];
begin
    -- An application that waits for a lock of ours for so long would look for a deadlock.
    perform set_config('lock_timeout',
            greatest(1, extract(epoch from current_setting('deadlock_timeout')::interval) * 500)::integer::text, true),
        set_config('row_security', 'off', true);
    select * into key from %1$I.relay_backfill_key(relation) as k;
    is_above := case when after_key is null then 'true' else format('(%%s) > (%%s)', key.keys, key.after_values) end;
    execute format('select from %%s as r where %%s order by %%s limit 1 for share of r', relation, is_above, key.keys)
    using after_key;
    execute format('select %%s from %%s as r where %%s order by %%s offset $2 - 1 limit 1',
        key.texts, relation, is_above, key.keys)
    into through_key
    using after_key, chunk_rows;
    if exists (
        select from unnest(%7$L::text[]) as k (name)
        where not exists (select from pg_attribute as a where a.attrelid = relation and a.attname = k.name)
    ) then
        key_now := %1$I.relay_primary_key(relation);
    end if;
    for attempt in 1..2 loop
        begin
            execute format(
                $chunk$
                    with seen as materialized (
                        select %%1$s as k, r.ctid as place, r.tableoid as part from %%3$s as r where %%4$s and (%%5$s
                        )
                    ), locked as materialized (
                        select %%1$s as k, %%6$s as j from %%3$s as r where %%4$s and (%%5$s
                        ) order by %%7$s for share of r skip locked
                    ), missed as materialized (
                        select s.k, s.place, s.part
                        from seen as s
                        where (select count(*) from seen) <> (select count(*) from locked)
                            and not exists (select from locked as l where l.k = s.k)
                        order by s.k
                        limit 1
                    ), chosen as materialized (
                        select row_number() over () - 1 as n, l.j
                        from locked as l
                        where not exists (select from missed as m where l.k >= m.k)
                    ), facts as materialized (
                        select count(*) as rows, count(*) > $3 or coalesce(sum(pg_column_size(c.j)), 0) > $4 as is_large
                        from chosen as c
                    ), event as (
                        insert into %%8$s (inserted_count, is_claim_check, payload, key_columns)
                        select
                            f.rows, f.is_large,
                            -- Each made in one piece: adding to a large document copies it.
                            case
                                when f.is_large then jsonb_build_object('v', 1, 'full_refresh', true, 'backfill', $5,
                                    'claim_check', true, 'inserted_count', f.rows, 'deleted_count', 0)
                                else jsonb_build_object('v', 1, 'full_refresh', true, 'backfill', $5,
                                    'inserted', array(select c.j from chosen as c order by c.n), 'deleted', '[]'::jsonb)
                            end,
                            $6
                        from facts as f
                        where f.rows > 0
                        returning id
                    ), rows_of_claim_check as (
                        insert into %%9$s (outbox_id, row_num, row_op, row_data)
                        select e.id, c.n, 'INSERT', c.j
                        from event as e
                        cross join chosen as c
                        cross join facts as f
                        where f.is_large
                    )
                    select f.rows, (
                        select %%2$s from missed as m join %%3$s as r on r.ctid = m.place and r.tableoid = m.part)
                    from facts as f
                $chunk$,
                key.whole, key.texts, relation,
                is_above || case when through_key is null then ''
                    else format(' and (%%s) <= (%%s)', key.keys, key.through_values) end,
                coalesce(filter, 'true'), case
                    when attempt = 1 and %1$I.relay_is_quick(%2$L, relation) then 'to_jsonb(r)'
                    else %1$I.relay_row_expression(relation, attempt = 2)
                end, key.keys,
                %3$L, %4$L
            )
            into row_count, missed_key
            using after_key, through_key, %5$s, %6$s, addressee, key_now;
            exit;
        exception
            when others then
                -- Some value can't be told: each by itself.
                if attempt = 2 then
                    raise;
                end if;
        end;
    end loop;
    if missed_key is not null then
        execute format('select %%s from %%s as r where %%s and (%%s) < (%%s) order by %%s limit 1', key.texts, relation,
            is_above, key.keys, key.through_values, key.keys_down)
        into through_key
        using after_key, missed_key;
        if through_key is null then
            raise exception using errcode = 'lock_not_available', message = 'the next row is locked';
        end if;
    end if;
    -- Nothing of the owner's is left to the commit, which the caller makes with their own rights.
    set constraints all immediate;
    return jsonb_build_object('rows', row_count, 'through', through_key);
end
$source$,
        @schema_name@, settings.outbox_table_name, format('%I.%I', @schema_name@, settings.outbox_table_name),
        format('%I.%I', @schema_name@, settings.delta_table_name), settings.claim_check_rows, settings.claim_check_bytes,
        coalesce(settings.key_columns, '{}')
    )
$$;
comment on function @schema@.relay_backfill_source(@schema@.pgt_outbox_config) is
    'Source of the backfill function of a table with these settings. It writes the rows behind after_key, about chunk_rows of them, and returns how many and up to which key; null: to the end. 55P03 where the next row is locked. The filter is an expression over a row r that runs as the owner of the table, like all of it: only the owner may execute it.';

-- ---------------------------------------------------------------------------
-- A run
-- ---------------------------------------------------------------------------

create or replace function @schema@.relay_register_backfill(
    outbox_table text, function_id oid, pipeline text, filter_digest text, key_columns text[]
) returns uuid
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    settings constant @schema@.pgt_outbox_config := @schema@.relay_settings(outbox_table);
    token uuid := gen_random_uuid();
begin
    perform @schema@.relay_require_claim(function_id, 'backfill ' || outbox_table);
    if function_id is distinct from @schema@.relay_function_of(outbox_table, 'capture') then
        raise exception using
            errcode = 'RL004',
            message = format('%s is not the capture function of outbox %I', function_id::regprocedure, outbox_table);
    end if;
    if pipeline is not null and not exists (
        select from @schema@.relay_outbox_config as c where c.name = pipeline and c.outbox_table_name = outbox_table
    ) then
        raise exception using
            errcode = 'RL011',
            message = format('no pipeline "%s" reads outbox %I', pipeline, outbox_table),
            hint = 'name a pipeline that reads it, or leave pipeline out: all get the rows then';
    end if;
    update @schema@.relay_backfills as b
    set
        call_token = token,
        call_pid = pg_backend_pid(),
        updated_at = clock_timestamp(),
        progressed_at = clock_timestamp()
    where b.pgt_id = settings.pgt_id
        and b.pipeline is not distinct from relay_register_backfill.pipeline
        and b.filter_digest is not distinct from relay_register_backfill.filter_digest
        and b.key_columns = relay_register_backfill.key_columns
        and b.finished_at is null;
    if not found then
        insert into @schema@.relay_backfills as b
            (outbox_table_name, pgt_id, pipeline, filter_digest, key_columns, call_token, estimated_rows)
        select outbox_table, settings.pgt_id, pipeline, filter_digest, key_columns, token,
            sum(c.reltuples) filter (where c.reltuples >= 0 and c.relkind = 'r')::bigint
        from @schema@.relay_family(@schema@.relay_captured_table(outbox_table)) as f
        join pg_class as c on c.oid = f.member;
    end if;
    return token;
end
$$;
comment on function @schema@.relay_register_backfill(text, oid, text, text, text[]) is
    'The catalog''s half of the beginning of a backfill: a new run, or the unfinished one of the same pipeline, filter and key; a call that was at it can''t go on. Returns the token by which this call is known. Definer: nobody has rights on the catalog; it acts for who has claimed the capture function of the outbox.';

create or replace function @schema@.relay_begin_backfill(
    outbox_table text, pipeline text, filter text, chunk_rows integer
) returns uuid
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    settings constant @schema@.pgt_outbox_config := @schema@.relay_settings(outbox_table);
    captured constant oid := @schema@.relay_captured_table(outbox_table);
    function_id constant oid := @schema@.relay_function_of(outbox_table, 'capture');
    key_columns constant text[] := (@schema@.relay_backfill_key(captured)).columns;
    obstacle record;
    token uuid;
begin
    if chunk_rows is null or chunk_rows not between 1 and 100000 then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = format('a chunk can''t have %s rows', coalesce(chunk_rows::text, 'null')),
            hint = 'chunk_rows is 1 to 100000';
    end if;
    select o.problem, o.remedy
    into obstacle
    from (
        select 'no table is captured into it' as problem, 'only rows of a captured table can be sent' as remedy
        where captured is null
        union all
        -- A change that is not captured could not follow a row that is sent.
        select p.problem, format('select %I.repair_outbox(%L)', @schema_name@, captured::regclass)
        from (
            select @schema@.relay_function_problem(function_id, captured, settings, 'capture')
            union all
            select @schema@.relay_function_problem(
                @schema@.relay_function_of(outbox_table, 'backfill'), captured, settings, 'backfill')
            union all
            select t.problem
            from @schema@.relay_trigger_problems(
                outbox_table, captured, @schema@.relay_capture_mode(settings.capture, captured), function_id) as t
        ) as p (problem)
        where captured is not null
        union all
        select 'the table has no primary key, nor a unique index on columns that are not null', 'create one'
        where key_columns is null
    ) as o
    where o.problem is not null
    limit 1;
    if found then
        raise exception using
            errcode = 'object_not_in_prerequisite_state',
            message = format('outbox %I can''t be backfilled: %s', outbox_table, obstacle.problem),
            hint = obstacle.remedy;
    end if;
    perform @schema@.relay_check_event_triggers();
    perform @schema@.relay_claim_function(function_id, 'backfill ' || outbox_table);
    token := @schema@.relay_register_backfill(outbox_table, function_id, pipeline, md5(filter), key_columns);
    perform @schema@.relay_claim_function(function_id);
    return token;
end
$$;
comment on function @schema@.relay_begin_backfill(text, text, text, integer) is
    'The caller''s half of the beginning of a backfill: says what keeps it from being one, and claims the capture function, which its owner alone can do.';

create or replace function @schema@.relay_lock_backfill(token uuid) returns @schema@.relay_backfills
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    run @schema@.relay_backfills;
begin
    select b.* into run from @schema@.relay_backfills as b where b.call_token = token for update;
    if not found then
        raise exception using
            errcode = 'RL004',
            message = 'this call can''t go on with the backfill',
            detail = 'Another call goes on with it, or the outbox was disabled.';
    elsif run.pipeline is not null and not exists (
        select from @schema@.relay_outbox_config as c
        where c.name = run.pipeline and c.outbox_table_name = run.outbox_table_name
    ) then
        raise exception using
            errcode = 'RL011',
            message = format('pipeline "%s" does not read outbox %I any more', run.pipeline, run.outbox_table_name);
    end if;
    return run;
end
$$;
comment on function @schema@.relay_lock_backfill(uuid) is
    'The run that a call of backfill is at, locked. Definer: nobody has rights on the catalog; the token, which nobody can guess, is known to that call alone.';

create or replace function @schema@.relay_note_backfill(
    token uuid, row_count bigint, through_key text[], is_finished boolean
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    update @schema@.relay_backfills as b
    set
        sent_rows = b.sent_rows + row_count,
        through_key = coalesce(relay_note_backfill.through_key, b.through_key),
        updated_at = clock_timestamp(),
        progressed_at = case when is_finished or through_key is not null then clock_timestamp() else b.progressed_at end,
        finished_at = case when is_finished then clock_timestamp() end
    where b.call_token = token
$$;
comment on function @schema@.relay_note_backfill(uuid, bigint, text[], boolean) is
    'Notes a chunk in the transaction that wrote it. Definer: nobody has rights on the catalog; the token, which nobody can guess, is known to one call of backfill alone.';

create or replace function @schema@.relay_backfill_function(
    outbox_table text, relation oid, out id oid, out name text, out version text, out problem text
)
language sql volatile security invoker set search_path = pg_catalog, pg_temp as $$
    select
        p.oid, format('%I.%I', n.nspname, p.proname), concat_ws(' ', p.oid, p.xmin, p.ctid),
        @schema@.relay_function_problem(p.oid, relation, @schema@.relay_settings(outbox_table), 'backfill')
    from pg_proc as p
    join pg_namespace as n on n.oid = p.pronamespace
    where p.oid = @schema@.relay_function_of(outbox_table, 'backfill')
$$;
comment on function @schema@.relay_backfill_function(text, oid) is
    'The backfill function of an outbox as it stands at this moment: what it is called, and what is wrong with it.';

create or replace function @schema@.relay_backfill_chunk(
    token uuid, filter text, chunk_rows integer, out is_finished boolean,
    out pause_s double precision
)
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    run constant @schema@.relay_backfills := @schema@.relay_lock_backfill(token);
    captured constant oid := @schema@.relay_captured_table(run.outbox_table_name);
    made record;
    answer jsonb := '{}';
    is_blocked boolean := false;
begin
    if (@schema@.relay_backfill_key(captured)).columns is distinct from run.key_columns then
        raise exception using
            errcode = 'object_not_in_prerequisite_state',
            message = format('the key of the table of outbox %I was changed', run.outbox_table_name),
            hint = 'call backfill again, which begins with the first row';
    end if;
    made := @schema@.relay_backfill_function(run.outbox_table_name, captured);
    if made.problem is not null or made.name is null then
        raise exception using
            errcode = 'object_not_in_prerequisite_state',
            message = format('outbox %I can''t be backfilled: %s', run.outbox_table_name,
                coalesce(made.problem, 'the backfill function is missing')),
            hint = format('select %I.repair_outbox(%L)', @schema_name@, captured::regclass);
    end if;
    begin
        execute format('select %s($1, $2, $3, $4)', made.name)
        into answer
        using run.pipeline, filter, run.through_key, chunk_rows;
    exception
        when lock_not_available or deadlock_detected or serialization_failure then
            is_blocked := true;
    end;
    if not exists (select from pg_proc as p where p.oid = made.id and concat_ws(' ', p.oid, p.xmin, p.ctid) = made.version) then
        raise exception using
            errcode = 'RL034',
            message = format('the backfill function of outbox %I was changed while it ran', run.outbox_table_name);
    end if;
    is_finished := not is_blocked and answer ->> 'through' is null;
    perform @schema@.relay_note_backfill(token, coalesce((answer ->> 'rows')::bigint, 0),
        case when answer ->> 'through' is not null then array(select jsonb_array_elements_text(answer -> 'through')) end,
        is_finished);
    if not is_finished then
        -- Writers wait while the disk takes what a chunk wrote. A crash that takes a chunk takes its
        -- progress, too; and no position behind it can reach the disk before it does.
        perform set_config('synchronous_commit', 'off', true);
    end if;
    -- Of the time that chunks take, so much again is the writers' alone.
    pause_s := case when is_blocked then 0.02 else extract(epoch from clock_timestamp() - now()) / 3 end;
end
$$;
comment on function @schema@.relay_backfill_chunk(uuid, text, integer) is
    'One chunk of a backfill by the function beside the table, which only the owner of the table and who has the owner''s rights may execute. It is compared with what the generator makes before and behind the call, so that nothing else runs for the caller. Returns how long the next one is to wait.';

-- No search_path of its own: the name means what it means to the caller, and it commits.
create or replace procedure @schema@.backfill(
    stream_table text, pipeline text default null, filter text default null,
    chunk_rows integer default 1000
)
language plpgsql security invoker as $$
declare
    token uuid;
    chunk record;
    v_hint text;
begin
    begin
        token := @schema@.relay_begin_backfill(@schema@.relay_outbox_named(stream_table), pipeline, filter, chunk_rows);
    exception
        when others then
            -- With a remedy it is a person's to mend, for whom the calls on the way there are noise.
            get stacked diagnostics v_hint = pg_exception_hint;
            if v_hint operator(pg_catalog.=) '' then
                raise;
            end if;
            raise exception using errcode = sqlstate, message = sqlerrm, hint = v_hint;
    end;
    commit;
    loop
        select c.* into chunk from @schema@.relay_backfill_chunk(token, filter, chunk_rows) as c;
        commit;
        exit when chunk.is_finished;
        perform pg_catalog.pg_sleep(chunk.pause_s);
    end loop;
end
$$;
comment on procedure @schema@.backfill(text, text, text, integer) is
    'Sends the rows that a captured table has as events "upsert", to one pipeline or to all, those of which the filter is true; commits after each chunk. Goes on where a call with the same arguments was interrupted. Runs as its caller, who must have the rights of the table''s owner.';

create or replace function @schema@.relay_say_rows(outbox_table text) returns void
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    captured constant oid := @schema@.relay_captured_table(outbox_table);
begin
    if (@schema@.relay_settings(outbox_table)).had_rows and captured is not null then
        raise notice using
            message = format('%s had rows before its outbox: they have no event until they are sent', captured::regclass),
            hint = format('call %I.backfill(%L)', @schema_name@, captured::regclass);
    end if;
end
$$;
comment on function @schema@.relay_say_rows(text) is
    'Says how the rows are sent that a captured table had before its outbox, where it had any.';

-- ---------------------------------------------------------------------------
-- Looking
-- ---------------------------------------------------------------------------

create or replace view @schema@.backfill_progress as
select
    c.stream_table,
    c.outbox_table_name as outbox_table,
    b.pipeline,
    b.filter_digest is not null as is_filtered,
    case
        when b.finished_at is not null then 'finished'
        when b.progressed_at > clock_timestamp() - interval '15 seconds' then 'running'
        when b.updated_at > clock_timestamp() - interval '15 seconds'
            -- In a chunk that takes longer: nobody else locks rows of this table.
            or exists (
                select from pg_locks as l
                where l.pid = b.call_pid
                    and l.database = (select d.oid from pg_database as d where d.datname = current_database())
                    and l.relation = format('%I.relay_backfills', @schema_name@)::regclass
                    and l.mode = 'RowShareLock')
        then 'stuck'
        else 'interrupted'
    end as state,
    b.sent_rows,
    b.estimated_rows,
    b.started_at,
    b.updated_at,
    b.progressed_at,
    b.finished_at,
    b.call_pid
from @schema@.relay_backfills as b
join @schema@.pgt_outbox_config as c on c.pgt_id = b.pgt_id
where has_column_privilege(current_user, format('%I.%I', @schema_name@, c.outbox_table_name), 'payload', 'select');

comment on view @schema@.backfill_progress is
    'Backfills, for those who may read the outbox: how many rows were sent, of about how many the table had when it began. Stuck: its call lives, and got no row further for 15 seconds; interrupted: there is no call any more.';

grant select on @schema@.backfill_progress to public;
