-- The catalog of pipelines: seven functions that people call, and the triggers that keep names
-- unique and tell the relays.

-- ---------------------------------------------------------------------------
-- Triggers
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_config_notify()
returns trigger
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    changed record := coalesce(new, old);
begin
    perform pg_notify(
        'pgtrickle_relay_config',
        json_build_object(
            'direction', tg_table_name,
            'event', tg_op,
            'name', changed.name,
            'enabled', changed.enabled)::text);
    return null;
end
$$;

comment on function pgtrickle.relay_config_notify() is
    'Tell the relays at commit which pipeline has changed.';

revoke all on function pgtrickle.relay_config_notify() from public;

create or replace function pgtrickle.relay_config_name()
returns trigger
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_direction text := case tg_table_name when 'relay_outbox_config' then 'forward' else 'reverse' end;
    v_taken text;
begin
    if tg_op = 'DELETE' or (tg_op = 'UPDATE' and new.name <> old.name) then
        delete from pgtrickle.relay_pipeline_names as n where n.name = old.name;
    end if;
    if tg_op = 'DELETE' then
        return old;
    end if;
    -- Waits for a transaction that is taking the same name.
    insert into pgtrickle.relay_pipeline_names (name, direction)
    values (new.name, v_direction)
    on conflict (name) do nothing;
    select n.direction into v_taken from pgtrickle.relay_pipeline_names as n where n.name = new.name;
    if v_taken <> v_direction then
        raise exception using
            errcode = 'RL012',
            message = format('there is a %s pipeline "%s" already', v_taken, new.name),
            detail = 'Names are unique over both directions.',
            hint = format('Choose another name, or: select pgtrickle.delete_relay(%L);', new.name);
    end if;
    return new;
end
$$;

comment on function pgtrickle.relay_config_name() is
    'Keep names unique over both directions, also for rows written by hand.';

revoke all on function pgtrickle.relay_config_name() from public;

create or replace trigger relay_config_name
    before insert or delete or update of name on pgtrickle.relay_outbox_config
    for each row execute function pgtrickle.relay_config_name();
comment on trigger relay_config_name on pgtrickle.relay_outbox_config is
    'Names are unique over both directions.';

create or replace trigger relay_config_name
    before insert or delete or update of name on pgtrickle.relay_inbox_config
    for each row execute function pgtrickle.relay_config_name();
comment on trigger relay_config_name on pgtrickle.relay_inbox_config is
    'Names are unique over both directions.';

create or replace trigger relay_config_notify
    after insert or update or delete on pgtrickle.relay_outbox_config
    for each row execute function pgtrickle.relay_config_notify();
comment on trigger relay_config_notify on pgtrickle.relay_outbox_config is
    'Relays reload the pipeline.';

create or replace trigger relay_config_notify
    after insert or update or delete on pgtrickle.relay_inbox_config
    for each row execute function pgtrickle.relay_config_notify();
comment on trigger relay_config_notify on pgtrickle.relay_inbox_config is
    'Relays reload the pipeline.';

-- ---------------------------------------------------------------------------
-- Setting
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.set_relay_outbox(
    name text,
    outbox text,
    consumer_group text,
    sink jsonb,
    retention_hours integer default 24,
    enabled boolean default true
)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgtrickle.relay_set_forward(
        name,
        jsonb_build_object(
            'source', jsonb_strip_nulls(jsonb_build_object('outbox', outbox, 'consumer_group', consumer_group)),
            'sink', sink),
        enabled);
    perform pgtrickle.relay_keep_at_least(outbox, retention_hours);
end
$$;

comment on function pgtrickle.set_relay_outbox(text, text, text, jsonb, integer, boolean) is
    'Make or change a pipeline from an outbox to a sink; without a consumer group it reads in id order by itself. The outbox keeps delivered rows at least so many hours. The position survives changes, delete_relay removes it. Definer: callers have no right on the catalog.';

revoke all on function pgtrickle.set_relay_outbox(text, text, text, jsonb, integer, boolean) from public;

create or replace function pgtrickle.set_relay_outbox(
    name text,
    config jsonb,
    enabled boolean default true
)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgtrickle.relay_set_forward(name, config, enabled);
end
$$;

comment on function pgtrickle.set_relay_outbox(text, jsonb, boolean) is
    'Make or change a pipeline from an outbox to a sink: {"source": {"outbox": …}, "sink": {"type": …}, …} with any keys of a pipeline. Definer: callers have no right on the catalog.';

revoke all on function pgtrickle.set_relay_outbox(text, jsonb, boolean) from public;

create or replace function pgtrickle.relay_check_name(p_name text)
returns void
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if coalesce(length(p_name), 0) not between 1 and 200 then
        raise exception using errcode = 'RL010', message = 'a pipeline needs a name of 1 to 200 characters', hint = 'As in set_relay_outbox(''orders-to-nats'', ...).';
    end if;
end
$$;

comment on function pgtrickle.relay_check_name(text) is
    'RL010 for what can''t be a pipeline''s name.';

revoke all on function pgtrickle.relay_check_name(text) from public;

create or replace function pgtrickle.relay_complete_config(
    p_config jsonb,
    p_source_type text,
    p_sink_type text
)
returns jsonb
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_config jsonb;
    v_role text;
begin
    if p_config is null or jsonb_typeof(p_config) <> 'object' then
        raise exception using errcode = 'RL010', message = 'the configuration is not a JSON object', hint = 'As in {"source": {"outbox": "orders"}, "sink": {"type": "stdout"}}.';
    end if;
    v_config := jsonb_build_object(
        'config_version', 1,
        'source_type', coalesce(p_config #>> '{source,type}', p_source_type),
        'sink_type', coalesce(p_config #>> '{sink,type}', p_sink_type)) || p_config;
    foreach v_role in array array['source', 'sink'] loop
        if jsonb_typeof(v_config -> v_role) = 'object'
            and not v_config -> v_role ? 'type'
            and coalesce(p_config ->> (v_role || '_type'), case v_role
                when 'source' then nullif(p_source_type, 'outbox') else p_sink_type end) is not null
        then
            v_config := jsonb_set(v_config, array[v_role, 'type'], v_config -> (v_role || '_type'));
        end if;
    end loop;
    return v_config;
end
$$;

comment on function pgtrickle.relay_complete_config(jsonb, text, text) is
    'Fill in what follows from the rest: version and types.';

revoke all on function pgtrickle.relay_complete_config(jsonb, text, text) from public;

create or replace function pgtrickle.relay_set_forward(p_name text, p_config jsonb, p_enabled boolean)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_config jsonb := pgtrickle.relay_complete_config(p_config, 'outbox', null);
    v_outbox text := v_config #>> '{source,outbox}';
    v_outbox_table text;
    v_start record;
begin
    perform pgtrickle.relay_check_name(p_name);
    perform pgtrickle.relay_validate_config('forward', v_config);
    select o.outbox_table into v_outbox_table from pgtrickle.relay_outbox(v_outbox) as o;
    if v_config #>> '{sink,type}' = 'pg-inbox'
        and v_config #>> '{sink,inbox}' is not null
        and not v_config -> 'sink' ?| array['url', 'profile']
    then
        perform pgtrickle.relay_find_inbox(v_config #>> '{sink,inbox}', v_config #>> '{sink,schema}');
    end if;

    v_start := pgtrickle.relay_start_of(p_name, v_outbox, coalesce(v_config ->> 'start', 'earliest'));
    insert into pgtrickle.relay_outbox_config as c (name, enabled, config, start_after_id, start_gaps)
    values (p_name, coalesce(p_enabled, true), v_config, v_start.after_id, v_start.gaps)
    on conflict (name) do update
    set
        enabled = excluded.enabled,
        config = excluded.config,
        start_after_id = excluded.start_after_id,
        start_gaps = excluded.start_gaps,
        updated_at = now();

    if v_config #>> '{source,consumer_group}' is not null then
        perform pgtrickle.relay_group_create(
            v_config #>> '{source,consumer_group}', v_outbox_table,
            coalesce(v_config ->> 'start', 'earliest'));
    end if;
end
$$;

comment on function pgtrickle.relay_set_forward(text, jsonb, boolean) is
    'Check and write a forward pipeline; its outbox must be enabled, its consumer group is made.';

revoke all on function pgtrickle.relay_set_forward(text, jsonb, boolean) from public;

create or replace function pgtrickle.relay_start_of(
    p_name text,
    p_outbox text,
    p_start text,
    out after_id bigint,
    out gaps int8multirange
)
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    after_id := 0;
    gaps := '{}';
    if p_start <> 'latest' then
        return;
    end if;
    -- Set again before it ran, it still owes what came after it was first set.
    select c.start_after_id, c.start_gaps into after_id, gaps
    from pgtrickle.relay_outbox_config as c
    where c.name = p_name
        and c.config ->> 'start' = 'latest'
        and c.config #>> '{source,outbox}' = p_outbox;
    if not found then
        select e.after_id, e.gaps into after_id, gaps from pgtrickle.relay_outbox_end(p_outbox) as e;
    end if;
end
$$;

comment on function pgtrickle.relay_start_of(text, text, text) is
    'Where a pipeline''s new position starts: at 0, or for latest behind what is visible now.';

revoke all on function pgtrickle.relay_start_of(text, text, text) from public;

create or replace function pgtrickle.relay_keep_at_least(p_outbox text, p_hours integer)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if p_hours < 1 then
        raise exception using errcode = 'RL010', message = format('retention_hours is %s', p_hours), hint = 'It must be 1 or more.';
    end if;
    -- The extension's outboxes have no settings of ours: the extension looks after them.
    update pgtrickle.pgt_outbox_config as c
    set retention_hours = p_hours
    from pgtrickle.relay_outbox(p_outbox) as o
    where c.outbox_table_name = o.outbox_table
        and c.retention_hours < p_hours
        and exists (
            select from pgtrickle.relay_outbox_settings as s where s.outbox_table_name = o.outbox_table);
end
$$;

comment on function pgtrickle.relay_keep_at_least(text, integer) is
    'Raise the retention of an outbox; never lowers it, since other pipelines may need it.';

revoke all on function pgtrickle.relay_keep_at_least(text, integer) from public;

create or replace function pgtrickle.set_relay_inbox(
    name text,
    inbox text,
    source jsonb,
    max_retries integer default 5,
    schedule text default '1s',
    with_dead_letter boolean default true,
    retention_hours integer default null,
    enabled boolean default true
)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgtrickle.relay_set_reverse(
        name,
        jsonb_build_object(
            'source', source,
            'sink', jsonb_build_object('type', 'pg-inbox', 'inbox', inbox)),
        enabled, max_retries, schedule, with_dead_letter, retention_hours);
end
$$;

comment on function pgtrickle.set_relay_inbox(text, text, jsonb, integer, text, boolean, integer, boolean) is
    'Make or change a pipeline from a source to an inbox. A missing inbox is created with the settings given; one that is there keeps its own. Definer: callers have no right on the catalog.';

revoke all on function pgtrickle.set_relay_inbox(text, text, jsonb, integer, text, boolean, integer, boolean) from public;

create or replace function pgtrickle.set_relay_inbox(
    name text,
    inbox text,
    source text
)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgtrickle.set_relay_inbox(name, inbox, source::jsonb);
exception
    when invalid_text_representation then
        raise exception using errcode = 'RL010', message = 'source is not valid JSON', hint = 'As in {"type": "nats", "url": "nats://host", "subject": "orders.>"}.';
end
$$;

comment on function pgtrickle.set_relay_inbox(text, text, text) is
    'The same with the source as text. Without it a call with three plain literals would be ambiguous: PostgreSQL can''t tell the source from the config form''s boolean. Definer: callers have no right on the catalog.';

revoke all on function pgtrickle.set_relay_inbox(text, text, text) from public;

create or replace function pgtrickle.set_relay_inbox(
    name text,
    config jsonb,
    enabled boolean default true
)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgtrickle.relay_set_reverse(name, config, enabled, 5, '1s', true, null);
end
$$;

comment on function pgtrickle.set_relay_inbox(text, jsonb, boolean) is
    'Make or change a pipeline from a source to an inbox: {"source": {"type": …}, "sink": {"inbox": …}, …} with any keys of a pipeline. A missing inbox is created. Definer: callers have no right on the catalog.';

revoke all on function pgtrickle.set_relay_inbox(text, jsonb, boolean) from public;

create or replace function pgtrickle.relay_set_reverse(
    p_name text,
    p_config jsonb,
    p_enabled boolean,
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
    v_config jsonb := pgtrickle.relay_complete_config(p_config, null, 'pg-inbox');
    v_inbox text := v_config #>> '{sink,inbox}';
    v_schema text := v_config #>> '{sink,schema}';
begin
    perform pgtrickle.relay_check_name(p_name);
    perform pgtrickle.relay_validate_config('reverse', v_config);
    if v_inbox is not null and not v_config -> 'sink' ?| array['url', 'profile'] then
        begin
            perform pgtrickle.relay_find_inbox(v_inbox, v_schema);
        exception
            when sqlstate 'RL030' then
                if coalesce(v_schema, 'pgtrickle') <> 'pgtrickle' then
                    -- In a schema of others only its owner creates tables.
                    raise;
                end if;
                perform pgtrickle.relay_create_inbox(
                    v_inbox, p_max_retries, p_schedule, p_with_dead_letter, p_retention_hours);
        end;
    end if;
    insert into pgtrickle.relay_inbox_config as c (name, enabled, config)
    values (p_name, coalesce(p_enabled, true), v_config)
    on conflict (name) do update
    set enabled = excluded.enabled, config = excluded.config, updated_at = now();
end
$$;

comment on function pgtrickle.relay_set_reverse(text, jsonb, boolean, integer, text, boolean, integer) is
    'Check and write a reverse pipeline; its inbox is created where it is missing.';

revoke all on function pgtrickle.relay_set_reverse(text, jsonb, boolean, integer, text, boolean, integer) from public;

-- ---------------------------------------------------------------------------
-- Switching, deleting, looking
-- ---------------------------------------------------------------------------

create or replace function pgtrickle.relay_require_pipeline(p_name text)
returns text
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_direction text;
    v_near text;
begin
    select n.direction into v_direction from pgtrickle.relay_pipeline_names as n where n.name = p_name;
    if not found then
        v_near := pgtrickle.relay_nearest(
            p_name, array(select n.name from pgtrickle.relay_pipeline_names as n));
        raise exception using
            errcode = 'RL011',
            message = format('there is no pipeline "%s"', coalesce(p_name, 'null')),
            hint = coalesce(
                format('Did you mean "%s"?', v_near),
                'select name, direction, enabled from pgtrickle.list_relay_configs();');
    end if;
    return v_direction;
end
$$;

comment on function pgtrickle.relay_require_pipeline(text) is
    'Direction of a pipeline; RL011 where there is none of this name.';

revoke all on function pgtrickle.relay_require_pipeline(text) from public;

create or replace function pgtrickle.relay_switch(p_name text, p_enabled boolean)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    v_direction text := pgtrickle.relay_require_pipeline(p_name);
begin
    if v_direction = 'forward' then
        update pgtrickle.relay_outbox_config as c
        set enabled = p_enabled, updated_at = now()
        where c.name = p_name and c.enabled <> p_enabled;
    else
        update pgtrickle.relay_inbox_config as c
        set enabled = p_enabled, updated_at = now()
        where c.name = p_name and c.enabled <> p_enabled;
    end if;
end
$$;

comment on function pgtrickle.relay_switch(text, boolean) is
    'Enable or disable a pipeline; writes only where that changes something.';

revoke all on function pgtrickle.relay_switch(text, boolean) from public;

create or replace function pgtrickle.enable_relay(name text)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgtrickle.relay_validate_config(
        pgtrickle.relay_require_pipeline(name), pgtrickle.relay_config_of(name));
    perform pgtrickle.relay_switch(name, true);
end
$$;

comment on function pgtrickle.enable_relay(text) is
    'Start a pipeline where it stopped, or where it was set to start. Definer: callers have no right on the catalog.';

revoke all on function pgtrickle.enable_relay(text) from public;

create or replace function pgtrickle.disable_relay(name text)
returns void
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
    select pgtrickle.relay_switch(name, false)
$$;

comment on function pgtrickle.disable_relay(text) is
    'Stop a pipeline; its position stays, and its outbox keeps what it has not delivered. Definer: callers have no right on the catalog.';

revoke all on function pgtrickle.disable_relay(text) from public;

create or replace function pgtrickle.delete_relay(name text)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_direction text := pgtrickle.relay_require_pipeline(name);
    v_positions bigint;
begin
    delete from pgtrickle.relay_outbox_config as c where c.name = delete_relay.name;
    delete from pgtrickle.relay_inbox_config as c where c.name = delete_relay.name;
    delete from pgtrickle.relay_consumer_offsets as o where o.pipeline_id = delete_relay.name;
    get diagnostics v_positions = row_count;
    delete from pgtrickle.relay_pending_gaps as g where g.pipeline_id = delete_relay.name;
    delete from pgtrickle.relay_cursors as c where c.pipeline_id = delete_relay.name;
    if v_positions > 0 then
        raise notice using
            message = format('the position of %s pipeline "%s" is deleted with it', v_direction, name),
            hint = 'A pipeline that is set under this name starts anew. Dead letters and consumer groups stay.';
    end if;
end
$$;

comment on function pgtrickle.delete_relay(text) is
    'Delete a pipeline and its position in all relay groups; its dead letters and its consumer group stay. Definer: callers have no right on the catalog.';

revoke all on function pgtrickle.delete_relay(text) from public;

create or replace function pgtrickle.relay_config_of(p_name text)
returns jsonb
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select c.config from pgtrickle.relay_outbox_config as c where c.name = p_name
    union all
    select c.config from pgtrickle.relay_inbox_config as c where c.name = p_name
$$;

comment on function pgtrickle.relay_config_of(text) is
    'Configuration of a pipeline of either direction.';

revoke all on function pgtrickle.relay_config_of(text) from public;

create or replace function pgtrickle.get_relay_config(name text)
returns jsonb
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgtrickle.relay_require_pipeline(name);
    return pgtrickle.relay_config_of(name);
end
$$;

comment on function pgtrickle.get_relay_config(text) is
    'Configuration of a pipeline; secrets in it are references. Definer: callers have no right on the catalog.';

revoke all on function pgtrickle.get_relay_config(text) from public;

create or replace function pgtrickle.list_relay_configs()
returns table (name text, direction text, enabled boolean, config jsonb)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select c.name, 'forward', c.enabled, c.config from pgtrickle.relay_outbox_config as c
    union all
    select c.name, 'reverse', c.enabled, c.config from pgtrickle.relay_inbox_config as c
    order by 1
$$;

comment on function pgtrickle.list_relay_configs() is
    'All pipelines, forward and reverse. Definer: callers have no right on the catalog.';

revoke all on function pgtrickle.list_relay_configs() from public;
