-- What can be known of a pipeline's shape when it is set: ops, select, exclude, rename, mask. The
-- condition in where is compiled by the relay.

create or replace function @schema@.relay_check_shape(p_config jsonb, p_outbox_table text)
returns void
language plpgsql stable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_rename constant jsonb := coalesce(nullif(p_config -> 'rename', 'null'), '{}');
    v_mask constant jsonb := coalesce(nullif(p_config -> 'mask', 'null'), '{}');
    v_table oid;
    v_problem text[];
begin
    if not p_config ?| array['ops', 'select', 'exclude', 'rename', 'mask'] then
        return;
    end if;
    v_table := case when p_outbox_table is not null then @schema@.relay_captured_table(p_outbox_table) end;
    with named as (
        select k.key, c.name
        from unnest(array['select', 'exclude']) as k (key)
        cross join lateral jsonb_array_elements_text(nullif(p_config -> k.key, 'null')) as c (name)
        union all
        select 'rename', n.name from jsonb_object_keys(v_rename) as n (name)
        union all
        select 'mask', n.name from jsonb_object_keys(v_mask) as n (name)
    ), columns as (
        select a.attname::text as name
        from pg_attribute as a
        where a.attrelid = v_table and a.attnum > 0 and not a.attisdropped
    ), needed as (
        select 'key' as whose, c.name
        from unnest(coalesce(
            array(select jsonb_array_elements_text(nullif(p_config -> 'key_columns', 'null'))),
            '{}')) as c (name)
        union all
        select 'key', c.name
        from @schema@.pgt_outbox_config as o
        cross join unnest(o.key_columns) as c (name)
        where o.outbox_table_name = p_outbox_table
            and c.name <> '__pgt_row_id'
            and coalesce(p_config -> 'key_columns', 'null') = 'null'
        union all
        select r.key, substring(p_config ->> r.key, '^payload:([^.]+)')
        from unnest(array['dedup_key_from', 'event_type_from']) as r (key)
        union all
        -- Templates name what goes out.
        select 'a template of the sink', coalesce(
            (select n.key from jsonb_each_text(v_rename) as n where n.value = t.found[1]), t.found[1])
        from regexp_matches(
            replace(p_config ->> 'sink', '{{', ''), '\{payload\.([^.{}"\\]+)', 'g') as t (found)
    )
    select p.problem into v_problem
    from (
        select array[
            format('%s names the column "%s", which table %s does not have', n.key, n.name, v_table::regclass),
            coalesce(
                'Did you mean "' || @schema@.relay_nearest(n.name, array(select c.name from columns as c)) || '"?',
                'Columns are named as the table has them.')] as problem
        from named as n
        where v_table is not null and n.name not in (select c.name from columns as c)
        union all
        select array[
            format('%s needs the column "%s", which %s', n.whose, n.name, h.how),
            'It has to go out as it is.']
        from needed as n
        cross join lateral (
            select min(x.how)
            from (
                select case m.key when 'exclude' then 'exclude leaves out' else 'mask changes' end
                from named as m
                where m.key in ('exclude', 'mask') and m.name = n.name
                union all
                select 'select does not list'
                where jsonb_typeof(p_config -> 'select') = 'array' and not p_config -> 'select' ? n.name
            ) as x (how)
        ) as h (how)
        where h.how is not null
        union all
        select array[
            format('mask.%s has not exactly one of hash and keep_last', m.key),
            'As in {"hash": "${env:NAME}"} or {"keep_last": 4}.']
        from jsonb_each(v_mask) as m
        where jsonb_typeof(m.value) = 'object'
            and (select count(*) from jsonb_object_keys(case jsonb_typeof(m.value) when 'object' then m.value else '{}' end)) <> 1
        union all
        select array[
            'ops names update, which needs collapse_updates',
            'Without it an update of an outbox is a delete and an insert.']
        where p_outbox_table is not null
            and p_config -> 'ops' ? 'update'
            and lower(p_config ->> 'collapse_updates') is distinct from 'true'
    ) as p
    limit 1;
    if v_problem is not null then
        raise exception using errcode = 'RL010', message = v_problem[1], hint = v_problem[2];
    end if;
end
$$;
comment on function @schema@.relay_check_shape(jsonb, text) is
    'Runs as its caller, which is relay_set_pipeline. RL010 where a pipeline names a column that the captured table does not have, or hides one that its key, a rule or a template needs.';
