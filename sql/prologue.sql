-- Opens each transaction of the migrator, as the migrating role: roles, schema, and a function that
-- runs the file's statements as the schema's owner.
--
-- The migrating role may be a superuser and the owner is not, so nothing that the owner could have
-- changed runs outside of that function: inside a definer function nobody can take the rights of
-- the session back. Out here only PostgreSQL's own catalogs are read.

set local search_path = pg_catalog, pg_temp;

do $prologue$
declare
    wanted name;
    owner_role name;
    suspect text;
    migrating_role text := current_setting('role');
    is_first boolean;
    has_owner constant boolean := to_regrole('pgtrickle_owner') is not null;
begin
    select format('extension %s %s', e.extname, e.extversion)
    into suspect
    from pg_extension as e
    left join pg_namespace as n on n.nspname = @schema_name@
    left join pg_depend as d
        on d.classid = 'pg_namespace'::regclass and d.objid = n.oid
        and d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid and d.deptype = 'e'
    where d.objid is not null or (e.extnamespace = n.oid and e.extname = 'pg_trickle');
    if found then
        raise exception using
            errcode = 'object_not_in_prerequisite_state',
            message = format('schema %I belongs to %s: nothing was changed', @schema_name@, suspect),
            hint = 'give the relay a schema of its own: postgres.schema=pgtrickle_relay';
    end if;

    foreach wanted in array array['pgtrickle_owner', 'pgtrickle_relay', 'pgtrickle_publisher']::name[] loop
        if not exists (select from pg_roles as r where r.rolname = wanted) then
            begin
                execute format('create role %I nologin', wanted);
            exception
                when duplicate_object or unique_violation then
                    -- Roles belong to the cluster: a migration of another database was faster.
                    null;
                when insufficient_privilege then
                    raise notice 'role % is missing and % may not create it', wanted, current_user;
            end;
        end if;
    end loop;

    is_first := not exists (
        select from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
        where n.nspname = @schema_name@ and c.relname = 'relay_migrations'
    );
    select pg_get_userbyid(n.nspowner) into owner_role from pg_namespace as n where n.nspname = @schema_name@;
    if is_first and owner_role is distinct from 'pgtrickle_owner' then
        if owner_role not in (current_user, session_user) then
            raise exception using
                errcode = 'object_not_in_prerequisite_state',
                message = format('schema %I is there already and belongs to %I', @schema_name@, owner_role),
                hint = format('give the relay another schema with postgres.schema, or: alter schema %I owner to pgtrickle_owner', @schema_name@);
        end if;
        if exists (select from pg_roles as r where r.rolname = 'pgtrickle_owner') then
            begin
                if not pg_has_role('pgtrickle_owner', 'usage') then
                    execute format('grant pgtrickle_owner to %I', current_user);
                end if;
                -- A dry run: since PostgreSQL 16 membership alone does not allow it.
                perform set_config('role', 'pgtrickle_owner', true);
                perform set_config('role', migrating_role, true);
                if owner_role is not null then
                    execute format('alter schema %I owner to pgtrickle_owner', @schema_name@);
                end if;
                owner_role := 'pgtrickle_owner';
            exception
                when insufficient_privilege then
                    null;
            end;
        end if;
    end if;
    owner_role := coalesce(owner_role, current_user);
    if owner_role not in ('pgtrickle_owner', current_user, session_user) and exists (
        select from pg_roles as m
        join pg_roles as o on o.rolname = owner_role
        where m.rolname = current_user and m.rolsuper and not o.rolsuper
    ) then
        raise exception using
            errcode = 'object_not_in_prerequisite_state',
            message = format('schema %I belongs to %I, for whom a superuser runs nothing', @schema_name@, owner_role),
            hint = format('let %I migrate, or give the relay another schema with postgres.schema', owner_role);
    end if;

    select string_agg(format('%I', m.rolname), ', ' order by m.rolname)
    into suspect
    from pg_auth_members as a
    join pg_roles as o on o.oid = a.roleid and o.rolname = 'pgtrickle_owner'
    join pg_roles as m on m.oid = a.member
    where is_first and a.admin_option and not m.rolsuper and m.rolname not in (current_user, session_user);
    if suspect is not null then
        raise exception using
            errcode = 'object_not_in_prerequisite_state',
            message = format('%s may give role pgtrickle_owner to anybody, and with it everything in the schema', suspect),
            hint = format('revoke pgtrickle_owner from %s, or let that role migrate', suspect);
    end if;
    if exists (
        select from pg_roles as r
        where r.rolname = 'pgtrickle_owner'
            and (r.rolsuper or r.rolcanlogin or r.rolcreaterole or r.rolcreatedb or r.rolreplication or r.rolbypassrls
                or exists (select from pg_auth_members as a where a.member = r.oid))
    ) then
        raise exception using
            errcode = 'object_not_in_prerequisite_state',
            message = 'role pgtrickle_owner has rights of its own: it is the owner of the schema and nothing else',
            hint = 'alter role pgtrickle_owner nosuperuser nologin nocreaterole nocreatedb noreplication nobypassrls, and revoke every role from it';
    end if;

    select string_agg(x.remedy, '; ')
    into suspect
    from (
        select format('grant usage on schema %1$I to %2$I; grant select on %3$s to %2$I',
            min(s.nspname), r.name, string_agg(c.oid::regclass::text, ', ' order by c.relname)) as remedy
        from pg_extension as e
        join pg_depend as d on d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid and d.deptype = 'e'
        join pg_class as c on d.classid = 'pg_class'::regclass and c.oid = d.objid
        join pg_namespace as s on s.oid = c.relnamespace
        cross join (select owner_role union select current_user) as r (name)
        where e.extname = 'pg_trickle'
            and c.relname in ('pgt_stream_tables', 'pgt_dependencies')
            and (not has_table_privilege(r.name, c.oid, 'select') or not has_schema_privilege(r.name, s.oid, 'usage'))
            and exists (
                select
                from pg_event_trigger as t
                join pg_depend as f on f.classid = 'pg_proc'::regclass and f.objid = t.evtfoid and f.deptype = 'e'
                where f.refobjid = e.oid and t.evtenabled <> 'D'
            )
        group by r.name
    ) as x;
    if suspect is not null then
        raise exception using
            errcode = 'insufficient_privilege',
            message = 'the event triggers of pg_trickle would refuse what is to be created: nothing was changed',
            detail = 'They read its catalog with the rights of whoever creates a table or function.',
            hint = case when has_owner then '' else 'create role pgtrickle_owner nologin; ' end || suspect;
    end if;

    if not exists (select from pg_namespace as n where n.nspname = @schema_name@) then
        execute format('create schema %I authorization %I', @schema_name@, owner_role);
    end if;
    select string_agg(format('%s (of %I)', x.object, pg_get_userbyid(x.owner)), ', ' order by x.object)
    into suspect
    from pg_namespace as n
    cross join lateral (
        select c.oid::regclass::text as object, c.relowner as owner from pg_class as c where c.relnamespace = n.oid
        union all
        select p.oid::regprocedure::text, p.proowner from pg_proc as p where p.pronamespace = n.oid
        union all
        select t.oid::regtype::text, t.typowner from pg_type as t where t.typnamespace = n.oid
        union all
        select o.oid::regoperator::text, o.oprowner from pg_operator as o where o.oprnamespace = n.oid
        union all
        select 'the right to create', a.grantee
        from aclexplode(n.nspacl) as a
        where a.privilege_type = 'CREATE'
    ) as x
    where n.nspname = @schema_name@ and x.owner <> n.nspowner;
    if suspect is not null then
        raise exception using
            errcode = 'object_not_in_prerequisite_state',
            message = format('schema %I holds what does not belong to its owner %I: %s', @schema_name@, owner_role, suspect),
            hint = format('drop it, or: revoke create on schema %I from ...', @schema_name@);
    end if;

    begin
        perform set_config('role', owner_role, true);
    exception
        when insufficient_privilege then
            raise exception using
                errcode = 'insufficient_privilege',
                message = format('%I may not act as %I, which owns the relay catalog', current_user, owner_role),
                hint = format('grant %I to %I', owner_role, current_user);
    end;
    if not is_first then
        -- What follows reads and writes it with the owner's rights, whose deferred triggers would run
        -- with those of the session. The lock keeps it as it is from here on.
        execute format('lock table %I.relay_migrations in share update exclusive mode', @schema_name@);
        if exists (
            select
            from pg_class as c
            join pg_namespace as n on n.oid = c.relnamespace
            where n.nspname = @schema_name@ and c.relname = 'relay_migrations' and (
                c.relkind <> 'r' or c.relrowsecurity
                or exists (select from pg_trigger as t where t.tgrelid = c.oid)
                or exists (select from pg_rewrite as r where r.ev_class = c.oid)
                or exists (select from pg_inherits as i where c.oid in (i.inhrelid, i.inhparent))
                or exists (select from pg_constraint as k where k.conrelid = c.oid and k.contype not in ('p', 'n'))
                or exists (select from pg_attribute as a where a.attrelid = c.oid and a.atttypid >= 16384)
                or exists (
                    select from pg_index as i
                    where i.indrelid = c.oid and not (i.indisprimary and i.indexprs is null and 16384 > all (i.indclass)))
                or exists (
                    select from pg_attrdef as f
                    where f.adrelid = c.oid and pg_get_expr(f.adbin, f.adrelid) <> 'now()')
            )
        ) then
            raise exception using
                errcode = 'object_not_in_prerequisite_state',
                message = format('%I.relay_migrations is not the table that migrate made', @schema_name@),
                hint = format('undo what was done to it, and find out who has the rights of %I', owner_role);
        end if;
    end if;
    create function @schema@.relay_apply(statements text, question text)
    returns jsonb
    language plpgsql
    volatile
    security definer
    set search_path = pg_catalog, pg_temp
    set client_min_messages = warning
    as $apply$
    declare
        answer jsonb;
    begin
        execute statements;
        execute question into answer;
        return answer;
    end
    $apply$;
    comment on function @schema@.relay_apply(text, text) is
        'For the transaction of the migrator alone. Definer: so that what it runs has the owner''s rights and can''t get more.';
    revoke all on function @schema@.relay_apply(text, text) from public;
    perform set_config('role', migrating_role, true);
end
$prologue$;
