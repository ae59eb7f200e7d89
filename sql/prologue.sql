-- Opens each transaction of the migrator: roles, schema, record of migrations,
-- and from its end on the transaction works as the owner of what it creates.

set local search_path = pg_catalog, pg_temp;

do $prologue$
declare
    wanted name;
    owner_role name;
    migrating_role text := pg_catalog.current_setting('role');
begin
    perform pg_catalog.set_config('pgtrickle.migrating_role', migrating_role, true);


    foreach wanted in array array['pgtrickle_owner', 'pgtrickle_relay', 'pgtrickle_publisher']::name[]
    loop
        if not exists (select from pg_catalog.pg_roles as r where r.rolname = wanted) then
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

    select pg_catalog.pg_get_userbyid(c.relowner)
    into owner_role
    from pg_catalog.pg_class as c
    where c.oid = pg_catalog.to_regclass('pgtrickle.relay_migrations');

    if owner_role is null then
        owner_role := current_user;
        if exists (select from pg_catalog.pg_roles as r where r.rolname = 'pgtrickle_owner') then
            begin
                if not pg_catalog.pg_has_role('pgtrickle_owner', 'usage') then
                    execute format('grant pgtrickle_owner to %I', current_user);
                end if;
                -- A dry run: since PostgreSQL 16 membership alone does not allow it.
                perform pg_catalog.set_config('role', 'pgtrickle_owner', true);
                perform pg_catalog.set_config('role', migrating_role, true);
                owner_role := 'pgtrickle_owner';
            exception
                when insufficient_privilege then
                    null;
            end;
        end if;
    end if;

    if pg_catalog.to_regnamespace('pgtrickle') is null then
        execute format('create schema pgtrickle authorization %I', owner_role);
        comment on schema pgtrickle is 'Outboxes, inboxes and the catalog of pgtrickle-relay.';
    elsif not pg_catalog.has_schema_privilege(owner_role, 'pgtrickle', 'create') then
        execute format('grant usage, create on schema pgtrickle to %I', owner_role);
    end if;

    begin
        perform pg_catalog.set_config('role', owner_role, true);
    exception
        when insufficient_privilege then
            raise exception using
                errcode = 'insufficient_privilege',
                message = format('%s may not act as %s, which owns the relay catalog', current_user, owner_role),
                hint = format('grant %I to %I', owner_role, current_user);
    end;

    if pg_catalog.to_regclass('pgtrickle.relay_migrations') is null then
        create table pgtrickle.relay_migrations (
            filename text primary key,
            checksum text not null,
            version text not null,
            applied_at timestamptz not null default now()
        );

        comment on table pgtrickle.relay_migrations is
            'SQL files that were applied. Its owner is who the migrator acts as.';
        comment on column pgtrickle.relay_migrations.checksum is
            'SHA-256 of the file. A migration never changes; functions are applied again when theirs does.';
        comment on column pgtrickle.relay_migrations.version is
            'Version of the catalog that the file leads to.';
    end if;
end
$prologue$;
