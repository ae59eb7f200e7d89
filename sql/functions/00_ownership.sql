-- Which functions are ours, and who may execute them.

create or replace function pgtrickle.relay_may_define(function_name text)
returns boolean
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
    select not exists (
        select
        from pg_proc as p
        where p.pronamespace = 'pgtrickle'::regnamespace
            and p.proname = function_name
            and (
                p.proowner <> (
                    select c.relowner
                    from pg_class as c
                    where c.oid = 'pgtrickle.relay_migrations'::regclass
                )
                or exists (
                    select
                    from pg_depend as d
                    where d.classid = 'pg_proc'::regclass
                        and d.objid = p.oid
                        and d.deptype = 'e'
                )
            )
    )
$$;

comment on function pgtrickle.relay_may_define(text) is
    'Whether a function of this name is missing or ours; false where the extension brings its own.';

revoke all on function pgtrickle.relay_may_define(text) from public;

create or replace function pgtrickle.relay_grant_execute(grantee text, variadic function_names text[])
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    wanted text;
    signature regprocedure;
begin
    if grantee <> 'public' and to_regrole(quote_ident(grantee)) is null then
        raise notice 'role % is missing: nothing is granted to it', grantee;
        return;
    end if;
    foreach wanted in array function_names
    loop
        if not exists (
            select from pg_proc where pronamespace = 'pgtrickle'::regnamespace and proname = wanted
        ) then
            raise exception using
                errcode = 'undefined_function',
                message = format('there is no function pgtrickle.%s to grant', wanted);
        end if;
        continue when not pgtrickle.relay_may_define(wanted);
        for signature in
            select oid from pg_proc where pronamespace = 'pgtrickle'::regnamespace and proname = wanted
        loop
            execute format(
                'grant execute on function %s to %s',
                signature,
                case grantee when 'public' then 'public' else quote_ident(grantee) end
            );
        end loop;
    end loop;
end
$$;

comment on function pgtrickle.relay_grant_execute(text, text[]) is
    'Grants execution of our functions of these names, all overloads; the extension''s are left alone.';

revoke all on function pgtrickle.relay_grant_execute(text, text[]) from public;
