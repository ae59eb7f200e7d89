-- Applies relay_key_rules to a pipeline. Checks return what is wrong: message, hint, error code.

create or replace function @schema@.relay_check_value(
    p_path text, p_rule jsonb, p_value jsonb, p_plaintext boolean
) returns text[]
language plpgsql immutable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_rules constant jsonb := @schema@.relay_key_rules();
    v_rule constant jsonb := (v_rules #> array['types', p_rule ->> 'is']) || p_rule;
    v_kind text := jsonb_typeof(p_value);
    v_text text := p_value #>> '{}';
    -- Nothing is left of what a template may have in it.
    v_bare text := regexp_replace(v_text, v_rules ->> 'in_template', '', 'g');
    v_name text := substring(v_bare, '\{([^{}]*)\}');
    v_must text := coalesce(
        p_rule ->> 'must',
        (select string_agg(w.word, ' or ') from jsonb_array_elements_text(p_rule -> 'words') as w (word)),
        concat(v_rule ->> 'must', ' from ' || (v_rule ->> 'ge') || coalesce(' to ' || (v_rule ->> 'le'), ' on')));
    v_is text;
begin
    if p_value is null or (p_path ~ '\.' and v_text ~ '^\$\{(env|file):[^}]+\}$') then
        return null;
    elsif not v_rule -> 'kinds' ? v_kind then
        v_is := case v_kind when 'string' then 'a text that does not fit' else 'of type ' || v_kind end;
    elsif v_kind in ('array', 'object') then
        return (
            select @schema@.relay_check_value(e.path, coalesce(v_rule #> array['members', e.name], v_rule -> 'of'), e.value, p_plaintext) as problem
            from (
                select o.key, p_path || '.' || o.key, o.value from jsonb_each(case v_kind when 'object' then p_value else '{}' end) as o
                union all
                select null, p_path, a.value from jsonb_array_elements(case v_kind when 'array' then p_value else '[]' end) as a
            ) as e (name, path, value)
            where v_rule ? 'of'
            order by problem limit 1);
    elsif not v_rule -> 'words' ? v_text then
        v_is := quote_literal(v_text);
    elsif v_text !~ (v_rule ->> 'pattern') then
        v_is := case v_kind when 'string' then 'a text that does not fit' else v_text end;
    elsif v_rule ?| array['ge', 'le'] then
        v_is := case when v_text::numeric not between coalesce((v_rule ->> 'ge')::numeric, '-infinity')
            and coalesce((v_rule ->> 'le')::numeric, 'infinity') then v_text end;
    end if;
    return case
        when v_is is not null then array[format('%s is %s', p_path, v_is), format('It must be %s.', v_must)]
        when p_plaintext is not true and (
            regexp_replace(v_text, '\$\{(env|file):[^}]+\}', '', 'g') ~* (v_rules ->> 'secret_in_url')
            or (v_text !~* (v_rules ->> 'references_only')
                and (v_rule ? 'secret' or p_path ~* (v_rules ->> 'secret_header'))))
            then array[p_path || ' holds a secret in plain text', v_rules ->> 'secret_hint', 'RL013']
        when v_rule ->> 'is' <> 'template' then null
        when v_text = '' then array[p_path || ' is empty', 'Leave it out for the default.']
        when v_name is not null then array[
            format('%s has an unknown variable {%s}', p_path, v_name),
            (select concat('Did you mean {' || @schema@.relay_nearest(v_name, array_agg(v.name)) || '}? ',
                format('Known are {%s} and {payload.<field>}.', string_agg(v.name, '}, {')))
            from jsonb_array_elements_text(v_rules -> 'variables') as v (name))]
        when v_bare ~ '[{}]' then array[p_path || ' has a brace without its partner', 'Write {{ and }} for literal braces.']
    end;
end
$$;
comment on function @schema@.relay_check_value(text, jsonb, jsonb, boolean) is
    'What is wrong with a value, or inside it. Shows it only where it can be no secret.';

create or replace function @schema@.relay_check_keys(
    p_role text, p_places text[], p_options jsonb, p_plaintext boolean
) returns text[]
language plpgsql immutable security invoker set search_path = pg_catalog, pg_temp as $$
declare
    v_prefix text := case when p_role in ('source', 'sink') then p_role || '.' else '' end;
    v_rules jsonb := (
        select jsonb_object_agg(k.key, r.rule)
        from jsonb_array_elements(@schema@.relay_key_rules() -> 'rules') as r (rule)
        cross join jsonb_array_elements_text(r.rule -> 'keys') as k (key)
        where r.rule -> 'in' ?| p_places
    ) || case v_prefix when '' then '{}' else
        jsonb_build_object('type', jsonb_build_object('is', 'word', 'words', p_places[1:1])) end;
    v_known text[] := array(select r.key from jsonb_each(v_rules) as r where not r.value ? 'refused');
    v_given text[] := array(select o.key from jsonb_each_text(p_options) as o where o.value not in ('', 'false'));
    v_problem text[];
    r record;
begin
    for r in
        select o.key, o.value, v_rules -> o.key as rule, v_prefix || o.key as path,
            case when not v_rules ? o.key then @schema@.relay_nearest(o.key, v_known) end as near
        from jsonb_each(p_options) as o
        order by o.key
    loop
        v_problem := case
            when r.rule ? 'refused' then array[format('%s %s', r.path, r.rule #>> '{refused,0}'), r.rule #>> '{refused,1}']
            when v_rules ? r.key then @schema@.relay_check_value(r.path, r.rule, nullif(r.value, 'null'), p_plaintext)
            when r.near is not null then array[r.path || ' is not a known key', format('Did you mean %s?', r.near)]
            when v_prefix = '' then array[r.key || ' is not a key of the pipeline itself', 'Does it belong into the source or sink object?']
            else array[r.path || ' is not a known key', format('Known are %s.', array_to_string(v_known, ', '))]
        end;
        exit when v_problem is not null;
    end loop;
    for r in
        select k.key, k.value as rule, v_prefix || k.key as path, k.value ->> 'needs' as needs, k.value ->> 'required_unless' as other
        from jsonb_each(v_rules) as k
        where v_problem is null
    loop
        v_problem := case
            when r.rule ?| array['required', 'required_unless'] and not array[r.key, r.other] && v_given then
                array[concat_ws(' or ', r.path, v_prefix || r.other) || ' is missing', format('The %s needs it%s.',
                    concat_ws(' ', p_options ->> 'type', p_role), case r.other when 'profile' then '; a profile brings endpoint and credentials' end)]
            when r.rule ? 'connection' and p_options ? r.key and 'profile' = any (v_given) then
                array[r.path || ' can''t be combined with a profile', 'Endpoint, credentials and TLS come from a profile as a whole.']
            when r.key <> all (v_given) then null
            when r.needs <> all (v_given) then array[format('%s needs %s', r.path, r.needs), 'Set both, or neither.']
            when r.rule -> 'excludes' ?| v_given then
                array[format('%s has both %s and %s', p_role, r.key, (select x from unnest(v_given) as x where r.rule -> 'excludes' ? x limit 1)), 'Leave one of them out.']
        end;
        exit when v_problem is not null;
    end loop;
    return v_problem;
end
$$;
comment on function @schema@.relay_check_keys(text, text[], jsonb, boolean) is
    'What is wrong with the keys of a source or sink object, or of the pipeline itself, by the rules of these places; of a source or sink its type comes first.';

create or replace function @schema@.relay_validate_config(p_direction text, p_config jsonb)
returns void
language plpgsql immutable security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_roles constant jsonb := @schema@.relay_key_rules() -> 'roles';
    v_plaintext constant boolean := lower(p_config ->> 'allow_plaintext_secrets') = 'true';
    v_problem text[];
    r record;
begin
    v_problem := case
        when p_direction is null or p_direction not in ('forward', 'reverse') then
            array[format('%L is no direction of a pipeline', p_direction), 'forward: outbox to broker; reverse: broker to inbox.', '22023']
        when p_config is null or jsonb_typeof(p_config) <> 'object' then
            array['the configuration is not a JSON object', 'As in {"source": {"outbox": "orders"}, "sink": {"type": "stdout"}}.']
        else @schema@.relay_check_keys(p_direction || ' pipeline', array['pipeline', 'pipeline.' || p_direction], p_config, v_plaintext)
    end;
    for r in
        select x.role, p_config ->> (x.role || '_type') as type, p_config -> x.role as options,
            array(select b.key from jsonb_each(v_roles) as b where b.value ? x.role and b.key <> 'outbox' order by b.key) as types
        from unnest(array['source', 'sink']) as x (role)
        where v_problem is null
    loop
        v_problem := coalesce(v_problem, case
            when r.type is null or (r.type <> 'outbox' and r.options ->> 'type' is null) then
                array[r.role || '.type is missing', format('It must be one of %s.', array_to_string(r.types, ', '))]
            when not coalesce(v_roles -> r.type ? r.role, false) then array[
                format('%s.type %L is not known', r.role, r.type),
                concat('Did you mean ' || @schema@.relay_nearest(r.type, r.types) || '? ', format('Known are %s.', array_to_string(r.types, ', ')))]
            else @schema@.relay_check_keys(r.role, array[r.type, r.type || '.' || r.role], r.options, v_plaintext)
        end);
    end loop;
    v_problem := coalesce(v_problem, case
        when (p_config ->> 'retry_max_ms')::bigint < (p_config ->> 'retry_initial_ms')::bigint then
            array['retry_max_ms is less than retry_initial_ms', 'The first wait is the shortest.']
        when p_config ?| array['parallelism', 'visibility_seconds'] and p_config #>> '{source,consumer_group}' is null then
            array[case when p_config ? 'parallelism' then 'parallelism' else 'visibility_seconds' end || ' needs a consumer group',
                'Name one in source.consumer_group; its workers share the rows, without order among them.']
        when @schema@.relay_partitioning(p_config - 'source') <> '{}' then case
            when p_config #>> '{source,consumer_group}' is not null then array[
                'partitions and a consumer group don''t go together',
                'With partitions readers share the keys, in order; workers of a group share the rows, without.']
            when (p_config ->> 'snapshot_markers')::boolean then array[
                'partitions and snapshot_markers don''t go together',
                'The rows between two markers would come from several readers.']
            when p_config ->> 'sink_type' = 'file' then array[
                'partitions need another sink than file', 'A file has one writer.']
        end
    end);
    if v_problem is not null then
        raise exception using errcode = coalesce(v_problem[3], 'RL010'), message = v_problem[1], hint = v_problem[2];
    end if;
end
$$;
comment on function @schema@.relay_validate_config(text, jsonb) is
    'Check a pipeline''s configuration by itself, forward or reverse: keys, types, templates (RL010) and plaintext secrets (RL013). What it refers to is not looked up. Definer: reads nothing but its arguments and our own rules.';
