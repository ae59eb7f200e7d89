-- The catalog of pipelines: the functions that people call, and the trigger that keeps names
-- unique and tells the relays.
--
-- What people call is one expression, which PostgreSQL puts in the place of the call: an error then
-- comes with the one line that says where it was raised, and a name means what it means to the caller.

create or replace function @schema@.relay_config_notify() returns trigger
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    changed record := coalesce(new, old);
    v_direction text := case tg_table_name when 'relay_outbox_config' then 'forward' else 'reverse' end;
    v_taken text;
begin
    if tg_op <> 'INSERT' and old.name is distinct from new.name then
        delete from @schema@.relay_pipeline_names as n where n.name = old.name;
    end if;
    if tg_op <> 'DELETE' and new.name is distinct from old.name then
        -- Waits for a transaction that is taking the same name.
        insert into @schema@.relay_pipeline_names (name, direction)
        values (new.name, v_direction)
        on conflict (name) do nothing;
        select n.direction into v_taken from @schema@.relay_pipeline_names as n where n.name = new.name;
        if v_taken <> v_direction then
            raise exception using
                errcode = 'RL012',
                message = format('there is a %s pipeline "%s" already: names are unique over both directions', v_taken, new.name),
                hint = format('Choose another name, or: select %I.delete_relay(%L);', @schema_name@, new.name);
        end if;
    end if;
    perform pg_notify(
        @schema@.relay_channel('pgtrickle_relay_config'),
        json_build_object(
            'direction', tg_table_name,
            'event', tg_op,
            'name', changed.name,
            'enabled', changed.enabled)::text);
    return null;
end
$$;
comment on function @schema@.relay_config_notify() is
    'Runs as whoever writes the catalog. Keep names unique over both directions, also for rows written by hand, and tell the relays at commit which pipeline has changed.';

create or replace trigger relay_config_notify
    after insert or update or delete on @schema@.relay_outbox_config
    for each row execute function @schema@.relay_config_notify();
comment on trigger relay_config_notify on @schema@.relay_outbox_config is
    'Names are unique over both directions; relays reload the pipeline.';

create or replace trigger relay_config_notify
    after insert or update or delete on @schema@.relay_inbox_config
    for each row execute function @schema@.relay_config_notify();
comment on trigger relay_config_notify on @schema@.relay_inbox_config is
    'Names are unique over both directions; relays reload the pipeline.';

-- ---------------------------------------------------------------------------
-- Setting
-- ---------------------------------------------------------------------------

-- Not immutable: PostgreSQL would call it while it plans, and say so in the error.
create or replace function @schema@.relay_object(key text, document text) returns jsonb
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
begin
    return document::jsonb;
exception
    when invalid_text_representation then
        raise exception using
            errcode = 'RL010',
            message = format('%s is not valid JSON', key),
            hint = 'As in {"type": "nats", ...}.';
end
$$;
comment on function @schema@.relay_object(text, text) is
    'Runs as its caller. The document in this text; RL010 where it is none.';

create or replace function @schema@.relay_set_pipeline(
    p_direction text, p_name text, p_config jsonb, p_enabled boolean,
    p_outbox_table text default null, p_retention_hours integer default null,
    p_max_retries integer default 5, p_schedule text default '1s',
    p_with_dead_letter boolean default true
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_config jsonb := '{"config_version": 1}' || p_config;
    v_role text;
    v_type text;
    v_inbox text;
    v_schema text;
    v_detail text;
    v_hint text;
begin
    if coalesce(length(p_name), 0) not between 1 and 200 then
        raise exception using
            errcode = 'RL010',
            message = 'a pipeline needs a name of 1 to 200 characters',
            hint = format('As in select %I.set_relay_outbox(''orders-out'', ...);', @schema_name@);
    elsif @schema@.relay_pipeline_of(p_name) <> p_name then
        raise exception using
            errcode = 'RL010',
            message = format('"%s" can be no pipeline''s name', p_name),
            hint = 'With a slash and a number behind it a name means one reader of a pipeline with partitions.';
    end if;
    if jsonb_typeof(p_config -> 'source') = 'object' then
        v_config := v_config #- '{source,outbox_table}';
    end if;
    -- Types stand in one place or two; what a direction always has is left out.
    foreach v_role in array array['source', 'sink'] loop
        continue when jsonb_typeof(p_config) is distinct from 'object';
        v_type := coalesce(
            v_config #>> array[v_role, 'type'], v_config ->> (v_role || '_type'),
            case p_direction || ' ' || v_role when 'forward source' then 'outbox' when 'reverse sink' then 'pg-inbox' end);
        v_config := v_config || jsonb_build_object(
            v_role || '_type', coalesce(v_config ->> (v_role || '_type'), v_type));
        if jsonb_typeof(v_config -> v_role) = 'object' and v_type is not null and v_role || p_direction <> 'sourceforward' then
            v_config := jsonb_set(v_config, array[v_role, 'type'], to_jsonb(v_type));
        end if;
    end loop;
    perform @schema@.relay_validate_config(p_direction, v_config);
    perform @schema@.relay_check_shape(v_config, p_outbox_table);
    if p_direction = 'forward' then
        perform @schema@.relay_set_forward(p_name, v_config, p_enabled, p_outbox_table, p_retention_hours);
        return;
    end if;
    v_inbox := v_config #>> '{sink,inbox}';
    v_schema := coalesce(v_config #>> '{sink,schema}', @schema_name@);
    -- An inbox that is missing is made, but in a schema of others only its owner creates tables.
    if v_inbox is not null
        and not v_config -> 'sink' ?| array['url', 'profile']
        and @schema@.relay_find_inbox(
            v_inbox, v_config #>> '{sink,schema}', v_schema <> @schema_name@) is null
    then
        perform @schema@.create_inbox(
            v_inbox, v_schema, p_max_retries, p_schedule, p_with_dead_letter, true, p_retention_hours);
    end if;
    insert into @schema@.relay_inbox_config as c (name, enabled, config)
    values (p_name, coalesce(p_enabled, true), v_config)
    on conflict (name) do update
    set enabled = excluded.enabled, config = excluded.config, updated_at = now();
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
comment on function @schema@.relay_set_pipeline(text, text, jsonb, boolean, text, integer, integer, text, boolean) is
    'Definer, since callers have no right on the catalog. Complete, check and write a pipeline; the outbox of a forward one by its own name.';

create or replace function @schema@.relay_set_forward(
    p_name text, p_config jsonb, p_enabled boolean, p_outbox_table text, p_retention_hours integer
) returns void
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_start text := coalesce(p_config ->> 'start', 'earliest');
    v_group text := p_config #>> '{source,consumer_group}';
    v_former_group text;
    v_key text;
    v_after_id bigint := 0;
    v_gaps int8multirange := '{}';
begin
    perform @schema@.relay_outbox_of(p_outbox_table);
    select k.name into v_key
    from unnest(array['collapse_updates', 'snapshot_markers', 'key_columns']) as k (name)
    where (@schema@.relay_settings(p_outbox_table)).adopted is not null
        and coalesce(p_config ->> k.name, 'false') <> 'false'
    limit 1;
    if found then
        raise exception using
            errcode = 'RL010',
            message = format('%s has no meaning for an outbox that is a table of its application', v_key),
            detail = 'Each of its rows is one event, whose key is a column of it.',
            hint = format('Leave %s out.', v_key);
    end if;
    select c.config #>> '{source,consumer_group}' into v_former_group
    from @schema@.relay_outbox_config as c
    where c.name = p_name;
    if p_retention_hours < 1 then
        raise exception using
            errcode = 'RL010',
            message = format('retention_hours is %s', p_retention_hours),
            hint = 'It must be 1 or more.';
    end if;
    if p_config #>> '{sink,type}' = 'pg-inbox' and not p_config -> 'sink' ?| array['url', 'profile'] then
        perform @schema@.relay_find_inbox(i.name, p_config #>> '{sink,schema}')
        from (select p_config #>> '{sink,inbox}') as i (name)
        where i.name is not null;
    end if;
    if v_start = 'latest' then
        -- Set again before it ran, it still owes what came after it was first set.
        select c.start_after_id, c.start_gaps into v_after_id, v_gaps
        from @schema@.relay_outbox_config as c
        where c.name = p_name and c.config ->> 'start' = 'latest' and c.outbox_table_name = p_outbox_table;
        if not found then
            select e.after_id, e.gaps into v_after_id, v_gaps from @schema@.relay_outbox_end(p_outbox_table) as e;
        end if;
    end if;
    insert into @schema@.relay_outbox_config as c
        (name, enabled, config, outbox_table_name, start_after_id, start_gaps)
    values (p_name, coalesce(p_enabled, true), p_config, p_outbox_table, v_after_id, v_gaps)
    on conflict (name) do update
    set
        enabled = excluded.enabled,
        config = excluded.config,
        outbox_table_name = excluded.outbox_table_name,
        start_after_id = excluded.start_after_id,
        start_gaps = excluded.start_gaps,
        updated_at = now();
    if exists (
        select from @schema@.relay_outbox_config as c where c.name = p_name and c.created_at = now()
    ) and not exists (
        select
        from @schema@.relay_backfills as b
        join @schema@.pgt_outbox_config as o using (pgt_id)
        where o.outbox_table_name = p_outbox_table and b.pipeline is null and b.finished_at is not null
    ) then
        perform @schema@.relay_say_rows(p_outbox_table);
    end if;
    if v_former_group <> coalesce(v_group, '') then
        perform @schema@.relay_group_unbind(v_former_group);
    end if;
    if v_group is not null then
        perform @schema@.relay_group_create(v_group, p_outbox_table, v_start);
        perform @schema@.relay_group_check_pipeline(v_group, p_name);
        if v_former_group is null and exists (
            select from @schema@.relay_consumer_offsets as o where o.pipeline = p_name)
        then
            raise notice using
                message = format('pipeline "%s" goes on at the position of consumer group "%s", not at its own', p_name, v_group),
                hint = format('select %I.consumer_lag(%L) shows it, seek_offset moves it.', @schema_name@, v_group);
        end if;
    end if;
    -- Raised, never lowered, since other pipelines may need it.
    update @schema@.pgt_outbox_config as o
    set retention_hours = p_retention_hours
    where o.outbox_table_name = p_outbox_table and o.retention_hours < p_retention_hours and o.adopted is null;
end
$$;
comment on function @schema@.relay_set_forward(text, jsonb, boolean, text, integer) is
    'Part of relay_set_pipeline: write a pipeline that reads an outbox; its consumer group is made.';

create or replace function @schema@.set_relay_outbox(
    name text, outbox text, consumer_group text, sink jsonb, retention_hours integer default 24,
    enabled boolean default true
) returns void
language sql volatile security invoker as $$
    select @schema@.relay_set_pipeline(
        'forward', name,
        pg_catalog.jsonb_build_object(
            'source', pg_catalog.jsonb_strip_nulls(
                pg_catalog.jsonb_build_object('outbox', outbox, 'consumer_group', consumer_group)),
            'sink', sink),
        enabled, @schema@.relay_outbox_named(outbox), retention_hours)
$$;
comment on function @schema@.set_relay_outbox(text, text, text, jsonb, integer, boolean) is
    'Make or change a pipeline from an outbox to a sink; without a consumer group it reads in id order by itself. Which outbox the name means is settled now. The outbox keeps delivered rows at least so many hours. The position survives changes, delete_relay removes it.';

create or replace function @schema@.set_relay_outbox(name text, outbox text, sink jsonb)
returns void
language sql volatile security invoker as $$
    select @schema@.set_relay_outbox(name, outbox, null, sink)
$$;
comment on function @schema@.set_relay_outbox(text, text, jsonb) is
    'The same without a consumer group.';

create or replace function @schema@.set_relay_outbox(name text, outbox text, sink text) returns void
language sql volatile security invoker as $$
    select @schema@.set_relay_outbox(name, outbox, null, @schema@.relay_object('sink', sink))
$$;
comment on function @schema@.set_relay_outbox(text, text, text) is
    'The same with the sink as text. Without it a call with three plain literals would be ambiguous: PostgreSQL can''t tell the sink from the config form''s boolean.';

create or replace function @schema@.set_relay_outbox(
    name text, config jsonb, enabled boolean default true
) returns void
language sql volatile security invoker as $$
    select @schema@.relay_set_pipeline(
        'forward', name, config, enabled,
        case
            when config operator(pg_catalog.#>>) '{source,outbox}' is not null
            then @schema@.relay_outbox_named(config operator(pg_catalog.#>>) '{source,outbox}')
        end)
$$;
comment on function @schema@.set_relay_outbox(text, jsonb, boolean) is
    'Make or change a pipeline from an outbox to a sink: {"source": {"outbox": ...}, "sink": {"type": ...}, ...} with any keys of a pipeline.';

create or replace function @schema@.set_relay_inbox(
    name text, inbox text, source jsonb, max_retries integer default 5, schedule text default '1s',
    with_dead_letter boolean default true, retention_hours integer default null,
    enabled boolean default true
) returns void
language sql volatile security invoker as $$
    select @schema@.relay_set_pipeline(
        'reverse', name,
        pg_catalog.jsonb_build_object(
            'source', source,
            'sink', pg_catalog.jsonb_build_object('type', 'pg-inbox', 'inbox', inbox)),
        enabled, null, retention_hours, max_retries, schedule, with_dead_letter)
$$;
comment on function @schema@.set_relay_inbox(text, text, jsonb, integer, text, boolean, integer, boolean) is
    'Make or change a pipeline from a source to an inbox. A missing inbox is created with the settings given; one that is there keeps its own.';

create or replace function @schema@.set_relay_inbox(name text, inbox text, source text) returns void
language sql volatile security invoker as $$
    select @schema@.set_relay_inbox(name, inbox, @schema@.relay_object('source', source))
$$;
comment on function @schema@.set_relay_inbox(text, text, text) is
    'The same with the source as text. Without it a call with three plain literals would be ambiguous: PostgreSQL can''t tell the source from the config form''s boolean.';

create or replace function @schema@.set_relay_inbox(
    name text, config jsonb, enabled boolean default true
) returns void
language sql volatile security invoker as $$
    select @schema@.relay_set_pipeline('reverse', name, config, enabled)
$$;
comment on function @schema@.set_relay_inbox(text, jsonb, boolean) is
    'Make or change a pipeline from a source to an inbox: {"source": {"type": ...}, "sink": {"inbox": ...}, ...} with any keys of a pipeline. A missing inbox is created.';

-- ---------------------------------------------------------------------------
-- Looking, switching, deleting
-- ---------------------------------------------------------------------------

create or replace function @schema@.list_relay_configs()
returns table (name text, direction text, enabled boolean, config jsonb)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select c.name, 'forward', c.enabled,
        case
            when jsonb_typeof(c.config -> 'source') = 'object' and c.outbox_table_name is not null
            then jsonb_set(c.config, '{source,outbox_table}', to_jsonb(c.outbox_table_name))
            else c.config
        end
    from @schema@.relay_outbox_config as c
    union all
    select c.name, 'reverse', c.enabled, c.config from @schema@.relay_inbox_config as c
    order by 1
$$;
comment on function @schema@.list_relay_configs() is
    'All pipelines, forward and reverse; source.outbox_table is the outbox that a forward one reads. Definer: callers have no right on the catalog.';

create or replace function @schema@.relay_nearest(p_word text, p_candidates text[]) returns text
language sql immutable security invoker set search_path = pg_catalog, pg_temp as $$
    select c.word
    from unnest(p_candidates) as c (word)
    cross join lateral (
        select 2.0 * count(*) / (length(p_word) + length(c.word) + 2) as share
        from (
            select substr(' ' || lower(p_word) || ' ', i, 2) from generate_series(1, length(p_word) + 1) as i
            intersect all
            select substr(' ' || lower(c.word) || ' ', i, 2) from generate_series(1, length(c.word) + 1) as i
        ) as pair
    ) as s
    where s.share > 0.5
    order by s.share desc, c.word
    limit 1
$$;
comment on function @schema@.relay_nearest(text, text[]) is
    'The candidate that a mistyped word may have meant, by the pairs of letters they share; null where none is near.';

create or replace function @schema@.relay_find_pipeline(
    p_name text, out name text, out config jsonb
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_near text;
begin
    select c.name, c.config into name, config
    from @schema@.list_relay_configs() as c
    where c.name = p_name;
    if not found then
        v_near := @schema@.relay_nearest(p_name, array(select n.name from @schema@.relay_pipeline_names as n));
        raise exception using
            errcode = 'RL011',
            message = format('there is no pipeline "%s"', coalesce(p_name, 'null')),
            hint = coalesce(
                'Did you mean "' || v_near || '"?',
                format('select name, direction, enabled from %I.list_relay_configs();', @schema_name@));
    end if;
end
$$;
comment on function @schema@.relay_find_pipeline(text) is
    'Definer, since callers have no right on the catalog. A pipeline as list_relay_configs has it; RL011 where there is none of this name.';

create or replace function @schema@.get_relay_config(name text) returns jsonb
language sql stable security invoker as $$
    select (@schema@.relay_find_pipeline(name)).config
$$;
comment on function @schema@.get_relay_config(text) is
    'Configuration of a pipeline; secrets in it are references.';

create or replace function @schema@.relay_switch(p_name text, p_enabled boolean) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    if p_enabled then
        perform @schema@.relay_validate_config('forward', c.config) from @schema@.relay_outbox_config as c where c.name = p_name;
        perform @schema@.relay_validate_config('reverse', c.config) from @schema@.relay_inbox_config as c where c.name = p_name;
    end if;
    update @schema@.relay_outbox_config as c
    set enabled = p_enabled, updated_at = now()
    where c.name = p_name and c.enabled <> p_enabled;
    update @schema@.relay_inbox_config as c
    set enabled = p_enabled, updated_at = now()
    where c.name = p_name and c.enabled <> p_enabled;
end
$$;
comment on function @schema@.relay_switch(text, boolean) is
    'Definer, since callers have no right on the catalog. Enable a pipeline, if its configuration is sound, or disable it; writes only where that changes something.';

create or replace function @schema@.enable_relay(name text) returns void
language sql volatile security invoker as $$
    select @schema@.relay_switch((@schema@.relay_find_pipeline(name)).name, true)
$$;
comment on function @schema@.enable_relay(text) is
    'Start a pipeline where it stopped, or where it was set to start.';

create or replace function @schema@.disable_relay(name text) returns void
language sql volatile security invoker as $$
    select @schema@.relay_switch((@schema@.relay_find_pipeline(name)).name, false)
$$;
comment on function @schema@.disable_relay(text) is
    'Stop a pipeline; its position stays, and its outbox keeps what it has not delivered.';

create or replace function @schema@.relay_delete_pipeline(p_name text) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_direction text;
    v_group text;
    v_positions bigint;
begin
    delete from @schema@.relay_outbox_config as c
    where c.name = p_name
    returning c.config #>> '{source,consumer_group}' into v_group;
    v_direction := case when found then 'forward' else 'reverse' end;
    perform @schema@.relay_group_unbind(v_group);
    delete from @schema@.relay_inbox_config as c where c.name = p_name;
    v_positions := @schema@.relay_forget_positions(p_name);
    delete from @schema@.relay_cursors as c where c.pipeline_id = p_name;
    if v_positions > 0 then
        raise notice using
            message = format('the position of %s pipeline "%s" is deleted with it', v_direction, p_name),
            hint = 'A pipeline that is set under this name starts from its beginning. Dead letters stay.';
    end if;
end
$$;
comment on function @schema@.relay_delete_pipeline(text) is
    'Definer, since callers have no right on the catalog. Delete what the catalog has of a pipeline.';

create or replace function @schema@.delete_relay(name text) returns void
language sql volatile security invoker as $$
    select @schema@.relay_delete_pipeline((@schema@.relay_find_pipeline(name)).name)
$$;
comment on function @schema@.delete_relay(text) is
    'Delete a pipeline and its position in all relay groups; its dead letters and its consumer group stay.';
