-- Who may execute which function of ours: what is not listed here only its owner can call.

do $nothing_for_public$
declare
    signature regprocedure;
begin
    for signature in
        select p.oid
        from pg_catalog.pg_proc as p
        where p.pronamespace = 'pgtrickle'::pg_catalog.regnamespace
            and p.proowner = current_user::pg_catalog.regrole
    loop
        execute format('revoke execute on function %s from public', signature);
    end loop;
end
$nothing_for_public$;

-- Table owners enable their own tables: each of these checks ownership itself.
select pgtrickle.relay_grant_execute(
    'public',
    'enable_outbox',
    'disable_outbox',
    'outbox_status',
    'relay_outbox_report',
    'relay_create_outbox',
    'relay_open_capture',
    'relay_seal_capture',
    'relay_drop_outbox',
    'relay_attach_capture',
    'relay_capture_targets',
    'relay_missing_triggers',
    'relay_cut_name',
    'relay_find_relation',
    'relay_find_outbox',
    'relay_require_outbox',
    'relay_require_table_owner',
    'relay_role_in_force',
    'relay_outbox_capture'
);

select pgtrickle.relay_grant_execute(
    'pgtrickle_relay',
    'relay_outbox',
    'relay_outbox_of',
    'relay_sleep',
    'relay_wake',
    'relay_sweep_outbox',
    'relay_swept_outboxes',
    'relay_uncaptured_partitions',
    'outbox_rows_consumed',
    'outbox_rows_consumed_of'
);

select pgtrickle.relay_grant_execute(
    'pgtrickle_publisher',
    'outbox_publish',
    'relay_publish'
);

do $schema_usage$
begin
    if pg_catalog.pg_has_role(
        (select n.nspowner from pg_catalog.pg_namespace as n where n.nspname = 'pgtrickle'), 'usage'
    ) then
        grant usage on schema pgtrickle to public;
    end if;
end
$schema_usage$;

-- Outboxes of the extension belong to who installed it: reading them takes a
-- grant of theirs, which the migrating role gives when it can.
do $extension_outboxes$
declare
    owner_role name := current_user;
    relation regclass;
    reader text;
begin
    perform pg_catalog.set_config(
        'role', pg_catalog.current_setting('pgtrickle.migrating_role'), true
    );
    for relation, reader in
        select c.oid, r.rolname
        from pg_catalog.pg_class as c
        cross join pg_catalog.pg_roles as r
        where c.relnamespace = 'pgtrickle'::regnamespace
            and c.relowner <> owner_role::regrole
            and c.relkind in ('r', 'p', 'v', 'S')
            and (
                c.relname like 'outbox\_%'
                or (
                    c.relname in ('pgt_outbox_config', 'pgt_inbox_config')
                    and r.rolname = owner_role
                )
            )
            and r.rolname in (owner_role, 'pgtrickle_relay')
            and not case c.relkind
                when 'S' then pg_catalog.has_sequence_privilege(r.oid, c.oid, 'select')
                else pg_catalog.has_table_privilege(r.oid, c.oid, 'select')
            end
        order by 1, 2
    loop
        begin
            execute format(
                'grant select on %s %s to %I',
                case when (select relkind from pg_catalog.pg_class where oid = relation) = 'S'
                    then 'sequence' else 'table' end,
                relation,
                reader
            );
        exception
            when insufficient_privilege then
                raise notice '% cannot read %: its owner has to grant select on it', reader, relation;
        end;
    end loop;
    if not pg_catalog.has_schema_privilege(owner_role, 'pgtrickle', 'create') then
        execute format('grant usage, create on schema pgtrickle to %I', owner_role);
    end if;
    if exists (select from pg_catalog.pg_roles where rolname = 'pgtrickle_relay')
        and not pg_catalog.has_schema_privilege('pgtrickle_relay', 'pgtrickle', 'usage')
    then
        grant usage on schema pgtrickle to pgtrickle_relay, pgtrickle_publisher;
    end if;
    perform pg_catalog.set_config('role', owner_role, true);
end
$extension_outboxes$;
