-- Who reads which outbox, and how much it holds: for the commands that people type.

create or replace function @schema@.relay_readers()
returns table (
    relay_group_id text, pipeline text, consumer_group text, outbox_table text,
    last_change_id bigint, updated_at timestamptz
)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select
        o.relay_group_id, c.name, c.config #>> '{source,consumer_group}', c.outbox_table_name,
        o.last_change_id, o.updated_at
    from @schema@.relay_outbox_config as c
    left join @schema@.relay_consumer_offsets as o
        on o.pipeline = c.name and o.outbox_table = c.outbox_table_name
    union all
    select null, null, g.group_name, g.outbox_table_name, g.watermark, null
    from @schema@.relay_groups as g
    where not exists (
        select from @schema@.relay_outbox_config as c
        where c.config #>> '{source,consumer_group}' = g.group_name)
$$;
comment on function @schema@.relay_readers() is
    'Definer, since only functions read positions. Every pipeline with the position of each reader in each relay group that has one, once without where none has; and consumer groups that no pipeline reads. Retention waits for all of them.';

create or replace function @schema@.relay_outbox_sizes()
returns table (outbox_table text, stream_table text, estimated_rows bigint, bytes bigint)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
    select
        c.outbox_table_name,
        c.stream_table,
        (select nullif(t.reltuples, -1)::bigint from pg_class as t where t.oid = r.outbox),
        pg_total_relation_size(r.outbox) + coalesce(pg_total_relation_size(r.delta), 0)
    from @schema@.pgt_outbox_config as c
    cross join lateral (
        select
            case when c.adopted is null then to_regclass(format('%I.%I', @schema_name@, c.outbox_table_name))
                else (@schema@.relay_adopted(c.outbox_table_name)).relation end as outbox,
            to_regclass(format('%I.%I', @schema_name@, c.delta_table_name)) as delta
    ) as r
$$;
comment on function @schema@.relay_outbox_sizes() is
    'Definer, since only functions read the catalog. How much each outbox holds on disk, rows of claim checks and indexes included; rows as PostgreSQL estimated them when it last looked, null before.';
